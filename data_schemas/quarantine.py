"""`quarantine/`: every input row that was not used, with the reason and the row itself."""

import pyarrow as pa

from alphatoken.data_schemas.version import versioned

QUARANTINE = versioned(
    "quarantine",
    1,
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # counted from 0 within the file
        pa.field("reason", pa.string(), nullable=False),  # "<code>: <sentence>"
        pa.field("raw", pa.string(), nullable=False),  # the raw row as JSON
    ],
)
