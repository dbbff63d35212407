"""The page about a run."""

import base64
import hashlib
import json
import re
from html import unescape
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
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1 and page.tags.count("link") == 1
    names = [name for name, _ in page.attributes]
    assert names.count("href") == 1 and ("href", "data:,") in page.attributes  # no icon is asked for
    assert not {"src", "style", "onerror", "onload", "onclick"} & set(names)
    assert "url(" not in html and "@import" not in html
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)", html)
    assert "<script>alert(" not in html and "\\u003cscript\\u003ealert(" in html


def test_the_policy_names_this_script_and_this_style_and_nothing_else(run):
    html = (run / "report/index.html").read_text()
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1])
    assert html.index("Content-Security-Policy") < html.index("<style>") < html.index("<script")
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        digest = hashlib.sha256(re.search(pattern, html, re.S)[1].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy and "*" not in policy


def test_the_page_says_what_was_kept_and_what_went_wrong(run, alphatoken):
    assert alphatoken("mask", "-m", f"run.dir={run}", "mask.rho=0.2,0.8")[0] == 0
    before = (run / "report/index.html").read_bytes()
    assert alphatoken("report", f"run.dir={run}")[0] == 0
    html = (run / "report/index.html").read_text()
    for name in ("default", "rho-0.2", "rho-0.8"):
        summary = json.loads((run / f"masks/{name}/summary.json").read_text())
        assert name in html and f"{summary['kept_fraction']:.1%}" in html
    assert html.count("1 rows could not be used") == 1 and "100.0%" in html and "stability_weight" in html
    assert before != html.encode()
    assert alphatoken("report", f"run.dir={run}")[0] == 0
    assert (run / "report/index.html").read_text() == html


def test_the_settings_shown_are_those_of_the_mask_shown_and_not_of_the_one_written_last(run, alphatoken):
    assert alphatoken("mask", f"run.dir={run}", "mask.name=last", "mask.rho=0.9", "mask.score=entropy")[0] == 0
    assert alphatoken("report", f"run.dir={run}", "mask.name=default")[0] == 0
    html = (run / "report/index.html").read_text()
    shown = json.loads(unescape(re.search(r'<pre id="mask-settings"[^>]*>(.*?)</pre>', html, re.S)[1]))
    assert shown == json.loads((run / "masks/default/summary.json").read_text())["settings"]
    assert json.loads((run / "run.json").read_text())["configuration"]["mask"]["rho"] == 0.9
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, re.S)[1])
    assert {mask["name"]: mask["settings"]["rho"] for mask in data["masks"]}["last"] == 0.9


def test_the_page_of_pairs_shows_both_branches(preference_run, alphatoken):
    assert alphatoken("report", f"run.dir={preference_run}")[0] == 0
    html = (preference_run / "report/index.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, re.S)[1])
    branches = json.loads((preference_run / "masks/default/summary.json").read_text())["branches"]
    assert data["branches"] == list(branches)
    for place, (branch, summary) in enumerate(branches.items()):
        assert f"default, {branch}" in html and f"{summary['kept_fraction']:.1%}" in html
        kept = sum(row["b"][place]["kept"][0] for row in data["rows"])
        assert kept == summary["kept_tokens"] == sum(data["charts"][place]["positions"]["kept"][0])


def test_a_report_of_a_run_that_is_not_there_says_so(alphatoken, tmp_path):
    status, _, err = alphatoken("report", f"run.dir={tmp_path}/none")
    assert status == 1 and "there is no such directory" in err
