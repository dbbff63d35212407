"""The simulated training run that anchor.direction=unrolled goes back over."""

from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.option import at_least, option

LEAST_VALIDATION, ENOUGH_VALIDATION = 16, 100  # rows: with fewer the direction fits the rows and not the task


@dataclass(frozen=True, slots=True)
class UnrollSettings:
    """Configuration group ``anchor.unroll``."""

    orders: int = option(
        2, "simulated runs, each over the examples in an order of its own; values are the mean over them"
    )
    steps: int = option(27, "Adam steps of each run, on the scored modules")
    examples: int = option(216, "training examples drawn with the seed; as many epochs as the steps need")
    batch_size: int = option(8, "examples per step")
    learning_rate: float = option(1e-4, "peak learning rate of Adam")
    snapshots: int = option(5, "points along each run at which tokens are valued")
    layers: Any = option(
        None,
        "decoder layers that the run trains, from the last, or all; null: valuation.layers; others than these with "
        "valuation.schedule=own_step alone, whose values are of all trained layers",
    )
    tape_bytes: int = option(
        32 * 2**30,
        "bytes on disk for the states of each run; where they are more, every s-th is kept and the steps between are made "
        "again, for one more forward half",
    )

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = []
        for name in ("orders", "batch_size", "snapshots", "tape_bytes"):
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
        if not self.learning_rate > 0:
            found.append(f"anchor.unroll.learning_rate={self.learning_rate}: must be above 0")
        return found
