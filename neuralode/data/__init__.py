"""Data, by name; every source but OpenML works offline."""

from neuralode.data.images import DigitRows, Digits, OpenML
from neuralode.data.loader import EpochOrder, ReplayLoader
from neuralode.data.module import ArrayData, Splits
from neuralode.data.points import Concentric, Line, Moons, OnePoint
from neuralode.data.series import CSV, LynxHare, SeriesData, Spiral
from neuralode.data.text import Text

DATA: dict[str, type[ArrayData]] = {
    "concentric": Concentric,
    "csv": CSV,
    "digit_rows": DigitRows,
    "digits": Digits,
    "line": Line,
    "lynx_hare": LynxHare,
    "moons": Moons,
    "one_point": OnePoint,
    "openml": OpenML,
    "spiral": Spiral,
    "text": Text,
}

__all__ = [
    "CSV",
    "DATA",
    "ArrayData",
    "Concentric",
    "DigitRows",
    "Digits",
    "EpochOrder",
    "Line",
    "LynxHare",
    "Moons",
    "OnePoint",
    "OpenML",
    "ReplayLoader",
    "SeriesData",
    "Spiral",
    "Splits",
    "Text",
]
