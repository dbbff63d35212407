"""mask: from values to labels that a trainer reads. No model, no torch, memory of a few hundred rows and of a row group per mask.

First the passes that find scales and thresholds (passes.py), then one that decides, counts and writes. Several masks of one
run go over the rows together (together.py). Nothing here is random but mask.score=random, which is drawn from the seed and
each example's id.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alphatoken.data_schemas import BRANCHES
from alphatoken.pipeline.mask.card import card
from alphatoken.pipeline.mask.inputs import MaskInputs, mask_inputs
from alphatoken.pipeline.mask.layout import (
    earlier_shards,
    mask_card,
    mask_data,
    mask_place,
    mask_summary,
    shard_name,
    summary_of,
)  # fmt: skip
from alphatoken.pipeline.mask.passes import Asking, Found
from alphatoken.pipeline.mask.rehearsed import NOTE
from alphatoken.pipeline.mask.remarks import WARNED, each_once, mask_label
from alphatoken.pipeline.mask.thresholds import OverDataSet, PerTokenId, Within, some_tokens
from alphatoken.pipeline.mask.together import Planned, decide_together
from alphatoken.pipeline.mask.worker import LOWEST, Decider, Tally
from alphatoken.pipeline.maths.masking import rank_of
from alphatoken.pipeline.run.progress import counted
from alphatoken.pipeline.run.run import Run

ROWS_AT_ONCE = 256
TIES_WORTH_SAYING = 0.01
LESS_WORTH_SAYING = 0.01  # of a mean of soft weights
ONLY_ALWAYS_WORTH_SAYING = 0.02  # of the examples


@dataclass(frozen=True, slots=True)
class BegunMask:
    """A mask that is asked for, whose settings are found to fit. ``done``: its summary, where it is finished already."""

    run: Run
    inputs: MaskInputs
    fingerprint: str
    done: dict[str, Any] | None

    @property
    def stage(self) -> str:
        """Its name in the manifest."""
        return f"mask/{self.inputs.settings.name}"

    @property
    def rows_at_once(self) -> int:
        """How the rows are cut; masks that are cut alike can be made together. Of mask.scope=batch whole groups."""
        settings = self.inputs.settings
        if settings.scope != "batch":
            return ROWS_AT_ONCE
        return settings.batch_size * max(1, ROWS_AT_ONCE // settings.batch_size)


def make_mask(run: Run) -> dict[str, Any]:
    """Write masks/<name>/ and return its summary, unless done already.

    Parts first, then the card, then summary.json. Goes on where it stopped: a complete part is counted again but not
    written again. Raises SettingsWrong for settings that cannot be met and for others than those that the name was begun
    with, and RunFailed for parts that are missing, damaged or do not belong together, and where there is no response
    token.
    """
    return make_masks([begin_mask(run)])[0]


def begin_mask(run: Run) -> BegunMask:
    """Check a mask's settings and note in the manifest that it was begun. Raises SettingsWrong and RunFailed."""
    inputs = mask_inputs(run)
    name = inputs.settings.name
    stage = f"mask/{name}"
    fingerprint = run.manifest.begin(stage, inputs.fingerprinted, {"mask": inputs.settings})
    if run.manifest.done(stage) and _is_whole(run, name, fingerprint):
        run.progress.say(f"mask: {name} is done already")
        return BegunMask(run, inputs, fingerprint, summary_of(run.storage, name))
    return BegunMask(run, inputs, fingerprint, None)


def make_masks(begun: Sequence[BegunMask]) -> list[dict[str, Any]]:
    """Write masks of one run that are all cut alike (``rows_at_once``), reading the rows once for all; returns their summaries.

    The same bytes as one after another. Raises as ``make_mask`` does.
    """
    missing = [one for one in begun if one.done is None]
    made: dict[str, dict[str, Any]] = {}
    if missing:
        started = time.monotonic()
        planned = [
            Planned(one.run, one.inputs, one.fingerprint, _is_hard(one.inputs), _askings(one)) for one in missing
        ]
        decided = decide_together(planned, missing[0].rows_at_once)
        for one, (deciders, tallies) in zip(missing, decided, strict=True):
            made[one.stage] = _finish(one, deciders, tallies, (time.monotonic() - started) / len(missing))
        for remark in each_once(noted for one in missing for noted in _noted(made[one.stage])):
            missing[0].run.progress.once(f"{remark.masks}: {remark.text}")
    return [one.done if one.done is not None else made[one.stage] for one in begun]


