"""A process beside a test: takes part in the hidden states of a file, and prints which rows it has made.

python share_states.py NAME BOUND ROWS SECONDS     SECONDS: that making a row takes; with `die`, it ends at the second row
"""

import os
import sys
import time

import torch

from alphatoken.pipeline.trial.hidden import HiddenStates

WIDTH = 8


def state(row: int) -> torch.Tensor:
    """(row + 3, WIDTH), the same in every process."""
    return torch.randn(row + 3, WIDTH, generator=torch.Generator().manual_seed(row))


def main() -> None:
    """Fill all rows."""
    name, bound, rows, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    states = HiddenStates(name, [row + 3 for row in range(rows)], WIDTH, bound)
    made: list[int] = []

    def make(row: int) -> torch.Tensor:
        if seconds == "die" and made:
            os.kill(os.getpid(), 9)
        made.append(row)
        time.sleep(0 if seconds == "die" else float(seconds))
        return state(row)

    print("ready", flush=True)
    sys.stdin.readline()
    states.fill(range(rows), make)
    wrong = [row for row in range(rows) if not torch.equal(states.get(row, make), state(row).to(torch.bfloat16))]
    print(made, wrong, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
