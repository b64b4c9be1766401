"""An implicit Runge-Kutta method for stiff fields, its gradient exact by the implicit-function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.explicit import Evaluate, Method, Step, moment, moments
from neuralode.ode.interpolants import Interpolant, Polynomial, advance, increment
from neuralode.ode.tolerance import in_transform, to_host

GAMMA = 0.25
C = (0.0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1.0)
A = (
    (),
    (1 / 4,),
    (8611 / 62500, -1743 / 31250),
    (5012029 / 34652500, -654441 / 2922500, 174375 / 388108),
    (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912),
    (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211),
)
"""The rows left of the diagonal, which is GAMMA but for the first row, where it is zero; the last row is b."""
B = (*A[-1], GAMMA)
B_LOW = (
    4586570599 / 29645900160, 0.0, 178811875 / 945068544, 814220225 / 1159782912, -3700637 / 11593932, 61727 / 225920,
)  # fmt: skip
"""The embedded weights, of order three; their stability function tends to -0.15, so the estimate needs no filter."""

DENSE = (
    (1.0, -8620844395 / 2892679812, 5195427235 / 1446339906, -1051472152 / 723169953),
    (0.0, -648559 / 1041579, 1297118 / 1041579, -648559 / 1041579),
    (0.0, 3480859375 / 592807248, -22816046875 / 2074825368, 5510265625 / 1037412684),
    (0.0, -18332228125 / 5092428528, 25263688375 / 2546214264, -7182354625 / 1273107132),
    (0.0, 71540300 / 45250821, -192900040 / 45250821, 15557840 / 6464403),
    (0.0, -1 / 4, 1 / 2, 0.0),
)
"""Coefficients of θ, ..., θ⁴ of the weights between the steps, derived for this package: the only such polynomials that
meet the order conditions up to four at every θ and join the steps with one slope."""

_ERROR = tuple(high - low for high, low in zip(B, B_LOW, strict=True))


class ESDIRK4:
    """ESDIRK4(3)6L[2]SA, the implicit half of ARK4(3)6L[2]SA.

    Six stages, the first explicit, of order four with stage order two, L-stable and stiffly accurate: the last
    stage's slope is that at the end of the step (Kennedy and Carpenter 2003, Appl. Numer. Math. 44, 139-181).

    A state with one dimension, [D], is one system; with more, [B, ...], dimension 0 holds independent samples, each
    a system of its own with D entries, and their Jacobians, [B, D, D], come from D vector-Jacobian products for all.

    The stages are solved to rounding, so that the gradient is that of the discrete solve. It passes each stage
    k = f(t, base + hγk) as dk = (I - hγJ)⁻¹ df, J being the Jacobian at the stage; first derivatives only.
    """

    name = "esdirk4"
    order = error_order = 4
    adaptive = interpolates = by_sample = differentiates = True
    shrinks = False
    stages = 6
    options = frozenset[str]()

    def fresh(self, options: dict[str, Any]) -> Method:
        """Itself: nothing is kept from step to step, so that a step can be recomputed from its start alone."""
        return self

    def plan(self, field: Evaluate, t: float, y: torch.Tensor, h: float, f0: torch.Tensor,
             cut: bool = False) -> tuple[float, Any]:  # fmt: skip
        """Nothing to fix: the Jacobian belongs to the step, where recomputing finds it again."""
        return h, None

    def step(self, field: Evaluate, t: Any, h: Any, y: torch.Tensor, f0: torch.Tensor, plan: Any = None,
             complete: bool = True) -> Step:  # fmt: skip
        """One step from (t, y) of size h, f0 being f(t, y); samples whose stages are not found become NaN."""
        if y.is_complex():
            raise UsageError("esdirk4 takes real states only; give torch.view_as_real(y) to a field that undoes it.")
        stages, at = [f0], y
        with torch.no_grad():
            newton = _Newton(field, h)
            newton.begin(moment(t, y), y)
        for row, time in zip(A[1:], moments(t, h, C[1:], y), strict=True):
            base = advance(y, h, increment(stages, row))
            with torch.no_grad():
                slope = newton.solve(time, base, stages[-1])
            at = advance(base, GAMMA * h, slope)
            if torch.is_grad_enabled():
                slope = newton.attach(time, at, slope)
                at = advance(base, GAMMA * h, slope)
            stages.append(slope)
        return Step(t, h, y, f0, at, stages[-1], stages)

    def error(self, step: Step, field: Evaluate) -> torch.Tensor:
        """h Σᵢ (bᵢ - b̂ᵢ)kᵢ, or infinity where the stages were not found, so that the step is tried with less h."""
        error = increment(step.stages, _ERROR)
        assert error is not None
        return (error * step.h).nan_to_num(math.inf, math.inf, -math.inf)

    def interpolant(self, step: Step, field: Evaluate) -> Interpolant:
        return Polynomial(step.y0, step.stages, DENSE, step.h)

    def stiffness(self, step: Step) -> torch.Tensor | None:
        return None


def _computed_in(y: torch.Tensor) -> torch.dtype:
    """The type whose rounding a field of this state has: that of autocast, where it is on."""
    device = y.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype


class _Newton:
    """Newton's iteration for the stages of one step, on one matrix I - hγJ for as long as it converges fast."""

    ITERATIONS = 12
    FAST = 0.05
    """The Jacobian is taken anew where an update is larger than this part of the one before it."""
    ROUNDING = 4.0
    """Updates of so many units of rounding, relative to the state, change nothing."""

    def __init__(self, field: Evaluate, h: Any):
        self.field = field
        self.weight = GAMMA * (h.detach() if isinstance(h, torch.Tensor) else h)

    def begin(self, t: torch.Tensor, y: torch.Tensor) -> None:
        """Takes the Jacobian at the start of a step.

        Raises:
            UsageError: if the samples depend on each other, where the Jacobian, and with it the gradient, were wrong;
                or if the field has no Jacobian for autograd.
        """
        slope, pull = linearise(self.field, t, y)
        if not slope.requires_grad and not in_transform() and getattr(self.field, "traced", True):
            self._check_constant(t, y, slope)
        jacobian = _jacobian(pull, y)
        if len(jacobian) > 1:
            probe = torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view(len(jacobian), 1, -1)
            gap = (pull(probe.view_as(y)).reshape(probe.shape) - probe @ jacobian).abs().amax()
            allowed = 10 * torch.finfo(_computed_in(y)).eps ** 0.5 * (probe.abs() @ jacobian.abs()).amax()
            if to_host(gap - allowed) > 0:
                raise UsageError(
                    f"the field lets the samples along dimension 0 of the state, of shape {tuple(y.shape)}, depend on "
                    "each other, but esdirk4 takes them as systems of their own; give one system as a state with one "
                    "dimension (batch normalisation in training mode couples samples too)."
                )
        self._factorise(jacobian)

    def _check_constant(self, t: torch.Tensor, y: torch.Tensor, slope: torch.Tensor) -> None:
        """Raises UsageError if a slope without a graph depends on the state, where a Jacobian of zero were wrong."""
        change = torch.finfo(y.dtype).eps ** 0.5 * (1 + y.detach().abs())
        # on both sides: a field of pieces may change its value on one
        if to_host(((self.field(t, y + change) != slope) & (self.field(t, y - change) != slope)).sum().double()):
            raise UsageError(
                "esdirk4 differentiates the field, but autograd does not see how its slope depends on the state "
                "(torch.no_grad, detach or NumPy in the field?); leave that out, or give another method such as 'rkc2'."
            )

    def solve(self, t: torch.Tensor, base: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """The k with k = f(t, base + hγk), to rounding, starting from `slope`; NaN in the samples that find none."""
        eps = torch.finfo(base.dtype).eps
        last, renewed = None, False
        for _ in range(self.ITERATIONS):
            update = self._divide(self.field(t, base + self.weight * slope) - slope)
            slope = slope + update
            size = self._relative(update, base, slope)
            # what is left after this update is smaller than it by about the factor between the last two
            rate = torch.ones_like(size) if last is None else size / last
            open_ = size * rate.clamp(max=1) > self.ROUNDING * eps  # false where NaN: lost, and no matter any more
            if renewed:  # where even that does not help, what is left is rounding inside the field
                open_ = open_ & ((rate <= self.FAST) | (size > eps**0.5))
            slowest = to_host(torch.where(open_, rate, 0.0).amax()) if size.numel() else 0.0
            if slowest == 0:
                return slope
            renewed = last is not None and slowest > self.FAST
            if renewed:
                self._factorise(_jacobian(linearise(self.field, t, base + self.weight * slope)[1], base))
            last = size
        return torch.where(open_[..., None], math.nan, _columns(slope)).reshape(slope.shape)

    def attach(self, t: torch.Tensor, at: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """`slope` = f(t, at), solved for outside the graph, with its gradient to all that `at` and f depend on."""
        here, pull = linearise(self.field, t, at) if at.requires_grad else (self.field(t, at), None)
        if not here.requires_grad:
            return slope
        with torch.no_grad():
            self._factorise(_jacobian(pull or linearise(self.field, t, at)[1], at))
        attached: torch.Tensor = _Solved.apply(here, slope, *self.factors)
        return attached

    def _factorise(self, jacobian: torch.Tensor) -> None:
        eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
        weight = self.weight
        if isinstance(weight, torch.Tensor):  # one for all, or one for each sample
            weight = weight.to(eye.dtype).reshape((1, -1, 1) if weight.dim() == 1 else (-1, 1, 1))
        # a singular matrix shows as updates that are not finite
        self.factors = torch.linalg.lu_factor_ex(eye - weight * jacobian)[:2]

    def _divide(self, x: torch.Tensor) -> torch.Tensor:
        """(I - hγJ)⁻¹x, for x of the shape of the state."""
        return torch.linalg.lu_solve(*self.factors, _columns(x)).reshape(x.shape)

    def _relative(self, update: torch.Tensor, base: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Size of an update of the stage's state relative to that state, for each sample, [B, 1]."""
        parts = (self.weight * update, base, self.weight * slope)
        change, start, way = (torch.linalg.vector_norm(_columns(x), dim=1) for x in parts)
        return change / (start + way + torch.finfo(base.dtype).tiny)


class _Solved(torch.autograd.Function):
    """The solved stage as a function of f at the stage, whose value it does not change: dk = (I - hγJ)⁻¹ df."""

    generate_vmap_rule = True

    @staticmethod
    def forward(here: torch.Tensor, slope: torch.Tensor, lu: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        return slope.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def jvp(ctx: Any, here: torch.Tensor, slope: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        # no_grad does not keep tangents out of the iteration: what it found is in `slope`, and in `here` through it
        return slope + torch.linalg.lu_solve(*ctx.saved_tensors, _columns(here - slope)).reshape(here.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UsageError(
                "second derivatives through esdirk4 are not available (create_graph=True, and torch.func.grad, ask "
                "for them); take first derivatives by .backward(), or give method='dopri5'."
            )
        solved = torch.linalg.lu_solve(*ctx.saved_tensors, _columns(gradient), adjoint=True)
        return solved.reshape(gradient.shape), None, None, None


def _columns(x: torch.Tensor) -> torch.Tensor:
    """A state as [B, D, 1], one column for each independent system; a state without samples has B = 1."""
    samples = x.shape[0] if x.dim() > 1 else 1
    return x.reshape(samples, x.numel() // max(samples, 1), 1)


def linearise(
    field: Evaluate, t: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """f(t, y) with its graph, and the map from a cotangent v to vᵀ∂f/∂y, all in the shape of y."""
    if in_transform():
        slope, pull, *_ = torch.func.vjp(lambda x: field(t, x), y)
        return slope, lambda v: pull(v)[0]
    # outside the transforms of torch.func, autograd takes more fields than they do, and is faster
    with torch.enable_grad():
        at = y if y.requires_grad else y.detach().requires_grad_()
        slope = field(t, at)
    if not slope.requires_grad:
        return slope, torch.zeros_like

    def product(v: torch.Tensor) -> torch.Tensor:
        try:
            (row,) = torch.autograd.grad(slope, at, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if in_transform() or "donated buffers" not in str(error):
                raise
            # the graph of compiled code may serve one product only: each has an evaluation of its own
            with torch.enable_grad():
                again = field(t, at)
            (row,) = torch.autograd.grad(again, at, v, allow_unused=True)
        return torch.zeros_like(v) if row is None else row

    return slope, product


def _jacobian(pull: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """∂f/∂y as [B, D, D], by one product for each of the D entries of a sample."""
    samples, width = _columns(y).shape[:2]
    units = torch.eye(width, dtype=y.dtype, device=y.device)[:, None].expand(-1, samples, -1)
    cotangents = units.reshape(width, *y.shape)
    try:
        rows = torch.func.vmap(pull)(cotangents)
    except RuntimeError:  # an operation of the field cannot be mapped
        rows = torch.stack([pull(cotangent) for cotangent in cotangents])
    return rows.reshape(width, samples, width).transpose(0, 1)
