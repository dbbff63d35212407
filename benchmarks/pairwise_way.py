"""The paper's own way of computing adaptation values, as a yardstick for time: nothing here is used by the product.

Eager attention with every layer's full matrix kept, one length for all sequences, backward through the whole model
with weight gradients, and every train token paired with every validation token, module by module:
`mean over v of <d, d_v> <h, h_v>`, for the direct and for the causal path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from alphatoken.pipeline.prepare.tokenize import Example

Captured = dict[str, tuple[torch.Tensor, torch.Tensor]]


class PairwiseWay:
    """Holds the validation tokens' inputs and errors at every linear map of the last ``layers`` layers."""

    def __init__(self, model: PreTrainedModel, validation: list[Example], layers: int, window: int) -> None:
        """``validation`` rows are passed at their own lengths: what they cost is not what is measured."""
        model.set_attn_implementation("eager")
        self.model, self.window = model, window
        stack = model.model.layers[-layers:]
        self.maps = {
            f"{i}.{n}": m for i, layer in enumerate(stack) for n, m in layer.named_modules() if isinstance(m, nn.Linear)
        }
        self.first = len(model.model.layers) - layers
        parts = [self._pass([example], len(example.input_ids))[0] for example in validation]
        self.validation = {
            n: (torch.cat([p[n][0] for p in parts]), torch.cat([p[n][1] for p in parts])) for n in self.maps
        }

    def __call__(self, examples: list[Example], length: int) -> torch.Tensor:
        """direct + causal value of every response token of a batch padded to ``length``, flat."""
        captured, reached = self._pass(examples, length)
        total = torch.zeros(())
        for name, (entering, error) in captured.items():
            h_v, d_v = self.validation[name]
            inner = entering @ h_v.T
            total = total + ((error @ d_v.T) * inner).mean(dim=1)
            if name in reached:
                total = total + ((reached[name] @ d_v.T) * inner).mean(dim=1)
        return total

    def _pass(self, examples: list[Example], length: int) -> tuple[Captured, dict[str, torch.Tensor]]:
        size = (len(examples), length)
        ids, labels, mask = (
            torch.zeros(size, dtype=torch.long),
            torch.full(size, -100),
            torch.zeros(size, dtype=torch.long),
        )
        for row, example in enumerate(examples):
            n = len(example.input_ids)
            ids[row, :n], labels[row, :n], mask[row, :n] = (
                torch.tensor(example.input_ids),
                torch.tensor(example.labels),
                1,
            )
        seen: Captured = {}
        hooks = []
        for name, module in self.maps.items():

            def keep(module: nn.Module, args: tuple, output: torch.Tensor, name: str = name) -> None:
                output.register_hook(lambda d: seen.__setitem__(name, (args[0].detach(), d)))

            hooks.append(module.register_forward_hook(keep))
        self.model.requires_grad_(True)
        output = self.model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
        following = torch.full_like(labels, -100)
        following[:, :-1] = labels[:, 1:]
        chosen = following != -100
        captured = {name: (h[chosen], d[chosen]) for name, (h, d) in seen.items()}
        reached = {}
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        band = (distance > 0) & (distance <= self.window)
        for name in captured:
            if name.endswith("v_proj"):
                layer = self.first + int(name.split(".")[0])
                probability = output.attentions[layer].detach().mean(dim=1) * band
                reached[name] = (probability.transpose(1, 2) @ seen[name][1])[chosen]
        return captured, reached
