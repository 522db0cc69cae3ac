"""The loop: the same losses whatever the accumulation, the ranks, the packing, the strategy; stopping and going on changes nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from boxcar.schemas.errors import TrainingError
from tests.train.worlds import Result, Setting, run_alone, run_together, trainer_of


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One process, one sample a forward pass."""
    return run_alone(Setting(), tmp_path_factory.mktemp("reference"))


def _assert_same(found: Result, expected: Result, tolerance: float = 2e-5) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=100 * tolerance)


def test_the_loss_falls_on_samples_that_come_again(tmp_path: Path) -> None:
    rates = {"language": 5e-3, "merger": 5e-3, "vision": 5e-3, "warmup": 0.05, "schedule": "constant"}
    options = {"learning_rate": rates, "checkpoint_every_steps": 1000}
    trainer, world = trainer_of(Setting(num_steps=20, global_batch=2, options=options), tmp_path)
    same = world._batches(0)
    world._batches = lambda _: same  # type: ignore[method-assign,assignment]
    trainer.run()
    losses = [event["loss"] for event in world.events if event["event"] == "step"]
    assert len(losses) == 20
    assert max(losses[-5:]) < 0.85 * losses[0], "a rank of 4 beside a frozen random network cannot do much more"


def test_the_losses_of_different_samples_differ(reference: Result) -> None:
    assert len(set(reference.losses)) == len(reference.losses) == 4
    assert all(map(math.isfinite, reference.losses + reference.norms))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(micro_batch=2),
        Setting(micro_batch=6),
        Setting(docs_per_pack=3),
        Setting(docs_per_pack=2, micro_batch=2),
        Setting(packing="padded", micro_batch=3),
        Setting(packing="padded"),
    ],
    ids=["accumulation of 3", "no accumulation", "packs of 3", "packs and accumulation", "padded", "padded one by one"],
)
def test_accumulation_and_packing_change_nothing(setting: Setting, reference: Result, tmp_path: Path) -> None:
    _assert_same(run_alone(setting, tmp_path), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "stage", "recompute"),
    [(2, 0, False), (3, 0, False), (2, 1, False), (2, 2, False), (2, 3, False), (2, 0, True), (2, 2, True), (2, 3, True)],
    ids=["ddp 2", "ddp 3", "zero 1", "zero 2", "zero 3", "ddp recomputed", "zero 2 recomputed", "zero 3 recomputed"],
)
def test_ranks_and_strategies_change_nothing(world_size: int, stage: int, recompute: bool, reference: Result, tmp_path: Path) -> None:
    if stage:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    _assert_same(run_together(Setting(stage=stage, recompute=recompute), tmp_path, world_size), reference)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "recompute"), [(0, False), (2, False), (3, False), (3, True)], ids=str)
def test_ranks_may_have_different_work(stage: int, recompute: bool, tmp_path: Path) -> None:
    """Three packs on two ranks: one has nothing but a blank image in its second pass. And labels fill different numbers of chunks."""
    if stage:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    unequal = Setting(global_batch=3, num_steps=3, options={"loss": {"chunk_tokens": 4}})
    expected = run_alone(unequal, tmp_path / "alone")
    _assert_same(run_together(replace(unequal, stage=stage, recompute=recompute), tmp_path, 2), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_going_on_from_a_checkpoint_is_the_run_without_a_stop(stop_after: int, dropout: float, tmp_path: Path) -> None:
    whole = run_alone(Setting(dropout=dropout), tmp_path / "whole")
    first = run_alone(Setting(dropout=dropout, stop_after=stop_after), tmp_path / "first")
    second = run_alone(Setting(dropout=dropout, start=first.last), tmp_path / "second")
    assert first.losses + second.losses == whole.losses
    assert whole.last is not None
    assert second.last is not None
    for name, tensor in whole.last.parameters.items():
        assert torch.equal(second.last.parameters[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 2), (2, 3)], ids=["ddp", "zero 2", "zero 3"])
