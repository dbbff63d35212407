"""What a value is worth at the END of a training run: train again without one token, and look at the validation loss.

`python -m benchmarks.leave_one_out` trains the last layers of the embedded model for some Adam steps, once on every token
and once for each sampled token without it:

    effect = L_val(end of the run without the token) - L_val(end of the run)

positive where the token was worth learning. Every score is compared with it by rank correlation: for the run whose order
of rows the unrolled values were made with, and for a run in another order. `benchmarks.fidelity` does the same for one step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from alphatoken.pipeline.maths.batch import IGNORED, Batch, Sequences
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.learners import ScoredWeights
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.simulated import Descent, SimulatedRun, Taped, Tensors
from alphatoken.pipeline.maths.trial import Entering, Fit, entering_hidden, held_out_losses
from alphatoken.pipeline.maths.unroll import Adjoint, Swept, loss_gradient, sweep
from alphatoken.pipeline.prepare.tokenize import Example
from benchmarks.example_batches import load_example
from benchmarks.fidelity import LAYERS, correlation, estimates, ranks
from benchmarks.quality.finetune import cut_responses

BUDGET = 4096
Token = tuple[int, int]  # row and place in it


def rows_of(examples: Sequence[Example], response: int) -> Sequences:
    """Whole prompts, each with the first ``response`` tokens of its response."""
    rows = cut_responses([(e.input_ids, e.labels) for e in examples], response)
    return Sequences([e.id for e in examples], [list(ids) for ids, _ in rows], [list(labels) for _, labels in rows])


class Runs:
    """Training runs over ``train`` on the scored layers; what enters them is made once for every row."""

    def __init__(self, scored: ScoredLayers, train: Sequences, validation: Sequences, descent: Descent) -> None:
        self.scored, self.descent = scored, descent
        self.train, self.validation = (self._entering(rows) for rows in (train, validation))
        self.start = {name: weight.clone() for name, weight in scored.weights().items()}

    def _entering(self, rows: Sequences) -> Entering:
        made = [entering_hidden(self.scored, ids, "sdpa") for ids in rows.input_ids]
        return Entering(rows, made.__getitem__)

    def trained(
        self,
        order: Sequence[Sequence[int]],
        tape: list[Taped] | None = None,
        states: list[Tensors] | None = None,
        without: Token | None = None,
    ) -> dict[str, torch.Tensor]:
        """The weights at the end of the run over the rows of ``order``; fills ``tape`` and ``states``, of before each step and at the end.

        ``without``: leaves out the loss of one token; goes on from ``states``, which the run on every token has filled.
        """
        first = 0
        if without is not None and states:  # until then the runs are the same
            first = next((step for step, rows in enumerate(order) if without[0] in rows), len(order))
        run = SimulatedRun(self.start, self.descent, (first, states[first]) if first and states else None)
        for rows in order[first:]:
            if without is None and states is not None:
                states.append(copied(run.state()))
            batch, from_below = self.train.batch(rows, self.scored)
            if without is not None and without[0] in rows:
                batch.labels[list(rows).index(without[0]), without[1]] = IGNORED
            total = OuterSum(self.scored)
            with swapped(self.scored, run.masters()), from_below:
                losses = ghost_pass(self.scored, batch, total)
            taped = run.step(total.total, len(losses))
            if tape is not None:
                tape.append(taped)
        if without is None and states is not None:
            states.append(copied(run.state()))
        return run.masters()

    def loss(self, weights: dict[str, torch.Tensor]) -> float:
        """Mean cross-entropy of the validation rows' response tokens, nats."""
        sums, counts = held_out_losses(
            ScoredWeights(self.scored), weights, self.validation, Fit([], 0.0, "sdpa", BUDGET)
        )
        return float(sums.sum() / counts.sum())

    def unrolled(self, order: Sequence[Sequence[int]]) -> dict[Token, float]:
        """Every response token's value at its own steps of the run over ``order``, by the sweep back over it."""
        tape: list[Taped] = []
        end = {name: weight.clone() for name, weight in self.trained(order, tape=tape).items()}
        held = self.validation.sequences
        learner = ScoredWeights(self.scored, rounded=False)
        rows = [held.take([i]).batch() for i in range(len(held))]
        gradient, _, _ = loss_gradient(learner, end, rows, "sdpa")
        batches = [[self.train.batch(rows, self.scored)[0]] for rows in order]
        values: dict[Token, float] = {}

        def found(step: int, swept: Swept) -> None:
            for token, value in zip(
                tokens_of(batches[step][0], order[step]), swept.values["only"].tolist(), strict=True
            ):
                values[token] = values.get(token, 0.0) + value

        adjoints = {"only": Adjoint.at_the_end(gradient)}
        sweep(learner, self.descent, batches, tape.__getitem__, adjoints, found)
        return values

    def effects(self, order: Sequence[Sequence[int]], tokens: Sequence[Token]) -> torch.Tensor:
        """(n,): what leaving each token out of the run costs, nats."""
        states: list[Tensors] = []
        whole = self.loss(self.trained(order, states=states))
        print(f"validation loss {self.loss(self.start):.4f} nats, at the end of the run {whole:.4f}", flush=True)
        left_out = [self.loss(self.trained(order, states=states, without=token)) for token in tokens]
        return torch.tensor(left_out, dtype=torch.float64) - whole


