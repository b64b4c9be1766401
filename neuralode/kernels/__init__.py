"""The hot loop: fields recognised as programs, and the compiled kernels that solve them."""

from neuralode.kernels.report import report

__all__ = ["report"]
