"""How gradients and steps are shared between ranks: one process or DistributedDataParallel here, DeepSpeed in `zero.py`.

A strategy is thin: the loop decides what a step is, the strategy runs it. Both name parameters and optimizer state as the unwrapped model
does, so that a checkpoint of one fits the other, at any number of ranks.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from boxcar.train.network.ranks import is_distributed

if TYPE_CHECKING:
    from boxcar.schemas.training import TrainConfig
    from boxcar.train.data.collate import MicroBatch
    from boxcar.train.network.objective import BatchLoss

MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]


class Strategy(Protocol):
    """What the loop asks for. Calls are collective: every rank makes them, in the same order."""

    trainable: dict[str, nn.Parameter]
    """By name in the unwrapped model."""
    through_module: bool
    """Weights exist only around their module's forward (ZeRO-3)."""

    def forward_backward(self, batch: "MicroBatch", scale: float, *, last: bool) -> "BatchLoss":
        """Loss of a micro-batch, and the gradient of `scale` times its sum. `last`: of the step; the ranks' gradients meet then."""

    def evaluate(self, batch: "MicroBatch") -> "BatchLoss":
        """The same without gradients."""

    def set_rates(self, rates: dict[str, float]) -> None:
        """Learning rate of each part; a part without one rests: it takes no step."""

    def clear(self) -> None:
        """Forget the gradients of a step that was not taken."""

    def step(self) -> float:
        """Clip, step, clear. Returns the norm of the gradient before clipping, over all ranks."""

    def parameters(self) -> Tensors:
        """Trainable parameters in full, on the host, in float32 where a master copy is kept; {} on other ranks than 0."""

    def optimizer_state(self) -> Tensors:
        """ "name/exp_avg", "name/exp_avg_sq" and "steps" (updates made); {} on other ranks than 0."""

    def load(self, parameters: Tensors, optimizer_state: Tensors) -> None:
        """What `parameters` and `optimizer_state` gave, on every rank."""


class PlainStrategy:
    """AdamW on one device, or under DistributedDataParallel."""

    through_module = False

    def __init__(
        self, module: nn.Module, model: nn.Module, groups: list[dict[str, Any]], config: "TrainConfig", device: torch.device
    ) -> None:
        """module: what is called; model: the network within it that names the parameters."""
        self.trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._plain = self._module = module
        if is_distributed():
            self._module = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.adam_betas, fused=device.type == "cuda")
        self._max_norm = config.max_grad_norm
        self._resting: list[nn.Parameter] = []

    def forward_backward(self, batch: "MicroBatch", scale: float, *, last: bool) -> "BatchLoss":
        parallel = isinstance(self._module, DistributedDataParallel)
        with self._module.no_sync() if parallel and not last else nullcontext():  # type: ignore[operator, unused-ignore]
            loss: BatchLoss = self._module(batch)
            (loss.total * scale).backward()
        return loss

    def evaluate(self, batch: "MicroBatch") -> "BatchLoss":
        self._plain.eval()  # no dropout
        with torch.no_grad():
            loss: BatchLoss = self._plain(batch)
        self._plain.train()
        return loss

    def set_rates(self, rates: dict[str, float]) -> None:
        self._resting = []
        for group in self._optimizer.param_groups:
            group["lr"] = rates.get(group["part"], 0.0)
            if group["part"] not in rates:
                self._resting += group["params"]

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        for parameter in self._resting:
            parameter.grad = None  # AdamW passes over it: neither the weights nor their moments move
        moving = [parameter for parameter in self.trainable.values() if parameter.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(moving, self._max_norm))
        if torch.isfinite(torch.tensor(norm)):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def parameters(self) -> Tensors:
        return {} if _rank() else {name: parameter.detach().cpu().clone() for name, parameter in self.trainable.items()}

    def optimizer_state(self) -> Tensors:
        if _rank():
            return {}
        state: Tensors = {}
        for name, parameter in self.trainable.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value.detach().cpu().clone()
        return state

    def load(self, parameters: Tensors, optimizer_state: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(parameters[name])
                moments = {key: optimizer_state[f"{name}/{key}"] for key in ("step", *MOMENTS) if f"{name}/{key}" in optimizer_state}
                if moments:
                    self._optimizer.state[parameter] = {
                        key: value.clone()
                        if key == "step" and not self._optimizer.defaults["fused"]
                        else value.to(parameter.device).clone()
                        for key, value in moments.items()
                    }


def _rank() -> int:
    return distributed.get_rank() if is_distributed() else 0
