"""Training tasks: Lightning modules around a plain model."""

from neuralode.tasks.task import Task
from neuralode.tasks.tasks import Classification, Regression, TrajectoryFitting

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "trajectory": TrajectoryFitting,
}

__all__ = ["TASKS", "Classification", "Regression", "Task", "TrajectoryFitting"]
