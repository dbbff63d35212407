"""A run of one step, through the stage's worker: the unrolled direction against the validation gradient."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphatoken.pipeline.anchor.tensors import counts_of
from alphatoken.pipeline.anchor.unrolled import Held
from alphatoken.pipeline.anchor.worker import AnchorTask, AnchorWorker
from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.maths.models import ModelSource
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

NONE = Sequences([], [], [])


def rows(count: int, prompt: int) -> Sequences:
    """``prompt`` tokens without a label, then a response of 9."""
    generator = torch.Generator().manual_seed(count + prompt)
    ids = torch.randint(3, 90, (count, prompt + 9), generator=generator).tolist()
    labels = [[IGNORED] * prompt + row[prompt:] for row in ids]
    return Sequences([str(i) for i in range(count)], ids, labels)


def directions(policy, place, prompt: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The direction of a run of one step with the step's sizes divided out, and the validation gradient at its end."""
    settings = Settings()
    unroll = replace(settings.anchor.unroll, steps=1, examples=4, batch_size=4, snapshots=1, learning_rate=0.01)
    settings = replace(
        settings,
        anchor=replace(settings.anchor, direction="unrolled", unroll=unroll),
        valuation=replace(settings.valuation, layers=2, window=4),
    )
    storage = Storage(str(place))
    worker = AnchorWorker(storage, ModelSource(str(policy)), settings, [2])
    held = {"adaptation": Held(rows(6, prompt), rows(1, prompt))}
    task = AnchorTask("unroll", "anchors/partial/unroll-00.safetensors", rows(4, 5), fingerprint="f", held=held)
    worker(task, lambda n: None)
    partial = place / "anchors/partial"
    state = load_file(partial / "unroll-forward-00.safetensors")
    end = {name.removeprefix("master/"): one for name, one in state.items() if name.startswith("master/")}
    save_file(end, partial / "end.safetensors")
    task = AnchorTask(
        "gradient",
        "anchors/partial/sum.safetensors",
        held["adaptation"].made,
        weights="anchors/partial/end.safetensors",
    )
    positions = worker(task, lambda n: None)["positions"]
    gradient = {name: one / positions for name, one in load_file(partial / "sum.safetensors").items()}
    tape = load_file(partial / "tape-00/step-00000.safetensors")
    facts = counts_of(storage, "anchors/partial/tape-00/step-00000.safetensors", "f")
    assert facts is not None
    minus = load_file(partial / "gradient-00.safetensors")
    sizes = {name: (1 - 0.9) * facts["clip"] * tape[f"scale/{name}"].float() for name in minus}
    assert all(bool((size > 0).all()) for size in sizes.values())
    return {name: minus[name] / sizes[name] for name in minus}, gradient


def test_one_step_is_the_gradient_direction_where_rows_are_response_throughout(policy, tmp_path):
    found, gradient = directions(policy, tmp_path, prompt=1)
    for name, wanted in gradient.items():
        assert wanted.any()
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_positions_of_the_prompt_are_in_the_derivative_and_not_in_the_papers_direction(policy, tmp_path):
    """method.md: only positions that predict a response token enter G; what the objective's gradient adds are the errors
    that reach a prompt's positions through attention, so that both point to one side and are not the same."""
    found, gradient = directions(policy, tmp_path, prompt=7)
    one, other = (torch.cat([named[name].flatten() for name in sorted(gradient)]) for named in (found, gradient))
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    assert 0.5 < cosine < 0.9999
    query = next(name for name in gradient if "layers.2" in name and "q_proj" in name)
    output = next(name for name in gradient if "layers.2" in name and "down_proj" in name)
    # In the last layer a prompt's positions have an error at keys and values alone.
    for name in (query, output):
        torch.testing.assert_close(
            found[name], gradient[name], rtol=1e-4, atol=1e-5 * float(gradient[name].abs().max())
        )
    value = query.replace("q_proj", "v_proj")
    assert found[value].numpy() != pytest.approx(gradient[value].numpy(), rel=1e-2, abs=1e-6)
