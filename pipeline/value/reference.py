"""The reference's pass over the shards: a forward alone, its log-probabilities in reference/.

It is a pass of its own, so that no worker holds two models. Of preference pairs whose policy is the reference there is
none: the value workers have the log-probabilities at hand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.run.noted import Footer
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.value.kinds import Kind
from alphatoken.pipeline.value.worker import Reference, ReferenceWorker, ValueTask


def make_reference(run: Run, kind: Kind, place: Reference, prepared: Mapping[str, Footer]) -> None:
    """Write every part of reference/ that is not complete yet, unless the value workers are going to."""
    if not place.is_policy:
        started = time.monotonic()
        counts = _missing_parts(run, kind, place.fingerprint, prepared)
        run.manifest.note("value", reference={"seconds": round(time.monotonic() - started, 3), **counts})
    run.manifest.note("value", reference_fingerprint=place.fingerprint)


def _missing_parts(run: Run, kind: Kind, fingerprint: str, prepared: Mapping[str, Footer]) -> dict[str, int]:
    """What this call has computed."""
    there = run.storage.footers("reference", prepared, fingerprint)
    missing = [part for part, own in prepared.items() if part not in there or there[part].rows != own.rows]
    counts = {"rows": 0, "tokens": 0}
    if not missing:
        return counts
    tokens = {part: prepared[part].counts["tokens"] for part in missing}
    own = run.settings.model
    arguments = {
        "storage": run.storage,
        "source": ModelSource(run.models.reference, own.revision, own.dtype, own.trust_remote_code),
        "settings": run.settings,
        "kind": kind,
        "vocabulary": run.manifest.stage("prepare")["counts"].get("vocabulary"),
    }

    def done(shard: Shard, result: dict[str, int]) -> None:
        for key in counts:
            counts[key] += result[key]

    with (
        run.cluster.pool(logged("reference", ReferenceWorker), arguments, run.cluster.model_resources()) as pool,
        run.progress.task("value: reference", sum(tokens.values()), "tokens") as task,
    ):
        shards = [Shard(part, count) for part, count in tokens.items()]
        pool.run(shards, lambda shard: ValueTask(shard.name, fingerprint, "reference"), done, task)
    return counts