def _askings(one: BegunMask) -> dict[str, Asking]:
    branches = BRANCHES if one.run.manifest.pairs else ("",)
    return {branch: Asking(branch, one.inputs.settings, one.inputs.rehearsed) for branch in branches}


def _finish(one: BegunMask, deciders: dict[str, Decider], tallies: dict[str, Tally], seconds: float) -> dict[str, Any]:
    """The card, the summary, and the end of the stage."""
    run, inputs, name = one.run, one.inputs, one.inputs.settings.name
    _forget_earlier_shards(run, name)
    summaries = {branch: _summary(inputs, deciders[branch], tallies[branch]) for branch in deciders}
    summary = _of_pairs(summaries) if run.manifest.pairs else summaries[""]
    run.storage.write_bytes(mask_card(name), card(summary, inputs.schema, one.fingerprint).encode())
    run.storage.write_json(mask_summary(name), summary)
    told = ("rows", "response_tokens", "kept_tokens", "kept_fraction")
    run.manifest.finish(one.stage, seconds, **{key: summary[key] for key in told})
    return summary


def _noted(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The mask by name, of pairs with the branch, and each of its notes."""
    for branch, found in summary.get("branches", {"": summary}).items():
        for note in found["notes"]:
            yield mask_label(summary["name"], branch), note


def _is_whole(run: Run, name: str, fingerprint: str) -> bool:
    parts = run.manifest.stage("prepare")["counts"]["parts"]
    whole = len(run.storage.footers(mask_data(name), [shard_name(part) for part in parts], fingerprint)) == len(parts)
    return whole and all(run.storage.exists(file) for file in (mask_card(name), mask_summary(name)))


def _forget_earlier_shards(run: Run, name: str) -> None:
    """Shards beside the card, of a version that had no data/: nothing reads them any more."""
    left = earlier_shards(run.storage, name)
    for file in left:
        run.storage.remove(file)
    if left:
        run.progress.say(
            f"mask: what an earlier version left in {mask_place(name)}/ is removed, now that data/ holds it ({len(left):,} files)"
        )


def _is_hard(inputs: MaskInputs) -> bool:
    """Whether values decide which labels stay."""
    return inputs.settings.score != "full" and inputs.settings.rule != "weight" and not inputs.rehearsed


def _summary(inputs: MaskInputs, decider: Decider, tally: Tally) -> dict[str, Any]:
    """What was found and what was decided, once every row has been."""
    some_tokens(tally.counts.response_tokens)
    found, settings = decider.found, inputs.settings
    where = _where_the_threshold_stands(inputs, decider, tally)
    counts = tally.counts.as_json()
    border = float(found.valuing.border) if settings.least_stable else None
    return {
        "name": settings.name,
        "score": settings.score,
        "schedule": "rehearsal" if inputs.rehearsed else "static",
        "settings": asdict(settings),
        "always_keep_ids": inputs.always.tolist(),
        "scales": dict(found.valuing.scales),
        "made_with": inputs.made_with,
        **where,
        **counts,
        **tally.lengths.as_json(),
        **({} if decider.hard else {"decisions_changed_by_stability": None}),
        "left_out": tally.left_out.as_json(border),
        "notes": _in_order([*inputs.notes, *_what_happened(inputs, decider, tally, counts)]),
    }


def _in_order(notes: list[str]) -> list[str]:
    """Warnings first."""
    return sorted(notes, key=lambda note: not note.startswith(WARNED))


def _what_happened(inputs: MaskInputs, decider: Decider, tally: Tally, counts: dict[str, Any]) -> list[str]:
    settings, found = inputs.settings, decider.found
    notes = [f"{name} is zero for every token, so that mask.normalize=rms leaves it as it is" for name in found.zeros]
    if settings.least_stable and not tally.left_out.least_stable:
        notes.append("stability is the same for all tokens, so that mask.least_stable leaves none out")
    if settings.score == "full":
        but = " but those of mask.skip_first" if settings.skip_first else ""
        notes.append(f"mask.score=full keeps every response token{but}: mask.rho, mask.rule and mask.scope are unused")
    elif inputs.rehearsed:
        notes.append(NOTE)
    elif settings.rule == "positive":
        notes.append("mask.rule=positive keeps every value above 0: mask.rho and mask.scope are unused")
    elif settings.rule == "weight":
        notes.append("labels keep every response token: a trainer has to multiply each token's loss by loss_weight")
        mean = tally.soft.as_json()["mean"]
        if mean < settings.rho - LESS_WORTH_SAYING:
            notes.append(
                f"tokens that are left out weigh 0: the mean weight is {mean:.3f}, not mask.rho={settings.rho}"
            )
    elif settings.scope in ("dataset", "token_id"):
        sizes = found.groups.sizes.tolist() if found.groups else [counts["response_tokens"]]
        settled = counts["kept_tokens"] - counts["kept_only_by_always_keep"] - counts["kept_only_by_min_kept"]
        tied = settled - sum(rank_of(settings.rho, size) for size in sizes)
        if tied > TIES_WORTH_SAYING * counts["response_tokens"]:
            notes.append(f"{tied:,} tokens more than mask.rho asks for are kept, since they tie at the threshold")
    if decider.hard and settings.rule == "top":
        notes += _what_was_left(inputs, tally, counts)
    only = counts["rows_with_only_always_kept"]
    if only > ONLY_ALWAYS_WORTH_SAYING * counts["rows"]:
        notes.append(
            f"{WARNED}{only:,} of {counts['rows']:,} examples keep nothing but the tokens of mask.always_keep, and teach "
            "nothing but to end: mask.min_kept=0.2 keeps a fifth of each answer at least, mask.scope=example mask.rho of each",
        )
    return notes


def _what_was_left(inputs: MaskInputs, tally: Tally, counts: dict[str, Any]) -> list[str]:
    """What keys that leave tokens out do to mask.rho and to short answers."""
    settings, notes = inputs.settings, []
    keys = [key for key in ("skip_first", "least_stable") if getattr(settings, key)]
    asked = [f"mask.{key}={getattr(settings, key)}" for key in keys]
    by = " and ".join([*asked, *[f"mask.require=[{','.join(settings.required)}]"] * bool(settings.required)])
    if counts["kept_tokens"] < rank_of(settings.rho, counts["response_tokens"]):
        notes.append(f"{by} leaves fewer tokens than mask.rho={settings.rho} asks for")
    if tally.left_out.emptied:
        notes.append(
            f"in {counted(tally.left_out.emptied, 'examples')} there are no tokens but those that {by} leaves out and those "
            "of mask.always_keep"
            + (": where short answers are the task, set mask.skip_first=0" if settings.skip_first else "")
        )
    return notes


def _where_the_threshold_stands(inputs: MaskInputs, decider: Decider, tally: Tally) -> dict[str, Any]:
    """summary.json: ``threshold`` of everything or ``thresholds`` of groups, the groups, and the soft weights."""
    found: Found = decider.found
    first, settings = found.threshold, inputs.settings
    single: float | None = None
    if isinstance(first, OverDataSet):
        single = float(max(first.threshold, LOWEST))
    elif settings.rule == "positive" and settings.score != "full":
        single = 0.0
    if isinstance(first, PerTokenId):
        tally.counts.thresholds.add(np.maximum(first.thresholds, LOWEST))
    several = isinstance(first, PerTokenId | Within)
    by_id = settings.scope == "token_id" and found.groups
    return {
        "threshold": single,
        "thresholds": tally.counts.thresholds.as_json() if several else None,
        "token_id_groups": found.groups.as_json() if by_id and found.groups else None,
        "loss_weight": tally.soft.as_json() if settings.rule == "weight" else None,
    }


def _of_pairs(branches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both branches' summaries, and sums over them under the names that a supervised summary has."""
    chosen = branches["chosen"]
    tokens, kept = (sum(b[name] for b in branches.values()) for name in ("response_tokens", "kept_tokens"))
    soft = [(b["loss_weight"], b["response_tokens"]) for b in branches.values() if b["loss_weight"]]
    shared = ("name", "score", "settings", "always_keep_ids", "made_with")
    return {
        "format": "preference",
        **{name: chosen[name] for name in shared},
        "rows": chosen["rows"],
        "response_tokens": tokens,
        "kept_tokens": kept,
        "kept_fraction": kept / tokens,
        "loss_weight": {"mean": sum(w["mean"] * n for w, n in soft) / tokens} if soft else None,
        "branches": {
            branch: {key: value for key, value in found.items() if key not in shared}
            for branch, found in branches.items()
        },
        "notes": [f"{branch}: {note}" for branch, found in branches.items() for note in found["notes"]],
    }
