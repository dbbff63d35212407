"""Raw preference rows become pairs, or are refused with a reason."""

import pytest

from alphatoken.pipeline.prepare.pairs import PairMaker, branch_rows
from alphatoken.pipeline.prepare.rows import Unusable
from tests.conftest import CHATML, save_tokenizer

ASKED = {"role": "user", "content": "the quick fox"}
GOOD = {"role": "assistant", "content": "jumps over a lazy dog"}
BAD = {"role": "assistant", "content": "owls watch"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(tokenizer, row, chat="auto", columns=None, max_length=200):
    return PairMaker(tokenizer, max_length, chat, columns or {}, len(tokenizer))(row, "f:0")


def said(tokenizer, example) -> tuple[str, str]:
    """What the prompt's tokens and the response's tokens say."""
    inside = [i for i, label in enumerate(example.labels) if label != -100]
    assert inside == list(range(inside[0], inside[-1] + 1))
    assert [example.labels[i] for i in inside] == [example.input_ids[i] for i in inside]
    assert not tokenizer.decode(example.input_ids[inside[-1] + 1 :]).strip()
    return tokenizer.decode(example.input_ids[: inside[0]]), tokenizer.decode([example.labels[i] for i in inside])


def test_strings_are_taken_as_they_are_with_eos(tokenizer):
    pair = make(tokenizer, {"prompt": "the quick", "chosen": " brown fox", "rejected": " dog"})
    assert said(tokenizer, pair.chosen) == ("the quick", " brown fox<|im_end|>")
    assert said(tokenizer, pair.rejected) == ("the quick", " dog<|im_end|>")
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == ("the quick", " brown fox", " dog")


CHAT = "<|im_start|>user\nthe quick fox<|im_end|>\n<|im_start|>assistant\n"
MESSAGE_ROWS = {
    "lists beside a prompt": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "whole conversations and a prompt string": {
        "prompt": "the quick fox", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD],
    },
    "whole conversations and a prompt list": {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "one message each": {"prompt": [ASKED], "chosen": GOOD, "rejected": BAD},
    "strings beside a prompt list": {"prompt": [ASKED], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "a string and a list": {"prompt": "the quick fox", "chosen": [GOOD], "rejected": BAD["content"]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "the quick fox"}],
        "chosen": {"from": "gpt", "value": GOOD["content"]}, "rejected": {"from": "gpt", "value": BAD["content"]},
    },
    "ShareGPT with strings": {
        "conversations": [{"from": "human", "value": "the quick fox"}],
        "chosen": GOOD["content"], "rejected": BAD["content"],
    },
    "instruction": {"instruction": "the quick fox", "chosen": GOOD["content"], "rejected": BAD["content"]},
}  # fmt: skip


@pytest.mark.parametrize("shape", MESSAGE_ROWS)
def test_every_message_shape_goes_through_the_template(tokenizer, shape):
    pair = make(tokenizer, MESSAGE_ROWS[shape])
    assert said(tokenizer, pair.chosen) == (CHAT, f"{GOOD['content']}<|im_end|>")
    assert said(tokenizer, pair.rejected) == (CHAT, f"{BAD['content']}<|im_end|>")
    assert (pair.prompt_text, pair.rejected_text) == (CHAT, f"{BAD['content']}<|im_end|>")


def test_only_the_branch_is_the_response_in_a_dialogue(tokenizer):
    row = {
        "conversations": [
            {"from": "system", "value": "wise owls"}, {"from": "human", "value": "an old oak"},
            {"from": "gpt", "value": "tree"}, {"from": "human", "value": "the quick fox"},
        ],
        "chosen": {"from": "gpt", "value": GOOD["content"]}, "rejected": {"from": "gpt", "value": BAD["content"]},
    }  # fmt: skip
    before = "<|im_start|>system\nwise owls<|im_end|>\n<|im_start|>user\nan old oak<|im_end|>\n"
    before += "<|im_start|>assistant\ntree<|im_end|>\n"
    pair = make(tokenizer, row)
    assert said(tokenizer, pair.chosen) == (before + CHAT, f"{GOOD['content']}<|im_end|>")


