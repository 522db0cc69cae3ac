"""The `plan` and `train` sections of workflows.yaml: what an epoch is made of, what is tuned, how, and where it runs."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from boxcar.schemas.section import Section, Share
from boxcar.schemas.task import TaskName

NetworkPart = Literal["language", "merger", "vision"]
ScheduleKind = Literal["all", "uniform", "progressive", "random_paced", "anti"]


class ScheduleConfig(Section):
    """Which turns of a sample are trained on in an epoch. The defaults take as many as the budget allows: at equal tokens, many regions of
    an image gave most of the gain in our trials, and going from easy to hard gave little (`boxcar ablate` measures it on your data)."""

    kind: ScheduleKind = Field(
        default="progressive",
        description="all: every turn that fits. uniform: turns_per_sample of them, by hash. progressive: easy turns first. random_paced: "
        "the same pacing over a shuffled difficulty (the control arm). anti: hard turns first.",
    )
    turns_per_sample: int | None = Field(default=None, ge=1, description="Turns of a sample in an epoch. None: as many as fit.")
    turns_per_sample_end: int | None = Field(
        default=None, ge=1, description="The same at the end of the ramp, growing geometrically. None: constant."
    )
    start_competence: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.3, description="c0: quantile of difficulty that is open at the start."
    )
    ramp: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.2, description="tau: share of the run after which everything is open and ramps end."
    )
    ramp_power: float = Field(default=2.0, ge=1.0, description="p of c(t) = ((t / tau)(1 - c0^p) + c0^p)^(1/p).")
    gate_width: float = Field(default=0.08, gt=0.0, description="T: how softly the gate closes, in quantiles.")
    gate_floor: Share = Field(
        default=0.3, description="epsilon: weight of a turn beyond the gate; within it is 1. 1 switches the gate off."
    )
    absent_share: Share | None = Field(
        default=None, description="Share of verified-absent turns among a sample's turns. None: they are turns like all others."
    )
    absent_share_end: Share | None = Field(default=None, description="The same at the end of the ramp. None: constant.")
    cyclic: bool = Field(
        default=False,
        description="Go through a sample's turns in a fixed order, an epoch going on where the last one stopped, so that every turn comes "
        "up (no gate then).",
    )
    turn_order: Literal["hash", "stored"] = Field(default="hash", description="Order of the chosen turns within a sample.")

    @model_validator(mode="after")
    def _nothing_said_in_vain(self) -> "ScheduleConfig":
        for end, start in (("turns_per_sample_end", "turns_per_sample"), ("absent_share_end", "absent_share")):
            if getattr(self, end) is not None and getattr(self, start) is None:
                raise ValueError(f"schedule has {end} without {start}: a ramp needs both ends")
        limits = [name for name in ("turns_per_sample", "absent_share") if getattr(self, name) is not None]
        if self.kind == "all" and limits:
            raise ValueError(f"schedule.kind all takes every turn that fits, but {limits[0]} is set: choose one")
        return self


class MixtureConfig(Section):
    """How often sources and tasks come."""

    sources: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict, description="Times that each row of a source comes in an epoch; sources left out: 1."
    )
    temperature: float | None = Field(
        default=None,
        gt=0.0,
        description="Instead of `sources`: a source's share is proportional to rows^(1/temperature); the epoch keeps its size.",
    )
    tasks: dict[TaskName, Share] = Field(
        default_factory=dict, description="Share of the turns of a task that take part in an epoch, by hash; tasks left out: 1."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "MixtureConfig":
        if self.sources and self.temperature is not None:
            raise ValueError("mixture has both `sources` and `temperature`: choose one")
        return self


class PhaseConfig(Section):
    """A stage of the run. What is left out is as in the train section."""

    until: Annotated[float, Field(gt=0.0, le=1.0)] = Field(description="Where the phase ends, as a share of the run.")
    schedule: ScheduleConfig | None = None
    tasks: dict[TaskName, Share] | None = Field(default=None, description="As mixture.tasks.")
    trainable: tuple[NetworkPart, ...] | None = Field(
        default=None, description="Parts that take steps in this phase, of those that lora or `full` make trainable."
    )


class PlanConfig(Section):
    """What an epoch is made of."""

    shards: tuple[str, ...] = Field(
        default=(), description="Folders of shards (local paths or URIs), all of one contract. Empty: `convert.output`."
    )
    cutoff_len: int | None = Field(default=None, gt=0, description="Tokens of a pack. None: the cutoff_len that the shards were made with.")
    packing: Literal["packed", "padded"] = Field(
        default="packed", description="packed: whole samples side by side up to cutoff_len. padded: each sample a row of its own."
    )
    pack_window: int = Field(default=100_000, ge=1, description="Samples of the shuffled order among which packs are filled.")
    global_batch: int = Field(default=16, ge=1, description="Packs (padded: samples) of one optimizer step, over all workers.")
    epochs: int | float = Field(
        default=1,
        gt=0,
        lt=2**20,
        description="Passes over the shards; the last may be a part of one. Rates, ramps and phases span the run.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every choice; same seed, same plan, on any number of workers.")
    schedule: ScheduleConfig = ScheduleConfig()
    mixture: MixtureConfig = MixtureConfig()
    phases: tuple[PhaseConfig, ...] = Field(default=(), description="Stages of the run, in order; the last one must end at 1.")

    @property
    def num_epochs(self) -> int:
        """Epochs that are planned; the last is cut short where `epochs` is no whole number."""
        return math.ceil(self.epochs)

    @model_validator(mode="after")
    def _phases_ascend(self) -> "PlanConfig":
        ends = [phase.until for phase in self.phases]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1.0):
            raise ValueError(f"phases end at {ends}, expected ascending shares of the run that end at 1")
        return self


class LoraConfig(Section):
    """Low-rank adapters, by peft."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapter matrices (LLaMA-Factory: lora_rank).")
    alpha: float = Field(default=32.0, gt=0.0, description="The adapter is scaled by alpha / rank (lora_alpha).")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout before the adapter (lora_dropout).")
    parts: tuple[NetworkPart, ...] = Field(default=("language",), min_length=1, description="Parts of the network that get adapters.")
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank).")
    use_dora: bool = Field(default=False, description="Weight-decomposed adapters: slower, often better at small ranks.")


