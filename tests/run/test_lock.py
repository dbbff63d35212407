"""One driver at a time on a run directory, on a disk and in an object store, and none for ever."""

import json
import os
import threading
import time

import pytest

from alphatoken.jobs.cli import main
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.lock import DIRECTORY, RunLock
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage
from tests.faults.interrupted_run import python, until
from tests.mask.synthetic_run import write_run


@pytest.fixture(params=["disk", "object store"])
def storage(request, tmp_path) -> Storage:
    if request.param == "disk":
        return Storage(str(tmp_path / "run"))
    return Storage(request.getfixturevalue("object_store").uri(f"locks/{tmp_path.name}"))


def elsewhere(storage: Storage, name: str = "other", **more) -> str:
    """A claim as a driver on another machine writes it."""
    claim = {"holds": True, "host": "elsewhere", "machine": "another boot", "pid": 7, "started": "1", **more}
    storage.write_json(f"{DIRECTORY}/{name}.json", claim)
    return f"{DIRECTORY}/{name}.json"


def test_the_second_is_refused_while_the_first_holds_and_let_in_afterwards(storage):
    with RunLock(storage), pytest.raises(RunFailed, match=f"in use by another alphatoken \\(process {os.getpid()} on"):
        RunLock(storage).__enter__()
    with RunLock(storage):
        pass
    assert storage.names(DIRECTORY) == []


def test_a_refused_command_touches_nothing_and_no_point_of_a_sweep_gets_in(tmp_path):
    storage, _, _ = write_run(tmp_path)
    unfinished = tmp_path / "values" / ".part-00000-of-00001.parquet.tmp"
    unfinished.write_bytes(b"what the other driver is writing")
    before = sorted(tmp_path.rglob("*"))
    with RunLock(storage):
        assert main(["mask", "-m", f"run.dir={tmp_path}", "mask.rho=0.3,0.5"]) == 1
        assert main(["mask", f"run.dir={tmp_path}"]) == 1
        assert unfinished.exists() and not (tmp_path / "masks").exists()
    assert sorted(p for p in tmp_path.rglob("*") if "lock" not in str(p)) == [p for p in before if "lock" not in str(p)]


def test_a_refused_command_leaves_the_directory_as_it_found_it(tmp_path, capsys):
    there, absent, missing = tmp_path / "there", tmp_path / "absent", tmp_path / "no.jsonl"
    there.mkdir()
    for run in (there, absent):
        assert main(["prepare", f"run.dir={run}", f"data.train={missing}"]) == 2
        assert str(missing) in capsys.readouterr().err
    assert there.is_dir() and not any(there.iterdir()) and not absent.exists()


def test_a_killed_owner_on_this_machine_is_seen_at_once(storage, tmp_path, object_store):
    root = storage.root if storage.local else object_store.uri(f"locks/{tmp_path.name}")
    owner = python("tests.run.hold_lock", root)
    until(lambda: storage.names(DIRECTORY) and json.loads(storage.read_bytes(storage.names(DIRECTORY)[0]))["holds"], 60)
    with pytest.raises(RunFailed, match=f"process {owner.pid} on"):
        RunLock(storage).__enter__()
    owner.kill()
    owner.communicate(timeout=30)
    started = time.monotonic()
    with RunLock(storage):
        assert time.monotonic() - started < 5.0


def test_an_owner_elsewhere_that_renews_its_claim_is_respected(storage):
    name, over = elsewhere(storage), threading.Event()

    def renew() -> None:
        while not over.wait(0.5):
            storage.write_json(name, json.loads(storage.read_bytes(name)))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunFailed, match="process 7 on elsewhere"):
            RunLock(storage, lease=10.0).__enter__()
    finally:
        over.set()
        thread.join()


def test_an_owner_elsewhere_that_died_is_outlived(storage):
    elsewhere(storage)
    started = time.monotonic()
    with RunLock(storage, lease=3.0):
        assert time.monotonic() - started >= 1.0  # it might have been alive
        assert len(storage.names(DIRECTORY)) == 1


def test_at_most_one_of_many_that_come_at_once_gets_in(tmp_path):
    storage, inside, refused = Storage(str(tmp_path / "run")), [], []

    def come() -> None:
        try:
            with RunLock(Storage(storage.root)):
                inside.append(1)
                assert len(inside) == 1
                time.sleep(3.0)
                inside.pop()
        except RunFailed:
            refused.append(1)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) >= 5 and inside == []


def test_an_owner_whose_claim_was_taken_away_stops_writing(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    with RunLock(storage, renew=0.2, lease=5.0) as lock:
        manifest = Manifest(storage, lock.check)
        manifest.begin("prepare", {"a": 1}, {})
        storage.remove(lock.name)  # as another driver does that takes this one for dead
        until(lambda: lock._renewed < 0, 10)
        with pytest.raises(RunFailed, match="another alphatoken may have taken over"):
            manifest.note("prepare", parts=[])


def test_a_refused_command_leaves_no_directory(alphatoken, tmp_path, policy):
    alphatoken("prepare", f"run.dir={tmp_path}/new", f"model.policy={policy}", f"data.train={tmp_path}/none.jsonl")
    assert not (tmp_path / "new").exists()
