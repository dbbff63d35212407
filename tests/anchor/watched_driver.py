"""Stages in one process whose sums have small pieces, and what its driver got from Ray and made meanwhile, as JSON:

    python -m tests.anchor.watched_driver RUN STAGE... OVERRIDE...

answers: how often it asked Ray for a value. arrays: tensors and arrays in the values that came, at any depth. made: tensors
of more than a few numbers that came out of any operation of torch in it. adds: pieces that the workers' logs tell of.
"""

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import ray
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphatoken.jobs.cli import main
from alphatoken.pipeline.anchor import sums

FEW = 100  # numbers


class Searching(pickle.Pickler):
    """Finds tensors and arrays at any depth of what it pickles; names of objects in the store are not followed."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[str] = []

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor | np.ndarray):
            self.found.append(f"{type(value).__name__} {tuple(value.shape)}")
        if isinstance(value, ray.ObjectRef):
            return str, ("a name",)
        return NotImplemented


class Answers:
    """Stands in front of ray.get."""

    def __init__(self) -> None:
        self.count, self.arrays, self.get = 0, list[str](), ray.get
        ray.get = self

    def __call__(self, *arguments, **options):
        answer = self.get(*arguments, **options)
        search = Searching()
        search.dump(answer)
        self.count += 1
        self.arrays += search.found
        return answer


class Made(TorchDispatchMode):
    """Notes what torch's operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta" and value.numel() > FEW:
                self.found.add(f"{operation} {tuple(value.shape)}")
        return result


if __name__ == "__main__":
    sums.PIECE_BYTES = 2048
    run, *rest = sys.argv[1:]
    stages = [one for one in rest if "=" not in one]
    answers = Answers()
    with Made() as made:
        for stage in stages:
            if status := main([stage, f"run.dir={run}", *rest[len(stages) :]]):
                sys.exit(status)
    logs = "".join(log.read_text() for log in Path(run).glob("logs/anchor-*.log"))
    told = {
        "answers": answers.count, "arrays": answers.arrays, "made": sorted(made.found), "adds": logs.count("from row"),
    }  # fmt: skip
    print(json.dumps(told))
