"""What DeepSpeed is told: a stage of ours, or a user's own file with what it leaves open filled in."""

import json
from pathlib import Path
from typing import Any

import pytest

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import DeepspeedConfig
from boxcar.train.running.zero import deepspeed_config


def _told(**section: Any) -> dict[str, Any]:
    return deepspeed_config(DeepspeedConfig(**section), max_grad_norm=0.5, bf16=True, world_size=4)


def _file(folder: Path, settings: Any) -> str:
    (folder / "own.json").write_text(json.dumps(settings))
    return str(folder / "own.json")


def test_a_stage_and_what_waits_in_host_memory() -> None:
    told = _told(stage=3, offload="all")
    zero = told["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")
    assert (told["train_batch_size"], told["gradient_clipping"], told["bf16"]) == (4, 0.5, {"enabled": True})


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"gradient_clipping": 0.5, "bf16": {"enabled": True}}),
        ({"gradient_clipping": 2.0, "bf16": {"enabled": False}}, {"gradient_clipping": 2.0, "bf16": {"enabled": False}}),
        (
            {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}},
            {"gradient_clipping": 0.5, "bf16": {"enabled": True}},
        ),
        ({"train_batch_size": 64, "gradient_accumulation_steps": "auto", "optimizer": {"type": "AdamW"}, "scheduler": {}}, {}),
    ],
    ids=["left out", "said", "auto", "ours alone"],
)
def test_a_file_of_ones_own(tmp_path: Path, own: dict[str, Any], expected: dict[str, Any]) -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False}
    told = _told(config=_file(tmp_path, own | {"zero_optimization": zero}))
    assert told["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert told | expected == told
    assert (told["train_batch_size"], told["gradient_accumulation_steps"]) == (4, 1)
    assert not told.keys() & {"fp16", "optimizer", "scheduler"}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([], "list"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16"),
        ({}, "stage None"),
        ({"zero_optimization": {"stage": 0}}, "DistributedDataParallel"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
    ],
    ids=["no object", "fp16", "no stage", "stage 0", "an order that cannot be read back"],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, own: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _told(config=_file(tmp_path, own))
