"""Operations of a piece of work, counted by torch: what the plan's formulas are held against.

The counter of torch 2.13 passes over what it has no formula for: the fused attention of a CPU, and products that are added
in place, though it counts the same products where they are not (findings/flop_counter_passes_over_products_in_place.sh).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
UNCOUNTED: dict[Any, Any] = {  # formulas of the shapes
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
    _ATEN.addmm_: lambda total, left, right, *_, **__: 2 * math.prod(left) * right[-1],
    _ATEN.baddbmm_: lambda total, left, right, *_, **__: 2 * math.prod(left) * right[-1],
}


def counted(work: Callable[[], object]) -> int:
    """Operations of the matrix products and attention that ``work`` does."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as operations:
        work()
    return operations.get_total_flops()
