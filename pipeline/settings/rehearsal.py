"""The closed loop that valuation.schedule=rehearsal runs over the data."""

from dataclasses import dataclass

from pipeline.settings.option import at_least, option


@dataclass(frozen=True, slots=True)
class RehearsalSettings:
    """Configuration group ``valuation.rehearsal``: values, threshold within the batch, masked step, next batch."""

    rho: float = option(0.5, "fraction of each batch's response tokens that is kept: the mask that is written")
    stability_weight: float = option(1.5, "lambda: value = adaptation + lambda * stability; 0 needs no Fisher")
    batch_size: int = option(64, "examples per optimizer step, each example in one step; the paper's is 64")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW on the scored modules")
    refresh: int = option(1, "steps after which the two directions are made anew from the present weights")
    save_every: int = option(10, "steps after which the state is saved: at most as many are lost with a killed driver")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = []
        if not 0 < self.rho <= 1:
            found.append(f"valuation.rehearsal.rho={self.rho}: must be above 0 and at most 1")
        found += at_least("valuation.rehearsal.stability_weight", self.stability_weight, 0)
        for name in ("batch_size", "refresh", "save_every"):
            found += at_least(f"valuation.rehearsal.{name}", getattr(self, name), 1)
        if not self.learning_rate > 0:
            found.append(f"valuation.rehearsal.learning_rate={self.learning_rate}: must be above 0")
        return found
