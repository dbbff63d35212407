"""How the two directions are made: Fisher, drift, validation gradient."""

from dataclasses import dataclass, field

from alphatoken.pipeline.settings.option import at_least, auto_or_at_least, one_of, option
from alphatoken.pipeline.settings.unroll import UnrollSettings


@dataclass(frozen=True, slots=True)
class FisherSettings:
    """Configuration group ``anchor.fisher``: completions sampled from the reference (Eq. 5)."""

    prompts: int | str = option(
        "auto", "prompts, held out of the training data; auto: a tenth of the rows, at most 1,000"
    )
    max_new_tokens: int = option(128, "tokens sampled per prompt")
    temperature: float = option(1.0, "sampling temperature; 1.0 samples from the model itself")


@dataclass(frozen=True, slots=True)
class WarmupSettings:
    """Configuration group ``anchor.warmup``: optimizer steps on the scored modules that make a drift."""

    steps: int = option(8, "AdamW steps")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW")
    examples: int = option(32, "training examples drawn with the seed")
    batch_size: int = option(4, "examples per step")


@dataclass(frozen=True, slots=True)
class AnchorSettings:
    """Configuration group ``anchor``."""

    direction: str = option(
        "gradient",
        "gradient: what a token does to the objectives in one step | unrolled: what it does to them at the END of a "
        "simulated training run (anchor.unroll); each snapshot is divided by its values' root mean square",
    )
    unroll: UnrollSettings = field(
        default_factory=UnrollSettings, metadata={"help": "the run of anchor.direction=unrolled"}
    )
    drift: str = option(
        "auto", "auto (checkpoint where policy and reference differ, else warmup) | checkpoint | warmup | none"
    )
    fisher: FisherSettings = field(default_factory=FisherSettings, metadata={"help": "reference Fisher"})
    warmup: WarmupSettings = field(default_factory=WarmupSettings, metadata={"help": "drift by warm-up"})
    snapshots: int = option(1, "points along the warm-up at which tokens are valued")
    snapshot_scale: str = option("none", "none | rms: divide each snapshot's values by their root mean square first")
    precondition: str = option("none", "none | adam (diagonal) | kfac: what the directions are divided by")
    damping: float = option(0.1, "of the preconditioner, as a fraction of its mean eigenvalue")

    @property
    def unrolled(self) -> bool:
        """Whether directions are carried back through a simulated run."""
        return self.direction == "unrolled"

    @property
    def scaled(self) -> bool:
        """Whether each snapshot is divided by its values' root mean square."""
        return self.snapshot_scale == "rms" or self.unrolled

    def moves(self, drift: str) -> bool:
        """Whether snapshots bring scored weights of their own; ``drift``: the resolved one."""
        return drift == "warmup" or self.unrolled

    def points(self, drift: str, checkpoints: int = 1) -> int:
        """How many snapshots there are; ``drift``: the resolved one."""
        if self.unrolled:
            return self.unroll.orders * self.unroll.snapshots
        return self.snapshots if drift == "warmup" else checkpoints

    def problems(self, stability_weight: float, checkpoints: int = 1) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each.

        ``stability_weight`` is mask.stability_weight: without a drift there is no stability value to weigh.
        ``checkpoints``: how many model.policy names.
        """
        found = one_of("anchor.drift", self.drift, ("auto", "checkpoint", "warmup", "none"))
        if self.drift == "none" and stability_weight > 0:
            found.append(
                f"anchor.drift=none leaves no stability value to weigh by mask.stability_weight={stability_weight}: "
                "set anchor.drift to checkpoint (policy and reference differ) or warmup, or mask.stability_weight=0"
            )
        found += auto_or_at_least("anchor.fisher.prompts", self.fisher.prompts, 1)
        found += at_least("anchor.fisher.max_new_tokens", self.fisher.max_new_tokens, 1)
        if not self.fisher.temperature > 0:
            found.append(f"anchor.fisher.temperature={self.fisher.temperature}: must be above 0")
        found += at_least("anchor.warmup.steps", self.warmup.steps, 1)
        found += at_least("anchor.warmup.examples", self.warmup.examples, 1)
        found += at_least("anchor.warmup.batch_size", self.warmup.batch_size, 1)
        if not self.warmup.learning_rate > 0:
            found.append(f"anchor.warmup.learning_rate={self.warmup.learning_rate}: must be above 0")
        found += at_least("anchor.snapshots", self.snapshots, 1)
        if checkpoints > 1 and self.drift == "warmup":
            found.append(
                f"anchor.drift=warmup: the {checkpoints} checkpoints of model.policy are a trajectory already, set "
                "anchor.drift=checkpoint"
            )
        elif checkpoints > 1 and self.snapshots > 1:
            found.append(
                f"anchor.snapshots={self.snapshots}: the {checkpoints} checkpoints of model.policy are the snapshots, "
                "set anchor.snapshots=1"
            )
        elif self.snapshots > 1 and self.drift in ("checkpoint", "none"):
            found.append(
                f"anchor.snapshots={self.snapshots}: snapshots are points of a warm-up: set anchor.drift=warmup"
            )
        if self.snapshots > self.warmup.steps + 1:
            found.append(f"anchor.snapshots={self.snapshots}: a warm-up of {self.warmup.steps} steps has fewer points")
        found += self._unrolled_problems(checkpoints)
        found += one_of("anchor.snapshot_scale", self.snapshot_scale, ("none", "rms"))
        found += one_of("anchor.precondition", self.precondition, ("none", "adam", "kfac"))
        if not self.damping > 0:
            found.append(f"anchor.damping={self.damping}: must be above 0")
        return found

    def _unrolled_problems(self, checkpoints: int) -> list[str]:
        """What anchor.direction=unrolled does not go together with."""
        found = one_of("anchor.direction", self.direction, ("gradient", "unrolled"))
        if not self.unrolled:
            return found
        found += self.unroll.problems()
        if checkpoints > 1:
            found.append("anchor.direction=unrolled simulates a run from one model: give one model.policy, no list")
        if self.precondition != "none":
            found.append(
                f"anchor.precondition={self.precondition}: anchor.direction=unrolled is preconditioned by the run's own "
                "optimizer: set anchor.precondition=none"
            )
        if self.snapshots != 1:
            found.append(
                f"anchor.snapshots={self.snapshots}: those of anchor.direction=unrolled are anchor.unroll.snapshots"
            )
        return found
