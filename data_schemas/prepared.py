"""`prepared/`: tokenized examples. Lists are unpadded and token-aligned."""

import pyarrow as pa

from alphatoken.data_schemas.version import versioned

PREPARED = versioned(
    "prepared-sft",
    1,
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        # labels[i] is input_ids[i] where token i belongs to the response, -100 elsewhere and always at index 0.
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
        # "<file>:<row number>" of the row that the example was made from.
        pa.field("source", pa.string(), nullable=False),
    ],
)
