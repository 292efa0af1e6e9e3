"""Static shapes: what the user may say, what defaults, and every refusal."""

from __future__ import annotations

import pytest

from ingot.errors import ShapeError
from ingot.frontend.shapes import DeclaredInput, resolve_shapes

IMAGE = DeclaredInput("image", ("N", 3, "H", "W"))
SCALE = DeclaredInput("scale", (None, 4))


def test_fixed_shapes_need_nothing() -> None:
    assert resolve_shapes([DeclaredInput("x", (1, 3)), DeclaredInput("s", ())], None) == (
        {"x": (1, 3), "s": ()},
        (),
        {},
    )


def test_an_open_batch_becomes_one_with_a_notice() -> None:
    shapes, notices, _ = resolve_shapes([DeclaredInput("x", ("N", 3))], None)
    assert shapes == {"x": (1, 3)}
    assert len(notices) == 1 and "'N'" in notices[0] and "--shape x=1,3" in notices[0]


def test_a_given_shape_fills_every_place_of_a_name() -> None:
    other = DeclaredInput("mask", ("N", "W"))
    shapes, notices, sizes = resolve_shapes([IMAGE, other], {"image": (2, 3, 8, 9)})
    assert shapes == {"image": (2, 3, 8, 9), "mask": (2, 9)}
    assert notices == () and sizes == {"N": 2, "H": 8, "W": 9}


def test_a_defaulted_batch_fills_every_place_of_its_name() -> None:
    shapes, notices, _ = resolve_shapes([DeclaredInput("a", ("N", 2)), DeclaredInput("b", (3, "N"))], None)
    assert shapes == {"a": (1, 2), "b": (3, 1)} and len(notices) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"imag": (1, 3, 8, 8)}, ["'imag'", "did you mean 'image'"]),
        ({"zebra": (1,)}, ["'zebra'", "'scale'"]),
        ({"image": (1, 3, 8)}, ["number of dimensions", "3: [1, 3, 8]", "4:"]),
        ({"image": (1, 4, 8, 8)}, ["dimension 1", "found:   4", "allowed: 3"]),
        ({"image": (0, 3, 8, 8)}, ["positive"]),
        ({"image": (1, 3, -8, 8)}, ["positive"]),
        ({"image": (1, 3, 2**31, 8)}, ["positive"]),
        ({"image": (1, 3, 8.0, 8)}, ["positive"]),
        ({"image": (True, 3, 8, 8)}, ["positive"]),
        ({"image": "1388"}, ["not a list"]),
        ({"image": 7}, ["not a list"]),
        (None, ["image", "leaves dimensions open", "--shape image=1,3,?,?"]),
    ],
)
def test_refusals_say_what_and_what_is_allowed(given: object, words: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        resolve_shapes([IMAGE, SCALE], given)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_two_given_shapes_must_agree_on_a_name() -> None:
    with pytest.raises(ShapeError, match="given elsewhere"):
        resolve_shapes([DeclaredInput("a", ("N", 2)), DeclaredInput("b", ("N",))], {"a": (2, 2), "b": (3,)})
