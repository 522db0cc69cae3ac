"""metrics.jsonl outlives crashes."""

from pathlib import Path

import pytest

from train.run_folder import METRICS, RunFolder
from train.trackers import JsonLines, read_events, steps_of


@pytest.mark.parametrize(
    ("before", "steps"),
    [
        (b"", [3]),
        (b'{"event": "step", "step": 1}\n', [1, 3]),
        (b'{"event": "step", "step": 1}\n{"event": "step", "st', [1, 3]),
        (b'{"event": "st', [3]),
    ],
    ids=["empty", "whole", "cut", "nothing but a cut line"],
)
def test_a_line_that_a_crash_cut_is_left_out_and_not_run_into(tmp_path: Path, before: bytes, steps: list[int]) -> None:
    (tmp_path / METRICS).write_bytes(before)
    JsonLines(RunFolder(str(tmp_path))).log({"event": "step", "step": 3})
    written = (tmp_path / METRICS).read_bytes()
    assert [event["step"] for event in steps_of(read_events(written))] == steps
    assert len(written.splitlines()) == len(steps)


def test_events_before_the_last_line_is_whole() -> None:
    assert read_events(b'{"event": "a"}\n{"event"') == [{"event": "a"}]
    assert read_events(b"") == []


def test_what_was_gone_back_over_counts_once() -> None:
    events = [{"event": "step", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    events += [{"event": "resumed", "step": 1}, {"event": "step", "step": 2, "loss": 2.0}]
    assert [(event["step"], event["loss"]) for event in steps_of(events)] == [(1, 1.0), (2, 2.0)]
