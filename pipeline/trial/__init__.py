"""trial: does a mask help on this model and this data? Short fine-tunes of the last layers on every mask, before the hours.

In: prepared/, masks/, the policy and the reference. Out: trial/, one file per finished fine-tune, results.parquet,
summary.json. Start at stage.py, the driver; inputs.py says what is tried on which rows, candidates.py which labels that
leaves, worker.py what runs on the cluster (hidden.py keeps what enters the last layers), completions.py what retention is
measured on, verdict.py what the numbers say, budget.py what they cost.
"""
