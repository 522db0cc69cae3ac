"""workflows.yaml as pydantic models: the only home of default values.

    workflow name -> Workflow(convert: ConvertConfig, train: schemas.training.TrainConfig, evaluate: schemas.evaluation.EvaluateConfig)

Every model refuses unknown keys. What only a format or a family can judge (is the reader known, does the family take this pixel budget)
is judged where that is known, with the same ConfigError.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from boxcar.schemas.evaluation import EvaluateConfig, ScenesConfig
from boxcar.schemas.record import Language
from boxcar.schemas.section import Section, Share
from boxcar.schemas.training import TrainConfig

Policy = Literal["keep", "fix", "drop"]


class SourceConfig(Section):
    """Where the annotations are and how to read them."""

    reader: str = Field(description="Annotation format; `boxcar formats` lists them.")
    annotations: str = Field(description="Annotation file or folder: a local path or a URI such as s3://bucket/instances.json.")
    images: str = Field(
        default="", description="Folder that image paths are relative to; a local path or a URI. Empty: the folder of the annotations."
    )
    captions: str | None = Field(default=None, description="COCO captions file, joined by image id.")
    instances: str | None = Field(default=None, description="RefCOCO and gRefCOCO: the instances.json that holds the boxes.")
    classes: str | None = Field(default=None, description="YOLO: data.yaml or a text file with one class name a line.")
    split: str = Field(default="", description="Which split to read where the format has splits; otherwise the name given to the rows.")
    source: str = Field(default="", description="Name of this source in sample ids and mixtures. Empty: the stem of `annotations`.")
    language: Language = Field(default="en", description="Language of labels, phrases and captions.")
    box_space: Literal["pixels", "relative", "per_mille", "resized"] | None = Field(
        default=None,
        description="Space of the boxes where the format leaves it open (conversations): original pixels, 0..1, 0..1000, or pixels "
        "of the image resized for `box_space_family`.",
    )
    box_space_family: str = Field(default="qwen2_5_vl", description="Family whose resize box_space `resized` means.")
    box_space_min_pixels: int | None = Field(default=None, gt=0, description="Pixel limit of that resize; none: the published one.")
    box_space_max_pixels: int | None = Field(default=None, gt=0, description="Pixel limit of that resize; none: the published one.")
    voc_origin: Literal["auto", 0, 1] = Field(
        default="auto", description="Pascal VOC: number of the first pixel. `auto` decides by the boxes and reports what it found."
    )
    exhaustive: bool | None = Field(
        default=None,
        description="Whether every object of the format's categories is annotated in every image, so that a category without a box is "
        "verified absent. None: as the format defines it (true for COCO, VOC and YOLO; LVIS and LabelMe say otherwise).",
    )


def _all_optional(schema: dict[str, Any]) -> None:
    schema.pop("required", None)


class TaskConfig(Section):
    """One kind of turn."""

    # In a file any key may be left out: TasksConfig has the rest.
    model_config = ConfigDict(json_schema_extra=_all_optional)

    share: Share = Field(description="Share of the possible turns of this task that are made, chosen by hash of sample and seed.")
    max_per_sample: int | None = Field(default=None, ge=1, description="At most this many turns of this task in one sample.")
    weight: float = Field(default=1.0, gt=0.0, description="Loss weight of these turns.")
    prompts: dict[Language, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Questions that replace the family's own, by language. `{label}` stands for the label, phrase or list of labels.",
    )


class TasksConfig(Section):
    """Which turns are made of a sample. A share of 0 switches a task off. A key of a task that is left out keeps the task's default."""

    detect: TaskConfig = TaskConfig(share=1.0)
    detect_joint: TaskConfig = TaskConfig(share=0.25, max_per_sample=1)
    refer: TaskConfig = TaskConfig(share=1.0)
    describe: TaskConfig = TaskConfig(share=0.1, max_per_sample=2)
    absent: TaskConfig = TaskConfig(share=0.25, max_per_sample=1)
    caption: TaskConfig = TaskConfig(share=1.0, max_per_sample=1)
    dialogue: TaskConfig = TaskConfig(share=1.0)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, data: Any) -> Any:
        """`tasks.caption.share=0.5` must not lift max_per_sample by the way."""
        if not isinstance(data, dict):
            return data
        usual = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {name: {**usual[name], **task} if name in usual and isinstance(task, dict) else task for name, task in data.items()}


