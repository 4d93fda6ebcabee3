"""Plots by what is drawn: labels that can be read, series that can be told apart."""

import pytest

from slimrank.report import plots


@pytest.fixture
def drawn(monkeypatch):
    """The axes of a plot instead of its SVG."""

    def axes(figure, label):
        figure.canvas.draw()
        return figure.axes[0]

    monkeypatch.setattr(plots, "inline", axes)


@pytest.mark.parametrize("worst, between", [(30.0, True), (5000.0, False)])
def test_numbers_between_powers_of_ten_where_there_is_room(worst, between, drawn):
    axes = plots.sizes({"a 0.8": (0.8, 12.0), "a 0.6": (0.6, worst)}, ["a 0.6", "a 0.8"], 10.0, "sizes")
    assert any(tick.get_text() for tick in axes.get_yticklabels(minor=True)) is between
    assert any(tick.get_text() for tick in axes.get_yticklabels())


def test_many_series_can_be_told_apart(drawn):
    axes = plots.sizes({f"method {chr(97 + i)}": (0.8, 12.0 + i) for i in range(20)}, ["method a"], 10.0, "sizes")
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_label().startswith("method")}
    assert len(styles) == 20