def test_a_branch_of_several_turns_has_several_responses(tokenizer):
    row = {"prompt": [ASKED], "chosen": [GOOD, ASKED, BAD], "rejected": [BAD]}
    labels = [label for label in make(tokenizer, row).chosen.labels if label != -100]
    assert tokenizer.decode(labels) == f"{GOOD['content']}<|im_end|>{BAD['content']}<|im_end|>"


def test_the_prompt_is_what_both_texts_begin_with_up_to_a_word(tokenizer):
    row = {"chosen": "the quick brown fox", "rejected": "the quick bricks"}
    rows = branch_rows(row, {})
    assert (rows["chosen"]["prompt"], rows["chosen"]["completion"]) == ("the quick", " brown fox")
    assert rows["rejected"]["completion"] == " bricks"


def test_branches_that_begin_alike_keep_their_own_beginning(tokenizer):
    pair = make(tokenizer, {"prompt": "the", "chosen": " quick fox jumps", "rejected": " quick fox watch"})
    assert said(tokenizer, pair.chosen)[1] == " quick fox jumps<|im_end|>"
    assert said(tokenizer, pair.rejected)[1] == " quick fox watch<|im_end|>"


def test_token_ids_are_taken_as_they_are(tokenizer):
    row = {
        "chosen_input_ids": [5, 6, 7, 8], "chosen_labels": [-100, -100, 7, 8],
        "rejected_input_ids": [5, 6, 9], "rejected_labels": [-100, -100, 9],
    }  # fmt: skip
    pair = make(tokenizer, row, chat="always")
    assert pair.chosen.labels == [-100, -100, 7, 8] and pair.rejected.input_ids == [5, 6, 9]
    assert pair.chosen_text == tokenizer.decode([7, 8])


def test_named_columns_and_ids(tokenizer):
    row = {"question": "the quick", "good": "fox", "bad": "dog", "number": 7}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "id": "number"}
    pair = make(tokenizer, row, columns=columns)
    assert pair.chosen.id == pair.rejected.id == "7" and pair.prompt_text == "the quick"


def test_the_template_is_used_for_strings_when_asked(tokenizer):
    pair = make(tokenizer, {"prompt": ASKED["content"], "chosen": GOOD["content"], "rejected": "owls"}, chat="always")
    assert said(tokenizer, pair.chosen)[0] == CHAT == pair.prompt_text


