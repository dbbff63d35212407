"""Which shape a raw row has, and which rows are refused with which reason."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.prepare.rows import (
    Conversation,
    Plain,
    Pretokenized,
    TemplateRequired,
    Unusable,
    needs_template,
    parse_row,
    require_template,
    row_kind,
)

USER, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def parse(row, columns=None, chat="auto", has_template=True):
    return parse_row(row, columns or {}, chat, has_template)


@pytest.mark.parametrize(
    ("names", "columns", "kind"),
    [
        (["messages", "id"], {}, "messages"),
        (["prompt", "response"], {}, "prompt_completion"),
        (["prompt", "completion", "score"], {}, "prompt_completion"),
        (["instruction", "input", "output", "text"], {}, "instruction"),
        (["conversations", "system", "tools"], {}, "sharegpt"),
        (["input_ids", "labels", "attention_mask"], {}, "pretokenized"),
        (["prompt", "chosen", "rejected", "messages"], {}, "preference"),
        (["conversations", "chosen", "rejected"], {}, "preference"),
        (["text"], {}, "unknown"),
        (["prompt"], {}, "unknown"),
        (["q", "a"], {"prompt": "q", "completion": "a"}, "prompt_completion"),
        (["q", "a", "messages"], {"prompt": "q", "completion": "a"}, "prompt_completion"),
        (["prompt", "completion"], {"prompt": "q"}, "unknown"),
        (["messages"], {"messages": ""}, "messages"),
    ],
)
def test_the_kind_follows_from_the_column_names(names, columns, kind):
    assert row_kind(names, columns) == kind


def test_every_assistant_message_is_a_response():
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, SAID, USER, SAID]}
    assert parse(row) == Conversation(row["messages"], None, (2, 4))


def test_only_the_completions_assistant_messages_are_responses_of_message_lists():
    assert parse({"prompt": [USER, SAID, USER], "completion": [SAID]}).respond == (3,)
    assert parse({"prompt": [USER, SAID, USER], "response": [SAID, USER, SAID]}).respond == (3, 5)
    assert parse({"prompt": "2+2?", "completion": [SAID]}) == Conversation([USER, SAID], None, (1,))
    assert parse({"prompt": [USER], "completion": "4"}) == Conversation([USER, SAID], None, (1,))


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "2+", "image": None}, {"type": "text", "text": "2?"}]
    assert parse({"messages": [{"role": "user", "content": parts}, SAID]}).messages == [USER, SAID]
    with pytest.raises(Unusable, match=r"^not_text: messages\[0\].content has a part of type 'image'"):
        parse({"messages": [{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}, SAID]})


def test_json_text_is_decoded_for_messages_and_tools():
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": json.dumps([USER, SAID]), "tools": json.dumps(tools)}
    assert parse(row) == Conversation([USER, SAID], tools, (1,))
    assert parse({"messages": [USER, SAID], "tools": ""}).tools is None
    assert parse({"messages": [USER, SAID], "tools": "[]"}).tools is None


def test_a_tool_call_needs_no_content_and_null_keys_say_nothing_but_in_its_arguments():
    called = {**CALL, "function": {**CALL["function"], "arguments": {"a": 2, "b": 2, "c": None}}}
    call = {**called, "id": None, "function": {**called["function"], "strict": None}}
    turns = [
        {**USER, "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {**SAID, "tool_calls": []},
    ]
    parsed = parse({"messages": turns})
    assert parsed.messages == [USER, {"role": "assistant", "tool_calls": [called]}, turns[2], SAID]
    assert parsed.respond == (1, 3)


def test_sharegpt_names_become_roles():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4", "weight": 1, "role": None},
    ]
    parsed = parse({"conversations": turns})
    assert [message["role"] for message in parsed.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert parsed.messages[2] == {"role": "assistant", "tool_calls": [CALL]}
    assert parsed.messages[4] == SAID
    assert parsed.respond == (2, 4)
    assert parse({"conversations": [USER, SAID]}).messages == [USER, SAID]


def test_a_system_column_goes_first_unless_a_system_message_does():
    said = {"role": "system", "content": "Be brief."}
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    assert parse({"conversations": turns, "system": "Be brief."}) == Conversation([said, USER, SAID], None, (2,))
    assert parse({"conversations": [said, *turns], "system": "Ignored"}).messages == [said, USER, SAID]
    assert parse({"messages": [USER, SAID], "system": "gpt-4"}).messages == [USER, SAID]
    named = parse({"messages": [USER, SAID], "persona": "Be brief."}, {"system": "persona"})
    assert named.messages == [said, USER, SAID]
    prefixed = parse({"prompt": [USER, SAID, USER], "completion": [SAID], "s": "Be brief."}, {"system": "s"})
    assert prefixed.respond == (4,)


def test_plain_strings_are_taken_as_they_are_unless_the_template_is_asked_for():
    row = {"prompt": "2+2?", "completion": "4"}
    for chat, has_template in (("auto", True), ("auto", False), ("never", True)):
        assert parse(row, chat=chat, has_template=has_template) == Plain("2+2?", "4")
    assert parse(row, chat="always") == Conversation([USER, SAID], None, (1,))
    assert parse({"prompt": "", "response": "4"}) == Plain("", "4")


def test_instructions_use_the_template_or_the_alpaca_wording():
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    asked = {"role": "user", "content": "Add.\n\n2 2"}
    assert parse(row) == Conversation([asked, SAID], None, (1,))
    with_system = parse({**row, "input": None, "system": "Be brief."})
    assert [m["content"] for m in with_system.messages] == ["Be brief.", "Add.", "4"]
    assert with_system.respond == (2,)
    wording = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n2 2\n\n### Response:\n"
    )
    assert parse(row, has_template=False) == parse(row, chat="never") == Plain(wording, "4")
    short = parse({"instruction": "Add.", "input": "", "output": "4"}, has_template=False)
    assert short.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    spoken = parse({"instruction": "Add.", "output": "4", "system": "Be brief."}, chat="never")
    assert spoken.prompt == "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n"


def test_null_columns_count_as_absent():
    row = {
        "messages": None,
        "input_ids": None,
        "labels": None,
        "prompt": "2+2?",
        "completion": None,
        "response": "4",
    }
    assert parse(row) == Plain("2+2?", "4")


def test_token_ids_are_passed_on():
    assert parse({"input_ids": [1, 2], "labels": [-100, 2]}) == Pretokenized([1, 2], [-100, 2])


def test_a_preference_row_is_read_as_supervised_only_where_it_is_that_too():
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert parse({**pair, "messages": [USER, SAID]}) == Conversation([USER, SAID], None, (1,))
    with pytest.raises(Unusable, match=r"^preference_row: "):
        parse(pair)


@pytest.mark.parametrize(
    ("row", "chat", "has_template", "wanted"),
    [
        ({"messages": [USER, SAID]}, "auto", False, "tokenizer of model.policy has none"),
        ({"messages": [USER, SAID]}, "never", True, "data.chat_template=never"),
        ({"conversations": [USER, SAID]}, "auto", False, "tokenizer of model.policy has none"),
        ({"prompt": [USER], "completion": [SAID]}, "never", True, "data.chat_template=never"),
        ({"prompt": "2+2?", "completion": "4"}, "always", False, "data.chat_template=always"),
        ({"instruction": "Add.", "output": "4"}, "always", False, "data.chat_template=always"),
    ],
)
def test_chat_data_without_a_usable_template_is_a_configuration_error(row, chat, has_template, wanted):
    with pytest.raises(TemplateRequired, match=wanted) as caught:
        parse(row, chat=chat, has_template=has_template)
    assert not isinstance(caught.value, Unusable)
    with pytest.raises(TemplateRequired, match="model.policy.*data.chat_template"):
        require_template(row_kind(row, {}), row, {}, chat, has_template)


def test_what_needs_a_template_is_known_from_one_row():
    assert needs_template("preference", {"prompt": "a", "chosen": [SAID], "rejected": [SAID]}, {}, "auto")
    assert not needs_template("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "auto")
    assert not needs_template("instruction", {"instruction": "a", "output": "b"}, {}, "auto")
    assert not needs_template("pretokenized", {"input_ids": [1], "labels": [1]}, {}, "always")
    require_template("pretokenized", {"input_ids": [1], "labels": [1]}, {}, "always", False)


def said(content, **more):
    return {"messages": [USER, {"role": "assistant", "content": content, **more}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "4"}, r"unknown_columns: \['text'\] is none of messages"),
        ({}, r"unknown_columns: \[\]"),
        ({"messages": []}, "no_response: messages is empty"),
        ({"messages": [USER]}, "no_response: no assistant message"),
        ({"prompt": [USER, SAID], "completion": [USER]}, "no_response: no assistant message"),
        ({"messages": 3}, "wrong_type: messages is int, not a list of messages"),
        ({"messages": "not json"}, "wrong_type: messages is a string that is not JSON"),
        ({"messages": "[" * 100_000}, "too_deep"),
        ({"messages": [None]}, r"wrong_type: messages\[0\] is null, not a message"),
        ({"messages": [[USER], SAID]}, r"wrong_type: messages\[0\] is list"),
        ({"messages": [{"content": "2+2?"}, SAID]}, r"missing_role: messages\[0\]"),
        ({"messages": [{"role": None, "content": "2+2?"}, SAID]}, r"missing_role: messages\[0\]"),
        ({"messages": [{"role": 1, "content": "2+2?"}, SAID]}, r"wrong_type: messages\[0\].role is int"),
        (
            {"messages": [{"role": "bot", "content": "2+2?"}, SAID]},
            r"unknown_role: messages\[0\] has role 'bot'",
        ),
        ({"conversations": [{"from": "bot", "value": "?"}]}, r"unknown_role: conversations\[0\]"),
        ({"conversations": [{"value": "?"}]}, r"missing_role: conversations\[0\]"),
        ({"conversations": [{"from": "human"}]}, r"wrong_type: conversations\[0\].content is null"),
        ({"conversations": ["?"]}, r"wrong_type: conversations\[0\] is str"),
        (
            {"conversations": [{"from": "function_call", "value": '{"a": 1}'}]},
            r"wrong_type: conversations\[0\] is a function_call without a name",
        ),
        (
            {"messages": [{"role": "user", "content": None}, SAID]},
            r"wrong_type: messages\[0\].content is null",
        ),
        ({"messages": [{"role": "user", "content": 4}, SAID]}, r"wrong_type: messages\[0\].content is int"),
        (
            {"messages": [{"role": "user", "content": ["4"]}, SAID]},
            r"wrong_type: a part of messages\[0\].content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, SAID]},
            r"wrong_type: the text of a part of messages\[0\].content is null",
        ),
        (said(""), r"empty_response: messages\[1\] is blank"),
        (said(" \n"), r"empty_response: messages\[1\] is blank"),
        (said(None), r"empty_response: messages\[1\] is blank"),
        (said(None, tool_calls=[]), r"empty_response: messages\[1\] is blank"),
        (said(None, tool_calls=["add"]), r"wrong_type: messages\[1\].tool_calls is list"),
        (said("4", tool_calls=3), r"wrong_type: messages\[1\].tool_calls is int"),
        ({"messages": [USER, SAID], "tools": [1]}, "wrong_type: tools is list"),
        ({"messages": [USER, SAID], "tools": "add"}, "wrong_type: tools is a string that is not JSON"),
        ({"prompt": "2+2?", "completion": " "}, "empty_response: completion is blank"),
        ({"prompt": "2+2?", "completion": 4}, "wrong_type: completion is int"),
        ({"prompt": {"a": 1}, "completion": "4"}, "wrong_type: prompt is dict"),
        ({"instruction": "Add.", "output": ""}, "empty_response: output is blank"),
        ({"instruction": 1, "output": "4"}, "wrong_type: instruction is int"),
        ({"instruction": "Add.", "input": [], "output": "4"}, "wrong_type: input is list"),
        ({"conversations": [USER, SAID], "system": 3}, "wrong_type: system is int"),
        ({"input_ids": [1, None], "labels": [1, 2]}, r"wrong_type: input_ids\[1\] is null, not an integer"),
        ({"input_ids": [1, 2], "labels": [1, True]}, r"wrong_type: labels\[1\] is bool"),
        ({"input_ids": "1 2", "labels": [1, 2]}, "wrong_type: input_ids is str"),
    ],
)
def test_malformed_rows_are_refused_with_a_reason(row, reason):
    with pytest.raises(Unusable, match=f"^{reason}") as caught:
        parse(row)
    assert caught.value.code == reason.partition(":")[0]


def test_plain_text_has_no_place_for_a_named_system_column():
    row = {"prompt": "2+2?", "completion": "4", "s": "Be brief."}
    with pytest.raises(Unusable, match=r"^system_without_template: "):
        parse(row, {"system": "s"})
    assert parse(row, {"system": "s"}, chat="always").messages[0]["role"] == "system"


def test_a_reason_is_one_short_storable_line_and_survives_pickling():
    reason = Unusable("unknown_role: '\ud800'\n" + "x" * 1000)
    assert pickle.loads(pickle.dumps(reason)).code == "unknown_role"
    assert len(str(reason)) <= 400 and "\n" not in str(reason) and str(reason).encode("utf-8")


ALPACA = {"instruction": "Add.", "input": "2 2", "output": "4"}
HISTORIES = [
    [["2+2?", "4"], ["3+3?", "6"]],
    json.dumps([["2+2?", "4"], ["3+3?", "6"]]),
    [USER, SAID, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}],
    [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, ["2+2?", "4", "3+3?", "6"], strict=True)],
]  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES, ids=["pairs", "text", "messages", "sharegpt"])
def test_the_history_of_an_instruction_is_its_earlier_turns(history):
    parsed = parse({**ALPACA, "history": history, "system": "Be brief."})
    assert [m["content"] for m in parsed.messages] == ["Be brief.", "2+2?", "4", "3+3?", "6", "Add.\n\n2 2", "4"]
    assert parsed.respond == (2, 4, 6)
    plain = parse({**ALPACA, "history": history}, has_template=False)
    assert plain.prompt.partition("completes the request.")[2] == (
        "\n\n### Instruction:\n2+2?\n\n### Response:\n4\n\n### Instruction:\n3+3?\n\n### Response:\n6"
        "\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n"
    )
    assert plain.completion == "4"


def test_history_comes_through_files_of_every_kind(reader, tmp_path):
    rows = [{**ALPACA, "history": [["the quick", "fox"]]}, {**ALPACA, "history": []}, {**ALPACA, "history": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text(
        'instruction,output,history\nAdd.,4,"[[""the quick"", ""fox""]]"\nAdd.,4,\nAdd.,4,[]\n'
    )
    for read in (reader.rows(rows), reader(tmp_path / "x.parquet"), reader(tmp_path / "x.csv")):
        assert [read.responses(row) for row in range(3)] == [["fox<|im_end|>", "4<|im_end|>"], *[["4<|im_end|>"]] * 2]


@pytest.mark.parametrize("history", [3, "x", [["2+2?"]], [["2+2?", "4", "5"]], [["2+2?", 4]], ["2+2?"], [["2+2?", ""]]])
def test_a_history_that_is_none_is_refused(history):
    with pytest.raises(Unusable, match=r"history"):
        parse({**ALPACA, "history": history})
