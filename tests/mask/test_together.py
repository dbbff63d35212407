"""Masks that are made together, and by workers: the bytes of one after another in this process."""

import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alphatoken.data_schemas import BRANCHES
from alphatoken.pipeline.cluster.cluster import Cluster
from alphatoken.pipeline.mask import over_parts
from alphatoken.pipeline.mask.stage import begin_mask, make_mask, make_masks
from alphatoken.pipeline.maths.exact_sum import ExactSum
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import ClusterSettings, MaskSettings, Settings
from tests.mask.synthetic_run import contents, masks, write_run
from tests.trainers.synthetic_pairs import write_pairs_run

SIZES = (40, 0, 33, 1, 300, 25, 60)
POINTS = {
    "paper-3": {"score": "paper", "rho": 0.3, "skip_first": 0}, "paper-7": {"score": "paper", "rho": 0.7, "skip_first": 0},
    "information-3": {"score": "information", "rho": 0.3, "skip_first": 0},
    "information-7": {"score": "information", "rho": 0.7, "skip_first": 0},
    "rms": {"score": "paper", "normalize": "rms", "least_stable": 0.2}, "random": {"score": "random"},
    "by-id": {"score": "paper", "scope": "token_id", "rare_tokens": 4}, "full": {"score": "full"},
    "soft": {"score": "entropy", "rule": "weight"}, "example": {"score": "loss", "scope": "example"},
}  # fmt: skip
WORKERS = ClusterSettings(workers=2, inline_below=0)


def runs_of(storage: Storage, points=POINTS, cluster: ClusterSettings | None = None, joined=None, progress=None):
    progress = progress or Progress(Console(quiet=True))
    own = Settings(cluster=cluster or ClusterSettings())
    run = Run(storage, Manifest(storage), own, progress, join_cluster=lambda: joined)
    return [replace(run, settings=replace(own, mask=MaskSettings(name=n, **p))) for n, p in points.items()]


def made(directory: Path, cluster=None, joined=None, progress=None) -> dict[str, dict[str, bytes]]:
    storage, *_ = write_run(directory, sizes=SIZES, tokens=9_000)
    make_masks([begin_mask(run) for run in runs_of(storage, POINTS, cluster, joined, progress)])
    return {name: contents(storage, name) for name in POINTS}


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    storage, *_ = write_run(tmp_path_factory.mktemp("alone"), sizes=SIZES, tokens=9_000)
    for run in runs_of(storage):
        make_mask(run)
    return {name: contents(storage, name) for name in POINTS}


def test_together_gives_the_bytes_of_one_by_one(one_by_one, tmp_path):
    assert made(tmp_path) == one_by_one


def test_the_thresholds_are_those_of_sorting_everything(one_by_one, tmp_path):
    storage, rows, values = write_run(tmp_path, sizes=SIZES)
    make_masks([begin_mask(run) for run in runs_of(storage)])
    prepared = [label != -100 for row in rows for label in row["labels"]]
    for score in ("information", "paper"):
        columns = {name: np.concatenate([row[name] for row in values])[prepared] for name in values[0] if name != "id"}
        if score == "paper":
            adaptation = columns["adaptation_direct"] + columns["adaptation_causal"]
            own = adaptation + 1.5 * (columns["stability_direct"] + columns["stability_causal"])
        else:
            own = columns["information"]
        from_above = np.sort(own.astype(np.float32))[::-1]
        for rho, name in ((0.3, f"{score}-3"), (0.7, f"{score}-7")):
            found = storage.read_json(f"masks/{name}/summary.json")["threshold"]
            assert found == from_above[math.ceil(round(rho * len(own), 6)) - 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_bytes_of_this_process(ray_cluster, one_by_one, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(over_parts, "ROWS_PER_TASK", 50)
    settings = ClusterSettings(address="auto", workers=workers, inline_below=0)
    with Cluster(settings, debug=False) as joined:
        assert made(tmp_path, settings, joined) == one_by_one
    logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("mask-*.log"))
    assert logs.count("done in") >= 5 * 2  # tasks of several passes


def test_a_killed_worker_changes_no_byte(ray_cluster, one_by_one, tmp_path, monkeypatch):
    monkeypatch.setattr(over_parts, "ROWS_PER_TASK", 50)
    ended = threading.Event()

    def kill_one() -> None:
        """The first worker that has finished some parts."""
        while not ended.wait(0.005):
            for log in (tmp_path / "logs").glob("mask-*.log"):
                if "done in" in log.read_text():
                    os.kill(int(re.findall(r"-(\d+)\.log", log.name)[0]), signal.SIGKILL)
                    return

    thread = threading.Thread(target=kill_one)
    thread.start()
    with open(tmp_path / "said", "w") as said, Cluster(WORKERS, debug=False) as joined:
        found = made(tmp_path, WORKERS, joined, Progress(Console(file=said)))
    ended.set()
    thread.join()
    assert found == one_by_one
    assert "its worker was lost" in (tmp_path / "said").read_text()


def test_masks_of_pairs_by_workers(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(over_parts, "ROWS_PER_TASK", 4)
    points = {
        "half": {"score": "information"}, "rms": {"score": "information", "normalize": "rms", "rho": 0.3},
        "by-id": {"score": "loss", "scope": "token_id", "rare_tokens": 2},
    }  # fmt: skip
    found = []
    for name, cluster in (("here", ClusterSettings()), ("there", WORKERS)):
        storage = write_pairs_run(tmp_path / name, sizes=(9, 5, 0, 30))
        with Cluster(WORKERS, debug=False) as joined:
            manifest = Manifest(storage)
            manifest.note("prepare", tokens=500)
            make_masks([begin_mask(run) for run in runs_of(storage, points, cluster, joined)])
        found.append({point: contents(storage, point) for point in points})
    assert found[0] == found[1]
    assert list((tmp_path / "there/logs").glob("mask-*.log")) and not list((tmp_path / "here/logs").glob("mask-*.log"))
    assert all(f"{branch}_labels" in masks(storage, "half")[0] for branch in BRANCHES)


def test_a_mask_that_was_interrupted_is_finished_with_others(one_by_one, tmp_path):
    storage, *_ = write_run(tmp_path, sizes=SIZES, tokens=9_000)
    first = runs_of(storage)[0]
    make_mask(first)
    (tmp_path / "masks/paper-3/summary.json").unlink()
    (tmp_path / "masks/paper-3/data/train-00004-of-00007.parquet").unlink()
    kept = tmp_path / "masks/paper-3/data/train-00002-of-00007.parquet"
    before = kept.stat().st_mtime_ns
    time.sleep(0.01)
    make_masks([begin_mask(run) for run in runs_of(storage)])
    assert {name: contents(storage, name) for name in POINTS} == one_by_one
    assert kept.stat().st_mtime_ns == before


def test_exact_sums_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    numbers = [float(x) * 10.0**e for x, e in zip(rng.standard_normal(500), rng.integers(-300, 300, 500), strict=True)]
    numbers += [5e-324, 1e308, -1e308, 0.1]
    whole, pieces = ExactSum(), [ExactSum() for _ in range(3)]
    for index, number in enumerate(numbers):
        whole.add(number)
        pieces[index % 3].add(number)
    for piece in pieces[:0:-1]:
        pieces[0].merge(piece)
    assert float(whole) == float(pieces[0]) == math.fsum(numbers)
