"""DeepSpeed ZeRO behind the loop's `Strategy`: optimizer states (1), gradients (2) and parameters (3) are cut over the ranks.

The engine runs the micro-batches; what a step is, how it is weighed and what a checkpoint holds stay with the loop. Checkpoints are whole
tensors by parameter name, as with DDP, so that a run may change its stage or its number of ranks.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from boxcar.schemas.errors import ConfigError
from boxcar.train.running.strategy import MOMENTS, Tensors

if TYPE_CHECKING:
    from boxcar.schemas.training import DeepspeedConfig, TrainConfig
    from boxcar.train.data.collate import MicroBatch
    from boxcar.train.network.objective import BatchLoss

_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""The plan decides these; DeepSpeed is told that every micro-batch is one of its own."""


def deepspeed_config(config: "DeepspeedConfig", *, max_grad_norm: float, bf16: bool, world_size: int) -> dict[str, Any]:
    """The JSON that DeepSpeed gets: a user's own file, or one for the stage. Raises ConfigError where the file cannot be used."""
    if config.config:
        settings = {"gradient_clipping": max_grad_norm, "bf16": {"enabled": bf16}} | _read(Path(config.config))
    else:
        zero: dict[str, Any] = {"stage": config.stage, "overlap_comm": bf16, "contiguous_gradients": True}
        if config.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if config.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        settings = {"zero_optimization": zero, "gradient_clipping": max_grad_norm, "bf16": {"enabled": bf16}}
    for key in _OURS:
        settings.pop(key, None)
    settings.pop("optimizer", None)
    settings.pop("scheduler", None)
    return settings | {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("train.deepspeed.config", found=f"{path}: {error}", expected="a DeepSpeed JSON file") from error
    if not isinstance(settings, dict):
        raise ConfigError("train.deepspeed.config", found=f"{path}: {type(settings).__name__}", expected="a JSON object")
    settings = _without_auto(settings)
    if settings.pop("fp16", {}).get("enabled"):
        raise ConfigError(
            "train.deepspeed.config", found=f"{path}: fp16", expected="bf16 or fp32", fix='Write "bf16": {"enabled": true} instead.'
        )
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(
            "train.deepspeed.config",
            found=f"{path}: zero_optimization.stage {zero.get('stage')}",
            expected="1, 2 or 3",
            fix="Without a `deepspeed` section the run uses DistributedDataParallel, which is what stage 0 is.",
        )
    if zero.get("round_robin_gradients"):
        # deepspeed 0.19 looks for a parameter's piece in the order before it dealt them out, and hands back pieces of others.
        raise ConfigError(
            "train.deepspeed.config",
            found=f"{path}: round_robin_gradients",
            expected="an order in which parameters can be read back for a checkpoint",
            fix="Leave that key out.",
        )
    return settings


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """A file as transformers takes it, without what it leaves to the trainer: ours comes in, or DeepSpeed's own default."""
    inner = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in settings.items() if value != "auto"}
    return {key: value for key, value in inner.items() if value or not settings[key]}  # {"enabled": "auto"} is as if it were not there


