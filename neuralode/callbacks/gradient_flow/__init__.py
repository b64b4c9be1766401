"""The gradient-flow monitor: hooks, cadences, logging and pictures; the mathematics is in `neuralode.gradient_flow`."""

from neuralode.callbacks.gradient_flow.monitor import GradientFlowMonitor

__all__ = ["GradientFlowMonitor"]
