"""value: the columns of every response token, one sidecar part per prepared part.

The only stage over the whole data set with the model. Batches are formed within a shard from length-sorted rows by a
token budget, so values do not depend on the number of workers; while one shard computes, the next is read and the last
is written.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from alphatoken.pipeline.anchor.engine import together
from alphatoken.pipeline.anchor.loading import check_devices
from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare.reader import prepared_parts
from alphatoken.pipeline.run.noted import Notes
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.value.checkpoints import value_checkpoints
from alphatoken.pipeline.value.inputs import check_reference, checked_anchor, reference_inputs, value_inputs
from alphatoken.pipeline.value.kinds import Kind, Pairs, Supervised
from alphatoken.pipeline.value.reference import make_reference
from alphatoken.pipeline.value.rehearsal import rehearse
from alphatoken.pipeline.value.worker import ValueTask, ValueWorker

COUNTED = ("tokens", "padded_tokens")


def make_values(run: Run) -> None:
    """Write values/, unless done already; goes on with the parts that are missing.

    Where no score looks at a direction, `prepare` alone is needed. reference/ is written as well for preference data and
    for the column reference_loss. Raises SettingsWrong and RunFailed.
    """
    valuation, pairs = run.settings.valuation, run.manifest.pairs
    if valuation.rehearsed:
        return rehearse(run)
    if not run.settings.columns and not pairs:
        run.progress.say("value: skipped, since valuation.scores is empty")
        return
    started = time.monotonic()
    prepared = run.manifest.require("prepare", "value")
    anchor = checked_anchor(run) if valuation.needs_directions else None
    check_reference(run.settings, run.models)
    check_devices(run)
    inputs = value_inputs(
        run.settings, run.models, prepared["fingerprint"], anchor["fingerprint"] if anchor else None, pairs
    )
    own = run.settings.model
    recorded = {"model": own, "valuation": valuation, "cluster": run.settings.cluster}
    fingerprint = run.manifest.begin("value", inputs, recorded, run.models.about())
    prepared_as = prepared_parts(run)
    rows = {part: footer.rows for part, footer in prepared_as.items()}
    before = run.storage.footers("values", rows, fingerprint)
    missing = [part for part in rows if part not in before or before[part].rows != rows[part]]
    reference = reference_inputs(run) if pairs or valuation.reference_loss else None
    compared = run.storage.footers("reference", rows, reference.fingerprint) if reference else prepared_as
    if run.manifest.done("value") and not missing and compared.keys() >= rows.keys():
        run.progress.say("value: done already")
        return
    if len(missing) < len(rows):
        run.progress.say(f"value: {len(rows) - len(missing)} of {len(rows)} shards are complete already")
    kind: Kind = Pairs(valuation.beta) if pairs else Supervised()
    if reference:
        make_reference(run, kind, reference, prepared_as)
        there = run.storage.footers("reference", rows, reference.fingerprint)
        missing = [part for part in rows if part in missing or part not in there or there[part].rows != rows[part]]
    arguments = {
        "storage": run.storage,
        "source": ModelSource(run.models.policy, own.revision, own.dtype, own.trust_remote_code),
        "settings": run.settings,
        "snapshots": range(anchor["counts"]["snapshots"]) if anchor and valuation.looks_at_anchors else [],
        "kind": kind,
        "reference": reference,
        "overlap": prepared["inputs"].get("data.overlap"),
    }
    tokens = {part: prepared_as[part].counts["tokens"] for part in missing}
    valued = value_checkpoints if len(run.models.checkpoints) > 1 else _value_parts
    found = valued(run, arguments, fingerprint, tokens, rows)
    for part in rows.keys() - set(missing):
        found.append(before[part].counts)
    whole = added_up(found)
    counts, engine = {key: whole[key] for key in COUNTED}, whole["engine"]
    counts["timed_tokens"] = run.manifest.stage("value")["counts"].get("timed_tokens", 0) + sum(tokens.values())
    _finish(run, time.monotonic() - started, sum(rows.values()), counts, engine)


def _value_parts(
    run: Run, arguments: dict[str, Any], fingerprint: str, tokens: dict[str, int], rows: dict[str, int]
) -> list[dict[str, Any]]:
    """Write the parts ``tokens`` (name -> its tokens) of values/; returns the counts of all, added up."""
    counts: list[dict[str, Any]] = []
    landed = 0
    finished = len(rows) - len(tokens)
    notes = Notes(run.storage, "values", fingerprint, len(rows))

    def done(shard: Shard, result: dict[str, Any]) -> None:
        nonlocal landed
        landed += 1
        notes.add(shard.name, rows[shard.name], {key: result[key] for key in COUNTED})
        counts[:] = [added_up([*counts, result])]  # one record, however many shards
        task.note(f"{finished + landed}/{len(rows)} shards")

    with (
        run.cluster.pool(logged("value", ValueWorker), arguments, run.cluster.model_resources()) as pool,
        run.progress.task("value", sum(tokens.values()), "tokens") as task,
    ):
        task.note(f"{finished}/{len(rows)} shards")
        starts = dict(zip(rows, itertools.accumulate(rows.values(), initial=0), strict=False))
        shards = [Shard(p, n) for p, n in tokens.items()]
        pool.run(shards, lambda s: ValueTask(s.name, fingerprint, first=starts[s.name]), done, task)
    notes.write()
    return counts


def added_up(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several parts as if they were one."""
    added: dict[str, Any] = {key: sum(one.get(key, 0) for one in counts) for key in COUNTED}
    return {**added, "engine": together([one["engine"] for one in counts if "engine" in one])}


def _finish(run: Run, seconds: float, rows: int, counts: dict[str, int], engine: dict[str, Any]) -> None:
    resources = run.cluster.model_resources()
    padding = 1 - counts["tokens"] / counts["padded_tokens"] if counts["padded_tokens"] else 0.0
    run.manifest.finish(
        "value", seconds, rows=rows, padding=round(padding, 4), workers=resources.workers,
        cpus_per_worker=resources.cpus, gpus_per_worker=resources.gpus, engine=engine, **counts,
    )  # fmt: skip
    valuation = run.settings.valuation
    if away := engine.get("offloaded_layers"):
        where = run.settings.model.offload
        run.progress.say(f"value: {away} lower layer(s) are offloaded to {where} and were brought back for every pass")
    if engine and "paper" in valuation.scores and valuation.window and engine["causal_layers"] < valuation.layers:
        run.progress.say(
            f"value: causal path: {engine['causal_layers']} of {valuation.layers} layers; the others have no softmax "
            "attention that the engine sees, or a value that is not made by their own linear maps"
        )
    run.progress.say(f"value: {counts['tokens']:,} tokens in {seconds:.0f} s, padding {padding:.1%}")
