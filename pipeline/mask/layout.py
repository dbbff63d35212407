"""Where a mask lies in the run directory: the one place that knows it, for whoever writes or reads masks.

    masks/<name>/data/train-00000-of-00012.parquet    the shards, nothing else in that folder
    masks/<name>/README.md, masks/<name>/summary.json    the card and the numbers

Readers of whole directories (pandas, `pyarrow.dataset`, DuckDB) want a folder that holds Parquet alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.remedies import mask_again
from alphatoken.pipeline.run.storage import Storage

DATA = "data"


def mask_place(name: str) -> str:
    """The directory of the mask ``name``, relative to the run."""
    return f"masks/{name}"


def mask_data(name: str) -> str:
    """The folder of its shards."""
    return f"{mask_place(name)}/{DATA}"


def shard_name(part: str) -> str:
    """What the shard that belongs to ``part`` of prepared/ is called."""
    return part.replace("part-", "train-", 1)


def mask_part(name: str, part: str) -> str:
    """Its shard that belongs to ``part`` of prepared/, with the same rows in the same order."""
    return f"{mask_data(name)}/{shard_name(part)}"


def mask_card(name: str) -> str:
    """The data-set card."""
    return f"{mask_place(name)}/README.md"


def mask_summary(name: str) -> str:
    """The numbers; the file is written last, so that a mask that has it is complete."""
    return f"{mask_place(name)}/summary.json"


def summary_of(storage: Storage, name: str) -> dict[str, Any]:
    """summary.json of a mask. Raises FileNotFoundError."""
    found: dict[str, Any] = storage.read_json(mask_summary(name))
    return found


def is_finished(storage: Storage, name: str) -> bool:
    """Whether the mask is complete, its shards where an earlier version left them or not."""
    return storage.exists(mask_summary(name))


def finished_masks(storage: Storage, manifest: Manifest) -> list[str]:
    """The names of the run's masks that are complete, in the order in which they were made; some may have been removed since."""
    stages = [stage for stage in manifest.content["stages"] if stage.startswith("mask/") and manifest.done(stage)]
    return [name for stage in stages if is_finished(storage, name := stage.partition("/")[2])]


def earlier_shards(storage: Storage, name: str) -> list[str]:
    """Shards as versions before data/ left them: beside the card."""
    found = storage.names(mask_place(name))
    return [file for file in found if file.rpartition("/")[2].startswith("train-") and file.endswith(".parquet")]


def has_shards(storage: Storage, name: str) -> bool:
    """Whether the mask is complete and its shards are where readers look."""
    return is_finished(storage, name) and bool(storage.names(mask_data(name)))


def require_shards(storage: Storage, name: str) -> None:
    """Raise RunFailed, with what to do, where the shards lie as an earlier version left them or are gone."""
    if storage.names(mask_data(name)):
        return
    if earlier_shards(storage, name):
        raise RunFailed(
            f"the shards of mask {name} lie in {mask_place(name)}/, where an earlier version left them, and not in "
            f"{mask_data(name)}/: make it again, `alphatoken mask run.dir={storage.root} mask.name={name}` with the mask.* keys "
            "that its summary.json shows"
        )
    raise RunFailed(f"{mask_data(name)}/ holds no shard: {mask_again(storage.place, name)}")


@contextmanager
def open_part(storage: Storage, name: str, part: str) -> Iterator[pq.ParquetFile]:
    """The shard of a mask that belongs to ``part`` of prepared/. Raises RunFailed where it is missing or damaged."""
    place = mask_part(name, part)
    if not storage.exists(place):
        require_shards(storage, name)  # which lists a directory: not for every part
        raise RunFailed(f"{place} is missing: {mask_again(storage.place, name)}")
    try:
        file = pq.ParquetFile(storage.path(place), filesystem=storage.fs)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise RunFailed(f"{place} cannot be read ({reason}): {mask_again(storage.place, name)}") from error
    with file:
        yield file
