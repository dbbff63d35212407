"""trial: short fine-tunes on every mask, each one task; then a table, a sentence, and files of both.

A finished fine-tune is one file that carries the fingerprint of all that it depends on: a trial that was stopped, or to
which a mask was added, does what is missing. Numbers do not depend on which worker does what.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from alphatoken.data_schemas import TRIAL_RESULTS
from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.fingerprint import digest, of_model
from alphatoken.pipeline.run.progress import counted
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.trial.budget import duration
from alphatoken.pipeline.trial.candidates import FULL, Candidate, kept_tokens, labels_of
from alphatoken.pipeline.trial.completions import make_completions
from alphatoken.pipeline.trial.entering import TrialRows
from alphatoken.pipeline.trial.hidden import remove_unused
from alphatoken.pipeline.trial.inputs import TrialInputs, trial_inputs
from alphatoken.pipeline.trial.verdict import SEEN, SUMMARY, Measured, Verdict, judge
from alphatoken.pipeline.trial.worker import TrialTask, TrialWorker

RESULTS = "trial/results.parquet"
SEED_STRIDE = 1_000_003  # between the seeds of random masks of two runs


def make_trial(run: Run) -> dict[str, Any]:
    """Fine-tune on everything that is missing, write trial/results.parquet and trial/summary.json; returns the summary.

    Raises SettingsWrong and RunFailed.
    """
    started = time.monotonic()
    inputs = trial_inputs(run)
    run.manifest.forget("trial")  # a trial with other settings takes the place of the one before
    fingerprint = run.manifest.begin(
        "trial",
        {
            **inputs.common,
            "candidates": [one.identity for one in inputs.candidates],
            "trial.seeds": run.settings.trial.seeds,
        },
        {"trial": run.settings.trial},
    )
    missing = _missing(run, inputs)
    _announce(run, inputs, len(missing))
    completions = make_completions(run, inputs.prompts, inputs.completions_fingerprint)
    rows = TrialRows(inputs.sample, inputs.held_out.rows, completions, inputs.retention, inputs.pairs)
    seconds = _fine_tune(run, inputs, rows, missing)
    found = [_measured(run, inputs, one, seed) for one, seed in _pairs(run, inputs)]
    try:
        beside = {one.name: one.random for one in inputs.candidates}
        verdict = judge(found, beside, inputs.held_out.seen, inputs.pairs, _caveat(inputs))
    except ValueError as error:
        reasons = "; ".join(f"{m.candidate}, seed {m.seed}: {m.failed}" for m in found if m.failed)
        raise RunFailed(f"trial: {error} ({reasons}): set a smaller trial.learning_rate") from error
    for failure in verdict.failed:
        run.progress.say(f"trial: left out, {failure}")
    table = pa.Table.from_pylist([asdict(one) for one in found], TRIAL_RESULTS)
    run.storage.write_table(RESULTS, table, fingerprint)
    summary = _summary(run, inputs, verdict)
    run.storage.write_json(SUMMARY, summary)
    run.manifest.finish(
        "trial", time.monotonic() - started, fine_tunes=len(_tasks(run, inputs)), failed=len(verdict.failed), winner=verdict.winner,
        steps=inputs.extent.steps, examples=inputs.extent.examples, fine_tune_seconds=round(seconds, 3),
    )  # fmt: skip
    return summary


def _caveat(inputs: TrialInputs) -> str:
    """What is won in the last layers need not be won where all learn (docs/results.md, the pool)."""
    if not inputs.alone:
        return ""
    return f"the last {counted(inputs.alone, 'layers')} alone learned: ask with trial.train=lora before you train all of them"


def _announce(run: Run, inputs: TrialInputs, left: int) -> None:
    """What is going to be done, and about how long it takes, before it is; ``left``: fine-tunes that are not there."""
    far, count = inputs.extent, len(_tasks(run, inputs))
    held_out = f"{inputs.held_out.count:,} held-out {'pairs' if inputs.pairs else 'rows'}"
    by = "by the seconds of the value stage" if inputs.measured else "by a rough guess of the device's speed"
    run.progress.say(
        f"trial: {count} fine-tunes ({len(inputs.candidates)} candidates, {run.settings.trial.seeds} seed(s)) of {far.steps} "
        f"steps on {far.examples:,} examples, measured on {held_out}; {far.flops:.2e} "
        f"operations, about {duration(far.flops / inputs.rate * left / count)} {by}"
        + (f" for the {left} that are left" if left < count else "")
    )
    for note in inputs.notes:
        run.progress.say(f"trial: {note}")
    if inputs.held_out.seen:
        run.progress.say(
            f"trial: warning: adaptation is {SEEN}, which flatters masks that come from them; prepare a run with "
            "data.validation_trial=half (or trial.auto=true) to keep rows for it"
        )


def _pairs(run: Run, inputs: TrialInputs) -> list[tuple[Candidate, int]]:
    """(candidate, seed) of every fine-tune, seed after seed, so that a trial that is stopped has compared something."""
    seeds = range(run.settings.trial.seeds)
    return [(one, seed) for seed in seeds for one in inputs.candidates if seed in one.seeds(len(seeds))]


def _tasks(run: Run, inputs: TrialInputs) -> dict[str, tuple[Candidate, int]]:
    """(candidate, seed) of every fine-tune by the name of its file, as `_pairs`; twins share theirs."""
    found: dict[str, tuple[Candidate, int]] = {}
    for one, seed in _pairs(run, inputs):
        found.setdefault(_place(one, seed), (one, seed))
    return found


def _place(candidate: Candidate, seed: int) -> str:
    return f"trial/fine-tunes/{candidate.directory}/seed-{seed:02d}.json"


def _done(run: Run, inputs: TrialInputs, candidate: Candidate, seed: int) -> dict[str, Any] | None:
    """The result of a finished fine-tune; None where it has to be done (again)."""
    name = _place(candidate, seed)
    if not run.storage.exists(name):
        return None
    try:
        found = run.storage.read_json(name)
    except ValueError:  # overwritten: not what this program leaves under a final name
        return None
    is_own = isinstance(found, dict) and found.get("fingerprint") == inputs.fingerprint(candidate, seed)
    return found if is_own else None


def _missing(run: Run, inputs: TrialInputs) -> dict[str, tuple[Candidate, int]]:
    """(candidate, seed) of every fine-tune that has to be done, by what people call it."""
    tasks = _tasks(run, inputs).values()
    return {f"{one.name}, seed {seed}": (one, seed) for one, seed in tasks if _done(run, inputs, one, seed) is None}


def _fine_tune(run: Run, inputs: TrialInputs, rows: TrialRows, missing: dict[str, tuple[Candidate, int]]) -> float:
    """Do every fine-tune that is ``missing``, one task each; returns the seconds that took, workers' start included."""
    count = len(_tasks(run, inputs))
    finished = count - len(missing)
    if finished:
        run.progress.say(f"trial: {finished} of {count} fine-tunes are done already")
    if not missing:
        return 0.0
    steps = inputs.extent.steps
    shards = [Shard(name, 0 if one.kind == "untouched" else steps) for name, (one, _) in missing.items()]

    def done(shard: Shard, result: object) -> None:
        nonlocal finished
        finished += 1
        task.note(f"{finished}/{count} fine-tunes")

    with (
        run.cluster.pool(
            logged("trial", TrialWorker), worker_arguments(run, inputs, rows), run.cluster.model_resources()
        ) as pool,
        run.progress.task("trial", sum(shard.units for shard in shards), "steps") as task,
    ):
        pool.run(shards, lambda shard: task_of(run, inputs, *missing[shard.name]), done, task)
    remove_unused()  # on this node, after workers that were killed
    return task.seconds


