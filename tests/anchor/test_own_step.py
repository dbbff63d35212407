"""valuation.schedule=own_step through the command line, against training runs with one token's weight moved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.pipeline.anchor.own_step import OwnSteps
from alphatoken.pipeline.anchor.unrolled import Held, learner_of, rows_of_steps
from alphatoken.pipeline.maths.batch import Batch, Sequences
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.simulated import Descent, SimulatedRun, Taped, simulate
from alphatoken.pipeline.maths.unroll import Adjoint, loss_gradient, sweep
from alphatoken.pipeline.settings.unroll import UnrollSettings
from tests.conftest import SMALL
from tests.maths.test_unroll import losses_of, norms_in_float64

STEPS, SIZE, RATE, LAYERS, ORDERS, RANK = 5, 8, 0.003, 3, 2, 4
OWN = [
    "anchor=unrolled", f"anchor.unroll.steps={STEPS}", "anchor.unroll.examples=40", f"anchor.unroll.batch_size={SIZE}",
    f"anchor.unroll.learning_rate={RATE}", f"anchor.unroll.orders={ORDERS}", "anchor.drift=none",
    "valuation.schedule=own_step", "valuation.scores=[loss]", "anchor.unroll.layers=all", "data.shard_examples=15",
    "anchor.unroll.snapshots=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def common(policy, train_file, twenty_rows) -> list[str]:
    return [f"model.policy={policy}", f"data.train={train_file}", f"data.validation={twenty_rows}", *SMALL, *OWN]


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, common):
    """A whole run, once for what its simulated runs train."""
    from alphatoken.jobs.cli import main

    runs: dict[str, Path] = {}

    def make(train: str) -> Path:
        if train not in runs:
            runs[train] = tmp_path_factory.mktemp("own-step")
            own = ["anchor.unroll.train=lora", f"anchor.unroll.rank={RANK}"] if train == "lora" else []
            assert main(["run", f"run.dir={runs[train]}", *common, *own]) == 0
        return runs[train]

    return make


@pytest.fixture
def run(made) -> Path:
    return made("weights")


def rows_of(files) -> list[dict]:
    return [row for file in sorted(files) for row in pq.read_table(file).to_pylist()]


class ByHand:
    """The same simulated run in float64, a row to a pass, with the tape in memory."""

    def __init__(self, run: Path, policy: Path, order: int, train: str) -> None:
        prepared, held = rows_of((run / "prepared").glob("part-*")), rows_of([run / "prepared/validation.parquet"])
        self.model = AutoModelForCausalLM.from_pretrained(policy).eval().double()
        norms_in_float64(self.model)
        self.scored = scored_layers(self.model, LAYERS)
        self.learner = learner_of(self.scored, UnrollSettings(train=train, rank=RANK), order)
        self.rows = rows_of_steps(len(prepared), UnrollSettings(steps=STEPS, batch_size=SIZE), 0, order)
        assert sorted(row for rows in self.rows for row in rows) == list(range(40))
        self.batches = [[one(prepared[row]) for row in rows] for rows in self.rows]
        everything = Sequences(*([row[name] for row in held] for name in ("id", "input_ids", "labels")))
        made = Held.of(everything).made
        self.validation = [made.take([i]).batch() for i in range(len(made))]
        self.start = {name: w.clone() for name, w in self.learner.start().items()}
        self.tape: dict[int, Taped] = {}
        self.done = SimulatedRun(self.start, Descent("adam", RATE, STEPS))
        simulate(self.learner, self.done, self.batches, "sdpa", self.tape.__setitem__)

    def swept(self) -> dict[int, torch.Tensor]:
        """Row -> value of each of its response tokens."""
        gradient, _, _ = loss_gradient(self.learner, self.done.masters(), self.validation, "sdpa")
        found = {}

        def keep(step: int, one) -> None:
            counts = [len(batch.predicting()) for batch in self.batches[step]]
            parts = one.values["adaptation"].split(counts)
            found.update(zip(self.rows[step], parts, strict=True))

        adjoints = {"adaptation": Adjoint.at_the_end(gradient)}
        sweep(self.learner, self.done.descent, self.batches, self.tape.__getitem__, adjoints, keep)
        return found

    def objective(self, row: int, token: int, moved: float) -> float:
        """The validation loss at the end of the run where one token of a row has the weight 1 + moved."""
        weights = {name: w.clone().requires_grad_(True) for name, w in self.start.items()}
        momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
        for t, batches in enumerate(self.batches):
            merged = self.learner.merged(weights)
            losses = [losses_of(self.model, merged, batch) for batch in batches]
            own = [torch.ones_like(one) for one in losses]
            if row in self.rows[t]:
                own[self.rows[t].index(row)][token] += moved
            total = sum((w * loss).sum() for w, loss in zip(own, losses, strict=True)) / sum(w.sum() for w in own)
            for name, g in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
                momentum[name] = 0.9 * momentum[name] + 0.1 * self.tape[t].clip * g
                step = self.tape[t].scaled(name, momentum[name])
                weights[name] = (weights[name] - step).detach().requires_grad_(True)
        with torch.no_grad():
            weights = self.learner.merged(weights)
            return float(torch.cat([losses_of(self.model, weights, batch) for batch in self.validation]).mean())


def one(row: dict) -> Batch:
    return Sequences([row["id"]], [row["input_ids"]], [row["labels"]]).batch()


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_values_are_minus_the_derivative_of_the_end_of_the_run_by_each_tokens_weight(made, policy, train):
    run = made(train)
    prepared, values = (rows_of((run / place).glob("part-*")) for place in ("prepared", "values"))
    assert [row["id"] for row in prepared] == [row["id"] for row in values] and len(values) == 40
    hands = [ByHand(run, policy, order, train) for order in range(ORDERS)]
    swept = [hand.swept() for hand in hands]
    column, wanted = [], []
    for number, (row, own) in enumerate(zip(prepared, values, strict=True)):
        inside = np.array(row["labels"]) != -100
        assert not np.array(own["adaptation_unrolled"])[~inside].any() and not any(own["stability_unrolled"])
        column.append(np.array(own["adaptation_unrolled"])[inside])
        wanted.append(np.mean([one[number].numpy() for one in swept], axis=0))
    flat, exact = np.concatenate(column), np.concatenate(wanted)
    # The tape is in bfloat16 and the model in float32: of a weight whose gradient is nearly 0 the step is hardly known.
    assert np.abs(flat - exact).max() < 0.06 * np.abs(exact).max() and np.corrcoef(flat, exact)[0, 1] > 0.999
    width = 2e-4
    for number in (0, 17, 39):
        token = int(np.abs(wanted[number]).argmax())
        slopes = []
        for hand in hands:  # of the fourth order, as in the tests of the maths
            far, near = (
                hand.objective(number, token, m) - hand.objective(number, token, -m) for m in (2 * width, width)
            )
            slopes.append((8 * near - far) / (12 * width))
        assert wanted[number][token] == pytest.approx(-np.mean(slopes), rel=1e-5)
        assert column[number][token] == pytest.approx(-np.mean(slopes), abs=0.06 * np.abs(exact).max())


def test_no_snapshot_is_made_that_no_score_looks_at_and_the_mask_takes_the_column(run):
    assert not list((run / "anchors").glob("snapshot-*")) and not (run / "anchors/partial").exists()
    assert [f.name for f in sorted((run / "anchors").iterdir())] == [
        f"own-step-0{order}.safetensors" for order in range(2)
    ]
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["stages"]["value"]["inputs"]["columns"] == ["loss", "adaptation_unrolled", "stability_unrolled"]
    summary = json.loads((run / "masks/default/summary.json").read_text())
    assert summary["score"] == "unrolled" and 0.45 < summary["kept_fraction"] < 0.55
    assert (
        summary["columns"]["adaptation_unrolled"]["mean_kept"]
        > 0
        > summary["columns"]["adaptation_unrolled"]["mean_masked"]
    )


def test_values_are_not_taken_from_anchors_that_were_made_otherwise(alphatoken, run, common, tmp_path):
    place = shutil.copytree(run, tmp_path / "run")

    record = json.loads((place / "run.json").read_text())

    def refused(made: dict, *overrides: str) -> str:
        """``made``: how the anchors are said to be made, None: not said."""
        inputs = {**record["stages"]["anchor"]["inputs"], **made}
        inputs = {key: value for key, value in inputs.items() if made.get(key, key) is not None}
        anchor = {**record["stages"]["anchor"], "inputs": inputs}
        (place / "run.json").write_text(json.dumps({**record, "stages": {**record["stages"], "anchor": anchor}}))
        untyped = [one for one in common if not one.startswith(("anchor.unroll", "valuation.scores"))]
        status, _, err = alphatoken("value", f"run.dir={place}", *untyped, *(overrides or ["valuation.scores=[loss]"]))
        assert status == 2 and "Traceback" not in err, err
        return err

    assert "anchor.unroll.orders=2, but the anchors were made of 3" in refused({"anchor.unroll.orders": 3})
    line = refused({}, "valuation.scores=[paper,loss]")
    assert "the anchors were made without snapshots: make others, `alphatoken run --from" in line
    assert "have no values at own steps: make others" in refused({"valuation.schedule": None})


def test_steps_that_train_on_a_row_again_add_up():
    rows = Sequences(["a", "b"], [[1, 2, 3], [4, 5]], [[-100, 2, 3], [-100, 5]])
    own = OwnSteps(rows)
    own.add([1, 0], {"adaptation": torch.tensor([1.0, 2.0, 3.0])})
    own.add([0], {"adaptation": torch.tensor([10.0, 20.0])})
    assert own.state()["adaptation"].tolist() == [12.0, 23.0, 1.0] and own.as_file()["tokens"].tolist() == [2.0, 1.0]
    again = OwnSteps(rows, own.state())
    again.add([1], {"adaptation": torch.tensor([5.0])})
    assert again.state()["adaptation"].tolist() == [12.0, 23.0, 6.0] and own.state()["adaptation"][2] == 1.0


def test_what_cannot_be_valued_at_its_own_step_is_refused(alphatoken, common, tmp_path):
    def refused(status: int, *overrides: str, command: str = "run") -> str:
        got, _, err = alphatoken(command, f"run.dir={tmp_path / 'run'}", *common, *overrides)
        assert got == status and "Traceback" not in err, err
        return err.strip().splitlines()[-1]

    line = refused(2, "anchor.unroll.steps=4")
    assert "32 of 40 training rows" in line and "anchor.unroll.examples=40 anchor.unroll.steps=5" in line
    assert "32 of 40" in refused(2, "anchor.unroll.steps=4", command="plan")
    assert "set anchor.direction=unrolled" in refused(2, "anchor.direction=gradient", "anchor.unroll.layers=null")
    assert "valuation.schedule=own_step valuation.scores=[loss]" in refused(
        2, "valuation.schedule=static", "valuation.scores=[paper,loss]"
    )
    line = refused(
        2,
        "anchor.unroll.train=lora",
        "anchor.unroll.layers=null",
        "valuation.schedule=static",
        "valuation.scores=[paper,loss]",
    )
    assert "anchor.unroll.train=lora: values at snapshots are of the 2 layers" in line
    assert "has 3 decoder layers" in refused(2, "anchor.unroll.layers=4", "run.overwrite=prepare")


def test_plan_states_the_cost_of_more_layers(alphatoken, common, tmp_path):
    def planned(*overrides: str) -> dict:
        status, out, err = alphatoken("plan", "--json", f"run.dir={tmp_path}", *common, *overrides)
        assert status == 0, err
        return json.loads(out)

    every, last = planned(), planned("anchor.unroll.layers=1")
    assert every["model"]["trained_layers"] == 3 and last["model"]["trained_layers"] == 1
    assert every["flops"]["anchor"]["unrolled"] > 1.5 * last["flops"]["anchor"]["unrolled"]
    assert every["storage"]["tape"] == 3 * last["storage"]["tape"]
    assert every["flops"]["value"]["flops"] == last["flops"]["value"]["flops"]
    adapters = planned("anchor.unroll.train=lora", "anchor.unroll.rank=1", "anchor.unroll.layers=null")
    assert adapters["model"]["trained_layers"] == 3
    assert adapters["flops"]["anchor"]["unrolled"] < 0.8 * every["flops"]["anchor"]["unrolled"]
    assert adapters["storage"]["tape"] != every["storage"]["tape"]
