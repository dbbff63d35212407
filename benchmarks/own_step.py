"""Values at each token's own step against values at snapshots: `python -m benchmarks.own_step RUN` reads both from one run.

RUN was made with `anchor=unrolled valuation.schedule=own_step`, whose values/ has both. Prints how far they agree, in the order
of tokens and in the masks that follow, and what the stages cost.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from alphatoken.pipeline.maths.masking import threshold_of

KEPT = (0.5, 0.7, 0.9)


def columns_of(run: Path) -> dict[str, np.ndarray]:
    """snapshots, own step and minus the loss: (response tokens,) float32 each."""
    found: dict[str, list[np.ndarray]] = {"snapshots": [], "own step": [], "minus the loss": []}
    for file in sorted((run / "prepared").glob("part-*")):
        values = pq.read_table(run / "values" / file.name).to_pydict()
        for row, labels in enumerate(pq.read_table(file, columns=["labels"]).column("labels").to_pylist()):
            inside = np.array(labels) != -100
            own = {name: np.array(column[row], np.float32) for name, column in values.items() if name != "id"}
            found["snapshots"].append((own["adaptation_direct"] + own["adaptation_causal"])[inside])
            found["own step"].append(own["adaptation_unrolled"][inside])
            found["minus the loss"].append(-own["loss"][inside])
    return {name: np.concatenate(rows) for name, rows in found.items()}


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; ties are broken by place, of which float32 values have hardly any."""
    ranks = [values.argsort(kind="stable").argsort(kind="stable") for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def overlap(one: np.ndarray, other: np.ndarray, rho: float) -> float:
    """Jaccard index of the tokens that both keep at ``rho``."""
    first, second = (values >= threshold_of(values, rho) for values in (one, other))
    return float((first & second).sum() / (first | second).sum())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    columns, stages = columns_of(run), json.loads((run / "run.json").read_text())["stages"]
    unroll = {k.rpartition(".")[2]: v for k, v in stages["anchor"]["inputs"].items() if k.startswith("anchor.unroll.")}
    print(f"{len(columns['own step']):,} response tokens; {', '.join(f'{k} {v}' for k, v in unroll.items())}\n")
    print("| | rank correlation | " + " | ".join(f"overlap at rho {rho}" for rho in KEPT) + " |")
    print("|---" * (2 + len(KEPT)) + "|")
    for one, other in (("own step", "snapshots"), ("own step", "minus the loss"), ("snapshots", "minus the loss")):
        shares = [overlap(columns[one], columns[other], rho) for rho in KEPT]
        cells = [f"{rank_correlation(columns[one], columns[other]):+.3f}", *[f"{share:.3f}" for share in shares]]
        print(f"| {one} and {other} | " + " | ".join(cells) + " |")
    print("| two random masks | +0.000 | " + " | ".join(f"{rho / (2 - rho):.3f}" for rho in KEPT) + " |")
    print(f"\nvalues at own steps above 0: {(columns['own step'] > 0).mean():.1%}; seconds of anchor (both): ", end="")
    print(f"{stages['anchor']['seconds']:,.0f}, of value (for the snapshots alone): {stages['value']['seconds']:,.0f}")


if __name__ == "__main__":
    main()
