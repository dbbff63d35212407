"""`plan --measure`: a real measurement, kept for the plans that it holds for; and what device-hours come to in money."""

import json

import pytest

from alphatoken.jobs.cli import main
from alphatoken.pipeline.plan import measure
from tests.conftest import SMALL

INLINE = [one for one in SMALL if not one.startswith("cluster.inline_below")]


@pytest.fixture
def plan(tmp_path, policy, train_file, monkeypatch, capfd):
    """plan(*more) -> the plan of a small run as JSON; (status, standard error) where it is refused."""
    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "SECONDS", 0.2)  # of each kind of pass; two batches at least
    own = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", "data.validation=5", *INLINE]

    def run(*more: str):
        status = main(["plan", *own, *more, "--json"])
        out, err = capfd.readouterr()
        return json.loads(out) if status == 0 else (status, err)

    return run


def test_a_measurement_is_kept_for_the_plans_that_it_holds_for(plan, tmp_path):
    before = plan()
    assert "seconds_here" not in before and not (tmp_path / "cache/calibrations").exists()
    made = plan("--measure")
    assert set(made["calibration"]["rates"]) == {"value", "gradient", "fisher"}
    assert all(rate > 0 for rate in made["calibration"]["rates"].values())
    seconds, flops = made["seconds_here"], made["flops"]
    assert set(seconds) == {"prepare", "anchor", "value", "total"}
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    load, rates = made["calibration"]["load"], made["calibration"]["rates"]
    assert seconds["value"] == pytest.approx(load + flops["value"]["flops"] / rates["value"])
    gradient = flops["anchor"]["flops"] - flops["anchor"]["fisher"]
    expected = 2 * load + gradient / rates["gradient"] + flops["anchor"]["fisher"] / rates["fisher"]
    assert seconds["anchor"] == pytest.approx(expected)
    assert made["device_hours"]["the CPU of this machine"] == pytest.approx(seconds["total"] / 3600)
    later = plan()
    assert later["calibration"] == made["calibration"] and later["seconds_here"] == seconds
    assert not (tmp_path / "r").exists(), "the run directory is not touched"
    for other in ("valuation.scores=[loss]", "valuation.layers=1", "cluster.cpus_per_worker=2"):
        assert "seconds_here" not in plan(other), f"measured for something else than {other}"
    (file,) = (tmp_path / "cache/calibrations").iterdir()
    file.write_text(file.read_text()[:40])
    assert "seconds_here" not in plan(), "a damaged one is none"


def test_a_run_without_directions_is_measured_by_its_value_pass_alone(plan):
    made = plan("--measure", "valuation.scores=[loss,entropy]", "mask.score=loss")
    assert set(made["calibration"]["rates"]) == {"value"} and set(made["seconds_here"]) == {"prepare", "value", "total"}


def test_hours_of_a_billion_tokens_are_those_of_the_value_stage(plan):
    found = plan()
    each = found["flops"]["value"]["flops"] / found["data"]["tokens"]
    assert found["per_billion_tokens"]["NVIDIA A100"] == pytest.approx(each * 1e9 / (312e12 * 0.35) / 3600)
    assert "price" not in found


def test_a_price_turns_hours_into_money(plan):
    found = plan("plan.price=2")
    for name, one in found["price"].items():
        assert one["run"] == pytest.approx(2 * found["device_hours"][name])
        assert one["per_billion_tokens"] == pytest.approx(2 * found["per_billion_tokens"][name])
    assert set(found["price"]) == set(found["per_billion_tokens"])
    apart = plan("plan.price={h100: 3, 4090: 0.5}")["price"]
    assert {name: one["per_hour"] for name, one in apart.items()} == {"NVIDIA H100 SXM": 3, "NVIDIA RTX 4090": 0.5}


@pytest.mark.parametrize(
    ("price", "said"),
    [
        ("-1", "plan.price=-1: must be a number, 0 or more"), ("much", "plan.price=much: must be a number"),
        ("{A100: free}", "plan.price.A100=free: must be a number"), ("{B200: 3}", "plan.price.B200: is no part of a device"),
        ("true", "plan.price=True: must be a number"),
    ],
)  # fmt: skip
def test_prices_that_cannot_be(plan, price, said):
    status, err = plan(f"plan.price={price}")
    assert status == 2 and said in " ".join(err.split())
