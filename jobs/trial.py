"""alphatoken trial: does a mask help on this model and this data? Short fine-tunes, a table and one sentence."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from alphatoken.jobs.config import groups, load
from alphatoken.jobs.points import Swept, expand, mask_name, point_name
from alphatoken.jobs.replay import recorded_configuration
from alphatoken.jobs.session import Session
from alphatoken.pipeline.mask.layout import is_finished, summary_of
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.manifest import NAME
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import MaskSettings, Settings

TITLES = {"margin": "margin", "reward_accuracy": "preferred", "retention_loss": "retention"}
WIDE = 110  # columns of a terminal that hold both tables with each candidate in one line
AUTO = ("noise", "paper")  # presets that trial.auto tries beside the run's own mask
AT_RHO = "_rho-"  # between a mask's name and the rho at which trial.rho has it


def of_the_run(overrides: Sequence[str], recorded: Mapping[str, Any] | None) -> Settings:
    """The settings of a trial: those that the run recorded, with the overrides but those of masks, which may be sweeps.

    ``recorded``: of --from. Raises SettingsWrong.
    """
    own = [_as_list(override) for override in overrides if not _is_mask(override)]
    place = _place([override for override in own if override.lstrip("+").startswith("run.dir=")])
    if recorded is None and place and Storage(place).exists(NAME):
        recorded = recorded_configuration(f"{place.rstrip('/')}/{NAME}")
        recorded.setdefault("run", {})["dir"] = place
        recorded.pop("trial", None)  # of the trial before
    return load(own, recorded or None)


def _place(overrides: Sequence[str]) -> str:
    """The run directory that the last of ``overrides`` says; empty where it is wrong, which is said with all else."""
    try:
        return load(overrides[-1:]).run.dir
    except SettingsWrong:
        return ""


def execute(session: Session) -> None:
    """Make the masks that were asked for, try all, and print what was found."""
    from alphatoken.jobs.given import refuse_other_settings

    refuse_other_settings(session.run, [override for override in session.overrides if _is_given(override)], "trial")
    tell(try_masks(session, made_masks(session, asked_masks(session))))


def execute_auto(session: Session) -> None:
    """As the end of `run`: try the run's own mask beside presets, and write the winner as masks/chosen."""
    own = session.settings.mask
    names = list(session.settings.trial.masks) or [own.name, *(name for name in AUTO if name != own.name)]
    asked = {name: _named(session, name) for name in names}
    wanted = _at_each_rho(session, asked, names)
    optional = [name for name in wanted if name.partition(AT_RHO)[0] in AUTO]
    summary = try_masks(session, made_masks(session, wanted, optional))
    chosen = write_chosen(session, summary)
    session.manifest.record({"mask": own})  # which was asked for, and not what came of it
    tell(summary)
    print(f"mask:  {session.storage.shown('masks/' + chosen)}")


def check_names(session: Session) -> None:
    """Raise SettingsWrong for a mask that there will not be at the end of `run`, or that cannot be tried."""
    mask = session.settings.mask
    if mask.rule == "weight" and mask.name in (session.settings.trial.masks or [mask.name]):
        raise SettingsWrong(
            [f"trial.auto=true tries mask {mask.name}, whose mask.rule=weight leaves all labels: set trial.auto=false"]
        )
    for name in session.settings.trial.masks:
        if name != session.settings.mask.name:
            _named(session, name)


def try_masks(session: Session, names: Sequence[str]) -> dict[str, Any]:
    """Run the stage on these masks of the run (none: all that are there); returns its summary."""
    from alphatoken.pipeline.trial.cards import note_winner
    from alphatoken.pipeline.trial.stage import make_trial

    settings = session.settings
    session.change(replace(settings, trial=replace(settings.trial, masks=list(names))), session.overrides)
    summary = make_trial(session.run)
    note_winner(session.run, summary)
    # As it was asked for, so that it can be asked for again elsewhere.
    session.manifest.record({"trial": settings.trial})
    return summary


