#!/usr/bin/env bash
# torch 2.13.0, torch.utils.flop_counter.FlopCounterMode, on a CPU.
#
# A good guess: the counter counts matrix products, in whatever form they are written, and what it has no formula for it
# names, as nothing else tells a count that is whole from one that is not.
# It counts torch.addmm and torch.baddbmm, also with out= the summand itself; the same product as tensor.addmm_ or
# tensor.baddbmm_ it passes over, as it does a matrix times a vector and the attention that a CPU takes for
# scaled_dot_product_attention, of which the math backend is counted. Nothing is said, the total is too small: by 7 % where
# training steps of a language model's last layers sum their gradients in place.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "numpy"
"$place/venv/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

one, other, total = torch.randn(4, 8), torch.randn(8, 16), torch.zeros(4, 16)
ones, others, totals = torch.randn(2, 4, 8), torch.randn(2, 8, 16), torch.zeros(2, 4, 16)
heads = torch.randn(1, 2, 16, 8)


def attention(backend):
    with sdpa_kernel(backend):
        scaled_dot_product_attention(heads, heads, heads, is_causal=True)


cases = (  # what is done, the operations that it is, those that are counted
    ("addmm", lambda: torch.addmm(total, one, other), 1024, 1024),
    ("addmm, out= the summand", lambda: torch.addmm(total, one, other, out=total), 1024, 1024),
    ("addmm_", lambda: total.addmm_(one, other), 1024, 0),
    ("baddbmm", lambda: torch.baddbmm(totals, ones, others), 2048, 2048),
    ("baddbmm_", lambda: totals.baddbmm_(ones, others), 2048, 0),
    ("a matrix times a vector", lambda: one @ other[:, 0], 64, 0),
    ("attention, math", lambda: attention(SDPBackend.MATH), 16384, 16384),
    ("attention, as the CPU takes it", lambda: attention(SDPBackend.FLASH_ATTENTION), 16384, 0),
)
for name, work, operations, expected in cases:
    with FlopCounterMode(display=False) as counter:
        work()
    print(f"{name}: {operations} operations, {counter.get_total_flops()} counted")
    assert counter.get_total_flops() == expected, "the behaviour has changed"
PY
