"""Worker logs where the driver can read them: logs/<stage>-<node>-<process>.log in the run directory.

Each worker writes its own file: what it is, every shard with its seconds, warnings of the libraries (those that come once
per process in the file of the stage that the process served first), and the traceback of whatever fails. Ray's own logs
stay where Ray keeps them.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.manifest import NAME as MANIFEST
from alphatoken.pipeline.run.storage import Storage

DIRECTORY = "logs"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def logged(stage: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """A worker's factory whose workers keep a log; its keyword arguments have to hold ``storage``."""
    return _Logged(stage, make)


class _Logged:
    """Called in the worker's process; a class, since it travels there."""

    def __init__(self, stage: str, make: Callable[..., Any]) -> None:
        self.stage, self.make = stage, make

    def __call__(self, *, storage: Storage, **arguments: Any) -> _LoggedWorker:
        _check_shared(storage)
        name = f"{DIRECTORY}/{self.stage}-{platform.node() or 'node'}-{os.getpid()}.log"
        log = _WorkerLog(storage, name)
        started = time.monotonic()
        log.logger.info("%s worker starts on %s, process %d", self.stage, platform.node(), os.getpid())
        try:
            worker = self.make(storage=storage, **arguments)
        except BaseException:
            log.logger.exception("cannot start")
            log.upload()
            raise
        log.logger.info("ready after %.1f s", time.monotonic() - started)
        log.upload()
        return _LoggedWorker(worker, log)


def _check_shared(storage: Storage) -> None:
    """Raises RunFailed where this node does not see the run directory: what is written here, the driver would never find."""
    if not storage.exists(MANIFEST):
        raise RunFailed(
            f"run.dir={storage.root} is not on node {platform.node() or 'node'}: give a directory that all nodes share, or the "
            "URI of an object store, and run the same command again"
        )


class _LoggedWorker:
    """A worker that notes every shard."""

    def __init__(self, worker: Callable[..., Any], log: _WorkerLog) -> None:
        self.worker, self.log = worker, log

    def __call__(self, payload: Any, advance: Callable[[int], None]) -> Any:
        what = getattr(payload, "part", None) or getattr(payload, "output", None) or "rows"
        started = time.monotonic()
        try:
            result = self.worker(payload, advance)
        except BaseException:
            self.log.logger.exception("%s failed after %.1f s", what, time.monotonic() - started)
            self.log.upload()
            raise
        self.log.logger.info("%s done in %.1f s", what, time.monotonic() - started)
        self.log.upload_in_its_time()
        return result


class _LogFile(logging.FileHandler):
    """A FileHandler that can be told from those of others."""


class _WorkerLog:
    """The log file of this process; an object store gets it anew with every ``upload``."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        if storage.local:
            path = Path(storage.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path = Path(os.environ.get("TMPDIR", "/tmp")) / f"alphatoken-{name.rpartition('/')[2]}"
        self.path, self.ready_at = path, 0.0
        handler = _LogFile(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter(FORMAT))
        self.logger = logging.getLogger("alphatoken")
        self.logger.setLevel(logging.INFO)
        logging.captureWarnings(True)
        for logger in (self.logger, logging.getLogger("py.warnings"), logging.getLogger("transformers")):
            for former in [h for h in logger.handlers if isinstance(h, _LogFile)]:
                logger.removeHandler(former)  # of the worker that this process held before
                former.close()
            logger.addHandler(handler)

    def upload(self) -> None:
        """Put the file where the run is, unless it is there already."""
        if not self.storage.local:
            started = time.monotonic()
            self.storage.write_bytes(self.name, self.path.read_bytes())
            now = time.monotonic()
            self.ready_at = now + 9 * (now - started)

    def upload_in_its_time(self) -> None:
        """As often as a tenth of the time allows: a rehearsal has shards of a second, and its log grows."""
        if time.monotonic() >= self.ready_at:
            self.upload()