def asked_masks(session: Session) -> dict[str, MaskSettings | None]:
    """Name -> settings of the masks that the command line asks for; None: it is in the run as it is."""
    found: dict[str, MaskSettings | None] = {}
    masks = [override for override in session.overrides if _is_mask(override)]
    if masks:
        found |= _swept(masks)
    named = session.settings.trial.masks
    return _at_each_rho(session, {name: _named(session, name) for name in named} | found, [*named, *found])


def _swept(overrides: Sequence[str]) -> dict[str, MaskSettings | None]:
    """The masks of a sweep, named as `mask -m` names them."""
    try:
        points = expand(overrides)
    except SettingsWrong as error:
        if "without a sweep" not in str(error):
            raise
        mask = load(overrides).mask
        # The last of repeated keys holds.
        last = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
        name = mask.name if "mask.name" in last else point_name([Swept(*pair) for pair in last.items()])
        return {name: replace(mask, name=name)}
    found: dict[str, MaskSettings | None] = {}
    for point in points:
        mask = load(point.overrides).mask
        name = mask_name(point, point.swept, mask.name)
        if name in found:
            raise SettingsWrong(
                [f"several points of the sweep have mask.name={name}: leave mask.name out of the sweep"]
            )
        found[name] = replace(mask, name=name)
    return found


def _named(session: Session, name: str) -> MaskSettings | None:
    """The settings of a preset that is no mask of the run yet; None for a mask of the run. Raises SettingsWrong."""
    if is_finished(session.storage, name):
        return None
    presets = groups()["mask"]
    if name not in presets:
        raise SettingsWrong(
            [f"trial.masks={name}: neither a mask in {session.storage.root} nor a preset ({', '.join(presets)})"]
        )
    return replace(load([f"mask={name}"]).mask, name=name)


def _at_each_rho(
    session: Session, asked: Mapping[str, MaskSettings | None], names: Sequence[str]
) -> dict[str, MaskSettings | None]:
    """The same masks at every trial.rho, where it is given; without names, those of the run."""
    rhos = session.settings.trial.rho
    if not rhos:
        return dict(asked)
    found: dict[str, MaskSettings | None] = {}
    for name in names or _to_vary(session):
        settings = asked.get(name)
        if settings is None:
            recorded = summary_of(session.storage, name)["settings"]
            settings = MaskSettings(**recorded)
        for rho in rhos:
            found[f"{name}{AT_RHO}{rho}"] = replace(settings, rho=rho, name=f"{name}{AT_RHO}{rho}")
    return found


def _to_vary(session: Session) -> list[str]:
    """The masks of the run that trial.rho is for: not those that it has made of others, and none that cannot be tried."""
    from alphatoken.pipeline.trial.inputs import chosen_masks

    there, notes = chosen_masks(session.run)
    for note in notes:
        session.progress.say(f"trial: {note}")
    return [name for name in there if name.rpartition(AT_RHO)[0] not in there]


def made_masks(session: Session, asked: Mapping[str, MaskSettings | None], optional: Sequence[str] = ()) -> list[str]:
    """Make the masks that are not in the run yet, thresholds only; returns all names. Raises SettingsWrong and RunFailed.

    ``optional``: presets that are left out, and named, where the values do not have what they need.
    """
    from alphatoken.pipeline.mask.stage import make_mask

    own, found = session.settings, []
    for name, settings in asked.items():
        if settings is not None:
            session.change(replace(own, mask=settings), session.overrides)
            try:
                make_mask(session.run)
            except SettingsWrong as error:
                if name not in optional:
                    raise
                session.progress.say(f"trial: mask {name} is left out: {error.problems[0]}")
                continue
            finally:
                session.change(own, session.overrides)
        found.append(name)
    return found


def write_chosen(session: Session, summary: Mapping[str, Any]) -> str:
    """Write the winner as masks/chosen, with a card of its own; returns the name."""
    from alphatoken.pipeline.trial.cards import make_chosen

    return make_chosen(session.run, summary)


