"""cluster.address=inline: one worker in the driver's process, the same bytes, no Ray."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from alphatoken.pipeline.cluster import inline
from alphatoken.pipeline.cluster.choice import is_inline
from alphatoken.pipeline.cluster.inline import GETS_READY, InlineCluster
from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.run import progress as progress_module
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.settings import ClusterSettings
from tests.conftest import SMALL
from tests.jobs.test_run import hashes

ROOT = Path(__file__).parents[2]
# Says last whether Ray was imported on the way.
MAIN = "import sys\nfrom alphatoken.jobs.cli import main\nstatus = main(sys.argv[1:])\nprint('ray' in sys.modules)\nsys.exit(status)"
KINDS = {
    "supervised": ["valuation.exact=true"],
    "rehearsal": ["valuation=rehearsal", "valuation.layers=2", "valuation.window=4", "valuation.rehearsal.batch_size=8"],
}  # fmt: skip


def elsewhere(*arguments: object) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_as_on_ray_which_is_not_imported(alphatoken, tmp_path, policy, reference, train_file, kind):
    run = tmp_path / "run"  # one place after the other, since ids and logs name it
    same = [
        f"run.dir={run}",
        f"model.policy={policy}",
        f"data.train={train_file}",
        "data.validation=6",
        *SMALL,
        *KINDS[kind],
    ]
    if kind == "supervised":
        same.append(f"model.reference={reference}")
    status, _, err = alphatoken("run", *same, "cluster.workers=1")
    assert status == 0, err
    on_ray = hashes(run)
    run.rename(tmp_path / "on-ray")
    done = elsewhere("run", *same, "cluster.address=inline")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "Ray was imported"
    assert hashes(run) == on_ray and len(on_ray) > 10


def test_small_data_needs_no_ray_unless_more_is_asked_for(tmp_path, policy, train_file):
    own = ["cluster.inline_below=50000"]
    same = [f"model.policy={policy}", f"data.train={train_file}", "data.validation=6", *SMALL]
    done = elsewhere("run", f"run.dir={tmp_path}/run", *same, *own)
    assert done.returncode == 0, done.stderr
    assert "one worker in this process, without Ray: fewer than cluster.inline_below=50,000 tokens" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("settings", "tokens", "expected"),
    [
        (ClusterSettings(), 49_999, True), (ClusterSettings(), 50_000, False), (ClusterSettings(), None, False),
        (ClusterSettings(inline_below=0), 1, False), (ClusterSettings(workers=2), 1, False),
        (ClusterSettings(workers=1), 1, True), (ClusterSettings(address="auto"), 1, False),
        (ClusterSettings(address="inline"), 10**9, True), (ClusterSettings(gpus_per_worker=0.5), 1, False),
    ],
)  # fmt: skip
def test_who_works(settings, tokens, expected):
    assert is_inline(settings, lambda: tokens) == expected


def test_inline_has_one_worker(alphatoken, tmp_path):
    status, _, err = alphatoken("run", f"run.dir={tmp_path}/r", "cluster.address=inline", "cluster.workers=2")
    assert status == 2 and "cluster.address=inline has one worker" in err
    assert not (tmp_path / "r").exists()


class Square:
    """Squares numbers; refused by a disk as often as the payload says."""

    def __init__(self) -> None:
        self.refused: dict[int, int] = {}

    def __call__(self, payload, advance):
        number, refusals = payload
        self.refused[number] = self.refused.get(number, 0) + 1
        if self.refused[number] <= refusals:
            raise OSError(28, "No space left on device")
        if number == 7:
            raise RunFailed("this number is odd")
        advance(1)
        return number * number


def squares(numbers: list[int], refusals: dict[int, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    cluster = InlineCluster(ClusterSettings(address="inline", cpus_per_worker=1), False)
    with (
        Progress(Console(file=open(os.devnull, "w"))) as progress,
        cluster.pool(Square, {}, cluster.model_resources()) as pool,
        progress.task("squares", len(numbers), "numbers") as task,
    ):
        pool.run(
            [Shard(f"shard {n}", 1) for n in numbers],
            lambda s: (int(s.name.split()[1]), refusals.get(int(s.name.split()[1]), 0)),
            lambda s, r: found.__setitem__(s.name, r), task,
        )  # fmt: skip
        assert task.done == len(numbers)
    return found


def test_what_passes_is_tried_again_and_what_does_not_is_set_aside(monkeypatch):
    monkeypatch.setattr(inline, "RETRY_SECONDS", 0.0)
    assert squares([1, 2, 3], {2: 2}) == {"shard 1": 1, "shard 2": 4, "shard 3": 9}
    with pytest.raises(RunFailed, match=r"1 shard\(s\) failed 3 times .* shard 2: .*the disk is full"):
        squares([1, 2, 3], {2: 3})
    with pytest.raises(RunFailed, match=r"3 shard\(s\) failed .* the rest was not tried"):
        squares([1, 2, 3, 4], dict.fromkeys([1, 2, 3, 4], 3))


def test_an_error_names_the_shard_and_stops():
    with pytest.raises(RunFailed, match="shard 7: this number is odd"):
        squares([7, 8], {})


class Slow:
    """Takes half a second to get ready."""

    def __init__(self) -> None:
        time.sleep(0.5)

    def __call__(self, payload, advance):
        advance(1)


def test_progress_is_shown_while_the_worker_gets_ready(monkeypatch):
    monkeypatch.setattr(inline, "SHOWN_SECONDS", 0.02)
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.1)
    console = Console(file=io.StringIO(), width=80)
    cluster = InlineCluster(ClusterSettings(address="inline", cpus_per_worker=1), False)
    with (
        Progress(console) as progress,
        cluster.pool(Slow, {}, cluster.model_resources()) as pool,
        progress.task("value", 3, "tokens") as task,
    ):
        task.note("0/1 shards")
        pool.run([Shard("shard", 3)], lambda s: None, lambda s, r: None, task)
    said = console.file.getvalue().splitlines()
    waiting = [one for one in said if one.startswith(f"value: 0 of 3 tokens, starting, 0/1 shards, {GETS_READY}, ")]
    assert len(waiting) >= 2, said
    assert said[-1].startswith("value: done, 3 tokens") and said[-1].endswith("(0/1 shards)")
