"""The unrolled direction against brute force: training runs repeated with one token's weight moved, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphatoken.pipeline.maths import attention_blocks
from alphatoken.pipeline.maths.adapters import DOWN, Adapters
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.learners import ScoredWeights, Trained
from alphatoken.pipeline.maths.second_order import check_second_derivative, curvature_pass
from alphatoken.pipeline.maths.simulated import KINDS, Descent, Diverged, SimulatedRun, Taped, simulate
from alphatoken.pipeline.maths.unroll import Adjoint, Swept, loss_gradient, pulled, pushed, sweep
from alphatoken.pipeline.maths.valuer import TokenValuer
from tests.maths.comparison import sequences, state
from tests.maths.tiny_models import FAMILIES, model_of

LAYERS, STEPS = 2, 4
RATES = {"sgd": 0.3, "momentum": 0.6, "adam": 0.02}


def in_float64(family: str) -> Any:
    """A tiny model that computes in float64 throughout: root-mean-square norms would go through float32."""
    model: Any = model_of(family, seed=1)
    norms_in_float64(model)
    return model


def norms_in_float64(model: Any) -> None:
    """Root-mean-square norms of a model in float64 would go through float32."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(_normed, module)


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def batches_of(seed: int, steps: int = STEPS) -> list[list[Batch]]:
    """Of every step two passes, of one and of two sequences."""
    return [
        [sequences([11], seed + 2 * step).batch(), sequences([8, 13], seed + 2 * step + 1).batch()]
        for step in range(steps)
    ]