def worker_arguments(run: Run, inputs: TrialInputs, rows: TrialRows) -> dict[str, Any]:
    """What a TrialWorker is made with."""
    own, models = run.settings.model, run.models

    def source(path: str) -> ModelSource:
        return ModelSource(path, own.revision, own.dtype, own.trust_remote_code)

    same = of_model(models.policy) == of_model(models.reference)
    return {
        "storage": run.storage, "source": source(models.policy), "settings": run.settings, "rows": rows,
        "reference": None if same else source(models.reference), "name": _name_of_states(run, inputs, rows),
    }  # fmt: skip


def task_of(run: Run, inputs: TrialInputs, one: Candidate, seed: int) -> TrialTask:
    """The fine-tune of a candidate at a seed."""
    drawn = SEED_STRIDE * (run.settings.run.seed + 1) + seed
    labels = labels_of(one, inputs.sample, drawn, inputs.masks)
    return TrialTask(one, labels, seed, inputs.extent.steps, _place(one, seed), inputs.fingerprint(one, seed))


def _name_of_states(run: Run, inputs: TrialInputs, rows: TrialRows) -> str:
    """Of all that hidden states depend on: the same for trials that differ in what is learned on them."""
    model = {key: inputs.common[key] for key in ("policy", "model.revision", "model.dtype", "valuation.layers")}
    model |= run.settings.lower_inputs
    lengths = {name: some.input_ids for name, some in rows.sets().items()}
    own = run.settings
    return digest({**model, "attention": own.model.attention, "rows": digest(lengths), "bound": own.trial.cache_bytes})[
        :24
    ]


def _measured(run: Run, inputs: TrialInputs, candidate: Candidate, seed: int) -> Measured:
    found = _done(run, inputs, candidate, seed)
    assert found is not None
    whole = kept_tokens(labels_of(_full(inputs), inputs.sample, 0, {}))
    return Measured(
        candidate.name, candidate.kind, seed, found["kept_tokens"] / whole, found["trained_tokens"], found.get("adaptation"),
        found.get("retention"), found.get("row_losses", []), found.get("row_tokens", []), found["failed"],
        found.get("retention_loss"), found.get("margin"), found.get("reward_accuracy"),
    )  # fmt: skip


def _full(inputs: TrialInputs) -> Candidate:
    return next(one for one in inputs.candidates if one.name == FULL)


def _summary(run: Run, inputs: TrialInputs, verdict: Verdict) -> dict[str, Any]:
    own = run.settings.trial
    return {
        **verdict.as_json(),
        "settings": {**asdict(own), "learning_rate": own.rate},
        "layers": run.settings.valuation.layers,
        "steps": inputs.extent.steps,
        "examples": inputs.extent.examples,
        "basis": inputs.basis,
        "pairs": inputs.pairs,
        "held_out_rows": inputs.held_out.count,
        "retention_rows": len(inputs.retention) if inputs.retention else 0,
        "held_out_made_directions": inputs.held_out.seen,
        "completions": len(inputs.prompts),
        "identities": {one.name: digest(one.identity)[:12] for one in inputs.candidates},
        "notes": list(inputs.notes),
    }