def copied(state: Tensors) -> Tensors:
    """Tensors that a run no longer writes to."""
    return {name: tensor.clone() for name, tensor in state.items()}


def tokens_of(batch: Batch, rows: Sequence[int]) -> list[Token]:
    """Row and place of the tokens that a batch of ``rows`` predicts, in the order of its values."""
    found = [divmod(position, batch.shape[1]) for position in batch.predicting().tolist()]
    return [(rows[row], column + 1) for row, column in found]


def main() -> None:
    """Print the table with its size and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32, help="training rows, each in one step")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--response", type=int, default=32, help="response tokens of each row")
    parser.add_argument("--validation", type=int, default=16, help="validation rows")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    model, examples = load_example()
    scored = scored_layers(model.requires_grad_(False), LAYERS)
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(asked.seed)).tolist()
    train = rows_of([examples[i] for i in drawn[: asked.rows]], asked.response)
    held = rows_of([examples[i] for i in drawn[asked.rows : asked.rows + asked.validation]], asked.response)
    steps = asked.rows // asked.batch_size
    runs = Runs(scored, train, held, Descent("adam", asked.learning_rate, steps))
    orders = [row_order(asked.rows, asked.batch_size, steps, f"{asked.seed} {i}") for i in range(3)]
    everything = train.batch()
    every = tokens_of(everything, range(asked.rows))
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(asked.seed))[: asked.tokens]
    tokens = [every[i] for i in chosen.tolist()]
    print(
        f"SmolLM2-135M-Instruct, float32, K={LAYERS}, seed {asked.seed}: {len(tokens)} of {len(every)} response tokens of "
        f"{asked.rows} rows, {steps} Adam steps of {asked.batch_size} rows; {asked.validation} validation rows"
    )
    started = time.perf_counter()
    unrolled = [runs.unrolled(order) for order in orders[:2]]
    print(f"(values of two orders: {time.perf_counter() - started:.0f} s)", flush=True)
    scores = {f"unrolled, order {i}": torch.tensor([own[t] for t in tokens]) for i, own in enumerate(unrolled)}
    scores["unrolled, mean of both"] = torch.stack(list(scores.values())).mean(dim=0)
    scores |= estimates(scored, everything, held.batch(), everything.predicting()[chosen], asked.seed)
    started = time.perf_counter()
    effects = {name: runs.effects(order, tokens) for name, order in (("order 0", orders[0]), ("another", orders[2]))}
    print("\n| " + " | ".join([f"the run without one of {len(tokens)} tokens", *effects]) + " |\n|---|---|---|")
    for name, score in scores.items():
        found = [correlation(ranks(score), ranks(effect)) for effect in effects.values()]
        print(f"| {name} | " + " | ".join(f"{value:+.3f}" for value in found) + " |")
    print(f"| effects in the other order | | {correlation(*(ranks(e) for e in effects.values())):+.3f} |")
    print(f"({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