def losses_of(model: Any, weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """(n,) by the model's own forward pass at other scored weights, row by row."""
    found = []
    for ids, labels, length in zip(batch.input_ids, batch.labels, batch.lengths.tolist(), strict=True):
        output = torch.func.functional_call(
            model, weights, kwargs={"input_ids": ids[None, :length], "use_cache": False}
        )
        following = labels[1:length]
        every = F.cross_entropy(output.logits[0, :-1].double(), ids[1:length], reduction="none")
        found.append(every[following != -100])
    return torch.cat(found)


def weights_of(scored: ScoredLayers) -> Trained:
    """The scored weights learn."""
    return ScoredWeights(scored, rounded=False)


def adapters_of(scored: ScoredLayers) -> Trained:
    """Adapters learn."""
    return Adapters(scored, rank=3, seed=6)


class Run:
    """One simulated run and its sweep, for both objectives."""

    def __init__(
        self,
        family: str,
        kind: str,
        rate: float,
        steps: int = STEPS,
        make: Callable[[ScoredLayers], Trained] = weights_of,
    ) -> None:
        self.model = in_float64(family)
        self.scored = scored_layers(self.model, LAYERS)
        self.learner = make(self.scored)
        self.batches, self.validation = batches_of(10, steps), sequences([9, 12], 77).batch()
        self.descent = Descent(kind, rate, steps)
        self.start = {name: w.clone() for name, w in self.learner.start().items()}
        generator, scored = torch.Generator().manual_seed(5), self.scored.weights()
        self.fisher = {n: torch.rand(w.shape, generator=generator, dtype=w.dtype) for n, w in scored.items()}
        self.reference = {
            n: w + 0.05 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in scored.items()
        }
        self.tape: dict[int, Taped] = {}
        run = SimulatedRun(self.start, self.descent)
        simulate(self.learner, run, self.batches, "sdpa", self.tape.__setitem__)
        self.end = {name: w.clone() for name, w in run.masters().items()}
        gradient, _, _ = loss_gradient(self.learner, self.end, [self.validation], "sdpa")
        merged = self.learner.merged(self.end)
        drift = {n: self.fisher[n] * (w - self.reference[n]) for n, w in merged.items()}
        self.ends = {"adaptation": gradient, "stability": pulled(self.learner, self.end, drift)}
        adjoints = {name: Adjoint.at_the_end(one) for name, one in self.ends.items()}
        self.swept: dict[int, Swept] = {}
        sweep(
            self.learner, self.descent, self.batches, self.tape.__getitem__, adjoints, self.swept.__setitem__
        )  # fmt: skip

    def objectives(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """J(W) of both, in float64."""
        weights = self.learner.merged(weights)
        with torch.no_grad():
            adaptation = float(losses_of(self.model, weights, self.validation).mean())
        parts = [float((self.fisher[n] * (w - self.reference[n]).square()).sum()) for n, w in weights.items()]
        return {"adaptation": adaptation, "stability": 0.5 * sum(parts)}

    def trained(self, step: int, token: int, moved: float) -> dict[str, float]:
        """J at the end of the run where one token has the weight 1 + moved, P_t and c_t as they were."""
        weights = {name: w.clone().requires_grad_(True) for name, w in self.start.items()}
        momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
        decay = {"sgd": 0.0, "momentum": 0.9, "adam": 0.9}[self.descent.kind]
        for t, passes in enumerate(self.batches):
            merged = self.learner.merged(weights)
            losses = torch.cat([losses_of(self.model, merged, batch) for batch in passes])
            own = torch.ones_like(losses)
            if t == step:
                own[token] += moved
            gradient = torch.autograd.grad((own * losses).sum() / own.sum(), list(weights.values()))
            taped = self.tape[t]
            for (name, w), g in zip(list(weights.items()), gradient, strict=True):
                momentum[name] = decay * momentum[name] + (1 - decay) * taped.clip * g
                scale = taped.scale if isinstance(taped.scale, float) else taped.scale[name]
                weights[name] = (w - scale * momentum[name]).detach().requires_grad_(True)
        return self.objectives({name: w.detach() for name, w in weights.items()})


@pytest.mark.parametrize("make", [weights_of, adapters_of])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_value_is_minus_the_derivative_of_the_objective_by_its_weight(
    family: str, kind: str, make: Callable[[ScoredLayers], Trained]
) -> None:
    run = Run(family, kind, RATES[kind], make=make)
    assert run.trained(0, 0, 0.0)["adaptation"] == pytest.approx(run.objectives(run.end)["adaptation"], rel=1e-9)
    width = 2e-4
    for step in range(STEPS):
        values = run.swept[step].values
        for token in (0, 3, 9):
            # Of the fourth order: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h
            at = {m: run.trained(step, token, m * width) for m in (-2, -1, 1, 2)}
            for objective in ("adaptation", "stability"):
                far, near = (at[m][objective] - at[-m][objective] for m in (2, 1))
                slope = (8 * near - far) / (12 * width)
                largest = float(values[objective].abs().max())
                assert float(values[objective][token]) == pytest.approx(-slope, rel=1e-6, abs=1e-6 * largest)
    # The curvature on the way matters: without it the first step's residual would be another.
    plain = Adjoint.at_the_end(run.ends["adaptation"])
    for step in reversed(range(STEPS)):
        for name, tensor in plain.weights.items():
            plain.momentum[name] -= run.tape[step].scaled(name, tensor)
        last = {n: (1 - run.descent.decay) * run.tape[step].clip * mu for n, mu in plain.momentum.items()}
        plain.momentum = {n: run.descent.decay * mu for n, mu in plain.momentum.items()}
    name = next(iter(last))
    exact = run.swept[0].residuals()["adaptation"][name]
    assert float((last[name] - exact).norm() / exact.norm()) > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_one_step_of_plain_gradient_descent_is_the_gradient_direction(family: str) -> None:
    """Along -r_0 every column of the paper is rate * clip times the one along the validation loss's gradient at W_1."""
    run = Run(family, "sgd", RATES["sgd"], steps=1)
    taped = run.tape[0]
    assert isinstance(taped.scale, float)
    factor = taped.scale * taped.clip
    batch = run.batches[0][1]
    for objective, gradient in run.ends.items():
        minus = {n: -tensor for n, tensor in run.swept[0].residuals()[objective].items()}
        found, wanted = (
            TokenValuer(run.model, Directions({"adaptation": d, "stability": d}), LAYERS, 6, scores=["paper"]).value(
                batch
            )
            for d in (minus, gradient)
        )
        for column, values in wanted.items():
            assert values.any()
            torch.testing.assert_close(
                found[column], factor * values, rtol=1e-10, atol=1e-10 * float(values.abs().max()) * factor
            )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_direction_of_adapters_in_the_scored_weights_gives_the_same_values(family: str) -> None:
    """So that the value stage need not know of them: along -r_t at W_t, each as the adapters amount to it."""
    run = Run(family, "adam", RATES["adam"], make=adapters_of)
    step, batch = 2, run.batches[2][1]
    swept = run.swept[step]
    taped = run.tape[step]
    adjoints = {name: Adjoint.at_the_end(one) for name, one in run.ends.items()}
    residuals: dict[str, dict[str, torch.Tensor]] = {}

    def keep(at: int, one: Swept) -> None:
        if at == step:
            residuals.update(one.residuals())

    sweep(run.learner, run.descent, run.batches, run.tape.__getitem__, adjoints, keep)
    directions = {o: {n: -t for n, t in pushed(run.learner, taped.weights, r).items()} for o, r in residuals.items()}
    with swapped(run.scored, run.learner.merged(taped.weights)):
        found = TokenValuer(run.model, Directions(directions), LAYERS, 0, exact=True, scores=["paper"]).value(batch)
    first = len(run.batches[step][0].predicting())
    for objective, values in swept.values.items():
        own = found[f"{objective}_exact"].flatten()[batch.predicting() + 1]
        # Less the mean over the step's tokens, and divided by their number: differences tell.
        wanted = taped.tokens * (values[first:] - values[first])
        torch.testing.assert_close((own - own[0]).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_what_adapters_amount_to_is_what_the_model_with_them_computes() -> None:
    for family in ("gpt2", "llama", "mixtral"):
        model = in_float64(family)
        scored, batch = scored_layers(model, LAYERS), sequences([14, 9], 3).batch()
        learner, generator = adapters_of(scored), torch.Generator().manual_seed(1)
        moved = {
            n: w + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in learner.start().items()
        }
        assert all(name.endswith((DOWN, "lora_B")) for name in moved)
        before = state(model)
        learner.clear()
        with learner.holding(moved):
            found = learner.backward(batch, "sdpa")
        assert state(model) == before
        wanted = losses_of(model, learner.merged(moved), batch).detach()
        relative = 1e-10 if family == "gpt2" else 2e-4
        torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=relative)
        assert not torch.allclose(wanted, losses_of(model, scored.weights(), batch), rtol=1e-3)


@pytest.mark.parametrize("block", [attention_blocks.BLOCK, 6])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_products_with_the_hessian_are_those_of_autograd_and_leave_nothing_behind(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blocks, "BLOCK", block)  # queries of one: all, or several
    model = model_of(family, seed=1)
    scored, batch = scored_layers(model, LAYERS), sequences([14, 9, 17], 3).batch()
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in scored.weights().items()}
        for name in ("one", "other")
    }
    before = state(model)
    seen: dict[str, dict[str, torch.Tensor]] = {name: {} for name in directions}
    found = curvature_pass(weights_of(scored), batch, directions, lambda d, n, product: seen[d].__setitem__(n, product))
    assert state(model) == before
    weights = {m.name: m.parameter.detach().clone().requires_grad_(True) for m in scored.maps}
    with sdpa_kernel(SDPBackend.MATH):
        losses = losses_of(model, weights, batch)
    own = torch.ones_like(losses, requires_grad=True)
    gradients = torch.autograd.grad((own * losses).sum(), list(weights.values()), create_graph=True)
    relative = 1e-10 if family == "gpt2" else 2e-4  # rotary embeddings and root-mean-square norms compute in float32
    torch.testing.assert_close(found.losses.double(), losses.detach(), rtol=relative, atol=relative)
    for name, direction in directions.items():
        dot = sum((g * direction[n]).sum() for n, g in zip(weights, gradients, strict=True))
        along, *products = torch.autograd.grad(dot, [own, *weights.values()], retain_graph=True)  # type: ignore[list-item]
        pairs = [(found.along[name], along)]
        pairs += [(seen[name][n], wanted) for n, wanted in zip(weights, products, strict=True)]
        for got, wanted in pairs:
            assert wanted.any()
            torch.testing.assert_close(got, wanted, rtol=relative, atol=relative * float(wanted.abs().max()))


