"""prepare: raw rows become tokenized shards.

In: data.train and data.validation in any of the usual shapes and file formats, and the policy's tokenizer. Out:
prepared/ (parts of training examples or pairs, validation.parquet, fisher.parquet) and quarantine/ with reasons.
Start with stage.py, the driver; inputs.py is what it depends on, worker.py what runs on the cluster. A row's way: sources
(files to rows) -> rows (which shape it has) -> tokenize (an Example) or pairs (a Pair, two Examples).
"""
