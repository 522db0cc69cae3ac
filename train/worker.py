"""One worker from start to end: open the plan, the shards and the base, put the loop together, run it. No Ray here: `job.py` and the
command line call `work` with a session that says which rank this is.

    spec (JSON) ──> shards, contract, plan ──> base + adapters ──> strategy ──> loop ──> checkpoints, metrics, adapter
"""

import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import save_file
from torch import distributed

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.tokens.frame import Frame, frame_of
from boxcar.schemas.adapter import AdapterCard, BaseRecord
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.task import TaskName
from boxcar.schemas.training import NetworkPart, TrainConfig
from boxcar.train.answering.adapter import Opened, config_hash
from boxcar.train.data.collate import MicroBatch
from boxcar.train.data.store import ShardStore
from boxcar.train.data.stream import StreamConfig, stream
from boxcar.train.network import flops
from boxcar.train.network.attention import SEGMENTS
from boxcar.train.network.memory import USABLE_SHARE, MemoryPlan, StepLoad, plan_memory
from boxcar.train.network.model import (
    Base,
    attach_lora,
    compile_layers,
    open_base,
    pad_frozen_vision,
    parameter_groups,
    part_of,
    recompute_activations,
    recompute_first_layers,
    unfreeze,
)
from boxcar.train.network.model_shape import size_of_config
from boxcar.train.network.objective import Objective
from boxcar.train.planning.plan_table import read_plan
from boxcar.train.running.checkpoint import Snapshot, TrainState
from boxcar.train.running.checkpoints import Checkpoints
from boxcar.train.running.loop import Step, Trainer
from boxcar.train.running.run_folder import RunFolder
from boxcar.train.running.sessions import Session
from boxcar.train.running.strategy import PlainStrategy, Strategy
from boxcar.train.running.trackers import Tracker, open_trackers
from boxcar.train.running.zero import ZeroStrategy
from boxcar.train.scoring.live_metrics import answering, measure_live


@dataclass(frozen=True)
class RunSpec:
    """What a worker must know, as JSON: it travels between processes and hosts."""

    config: dict[str, Any]
    """TrainConfig with nothing left open: shards, base, cutoff_len, precision."""
    folder: str
    """URI of the run's folder."""
    name: str
    plans: list[str]
    """Files of the epochs' plans, by name within the folder."""
    epoch_steps: list[int]
    validation_plan: str | None = None
    trained_turns: dict[TaskName, int] = field(default_factory=dict)
    """Turns of each task over all epochs."""
    resume: bool = False
    versions: dict[str, str] = field(default_factory=dict)


def work(spec: RunSpec, session: Session) -> dict[str, Any]:
    """Run this worker to the end. Returns the state of the run as a dictionary; raises BoxcarError for what a user can mend."""
    config = TrainConfig.model_validate(spec.config)
    torch.set_num_threads(max(1, int(config.placement.cpus_per_worker)))
    with tempfile.TemporaryDirectory(prefix="boxcar-") as scratch:
        worker = _Worker(spec, config, session, Path(scratch))
        try:
            state = worker.trainer().run()
            worker.finish(state)
        finally:
            SEGMENTS.current = None
            worker.close()
    return asdict(state)


