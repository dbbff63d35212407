"""The run as a whole, and the tree of all settings."""

from dataclasses import dataclass, field
from typing import Any

from alphatoken.data_schemas import value_columns
from alphatoken.pipeline.settings.anchor import AnchorSettings
from alphatoken.pipeline.settings.cluster import ClusterSettings
from alphatoken.pipeline.settings.data import HALF, DataSettings
from alphatoken.pipeline.settings.empty import empty_texts
from alphatoken.pipeline.settings.mask import MaskSettings
from alphatoken.pipeline.settings.model import ModelSettings
from alphatoken.pipeline.settings.objectives import RETENTION, objective_of
from alphatoken.pipeline.settings.option import at_least, one_of, option
from alphatoken.pipeline.settings.plan import PlanSettings
from alphatoken.pipeline.settings.rehearsal import contradictions
from alphatoken.pipeline.settings.spelling import overrides
from alphatoken.pipeline.settings.trial import TrialSettings
from alphatoken.pipeline.settings.valuation import DIRECTED, ValuationSettings

STAGES = ("prepare", "anchor", "value", "mask")
LEVELS = ("warning", "info", "debug")
MOST_SEED = 2**32 - 1  # what is made of it, for the random masks of a trial as well, fits into the 64 bits of torch
NO_PAIRS = "valuation.schedule=rehearsal is not available for preference pairs: set valuation.schedule=static"


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
        found = (
            [] if self.dir.strip("/") or not self.dir else [f"run.dir={self.dir}: is the whole disk, give a directory"]
        )
        found += at_least("run.seed", self.seed, 0)
        if self.seed > MOST_SEED:
            found.append(f"run.seed={self.seed}: must be at most {MOST_SEED}")
        found += one_of("run.tracker", self.tracker, ("none", "mlflow", "wandb"))
        if self.overwrite is not None:
            found += one_of("run.overwrite", self.overwrite, STAGES)
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
    trial: TrialSettings = field(default_factory=TrialSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    debug: bool = option(False, "show tracebacks")
    log_level: str = option(
        "info", "warning: what went wrong and results alone | info: progress too | debug: also what the libraries say"
    )

    @property
    def validation_trial(self) -> Any:
        """data.validation_trial, of which trial.auto makes ``half`` where it is not set; None: no rows are kept for a trial."""
        own = self.data.validation_trial
        return HALF if own is None and self.trial.auto else own

    @property
    def objectives(self) -> tuple[str, ...]:
        """Directions beside adaptation and stability; a rehearsal, which is the paper's own loop, has none."""
        if self.valuation.rehearsed:
            return ()
        return (*map(objective_of, self.data.tasks), *[RETENTION] * (self.data.retention is not None))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of values/ beside the id."""
        own = self.valuation
        return value_columns(own.scores, own.exact, own.reference_loss, self.objectives, own.own_step)

    @property
    def anchor_layers(self) -> int | str:
        """How many decoder layers the anchor stage looks at, from the last, or all."""
        asked = self.anchor.unroll.asked_layers if self.anchor.unrolled else None
        return self.valuation.layers if asked is None else asked

    @property
    def top_layers(self) -> int | None:
        """How many decoder layers, from the last, some stage scores or trains, so that they lie on one device; None: all."""
        asked = self.anchor_layers if self.valuation.needs_directions else self.valuation.layers
        return None if isinstance(asked, str) else max(asked, self.valuation.layers)

    @property
    def lower_dtype(self) -> str:
        """model.lower_dtype with ``auto`` resolved where several devices say what it is."""
        asked = self.model.lower_dtype
        return "bfloat16" if asked == "auto" and self.cluster.devices_per_worker > 1 else asked

    @property
    def lower_inputs(self) -> dict[str, str]:
        """What numbers depend on beside model.dtype: the lower layers' own, where it is another, and which those are."""
        if self.lower_dtype == "auto":
            return {}
        return {"model.lower_dtype": f"{self.lower_dtype} below the last {self.top_layers or 'of all'} layers"}

    def snapshots(self, drift: str, checkpoints: int = 1) -> int:
        """How many points there are at which tokens are valued; ``drift``: the resolved one."""
        if self.anchor.unrolled and not self.valuation.looks_at_anchors:
            return 0
        return self.anchor.points(drift, checkpoints)

    @property
    def makes_fisher(self) -> bool:
        """Whether the anchor stage samples completions for a Fisher, so that prompts have to be held out."""
        if not self.valuation.needs_directions:
            return False
        if self.valuation.rehearsed and self.anchor.drift in ("auto", "none"):
            return self.valuation.rehearsal.stability_weight > 0
        return self.anchor.drift != "none" or self.anchor.precondition != "none"

    def problems(self) -> list[str]:
        """Every reason why the run cannot start, over all groups, one sentence each."""
        found = (
            one_of("log_level", self.log_level, LEVELS)
            + empty_texts(self)
            + self.run.problems()
            + self.model.problems()
            + self.data.problems()
        )
        mask, valuation = self.mask.problems(), self.valuation.problems()
        if self.valuation.needs_directions:
            found += self.anchor_problems(pairs=self.data.format == "preference")
        elif len(self.model.checkpoints) > 1:
            found.append(
                f"valuation.scores=[{','.join(self.valuation.scores)}] score at one model: give one model.policy, no list"
            )
        if self.mask.least_stable and self.anchor.drift == "none":
            found.append(
                f"mask.least_stable={self.mask.least_stable}: anchor.drift=none leaves no stability values: set anchor.drift "
                "to checkpoint or warmup"
            )
        if self.valuation.rehearsed:
            found += self._rehearsal_problems()
        found += valuation + mask + self.trial.problems() + self.cluster.problems() + self.plan.problems()
        return found + ([] if found else self._whole_model_problems())

    def _whole_model_problems(self) -> list[str]:
        """What trains in all layers, beside settings that lay the lower ones out otherwise."""
        own, several = self.model, self.cluster.devices_per_worker
        laid_out = [f"cluster.gpus_per_worker={several}"] * (several > 1)
        laid_out += [f"model.lower_dtype={own.lower_dtype}"] * (own.lower_dtype != "auto")
        laid_out += [f"model.offload={own.offload}"] * (own.offload != "none")
        if not laid_out:
            return []
        found = []
        if self.trial.train != "layers":
            found.append(f"trial.train={self.trial.train} trains in all layers: set trial.train=layers")
        if self.top_layers is None:
            found.append(
                f"{self.anchor.unroll.spelled_layers} trains all layers: set anchor.unroll.layers to a number of them"
            )
        return [f"{one}, or leave {' and '.join(laid_out)} out, which is for layers below" for one in found]

    def mask_problems(self, pairs: bool) -> list[str]:
        """Why the mask cannot be made from the values that these settings make; for commands that make both."""
        if self.mask.problems() or self.valuation.problems():
            return []  # said already
        there = self.columns
        mask = self.mask.resolved(pairs or self.valuation.rehearsed, self.anchor.drift, there)
        missing = [
            f"{reason}: set {' '.join(overrides(remedy))}"
            for reason, remedy in mask.missing(there, self.valuation.scores)
        ]
        return mask.unknown(there) + missing

    def anchor_problems(self, pairs: bool) -> list[str]:
        """Why the anchors cannot be made; ``pairs``: whether the data is of preference."""
        # A rehearsal makes its own drift, and weighs it by its own key.
        mask = self.mask.resolved(pairs, there=self.columns) if not self.valuation.problems() else self.mask
        weight = 0.0 if self.valuation.rehearsed else mask.stability_weight or 0.0
        return self.anchor.problems(weight, len(self.model.checkpoints)) + self._own_step_problems(pairs)

    def _own_step_problems(self, pairs: bool) -> list[str]:
        """What valuation.schedule=own_step and anchor.unroll.layers do not go together with."""
        found, own, layers = [], self.valuation, self.anchor_layers
        if own.own_step and not self.anchor.unrolled:
            found.append(
                "valuation.schedule=own_step values tokens at the steps of a simulated run: set anchor.direction=unrolled"
            )
        elif own.own_step and pairs:
            found.append(
                "valuation.schedule=own_step is not available for preference pairs: set valuation.schedule=static"
            )
        if layers != own.layers and (not own.own_step or own.looks_at_anchors) and not self.anchor.unroll.problems():
            other = f", or valuation.layers={layers}" if isinstance(layers, int) else ""
            plain = ",".join(score for score in own.scores if score not in DIRECTED) or "loss"
            found.append(
                f"{self.anchor.unroll.spelled_layers}: values at snapshots are of the {own.layers} layers of valuation.layers: set "
                f"valuation.schedule=own_step valuation.scores=[{plain}] valuation.exact=false{other}"
            )
        return found

    def _rehearsal_problems(self) -> list[str]:
        """What valuation.schedule=rehearsal does not go together with."""
        found = []
        if self.data.format == "preference":
            found.append(NO_PAIRS)
        if self.data.tasks:
            found.append(
                f"data.validation={{{', '.join(self.data.tasks)}}}: valuation.schedule=rehearsal has one validation set: give "
                "its rows as a list, or set valuation.schedule=static"
            )
        if len(self.model.checkpoints) > 1:
            found.append("valuation.schedule=rehearsal starts at one model: give one model.policy, no list")
        for key, value, only in (
            ("anchor.direction", self.anchor.direction, "gradient"),
            ("anchor.precondition", self.anchor.precondition, "none"),
            ("anchor.snapshots", self.anchor.snapshots, 1),
            ("anchor.snapshot_scale", self.anchor.snapshot_scale, "none"),
            ("mask.divide_by_gradient_norm", self.mask.divide_by_gradient_norm, False),
        ):
            if value != only:
                found.append(f"{key}={value}: valuation.schedule=rehearsal is the paper's own loop, with {key}={only}")
        found += contradictions(self.mask, self.valuation.rehearsal.decided())
        weight = self.valuation.rehearsal.stability_weight
        if self.anchor.drift == "none" and weight > 0:
            found.append(
                f"anchor.drift=none leaves no stability to weigh by valuation.rehearsal.stability_weight={weight}: set "
                "anchor.drift=auto, or that weight to 0"
            )
        if self.anchor.drift == "warmup":
            found.append("anchor.drift=warmup: valuation.schedule=rehearsal makes its own drift: set anchor.drift=auto")
        return found
