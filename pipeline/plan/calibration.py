"""What a short measurement on the machine at hand has found out, kept in the cache for later plans.

Operations per second are those of the plan's own count, so that what the count leaves out (elementwise work, memory,
kernels that skip half of a square) is in the rate. A measurement holds for one machine, architecture and kind of value.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alphatoken.pipeline.cluster.inline import InlineCluster
from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.run.cache import cache_directory
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.fingerprint import digest
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run

VERSION = 1  # of what is measured and how
_CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Calibration:
    """``rates``: operations per second of one worker: value | gradient | fisher, those that the run has.

    ``machine``: in words. ``measured``: when, ISO 8601. ``start``: seconds until a worker's process has imported what it needs;
    ``load``: until it has the model. ``row``: seconds of `prepare` per row. ``seconds``: that the measurement took.
    """

    machine: str
    measured: str
    start: float
    load: float
    row: float
    rates: Mapping[str, float]
    seconds: float


def machine() -> str:
    """Processor, cores, GPU and torch, in words."""
    names = [line.partition(":")[2].strip() for line in _lines(_CPUS) if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {device}, torch {torch.__version__}"


def threads(run: Run) -> int:
    """Of one worker, as a run in one process would have them."""
    return InlineCluster(run.settings.cluster, debug=False).model_resources().cpus


def kept(run: Run) -> Calibration | None:
    """The measurement for this machine, model and kind of value; None where there is none, or none that can be read.

    None also where the plan is for a machine with devices that this one has not.
    """
    try:
        found = json.loads(_place(run).read_text(encoding="utf-8"))
        return Calibration(**found)
    except (OSError, ValueError, TypeError, RunFailed):
        return None


def keep(run: Run, found: Calibration) -> Path:
    """Keep a measurement for later plans; returns its file. Raises OSError where the cache cannot be written."""
    place = _place(run)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    os.replace(beside, place)
    return place


def _place(run: Run) -> Path:
    settings = run.settings
    own, valuation = settings.model, settings.valuation
    about: dict[str, Any] = {
        "version": VERSION, "machine": machine(), "threads": threads(run), "architecture": _architecture(run),
        "model": [own.revision, own.dtype, own.attention], "layers": settings.anchor_layers,
        "valuation": [valuation.layers, valuation.window, list(valuation.scores), valuation.exact, valuation.tokens_per_batch],
        "objectives": list(settings.objectives), "fisher": [settings.makes_fisher, settings.anchor.fisher.max_new_tokens],
    }  # fmt: skip
    return cache_directory() / "calibrations" / f"{digest(about)[:24]}.json"


def _architecture(run: Run) -> str:
    """What a model's cost depends on: its configuration, and not its weights, which may be large."""
    own = run.settings.model
    source = ModelSource(run.models.policy, own.revision, trust_remote_code=own.trust_remote_code)
    content = load_config(here(source, weights=False)).to_dict()
    return digest({key: value for key, value in content.items() if not key.startswith("_")})


def _lines(place: Path) -> list[str]:
    try:
        return place.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
