"""`boxcar verify` finds every flipped bit, and every row that contradicts itself though all hashes are right."""

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from PIL import Image

from boxcar.pipelines.shards.arrow_files import write_rows
from boxcar.pipelines.shards.work_folder import STATE_FOLDER
from boxcar.pipelines.verify import MAX_PROBLEMS_PER_FILE, verify_folder
from boxcar.schemas import manifest as manifests
from boxcar.schemas.manifest import MANIFEST_NAME, Finding, Manifest, Rejections
from boxcar.schemas.row import IMAGE_SHARD_SCHEMA, ROW_SCHEMA
from tests.small_sets import config, contents, copy_demo, demo_config, read_rows, read_table, rewrite_manifest, run, write_coco

NUM_FLIPS = 300
Row = dict[str, Any]


@pytest.fixture(scope="module")
def conversion(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with embedded images and one quarantine. To be copied."""
    folder = tmp_path_factory.mktemp("conversion")
    source = copy_demo(demo, folder / "source")
    (source / "images" / "scene_0002.png").unlink()
    run(demo_config(source, folder / "out", image_storage="embed", records_per_shard=6))
    return folder / "out"


@pytest.fixture
def shards(conversion: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(conversion, tmp_path / "shards")
    return tmp_path / "shards"


# ---- all is well


def test_a_conversion_verifies(conversion: Path) -> None:
    report = verify_folder(conversion)
    rows = read_rows(conversion)
    assert report.problems == []
    assert report.num_files == len(contents(conversion)) == 6
    assert (report.num_rows, report.num_turns) == (11, sum(len(row["turns"]) for row in rows))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"family": "qwen2_vl"}, id="Qwen2-VL"),
        pytest.param({"family": "qwen3_vl"}, id="Qwen3-VL"),
        pytest.param({"over_length": "split", "cutoff_len": 300}, id="split rows"),
        pytest.param({"cutoff_len": 200, "shrink_images": True}, id="shrunk images"),
        pytest.param({"image_max_pixels": 10_000}, id="few pixels"),
        pytest.param({"image_storage": "embed_resized"}, id="resized images"),
        pytest.param({"trust_sizes": True}, id="trusted sizes"),
        pytest.param({"rules": {"overhang": "keep", "crowd": "keep"}}, id="other rules"),
        pytest.param({"languages": {"en": 0.5, "zh": 0.5}, "tasks": {"describe": {"share": 1}, "absent": {"share": 1}}}, id="other turns"),
    ],
)
def test_every_kind_of_conversion_verifies(demo: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = run(demo_config(demo, tmp_path, **changes))
    assert manifest.counts.rows_written > 0
    assert manifest.counts.images_shrunk > 0 or "shrink_images" not in changes
    assert verify_folder(tmp_path).problems == []


def test_a_copy_elsewhere_verifies_without_its_state(shards: Path) -> None:
    shutil.rmtree(shards / STATE_FOLDER)
    assert verify_folder(shards).problems == []


def test_progress_names_every_file_and_the_end(conversion: Path) -> None:
    told: list[tuple[str, int, int]] = []
    verify_folder(conversion, lambda *what: told.append(what))
    assert {name for name, _, _ in told} == {*contents(conversion), ""} - {MANIFEST_NAME}
    assert [number for _, number, _ in told] == list(range(6))
    assert {total for _, _, total in told} == {5}


# ---- bits and files


def test_every_flipped_bit_of_every_file_is_found(shards: Path) -> None:
    files = contents(shards)
    chance = random.Random(20261121)
    unseen = []
    for number in range(NUM_FLIPS):
        name = list(files)[number % len(files)]
        position = chance.randrange(8 * len(files[name]))
        damaged = bytearray(files[name])
        damaged[position // 8] ^= 1 << position % 8
        (shards / name).write_bytes(damaged)
        if not any(name in problem for problem in verify_folder(shards).problems):
            unseen.append((name, position))
        (shards / name).write_bytes(files[name])
    assert unseen == []
    assert verify_folder(shards).problems == []


@pytest.mark.parametrize("name", ["rows-00000.arrow", "images-00001.arrow", "rejected-00000.jsonl"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="cut"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"), id="last byte"),
        pytest.param(lambda path: path.unlink(), id="deleted"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a folder"),
    ],
)
def test_a_damaged_file_is_reported_by_name_and_the_others_are_still_checked(
    shards: Path, name: str, damage: Callable[[Path], object]
) -> None:
    damage(shards / name)
    report = verify_folder(shards)
    [problem] = report.problems
    assert problem.startswith(name)
    assert report.num_rows == (6 if name.startswith("rows") else 11)


def test_files_that_nobody_knows_are_reported(shards: Path) -> None:
    (shards / "notes.txt").touch()
    (shards / "rows-00002.arrow").write_bytes((shards / "rows-00001.arrow").read_bytes())
    assert verify_folder(shards).problems == [
        "notes.txt: found a file that the manifest does not know",
        "rows-00002.arrow: found a file that the manifest does not know",
    ]


def test_two_shards_that_changed_places_are_reported(shards: Path) -> None:
    first, second = shards / "rows-00000.arrow", shards / "rows-00001.arrow"
    first.rename(shards / "aside")
    second.rename(first)
    (shards / "aside").rename(second)
    assert {problem.partition(",")[0].partition(":")[0] for problem in verify_folder(shards).problems} == {first.name, second.name}


@pytest.mark.parametrize("what", ["none", "a file", "an empty folder", "a stopped run"])
def test_what_is_no_complete_conversion_is_reported(conversion: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "shards"
    if what == "a file":
        folder.touch()
    elif what == "an empty folder":
        folder.mkdir()
    elif what == "a stopped run":
        shutil.copytree(conversion, folder)
        (folder / MANIFEST_NAME).unlink()
    report = verify_folder(folder)
    [problem] = report.problems
    assert "manifest.json" in problem
    assert "expected the manifest of a complete conversion" in problem


# ---- rows that contradict themselves, under right hashes


def reseal(folder: Path, change: Callable[[Manifest], object]) -> None:
    manifest = manifests.load(folder)
    change(manifest)
    rewrite_manifest(folder, manifest)


def rewrite_rows(folder: Path, change: Callable[[list[Row]], None], number: int = 0) -> None:
    """Change the rows of a shard, with its hashes and the manifest's made right again."""
    manifest = manifests.load(folder)
    path = folder / manifest.shards[number].name
    rows = read_table(path).to_pylist()
    change(rows)
    manifest.shards[number] = write_rows(path, pa.Table.from_pylist(rows, ROW_SCHEMA))
    rewrite_manifest(folder, manifest)


def test_rewriting_rows_unchanged_is_no_damage(shards: Path) -> None:
    before = contents(shards)
    rewrite_rows(shards, lambda rows: None)
    assert contents(shards) == before


def detected(row: Row) -> Row:
    """The first turn that answers with boxes."""
    turn: Row = next(turn for turn in row["turns"] if turn["task"] == "detect")
    return turn


def swap_ids(ids: list[int], old: int, new: int) -> None:
    ids[ids.index(old)] = new


def _set(*path: str | int, value: object) -> Callable[[list[Row]], None]:
    """Set a value in the second row."""

    def change(rows: list[Row]) -> None:
        at: Any = rows[1]
        for step in path[:-1]:
            at = at[step]
        assert at[path[-1]] != value, "this would change nothing"
        at[path[-1]] = value

    return change


def _add(*path: str | int, by: float = 1) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        at: Any = rows[1]
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] += by

    return change


