"""The estimators by forward-mode differentiation: `exact`, the derivative of each token's own loss along each direction,
and `information`, how much each token's prediction moves along the adaptation direction (stability as in `exact`).

`direct` splits the training gradient by position; a mask removes one token's loss. What that is worth to first order
is <gradient of the token's own loss, M>, the directional derivative of the per-token loss vector along M, obtained for
all tokens at once by forward-mode differentiation. Tangents live in the scored layers alone.

A mask that is computed once must not choose by the label: in one and the same context it would keep some labels and
drop others, always the same ones, and training on what is left learns another distribution than the data's.
`information` does not look at the label. With u = the logits' derivative along M and p = their softmax it is

    Var_p(u) = sum_y p_y (grad log p_y, M)^2 = vec(M)' F_t vec(M)

the Fisher information of the token's prediction along M, twice the Kullback-Leibler divergence per squared step:
high where a step along M changes what is predicted, 0 where the prediction is settled. It has no sign, and so it says
where there is something to learn, but not which tokens pull the model away: stability keeps its sign.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import IGNORED, Batch
from alphatoken.pipeline.maths.capture import frozen
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel
from alphatoken.pipeline.maths.experts import tapped_experts
from alphatoken.pipeline.maths.head import chunk_rows, head_of
from alphatoken.pipeline.maths.lower import lower_layers_once


def exact_values(
    scored: ScoredLayers,
    batch: Batch,
    named: Mapping[str, Mapping[str, torch.Tensor]],
    kernel: str,
    information: Collection[str] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (n,) in nats and values (directions, n) at the n positions that predict a response token.

    ``named``: direction name -> parameter name -> tensor, as the weight in device and dtype. Values: derivatives of the
    losses; positive: a step against the gradient of this token's loss has a positive product with the direction, as in
    the other estimator. Along the directions named in ``information`` the Fisher information instead, never negative.
    One pass of the scored layers per direction.
    """
    positions = batch.predicting()
    targets = batch.labels.flatten()[positions + 1]
    if not len(positions):
        return torch.zeros(0, device=targets.device), torch.zeros(len(named), 0, device=targets.device)
    losses, derivatives = torch.zeros(0), []
    experts = {m.module for m in scored.maps if m.experts}
    with ExitStack() as stack:
        stack.enter_context(frozen(scored.model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(intercepted(scored.model, kernel, None))
        if experts:
            stack.enter_context(
                tapped_experts(scored.model, experts, lambda m, name, e, entering, output, rows: output)
            )
        stack.enter_context(lower_layers_once(scored))
        stack.enter_context(forward_ad.dual_level())
        for name, direction in named.items():
            with _tangents(scored, direction):
                outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
                hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
                losses, derivative = _losses(scored, outputs, hidden, targets, name in information)
                derivatives.append(derivative)
    return losses, torch.stack(derivatives)


def check_forward_mode(scored: ScoredLayers, kernel: str) -> None:
    """Raise UnsupportedModel where the scored layers have no forward-mode derivative; runs two tokens twice."""
    device = scored.maps[0].parameter.device
    ids = torch.arange(2, device=device)[None]
    batch = Batch(ids, torch.where(ids > 0, ids, IGNORED), torch.full((1,), 2, device=device))
    still = {m.name: torch.zeros_like(m.parameter) for m in scored.maps}
    try:
        exact_values(scored, batch, {"adaptation": still, "stability": still}, kernel, ["adaptation"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:  # whatever an operation says that has none
        reason = str(error).partition("\n")[0]
        raise UnsupportedModel(
            f"its scored layers cannot be differentiated in forward mode ({type(error).__name__}: {reason}): set "
            "valuation.estimator=ghost"
        ) from error


def _losses(
    scored: ScoredLayers, outputs: object, hidden: torch.Tensor, targets: torch.Tensor, information: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, derivatives = [], []
    rows = chunk_rows(scored.model, hidden)
    with head_of(scored, outputs) as head:
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = logits.logsumexp(dim=-1) - logits.gather(1, wanted[:, None]).squeeze(1)
            primal, tangent = forward_ad.unpack_dual(loss)
            if information:
                tangent = _variance(*forward_ad.unpack_dual(logits))
            losses.append(primal)
            derivatives.append(torch.zeros_like(primal) if tangent is None else tangent)
    return torch.cat(losses), torch.cat(derivatives)


def _variance(logits: torch.Tensor, tangent: torch.Tensor | None) -> torch.Tensor | None:
    """Variance (n,) of the logits' tangent (n, vocabulary) under their softmax."""
    if tangent is None:
        return None
    p = logits.softmax(dim=-1)
    tangent = tangent - (p * tangent).sum(dim=-1, keepdim=True)
    return (p * tangent.square_()).sum(dim=-1)


@contextmanager
def _tangents(scored: ScoredLayers, direction: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the scored weights a tangent for one block of code."""
    before = []
    for linear in scored.maps:
        leaf = linear.name.rpartition(".")[2]
        weight = linear.parameter
        before.append((linear.module, leaf, weight))
        tangent = direction[linear.name]
        del linear.module._parameters[leaf]
        setattr(linear.module, leaf, forward_ad.make_dual(weight.detach(), tangent))
    try:
        yield
    finally:
        for module, leaf, weight in before:
            delattr(module, leaf)
            module.register_parameter(leaf, weight)
