"""Synthetic chat that no one here made clean: rows of a published test file, and what code can say against them.

24,545 rows of one system prompt, one question and one answer. An id is the row's line in the file, from 0. Faults that are
seen in them: sums that come out wrong, answers about a text that the question does not show, corrections that correct
nothing, rows that begin or end in the middle of a sentence.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.rows import member

REQUIREMENT = "instructlab==0.26.1"
FILE = "instructlab-0.26.1/scripts/test-data/train_all_pruned_SDG.jsonl"
LONGEST_QUESTION, SHORTEST_ANSWER, LONGEST_ANSWER = 400, 40, 400  # characters

# Read one by one: the answer is to the question, shows what it speaks of, and every sum in it comes out right.
CHECKED = (
    502, 626, 675, 2794, 2810, 2906, 2907, 2984, 3460, 3552, 3938, 4165, 4309, 4344, 5326, 6088, 6259, 6878, 6978, 7311,
    7644, 8225, 8309, 8337, 8809, 10801, 10910, 12799, 12924, 13844, 13997, 14652, 14823, 15402, 15518, 15643, 15730,
    15776, 16679, 16698, 16713, 16902, 16980, 17149, 18024, 18104, 18119, 18140, 18152, 18173, 18187, 18620, 18626,
    18674, 20229, 21093, 21104, 21157, 21263, 22526, 22835, 22898, 22963, 23155,
)  # fmt: skip

QUOTED = (15357,)  # a wrong sum, which the answer itself calls wrong
NUMBER = r"\(?-?\$?\d[\d,]*(?:\.\d+)?%?\)?"
# A sum of numbers alone and what the answer makes of it; not where the right side is the beginning of another sum.
SUM = re.compile(
    rf"({NUMBER}(?:\s*[-+*/×÷x·]\s*{NUMBER})+)\s*=\s*(-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?)(?![.,]?\d|[/^:]|\s*%|\s*\\?[-+*/×÷x·^(]\s*\(?\d)"
)
INSIDE_A_LONGER_ONE = re.compile(
    r"([\d^)*/+−×÷√·x-]\s*|[\w.,:])$"
)  # what stands before a match that is only a part of a sum
SIGNS = str.maketrans({"$": None, ",": None, "×": "*", "÷": "/", "x": "*", "·": "*"})
# A question about a text, without the text: one short line that names it and quotes nothing.
ABSENT = re.compile(
    r"\b(the|this|these|that|given|provided|presented|specified)\b[^.?!:\"]{0,40}"
    r"\b(receipt|email|paper|document|filing|agreement|contract|table|passage|article|meeting|dataset|study|page)s?\b",
    re.IGNORECASE,
)
LONGEST_WITHOUT = 140  # characters


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One row of the file; ``wrong_sums``: spans (start, end) of the results in ``answer`` that are not what the sum gives."""

    id: int
    messages: list[dict[str, str]]
    right_sums: tuple[tuple[int, int], ...]
    wrong_sums: tuple[tuple[int, int], ...]

    @property
    def question(self) -> str:
        """What the user asks."""
        return self.messages[-2]["content"]

    @property
    def answer(self) -> str:
        """What is trained on."""
        return self.messages[-1]["content"]

    @property
    def about_nothing(self) -> bool:
        """Whether the question speaks of a text that it does not show."""
        asked = self.question.strip()
        return len(asked) <= LONGEST_WITHOUT and not {"\n", '"'} & {*asked} and bool(ABSENT.search(asked))

    @property
    def row(self) -> dict[str, Any]:
        """As the pipeline reads it."""
        return {"id": f"chat-{self.id}", "messages": self.messages}


def chat_rows() -> list[ChatRow]:
    """Every row of the file that is not too long, in its order."""
    found = []
    for number, line in enumerate(member(REQUIREMENT, FILE).decode().splitlines()):
        messages = json.loads(line)["messages"]
        question, answer = messages[-2]["content"], messages[-1]["content"]
        if len(question) <= LONGEST_QUESTION and SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER:
            found.append(ChatRow(number, messages, *(((), ()) if number in QUOTED else sums(answer))))
    return found


def checked_rows(rows: list[ChatRow]) -> list[ChatRow]:
    """Those that were read, in an order of their own, so that either half holds all kinds."""
    found = [row for row in rows if row.id in set(CHECKED)]
    random.Random(0).shuffle(found)
    return found


def drawn_rows(rows: list[ChatRow], plain: int, right: int, about_nothing: int) -> list[ChatRow]:
    """Every row with a wrong sum, and as many as asked for with right sums alone, about nothing, and of the rest.

    None of CHECKED.
    """
    left = [row for row in rows if row.id not in set(CHECKED)]
    random.Random(0).shuffle(left)
    kinds: dict[str, list[ChatRow]] = {"wrong": [], "nothing": [], "right": [], "plain": []}
    for row in left:
        kind = "wrong" if row.wrong_sums else "nothing" if row.about_nothing else "right" if row.right_sums else "plain"
        kinds[kind].append(row)
    chosen = kinds["wrong"] + kinds["right"][:right] + kinds["nothing"][:about_nothing] + kinds["plain"][:plain]
    random.Random(1).shuffle(chosen)
    return chosen


def sums(answer: str) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Spans of the results of sums in ``answer``: right ones, and wrong ones. A result may be rounded as it is written."""
    right, wrong = [], []
    for match in SUM.finditer(answer):
        if INSIDE_A_LONGER_ONE.search(answer[: match.start()]):
            continue
        value = _value(match[1])
        if value is None:
            continue
        told = match[2].translate(SIGNS)
        places = len(told.partition(".")[2])
        near = abs(value - float(told)) <= 10.0**-places * (places > 0 or value != round(value)) + 1e-9
        (right if near else wrong).append(match.span(2))
    return tuple(right), tuple(wrong)


def _value(text: str) -> float | None:
    """What a sum of numbers gives; None where it is none."""
    plain = re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", text.translate(SIGNS))
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)  # no octal
    try:
        return float(eval(plain, {"__builtins__": {}}))
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None
