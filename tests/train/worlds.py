"""The loop in small worlds: steps from memory, checkpoints in a dictionary, any number of processes."""

import copy
import faulthandler
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from boxcar.schemas.training import LoraConfig, TrainConfig
from boxcar.train.data.collate import MicroBatch
from boxcar.train.network import flops
from boxcar.train.network.model import attach_lora, parameter_groups, recompute_activations
from boxcar.train.network.objective import Objective
from boxcar.train.planning.plan_table import rank_packs
from boxcar.train.running.checkpoint import Snapshot
from boxcar.train.running.loop import Step, Trainer
from boxcar.train.running.strategy import PlainStrategy, Strategy
from boxcar.train.running.zero import ZeroStrategy
from tests.train.tiny import blank_of, packed_batch, padded_batch, random_document, tiny_base

MAX_SECONDS = 300
"""For ranks to end; they take some ten."""
LAYOUTS: list[list[tuple[int, int]]] = [[(2, 2)], [], [(1, 3), (2, 1)], [(3, 2)], []]


@dataclass
class Setting:
    """What differs between two worlds that must come to the same result."""

    family: str = "qwen2_5_vl"
    micro_batch: int = 1
    packing: str = "packed"
    docs_per_pack: int = 1
    global_batch: int = 6
    num_steps: int = 4
    stop_after: int | None = None
    stage: int = 0
    dropout: float = 0.0
    recompute: bool = False
    parts: tuple[str, ...] = ("language", "merger", "vision")
    options: dict[str, Any] = field(default_factory=dict)
    start: Snapshot | None = None

    def config(self) -> TrainConfig:
        options: dict[str, Any] = {
            "output": "unused",
            "packing": self.packing,
            "precision": "fp32",
            "lora": {"rank": 4, "parts": self.parts, "dropout": self.dropout},
            "learning_rate": {"language": 1e-2, "merger": 1e-2, "vision": 1e-2, "warmup": 0.25},
            "loss": {"chunk_tokens": 16},
            "checkpoint_every_steps": 1,
            "max_steps": self.stop_after,
        }
        if self.stage:
            options["deepspeed"] = {"stage": self.stage}
        return TrainConfig.model_validate(options | self.options)


class World:
    """Surroundings in memory."""

    def __init__(self, setting: Setting, base: Any, rank: int, world_size: int) -> None:
        self.setting, self.rank, self.world_size = setting, rank, world_size
        self.num_steps = setting.num_steps
        self.base = base
        self.events: list[dict[str, Any]] = []
        self.saved: dict[int, Snapshot] = {} if setting.start is None else {setting.start.state.step: setting.start}
        self.recomputes = setting.recompute
        self.poison: int | None = setting.options.get("poison")

    def steps(self, first: int) -> Iterator[Step]:
        for step in range(first, self.num_steps):
            yield Step(0, self._batches(step))

    def _batches(self, step: int) -> list[MicroBatch]:
        setting = self.setting
        made = [
            random_document(self.base, step * 100 + number, LAYOUTS[number % len(LAYOUTS)], 4 + number)
            for number in range(setting.global_batch)
        ]
        size = setting.docs_per_pack
        packs = [made[start : start + size] for start in range(0, len(made), size)]
        mine = [packs[number] for number in rank_packs(0, len(packs), self.rank, self.world_size)]
        count = math.ceil(math.ceil(len(packs) / self.world_size) / setting.micro_batch)
        batches = []
        for number in range(count):
            documents = [one for pack in mine[number * setting.micro_batch : (number + 1) * setting.micro_batch] for one in pack]
            make = packed_batch if setting.packing == "packed" else padded_batch
            if not any(pixels for _, pixels in documents):
                blank, black = blank_of(self.base)
                documents.append((blank, [black]))
            batches.append(make([document for document, _ in documents], [pixels for _, pixels in documents]))
        return batches

    def validation(self) -> Iterator[MicroBatch]:
        yield from self._batches(10_000)

    def save(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        self.saved[snapshot.state.step] = copy.deepcopy(snapshot)

    def newest(self, not_after: int | None = None) -> Snapshot | None:
        steps = [step for step in self.saved if not_after is None or step <= not_after]
        return copy.deepcopy(self.saved[max(steps)]) if steps else None

    def log(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def measure(self) -> dict[str, float]:
        return {}

    def recompute_more(self) -> bool:
        if self.recomputes:
            return False
        self.recomputes = True
        recompute_activations(self.base, gathered_weights=False)
        return True

    def endangered(self) -> bool:
        return False

    def stopping(self) -> bool:
        return False


def trainer_of(setting: Setting, folder: Path, rank: int = 0, world_size: int = 1) -> tuple[Trainer, World]:
    config = setting.config()
    torch.manual_seed(0)
    base = tiny_base(folder / f"base-{rank}", setting.family, packed=setting.packing == "packed")
    model = attach_lora(base, LoraConfig(rank=4, parts=config.lora.parts, dropout=config.lora.dropout), seed=0)
    model.train()
    if setting.recompute:
        recompute_activations(base, gathered_weights=setting.stage == 3)
    objective = Objective(base, chunk_tokens=config.loss.chunk_tokens, autocast=None, through_module=setting.stage == 3)
    shape = flops.shape_of(base)
    groups = parameter_groups(model, base.family.network, 0.0)
    kind: Any = ZeroStrategy if setting.stage else PlainStrategy
    strategy: Strategy = kind(objective, model, groups, config, torch.device("cpu"))
    world = World(setting, base, rank, world_size)
    parts: Any = [config.lora.parts]
    return Trainer(config, strategy, world, torch.device("cpu"), shape, parts, None, world_size), world


@dataclass
class Result:
    losses: list[float]
    norms: list[float]
    events: list[dict[str, Any]]
    last: Snapshot | None


def _result(world: World) -> Result:
    steps = [event for event in world.events if event["event"] == "step"]
    return Result([event["loss"] for event in steps], [event["grad_norm"] for event in steps], world.events, world.newest())


def run_alone(setting: Setting, folder: Path) -> Result:
    trainer, world = trainer_of(setting, folder)
    trainer.run()
    return _result(world)


def run_together(setting: Setting, folder: Path, world_size: int) -> Result:
    """The same in several processes; what rank 0 saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    processes = [
        context.Process(target=_one_of, args=(setting, folder, rank, world_size, port, results), daemon=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=MAX_SECONDS)
    ends = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ends == [0] * world_size, "how the ranks ended; None: one waits for another for ever"
    found: Result = torch.load(folder / "result.pt", weights_only=False)  # our own file, written a moment ago
    return found


def _one_of(setting: Setting, folder: Path, rank: int, world_size: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * MAX_SECONDS, exit=False)  # where a rank waits, if it does
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
    }
    distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    trainer, world = trainer_of(setting, folder, rank, world_size)
    trainer.run()
    if rank == 0:
        torch.save(_result(world), folder / "result.pt")
    distributed.barrier()
    distributed.destroy_process_group()
