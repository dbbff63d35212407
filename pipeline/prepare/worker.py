"""The worker of prepare: raw rows become Examples or Pairs, a part of prepared/ and its quarantine."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREPARED, QUARANTINE
from alphatoken.pipeline.maths.model_source import ModelSource, load_tokenizer
from alphatoken.pipeline.prepare import remarks
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.outcome import IGNORED
from alphatoken.pipeline.prepare.pairs import Pair, PairMaker, is_pair
from alphatoken.pipeline.prepare.repeated import repeats_prompt, without_prompt
from alphatoken.pipeline.prepare.rows import TemplateRequired, Unusable
from alphatoken.pipeline.prepare.tokenize import Draft, Example, ExampleMaker, usable
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

TOGETHER = 64  # rows that are tokenized in one call
LONGEST_RAW = 1 << 20  # characters of a row that the quarantine keeps
Pieces = list[tuple[str, list[int], pa.Table]]


@dataclass(frozen=True, slots=True)
class PrepareTask:
    """Rows for one worker call. ``part``: the file name to write, or None to send the examples back.

    ``role`` matters to preference data alone: "pair" rows become pairs; "validation" rows, which may also be supervised ones,
    become the chosen branch of a pair. ``repeated``: every row of the data
    repeats its prompt, which is taken off; or the names of the files of which it does. ``trained``: the rows are trained on,
    so that data.long holds for them.
    """

    pieces: Pieces
    part: str | None
    quarantine: str | None
    fingerprint: str
    role: str = "pair"
    repeated: bool | frozenset[str] = False
    trained: bool = False


class PrepareWorker:
    """Tokenizes raw rows; holds the tokenizer and the place to write to. Arguments as `ExampleMaker`'s.

    ``tokenizer``: itself, or where it is loaded from.
    """

    def __init__(
        self, storage: Storage, tokenizer: PreTrainedTokenizerBase | ModelSource, vocabulary: int, settings: Settings,
        preference: bool, positions: int | None = None,
    ) -> None:  # fmt: skip
        data = settings.data
        self.storage, self.columns = storage, data.columns.given()
        if isinstance(tokenizer, ModelSource):
            tokenizer = load_tokenizer(here(tokenizer, weights=False))
        arguments = tokenizer, data.max_length, data.chat_template, self.columns, vocabulary, positions
        self.make = ExampleMaker(*arguments)
        self.pair = PairMaker(*arguments) if preference else None
        self.keep_reasoning = data.keep_reasoning
        self.overlap = data.overlap_within(self.make.longest)
        self.turn = (
            threading.Lock()
        )  # one shard is tokenized while another is written; two at once are slower than in turn

    def __call__(
        self, task: PrepareTask, advance: Callable[[int], None]
    ) -> tuple[dict[str, Any], list[Example | Pair | str]]:
        """Returns the counts, and for a task without a part one example or pair per row in row order, or why there is none."""
        with self.turn:
            made, rejected, examples = self._of_all(task, advance)
        if task.quarantine and rejected:
            self.storage.write_table(task.quarantine, pa.Table.from_pylist(rejected, QUARANTINE), task.fingerprint)
        counts = _counts(made, rejected)
        if task.part:  # after its quarantine, so that a part that is there has both
            pairs = self.pair is not None and task.role == "pair"
            table = (to_pair_table if pairs else to_table)(made)
            self.storage.write_table(task.part, table, task.fingerprint, counts)
            examples = []
        return counts, examples

    def _of_all(
        self, task: PrepareTask, advance: Callable[[int], None]
    ) -> tuple[list[Any], list[dict[str, Any]], list[Example | Pair | str]]:
        """What the rows of a task gave, the rows of its quarantine, and the last of each row or why there is none."""
        examples: list[Any] = []
        made: list[Any] = []
        rejected: list[dict[str, Any]] = []
        rows = (
            (name, number, row, reason)
            for name, numbers, table in task.pieces
            for number, (row, reason) in zip(numbers, decode(table), strict=True)
        )
        while chunk := list(islice(rows, TOGETHER)):
            for (name, number, row, _), found in zip(chunk, self._made(chunk, task), strict=True):
                if isinstance(found, str):
                    examples.append(_storable(found))
                    rejected.append({"file": name, "row": number, "reason": examples[-1], "raw": _raw(row)})
                    continue
                made += found
                examples.append(found[-1])
            advance(len(chunk))
        return made, rejected, examples

    def _made(self, rows: Sequence[tuple[str, int, Any, str | None]], task: PrepareTask) -> list[list[Any] | str]:
        """The examples or the pair of each of ``rows`` (file, number, row, why it cannot be read), or a reason.

        A row gives one, or with data.keep_reasoning or data.long=split several.
        """
        begun = [self._drafted(*row, task) for row in rows]
        drafts_of_all = [d for drafts, _ in begun if isinstance(drafts, list) for d in drafts]
        finished = iter(self.make.finished(drafts_of_all, self.overlap if task.trained else None))
        found: list[list[Any] | str] = []
        for drafts, notes in begun:
            if isinstance(drafts, str):
                found.append(drafts)
                continue
            try:
                own = [drafts] if isinstance(drafts, Example | Pair) else usable([next(finished) for _ in drafts])
            except Unusable as error:
                found.append(str(error))
                continue
            found.append([replace(own[0], notes=(*own[0].notes, *notes)), *own[1:]] if notes else own)
        return found

    def _drafted(
        self, name: str, number: int, row: Any, reason: str | None, task: PrepareTask
    ) -> tuple[list[Draft] | Example | Pair | str, tuple[str, ...]]:
        """A row's drafts, or what is made of its pair, or a reason; and notes on it."""
        notes: tuple[str, ...] = ()
        if reason is not None:
            return reason, notes
        source = f"{name}:{number}"
        try:
            if repeats_prompt(row, self.columns):
                repeated = task.repeated if isinstance(task.repeated, bool) else name in task.repeated
                notes = ("prompt_stripped",) if repeated else ("prompt_repeated",)
                row = without_prompt(row, self.columns) if repeated else row
            if self.pair is None or (task.role == "validation" and not is_pair(row, self.columns)):
                return self.make.drafts(row, source, self.keep_reasoning), notes
            pair = self.pair(row, source)
            return (pair if task.role == "pair" else chosen_of(pair)), notes
        except TemplateRequired as error:
            raise RunFailed(f"{name}, row {number}: {error}") from error
        except Unusable as error:
            return str(error), notes


