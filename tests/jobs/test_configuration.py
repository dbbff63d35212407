"""Help, recipes and the files that operators copy."""

import json
import subprocess
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from alphatoken.data_schemas import SCORES
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
def test_all_help_shows_every_key_with_default_unit_and_meaning(alphatoken, command):
    status, out, _ = alphatoken(command, "--help", "--all")
    assert status == 0
    if not COMMANDS[command].reads_settings:
        assert "keys" not in out
        return
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
    assert settings.valuation.scores == list(SCORES) and settings.mask.score == "auto"
    assert settings.mask.resolved(False).score == "information"
    assert (
        settings.mask.resolved(True).score == "paper"
    )  # a pair's values have a sign, a rehearsal is the paper's own loop
    for score, expected in (
        ("information", (0.0, 1)), ("paper", (1.5, 0)), ("exact", (1.5, 0)), ("entropy", (0.0, 0)), ("loss", (0.0, 0)),
        ("excess_loss", (0.0, 0)), ("random", (0.0, 0)), ("full", (0.0, 0)),
    ):  # fmt: skip
        mask = load([f"mask.score={score}"]).mask.resolved(False)
        assert (mask.stability_weight, mask.skip_first) == expected
        assert mask.resolved(True) == mask  # settled
        assert load([f"mask.score={score}"]).mask.resolved(False, "none").stability_weight == 0
    asked = load(["mask.stability_weight=2", "mask.skip_first=3"]).mask
    for paired in (False, True):
        assert (asked.resolved(paired).stability_weight, asked.resolved(paired).skip_first) == (2, 3)
    assert load(["anchor.drift=none"]) and load(["anchor.drift=none", "mask=paper", "mask.stability_weight=0"])
    with pytest.raises(SettingsWrong, match="leaves no stability"):
        load(["anchor.drift=none", "mask=paper"])


@pytest.mark.parametrize("preset", groups()["mask"])
def test_presets_of_masks_say_what_their_comment_says(preset):
    mask = load([f"mask={preset}"]).mask.resolved(False)
    found = (mask.score, mask.rho, mask.stability_weight, mask.loss_weight, mask.skip_first, mask.scope, mask.normalize)
    assert (
        found
        == {
            "half": ("information", 0.5, 0.0, 0.0, 1, "dataset", "none"),
            "information": ("information", 0.5, 0.0, 0.0, 1, "dataset", "none"),
            "noise": ("information", 0.7, 0.0, 1.0, 1, "dataset", "rms"),
            "paper": ("paper", 0.5, 1.5, 0.0, 0, "batch", "none"),
            "random": ("random", 0.5, 0.0, 0.0, 0, "dataset", "none"),
            "full": ("full", 0.5, 0.0, 0.0, 0, "dataset", "none"),
        }[preset]
    )


TEXT_KEYS = [name for name, (default, _) in keys(Settings).items() if default is None or isinstance(default, str)]


@pytest.mark.parametrize("key", [*TEXT_KEYS, "model.policy", "data.validation"])
def test_no_key_takes_an_empty_text_as_an_unset_variable_of_a_shell_leaves_it(key):
    for nothing in ("", "' '"):
        with pytest.raises(SettingsWrong) as error:
            load([f"{key}={nothing}"])
        assert error.value.problems, key
        assert any(key in problem for problem in error.value.problems), error.value.problems


def test_an_empty_entry_of_a_list_is_refused_and_a_run_on_the_whole_disk_too():
    with pytest.raises(SettingsWrong, match="data.train has an empty entry .an unset variable of the shell"):
        load(["data.train=[a.jsonl,'']"])
    with pytest.raises(SettingsWrong, match="run.dir=/: is the whole disk"):
        load(["run.dir=/"])


def test_the_papers_setting_is_the_papers():
    settings = load(["experiment=paper_sft", *GIVEN["paper_sft"]])
    assert (settings.valuation.layers, settings.valuation.window) == (3, 32)
    mask = settings.mask.resolved(False)
    assert (mask.score, mask.stability_weight, mask.skip_first, mask.rho) == ("paper", 1.5, 0, 0.5)
    assert (mask.scope, mask.batch_size) == ("batch", 64) and "paper" in settings.valuation.scores
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


def test_the_kuberay_manifest_asks_for_a_token():
    cluster = yaml.safe_load((JOBS / "kuberay-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {
        "mode": "token"
    }  # of the CRD of KubeRay 1.5.1; none before Ray 2.52 knows a token


def test_the_launchers_nodes_have_the_users_token_and_ask_for_it():
    content = yaml.safe_load((JOBS / "ray-cluster.yaml").read_text())
    token = "~/.ray/auth_token"  # where Ray looks for it without being told
    assert content["file_mounts"][token] == token
    for when in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [line for line in content[when] if "ray start" in line]
        assert len(starts) == 1 and starts[0].startswith("RAY_AUTH_MODE=token ray start "), when


def test_the_slurm_script_starts_ray_on_every_node_and_returns_the_stages_status(tmp_path):
    script = JOBS / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    log = tmp_path / "calls"
    stubs = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"',  # what remains is the command
        "hostname": "echo 10.0.0.1",
        "ray": f'echo "ray $*" >> {log}; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> {log}.tokens',
        # A stage outlives the start of the other nodes, which the script does not wait for.
        "alphatoken": f'until grep -q "start --address" {log}; do sleep 0.1; done; echo "alphatoken $*" >> {log}; '
        f'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> {log}.tokens; exit 7',
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
    tokens = set(Path(f"{log}.tokens").read_text().splitlines())
    assert len(tokens) == 1, "the nodes have different tokens"
    mode, token = tokens.pop().split()
    assert mode == "token" and len(token) == 64
