"""The simulated training run that anchor.direction=unrolled goes back over."""

from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.option import at_least, one_of, option

LEAST_VALIDATION, ENOUGH_VALIDATION = 16, 100  # rows: with fewer the direction fits the rows and not the task
TRAINED = ("weights", "lora")
RATES = {"weights": 1e-4, "lora": 1e-3}


@dataclass(frozen=True, slots=True)
class UnrollSettings:
    """Configuration group ``anchor.unroll``."""

    orders: int = option(
        2, "simulated runs, each over the examples in an order of its own; values are the mean over them"
    )
    steps: int = option(27, "Adam steps of each run")
    examples: int = option(216, "training examples drawn with the seed; as many epochs as the steps need")
    batch_size: int = option(8, "examples per step")
    train: str = option(
        "weights",
        "what the run trains: weights (the linear maps of anchor.unroll.layers) or lora (adapters on them, of all layers where "
        "nothing else is said: faster, and on a small tape)",
    )
    rank: int = option(16, "rank of the adapters of anchor.unroll.train=lora")
    learning_rate: float | None = option(
        None, "peak learning rate of Adam; null: 1e-4 for anchor.unroll.train=weights, 1e-3 for lora"
    )
    snapshots: int = option(5, "points along each run at which tokens are valued")
    layers: Any = option(
        None,
        "decoder layers that the run trains, from the last, or all; null: valuation.layers, of adapters all; others than "
        "valuation.layers with valuation.schedule=own_step alone, whose values are of all trained layers",
    )
    tape_bytes: int = option(
        32 * 2**30,
        "bytes on disk for the states of each run; where they are more, every s-th is kept and the steps between are made "
        "again, for one more forward half",
    )

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate

    @property
    def adapter_rank(self) -> int:
        """Of the adapters that learn; 0 where weights do."""
        return self.rank if self.train == "lora" else 0

    @property
    def asked_layers(self) -> Any:
        """``layers`` with what adapters take where it is null."""
        return "all" if self.layers is None and self.train == "lora" else self.layers

    @property
    def spelled_layers(self) -> str:
        """What was typed that says which layers learn."""
        return "anchor.unroll.train=lora" if self.asked_layers != self.layers else f"anchor.unroll.layers={self.layers}"

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = []
        found += one_of("anchor.unroll.train", self.train, TRAINED)
        for name in ("orders", "rank", "batch_size", "snapshots", "tape_bytes"):
            found += at_least(f"anchor.unroll.{name}", getattr(self, name), 1)
        if isinstance(self.layers, str) and self.layers != "all":
            found.append(f"anchor.unroll.layers={self.layers}: must be a whole number, all or null")
        elif isinstance(self.layers, int):
            found += at_least("anchor.unroll.layers", self.layers, 1)
        elif self.layers is not None and self.layers != "all":
            found.append(f"anchor.unroll.layers={self.layers}: must be a whole number, all or null")
        if self.steps < 2:
            found.append(
                f"anchor.unroll.steps={self.steps}: a run of one step is anchor.direction=gradient; give at least 2"
            )
        elif self.snapshots > self.steps:
            found.append(f"anchor.unroll.snapshots={self.snapshots}: a run of {self.steps} steps has fewer points")
        if self.examples < self.batch_size:
            found.append(
                f"anchor.unroll.examples={self.examples}: fewer than one batch, anchor.unroll.batch_size={self.batch_size}"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            found.append(f"anchor.unroll.learning_rate={self.learning_rate}: must be above 0")
        return found
