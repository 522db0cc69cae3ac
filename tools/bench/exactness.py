"""Composed ids against the tokenizer's own encoding of the rendered conversation: every row, every family."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.images.lookup import ImageLookup
from boxcar.pipelines.readers.coco import CocoReader
from boxcar.pipelines.readers.voc import VocReader
from boxcar.pipelines.rows.unit import UnitConverter
from boxcar.pipelines.tokens.frame import Frame, build_frame
from boxcar.schemas.record import ImageRef, Record, Region, Rejected
from boxcar.schemas.workflow import ConvertConfig, SourceConfig, TaskConfig, TasksConfig

_PIECES = (
    *("dog", "person's hat", '"quoted"', "it's", "back\\slash", "{json: [1, 2]}", "[[001,002,003,004]]", "], ", '"}', "}]", "```"),
    *("3", "12 cats", "½ tea", "42nd st.", "1,000.5", "№7", "a,b;c", "(1,2),(3,4)", "%s", "--", "...", "<tag>", "&amp;", " and "),
    *("红色的车", "「猫」", "日本語テスト", "한국어", "مرحبا", "שלום", "ﷺ", "¿qué?", "naïve", "e\u0301a\u0301", "Ａｂｃ"),
    *("🙂", "👩\u200d👩\u200d👧\u200d👦", "\u200bzero", "a  b", "\tx", "line\nbreak", "x" * 300),
)


def adversarial_labels(count: int, seed: int = 0) -> list[str]:
    """Labels of one to three hard pieces, with and without blanks around them; all different."""
    draw = random.Random(seed)
    labels: dict[str, None] = {}
    while len(labels) < count:
        label = draw.choice(["", " "]).join(draw.choices(_PIECES, k=draw.randint(1, 3)))
        labels[draw.choice(["", " ", "  "]) + label + draw.choice(["", " ", "."])] = None
    return list(labels)


def _adversarial_records(labels: Sequence[str]) -> Iterator[Record]:
    """One record for every two labels: as categories, as phrases, as captions, with one to four boxes."""
    for number in range(0, len(labels) - 1, 2):
        first, second = labels[number], labels[number + 1]
        regions = tuple(
            Region((10.0 * k, 7.0 * k, 10.0 * k + 50 + number % 300, 7.0 * k + 40), label, phrases=(f"{label} {k}", second))
            for k, label in enumerate([first, second, first, first][: 1 + number % 4])
        )
        image = ImageRef("none.jpg", 400 + number % 1000, 300 + number % 700)
        yield Record(f"adversarial {number}", f"label {number}", (image,), regions, (first, second), absent=(f"no {second}",))


def _data(folder: Path, work: Path) -> Iterator[tuple[str, list[Record | Rejected], ImageLookup]]:
    coco = SourceConfig(
        reader="coco", annotations=str(folder / "coco_mini/instances.json"), captions=str(folder / "coco_mini/captions.json")
    )
    voc = SourceConfig(reader="voc", annotations=str(folder / "bccd"))
    for name, reader, config, images in (
        ("coco_mini", CocoReader(), coco, folder / "coco_mini/images"),
        ("bccd", VocReader(), voc, folder / "bccd"),
    ):
        plan = reader.plan(config, work / name, 4096)
        items = [item for unit in plan.units for item in reader.read(config, unit)]
        yield name, items, ImageLookup(str(images), trust_sizes=False)


def compare(data: Path, tokenizers: dict[str, Path], num_labels: int, work: Path) -> None:
    """Print rows and turns compared, and how many differ, for each family and data set."""
    sets = list(_data(data, work))
    sets.append(("adversarial", list(_adversarial_records(adversarial_labels(num_labels))), ImageLookup("", trust_sizes=True)))
    for name in FAMILIES:
        if name not in tokenizers:
            print(f"{name}: no tokenizer given, not compared")
            continue
        frame = build_frame(_config(name, tokenizers[name]))
        for title, items, headers in sets:
            result = UnitConverter(_config(name, tokenizers[name]), frame, title).convert(items, headers)
            rows = result.table.to_pylist()
            different = sum(not same for row in rows for same in _same(row, frame))
            turns = sum(len(row["turns"]) for row in rows)
            print(f"{name}, {title}: {len(rows):,} rows, {turns:,} turns, {different} differ; rejected {result.counts.num_rejected}")


def _config(family: str, tokenizer: Path) -> ConvertConfig:
    every = TaskConfig(share=1.0)
    return ConvertConfig(
        reader="coco",
        annotations="-",
        family=family,
        tokenizer=str(tokenizer),
        cutoff_len=FAMILIES[family].max_sequence,
        output="-",
        languages={"en": 0.5, "zh": 0.5},
        tasks=TasksConfig(detect_joint=every, describe=every, absent=every, caption=every),
    )


def _same(row: dict[str, Any], frame: Frame) -> Iterable[bool]:
    """Whether ids equal the encoding: of the whole conversation, or of each turn where each is a sequence of its own."""
    chat, turns = frame.family.chat, row["turns"]
    if chat.one_question_per_image:
        for turn in turns:
            yield turn["prompt_ids"] == frame.tokenizer.encode([turn["question"]])[0]
            yield turn["answer_ids"] == frame.tokenizer.encode([turn["answer"]])[0]
        return
    text = chat.header(chat.default_system, len(row["images"]))
    ids = list(row["header_ids"])
    for number, turn in enumerate(turns):
        text += (chat.turn_open if number else "") + turn["question"] + chat.answer_open + turn["answer"] + chat.turn_close
        ids += (
            (frame.turn_open_ids if number else []) + turn["prompt_ids"] + frame.answer_open_ids + turn["answer_ids"] + frame.turn_close_ids
        )
    yield ids == frame.tokenizer.encode([text])[0]
