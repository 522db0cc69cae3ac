"""An audit's counts are those of the conversion, for every family and setting; its columns survive the disk, cuts and shards."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from boxcar.pipelines.audit.annotations import Candidate, Reading, candidate_of, read_annotations
from boxcar.pipelines.audit.columns import Things, load, save
from boxcar.pipelines.audit.portrait import Portrait, portrait_of
from boxcar.pipelines.audit.shards import open_folders, read_shards
from boxcar.pipelines.audit.what_if import Landscape, Outcome, Trial, landscape_of, measure, measure_shrunk, outcome_of
from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.turns.lint import labels_alike, lint_records
from boxcar.schemas.errors import ConfigError, ContractError, ShardError
from boxcar.schemas.manifest import Counts
from boxcar.schemas.record import DialogueTurn, ImageMark
from boxcar.schemas.workflow import ConvertConfig
from tests.places import SHARED
from tests.small_sets import run, write_coco
from tests.small_tokenizers import TOKENIZER_OF_FAMILY, folder_of
from tests.small_units import record, region

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not (DATA / "coco_mini").is_dir(), reason="shared/data does not lie beside the checkout")


def config_of(source: Mapping[str, Any], family: str, output: Path, **changes: Any) -> ConvertConfig:
    settings = {"family": family, "tokenizer": folder_of(TOKENIZER_OF_FAMILY[family]), "cutoff_len": 1024, "executor": "inline"}
    return ConvertConfig.model_validate({**settings, **source, "output": str(output), **changes})


def cutoff_of(family: str, cutoff: int) -> int:
    """Beyond what one image takes in a family of one large size."""
    more = {"cogvlm": 1100, "cogvlm_chat": 1100, "cogvlm2": 2200}.get(family, 0)
    return min(cutoff + more, FAMILIES[family].max_sequence)


def demo_source(demo: Path) -> dict[str, Any]:
    paths = {"annotations": demo / "instances.json", "captions": demo / "captions.json", "images": demo / "images"}
    return {"reader": "coco", "records_per_shard": 5, **{key: str(path) for key, path in paths.items()}}


def comparable(counts: Counts) -> dict[str, Any]:
    """Counts without what an audit does not make (difficulty) and without examples; rules by what became of them."""
    plain: dict[str, Any] = msgspec.to_builtins(counts)
    del plain["difficulty_histograms"]
    for name in ("records_rejected", "turns_rejected"):
        plain[name] = {reason: entry["count"] for reason, entry in plain[name].items()}
    plain["rules"] = {rule: (entry["kept"], entry["fixed"], entry["dropped"]) for rule, entry in plain["rules"].items()}
    return plain


def audited(reading: Reading, candidate: Candidate) -> tuple[Outcome, Landscape, Portrait]:
    """The workflow's own setting over all chunks."""
    config, grammar, limits = candidate.config, candidate.grammar, candidate.frame.limits
    outcome, landscape, portrait = Outcome(), Landscape(), Portrait()
    for things, texts in reading.chunks(candidate):
        shrunk = measure_shrunk(things, texts, grammar, limits, config.cutoff_len) if config.shrink_images else None
        measured, max_pixels = shrunk or (measure(things, texts, grammar, limits), None)
        outcome.add(outcome_of(things, texts, grammar, measured, Trial(limits, config.cutoff_len, config.over_length, max_pixels)))
        landscape.add(landscape_of(things, texts, grammar, measure(things, texts, grammar, limits)))
        rule = grammar.rule(config.cutoff_len)
        portrait.add(portrait_of(things, texts, grammar, measured, rule, split=config.over_length == "split"))
    return outcome, landscape, portrait


def check_equal(config: ConvertConfig, work: Path) -> None:
    """Convert and audit: one set of counts."""
    candidate = candidate_of(config)
    reading = read_annotations([candidate], work)
    manifest = run(config)
    outcome, landscape, portrait = audited(reading, candidate)
    expected, found = comparable(manifest.counts), comparable(outcome.counts)
    kept, _, dropped = expected["rules"].pop("under_one_token", (0, 0, 0))
    if not config.shrink_images:
        assert landscape.under_one == kept + dropped
    found["boxes_kept"] -= dropped
    found["records_read"] += len(reading.plan.rejected)
    for entry in reading.plan.rejected:
        found["records_rejected"][entry.reason] = found["records_rejected"].get(entry.reason, 0) + 1
    assert found == expected
    assert sum(portrait.kinds.values()) == manifest.counts.visual_tokens + manifest.counts.text_tokens
    assert {task: share.turns for task, share in portrait.tasks.items()} == manifest.counts.turns


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_counts_as_its_conversion(family: str, demo: Path, tmp_path: Path) -> None:
    for number, (over, cutoff) in enumerate(product(("plan", "split"), (330, 1024))):
        config = config_of(demo_source(demo), family, tmp_path / f"shards-{number}", cutoff_len=cutoff_of(family, cutoff), over_length=over)
        check_equal(config, tmp_path / "work")


