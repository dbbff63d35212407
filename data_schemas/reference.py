"""`reference/`: a pass of the reference model. Same parts and same row order as `prepared/`."""

import pyarrow as pa

from alphatoken.data_schemas.version import versioned

# Log-probabilities (nats, at most 0) of the response tokens under the reference model; 0.0 outside the response.
REFERENCE = versioned(
    "reference-sft",
    1,
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("logps", pa.list_(pa.float32()), nullable=False),
    ],
)
