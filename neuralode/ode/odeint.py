"""torchdiffeq's functions, with its signatures: replace the import and keep the program."""

from __future__ import annotations

from typing import Any

import torch
import torchdiffeq

from neuralode.ode.methods import check_method

# Until an engine of ours serves them, these are torchdiffeq's own, so that nothing at all changes for a program
# that replaces its import; only an unknown method is refused with a better sentence.


def odeint(func: Any, y0: Any, t: torch.Tensor, *, rtol: Any = 1e-7, atol: Any = 1e-9, method: str | None = None,
           options: dict[str, Any] | None = None, event_fn: Any = None) -> Any:  # fmt: skip
    """Solves dy/dt = func(t, y), y(t[0]) = y0; same arguments and result as `torchdiffeq.odeint`.

    Args:
        func: `f(t, y)`; y is a tensor of any shape or a tuple of tensors.
        y0: initial state.
        t: output times, [T], rising or falling.
        event_fn: `g(t, y)`; the solve ends where it crosses zero.

    Returns:
        States [T, *shape]; with `event_fn`, the event time and the states [2, *shape].

    Raises:
        UsageError: (a ValueError) for an unknown method.
        AssertionError: where torchdiffeq raises it.
    """
    if method is not None:
        check_method(method)
    return torchdiffeq.odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn)


def odeint_adjoint(func: Any, y0: Any, t: torch.Tensor, *, rtol: Any = 1e-7, atol: Any = 1e-9,
                   method: str | None = None, **kwargs: Any) -> Any:  # fmt: skip
    """`odeint` with gradients by the continuous adjoint; same arguments as `torchdiffeq.odeint_adjoint`."""
    if method is not None:
        check_method(method)
    return torchdiffeq.odeint_adjoint(func, y0, t, rtol=rtol, atol=atol, method=method, **kwargs)


def odeint_event(func: Any, y0: Any, t0: torch.Tensor, *, event_fn: Any, **kwargs: Any) -> Any:
    """Solves until `event_fn` crosses zero, with gradients through the event time, as `torchdiffeq.odeint_event`.

    Returns:
        The event time, a scalar, and the states [2, *shape] at t0 and at the event.
    """
    if kwargs.get("method") is not None:
        check_method(kwargs["method"])
    return torchdiffeq.odeint_event(func, y0, t0, event_fn=event_fn, **kwargs)
