"""The engine's forward pass is the model's own, or the run stops.

A few real rows go through the model twice: untouched, in the attention implementation that it was loaded with, and
through everything that the engine puts in between (attention, experts, taps, lower layers handed on, the head alone).
Whatever a model does that the engine does not know shows here, before a number is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.maths.capture import Captured, captured
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel, on_token_ids_alone
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.head import Predictions, read_head
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.placement import device_of

KEPT = 64  # losses of a row that are compared, its last ones: the untouched head makes whole logits
SHORT = 32  # tokens of the short row
FEW = 8  # tokens of the question whether a token sees what follows it
# Relative differences that are rounding: other kernels, other batch shapes, a router that computes in float32.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True, slots=True)
class Agreement:
    """The largest differences between the engine's pass and the model's own, over ``rows`` rows of up to ``longest`` tokens.

    ``hidden``: of the last hidden states, root mean square over a row, relative to theirs. ``loss``: likewise over a row's
    last tokens, in nats.
    """

    rows: int = 0
    longest: int = 0
    hidden: float = 0.0
    loss: float = 0.0

    def and_(self, other: Agreement) -> Agreement:
        """Of both together."""
        return Agreement(
            self.rows + other.rows, max(self.longest, other.longest), max(self.hidden, other.hidden),
            max(self.loss, other.loss),
        )  # fmt: skip


class Guard:
    """Called with the rows of every shard before it is valued; ``found`` says what was seen so far.

    The first call compares a short row alone (the beginning of the shortest), a padded batch of it with a longer one, and
    the longest row, and asks
    whether a token sees what follows it. Later calls look at a row only where it is longer than any before: what depends
    on the length (a sparse attention's budget) shows at the longest. Raises UnsupportedModel.
    """

    def __init__(self, scored: ScoredLayers, kernel: str, window: int) -> None:
        self.scored, self.kernel, self.window = scored, kernel, window
        self.found = Agreement()

    def __call__(self, rows: Sequence[Sequence[int]]) -> Agreement:
        """``rows``: token ids. Returns the agreement over all calls."""
        by_length = sorted((row for row in rows if len(row) > 1), key=len)
        if not by_length or len(by_length[-1]) <= self.found.longest:
            return self.found
        groups = [[by_length[-1]]]
        if not self.found.rows:
            self._causal(by_length[-1][:FEW])
            short = by_length[0][:SHORT]
            groups = [[short], [short, by_length[len(by_length) // 2][: 2 * SHORT]], *groups]
        for group in groups:
            self.found = self.found.and_(self._compared(group))
        return self.found

    def _compared(self, rows: Sequence[Sequence[int]]) -> Agreement:
        scored, found = self.scored, Agreement()
        own = [_own_pass(scored, row) for row in rows]
        ours = _engine_pass(scored, rows, self.kernel, self.window)
        for row, (hidden, losses), (our_hidden, our_losses) in zip(rows, own, ours, strict=True):
            different = Agreement(
                1, len(row), _difference(our_hidden, hidden), _root_mean_square(our_losses.double() - losses.double())
            )
            if not bool(torch.isfinite(hidden).all()) or not bool(torch.isfinite(losses).all()):
                continue  # said with the example's name where its values are made
            if not (
                different.hidden <= self._rounding and different.loss <= self._rounding * (1 + float(losses.mean()))
            ):
                self._refuse(rows, row, different)
            found = found.and_(different)
        return found

    def _refuse(self, rows: Sequence[Sequence[int]], row: Sequence[int], different: Agreement) -> None:
        scored = self.scored
        layers = [*scored.lower, *scored.layers]
        names = {module: name for name, module in scored.model.named_modules()}
        own = _outputs_of(layers, lambda: _own_pass(scored, row))
        ours = _outputs_of(layers, lambda: _engine_pass(scored, rows, self.kernel, self.window))
        index = [list(one) for one in rows].index(list(row))
        differing = (
            names[layer]
            for layer in layers
            if layer in own and layer in ours and own[layer].ndim == 3
            if not _difference(ours[layer][index, : len(row)], own[layer][0]) <= self._rounding
        )
        first = next(differing, "what comes after the last layer")
        narrow = self._rounding > ROUNDING[torch.float32]
        remedy = ": model.dtype=float32 tells whether it is rounding" if narrow else ": this model cannot be valued"
        raise UnsupportedModel(
            f"{type(scored.model).__name__}: the engine's forward pass is not the model's own on a row of {len(row)} tokens "
            f"(first at {first}; the last hidden states differ by {different.hidden:.2g} of their size, the loss by "
            f"{different.loss:.2g} nats), so that its values would be wrong{remedy}"
        )

    def _causal(self, row: Sequence[int]) -> None:
        """A later token must not change an earlier hidden state."""
        other = next(token for token in range(2) if token != row[-1])
        before, after = (_own_pass(self.scored, [*row[:-1], last])[0][:-1] for last in (row[-1], other))
        if _difference(after, before) > self._rounding / 10:
            raise UnsupportedModel(
                f"{type(self.scored.model).__name__} is not causal: a token's hidden state depends on the tokens that follow "
                "it, so that a response token sees itself; load a decoder (config.is_decoder=true)"
            )

    @property
    def _rounding(self) -> float:
        return max(ROUNDING.get(dtype, 5e-2) for dtype in {p.dtype for p in self.scored.model.parameters()})


@torch.no_grad()
def _own_pass(scored: ScoredLayers, row: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The untouched model: last hidden states (length, d), and losses of the last KEPT tokens."""
    model: Any = scored.model
    ids = torch.tensor([list(row)], device=device_of(model))
    kept: list[torch.Tensor] = []
    some = {"logits_to_keep": KEPT + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept[:] = [output.last_hidden_state[0]]

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())  # `frozen` turns gradients on
        stack.callback(scored.decoder.register_forward_hook(keep).remove)
        stack.enter_context(on_token_ids_alone(type(model).__name__))
        logits = model(input_ids=ids, use_cache=False, **some).logits[0, -KEPT - 1 :]
    if len(logits) != min(ids.shape[1], KEPT + 1):
        raise UnsupportedModel(f"{type(model).__name__} predicts {len(logits)} tokens for a row of {ids.shape[1]}")
    losses = F.cross_entropy(
        logits[:-1].to(torch.promote_types(logits.dtype, torch.float32)), ids[0, -len(logits) + 1 :], reduction="none"
    )
    return kept[0], losses


def _engine_pass(
    scored: ScoredLayers, rows: Sequence[Sequence[int]], kernel: str, window: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every row, as ``_own_pass``: as one padded batch, and where the lower layers are handed on the pass after."""
    batch = collate(rows, rows).to(device_of(scored.model))
    flat, length = batch.input_ids.flatten(), batch.shape[1]
    spans = [
        torch.arange(max(0, len(row) - KEPT - 1), len(row) - 1, device=flat.device) + i * length
        for i, row in enumerate(rows)
    ]
    positions = torch.cat(spans)

    def ignore(one: Captured) -> None:
        """The taps are there as they are when values are made."""

    visitor: Callable[[Captured], None] | None = ignore if scored.maps else None
    with lower_layers_once(scored):
        for _ in range(2 if scored.lower and scored.shared else 1):
            with captured(scored, visitor, kernel, window):
                decoder: Any = scored.decoder
                outputs = decoder(input_ids=batch.input_ids, use_cache=False)
                hidden = outputs.last_hidden_state
                some = hidden.detach().flatten(0, 1)[positions]
                losses, _ = read_head(
                    scored, outputs, some, flat[positions + 1], [Predictions.losses], backward=False
                )  # fmt: skip
    parts = losses[0].split([len(span) for span in spans])
    return [(hidden[i, : len(row)].detach(), parts[i]) for i, row in enumerate(rows)]


def _outputs_of(layers: Sequence[nn.Module], run: Callable[[], object]) -> dict[nn.Module, torch.Tensor]:
    """What every layer returned first while ``run`` ran: later its lower layers may hand through."""
    found: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found.setdefault(module, (output[0] if isinstance(output, tuple) else output).detach())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        run()
    return found


def _difference(ours: torch.Tensor, own: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of ``own``."""
    return _root_mean_square(ours.double() - own.double()) / max(_root_mean_square(own.double()), 1e-30)


def _root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
