"""The continuous adjoint: the gradient by a second solve, backwards in time (Chen et al. 2018, appendix B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.clock import Clock
from neuralode.ode.dense import DenseOutput
from neuralode.ode.diagnosis import diagnosis
from neuralode.ode.explicit import moment
from neuralode.ode.packing import Packing
from neuralode.ode.parameters import UNREACHED, Autocast, HeldField, InnerGradient, refuse_another_field
from neuralode.ode.solution import SolveError, Stats
from neuralode.ode.stepper import CountedField, Failure, Integration, Settings
from neuralode.ode.tolerance import largest_rms, transformed


@dataclass(frozen=True)
class AdjointSettings:
    """How the adjoint equation is solved."""

    settings: Settings
    """Method and tolerances of the backward solve; its norm is set here."""
    grid_between: Callable[[float, float], tuple[float, ...] | None]
    """The steps of a fixed-step method between two times; None for one with error control."""
    seminorm: bool = False
    """Weigh the error of the state and its adjoint alone (Kidger et al. 2021, "Hey, that's not an ODE")."""
    interpolated: bool = False
    """Read the state from the dense output of the forward solve instead of solving it backwards."""


def solve_with_adjoint(
    integration: Integration,
    evaluate: HeldField,
    inputs: Sequence[torch.Tensor],
    adjoint: AdjointSettings,
    stats: Stats,
) -> list[torch.Tensor]:
    """Runs an integration without graphs; the backward pass solves the adjoint equation.

    Args:
        integration: at its start.
        evaluate: the field in the backward pass, with the parameters that the forward pass had.
        inputs: every further tensor that the field depends on and that wants a gradient.

    Returns:
        The output states, a graph for which memory does not grow with the number of steps, unless `interpolated`.
    """
    refuse_transforms()
    y, ts = integration.y, integration.clock.ts
    if not (inputs or y.requires_grad or ts.requires_grad):
        # the backward pass, which notices what comes in later, would have no graph to begin with
        integration.run(pause=lambda: integration.y.requires_grad)
        if any(state.requires_grad for state in (*integration.outputs, integration.y)):
            raise UsageError(UNREACHED)
        return integration.outputs
    return list(_Adjoint.apply(integration, evaluate, adjoint, stats, y, ts, *inputs))


def refuse_transforms() -> None:
    """Raises UsageError where derivatives are taken by what the adjoint equation does not serve."""
    if transformed():
        raise UsageError(
            "gradient='adjoint' does not work inside torch.func transforms or with forward-mode differentiation; use "
            "gradient='exact'."
        )


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, integration: Integration, evaluate: HeldField, adjoint: AdjointSettings, stats: Stats,
                y: torch.Tensor, ts: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # fmt: skip
        integration.clock = Clock(ts.detach(), integration.clock.lands)
        integration.outputs = [y.detach()]
        integration.detach()
        autocast = Autocast(y)
        with autocast.restored():
            with evaluate.solving(inputs):
                integration.run()
            with evaluate.as_solved():
                # evaluated anew, as the backward pass will: a step's last stage may be a rounding off the last time
                ctx.slope = integration.field(integration.moment(), integration.y).clone()
        ctx.evaluate, ctx.adjoint, ctx.stats = evaluate, adjoint, stats
        ctx.dense = integration.dense_output(Packing(y)) if adjoint.interpolated else None
        outputs = tuple(state.clone() for state in integration.outputs)
        # the constants are saved so that autograd notices if they were changed in place since
        ctx.save_for_backward(ts, torch.stack(outputs), *inputs, *evaluate.constants)
        ctx.sources, ctx.autocast, ctx.end = (y, ts, *inputs), autocast, integration.t
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            return _First.apply(ctx, len(cotangents), *cotangents, *ctx.sources)
        return _Adjoint.gradients(ctx, *cotangents)

    @staticmethod
    def gradients(ctx: Any, *cotangents: torch.Tensor) -> Any:
        ts, ys = ctx.saved_tensors[:2]
        _, _, *inputs = ctx.sources
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[6:], strict=True) if needed]
        ctx.evaluate.begin_backward()
        equation = _Equation(ctx.evaluate, inputs, wanted, ys[0], ctx.stats, ctx.dense)
        with ctx.autocast.restored():
            with ctx.evaluate.as_solved():
                refuse_another_field(ctx.evaluate(moment(ctx.end, ys[-1]), ys[-1]), ctx.slope)
            gradient = cotangents[-1].clone()
            parameters = equation.zeros()
            slopes = torch.zeros_like(ts)
            for i in range(len(ts) - 1, 0, -1):
                if ctx.needs_input_grad[5]:
                    slopes[i] = equation.rate(ts[i], ys[i], cotangents[i])
                gradient, parameters = _back(ctx.adjoint, equation, ts[[i, i - 1]], ys[i], gradient, parameters)
                gradient = gradient + cotangents[i - 1]
            if ctx.needs_input_grad[5]:
                slopes[0] = equation.rate(ts[0], ys[0], cotangents[0] - gradient)
        found = iter(equation.unflatten(parameters))
        rest = [next(found) if needed else None for needed in ctx.needs_input_grad[6:]]
        return (None, None, None, None, gradient, slopes if ctx.needs_input_grad[5] else None, *rest)


class _First(torch.autograd.Function):
    """The gradients, for a caller who keeps their graph.

    All that they depend on goes in, so that a gradient of theirs is refused and not lost, whatever it is taken of.
    """

    @staticmethod
    def forward(ctx: Any, of_solve: Any, outputs: int, *tensors: torch.Tensor) -> Any:
        return _Adjoint.gradients(of_solve, *tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        raise UsageError(
            "gradient='adjoint' (odeint_adjoint) has no second derivatives; use gradient='exact' (odeint) with "
            "checkpoint='never'."
        )


def _back(adjoint: AdjointSettings, equation: _Equation, ts: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor,
          parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Takes the adjoint state from ts[0] back to ts[1]."""
    parts = [y.flatten(), gradient.flatten(), parameters]
    if equation.dense is not None:
        parts = parts[1:]
    sizes = [len(part) for part in parts]
    weighed = sizes[:-1] if adjoint.seminorm else [*sizes[:-1], *equation.sizes]
    norm = largest_rms(weighed)
    total = sum(weighed)
    clock = Clock(ts.detach(), lands=False)
    settings = replace(
        adjoint.settings,
        tolerance=replace(adjoint.settings.tolerance, norm=lambda x: norm(x[:total])),
        grid=adjoint.grid_between(*clock.values),
    )
    field = CountedField(equation, (), lambda dy, _: None)
    field.traced = False
    stats = Stats("stepper", "", "adjoint")
    integration = Integration(settings, field, clock, torch.cat(parts), stats)
    try:
        integration.run()
    except Failure as failure:
        stats.nfe = field.nfe
        stats.method, begun = adjoint.settings.method.name, failure.t if stats.accepted else None
        message = "the adjoint solve, backwards in time: " + diagnosis(failure.status, stats, begun, None)
        raise SolveError(message, failure.status, stats) from None
    *_, gradient, parameters = integration.y.split(sizes)
    return gradient.view_as(y), parameters