def test_a_checkpoint_of_one_strategy_goes_on_under_another(world_size: int, stage: int, reference: Result, tmp_path: Path) -> None:
    if stage:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    first = run_together(Setting(stage=stage, stop_after=2), tmp_path, world_size)
    second = run_alone(Setting(start=first.last), tmp_path / "alone")
    assert first.losses + second.losses == pytest.approx(reference.losses, rel=2e-5)
    back = run_together(Setting(stage=stage, start=run_alone(Setting(stop_after=2), tmp_path / "again").last), tmp_path, world_size)
    assert back.losses == pytest.approx(reference.losses[2:], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "all")])
def test_waiting_in_host_memory_changes_nothing(stage: int, offload: str, reference: Result, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    setting = Setting(stage=stage, options={"deepspeed": {"stage": stage, "offload": offload}})
    first = run_together(replace(setting, stop_after=2), tmp_path, 2)
    second = run_together(replace(setting, start=first.last), tmp_path, 2)
    assert first.losses + second.losses == pytest.approx(reference.losses, rel=2e-5)


def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path: Path) -> None:
    trainer, world = trainer_of(Setting(), tmp_path)
    trainer.config = trainer.config.model_copy(update={"checkpoint_every_steps": 1})
    steps = world.steps

    def poisoned(first: int) -> Any:
        for number, step in enumerate(steps(first), start=first):
            if number == 2:
                for weight in trainer.strategy.trainable.values():
                    weight.data.fill_(float("nan"))
            yield step

    world.steps = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step 3: found a loss of nan at learning rates .*'language'.*last checkpoint is whole"):
        trainer.run()
    newest = world.newest()
    assert newest is not None
    assert newest.state.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in newest.parameters.values())


