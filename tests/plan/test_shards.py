"""data.shard_examples=auto: about a minute of one worker, by model and rows alone, the same when a run goes on."""

import json
import re

import pytest

from alphatoken.pipeline.plan.shards import FEWEST, MOST, SECONDS, SHARDS
from tests.conftest import SMALL, chat_row
from tests.docs.pages import ROOT


def planned(alphatoken, *arguments: str) -> dict:
    status, out, err = alphatoken("plan", "--json", *arguments)
    assert status == 0, err
    return json.loads(out)


def measured_seconds_per_token() -> float:
    """Of the value stage over rows of the embedded example on a CPU, as docs/scaling.md has it of a run."""
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    ((seconds, tokens),) = re.findall(r"took ([\d.]+) s for the values of ([\d,]+) tokens", page)
    return float(seconds) / int(tokens.replace(",", ""))


def test_a_shard_of_the_embedded_example_takes_about_a_minute(alphatoken, tmp_path):
    """By what was measured, not by the rate that the code takes for granted: within a factor of four, since CPUs differ."""
    plan = planned(alphatoken, f"run.dir={tmp_path}/r")
    examples = -(-plan["data"]["train_examples"] // plan["data"]["shards"])
    assert FEWEST <= examples < MOST and plan["data"]["shards"] > 1
    tokens = plan["data"]["tokens"] / plan["data"]["shards"]
    assert SECONDS == 60 and 15 < tokens * measured_seconds_per_token() < 240
    other = planned(alphatoken, f"run.dir={tmp_path}/r", "valuation.layers=2", "valuation.scores=[information]")
    assert other["data"]["shards"] == plan["data"]["shards"], (
        "runs that differ in what is scored share what is prepared"
    )
    hours = plan["device_hours"]
    assert hours["the CPU of this machine"] > hours["NVIDIA H100 SXM"] > 0


def test_small_models_have_large_shards_and_a_run_keeps_what_it_was_begun_with(
    alphatoken, tmp_path, policy, train_file
):
    own = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", "data.validation=4"]
    assert planned(alphatoken, *own)["data"]["shards"] == 1
    same = [*own, *(one for one in SMALL if not one.startswith("data.shard"))]
    assert alphatoken("prepare", *same, "data.shard_examples=10")[0] == 0
    assert planned(alphatoken, *same)["data"]["shards"] == 4
    status, _, err = alphatoken("prepare", *same)
    assert status == 0 and "prepare: done already" in err, err


def test_large_data_has_few_files_whatever_a_row_costs(alphatoken, tmp_path):
    rows = [json.dumps({"messages": chat_row(n)["messages"]}) for n in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    plan = planned(alphatoken, f"run.dir={tmp_path}/r", f"data.train={tmp_path}/rows.jsonl")
    assert plan["data"]["train_examples"] > 18_000 and plan["data"]["shards"] <= SHARDS


@pytest.mark.parametrize("wrong", ["0", "some"])
def test_it_is_auto_or_a_number(alphatoken, tmp_path, wrong):
    status, _, err = alphatoken("plan", f"run.dir={tmp_path}/r", f"data.shard_examples={wrong}")
    assert status == 2 and f"data.shard_examples={wrong}: must be" in err
