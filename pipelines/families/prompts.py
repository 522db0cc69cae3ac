"""Questions that are the same for every family, and which question a turn asks.

The banks are part of the frame contract: a model asked in other words than it was trained with loses points.
"""

from collections.abc import Mapping

from boxcar.pipelines.families.family import PromptBank
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.record import Language
from boxcar.schemas.task import TaskName
from boxcar.schemas.workflow import TasksConfig

CAPTION: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "Describe the image in one sentence.",
        "What does the image show? Answer in one sentence.",
        "Write a short caption for this image.",
    ),
    "zh": ("用一句话描述这张图片。", "这张图片展示了什么？请用一句话回答。", "为这张图片写一个简短的标题。"),
}

DESCRIBE: Mapping[Language, tuple[str, ...]] = {
    "en": ("What is in the region {box}?", "Name the object at {box}."),
    "zh": ("区域{box}中是什么？", "请说出{box}处的物体。"),
}

JSON_GROUNDING: PromptBank = {
    # ODinW evaluation, the fine-tuning README and the issues of QwenLM/Qwen3-VL (#1721 for phrases).
    "detect": {
        "en": (
            "Locate every instance that belongs to the following categories: '{label}'. Report bbox coordinates in JSON format.",
            "Locate {label} in this image and output the bbox coordinates in JSON format.",
        ),
        "zh": ("检测图像中的所有{label}，并以JSON格式返回边界框坐标。", "定位图中的{label}，以JSON格式输出bbox坐标。"),
    },
    "refer": {
        "en": (
            'Locate every object that matches the description "{label}" in the image. Report bbox coordinates in JSON format.',
            "Locate {label} in this image and output the bbox coordinates in JSON format.",
        ),
        "zh": ("定位图中符合描述“{label}”的所有物体，以JSON格式输出bbox坐标。", "定位图中的{label}，以JSON格式输出bbox坐标。"),
    },
    "detect_joint": {
        "en": ("Locate every instance that belongs to the following categories: '{label}'. Report bbox coordinates in JSON format.",),
        "zh": ("检测图像中属于以下类别的所有物体：{label}。以JSON格式返回边界框坐标。",),
    },
}

BRACKET_GROUNDING: PromptBank = {
    # zai-org/CogVLM utils/utils/template.py; the Chinese ones are ours, none are published.
    "detect": {
        "en": (
            "Where is {label}? answer in [[x0,y0,x1,y1]] format.",
            "Can you point out {label} in the image and provide the bounding boxes of its location?",
        ),
        "zh": ("{label}在哪里？请以[[x0,y0,x1,y1]]格式回答。", "请指出图中的{label}，并给出其位置的边界框。"),
    },
    "refer": {
        "en": (
            "Where is {label}? answer in [[x0,y0,x1,y1]] format.",
            "Can you point out {label} in the image and provide the bounding boxes of its location?",
        ),
        "zh": ("{label}在哪里？请以[[x0,y0,x1,y1]]格式回答。", "请指出图中的{label}，并给出其位置的边界框。"),
    },
    "detect_joint": {
        "en": ("Where are {label}? Name each and answer in [[x0,y0,x1,y1]] format.",),
        "zh": ("{label}分别在哪里？请逐一说明，并以[[x0,y0,x1,y1]]格式回答。",),
    },
}

NOT_FOUND: Mapping[Language, str] = {"en": "No {label} is in the image.", "zh": "图中没有{label}。"}
"""The reply of families whose box text has no empty form."""

LABEL_JOIN: Mapping[Language, str] = {"en": ", ", "zh": "、"}
"""How several labels stand in one question."""

_SLOTS: Mapping[TaskName, str] = {
    "detect": "{label}",
    "detect_joint": "{label}",
    "refer": "{label}",
    "absent": "{label}",
    "describe": "{box}",
}
"""What a task's questions must hold; the other tasks hold nothing."""


def with_shared(grounding: PromptBank) -> PromptBank:
    """A family's grounding prompts with the shared ones for the rest. Questions about absent objects are the same as about present ones."""
    return {"caption": CAPTION, "describe": DESCRIBE, "absent": grounding["detect"], **grounding}


def with_overrides(bank: PromptBank, tasks: TasksConfig) -> PromptBank:
    """A family's bank with the workflow's own prompts in their place. Raises ConfigError where one lacks its slot."""
    merged: dict[TaskName, Mapping[Language, tuple[str, ...]]] = dict(bank)
    for task, slot in [*_SLOTS.items(), ("caption", "")]:
        own = getattr(tasks, task).prompts
        for language, prompts in own.items():
            if not prompts:
                raise ConfigError(
                    f"convert.tasks.{task}.prompts.{language}", found="no prompt", expected="one at least", fix="Or leave the key out."
                )
            for prompt in prompts:
                if prompt.count(slot) != 1 if slot else "{label}" in prompt or "{box}" in prompt:
                    raise ConfigError(
                        f"convert.tasks.{task}.prompts.{language}",
                        found=repr(prompt),
                        expected=f"{slot} exactly once" if slot else "no slot",
                    )
        if own:
            merged[task] = {**merged.get(task, {}), **own}
            if task == "detect" and not tasks.absent.prompts:
                merged["absent"] = merged["detect"]
    return merged