class _Equation:
    """The adjoint equation over the flat state (y, a, p): ȧ = −aᵀ∂f/∂y, ṗ = −aᵀ∂f/∂θ; y is left out if `dense`."""

    def __init__(self, evaluate: HeldField, known: Sequence[torch.Tensor], inputs: list[torch.Tensor],
                 like: torch.Tensor, stats: Stats, dense: DenseOutput | None):  # fmt: skip
        self.evaluate, self.inputs, self.like, self.stats, self.dense = evaluate, inputs, like, stats, dense
        self.inner = InnerGradient(inputs, known)
        self.sizes = [len(self._flat(x)) for x in inputs]

    def zeros(self) -> torch.Tensor:
        return self.like.new_zeros(sum(self.sizes))

    def unflatten(self, parameters: torch.Tensor) -> list[torch.Tensor]:
        parts = parameters.split(self.sizes) if self.sizes else ()
        return [self._unflat(part, x) for part, x in zip(parts, self.inputs, strict=True)]

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """x as a part of the flat state: complex numbers are pairs of real ones, unless the state is complex."""
        pairs = x.is_complex() and not self.like.is_complex()
        return (torch.view_as_real(x.resolve_conj()) if pairs else x).flatten()

    def _unflat(self, part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.is_complex() and not part.is_complex():
            return torch.complex(*part.to(x.dtype.to_real()).view(*x.shape, 2).unbind(-1))
        return (part.real if part.is_complex() and not x.is_complex() else part).view_as(x).to(x.dtype)

    def rate(self, t: torch.Tensor, y: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        """⟨cotangent, f(t, y)⟩, the gradient with respect to a time."""
        slope = self.evaluate(moment(float(t), y), y)
        return (cotangent.conj() * slope).real.sum() if y.is_complex() else (cotangent * slope).sum()

    def __call__(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        size = self.like.numel()
        if self.dense is None:
            y, state = state[:size].view_as(self.like), state[size:]
        else:
            found = self.dense(t)
            assert isinstance(found, torch.Tensor)
            y = found
        with self.inner.recording():
            y = y.detach().requires_grad_()
            dy = self.evaluate(t, y)
        self.inner.check([dy], y)
        a = state[:size].view_as(self.like)
        sources = [y, *self.inner.tensors]
        products: tuple[torch.Tensor | None, ...] = (None,) * len(sources)
        if dy.requires_grad:
            products = torch.autograd.grad(dy, sources, -a, allow_unused=True)
            self.stats.nfe_backward += 1
        flat = [self._flat(torch.zeros_like(x) if p is None else p) for p, x in zip(products, sources, strict=True)]
        return torch.cat([*([] if self.dense is not None else [dy.detach().flatten()]), *flat]).to(self.like.dtype)
