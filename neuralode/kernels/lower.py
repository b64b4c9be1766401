"""From a vector field, in whatever class its author wrote it, to a program: by one real evaluation that is watched.

Every solve evaluates its field once in any case. Here the operations of that evaluation are read as they happen, below
autograd, so that the author's own code is never interpreted. What the program cannot say is refused with a reason, and
the field is solved otherwise.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from neuralode.kernels.operations import HANDLERS, MAKERS
from neuralode.kernels.program import STATE, TIME, Program
from neuralode.kernels.recall import circumstances, function_modes, recall, remember, remember_refusal
from neuralode.kernels.tally import tally_of, was_read
from neuralode.kernels.values import Made, NotLowered, Row, Writer, key_of
from neuralode.kernels.watch import Watch

State = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass
class Lowered:
    """A field as a program, for one solve."""

    program: Program
    """The same object for equal programs, so that what is made for it can be kept."""
    tensors: list[torch.Tensor]
    """The program's tensors in this solve, with their history."""
    dy: State | None
    """What the watched evaluation returned; None if the program was known."""
    count: Callable[[int], None]
    """Advances the field's own counters by so many further evaluations."""


_programs: dict[Program, Program] = {}
_FAR = 1_000_003
"""A count that no solve comes to: what a field does then, it may do at any."""


def recalled(field: Callable[..., Any], when: Any) -> Lowered | None:
    """The program of a field without arguments, if it was lowered in these circumstances and has not changed since.

    Raises:
        NotLowered: where it was found then to be no program.
    """
    known = recall(field, when)
    if known is None:
        return None
    if known.program is None:
        raise NotLowered(known.refusal)
    return Lowered(known.program, known.tensors(), None, known.count)


def lower(field: Callable[..., Any], t: torch.Tensor, y: State, args: tuple[Any, ...]) -> Lowered:
    """The program of a field, by an evaluation that is watched, unless the field has not changed since the last one.

    Args:
        t: the time, [], or [B, 1, ..., 1] where each sample has its own.
        y: the state, [..., D], its leading dimensions being the rows; or a tuple of parts that share dimension 0.

    Raises:
        NotLowered: where the field is no program; it is left as if it had not been called.
    """
    when = None if args else circumstances(t, y)
    if when is not None and (found := recalled(field, when)):
        return found
    if torch.is_autocast_enabled((y[0] if isinstance(y, tuple) else y).device.type):
        raise NotLowered("autocast is on")
    if set(function_modes()) - {DeviceContext}:
        raise NotLowered("a TorchFunctionMode is on, which may change what operations do")
    if isinstance(field, torch.jit.ScriptFunction) or hasattr(field, "_torchdynamo_orig_callable"):
        raise NotLowered("it is compiled")
    try:
        watch = Watch(field)
        reason = watch.obstacle()
    except Exception as error:  # an attribute may be anything, and refuse to be looked at
        raise NotLowered(f"it cannot be looked at ({type(error).__name__}: {error})") from error
    if reason:
        if when is not None and watch.too_much:
            remember_refusal(field, when, watch, reason)
        raise NotLowered(reason)
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    writer = Writer(torch.is_grad_enabled())
    try:
        with _unhooked() if hooked else contextlib.nullcontext():
            try:
                lowered = _evaluate(field, t, y, args, watch, writer)
            except NotLowered:
                if not writer.guessed:
                    raise
                writer = Writer(torch.is_grad_enabled(), guess="features")
                lowered = _evaluate(field, t, y, args, watch, writer)
            _check(field, t, y, args, watch, lowered, writer.guess)
    except NotLowered as why:
        if when is not None:
            remember_refusal(field, when, watch, str(why))
        raise
    if when is not None:
        known = remember(field, when, watch, writer, lowered.program)
        if hooked and known:  # the hooks see what they will see when the program is recalled
            lowered.tensors = known.tensors()
    return lowered


