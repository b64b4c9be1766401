"""One training run: objects from a config, fit, test, result and figures."""

from __future__ import annotations

import inspect
import math
import re
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from neuralode.callbacks import ExactResume, GradientFlowMonitor, SolverMonitor
from neuralode.data import DATA, ArrayData, SeriesData
from neuralode.errors import UsageError, unknown
from neuralode.models import FIELDS, build_model
from neuralode.models.registry import MODELS, import_field
from neuralode.models.saved import describe, read_checkpoint
from neuralode.models.trajectory import TrajectoryModel
from neuralode.nn import ODEBlock
from neuralode.results import RESULT, TEST_RESULT, flat, versions, write_result
from neuralode.schema import solver_config
from neuralode.tasks import TASKS, Task
from neuralode.viz.dashboard import layout

CONFIG, OVERRIDES = "config.yaml", "overrides.yaml"
CHECKPOINTS, FIGURES = "checkpoints", "figures"


def train(cfg: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs what a validated config says and returns the content of `result.json`.

    Args:
        cfg: the whole config; `cfg.ckpt_path` resumes from there.
        folder: where everything of this run goes.
        overrides: the command line that made the config; kept beside it for a resume.

    Raises:
        UsageError: for anything in the config, the data or the checkpoint that cannot be used.
    """
    _quieten()
    default_dtype = torch.get_default_dtype()
    try:
        if str(cfg.trainer.precision).startswith("64"):
            torch.set_default_dtype(torch.float64)
        return _train(cfg, folder, overrides)
    finally:
        torch.set_default_dtype(default_dtype)


def _train(cfg: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    torch.set_float32_matmul_precision("highest")  # TF32 defeats adaptive error control
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.ckpt_path is not None:
        read_checkpoint(cfg.ckpt_path)  # refused here, before anything is written
    for group in ("trainer", "optimizer"):
        _refuse_text(cfg[group], group)  # before other groups, which take values from these
    pl.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg)
    task = build_task(cfg, data)
    if cfg.fit:
        _refuse_unknown_metrics(cfg, task)
    callbacks = [instantiate(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node]
    loggers = [instantiate(node, f"logger.{name}", **_purge(cfg, node)) for name, node in cfg.logger.items() if node]
    if not loggers:  # it has nothing to write to, and says so by an exception
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    trainer = instantiate(
        cfg.trainer, "trainer", callbacks=callbacks, logger=loggers or False, default_root_dir=str(folder)
    )
    assert isinstance(trainer, pl.Trainer)

    if cfg.fit:
        if trainer.is_global_zero:
            _write_config(cfg, folder, overrides)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                solves = any(isinstance(part, ODEBlock) for part in task.modules())
                flows = any(isinstance(callback, GradientFlowMonitor) for callback in callbacks)
                logger.experiment.add_custom_scalars(layout(task.metric, solves, flows))
        trainer.fit(task, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    metrics = dict(next((c.metrics for c in callbacks if isinstance(c, ExactResume)), {}))
    if cfg.test:
        metrics |= _test(cfg, trainer, task, data)

    result = _result(cfg, trainer, task, metrics)
    dry = bool(cfg.trainer.fast_dev_run)
    if trainer.is_global_zero and not dry:
        write_result(folder, result, RESULT if cfg.fit else TEST_RESULT)
        if cfg.fit:
            _log_hyperparameters(trainer, result)
            _draw_learning(folder, cfg.name)
    return result


def instantiate(node: Any, key: str, **kwargs: Any) -> Any:
    """The one way from a config node with a `_target_` to an object; failures name the key that caused them."""
    _refuse_text(node, key)
    try:
        return hydra.utils.instantiate(node, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UsageError):
            raise cause from error
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        advice = " (trainer.accelerator=cpu trainer.devices=1 works on any machine.)" if key == "trainer" else ""
        raise UsageError(f"{key} cannot be made: {reason}{advice}") from error


def _refuse_text(node: Any, key: str) -> None:
    """Raises UsageError for a value that is a word where the target's signature has no place for one."""
    target = hydra.utils.get_object(node["_target_"])
    try:
        hints = typing.get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target)  # noqa: B009
    except (NameError, TypeError):
        return  # annotations that cannot be read say nothing
    for name, value in node.items():
        hint = hints.get(str(name))
        if isinstance(value, str) and hint is not None and not re.search(r"\bstr\b|Literal|Any|TypeVar|~", str(hint)):
            wanted = (
                getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")
            )
            raise UsageError(f"{key}.{name} is {value!r}; it has to be of type {wanted}.")


