"""Two contracts agree in every field, or the difference is named."""

from typing import Any

import msgspec
import pytest

from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ContractError
from tests.small_sets import CONTRACT

FIELDS = [name for name in FrameContract.__struct_fields__ if name != "tokenizer"]


def another(value: Any) -> Any:
    """A value of the same type that differs a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return value + " "
    if isinstance(value, list):
        return [*value, 1]
    return {**value, "zh": next(iter(value.values()))}


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "prompts"])
def test_a_difference_in_any_field_is_named_with_both_values(name: str) -> None:
    mine, theirs = getattr(CONTRACT, name), another(getattr(CONTRACT, name))
    other = msgspec.structs.replace(CONTRACT, **{name: theirs})
    assert CONTRACT.differences(other) == [f"{name}: {mine!r} here, {theirs!r} there"]
    with pytest.raises(ContractError, match=f"shards/a: found another frame contract .*:\n  {name}: "):
        CONTRACT.require_equal(other, "shards/a")


def test_of_prompts_those_that_differ_are_named() -> None:
    mine = {"detect": {"en": ["Find {label}.", "Where is {label}?"], "zh": ["找{label}"]}, "caption": {"en": ["What is it?"]}}
    theirs = {"detect": {"en": ["Find {label}.", "Box {label}."], "zh": ["找{label}"]}}
    first, second = (msgspec.structs.replace(CONTRACT, prompts=prompts) for prompts in (mine, theirs))
    assert first.differences(second) == [
        "prompts: caption, en: ['What is it?'] here, [] there",
        "prompts: detect, en: ['Where is {label}?'] here, ['Box {label}.'] there",
    ]


def test_where_the_tokenizer_was_loaded_from_is_no_difference() -> None:
    other = msgspec.structs.replace(CONTRACT, tokenizer="elsewhere")
    assert CONTRACT.differences(other) == []
    CONTRACT.require_equal(other, "shards/a")


def test_all_differences_are_named_at_once() -> None:
    other = msgspec.structs.replace(CONTRACT, max_pixels=1, family="qwen3_vl", turn_close_ids=[])
    with pytest.raises(ContractError) as caught:
        CONTRACT.require_equal(other, "shards/a")
    assert [line.partition(":")[0].strip() for line in caught.value.found.splitlines()[1:]] == ["family", "max_pixels", "turn_close_ids"]
    assert "convert again" in str(caught.value)


def test_a_long_value_is_shortened() -> None:
    other = msgspec.structs.replace(CONTRACT, prompts={"detect": {"en": ["word " * 100]}})
    [line] = CONTRACT.differences(other)
    assert len(line) < 300
    assert line.endswith("... there")


def test_order_of_prompts_counts_and_order_of_languages_does_not() -> None:
    """A prompt is chosen by its place in the list."""
    two = msgspec.structs.replace(CONTRACT, prompts={"detect": {"en": ["a", "b"], "zh": ["c"]}})
    assert two.differences(msgspec.structs.replace(two, prompts={"detect": {"zh": ["c"], "en": ["a", "b"]}})) == []
    assert len(two.differences(msgspec.structs.replace(two, prompts={"detect": {"en": ["b", "a"], "zh": ["c"]}}))) == 1


def test_a_contract_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(CONTRACT), type=FrameContract) == CONTRACT
