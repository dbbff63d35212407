"""`python -m tests.faults.read_mapped URI NAME`: the sum over a file's tensor w, and by how much memory without a file grew."""

import sys
from pathlib import Path

from alphatoken.pipeline.anchor.tensors import mapped_tensors
from alphatoken.pipeline.run.storage import Storage


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    storage = Storage(sys.argv[1])
    storage.exists(sys.argv[2])  # with what the client of the store takes
    before = anonymous()
    total = float(mapped_tensors(storage, sys.argv[2])["w"].sum())
    print(total, anonymous() - before)
