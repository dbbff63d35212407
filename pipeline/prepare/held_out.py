"""Files of prepared/ that some runs have beside parts, validation and Fisher prompts; their counts are called NAME_rows."""

TRIAL = "trial"  # rows on which `trial` measures; of pairs, as pairs
RETENTION = "retention"  # rows of data.retention
PAIRS = "validation_pairs"  # validation rows as pairs, where no others are kept for a trial
