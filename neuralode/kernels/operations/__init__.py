"""How each operation of PyTorch, below autograd, is written as lines of a program."""

from neuralode.kernels.operations import composed, elementwise, features, products
from neuralode.kernels.operations.registry import HANDLERS, MAKERS

__all__ = ["HANDLERS", "MAKERS", "composed", "elementwise", "features", "products"]
