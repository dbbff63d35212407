"""Directions from an object store: one copy on a node, mapped by its workers; a cache disk that is full."""

import errno
import subprocess

import pytest
import torch

from alphatoken.pipeline.anchor.tensors import mapped_tensors, write_tensors
from alphatoken.pipeline.run.storage import Storage
from tests.faults.interrupted_run import python

NAME = "anchors/snapshot-00/adaptation.safetensors"
BIG = 3 << 20  # numbers


@pytest.fixture
def storage(object_store, tmp_path, monkeypatch) -> Storage:
    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path / "cache"))
    return Storage(object_store.uri(f"runs/{tmp_path.name}"))


def copies_in(tmp_path) -> list:
    return sorted(tmp_path.glob("cache/anchors/*/*/*"))


def test_three_workers_of_a_node_fetch_a_file_once_and_hold_none_of_it(object_store, storage, tmp_path):
    write_tensors(storage, NAME, {"w": torch.ones(BIG)}, {"fingerprint": "f"})
    assert not list((tmp_path / "cache").glob("*"))  # the spool has no name
    asked = []
    object_store.fault = lambda method, path, query: asked.append(method) if method == "GET" else None
    uri = object_store.uri(f"runs/{tmp_path.name}")
    processes = [python("tests.faults.read_mapped", uri, NAME) for _ in range(3)]
    told = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, told, strict=True):
        assert process.returncode == 0, err
        total, grown = out.split()
        assert float(total) == BIG and int(grown) < BIG  # bytes of memory without a file, of 4 * BIG
    heads = 3  # each looks at the first bytes
    assert heads < len(asked) <= heads + -(-4 * BIG // (8 << 20)) + 1
    assert len(copies_in(tmp_path)) == 1


def test_another_version_of_a_file_takes_the_place_of_the_copy(storage, tmp_path):
    for value in (1.0, 2.0):
        write_tensors(storage, NAME, {"w": torch.full((4,), value)}, {"fingerprint": str(value)})
        assert mapped_tensors(storage, NAME)["w"].tolist() == [value] * 4
    assert len(copies_in(tmp_path)) == 1


def test_copies_that_nothing_asks_for_go_after_a_week(storage, tmp_path, monkeypatch):
    write_tensors(storage, NAME, {"w": torch.ones(4)}, {})
    mapped_tensors(storage, NAME)
    (old,) = copies_in(tmp_path)
    subprocess.run(["touch", "-d", "8 days ago", str(old)], check=True)
    other = NAME.replace("adaptation", "stability")
    write_tensors(storage, other, {"w": torch.ones(4)}, {})
    mapped_tensors(storage, other)
    assert len(copies_in(tmp_path)) == 1 and old not in copies_in(tmp_path)


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_cache_disk_that_is_full_is_named_and_nothing_is_left_of_the_file(object_store, tmp_path, what):
    """The kernel refuses to let a file grow in the middle: of a copy, or of what is put together for the store."""
    uri = object_store.uri(f"runs/{tmp_path.name}")
    if what == "read":
        write_tensors(Storage(uri), NAME, {"w": torch.ones(1 << 20)}, {})
    process = python("tests.faults.without_room", what, uri, NAME, ALPHATOKEN_CACHE=str(tmp_path / "cache"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"[Errno {errno.EFBIG}]" in out and f"{tmp_path}/cache" in out and "$ALPHATOKEN_CACHE" in out, out
    assert out.count("\n") == 1
    assert not [file for file in tmp_path.glob("cache/**/*") if file.is_file() and file.name != ".lock"]
    assert Storage(uri).exists(NAME) == (what == "read")
