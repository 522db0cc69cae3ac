"""A file of queries -> a file of answers, a line each, in the same order: in this process, or through Ray Data.

    queries.jsonl ──> batches of lines ──> workers, each with the network open ──> answers.jsonl

A line that cannot be answered (no such image, no JSON) becomes a line with `error`: nothing is lost, and the counts are returned.
"""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch

from boxcar.pipelines import storage
from boxcar.pipelines.cluster import connected
from boxcar.schemas.errors import BoxcarError, ConfigError
from boxcar.schemas.record import Language
from boxcar.schemas.task import TaskName
from boxcar.train.answering.adapter import open_adapter
from boxcar.train.answering.ask import AskedTask, Query
from boxcar.train.answering.predict import PredictConfig, Predictor, as_json

LINES_PER_BATCH = 64


class QueryLine(msgspec.Struct, forbid_unknown_fields=True):
    """One line of queries.jsonl."""

    image: str
    query: str = ""
    task: AskedTask | None = None
    """None: `PredictSpec.task`."""
    language: Language = "en"
    box_xyxy_px: tuple[float, float, float, float] | None = None
    id: str = ""
    prompt: int = 0


@dataclass(frozen=True)
class PredictSpec:
    """What a worker must know; plain values, for it travels."""

    adapter: str
    base: str = ""
    tokenizer: str = ""
    task: AskedTask | None = None
    """None: `usual_task` of the adapter."""
    images: str = ""
    """Where relative paths of images start."""
    batch_size: int = 8
    max_new_tokens: int = 512
    with_logprobs: bool = False
    pixels: Literal["exact", "fast"] = "exact"
    use_gpu: bool | None = None
    """None: if there is one."""


@dataclass
class Counts:
    """What became of the lines."""

    answered: int = 0
    errors: int = 0


def open_predictor(spec: PredictSpec) -> Predictor:
    """Raises what `train.answering.adapter.open_adapter` raises."""
    gpu = torch.cuda.is_available() if spec.use_gpu is None else spec.use_gpu
    opened = open_adapter(
        spec.adapter,
        torch.device("cuda" if gpu else "cpu"),
        torch.bfloat16 if gpu else torch.float32,
        base=spec.base,
        tokenizer=spec.tokenizer,
    )
    config = PredictConfig(
        batch_size=spec.batch_size, max_new_tokens=spec.max_new_tokens, with_logprobs=spec.with_logprobs, pixels=spec.pixels
    )
    return Predictor(opened, config)


def usual_task(predictor: Predictor) -> AskedTask:
    """How an adapter is asked for one thing: by the first of these that it was trained on."""
    trained = trained_turns(predictor)
    return next((task for task in ("refer", "detect", "detect_joint", "absent", "caption") if trained.get(task)), "refer")


def trained_turns(predictor: Predictor) -> dict[TaskName, int]:
    """Task -> turns in training; {} for a base alone."""
    card = predictor.opened.card
    return {} if card is None else card.trained_turns


class LineAnswerer:
    """Answers batches of lines; the network is opened at the first."""

    def __init__(self, spec: PredictSpec) -> None:
        self._spec = spec
        self._predictor = open_predictor(spec)
        self._task = spec.task or usual_task(self._predictor)

    def answer(self, lines: list[str]) -> list[str]:
        """A line of JSON for each."""
        queries: dict[int, Query] = {}
        replies: dict[int, dict[str, Any]] = {}
        for place, line in enumerate(lines):
            try:
                query = self._query(line)
                self._predictor.check(query)
                queries[place] = query
            except (msgspec.DecodeError, BoxcarError) as error:
                replies[place] = {"error": _explained(error), "line": line}
        for place, answer in zip(queries, self._predictor.ask(queries.values()), strict=True):
            replies[place] = as_json(answer)
        return [json.dumps(replies[place], ensure_ascii=False) for place in range(len(lines))]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form of it."""
        return {"answer": self.answer([str(line) for line in batch["text"]])}

    def _query(self, text: str) -> Query:
        line = msgspec.json.decode(text, type=QueryLine)
        extra = {"image": line.image, "query": line.query}
        image = line.image if storage.is_uri(line.image) else os.path.join(self._spec.images, line.image)
        return Query(image, line.query, line.task or self._task, line.language, line.box_xyxy_px, line.id, line.prompt, extra)


def _explained(error: Exception) -> str:
    """With the values that are allowed, where a line has another one."""
    said = str(error)
    allowed = {"$.task": get_args(AskedTask), "$.language": get_args(Language)}
    return said + "".join(f" (expected one of {', '.join(names)})" for place, names in allowed.items() if said.endswith(f"at `{place}`"))


def predict_file(
    queries: Path, out: Path, spec: PredictSpec, *, executor: Literal["ray", "inline"], num_workers: int, on_progress: Callable[[int], None]
) -> Counts:
    """Answer every line. on_progress: number of new answers. Raises ConfigError where a file is missing or would be overwritten."""
    if not queries.is_file():
        raise ConfigError("queries", found=f"{queries}: no such file", expected='a line of JSON a query: {"image": ..., "query": ...}')
    if out.exists():
        raise ConfigError("out", found=f"{out}, which exists", expected="a new file", fix="Choose another name, or delete it.")
    counts = Counts()
    with storage.writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    lines = _inline(queries, spec) if executor == "inline" else _with_ray(queries, spec, num_workers)
    with closing(lines), storage.atomic_write(out) as stream:
        for line in lines:
            stream.write(line.encode() + b"\n")
            failed = line.startswith('{"error"')
            counts.errors += failed
            counts.answered += not failed
            on_progress(1)
    return counts


def _inline(queries: Path, spec: PredictSpec) -> Generator[str, None, None]:
    answerer = LineAnswerer(spec)
    for batch in _batches(queries):
        yield from answerer.answer(batch)


def _batches(queries: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    for line in _lines(queries):
        batch.append(line)
        if len(batch) == LINES_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _lines(queries: Path) -> Iterable[str]:
    with queries.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if text := line.strip():
                yield text


def _with_ray(queries: Path, spec: PredictSpec, num_workers: int) -> Generator[str, None, None]:
    import ray.data  # noqa: PLC0415

    with connected() as resources:
        gpu = bool(resources.get("GPU")) if spec.use_gpu is None else spec.use_gpu
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller shows progress and errors
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = context.print_on_execution_start = False
        rows = [{"text": line} for line in _lines(queries)]
        num_blocks = min(max(num_workers, -(-len(rows) // LINES_PER_BATCH)), max(len(rows), 1))  # work for every worker
        answers = ray.data.from_items(rows, override_num_blocks=num_blocks).map_batches(
            LineAnswerer,
            fn_constructor_args=(spec,),
            batch_size=LINES_PER_BATCH,
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_gpus=1 if gpu else 0,
            num_cpus=1,
        )
        for row in answers.iter_rows():
            yield row["answer"]
