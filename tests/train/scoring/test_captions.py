"""Caption metrics: right captions score high, wrong ones low, and nothing is measured where nothing is there."""

import pyarrow as pa
import pytest

from boxcar.schemas.errors import ConfigError
from boxcar.train.scoring.captions import caption_figures, words

pytest.importorskip("pycocoevalcap", reason="caption metrics are an extra")


def _table(replies: list[str]) -> pa.Table:
    answers = ["A red circle and a blue square.", "Two dogs on a long beach.", "一只猫在沙发上睡觉"]
    rows = [
        {"sample_id": f"s{number}", "turn": 0, "image": f"{number}.jpg", "task": "caption", "answer": answer, "reply": reply}
        for number, (answer, reply) in enumerate(zip(answers, replies, strict=True))
    ]
    return pa.Table.from_pylist(rows)


def test_words() -> None:
    assert words("Two dogs, ON_a beach!") == "two dogs on a beach"
    assert words("一只猫 cat") == "一 只 猫 cat"


def test_right_and_wrong() -> None:
    right = caption_figures(_table(["a red circle and a blue square", "Two dogs on a long beach", "一只猫在沙发上睡觉。"]))
    wrong = caption_figures(_table(["no", "no", "no"]))
    assert right["bleu_4"] == pytest.approx(1.0, abs=1e-3)
    assert right["rouge_l"] == pytest.approx(1.0)
    assert right["cider"] > 5
    assert wrong["bleu_4"] < 0.01
    assert wrong["cider"] == 0
    assert (right["num"], right["official"]) == (3, False)


def test_no_captions() -> None:
    with pytest.raises(ConfigError, match="found no caption turn"):
        caption_figures(_table(["", "", ""]).slice(0, 0))
