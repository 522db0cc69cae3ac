"""The GPU bench, dry: every part of it runs on a CPU, and its arms compute the same."""

import json
from pathlib import Path

import pytest
import torch

from boxcar.tools.bench import gpu
from boxcar.tools.bench.gpu_samples import Sample, draw_packs
from boxcar.tools.bench.qwen_sizes import SIZES


@pytest.mark.slow
def test_both_trainers_see_the_same_samples_and_come_to_the_same_loss(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(["tiny"], 512, 2, 1, 0.1, tmp_path / "gpu.json", "all tokens;by segment;Trainer")
    report = json.loads((tmp_path / "gpu.json").read_text())["models"]["tiny"]
    found = {arm["arm"]["name"]: arm for arm in report["arms"]}
    ours, theirs = found["packed, SDPA by segment"], found["transformers Trainer, padded"]
    assert all(arm["failure"] is None and arm["mfu"] > 0 for arm in found.values())
    assert len({arm["useful_tokens"] for arm in found.values()}) == 1
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    assert theirs["padding_share"] > ours["padding_share"]
    assert report["logits"]["packed_against_single"] < 0.1 * report["logits"]["without_borders"]
    assert "useful tokens/s" in capfd.readouterr().out


def test_an_arm_that_runs_out_of_memory_is_a_line_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_measure_ours", fail)
    setting = gpu.Setting("tiny", Path(), torch.device("cpu"), 512, [], [], None)
    assert gpu.measure_arm(setting, gpu.ARMS[0]).failure == "out of memory"


def test_padded_batches_hold_every_sample_once_within_the_budget() -> None:
    packs = draw_packs("tiny", 512, 5)
    groups = gpu.padded_groups(packs, 512)

    def names(parts: list[list[Sample]]) -> list[str]:
        return sorted(sample.document.sample_id for part in parts for sample in part)

    assert names(groups) == names(packs)
    assert all(len(group) * max(len(sample.document) for sample in group) <= 512 for group in groups)
    assert all(int(sample.document.input_ids.max()) < SIZES["tiny"]["vocab_size"] for part in packs for sample in part)
