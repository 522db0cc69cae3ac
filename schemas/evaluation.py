"""The `evaluate` and `scenes` sections of workflows.yaml: what a run is measured with, and drawings to try everything on."""

from typing import Literal

from pydantic import Field

from boxcar.schemas.section import Section
from boxcar.schemas.task import TaskName

ScoreRule = Literal["const", "rank", "logprob"]


class EvaluateConfig(Section):
    """`boxcar evaluate`: boxes of an adapter against the truth of held-out shards."""

    adapter: str = Field(default="", description="A run's folder, or its adapter/. Empty: the run of this workflow's train section.")
    shards: tuple[str, ...] = Field(min_length=1, description="Folders of held-out shards, of the adapter's contract.")
    base: str = Field(default="", description="Where the base is now, if it has moved.")
    tokenizer: str = Field(default="", description="Where the tokenizer is now, if it has moved.")
    output: str = Field(default="", description="Folder to write. Empty: evaluation-<hash> in the run's folder.")
    compare_base: bool = Field(default=True, description="Measure the base without the adapter as well.")
    tasks: tuple[TaskName, ...] = Field(
        default=("refer", "detect", "detect_joint", "absent"), min_length=1, description="Turns of these tasks are asked."
    )
    max_samples: int | None = Field(default=None, ge=1, description="A fixed slice of so many samples, by hash. None: all.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the slice and of the intervals.")
    ask_as: Literal["shards", "adapter", "both"] = Field(
        default="shards",
        description="Whose questions are asked where the contracts differ in their prompts alone: those in the shards, those the adapter "
        "was trained with, or both, to see the gap.",
    )
    allow_prompt_mismatch: bool = Field(default=False, description="Evaluate even if prompts differ; everything else must agree.")
    allow_leakage: bool = Field(default=False, description="Evaluate even if an image is also in the training shards (by content).")
    forgetting: tuple[str, ...] = Field(
        default=(), description="Shards of another task: measures what the adapter forgot, against the base, in the same run."
    )
    batch_size: int = Field(default=8, ge=1, description="Questions answered at a time.")
    max_new_tokens: int = Field(default=512, ge=1, description="Longest reply.")
    score_rule: ScoreRule = Field(
        default="logprob",
        description="Score of a box for COCO AP. logprob: mean log-probability of its digits. rank: 1 - place / number. const: 1, which is "
        "no AP: it loses a third and depends on the order of the images.",
    )
    grec_official: bool = Field(default=False, description="gRefCOCO's figures matched by GIoU, as its own code does.")
    caption_metrics: bool = Field(default=False, description="BLEU, ROUGE and CIDEr of captions (extra `captions`).")
    precision: Literal["bf16", "fp32"] | None = Field(default=None, description="None: bf16 on a GPU, fp32 on a CPU.")
    use_gpu: bool | None = Field(default=None, description="None: if there is one.")


class ScenesConfig(Section):
    """Drawn scenes instead of your own data: what `boxcar run quickstart` begins with."""

    folder: str = Field(description="Where images and annotations are written.")
    num_train: int = Field(default=600, ge=10, description="Number of drawings to train on.")
    num_held_out: int = Field(default=120, ge=10, description="Number of drawings to evaluate on.")
    seed: int = Field(default=0, ge=0, description="Seed of the drawings.")
