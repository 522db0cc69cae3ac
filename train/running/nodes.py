"""What each node of a cluster runs on and sees, and where two nodes differ. Training on nodes that differ fails late and unreadably.

every node:  versions, GPUs, digests of the shards, the base and Boxcar's own code, the driver's token in `output`  ──> NodeFacts
the driver:  differences(nodes), problems of each  ──> `boxcar doctor --cluster`, or TrainingError before training starts
"""

import importlib.metadata
import os
import platform
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow.fs as pafs
import xxhash

from boxcar.pipelines import storage
from boxcar.schemas.errors import BoxcarError, TrainingError
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.training import TrainConfig
from boxcar.train.planning.index import load_manifest

COMPARED: dict[str, int | None] = {
    "torch": None,
    "transformers": None,
    "peft": None,
    "deepspeed": None,
    "ray": None,
    "boxcar-vl": None,
    "pillow": 1,
    "numpy": 1,
    "pyarrow": 1,
}
"""Packages that must agree, and in how many parts of their version; None: in all, for ranks exchange what these compute."""
SHOWN = ("accelerate", "safetensors", "tokenizers", "polars")
ABSENT = "not installed"
SECONDS_TO_ANSWER = 180.0
"""Importing torch from slow storage takes a minute."""
MAX_NAMED_HOSTS = 4
_OWN_PACKAGES = ("schemas", "pipelines", "train")


@dataclass(frozen=True)
class NodeFacts:
    """Of one node."""

    host: str
    same: dict[str, str]
    """What must agree on all nodes (versions as COMPARED says). Empty where the node did not answer."""
    about: dict[str, str]
    """For people."""
    problems: list[str]
    resources: dict[str, float] = field(default_factory=dict)
    """What Ray has there: CPU, GPU. Empty without Ray."""


@dataclass(frozen=True)
class Needs:
    """What a run reads and writes on every node."""

    shards: tuple[str, ...] = ()
    """Folders or URIs, of training and of validation."""
    base: str = ""
    """An absolute path is looked for; a hub id is not."""
    token: str | None = None
    """Path or URI of a file that the driver wrote into `output`, which must be seen everywhere."""

    @classmethod
    def of(cls, config: TrainConfig | None) -> "Needs":
        if config is None:
            return cls()
        held_out = config.validation.shards if config.validation else ()
        return cls(tuple(dict.fromkeys((*config.shards, *held_out))), config.base)


# ---- on a node


def node_facts(needs: Needs) -> NodeFacts:
    """Look around on this node."""
    same = {"python": platform.python_version()} | {name: _version(name) for name in COMPARED}
    same["boxcar's code"] = code_digest()
    about = {name: _version(name) for name in SHOWN} | {"machine": platform.machine(), "system": platform.platform()}
    problems = []
    same |= _gpu_versions()
    about["gpus"], driver = _gpus()
    if driver:
        same["nvidia driver"] = driver
    for path in needs.shards:
        try:
            manifest = _whole(path)
            same[f"shards {path}"] = manifest.manifest_xxh3_128
            problems += _missing_images(path, manifest)
        except BoxcarError as error:
            same[f"shards {path}"] = "not readable"
            problems.append(str(error))
    if os.path.isabs(needs.base):
        config = Path(needs.base) / "config.json"
        same[f"base {needs.base}"] = storage.hash_file(str(config)) if config.is_file() else "not there"
        if not config.is_file():
            problems.append(f"train.base: {config} is not there; a base must be seen by all nodes")
    if needs.token is not None and not _exists(needs.token):
        problems.append(f"{_parent(needs.token)}: what the driver writes there is not seen here: it is not shared storage")
    return NodeFacts(platform.node(), same, about, problems)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def code_digest() -> str:
    """Hash of Boxcar's own modules as they are imported here: two checkouts may bear one version."""
    package = Path(__file__).parents[2]
    digest = xxhash.xxh3_64()
    for floor in _OWN_PACKAGES:
        for path in sorted((package / floor).rglob("*.py")):
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


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
    counts = Counter(f"{name} ({memory})" for name, memory, _ in rows)
    gpus = ", ".join(f"{number} x {gpu}" if number > 1 else gpu for gpu, number in counts.items())
    return gpus or "none", rows[0][2] if rows else ""


def _whole(folder: str) -> Manifest:
    """The manifest, after a look whether every local file has its size."""
    manifest = load_manifest(folder)
    local = storage.local_path(folder)
    if local is not None:
        for entry in (*manifest.shards, *manifest.image_shards):
            path = Path(local) / entry.name
            size = path.stat().st_size if path.exists() else 0
            if size != entry.num_bytes:
                raise TrainingError(str(path), found=f"{size} bytes", expected=f"{entry.num_bytes}", fix="Copy the folder of shards again.")
    return manifest


