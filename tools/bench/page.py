"""Records of benchmarks as one HTML page: tables, plots, and how each was measured."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from tools.bench.cases import FAILED
from tools.bench.figures import figures_of
from tools.bench.report import PRESENTATIONS, device_text, table_of
from tools.trials.page import facts_table, flat_text, html_document
from tools.trials.plots import svg_image


def html_page(records: Mapping[str, dict[str, Any]]) -> str:
    """The page of records by their keys."""
    titles = {key: _title(record) for key, record in records.items()}
    links = "\n".join(
        f'<li><a href="#{html.escape(key)}">{html.escape(title)}</a></li>' for key, title in titles.items()
    )
    body = [f"<h1>Mnemosyne benchmarks</h1>\n<ul>\n{links}\n</ul>"]
    body += [_section(key, titles[key], record) for key, record in records.items()]
    return html_document("Mnemosyne benchmarks", "\n".join(body))


def _title(record: dict[str, Any]) -> str:
    return f"{PRESENTATIONS[record['name']].title} ({device_text(record)})"


def _section(key: str, title: str, record: dict[str, Any]) -> str:
    """One record: its plots, its table, what failed, and its origin."""
    parts = [f'<section id="{html.escape(key)}">\n<h2>{html.escape(title)}</h2>']
    for heading, figure in figures_of(record["name"], record["results"]).items():
        parts.append(f"<h3>{html.escape(heading)}</h3>\n{svg_image(figure, html.escape(f'{heading}: {title}'))}")
    parts.append(table_of(record).html())
    failures = [
        f"<li><pre>{html.escape(str(row.get('why') or row.get('last_lines')))}</pre></li>"
        for row in record["results"]
        if FAILED in (row.get("outcome"), row.get("status"))
    ]
    if failures:
        parts.append("<h3>Failed</h3>\n<ul>\n" + "\n".join(failures) + "\n</ul>")
    facts = [
        (name, flat_text(record[name])) for name in ("date", "command", "commit", "hardware", "versions", "settings")
    ]
    if record["uncommitted_changes"]:
        facts.append(("uncommitted changes", "yes"))
    parts.append(f"<details>\n<summary>How this was measured</summary>\n{facts_table(facts)}\n</details>\n</section>")
    return "\n".join(parts)