def chosen_of(made: Example | Pair) -> Example:
    """The chosen branch of a pair, with the pair's notes; an example as it is."""
    return replace(made.chosen, notes=made.notes) if isinstance(made, Pair) else made


def to_table(examples: Iterable[Example]) -> pa.Table:
    """Examples as a prepared table."""
    rows = list(examples)
    columns = {name: [getattr(e, name) for e in rows] for name in PREPARED.names}
    lists = {name: _lists(columns[name]) for name in ("input_ids", "labels")}
    return pa.table(columns | lists, schema=PREPARED)


def _lists(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of token ids as Arrow's, by way of numpy, which takes a third of the time."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    flat = np.concatenate([np.array(row, np.int32) for row in rows]) if rows else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(offsets, flat)


def to_pair_table(pairs: Iterable[Pair]) -> pa.Table:
    """Pairs as a prepared table."""
    rows = list(pairs)
    columns = {"id": [p.chosen.id for p in rows], "source": [p.chosen.source for p in rows]}
    columns |= {name: [getattr(p, f"{name}_text") for p in rows] for name in ("prompt", *BRANCHES)}
    for branch in BRANCHES:
        for name in ("input_ids", "labels"):
            columns[f"{branch}_{name}"] = _lists([getattr(getattr(p, branch), name) for p in rows])
    return pa.table({name: columns[name] for name in PREFERENCE_PREPARED.names}, schema=PREFERENCE_PREPARED)


def _counts(usable: Sequence[Example | Pair], rejected: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts = Counter(f"reason/{row['reason'].split(':')[0]}" for row in rejected)
    counts["rows_used"] = len(usable)
    counts["quarantined"] = len(rejected)
    counts.update(f"note/{note}" for example in usable for note in example.notes)
    names = [example.chosen.id if isinstance(example, Pair) else example.id for example in usable]
    if repeated := len(names) - len(set(names)):
        counts["note/id_repeated"] = repeated
    counts["truncated"] = sum(example.truncated for example in usable)
    sequences = [s for e in usable for s in ((e.chosen, e.rejected) if isinstance(e, Pair) else (e,))]
    if parts := [sequence for sequence in sequences if sequence.window]:
        counts["split_rows"] = len({sequence.source for sequence in parts})
        counts["windows"] = len(parts)
        counts["windows_left_out"] = sum(sequence.left_out for sequence in parts)
    lost = dict.fromkeys(sequence.source for sequence in sequences if sequence.lost)  # each row once
    counts.update(remarks.of_rejected(rejected) | remarks.of_lost(lost))
    counts["tokens"] = sum(len(sequence.input_ids) for sequence in sequences)
    counts["response_tokens"] = sum(len(sequence.labels) - sequence.labels.count(IGNORED) for sequence in sequences)
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
