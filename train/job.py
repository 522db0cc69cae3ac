"""A training run from the driver's side: plan, name, place, restart. Ray Train is started here only.

    config ──> shards' index ──> plan of every epoch ──> run folder ──> TorchTrainer ──> worker.work on every rank

Ray Train places the workers, starts them again after a failure (from the newest whole checkpoint; the plan needs nothing replayed), resizes
an elastic run and copies checkpoints to the storage. What a step is, it does not know.
"""

import json
import logging
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.cluster import connected
from boxcar.schemas import errors
from boxcar.schemas.adapter import CARD
from boxcar.schemas.errors import BoxcarError, ConfigError, StorageError, TrainingError
from boxcar.schemas.task import TASK_NAMES, TaskName
from boxcar.schemas.training import PlanConfig, TrainConfig
from boxcar.schemas.workflow import Workflow
from boxcar.train.data.stream import LoaderLost
from boxcar.train.planning.index import PlanIndex, read_index
from boxcar.train.planning.plan import plan_epoch
from boxcar.train.planning.plan_table import Plan, write_plan
from boxcar.train.running.nodes import require_alike, survey
from boxcar.train.running.run_folder import ADAPTER, METRICS, RUN, RunFolder, require_new_or_same
from boxcar.train.running.sessions import LocalSession
from boxcar.train.worker import RunSpec, versions, work

if TYPE_CHECKING:
    from ray.train import RunConfig

FAILURE = "failure.json"
_NOT_CONTENT = {
    "output",
    "placement",
    "trackers",
    "cache_dir",
    "cache_gb",
    "loader_workers",
    "name",
    "num_to_keep",
    "log_every_steps",
    "checkpoint_every_steps",
    "max_steps",
    "peak_tflops",
}
"""Settings that do not change what a run computes."""

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_REMOTE_LOOKS = 5.0
"""Each is a request or two."""

OnEvent = Callable[[dict[str, Any]], None]


def resolve(workflow: Workflow) -> TrainConfig:
    """The train section with nothing left open. Raises ConfigError."""
    train, convert = workflow.train, workflow.convert
    assert train is not None, "the caller asked for this section"
    changes: dict[str, Any] = {}
    shards = train.shards or ((convert.output,) if convert else ())
    if not shards:
        raise ConfigError("train.shards", found="nothing", expected="folders of shards, or a convert section with an `output`")
    changes["shards"] = tuple(_absolute(path) for path in shards)
    changes["base"] = train.base or (convert.tokenizer if convert else "")
    if Path(changes["base"]).is_dir():
        changes["base"] = _absolute(changes["base"])
    changes["output"] = _absolute(train.output)
    if train.validation:
        changes["validation"] = train.validation.model_copy(update={"shards": tuple(map(_absolute, train.validation.shards))})
    if train.deepspeed and train.deepspeed.config:
        changes["deepspeed"] = train.deepspeed.model_copy(update={"config": _absolute(train.deepspeed.config)})
    if train.precision is None:
        changes["precision"] = "bf16" if _uses_gpu(train) else "fp32"
    return train.model_copy(update=changes)


def _absolute(path: str) -> str:
    """Workers stand in another folder."""
    return path if storage.is_uri(path) else os.path.abspath(path)


def _uses_gpu(config: TrainConfig) -> bool:
    if config.placement.use_gpu is not None:
        return config.placement.use_gpu
    if config.placement.executor == "inline":
        return torch.cuda.is_available()
    with connected() as resources:
        return bool(resources.get("GPU", 0))


