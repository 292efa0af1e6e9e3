"""Choosing and applying the schedule of one fused function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from ingot.errors import CompilerError
from ingot.schedules import (
    amx,
    attention,
    batch_matmul,
    conv2d,
    conv2d_amx,
    conv2d_half,
    conv2d_int8,
    conv2d_mmla,
    depthwise,
    depthwise_int8,
    generic,
    padding,
    pieces,
    planes,
    planes_product,
    resize,
    rows,
    transpose,
    winograd,
    written,
)
from ingot.target import Target


@dataclass(frozen=True)
class Template:
    """A family with a template.

    config: the type of its config, which is read back from the block. schedule: applies it to a schedule. finish:
    rewrites the scheduled function where schedule primitives cannot, given the name of the reduction block.
    """

    config: type
    schedule: Callable[[Any, Any, Any, Any, Target], None]
    finish: Callable[[Any, str, Any, Target], Any]


TEMPLATES: dict[str, Template] = {
    "conv2d": Template(conv2d.TileConfig, conv2d.schedule, conv2d.finish),
    "conv2d_int8": Template(conv2d.TileConfig, conv2d_int8.schedule, conv2d_int8.finish),
    conv2d_half.TEMPLATE: Template(conv2d.TileConfig, conv2d_half.schedule, conv2d_half.finish),
    conv2d_amx.TEMPLATE: Template(amx.Block, written.schedule, written.finish),
    conv2d_amx.HALF_TEMPLATE: Template(amx.Block, written.schedule, written.finish),
    conv2d_mmla.TEMPLATE: Template(conv2d.TileConfig, conv2d_mmla.schedule, conv2d_mmla.finish),
    conv2d_mmla.HALF_TEMPLATE: Template(conv2d.TileConfig, conv2d_mmla.schedule, conv2d_mmla.finish),
    "depthwise": Template(depthwise.DepthwiseConfig, depthwise.schedule, depthwise.finish),
    "depthwise_int8": Template(depthwise_int8.DepthwiseInt8Config, depthwise_int8.schedule, depthwise_int8.finish),
    "attention": Template(attention.AttentionConfig, attention.schedule, attention.finish),
    "batch_matmul": Template(batch_matmul.BatchMatmulConfig, batch_matmul.schedule, batch_matmul.finish),
    "planes": Template(planes.PlaneConfig, written.schedule, written.finish),
    "planes_product": Template(planes_product.ProductConfig, written.schedule, written.finish),
    "resize": Template(resize.ResizeConfig, resize.schedule, lambda function, *_: function),
    "rows": Template(rows.RowsConfig, rows.schedule, lambda function, *_: function),
    "transpose": Template(transpose.TransposeConfig, written.schedule, written.finish),
    "winograd": Template(winograd.WinogradConfig, written.schedule, written.finish),
}


#: Blocks whose name begins so are stages that a template places itself: they are not inlined.
_STAGES = (rows.STAGE, attention.PACKED, batch_matmul.PACKED)


def schedule_function(function: Any, target: Target) -> Any:  # noqa: ANN401 - PrimFuncs
    """Return the fused PrimFunc scheduled for `target`.

    Every top-level loop nest of the result begins with a loop marked parallel (or is a scalar statement), and nests
    follow one another in dependence order.
    """
    sch, anchor = _inlined(function)
    if anchor is not None and len(sch.get_consumers(anchor)) > 1:
        # Its readers have not become one block, and a template needs the one that stores.
        sch, anchor = _inlined(function, keep_result=True)
    finish = _schedule_anchor(sch, anchor, target) if anchor is not None else None
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if _is_scheduled(sch, block):
            continue
        if generic.is_reduction(sch, block):
            generic.schedule_reduction(sch, block, target)
        else:
            generic.schedule_elementwise(sch, block, target)
    function = pieces.rewrite(generic.flatten(sch.mod["main"]))
    return function if finish is None else finish(function)


def _inlined(function: Any, *, keep_result: bool = False) -> tuple[Any, Any]:  # noqa: ANN401
    """Return a schedule in which what can be computed at its readers is, and the block of the template, if any."""
    sch = s_tir.Schedule(function)
    anchor = _find_anchor(sch)
    keep: set[str] = set()
    if anchor is not None:
        names = [str(sch.get(block).name_hint) for block in sch.get_child_blocks(sch.get_sblock("root"))]
        keep = {str(sch.get(anchor).name_hint), "padded", padding.ROWS, *(n for n in names if n.startswith(_STAGES))}
        keep |= _shared_result(sch, anchor) if keep_result else set()
    generic.inline_producers(sch, keep)
    return sch, anchor


def _shared_result(sch: Any, anchor: Any) -> set[str]:  # noqa: ANN401
    """The name of the last block that all of the anchor's result goes through, if several read that.

    Inlined into its readers, it would leave the template without the one block that stores.
    """
    block = anchor
    while len(readers := sch.get_consumers(block)) == 1:
        (block,) = readers
    return {str(sch.get(block).name_hint)} if readers else set()


def _is_scheduled(sch: Any, block: Any) -> bool:  # noqa: ANN401
    """Say whether the block lies in a loop nest that already is parallel."""
    loops = sch.get_loops(block)
    return bool(loops) and int(sch.get(loops[0]).kind) == int(tirx.ForKind.PARALLEL)


def _find_anchor(sch: Any) -> Any:  # noqa: ANN401
    anchors = [
        block
        for block in sch.get_child_blocks(sch.get_sblock("root"))
        if "ingot.template" in sch.get(block).annotations
    ]
    if len(anchors) > 1:
        names = ", ".join(str(sch.get(block).name_hint) for block in anchors)
        raise CompilerError("a fused function holds two templates", found=names, allowed="one")
    return anchors[0] if anchors else None


def _schedule_anchor(sch: Any, anchor: Any, target: Target) -> Callable[[Any], Any]:  # noqa: ANN401
    """Apply the anchor's template to it, its patch of input and the block that stores its result.

    Returns what finishes the scheduled function.
    """
    node = sch.get(anchor)
    template = TEMPLATES[str(node.annotations["ingot.template"])]
    config = parse_config(template.config, str(node.annotations["ingot.config"]))
    sch.unannotate(anchor, "ingot.template")
    sch.unannotate(anchor, "ingot.config")
    sch.unannotate(anchor, "ingot.name")
    (output,) = sch.get_consumers(anchor)
    name = str(node.name_hint)
    template.schedule(sch, anchor, output, config, target)
    return lambda function: template.finish(function, name, config, target)


def parse_config(config: type, text: str) -> Any:  # noqa: ANN401 - a frozen dataclass of ints
    """Read back a config dataclass of integers from its repr, e.g. "TileConfig(pixels=14, block=32, unroll=4)"."""
    head, _, body = text.rstrip(")").partition("(")
    if head != config.__name__:
        raise CompilerError("a template's config has another type", found=head, allowed=config.__name__)
    fields = (item.split("=") for item in body.split(",") if item.strip())
    return config(**{key.strip(): int(value) for key, value in fields})


__all__ = ["TEMPLATES", "Template", "parse_config", "schedule_function"]
