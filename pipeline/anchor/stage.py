"""anchor: the reference's Fisher, the drift, the validation gradient, and from them the two directions per snapshot.

Sums are taken over a fixed partition of the examples that does not depend on the number of workers, each part is
written as one file, and workers add the files up: the same bytes however many workers there were. See summing.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alphatoken.data_schemas import PREFERENCE_PREPARED, PREPARED
from alphatoken.pipeline.anchor import coverage as coverage_report
from alphatoken.pipeline.anchor.inputs import anchor_inputs, drift_of, fisher_inputs
from alphatoken.pipeline.anchor.loading import check_devices
from alphatoken.pipeline.anchor.objectives import rows_of_objectives, shares_of_adaptation
from alphatoken.pipeline.anchor.orders import check_examples, check_validation, unroll_orders
from alphatoken.pipeline.anchor.own_step import PLACE, check_covered
from alphatoken.pipeline.anchor.places import FACTORS, FISHER, PARTIAL, POLICY, REFERENCE, made
from alphatoken.pipeline.anchor.summing import Sums
from alphatoken.pipeline.anchor.sums import SumFile, Term
from alphatoken.pipeline.anchor.tensor_file import TensorFile
from alphatoken.pipeline.anchor.tensors import carried, counts_of, fingerprint_of, read_metadata
from alphatoken.pipeline.anchor.worker import NO_ROWS, AnchorTask, AnchorWorker
from alphatoken.pipeline.cluster.work import Pool, Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.decoder import Coverage
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare.draw import drawn_rows
from alphatoken.pipeline.prepare.reader import prepared_rows, sequences_of
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings.objectives import TASK


def make_anchors(run: Run) -> None:
    """Write anchors/, unless done already. Raises SettingsWrong and RunFailed."""
    started = time.monotonic()
    models, storage, manifest = run.models, run.storage, run.manifest
    prepared = manifest.require("prepare", "anchor")
    if wrong := run.settings.anchor_problems(manifest.pairs):  # only now is it known whether the data is of pairs
        raise SettingsWrong(wrong)
    settings = run.settings
    check_devices(run)
    if not manifest.done("anchor"):  # before the manifest takes down what nothing can be made with
        coverage_report.refuse_unscored(run)
    drift = drift_of(settings, models)
    inputs = anchor_inputs(settings, models, prepared["inputs"], drift)
    configuration = {"model": settings.model, "anchor": settings.anchor}
    fingerprint = manifest.begin("anchor", inputs, configuration, run.models.about())
    own_weights = settings.anchor.moves(drift)
    orders = settings.anchor.unroll.orders if settings.valuation.own_step else 0
    kinds = ("adaptation", "stability", *settings.objectives, *["policy"] * own_weights)
    if manifest.done("anchor") and not _missing(storage, manifest.stage("anchor"), kinds, orders):
        storage.remove(PARTIAL)  # where the run was killed before it came to that
        run.progress.say("anchor: done already")
        return
    if settings.anchor.unrolled:  # before a worker starts
        for name, rows in rows_of_objectives(run).items():
            check_validation(len(rows), name)
        unroll = settings.anchor.unroll
        check_examples(min(prepared["counts"]["train_rows"], unroll.examples), unroll.batch_size)
        if settings.valuation.own_step:
            check_covered(prepared["counts"]["train_rows"], settings.anchor.unroll)
    counts = _Anchor(run, fingerprint, drift).make()
    manifest.finish("anchor", time.monotonic() - started, drift=drift, **counts)
    storage.remove(PARTIAL)


def _missing(storage: Storage, record: dict[str, Any], kinds: Sequence[str], orders: int) -> bool:
    """Whether a file of the finished stage is gone or damaged; ``kinds``: the files of every snapshot; ``orders``: how many
    have values at the tokens' own steps."""
    expected = {}
    if "fisher" in record["counts"]:
        expected[FISHER] = digest(fisher_inputs(record["inputs"]))
    for order in range(orders):
        expected[PLACE.format(order=order)] = record["fingerprint"]
    for index in range(record["counts"]["snapshots"]):
        for kind in kinds:
            expected[f"anchors/snapshot-{index:02d}/{kind}.safetensors"] = record["fingerprint"]
    return any(fingerprint_of(storage, name) != fingerprint for name, fingerprint in expected.items())