def _refuse_unknown_metrics(cfg: DictConfig, task: Task) -> None:
    """Raises UsageError where a callback or the scheduler watches what the task does not log."""
    logged = [f"{stage}/{name}" for stage in ("train", "val") for name in task.measures]
    watchers = {"scheduler": cfg.scheduler, **{f"callbacks.{name}": node for name, node in cfg.callbacks.items()}}
    for key, node in watchers.items() if logged else ():
        metric = node.get("monitor") if node else None
        if metric is not None and metric not in (*logged, "train/loss_step", "epoch", "step"):
            key = "monitor.metric" if metric == cfg.monitor.metric else f"{key}.monitor"
            raise UsageError(f"{key}: " + unknown("metric", metric, logged))


def build_data(cfg: DictConfig) -> ArrayData:
    """The data module of a config."""
    args = _container(cfg.data)
    data = DATA[args.pop("name")](**args)
    data.seed = cfg.seed
    _ = data.splits  # loaded and checked now, before anything else is made
    return data


def build_task(cfg: DictConfig, data: ArrayData) -> Task:
    """The task of a config, with its model, for this data."""
    model_args = _container(cfg.model)
    name = model_args.pop("name")
    field = model_args.get("field")
    if field is not None and "." in field and field not in FIELDS:
        import_field(field)
    offered = {**data.splits.model_args, "solver": solver_config(cfg)}
    model_args |= _accepted(MODELS[name], offered, f"model {name!r}", f"data {cfg.data.name!r}")
    model = build_model(name, model_args)
    if isinstance(data, SeriesData) and isinstance(model, TrajectoryModel) and len(data.splits.train[0]) > 1:
        (windows,), (times,) = data.splits.train, data.splits.shared["train"]
        if model.depends_on_time(windows[:2, 0], times):
            raise UsageError(
                f"all windows of data.segment={data.segment} are solved over the times of the first, and the field "
                f"{model_args.get('field')!r} depends on t; set data.segment=null, or take a field of the state alone."
            )

    task_args = _container(cfg.task)
    cls = TASKS[task_args.pop("name")]
    task_args |= {k: v for k, v in data.splits.description.items() if k in inspect.signature(cls).parameters}
    return cls(
        model,
        optimizer=instantiate(cfg.optimizer, "optimizer"),
        description=describe(name, model_args),
        **_scheduler(cfg),
        **task_args,
    )


def _scheduler(cfg: DictConfig) -> dict[str, Any]:
    if not cfg.scheduler:
        return {}
    node = OmegaConf.create(_container(cfg.scheduler))
    interval, monitor = node.pop("interval", "epoch"), node.pop("monitor", None)
    return {
        "scheduler": instantiate(node, "scheduler"),
        "interval": interval,
        "scheduler_monitor": monitor,
    }


def _accepted(cls: type, offered: Mapping[str, Any], model: str, data: str) -> dict[str, Any]:
    """What the model takes of what the data offers. Raises UsageError where the two do not fit."""
    parameters = inspect.signature(cls).parameters
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and name not in offered and p.kind != p.VAR_KEYWORD
    ]
    if missing:
        raise UsageError(
            f"{model} does not fit {data}: it needs to know {', '.join(missing)}, and the data is described by "
            f"{', '.join(k for k in offered if k != 'solver')}; choose another model."
        )
    return {name: value for name, value in offered.items() if name in parameters}