TEXT = {"prompt": "the", "chosen": "fox", "rejected": "dog"}
REFUSED = [
    ({**TEXT, "rejected": "fox"}, "identical_branches"),
    ({**TEXT, "chosen": "  "}, "empty_branch: chosen"),
    ({**TEXT, "rejected": None}, "empty_branch: rejected"),
    ({**TEXT, "rejected": []}, "empty_branch: rejected"),
    ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": ""}]}, "empty_branch: rejected"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "empty_branch: rejected"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "identical_branches"),
    ({"chosen": "the fox", "rejected": "the fox"}, "identical_branches"),
    ({"chosen": "fox", "rejected": "dog"}, "no_prompt"),
    ({"chosen": [ASKED, GOOD], "rejected": [BAD]}, "no_prompt"),
    ({"prompt": "something else", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "prompt_mismatch"),
    ({"prompt": [{"role": "user", "content": "else"}], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "prompt_mismatch"),
    ({"prompt": "the", "completion": "fox"}, "not_a_pair"),
    ({**TEXT, "chosen": 5}, "wrong_type"),
    ({**TEXT, "prompt": 5}, "wrong_type: chosen"),
    ({"prompt": [ASKED], "chosen": [{"role": "robot", "content": "x"}], "rejected": [BAD]}, "unknown_role"),
    (
        {"chosen_input_ids": [5, 6], "chosen_labels": [-100], "rejected_input_ids": [5, 7], "rejected_labels": [-100, 7]},
        "lengths_differ: chosen",
    ),
    ([1, 2], "wrong_type"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_what_is_no_pair_is_refused_with_the_reason(tokenizer, row, reason):
    with pytest.raises(Unusable, match=f"^{reason}"):
        make(tokenizer, row)


def test_branches_that_differ_only_beyond_the_cut_are_identical(tokenizer):
    row = {"prompt": "the quick brown", "chosen": " fox jumps over a", "rejected": " fox jumps over seven"}
    assert make(tokenizer, row).chosen.input_ids != make(tokenizer, row).rejected.input_ids
    with pytest.raises(Unusable, match=r"^identical_branches: .*data\.max_length"):
        make(tokenizer, row, max_length=5)


REPEATED = [{"prompt": "the quick", "chosen": "the quick fox", "rejected": f"the quick {w}"} for w in ("dog", "owls")]
OWN = {"prompt": "an old", "chosen": " oak", "rejected": " tree"}


def test_a_prompt_that_all_pairs_repeat_stands_once(reader):
    read = reader.rows([*REPEATED, {"prompt": "", "chosen": " oak", "rejected": " tree"}, {"text": "no pair"}])
    assert read.notes == {"prompt_stripped": 2} and list(read.refused) == [3]
    assert (read.text(0, "chosen_"), read.responses(0, "chosen_")) == ("the quick fox<|im_end|>", [" fox<|im_end|>"])
    assert read.used[1]["prompt"] == "the quick" and read.used[1]["rejected"] == " owls"


def test_a_prompt_that_some_pairs_repeat_is_kept_and_counted(reader):
    read = reader.rows([*REPEATED, OWN])
    assert read.notes == {"prompt_repeated": 2}
    assert read.used[0]["chosen"] == "the quick fox" and read.responses(2, "chosen_") == [" oak<|im_end|>"]


def test_a_prompt_that_one_branch_alone_repeats_is_kept(reader):
    read = reader.rows([{**OWN, "chosen": "an old oak"}])
    assert read.notes == {} and read.used[0]["chosen"] == "an old oak"


def test_a_prompt_that_all_completions_repeat_stands_once_unless_it_is_to_be_kept(reader):
    rows = [{"q": "the quick", "response": "the quick fox"}, {"q": "an old", "response": "an old oak"}]
    read = reader.rows(rows, columns={"prompt": "q"})
    assert read.text(1) == "an old oak<|im_end|>" and read.responses(1) == [" oak<|im_end|>"]
    kept = reader.rows(rows, columns={"prompt": "q"}, repeated_prompt="keep")
    assert kept.notes == {"prompt_repeated": 2} and kept.text(1) == "an oldan old oak<|im_end|>"


def test_a_pair_that_adds_nothing_to_the_prompt_is_refused(reader):
    read = reader.rows([*REPEATED, {**REPEATED[0], "rejected": "the quick"}])
    assert read.refused == {2: "empty_branch: rejected is blank"}


def test_turns_before_the_instruction_of_a_pair_belong_to_the_prompt(reader):
    row = {
        "instruction": "the quick fox",
        "chosen": "a lazy dog",
        "rejected": "owls",
        "history": [["an old oak", "tree"]],
    }
    for template, before in ((CHATML, "assistant\ntree<|im_end|>"), (None, "### Response:\ntree")):
        read = reader.rows([row], template)
        assert before in read.text(0, "chosen_") and before in read.text(0, "rejected_")
        assert read.responses(0, "chosen_") == ["a lazy dog<|im_end|>"] and read.notes == {}


def test_whether_prompts_are_repeated_is_known_from_the_first_row_that_does_not(reader, monkeypatch):
    from alphatoken.pipeline.prepare import repeated

    read, decode = [], repeated.decode
    monkeypatch.setattr(repeated, "decode", lambda table: (read.append(row) or row for row in decode(table)))
    chat = [{"messages": [ASKED, GOOD]}]
    for rows, few in (
        ([*REPEATED[:1], OWN, *REPEATED * 500], 2),
        (chat * 1000, 1),
        ([{**OWN, "prompt": ""}] * 1000, 256),
    ):
        read.clear()
        reader.rows(rows)
        assert len(read) == few
