"""Passes of an unrolled run that other workers make: the same bytes whoever made them, and nobody depends on a helper."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file

from alphatoken.pipeline.anchor import shared_passes
from alphatoken.pipeline.anchor.shared_passes import SharedPasses, help_leads
from alphatoken.pipeline.anchor.unrolled import Held
from alphatoken.pipeline.anchor.worker import NO_ROWS, AnchorTask, AnchorWorker
from alphatoken.pipeline.cluster.board import RayBoard
from alphatoken.pipeline.cluster.pool import InStore, WorkerPool
from alphatoken.pipeline.cluster.work import Lost, Resources, Shard
from alphatoken.pipeline.maths.adapters import Adapters
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.learners import ScoredWeights, Trained
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.passes import StepWork, alone
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from tests.maths.comparison import sequences
from tests.maths.tiny_models import model_of

PASSES = 5


def learner_of(train: str) -> Trained:
    scored = scored_layers(model_of("llama", seed=1), 2)
    return Adapters(scored, 3, 0) if train == "lora" else ScoredWeights(scored, rounded=False)


def work_of(learner: Trained, curved: bool) -> StepWork:
    passes = [sequences([9 + number, 14], seed=number).batch() for number in range(PASSES)]
    generator = torch.Generator().manual_seed(3)
    weights = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in learner.start().items()}
    along = {
        name: {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()} for name in ("one", "two")
    }
    return StepWork(weights, passes, along if curved else None, "sdpa")


class Sums:
    """What the passes add, in the order in which it is shown."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, direction: str, name: str, tensor: torch.Tensor) -> None:
        key = direction, name
        self.of[key] = self.of[key] + tensor if key in self.of else tensor.clone()


@ray.remote(num_cpus=0)
class Helper:
    """A process of its own with the same model."""

    def help(self, board: RayBoard, train: str) -> int:
        return help_leads(board, learner_of(train), InStore, threading.Lock(), lambda n: None)

    def delivers_one(self, board: RayBoard) -> bool:
        """Takes a part, and what it delivers goes with it."""
        part = board.take()
        assert part is not None
        board.deliver(part, InStore("soon gone"))
        return True


@pytest.fixture(scope="module")
def helper(ray_cluster):
    process = Helper.remote()
    yield process
    ray.kill(process)


def made(passes, train: str, curved: bool) -> tuple[Sums, list]:
    learner, sums = learner_of(train), Sums()
    return sums, passes(learner, work_of(learner, curved), sums)


def assert_same(found: tuple[Sums, list], wanted: tuple[Sums, list]) -> None:
    assert found[0].of.keys() == wanted[0].of.keys() and len(found[1]) == len(wanted[1]) == PASSES
    for key, tensor in wanted[0].of.items():
        assert tensor.any() and torch.equal(found[0].of[key], tensor)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert torch.equal(one.losses, other.losses) and one.along.keys() == other.along.keys()
        assert all(torch.equal(one.along[name], other.along[name]) for name in one.along)


@pytest.mark.parametrize("train", ["weights", "lora"])
@pytest.mark.parametrize("curved", [False, True])
def test_what_helpers_make_is_added_as_if_the_lead_had_made_it(helper, train: str, curved: bool) -> None:
    board = RayBoard(["lead"])
    shared, wanted = SharedPasses(board, "lead", InStore), made(alone, train, curved)
    done = helper.help.remote(board, train)
    end = time.monotonic() + 120
    while not shared.helped and time.monotonic() < end:
        assert_same(made(shared, train, curved), wanted)
    assert shared.helped
    shared.leave()
    assert ray.get(done, timeout=30) >= shared.helped and board.over()


