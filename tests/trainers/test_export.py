"""`alphatoken export`: what is written is read back, by the library that a trainer reads it with where there is one."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken.data_schemas import PREPARED
from alphatoken.jobs.cli import main
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.trainers.formats import FORMATS
from alphatoken.pipeline.trainers.rows import shifted_rows, skyrl_example
from alphatoken.pipeline.trainers.verl_rows import MaskedRows
from tests.mask.synthetic_run import EOS, ROOT, mask, masks, part_names, write_run
from tests.trainers.synthetic_pairs import write_pairs_run

BRANCHES = ("chosen_", "rejected_")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three parts, one of them empty, and rows without any kept token."""
    place = tmp_path_factory.mktemp("run")
    storage, *_ = write_run(place, (40, 0, 33))
    mask(storage)
    mask(storage, name="soft", rule="weight")
    return place


@pytest.fixture(scope="module")
def rows(run) -> list[dict]:
    return masks(Storage(str(run)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("pairs")
    mask(write_pairs_run(place), score="information")
    return place


@pytest.fixture(scope="module")
def pair_rows(pairs) -> list[dict]:
    return masks(Storage(str(pairs)))


def export(run: Path, out: Path, to: str, *more: str) -> None:
    assert main(["export", str(run), "--to", to, "--out", str(out), *more]) == 0


def moved(labels: list[int]) -> list[int]:
    return [*labels[1:], -100] if labels else []


def kept(labels: list[int]) -> list[int]:
    return [int(label != -100) for label in labels]


def test_hf_is_a_data_set_on_disk_with_lengths(run, rows, tmp_path, capsys):
    export(run, tmp_path / "out", "hf")
    told = capsys.readouterr().out
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert isinstance(found, datasets.Dataset)  # ms-swift asks for its columns at once
    assert found.column_names == ["input_ids", "attention_mask", "labels", "lengths"]
    assert found.remove_columns("lengths").to_list() == rows
    assert found["lengths"][:] == [len(row["input_ids"]) for row in rows]
    tokens, inside = sum(map(len, found["labels"])), sum(sum(kept(row["labels"])) for row in rows)
    assert 0 < inside < tokens and f"73 with {tokens:,} tokens, of which {inside:,}" in told
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


def test_hf_of_soft_weights_keeps_them(run, tmp_path):
    export(run, tmp_path / "out", "hf", "--mask", "soft")
    found = datasets.load_from_disk(str(tmp_path / "out"))
    weights = [w for row in found["loss_weight"] for w in row]
    assert 0.0 in weights and 1.0 in weights and any(0 < w < 1 for w in weights)


def test_jsonl_has_a_row_a_line(run, rows, tmp_path):
    export(run, tmp_path / "deep" / "data.jsonl", "jsonl")
    found = [json.loads(line) for line in (tmp_path / "deep/data.jsonl").read_text().splitlines()]
    wanted = [{"input_ids": r["input_ids"], "labels": r["labels"], "len": len(r["input_ids"])} for r in rows]
    assert found == wanted
    loaded = datasets.load_dataset(  # as instructlab-training reads it
        "json", data_files=str(tmp_path / "deep/data.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert loaded.to_list() == wanted


def test_shifted_labels_speak_of_the_next_token_and_are_called_so(run, rows, tmp_path):
    export(run, tmp_path / "out", "shifted")
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert list(found[0]) == ["input_ids", "attention_mask", "shifted_labels"]
    assert [row["shifted_labels"] for row in found] == [moved(row["labels"]) for row in rows]
    assert [row["input_ids"] for row in found] == [row["input_ids"] for row in rows]
    assert shifted_rows(str(tmp_path / "out"))["labels"][:] == [moved(row["labels"]) for row in rows]


def test_shifted_labels_give_the_loss_of_the_mask_where_nothing_shifts(run, rows, tmp_path, policy):
    """The rule of the format: cross-entropy of the output at i with label i is what a shifting model computes."""
    import torch
    from transformers import AutoModelForCausalLM

    export(run, tmp_path / "out", "shifted")
    model = AutoModelForCausalLM.from_pretrained(policy)
    compared = 0
    for row, own in zip(rows, pq.read_table(tmp_path / "out").to_pylist(), strict=True):
        if compared == 5 or len(set(row["labels"])) < 3:
            continue
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            found = model(ids, labels=labels)
            unshifted = torch.nn.functional.cross_entropy(found.logits[0], torch.tensor(own["shifted_labels"]))
        assert unshifted.item() == pytest.approx(found.loss.item(), rel=1e-6)
        compared += 1
    assert compared == 5


def test_loss_mask_is_one_where_labels_are_kept(run, rows, tmp_path):
    export(run, tmp_path / "out", "loss_mask")
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert list(found[0]) == ["input_ids", "attention_mask", "loss_mask"]
    assert [row["loss_mask"] for row in found] == [kept(row["labels"]) for row in rows]


def test_the_class_for_verl_gives_rows_as_its_unpadded_collator_takes_them(run, rows, tmp_path):
    export(run, tmp_path / "out", "loss_mask")
    files = sorted(str(path) for path in (tmp_path / "out").iterdir())
    found = MaskedRows(
        parquet_files=files, tokenizer=None, config={"pad_mode": "no_padding"}, processor=None, max_samples=-1
    )
    assert len(found) == len(rows)
    for own, row in zip((found[i] for i in range(len(found))), rows, strict=True):
        assert own["input_ids"].tolist() == row["input_ids"] and own["loss_mask"].tolist() == kept(row["labels"])
        assert own["position_ids"].tolist() == list(range(len(row["input_ids"])))
    assert len(MaskedRows(files, None, {}, max_samples=3)) == 3
    assert len(MaskedRows(str(tmp_path / "out"), None, {})) == len(rows)
    with pytest.raises(ValueError, match="data.pad_mode=no_padding"):
        MaskedRows(files, None, {"pad_mode": "right"})
    longest = max(len(row["input_ids"]) for row in rows)
    with pytest.raises(ValueError, match=f"data.max_length={longest}"):
        MaskedRows(files, None, {"max_length": longest - 1})


def test_rows_for_skyrl_put_the_mask_over_the_last_tokens(run, rows, tmp_path):
    export(run, tmp_path / "out", "loss_mask")
    for own, row in zip(pq.read_table(tmp_path / "out").to_pylist(), rows, strict=True):
        example = skyrl_example(own)
        if example is None:
            assert not any(kept(row["labels"]))
            continue
        actions = example["num_actions"]
        assert 0 < actions < len(row["input_ids"])  # a first token is never predicted
        assert [0] * (len(row["input_ids"]) - actions) + example["loss_mask"] == kept(row["labels"])


def test_olmo_arrays_hold_rows_end_to_end(run, rows, tmp_path):
    export(run, tmp_path / "out", "olmo")
    found = []
    for ids in sorted((tmp_path / "out").glob("token_ids_part_*.npy")):
        tokens = np.fromfile(ids, np.uint16)  # the vocabulary of the run is 60
        mask = np.fromfile(ids.with_name(ids.name.replace("token_ids", "labels_mask")), np.bool_)
        assert len(tokens) == len(mask)
        with gzip.open(ids.with_suffix(".csv.gz"), "rt") as file:
            borders = [tuple(map(int, line.split(","))) for line in file]
        assert borders[-1][1] == len(tokens)
        found += [(tokens[a:b].tolist(), mask[a:b].astype(int).tolist()) for a, b in borders]
    assert found == [(row["input_ids"], kept(row["labels"])) for row in rows]
    assert len(list((tmp_path / "out").iterdir())) == 6  # three files for each part that has rows


@pytest.mark.parametrize("to", list(FORMATS))
def test_without_a_place_the_files_lie_in_the_run_where_the_trainer_looks(tmp_path, capsys, to):
    """The line that is printed is taken at its word: the place that a trainer is told to read holds what it reads."""
    storage, *_ = write_run(tmp_path / "run", (5, 6))
    mask(storage, name="half")
    assert main(["export", str(tmp_path / "run"), "--mask", "half", "--to", to]) == 0
    place, told = tmp_path / f"run/export/half-{to}", capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run/export").iterdir()] == [f"half-{to}"]
    reading = {
        "hf": f"tokenized_path: {place} ", "jsonl": f'data_output_dir="{place}"', "shifted": f"path: {place}}}",
        "loss_mask": f"data.train_files={place} ", "olmo": f"paths={place}/token_ids_part_*.npy ",
    }[to]  # fmt: skip
    assert reading in told
    read = {
        "hf": lambda: len(datasets.load_from_disk(str(place))),
        "jsonl": lambda: len((place / "data.jsonl").read_text().splitlines()),
        "shifted": lambda: len(shifted_rows(str(place))),
        "loss_mask": lambda: len(MaskedRows(str(place), None, {})),
        "olmo": lambda: sum(len(gzip.decompress(file.read_bytes()).splitlines()) for file in place.glob("token_ids_part_*.csv.gz")),
    }[to]  # fmt: skip
    assert read() == 11


def test_a_file_uri_is_a_place_on_this_disk(run, rows, tmp_path):
    assert main(["export", f"file://{run}", "--to", "jsonl", "--out", f"file://{tmp_path}/x.jsonl"]) == 0
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == len(rows)


def test_pairs_have_every_column_once_per_branch(pairs, pair_rows, tmp_path):
    for to in ("hf", "jsonl", "shifted", "loss_mask"):
        export(pairs, tmp_path / to, to)
    hf = datasets.load_from_disk(str(tmp_path / "hf")).to_list()
    lines = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    shifted, flags = (pq.read_table(tmp_path / to).to_pylist() for to in ("shifted", "loss_mask"))
    assert len(hf) == len(lines) == len(shifted) == len(flags) == len(pair_rows) == 14
    for row, *made in zip(pair_rows, hf, lines, shifted, flags, strict=True):
        assert made[0]["lengths"] == [len(row[f"{b}input_ids"]) for b in BRANCHES]
        assert made[0]["images"] is made[0]["videos"] is made[0]["audios"] is None
        for branch in BRANCHES:
            ids, labels = row[f"{branch}input_ids"], row[f"{branch}labels"]
            assert all(one[f"{branch}input_ids"] == ids for one in made)
            assert made[0][f"{branch}labels"] == made[1][f"{branch}labels"] == labels
            assert made[0][f"{branch}attention_mask"] == [1] * len(ids) and made[1][f"{branch}len"] == len(ids)
            assert made[2][f"{branch}shifted_labels"] == moved(labels)
            assert made[3][f"{branch}loss_mask"] == kept(labels)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "x"], "the following arguments are required: --to"),
        (["--to", "csv", "--out", "x"], "invalid choice: 'csv'"),
        (
            ["--to", "hf", "--out", "x", "--mask", "none"],
            "--mask none: {run} has no such mask; there are default, soft",
        ),
        (["--to", "jsonl", "--out", "x", "--mask", "soft"], "loss_weight finds a place in: hf"),
        (["--to", "hf", "--out", "{run}"], "is there already"),
        (["--to", "jsonl", "--out", "{run}/run.json/x"], "/run.json (File exists): give another place"),
        (["--to", "hf", "--out", "{run}/run.json/x/y"], "/run.json/x (Not a directory): give another place"),
        (["--to", "shifted", "--out", "s3://bucket/x"], "--out s3://bucket/x: is not on this disk: give a path"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_written(run, more, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *[one.format(run=run) for one in more]]) == 2
    assert said.format(run=run) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_wrong_places(tmp_path, pairs, capsys):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/run.json").write_text("{}")
    for command in (["export", "--to", "hf", "--out", str(tmp_path / "x")], ["check-batch", "batch.pt"]):
        for place, what in ((tmp_path / "no", "there is no such directory"), (tmp_path, "holds no run")):
            assert main([command[0], str(place), *command[1:]]) == 1
            said = capsys.readouterr().err.splitlines()[-1]
            assert f"{place}: {what}" in said and said.endswith("or run `alphatoken run` first")
            assert (f"runs beside it: {tmp_path}/held: give the directory" in said) == (place != tmp_path)
    assert main(["export", str(pairs), "--to", "olmo", "--out", str(tmp_path / "x")]) == 2
    assert "no place for preference pairs; these have: hf, jsonl" in capsys.readouterr().err


def test_shards_that_do_not_hold_what_the_summary_says_are_not_exported(tmp_path, capsys):
    storage, *_ = write_run(tmp_path / "run", (5, 6))
    mask(storage)
    shard = tmp_path / "run/masks/default/data/train-00001-of-00002.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.slice(0, 4).replace_schema_metadata(table.schema.metadata), shard)
    assert main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]) == 1
    assert "hold 9 rows" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["run"]
    shard.unlink()
    assert main(["export", str(tmp_path / "run"), "--to", "jsonl", "--out", str(tmp_path / "out")]) == 1
    assert "train-00001-of-00002.parquet is missing" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def write_long_run(place: Path, parts: int) -> None:
    """Parts of a million tokens each, in rows of a thousand, as prepare leaves them; the mask needs no values."""
    storage, names, rows, long = Storage(str(place)), part_names(parts), 1024, 1000
    manifest = Manifest(storage)
    first = manifest.begin("prepare", {"rows": rows * parts}, {})
    for number, part in enumerate(names):
        flat = np.random.default_rng(number).integers(3, 60, rows * long).astype(np.int32)
        labels = np.where(np.arange(rows * long) % long < 100, -100, flat).astype(np.int32)
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * long)
        lists = [pa.ListArray.from_arrays(offsets, pa.array(one)) for one in (flat, labels)]
        ids = pa.array([f"{number}-{row}" for row in range(rows)])
        storage.write_table(f"prepared/{part}", pa.Table.from_arrays([ids, *lists, ids], schema=PREPARED), first)
    manifest.finish("prepare", 0.0, parts=names, eos_token_ids=[EOS], vocabulary=60)
    mask(storage, score="full")


