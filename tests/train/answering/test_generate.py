"""Generation sees what training saw: the first token's scores are the training forward's, and company in a batch changes nothing."""

from typing import Any

import pytest
import torch

from boxcar.pipelines.families.patches import PixelLimits
from boxcar.pipelines.tokens.frame import Frame
from boxcar.pipelines.tokens.tokenizer import load_tokenizer
from boxcar.train.answering.adapter import Opened
from boxcar.train.answering.generate import LEAST_LOGPROB, Reply, box_scores, generate
from tests.small_tokenizers import folder_of
from tests.train.tiny import FAMILIES, padded_batch, random_documents, tiny_base


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    base = tiny_base(tmp_path_factory.mktemp("base"), request.param, packed=False)
    base.model.eval()
    limits: PixelLimits = base.family.resize.published_limits
    frame = Frame(base.family, load_tokenizer(folder_of("qwen2")), limits, base.family.prompts, "a test's")
    return Opened(base, base.model, frame, None, "a test")


def _flat(pixels: list[list[Any]]) -> list[Any]:
    return [image for images in pixels for image in images]


def test_company_changes_nothing(opened: Opened) -> None:
    documents, pixels = random_documents(opened.base)
    together = generate(opened, documents, _flat(pixels), max_new_tokens=6, with_logprobs=True)
    for document, images, reply in zip(documents, pixels, together, strict=True):
        (alone,) = generate(opened, [document], images, max_new_tokens=6, with_logprobs=True)
        assert (alone.ids, alone.text, alone.complete) == (reply.ids, reply.text, reply.complete)
        assert alone.logprobs == pytest.approx(reply.logprobs, abs=1e-4)


def test_the_first_scores_are_those_of_the_training_forward(opened: Opened) -> None:
    documents, pixels = random_documents(opened.base)
    replies = generate(opened, documents, _flat(pixels), max_new_tokens=1, with_logprobs=True)
    batch = padded_batch(documents, pixels)
    assert batch.attention_mask is not None
    with torch.no_grad():
        states = opened.base.hidden_states(batch)
        last = batch.attention_mask.sum(dim=1) - 1
        scores = torch.log_softmax(opened.base.head(states[torch.arange(len(last)), last]).float(), dim=-1)
    for reply, row in zip(replies, scores, strict=True):
        assert reply.logprobs is not None
        assert reply.ids == [int(row.argmax())]
        assert reply.logprobs[0] == pytest.approx(float(row.max()), abs=1e-5)


def test_later_scores_are_those_of_the_whole_sequence(opened: Opened) -> None:
    """With a cache, position by position: nothing shifts after the prompt."""
    documents, pixels = random_documents(opened.base)
    replies = generate(opened, documents, _flat(pixels), max_new_tokens=5, with_logprobs=True)
    for document, images, reply in zip(documents, pixels, replies, strict=True):
        assert reply.logprobs is not None
        (once_more,) = generate(opened, [_longer(document, reply.ids[:-1])], images, max_new_tokens=1, with_logprobs=True)
        assert once_more.ids == reply.ids[-1:]
        assert once_more.logprobs == pytest.approx(reply.logprobs[-1:], abs=1e-4)


def _longer(document: Any, ids: list[int]) -> Any:
    from dataclasses import replace  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    rest = len(ids)
    positions = document.positions[:, -1:] + np.arange(1, rest + 1)
    return replace(
        document,
        input_ids=np.concatenate([document.input_ids, ids]),
        label_weights=np.concatenate([document.label_weights, np.zeros(rest, np.float32)]),
        label_groups=np.concatenate([document.label_groups, np.full(rest, -1, np.int16)]),
        positions=np.concatenate([document.positions, positions], axis=1),
    )


def test_numbers_are_scored_in_fours(opened: Opened) -> None:
    backend = opened.frame.tokenizer.backend
    text = '[{"bbox_2d": [1, 23, 4, 5]}, {"bbox_2d": [6, 7, 8, 90]}]'
    ids = backend.encode(text, add_special_tokens=False).ids
    scores = [-float(number) for number in range(len(ids))]
    digits = [score for token, score in zip(ids, scores, strict=True) if backend.decode([token]).strip().isdigit()]
    assert len(digits) == 12, "digits are tokens of their own, and each 2d has one"
    digits = [*digits[1:6], *digits[7:]]
    reply = Reply(ids, text, scores, complete=True)
    assert box_scores(reply, 2, opened) == pytest.approx([sum(digits[:5]) / 5, sum(digits[5:]) / 5])
    assert box_scores(reply, 1, opened) == pytest.approx([sum(digits) / 10]), "not four for each box"
    assert box_scores(Reply(ids[:1], "", None, complete=True), 1, opened) is None
    assert box_scores(Reply([], "", [], complete=True), 1, opened) == [LEAST_LOGPROB]
