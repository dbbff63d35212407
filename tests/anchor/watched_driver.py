"""Stages in one process whose sums have small pieces, and what its driver got from Ray and held meanwhile, as JSON:

    python -m tests.anchor.watched_driver RUN STAGE... OVERRIDE...

answers: how often it asked Ray for a value. arrays: types and sizes of tensors and arrays in the values that came. held:
those of more than a few numbers that the garbage collector knew at any of the looks at it. adds: pieces told of by workers.
"""

import gc
import io
import json
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import ray
import torch

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


class Watch:
    def __init__(self) -> None:
        self.answers, self.arrays, self.held = 0, list[str](), set[str]()
        self.over, self.get = threading.Event(), ray.get
        ray.get = self.ask
        threading.Thread(target=self.look, daemon=True).start()

    def ask(self, *arguments, **options):
        answer = self.get(*arguments, **options)
        search = Searching()
        search.dump(answer)
        self.answers += 1
        self.arrays += search.found
        return answer

    def look(self) -> None:
        while not self.over.wait(0.02):
            for value in gc.get_objects():
                if isinstance(value, torch.Tensor) and value.numel() > FEW and value.device.type != "meta":
                    self.held.add(f"{type(value).__name__} {tuple(value.shape)}")


if __name__ == "__main__":
    sums.PIECE_BYTES = 2048
    run, *rest = sys.argv[1:]
    stages = [one for one in rest if "=" not in one]
    watch = Watch()
    for stage in stages:
        if status := main([stage, f"run.dir={run}", *rest[len(stages) :]]):
            sys.exit(status)
    watch.over.set()
    logs = "".join(log.read_text() for log in Path(run).glob("logs/anchor-*.log"))
    told = {
        "answers": watch.answers,
        "arrays": watch.arrays,
        "held": sorted(watch.held),
        "adds": logs.count("from row"),
    }
    print(json.dumps(told))
