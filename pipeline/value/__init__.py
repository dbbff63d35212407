"""value: columns of numbers for every response token.

In: prepared/, and anchors/ where a score looks at a direction. Out: values/, part by part as prepared/, and reference/.
Start at stage.py, the driver; inputs.py says what values/ depend on, worker.py what a worker does with a shard. kinds.py
holds what differs between supervised data and pairs, scoring.py where columns come from, checkpoints.py several
checkpoints, rehearsal*.py the paper's loop over the data.
"""
