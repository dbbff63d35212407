"""Ray: a list of shards goes in, one result per shard comes out, whatever dies meanwhile.

In: a class of workers with their arguments, the resources of one, shards and the payload of each. Out: calls of
``done(shard, result)`` in the driver.
Start with work.py, what is handed to workers and comes back, and choice.py, who they are: inline.py (this process, no
Ray) or cluster.py (a local Ray or one that is there), which makes the pools of pool.py; host.py is the process of a
worker, shard_loop.py hands out, retries and sets aside. token_batches.py: token sequences through a model;
worker_log.py: the workers' logs. No other folder of the library imports ray.
"""
