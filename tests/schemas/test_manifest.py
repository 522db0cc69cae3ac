"""The manifest: canonical, sealed, and made of counts that add up in any order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import MANIFEST_NAME, BlockHash, Counts, FileEntry, Finding, Manifest, Rejections, dump, load
from tests.small_sets import CONTRACT

COUNTS = Counts(
    records_read=5,
    records_written=3,
    rows_written=4,
    images=4,
    boxes_read=9,
    boxes_kept=8,
    turns={"detect": 4, "caption": 1},
    records_rejected={"missing_image": Rejections(2, ["a.json, image 7: Straße 🙂.jpg"])},
    rules={"overhang": Finding(kept=0, fixed=1, dropped=2, examples=['image 3, "cat": [1, 2, 3, 4]'])},
    visual_tokens=1200,
    text_tokens=345,
    total_tokens_histogram={"386": 4},
    difficulty_histograms={"detect": {"17": 4}},
)
MANIFEST = Manifest(
    boxcar_version="0.1.0",
    contract=CONTRACT,
    settings={"cutoff_len": 1024, "languages": {"en": 0.5, "zh": 0.5}, "captions": None, "tasks": {"caption": {"prompts": {}}}},
    source_fingerprint="00ff",
    source_notes=["a note"],
    images_root="/data/images",
    sizes_trusted=False,
    shards=[FileEntry("rows-00000.arrow", 4, 1234, [BlockHash(0, 1000, "0f" * 16), BlockHash(1000, 234, "f0" * 16)])],
    image_shards=[],
    quarantine=[FileEntry("rejected-00000.jsonl", 2, 100, [BlockHash(0, 100, "00" * 16)])],
    counts=COUNTS,
)


def put(folder: Path, data: bytes) -> Path:
    (folder / MANIFEST_NAME).write_bytes(data)
    return folder


def test_dump_and_load_are_inverse_to_the_byte(tmp_path: Path) -> None:
    data = dump(MANIFEST)
    back = load(put(tmp_path, data))
    assert msgspec.structs.replace(back, manifest_xxh3_128=MANIFEST.manifest_xxh3_128) == MANIFEST
    assert dump(back) == data


def test_the_bytes_do_not_depend_on_the_order_in_which_things_were_counted() -> None:
    backwards = msgspec.structs.replace(COUNTS, turns=dict(reversed(list(COUNTS.turns.items()))))
    settings = dict(reversed(list(MANIFEST.settings.items())))
    assert dump(msgspec.structs.replace(MANIFEST, counts=backwards, settings=settings)) == dump(MANIFEST)


def test_a_manifest_is_readable_json_of_one_line_a_value() -> None:
    assert b'\n "boxcar_version": "0.1.0",\n' in dump(MANIFEST)
    assert "Straße 🙂.jpg" in dump(MANIFEST).decode()


@given(
    text=st.text(st.characters(codec="utf-8")),
    number=st.integers(0, 2**62),
    share=st.floats(allow_nan=False, allow_infinity=False),
    key=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_any_text_and_number_survive(tmp_path_factory: pytest.TempPathFactory, text: str, number: int, share: float, key: str) -> None:
    counts = msgspec.structs.replace(COUNTS, records_read=number, rules={key: Finding(examples=[text])})
    manifest = msgspec.structs.replace(MANIFEST, source_notes=[text], settings={key: share, "b": text}, counts=counts)
    back = load(put(tmp_path_factory.getbasetemp(), dump(manifest)))
    assert back.source_notes == [text]
    assert back.settings == {**{key: share}, "b": text}
    assert back.counts == counts


def is_refused(folder: Path) -> bool:
    try:
        load(folder)
    except ShardError:
        return True
    return False


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    data = dump(MANIFEST)
    unseen = []
    with open(put(tmp_path, data) / MANIFEST_NAME, "r+b", buffering=0) as file:  # in place: 30,000 new files take a minute

        def write(position: int, byte: int) -> None:
            file.seek(position)
            file.write(bytes([byte]))

        for position, byte in enumerate(data):
            for bit in range(8):
                write(position, byte ^ 1 << bit)
                if not is_refused(tmp_path):
                    unseen.append((position, bit))
            write(position, byte)
    assert unseen == []
    assert not is_refused(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="last byte cut"),
        pytest.param(lambda data: data + b"\n", id="a byte more"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"[]", id="a list"),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="byte order mark"),
        pytest.param(lambda data: data.replace(b'"records_read": 5', b'"records_read": 6'), id="edited by hand"),
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="line ends of another system"),
        pytest.param(lambda data: msgspec.json.encode(msgspec.json.decode(data)), id="formatted anew"),
        pytest.param(lambda data: data.replace(b'{\n "boxcar', b'{\n "more": 1,\n "boxcar'), id="a key more"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ShardError, match="expected the file as it was written"):
        load(put(tmp_path, damage(dump(MANIFEST))))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        pytest.param({"format_version": 2}, "format 'boxcar-shards' version 2", id="newer"),
        pytest.param({"format": "other"}, "format 'other' version 1", id="of something else"),
    ],
)
def test_a_manifest_of_another_version_is_refused_by_its_version(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ShardError, match=f"found {found}, expected 'boxcar-shards' version 1"):
        load(put(tmp_path, dump(msgspec.structs.replace(MANIFEST, **changes))))


def test_without_a_manifest_the_conversion_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"found no such file, expected the manifest of a complete conversion.*goes on where it stopped"):
        load(tmp_path)
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ShardError, match="directory"):
        load(tmp_path)


# ---- counts

small = st.integers(0, 1000)
words = st.sampled_from(["a", "b", "c"])
histograms = st.dictionaries(words, st.integers(1, 1000))
rejections = st.dictionaries(words, st.builds(Rejections, small, st.lists(words, max_size=3)))
counts_of_units = st.builds(
    Counts,
    records_read=small,
    records_written=small,
    rows_written=small,
    images=small,
    images_shrunk=small,
    boxes_read=small,
    boxes_kept=small,
    turns=histograms,
    records_rejected=rejections,
    turns_rejected=rejections,
    rules=st.dictionaries(words, st.builds(Finding, small, small, small, st.lists(words, max_size=3))),
    visual_tokens=small,
    text_tokens=small,
    total_tokens_histogram=histograms,
    visual_tokens_histogram=histograms,
    difficulty_histograms=st.dictionaries(words, histograms),
)


def total(units: list[Counts]) -> Counts:
    result = Counts()
    for unit in units:
        result.add(unit)
    return result


def numbers(value: object) -> object:
    """All that is counted, without the examples, which are the first ones seen."""
    plain = msgspec.to_builtins(value)
    if isinstance(plain, dict):
        return {key: numbers(item) for key, item in plain.items() if key != "examples"}
    return plain


@given(st.lists(counts_of_units, max_size=4))
def test_counts_add_up_in_any_order(units: list[Counts]) -> None:
    assert numbers(total(units)) == numbers(total(units[::-1]))


@given(counts_of_units, counts_of_units, counts_of_units)
def test_counts_add_up_in_any_grouping_examples_included(a: Counts, b: Counts, c: Counts) -> None:
    assert total([total([a, b]), c]) == total([a, total([b, c])])


@given(counts_of_units)
def test_nothing_added_is_nothing_changed(counts: Counts) -> None:
    assert total([counts]) == counts
    assert total([counts, Counts()]) == counts


@given(counts_of_units, counts_of_units)
def test_adding_counts_every_field_and_leaves_the_summand_alone(a: Counts, b: Counts) -> None:
    before = msgspec.json.encode(b)
    both = total([a, b])
    for name in ("records_read", "records_written", "rows_written", "images", "images_shrunk", "boxes_read", "boxes_kept"):
        assert getattr(both, name) == getattr(a, name) + getattr(b, name)
    for name in ("turns", "total_tokens_histogram", "visual_tokens_histogram"):
        assert sum(getattr(both, name).values()) == sum(getattr(a, name).values()) + sum(getattr(b, name).values())
    assert both.num_rejected == a.num_rejected + b.num_rejected
    assert both.visual_tokens + both.text_tokens == a.visual_tokens + a.text_tokens + b.visual_tokens + b.text_tokens
    assert sum(finding.found for finding in both.rules.values()) == sum(f.found for unit in (a, b) for f in unit.rules.values())
    both.add(a)
    assert msgspec.json.encode(b) == before


def test_the_first_examples_stay() -> None:
    units = [Counts(records_rejected={"a": Rejections(2, [f"{unit}.0", f"{unit}.1"])}) for unit in range(3)]
    assert total(units).records_rejected["a"] == Rejections(6, ["0.0", "0.1", "1.0"])


def test_every_field_of_the_counts_is_added() -> None:
    """A field that is new in Counts and forgotten in `add` would stay 0."""
    ones = {name: {int: 1}.get(type(value), value) for name, value in msgspec.structs.asdict(Counts()).items()}
    filled = Counts(**ones)
    for name in Counts.__struct_fields__:
        if isinstance(getattr(filled, name), dict):
            example = {"difficulty_histograms": {"a": {"1": 1}}, "rules": {"a": Finding(kept=1)}}
            entry: Any = {"a": Rejections(1)} if name.endswith("rejected") else {"a": 1}
            setattr(filled, name, example.get(name, entry))
    twice = total([filled, filled])
    for name in Counts.__struct_fields__:
        assert getattr(twice, name) != getattr(filled, name), name
