"""What an epoch costs: FLOPs from the base's config.json, GPU-hours at a stated MFU, memory by a stated formula. No torch.

Memory: `train.network.memory`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boxcar.pipelines.audit.what_if import Outcome
from boxcar.pipelines.families.family import Family
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import TrainConfig
from boxcar.tools.auditing.result import Assumptions
from boxcar.train.network.memory import GPU_GB, TRAINED_BYTES, USABLE_SHARE, StepLoad, plan_memory, step_bytes
from boxcar.train.network.model_shape import PEAK_TFLOPS, NetworkSize, size_of_config
from boxcar.train.planning.packing import CostModel

DEFAULT_GPU = "H100"
DEFAULT_MFU = 0.35


@dataclass(frozen=True)
class CostRule:
    """How figures of cost are made for one family."""

    size: NetworkSize | None
    """None: no config.json of a base was found."""
    base: str
    gpu: str
    mfu: float
    train: TrainConfig

    @property
    def peak_tflops(self) -> float:
        return self.train.peak_tflops or PEAK_TFLOPS[self.gpu]

    def flops(self, outcome: Outcome) -> float | None:
        """Of an epoch, forward and backward."""
        return None if self.size is None else self.size.shape.flops(*work_of(outcome))

    def gpu_hours(self, flops: float | None) -> float | None:
        return None if flops is None else flops / (self.peak_tflops * 1e12 * self.mfu) / 3600

    def memory_gb(self, cutoff_len: int) -> float | None:
        """Of one GPU, 1e9 bytes: micro_batch packs of cutoff_len tokens."""
        if self.size is None:
            return None
        return step_bytes(self.size, self._load(cutoff_len), self.recomputed_layers(cutoff_len)) / 1e9

    def recomputed_layers(self, cutoff_len: int) -> int:
        """Decoder layers whose activations training computes again in backward, at this length of a pack on this GPU."""
        assert self.size is not None, "asked only where there is a base"
        if self.train.gradient_checkpointing != "auto":
            return self.size.layers if self.train.gradient_checkpointing else 0
        if self.gpu not in GPU_GB:
            return self.size.layers
        return plan_memory(self.size, self._load(cutoff_len), GPU_GB[self.gpu] * 1e9 * USABLE_SHARE).recomputed_layers

    def _load(self, cutoff_len: int) -> StepLoad:
        """A pass whose packs are nothing but images, the most that a tower can see."""
        tokens = cutoff_len * self.train.micro_batch
        assert self.size is not None, "asked only where there is a base"
        patches = tokens * self.size.shape.patches_per_token
        return StepLoad(tokens, patches, self.train.loss.chunk_tokens, compiled=self.train.compile)

    def price(self, outcome: Outcome) -> float:
        """What settings are compared by: FLOPs of an epoch; without a base by the plan's cost model (Qwen2.5-VL-7B)."""
        flops = self.flops(outcome)
        if flops is not None:
            return flops
        tokens, squares, _, patches, patch_squares = work_of(outcome)
        usual = CostModel()
        return (
            usual.linear_text * tokens
            + usual.quadratic_text * squares
            + usual.linear_vision * patches
            + usual.quadratic_vision * patch_squares
        )

    def _recomputation(self) -> str:
        """What `gradient_checkpointing` comes to at the workflow's own length of a pack."""
        assert self.size is not None, "asked only where there is a base"
        setting, layers = self.train.gradient_checkpointing, self.size.layers
        if setting != "auto":
            recomputed = layers if setting else 0
            return f"gradient_checkpointing: {str(setting).lower()}: activations of {recomputed} of {layers} layers are recomputed"
        if self.gpu not in GPU_GB:
            return f"gradient_checkpointing: auto: the memory of {self.gpu} is not known: all layers are counted as recomputed"
        return (
            f"gradient_checkpointing: auto: as few layers are recomputed as fit into {USABLE_SHARE:.0%} of {GPU_GB[self.gpu]:g} GB of a "
            f"{self.gpu}; GB are of that"
        )

    def assumptions(self) -> Assumptions:
        train = self.train
        rank = train.lora.rank if train.method != "full" else None
        lines = [
            f"packs of cutoff_len tokens, {train.global_batch} a step; {train.epochs:g} epochs in the run, figures are of one",
            f"{self.gpu}: {self.peak_tflops:g} TFLOP/s dense bf16, MFU {self.mfu:.0%} (assumed: measure yours with `boxcar train`)",
        ]
        if self.size is None:
            lines.append("no config.json of a base was found (--base FOLDER): FLOPs, GPU-hours and memory are not stated")
        else:
            tuned = f"LoRA rank {rank} on {', '.join(train.lora.parts)}" if rank else "language model and merger in full"
            lines += [
                f"{self.base}: {self.size.all_weights / 1e9:.2f} billion weights, {self.size.trained / 1e6:.1f} million trained ({tuned})",
                "FLOPs: 4 P T + 2 P_trained T for the decoder, causal attention 6 h L sum(len^2), head on answer tokens, vision forward "
                + ("and backward" if self.size.shape.vision_trained else "alone"),
                f"memory: 2 bytes a weight, {TRAINED_BYTES} a trained one, activations by layer, {train.micro_batch} pack(s) a pass; "
                "no fragmentation, no sharding",
                self._recomputation(),
            ]
        return Assumptions(
            base=self.base,
            gpu=self.gpu,
            peak_tflops=self.peak_tflops,
            mfu=self.mfu,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            gradient_checkpointing=train.gradient_checkpointing,
            lora_rank=rank,
            epochs=float(train.epochs),
            weights=self.size.all_weights if self.size else 0,
            trained=self.size.trained if self.size else 0,
            lines=lines,
        )


