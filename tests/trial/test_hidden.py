"""Hidden states that the workers of a node share: made once, whole or not there, and gone with the last user."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.trial import hidden
from alphatoken.pipeline.trial.hidden import PREFIX, HiddenStates, remove_unused
from tests.trial.share_states import WIDTH, state

ROWS = 6
BYTES = sum((row + 3) * WIDTH * 2 for row in range(ROWS))
FIRST = 3 * WIDTH * 2


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(hidden.tempfile, "tempdir", None)  # looked up once per process
    yield tmp_path
    hidden.tempfile.tempdir = None


def files(place: Path) -> list[Path]:
    return list(place.glob(f"{PREFIX}*"))


def beside(seconds: object, bound: int = BYTES) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.trial.share_states", "n", str(bound), str(ROWS), str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize(("bound", "kept"), [(BYTES, ROWS), (FIRST, 1), (0, 0)])
def test_rows_are_made_once_within_the_bound_and_are_the_same_beyond(place, bound, kept):
    made: list[int] = []

    def make(row: int) -> torch.Tensor:
        made.append(row)
        return state(row)

    states = HiddenStates("n", [row + 3 for row in range(ROWS)], WIDTH, bound)
    assert states.rows == kept
    states.fill([3, 0], make)
    assert made == [row for row in (3, 0) if row < kept]
    for _ in range(2):
        for row in range(ROWS):
            assert torch.equal(states.get(row, make), state(row).to(torch.bfloat16))
    assert len(made) == kept + 2 * (ROWS - kept)
    (file,) = files(place)
    assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_size <= bound + hidden.PAGE
    del states
    gc.collect()
    assert not files(place)


def test_a_disk_that_takes_a_part_of_a_row_gets_the_rest(place, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, start: whole(file, content[:5], start))
    states = HiddenStates("n", [row + 3 for row in range(ROWS)], WIDTH, BYTES)
    states.fill(range(ROWS), state)
    for row in range(ROWS):
        assert torch.equal(states.get(row, state), state(row).to(torch.bfloat16))


def test_processes_share_the_work_and_the_last_one_removes_the_file(place):
    both = [beside(0.15), beside(0.15)]
    assert [said(one) for one in both] == ["ready"] * 2
    for one in both:
        go(one)
    made = [eval(said(one).replace("] [", "], [")) for one in both]
    assert sorted(made[0][0] + made[1][0]) == list(range(ROWS)) and made[0][1] == made[1][1] == []
    assert made[0][0] and made[1][0]  # neither waits for the other while there is something to do
    go(both[0])
    both[0].wait()
    assert files(place)
    remove_unused()
    assert files(place)  # somebody uses it
    go(both[1])
    both[1].wait()
    assert not files(place)


def test_what_a_killed_process_leaves_is_whole_and_is_used_or_removed(place):
    killed = beside("die")
    assert said(killed) == "ready"
    go(killed)
    assert killed.wait() == -9 and files(place)
    made: list[int] = []
    other = beside(0)
    assert said(other) == "ready" and files(place)
    go(other)
    made, wrong = eval(said(other).replace("] [", "], ["))
    assert sorted(made) == list(range(ROWS)) and not wrong  # a new user begins anew: nobody vouches for the rest
    go(other)
    other.wait()
    assert not files(place)


def test_a_file_of_somebody_else_is_refused(place, monkeypatch):
    monkeypatch.setattr(hidden.os, "getuid", lambda: 12345)
    with pytest.raises(RunFailed, match="set TMPDIR"):
        HiddenStates("n", [3], WIDTH, BYTES)
