"""`boxcar predict` for people: what was asked, what came back, where the boxes are, and a picture of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from boxcar.pipelines import storage
from boxcar.pipelines.images.image_file import load_image
from boxcar.schemas.record import Language
from boxcar.tools.plain import visible
from boxcar.tools.progress import Progress
from boxcar.tools.tables import Table, result_console
from boxcar.train.answering.ask import Query
from boxcar.train.answering.predict import Answer, as_json, stepwise
from boxcar.train.answering.predict_job import PredictSpec, open_predictor, predict_file, trained_turns, usual_task

_WORTH_A_LOOK_PX = 384
_COLOURS_BGR = [(0, 0, 230), (0, 150, 0), (230, 80, 0), (0, 140, 255), (180, 0, 180), (160, 130, 0)]


def predict_one(spec: PredictSpec, image: str, text: str, language: Language, *, draw: Path | None, as_lines: bool) -> None:
    """Ask one question about one image."""
    predictor = open_predictor(spec)
    task = spec.task or usual_task(predictor)
    trained = trained_turns(predictor)
    if task != "question" and not trained.get(task):
        known = ", ".join(f"{name} {turns:,}" for name, turns in sorted(trained.items())) or "nothing"
        note = f"Note: {task} was not trained (turns of training: {known}): results will be poor."
        Console(stderr=True, soft_wrap=True).print(Text(note, style="yellow"))
    (answer,) = predictor.ask([Query(image, text, task, language)])
    _tell([answer], image, draw, as_lines=as_lines)


def predict_and_draw(spec: PredictSpec, images: Sequence[tuple[Path, str, Language]], console: Console) -> None:
    """Look for one thing in each of some images, and draw what was found beside them, as NAME-found.png."""
    predictor = open_predictor(spec)
    task = spec.task or usual_task(predictor)
    answers = predictor.ask([Query(str(image), text, task, language) for image, text, language in images])
    for (image, text, _), answer in zip(images, answers, strict=True):
        drawn = image.with_name(f"{image.stem}-found.png")
        _draw([answer], str(image), drawn, at_least_px=_WORTH_A_LOOK_PX)
        boxes = "; ".join(", ".join(f"{value:.0f}" for value in box) for box in answer.boxes_xyxy_px) or "none"
        console.print(Text(visible(f"        {image.name}, {text!r}: {boxes} -> {drawn}")))


def predict_stepwise(spec: PredictSpec, image: str, categories: str, language: Language, *, draw: Path | None, as_lines: bool) -> None:
    """First which categories, then the boxes of each."""
    names = [name.strip() for name in categories.split(",") if name.strip()]
    found = stepwise(open_predictor(spec), image, language, names)
    console = Console(stderr=True, soft_wrap=True)
    if not found.answers:
        console.print(
            Text(visible(f"The first reply names no category with a count: {found.listing.reply!r}. Give some by --query a,b,c."))
        )
    for name, count in found.expected.items():
        boxes = len(found.answers[name].boxes_xyxy_px) if name in found.answers else 0
        console.print(Text(visible(f"{name}: {count} said, {boxes} boxes" + ("" if boxes == count else "  <- differ"))))
    _tell(list(found.answers.values()), image, draw, as_lines=as_lines)


def predict_many(spec: PredictSpec, queries: Path, out: Path, *, executor: Literal["ray", "inline"], num_workers: int) -> int:
    """Answer a file of queries. Returns the exit code: 1 where a line could not be answered."""
    with queries.open("rb") if queries.is_file() else open("/dev/null", "rb") as stream:
        total = sum(1 for line in stream if line.strip())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("answers", total=total)
        counts = predict_file(
            queries, out, spec, executor=executor, num_workers=num_workers, on_progress=lambda new: progress.advance(bar, new)
        )
    Console(soft_wrap=True).print(
        Text(f"{out}: {counts.answered} answers" + (f", {counts.errors} lines with an `error`" if counts.errors else ""))
    )
    return 1 if counts.errors else 0


def _tell(answers: list[Answer], image: str, draw: Path | None, *, as_lines: bool) -> None:
    if as_lines:
        for answer in answers:
            print(json.dumps(as_json(answer), ensure_ascii=False))
    else:
        console = result_console(soft_wrap=True)
        for answer in answers:
            print_answer(console, answer)
    if draw is not None:
        _draw(answers, image, draw)
        Console(stderr=True, soft_wrap=True).print(Text(f"{draw}: look at it"))


def print_answer(console: Console, answer: Answer) -> None:
    """Question, reply, how it was read, and the boxes in pixels of the original image."""
    console.print(Text("Q  ", style="cyan"), Text(visible(answer.question)))
    console.print(Text("A  ", style="green"), Text(visible(answer.reply)), Text("" if answer.complete else " ... (cut at max_new_tokens)"))
    read = answer.status + (f" ({', '.join(answer.repairs)})" if answer.repairs else "")
    console.print(Text(f"read  {read}; {answer.size_wh[0]}x{answer.size_wh[1]} px seen as {answer.resized_wh[0]}x{answer.resized_wh[1]}"))
    if not len(answer.boxes_xyxy_px):
        console.print(Text("no box: " + ("the reply says that nothing is there" if answer.status == "none_found" else "none in the reply")))
        return
    table = Table("box", "x0", "y0", "x1", "y1", "label", title="pixels of the original image", title_justify="left")
    for number, (box, label) in enumerate(zip(answer.boxes_xyxy_px, answer.labels, strict=True)):
        table.add_row(str(number), *[f"{value:.1f}" for value in box], Text(visible(label or "")))
    console.print(table)


def _draw(answers: list[Answer], image: str, out: Path, *, at_least_px: int = 1) -> None:
    """at_least_px: smaller pictures are drawn larger, by a whole factor."""
    picture = np.ascontiguousarray(np.asarray(load_image(image))[:, :, ::-1])
    factor = -(-at_least_px // max(picture.shape[:2]))
    picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    thickness = max(2, round(max(picture.shape[:2]) / 400))
    for number, answer in enumerate(answers):
        for box in (answer.boxes_xyxy_px * factor).round().astype(int).tolist():
            cv2.rectangle(picture, tuple(box[:2]), tuple(box[2:]), _COLOURS_BGR[number % len(_COLOURS_BGR)], thickness, cv2.LINE_AA)
    encoded = cv2.imencode(".png", picture)[1]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encoded.tobytes())
    except OSError as error:
        raise storage.write_error(out, error) from error
