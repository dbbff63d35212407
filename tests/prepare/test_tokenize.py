"""Which tokens are response tokens, checked on small real tokenizers with templates of every kind."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alphatoken.pipeline.prepare.rows import TemplateRequired, Unusable
from alphatoken.pipeline.prepare.tokenize import Example, ExampleMaker
from tests.prepare.response_texts import responses

SENTENCES = [
    "The capital of France is Paris. Two and two make four.",
    "user asks and the assistant answers\n\nwith a system of tools",
    "What is it? It is an answer, and nothing else but an answer.",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|start|>", "<|end|>"]

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: reasoning is kept in the last assistant message alone, where there is always a <think> block.
FORGETFUL = (
    "{% for m in messages %}{% set said = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set answer = said.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last and '</think>' not in said %}{% set said = '<think>\n\n</think>\n\n' + answer %}"
    "{% elif not loop.last %}{% set said = answer %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3 with tools: reasoning is kept after the last question, so a later one changes what came before.
KEPT = "(m['content'].split('</think>')[-1 if loop.index0 < ns.last else 0:] | join('</think>'))"
KEEPS_LAST_STEPS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + CHATML.replace("m['content']", KEPT)
)
# Like DeepSeek-R1: the generation prompt opens a thought that finished turns do not have.
OPENED_THOUGHT = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
DATED = "{{ '[' + strftime_now('%d %b %Y, %-d %B') + ']\n' }}" + CHATML
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('User must go first') }}{% endif %}" + CHATML
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML.replace(
    "m['content'] +", "(m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') +"
)


@pytest.fixture(scope="module")
def trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def build(trained):
    """build(template, adds_bos, trims) -> a tokenizer; EOS is </s>, or the template's own end of turn."""

    def make(template=None, adds_bos=False, trims=False, eos=None, adds_eos=False):
        inner = Tokenizer.from_str(trained)
        if trims:
            inner.post_processor = processors.ByteLevel(trim_offsets=True)
        if adds_bos:
            single = "<s> $A </s>" if adds_eos else "<s> $A"
            inner.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
            )
        eos = eos or ("<|im_end|>" if template and "im_end" in template else "</s>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
        tokenizer.chat_template = template
        return tokenizer

    return make


def maker(tokenizer, max_length=512, chat="auto", columns=None):
    return ExampleMaker(tokenizer, max_length, chat, columns or {}, len(tokenizer))


def chat(*contents, first="user"):
    other = {"user": "assistant", "assistant": "user"}
    roles = [first if i % 2 == 0 else other[first] for i in range(len(contents))]
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}


def check(example, max_length=512, shift=0):
    """The invariants of every Example; ``shift`` moves the labels, to see that the check would notice."""
    labels = example.labels[shift:] + [-100] * shift
    assert len(labels) == len(example.input_ids) <= max_length
    assert labels[0] == -100 and any(label != -100 for label in labels)
    for index, (token, label) in enumerate(zip(example.input_ids, labels, strict=True)):
        assert label in (-100, token), f"label {index} is not of its own token"


@pytest.mark.parametrize("template", [CHATML, MARKED, OPENED_THOUGHT, FORGETFUL, DATED, STRICT])
@pytest.mark.parametrize("trims", [False, True])
def test_the_response_is_the_answer_and_its_end_of_turn(build, template, trims):
    tokenizer = build(template, trims=trims)
    example = maker(tokenizer)(chat("What is it?", "An answer.", "And else?", "Paris 😀 é"), "a.jsonl:0")
    check(example)
    last = "<think>\n\n</think>\n\nParis 😀 é" if template == FORGETFUL else "Paris 😀 é"
    assert responses(tokenizer, example) == ["An answer.<|im_end|>", last + "<|im_end|>"]


def test_labels_moved_by_one_fail_the_check(build):
    example = maker(build(CHATML))(chat("What is it?", "An answer."), "a")
    check(example)
    with pytest.raises(AssertionError):
        check(example, shift=1)


