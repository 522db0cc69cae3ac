"""The stream: every micro-batch is what its pack says, on any rank, from any step, in any process; bad images by policy."""

import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.images.image_file import load_image, resize_image
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import ImageError, ShardError, TrainingError
from boxcar.schemas.training import LossConfig, PlanConfig
from boxcar.train.data.collate import MicroBatch
from boxcar.train.data.documents import compose
from boxcar.train.data.store import ShardStore
from boxcar.train.data.stream import PackDataset, PlanSteps, StreamConfig, stream
from boxcar.train.planning.index import quantile_tables, read_index
from boxcar.train.planning.plan import plan_epoch
from boxcar.train.planning.plan_table import PLAN_SCHEMA
from tests.small_sets import boxcar, copy_demo, demo_config, run, write_coco
from tests.small_tokenizers import TOKENIZER_OF_FAMILY, folder_of

LOSS = LossConfig(tasks={"caption": 0.5}, coordinates=2.0)
Documents = Sequence[tuple[int, Sequence[int]]]


def config(**changes: Any) -> StreamConfig:
    return StreamConfig(**{"loss": LOSS, **changes})


def plan_of(steps: Sequence[Sequence[Documents]]) -> pa.Table:
    """A plan by hand: steps of packs of (row, turns)."""
    rows = [
        {"step": step, "phase": 0, "documents": [{"row": row, "turns": list(turns)} for row, turns in documents]}
        for step, packs in enumerate(steps)
        for documents in packs
    ]
    numbers = {"num_tokens": 0, "num_patches": 0, "cost": 0.0}
    return pa.Table.from_pylist([{**row, **numbers} for row in rows], PLAN_SCHEMA)