def test_a_pass_that_was_taken_and_does_not_come_is_made_by_the_lead(ray_cluster, monkeypatch, caplog) -> None:
    monkeypatch.setattr(shared_passes, "LEAST_PATIENCE", 0.3)
    board = RayBoard(["lead"])
    taken, real = [], board.offer

    def offer(*given) -> None:  # somebody takes the last and dies
        real(*given)
        taken.append(board.take())

    monkeypatch.setattr(board, "offer", offer)
    shared = SharedPasses(board, "lead", InStore)
    assert_same(made(shared, "weights", True), made(alone, "weights", True))
    assert taken[0].number == PASSES - 1 and not shared.helped and "did not come" in caplog.text
    board.deliver(taken[0], InStore("too late"))
    monkeypatch.setattr(board, "offer", real)
    assert_same(made(shared, "weights", False), made(alone, "weights", False))  # of another offer


def test_what_a_lost_process_had_delivered_is_made_by_the_lead(ray_cluster, monkeypatch, caplog) -> None:
    board = RayBoard(["lead"])
    helper, real = Helper.remote(), board.offer

    def offer(*given) -> None:
        real(*given)
        assert ray.get(helper.delivers_one.remote(board))
        ray.kill(helper)
        result = board.result("lead", PASSES - 1)
        with pytest.raises(Lost):  # Ray takes a while to be sure of it
            for _ in range(100):
                assert result is not None and result.get()
                time.sleep(0.2)

    monkeypatch.setattr(board, "offer", offer)
    shared = SharedPasses(board, "lead", InStore)
    assert_same(made(shared, "weights", True), made(alone, "weights", True))
    assert not shared.helped and "is lost" in caplog.text


def test_without_its_board_a_lead_goes_on_alone_and_a_helper_ends(ray_cluster, caplog) -> None:
    board = RayBoard(["lead"])
    shared = SharedPasses(board, "lead", InStore)
    ray.kill(board.actor)
    assert_same(made(shared, "weights", True), made(alone, "weights", True))
    assert_same(made(shared, "lora", False), made(alone, "lora", False))
    assert shared.gone and "goes on without helpers" in caplog.text
    with pytest.raises(Lost, match="does not answer"):
        board.take()
    assert not help_leads(board, learner_of("weights"), InStore, threading.Lock(), lambda n: None)
    shared.leave()


def test_helpers_take_from_the_back_of_whoever_has_most_left_and_nobody_takes_a_part_twice(ray_cluster) -> None:
    board = RayBoard(["a", "b"])
    assert board.take() is None and not board.over()
    work = InStore("work")
    board.offer("a", work, 2)
    board.offer("b", work, 4)
    assert board.claim("b", 0) and not board.claim("b", 0)
    found = [board.take() for _ in range(5)]
    assert all(part is not None and part.work.get() == "work" for part in found)
    assert sorted((part.lead, part.number) for part in found if part) == [
        ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3),
    ]  # fmt: skip
    first = found[0]
    assert first is not None and (first.lead, first.number) == ("b", 3) and board.take() is None
    board.deliver(first, InStore(7))
    result = board.result("b", 3)
    assert result is not None and result.get() == 7 and board.result("b", 2) is None
    board.offer("b", work, 4)
    assert board.result("b", 3) is None  # what came for another offer
    board.leave("a")
    assert not board.over()
    board.leave("b")
    assert board.over() and board.take() is None