def test_a_response_that_the_prompt_contains_is_not_searched_for(build):
    tokenizer = build(CHATML)
    example = maker(tokenizer)(chat("four", "four", "say four", "four"), "a")
    assert responses(tokenizer, example) == ["four<|im_end|>"] * 2
    first = example.labels.index(next(label for label in example.labels if label != -100))
    assert tokenizer.decode(example.input_ids[:first]) == "<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_writes_bos_does_not_get_a_second_one(build):
    tokenizer = build(LLAMA, adds_bos=True)
    example = maker(tokenizer)(chat("What is it?", " An answer.\n", "So?", "four"), "a")
    assert example.input_ids.count(tokenizer.bos_token_id) == 1 and example.input_ids[0] == tokenizer.bos_token_id
    assert responses(tokenizer, example) == ["An answer.<|eot|>", "four<|eot|>"]
    assert (
        example.input_ids
        == tokenizer.apply_chat_template(
            chat("What is it?", " An answer.\n", "So?", "four")["messages"], return_dict=True
        )["input_ids"]
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("start", ["", "<s>", "<s><s>"])
@pytest.mark.parametrize("end", ["", "</s>", "</s></s>"])
def test_plain_text_has_one_bos_and_one_eos(build, adds_bos, adds_eos, start, end):
    tokenizer = build(adds_bos=adds_bos, adds_eos=adds_eos)
    example = maker(tokenizer)({"prompt": start + "The capital is", "completion": " Paris." + end}, "a")
    check(example)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert example.input_ids.count(bos) == (1 if adds_bos or start else 0)
    assert example.input_ids.count(eos) == 1 and example.labels[-1] == eos
    assert responses(tokenizer, example) == [" Paris.</s>"]


def test_a_token_across_the_boundary_belongs_to_the_response(build):
    tokenizer = build()
    ids = tokenizer("The capital of France is Paris", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in ids]
    long = next(i for i, piece in enumerate(pieces) if i and len(piece) > 2)
    cut = len("".join(pieces[:long])) + 1
    text = "".join(pieces)
    example = maker(tokenizer)({"prompt": text[:cut], "completion": text[cut:]}, "a")
    assert example.labels[: long + 1] == [-100] * long + [ids[long]]


@pytest.mark.parametrize("trims", [False, True])
def test_a_space_belongs_to_the_side_that_wrote_it(build, trims):
    tokenizer = build(trims=trims)
    for prompt, completion in (("it is", "  zq"), ("it is  ", "\nzq"), ("it is", " zq ")):
        example = maker(tokenizer)({"prompt": prompt, "completion": completion}, "a")
        assert responses(tokenizer, example) == [completion + "</s>"]


def test_bos_written_by_a_completion_without_prompt_is_not_doubled(build):
    tokenizer = build(adds_bos=True)
    example = maker(tokenizer)({"prompt": "", "completion": "<s>four"}, "a")
    check(example)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert responses(tokenizer, example) == ["four</s>"]


def test_only_the_completions_turns_count_also_with_markers(build):
    turns = chat("What is it?", "An answer.", "And else?", "four")["messages"]
    for template in (CHATML, MARKED):
        tokenizer = build(template)
        example = maker(tokenizer)({"prompt": turns[:3], "completion": turns[3:]}, "a")
        assert responses(tokenizer, example) == ["four<|im_end|>"]


def test_past_reasoning_that_the_template_removes_is_no_obstacle(build):
    tokenizer = build(FORGETFUL)
    row = chat("What is it?", "<think>\nhm\n</think>\n\nAn answer.", "So?", "<think>\nah\n</think>\n\nfour")
    example = maker(tokenizer)(row, "a")
    assert responses(tokenizer, example) == [
        "An answer.<|im_end|>",
        "<think>\nah\n</think>\n\nfour<|im_end|>",
    ]


def test_steps_whose_reasoning_a_later_question_removes_are_found(build):
    tokenizer = build(KEEPS_LAST_STEPS)
    row = chat("What is it?", "<think>hm</think>I ask.", "four", "<think>so</think>An answer.", "So?", "four")
    row["messages"][2]["role"] = "tool"
    example = maker(tokenizer)(row, "a")
    assert responses(tokenizer, example) == ["I ask.<|im_end|>", "An answer.<|im_end|>", "four<|im_end|>"]
    del row["messages"][4:]
    kept = ["<think>hm</think>I ask.<|im_end|>", "<think>so</think>An answer.<|im_end|>"]
    assert responses(tokenizer, maker(tokenizer)(row, "a")) == kept


def test_an_answer_that_looks_like_the_opened_thought_keeps_its_first_characters(build):
    tokenizer = build(OPENED_THOUGHT)
    example = maker(tokenizer)(chat("What is it?", "<thing>", "So?", "<think>\nfour"), "a")
    assert responses(tokenizer, example) == ["<thing><|im_end|>", "<think>\nfour<|im_end|>"]
    thought = maker(tokenizer)(chat("So?", "<think>\nhm</think>four"), "a")
    assert responses(tokenizer, thought) == ["hm</think>four<|im_end|>"]  # the prompt opens it


def test_turns_that_change_once_others_follow_are_found_all_the_same(build):
    forgotten = chat("What is it?", "An answer.", "So?", "four")
    last = "<think>\n\n</think>\n\nfour<|im_end|>"
    for eos in ("</s>", "<|im_end|>"):
        tokenizer = build(FORGETFUL, eos=eos)
        assert responses(tokenizer, maker(tokenizer)(forgotten, "a")) == ["An answer.<|im_end|>", last]
    tokenizer = build(FORGETFUL)
    ended_twice = chat("What is it?", "One.<|im_end|> Two.", "So?", "four")
    assert responses(tokenizer, maker(tokenizer)(ended_twice, "a"))[0] == "One.<|im_end|> Two.<|im_end|>"
    numbered = MARKED.replace("{% for", "{{ messages | length }}{% for", 1)
    for template in (numbered, numbered.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        tokenizer, turns = build(template), forgotten["messages"]
        example = maker(tokenizer)({"prompt": turns[:3], "completion": turns[3:]}, "a")
        assert responses(tokenizer, example) == ["four<|im_end|>"]


def test_without_a_place_for_each_text_the_row_is_refused(build):
    backwards = CHATML.replace("for m in messages", "for m in messages[::-1]")
    with pytest.raises(Unusable, match=r"^not_in_template: .* puts `assistant` messages in another order"):
        maker(build(backwards))(chat("What is it?", "An answer.", "So?", "four"), "a")
    header = CHATML.replace("'<|im_start|>' + m['role']", "'<|start|>' + (loop.length | string) + m['role']")
    with pytest.raises(
        Unusable, match=r"^template_not_prefix_stable: .*what comes before message 1.*generation %\} markers"
    ):
        maker(build(header))(chat("What is it?", "four"), "a")


def test_a_conversation_may_open_with_a_response_but_its_first_token_has_no_label(build):
    for template in (CHATML, MARKED, LLAMA):
        tokenizer = build(template)
        end = "<|eot|>" if template == LLAMA else "<|im_end|>"
        example = maker(tokenizer)(chat("Hello.", "What?", "four", first="assistant"), "a")
        assert responses(tokenizer, example) == ["Hello." + end, "four" + end]
    bare = build("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    check(maker(bare)(chat("Hello.", "What?", first="assistant"), "a"))


def test_the_date_in_a_template_stands_still(build):
    tokenizer = build(DATED)
    example = maker(tokenizer)(chat("What is it?", "four"), "a")
    assert tokenizer.decode(example.input_ids).startswith("[26 Jul 2024, 26 July]\n<|im_start|>")


def test_tools_reach_a_template_that_knows_them_and_no_other(build):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    tokenizer = build(WITH_TOOLS)
    example = maker(tokenizer)({"messages": turns, "tools": tools}, "a")
    called, said = responses(tokenizer, example)
    assert re.search(r'"name": ?"add".*<\|im_end\|>$', called) and said == "four<|im_end|>"
    for row in ({"messages": turns}, {"messages": turns[:1] + turns[3:], "tools": tools}):
        with pytest.raises(Unusable, match=r"^tools_not_in_template: "):
            maker(build(CHATML))(row, "a")


def test_truncation_cuts_from_the_right_and_says_so(build):
    tokenizer = build(CHATML)
    row = chat("What is it?", "It is an answer, and nothing else but an answer.")
    whole = maker(tokenizer)(row, "a")
    assert not whole.truncated and not maker(tokenizer, len(whole.input_ids))(row, "a").truncated
    first = next(i for i, label in enumerate(whole.labels) if label != -100)
    cut = maker(tokenizer, first + 1)(row, "a")
    assert cut.truncated and cut.input_ids == whole.input_ids[: first + 1] and cut.labels[-1] != -100
    with pytest.raises(Unusable, match=rf"^no_response: truncated away, .* {first} and data.max_length={first}$"):
        maker(tokenizer, first)(row, "a")


def test_token_ids_from_elsewhere_are_checked(build):
    make = maker(build(), max_length=4)
    assert make({"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, "a") == Example(
        "a", [5, 6, 7], [-100, -100, 7], "a", False
    )
    assert make({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}, "a").truncated
    for ids, labels, reason in [
        ([5, 6], [-100], "lengths_differ: 2 input_ids and 1 labels"),
        ([5, 6], [-100, 7], r"label_mismatch: labels\[1\]=7"),
        ([5, -1], [-100, -1], r"outside_vocabulary: input_ids\[1\]=-1"),
        ([5, 6, 10**6], [-100, 6, -100], r"outside_vocabulary: input_ids\[2\]=1000000"),
        ([5, 6], [-100, -100], "no_response: no token after the first"),
        ([5], [5], "no_response: no token after the first"),
        ([], [], "no_response: no token after the first"),
        ([5, 6, 7, 8, 9], [-100, -100, -100, -100, 9], "no_response: truncated away"),
    ]:
        with pytest.raises(Unusable, match=f"^{reason}"):
            make({"input_ids": ids, "labels": labels}, "a")


def test_the_id_is_the_rows_own_or_the_source(build):
    row = chat("What is it?", "four")
    make, named = maker(build(CHATML)), maker(build(CHATML), columns={"id": "key"})
    assert [make({**row, "id": i}, "a:3").id for i in ("x", 7, None, "", [1], True)] == [
        "x",
        "7",
        *["a:3"] * 4,
    ]
    assert named({**row, "id": "no", "key": "yes"}, "a:3").id == "yes" and named(row, "a:3").id == "a:3"
    assert make(row, "a:3").source == "a:3"
    with pytest.raises(Unusable, match=r"^wrong_type: id is list"):
        named({**row, "key": [1]}, "a:3")
    with pytest.raises(Unusable, match=r"^bad_unicode: id"):
        make({**row, "id": "\ud800"}, "a:3")


class Picky:
    """A tokenizer that takes one text only."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        if text != "a":
            raise TypeError("not this text")
        return self.tokenizer(text, **options)


def test_what_a_template_or_tokenizer_refuses_is_a_reason(build):
    with pytest.raises(Unusable, match=r"^template_error: TemplateError: User must go first"):
        maker(build(STRICT))(chat("Hello.", "What?", first="assistant"), "a")
    with pytest.raises(Unusable, match=r"^bad_unicode: the text has a lone surrogate at character 18"):
        maker(build(CHATML))(chat("x\ud800", "four"), "a")
    with pytest.raises(Unusable, match=r"^bad_unicode: "):
        maker(build())({"prompt": "x", "completion": "\udfff"}, "a")
    with pytest.raises(Unusable, match=r"^wrong_type: the row is list"):
        maker(build())([1], "a")
    with pytest.raises(Unusable, match=r"^tokenizer_refused: TypeError: not this text"):
        ExampleMaker(Picky(build()), 64, "auto", {}, 500)({"prompt": "x", "completion": "y"}, "a")


def test_what_can_never_work_is_said_with_its_remedy(build):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="needs a fast one .*tokenizer.json"):
        ExampleMaker(Slow(), 8, "auto", {}, 100)
    with pytest.raises(ValueError, match="data.chat_template='yes' is none of auto, always, never"):
        maker(build(), chat="yes")
    with pytest.raises(ValueError, match="data.max_length=1"):
        maker(build(), max_length=1)
    with pytest.raises(TemplateRequired):
        maker(build())(chat("What is it?", "four"), "a")
    endless = build()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no EOS token") as caught:
        maker(endless)({"prompt": "x", "completion": "y"}, "a")
    assert not isinstance(caught.value, Unusable)


LITTLE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = [
    *("messages", "prompt", "completion", "response", "instruction", "input", "output", "conversations"),
    *("input_ids", "labels", "id", "tools", "system", "chosen", "rejected"),
]
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["four", "", "<|im_end|>", "<s>", "</s>", "[]", "\ud800"]))
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "bot", None, 3])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 600), st.floats(), WORDS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={"role": ROLE, "content": WORDS | JSON, "from": ROLE, "value": WORDS | JSON, "tool_calls": JSON},
)
VALUES = st.one_of(JSON, WORDS, st.lists(MESSAGE, max_size=4), st.lists(st.integers(-100, 500), max_size=5))
ANYTHING = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=4)
# Rows that are nearly right reach further into the code than arbitrary ones.
SAID = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "assistant", "tool"]), "content": WORDS})
SHAPED = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(SAID | MESSAGE, max_size=5)}, optional={"tools": JSON}),
    st.fixed_dictionaries({"conversations": st.lists(SAID | MESSAGE, max_size=4)}, optional={"system": WORDS}),
    st.fixed_dictionaries({"prompt": WORDS | st.lists(SAID), "completion": WORDS | st.lists(SAID)}),
    st.fixed_dictionaries({"instruction": WORDS, "output": WORDS}, optional={"input": WORDS, "id": SCALARS}),
    st.lists(st.integers(-1, 425), max_size=30).map(lambda ids: {"input_ids": ids, "labels": list(ids)}),
)
ROWS = ANYTHING | SHAPED
COLUMNS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["", *NAMES]), max_size=2)
TEMPLATES = st.sampled_from(
    [None, CHATML, LLAMA, MARKED, FORGETFUL, KEEPS_LAST_STEPS, OPENED_THOUGHT, STRICT, WITH_TOOLS]
)


@LITTLE
@given(row=ROWS, columns=COLUMNS, template=TEMPLATES, wish=st.sampled_from(["auto", "always", "never"]))
def test_any_row_gives_a_valid_example_or_a_reason(build, row, columns, template, wish):
    make = ExampleMaker(build(template, adds_bos=True), 24, wish, columns, 420)
    try:
        example = make(row, "a:0")
    except (Unusable, TemplateRequired) as refusal:
        assert re.match(r"[a-z_]+: |the rows", str(refusal)) and str(refusal).encode("utf-8")
    else:
        check(example, max_length=24)
        assert example.id.encode("utf-8") and max(example.input_ids) < 420


PLAIN_WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)
TURN = PLAIN_WORDS.map(str.strip).filter(bool)


@LITTLE
@given(
    turns=st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3),
    template=st.sampled_from([CHATML, LLAMA, MARKED, OPENED_THOUGHT]),
    trims=st.booleans(),
)
def test_any_answers_are_found_again_in_the_labels(build, turns, template, trims):
    tokenizer = build(template, trims=trims)
    example = maker(tokenizer)(chat(*[said for turn in turns for said in turn]), "a")
    check(example)
    end = "<|eot|>" if template == LLAMA else "<|im_end|>"
    found = responses(tokenizer, example)
    assert len(found) == len(turns)
    for text, (_, answer) in zip(found, turns, strict=True):
        # A token may also cover the line break that the template writes before the answer.
        assert text.lstrip("\n") == (answer + end).lstrip("\n")
