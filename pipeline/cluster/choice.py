"""Where the work of a run is done: in this process, or on Ray, which is imported for that alone."""

from __future__ import annotations

from collections.abc import Callable

from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Workers
from alphatoken.pipeline.settings import ClusterSettings
from alphatoken.pipeline.settings.cluster import INLINE


def is_inline(settings: ClusterSettings, tokens: Callable[[], int | None]) -> bool:
    """Whether there is no need of Ray: cluster.address=inline, or null for few tokens and no more than one worker.

    ``tokens``: of the data, asked for where they decide; None where they are not known.
    """
    if settings.address is not None or not settings.inline_below:
        return settings.address == INLINE
    if settings.workers not in ("auto", 1) or not isinstance(settings.gpus_per_worker, str):
        return False
    found = tokens()
    return found is not None and found < settings.inline_below


def make_cluster(settings: ClusterSettings, inline: bool, debug: bool, progress: Progress) -> Workers:
    """The cluster of a run; one that has an ``__exit__`` to be called at its end."""
    if inline:
        from alphatoken.pipeline.cluster.inline import InlineCluster

        return InlineCluster(settings, debug)
    from alphatoken.pipeline.cluster.cluster import Cluster

    return Cluster(settings, debug, progress)
