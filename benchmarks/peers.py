"""The arms of the benchmark: neuralode and its peers, each at the fastest setting that was found for it.

`ARMS` maps names to functions that make an arm for a workload, or raise Absent. A peer that is not installed, or that
has no such method, is no error.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torchdiffeq
from fields import ConvPair, Lorenz, NormedMLP, VanDerPol
from measure import RATE, Answer, Arm, Solve, TorchArm, Workload, loss_of
from torch import nn

from neuralode.nn import MLPField
from neuralode.ode import Stats
from neuralode.ode.solve import solve_configured
from neuralode.ode.solver_config import SolverConfig


class Absent(Exception):
    """Why an arm has nothing to show for a workload."""


def load(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"absent: {error}") from error


class NeuralodeArm(TorchArm):
    """neuralode at one setting; its own statistics say what a solve took, for a hook would keep the kernels away."""

    def __init__(self, work: Workload, config: SolverConfig):
        super().__init__(work, self._solve)
        self.config = config
        self.stats: Stats

    def _solve(self, field: nn.Module, work: Workload) -> tuple[torch.Tensor, int | None]:
        solution = solve_configured(field, work.y0, work.ts, self.config)
        self.stats = solution.stats
        return solution.ys[1:], solution.stats.accepted

    def answer(self) -> Answer:
        field = copy.deepcopy(self.work.field)
        loss = loss_of(self._solve(field, self.work)[0])
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in field.parameters()]).double()
        stats = self.stats
        return Answer(loss.item(), gradient, stats.nfe, stats.nfe_backward, stats.accepted)

    def peak(self) -> int:
        """With what the kernels of the CPU keep in memory of their own."""
        held = super().peak()
        return held + ((self.stats.kept_bytes or 0) if self.work.device == "cpu" else 0)


def neuralode_arm(work: Workload, **settings: Any) -> Arm:
    fixed = {"step_size": work.step_size} if work.steps else {"rtol": work.rtol, "atol": work.atol}
    if settings.get("gradient") == "adjoint":
        settings["adjoint_seminorm"] = True
    return NeuralodeArm(work, SolverConfig(method=work.method, **fixed, **settings))


def torchdiffeq_arm(work: Workload, adjoint: bool = False) -> Arm:
    settings: dict[str, Any] = {"method": work.method}
    if work.steps:
        settings["options"] = {"step_size": work.step_size}
    else:
        settings |= {"rtol": work.rtol, "atol": work.atol}
    if adjoint and not work.steps:
        settings["adjoint_options"] = {"norm": "seminorm"}
    odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    return TorchArm(work, lambda field, work: (odeint(field, work.y0, work.ts, **settings)[1:], None))


def torchode_arm(work: Workload, compiled: bool = False) -> Arm:
    """Its steps are each sample's own; `compiled` is torch.compile around its solve, the first call excluded."""
    to = load("torchode")
    if work.method not in ("dopri5", "euler"):
        raise Absent(f"has no {work.method}")
    if compiled and work.times > 10:
        raise Absent("not run: its reading of many output times takes minutes to compile")
    batch = work.shape[0]
    y0, ts = work.y0.flatten(1), work.ts.expand(batch, -1)
    start = y0.new_full((batch,), work.step_size or 0.0) if work.steps else None
    between = ts if work.times > 2 else None

    def solver_for(field: nn.Module, compiled: bool) -> Callable[..., Any]:
        flat = len(work.shape) == 2
        call = field if flat else lambda t, y: field(t, y.view(work.shape)).flatten(1)
        term = to.ODETerm(call, with_stats=False)
        method = to.Euler(term) if work.steps else to.Dopri5(term=term)
        control = (
            to.FixedStepController() if work.steps else to.IntegralController(term=term, rtol=work.rtol, atol=work.atol)
        )
        solve = to.AutoDiffAdjoint(method, control, backprop_through_step_size_control=False).solve
        if not compiled:
            return solve
        torch._dynamo.reset()  # of a function it keeps eight programs at most, and then none of this workload's
        return torch.compile(solve)

    def solve_by(compiled: bool) -> Solve:
        made = functools.cache(solver_for)  # a solver belongs to its field, and is made once for it

        def solve(field: nn.Module, work: Workload) -> tuple[torch.Tensor, int | None]:
            problem = to.InitialValueProblem(y0=y0, t_start=ts[:, 0], t_end=ts[:, -1], t_eval=between)
            solution = made(field, compiled)(problem, dt0=start)
            return solution.ys.transpose(0, 1)[-(work.times - 1) :], int(solution.stats["n_accepted"].max())

        return solve

    return TorchArm(work, solve_by(compiled), count=solve_by(False))


