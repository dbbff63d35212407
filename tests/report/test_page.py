"""The page about a run."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.conftest import SMALL, chat_row, write_rows

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster, policy):
    """A run on rows that try to break the page, with one row for the quarantine."""
    from alphatoken.jobs.cli import main

    place = tmp_path_factory.mktemp("run")
    rows = [{**chat_row(i), "id": f"<script>alert({i})</script>"} for i in range(20)]
    rows[3]["messages"][1]["content"] = "</span><img src=x onerror=alert(1)> the quick fox"
    train = write_rows(place / "train.jsonl", [*rows, {"other": 1}])
    arguments = [f"run.dir={place}/r", f"model.policy={policy}", f"data.train={train}", *SMALL, "data.validation=3"]
    assert main(["run", *arguments]) == 0
    return place / "r"


def test_the_page_is_self_contained_and_whatever_rows_say_is_text(run):
    html = (run / "report/index.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "onerror", "onload"} & names and "url(" not in html and "@import" not in html
    assert not re.search(r"https?://", html)
    assert "&lt;script&gt;alert(" in html
    assert page.tags.count("svg") == 1 + 8 + 1 and html.count('class="example"') == 4


def test_the_page_says_what_was_kept_and_what_went_wrong(run, alphatoken):
    assert alphatoken("mask", "-m", f"run.dir={run}", "mask.rho=0.2,0.8")[0] == 0
    before = (run / "report/index.html").read_bytes()
    assert alphatoken("report", f"run.dir={run}")[0] == 0
    html = (run / "report/index.html").read_text()
    for name in ("default", "rho-0.2", "rho-0.8"):
        summary = json.loads((run / f"masks/{name}/summary.json").read_text())
        assert name in html and f"{summary['kept_fraction']:.1%}" in html
    assert "1 rows could not be used" in html and "100.0%" in html and "stability_weight" in html
    assert before != html.encode()
    assert alphatoken("report", f"run.dir={run}")[0] == 0
    assert (run / "report/index.html").read_text() == html


def test_the_page_of_pairs_shows_both_branches(preference_run, alphatoken):
    assert alphatoken("report", f"run.dir={preference_run}")[0] == 0
    html = (preference_run / "report/index.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    branches = json.loads((preference_run / "masks/default/summary.json").read_text())["branches"]
    for branch, summary in branches.items():
        assert f"<h3>{branch}</h3>" in html and f"default, {branch}" in html
        assert f"{summary['kept_fraction']:.1%}" in html
        assert f"{summary['kept_tokens']:,} of" not in html  # a branch is no example
    assert page.tags.count("svg") == 2 * (1 + 8 + 1) and html.count('class="example"') == 8


def test_a_report_before_its_time_names_the_command(alphatoken, tmp_path):
    status, _, err = alphatoken("report", f"run.dir={tmp_path}/none")
    assert status == 1 and "alphatoken mask" in err
