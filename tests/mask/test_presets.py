"""The presets of conf/mask: they compose, and make the masks that their names say."""

import math

import numpy as np
import pytest
from rich.console import Console

from alphatoken.jobs.config import groups, load
from alphatoken.pipeline.mask.stage import make_mask
from alphatoken.pipeline.maths.uniform import uniform
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import MaskSettings
from tests.mask.synthetic_run import masks, write_run

# Name -> what differs from the defaults.
PRESETS = {
    "half": {},
    "paper": {"score": "paper", "stability_weight": 1.5, "skip_first": 0, "scope": "batch"},
    "information": {"score": "information", "stability_weight": 0.0},
    "noise": {
        "score": "information", "stability_weight": 0.0, "loss_weight": 1.0, "normalize": "rms",
        "rho": 0.7, "min_kept": 1,
    },
    "random": {"score": "random"},
    "full": {"score": "full"},
}  # fmt: skip


def test_every_preset_is_known_here():
    assert sorted(PRESETS) == groups()["mask"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_and_is_what_its_name_says(name):
    assert load([f"mask={name}"]).mask == MaskSettings(**PRESETS[name])
    assert load([f"mask={name}", "mask.rho=0.2"]).mask == MaskSettings(**{**PRESETS[name], "rho": 0.2})


def test_half_is_the_preset_of_a_run_that_names_none():
    assert load([]).mask == load(["mask=half"]).mask


def test_a_preset_that_does_not_exist_is_refused_with_the_choices():
    with pytest.raises(SettingsWrong) as error:
        load(["mask=surprise"])
    said = " ".join(error.value.problems)
    assert "mask=surprise" in said and all(name in said for name in PRESETS), said


def first_values(name: str, value: dict, inside: list[bool], scales: dict[str, float]) -> list[float]:
    """The preset's value of every response token, from its definition; minus infinity for the first of a response."""
    some = [t for t, i in enumerate(inside) if i]
    drawn = uniform(0, value["id"], len(inside)).tolist()
    made = {
        "half": lambda t: value["information"][t],
        "information": lambda t: value["information"][t],
        "noise": lambda t: value["information"][t] / scales["information"] - value["loss"][t] / scales["loss"],
        "random": lambda t: drawn[t],
        "full": lambda t: 0.0,
        "paper": lambda t: (
            value["adaptation_direct"][t]
            + value["adaptation_causal"][t]
            + 1.5 * (value["stability_direct"][t] + value["stability_causal"][t])
        ),
    }[name]
    skips = name in ("half", "information", "noise")
    return [-math.inf if skips and t == some[0] else float(np.float32(made(t))) for t in some]


@pytest.mark.parametrize("name", PRESETS)
def test_its_mask_keeps_the_highest_of_what_it_names(tmp_path, name):
    storage, prepared, values = write_run(tmp_path, (200,))
    settings = load([f"mask={name}", "mask.always_keep=[]", "mask.min_kept=0", "mask.skip_first_from=1"])
    make_mask(Run(storage, Manifest(storage), settings, Progress(Console(quiet=True))))
    inside = [[label != -100 for label in row["labels"]] for row in prepared]
    scales = {}
    for column in ("information", "loss"):
        some = [x for row, r in zip(values, inside, strict=True) for x, i in zip(row[column], r, strict=True) if i]
        scales[column] = float(np.sqrt(np.mean(np.square(some))))
    scored = [first_values(name, row, r, scales) for row, r in zip(values, inside, strict=True)]
    rho = {"noise": 0.7, "full": 1.0}.get(name, 0.5)
    groups_of = [range(i, min(i + 64, 200)) for i in range(0, 200, 64)] if name == "paper" else [range(200)]
    found = masks(storage)
    for group in groups_of:
        pool = sorted((v for row in group for v in scored[row]), reverse=True)
        border = pool[math.ceil(rho * len(pool) - 1e-9) - 1]
        for row in group:
            kept = [label != -100 for label, i in zip(found[row]["labels"], inside[row], strict=True) if i]
            assert kept == [v >= border and v > -math.inf for v in scored[row]]
