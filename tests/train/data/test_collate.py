"""What packing and padding must keep, whatever is packed."""

import pickle

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boxcar.train.data.collate import MicroBatch, dummy, pack, pad
from boxcar.train.data.documents import NO_LABEL, Document, ImageSlot

PAD_ID = 9
SIZES_WH = [(28, 28), (56, 28), (28, 84)]


def document(seed: int, length: int, num_images: int, num_position_rows: int = 4) -> Document:
    """Random, but for what every document promises: the first token is no label."""
    rng = np.random.default_rng(seed)
    weights = (rng.random(length) * (rng.random(length) < 0.5)).astype(np.float32)
    weights[0] = 0
    slots = []
    for number in range(num_images):
        width, height = SIZES_WH[rng.integers(len(SIZES_WH))]
        slots.append(ImageSlot(f"{seed}-{number}.jpg", 0, -1, -1, (1, 1), (width, height), (1, height // 14, width // 14), "somewhere"))
    return Document(
        sample_id=f"sample/{seed}",
        row=seed,
        input_ids=rng.integers(10, 1000, length),
        label_weights=weights,
        label_groups=np.where(weights > 0, rng.integers(0, 50, length), NO_LABEL).astype(np.int16),
        positions=np.tile(np.arange(length), (num_position_rows, 1)),
        images=tuple(slots),
    )


def images_of(documents: list[Document]) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*slot.resized_wh[::-1], 3), dtype=np.uint8) for one in documents for slot in one.images]


some_documents = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=6).map(
    lambda shapes: [document(seed, length, num_images) for seed, (length, num_images) in enumerate(shapes)]
)


@given(some_documents, st.sampled_from([None, 3, 500]))
def test_a_pack_is_its_documents_side_by_side(documents: list[Document], pad_to: int | None) -> None:
    batch = pack(documents, images_of(documents), pad_id=PAD_ID, pad_to=pad_to)
    total = sum(map(len, documents))
    assert batch.attention_mask is None
    assert batch.input_ids.shape == batch.label_weights.shape == batch.label_groups.shape == (1, max(total, pad_to or 0))
    assert batch.positions.shape == (4, *batch.input_ids.shape)
    assert batch.cu_seqlens.tolist() == batch.borders
    assert batch.cu_seqlens.dtype == torch.int32
    assert len(batch.borders) == len(documents) + 1 + (pad_to is not None and pad_to > total)
    for number, one in enumerate(documents):
        here = slice(batch.borders[number], batch.borders[number + 1])
        np.testing.assert_array_equal(batch.input_ids[0, here], one.input_ids)
        np.testing.assert_array_equal(batch.positions[:, 0, here], one.positions)
        np.testing.assert_array_equal(batch.label_weights[0, here], one.label_weights)
        np.testing.assert_array_equal(batch.label_groups[0, here], one.label_groups)
    assert batch.num_useful_tokens == total
    assert (batch.input_ids[0, total:] == PAD_ID).all()
    # Nothing is predicted across a seam, and padding is predicted by nothing.
    assert not batch.label_weights[0, batch.borders[:-1]].any()
    assert not batch.label_weights[0, total:].any()
    assert (batch.positions[0, 0, batch.borders[:-1]] == 0).all()


@given(some_documents, st.sampled_from([None, 3, 40]))
def test_padded_rows_are_its_documents(documents: list[Document], pad_to: int | None) -> None:
    batch = pad(documents, images_of(documents), pad_id=PAD_ID, pad_to=pad_to)
    assert batch.attention_mask is not None
    width = max(*map(len, documents), pad_to or 0, 0)
    assert batch.input_ids.shape == (len(documents), width)
    assert batch.attention_mask.sum(1).tolist() == [len(one) for one in documents]
    for number, one in enumerate(documents):
        here = batch.attention_mask[number]
        assert here[: len(one)].all()
        np.testing.assert_array_equal(batch.input_ids[number, here], one.input_ids)
        np.testing.assert_array_equal(batch.positions[:, number, here], one.positions)
        np.testing.assert_array_equal(batch.label_weights[number, here], one.label_weights)
        assert not batch.label_weights[number, ~here].any()
        assert (batch.label_groups[number, ~here] == NO_LABEL).all()
        assert (batch.input_ids[number, ~here] == PAD_ID).all()


