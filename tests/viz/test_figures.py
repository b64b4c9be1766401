"""Each figure is a matplotlib Figure that can be saved, and shows what it was given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from neuralode.viz.comparison import arms_figure, forecasts_figure, learning_figure
from neuralode.viz.language import depth_figure
from neuralode.viz.phase_portrait import classifier_figure, regression_figure, series_figure

RNG = np.random.default_rng(0)
TICKS = (np.linspace(-1, 1, 6), np.linspace(-2, 2, 6))
ARROWS = RNG.normal(size=(6, 6, 2))
TIMES, FINE = np.arange(8.0), np.linspace(0, 9, 40)


def saved(figure: Figure, folder: Path) -> Path:
    assert isinstance(figure, Figure)
    path = folder / "figure.png"
    figure.savefig(path, dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 1000
    return path


def drawn(figure: Figure, panel: int, line: int) -> tuple[list[float], list[float]]:
    x, y = figure.axes[panel].get_lines()[line].get_data()
    return list(x), list(y)


def legend(figure: Figure, panel: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].get_legend().get_texts()]


@pytest.mark.parametrize("field", [ARROWS, np.zeros_like(ARROWS)], ids=["arrows", "still field"])
def test_classifier_figure(field: np.ndarray, tmp_path: Path) -> None:
    path = RNG.normal(size=(5, 30, 2)).cumsum(0)
    figure = classifier_figure(
        axes=(np.linspace(-3, 3, 12), np.linspace(-2, 2, 9)),
        probability=RNG.random((9, 12)),
        times=np.linspace(0, 1, 5),
        path=path,
        labels=np.arange(30) % 2,
        shown=[0, 2, 4],
        ticks=TICKS,
        arrows=np.stack([field] * 3),
        hidden_dimensions=3,
    )
    saved(figure, tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["decision boundary", "t = 0.00", "t = 0.50", "t = 1.00"]
    assert "3 more dimensions unseen" in figure.get_suptitle()
    shown = figure.axes[3].collections[-1].get_offsets()
    np.testing.assert_allclose(shown, path[4])


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_series_figure_over_time(columns: int, tmp_path: Path) -> None:
    record, curve = RNG.normal(size=(8, columns)), RNG.normal(size=(40, columns))
    names = ["a", "b", "c"][:columns]
    figure = series_figure(TIMES, record, FINE, curve, names, train_until=5.0)
    saved(figure, tmp_path)
    assert len(figure.axes) == 1
    for column in range(columns):
        assert drawn(figure, 0, 2 * column) == (list(TIMES), list(record[:, column]))
        assert drawn(figure, 0, 2 * column + 1) == (list(FINE), list(curve[:, column]))
    assert legend(figure) == [f"{n}, {k}" for n in names for k in ("record", "model")] + ["forecast"]


def test_series_figure_in_the_plane(tmp_path: Path) -> None:
    record, curve = RNG.normal(size=(8, 2)), RNG.normal(size=(40, 2))
    figure = series_figure(TIMES, record, FINE, curve, ["hare", "lynx"], None, TICKS, ARROWS)
    saved(figure, tmp_path)
    assert len(figure.axes) == 2
    assert (figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel()) == ("hare", "lynx")
    assert drawn(figure, 1, 0) == (list(record[:, 0]), list(record[:, 1]))
    assert "forecast" not in legend(figure)


def test_forecasts_figure(tmp_path: Path) -> None:
    record = RNG.normal(size=(8, 2))
    curves = [(name, FINE, RNG.normal(size=(40, 2))) for name in ("mlp", "lotka_volterra", "linear")]
    figure = forecasts_figure(TIMES, record, curves, ["hare", "lynx"], train_until=5.0)
    saved(figure, tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["hare", "lynx"]
    for panel in range(2):
        assert drawn(figure, panel, 0) == (list(TIMES), list(record[:, panel]))
        assert drawn(figure, panel, 3) == (list(FINE), list(curves[2][2][:, panel]))
        colours = [line.get_color() for line in figure.axes[panel].get_lines()]
        assert len(set(colours)) == 4, "each curve has a colour of its own, in the legend too"


def test_arms_figure(tmp_path: Path) -> None:
    values = {"accuracy": {"plain": [0.9, 0.8], "augmented": [1.0]}, "nfe": {"plain": [20.0, 26.0]}}
    figure = arms_figure(values, "concentric")
    saved(figure, tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["accuracy", "nfe"]
    assert figure.get_suptitle() == "concentric"
    assert drawn(figure, 0, 0) == ([0.9, 0.8], [0, 0])
    assert drawn(figure, 0, 1)[0] == pytest.approx([0.85, 0.85]), "the bar is at the mean"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["plain", "augmented"]


def test_learning_figure(tmp_path: Path) -> None:
    steps = np.arange(1, 6)
    curves = {
        "train/loss": (steps, 1 / steps), "val/loss": (steps, 2 / steps), "val/accuracy": (steps, steps / 5),
        "train/mae": (steps, steps - 3.0),
    }  # fmt: skip
    figure = learning_figure(curves, "a run")
    saved(figure, tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["loss", "accuracy", "mae"]
    assert legend(figure) == ["train", "val"]
    assert drawn(figure, 0, 1) == (list(steps), list(2 / steps))
    # a logarithmic axis would hide what is not positive
    assert [panel.get_yscale() for panel in figure.axes] == ["log", "linear", "linear"]


def test_imports_stay_light() -> None:
    code = (
        "import sys, neuralode\n"
        "print([m for m in ('matplotlib', 'lightning', 'hydra') if m in sys.modules])\n"
        "import neuralode.viz.comparison\n"
        "print([m for m in ('matplotlib.pyplot', 'lightning', 'hydra') if m in sys.modules])\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["[]", "[]"]


def test_regression_figure_names_the_line_and_shows_the_way_there(tmp_path: Path) -> None:
    x = np.linspace(0, 2, 9)
    path = np.linspace([0.0, 0.0], [0.5, -2.0], 30)
    figure = regression_figure(x, 1 + 3 * x + 0.1 * (-1) ** np.arange(9), path)
    saved(figure, tmp_path)
    assert legend(figure)[0] == "data"
    assert legend(figure)[2] == "model 0.5000 − 2.0000 x"
    assert legend(figure, 1) == ["weights", "start", "least squares"]
    way = next(line for line in figure.axes[1].get_lines() if line.get_label() == "weights")
    np.testing.assert_allclose(way.get_xydata(), path)
    saved(regression_figure(x, 3 * x, path[:1]), tmp_path)  # nothing learned yet, and no noise


def test_depth_figure(tmp_path: Path) -> None:
    times, bits, probability = np.linspace(0, 1, 5), np.linspace(6, 2, 5), RNG.random((5, 6))
    figure = depth_figure(times, bits, "a b\n\t$", probability)
    saved(figure, tmp_path)
    assert drawn(figure, 0, 0) == (list(times), list(bits))
    assert "6.00 bits a character at first, 2.00 at the end" in figure.axes[0].get_title()
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert labels == [
        "a",
        "\N{MIDDLE DOT}",
        "b",
        "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
        "\N{RIGHTWARDS ARROW}",
        "$",
    ]
    np.testing.assert_allclose(figure.axes[1].collections[0].get_array().reshape(5, 6), probability)


def test_depth_figure_shows_what_the_font_lacks_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    characters = "\N{CJK UNIFIED IDEOGRAPH-65E5}\x00\N{GRINNING FACE}x"
    figure = depth_figure(np.linspace(0, 1, 3), np.ones(3), characters, RNG.random((3, 4)))
    saved(figure, tmp_path)
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert labels == ["\N{REPLACEMENT CHARACTER}"] * 3 + ["x"]
    assert not recwarn.list
