"""torchdiffeq's functions, with its signatures: replace the import and keep the program.

What our stepper knows goes there. Anything else goes to torchdiffeq itself: its multistep methods, callbacks, events,
`perturb`, `jump_t`, tolerances as tensors; and so does every input that torchdiffeq refuses, in its own words.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq

from neuralode.errors import FieldError, UsageError, unknown
from neuralode.ode.clock import host_values
from neuralode.ode.eager import eager
from neuralode.ode.fastest import run_fastest
from neuralode.ode.methods import METHODS, check_method, in_torchdiffeq, options_of, takes_fixed_steps
from neuralode.ode.observed_field import refuse_other_arguments, tensors
from neuralode.ode.setup import unable
from neuralode.ode.solution import Stats
from neuralode.ode.solver_config import SolverConfig
from neuralode.ode.stepper_engine import run

_DEFAULT = "dopri5"
_UNLIMITED = 2**31 - 1
_NUMBERS = (float, int)
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@eager
def odeint(func: Any, y0: Any, t: torch.Tensor, *, rtol: Any = 1e-7, atol: Any = 1e-9, method: str | None = None,
           options: dict[str, Any] | None = None, event_fn: Any = None) -> Any:  # fmt: skip
    """Solves dy/dt = func(t, y), y(t[0]) = y0; same arguments and result as `torchdiffeq.odeint`.

    Args:
        func: `f(t, y)`; y is a tensor of any shape or a tuple of tensors.
        y0: initial state.
        t: output times, [T], rising or falling. Their gradient is that of the discrete solve, whose steps move with
            them; torchdiffeq's differs by the error of the method.
        event_fn: `g(t, y)`; the solve ends where it crosses zero.

    Returns:
        States [T, *shape]; with `event_fn`, the event time and the states [2, *shape].

    Raises:
        UsageError: (a ValueError) for an unknown method.
        AssertionError: where torchdiffeq raises it; a SolveError is one.

    Warns of options that the method does not know, and goes on without them.
    """
    options = _known(method, options)
    config = None if event_fn is not None else _served(func, y0, t, rtol, atol, method, options, "exact")
    if config is not None:
        try:
            return _states(func, y0, t, config)
        except FieldError:  # torchdiffeq takes some, and refuses the others in its own words
            if not in_torchdiffeq(config.method):
                raise
    _check_for_torchdiffeq(method, y0, rtol, atol)
    return torchdiffeq.odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn)


@eager
def odeint_adjoint(func: Any, y0: Any, t: torch.Tensor, *, rtol: Any = 1e-7, atol: Any = 1e-9,
                   method: str | None = None, options: dict[str, Any] | None = None, event_fn: Any = None,
                   adjoint_rtol: Any = None, adjoint_atol: Any = None, adjoint_method: str | None = None,
                   adjoint_options: dict[str, Any] | None = None, adjoint_params: Any = None) -> Any:  # fmt: skip
    """`odeint` with gradients by the continuous adjoint; same arguments as `torchdiffeq.odeint_adjoint`.

    Parameters that torchdiffeq would leave out without a word, such as those of another module that func calls, get
    their gradient here.
    """
    options = _known(method, options)
    own = set(adjoint_options or {}) - {"norm"} or (adjoint_options or {}).get("norm", "seminorm") != "seminorm"
    # options for the adjoint stand in the place of the forward ones, and so of their step size
    own = own or (adjoint_options is not None and takes_fixed_steps(method or _DEFAULT))
    foreign = event_fn is not None or adjoint_params is not None or adjoint_method not in (None, method) or own
    foreign = foreign or any(hasattr(func, f"{callback}_adjoint") for callback in _CALLBACKS)
    tolerances = all(x is None or (isinstance(x, float) and x > 0) for x in (adjoint_rtol, adjoint_atol))
    known = isinstance(func, torch.nn.Module) and tolerances and not foreign
    config = _served(func, y0, t, rtol, atol, method, options, "adjoint") if known else None
    if config is not None:
        config = dataclasses.replace(
            config, adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_seminorm=bool(adjoint_options)
        )
        try:
            return _states(func, y0, t, config)
        except FieldError:
            if not in_torchdiffeq(config.method):
                raise
    _check_for_torchdiffeq(method, y0, rtol, atol)
    return torchdiffeq.odeint_adjoint(
        func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn,
        adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
        adjoint_options=adjoint_options, adjoint_params=adjoint_params,
    )  # fmt: skip


@eager
def odeint_event(func: Any, y0: Any, t0: torch.Tensor, *, event_fn: Any, **kwargs: Any) -> Any:
    """Solves until `event_fn` crosses zero, with gradients through the event time, as `torchdiffeq.odeint_event`.

    Returns:
        The event time, a scalar, and the states [2, *shape] at t0 and at the event.
    """
    if (method := kwargs.get("method")) is not None:
        check_method(method)
    if "odeint_interface" not in kwargs:
        _check_for_torchdiffeq(method, y0, kwargs.get("rtol"), kwargs.get("atol"))
    return torchdiffeq.odeint_event(func, y0, t0, event_fn=event_fn, **kwargs)


@eager
def odeint_dense(func: Any, y0: Any, t0: Any, t1: Any, *, rtol: float = 1e-7, atol: float = 1e-9,
                 method: str | None = None, options: dict[str, Any] | None = None) -> Callable[[Any], Any]:  # fmt: skip
    """The solution between t0 and t1 as a function of time, as `torchdiffeq.odeint_dense`, for any method of ours.

    Raises:
        UsageError: for a method or an option that the stepper does not have.
    """
    options = _known(method, options)
    like = tensors(y0)[0]
    t = torch.stack([torch.as_tensor(x, dtype=like.dtype.to_real(), device=like.device) for x in (t0, t1)])
    config = _served(func, y0, t, rtol, atol, method or _DEFAULT, options, "exact")
    if config is None:
        raise UsageError(
            f"odeint_dense cannot serve method={method!r} with options={options}; it takes {', '.join(METHODS)} over "
            "two different times."
        )
    dense = run(func, y0, t, (), config, Stats("stepper", config.method, "exact"), keep_dense=True, strict=False).dense
    assert dense is not None
    return dense


def _states(func: Any, y0: Any, t: torch.Tensor, config: SolverConfig) -> Any:
    """As torchdiffeq, which returns what it has where a fixed-step method runs away."""
    stats = Stats("stepper", config.method, config.gradient)
    try:
        return run_fastest(func, y0, t.to(tensors(y0)[0].device), (), config, stats, strict=False)
    except TypeError:
        refuse_other_arguments(func, ())
        raise


def _known(method: str | None, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options that the method takes; warns of others, which torchdiffeq leaves out with a warning too.

    Raises:
        UsageError: for an unknown method.
    """
    name = _DEFAULT if method is None else method
    check_method(name)
    if not options or options.keys() <= options_of(name):
        return options
    known = options_of(name)
    sentences = [unknown("option", option, known) for option in options if option not in known]
    warnings.warn(f"method {name!r} goes on without what it does not know: {' '.join(sentences)}", stacklevel=4)
    return {option: value for option, value in options.items() if option in known}