def torchdyn_arm(work: Workload) -> Arm:
    load("torchdyn")
    odeint = load("torchdyn.numerics").odeint
    if work.steps:
        grid = torch.linspace(0, work.end, work.steps + 1).to(work.device)
        settings: dict[str, Any] = {"t_span": grid, "save_at": work.ts, "solver": work.method}
    else:
        tolerances = {"rtol": work.rtol, "atol": work.atol}
        settings = {"t_span": work.ts, "solver": work.method, **tolerances}
        if work.times > 2:
            settings["interpolator"] = "4th"
    return TorchArm(work, lambda field, work: (odeint(field, work.y0, **settings)[1][1:], None))


def jax_function(field: nn.Module) -> Callable[[list[Any], Any], Any]:
    """The field's twin in JAX: (its parameters in the order of the module, y) → dy/dt."""
    jax, jnp = load("jax"), load("jax.numpy")

    def mlp(parameters: list[Any], y: Any) -> Any:
        *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
        for weight, bias in hidden:
            y = jnp.tanh(y @ weight.T + bias)
        return y @ last[0].T + last[1]

    def conv_pair(parameters: list[Any], y: Any) -> Any:
        w1, b1, w2, b2 = parameters
        inner = jnp.tanh(jax.lax.conv(y, w1, (1, 1), "SAME") + b1[:, None, None])
        return jax.lax.conv(inner, w2, (1, 1), "SAME") + b2[:, None, None]

    def van_der_pol(parameters: list[Any], y: Any) -> Any:
        x, v = y[..., 0], y[..., 1]
        return jnp.stack([v, parameters[0] * (1 - x * x) * v - x], axis=-1)

    def lorenz(parameters: list[Any], y: Any) -> Any:
        a, b, c = y[..., 0], y[..., 1], y[..., 2]
        return jnp.stack([10.0 * (b - a), a * (parameters[0] - c) - b, a * b - 8 / 3 * c], axis=-1)

    def normed(parameters: list[Any], y: Any) -> Any:
        w1, b1, scale, shift, w2, b2, w3, b3 = parameters
        y = y @ w1.T + b1
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5) * scale + shift
        return jnp.tanh(jnp.tanh(y) @ w2.T + b2) @ w3.T + b3

    twins: dict[type, Callable[[list[Any], Any], Any]] = {
        MLPField: mlp, ConvPair: conv_pair, VanDerPol: van_der_pol, Lorenz: lorenz, NormedMLP: normed,
    }  # fmt: skip
    return twins[type(field)]


def diffrax_method(name: str) -> Any:
    """diffrax's method of that name; torchdiffeq's rk4, the 3/8 rule, is handed to it as a tableau."""
    diffrax = load("diffrax")
    if name != "rk4":
        return {"dopri5": diffrax.Dopri5, "euler": diffrax.Euler}[name]()

    class ThreeEighths(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([1 / 3, 2 / 3, 1]),
            a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1]), np.array([1, -1, 1])),
            b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
            b_error=np.zeros(4),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    return ThreeEighths()


