"""What a hand at the terminal meets: help, versions, suggestions, completion, the resolved configuration, log levels."""

import contextlib
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alphatoken.jobs.cli import main
from alphatoken.jobs.completion import SCRIPTS, script
from alphatoken.jobs.config import keys
from alphatoken.jobs.suggestion import COMMON, OWN_VALUE
from alphatoken.pipeline.settings import Settings
from tests.conftest import SMALL

ROOT = Path(__file__).parents[2]


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    """As the fixture ``alphatoken``, without a cluster."""
    from alphatoken.jobs.cli import main

    status = main(list(arguments))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_version_names_what_decides_the_numbers(capsys):
    status, out, _ = command(capsys, "--version")
    assert status == 0 and len(out.splitlines()) == 1
    assert out.startswith("alphatoken ") and "torch " in out and "transformers " in out


def test_help_is_short_and_one_group_can_be_asked_for(capsys):
    status, out, _ = command(capsys, "run", "--help")
    assert status == 0 and len(out.splitlines()) < 70 and "--help --all" in out
    assert set(COMMON) | set(OWN_VALUE.values()) <= set(keys(Settings)) and all(f"  {key}=" in out for key in COMMON)
    assert "anchor.unroll.orders" not in out
    status, out, _ = command(capsys, "mask", "--help", "mask.")
    shown = [line for line in out.splitlines() if line.startswith("  mask.")]
    assert status == 0 and len(shown) == sum(key.startswith("mask.") for key in keys(Settings))
    assert "data.train=" not in out and "mask=full | half" in out
    status, out, _ = command(capsys, "run", "--help", "anchor.unroll")
    assert status == 0 and "  anchor.unroll.orders=" in out and "anchor.drift" not in out
    status, _, err = command(capsys, "run", "--help", "rho")
    assert status == 2 and "did you mean mask.rho" in err and "groups: anchor, cluster" in err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("rho=0.3", "rho=0.3: no such key; did you mean mask.rho or"),
        ("policy=/m", "did you mean model.policy?"),
        ("train=/t", "did you mean data.train or trial.train or anchor.unroll.train?"),
        ("model=/m", "no such choice; choices: embedded; a value of your own is model.policy=/m"),
        ("data=/t.jsonl", "choices: embedded, embedded_preference; a value of your own is data.train=/t.jsonl"),
        ("mask.rhoo=1", "did you mean mask.rho?; keys of mask: score, rho, stability_weight"),
        ("anchor.fisher.nothing=1", "keys of anchor.fisher: prompts, max_new_tokens"),
        ("rhoo=1", "did you mean mask.rho"),
        ("train.jsonl", "not a setting: give key=value, such as data.train=train.jsonl"),
    ],
)  # fmt: skip
def test_what_may_have_been_meant_is_said(capsys, typed, said):
    status, out, err = command(capsys, "config", typed)
    assert status == 2 and out == "" and said in err, err
    assert len(err.strip().splitlines()) == 1


def test_commands_and_options_are_suggested_too(capsys):
    assert "did you mean report?" in command(capsys, "reprot")[2]
    assert "did you mean --from?" in command(capsys, "run", "--form=x")[2]
    assert "settings are given without dashes: mask.rho=0.3" in command(capsys, "run", "--mask.rho=0.3")[2]


@pytest.mark.parametrize("asked", ["--help", "run --help --all", "config"])
def test_a_reader_who_has_seen_enough_is_no_error(asked):
    with subprocess.Popen(
        [sys.executable, "-m", "alphatoken.jobs", *asked.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) in (0, 141)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nosuch.json", "there is no such file"),
        ("a-run", "give the run.json of a run"),
        ("a-run/", "give the run.json of a run"),
    ],
)
def test_what_from_wants_is_said(capsys, tmp_path, monkeypatch, place, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-run").mkdir()
    assert main(["config", "--from", place]) == 2 and said in capsys.readouterr().err


def test_the_resolved_configuration_is_printed(capsys):
    status, out, _ = command(capsys, "config", "mask=noise", "data.train=s3://me:secret-word@bucket/x", "run.seed=3")
    found = yaml.safe_load(out)
    assert status == 0 and found["run"]["seed"] == 3 and found["mask"]["loss_weight"] == 1.0
    assert found["anchor"]["warmup"]["steps"] == Settings().anchor.warmup.steps
    assert "secret-word" not in out
    assert command(capsys, "config", "mask.rho=2")[0] == 2


def completed(line: str) -> list[str]:
    """What bash would offer for ``line``, as it splits it by itself."""
    words = line.replace("=", " = ").split() + ([""] if line.endswith((" ", "=")) else [])
    state = f"COMP_LINE={line!r}; COMP_POINT={len(line)}; COMP_CWORD={len(words) - 1}; COMP_WORDS=({shlex.join(words)})"
    code = f"{script('bash')}\n{state}\n_alphatoken\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_bash_completes_commands_keys_choices_and_files(tmp_path):
    (tmp_path / "train.jsonl").touch()
    assert completed("alphatoken pre") == ["prepare"]
    assert completed("alphatoken run mask.rh") == ["mask.rho="]
    assert {"full", "half", "noise"} <= set(completed("alphatoken run mask="))
    assert completed("alphatoken run mask=no") == ["noise"]
    assert completed(f"alphatoken run data.train={tmp_path}/tr") == [f"{tmp_path}/train.jsonl"]
    assert completed("alphatoken inspect R --ch") == ["--changed"] and completed("alphatoken inspect R mask.rh") == []
    assert completed("alphatoken mask --cs") == ["--csv"] and completed("alphatoken mask --ch") == []
    assert "trial" in completed("alphatoken submit tri")


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_shell_has_a_script_with_every_word(capsys, shell):
    status, out, _ = command(capsys, "completion", shell)
    assert status == 0 and out == script(shell) and "@COMMANDS@" not in out and "@CASES@" not in out
    assert "mask.rho=" in out and "experiment=smoke" in out and "prepare" in out
    assert command(capsys, "completion", "tcsh")[0] == 2


def test_log_levels(alphatoken, tmp_path, policy, train_file):
    same = [f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=20"]
    status, out, err = alphatoken("prepare", f"run.dir={tmp_path}/quiet", *same, "log_level=warning")
    assert status == 0 and out == "" and "prepare: WARNING: 23 of 40 rows are held out" in err, err
    assert len(err.splitlines()) == 1, err
    assert alphatoken("config", "log_level=loud")[0] == 2


@pytest.mark.parametrize("asked", [["--help"], ["inspect", "--help"], ["mask", "--help"]])
def test_help_fits_a_terminal_of_eighty_columns(asked):
    driver, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    code = "import sys; from alphatoken.jobs.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", code, *asked], stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while read := os.read(driver, 65536):
            shown += read
    os.close(driver)
    assert child.wait(60) == 0
    lines = shown.decode().splitlines()
    assert len(lines) > 12 and max(map(len, lines)) <= 80
    if asked == ["--help"]:
        (trial,) = [i for i, line in enumerate(lines) if line.startswith("  trial  ")]
        assert lines[trial + 1].startswith(" " * 15) and lines[trial + 1].strip()[0].islower()