@pytest.mark.parametrize(
    "changes",
    [{"shrink_images": True, "cutoff_len": 200}, {"rules": {"under_one_token": "drop"}, "image_max_pixels": 12544}],
    ids=["shrink", "drop"],
)
def test_policies_count_as_in_conversion(changes: dict[str, Any], demo: Path, tmp_path: Path) -> None:
    check_equal(config_of(demo_source(demo), "qwen2_5_vl", tmp_path / "shards", **changes), tmp_path / "work")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", ["coco_mini", "bccd"])
def test_real_sets_count_as_their_conversion(name: str, family: str, tmp_path: Path) -> None:
    coco = {"reader": "coco", "annotations": str(DATA / name / "instances.json"), "captions": str(DATA / name / "captions.json")}
    source = {**coco, "images": str(DATA / name / "images")} if name == "coco_mini" else {"reader": "voc", "annotations": str(DATA / name)}
    settings: list[dict[str, Any]] = [{"cutoff_len": 600}, {"cutoff_len": 500, "over_length": "split"}]
    if FAMILIES[family].resize.limits_matter:
        settings += [{"cutoff_len": 300, "image_max_pixels": 200_704, "shrink_images": True}]
    for number, changes in enumerate(settings):
        changes["cutoff_len"] = cutoff_of(family, changes["cutoff_len"])
        check_equal(config_of(source, family, tmp_path / f"shards-{number}", **changes), tmp_path / "work")


def test_a_second_audit_reads_nothing_again_and_a_new_family_adds_its_texts(demo: Path, tmp_path: Path) -> None:
    first = candidate_of(config_of(demo_source(demo), "qwen2_5_vl", tmp_path / "shards"))
    second = candidate_of(config_of(demo_source(demo), "qwen3_vl", tmp_path / "shards"))
    calls: list[tuple[int, int]] = []
    reading = read_annotations([first], tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    calls.clear()
    read_annotations([first], tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(3, 3)]
    (reading.folder / "things-00001.columns").unlink()  # as where a run stopped
    calls.clear()
    both = read_annotations([first, second], tmp_path, lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, 3)
    assert both.folder == reading.folder
    assert audited(both, first)[0].counts == audited(reading, first)[0].counts


def test_other_annotations_are_other_columns(demo: Path, tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "set", [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}])
    source = {"reader": "coco", "annotations": str(annotations), "trust_sizes": True}
    candidate = candidate_of(config_of(source, "qwen2_5_vl", tmp_path / "shards"))
    first = read_annotations([candidate], tmp_path / "work")
    write_coco(tmp_path / "set", [{"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48} for number in (1, 2)])
    second = read_annotations([candidate], tmp_path / "work")
    assert first.folder != second.folder
    assert [things.num_records for things in second.things()] == [2]


def test_damaged_columns_are_named(demo: Path, tmp_path: Path) -> None:
    candidate = candidate_of(config_of(demo_source(demo), "qwen2_5_vl", tmp_path / "shards"))
    reading = read_annotations([candidate], tmp_path)
    path = reading.folder / "things-00000.columns"
    things = load(path, Things)
    save(tmp_path / "copy.columns", things)
    assert (tmp_path / "copy.columns").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ShardError, match=r"things-00000\.columns: found columns that cannot be read"):
        load(path, Things)


def test_what_hangs_on_two_policies_at_once_is_refused(demo: Path, tmp_path: Path) -> None:
    both = config_of(demo_source(demo), "qwen2_5_vl", tmp_path / "shards", rules={"under_one_token": "drop"}, shrink_images=True)
    with pytest.raises(ConfigError, match="under_one_token: drop together with shrink_images"):
        read_annotations([candidate_of(both)], tmp_path)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "cogvlm"])
