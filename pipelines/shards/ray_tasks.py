"""Units of work as the tasks of a Ray Data pipeline, on this machine or on a cluster. Conversion and audit start Ray here only."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from boxcar.pipelines.cluster import connected
from boxcar.schemas.errors import BoxcarError

_WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""A task has one core. None of these changes a result."""


def run_with_ray(task: Callable[[int], None], pending: Sequence[int], num_workers: int | None) -> Iterator[int]:
    """Call `task` with every number of `pending`, each as one task of a Ray Data pipeline; yields numbers as they complete.

    num_workers: most tasks at a time; None: what Ray offers. A BoxcarError of a task is raised here; where a task dies otherwise the
    others go on, and its number is never yielded.

    Ray Data's own checkpoints and writers are not used: they lose and repeat rows where a driver dies (measured with 2.60). Its tasks are,
    with what a task wrote as the only thing that is believed.
    """
    if not pending:
        return
    import ray.data  # noqa: PLC0415  (ten seconds to import and start: only where it is used)

    with connected():
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller shows progress and errors
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # one unit's crash must not stop the others: the driver checks what is missing
        context.print_on_execution_start = False

        def row_task(row: dict[str, Any]) -> dict[str, Any]:
            number, error = int(row["item"]), ""
            try:
                task(number)
            except BoxcarError as mistake:
                error = str(mistake)
            return {"number": number, "error": error}

        units = ray.data.from_items(list(pending), override_num_blocks=len(pending))
        done = units.map(
            row_task,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=num_workers),
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        )
        for row in done.iter_rows():
            if row["error"]:
                raise BoxcarError(
                    f"unit {row['number']}", found=row["error"], expected="a unit that can be read", fix="What was complete before is kept."
                )
            yield int(row["number"])
