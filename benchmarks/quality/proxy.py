"""The quality table in minutes: the grid's fine-tune on the last K decoder layers alone, over lower layers that stay.

    python -m benchmarks.quality.proxy [--only NAME ...] [--seeds 0 1 2]

Lower layers do not learn, so what enters the first of the last K is computed once for all masks; a fine-tune and its
measurement then cost about a tenth. The learning rate is twice the grid's, since fewer weights learn. The last table
says how well the losses agree with the grid's, over the masks that both have measured: a rank correlation per kind of
held-out rows.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphatoken.pipeline.maths.adamw import ScoredAdamW
from alphatoken.pipeline.maths.batch import by_token_budget, collate
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.rehearsal import RehearsedModel
from alphatoken.pipeline.maths.warmup import schedule
from benchmarks.quality.finetune import Recipe, Tokens, batches, losses_of
from benchmarks.quality.grid import CHOSEN_BY, COLUMNS, ROWS, Quality, Row, results_in, table
from benchmarks.quality.noise import ranks

Weights = dict[str, torch.Tensor]
LEARNING_RATE = 2 * Recipe().learning_rate


class ProxyQuality(Quality):
    """As Quality, with fine-tunes of the last ``layers`` decoder layers."""

    file = "proxy.jsonl"

    def __init__(self, place: Path, layers: int = 3) -> None:
        super().__init__(place)
        model = load_model(ModelSource(str(self.model), dtype="bfloat16"), torch.device("cpu"))
        self.scored = scored_layers(model, layers)
        self.rehearsed = RehearsedModel(self.scored, window=0, attention="sdpa", scores=["paper"], exact=False)
        self.held_out = {name: self.tokens(self.rows.held_out[name]) for name in (*CHOSEN_BY, *COLUMNS)}
        self.hidden: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def measure(self, row: Row | None, seed: int) -> dict[str, Any]:
        """As Quality.measure."""
        if row is None:
            return {"seed": seed, "trained": 0, **self.losses(dict(self.scored.weights()))}
        train, _ = self.masked(row, seed)
        return {"seed": seed, **self.finetuned(train, Recipe(steps=row.steps, learning_rate=LEARNING_RATE, seed=seed))}

    def finetuned(self, train: Tokens, recipe: Recipe) -> dict[str, Any]:
        """Fine-tune on hard labels from the untouched model, and measure."""
        adamw = ScoredAdamW(self.scored.weights(), recipe.learning_rate)
        trained = 0
        for step, rows in enumerate(batches(len(train), recipe)):
            batch = collate([train[i][0] for i in rows], [train[i][1] for i in rows])
            total = OuterSum(self.scored)
            hidden = self.hidden.setdefault(tuple(rows), [])
            losses = self.rehearsed.add_gradient(total, adamw.masters(), batch, hidden, direction=False)
            adamw.step(total.total, len(losses), schedule(step, recipe.steps))
            trained += len(losses)
        return {"trained": trained, **self.losses(adamw.masters())}

    @torch.no_grad()
    def losses(self, weights: Weights) -> dict[str, float]:
        """Nats per labelled token of each kind of held-out rows, with these weights of the last layers."""
        found = {}
        for name, rows in self.held_out.items():
            total, count = 0.0, 0
            for group in by_token_budget([len(ids) for ids, _ in rows], 4096):
                batch = collate([rows[i][0] for i in group], [rows[i][1] for i in group])
                hidden = self.hidden.setdefault((name, *group), [])
                with swapped(self.scored, weights), lower_layers_once(self.scored, hidden):
                    losses = losses_of(self.scored.model, batch)
                total, count = total + float(losses.sum()), count + len(losses)
            found[name] = total / count
        return found


def agreement(proxy: Sequence[dict[str, Any]], grid: Sequence[dict[str, Any]]) -> str:
    """Rank correlation of the two losses over the masks that both have, means over seeds."""
    names = [n for n in dict.fromkeys(r["name"] for r in proxy) if any(r["name"] == n for r in grid)]

    def means(results: Sequence[dict[str, Any]], column: str) -> np.ndarray:
        return np.array([np.mean([r[column] for r in results if r["name"] == name]) for name in names])

    cells = [f"{np.corrcoef(ranks(means(proxy, column)), ranks(means(grid, column)))[0, 1]:.2f}" for column in COLUMNS]
    head = "| masks in both | code | HumanEval | general | English |\n|---|---|---|---|---|"
    return f"{head}\n| {len(names)} | {' | '.join(cells)} |"


def main() -> None:
    """Measure what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    quality = ProxyQuality(options.place.resolve())
    rows: list[Row | None] = [None, *ROWS]
    if options.only:
        rows = [row for row in rows if (row.name if row else "untouched") in options.only]
    quality.run(rows, options.seeds)
    print(table(quality.results()))
    print(agreement(quality.results(), results_in(quality.place / Quality.file)))


if __name__ == "__main__":
    main()
