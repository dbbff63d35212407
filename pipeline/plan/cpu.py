"""How fast the CPU at hand is, by a short measurement."""

from __future__ import annotations

import time

import torch

CPU_HERE = "the CPU of this machine"
SECONDS = 0.3
ROWS, WIDTH = 512, 1024  # a batch of tokens through a linear map
SHARE = 0.5  # of the speed of a lone matrix product is what a stage reaches, with all that is none


def cpu_rate() -> float:
    """Operations per second that a stage may be expected to reach here in float32, all threads of torch together."""
    one, other = torch.rand(ROWS, WIDTH), torch.rand(WIDTH, WIDTH)
    one @ other  # the first one makes threads
    products, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < SECONDS:
        one @ other
        products += 1
    return SHARE * products * 2 * ROWS * WIDTH * WIDTH / seconds
