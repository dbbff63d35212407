"""Which data, and how rows become token sequences."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from alphatoken.pipeline.settings.objectives import task_problems
from alphatoken.pipeline.settings.option import at_least, auto_or_at_least, one_of, option

MOST_HELD_OUT = 32  # rows, of data.validation=auto
MOST_OVERLAP = 256  # tokens, of data.overlap=auto: eight times the reach of the causal path
NO_PAIRS_SPLIT = (
    "data.long=split is not available for preference pairs, whose branches are compared whole: set data.long=cut"
)
HALF = "half"  # of data.validation, for data.validation_trial


@dataclass(frozen=True, slots=True)
class ColumnSettings:
    """Configuration group ``data.columns``: the user's name of a column, where it is not the usual one."""

    messages: str | None = option(None, "name of the column with message lists")
    prompt: str | None = option(None, "name of the prompt column")
    completion: str | None = option(None, "name of the completion column")
    instruction: str | None = option(None, "name of the instruction column")
    input: str | None = option(None, "name of the column with the instruction's input")
    output: str | None = option(None, "name of the output column")
    system: str | None = option(None, "name of the system prompt column")
    conversations: str | None = option(None, "name of the ShareGPT column")
    tools: str | None = option(None, "name of the tool list column")
    history: str | None = option(None, "name of the column with the turns before an instruction")
    label: str | None = option(None, "name of the column that is false for a bad answer (KTO)")
    input_ids: str | None = option(None, "name of the token id column")
    labels: str | None = option(None, "name of the label column")
    loss_mask: str | None = option(None, "name of a column that is 1 at response tokens, 0 elsewhere")
    completion_mask: str | None = option(None, "name of another such column; a token is one in all of them")
    assistant_masks: str | None = option(None, "name of another such column; a token is one in all of them")
    attention_mask: str | None = option(None, "name of the column that is 0 at padding")
    position_ids: str | None = option(None, "name of the column of positions, by which packed rows are known")
    chosen: str | None = option(None, "name of the chosen column")
    rejected: str | None = option(None, "name of the rejected column")
    id: str | None = option(None, "name of the identifier column")

    def given(self) -> dict[str, str]:
        """Canonical name -> the user's name, for those that were given."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Configuration group ``data``."""

    train: Any = option(
        "embedded", "file, glob, directory, list of them, hub id, `embedded` (code problems) or `embedded-preference`"
    )
    validation: Any = option(
        "auto",
        "the same, or an integer: hold that many examples out of data.train; auto: 32, of fewer than 160 rows a fifth; or "
        "{task: rows, ...}: values for each task beside those of all together",
    )
    validation_trial: Any = option(
        None,
        "rows on which `trial` measures, and which make no direction: half (data.validation is cut in two by run.seed, one half "
        "for each) or rows of their own, as data.train; null: none are kept, and a trial measures on rows that made it",
    )
    retention: Any = option(
        None,
        "rows that should not be forgotten, as data.train: a direction with columns of its own (retention_direct, _causal), and "
        "`trial` measures the loss on them beside all else; null: none",
    )
    format: str = option("auto", "auto | sft | preference")
    part: str | None = option(
        None,
        "k/n: take the k-th of n parts of the training rows, for rounds of valuing and training; a seeded cut, the same "
        "held-out rows for every part",
    )
    max_length: int = option(2048, "tokens; longer examples are cut from the right and counted, or split (data.long)")
    long: str = option(
        "cut",
        "cut | split: rows to train on that are longer than data.max_length are cut from the right, or split into windows, each "
        "an example of its own (ROW#1, ROW#2, ...); pairs and rows that are held out are cut",
    )
    overlap: int | str = option(
        "auto",
        "with data.long=split: tokens that a window shares with the next, in which they are learned; auto: a quarter of "
        "data.max_length, at most 256",
    )
    shard_examples: int | str = option(
        "auto",
        "examples per shard: the unit of work, of retry and of resume; auto: what a worker values in about a minute, of large data "
        "a 512th, at most 1024",
    )
    chat_template: str = option("auto", "auto | always | never: whether rows go through the tokenizer's chat template")
    keep_reasoning: bool = option(
        False,
        "where the chat template drops the reasoning of earlier turns: one example for each turn, of which it is the last; "
        "pairs stay as they are",
    )
    repeated_prompt: str = option(
        "auto", "auto | keep: a prompt with which the responses of all rows begin is taken off them (auto) or stays"
    )
    columns: ColumnSettings = field(
        default_factory=ColumnSettings, metadata={"help": "column names, where not the usual ones"}
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of data.validation; none where its rows are one task."""
        return tuple(self.validation) if isinstance(self.validation, dict) else ()

    @property
    def holds_out(self) -> bool:
        """Whether the validation rows are held out of data.train."""
        return isinstance(self.validation, int) or self.validation == "auto"

    def held_out(self, rows: int) -> int:
        """How many of ``rows`` rows of data.train are held out for validation."""
        if not self.holds_out:
            return 0
        return min(MOST_HELD_OUT, max(1, rows // 5)) if self.validation == "auto" else int(self.validation)

    def overlap_within(self, length: int) -> int | None:
        """Tokens that windows of ``length`` tokens share; None where long rows are cut."""
        if self.long != "split":
            return None
        return max(1, min(length // 4, MOST_OVERLAP)) if self.overlap == "auto" else int(self.overlap)

    @property
    def strips_prompts(self) -> bool:
        """Whether a prompt that the responses of all rows repeat is taken off them."""
        return self.repeated_prompt == "auto"

    @property
    def cut(self) -> tuple[int, int] | None:
        """data.part as (index from 0, number of parts); None for all rows, or where it cannot be read."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.part or "")
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            return None
        return int(found[1]) - 1, int(found[2])

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = one_of("data.format", self.format, ("auto", "sft", "preference"))
        found += one_of("data.chat_template", self.chat_template, ("auto", "always", "never"))
        found += one_of("data.repeated_prompt", self.repeated_prompt, ("auto", "keep"))
        if self.part is not None and self.cut is None:
            found.append(f"data.part={self.part}: must be k/n with 1 <= k <= n, such as 1/4")
        found += at_least("data.max_length", self.max_length, 2)
        found += self._window_problems()
        found += auto_or_at_least("data.shard_examples", self.shard_examples, 1)
        if self.train is None or self.train == []:
            found.append("data.train is missing: give a file, a glob, a directory, a hub id or `embedded`")
        elif isinstance(self.train, int | float):
            found.append(f"data.train={self.train}: must be a file, a glob, a directory or a hub id")
        if isinstance(self.validation, bool | float) or self.validation is None:
            found.append(
                f"data.validation={self.validation}: must be a file, a whole number of examples to hold out, or auto"
            )
        elif isinstance(self.validation, int):
            found += at_least("data.validation", self.validation, 1)
        elif isinstance(self.validation, dict):
            found += task_problems(self.validation)
        if isinstance(self.validation_trial, bool | int | float):
            found.append(f"data.validation_trial={self.validation_trial}: must be half, a file, or null")
        if isinstance(self.retention, bool | int | float) or self.retention in ("", []):
            found.append(f"data.retention={self.retention}: must be a file, a glob, a directory, a hub id, or null")
        return found

    def _window_problems(self) -> list[str]:
        """What is wrong with data.long and data.overlap."""
        found = one_of("data.long", self.long, ("cut", "split"))
        found += auto_or_at_least("data.overlap", self.overlap, 1)
        if found:
            return found
        if self.overlap != "auto" and self.long != "split":
            return [f"data.overlap={self.overlap}: is of windows, set data.long=split as well"]
        if self.long == "split" and self.format == "preference":
            return [NO_PAIRS_SPLIT]
        return overlap_problems(self, self.max_length, f"data.max_length={self.max_length}")


def overlap_problems(data: DataSettings, length: int, why: str) -> list[str]:
    """The problem with data.overlap for windows of ``length`` tokens, which ``why`` explains, as no or one sentence."""
    overlap = data.overlap_within(length)
    if overlap is None or 1 <= overlap <= length // 2:
        return []
    return [f"data.overlap={data.overlap}: must be at most half of a window ({why}), {length // 2} tokens"]
