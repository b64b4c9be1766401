"""Inside a compiled function, solves run as they do elsewhere, and under fullgraph it is said what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from neuralode import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from neuralode.nn import MLPField

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
FIELD = MLPField(2, [4]).double()
SOLVES: dict[str, Any] = {
    "solve": lambda y: solve(FIELD, y, T, options={"first_step": 0.1}).final,
    "dense": lambda y: solve(FIELD, y, T, dense=True).dense(T[1:] / 2)[0],  # type: ignore[index, misc]
    "odeint": lambda y: odeint(FIELD, y, T)[-1],
    "odeint_adjoint": lambda y: odeint_adjoint(FIELD, y, T)[-1],
    "odeint_dense": lambda y: odeint_dense(FIELD, y, 0.0, 1.0)(0.5),
    "odeint_event": lambda y: odeint_event(lambda t, y: -y, y, T[0], event_fn=lambda t, y: y[0, 0] - 0.5)[1][-1],
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("call", SOLVES.values(), ids=SOLVES)
def test_solves_in_compiled_functions_give_the_same_without_warnings(call: Any) -> None:
    def around(y: torch.Tensor) -> torch.Tensor:
        return 3 * call(2 * y)  # type: ignore[no-any-return]

    y0 = torch.ones(3, 2, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.compile(around, backend="aot_eager")(y0)
    assert [str(warning.message) for warning in said] == []
    torch.testing.assert_close(found, around(y0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", SOLVES.values(), ids=SOLVES)
def test_a_whole_graph_takes_an_odeblock(call: Any) -> None:
    with pytest.raises(Exception, match="under fullgraph=True solve with an ODEBlock, which is taken whole"):
        torch.compile(call, fullgraph=True, backend="eager")(torch.ones(3, 2, dtype=torch.float64))
