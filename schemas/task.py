"""The kinds of turns."""

from typing import Literal, get_args

TaskName = Literal["detect", "detect_joint", "refer", "describe", "absent", "caption", "dialogue"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
