"""Which tokens are kept."""

import re
from dataclasses import dataclass, replace
from typing import Any

from alphatoken.data_schemas import MASK_EXTRA_COLUMNS
from alphatoken.pipeline.settings.option import at_least, one_of, option


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """Configuration group ``mask``."""

    rho: float = option(0.5, "fraction of the response tokens that is kept")
    stability_weight: float | None = option(
        None,
        "lambda: value = adaptation + lambda * stability; null: 0 where values are of valuation.estimator=information or "
        "made without a drift, else 1.5",
    )
    loss_weight: float = option(0.0, "subtract this much of the token's loss from its value: against wrong tokens")
    least_stable: float = option(
        0.0,
        "this fraction of the response tokens, those with the lowest stability, is not kept whatever their adaptation",
    )
    skip_first: int | None = option(
        None,
        "first tokens of each response that are not kept whatever their value; null: 1 where values are of "
        "valuation.estimator=information, else 0",
    )
    scope: str = option("dataset", "dataset | example | batch | token_id: among which tokens the threshold is taken")
    rare_tokens: int = option(32, "mask.scope=token_id: ids that occur fewer times share one threshold")
    rule: str = option(
        "top",
        "top: keep the tokens at or above the threshold | positive: keep values above 0 | weight: keep all "
        "labels and write a loss_weight between 0 and 1 beside them",
    )
    batch_size: int = option(64, "examples per batch, for mask.scope=batch")
    normalize: str = option(
        "none", "none | rms: divide adaptation, stability and loss by their own root mean square first"
    )
    divide_by_gradient_norm: bool = option(
        False, "divide adaptation and stability of each token by its gradient_norm first (0 where that is 0)"
    )
    always_keep: list[Any] = option(["eos"], "tokens that are always kept: eos, token strings or token ids")
    min_kept: int = option(1, "kept tokens per example at least")
    name: str = option("default", "the mask is written to masks/<name>")
    extra_columns: list[str] = option([], "any of loss_mask, assistant_masks")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = []
        if not 0 < self.rho <= 1:
            found.append(f"mask.rho={self.rho}: must be above 0 and at most 1")
        found += at_least("mask.stability_weight", self.stability_weight or 0, 0)
        if not 0 <= self.least_stable < 1:
            found.append(f"mask.least_stable={self.least_stable}: must be at least 0 and below 1")
        elif self.least_stable and self.rule != "positive" and self.rho + self.least_stable > 1:
            found.append(
                f"mask.rho={self.rho} and mask.least_stable={self.least_stable}: more than all tokens together"
            )
        found += at_least("mask.skip_first", self.skip_first or 0, 0)
        found += one_of("mask.scope", self.scope, ("dataset", "example", "batch", "token_id"))
        found += at_least("mask.loss_weight", self.loss_weight, 0)
        found += at_least("mask.rare_tokens", self.rare_tokens, 0)
        found += one_of("mask.rule", self.rule, ("top", "positive", "weight"))
        found += at_least("mask.batch_size", self.batch_size, 1)
        found += one_of("mask.normalize", self.normalize, ("none", "rms"))
        found += at_least("mask.min_kept", self.min_kept, 0)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", self.name):
            found.append(f"mask.name={self.name}: letters, digits and . _ = , + - only, since it names a directory")
        for column in self.extra_columns:
            found += one_of("mask.extra_columns", column, MASK_EXTRA_COLUMNS)
        for token in self.always_keep:
            if isinstance(token, bool) or not isinstance(token, int | str):
                found.append(f"mask.always_keep={token}: must be eos, a token string or a token id")
        return found

    def for_values(self, estimator: str | None, drift: str | None = None) -> "MaskSettings":
        """These settings with what is left open until it is known of which ``estimator`` the values are.

        ``drift``: anchor.drift of the directions; without one there is no stability to weigh.

        `information` says where there is most to learn: without stability, whose scale is another one, and without the
        first token, where learning is forgetting. Everything else is as in the paper.
        """
        weight, first = (0.0, 1) if estimator == "information" else (0.0 if drift == "none" else 1.5, 0)
        return replace(
            self,
            stability_weight=weight if self.stability_weight is None else self.stability_weight,
            skip_first=first if self.skip_first is None else self.skip_first,
        )
