"""anchor: the directions along which tokens are valued.

In: prepared/validation.parquet, fisher.parquet and training rows, the policy and the reference. Out: anchors/ with the
Fisher and, for every snapshot, the directions of adaptation and stability (and its weights after a warm-up).
Start with stage.py, the driver; inputs.py is what it depends on, worker.py what runs on the cluster; orders.py,
unrolled.py and tape.py make the directions of simulated runs. summing.py says who adds up what, sums.py how;
direction_files.py makes the files that values are taken along. tensors.py and tensor_file.py write and read safetensors,
coverage.py says how much of the model is scored.
"""
