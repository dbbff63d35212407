"""plan: what a run would do, cost, skip or share, before it does.

In: settings, a sample of the data, the model's configuration, and run directories that are there. Out: nested values for
`alphatoken plan`; and, for run.share and sweeps, finished stages of one run directory in another.
Start with plan.py, which puts together sample.py (lengths), maths/costs.py (operations) and sizes.py (bytes); resume.py
compares with what has been done, share.py takes over what is equal.
"""
