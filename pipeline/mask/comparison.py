"""Masks of one data set beside each other: how much each keeps, how far they agree, and what decides in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from alphatoken.data_schemas import BRANCHES, COMPONENTS
from alphatoken.pipeline.mask.layout import mask_part, open_part, summary_of
from alphatoken.pipeline.mask.paired_rows import IGNORED
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class MaskPlace:
    """A finished mask; of preference pairs one branch of it, which reads as if it were supervised data."""

    storage: Storage
    name: str
    branch: str = ""

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.name}, {self.branch}" if self.branch else self.name

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; of pairs what it says of the branch, beside what holds for both."""
        whole = summary_of(self.storage, self.name)
        return {**whole, **whole["branches"][self.branch]} if self.branch else whole

    def file(self, part: str) -> str:
        """Where its rows of a part of prepared/ are, relative to the run directory."""
        return mask_part(self.name, part)


def branches_of(storage: Storage) -> tuple[str, ...]:
    """The branches of a run's data: one without a name for supervised data."""
    return BRANCHES if Manifest(storage).pairs else ("",)


@dataclass(frozen=True, slots=True)
class ComparedMask:
    """``agreement``: Jaccard index with the baseline, None where the tokens are not the same.

    ``contributions``: of ``contributions``. ``loss_of_kept``: mean over kept tokens, nats; None where values/ has no loss.
    ``only_always``: examples that keep nothing but the tokens of mask.always_keep.
    """

    place: MaskPlace
    kept_fraction: float
    agreement: float | None
    contributions: dict[str, float] | None
    loss_of_kept: float | None
    only_always: int


def compare(baseline: MaskPlace, masks: Sequence[MaskPlace]) -> list[ComparedMask]:
    """Every mask against the baseline, streamed part by part, all at once; of pairs, against the same branch."""
    found: list[ComparedMask] = []
    tokens = _tokens_of(baseline)
    same = [mask for mask in masks if _tokens_of(mask) == tokens]
    agreements: dict[MaskPlace, float] = {}
    for branch in dict.fromkeys(mask.branch for mask in same):
        own = [mask for mask in same if mask.branch == branch]
        agreements.update(zip(own, _jaccard(replace(baseline, branch=branch), own), strict=True))
    for mask in masks:
        summary, agreement = mask.summary, agreements.get(mask)
        loss = summary["columns"].get("loss", {}).get("mean_kept")
        only = summary["rows_with_only_always_kept"]
        found.append(ComparedMask(mask, summary["kept_fraction"], agreement, contributions(summary), loss, only))
    return found


def contributions(summary: dict[str, Any]) -> dict[str, float] | None:
    """The share of each component in what kept tokens have over masked ones; the shares sum to 1.

    The mean value of kept tokens less that of masked ones is the sum over components of weight * (mean over kept -
    mean over masked), with weight 1 / scale for adaptation and lambda / scale for stability (Eq. 12). A negative share:
    the component speaks against what was kept. None where nothing was masked or there is no difference, and where
    values are no sum of the components (another mask.score, mask.weights, mask.divide_by_gradient_norm).
    """
    settings, scales = summary["settings"], summary["scales"]
    if settings["score"] != "paper" or settings.get("weights") or settings.get("divide_by_gradient_norm"):
        return None
    weights = {"adaptation": 1.0 / scales["score"]}
    weights["stability"] = settings["stability_weight"] / scales.get("stability", 1.0)
    gaps = {}
    for name in COMPONENTS:
        column = summary["columns"][name]
        if column["mean_kept"] is None or column["mean_masked"] is None:
            return None
        gaps[name] = weights[name.partition("_")[0]] * (column["mean_kept"] - column["mean_masked"])
    total = sum(gaps.values())
    return {name: gap / total for name, gap in gaps.items()} if total else None


def _tokens_of(mask: MaskPlace) -> str:
    """What tells whether two masks speak of the same tokens."""
    return Manifest(mask.storage).stage("prepare")["fingerprint"]


def _jaccard(one: MaskPlace, others: Sequence[MaskPlace]) -> list[float]:
    """|kept by both| / |kept by either| of each; 1 where neither keeps anything."""
    both, either = [0] * len(others), [0] * len(others)
    for part in Manifest(one.storage).stage("prepare")["counts"]["parts"]:
        theirs = [None if other == one else kept_in_part(other, part, ROWS_AT_ONCE) for other in others]
        for a in kept_in_part(one, part, ROWS_AT_ONCE):
            own = int(np.count_nonzero(a))
            for index, other in enumerate(theirs):
                b = a if other is None else next(other)
                shared = own if other is None else int(np.count_nonzero(a & b))
                both[index] += shared
                either[index] += own + (own if other is None else int(np.count_nonzero(b))) - shared
    return [x / y if y else 1.0 for x, y in zip(both, either, strict=True)]


def kept_in_part(mask: MaskPlace, part: str, rows: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Kept tokens of ``rows`` rows at a time, ``(tokens,)``; all masks of a data set are cut alike."""
    labels = f"{mask.branch}_labels" if mask.branch else "labels"
    with open_part(mask.storage, mask.name, part) as file:
        for batch in file.iter_batches(batch_size=rows, columns=[labels]):
            yield batch.column(0).flatten().to_numpy() != IGNORED
