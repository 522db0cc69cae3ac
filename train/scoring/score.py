"""Box metrics of scored turns, each with a 95 % interval.

| section | what it measures                                                                                                           |
|---------|----------------------------------------------------------------------------------------------------------------------------|
| rec     | one thing asked for and one true box: the first box of the reply against it (RefCOCO's Acc@t and mean IoU)                  |
| objects | every box of every label asked for, matched one to one: precision, recall, F1, counts, duplicates, boxes of absent objects   |
| grec    | one phrase, any number of true boxes, none among them (gRefCOCO): Pr@(F1=1), N-acc, T-acc                                   |
| format  | how replies were read                                                                                                       |

Conventions: boxes are half-open and floating point (no + 1), a match is IoU >= t, and a reply that cannot be read counts as wrong. Boxes
that a reply gives for one label are matched greedily from the highest IoU down. Intervals are percentiles of a bootstrap that draws images,
not questions: questions about one image stand and fall together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from boxcar.pipelines.boxes import geometry
from boxcar.pipelines.ragged import IntColumn, offsets_of
from boxcar.train.answering.parse import Status
from boxcar.train.scoring.questions import STRAY, FloatColumn, Questions, Units, read_questions

Section = Literal["rec", "objects", "grec", "format"]
REC_IOUS = (0.5, 0.75, 0.9)
OBJECT_IOUS = tuple(round(0.5 + step / 20, 2) for step in range(10))
"""COCO's .5:.05:.95."""
DUPLICATE_IOU = 0.9
SIZES = ("small", "medium", "large")
SIZE_AREAS = (32.0**2, 96.0**2)
"""COCO's limits, but of the area in the pixels that the model saw: what is small for it. The limit itself is the larger size."""
STATUSES: tuple[Status, ...] = ("strict", "repaired", "none_found", "failed")
GROUPINGS = ("task", "language", "source")
_DRAWS_AT_A_TIME = 64

PROTOCOL: Mapping[Section, str] = {
    "rec": "Questions about one object with one true box; the first box of the reply, IoU >= t, 0 where there is none. Sizes: area of the "
    "true box in the pixels the model saw, below 32² small, below 96² medium.",
    "objects": "A unit is a question and a label it asks for. One-to-one matching within units, greedy from the highest IoU. At .5 and the "
    "mean over .5:.05:.95, summed over units (micro); macro: mean over labels; question_f1: mean over units, 1 where nothing is there and "
    "a reply that could be read gave no box. duplicates: boxes with an earlier box of their unit at IoU > .9; hallucinated: units of "
    "absent objects that were given boxes; stray: boxes of names that were not asked for, where a question asks for several.",
    "grec": "Questions about one phrase. pr_f1: share with F1 = 1 at IoU >= .5 (absent objects: no box); n_acc: absent objects answered "
    "with no box, by a reply that could be read; t_acc: present objects answered with a box.",
    "format": "Shares of the replies. wrong_count: not as many boxes as are true; out_of_range: a value beyond the image; no_area: share "
    "of the boxes; label_exact: share of the boxes with a label whose label is exactly one that was asked for.",
}
GREC_OFFICIAL = (
    "Questions about one phrase, as in gRefCOCO's own code: pairs are matched by generalised IoU, and a reply that cannot be read is one "
    "without boxes. Its filter of scores below 0.7 has no counterpart: every box of a reply counts."
)


@dataclass(frozen=True)
class Measure:
    """One number."""

    section: Section
    by: str
    """all, task, language, source or size."""
    group: str
    metric: str
    value: float | None
    """A share in [0, 1], but for count_mae. None: not defined, nothing was there to be measured."""
    low: float | None
    high: float | None
    """95 % interval; None where fewer than two images say something."""
    num: int
    """What it is a share of: questions, units, boxes, labels (macro) or, for F1, boxes of both kinds."""


