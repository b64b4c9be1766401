"""The record of one evaluation of a field: the operations of PyTorch it consists of, with every tensor numbered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from neuralode.kernels.operators import KNOWN, NotLowered, short_name

State = torch.Tensor | tuple[torch.Tensor, ...]
Field = Callable[..., Any]
aten = torch.ops.aten


class Ref:
    """A tensor of a record, by its number. There is one object for each number, so that records compare fast."""

    __slots__ = ("number",)

    def __init__(self, number: int):
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


_REFS = [Ref(i) for i in range(256)]


class Step(NamedTuple):
    """One operation, with references in place of tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[Ref | None, ...]
    grad: bool
    """Whether gradients were enabled."""


class Trace(NamedTuple):
    """One evaluation."""

    steps: tuple[Step, ...]
    values: list[torch.Tensor]
    """Tensors by number: the parts of the state, the time, and then the others as the evaluation came to them."""
    leaves: list[int]
    """Numbers of the tensors that the evaluation used and did not make: parameters, buffers, arguments."""
    outputs: tuple[Ref, ...]
    """The parts of dy/dt."""
    grad: bool
    """Whether gradients were enabled when the evaluation began."""
    dy: State

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that a program follows from: traces of one signature have one program."""
        leaves = [*range(self.inputs), *self.leaves]
        values = [self.values[i] for i in leaves]
        described = tuple((i, x.shape, x.dtype, x.layout) for i, x in zip(leaves, values, strict=True))
        return (self.steps, described, self.outputs, self.grad)

    @property
    def inputs(self) -> int:
        """How many tensors the evaluation was given: the parts of the state and the time."""
        return len(self.outputs) + 1


def record(field: Field, t: torch.Tensor, y: State, args: tuple[Any, ...]) -> Trace:
    """Evaluates the field once, for real, and records it.

    Raises:
        NotLowered: before an operation is executed that is not known, draws random numbers, looks at values or
            changes what is not the evaluation's own.
    """
    # copies, for the caller may hand the very tensors over as constants too
    parts = tuple(part.clone(memory_format=torch.contiguous_format) for part in (y if isinstance(y, tuple) else (y,)))
    inputs = (*parts, t.clone())
    recorder = _Recorder(inputs)
    grad = torch.is_grad_enabled()
    try:
        with _Guard(recorder), recorder:
            dy = field(inputs[-1], parts if isinstance(y, tuple) else parts[0], *args)
    except Exception:
        if recorder.refusal is None:
            raise
    if recorder.refusal is not None:  # also where the field has caught it
        raise recorder.refusal
    _check_result(dy, y)
    return _numbered(recorder.lines, inputs, dy, grad)


def _check_result(dy: Any, y: State) -> None:
    if isinstance(dy, tuple) != isinstance(y, tuple):
        raise NotLowered(f"it returns a {type(dy).__name__} for a {type(y).__name__}")
    given, wanted = (dy, y) if isinstance(dy, tuple) else ((dy,), (y,))
    if len(given) != len(wanted) or not all(isinstance(part, torch.Tensor) for part in given):
        raise NotLowered("what it returns does not have the parts of the state")
    for part, like in zip(given, wanted, strict=True):
        if part.shape != like.shape or part.dtype != like.dtype or part.device != like.device:
            raise NotLowered("what it returns does not have the shape and dtype of the state")


class _Recorder(TorchDispatchMode):
    """Records below autograd, where PyTorch has taken everything apart into its primitive operations."""

    def __init__(self, inputs: tuple[torch.Tensor, ...]):
        super().__init__()
        self.lines: list[tuple[Any, tuple[Any, ...], Any, Any, bool]] = []
        self.refusal: NotLowered | None = None
        self._moving = {id(x) for x in inputs}
        self._own: set[int] = set()
        self._scanned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        judge = _JUDGES.get(id(func))
        if judge is None:
            judge = _JUDGES[id(func)] = _judge(func)
        if judge is not _harmless:
            judge(self, func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        self.lines.append((func, args, kwargs, out, torch.is_grad_enabled()))
        return out

    def refuse(self, reason: str) -> None:
        self.refusal = NotLowered(reason)
        raise self.refusal

    def moves(self, *given: Any) -> bool:
        """Whether any of the tensors given depends on the state or the time."""
        self._scan()
        return any(id(x) in self._moving for x in _tensors(given))

    def owns(self, x: torch.Tensor) -> bool:
        """Whether the evaluation has made the memory of a tensor, and not out of the state's."""
        self._scan()
        return x.untyped_storage()._cdata in self._own

    def _scan(self) -> None:
        """Follows the record to its end. Only rare operations need this."""
        for func, args, kwargs, out, _ in self.lines[self._scanned :]:
            outs = list(_tensors((out,)))
            if func not in KNOWN.fills and any(id(x) in self._moving for x in _tensors((args, kwargs))):
                self._moving.update(map(id, outs))
            if not func.is_view or func is aten.lift_fresh.default:
                self._own.update(x.untyped_storage()._cdata for x in outs)
        self._scanned = len(self.lines)