class LearningRateConfig(Section):
    """Learning rates of the parts; 0 rests a part."""

    language: float = Field(default=1e-4, ge=0.0, description="Of the language model.")
    merger: float = Field(default=1e-4, ge=0.0, description="Of the projector between vision tower and language model.")
    vision: float = Field(default=1e-5, ge=0.0, description="Of the vision tower.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Schedule of the learning rates after the warm-up."
    )
    warmup: Share = Field(default=0.03, description="Share of the steps in which the rate rises from 0.")
    final: Share = Field(default=0.0, description="Share of the learning rate that is left at the last step.")


class LossConfig(Section):
    """Weights of the labelled tokens. Only their ratios matter: the loss is the weighted mean over the global batch."""

    tasks: dict[TaskName, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict, description="By task; left out: 1.")
    coordinates: float = Field(default=1.0, ge=0.0, description="Tokens of box numbers.")
    words: float = Field(default=1.0, ge=0.0, description="All other labelled tokens.")
    chunk_tokens: int = Field(default=2048, ge=1, description="Labelled tokens whose logits exist at a time.")


class DeepspeedConfig(Section):
    """DeepSpeed instead of DistributedDataParallel."""

    stage: Literal[1, 2, 3] = Field(
        default=2, description="ZeRO: 1 cuts optimizer states over the ranks, 2 gradients as well, 3 parameters as well."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="What waits in host memory; `all` is optimizer and parameters (stage 3)."
    )
    config: str | None = Field(
        default=None,
        description="A DeepSpeed JSON file of your own, used as it is but for batch sizes, optimizer and scheduler, which are those of the "
        'train section. So are precision and clipping, where it leaves them out or calls them "auto".',
    )

    @model_validator(mode="after")
    def _stage_offload(self) -> "DeepspeedConfig":
        if self.offload == "all" and self.stage != 3:
            raise ValueError("offload: all moves parameters, which needs stage: 3")
        return self


class LossWatchConfig(Section):
    """Says when the loss rises again, and what may be the reason."""

    factor: float = Field(default=1.3, gt=1.0, description="Smoothed loss over its minimum that counts as rising.")
    steps: int = Field(default=50, ge=1, description="Number of steps in a row that count as a rise.")
    smoothing: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.95, description="Weight of the past in the moving average.")
    roll_back: bool = Field(default=False, description="Go back to the last checkpoint before the rise, with half the learning rate.")
    max_roll_backs: int = Field(default=3, ge=1, description="Number of times to go back; after that it only warns.")


class EarlyStopConfig(Section):
    """Stops when a validation metric no longer improves."""

    metric: str = Field(
        default="loss",
        description="Name of a validation metric: loss; with `generate` also mean_iou, acc_50, acc_75, f1_50, pr_f1, failed, and each "
        "of them for a task, such as mean_iou/refer.",
    )
    mode: Literal["min", "max"] = Field(default="min", description="Whether a lower or a higher value of the metric is better.")
    patience: int = Field(default=3, ge=1, description="Validations without improvement.")
    min_delta: float = Field(default=0.0, ge=0.0, description="Smallest change that counts as an improvement.")


class GenerateConfig(Section):
    """Validation by generation: replies to a fixed slice of questions, measured as `boxcar evaluate` does."""

    max_samples: int = Field(default=64, ge=1, description="Rows of the validation shards, chosen by hash.")
    tasks: tuple[TaskName, ...] = Field(default=("refer", "detect", "absent"), min_length=1, description="Turns that are asked.")
    batch_size: int = Field(default=8, ge=1, description="Questions answered at a time.")
    max_new_tokens: int = Field(default=256, ge=1, description="Longest reply.")
    alarm_drop: Share = Field(default=0.1, description="Warn when a task's mean IoU falls by this much below its best.")