class RulesConfig(Section):
    """What is done with a box or image that breaks a rule: keep it as it is, fix it, or drop it (a dropped box leaves its category
    incomplete in that image, so the category is not asked for there)."""

    not_finite: Literal["drop"] = Field(default="drop", description="A coordinate is NaN or infinite. Only `drop` makes sense.")
    swapped_corners: Policy = Field(default="fix", description="x1 < x0 or y1 < y0; fix: order them.")
    zero_area: Literal["drop"] = Field(default="drop", description="No width or no height. Only `drop` makes sense.")
    outside: Literal["drop"] = Field(default="drop", description="No part of the box lies in the image. Only `drop` makes sense.")
    mostly_outside: Policy = Field(default="drop", description="Less than half of the box lies in the image; fix: clip it.")
    overhang: Policy = Field(default="fix", description="Half or more of the box lies in the image, but not all; fix: clip it.")
    xywh_confusion: Policy = Field(
        default="drop",
        description="Read as the format says, a quarter or more of the box hangs over the border; read as the other of xywh and xyxy, it "
        "fits. Fix: read it so.",
    )
    relative_confusion: Policy = Field(
        default="drop", description="All coordinates <= 1.5 in a format of pixels; fix: read them as fractions of the size."
    )
    under_one_token: Policy = Field(
        default="keep", description="After the resize a side is shorter than one visual token. There is no fix; the box is only small."
    )
    duplicate: Policy = Field(default="fix", description="Same label and same box twice in one image; fix: keep the first.")
    crowd: Literal["keep", "drop"] = Field(
        default="drop", description="Crowd and group boxes; drop: remove them, and do not ask for that category in that image."
    )
    difficult: Literal["keep", "drop"] = Field(default="drop", description="Boxes marked difficult or ignore; drop: as for `crowd`.")
    control_characters: Policy = Field(
        default="fix",
        description="A label or phrase of a region holds a line break or another control character; fix: collapse white space; drop: the "
        "box, or the phrase.",
    )
    size_mismatch: Policy = Field(
        default="drop",
        description="The declared size is not the file's; fix: scale the boxes; keep: trust file and boxes; drop the record.",
    )
    exif_orientation: Policy = Field(
        default="fix",
        description="The image is stored rotated. fix: boxes are upright if the declared size is, else they are turned with the image; "
        "keep: boxes are upright; drop: reject the record. Where the declared size cannot tell, fix rejects the record.",
    )
    outside_images: Literal["keep", "drop"] = Field(
        default="keep",
        description="The path of an image leads out of `images`: `..`, an absolute path, a symbolic link; drop: reject the record.",
    )
    other_storage: Literal["keep", "drop"] = Field(
        default="drop",
        description="The path of an image is on another storage than `images`: another scheme, bucket or host; drop: reject the record and "
        "do not ask the other storage; keep: read it, if you trust whoever wrote the annotations.",
    )
    unusual_mode: Literal["keep", "drop"] = Field(
        default="keep", description="CMYK, 16-bit, palette or animated images (converted to RGB, first frame); drop: reject the record."
    )


class ConvertConfig(SourceConfig):
    """`boxcar convert`: annotations to shards."""

    family: str = Field(description="Model family; `boxcar families` lists them.")
    tokenizer: str = Field(description="Folder with the family's tokenizer.json, or a Hugging Face id.")
    cutoff_len: int = Field(gt=0, description="Longest sequence, image tokens included, in tokens.")
    image_max_pixels: int | None = Field(
        default=None, gt=0, description="Upper pixel limit of the family's resize. None: the published one."
    )
    image_min_pixels: int | None = Field(
        default=None, gt=0, description="Lower pixel limit of the family's resize. None: the published one."
    )
    output: str = Field(description="Folder for shards, manifest and quarantine: a local or shared path.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every choice; same seed, same bytes.")
    languages: dict[Language, Share] = Field(
        default={"en": 1.0},
        description="Languages of the questions, with their shares; chosen per turn by hash.",
    )
    tasks: TasksConfig = TasksConfig()
    rules: RulesConfig = RulesConfig()
    over_length: Literal["plan", "split"] = Field(
        default="plan",
        description="A sample longer than cutoff_len: `plan` keeps all its turns in one row and training takes what fits; `split` writes "
        "several rows of the same image.",
    )
    shrink_images: bool = Field(
        default=False,
        description="Whether an image too large for even one turn may be shrunk below image_max_pixels, within the family's rule.",
    )
    image_storage: Literal["reference", "embed", "embed_resized"] = Field(
        default="reference",
        description="reference: rows hold the path. embed: original bytes in image shards. embed_resized: pre-shrunk to the model's size.",
    )
    trust_sizes: bool = Field(
        default=False, description="Take the sizes that the annotations declare and open no image. The manifest says so."
    )
    records_per_shard: int = Field(default=4096, ge=1, le=1_000_000, description="Records of the source that make one shard.")
    executor: Literal["ray", "inline"] = Field(default="ray", description="Ray Data, or one process without Ray (small sets, debugging).")
    num_workers: int | None = Field(default=None, ge=1, description="Most units in work at once. None: what Ray offers.")

    @model_validator(mode="after")
    def _check(self) -> "ConvertConfig":
        if self.image_min_pixels and self.image_max_pixels and self.image_min_pixels > self.image_max_pixels:
            raise ValueError(f"image_min_pixels {self.image_min_pixels} is above image_max_pixels {self.image_max_pixels}")
        total = sum(self.languages.values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares in `languages` sum to {total:g}, expected 1")
        if self.image_storage != "reference" and self.trust_sizes:
            raise ValueError("image_storage embeds image files, but trust_sizes opens none: choose one")
        return self


class Workflow(Section):
    """One named workflow: a section for each stage."""

    description: str = Field(default="", description="Free text; no program reads it.")
    needs: tuple[str, ...] = Field(
        default=(), description="Workflows whose convert sections `boxcar run` runs first: more sources, held-out shards."
    )
    scenes: ScenesConfig | None = None
    convert: ConvertConfig | None = None
    train: TrainConfig | None = None
    evaluate: EvaluateConfig | None = None