class _Worker:
    """The surroundings of the loop: plan, checkpoints, trackers."""

    def __init__(self, spec: RunSpec, config: TrainConfig, session: Session, scratch: Path) -> None:
        self._spec = spec
        self._config = config
        self._session = session
        self._scratch = scratch
        self._folder = RunFolder(spec.folder)
        self._checkpoints = Checkpoints(self._folder, session, scratch, self.log)
        self._store = ShardStore(config.shards, config.cache_dir, int(config.cache_gb * 1e9))
        self._contract = self._store.contract
        self._family = find_family(self._contract.family)
        self.num_steps = sum(spec.epoch_steps)
        self._trackers: list[Tracker] = []
        if session.rank == 0:
            self._trackers = open_trackers(config.trackers, self._folder, spec.name)
        self._zero3 = config.deepspeed is not None and _stage(config) == 3
        self._model: Any = None
        self._num_recomputed = 0

    # ---- putting it together

    def trainer(self) -> Trainer:
        config, session = self._config, self._session
        base = self._base
        if config.method == "full":
            unfreeze(base, config.full)
            self._model = base.model
        else:
            self._model = attach_lora(base, config.lora, seed=config.seed, quantised=config.method == "qlora")
        self._model.train()
        self._num_recomputed = self._layers_to_recompute()
        if self._num_recomputed:
            recompute_activations(base, gathered_weights=self._zero3)
            recompute_first_layers(base, self._num_recomputed)
        if config.compile:
            compile_layers(base)
        self._model.to(session.device)
        trained = {part_of(name, self._family.network) for name, weight in self._model.named_parameters() if weight.requires_grad}
        objective = Objective(
            base,
            chunk_tokens=config.loss.chunk_tokens,
            autocast=torch.bfloat16 if config.precision == "bf16" else None,
            through_module=self._zero3,
        )
        shape = flops.shape_of(base)
        groups = parameter_groups(self._model, self._family.network, config.weight_decay)
        strategy: Strategy = (ZeroStrategy if config.deepspeed else PlainStrategy)(objective, self._model, groups, config, session.device)
        self._log_start(trained, strategy)
        if config.method == "lora" and not self._zero3:
            pad_frozen_vision(base)
        return Trainer(
            config,
            strategy,
            self,
            session.device,
            shape,
            self._phases(trained),
            flops.peak_flops(session.device, config.peak_tflops),
            session.world_size,
        )

    def _layers_to_recompute(self) -> int:
        """Decoder layers whose activations are computed again in backward; the same on every rank."""
        setting = self._config.gradient_checkpointing
        num_layers = self._num_layers
        if setting != "auto":
            return num_layers if setting else 0
        plan = self._memory_plan()
        chosen = num_layers if plan is None else plan.recomputed_layers
        if distributed.is_initialized() and self._session.world_size > 1:
            most = torch.tensor(chosen, device=self._session.device)
            distributed.all_reduce(most, distributed.ReduceOp.MAX)  # ZeRO-3 gathers a layer's weights on all ranks at a time
            chosen = int(most)
        event: dict[str, Any] = {"event": "memory", "recomputed_layers": chosen, "layers": num_layers}
        if plan is not None:
            event |= {"predicted_gb": round(plan.predicted_gb, 2), "available_gb": round(plan.available_gb, 2), "fits": plan.fits}
        self.log(event)
        return chosen

    def _memory_plan(self) -> MemoryPlan | None:
        """None where the network's layers are not known from its config, or the device does not say what is free."""
        config, device = self._config, self._session.device
        available = free_bytes(device)
        lora = None if config.method == "full" else config.lora
        try:
            size = size_of_config(self._base.model.config.to_dict(), self._family.network, lora, config.base)
        except ConfigError:  # of another architecture than those that are counted
            return None
        if available is None:
            return None
        if device.type == "cpu":
            available /= self._session.world_size  # on one node they share it; on several this is careful
        packs = self._plan(self._spec.plans[0])
        load = StepLoad(
            tokens=config.micro_batch * int(pc.max(packs["num_tokens"]).as_py()),
            patches=config.micro_batch * int(pc.max(packs["num_patches"]).as_py()),
            logit_tokens=config.loss.chunk_tokens,
            compiled=config.compile,
            value_bytes=2 if config.precision == "bf16" else 4,
        )
        return plan_memory(size, load, available)

    @property
    def _num_layers(self) -> int:
        return len(list(self._base.model.get_submodule(self._family.network.decoder_layers).children()))

    @cached_property
    def _base(self) -> Base:
        config = self._config
        # Full fine-tuning without DeepSpeed keeps its master weights in float32 and computes in bf16.
        master = config.method == "full" and config.deepspeed is None
        dtype = torch.bfloat16 if config.precision == "bf16" and not master else torch.float32
        return open_base(
            config.base,
            self._family,
            self._contract.image_token_id,
            random_weights=config.init == "random",
            dtype=dtype,
            packed=config.packing == "packed",
            seed=config.seed,
            quantise=config.method == "qlora",
        )

    @property
    def _tuned(self) -> tuple[NetworkPart, ...]:
        return self._config.full if self._config.method == "full" else self._config.lora.parts

    def _phases(self, trained: set[NetworkPart]) -> list[tuple[NetworkPart, ...]]:
        """Parts that take steps, by phase of the plan."""
        everything = tuple(sorted(trained))
        phases = [everything if phase.trainable is None else phase.trainable for phase in self._config.phases] or [everything]
        for number, parts in enumerate(phases):
            if absent := sorted(set(parts) - trained):
                raise ConfigError(
                    f"train.phases[{number}].trainable",
                    found=", ".join(absent),
                    expected=f"parts that are tuned in this run: {', '.join(everything)}",
                    fix="Name them in lora.parts (or in `full`) as well.",
                )
        return phases

    def _log_start(self, trained: set[NetworkPart], strategy: Strategy) -> None:
        weights = sum(map(flops.num_weights, strategy.trainable.values()))
        everything = sum(map(flops.num_weights, self._model.parameters()))
        self.log(
            {
                "event": "started",
                "num_steps": self.num_steps,
                "world_size": self._session.world_size,
                "trainable_parameters": weights,
                "parameters": everything,
                "trained_parts": sorted(trained),
                "device": torch.cuda.get_device_name() if self._session.device.type == "cuda" else platform.processor() or "cpu",
                "versions": self._spec.versions,
            }
        )

    # ---- surroundings of the loop

    def steps(self, first: int) -> Iterator[Step]:
        before = 0
        for plan, num_steps in zip(self._spec.plans, self._spec.epoch_steps, strict=True):
            if first < before + num_steps:
                table = self._plan(plan)
                phases = dict(zip(table["step"].to_numpy().tolist(), table["phase"].to_numpy().tolist(), strict=True))
                within = max(0, first - before)
                for number, batches in enumerate(self._stream(table, within), start=within):
                    yield Step(phases[number], batches)
            before += num_steps

    def validation(self) -> Iterator[MicroBatch]:
        assert self._spec.validation_plan is not None, "the driver planned it"
        assert self._config.validation is not None, "the loop saw it"
        store = ShardStore(self._config.validation.shards, self._config.cache_dir, int(self._config.cache_gb * 1e9))
        packs = self._plan(self._spec.validation_plan).slice(0, self._config.validation.max_packs)
        for batches in self._stream(packs, 0, store):
            yield from batches

    def measure(self) -> dict[str, float]:
        validation = self._config.validation
        if validation is None or validation.generate is None:
            return {}
        with self._answering() as opened:
            return measure_live(opened, validation.shards, validation.generate, self._session, gathered_weights=self._zero3)

    @contextmanager
    def _answering(self) -> Iterator[Opened]:
        """The network as it is, in evaluation mode and with rows instead of packs, for the time of the block."""
        with answering(self._base, self._model) as (base, network):
            yield Opened(base, network, self._frame, self._card, self._spec.folder)

    @cached_property
    def _frame(self) -> Frame:
        return frame_of(self._contract, ", ".join(self._config.shards))

    def _plan(self, name: str) -> pa.Table:
        return read_plan(self._folder.fetch(name, self._scratch)).packs

    def _stream(self, packs: pa.Table, first: int, store: ShardStore | None = None) -> Iterator[list[MicroBatch]]:
        config = self._config
        return stream(
            store or self._store,
            packs,
            StreamConfig(
                micro_batch=config.micro_batch,
                packing=config.packing,
                pad_to=config.cutoff_len if config.compile and config.packing == "packed" else None,
                pixels=config.pixels,
                on_bad_image=config.on_bad_image,
                loader_workers=config.loader_workers,
                loss=config.loss,
                blank_image=self._zero3 or bool(set(self._tuned) & {"vision", "merger"}),
            ),
            first_step=first,
            rank=self._session.rank,
            world_size=self._session.world_size,
            pin_memory=self._session.device.type == "cuda",
        )

    def save(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.flush()
        self._checkpoints.save(snapshot, metrics, self._card, self._save_model)

    def newest(self, not_after: int | None = None) -> Snapshot | None:
        return self._checkpoints.newest(not_after)

    def log(self, event: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(event)

    def recompute_more(self) -> bool:
        """After an out-of-memory error: compute the activations of every layer again. False: they are already."""
        if self._num_recomputed == self._num_layers:
            return False
        self._num_recomputed = self._num_layers
        recompute_activations(self._base, gathered_weights=self._zero3)
        recompute_first_layers(self._base, self._num_recomputed)
        return True

    def endangered(self) -> bool:
        return self._session.endangered()

    def stopping(self) -> bool:
        return self._session.stopping()

    # ---- what is saved

    @cached_property
    def _card(self) -> AdapterCard:
        config = self._config
        seed = config.seed if config.init == "random" else None
        return AdapterCard(
            contract=self._contract,
            base=BaseRecord(name=config.base, config_xxh3_128=config_hash(config.base), random_seed=seed),
            method=config.method,
            trained_turns=self._spec.trained_turns,
            train_shards={folder.path: folder.manifest.manifest_xxh3_128 for folder in self._store.folders},
            to_original_pixels=self._family.grid.inverse_description,
        )

    def _save_model(self, folder: Path, snapshot: Snapshot) -> None:
        """What peft's or transformers' from_pretrained reads."""
        if self._config.method == "full":
            self._base.model.save_pretrained(folder, state_dict=self._whole_state(snapshot))
            return
        import peft  # noqa: PLC0415

        settings = self._model.peft_config["default"]
        settings.base_model_name_or_path = self._config.base
        settings.inference_mode = True
        settings.save_pretrained(folder)
        tensors = peft.get_peft_model_state_dict(self._model, state_dict=dict(snapshot.parameters), save_embedding_layers=False)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})

    def _whole_state(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        frozen = {name: tensor for name, tensor in self._base.model.state_dict().items() if name not in snapshot.parameters}
        if any(tensor.numel() == 0 for tensor in frozen.values()):
            raise ConfigError(
                "train.full",
                found=f"deepspeed stage 3 with frozen parts ({', '.join(self._config.full)} are tuned)",
                expected="all parts tuned, or stage 2",
                fix="A checkpoint of the whole model cannot be gathered otherwise.",
            )
        return {**frozen, **snapshot.parameters}

    def finish(self, state: TrainState) -> None:
        """Rank 0: the newest checkpoint's adapter as `adapter/`, and the last event."""
        if self._session.rank:
            return
        last = min(self.num_steps, self._config.max_steps or self.num_steps)
        step = self._checkpoints.newest_whole()
        if step is not None and step == state.step:
            self._checkpoints.publish_adapter(step)
        self.log({"event": "finished", "step": state.step, "complete": state.step >= last, "tokens": state.tokens})

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def free_bytes(device: torch.device) -> float | None:
    """Memory that a step may take on this device; None where nothing says so."""
    if device.type == "cuda":
        return USABLE_SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return USABLE_SHARE * 1024 * found["MemAvailable"] if "MemAvailable" in found else None


def _stage(config: TrainConfig) -> int:
    from boxcar.train.running.zero import deepspeed_config  # noqa: PLC0415

    assert config.deepspeed is not None, "asked only where there is such a section"
    settings = deepspeed_config(config.deepspeed, max_grad_norm=config.max_grad_norm, bf16=config.precision == "bf16", world_size=1)
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def versions() -> dict[str, str]:
    """What this process runs on."""
    import peft  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    found = {"python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__}
    found |= {"peft": peft.__version__, "host": platform.node(), "cuda": str(torch.version.cuda)}
    return found
