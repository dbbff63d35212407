"""What prepare costs beside the tokenizer: `python -m benchmarks.prepare` prints the table of docs/cost.md.

Chat rows of about 400 tokens, made from the embedded example. The tokenizer alone goes over the same texts, rendered with
the same template beforehand, in two processes; then the command `prepare` runs on two CPUs. CPU time is that of all
processes together. The stage's seconds have the start of Ray and of the workers in them, the command's also its own imports
and the reading of the file, which is sampled first. `--in-turn` compares one worker with the tokenizer in one process, in
CPU time and in turn: what a row costs, whatever else the machine does, without any start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.prepare.example import example_data, example_model
from alphatoken.pipeline.prepare.sources import open_sources
from alphatoken.pipeline.prepare.worker import PrepareTask, PrepareWorker
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

PROCESSES = 2
TOGETHER = 64  # texts of a call, as prepare has them
POLL = 0.1  # seconds


def chat_rows(count: int) -> Iterator[dict[str, Any]]:
    """``count`` different conversations: the example's rows in turn, each with a number of its own."""
    lines = Path(example_data(print)).read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line)["messages"] for line in lines]
    for index in range(count):
        asked, said = examples[index % len(examples)]
        question = f"Problem {index}. {asked['content']}"
        yield {"messages": [{**asked, "content": question}, {**said, "content": f"{said['content']}\n# {index}"}]}


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds by the clock, seconds of all processes, and tokens."""

    wall: float
    cpu: float
    tokens: int = 0


def _by_template(tokenizer: Any, rows: Sequence[Any]) -> int:
    for row in rows:
        tokenizer.apply_chat_template(row["messages"], tokenize=False)
    return 0


def _one_by_one(tokenizer: Any, rows: Sequence[Any]) -> int:
    return sum(len(tokenizer(row, add_special_tokens=False)["input_ids"]) for row in rows)


def _together(tokenizer: Any, rows: Sequence[Any]) -> int:
    chunks = (rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER))
    return sum(len(ids) for c in chunks for ids in tokenizer(list(c), add_special_tokens=False)["input_ids"])


WORKS: dict[str, Callable[[Any, Sequence[Any]], int]] = {
    "template": _by_template, "one by one": _one_by_one, "together": _together,
}  # fmt: skip


def _half(work: str, file: str, number: int, ready: Any, results: Any) -> None:
    """What one process does: its share of the lines of ``file``."""
    tokenizer = AutoTokenizer.from_pretrained(example_model(print))
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for index, line in enumerate(lines) if index % PROCESSES == number]
    WORKS[work](tokenizer, rows[:TOGETHER])
    ready.wait()
    started = time.perf_counter(), time.process_time()
    tokens = WORKS[work](tokenizer, rows)
    results.put((time.perf_counter() - started[0], time.process_time() - started[1], tokens))


def alone(work: str, file: Path) -> Cost:
    """One of WORKS over all lines of a file, in two processes at once."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(PROCESSES), context.Queue()
    halves = [context.Process(target=_half, args=(work, str(file), n, ready, results)) for n in range(PROCESSES)]
    for half in halves:
        half.start()
    found = [results.get() for _ in halves]
    for half in halves:
        half.join()
    return Cost(max(w for w, _, _ in found), sum(c for _, c, _ in found), sum(t for _, _, t in found))


class Watch:
    """Looks at a process and its descendants while they run: their CPU time, and the memory of the process itself.

    ``own``: the most memory in MB that no file stands behind; ``resident``: with mapped files, which the system may drop.
    """

    def __init__(self, pid: int) -> None:
        self.own = self.resident = 0.0
        self._seconds: dict[tuple[int, float], float] = {}
        self._process, self._over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @property
    def cpu(self) -> float:
        """Seconds of all processes that were seen."""
        return sum(self._seconds.values())

    def finish(self) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            try:
                memory = self._process.memory_info()
                self.resident = max(self.resident, memory.rss / 1e6)
                self.own = max(self.own, (memory.rss - memory.shared) / 1e6)
                for each in (self._process, *self._process.children(recursive=True)):
                    times = each.cpu_times()
                    self._seconds[each.pid, each.create_time()] = times.user + times.system
            except psutil.Error:
                continue  # one that ended while it was looked at


