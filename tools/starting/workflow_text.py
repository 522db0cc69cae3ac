"""A source that was found -> a commented workflow in YAML, for people to go on with."""

import json
import re
from dataclasses import dataclass

import yaml

from boxcar.tools.starting.sniff import Found

DEFAULT_CUTOFF_LEN = 4096


@dataclass(frozen=True)
class Budget:
    """Settings of length and resolution, and where they come from."""

    cutoff_len: int
    image_max_pixels: int | None
    """None: the family resizes every image to one size, or its published limit stays."""
    why_cutoff: str
    why_pixels: str


@dataclass(frozen=True)
class Choice:
    """What a person (or a default) decided."""

    name: str
    found: Found
    family: str
    tokenizer: str
    base: str
    """Hugging Face id or folder of the model to train."""
    budget: Budget
    box_space: str | None
    """None: open, where the source needs one."""
    comment: str
    """What was found, in one line."""
    validated_on: str
    """Name of the workflow whose shards training is validated with; "" where there is none, or where this one is held out."""
    evaluated_on: str
    """Likewise, of the evaluation."""


def workflow_text(choice: Choice) -> str:
    """The workflow as YAML, parsed back by the test of this module."""
    found = choice.found
    lines = [f"{choice.name}:", f"  description: {_quoted(choice.comment)}"]
    if needed := list(dict.fromkeys(name for name in (choice.validated_on, choice.evaluated_on) if name)):
        lines.append(f"  needs: [{', '.join(needed)}]  # `boxcar run` converts them first")
    lines += ["  convert:", *(f"    {line}" for line in _convert(choice))]
    if not found.is_held_out:
        lines += ["  train:", *(f"    {line}" for line in _train(choice))]
        if choice.evaluated_on:
            lines += ["  evaluate:", f"    shards: [shards/{choice.evaluated_on}]"]
    return "\n".join(lines) + "\n"


def _convert(choice: Choice) -> list[str]:
    found = choice.found
    lines = [f"reader: {found.reader}", f"annotations: {_quoted(str(found.path))}"]
    lines += [f"{key}: {_quoted(value)}" for key, value in found.keys.items()]
    if found.missing_images:
        lines.append("# images: FOLDER  # SET THIS: the folder that image paths are relative to was not found")
    elif found.images is not None:
        lines.append(f"images: {_quoted(str(found.images))}")
    if found.split:
        lines.append(f"split: {found.split}")
    if choice.box_space is not None:
        lines.append(f"box_space: {choice.box_space}")
    elif found.needs_box_space:
        lines.append(
            "# box_space: pixels  # SET THIS if the text holds boxes: pixels, relative, per_mille or resized; such rows are rejected"
        )
    lines += [
        f"family: {choice.family}  # `boxcar families` lists the others",
        f"tokenizer: {_quoted(choice.tokenizer)}  # a Hugging Face id, or a folder with tokenizer.json",
        f"cutoff_len: {choice.budget.cutoff_len}  # {choice.budget.why_cutoff}",
    ]
    if choice.budget.image_max_pixels is not None:
        lines.append(f"image_max_pixels: {choice.budget.image_max_pixels}  # {choice.budget.why_pixels}")
    return [*lines, f"output: shards/{choice.name}"]


def _train(choice: Choice) -> list[str]:
    lines = [
        f"shards: [shards/{choice.name}]",
        f"base: {_quoted(choice.base)}  # a Hugging Face id, or the folder of a model",
        "output: runs",
        "global_batch: 16  # packs of cutoff_len tokens in a step",
        "lora: {rank: 16, alpha: 32}",
        "learning_rate: {language: 1.0e-4}",
    ]
    if choice.validated_on:
        lines += ["validation:", f"  shards: [shards/{choice.validated_on}]", "  every_steps: 200"]
    return lines


def _quoted(text: str) -> str:
    """A YAML scalar: plain where it cannot be misread, else in JSON's quotes, which YAML reads alike."""
    is_plain = re.fullmatch(r"[A-Za-z/][\w./ -]*(?<! )", text, re.ASCII) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
