"""The other side of the GPU bench: transformers' own Trainer with peft, samples padded to the longest of their batch."""

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

# The name changed between transformers 5.17 and 5.23.
_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
)


class _Laps(TrainerCallback):  # type: ignore[misc]
    """When each step ended, all of its work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ends.append(time.perf_counter())


def train_padded(
    model: Any, batches: Sequence[dict[str, Any]], device: torch.device, *, checkpointing: bool, learning_rate: float, seed: int
) -> tuple[list[float], list[float]]:
    """Train on these batches, in order, one an optimizer step. Returns (seconds, loss) of each step; the first one's seconds are of no use.

    Batches are made beforehand, as those of our loop are: neither side is charged for decoding or collating.
    """
    laps = _Laps(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # an item is a whole batch
            max_steps=len(batches),
            train_sampling_strategy="sequential",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
            bf16=True,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            logging_steps=1,  # ours reads its loss at every step, too
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
            **{_CHECKPOINTING: checkpointing},
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=list(batches), data_collator=_first, callbacks=[laps])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [float("nan")] + [end - start for start, end in zip(laps.ends, laps.ends[1:], strict=False)], losses


def _first(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]