def prepare(data: Path, run: Path) -> tuple[Cost, float, Watch]:
    """The command `prepare` on two CPUs: its cost, the seconds of its stage, and what was seen of the driver."""
    model = example_model(print)
    command = [
        sys.executable, "-m", "alphatoken.jobs", "prepare", f"run.dir={run}", f"data.train={data}",
        f"model.policy={model}", "cluster.workers=2",
    ]  # fmt: skip
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        watch = Watch(process.pid)
        code = process.wait()
        wall = time.perf_counter() - started
        watch.finish()
    if code:
        raise SystemExit(f"prepare ended with status {code}")
    stage = json.loads((run / "run.json").read_text())["stages"]["prepare"]
    return Cost(wall, watch.cpu, stage["counts"]["tokens"]), stage["seconds"], watch


def measure(rows: int, place: Path) -> None:
    """Print the rows of the table for one number of rows."""
    data, texts = place / f"{rows}.jsonl", place / f"{rows}.texts"
    tokenizer = AutoTokenizer.from_pretrained(example_model(print))
    with open(data, "w", encoding="utf-8") as given, open(texts, "w", encoding="utf-8") as rendered:
        for row in chat_rows(rows):
            given.write(json.dumps(row) + "\n")
            rendered.write(json.dumps(tokenizer.apply_chat_template(row["messages"], tokenize=False)) + "\n")
    one, together, template = alone("one by one", texts), alone("together", texts), alone("template", data)
    print(f"| the tokenizer alone, a text a call | {one.wall:.1f} | {one.cpu:.1f} | 1.00 | "
          f"{rows:,} texts, {one.tokens / rows:.0f} tokens each, 2 processes |", flush=True)  # fmt: skip
    print(f"| the tokenizer alone, {TOGETHER} texts a call | {together.wall:.1f} | {together.cpu:.1f} | "
          f"{together.wall / one.wall:.2f} | |", flush=True)  # fmt: skip
    print(
        f"| the template alone | {template.wall:.1f} | {template.cpu:.1f} | {template.wall / one.wall:.2f} | |",
        flush=True,
    )
    cost, stage, watch = prepare(data, place / f"run-{rows}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"| `prepare`, the stage | {stage:.1f} | | {stage / one.wall:.2f}; {stage / together.wall:.2f} of {TOGETHER} a call | "
          f"driver {watch.own:,.0f} MB ({watch.resident:,.0f} with mapped files); load {load} |", flush=True)  # fmt: skip
    print(f"| `prepare`, the whole command | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.wall / one.wall:.2f}; "
          f"{cost.wall / together.wall:.2f} | {cost.cpu / one.cpu:.2f}; {cost.cpu / together.cpu:.2f} in CPU time; "
          f"{cost.tokens / rows:.0f} tokens a row written |", flush=True)  # fmt: skip


def in_turn(rows: int, repeats: int, place: Path) -> None:
    """Print what one worker's shard of ``rows`` rows costs beside the tokenizer alone: least CPU seconds of each."""
    model = str(example_model(print))
    tokenizer = AutoTokenizer.from_pretrained(model)
    given = list(chat_rows(rows))
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in given]
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    source, pieces = ModelSource(model), open_sources("data.train", str(data)).pieces(range(rows))
    vocabulary = load_config(source).vocab_size
    worker = PrepareWorker(Storage(str(place / "run")), source, vocabulary, Settings(), preference=False)
    works: dict[str, Callable[[], object]] = {
        "the tokenizer alone, a text a call": lambda: _one_by_one(tokenizer, texts),
        f"the tokenizer alone, {TOGETHER} texts a call": lambda: _together(tokenizer, texts),
        "the template alone": lambda: _by_template(tokenizer, given),
        "a worker of `prepare`, from raw rows to the written shard": lambda: worker(
            PrepareTask(pieces, "prepared/x", "quarantine/x", "f"), lambda units: None
        ),
    }
    least = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            started = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - started)
    one, together = list(least.values())[:2]
    for name, seconds in least.items():
        print(f"| {name} | | {seconds:.2f} | {seconds / one:.2f}; {seconds / together:.2f} of {TOGETHER} a call | "
              f"{rows:,} rows, least of {repeats}, in turn |", flush=True)  # fmt: skip


def main() -> None:
    """Print the table for every number of rows that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--in-turn", type=int, metavar="REPEATS", help="instead: a shard of 1,024 rows in one process")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print("| | seconds | CPU seconds | ratio | |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        if options.in_turn:
            in_turn(1024, options.in_turn, Path(place))
            return
        for rows in options.rows:
            measure(rows, Path(place))


if __name__ == "__main__":
    main()
