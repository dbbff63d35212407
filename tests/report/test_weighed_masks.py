"""The value that the report and `inspect` show of a mask by mask.weights is the one that the mask decided by."""

import numpy as np
import pytest

from alphatoken.pipeline.report.reading import Reading
from alphatoken.pipeline.report.shown_masks import shown_masks
from tests.mask.synthetic_run import mask, run_of, write_run
from tests.mask.test_objectives import COLUMNS, NAMES, flat

WEIGHTS = {"code": 1, "maths": 0.5, "retention": 2.0}


@pytest.mark.parametrize("normalize", ["none", "rms"])
def test_the_value_of_a_weighed_mask_is_the_weighed_sum(tmp_path, normalize):
    storage, prepared, values = write_run(tmp_path, columns=COLUMNS)
    mask(storage, weights=WEIGHTS, normalize=normalize)
    mask(storage, score="paper", name="paper")
    shown = shown_masks(run_of(storage), ["default", "paper"])
    assert shown[0].score == "value of default" and shown[0].score != shown[1].score
    found = [batch.branches[0].scores[shown[0].score] for batch in Reading(run_of(storage), shown).all()]
    wanted = 0.0
    for name, weight in WEIGHTS.items():
        own = flat(prepared, values, NAMES[name])
        wanted = wanted + weight * own / (np.sqrt(np.mean(own**2)) if normalize == "rms" else 1.0)
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-5, atol=1e-6)
