"""The frame contract: everything that must be the same where a model is trained, evaluated and served, or its boxes shift.

Written into the manifest of the shards, copied into the adapter, checked at every door. A difference is an error that says what differs.
"""

import msgspec

from boxcar.schemas.errors import ContractError
from boxcar.schemas.row import ROW_SCHEMA_VERSION


class FrameContract(msgspec.Struct, frozen=True, kw_only=True):
    """One family, one pixel budget, one box text, one template, one tokenizer."""

    family: str
    resize: str
    """The family's resize rule in one line."""
    interpolation: str = "pil-bicubic"
    """Which resampling the pixels are made with; the torchvision back end differs by up to 8 grey levels."""
    min_pixels: int
    max_pixels: int
    """Limits of the resized area, in pixels."""
    image_normalisation: str
    box_grid: str
    """Rule from pixels of the original image to the numbers in the text."""
    box_text_example: str
    """An answer of two boxes [1, 2, 3, 4], [5, 6, 7, 8] of a label x, as the family writes it."""
    header_example: str
    """Control text from the beginning to the first question, with one image and the default system prompt."""
    turn_open: str
    answer_open: str
    turn_close: str
    question_prefix: str
    question_suffix: str
    turn_open_ids: list[int]
    answer_open_ids: list[int]
    turn_close_ids: list[int]
    image_token_id: int
    """Stands once for each image in stored ids; expanded to visual_tokens + extra_placeholders when a row is loaded."""
    extra_placeholders: int
    one_question_per_image: bool
    prompts: dict[str, dict[str, list[str]]]
    """Questions by task and language."""
    not_found: dict[str, str]
    """Reply when nothing matches, by language."""
    tokenizer_fingerprint: str
    tokenizer: str
    """Where it was loaded from: for people, not compared."""
    row_schema_version: int = ROW_SCHEMA_VERSION

    def differences(self, other: "FrameContract") -> list[str]:
        """A line for each field that differs, in words; [] where the contracts agree."""
        lines = []
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "prompts":
                lines += _different_prompts(mine, theirs)
            elif name != "tokenizer" and mine != theirs:
                lines.append(f"{name}: {_short(mine)} here, {_short(theirs)} there")
        return lines

    def differing_fields(self, other: "FrameContract") -> set[str]:
        """Names of the fields in which two contracts differ."""
        return {name for name in self.__struct_fields__ if name != "tokenizer" and getattr(self, name) != getattr(other, name)}

    def require_equal(self, other: "FrameContract", where: str) -> None:
        """Raises ContractError with every difference."""
        if lines := self.differences(other):
            raise ContractError(
                where,
                found="another frame contract (here: the first one):\n  " + "\n  ".join(lines) + "\n",
                expected="the same",
                fix="Boxes made under one contract are wrong under another: convert again, or use the settings of the shards.",
            )


def _different_prompts(mine: dict[str, dict[str, list[str]]], theirs: dict[str, dict[str, list[str]]]) -> list[str]:
    """A line for each task and language; of its questions those that the other does not have."""
    lines = []
    for task in sorted(mine.keys() | theirs.keys()):
        for language in sorted(mine.get(task, {}).keys() | theirs.get(task, {}).keys()):
            here, there = mine.get(task, {}).get(language, []), theirs.get(task, {}).get(language, [])
            if here != there:
                only_here, only_there = [one for one in here if one not in there], [one for one in there if one not in here]
                lines.append(f"prompts: {task}, {language}: {_short(only_here or here)} here, {_short(only_there or there)} there")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
