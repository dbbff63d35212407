"""Notes of complete parts: what they speak of is not opened, and what was touched since is."""

import os

import pyarrow as pa
import pytest

from alphatoken.pipeline.run import noted
from alphatoken.pipeline.run.noted import Footer, Notes
from alphatoken.pipeline.run.storage import Storage

PARTS = [f"part-{index:05d}-of-00012.parquet" for index in range(12)]
TABLE = pa.table({"id": ["a", "b"]})


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Storage:
    """Twelve parts, of which all but the last are noted, in several notes."""
    monkeypatch.setattr(noted, "NOTED_FROM", 4)
    found = Storage(str(tmp_path))
    notes = Notes(found, "values", "own", len(PARTS))
    for part in PARTS:
        found.write_table(f"values/{part}", TABLE, "own", {"tokens": 7})
        if part != PARTS[-1]:
            notes.add(part, 2, {"tokens": 7})
    notes.write()
    return found


def spoil(storage: Storage, part: str, **times: int) -> None:
    """Other bytes of the same length; ``ns``: the times that the file says it was written at."""
    place = storage.path(f"values/{part}")
    size = os.path.getsize(place)
    with open(place, "wb") as file:
        file.write(b"x" * size)
    if times:
        os.utime(place, **times)


def test_parts_are_found_with_their_counts_and_those_that_are_noted_are_not_opened(storage, tmp_path):
    assert len(list((tmp_path / "values").glob(".complete-*.json"))) == 3
    whole = {part: Footer(2, {"tokens": 7}) for part in PARTS}
    assert storage.footers("values", PARTS, "own") == whole
    written = os.stat(storage.path(f"values/{PARTS[3]}")).st_mtime_ns
    spoil(storage, PARTS[3], ns=(written, written))
    assert storage.footers("values", PARTS, "own") == whole  # nobody looked
    written = os.stat(storage.path(f"values/{PARTS[-1]}")).st_mtime_ns
    spoil(storage, PARTS[-1], ns=(written, written))
    assert PARTS[-1] not in storage.footers("values", PARTS, "own")  # of which there is no note


def test_what_was_touched_since_is_opened(storage):
    spoil(storage, PARTS[0])
    cut = storage.path(f"values/{PARTS[1]}")
    written = os.stat(cut).st_mtime_ns
    os.truncate(cut, 100)
    os.utime(cut, ns=(written, written))
    storage.remove(f"values/{PARTS[2]}")
    storage.write_table(f"values/{PARTS[4]}", TABLE.slice(1), "own", {"tokens": 3})
    found = storage.footers("values", PARTS, "own")
    assert set(PARTS) - set(found) == set(PARTS[:3])
    assert found[PARTS[4]] == Footer(1, {"tokens": 3})


def test_notes_of_another_fingerprint_or_damaged_ones_are_no_notes(storage, tmp_path):
    assert storage.footers("values", PARTS, "other") == {}
    for note in (tmp_path / "values").glob(".complete-*.json"):
        note.write_text("{")
    assert len(storage.footers("values", PARTS, "own")) == len(PARTS)


def test_small_directories_have_no_notes(tmp_path):
    storage = Storage(str(tmp_path))
    notes = Notes(storage, "values", "own", 12)
    storage.write_table(f"values/{PARTS[0]}", TABLE, "own")
    notes.add(PARTS[0], 2, {})
    notes.write()
    assert os.listdir(tmp_path / "values") == [PARTS[0]]
