"""Object stores answer 500 and 503 now and then: an operation is tried again, a few times and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between the attempts, on top of the client's own
LASTING = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")  # will not pass
T = TypeVar("T")


def insist(attempt: Callable[[], T]) -> T:
    """The result of ``attempt``, made up to five times; raises its last OSError, and at once one that will not pass."""
    for pause in PAUSES:
        try:
            return attempt()
        except (FileNotFoundError, pa.ArrowInvalid):
            raise
        except OSError as error:
            if any(code in str(error) for code in LASTING):
                raise
            time.sleep(pause)
    return attempt()