def test_a_helper_without_work_shows_that_it_lives_and_ends_after_a_while(ray_cluster, monkeypatch) -> None:
    monkeypatch.setattr(shared_passes, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(shared_passes, "ALIVE_SECONDS", 0.1)
    signs: list[int] = []
    board = RayBoard(["lead that measures losses"])
    assert help_leads(board, learner_of("weights"), InStore, threading.Lock(), signs.append) == 0
    assert 3 <= len(signs) <= 10 and not board.over()


def test_a_helper_whose_device_is_too_small_ends_and_the_lead_makes_the_pass(ray_cluster, monkeypatch, caplog) -> None:
    monkeypatch.setattr(shared_passes, "LEAST_PATIENCE", 0.3)
    board = RayBoard(["lead"])
    real = board.offer

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def offer(*given) -> None:
        real(*given)
        with monkeypatch.context() as patch:
            patch.setattr(shared_passes, "_made", full)
            assert help_leads(board, learner_of("weights"), InStore, threading.Lock(), lambda n: None) == 0

    monkeypatch.setattr(board, "offer", offer)
    shared = SharedPasses(board, "lead", InStore)
    assert_same(made(shared, "weights", True), made(alone, "weights", True))
    assert not shared.helped and "helps no longer: CUDA out of memory" in caplog.text


def rows_of(count: int, seed: int) -> Sequences:
    """So long that a step of sixteen is two passes."""
    made = sequences([120 + number for number in range(count)], seed)
    return Sequences([f"row-{seed}-{number}" for number in range(count)], made.ids, made.labels)


def test_a_run_whose_helper_is_killed_ends_in_the_same_bytes(ray_cluster, policy, tmp_path) -> None:
    """Two workers, both there from the start; the one that helps is killed when it has delivered something."""
    settings = Settings()
    unroll = replace(settings.anchor.unroll, steps=24, examples=16, batch_size=16, snapshots=2, learning_rate=0.01)
    settings = replace(
        settings,
        anchor=replace(settings.anchor, direction="unrolled", unroll=unroll),
        valuation=replace(settings.valuation, layers=2, window=4, schedule="own_step"),
    )
    task = AnchorTask(
        "unroll", "anchors/partial/unroll-00.safetensors", rows_of(16, 1), fingerprint="f",
        held={"adaptation": Held.of(rows_of(20, 2))},
    )  # fmt: skip

    def arguments(name: str) -> dict:
        return {
            "storage": Storage(str(tmp_path / name)), "source": ModelSource(str(policy)), "settings": settings, "eos": [2]
        }  # fmt: skip

    def files(name: str) -> dict[str, dict[str, torch.Tensor]]:
        return {
            str(file.relative_to(tmp_path / name)): load_file(file)
            for file in sorted((tmp_path / name / "anchors").rglob("*.safetensors"))
            if "tape" not in file.name and "sweep" not in file.name and "forward" not in file.name
        }

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers with a CPU each: a sum over many tokens depends on it
    try:
        AnchorWorker(**arguments("alone"))(task, lambda n: None)
    finally:
        torch.set_num_threads(threads)
    with (
        Progress(Console(file=open(Path(tmp_path / "shown"), "w"))) as progress,
        WorkerPool(AnchorWorker, arguments("shared"), Resources(2, 1, 0.0), 90.0, False) as pool,
        progress.task("steps", 1000, "steps") as shown,
    ):
        weights = AnchorTask("weights", "anchors/partial/policy.safetensors", NO_ROWS)
        while len(pool.hosts.nodes) < 2:
            pool.run([Shard("one", 1), Shard("two", 1)], lambda s: weights, lambda s, r: None, shown)
        board = pool.board(["lead"])
        assert isinstance(board, RayBoard)
        lead = replace(task, board=board, store=pool.store)
        helper = AnchorTask("help", "helper", NO_ROWS, board=board, store=pool.store)
        found = {}
        killed = []

        def kill_when_it_has_helped() -> None:
            end = time.monotonic() + 120
            while time.monotonic() < end and not killed:
                for host in pool.hosts.all:
                    units, _ = ray.get(host.progress.remote())
                    if units.get("helper", 0) >= 3:
                        killed.append(host)
                        ray.kill(host)
                        return
                time.sleep(0.05)

        watching = threading.Thread(target=kill_when_it_has_helped)
        watching.start()
        # As leads name themselves: by what they write.
        tasks = {"lead": replace(lead, output="lead"), "helper": helper}
        pool.run(
            [Shard("lead", 100), Shard("helper", 0)], lambda s: tasks[s.name], lambda s, r: found.__setitem__(s.name, r), shown
        )  # fmt: skip
        watching.join()
    assert killed and found["lead"]["helped"] >= 3
    one, other = files("alone"), files("shared")
    names = {name for name in one if "gradient" in name or "own-step" in name}
    assert len(names) == 3 and names <= other.keys()
    for name in names:
        for key, tensor in one[name].items():
            assert tensor.any() and torch.equal(tensor, other[name][key])
