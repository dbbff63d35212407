"""What prepare depends on: the raw data as it lies there, the settings that shape it, and the tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alphatoken.data_schemas import PREFERENCE_PREPARED, PREPARED, named
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_config
from alphatoken.pipeline.prepare.columns import PREFERENCE, filled, row_kind
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.draw import part_of
from alphatoken.pipeline.prepare.named_columns import named_columns
from alphatoken.pipeline.prepare.positions import own_positions
from alphatoken.pipeline.prepare.sources import Source, Sources, open_sources
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest, of_model, seen_of_model
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.data import HALF, NO_PAIRS_SPLIT, DataSettings, overlap_problems
from alphatoken.pipeline.settings.run import NO_PAIRS

MOST_FISHER_PROMPTS = 1000
ROWS_TO_RECOGNISE, MOST_ROWS_TO_RECOGNISE = 16, 4096


@dataclass(frozen=True, slots=True)
class RawData:
    """The rows that a run is made of.

    ``validation``: None where its rows are held out of ``train``. ``trial``: rows of data.validation_trial that are files of
    their own, else None. ``retention``: of data.retention, else None. ``preference``: whether the rows of ``train`` are
    pairs. ``tasks``: task -> names of its files, where data.validation has tasks. ``about_columns``: what is to be said of
    data.columns.
    """

    train: Sources
    validation: Sources | None
    trial: Sources | None
    retention: Sources | None
    preference: bool
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    about_columns: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Sources, ...]:
        """What there is, data.train first."""
        return tuple(one for one in (self.train, self.validation, self.trial, self.retention) if one)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be said of how the files were read, a line each."""
        return (*self.about_columns, *(line for one in self.sources for line in one.remarks))


def open_data(settings: Settings) -> RawData:
    """The files of data.train, data.validation, data.validation_trial and data.retention, opened.

    Raises SettingsWrong for what is not there or not of one kind, columns that data.columns names among it.
    """
    train = open_sources("data.train", settings.data.train)
    validation, tasks = open_validation(settings.data)
    kept = settings.validation_trial
    trial = None if kept in (None, HALF) else open_sources("data.validation_trial", kept)
    asked = settings.data.retention
    retention = None if asked is None else open_sources("data.retention", asked)
    raw = RawData(train, validation, trial, retention, is_preference(settings, train), tasks)
    return replace(raw, about_columns=named_columns(settings.data.columns.given(), raw.sources))


def open_validation(data: DataSettings) -> tuple[Sources | None, dict[str, tuple[str, ...]]]:
    """The files of data.validation, None where its rows are held out of data.train; and task -> names of its files.

    Raises SettingsWrong for a file that is not there, and for one that two tasks have.
    """
    if data.holds_out:
        return None, {}
    if not data.tasks:
        return open_sources("data.validation", data.validation), {}
    opened = {task: open_sources(f"data.validation.{task}", data.validation[task]) for task in data.tasks}
    owners: dict[str, str] = {}
    for task, sources in opened.items():
        for file in sources.files:
            if (other := owners.setdefault(file.fingerprint, task)) != task:
                raise SettingsWrong(
                    [
                        f"data.validation: {file.name} has the rows of task {other} as well: give each task rows of its own"
                    ]
                )
    files = tuple(file for sources in opened.values() for file in sources.files)
    remarks = tuple(line for sources in opened.values() for line in sources.remarks)
    return Sources(files, remarks), {task: tuple(f.name for f in sources.files) for task, sources in opened.items()}


def renamed_tasks(raw: RawData, manifest: Manifest) -> RawData:
    """The same rows with the files of tasks under the names that the stage was begun with, wherever they are now; notes them."""
    if not raw.tasks:
        return raw
    recorded = manifest.stage("prepare")["counts"].get("validation_tasks") or raw.tasks
    manifest.note("prepare", validation_tasks={task: list(files) for task, files in recorded.items()})
    assert raw.validation is not None
    names = [name for files in recorded.values() for name in files]
    return replace(raw, validation=raw.validation.named(names), tasks={t: tuple(f) for t, f in recorded.items()})


def is_preference(settings: Settings, train: Sources) -> bool:
    """data.format, with ``auto`` resolved by the first rows of every file. Raises SettingsWrong where files differ."""
    if settings.data.format != "auto":
        return settings.data.format == "preference"
    kinds: dict[bool, str] = {}
    for file in train.files:
        if (kind := _kind_of_file(file, settings.data.columns.given())) != "unknown":
            kinds.setdefault(kind in PREFERENCE, file.name)
    if len(kinds) == 2:
        names = f"{kinds[True]} holds preference pairs, {kinds[False]} does not"
        raise SettingsWrong([f"data.train: {names}: give files of one kind, or set data.format=sft or preference"])
    if True in kinds and settings.valuation.rehearsed:
        raise SettingsWrong([NO_PAIRS])
    return True in kinds


def _kind_of_file(file: Source, columns: Mapping[str, str]) -> str:
    """The shape that the columns promise which have a value in one of the first rows; more rows where that is none."""
    present: set[str] = set()
    for start in range(0, min(MOST_ROWS_TO_RECOGNISE, len(file.rows)), ROWS_TO_RECOGNISE):
        table = file.table(range(start, min(start + ROWS_TO_RECOGNISE, len(file.rows))))
        present.update(*(filled(row) for row, reason in decode(table) if reason is None))
        if (kind := row_kind(present, columns)) != "unknown":
            return kind
    return "unknown"


