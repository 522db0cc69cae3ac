"""The checkpoints of a run, as one worker sees them: written by rank 0, the newest whole one found again, the last one's adapter published.

snapshot ──write──> scratch ──session.publish──> step-00000200/ ──newest──> snapshot
                                                    └── at the end ──> adapter/
"""

import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from boxcar.schemas.adapter import AdapterCard
from boxcar.schemas.errors import TrainingError
from boxcar.train.running import checkpoint
from boxcar.train.running.checkpoint import Snapshot
from boxcar.train.running.run_folder import ADAPTER, RunFolder, checkpoint_name
from boxcar.train.running.sessions import Session

_NOT_OF_THE_ADAPTER = ("optimizer.safetensors", "trainable.safetensors", checkpoint.SEAL, "state.json")


@dataclass(frozen=True)
class Checkpoints:
    """Where they go and how they get there."""

    folder: RunFolder
    session: Session
    scratch: Path
    log: Callable[[dict[str, Any]], None]

    def save(self, snapshot: Snapshot, metrics: dict[str, float], card: AdapterCard, save_model: Callable[[Path, Snapshot], None]) -> None:
        """Collective. save_model: writes what from_pretrained reads into a folder. Raises TrainingError where the disk is full."""
        folder = None
        try:
            if self.session.rank == 0:
                folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.scratch))
                checkpoint.write(folder, snapshot, card, lambda where: save_model(where, snapshot))
            self.session.publish(folder, snapshot.state.step, metrics)
        except OSError as error:
            raise self._disk_error(error) from error
        self.log({"event": "checkpoint", "step": snapshot.state.step, "folder": self.folder / checkpoint_name(snapshot.state.step)})

    def newest(self, not_after: int | None = None) -> Snapshot | None:
        """The newest checkpoint that is whole (of a step <= not_after); the same on every rank. Collective."""
        chosen: list[int | None] = [self.newest_whole(not_after) if self.session.rank == 0 else None]
        if distributed.is_initialized() and self.session.world_size > 1:
            distributed.broadcast_object_list(chosen)
        if chosen[0] is None:
            return None
        folder = self.folder.fetch(checkpoint_name(chosen[0]), self.scratch)
        if not folder.is_dir():
            raise TrainingError(
                str(folder),
                found=f"no such folder on {platform.node()}",
                expected="the checkpoint that rank 0 sees",
                fix="`output` must be on storage that all nodes share, or an object store.",
            )
        return checkpoint.load(folder)

    def newest_whole(self, not_after: int | None = None) -> int | None:
        """Its step. Damaged ones are logged and passed over."""
        for step in self.folder.checkpoints():
            if not_after is not None and step > not_after:
                continue
            found = checkpoint.problems(self.folder.fetch(checkpoint_name(step), self.scratch))
            if not found:
                return step
            self.log({"event": "checkpoint_damaged", "step": step, "problems": found})
        return None

    def publish_adapter(self, step: int) -> None:
        """The model of this checkpoint, without the optimizer, as `adapter/`."""
        source = self.folder.fetch(checkpoint_name(step), self.scratch)
        copy = Path(tempfile.mkdtemp(dir=self.scratch))
        for file in source.iterdir():
            if file.name not in _NOT_OF_THE_ADAPTER:
                shutil.copy(file, copy / file.name)
        self.folder.put(copy, ADAPTER)

    def _disk_error(self, error: OSError) -> TrainingError:
        return TrainingError(
            self.folder.uri,
            found=f"{error.strerror or error} while saving a checkpoint",
            expected="enough disk space",
            fix="The last complete checkpoint is untouched. Free disk space, then run the same command with --resume.",
        )