def test_a_run_and_a_sweep_that_are_taken_up_again_give_the_same_numbers() -> None:
    whole = Run("gpt2", "adam", RATES["adam"])
    first = SimulatedRun(whole.start, whole.descent)
    kept: dict[int, Taped] = {}
    simulate(whole.learner, first, whole.batches, "sdpa", kept.__setitem__, stop=2)
    again = SimulatedRun(whole.start, whole.descent, (2, {n: t.clone() for n, t in first.state().items()}))
    simulate(whole.learner, again, whole.batches, "sdpa", kept.__setitem__)
    for step, taped in whole.tape.items():
        assert taped.clip == kept[step].clip and isinstance(taped.scale, dict)
        for name, tensor in taped.weights.items():
            assert torch.equal(tensor, kept[step].weights[name])
            assert torch.equal(taped.scale[name], kept[step].scale[name])  # type: ignore[index]
    saved: dict[int, dict[str, Adjoint]] = {}
    swept: dict[int, Swept] = {}
    adjoints = {"adaptation": Adjoint.at_the_end(whole.ends["adaptation"])}

    def save(step: int, one: Swept) -> None:
        swept[step] = one
        saved[step] = {
            name: Adjoint({n: t.clone() for n, t in a.weights.items()}, {n: t.clone() for n, t in a.momentum.items()})
            for name, a in adjoints.items()
        }

    given = (whole.learner, whole.descent, whole.batches, whole.tape.__getitem__)
    sweep(*given, adjoints, save)
    later: dict[int, Swept] = {}
    sweep(*given, saved[2], later.__setitem__, start=2)
    assert sorted(later) == [0, 1]
    for step in (0, 1):
        assert torch.equal(later[step].values["adaptation"], swept[step].values["adaptation"])
        # One objective or two: the same numbers.
        assert torch.equal(swept[step].values["adaptation"], whole.swept[step].values["adaptation"])


