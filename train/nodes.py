"""What each node of a cluster runs on and sees, and where two nodes differ. Training on nodes that differ fails late and unreadably."""

import importlib.metadata
import platform
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines import storage
from schemas.errors import BoxcarError, TrainingError
from train.index import load_manifest

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "pyarrow", "polars", "numpy", "pillow", "tokenizers", "boxcar-vl")
ABSENT = "not installed"


@dataclass(frozen=True)
class NodeFacts:
    """Of one node. `same`: must be equal on all nodes; `about`: for people."""

    host: str
    same: dict[str, str]
    about: dict[str, str]
    problems: list[str]


def node_facts(shards: Sequence[str] = (), token_file: str | None = None) -> NodeFacts:
    """Look around on this node. token_file: a file that the driver wrote, which must be seen here, too."""
    same = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    about = {"machine": platform.machine(), "system": platform.platform()}
    problems = []
    same |= _gpu_versions()
    about["gpus"], driver = _gpus()
    if driver:
        same["nvidia driver"] = driver
    for folder in shards:
        try:
            same[f"shards {folder}"] = _digest(folder)
        except BoxcarError as error:
            same[f"shards {folder}"] = "not readable"
            problems.append(str(error))
    if token_file is not None and not Path(token_file).exists():
        problems.append(f"{Path(token_file).parent}: what the driver writes there is not seen here: it is not shared storage")
    return NodeFacts(platform.node(), same, about, problems)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _gpu_versions() -> dict[str, str]:
    try:
        import torch  # noqa: PLC0415  (seconds to import, and `doctor` also runs where it is missing)
    except ImportError:
        return {}
    found = {"torch's cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _gpus() -> tuple[str, str]:
    """(names and memory, driver version); empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "none", ""
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
    return ", ".join(f"{name} ({memory})" for name, memory, _ in rows), rows[0][2] if rows else ""


def _digest(folder: str) -> str:
    """The manifest's own hash, after a look whether every file has its size."""
    manifest = load_manifest(folder)
    local = storage.local_path(folder)
    if local is not None:
        for entry in (*manifest.shards, *manifest.image_shards):
            path = Path(local) / entry.name
            size = path.stat().st_size if path.exists() else 0
            if size != entry.num_bytes:
                raise TrainingError(str(path), found=f"{size} bytes", expected=f"{entry.num_bytes}", fix="Copy the folder of shards again.")
    return manifest.manifest_xxh3_128


def differences(nodes: Sequence[NodeFacts]) -> list[str]:
    """A line for each fact that is not the same on all nodes: what is found, and where."""
    lines = []
    for fact in sorted({name for node in nodes for name in node.same}):
        hosts: dict[str, list[str]] = {}
        for node in nodes:
            hosts.setdefault(node.same.get(fact, ABSENT), []).append(node.host)
        if len(hosts) > 1:
            lines.append(f"{fact}: " + "; ".join(f"{value} on {', '.join(sorted(set(names)))}" for value, names in sorted(hosts.items())))
    return lines


def survey(shards: Sequence[str], output: str | None) -> list[NodeFacts]:
    """The facts of every node of the cluster that Ray is connected to. A token in `output` tells whether it is shared."""
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    token = None
    if output is not None and (local := storage.local_path(output)) is not None:
        Path(local).mkdir(parents=True, exist_ok=True)
        token = Path(local) / f".doctor-{uuid.uuid4().hex}"
        token.write_text("seen by all nodes")
    look = ray.remote(num_cpus=0)(_look)
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        seen = ray.get(
            [look.options(scheduling_strategy=place).remote(tuple(shards), None if token is None else str(token)) for place in places]
        )
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    return [NodeFacts(**facts) for facts in seen]


def _look(shards: tuple[str, ...], token_file: str | None) -> dict[str, object]:
    return asdict(node_facts(shards, token_file))


def require_alike(nodes: Sequence[NodeFacts]) -> None:
    """Raises TrainingError where nodes differ or do not see what they must."""
    found = differences(nodes) + [f"{node.host}: {problem}" for node in nodes for problem in node.problems]
    if found:
        raise TrainingError(
            f"the cluster's {len(nodes)} nodes",
            found="what training would stumble over later:\n  " + "\n  ".join(found) + "\n",
            expected="the same versions and the same shards everywhere, and an `output` that all nodes share",
            fix="`boxcar doctor NAME --cluster` shows all of it.",
        )
