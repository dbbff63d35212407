"""How long each stage takes on the machine at hand, by what was measured there (calibration.py).

One worker, as in one process; of several workers the model's work is shared. What is not in it: the start of Ray, the
mask, and the report, which are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alphatoken.pipeline.plan.calibration import Calibration
from alphatoken.pipeline.settings import Settings


def stage_seconds(
    flops: Mapping[str, Any], rows: int, settings: Settings, found: Calibration, checkpoints: int, inline: bool
) -> dict[str, float]:
    """Stage -> seconds, and ``total``. ``flops``: of the plan; ``rows``: of data.train; ``inline``: no process is started."""
    workers = settings.cluster.workers if isinstance(settings.cluster.workers, int) else 1
    start, anchor = 0.0 if inline else found.start, flops["anchor"]
    seconds = {"prepare": start + rows * found.row}
    if settings.valuation.needs_directions:
        fisher = anchor.get("fisher", 0)
        gradient = anchor["flops"] - fisher
        pools = checkpoints + bool(fisher)
        model = gradient / found.rates["gradient"] + (fisher / found.rates["fisher"] if fisher else 0.0)
        seconds["anchor"] = pools * (start + found.load) + model / workers
    if flops["value"]["flops"]:
        seconds["value"] = checkpoints * (start + found.load) + flops["value"]["flops"] / found.rates["value"] / workers
    return {**seconds, "total": sum(seconds.values())}
