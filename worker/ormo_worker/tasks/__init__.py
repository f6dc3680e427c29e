"""What a worker trains: a task is a model, its data and its loss, named by an import path."""

from ormo_worker.tasks.task import ClassificationTask, Score, Task, TaskError, load_task

__all__ = ["ClassificationTask", "Score", "Task", "TaskError", "load_task"]
