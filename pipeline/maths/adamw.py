"""AdamW on masters, float32 or wider, of the scored weights alone; its state can be saved and taken up again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


class ScoredAdamW:
    """Masters of ``weights`` (parameter name -> tensor), at least float32 whatever the model's dtype; no weight decay.

    ``start``: steps done and the state that ``state`` gave then, to go on from there to the same numbers.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        learning_rate: float,
        start: tuple[int, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self._masters = {name: torch.nn.Parameter(_at_least_float(w.detach()).clone()) for name, w in weights.items()}
        for master in self._masters.values():
            master.grad = torch.empty_like(master)  # kept: fresh memory costs more than the arithmetic here
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=learning_rate, weight_decay=0.0, fused=True)
        if start is not None:
            self._restore(*start)

    def masters(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, by parameter name; not copies."""
        return {name: master.detach() for name, master in self._masters.items()}

    def step(
        self, gradient: Mapping[str, torch.Tensor], tokens: int, factor: float, norm: float | None = None
    ) -> float:
        """One step along ``gradient`` / ``tokens``, clipped to norm 1, at ``factor`` times the learning rate.

        ``norm``: that of the whole gradient, of which this is a part; None: this is all of it. Returns the norm before
        clipping.
        """
        for name, master in self._masters.items():
            torch.div(gradient[name].to(master.dtype), max(1, tokens), out=master.grad)
        if norm is None:
            norm = float(torch.nn.utils.clip_grad_norm_(self._masters.values(), 1.0))
        else:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), 1.0, torch.tensor(norm))
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self._optimizer.step()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and both moments, float32, by ``<kind>/<parameter name>``; after the first step."""
        found = {f"master/{name}": master.detach() for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = self._optimizer.state[master][moment]
        return found

    @torch.no_grad()
    def _restore(self, steps: int, state: Mapping[str, torch.Tensor]) -> None:
        for name, master in self._masters.items():
            master.copy_(state[f"master/{name}"])
            moments = {moment: state[f"{moment}/{name}"].to(master.device).clone() for moment in MOMENTS}
            self._optimizer.state[master] = {"step": torch.tensor(float(steps), device=master.device), **moments}


def norm_of(norms: Iterable[float]) -> float:
    """The norm of a gradient whose parameters, float32, have these norms, in their order: what `ScoredAdamW.step` returns."""
    return float(torch.linalg.vector_norm(torch.tensor(list(norms))))


def _at_least_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
