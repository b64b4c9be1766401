"""The paths that the monitor compares: SGD as it ran, the flow, and the optimiser on the probe batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from neuralode.callbacks.gradient_flow.log import CLOSED_FORM, DESCENT, FLOW
from neuralode.callbacks.gradient_flow.probe import savable
from neuralode.gradient_flow import (
    GradientField,
    OptimizerFlow,
    OptimizerState,
    Replica,
    Sharpness,
    UpdateRule,
    follow,
)
from neuralode.gradient_flow.quadratic import Quadratic, quadratic

MODES = ("window", "piecewise", "global")
READS = 10
"""Parts of a window at whose ends the paths are compared."""
_MOST_POINTS = 32
"""Points of a global path whose weights are kept."""
_FINER = 8
"""Up to as many times more points make the line of a path in the picture, where they cost nothing but memory."""
_MOST_NUMBERS = 2**24
"""Weights in all those points."""
_MOST_ON_A_LINE = 128
_KEPT = 3
"""Lists of points of a global path: SGD's, the flow's, and the flow's line; a closed form has few weights."""


@dataclass
class Paths:
    """Weights along the paths that start together, at the same moments."""

    steps: list[int] = field(default_factory=list)
    """Training steps, [T]."""
    s: list[float] = field(default_factory=list)
    """Flow times, [T]."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """On the probe, [T] for `sgd`, the flow and the others."""
    distances: dict[str, list[float]] = field(default_factory=dict)
    """Distance of each other path from the flow, [T]."""
    gone: list[float] = field(default_factory=list)
    """Distance of the flow from the start, [T]."""
    thetas: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Weights [P] for the picture: both ends, and between them where the path turns."""
    finer: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """The same, with more between them, of those paths that are known there."""

    def line(self, name: str) -> torch.Tensor:
        """Weights [T, P] along a path, as many as there are."""
        return torch.stack(self.finer.get(name) or self.thetas[name])

    def refine(self, name: str, thetas: Iterable[torch.Tensor], most: int = _MOST_ON_A_LINE) -> None:
        """Goes on with the line of a path, of which at most so many points are kept."""
        line = self.finer.setdefault(name, [])
        for theta in thetas:
            line.append(theta)
            if len(line) > most:
                del line[_least_missed(line)]

    def add(self, step: int, s: float, thetas: Mapping[str, torch.Tensor], losses: Mapping[str, float],
            most: int = _MOST_POINTS) -> None:  # fmt: skip
        """Goes on with all paths, of which at most so many points are kept."""
        self.steps.append(step)
        self.s.append(s)
        for name, theta in thetas.items():
            self.thetas.setdefault(name, []).append(theta)
            self.losses.setdefault(name, []).append(losses[name])
            if name != FLOW:
                self.distances.setdefault(name, []).append(_distance(theta, thetas[FLOW]))
        self.gone.append(_distance(thetas[FLOW], self.thetas[FLOW][0]))
        path = self.thetas["sgd"]
        if len(path) > most:
            least = _least_missed(path)
            for points in self.thetas.values():
                del points[least]


