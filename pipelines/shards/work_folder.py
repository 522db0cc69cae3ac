"""The output folder of a conversion: what is in it, what may be written into it, and where a stopped run goes on.

output/
  rows-00000.arrow  images-00000.arrow  rejected-00000.jsonl     one of each for a unit, as there is need
  manifest.json                                                  last: its presence means complete
  .boxcar/run.json          whose folder this is: settings, contract, source
  .boxcar/plan.json         the units                            } removed when the
  .boxcar/index/            what the reader prepared             } conversion is complete
  .boxcar/units/00000.json  commit of a unit: files, hashes, counts
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.readers.reader import Unit
from boxcar.pipelines.shards.arrow_files import check_file
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import BoxcarError, ConfigError
from boxcar.schemas.manifest import MANIFEST_NAME, Counts, FileEntry
from boxcar.schemas.record import Rejected
from boxcar.schemas.workflow import ConvertConfig

STATE_FOLDER = ".boxcar"
MAX_ATTEMPTS = 3
SOURCE_KEYS = ("annotations", "captions", "instances", "classes")
NOT_IN_OUTPUT = ("output", "executor", "num_workers")
"""Settings that cannot change a byte of the output."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError)

State = TypeVar("State", bound=msgspec.Struct)


class Run(msgspec.Struct, kw_only=True):
    """Whose folder this is. A later run with another key is refused."""

    boxcar_version: str
    settings: dict[str, Any]
    contract: FrameContract
    stamps: dict[str, tuple[int, int]]
    """(bytes, mtime in ns) of each annotation file that is a local file: unchanged stamps save reading them again."""

    @property
    def key(self) -> str:
        """What must be equal to go on with a stopped run."""
        parts = [self.boxcar_version, self.settings, self.contract]
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts, order="sorted"))


class SavedPlan(msgspec.Struct, kw_only=True):
    """A reader's plan, as written."""

    fingerprint: str
    units: list[tuple[str, int, int]]
    num_records: int | None
    notes: list[str]
    rejected: list[Rejected]

    def unit(self, number: int) -> Unit:
        return Unit(*self.units[number])


class Commit(msgspec.Struct, kw_only=True):
    """A unit whose files are complete."""

    number: int
    rows: FileEntry
    images: FileEntry | None
    rejected: FileEntry | None
    counts: Counts

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in (self.rows, self.images, self.rejected) if entry is not None]


