"""A second backward pass over the first: the Hessian of a batch's loss times directions in the weights that learn.

    L(W) = sum over the batch's tokens of l_i(W),   g = grad L,   H r = grad <g(W), r>

The first backward pass leaves a graph of the gradient g; for each direction r a backward pass over
that graph gives H r. What comes down to the errors at the head on its way is the derivative of the hidden states along r,
so that the derivative of every token's own loss along r, <grad l_i, r>, is read there and costs one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import IGNORED, Batch
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.experts import tapped_experts
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.head_curvature import TwiceDifferentiableHead
from alphatoken.pipeline.maths.learners import Trained, Weights

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Curvature:
    """Of one batch. ``losses`` (n,): in the order of ``batch.predicting()``, nats.

    ``along``: direction -> (n,), each token's <grad l_i, r>, nats per unit of r.
    """

    losses: torch.Tensor
    along: dict[str, torch.Tensor]


# Called with a direction's name, a parameter's name and H r, of the weight's shape and dtype, for the SUM of the losses.
ProductVisitor = Callable[[str, str, torch.Tensor], None]


@contextmanager
def _twice_differentiable(learner: Trained) -> Iterator[Weights]:
    """What learns requires gradients, and everything on the way has a second derivative, inside the block.

    Fused attention kernels have none: attention goes block by block, without the half of the square that causality hides,
    and a model that calls them past attention.py gets the plain one. Probabilities are held: passes over passes come twice.
    """
    scored = learner.scored
    experts = {m.module for m in scored.maps if m.experts}

    def as_it_is(module: nn.Module, name: str, expert: int, entering: Any, output: Any, rows: Any) -> torch.Tensor:
        return output

    with ExitStack() as stack:
        stack.enter_context(frozen(scored.model))
        stack.enter_context(intercepted(scored.decoder, "eager", None, held=True))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if experts:
            stack.enter_context(tapped_experts(scored.model, experts, as_it_is))
        yield stack.enter_context(learner.leaves())


def curvature_pass(
    learner: Trained,
    batch: Batch,
    directions: Mapping[str, Tensors],
    visit: ProductVisitor,
) -> Curvature:
    """H r and every token's <grad l_i, r> for each of ``directions`` (name -> weight -> r), at the weights that are held.

    The first backward pass is shared; each direction costs a backward pass over both. Its products are shown to ``visit``
    before the next direction's turn, and are not held here; a weight that no token met has none.
    """
    positions = batch.predicting()
    if not len(positions):
        none = torch.zeros(0, device=batch.input_ids.device)
        return Curvature(none, dict.fromkeys(directions, none))
    targets = batch.labels.flatten()[positions + 1]
    along = {}
    with _twice_differentiable(learner) as leaves:
        names, parameters = list(leaves), list(leaves.values())
        decoder: Any = learner.scored.decoder
        outputs = decoder(input_ids=batch.input_ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
        head = TwiceDifferentiableHead(learner.scored, outputs, targets)
        errors = head.errors(hidden)
        used, edges = _gradient(hidden, parameters, errors)
        del hidden
        last = list(directions)[-1:]
        for name, direction in directions.items():
            moving = [direction[names[i]].to(parameters[i].device, parameters[i].dtype) for i in used]
            found = torch.autograd.grad(edges, parameters, moving, retain_graph=[name] != last, allow_unused=True)
            for parameter, product in zip(names, found, strict=True):
                if product is not None:
                    visit(name, parameter, product)
            del found
            assert head.moved is not None
            along[name] = (errors.detach().to(head.losses.dtype) * head.moved).sum(dim=1)
    return Curvature(head.losses, along)


def _gradient(
    hidden: torch.Tensor, parameters: Sequence[torch.Tensor], errors: torch.Tensor
) -> tuple[list[int], list[GradientEdge]]:
    """The graph of the gradient: which of ``parameters`` have one (an expert may see no token), and the ends of it.

    The gradient itself, as large as the weights, is let go: the second pass needs what it was made of.
    """
    gradients = torch.autograd.grad(hidden, parameters, errors, create_graph=True, allow_unused=True)
    _refuse_once_differentiable(gradients)
    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    return used, [get_gradient_edge(gradient) for gradient in gradients if gradient is not None]


def _refuse_once_differentiable(gradients: Sequence[torch.Tensor | None]) -> None:
    """torch goes silently past an operation that says of itself that it has no second derivative: find it first."""
    waiting = [gradient.grad_fn for gradient in gradients if gradient is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name().endswith("Error"):
            raise UnsupportedModel("an operation of its scored layers can be differentiated once only")
        following = {next_node for next_node, _ in node.next_functions} - seen
        seen |= following
        waiting += following


def check_second_derivative(learner: Trained) -> None:
    """Raise UnsupportedModel where the scored layers have no second derivative; passes two tokens through."""
    start = learner.start()
    ids = torch.arange(2, device=next(iter(start.values())).device)[None]
    batch = Batch(ids, torch.where(ids > 0, ids, IGNORED), torch.full((1,), 2, device=ids.device))
    try:
        with learner.holding(start):
            curvature_pass(learner, batch, {"probe": start}, lambda *product: None)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, UnsupportedModel) as error:  # whatever an operation says that has no second derivative
        reason = str(error).partition("\n")[0]
        raise UnsupportedModel(
            f"its scored layers cannot be differentiated twice ({type(error).__name__}: {reason}): set "
            "anchor.direction=gradient"
        ) from error
