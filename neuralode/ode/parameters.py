"""Which tensors a field depends on: found by themselves, held fast for the backward pass."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from neuralode.errors import FieldError, UsageError
from neuralode.kernels.watch import Watch
from neuralode.ode.packing import Packing, alike, lasting, writes

REMEDY = "give gradient='exact' with checkpoint='never' to the solve."
"""What helps where a field that is evaluated again would not give the gradient of the solve."""

UNREACHED = (
    "the field uses a parameter that is neither registered nor used at the start of the solve, so that recomputing "
    "would leave it without a gradient; make the field an nn.Module that owns it, hand it over through args=(...), "
    f"as an argument of its own, or {REMEDY}"
)


class HeldField:
    """A field over packed states, with the tensors that it had when the solve began: for the backward pass.

    A module's parameters and buffers are captured, so that a backward pass that evaluates the field again uses the
    very tensors of the forward pass, also where `functional_call` had swapped them in for the time of the call only.
    """

    def __init__(self, field: Callable[..., Any], args: Sequence[Any], packing: Packing):
        self.field, self.args, self.packing = field, tuple(args), packing
        self.module = field if isinstance(field, nn.Module) else None
        self.captured: dict[str, torch.Tensor] = {}
        if self.module is not None:
            self.captured = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._rebind = False
        self._buffers: list[torch.Tensor] = []
        self._read: list[torch.Tensor] = []
        self._places: list[Any] = []
        self._numbers: dict[tuple[int, str], Any] = {}
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def registered(self) -> list[torch.Tensor]:
        """The module's tensors and the tensor arguments that require a gradient."""
        return [x for x in self._tensors() if x.requires_grad]

    @property
    def constants(self) -> list[torch.Tensor]:
        """The tensor arguments that do not."""
        return [a for a in self.args if isinstance(a, torch.Tensor) and not a.requires_grad]

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.captured.values(), *(a for a in self.args if isinstance(a, torch.Tensor))]

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        state = self.packing.unpack(y)
        if self._rebind:
            assert self.module is not None
            dy = functional_call(self.module, self.captured, (t, state, *self.args))
        else:
            dy = self.field(t, state, *self.args)
        # as a new tensor: the field may give a parameter itself, in whose place a stand-in could not come
        return lasting(alike(self.packing.pack(dy), y)).view_as(y)

    @contextlib.contextmanager
    def solving(self, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
        """Around the solve. What it only reads, `inputs` among it, has to stay as it is until the backward pass."""
        modules = [self.module] if self.module is not None else Watch(self.field).modules
        self._buffers = [x for x in {id(x): x for m in modules for x in m.buffers()}.values() if _plain(x)]
        others = [x for x in self.captured.values() if not x.requires_grad]
        before = _places(others)
        yield
        same = [now == then for now, then in zip(_places(others), before, strict=True)]
        self._left = [(x, x.clone()) for x, kept in zip(others, same, strict=True) if not kept]
        self._numbers = {place: x for place, x in _numbers(self.field).items() if _is(x, self._numbers.get(place))}
        loose = [x for x in self._numbers.values() if isinstance(x, torch.Tensor)]
        self._read = [*inputs, *loose, *(x for x, kept in zip(others, same, strict=True) if kept and not _counts(x))]
        self._places = _places(self._read)

    def begin_backward(self) -> None:
        """Says that a backward pass begins: the module may hold other tensors by now.

        Raises:
            UsageError: if one that it held, and that the solve only read, has changed.
        """
        if _places(self._read) != self._places:
            raise UsageError(f"a parameter or a buffer was changed {_SINCE}; take the gradient first, or {REMEDY}")
        now = _numbers(self.field)
        for place, x in self._numbers.items():
            if not _is(now.get(place), x):
                name = place[1]
                raise UsageError(f"{name!r} of the field was changed {_SINCE}; take the gradient first, or {REMEDY}")
        if self.module is not None:
            held = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
            self._rebind = any(held.get(name) is not tensor for name, tensor in self.captured.items())

    @contextlib.contextmanager
    def as_solved(self) -> Iterator[None]:
        """Inside, the buffers that the solve wrote to are as it left them, and evaluations leave all buffers as they
        were: they are no evaluations more, for a running average or a counter."""
        # all of them, by values: BatchNorm writes without a trace in the count of writes, and so do we
        before = [(x, x.clone()) for x in self._buffers]
        _put(self._left)
        try:
            yield
        finally:
            _put(before)

    def all_inputs(self, evaluate: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Every tensor besides t and y that the field sends a gradient to, `registered` first; and dy/dt.

        Looks at the graph of one evaluation, so that the parameters of a function that is no module are found too.

        Args:
            evaluate: evaluates the field at a time and a state that carry no gradient.

        Raises:
            UsageError: if the field uses a tensor computed outside it from something that requires a gradient, which
                no later evaluation could reach.
        """
        known = self.registered
        self._numbers = _numbers(self.field)
        with torch.enable_grad():
            mark = new_mark()
            dy = evaluate()
        return known + leaves_of([dy], known, mark), dy.detach()


def _places(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int | None]]:
    """Where tensors lie and how often they were changed: autograd does not see `.data = ...`, nor, where others' hooks
    save the tensors, a change in place."""
    return [(x.data_ptr() if x.layout is torch.strided else 0, writes(x)) for x in tensors]


def _numbers(field: Callable[..., Any]) -> dict[tuple[int, str], Any]:
    """The numbers and tensors that a module's parts have for attributes, or that a function closes over, by name."""
    if isinstance(field, nn.Module):
        owners: list[tuple[int, Mapping[str, Any]]] = [(id(module), vars(module)) for module in field.modules()]
    elif isinstance(field, types.FunctionType):
        owners = [(id(field), inspect.getclosurevars(field).nonlocals)]
    else:
        owners = []
    found = {(owner, name): x for owner, values in owners for name, x in values.items() if isinstance(x, _NUMBER)}
    return {place: x for place, x in found.items() if place[1] != "training"}  # which few fields look at


_NUMBER = (bool, int, float, complex, torch.Tensor)


def _is(a: Any, b: Any) -> bool:
    """Whether two of them are the same: one tensor, or equal numbers."""
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)


def _plain(x: torch.Tensor) -> bool:
    """Whether a field can write to a tensor in place."""
    return x.layout is torch.strided and not x.is_inference() and 0 not in x.stride()


def _counts(x: torch.Tensor) -> bool:
    """Whether a tensor looks like a count of calls, which other uses of its module, in a decoder say, go on with."""
    return x.numel() == 1 and not (x.is_floating_point() or x.is_complex())


def _put(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, value in values:
        x.data.copy_(value)


_SINCE = "between the solve and its gradient, which evaluates the field again"


def refuse_another_field(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raises UsageError if what the field gives, or what follows from it, is not what it was in the solve."""
    if not wanted.numel():
        return
    slack = torch.finfo(wanted.dtype).eps ** 0.5 * float(1e-3 + wanted.abs().nan_to_num().max())
    if not torch.allclose(found, wanted, rtol=0.0, atol=slack, equal_nan=True):
        raise UsageError(
            f"the field, or what it reads, was changed {_SINCE}, or it draws random numbers; take the gradient first, "
            f"draw before the solve, or {REMEDY}"
        )


class StandIns(TorchFunctionMode):
    """Puts tensors of the same memory in the place of those that want a gradient, wherever an operation takes one.

    So the hooks and the accumulating nodes of a user's parameters are no part of a gradient taken inside.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]):
        super().__init__()
        self._inputs = inputs
        self.tensors = [x.detach().requires_grad_() for x in inputs]
        self._of = {id(x): y for x, y in zip(inputs, self.tensors, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: self._of.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)

    def refuse_originals(self, results: Sequence[torch.Tensor]) -> None:
        """Raises UsageError if a gradient of the results would reach a tensor itself, past its stand-in."""
        originals = {get_gradient_edge(x).node for x in self._inputs}
        if any(node in originals for node in _nodes(results, set())):
            raise UsageError(
                "the field hands a parameter to an autograd.Function while one of its parameters has hooks, which "
                f"would run on each share of the gradient; remove the hooks, or {REMEDY}"
            )


def new_mark() -> int:
    """A number greater than that of every node that autograd made before, and less than those to come."""
    mark: int = (torch.zeros((), requires_grad=True) + 0).grad_fn._sequence_nr()  # type: ignore[union-attr]
    return mark


def leaves_of(results: Sequence[torch.Tensor], known: Sequence[torch.Tensor], mark: int) -> list[torch.Tensor]:
    """The leaves besides `known` that a gradient of the results would reach, not looking past the tensors in `known`.

    Raises:
        UsageError: if a result depends on something computed before the mark.
    """
    seen: set[Any] = {x.grad_fn for x in known if x.grad_fn is not None}
    names = {id(x) for x in known}
    leaves: list[torch.Tensor] = []
    for node in _nodes(results, seen):
        if hasattr(node, "variable"):
            leaves += [node.variable] if id(node.variable) not in names else []
        elif node._sequence_nr() < mark:
            raise FieldError(
                "the field uses a tensor that was computed outside it from others that require a gradient, and "
                "recomputing the field could not reach those; hand the tensor over through args=(...), as an argument "
                f"of its own and not inside a list or a dict, or {REMEDY}"
            )
    return leaves


def _nodes(results: Sequence[torch.Tensor], seen: set[Any]) -> Iterator[Any]:
    """The nodes that a gradient of the results would reach, not looking past those in `seen`."""
    # a result may be a leaf itself, which has a node but no grad_fn
    pending: list[Any] = [get_gradient_edge(result).node for result in results if result.requires_grad]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(child for child, _ in node.next_functions)


class InnerGradient:
    """What a gradient that is taken inside a backward pass is taken of: `tensors`, and nothing else unnoticed.

    It is made before what is to be differentiated.

    Args:
        inputs: the tensors that it is wanted for.
        known: all tensors of which it is known that the field reads them.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], known: Sequence[torch.Tensor]):
        # hooks are to run on the whole gradient, not on each step's share of it
        self._stand_ins = StandIns(inputs) if any(x._backward_hooks for x in inputs) else None
        self.tensors = self._stand_ins.tensors if self._stand_ins else list(inputs)
        self._known = known
        with torch.enable_grad():
            self._mark = new_mark()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the operations that are to be differentiated."""
        with torch.enable_grad(), self._stand_ins or contextlib.nullcontext():
            yield

    def check(self, results: Sequence[torch.Tensor], *sources: torch.Tensor) -> None:
        """Raises UsageError if a gradient of the results would reach others than `tensors`, `known` and `sources`."""
        if self._stand_ins:
            self._stand_ins.refuse_originals(results)
        if leaves_of(results, [*sources, *self._known, *self.tensors], self._mark):
            raise UsageError(UNREACHED)


class Autocast:
    """The state of autocast at the solve, to be restored where the field is evaluated again."""

    def __init__(self, like: torch.Tensor):
        self.device = like.device.type
        self.enabled, self.dtype = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)

    def restored(self) -> torch.autocast:
        """The state; without its cache of cast weights, which carry the graph, or none, of whoever cast them."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)