def work_of(outcome: Outcome) -> tuple[int, int, int, int, int]:
    """(tokens, sum of squared lengths, labelled tokens, patches, sum of squared patches) of an epoch."""
    squares = sum(count * length * length for length, count in enumerate(outcome.documents.tolist()) if count)
    return outcome.tokens, squares, outcome.answer_tokens, outcome.patches, round(outcome.patch_squares)


def cost_rule(family: Family, train: TrainConfig, bases: list[str], gpu: str, mfu: float | None) -> CostRule:
    """bases: folders, config.json files or hub ids to look for: the one that was named ("" for none), then others. The first that is there
    and of the family's model_type counts.

    Raises ConfigError for a GPU whose peak is not known, an MFU out of range, or a named base that is not there.
    """
    if gpu not in PEAK_TFLOPS and train.peak_tflops is None:
        raise ConfigError("--gpu", found=repr(gpu), expected=f"one of {', '.join(PEAK_TFLOPS)}", fix="Or set train.peak_tflops.")
    mfu = DEFAULT_MFU if mfu is None else mfu
    if not 0 < mfu <= 1:
        raise ConfigError("--mfu", found=f"{mfu:g}", expected="a share above 0, at most 1")
    lora = None if train.method == "full" else train.lora
    if bases and bases[0] and find_config(bases[0]) is None:
        raise ConfigError("--base", found=repr(bases[0]), expected="a folder with config.json, or a hub id that was downloaded before")
    for base in bases:
        if config := find_config(base):
            loaded = _read(config)
            if loaded.get("model_type") == family.network.model_type:
                return CostRule(size_of_config(loaded, family.network, lora, str(config)), str(config), gpu, mfu, train)
    return CostRule(None, "", gpu, mfu, train)


def require_used(base: str, families: list[str], used: list[str]) -> None:
    """Raises ConfigError where a base that was named fits none of the families. used: the config.json that each was counted from."""
    if base and not any(used):
        raise ConfigError("--base", found=f"{base}, whose model_type fits no family here", expected=f"a base of {', '.join(families)}")


def find_config(base: str) -> Path | None:
    """config.json of a base: in its folder, or in the cache of the Hugging Face hub."""
    if not base:
        return None
    path = Path(base).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    cache = Path.home() / ".cache/huggingface/hub" / f"models--{base.replace('/', '--')}" / "snapshots"
    found = sorted(cache.glob("*/config.json")) if base.count("/") == 1 else []
    return found[-1] if found else None


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), found=f"a file that cannot be read ({error})", expected="a base's config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(str(path), found=type(config).__name__, expected="a base's config.json")
    return config
