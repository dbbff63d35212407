"""What prepare says about texts that a chat template leaves out."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from alphatoken.data_schemas import PREPARED
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare import remarks
from alphatoken.pipeline.prepare.sources import open_sources
from alphatoken.pipeline.prepare.worker import PrepareTask, PrepareWorker
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import DataSettings, Settings
from tests.conftest import write_rows
from tests.prepare.chat_templates import PHI_3, QWEN_3

THINKING = [
    {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "<think>\nowls\n</think>\n\na dog"},
    {"role": "user", "content": "the oak"}, {"role": "assistant", "content": "<think>\ntree\n</think>\n\nan old oak"},
]  # fmt: skip
HANGING = [
    {"role": "user", "content": "the fox"}, {"role": "tool", "content": "seven"}, {"role": "assistant", "content": "a dog"},
]  # fmt: skip


@pytest.fixture
def prepared(tmp_path, policy):
    """prepared(template, rows, **data) -> (counts, rows of prepared/, examples that are sent back)."""

    def run(template, rows, **data):
        tokenizer = AutoTokenizer.from_pretrained(policy)
        tokenizer.chat_template = template
        place = tmp_path / "model"
        tokenizer.save_pretrained(place)
        storage = Storage(str(tmp_path / "run"))
        settings = Settings(data=DataSettings(**data))
        worker = PrepareWorker(storage, ModelSource(str(place)), len(tokenizer), settings, preference=False)
        sources = open_sources("data.train", str(write_rows(tmp_path / "rows.jsonl", rows)))
        pieces = sources.pieces(range(len(rows)))
        short = [("rows.jsonl", numbers, table) for _, numbers, table in pieces]
        counts, _ = worker(PrepareTask(short, "prepared/x", "quarantine/x", "f"), lambda units: None)
        _, sent = worker(PrepareTask(short, None, None, "f"), lambda units: None)
        return counts, storage.read_table("prepared/x", PREPARED).to_pylist(), sent

    return run


def test_messages_that_a_template_leaves_out_are_counted_with_an_example(prepared):
    fine = {"messages": [HANGING[0], HANGING[2]]}
    counts, rows, _ = prepared(PHI_3.template, [fine, {"messages": HANGING}, {"messages": HANGING}])
    assert len(rows) == 1 and counts["reason/not_in_template"] == 2
    assert remarks.as_counts(counts) == {"the chat template leaves out `tool` messages": 2}
    said = remarks.line(counts)
    assert said == "the chat template leaves out `tool` messages in 2 rows (such as rows.jsonl:1; in quarantine)"
    assert not remarks.line({"rows_used": 3})


def test_reasoning_that_a_template_leaves_out_is_counted_or_kept(prepared):
    rows = [{"messages": THINKING}, {"messages": THINKING[2:]}]
    counts, plain, sent = prepared(QWEN_3.template, rows)
    assert remarks.line(counts).startswith(
        "the chat template leaves out reasoning of responses in 1 row (such as rows.jsonl:0; "
    )
    assert [row["id"] for row in plain] == ["rows.jsonl:0", "rows.jsonl:1"] == [example.id for example in sent]
    counts, kept, sent = prepared(QWEN_3.template, rows, keep_reasoning=True)
    assert not remarks.line(counts) and counts["rows_used"] == 3
    assert [row["id"] for row in kept] == ["rows.jsonl:0#1", "rows.jsonl:0#3", "rows.jsonl:1"]
    assert kept[1]["input_ids"] == plain[0]["input_ids"] and len(sent) == 2 and sent[0].id == "rows.jsonl:0#3"


def test_ids_that_stand_twice_are_counted(prepared):
    rows = [{"id": name, "messages": THINKING[2:]} for name in ("a", "b", "a", "a")]
    assert prepared(QWEN_3.template, rows)[0]["note/id_repeated"] == 2
    assert "note/id_repeated" not in prepared(QWEN_3.template, rows[:2])[0]


def test_turns_beyond_the_longest_are_counted_as_a_cut_row_is(prepared):
    rows = [{"messages": [*THINKING, *THINKING, *THINKING]}]
    _, whole, _ = prepared(QWEN_3.template, rows, keep_reasoning=True)
    longest = len(whole[0]["input_ids"]) + 1
    counts, kept, _ = prepared(QWEN_3.template, rows, keep_reasoning=True, max_length=longest)
    assert 0 < len(kept) < len(whole) and counts["truncated"] == 1


def test_prepare_says_in_one_line_what_a_template_leaves_out(alphatoken, tmp_path, policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = PHI_3.template
    shutil.copytree(policy, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fine = {"messages": [HANGING[0], HANGING[2]]}
    data = write_rows(tmp_path / "rows.jsonl", [fine, {"messages": HANGING}, fine, {"messages": HANGING}])
    held = write_rows(tmp_path / "held.jsonl", [fine])
    status, out, err = alphatoken(
        "prepare", f"run.dir={tmp_path}/r", f"model.policy={tmp_path}/model", f"data.train={data}",
        f"data.validation={held}", "anchor.drift=none", "mask.score=information", "cluster.cpus_per_worker=1",
    )  # fmt: skip
    assert status == 0, err
    (line,) = [line for line in (out + err).splitlines() if "leaves out" in line]
    example = f"(such as {data}:1; in quarantine)"
    assert line == f"prepare: the chat template leaves out `tool` messages in 2 rows {example}"
    counts = json.loads((tmp_path / "r/run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["left_out"] == {"the chat template leaves out `tool` messages": 2}