def settings_of(config: ConvertConfig) -> dict[str, Any]:
    """The settings that decide the output, with all defaults, as the manifest holds them."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_IN_OUTPUT}


def stamps_of(config: ConvertConfig) -> dict[str, tuple[int, int]] | None:
    """Stamps of the annotation files; None where one is a folder or remote, which no stamp can vouch for."""
    stamps = {}
    for key in SOURCE_KEYS:
        path = getattr(config, key)
        local = storage.local_path(path) if path else None
        if path and (local is None or not Path(local).is_file()):
            return None
        if local:
            info = os.stat(local)
            stamps[key] = (info.st_size, info.st_mtime_ns)
    return stamps


class WorkDir:
    """The output folder of one run."""

    def __init__(self, output: str) -> None:
        local = storage.local_path(output)
        if local is None:
            raise ConfigError(
                "convert.output",
                found=output,
                expected="a local or shared folder",
                fix="Convert there, then copy the folder: nothing in it depends on its place.",
            )
        self.folder = Path(local).absolute()
        self.state = self.folder / STATE_FOLDER
        self.index_folder = self.state / "index"
        self._index_mark = self.index_folder / "complete"
        self.units_folder = self.state / "units"

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST_NAME

    def open(self, run: Run) -> None:
        """Make the folder this run's. Raises ConfigError where it belongs to another conversion or to something else."""
        with storage.writing(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(str(self.folder), found="a file", expected="a folder", fix="Choose another `output`.") from error
            existing = self._existing_run()
            if existing is None:
                self._refuse_strangers()
                self.units_folder.mkdir(parents=True, exist_ok=True)
                self._write(self.state / "run.json", run)
            elif existing.key != run.key and self._is_blank():
                # A first try that ended before it read anything (a wrong path, say) must not stand in the way of the second.
                with self.lock():
                    self._write(self.state / "run.json", run)
            else:
                self.require_own(run)
                self.units_folder.mkdir(parents=True, exist_ok=True)

    def _is_blank(self) -> bool:
        """Whether nothing was read or written under the run that stands here."""
        return not self.manifest_path.exists() and not (self.state / "plan.json").exists() and not any(self.units_folder.glob("*.json"))

    def require_own(self, run: Run) -> None:
        """Raises ConfigError where the folder belongs to a run with other settings."""
        existing = self._existing_run()
        if existing is not None and existing.key != run.key:
            raise ConfigError(
                str(self.folder),
                found="another conversion: " + "; ".join(_differences(existing, run)),
                expected="an empty folder, or a conversion with the same settings",
                fix="Choose another `output`, or delete this folder if you no longer need it.",
            )

    def _existing_run(self) -> Run | None:
        return self._read("run.json", Run)

    def _read(self, name: str, kind: type[State]) -> State | None:
        path = self.state / name
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except _UNREADABLE as error:
            raise ConfigError(
                str(path),
                found=f"a file of another version or damaged ({error})",
                expected="the state of a conversion",
                fix="Choose another `output`.",
            ) from error

    def _refuse_strangers(self) -> None:
        names = sorted(entry.name for entry in self.folder.iterdir() if entry.name != STATE_FOLDER)
        if names:
            what = "another conversion, without its state" if MANIFEST_NAME in names else f"{len(names)} files, such as {names[0]!r}"
            raise ConfigError(str(self.folder), found=what, expected="an empty folder", fix="Choose another `output`; nothing was written.")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one driver at a time; the system frees it when the process ends, however it ends."""
        with storage.writing(self.state / "lock"):
            stream = open(self.state / "lock", "w")  # noqa: SIM115  (closed by the next `with`)
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BoxcarError(
                    str(self.folder),
                    found="another boxcar convert that writes to it",
                    expected="one at a time",
                    fix="Wait for it, or stop it.",
                ) from error
            yield

    @property
    def saved_stamps(self) -> dict[str, tuple[int, int]]:
        run = self._existing_run()
        return run.stamps if run else {}

    @property
    def index_is_ready(self) -> bool:
        """Whether the index is that of the plan on disk.

        False where a later plan was begun: changed annotations are refused only after their index was built in the place of the old one.
        """
        return self._index_mark.exists()

    def read_plan(self) -> SavedPlan | None:
        return self._read("plan.json", SavedPlan)

    def write_plan(self, plan: SavedPlan) -> None:
        self._write(self.state / "plan.json", plan)
        with storage.writing(self._index_mark):
            self.index_folder.mkdir(exist_ok=True)
            self._index_mark.touch()

    def clear_index(self) -> Path:
        """An empty folder for a reader to prepare files in. It belongs to no plan until the next is written."""
        with storage.writing(self.index_folder):
            self._index_mark.unlink(missing_ok=True)
            shutil.rmtree(self.index_folder, ignore_errors=True)
            self.index_folder.mkdir(parents=True)
        return self.index_folder

    def name(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{number:05d}.{suffix}"

    def write_commit(self, commit: Commit) -> None:
        self._write(self.units_folder / f"{commit.number:05d}.json", commit)

    def read_commit(self, number: int) -> Commit | None:
        """The unit's commit, if its files are on disk as they were written."""
        commit = self.load_commit(number)
        return None if commit is None or any(check_file(self.folder, entry) for entry in commit.files) else commit

    def load_commit(self, number: int) -> Commit | None:
        """The unit's commit, its files unseen."""
        path = self.units_folder / f"{number:05d}.json"
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=Commit)
        except _UNREADABLE:
            return None

    @contextmanager
    def attempt(self, number: int) -> Iterator[bool]:
        """Around the conversion of a unit in a worker. False: it died there too often, do not try again.

        Ray repeats a task whose worker died without end (2.60), which a unit that needs more memory than there is would keep up for ever.
        """
        tries = len(list(self.units_folder.glob(f"{number:05d}.try-*")))
        marker = self.units_folder / f"{number:05d}.try-{tries}"
        marker.touch()
        yield tries < MAX_ATTEMPTS
        marker.unlink(missing_ok=True)

    def forget_attempts(self) -> None:
        for marker in self.units_folder.glob("*.try-*"):
            marker.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what writers that died left half written."""
        with storage.writing(self.folder):
            for folder in (self.folder, self.state, self.units_folder):
                for path in folder.glob(storage.UNFINISHED):
                    path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The manifest is written: drop what only a running conversion needs."""
        self.sweep()
        shutil.rmtree(self.index_folder, ignore_errors=True)
        shutil.rmtree(self.units_folder, ignore_errors=True)
        (self.state / "plan.json").unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, value: msgspec.Struct) -> None:
        with storage.atomic_write(path) as stream:
            stream.write(msgspec.json.encode(value))


def _differences(existing: Run, run: Run) -> list[str]:
    there, here = _flat(existing.settings), _flat(run.settings)
    lines = [
        f"{name} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    lines += existing.contract.differences(run.contract)
    if existing.boxcar_version != run.boxcar_version:
        lines.append(f"boxcar {existing.boxcar_version} there, {run.boxcar_version} here")
    return lines


def _flat(settings: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, as overrides write them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{parent}{name}.") if isinstance(value, dict) else {f"{parent}{name}": value})
    return flat
