"""A cluster that wants a token, as every head of `ray start` does from Ray 2.60 on: what is missing is said."""

import subprocess
import sys

import pytest

from tests.jobs.test_submit import ROOT, environment, free_ports

TOKEN = "a-token-of-the-tests-0123456789abcdef"
START = """
import sys
from ray.cluster_utils import Cluster
dashboard, agent = map(int, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_host": "127.0.0.1",
    "dashboard_agent_listen_port": agent})
print("ready", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(scope="module")
def guarded():
    """(job API, address) of a one-node cluster with a token."""
    ports = free_ports(2)
    own = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    cluster = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, ports)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=own,
    )
    try:
        assert cluster.stdout is not None
        word, address = cluster.stdout.readline().split()
        assert word == "ready"
        yield f"http://127.0.0.1:{ports[0]}", address
    finally:
        cluster.communicate("", timeout=60)


def command(home, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """The command line of a user without a token of his own in ``home``."""
    own = {name: value for name, value in environment().items() if name not in AUTH}
    line = [sys.executable, "-m", "alphatoken.jobs", *arguments]
    return subprocess.run(
        line, cwd=ROOT, env={**own, "HOME": str(home), **more}, capture_output=True, text=True, timeout=120
    )


def test_what_is_missing_is_said_and_a_token_is_used(guarded, tmp_path):
    dashboard, address = guarded
    asked = ["status", "some-job", f"cluster.dashboard={dashboard}"]
    nothing = command(tmp_path, *asked)
    said = nothing.stderr.strip().splitlines()[-1]
    assert nothing.returncode == 1 and "wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in said, (
        said
    )

    mode = command(tmp_path, *asked, RAY_AUTH_MODE="token")
    said = mode.stderr.strip().splitlines()[-1]
    assert mode.returncode == 1 and "wants a token: set RAY_AUTH_TOKEN_PATH=FILE" in said, said

    wrong = command(tmp_path, *asked, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another-token-0123456789abcdef0123")
    said = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode == 1 and "does not take the token of RAY_AUTH_TOKEN" in said, said

    (tmp_path / "token").write_text(TOKEN)
    right = command(tmp_path, *asked, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert right.returncode == 1 and "job some-job: the cluster does not know it" in right.stderr, right.stderr


def test_a_run_that_joins_says_it_too(guarded, tmp_path, policy, train_file):
    _, address = guarded
    own = [f"model.policy={policy}", f"data.train={train_file}", f"run.dir={tmp_path}/run", "data.validation=4"]
    done = command(tmp_path, "prepare", *own, f"cluster.address={address}")
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"cluster.address={address}: Ray cannot be reached" in said, said
    assert "does it want a token (then set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH)" in said, said
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = command(tmp_path, "prepare", *own, f"cluster.address={address}", **right)
    assert done.returncode == 0 and "joining the Ray cluster at" in done.stderr, done.stderr