MEASURED = """
import sys, threading, time
from alphatoken.data_schemas import PREPARED
from alphatoken.jobs.cli import main
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage

most, done = 0, False
def watch():
    global most
    while not done:
        own = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        most = max(most, int(own.split()[1]) // 1024)
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
status = main(["export", *sys.argv[1:]])
done = True
thread.join()
print(most, file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory) -> list[Path]:
    places = []
    for parts in (1, 8):
        places.append(tmp_path_factory.mktemp(f"long-{parts}"))
        write_long_run(places[-1], parts)
    return places


@pytest.mark.parametrize("to", ["hf", "jsonl", "shifted", "loss_mask", "olmo"])
def test_memory_does_not_grow_with_the_data(long_runs, tmp_path, to):
    """Eight million tokens (72 MB as arrays) take no more memory of their own than one million.

    Arrow's pool and glibc's arenas keep freed pages for later, tens of MB of them: both are told not to.
    """
    plain = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    peaks = []
    for place in long_runs:
        command = [sys.executable, "-c", MEASURED, str(place), "--to", to, "--out", str(tmp_path / place.name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **plain})
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.split()[-1]))
    assert peaks[1] < peaks[0] + 40, peaks


def test_eos_ends_most_rows_of_the_synthetic_run(rows):
    """Else the test of OLMo's borders would not differ from a search for EOS."""
    assert {row["input_ids"][-1] == EOS for row in rows} == {True, False}
