"""Training tasks: Lightning modules around a plain model."""

from neuralode.tasks.task import Task
from neuralode.tasks.tasks import Classification, Language, Regression, TrajectoryFitting

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "language": Language,
    "regression": Regression,
    "trajectory": TrajectoryFitting,
}

__all__ = ["TASKS", "Classification", "Language", "Regression", "Task", "TrajectoryFitting"]
