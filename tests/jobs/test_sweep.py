"""Sweeps: every point under its own name, one process, no model for masks; failures named; upstream work shared."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alphatoken.data_schemas import BRANCHES
from alphatoken.jobs.points import expand, point_name
from alphatoken.jobs.sweep import sweep_points
from alphatoken.pipeline.mask.comparison import MaskPlace, compare, contributions
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.storage import Storage
from tests.conftest import SMALL
from tests.mask.synthetic_run import masks, write_run

NINE = ["mask.score=paper", "mask.rho=0.3,0.5,0.7", "mask.stability_weight=0,0.5,1.5"]


def test_points_are_hydras_product_with_the_last_key_fastest():
    points = expand(["mask.rho=range(0.25,1,0.25)", "mask=choice(half,paper)", "run.seed=3"])
    assert [p.name for p in points][:3] == ["rho-0.25_mask-half", "rho-0.25_mask-paper", "rho-0.5_mask-half"]
    assert len(points) == 6 and all("run.seed=3" in p.overrides for p in points)
    assert [p.name for p in expand(["mask=glob(*)"])] == [
        f"mask-{name}" for name in ("full", "half", "information", "noise", "paper", "random")
    ]  # fmt: skip
    for wrong in (["mask.rho=0.5"], ["mask.rho=interval(0,1)"], ["mask.rho=0.5,"]):
        with pytest.raises(SettingsWrong):
            expand(wrong)


def test_names_are_directory_names_and_differ():
    points = expand(["mask.always_keep=[eos],['<a b>'],['<a=b>']"])
    names = {point_name(p.swept) for p in points}
    assert len(names) == 3 and all(c.isalnum() or c in "._+-" for name in names for c in name)


def test_nine_masks_in_one_process_without_torch_or_ray(tmp_path):
    storage, _, _ = write_run(tmp_path)
    command = "import sys; from alphatoken.jobs.cli import main; status = main(sys.argv[1:]); "
    command += "print({'torch', 'ray', 'transformers'} & set(sys.modules)); sys.exit(status)"
    arguments = ["mask", "-m", f"run.dir={tmp_path}", *NINE]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    names = {path.name for path in (tmp_path / "masks").iterdir()}
    assert names == {f"rho-{r}_stability_weight-{w}" for r in ("0.3", "0.5", "0.7") for w in ("0", "0.5", "1.5")}
    assert all(name in done.stdout for name in names)
    for name in names:
        settings = json.loads((tmp_path / f"masks/{name}/summary.json").read_text())["settings"]
        assert name == f"rho-{settings['rho']:g}_stability_weight-{settings['stability_weight']:g}"


def test_agreement_and_contributions_are_those_of_plain_sets_and_means(alphatoken, tmp_path):
    storage, _, _ = write_run(tmp_path)
    assert alphatoken("mask", "-m", f"run.dir={tmp_path}", "mask.score=paper", "mask.rho=0.3,0.7")[0] == 0
    first, second = MaskPlace(storage, "rho-0.3"), MaskPlace(storage, "rho-0.7")
    kept = [
        {
            (r, t)
            for r, row in enumerate(masks(storage, m.name))
            for t, label in enumerate(row["labels"])
            if label != -100
        }
        for m in (first, second)
    ]
    same, other = compare(first, [first, second])
    assert same.agreement == 1.0
    assert other.agreement == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    assert sum(other.contributions.values()) == pytest.approx(1.0)
    values = storage.read_json("masks/rho-0.7/summary.json")["columns"]["value"]
    direct = storage.read_json("masks/rho-0.7/summary.json")["columns"]["adaptation_direct"]
    share = (direct["mean_kept"] - direct["mean_masked"]) / (values["mean_kept"] - values["mean_masked"])
    assert other.contributions["adaptation_direct"] == pytest.approx(share, rel=1e-4)


def test_a_failing_point_is_named_and_does_not_stop_the_others(alphatoken, tmp_path):
    write_run(tmp_path)
    status, _, err = alphatoken(
        "mask", "-m", f"run.dir={tmp_path}", "mask.rho=0.3,1.5,0.7", "mask.always_keep=[eos],[999]"
    )
    assert status == 1
    last = err.strip().splitlines()[-1]
    assert "4 of 6 points failed" in last and "rho-1.5" in last
    assert {p.name for p in (tmp_path / "masks").iterdir() if (p / "summary.json").exists()} == {
        name.name for name in (tmp_path / "masks").iterdir() if "eos" in name.name
    }
    assert alphatoken("mask", "-m", f"run.dir={tmp_path}", "mask.rho=2,3")[0] == 2
    status, _, err = alphatoken("mask", "-m", f"run.dir={tmp_path}", "mask.rho=0.4,0.6", "mask.name=one,one")
    assert status == 2 and "mask.name" in err


def test_what_masks_of_a_sweep_share_is_said_once_with_their_names(alphatoken, tmp_path):
    storage, *_ = write_run(tmp_path)
    points = "mask.score=paper", "mask.min_kept=0", "mask.rho=0.1,0.3,0.5"
    status, _, err = alphatoken("mask", "-m", f"run.dir={tmp_path}", *points)
    only = {
        rho: storage.read_json(f"masks/rho-{rho}/summary.json")["rows_with_only_always_kept"] for rho in (0.1, 0.3, 0.5)
    }
    assert status == 0 and len(set(only.values())) == 3
    named = ", ".join(f"rho-{rho} ({count} of 73)" for rho, count in only.items())
    (line,) = (line for line in err.splitlines() if "keep nothing but" in line)
    assert line.startswith(f"masks {named}: WARNING: examples keep nothing but the tokens of mask.always_keep")
    _, _, err = alphatoken("mask", f"run.dir={tmp_path}", *points[:2], "mask.rho=0.2", "mask.name=one")
    count = storage.read_json("masks/one/summary.json")["rows_with_only_always_kept"]
    assert f"\nmask one: WARNING: {count} of 73 examples keep nothing but the tokens of mask.always_keep" in err


def test_what_masks_of_several_runs_share_is_said_once(alphatoken, tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    status, _, err = alphatoken("mask", "-m", f"run.dir={tmp_path}/a,{tmp_path}/b", "mask.score=full")
    assert status == 0 and all((tmp_path / name / "masks/default/summary.json").is_file() for name in ("a", "b"))
    assert err.count("mask default: mask.score=full keeps every response token") == 1


def test_a_second_sweep_is_told_apart_by_the_mask_name_that_is_given(alphatoken, tmp_path):
    write_run(tmp_path)
    assert alphatoken("mask", "-m", f"run.dir={tmp_path}", "mask.rho=0.3,0.5")[0] == 0
    again = ["mask", "-m", f"run.dir={tmp_path}", "mask.rho=0.3,0.5", "mask.score=random"]
    status, _, err = alphatoken(*again)
    assert status == 1 and "choose another mask.name" in err
    assert f"--from {tmp_path}/masks/rho-0.3/summary.json starts from its own settings" in err
    status, out, err = alphatoken(*again, "mask.name=drawn")
    assert status == 0 and "drawn_rho-0.3" in out, err
    made = {p.parent.name for p in (tmp_path / "masks").glob("*/summary.json")}
    assert made == {"rho-0.3", "rho-0.5", "drawn_rho-0.3", "drawn_rho-0.5"}


def test_points_that_do_not_compose_leave_the_places_of_the_others(alphatoken, tmp_path):
    write_run(tmp_path)
    status, out, err = alphatoken("mask", "-m", f"run.dir={tmp_path}", "mask.score=random", "mask.rho=0.3,1.9")
    assert (
        status == 1
        and "mask.rho=1.9" in err
        and [place.name for place in (tmp_path / "masks").iterdir()] == ["rho-0.3"]
    )
    points, failures = sweep_points(["run.dir=runs/sw", "data.max_length=30,0"])
    assert [one.settings.run.dir for one in points] == ["runs/sw/max_length-30"] and len(failures) == 1


def test_masks_of_pairs_are_compared_branch_by_branch(alphatoken, preference_run):
    status, out, err = alphatoken("mask", "-m", f"run.dir={preference_run}", "mask.rho=0.25,1")
    assert status == 0, err
    whole = {b: MaskPlace(Storage(str(preference_run)), "rho-1", b) for b in BRANCHES}
    for branch in BRANCHES:
        quarter = MaskPlace(whole[branch].storage, "rho-0.25", branch)
        assert all(label in out for label in (quarter.label, whole[branch].label))
        (found,) = compare(whole["chosen"], [quarter])
        assert found.agreement == quarter.summary["kept_tokens"] / whole[branch].summary["kept_tokens"]
        assert found.kept_fraction == quarter.summary["kept_fraction"] < 1 == whole[branch].summary["kept_fraction"]


def test_upstream_points_get_directories_and_share_what_is_equal(alphatoken, tmp_path, policy, train_file):
    common = [
        f"run.dir={tmp_path}/s",
        f"model.policy={policy}",
        f"data.train={train_file}",
        *SMALL,
        "data.validation=5",
    ]
    status, out, err = alphatoken("run", "-m", *common, "anchor.warmup.steps=2,3", "mask.rho=0.3,0.6")
    assert status == 0, err
    one, two = tmp_path / "s/steps-2", tmp_path / "s/steps-3"
    for run in (one, two):
        assert {p.name for p in (run / "masks").iterdir()} == {"rho-0.3", "rho-0.6"}
    part = "prepared/part-00000-of-00004.parquet"
    assert (one / part).stat().st_ino == (two / part).stat().st_ino  # a link, not a second computation
    assert (one / "anchors/fisher.safetensors").read_bytes() == (two / "anchors/fisher.safetensors").read_bytes()
    assert "the Fisher is there already" in err and "shared: prepare" in err
    assert not pq.read_table(one / "values/part-00000-of-00004.parquet").equals(
        pq.read_table(two / "values/part-00000-of-00004.parquet")
    )
    assert "steps-3" in out

    # The same point by itself gives the same bytes: sharing changes nothing.
    alone = tmp_path / "alone"
    status, _, err = alphatoken("run", f"run.dir={alone}", *common[1:], "anchor.warmup.steps=3")
    assert status == 0, err
    for name in ("anchors/fisher.safetensors", "anchors/snapshot-00/stability.safetensors", part):
        assert (alone / name).read_bytes() == (two / name).read_bytes(), name

    # And a manifest replays exactly.
    status, _, err = alphatoken("run", "--from", two / "run.json", f"run.dir={tmp_path}/replay")
    assert status == 0, err
    values = "values/part-00002-of-00004.parquet"
    assert (tmp_path / "replay" / values).read_bytes() == (two / values).read_bytes()
    assert alphatoken("mask", "--from", two / "run.json", "mask=half")[0] == 2
    assert alphatoken("mask", "--from", tmp_path / "nowhere.json")[0] == 2


def test_points_of_the_engine_and_of_the_model_share_what_does_not_depend_on_them(
    alphatoken, tmp_path, policy, reference, train_file
):
    common = [f"data.train={train_file}", *SMALL, "data.validation=5", "anchor.warmup.steps=2"]
    sweep = ["valuation.layers=1,2", "valuation.window=4,9"]
    status, out, err = alphatoken("run", "-m", f"run.dir={tmp_path}/e", f"model.policy={policy}", *common, *sweep)
    assert status == 0, err
    runs = {(k, w): tmp_path / f"e/layers-{k}_window-{w}" for k in (1, 2) for w in (4, 9)}

    def links(name: str) -> list[int]:
        return [(run / name).stat().st_ino for run in runs.values()]

    part = "part-00000-of-00004.parquet"
    assert len(set(links(f"prepared/{part}"))) == 1
    one, other, *deeper = links("anchors/snapshot-00/adaptation.safetensors")
    assert one == other != deeper[0] == deeper[1]
    assert len({(run / f"values/{part}").read_bytes() for run in runs.values()}) == 4

    models = f"model.policy={policy},{reference}"
    status, out, err = alphatoken(
        "run", "-m", f"run.dir={tmp_path}/m", models, *common, "valuation.scores=[loss]", "mask.score=loss"
    )
    assert status == 0, err
    one, other = sorted(p for p in (tmp_path / "m").iterdir() if p.is_dir())
    assert (one / f"prepared/{part}").stat().st_ino == (other / f"prepared/{part}").stat().st_ino  # one tokenizer
    assert (one / f"values/{part}").read_bytes() != (other / f"values/{part}").read_bytes()


def test_what_is_said_next_of_a_mask_that_looks_at_no_rho(alphatoken, tmp_path):
    """Another rho would be the same mask once more."""
    write_run(tmp_path)
    for name, own in {"all": ["mask.score=full"], "low": ["mask.rule=positive", "mask.score=loss"]}.items():
        status, out, err = alphatoken("mask", f"run.dir={tmp_path}", *own, f"mask.name={name}")
        assert status == 0, err
        assert out.splitlines()[-1] == f"next:  alphatoken inspect {tmp_path} --mask {name}"


def test_the_mask_that_is_proposed_next_is_not_there_yet_and_its_command_can_be_typed(alphatoken, tmp_path):
    run = tmp_path / "my run"
    write_run(run)
    proposed = []
    _, out, _ = alphatoken("mask", f"run.dir='{run}'", "mask.always_keep=[3]", "mask.name=own")
    for _ in range(3):
        line = out.splitlines()[-1]
        typed = shlex.split(line.removeprefix("next:  "))
        proposed.append(typed[-1])
        status, out, err = alphatoken(*typed[1:])
        assert status == 0, err
    assert proposed == ["mask.name=rho-0.3", "mask.name=rho-0.7", "mask.name=rho-0.5"]
    assert out.splitlines()[-1] == f"next:  alphatoken inspect '{run}' --mask rho-0.5"


def test_a_summary_from_before_a_key_was_there_is_compared(alphatoken, tmp_path):
    """Masks of earlier versions stand beside new ones in a table and in the report."""
    write_run(tmp_path)
    assert alphatoken("mask", f"run.dir={tmp_path}", "mask.score=paper")[0] == 0
    summary = json.loads((tmp_path / "masks/default/summary.json").read_text())
    now = contributions(summary)
    for key in ("weights", "divide_by_gradient_norm"):
        del summary["settings"][key]
    assert now and contributions(summary) == now