class DiffraxArm:
    """diffrax with the whole training step under jax.jit: one system with shared steps, or vmapped over the samples.

    RecursiveCheckpointAdjoint with as many checkpoints as steps was the fastest of its exact gradients.
    """

    def __init__(self, work: Workload, vmapped: bool):
        self.jax, self.diffrax = load("jax"), load("diffrax")
        self.jnp = load("jax.numpy")
        if work.device != "cpu":
            if self.jax.default_backend() == "cpu":
                raise Absent("its jax sees no GPU")
            self.jax.config.update("jax_default_matmul_precision", "highest")  # else it multiplies in TF32
        self.work, self.vmapped = work, vmapped
        self.initial = self.parameters = [self.jnp.asarray(p.detach().cpu().numpy()) for p in work.field.parameters()]
        self.y0 = self.jnp.asarray(work.y0.cpu().numpy())
        self.function = jax_function(work.field)

    @functools.cached_property
    def compiled(self) -> Any:
        return self.jax.jit(self._train).lower(self.parameters, self.y0).compile()

    @functools.cached_property
    def solved(self) -> Any:
        return self.jax.jit(self._solves)

    def forward(self) -> None:
        self.jax.block_until_ready(self.solved(self.parameters, self.y0))

    def step(self) -> None:
        self.parameters = self.jax.block_until_ready(self.compiled(self.parameters, self.y0))

    def answer(self) -> Answer:
        (loss, accepted), gradients = self.jax.jit(self._gradient)(self.initial, self.y0)
        flat = [torch.tensor(g.tolist(), dtype=torch.float64).flatten() for g in gradients]
        return Answer(float(loss), torch.cat(flat), accepted=int(accepted))

    def peak(self) -> int:
        """Bytes of temporary buffers that XLA planned for; it holds the new parameters apart."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def _gradient(self, parameters: list[Any], y0: Any) -> Any:
        return self.jax.value_and_grad(self._loss, has_aux=True)(parameters, y0)

    def _train(self, parameters: list[Any], y0: Any) -> list[Any]:
        gradients = self._gradient(parameters, y0)[1]
        return [p - RATE * g for p, g in zip(parameters, gradients, strict=True)]

    def _loss(self, parameters: list[Any], y0: Any) -> tuple[Any, Any]:
        later, accepted = self._solves(parameters, y0)
        return self.jnp.mean(later**2), self.jnp.max(accepted)

    def _solves(self, parameters: list[Any], y0: Any) -> tuple[Any, Any]:
        return (self.jax.vmap(self._solve) if self.vmapped else self._solve)(parameters, y0)

    def _solve(self, parameters: list[Any], y0: Any) -> tuple[Any, Any]:
        diffrax, work = self.diffrax, self.work
        most = work.steps + 1 if work.steps else work.most_steps
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: self.function(p, y)),
            diffrax_method(work.method),
            t0=0.0,
            t1=work.end,
            dt0=work.step_size,
            y0=y0,
            args=parameters,
            saveat=diffrax.SaveAt(ts=self.jnp.asarray(work.ts[1:].cpu().numpy()))
            if work.times > 2
            else diffrax.SaveAt(t1=True),
            stepsize_controller=(
                diffrax.ConstantStepSize() if work.steps else diffrax.PIDController(rtol=work.rtol, atol=work.atol)
            ),
            adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=most),
            max_steps=most,
        )
        return solution.ys, solution.stats["num_accepted_steps"]


def diffrax_arm(work: Workload, vmapped: bool = False) -> Arm:
    return DiffraxArm(work, vmapped)


def for_spread(make: Callable[..., Arm], **settings: Any) -> Callable[[Workload], Arm]:
    """An arm for workloads whose samples differ much, and for no other."""

    def made(work: Workload) -> Arm:
        if not work.spread:
            raise Absent("")
        return make(work, **settings)

    return made


BASE = "neuralode"
ARMS: dict[str, Callable[[Workload], Arm]] = {
    BASE: neuralode_arm,
    "neuralode, recomputing": functools.partial(neuralode_arm, checkpoint="always"),
    "neuralode, steps per sample": for_spread(neuralode_arm, per_sample=True),
    "neuralode, stepper": functools.partial(neuralode_arm, engine="stepper"),
    "neuralode, stepper, recomputing": functools.partial(neuralode_arm, engine="stepper", checkpoint="always"),
    "neuralode, stepper, steps per sample": for_spread(neuralode_arm, engine="stepper", per_sample=True),
    "neuralode, adjoint": functools.partial(neuralode_arm, gradient="adjoint"),
    "neuralode, torchdiffeq engine": functools.partial(neuralode_arm, engine="torchdiffeq"),
    "torchdiffeq": torchdiffeq_arm,
    "torchdiffeq, adjoint": functools.partial(torchdiffeq_arm, adjoint=True),
    "torchode (steps per sample)": torchode_arm,
    "torchode, compiled": functools.partial(torchode_arm, compiled=True),
    "torchdyn": torchdyn_arm,
    "diffrax": diffrax_arm,
    "diffrax, steps per sample": for_spread(diffrax_arm, vmapped=True),
}
