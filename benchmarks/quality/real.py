"""Real data with real faults: which scores find what a user would want to keep, on two sets that no one here made clean.

    python -m benchmarks.quality.real pool|chat [--place runs/real] [--only RUN ...]

``pool``: 80 rows of code among 160 of synthetic chat, validation code: which scores find the target's tokens? ``chat``:
chat alone, with all sums that come out wrong, validation 64 rows that were read one by one: which scores find the faults?
Writes the rows, values them (every score, one run of the pipeline for each way to make directions), and prints areas
under the curve: the chance that a token, or a row by its mean, that should be kept scores higher than one that should
not; equal scores count half. What is made is kept.

For masks on the same run: `alphatoken trial run.dir=PLACE/pool/default ...`, then `benchmarks.quality.trial`.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.pipeline.maths.batch import IGNORED
from alphatoken.pipeline.prepare.example import example_model
from benchmarks.quality.chat import ChatRow, chat_rows, checked_rows, drawn_rows
from benchmarks.quality.grid import write_rows
from benchmarks.quality.noise import area_under_curve, ranks
from benchmarks.quality.rows import load_rows

PROMPTS = 24  # of the training rows, held out for the Fisher and for a trial's completions
CODE, CHAT, CODE_VALIDATION, CODE_HELD_OUT = 80, 160, 32, 40  # rows of the pool
PLAIN, RIGHT, ABOUT_NOTHING = 90, 60, 60  # rows of the chat, beside all with wrong sums
# A quarter of the time in bfloat16, and prompts that are few enough for an evening.
COMMON = ("model.dtype=bfloat16", f"anchor.fisher.prompts={PROMPTS}", "anchor.fisher.max_new_tokens=64")
RUNS: dict[str, tuple[str, ...]] = {
    "default": (),
    "kfac": ("anchor.precondition=kfac", "anchor.drift=none"),
    "unrolled": ("anchor.direction=unrolled",),
}
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rows:
    """``held_out``: rows of their own for a trial; None: half of the validation rows."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    held_out: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Question:
    """What should score higher (``good``) than what (``bad``): flags over all response tokens; ``row`` of each token."""

    name: str
    good: Flags
    bad: Flags
    row: npt.NDArray[np.int64]

    def areas(self, scores: Floats) -> tuple[float, float]:
        """By tokens, and by the mean of each row's flagged tokens."""
        either = self.good | self.bad
        numbers, places = np.unique(self.row[either], return_inverse=True)
        means = np.bincount(places, scores[either]) / np.bincount(places)
        faulty = np.bincount(places, self.bad[either]) > 0
        assert len(numbers) == len(means)
        return area_under_curve(scores[either], self.bad[either]), area_under_curve(means, faulty)

    @property
    def counts(self) -> str:
        """How many of each, for people."""
        rows = [len(np.unique(self.row[flags])) for flags in (self.good, self.bad)]
        return f"{int(self.good.sum()):,} tokens of {rows[0]} rows against {int(self.bad.sum()):,} of {rows[1]}"


def pool() -> Rows:
    """Code among chat; the code that is valued and that is measured on is not the same."""
    code = load_rows(CODE, CODE_VALIDATION, CODE_HELD_OUT)
    chat = [row for row in chat_rows() if not row.about_nothing]
    random.Random(2).shuffle(chat)
    train = [{"id": f"code-{i}", **row} for i, row in enumerate(code.train)] + [row.row for row in chat[:CHAT]]
    random.Random(3).shuffle(train)
    return Rows(train, code.validation, code.held_out["report"])


def chat() -> Rows:
    """Chat with its faults, and rows that were read; half of those make directions, half are for a trial."""
    rows = chat_rows()
    return Rows([row.row for row in training(rows)], [row.row for row in checked_rows(rows)], None)


def training(rows: list[ChatRow]) -> list[ChatRow]:
    """What is valued: faults that code can find are drawn more often than they occur."""
    return drawn_rows(rows, PLAIN, RIGHT, ABOUT_NOTHING)


SETS = {"pool": pool, "chat": chat}


def value(place: Path, rows: Rows, run: str, threads: int) -> Path:
    """The run directory of one kind of directions; made by the pipeline's own command where it is not there."""
    files = {name: write_rows(place / f"{name}.jsonl", own) for name, own in _files(rows).items()}
    own = [f"data.train={files['train']}", f"data.validation={files['validation']}"]
    own.append(f"data.validation_trial={files.get('held_out', 'half')}")
    own += [*COMMON, "cluster.workers=1", f"cluster.cpus_per_worker={threads}", *RUNS[run]]
    command = [sys.executable, "-m", "alphatoken.jobs", "run", f"run.dir={place / run}", *own]
    subprocess.run(command, check=True)
    return place / run


