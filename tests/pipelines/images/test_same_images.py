"""Files of the same content, and pictures that look alike."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from boxcar.pipelines import storage
from boxcar.pipelines.images.same_images import difference_hash, look_alikes, same_content, shared_images
from boxcar.schemas.errors import ImageError


def _files(folder: Path, **contents: bytes) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in contents}


def test_pairs_of_two_lists_by_content(tmp_path: Path) -> None:
    a = _files(tmp_path / "a", one=b"abc", two=b"xyz", three=b"longer")
    b = _files(tmp_path / "b", copy=b"abc", again=b"abc", other=b"abd", big=b"much longer")
    found = shared_images(list(a.values()), list(b.values()))
    assert found == [(a["one"], b["copy"]), (a["one"], b["again"])]
    assert shared_images([], list(b.values())) == shared_images(list(a.values()), []) == []


def test_one_path_in_both_lists_is_a_pair(tmp_path: Path) -> None:
    a = _files(tmp_path, one=b"abc", two=b"abc")
    assert shared_images([a["one"], a["one"]], [a["one"]]) == [(a["one"], a["one"])]


def test_groups_within_one_list(tmp_path: Path) -> None:
    a = _files(tmp_path, z=b"1", a=b"22", b=b"1", c=b"3", d=b"22", e=b"1")
    assert same_content(list(a.values())) == [[a["z"], a["b"], a["e"]], [a["a"], a["d"]]]


def test_only_files_of_equal_sizes_are_read_and_links_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = _files(tmp_path, one=b"abc", two=b"abd", alone=b"of its own size")
    links = []
    for number in range(5):
        link = tmp_path / f"link{number}"
        os.symlink(a["alone" if number % 2 else "one"], link)
        links.append(str(link))
    read: list[str] = []
    real = storage.hash_file

    def counted(path: str) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(storage, "hash_file", counted)
    groups = same_content([*a.values(), *links])
    assert sorted(read) == sorted([a["one"], a["two"]])
    assert groups == [[a["one"], links[0], links[2], links[4]], [a["alone"], links[1], links[3]]]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.jpg") as caught:
        shared_images([str(tmp_path / "gone.jpg")], [])
    assert caught.value.reason == "missing_image"


def _photograph(seed: int) -> Image.Image:
    """Blobs of light, as a photograph has them."""
    noise = Image.effect_noise((12, 9), 90).convert("RGB")
    return noise.resize((320, 240), Image.Resampling.BICUBIC) if seed >= 0 else noise


def test_smaller_and_recompressed_copies_look_alike(tmp_path: Path) -> None:
    pictures = [_photograph(number) for number in range(6)]
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    copy, smaller = str(tmp_path / "copy.jpg"), str(tmp_path / "smaller.jpg")
    pictures[0].save(copy, quality=70)
    pictures[1].resize((160, 120)).save(smaller, quality=80)
    blank = [str(tmp_path / f"blank{number}.png") for number in range(2)]
    for number, path in enumerate(blank):
        Image.new("RGB", (50, 50), (number * 200, 10, 10)).save(path)
    every = [*paths, copy, smaller, *blank]
    groups = look_alikes(every, [difference_hash(path) for path in every])
    assert groups == [[paths[0], copy], [paths[1], smaller]]


@given(st.lists(st.integers(1, 2**64 - 2), max_size=30), st.data())
def test_the_groups_are_those_of_all_pairs(values: list[int], data: st.DataObject) -> None:
    near = [value ^ (1 << data.draw(st.integers(0, 63))) ^ (1 << data.draw(st.integers(0, 63))) for value in values]
    hashes = [value for value in [*values, *near] if value not in (0, 2**64 - 1)]
    names = [str(number) for number in range(len(hashes))]
    groups = look_alikes(names, hashes)
    joined: dict[str, set[str]] = {name: {name} for name in names}
    for i, first in enumerate(hashes):
        for j, second in enumerate(hashes):
            if (first ^ second).bit_count() <= 4:
                union = joined[names[i]] | joined[names[j]]
                for name in union:
                    joined[name] = union
    expected = {frozenset(group) for group in joined.values() if len(group) > 1}
    assert {frozenset(group) for group in groups} == expected
