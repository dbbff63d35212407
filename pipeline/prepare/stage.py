"""prepare: raw rows become tokenized shards, held-out examples, and a quarantine with reasons.

The driver reads raw rows and hands them out; templates and tokenization run on the workers. The shard plan (which rows
go into which part) is frozen in the manifest before the first part is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alphatoken.pipeline.cluster.work import Pool, Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_tokenizer, portable
from alphatoken.pipeline.prepare import remarks
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.draw import LEAST_TO_CUT, draw_order, halves
from alphatoken.pipeline.prepare.example import is_example
from alphatoken.pipeline.prepare.held_out import PAIRS, RETENTION, TRIAL
from alphatoken.pipeline.prepare.inputs import (
    RawData,
    about,
    fisher_prompts,
    open_data,
    prepare_inputs,
    renamed_tasks,
    tokenizer_source,
    training_rows,
)
from alphatoken.pipeline.prepare.pairs import Pair
from alphatoken.pipeline.prepare.parts import planned_parts, worker_resources
from alphatoken.pipeline.prepare.reader import validation_rows
from alphatoken.pipeline.prepare.repeated import all_repeat_prompt, repeating
from alphatoken.pipeline.prepare.row_counts import because, held, listed, of_their_own, of_validation, told_notes
from alphatoken.pipeline.prepare.rows import TemplateRequired, require_template, shape_of
from alphatoken.pipeline.prepare.sources import Sources
from alphatoken.pipeline.prepare.tokenize import Example
from alphatoken.pipeline.prepare.windows import of_long_rows
from alphatoken.pipeline.prepare.worker import PrepareTask, PrepareWorker, chosen_of, to_pair_table, to_table
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.noted import Notes
from alphatoken.pipeline.run.progress import counted
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.data import HALF


def make_prepared(run: Run) -> None:
    """Write prepared/ and quarantine/, unless done already. Raises SettingsWrong and RunFailed.

    The tokenizer is that of model.policy; of several checkpoints, that of the first.
    """
    started = time.monotonic()
    source, storage, manifest, settings = tokenizer_source(run), run.storage, run.manifest, run.settings
    raw = open_data(settings)
    inputs = prepare_inputs(run, raw)
    fingerprint = manifest.begin(
        "prepare", inputs, {"run": settings.run, "data": settings.data, "model": settings.model}, about(run, raw)
    )
    if manifest.done("prepare") and not _missing(storage, manifest.stage("prepare")):
        run.progress.say(
            f"prepare: done already, {manifest.stage('prepare')['counts']['train_rows']:,} training examples"
        )
        return
    train = raw.train
    for remark in raw.remarks:
        run.progress.warn(f"prepare: {remark}")
    if positions := inputs.get("positions"):
        run.progress.say(
            f"prepare: {source.path} has {positions:,} positions, fewer than data.max_length={settings.data.max_length:,}: "
            f"longer rows are {'split into windows of' if 'data.overlap' in inputs else 'cut to'} {positions:,} tokens"
        )
    tokenizer = _check(source, settings, train)
    facts = {"vocabulary": inputs["vocabulary"], "eos_token_ids": _ends(tokenizer), "tokenizer": source.path}
    # Names of files are part of the rows' identifiers: those that the stage was begun with, wherever the files are now.
    manifest.note("prepare", files=manifest.stage("prepare")["counts"].get("files") or [f.name for f in train.files])
    train = train.named(manifest.stage("prepare")["counts"]["files"])
    raw = renamed_tasks(raw, manifest)
    columns = settings.data.columns.given()
    arguments = {
        "storage": storage, "tokenizer": portable(tokenizer, source), "vocabulary": facts["vocabulary"],
        "settings": settings, "preference": raw.preference, "positions": positions,
    }  # fmt: skip
    total = train.starts[-1]
    _held_out_numbers(settings, total)
    with run.cluster.pool(logged("prepare", PrepareWorker), arguments, worker_resources(run.cluster, total)) as pool:
        pool.start()  # all at once: what is held out is one worker's work, during which the others get ready
        repeated = settings.data.strips_prompts and all_repeat_prompt(train, columns)
        stage = _Prepare(run, fingerprint, pool, repeated, raw)
        drawn, counts = stage.hold_out(train, raw)
        rows = training_rows(total, drawn, settings)
        parts = planned_parts(len(rows), int(settings.data.shard_examples))
        facts["format"] = "preference" if raw.preference else "sft"
        manifest.note("prepare", parts=parts, held_out=len(drawn), shard_examples=settings.data.shard_examples, **facts)
        counts += stage.shards(train, rows, parts)
    tasks = {task: len(rows) for task, rows in validation_rows(run).items()} if raw.tasks else {}
    if not counts["train_rows"]:
        why = remarks.line(counts)
        raise RunFailed(
            f"data.train: none of the {len(rows)} rows can be used{f' ({why})' if why else ''}; see the reasons in "
            f"{storage.path('quarantine')}"
        )
    reasons = {key.removeprefix("reason/"): n for key, n in sorted(counts.items()) if key.startswith("reason/")}
    notes = {key.removeprefix("note/"): n for key, n in sorted(counts.items()) if key.startswith("note/")}
    left_out = {key: n for key, n in counts.items() if remarks.is_remark(key)}
    plain = {k: n for k, n in sorted(counts.items()) if not k.startswith(("reason/", "note/")) and k not in left_out}
    if raw.validation is None:
        plain["rows_in"] = len(rows) + len(drawn)
        plain["rows_used"] = plain["rows_in"] - plain.get("quarantined", 0)
    said = {"notes": notes, "left_out": remarks.as_counts(left_out)}
    given = {key: found for key, found in said.items() if found}
    manifest.finish("prepare", time.monotonic() - started, reasons=reasons, **given, **plain)
    if tasks:
        run.progress.say(f"prepare: validation rows of each task: {listed(tasks)}")
    for line in told_notes(notes):
        run.progress.say(f"prepare: {line}")
    run.progress.say(
        f"prepare: {plain['train_rows']:,} training examples in {len(parts)} shard(s), {plain['validation_rows']:,} for "
        f"validation, {of_their_own(plain)}{plain.get('fisher_rows', 0):,} Fisher prompts; {of_long_rows(plain)}, "
        f"{plain.get('quarantined', 0):,} in quarantine" + (f" ({listed(reasons)})" if reasons else "")
    )
    if left_out:
        run.progress.say(f"prepare: {remarks.line(left_out)}")


def _missing(storage: Storage, record: dict[str, Any]) -> bool:
    """Whether a file of the finished stage is gone or damaged."""
    counts = record["counts"]
    sometimes = [f"{name}.parquet" for name in (TRIAL, RETENTION, PAIRS) if counts.get(f"{name}_rows")]
    names = ["validation.parquet", "fisher.parquet", *sometimes, *counts["parts"]]
    return len(all_complete(storage, names, record["fingerprint"])) < len(names)


def all_complete(storage: Storage, names: Sequence[str], fingerprint: str) -> dict[str, dict[str, Any]]:
    """As `complete`, name -> counts of those that are whole, with one listing of each directory."""
    found = storage.footers("prepared", names, fingerprint)
    beside = [name for name, footer in found.items() if footer.counts.get("quarantined")]
    refused = storage.footers("quarantine", beside, fingerprint)
    rows = {name: refused[name].rows if name in refused else 0 for name in found}
    return {
        name: footer.counts
        for name, footer in found.items()
        if footer.counts
        and footer.counts["rows_used"] == footer.rows
        and footer.counts.get("quarantined", 0) == rows[name]
    }


def complete(storage: Storage, name: str, fingerprint: str) -> dict[str, Any] | None:
    """The counts of a prepared file that is whole, with its quarantine; None where it has to be written (again)."""
    return all_complete(storage, [name], fingerprint).get(name)


def _check(source: ModelSource, settings: Settings, train: Sources) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises SettingsWrong for what can be said before any worker starts: its template, the data's shape."""
    if not train.starts[-1]:
        raise SettingsWrong([f"data.train={settings.data.train}: there is no row in it"])
    try:
        tokenizer = load_tokenizer(here(source, weights=False))
    except UnreadableModel as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error
    columns = settings.data.columns.given()
    for file in train.files:
        if not len(file.rows):
            continue
        row, reason = next(iter(decode(file.table([0]))))
        if reason is not None:
            continue
        kind = shape_of(row, columns)
        try:
            require_template(kind, row, columns, settings.data.chat_template, bool(tokenizer.chat_template))
        except TemplateRequired as error:
            raise SettingsWrong([f"data.train={file.name}, model.policy={source.path}: {error}"]) from error
    return tokenizer


