"""`boxcar audit` and `boxcar diff` as people type them, and the page in a browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from boxcar.schemas.errors import ConfigError
from boxcar.tools.auditing.command import numbers, share
from boxcar.tools.auditing.grid import coarse, padded_fill, percentiles
from boxcar.tools.auditing.workflow_edit import write_settings
from boxcar.tools.quickstart.tiny_base import write_tiny_base
from boxcar.train.planning.packing import count_packs, fill_packs
from tests.small_sets import boxcar, picture, write_coco

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def write_workflow(folder: Path, demo: Path, **changes: Any) -> Path:
    section = {
        "reader": "coco",
        "annotations": str(demo / "instances.json"),
        "captions": str(demo / "captions.json"),
        "images": str(demo / "images"),
        "family": "qwen2_5_vl",
        "tokenizer": str(demo / "tokenizer"),
        "cutoff_len": 512,
        "output": str(folder / "shards"),
        "executor": "inline",
    }
    path = folder / "workflows.yaml"
    path.write_text(yaml.safe_dump({"set": {"convert": section | changes}}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def audited(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, what --json printed) of an audit of the demo set, with a page."""
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("audit")
    write_workflow(folder, demo)
    write_tiny_base(folder / "base", "qwen2_5_vl", str(demo / "tokenizer"))
    options = ["--as", "llama-factory", "--as", "ms-swift", "--base", folder / "base", "--html", "--json"]
    done = boxcar("audit", "set", "--pixels", "12544,65536,1003520", "--cutoffs", "64,256,512,2048", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_json_says_what_conversion_does(audited: tuple[Path, dict[str, Any]]) -> None:
    folder, result = audited
    assert json.loads((folder / "audits/set/audit.json").read_text()) == result
    done = boxcar("convert", "set", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    counts, [family] = json.loads(done.stdout), result["families"]
    own = next(one for one in family["settings"] if (one["cutoff_len"], one["max_pixels"]) == (family["cutoff_len"], family["max_pixels"]))
    for name in ("records_written", "rows_written", "turns", "visual_tokens", "text_tokens", "total_tokens_histogram", "boxes_kept"):
        assert family["counts"][name] == counts[name]
    assert own["turns"] - own["turns_lost"] == sum(counts["turns"].values())
    assert own["gpu_hours"] > 0
    assert own["memory_gb"] > 0
    assert {one["name"] for one in result["consumers"]} == {"llama-factory", "ms-swift"}
    again = boxcar("diff", folder / "audits/set", folder / "shards", cwd=folder)
    assert (again.returncode, again.stdout) == (0, "no difference in contract, counts and tokens\n"), again.stdout


def test_shards_are_audited_as_well(audited: tuple[Path, dict[str, Any]]) -> None:
    folder, result = audited
    if not (folder / "shards/manifest.json").exists():
        assert boxcar("convert", "set", cwd=folder).returncode == 0
    done = boxcar("audit", "shards", "--cutoffs", "512", "--json", "--out", "of-shards", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "shards"
    assert found["families"][0]["counts"]["total_tokens_histogram"] == result["families"][0]["counts"]["total_tokens_histogram"]
    printed = boxcar("audit", "shards", cwd=folder)
    assert printed.returncode == 0, printed.stderr
    assert "from shards: what conversion left out is not here" in printed.stdout.replace("\n", " ")


def test_an_audit_of_shards_counts_as_their_conversion_and_lies_beside_that_of_the_workflow(audited: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = audited
    assert boxcar("convert", "set", cwd=folder).returncode == 0
    of_workflow = (folder / "audits/set/audit.json").read_bytes()
    assert boxcar("audit", "shards", cwd=folder).returncode == 0
    assert (folder / "audits/set/audit.json").read_bytes() == of_workflow
    done = boxcar("diff", folder / "audits/shards-shards", folder / "shards", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "no difference in contract, counts and tokens\n"), done.stdout


def test_a_difference_is_named(audited: tuple[Path, dict[str, Any]], demo: Path, tmp_path: Path) -> None:
    folder, _ = audited
    write_workflow(tmp_path, demo, cutoff_len=256, image_max_pixels=12544)
    assert boxcar("audit", "set", cwd=tmp_path).returncode == 0
    done = boxcar("diff", folder / "audits/set", tmp_path / "audits/set")
    assert done.returncode == 1
    assert "contract.max_pixels: 12,845,056 -> 12,544  (-12,832,512)" in done.stdout
    assert "cutoff_len: 512 -> 256  (-256)" in done.stdout
    listed = json.loads(boxcar("diff", folder / "audits/set", tmp_path / "audits/set", "--json").stdout)
    assert {"what": "cutoff_len", "first": 512, "second": 256} in listed
    missing = boxcar("diff", folder / "audits/set", tmp_path)
    assert missing.returncode == 2
    assert "neither manifest.json nor audit.json" in missing.stderr


def test_the_tables_answer_at_once(audited: tuple[Path, dict[str, Any]], demo: Path, tmp_path: Path) -> None:
    write_workflow(tmp_path, demo)
    done = boxcar("audit", "set", "--as", "ms-swift:left", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = done.stdout.strip().splitlines()[0]
    assert first.startswith("qwen2_5_vl, cutoff_len 512, 12,845,056 px: ")
    for title in ("What if", "Cheapest setting that keeps", "Where the", "Small boxes", "Images of the same content: none"):
        assert title in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cutoffs", "10"], "no sample of which a turn fits"),
        (["--cutoffs", "0"], "whole numbers above 0"),
        (["--cutoffs", "9999999"], "1..128000"),
        (["--pixels", "100"], "one visual token"),
        (["--family", "qwen9_vl"], "expected one of qwen2_vl"),
        (["--as", "axolotl"], "llama-factory, ms-swift"),
        (["--gpu", "H9000"], "H200, H100"),
        (["--mfu", "2"], "a share above 0"),
        (["--keep", "120%"], "a share of the turns"),
        (["--base", "nowhere"], "a folder with config.json"),
        (["--base", "base"], "fits no family here"),
        (["--against", "other"], "no workflow 'other'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_answered(arguments: list[str], said: str, demo: Path, tmp_path: Path) -> None:
    write_workflow(tmp_path, demo, **({"cutoff_len": 10} if arguments == ["--cutoffs", "10"] else {}))
    write_tiny_base(tmp_path / "base", "qwen3_vl", str(demo / "tokenizer"))
    done = boxcar("audit", "set", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr


def test_keep_writes_the_cheapest_setting_and_nothing_else(demo: Path, tmp_path: Path) -> None:
    path = write_workflow(tmp_path, demo)
    path.write_text("# mine\n" + path.read_text().replace("cutoff_len: 512", "cutoff_len: 512  # tokens"))
    before = path.read_text()
    done = boxcar("audit", "set", "--keep", "100%", "--cutoffs", "256,384,512,1024", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "audits/set/audit.json").read_text())
    knee = next(one for one in result["families"][0]["knees"] if one["keep"] == 1)
    after = path.read_text()
    assert f"cutoff_len: {knee['cutoff_len']}  # tokens" in after
    assert f"image_max_pixels: {knee['max_pixels']}\n" in after
    assert after.startswith("# mine\n")
    assert yaml.safe_load(after)["set"]["convert"] == yaml.safe_load(before)["set"]["convert"] | {
        "cutoff_len": knee["cutoff_len"],
        "image_max_pixels": knee["max_pixels"],
    }
    assert "-> " in done.stdout
    again = boxcar("audit", "set", "--keep", "100%", "--cutoffs", "256,384,512,1024", "--pixels", str(knee["max_pixels"]), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert path.read_text() == after


def test_workflows_in_every_style_are_changed_safely(tmp_path: Path) -> None:
    path = tmp_path / "workflows.yaml"
    path.write_text("a:\n  convert: {reader: coco, cutoff_len: 512}  # flow\nb:\n  convert:\n    reader: voc  # block\n")
    assert write_settings(path, "a", {"cutoff_len": 1024, "image_max_pixels": 9}) == [
        "cutoff_len: 512 -> 1024",
        "image_max_pixels: not set -> 9",
    ]
    assert write_settings(path, "b", {"cutoff_len": 7}) == ["cutoff_len: not set -> 7"]
    assert write_settings(path, "b", {"cutoff_len": 7}) == []
    flow = "a:\n  convert: {image_max_pixels: 9, reader: coco, cutoff_len: 1024}  # flow\n"
    assert path.read_text() == flow + "b:\n  convert:\n    cutoff_len: 7\n    reader: voc  # block\n"
    shared = "a:\n  convert: &one\n    cutoff_len: 512\nb:\n  convert: *one\n"
    path.write_text(shared)
    with pytest.raises(ConfigError, match="other workflows share"):
        write_settings(path, "b", {"cutoff_len": 7})
    assert path.read_text() == shared


def test_duplicates_and_leakage_are_found(demo: Path, tmp_path: Path) -> None:
    scene = next((demo / "images").iterdir()).read_bytes()
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(scene)
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("ab", 1)]
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 40, 30]}
    write_coco(tmp_path / "train", images, [box])
    write_coco(tmp_path / "val", [{"id": 7, "file_name": "b.png"}], [{**box, "image_id": 7}])
    base = yaml.safe_load(write_workflow(tmp_path, demo).read_text())["set"]["convert"]
    del base["captions"]
    workflows = {
        name: {
            "convert": base | {"annotations": str(tmp_path / name / "instances.json"), "images": str(tmp_path / "images"), "source": name}
        }
        for name in ("train", "val")
    }
    (tmp_path / "workflows.yaml").write_text(yaml.safe_dump(workflows))
    done = boxcar("audit", "train", "--against", "val", "--perceptual", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    a, b = str(tmp_path / "images/a.png"), str(tmp_path / "images/b.png")
    assert result["duplicates"]["examples"] == result["look_alikes"]["examples"] == [[a, b]]
    assert result["leakage_counts"] == {"val": 2}
    assert result["leakage"]["val"] == [[a, b], [b, b]]


def test_the_audit_needs_no_torch(demo: Path, tmp_path: Path) -> None:
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    write_workflow(tmp_path, demo)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'peft')));"
        "from boxcar.tools.cli import main; main(['audit', 'set', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records_read"] == 12


# ---- arithmetic of the grid

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(lengths)
def test_packs_are_counted_as_the_trainer_fills_them(drawn: list[int]) -> None:
    values, counts = np.unique(np.array(drawn, np.int32), return_counts=True)
    assert count_packs(values, counts, 300) == int(fill_packs(np.array(drawn, np.int32), 300).max()) + 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_padding_is_the_expectation_over_all_batches(drawn: list[int], batch: int) -> None:
    from itertools import product  # noqa: PLC0415

    longest = [max(chosen) for chosen in product(drawn, repeat=batch)]
    expected = (sum(drawn) / len(drawn)) / (sum(longest) / len(longest))
    assert padded_fill(np.bincount(drawn), batch) == pytest.approx(expected)


@given(lengths)
def test_percentiles_and_bins_are_those_of_the_values(drawn: list[int]) -> None:
    histogram = np.bincount(drawn)
    found = percentiles(histogram)
    assert found["100"] == max(drawn)
    assert found["50"] == sorted(drawn)[-(-len(drawn) // 2) - 1]
    assert sum(coarse(histogram, 7).values()) == len(drawn)


def test_numbers_and_shares_of_the_command_line() -> None:
    assert numbers("4096, 1_024,1024", "--cutoffs") == [1024, 4096]
    assert (share("99.5%"), share("0.9"), share(None)) == (0.995, 0.9, None)


# ---- the page


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium without a network of its own; skips where it is not installed."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,1000",
        profile,
        *quiet,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def _shown(browser: Any) -> dict[str, str]:
    found: dict[str, str] = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('#tiles b')].map(one => [one.dataset.name, one.textContent]))"
    )
    return found


