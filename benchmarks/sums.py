"""What a driver holds while sums are made: `python -m benchmarks.sums --gigabytes 0.1 0.5`, of the anchor stage.

Models with random weights whose three scored layers take so many gigabytes in float32, and a few short rows: Fisher and
validation gradient are summed over a part for each eight of them and divided by the root of the Fisher (anchor.precondition=adam), so that
every sum is made, added up, written and used. `--before DIR` runs the same command with the code of another checkout, in turn.
Memory is what no file stands behind (RssAnon), read every 50 ms: of the driver, above what it had when Ray was up; of the
largest worker, all of it. Where the machine has less than 2 GB left the run is ended and the row says so. `--alone` adds up
eight parts and writes their sum in this process, without Ray or a model: seconds and this process's own memory. `--rehearsal`:
the value stage with valuation.schedule=rehearsal instead, a few steps over as many rows, saved after every second one.
`--shards 10000`: all of `alphatoken run` instead, in bfloat16, over so many shards of a row each, with the direct path alone; the
driver's peak is that of all stages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alphatoken.pipeline.anchor.summing import SUMS
from alphatoken.pipeline.anchor.sums import SumFile, Term, WriteTask
from alphatoken.pipeline.anchor.tensors import write_tensors
from alphatoken.pipeline.run.storage import Storage

HERE = Path(__file__).parents[1]
ROWS = 32
SCORED, HEAD = 3, 64  # layers; the size of an attention head
POLL = 0.05  # seconds
LEAST_LEFT = 2e9  # bytes
GB = 1e9
WIDTH = 4096  # of the weight that --alone sums


def make_model(place: Path, gigabytes: float) -> float:
    """Save a Llama whose scored weights take about as much in float32; returns how much."""
    words = [f"word{i}" for i in range(200)]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(words, vocab_size=300, special_tokens=["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )  # fmt: skip
    tokenizer.save_pretrained(place)
    hidden = round((gigabytes * GB / (4 * SCORED * 12.25)) ** 0.5 / HEAD) * HEAD
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=SCORED + 1,
        num_attention_heads=hidden // HEAD, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(place)
    per_layer = sum(p.numel() for name, p in model.model.layers[0].named_parameters() if p.ndim == 2)
    return SCORED * per_layer * 4 / GB


def make_rows(file: Path, count: int) -> None:
    """Short rows of prompt and completion."""
    rows = [{"prompt": f"word{i} word{i % 7}", "completion": f" word{i % 11} word{i % 5}"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(slots=True)
class Peak:
    """Bytes. ``start``: of the driver when it began to sum."""

    start: int = 0
    driver: int = 0
    worker: int = 0
    seconds: float = 0.0
    ended: str = ""


def anonymous(process: psutil.Process) -> int:
    """Resident bytes of a process that no file stands behind; 0 where it has gone."""
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def watched(command: Sequence[str], code: Path, place: Path, stage_begun: str) -> Peak:
    """Run ``python -m`` with the code of a checkout; ``stage_begun``: pattern of a file below ``place`` that says that summing
    has begun."""
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONUNBUFFERED": "1"}
    peak, started = Peak(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=code, env=environment, stdout=said, stderr=said
        )
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            now = anonymous(driver)
            if not peak.start and any(place.glob(stage_begun)):
                peak.start = now
            peak.driver = max(peak.driver, now)
            children = driver.children(recursive=True)
            peak.worker = max([peak.worker, *(anonymous(child) for child in children)])
            if psutil.virtual_memory().available < LEAST_LEFT and not peak.ended:
                peak.ended = "ended: the machine's memory was used up"
                for child in [driver, *children]:
                    child.kill()
            time.sleep(POLL)
        peak.seconds = time.perf_counter() - started
        if process.returncode and not peak.ended:
            said.seek(0)
            sys.exit(f"{' '.join(command)} in {code} ended with {process.returncode}: {said.read()[-2000:]}")
    return peak


def measure(
    model: Path, rows: Path, place: Path, code: Path, workers: int, count: int, rehearsal: bool, shards: int
) -> Peak:
    """Prepare, then the anchor stage watched, or with ``rehearsal`` the value stage; with ``shards`` one run of all stages."""
    common = [
        f"run.dir={place}", f"model.policy={model}", f"data.train={rows}", f"data.validation={count}",
        "mask.stability_weight=0", "cluster.inline_below=0", f"cluster.workers={workers}", "cluster.cpus_per_worker=1",
    ]  # fmt: skip
    anchor = [
        "anchor.drift=none", "anchor.precondition=adam", f"anchor.fisher.prompts={count}", "anchor.fisher.max_new_tokens=4",
        f"valuation.layers={SCORED}",
    ]  # fmt: skip
    if rehearsal:
        common.remove("mask.stability_weight=0")
        anchor = [
            "valuation=rehearsal", "valuation.rehearsal.batch_size=8", "valuation.rehearsal.save_every=2",
            "valuation.tokens_per_batch=16", f"anchor.fisher.prompts={count}", "anchor.fisher.max_new_tokens=4",
            f"valuation.layers={SCORED}",
        ]  # fmt: skip
    if shards:
        more = [
            "model.dtype=bfloat16",
            "data.shard_examples=1",
            "valuation.scores=[paper]",
            "valuation.window=0",
            "mask=paper",
        ]
        return watched(["alphatoken.jobs", "run", *common, *anchor, *more], code, place, "run.json")
    watched(["alphatoken.jobs", "prepare", *common, *anchor], code, place, "none")
    found = watched(["alphatoken.jobs", "anchor", *common, *anchor], code, place, "anchors/partial")
    if not rehearsal:
        return found
    return watched(["alphatoken.jobs", "value", *common, *anchor], code, place, "logs/value-*.log")


def alone(place: Path, gigabytes: float) -> None:
    """Print what adding up and writing cost one process."""
    storage, rows = Storage(str(place)), int(gigabytes * GB / 4 / WIDTH)
    for part in range(SUMS):
        write_tensors(storage, f"part-{part}", {"w": torch.full((rows, WIDTH), float(part))}, {})
    file = SumFile("sum", (Term(tuple(f"part-{part}" for part in range(SUMS)), 3),), {"w": (rows, WIDTH)}, {})
    own, over = psutil.Process(), threading.Event()
    before, started = anonymous(own), time.perf_counter()
    peak = [before]
    looking = threading.Thread(
        target=lambda: [peak.append(anonymous(own)) for _ in iter(lambda: over.wait(0.005), True)]
    )
    looking.start()
    WriteTask(file)(storage, lambda piece: None)
    seconds = time.perf_counter() - started
    over.set()
    looking.join()
    size = rows * WIDTH * 4
    print(f"| {size / GB:.2f} GB, {SUMS} parts | {len(file.pieces())} pieces | {seconds:.1f} s | "
          f"{(SUMS + 1) * size / seconds / 1e6:,.0f} MB/s read and written | {(max(peak) - before) / 1e6:.0f} MB |")  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="prompts, and as many validation rows: a part for each eight"
    )
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, to compare with")
    parser.add_argument(
        "--place", type=Path, help="a directory with room for 20 times as much (default: a temporary one)"
    )
    parser.add_argument("--alone", action="store_true", help="add up and write in this process, and nothing else")
    parser.add_argument("--rehearsal", action="store_true", help="the value stage of a rehearsal")
    parser.add_argument("--shards", type=int, default=0, help="a whole run, over so many rows and shards")
    options = parser.parse_args()
    if options.alone:
        for gigabytes in options.gigabytes:
            with tempfile.TemporaryDirectory(dir=options.place) as folder:
                alone(Path(folder), gigabytes)
        return
    codes = {"before": options.before.resolve()} if options.before else {}
    print("| scored weights | code | driver: peak | driver: above its start | largest worker: peak | seconds |\n"
          "|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(dir=options.place) as folder:
            place = Path(folder)
            weights = make_model(place / "model", gigabytes)
            make_rows(place / "rows.jsonl", 2 * options.rows + (options.shards or options.rows))
            for name, code in {**codes, "this": HERE}.items():
                found = measure(
                    place / "model", place / "rows.jsonl", place / "run", code, options.workers, options.rows,
                    options.rehearsal, options.shards,
                )  # fmt: skip
                subprocess.run(["rm", "-rf", str(place / "run")], check=True)
                said = found.ended or f"{found.seconds:.0f}"
                print(f"| {weights:.2f} GB | {name} | {found.driver / 1e6:,.0f} MB | "
                      f"{(found.driver - found.start) / 1e6:,.0f} MB | {found.worker / 1e6:,.0f} MB | {said} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
