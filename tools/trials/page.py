"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from tools.command import duration
from tools.trials.plots import curves_figure, positions_figure, probes_figure, svg_image
from tools.trials.record import Record, StudyResults
from tools.trials.results import Result
from tools.trials.tables import memory_table, study_table

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1, h2, h3 {{ line-height: 1.25; font-weight: 600; }}
h2 {{ margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid #ddd; }}
h3 {{ font-size: 1rem; margin: 1.8rem 0 0.4rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.8rem 0.25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee;
  vertical-align: top; font-weight: 400; }}
th:first-child, .facts td {{ text-align: left; }}
.facts td {{ white-space: normal; }}
thead th {{ min-width: 4rem; white-space: normal; font-weight: 600; border-bottom: 1px solid #999;
  vertical-align: bottom; }}
summary {{ font-weight: 600; cursor: pointer; }}
img {{ max-width: 100%; height: auto; }}
.note, .name {{ color: #666; font-size: 0.86rem; }}
code {{ font-size: 0.86rem; overflow-wrap: anywhere; }}
</style>
{head}</head>
<body>
{body}
</body>
</html>
"""


def html_page(record: Record) -> str:
    """The report: what there is, then each study's table and plots, then how the results were made."""
    studies = {name: record.of_study(name) for name in record.studies}
    parts = ["<h1>Mnemosyne trials</h1>", f"<p>{html.escape(_counts(record))}</p>", _contents(studies)]
    parts += [_study(name, results) for name, results in studies.items()]
    parts.append(_origin(record))
    return html_document("Mnemosyne trials", "\n".join(parts))


def html_document(title: str, body: str, head: str = "") -> str:
    """A whole page that needs nothing beside it; `title` is text, `body` HTML, and so is what its head ends with."""
    return _PAGE.format(title=html.escape(title), body=body, head=head)


def _counts(record: Record) -> str:
    """How many runs there should be, and what became of them."""
    diverged = sum(result.failed is not None for result in record.results)
    counts = {
        "finished": len(record.results) - diverged,
        "diverged": diverged,
        "missing": len(record.missing()),
    }
    words = [f"{number} {what}" for what, number in counts.items() if number]
    return f"{len(record.studies)} studies of {sum(counts.values())} runs: {', '.join(words)}."


def _contents(studies: Mapping[str, StudyResults]) -> str:
    """Links to the studies."""
    links = "\n".join(
        f'<li><a href="#{html.escape(name)}">{html.escape(results.study.title)}</a></li>'
        for name, results in studies.items()
    )
    return f"<ul>\n{links}\n</ul>"


def _study(name: str, results: StudyResults) -> str:
    """One study's section."""
    title = html.escape(results.study.title)
    parts = [
        f'<section id="{html.escape(name)}">\n<h2>{title}</h2>',
        f'<p class="name">study <code>{html.escape(name)}</code>, trained on rows of '
        f"{results.study.sequence_length:,} tokens</p>",
        study_table(results).html(),
    ]
    seeds = "mean over seeds, band from smallest to largest"
    guessing = ", dotted: guessing" if results.study.metric == "accuracy" and results.chance is not None else ""
    plots = {
        f"Probes of the trained models: a point per seed, a stroke at their mean{guessing}": probes_figure(results),
        f"Held-out {results.study.metric} while training: {seeds}": curves_figure(results),
        f"Loss by position in the row: {seeds}": positions_figure(results),
    }
    parts += [_plot(heading, figure, title) for heading, figure in plots.items() if figure is not None]
    memories = memory_table(results)
    if memories is not None:
        summary = "What the memories did at the end of training"
        parts.append(f"<details>\n<summary>{summary}</summary>\n{memories.html()}\n</details>")
    failures = [result for trial in results.study.trials for result in results.diverged(trial)]
    if failures:
        parts.append("<h3>Diverged</h3>\n" + _list(f"{_run(result)}: {result.failed}" for result in failures))
    missing = [
        f"{trial}: seed {', '.join(map(str, results.missing(trial)))}"
        for trial in results.study.trials
        if results.missing(trial)
    ]
    if missing:
        parts.append("<h3>Missing: not run, or not to the end</h3>\n" + _list(missing))
    return "\n".join([*parts, "</section>"])


def _plot(heading: str, figure: Figure, title: str) -> str:
    """A plot under its heading."""
    return f"<h3>{html.escape(heading)}</h3>\n{svg_image(figure, f'{html.escape(heading)}: {title}')}"


def _list(items: Iterable[str]) -> str:
    """Lines of text as an HTML list."""
    return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"


def _run(result: Result) -> str:
    """A run in words."""
    return f"{result.trial}, seed {result.seed}"


def _origin(record: Record) -> str:
    """How the results were made: command, time, and each environment with the number of its runs."""
    facts: list[tuple[str, str]] = [("last command", record.command)]
    facts.append(("training, all runs together", duration(sum(result.seconds for result in record.results))))
    if record.seconds is not None:
        facts.append(("wall time of all calls", duration(record.seconds)))
    threads = sorted({result.threads for result in record.results})
    facts.append(("threads of a run", ", ".join(map(str, threads))))
    environments: list[tuple[dict[str, Any], int]] = []
    for result in record.results:
        for index, (environment, number) in enumerate(environments):
            if environment == result.environment:
                environments[index] = (environment, number + 1)
                break
        else:
            environments.append((result.environment, 1))
    for environment, number in environments:
        if len(environments) > 1:
            facts.append((f"environment of {number} run{'s' * (number > 1)}", ""))
        facts += [(key.replace("_", " "), flat_text(value)) for key, value in environment.items()]
    return f"<section>\n<h2>How these results were made</h2>\n{facts_table(facts)}\n</section>"


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """Names and their values as HTML."""
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in facts
    )
    return f'<table class="facts">\n{rows}\n</table>'


def flat_text(value: Any) -> str:
    """A value of a record as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {flat_text(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
