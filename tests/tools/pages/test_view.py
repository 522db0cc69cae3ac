"""The page: its boxes are those that the texts say, other people's text stays text, and a person can filter, rate and export."""

import html.parser
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boxcar.pipelines.families.catalog import find_family
from boxcar.schemas.errors import ConfigError, ShardError
from boxcar.tools.measuring.rate import figures_of, read_ratings
from boxcar.tools.pages.view import write_page
from boxcar.tools.pages.view_items import spread
from tests.small_results import write_results
from tests.small_sets import config, picture, read_rows, run, write_coco
from tests.tools.test_cli import invoke, mistake

LABELS = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</script><b>dog", "狗 & 'cat'\u2028\\")
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def places(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards and results of four pictures with hostile labels, for each family; the images of one embedded, of the other not."""
    folder = tmp_path_factory.mktemp("view")
    sizes = [(640, 480), (300, 500), (64, 48), (1200, 400)]
    images = []
    for number, size in enumerate(sizes, 1):
        picture(folder / "images" / f"{number}.png", size)
        images.append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
    boxes = [
        {
            "image_id": image,
            "category_id": 1 + (image + place) % 4,
            "bbox": [4 + 11 * place, 3 + 7 * place, 20.5 + 9 * image, 17 + 5 * image],
        }
        for image in (1, 2, 3, 4)
        for place in (0, 1, 2, 4)
        if image != 3 or place == 0
    ]
    annotations = write_coco(folder, images, boxes, LABELS)
    found = {}
    for family in FAMILIES:
        storage = "embed" if family == "qwen3_vl" else "reference"
        changes: dict[str, Any] = {"images": str(folder / "images"), "family": family, "cutoff_len": 4096, "image_storage": storage}
        shards = folder / f"shards-{family}"
        run(config(annotations, shards, demo / "tokenizer", **changes))
        found[f"shards-{family}"] = shards
        found[f"results-{family}"] = folder / f"results-{family}"
        write_results(found[f"results-{family}"], shards, logprobs=family == "qwen3_vl")
    return found


def data_of(index: Path) -> dict[str, Any]:
    text = index.read_text("utf-8")
    (found,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    content: dict[str, Any] = json.loads(found)
    return content


class _Reader(html.parser.HTMLParser):
    """What elements a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += attrs


# ---- what is written


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_what_the_texts_say(places: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Against the original boxes, taken to the resized image: within a model unit; predicted ones to the hundredth."""
    content = data_of(write_page(places[f"shards-{family}"], tmp_path / "page"))
    rows = {row["sample_id"]: row for row in read_rows(places[f"shards-{family}"])}
    assert sum(len(item["truth"]) for item in content["items"]) > 15
    for item in content["items"]:
        row = rows[item["sample_id"]]
        turn, image = row["turns"][item["turn"]], row["images"][0]
        scale = np.tile([image["resized_width"] / image["width"], image["resized_height"] / image["height"]], 2)
        expected = np.array(turn["boxes"]).reshape(-1, 4) * scale
        found = np.array([box["box"] for box in item["truth"]]).reshape(-1, 4)
        unit = 1.0 if family == "qwen2_5_vl" else max(image["resized_width"], image["resized_height"]) / 1000
        assert np.abs(found - expected).max(initial=0) <= unit  # half a unit, and the clamp to the last pixel
        spoken = find_family(family).box_text.parse_answer(turn["answer"])
        if turn["task"] != "describe" and spoken is not None:
            assert [box["label"] for box in item["truth"]] == [box.label for box in spoken]
        assert (item["picture"]["width"], item["picture"]["height"]) == (image["resized_width"], image["resized_height"])


@pytest.mark.parametrize("family", FAMILIES)
def test_results_show_every_arm_with_its_verdict(places: dict[str, Path], tmp_path: Path, family: str) -> None:
    content = data_of(write_page(places[f"results-{family}"], tmp_path / "page"))
    assert content["arms"] == ["adapter", "base"]
    seen = set()
    for item in content["items"]:
        for said in item["replies"].values():
            seen.add((said["status"], said["right"]))
            if len(item["truth"]) == len(said["boxes"]) == 1:
                assert said["iou"] == said["boxes"][0]["iou"]
                assert said["right"] == (said["iou"] >= 0.5)
            for box in said["boxes"]:
                assert 0 <= box["box"][0] <= box["box"][2] <= item["picture"]["width"] + 0.01
                assert (box["score"] is None) == (family == "qwen2_5_vl")
    assert {("strict", True), ("strict", False), ("failed", False)} <= seen


def test_each_image_is_written_once_and_small(places: dict[str, Path], tmp_path: Path) -> None:
    for family in FAMILIES:
        index = write_page(places[f"results-{family}"], tmp_path / family)
        files = {item["picture"]["file"] for item in data_of(index)["items"]}
        on_disk = {f"images/{path.name}" for path in (index.parent / "images").iterdir()}
        assert files == on_disk
        assert len(files) == 4
        for item in data_of(index)["items"]:
            with Image.open(index.parent / item["picture"]["file"]) as thumbnail:
                assert thumbnail.format == "JPEG"
                assert max(thumbnail.size) == min(512, max(item["picture"]["width"], item["picture"]["height"]))


@pytest.mark.parametrize("source", ["shards-qwen2_5_vl", "results-qwen2_5_vl"])
def test_hostile_labels_are_text(places: dict[str, Path], tmp_path: Path, source: str) -> None:
    index = write_page(places[source], tmp_path / "page")
    text = index.read_text("utf-8")
    assert {label for item in data_of(index)["items"] for label in item["asked"]} >= set(LABELS[:2])
    reader = _Reader()
    reader.feed(text)
    assert reader.elements["script"] == 2, "the data and page.js"
    assert not reader.elements["img"]
    assert not reader.elements["b"]
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "alert(1)</script>" not in text
    assert "\u2028" not in text


def test_nothing_is_fetched(places: dict[str, Path], tmp_path: Path) -> None:
    index = write_page(places["results-qwen2_5_vl"], tmp_path / "page")
    for path in (index, *index.parent.glob("page.*")):
        for address in re.findall(r"""(?:https?:)?//[^\s"'<>]+""", path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")):
            assert not address.startswith("http"), (path.name, address)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', index.read_text("utf-8"))
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]


def test_the_same_source_gives_the_same_page(places: dict[str, Path], tmp_path: Path) -> None:
    first, second = (write_page(places["results-qwen3_vl"], tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_page_is_replaced_and_other_folders_are_not(places: dict[str, Path], tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(places["results-qwen2_5_vl"], results)
    index = write_page(results)
    assert index == results / "view" / "index.html"
    (index.parent / "images" / "stale.jpg").touch()
    write_page(results)
    assert not (index.parent / "images" / "stale.jpg").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="other files"):
        write_page(results, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_lost_image_is_said(places: dict[str, Path], demo: Path, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "1.png")
    annotations = write_coco(
        tmp_path, [{"id": 1, "file_name": "1.png", "width": 64, "height": 48}], [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]}]
    )
    run(config(annotations, tmp_path / "shards", demo / "tokenizer", images=str(tmp_path / "images")))
    (tmp_path / "images" / "1.png").unlink()
    index = write_page(tmp_path / "shards", tmp_path / "page")
    assert "1 images could not be read" in index.read_text("utf-8")
    assert all(item["picture"]["file"] is None and "no such file" in item["picture"]["problem"] for item in data_of(index)["items"])


@pytest.mark.parametrize("make", ["nothing", "empty", "other_json", "broken_json", "lost_answers"])
def test_what_is_no_source(places: dict[str, Path], tmp_path: Path, make: str) -> None:
    folder = tmp_path / "source"
    if make != "nothing":
        folder.mkdir()
    if make == "other_json":
        (folder / "results.json").write_text("[]")
    if make == "broken_json":
        (folder / "results.json").write_text("{")
    if make == "lost_answers":
        shutil.copy(places["results-qwen3_vl"] / "results.json", folder)
    reasons = {
        "nothing": "no such folder",
        "empty": "without results.json or manifest.json",
        "other_json": "another file of this name",
        "broken_json": "Expecting property name",
        "lost_answers": "answers-adapter.arrow",
    }
    with pytest.raises((ConfigError, ShardError), match=reasons[make]):
        write_page(folder)
    assert reasons[make] in mistake("view", folder)


# ---- the sample


def test_the_sample_is_even_over_strata() -> None:
    strata = ["large"] * 900 + ["small"] * 90 + ["rare"] * 3
    names = [str(number) for number in range(len(strata))]
    chosen = spread(strata, names, 61, seed=0)
    assert Counter(strata[place] for place in chosen) == {"large": 29, "small": 29, "rare": 3}
    assert chosen == sorted(chosen)
    assert chosen == spread(strata, names, 61, seed=0)
    assert chosen != spread(strata, names, 61, seed=1)
    assert spread(strata, names, 10_000, seed=0) == list(range(len(strata)))


def test_a_sample_is_said(places: dict[str, Path], tmp_path: Path) -> None:
    told = invoke("view", places["results-qwen2_5_vl"], "--out", tmp_path / "page", "--max-items", 5).output
    index = Path(told.strip().removeprefix("open "))
    content = data_of(index)
    assert len(content["items"]) == 5 < content["num_items"]
    assert f"5 of {content['num_items']} questions, evenly from" in index.read_text("utf-8")
    assert len({(item["task"], item["replies"]["adapter"]["right"]) for item in content["items"]}) > 1
    invoke("view", places["shards-qwen2_5_vl"], "--out", tmp_path / "page", "--max-items", 1)
    content = data_of(index)
    assert len(content["items"]) == 1


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path_factory.mktemp("downloads"))})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def _wait(condition: Any) -> Any:
    import time  # noqa: PLC0415

    for _ in range(100):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("waited ten seconds")


