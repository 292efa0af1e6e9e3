"""Winograd convolution F(m x m, 3 x 3): 3x3 windows, stride 1, with fewer multiplications.

The output is cut into tiles of m x m positions. A tile reads a patch of a x a inputs, a = m + 2, and

    output tile = A^T [ (G w G^T) * (B^T patch B) ] A

where `*` is elementwise over the a^2 positions of the patch and sums over input channels: a^2 matrix products of
[tiles x CI] by [CI x CO], in place of 9 m^2 multiply-accumulates per tile and pair of channels. U = G w G^T is made at
compile time in float64, rounded once and packed as [CO/b][a^2][CI][b]. `schedules.winograd_nests` has the loops.

Measured error, max|error| / max|output| against float64, inputs normal or rectified normal, 16 to 512 input channels:
direct 3e-7 to 2.5e-6, F(2x2) 2e-7 to 1e-6, F(4x4) 8e-7 to 4e-6; the larger ones with more channels.

`schedules.winograd_int8` uses F(2x2) on integers, exactly: a `Form` says what is computed on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ingot.schedules.conv2d import Conv2DWorkload, TileConfig
from ingot.schedules.conv2d import configs as tile_configs
from ingot.schedules.conv2d import cost as tile_cost
from ingot.schedules.microkernels import Dot
from ingot.schedules.vector import DTYPE_BYTES, ceil_div, lanes_for, largest_divisor, registers
from ingot.target import Target

# Interpolation points (infinity is added). Those of F(4x4) are exact in binary, and so are B^T and A^T: with the
# textbook's 0, +-1, +-2 the error is three times as large.
POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}

# Bytes of stack for the products and, where they fit too, the transformed patches of one task.
STACK_BYTES = 56 * 1024
# Workspaces for each core of the target: with several, threads get even shares also when some cores are not used.
PARTS_PER_CORE = 4
# Register tiles that may be one block of tiles, at most.
_MOST_GROUPED = 10


@dataclass(frozen=True)
class WinogradConfig:
    """F(`size` x `size`, 3x3); `tiles` tiles by `block` output channels are multiplied at once, in registers.

    unroll: input channels a step takes. parts: 0 if all patches are transformed before the first product; else into
    how many parts the tiles are divided, each with a workspace of its own for one block of tiles at a time. group: a
    block is so many times `tiles` tiles, all of which a position's weights meet before the next position's. prefetch:
    1 if those of the next position are fetched meanwhile (`schedules.prefetch`).
    """

    size: int
    tiles: int
    block: int
    unroll: int
    parts: int
    group: int = 1
    prefetch: int = 0

    @property
    def together(self) -> int:
        """Return the tiles of one block."""
        return self.tiles * self.group

    @property
    def patch(self) -> int:
        """Return the edge of the input patch of one tile."""
        return self.size + 2

    @property
    def positions(self) -> int:
        """Return the number of positions of a patch: matrix products."""
        return self.patch**2


@dataclass(frozen=True)
class Form:
    """What a Winograd convolution computes on: dtypes of its data, of patches and weights, of sums, and of results.

    zero_point: what is subtracted from data of integers, which padding stands for. dot: the instruction that multiplies
    integers, `dot.group` input channels at a time.
    """

    stored: str = "float32"
    patch: str = "float32"
    sums: str = "float32"
    result: str = "float32"
    zero_point: int = 0
    dot: Dot | None = None

    @property
    def group(self) -> int:
        """Return the input channels that one multiplication takes."""
        return 1 if self.dot is None else self.dot.group

    @property
    def cost(self) -> float:
        """Return what a multiplication costs beside one vector FMA."""
        return 1.0 if self.dot is None else self.dot.cost


FLOAT = Form()


@dataclass(frozen=True)
class Tiling:
    """How one workload is cut by one config."""

    workload: Conv2DWorkload
    config: WinogradConfig
    form: Form = FLOAT

    @property
    def rows(self) -> int:
        """Return the rows of tiles in one image."""
        return ceil_div(self.workload.out_height, self.config.size)

    @property
    def columns(self) -> int:
        """Return the tiles in one row."""
        return ceil_div(self.workload.out_width, self.config.size)

    @property
    def total(self) -> int:
        """Return the tiles of all images."""
        return self.workload.batch * self.rows * self.columns

    @property
    def tile_blocks(self) -> int:
        """Return the number of blocks of tiles."""
        return ceil_div(self.total, self.config.together)

    @property
    def channel_blocks(self) -> int:
        """Return the number of blocks of output channels."""
        return ceil_div(self.workload.out_channels, self.config.block)

    @property
    def patch_bytes(self) -> int:
        """Return the bytes of the transformed patches of one block of tiles."""
        return self.config.positions * self.config.together * self.workload.in_channels * DTYPE_BYTES[self.form.patch]

    @property
    def product_bytes(self) -> int:
        """Return the bytes of the products of one block of tiles with one block of channels."""
        return self.config.positions * self.config.together * self.config.block * 4

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the packed weights."""
        columns = self.channel_blocks * self.config.block
        return self.config.positions * self.workload.in_channels * columns * DTYPE_BYTES[self.form.patch]

    @property
    def on_stack(self) -> bool:
        """Say whether each block of tiles is a task that keeps its patches on its stack."""
        return self.config.parts == self.tile_blocks and self.patch_bytes + self.product_bytes <= STACK_BYTES

    @property
    def workspace_bytes(self) -> int:
        """Return the bytes of the arena that the transformed patches take."""
        return 0 if self.on_stack else self.patch_bytes * (self.config.parts or self.tile_blocks)

    @property
    def channels_first(self) -> bool:
        """Say whether one block of channels visits all tiles before the next starts (only if `parts` is 0).

        Compares the bytes each order reads again: the patches once per block of channels, or all weights once per
        block of tiles.
        """
        patches, weights = self.patch_bytes * self.tile_blocks, self.weight_bytes
        return patches * self.channel_blocks <= weights * self.tile_blocks


