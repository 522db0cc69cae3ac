"""Other trainers' arithmetic, against the same lines written out for one image or one turn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.audit.consumers import CONSUMERS, find_consumer, infer_seqlen, llama_factory_size, ms_swift_size
from boxcar.schemas.errors import ConfigError

sides = st.integers(1, 6000)
limits = st.integers(28 * 28, 3_000_000)


@given(sides, sides, limits)
def test_the_first_resize_of_llama_factory(width: int, height: int, max_pixels: int) -> None:
    w, h = width, height
    if w * h > max_pixels:
        factor = math.sqrt(max_pixels / (w * h))
        w, h = int(w * factor), int(h * factor)
    if w * h < 32 * 32:
        factor = math.sqrt(32 * 32 / max(w * h, 1))
        w, h = int(w * factor), int(h * factor)
    if min(w, h) < 28:
        w, h = max(w, 28), max(h, 28)
    if w / h > 200:
        w = h * 180
    if h / w > 200:
        h = w * 180
    found = llama_factory_size([width], [height], max_pixels)
    assert (found[0].tolist(), found[1].tolist()) == ([w], [h])
    assert max(w, h) <= 200 * min(w, h)


@given(sides, sides, limits)
def test_the_first_resize_of_ms_swift(width: int, height: int, max_pixels: int) -> None:
    w, h = width, height
    if w * h > max_pixels:
        ratio = w / h
        scaled = math.sqrt(max_pixels / ratio)
        w, h = int(scaled * ratio), int(scaled)
    found = ms_swift_size([width], [height], max_pixels)
    assert (found[0].tolist(), found[1].tolist()) == ([w], [h])
    assert w * h <= max_pixels or (w, h) == (width, height)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 4096))
def test_the_truncation_of_llama_factory(source: int, target: int, room: int) -> None:
    if target * 2 < room:
        limit = room
    elif source * 2 < room:
        limit = room - source
    else:
        limit = int(room * (target / (source + target)))
    expected = min(max(room - min(limit, target), 0), source), min(limit, target)
    found = infer_seqlen(np.array([source]), np.array([target]), np.array([room]))
    assert (int(found[0][0]), int(found[1][0])) == expected
    assert sum(expected) <= room


def test_the_example_that_loses_the_end_of_a_question() -> None:
    """1500 tokens of source, 60 of target, cutoff 1536: the last 24 of the source go, and nothing says so."""
    source, target = infer_seqlen(np.array([1500]), np.array([60]), np.array([1536]))
    assert (int(source[0]), int(target[0])) == (1476, 60)


def test_an_unknown_consumer_is_told_the_known() -> None:
    with pytest.raises(ConfigError, match="llama-factory, ms-swift"):
        find_consumer("axolotl")
    assert all(rule.version and rule.about for rule in CONSUMERS.values())
