"""mask.weights and mask.require over the columns of several tasks, without a model."""

import json

import numpy as np
import pytest

from alphatoken.data_schemas import value_columns
from alphatoken.jobs.config import load
from alphatoken.jobs.mask import _overrides
from alphatoken.pipeline.mask.comparison import MaskPlace, contributions
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.settings import MaskSettings
from tests.mask.synthetic_run import EOS, mask, masks, write_run

TASKS = ("adaptation_code", "adaptation_maths", "retention")
COLUMNS = value_columns(("paper", "loss", "gradient_norm"), objectives=TASKS)
NAMES = {"code": "adaptation_code", "maths": "adaptation_maths", "retention": "retention", "adaptation": "adaptation"}


def flat(prepared, values, name):
    """(response tokens,) float64 of direct plus causal, or of one column."""
    found = []
    for row, own in zip(prepared, values, strict=True):
        inside = np.array(row["labels"]) != -100
        one = [np.array(own[c], np.float32) for c in ((name,) if name in own else (f"{name}_direct", f"{name}_causal"))]
        found.append(sum(column.astype(np.float64) for column in one)[inside])
    return np.concatenate(found)


def kept_of(storage, prepared, name="default"):
    rows = zip(masks(storage, name), prepared, strict=True)
    return np.concatenate([np.array(m["labels"])[np.array(p["labels"]) != -100] != -100 for m, p in rows])


def everything(prepared):
    return np.concatenate([np.array(r["labels"])[np.array(r["labels"]) != -100] for r in prepared])


@pytest.mark.parametrize("normalize", ["none", "rms"])
@pytest.mark.parametrize("weights", [{"code": 1, "maths": 0.5, "retention": 2.0}, {"adaptation": 1, "maths": 0}])
def test_the_score_is_the_weighed_sum_of_the_tasks_values(tmp_path, weights, normalize):
    storage, prepared, values = write_run(tmp_path, columns=COLUMNS)
    summary = mask(storage, weights=weights, normalize=normalize, rho=0.4, always_keep=[], min_kept=0)
    wanted = 0.0
    for name, weight in weights.items():
        own = flat(prepared, values, NAMES[name])
        wanted = wanted + weight * own / (np.sqrt(np.mean(own**2)) if normalize == "rms" else 1.0)
    wanted = wanted.astype(np.float32)
    assert summary["score"] == "paper" and summary["settings"]["stability_weight"] == 0.0
    assert set(summary["scales"]) == {NAMES[name] for name, weight in weights.items() if weight}
    threshold = np.sort(wanted)[::-1][int(np.ceil(0.4 * len(wanted))) - 1]
    close = np.abs(wanted - threshold) < 1e-5  # scales are added up in another order
    assert (kept_of(storage, prepared) == (wanted >= threshold))[~close].all() and (~close).sum() > 0.9 * len(wanted)
    assert contributions(MaskPlace(storage, "default").summary) is None


def test_a_token_that_harms_a_task_is_not_kept_whatever_its_value(tmp_path):
    storage, prepared, values = write_run(tmp_path, columns=COLUMNS)
    harmful = np.any([flat(prepared, values, name) < 0 for name in TASKS], axis=0)
    assert 0.5 < harmful.mean() < 1
    summary = mask(storage, require="all", score="paper", rho=0.5, always_keep=[], min_kept=0)
    kept = kept_of(storage, prepared)
    assert (
        kept.any() and not (kept & harmful).any() and summary["settings"]["require"] == ["code", "maths", "retention"]
    )
    assert summary["left_out"]["harmful"] == harmful.sum()
    assert any("mask.require=[code,maths,retention] leaves fewer tokens" in note for note in summary["notes"])
    one = mask(storage, require=["maths"], rule="positive", weights={"code": 1}, name="one", always_keep=[], min_kept=0)
    wanted = (flat(prepared, values, "adaptation_maths") >= 0) & (flat(prepared, values, "adaptation_code") > 0)
    assert (kept_of(storage, prepared, "one") == wanted).all() and one["kept_tokens"] == wanted.sum()
    mask(storage, require="all", score="random", name="eos", min_kept=0)
    always = everything(prepared) == EOS
    assert (kept_of(storage, prepared, "eos")[always]).all() and (always & harmful).any()