def _ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _held_out_numbers(settings: Settings, total: int) -> tuple[int, int]:
    """Validation rows and Fisher prompts that are held out of ``total`` rows. Raises SettingsWrong where none would be left."""
    validation, prompts = settings.data.held_out(total), fisher_prompts(settings, total)
    if validation + prompts >= total:
        raise SettingsWrong(
            [
                f"data.train has {counted(total, 'rows')}, of which data.validation={validation} and "
                f"anchor.fisher.prompts={settings.anchor.fisher.prompts} would leave none to train on: give a validation file "
                "or smaller numbers"
            ]
        )
    return validation, prompts


class _Prepare:
    """One run of the stage."""

    def __init__(self, run: Run, fingerprint: str, pool: Pool, repeated: bool, raw: RawData) -> None:
        self.storage, self.settings, self.progress = run.storage, run.settings, run.progress
        self.fingerprint, self.pool, self.repeated = fingerprint, pool, repeated
        self.pairs, self.tasks = raw.preference, raw.tasks

    def hold_out(self, train: Sources, raw: RawData) -> tuple[set[int], Counter[str]]:
        """Write validation.parquet, fisher.parquet and, where there are such rows, trial.parquet and retention.parquet.

        Of pairs validation.parquet and fisher.parquet hold the chosen branch; the pairs themselves are in trial.parquet, or
        where that is not written in validation_pairs.parquet. Returns the training rows that they took, and the counts.

        Rows are drawn from the seeded order until enough usable ones are found. A drawn row that cannot be used stays
        in its shard, where it goes to the quarantine like any other.
        """
        total, validation = train.starts[-1], raw.validation
        wanted_validation, prompts = _held_out_numbers(self.settings, total)
        wanted = wanted_validation + prompts
        if 3 * wanted > total and not is_example(self.settings.data.train):
            self.progress.warn(
                f"prepare: WARNING: {wanted:,} of {total:,} rows are held out, more than a third ({wanted_validation:,} for "
                f"validation, {wanted - wanted_validation:,} Fisher prompts): set a smaller data.validation or "
                "anchor.fisher.prompts, or give rows of their own with data.validation=FILE"
            )
        other = Counter[str]()
        if raw.trial is not None:
            other += self._of_file(TRIAL, "data.validation_trial", raw.trial, range(raw.trial.starts[-1]))
        elif validation is not None and self.settings.validation_trial == HALF:
            other += self._of_file(TRIAL, "data.validation", validation, self._halves(validation.starts[-1])[1])
        if raw.retention is not None:
            other += self._of_file(RETENTION, "data.retention", raw.retention, range(raw.retention.starts[-1]))
        is_cut = self._is_cut(wanted_validation)
        keeps_pairs = self.pairs and wanted_validation > 0 and not is_cut and raw.trial is None
        names = ("validation", "fisher", *[TRIAL] * is_cut, *[PAIRS] * keeps_pairs)
        before = {name: complete(self.storage, f"{name}.parquet", self.fingerprint) for name in names}
        if all(found is not None for found in before.values()):
            taken, counts = self._held_out_before(before, validation is not None)  # type: ignore[arg-type]  # none is None
            return taken, counts + other
        order = draw_order(total, self.settings.run.seed)
        found: list[tuple[int, Example | Pair]] = []
        refused: list[str] = []
        with self.progress.task("prepare: hold out", wanted, "rows") as task:
            while len(found) < wanted:
                candidates = [row for row, _ in zip(order, range(wanted - len(found) + 16), strict=False)]
                if not candidates:
                    raise RunFailed(
                        f"data.train: only {len(found)} usable rows, but {wanted} are to be held out{because(refused)}"
                    )
                for row, example in self._examples(train, candidates, task):
                    if isinstance(example, str):
                        refused.append(example)
                    else:
                        found.append((row, example))
                task.at(min(wanted, len(found)))
        found = found[:wanted]
        taken = {row for row, _ in found}
        counts = Counter[str]()
        if validation is None:
            directions, kept = self._halves(wanted_validation)
            self._write("validation", [found[i] for i in directions], counts)
            if kept:
                self._write(TRIAL, [found[i] for i in kept], counts)
            if keeps_pairs:
                self._write(PAIRS, [found[i] for i in directions], counts)
        else:
            rows = self._halves(validation.starts[-1])[0]
            counts += self._of_file("validation", "data.validation", validation, rows)
        self._write("fisher", found[wanted_validation:], counts)
        return taken, counts + other

    def _halves(self, rows: int) -> tuple[list[int], list[int]]:
        """Rows of data.validation that make directions, and those that are kept for a trial; says where none can be."""
        if self.settings.validation_trial != HALF:
            return list(range(rows)), []
        cut = halves(rows, self.settings.run.seed)
        if not cut[1]:
            self.progress.say(
                f"prepare: data.validation has {counted(rows, 'rows')}, too few to be cut in two (at least {LEAST_TO_CUT}): all of "
                "them make the directions, and a trial measures on the same; give others with data.validation_trial"
            )
        return cut

    def _is_cut(self, held_out: int) -> bool:
        """Whether rows that are held out of data.train are kept for a trial."""
        return self.settings.validation_trial == HALF and held_out >= LEAST_TO_CUT

    def _held_out_before(self, before: Mapping[str, dict[str, Any]], from_file: bool) -> tuple[set[int], Counter[str]]:
        """As `hold_out`, from the counts of the files."""
        counts = Counter[str]()
        for name, found in before.items():
            counts += of_validation(found) if from_file and name == "validation" else held(name, found)
        return {row for found in before.values() for row in found.get("held_out", ())}, counts

    def _examples(self, sources: Sources, rows: Sequence[int], task: Any) -> list[tuple[int, Example | Pair | str]]:
        """(row, example or pair, or why there is none) in the order of ``rows``."""
        ordered = sorted(rows)
        results: list[Example | Pair | str] = []
        work = PrepareTask(sources.pieces(ordered), None, None, self.fingerprint, repeated=self.repeated)
        self.pool.run([Shard("held-out rows", 0)], lambda s: work, lambda s, r: results.extend(r[1]), task)
        by_row = dict(zip(ordered, results, strict=True))
        return [(row, by_row[row]) for row in rows]

    def _of_file(self, name: str, key: str, sources: Sources, rows: Sequence[int]) -> Counter[str]:
        """Write ``rows`` of a validation file, set by ``key``, as prepared/<name>.parquet, unless done; returns the counts."""
        if not rows:
            return Counter()
        written = f"prepared/{name}.parquet", f"quarantine/{name}.parquet"
        data = self.settings.data
        tasks = self.tasks if key == "data.validation" else {}
        repeated = data.strips_prompts and repeating(sources, tasks, data.columns.given())
        role = "pair" if name == TRIAL else "validation"
        counts = Counter(complete(self.storage, f"{name}.parquet", self.fingerprint) or {})
        if not counts:
            work = PrepareTask(sources.pieces(rows), *written, self.fingerprint, role, repeated)
            with self.progress.task(f"prepare: {name}", len(rows), "rows") as task:
                self.pool.run(
                    [Shard(f"{name} rows", len(rows))], lambda s: work, lambda s, r: counts.update(r[0]), task
                )
        if not counts["rows_used"]:
            what = "is a pair that can be used" if self.pairs and name == TRIAL else "has a response token"
            raise RunFailed(
                f"{key}={getattr(data, key.partition('.')[2])}: none of its {len(rows)} rows {what}; "
                f"see the reasons in {self.storage.path(written[1])}"
            )
        return of_validation(counts, name)

    def _write(self, name: str, found: Sequence[tuple[int, Example | Pair]], counts: Counter[str]) -> None:
        """Write held-out rows, and which ones they are beside them."""
        made, examples = [one for _, one in found], [chosen_of(one) for _, one in found]
        table = to_pair_table(made) if self.pairs and name in (TRIAL, PAIRS) else to_table(examples)  # type: ignore[arg-type]  # all are pairs
        own: dict[str, Any] = {"held_out": [row for row, _ in found], "rows_used": len(examples)}
        own["truncated"] = sum(one.truncated for one in made)
        own |= Counter(f"note/{note}" for example in examples for note in example.notes)
        own |= remarks.of_lost(example.source for example in examples if example.lost)
        self.storage.write_table(f"prepared/{name}.parquet", table, self.fingerprint, own)
        counts += held(name, own)

    def shards(self, train: Sources, rows: Sequence[int], parts: Sequence[str]) -> Counter[str]:
        """Write every part of the plan for ``rows`` that is not there yet; returns the counts."""
        size, counts = int(self.settings.data.shard_examples), Counter[str]()
        plan = {part: rows[i * size : (i + 1) * size] for i, part in enumerate(parts)}

        def add(found: dict[str, Any]) -> None:
            counts.update(found)
            counts["train_rows"] += found["rows_used"]

        before = all_complete(self.storage, parts, self.fingerprint)
        missing = [part for part in parts if part not in before]
        for found in before.values():
            add(found)
        if len(missing) < len(parts):
            self.progress.say(f"prepare: {len(parts) - len(missing)} of {len(parts)} shards are complete already")

        def payload(shard: Shard) -> PrepareTask:
            return PrepareTask(
                train.pieces(plan[shard.name]), f"prepared/{shard.name}", f"quarantine/{shard.name}", self.fingerprint,
                repeated=self.repeated, trained=True,
            )  # fmt: skip

        finished = len(parts) - len(missing)
        notes = Notes(self.storage, "prepared", self.fingerprint, len(parts))

        def done(shard: Shard, result: tuple[dict[str, Any], list]) -> None:
            nonlocal finished
            add(result[0])
            notes.add(shard.name, result[0]["rows_used"], result[0])
            finished += 1
            task.note(f"{finished}/{len(parts)} shards, {counts['train_rows']:,} rows kept")

        with self.progress.task("prepare: tokenize", sum(len(plan[part]) for part in missing), "rows") as task:
            self.pool.run([Shard(part, len(plan[part])) for part in missing], payload, done, task)
        notes.write()
        return counts
