"""The closed loop that valuation.schedule=rehearsal runs over the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.mask import MaskSettings
from alphatoken.pipeline.settings.option import at_least, option


@dataclass(frozen=True, slots=True)
class RehearsalSettings:
    """Configuration group ``valuation.rehearsal``: values, threshold within the batch, masked step, next batch."""

    rho: float = option(0.5, "fraction of each batch's response tokens that is kept: the mask that is written")
    stability_weight: float = option(1.5, "lambda: value = adaptation + lambda * stability; 0 needs no Fisher")
    batch_size: int = option(64, "examples per optimizer step, each example in one step; the paper's is 64")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW on the scored modules")
    refresh: int = option(1, "steps after which the two directions are made anew from the present weights")
    save_every: int = option(10, "steps after which the state is saved: at most as many are lost with a killed driver")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = []
        if not 0 < self.rho <= 1:
            found.append(f"valuation.rehearsal.rho={self.rho}: must be above 0 and at most 1")
        found += at_least("valuation.rehearsal.stability_weight", self.stability_weight, 0)
        for name in ("batch_size", "refresh", "save_every"):
            found += at_least(f"valuation.rehearsal.{name}", getattr(self, name), 1)
        if not self.learning_rate > 0:
            found.append(f"valuation.rehearsal.learning_rate={self.learning_rate}: must be above 0")
        return found

    def decided(self) -> dict[str, Any]:
        """Key of mask -> what the rehearsal decides with."""
        return decided_by({name: getattr(self, name) for name in OWN})


OWN = ("rho", "stability_weight", "batch_size")  # keys of mask that are keys of the rehearsal as well


def decided_by(own: Mapping[str, Any]) -> dict[str, Any]:
    """Key of mask -> what a rehearsal with these values of OWN decides with (Eq. 13)."""
    return {
        **own,
        "score": "paper",
        "rule": "top",
        "scope": "batch",
        "normalize": "none",
        "loss_weight": 0.0,
        "least_stable": 0.0,
        "skip_first": 0,
        "skip_first_from": None,
        "weights": None,
        "require": "none",
    }


def contradictions(mask: MaskSettings, decided: Mapping[str, Any]) -> list[str]:
    """What was asked of mask that is neither the default nor what the rehearsal decides with, one sentence each."""
    usual = MaskSettings()
    return [
        f"mask.{key}={asked}: a rehearsal decides with {key}={value}"
        + (f"; another one with valuation.rehearsal.{key}={asked}, in another run.dir" if key in OWN else "")
        for key, value in decided.items()
        if (asked := getattr(mask, key)) not in (value, getattr(usual, key))
    ]