def train(config: TrainConfig, workflow_name: str, *, resume: bool = False, on_event: OnEvent = lambda _: None) -> dict[str, Any]:
    """Run to the end. Returns the last state: step, tokens, and `folder`. Raises BoxcarError, after which --resume goes on.

    In one process (placement.executor: inline), SIGTERM saves a checkpoint after the current step and raises SystemExit(143).

    on_event: called from another thread with each event of metrics.jsonl (where the run's folder is remote, some seconds later), and with
    {"event": "planning", ...} before.
    """
    on_event({"event": "planning", "what": "reading the index of the shards"})
    index = read_index(config.shards)
    config = config.model_copy(update={"cutoff_len": config.cutoff_len or index.cutoff_len})
    made_of = content_of(config, index)
    folder = RunFolder(_uri(config, workflow_name, made_of))
    name = folder.uri.rpartition("/")[2]
    existing = folder.read(RUN)
    require_new_or_same(folder, made_of, json.loads(existing) if existing else None, resume=resume)
    folder.write(RUN, json.dumps(made_of, indent=1, sort_keys=True).encode())
    spec = _spec(config, index, folder, name, on_event)
    with _watching(folder, on_event):
        state = _run_inline(spec, config, folder) if config.placement.executor == "inline" else _run_with_ray(spec, config, folder)
    return state | {"folder": folder.uri, "num_steps": sum(spec.epoch_steps)}


def complete_run(config: TrainConfig, workflow_name: str) -> dict[str, Any] | None:
    """The last state of a run of these very settings and shards that has come to its end; None where there is none."""
    config, made_of = _with_content(config)
    folder = RunFolder(_uri(config, workflow_name, made_of))
    existing = folder.read(RUN)
    if existing is None or json.loads(existing) != made_of or folder.read(f"{ADAPTER}/{CARD}") is None:
        return None
    state = _last_state(folder)
    return state | {"folder": folder.uri} if state.get("complete") else None


def run_uri(config: TrainConfig, workflow_name: str) -> str:
    """Where a run of these settings and shards stands, or will."""
    config, made_of = _with_content(config)
    return _uri(config, workflow_name, made_of)


