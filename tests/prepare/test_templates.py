"""Every popular family of chat templates: which text is a response, and what the guard says of the rest."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alphatoken.pipeline.prepare.rows import Unusable
from alphatoken.pipeline.prepare.tokenize import ExampleMaker, usable
from tests.prepare.chat_templates import (
    CHATML,
    DEEPSEEK_V3,
    FAMILIES,
    GPT_OSS,
    MISTRAL_V3,
    PHI_3,
    QWEN_3,
    SMOLLM_3,
    Family,
)
from tests.prepare.response_texts import responses

WITH_TOOLS = [name for name, family in FAMILIES.items() if family.called]
WITH_CALLS = [name for name in WITH_TOOLS if FAMILIES[name].call is None]  # under the usual key
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def tokenizer_of(family: Family, **flags):
    """A tokenizer of single bytes and the family's special tokens, so that no token reaches over a boundary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False, **flags) for t in family.specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=family.eos, bos_token=family.bos)
    tokenizer.chat_template = family.template
    if family.tool_use:
        tokenizer.chat_template = {"default": family.template, "tool_use": family.tool_use}
    return tokenizer


_MAKERS: dict[str, tuple] = {}


def made(name_or_family, row, turns=False):
    """The response texts of a row under a family's template, and the example or examples."""
    family = FAMILIES[name_or_family] if isinstance(name_or_family, str) else name_or_family
    if family.template not in _MAKERS:
        tokenizer = tokenizer_of(family)
        _MAKERS[family.template] = tokenizer, ExampleMaker(tokenizer, 4096, "auto", {}, len(tokenizer))
    tokenizer, make = _MAKERS[family.template]
    if turns:
        examples = usable(make.finished(make.drafts(row, "a", turn_by_turn=True)))
        return [(responses(tokenizer, example), example) for example in examples]
    example = make(row, "a")
    return responses(tokenizer, example), example


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def conversation(pairs, system=None):
    turns = [said("system", system)] if system is not None else []
    return {"messages": turns + [m for q, a in pairs for m in (said("user", q), said("assistant", a))]}


def with_call(arguments, more=(), message=None):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = message or {"role": "assistant", "tool_calls": [call]}
    turns = [
        said("system", "Be brief."), said("user", "What is it?"), message,
        said("tool", "4", tool_call_id="abcdefghi", name="f"), said("assistant", "four"), *more,
    ]  # fmt: skip
    return {"messages": turns, "tools": [TOOL]}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_turn_is_a_response_with_its_end(name, system, count):
    answers = ["An answer.", "So?\nOr not.", "four"][:count]
    found, _ = made(name, conversation([(f"Question {i}?", a) for i, a in enumerate(answers)], system))
    assert found == FAMILIES[name].expected(answers)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_and_the_answers_to_their_results_are_responses(name):
    family = FAMILIES[name]
    assert made(name, with_call({"x": 1}, message=family.call))[0] == [family.called, family.answered]
    more = [said("user", "And else?"), said("assistant", "five")]
    longer, _ = made(name, with_call({"x": 1}, more, family.call))
    assert longer[0].endswith(family.called) and "four" in longer[1] and "five" in longer[2] and len(longer) == 3


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(WITH_CALLS)))
def test_calls_that_a_template_does_not_know_are_said(name):
    with pytest.raises(Unusable, match="^tools_not_in_template: "):
        made(name, with_call({"x": 1}))


@pytest.mark.parametrize("name", WITH_CALLS)
def test_arguments_as_text_give_what_the_object_gives(name):
    assert made(name, with_call('{"x": 1}'))[1] == made(name, with_call({"x": 1}))[1]


def test_only_the_wanted_turns_are_responses():
    for name, family in FAMILIES.items():
        turns = conversation([("a?", "One."), ("b?", "Two.")], "Be brief.")["messages"]
        found, _ = made(name, {"prompt": turns[:-1], "completion": turns[-1:]})
        assert found == family.expected(["One.", "Two."])[-1:], name


def variant(template, **changes):
    return Family(template, CHATML.specials, "<|im_end|>", CHATML.expected, **changes)


NO_SYSTEM = variant(CHATML.template.replace("in messages", "in messages if m.role != 'system'"))


@pytest.mark.parametrize(
    "family,role", [(PHI_3, "tool"), (PHI_3, "developer"), (DEEPSEEK_V3, "developer"), (NO_SYSTEM, "system")]
)
def test_what_a_template_leaves_out_is_said(family, role):
    row = conversation([("What is it?", "four")])
    row["messages"].insert(1 if role == "tool" else 0, said(role, "four"))
    with pytest.raises(Unusable, match=rf"^not_in_template: the chat template leaves out `{role}` messages$"):
        made(family, row)


