"""From columns to the values that thresholds compare, once scales and the border of mask.least_stable are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alphatoken.pipeline.mask.left_out import first_of_responses, lowest_where
from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.maths.masking import Bools, Floats, objective_value, score_of, stability_of, token_values
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.objectives import objective_of

# Settings that have no say in a token's value.
_NO_SAY: dict[str, Any] = {
    "rho": 0.5, "name": "", "scope": "dataset", "rule": "top", "batch_size": 64, "normalize": "none", "always_keep": [],
    "min_kept": 0, "extra_columns": [],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Valuing:
    """``settings``: resolved. All methods are over response tokens, ``(tokens,)``, higher is better.

    ``scales``: of score, stability and loss. ``border``: tokens of lower stability are left out (mask.least_stable).
    """

    settings: MaskSettings
    scales: Mapping[str, float]
    border: np.float32 = np.float32(-np.inf)

    def values(self, rows: PairedRows) -> Floats:
        """Eq. 12 and what else was asked for."""
        return self._weighed(rows, self.settings.stability_weight or 0.0)

    def ranked(self, rows: PairedRows) -> Floats:
        """The values, with the tokens that are left out below all others."""
        return lowest_where(self.first(rows) | self.least_stable(rows) | self.harmful(rows), self.values(rows))

    def without_stability(self) -> Valuing:
        """What it were if stability had no say."""
        scales = {name: scale for name, scale in self.scales.items() if name != "stability"}
        return Valuing(replace(self.settings, stability_weight=0.0, least_stable=0.0), scales)

    @property
    def key(self) -> str:
        """The same for all that give the same values: of masks that differ in how many they keep, for one."""
        return repr((replace(self.settings, **_NO_SAY), sorted(self.scales.items()), float(self.border)))

    def first(self, rows: PairedRows) -> Bools:
        """Those that mask.skip_first leaves out."""
        return first_of_responses(rows, self.settings.skip_first or 0, self.settings.skip_first_from or 1)

    def harmful(self, rows: PairedRows) -> Bools:
        """Those that mask.require leaves out: of a value below 0 for one of its tasks."""
        found = np.zeros(int(rows.offsets[-1]), np.bool_)
        for name in self.settings.required:
            found |= objective_value(rows.components, objective_of(name), score=self.settings.score) < 0
        return found

    @property
    def objectives(self) -> dict[str, float]:
        """mask.weights by direction, without those of 0."""
        return {objective_of(name): weight for name, weight in self.settings.weighed.items()}

    def least_stable(self, rows: PairedRows) -> Bools:
        """Those that mask.least_stable leaves out."""
        if not self.settings.least_stable:
            return np.zeros(int(rows.offsets[-1]), np.bool_)
        return self.stability(rows) < self.border

    def stability(self, rows: PairedRows) -> Floats:
        """What the border is looked for in."""
        own = self.settings
        return stability_of(rows.components, own.score, own.divide_by_gradient_norm).astype(np.float32)

    def term(self, rows: PairedRows, name: str) -> np.ndarray:
        """score | stability | loss, or a direction of mask.weights, before its scale, float64."""
        own = self.settings
        if name in self.objectives:
            return objective_value(rows.components, name, own.divide_by_gradient_norm, own.score)
        if name == "loss":
            return rows.components["loss"].astype(np.float64)
        if name == "stability":
            return stability_of(rows.components, own.score, own.divide_by_gradient_norm)
        return score_of(rows.components, own.score, own.divide_by_gradient_norm)

    def _weighed(self, rows: PairedRows, weight: float) -> Floats:
        own = self.settings
        if own.score == "full":
            return np.zeros(int(rows.offsets[-1]), np.float32)
        values = token_values(
            rows.components,
            own.score,
            weight,
            self.scales,
            own.loss_weight,
            own.divide_by_gradient_norm,
            self.objectives,
        )
        if not np.isfinite(values).all():
            weights = {"stability_weight": weight, "loss_weight": own.loss_weight, "weights": own.weights}
            asked = [f"mask.{name}={number}" for name, number in weights.items() if number]
            key = ", ".join(asked) or f"mask.score={own.score}"
            raise RunFailed(f"{key}: values do not fit into float32; choose a smaller one")
        return values
