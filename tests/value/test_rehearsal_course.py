"""The course of a rehearsal in pieces: the numbers of one AdamW over everything, whoever makes which piece, and no tensor in the driver."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from alphatoken.data_schemas import COMPONENTS
from alphatoken.jobs.cli import main
from alphatoken.pipeline.anchor import sums
from alphatoken.pipeline.anchor.places import FISHER
from alphatoken.pipeline.anchor.tensors import carried, counts_of, write_tensors
from alphatoken.pipeline.cluster.inline import Here
from alphatoken.pipeline.cluster.work import Lost
from alphatoken.pipeline.maths.adamw import ScoredAdamW, norm_of
from alphatoken.pipeline.maths.directions import fisher_drift
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.value import rehearsal
from alphatoken.pipeline.value.rehearsal_pieces import (
    MASTER,
    REFERENCE,
    STATE,
    Begin,
    Direct,
    Gradient,
    Load,
    Own,
    Save,
    Step,
)
from tests.conftest import save_model
from tests.faults.interrupted_run import contents, inputs_in, python

SHAPES = {"b": (7, 5), "a": (4, 3), "d": (30, 40), "c": (2, 3, 2), "e": (1, 1)}
RATE, TOKENS, LANES, STEPS = 0.01, 13, 3, 5


def drawn(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def in_store(tensors: dict[str, torch.Tensor], pieces) -> list[Here]:
    return [Here({name: tensors[name].numpy() for name in names}) for names in pieces]


def pieces_in(piece_bytes: int) -> list[tuple[str, ...]]:
    return [tuple(one.name for one in piece) for piece in sums.pieces_of(SHAPES, piece_bytes, whole=True)]


@pytest.mark.parametrize(("piece_bytes", "count"), [(1, 5), (200, 4), (1 << 20, 1)])
def test_pieces_are_whole_parameters_in_the_order_of_their_names(piece_bytes, count):
    found = pieces_in(piece_bytes)
    assert [name for names in found for name in names] == sorted(SHAPES) and len(found) == count


@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("piece_bytes", [1, 200, 1 << 20])
def test_steps_in_pieces_are_those_of_one_adamw_also_from_a_saved_state(tmp_path, piece_bytes, size):
    """The oracle: sums over the lanes, ScoredAdamW and its state, all of it in one process."""
    policy, storage = drawn(0), Storage(str(tmp_path))
    own, pieces = Own(storage, RATE, lambda: policy, None), pieces_in(piece_bytes)
    assert Begin("begin", "f")(own) == SHAPES
    whole = ScoredAdamW({name: policy[name] for name in sorted(policy)}, RATE)
    masters, moments, _ = map(list, zip(*(Load("load", n, 0, False, Here)(own) for n in pieces), strict=True))
    for step in range(STEPS):
        if step == 3:  # a resumed course, from the file that the whole state would give
            kinds = {MASTER: masters, "exp_avg": moments, "exp_avg_sq": moments}
            Save("save", pieces, kinds, SHAPES, "f", {"saves": [0, step]})(own)
            assert counts_of(storage, STATE, "f") == {"saves": [0, step]}
            written = storage.read_bytes(STATE)
            write_tensors(storage, "oracle", whole.state(), carried("f", {"saves": [0, step]}))
            assert written == storage.read_bytes("oracle")
            masters, moments, none = map(
                list, zip(*(Load("load", n, step, False, Here)(own) for n in pieces), strict=True)
            )
            assert set(none) == {None}
        lanes = [drawn(100 * step + lane + 1, size) for lane in range(LANES)]
        total = {name: (lanes[0][name] + lanes[1][name]) + lanes[2][name] for name in SHAPES}
        wanted = whole.step(total, TOKENS, 0.7)
        by_piece = list(zip(*(in_store(lane, pieces) for lane in lanes), strict=True))
        made = [Gradient("g", n, own_lanes, TOKENS, Here)(own) for n, own_lanes in zip(pieces, by_piece, strict=True)]
        norm = norm_of(one for _, norms in made for one in norms)
        assert norm == wanted and (norm > 1) == (size > 1)
        moved = [
            Step("s", names, made[i][0], masters[i], moments[i], step, norm, 0.7, Here)(own)
            for i, names in enumerate(pieces)
        ]
        masters, moments = map(list, zip(*moved, strict=True))
        found = {key: array for one in (*masters, *moments) for key, array in one.get().items()}
        state = whole.state()
        assert found.keys() == state.keys()
        assert all(np.array_equal(found[key], state[key].numpy()) for key in state)
    assert all(torch.equal(policy[name], tensor) for name, tensor in drawn(0).items())


@pytest.mark.parametrize("apart", [False, True], ids=["one model", "two models"])
def test_directions_in_pieces_are_the_mean_gradient_and_the_fisher_drift(tmp_path, apart):
    policy, reference, storage, pieces = drawn(0), drawn(1), Storage(str(tmp_path)), pieces_in(200)
    fisher, lanes, now = drawn(2), [drawn(lane + 3) for lane in range(LANES)], drawn(9)
    write_tensors(storage, FISHER, fisher, {})
    own = Own(storage, RATE, lambda: policy, (lambda: reference) if apart else None)
    Begin("begin", "f")(own)
    assert storage.exists(REFERENCE) == apart
    for weighed in (True, False):
        for number, names in enumerate(pieces):
            masters = Here({f"{MASTER}/{name}": now[name].numpy() for name in names})
            own_lanes = [in_store(lane, pieces)[number] for lane in lanes]
            found = Direct("d", names, own_lanes, TOKENS, masters, weighed, Here)(own).get()
            for name in names:
                total = (lanes[0][name] + lanes[1][name]) + lanes[2][name]
                assert np.array_equal(found[f"adaptation/{name}"], (total / TOKENS).numpy())
                drift = fisher_drift(fisher[name], now[name], (reference if apart else policy)[name])
                assert np.array_equal(found[f"stability/{name}"], (drift * weighed).numpy())


def test_what_finds_no_room_in_the_store_is_an_error_with_its_remedy(tmp_path):
    def full(value):
        raise Lost("the store is full")

    own = Own(Storage(str(tmp_path)), RATE, lambda: drawn(0), None)
    with pytest.raises(RunFailed, match=r"no room .*the store is full.* larger object store"):
        Load("load", ("a",), 0, False, full)(own)


REHEARSAL = [
    "valuation=rehearsal", "valuation.layers=2", "valuation.window=4", "anchor.snapshots=1", "data.shard_examples=12",
    "valuation.rehearsal.batch_size=12", "valuation.rehearsal.refresh=2", "valuation.rehearsal.save_every=1",
    "valuation.rehearsal.learning_rate=0.002", "valuation.tokens_per_batch=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    place = tmp_path_factory.mktemp("inputs")
    own = [one for one in inputs_in(place) if not one.startswith(("anchor.snapshots=", "data.shard"))]
    return [*own, f"model.reference={save_model(place / 'reference', seed=2)}", *REHEARSAL]


@pytest.fixture(scope="module")
def anchored(tmp_path_factory, inputs) -> Path:
    """A run directory whose next stage is value."""
    run = tmp_path_factory.mktemp("anchored") / "run"
    for stage in ("prepare", "anchor"):
        assert main([stage, f"run.dir={run}", *inputs, "cluster.address=inline"]) == 0
    return run


def without_settings(run: Path) -> dict:
    found = contents(run)
    del found["run.json"]["configuration"]["cluster"]
    return found


def told_by(place: Path, anchored: Path, inputs: list[str], *more: str) -> dict:
    """Of the driver of the value stage, in a copy of the run."""
    shutil.copytree(anchored, place)
    process = python("tests.anchor.watched_driver", place, "value", *inputs, *more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


def test_any_number_of_workers_gives_the_same_bytes_and_the_driver_sees_no_tensor_of_the_course(
    tmp_path, inputs, anchored
):
    """Pieces of 2 KB: of 14 parameters, each more than one lane's."""
    told = told_by(tmp_path / "inline", anchored, inputs, "cluster.address=inline")
    assert told["made"]  # the driver is the worker: what looks at it sees
    wanted = without_settings(tmp_path / "inline")
    assert any(name.startswith("values/part-") for name in wanted)
    columns = len((*COMPONENTS, "loss"))
    for workers in (1, 2, 3):
        told = told_by(tmp_path / str(workers), anchored, inputs, f"cluster.workers={workers}")
        assert without_settings(tmp_path / str(workers)) == wanted
        # Of all that comes from the workers, the values of a batch alone are arrays: (columns, rows, length).
        assert told["answers"] > 10 and told["made"] == [], told
        assert told["arrays"] and all(one.startswith(f"ndarray ({columns}, ") for one in told["arrays"]), told
        logs = "".join(log.read_text() for log in (tmp_path / str(workers)).glob("logs/value-*.log"))
        for what in ("load", "direct", "add up", "move"):
            assert f"step 0 {what} 4 done" in logs


