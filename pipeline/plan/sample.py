"""A sample of the data, tokenized as `prepare` would: lengths, held-out examples and what cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_config, load_tokenizer
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.draw import draw_order, halves
from alphatoken.pipeline.prepare.inputs import checked_overlap, fisher_prompts, open_data
from alphatoken.pipeline.prepare.pairs import Pair, PairMaker, is_pair
from alphatoken.pipeline.prepare.positions import own_positions
from alphatoken.pipeline.prepare.repeated import all_repeat_prompt, repeats_prompt, without_prompt
from alphatoken.pipeline.prepare.row_counts import because
from alphatoken.pipeline.prepare.rows import TemplateRequired, Unusable
from alphatoken.pipeline.prepare.sources import Sources
from alphatoken.pipeline.prepare.tokenize import Example, ExampleMaker
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.remote import Unreachable, here
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.data import HALF, DataSettings
from alphatoken.pipeline.settings.objectives import objective_of

SAMPLE = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokenized rows: of ``train`` in the order of their files, as `prepare` writes them; held out in that in which it draws.

    ``rows``: of data.train; ``train_inputs``: about how many of them are trained on; ``train_rows``: about how many examples
    those make, more where long rows are split; ``train``: a sample of these, of pairs both branches one after the other;
    ``pairs``: the same as pairs, empty for supervised data;
    ``validation``, ``fisher``: the held-out examples themselves (of a validation file: a sample, and how many it has).
    ``tasks``: objective -> rows of its files, where data.validation has tasks; ``retention``: a sample of data.retention.
    ``unusable``: the share of rows that goes to the quarantine. ``complete``: every row was read. ``remarks``: what is to be
    said of how the files were read, a line each. ``overlap``: tokens that windows of a row share, None where none is split.
    ``rows_read``: of data.train, for the sample.
    """

    rows: int
    train_inputs: int
    train_rows: int
    train: tuple[Example, ...]
    pairs: tuple[Pair, ...]
    validation: tuple[Example, ...]
    validation_rows: int
    fisher: tuple[Example, ...]
    unusable: float
    complete: bool
    tasks: Mapping[str, int] = field(default_factory=dict)
    retention: tuple[Example, ...] = ()
    retention_rows: int = 0
    remarks: tuple[str, ...] = ()
    overlap: int | None = None
    rows_read: int = 0

    @property
    def scale(self) -> float:
        """Sequences that are trained on, per sequence in ``train``."""
        return self.train_rows * (2 if self.pairs else 1) / len(self.train)


