"""What `boxcar train` says to do next is a command that does it."""

import pytest

from boxcar.tools.training.train import _again


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "demo", "max_steps=5", "seed=3"], "boxcar train demo seed=3 --resume"),
        (["train", "demo", "--resume", "max_steps=5"], "boxcar train demo --resume"),
        (["train", "demo", "shards=[a, b]"], "boxcar train demo 'shards=[a, b]' --resume"),
        (["run", "demo", "train.max_steps=5", "train.seed=3"], "boxcar run demo train.seed=3"),
    ],
)
def test_how_to_go_on(words: list[str], expected: str) -> None:
    assert _again(words) == expected
