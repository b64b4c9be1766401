"""Where the monitor writes: the run's own charts, sub-runs beside it in the same charts, and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

FLOW, DESCENT, CLOSED_FORM = "gradient_flow", "descent", "closed_form"
"""Sub-runs: the flow, the optimiser on the probe batch, and the closed form where there is one."""
_COLUMNS = ("step", "path", "tag", "value")


class FlowLog:
    """Scalars, figures and texts of one run.

    Args:
        trainer: its loggers receive what belongs to the run itself.
        folder: of `scalars.csv` and the PNG files.
        resumed_at: the step that a resumed run goes on from.
        rows: of `scalars.csv` at that step; what a killed run had written after them is dropped.
    """

    def __init__(self, trainer: pl.Trainer, folder: Path, resumed_at: int | None = None, rows: int = 0):
        self.trainer, self.folder, self.resumed_at = trainer, folder, resumed_at
        self._writers: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._csv = folder / "scalars.csv"
        kept = self._read()[:rows]
        self.rows = len(kept)
        with self._csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def scalars(self, step: int, values: Mapping[str, float], path: str = "sgd") -> None:
        """Logs scalars of the run, or under the same tags of one of the sub-runs."""
        if path == "sgd":
            for logger in self.trainer.loggers:
                logger.log_metrics(dict(values), step=step)
        else:
            for writer in self._sub_run(path):
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)
        with self._csv.open("a", newline="") as file:
            csv.writer(file).writerows((step, path, tag, repr(float(value))) for tag, value in values.items())
        self.rows += len(values)

    def text(self, step: int, tag: str, words: str) -> None:
        for writer in self._experiments():
            writer.add_text(tag, words, step)
        (self.folder / "summary.md").write_text(words + "\n")

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Writes a picture once, for TensorBoard and as a PNG file."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        png = io.BytesIO()
        figure.savefig(png, format="png")
        (self.folder / f"{name}.png").write_bytes(png.getvalue())
        image = Summary.Image(encoded_image_string=png.getvalue())
        for writer in self._experiments():
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=f"flow/{name}", image=image)]), step)

    def series(self, tag: str, path: str = "sgd") -> tuple[list[int], list[float]]:
        """Steps and values logged so far, earlier parts of a resumed run included."""
        rows = [row for row in self._read() if row["tag"] == tag and row["path"] == path]
        return [int(row["step"]) for row in rows], [float(row["value"]) for row in rows]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _read(self) -> list[dict[str, str]]:
        if not self._csv.exists():
            return []
        with self._csv.open(newline="") as file:
            return [row for row in csv.DictReader(file) if all(row[column] for column in _COLUMNS)]

    def _experiments(self) -> list[Any]:
        return [logger.experiment for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def _sub_run(self, path: str) -> list[Any]:
        if path not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    purge = {} if self.resumed_at is None else {"purge_step": self.resumed_at + 1}
                    self._writers[path] = SummaryWriter(str(Path(logger.log_dir) / path), **purge)
        return [self._writers[path]] if path in self._writers else []