def test_what_is_not_finite_is_named_by_its_step() -> None:
    run = Run("gpt2", "adam", RATES["adam"])
    adjoints = {"adaptation": Adjoint.at_the_end(run.ends["adaptation"])}
    next(iter(run.tape[1].weights.values()))[0, 0] = torch.nan
    with pytest.raises(Diverged, match="sweep back for adaptation at step 2 of 4"):
        sweep(run.learner, run.descent, run.batches, run.tape.__getitem__, adjoints, lambda t, s: None)
    start = SimulatedRun(run.start, Descent("adam", 1e300, STEPS))
    with pytest.raises(Diverged, match="step [2-4] of 4: NaN or infinity in"):
        simulate(run.learner, start, run.batches, "sdpa", lambda t, taped: None)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, error):  # type: ignore[no-untyped-def]
        return error * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("make", [weights_of, adapters_of])
def test_a_model_without_second_derivative_is_refused_with_the_remedy(make: Callable[[ScoredLayers], Trained]) -> None:
    model: Any = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4)
    ).eval()
    check_second_derivative(weights_of(scored_layers(model, LAYERS)))
    model.model.layers[-1].mlp.act_fn.forward = _Once.apply
    learner = make(scored_layers(model, LAYERS))
    with pytest.raises(
        UnsupportedModel, match=r"cannot be differentiated twice \(.*\): set anchor.direction=gradient$"
    ):
        check_second_derivative(learner)