def _slide(browser: Any, name: str, place: int) -> None:
    browser.execute_script(
        "const slider = document.getElementById(arguments[0]); slider.value = arguments[1]; slider.dispatchEvent(new Event('input'))",
        name,
        place,
    )


def test_sliders_show_the_numbers_of_the_json(audited: tuple[Path, dict[str, Any]], browser: Any) -> None:
    folder, result = audited
    page = folder / "audits/set/audit.html"
    text = page.read_text()
    assert "<script src" not in text
    assert "<link" not in text
    browser.get(page.as_uri())
    [family] = result["families"]
    cutoffs = sorted({one["cutoff_len"] for one in family["settings"]})
    pixels = sorted({one["max_pixels"] for one in family["settings"]})
    for cutoff, high in ((64, 12544), (256, 1003520), (2048, 65536), (512, 12845056)):
        _slide(browser, "cutoff", cutoffs.index(cutoff))
        _slide(browser, "pixels", pixels.index(high))
        one = next(one for one in family["settings"] if (one["cutoff_len"], one["max_pixels"]) == (cutoff, high))
        shown = _shown(browser)
        kept = 1 - one["turns_lost"] / one["turns"]
        assert shown["turns kept"] == f"{kept:.2%}".replace("%", " %")
        for name, key in (
            ("turns lost", "turns_lost"),
            ("boxes lost", "boxes_lost"),
            ("samples whole", "whole"),
            ("samples long", "long"),
            ("samples trimmed", "trimmed"),
            ("samples rejected", "over"),
            ("tokens an epoch", "tokens"),
            ("steps an epoch", "steps"),
            ("boxes under one visual token", "under_one_token"),
        ):
            assert shown[name] == f"{one[key]:,}", (name, cutoff, high)
        assert one["gpu_hours"] < 0.01
        assert float(shown["GPU-seconds an epoch, H100"]) == pytest.approx(3600 * one["gpu_hours"], rel=5e-3)
    assert browser.execute_script("return document.querySelectorAll('.plot .main-svg').length") >= 6
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_labels_of_the_set_are_text_on_the_page(demo: Path, tmp_path: Path, browser: Any) -> None:
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    picture(tmp_path / "images" / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": 64, "height": 48}
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 5]}
    write_coco(
        tmp_path,
        [image],
        [box, {**box, "bbox": [2, 2, 30, 30]}, {**box, "category_id": 2, "bbox": [9, 9, 0, 9]}],
        categories=(evil, "cat", "Cat"),
    )
    path = write_workflow(tmp_path, demo, annotations=str(tmp_path / "instances.json"), images=str(tmp_path / "images"))
    workflow = yaml.safe_load(path.read_text())
    del workflow["set"]["convert"]["captions"]
    path.write_text(yaml.safe_dump(workflow))
    pytest.importorskip("plotly")
    done = boxcar("audit", "set", "--html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    browser.get((tmp_path / "audits/set/audit.html").as_uri())
    assert browser.title == "Token audit: instances"
    shown = browser.execute_script("return [...document.querySelectorAll('.card title, td')].map(one => one.textContent)")
    assert shown.count(evil) == 4  # both boxes, among the longest and the smallest
    assert f"category: {evil}" in shown
    assert not browser.execute_script("return document.querySelectorAll('img[src=x]').length")
