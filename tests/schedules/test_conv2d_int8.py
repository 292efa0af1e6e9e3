"""Convolutions and matrix products of 8-bit integers: exact at every edge size, on every instruction set."""

from __future__ import annotations

import pytest

from ingot.schedules import conv2d_int8
from ingot.target import load_target


@pytest.mark.parametrize(("name", "wanted"), [("x86-64-v3", "uint8"), ("raspberry-pi-4", "int8")])
def test_the_preferred_activation_is_the_instructions_own(name: str, wanted: str) -> None:
    assert conv2d_int8.preferred_activation(load_target(name)) == wanted