class _Anchor:
    """One run of the stage."""

    def __init__(self, run: Run, fingerprint: str, drift: str) -> None:
        self.run, self.fingerprint, self.drift = run, fingerprint, drift
        self.storage, self.settings, self.progress = run.storage, run.settings, run.progress
        self.coverage: Coverage | None = None

    def make(self) -> dict[str, Any]:
        """Fisher at the reference, then warm-up and gradients at the policy; returns the counts.

        Several checkpoints are snapshots that differ in all weights: each has a pool of workers of its own, in turn.
        """
        counts: dict[str, Any] = {}
        checkpoints = self.run.models.checkpoints
        if self.drift != "none" or self.settings.anchor.precondition != "none":
            counts["fisher"] = self._reference_phase()
        if len(checkpoints) > 1:
            counts["snapshots"] = len(checkpoints)
            for index, checkpoint in enumerate(checkpoints):
                self.progress.say(f"anchor: checkpoint {index + 1} of {len(checkpoints)}, {checkpoint}")
                weights = f"{PARTIAL}/policy-{index:02d}.safetensors"
                with self._pool(checkpoint) as pool:
                    self._one(pool, AnchorTask("weights", weights, NO_ROWS), "policy weights")
                    counts[f"snapshot-{index:02d}"] = self._snapshot(pool, index, weights)
        else:
            with self._pool(checkpoints[0]) as pool:
                snapshots = self._unrolled(pool, counts) if self.settings.anchor.unrolled else self._snapshots(pool)
                counts["snapshots"] = len(snapshots)
                for index, weights in enumerate(snapshots):
                    counts[f"snapshot-{index:02d}"] = self._snapshot(pool, index, weights)
        assert self.coverage is not None
        counts["coverage"] = coverage_report.as_json(self.coverage)
        if left_out := coverage_report.warning(self.coverage):
            self.progress.say(f"anchor: {left_out}")
        return counts

    def _pool(self, model: str) -> Pool:
        own = self.settings.model
        source = ModelSource(model, own.revision, own.dtype, own.trust_remote_code)
        eos = self.run.manifest.stage("prepare")["counts"]["eos_token_ids"]
        arguments = {"storage": self.storage, "source": source, "settings": self.settings, "eos": eos}
        cluster = self.run.cluster
        return cluster.pool(logged("anchor", AnchorWorker), arguments, cluster.model_resources())

    def _reference_phase(self) -> dict[str, Any]:
        """Write the Fisher, the reference's scored weights and, for anchor.precondition=kfac, the Kronecker factors."""
        prompts = self._read("prepared/fisher.parquet")
        fingerprint = digest(fisher_inputs(self.run.manifest.stage("anchor")["inputs"]))
        with self._pool(self.run.models.reference) as pool:
            self._one(pool, AnchorTask("weights", REFERENCE, NO_ROWS), "reference weights")
            if self._has_fisher(fingerprint):
                self.progress.say("anchor: the Fisher is there already")
                found = read_metadata(self.storage, FISHER)
                return {"prompts": int(found["prompts"]), "tokens": int(found["completion_tokens"])}
            sums = Sums(self.run, pool, self.fingerprint)
            parts = sums.parts("fisher", prompts, None, "anchor: Fisher", "prompts")
            counts = parts.counts
            factors = {key: shape for key, shape in parts.shapes.items() if "/" in key}
            if factors:
                marks = carried(fingerprint, counts)
                sums.write(SumFile(FACTORS, (Term(parts.files),), factors, marks), "anchor: Kronecker factors, sum")
            metadata = {
                **self._metadata(), "fingerprint": fingerprint, "prompts": str(counts["prompts"]),
                "completion_tokens": str(counts["tokens"]),
            }  # fmt: skip
            own = {key: shape for key, shape in parts.shapes.items() if key not in factors}
            sums.write(SumFile(FISHER, (Term(parts.files, counts["prompts"]),), own, metadata), "anchor: Fisher, sum")
            sums.remove(parts.files)
        self.progress.say(f"anchor: Fisher from {counts['prompts']:,} prompts, {counts['tokens']:,} sampled tokens")
        return counts

    def _has_fisher(self, fingerprint: str) -> bool:
        """Whether the Fisher, and the factors where they are wanted, are there from another run or an earlier try."""
        if self.settings.anchor.precondition == "kfac" and counts_of(self.storage, FACTORS, fingerprint) is None:
            return False
        return fingerprint_of(self.storage, FISHER) == fingerprint

    def _snapshots(self, pool: Pool) -> list[str]:
        """Files with the scored weights of every snapshot, in the order of the trajectory."""
        first = f"{PARTIAL}/policy.safetensors"
        self._one(pool, AnchorTask("weights", first, NO_ROWS), "policy weights")
        if self.drift != "warmup":
            return [first]
        warmup, seed = self.settings.anchor.warmup, self.settings.run.seed
        examples = self._draw(warmup.examples)
        names = [POLICY.format(index=index) for index in range(self.settings.anchor.snapshots)]
        if all(counts_of(self.storage, each, self.fingerprint) is not None for each in names):
            return names
        with self.progress.task("anchor: warm-up", warmup.steps, "steps") as task:
            shard = Shard("warm-up", warmup.steps)
            work = AnchorTask("warmup", POLICY, examples, seed, fingerprint=self.fingerprint)
            pool.run([shard], lambda s: work, lambda s, r: None, task)
        return names

    def _unrolled(self, pool: Pool, counts: dict[str, Any]) -> list[str]:
        """As ``_snapshots`` for unrolled runs; adds what came of each order to ``counts``."""
        self._one(pool, AnchorTask("weights", f"{PARTIAL}/policy.safetensors", NO_ROWS), "policy weights")
        examples, rows = self._draw(self.settings.anchor.unroll.examples), rows_of_objectives(self.run)
        counts |= unroll_orders(self.run, pool, self.fingerprint, self.drift, examples, rows)
        return [POLICY.format(index=index) for index in range(self.settings.snapshots(self.drift))]

    def _snapshot(self, pool: Pool, index: int, weights: str) -> dict[str, Any]:
        """Write both directions of one snapshot."""
        drift, anchor = self.drift, self.settings.anchor
        counts = {} if anchor.unrolled else self._gradient(pool, index, weights)
        sample = self._draw(anchor.warmup.examples) if anchor.scaled else NO_ROWS
        metadata = {**self._metadata(), "drift": drift}
        if anchor.unrolled:
            metadata["direction"] = anchor.direction
        else:
            metadata["validation_positions"] = str(counts["positions"])
        place = f"anchors/snapshot-{index:02d}"
        work = AnchorTask(
            "directions",
            f"{place}/stability.safetensors",
            sample,
            weights=weights,
            index=index,
            drift=drift,
            metadata=metadata,
        )
        found = self._one(pool, work, "directions")  # all others are written first
        if anchor.unrolled:
            return found
        loss = counts["loss"] / counts["positions"]
        self.progress.say(
            f"anchor: snapshot {index}, validation loss {loss:.4f} nats over {counts['positions']:,} tokens, drift {drift}"
        )
        for objective, one in counts.get("losses", {}).items():
            self.progress.say(f"anchor: snapshot {index}, loss of {objective.removeprefix(TASK)} {one:.4f} nats")
        apart = {"losses": counts["losses"]} if "losses" in counts else {}
        return {"validation_positions": counts["positions"], "validation_loss": loss, **apart, **found}

    def _gradient(self, pool: Pool, index: int, weights: str) -> dict[str, Any]:
        """Write the validation gradient of one snapshot for its directions; returns positions and summed loss."""
        own = weights if self.drift == "warmup" else None
        sums = Sums(self.run, pool, self.fingerprint)
        found: dict[str, dict[str, Any]] = {}
        for objective, rows in rows_of_objectives(self.run).items():
            what, of, output = f"gradient-{index:02d}", "", made(objective, index)
            if objective != "adaptation":
                what, of = f"{what}-{objective}", f" of {objective.removeprefix(TASK)}"
            counts = counts_of(self.storage, output, self.fingerprint)
            if counts is None:
                parts = sums.parts(what, rows, own, f"anchor: validation gradient{of}", "examples")
                counts = parts.counts
                mean = Term(parts.files, max(1, counts["positions"]))
                file = SumFile(output, (mean,), parts.shapes, carried(self.fingerprint, counts))
                sums.write(file, f"anchor: validation gradient{of}, sum")
                sums.remove(parts.files)
            found[objective] = counts
        shares = shares_of_adaptation({name: counts["positions"] for name, counts in found.items()})
        adaptation = made("adaptation", index)
        if "adaptation" not in found and counts_of(self.storage, adaptation, self.fingerprint) is None:
            terms = tuple(Term((made(task, index),), weight=share) for task, share in shares.items())
            with TensorFile(self.storage, terms[0].files[0]) as first:
                file = SumFile(adaptation, terms, first.shapes, carried(self.fingerprint, {"tasks": len(terms)}))
            sums.write(file, "anchor: validation gradient, sum of the tasks")
        together = {key: sum(found[name][key] for name in shares) for key in ("positions", "loss")}
        apart = {name: counts["loss"] / counts["positions"] for name, counts in found.items() if name != "adaptation"}
        return {**together, **({"losses": apart} if apart else {})}

    def _one(self, pool: Pool, work: AnchorTask, title: str) -> dict[str, Any]:
        """Run a single task, unless its output is there already; returns its counts."""
        results = [counts_of(self.storage, work.output, self.fingerprint)]
        if results[0] is None:
            work = replace(work, fingerprint=self.fingerprint)
            with self.progress.task(f"anchor: {title}", 1, "models") as task:
                pool.run([Shard(title, 1)], lambda s: work, lambda s, r: results.append(r), task)
        counts = results[-1]
        assert counts is not None
        if found := counts.pop("coverage", None):
            self.coverage = Coverage(**{**found, "left_out": tuple(found["left_out"])})
        return counts

    def _read(self, name: str) -> Sequences:
        table = self.storage.read_table(name, PREPARED)
        return sequences_of(table)

    def _draw(self, count: int) -> Sequences:
        """``count`` training examples drawn with the seed over all parts, in file order; of pairs the chosen branch."""
        parts = prepared_rows(self.run)
        schema, branch = (PREFERENCE_PREPARED, "chosen_") if self.run.manifest.pairs else (PREPARED, "")
        total = sum(parts.values())
        chosen = drawn_rows(total, count, self.settings.run.seed)
        found, start = Sequences([], [], []), 0
        for part, size in parts.items():
            rows = [row - start for row in chosen if start <= row < start + size]
            start += size
            if rows:
                table = self.storage.read_table(f"prepared/{part}", schema).take(rows)
                for column, values in zip(
                    ("id", f"{branch}input_ids", f"{branch}labels"),
                    (found.ids, found.input_ids, found.labels),
                    strict=True,
                ):
                    values += table.column(column).to_pylist()
        return found

    def _metadata(self) -> dict[str, str]:
        assert self.coverage is not None
        return {"fingerprint": self.fingerprint, "coverage": f"{self.coverage.fraction:.6f}", "format": "pt"}
