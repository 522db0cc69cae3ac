"""Running a command and seeing its cost: CPU-seconds of it and all processes below it, and the largest anonymous memory of one of them."""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("boxcar-vl", "ray", "pyarrow", "polars", "numpy", "tokenizers", "msgspec", "pillow", "torch", "transformers", "peft")
POLL_SECONDS = 0.02
BOXCAR = (sys.executable, "-m", "boxcar.tools.cli")
"""The command `boxcar` of the interpreter that runs the benchmark, whatever PATH says."""


@dataclass
class Cost:
    """What a command cost."""

    cpu_s: float
    """Of the command and of every process that it started, servers that outlive it (Ray's) included."""
    wall_s: float
    peak_anon_mb: float
    """RssAnon of the largest process of its tree: what file-backed pages (memory maps, shared objects) do not count in."""
    exit_code: int
    peak_by_name_mb: dict[str, float] = field(default_factory=dict)


def run(command: Sequence[str], *, cwd: Path | None = None) -> Cost:
    """Run a command to its end, its output thrown away but for what it says of mistakes."""
    before = os.times()
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    watch = _Watch(process.pid)
    watch.start()
    _, errors = process.communicate()
    wall = time.monotonic() - start
    watch.stop()
    after = os.times()
    if process.returncode:
        sys.stderr.write(errors.decode(errors="replace"))
    waited_for_s = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    # What was waited for is exact, but lacks the processes that no parent waits for, as Ray's. The watch sees these as well, but may
    # miss the last POLL_SECONDS of each.
    return Cost(max(waited_for_s, watch.cpu_s()), wall, max(watch.peak_mb.values(), default=0.0), process.returncode, watch.peak_mb)


class _Watch(threading.Thread):
    """Polls memory and CPU time of a process and all below it, also of those whose parent ended before them."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.peak_mb: dict[str, float] = {}
        self._seen: set[int] = set()
        self._cpu_s: dict[tuple[int, str], float] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._seen.update(_tree([self.root, *self._seen]))
            for pid in list(self._seen):
                if (used := _cpu_of(pid)) is None:
                    self._seen.discard(pid)  # it ended
                    continue
                started, cpu_s = used
                self._cpu_s[pid, started] = cpu_s
                name, anon = _anonymous_mb(pid)
                key = f"{name} {pid}"
                self.peak_mb[key] = max(self.peak_mb.get(key, 0.0), anon)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def cpu_s(self) -> float:
        """CPU-seconds of all processes that were seen, each counted without its children."""
        return sum(self._cpu_s.values())


def _tree(roots: Sequence[int]) -> set[int]:
    pids: set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid in pids:
            continue
        pids.add(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return pids


def _cpu_of(pid: int) -> tuple[str, float] | None:
    """(start time in ticks, CPU-seconds of all threads) of a process; None where it ended. Fields 14, 15 and 22 of proc(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks
    return fields[19], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous_mb(pid: int) -> tuple[str, float]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "?", 0.0  # it ended meanwhile
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return fields["Name"].strip(), int(fields.get("RssAnon", "0 kB").split()[0]) / 1000


def conditions() -> str:
    """Hardware, versions, date and command: what every figure is worth nothing without."""
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")), "?")
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return "\n".join(
        [
            f"{date.today().isoformat()}  python -m tools.bench {' '.join(sys.argv[1:])}",
            f"{os.cpu_count()} cores ({model}), {platform.system()} {platform.release()}, Python {platform.python_version()}",
            ", ".join(found),
        ]
    )
