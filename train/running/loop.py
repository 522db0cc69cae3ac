"""What one worker does, top to bottom. Plain torch: no Ray, no trainer, nothing hidden.

    restore the last good checkpoint
    for each step of the plan, from where the run stands:
        W = sum of label weights of the step, over all ranks
        for each micro-batch of this rank:  gradient of  loss_sum / W
        clip, step, log, watch; now and then validate and save

A step is a slice of the plan, so where a run stands is one number, and any number of ranks may go on from it.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed

from boxcar.schemas.errors import TrainingError
from boxcar.train.data.documents import NUM_GROUPS, group_name, group_quartile
from boxcar.train.network.model_shape import ModelShape
from boxcar.train.network.objective import BatchLoss
from boxcar.train.network.ranks import is_distributed, sum_over_ranks
from boxcar.train.running.checkpoint import Snapshot, TrainState
from boxcar.train.running.schedule import EarlyStop, LossWatch, rate_factor
from boxcar.train.running.strategy import Strategy

if TYPE_CHECKING:
    from boxcar.schemas.training import NetworkPart, TrainConfig
    from boxcar.train.data.collate import MicroBatch

NUM_NAMED_SAMPLES = 5


@dataclass(frozen=True)
class Step:
    """One optimizer step of the plan, as this rank sees it."""

    phase: int
    batches: "list[MicroBatch]"
    """As many on every rank; a rank without work has batches of weight 0."""


class Surroundings(Protocol):
    """What the loop needs of the world around it: the plan, a place for checkpoints, an ear for metrics."""

    num_steps: int
    """Of the whole run."""

    def steps(self, first: int) -> Iterator[Step]:
        """The steps of the run from number `first` on."""

    def validation(self) -> "Iterator[MicroBatch] | None":
        """This rank's part of the fixed validation slice."""

    def save(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """Publish a checkpoint; collective. Only rank 0's snapshot holds tensors."""

    def newest(self, not_after: int | None = None) -> Snapshot | None:
        """The newest checkpoint that is whole (of a step <= not_after); the same on every rank."""

    def measure(self) -> dict[str, float]:
        """Box metrics of generated replies to a fixed slice, by name; {} where none are asked for. Collective, the same on all ranks."""

    def log(self, event: dict[str, Any]) -> None:
        """Rank 0: one event, ready for JSON."""

    def recompute_more(self) -> bool:
        """After an out-of-memory error: recompute the activations of every layer. False: they are already."""

    def endangered(self) -> bool:
        """Whether a worker is about to be taken away, said once for each such notice; the loop then saves and goes on."""

    def stopping(self) -> bool:
        """Whether this worker was told to end; the loop then saves and ends."""


@dataclass
class Trainer:
    """The parts of a run on one rank."""

    config: "TrainConfig"
    strategy: Strategy
    around: Surroundings
    device: torch.device
    shape: ModelShape
    trainable_by_phase: "list[tuple[NetworkPart, ...]]"
    peak_flops: float | None = None
    world_size: int = 1

    def run(self) -> TrainState:
        """Train from the newest checkpoint to the end of the plan. Raises TrainingError where the loss is not a number."""
        state = self._restore(None)
        while True:
            back_to = self._run_from(state)
            if back_to is None:
                return state
            scale = state.rate_scale / 2
            state = self._restore(back_to)
            state.rate_scale = scale
            self.around.log({"event": "rolled_back", "step": state.step, "rate_scale": scale})

    def _run_from(self, state: TrainState) -> int | None:
        """Train on. Returns the step to go back to where the loss watch asks for it, else None at the end."""
        last = min(self.around.num_steps, self.config.max_steps or self.around.num_steps)
        watch, early_stop = LossWatch.of(state.watch), EarlyStop(**state.early_stop)
        clock = _Clock()
        if state.step >= last:
            return None
        for step in self.around.steps(state.step):
            metrics = self._step(step, state, clock)
            state.step += 1
            done = state.step == last
            risen = watch.see(state.step, _by_quartile(metrics), self.config.loss_watch)
            state.watch = watch.state()
            if risen:
                back_to = self._warn(risen, metrics, state)
                if back_to is not None:
                    return back_to
            metrics |= self._validate(state, done)
            if self._should_stop(metrics, early_stop, state):
                self.around.log({"event": "early_stop", "step": state.step, **state.early_stop})
                done = True
            if state.step % self.config.log_every_steps == 0 or done or "validation/loss" in metrics:
                self.around.log({"event": "step", **_public(metrics), "step": state.step, "tokens": state.tokens})
            endangered, stopping = self._anyone(self.around.endangered(), self.around.stopping())
            if endangered or stopping:
                self.around.log({"event": "stopping" if stopping else "endangered", "step": state.step})
            if done or endangered or stopping or state.step % self.config.checkpoint_every_steps == 0:
                self._save(state, metrics)
                clock.restart()
            if done or stopping:
                return None
        return None

    # ---- a step

    def _step(self, step: Step, state: TrainState, clock: "_Clock") -> dict[str, Any]:
        for batch in step.batches:
            self._check_ids(batch)
        batches = [batch.to(self.device, non_blocking=True) for batch in step.batches]
        weight = float(sum_over_ranks(torch.tensor(sum(batch.weight for batch in batches), dtype=torch.float64, device=self.device)))
        factor = rate_factor(state.step, self.around.num_steps, self.config.learning_rate) * state.rate_scale
        rates: dict[str, float] = {part: getattr(self.config.learning_rate, part) * factor for part in self.trainable_by_phase[step.phase]}
        self.strategy.set_rates(rates)
        try:
            table, outputs = self._passes(batches, weight, state)
        except torch.OutOfMemoryError as error:
            self._after_out_of_memory(error, batches, state)
            table, outputs = self._passes(batches, weight, state)
        counts = torch.tensor(
            [
                sum(batch.num_useful_tokens for batch in batches),
                sum(batch.num_dropped for batch in batches),
                sum(map(self.shape.of_batch, batches)),
            ],
            dtype=torch.float64,
            device=self.device,
        )
        everything = sum_over_ranks(torch.cat([table.flatten(), counts])).tolist()  # one exchange, and the only wait for the device
        sums, (tokens, dropped, flops) = everything[: table.numel()], everything[table.numel() :]
        loss = sums[-2] / weight if weight else 0.0
        if not math.isfinite(loss):
            raise self._not_a_number("loss", loss, state, batches, rates)
        norm = self.strategy.step()
        if not math.isfinite(norm):
            raise self._not_a_number("gradient norm", norm, state, batches, rates)
        state.tokens += int(tokens)
        seconds = clock.lap()
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": norm, "step_tokens": int(tokens), "seconds": seconds, "phase": step.phase}
        metrics |= {f"learning_rate/{part}": rate for part, rate in rates.items()}
        metrics |= _group_losses(sums)
        metrics["tokens_per_second"] = tokens / seconds
        if self.peak_flops:
            metrics["mfu"] = flops / seconds / (self.peak_flops * self.world_size)
        if dropped:
            metrics["dropped_samples"] = int(dropped)
            self.around.log({"event": "dropped", "step": state.step, "samples": self._all([s for b in batches for s in b.dropped])})
        metrics["_worst"] = lambda: self._all(_worst_samples(batches, outputs))
        return metrics

    def _passes(self, batches: "list[MicroBatch]", weight: float, state: TrainState) -> tuple[torch.Tensor, list[BatchLoss]]:
        """Forward and backward of a step's batches: (sums and counts of losses by group, and of all; what each batch gave)."""
        torch.manual_seed(_seed_of(self.config.seed, state.step, _rank()))  # dropout: a function of the step, so that resuming is exact
        table = torch.zeros(NUM_GROUPS + 1, 2, dtype=torch.float64, device=self.device)
        outputs: list[BatchLoss] = []
        for number, batch in enumerate(batches):
            scale = self.world_size / weight if weight else 0.0
            output = self.strategy.forward_backward(batch, scale, last=number == len(batches) - 1)
            table[:-1, 0].index_add_(0, output.groups, output.losses.double())
            table[:-1, 1].index_add_(0, output.groups, torch.ones_like(output.losses, dtype=torch.float64))
            table[-1, 0] += output.total.detach().double()
            outputs.append(BatchLoss(output.total.detach(), output.losses, output.groups, output.places))
        return table, outputs

    def _after_out_of_memory(self, error: torch.OutOfMemoryError, batches: "list[MicroBatch]", state: TrainState) -> None:
        """Recompute more, and forget the gradients of the step that failed. Raises TrainingError where nothing more can be saved, or other
        ranks are in the middle of the step."""
        tokens = max(batch.num_useful_tokens for batch in batches)
        if self.config.gradient_checkpointing != "auto" or self.config.deepspeed or self.world_size > 1 or not self.around.recompute_more():
            raise TrainingError(
                f"step {state.step + 1}",
                found=f"too little memory on {self.device} for a pass of {tokens:,} tokens ({str(error).splitlines()[0]})",
                expected="enough for one pass",
                fix="Set gradient_checkpointing=true, or lower cutoff_len, micro_batch or loss.chunk_tokens. --resume goes on from the "
                "last checkpoint.",
            ) from error
        self.strategy.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.around.log({"event": "out_of_memory", "step": state.step + 1})

    def _check_ids(self, batch: "MicroBatch") -> None:
        """On the host, before the device would fail without saying why."""
        if (largest := int(batch.input_ids.max())) >= self.shape.vocabulary:
            raise TrainingError(
                f"samples {', '.join(batch.sample_ids[:NUM_NAMED_SAMPLES])}",
                found=f"token id {largest}",
                expected=f"ids below {self.shape.vocabulary}, the base's vocabulary",
                fix="Base and tokenizer are not of one model: convert with the base's own tokenizer.",
            )

    def _not_a_number(
        self, what: str, value: float, state: TrainState, batches: "list[MicroBatch]", rates: dict[str, float]
    ) -> TrainingError:
        names = [name for batch in batches for name in batch.sample_ids][:NUM_NAMED_SAMPLES]
        return TrainingError(
            f"step {state.step + 1}",
            found=f"a {what} of {value} at learning rates {rates}",
            expected="a finite number",
            fix=f"No step was taken, and the last checkpoint is whole. Samples of the step on rank {_rank()}: {', '.join(names)}. "
            "Look at them with `boxcar show`; a lower learning rate, a longer warm-up or precision=fp32 may help.",
        )

    # ---- now and then

    def _warn(self, risen: tuple[str, int], metrics: dict[str, Any], state: TrainState) -> int | None:
        name, since = risen
        event = {
            "event": "loss_rises",
            "step": state.step,
            "difficulty_bin": name,
            "since_step": since,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "learning_rates": {key: value for key, value in metrics.items() if key.startswith("learning_rate/")},
            "hardest_samples": metrics["_worst"](),
        }
        self.around.log(event)
        if not self.config.loss_watch.roll_back or state.rate_scale <= 2.0**-self.config.loss_watch.max_roll_backs:
            return None
        if self.around.newest(since) is None:
            self.around.log({"event": "no_checkpoint_before_the_rise", "step": state.step, "since_step": since})
            return None
        return since

    def _validate(self, state: TrainState, done: bool) -> dict[str, float]:
        config = self.config.validation
        if config is None or not (done or state.step % config.every_steps == 0):
            return {}
        batches = self.around.validation()
        assert batches is not None, "a run with a validation section has a validation slice"
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            output = self.strategy.evaluate(batch.to(self.device, non_blocking=True))
            sums += torch.tensor([float(output.total), batch.weight], dtype=torch.float64, device=self.device)
        total, weight = sum_over_ranks(sums).tolist()
        measured = {"loss": total / weight if weight else math.nan} | self.around.measure()
        if config.generate:
            self._watch_tasks(measured, config.generate.alarm_drop, state)
        return {f"validation/{name}": value for name, value in measured.items()}

    def _watch_tasks(self, measured: dict[str, float], drop: float, state: TrainState) -> None:
        for name, value in measured.items():
            if name.startswith("mean_iou/"):
                best = state.task_best[name] = max(value, state.task_best.get(name, value))
                if value < best - drop:
                    self.around.log({"event": "task_falls", "step": state.step, "metric": name, "value": value, "best": best})

    def _should_stop(self, metrics: dict[str, Any], early_stop: EarlyStop, state: TrainState) -> bool:
        validation = self.config.validation
        if validation is None or validation.early_stop is None or "validation/loss" not in metrics:
            return False
        name = f"validation/{validation.early_stop.metric}"
        if name not in metrics:
            raise TrainingError(
                "train.validation.early_stop.metric",
                found=f"{validation.early_stop.metric!r}, which this validation does not measure",
                expected=f"one of {', '.join(sorted(key.removeprefix('validation/') for key in metrics if key.startswith('validation/')))}",
                fix="The validation shards must hold turns of that task.",
            )
        stop = early_stop.see(metrics[name], validation.early_stop)
        state.early_stop = {"best": early_stop.best, "waited": early_stop.waited}
        return stop

    def _save(self, state: TrainState, metrics: dict[str, Any]) -> None:
        parameters, optimizer = self.strategy.parameters(), self.strategy.optimizer_state()
        self.around.save(Snapshot(state, parameters, optimizer), _public(metrics))

    def _restore(self, not_after: int | None) -> TrainState:
        snapshot = self.around.newest(not_after)
        state = TrainState() if snapshot is None else snapshot.state
        if snapshot is not None:
            self.strategy.load(snapshot.parameters, snapshot.optimizer)
        self.around.log({"event": "resumed", "step": state.step})
        return state

    def _anyone(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if not is_distributed():
            return list(flags)
        return [bool(count) for count in sum_over_ranks(torch.tensor(flags, dtype=torch.float64, device=self.device)).tolist()]

    def _all(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, in rank order; on every rank."""
        if not is_distributed():
            return items
        gathered: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]


class _Clock:
    """Seconds between steps, without what checkpoints took."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return max(seconds, 1e-9)


def _rank() -> int:
    return distributed.get_rank() if is_distributed() else 0


def _seed_of(seed: int, step: int, rank: int) -> int:
    return hash((seed, step, rank)) & (2**63 - 1)  # of integers: the same in every process


def _group_losses(sums: list[float]) -> dict[str, float]:
    """Mean cross-entropy by task and token class, and by difficulty quartile."""
    totals: dict[str, list[float]] = {}
    for group in range(NUM_GROUPS):
        for name in (group_name(group), f"difficulty/{group_quartile(group)}"):
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0] += sums[2 * group]
            entry[1] += sums[2 * group + 1]
    return {f"loss/{name}": total / count for name, (total, count) in sorted(totals.items()) if count}


def _by_quartile(metrics: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/difficulty/")}


def _public(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("_")}


def _worst_samples(batches: "list[MicroBatch]", outputs: list[BatchLoss]) -> list[dict[str, Any]]:
    """The samples of this rank's step with the highest mean loss."""
    found: list[dict[str, Any]] = []
    for batch, output in zip(batches, outputs, strict=True):
        width = batch.input_ids.shape[1]
        for number, name in enumerate(batch.sample_ids):
            if batch.attention_mask is None:
                start, stop = batch.borders[number], batch.borders[number + 1]
            else:
                start, stop = number * width, (number + 1) * width
            mine = output.losses[(output.places >= start) & (output.places < stop)]
            if len(mine):
                found.append({"sample": name, "loss": float(mine.mean())})
    return sorted(found, key=lambda entry: -entry["loss"])[:NUM_NAMED_SAMPLES]
