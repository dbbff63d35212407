"""Rows in a terminal: tokens coloured by a score, what is dropped between brackets, several masks under each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alphatoken.pipeline.maths.masking import Floats
from alphatoken.pipeline.report.charts import label
from alphatoken.pipeline.report.content import BranchContent, RowContent
from alphatoken.pipeline.report.texts import Texts, in_a_line, visible

OPEN, CLOSE = "⟦", "⟧"  # around tokens that are dropped, so that no colour is needed to tell
PROMPT, QUIET = "dim", "dim"
TOKEN_WIDTH, NUMBER_WIDTH = 18, 11  # columns of a terminal, with the space between
# Backgrounds of the 256 colours that nearly every terminal has. They grow in colour and not in lightness, so that a higher
# score stands out on a dark ground as well as on a light one.
HIGH = ("", "", "white on color(60)", "white on color(61)", "white on color(62)", "white on color(27)")
LOW = ("", "", "white on color(95)", "white on color(94)", "white on color(130)", "black on color(208)")


@dataclass(frozen=True, slots=True)
class Colours:
    """From a score to a style, by the tokens that are shown. ``signed``: whether 0 is where colours turn."""

    name: str
    signed: bool
    sorted: Floats

    @classmethod
    def of(cls, name: str, rows: Sequence[RowContent]) -> Colours:
        """``name``: of a score."""
        found = [branch.scores[name] for row in rows for branch in row.branches]
        values = np.sort(np.concatenate([np.zeros(0, np.float32), *found]))
        return cls(name, bool((values < 0).any()), values)

    def style(self, value: float) -> str:
        """Of scores with a sign by size, of the others by rank."""
        if self.signed:
            reach = float(np.quantile(np.abs(self.sorted), 0.95)) or 1.0
            level = min(5, round(5 * abs(value) / reach))
            return (HIGH if value > 0 else LOW)[level]
        return HIGH[min(5, int(6 * np.searchsorted(self.sorted, value) / max(1, len(self.sorted))))]

    @property
    def legend(self) -> str:
        """For the line below everything."""
        how = "blue above 0, orange below" if self.signed else "the stronger the higher among the tokens shown"
        return f"colour: {label(self.name)}, {how}"


@dataclass(frozen=True, slots=True)
class Shown:
    """How rows are shown. ``masks``, ``branches``: their names; ``colours``: None where there are no scores."""

    masks: tuple[str, ...]
    branches: tuple[str, ...]
    texts: Texts
    colours: Colours | None
    values: bool = False


def print_rows(console: Console, rows: Sequence[RowContent], shown: Shown) -> None:
    """Every row, and below all of them what colours and brackets mean."""
    for row in rows:
        where = f", {in_a_line(row.source)}" if row.source != row.id else ""
        _say(console, Text.assemble((in_a_line(row.id), "bold"), (f"  row {row.number:,}{where}", QUIET)))
        for name, branch in zip(shown.branches, row.branches, strict=True):
            _print_branch(console, name, branch, shown)
        _say(console, Text())
    told = [f"{OPEN} {CLOSE} dropped"]
    if shown.colours and console.is_terminal and not console.no_color:
        told.append(shown.colours.legend)
    _say(console, Text("; ".join(told), QUIET))


def _print_branch(console: Console, name: str, branch: BranchContent, shown: Shown) -> None:
    texts = _texts(branch, shown.texts)
    first = int(branch.response.argmax()) if branch.response.any() else len(texts)
    before = f"… {branch.before:,} tokens before … " if branch.before else ""
    _say(
        console,
        Text.assemble((f"{name} prompt" if name else "prompt", "bold"), " ", (before + "".join(texts[:first]), PROMPT)),
    )
    for number, mask in enumerate(shown.masks):
        kept, of = branch.kept_of[number], branch.of
        share = f"{kept:,} of {of:,} kept ({kept / of:.1%})" if of else "no response token"
        title = f"{name}, {mask}" if name else mask
        _say(console, Text.assemble((title, "bold"), (f"  {share}", QUIET)))
        _say(console, _response(branch, texts, first, number, shown.colours))
    if shown.values:
        for table in _tables(branch, texts, shown, console.width):
            console.print(table)


def _response(branch: BranchContent, texts: Sequence[str], first: int, mask: int, colours: Colours | None) -> Text:
    """From the first response token on; prompts between turns dim."""
    line, place = Text(), 0
    dropped = np.zeros(len(texts) + 1, np.bool_)
    dropped[:-1][branch.response] = ~branch.kept[mask]
    for index in range(first, len(texts)):
        text, style = texts[index], PROMPT
        if branch.response[index]:
            style = colours.style(float(branch.scores[colours.name][place])) if colours else ""
            place += 1
        if not dropped[index]:
            line.append(text, style)
            continue
        if index == first or not dropped[index - 1]:
            line.append(OPEN)
        last = not dropped[index + 1]
        inside = text.removesuffix("\n") if last else text  # the bracket closes on the line that it was opened on
        line.append(inside, f"{style} strike".strip())
        if last:
            line.append(CLOSE + text[len(inside) :])
    if branch.after:
        line.append(f" … {branch.after:,} tokens after", PROMPT)
    return line


def _tables(branch: BranchContent, texts: Sequence[str], shown: Shown, width: int) -> list[Table]:
    """One line per response token; as many tables under each other as it takes to show every score in ``width``."""
    at_once = max(1, (width - TOKEN_WIDTH - 8 * len(shown.masks)) // NUMBER_WIDTH)
    names, found = list(branch.scores), []
    for first in range(0, max(1, len(names)), at_once):
        own = names[first : first + at_once]
        table = Table(box=None, pad_edge=False)
        table.add_column("token", max_width=TOKEN_WIDTH)
        for mask in shown.masks:
            table.add_column(mask, min_width=7)
        for name in own:
            table.add_column(label(name), justify="right", min_width=NUMBER_WIDTH - 1)
        for place, index in enumerate(np.flatnonzero(branch.response).tolist()):
            kept = ["kept" if one[place] else "dropped" for one in branch.kept]
            numbers = [f"{branch.scores[name][place]:.3g}" for name in own]
            table.add_row(Text(texts[index].replace("⏎\n", "⏎")), *kept, *numbers)
        found.append(table)
    return found


def _texts(branch: BranchContent, texts: Texts) -> list[str]:
    ids = branch.input_ids.tolist()
    joined = texts.joined(ids)
    return [visible(joined.get(place) or texts.one(token)) for place, token in enumerate(ids)]


def _say(console: Console, what: Text) -> None:
    """On a terminal as wide as it is; elsewhere lines end only where the text's do, for grep and files."""
    if console.is_terminal:
        console.print(what, highlight=False, overflow="fold")
    else:
        console.print(what, highlight=False, soft_wrap=True)
