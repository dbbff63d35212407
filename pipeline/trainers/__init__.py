"""What trainers are given, and what they make of it.

In: masks/<name>/ of a run. Out: the same rows in the shapes that other trainers read (formats.py and the writers beside
it), and a verdict on a batch that a trainer's collator made (batch_file.py reads it, batch_check.py judges). No model.
"""
