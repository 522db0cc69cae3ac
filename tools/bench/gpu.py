"""Training on a GPU: Qwen2.5-VL with random weights and LoRA, through the trainer's own loop, against transformers' Trainer.

    drawn samples ──> packs ──────────────────────> train.loop.Trainer         an arm for each switch
              └─────> rows padded to the longest ──> transformers.Trainer + peft

One process, one arm after the other, each with a network of its own; the same samples everywhere. An optimizer step is one forward pass:
a pack of `tokens` tokens here, and there as many samples as make `tokens` with their padding. Batches stand ready in
(pinned) host memory on both sides, so that this measures the device.

    useful tokens/s    tokens that are no padding, of the measured steps, by their wall time
    MFU                FLOPs of these tokens by `train.network.flops` (no recomputation, nothing for padding) by the device's published peak

Needs torch, transformers, peft, accelerate, numpy, pillow and pyarrow, and four small packages that GPU images may lack: pydantic,
msgspec, xxhash and click (`pip install --target FOLDER`, there or carried there, and PYTHONPATH=FOLDER). No ray, polars or deepspeed.
"""

import dataclasses
import gc
import json
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from boxcar.pipelines.families.catalog import find_family
from boxcar.schemas.training import TrainConfig
from boxcar.tools.bench import measure
from boxcar.tools.bench.gpu_samples import Sample, draw_packs, packed, padded_inputs
from boxcar.tools.bench.padded_trainer import train_padded
from boxcar.tools.bench.qwen_sizes import FAMILY, SIZES, write_config
from boxcar.train.data.collate import MicroBatch
from boxcar.train.network import flops
from boxcar.train.network.attention import SEGMENTS, Segments, attend_by_segment
from boxcar.train.network.model import (
    Base,
    attach_lora,
    compile_layers,
    open_base,
    pad_frozen_vision,
    parameter_groups,
    recompute_activations,
)
from boxcar.train.network.objective import BatchLoss, Objective
from boxcar.train.running.checkpoint import Snapshot
from boxcar.train.running.loop import Step, Trainer
from boxcar.train.running.strategy import PlainStrategy

_TEXT_BY_SEGMENT, _VISION_BY_SEGMENT = "bench_by_segment", "bench_flash_by_segment"
_HEAD_ROWS = 1024
SEED = 0
Found = TypeVar("Found")


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    trainer: Literal["ours", "transformers"] = "ours"
    checkpointing: bool = False
    compile: bool = False
    logits: Literal["labelled", "all"] = "labelled"
    attention: Literal["varlen", "by segment"] = "varlen"


ARMS = (
    Arm("packed"),
    Arm("packed, checkpointing", checkpointing=True),
    Arm("packed, compile", compile=True),
    Arm("packed, checkpointing, compile", checkpointing=True, compile=True),
    Arm("packed, logits of all tokens", logits="all"),
    Arm("packed, SDPA by segment", attention="by segment"),
    Arm("transformers Trainer, padded", trainer="transformers"),
    Arm("transformers Trainer, padded, checkpointing", trainer="transformers", checkpointing=True),
)


@dataclass
class Result:
    """Of the measured steps of an arm."""

    arm: Arm
    failure: str | None = None
    """Why there are no figures: "out of memory", or an error."""
    steps: int = 0
    useful_tokens: int = 0
    padding_share: float = 0.0
    seconds: float = 0.0
    step_ms: float = 0.0
    """Median."""
    tokens_per_second: float = 0.0
    tflops: float = 0.0
    """Useful, a second."""
    mfu: float | None = None
    peak_gb: float | None = None
    """Largest allocation of the device, weights included; None on a CPU."""
    loss: float = math.nan
    """Mean over the labelled tokens of the measured steps: arms that compute the same agree."""


@dataclass(frozen=True)
class Setting:
    """What the arms of a network share."""

    size: str
    folder: Path
    device: torch.device
    tokens: int
    warmup: list[list[Sample]]
    measured: list[list[Sample]]
    peak_flops: float | None


