"""Which tokens are kept."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from alphatoken.data_schemas import COMPONENTS, EXACT, MASK_EXTRA_COLUMNS, REFERENCE_LOSS, SCORES, UNROLLED
from alphatoken.pipeline.settings.objectives import columns_of, names_in, unknown_names
from alphatoken.pipeline.settings.option import at_least, one_of, option

# mask.score -> the columns of values/ that it is made of.
MASK_SCORES: dict[str, tuple[str, ...]] = {
    "paper": COMPONENTS[:2],
    "information": ("information",),
    "entropy": ("entropy",),
    "loss": ("loss",),
    "excess_loss": ("loss", REFERENCE_LOSS),
    "exact": EXACT[:1],
    "unrolled": (f"adaptation{UNROLLED}",),
    "random": (),
    "full": (),
}
WITHOUT_VALUES = ("random", "full")
LONG_ANSWER = 32  # tokens
LONGEST_NAME = 200  # characters: file systems take 255, and a file beside it has more than the name


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """Configuration group ``mask``."""

    score: str = option(
        "auto",
        "which tokens come first: paper (adaptation + lambda * stability, Eq. 12) | information | entropy (undecided first) | "
        "loss (low loss first: against wrong tokens) | excess_loss (policy's minus reference's, Rho-1) | exact | unrolled "
        "(valuation.schedule=own_step) | random "
        "| full (keep everything) | auto (information; paper for pairs, for a rehearsal and where values/ has no "
        "information; unrolled where it has that)",
    )
    rho: float = option(0.5, "fraction of the response tokens that is kept")
    stability_weight: float | None = option(
        None,
        "lambda: value = score + lambda * stability; null: 1.5 for mask.score=paper and exact, where there is a drift and there "
        "are no mask.weights, else 0",
    )
    weights: Any = option(
        None,
        "{task: weight, ...} of data.validation's tasks, of retention and of adaptation (all tasks together): the score is the "
        "weighed sum of their values instead; null: the paper's adaptation",
    )
    require: Any = option(
        "none",
        "all: a token with a value below 0 for any task of data.validation, or for retention, is not kept whatever its value; or a "
        "list of tasks; none",
    )
    loss_weight: float = option(0.0, "subtract this much of the token's loss from its value: against wrong tokens")
    least_stable: float = option(
        0.0,
        "this fraction of the response tokens, those with the lowest stability, is not kept whatever their adaptation",
    )
    skip_first: int | None = option(
        None,
        "first tokens of each response that are not kept whatever their value; null: 1 for mask.score=information, else 0",
    )
    skip_first_from: int | None = option(
        None,
        "mask.skip_first holds for responses of at least so many tokens; null: 1 where mask.skip_first is given, else 32: of a "
        "short answer the first token is what is to be learned",
    )
    scope: str = option("dataset", "dataset | example | batch | token_id: among which tokens the threshold is taken")
    rare_tokens: int = option(32, "mask.scope=token_id: ids that occur fewer times share one threshold")
    rule: str = option(
        "top",
        "top: keep the tokens at or above the threshold | positive: keep values above 0 | weight: keep all "
        "labels and write a loss_weight between 0 and 1 beside them",
    )
    batch_size: int = option(64, "examples per batch, for mask.scope=batch")
    normalize: str = option("none", "none | rms: divide score, stability and loss by their own root mean square first")
    divide_by_gradient_norm: bool = option(
        False, "divide score and stability of each token by its gradient_norm first (0 where that is 0)"
    )
    always_keep: list[Any] = option(["eos"], "tokens that are always kept: eos, token strings or token ids")
    min_kept: Any = option(
        None,
        "kept tokens per example at least; below 1, such as 0.2: that fraction of its response tokens, beside those of "
        "mask.always_keep, so that short answers keep more than their end; null: 0.2 for mask.score=information, else 1",
    )
    name: str = option("default", "the mask is written to masks/<name>")
    extra_columns: list[str] = option([], "any of loss_mask, assistant_masks")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = one_of("mask.score", self.score, ("auto", *MASK_SCORES))
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
        found += at_least("mask.skip_first_from", 1 if self.skip_first_from is None else self.skip_first_from, 1)
        found += one_of("mask.scope", self.scope, ("dataset", "example", "batch", "token_id"))
        found += at_least("mask.loss_weight", self.loss_weight, 0)
        for key, asked in (
            ("loss_weight", self.loss_weight),
            ("stability_weight", self.stability_weight),
            ("divide_by_gradient_norm", self.divide_by_gradient_norm),
        ):
            if asked and self.score in WITHOUT_VALUES:
                found.append(f"mask.{key}={asked}: mask.score={self.score} looks at no values: leave it out")
        found += self._objective_problems()
        found += at_least("mask.rare_tokens", self.rare_tokens, 0)
        found += one_of("mask.rule", self.rule, ("top", "positive", "weight"))
        found += at_least("mask.batch_size", self.batch_size, 1)
        found += one_of("mask.normalize", self.normalize, ("none", "rms"))
        if self.min_kept is None:
            pass
        elif isinstance(self.min_kept, bool) or not isinstance(self.min_kept, int | float):
            found.append(f"mask.min_kept={self.min_kept}: must be a whole number of tokens, or a fraction below 1")
        elif not (0 <= self.min_kept < 1 or self.min_kept == int(self.min_kept) >= 1):
            found.append(f"mask.min_kept={self.min_kept}: must be at least 0, and above 1 a whole number of tokens")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", self.name):
            found.append(f"mask.name={self.name}: letters, digits and . _ = , + - only, since it names a directory")
        elif len(self.name) > LONGEST_NAME:
            found.append(f"mask.name: {len(self.name)} characters, and a directory's name has {LONGEST_NAME} at most")
        for column in self.extra_columns:
            found += one_of("mask.extra_columns", column, MASK_EXTRA_COLUMNS)
        for token in self.always_keep:
            if isinstance(token, bool) or not isinstance(token, int | str):
                found.append(f"mask.always_keep={token}: must be eos, a token string or a token id")
        return found

    def resolved(
        self, paired_or_rehearsed: bool, drift: str | None = None, there: Collection[str] = ()
    ) -> "MaskSettings":
        """These settings with what is left open until it is known what the values are of.

        ``paired_or_rehearsed``: whether the data is of preference, or the schedule a rehearsal. ``drift``: anchor.drift of
        the directions; without one there is no stability to weigh. ``there``: the columns of values/.

        A mask that is made once has to hold for a whole training run: `information` says where there is most to learn,
        without stability, whose scale is another one, and without the first token, where learning is forgetting; the rest
        of a short answer must not go with it. A rehearsal is the paper's own loop, and of a pair only signed values say
        which branch a token speaks for. Of an answer of a word or two the first token is no manner of speaking but the answer.
        """
        lacking = "information" not in there and set(MASK_SCORES["paper"]) <= set(there)
        usual = "paper" if paired_or_rehearsed or lacking or self.weights else "information"
        if f"adaptation{UNROLLED}" in there:
            usual = "unrolled"
        score = usual if self.score == "auto" else self.score
        weight = 1.5 if score in ("paper", "exact") and drift != "none" and not self.weights else 0.0
        first, fewest = (1, 0.2) if score == "information" else (0, 1)
        usual_from = LONG_ANSWER if first and self.skip_first is None else 1
        return replace(
            self,
            score=score,
            stability_weight=weight if self.stability_weight is None else self.stability_weight,
            skip_first=first if self.skip_first is None else self.skip_first,
            skip_first_from=usual_from if self.skip_first_from is None else self.skip_first_from,
            min_kept=fewest if self.min_kept is None else self.min_kept,
            require=names_in(there, score) or "all" if self.require == "all" else self.require,
        )

    @property
    def weighed(self) -> dict[str, float]:
        """mask.weights without those of 0."""
        return {name: weight for name, weight in (self.weights or {}).items() if weight}

    @property
    def required(self) -> list[str]:
        """The tasks, and retention, for which no token may have a value below 0; of resolved settings."""
        return [self.require] * (self.require != "none") if isinstance(self.require, str) else list(self.require)

    def _objective_problems(self) -> list[str]:
        found = []
        given = self.weights if isinstance(self.weights, dict) else {}
        if self.weights is not None and not given:
            found.append(f"mask.weights={self.weights}: must be {{task: weight, ...}} or null")
        for name, weight in given.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                found.append(f"mask.weights.{name}={weight}: must be a number")
            else:
                found += at_least(f"mask.weights.{name}", weight, 0)
        if given and not any(given.values()):
            found.append(f"mask.weights={given}: at least one must be above 0")
        if self.weights and self.score not in ("auto", "paper", "unrolled"):
            found.append(
                f"mask.weights={self.weights}: they weigh values of tasks, mask.score={self.score} is none: set mask.score=paper"
            )
        if isinstance(self.require, str):
            found += one_of("mask.require", self.require, ("none", "all"))
        elif not isinstance(self.require, list | tuple) or not all(isinstance(name, str) for name in self.require):
            found.append(f"mask.require={self.require}: must be none, all or a list of tasks")
        return found

    def columns(self) -> dict[str, str]:
        """Column of values/ that is read -> the key that asks for it; of resolved settings."""
        first = MASK_SCORES[self.score]
        if self.weights:
            first = tuple(column for name in self.weighed for column in columns_of(name, self.score))
        found = dict.fromkeys(first, "mask.weights" if self.weights else f"mask.score={self.score}")
        for name in self.required:
            found |= {column: found.get(column, "mask.require") for column in columns_of(name, self.score)}
        stability = {"exact": EXACT[1:], "unrolled": (f"stability{UNROLLED}",)}.get(self.score, COMPONENTS[2:])
        for asked, columns in (
            ("stability_weight", stability),
            ("least_stable", stability),
            ("loss_weight", ("loss",)),
        ):
            if getattr(self, asked):
                found |= {c: found.get(c, f"mask.{asked}={getattr(self, asked)}") for c in columns}
        if self.divide_by_gradient_norm:
            found["gradient_norm"] = "mask.divide_by_gradient_norm=true"
        return found

    def unknown(self, there: Collection[str]) -> list[str]:
        """Tasks that are asked for and have no columns in ``there``, one sentence each; of resolved settings."""
        if self.require == "all" and not names_in(there, "unrolled"):
            return [
                "mask.require=all: values/ has no columns of tasks: give data.validation={task: FILE, ...} or data.retention=FILE"
            ]
        asked = {"mask.weights": self.weighed, "mask.require": self.required}
        if self.required and not names_in(there, self.score) and names_in(there, "unrolled"):
            return [
                f"mask.require goes by values along directions, and values/ has those at own steps alone: mask.score={self.score} "
                "cannot be used with it, set mask.score=unrolled"
            ]
        return [line for key, names in asked.items() for line in unknown_names(key, names, there, self.score)]

    def missing(self, there: Collection[str], scores: Collection[str]) -> list[tuple[str, dict[str, Any]]]:
        """Why these settings cannot be met by values with the columns ``there``, one sentence for each remedy: what to set.

        ``scores``: of valuation.scores, which ``there`` come from.
        """
        if self.unknown(there):
            return []  # said by that
        found: list[tuple[str, dict[str, Any]]] = []
        other = [s for s, columns in MASK_SCORES.items() if set(columns) <= set(there)]
        known = f" (values/ has what mask.score={', '.join(other)} need)"
        for column, asked in self.columns().items():
            remedy = _asks_for(column, scores)
            if column not in there and all(remedy != one for _, one in found):
                found.append((f"{asked} needs the column {column}, which values/ does not have{known}", remedy))
        return found


def _asks_for(column: str, scores: Collection[str]) -> dict[str, Any]:
    """The settings with which values/ has ``column``."""
    if column.endswith(UNROLLED):
        return {"anchor.direction": "unrolled", "valuation.schedule": "own_step"}
    if column in EXACT:
        return {"valuation.exact": True}
    if column == REFERENCE_LOSS:
        return {"valuation.reference_loss": True}
    return {"valuation.scores": [score for score, columns in SCORES.items() if score in scores or column in columns]}
