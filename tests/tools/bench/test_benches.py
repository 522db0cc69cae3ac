"""Benches run, small: what they print is what the README quotes."""

import re

import pytest

from boxcar.tools.bench import head, resuming


def test_every_cut_of_a_plan_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    resuming.sequences(1009, 4, 5)
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"1,009 documents in \d+ packs in \d+ steps; planned again: the same", lines[0])
    assert [line.split(":")[0] for line in lines[1:6]] == ["1 worker", *(f"{world} workers" for world in (2, 3, 4, 8))]
    assert all(re.search(r"resumed at each of (\d+) steps, 0 with another order", line) for line in lines[1:6])
    assert "2 -> 4 -> 1 -> 3 workers, cut at 5 random triples of steps: 0 where" in lines[6]


def test_a_cut_that_loses_packs_would_be_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "rank_packs", lambda first, stop, rank, world: range(first + rank, stop - (world == 3), world))
    resuming.sequences(1009, 4, 5)
    lines = capsys.readouterr().out.splitlines()
    assert not re.search(r"steps, 0 with", lines[3])
    assert lines[6].endswith("cut at 5 random triples of steps: 5 where not each of the 1,009 samples came once")


def test_the_ways_of_the_loss_come_to_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    head.compare(head.Case(hidden=32, vocabulary=20_000, tokens=256, labelled_share=0.3, chunk_tokens=8, threads=1), passes=1)
    found = re.findall(r"relative difference: loss (\S+), gradient (\S+)", capsys.readouterr().out)
    assert len(found) == 3
    assert all(float(value) < 1e-5 for pair in found for value in pair)
