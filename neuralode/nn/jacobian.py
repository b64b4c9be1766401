"""How fast a vector field stretches: the norm of its Jacobian along the solutions."""

from __future__ import annotations

import torch

from neuralode.nn.ode_block import ODEBlock


@torch.no_grad()
def largest_jacobian_norm(block: ODEBlock, y0: torch.Tensor, times: int = 11) -> float:
    """The largest spectral norm of ∂f/∂y along the block's solutions.

    Args:
        block: an ODEBlock over states [B, D]; D small, since the Jacobian is formed.
        y0: initial states, [B, D] before augmentation.
        times: how many equally spaced times of the time span to look at.

    Returns:
        max over samples and times of ‖∂f/∂y‖₂, in units of 1/t.
    """
    start, end = block.solver.t_span
    ts = torch.linspace(start, end, times, dtype=y0.dtype, device=y0.device)
    path = block.solve(y0, ts).ys
    assert isinstance(path, torch.Tensor)

    largest = 0.0
    for t, y in zip(ts, path, strict=True):

        def one(state: torch.Tensor, t: torch.Tensor = t) -> torch.Tensor:
            return block.vector_field(t, state.unsqueeze(0)).squeeze(0)

        jacobians = torch.func.vmap(torch.func.jacrev(one))(y)
        largest = max(largest, float(torch.linalg.matrix_norm(jacobians, ord=2).max()))
    return largest
