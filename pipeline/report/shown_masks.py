"""The finished masks of a run that are shown token by token, and which score each of them decides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken.pipeline.mask.comparison import MaskPlace, branches_of
from alphatoken.pipeline.mask.layout import finished_masks
from alphatoken.pipeline.mask.rehearsed import is_rehearsed
from alphatoken.pipeline.mask.valuing import Valuing
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remedies import first
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.mask import WITHOUT_VALUES

MOST = 12  # masks in one page: every combination of decisions is counted, which are 2 to the power of this
PLAIN_COLUMNS = ("information", "entropy")  # scores that are a column as it stands


@dataclass(frozen=True, slots=True)
class ShownMask:
    """``summaries``: branch -> summary.json, of pairs what it says of the branch.

    ``score``: the name of what the mask decides by, None where it looks at no values. ``values``: branch -> how that score
    is made, where it is no column. ``grouped``: examples of a group that has a threshold of its own, None where there are no
    such groups; ``ranked``: branch -> what is compared within them.
    """

    name: str
    places: dict[str, MaskPlace]
    summaries: dict[str, dict[str, Any]]
    score: str | None
    values: dict[str, Valuing]
    grouped: int | None
    ranked: dict[str, Valuing]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that this mask was made with, resolved."""
        found: dict[str, Any] = next(iter(self.summaries.values()))["settings"]
        return found

    @property
    def always(self) -> np.ndarray:
        """Token ids that it keeps whatever their value."""
        return np.array(next(iter(self.summaries.values()))["always_keep_ids"], np.int64)


def finished(run: Run) -> list[str]:
    """The names of the masks that are whole; some may have been removed since. Raises RunFailed where there is none."""
    names = finished_masks(run.storage, run.manifest)
    if not names:
        raise RunFailed(f"there is no mask in {run.storage.root}: {first(run.storage.place, 'mask')}")
    return names


def shown_masks(run: Run, names: Sequence[str]) -> list[ShownMask]:
    """Those of ``names``, in that order; masks that decide by equal values share the name of the score."""
    found: list[ShownMask] = []
    for name in names:
        places = {branch: MaskPlace(run.storage, name, branch) for branch in branches_of(run.storage)}
        summaries = {branch: place.summary for branch, place in places.items()}
        score, values = _score(run, name, summaries)
        equal = next((one for one in found if values and one.values == values), None)
        ranked = {branch: _ranked(one) for branch, one in summaries.items()}
        grouped = _grouped(run, next(iter(ranked.values())).settings)
        found.append(ShownMask(name, places, summaries, equal.score if equal else score, values, grouped, ranked))
    return found


def _score(run: Run, name: str, summaries: dict[str, dict[str, Any]]) -> tuple[str | None, dict[str, Valuing]]:
    first = next(iter(summaries.values()))
    settings = MaskSettings(**first["settings"])
    if settings.score in WITHOUT_VALUES or not run.manifest.done("value"):
        return None, {}
    weighed = settings.stability_weight or settings.loss_weight or settings.divide_by_gradient_norm or settings.weights
    rms = settings.normalize == "rms"
    if settings.score in PLAIN_COLUMNS and not weighed and not rms and not is_rehearsed(values_of(run)):
        return settings.score, {}
    plain = MaskSettings(
        score=settings.score, stability_weight=settings.stability_weight, loss_weight=settings.loss_weight,
        normalize=settings.normalize, divide_by_gradient_norm=settings.divide_by_gradient_norm, weights=settings.weights,
    )  # fmt: skip
    return f"value of {name}", {branch: Valuing(plain, one["scales"]) for branch, one in summaries.items()}


def _ranked(summary: dict[str, Any]) -> Valuing:
    """The values that were compared with the threshold, without those that were left out."""
    border = summary["left_out"]["stability_below"]
    return Valuing(
        MaskSettings(**summary["settings"]), summary["scales"], np.float32(-np.inf if border is None else border)
    )


def _grouped(run: Run, settings: MaskSettings) -> int | None:
    """Consecutive examples of a part that were compared with each other alone."""
    decided = settings.rule == "top" and settings.score not in WITHOUT_VALUES and not is_rehearsed(values_of(run))
    sizes = {"example": 1, "batch": settings.batch_size}
    return sizes.get(settings.scope) if decided else None


def values_of(run: Run) -> dict[str, Any]:
    """The inputs of the value stage; empty before it is done."""
    found: dict[str, Any] = run.manifest.stage("value").get("inputs", {}) if run.manifest.done("value") else {}
    return found
