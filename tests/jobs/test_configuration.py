"""Help, recipes and the files that operators copy."""

import json
import subprocess
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from alphatoken.jobs.cli import COMMANDS
from alphatoken.jobs.config import groups, keys, load
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.units import UNITS

JOBS = Path(__file__).parents[2] / "jobs"
GIVEN = {
    "paper_sft": ["model.policy=/p", "data.train=/t"],
    "paper_preference": ["model.policy=/p", "data.train=/t", "data.validation=/v"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_key_with_default_unit_and_meaning(alphatoken, command):
    status, out, _ = alphatoken(command, "--help")
    assert status == 0
    for name, (_, meaning) in keys(Settings).items():
        assert f"  {name}=" in out and meaning and meaning in out
    assert "data.max_length=2048   [tokens]" in out


def test_every_numeric_key_has_a_unit_and_no_other_key_is_named():
    known = keys(Settings)
    numeric = {
        name for name, (default, _) in known.items() if isinstance(default, int | float) and default is not False
    }
    assert numeric <= set(UNITS), "add the unit to pipeline/settings/units.py"
    assert set(UNITS) <= set(known)


@pytest.mark.parametrize("recipe", groups()["experiment"])
def test_recipes_compose_and_say_what_they_fit(recipe):
    load([f"experiment={recipe}", *GIVEN.get(recipe, [])])
    text = files("alphatoken.conf").joinpath(f"experiment/{recipe}.yaml").read_text()
    assert "GB" in text.split("\n\n")[0]


@pytest.mark.parametrize("recipe", GIVEN)
def test_a_recipe_asks_for_what_it_leaves_to_the_user(recipe):
    asked = [override.partition("=")[0] for override in GIVEN[recipe]]
    with pytest.raises(SettingsWrong) as error:
        load([f"experiment={recipe}"])
    assert error.value.problems == [f"missing: {', '.join(sorted(asked))}"]
    with pytest.raises(SettingsWrong, match=f"missing: {asked[-1]}$"):
        load([f"experiment={recipe}", *GIVEN[recipe][:-1]])


def test_what_is_left_open_is_what_the_tables_support():
    settings = load([])
    assert settings.valuation.estimator_for(pairs=False) == "information"
    assert settings.valuation.estimator_for(pairs=True) == "ghost"  # a pair's values have a sign
    for other in (
        "valuation=rehearsal",
        "valuation.schedule=rehearsal",
        "valuation.gradient_norm=true",
        "valuation=paper",
    ):
        assert load([other]).for_data(pairs=False).valuation.estimator == "ghost"
    assert load(["valuation.estimator=exact"]).for_data(pairs=True).valuation.estimator == "exact"
    for estimator, expected in (("information", (0.0, 1)), ("ghost", (1.5, 0)), ("exact", (1.5, 0)), (None, (1.5, 0))):
        mask = settings.mask.for_values(estimator)
        assert (mask.stability_weight, mask.skip_first) == expected
    asked = load(["mask.stability_weight=2", "mask.skip_first=3"]).mask
    assert asked.for_values("information") == asked.for_values("ghost") == asked
    assert load(["anchor.drift=none"]) and load(["anchor.drift=none", "mask.stability_weight=0", "valuation=paper"])
    with pytest.raises(SettingsWrong, match="leaves no stability"):
        load(["anchor.drift=none", "valuation=paper"])


def test_the_papers_setting_is_the_papers():
    settings = load(["experiment=paper_sft", *GIVEN["paper_sft"]])
    assert (settings.valuation.layers, settings.valuation.window) == (3, 32)
    mask = settings.mask.for_values(settings.valuation.estimator_for(pairs=False))
    assert (mask.stability_weight, mask.skip_first, mask.rho, mask.batch_size) == (1.5, 0, 0.5, 64)
    assert (settings.data.validation, settings.anchor.fisher.prompts) == (32, 1000)


def test_the_cluster_launcher_file_follows_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    content = yaml.safe_load((JOBS / "ray-cluster.yaml").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "no_such_key": 1}, schema)
    assert content["head_node_type"] in content["available_node_types"]


def test_the_kuberay_manifest_is_a_rayjob_with_matching_containers():
    content = yaml.safe_load((JOBS / "kuberay-rayjob.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    spec = content["spec"]
    assert spec["entrypoint"].startswith("alphatoken run ") and "cluster.address=auto" in spec["entrypoint"]
    overrides = [word for word in spec["entrypoint"].split()[2:]]
    assert load(overrides).run.dir.startswith("s3://")
    pods = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    images = {c["image"] for pod in pods for c in pod["template"]["spec"]["containers"]}
    assert len(images) == 1 and len(pods) == 2
    assert all(isinstance(v, str) for pod in pods for v in pod["rayStartParams"].values())


def test_the_slurm_script_starts_ray_on_every_node_and_returns_the_stages_status(tmp_path):
    script = JOBS / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    log = tmp_path / "calls"
    stubs = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"',  # what remains is the command
        "hostname": "echo 10.0.0.1",
        "ray": f'echo "ray $*" >> {log}',
        # A stage outlives the start of the other nodes, which the script does not wait for.
        "alphatoken": f'until grep -q "start --address" {log}; do sleep 0.1; done; echo "alphatoken $*" >> {log}; exit 7',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", script, "run", "run.dir=/shared/a b"], env=environment, timeout=60)
    assert done.returncode == 7
    calls = log.read_text()
    assert "ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-cpus=8" in calls
    assert "ray start --address=10.0.0.1:6379" in calls
    assert "alphatoken run run.dir=/shared/a b cluster.address=10.0.0.1:6379" in calls
    assert subprocess.run(["bash", script], env=environment, capture_output=True).returncode == 2
