"""The page holds all that there is to say, needs nothing beside it, and shows text as it is."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest

from tests.tools.trials.report_cases import ENVIRONMENT, full_record
from tools.trials.page import html_page


class Reader(HTMLParser):
    """Text and attributes of a page, and whether its elements are closed in order."""

    EMPTY = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes, self.images = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    reader = Reader()
    reader.feed(html_page(full_record()))
    assert reader.open == []
    return reader


def test_every_study_has_its_table_and_plots(page):
    titles = [study.title for study in full_record().studies.values()]
    assert all(page.text.count(title) == 2 for title in titles)  # in the list of contents, and above the study
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 7
    for image in images:
        kind, data = image.split(",")
        assert kind == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(data)


def test_nothing_is_fetched(page):
    links = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert {f"#{name}" for name in ids} == {link for link in links if link.startswith("#")}


def test_what_failed_and_what_is_missing_is_said(page):
    assert "3 studies of 53 runs: 48 finished, 3 diverged, 2 missing." in page.text
    assert "mal, seed 1: FloatingPointError: loss is nan at step 204 <layer 1>" in page.text
    assert {"mal: seed 2", "transformer: seed 2"} <= set(page.text)


def test_the_memories_statistics_can_be_opened(page):
    assert page.text.count("What the memories did at the end of training") == 1
    assert {"mac, layer 0", "mac, layer 2", "0.925"} <= set(page.text)


def test_how_the_results_were_made_stands_at_the_end(page):
    end = page.text[page.text.index("How these results were made") :]
    assert {"python -m tools.trials run", "1 h 30 min", ENVIRONMENT["commit"]} <= set(end)
    assert any("processor Test <CPU>" in text for text in end)
    assert any("torch 2.13.0+cpu" in text for text in end)


def test_runs_of_two_environments_are_told_apart():
    record = full_record()
    other = record.results[0].model_copy(update={"environment": {"commit": "fedcba"}})
    text = html_page(record.model_copy(update={"results": (other, *record.results[1:])}))
    assert "environment of 1 run<" in text and "environment of 50 runs" in text and "fedcba" in text
