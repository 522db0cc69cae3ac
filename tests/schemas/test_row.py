"""The Arrow schemas: every column explained, none nullable without a reason, the same after a trip to the disk."""

from collections.abc import Iterator

import pyarrow as pa
import pytest

from boxcar.schemas.row import BOX, IMAGE, IMAGE_SHARD_SCHEMA, ROW_SCHEMA, ROW_SCHEMA_VERSION, TURN

SCHEMAS = [pytest.param(ROW_SCHEMA, id="rows"), pytest.param(IMAGE_SHARD_SCHEMA, id="images")]
NULLABLE = {"images.item.path", "images.item.shard", "images.item.shard_row"}
"""A row names either a path or a place in an image shard."""


def fields(schema: pa.Schema) -> Iterator[tuple[str, pa.Field]]:
    """Every field with its dotted name, however deep."""
    for field in schema:
        yield from _below("", field)


def _below(parent: str, field: pa.Field) -> Iterator[tuple[str, pa.Field]]:
    name = f"{parent}{field.name}"
    yield name, field
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        yield from _below(f"{name}.", field.type.value_field)
    elif pa.types.is_struct(field.type):
        for number in range(field.type.num_fields):
            yield from _below(f"{name}.", field.type.field(number))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_column_says_what_it_is(schema: pa.Schema) -> None:
    for name, field in fields(schema):
        if not name.endswith(".item"):
            assert (field.metadata or {}).get(b"about", b"").decode().strip(), name


@pytest.mark.parametrize("schema", SCHEMAS)
def test_only_the_two_places_of_an_image_may_be_null(schema: pa.Schema) -> None:
    assert {name for name, field in fields(schema) if field.nullable} <= NULLABLE


def test_the_two_places_of_an_image_are_nullable() -> None:
    assert {name for name, field in fields(ROW_SCHEMA) if field.nullable} == NULLABLE


@pytest.mark.parametrize("schema", SCHEMAS)
def test_columns_of_numbers_name_their_unit(schema: pa.Schema) -> None:
    sizes = {"width", "height", "resized_width", "resized_height"}
    for name, field in fields(schema):
        if name.rpartition(".")[2] in sizes:
            assert b"pixels" in field.metadata[b"about"], name


@pytest.mark.parametrize(("schema", "kind"), [(ROW_SCHEMA, b"row"), (IMAGE_SHARD_SCHEMA, b"images")], ids=["rows", "images"])
def test_a_schema_carries_its_kind_and_version_through_a_file(schema: pa.Schema, kind: bytes) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema):
        pass
    back = pa.ipc.open_file(sink.getvalue()).schema
    assert back.equals(schema, check_metadata=True)
    assert back.metadata == {b"boxcar.schema": kind, b"boxcar.version": str(ROW_SCHEMA_VERSION).encode()}


def test_columns_change_only_together_with_the_version() -> None:
    """Whoever edits this list has changed what is on disk: old shards must be refused: count up ROW_SCHEMA_VERSION, and the 1 below."""
    assert ROW_SCHEMA_VERSION == 1
    assert ROW_SCHEMA.names == [
        *("sample_id", "source", "split", "position", "images", "turns", "ordered"),
        *("header_ids", "header_tokens", "visual_tokens", "text_tokens", "total_tokens", "max_turn_tokens"),
    ]
    assert [IMAGE.field(number).name for number in range(IMAGE.num_fields)] == [
        *("path", "shard", "shard_row", "width", "height", "orientation", "resized_width", "resized_height"),
        *("grid_t", "grid_h", "grid_w", "visual_tokens"),
    ]
    assert [TURN.field(number).name for number in range(TURN.num_fields)] == [
        *("task", "language", "question", "answer", "prompt_ids", "answer_ids", "answer_is_coordinate"),
        *("boxes", "labels", "image_index", "difficulty", "weight"),
    ]
    assert IMAGE_SHARD_SCHEMA.names == ["path", "content_xxh3_128", "format", "width", "height", "orientation", "bytes"]


def test_a_box_is_four_numbers_always() -> None:
    assert pa.array([[1.0, 2.0, 3.0, 4.0]], BOX).to_pylist() == [[1.0, 2.0, 3.0, 4.0]]
    with pytest.raises(pa.ArrowInvalid):
        pa.array([[1.0, 2.0, 3.0]], BOX)