def prepare_inputs(run: Run, raw: RawData) -> dict[str, Any]:
    """Everything that prepared/ depends on. Raises SettingsWrong for a model without a readable configuration.

    ``positions`` is there where the model has fewer of its own than data.max_length, ``data.overlap`` in tokens where longer
    rows are split.
    """
    settings, data, validation = run.settings, run.settings.data, raw.validation
    vocabulary = _vocabulary(tokenizer_source(run))
    positions = own_positions(tokenizer_source(run), data.max_length)
    overlap = checked_overlap(data, positions, raw.preference)
    schema = PREFERENCE_PREPARED if raw.preference else PREPARED
    return {
        "data.train": [file.fingerprint for file in raw.train.files],
        "data.validation": data.held_out(raw.train.starts[-1])
        if validation is None
        else _validation_inputs(validation, raw.tasks),
        **_trial_inputs(settings, raw),
        **({"data.retention": [file.fingerprint for file in raw.retention.files]} if raw.retention else {}),
        "data.max_length": data.max_length,
        **({"positions": positions} if positions is not None else {}),
        **({"data.overlap": overlap} if overlap is not None else {}),
        "data.shard_examples": data.shard_examples,
        **({"data.part": data.part} if data.part else {}),
        "data.chat_template": data.chat_template,
        **({"data.keep_reasoning": True} if data.keep_reasoning else {}),
        "data.columns": data.columns.given(),
        **({} if data.strips_prompts else {"data.repeated_prompt": data.repeated_prompt}),
        "anchor.fisher.prompts": settings.anchor.fisher.prompts if settings.makes_fisher else 0,
        "run.seed": settings.run.seed,
        "tokenizer": of_model(run.models.policy, tokenizer_only=True),
        **({"model.revision": settings.model.revision} if settings.model.revision else {}),
        "vocabulary": vocabulary,
        "schema": (schema.metadata or {})[b"alphatoken.schema"].decode(),
    }


def checked_overlap(data: DataSettings, positions: int | None, preference: bool) -> int | None:
    """Tokens that windows share, None where long rows are cut.

    Raises SettingsWrong for pairs, and for more than half of the windows that a model of few ``positions`` allows.
    """
    overlap = data.overlap_within(data.max_length if positions is None else min(data.max_length, positions))
    if overlap is not None and preference:
        raise SettingsWrong([NO_PAIRS_SPLIT])
    if positions is not None and (wrong := overlap_problems(data, positions, f"the model has {positions} positions")):
        raise SettingsWrong(wrong)
    return overlap


def about(run: Run, raw: RawData) -> dict[str, str]:
    """The files among ``prepare_inputs`` with what is seen of them, for messages."""
    files = {"data.train": raw.train, "data.validation": raw.validation, "data.validation_trial": raw.trial}
    return {
        **{key: sources.about() for key, sources in files.items() if sources is not None},
        "tokenizer": seen_of_model(run.models.policy),
    }


def _validation_inputs(validation: Sources, tasks: Mapping[str, Sequence[str]]) -> Any:
    found = [file.fingerprint for file in validation.files]
    if not tasks:
        return found
    rest = iter(found)
    return {task: [next(rest) for _ in files] for task, files in tasks.items()}


def _trial_inputs(settings: Settings, raw: RawData) -> dict[str, Any]:
    """Nothing where no rows are kept for a trial, so that runs without one are what they were."""
    if settings.validation_trial is None:
        return {}
    kept = HALF if raw.trial is None else [file.fingerprint for file in raw.trial.files]
    return {"data.validation_trial": kept, **({"trial.schema": named(PREFERENCE_PREPARED)} if raw.preference else {})}


def held_out_digest(inputs: Mapping[str, Any]) -> str | None:
    """What the held-out rows of one part of the data depend on, equal for all parts; None without data.part.

    ``inputs``: of ``prepare_inputs``.
    """
    return digest({k: v for k, v in inputs.items() if k != "data.part"}) if "data.part" in inputs else None


def tokenizer_source(run: Run) -> ModelSource:
    """The model whose tokenizer is used: model.policy, of several checkpoints the first."""
    own = run.settings.model
    return ModelSource(run.models.policy, own.revision, trust_remote_code=own.trust_remote_code)


def _vocabulary(source: ModelSource) -> int:
    """Rows of the model's embedding: larger ids cannot be used."""
    try:
        return load_config(here(source, weights=False)).get_text_config().vocab_size
    except UnreadableModel as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error


def fisher_prompts(settings: Settings, rows: int) -> int:
    """How many of ``rows`` rows of data.train are held out as prompts of the Fisher; 0 where none is made."""
    if not settings.makes_fisher:
        return 0
    asked = settings.anchor.fisher.prompts
    return min(MOST_FISHER_PROMPTS, max(1, rows // 10)) if isinstance(asked, str) else asked


def training_rows(total: int, held_out: Collection[int], settings: Settings) -> list[int]:
    """The rows of ``total`` that go into prepared/: those that are not held out, or data.part of them.

    What is held out does not depend on data.part, so that all parts share it. Raises SettingsWrong for an empty part.
    """
    rows = [row for row in range(total) if row not in held_out]
    if settings.data.cut is None:
        return rows
    own = part_of(rows, settings.run.seed, *settings.data.cut)
    if not own:
        raise SettingsWrong(
            [f"data.part={settings.data.part}: {len(rows)} training rows are too few for so many parts"]
        )
    return own
