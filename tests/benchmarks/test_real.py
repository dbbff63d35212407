"""The benchmark on real data with real faults: which faults code finds, and what the areas count."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from alphatoken.jobs.config import load
from benchmarks.quality.chat import ChatRow, drawn_rows, sums
from benchmarks.quality.real import COMMON, RUNS, Question, _spans


def row(answer, question="What is it?", number=0):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return ChatRow(number, messages, *sums(answer))


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("so 2 + 3 = 5, and 4+3=10.", ["5"], ["10"]),
        ("(32.5 + 30.9) / 2 = 31.7 on average", ["31.7"], []),
        ("a third: 1 / 3 = 0.33 or 1 / 3 = 0.3", ["0.33", "0.3"], []),  # rounded as it is written
        ("a third: 1 / 3 = 0.35", [], ["0.35"]),
        ("7 / 2 = 3, and 8 / 2 = 3", ["3"], ["3"]),  # a whole number may be cut, where the sum gives none
        ("$1,200 + $300 = $1,500", ["$1,500"], []),
        ("27% of it: 0.27 × 200 = 54", ["54"], []),
        ("20% * 50 = 10; 20% + 30% = 50%", ["10"], []),  # a share of what is not said
        ("3 + 4 = 2 * 3 + 1 = 7", ["7"], []),  # what follows the first sign is a sum, not a result
        ("180°C x 1.8 + 32 = 356", [], []),  # a part of a longer sum
        ("at 13:15 + 10 = 14", [], []),
        ("x + 2 = 5 and 2² + 3 = 7", [], []),
        ("5 / 0 = 0 and 007 + 1 = 8", ["8"], []),
        ("no sum at all", [], []),
    ],
)
def test_results_of_sums_are_found_and_checked(answer, right, wrong):
    found = [[answer[start:end] for start, end in spans] for spans in sums(answer)]
    assert found == [right, wrong]


@pytest.mark.parametrize(
    ("question", "nothing"),
    [
        ("What are the primary contributions of the paper?", True),
        ("Extract all item names from the receipt.", True),
        ("List the items on the receipt.\nTea: $2", False),  # it is there
        ("What is the formula for precision?", False),
        ('Reverse the words of this sentence: "the paper is here"', False),
    ],
)
def test_a_question_about_a_text_that_it_does_not_show(question, nothing):
    assert row("It is.", question).about_nothing is nothing


def test_every_wrong_sum_is_drawn_and_as_many_others_as_asked_for():
    rows = [row("1 + 1 = 3", number=i) for i in range(3)] + [row("1 + 1 = 2", number=i) for i in range(10, 19)]
    rows += [row("yes", number=i) for i in range(20, 40)] + [row("x", "Sum up the email.", i) for i in range(50, 60)]
    drawn = drawn_rows([*rows, row("1 + 1 = 4", number=502)], plain=5, right=4, about_nothing=2)
    assert [sum(low <= one.id < low + 20 for one in drawn) for low in (0, 20, 40)] == [7, 5, 2]
    assert drawn == drawn_rows([*rows, row("1 + 1 = 4", number=502)], plain=5, right=4, about_nothing=2)


def test_areas_by_tokens_and_by_rows():
    good, bad = np.array([1, 1, 0, 0, 0, 1], bool), np.array([0, 0, 1, 1, 0, 0], bool)
    question = Question("", good, bad, np.array([0, 0, 1, 1, 1, 2]))
    tokens, rows = question.areas(np.array([5.0, 1.0, 2.0, 2.0, 99.0, 3.0]))
    assert tokens == pytest.approx(4 / 6)  # of the six pairs of a good and a bad token, four are in order
    assert rows == 1.0  # 3 and 3 before 2; what is neither is not looked at
    assert question.counts == "3 tokens of 2 rows against 2 of 1"


def test_the_tokens_of_a_result_are_those_that_hold_its_characters(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    one = row("of 12 + 30 = 43, and 2 + 2 = 4")
    ids = tokenizer(one.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    good, bad = _spans(one, ids, tokenizer)
    assert [
        tokenizer.decode([i for i, inside in zip(ids, flags, strict=True) if inside]).strip() for flags in (good, bad)
    ] == [
        "4",
        "43",
    ]
    with pytest.raises(ValueError, match="chat-0"):
        _spans(row("something else"), ids, tokenizer)


@pytest.mark.parametrize("run", RUNS)
def test_the_pipeline_takes_the_settings(run):
    settings = load([*COMMON, *RUNS[run]])
    assert settings.mask_problems(pairs=False) == []
    assert {"paper", "information", "loss", "entropy", "gradient_norm"} <= {*settings.valuation.scores}
