"""The picture of a conversion, as it is drawn."""

import pytest
from matplotlib.figure import Figure

from conversion.smaller.report import Row, plot


@pytest.mark.parametrize(
    "perplexities",
    [(1046.1284, 1046.1284, 1046.3738, 1046.1076), (6.12, 6.12, 845.2, 7.9), (3.4567, 3.4567)],
    ids=["nearly equal", "far apart", "one point"],
)
def test_axes_read(perplexities, monkeypatch, tmp_path):
    """Labels are the numbers themselves, several and distinct, and every point is inside."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    sizes = (512, 512, 256, 256)
    plot([Row(str(index), *pair) for index, pair in enumerate(zip(sizes, perplexities))], tmp_path / "plot.png")
    (figure,) = figures
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < min(perplexities) and max(perplexities) < high
    labels = {label.get_text(): label.get_position()[1] for label in axes.get_yticklabels()}
    inside = {text: place for text, place in labels.items() if low <= place <= high}
    assert len(inside) >= 3 and axes.yaxis.get_offset_text().get_text() == ""
    assert all(float(text) == pytest.approx(place, rel=1e-5) for text, place in inside.items())
