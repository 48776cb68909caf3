"""The picture of T6 beside its twin: what it makes of the benchmarks' files, and that it shows it."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import figures

    return figures


def step(model, context, seconds, batch=1, **fields):
    return {"model": model, "batch": batch, "context": context, "seconds": seconds} | fields


GENERATE = {
    "results": [step("t6-xl", 1024, 9.0), step("llama-mha-xl", 1024, 1.0), step("t6-xl", 32768, 5.0, batch=8),
                step("llama-mha-xl", 32768, 10.0, batch=8), step("t6-xl", 131072, 1.0)],
    "largest": [{"model": "t6-xl", "tokens": 100, "cache_bytes": 200}, {"model": "llama-mha-xl", "tokens": 10, "cache_bytes": 100}],
}  # fmt: skip
SHORT = {
    "short": [step("llama-mha-xl", 1024, 4.0, fused=None), step("t6-xl", 1024, 3.0, fused=True),
              step("t6-xl", 1024, 8.0, fused=False)],
}  # fmt: skip
TWINS = {
    "results": {
        "small, 16 x 1024, eager, with loss": {"sums": {"step": {"t6": 3.0, "llama-mha": 2.0}}},
        "xl, 1 x 32768, prefill": {
            "sums": {
                "kernels": {"t6": 4.0, "llama-mha": 2.0},
                "attention": {"t6": 3.0, "llama-mha": 1.0},
                "all but attention": {"t6": 1.0, "llama-mha": 1.0},
            }
        },
    }
}
THROUGHPUT = {
    "command": "throughput",
    "models": {
        "llama-mha-small": {"tokens_per_second": 100, "bytes_per_token": 40},
        "t6-small": {"tokens_per_second": 160, "bytes_per_token": 10},
    },
}
LATENCY = {
    "command": "latency",
    "models": {
        name: {"rates": [{"rate": 4, "first_token_median": first, "between_median": 0.5}, {"rate": rate}]}
        for name, first, rate in (("llama-mha-small", 1.0, 16), ("t6-small", 1.5, 64))
    },
}
CPU = {
    "device": "cpu", "num_heads": 32, "dtype": "float32",
    "attention": [{"tokens": 2048, "factor space": 1.0, "cached MHA": 4.0, "rebuilt K, V": 9.0}],
}  # fmt: skip


def test_ratios(figures):
    """Of one run each: a model whose twin ran in another file, or not at all, has none. The file of short steps counts."""
    found = figures.read_figures([SHORT, GENERATE, TWINS, THROUGHPUT, LATENCY, CPU, {"results": []}, {"runs": {}}])
    assert found.decoding == {"t6-xl to MHA": [(1024, 1, 0.75), (32768, 8, 0.5)]}
    assert found.prefill == {
        "t6-xl, all": [(32768, 1, 2.0)],
        "t6-xl, all but attention": [(32768, 1, 1.0)],
        "t6-xl, attention": [(32768, 1, 3.0)],
    }
    assert found.cpu == {"32 heads, float32": [(2048, 1, 0.25)]}
    assert found.training == {"small, 16 x 1024, eager": 1.5}
    assert found.cache == {"t6-xl to MHA": 0.2, "t6-small to MHA": 0.25}
    assert found.serving == {
        "512 requests at once": 0.625,
        "first token, 4 requests/s": 1.5,
        "between tokens, 4 requests/s": 1.0,
    }


def test_picture(figures):
    """Each panel shows its numbers; one of which nothing is known is left out."""
    figure = Figure(layout="constrained")
    figures.draw_figures(figures.read_figures([SHORT, GENERATE, THROUGHPUT]), figure)
    figure.draw_without_rendering()
    panels = {axis.get_title(): axis for axis in figure.get_axes()}
    assert list(panels) == ["a decoding step, time", "a token in the cache, bytes", "t6-small in vLLM, time, to MHA"]
    decoding, cache, _ = panels.values()
    points = {
        tuple(line.get_xydata()[0])
        for line in decoding.get_lines()
        if line.get_marker() == "o" and len(line.get_xydata())
    }
    assert points == {(1024, 0.75), (32768, 0.5)}
    assert [tick.get_text() for tick in decoding.get_xticklabels()] == ["1k", "32k"]
    assert [round(bar.get_x() + bar.get_width(), 6) for bar in cache.patches] == [0.2, 0.25]
    assert [text.get_text() for text in cache.texts] == ["0.20", "0.25"]


def test_files(figures, monkeypatch, tmp_path):
    for name, data in (("known", SHORT), ("other", {"runs": {}}), ("list", [1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    picture = tmp_path / "picture.png"

    def draw(*names):
        monkeypatch.setattr(
            "sys.argv", ["figures.py", *(str(tmp_path / name) for name in names), "--output", str(picture)]
        )
        figures.main()

    with pytest.raises(SystemExit, match="none of the 1 files is of a benchmark"):
        draw("other.json")
    with pytest.raises(SystemExit, match="none of the 1 files is of a benchmark"):
        draw("list.json")
    with pytest.raises(SystemExit, match="cannot read .*missing.json"):
        draw("missing.json", "known.json")
    assert not picture.exists()
    draw("other.json", "known.json")
    assert picture.read_bytes().startswith(b"\x89PNG")
