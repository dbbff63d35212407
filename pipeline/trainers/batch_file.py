"""A batch as a trainer's collator made it, saved to a file, and the sequences that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.trainers.columns import IGNORED

Ints = npt.NDArray[np.int64]
MASKS = ("loss_mask", "completion_mask", "assistant_masks")  # taken where a batch has no labels
READ = ("input_ids", "labels", "attention_mask", "position_ids", "cu_seq_lens_q", *MASKS)


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens that attend to each other. ``row``, ``column``: where it begins in the batch. Both arrays ``(tokens,)``."""

    row: int
    column: int
    ids: Ints
    labels: Ints


def read_batch(file: Path) -> dict[str, Ints]:
    """The integer arrays of a batch, of READ those that are there; ``.npz``, ``.safetensors``, or what torch saved.

    Raises RunFailed for a file that is none of these or has no input_ids and nothing that says what is in the loss.
    """
    try:
        found = _loaded(file)
    except Exception as error:  # of three libraries, each with its own
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise RunFailed(
            f"{file}: cannot be read as a batch ({reason}): save one with torch.save(dict(batch), 'batch.pt'), "
            "numpy.savez('batch.npz', **batch) or safetensors"
        ) from error
    return batch_of(found, str(file))


def batch_of(found: Mapping[str, Any], name: str = "the batch") -> dict[str, Ints]:
    """The integer arrays of a batch in memory, tensors on any device or arrays; what is not in READ is left out.

    Raises RunFailed, which calls it ``name``, for one without input_ids or anything that says what is in the loss.
    """
    here = {
        one: found[one].cpu() if hasattr(found[one], "cpu") else found[one]
        for one in READ
        if found.get(one) is not None
    }
    batch = {one: np.asarray(here[one]).astype(np.int64) for one in here}
    if "input_ids" not in batch or not any(one in batch for one in ("labels", *MASKS)):
        there = ", ".join(sorted(found)) or "nothing"
        raise RunFailed(f"{name}: needs input_ids and labels (or {', '.join(MASKS)}), and holds {there}")
    return batch


def _loaded(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(str(file))
    import torch  # on demand: the other two need none of it

    found = torch.load(str(file), map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        raise TypeError(f"it holds a {type(found).__name__} and not a dictionary of tensors")
    return {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor) and name in READ}


def sequences_of(batch: Mapping[str, Ints]) -> list[Sequence]:
    """Cut a batch where its sequences end, padding left out.

    Padding: where attention_mask is 0, and tokens of one id at the end that all stand at position 0 and have no label.
    Several sequences in one row are told apart by position_ids that start anew, by
    an attention_mask that counts them, or by cu_seq_lens_q. A batch that has none of these has rows that are one
    sequence each, padding included. Raises RunFailed for arrays that do not fit together.
    """
    ids = np.atleast_2d(batch["input_ids"])
    labels = _labels(batch, ids)
    shapes = {name: np.atleast_2d(batch[name]).shape for name in ("attention_mask", "position_ids") if name in batch}
    wrong = {name: shape for name, shape in {"labels": labels.shape, **shapes}.items() if shape != ids.shape}
    if wrong:
        told = ", ".join(f"{name} {shape}" for name, shape in wrong.items())
        raise RunFailed(f"the batch does not fit together: input_ids {ids.shape}, but {told}")
    attention = np.atleast_2d(batch["attention_mask"]) if "attention_mask" in batch else np.ones_like(ids)
    positions = np.atleast_2d(batch["position_ids"]) if "position_ids" in batch else None
    found = []
    for row in range(len(ids)):
        (real,) = np.nonzero(attention[row])
        if positions is not None:
            real = _without_padding(real, positions[row], labels[row], ids[row])
        if not len(real):
            continue
        begins = np.diff(real, prepend=-2) != 1
        begins |= np.diff(attention[row][real], prepend=attention[row][real[0]]) != 0
        if positions is not None:
            begins |= np.diff(positions[row][real], prepend=-2) != 1
        if len(ids) == 1 and "cu_seq_lens_q" in batch:
            begins |= np.isin(real, batch["cu_seq_lens_q"])
        starts = [*np.flatnonzero(begins).tolist(), len(real)]
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            where = real[start:stop]
            found.append(Sequence(row, int(where[0]), ids[row][where], labels[row][where]))
    return found


def _without_padding(real: Ints, positions: Ints, labels: Ints, ids: Ints) -> Ints:
    """Collators that flatten rows fill up to a multiple with tokens that each are at position 0."""
    fills = (positions[real] == 0) & (labels[real] == IGNORED) & (ids[real] == ids[real[-1:]])
    ends = len(real) - np.argmin(fills[::-1]) if not fills.all() else 0
    return real[:ends]


def _labels(batch: Mapping[str, Ints], ids: Ints) -> Ints:
    if "labels" in batch:
        return np.atleast_2d(batch["labels"])
    name = next(name for name in MASKS if name in batch)
    kept = np.atleast_2d(batch[name])
    if kept.shape != ids.shape:
        raise RunFailed(f"the batch does not fit together: input_ids {ids.shape}, but {name} {kept.shape}")
    return np.where(kept != 0, ids, IGNORED)