def sample_data(settings: Settings, policy: str) -> Sample:
    """Read and tokenize at most the held-out rows and SAMPLE more.

    ``policy``: the resolved model.policy. Raises SettingsWrong and RunFailed for data that cannot be used.
    """
    source = ModelSource(policy, settings.model.revision, trust_remote_code=settings.model.trust_remote_code)
    try:
        source = here(source, weights=False)
        tokenizer, config = load_tokenizer(source), load_config(source)
    except (UnreadableModel, Unreachable) as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error
    data = settings.data
    vocabulary = config.get_text_config().vocab_size
    columns = data.columns.given()
    positions = own_positions(source, data.max_length)
    arguments = tokenizer, data.max_length, data.chat_template, columns, vocabulary, positions
    raw = open_data(settings)
    train, preference = raw.train, raw.preference
    make, pair = ExampleMaker(*arguments), PairMaker(*arguments)
    total = train.starts[-1]
    if not total:
        raise SettingsWrong([f"data.train={data.train}: there is no row in it"])
    wanted = fisher_prompts(settings, total) + data.held_out(total)
    if wanted >= total:
        raise SettingsWrong([f"data.train has {total} rows, of which {wanted} are to be held out: none would be left"])
    drawn = [row for row, _ in zip(draw_order(total, settings.run.seed), range(wanted + SAMPLE), strict=False)]
    overlap = checked_overlap(data, positions, preference)
    refused: list[str] = []
    examples = _examples(pair if preference else make, train, drawn, data, refused)
    usable = [row for row, example in enumerate(examples) if example is not None]
    several: list[Any] = [None if example is None else [example] for example in examples]
    if overlap is not None:  # rows that are trained on; those that are held out are cut
        several = _examples(lambda row, source: make.split(row, source, overlap), train, drawn, data)
    drawn_out = set(usable[:wanted])
    in_files = sorted(range(len(drawn)), key=drawn.__getitem__)
    trained = [made for row in in_files if (made := several[row]) is not None and row not in drawn_out]
    if len(usable) < wanted or not trained:
        raise RunFailed(
            f"data.train: of {len(drawn)} sampled rows only {len(usable)} can be used, {wanted} are held out{because(refused)}"
        )
    unusable = sum(made is None for made in several) / len(several)
    split = data.held_out(total)
    held = [made.chosen if isinstance(made, Pair) else made for made in (examples[row] for row in usable[:wanted])]
    is_half = settings.validation_trial == HALF
    directions = halves(split, settings.run.seed)[0] if is_half else range(split)
    validation, validation_rows = [held[i] for i in directions], len(directions)

    def either(row: Any, source: str) -> Example:
        return pair(row, source).chosen if preference and is_pair(row, columns) else make(row, source)

    other, tasks = raw.validation, raw.tasks
    in_use: Sequence[int] = ()
    if other is not None:
        in_use = halves(other.starts[-1], settings.run.seed)[0] if is_half else range(other.starts[-1])
        validation_rows = len(in_use)
        some = _examples(either, other, range(min(validation_rows, SAMPLE)), data)
        validation = [example for example in some if example is not None]
        if not validation:
            raise RunFailed(f"data.validation={data.validation}: none of its first {len(some)} rows can be used")
        validation_rows = round(validation_rows * len(validation) / len(some))
    retention, retention_rows = _retention(either, raw.retention, data)
    flat = [one for made in trained for one in made]
    sequences = [s for made in flat for s in ((made.chosen, made.rejected) if isinstance(made, Pair) else (made,))]
    of_all, parts = round(total * (1 - unusable)) - wanted, data.cut[1] if data.cut else 1
    inputs = max(1, of_all // parts)
    return Sample(
        total, inputs, round(inputs * len(flat) / len(trained)), tuple(sequences), tuple(flat) if preference else (),
        tuple(validation), validation_rows, tuple(held[split:]), unusable, len(drawn) == total and parts == 1,
        {objective_of(task): _rows_in(other, names, in_use) for task, names in tasks.items()}, retention, retention_rows,
        (*raw.about_columns, *train.remarks),
        overlap, len(drawn),
    )  # fmt: skip


def _rows_in(sources: Sources | None, names: Sequence[str], rows: Sequence[int]) -> int:
    """How many of ``rows`` are of the files ``names``."""
    if sources is None:
        return 0
    files = zip(sources.files, sources.starts[:-1], sources.starts[1:], strict=True)
    own = [(start, stop) for file, start, stop in files if file.name in names]
    return sum(start <= row < stop for row in rows for start, stop in own)


def _retention(
    make: Callable[[Any, str], Example], sources: Sources | None, data: DataSettings
) -> tuple[tuple[Example, ...], int]:
    """A sample of data.retention, whose files ``sources`` are, and about how many rows it has."""
    if sources is None:
        return (), 0
    total = sources.starts[-1]
    some = _examples(make, sources, range(min(total, SAMPLE)), data)
    usable = tuple(example for example in some if example is not None)
    if not usable:
        raise RunFailed(f"data.retention={data.retention}: none of its first {len(some)} rows can be used")
    return usable, round(total * len(usable) / len(some))


def _examples(
    make: Callable[[Any, str], Any],
    sources: Sources,
    rows: Sequence[int],
    data: DataSettings,
    refused: list[str] | None = None,
) -> list[Any]:
    """What ``make`` makes of ``rows``, in their order; None: not usable. ``refused``: is given why."""
    refused = [] if refused is None else refused
    ordered, columns = sorted(rows), data.columns.given()
    repeated = data.strips_prompts and all_repeat_prompt(sources, columns)
    found: list[Any] = []
    for name, numbers, table in sources.pieces(ordered):
        for number, (row, reason) in zip(numbers, decode(table), strict=True):
            if repeated and repeats_prompt(row, columns):
                row = without_prompt(row, columns)
            try:
                if reason is not None:
                    raise Unusable(reason)
                found.append(make(row, f"{name}:{number}"))
            except TemplateRequired as error:
                raise SettingsWrong([f"{name}, row {number}: {error}"]) from error
            except Unusable as error:
                refused.append(str(error))
                found.append(None)
    by_row = dict(zip(ordered, found, strict=True))
    return [by_row[row] for row in rows]