def _shift_box(rows: list[Row]) -> None:
    box = detected(rows[1])["boxes"][0]
    box[0] -= 3


def _box_outside(rows: list[Row]) -> None:
    detected(rows[1])["boxes"][0][2] = rows[1]["images"][0]["width"] + 1


def _box_empty(rows: list[Row]) -> None:
    box = detected(rows[1])["boxes"][0]
    box[2] = box[0]


def _box_missing(rows: list[Row]) -> None:
    turn = detected(rows[1])
    turn["boxes"], turn["labels"] = turn["boxes"][1:], turn["labels"][1:]


def _box_not_finite(rows: list[Row]) -> None:
    detected(rows[1])["boxes"][0][1] = float("nan")


def _wrong_label(rows: list[Row]) -> None:
    turn = detected(rows[1])
    turn["labels"] = ["zebra"] * len(turn["labels"])


def _other_text(rows: list[Row]) -> None:
    turn = detected(rows[1])
    turn["answer"] = turn["answer"].replace('"label": "', '"label": "a ')


def _broken_text(rows: list[Row]) -> None:
    detected(rows[1])["answer"] = "somewhere on the left"


def _absent_with_box(rows: list[Row]) -> None:
    row, turn = next((row, turn) for row in rows for turn in row["turns"] if turn["task"] == "absent")
    turn["answer"] = detected(row)["answer"]


