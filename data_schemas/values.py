"""`values/`: the sidecar of token values. Same parts and same row order as `prepared/`.

A column means one thing, whatever the settings; one that was not asked for is absent. All lists are token-aligned: index
i speaks of token input_ids[i] as a PREDICTED token; 0.0 outside the response. Of preference pairs see preference.py.
"""

from collections.abc import Sequence

import pyarrow as pa

from alphatoken.data_schemas.version import versioned

# The Ghost Dot-Product along the directions. Higher is better: a positive value means that training on the token lowers
# the validation loss (adaptation) or moves the weights back toward the reference where its Fisher says it matters.
PATHS = ("_direct", "_causal")
COMPONENTS = ("adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal")

# valuation.scores -> its columns.
SCORES: dict[str, tuple[str, ...]] = {
    "paper": COMPONENTS,
    # u'F_t u along the adaptation direction: how much a step moves the token's prediction. Never negative.
    "information": ("information",),
    # Cross-entropy of the token under the policy, and entropy of the prediction before it, in nats.
    "loss": ("loss",),
    "entropy": ("entropy",),
    # sqrt(sum over scored maps of |d_p|^2 |h_p|^2) at the position p that predicts the token.
    "gradient_norm": ("gradient_norm",),
}

EXACT = ("adaptation_exact", "stability_exact")  # valuation.exact: of the token's own loss, signed as the components
UNROLLED = "_unrolled"  # valuation.schedule=own_step: the ending of its columns
REFERENCE_LOSS = "reference_loss"  # valuation.reference_loss: cross-entropy under the reference, in nats
SIGNED = (*COMPONENTS, *EXACT)


def is_signed(column: str) -> bool:
    """Whether a column speaks for or against a token: those of SIGNED, and those of every further objective."""
    return column in SIGNED or column.endswith((*PATHS, UNROLLED))


KEPT = "kept"


def value_columns(
    scores: Sequence[str],
    exact: bool = False,
    reference_loss: bool = False,
    objectives: Sequence[str] = (),
    unrolled: bool = False,
) -> tuple[str, ...]:
    """The columns of values/ beside the id, in their order; raises KeyError for an unknown score.

    ``objectives``: directions beside adaptation and stability: ``adaptation_<task>`` for a task's validation rows,
    ``retention``. With paper each has its two columns, with the meaning, unit and sign of COMPONENTS: above 0, learning the
    token lowers the loss on those rows. ``unrolled``: of adaptation, stability and the objectives also the value at the token's
    own steps of the simulated run (valuation.schedule=own_step): minus the derivative of the objective at the END of the run
    by the token's weight in the loss, all trained layers together; the mean over the orders of the rows.
    """
    for score in scores:
        SCORES[score]
    found = [column for score, columns in SCORES.items() if score in scores for column in columns]
    further = [f"{name}{path}" for name in objectives for path in PATHS] if "paper" in scores else []
    further += [f"{name}{UNROLLED}" for name in ("adaptation", "stability", *objectives)] if unrolled else []
    return (*found, *further, *(EXACT if exact else ()), *([REFERENCE_LOSS] if reference_loss else []))


def values_schema(columns: Sequence[str], rehearsed: bool = False) -> pa.Schema:
    """Schema of a supervised part of values with these columns (of ``value_columns``).

    ``rehearsed``: valuation.schedule=rehearsal, values as they were at the step when the token's batch had its turn, and
    in `kept` the decision: true where the value reached the threshold of its batch, false outside the response.
    """
    fields = [pa.field("id", pa.string(), nullable=False)]
    fields += [pa.field(name, pa.list_(pa.float32()), nullable=False) for name in columns]
    if rehearsed:
        fields.append(pa.field(KEPT, pa.list_(pa.bool_()), nullable=False))
    return versioned("values-sft-rehearsed" if rehearsed else "values-sft", 2, fields)
