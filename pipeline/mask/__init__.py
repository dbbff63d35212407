"""mask: which response tokens a trainer learns from.

In: prepared/ and values/. Out: masks/<name>/, Parquet with labels, a card and a summary; no model and no torch. Start at
stage.py, the driver; inputs.py resolves the settings against what the values are of, passes.py goes over the rows for
scales and thresholds, worker.py decides and counts, supervised.py and pairs.py write.
"""
