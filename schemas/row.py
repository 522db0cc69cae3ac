"""The Arrow schema of a training row: the door between converting and training.

A row is images and turns. Its full sequence is

    header_ids + prompt_ids + answer_open + answer_ids + turn_close + turn_open + prompt_ids + answer_open + ...

with the constants from the frame contract and every image token expanded to visual_tokens + extra_placeholders. Where the contract says
one_question_per_image, each turn is a sequence of its own behind the header.

Units stand in each field's metadata; a reader that finds another version refuses the shard.
"""

import pyarrow as pa

ROW_SCHEMA_VERSION = 1


def _field(name: str, kind: pa.DataType, about: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"about": about})


IMAGE = pa.struct(
    [
        pa.field(
            "path",
            pa.string(),
            nullable=True,
            metadata={"about": "relative to the manifest's images_root, absolute, or a URI; null where embedded"},
        ),
        pa.field("shard", pa.int32(), nullable=True, metadata={"about": "number of the image shard; null where referenced"}),
        pa.field("shard_row", pa.int32(), nullable=True, metadata={"about": "row within that image shard"}),
        _field("width", pa.int32(), "pixels, upright after EXIF"),
        _field("height", pa.int32(), "pixels, upright after EXIF"),
        _field("orientation", pa.int8(), "EXIF orientation of the stored image, 1..8"),
        _field("resized_width", pa.int32(), "pixels that the model sees"),
        _field("resized_height", pa.int32(), "pixels that the model sees"),
        _field("grid_t", pa.int32(), "temporal patches, 1 for a still image"),
        _field("grid_h", pa.int32(), "patches"),
        _field("grid_w", pa.int32(), "patches"),
        _field("visual_tokens", pa.int32(), "tokens that carry the image, without boundaries"),
    ]
)

BOX = pa.list_(pa.field("item", pa.float64(), nullable=False), 4)
"""[x0, y0, x1, y1], pixels of the upright original image."""


def _list(item: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("item", item, nullable=False))


TURN = pa.struct(
    [
        _field("task", pa.string(), "detect, detect_joint, refer, describe, absent, caption or dialogue"),
        _field("language", pa.string(), "of the question: en or zh"),
        _field("question", pa.string(), "as people read it, and as prompt_ids encode it"),
        _field("answer", pa.string(), "as people read it, and as answer_ids encode it"),
        _field("prompt_ids", _list(pa.int32()), "token ids of the question; one image token for each image in it"),
        _field("answer_ids", _list(pa.int32()), "token ids of the answer, without what closes the turn"),
        _field("answer_is_coordinate", _list(pa.bool_()), "for each of answer_ids: whether it belongs to a box's number"),
        _field(
            "boxes", _list(BOX), "boxes of question, then answer, in their order in the text; xyxy, pixels of the upright original image"
        ),
        _field("labels", _list(pa.string()), "label of each box; for absent turns the label asked for"),
        _field("image_index", pa.int32(), "image of this row that the boxes belong to; -1 where they belong to several or there are none"),
        _field("difficulty", pa.float32(), "raw score in [0, 1]; the manifest's histograms turn it into a quantile"),
        _field("weight", pa.float32(), "loss weight"),
    ]
)

ROW_SCHEMA = pa.schema(
    [
        _field("sample_id", pa.string(), "source/record id, with #part where a record was split"),
        _field("source", pa.string(), "name of the source"),
        _field("split", pa.string(), "name of the split"),
        _field("position", pa.string(), "where the record stands in the source, for people"),
        _field("images", _list(IMAGE), "in the order of their placeholders"),
        _field("turns", _list(TURN), "questions with their answers"),
        _field("ordered", pa.bool_(), "true: a dialogue, keep all turns in order; false: any subset, any order"),
        _field("header_ids", _list(pa.int32()), "token ids up to the first question, one image token for each image in them"),
        _field("header_tokens", pa.int32(), "tokens of the header without image placeholders"),
        _field("visual_tokens", pa.int32(), "image placeholders of the whole row"),
        _field("text_tokens", pa.int32(), "all other tokens when every turn is used"),
        _field(
            "total_tokens", pa.int32(), "sequence length when every turn is used; with one_question_per_image, the sum over its sequences"
        ),
        _field("max_turn_tokens", pa.int32(), "sequence length with the longest single turn alone (ordered rows: total_tokens)"),
    ],
    metadata={"boxcar.schema": "row", "boxcar.version": str(ROW_SCHEMA_VERSION)},
)

IMAGE_SHARD_SCHEMA = pa.schema(
    [
        _field("path", pa.string(), "as the source names it"),
        _field("content_xxh3_128", pa.string(), "hex, of the original file"),
        _field("format", pa.string(), "of the stored bytes: jpeg, png, ..."),
        _field("width", pa.int32(), "pixels of the stored image, as stored"),
        _field("height", pa.int32(), "pixels of the stored image, as stored"),
        _field("orientation", pa.int8(), "EXIF orientation of the stored bytes, 1..8"),
        _field("bytes", pa.large_binary(), "the original file, or a PNG at the model's resized size"),
    ],
    metadata={"boxcar.schema": "images", "boxcar.version": str(ROW_SCHEMA_VERSION)},
)