@dataclass(frozen=True)
class Results:
    """Every measure, in a fixed order, and what must be said beside them."""

    measures: tuple[Measure, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    def value(self, section: Section, metric: str, by: str = "all", group: str = "all") -> float | None:
        """Raises KeyError where there is no such measure."""
        return self.measure(section, metric, by, group).value

    def measure(self, section: Section, metric: str, by: str = "all", group: str = "all") -> Measure:
        """Raises KeyError where there is no such measure."""
        for measure in self.measures:
            if (measure.section, measure.metric, measure.by, measure.group) == (section, metric, by, group):
                return measure
        raise KeyError((section, metric, by, group))

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; the same results give the same bytes."""
        return {"settings": dict(self.settings), "notes": list(self.notes), "measures": [asdict(measure) for measure in self.measures]}


def score(table: pa.Table, *, draws: int = 1000, seed: int = 0, grec_official: bool = False) -> Results:
    """All metrics of a table of `train.scoring.questions.SCORED_SCHEMA`; the order of its rows changes nothing.

    draws: of the bootstrap; 0 leaves out the intervals. grec_official: see GREC_OFFICIAL. Raises ShardError where the table is none, does
    not fit together or asks for no boxes.
    """
    questions = read_questions(table)
    metrics = [
        *_rec(questions),
        *_objects(questions),
        *_object_sizes(questions),
        *_grec(questions, official=grec_official),
        *_format(questions),
    ]
    settings = {
        "iou_rec": list(REC_IOUS),
        "iou_objects": list(OBJECT_IOUS),
        "size_areas": list(SIZE_AREAS),
        "bootstrap": {"draws": draws, "seed": seed, "unit": "image"},
        "grec_official": grec_official,
        "num_questions": len(questions),
        "num_images": len(questions.codes("image")[1]),
        "protocol": dict(PROTOCOL) | ({"grec": GREC_OFFICIAL} if grec_official else {}),
    }
    return Results(tuple(_measures(questions, metrics, draws, seed)), settings, tuple(_notes(questions)))


# ---- what is measured


@dataclass(frozen=True, eq=False)
class _Metric:
    """A mean over K columns of (sum of `above` / sum of `below`); with `label`, the mean of that over labels."""

    section: Section
    name: str
    row: IntColumn
    """(n,) question of each item."""
    above: npt.NDArray[np.float64]
    """(n, K)"""
    below: npt.NDArray[np.float64]
    """(n, K)"""
    label: IntColumn | None = None
    """(n,) code of each item's label, for macro means."""
    size: IntColumn | None = None
    """(n,) index into SIZES: this metric is only grouped by it."""
    only_by: tuple[str, ...] = ()
    """Groupings that it is shown in; (): in all."""


def _share(section: Section, name: str, row: IntColumn, above: npt.NDArray[Any], below: npt.NDArray[Any] | None = None) -> _Metric:
    """A mean of one column; without `below`, over all items."""
    above = np.asarray(above, np.float64)
    below = np.ones_like(above) if below is None else np.asarray(below, np.float64)
    return _Metric(section, name, row, above[:, None], below[:, None])


def _single(questions: Questions) -> npt.NDArray[np.bool_]:
    """(U,) whether a unit is the only one of its question."""
    units = questions.units
    per_question = np.bincount(units.question[units.label != STRAY], minlength=len(questions))
    return np.asarray((per_question[units.question] == 1) & (units.label != STRAY))


def _sizes(questions: Questions, boxes_px: npt.NDArray[np.float64], row: IntColumn) -> IntColumn:
    """(n,) index into SIZES of boxes in original pixels, by their area in the pixels that the model saw."""
    area = geometry.area(boxes_px) / (questions.column("width") * questions.column("height"))[row]
    seen = area * (questions.column("resized_width") * questions.column("resized_height"))[row]
    return np.asarray(np.digitize(seen, SIZE_AREAS), np.int64)


def _first_iou(units: Units, chosen: IntColumn) -> FloatColumn:
    """IoU of the first box of each of these units with its only true one; 0 where the reply has none."""
    has_box = units.num_predicted[chosen] > 0
    first = np.minimum(offsets_of(units.num_predicted)[chosen], max(len(units.predicted) - 1, 0))
    iou = np.zeros(len(chosen))
    iou[has_box] = geometry.iou_pairs(units.predicted[first[has_box]], units.truth[offsets_of(units.num_truth)[chosen[has_box]]])
    return iou


def _rec(questions: Questions) -> Iterator[_Metric]:
    units = questions.units
    chosen = np.flatnonzero(_single(questions) & (units.num_truth == 1))
    row = units.question[chosen]
    iou = _first_iou(units, chosen)
    size = _sizes(questions, units.truth[offsets_of(units.num_truth)[chosen]], row)
    for name, values in [*((f"acc_{least * 100:.0f}", iou >= least) for least in REC_IOUS), ("mean_iou", iou)]:
        metric = _share("rec", name, row, values)
        yield metric
        yield replace(metric, size=size)


def _objects(questions: Questions) -> Iterator[_Metric]:
    units = questions.units
    row = units.question
    of_predicted, _ = units.match(units.pair_iou, OBJECT_IOUS[0])
    num_units = len(row)
    hits = np.stack(
        [np.bincount(units.predicted_unit[of_predicted >= least], minlength=num_units) for least in OBJECT_IOUS], axis=1
    ).astype(np.float64)
    predicted, truth = (
        np.repeat(count[:, None], len(OBJECT_IOUS), axis=1).astype(np.float64) for count in (units.num_predicted, units.num_truth)
    )
    named = units.label != STRAY
    for name, above, below in (("precision", hits, predicted), ("recall", hits, truth), ("f1", 2 * hits, predicted + truth)):
        yield _Metric("objects", f"{name}_50", row, above[:, :1], below[:, :1])
        yield _Metric("objects", f"{name}_50_95", row, above, below)
        yield _Metric(
            "objects", f"macro_{name}_50", row[named], above[named, :1], below[named, :1], label=units.label[named], only_by=("all", "task")
        )
    yield _share("objects", "question_f1_50", row, _unit_f1(hits[:, 0], units, (questions.column("status") != "failed")[row]))
    yield _share("objects", "count_mae", row, np.abs(units.num_predicted - units.num_truth))
    box_row = row[units.predicted_unit]
    yield _share("objects", "duplicates", box_row, _is_duplicate(units))
    yield _share("objects", "hallucinated", row, (units.num_predicted > 0) & (units.num_truth == 0) & named, (units.num_truth == 0) & named)
    yield _share("objects", "stray", box_row, ~named[units.predicted_unit])


def _unit_f1(hits: FloatColumn, units: Units, was_read: npt.NDArray[np.bool_]) -> FloatColumn:
    boxes = units.num_predicted + units.num_truth
    return np.asarray(np.divide(2 * hits, boxes, out=was_read.astype(np.float64), where=boxes > 0))


def _is_duplicate(units: Units) -> npt.NDArray[np.bool_]:
    """(P,) whether an earlier box of its unit says almost the same."""
    first, second = geometry.pairs_within(units.predicted_unit)
    first, second = first[first < second], second[first < second]
    found = np.zeros(len(units.predicted), np.bool_)
    found[second[geometry.iou_pairs(units.predicted[first], units.predicted[second]) > DUPLICATE_IOU]] = True
    return found


def _object_sizes(questions: Questions) -> Iterator[_Metric]:
    """A label's boxes have many sizes, and only true ones have theirs for certain: so recall alone."""
    units = questions.units
    _, of_truth = units.match(units.pair_iou, OBJECT_IOUS[0])
    row = units.question[units.truth_unit]
    yield replace(_share("objects", "recall_50", row, np.isfinite(of_truth)), size=_sizes(questions, units.truth, row))


def _grec(questions: Questions, *, official: bool) -> Iterator[_Metric]:
    units = questions.units
    chosen = _single(questions)
    likeness = units.pair_iou
    if official:
        predicted, truth = units.pairs
        likeness = geometry.giou_pairs(units.predicted[predicted], units.truth[truth])
    of_predicted, _ = units.match(likeness, 0.5)
    hits = np.bincount(units.predicted_unit[np.isfinite(of_predicted)], minlength=len(chosen))
    absent, says_nothing = units.num_truth == 0, units.num_predicted == 0
    if not official:
        says_nothing = says_nothing & (questions.column("status") != "failed")[units.question]
    all_right = np.where(absent, says_nothing, (hits == units.num_truth) & (hits == units.num_predicted))
    row = units.question[chosen]
    yield _share("grec", "pr_f1", row, all_right[chosen])
    yield _share("grec", "n_acc", row, (absent & says_nothing)[chosen], absent[chosen])
    yield _share("grec", "t_acc", row, (~absent & (units.num_predicted > 0))[chosen], ~absent[chosen])


def _format(questions: Questions) -> Iterator[_Metric]:
    row = np.arange(len(questions))
    status = questions.column("status")
    for read_as in STATUSES:
        yield _share("format", read_as, row, status == read_as)
    yield _share("format", "wrong_count", row, questions.lengths("predicted_boxes") != questions.lengths("truth_boxes"))
    repairs = np.array(questions.strings("repairs"), dtype=np.str_)
    repaired = np.repeat(row, questions.lengths("repairs"))
    for name, repair in (("out_of_range", "clamped"), ("swapped", "swapped_corners")):
        yield _share("format", name, row, np.isin(row, repaired[repairs == repair]))
    boxes, box_row = questions.boxes("predicted_boxes")
    yield _share("format", "no_area", box_row, geometry.area(boxes) == 0)
    named, exact = _labels_as_asked(questions)
    yield _share("format", "label_exact", box_row[named], exact)
    for repair in np.unique(repairs).tolist():
        yield replace(_share("format", f"repair:{repair}", row, np.isin(row, repaired[repairs == repair])), only_by=("all",))


def _labels_as_asked(questions: Questions) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """((P,) boxes that have a label, and for each of them whether it is one that was asked for, letter by letter)."""
    columns = [questions.table[name].to_pylist() for name in ("asked", "predicted_labels")]
    pairs = [(label, set(asked)) for asked, labels in zip(*columns, strict=True) for label in labels or ()]
    named = np.array([label is not None for label, _ in pairs], np.bool_)
    return named, np.array([label in asked for label, asked in pairs if label is not None], np.bool_)


def _notes(questions: Questions) -> Iterator[str]:
    units = questions.units
    named = units.label != STRAY
    if questions.num_left_out:
        yield f"{questions.num_left_out} questions ask for no boxes and are not scored here."
    if not len(units.truth):
        yield "No question has a true box: rec, recall and T-acc are not defined."
    if (units.num_truth[named] > 0).all():
        yield "No question is about an absent object: N-acc and hallucinated are not defined."
    if not len(units.predicted):
        yield "No reply gives a box: precision, duplicates and stray are not defined."
    asked, seen = np.unique(units.label[named]), np.unique(units.label[units.truth_unit])
    never = [units.labels[label] for label in np.setdiff1d(asked, seen)]
    if never and len(seen):
        shown = ", ".join(repr(label) for label in never[:5]) + (", ..." if len(never) > 5 else "")
        yield f"{len(never)} of {len(asked)} labels never occur in the truth ({shown}): macro recall is the mean of the others."


# ---- sums, ratios and intervals


def _measures(questions: Questions, metrics: Sequence[_Metric], draws: int, seed: int) -> Iterator[Measure]:
    image, image_names = questions.codes("image")
    everything: tuple[str, IntColumn, list[str]] = ("all", np.zeros(len(questions), np.int64), ["all"])
    blocks: list[tuple[str, str, _Block]] = []
    for by, codes, names in [everything, *((by, *questions.codes(by)) for by in GROUPINGS)]:
        shown = [metric for metric in metrics if metric.size is None and (by in metric.only_by or not metric.only_by)]
        blocks += [(by, name, _block(shown, codes == code, image)) for code, name in enumerate(names)]
    sized = [metric for metric in metrics if metric.size is not None]
    every_question = np.ones(len(questions), np.bool_)
    blocks += [("size", name, _block(sized, every_question, image, size)) for size, name in enumerate(SIZES)]

    once = np.ones((1, len(image_names)))
    drawn = _draws([block for *_, block in blocks], len(image_names), draws, seed)
    for (by, group, block), of_block in zip(blocks, drawn, strict=True):
        values = block.ratios(once)[:, 0].tolist()
        for number, (metric, value) in enumerate(zip(block.metrics, values, strict=True)):
            low, high = _interval(of_block[number], block.num_images[number])
            yield Measure(metric.section, by, group, metric.name, None if np.isnan(value) else value, low, high, block.nums[number])


@dataclass(frozen=True, eq=False)
class _Block:
    """The metrics of one group, summed up by image: a draw of images is then a product of matrices."""

    metrics: Sequence[_Metric]
    images: IntColumn
    """(I,) those of the group."""
    above: npt.NDArray[np.float64]
    """(I, C) the columns of all metrics that are no macro means, side by side."""
    below: npt.NDArray[np.float64]
    """(I, C)"""
    macros: Mapping[int, "_Macro"]
    """By the metric's place."""
    nums: Sequence[int]
    num_images: Sequence[int]
    """Images that say something about each metric."""

    def ratios(self, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(d, images) how often each image counts -> (metrics, d) values; nan where there is nothing to divide by."""
        drawn = weights[:, self.images]
        result = np.empty((len(self.metrics), len(weights)))
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan, and means: not defined
            quotients = (drawn @ self.above) / (drawn @ self.below)
        column = 0
        for number, metric in enumerate(self.metrics):
            if number in self.macros:
                result[number] = self.macros[number].means(weights)
                continue
            width = metric.above.shape[1]
            result[number] = quotients[:, column : column + width].mean(axis=1)
            column += width
        return result


@dataclass(frozen=True, eq=False)
class _Macro:
    """One ratio for each label, summed up by label and image."""

    image: IntColumn
    """(m,) ordered by label."""
    above: FloatColumn
    below: FloatColumn
    starts: IntColumn
    """Where each label begins."""

    def means(self, weights: npt.NDArray[np.float64]) -> FloatColumn:
        """(d, images) weights -> (d,) means over the labels that have a ratio; nan where none has."""
        if not len(self.image):
            return np.full(len(weights), np.nan)
        # One draw at a time: its columns stay in the processor's cache, which a block of draws does not (measured: 5 to 10 times slower).
        above, below = np.empty((len(weights), len(self.starts))), np.empty((len(weights), len(self.starts)))
        for draw, of_image in enumerate(weights):
            drawn = of_image[self.image]
            above[draw] = np.add.reduceat(drawn * self.above, self.starts)
            below[draw] = np.add.reduceat(drawn * self.below, self.starts)
        with np.errstate(invalid="ignore"):
            ratios: FloatColumn = np.divide(above, below, out=np.zeros_like(above), where=below > 0).sum(axis=1) / (below > 0).sum(axis=1)
        return ratios

    @property
    def num(self) -> int:
        return int((np.add.reduceat(self.below, self.starts) > 0).sum()) if len(self.image) else 0


def _block(metrics: Sequence[_Metric], of_group: npt.NDArray[np.bool_], image_of_row: IntColumn, size: int | None = None) -> _Block:
    """of_group: (N,) which questions. size: only items of that size."""
    images = np.unique(image_of_row[of_group])
    above, below, macros, nums, num_images = [], [], {}, [], []
    for number, metric in enumerate(metrics):
        chosen = of_group[metric.row] if size is None else of_group[metric.row] & (metric.size == size)
        place = np.searchsorted(images, image_of_row[metric.row[chosen]])
        if metric.label is None:
            above += [np.bincount(place, column, minlength=len(images)) for column in metric.above[chosen].T]
            below += [np.bincount(place, column, minlength=len(images)) for column in metric.below[chosen].T]
            nums.append(round(float(metric.below[chosen, 0].sum())))
        else:
            macros[number] = _macro(metric, chosen, image_of_row)
            nums.append(macros[number].num)
        num_images.append(len(np.unique(place[metric.below[chosen, 0] > 0])))
    return _Block(metrics, images, np.stack(above, axis=1), np.stack(below, axis=1), macros, nums, num_images)


def _macro(metric: _Metric, chosen: npt.NDArray[np.bool_], image_of_row: IntColumn) -> _Macro:
    assert metric.label is not None
    image, label = image_of_row[metric.row[chosen]], metric.label[chosen]
    num_images = len(image_of_row)
    keys, place = np.unique(label * num_images + image, return_inverse=True)
    above, below = (
        np.bincount(place, values[chosen, 0], minlength=len(keys)).astype(np.float64) for values in (metric.above, metric.below)
    )
    return _Macro(keys % num_images, above, below, np.flatnonzero(np.diff(keys // num_images, prepend=-1)))


def _draws(blocks: Sequence[_Block], num_images: int, draws: int, seed: int) -> list[npt.NDArray[np.float64]]:
    """(metrics, draws) for each block: its values when as many images are drawn as there are, with replacement; all see the same draws."""
    rng = np.random.default_rng(seed)
    values = [np.full((len(block.metrics), draws), np.nan) for block in blocks]
    for start in range(0, draws, _DRAWS_AT_A_TIME):
        count = min(_DRAWS_AT_A_TIME, draws - start)
        drawn = rng.integers(num_images, size=(count, num_images)) + num_images * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * num_images).reshape(count, num_images).astype(np.float64)
        for block, of_block in zip(blocks, values, strict=True):
            of_block[:, start : start + count] = block.ratios(weights)
    return values


def _interval(values: FloatColumn, num_images: int) -> tuple[float | None, float | None]:
    """95 % percentile interval of the draws in which the metric was defined."""
    defined = values[~np.isnan(values)]
    if num_images < 2 or not len(defined):
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def results_of(content: Mapping[str, Any]) -> Results:
    """What `Results.to_json` wrote."""
    return Results(tuple(Measure(**measure) for measure in content["measures"]), content["settings"], tuple(content["notes"]))


# ---- for people


def markdown(results: Results) -> str:
    """Tables of all measures: a table for each section and grouping, a row for each group. Shares in percent, with their intervals."""
    lines = []
    sections: dict[str, list[Measure]] = {}
    for measure in results.measures:
        sections.setdefault(measure.section, []).append(measure)
    for section, measures in sections.items():
        lines += [f"## {section}", "", results.settings["protocol"][section], ""]
        for by in dict.fromkeys(measure.by for measure in measures):
            lines += [*_table(by, [measure for measure in measures if measure.by == by]), ""]
    lines += [f"- {note}" for note in results.notes]
    bootstrap = results.settings["bootstrap"]
    lines.append(
        f"- In percent, but for count_mae. In brackets: 95 % intervals of a bootstrap over {results.settings['num_images']} images "
        f"({bootstrap['draws']} draws, seed {bootstrap['seed']}). –: not defined."
    )
    return "\n".join(lines) + "\n"


def _table(by: str, measures: Sequence[Measure]) -> Iterator[str]:
    """One group: a metric a row. Several: a group a row."""
    groups = list(dict.fromkeys(measure.group for measure in measures))
    names = list(dict.fromkeys(measure.metric for measure in measures))
    cell = {(measure.group, measure.metric): measure for measure in measures}
    if by == "all":
        yield "| metric | value | of |"
        yield "|---|---|---|"
        yield from (f"| {measure.metric} | {number(measure)} | {measure.num} |" for measure in measures)
        return
    yield f"| {by} | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for group in groups:
        escaped = group.replace("|", "\\|").replace("\n", " ")
        yield f"| {escaped} | {' | '.join(number(cell[group, name]) if (group, name) in cell else '–' for name in names)} |"


def number(measure: Measure) -> str:
    """In percent with its interval; count_mae as it is."""
    if measure.value is None:
        return "–"
    factor, digits = (1, 2) if measure.metric == "count_mae" else (100, 1)
    value = f"{measure.value * factor:.{digits}f}"
    if measure.low is None or measure.high is None:
        return value
    return f"{value} [{measure.low * factor:.{digits}f}, {measure.high * factor:.{digits}f}]"
