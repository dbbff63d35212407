"""Workers to which the machine does what machines do, as real processes, and disks that refuse for real."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from alphatoken.pipeline.cluster import shard_loop
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.work import Resources, Shard
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from tests.faults.interrupted_run import python

TABLE = pa.table({"x": list(range(20_000))})


class Writer:
    """Writes one part per shard; the first time that it sees a shard with a fault, it meets that."""

    def __init__(self, directory: str) -> None:
        self.directory, self.storage = Path(directory), Storage(f"{directory}/run")
        self.one = threading.Lock()  # the limits below are the process's
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __call__(self, payload, advance):
        with self.one:
            return self._write(payload, advance)

    def _write(self, payload, advance):
        name, fault, always = payload
        marker = self.directory / f"seen-{name}"
        meets = fault and (always or not marker.exists())
        marker.touch()
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))
        if meets and fault == "no space":  # the kernel refuses to let the file grow, in the middle of writing
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, self.hard))
        if meets and fault == "no memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
            try:
                bytearray(1 << 30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
        if meets and fault == "oom killer":
            os.kill(os.getpid(), signal.SIGKILL)
        if meets and fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)  # alive, and deaf
        if meets and fault == "not permitted":
            Path("/proc/sys/kernel/ostype").write_text("x")  # not even root may
        self.storage.write_table(f"values/{name}", TABLE, "f", {"n": 1})
        advance(1)
        return 1


def run(directory: Path, faults: dict[int, str], always: bool = False, timeout: float = 60.0, shards: int = 6) -> list:
    done: list[str] = []
    with (
        Progress(Console(file=open(directory / "said", "a"))) as progress,
        WorkerPool(Writer, {"directory": str(directory)}, Resources(1, 1, 0.0), timeout, False) as pool,
        progress.task("parts", shards, "parts") as task,
    ):
        pool.run(
            [Shard(f"part-{n}", 1) for n in range(shards)],
            lambda s: (s.name, faults.get(int(s.name[-1]), ""), always), lambda s, r: done.append(s.name), task,
        )  # fmt: skip
    return sorted(done)


def whole(directory: Path) -> list[str]:
    storage = Storage(f"{directory}/run")
    return [n[len("values/") :] for n in storage.names("values") if storage.rows_of(n, "f") == TABLE.num_rows]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(shard_loop, "RETRY_SECONDS", 0.1)


PARTS = [f"part-{n}" for n in range(6)]


@pytest.mark.parametrize("fault", ["no space", "no memory", "oom killer", "not permitted"])
def test_a_fault_that_passes_costs_another_attempt(ray_cluster, tmp_path, fault):
    assert run(tmp_path, {1: fault, 4: fault}) == PARTS == whole(tmp_path)
    assert (tmp_path / "said").read_text().count("attempt 1 of 3") >= 2
    assert not list((tmp_path / "run/values").glob(".*")) or fault == "oom killer"


def test_a_worker_that_is_stopped_is_replaced(ray_cluster, tmp_path):
    assert run(tmp_path, {2: "stopped"}, timeout=4.0) == PARTS == whole(tmp_path)
    assert "no progress for cluster.shard_timeout=4 s" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(("fault", "reason"), [("no space", "File too large"), ("not permitted", "denied|permitted")])
def test_a_fault_that_stays_is_named_with_its_shard_and_the_others_are_kept(ray_cluster, tmp_path, fault, reason):
    with pytest.raises(RunFailed, match=rf"1 shard\(s\) failed 3 times .*part-3: .*({reason}).*same command again"):
        run(tmp_path, {3: fault}, always=True)
    assert whole(tmp_path) == [p for p in PARTS if p != "part-3"]
    assert run(tmp_path, {}) == PARTS == whole(tmp_path)


def test_a_fault_of_every_shard_ends_the_run_early(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_loop, "RETRY_SECONDS", 0.0)
    with pytest.raises(RunFailed, match=r"3 shard\(s\) failed 3 times .*the rest was not tried"):
        run(tmp_path, dict.fromkeys(range(9), "no space"), always=True, shards=9)
    assert len(list(tmp_path.glob("seen-*"))) < 9


def test_a_full_disk_leaves_nothing_under_the_final_name_and_says_so(tmp_path, monkeypatch):
    """/dev/full takes the place of the temporary file: the kernel answers ENOSPC."""
    storage = Storage(str(tmp_path))
    storage.write_bytes("values/part", b"before")

    class Known:
        hex = "known"

    monkeypatch.setattr("alphatoken.pipeline.run.storage.uuid.uuid4", lambda: Known)
    (tmp_path / "values" / ".part.known.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        storage.write_bytes("values/part", b"x" * 100_000)
    assert storage.read_bytes("values/part") == b"before"
    assert storage.names("values") == ["values/part"] and not list((tmp_path / "values").glob(".*"))


def test_a_node_that_goes_away_costs_its_shards_no_attempt():
    """In a process of its own, with two nodes of which one is removed while its worker computes."""
    process = python("tests.faults.lose_nodes")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    assert "6 of 6 shards" in out and "its node went away" in err and "(attempt" not in err, err[-3000:]


def test_what_killed_writers_leave_behind_is_swept_away(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes("values/part", b"whole")
    (tmp_path / "values" / ".part.0123.tmp").write_bytes(b"half")
    storage.sweep()
    assert [p.name for p in (tmp_path / "values").iterdir()] == ["part"]


def test_time_between_attempts_grows(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_loop, "RETRY_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(RunFailed):
        run(tmp_path, {0: "not permitted"}, always=True, shards=1)
    assert time.monotonic() - started >= 3.0
