"""What goes along with a submitted job: measured on Ray's own packing of the same directory."""

import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

from alphatoken.jobs.packing import what_is_packed


def project(place: Path) -> None:
    """A working directory after a few runs: 1,000 bytes a file."""
    names = ["train.py", "data/train.jsonl", "data/[odd] name!/x.txt", "secret/key", "runs/a/run.json", "runs/a/values/part.parquet",
             "runs/deep/b/run.json", "runs/deep/notes.txt", ".git/HEAD", "env/pyvenv.cfg", "env/lib/x.py", "types/CACHEDIR.TAG",
             "types/y.json", ".cache/z", "src/__pycache__/m.pyc", "src/m.py", "data/[odd] name!/old/run.json"]  # fmt: skip
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x" * 1000)
    (place / ".gitignore").write_text("secret/\n")


SENT = {".gitignore", "train.py", "data/train.jsonl", "data/[odd] name!/x.txt", "runs/deep/notes.txt", "src/m.py"}


def test_runs_caches_and_environments_are_never_sent_and_the_size_is_said(tmp_path):
    work = tmp_path / "work"
    project(work)
    packed = what_is_packed(work)
    assert set(packed.left_out) == {
        ".cache", "data/[odd] name!/old", "env", "runs/a", "runs/deep/b", "types",
    }  # fmt: skip
    assert sum(packed.sizes.values()) == 1000 * (len(SENT) - 1) + len("secret/\n")
    assert (
        packed.told()[0].startswith("not sent: runs, caches and environments: .cache, ")
        and "3 more" in packed.told()[0]
    )
    assert "the working directory, 0.0 MB" in packed.told()[1]

    create_package(
        str(work), tmp_path / "package.zip", excludes=list(packed.excludes), include_gitignore=True, logger=None
    )
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == SENT
