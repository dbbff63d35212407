"""The worker of prepare: raw rows become Examples or Pairs, a part of prepared/ and its quarantine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREPARED, QUARANTINE
from alphatoken.pipeline.maths.models import ModelSource, load_tokenizer
from alphatoken.pipeline.prepare import remarks
from alphatoken.pipeline.prepare.pairs import Pair, PairMaker, is_pair
from alphatoken.pipeline.prepare.repeated import repeats_prompt, without_prompt
from alphatoken.pipeline.prepare.rows import TemplateRequired, Unusable
from alphatoken.pipeline.prepare.sources import decode
from alphatoken.pipeline.prepare.tokenize import IGNORED, Example, ExampleMaker
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

LONGEST_RAW = 1 << 20  # characters of a row that the quarantine keeps
Pieces = list[tuple[str, list[int], pa.Table]]


@dataclass(frozen=True, slots=True)
class PrepareTask:
    """Rows for one worker call. ``part``: the file name to write, or None to send the examples back.

    ``role`` matters to preference data alone: "train" rows become pairs; "held-out" ones are pairs too, of which the
    chosen branch is the example; "validation" rows may also be supervised ones. ``repeated``: every row of the data
    repeats its prompt, which is taken off.
    """

    pieces: Pieces
    part: str | None
    quarantine: str | None
    fingerprint: str
    role: str = "train"
    repeated: bool = False


class PrepareWorker:
    """Tokenizes raw rows; holds the tokenizer and the place to write to."""

    def __init__(
        self, storage: Storage, source: ModelSource, vocabulary: int, settings: Settings, preference: bool
    ) -> None:
        data = settings.data
        self.storage, self.columns = storage, data.columns.given()
        tokenizer = load_tokenizer(here(source, weights=False))
        arguments = tokenizer, data.max_length, data.chat_template, self.columns, vocabulary
        self.make = ExampleMaker(*arguments)
        self.pair = PairMaker(*arguments) if preference else None
        self.keep_reasoning = data.keep_reasoning

    def __call__(
        self, task: PrepareTask, advance: Callable[[int], None]
    ) -> tuple[dict[str, Any], list[Example | None]]:
        """Returns the counts, and for a task without a part one example per row in row order (None: not usable)."""
        examples: list[Any] = []
        usable: list[Any] = []
        rejected: list[dict[str, Any]] = []
        for name, numbers, table in task.pieces:
            for number, (row, reason) in zip(numbers, decode(table), strict=True):
                made: list[Any] = []
                if reason is None:
                    try:
                        made = self._made(row, f"{name}:{number}", task)
                    except TemplateRequired as error:
                        raise RunFailed(f"{name}, row {number}: {error}") from error
                    except Unusable as error:
                        reason = str(error)
                if reason is not None:
                    rejected.append({"file": name, "row": number, "reason": _storable(reason), "raw": _raw(row)})
                usable += made
                examples.append(made[-1] if made else None)
                advance(1)
        if task.quarantine and rejected:
            self.storage.write_table(task.quarantine, pa.Table.from_pylist(rejected, QUARANTINE), task.fingerprint)
        counts = _counts(usable, rejected)
        if task.part:  # after its quarantine, so that a part that is there has both
            pairs = self.pair is not None and task.role == "train"
            table = (to_pair_table if pairs else to_table)(usable)
            self.storage.write_table(task.part, table, task.fingerprint, counts)
            examples = []
        return counts, examples

    def _made(self, row: Any, source: str, task: PrepareTask) -> list[Any]:
        """The examples of a row: one, or several with data.keep_reasoning; the pair of one."""
        notes: tuple[str, ...] = ()
        if repeats_prompt(row, self.columns):
            notes = ("prompt_stripped",) if task.repeated else ("prompt_repeated",)
            row = without_prompt(row, self.columns) if task.repeated else row
        made: list[Any]
        if self.pair is None or (task.role == "validation" and not is_pair(row, self.columns)):
            made = self.make.turn_by_turn(row, source) if self.keep_reasoning else [self.make(row, source)]
        else:
            pair = self.pair(row, source)
            made = [pair if task.role == "train" else replace(pair.chosen, notes=pair.notes)]
        return [replace(made[0], notes=(*made[0].notes, *notes)), *made[1:]] if notes else made


def to_table(examples: Iterable[Example]) -> pa.Table:
    """Examples as a prepared table."""
    rows = list(examples)
    return pa.table({name: [getattr(e, name) for e in rows] for name in PREPARED.names}, schema=PREPARED)


def to_pair_table(pairs: Iterable[Pair]) -> pa.Table:
    """Pairs as a prepared table."""
    rows = list(pairs)
    columns = {"id": [p.chosen.id for p in rows], "source": [p.chosen.source for p in rows]}
    columns |= {name: [getattr(p, f"{name}_text") for p in rows] for name in ("prompt", *BRANCHES)}
    for branch in BRANCHES:
        for name in ("input_ids", "labels"):
            columns[f"{branch}_{name}"] = [getattr(getattr(p, branch), name) for p in rows]
    return pa.table({name: columns[name] for name in PREFERENCE_PREPARED.names}, schema=PREFERENCE_PREPARED)


def _counts(usable: Sequence[Example | Pair], rejected: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts = Counter(f"reason/{row['reason'].split(':')[0]}" for row in rejected)
    counts["rows_used"] = len(usable)
    counts["quarantined"] = len(rejected)
    counts.update(f"note/{note}" for example in usable for note in example.notes)
    counts["truncated"] = sum(example.truncated for example in usable)
    sequences = [s for e in usable for s in ((e.chosen, e.rejected) if isinstance(e, Pair) else (e,))]
    lost = dict.fromkeys(sequence.source for sequence in sequences if sequence.lost)  # each row once
    counts.update(remarks.of_rejected(rejected) | remarks.of_lost(lost))
    counts["tokens"] = sum(len(sequence.input_ids) for sequence in sequences)
    counts["response_tokens"] = sum(label != IGNORED for sequence in sequences for label in sequence.labels)
    return dict(counts)


def _raw(row: Any) -> str:
    try:
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError):
        text = json.dumps(f"a {type(row).__name__} that cannot be written as JSON")
    if len(text) > LONGEST_RAW:
        text = f"{text[:LONGEST_RAW]}... ({len(text)} characters)"
    return _storable(text)


def _storable(text: str) -> str:
    """Arrow strings are UTF-8: lone surrogates are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
