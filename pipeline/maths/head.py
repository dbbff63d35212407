"""Losses, what else is read off the softmax, and errors at the positions that predict a response token, in chunks of the
vocabulary's width.

`tokens x vocabulary` is never held whole. The model's own treatment of the logits (soft caps, scales) is kept: each
chunk of hidden states is sent through the model's forward with the decoder short-circuited, so that only what comes
after the decoder runs. Where that turns out to be one matrix, which a few positions show once per model, logits and the
way back are one product with it each, and every chunk uses the same memory; otherwise autograd goes back through whatever
it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from alphatoken.pipeline.maths.tangents import dual_level, tangent_of

CHUNK_BYTES = 128 << 20
PROBE_ROWS = 16  # positions that show what a model's head is
CACHE_BYTES = 1 << 20  # of logits that are worked on at a time: half of a usual second-level cache
DEVICE_CACHE_BYTES = 32 << 20  # on an accelerator, where each piece costs a launch per operation


class HeadedModel(Protocol):
    """A causal language model and its decoder; ScoredLayers is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def decoder(self) -> nn.Module: ...


@contextmanager
def head_of(scored: HeadedModel, outputs: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yields hidden (n, d) -> logits (n, vocabulary), as the model computes them after its decoder.

    ``outputs``: what the decoder returned; its last hidden state is replaced by the chunk.
    """
    decoder = scored.decoder
    result = copy.copy(outputs)

    def short_circuit(*args: object, **kwargs: object) -> Any:
        return result

    def head(hidden: torch.Tensor) -> torch.Tensor:
        result.last_hidden_state = hidden[None]
        placeholder = torch.zeros((1, hidden.shape[0]), dtype=torch.int64, device=hidden.device)
        return scored.model(input_ids=placeholder, use_cache=False).logits.squeeze(0)

    own = decoder.__dict__.get("forward")  # accelerate's hooks stand there
    decoder.forward = short_circuit
    try:
        yield head
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def chunk_rows(model: Any, hidden: torch.Tensor) -> int:
    """Rows of hidden states per chunk, so that one chunk of logits takes at most CHUNK_BYTES; a round number, since products of
    others can take a quarter longer."""
    rows = CHUNK_BYTES // (vocabulary_of(model) * max(4, hidden.element_size()))
    return max(16, rows // 64 * 64 if rows > 64 else rows)


def rows_in_cache(logits: torch.Tensor) -> int:
    """How many rows of logits (n, V) to work on at a time, in at least float32."""
    held = CACHE_BYTES if logits.device.type == "cpu" else DEVICE_CACHE_BYTES
    return max(1, held // (logits.shape[1] * max(4, logits.element_size())))


def vocabulary_of(model: Any) -> int:
    """How many tokens the model's head predicts."""
    head = model.get_output_embeddings()
    return int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model predicts at n positions over the V tokens of the vocabulary, in at least float32.

    ``targets`` (n,): the tokens that follow. ``shifted`` (n, V): logits less the row's largest. ``total`` (n, 1): the sum
    of exp(shifted). ``probability`` (n, V). ``moved``: direction -> derivative (n, V) of the logits along it. ``scratch``
    (n, V): to be written to, since fresh memory costs more than arithmetic here; all else may only be read.
    """

    targets: torch.Tensor
    shifted: torch.Tensor
    total: torch.Tensor
    probability: torch.Tensor
    moved: Mapping[str, torch.Tensor]
    scratch: torch.Tensor

    def expectation(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, V) -> (n,): the sum over the vocabulary of p times ``rows``."""
        return torch.mul(self.probability, rows, out=self.scratch).sum(dim=1)

    def at_target(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, V) -> (n,): the entry of the token that follows."""
        return rows.gather(1, self.targets[:, None]).squeeze(1)

    def losses(self) -> torch.Tensor:
        """Cross-entropy (n,) in nats."""
        return self.total.log().squeeze(1) - self.at_target(self.shifted)


# Something that is read off the softmax, (n,) in the predictions' dtype.
Reading = Callable[[Predictions], torch.Tensor]


class HeadMemory:
    """Of one model: logits and their derivatives, and what is worked on in cache, memory that one batch leaves to the next;
    and whether the head is one matrix.

    Fresh memory of this size costs as much as the products that are written to it, and asking the model what its head is as
    much as 300 positions, since all of its weight is read.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self.is_matrix: bool | None = None  # None: nobody has looked

    def take(self, name: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """(rows, columns) of whatever was there, in dtype and device of ``like``; valid until ``name`` is taken again."""
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns or held.dtype != like.dtype or held.device != like.device:
            self._held[name] = held = like.new_empty(rows * columns)
        return held[: rows * columns].view(rows, columns)


_memories: WeakKeyDictionary[nn.Module, HeadMemory] = WeakKeyDictionary()


def memory_of(scored: HeadedModel) -> HeadMemory:
    """That of a model, kept as long as the model is; one pass at a time uses it."""
    return _memories.setdefault(scored.model, HeadMemory())


def matrix_of(scored: HeadedModel, outputs: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """The weight (V, d) where logits are ``hidden @ weight.T`` and nothing else; None: they are not.

    The first positions that a model is met with go through its own head, and what comes of them is let go: no number depends
    on which batch is a worker's first.
    """
    memory, module = memory_of(scored), _output_matrix(scored.model)
    if not len(hidden):
        return None
    if memory.is_matrix is None:
        with torch.no_grad(), head_of(scored, outputs) as head, watched(scored.model) as is_matrix:
            part = hidden.detach()[:PROBE_ROWS]
            memory.is_matrix = is_matrix(part, head(part))
    if module is None or not memory.is_matrix or module.weight.dtype != hidden.dtype:
        return None
    return module.weight.detach()


@torch.no_grad()
def logits_of(scored: HeadedModel, outputs: Any, hidden: torch.Tensor, name: str = "logits") -> torch.Tensor:
    """Logits (n, V) of hidden states (n, d) without a graph; valid until those of this model and ``name`` are made again."""
    weight = matrix_of(scored, outputs, hidden)
    if weight is not None:
        return product(hidden, weight, memory_of(scored), name)
    with head_of(scored, outputs) as head:
        return head(hidden)


def read_head(
    scored: HeadedModel,
    outputs: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    readings: Sequence[Reading],
    moved: Mapping[str, torch.Tensor] | None = None,
    backward: bool = True,
    scales: Mapping[str, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every reading at every position, and the gradient of the summed loss with respect to the hidden states.

    ``hidden`` (n, d): last hidden states at the predicting positions; ``targets`` (n,); ``moved``: direction ->
    derivative (n, d) of ``hidden`` along it, times its entry in ``scales`` (none: 1). Returns (readings, n) in at least
    float32 and, where ``backward``, the gradient (n, d) in the dtype of ``hidden``. Logits are made once for all of it.
    """
    found, gradients, moved, memory = [], [], moved or {}, memory_of(scored)
    weight = matrix_of(scored, outputs, hidden)
    rows = chunk_rows(scored.model, hidden)
    with head_of(scored, outputs) as head:
        for start in range(0, max(1, len(hidden)), rows):
            chunk = slice(start, start + rows)
            part, wanted = hidden.detach()[chunk], targets[chunk]
            tangents = {name: tangent[chunk] for name, tangent in moved.items()}
            if weight is None:
                with torch.set_grad_enabled(backward):
                    logits = head(part.requires_grad_(backward))
                work = logits.detach().clone()  # the head may need its own once more on the way back
                derived = {name: _derived(head, part, tangent) for name, tangent in tangents.items()}
            else:
                work = product(part, weight, memory, "logits")
                derived = {name: product(tangent, weight, memory, name) for name, tangent in tangents.items()}
            found.append(_read(work, wanted, readings, derived, scales or {}, memory, backward))
            if backward:
                gradients.append(work @ weight if weight is not None else torch.autograd.grad(logits, part, work)[0])
    return torch.cat(found, dim=1), torch.cat(gradients) if backward else None


def product(rows: torch.Tensor, weight: torch.Tensor, memory: HeadMemory, name: str) -> torch.Tensor:
    """``rows`` (n, d) through a head that is one matrix (V, d): (n, V), valid until ``name`` is taken again."""
    return torch.mm(rows, weight.mT, out=memory.take(name, len(rows), len(weight), rows))


def _derived(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """The derivative (n, V) of a head that is more than a matrix."""
    with torch.no_grad(), dual_level():
        tangent = tangent_of(head(forward_ad.make_dual(hidden.detach(), moved)))
        assert tangent is not None
        return tangent.clone()


def _read(
    logits: torch.Tensor,
    targets: torch.Tensor,
    readings: Sequence[Reading],
    moved: Mapping[str, torch.Tensor],
    scales: Mapping[str, float],
    memory: HeadMemory,
    backward: bool,
) -> torch.Tensor:
    """Readings (readings, n) of logits (n, vocabulary), in at least float32; with ``backward`` the logits become their own
    errors, softmax - one-hot, else whatever is left there.

    A few rows at a time, so that what one step leaves in the cache the next one finds there: logits of 16 bits are read
    and written once, and are wide nowhere else.
    """
    wide = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    found = wide.new_empty(len(readings), len(targets))
    step = rows_in_cache(logits)
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        own, wanted = logits[rows], targets[rows]
        probability, scratch = (memory.take(name, len(own), own.shape[1], wide) for name in ("p", "scratch"))
        shifted = own if own.dtype == wide.dtype else memory.take("shifted", len(own), own.shape[1], wide).copy_(own)
        shifted.sub_(shifted.amax(dim=1, keepdim=True))
        total = torch.exp(shifted, out=probability).sum(dim=1, keepdim=True)
        probability.div_(total)
        some = {name: derivative[rows].to(wide.dtype) for name, derivative in moved.items()}
        some |= {name: some[name] / scale for name, scale in scales.items() if scale != 1.0 and name in some}
        predictions = Predictions(wanted, shifted, total, probability, some, scratch)
        for index, reading in enumerate(readings):
            found[index, rows] = reading(predictions)
        if backward:
            own.copy_(probability.scatter_add_(1, wanted[:, None], -torch.ones_like(total)))
    return found


def _output_matrix(model: Any) -> nn.Linear | None:
    """The output embedding where it is a linear map without bias. One with hooks or a forward of its own (offloaded weights)
    is none."""
    module = model.get_output_embeddings()
    plain = (
        type(module) is nn.Linear
        and module.bias is None
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
    return module if plain else None


@contextmanager
def watched(model: Any) -> Iterator[Callable[[torch.Tensor, torch.Tensor], bool]]:
    """Yields (hidden, logits) -> whether logits are hidden @ weight.T, of the output embedding, and nothing else.

    They are where it is a linear map without bias that was handed the hidden states as they are, and whose output was
    handed out as it is: the same memory, never written to since (no scale, cap or cast around it).
    """
    module = _output_matrix(model)
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def remember(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen[:] = [(args[0], output, output._version)]

    def is_matrix(hidden: torch.Tensor, logits: torch.Tensor) -> bool:
        if not seen:
            return False
        entering, leaving, version = seen.pop()
        return _same_memory(entering, hidden) and _same_memory(leaving, logits) and leaving._version == version

    with nullcontext() if module is None else module.register_forward_hook(remember):
        yield is_matrix


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype
