"""What a wheel of this repository holds, and that it works where others have folders of the same names."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[1]
PARTS = ("conf", "data_schemas", "jobs", "pipeline")
CONTENT = {".py", ".yaml", ".jinja", ".sh"}


def content() -> dict[str, Path]:
    """Where every file of the package has to be in a wheel -> where it is here."""
    found = {f"alphatoken/{path.name}": path for path in (ROOT / "alphatoken").iterdir() if path.is_file()}
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.suffix in CONTENT and "__pycache__" not in path.parts:
                found[f"alphatoken/{path.relative_to(ROOT)}"] = path
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing that an earlier build left behind gets in, and nothing is left here."""
    source = tmp_path_factory.mktemp("source")
    for part in ("alphatoken", *PARTS):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "made"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next((source / "made").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A directory with the wheel's content, as site-packages has it."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    return place


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A project that has folders and files of our names, which must not be imported."""
    project = tmp_path / "project"
    for name in ("pipeline/__init__.py", "conf/__init__.py", "data_schemas/__init__.py", "jobs.py"):
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise RuntimeError('the project\\'s own {name} was imported')\n")
    return project


def python(installed: Path, foreign: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=foreign, env=environment, capture_output=True, text=True, timeout=120)


def test_the_list_of_packages_is_that_of_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {str(Path(place).parent).replace("/", ".") for place in content()}
    assert sorted(settings["packages"]) == sorted(folders)


def test_a_wheel_holds_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"alphatoken"} and len(tops) == 2
    inside = {name for name in names if name.startswith("alphatoken/")}
    assert inside == set(content())
    assert "alphatoken/py.typed" in inside and "alphatoken/conf/config.yaml" in inside
    assert "alphatoken/pipeline/report/report.html.jinja" in inside


def test_the_front_door_opens_in_a_project_with_folders_of_our_names(installed, foreign):
    code = (
        "import sys, alphatoken; assert 'torch' not in sys.modules\n"
        "from alphatoken import Directions, TokenValuer\n"
        "import alphatoken.jobs.cli, alphatoken.pipeline.mask.stage as mask\n"
        "print(alphatoken.__file__, TokenValuer.__module__, mask.__file__)"
    )
    done = python(installed, foreign, "-c", code)
    assert done.returncode == 0, done.stderr
    place = installed / "alphatoken"
    assert done.stdout.split() == [
        f"{place}/__init__.py", "alphatoken.pipeline.maths.valuer", f"{place}/pipeline/mask/stage.py",
    ]  # fmt: skip


def test_the_command_line_works_there_too(installed, foreign):
    done = python(installed, foreign, "-m", "alphatoken.jobs", "--help")
    assert done.returncode == 0 and "prepare" in done.stdout, done.stderr
    done = python(installed, foreign, "-m", "alphatoken.jobs", "mask", "mask=paper", "run.dir=none")
    assert done.returncode == 1 and "there is no such directory" in done.stderr, (
        done.stderr
    )  # composed from the packaged files
    scripts = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "alphatoken = alphatoken.jobs.cli:main" in scripts.read_text()