class Losing:
    """Stands in front of what a worker in this process reads from the store; the calls with these numbers find it gone."""

    def __init__(self, monkeypatch, numbers) -> None:
        self.numbers, self.calls, get = numbers, 0, Here.get

        def losing(here):
            self.calls += 1
            if self.calls in self.numbers:
                raise Lost("the test has lost it")
            return get(here)

        monkeypatch.setattr(Here, "get", losing)


def test_what_the_store_has_lost_is_made_again_from_the_last_save_to_the_same_bytes(
    tmp_path, inputs, anchored, monkeypatch, capfd
):
    """Whatever it is: weights, directions, gradients, moments, hidden states; also while the state is saved."""
    monkeypatch.setattr(sums, "PIECE_BYTES", 2048)
    run = shutil.copytree(anchored, tmp_path / "run")
    arguments = [f"run.dir={run}", *inputs, "cluster.address=inline"]
    calm = Losing(monkeypatch, ())
    assert main(["value", *arguments]) == 0
    wanted, reads = contents(run), calm.calls
    capfd.readouterr()
    told = ""
    for number in range(1, reads, reads // 9):
        losing = Losing(monkeypatch, (number, number + 7))
        assert main(["value", *arguments, "run.overwrite=value"]) == 0
        err = capfd.readouterr().err
        assert losing.calls > reads and contents(run) == wanted
        assert err.count("is gone (the test has lost it): the rehearsal goes back to step ") == 2, err
        assert "went back to a save 2 times" in err
        told += err
    assert "step 0, its beginning" in told and "step 1, its last save" in told and "step 2, its last save" in told
    Losing(monkeypatch, range(1, reads))
    status, err = main(["value", *arguments, "run.overwrite=value"]), capfd.readouterr().err
    assert status == 1 and err.strip().splitlines()[-1].count(f"{rehearsal.LOST_IN_A_ROW} times since step 0") == 1, err
    assert "smaller valuation.rehearsal.save_every" in err
