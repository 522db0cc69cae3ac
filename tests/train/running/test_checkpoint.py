"""A checkpoint is whole or not there."""

import json
from pathlib import Path

import pytest
import torch

from boxcar.schemas.adapter import AdapterCard, BaseRecord
from boxcar.schemas.errors import ShardError
from boxcar.train.running import checkpoint
from boxcar.train.running.checkpoint import Snapshot, TrainState
from tests.small_sets import CONTRACT

CARD_OF_A_TEST = AdapterCard(
    contract=CONTRACT,
    base=BaseRecord(name="base", config_xxh3_128="0" * 32),
    method="lora",
    trained_turns={"detect": 3},
    train_shards={},
    to_original_pixels="v",
)


def _snapshot() -> Snapshot:
    state = TrainState(step=7, tokens=1234, rate_scale=0.5, watch={"0": {"value": 1.0}}, early_stop={"best": 0.5, "waited": 1})
    return Snapshot(state, {"a.weight": torch.arange(6.0).view(2, 3).t()}, {"a.weight/exp_avg": torch.ones(3, 2)})


def _save_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _write(folder: Path) -> Path:
    checkpoint.write(folder, _snapshot(), CARD_OF_A_TEST, _save_adapter)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    loaded = checkpoint.load(_write(tmp_path / "c"))
    assert loaded.state == _snapshot().state
    for name, tensor in _snapshot().parameters.items():
        assert torch.equal(loaded.parameters[name], tensor)
    assert torch.equal(loaded.optimizer["a.weight/exp_avg"], torch.ones(3, 2))


FILES = ["adapter_config.json", "trainable.safetensors", "optimizer.safetensors", "state.json", "boxcar.json", "checkpoint.json"]


def test_what_is_in_it(tmp_path: Path) -> None:
    assert {path.name for path in _write(tmp_path).iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    (_write(tmp_path) / name).unlink()
    assert checkpoint.problems(tmp_path)
    with pytest.raises(ShardError, match="Resume from an older one"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (problem,) = checkpoint.problems(tmp_path)
    assert name in problem


def test_a_folder_that_was_never_completed(tmp_path: Path) -> None:
    assert "never completed" in checkpoint.problems(tmp_path)[0]


def test_another_version_is_refused(tmp_path: Path) -> None:
    seal = _write(tmp_path) / "checkpoint.json"
    content = json.loads(seal.read_text())
    seal.write_text(json.dumps(content | {"version": 2}))
    assert "version 2" in checkpoint.problems(tmp_path)[0]
