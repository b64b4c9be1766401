"""What a language model would say along its depth: arrays in, a figure out."""

from __future__ import annotations

import functools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font

from neuralode.viz.style import COLOURS, new_figure

Array = np.ndarray

_SHOWN = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", " ": "\N{MIDDLE DOT}", "\t": "\N{RIGHTWARDS ARROW}"}


def depth_figure(times: Array, bits: Array, characters: str, probability: Array) -> Figure:
    """When along the depth the next character is found, over many texts and within one.

    Args:
        times: depth times, [T].
        bits: a character, if the model were read at that time, [T].
        characters: of one text, those that come next, [L].
        probability: that the model would give each of them at each time, [T, L].
    """
    figure, (curve, heat) = new_figure(2, (5.6, 3.2))
    curve.plot(times, bits, color=COLOURS[0])
    curve.set_title(f"read at depth t: {bits[0]:.2f} bits a character at first, {bits[-1]:.2f} at the end")
    curve.set_xlabel("depth time t")
    curve.set_ylabel("bits a character")
    curve.set_ylim(bottom=0)

    edges = np.arange(len(characters) + 1) - 0.5
    mesh = heat.pcolormesh(edges, _edges(times), probability, vmin=0, vmax=1, cmap="viridis", rasterized=True)
    heat.set_xticks(range(len(characters)), list(map(_shown, characters)), family="monospace", fontsize=7)
    heat.tick_params(axis="x", length=0)
    heat.set_title("probability of the character that comes next")
    heat.set_ylabel("depth time t")
    figure.colorbar(mesh, ax=heat)
    return figure


def _shown(character: str) -> str:
    """A character as the font of the labels has it."""
    character = _SHOWN.get(character, character)
    return character if ord(character) in _font().get_charmap() else "\N{REPLACEMENT CHARACTER}"


@functools.cache
def _font() -> FT2Font:
    return get_font(findfont(FontProperties(family="monospace")))


def _edges(times: Array) -> Array:
    """The borders of cells with these centres, [T + 1]; the outer ones are at the first and the last time."""
    return np.concatenate([times[:1], (times[1:] + times[:-1]) / 2, times[-1:]])
