"""alphatoken plan: what a run would do, cost and skip. Loads no weights, starts no worker, writes nothing."""

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
        run = session.run_with_data()
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
    return [_what(plan), _stages(plan), _where(plan), _hours(plan)]


def _what(plan: dict[str, Any]) -> Table:
    data, model = plan["data"], plan["model"]
    table = _table("what")
    about = "" if data["complete_sample"] else "about "
    kind = "pairs" if data["format"] == "preference" else "rows"
    rows = f"{about}{data['train_examples']:,} of {data['rows']:,} {kind}, in {data['shards']:,} shard(s)"
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
    table.add_row("one direction", _bytes(storage["direction"]))
    files = {name: n for name, n in storage.items() if name not in ("direction", "total")}
    table.add_row(
        "storage", f"{_bytes(storage['total'])}: " + ", ".join(f"{name} {_bytes(n)}" for name, n in files.items())
    )
    return table


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


def _hours(plan: dict[str, Any]) -> Table:
    hours = dict(plan["device_hours"])
    utilisation = hours.pop("utilisation")
    table = Table(title="device-hours", title_justify="left")
    table.caption = (
        f"one device, at {utilisation:.0%} of what its maker states for bfloat16; the CPU measured, in float32"
    )
    table.caption_justify = "left"
    table.add_column("device")
    table.add_column("hours", justify="right")
    table.add_column("which is", justify="right")
    for name, count in hours.items():
        hours_shown = (
            f"{count:,.2f}" if count >= 1 else f"{count:.4f}" if count >= LEAST_HOURS else f"under {LEAST_HOURS}"
        )
        table.add_row(name, hours_shown, clock(3600 * count) if 3600 * count >= 1 else "under 1 s")
    return table


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
