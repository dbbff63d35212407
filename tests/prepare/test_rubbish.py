"""Readers fed with rubbish: every row in is a row used or a row in quarantine, and what is no file of rows is named."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphatoken.data_schemas import PREPARED, QUARANTINE
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare import sources as reading
from alphatoken.pipeline.prepare.sources import open_sources
from alphatoken.pipeline.prepare.worker import PrepareTask, PrepareWorker
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from tests.conftest import chat_row

VOCABULARY = 320


@pytest.fixture(scope="module")
def worker(tmp_path_factory, policy) -> PrepareWorker:
    return PrepareWorker(
        Storage(str(tmp_path_factory.mktemp("run"))), ModelSource(str(policy)), VOCABULARY, Settings(), preference=False
    )


def prepare(worker: PrepareWorker, *paths: Path) -> tuple[list[dict], list[dict]]:
    """Rows used and rows in quarantine, as they stand in the files; checks the books."""
    sources = open_sources("data.train", [str(p) for p in paths])
    total = sources.starts[-1]
    worker.storage.remove("prepared")
    worker.storage.remove("quarantine")
    counts, _ = worker(PrepareTask(sources.pieces(range(total)), "prepared/x", "quarantine/x", "f"), lambda units: None)
    used = worker.storage.read_table("prepared/x", PREPARED).to_pylist()
    rejected = []
    if worker.storage.exists("quarantine/x"):
        rejected = worker.storage.read_table("quarantine/x", QUARANTINE).to_pylist()
    assert len(used) + len(rejected) == total == counts["rows_used"] + counts["quarantined"]
    assert sorted([row["source"] for row in used] + [f"{row['file']}:{row['row']}" for row in rejected]) == sorted(
        f"{file.name}:{row}" for file in sources.files for row in range(len(file.rows))
    )
    for row in used:
        assert len(row["input_ids"]) == len(row["labels"]) and max(row["input_ids"]) < VOCABULARY
        assert row["labels"][0] == -100 and any(label != -100 for label in row["labels"])
    for row in rejected:
        assert row["reason"].partition(":")[0].isidentifier()
    return used, rejected


texts = st.text(st.characters(codec=None, categories=None), max_size=30)  # lone surrogates, NUL, right-to-left
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=12)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "root"])
messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": roles | values, "content": texts | values, "from": roles, "value": texts,
                                        "tool_calls": values}) | values,
    max_size=4,
)  # fmt: skip
ids = st.lists(st.integers(-2, VOCABULARY + 2) | st.integers() | values, max_size=6)
rows = st.fixed_dictionaries(
    {},
    optional={
        "messages": messages | values, "conversations": messages | values, "prompt": texts | messages | values,
        "completion": texts | messages | values, "response": texts | values, "instruction": texts | values,
        "input": texts | values, "output": texts | values, "input_ids": ids | values, "labels": ids | values,
        "system": texts | values, "tools": values, "id": values, "chosen": values, "rejected": values,
    },
)  # fmt: skip
anything = rows | values


def as_line(value) -> bytes:
    return json.dumps(value).encode()


@st.composite
def broken_lines(draw) -> bytes:
    """A line of JSON that was cut off, or into which other bytes have got."""
    line = draw(rows.map(as_line))
    cut = draw(st.integers(0, len(line)))
    return line[:cut] + draw(st.binary(max_size=5)).replace(b"\n", b"") + line[cut + draw(st.integers(0, 9)) :]


fuzz = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@fuzz
@given(lines=st.lists(anything.map(as_line) | broken_lines() | st.binary(max_size=30), max_size=6))
def test_lines_of_rubbish_are_counted(worker, tmp_path, lines):
    rows_in = [part for line in lines for part in line.split(b"\n") if part.strip()]
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join(lines))
    used, rejected = prepare(worker, file)
    assert len(used) + len(rejected) == len(rows_in)


columns = st.sampled_from(["prompt", "completion", "messages", "id", "input_ids", "labels", "instruction", "output"])
types = st.sampled_from([
    pa.string(), pa.int64(), pa.float32(), pa.list_(pa.int32()), pa.bool_(), pa.binary(), pa.timestamp("ns"),
    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
])  # fmt: skip
CELLS = {
    pa.string(): st.text(max_size=9), pa.int64(): st.integers(-(2**63), 2**63 - 1), pa.float32(): st.floats(width=32),
    pa.list_(pa.int32()): st.lists(st.integers(-1, VOCABULARY + 1) | st.none(), max_size=4), pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=5), pa.timestamp("ns"): st.integers(-(2**62), 2**62),
    types.elements[7]: st.lists(st.none() | st.fixed_dictionaries(
        {"role": st.none() | st.sampled_from(["user", "assistant"]), "content": st.none() | st.text(max_size=9)}
    ), max_size=3),
}  # fmt: skip


@st.composite
def tables(draw) -> pa.Table:
    count = draw(st.integers(0, 4))
    drawn = {}
    for name in draw(st.lists(columns, min_size=1, max_size=4, unique=True)):
        kind = draw(types)
        drawn[name] = pa.array(draw(st.lists(st.none() | CELLS[kind], min_size=count, max_size=count)), kind)
    return pa.table(drawn)


@settings(fuzz, max_examples=60)
@given(table=tables())
def test_typed_tables_of_any_columns_are_counted(worker, tmp_path, table):
    file = tmp_path / "x.parquet"
    pq.write_table(table, file)
    used, rejected = prepare(worker, file)
    assert len(used) + len(rejected) == table.num_rows


@settings(fuzz, max_examples=60)
@given(content=st.binary(max_size=200) | texts.map(lambda t: t.encode("utf-8", "surrogatepass")), kind=st.sampled_from(
    [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".csv.gz"]))  # fmt: skip
def test_files_of_rubbish_are_counted_or_named(worker, tmp_path, content, kind):
    file = tmp_path / f"x{kind}"
    file.write_bytes(content)
    try:
        prepare(worker, file)
    except SettingsWrong as error:
        assert str(file) in str(error)


@settings(fuzz, max_examples=25)
@given(where=st.floats(0, 1), damage=st.binary(min_size=1, max_size=40), cut=st.booleans())
def test_a_damaged_parquet_file_is_named_or_read_whole(worker, tmp_path, where, damage, cut):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist([chat_row(i) for i in range(8)]), whole, write_page_checksum=True)
    content = whole.read_bytes()
    place = int(where * (len(content) - 1))
    file = tmp_path / "x.parquet"
    file.write_bytes(content[:place] if cut else content[:place] + damage + content[place + len(damage) :])
    try:
        used, rejected = prepare(worker, file)
        assert len(used) + len(rejected) >= 0
    except SettingsWrong as error:
        assert str(file) in str(error)


def lines(path: Path, rows: Iterator | list) -> Path:
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else as_line(r) for r in rows))
    return path


def test_each_kind_of_bad_row_has_its_reason_and_good_ones_are_used(worker, tmp_path):
    end = "<|im_end|>"
    cases = [
        (b'{"messages": [', "broken_json"),
        (b'{"prompt": "a", "completion": "\xff\xfe"}', "broken_json"),
        (b'{"prompt": "a", "completion": "b\\ud800"}', "bad_unicode"),
        (b"[" * 100_000, "broken_json"),
        ({"prompt": "a", "completion": None}, "unknown_columns"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "wrong_type"),
        ({"messages": [None]}, "wrong_type"),
        ({"prompt": 3, "completion": "x"}, "wrong_type"),
        ({"input_ids": [1, 2], "labels": [-100, 2, 3]}, "lengths_differ"),
        ({"input_ids": [1, VOCABULARY], "labels": [-100, VOCABULARY]}, "outside_vocabulary"),
        ({"input_ids": [1, 2**40], "labels": [-100, 2**40]}, "outside_vocabulary"),
        ({"input_ids": [], "labels": []}, "no_response"),
        ({"prompt": "a", "completion": " \n"}, "empty_response"),
        ({"prompt": "", "completion": "no prompt at all"}, None),
        ({"prompt": "a", "completion": end}, None),  # a response of special tokens only
        ({"prompt": "a\x00b", "completion": "c\x00d"}, None),
        ({"prompt": "שלום", "completion": "مرحبا e\u0301\u0327 \u202edesrever"}, None),
        ({"prompt": "a", "completion": "x", "id": "same"}, None),
        ({"prompt": "a", "completion": "y", "id": "same"}, None),
        ({"prompt": "a", "completion": "word " * 100_000}, None),  # truncated
    ]
    used, rejected = prepare(worker, lines(tmp_path / "x.jsonl", [row for row, _ in cases]))
    reasons = {row["row"]: row["reason"].partition(":")[0] for row in rejected}
    assert reasons == {number: reason for number, (_, reason) in enumerate(cases) if reason}
    assert all(len(row["input_ids"]) <= 2048 for row in used)
    assert [row["id"] for row in used].count("same") == 2


def test_what_the_quarantine_keeps_of_a_huge_row_is_bounded(worker, tmp_path):
    _, (rejected,) = prepare(worker, lines(tmp_path / "x.jsonl", [{"other": "x" * (10 << 20)}]))
    assert len(rejected["raw"]) < (1 << 20) + 100 and str(10 << 20)[:4] in rejected["raw"][-40:]


def test_a_line_without_an_end_does_not_fill_the_memory(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 10_000)
    good = {"prompt": "a", "completion": "b"}
    file = lines(tmp_path / "x.jsonl", [good, b'{"prompt": "' + b"x" * 50_000 + b'"}', good])
    used, (rejected,) = prepare(worker, file)
    assert len(used) == 2 and rejected["reason"].startswith("too_long: a line of 50015 bytes") and rejected["row"] == 1


def test_one_bad_row_in_a_million_is_found_without_losing_another(worker, tmp_path):
    good = as_line({"input_ids": [1, 2], "labels": [-100, 2]})
    file, bad = tmp_path / "x.jsonl", 765_432
    file.write_bytes(b"\n".join([good] * bad + [b'{"input_ids": [1,'] + [good] * (1_000_000 - bad - 1)))
    sources = open_sources("data.train", str(file))
    assert sources.starts[-1] == 1_000_000
    near = range(bad - 500, bad + 500)  # the shard around it; the others are alike
    counts, _ = worker(PrepareTask(sources.pieces(near), "prepared/m", "quarantine/m", "f"), lambda units: None)
    (row,) = worker.storage.read_table("quarantine/m", QUARANTINE).to_pylist()
    assert counts["rows_used"] == 999 and row["row"] == bad and row["reason"].startswith("broken_json")


def test_empty_files_are_no_rows(worker, tmp_path):
    for name in ("a.jsonl", "b.csv", "c.json", "d.parquet"):
        (tmp_path / name).touch()
    with gzip.open(tmp_path / "e.jsonl.gz", "wb"):
        pass
    used, rejected = prepare(worker, *sorted(tmp_path.iterdir()))
    assert used == rejected == []


def test_broken_bytes_of_a_csv_file_reach_the_quarantine(worker, tmp_path):
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\na,good\nb,\xff\xfe\nc,d,e\n")
    used, rejected = prepare(worker, tmp_path / "x.csv")
    assert len(used) == 1
    assert [row["reason"].partition(":")[0] for row in rejected] == ["bad_unicode", "broken_csv"]


def test_links_do_not_lead_out_of_a_directory(tmp_path):
    (tmp_path / "secret").mkdir()
    lines(tmp_path / "secret" / "private.jsonl", [{"prompt": "a", "completion": "b"}])
    given = tmp_path / "given"
    given.mkdir()
    lines(given / "fine.jsonl", [{"prompt": "a", "completion": "b"}])
    os.symlink(given / "fine.jsonl", given / "inner.jsonl")
    assert len(open_sources("data.train", str(given)).files) == 2
    os.symlink(tmp_path / "secret", given / "directory")  # not followed
    assert len(open_sources("data.train", str(given)).files) == 2
    os.symlink(tmp_path / "secret" / "private.jsonl", given / "link.jsonl")
    for name in (given, f"{given}/*.jsonl"):
        with pytest.raises(SettingsWrong, match=r"link\.jsonl leads out of the directory"):
            open_sources("data.train", str(name))
    with pytest.raises(SettingsWrong, match="leads out"):
        open_sources("data.train", f"{given}/**/*.jsonl")


def test_a_column_of_a_type_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))}), file)
    with pytest.raises(SettingsWrong, match=r"x\.parquet: cannot be read as parquet: .*map<string, int32"):
        open_sources("data.train", str(file))
