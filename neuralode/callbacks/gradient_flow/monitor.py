"""The continuous-time trajectory of training, next to the steps of SGD."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from neuralode.callbacks.gradient_flow.figures import GRIDS, draw
from neuralode.callbacks.gradient_flow.governor import Governor, seconds_of
from neuralode.callbacks.gradient_flow.log import FLOW, FlowLog
from neuralode.callbacks.gradient_flow.measurements import Defect, Edge, derivative_values
from neuralode.callbacks.gradient_flow.modes import MODES, Global, Paths, Settings, Window
from neuralode.callbacks.gradient_flow.probe import (
    Loss,
    clipping,
    mean_loss,
    probe_batch,
    savable,
    training_loss,
    unable,
)
from neuralode.callbacks.gradient_flow.words import name_of
from neuralode.errors import UsageError, unknown
from neuralode.gradient_flow import GradientField, OptimizerFlow, Sharpness, capture, update_rules
from neuralode.gradient_flow.plane import PLANES
from neuralode.gradient_flow.update_rule import moving, rates
from neuralode.ode import SolveError

_WEIGHTS = {"defect": 2.0, "sharpness": 2.0, "derivatives": 1.0, "paths": 3.0, "figures": 1.0}
_GRADIENTS = {"sharpness": 52, "derivatives": 10, "paths": 200, "figures": 0}
"""What a measurement costs before it has been made, in gradients on the probe as they were at the start: twice what it
takes, for a solve takes more evaluations as its field learns."""
_PROBE = 1024
_DRAWING, _CONTOUR = 0.3, 0.4
"""Seconds that the figures take, and what a loss costs of those under them, in gradients."""


_PARTS = ("governor", "edge", "flow_sharpness", "window", "globally")


class GradientFlowMonitor(pl.Callback):
    """Shows how far training has departed from the gradient flow that it discretises, how fast it should converge, and
    how close it is to the edge of stability. For any LightningModule with one optimiser: SGD, Adam or AdamW.

    Training is bit for bit what it is without the monitor. What it measures goes to TensorBoard under `flow/`, the
    flow's own curves into sub-runs under the same tags, and as CSV and PNG into the folder. Should it fail, it warns
    once and switches itself off.

    Args:
        folder: of the CSV and PNG files.
        mode: `window`, the flow of the probe's loss restarts now and then and runs beside so many steps of SGD;
            `piecewise`, the flow follows the minibatches of SGD, each for its own η; `global`, the flow from the first
            weights on runs next to the whole run.
        window: steps of a window; in the mode `global` steps between two points of the path.
        probe: at most so many training samples are the batch on which all but the defect is measured; 1024 if not
            given, in the mode `global` all of them.
        defect_every: steps between two measurements of the defect.
        every: steps between two measurements of sharpness, derivatives and windows.
        budget: share of the training's time that all this may take, kept by stretching the cadences; None for no limit.
        rtol: tolerance of the flow.
        plane: `ends` or `pca`, the plane of the trajectory figure.
        loss_floor: L*, the least loss there can be, for the rate of convergence.
        loss_fn: (module, batch) to the loss; what the training step minimises if not given. Under ddp a LightningModule
            of your own needs one, for the first process alone evaluates it.
    """

    def __init__(
        self, folder: str, mode: str = "window", window: int = 50, probe: int | None = None, defect_every: int = 25,
        every: int = 500, budget: float | None = 0.1, rtol: float = 1e-3, plane: str = "ends", loss_floor: float = 0.0,
        loss_fn: Loss | None = None,
    ):  # fmt: skip
        if mode not in MODES:
            raise UsageError(unknown("monitor.flow_mode", mode, MODES))
        if plane not in PLANES:
            raise UsageError(unknown("monitor.flow_plane", plane, PLANES))
        for name, value in (("window", window), ("probe", probe)):
            if value is not None and value < 1:
                raise UsageError(f"monitor.flow_{name} is {value}; it has to be at least 1.")
        if not rtol > 0:
            raise UsageError(f"monitor.flow_rtol is {rtol}; it has to be a positive number.")
        self.folder, self.mode, self.plane = Path(folder), mode, plane
        most = _PROBE if probe is None and mode != "global" else probe
        self.samples, self.rtol, self.loss_floor, self.loss_fn = most, rtol, loss_floor, loss_fn or training_loss
        paths = window if mode == "global" else every
        cadences = {
            "defect": defect_every,
            "sharpness": every,
            "derivatives": every,
            "paths": paths,
            "figures": 10 * every if budget is None else every,  # they are dear where nothing bounds them
        }
        self._new_governor = partial(Governor, cadences, _WEIGHTS, budget, at_end="figures")
        self._new_window = partial(Window, window, mode == "piecewise")
        self._off = False
        self._log: FlowLog | None = None
        self._settings: Settings | None = None
        self._batch: Any = None
        self._loaded: Mapping[str, Any] = {}
        self._final: Mapping[str, Any] = {}
        """The state after a fit, for checkpoints that are saved only then, and for a fit that goes on with it."""
        self._reset()

    def _reset(self) -> None:
        """Forgets what an earlier fit has left."""
        self.governor, self.window, self.globally = self._new_governor(), self._new_window(), Global()
        self.defect, self.edge, self.flow_sharpness = Defect(), Edge(), Sharpness()
        self.summary: dict[str, float] = {}
        """Figures for the run's result."""
        self.paths: Paths | None = None
        """The last window, or the whole run."""
        self._gradient_seconds, self._s, self._seen, self._warned = 0.0, 0.0, -1, False
        self._batches: list[Any] = []
        self._lrs: list[float] = []
        self._words = "Sharpness was not measured."

    # --- hooks -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._off = not trainer.is_global_zero or bool(getattr(trainer, "fast_dev_run", False))
        self._guarded(trainer, self._begin, trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._guarded(trainer, self._note_gradient, trainer, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self._guarded(trainer, self._after_batch, trainer, pl_module, batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._guarded(trainer, self._finish, trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._final, self._loaded = self.state_dict(), {}
        if self._log is not None:
            self._log.close()
        self._log = self._settings = self._batch = None

    def state_dict(self) -> dict[str, Any]:
        if self._off or self._settings is None or self._log is None:
            return dict(self._loaded or self._final)
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return parts | {
            "s": self._s, "batch": self._batch if savable(self._batch) else None, "mode": self.mode,
            "summary": dict(self.summary), "trusts": self.defect.trusts_training, "rows": self._log.rows,
            "step": self._seen,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    # --- what they do ------------------------------------------------------------------------------------------------

    def _guarded(self, trainer: pl.Trainer, action: Callable[..., None], *args: Any) -> None:
        """The monitor never stops a training run."""
        if self._off:
            return
        try:
            action(*args)
        except Exception as error:
            self._off = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            rank_zero_warn(f"the gradient-flow monitor is switched off in step {trainer.global_step}: {reason}")

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        reason = unable(trainer, module, self.loss_fn)
        if reason:
            raise UsageError(f"this training cannot be monitored: {reason}.")
        update_rules(self._optimizer(trainer))
        goes_on = self._final.get("step") == trainer.global_step
        resumed = self._loaded or (self._final if goes_on else {})
        if resumed.get("mode") != self.mode:
            resumed = {}
        self._reset()
        self._final, self._seen = resumed, trainer.global_step
        at = (trainer.global_step, resumed["rows"]) if resumed else ()
        self._log = FlowLog(trainer, self.folder, *at)
        self.governor.start()
        self._batch = resumed.get("batch")
        if self._batch is None:  # the same again, where it could not be saved
            self._batch = probe_batch(trainer, module, self.samples)
        if resumed:
            self._restore(resumed)
        if self._batch is not None:
            self._prepare(trainer, module)
            if not resumed:
                self._lrs = rates(self._optimizer(trainer))
                self._measure_due(trainer)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._s, self.defect.trusts_training = saved["s"], saved["trusts"]
        self.summary = dict(saved["summary"])
        for name in _PARTS:
            getattr(self, name).load_state_dict(saved[name])

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Once the probe is known."""
        optimizer, clip = self._optimizer(trainer), clipping(trainer)
        weights = _weights(optimizer)

        def on_batches(batches: list[Any], parts: int | None = None) -> GradientField:
            loss = mean_loss(self.loss_fn, parts or trainer.accumulate_grad_batches)
            # the running statistics move with training, which a flow of its own over the whole run must not
            whole = self.mode == "global"
            return GradientField(module, loss, batches, weights, self._seed, clip, own_statistics=whole)

        field = on_batches([self._batch], 1)
        rules, state = update_rules(optimizer), capture(optimizer)
        OptimizerFlow(field, rules, state, [[rule.lr for rule in rules]])  # refuses groups of different kinds now
        self._settings = Settings(field, self.rtol, self.flow_sharpness, on_batches)
        with self.governor.measuring("start", trainer.global_step, ends=False):
            self._gradient_seconds = seconds_of(lambda: field.gradient(field.theta))
        self._expect()
        if self.mode == "global" and not self.globally.paths.steps:
            with self.governor.measuring("paths", trainer.global_step):
                self.globally.begin(trainer.global_step, self._s, field.theta, state, self._settings, rules)

    def _expect(self) -> None:
        """Tells the governor what measurements will cost that have not been made yet."""
        for kind, count in _GRADIENTS.items():
            self.governor.expect(kind, count * self._gradient_seconds + (_DRAWING if kind == "figures" else 0))

    def _note_gradient(self, trainer: pl.Trainer, optimizer: Any) -> None:
        """Before a step: its learning rates, and the gradient that it takes, before clipping."""
        self._lrs, weights = rates(optimizer), _weights(optimizer)
        # a gradient on the step's own batch takes less time than a step
        self.governor.expect("defect", self.governor.wall / max(trainer.global_step, 1))
        if self._settings is not None and self.governor.allows("defect", trainer.global_step):
            with self.governor.measuring("defect", trainer.global_step, ends=False):
                self.defect.note(weights)
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._log is not None and trainer.global_step % every == 0:
            with self.governor.measuring("defect", trainer.global_step, ends=False):
                square = sum(float(p.grad.square().sum()) for p in weights if p.grad is not None)
                self._log.scalars(trainer.global_step, {"flow/time": self._s, "flow/rate": self._lrs[0] * square})

    def _after_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        self._batches.append(batch)
        if trainer.global_step == self._seen:  # gradients are being accumulated
            return
        batches, self._batches, self._seen = self._batches, [], trainer.global_step
        self._s += self._lrs[0]
        if self._settings is None:
            self._batch = batch
            self._prepare(trainer, module)
        self._observe(trainer, batches)
        if self.defect.noted:
            with self.governor.measuring("defect", self._seen - 1):
                self._write(self.defect.measure(self._on_step(batches), self._lrs[0]))
        self._measure_due(trainer)

    def _measure_due(self, trainer: pl.Trainer) -> None:
        while (kind := self.governor.choose(self._seen, self._kinds())) is not None:
            begins = kind == "paths" and self.mode != "global"
            with self.governor.measuring(kind, self._seen, ends=not begins):
                {
                    "sharpness": self._measure_sharpness,
                    "derivatives": self._measure_derivatives,
                    "paths": self._begin_window if begins else self._advance,
                    "figures": self._draw,
                }[kind](trainer)

    def _kinds(self) -> set[str]:
        kinds = set(_WEIGHTS) - {"defect"}
        if self.window.active or (self.mode == "global" and not self.globally.behind):
            kinds.discard("paths")
        if self.paths is None and self.edge.last is None:
            kinds.discard("figures")
        return kinds

    def _observe(self, trainer: pl.Trainer, batches: list[Any]) -> None:
        if self.mode == "global":
            self.globally.observe(self._lrs)
        elif self.window.active and self.window.observe(self._lrs, lambda: self._field.theta, batches):
            with self.governor.measuring("paths", self._seen):
                self._finish_window(trainer)

    def _measure_sharpness(self, trainer: pl.Trainer) -> None:
        values, self._words = self.edge.measure(self._field, self._optimizer(trainer), self._seen, self._lrs)
        self._write(values)
        self.summary |= {name: values[f"flow/{name}"] for name in ("sharpness", "stability")}
        self._summarise()

    def _measure_derivatives(self, trainer: pl.Trainer) -> None:
        began = time.perf_counter()
        self._write(derivative_values(self._field, self._lrs[0], self.loss_floor))
        self._gradient_seconds = (time.perf_counter() - began) / 5  # the first of all may have been slow
        self._expect()

    def _advance(self, trainer: pl.Trainer) -> None:
        assert self._settings is not None
        self.globally.advance(
            self._seen, self._s, self._field.theta, self._settings, update_rules(self._optimizer(trainer))
        )
        self.paths = self.globally.paths
        self._write_paths(self.paths, [len(self.paths.steps) - 1])

    def _begin_window(self, trainer: pl.Trainer) -> None:
        self.window.begin(self._seen, self._s, self._field.theta, capture(self._optimizer(trainer)))

    def _finish_window(self, trainer: pl.Trainer) -> None:
        assert self._settings is not None
        try:
            paths = self.window.finish(self._settings, update_rules(self._optimizer(trainer)))
        except SolveError as error:  # the next window may be easier
            if not self._warned:
                reason = str(error).splitlines()[0]
                rank_zero_warn(f"the gradient flow could not be followed up to step {self._seen}: {reason}")
            self._warned = True
            return
        if paths is not None:
            self.paths = paths
            self._write_paths(paths, range(len(paths.steps)))

    def _write_paths(self, paths: Paths, points: Any) -> None:
        assert self._log is not None
        for i in points:
            for name, losses in paths.losses.items():
                values = {"flow/loss": losses[i]}
                if name != FLOW:
                    values["flow/distance"] = paths.distances[name][i]
                    if paths.gone[i] > 0:
                        values["flow/distance_relative"] = paths.distances[name][i] / paths.gone[i]
                self._log.scalars(paths.steps[i], values, name)
        self.summary["distance"] = paths.distances["sgd"][-1]
        if paths.gone[-1] > 0:
            self.summary["distance_relative"] = paths.distances["sgd"][-1] / paths.gone[-1]

    def _draw(self, trainer: pl.Trainer) -> None:
        assert self._log is not None
        cost = {grid: _CONTOUR * grid**2 * self._gradient_seconds for grid in GRIDS}
        grid = next((g for g in GRIDS if self.governor.affords(cost[g]) and (cost[g] < 1.0 or g == GRIDS[-1])), 0)
        draw(self._log, self._seen, self.paths, self._field, self.plane, grid,
             name_of(update_rules(self._optimizer(trainer))))  # fmt: skip

    def _finish(self, trainer: pl.Trainer) -> None:
        if self._settings is None or self._log is None:
            return
        if self.globally.behind or (self.window.active and self.governor.affords_another("paths")):
            with self.governor.measuring("paths", self._seen):
                (self._advance if self.mode == "global" else self._finish_window)(trainer)
        if self.mode == "global":
            self.paths = self.globally.paths
        # within a budget not for the first time, for its figures would come on top
        known = self.edge.last is not None or self.governor.budget is None
        late = self.edge.last is None or self.edge.last[0] < self._seen
        if known and late and self.governor.affords_another("sharpness"):
            with self.governor.measuring("sharpness", self._seen):
                self._measure_sharpness(trainer)
        with self.governor.measuring("figures", self._seen):
            self._draw(trainer)
        self.governor.stop()  # one share of the time for the result, TensorBoard, the text and the last line
        self.summary["overhead"] = self.governor.overhead
        self._write({"flow/overhead": self.governor.overhead})
        self._summarise()
        print(f"gradient flow: {self.folder}; the monitor took {self.governor.report()}", flush=True)

    def _summarise(self) -> None:
        assert self._log is not None
        self._log.text(self._seen, "flow/summary", f"{self._words}\n\nThe monitor took {self.governor.report()}.")

    def _write(self, values: Mapping[str, float]) -> None:
        assert self._log is not None
        self._log.scalars(self._seen, values)

    def _on_step(self, batches: list[Any]) -> GradientField:
        """On the batches of a step, before clipping."""
        assert self._settings is not None
        field = self._settings.on_batches(batches)
        field.transform = None
        return field

    @property
    def _field(self) -> GradientField:
        """On the probe; its dropout masks hold for a window of steps."""
        assert self._settings is not None
        self._settings.field.seed = self._seed
        return self._settings.field

    @property
    def _seed(self) -> int:
        return max(self._seen, 0) // self.window.length

    @staticmethod
    def _optimizer(trainer: pl.Trainer) -> torch.optim.Optimizer:
        return trainer.optimizers[0]


def _weights(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """What θ is made of, in its order."""
    return [p for group in moving(optimizer) for p in group]
