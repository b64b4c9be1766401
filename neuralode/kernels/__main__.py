"""`python -m neuralode.kernels`: which kernels there are."""

from neuralode.kernels.report import report

print(report())
