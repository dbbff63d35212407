"""Run directories as prepare and value leave them, with values that no model made, for tests of the mask stage."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from alphatoken.data_schemas import PREPARED, SCORES, is_signed, value_columns, values_schema
from alphatoken.pipeline.mask.layout import mask_data, mask_place
from alphatoken.pipeline.mask.stage import make_mask
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import MaskSettings, RunSettings, Settings, ValuationSettings

ROOT = Path(__file__).parents[2]
EOS = 2
COLUMNS = value_columns(tuple(SCORES), exact=True, reference_loss=True)
WITH_UNROLLED = value_columns(tuple(SCORES), exact=True, reference_loss=True, unrolled=True)  # what auto then takes


def part_names(count: int) -> list[str]:
    return [f"part-{i:05d}-of-{count:05d}.parquet" for i in range(count)]


def examples(
    rows: int, rng: np.random.Generator, longest: int = 14, first: int = 0, stability: float = 1.0, columns=COLUMNS
):
    """Prepared and value rows: prompts and responses of every length, some without any response token.

    What is no component of a sum along a direction is never negative; some gradient norms are 0.
    """
    prepared, values = [], []
    for row in range(first, first + rows):
        prompt, response = int(rng.integers(1, longest)), int(rng.integers(0, longest))
        ids = rng.integers(3, 60, prompt + response).tolist()
        if response:
            ids[-1] = EOS
        inside = [False] * prompt + [True] * response
        labels = [t if r else -100 for t, r in zip(ids, inside, strict=True)]
        prepared.append({"id": f"row-{row}", "input_ids": ids, "labels": labels, "source": f"f:{row}"})
        drawn = {}
        for name in dict.fromkeys((*COLUMNS, *columns)):
            spread = stability if name.startswith("stability") else 1.0
            some = (np.round(rng.standard_normal(len(ids)), 1) * spread).astype(np.float32)  # rounded: with ties
            drawn[name] = ((some if is_signed(name) else np.abs(some)) * np.array(inside)).tolist()
        values.append({"id": f"row-{row}", **{name: drawn[name] for name in columns}})
    return prepared, values


def write_run(
    directory: Path, sizes=(40, 0, 33), seed: int = 0, stability: float = 1.0, columns=COLUMNS, drift="warmup",
    anchor=None, longest: int = 14, **counts,
):  # fmt: skip
    """A run directory as prepare and value leave it; returns storage, prepared rows and value rows.

    ``columns``: of values/; none: as prepare leaves it. ``anchor``: more of that stage's inputs.
    """
    storage, rng = Storage(str(directory)), np.random.default_rng(seed)
    manifest, parts = Manifest(storage), part_names(len(sizes))
    first = manifest.begin("prepare", {"seed": seed}, {})
    if columns:
        manifest.begin("anchor", {"anchor.drift": drift, **(anchor or {})}, {})
        scores = [score for score, own in SCORES.items() if set(own) <= set(columns)]
        second = manifest.begin(
            "value", {"prepare": first, "columns": list(columns)}, {"valuation": ValuationSettings(scores=scores)}
        )
    rows: tuple[list, list] = ([], [])
    for part, size in zip(parts, sizes, strict=True):
        prepared, values = examples(size, rng, longest, first=len(rows[0]), stability=stability, columns=columns)
        storage.write_table(f"prepared/{part}", pa.Table.from_pylist(prepared, PREPARED), first)
        if columns:
            storage.write_table(f"values/{part}", pa.Table.from_pylist(values, values_schema(columns)), second)
        rows[0].extend(prepared)
        rows[1].extend(values)
    manifest.finish("prepare", 0.0, **{"parts": parts, "eos_token_ids": [EOS], "vocabulary": 60, **counts})
    if columns:
        manifest.finish("anchor", 0.0)
        manifest.finish("value", 0.0)
    return storage, *rows


def name_models(storage: Storage, policy: str | list[str], tokenizer: str) -> None:
    """Record in the manifest what a run would, of models that are not there."""
    content = Manifest(storage).content
    content["configuration"]["model"] = {"policy": policy}
    content["stages"]["prepare"]["counts"]["tokenizer"] = tokenizer
    storage.write_json("run.json", content)


def run_of(storage: Storage, progress: Progress | None = None, **settings) -> Run:
    """What the mask stage is given, without models and without a cluster; ``settings``: keys of mask, and the run's seed."""
    progress, own = progress or Progress(Console(quiet=True)), RunSettings(seed=settings.pop("seed", 0))
    return Run(storage, Manifest(storage), Settings(run=own, mask=MaskSettings(**settings)), progress)


def mask(storage: Storage, **settings):
    return make_mask(run_of(storage, **settings))


def masks(storage: Storage, name: str = "default") -> list[dict]:
    return [row for file in storage.names(mask_data(name)) for row in pq.read_table(storage.path(file)).to_pylist()]


def contents(storage: Storage, name: str = "default") -> dict[str, bytes]:
    files = [*storage.names(mask_place(name)), *storage.names(mask_data(name))]
    return {file: storage.read_bytes(file) for file in files}