def tell(summary: Mapping[str, Any]) -> None:
    """The tables and the sentence, on stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    for table in tables_of(summary, console.width < WIDE):
        console.print(table)
    for failure in summary["failed"]:
        console.print(f"left out: {failure}", highlight=False, markup=False)
    console.print(summary["sentence"], highlight=False, markup=False, soft_wrap=True)


def tables_of(summary: Mapping[str, Any], narrow: bool = False) -> list[Table]:
    """One row per candidate, sorted by adaptation: what it has learned, and what else became of the model.

    ``narrow``: numbers and their spreads stand in two lines, so that names have room.
    """
    pairs = summary.get("pairs", False)
    what = "-log sigmoid(margin), nats per pair, on" if pairs else "nats per token on"
    caption = (
        f"loss: {what} {summary['held_out_rows']} held-out {'pairs' if pairs else 'rows'}, mean and half the range over seeds; "
        "less ...: the difference to it, paired by seed, and its spread (the larger of half the range and two standard errors over "
        "rows), * where it exceeds it"
    )
    if summary["held_out_made_directions"]:
        caption += "; WARNING: the held-out rows also made the directions, which flatters masks that come from them"
    learned = _table(["kept", "seeds", "loss", "less\nfull", "less random\nof its size"], caption, narrow)
    for line in summary["lines"]:
        untouched = line["kind"] == "untouched"
        learned.add_row(
            _called(line),
            "-" if untouched else f"{line['kept_fraction']:.1%}",
            "-" if untouched else str(line["seeds"]),
            _spread(line["adaptation"]),
            _difference(line["to_full"]),
            _difference(line["to_random"]),
        )
    return [learned, _other_table(summary, pairs, narrow)]


def _other_table(summary: Mapping[str, Any], pairs: bool, narrow: bool) -> Table:
    """Divergence; of pairs margins; losses on data.retention."""
    kept = summary.get("retention_rows", 0)
    caption = f"divergence: of the reference on {summary['completions']} completions of its own, nats per token"
    if pairs:
        caption += (
            "; margin: how much more the chosen response has gained over the reference than the rejected one, times beta, nats; "
            "preferred: pairs where that is above 0 (at 0: one half)"
        )
    if kept:
        caption += f"; retention: loss on the {kept} rows of data.retention, nats per token"
    more = [*(["margin", "reward_accuracy"] if pairs else []), *(["retention_loss"] if kept else [])]
    table = _table(["divergence", "less\nfull", *[TITLES[key] for key in more]], caption, narrow)
    for line in summary["lines"]:
        others = ["-" if line[key] is None else _spread(line[key]) for key in more]
        table.add_row(_called(line), _spread(line["retention"]), _difference(line["moved"]), *others)
    return table


def _table(titles: Sequence[str], caption: str, narrow: bool) -> Table:
    table = Table(caption=caption, caption_justify="left")
    table.add_column("trained on", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", overflow="fold", max_width=10 if narrow else None)
    return table


def _called(line: Mapping[str, Any]) -> str:
    return "(model untouched)" if line["kind"] == "untouched" else line["name"]


def _spread(pair: Sequence[float]) -> str:
    return f"{pair[0]:.4f}" + (f" ±{pair[1]:.4f}" if pair[1] else "")


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    spread = "" if found["spread"] is None else f" ±{found['spread']:.4f}"
    return f"{found['mean']:+.4f}{spread}{'*' if found['exceeds'] else ''}"


def _is_mask(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key == "mask" or key.startswith("mask.")


def _is_given(override: str) -> bool:
    """Whether it speaks of rows or models, which are those of the run."""
    return override.lstrip("+~").partition("=")[0].startswith(("data.", "model.policy", "model.reference"))


def _as_list(override: str) -> str:
    """``trial.rho=0.5,0.7`` as the list that it means; also of trial.masks."""
    key, _, value = override.partition("=")
    is_open = key in ("trial.rho", "trial.masks") and "," in value and value[0] != "[" and value[-1] != ","
    return f"{key}=[{value}]" if is_open else override


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["trial", *sys.argv[1:]]))