def test_a_person_filters_rates_and_exports(places: dict[str, Path], tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By  # noqa: PLC0415
    from selenium.webdriver.common.keys import Keys  # noqa: PLC0415
    from selenium.webdriver.support.ui import Select  # noqa: PLC0415

    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    index = write_page(places["results-qwen2_5_vl"], tmp_path / "page")
    items = data_of(index)["items"]
    browser.get(index.as_uri())
    listed = browser.find_elements(By.CSS_SELECTOR, "#list li")
    assert len(listed) == len(items)
    assert browser.find_element(By.ID, "count").text == f"{len(items)} of {len(items)}"
    # Boxes as drawn are the boxes of the data, in the pixels of the viewBox.
    first = items[0]
    drawn = browser.find_elements(By.CSS_SELECTOR, "#picture g.truth rect.box")
    assert [float(drawn[0].get_attribute(name)) for name in ("x", "y")] == pytest.approx(first["truth"][0]["box"][:2])
    assert len(drawn) == len(first["truth"])
    assert not browser.find_elements(By.CSS_SELECTOR, "#picture g.arm-1"), "the base is off until switched on"
    browser.find_element(By.ID, "show-arm-1").click()
    with_boxes = next(number for number, item in enumerate(items) if item["replies"]["base"]["boxes"])
    browser.execute_script("arguments[0].click()", browser.find_elements(By.CSS_SELECTOR, "#list li")[with_boxes])
    assert browser.find_elements(By.CSS_SELECTOR, "#picture g.arm-1 rect.box")
    # The image is there: decoded at its own size.
    assert browser.execute_script(
        "const image = new Image(); image.src = document.querySelector('#picture image').getAttribute('href');"
        "return image.decode().then(() => image.naturalWidth)"
    ) == min(512, items[with_boxes]["picture"]["width"])

    Select(browser.find_element(By.ID, "filter-verdict")).select_by_value("wrong")
    wrong = [item for item in items if item["replies"]["adapter"]["right"] is False]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#list li")) == len(wrong) > 0
    browser.find_element(By.ID, "reset").click()
    Select(browser.find_element(By.ID, "sort")).select_by_visible_text("IoU, lowest first")
    ious = [item["replies"]["adapter"]["iou"] for item in items]
    lowest = min(iou for iou in ious if iou is not None)
    assert f"IoU {lowest:.2f}" in browser.find_element(By.CSS_SELECTOR, "#list li").text
    browser.find_element(By.ID, "reset").click()

    browser.find_element(By.ID, "rater").send_keys("Ann <b>", Keys.ENTER)
    body = browser.find_element(By.TAG_NAME, "body")
    start = browser.find_element(By.CSS_SELECTOR, '#list li[aria-current="true"]')
    browser.execute_script("arguments[0].parentNode.firstChild.click()", start)
    body.send_keys("1")
    body.send_keys("3")
    body.send_keys(Keys.ARROW_RIGHT)
    body.send_keys("4")
    body.send_keys("2")
    body.send_keys(Keys.ARROW_LEFT)
    body.send_keys("0")  # takes the last one back
    assert browser.find_element(By.ID, "progress").text == "3 rated"
    browser.refresh()
    assert browser.find_element(By.ID, "progress").text == "3 rated", "kept in the browser"
    expected = {(items[place]["sample_id"], items[place]["turn"]): rating for place, rating in ((0, "right"), (1, "wrong"), (3, "none"))}
    for ending in ("json", "csv"):
        browser.find_element(By.ID, f"export-{ending}").click()
        path = _wait(lambda ending=ending: next(iter(tmp_path.glob(f"ratings-*.{ending}")), None))
        ratings = _wait(lambda path=path: path.stat().st_size and read_ratings([path], places["results-qwen2_5_vl"]))
        assert ratings.by_rater == {"Ann <b>": expected}
        assert figures_of(ratings)["all"]["wrong"]["count"] == 1
        plain = read_ratings([path])
        assert {name: fact.right for name, fact in plain.facts.items()} == {name: fact.right for name, fact in ratings.facts.items()}

    # Nothing was run, nothing was refused: every label is on the page as text.
    shown = browser.execute_script("return document.body.innerText")
    assert LABELS[0] in shown
    assert browser.execute_script("return document.querySelectorAll('img, main script').length") == 0
    problems = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert problems == []


def test_a_rater_can_be_blind(places: dict[str, Path], tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By  # noqa: PLC0415

    browser.get(write_page(places["results-qwen3_vl"], tmp_path / "page").as_uri())
    browser.find_element(By.ID, "blind").click()
    assert not [one for one in browser.find_elements(By.CSS_SELECTOR, ".tells") if one.is_displayed()]
    assert "IoU" not in browser.find_element(By.ID, "texts").text
    browser.find_element(By.ID, "blind").click()
    assert "IoU" in browser.find_element(By.ID, "texts").text
