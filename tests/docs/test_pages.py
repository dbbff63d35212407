"""The pages for users say what is there: commands, keys, modules, tests and links exist, and nothing is said twice."""

import importlib
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from alphatoken.jobs.cli import COMMANDS, parse
from alphatoken.jobs.config import groups, keys, load
from alphatoken.jobs.points import expand
from alphatoken.jobs.trial import of_the_run
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings
from tests.docs.pages import PAGES, ROOT, blocks, commands, name_of, prose, sections

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)
GENERATED = {"docs/models.md"}  # a table of sentences that recur
RUN_ELSEWHERE = {"docs/extending.md"}  # its score exists in a copy of the code alone


def checked(words: list[str]) -> None:
    """Raises SettingsWrong where `alphatoken` would refuse this command line before it starts."""
    name, *rest = words
    if name == "submit":
        name, *rest = rest
    command = COMMANDS[name]
    if not command.reads_settings:
        importlib.import_module(f"alphatoken.jobs.{command.module or name}").parser().parse_args(rest)
        return
    parsed = parse(name, [word for word in rest if word != "..."], command.options)
    overrides = parsed.overrides
    if name == "trial":
        of_the_run(overrides, None)
        overrides = tuple(word for word in overrides if word.startswith("mask."))  # a sweep
    sweeps = "--multirun" in parsed.flags or (name == "trial" and overrides)
    for point in [point.overrides for point in expand(overrides)] if sweeps else [overrides]:
        load(point)


@EVERY_PAGE
def test_every_command_of_a_page_is_one(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run is
    if name_of(page) in RUN_ELSEWHERE:
        return
    for words in commands(page.read_text(encoding="utf-8")):
        if words[:2] == ["docker", "run"]:
            words = words[words.index("alphatoken") :]
        if words[0] == "alphatoken":
            checked(words[1:])
        elif words[0] == "make":
            assert_made(words[1])


def assert_made(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_that_is_none_is_found():
    with pytest.raises(SettingsWrong, match="mask.roh"):
        checked(["run", "mask.roh=0.5"])
    with pytest.raises(SettingsWrong, match="--form"):
        checked(["run", "--form", "run.json"])
    with pytest.raises(KeyError):
        checked(["runn"])
    assert commands("```bash\nfor k in 1 2; do alphatoken run \\\n  'a=$k' b=$k  # c\ndone\n```\n") == [
        ["alphatoken", "run", "a=$k", "b=1"],
        ["alphatoken", "run", "a=$k", "b=2"],
    ]


@EVERY_PAGE
def test_every_key_that_a_page_names_is_one(page):
    if name_of(page) in RUN_ELSEWHERE:
        return
    known = keys(Settings)
    prefixes = {name[: end.start()] for name in known for end in re.finditer(r"\.|$", name)}
    tops = "|".join(sorted({name.partition(".")[0] for name in known}))
    wrong = set()
    for code in re.findall(r"`([^`\n]+)`", prose(page.read_text(encoding="utf-8"))):
        for name in re.findall(rf"(?<![\w/.])(?:{tops})\.[a-z_]+(?:\.[a-z_]+)*", code):
            if name not in prefixes and not name.endswith((".json", ".parquet", ".yaml")):
                wrong.add(name)
    assert not wrong


@EVERY_PAGE
def test_every_module_and_target_that_a_page_names_is_there(page):
    text = prose(page.read_text(encoding="utf-8"))
    for module, options in re.findall(r"`python -m (benchmarks[\w.]*)([^`]*)`", text.replace("\n", " ")):
        place = ROOT / module.replace(".", "/")
        files = [place.with_suffix(".py")] if place.with_suffix(".py").is_file() else [place / "__main__.py"]
        assert files[0].is_file(), module
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        for option in re.findall(r"--[a-z-]+", options):
            assert f'"{option}"' in source, f"{module} {option}"
    for target in set(re.findall(r"`make ([a-z-]+)`", text)):
        assert_made(target)


@EVERY_PAGE
def test_every_test_that_a_page_names_is_there(page):
    named = set(re.findall(r"::(test_\w+)", page.read_text(encoding="utf-8")))
    if named:
        there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
        assert not {name for name in named if f"def {name}(" not in there}


@EVERY_PAGE
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    text = prose(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            place = page.parent / file if file else page
            assert place.is_file(), target
            assert not anchor or anchor in sections(place.read_text(encoding="utf-8")), target


@EVERY_PAGE
def test_python_on_a_page_is_python(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            compile(block.text, name_of(page), "exec")


def sentences(text: str) -> set[str]:
    """Sentences and table cells that are long enough to be one's own words."""
    text = re.sub(r"^[-|#>*\s]+", "\n", prose(text), flags=re.MULTILINE)
    parts = re.split(r"(?<=[.:;?!])\s|\||\n\s*\n", text)
    return {said for part in parts if len(said := " ".join(part.split())) > 50}


def test_no_sentence_stands_twice():
    where = defaultdict(list)
    for page in PAGES:
        if name_of(page) not in GENERATED:
            for said in sentences(page.read_text(encoding="utf-8")):
                where[said].append(name_of(page))
    assert not {said: pages for said, pages in where.items() if len(pages) > 1}


def test_every_page_is_led_to_from_the_first_one_and_stands_in_the_navigation():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in navigation
        assert page.name == "index.md" or f"]({page.name})" in index


def test_every_group_of_masks_that_is_packaged_stands_on_the_page_of_masks():
    page = (ROOT / "docs" / "masks.md").read_text(encoding="utf-8")
    for preset in groups()["mask"]:
        assert re.search(rf"`(mask=)?{preset}`", page), preset


def test_the_image_gets_all_that_the_package_is_made_of():
    """The Dockerfile copies what a wheel is built from, as test_packaging builds one, and .dockerignore lets it in."""
    copied = set()
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY"):
            copied |= set(line.split()[1:-1])
    assert copied == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "alphatoken",
        "conf",
        "data_schemas",
        "jobs",
        "pipeline",
    }
    let_in = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in let_in if line.startswith("!")} == copied
    assert all(Path(ROOT / name).exists() for name in copied)
