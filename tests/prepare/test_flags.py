"""Flags that say what is to be learned: on messages, on rows, on tokens."""

import json

import pytest

from tests.prepare.reading import MARKED

USER, ALSO = {"role": "user", "content": "the quick fox"}, {"role": "user", "content": "an old oak"}
BAD, GOOD = {"role": "assistant", "content": "owls"}, {"role": "assistant", "content": "a lazy dog"}
END = "<|im_end|>"
FLAGS = [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0, "train": False}]


@pytest.mark.parametrize("template", ["plain", "marked"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_turn_that_is_not_to_be_learned_has_no_response_token(reader, flags, place, template):
    turns = {
        "first": [USER, {**BAD, **flags}, ALSO, GOOD],
        "middle": [USER, GOOD, ALSO, {**BAD, **flags}, ALSO, GOOD],
        "last": [USER, GOOD, ALSO, {**BAD, **flags}],
    }[place]
    read = reader.rows([{"messages": turns}], **({"template": MARKED} if template == "marked" else {}))
    assert set(read.responses()) == {f"{GOOD['content']}{END}"}
    assert f"assistant\n{BAD['content']}{END}" in read.text()  # it is read all the same
    assert read.notes == {"turns_not_learned": 1}


def test_flags_of_sharegpt_turns_are_read(reader):
    turns = [
        {"from": "human", "value": USER["content"], "weight": 0},
        {"from": "gpt", "value": BAD["content"], "weight": 0},
        {"from": "human", "value": ALSO["content"]},
        {"from": "gpt", "value": GOOD["content"], "weight": 1},
    ]
    read = reader.rows([{"conversations": turns}])
    assert read.responses() == [f"{GOOD['content']}{END}"]


def test_flags_are_no_part_of_what_the_template_is_given(reader):
    whole = "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
    read = reader.rows([{"messages": [USER, {**GOOD, "weight": 1, "train": True}]}], whole)
    assert "weight" not in read.text() and "train" not in read.text()


def test_flags_of_a_column_of_structs_are_read(reader, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist([{"messages": [USER, {**BAD, "weight": 0}, ALSO, GOOD]}]), tmp_path / "x.parquet"
    )
    assert reader(tmp_path / "x.parquet").responses() == [f"{GOOD['content']}{END}"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"weight": 0.5}, "turn_flag: messages[1].weight=0.5 is neither 0 nor 1"),
        ({"weight": 2}, "turn_flag: messages[1].weight=2"),
        ({"weight": -1}, "turn_flag: messages[1].weight=-1"),
        ({"weight": "0"}, "wrong_type: messages[1].weight is str, not 0 or 1"),
        ({"weight": [1]}, "wrong_type: messages[1].weight is list"),
        ({"weight": float("nan")}, "turn_flag: messages[1].weight=nan"),
        ({"train": "false"}, "wrong_type: messages[1].train is str, not true or false"),
        ({"weight": 0, "train": True}, "contradictory_flags: messages[1] has weight=0 and train=True"),
        ({"loss": True, "training": False}, "contradictory_flags: messages[1] has training=False and loss=True"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
            "turn_flag: messages[1].train_detail",
        ),
        ({"weight": 0}, "no_response: every assistant message is marked as not to be learned"),
    ],
)
def test_flags_that_cannot_be_followed_put_the_row_into_quarantine(reader, flags, reason):
    read = reader.rows([{"messages": [USER, {**GOOD, **flags}]}, {"messages": [USER, GOOD]}])
    assert list(read.refused) == [0] and read.refused[0].startswith(reason)


def test_a_flag_on_another_role_is_counted(reader):
    read = reader.rows([{"messages": [{**USER, "weight": 1}, GOOD]}, {"messages": [{**USER, "weight": 0}, GOOD]}])
    assert read.notes == {"flag_not_read": 1} and not read.refused


KTO = {"prompt": "the quick", "completion": " fox"}


@pytest.mark.parametrize("label", [False, "false", "False"])
def test_a_bad_answer_is_never_a_good_example(reader, label):
    rows = [{**KTO, "label": label}, {**KTO, "label": True}, {"messages": [USER, GOOD], "kto_tag": False}]
    read = reader.rows(rows)
    assert sorted(read.refused) == [0, 2]
    assert read.refused[0].startswith("bad_answer: label is false") and "kto_tag" in read.refused[2]
    assert read.refused[0].endswith("with a good one to the same prompt it makes a pair (prompt, chosen, rejected)")
    assert read.responses() == [f" fox{END}"]


def test_labels_in_a_csv_file_are_read(reader, tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion,label\nthe quick, fox,False\nthe quick, dog,True\n")
    read = reader(tmp_path / "x.csv")
    assert list(read.refused) == [0] and read.responses() == [f" dog{END}"]


def test_a_label_of_numbers_is_read_where_it_is_named_and_else_counted(reader):
    rows = [{**KTO, "label": 0}, {**KTO, "label": 1}, {**KTO, "label": 7}, {**KTO, "label": "sports"}, KTO]
    read = reader.rows(rows)
    assert not read.refused and read.notes == {"label_not_read": 2}
    named = reader.rows(rows, columns={"label": "label"})
    assert {row: reason.partition(":")[0] for row, reason in named.refused.items()} == {
        0: "bad_answer", 2: "wrong_type", 3: "wrong_type",
    }  # fmt: skip


def test_labels_that_contradict_each_other_are_refused(reader):
    read = reader.rows([{**KTO, "label": True, "kto_tag": False}, KTO])
    assert read.refused[0] == "contradictory_flags: the row has label=True and kto_tag=False"


IDS = [40, 41, 42, 43, 44]


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "loss_mask"])
@pytest.mark.parametrize("kind", [int, bool, float])
def test_masks_of_token_rows_are_read_as_labels(reader, name, kind):
    read = reader.rows([{"input_ids": IDS, name: [kind(bit) for bit in (0, 0, 1, 0, 1)]}])
    assert read.used[0]["labels"] == [-100, -100, 42, -100, 44] and read.used[0]["input_ids"] == IDS


