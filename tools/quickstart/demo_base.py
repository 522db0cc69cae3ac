"""`boxcar demo-base`: the small network of the quick start, from nothing. Takes six minutes of two cores.

    drawn scenes of old shapes ──> tokenizer ──> convert ──> `boxcar train`, every weight ──> quickstart_base/ (bf16)

It learns where a single shape is. Telling several apart by colour is not learned at this size, and nothing here promises it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from boxcar.pipelines import convert as conversion
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.prompts import LABEL_JOIN
from boxcar.schemas.evaluation import EvaluateConfig
from boxcar.schemas.record import Language
from boxcar.schemas.training import TrainConfig
from boxcar.schemas.workflow import ConvertConfig, Workflow
from boxcar.tools.quickstart.demo import train_tokenizer
from boxcar.tools.quickstart.scene_files import BASE
from boxcar.tools.quickstart.scenes import NEW_SHAPES, OLD_SHAPES, Style, all_phrases, write_scenes
from boxcar.tools.quickstart.tiny_base import write_tiny_base
from boxcar.tools.training.train import train_with_progress
from boxcar.train.answering.adapter import open_adapter
from boxcar.train.job import complete_run, resolve
from boxcar.train.scoring.evaluate import answer_all
from boxcar.train.scoring.questions import SCORED_SCHEMA
from boxcar.train.scoring.score import number, score

FAMILY = "qwen3_vl"
NUM_SCENES, NUM_HELD_OUT = 8000, 300
NUM_MEASURED = 100
VOCABULARY_SIZE = 640
"""So many that every colour and shape is one token, new shapes included: spelling a word that it never wrote is beyond the network."""
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
VISION = {"depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "num_position_embeddings": 36}
"""1.3 million weights; 96 x 96 px are 36 patches and 9 visual tokens."""


def make_base(work: Path, out: Path = BASE) -> None:
    """Draw, convert, train, and write the base to `out`. Work is kept in `work`: interrupted, it goes on."""
    _prepare(work)
    for part in ("train", "held_out"):
        conversion.convert(_convert(work, part), conversion.Progress(lambda *_: None, lambda _: None))
    workflow = Workflow(train=_train(work))
    if complete_run(resolve(workflow), "base") is None:
        train_with_progress(workflow, "base", resume=(work / "run" / "run.json").exists(), as_json=False)
    write_base(work / "run", work / "shards" / "held_out", work / "base" / "tokenizer.json", out)


def write_base(run: Path, held_out: Path, tokenizer: Path, out: Path) -> None:
    """The network of a finished run in bf16, with its tokenizer and its figures on the held-out shards."""
    opened = open_adapter(str(run), torch.device("cpu"), torch.float32)
    config = EvaluateConfig(shards=(str(held_out),), compare_base=False, max_new_tokens=96, batch_size=64, max_samples=NUM_MEASURED)
    (arm,) = answer_all(config, opened, config.shards, lambda _: None)
    results = score(arm.table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA))
    figures = {name: number(results.measure("rec", name)) for name in ("mean_iou", "acc_50", "acc_75")}
    out.mkdir(parents=True, exist_ok=True)
    opened.base.model.to(torch.bfloat16).save_pretrained(out)
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    facts = {"made_by": "boxcar demo-base", "held_out_scenes": NUM_MEASURED, **figures}
    (out / "figures.json").write_text(json.dumps(facts, indent=1) + "\n")
    Console(soft_wrap=True).print(f"{out}: {figures}", markup=False)


def _prepare(work: Path) -> None:
    base = work / "base"
    if (base / "config.json").exists():
        return
    old = Style(list(OLD_SHAPES))
    write_scenes(work / "train", [(old, NUM_SCENES)], 0, "base")
    write_scenes(work / "held_out", [(old, NUM_HELD_OUT)], 9, "basev")
    base.mkdir(parents=True, exist_ok=True)
    train_tokenizer(_corpus(), VOCABULARY_SIZE).save(str(base / "tokenizer.json"))
    write_tiny_base(base, FAMILY, str(base))
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    config["text_config"] |= TEXT | {"tie_word_embeddings": True}
    config["text_config"]["rope_parameters"]["mrope_section"] = [6, 5, 5]
    config["vision_config"] |= VISION | {"out_hidden_size": TEXT["hidden_size"], "deepstack_visual_indexes": [0]}
    config["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config, indent=1))


def _corpus() -> Iterator[str]:
    """What the network will read and write, in both languages, new shapes included: a tokenizer cannot be taught more later."""
    family = find_family(FAMILY)
    languages: tuple[Language, ...] = tuple(LABEL_JOIN)
    for language in languages:
        for phrase in all_phrases([*OLD_SHAPES, *NEW_SHAPES], language):
            for task in ("detect", "refer"):
                yield from (question.replace("{label}", phrase) for question in family.prompts[task][language])
            yield family.not_found[language].replace("{label}", phrase)
            for before, after in ((None, phrase), (phrase, None), (phrase, phrase)):
                yield family.box_text.answer_gap(before, after, several_labels=False)
    yield "system\nuser\nassistant\n"


def _convert(work: Path, part: str) -> ConvertConfig:
    settings = {
        "reader": "coco",
        "annotations": str(work / part / "instances_en.json"),
        "images": str(work / part / "images"),
        "family": FAMILY,
        "tokenizer": str(work / "base"),
        "cutoff_len": 2048,
        "image_min_pixels": 96 * 96,
        "image_max_pixels": 96 * 96,
        "tasks": {"detect_joint": {"share": 0}, "describe": {"share": 0}, "absent": {"share": 0.1}},
        "output": str(work / "shards" / part),
        "executor": "inline",
    }
    return ConvertConfig.model_validate(settings)


def _train(work: Path) -> TrainConfig:
    settings = {
        "shards": [str(work / "shards" / "train")],
        "base": str(work / "base"),
        "init": "random",
        "output": str(work),
        "name": "run",
        "epochs": 12,
        "max_steps": 1500,  # finding single shapes has settled by then; the rate has not yet fallen far, and LoRA goes on from there
        "global_batch": 1,
        "method": "full",
        "full": ["language", "merger", "vision"],
        "schedule": {"kind": "all"},
        "learning_rate": {"language": 1.5e-3, "merger": 1.5e-3, "vision": 1.5e-3, "warmup": 0.05},
        "loss": {"words": 0.3},
        "gradient_checkpointing": False,
        "loader_workers": 0,
        "precision": "fp32",
        "trackers": [],
        "log_every_steps": 10,
        "checkpoint_every_steps": 500,
        "placement": {"executor": "inline", "use_gpu": False},
    }
    return TrainConfig.model_validate(settings)
