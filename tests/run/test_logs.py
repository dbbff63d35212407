"""What a run tells beside its results: metrics.jsonl, the logs of its workers, trackers."""

import json
import sys
import types

import pytest

from tests.conftest import SMALL


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster, policy, train_file):
    from alphatoken.jobs.cli import main

    place = tmp_path_factory.mktemp("run")
    arguments = [f"run.dir={place}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=17"]
    assert main(["run", *arguments]) == 0
    return place


def test_metrics_and_worker_logs(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = {line["name"]: line for line in lines if line["event"] == "stage"}
    assert {"prepare", "anchor", "value", "mask/default"} <= set(stages)
    manifest = json.loads((run / "run.json").read_text())["stages"]
    assert stages["value"]["tokens"] == manifest["value"]["counts"]["tokens"]
    tasks = {line["name"]: line for line in lines if line["event"] == "task"}
    assert tasks["value"]["done"] == tasks["value"]["total"] and "2/2 shards" in tasks["value"]["note"]
    logs: dict[str, str] = {}
    for path in (run / "logs").iterdir():
        stage = path.name.split("-")[0]
        logs[stage] = logs.get(stage, "") + path.read_text()
    assert all(f"part-0000{i}-of-00002.parquet done in" in logs["value"] for i in range(2))
    assert "ready after" in logs["anchor"]


def test_trackers_get_the_numbers_through_their_own_packages(alphatoken, run, monkeypatch):
    status, _, err = alphatoken("mask", f"run.dir={run}", "run.tracker=wandb", "mask.name=w")
    assert status == 2 and "pip install wandb" in err
    seen = []
    fake = types.SimpleNamespace(
        start_run=lambda run_name: seen.append(("start", run_name)),
        log_params=lambda parameters: seen.append(("parameters", parameters["mask.rho"])),
        log_metrics=lambda metrics, step: seen.append(("metrics", metrics)),
        end_run=lambda state: seen.append(("end", state)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    assert alphatoken("mask", f"run.dir={run}", "run.tracker=mlflow", "mask.name=m")[0] == 0
    assert seen[0] == ("start", str(run)) and seen[1] == ("parameters", "0.5") and seen[-1] == ("end", "FINISHED")
    summary = json.loads((run / "masks/m/summary.json").read_text())
    sent = {key: value for kind, metrics in seen if kind == "metrics" for key, value in metrics.items()}
    assert sent["stage/mask/m/kept_tokens"] == summary["kept_tokens"]