@pytest.mark.parametrize(
    "changes", [{}, {"over_length": "split", "cutoff_len": 400}, {"shrink_images": True, "cutoff_len": 200}], ids=["all", "split", "shrunk"]
)
def test_shards_give_the_same_lengths(family: str, changes: dict[str, Any], demo: Path, tmp_path: Path) -> None:
    changes = {**changes, "cutoff_len": cutoff_of(family, changes.get("cutoff_len", 1024))}
    config = config_of(demo_source(demo), family, tmp_path / "shards", **changes)
    manifest = run(config)
    candidate = candidate_of(config)
    outcome, landscape = Outcome(), Landscape()
    for things, texts in read_shards(open_folders([tmp_path / "shards"]), candidate.frame, candidate.grammar):
        measured = measure(things, texts, candidate.grammar, candidate.frame.limits)
        outcome.add(outcome_of(things, texts, candidate.grammar, measured, Trial(candidate.frame.limits, config.cutoff_len)))
        landscape.add(landscape_of(things, texts, candidate.grammar, measured))
    found, counts = outcome.counts, manifest.counts
    assert found.total_tokens_histogram == counts.total_tokens_histogram
    assert found.visual_tokens_histogram == counts.visual_tokens_histogram
    assert (found.visual_tokens, found.text_tokens, found.turns, found.images) == (
        counts.visual_tokens,
        counts.text_tokens,
        counts.turns,
        counts.images,
    )
    assert outcome.turns_lost == 0
    assert landscape.boxes > 0


def test_shards_at_another_resolution_cost_what_a_conversion_there_does(demo: Path, tmp_path: Path) -> None:
    """Qwen2.5-VL's boxes have fewer digits in a smaller image."""
    config = config_of(demo_source(demo), "qwen2_5_vl", tmp_path / "shards", cutoff_len=4096)
    smaller = config.model_copy(update={"image_max_pixels": 6272, "output": str(tmp_path / "smaller")})
    run(config)
    expected = run(smaller).counts
    candidate, there = candidate_of(config), candidate_of(smaller)
    outcome = Outcome()
    for things, texts in read_shards(open_folders([tmp_path / "shards"]), candidate.frame, candidate.grammar):
        measured = measure(things, texts, candidate.grammar, there.frame.limits)
        outcome.add(outcome_of(things, texts, candidate.grammar, measured, Trial(there.frame.limits, 4096)))
    assert outcome.counts.total_tokens_histogram == expected.total_tokens_histogram
    assert outcome.counts.text_tokens < run(config.model_copy(update={"output": str(tmp_path / "again")})).counts.text_tokens


def test_shards_of_two_contracts_are_not_mixed(demo: Path, tmp_path: Path) -> None:
    run(config_of(demo_source(demo), "qwen2_5_vl", tmp_path / "a"))
    run(config_of(demo_source(demo), "qwen3_vl", tmp_path / "b"))
    with pytest.raises(ContractError, match="another frame contract"):
        open_folders([tmp_path / "a", tmp_path / "b"])


def test_wording_is_linted() -> None:
    dialogue = (
        DialogueTurn(("What is here? ", ImageMark(0)), ("Not found.",)),
        DialogueTurn((ImageMark(1), "And <image> there?"), ("a dog",)),
    )
    odd = record("1", regions=(region(" dog"),), dialogue=dialogue)
    found = lint_records([odd, record("2", regions=(region("cat"),))])
    assert {name: entry.count for name, entry in found.items()} == {
        "image_after_text": 1,
        "other_not_found": 1,
        "image_in_later_turn": 1,
        "marker_in_text": 1,
        "label_spacing": 1,
    }
    assert "row 1" in found["image_after_text"].examples[0]
    assert labels_alike(["Dog", "dog", "cat", "traffic_light", "Traffic light"]) == [["Dog", "dog"], ["Traffic light", "traffic_light"]]


def test_images_and_boxes_of_a_resolution(demo: Path, tmp_path: Path) -> None:
    candidate = candidate_of(config_of(demo_source(demo), "qwen3_vl", tmp_path / "shards"))
    reading = read_annotations([candidate], tmp_path)
    _, landscape, portrait = audited(reading, candidate)
    assert landscape.heat.sum() == landscape.boxes == landscape.iou[:, 0].sum()
    means = landscape.iou[:, 1][landscape.iou[:, 0] > 0] / landscape.iou[:, 0][landscape.iou[:, 0] > 0]
    assert ((means > 0.8) & (means <= 1)).all()
    assert int(np.arange(len(landscape.image_tokens)) @ landscape.image_tokens) == landscape.visual_tokens
    assert portrait.longest == sorted(portrait.longest, key=lambda one: (-one.value, one.sample_id))
