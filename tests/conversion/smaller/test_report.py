"""The picture of a conversion, as it is drawn."""

import pytest
from matplotlib.figure import Figure

from conversion.smaller.report import Row, plot, provenance


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


def test_panels_of_long_texts(monkeypatch, tmp_path):
    """What source and result find, and their losses by position, are drawn as they are."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    found = [
        {
            "model": name, "cache_bytes_per_token": size, "found": part,
            "loss_by_position": [{"first": 1, "loss": first}, {"first": 2, "loss": second}],
        }
        for name, size, part, first, second in (("source", 512, 0.75, 3.0, 2.0), ("result", 256, 0.5, 3.5, 2.5))
    ]  # fmt: skip
    plot([Row("source", 512, 20.0), Row("healed", 256, 21.0)], tmp_path / "plot.png", found)
    (figure,) = figures
    _, parts, losses = figure.axes
    assert [line.get_xydata().tolist() for line in parts.lines] == [[[512, 75]], [[256, 50]]]
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[1, 3], [2, 2]], [[1, 3.5], [2, 2.5]]]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["source", "result"]


@pytest.mark.parametrize("source", ["/home/me/llama", "../me/llama", "someone/llama"])
def test_no_folder_of_this_machine_is_published(source):
    on_hub = source if source == "someone/llama" else None
    words = ["hf", source, "me/t6", "--calibration=/home/me/text.txt", "--heal", "../me/more.txt", "--cache-ratio=2"]
    report = provenance(words, source, "llama", on_hub)
    assert report["command"] == (
        f"python -m conversion hf {on_hub or 'llama'} t6 --calibration=text.txt --heal more.txt --cache-ratio=2"
    )
    assert report["source"] == (on_hub or "llama")