def _second_placeholder(rows: list[Row]) -> None:
    rows[1]["header_ids"].append(_image_token(rows))


def _placeholder_in_question(rows: list[Row]) -> None:
    swap_ids(detected(rows[1])["prompt_ids"], detected(rows[1])["prompt_ids"][0], _image_token(rows))


def _no_placeholder(rows: list[Row]) -> None:
    swap_ids(rows[1]["header_ids"], _image_token(rows), 0)


def _image_token(rows: list[Row]) -> int:
    ids: list[int] = rows[1]["header_ids"]
    return ids[-2]  # <|vision_start|><|image_pad|><|vision_end|>


def _id_lost(rows: list[Row]) -> None:
    turn = detected(rows[1])
    del turn["answer_ids"][-1], turn["answer_is_coordinate"][-1]


def _flag_lost(rows: list[Row]) -> None:
    del detected(rows[1])["answer_is_coordinate"][-1]


def _turn_lost(rows: list[Row]) -> None:
    del rows[1]["turns"][0]


def _row_lost(rows: list[Row]) -> None:
    del rows[1]


def _row_twice(rows: list[Row]) -> None:
    rows[1] = rows[0]


def _no_turns(rows: list[Row]) -> None:
    rows[1]["turns"] = []


def _other_image(rows: list[Row]) -> None:
    detected(rows[1])["image_index"] = 1


def _no_image_for_boxes(rows: list[Row]) -> None:
    detected(rows[1])["image_index"] = -1


def _sizes_swapped(rows: list[Row]) -> None:
    image = rows[1]["images"][0]
    image["width"], image["height"] = image["height"], image["width"]


