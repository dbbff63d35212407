"""What is scored and how."""

from dataclasses import dataclass, field

from alphatoken.data_schemas import SCORES, value_columns
from alphatoken.pipeline.settings.option import at_least, auto_or_at_least, one_of, option
from alphatoken.pipeline.settings.rehearsal import RehearsalSettings

DIRECTED = ("paper", "information")  # scores that look at the directions


@dataclass(frozen=True, slots=True)
class ValuationSettings:
    """Configuration group ``valuation``."""

    layers: int = option(3, "K: the last K decoder layers are scored")
    window: int = option(
        32, "W of the paper's columns: how many later positions the causal path reaches; 0 leaves the causal path out"
    )
    scores: list[str] = option(
        list(SCORES),
        "what values/ holds, all from one pass: paper (adaptation and stability, each direct and causal) | information (how "
        "much a step along the adaptation direction moves the token's prediction, whatever its label) | loss | entropy | "
        "gradient_norm; leave out what is not to be paid for; without paper, information and exact there is no anchor",
    )
    exact: bool = option(
        False,
        "the columns adaptation_exact and stability_exact as well: the derivative of each token's own loss along each direction",
    )
    reference_loss: bool = option(
        False, "the column reference_loss as well, by a pass of model.reference; excess loss follows from it"
    )
    tokens_per_batch: int | str = option("auto", "padded tokens per batch; auto: from the device's memory")
    schedule: str = option(
        "static",
        "static: values at the anchors | own_step: with anchor.direction=unrolled, the columns adaptation_unrolled, ... as "
        "well: each token at the steps of the simulated run that train on it, which has to train on all rows | rehearsal: "
        "the paper's loop of value, threshold, masked step over the data, on the scored modules; what it keeps is the mask",
    )
    rehearsal: RehearsalSettings = field(
        default_factory=RehearsalSettings, metadata={"help": "the loop of valuation.schedule=rehearsal"}
    )
    beta: float = option(0.1, "preference data: beta of DPO, in s and omega")
    min_coverage: float = option(0.5, "smallest share of the scored layers' matrix parameters that must be scored")

    @property
    def looks_at_anchors(self) -> bool:
        """Whether any score looks at the directions of the anchor stage."""
        return self.exact or any(score in DIRECTED for score in self.scores)

    @property
    def needs_directions(self) -> bool:
        """Whether the anchor stage is needed."""
        return self.looks_at_anchors or self.own_step

    @property
    def own_step(self) -> bool:
        """Whether values come from the sweep back over the simulated run as well."""
        return self.schedule == "own_step"

    @property
    def rehearsed(self) -> bool:
        """Whether values come from a rehearsal."""
        return self.schedule == "rehearsal"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of values/ beside the id."""
        return value_columns(self.scores, self.exact, self.reference_loss)

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = at_least("valuation.layers", self.layers, 1)
        found += at_least("valuation.window", self.window, 0)
        for score in self.scores:
            found += one_of("valuation.scores", score, tuple(SCORES))
        found += auto_or_at_least("valuation.tokens_per_batch", self.tokens_per_batch, 1)
        found += one_of("valuation.schedule", self.schedule, ("static", "own_step", "rehearsal"))
        if self.own_step and not self.scores:
            found.append("valuation.scores=[]: with valuation.schedule=own_step leave at least valuation.scores=[loss]")
        if self.rehearsed:
            found += self.rehearsal.problems()
            if "paper" not in self.scores:
                found.append("valuation.schedule=rehearsal decides by the paper's value: add paper to valuation.scores")
            if self.reference_loss:
                found.append("valuation.reference_loss=true: a rehearsal has none, set valuation.schedule=static")
        if not self.beta > 0:
            found.append(f"valuation.beta={self.beta}: must be above 0")
        if not 0 <= self.min_coverage <= 1:
            found.append(f"valuation.min_coverage={self.min_coverage}: must be between 0 and 1")
        return found