def _test(cfg: DictConfig, trainer: pl.Trainer, task: Task, data: ArrayData) -> dict[str, float]:
    path = cfg.ckpt_path if not cfg.fit else None
    if cfg.fit and cfg.evaluate == "best" and not cfg.trainer.fast_dev_run:
        path = next((c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    found = trainer.test(task, datamodule=data, ckpt_path=path or None, verbose=False, weights_only=True)
    return {name: float(value) for name, value in found[0].items()}


def _result(cfg: DictConfig, trainer: pl.Trainer, task: Task, metrics: dict[str, float]) -> dict[str, Any]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    solver = next((c.summary for c in callbacks if isinstance(c, SolverMonitor)), {})
    flow = next((c.summary for c in callbacks if isinstance(c, GradientFlowMonitor)), {})
    seconds = next((c.seconds for c in callbacks if isinstance(c, ExactResume)), math.nan)
    weights = {}
    if task.metric == "loss":  # small regressions are judged by their weights
        weights = {name: p.item() for name, p in task.model.named_parameters() if p.numel() == 1}
    return {
        "name": cfg.name,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "metrics": metrics,
        "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "solver": dict(solver),
        "gradient_flow": dict(flow),
        "seconds": round(seconds, 3),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "weights": weights,
        "device": _device_name(trainer),
        "versions": versions(),
        "config": _container(cfg),
    }


def _device_name(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _log_hyperparameters(trainer: pl.Trainer, result: Mapping[str, Any]) -> None:
    """Fills TensorBoard's hyper-parameters tab with the config's scalars and the final metrics."""
    config = result["config"]
    shown = {group: config[group] for group in ("model", "data", "solver", "optimizer", "scheduler", "seed")}
    scalars = {
        k.removesuffix("._target_"): v
        for k, v in flat(shown).items()
        if isinstance(v, bool | int | float | str) and not k.endswith("._partial_")
    }
    finals = {k.replace("test/", "final/"): v for k, v in result["metrics"].items() if k.startswith("test/")}
    finals |= {f"final/{k}": v for k, v in (result["solver"] | result["gradient_flow"]).items()}
    finals |= {"final/seconds": result["seconds"], "final/parameters": float(result["parameters"])}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(scalars, finals)
            logger.save()


def _draw_learning(folder: Path, title: str) -> None:
    """`learning.png` from the logged scalars, those of earlier parts of a resumed run included."""
    from neuralode.viz.comparison import learning_figure
    from neuralode.viz.scalars import read_scalars

    wanted = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "accuracy", "mae", "bits")}
    curves = {tag: curve for tag, curve in read_scalars(folder).items() if tag in wanted and len(curve[0]) > 1}
    if curves:
        (folder / FIGURES).mkdir(exist_ok=True)
        learning_figure(curves, title).savefig(folder / FIGURES / "learning.png")


def _write_config(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = OmegaConf.create(_container(cfg))
    kept.ckpt_path = None
    OmegaConf.save(kept, folder / CONFIG)
    OmegaConf.save(OmegaConf.create([o for o in overrides if not o.startswith("ckpt_path=")]), folder / OVERRIDES)


def _purge(cfg: DictConfig, logger: DictConfig) -> dict[str, Any]:
    """On a resume, TensorBoard drops what a killed run had logged beyond its checkpoint."""
    if cfg.ckpt_path is None or not cfg.fit or not str(logger.get("_target_")).endswith("TensorBoardLogger"):
        return {}
    return {"purge_step": int(read_checkpoint(cfg.ckpt_path)["global_step"]) + 1}


def _container(node: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _quieten() -> None:
    """Silences advice that does not apply here; everything else stays."""
    import logging

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",  # the loaders are in memory
        ".*is smaller than the logging interval.*",
        ".*GPU available but not used.*",
        ".*exists and is not empty.*",  # a resumed run continues in its folder, on purpose
        ".*Starting from v1.9.0, `tensorboardX`.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=text)
