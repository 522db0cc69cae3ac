"""A checkpoint: adapter, optimizer, position and contract, as one thing that is either whole or not there.

    adapter_model.safetensors, adapter_config.json   as peft writes them: `PeftModel.from_pretrained(base, folder)` loads it
    (model-*.safetensors, config.json                instead, where all parameters are tuned)
    trainable.safetensors    the same parameters by name in training, in full precision
    optimizer.safetensors    moments by parameter name; nothing in it depends on the number of ranks or the strategy
    state.json               position in the plan (one counter), loss watch, early stopping, and what the run was made of
    boxcar.json              the frame contract of the shards, the base, and what it was trained on (`schemas.adapter`)
    checkpoint.json          written last: the size and hash of every other file

No pickle: loading a checkpoint runs no code of its own.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from boxcar.schemas.adapter import CARD, AdapterCard
from boxcar.schemas.errors import ShardError

SEAL = "checkpoint.json"
FORMAT = "boxcar-checkpoint"
VERSION = 1
_READ_BYTES = 1 << 24


@dataclass
class TrainState:
    """Where a run stands. Everything else is a function of the plan, the shards and the configuration."""

    step: int = 0
    """Optimizer steps done: the position in the plan, whatever the number of ranks."""
    tokens: int = 0
    """Useful tokens trained on (no padding)."""
    rate_scale: float = 1.0
    """Halved at each roll-back."""
    watch: dict[str, Any] = field(default_factory=dict)
    early_stop: dict[str, Any] = field(default_factory=dict)
    task_best: dict[str, float] = field(default_factory=dict)
    """Best value so far of each validation metric that alarms watch."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory."""

    state: TrainState
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def write(folder: Path, snapshot: Snapshot, card: AdapterCard, save_model: Callable[[Path], None]) -> None:
    """Write a checkpoint into an empty folder. `save_model` writes what peft or transformers loads. Raises OSError: a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder)
    save_file(_contiguous(snapshot.parameters), folder / "trainable.safetensors")
    save_file(_contiguous(snapshot.optimizer), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(snapshot.state), indent=1))
    (folder / CARD).write_bytes(card.dumps())
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != SEAL}
    seal = {"format": FORMAT, "version": VERSION, "step": snapshot.state.step, "files": files}
    (folder / SEAL).write_text(json.dumps(seal, indent=1))


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint on disk; [] where it is as it was written."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        files: dict[str, dict[str, Any]] = seal["files"]
        if seal["format"] != FORMAT or seal["version"] != VERSION:
            return [f"{folder / SEAL}: found {seal['format']} version {seal['version']}, expected {FORMAT} version {VERSION}"]
    except FileNotFoundError:
        return [f"{folder}: found no {SEAL}, so it was never completed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / SEAL}: found a damaged file ({error})"]
    found = []
    for name, expected in files.items():
        try:
            entry = _entry(folder / name)
        except OSError as error:
            found.append(f"{folder / name}: found {error.strerror}, expected {expected['num_bytes']} bytes")
            continue
        if entry != expected:
            found.append(f"{folder / name}: found {entry['num_bytes']} bytes of hash {entry['xxh3_128']}, expected {expected}")
    return found


def load(folder: Path) -> Snapshot:
    """Read and check a checkpoint. Raises ShardError where it is damaged or incomplete."""
    if found := problems(folder):
        raise ShardError(str(folder), found="; ".join(found), expected="a checkpoint as it was written", fix="Resume from an older one.")
    try:
        return Snapshot(
            TrainState(**json.loads((folder / "state.json").read_text())),
            load_file(folder / "trainable.safetensors"),
            load_file(folder / "optimizer.safetensors"),
        )
    except (SafetensorError, TypeError, ValueError) as error:
        raise ShardError(str(folder), found=f"a checkpoint that does not load ({error})", expected="one of this version") from error


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _entry(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"num_bytes": size, "xxh3_128": digest.hexdigest()}