def _with_content(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
    index = read_index(config.shards)
    config = config.model_copy(update={"cutoff_len": config.cutoff_len or index.cutoff_len})
    return config, content_of(config, index)


def _uri(config: TrainConfig, workflow_name: str, made_of: dict[str, Any]) -> str:
    return f"{config.output.rstrip('/')}/{config.name or f'{workflow_name}-{digest_of(made_of)[:10]}'}"


def content_of(config: TrainConfig, index: PlanIndex) -> dict[str, Any]:
    """Everything that decides what a run computes; cutoff_len is filled in."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NOT_CONTENT}
    manifests = [folder.manifest.manifest_xxh3_128 for folder in index.folders]
    return {"format": "boxcar-run", "manifests": manifests, **settings}


def digest_of(made_of: dict[str, Any]) -> str:
    """A name for it, of 32 hexadecimal digits."""
    # Where the shards lie does not matter: their manifests are hashed.
    content = {key: value for key, value in made_of.items() if key != "shards"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _spec(config: TrainConfig, index: PlanIndex, folder: RunFolder, name: str, on_event: OnEvent) -> RunSpec:
    """Plan every epoch into the run's folder: workers map the files, and the number of steps is known from the start."""
    names, steps, turns = [], [], Counter[TaskName]()
    assert config.cutoff_len is not None, "filled in by the caller"
    for epoch in range(config.num_epochs):
        on_event({"event": "planning", "what": f"epoch {epoch + 1} of {config.epochs:g}"})
        plan = plan_epoch(index, config, epoch, config.cutoff_len)
        names.append(f"plan/epoch-{epoch:04d}.arrow")
        steps.append(plan.counts.steps)
        turns.update({task: plan.counts.tasks[task].turns for task in TASK_NAMES if task in plan.counts.tasks})
        _put_plan(folder, names[-1], plan)
    validation_plan = None
    if config.validation:
        validation_plan = "plan/validation.arrow"
        _put_plan(folder, validation_plan, _validation_plan(config, index))
    return RunSpec(config.model_dump(mode="json"), folder.uri, name, names, steps, validation_plan, dict(turns), versions=versions())


def _validation_plan(config: TrainConfig, index: PlanIndex) -> Plan:
    """Every turn that fits; workers take its first packs."""
    assert config.validation is not None, "the caller saw it"
    assert config.cutoff_len is not None, "filled in by then"
    held_out = read_index(config.validation.shards)
    index.contract.require_equal(held_out.contract, f"train.validation.shards, {config.validation.shards[0]}")
    plain = PlanConfig.model_validate({"packing": config.packing, "global_batch": config.global_batch, "schedule": {"kind": "all"}})
    return plan_epoch(held_out, plain, 0, config.cutoff_len)


def _put_plan(folder: RunFolder, name: str, plan: Plan) -> None:
    if folder.local is not None:
        (folder.local / name).parent.mkdir(parents=True, exist_ok=True)
        write_plan(folder.local / name, plan)
        return
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        write_plan(Path(scratch) / "plan.arrow", plan)
        folder.write(name, (Path(scratch) / "plan.arrow").read_bytes())


# ---- one process


def _run_inline(spec: RunSpec, config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    if config.deepspeed and not torch.distributed.is_initialized():
        raise ConfigError("train.deepspeed", found="placement.executor: inline", expected="ray", fix="DeepSpeed needs a process group.")
    device = torch.device("cuda" if _uses_gpu(config) else "cpu")
    session = LocalSession(folder, config.num_to_keep, device)
    with session.stop_on(signal.SIGTERM):
        state = work(spec, session)
    if session.stopping():  # it has saved: end the process, so that nothing (another run, an evaluation) begins behind it
        raise SystemExit(128 + signal.SIGTERM)
    return state


# ---- Ray Train


class _RaySession:
    """This worker among those that Ray Train started."""

    def __init__(self) -> None:
        import ray.train  # noqa: PLC0415
        import ray.train.torch  # noqa: PLC0415

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._train = ray.train
        self._known_to_go: list[str] = []

    def publish(self, folder: Path | None, step: int, metrics: dict[str, Any]) -> None:
        from boxcar.train.running.run_folder import checkpoint_name  # noqa: PLC0415

        found = None if folder is None else self._train.Checkpoint.from_directory(str(folder))
        self._train.report({**metrics, "step": step}, checkpoint=found, checkpoint_dir_name=checkpoint_name(step))
        if folder is not None:
            shutil.rmtree(folder)  # it is uploaded: report waits for that

    def endangered(self) -> bool:
        # Ray Train answers alike on all ranks (a call is a barrier of a few milliseconds) and starts the run again elsewhere when the node
        # is gone: the run saves and goes on.
        info = self._train.get_preemption_info()
        going = [] if info is None else info.preempted_node_ids
        new = bool(set(going) - set(self._known_to_go))
        self._known_to_go = going
        return new

    def stopping(self) -> bool:
        return False


def _work_under_ray(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on every rank. A user's mistake is written down, so that a restart does not repeat it."""
    spec = msgspec.convert(arguments, RunSpec)
    folder = RunFolder(spec.folder)
    if folder.read(FAILURE) is not None:
        return  # another rank, or the attempt before, has said what is wrong: trying again would not help
    try:
        work(spec, _RaySession())
    except (LoaderLost, StorageError):
        raise  # trying again may help
    except BoxcarError as error:
        folder.write(FAILURE, json.dumps(_failure(error)).encode())
        raise


def _failure(error: BoxcarError) -> dict[str, str]:
    return {"kind": type(error).__name__, "where": error.where, "found": error.found, "expected": error.expected, "fix": error.fix}


def _run_with_ray(spec: RunSpec, config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    import ray  # noqa: PLC0415
    import ray.train  # noqa: PLC0415
    import ray.train.torch  # noqa: PLC0415

    placement = config.placement
    use_gpu = _uses_gpu(config)
    if folder.read(FAILURE) is not None:
        folder.delete_file(FAILURE)
    with connected() as resources:
        _require_room(config, use_gpu, resources)
        if len([node for node in ray.nodes() if node["Alive"]]) > 1:
            require_alike(survey(config))
        trainer = ray.train.torch.TorchTrainer(
            _work_under_ray,
            train_loop_config=msgspec.to_builtins(spec),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=placement.num_workers
                if placement.min_workers is None
                else (min(placement.min_workers, placement.num_workers), placement.num_workers),
                use_gpu=use_gpu,
                resources_per_worker={"CPU": placement.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=run_config_of(config, spec.name),
        )
        try:
            with _interrupts_as_usual():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _mistake(folder) or _lost(error, folder) from error
    if mistake := _mistake(folder):
        raise mistake
    return _last_state(folder)


def run_config_of(config: TrainConfig, name: str) -> "RunConfig":
    """Ray Train's settings of a run of this name: where it lies, how often it is restarted, how many checkpoints stay."""
    import ray.train  # noqa: PLC0415  (runs of one process need no Ray)

    return ray.train.RunConfig(
        name=name,
        storage_path=config.output,
        failure_config=ray.train.FailureConfig(max_failures=config.placement.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.num_to_keep),
    )


@contextmanager
def _interrupts_as_usual() -> Iterator[None]:
    """Ray Train answers Ctrl-C itself: it takes the workers down and exits without a word, and its handler stays when it is done."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _mistake(folder: RunFolder) -> BoxcarError | None:
    data = folder.read(FAILURE)
    if data is None:
        return None
    said = json.loads(data)
    kind = getattr(errors, said.pop("kind"))
    if kind is errors.ImageError:
        kind = TrainingError
    error: BoxcarError = kind(said.pop("where"), **said)
    return error


def _lost(error: Exception, folder: RunFolder) -> TrainingError:
    return TrainingError(
        folder.uri,
        found=f"a worker that failed more often than placement.max_failures allows:\n{error}\n",
        expected="workers that live",
        fix="--resume goes on from the last complete checkpoint.",
    )


def _last_state(folder: RunFolder) -> dict[str, Any]:
    from boxcar.train.running.trackers import read_events  # noqa: PLC0415

    finished = [event for event in read_events(folder.read(METRICS) or b"") if event["event"] == "finished"]
    return {key: value for key, value in finished[-1].items() if key in ("step", "tokens", "complete")} if finished else {}


def _require_room(config: TrainConfig, use_gpu: bool, have: dict[str, float]) -> None:
    """Ray would wait for ever for a machine that never comes."""
    least = config.placement.min_workers or config.placement.num_workers
    needed = {"CPU": least * config.placement.cpus_per_worker} | ({"GPU": float(least)} if use_gpu else {})
    for resource, number in needed.items():
        if have.get(resource, 0) < number:
            raise ConfigError(
                "train.placement",
                found=f"{least} workers that need {number:g} {resource}s together",
                expected=f"at most the {have.get(resource, 0):g} that the cluster has",
                fix="Lower num_workers or cpus_per_worker, or start more nodes.",
            )


# ---- events while it runs


@contextmanager
def _watching(folder: RunFolder, on_event: OnEvent) -> Iterator[None]:
    """Tell of new lines of metrics.jsonl: twice a second, and where the folder is remote, now and then."""
    existing = folder.read(METRICS) or b""
    offset, done = existing.rfind(b"\n") + 1, threading.Event()

    def follow() -> None:
        nonlocal offset
        while True:
            last = done.wait(SECONDS_BETWEEN_LOOKS if folder.local is not None else SECONDS_BETWEEN_REMOTE_LOOKS)
            try:
                data = folder.read(METRICS, offset) or b""
            except StorageError as error:  # what is missed now, the next look sees
                logging.getLogger(__name__).warning("%s", error)
                data = b""
            whole = data[: data.rfind(b"\n") + 1]
            offset += len(whole)
            for line in whole.splitlines():
                on_event(json.loads(line))
            if last:
                return

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