class ZeroStrategy:
    """A DeepSpeed engine."""

    def __init__(
        self, module: nn.Module, model: nn.Module, groups: list[dict[str, Any]], config: "TrainConfig", device: torch.device
    ) -> None:
        assert config.deepspeed is not None, "the caller chose this strategy by that section"
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed  # noqa: PLC0415  (an extra; compiles nothing until a device op is used)
        except ImportError as error:
            raise ConfigError(
                "train.deepspeed", found="a section, but no deepspeed installed", expected="that package", fix="pip install deepspeed"
            ) from error
        if device.type == "cpu":
            # Its shared-memory collective is compiled for over a minute at start, and gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        from deepspeed import utils  # noqa: PLC0415

        self._utils = utils
        self._gathered = deepspeed.zero.GatheredParameters
        self.trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        settings = deepspeed_config(
            config.deepspeed,
            max_grad_norm=config.max_grad_norm,
            bf16=config.precision == "bf16",
            world_size=distributed.get_world_size(),
        )
        self.through_module = int(settings.get("zero_optimization", {}).get("stage", 0)) == 3
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.adam_betas)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
        self._optimizer = optimizer

    def forward_backward(self, batch: "MicroBatch", scale: float, *, last: bool) -> "BatchLoss":
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        loss: BatchLoss = self._engine(batch)
        self._engine.backward(loss.total * scale, scale_wrt_gas=False)
        return loss

    def evaluate(self, batch: "MicroBatch") -> "BatchLoss":
        self._engine.eval()  # no dropout
        with torch.no_grad():
            loss: BatchLoss = self._engine(batch)
        self._engine.train()
        return loss

    def set_rates(self, rates: dict[str, float]) -> None:
        """A resting part has the rate 0: its weights stay, its moments move (gradients of one flat partition cannot be left out)."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rates.get(group["part"], 0.0)

    def clear(self) -> None:
        self._engine.optimizer.zero_grad()

    def step(self) -> float:
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def parameters(self) -> Tensors:
        return self._whole(dict.fromkeys(self.trainable, self._utils.safe_get_full_fp32_param), "{}")

    def optimizer_state(self) -> Tensors:
        state: Tensors = {}
        if not self._states():
            return state
        self._link()
        for moment in MOMENTS:

            def read(parameter: nn.Parameter, moment: str = moment) -> torch.Tensor:
                tensor: torch.Tensor = self._utils.safe_get_full_optimizer_state(parameter, moment)
                return tensor

            state |= self._whole(dict.fromkeys(self.trainable, read), f"{{}}/{moment}")
        if state:
            state |= {f"{name}/step": torch.tensor(float(self._updates())) for name in self.trainable}
        return state

    def _whole(self, read: dict[str, Any], key: str) -> Tensors:
        """Gather, a tensor at a time, and keep on rank 0."""
        found: Tensors = {}
        for name, parameter in self.trainable.items():
            tensor = read[name](parameter)
            if tensor is not None and distributed.get_rank() == 0:
                found[key.format(name)] = tensor.detach().float().cpu().clone()
        return found

    def load(self, parameters: Tensors, optimizer_state: Tensors) -> None:
        updates = 0.0
        if optimizer_state:
            self._make_states()
        for name, parameter in self.trainable.items():
            self._utils.safe_set_full_fp32_param(parameter, parameters[name])
            with self._gathered([parameter], modifier_rank=0), torch.no_grad():  # the copy that is computed with, beside the master
                parameter.copy_(parameters[name])
            for moment in MOMENTS:
                if (value := optimizer_state.get(f"{name}/{moment}")) is not None:
                    self._utils.safe_set_full_optimizer_state(parameter, value, moment)
                    updates = float(optimizer_state[f"{name}/step"])
        self._set_updates(updates)

    def _make_states(self) -> None:
        """Moments of zero, as AdamW makes them at its first step: DeepSpeed can only set what is there."""
        for flat in self._partitions():
            if not self._optimizer.state[flat]:
                zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                self._optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
        self._link()

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat pieces of the master weights, which the optimizer's state is kept by."""
        if self.through_module:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def _link(self) -> None:
        """Stages 1 and 2 connect parameters with their moments after the first step of the *first* group, when the others have none yet
        (deepspeed 0.19): connect them again."""
        if not self.through_module:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _states(self) -> list[dict[str, Any]]:
        return [state for state in self._optimizer.state.values() if "step" in state]

    def _updates(self) -> float:
        """Updates made, which AdamW's bias correction counts."""
        return max((float(state["step"]) for state in self._states()), default=0.0)

    def _set_updates(self, updates: float) -> None:
        for state in self._states():
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(updates)
            else:
                state["step"] = updates
