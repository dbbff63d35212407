"""The house as it is built: what each folder imports, read off the source. Imports go down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the top floor down: a folder imports from the floors below it and from itself.
FLOORS = (
    "jobs", "plan", "report", "trial", "trainers", "mask", "value", "anchor", "prepare", "cluster", "run", "settings", "maths",
    "data_schemas",
)  # fmt: skip
BESIDE_THE_MATHS = ("pipeline/dpo.py",)
LONGEST = 400  # lines


def files() -> list[Path]:
    """Every Python file of the package that is code."""
    return sorted(path for part in ("jobs", "pipeline", "data_schemas") for path in (ROOT / part).rglob("*.py"))


def floor_of(parts: tuple[str, ...]) -> str | None:
    """The floor of a path or module below alphatoken/, None for pipeline itself."""
    if "/".join(parts) in BESIDE_THE_MATHS or f"{'/'.join(parts)}.py" in BESIDE_THE_MATHS:
        return "maths"
    if parts[0] == "pipeline":
        return parts[1].removesuffix(".py") if len(parts) > 1 and parts[1] != "__init__.py" else None
    return parts[0]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of a file, wherever it stands; ``from a import b`` may mean a.b, and is both."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: a relative import"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def arrows() -> Iterator[tuple[str, str, str]]:
    """(floor, floor that it imports from, where) over all files."""
    for path in files():
        place = path.relative_to(ROOT)
        own = floor_of(place.parts)
        for module, line in imported(path):
            top, *rest = module.split(".")
            other = floor_of(tuple(rest)) if top == "alphatoken" and rest else None
            if own and other:
                yield own, other, f"{place}:{line}"


def test_every_folder_has_a_floor():
    found = {floor_of(path.relative_to(ROOT).parts) for path in files()} - {None}
    assert found == set(FLOORS)


def test_imports_go_down_only():
    upward = {
        f"{where}: {own} imports {other}"
        for own, other, where in arrows()
        if FLOORS.index(own) > FLOORS.index(other)  # also inside functions and under TYPE_CHECKING
    }
    assert not upward, "\n".join(sorted(upward))


def test_the_picture_is_seen():
    """Else the test above would pass on nothing."""
    picture = {(own, other) for own, other, _ in arrows() if own != other}
    assert {
        ("jobs", "plan"),
        ("plan", "value"),
        ("value", "anchor"),
        ("anchor", "cluster"),
        ("cluster", "run"),
    } <= picture
    assert len(picture) > 40


def test_each_external_framework_has_its_floors():
    allowed = {"hydra": {"jobs"}, "omegaconf": {"jobs"}, "ray": {"jobs", "cluster"}}
    wrong = {
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files()
        for module, line in imported(path)
        if floor_of(path.relative_to(ROOT).parts) not in allowed.get(module.split(".")[0], set(FLOORS) | {None})
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_data_schemas_import_pyarrow_alone():
    modules = {m for path in files() if path.is_relative_to(ROOT / "data_schemas") for m, _ in imported(path)}
    foreign = {module.split(".")[0] for module in modules} - {"alphatoken", "pyarrow", "collections", "__future__"}
    assert not foreign


def test_nothing_imports_the_parts_by_their_names_in_the_repository():
    """Installed they are alphatoken.pipeline and so on; `import pipeline` would work here and nowhere else."""
    parts = {"pipeline", "jobs", "conf", "data_schemas"}
    everywhere = [*files(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    wrong = {
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in everywhere
        for module, line in imported(path)
        if module.split(".")[0] in parts
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_no_file_needs_a_table_of_contents():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    too_long = {place: lines for place, lines in lengths.items() if lines > LONGEST}
    assert not too_long
