"""The pictures of the report and of inspect: of the row and masks that were asked for, and without a directory of the machine."""

import pytest

from benchmarks.pictures import SIZE, in_a_terminal, in_the_report, row_id
from tests.report.chromium import chromium, looking_at
from tests.report.shown_run import report_on, with_masks, write_shown

MASKS = ("default", "paper")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    made = write_shown(tmp_path_factory.mktemp("shown"), ids="/some/where/rows.jsonl:{}")
    return with_masks(made, default={}, paper={"score": "paper"})


def test_the_row_in_the_report_stands_below_the_bar_with_the_numbers_of_a_token(storage, tmp_path_factory):
    file = report_on(storage)
    row = row_id(file.parents[1], "17")
    with chromium() as browser, looking_at(browser, file, viewport=SIZE) as page:
        picture = in_the_report(page, row, MASKS, 2)
        assert picture.startswith(b"\x89PNG")
        assert page.locator(".row h3").first.inner_text().startswith("rows.jsonl:17 ")
        assert "number 3 of" in page.locator("#tip").inner_text()
        bar, block = (page.locator(place).first.bounding_box() for place in ("#controls", ".row"))
        assert bar["height"] <= block["y"] < SIZE["height"] / 2
        assert page.locator(".row .side").count() == 2


def test_the_row_in_a_terminal_loads_no_font_and_names_no_directory(storage):
    run = report_on(storage).parents[1]
    svg = in_a_terminal(run, row_id(run, "17"), MASKS)
    assert "runs/demo" in svg and "rows.jsonl:17" in svg and "default,paper" in svg
    assert "/some/where" not in svg and str(run) not in svg and "@font-face" not in svg
    with pytest.raises(SystemExit, match="no row whose id ends in :999"):
        row_id(run, "999")
