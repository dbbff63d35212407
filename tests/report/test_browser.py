"""The page in a real browser: what a reader can do with it, and what rows cannot do to it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.trial.verdict import SUMMARY
from tests.mask.synthetic_run import masks
from tests.report.chromium import chromium, looking_at
from tests.report.shown_run import HOSTILE, PLAIN, report_on, with_masks, write_shown


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    made = write_shown(tmp_path_factory.mktemp("shown"), zero=("stability_causal",))
    return with_masks(
        made,
        default={"min_kept": 1, "skip_first": 1},
        paper={"score": "paper"},
        example={"score": "entropy", "scope": "example"},
    )


@pytest.fixture(scope="module")
def page_file(storage):
    return report_on(storage)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    made = write_shown(
        tmp_path_factory.mktemp("hostile"), words=[*PLAIN, *HOSTILE], ids="<img src=x onerror=window.hacked=3>{}</h3>",
        source="</script><script>window.hacked=4</script>",
    )  # fmt: skip
    return report_on(with_masks(made, default={"min_kept": 1}, paper={"score": "paper"}))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = write_shown(tmp_path_factory.mktemp("pairs"), pairs=True)
    return report_on(with_masks(made, default={}, third={"rho": 0.3}))


TRIED = {"full": (1.31, 0.042), "default": (1.27, 0.031), "paper": (1.29, 0.036)}


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """With a trial whose numbers are those of TRIED; of two masks and all tokens, and of a model that was left as it is."""
    made = with_masks(write_shown(tmp_path_factory.mktemp("tried")), default={"min_kept": 1}, paper={"score": "paper"})
    lines = [
        {
            "name": name,
            "kind": "mask" if name != "full" else "full",
            "adaptation": (loss, 0.004),
            "retention": (moved, 0.001),
        }
        for name, (loss, moved) in TRIED.items()
    ]
    lines.append({"name": "untouched", "kind": "untouched", "adaptation": (2.5, 0.0), "retention": (0.0, 0.0)})
    summary = {
        "sentence": "Train on mask default.", "winner": "default", "lines": lines, "settings": {"train": "layers"},
        "layers": 3, "steps": 12, "examples": 24, "pairs": False, "held_out_rows": 8, "retention_rows": 0,
        "held_out_made_directions": False, "completions": 6,
    }  # fmt: skip
    made.write_json(SUMMARY, summary)
    manifest = Manifest(made)
    manifest.begin("trial", {}, {})
    manifest.finish("trial", 0.0)
    return report_on(made)


@pytest.mark.parametrize("width", [400, 1200])
def test_the_plot_of_a_trial_has_a_dot_with_its_name_where_each_mask_stands(browser, tried, width):
    with looking_at(browser, tried, viewport={"width": width, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert "Train on mask default." in page.locator("section[aria-labelledby=h-trial]").inner_text()
        plot = page.locator("svg.trial")
        frame = plot.locator("rect.frame").bounding_box()
        dots = {dot.locator("title").text_content().split(":")[0]: dot for dot in plot.locator("g.dot").all()}
        assert set(dots) == set(TRIED)  # the untouched model would push all others into a corner
        boxes = {name: dot.locator("circle").bounding_box() for name, dot in dots.items()}
        for name, box in boxes.items():
            assert frame["x"] < box["x"] and box["x"] + box["width"] < frame["x"] + frame["width"], name
            assert frame["y"] < box["y"] and box["y"] + box["height"] < frame["y"] + frame["height"], name
            assert all(line.bounding_box()["x"] >= frame["x"] for line in dots[name].locator("line").all())
        assert sorted(TRIED, key=lambda name: boxes[name]["x"]) == sorted(TRIED, key=lambda name: TRIED[name][0])
        assert sorted(TRIED, key=lambda name: -boxes[name]["y"]) == sorted(TRIED, key=lambda name: TRIED[name][1])
        assert plot.locator(".labels text").all_text_contents() == list(TRIED)
        assert "wins" in dots["default"].get_attribute("class") and plot.locator("g.wins").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_every_width_and_scheme(browser, page_file, width, scheme):
    with looking_at(browser, page_file, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        assert page.locator(".row").count() == 12
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        assert page.locator(".side").first.bounding_box()["width"] > 0.85 * min(width, 600) * 0.9


def test_whatever_rows_say_is_text(browser, hostile):
    with looking_at(browser, hostile) as page:
        assert "<img src=x onerror=window.hacked=3>" in page.locator(".row h3").first.inner_text()
        assert "</script><script>window.hacked=4</script>:" in page.locator(".row h3").first.inner_text()
        # What would move a cursor, or turn the line around, is seen.
        for word in [*HOSTILE[:5], "␛[31m", "\\u202e", *HOSTILE[7:]]:
            page.fill("#query", word)
            assert word in page.locator("#rows .tokens").first.inner_text()
        page.locator("[data-i]").first.hover()
        assert page.locator("img").count() == 0 and page.locator("script").count() == 2
        assert page.evaluate("window.hacked") is None


def test_the_policy_lets_nothing_else_run_or_load(browser, hostile):
    """What would happen if a text got through all the same; the browser complains of it, so nothing is promised here."""
    page = browser.new_page()
    page.goto(hostile.as_uri())
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 5'}))"
    )
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 6\">')")
    refused = "fetch(location.href).then(() => 'loaded', () => 'refused')"
    assert page.evaluate(refused) == "refused" and page.evaluate("window.hacked") is None
    page.close()


def test_a_mask_that_is_chosen_shows_its_own_settings_counts_and_agreements(browser, page_file, storage):
    with looking_at(browser, page_file) as page:
        for number, name in enumerate(["default", "paper", "example"]):
            page.select_option("#mask-a", label=name)
            summary = storage.read_json(f"masks/{name}/summary.json")
            assert json.loads(page.locator("#mask-settings").inner_text()) == summary["settings"]
            assert page.locator("#masks tbody td[data-mask]").all_inner_texts()[number] == "1.000"
            kept = sum(int(text.split(" of ")[0].split()[-1]) for text in _all_sides(page))
            assert kept == summary["kept_tokens"]  # all rows are here


def _all_sides(page):
    found = page.locator(".side p").all_inner_texts()
    while page.locator("#after").is_enabled():
        page.locator("#after").click()
        found += page.locator(".side p").all_inner_texts()
    return found


def test_two_masks_stand_side_by_side_and_their_differences_are_marked(browser, page_file, storage):
    with looking_at(browser, page_file) as page:
        page.select_option("#mask-b", label="paper")
        page.select_option("#sort", "changed")
        row = page.locator(".row").first
        boxes = [side.bounding_box() for side in row.locator(".side").all()]
        assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
        tokens = [side.locator("[data-i]").all() for side in row.locator(".side").all()]
        kept = [["k" in token.get_attribute("class").split() for token in side] for side in tokens]
        marked = [["other" in token.get_attribute("class").split() for token in side] for side in tokens]
        assert marked[0] == marked[1] == [a != b for a, b in zip(*kept, strict=True)] and any(marked[0])
        page.select_option("#only", "changed")
        differ = sum((a != b).any() for a, b in _decisions(storage, "default", "paper"))
        assert page.locator("#found").inner_text().startswith(f"{differ} of the 30 rows here")


def _decisions(storage, *names):
    """Per row, what each of the masks keeps."""
    rows = [[np.array(row["labels"]) != -100 for row in masks(storage, name)] for name in names]
    return zip(*rows, strict=True)


def test_rows_that_keep_only_always_kept_tokens_come_first(browser, page_file, storage):
    only = storage.read_json("masks/default/summary.json")["rows_with_only_always_kept"]
    assert only
    with looking_at(browser, page_file) as page:
        assert all(row.locator(".tag").count() for row in page.locator(".row").all()[: min(only, 12)])
        page.select_option("#only", "only")
        assert page.locator("#found").inner_text().startswith(f"{only} of the 30 rows here")


def test_rows_are_searched_by_id_and_by_text_and_sorted(browser, page_file):
    with looking_at(browser, page_file) as page:
        page.fill("#query", "ROW-17")
        assert page.locator(".row h3").all_inner_texts()[0].startswith("row-17 ") and page.locator(".row").count() == 1
        page.fill("#query", "owls")
        assert page.locator(".row").count() > 0 and "owls" in page.locator(".row").first.inner_text()
        page.fill("#query", "no such text")
        assert page.locator("#found").inner_text() == "None of the 30 rows here."
        page.fill("#query", "")
        page.select_option("#sort", "longest")
        assert page.locator(".row h3").all_inner_texts()[0].startswith("row-29 ")
        page.select_option("#sort", "order")
        assert page.locator(".row h3").all_inner_texts()[1].startswith("row-1 ")


def test_the_keyboard_reaches_every_token_and_its_numbers(browser, page_file, storage):
    with looking_at(browser, page_file) as page:
        page.select_option("#sort", "longest")
        page.locator("#query").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.dataset.i") == "3"  # the first after three of the prompt
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.dataset.i") == "4"
        tip = page.locator("#tip")
        assert "number 2 of 30" in tip.inner_text() and "information" in tip.inner_text()
        assert "threshold" in tip.inner_text() and "rank here" in tip.inner_text()
        assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
        page.keyboard.press("End")
        assert "mask.always_keep" in tip.inner_text() or "information" in tip.inner_text()
        page.keyboard.press("Home")
        assert "mask.skip_first leaves it out" in tip.inner_text()
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        page.keyboard.press("Tab")
        inside = "document.activeElement.closest('.row').querySelector('h3').textContent.startsWith('row-28')"
        assert page.evaluate(inside)  # one stop per row, not one per token


def test_touch_shows_the_numbers_at_the_bottom_of_a_narrow_screen(browser, page_file):
    with looking_at(browser, page_file, viewport={"width": 400, "height": 700}, has_touch=True) as page:
        page.locator("[data-i]").first.tap()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and 600 < box["y"] + box["height"] <= 700


def test_numbers_of_a_token_are_those_of_the_values(browser, page_file, storage):
    values = pq.read_table(storage.path("values/part-00001-of-00002.parquet")).to_pylist()[29 - 16]
    with looking_at(browser, page_file) as page:
        page.select_option("#sort", "longest")
        for place in (0, 7, 28):
            page.locator(".row").first.locator("[data-i]").nth(place).hover()
            lines = page.locator("#tip table tbody tr").all()
            rows = [line.locator("th, td").all_text_contents() for line in lines]  # whether it is in sight or not
            shown = {row[0].replace(" ", "_"): float(row[1]) for row in rows if not row[0].startswith("value of")}
            assert shown == {name: pytest.approx(values[name][3 + place], rel=6e-3, abs=1e-4) for name in shown}
            assert len(shown) == 8


def test_charts_are_of_what_varies_alone(browser, page_file):
    with looking_at(browser, page_file) as page:
        titles = page.locator("#charts figcaption b").all_inner_texts()
        assert "information" in titles and "adaptation direct" in titles and "stability causal" not in titles
        assert "not drawn: stability causal" in page.locator("#charts").inner_text()
        for title in ("By position in the response", "By loss", "By source", "Rank correlations of scores"):
            assert page.get_by_role("heading", name=title).count() == 1


def test_pairs_stand_side_by_side(browser, pairs):
    with looking_at(browser, pairs) as page:
        names = page.locator(".row").first.locator(".side b").all_inner_texts()
        assert names == ["chosen, default", "rejected, default"]
        page.select_option("#mask-b", label="third")
        assert page.locator(".row").first.locator(".side").count() == 4
        assert page.locator("#charts h3").all_inner_texts().count("chosen") == 1


def test_without_script_masks_and_settings_are_there(browser, page_file):
    with looking_at(browser, page_file, java_script_enabled=False) as page:
        assert (
            page.locator("#masks tbody tr").count() == 3 and "runs no script" in page.locator("noscript").inner_text()
        )
        assert not page.locator("#app").is_visible()