@cache
def matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (A^T [m, a], G [a, 3], B^T [a, a]) of F(m, 3) in float64: Toom and Cook's interpolation, transposed.

    Row i of B^T holds the coefficients of the product of (x - p) over the other points, lowest power first; the row of
    infinity that over all points. What interpolation divides by is left to G.
    """
    points, patch = POINTS[size], size + 2
    others = [[p for p in points if p != point] for point in points]
    bt = np.zeros((patch, patch))
    for row, roots in enumerate([*others, list(points)]):
        bt[row, : len(roots) + 1] = np.poly(roots)[::-1]
    divisors = [float(np.prod([point - p for p in roots])) for point, roots in zip(points, others, strict=True)]

    def powers(count: int) -> np.ndarray:
        return np.array([*([p**k for k in range(count)] for p in points), [0.0] * (count - 1) + [1.0]])

    return powers(size).T, powers(3) / np.array([*divisors, 1.0])[:, None], bt


def pack_weight(weight: np.ndarray, config: WinogradConfig) -> np.ndarray:
    """Transform OHWI weights [CO, 3, 3, CI] to [CO/block][a^2][CI][block], the last block padded with zeros."""
    _, g, _ = matrices(config.size)
    co, _, _, ci = weight.shape
    blocks = ceil_div(co, config.block)
    both = np.einsum("ik,jl->ijkl", g, g).reshape(config.positions, 9)
    packed = np.zeros((blocks, config.positions, ci, config.block), weight.dtype)
    for k in range(blocks):
        part = weight[k * config.block : (k + 1) * config.block].astype(np.float64)
        flat = part.transpose(1, 2, 3, 0).reshape(9, -1)
        packed[k, :, :, : len(part)] = (both @ flat).reshape(config.positions, ci, len(part))
    return packed


def supports(workload: Conv2DWorkload, target: Target) -> bool:
    """Say whether the family covers a convolution."""
    w = workload
    plain = (w.kernel, w.strides, w.dilation) == ((3, 3), (1, 1), (1, 1))
    return plain and w.dtype == "float32" and target.vector_bits > 64


def configs(workload: Conv2DWorkload, target: Target, workspace: int, form: Form = FLOAT) -> list[WinogradConfig]:
    """Return the space: every size, register tile and group whose products fit the stack, in every place for patches.

    Large weights are fetched ahead or not. workspace: bytes the arena has for transformed patches. Of integers there is
    F(2x2) alone, whose transforms are of whole numbers.
    """
    found = []
    # Products that come back from the second-level cache are transformed slowly: a group gains nothing by more.
    most = STACK_BYTES, min(STACK_BYTES, target.cache.l1d_kib * 1536)
    # With one vector of weights a step, loads of patches outweigh the multiplications (measured: 2 to 3 times slower).
    least = min(2 * registers(target).lanes, workload.out_channels)
    for size in POINTS if form.dot is None else (2,):
        whole = Tiling(workload, WinogradConfig(size, 1, workload.out_channels, 1, 0), form)
        total, far = whole.total, whole.weight_bytes > target.cache.l2_kib * 1024 and form.dot is None
        for given in tile_configs(_product(workload, total, group=form.group), target):
            tile = given
            if form.dot is not None:  # LLVM sums the products of several steps first, in registers that are not there
                tile = replace(given, unroll=largest_divisor(given.unroll, 2))
            if tile.block < least:
                continue
            tiles = ceil_div(total, tile.pixels)
            for group in sorted({g for n in range(1, tiles + 1) if (g := ceil_div(tiles, n)) <= _MOST_GROUPED}):
                blocks = ceil_div(total, tile.pixels * group)
                for parts in dict.fromkeys((0, min(blocks, PARTS_PER_CORE * target.core_count), blocks)):
                    config = WinogradConfig(size, tile.pixels, tile.block, tile.unroll, parts, group)
                    tiling = Tiling(workload, config, form)
                    if tiling.product_bytes <= most[group > 1] and tiling.workspace_bytes <= workspace:
                        found += [config, replace(config, prefetch=1)] if far else [config]
    return found


@cache
def default_config(workload: Conv2DWorkload, target: Target, workspace: int) -> WinogradConfig | None:
    """Return the config with the least estimated cost, or None where the direct convolution is estimated faster.

    workspace: bytes the arena has for transformed patches.
    """
    if not supports(workload, target):
        return None
    found = [(cost(workload, config, target), config) for config in configs(workload, target, workspace)]
    best = min(found, key=lambda item: (item[0], -item[1].tiles), default=None)
    direct = min(tile_cost(workload, config, target) for config in tile_configs(workload, target))
    return best[1] if best is not None and best[0] < direct else None


#: Bytes of weights that cost as much as one vector FMA: read from the third-level cache, from memory (by one core of
#: two that share it; of cores without a third level: as one), and as a part of the file.
_CACHE_BYTES, _MEMORY_BYTES, _SLOW_MEMORY_BYTES, _FILE_BYTES = 16, 1.5, 4, 16
#: What it takes to ask for a line ahead, in FMAs.
_ASK = 1
#: Of what is fetched ahead, the share that the core waits for all the same.
_NOT_HIDDEN = 0.25
#: A kernel's tasks should divide evenly among so many threads, if the target has them.
_THREADS = 4


def _product(w: Conv2DWorkload, tiles: int, columns: int = 0, group: int = 1) -> Conv2DWorkload:
    """Return one of the matrix products as a 1x1 convolution, of `columns` tiles in a row, a group of inputs as one."""
    columns = columns or tiles
    rows, inputs = ceil_div(tiles, columns), w.in_channels // group
    return Conv2DWorkload(1, rows, columns, inputs, w.out_channels, (1, 1), (1, 1), (0,) * 4, (1, 1), w.dtype)


def cost(workload: Conv2DWorkload, config: WinogradConfig, target: Target, form: Form = FLOAT) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`.

    The products cost what 1x1 convolutions do, the two transforms some instructions a position, more where the patches
    leave the core's caches. On one core of an AVX-512 server the estimate is within 12 % of the measured time for 16
    to 512 channels and 9x9 to 112x112 positions.
    """
    tiling = Tiling(workload, config, form)
    tile = TileConfig(config.tiles, config.block, config.unroll)
    # With one vector of weights a step, the loads of patches are what takes time.
    single = 1.3 if config.block == registers(target).lanes else 1.0
    # What asks for lines ahead takes the place of loads.
    asks = config.prefetch * _ASK * config.block / 16 / (config.together * config.block // registers(target).lanes)
    filled = tiling.tile_blocks * config.together
    # Weights that one register tile alone reads before others push them out come from the second-level cache.
    second = 0.375 / config.tiles if config.group == 1 else 0.0
    each = (single + asks + second) * config.positions * form.cost
    products = each * tile_cost(_product(workload, filled, config.tiles, form.group), tile, target)
    forward = (9 if config.parts else 11) * filled * _vectors(workload.in_channels, form.patch, target)
    kept = tiling.product_bytes <= target.cache.l1d_kib * 1024
    back = (4 if kept else 12) * tiling.total * _vectors(workload.out_channels, form.sums, target)
    tasks = config.parts or tiling.tile_blocks * tiling.channel_blocks
    threads = min(target.core_count, _THREADS)
    uneven = ceil_div(tasks, threads) * threads / tasks
    work = (products + config.positions * (forward + back)) * uneven
    near, far = _weight_cost(tiling, target)
    # What is fetched ahead comes while the core multiplies.
    ahead = config.prefetch and target.arch == "x86_64"
    return near + (max(work, far) + _NOT_HIDDEN * min(work, far) if ahead else work + far)


def _vectors(channels: int, dtype: str, target: Target) -> int:
    """Return the vectors a transform takes for so many channels."""
    return channels // lanes_for(target, dtype, channels)


def _weight_cost(tiling: Tiling, target: Target) -> tuple[float, float]:
    """Return what the weights cost as a part of the file, and what they cost beyond the second-level cache.

    Large ones come from memory once in each inference, since other layers have used the caches since the last; those
    that one block of tiles leaves in no near cache come again for the next. All count once more as a part of the file.
    """
    weights, l2, l3 = tiling.weight_bytes, target.cache.l2_kib * 1024 * 3 // 4, target.cache.l3_kib * 1024
    far = _MEMORY_BYTES if l3 else _SLOW_MEMORY_BYTES
    total = 0.0
    if weights > min(l2, l3 // 8):
        total = weights / (far if weights > l3 // 8 else _CACHE_BYTES)
    channels_first = not tiling.config.parts and tiling.channels_first
    kept = weights // tiling.channel_blocks if channels_first else weights
    if kept > l2:
        total += weights * (tiling.tile_blocks - 1) / (_CACHE_BYTES if kept <= l3 // 4 else far)
    return weights / _FILE_BYTES, total
