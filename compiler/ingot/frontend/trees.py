"""Decision trees as flat arrays in which every node asks one kind of question: is x[feature] <= threshold?

Other comparisons of ONNX become that one: x < t is x <= the number before t, x == t two questions, a set of members
several, and the opposites swap the branches. A node that is not a number goes to `no` unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ingot.errors import ModelError

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
# A forest that claims more than this is not believed.
_MAX_NODES = 2**26


@dataclass(frozen=True)
class Forest:
    """Trees whose nodes are numbered together; a leaf is a node whose branches both lead to itself.

    feature, yes, no: int32[nodes]; threshold: [nodes]; nan_yes: bool[nodes], where NaN goes to `yes`.
    roots, depths: int32[trees]; depths counts the questions on a tree's longest way.
    weights: [nodes, targets], what a leaf adds to each target; or [nodes], with the one target of each leaf in
    `targets`, int32[nodes]. `whole`: every leaf has a weight for every target.
    """

    feature: np.ndarray
    threshold: np.ndarray
    yes: np.ndarray
    no: np.ndarray
    nan_yes: np.ndarray
    roots: np.ndarray
    depths: np.ndarray
    weights: np.ndarray
    targets: np.ndarray | None
    whole: bool


@dataclass
class ForestBuilder:
    """Collects nodes as a model lists them. Raises ModelError for one that contradicts itself."""

    label: str
    features: int
    dtype: str
    feature: list[int] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    yes: list[int] = field(default_factory=list)
    no: list[int] = field(default_factory=list)
    nan_yes: list[bool] = field(default_factory=list)

    def reserve(self, count: int) -> None:
        """Make `count` nodes, all leaves so far: the model's own numbering."""
        if count > _MAX_NODES:
            raise ModelError("a tree ensemble is too large", where=self.label, found=f"{count} nodes")
        places = range(len(self.yes), len(self.yes) + count)
        self.feature += [0] * count
        self.threshold += [0.0] * count
        self.yes += places
        self.no += places
        self.nan_yes += [False] * count

    def _new(self) -> int:
        self.reserve(1)
        return len(self.yes) - 1

    def split(
        self,
        node: int,
        mode: str,
        feature: int,
        values: Sequence[float],
        branches: tuple[int, int],
        missing_true: bool = False,
    ) -> None:
        """Make `node` ask `mode` of a feature and `values` (one, but for BRANCH_MEMBER); branches: true, false."""
        if not 0 <= feature < self.features:
            found, allowed = f"feature {feature}", f"0 to {self.features - 1}, as the input has"
            raise ModelError("a tree reads a feature that is not there", where=self.label, found=found, allowed=allowed)
        true, false = branches
        if mode == "BRANCH_MEMBER":
            for place, value in enumerate(values):
                rest = false if place == len(values) - 1 else self._new()
                self.split(node, "BRANCH_EQ", feature, (value,), (true, rest), missing_true)
                node = rest
            return
        limit = np.asarray(values[0], dtype=self.dtype)
        below = np.nextafter(limit, np.asarray(-np.inf, dtype=self.dtype))
        if mode in ("BRANCH_LEQ", "BRANCH_LT"):
            self._ask(node, feature, limit if mode == "BRANCH_LEQ" else below, (true, false), missing_true)
        elif mode in ("BRANCH_GTE", "BRANCH_GT"):
            # The opposite question: what is not a number still goes to `false` unless the node says otherwise.
            self._ask(node, feature, limit if mode == "BRANCH_GT" else below, (false, true), not missing_true)
        elif mode in ("BRANCH_EQ", "BRANCH_NEQ"):
            if mode == "BRANCH_NEQ":
                true, false = false, true
                missing_true = False  # NaN differs from everything
            second = self._new()
            self._ask(node, feature, limit, (second, false), missing_true)
            self._ask(second, feature, below, (false, true), False)
        else:
            raise ModelError(
                "a tree compares in an unknown way", where=self.label, found=mode, allowed=", ".join(MODES)
            )

    def _ask(self, node: int, feature: int, threshold: np.ndarray, branches: tuple[int, int], nan_yes: bool) -> None:
        self.feature[node], self.threshold[node] = feature, float(threshold)
        self.yes[node], self.no[node], self.nan_yes[node] = *branches, nan_yes

    def finish(self, roots: Sequence[int], leaves: Sequence[tuple[int, int, float]], targets: int) -> Forest:
        """The forest; `leaves` lists (node, target, weight)."""
        yes, no = np.array(self.yes, dtype=np.int32), np.array(self.no, dtype=np.int32)
        count = len(yes)
        node, target = (np.array([leaf[i] for leaf in leaves], dtype=np.int64) for i in (0, 1))
        weight = np.array([leaf[2] for leaf in leaves], dtype=self.dtype)
        if target.size and (target.min() < 0 or target.max() >= targets):
            raise ModelError(
                "a leaf adds to a target that is not there", where=self.label, found=str(int(target.max()))
            )
        if not roots:
            raise ModelError("a tree ensemble has no trees", where=self.label)
        is_leaf = yes == np.arange(count)
        each = np.bincount(node, minlength=count)
        whole = bool(np.all(each[is_leaf] == targets)) if targets > 1 else bool(np.all(each[is_leaf] >= 1))
        if each.max(initial=0) <= 1:
            weights, owner = np.zeros(count, dtype=self.dtype), np.zeros(count, dtype=np.int32)
            weights[node], owner[node] = weight, target
        else:
            if count * targets > _MAX_NODES:
                raise ModelError("a tree ensemble is too large", where=self.label, found=f"{count} x {targets} weights")
            weights = np.zeros((count, targets), dtype=self.dtype)
            np.add.at(weights, (node, target), weight)
            owner = None
        return Forest(
            feature=np.array(self.feature, dtype=np.int32),
            threshold=np.array(self.threshold, dtype=self.dtype),
            yes=yes,
            no=no,
            nan_yes=np.array(self.nan_yes, dtype=bool),
            roots=np.array(roots, dtype=np.int32),
            depths=self._depths(yes, no, roots),
            weights=weights,
            targets=owner,
            whole=whole,
        )

    def _depths(self, yes: np.ndarray, no: np.ndarray, roots: Sequence[int]) -> np.ndarray:
        """The questions on the longest way of each tree; ModelError if a way leads back to where it came from."""
        count, leaf = len(yes), yes == np.arange(len(yes))
        # From the leaves up: a node's height is known one round after those of its branches.
        height = np.where(leaf, 0, -1).astype(np.int64)
        waiting = np.flatnonzero(~leaf)
        while waiting.size:
            left, right = height[yes[waiting]], height[no[waiting]]
            ready = (left >= 0) & (right >= 0)
            if not ready.any():
                raise ModelError("a tree leads back to a node above", where=self.label, found=f"{count} nodes")
            height[waiting[ready]] = np.maximum(left, right)[ready] + 1
            waiting = waiting[~ready]
        return height[np.asarray(roots, dtype=np.int64)].astype(np.int32)
