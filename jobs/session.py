"""One command on one run directory: makes the `Run` that its stages are given, holds the lock, keeps log and tracker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from alphatoken.pipeline.cluster.choice import is_inline, make_cluster
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.lock import RunLock
from alphatoken.pipeline.run.manifest import NAME, Manifest
from alphatoken.pipeline.run.presence import require_run
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Models, Run, Workers
from alphatoken.pipeline.run.run_log import RunLog
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.run.tracker import open_tracker
from alphatoken.pipeline.settings import Settings

if TYPE_CHECKING:
    from alphatoken.pipeline.plan.shards import Extent  # with torch


class Session:
    """One command on one run directory; use as a context manager."""

    def __init__(self, settings: Settings, progress: Progress, overrides: Sequence[str] = ()) -> None:
        """``overrides``: what of the settings was typed."""
        self.settings, self.progress, self.overrides = settings, progress, overrides
        self.storage = Storage(settings.run.dir)
        self._open(Manifest(self.storage))
        self.tracker = open_tracker(settings.run.tracker, settings.run.dir, leaves(asdict(settings)))
        self.log = RunLog(self.storage, self.tracker)
        progress.log = self.log
        self._cluster: Workers | None = None
        self._models: Models | None = None
        self._extent: Extent | None = None  # of the data, where it is asked for
        self._lock: RunLock | None = None

    def __enter__(self) -> Session:
        return self

    def require_run(self) -> None:
        """Raise RunFailed where run.dir holds no run, with those that lie beside it."""
        require_run(self.storage, self.settings.run.dir, "run.dir=")

    def claim(self) -> None:
        """Become the only one that writes to the run directory; for every command that does, before it starts.

        Raises RunFailed while another driver lives.
        """
        if self.storage.local and os.path.isfile(self.storage.root):
            raise SettingsWrong([f"run.dir={self.settings.run.dir}: is a file: give a directory"])
        lock = RunLock(self.storage)
        lock.__enter__()
        self._lock = lock  # not before it is held: the end of a session cleans up after its own workers alone
        self.storage.sweep()
        self._open(Manifest(self.storage, lock.check))  # as the driver before has left it
        self.manifest.tidy()

    def share(self, finished: Sequence[Storage] = ()) -> None:
        """Take over what is equal upstream in run.share and in the run directories ``finished``.

        Raises SettingsWrong for a run.share that is no run directory.
        """
        named = self.settings.run.share
        own = [Storage(named)] if named else []
        if own and self.settings.run.overwrite:
            self.progress.say("run.share: nothing is taken over, since run.overwrite asks for work to be done anew")
            own = []
        if own and not own[0].exists(NAME):
            raise SettingsWrong([f"run.share={named}: there is no {NAME} in it, give the directory of a run"])
        donors = [storage for storage in (*own, *finished) if storage.root != self.storage.root]
        if not donors:
            return
        from alphatoken.pipeline.plan.share import share_upstream

        for taken in share_upstream(self.run_with_data(), donors):
            self.progress.say(f"shared: {taken}")

    def _open(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.manifest.resolved = asdict(self.settings)
        self.told = {name for name in manifest.content["stages"] if manifest.done(name)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tell()
        if self.tracker:
            self.tracker.close(failed=kind is not None)
        try:
            if self._cluster:
                self._cluster.__exit__()
            if self._lock is not None:
                self.storage.sweep()  # after workers that were killed or hung
        finally:
            if self._lock is not None:
                self._lock.__exit__()

    def change(self, settings: Settings, overrides: Sequence[str]) -> None:
        """Go on with other settings of the same run directory, as a sweep does from mask to mask."""
        self.settings, self.overrides = settings, overrides
        self.manifest.resolved = asdict(settings)

    def tell(self) -> None:
        """Note the stages that have been finished since in metrics.jsonl."""
        for name, record in self.manifest.content["stages"].items():
            if name not in self.told and self.manifest.done(name):
                self.told.add(name)
                self.log.event("stage", name, seconds=record["seconds"], **record["counts"])
        self.log.flush()

    @property
    def run(self) -> Run:
        """What a stage is given, with the settings of now."""
        return Run(self.storage, self.manifest, self.settings, self.progress, self._find_models, self._join_cluster)

    def run_with_data(self) -> Run:
        """The same with what is left open of the data filled in, for what reads raw data: the place of the embedded data,
        which is fetched on first use, and data.shard_examples.
        """
        from alphatoken.pipeline.plan.shards import begun_with
        from alphatoken.pipeline.prepare.example import HELD_OUT, example_data, example_pairs

        data = self.settings.data
        embedded = {"embedded": example_data, "embedded-preference": example_pairs}
        if isinstance(data.train, str) and data.train in embedded:
            place = str(embedded[data.train](self.progress.say))
            data = replace(data, train=place, validation=HELD_OUT if data.validation == "auto" else data.validation)
        run = replace(self.run, settings=replace(self.settings, data=data))
        if data.shard_examples != "auto":
            return run
        found = begun_with(run) or self._sampled(run).shard_examples
        return replace(run, settings=replace(run.settings, data=replace(data, shard_examples=found)))

    def _sampled(self, run: Run) -> Extent:
        """The extent of the data, by a sample that is taken once."""
        if self._extent is None:
            from alphatoken.pipeline.plan.shards import extent

            self._extent = extent(run)
        return self._extent

    def _join_cluster(self) -> Workers:
        """The cluster of cluster.address; Ray is imported on first use, so that masks and small data do without."""
        if self._cluster is None:
            own = self.settings.cluster
            inline = is_inline(own, self._tokens)
            if inline and own.address is None:
                self.progress.say(
                    f"one worker in this process, without Ray: fewer than cluster.inline_below={own.inline_below:,} tokens"
                )
            self._cluster = make_cluster(own, inline, self.settings.debug, self.progress)
        return self._cluster

    def _tokens(self) -> int | None:
        """Of the prepared data, else about as many as a sample says."""
        if self.manifest.done("prepare"):
            return self.manifest.stage("prepare")["counts"].get("tokens")
        return self._sampled(self.run_with_data()).tokens

    def end_workers(self) -> None:
        """End worker processes that wait for another stage of this session, so that others get their CPUs."""
        if self._cluster is not None:
            self._cluster.end_idle()

    def _find_models(self) -> Models:
        """The models' places; fetches the embedded one on first use. Raises SettingsWrong for one that is not there."""
        if self._models is None:
            from alphatoken.pipeline.maths.model_source import ModelSource, adapter_base
            from alphatoken.pipeline.run.remote import here

            places = tuple(self._place("model.policy", one) for one in self.settings.model.checkpoints)
            reference = self.settings.model.reference
            if reference:
                place = self._place("model.reference", reference)
            else:
                place = adapter_base(here(ModelSource(places[0]), weights=False).path) or places[0]
            models = Models(places, place)
            if len(places) > 1:
                from alphatoken.pipeline.value.checkpoints import check_checkpoints

                check_checkpoints(self.settings, models)
            self._models = models
        return self._models

    def _place(self, key: str, name: str) -> str:
        from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_config
        from alphatoken.pipeline.prepare.example import example_model
        from alphatoken.pipeline.run.remote import Unreachable, here

        if name == "embedded":
            return str(example_model(self.progress.say))
        place = Path(name.removeprefix("file://")).expanduser()
        if name.startswith(("/", "~", ".", "file://")) and not place.exists():  # no hub id is written so
            raise SettingsWrong(
                [f"{key}={name}: there is no such directory; give one with config.json and weights, or a hub id"]
            )
        path = str(place.resolve()) if place.exists() else name
        own = self.settings.model
        try:
            source = ModelSource(path, own.revision, trust_remote_code=own.trust_remote_code)
            load_config(here(source, weights=False))
        except (UnreadableModel, Unreachable) as error:
            raise SettingsWrong(
                [f"{key}: {error}; give a directory with config.json and weights, or a hub id"]
            ) from error
        return path


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted keys."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found.update(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