@pytest.fixture(scope="module")
def shards(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, by reference. To be read only."""
    folder = tmp_path_factory.mktemp("stream") / "shards"
    run(demo_config(demo, folder))
    return folder


@pytest.fixture(scope="module")
def store(shards: Path) -> ShardStore:
    return ShardStore([str(shards)])


PLAN = plan_of(
    [
        [[(0, [0, 1]), (3, [2])], [(1, [0])], [(2, [1, 0]), (4, [0])]],
        [[(5, [0])], [(6, [0]), (7, [0]), (8, [0])], [(9, [0])], [(10, [1])]],
        [[(11, [0])]],
    ]
)
"""Three steps: 3, 4 and 1 packs."""


def same(left: MicroBatch, right: MicroBatch) -> bool:
    tensors = ("input_ids", "positions", "label_weights", "label_groups", "pixels", "image_sizes_hw", "image_grid_thw", "cu_seqlens")
    return (left.sample_ids, left.weight, left.dropped) == (right.sample_ids, right.weight, right.dropped) and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in tensors
    )


def assert_same_steps(left: list[list[MicroBatch]], right: list[list[MicroBatch]]) -> None:
    assert [len(step) for step in left] == [len(step) for step in right]
    assert all(same(*pair) for one, other in zip(left, right, strict=True) for pair in zip(one, other, strict=True))


# ---- what a micro-batch holds


def test_packs_hold_their_documents_and_images(store: ShardStore) -> None:
    quantiles = quantile_tables(store.folders)
    network = find_family(store.contract.family).network
    made = list(stream(store, PLAN, config()))
    steps = PlanSteps(PLAN)
    assert len(made) == 3
    for step, batches in enumerate(made):
        for number, batch in zip(steps.packs(step), batches, strict=True):
            place = 0
            specs = steps.documents(number)
            for index, (row, turns) in enumerate(specs):
                document = compose(store.row(row), turns, store.contract, network, LOSS, quantiles)
                here = slice(batch.borders[index], batch.borders[index + 1])
                np.testing.assert_array_equal(batch.input_ids[0, here], document.input_ids)
                np.testing.assert_array_equal(batch.label_weights[0, here], document.label_weights)
                np.testing.assert_array_equal(batch.positions[:, 0, here], document.positions)
                for slot in document.images:
                    assert slot.path is not None
                    pixels = np.asarray(resize_image(load_image(slot.path), slot.resized_wh))
                    np.testing.assert_array_equal(batch.pixels[place : place + pixels.size], pixels.reshape(-1))
                    place += pixels.size
            assert batch.sample_ids == [store.row(row)["sample_id"] for row, _ in specs]
            assert len(batch.borders) == len(specs) + 1
            # As many placeholders as the tower will give features: what transformers checks in its forward.
            placeholders = int((batch.input_ids == store.contract.image_token_id).sum())
            assert placeholders == int(batch.image_grid_thw.prod(dim=1).sum()) // 4


def test_a_real_plan_comes_out_whole(shards: Path, store: ShardStore) -> None:
    index = read_index([str(shards)])
    plan = plan_epoch(index, PlanConfig(shards=(str(shards),), global_batch=3), 0)
    batches = [batch for step in stream(store, plan.packs, config()) for batch in step]
    assert sum(batch.num_useful_tokens for batch in batches) == plan.counts.tokens
    assert sorted({name for batch in batches for name in batch.sample_ids}) == sorted({store.row(row)["sample_id"] for row in range(12)})


@pytest.mark.parametrize("image_storage", ["embed", "embed_resized"])
def test_embedded_images_give_the_same_pixels(demo: Path, store: ShardStore, tmp_path: Path, image_storage: str) -> None:
    run(demo_config(demo, tmp_path / "shards", image_storage=image_storage))
    embedded = ShardStore([str(tmp_path / "shards")])
    assert_same_steps(list(stream(embedded, PLAN, config())), list(stream(store, PLAN, config())))


def test_padded_rows(store: ShardStore) -> None:
    (batch,) = next(stream(store, PLAN, config(packing="padded", micro_batch=3)))
    assert batch.attention_mask is not None
    assert batch.input_ids.shape[0] == len(batch.sample_ids) == 5


def test_packs_are_filled_up(store: ShardStore) -> None:
    made = [batch for step in stream(store, PLAN, config(pad_to=4096), world_size=2, rank=1) for batch in step]
    assert {tuple(batch.input_ids.shape) for batch in made} == {(1, 4096)}
    # Never with an image token, which would ask for features that are not there.
    fill = {int(batch.input_ids[0, -1]) for batch in made}
    assert fill == {store.contract.turn_close_ids[0]}


def test_a_plan_in_slices_and_chunks(store: ShardStore) -> None:
    chunked = pa.concat_tables([PLAN.slice(0, 2), PLAN.slice(2, 4), PLAN.slice(6)])
    assert_same_steps(list(stream(store, chunked, config())), list(stream(store, PLAN, config())))
    assert len(list(stream(store, PLAN.slice(0, 4), config()))) == 2


def test_an_image_of_several_documents_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVLM: one question an image, so that a row becomes several documents of one pack."""
    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "a.png")
    boxes = [{"image_id": 1, "category_id": number, "bbox": [1, 2, 20, 20], "iscrowd": 0, "area": 400} for number in (1, 2)]
    path = write_coco(tmp_path, [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}], boxes)
    tokenizer = folder_of(TOKENIZER_OF_FAMILY["cogvlm_224"])
    run(demo_config_of(path, tmp_path / "shards", tokenizer, family="cogvlm_224", cutoff_len=2048))
    cogvlm = ShardStore([str(tmp_path / "shards")])
    decoded: list[str] = []

    def counted(where: str) -> Image.Image:
        decoded.append(where)
        return load_image(where)

    monkeypatch.setattr("boxcar.train.data.stream.load_image", counted)
    ((batch,),) = stream(cogvlm, plan_of([[[(0, [0]), (0, [1])]]]), config())
    assert len(decoded) == 1
    assert batch.image_sizes_hw.tolist() == [[224, 224]] * 2
    assert batch.sample_ids[0] == batch.sample_ids[1]
    assert batch.positions.shape[0] == 1
    # An image of 258 placeholders takes three positions.
    assert int(batch.positions[0, 0, batch.borders[1] - 1]) == batch.borders[1] - 1 - 255