@dataclass
class _InMemory:
    """Surroundings of the loop: batches from a list, events into another, no checkpoints."""

    batches: list[MicroBatch]
    num_steps: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def steps(self, first: int) -> Iterator[Step]:
        for batch in self.batches[first:]:
            yield Step(0, [batch])

    def validation(self) -> Iterator[MicroBatch] | None:
        return None

    def save(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """The loop saves at the end, after the last measured step; here nobody resumes."""

    def newest(self, not_after: int | None = None) -> Snapshot | None:
        return None

    def measure(self) -> dict[str, float]:
        return {}

    def log(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def recompute_more(self) -> bool:
        return False

    def endangered(self) -> bool:
        return False

    def stopping(self) -> bool:
        return False


class _AllLogits(Objective):
    """The usual loss: logits of every token, in float32."""

    def forward(self, batch: MicroBatch) -> BatchLoss:
        device = batch.input_ids.device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = self._base.head(self._base.hidden_states(batch))[:, :-1].float()
            everywhere = nn.functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
        weights, places = batch.label_weights[:, 1:], batch.label_weights[:, 1:] > 0
        numbers = torch.arange(batch.input_ids.numel(), device=device).view_as(batch.input_ids)[:, 1:][places]
        groups = batch.label_groups[:, 1:][places].long()
        return BatchLoss((everywhere * weights.flatten()).sum(), everywhere.detach()[places.flatten()], groups, numbers)


# ---- arms


def has_device() -> bool:
    return torch.cuda.is_available()


def run(
    sizes: Sequence[str], tokens: int, num_steps: int, num_warmup: int, peak_tflops: float | None, json_path: Path | None, arms: str | None
) -> bool:
    """Measure these sizes, print tables, write JSON. Returns whether every arm finished, or failed only for lack of memory."""
    device = torch.device("cuda" if has_device() else "cpu")
    peak = flops.peak_flops(device, peak_tflops)
    report: dict[str, Any] = {"conditions": measure.conditions().splitlines(), "device": _describe(device), "tokens": tokens}
    report |= {"warmup_steps": num_warmup, "peak_tflops": peak and peak / 1e12, "matmul_tflops": _matmul_tflops(device), "models": {}}
    print(f"{report['device']}; {tokens} tokens, {num_warmup} + {num_steps} steps; {_peaks(report)}")
    chosen = [arm for arm in ARMS if arms is None or any(part.strip() in arm.name for part in arms.split(";"))]
    healthy = True
    for size in sizes:
        packs = draw_packs(size, tokens, num_warmup + num_steps, SEED)
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_config(Path(scratch), size)
            setting = Setting(size, folder, device, tokens, packs[:num_warmup], packs[num_warmup:], peak)
            print(f"\n{_title(size)}: {_describe_samples(packs, tokens)}")
            differences = _guarded(partial(logit_differences, setting))
            results = []
            for arm in chosen:
                results.append(measure_arm(setting, arm))
                print(_row(results[-1]), flush=True)
        healthy &= not isinstance(differences, str) and all(one.failure in (None, "out of memory") for one in results)
        print(_logits_line(differences))
        ratios = _ratios({one.arm.name: one for one in results if one.failure is None})
        for line in ratios:
            print(line)
        report["models"][size] = {
            "samples": _describe_samples(packs, tokens),
            "logits": differences,
            "arms": [asdict(one) for one in results],
        }
        report["models"][size]["ratios"] = ratios
    if json_path is not None:
        json_path.write_text(json.dumps(_finite(report), indent=1) + "\n")
        print(f"\nwritten: {json_path}")
    return healthy


def measure_arm(setting: Setting, arm: Arm) -> Result:
    """Build, train, measure, and leave the device empty again. An arm that fails is a row of the table, with its traceback on stderr."""
    found = _guarded(partial(_measure_ours if arm.trainer == "ours" else _measure_transformers, setting, arm))
    return Result(arm, failure=found) if isinstance(found, str) else found


def _guarded(work: Callable[[], Found]) -> Found | str:
    """What `work` returns, or why it could not."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    finally:
        SEGMENTS.current = None
        torch._dynamo.reset()
        gc.collect()  # here the error and its traceback, which held the tensors, are gone
        if has_device():
            torch.cuda.empty_cache()


def _measure_ours(setting: Setting, arm: Arm) -> Result:
    pad_to = setting.tokens if arm.compile else None
    batches = [packed(samples, setting.size, pad_to=pad_to) for samples in setting.warmup + setting.measured]
    if setting.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    around = _InMemory(batches, num_steps=len(batches))
    trainer = _trainer(setting, arm, around)
    _forget_peak(setting.device)
    trainer.run()
    events = [event for event in around.events if event["event"] == "step"][len(setting.warmup) :]
    measured = batches[len(setting.warmup) :]
    labels = sum(batch.weight for batch in measured)
    return _result(
        setting,
        arm,
        seconds=[event["seconds"] for event in events],
        useful_tokens=sum(batch.num_useful_tokens for batch in measured),
        all_tokens=sum(batch.input_ids.numel() for batch in measured),
        work=sum(map(trainer.shape.of_batch, measured)),
        loss=sum(event["loss"] * batch.weight for event, batch in zip(events, measured, strict=True)) / labels,
    )


def _trainer(setting: Setting, arm: Arm, around: _InMemory) -> Trainer:
    """The parts of a run, put together as `train.worker` does."""
    config = _config(arm)
    base = _open(setting, packed=True)
    if arm.attention == "by segment":
        _set_by_segment(base)
    model = attach_lora(base, config.lora, seed=SEED)
    model.train()
    if config.gradient_checkpointing:
        recompute_activations(base, gathered_weights=False)
    if config.compile:
        compile_layers(base)
    model.to(setting.device)
    kind = Objective if arm.logits == "labelled" else _AllLogits
    objective = kind(base, chunk_tokens=config.loss.chunk_tokens, autocast=torch.bfloat16, through_module=False)
    groups = parameter_groups(model, base.family.network, config.weight_decay)
    strategy = PlainStrategy(objective, model, groups, config, setting.device)
    shape = flops.shape_of(base)
    pad_frozen_vision(base)
    return Trainer(config, strategy, around, setting.device, shape, [config.lora.parts], setting.peak_flops)


def _config(arm: Arm) -> TrainConfig:
    """The defaults of `boxcar train`; the rate does not move, so that all arms take the same steps."""
    options = {
        "output": "nowhere",
        "precision": "bf16",
        "gradient_checkpointing": arm.checkpointing,
        "compile": arm.compile,
        "learning_rate": {"schedule": "constant", "warmup": 0.0},
        "checkpoint_every_steps": 1_000_000,
    }
    return TrainConfig.model_validate(options)


def _open(setting: Setting, *, packed: bool) -> Base:
    # Made where it will live: 8 billion numbers drawn on a CPU take minutes.
    with setting.device:
        return open_base(
            str(setting.folder),
            find_family(FAMILY),
            SIZES[setting.size]["image_token_id"],
            random_weights=True,
            dtype=torch.bfloat16,
            packed=packed,
            seed=SEED,
        )


def _measure_transformers(setting: Setting, arm: Arm) -> Result:
    config = _config(arm)
    warmup, measured = (padded_groups(packs, setting.tokens) for packs in (setting.warmup, setting.measured))
    batches = [padded_inputs(samples, setting.size) for samples in warmup + measured]
    base = _open(setting, packed=False)
    shape_base = attach_lora(base, config.lora, seed=SEED)
    shape = flops.shape_of(base)
    _forget_peak(setting.device)
    seconds, losses = train_padded(
        shape_base,
        [inputs for inputs, _ in batches],
        setting.device,
        checkpointing=arm.checkpointing,
        learning_rate=config.learning_rate.language,
        seed=SEED,
    )
    kept = batches[len(warmup) :]
    labels = [int((inputs["labels"] != -100).sum()) for inputs, _ in kept]
    return _result(
        setting,
        arm,
        seconds=seconds[len(warmup) :],
        useful_tokens=sum(useful for _, useful in kept),
        all_tokens=sum(inputs["input_ids"].numel() for inputs, _ in kept),
        work=sum(shape.of_batch(packed([sample], setting.size)) for samples in measured for sample in samples),
        loss=float(np.average(losses[len(warmup) :], weights=labels)),
    )


def padded_groups(packs: list[list[Sample]], tokens: int) -> list[list[Sample]]:
    """The samples of these packs, shuffled, in batches as large as `tokens` allows when padded to the longest.

    Kinder to the Trainer than its fixed batch size, which must fit three or four of the longest.
    """
    samples = [sample for samples in packs for sample in samples]
    groups: list[list[Sample]] = [[]]
    for number in np.random.default_rng(SEED).permutation(len(samples)):
        group = [*groups[-1], samples[number]]
        if len(group) * max(len(sample.document) for sample in group) <= tokens:
            groups[-1] = group
        else:
            groups.append([samples[number]])
    return groups


def _result(setting: Setting, arm: Arm, *, seconds: list[float], useful_tokens: int, all_tokens: int, work: float, loss: float) -> Result:
    total = sum(seconds)
    return Result(
        arm,
        steps=len(seconds),
        useful_tokens=useful_tokens,
        padding_share=1 - useful_tokens / all_tokens,
        seconds=total,
        step_ms=float(np.median(seconds)) * 1e3,
        tokens_per_second=useful_tokens / total,
        tflops=work / total / 1e12,
        mfu=None if setting.peak_flops is None else work / total / setting.peak_flops,
        peak_gb=torch.cuda.max_memory_allocated(setting.device) / 1e9 if setting.device.type == "cuda" else None,
        loss=loss,
    )


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


# ---- attention


def _by_segment(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float | None, causal: bool) -> Any:
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return attend_by_segment(q, k, v, segments, scale=scale, causal=causal).unsqueeze(0), None


def _text_by_segment(_module: nn.Module, query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
    segments = SEGMENTS.current
    assert segments is not None, "a packed batch"
    return _by_segment(query, key, value, segments, options["scaling"], True)


def _vision_by_segment(_module: nn.Module, query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
    return _by_segment(query, key, value, SEGMENTS.of_images(options["cu_seq_lens_q"]), options["scaling"], False)


def _set_by_segment(base: Base) -> None:
    """SDPA, a segment at a time, in both towers, whatever the device."""
    AttentionInterface.register(_TEXT_BY_SEGMENT, _text_by_segment)
    AttentionInterface.register(_VISION_BY_SEGMENT, _vision_by_segment)
    base.model.set_attn_implementation({"text_config": _TEXT_BY_SEGMENT, "vision_config": _VISION_BY_SEGMENT})


@torch.no_grad()
def logit_differences(setting: Setting) -> dict[str, float]:
    """Largest differences between logits of one pack, over all of its tokens; in bf16, so that they have a floor.

    packed_against_single: side by side, against each sample alone. kernels_on_single: each alone, varlen against SDPA: what rounding does
    (0 where both are the same code). without_borders: what it would be if samples saw one another. largest_logit: their scale.
    """
    samples = setting.measured[0]
    base = _open(setting, packed=True)

    def states(batch: MicroBatch) -> torch.Tensor:
        with torch.autocast(setting.device.type, dtype=torch.bfloat16):
            return base.hidden_states(batch.to(setting.device))[0]

    def alone() -> torch.Tensor:
        return torch.cat([states(packed([sample], setting.size)) for sample in samples])

    batch = packed(samples, setting.size)
    ends = torch.tensor([0, batch.borders[-1]], dtype=torch.int32)
    ours, joined, single = states(batch), states(dataclasses.replace(batch, cu_seqlens=ends, borders=ends.tolist())), alone()
    _set_by_segment(base)
    other = alone()
    found = dict.fromkeys(("packed_against_single", "kernels_on_single", "without_borders", "largest_logit"), 0.0)
    for start in range(0, len(single), _HEAD_ROWS):
        reference, *others = (base.head(part[start : start + _HEAD_ROWS]).float() for part in (single, ours, other, joined))
        values = [*((one - reference).abs().max() for one in others), reference.abs().max()]
        found = {name: max(found[name], float(value)) for name, value in zip(found, values, strict=True)}
    return found


# ---- words


def _title(size: str) -> str:
    return "A tiny network (a dry run: none of its figures means anything)" if size == "tiny" else f"Qwen2.5-VL-{size.upper()}"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return "no CUDA device"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def _peaks(report: dict[str, Any]) -> str:
    if report["peak_tflops"] is None:
        return "no peak known, so no MFU"
    matmul = "" if report["matmul_tflops"] is None else f" (a product of 8192 x 8192 matrices reaches {report['matmul_tflops']:.0f})"
    return f"MFU of {report['peak_tflops']:g} TFLOP/s{matmul}"


def _matmul_tflops(device: torch.device) -> float | None:
    """TFLOP/s of a large bf16 product on random numbers, median of 10; None on a CPU."""
    if device.type == "cpu":
        return None
    side, taken = 8192, []
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(13):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return float(2 * side**3 / np.median(taken[3:]) / 1e12)


def _describe_samples(packs: list[list[Sample]], tokens: int) -> str:
    documents = [sample.document for samples in packs for sample in samples]
    lengths = np.array([len(document) for document in documents])
    visual = sum(image.grid_thw[1] * image.grid_thw[2] // 4 for document in documents for image in document.images)
    labels = sum(int((document.label_weights > 0).sum()) for document in documents)
    shares = f"{visual / lengths.sum():.0%} visual, {labels / lengths.sum():.0%} labels"
    packing = f"{len(packs)} packs, {lengths.sum() / len(packs) / tokens:.1%} full"
    return f"{len(documents)} samples of {lengths.min()}..{lengths.max()} tokens (mean {lengths.mean():.0f}; {shares}) in {packing}"


def _row(result: Result) -> str:
    name = f"  {result.arm.name:<44}"
    if result.failure is not None:
        return f"{name}{result.failure}"
    mfu = "" if result.mfu is None else f"  MFU {result.mfu:6.1%}"
    peak = "" if result.peak_gb is None else f"  peak {result.peak_gb:5.1f} GB"
    return (
        f"{name}{result.tokens_per_second:9,.0f} useful tokens/s  step {result.step_ms:8.1f} ms  padding {result.padding_share:5.1%}"
        f"{mfu}{peak}  loss {result.loss:.4f}"
    )


def _logits_line(found: dict[str, float] | str) -> str:
    if isinstance(found, str):
        return f"  logits: {found}"
    return (
        f"  logits of one pack (up to {found['largest_logit']:.2f}), largest difference: packed against single "
        f"{found['packed_against_single']:.2e}; varlen against SDPA on single {found['kernels_on_single']:.2e}; "
        f"had samples seen each other {found['without_borders']:.2e}"
    )


_COMPARED = (
    ("packed", "transformers Trainer, padded"),
    ("packed, checkpointing", "transformers Trainer, padded, checkpointing"),
    ("packed, compile", "transformers Trainer, padded"),
    ("packed, checkpointing, compile", "transformers Trainer, padded, checkpointing"),
    ("packed, checkpointing", "packed"),
    ("packed, compile", "packed"),
    ("packed", "packed, logits of all tokens"),
    ("packed", "packed, SDPA by segment"),
)


def _ratios(results: dict[str, Result]) -> list[str]:
    lines = []
    for one, other in _COMPARED:
        if one in results and other in results:
            mine, theirs = results[one], results[other]
            memory = "" if not mine.peak_gb or not theirs.peak_gb else f", {mine.peak_gb / theirs.peak_gb:.2f} x its peak memory"
            lines.append(f"  {one}: {mine.tokens_per_second / theirs.tokens_per_second:.2f} x the useful tokens/s of {other!r}{memory}")
    return lines


def _finite(value: Any) -> Any:
    """The same with None for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
