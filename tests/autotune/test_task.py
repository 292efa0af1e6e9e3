"""Tasks: their keys are the same forever, and what is cut out computes what it was cut from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autotune.small import small_state
from ingot.autotune.space import TEMPLATES, Space, decode, encode
from ingot.autotune.task import Task, lowered_with, prepared, tasks_of
from ingot.autotune.weights import WeightSpec, expand, factorise, spec_of, synthesise
from ingot.frontend import import_model
from ingot.passes.lower import Call
from ingot.passes.state import State
from ingot.schedules.conv2d import TileConfig
from ingot.schedules.conv2d_amx import TilesConfig
from ingot.schedules.depthwise import DepthwiseConfig
from ingot.schedules.half import BF16
from ingot.schedules.microkernels import weight_kind
from ingot.schedules.winograd import WinogradConfig
from ingot.target import load_target
from passes.execute import Executable
from schedules.common import Branches
from schedules.quantised import Layers


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    return tasks_of(small_state(tmp_path_factory.mktemp("small"), "x86-64-v3"))


def test_keys_are_what_old_logs_hold(tasks: list[Task], golden: Callable[..., None]) -> None:
    """A changed key loses every record of it: change one only with the operator's meaning."""
    golden("".join(f"{task.runs} x {task.key}\n" for task in tasks))


def test_keys_do_not_depend_on_the_target(tasks: list[Task], tmp_path: Path) -> None:
    assert [t.key for t in tasks_of(small_state(tmp_path, "raspberry-pi-4"))] == [t.key for t in tasks]


def test_every_task_is_what_it_was_cut_from(tasks: list[Task]) -> None:
    target = load_target("x86-64-v3")
    for task in tasks:
        default = lowered_with((task.key, task.work), task.default, target)  # raises if the key is not asked for
        assert any(isinstance(call, Call) for call in default.lowered.calls)
        assert task.default in Space(task.space)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_layers_of_whole_numbers_are_tasks(dtype: str, tmp_path: Path, golden: Callable[..., None]) -> None:
    """Made-up weights need the same instructions as the real ones: or the key would not be asked for again."""
    layers = Layers(dtype, per_channel=dtype == "int8")
    for least in (-127, -128):
        layers.conv(24, 40, (6, 11), least=least)
        layers.conv(32, 32, (5, 9), depthwise=True, least=least)
        layers.dense(7, 48, 40, least=least)
    imported, target = layers.imported(tmp_path), load_target("x86-64-v3")
    tasks = tasks_of(prepared(State(imported.module, imported.weights, imported, target)))
    for task in tasks:
        for config in (task.default, task.space[-1]):
            lowered = lowered_with((task.key, task.work), config, target).lowered  # raises if it is not
            packed = max(
                (v.data for c in lowered.calls if isinstance(c, Call) for v in c.args if v.data is not None),
                key=lambda data: data.size,
            )
            assert factorise(packed) is not None, task.key
    golden("".join(f"{task.runs} x {task.key}\n" for task in tasks))


def test_layers_on_tiles_of_whole_numbers_have_both_templates(tmp_path: Path) -> None:
    layers, target = Layers("int8", per_channel=True), load_target("sapphirerapids")
    layers.conv(64, 40, (6, 11))
    layers.dense(20, 96, 40)
    imported = layers.imported(tmp_path)
    for task in tasks_of(prepared(State(imported.module, imported.weights, imported, target))):
        assert {type(config) for config in task.space} == {TileConfig, TilesConfig}, task.key
        for config in (task.space[-1], *(c for c in task.space if isinstance(c, TilesConfig))):
            lowered_with((task.key, task.work), config, target)


