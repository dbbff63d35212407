"""Capture of (h, d) at every scored linear map, and of the attention band, during one forward and backward pass.

The capture owns what its hooks collect; nothing is stored on modules, and leaving the `with` block takes the hooks
away. No parameter requires a gradient: the graph starts at the outputs of the first scored linear maps, so the lower
layers run without autograd and no weight gradient is ever formed (identity 2 of the method). The same hooks carry the
derivative along a direction through the scored layers (tangents.py), so that both come from one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.attention_blocks import BandBlock
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel
from alphatoken.pipeline.maths.experts import tapped_experts
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.linear_maps import LinearMap
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.tangents import Tangents, tangent_of, with_tangent, without_tangent


@dataclass(frozen=True, slots=True)
class Captured:
    """Input and output error of one linear map in one backward pass.

    ``entering`` h: (n, d_in); ``error`` d: (n, d_out), the gradient of the summed loss with respect to the map's
    output. ``rows``: the flat positions (batch * length) that the n rows belong to; None where row i is position i.
    ``moved``: M h of the direction that the pass goes along, at the positions that it keeps them for; None: not known.
    ``expert``: which of the stacked matrices; 0 for a single one. ``bands``: of the scored layers, by attention module.
    """

    map: LinearMap
    entering: torch.Tensor
    error: torch.Tensor
    rows: torch.Tensor | None
    expert: int
    shape: tuple[int, int]
    bands: Mapping[nn.Module, list[BandBlock]]
    moved: torch.Tensor | None = None


Visitor = Callable[[Captured], None]


class _Tap(torch.autograd.Function):
    """The identity, whose backward shows the error to a visitor; starts a graph where there is none."""

    @staticmethod
    def forward(ctx, output, anchor, visit):  # type: ignore[no-untyped-def]  # torch types neither ctx nor this
        ctx.visit = visit
        return output.clone()  # a view of it could not be written to, as some models do

    @staticmethod
    def backward(ctx, error):  # type: ignore[no-untyped-def]  # as above
        visit, ctx.visit = ctx.visit, None  # h is freed as soon as it has been used
        visit(error)
        return (error if ctx.needs_input_grad[0] else None), None, None


@contextmanager
def captured(
    scored: ScoredLayers,
    visitor: Visitor | None,
    kernel: str = "sdpa",
    window: int = 0,
    along: Tangents | None = None,
    keep: torch.Tensor | None = None,
) -> Iterator[None]:
    """Show (h, d) of every scored linear map to ``visitor`` while the backward pass of the block runs.

    ``visitor`` None: no graph is made and nothing is shown. ``window`` W > 0 also computes the attention band of the
    scored layers. ``along``: what leaves the scored layers is a dual number; a dual level has to be entered. ``keep``: flat
    positions whose products M h along it are shown with (h, d); those of stacked experts are not. The model is put into
    evaluation mode and its parameters do not require gradients inside the block; both are as before when it is left.
    Raises UnsupportedModel where the model calls a scored linear map for some positions only, or past its module.
    """
    bands: dict[nn.Module, list[BandBlock]] = {}
    layer_of = scored.layer_of()
    anchor = torch.zeros((), device=device_of(scored.model), requires_grad=True)

    def listen(module: nn.Module, value: torch.Tensor, band: Callable[[int], list[BandBlock]]) -> None:
        if window > 0 and module in layer_of:
            bands[module] = band(window)

    def tap(
        linear: LinearMap,
        expert: int,
        entering: torch.Tensor,
        output: torch.Tensor,
        rows: torch.Tensor | None,
        shape: tuple,
        before: torch.Tensor | None,
    ) -> torch.Tensor:
        """What goes on in the place of ``output``; ``before``: W h', where h is a dual number."""
        value = without_tangent(output) if along else output
        moved = along.product(linear, expert, entering) if along else None
        if visitor is not None:
            held, see, version = entering.detach().reshape(-1, entering.shape[-1]), visitor, entering._version
            kept = None
            if moved is not None and keep is not None and rows is None:
                kept = moved.reshape(-1, moved.shape[-1])[keep]

            def visit(error: torch.Tensor) -> None:
                if entering._version != version:
                    raise UnsupportedModel(
                        f"{owner}: what enters {linear.name} is overwritten before the backward pass"
                    )
                flat = error.reshape(-1, error.shape[-1])
                see(Captured(linear, held, flat, rows, expert, shape, bands, kept))

            value = _Tap.apply(value, anchor, visit)
        return value if moved is None else with_tangent(value, moved, before)

    hidden_shape: list[tuple[int, int]] = []
    seen: set[str] = set()
    owner = type(scored.model).__name__

    def remember_shape(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not hidden_shape:  # the head calls the decoder in its own way afterwards
            hidden_shape.append(tuple(kwargs["input_ids"].shape))  # some hidden states have a dimension more

    entered: dict[str, torch.Tensor | None] = {}

    def part(linear: LinearMap) -> Callable:
        def forward_pre_hook(module: nn.Module, args: tuple) -> tuple:
            # torch would make the product with the value once more for a dual number.
            entered[linear.name] = tangent_of(args[0])
            return (without_tangent(args[0]), *args[1:])

        return forward_pre_hook

    def hook(linear: LinearMap) -> Callable:
        def forward_hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            batch, length = hidden_shape[0]
            if args[0].shape[:-1].numel() != batch * length:
                raise UnsupportedModel(f"{owner}: {linear.name} is not applied once to every position of the batch")
            seen.add(linear.name)
            tangent = entered.pop(linear.name, None)
            before = None if tangent is None else linear.product(tangent)
            return tap(linear, 0, args[0], output, None, (batch, length), before)

        return forward_hook

    stacked = {(m.module, m.name.rpartition(".")[2]): m for m in scored.maps if m.experts}

    def expert_tap(
        module: nn.Module, name: str, expert: int, entering: torch.Tensor, output: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        before = tangent_of(output) if along else None
        return tap(stacked[module, name], expert, entering, output, rows, hidden_shape[0], before)

    with ExitStack() as stack:
        stack.enter_context(frozen(scored.model))
        if visitor is None:
            stack.enter_context(torch.no_grad())
        stack.enter_context(intercepted(scored.decoder, kernel, listen))
        if stacked:
            stack.enter_context(tapped_experts(scored.model, {module for module, _ in stacked}, expert_tap))
        stack.callback(scored.decoder.register_forward_pre_hook(remember_shape, with_kwargs=True).remove)
        for linear in scored.maps:
            if not linear.experts:
                if along:
                    stack.callback(linear.module.register_forward_pre_hook(part(linear)).remove)
                stack.callback(linear.module.register_forward_hook(hook(linear)).remove)
        yield
        unseen = [m.name for m in scored.maps if not m.experts and m.name not in seen]
        if unseen:
            raise UnsupportedModel(f"{owner}: {unseen} are applied past their modules, so their input cannot be seen")


@contextmanager
def swapped(scored: ScoredLayers, weights: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Put other scored weights into the model for one block of code (a snapshot of a trajectory); None: no change."""
    if weights is None:
        yield
        return
    before = {m.name: m.parameter.data for m in scored.maps}
    for m in scored.maps:
        m.parameter.data = weights[m.name].to(m.parameter.device, m.parameter.dtype)
    try:
        yield
    finally:
        for m in scored.maps:
            m.parameter.data = before[m.name]