def demo_config_of(annotations: Path, output: Path, tokenizer: str, **changes: Any) -> Any:
    from tests.small_sets import config as coco_config  # noqa: PLC0415  (this module has a `config` of its own)

    return coco_config(annotations, output, tokenizer, **changes)


# ---- ranks, steps, processes


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ranks_share_the_steps(store: ShardStore, world_size: int, micro_batch: int) -> None:
    alone = list(stream(store, PLAN, config()))
    ranks = [list(stream(store, PLAN, config(micro_batch=micro_batch), rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        counts = {len(made[step]) for made in ranks}
        assert len(counts) == 1, "a rank with fewer micro-batches would let the others wait for ever"
        batches = [batch for made in ranks for batch in made[step]]
        assert sorted(name for batch in batches for name in batch.sample_ids) == sorted(
            name for batch in whole for name in batch.sample_ids
        )
        assert sum(batch.weight for batch in batches) == pytest.approx(sum(batch.weight for batch in whole))
        assert sum(batch.num_useful_tokens for batch in batches) == sum(batch.num_useful_tokens for batch in whole)
        for batch in batches:
            assert bool(batch.sample_ids) == (batch.weight > 0), "a dummy weighs nothing"


@pytest.mark.parametrize("rank", [0, 1])
def test_from_any_step_the_rest_is_the_same(store: ShardStore, rank: int) -> None:
    whole = list(stream(store, PLAN, config(), rank=rank, world_size=2))
    for first in range(5):
        assert_same_steps(list(stream(store, PLAN, config(), first_step=first, rank=rank, world_size=2)), whole[first:])


@pytest.mark.parametrize("loader_workers", [1, 2])
def test_loader_processes_change_nothing(store: ShardStore, loader_workers: int) -> None:
    made = list(stream(store, PLAN, config(loader_workers=loader_workers, micro_batch=2)))
    assert_same_steps(made, list(stream(store, PLAN, config(micro_batch=2))))


def test_a_stream_that_is_left_takes_its_processes_along(store: ShardStore) -> None:
    before = set(multiprocessing.active_children())
    steps = stream(store, PLAN, config(loader_workers=2))
    next(steps)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del steps
    assert not set(multiprocessing.active_children()) - before


def test_a_loader_process_that_dies_is_named(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import os  # noqa: PLC0415
    import signal  # noqa: PLC0415

    monkeypatch.setattr(PackDataset, "make", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TrainingError, match="loader_workers"):
        list(stream(store, PLAN, config(loader_workers=1)))


# ---- bad images


@pytest.fixture
def spoilt(demo: Path, tmp_path: Path) -> tuple[ShardStore, Path]:
    """A conversion whose third image was overwritten afterwards."""
    data = copy_demo(demo, tmp_path / "demo")
    run(demo_config(data, tmp_path / "shards"))
    store = ShardStore([str(tmp_path / "shards")])
    path = Path(store.row(2)["images"][0]["path"])
    path.write_bytes(path.read_bytes()[:200])
    return store, path


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_stop_names_sample_row_image_and_path(spoilt: tuple[ShardStore, Path], loader_workers: int) -> None:
    store, path = spoilt
    with pytest.raises(ImageError) as caught:
        list(stream(store, PLAN, config(loader_workers=loader_workers)))
    for part in (f"sample {store.row(2)['sample_id']} (row 2), image 1 of 1", str(path), "Fetch the file again"):
        assert part in str(caught.value)
    assert caught.value.reason == "truncated_image"
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_skip_leaves_the_sample_out_and_says_so(spoilt: tuple[ShardStore, Path], store: ShardStore, loader_workers: int) -> None:
    bad, path = spoilt
    made = list(stream(bad, PLAN, config(on_bad_image="skip", loader_workers=loader_workers)))
    whole = list(stream(store, PLAN, config()))
    batch, intact = made[0][2], whole[0][2]
    assert (batch.num_dropped, len(batch.dropped)) == (1, 1)
    assert str(path) in batch.dropped[0]
    assert batch.sample_ids == intact.sample_ids[1:]
    # What is left weighs what it weighed: the loss is divided by the true sum over all ranks.
    rest = slice(intact.borders[1], intact.borders[2])
    assert torch.equal(batch.label_weights[0], intact.label_weights[0, rest])
    assert torch.equal(batch.input_ids[0], intact.input_ids[0, rest])
    assert torch.equal(batch.pixels, intact.pixels[-len(batch.pixels) :])
    untouched = [(step, number) for step, batches in enumerate(made) for number in range(len(batches)) if (step, number) != (0, 2)]
    assert all(same(made[step][number], whole[step][number]) for step, number in untouched)


def test_a_pack_of_bad_images_alone_is_a_dummy(spoilt: tuple[ShardStore, Path]) -> None:
    store, _ = spoilt
    ((batch,),) = stream(store, plan_of([[[(2, [0])]]]), config(on_bad_image="skip"))
    assert (batch.weight, batch.num_useful_tokens, batch.num_dropped, batch.sample_ids) == (0.0, 0, 1, [])


def test_a_missing_image_stops(spoilt: tuple[ShardStore, Path]) -> None:
    store, path = spoilt
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        list(stream(store, PLAN, config()))


def test_an_image_of_another_size_stops(spoilt: tuple[ShardStore, Path]) -> None:
    store, path = spoilt
    row = store.row(2)["images"][0]
    Image.new("RGB", (row["width"] + 1, row["height"])).save(path)
    with pytest.raises(ImageError, match=f"found {row['width'] + 1} x {row['height']} px .* expected {row['width']} x") as caught:
        list(stream(store, PLAN, config()))
    assert caught.value.reason == "image_changed"


def test_images_are_turned_upright(demo: Path, tmp_path: Path) -> None:
    data = copy_demo(demo, tmp_path / "demo")
    path = data / "images/scene_0001.png"
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    run(demo_config(data, tmp_path / "shards"))
    store = ShardStore([str(tmp_path / "shards")])
    ((batch,),) = stream(store, plan_of([[[(0, [0])]]]), config())
    height, width = batch.image_sizes_hw[0].tolist()
    np.testing.assert_array_equal(batch.pixels.view(height, width, 3), np.asarray(resize_image(upright, (width, height))))


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_damaged_shard_stops_whatever_the_policy(shards: Path, tmp_path: Path, on_bad_image: str, loader_workers: int) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    path = folder / manifests.load(folder).shards[0].name
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=f"{path.name}: found block 0"):
        list(stream(ShardStore([str(folder)]), PLAN, config(on_bad_image=on_bad_image, loader_workers=loader_workers)))
    assert boxcar("verify", folder).returncode != 0, "and verify finds it, too"


def test_a_plan_of_other_shards_stops(store: ShardStore) -> None:
    with pytest.raises(ShardError, match="plan again"):
        list(stream(store, plan_of([[[(12, [0])]]]), config()))
    with pytest.raises(ShardError, match="plan again"):
        list(stream(store, plan_of([[[(0, [77])]]]), config(loader_workers=1)))


@pytest.mark.slow
def test_loader_processes_of_remote_shards_start_anew(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections do not survive a fork: what is sent to a new interpreter must be enough to work there."""
    monkeypatch.setattr(ShardStore, "is_remote", property(lambda _: True))
    assert_same_steps(list(stream(store, PLAN, config(loader_workers=1))), list(stream(store, PLAN, config())))
