"""mask: from values to labels that a trainer reads. No model, no Ray, no torch.

In: prepared/ and values/, read side by side some rows at a time, and the keys of mask. Out: masks/<name>/ with the
masked data set, a README for its readers and summary.json.
Start with stage.py, the driver; paired_rows.py reads, thresholds.py and soft_weights.py decide, summary.py counts, card.py
describes, comparison.py sets masks side by side. pairs.py writes both branches of preference data.
"""
