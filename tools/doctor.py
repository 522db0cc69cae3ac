"""`boxcar doctor`: is everything here, do the nodes agree, will the job fit?"""

import os
import shutil
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from schemas.training import TrainConfig
from tools.plain import visible
from train.job import connected
from train.nodes import ABSENT, NodeFacts, differences, node_facts, survey

MAX_UPLOAD_BYTES = 100 << 20
"""Ray refuses a larger working directory (HTTP 413)."""
_MIN_FREE_BYTES = 5 << 30


def doctor(config: TrainConfig | None, *, cluster: bool, working_dir: Path) -> int:
    """Print what was found. Returns the exit code: 0 where nothing stands in the way."""
    console = Console(soft_wrap=True)
    shards = config.shards if config else ()
    output = config.output if config else None
    problems: list[str] = []
    resources: dict[str, float] = {}
    if cluster:
        with connected() as resources:
            nodes = survey(shards, output)
        problems += differences(nodes)
    else:
        nodes = [node_facts(shards)]
    problems += [f"{node.host}: {problem}" for node in nodes for problem in node.problems]
    problems += [f"{name} is not installed" for name in ("torch", "transformers", "peft") if nodes[0].same[name] == ABSENT]
    console.print(_table(nodes))
    if config:
        problems += _placement(config, resources, cluster=cluster)
        problems += _storage(config)
    problems += _upload(working_dir, console)
    for problem in problems:
        console.print(visible(f"PROBLEM  {problem}"), markup=False)
    console.print("Nothing stands in the way." if not problems else f"{len(problems)} problems.", markup=False)
    return 1 if problems else 0


def _table(nodes: list[NodeFacts]) -> Table:
    table = Table("", *(visible(node.host) for node in nodes))
    facts = list(dict.fromkeys(name for node in nodes for name in (*node.same, *node.about)))
    for fact in facts:
        values = [node.same.get(fact, node.about.get(fact, ABSENT)) for node in nodes]
        style = "bold red" if len(set(values)) > 1 and any(fact in node.same for node in nodes) else ""
        table.add_row(visible(fact), *map(visible, values), style=style)
    return table


def _placement(config: TrainConfig, resources: dict[str, float], *, cluster: bool) -> list[str]:
    place = config.placement
    cpus = resources.get("CPU", 0.0) if cluster else float(os.cpu_count() or 1)
    where = "the cluster" if cluster else "this machine"
    found = []
    needed = place.num_workers * place.cpus_per_worker
    if needed > cpus:
        found.append(f"{place.num_workers} workers need {needed:g} CPUs, {where} has {cpus:g}: lower num_workers or cpus_per_worker")
    elif place.num_workers * (place.cpus_per_worker + config.loader_workers) > cpus:
        found.append(
            f"{place.num_workers} workers with {config.loader_workers} loader processes each share {cpus:g} CPUs of {where}: decoding may "
            "hold training up; lower loader_workers or use image_storage: embed_resized"
        )
    if cluster and place.use_gpu and resources.get("GPU", 0.0) < place.num_workers:
        found.append(f"{place.num_workers} workers with a GPU each, the cluster has {resources.get('GPU', 0.0):g} GPUs")
    return found


def _storage(config: TrainConfig) -> list[str]:
    output = Path(config.output)
    if "://" in config.output:
        return []
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = []
    if not os.access(place, os.W_OK):
        found.append(f"{place} may not be written")
    if free < _MIN_FREE_BYTES:
        found.append(f"{place} has {free / 1e9:.1f} GB free: checkpoints need room for the adapter and twice that for its optimizer, each")
    return found


def _upload(working_dir: Path, console: Console) -> list[str]:
    """What `ray job submit --working-dir` would upload. An upper bound: tracked files that .rayignore names are counted."""
    sizes = _sizes(working_dir)
    total = sum(sizes.values())
    console.print(f"working directory: at most {total / 1e6:,.1f} MB in {len(sizes):,} files to upload", markup=False)
    found = []
    if total > MAX_UPLOAD_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        found.append(
            f"{working_dir} has {total / 1e6:,.0f} MB; Ray refuses more than {MAX_UPLOAD_BYTES / 1e6:,.0f} MB. Name in .rayignore: "
            + ", ".join(str(path.relative_to(working_dir)) for path in largest)
        )
    secrets = [path for path in sizes if path.name == ".env" or path.suffix in (".pem", ".key")]
    if secrets:
        found.append(f"{', '.join(str(path.relative_to(working_dir)) for path in secrets)}: would be uploaded; name it in .rayignore")
    return found


def _sizes(working_dir: Path) -> dict[Path, int]:
    command = ["git", "-C", str(working_dir), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (working_dir / ".rayignore").exists():
        command.append("--exclude-from=.rayignore")
    try:
        names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
        paths = [working_dir / name for name in names if name]
    except (OSError, subprocess.SubprocessError):
        paths = [path for path in working_dir.rglob("*") if path.is_file()]
    return {path: path.stat().st_size for path in paths if path.is_file()}