SEMANTIC = [
    pytest.param(_add("total_tokens"), "total_tokens", id="total tokens"),
    pytest.param(_add("text_tokens"), "text_tokens", id="text tokens"),
    pytest.param(_add("visual_tokens"), "visual_tokens", id="visual tokens"),
    pytest.param(_add("header_tokens"), "header_tokens", id="header tokens"),
    pytest.param(_add("max_turn_tokens", by=-1), "max_turn_tokens", id="longest turn"),
    pytest.param(_id_lost, "total_tokens", id="an id lost"),
    pytest.param(_flag_lost, "answer_is_coordinate is not as long as answer_ids", id="a flag lost"),
    pytest.param(_turn_lost, "total_tokens", id="a turn lost"),
    pytest.param(_no_turns, "no turns", id="no turns"),
    pytest.param(_row_lost, "rows written", id="a row lost"),
    pytest.param(_row_twice, "a sample id twice", id="a row twice"),
    pytest.param(_shift_box, "the boxes of the row are", id="box shifted"),
    pytest.param(_box_outside, "a box outside the image", id="box outside"),
    pytest.param(_box_empty, "a box outside the image", id="box without extent"),
    pytest.param(_box_missing, "the boxes of the row are|no box", id="box missing"),
    pytest.param(_box_not_finite, "a box that is not finite", id="box not finite"),
    pytest.param(_wrong_label, "the labels of the row are", id="label"),
    pytest.param(_other_text, "the answer names", id="label in the text"),
    pytest.param(_broken_text, "not in the family's form", id="text without a box"),
    pytest.param(_absent_with_box, "boxes for an absent object", id="absent with a box"),
    pytest.param(_second_placeholder, "2 image tokens for 1 images", id="placeholder too many"),
    pytest.param(_placeholder_in_question, "2 image tokens for 1 images", id="placeholder in a question"),
    pytest.param(_no_placeholder, "0 image tokens for 1 images", id="placeholder missing"),
    pytest.param(_other_image, "image_index 1 of 1 images", id="image beyond the last"),
    pytest.param(_no_image_for_boxes, "no box|image_index", id="boxes without an image"),
    pytest.param(_add("images", 0, "grid_h"), "against the resize rule", id="grid height"),
    pytest.param(_add("images", 0, "grid_w", by=-1), "against the resize rule", id="grid width"),
    pytest.param(_add("images", 0, "grid_t"), "against the resize rule", id="temporal grid"),
    pytest.param(_add("images", 0, "resized_width", by=28), "against the resize rule", id="resized width"),
    pytest.param(_add("images", 0, "visual_tokens"), "against the resize rule", id="visual tokens of an image"),
    pytest.param(_sizes_swapped, "against the resize rule|outside", id="width and height swapped"),
    pytest.param(_set("images", 0, "orientation", value=9), "orientation 9", id="orientation"),
    pytest.param(_set("images", 0, "shard", value=7), "image shard 7", id="image shard"),
    pytest.param(_set("images", 0, "shard_row", value=400), "image shard", id="row of the image shard"),
    pytest.param(_set("images", 0, "shard", value=None), "neither|image", id="no place of the image"),
    pytest.param(_set("images", 0, "path", value="a.jpg"), "both|image", id="two places of the image"),
    pytest.param(_set("turns", 0, "difficulty", value=1.5), "a difficulty outside", id="difficulty"),
    pytest.param(_set("turns", 0, "difficulty", value=float("nan")), "a difficulty outside", id="difficulty not a number"),
    pytest.param(_set("turns", 0, "weight", value=0.0), "a weight that is not positive", id="weight"),
    pytest.param(_set("turns", 0, "task", value="paint"), "task 'paint'", id="task"),
]


@pytest.mark.parametrize(("change", "reported"), SEMANTIC)
def test_a_row_that_contradicts_itself_is_reported(shards: Path, change: Callable[[list[Row]], None], reported: str) -> None:
    name = read_rows(shards)[1]["sample_id"]
    rewrite_rows(shards, change)
    problems = verify_folder(shards).problems
    assert any(part in problem for problem in problems for part in reported.split("|")), problems
    if change not in (_row_lost, _row_twice, _absent_with_box):
        assert any(problem.startswith(f"rows-00000.arrow, row {name}") for problem in problems), "the row is named"


def test_a_row_over_the_cutoff_is_reported(shards: Path) -> None:
    longest = max(row["max_turn_tokens"] for row in read_rows(shards))
    reseal(shards, lambda manifest: manifest.settings.update(cutoff_len=longest - 1))
    [problem] = verify_folder(shards).problems
    assert f"{longest} tokens with one turn, over cutoff_len {longest - 1}" in problem


