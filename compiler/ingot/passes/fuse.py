"""Give every remaining operator its loop nest, and group neighbours into one kernel each."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ingot.passes.rewriter import prune
from ingot.passes.state import State

# A reshape moves no data: the memory plan gives both names the same bytes.
_VIEWS = ["relax.reshape"]


def fuse(state: State) -> State:
    """Give every remaining operator its loop nest, and group neighbours into one kernel each.

    Ensures that `main` holds only calls of PrimFuncs, reshapes, tuples and tuple items.
    """
    module: Any = state.module
    sequence = tvm.ir.transform.Sequential(
        [
            relax.transform.LegalizeOps(skip_ops=_VIEWS),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(fuse_opt_level=2),
            relax.transform.FuseTIR(),
        ]
    )
    with tvm.transform.PassContext(opt_level=3):
        module = sequence(module)
    return prune(state.having(module=module))