def _evaluate(field: Callable[..., Any], t: torch.Tensor, y: State, args: tuple[Any, ...], watch: Watch,
              writer: Writer) -> Lowered:  # fmt: skip
    t, parts = _begin(writer, t, y)
    recorder = _Recorder(writer)
    try:
        with _eager(), _NoLooking(writer), recorder:
            dy = field(t, tuple(parts) if isinstance(y, tuple) else parts[0], *args)
        if reason := writer.refusal or watch.changes() or writer.loss():  # also if the field has caught the exception
            raise NotLowered(reason)
        program = _end(writer, y, dy)
    except NotLowered:
        watch.restore()
        raise
    except Exception as error:  # the field's own, which comes again, or one that comes of being watched
        watch.restore()
        raise NotLowered(writer.refusal or f"it raises {type(error).__name__}: {error}") from error
    if len(_programs) > 1000:
        _programs.clear()

    def count(more: int) -> None:
        for counter in watch.counters:
            counter.add(more)

    return Lowered(_programs.setdefault(program, program), writer.tensors, dy, count)


def _check(field: Callable[..., Any], t: torch.Tensor, y: State, args: tuple[Any, ...], watch: Watch,
           lowered: Lowered, guess: str) -> None:  # fmt: skip
    """Evaluates again, at another time and state, and with other counts: the program has to be the same everywhere."""
    parts = tuple(_moved(part) for part in y) if isinstance(y, tuple) else _moved(y)
    for ahead in (0, _FAR) if watch.counters else (0,):
        later = Watch(field) if not ahead else _watch_at(field, watch, ahead)
        try:
            again = _evaluate(field, _moved(t), parts, args, later, Writer(torch.is_grad_enabled(), guess=guess))
            same = not any(was_read(counter.value) for counter in later.counters)
            again.count(-1 - ahead)  # this evaluation was none of the solve's
            same = same and len(later.counters) == len(watch.counters) and again.program == lowered.program
            if not (same and all(map(_equal, again.tensors, lowered.tensors))):
                use = "of a number that its calls change" if watch.counters else "of more than its operations show"
                raise NotLowered(f"it makes use {use}")
        except NotLowered:
            watch.restore()
            raise


def _moved(x: torch.Tensor) -> torch.Tensor:
    """Numbers nearby, none of them the same."""
    x = x.detach()
    return x + 1e-3 * (1 + x.abs())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or torch.equal(a, b)


def _watch_at(field: Callable[..., Any], watch: Watch, ahead: int) -> Watch:
    """Watches a field whose counters are far ahead, and tell whether it reads them."""
    for counter in watch.counters:
        counter.value = tally_of(counter.value + ahead)
    return Watch(field)


def _begin(writer: Writer, t: torch.Tensor, y: State) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Time and state as the field receives them, new tensors that the writer knows."""
    given = y if isinstance(y, tuple) else (y,)
    if any(type(part) not in (torch.Tensor, torch.nn.Parameter) or part.dtype != given[0].dtype for part in given):
        raise NotLowered("the state is not of plain tensors of one type")
    if isinstance(y, tuple):
        if any(part.dim() not in (1, 2) or len(part) != len(given[0]) for part in given):
            raise NotLowered("the parts of the state are not [B] or [B, D] with the same B")
        writer.lead = (len(given[0]),)
    else:
        writer.lead = tuple(given[0].shape[:-1])
    writer.dtype = given[0].dtype
    # memory of their own, for that is how they are known: the field may hold what they were made of; and they require
    # a gradient, whether or not y and t do: later ones will, and what detaches them has to be seen
    parts = [p.detach().clone(memory_format=torch.contiguous_format) for p in given]
    parts = [p.requires_grad_().view_as(p) for p in parts] if writer.grad else parts
    widths = [part.shape[-1] if part.dim() > (1 if isinstance(y, tuple) else 0) else 1 for part in parts]
    writer.width = sum(widths)
    start = 0
    for part, width in zip(parts, widths, strict=True):
        squeezed = part.dim() == (1 if isinstance(y, tuple) else 0)
        writer.begin_with(part, Row(STATE, start, width, squeezed, writer.count == 1))
        start += width
    t = t.detach().clone()
    t = t.requires_grad_().view_as(t) if writer.grad else t
    writer.begin_with(t, Row(TIME, 0, 1, t.dim() == 0, t.numel() == 1))
    return t, parts


def _end(writer: Writer, y: State, dy: Any) -> Program:
    """The program whose output is dy."""
    given, found = (y if isinstance(y, tuple) else (y,)), (dy if isinstance(dy, tuple | list) else (dy,))
    if isinstance(y, tuple) != isinstance(dy, tuple | list) or len(given) != len(found):
        raise NotLowered("it does not return what the state is made of")
    registers, widths = [], []
    for part, like in zip(found, given, strict=True):
        if type(part) is not torch.Tensor or part.shape != like.shape or part.dtype != like.dtype:
            raise NotLowered("it does not return a tensor like the state")
        row = writer.row(part)
        register, width = writer.operand(part, like.shape, like.shape == writer.lead)
        if row is not None and writer.rows_of(part.shape, row.squeezed) != writer.count:
            raise NotLowered("it does not return rows like the state's")
        whole = 1 if like.shape == writer.lead else like.shape[-1]
        registers.append(writer.widened(register, width, whole))
        widths.append(whole)
    output = registers[0] if len(registers) == 1 else writer.emit("concat", *registers, width=sum(widths))
    return writer.program(output)


def _unhooked() -> contextlib.AbstractContextManager[Any]:
    """Keeps from hooks on saved tensors, as activation checkpointing has them, what only a first solve evaluates."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


