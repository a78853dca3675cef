"""A report of more compressors than colours names every one of them."""

import pytest

from tcjax.study import plots, ranking
from tests.test_report import clean_study, row

MANY = [*clean_study()[:5], *(row(f"family_{i}", 16, count=0.1 + 0.07 * i, read=0) for i in range(8))]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    for module in (plots, ranking):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure) or path)
    return figures


def test_nine_compressors_are_too_many_for_eight_colours():
    assert plots.crowded(MANY)
    assert not plots.crowded(MANY[:11])  # the reference and eight others
    assert plots.crowded(MANY[1:12])  # nine and no reference
    assert not plots.crowded(MANY[1:11])


def test_the_best_stands_at_the_top_and_each_point_at_its_accuracy(drawn, tmp_path):
    ranking.ranking(MANY, tmp_path / "accuracy.png")
    mean, count, *others = drawn[0].axes
    assert [axes.get_title("left") for axes in others] == ["read", "caption"]
    named = [label.get_text() for label in mean.get_yticklabels()]
    assert len(named) == 12
    assert named[-1] == "resampler, 16"
    assert named[0] == "family_0, 16"
    marked = {line.get_ydata()[0]: line.get_xdata()[0] for line in count.lines if line.get_marker() == "o"}
    assert {named[height]: at for height, at in marked.items()} == pytest.approx(
        {f"{r['compressor']}, {r['visual_tokens']}": r["accuracy"]["count"]["mean"] for r in MANY[1:]}
    )


def test_of_many_the_cost_picture_names_those_that_nothing_cheaper_beats(drawn, tmp_path):
    plots.cost(MANY, tmp_path / "cost.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["mlp, 64", "resampler, 16", "resampler, 4"]
    assert not drawn[0].legends