def test_a_row_of_another_pixel_budget_is_reported(shards: Path) -> None:
    def other(manifest: Manifest) -> None:
        manifest.contract = msgspec.structs.replace(manifest.contract, max_pixels=20_000)

    reseal(shards, other)
    assert any("against the resize rule" in problem for problem in verify_folder(shards).problems)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        pytest.param(lambda counts: setattr(counts, "records_read", 13), "13 records read, 11 written + 1 rejected", id="read"),
        pytest.param(lambda counts: setattr(counts, "rows_written", 12), "12 rows written, 11 found", id="rows"),
        pytest.param(lambda counts: counts.turns.update(paint=1), "turns written", id="turns"),
        pytest.param(lambda counts: counts.records_rejected.update(x=Rejections(1)), "11 written + 2 rejected", id="rejected"),
        pytest.param(lambda counts: setattr(counts, "visual_tokens", 1), "visual_tokens", id="visual tokens"),
        pytest.param(lambda counts: setattr(counts, "text_tokens", 1), "text_tokens", id="text tokens"),
    ],
)
def test_counts_that_do_not_add_up_are_reported(shards: Path, change: Callable[[Any], object], reported: str) -> None:
    reseal(shards, lambda manifest: change(manifest.counts))
    problems = verify_folder(shards).problems
    assert any(problem.startswith("manifest: ") and reported in problem for problem in problems), problems


def test_a_manifest_of_an_unknown_family_is_reported(shards: Path) -> None:
    def rename(manifest: Manifest) -> None:
        manifest.contract = msgspec.structs.replace(manifest.contract, family="gpt")

    reseal(shards, rename)
    assert any("'gpt'" in problem for problem in verify_folder(shards).problems)


def test_a_manifest_without_a_setting_that_is_needed_is_reported(shards: Path) -> None:
    reseal(shards, lambda manifest: manifest.settings.clear())
    assert verify_folder(shards).problems != []


def rewrite_images(folder: Path, change: Callable[[list[Row]], object]) -> None:
    manifest = manifests.load(folder)
    path = folder / manifest.image_shards[0].name
    rows = read_table(path).to_pylist()
    change(rows)
    manifest.image_shards[0] = write_rows(path, pa.Table.from_pylist(rows, IMAGE_SHARD_SCHEMA))
    rewrite_manifest(folder, manifest)


def _png(size_wh: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size_wh).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        pytest.param(lambda rows: rows[1].update(bytes=rows[1]["bytes"][:-40]), "complete image file", id="cut"),
        pytest.param(lambda rows: rows[1].update(bytes=b""), "0 bytes", id="emptied"),
        pytest.param(lambda rows: rows[1].update(bytes=_png((3, 5))), "found (3, 5) after decoding", id="another picture"),
        pytest.param(lambda rows: rows[1].update(orientation=6), "after decoding, expected", id="orientation"),
        pytest.param(lambda rows: rows.pop(), "image shard 0", id="one image less than rows say"),
    ],
)
def test_a_stored_image_that_is_not_what_it_says_is_reported(shards: Path, change: Callable[[list[Row]], object], reported: str) -> None:
    rewrite_images(shards, change)
    problems = verify_folder(shards).problems
    assert any(reported in problem for problem in problems), problems


def test_many_problems_of_a_file_are_cut_short(demo: Path, tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 100} for number in range(MAX_PROBLEMS_PER_FILE + 5)]
    boxes = [{"image_id": image["id"], "category_id": 1, "bbox": [1, 2, 30, 40]} for image in images]
    path = write_coco(tmp_path, images, boxes)
    run(config(path, tmp_path / "out", demo / "tokenizer", trust_sizes=True, records_per_shard=1000))

    def damage(rows: list[Row]) -> None:
        for row in rows:
            row["header_tokens"] += 1

    rewrite_rows(tmp_path / "out", damage)
    problems = verify_folder(tmp_path / "out").problems
    assert len(problems) == MAX_PROBLEMS_PER_FILE + 1
    assert problems[-1] == "rows-00000.arrow: 5 more problems"


def test_findings_of_the_rules_are_no_problems(shards: Path) -> None:
    reseal(shards, lambda manifest: manifest.counts.rules.update(overhang=Finding(fixed=5)))
    assert verify_folder(shards).problems == []
