"""alphatoken plan: what a run would do, cost and skip. Loads no weights, starts no worker, writes nothing.

With --measure it does load the model, and times a few batches on this machine; later plans know by that how long a run takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from alphatoken.jobs.cli import COMMANDS, parse, quiet
from alphatoken.jobs.config import load
from alphatoken.pipeline.run.progress_line import clock
from alphatoken.pipeline.settings.objectives import TASK

LEAST_HOURS = 0.0005  # that are shown as a number
STATES = {
    "skipped": "not needed",
    "new": "to do",
    "done": "done, would be skipped",
    "overwritten": "would be done anew",
}


def execute(arguments: Sequence[str]) -> int:
    """Print the plan of a run with these overrides."""
    parsed = parse("plan", arguments, COMMANDS["plan"].options)
    settings = load(parsed.overrides, parsed.recorded)
    settings = replace(settings, run=replace(settings.run, tracker="none"))
    quiet(settings.log_level)
    from alphatoken.jobs.session import Session
    from alphatoken.pipeline.plan.plan import make_plan
    from alphatoken.pipeline.plan.resume import resume_state
    from alphatoken.pipeline.run.progress import Progress

    with Progress() as progress, Session(settings, progress) as session:
        progress.log = None  # nothing is written into a run directory
        run = session.run_with_data()
        if "--measure" in parsed.flags:
            from alphatoken.pipeline.plan.calibration import keep
            from alphatoken.pipeline.plan.measure import measure

            found = measure(run)
            progress.say(f"plan: measured in {found.seconds:.0f} s, kept for later plans in {keep(run, found)}")
        plan = {"run": session.storage.root, **make_plan(run), "resume": resume_state(run)}
    if "--json" in parsed.flags:
        print(json.dumps(plan, indent=2))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    for table in tables(plan):
        console.print(table)
    if plan["model"]["coverage_warning"]:
        console.print(plan["model"]["coverage_warning"], highlight=False, markup=False)
    return 0


def tables(plan: dict[str, Any]) -> list[Table]:
    """The plan for people."""
    here = [_seconds(plan)] if "seconds_here" in plan else []
    return [_what(plan), _stages(plan), *here, _where(plan), _hours(plan)]


def _what(plan: dict[str, Any]) -> Table:
    data, model = plan["data"], plan["model"]
    table = _table("what")
    about = "" if data["complete_sample"] else "about "
    kind = "pairs" if data["format"] == "preference" else "rows"
    made = f"{data['train_examples']:,} of {data['rows']:,} {kind}"
    if "windows" in data:
        made = f"{data['train_examples']:,} of {data['rows']:,} rows, of which {data['split_rows']:,} are split into "
        made += f"{data['windows']:,} windows"
    rows = f"{about}{made}, in {data['shards']:,} shard(s)"
    tasks = ", ".join(f"{name.removeprefix(TASK)} {rows:,}" for name, rows in data.get("tasks", {}).items())
    held = f"{data['validation_examples']:,} for validation{f' ({tasks})' if tasks else ''}, "
    held += f"{data['retention_examples']:,} for retention, " if "retention_examples" in data else ""
    held += f"{data['fisher_prompts']:,} Fisher prompts"
    unusable = f"{data['unusable_fraction']:.1%} of rows not usable, {data['truncated_fraction']:.1%} truncated"
    tokens = (
        f"{about}{data['tokens']:,}, {data['response_tokens']:,} of them response; longest example {data['longest']:,}"
    )
    coverage = model["coverage"]
    scored = f"{len(model['scored_modules'])} modules in the last {model['scored_layers']} of {model['layers']} layers"
    for name, text in (
        ("training examples", rows),
        ("held out", held),
        ("sample", f"{data['sampled']:,} rows tokenized; {unusable}"),
        ("tokens", tokens),
        ("model", f"{model['parameters'] / 1e6:,.1f} M parameters in {model['dtype']}"),
        ("scored", f"{scored}, {coverage['scored'] / 1e6:,.2f} M parameters, coverage {coverage['fraction']:.1%}"),
        *[("trained", f"the last {model['trained_layers']} layers, by the simulated run")]
        * (model["trained_layers"] != model["scored_layers"]),
        ("columns", ", ".join(model["columns"]) or "none"),
        ("drift", f"{model['drift']}, {model['snapshots']} snapshot(s), {model['checkpoints']} checkpoint(s)"),
    ):
        table.add_row(name, text)
    return table


def _stages(plan: dict[str, Any]) -> Table:
    table = Table(title="stages", title_justify="left")
    table.add_column("stage")
    table.add_column("FLOPs", justify="right")
    table.add_column("of which")
    table.add_column("here")
    flops, value = plan["flops"], plan["flops"]["value"]
    anchor = ", ".join(f"{k.replace('_', ' ')} {v:.2e}" for k, v in flops["anchor"].items() if k != "flops" and v)
    notes = {
        "prepare": "CPU only",
        "anchor": anchor,
        "value": f"{value['flops'] / value['forward']:.2f} forward passes, floor {value['floor']:.2e}",
        "mask": "no model",
    }
    for stage, note in notes.items():
        count = flops[stage]["flops"]
        table.add_row(stage, f"{count:.2e}" if count else "-", note, _state(plan["resume"][stage]))
    trial = flops["trial"]
    if trial["flops"]:
        note = f"{trial['steps']} steps on {trial['examples']:,} examples each"
        table.add_row("trial", f"{trial['flops']:.2e}", note, "if asked for: trial.auto, or `alphatoken trial`")
    return table


def _where(plan: dict[str, Any]) -> Table:
    table = _table("resources")
    memory, storage = plan["memory_per_worker"], plan["storage"]
    table.add_row(
        "memory per worker",
        f"about {_bytes(sum(memory.values()))}: " + ", ".join(f"{name} {_bytes(n)}" for name, n in memory.items()),
    )
    for device in plan.get("devices", ()):
        table.add_row(*_device(device))
    table.add_row("one direction", _bytes(storage["direction"]))
    files = {name: n for name, n in storage.items() if name not in ("direction", "total")}
    table.add_row(
        "storage", f"{_bytes(storage['total'])}: " + ", ".join(f"{name} {_bytes(n)}" for name, n in files.items())
    )
    return table


def _device(device: dict[str, Any]) -> tuple[str, str]:
    named = {name: count for name, count in device.items() if name not in ("device", "lower_layers")}
    text = f"{_bytes(sum(named.values()))}: " + ", ".join(f"{name} {_bytes(n)}" for name, n in named.items())
    layers = f"; {device['lower_layers']} lower layer(s)" if device["lower_layers"] else ""
    if not device["device"].isdigit():
        return f"offloaded to {device['device']}", f"{text}{layers}, brought back for every pass"
    return f"device {device['device']}", f"{text}{layers}"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("name", no_wrap=True)
    table.add_column("text")
    return table


def _state(state: dict[str, Any]) -> str:
    if state["state"] == "continues":
        shards = f" with {state['complete_shards']} of {state['shards']} shards done" if "shards" in state else ""
        return f"would go on{shards}"
    if state["state"] == "refused":
        return f"refused, {', '.join(state['changed'])} differ: {state['remedy']}"
    return STATES[state["state"]]


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _seconds(plan: dict[str, Any]) -> Table:
    """How long each stage takes here, where that was measured."""
    table, found = _table("time on this machine"), plan["calibration"]
    for stage, seconds in plan["seconds_here"].items():
        table.add_row(stage, clock(seconds) if seconds >= 1 else "under 1 s")
    table.add_row("measured", f"{found['measured'][:10]} in {found['seconds']:.0f} s: {found['machine']}")
    return table


def _hours(plan: dict[str, Any]) -> Table:
    hours, prices = dict(plan["device_hours"]), plan.get("price", {})
    utilisation = hours.pop("utilisation")
    measured = "this machine as measured" if "seconds_here" in plan else "the CPU by a product of matrices, in float32"
    several = sum(device["device"].isdigit() for device in plan.get("devices", ())) or 1
    table = Table(title="device-hours", title_justify="left")
    devices = "one device" if several == 1 else f"{several} devices a worker, of which one computes at a time"
    table.caption = (
        f"{devices}, at {utilisation:.0%} of what its maker states for bfloat16; {measured}. Per 10^9 tokens: the value stage, "
        "the part that grows with the data."
    )
    if "seconds_here" not in plan:
        table.caption += " `plan --measure` measures this machine, in about a minute."
    table.caption_justify = "left"
    table.add_column("device")
    for name in ("hours", "which is", "hours per 10^9 tokens", *(("cost", "cost per 10^9") if prices else ())):
        table.add_column(name, justify="right")
    for name, count in hours.items():
        row = [name, _count(count), clock(3600 * count) if 3600 * count >= 1 else "under 1 s"]
        row.append(_count(plan["per_billion_tokens"][name]))
        if prices:
            own = prices.get(name)
            row += ["", ""] if own is None else [f"{own['run']:,.2f}", f"{own['per_billion_tokens']:,.2f}"]
        table.add_row(*row)
    return table


def _count(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 1 else f"{hours:.4f}" if hours >= LEAST_HOURS else f"under {LEAST_HOURS}"


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