class ValidationConfig(Section):
    """A look at samples that are not trained on."""

    shards: tuple[str, ...] = Field(min_length=1, description="Folders of shards of the same contract.")
    every_steps: int = Field(default=200, ge=1, description="Optimizer steps between two validations.")
    max_packs: int = Field(default=64, ge=1, description="A fixed slice.")
    generate: GenerateConfig | None = Field(default=None, description="Box metrics beside the loss.")
    early_stop: EarlyStopConfig | None = None

    @model_validator(mode="after")
    def _metric_is_measured(self) -> "ValidationConfig":
        if self.early_stop and self.early_stop.metric != "loss" and self.generate is None:
            raise ValueError(f"early_stop.metric {self.early_stop.metric} needs `generate`: without it only the loss is measured")
        return self


class PlacementConfig(Section):
    """Where the run happens."""

    num_workers: int = Field(default=1, ge=1, description="Training processes; with GPUs, one GPU each.")
    min_workers: int | None = Field(
        default=None, ge=1, description="Elastic training: continue with as few workers as this when nodes are lost."
    )
    use_gpu: bool | None = Field(default=None, description="None: if the cluster has GPUs.")
    cpus_per_worker: float = Field(default=1.0, gt=0.0, description="CPUs that Ray reserves for each worker.")
    max_failures: int = Field(default=3, ge=-1, description="Restarts from the last checkpoint; -1: without end.")
    executor: Literal["ray", "inline"] = Field(default="ray", description="Ray Train, or this process alone (debugging, one GPU).")


class TrainConfig(PlanConfig):
    """`boxcar train`: shards to an adapter."""

    base: str = Field(default="", description="Folder or Hugging Face id of the base model. Empty: `convert.tokenizer`.")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained", description="random: the architecture of the base's config.json with random weights (tests, benchmarks)."
    )
    output: str = Field(description="Folder or URI under which the run's own folder stands.")
    name: str | None = Field(
        default=None,
        pattern=r"^[\w][\w.-]*$",
        description="Name of the run's folder. None: the workflow's name and a hash of everything that decides what is computed.",
    )
    method: Literal["lora", "qlora", "full"] = Field(
        default="lora", description="qlora: the base in 4 bits (needs bitsandbytes; a trial on a CPU, too)."
    )
    lora: LoraConfig = LoraConfig()
    full: tuple[NetworkPart, ...] = Field(default=("language", "merger"), description="Parts that `method: full` tunes.")
    learning_rate: LearningRateConfig = LearningRateConfig()
    weight_decay: float = Field(default=0.0, ge=0.0, description="Of AdamW.")
    adam_betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        default=(0.9, 0.95), description="Of AdamW."
    )
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="Gradients are clipped to this norm; the norm before is logged.")
    loss: LossConfig = LossConfig()
    precision: Literal["bf16", "fp32"] | None = Field(default=None, description="None: bf16 on a GPU, fp32 on a CPU.")
    micro_batch: int = Field(default=1, ge=1, description="Packs (padded: samples) of one forward pass.")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Recompute activations in backward: less memory, up to a third more work. auto: in as few layers as the device's free "
        "memory allows, none where all activations fit.",
    )
    compile: bool = Field(default=False, description="torch.compile on the decoder layers; packs are then filled up to one length.")
    deepspeed: DeepspeedConfig | None = None
    loader_workers: int = Field(default=2, ge=0, description="Processes per worker that decode images; 0: none.")
    pixels: Literal["exact", "fast"] = Field(
        default="exact", description="exact: the reference processor's pixels. fast: torch's bicubic, up to a few grey levels off."
    )
    on_bad_image: Literal["stop", "skip"] = Field(
        default="stop", description="An image that cannot be read: stop, or leave its sample out, report it and reweight the rest."
    )
    cache_dir: str | None = Field(
        default=None, description="Where remote shards are kept. None: a folder below the system's temporary one."
    )
    cache_gb: float = Field(default=50.0, gt=0.0, description="Largest size of the local cache of remote shards, in GB.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many steps, for trials.")
    checkpoint_every_steps: int = Field(default=200, ge=1, description="Optimizer steps between two checkpoints.")
    num_to_keep: int = Field(default=2, ge=1, description="Checkpoints kept.")
    log_every_steps: int = Field(default=1, ge=1, description="Optimizer steps between two `step` lines of metrics.jsonl.")
    loss_watch: LossWatchConfig = LossWatchConfig()
    validation: ValidationConfig | None = None
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=("tensorboard",), description="Beside metrics.jsonl; tensorboard only where it is installed."
    )
    peak_tflops: float | None = Field(default=None, gt=0.0, description="Of one device, for MFU. None: the published figure, where known.")
    placement: PlacementConfig = PlacementConfig()
