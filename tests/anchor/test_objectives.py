"""data.validation of several tasks and data.retention through the command line, against runs with one of them alone."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from alphatoken import Directions
from tests.conftest import SMALL, chat_row, sentence, write_rows

FILES = {"code": range(500, 507), "maths": range(600, 619), "retention": range(700, 705)}
PLAIN = ["anchor.drift=none", "mask.stability_weight=0", "valuation.scores=[paper,loss]"]


def repeating_row(index: int) -> dict:
    """A row of a file where every completion begins with its prompt, which is taken off there and nowhere else."""
    return {"prompt": sentence(index, 5), "completion": sentence(index, 5) + " " + sentence(index + 50, 6)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tasks")
    rows = {
        name: [repeating_row(i) if name == "maths" else chat_row(i) for i in numbers] for name, numbers in FILES.items()
    }
    rows["code"].append({"messages": "no list"})
    return {name: write_rows(place / f"{name}.jsonl", own) for name, own in rows.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, policy, train_file, files):
    from alphatoken.jobs.cli import main

    runs: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in runs:
            run = tmp_path_factory.mktemp("objectives")
            given = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *PLAIN, *overrides]
            for stage in ("prepare", "anchor", "value"):
                assert main([stage, *given]) == 0
            runs[overrides] = run
        return runs[overrides]

    return make


@pytest.fixture(scope="module")
def several(made, files):
    tasks = f"data.validation={{code: {files['code']}, maths: {files['maths']}}}"
    return made(tasks, f"data.retention={files['retention']}")


def column(run: Path, name: str) -> np.ndarray:
    tables = [pq.read_table(file, columns=[name]) for file in sorted((run / "values").glob("part-*"))]
    return np.concatenate([np.concatenate(table.column(name).to_numpy()) for table in tables])


@pytest.mark.parametrize(
    ("objective", "file"), [("adaptation_code", "code"), ("adaptation_maths", "maths"), ("retention", "retention")]
)
def test_each_objective_is_what_a_run_with_its_rows_alone_calls_adaptation(several, made, files, objective, file):
    alone = made(f"data.validation={files[file]}")
    own = load_file(several / f"anchors/snapshot-00/{objective}.safetensors")
    wanted = load_file(alone / "anchors/snapshot-00/adaptation.safetensors")
    assert own.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.any() and torch.equal(own[name], tensor)
    for path in ("direct", "causal"):
        values, theirs = column(several, f"{objective}_{path}"), column(alone, f"adaptation_{path}")
        np.testing.assert_allclose(values, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
        assert theirs.any()


def test_all_tasks_together_are_their_mean_by_response_tokens(several):
    manifest = json.loads((several / "run.json").read_text())
    rows = pq.read_table(several / "prepared/validation.parquet").to_pylist()
    tokens = dict.fromkeys(("code", "maths"), 0)
    for row in rows:
        tokens[Path(row["source"].rpartition(":")[0]).stem] += sum(label != -100 for label in row["labels"])
    for path in ("direct", "causal"):
        parts = [n / sum(tokens.values()) * column(several, f"adaptation_{t}_{path}") for t, n in tokens.items()]
        found = column(several, f"adaptation_{path}")
        np.testing.assert_allclose(found, sum(parts), rtol=1e-3, atol=1e-5 * np.abs(found).max())
    prepare, anchor = (manifest["stages"][stage]["counts"] for stage in ("prepare", "anchor"))
    assert prepare["validation_rows"] == 26 and prepare["validation_quarantined"] == 1
    assert prepare["notes"] == {"validation prompt_stripped": 19}
    assert set(anchor["snapshot-00"]["losses"]) == {"adaptation_code", "adaptation_maths", "retention"}
    assert anchor["snapshot-00"]["validation_positions"] == sum(tokens.values())
    columns = manifest["stages"]["value"]["inputs"]["columns"]
    assert [c for c in columns if c.startswith(("adaptation_", "retention"))][-2:] == [
        "retention_direct",
        "retention_causal",
    ]
    named = Directions.load(several / "anchors/snapshot-00").named
    assert list(named) == ["adaptation", "stability", "adaptation_code", "adaptation_maths", "retention"]


def test_weights_are_swept_without_a_model(several, alphatoken):
    status, out, err = alphatoken(
        "mask", "-m", f"run.dir={several}", "mask.weights={code: 1},{code: 1, retention: 2}", "mask.require=none,all"
    )
    assert status == 0, err
    summaries = [json.loads(f.read_text()) for f in sorted((several / "masks").glob("*/summary.json"))]
    assert len(summaries) == 4 and {s["score"] for s in summaries} == {"paper"}
    assert len({json.dumps([s["settings"]["weights"], s["settings"]["require"]]) for s in summaries}) == 4
    kept = {json.dumps([s["columns"]["value"]["mean_kept"], s["kept_tokens"]]) for s in summaries}
    assert len(kept) == 4


def test_plan_counts_the_objectives(alphatoken, policy, train_file, files, tmp_path):
    def planned(*overrides: str) -> dict:
        given = [
            f"run.dir={tmp_path}",
            f"model.policy={policy}",
            f"data.train={train_file}",
            *SMALL,
            *PLAIN,
            *overrides,
        ]
        status, out, err = alphatoken("plan", "--json", *given)
        assert status == 0, err
        return json.loads(out)

    tasks = f"data.validation={{code: {files['code']}, maths: {files['maths']}}}"
    both, plain = planned(tasks, f"data.retention={files['retention']}"), planned(f"data.validation={files['code']}")
    assert both["data"]["tasks"] == {"adaptation_code": 8, "adaptation_maths": 19}
    assert both["data"]["retention_examples"] == 5 and both["flops"]["anchor"]["retention_gradient"] > 0
    assert "retention_gradient" not in plain["flops"]["anchor"]
    assert both["flops"]["value"]["flops"] > plain["flops"]["value"]["flops"]
    assert both["memory_per_worker"]["directions"] == 2.5 * plain["memory_per_worker"]["directions"]
    assert both["storage"]["anchors"] == 2.5 * plain["storage"]["anchors"]


def test_tasks_that_cannot_be_told_apart_or_have_no_rows_are_refused(alphatoken, policy, train_file, files, tmp_path):
    def refused(status: int, *overrides: str) -> str:
        given = [f"run.dir={tmp_path / 'run'}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *PLAIN]
        got, _, err = alphatoken("run", *given, *overrides)
        assert got == status and "Traceback" not in err, err
        return err.strip().splitlines()[-1]

    code, maths = files["code"], files["maths"]
    assert "has the rows of task a as well" in refused(2, f"data.validation={{a: {code}, b: {code}}}")
    assert "data.validation.b=" in refused(2, f"data.validation={{a: {code}, b: {tmp_path}/none.jsonl}}")
    given = f"data.validation={{code: {code}, maths: {maths}}}"
    line = refused(2, given, "mask.weights={code: 1, math: 1}")
    assert "did you mean maths?" in line
    line = refused(2, given, "mask.weights={code: 1}", "valuation.scores=[loss]")
    assert "with paper in valuation.scores" in line
    empty = write_rows(tmp_path / "empty.jsonl", [{"messages": "no list"}])
    assert "data.validation.maths: no row of" in refused(1, f"data.validation={{code: {code}, maths: {empty}}}")
