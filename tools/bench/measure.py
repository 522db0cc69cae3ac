"""Running a command and seeing what it cost: CPU-seconds of it and its children, and the largest anonymous memory of any one process."""

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


@dataclass
class Cost:
    """What a command cost."""

    cpu_s: float
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
    cpu = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    return Cost(cpu, wall, max(watch.peak_mb.values(), default=0.0), process.returncode, watch.peak_mb)


class _Watch(threading.Thread):
    """Polls RssAnon of a process and all below it."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.peak_mb: dict[str, float] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            for pid in _tree(self.root):
                name, anon = _anonymous_mb(pid)
                key = f"{name} {pid}"
                self.peak_mb[key] = max(self.peak_mb.get(key, 0.0), anon)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _tree(root: int) -> list[int]:
    pids, todo = [], [root]
    while todo:
        pid = todo.pop()
        pids.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return pids


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
