"""NaN and infinity are named where they arise: which example, which module."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.ghost import read_pass
from alphatoken.pipeline.maths.head import Predictions


class NonFinite(ArithmeticError):
    """A value or a gradient is NaN or infinite. ``row`` is the example's index within the batch."""

    def __init__(self, row: int, where: str) -> None:
        super().__init__(f"NaN or infinity in {where} of example {row} of the batch")
        self.row, self.where = row, where


def locate(scored: ScoredLayers, batch: Batch, kernel: str, row: int = 0) -> NonFinite:
    """Go through a batch that gave NaN or infinity one example at a time and name the first module where it shows.

    ``row``: an example with such a value, named where every module and gradient is finite.
    """
    for example in range(batch.shape[0]):
        one = batch.rows(slice(example, example + 1))
        module = _first_output(scored.model, one)
        if module is not None:
            return NonFinite(example, f"the output of {module}")
        gradients: list[str] = []

        def look(captured: Captured, gradients: list[str] = gradients) -> None:
            if not bool(torch.isfinite(captured.error).all()):
                gradients.append(f"the gradient of {captured.map.name.removesuffix('.weight')}")

        # Where no layer is scored there is no backward pass.
        losses = read_pass(scored, one, [Predictions.losses], look if scored.maps else None, {}, kernel)
        if gradients:
            return NonFinite(example, gradients[0])  # the backward pass goes from the last layer to the first
        if not bool(torch.isfinite(losses).all()):
            return NonFinite(example, "the loss")
    return NonFinite(row, "the products with the directions (their scale exceeds the dtype)")


def locate_forward(model: nn.Module, batch: Batch) -> NonFinite | None:
    """The first example and module of a batch whose output is not finite, for passes without gradients; None: none."""
    for row in range(batch.shape[0]):
        module = _first_output(model, batch.rows(slice(row, row + 1)))
        if module is not None:
            return NonFinite(row, f"the output of {module}")
    return None


@torch.no_grad()
def _first_output(model: nn.Module, batch: Batch) -> str | None:
    """The first module without children, in the order of the forward pass, whose output is not finite."""
    found: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for name, module in model.named_modules():
            if not any(module.children()):

                def hook(module: nn.Module, args: tuple, output: object, name: str = name) -> None:
                    if found or not isinstance(output, torch.Tensor):
                        return
                    if output.is_floating_point() and not bool(torch.isfinite(output).all()):
                        found.append(name)

                stack.callback(module.register_forward_hook(hook).remove)
        with torch.no_grad():  # `frozen` turns gradients on
            model(input_ids=batch.input_ids, use_cache=False)
    return found[0] if found else None
