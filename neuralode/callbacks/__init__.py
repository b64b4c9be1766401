"""Callbacks: hooks and logging, no mathematics."""

from neuralode.callbacks.exact_resume import ExactResume
from neuralode.callbacks.gradient_flow import GradientFlowMonitor
from neuralode.callbacks.phase_portrait import PhasePortrait
from neuralode.callbacks.progress import PlainProgress, progress
from neuralode.callbacks.solver_monitor import SolverMonitor

__all__ = ["ExactResume", "GradientFlowMonitor", "PhasePortrait", "PlainProgress", "SolverMonitor", "progress"]