@given(some_documents)
def test_packed_and_padded_hold_the_same(documents: list[Document]) -> None:
    packed, padded = (collate(documents, images_of(documents), pad_id=PAD_ID) for collate in (pack, pad))
    assert packed.weight == pytest.approx(padded.weight, rel=1e-12)
    assert packed.weight == pytest.approx(sum(float(one.label_weights.sum(dtype=np.float64)) for one in documents), rel=1e-12)
    assert packed.num_useful_tokens == padded.num_useful_tokens
    assert packed.sample_ids == padded.sample_ids == [one.sample_id for one in documents]
    assert torch.equal(packed.pixels, padded.pixels)
    assert torch.equal(packed.image_grid_thw, padded.image_grid_thw)
    assert torch.equal(packed.input_ids[0], padded.input_ids[padded.attention_mask])


@given(some_documents)
def test_pixels_lie_one_after_another(documents: list[Document]) -> None:
    images = images_of(documents)
    batch = pack(documents, images, pad_id=PAD_ID)
    assert batch.image_sizes_hw.shape == batch.image_grid_thw[:, :2].shape == (len(images), 2)
    assert batch.pixels.dtype == torch.uint8
    place = 0
    for image, (height, width) in zip(images, batch.image_sizes_hw.tolist(), strict=True):
        stop = place + 3 * height * width
        np.testing.assert_array_equal(batch.pixels[place:stop].view(height, width, 3), image)
        place = stop
    assert place == len(batch.pixels)


def test_an_image_of_another_size_is_our_own_mistake() -> None:
    one = document(0, 5, 1)
    with pytest.raises(AssertionError, match="one image for each slot"):
        pack([one], [np.zeros((14, 14, 3), np.uint8)], pad_id=PAD_ID)
    with pytest.raises(AssertionError, match="one image for each slot"):
        pack([one], [], pad_id=PAD_ID)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("pad_to", [None, 64])
def test_a_dummy_weighs_nothing(packed: bool, pad_to: int | None) -> None:
    batch = dummy(4, packed=packed, pad_id=PAD_ID, pad_to=pad_to, dropped=["a.jpg is gone"])
    assert batch.weight == 0.0
    assert batch.num_useful_tokens == 0
    assert batch.sample_ids == []
    assert batch.num_dropped == 1
    assert batch.input_ids.shape[0] == 1
    assert batch.input_ids.shape[1] == (pad_to or batch.input_ids.shape[1]) > 1
    assert set(batch.input_ids.flatten().tolist()) == {PAD_ID}
    assert len(batch.pixels) == len(batch.image_sizes_hw) == 0
    assert (batch.attention_mask is None) == packed


def test_moving_keeps_everything_but_sizes_on_the_host() -> None:
    documents = [document(0, 7, 1), document(1, 3, 0)]
    batch = pad(documents, images_of(documents), pad_id=PAD_ID)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.pixels.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.attention_mask is not None
    assert moved.attention_mask.device.type == "meta"
    assert moved.image_sizes_hw.device.type == "cpu"
    assert (moved.borders, moved.weight, moved.sample_ids) == (batch.borders, batch.weight, batch.sample_ids)


def test_a_batch_crosses_processes() -> None:
    documents = [document(0, 7, 1)]
    batch = pack(documents, images_of(documents), pad_id=PAD_ID)
    copy: MicroBatch = pickle.loads(pickle.dumps(batch))  # noqa: S301
    assert torch.equal(copy.pixels, batch.pixels)
    assert copy.borders == batch.borders
