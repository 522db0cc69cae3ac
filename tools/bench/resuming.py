"""What a run is after it was cut: the order of samples at every step and for any number of workers, and losses after kills."""

import contextlib
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from boxcar.pipelines.convert import Progress, convert
from boxcar.schemas.training import LossConfig, PlanConfig, ScheduleConfig
from boxcar.schemas.workflow import ConvertConfig
from boxcar.tools.bench.measure import BOXCAR
from boxcar.tools.bench.planning import synthetic_index
from boxcar.tools.quickstart.demo import write_demo
from boxcar.train.data.store import ShardStore
from boxcar.train.data.stream import StreamConfig, stream
from boxcar.train.planning.index import read_index
from boxcar.train.planning.plan import plan_epoch
from boxcar.train.planning.plan_table import Plan, packs_of_step, rank_packs
from boxcar.train.running.run_folder import METRICS
from boxcar.train.running.trackers import read_events, steps_of

WORLDS = (1, 2, 3, 4, 8)
CHANGES = (2, 4, 1, 3)
"""Numbers of workers, one after another."""
_SCENES = 59
_POLL_SECONDS = 0.01


def sequences(num_rows: int, num_turns: int, num_changes: int) -> None:
    """Plans of synthetic rows, packed, turns sampled progressively: cut at every step, and by changing numbers of workers."""
    index = synthetic_index(num_rows, num_turns)
    schedule = ScheduleConfig(kind="progressive", turns_per_sample=max(1, num_turns // 2))
    plan = plan_epoch(index, PlanConfig(schedule=schedule), 0, 4096)
    again = plan_epoch(index, PlanConfig(schedule=schedule), 0, 4096)
    counts = plan.counts
    print(
        f"{num_rows:,} rows of {num_turns} turns, {schedule.turns_per_sample} of them taken: {counts.documents:,} documents in "
        f"{counts.packs:,} packs in {counts.steps:,} steps; planned again: {'the same' if again.packs.equals(plan.packs) else 'DIFFERENT'}"
    )
    for world in WORLDS:
        whole = [_packs_of_rank(plan, rank, world, 0, plan.num_steps) for rank in range(world)]
        different = 0
        for first in range(plan.num_steps):
            rest = [_packs_of_rank(plan, rank, world, first, plan.num_steps) for rank in range(world)]
            in_order = _in_global_order(rest) == list(range(packs_of_step(plan, first).start, len(plan.packs)))
            same = all(_flat(mine) == _flat(full[first:]) for mine, full in zip(rest, whole, strict=True))
            different += not (in_order and same)
        print(f"{_workers(world)}: resumed at each of {plan.num_steps} steps, {different} with another order than the uncut epoch's tail")
    lists = plan.packs["documents"].combine_chunks()
    offsets, rows = lists.offsets.to_numpy(), lists.values.field("row").to_numpy()
    draw, wrong = random.Random(0), 0
    for _ in range(num_changes):
        cuts = [0, *sorted(draw.sample(range(1, plan.num_steps), len(CHANGES) - 1)), plan.num_steps]
        parts = zip(CHANGES, itertools.pairwise(cuts), strict=True)
        seen = [_packs_of_rank(plan, rank, world, start, stop) for world, (start, stop) in parts for rank in range(world)]
        packs = [pack for part in seen for pack in _flat(part)]
        taken = np.concatenate([rows[offsets[pack] : offsets[pack + 1]] for pack in packs])
        wrong += not np.array_equal(np.sort(taken), np.arange(num_rows))
    workers = " -> ".join(map(str, CHANGES))
    print(f"{workers} workers, cut at {num_changes} random triples of steps: {wrong} where not each of the {num_rows:,} samples came once")


def _packs_of_rank(plan: Plan, rank: int, world: int, first: int, stop: int) -> list[range]:
    """Packs of a rank, step by step."""
    steps = (packs_of_step(plan, step) for step in range(first, stop))
    return [rank_packs(packs.start, packs.stop, rank, world) for packs in steps]


def _flat(steps: Iterable[range]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


def _in_global_order(ranks: list[list[range]]) -> list[int]:
    """What all ranks read, step by step, each step in the plan's order."""
    return [pack for step in zip(*ranks, strict=True) for pack in sorted(itertools.chain.from_iterable(step))]


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


# ---- the stream itself


def drawn_shards(work: Path) -> Path:
    """A folder with drawn scenes, a tiny base and their shards, made anew."""
    folder = work / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it says what to do next
        write_demo(folder, _SCENES)
    settings = {
        "reader": "coco",
        "annotations": str(folder / "instances.json"),
        "images": str(folder / "images"),
        "family": "qwen2_5_vl",
        "tokenizer": str(folder / "tokenizer"),
        "cutoff_len": 512,
        "output": str(folder / "shards"),
        "executor": "inline",
    }
    convert(ConvertConfig.model_validate(settings), Progress(lambda *_: None, lambda _: None))
    return folder


def streams(folder: Path) -> None:
    """The loader's batches, token by token and pixel by pixel, from every step on."""
    torch.set_num_threads(1)
    shards = (str(folder / "shards"),)
    store = ShardStore(list(shards))
    schedule = ScheduleConfig(kind="progressive", turns_per_sample=2)
    plan = plan_epoch(read_index(shards), PlanConfig(shards=shards, schedule=schedule, global_batch=4), 0)
    config = StreamConfig(loss=LossConfig())
    counts = plan.counts
    print(f"{_SCENES} drawn scenes, {counts.documents} documents in {counts.packs} packs in {counts.steps} steps, read and decoded:")
    for world in WORLDS:
        compared = different = 0
        for rank in range(world):
            whole = list(stream(store, plan.packs, config, rank=rank, world_size=world))
            for first in range(1, plan.num_steps):
                rest = list(stream(store, plan.packs, config, first_step=first, rank=rank, world_size=world))
                for mine, full in zip(itertools.chain(*rest), itertools.chain(*whole[first:]), strict=True):
                    compared += 1
                    same = mine.sample_ids == full.sample_ids and torch.equal(mine.input_ids, full.input_ids)
                    different += not (same and torch.equal(mine.pixels, full.pixels))
        print(f"{_workers(world)}: {compared} batches after resuming at each step, {different} other than without a cut")


# ---- kills


def kills(folder: Path, num_kills: int, epochs: int) -> None:
    """SIGKILL a training run at random moments, again and again; compare every loss that it logged with an undisturbed run's."""
    whole_folder = _train(_workflow(folder, "whole", epochs))
    whole = {event["step"]: event for event in _steps(whole_folder)}
    seconds = max(event["time"] for event in whole.values()) - min(event["time"] for event in whole.values())
    print(f"undisturbed: {len(whole)} steps, {seconds:.1f} s of training, a checkpoint every 3 steps")
    draw = random.Random(0)
    killed = resumed = repeated = left_behind = number = 0
    largest, identical = 0.0, True
    while killed < num_kills:
        workflow, number = _workflow(folder, f"killed-{number}", epochs), number + 1
        while killed < num_kills and _killed(workflow, draw.uniform(0.0, 2 * seconds / max(1, min(num_kills, 6)))):
            killed += 1
            left_behind += bool(list(_run_folder(workflow).glob(".step-*")))
        run_folder = _train(workflow)
        events = read_events((run_folder / METRICS).read_bytes())
        resumed += sum(event["event"] == "resumed" and 0 < event["step"] < len(whole) for event in events)
        logged = [event for event in events if event["event"] == "step"]
        repeated += len(logged) - len(whole)
        assert {event["step"] for event in steps_of(events)} == whole.keys(), "a run to its end has every step"
        largest = max(largest, *(_apart(event, whole[event["step"]]) for event in logged))
        identical &= _adapter(run_folder) == _adapter(whole_folder)
    print(
        f"{killed} kills in {number} runs ({left_behind} while a checkpoint was written), {resumed} times resumed from a checkpoint, else "
        f"from the start; {repeated} steps done again"
    )
    print(
        f"largest relative difference of any logged loss from the undisturbed run's: {largest:.1e}; "
        f"adapters at the end {'byte-identical' if identical else 'DIFFERENT'}"
    )


def _apart(event: dict[str, Any], expected: dict[str, Any]) -> float:
    return float(abs(event["loss"] - expected["loss"]) / abs(expected["loss"]))


def _adapter(run_folder: Path) -> bytes:
    return (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()


def _workflow(folder: Path, name: str, epochs: int) -> Path:
    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    section = {
        "shards": [str(folder / "shards")],
        "base": str(folder / "base-qwen2_5_vl"),
        "init": "random",
        "output": str(output),
        "name": "run",
        "precision": "fp32",
        "epochs": epochs,
        "global_batch": 4,
        "schedule": {"kind": "progressive", "turns_per_sample": 2},
        "learning_rate": {"language": 5e-3},
        "lora": {"dropout": 0.1},
        "checkpoint_every_steps": 3,
        "loader_workers": 1,
        "trackers": [],
        "placement": {"executor": "inline", "use_gpu": False},
    }
    output.mkdir()
    path = output / "workflows.yaml"
    path.write_text(yaml.safe_dump({"bench": {"train": section}}))
    return path


def _run_folder(workflow: Path) -> Path:
    return workflow.parent / "run"


def _command(workflow: Path) -> list[str]:
    resume = ["--resume"] if _run_folder(workflow).exists() else []
    return [*BOXCAR, "train", "bench", "--file", str(workflow), "--json", *resume]


def _train(workflow: Path) -> Path:
    """To the end. Raises CalledProcessError; what the run said is on stderr then."""
    done = subprocess.run(_command(workflow), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr.decode(errors="replace"))
        raise subprocess.CalledProcessError(done.returncode, done.args)
    return _run_folder(workflow)


def _killed(workflow: Path, seconds: float) -> bool:
    """Start or resume the run and kill it so many seconds after it began to train. False where it ended before."""
    before = _num_resumed(workflow)
    process = subprocess.Popen(_command(workflow), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in _until_exit(process):
        if _num_resumed(workflow) > before:
            time.sleep(seconds)
            break
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # with its loader process
        process.wait()
        return True
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return False


def _until_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    while process.poll() is None:
        yield
        time.sleep(_POLL_SECONDS)


def _num_resumed(workflow: Path) -> int:
    path = _run_folder(workflow) / METRICS
    return path.read_bytes().count(b'"resumed"') if path.exists() else 0


def _steps(run_folder: Path) -> list[dict[str, Any]]:
    return steps_of(read_events((run_folder / METRICS).read_bytes()))
