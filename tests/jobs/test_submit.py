"""Jobs for real: a Ray head with a dashboard and a second node, started here; submitted from another directory.

The cluster has the dependencies alone: what it runs of AlphaToken is what came with the job.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from alphatoken.jobs.cli import Arguments
from alphatoken.jobs.submit import _job_arguments
from alphatoken.pipeline.settings import Settings
from tests.conftest import SMALL, chat_row, write_rows

ROOT = Path(__file__).parents[2]
SECONDS = 240

START = """
import sys
from ray.cluster_utils import Cluster
dashboard, first, second = map(int, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_host": "127.0.0.1",
    "dashboard_agent_listen_port": first})
cluster.add_node(num_cpus=1, dashboard_agent_listen_port=second)
cluster.wait_for_nodes()
print("ready", len(cluster.list_all_nodes()), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now: other Rays of this machine have the usual ones."""
    taken = [socket.socket() for _ in range(count)]
    try:
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
    finally:
        for one in taken:
            one.close()


# Read by every Python of the cluster when it starts: takes an editable install of this repository out of its reach.
WITHOUT_ALPHATOKEN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.path[:] = [place for place in sys.path if place != ROOT]
"""
# What a project's own files of our names hold: a job that imported one of them would fail.
RAISES = "raise RuntimeError('the project\\'s own module was imported')\n"


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **own}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that has the dependencies, and not AlphaToken."""
    place = tmp_path_factory.mktemp("bare")
    (place / "sitecustomize.py").write_text(f"ROOT = {str(ROOT)!r}\n{WITHOUT_ALPHATOKEN}")
    found = {**environment(), "PYTHONPATH": str(place)}
    code = [sys.executable, "-c", "import alphatoken"]
    asked = subprocess.run(code, env=found, cwd=place, capture_output=True, text=True)
    assert "No module named 'alphatoken'" in asked.stderr
    return found


@pytest.fixture(scope="module")
def dashboard(bare):
    """Address of the job API of a two-node cluster."""
    ports = free_ports(3)
    cluster = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, ports)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=bare, cwd=bare["PYTHONPATH"],
    )  # fmt: skip
    try:
        assert cluster.stdout is not None and cluster.stdout.readline().strip() == "ready 2"
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        cluster.communicate("", timeout=60)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A project with data, with something that .gitignore names, and with folders and files of our names."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("x")
    (tmp_path / ".gitignore").write_text("secret/\n")
    write_rows(tmp_path / "train.jsonl", [chat_row(i) for i in range(40)])
    write_rows(tmp_path / "secret/train.jsonl", [chat_row(i) for i in range(40)])
    for name in ("pipeline/__init__.py", "conf/__init__.py", "data_schemas/__init__.py", "jobs.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(RAISES)
    return tmp_path


def command_line(directory: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "alphatoken.jobs", *map(str, arguments)]
    return subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=SECONDS)


def test_a_job_runs_streams_its_log_and_returns_its_status(dashboard, elsewhere, policy):
    address = f"cluster.dashboard={dashboard}"
    common = ["run.dir=out", f"model.policy={policy}", *SMALL, "data.validation=5", address]
    done = command_line(elsewhere, "submit", "run", "data.train=train.jsonl", *common)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "value: started" in done.stdout and "masks:" in done.stdout
    stages = json.loads((elsewhere / "out/run.json").read_text())["stages"]
    assert all(stages[name]["state"] == "done" for name in ("prepare", "anchor", "value", "mask/default"))

    again = command_line(elsewhere, "submit", "run", "data.train=train.jsonl", *common)
    assert again.returncode == 0 and again.stdout.count("done already") == 4
    assert "not sent: runs, caches and environments: out" in again.stderr  # which holds the run by now
    assert "sent: the working directory, 0." in again.stderr

    missing = ["prepare", "data.train=secret/train.jsonl", "run.dir=other", f"model.policy={policy}", address]
    ignored = command_line(elsewhere, "submit", *missing)
    assert ignored.returncode == 2 and "data.train=secret/train.jsonl: no such file" in ignored.stdout

    started = command_line(
        elsewhere, "submit", "run", "data.train=train.jsonl", "run.dir=third", *common[1:], "--no-wait"
    )
    job = started.stdout.strip()
    assert started.returncode == 0 and len(job.splitlines()) == 1
    assert job in command_line(elsewhere, "status", job, address).stdout
    assert "stopped" in command_line(elsewhere, "stop", job, address).stdout
    assert command_line(elsewhere, "status", job, address).returncode == 1


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (["--from", "runs/x/run.json"], ["--from", "{here}/runs/x/run.json"]),
        (["--from=runs/x/run.json", "--no-wait"], ["--from={here}/runs/x/run.json"]),
        (["--from", "s3://b/run.json", "mask.name=runs"], ["--from", "s3://b/run.json", "mask.name=runs"]),
    ],
)
def test_a_job_finds_the_file_of_from_wherever_it_runs(given, sent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = replace(Settings(), run=replace(Settings().run, dir="/shared/run"))
    found = _job_arguments(given, Arguments(("run.dir=/shared/run", "cluster.address=auto")), settings)
    assert found == [one.format(here=tmp_path) for one in sent]


def test_what_is_wrong_is_said_before_anything_is_submitted(alphatoken, tmp_path):
    status, _, err = alphatoken("submit", "mask", "mask.rho=2", "cluster.dashboard=http://127.0.0.1:9")
    assert status == 2 and "mask.rho" in err
    status, _, err = alphatoken("submit", "fly")
    assert status == 2 and "prepare" in err
    status, _, err = alphatoken("submit", "mask", "run.dir=/tmp/x", "cluster.dashboard=http://127.0.0.1:9")
    assert status == 1 and "cluster.dashboard" in err