@dataclass
class Settings:
    """What the modes share."""

    field: GradientField
    """On the probe."""
    rtol: float
    sharpness: Sharpness
    """Of the flow's own states, apart from that of the run."""
    on_batches: Any
    """Makes a GradientField of a list of batches."""

    def losses(self, thetas: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {name: float(self.field.loss(theta)) for name, theta in thetas.items()}


class Window:
    """Flow and optimiser restart from the weights and the optimiser's state of a step, and run beside W steps of SGD.

    In the mode `piecewise` the flow follows the minibatches of SGD in their order, each for its own η, so that what is
    left between the two is discretisation alone; else it follows the probe.
    """

    def __init__(self, length: int, piecewise: bool):
        self.length, self.piecewise = length, piecewise
        self.active = False
        self._start, self._s, self._lrs = 0, 0.0, []  # type: int, float, list[list[float]]
        self._thetas: list[torch.Tensor] = []
        self._reads: list[int] = []
        self._batches: list[Any] = []
        self._state: OptimizerState | None = None

    def begin(self, step: int, s: float, theta: torch.Tensor, state: OptimizerState) -> None:
        self.active, self._start, self._s, self._state = True, step, s, state
        self._lrs, self._thetas, self._reads, self._batches = [], [theta], [0], []

    def observe(self, lrs: list[float], theta: Any, batches: list[Any]) -> bool:
        """Takes in a step of training; true when the window is full. `theta` gives the weights when called."""
        self._lrs.append(lrs)
        if self.piecewise:
            self._batches.append(batches)
        k = len(self._lrs)
        if k % max(1, self.length // READS) == 0 or k == self.length:
            self._reads.append(k)
            self._thetas.append(theta())
        return k >= self.length

    def finish(self, settings: Settings, rules: Sequence[UpdateRule]) -> Paths | None:
        """Computes the flow and the replica; None if the window has no step yet."""
        self.active = False
        reads, state = self._reads, self._state
        if len(reads) < 2 or state is None:
            return None
        start = self._thetas[0]
        lrs = self._lrs[: reads[-1]]
        paths, result = {"sgd": self._thetas}, Paths()
        if self.piecewise:
            paths[FLOW] = self._follow_pieces(settings, rules, state, lrs)
        else:
            moments, steps = denser(reads, start), reads
            if len(moments) > len(reads):
                steps = sorted({*reads, *range(0, reads[-1], max(1, reads[-1] // (_FINER * READS)))})
            dynamics = OptimizerFlow(settings.field, rules, state, lrs)
            found = follow(
                dynamics, dynamics.start(start), moments, rtol=settings.rtol, sharpness=settings.sharpness,
                max_steps=40 * self.length + 500,
            )  # fmt: skip
            lines: dict[str, tuple[Sequence[float], Any]] = {FLOW: (moments, found.thetas)}
            lines[DESCENT] = (steps, _descent(settings.field, start, state, lrs, steps))
            if known := closed_form(settings.field, start, rules, lrs):
                lines[CLOSED_FORM] = (moments, known.flow(found.s))
            for name, (at, line) in lines.items():
                paths[name] = [line[at.index(k)] for k in reads]
                result.refine(name, line)
        times = [self._s + sum(row[0] for row in lrs[:k]) for k in reads]
        for i, k in enumerate(reads):
            thetas = {name: path[i] for name, path in paths.items()}
            result.add(self._start + k, times[i], thetas, settings.losses(thetas))
        return result

    def _follow_pieces(
        self, settings: Settings, rules: Sequence[UpdateRule], state: OptimizerState, lrs: list[list[float]]
    ) -> list[torch.Tensor]:
        path, z, last = [self._thetas[0]], None, None
        for k, row in enumerate(lrs):
            dynamics = OptimizerFlow(settings.on_batches(self._batches[k]), rules, state, [row], state.steps + k)
            z = dynamics.start(self._thetas[0]) if z is None else z
            piece = follow(dynamics, z, [0, 1], method="bosh3", rtol=settings.rtol, first_step=last or 1.0)
            z, last = piece.end, piece.last_step
            if k + 1 in self._reads:
                path.append(z[0])
        return path

    def state_dict(self) -> dict[str, Any]:
        # without its batches a window cannot go on, and begins anew
        if not self.active or self._state is None or not savable(self._batches):
            return {"active": False}
        return {
            "active": True, "start": self._start, "s": self._s, "lrs": self._lrs, "thetas": self._thetas,
            "reads": self._reads, "batches": self._batches, "state": self._state.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if saved["active"]:
            self.begin(saved["start"], saved["s"], saved["thetas"][0], OptimizerState.restored(saved["state"]))
            self._lrs, self._thetas = saved["lrs"], list(saved["thetas"])
            self._reads, self._batches = saved["reads"], saved["batches"]


class Global:
    """The flow from the first weights, next to the whole run; it is taken further every so many steps."""

    def __init__(self) -> None:
        self.paths = Paths()
        self._z: torch.Tensor | None = None
        self._steps = 0.0
        """Steps of the optimiser that the flow has followed."""
        self._state: OptimizerState | None = None
        self._lrs: list[list[float]] = []
        self._last_step: float | None = None
        self._known: Quadratic | None = None

    @property
    def behind(self) -> int:
        """Steps that the flow has still to follow."""
        return len(self._lrs)

    def begin(self, step: int, s: float, theta: torch.Tensor, state: OptimizerState, settings: Settings,
              rules: Sequence[UpdateRule]) -> None:  # fmt: skip
        self._state, self._steps, self._z = state, state.steps, None
        self._known = closed_form(settings.field, theta, rules, [[rule.lr for rule in rules]])
        thetas = {"sgd": theta, FLOW: theta} | ({CLOSED_FORM: theta} if self._known else {})
        self.paths.add(step, s, thetas, settings.losses(thetas))

    def observe(self, lrs: list[float]) -> None:
        self._lrs.append(lrs)

    def advance(
        self, step: int, s: float, theta: torch.Tensor, settings: Settings, rules: Sequence[UpdateRule]
    ) -> None:
        """Follows the steps since the last call."""
        if not self._lrs or self._state is None:
            return
        points, on_a_line = _affordable(_MOST_POINTS, theta), _affordable(_MOST_ON_A_LINE, theta)
        moments = denser([0, len(self._lrs)], theta, _MOST_ON_A_LINE)
        dynamics = OptimizerFlow(settings.field, rules, self._state, self._lrs, self._steps)
        z = dynamics.start(self.paths.thetas[FLOW][-1]) if self._z is None else self._z
        found = follow(
            dynamics,
            z,
            moments,
            rtol=settings.rtol,
            sharpness=settings.sharpness,
            first_step=self._last_step,
        )
        # copies, for a row of the solve would keep all of it, in checkpoints too
        self._z, self._steps, self._last_step = found.end.clone(), self._steps + len(self._lrs), found.last_step
        self._lrs = []
        thetas = {"sgd": theta, FLOW: found.end[0].clone()}
        way = found.thetas[1:] if self.paths.finer else found.thetas
        self.paths.refine(FLOW, (row.clone() for row in way), on_a_line)
        if self._known is not None:
            known = self._known.flow(self.paths.s[-1] - self.paths.s[0] + found.s)
            thetas[CLOSED_FORM] = self._known.flow(torch.tensor([s - self.paths.s[0]], dtype=torch.float64))[0]
            self.paths.refine(CLOSED_FORM, known[1:] if CLOSED_FORM in self.paths.finer else known)
        self.paths.add(step, s, thetas, settings.losses(thetas), points)

    def state_dict(self) -> dict[str, Any]:
        return {
            "paths": dict(vars(self.paths)), "z": self._z, "steps": self._steps, "lrs": self._lrs,
            "last_step": self._last_step, "state": None if self._state is None else self._state.state_dict(),
            "known": None if self._known is None else dict(vars(self._known)),
        }  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.paths = Paths(**saved["paths"])
        self._z, self._steps, self._lrs = saved["z"], saved["steps"], saved["lrs"]
        self._last_step = saved["last_step"]
        self._state = None if saved["state"] is None else OptimizerState.restored(saved["state"])
        self._known = None if saved["known"] is None else Quadratic(**saved["known"])


def denser(reads: Sequence[int], like: torch.Tensor, most: int = READS) -> list[float]:
    """The moments of `reads` with others between them, where weights [P] of so many are no burden to keep.

    Args:
        like: the weights.
        most: reads that come together in a path.
    """
    parts = max(1, min(_FINER, _MOST_NUMBERS // (max(most, len(reads)) * like.numel())))
    between = [a + (b - a) * i / parts for a, b in itertools.pairwise(reads) for i in range(parts)]
    return [*between, reads[-1]]


def _affordable(most: int, like: torch.Tensor) -> int:
    """So many points of weights [P], at most, of each list of a global path; both ends in any case."""
    return max(2, min(most, _MOST_NUMBERS // (_KEPT * like.numel())))


def _least_missed(path: Sequence[torch.Tensor]) -> int:
    """The point between the ends that a picture of the path misses least."""
    return min(range(1, len(path) - 1), key=lambda i: _distance(path[i - 1], path[i + 1]))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b))


def _descent(field: GradientField, start: torch.Tensor, state: OptimizerState, lrs: list[list[float]],
             reads: Sequence[int]) -> list[torch.Tensor]:  # fmt: skip
    replica, path = Replica(start, state), [start]
    theta = start
    with field.borrowed():
        for k, row in enumerate(lrs):
            theta = replica.step(field.gradient(theta), row)
            if k + 1 in reads:
                path.append(theta)
    return path


def closed_form(
    field: GradientField, theta: torch.Tensor, rules: Sequence[UpdateRule], lrs: Sequence[Sequence[float]]
) -> Quadratic | None:
    """The closed form of the flow, where the loss is a quadratic in few weights and the optimiser is plain SGD."""
    plain = all(rule.kind == "sgd" and not rule.momentum and not rule.weight_decay for rule in rules)
    one_rate = all(len(set(row)) == 1 for row in lrs)
    return quadratic(field, theta) if plain and one_rate and field.transform is None else None
