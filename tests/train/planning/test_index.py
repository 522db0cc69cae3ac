"""The index: what the shards say, read from any place, and no damaged shard goes by."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import xxhash

from boxcar.pipelines import storage
from boxcar.pipelines.boxes import difficulty
from boxcar.schemas import manifest as manifests
from boxcar.schemas.errors import BoxcarError, ContractError, ShardError
from boxcar.schemas.manifest import Manifest
from boxcar.schemas.row import ROW_SCHEMA
from boxcar.schemas.task import TASK_NAMES
from boxcar.schemas.training import PlanConfig
from boxcar.train.planning.index import QUANTILES, Folder, PlanIndex, quantile_tables, read_index
from boxcar.train.planning.plan import plan_epoch
from tests.small_sets import config, contents, demo_config, picture, read_rows, rewrite_manifest, run
from tests.small_tokenizers import TOKENIZER_OF_FAMILY, folder_of


@pytest.fixture(scope="module")
def shards(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set, in 6 shards. To be read only."""
    folder = tmp_path_factory.mktemp("index") / "shards"
    run(demo_config(demo, folder))
    return folder


@pytest.fixture(scope="module")
def dialogues(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of two images in their turns, beside a grounding sample. To be read only."""
    folder = tmp_path_factory.mktemp("index")
    for name in ("a.png", "b.png"):
        picture(folder / name, (112, 84))
    messages = [
        {"role": "user", "content": "<image>What is this?"},
        {"role": "assistant", "content": "A gradient."},
        {"role": "user", "content": "<image>And this?"},
        {"role": "assistant", "content": "Another."},
        {"role": "user", "content": "Are they alike?"},
        {"role": "assistant", "content": "Very much."},
    ]
    records = [{"messages": messages, "images": ["a.png", "b.png"]}, {"messages": messages[4:], "images": []}]
    path = folder / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    run(config(path, folder / "shards", demo / "tokenizer", reader="ms_swift"))
    return folder / "shards"


def check_against_rows(index: PlanIndex, folders: list[Path]) -> None:
    rows = [row for folder in folders for row in read_rows(folder)]
    contract = index.contract
    around = len(contract.answer_open_ids) + len(contract.turn_close_ids)
    assert index.num_rows == len(rows) > 0
    assert index.sample_keys.tolist() == [xxhash.xxh3_64_intdigest(row["sample_id"].encode()) for row in rows]
    assert index.base_tokens.tolist() == [row["header_tokens"] + row["visual_tokens"] for row in rows]
    assert index.visual_tokens.tolist() == [row["visual_tokens"] for row in rows]
    patches = [[image["grid_t"] * image["grid_h"] * image["grid_w"] for image in row["images"]] for row in rows]
    assert index.num_patches.tolist() == [sum(each) for each in patches]
    assert index.patches_squared.tolist() == [sum(one**2 for one in each) for each in patches]
    assert index.ordered.tolist() == [row["ordered"] for row in rows]
    assert [index.sources[code] for code in index.source_codes] == [row["source"] for row in rows]
    assert np.diff(index.turn_offsets).tolist() == [len(row["turns"]) for row in rows]
    turns = [turn for row in rows for turn in row["turns"]]
    image = contract.image_token_id
    assert index.turn_tokens.tolist() == [
        len(turn["prompt_ids"]) - turn["prompt_ids"].count(image) + len(turn["answer_ids"]) + around for turn in turns
    ]
    assert [TASK_NAMES[code] for code in index.turn_tasks] == [turn["task"] for turn in turns]
    for row, total in enumerate(row["total_tokens"] for row in rows):
        own = index.turn_tokens[index.turn_offsets[row] : index.turn_offsets[row + 1]]
        assert index.base_tokens[row] + own.sum() + (len(own) - 1) * index.turn_open_tokens == total


def test_columns_are_what_the_rows_say(shards: Path) -> None:
    index = read_index([str(shards)])
    check_against_rows(index, [shards])
    assert index.cutoff_len == 1024


def test_image_tokens_of_a_dialogue_count_once(dialogues: Path) -> None:
    index = read_index([str(dialogues)])
    check_against_rows(index, [dialogues])
    assert index.ordered.all()
    assert sorted(index.visual_tokens.tolist())[0] == 0


def test_a_row_of_one_question_an_image_pays_for_the_image_with_every_turn(demo: Path, tmp_path: Path) -> None:
    tokenizer = folder_of(TOKENIZER_OF_FAMILY["cogvlm"])
    run(demo_config(demo, tmp_path / "shards", family="cogvlm", tokenizer=str(tokenizer), cutoff_len=1600))
    index = read_index([str(tmp_path / "shards")])
    assert index.one_question_per_image
    rows = read_rows(tmp_path / "shards")
    lengths = [
        [index.base_tokens[row] + tokens for tokens in index.turn_tokens[index.turn_offsets[row] : index.turn_offsets[row + 1]]]
        for row in range(len(rows))
    ]
    assert [sum(own) for own in lengths] == [row["total_tokens"] for row in rows]
    assert [max(own) for own in lengths] == [row["max_turn_tokens"] for row in rows]


def test_folders_stand_one_after_another(shards: Path, dialogues: Path) -> None:
    index = read_index([str(shards), str(dialogues)])
    check_against_rows(index, [shards, dialogues])
    assert index.sources == ("instances", "talks")
    assert index.describe(0) == f"{shards}, row 0"
    assert index.describe(12) == f"{dialogues}, row 0"
    assert index.describe(13) == f"{dialogues}, row 1"


def test_the_plan_does_not_depend_on_the_cut_into_shards(demo: Path, tmp_path: Path, shards: Path) -> None:
    run(demo_config(demo, tmp_path / "one", records_per_shard=100))
    settings = PlanConfig.model_validate({"global_batch": 2, "schedule": {"turns_per_sample": 2}})
    first, second = (plan_epoch(read_index([str(folder)]), settings, 0) for folder in (shards, tmp_path / "one"))
    assert first.fingerprint == second.fingerprint


def test_a_quantile_is_the_share_of_easier_turns_of_the_task(shards: Path) -> None:
    index = read_index([str(shards)])
    turns = [turn for row in read_rows(shards) for turn in row["turns"]]
    for task in {turn["task"] for turn in turns}:
        of_task = [place for place, turn in enumerate(turns) if turn["task"] == task]
        bins = difficulty.bins(np.array([turns[place]["difficulty"] for place in of_task], np.float32))
        expected = [((bins < own).sum() + (bins == own).sum() / 2) / len(bins) for own in bins]
        assert (index.turn_quantiles[of_task] / QUANTILES).tolist() == pytest.approx(expected, abs=2 / QUANTILES)
        assert index.turn_quantiles[of_task].mean() / QUANTILES == pytest.approx(0.5, abs=1e-3)


def folder_with(histograms: dict[str, dict[str, int]], like: Manifest) -> Folder:
    counts = msgspec.structs.replace(like.counts, difficulty_histograms=histograms)
    return Folder("here", msgspec.structs.replace(like, counts=counts), 0)


def test_histograms_of_folders_add_up(shards: Path) -> None:
    like = manifests.load(shards)
    apart = [folder_with({"detect": {"5": 2, "9": 1}}, like), folder_with({"detect": {"5": 1}, "refer": {"0": 7}}, like)]
    tables = quantile_tables(apart)
    assert (tables == quantile_tables([folder_with({"detect": {"5": 3, "9": 1}, "refer": {"0": 7}}, like)])).all()
    detect = tables[TASK_NAMES.index("detect")] / QUANTILES
    assert detect[[0, 5, 7, 9, 4095]].tolist() == pytest.approx([0, 0.375, 0.75, 0.875, 1], abs=1e-4)
    assert tables[TASK_NAMES.index("refer"), 0] == QUANTILES // 2, "alike are in the middle"


# ---- mistakes


def copy_of(shards: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, data in contents(shards).items():
        (folder / name).write_bytes(data)
    return folder


def mistake(folders: list[Path], kind: type[BoxcarError] = ShardError) -> str:
    with pytest.raises(kind) as caught:
        read_index([str(folder) for folder in folders])
    return str(caught.value)


def test_no_folder_and_no_conversion_are_mistakes(tmp_path: Path) -> None:
    assert "found no folder" in mistake([])
    assert "manifest.json: found no such file, expected the manifest of a complete conversion" in mistake([tmp_path])


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path) -> None:
    copy = copy_of(shards, tmp_path / "copy")
    (copy / "rows-00003.arrow").unlink()
    assert "rows-00003.arrow: found no such file, expected the file that the manifest names" in mistake([copy])


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_shard_cut_short_is_named(shards: Path, tmp_path: Path, size: int) -> None:
    copy = copy_of(shards, tmp_path / "copy")
    path = copy / "rows-00002.arrow"
    path.write_bytes(path.read_bytes()[:size])
    assert "rows-00002.arrow: found a shard that cannot be read" in mistake([copy])


def test_flipped_bits_are_an_error_or_harmless_but_never_a_crash(shards: Path, tmp_path: Path) -> None:
    copy = copy_of(shards, tmp_path / "copy")
    path = copy / "rows-00001.arrow"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    plain, found, named = read_index([str(shards)]), 0, 0
    for _ in range(400):
        place = int(rng.integers(len(data)))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        try:
            index = read_index([str(copy)])
        except ShardError as error:
            named += "rows-00001.arrow" in str(error)
            found += 1
        else:
            assert index.num_rows == plain.num_rows
    assert found == named > 10


def test_lengths_that_do_not_add_up_are_found(shards: Path, tmp_path: Path) -> None:
    copy = copy_of(shards, tmp_path / "copy")
    path = copy / "rows-00001.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    place = ROW_SCHEMA.get_field_index("header_tokens")
    wrong = pa.array([table["header_tokens"][0].as_py(), table["header_tokens"][1].as_py() + 1], pa.int32())
    write(path, table.set_column(place, ROW_SCHEMA.field(place), wrong))
    message = mistake([copy])
    assert "rows-00001.arrow, row 1: found total_tokens" in message
    assert "boxcar verify" in message


def write(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda table: table.slice(1), "fewer rows than the manifest says", id="fewer rows"),
        pytest.param(lambda table: pa.concat_tables([table, table]), "more rows than the manifest says", id="more rows"),
        pytest.param(
            lambda table: table.replace_schema_metadata({"boxcar.schema": "row", "boxcar.version": "99"}),
            "found schema row version 99, expected row version 1",
            id="another version",
        ),
        pytest.param(lambda table: table.drop_columns(["split"]), "rows-00001.arrow", id="a column less"),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_found(shards: Path, tmp_path: Path, change: Any, message: str) -> None:
    copy = copy_of(shards, tmp_path / "copy")
    path = copy / "rows-00001.arrow"
    write(path, change(pa.ipc.open_file(path.read_bytes()).read_all()))
    assert message in mistake([copy])


def test_folders_of_two_contracts_do_not_mix(demo: Path, shards: Path, tmp_path: Path) -> None:
    run(demo_config(demo, tmp_path / "other", image_max_pixels=50_176))
    message = mistake([shards, tmp_path / "other"], ContractError)
    assert "max_pixels" in message
    assert f"{tmp_path / 'other'}, beside {shards}" in message


def test_a_manifest_that_counts_other_turns_is_found(shards: Path, tmp_path: Path) -> None:
    copy = copy_of(shards, tmp_path / "copy")
    manifest = manifests.load(copy)
    manifest.counts.turns["detect"] += 1
    rewrite_manifest(copy, manifest)
    assert "turns, expected as many as the manifest counts" in mistake([copy])


# ---- other places


def test_a_file_uri_is_the_local_folder(shards: Path) -> None:
    assert (read_index([f"file://{shards}"]).sample_keys == read_index([str(shards)]).sample_keys).all()


@pytest.fixture
def remote(shards: Path, monkeypatch: pytest.MonkeyPatch) -> pafs.FileSystem:
    """The shards on a file system that is not this machine's."""
    filesystem = pafs.SubTreeFileSystem(str(shards.parent), pafs.LocalFileSystem())
    resolve = storage.resolve

    def resolve_there(path: str) -> tuple[pafs.FileSystem, str]:
        return (filesystem, path.removeprefix("far://")) if path.startswith("far://") else resolve(path)

    monkeypatch.setattr(storage, "resolve", resolve_there)
    return filesystem


@pytest.mark.usefixtures("remote")
def test_remote_shards_give_the_same_plan(shards: Path) -> None:
    settings = PlanConfig(global_batch=2)
    near, far = (plan_epoch(read_index([path]), settings, 0) for path in (str(shards), f"far://{shards.name}"))
    assert near.fingerprint == far.fingerprint


@pytest.mark.usefixtures("remote")
def test_what_is_wrong_with_remote_shards_is_said_with_their_uri() -> None:
    with pytest.raises(ShardError, match=r"far://none/manifest\.json: found no such file"):
        read_index(["far://none"])
