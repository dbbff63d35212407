"""How the rows are cut into parts, and how many workers make them."""

from __future__ import annotations

from dataclasses import replace

from alphatoken.pipeline.cluster.work import Resources
from alphatoken.pipeline.run.run import Workers


def planned_parts(rows: int, per_shard: int) -> list[str]:
    """The names of the parts that ``rows`` rows go into."""
    count = -(-rows // per_shard)
    return [f"part-{index:05d}-of-{count:05d}.parquet" for index in range(count)]


def worker_resources(cluster: Workers, rows: int) -> Resources:
    """What the workers that tokenize ``rows`` rows take."""
    resources = cluster.tokenizer_resources()
    few = max(1, -(-rows // 256))  # starting a worker takes longer than tokenizing some hundred rows
    least = None if resources.least is None else min(resources.least, few)
    return replace(resources, workers=min(resources.workers, few), least=least)
