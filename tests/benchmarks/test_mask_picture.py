"""The picture of a mask: every token is drawn once, kept ones on colour, and text stays text."""

import xml.etree.ElementTree as ElementTree

from benchmarks.mask_picture import COLUMNS, Piece, drawn
from tests.docs.pages import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str, kind: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.get("class") == kind]


def test_every_token_is_drawn_once_and_only_kept_ones_on_colour():
    response = [Piece("def", False), Piece(" main\n", True), Piece("\n\n  ", True), Piece("</text><b>&", False)]
    svg = drawn("what & <why>", response)
    assert texts(svg, "prompt") == ["what & <why>"]
    assert texts(svg, "dropped") == ["def", "</text><b>&"]
    assert texts(svg, "kept") == [" main\u21b5", "\u21b5", "\u21b5"]
    rectangles = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}rect") if e.get("class") == "kept"]
    assert len(rectangles) == 4  # three line breaks and the blanks after the last
    assert "<title>2 of 4 response tokens are kept</title>" in svg


def test_long_lines_are_wrapped_within_the_page():
    svg = ElementTree.fromstring(drawn("ask", [Piece(" word", bool(i % 2)) for i in range(100)]))
    width = float(svg.get("width"))
    placed = [float(e.get("x")) + float(e.get("textLength")) for e in svg.iter(f"{SVG}text")]
    assert len(placed) == 101 and max(placed) < width
    assert len({e.get("y") for e in svg.iter(f"{SVG}text")}) == 1 + -(-100 // (COLUMNS // 5))


def test_the_one_in_the_readme_shows_both():
    svg = (ROOT / "docs/images/mask.svg").read_text(encoding="utf-8")
    assert len(texts(svg, "kept")) > 10 and len(texts(svg, "dropped")) > 10 and len(texts(svg, "prompt")) > 1
    assert "(docs/images/mask.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
