"""mask: from values to labels that a trainer reads. No model, no torch, memory of a few hundred rows.

The threshold over the data set is exact: a radix selection in two passes over the values; in four or eight with
mask.scope=token_id, in more with mask.rule=weight. One more pass writes. Before, mask.normalize=rms and token_id take one
pass each and mask.least_stable two. The same rows are read each time; nothing is held but counts, per token id at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from alphatoken.data_schemas import (
    BRANCHES,
    GRADIENT_NORM,
    KEPT,
    LOSS_WEIGHT,
    SCHEMA_KEY,
    masks_schema,
    preference_masks_schema,
)
from alphatoken.pipeline.mask.always_keep import always_keep_ids
from alphatoken.pipeline.mask.card import card
from alphatoken.pipeline.mask.left_out import LeftOut, lowest_where
from alphatoken.pipeline.mask.paired_rows import IGNORED, PairedParts, PairedRows
from alphatoken.pipeline.mask.rehearsed import NOTE, Decided, as_rehearsed, is_rehearsed
from alphatoken.pipeline.mask.soft_weights import WeightCounts, WeightsOverDataSet, WeightsWithin
from alphatoken.pipeline.mask.summary import MaskCounts
from alphatoken.pipeline.mask.thresholds import (
    KEEP_ALL,
    KEEP_POSITIVE,
    Fixed,
    OverDataSet,
    PerTokenId,
    Threshold,
    Within,
    some_tokens,
)
from alphatoken.pipeline.maths.group_select import TokenGroups
from alphatoken.pipeline.maths.masking import OBJECTIVES, Floats, keep_flat, objective, rank_of, token_values
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.valuation import NO_LOSS

if TYPE_CHECKING:
    from alphatoken.pipeline.run.progress import Progress

ROWS_AT_ONCE = 256
LOWEST = np.finfo(np.float32).min  # of finite values: the threshold where only tokens that are left out lie below
TIES_WORTH_SAYING = 0.01
PLAIN_ALIGNMENT = (
    "values were taken at one model by plain alignment: on the measured example of supervised data a fine-tune on such a "
    "mask ends worse than on a random one, on one by valuation.estimator=information better (README, What a mask is worth)"
)


INFORMATION = (
    "adaptation is of valuation.estimator=information: how much a step along the validation gradient moves the token's "
    "prediction, whatever its label; it has no sign"
)
REFERENCE_UNUSED = (
    "stability against model.reference is in values/ and weighs nothing here: give it weight with mask.stability_weight, "
    "or leave out its cost with anchor.drift=none"
)
NO_SIGN = (
    "mask.rule=positive keeps everything that adaptation without a sign is given to: choose mask.rule=top, or values of "
    "valuation.estimator=ghost"
)


def check_norms(settings: MaskSettings, there: bool) -> None:
    """Raise SettingsWrong where values are to be divided by a column that is not ``there``."""
    if settings.divide_by_gradient_norm and not there:
        raise SettingsWrong(
            [
                "mask.divide_by_gradient_norm=true, but values/ has no column gradient_norm: set "
                "valuation.gradient_norm=true (values of estimator=ghost) and value anew"
            ]
        )


def _is_plain_alignment(manifest: Manifest, method: str) -> bool:
    inputs = manifest.stage("anchor").get("inputs", {})
    value = manifest.stage("value")["inputs"]
    if value.get("valuation.estimator") == "information" or is_rehearsed(value):
        return False
    several = inputs.get("anchor.snapshots", 1) > 1 or isinstance(inputs.get("policy"), list)  # of checkpoints
    return method == "alphatoken" and inputs.get("anchor.precondition") == "none" and not several


def make_mask(run: Run) -> dict[str, Any]:
    """Write masks/<name>/ and return its summary, unless done already; needs neither models nor a cluster.

    Parts first, then the card, then summary.json. Goes on where it stopped: a complete part is counted again but not
    written again. Raises SettingsWrong for a token of mask.always_keep that does not exist and for settings other than
    those that the name was begun with, and RunFailed for parts that are missing, damaged or do not belong together, and
    where there is no response token.
    """
    started = time.monotonic()
    storage, manifest, settings, progress = run.storage, run.manifest, run.settings.mask, run.progress
    values = manifest.require("value", "mask")
    method = values["inputs"].get("valuation.method", "alphatoken")
    if settings.loss_weight and method in NO_LOSS:
        raise SettingsWrong(
            [
                f"mask.loss_weight={settings.loss_weight}: valuation.method={method} runs no model, so there are no losses"
            ]
        )
    asked, rehearsed = settings, is_rehearsed(values["inputs"])
    if rehearsed:
        settings = as_rehearsed(settings, values["inputs"])
    anchor = manifest.stage("anchor").get("inputs", {}) if method == "alphatoken" else {}
    estimator, drift = values["inputs"].get("valuation.estimator"), anchor.get("anchor.drift")
    settings, informed = settings.for_values(estimator, drift), estimator == "information"
    if settings.stability_weight and drift == "none":
        raise SettingsWrong(
            [
                f"mask.stability_weight={settings.stability_weight}: the anchors of {storage.root} were made with "
                "anchor.drift=none, so there is no stability to weigh: set mask.stability_weight=0"
            ]
        )
    check_norms(settings, bool(values["inputs"].get("valuation.gradient_norm")))
    always = always_keep_ids(settings.always_keep, manifest)
    prepared = manifest.stage("prepare")
    preference = manifest.pairs
    make_schema = preference_masks_schema if preference else masks_schema
    schema = make_schema(list(dict.fromkeys(settings.extra_columns)), weighted=settings.rule == "weight")
    stage, place = f"mask/{settings.name}", f"masks/{settings.name}"
    inputs = {
        "values": values["fingerprint"],
        "mask": asdict(settings),
        "schema": (schema.metadata or {})[SCHEMA_KEY].decode(),
    }
    fingerprint = manifest.begin(stage, inputs, {"mask": settings})
    parts_there = manifest.stage("prepare")["counts"]["parts"]
    whole = all(storage.rows_of(f"{place}/{_mask_part(part)}", fingerprint) is not None for part in parts_there)
    if manifest.done(stage) and whole and all(storage.exists(f"{place}/{n}") for n in ("README.md", "summary.json")):
        progress.say(f"mask: {settings.name} is done already")
        return storage.read_json(f"{place}/summary.json")
    rows_at_once = ROWS_AT_ONCE
    if settings.scope == "batch":  # whole groups
        rows_at_once = settings.batch_size * max(1, ROWS_AT_ONCE // settings.batch_size)
    more = [KEPT] if rehearsed else ["loss"] if settings.loss_weight else []
    more += [GRADIENT_NORM] if settings.divide_by_gradient_norm else []
    works = []
    for branch in BRANCHES if preference else ("",):
        parts = PairedParts(storage, prepared, values, rows_at_once, more, branch)
        work = Masking(storage, settings, parts, always, (method, estimator), progress, branch)
        if _is_plain_alignment(manifest, method):
            work.note(PLAIN_ALIGNMENT)
        if drift == "checkpoint" and asked.stability_weight is None and not settings.stability_weight:
            work.note(REFERENCE_UNUSED)
        if informed:
            work.note(INFORMATION)
            if settings.rule == "positive" and not (settings.stability_weight or settings.loss_weight):
                work.note(NO_SIGN)
        work.find_scales()
        work.find_groups()
        work.find_least_stable()
        work.find_thresholds()
        works.append(work)
    if preference:
        # Here and not above, since it builds on this file.
        from alphatoken.pipeline.mask.pairs import write_pairs

        summary = write_pairs(works, values, place, schema, fingerprint)
    else:
        summary = works[0].write(place, schema, fingerprint)
    storage.write_bytes(f"{place}/README.md", card(summary, schema, fingerprint).encode())
    storage.write_json(f"{place}/summary.json", summary)
    told = ("rows", "response_tokens", "kept_tokens", "kept_fraction")
    manifest.finish(stage, time.monotonic() - started, **{key: summary[key] for key in told})
    return summary


def _mask_part(part: str) -> str:
    return part.replace("part-", "train-", 1)


class _Advancing(Protocol):
    def advance(self, units: int, /) -> None: ...


class _Silent:
    def advance(self, units: int, /) -> None:
        """Show nothing."""


class Masking:
    """One run of the stage: what the passes find, each building on the one before. Of pairs, one for each branch.

    ``made_by``: valuation.method and, of AlphaToken's values, the estimator.
    """

    def __init__(
        self,
        storage: Storage,
        settings: MaskSettings,
        parts: PairedParts,
        always: np.ndarray,
        made_by: tuple[str, str | None],
        progress: Progress | None,
        branch: str = "",
    ) -> None:
        self.storage, self.settings, self.parts, self.always = storage, settings, parts, always
        self.method, self.estimator = made_by
        self.progress, self.title = progress, f"mask {branch}".rstrip()
        self.counts = MaskCounts()
        self.scales = dict.fromkeys((*OBJECTIVES, "loss") if settings.loss_weight else OBJECTIVES, 1.0)
        self.thresholds: list[Threshold] = []  # of the values, and of adaptation alone for comparison
        self.groups: TokenGroups | None = None  # mask.scope=token_id
        self.left_out = LeftOut(settings)
        self.soft: WeightsOverDataSet | WeightsWithin | None = None  # mask.rule=weight
        self.soft_counts = WeightCounts()
        self.rehearsed = KEPT in parts.columns
        self.per_norm = settings.divide_by_gradient_norm
        self.notes: list[str] = []
        if self.per_norm:
            self.note("adaptation and stability are divided by each token's gradient_norm before tokens are compared")
        if "eos" in settings.always_keep and not len(always):
            self.note("the tokenizer names no end-of-sequence token, so that mask.always_keep=eos keeps none")

    def find_scales(self) -> None:
        """mask.normalize=rms: the root mean square of each objective over all response tokens."""
        if self.settings.normalize != "rms":
            return
        tokens, squares = 0, dict.fromkeys(self.scales, 0.0)
        with self.task("scales", 1) as task:
            for rows in self.parts.all():
                for name in self.scales:
                    column = rows.components["loss"].astype(np.float64) if name == "loss" else None
                    column = objective(rows.components, name, self.per_norm) if column is None else column
                    squares[name] += float(np.square(column).sum())
                tokens += int(rows.offsets[-1])
                task.advance(len(rows))
        some_tokens(tokens)
        for name in self.scales:
            if squares[name]:
                self.scales[name] = float(np.sqrt(squares[name] / tokens))
            elif self.method == "alphatoken" or name != "stability":
                self.note(f"{name} is zero for every token, so that mask.normalize=rms leaves it as it is")

    def find_groups(self) -> None:
        """mask.scope=token_id: how often each id occurs; soft weights over the data set: one group of all."""
        settings = self.settings
        by_id = settings.scope == "token_id" and settings.rule != "positive"
        all_in_one = settings.scope == "dataset" and settings.rule == "weight"
        if self._keeps_all() or not (by_id or all_in_one):
            return
        self.groups = TokenGroups()
        with self.task("groups", 1) as task:
            for rows in self.parts.all():
                self.groups.count(rows.response_ids())
                task.advance(len(rows))
        self.groups.close(settings.rare_tokens if by_id else math.inf)
        some_tokens(int(self.groups.sizes.sum()))

    def find_least_stable(self) -> None:
        """mask.least_stable: below which stability tokens are left out."""
        if self.left_out.least_stable is not None:
            self._feed("least stable", [(self.left_out.stability, self.left_out.least_stable)])

    def find_thresholds(self) -> None:
        """The thresholds with and without stability, or the soft weights."""
        if self.settings.rule == "weight" and not self._keeps_all():
            self.soft = self._weighting()
            self._feed("weights", [(self._ranked, self.soft)])
        self.thresholds = [self._threshold(), self._threshold()]
        self._feed("threshold", list(zip((self._ranked, self._alone), self.thresholds, strict=True)))

    def _keeps_all(self) -> bool:
        return self.method == "full"

    def _is_hard(self) -> bool:
        """Whether values decide which labels stay."""
        return not self._keeps_all() and self.settings.rule != "weight" and not self.rehearsed

    def _threshold(self) -> Threshold:
        settings = self.settings
        if self.rehearsed:
            return Decided()
        if not self._is_hard():
            return Fixed(KEEP_ALL)
        if settings.rule == "positive":
            return Fixed(KEEP_POSITIVE)
        if settings.scope == "dataset":
            return OverDataSet(settings.rho)
        if self.groups:
            return PerTokenId(settings.rho, self.groups)
        return Within(settings.rho, settings.batch_size if settings.scope == "batch" else 1)

    def _weighting(self) -> WeightsOverDataSet | WeightsWithin:
        settings = self.settings
        if self.groups:
            return WeightsOverDataSet(settings.rho, self.groups)
        return WeightsWithin(settings.rho, settings.batch_size if settings.scope == "batch" else 1)

    def _feed(self, name: str, readers: Sequence[tuple[Callable[[PairedRows], Floats], Any]]) -> None:
        """Show every row as often as the readers, (what of the rows, reader) each, want to see them."""
        passes = readers[0][1].passes
        if not passes:
            return
        with self.task(name, passes) as task:
            for _ in range(passes):
                for rows in self.parts.all():
                    for values_of, reader in readers:
                        reader.see(rows, values_of(rows))
                    task.advance(len(rows))
                for _, reader in readers:
                    reader.next()

    def write(self, place: str, schema: pa.Schema, fingerprint: str) -> dict[str, Any]:
        """Write every part that is not complete yet; returns the summary."""
        with self.task("write", 1) as task:
            for part, expected in self.parts.rows.items():
                name = f"{place}/{_mask_part(part)}"
                complete = self.storage.rows_of(name, fingerprint) == expected
                file = nullcontext() if complete else self.storage.table_writer(name, schema, fingerprint)
                with file as out:
                    for rows in self.parts.part(part, with_input_ids=True):
                        kept, weights = self.decide(rows)
                        if out is not None:
                            columns = mask_columns(rows, kept, weights, schema.names)
                            out.write(pa.Table.from_arrays(columns, schema=schema))
                        task.advance(len(rows))
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """What was found and what was decided; call it once, when every row has been decided."""
        some_tokens(self.counts.response_tokens)
        found = self.counts.as_json()
        self._say_what_happened(found)
        return {
            "name": self.settings.name,
            "method": self.method,
            "estimator": self.estimator,
            "schedule": "rehearsal" if self.rehearsed else "static",
            "settings": asdict(self.settings),
            "always_keep_ids": self.always.tolist(),
            "scales": self.scales,
            **self._where_the_threshold_stands(),
            **found,
            **({} if self._is_hard() else {"decisions_changed_by_stability": None}),
            "left_out": self.left_out.as_json(),
            "notes": self.notes,
        }

    def _say_what_happened(self, found: dict[str, Any]) -> None:
        settings = self.settings
        if settings.least_stable and not self.left_out.least_stable_tokens:
            self.note("stability is the same for all tokens, so that mask.least_stable leaves none out")
        if self._keeps_all():
            but = " but those of mask.skip_first" if settings.skip_first else ""
            self.note(
                f"valuation.method=full keeps every response token{but}: mask.rho, mask.rule and mask.scope are unused"
            )
        elif self.rehearsed:
            self.note(NOTE)
        elif settings.rule == "positive":
            self.note("mask.rule=positive keeps every value above 0: mask.rho and mask.scope are unused")
        elif settings.rule == "weight":
            self.note("labels keep every response token: a trainer has to multiply each token's loss by loss_weight")
        elif settings.scope in ("dataset", "token_id"):
            sizes = self.groups.sizes.tolist() if self.groups else [found["response_tokens"]]
            settled = found["kept_tokens"] - found["kept_only_by_always_keep"] - found["kept_only_by_min_kept"]
            tied = settled - sum(rank_of(settings.rho, size) for size in sizes)
            if tied > TIES_WORTH_SAYING * found["response_tokens"]:
                self.note(f"{tied:,} tokens more than mask.rho asks for are kept, since they tie at the threshold")
        if self._is_hard() and settings.rule == "top":
            self._say_what_was_left(found)

    def _say_what_was_left(self, found: dict[str, Any]) -> None:
        """What keys that leave tokens out do to mask.rho and to short answers."""
        keys = [key for key in ("skip_first", "least_stable") if getattr(self.settings, key)]
        by = " and ".join(f"mask.{key}={getattr(self.settings, key)}" for key in keys)
        if found["kept_tokens"] < rank_of(self.settings.rho, found["response_tokens"]):
            self.note(f"{by} leaves fewer tokens than mask.rho={self.settings.rho} asks for")
        if self.left_out.emptied:
            self.note(
                f"{self.left_out.emptied:,} examples have no tokens but those that {by} leaves out and those of "
                "mask.always_keep: where short answers are the task, set mask.skip_first=0"
            )

    def _where_the_threshold_stands(self) -> dict[str, Any]:
        """summary.json: ``threshold`` of everything or ``thresholds`` of groups, the groups, and the soft weights."""
        first = self.thresholds[0]
        single: float | None = None
        if isinstance(first, OverDataSet):
            single = float(max(first.threshold, LOWEST))
        elif self.settings.rule == "positive" and not self._keeps_all():
            single = 0.0
        if isinstance(first, PerTokenId):
            self.counts.thresholds.add(np.maximum(first.thresholds, LOWEST))
        several = isinstance(first, PerTokenId | Within)
        by_id = self.settings.scope == "token_id" and self.groups
        return {
            "threshold": single,
            "thresholds": self.counts.thresholds.as_json() if several else None,
            "token_id_groups": self.groups.as_json() if by_id and self.groups else None,
            "loss_weight": self.soft_counts.as_json() if self.settings.rule == "weight" else None,
        }

    def decide(self, rows: PairedRows) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are kept, bool, and their soft weights, float32: ``(tokens,)`` over all of ``rows``; counts."""
        counts = self.counts
        values, alone, left_out = self._values(rows), self._alone(rows), self.left_out.of(rows, count=True)
        ranked = lowest_where(left_out, values)
        threshold, of_groups = self.thresholds[0].of(rows, ranked)
        counts.thresholds.add(np.maximum(of_groups, LOWEST))
        # A group may have none but tokens that are left out; soft weights leave all labels as they are.
        floor = KEEP_ALL if self.settings.rule == "weight" or self.rehearsed else LOWEST
        threshold = np.maximum(threshold, floor)
        assert rows.input_ids is not None
        always = np.isin(rows.input_ids.flatten().to_numpy()[rows.response], self.always)
        self.left_out.count_emptied(rows.offsets, left_out, always)
        inside = keep_flat(ranked, rows.offsets, threshold, always, self.settings.min_kept)
        columns = {**{name: c for name, c in rows.components.items() if name != KEPT}, "value": values}
        without_stability = alone >= np.maximum(self.thresholds[1].of(rows, alone)[0], floor)
        counts.add(rows.offsets, columns, inside, ranked >= threshold, always, without_stability)
        kept, weights = np.zeros(len(rows.response), np.bool_), np.zeros(len(rows.response), np.float32)
        kept[rows.response] = inside
        if self.settings.rule == "weight":
            soft = self.soft.of(rows, ranked) if self.soft else np.ones(len(values), np.float32)
            weights[rows.response] = self.soft_counts.add(np.where(left_out, np.float32(0), soft), always)
        return kept, weights

    def _ranked(self, rows: PairedRows) -> Floats:
        """The values, with the tokens that are left out below all others."""
        return lowest_where(self.left_out.of(rows), self._values(rows))

    def _alone(self, rows: PairedRows) -> Floats:
        """What the ranked values were if stability had no say."""
        return lowest_where(self.left_out.first(rows), self._weighed(rows, 0.0))

    def _values(self, rows: PairedRows) -> Floats:
        return self._weighed(rows, self.settings.stability_weight or 0.0)

    def _weighed(self, rows: PairedRows, weight: float) -> Floats:
        against_loss = self.settings.loss_weight
        values = token_values(rows.components, weight, self.scales, against_loss, self.per_norm)
        if not np.isfinite(values).all():
            key = f"mask.stability_weight={weight}" + (f", mask.loss_weight={against_loss}" if against_loss else "")
            raise RunFailed(f"{key}: values do not fit into float32; choose a smaller one")
        return values

    def note(self, text: str) -> None:
        """A sentence for the console, the card and summary.json."""
        self.notes.append(text)
        if self.progress:
            self.progress.say(f"{self.title}: {text}")

    @contextmanager
    def task(self, name: str, passes: int) -> Iterator[_Advancing]:
        """Show ``passes`` passes over all rows."""
        if self.progress is None:
            yield _Silent()
        else:
            with self.progress.task(f"{self.title}: {name}", passes * sum(self.parts.rows.values()), "rows") as task:
                yield task


def mask_columns(rows: PairedRows, kept: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> list[pa.ListArray]:
    """The columns ``names`` of a masks table: all tokens attended to, labels -100 outside of ``kept``."""
    assert rows.input_ids is not None
    made: dict[str, Any] = {
        "input_ids": rows.input_ids.flatten(),
        "attention_mask": pa.array(np.ones(len(kept), np.int8)),
        "labels": pa.array(np.where(kept, rows.labels.flatten().to_numpy(), np.int32(IGNORED))),
        LOSS_WEIGHT: pa.array(weights),
    }
    offsets, flags = pa.array(rows.token_offsets(), pa.int32()), pa.array(kept.astype(np.int8))
    return [pa.ListArray.from_arrays(offsets, made.get(name, flags)) for name in names]
