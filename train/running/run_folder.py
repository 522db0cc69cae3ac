"""A run's own folder, local, shared or in an object store.

run.json               what the run is made of; a folder of another run is refused
plan/epoch-0000.arrow  the plan of each epoch, written once by the driver
metrics.jsonl          one event a line
step-00000200/         checkpoints (`train.running.checkpoint`), the newest few
adapter/               the last one's adapter and contract, when the run is complete
loss.png               the same as a picture
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from boxcar.pipelines import storage
from boxcar.schemas.errors import StorageError, TrainingError

CHECKPOINT_PREFIX = "step-"
ADAPTER = "adapter"
METRICS = "metrics.jsonl"
RUN = "run.json"


def checkpoint_name(step: int) -> str:
    return f"{CHECKPOINT_PREFIX}{step:08d}"


class RunFolder:
    """Files and folders by name. Raises StorageError where a remote storage says no."""

    def __init__(self, uri: str) -> None:
        """uri: of the run's folder; a relative path is made absolute, since workers stand elsewhere."""
        local = storage.local_path(uri)
        self.local = None if local is None else Path(local).absolute()
        self.uri = uri.rstrip("/") if self.local is None else str(self.local)

    def __truediv__(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def read(self, name: str, start: int = 0) -> bytes | None:
        """A file from this byte on; None where there is no such file."""
        with _answering(self / name):
            filesystem, path = storage.resolve(self / name)
            if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
                return None
            with filesystem.open_input_file(path) as stream:
                stream.seek(min(start, stream.size()))
                data: bytes = stream.read()
        return data

    def write(self, name: str, data: bytes) -> None:
        if self.local is not None:
            with storage.writing(self.local):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            with storage.atomic_write(self.local / name) as stream:
                stream.write(data)
            return
        with _answering(self / name):
            filesystem, path = storage.resolve(self / name)
            with filesystem.open_output_stream(path) as output:
                output.write(data)

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are there, whole or not, the newest first."""
        with _answering(self.uri):
            filesystem, path = storage.resolve(self.uri)
            entries = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        names = [entry.base_name.removeprefix(CHECKPOINT_PREFIX) for entry in entries if entry.base_name.startswith(CHECKPOINT_PREFIX)]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def fetch(self, name: str, scratch: Path) -> Path:
        """A folder or file as a local path: itself, or a copy below `scratch`."""
        if self.local is not None:
            return self.local / name
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with _answering(self / name):
            filesystem, path = storage.resolve(self / name)
            if filesystem.get_file_info(path).type == pafs.FileType.Directory:
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
            pafs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())
        return target

    def put(self, folder: Path, name: str) -> None:
        """Publish a local folder under a name: beside and renamed where local, else file by file, the seal last."""
        if self.local is None:
            with _answering(self / name):
                filesystem, path = storage.resolve(self / name)
                for file in sorted(folder.iterdir(), key=lambda file: (file.name == "checkpoint.json", file.name)):
                    pafs.copy_files(
                        str(file), f"{path}/{file.name}", source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem
                    )
            return
        with storage.writing(self.local / name):
            self.local.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=self.local))
            try:
                shutil.copytree(folder, beside, dirs_exist_ok=True)
                if (self.local / name).exists():
                    shutil.rmtree(self.local / name)
                beside.rename(self.local / name)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
            storage.sync_folder(self.local)

    def delete(self, name: str) -> None:
        """A folder."""
        with _answering(self / name):
            filesystem, path = storage.resolve(self / name)
            filesystem.delete_dir(path)

    def delete_file(self, name: str) -> None:
        with _answering(self / name):
            filesystem, path = storage.resolve(self / name)
            filesystem.delete_file(path)


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """Around calls of a storage: what a remote one refuses becomes an error with the way out; what a local one refuses stays an OSError."""
    try:
        yield
    except OSError as error:
        if storage.local_path(uri) is not None:
            raise
        raise StorageError(
            uri,
            found=f"{error}",
            expected="storage that answers and may be written",
            fix="Check `output`, that the bucket exists, and the credentials in the environment of every worker; a storage of your own "
            "(MinIO, Ceph) is named by AWS_ENDPOINT_URL there. Then the same command with --resume goes on.",
        ) from error


def require_new_or_same(folder: RunFolder, made_of: dict[str, object], read: dict[str, object] | None, *, resume: bool) -> None:
    """Raises TrainingError where the folder belongs to another run, or to this one and `--resume` was not said."""
    if read is None:
        return
    if different := sorted(key for key in made_of.keys() | read.keys() if made_of.get(key) != read.get(key)):
        shown = "\n  ".join(f"{key}: {read.get(key)!r} there, {made_of.get(key)!r} here" for key in different)
        raise TrainingError(
            folder / RUN,
            found=f"the folder of another run:\n  {shown}\n",
            expected="a run made of the same",
            fix="Leave `name` out: every run then has a folder of its own.",
        )
    if not resume:
        raise TrainingError(
            folder.uri,
            found="a run made of the same shards and settings",
            expected="a new run, or --resume",
            fix="--resume goes on from its last checkpoint, or from the start where it has none. Another seed or setting is another run.",
        )