def _missing_images(folder: str, manifest: Manifest) -> list[str]:
    """Shards that only name their images are of no use without them."""
    root = storage.local_path(manifest.images_root)
    if manifest.image_shards or not root or Path(root).is_dir():
        return []
    fix = "put them on shared storage or a URI, or convert with image_storage: embed_resized"
    return [f"{folder}: its images in {root} are not seen here; {fix}"]


def _exists(path: str) -> bool:
    try:
        filesystem, inner = storage.resolve(path)
        return bool(filesystem.get_file_info(inner).type != pafs.FileType.NotFound)
    except (OSError, ValueError, NotImplementedError):
        return False  # a node without credentials does not see it


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


# ---- between nodes


def alike(fact: str, value: str) -> str:
    """What of a value must agree: a version up to the part that counts."""
    parts = COMPARED.get(fact)
    return value if parts is None else ".".join(value.split(".")[:parts])


def differences(nodes: Sequence[NodeFacts]) -> list[str]:
    """A line for each fact that is not the same on all nodes that answered: what is found, and where."""
    answered = [node for node in nodes if node.same]
    lines = []
    for fact in sorted({name for node in answered for name in node.same}):
        values = {node.same.get(fact, ABSENT) for node in answered}
        if len({alike(fact, value) for value in values}) > 1:
            lines.append(f"{fact}: " + "; ".join(f"{value} on {hosts_with(answered, fact, value)}" for value in sorted(values)))
    return lines


def hosts_with(nodes: Sequence[NodeFacts], fact: str, value: str) -> str:
    """The hosts on which a fact has this value, in words; not all of many."""
    hosts = sorted({node.host for node in nodes if (node.same | node.about).get(fact, ABSENT) == value})
    more = len(hosts) - MAX_NAMED_HOSTS
    return ", ".join(hosts[:MAX_NAMED_HOSTS]) + (f" and {more} more" if more > 0 else "")


def all_problems(nodes: Sequence[NodeFacts]) -> list[str]:
    """Where nodes differ, and what each of them lacks."""
    return differences(nodes) + [f"{node.host}: {problem}" for node in nodes for problem in node.problems]


def survey(config: TrainConfig | None) -> list[NodeFacts]:
    """The facts of every node of the cluster that Ray is connected to. A token in `output` tells whether it is shared.

    A node that does not answer is a problem of its own. Raises TrainingError where `output` may not be written.
    """
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    nodes = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    with _token(None if config is None else config.output) as token:
        needs = asdict(replace(Needs.of(config), token=token))
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(needs) for node in nodes
        ]
        ray.wait(asked, num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
        found = [_answer(reference) for reference in asked]
    names = Counter(node["NodeManagerHostname"] for node in nodes)
    hosts = [node["NodeManagerHostname"] + (f" ({node['NodeID'][:6]})" if names[node["NodeManagerHostname"]] > 1 else "") for node in nodes]
    return [
        replace(facts, host=host, resources={name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")})
        for node, host, facts in zip(nodes, hosts, found, strict=True)
    ]


def _look(needs: dict[str, object]) -> dict[str, object]:
    return asdict(node_facts(Needs(**needs)))  # type: ignore[arg-type]


def _answer(reference: object) -> NodeFacts:
    import ray  # noqa: PLC0415

    try:
        return NodeFacts(**ray.get(reference, timeout=0))
    except ray.exceptions.GetTimeoutError:
        problem = f"no answer within {SECONDS_TO_ANSWER:g} s"
    except ray.exceptions.RayError as error:
        # The last line of a remote traceback is the error itself: most often, that Boxcar is not installed there.
        problem = f"no answer: {str(error).strip().splitlines()[-1]}"
    return NodeFacts("", {}, {}, [problem])


@contextmanager
def _token(output: str | None) -> Iterator[str | None]:
    """A file in `output` for the time of the block. Raises TrainingError where it may not be written."""
    if output is None:
        yield None
        return
    path = f"{output.rstrip('/')}/.doctor-{uuid.uuid4().hex}"
    local = storage.local_path(path)
    try:
        filesystem, inner = storage.resolve(path)
        if local is not None:
            Path(local).parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_output_stream(inner) as stream:
            stream.write(b"seen by all nodes")
    except (OSError, ValueError, NotImplementedError) as error:
        raise TrainingError(
            f"train.output, {output}",
            found=f"{error}",
            expected="a folder or bucket that may be written",
            fix="Choose another `output`, or correct its permissions or credentials.",
        ) from error
    try:
        yield path
    finally:
        filesystem.delete_file(inner)


def require_alike(nodes: Sequence[NodeFacts]) -> None:
    """Raises TrainingError where nodes differ or do not see what they must."""
    if found := all_problems(nodes):
        raise TrainingError(
            f"the cluster's {len(nodes)} nodes",
            found="problems that would stop training later:\n  " + "\n  ".join(found) + "\n",
            expected="the same versions and the same shards everywhere, and an `output` that all nodes share",
            fix="`boxcar doctor NAME --cluster` shows all of it.",
        )
