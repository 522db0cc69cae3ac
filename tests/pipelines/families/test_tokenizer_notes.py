"""A tokenizer whose special tokens have other ids than the published one is reported."""

import pytest

from boxcar.pipelines.families.catalog import FAMILIES

QWEN = FAMILIES["qwen2_5_vl"]
PUBLISHED = dict(QWEN.published_special_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_ids_give_no_note(name: str) -> None:
    assert FAMILIES[name].published_special_ids
    assert FAMILIES[name].tokenizer_notes({**FAMILIES[name].published_special_ids, "<another>": 5}) == []


def test_another_id_is_reported() -> None:
    [note] = QWEN.tokenizer_notes(PUBLISHED | {"<|im_start|>": 7})
    assert f"1 of {len(PUBLISHED)} special tokens differ" in note
    assert f"<|im_start|> with id 7, published {PUBLISHED['<|im_start|>']}" in note


def test_an_absent_token_is_reported() -> None:
    [note] = QWEN.tokenizer_notes({token: index for token, index in PUBLISHED.items() if token != "<|im_end|>"})
    assert "<|im_end|> with no id" in note
