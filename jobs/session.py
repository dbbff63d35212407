"""What every stage is started with: settings, the run directory, the models' places, a cluster and a display."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from pipeline.settings import Settings
from pipeline.stages.failure import SettingsWrong
from pipeline.stages.manifest import Manifest
from pipeline.stages.progress import Progress
from pipeline.stages.storage import Storage


@dataclass(frozen=True, slots=True)
class Models:
    """Resolved model.policy and model.reference: a local directory or a hub id each."""

    policy: str
    reference: str


class Session:
    """One command on one run directory; use as a context manager."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        from pipeline.stages.shard_loop import Cluster

        self.settings, self.progress = settings, progress
        self.storage = Storage(settings.run.dir)
        self.manifest = Manifest(self.storage)
        self.cluster = Cluster(settings.cluster)
        self._models: Models | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.__exit__()

    @property
    def models(self) -> Models:
        """The models' places; fetches the embedded one on first use. Raises SettingsWrong for one that is not there."""
        if self._models is None:
            from pipeline.maths.models import adapter_base

            policy = self._place("model.policy", self.settings.model.policy)
            reference = self.settings.model.reference
            place = self._place("model.reference", reference) if reference else adapter_base(policy) or policy
            self._models = Models(policy, place)
        return self._models

    def _place(self, key: str, name: str) -> str:
        from pipeline.maths.models import ModelSource, UnreadableModel, load_config
        from pipeline.stages.example import example_model

        if name == "embedded":
            return str(example_model(self.progress.say))
        place = Path(name).expanduser()
        path = str(place.resolve()) if place.exists() else name
        try:
            load_config(
                ModelSource(path, self.settings.model.revision, trust_remote_code=self.settings.model.trust_remote_code)
            )
        except UnreadableModel as error:
            raise SettingsWrong(
                [f"{key}: {error}; give a directory with config.json and weights, or a hub id"]
            ) from error
        return path

    def with_data(self) -> Settings:
        """The settings with the embedded data's place filled in."""
        from pipeline.stages.example import example_data, example_pairs

        data = self.settings.data
        embedded = {"embedded": example_data, "embedded-preference": example_pairs}
        if isinstance(data.train, str) and data.train in embedded:
            data = replace(data, train=str(embedded[data.train](self.progress.say)))
        return replace(self.settings, data=data)