@pytest.mark.parametrize(
    ("target", "kinds"), [("sapphirerapids", {TileConfig, TilesConfig}), ("graviton-3", {TileConfig})]
)
def test_layers_of_half_precision_are_tasks(target: str, kinds: set[type], tmp_path: Path) -> None:
    """Every template's kernel computes the same from the same made-up weights, run here on what instructions mean."""
    branches, board, host = Branches(), load_target(target), load_target("native")
    branches.conv(1, 64, 48, (7, 9), (3, 3), (1, 1), (1, 1, 1, 1), epilogue="relu")
    branches.matmul((3, 17), 96, 70, "relu")
    (tmp_path / "half.onnx").write_bytes(branches.bytes())
    imported = import_model(tmp_path / "half.onnx")
    tasks = tasks_of(prepared(State(imported.module, imported.weights, imported, board, precision="bf16")))
    assert [task.key for task in tasks] == [
        "conv2d bf16 n1 h7 w9 i64 o48 k3x3 s1x1 p1.1.1.1 d1x1 | add.v relu",
        "matmul bf16 m3x17 k96 n70 | add.v relu",
    ]
    for task in tasks:
        assert {type(config) for config in task.space} == kinds
        feeds = [np.random.default_rng(1).standard_normal(spec.shape).astype(spec.dtype) for spec in task.work.inputs]
        results = []
        for config in (task.default, task.space[0], task.space[len(task.space) // 2], task.space[-1]):
            state = lowered_with((task.key, task.work), config, board)
            for packed in packed_weights(state):
                factors = factorise(packed)
                assert factors is not None, (task.key, config)
                assert factors.dtype == "bfloat16"
                np.testing.assert_array_equal(BF16.restore(expand(factors)), BF16.restore(packed.reshape(-1)))
            results += Executable(state.having(target=host), tmp_path).run(feeds)
            assert np.abs(results[-1] - results[0]).max() <= 1e-5 * np.abs(results[0]).max(), (task.key, config)
        assert np.abs(results[0]).max() > 0


def packed_weights(state: State) -> list[np.ndarray]:
    """The large weights that a planned program's kernels read."""
    values = [value for call in state.lowered.calls if isinstance(call, Call) for value in call.args]
    return [value.data for value in values if value.data is not None and value.data.size > 256]


@pytest.mark.parametrize("kind", ["p7", "q7", "q8", "u8", "q9"])
def test_made_up_whole_weights_are_of_their_kind(kind: str) -> None:
    spec = WeightSpec("w0", "float32", (24, 3, 3, 8), whole=True, kind=kind)
    assert weight_kind(synthesise(spec)) == kind
    assert spec_of("w0", synthesise(spec)) == spec


def test_packed_weights_are_outer_products_in_every_template(tasks: list[Task]) -> None:
    target = load_target("x86-64-v3")
    seen = set()
    for task in tasks:
        kinds = {type(c): c for c in task.space}
        for config in {task.default, *kinds.values(), task.space[-1]}:
            seen.add(type(config))
            for packed in packed_weights(lowered_with((task.key, task.work), config, target)):
                factors = factorise(packed)
                assert factors is not None, (task.key, config)
                np.testing.assert_allclose(expand(factors), packed.reshape(-1), atol=1e-5 * np.abs(packed).max())
    assert seen == {TileConfig, WinogradConfig, DepthwiseConfig}


def test_whole_weights_stay_whole() -> None:
    spec = WeightSpec("w0", "int8", (24, 3, 3, 8), whole=True)
    value = synthesise(spec)
    assert value.dtype == np.int8
    # [CO/8][KH][KW][CI/4][8][4], as integer kernels pack it
    packed = np.ascontiguousarray(value.reshape(3, 8, 3, 3, 2, 4).transpose(0, 2, 3, 4, 1, 5))
    factors = factorise(packed)
    assert factors is not None
    np.testing.assert_array_equal(expand(factors), packed.reshape(-1))


@pytest.mark.parametrize("shape", [(3, 3, 3, 12, 2, 2, 8, 2), (3, 3, 3, 4, 5, 2, 8)])
def test_registers_of_channels_with_groups_between_are_outer_products(shape: tuple[int, ...]) -> None:
    """As `conv2d_int8` (channels along axes 0, 4 and 6) and `conv2d_mmla` (0, 4 and 5) pack them."""
    channels = (0, 4, 6) if len(shape) == 8 else (0, 4, 5)
    random = np.random.default_rng(0)
    a, b = (random.integers(-11, 12, [d if (i in channels) == c else 1 for i, d in enumerate(shape)]) for c in (1, 0))
    packed = (a * b).astype(np.int8)
    factors = factorise(packed)
    assert factors is not None
    np.testing.assert_array_equal(expand(factors), packed.reshape(-1))


def test_small_weights_keep_their_values() -> None:
    scale = np.float32([0.25])
    np.testing.assert_array_equal(synthesise(spec_of("w0", scale)), scale)


def test_indices_keep_their_values() -> None:
    table = np.arange(500, dtype=np.int64)
    np.testing.assert_array_equal(synthesise(spec_of("w0", table)), table)


@pytest.mark.parametrize("shape", [(40, 30), (7, 3, 3, 24), (5, 4, 8, 8, 4)])
def test_weights_that_no_template_packs_are_outer_products_too(shape: tuple[int, ...]) -> None:
    value = synthesise(WeightSpec("w0", "float32", shape, whole=False))
    factors = factorise(value)
    assert factors is not None
    np.testing.assert_allclose(expand(factors), value.reshape(-1), atol=1e-6)


def test_what_is_no_outer_product_is_none() -> None:
    assert factorise(np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)) is None


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_config_survives_its_dict(kind: str) -> None:
    from dataclasses import fields

    config = TEMPLATES[kind](**{f.name: i + 1 for i, f in enumerate(fields(TEMPLATES[kind]))})
    assert decode(encode(config)) == (config, 0)
    assert decode({**encode(config), "tomorrow": 3}) == (config, 1)


@pytest.mark.parametrize(
    "encoded", [{}, {"template": "tile"}, {"template": "no"}, {"template": "tile", "pixels": "4", "block": 8}]
)
def test_what_is_no_config_is_none(encoded: dict[str, int | str]) -> None:
    assert decode(encoded) is None