PARTS = variant(
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '\n' }}{%- for p in m.content -%}{%- if p.type == 'text' -%}"
    "{{ p.text }}{%- endif -%}{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def test_parts_are_handed_over_where_the_template_reads_parts():
    row = conversation([("What is it?", "An answer."), ("So?", "four")], "Be brief.")
    found, example = made(PARTS, row)
    assert found == ["An answer.<|im_end|>", "four<|im_end|>"]
    parts = {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]}
    assert made(PARTS, parts)[1] == example == made(CHATML, row)[1] == made(CHATML, parts)[1]


@pytest.mark.parametrize(
    "template,reason",
    [
        (CHATML.template.replace("m.content", "m.content | upper"), "rewrites|leaves out"),
        (CHATML.template.replace("m.content", "m.content[:3]"), "leaves out `user`"),
        (CHATML.template.replace("m.content", "m.content ~ m.content"), "writes `user` messages 2 times"),
        (CHATML.template.replace("in messages", "in messages | reverse"), "`assistant` messages in another order"),
        (CHATML.template.replace("in messages", "in messages[-2:]"), "leaves out `user` messages"),
        (CHATML.template.replace("m.content", "m.content | replace('n', 'm')"), "rewrites|leaves out"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "markers .* cover `user`",
        ),
        (
            CHATML.template.replace("{{", "{% generation %}{% endgeneration %}{{", 1),
            "generation markers .* leave out `assistant` messages",
        ),
    ],
)
def test_what_a_template_does_to_texts_is_a_reason(template, reason):
    row = conversation([("What is it?", "An answer."), ("So?", "four then")])
    with pytest.raises(Unusable, match=rf"^not_in_template: .*({reason})"):
        made(variant(template), row)


def test_a_template_that_raises_is_a_reason():
    with pytest.raises(Unusable, match="^template_error: .*nine letters"):
        row = with_call({"x": 1})
        row["messages"][2]["tool_calls"][0]["id"] = "1"
        made(MISTRAL_V3, row)


def test_a_system_text_may_switch_the_reasoning_off():
    for system in ("Be brief. /no_think", "/no_think", "Be brief./think"):
        found, example = made(SMOLLM_3, conversation([("a?", "One."), ("b?", "Two.")], system))
        assert found == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_a_user_text_that_the_template_looks_at_is_no_obstacle():
    row = conversation([("a?", "One."), ("<tool_response>4</tool_response>", "Two.")])
    found, _ = made(QWEN_3, row)
    assert found == ["One.<|im_end|>", "<think>\n\n</think>\n\nTwo.<|im_end|>"]


THOUGHTS = [("a?", "<think>\nhm\n</think>\n\nOne."), ("b?", "<think>\nso\n</think>\n\nTwo.")]


def test_reasoning_that_a_template_drops_is_counted_and_kept_turn_by_turn():
    row = {**conversation(THOUGHTS), "id": "r"}
    found, example = made(QWEN_3, row)
    assert found == ["One.<|im_end|>", "<think>\nso\n</think>\n\nTwo.<|im_end|>"] and example.lost == 1
    (first, one), (second, two) = made(QWEN_3, row, turns=True)
    assert first == ["<think>\nhm\n</think>\n\nOne.<|im_end|>"] and one.lost == 0 and one.id == "r#1"
    assert second == found[1:] and two.lost == 0 and two.id == "r#3"
    ((only, whole),) = made(QWEN_3, conversation(THOUGHTS[1:]), turns=True)
    assert only == found[1:] and whole.lost == 0 and whole.id == "a"


