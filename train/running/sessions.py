"""What a worker is told by whoever started it: who it is among the ranks, and where checkpoints go. `job.py` has Ray's session."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from boxcar.train.running.run_folder import RunFolder, checkpoint_name


class Session(Protocol):
    """One worker's place in the world. Publishing is collective."""

    rank: int
    world_size: int
    device: torch.device

    def publish(self, folder: Path | None, step: int, metrics: dict[str, Any]) -> None:
        """Make rank 0's folder the run's checkpoint of that step; None on other ranks."""

    def endangered(self) -> bool:
        """Whether some worker's machine will soon be taken away: true once for each such notice. Collective."""

    def stopping(self) -> bool:
        """Whether this worker was told to end."""


class LocalSession:
    """This process alone."""

    rank = 0
    world_size = 1

    def __init__(self, folder: RunFolder, num_to_keep: int, device: torch.device) -> None:
        self.device = device
        self._folder = folder
        self._num_to_keep = num_to_keep
        self._stopping = False

    def publish(self, folder: Path | None, step: int, metrics: dict[str, Any]) -> None:
        assert folder is not None, "rank 0 has written it"
        self._folder.put(folder, checkpoint_name(step))
        shutil.rmtree(folder)
        # Those of later steps are damaged, or of a way that the run went back from: they must neither be kept for this one nor resumed.
        steps = self._folder.checkpoints()
        kept = [other for other in steps if other <= step][: self._num_to_keep]
        for other in set(steps) - set(kept):
            self._folder.delete(checkpoint_name(other))

    def endangered(self) -> bool:
        return False

    def stopping(self) -> bool:
        return self._stopping

    @contextmanager
    def stop_on(self, number: signal.Signals) -> Iterator[None]:
        """Save and end at this signal (a scheduler's SIGTERM) for the time of the block. Only the main thread receives signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            self._stopping = True

        before = signal.signal(number, stop)
        try:
            yield
        finally:
            signal.signal(number, before)
