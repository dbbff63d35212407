"""data.long=split: every response token of a long document in exactly one mask decision, in order, valued with what follows."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken import Directions, TokenValuer
from alphatoken.jobs.cli import main
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.prepare.tokenize import ExampleMaker
from alphatoken.pipeline.prepare.windows import windows, with_what_follows
from alphatoken.pipeline.settings.data import DataSettings
from tests.conftest import SMALL, chat_row, pair_row, sentence, write_rows

IN_ONE_PROCESS = [one for one in SMALL if not one.startswith("cluster.inline_below")]
LONG = 64  # tokens of a window here


def long_row(index: int, turns: int, words: int) -> dict:
    """A conversation whose answers have ``words`` words each."""
    found = []
    for turn in range(turns):
        found.append({"role": "user", "content": sentence(index + turn, 3)})
        found.append({"role": "assistant", "content": sentence(index + 50 + turn, words)})
    return {"id": f"long-{index}", "messages": found}


@pytest.mark.parametrize("overlap", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [17, 18, 23, 24, 31, 100])
def test_every_token_is_learned_once_and_in_order(length, overlap):
    ids = list(range(1000, 1000 + length))
    found = windows(ids, [-100, *ids[1:]], 16, overlap)
    assert [label for one in found for label in one.labels if label != -100] == ids[1:]
    assert [one.number for one in found] == list(range(1, len(found) + 1))
    for one in found:
        assert overlap < len(one.input_ids) <= 16 and one.labels[0] == -100
        assert all(label in (-100, token) for token, label in zip(one.input_ids, one.labels, strict=True))
    for earlier, later in pairwise(found):
        assert earlier.input_ids[-overlap:] == later.input_ids[:overlap]
        learned = [label for label in earlier.labels[-overlap:] if label != -100]
        assert learned == later.input_ids[:1], "all of the overlap but the first token is the later window's"


@pytest.mark.parametrize("overlap", [0, 9, 16, 17])
def test_an_overlap_that_leaves_a_token_out_or_learns_it_twice_is_refused(overlap):
    with pytest.raises(ValueError, match="from 1 to half of a window of 16"):
        windows(list(range(40)), list(range(40)), 16, overlap)


def test_a_row_of_exactly_the_longest_is_whole_and_one_more_makes_two(policy):
    make = ExampleMaker(AutoTokenizer.from_pretrained(policy), 16, "auto", {}, 400)

    def row(length: int) -> dict:
        ids = list(range(10, 10 + length))
        return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}

    (whole,) = make.split(row(16), "a", 4)
    assert (whole.id, whole.window, whole.truncated) == ("a", 0, False)
    first, second = make.split(row(17), "a", 4)
    assert (first.id, second.id, first.window, second.window) == ("a#1", "a#2", 1, 2)
    assert len(first.input_ids) == 16 and second.input_ids == list(range(22, 27))
    assert first.labels == [-100, -100, *range(12, 23), -100, -100, -100]
    assert second.labels == [-100, *range(23, 27)]


def test_windows_without_a_response_are_left_out_and_counted(policy):
    make = ExampleMaker(AutoTokenizer.from_pretrained(policy), 16, "auto", {}, 400)
    ids = list(range(10, 110))
    labels = [token if 60 <= token < 63 or token == 105 else -100 for token in ids]
    found = make.split({"input_ids": ids, "labels": labels}, "a", 4)
    assert [label for one in found for label in one.labels if label != -100] == [60, 61, 62, 105]
    total = len(windows(ids, labels, 16, 4))
    assert found[0].left_out == total - len(found) > 0 and not any(one.left_out for one in found[1:])


def test_a_windows_last_own_tokens_are_valued_with_the_losses_of_what_follows_them():
    ids = list(range(1000, 1040))
    document = [-100, *ids[1:]]
    found = windows(ids, document, 16, 4)
    rows = Sequences([f"a#{one.number}" for one in found], [one.input_ids for one in found], [o.labels for o in found])
    seen, borrowed = with_what_follows(rows, 4)
    assert borrowed == [3] * (len(found) - 1) + [0]
    for one, labels in zip(found, seen.labels, strict=True):
        assert labels == [-100, *one.input_ids[1:]], "the document's own labels"
    others = Sequences(["a#1", "b#2", "a#3"], [ids[:16], ids[12:28], ids[24:]], [document[:16]] * 2 + [document[24:]])
    assert with_what_follows(others, 4)[1] == [0, 0, 0], "windows of other rows, or not the next"


@pytest.fixture(scope="module")
def run(tmp_path_factory, policy) -> Path:
    """A run over short and long rows, in one process, with a mask that keeps everything and the default one."""
    place = tmp_path_factory.mktemp("windows")
    rows = [chat_row(i) | {"id": f"short-{i}"} for i in range(12)] + [long_row(i, 1 + i % 3, 40) for i in range(8)]
    write_rows(place / "rows.jsonl", rows)
    write_rows(place / "held.jsonl", [chat_row(i) for i in range(100, 106)])
    assert main(["run", f"run.dir={place}/r", *arguments(place, policy)]) == 0
    assert main(["mask", f"run.dir={place}/r", "mask=full", "mask.name=all"]) == 0
    return place


def arguments(place: Path, policy: Path, overlap: int = 16) -> list[str]:
    own = [f"model.policy={policy}", f"data.train={place}/rows.jsonl", f"data.validation={place}/held.jsonl"]
    return [*own, *IN_ONE_PROCESS, "data.long=split", f"data.max_length={LONG}", f"data.overlap={overlap}"]


def read(pattern: Path) -> list[dict]:
    return [row for part in sorted(pattern.parent.glob(pattern.name)) for row in pq.read_table(part).to_pylist()]


def documents(place: Path, policy: Path) -> dict[str, tuple[list[int], list[int]]]:
    """id -> tokens and labels of each row as a whole."""
    make = ExampleMaker(AutoTokenizer.from_pretrained(policy), 100_000, "auto", {}, 100_000)
    made = [make(json.loads(line), "x") for line in (place / "rows.jsonl").read_text().splitlines()]
    return {one.id: (one.input_ids, one.labels) for one in made}


def test_a_run_decides_once_about_every_response_token(run, policy):
    whole, counts = documents(run, policy), json.loads((run / "r/run.json").read_text())["stages"]["prepare"]
    held = {row["id"] for row in read(run / "r/prepared/fisher.parquet")}
    prepared, masked = read(run / "r/prepared/part-*.parquet"), read(run / "r/masks/all/data/*.parquet")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    learned: dict[str, list[int]] = {}
    for row, mask in zip(prepared, masked, strict=True):
        assert row["input_ids"] == mask["input_ids"] and row["labels"] == mask["labels"]
        assert len(row["input_ids"]) <= LONG
        learned.setdefault(row["id"].partition("#")[0], []).extend(t for t in row["labels"] if t != -100)
    assert set(learned) == set(whole) - held
    for name, tokens in learned.items():
        expected = [label for label in whole[name][1] if label != -100]
        assert tokens == expected and tokenizer.decode(tokens) == tokenizer.decode(expected)
    found = counts["counts"]
    split = {row["source"] for row in prepared if "#" in row["id"]}
    assert found["windows"] == sum("#" in row["id"] for row in prepared) > found["split_rows"] == len(split) > 0
    assert found["response_tokens"] == sum(map(len, learned.values()))
    assert counts["inputs"]["data.overlap"] == 16
    kept = read(run / "r/masks/default/data/*.parquet")
    half = sum(label != -100 for row in kept for label in row["labels"])
    assert 0.45 < half / found["response_tokens"] < 0.6


def test_values_are_those_of_the_window_with_the_documents_labels(run, policy):
    whole = documents(run, policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    valuer = TokenValuer(model, Directions.load(str(run / "r/anchors/snapshot-00")), layers=2, window=4)
    values = {row["id"]: row for row in read(run / "r/values/*.parquet")}
    differs, looked = False, 0
    prepared = {row["id"]: row for row in read(run / "r/prepared/part-*.parquet")}
    for name, row in prepared.items():
        document, _, number = name.partition("#")
        if not number or f"{document}#{int(number) + 1}" not in prepared:
            continue
        start, ids = (int(number) - 1) * (LONG - 16), torch.tensor([row["input_ids"]])
        assert whole[document][0][start : start + LONG] == row["input_ids"]
        labels = torch.tensor([whole[document][1][start : start + LONG]])
        labels[:, 0] = -100
        expected, alone = valuer(ids, None, labels), valuer(ids, None, torch.tensor([row["labels"]]))
        own = torch.tensor(row["labels"]) != -100
        for column, there in expected.items():
            found = torch.tensor(values[name][column])
            assert torch.allclose(found[own], there[0][own], rtol=1e-3, atol=1e-5), column
            assert not found[~own].any(), "nothing of tokens that another window values"
            differs |= column == "adaptation_causal" and not torch.allclose(
                found[own], alone[column][0][own], rtol=1e-2
            )
        looked += 1
    assert looked and differs, "without what follows, values of a window's last tokens are others"


def test_it_is_said_in_the_lines_the_report_and_the_plan(run, policy, capfd):
    counts = json.loads((run / "r/run.json").read_text())["stages"]["prepare"]["counts"]
    own = arguments(run, policy)
    assert main(["plan", f"run.dir={run}/r", *own, "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["data"]["train_examples"] == counts["train_rows"]
    assert (plan["data"]["split_rows"], plan["data"]["windows"]) == (counts["split_rows"], counts["windows"])
    assert plan["data"]["tokens"] == counts["tokens"] and plan["resume"]["prepare"]["state"] == "done"
    assert main(["plan", f"run.dir={run}/r", *own]) == 0
    said = f"of which {counts['split_rows']} are split into {counts['windows']} windows"
    assert said in " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert main(["prepare", f"run.dir={run}/again", *own]) == 0
    said = f"{counts['split_rows']} rows split into {counts['windows']} windows"
    assert said in " ".join(capfd.readouterr().err.split())
    assert main(["report", f"run.dir={run}/r"]) == 0
    assert f"split into {counts['windows']} windows" in (run / "r/report/index.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.overlap=64"], "data.overlap=64: must be at most half of a window (data.max_length=64), 32 tokens"),
        (["data.overlap=33"], "at most half of a window"), (["data.overlap=0"], "data.overlap=0: must be at least 1"),
        (["data.long=whole"], "data.long=whole: must be one of cut, split"),
        (["data.long=cut"], "data.overlap=16: is of windows, set data.long=split as well"),
        (["data.format=preference"], "data.long=split is not available for preference pairs"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(run, policy, capfd, more, said):
    assert main(["prepare", f"run.dir={run}/none", *arguments(run, policy), *more]) == 2
    assert said in " ".join(capfd.readouterr().err.split()) and not (run / "none").exists()


def test_pairs_are_refused_however_they_were_recognised(tmp_path, policy, capfd):
    write_rows(tmp_path / "rows.jsonl", [pair_row(i) for i in range(20)])
    own = [f"model.policy={policy}", f"data.train={tmp_path}/rows.jsonl", "data.validation=4", *IN_ONE_PROCESS]
    for command in ("prepare", "plan"):
        assert main([command, f"run.dir={tmp_path}/r", *own, "data.long=split"]) == 2
        assert "data.long=split is not available for preference pairs" in " ".join(capfd.readouterr().err.split())


def test_the_overlap_is_a_quarter_of_a_window_and_bounded():
    def shared(length: int, **more) -> int | None:
        return DataSettings(**more).overlap_within(length)

    assert shared(2048) is None and shared(2048, long="split", overlap=7) == 7
    assert [shared(length, long="split") for length in (2, 64, 1024, 2048, 32768)] == [1, 16, 256, 256, 256]
