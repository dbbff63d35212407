"""value: the scores of every response token.

In: prepared/, anchors/ and the policy. Out: values/, one part beside every prepared part; of pairs also reference/.
Start with stage.py, the driver. pairs.py and reference.py are for preference data, checkpoints.py for several policies,
rehearsal.py (with its rows and its worker) for the paper's closed loop, selection.py for scores that need no direction.
"""
