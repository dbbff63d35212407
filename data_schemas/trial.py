"""`trial/results.parquet`: one row per short fine-tune."""

import pyarrow as pa

from alphatoken.data_schemas.version import versioned

TRIAL_RESULTS = versioned(
    "trial-results",
    2,
    [
        pa.field("candidate", pa.string(), nullable=False),
        # untouched | full | first (full without the first token of each response) | random | mask
        pa.field("kind", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),  # of the order of the rows, and of a random mask
        pa.field("kept_fraction", pa.float64(), nullable=False),  # of the sample's response tokens
        pa.field("trained_tokens", pa.int64(), nullable=False),  # over all steps
        # On held-out rows: mean cross-entropy, nats per token; of pairs mean -log sigmoid(s), nats per pair, where s is the margin
        # over the reference in all response tokens. Null where the fine-tune failed.
        pa.field("adaptation", pa.float64()),
        # Mean KL divergence of the reference from the model on the reference's own completions, nats per token.
        pa.field("retention", pa.float64()),
        # Mean cross-entropy on the rows of data.retention, nats per token; null where there are none.
        pa.field("retention_loss", pa.float64()),
        # Of held-out pairs: mean s, nats, and the share of pairs with s above 0 (at 0: one half). Null for supervised data.
        pa.field("margin", pa.float64()),
        pa.field("reward_accuracy", pa.float64()),
        # Sum of the cross-entropies and number of tokens of every held-out row, in one order; of pairs the loss of each, and 1.
        pa.field("row_losses", pa.list_(pa.float64()), nullable=False),
        pa.field("row_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("failed", pa.string()),  # why it has no numbers
    ],
)
