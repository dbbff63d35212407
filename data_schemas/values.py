"""`values/`: the sidecar of token values. Same parts and same row order as `prepared/`."""

import pyarrow as pa
from alphatoken.data_schemas.version import versioned

# Higher is better in every component: a positive value means that training on the token lowers the validation loss
# (adaptation) or moves the weights back toward the reference where its Fisher says it matters (stability). Of the
# estimator `information`, adaptation is how much the token's prediction moves, never negative, and no causal path is known.
COMPONENTS = ("adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal")

GRADIENT_NORM = "gradient_norm"


def values_schema(gradient_norm: bool = False) -> pa.Schema:
    """Schema of a supervised part of values; ``gradient_norm``: with the optional column of that name."""
    return versioned(
        "values-sft",
        1,
        [
            pa.field("id", pa.string(), nullable=False),
            # Index i speaks of token input_ids[i] as a PREDICTED token; 0.0 outside the response.
            *[pa.field(name, pa.list_(pa.float32()), nullable=False) for name in COMPONENTS],
            # Cross-entropy of the token under the policy, in nats.
            pa.field("loss", pa.list_(pa.float32()), nullable=False),
            # sqrt(sum over scored maps of |d_p|^2 |h_p|^2) at the position p that predicts the token: the Frobenius
            # norm of what that position adds to the gradient, as in the direct components (without attention's e_p).
            *[pa.field(GRADIENT_NORM, pa.list_(pa.float32()), nullable=False)] * gradient_norm,
        ],
    )


VALUES = values_schema()

KEPT = "kept"

# valuation.schedule=rehearsal: values as they were at the step when the token's batch had its turn, and the decision.
REHEARSED_VALUES = versioned(
    "values-sft-rehearsed",
    1,
    # True where the value reached the threshold of its batch; False outside the response.
    [*VALUES, pa.field(KEPT, pa.list_(pa.bool_()), nullable=False)],
)
