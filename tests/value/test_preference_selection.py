"""Other methods than AlphaToken's on preference pairs: the same files, scores without a sign, omega as ever."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import PREFERENCE, SMALL

BRANCHES = ("chosen", "rejected")


def part(run, name: str) -> list[dict]:
    return pq.read_table(sorted((run / name).glob("*-of-*.parquet"))[0]).to_pylist()


@pytest.mark.parametrize("method", ["loss", "random"])
def test_selectors_score_both_branches_and_omega_is_that_of_the_models(
    alphatoken, tmp_path, preference_run, policy, reference, pairs_file, method
):
    run = tmp_path / "r"
    arguments = [f"run.dir={run}", f"model.policy={policy}", f"model.reference={reference}", f"data.train={pairs_file}"]
    status, _, err = alphatoken("run", *arguments, *SMALL, *PREFERENCE, f"valuation.method={method}")
    assert status == 0, err
    assert not (run / "anchors").exists()
    # The same rows were held out, so that the parts are those of the other run.
    for found, other in zip(part(run, "values"), part(preference_run, "values"), strict=True):
        assert found["id"] == other["id"] and found["omega"] == pytest.approx(other["omega"], rel=1e-5)
        for branch in BRANCHES:
            score, loss = np.array(found[f"{branch}_adaptation_direct"]), np.array(other[f"{branch}_loss"])
            if method == "loss":
                np.testing.assert_allclose(score, -loss, rtol=1e-4, atol=1e-6)
            else:
                assert ((score > 0) == (loss > 0)).all() and score.max() < 1
            assert not any(found[f"{branch}_stability_direct"])
    for found, other in zip(part(run, "reference"), part(preference_run, "reference"), strict=True):
        assert found == other
    summary = json.loads((run / "masks/default/summary.json").read_text())
    assert summary["method"] == method and 0.5 <= summary["kept_fraction"] < 0.7
    assert f"the method `{method}`" in (run / "masks/default/README.md").read_text()
