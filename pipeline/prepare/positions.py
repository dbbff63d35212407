"""Whether a model's table of positions (maths/position_table.py) ends before the longest row, told without its weights."""

from __future__ import annotations

import torch

from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.maths.models import auto_class
from alphatoken.pipeline.maths.position_table import named_positions, positions_of
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.remote import here


def own_positions(source: ModelSource, wanted: int) -> int | None:
    """Tokens that a row of this model may have, where its table of positions ends before ``wanted`` tokens; else None.

    From the configuration alone: the model is built without storage for its weights, and only where the configuration
    names a smaller number. Raises SettingsWrong for a model that cannot be built so.
    """
    config = load_config(here(source, weights=False))
    named = named_positions(config, wanted)
    if not named:
        return None
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # code of models raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SettingsWrong(
            [
                f"model.policy: {source.path} names {min(named)} positions, and whether they end there cannot be told "
                f"({reason}): set data.max_length={min(named)}"
            ]
        ) from error
    return positions_of(model, wanted)