def _files(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    own = {"train": rows.train, "validation": rows.validation}
    return own if rows.held_out is None else {**own, "held_out": rows.held_out}


@dataclass(frozen=True, slots=True)
class Valued:
    """All response tokens of a run: their ``columns`` by name, and per row its ``ids`` and ``tokens``."""

    columns: dict[str, Floats]
    ids: list[str]
    tokens: list[list[int]]

    @property
    def row(self) -> npt.NDArray[np.int64]:
        """The row of each token."""
        return np.repeat(np.arange(len(self.ids)), [len(own) for own in self.tokens])


def valued(run: Path) -> Valued:
    """Read prepared/ and values/ of a run."""
    found: dict[str, list[Floats]] = {}
    ids, tokens = [], []
    for file in sorted((run / "values").glob("*.parquet")):
        prepared = pq.read_table(run / "prepared" / file.name).to_pylist()
        for row, values in zip(prepared, pq.read_table(file).to_pylist(), strict=True):
            inside = np.array(row["labels"]) != IGNORED
            ids.append(row["id"])
            tokens.append(np.array(row["input_ids"])[inside].tolist())
            for name in values.keys() - {"id"}:
                found.setdefault(name, []).append(np.array(values[name], np.float64)[inside])
    return Valued({name: np.concatenate(parts) for name, parts in found.items()}, ids, tokens)


def scores(columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """What a mask could choose by, higher first."""
    alignment = columns["adaptation_direct"] + columns["adaptation_causal"]
    loss = columns["loss"]
    found = {
        "information": columns["information"],
        "alignment (the paper's adaptation)": alignment,
        "alignment / gradient norm": alignment / np.maximum(columns["gradient_norm"], 1e-12),
        "entropy": columns["entropy"],
        "minus entropy": -columns["entropy"],
        "loss": loss,
        "minus loss": -loss,
        "gradient norm": columns["gradient_norm"],
        "information and minus loss, rank sum": ranks(columns["information"]) + ranks(-loss),
        "alignment and minus loss, rank sum": ranks(alignment) + ranks(-loss),
        "entropy minus loss": columns["entropy"] - loss,
    }
    if "stability_direct" in columns:
        found["stability (the paper's)"] = columns["stability_direct"] + columns["stability_causal"]
    return found


def questions(name: str, found: Valued, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """What is asked of the scores on one of SETS."""
    row = found.row
    if name == "pool":
        code = np.array([one.startswith("code-") for one in found.ids])[row]
        return [Question("code before chat", code, ~code, row)]
    rows = {f"chat-{one.id}": one for one in chat_rows()}
    own = [rows[one] for one in found.ids]
    invented = np.array([one.about_nothing for one in own])[row]
    wrong = np.array([bool(one.wrong_sums) for one in own])[row]
    right = np.array([bool(one.right_sums) for one in own])[row] & ~wrong
    results = [_spans(one, ids, tokenizer) for one, ids in zip(own, found.tokens, strict=True)]
    good, bad = (np.concatenate([pair[i] for pair in results]) for i in (0, 1))
    return [
        Question("rows whose question shows its text before rows about none", ~invented & ~wrong, invented, row),
        Question("rows with right sums before rows with a wrong one", right, wrong, row),
        Question("results of right sums before results of wrong ones", good, bad, row),
    ]


def _spans(row: ChatRow, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Flags, Flags]:
    """Which response tokens hold characters of a right, and of a wrong result."""
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    begin = tokenizer.decode(ids).find(row.answer)
    if begin < 0:
        raise ValueError(f"chat-{row.id}: its answer is not what was prepared")
    starts = [0, *ends[:-1]]

    def touched(spans: Iterable[tuple[int, int]]) -> Flags:
        inside = np.zeros(len(ids), bool)
        for start, end in spans:
            inside |= (np.array(starts) < end + begin) & (np.array(ends) > start + begin)
        return inside

    return touched(row.right_sums), touched(row.wrong_sums)


def main() -> None:
    """Value what is missing, and print one table per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("--place", type=Path, default=Path("runs/real"))
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=["default", "kfac"])
    options = parser.parse_args()
    place = options.place.resolve() / options.set
    rows = SETS[options.set]()
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    for run in options.only:
        found = valued(value(place, rows, run, int(os.environ.get("OMP_NUM_THREADS", "2"))))
        asked = questions(options.set, found, tokenizer)
        print(f"\n{run}: {len(found.ids)} rows, {len(found.row):,} response tokens")
        for one in asked:
            print(f"{one.name}: {one.counts}")
        titles = [f"{one.name}: {unit}" for one in asked for unit in ("tokens", "rows")]
        print(f"\n| score | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
        for name, column in scores(found.columns).items():
            cells = [f"{area:.3f}" for one in asked for area in one.areas(column)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
