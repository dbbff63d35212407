"""Faults in the middle of a sum: workers killed while pieces are added up or written, nodes that do not see the run directory."""

import signal
import threading
from pathlib import Path

import psutil
import pytest

from alphatoken.jobs.cli import main
from alphatoken.pipeline.anchor import sums
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.work import Resources, Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from tests.faults.interrupted_run import contents, inputs_in

OWN = ["anchor.drift=none", "anchor.precondition=kfac", "mask.stability_weight=0", "data.validation=20"]
GIVEN = ("anchor.snapshots", "anchor.warmup", "data.validation")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    own = [one for one in inputs_in(tmp_path_factory.mktemp("inputs")) if not one.startswith(GIVEN)]
    return [*own, *OWN]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, inputs) -> dict:
    """Of a run without Ray, whose pieces are whole sums."""
    run = tmp_path_factory.mktemp("calm") / "run"
    for stage in ("prepare", "anchor"):
        assert main([stage, f"run.dir={run}", *inputs, "cluster.address=inline"]) == 0
    return anchors_in(run)


def anchors_in(run: Path) -> dict[str, str]:
    """File below anchors/ -> sha256."""
    return {name: value for name, value in contents(run).items() if name.startswith("anchors/")}


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::Host") or process.cmdline()[:1] == ["ray::Host"]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def adding(run: Path) -> bool:
    """Whether a worker has told its log of a piece, while the file that is made of the pieces is not there."""
    logs = "".join(log.read_text() for log in run.glob("logs/anchor-*.log"))
    return "fisher.safetensors, " in logs and not (run / "anchors/fisher.safetensors").exists()


def writing(run: Path) -> bool:
    """Whether some of a sum's file is written beside its name."""
    return any(file.stat().st_size > 4096 for file in run.glob("anchors/.fisher.safetensors.*.tmp"))


@pytest.mark.parametrize(("moment", "said"), [(adding, "attempt 1 of 3"), (writing, "added up again")])
def test_workers_killed_in_the_middle_of_a_sum_leave_its_bytes_as_they_are(
    alphatoken, tmp_path, inputs, calm, monkeypatch, moment, said
):
    """All workers at once: with them go the pieces that they kept."""
    monkeypatch.setattr(sums, "PIECE_BYTES", 256)
    run, killed, over = tmp_path / "run", [], threading.Event()
    arguments = [f"run.dir={run}", *inputs, "cluster.workers=2"]

    def kill() -> None:
        while not over.wait(0.002):
            try:
                if not moment(run):
                    continue
            except FileNotFoundError:  # it has got its name meanwhile
                continue
            for process in workers():
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
            return

    assert alphatoken("prepare", *arguments)[0] == 0
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        status, _, err = alphatoken("anchor", *arguments)
    finally:
        over.set()
        killer.join()
    assert status == 0 and len(killed) >= 2, err
    assert said in err, err
    assert anchors_in(run) == calm


class Nothing:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __call__(self, payload, advance):
        return 1


def test_a_node_that_does_not_see_the_run_directory_is_named_with_the_remedy(ray_cluster, tmp_path):
    """As on a node where the directory is not mounted: its path is not there, and is not made either."""
    storage = Storage(str(tmp_path / "elsewhere"))
    with (
        Progress() as progress,
        WorkerPool(logged("anchor", Nothing), {"storage": storage}, Resources(1, 1, 0.0), 60.0, False) as pool,
        progress.task("parts", 1, "parts") as task,
        pytest.raises(
            RunFailed, match=r"^a worker cannot start: run\.dir=.*elsewhere is not on node .*all nodes share"
        ),
    ):
        pool.run([Shard("part", 1)], lambda s: None, lambda s, r: None, task)
    assert not (tmp_path / "elsewhere").exists()
