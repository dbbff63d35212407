"""Where the work runs."""

from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.option import at_least, auto_or_at_least, option

INLINE = "inline"  # of cluster.address


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Configuration group ``cluster``."""

    address: str | None = option(
        None,
        "inline: in this process, without Ray, one worker | null: as inline where the data is below cluster.inline_below, else a "
        "local Ray | auto, ray:// or host:port: join that one",
    )
    inline_below: int = option(
        50_000, "tokens of the data below which cluster.address=null needs no Ray; 0: always Ray"
    )
    dashboard: str | None = option(None, "the job API's address, for `submit`")
    workers: Any = option(
        "auto",
        "model workers; auto: one per device | a number | {min: 1, max: 64}: as many as there is room for, now and as nodes join and "
        "leave while a stage runs; it waits for min",
    )
    gpus_per_worker: int | float | str = option(
        "auto",
        "GPUs per worker; auto: 1 where the cluster has any, else 0; a part of one is shared; above 1, a whole number: the lower "
        "layers are spread over them, what is scored lies on the last",
    )
    cpus_per_worker: int | str = option("auto", "CPU threads per worker; part of what makes results reproducible")
    shard_timeout: float = option(3600.0, "seconds without progress after which a worker is taken for hung")

    @property
    def devices_per_worker(self) -> int:
        """Over how many devices a worker spreads its model; 1 where they are shared or there is no GPU."""
        return 1 if isinstance(self.gpus_per_worker, str) else max(1, int(self.gpus_per_worker))

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = self._about_workers()
        found += at_least("cluster.inline_below", self.inline_below, 0)
        if self.address == INLINE and self.workers not in ("auto", 1):
            found.append(
                f"cluster.workers={self.workers}: cluster.address=inline has one worker: leave one of them out"
            )
        found += auto_or_at_least("cluster.cpus_per_worker", self.cpus_per_worker, 1)
        if isinstance(self.gpus_per_worker, str):
            found += auto_or_at_least("cluster.gpus_per_worker", self.gpus_per_worker, 0)
        elif self.gpus_per_worker < 0:
            found.append(f"cluster.gpus_per_worker={self.gpus_per_worker}: must be at least 0")
        elif self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            found.append(
                f"cluster.gpus_per_worker={self.gpus_per_worker}: above 1 it must be a whole number, such as "
                f"{round(self.gpus_per_worker)}"
            )
        if not self.shard_timeout > 0:
            found.append(f"cluster.shard_timeout={self.shard_timeout}: must be above 0")
        return found

    def _about_workers(self) -> list[str]:
        own = self.workers
        if not isinstance(own, dict):
            if not isinstance(own, int | str) or isinstance(own, bool):
                return [f"cluster.workers={own}: must be auto, a whole number or {{min: 1, max: 64}}"]
            return auto_or_at_least("cluster.workers", own, 1)
        bounds = [own.get("min"), own.get("max")]
        if set(own) != {"min", "max"} or not all(isinstance(one, int) and one >= 1 for one in bounds):
            return [f"cluster.workers={own}: must be {{min: 1, max: 64}} with two whole numbers, each at least 1"]
        return [] if own["min"] <= own["max"] else [f"cluster.workers={own}: min is above max"]

    @property
    def most_workers(self) -> int | None:
        """How many are asked for at most; None: as many as there are devices."""
        if isinstance(self.workers, dict):
            return int(self.workers["max"])
        return self.workers if isinstance(self.workers, int) else None

    @property
    def least_workers(self) -> int | None:
        """Of a range its lower end; None: the number is fixed when a stage begins."""
        return int(self.workers["min"]) if isinstance(self.workers, dict) else None