_STANCE = threading.RLock()
"""The compiler's stance is the process's: two threads that set it and put it back would leave it set."""


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Runs functions that torch.compile has compiled as they are written: compiled code does what cannot be seen."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _STANCE, torch.compiler.set_stance("force_eager"):
        yield


class _Recorder(TorchDispatchMode):
    """Hands every operation below autograd to the handler that knows it."""

    def __init__(self, writer: Writer):
        super().__init__()
        self.writer = writer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # solves are never compiled into, and the skipping takes longer than the rest of a dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._handle(func, args, kwargs or {})
        except NotLowered as refusal:
            self.writer.refusal = self.writer.refusal or str(refusal)
            raise

    def _handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        writer = self.writer
        handler = HANDLERS.get(func)
        constant = func not in MAKERS and not writer.touches(args, kwargs)
        if constant and not _is_refused(func):
            out = func(*args, **kwargs)  # of constants alone: what comes of it is a constant
            writer.keep(out)
            writer.made.append(Made(func, args, kwargs, out))
            if writer.grad and torch.is_grad_enabled() and writer.touches(args, kwargs, or_gradients=True):
                writer.with_history.append(writer.made[-1])
            if func is torch.ops.aten.t.default:
                writer.transposed[key_of(out)] = args[0]
            return out
        if handler is None and not constant:
            out = self._decomposed(func, args, kwargs)
            if out is not NotImplemented:
                return out
        if handler is None or constant:
            raise NotLowered(f"{func} {_why_refused(func)}")
        if writer.grad and not torch.is_grad_enabled() and writer.touches(args, kwargs, or_gradients=True):
            raise NotLowered("part of it runs without gradients")
        return handler(writer, func, args, kwargs)

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation made of others, which come here one by one: inference mode shows it whole."""
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        return NotImplemented


_LOOKING = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _is_refused(func: Any) -> bool:
    """Whether an operation may not even be done on constants: it would change them, look at them or draw numbers."""
    return func._schema.is_mutable or not _LOOKING.isdisjoint(func.tags)


def _why_refused(func: Any) -> str:
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "draws random numbers"
    if func._schema.is_mutable:
        return "changes a tensor in place"
    if torch.Tag.data_dependent_output in func.tags:
        return "looks at values"
    return "is not known to the kernels"


_DATA: Any = torch.Tensor.data
_GRAD_FN: Any = torch.Tensor.grad_fn
_LOOKS = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__,
    _DATA.__get__, _DATA.__set__, _GRAD_FN.__get__, torch.Tensor.register_hook, torch.Tensor.storage,
    torch.Tensor.untyped_storage, torch.Tensor.data_ptr, torch.Tensor.set_, torch.Tensor.requires_grad_,
    torch.Tensor.retain_grad, torch.Tensor.__repr__,
}  # fmt: skip


_COPIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
"""Functions that read the numbers of the tensors in a list."""


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, list | tuple) and any(isinstance(y, torch.Tensor) or _holds_tensors(y) for y in x)


class _NoLooking(TorchFunctionMode):
    """Refuses what reads a tensor's values, or hooks into its gradient, without an operation that could be seen."""

    def __init__(self, writer: Writer):
        super().__init__()
        self.writer = writer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS or (func in _COPIES and any(_holds_tensors(x) for x in args)):
            name = getattr(func, "__name__", "data")
            self.writer.refusal = f"it looks at values or at gradients on its way ({name})"
            raise NotLowered(self.writer.refusal)
        return func(*args, **(kwargs or {}))
