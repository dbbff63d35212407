"""mask over the values of a rehearsal: the decision has been taken, batch by batch, and is only written down here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from alphatoken.data_schemas import KEPT
from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.maths.masking import Floats
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.rehearsal import OWN, contradictions, decided_by

NOTE = (
    "the rehearsal has decided, batch by batch, at the values of its own steps: the keys of mask that decide are unused; "
    "another valuation.rehearsal.rho is another rehearsal"
)


def is_rehearsed(inputs: Mapping[str, Any]) -> bool:
    """``inputs``: of the value stage."""
    return inputs.get("valuation.schedule") == "rehearsal"


def as_rehearsed(settings: MaskSettings, inputs: Mapping[str, Any]) -> MaskSettings:
    """The settings by which the rehearsal has decided, and those of ``settings`` that still have a say.

    Raises SettingsWrong where something was asked for that is neither the default nor what the rehearsal did.
    """
    decided = decided_by({name: inputs[f"valuation.rehearsal.{name}"] for name in OWN})
    if wrong := contradictions(settings, decided):
        raise SettingsWrong(wrong)
    return replace(settings, **decided)


class Decided:
    """As a threshold: minus infinity for the tokens that the rehearsal kept, infinity for the others."""

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """One number per token."""
        return np.where(rows.components[KEPT], np.float32(-np.inf), np.float32(np.inf)), np.zeros(0, np.float32)