def test_weights_of_one_and_zero_equal_leaving_the_task_out(tmp_path: Path) -> None:
    """Through the whole loop: the second half of every step's documents weighs nothing."""
    results = []
    for masked in (False, True):
        setting = Setting(num_steps=2)
        trainer, world = trainer_of(setting, tmp_path / str(masked))
        steps = world.steps

        def weighed(first: int, steps: Any = steps, masked: bool = masked) -> Any:
            for step in steps(first):
                half = len(step.batches) // 2
                for batch in step.batches[half:]:
                    batch.label_weights.zero_()
                    object.__setattr__(batch, "weight", 0.0)
                yield step if not masked else type(step)(step.phase, step.batches[:half])

        world.steps = weighed  # type: ignore[method-assign]
        trainer.run()
        results.append([event["loss"] for event in world.events if event["event"] == "step"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_validation_stops_a_run_early_and_patience_survives_a_restart(tmp_path: Path) -> None:
    options = {
        "validation": {"shards": ["x"], "every_steps": 1, "early_stop": {"metric": "loss", "mode": "max", "patience": 2, "min_delta": 9.0}},
    }
    whole = run_alone(Setting(options=options), tmp_path / "whole")
    assert len(whole.losses) == 3, "the first validation is the best, two more are waited for"
    assert any(event["event"] == "early_stop" for event in whole.events)
    first = run_alone(Setting(options=options, stop_after=2), tmp_path / "first")
    assert first.last is not None
    assert first.last.state.early_stop["waited"] == 1
    second = run_alone(Setting(options=options, start=first.last), tmp_path / "second")
    assert len(second.losses) == 1


def test_validation_has_no_dropout_and_training_has_it_again(tmp_path: Path) -> None:
    trainer, world = trainer_of(Setting(dropout=0.9), tmp_path)
    trainer.run()  # adapters of zero would drop nothing
    batch = next(world.validation())
    first, second = (float(trainer.strategy.evaluate(batch).total) for _ in range(2))
    assert first == second
    trained = [float(trainer.strategy.forward_backward(batch, 1.0, last=True).total) for _ in range(2)]
    assert trained[0] != trained[1]


def test_a_rise_is_reported_with_rates_and_samples_and_rolled_back(tmp_path: Path) -> None:
    options = {
        "learning_rate": {"language": 1e-3, "schedule": "constant", "warmup": 0.0},
        "loss_watch": {"steps": 2, "factor": 1.01, "smoothing": 0.01, "roll_back": True, "max_roll_backs": 1},
    }
    setting = Setting(num_steps=6, parts=("language",), options=options)
    trainer, world = trainer_of(setting, tmp_path)
    steps = world.steps
    seen: list[int] = []

    def spoiled(first: int) -> Any:
        for number, step in enumerate(steps(first), start=first):
            if number == 3 and not seen:
                seen.append(number)
                for weight in trainer.strategy.trainable.values():
                    weight.data.normal_(std=3.0)
            yield step

    world.steps = spoiled  # type: ignore[method-assign]
    state = trainer.run()
    kinds = [event["event"] for event in world.events]
    assert "loss_rises" in kinds
    rise = next(event for event in world.events if event["event"] == "loss_rises")
    assert rise["learning_rates"] == {"learning_rate/language": 1e-3}
    assert rise["grad_norm"] > 0
    assert rise["hardest_samples"][0]["sample"].startswith("sample/")
    assert {"event": "rolled_back", "step": 3, "rate_scale": 0.5} in world.events
    assert state.step == 6
    assert state.rate_scale == 0.5
    rates = [event["learning_rate/language"] for event in world.events if event["event"] == "step"]
    assert rates[-1] == pytest.approx(5e-4)


def test_a_resting_part_does_not_move(tmp_path: Path) -> None:
    trainer, world = trainer_of(Setting(num_steps=2), tmp_path)
    before = {name: weight.detach().clone() for name, weight in trainer.strategy.trainable.items()}
    trainer.trainable_by_phase = [("merger",)]
    trainer.run()
    moved = {name for name, weight in trainer.strategy.trainable.items() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".merger." in name for name in moved)
    newest = world.newest()
    assert newest is not None
    assert all(".merger." in name for name in newest.optimizer), "no moments either"


def test_losses_are_told_apart_by_task_class_and_difficulty(reference: Result) -> None:
    step = next(event for event in reference.events if event["event"] == "step")
    names = {name for name in step if name.startswith("loss/")}
    assert {"loss/detect/words", "loss/detect/coordinates", "loss/difficulty/0", "loss/difficulty/3"} <= names
    assert step["tokens_per_second"] > 0


class _OnceTooLittle:
    """A strategy whose third pass finds no memory, once."""

    def __init__(self, strategy: Any) -> None:
        self._strategy, self._passes = strategy, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def forward_backward(self, batch: Any, scale: float, *, last: bool) -> Any:
        self._passes += 1
        if self._passes == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return self._strategy.forward_backward(batch, scale, last=last)


def test_out_of_memory_is_answered_once_by_recomputing_more(reference: Result, tmp_path: Path) -> None:
    trainer, world = trainer_of(Setting(dropout=0.0), tmp_path)
    trainer.strategy = _OnceTooLittle(trainer.strategy)
    trainer.run()
    steps = [event for event in world.events if event["event"] == "step"]
    assert [event["step"] for event in world.events if event["event"] == "out_of_memory"] == [2], "the ninth pass is of the second step"
    assert world.recomputes
    assert [event["loss"] for event in steps] == pytest.approx(reference.losses, rel=2e-5)
    assert [event["grad_norm"] for event in steps] == pytest.approx(reference.norms, rel=2e-3)


@pytest.mark.parametrize("setting", [Setting(recompute=True), Setting(options={"gradient_checkpointing": False})], ids=["again", "said no"])
def test_out_of_memory_that_cannot_be_answered_names_the_way_out(setting: Setting, tmp_path: Path) -> None:
    trainer, _ = trainer_of(setting, tmp_path)
    trainer.strategy = _OnceTooLittle(trainer.strategy)
    with pytest.raises(
        TrainingError, match=r"step 2: found too little memory on cpu .*CUDA out of memory\. Tried.*gradient_checkpointing=true"
    ):
        trainer.run()
