"""An experiment: every arm with every seed, one table and one figure at the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from neuralode.errors import UsageError
from neuralode.models import load
from neuralode.models.trajectory import TrajectoryModel
from neuralode.overrides import keep_saved, key_of, merged, normalised
from neuralode.results import RESULT, TEST_RESULT, by_arm, columns_that_differ, labels, print_table, read_result
from neuralode.schema import validate
from neuralode.training import CHECKPOINTS, CONFIG, FIGURES, OVERRIDES, build_data, train


@dataclass(frozen=True)
class Job:
    """One run of an experiment."""

    overrides: list[str]
    folder: Path


def run(cfg: DictConfig) -> list[Path]:
    """What Hydra calls: runs all arms and seeds of a composed config; returns the result files."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    jobs = plan(validate(cfg), list(HydraConfig.get().overrides.task), folder)
    configs = list(map(_config, jobs))  # a mistake in the last of them is said before the first one trains
    for job, config in zip(jobs, configs, strict=True):
        if len(jobs) > 1:
            print(f"── {job.folder.relative_to(folder)}", flush=True)
        with _saying_how_to_resume(job.folder / CHECKPOINTS / "last.ckpt"):
            train(config, job.folder, job.overrides)
    if cfg.trainer.fast_dev_run:
        return []
    return [job.folder / (RESULT if cfg.fit else TEST_RESULT) for job in jobs]


def plan(cfg: DictConfig, overrides: list[str], folder: Path) -> list[Job]:
    """The runs that a validated config asks for."""
    given = {key_of(o) for o in overrides}
    arms = [cfg.arm] if cfg.arm is not None else list(cfg.arms) or [None]
    seeds = [cfg.seed] if "seed" in given and "seeds" not in given else list(cfg.seeds) or [cfg.seed]
    if cfg.ckpt_path is not None and len(arms) * len(seeds) > 1:
        raise UsageError(
            "ckpt_path continues one run, and this experiment has several; give the checkpoint inside the folder of "
            "one of them, or choose one with arm=... seed=...."
        )
    jobs = []
    for arm in arms:
        for seed in seeds:
            chosen = [f"seed={seed}", f"seeds=[{seed}]"] + ([f"arm={arm}"] if arm is not None else [])
            ours = merged([normalised(o) for o in cfg.arms[arm]] if arm is not None else [], overrides)
            place = folder
            if len(arms) > 1:
                place = place / str(arm)
            if len(seeds) > 1:
                place = place / f"seed_{seed}"
            jobs.append(Job(merged(ours, chosen), place))
    return jobs


@contextlib.contextmanager
def _saying_how_to_resume(last: Path) -> Iterator[None]:
    """Adds to whatever ends a run early, a signal or an error, the command that goes on from its last checkpoint."""
    before = _written(last)
    try:
        yield
    except BaseException as error:
        # not where nothing was saved yet, and not where a resume was refused before it began
        if _written(last) != before:
            command = shlex.join([*_program(), f"ckpt_path={_short(last)}"])
            error.add_note(f"to go on from the last checkpoint: {command}")
        raise


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None


def _program() -> list[str]:
    """The words by which this program was started, without its arguments."""
    words = sys.orig_argv
    if sys.argv[0] not in words:  # Python puts the file's path in the place of `-m`
        return [words[0], "-m", "neuralode.cli"]
    script = words.index(sys.argv[0])
    return words[: script + 1] if sys.argv[0].endswith(".py") else [sys.argv[0]]


def _config(job: Job) -> DictConfig:
    cfg = compose("train", overrides=job.overrides)
    OmegaConf.set_struct(cfg, False)
    cfg.paths.output = str(job.folder)  # first, for other values are made from it
    if cfg.ckpt_path is not None and (job.folder / CONFIG).is_file():
        cfg = keep_saved(cfg, job.overrides, job.folder / OVERRIDES, job.folder / CONFIG)
    return validate(cfg)


def report(files: list[Path]) -> None:
    """From these result files: prints the table, draws the comparison, says where everything is."""
    results = [read_result(file) for file in files]
    folders = [file.parent for file in files]
    print()
    print_table(results)
    top = Path(os.path.commonpath(folders))
    if len(results) > 1:
        _draw(results, folders, top / FIGURES)
    config = results[0]["config"]
    levels = "/".join("*" for _ in folders[0].relative_to(top).parts)
    tested = top / levels / CHECKPOINTS / ("best.ckpt" if config["evaluate"] == "best" else "last.ckpt")
    print(f"run:         {_short(top)}")
    print(f"checkpoint:  {_short(tested if config['fit'] else Path(config['ckpt_path']))}")
    for place in dict.fromkeys([top, folders[0]]):  # of the whole, and of one run as an example
        for figure in sorted((place / FIGURES).glob("*.png")):
            print(f"figure:      {_short(figure)}")
    print(f"dashboard:   tensorboard --logdir {_short(top)}")


def _draw(results: list[dict[str, Any]], folders: list[Path], to: Path) -> None:
    from neuralode.viz.comparison import arms_figure, forecasts_figure

    to.mkdir(parents=True, exist_ok=True)
    columns = columns_that_differ(results, results[0]["config"]["columns"])[:5]
    if columns:
        title = f"{results[0]['name']}: each dot a seed, the bar their mean"
        arms_figure({c: by_arm(results, c) for c in columns}, title).savefig(to / "comparison.png")

    curves, record = [], None
    rows = labels(results)
    for arm in dict.fromkeys(rows):
        index = rows.index(arm)  # its first seed
        model = load(folders[index] / CHECKPOINTS / "last.ckpt")
        if not isinstance(model, TrajectoryModel):
            return
        data = build_data(OmegaConf.create(results[index]["config"]))
        (y,), (t,) = data.splits.test, data.splits.shared["test"]
        fine = t.new_tensor(np.linspace(float(t[0]), float(t[-1]), max(1000, len(t))))
        curves.append((arm, fine.numpy(), model(y[:, 0], fine)[0].detach().numpy()))
        record = (t.numpy(), y[0].numpy(), data.splits.description)
    if record is not None and len(curves) > 1:
        times, states, described = record
        figure = forecasts_figure(times, states, curves, described["names"], described["train_until"])
        figure.savefig(to / "forecasts.png")


def _short(path: Path) -> str:
    """Relative to where the person stands, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
