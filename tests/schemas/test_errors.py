"""Errors say where, what, what instead and the way out, and travel between processes as they are."""

import copy
import pickle

import pytest

from boxcar.schemas import errors
from boxcar.schemas.errors import BoxcarError, ImageError

PLAIN = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BoxcarError) and kind is not ImageError]
EXAMPLES = [kind("a.json, annotation 4131", found="3 numbers", expected="[x, y, w, h]", fix="Fix it.") for kind in PLAIN]
EXAMPLES.append(ImageError("a.jpg", reason="truncated_image", found="half a file", expected="all of it"))


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        pytest.param("", "a.json: found 3 numbers, expected 4.", id="no way out"),
        pytest.param("Add one.", "a.json: found 3 numbers, expected 4. Add one.", id="with the way out"),
    ],
)
def test_a_message_has_its_four_parts_in_order(fix: str, message: str) -> None:
    assert str(BoxcarError("a.json", found="3 numbers", expected="4", fix=fix)) == message


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert len(EXAMPLES) == 10
    for error in EXAMPLES:
        assert type(error).__name__ in errors.__doc__


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(error: BoxcarError, protocol: int) -> None:
    back = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301  (our own bytes)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert (back.where, back.found, back.expected, back.fix) == (error.where, error.found, error.expected, error.fix)
    assert back.args == error.args
    assert getattr(back, "reason", "") == ("truncated_image" if isinstance(error, ImageError) else "")


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_can_be_copied(error: BoxcarError) -> None:
    assert str(copy.copy(error)) == str(copy.deepcopy(error)) == str(error)