def test_reasoning_of_a_turn_that_calls_is_counted_once_a_question_follows_and_kept_turn_by_turn():
    row = {**with_call({"x": 1}), "id": "r"}
    row["messages"][2]["reasoning_content"] = "hm"
    found, example = made(QWEN_3, row)
    assert found[0] == "<think>\nhm\n</think>\n\n" + QWEN_3.called and example.lost == 0
    row["messages"] += [said("user", "And else?"), said("assistant", "five")]
    found, example = made(QWEN_3, row)
    assert found[0] == QWEN_3.called and example.lost == 1
    turns = made(QWEN_3, row, turns=True)
    assert [(texts, one.lost, one.id) for texts, one in turns] == [
        (["<think>\nhm\n</think>\n\n" + QWEN_3.called], 0, "r#2"), ([QWEN_3.answered], 0, "r#4"),
        (["<think>\n\n</think>\n\nfive<|im_end|>"], 0, "r#6"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", WITH_CALLS)
@pytest.mark.parametrize("asked", [False, True])
def test_reasoning_of_a_turn_that_calls_is_in_its_response_or_counted(name, asked):
    row = with_call({"x": 1}, [said("user", "And else?"), said("assistant", "five")] if asked else ())
    row["messages"][2]["reasoning_content"] = "hm"
    found, example = made(name, row)
    assert ("hm" in found[0]) == (example.lost == 0) and len(found) == 2 + asked
    assert found[0].endswith(FAMILIES[name].called.removeprefix("\n<think></think>"))


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_is_part_of_a_response_or_counted(name):
    family, answers = FAMILIES[name], ["One.", "Two."]
    row, thought = conversation([("a?", "One."), ("b?", "Two.")]), family.thought
    for turn in row["messages"][1::2]:
        turn["reasoning_content"] = "hm"
    found, example = made(name, row)
    assert (found, example.lost) == ((thought.key, thought.key_lost) if thought else (family.expected(answers), 2))
    written = [f"<think>\nhm\n</think>\n\n{answer}" for answer in answers]
    found, example = made(name, conversation(list(zip(["a?", "b?"], written, strict=True))))
    assert (found, example.lost) == ((thought.text, thought.text_lost) if thought else (family.expected(written), 0))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_keys_are_read_whatever_their_name_or_counted(key):
    row = conversation([("a?", "One."), ("b?", "Two.")])
    for turn in row["messages"][1::2]:
        turn[key] = "hm"
    assert made(QWEN_3, row)[0][1] == "<think>\nhm\n</think>\n\nTwo.<|im_end|>" and made(QWEN_3, row)[1].lost == 1
    harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>"
    assert made(GPT_OSS, row)[0][1] == harmony
    found, example = made(CHATML, row)
    assert found == ["One.<|im_end|>", "Two.<|im_end|>"] and example.lost == 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("begun,rest", [("Once", " upon a time."), ("Once ", "upon"), ("  Once\n", "\nupon")])
def test_a_completion_that_continues_the_prompt_is_its_rest_alone(name, begun, rest):
    turns = conversation([("a?", "One."), ("b?", begun)], "Be brief.")["messages"]
    found, example = made(name, {"prompt": turns, "completion": [said("assistant", rest)]})
    whole = FAMILIES[name].expected(["One.", begun + rest])[1]
    assert len(found) == 1 and found[0].startswith(rest.rstrip()) and whole.endswith(found[0])
    turns[-1]["content"] = begun + rest
    assert example.input_ids == made(name, {"messages": turns})[1].input_ids


@pytest.mark.parametrize("start", [" four", "\n four", "\n\nfour", "  \tfour "])
@pytest.mark.parametrize("family", [PHI_3, CHATML, MISTRAL_V3], ids=["Phi-3", "ChatML", "Mistral v3"])
def test_special_tokens_do_not_reach_into_a_response(family, start):
    """Phi-3's own tokens take the blanks after them; here they take those before as well."""
    for flags in ({"rstrip": True}, {"lstrip": True, "rstrip": True}):
        tokenizer = tokenizer_of(family, **flags)
        make = ExampleMaker(tokenizer, 4096, "auto", {}, len(tokenizer))
        example = make(conversation([("a?", start), ("b?", start)]), "a")
        found = [run.strip() for run in responses(tokenizer, example)]
        ends = family.expected(["", ""])
        assert [text.startswith("four") for text in found] == [True, True], found
        assert [re.sub(r"\s", "", text) for text in found] == [re.sub(r"\s", "", "four" + end) for end in ends]


SPECIALS = sorted({token for family in FAMILIES.values() for token in family.specials})
ODD = [
    "qzMark0z",
    "qzMark",
    "<think>",
    "</think>",
    "{{ x }}",
    "{% if %}",
    "\\n",
    "User:",
    "[/INST]",
    "USER: ",
    '"',
    "\u2028",
]
WORD = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(SPECIALS + ODD + [" ", "\n", "\t", "four"]),
)
TEXT = st.lists(WORD, min_size=1, max_size=4).map("".join)
ANSWER = TEXT.filter(str.strip)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(FAMILIES)), turns=st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3),
    system=st.none() | TEXT,
)  # fmt: skip
def test_labels_are_the_answers_and_their_ends_or_the_row_is_refused(name, turns, system):
    family = FAMILIES[name]
    try:
        found, example = made(name, conversation(turns, system))
    except Unusable:
        return
    answers = [answer for _, answer in turns]
    if name in ("Qwen3", "DeepSeek R1", "GLM-4.5") and any("</think>" in answer for answer in answers):
        return  # reasoning is cut out, which the tests above look at
    # Runs that nothing separates are one.
    assert "".join(found) == "".join(family.expected(answers))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    turns=st.lists(st.tuples(*[st.sampled_from(["four", " Two\n", "é 😀"])] * 2), min_size=1, max_size=4),
)
def test_everyday_rows_are_never_refused(name, turns):
    found, _ = made(name, conversation(turns, "Be brief."))
    assert "".join(found) == "".join(FAMILIES[name].expected([answer for _, answer in turns]))
