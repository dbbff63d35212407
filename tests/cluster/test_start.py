"""A local Ray that does not start: it is said that it starts, tried once more, and given up with a remedy."""

import io
import socket
import time

import pytest
import ray
from rich.console import Console

from alphatoken.pipeline.cluster.cluster import Cluster
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.settings import ClusterSettings

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def started(monkeypatch, *answers: Exception | None) -> tuple[str, int]:
    """What is said while Ray answers its starts with these errors (None: it starts), and how often it was asked."""
    left = list(answers)

    def init(**_: object) -> None:
        if (answer := left.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    console = Console(file=io.StringIO(), width=200)
    with Progress(console) as progress:
        Cluster(ClusterSettings(), False, progress).start()
    return console.file.getvalue(), len(answers) - len(left)


def test_it_is_said_that_it_starts_and_a_slow_start_is_tried_once_more(monkeypatch):
    said, asked = started(monkeypatch, None)
    assert asked == 1 and said.count("starting a local Ray, which takes some seconds") == 1
    said, asked = started(monkeypatch, Exception(TIMED_OUT), None)
    assert asked == 2 and "Ray did not start in time (The current node timed out during startup" in said


def test_what_does_not_start_is_given_up_with_a_remedy(monkeypatch):
    for errors in ([Exception(TIMED_OUT)] * 2, [RuntimeError("no space left")], [Exception("something else")]):
        with pytest.raises(
            RunFailed, match=r"a local Ray cannot be started: .*cluster\.address=inline runs without Ray"
        ):
            started(monkeypatch, *errors)


def test_an_address_where_nothing_listens_is_said_at_once(monkeypatch):
    """Ray itself asks there for a quarter of an hour, and says nothing that names the key."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, and not listened to
        cluster = Cluster(ClusterSettings(address=address), False)
        begun = time.monotonic()
        with pytest.raises(RunFailed, match=f"cluster.address={address}: Ray cannot be reached: .*refused"):
            cluster.start()
    assert time.monotonic() - begun < 10
