"""Errors that a person can act on (what was given, what is allowed, what to do), and the clean end on a signal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import FrameType


class UsageError(ValueError):
    """A mistake in what was asked for; its message is one sentence meant for the person who asked."""


class FieldError(UsageError):
    """A field that our engines cannot solve; torchdiffeq, which checks less, may."""


class FieldArgumentsError(UsageError, TypeError):
    """A field that does not take what it is called with; a TypeError, as the call itself raises."""


class Stopped(SystemExit):
    """The run was asked to stop by a signal; the exit code is 128 + the signal's number, as in a shell."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


def stop_at_once(signum: int, _frame: FrameType | None) -> None:
    """A signal handler that ends the program where it stands."""
    raise Stopped(signum)


def unknown(kind: str, given: object, allowed: Iterable[str], advice: str = "") -> str:
    """The sentence for a name that does not exist, with the nearest one that does."""
    names = sorted(set(allowed))
    # the first of those that are as near as the nearest: 'dopri5' for 'dopri'
    nearness = {name: difflib.SequenceMatcher(None, name, str(given)).ratio() for name in names}
    near = max(names, key=lambda name: nearness[name], default="")
    guess = f"; did you mean {near!r}?" if nearness.get(near, 0.0) >= 0.5 else "."
    sentence = f"unknown {kind} {given!r}{guess} Allowed: {', '.join(names) or 'none'}."
    return f"{sentence} {advice}".rstrip()
