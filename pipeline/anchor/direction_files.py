"""The directions of one snapshot as files: preconditioned and scaled as asked, one parameter after the other.

    adaptation and objectives   the gradients that partial/ has       stability   F * (W - W_ref) (Eq. 10), or as unrolled

What is in memory is one parameter of each direction, but for anchor.snapshot_scale=rms, which values a sample along all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from alphatoken.pipeline.anchor.places import FACTORS, FISHER, REFERENCE, made
from alphatoken.pipeline.anchor.tensor_file import TensorFile
from alphatoken.pipeline.anchor.tensors import Shapes, carried, read_tensors, tensor_stream
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import Directions, fisher_drift
from alphatoken.pipeline.maths.kronecker import adam, kfac
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

Named = dict[str, torch.Tensor]  # direction -> one parameter of it


class DirectionFiles:
    """Of the snapshot ``index`` with its scored weights in the file ``weights``. ``drift``: as in anchor.drift, resolved.
    ``device``: where K-FAC is computed."""

    def __init__(
        self, storage: Storage, settings: Settings, scored: ScoredLayers, device: torch.device, index: int, weights: str,
        drift: str,
    ) -> None:  # fmt: skip
        self.storage, self.settings, self.anchor, self.scored = storage, settings, settings.anchor, scored
        self.device, self.index, self.weights, self.drift = device, index, weights, drift
        self.maps = {linear.name: linear for linear in scored.maps}
        self.proxy = drift != "none" and not self.anchor.unrolled  # whether stability is made here
        self.names = ("adaptation", *settings.objectives, "stability")

    def write(
        self,
        fingerprint: str,
        metadata: Mapping[str, str],
        scales_of: Callable[[Directions], dict[str, float]],
        advance: Callable[[int], None],
    ) -> dict[str, Any]:
        """Returns norms and scales. ``scales_of``: asked where directions are scaled. Raises RunFailed."""
        with ExitStack() as stack:
            files = {name: stack.enter_context(TensorFile(self.storage, place)) for name, place in self._read().items()}
            there = files["weights"].shapes
            if self.proxy:
                _same_shapes(there, files["reference"].shapes)
            squares: dict[str, list[float]] = {name: [] for name in self.names}
            for key in there:
                for name, tensor in self._raw(files, key).items():
                    squares[name].append(float(tensor.double().square().sum()))
                advance(0)
            counts = {f"{name}_norm": math.fsum(found) ** 0.5 for name, found in squares.items()}
            scales, whole = dict.fromkeys(self.names, 1.0), None
            if self.anchor.scaled:
                whole = {name: dict[str, torch.Tensor]() for name in self.names}
                for key, parameter in self._moved(files):
                    for name, tensor in parameter.items():
                        whole[name][key] = tensor
                own = read_tensors(self.storage, self.weights) if self.anchor.moves(self.drift) else None
                scales = scales_of(Directions(whole, own))
            counts |= {f"{name}_scale": scale for name, scale in scales.items()}
            marks = {**metadata, "precondition": self.anchor.precondition, **carried(fingerprint, counts)}
            streams = {}
            for name in reversed(self.names):  # the first to be begun is the last to appear: stability
                place = f"anchors/snapshot-{self.index:02d}/{name}.safetensors"
                opened = tensor_stream(self.storage, place, there, {"scale": repr(scales[name]), **marks})
                streams[name] = stack.enter_context(opened)
            for key, parameter in self._moved(files) if whole is None else _by_key(whole, there):
                for name, tensor in parameter.items():
                    streams[name].put(key, tensor / scales[name] if self.anchor.scaled else tensor)
        return counts

    def _read(self) -> dict[str, str]:
        """What is read -> the file."""
        found = {name: made(name, self.index) for name in self.names if name != "stability"}
        found["weights"] = self.weights
        if self.proxy:
            found["reference"] = REFERENCE
        elif self.drift != "none":
            found["stability"] = made("stability", self.index)
        if self.proxy or self.anchor.precondition == "adam":
            found["fisher"] = FISHER
        if self.anchor.precondition == "kfac":
            found["factors"] = FACTORS
        return found

    def _raw(self, files: Mapping[str, TensorFile], key: str) -> Named:
        """One parameter of every direction, as it is before anything is done to it."""
        found = {name: files[name].whole(key) for name in self.names if name in files}
        if self.proxy:
            weight, before = files["weights"].whole(key), files["reference"].whole(key)
            found["stability"] = fisher_drift(files["fisher"].whole(key), weight, before)
        elif self.drift == "none":
            found["stability"] = torch.zeros(files["weights"].shapes[key])
        return found

    def _moved(self, files: Mapping[str, TensorFile]) -> Iterator[tuple[str, Named]]:
        """Every parameter of every direction, preconditioned."""
        for key in files["weights"].shapes:
            found = self._raw(files, key)
            if self.anchor.precondition == "adam":
                fisher = files["fisher"].whole(key)
                found = {name: adam(tensor, fisher, self.anchor.damping) for name, tensor in found.items()}
            elif self.anchor.precondition == "kfac":
                factors = {f"{side}/{key}": files["factors"].whole(f"{side}/{key}") for side in "ABn"}
                found = {
                    name: kfac(tensor.to(self.device), factors, self.maps[key], self.anchor.damping).cpu()
                    for name, tensor in found.items()
                }
            yield key, found


def _by_key(whole: Mapping[str, Named], shapes: Shapes) -> Iterator[tuple[str, Named]]:
    for key in shapes:
        yield key, {name: tensors[key] for name, tensors in whole.items()}


def _same_shapes(policy: Shapes, reference: Shapes) -> None:
    names = sorted(policy.keys() | reference.keys())
    wrong = [n for n in names if policy.get(n) != reference.get(n)]
    if wrong:
        raise RunFailed(
            f"model.policy and model.reference differ in shape at {wrong[0]}: they must be the same architecture"
        )
