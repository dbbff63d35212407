"""A client of a Ray cluster's job API, and what is said where it refuses."""

from __future__ import annotations

import logging
import os
from typing import Any

from alphatoken.pipeline.cluster.auth import about_token
from alphatoken.pipeline.run.failure import RunFailed, first_line


def connect(dashboard: str | None) -> Any:
    """A client of the job API at cluster.dashboard, else at $RAY_API_SERVER_ADDRESS or the cluster running here.

    Raises RunFailed where there is none, and where it wants a token that was not given.
    """
    from ray.job_submission import JobSubmissionClient

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(dashboard)
    except Exception as error:  # requests, Ray and aiohttp raise types of their own
        where = dashboard or "the Ray cluster of this machine"
        if missing := about_token(str(error)):
            raise RunFailed(f"cluster.dashboard: {where} {missing}") from error
        raise RunFailed(
            f"cluster.dashboard: no job API at {where}: {first_line(error)}; give its address, such as "
            "cluster.dashboard=http://head:8265"
        ) from error