def test_no_harmful_token_is_kept_for_the_sake_of_min_kept(tmp_path):
    storage, prepared, values = write_run(
        tmp_path, columns=value_columns(("paper", "information", "loss"), objectives=TASKS)
    )
    harmful = np.any([flat(prepared, values, name) < 0 for name in TASKS], axis=0)
    summary = mask(storage, require="all", always_keep=[])  # information, a fifth of each answer at least
    assert summary["settings"]["min_kept"] == 0.2 and summary["left_out"]["harmful"] == harmful.sum()
    kept = kept_of(storage, prepared)
    assert kept.any() and not (kept & harmful).any()


def test_values_at_own_steps_are_weighed_where_they_are_there(tmp_path):
    columns = value_columns(("loss",), objectives=TASKS, unrolled=True)
    storage, prepared, values = write_run(tmp_path, columns=columns)
    summary = mask(
        storage, weights={"code": 1, "retention": 0.5}, require=["maths"], rule="positive", always_keep=[], min_kept=0
    )
    code, maths, general = (flat(prepared, values, f"{name}_unrolled") for name in TASKS)
    assert summary["score"] == "unrolled"
    assert (kept_of(storage, prepared) == (maths >= 0) & ((code + 0.5 * general).astype(np.float32) > 0)).all()
    with pytest.raises(SettingsWrong, match="there is no task english: .* valuation.schedule=own_step"):
        mask(storage, weights={"english": 1}, name="other")


def test_soft_weights_of_harmful_tokens_are_zero(tmp_path):
    storage, prepared, values = write_run(tmp_path, columns=COLUMNS)
    mask(storage, require=["retention"], rule="weight", weights={"code": 1, "retention": 1}, always_keep=[])
    rows = zip(masks(storage), prepared, strict=True)
    weights = np.concatenate([np.array(m["loss_weight"])[np.array(p["labels"]) != -100] for m, p in rows])
    harmful = flat(prepared, values, "retention") < 0
    assert (weights[harmful] == 0).all() and (weights[~harmful] > 0).any()
    summary = json.loads(storage.read_bytes("masks/default/summary.json"))
    said = f"the mean weight is {summary['loss_weight']['mean']:.3f}, not mask.rho=0.5"
    assert summary["loss_weight"]["mean"] < 0.4 and any(said in note for note in summary["notes"])


def test_what_is_not_there_is_refused_with_a_suggestion(tmp_path):
    storage, _, _ = write_run(tmp_path, columns=COLUMNS)

    def refused(**settings) -> list[str]:
        with pytest.raises(SettingsWrong) as error:
            mask(storage, **settings)
        return error.value.problems

    (line,) = refused(weights={"cod": 1})
    assert line.endswith("values/ has columns of code, maths, retention; did you mean code?")
    (line,) = refused(require=["english"])
    assert line.startswith("mask.require: there is no task english") and "data.validation={english: FILE, ...}" in line
    plain, _, _ = write_run(tmp_path / "plain")
    with pytest.raises(SettingsWrong, match="mask.require=all: values/ has no columns of tasks"):
        mask(plain, require="all")
    with pytest.raises(SettingsWrong, match="make them with data.retention=FILE"):
        mask(plain, weights={"retention": 1})
    with pytest.raises(RunFailed, match="mask.weights="):
        mask(storage, weights={"code": 1e300})
    assert "mask.weights" not in json.dumps(mask(storage, name="fine", score="paper")["notes"])


def test_what_to_type_next_is_read_back_as_it_was_asked_for():
    asked = MaskSettings(weights={"code": 1, "maths": 0.5}, require=["code"])
    read = load(_overrides(asked)).mask
    assert read.weights == asked.weights and read.require == asked.require
