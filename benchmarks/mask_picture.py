"""The picture of a mask at the top of the README: `python -m benchmarks.mask_picture RUN [--mask default] [--row N]`.

One row of a run as an SVG: the prompt in grey, of the response the kept tokens on colour and the others struck out, so
that the two can be told apart without colour. A line break that is a token is shown as an arrow. Written to
docs/images/mask.svg; the row is the one with the shortest response, or the one whose id ends in `:N`.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.pipeline.maths.batch import IGNORED
from alphatoken.pipeline.prepare.example import example_model

COLUMNS, CHARACTER, LINE, MARGIN = 92, 7.8, 21, 14  # characters in a line; the rest in pixels
STYLE = """
  text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2328; }
  .prompt { fill: #6e7781; }
  .dropped { fill: #8c959f; text-decoration: line-through; }
  rect.page { fill: #ffffff; stroke: #d0d7de; }
  rect.kept { fill: #c8ecd0; }
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a response, as text, and whether it is kept."""

    text: str
    kept: bool


def read(run: Path, mask: str, row: str | None) -> tuple[list[int], list[Piece]]:
    """Token ids of the prompt, pieces of the response, of the row that was asked for."""
    masks = pq.read_table(sorted((run / "masks" / mask).rglob("train-*.parquet"))).to_pylist()
    rows = pq.read_table(sorted((run / "prepared").glob("part-*.parquet"))).to_pylist()
    pairs = [(p, m) for p, m in zip(rows, masks, strict=True) if row is None or p["id"].endswith(f":{row}")]
    if not pairs:
        raise SystemExit(f"{run}: no row whose id ends in :{row}")
    prepared, masked = min(pairs, key=lambda pair: sum(label != IGNORED for label in pair[0]["labels"]))
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    prompt = [i for i, label in zip(prepared["input_ids"], prepared["labels"], strict=True) if label == IGNORED]
    return prompt, pieces(tokenizer, prepared, masked)


def pieces(tokenizer: PreTrainedTokenizerBase, prepared: dict, masked: dict) -> list[Piece]:
    """The response tokens of a row, in order."""
    columns = zip(prepared["input_ids"], prepared["labels"], masked["labels"], strict=True)
    return [Piece(tokenizer.decode([i]), kept != IGNORED) for i, label, kept in columns if label != IGNORED]


def drawn(prompt: str, response: list[Piece]) -> str:
    """The SVG."""
    body: list[str] = []
    line = 0
    for text in textwrap.wrap(" ".join(prompt.split()), COLUMNS):
        body.append(_text(text, 0, line, "prompt"))
        line += 1
    line, column = line + 0.4, 0
    for piece in response:
        for part in piece.text.replace("\n", "\u21b5\n").splitlines(keepends=True):
            shown = part.rstrip("\n")
            if column and column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            if piece.kept:
                body.append(
                    f'<rect class="kept" x="{_x(column):.1f}" y="{_y(line) - 15:.1f}" '
                    f'width="{len(shown) * CHARACTER - 0.8:.1f}" height="19" rx="3"/>'
                )
            body.append(_text(shown, column, line, "kept" if piece.kept else "dropped"))
            column += len(shown)
            if part.endswith("\n"):
                line, column = line + 1, 0
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, (line + 1) * LINE + 2 * MARGIN
    kept = sum(piece.kept for piece in response)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">',
            f"<title>{kept} of {len(response)} response tokens are kept</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="6"/>',
            *body,
            "</svg>\n",
        ]
    )


def _x(column: float) -> float:
    return MARGIN + column * CHARACTER


def _y(line: float) -> float:
    return MARGIN + line * LINE + 15


def _text(text: str, column: int, line: float, kind: str) -> str:
    if not text.strip():
        return "" if kind != "dropped" else _line(text, column, line)
    place = f'x="{_x(column):.1f}" y="{_y(line):.1f}" textLength="{len(text) * CHARACTER:.1f}"'
    return f'<text class="{kind}" xml:space="preserve" {place}>{escape(text, quote=False)}</text>'


def _line(text: str, column: int, line: float) -> str:
    """Blanks that are dropped: only the line through them is seen."""
    height = _y(line) - 4
    end = _x(column + len(text))
    return f'<path d="M{_x(column):.1f} {height:.1f}H{end:.1f}" stroke="#8c959f"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description="The picture of a mask.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--mask", default="default")
    parser.add_argument("--row", help="the number at the end of the row's id")
    parser.add_argument("--write", type=Path, default=Path("docs/images/mask.svg"))
    arguments = parser.parse_args()
    prompt, response = read(arguments.run, arguments.mask, arguments.row)
    asked = AutoTokenizer.from_pretrained(example_model()).decode(prompt).rpartition("<|im_start|>user\n")[2]
    arguments.write.write_text(drawn(asked.partition("<|im_end|>")[0], response), encoding="utf-8")
    print(f"{arguments.write}: {sum(p.kept for p in response)} of {len(response)} response tokens kept")


if __name__ == "__main__":
    main()
