"""Time series: one trajectory, cut into windows for training and followed whole for validation and test."""

from __future__ import annotations

import abc
import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from neuralode.data.module import ArrayData, Splits, read_text, standard_float
from neuralode.errors import UsageError, unknown
from neuralode.ode import odeint


class SeriesData(ArrayData, abc.ABC):
    """A trajectory y(t), [T, D], observed at times t, [T].

    A training sample is a window of `segment` points. All windows get the times of the first, so that a run refuses
    them for a field that depends on t. Validation is the whole of the fitted part from its first point, test the whole
    record from there.

    Args:
        segment: points in a training window; None takes the whole fitted part as the one window.
        stride: points between the starts of two windows.
        train_until: last time that is fitted, in the units of t; None fits all.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(
        self,
        segment: int | None = None,
        stride: int = 1,
        train_until: float | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size)
        self.segment, self.stride, self.train_until = segment, stride, train_until

    @abc.abstractmethod
    def record(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Times [T], states [T, D], both float64, and the D names."""

    def load(self) -> Splits:
        t, y, names = self.record()
        if len(t) < 2 or not bool((t[1:] > t[:-1]).all()):
            raise UsageError("the times have to rise from row to row, and there have to be at least two.")
        fitted = len(t) if self.train_until is None else int((t <= self.train_until).sum())
        if fitted < 2:
            raise UsageError(
                f"data.train_until={self.train_until} leaves {fitted} points to fit; the record runs from "
                f"{t[0].item():g} to {t[-1].item():g}."
            )
        train, train_times = self._windows(t[:fitted], y[:fitted])
        gaps, t, y = t.diff(), standard_float(t), standard_float(y)
        if ((t.double().diff() - gaps).abs() > 0.01 * gaps).any():  # rounded, they are other gaps
            raise UsageError(
                f"the times are too close together for {t.dtype}: count them from another origin, or train with "
                "trainer.precision=64-true."
            )
        spread = y[:fitted].std(0)
        return Splits(
            train=(train,),
            val=(y[None, :fitted],),
            test=(y[None],),
            shared={"train": (train_times,), "val": (t[:fitted],), "test": (t,)},
            model_args={"features": y.shape[1], "scale": torch.where(spread > 0, spread, 1.0).tolist()},
            description={"names": names, "train_until": t[fitted - 1].item() if fitted < len(t) else None},
        )

    def _windows(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows [N, K, D] and the times they share, [K]."""
        if self.segment is None:
            return standard_float(y[None]), standard_float(t)
        if not 2 <= self.segment <= len(t) or self.stride < 1:
            raise UsageError(
                f"data.segment={self.segment} and data.stride={self.stride}: a window has 2 to {len(t)} points, and "
                "windows start at least 1 point apart."
            )
        gaps = t.diff()
        if (gaps - gaps[0]).abs().max() > 1e-6 * gaps[0]:
            raise UsageError("windows need equally spaced times, which these are not; set data.segment=null.")
        windows = y.unfold(0, self.segment, self.stride).transpose(1, 2)
        return standard_float(windows), standard_float(t[: self.segment])


class Spiral(SeriesData):
    """The cubic spiral of torchdiffeq's demo: ẏ = A y³, y(0) = (2, 0), 1000 points on [0, 25].

    Args:
        points, t_end: number of points, and the last time.
        segment, stride, train_until, batch_size, eval_batch_size: as in SeriesData.
    """

    def __init__(
        self,
        points: int = 1000,
        t_end: float = 25.0,
        segment: int | None = 50,
        stride: int = 10,
        train_until: float | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ):
        super().__init__(segment, stride, train_until, batch_size, eval_batch_size)
        self.points, self.t_end = points, t_end

    def record(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
        t = torch.linspace(0, self.t_end, self.points, dtype=torch.float64)
        start = torch.tensor([2.0, 0.0], dtype=torch.float64)
        return t, odeint(lambda _, y: y**3 @ matrix, start, t, rtol=1e-9, atol=1e-11), ["x", "y"]


class CSV(SeriesData):
    """A trajectory from a CSV file with a header; lines that start with # are comments.

    Args:
        path: the file.
        time: name of the column of times.
        columns: names of the state's columns; None takes all but the time.
        segment, stride, train_until, batch_size, eval_batch_size: as in SeriesData.
    """

    def __init__(
        self,
        path: str | None = None,
        time: str = "time",
        columns: Sequence[str] | None = None,
        segment: int | None = None,
        stride: int = 1,
        train_until: float | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ):
        super().__init__(segment, stride, train_until, batch_size, eval_batch_size)
        if path is None:
            raise UsageError("data.path is not given; name a CSV file, or take the record that ships: data=lynx_hare.")
        self.path = Path(path)
        self.time, self.columns = time, list(columns) if columns is not None else None

    def record(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        header, rows = _read(self.path)
        names = self.columns if self.columns is not None else [name for name in header if name != self.time]
        for key, name in [("data.time", self.time), *(("data.columns", name) for name in names)]:
            if name not in header:
                raise UsageError(f"{key}: " + unknown(f"column of {self.path}", name, header))
        if not names:
            raise UsageError(f"{self.path} has no column besides the time {self.time!r}; give data.columns=[...].")
        table = torch.tensor([[_number(self.path, line, name, row[name]) for name in [self.time, *names]]
                              for line, row in rows], dtype=torch.float64).reshape(-1, 1 + len(names))  # fmt: skip
        return table[:, 0], table[:, 1:], names


class LynxHare(CSV):
    """The record that ships with the package: pelts of the Hudson Bay Company in thousands, 1900-1920 (Hewitt 1921, as
    tabulated by Howard 2009).

    Args:
        columns: `hare`, `lynx` or both, which None takes.
        segment, stride, train_until, batch_size, eval_batch_size: as in SeriesData.
    """

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        segment: int | None = None,
        stride: int = 1,
        train_until: float | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ):
        file = Path(__file__).with_name("lynx_hare.csv")
        super().__init__(str(file), "year", columns, segment, stride, train_until, batch_size, eval_batch_size)


def _read(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and each row with its line number."""
    text = read_text(path, "the path of a CSV file")
    kept = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if len(kept) < 2:
        raise UsageError(f"data.path={path} has {len(kept)} lines; it needs a header and at least two rows.")
    parsed = [[cell.strip() for cell in row] for row in csv.reader(line for _, line in kept)]
    header, rows = parsed[0], parsed[1:]
    for (line, _), row in zip(kept[1:], rows, strict=True):
        if len(row) != len(header):
            raise UsageError(f"{path}, line {line}: {len(row)} values under a header of {len(header)} columns.")
    return header, [(line, dict(zip(header, row, strict=True))) for (line, _), row in zip(kept[1:], rows, strict=True)]


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        given = repr(text) if text else "nothing"
        raise UsageError(f"{path}, line {line}, column {column!r}: {given} is not a number.") from None
