"""One driver at a time on a run directory, by claims that any file system or object store can hold.

Every driver writes a claim of its own below ``.lock`` and then lists all of them. Whoever sees another live claim goes
away. Two that come at once both see each other, since whichever lists last lists both; so at most one stays. That needs
a listing that shows what was written before it, which local disks and S3 give, and neither renames nor locks of the
file system. The owner renews its claim; a claim that was not renewed for LEASE_SECONDS is of a dead owner. Ages are
differences between times of the store's own clock. On the machine of the owner its death is seen at once.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import LOCK, Storage

DIRECTORY = LOCK
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0
ROUNDS = 8  # of drivers that start at the same moment and step back


class RunLock:
    """The right to write to a run directory; use as a context manager. Raises RunFailed while another driver lives."""

    def __init__(self, storage: Storage, renew: float = RENEW_SECONDS, lease: float = LEASE_SECONDS) -> None:
        self.storage, self.renew, self.lease = storage, renew, lease
        self.name = f"{DIRECTORY}/{uuid.uuid4().hex}.json"
        self.claim: dict[str, Any] = {"holds": False, **_this_process()}
        self._stop = threading.Event()
        self._renewed = _now()
        self._thread: threading.Thread | None = None
        self._made_root = False  # and so takes it away where nothing was put into it

    def __enter__(self) -> RunLock:
        self._made_root = not self.storage.exists("")
        for _ in range(ROUNDS):
            self._write()
            try:
                others = self._living()
            except BaseException:
                self._withdraw()
                raise
            if not others:
                self.claim["holds"] = True
                self._write()
                self._thread = threading.Thread(target=self._keep_alive, daemon=True, name="run lock")
                self._thread.start()
                return self
            self._withdraw()
            if any(claim["holds"] for claim in others):
                break
            time.sleep(random.uniform(0.1, 1.0))  # not the run's seed: drivers must not step back in step
        other = next((claim for claim in others if claim["holds"]), others[0])
        raise RunFailed(
            f"{self.storage.root} is in use by another alphatoken (process {other['pid']} on {other['host']}): wait for "
            "it, stop it, or choose another run.dir"
        )

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=self.renew)
        self._withdraw()

    def check(self) -> None:
        """Raises RunFailed when the claim could not be renewed in time, so that another driver may have taken over."""
        if _now() - self._renewed > self.lease:
            raise RunFailed(
                f"the claim on {self.storage.root} could not be renewed for {self.lease:g} s, so another alphatoken may "
                "have taken over: run the same command again"
            )

    def _write(self) -> None:
        for last in (False, False, True):
            try:
                self.storage.write_json(self.name, self.claim)
                break
            except FileNotFoundError:  # another driver goes and takes the empty directory away
                if last:
                    raise
        self._renewed = _now()

    def _withdraw(self) -> None:
        with suppress(OSError):  # a claim that stays is taken for dead, since its process is
            self.storage.remove(self.name)
            self.storage.remove_if_empty(DIRECTORY)
            if self._made_root:
                self.storage.remove_if_empty("")  # a run that was refused before it began leaves nothing

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.renew):
            with suppress(OSError):
                if not self.storage.exists(self.name):
                    self._renewed = float("-inf")  # taken for dead, as after a long suspension
                    return
                self._write()

    def _living(self) -> list[dict[str, Any]]:
        """The claims of other live drivers; removes those of dead ones.

        Waits for a claim of another machine, which is either renewed or runs out.
        """
        written = self._claims()
        now = written.get(self.name, 0.0)
        found = []
        for name in sorted(written.keys() - {self.name}):
            claim = self._read(name)
            if claim is None:
                continue
            alive = _lives_here(claim)
            if alive is None:
                alive = now - written[name] < self.lease and (not claim["holds"] or self._is_renewed(name, claim))
            if alive:
                found.append(claim)
            else:
                self.storage.remove(name)
        return found

    def _claims(self) -> dict[str, float]:
        """Name -> when it was last written, without files that are just being written."""
        return {n: at for n, at in self.storage.modified(DIRECTORY).items() if not n.startswith(f"{DIRECTORY}/.")}

    def _is_renewed(self, name: str, claim: dict[str, Any]) -> bool:
        """Whether the owner, on another machine, renews its claim; takes up to a lease for one that does not."""
        before = self._claims().get(name)
        deadline = _now() + self.lease
        while _now() < deadline:
            time.sleep(min(1.0, self.renew / 2))
            self._write()  # one's own claim must not run out meanwhile
            after = self._claims().get(name)
            if after is None:
                return False
            if after != before:
                return True
        return False

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            claim = self.storage.read_json(name)
            return {"host": str(claim["host"]), "pid": int(claim["pid"]), "holds": bool(claim["holds"]), **claim}
        except FileNotFoundError:
            return None  # its owner has just gone
        except (ValueError, KeyError, TypeError) as error:
            raise RunFailed(f"{self.storage.path(name)} is not a claim of alphatoken: remove it") from error


def _now() -> float:
    """Seconds that also pass while the machine sleeps, where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str | None:
    """What process numbers are unique in: this boot of this machine, and the container's own numbering."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks, so that a number that is used again is not taken for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lives_here(claim: dict[str, Any]) -> bool | None:
    """Whether the owner of a claim lives; None where it cannot be told from this machine."""
    if claim.get("machine") is None or claim["machine"] != _machine():
        return None
    return claim.get("started") is not None and _started(claim["pid"]) == claim["started"]
