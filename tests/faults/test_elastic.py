"""Workers that join and leave while a stage runs: the bytes of one that stays."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from alphatoken.pipeline.cluster.cluster import Cluster
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.work import Resources, Shard
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.settings import ClusterSettings
from tests.conftest import chat_row, save_model, write_rows
from tests.faults.interrupted_run import python

SETTINGS = ["valuation.scores=[loss,entropy]", "valuation.tokens_per_batch=128", "cluster.cpus_per_worker=1"]


def test_nodes_join_and_leave_while_a_stage_runs_and_the_bytes_are_the_same(tmp_path):
    inputs = [
        f"data.train={write_rows(tmp_path / 'train.jsonl', [chat_row(i) for i in range(300)])}",
        f"model.policy={save_model(tmp_path / 'policy', seed=1)}", "data.validation=6", "data.shard_examples=2", *SETTINGS,
    ]  # fmt: skip
    calm, elastic = tmp_path / "calm", tmp_path / "elastic"
    for stage in ("prepare", "value"):
        process = python("alphatoken.jobs", stage, f"run.dir={calm}", "cluster.address=inline", *inputs)
        assert process.wait() == 0, process.communicate()[1][-3000:]
        if stage == "prepare":
            shutil.copytree(calm, elastic)
    process = python("tests.faults.elastic_nodes", elastic, *inputs[1:2], *SETTINGS)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    story = json.loads(out.splitlines()[-1])
    assert story["workers"] == 4 and story["worked"] >= 4 and story["left to do"] > 0, story
    assert story["finished after notice"] >= 1 and "told to end (SIGTERM)" in err, story
    assert "its node went away" in err and "(attempt" not in err, err[-3000:]
    found = {path.name: path.read_bytes() for path in (elastic / "values").iterdir()}
    assert found == {path.name: path.read_bytes() for path in (calm / "values").iterdir()} and len(found) > 100


class Marked:
    """Leaves a file per attempt at a shard; shard 0 takes a while."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def __call__(self, number, advance):
        (self.directory / f"{number}-{os.getpid()}").touch()
        if number == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2.0)
        time.sleep(0.2)
        advance(1)
        return number


def test_notice_lets_a_worker_finish_what_it_has_and_take_no_more(ray_cluster, tmp_path):
    done: list[int] = []
    (tmp_path / "marks").mkdir()
    with (
        open(tmp_path / "said", "w") as said,
        Progress(Console(file=said)) as progress,
        WorkerPool(Marked, {"directory": str(tmp_path / "marks")}, Resources(1, 1, 0.0), 60.0, False) as pool,
        progress.task("marks", 8, "numbers") as task,
    ):
        shards = [Shard(f"shard {n}", 1) for n in range(8)]
        pool.run(shards, lambda s: int(s.name.split()[1]), lambda s, r: done.append(r), task)
    marks = sorted(path.name.split("-") for path in (tmp_path / "marks").iterdir())
    assert sorted(done) == list(range(8)) and [int(number) for number, _ in marks] == list(range(8))  # none twice
    first = next(process for number, process in marks if number == "0")
    assert 1 <= sum(process == first for _, process in marks) <= 2 and len({process for _, process in marks}) == 2
    text = (tmp_path / "said").read_text()
    assert text.count("told to end (SIGTERM)") == 1 and "attempt" not in text


def test_fewer_devices_than_asked_for_is_one_line_with_a_remedy(ray_cluster, tmp_path):
    def asked(**settings) -> tuple[Resources, str]:
        said = tmp_path / "said"
        with (
            open(said, "w") as file,
            Cluster(ClusterSettings(inline_below=0, **settings), False, Progress(Console(file=file))) as c,
        ):
            return c.model_resources(), said.read_text() if not file.flush() else ""

    found, text = asked(workers=8, cpus_per_worker=1)
    assert found == Resources(2, 1, 0.0) and text.count("\n") == 1
    assert "room for 2 worker(s) of 1 CPU each" in text and "cluster.workers={min: 1, max: 8}" in text
    found, text = asked(workers={"min": 3, "max": 8}, cpus_per_worker=1)
    assert found == Resources(8, 1, 0.0, 3) and text.count("\n") == 1 and "smaller min" in text
    found, text = asked(workers={"min": 1, "max": 8}, cpus_per_worker=1)
    assert found == Resources(8, 1, 0.0, 1) and text == ""
    with pytest.raises(RunFailed, match="gpus_per_worker=4: the cluster has"):
        asked(gpus_per_worker=4)


def test_too_few_workers_for_a_range_end_the_stage_in_one_line(ray_cluster, tmp_path):
    with (
        pytest.raises(RunFailed, match="1 CPU and 1 GPU free for each of 2 workers"),
        Progress(Console(quiet=True)) as progress,
        WorkerPool(Marked, {"directory": str(tmp_path)}, Resources(4, 1, 1.0, 2), 1.5, False) as pool,
        progress.task("marks", 1, "numbers") as task,
    ):
        pool.run([Shard("shard 1", 1)], lambda s: 1, lambda s, r: None, task)


@pytest.mark.parametrize(
    ("workers", "problem"),
    [
        ({"min": 1}, "two whole numbers"), ({"min": 0, "max": 3}, "at least 1"), ({"min": 4, "max": 3}, "min is above max"),
        ("many", "must be auto"), (0, "at least 1"), (None, "must be auto"), ({"min": 1, "max": 64}, None),
    ],
)  # fmt: skip
def test_what_cluster_workers_may_be(workers, problem):
    found = ClusterSettings(workers=workers).problems()
    assert (problem is None and not found) or problem in found[0]
