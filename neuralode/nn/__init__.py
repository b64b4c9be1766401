"""Layers and vector fields: plain torch modules, usable in any training loop."""

from neuralode.nn.divergence import DensityField
from neuralode.nn.fields import AttentionField, ConvField, LotkaVolterraField, MLPField
from neuralode.nn.jacobian import largest_jacobian_norm
from neuralode.nn.ode_block import ODEBlock

__all__ = [
    "AttentionField",
    "ConvField",
    "DensityField",
    "LotkaVolterraField",
    "MLPField",
    "ODEBlock",
    "largest_jacobian_norm",
]
