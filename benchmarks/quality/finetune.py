"""Fine-tune the whole model on labels, and measure the loss per token on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from alphatoken.pipeline.maths.batch import Batch, by_token_budget, collate, response_start
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.warmup import schedule

ROWS_AT_ONCE = 2  # of a step's rows, of like lengths: half the memory, and hardly any padding
Tokens = Sequence[tuple[list[int], list[int]]]  # (input_ids, labels) per row


def cut_responses(rows: Tokens, cut: int) -> Tokens:
    """Every row up to the ``cut``-th token from its first label on."""
    ends = [response_start(labels) + cut for _, labels in rows]
    return [(ids[:end], labels[:end]) for (ids, labels), end in zip(rows, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a fine-tune is run; the same for every mask."""

    steps: int = 27
    batch_size: int = 8
    learning_rate: float = 5e-5
    seed: int = 0
    decay: bool = True  # a warm-up and a cosine; False: the same learning rate at every step


def losses_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy (n,) at the n positions that predict a labelled token; logits nowhere else."""
    positions = batch.predicting()
    decoder = model.get_decoder()  # type: ignore[operator]  # an nn.Module to mypy
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
        logits = model.get_output_embeddings()(hidden)  # type: ignore[operator]  # as above
    return F.cross_entropy(logits.float(), batch.labels.flatten()[positions + 1], reduction="none")


def batches(rows: int, recipe: Recipe) -> Iterable[list[int]]:
    """Row numbers of every step: epochs, each in an order of its own."""
    return row_order(rows, recipe.batch_size, recipe.steps, recipe.seed)


def finetune(
    model: torch.nn.Module,
    train: Tokens,
    recipe: Recipe,
    relabel: Callable[[int, Batch], Batch] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
) -> int:
    """AdamW on the mean loss of each batch's labelled tokens, in place; returns how many tokens were trained on.

    ``relabel(step, batch)`` may take labels away when it is the batch's turn (a closed loop). ``weights``: one per
    token, for soft masks.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    trained = 0
    for step, rows in enumerate(batches(len(train), recipe)):
        batch = collate([train[i][0] for i in rows], [train[i][1] for i in rows])
        if relabel is not None:
            batch = relabel(step, batch)
        own = None if weights is None else _padded([weights[i] for i in rows], batch.shape)
        scale = len(batch.predicting()) if own is None else float(own.sum())
        model.train()
        optimizer.zero_grad(set_to_none=True)
        for few in batch.lengths.argsort().split(ROWS_AT_ONCE):
            part = batch.rows(few)
            losses = losses_of(model, part)
            trained += len(losses)
            if own is not None:
                losses = losses * own[few, : part.shape[1]].flatten()[part.predicting() + 1]
            (losses.sum() / scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (schedule(step, recipe.steps) if recipe.decay else 1.0)
        optimizer.step()
    model.eval()
    return trained


def _padded(rows: Sequence[Sequence[float]], shape: tuple[int, int]) -> torch.Tensor:
    padded = torch.zeros(shape)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values)
    return padded


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Tokens) -> float:
    """Nats per labelled token over all rows."""
    total, count = 0.0, 0
    for group in by_token_budget([len(ids) for ids, _ in rows], 4096):
        losses = losses_of(model, collate([rows[i][0] for i in group], [rows[i][1] for i in group]))
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count
