"""Plots show every trial, every seed and chance; labels do not overlap; the same results give the same image."""

from __future__ import annotations

import itertools

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from tests.tools.trials.report_cases import VARIANTS, full_record, result
from tools.trials.plots import STYLE, curves_figure, positions_figure, probes_figure, svg_image
from tools.trials.record import Record

FIGURES = {"curves": curves_figure, "probes": probes_figure, "positions": positions_figure}
SHOWN = [
    ("variants", "curves"),
    ("variants", "probes"),
    ("ablations", "curves"),
    ("ablations", "probes"),
    ("text", "curves"),
    ("text", "probes"),
    ("text", "positions"),
]


def drawn(study, kind):
    """The figure, laid out."""
    figure = FIGURES[kind](full_record().of_study(study))
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure).draw()
    return figure


def horizontal_positions(axes):
    """x of every drawn point of a panel, by its colour."""
    points = {}
    for line in axes.lines:
        if line.get_marker() == "o":
            points.setdefault(line.get_color(), []).extend(line.get_xdata())
    return points


@pytest.mark.parametrize(("study", "kind"), SHOWN)
def test_labels_do_not_overlap_and_lie_inside(study, kind):
    figure = drawn(study, kind)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    # Ticks outside of an axis' limits exist, but are not drawn.
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels()
        if label not in [tick.label1 for tick in axis._update_ticks()]
    }
    boxes = {text: text.get_window_extent() for text in texts if text not in ticks}
    assert len(boxes) > 5
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one.get_text(), other.get_text())
    for text, box in boxes.items():
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text.get_text()


def test_every_seed_is_a_point():
    figure = drawn("variants", "probes")
    results = full_record().of_study("variants")
    for axes, probe in zip(figure.axes, results.study.probes, strict=True):
        shown = sorted(tuple(sorted(values)) for values in horizontal_positions(axes).values())
        expected = sorted(tuple(sorted(results.probe_values(trial, probe).values())) for trial in VARIANTS)
        assert shown == expected
        assert [1 / 32, 1 / 32] in [list(line.get_xdata()) for line in axes.lines]  # the chance line


def test_curves_are_means_with_a_band_and_diverged_seeds_end_in_a_cross():
    axes = drawn("variants", "curves").axes[0]
    assert len(axes.collections) == len(VARIANTS)
    crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [(200, 0.1)]


def test_trials_are_told_apart_and_named_with_what_they_lack():
    figure = drawn("ablations", "curves")
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
    assert len(set(looks)) == len(looks) == 17  # sixteen trials and the chance line
    names = [text.get_text() for text in drawn("variants", "probes").axes[0].get_yticklabels()]
    assert names == ["lmm", "mac", "mag", "mal (1 diverged, 1 missing)", "transformer (1 missing)"]


def test_the_trained_length_is_marked_in_loss_by_position():
    figure = drawn("text", "positions")
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [
        "as trained",
        "4 times as long",
        "16 times as long",
    ]
    for axes in (axes for axes in figure.axes if axes.axison):
        assert axes.get_xscale() == "log"
        assert [256, 256] in [list(line.get_xdata()) for line in axes.lines]
    assert figure.legends[0].get_texts()[-1].get_text() == "trained on 256 tokens"


def test_a_loss_that_blew_up_does_not_flatten_the_others():
    record = full_record()
    exploded = result("text", "lmm", 0, chance=None, curve=[[50, 7.0], [100, 1e9]], failed="FloatingPointError: nan")
    results = tuple(
        exploded if (run.study, run.trial, run.seed) == ("text", "lmm", 0) else run for run in record.results
    )
    figure = curves_figure(record.model_copy(update={"results": results}).of_study("text"))
    assert figure.axes[0].get_ylim()[1] < 10


def test_a_study_without_results_has_no_plots():
    record = full_record()
    empty = Record(command="c", studies=record.studies, results=())
    assert [figure(empty.of_study("text")) for figure in FIGURES.values()] == [None, None, None]
    assert positions_figure(record.of_study("variants")) is None


def test_the_same_results_give_the_same_image():
    results = full_record().of_study("variants")
    assert svg_image(probes_figure(results), "x") == svg_image(probes_figure(results), "x")
