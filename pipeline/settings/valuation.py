"""What is scored and how."""

from dataclasses import dataclass, field

from alphatoken.pipeline.settings.option import at_least, auto_or_at_least, one_of, option
from alphatoken.pipeline.settings.rehearsal import RehearsalSettings

ESTIMATORS = ("auto", "ghost", "exact", "information")
METHODS = ("alphatoken", "excess_loss", "loss", "entropy", "random", "full")
NO_LOSS = ("random", "full")  # these methods leave the loss column at 0.0


@dataclass(frozen=True, slots=True)
class ValuationSettings:
    """Configuration group ``valuation``."""

    layers: int = option(3, "K: the last K decoder layers are scored")
    window: int = option(
        32, "W of estimator=ghost: how many later positions the causal path reaches; 0 leaves the causal path out"
    )
    estimator: str = option(
        "auto",
        "ghost (the paper's, by position) | exact (derivative of each token's own loss) | information (how much a step "
        "along the adaptation direction moves the token's prediction, whatever its label; stability as exact) | auto "
        "(information; ghost for pairs, for a rehearsal and for gradient_norm)",
    )
    tokens_per_batch: int | str = option("auto", "padded tokens per batch; auto: from the device's memory")
    method: str = option(
        "alphatoken",
        "alphatoken | excess_loss (policy's minus reference's loss, Rho-1) | loss (low loss first: against wrong "
        "tokens) | entropy (undecided tokens first) | random | full (keep everything); all but the first need no anchor",
    )
    gradient_norm: bool = option(
        False,
        "write a column gradient_norm as well: the norm of what the token's position adds to the gradient; with "
        "estimator=auto the values are those of ghost then",
    )
    schedule: str = option(
        "static",
        "static: values at the anchors | rehearsal: the paper's loop of value, threshold, masked step over the data, on "
        "the scored modules; what it keeps is the mask",
    )
    rehearsal: RehearsalSettings = field(
        default_factory=RehearsalSettings, metadata={"help": "the loop of valuation.schedule=rehearsal"}
    )
    beta: float = option(0.1, "preference data: beta of DPO, in s and omega")
    min_coverage: float = option(0.5, "smallest share of the scored layers' matrix parameters that must be scored")

    @property
    def needs_directions(self) -> bool:
        """Whether the method needs the anchor stage."""
        return self.method == "alphatoken"

    @property
    def rehearsed(self) -> bool:
        """Whether values come from a rehearsal."""
        return self.schedule == "rehearsal"

    def estimator_for(self, pairs: bool) -> str:
        """ghost | exact | information, with ``auto`` resolved; ``pairs``: whether the data is of preference.

        A mask that is made once has to hold for a whole training run: that is what `information` is for. A rehearsal
        is the paper's own loop, and of a pair only signed values say which branch a token speaks for.
        """
        if self.estimator != "auto":
            return self.estimator
        return "ghost" if pairs or self.rehearsed or self.gradient_norm else "information"

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = at_least("valuation.layers", self.layers, 1)
        found += at_least("valuation.window", self.window, 0)
        found += one_of("valuation.estimator", self.estimator, ESTIMATORS)
        found += auto_or_at_least("valuation.tokens_per_batch", self.tokens_per_batch, 1)
        found += one_of("valuation.method", self.method, METHODS)
        found += one_of("valuation.schedule", self.schedule, ("static", "rehearsal"))
        if self.rehearsed:
            found += self.rehearsal.problems()
            if self.method != "alphatoken":
                found.append(
                    f"valuation.schedule=rehearsal takes values of valuation.method=alphatoken, not {self.method}"
                )
        if self.gradient_norm and not self.needs_directions:
            found.append(f"valuation.gradient_norm=true: valuation.method={self.method} forms no gradient")
        elif self.gradient_norm and self.estimator_for(pairs=False) != "ghost":
            found.append(
                f"valuation.gradient_norm=true: valuation.estimator={self.estimator} forms no gradient, set valuation.estimator=ghost"
            )
        if not self.beta > 0:
            found.append(f"valuation.beta={self.beta}: must be above 0")
        if not 0 <= self.min_coverage <= 1:
            found.append(f"valuation.min_coverage={self.min_coverage}: must be between 0 and 1")
        return found
