"""The trial: short fine-tunes on masks of a run, which say whether a mask helps on this model and this data."""

from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.option import at_least, auto_or_at_least, one_of, option

TRAINED = ("layers", "lora", "all")
# A few steps of few layers have to get as far as many of all (docs/results.md, which learning rate is to be believed).
RATES = {"layers": 3e-4, "lora": 1e-3, "all": 1e-4}


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """Configuration group ``trial``."""

    auto: bool = option(
        False,
        "`alphatoken run` ends with a trial, and masks/chosen holds the mask that it recommends; half of the validation rows "
        "is kept for it (data.validation_trial=half)",
    )
    masks: list[str] = option(
        [],
        "masks to try: names of masks in the run, or presets of the group mask, which are made on the way; empty: all that are "
        "in the run, with trial.auto the run's own and the presets noise and paper",
    )
    rho: list[float] = option(
        [], "every mask of trial.masks is made and tried at each of these fractions; empty: as it is"
    )
    seeds: int = option(3, "fine-tunes of each mask, each with rows in an order of its own, the same for all masks")
    train: str = option(
        "layers",
        "what is fine-tuned: layers (the linear maps of the last valuation.layers decoder layers; lower layers are computed "
        "once), lora (adapters on the linear maps of all layers) or all (every weight); the latter two cost whole passes",
    )
    rank: int = option(16, "rank of the adapters of trial.train=lora")
    steps: int | str = option("auto", "AdamW steps; auto: one epoch of the sample, 20 to 200")
    examples: int | str = option(
        "auto", "training examples, drawn with run.seed; auto: what fits into about ten minutes"
    )
    batch_size: int = option(2, "examples per step")
    learning_rate: float | None = option(
        None, "peak learning rate of AdamW; null: 3e-4 for trial.train=layers, 1e-3 for lora, 1e-4 for all"
    )
    prompts: int = option(64, "prompts at most whose completions by the reference measure how far the model moves")
    cache_bytes: int = option(
        8 << 30,
        "hidden states that the workers of a node share on its disk, in bfloat16; beyond it they are made anew each time",
    )

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = at_least("trial.seeds", self.seeds, 1)
        found += auto_or_at_least("trial.steps", self.steps, 1)
        found += auto_or_at_least("trial.examples", self.examples, 1)
        for name, least in (("rank", 1), ("batch_size", 1), ("prompts", 1), ("cache_bytes", 0)):
            found += at_least(f"trial.{name}", getattr(self, name), least)
        if self.learning_rate is not None and not self.learning_rate > 0:
            found.append(f"trial.learning_rate={self.learning_rate}: must be above 0")
        found += [f"trial.rho={rho}: must be above 0 and at most 1" for rho in self.rho if not 0 < rho <= 1]
        return found + one_of("trial.train", self.train, TRAINED)

    def fingerprinted(self) -> dict[str, Any]:
        """Those that the numbers of a trial depend on, beside how many rows and steps ``auto`` comes to."""
        names = ("train", *["rank"] * (self.train == "lora"), "batch_size", "prompts")
        return {"trial.learning_rate": self.rate, **{f"trial.{name}": getattr(self, name) for name in names}}

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate
