"""`boxcar doctor`: is everything here, do the nodes agree, will the job fit?"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from boxcar.pipelines import storage
from boxcar.pipelines.cluster import connected
from boxcar.schemas.training import TrainConfig
from boxcar.tools.plain import visible
from boxcar.tools.tables import Table
from boxcar.train.running.nodes import ABSENT, Needs, NodeFacts, alike, all_problems, hosts_with, node_facts, survey

MAX_UPLOAD_BYTES = 100 << 20
"""Ray refuses a larger working directory (HTTP 413)."""
NEEDED = ("torch", "transformers", "peft")
_MIN_FREE_BYTES = 5 << 30
_RAY_LEAVES_OUT = (".git", ".venv", "venv", "__pycache__")
"""RAY_RUNTIME_ENV_DEFAULT_EXCLUDES of Ray 2.60."""
_SECRETS = (".pem", ".key")


def doctor(config: TrainConfig | None, *, cluster: bool, working_dir: Path) -> int:
    """Print what was found. Returns the exit code: 0 where nothing stands in the way, 1 where something does. Raises BoxcarError."""
    console = Console(soft_wrap=True)
    if cluster:
        with connected():
            nodes = survey(config)
        if "RAY_ADDRESS" not in os.environ:
            console.print("RAY_ADDRESS is not set: this is a cluster of this machine alone, started for this check.", markup=False)
    else:
        nodes = [node_facts(Needs.of(config))]
    problems = all_problems(nodes) + _missing(config, nodes)
    console.print(_table(nodes))
    if config:
        problems += _placement(config, nodes, cluster=cluster)
        problems += _storage(config)
    problems += _upload(working_dir, console)
    for problem in problems:
        console.print(visible(f"PROBLEM  {problem}"), markup=False)
    many = "1 problem." if len(problems) == 1 else f"{len(problems)} problems."
    console.print(many if problems else "No problem found.", markup=False)
    return 1 if problems else 0


def _table(nodes: Sequence[NodeFacts]) -> Table:
    """A row for each fact; where nodes differ, a line for each value with its hosts. In red what must not differ."""
    answered = [node for node in nodes if node.same]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(overflow="fold")
    table.add_row("nodes", visible(", ".join(sorted(node.host for node in nodes))))
    must_agree = {name for node in answered for name in node.same}
    for fact in dict.fromkeys(name for node in answered for name in (*node.same, *node.about)):
        values = sorted({(node.same | node.about).get(fact, ABSENT) for node in answered})
        differs = fact in must_agree and len({alike(fact, value) for value in values}) > 1
        shown = values[0] if len(values) == 1 else "\n".join(f"{value} on {hosts_with(answered, fact, value)}" for value in values)
        table.add_row(visible(fact), visible(shown), style="bold red" if differs else "")
    return table


def _missing(config: TrainConfig | None, nodes: Sequence[NodeFacts]) -> list[str]:
    """What every node needs. Where only some have it, the nodes differ, which is said already."""
    needed = NEEDED + (("deepspeed",) if config is not None and config.deepspeed else ())
    answered = [node for node in nodes if node.same]
    return [f"{name} is not installed" for name in needed if answered and all(node.same[name] == ABSENT for node in answered)]


def _placement(config: TrainConfig, nodes: Sequence[NodeFacts], *, cluster: bool) -> list[str]:
    """Whether the workers have a place: each on one node, and all at a time."""
    place = config.placement
    where = "the cluster" if cluster else "this machine"
    cpus = [node.resources["CPU"] for node in nodes if node.resources] if cluster else [float(os.cpu_count() or 1)]
    room = sum(int(have / place.cpus_per_worker) for have in cpus)
    found = []
    if room < place.num_workers:
        found.append(
            f"{place.num_workers} workers of {place.cpus_per_worker:g} CPUs each, and {where} of {_sum(cpus)} CPUs can hold {room}: lower "
            "num_workers or cpus_per_worker"
        )
    elif place.num_workers * (place.cpus_per_worker + config.loader_workers) > sum(cpus):
        found.append(
            f"{place.num_workers} workers with {config.loader_workers} loader processes each share {_sum(cpus)} CPUs of {where}: decoding "
            "may slow training down; lower loader_workers or use image_storage: embed_resized"
        )
    gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
    if cluster and place.use_gpu and gpus < place.num_workers:
        found.append(f"{place.num_workers} workers with a GPU each, the cluster has {gpus:g} GPUs")
    return found


def _sum(cpus: Sequence[float]) -> str:
    return " + ".join(f"{have:g}" for have in cpus) if len(cpus) <= 4 else f"{sum(cpus):g}"


def _storage(config: TrainConfig) -> list[str]:
    """Whether there is disk space for checkpoints, as seen from this machine. A bucket has."""
    local = storage.local_path(config.output)
    if local is None:
        return []
    output = Path(local).absolute()
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = []
    if not place.is_dir() or not os.access(place, os.W_OK):
        found.append(f"{place} may not be written: `output` is no place for a run")
    if free < _MIN_FREE_BYTES:
        found.append(f"{place} has {free / 1e9:.1f} GB free: checkpoints need room for the adapter and twice that for its optimizer, each")
    return found


# ---- what a job would upload


def _upload(working_dir: Path, console: Console) -> list[str]:
    """What `ray job submit --working-dir` would upload, and what it should not."""
    files = [path for path in uploaded(working_dir) if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    console.print(f"working directory: {total / 1e6:,.1f} MB in {len(sizes):,} files to upload", markup=False)
    found = []
    if total > MAX_UPLOAD_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        found.append(
            f"{working_dir} has {total / 1e6:,.0f} MB; Ray refuses more than {MAX_UPLOAD_BYTES / 1e6:,.0f} MB. Name in .rayignore: "
            + ", ".join(str(path.relative_to(working_dir)) for path in largest)
        )
    secrets = [str(path.relative_to(working_dir)) for path in files if path.name.startswith(".env") or path.suffix in _SECRETS]
    if secrets:
        found.append(f"{', '.join(sorted(secrets))}: would be uploaded; name it in .rayignore")
    return found


def uploaded(working_dir: Path) -> list[Path]:
    """The files of a working directory that Ray uploads: all but its own exceptions and what .gitignore and .rayignore name, committed or
    not. Without git, which knows how to read those files, all of them.

    Git is asked with an empty index in a folder of its own, so that it answers by the patterns alone, in a repository or out of one. It
    differs from Ray in one case: within a folder that is left out, `!` does not bring it back.
    """
    ignored = [f"--exclude={name}" for name in _RAY_LEAVES_OUT]
    if (working_dir / ".rayignore").is_file():
        ignored.append("--exclude-from=.rayignore")
    with TemporaryDirectory() as empty:
        listing = ["git", f"--git-dir={empty}", f"--work-tree={working_dir.absolute()}", "ls-files", "-z", "--others"]
        try:
            subprocess.run(["git", "init", "--quiet", "--bare", empty], capture_output=True, check=True)
            done = subprocess.run(
                [*listing, "--exclude-per-directory=.gitignore", *ignored], cwd=working_dir, capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return sorted(working_dir.rglob("*"))
    found: list[Path] = []
    for name in os.fsdecode(done.stdout).split("\0"):
        # A repository within is named as a folder.
        found += sorted((working_dir / name).rglob("*")) if name.endswith("/") else [working_dir / name] if name else []
    return found
