"""The run as a whole, and the tree of all settings."""

from dataclasses import dataclass, field

from pipeline.settings.anchor import AnchorSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.data import DataSettings
from pipeline.settings.mask import MaskSettings
from pipeline.settings.model import ModelSettings
from pipeline.settings.option import one_of, option
from pipeline.settings.valuation import ValuationSettings

STAGES = ("prepare", "anchor", "value", "mask")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Configuration group ``run``."""

    dir: str = option("runs/default", "directory or URI of the run")
    seed: int = option(0, "one seed for everything random")
    overwrite: str | None = option(None, f"first stage to do anew, with all that follow: {', '.join(STAGES)}")
    share: str | None = option(
        None,
        "another run directory: its stages and its Fisher are taken over where they are equal, instead of made anew",
    )
    tracker: str = option("none", "none | mlflow | wandb: send the numbers of metrics.jsonl there too")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = [] if self.dir else ["run.dir is missing: give a directory or a URI"]
        found += one_of("run.tracker", self.tracker, ("none", "mlflow", "wandb"))
        if self.overwrite is not None:
            found += one_of("run.overwrite", self.overwrite, STAGES)
        if self.share is not None and not self.share:
            found.append("run.share is empty: give a run directory, or null")
        return found


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a run is told; one field per configuration group."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    anchor: AnchorSettings = field(default_factory=AnchorSettings)
    valuation: ValuationSettings = field(default_factory=ValuationSettings)
    mask: MaskSettings = field(default_factory=MaskSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    debug: bool = option(False, "show tracebacks")

    def problems(self) -> list[str]:
        """Every reason why the run cannot start, over all groups, one sentence each."""
        found = self.run.problems() + self.model.problems() + self.data.problems()
        if self.valuation.needs_directions:
            found += self.anchor.problems(self.mask.stability_weight, len(self.model.checkpoints))
        elif len(self.model.checkpoints) > 1:
            found.append(
                f"valuation.method={self.valuation.method} scores at one model: give one model.policy, no list"
            )
        return found + self.valuation.problems() + self.mask.problems() + self.cluster.problems()