def _served(func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: str | None, options: dict[str, Any] | None,
            gradient: str) -> SolverConfig | None:  # fmt: skip
    """The configuration for our stepper, with torchdiffeq's defaults; None if the stepper cannot serve the call."""
    name, options = method or _DEFAULT, {**options} if options else {}
    numbers = isinstance(rtol, _NUMBERS) and isinstance(atol, _NUMBERS) and rtol > 0 and atol > 0
    if not numbers or not _regular(y0, t) or _calls_back(func):
        return None
    if options and (method is None or _are_odd(options)):
        return None
    if name in METHODS and takes_fixed_steps(name):
        if options.get("step_size") is None:
            options.setdefault("grid_constructor", _the_times)
        options.setdefault("interp", "linear")
    try:
        return _configured(name, rtol, atol, gradient, tuple(options.items()))
    except TypeError:  # an option that is no key
        return _configured.__wrapped__(name, rtol, atol, gradient, tuple(options.items()))


@functools.lru_cache(maxsize=64)
def _configured(
    method: str, rtol: float, atol: float, gradient: str, given: tuple[tuple[str, Any], ...]
) -> SolverConfig | None:
    """The configuration, which nobody may change; None if the stepper cannot serve it."""
    options = dict(given)
    limit = options.pop("max_num_steps", None)
    try:
        config = SolverConfig(
            method=method, rtol=rtol, atol=atol, gradient=gradient, checkpoint="never", max_steps=_UNLIMITED,
            max_steps_between=limit, options=options,
        )  # fmt: skip
    except (UsageError, TypeError, ValueError):
        return None
    return None if unable(config) else config


def _check_for_torchdiffeq(method: str | None, y0: Any, *tolerances: Any) -> None:
    """Raises UsageError for what torchdiffeq would refuse in words that do not help."""
    if method is not None and not in_torchdiffeq(method):
        raise UsageError(
            f"method {method!r} is not torchdiffeq's, which alone takes events, callbacks, tolerances that are not two "
            "positive numbers, and rare options, states and times; leave them out, or give one of its methods, for "
            "example 'dopri5'."
        )
    for name, value in zip(("rtol", "atol"), tolerances, strict=True):
        if isinstance(value, torch.Tensor) and isinstance(y0, torch.Tensor):
            try:
                torch.broadcast_shapes(value.shape, y0.shape)
            except RuntimeError:
                shapes = f"{list(value.shape)} for a state of shape {list(y0.shape)}"
                raise UsageError(f"{name} has shape {shapes}; give a number, or a tensor that broadcasts.") from None


def _calls_back(func: Any) -> bool:
    """Whether func has one of the callbacks: as `hasattr` says, which takes modules long where there is none."""
    if getattr(type(func), "__getattr__", None) is not torch.nn.Module.__getattr__:
        return any(hasattr(func, name) for name in _CALLBACKS)
    own = func.__dict__
    of_class = any(hasattr(type(func), name) for name in _CALLBACKS)
    return of_class or not all(names.keys().isdisjoint(_CALLBACKS) for names in (own, own.get("_modules", {})))


def _are_odd(options: dict[str, Any]) -> bool:
    """Whether some are torchdiffeq's to judge: step sizes that are not positive or want a gradient, and the like."""
    for name in ("step_size", "first_step"):
        value = options.get(name)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return True
        if value is not None and not float(value) > 0:
            return True
    limit = options.get("max_num_steps", 1)
    return "grid_constructor" in options or not (isinstance(limit, int) and limit > 0)


def _the_times(func: Any, y0: Any, t: torch.Tensor) -> torch.Tensor:
    """torchdiffeq's grid where no step size is given."""
    return t


def _regular(y0: Any, t: Any) -> bool:
    """Whether torchdiffeq would take the state and the times, and the stepper too."""
    parts = tensors(y0)
    for part in parts:
        if not (isinstance(part, torch.Tensor) and (part.is_floating_point() or part.is_complex())):
            return False
    if not (parts and isinstance(t, torch.Tensor) and t.dim() == 1 and t.numel() > 1 and t.is_floating_point()):
        return False
    values = host_values(t)
    before = operator.lt if values[1] > values[0] else operator.gt
    return all(map(before, values, values[1:]))
