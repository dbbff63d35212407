"""Sums over parts: a tree that depends on the partition alone, files written bit by bit, bytes whoever adds up what."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from alphatoken.pipeline.anchor.sums import SumFile, Term, WriteTask
from alphatoken.pipeline.anchor.tensor_file import TensorFile
from alphatoken.pipeline.anchor.tensors import read_tensors, tensor_stream, write_tensors
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from tests.conftest import save_model
from tests.faults.interrupted_run import contents, inputs_in, python

SHAPES = {"b.w": (7, 5), "a.w": (4, 3, 2), "c": (), "z.empty": (0, 3)}


def parts_in(storage: Storage, count: int) -> tuple[str, ...]:
    torch.manual_seed(0)
    names = tuple(f"part-{index}" for index in range(count))
    for name in names:
        scaled = {key: torch.randn(shape) * 10.0 ** torch.randint(-4, 5, shape) for key, shape in SHAPES.items()}
        write_tensors(storage, name, scaled, {})
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metadata", [{}, {"z": "1", "a": "é"}])
def test_a_file_is_what_the_library_writes_with_its_metadata_in_order(tmp_path, dtype, metadata):
    tensors = {key: torch.randn(shape).to(dtype) for key, shape in SHAPES.items()}
    storage = Storage(str(tmp_path))
    write_tensors(storage, "x", tensors, metadata, dtype)
    own, theirs = storage.read_bytes("x"), safetensors.torch.save(tensors, metadata)
    if len(metadata) < 2:
        assert own == theirs
    sizes = [int.from_bytes(content[:8], "little") for content in (own, theirs)]
    headers = [json.loads(content[8 : 8 + size]) for content, size in zip((own, theirs), sizes, strict=True)]
    assert headers[0] == headers[1] and list(headers[0]["__metadata__"]) == sorted(metadata)
    assert own[8 + sizes[0] :] == theirs[8 + sizes[1] :]
    assert all(torch.equal(read_tensors(storage, "x")[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize("parts", [1, 2, 3, 6, 8])
def test_a_sum_is_the_tree_over_its_parts_whatever_its_pieces(tmp_path, parts, piece_bytes):
    storage = Storage(str(tmp_path))
    names = parts_in(storage, parts)
    file = SumFile("sum", (Term(names, 3),), SHAPES, {}, piece_bytes)
    covered = [(one.name, row) for piece in file.pieces() for one in piece for row in range(one.start, one.stop)]
    assert covered == [(n, row) for n in sorted(SHAPES) for row in range(math.prod(SHAPES[n][:1]))]
    assert WriteTask(file)(storage, lambda n: None) == 0
    level = [read_tensors(storage, name) for name in names]
    while len(level) > 1:  # neighbours, and who has none waits for the next level
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [{key: p[0][key] + p[1][key] if len(p) > 1 else p[0][key] for key in SHAPES} for p in pairs]
    for key, tensor in read_tensors(storage, "sum").items():
        assert torch.equal(tensor, level[0][key] / 3)


def test_the_terms_of_a_sum_are_weighed_and_added_in_order(tmp_path):
    storage = Storage(str(tmp_path))
    names = parts_in(storage, 3)
    file = SumFile("sum", tuple(Term((n,), weight=w) for n, w in zip(names, (0.2, 0.3, 0.5), strict=True)), SHAPES, {})
    WriteTask(file)(storage, lambda n: None)
    parts = [read_tensors(storage, name) for name in names]
    for key, tensor in read_tensors(storage, "sum").items():
        wanted = (0.2 * parts[0][key]).add_(parts[1][key], alpha=0.3).add_(parts[2][key], alpha=0.5)
        assert torch.equal(tensor, wanted)


def test_a_part_that_is_cut_off_is_named(tmp_path):
    storage = Storage(str(tmp_path))
    (name,) = parts_in(storage, 1)
    content = storage.read_bytes(name)
    storage.write_bytes(name, content[:-4])
    with (
        pytest.raises(OSError, match="part-0 is cut off: run the same command again"),
        TensorFile(storage, name) as file,
    ):
        for key in file.shapes:
            file.whole(key)


def test_a_file_that_is_not_finished_does_not_appear(tmp_path):
    storage = Storage(str(tmp_path))
    with pytest.raises(RunFailed, match="NaN or infinity in b while making x"), tensor_stream(
        storage, "x", {"a": (2,), "b": (2,)}, {}
    ) as stream:  # fmt: skip
        stream.put("a", np.ones(2, np.float32))
        stream.put("b", np.array([1, np.inf], np.float32))
    with pytest.raises(AssertionError), tensor_stream(storage, "x", {"a": (2,)}, {}) as stream:
        stream.put("a", torch.ones(1))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """80 rows of which 40 are validation and 20 prompts of the Fisher: sums of five and three parts."""
    place = tmp_path_factory.mktemp("inputs")
    own = [one for one in inputs_in(place) if not one.startswith(("data.validation=", "data.shard"))]
    return [*own, f"model.reference={save_model(place / 'reference', seed=2)}", "data.validation=30",
            "anchor.precondition=kfac", "anchor.drift=checkpoint", "anchor.snapshots=1"]  # fmt: skip


def without_settings(run: Path) -> dict:
    """All that a run left, but for how many workers it was given."""
    found = contents(run)
    del found["run.json"]["configuration"]["cluster"]
    return found


def anchors(place, inputs, *more: str) -> dict:
    """Run prepare and anchor in a process with pieces of 2 KB; what is told of its driver."""
    process = python("tests.anchor.watched_driver", place, "prepare", "anchor", *inputs, *more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


def test_any_number_of_workers_gives_the_same_bytes_and_the_driver_sees_no_tensor(tmp_path, inputs):
    told = anchors(tmp_path / "inline", inputs, "cluster.address=inline")
    assert told["made"]  # the driver is the worker: what looks at it sees
    wanted = without_settings(tmp_path / "inline")
    assert {"anchors/fisher.safetensors", "anchors/snapshot-00/stability.safetensors"} <= wanted.keys()
    for workers in (1, 2, 3):
        told = anchors(tmp_path / str(workers), inputs, f"cluster.workers={workers}")
        assert without_settings(tmp_path / str(workers)) == wanted
        assert told["answers"] > 10 and told["arrays"] == [] and told["made"] == [], told
        assert (told["adds"] > 20) == (workers > 1), told
