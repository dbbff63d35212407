"""Load a policy or a reference: a local directory, a hub id, or a PEFT adapter merged into its base.

An image-text checkpoint is loaded as what it is; its text decoder is scored.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, adapter_base, load_config, reading
from alphatoken.pipeline.maths.placement import Placement
from alphatoken.pipeline.maths.spread import Spread

# The image-text class raises on any input in transformers 5.24 (findings/llama4_with_images_does_not_run.sh); the causal LM
# is the text decoder of the same checkpoint.
TEXT_ALONE = ("llama4",)


def load_model(source: ModelSource, device: torch.device | Placement) -> PreTrainedModel:
    """The model in evaluation mode on ``device``, or laid out as a Placement says, an adapter merged.

    dtype ``auto``: float32 on a CPU, where bfloat16 is slow; the checkpoint's own elsewhere. Raises UnreadableModel, and
    of a Placement DoesNotFit and UnsupportedModel.
    """
    placement = device if isinstance(device, Placement) else Placement((device,))
    dtype: Any = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(source.dtype)
    if dtype is None:
        dtype = torch.float32 if placement.device.type == "cpu" else "auto"
    base = adapter_base(source.path)
    path = base or source.path
    config = load_config(source)
    kind = auto_class(config)
    spread = None if placement.whole else Spread(kind, config, dtype, placement, source.trust_remote_code)
    if spread is not None and base is None:
        return reading(path, lambda: spread.load(path, source.arguments())).eval()
    if spread is not None and spread.quantised:
        raise UnreadableModel(
            f"{source.path} is a PEFT adapter, which cannot be merged into a base of model.lower_dtype="
            f"{placement.lower_dtype}: give model.policy the merged model (model.merge_and_unload())"
        )
    model = reading(path, lambda: kind.from_pretrained(path, dtype=dtype, **source.arguments()))
    if base is not None:
        model = _merged(model, source.path)
    return spread.spread(model).eval() if spread is not None else model.to(placement.device).eval()


def auto_class(config: Any) -> Any:
    """The auto class of transformers that a checkpoint's configuration asks for: image-text-to-text or causal LM.

    A type that is both is what its ``architectures`` say, but for those whose image-text class does not run. Raises
    UnsupportedModel for a type that is neither, as an encoder-decoder is.
    """
    kind = config.model_type
    text, own_code = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, getattr(config, "auto_map", None)
    if not text and not own_code and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UnsupportedModel(f"{kind} is no decoder-only language model that transformers knows: give a causal LM")
    if kind in TEXT_ALONE or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForCausalLM
    image_text = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    saved = (getattr(config, "architectures", None) or [image_text])[0]
    both = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if both and saved != image_text else AutoModelForImageTextToText


def _merged(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UnreadableModel(f"{adapter} is a PEFT adapter: pip install peft") from error
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise UnreadableModel(
            f"{adapter} is a {config.peft_type.value} adapter, which adds tokens and cannot be merged into weights: give "
            "model.policy its base model, or an adapter of another kind"
        )
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UnreadableModel(f"{adapter} cannot be merged into its base: {reason}") from error
