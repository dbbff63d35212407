"""valuation.schedule=rehearsal through the command line, against a plain loop: pairwise values, plain autograd, float64."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphatoken.data_schemas import COMPONENTS, SCORES, value_columns, values_schema
from alphatoken.pipeline.cluster import cluster
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.prepare.draw import draw_order
from tests.conftest import SMALL, chat_row, write_rows
from tests.jobs.test_run import hashes
from tests.maths import pairwise
from tests.maths.tiny_models import LLAMA

LAYERS, WINDOW, BATCH = 2, 4, 4
REHEARSAL = [
    "valuation=rehearsal", f"valuation.layers={LAYERS}", f"valuation.window={WINDOW}", "data.validation=3",
    f"valuation.rehearsal.batch_size={BATCH}", "valuation.rehearsal.learning_rate=0.002",
    "valuation.tokens_per_batch=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", [chat_row(i) for i in range(20)])


def arguments(run: Path, policy: Path, train: Path, *more: str) -> list[str]:
    return [f"run.dir={run}", f"model.policy={policy}", f"data.train={train}", *SMALL, *REHEARSAL, *more]


def rows_of(run: Path, directory: str) -> list[dict]:
    return [row for file in sorted((run / directory).glob("*-of-*")) for row in pq.read_table(file).to_pylist()]


def plain_loop(run: Path, policy: Path, reference: Path, rho, weight, refresh, rate) -> list[dict[str, np.ndarray]]:
    """The columns of every row of the run, one after the other in a single process."""
    rows, validation = rows_of(run, "prepared"), pq.read_table(run / "prepared/validation.parquet").to_pylist()
    model = pairwise.oracle(AutoModelForCausalLM.from_pretrained(policy))
    names = [f"{LLAMA.layers}.{i}.{m}.weight" for i in (1, 2) for m in LLAMA.linears]
    trained = [model.get_parameter(name) for name in names]
    before = AutoModelForCausalLM.from_pretrained(reference).double().state_dict()
    fisher = {name: tensor.double() for name, tensor in load_file(run / "anchors/fisher.safetensors").items()}
    assert sorted(fisher) == sorted(names)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    order = list(draw_order(len(rows), 0))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    found: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for step, batch in enumerate(batches):
        if step % refresh == 0:
            recorded = [pairwise.record(model, LLAMA, LAYERS, r["input_ids"], r["labels"]) for r in validation]
            drift = {(n, 0): fisher[n] * (model.get_parameter(n).detach() - before[n]) for n in names}
        for i in batch:
            one = pairwise.record(model, LLAMA, LAYERS, rows[i]["input_ids"], rows[i]["labels"])
            values = pairwise.position_values(model.config, LLAMA, one, recorded, drift, WINDOW)
            found[i] = {name: column.numpy() for name, column in pairwise.token_values(values, one).items()}
        value = {i: found[i]["adaptation_direct"] + found[i]["adaptation_causal"] for i in batch}
        for i in batch:
            value[i] = value[i] + weight * (found[i]["stability_direct"] + found[i]["stability_causal"])
        response = {i: np.array(rows[i]["labels"]) != -100 for i in batch}
        everything = sorted(np.concatenate([value[i][response[i]] for i in batch]), reverse=True)
        threshold = everything[math.ceil(rho * len(everything)) - 1]
        gradient, tokens = {name: torch.zeros_like(model.get_parameter(name)) for name in names}, 0
        for i in batch:
            found[i]["kept"] = response[i] & (value[i] >= threshold)
            if not found[i]["kept"].any():
                continue
            labels = np.where(found[i]["kept"], rows[i]["labels"], -100).tolist()
            one = pairwise.record(model, LLAMA, LAYERS, rows[i]["input_ids"], labels)
            tokens += len(one.losses)
            for name in names:
                gradient[name] += one.gradients[name]
        for name, parameter in zip(names, trained, strict=True):
            parameter.grad = gradient[name] / tokens
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rise = max(1, len(batches) // 10)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - rise) / (len(batches) - rise)))
        optimizer.param_groups[0]["lr"] = rate * ((step + 1) / rise if step < rise else cosine)
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("weight", "refresh", "rho", "two_models"), [(1.5, 1, 0.5, False), (0.05, 2, 0.3, True)], ids=["one", "two"]
)
def test_a_rehearsal_equals_a_plain_loop_in_one_process(
    alphatoken, tmp_path, policy, reference, few_rows, weight, refresh, rho, two_models
):
    run = tmp_path / "r"
    more = [
        f"valuation.rehearsal.{k}={v}" for k, v in (("stability_weight", weight), ("refresh", refresh), ("rho", rho))
    ]
    more += [f"model.reference={reference}"] if two_models else []
    status, _, err = alphatoken("run", *arguments(run, policy, few_rows, *more))
    assert status == 0, err
    wanted = plain_loop(run, policy, reference if two_models else policy, rho, weight, refresh, 0.002)
    stored, prepared, masks = rows_of(run, "values"), rows_of(run, "prepared"), rows_of(run, "masks/default/data")
    assert len(stored) == len(wanted) == 14
    for name in (*COMPONENTS, "loss"):
        ours = np.concatenate([np.array(row[name]) for row in stored])
        theirs = np.concatenate([row[name] for row in wanted])
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4 * np.abs(theirs).max(), err_msg=name)
    schema = values_schema((*COMPONENTS, "loss"), rehearsed=True)
    for row, plain in zip(stored, wanted, strict=True):
        assert row["kept"] == plain["kept"].tolist()
    assert pq.read_schema(run / "values/part-00000-of-00002.parquet").equals(schema)
    eos = json.loads((run / "run.json").read_text())["stages"]["prepare"]["counts"]["eos_token_ids"]
    for row, values, mask in zip(prepared, stored, masks, strict=True):
        always = [token in eos for token in row["input_ids"]]
        inside = [label != -100 and (k or a) for label, k, a in zip(row["labels"], values["kept"], always, strict=True)]
        assert sum(inside) >= 1
        assert mask["labels"] == [label if i else -100 for label, i in zip(row["labels"], inside, strict=True)]
    summary = json.loads((run / "masks/default/summary.json").read_text())
    assert summary["schedule"] == "rehearsal" and summary["settings"]["rho"] == rho
    assert "a rehearsal" in (run / "masks/default/README.md").read_text()
    assert not (run / "values/rehearsal").exists()
    assert "plain alignment" not in err and "There is no drift" not in (run / "report/index.html").read_text()


def test_learning_lowers_the_validation_loss_and_values_differ_from_static_ones(
    alphatoken, tmp_path, policy, train_file
):
    run = tmp_path / "r"
    status, _, err = alphatoken("run", *arguments(run, policy, train_file, "valuation.rehearsal.stability_weight=0"))
    assert status == 0, err
    assert not (run / "anchors/fisher.safetensors").exists()
    counts = json.loads((run / "run.json").read_text())["stages"]["value"]["counts"]
    first, last = counts["rehearsal"]["validation_loss"]
    # 37 rows in batches of 4: without a Fisher no prompts are held out.
    assert last < first - 0.05 and counts["rehearsal"]["steps"] == 10
    kept = sum(sum(row["kept"]) for row in rows_of(run, "values"))
    assert counts["rehearsal"]["kept_tokens"] == kept
    static = tmp_path / "static"
    common = arguments(static, policy, train_file, "valuation.schedule=static", "anchor.drift=none")
    assert alphatoken("run", *common, "mask.score=paper", "mask.stability_weight=0")[0] == 0
    ours, theirs = rows_of(run, "values"), rows_of(static, "values")
    by_id = {row["id"]: row for row in theirs}
    assert by_id.keys() == {row["id"] for row in ours}
    order = list(draw_order(len(ours), 0))
    for step, i in ((0, order[0]), (8, order[-1])):
        row, other = ours[i], by_id[ours[i]["id"]]
        same = np.allclose(row["adaptation_direct"], other["adaptation_direct"], rtol=1e-3, atol=1e-5)
        assert same == (step == 0)


class AllReady(WorkerPool):
    """A pool that waits for all of its workers: here, the first would be through before the second is there."""

    def run(self, shards, payload, done, task):
        hosts = self.hosts
        while len(hosts.all) < hosts.resources.workers:
            host = hosts.spawn()
            hosts.nodes[host] = ray.get(host.start.remote(hosts.make, hosts.arguments))[1]
        super().run(shards, payload, done, task)


EVERY_COLUMN = [f"valuation.scores=[{','.join(SCORES)}]", "valuation.exact=true"]


@pytest.mark.parametrize("every", [False, True], ids=["paper", "every"])
def test_same_bytes_with_one_worker_and_with_two(alphatoken, tmp_path, policy, train_file, every, monkeypatch):
    monkeypatch.setattr(cluster, "WorkerPool", AllReady)
    found = []
    for workers in (1, 2):
        run = tmp_path / "run"  # the same place, since ids name the source files
        more = (f"cluster.workers={workers}", "valuation.rehearsal.batch_size=9", *(EVERY_COLUMN if every else []))
        status, _, err = alphatoken("run", *arguments(run, policy, train_file, *more))
        assert status == 0, err
        found.append(hashes(run))
        logs = [file.read_text() for file in (run / "logs").glob("value-*")]
        assert len(logs) == workers and all(" values " in log and " gradient " in log for log in logs)
        run.rename(tmp_path / f"run-{workers}")
    assert found[0] == found[1] and len(found[0]) > 10
    columns = value_columns(list(SCORES), exact=True) if every else (*COMPONENTS, "loss")
    schema = pq.read_schema(tmp_path / "run-2/values/part-00000-of-00004.parquet")
    assert schema.equals(values_schema(columns, rehearsed=True))
    rows = rows_of(tmp_path / "run-2", "values")
    assert all(any(any(row[name]) for row in rows) for name in columns)


@pytest.mark.parametrize(("size", "warned"), [(14, True), (13, False)])
def test_a_rehearsal_of_one_step_is_said_to_be_none(alphatoken, tmp_path, policy, few_rows, size, warned):
    more = [f"valuation.rehearsal.batch_size={size}", "cluster.address=inline"]
    status, _, err = alphatoken("run", *arguments(tmp_path / "r", policy, few_rows, *more))
    assert status == 0, err
    assert ("the rehearsal is one step, of 14 rows, and values all at the untouched model" in err) == warned


def test_other_columns_do_not_change_what_a_rehearsal_decides(alphatoken, tmp_path, policy, few_rows):
    found = []
    for name, more in (("paper", []), ("every", EVERY_COLUMN)):
        status, _, err = alphatoken("run", *arguments(tmp_path / name, policy, few_rows, *more))
        assert status == 0, err
        found.append(rows_of(tmp_path / name, "values"))
    for row, other in zip(*found, strict=True):
        assert row["id"] == other["id"] and row["kept"] == other["kept"]
        for name in (*COMPONENTS, "loss"):
            scale = np.abs(row[name]).max()
            np.testing.assert_allclose(other[name], row[name], rtol=1e-3, atol=1e-4 * scale, err_msg=name)
        inside = np.array(row["loss"]) != 0
        assert (np.array(other["information"])[inside] >= 0).all() and (np.array(other["entropy"])[inside] > 0).all()


def without_page(run: Path) -> dict[str, str]:
    """Hashes of all but the report, which shows the settings of the last command."""
    return {name: digest for name, digest in hashes(run).items() if name != "report/index.html"}


def test_the_same_command_again_skips_it_and_another_setting_is_refused(alphatoken, tmp_path, policy, few_rows):
    same = arguments(tmp_path / "r", policy, few_rows)
    assert alphatoken("run", *same)[0] == 0
    before = without_page(tmp_path / "r")
    (tmp_path / "r/values/rehearsal").mkdir()
    status, _, err = alphatoken("run", *same, "valuation.rehearsal.save_every=3", "cluster.workers=2")
    assert status == 0 and err.count("done already") == 4, err
    assert without_page(tmp_path / "r") == before and not (tmp_path / "r/values/rehearsal").exists()
    status, _, err = alphatoken("run", *same, "valuation.rehearsal.refresh=2")
    assert status == 2 and "valuation.rehearsal.refresh was 1, now 2" in err
    status, _, err = alphatoken("run", *same, "valuation.schedule=static", "mask.score=paper")
    assert status == 2 and "run.overwrite=anchor" in err
    status, _, err = alphatoken("value", *same, "valuation.schedule=static")
    assert status == 2 and "run.overwrite=anchor" in err
    status, _, err = alphatoken("mask", f"run.dir={tmp_path / 'r'}", "mask.rho=0.3", "mask.name=m")
    assert status == 2 and "mask.rho=0.3: a rehearsal decides with rho=0.5" in err
    for wrong in ("mask.rule=weight", "mask.score=loss", "mask.score=random"):
        status, _, err = alphatoken("mask", f"run.dir={tmp_path / 'r'}", wrong, "mask.name=m")
        assert status == 2 and f"{wrong}: a rehearsal decides with" in err and len(err.strip().splitlines()) == 1
    status, out, err = alphatoken(
        "mask", f"run.dir={tmp_path / 'r'}", "mask.name=m", "mask.always_keep=[]", "mask.min_kept=0"
    )
    assert status == 0 and "mask.rho=" not in out, err
    kept = [row["kept"] for row in rows_of(tmp_path / "r", "values")]
    assert [[label != -100 for label in row["labels"]] for row in rows_of(tmp_path / "r", "masks/m/data")] == kept


def test_what_does_not_go_together_is_said_before_anything_starts(alphatoken, tmp_path, policy, few_rows, pairs_file):
    wrong = ["anchor.precondition=kfac", "anchor.drift=warmup", "mask.rule=positive", "valuation.rehearsal.rho=0"]
    wrong += ["valuation.rehearsal.refresh=0"]
    status, _, err = alphatoken("run", *arguments(tmp_path / "r", policy, few_rows, *wrong))
    assert status == 2 and all(each in err for each in wrong) and len(err.strip().splitlines()) == len(wrong)
    status, _, err = alphatoken("run", *arguments(tmp_path / "r", policy, few_rows, "valuation.scores=[loss]"))
    assert status == 2 and "add paper to valuation.scores" in err and len(err.strip().splitlines()) == 1
    more = "valuation.reference_loss=true"
    status, _, err = alphatoken("run", *arguments(tmp_path / "r", policy, few_rows, more))
    assert status == 2 and f"{more}: a rehearsal has none" in err and len(err.strip().splitlines()) == 1
    for more in ([], ["data.format=preference"]):
        status, _, err = alphatoken("run", *arguments(tmp_path / "r", policy, pairs_file, *more))
        assert status == 2 and "not available for preference pairs" in err.strip().splitlines()[-1]
    assert not (tmp_path / "r/prepared").exists()


def test_a_plan_counts_the_rehearsal(alphatoken, tmp_path, policy, train_file):
    plans = []
    for schedule in ("rehearsal", "static"):
        more = [f"valuation.schedule={schedule}", "valuation.rehearsal.refresh=3"]
        status, out, err = alphatoken("plan", "--json", *arguments(tmp_path / "r", policy, train_file, *more))
        assert status == 0, err
        plans.append(json.loads(out))
    assert plans[0]["model"]["drift"] == "rehearsal" and plans[1]["model"]["drift"] == "warmup"
    assert plans[0]["flops"]["value"]["flops"] > 1.2 * plans[1]["flops"]["value"]["flops"]
    assert plans[0]["flops"]["anchor"]["warmup"] == 0
