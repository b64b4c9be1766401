"""What stands around a compiled block: code that sets what its field holds, calls that change it, other processes."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn import MLPField, ODEBlock
from neuralode.ode import SolverConfig

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4)
BACKENDS = ["eager", "aot_eager"]


class Steered(nn.Module):
    """A field with a buffer, a number, a list and a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4).double()
        self.register_buffer("shift", torch.zeros(4).double())
        self.gain, self.gains = 1.0, [1.0]
        self.context: Any = 0.0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(y) + self.shift + self.context) * self.gain * self.gains[0]


def set_buffer(field: Steered, x: torch.Tensor) -> None:
    field.shift = 2 * x.detach().mean(0)


def write_buffer(field: Steered, x: torch.Tensor) -> None:
    field.shift.copy_(x.detach().mean(0))


def set_number(field: Steered, x: torch.Tensor) -> None:
    field.gain = field.gain + 1


def set_entry(field: Steered, x: torch.Tensor) -> None:
    field.gains[0] = 3.0


def set_context(field: Steered, x: torch.Tensor) -> None:
    field.context = x.mean(0)


class Model(nn.Module):
    """Sets something of the field before it solves."""

    def __init__(self, change: Any):
        super().__init__()
        self.block, self.change = ODEBlock(Steered(), SolverConfig(checkpoint="never")), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(self.block.field, x)
        return self.block(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [set_buffer, write_buffer, set_number, set_entry, set_context])
@pytest.mark.filterwarnings("ignore:torch.compile leaves")
def test_what_is_set_before_the_block_is_seen_by_it(change: Any, backend: str) -> None:
    plain, model = Model(change), Model(change)
    compiled = torch.compile(model, backend=backend)
    for factor in (1.0, 2.0, -3.0):
        xs = [(factor * X).requires_grad_() for _ in range(2)]
        expected, found = plain(xs[0]), compiled(xs[1])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        expected.square().sum().backward()
        found.square().sum().backward()
        torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-10, atol=1e-12)


def test_buffers_set_before_the_block_need_no_graph_break() -> None:
    plain, model = Model(set_buffer), Model(set_buffer)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), plain(X))


def test_a_buffer_that_is_made_from_the_input_gets_its_gradient() -> None:
    def change(field: Steered, x: torch.Tensor) -> None:
        field.shift = 2 * x.mean(0)

    plain, model = Model(change), Model(change)
    plain.block.solver.engine = "stepper"
    found = []
    for call in (plain, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x = X.clone().requires_grad_()
        found.append(torch.autograd.grad(call(x).square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_counts_as_it_does_uncompiled(backend: str) -> None:
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    plain = ODEBlock(field, SolverConfig(method="rk4", step_size=0.5))
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower")  # the compiler's, on Python 3.13.0
        for training in (True, False, True):
            for block, call in ((plain, plain), (model, compiled)):
                block.train(training)
                call(X).square().sum().backward()
    assert len([w for w in said if "BatchNorm1d in training mode" in str(w.message)]) == 1
    assert len(said) == 1
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    torch.testing.assert_close(model.field[0].weight.grad, plain.field[0].weight.grad)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_field_that_changes_a_buffer_is_refused(in_place: bool) -> None:
    class Counting(Steered):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.shift = self.shift.add_(1) if in_place else self.shift + 1
            return super().forward(t, y)

    with pytest.raises(UsageError, match=r"changes 'field.shift'.*torch.compiler.disable"):
        torch.compile(ODEBlock(Counting()), backend="aot_eager")(X)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_replaced_before_the_backward_pass_does_not_change_the_gradient(backend: str) -> None:
    plain, block = ODEBlock(Steered()), ODEBlock(Steered())
    states = [plain(X), torch.compile(block, backend=backend)(X)]
    for one, ys in zip((plain, block), states, strict=True):
        one.field.shift = torch.ones(4).double()
        ys.square().sum().backward()
    torch.testing.assert_close(block.field.linear.weight.grad, plain.field.linear.weight.grad, rtol=1e-10, atol=1e-12)


def test_a_field_that_has_changed_by_the_backward_pass_is_an_error() -> None:
    block = ODEBlock(Steered())
    ys = torch.compile(block, backend="aot_eager")(X)
    block.field.gain = 3.0
    with pytest.raises(UsageError, match="other states than the forward pass"):
        ys.sum().backward()


def test_second_derivatives_are_refused_in_a_sentence() -> None:
    x = X.clone().requires_grad_()
    block = ODEBlock(Steered())
    ys = torch.compile(block, backend="eager")(x)
    (gradient,) = torch.autograd.grad(ys.square().sum(), x, create_graph=True)
    with pytest.raises(UsageError, match="first derivatives only"):
        gradient.sum().backward()


def test_a_first_call_in_inference_mode() -> None:
    block = ODEBlock(Steered())
    with torch.inference_mode():
        found = torch.compile(block, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(found, block(X))


def test_an_exported_program_runs_where_its_block_is_and_says_so_elsewhere(tmp_path: Path) -> None:
    block = ODEBlock(MLPField(4, [8]).double())
    program = torch.export.export(nn.Sequential(block), (X,))
    torch.testing.assert_close(program.module()(X), block(X))
    torch.export.save(program, tmp_path / "program.pt2")
    script = (
        "import sys, torch; from neuralode.nn import MLPField, ODEBlock; "
        "blocks = [ODEBlock(MLPField(4, [8]).double()) for _ in range(100)]; "  # of the same numbers, perhaps
        "torch.export.load(sys.argv[1]).module()(torch.ones(8, 4).double())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "program.pt2")], capture_output=True, text=True, check=False
    )
    assert "UsageError: there is no ODEBlock" in ended.stderr
    assert "another process exported the program" in ended.stderr


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.3), nn.RReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))], ids=str
)
def test_fields_that_draw_or_write_in_training_mode_are_left_out(layer: nn.Module) -> None:
    block = ODEBlock(nn.Sequential(nn.Linear(4, 4), layer).double(), SolverConfig(method="rk4", step_size=0.5))
    again = copy.deepcopy(block)
    torch.manual_seed(0)
    block(X).sum().backward()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="torch.compile leaves an ODEBlock out, for its field has a .* in training"):
        torch.compile(again, backend="eager")(X).sum().backward()
    for wanted, found in zip(block.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
