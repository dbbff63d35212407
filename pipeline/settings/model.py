"""Which models: the policy that is going to be trained and the reference whose knowledge should stay."""

from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.option import auto_or_at_least, one_of, option

QUANTISED = ("int8", "int4")
LOWER_DTYPES = ("auto", "float32", "bfloat16", *QUANTISED)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Configuration group ``model``."""

    policy: Any = option(
        "embedded",
        "local directory, hub id, PEFT adapter directory, `embedded` (SmolLM2-135M-Instruct), or a list of checkpoints "
        "of one run: values are the mean over them",
    )
    reference: Any = option(
        None, "the pre-trained model to stay close to; default: model.policy (or its base, for an adapter)"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub, for both models")
    dtype: str = option("auto", "auto (float32 on a CPU, else the checkpoint's) | float32 | bfloat16")
    lower_dtype: str = option(
        "auto",
        "of the decoder layers below those that are scored or trained, which are only run forward: auto (as model.dtype; "
        "bfloat16 where cluster.gpus_per_worker is above 1) | float32 | bfloat16 | int8 | int4 (these two by bitsandbytes)",
    )
    offload: str = option(
        "none",
        "where lower layers go that do not fit on the devices: none (they have to fit) | cpu | disk; they are brought back "
        "for every pass",
    )
    device_bytes: int | float | str = option(
        "auto",
        "bytes of weights on each device where a model is spread or offloaded; auto: 0.85 of what is free, on a worker's last "
        "device, which holds directions and activations as well, 0.6",
    )
    attention: str = option("sdpa", "sdpa | flash_attention_2 | eager")
    trust_remote_code: bool = option(False, "allow a checkpoint to run code of its own")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        found += one_of("model.attention", self.attention, ("sdpa", "flash_attention_2", "eager"))
        found += one_of("model.lower_dtype", self.lower_dtype, LOWER_DTYPES)
        found += one_of("model.offload", self.offload, ("none", "cpu", "disk"))
        found += auto_or_at_least("model.device_bytes", self.device_bytes, 1)
        if self.lower_dtype in QUANTISED and self.offload != "none":
            found.append(
                f"model.lower_dtype={self.lower_dtype}: {self.lower_dtype} layers cannot be offloaded: set model.offload=none, "
                "or model.lower_dtype=bfloat16"
            )
        if isinstance(self.reference, list | tuple):
            found.append("model.reference: there is one reference, give one model")
        named = [("model.policy", one) for one in self.checkpoints]
        for key, value in (*named, ("model.reference", self.reference)):
            if value is not None and not isinstance(value, list | tuple | str):
                found.append(f"{key}={value}: must be a directory, a hub id or `embedded`")
        if self.policy is None or not self.checkpoints:
            found.append("model.policy is missing: give a local directory, a hub id or `embedded`")
        if len(self.checkpoints) > 1:
            twice = sorted({str(one) for one in self.checkpoints if self.checkpoints.count(one) > 1})
            found += [f"model.policy names {one} twice: each checkpoint counts once" for one in twice]
            if not self.reference:
                found.append(
                    "model.policy is a list of checkpoints: set model.reference to the model whose knowledge should stay, "
                    "such as the one that they were trained from"
                )
        return found

    @property
    def checkpoints(self) -> tuple[Any, ...]:
        """model.policy as a list, of one checkpoint in most cases."""
        return tuple(self.policy) if isinstance(self.policy, list | tuple) else (self.policy,)
