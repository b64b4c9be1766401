"""Data, by name; every source but OpenML works offline."""

from neuralode.data.images import Digits, OpenML
from neuralode.data.loader import EpochOrder, ReplayLoader
from neuralode.data.module import ArrayData, Splits
from neuralode.data.points import Concentric, Line, Moons
from neuralode.data.series import CSV, SeriesData, Spiral

DATA: dict[str, type[ArrayData]] = {
    "concentric": Concentric,
    "csv": CSV,
    "digits": Digits,
    "line": Line,
    "moons": Moons,
    "openml": OpenML,
    "spiral": Spiral,
}

__all__ = [
    "CSV",
    "DATA",
    "ArrayData",
    "Concentric",
    "Digits",
    "EpochOrder",
    "Line",
    "Moons",
    "OpenML",
    "ReplayLoader",
    "SeriesData",
    "Spiral",
    "Splits",
]
