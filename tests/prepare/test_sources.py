"""From files to rows: what is read is what lies there, and what is left out is said."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.prepare.sources import FORMATS, open_sources
from alphatoken.pipeline.run.failure import SettingsWrong
from tests.conftest import chat_row, write_rows
from tests.prepare.reading import WITH_TOOLS

ROWS = [{"prompt": "the quick", "completion": f" {word}"} for word in ("fox", "dog", "oak")]
END = "<|im_end|>"


def save(path, rows):
    """Rows in the format that the name of ``path`` says."""
    columns = list(rows[0])
    lines = {
        ".jsonl": lambda: "\n".join(json.dumps(row) for row in rows), ".json": lambda: json.dumps(rows),
        ".csv": lambda: "\n".join(",".join(row) for row in [columns, *[row.values() for row in rows]]),
        ".tsv": lambda: "\n".join("\t".join(row) for row in [columns, *[row.values() for row in rows]]),
    }  # fmt: skip
    suffix = next(s for s in path.suffixes[::-1] if s.lower() in FORMATS).lower()
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        text = lines[suffix]().encode()
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
        path.write_bytes(pack.get(path.suffix.lower(), bytes)(text))
    return path


def zstd(content: bytes) -> bytes:
    """In two frames, as tools that append leave them."""
    frames = []
    for part in (content[:40], content[40:]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        frames.append(sink.getvalue().to_pybytes())
    return b"".join(frames)


NAMES = [
    "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.gz", "x.tsv", "x.tsv.gz", "x.csv.xz", "x.json.zst", "x.JSONL",
    "x.Json", "x.TSV.GZ", "x.PARQUET", "x.Arrow", "x.CSV",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_compressed_files_tables_of_tabs_and_upper_case_are_read(reader, tmp_path, name):
    (tmp_path / "data").mkdir()
    file = save(tmp_path / "data" / name, ROWS)
    for given in (file, file.parent, f"{file.parent}/x*"):
        read = reader(given)
        assert [read.responses(row) for row in range(3)] == [[f" {word}{END}"] for word in ("fox", "dog", "oak")]


def test_files_of_a_directory_that_are_not_read_are_named_in_one_line(tmp_path):
    save(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "more").mkdir()
    for name in ("README.md", "rows.txt", "more/rows.zip", "x.parquet.gz", "y.yaml", ".gitattributes", ".hidden.jsonl"):
        (tmp_path / name).write_text("x")
    sources = open_sources("data.train", str(tmp_path))
    assert len(sources.files) == 1
    (line,) = sources.remarks
    assert line.startswith(
        f"data.train={tmp_path}: 6 files skipped: .hidden.jsonl, README.md, more/rows.zip, rows.txt, ... (read are .arrow"
    )
    assert not open_sources("data.train", f"{tmp_path}/train.jsonl").remarks


def test_of_a_directory_runs_hidden_places_cards_and_locks_are_left_out_and_named(tmp_path):
    """As the working directory of a user is, where an unset variable of a shell once read all of it."""
    save(tmp_path / "train.jsonl", ROWS)
    save(tmp_path / "summary.json", ROWS)  # without a card beside it, it is somebody's data
    for name in ("runs/a/run.json", "runs/a/prepared/part.jsonl", "runs/a/.lock/b.json", "runs/b/run.json", ".cache/x.jsonl",
                 ".cache/deep/y.json", "mask/README.md", "mask/summary.json", "saved/state.json", "saved/dataset_info.json",
                 "train.jsonl.lock"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    for given in (tmp_path, f"{tmp_path}/**/*.json*"):
        sources = open_sources("data.train", str(given))
        assert [os.path.relpath(file.name, tmp_path) for file in sources.files] == ["summary.json", "train.jsonl"]
        assert f"data.train={given}: 2 run directories skipped: runs/a, runs/b" in sources.remarks
    said = open_sources("data.train", str(tmp_path)).remarks
    assert f"data.train={tmp_path}: 1 hidden directory skipped: .cache" in said
    (others,) = [line for line in said if "files skipped" in line]
    assert (
        "5 files skipped: mask/README.md, mask/summary.json, saved/dataset_info.json, saved/state.json, ..." in others
    )
    with pytest.raises(SettingsWrong, match=r"holds no file of .*\(1 run directory skipped: \.\)"):
        open_sources("data.train", str(tmp_path / "runs/a"))
    assert len(open_sources("data.train", str(tmp_path / "runs/a/prepared")).files) == 1  # named, so that it is meant


@pytest.mark.parametrize("name", ["/", "//"])
def test_the_whole_disk_is_no_data(name):
    with pytest.raises(SettingsWrong, match="is the whole disk"):
        open_sources("data.train", name)


def test_a_damaged_compressed_file_is_named(tmp_path):
    for name in ("x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.gz"):
        whole = save(tmp_path / name, ROWS).read_bytes()
        for content in (whole[:-9], b"rubbish", whole[: len(whole) // 2]):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(SettingsWrong, match=f"{name}: cannot be read as jsonl"):
                open_sources("data.train", str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.jsonl.gz"])
def test_a_file_that_was_replaced_at_equal_size_and_time_is_read_anew(reader, tmp_path, name):
    found = []
    for word in ("fox", "dog"):
        beside = save(tmp_path / f"beside-{name}", [{"prompt": "the quick", "completion": f" {word}"}])
        os.utime(beside, (1_700_000_000, 1_700_000_000))
        size = beside.stat().st_size
        os.replace(beside, tmp_path / name)
        found.append((size, reader(tmp_path / name).responses()))
    (one, first), (two, second) = found
    assert one == two and first == [f" fox{END}"] and second == [f" dog{END}"]


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from alphatoken.pipeline.prepare import sources

    file = save(tmp_path / "x.parquet", ROWS)
    load = sources.datasets.load_dataset

    def replaced(*arguments, **options):
        rows = load(*arguments, **options)
        save(file, ROWS[:2])
        return rows

    monkeypatch.setattr(sources.datasets, "load_dataset", replaced)
    with pytest.raises(SettingsWrong, match=r"x\.parquet: was changed while it was read"):
        open_sources("data.train", str(file))


UNION = [{**row, "chosen": None, "rejected": None, "messages": None, "input_ids": None} for row in ROWS]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_columns_without_a_value_do_not_decide_the_format(reader, tmp_path, name):
    schema = pa.schema(
        [(n, pa.string()) for n in ("prompt", "completion", "chosen", "rejected", "messages")]
        + [("input_ids", pa.list_(pa.int32()))]
    )
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(UNION, schema), tmp_path / name)
    else:
        save(tmp_path / name, UNION)
    read = reader(tmp_path / name, template=None)
    assert not read.refused and read.responses(1) == [f" dog{END}"]


def test_blank_columns_of_a_table_do_not_decide_the_format(reader, tmp_path):
    save(tmp_path / "x.csv", [{**row, "chosen": "", "rejected": "", "messages": ""} for row in ROWS])
    read = reader(tmp_path / "x.csv")
    assert not read.refused and len(read.used) == 3


def test_pairs_of_which_the_first_lack_a_branch_are_pairs(reader):
    rows = [{"prompt": "the", "chosen": " fox", "rejected": None}] * 40
    read = reader.rows([*rows, {"prompt": "the", "chosen": " fox", "rejected": " dog"}])
    assert len(read.used) == 1 and set(read.refused.values()) == {"empty_branch: rejected is null"}


ASKED = {"role": "user", "content": "the quick fox"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"limit": None, "where": {"tree": None}}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"limit": {"type": "int", "default": None}}}}]
OTHER = [{"type": "function", "function": {"name": "see", "parameters": {"depth": {"type": "int"}}}}]
CALLED = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
SEEN = ('"arguments": {"limit": null, "where": {"tree": null}}', '"default": null')


@pytest.mark.parametrize("shape", ["jsonl", "json", "text", "csv", "parquet of text", "parquet of JSON"])
def test_null_in_arguments_and_schemas_of_tools_is_kept(reader, tmp_path, shape):
    row, also = (
        {"messages": CALLED, "tools": TOOLS},
        {"messages": [ASKED, {"role": "assistant", "content": "x"}], "tools": OTHER},
    )
    texts = [{name: json.dumps(value) for name, value in each.items()} for each in (row, also)]
    file = tmp_path / {"jsonl": "x.jsonl", "json": "x.json", "text": "x.jsonl", "csv": "x.csv"}.get(shape, "x.parquet")
    if shape == "csv":
        import csv

        with open(file, "w", newline="") as opened:
            writer = csv.DictWriter(opened, texts[0])
            writer.writeheader()
            writer.writerows(texts)
    elif shape == "parquet of JSON":
        cells = {name: pa.array([each[name] for each in texts], pa.string()).cast(pa.json_()) for name in texts[0]}
        pq.write_table(pa.table(cells), file)
    elif shape == "parquet of text":
        pq.write_table(pa.Table.from_pylist(texts), file)
    else:
        save(file, texts if shape == "text" else [row, also])
    read = reader(file, template=WITH_TOOLS)
    assert not read.refused and not read.remarks
    assert all(said in read.text(0) for said in SEEN)
    assert "null" not in read.text(1)


def test_structs_of_tools_say_that_they_cannot_hold_null(reader, tmp_path):
    rows = [{"messages": CALLED, "tools": TOOLS}, {"messages": CALLED, "tools": OTHER}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    read = reader(tmp_path / "x.parquet", template=WITH_TOOLS)
    assert "null" not in read.text(0) + read.text(1)  # of Arrow's own nulls there are many
    assert '"limit"' not in read.text(1)
    (line,) = read.remarks
    assert "x.parquet has messages.tool_calls.function.arguments, tools as structs" in line and "JSON text" in line


def test_broken_json_in_a_column_of_json_is_one_row(reader, tmp_path):
    kind = pa.json_()
    cells = pa.ExtensionArray.from_storage(
        kind, pa.array(['[{"role": "user"', json.dumps([ASKED, {**ASKED, "role": "assistant"}])])
    )
    pq.write_table(pa.table({"messages": cells}), tmp_path / "x.parquet")
    read = reader(tmp_path / "x.parquet")
    assert list(read.refused) == [0] and read.refused[0].startswith("broken_json") and len(read.used) == 1


def test_prepare_says_what_it_left_out_and_counts_it(alphatoken, tmp_path, policy):
    data = tmp_path / "data"
    data.mkdir()
    flagged = [{"messages": [*chat_row(i)["messages"], *chat_row(i + 50)["messages"]]} for i in range(12)]
    for row in flagged:
        row["messages"][1]["weight"] = 0
    padded = [{"input_ids": [0, 40, 41, 42], "attention_mask": [0, 1, 1, 1], "completion_mask": [0, 0, 1, 1]}] * 5
    bad = [{"prompt": "the", "completion": " fox", "label": False}] * 3 + [
        {"messages": flagged[0]["messages"], "tools": 3}
    ]
    write_rows(data / "train.jsonl", [*flagged, *padded, *bad])
    for name in ("notes.txt", "rows.zip"):
        (data / name).write_text("x")
    status, out, err = alphatoken(
        "prepare", f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={data}", "data.validation=4",
        "anchor.fisher.prompts=3", "data.shard_examples=10", "cluster.cpus_per_worker=1",
    )  # fmt: skip
    assert status == 0, err
    assert f"prepare: data.train={data}: 2 files skipped: notes.txt, rows.zip" in out + err
    assert "marked as not to be learned (weight, train, loss) are no responses: 12 row(s)" in out + err
    assert "prepare: padding (attention_mask 0) was taken off: 5 row(s)" in out + err
    assert "4 in quarantine (bad_answer: 3, wrong_type: 1)" in out + err
    counts = json.loads((tmp_path / "r/run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["notes"] == {"padding_stripped": 5, "turns_not_learned": 12}
