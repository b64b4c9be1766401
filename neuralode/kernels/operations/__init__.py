"""How each operation of PyTorch, below autograd, is written as lines of a program."""

from neuralode.kernels.operations import elementwise, features, products
from neuralode.kernels.operations.registry import HANDLERS, MAKERS

__all__ = ["HANDLERS", "MAKERS", "elementwise", "features", "products"]