class _Guard(TorchFunctionMode):
    """Refuses what reads values, or acts on gradients, without an operation that the recorder would see."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.recorder.refuse("it uses a transform of torch.func")
        if func in _READS and self.recorder.moves(args):
            self.recorder.refuse(f"it looks at values ({func.__name__})")
        if func in _HOOKS:
            self.recorder.refuse("it has hooks")
        return func(*args, **kwargs) if kwargs else func(*args)


_READS = {
    getattr(torch.Tensor, name)
    for name in (
        "tolist", "numpy", "__array__", "data_ptr", "storage", "untyped_storage", "_typed_storage", "__dlpack__",
        "__reduce_ex__", "__deepcopy__", "__repr__", "apply_", "map_", "map2_",
    )
}  # fmt: skip
_HOOKS = {torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook}

_Judge = Callable[[_Recorder, Any, tuple[Any, ...], dict[str, Any]], None]


def _judge(func: Any) -> _Judge:
    """What has to be looked at before an operation is executed."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return _random
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return _reading
    if func._schema.is_mutable:
        return _writing
    return _harmless if func in KNOWN.all else _unknown


def _harmless(recorder: _Recorder, func: Any, args: Any, kwargs: Any) -> None:
    pass


def _random(recorder: _Recorder, func: Any, args: Any, kwargs: Any) -> None:
    recorder.refuse(f"it draws random numbers ({short_name(func)})")


def _reading(recorder: _Recorder, func: Any, args: Any, kwargs: Any) -> None:
    if recorder.moves(args, kwargs):  # those of parameters and the like are constants
        recorder.refuse(f"it looks at values ({short_name(func)})")


def _writing(recorder: _Recorder, func: Any, args: Any, kwargs: Any) -> None:
    if not args or not isinstance(args[0], torch.Tensor) or not recorder.owns(args[0]):
        state = bool(args) and recorder.moves(args[0])
        recorder.refuse(f"it changes {'the state' if state else 'a tensor'} in place ({short_name(func)})")
    if func not in KNOWN.all:
        _unknown(recorder, func, args, kwargs)


def _unknown(recorder: _Recorder, func: Any, args: Any, kwargs: Any) -> None:
    if recorder.moves(args, kwargs):
        recorder.refuse(f"{short_name(func)} is not known to the kernels")


_JUDGES: dict[int, _Judge] = {}


def _tensors(given: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    found: list[torch.Tensor] = []
    for x in given.values() if isinstance(given, dict) else given:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, tuple | list | dict):
            found += _tensors(x)
    return found


def _numbered(lines: list[Any], inputs: tuple[torch.Tensor, ...], dy: State, grad: bool) -> Trace:
    return _Numbering(inputs).trace(lines, dy, grad)


class _Numbering:
    """Gives the tensors of a record their numbers. This runs in every solve: it is written to be fast."""

    def __init__(self, inputs: tuple[torch.Tensor, ...]):
        self.values = list(inputs)
        self.refs = {id(x): _REFS[i] for i, x in enumerate(inputs)}
        self.steps: list[Step] = []
        self.leaves: list[int] = []
        self.detached: dict[int, torch.Tensor] = {}
        """Results of detach that nothing has used so far, and what they were detached from."""

    def trace(self, lines: list[Any], dy: State, grad: bool) -> Trace:
        step = tuple.__new__
        given = self.given
        for func, args, kwargs, out, enabled in lines:
            if func is aten.detach.default and enabled:
                # autograd detaches what it saves; those who use it later have to say what they hold
                self.detached[id(out)] = args[0]
                self.values.append(out)
                continue
            named = tuple([(name, given(x)) for name, x in kwargs.items()]) if kwargs else ()
            inputs = tuple([given(x) for x in args])
            outs = (self.made(out),) if type(out) not in (tuple, list) else tuple([self.made(x) for x in out])
            self.steps.append(step(Step, (func, inputs, named, outs, enabled)))
        parts = dy if isinstance(dy, tuple) else (dy,)
        outputs = tuple([self.given(part) for part in parts])
        return Trace(tuple(self.steps), self.values, self.leaves, outputs, grad, dy)

    def given(self, x: Any) -> Any:
        """What stands for an argument."""
        kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            ref = self.refs.get(id(x))
            return ref if ref is not None else self.new(x)
        if kind is list or kind is tuple:
            return tuple([self.given(item) for item in x])
        if isinstance(x, torch.Tensor):
            raise NotLowered(f"it uses a {kind.__name__}")
        return x

    def made(self, x: Any) -> Ref | None:
        """What stands for a result."""
        if not isinstance(x, torch.Tensor):
            return None
        ref = self.refs.get(id(x))
        return ref if ref is not None else self.number(x)

    def number(self, x: torch.Tensor) -> Ref:
        i = len(self.values)
        if i == len(_REFS):
            _REFS.append(Ref(i))
        self.values.append(x)
        ref = self.refs[id(x)] = _REFS[i]
        return ref

    def new(self, x: torch.Tensor) -> Ref:
        """A tensor that no operation before has made."""
        source = self.detached.pop(id(x), None)
        if source is None:
            ref = self.number(x)
            self.leaves.append(ref.number)
            return ref
        origin: Ref = self.given(source)
        if x.grad_fn is not None and x.grad_fn is source.grad_fn and x.output_nr == source.output_nr:
            self.refs[id(x)] = origin  # autograd has unpacked what it had saved
            return origin
        ref = self.number(x)
        self.steps.append(Step(aten.detach.default, (origin,), (), (ref,), True))
        return ref