def test_a_token_is_a_response_token_in_all_masks_and_labels_together(reader):
    row = {"input_ids": IDS, "labels": [-100, 41, 42, 43, -100], "loss_mask": [1, 1, 1, 0, 1]}
    read = reader.rows(
        [row, {"input_ids": IDS, "completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 1, 1, 1, 0]}]
    )
    assert [used["labels"] for used in read.used] == [[-100, 41, 42, -100, -100], [-100, -100, 42, 43, -100]]


def test_a_mask_by_another_name_is_read_where_it_is_named(reader):
    read = reader.rows([{"input_ids": IDS, "mine": [0, 0, 1, 1, 1]}], columns={"loss_mask": "mine"})
    assert read.used[0]["labels"] == [-100, -100, 42, 43, 44]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_taken_off_and_counted(reader, side):
    left, right = (3 if side != "right" else 0), (2 if side != "left" else 0)
    row = {
        "input_ids": [0] * left + IDS + [0] * right, "attention_mask": [0] * left + [1] * 5 + [0] * right,
        "labels": [-100] * left + [-100, -100, 42, 43, 44] + [-100] * right,
    }  # fmt: skip
    unpadded = {"input_ids": IDS, "attention_mask": [1] * 5, "labels": [-100, -100, 42, 43, 44]}
    read = reader.rows([row, unpadded])
    assert [used["input_ids"] for used in read.used] == [IDS, IDS] and read.notes == {"padding_stripped": 1}
    assert [used["labels"] for used in read.used] == [unpadded["labels"]] * 2


def test_padding_of_pairs_is_taken_off(reader):
    branch = {"input_ids": [0, 0, *IDS], "labels": [-100] * 4 + [42, 43, 44], "attention_mask": [0, 0, 1, 1, 1, 1, 1]}
    other = {"input_ids": [*IDS[:-1], 50, 0], "labels": [-100] * 3 + [43, 50, -100], "attention_mask": [1] * 5 + [0]}
    row = {f"{name}_{key}": value for name, b in (("chosen", branch), ("rejected", other)) for key, value in b.items()}
    read = reader.rows([row])
    assert read.used[0]["chosen_input_ids"] == IDS and read.used[0]["rejected_input_ids"] == [*IDS[:-1], 50]
    assert read.notes == {"padding_stripped": 1}


TOKENS = {"input_ids": IDS, "labels": [-100, -100, 42, 43, 44]}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"attention_mask": [1, 1, 1, 2, 2]}, "packed_row: attention_mask[3]=2"),
        ({"position_ids": [0, 1, 2, 0, 1]}, "packed_row: position_ids start again at token 3"),
        ({"seq_lengths": [3, 2]}, "packed_row: seq_lengths has 2 sequences"),
        ({"position_ids": [0, 1, 2, 7, 8]}, "position_gap: position_ids go from 2 to 7 at token 3"),
        ({"attention_mask": [1, 1, 0, 1, 1]}, "attention_gap: attention_mask[2]=0"),
        ({"attention_mask": [0] * 5}, "no_response"),
        ({"attention_mask": [1, 1, 1, 1]}, "lengths_differ: 5 input_ids and 4 attention_mask"),
        ({"attention_mask": "11111"}, "wrong_type: attention_mask is str"),
        ({"labels": [-100, -100, 42, 43, 44, 45]}, "lengths_differ: 5 input_ids and 6 labels"),
        ({"loss_mask": [1, 1, 1]}, "lengths_differ: 5 input_ids and 3 loss_mask"),
        ({"loss_mask": [0, 0, 1, 1, 0.5]}, "mask_value: loss_mask[4]=0.5 is neither 0 nor 1"),
        ({"loss_mask": [0, 0, 1, 1, "1"]}, "wrong_type: loss_mask[4] is str"),
        ({"loss_mask": [0, 0, 1, 1, None]}, "wrong_type: loss_mask[4] is null"),
        ({"position_ids": [[0, 1, 2, 3, 4]] * 3}, "lengths_differ|wrong_type: position_ids[0] is list"),
        ({"labels": [-100, -100, 42, 43, 7]}, "label_mismatch: labels[4]=7"),
    ],
)
def test_token_rows_that_are_not_one_sequence_are_refused(reader, more, reason):
    read = reader.rows([{**TOKENS, **more}, TOKENS])
    assert list(read.refused) == [0] and any(read.refused[0].startswith(r) for r in reason.split("|"))


def test_positions_of_a_padded_sequence_are_no_second_one(reader):
    padded = {"input_ids": [0, 0, *IDS], "labels": [-100, -100, *TOKENS["labels"]], "attention_mask": [0, 0] + [1] * 5}
    read = reader.rows([{**padded, "position_ids": [1, 1, 0, 1, 2, 3, 4]}, {**TOKENS, "seq_lengths": [5]}])
    assert not read.refused and read.used[0]["input_ids"] == IDS


def test_columns_that_nobody_knows_are_named_in_the_quarantine(reader):
    read = reader.rows([{"input_ids": IDS, "mask": [1] * 5}, TOKENS])
    assert read.refused[0].startswith("unknown_columns: ['input_ids', 'mask'] is none of")
    assert json.loads(json.dumps(read.counts))["quarantined"] == 1
