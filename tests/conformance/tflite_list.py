"""The list of TFLite cases: operators by family, each in every dtype that it might have."""

from __future__ import annotations

from conformance.tflite_cases import Case
from conformance.tflite_list_elements import elementwise, quantise, reductions
from conformance.tflite_list_layers import integer_lstms, integer_svdfs, layers, recurrent
from conformance.tflite_list_moves import moves
from conformance.tflite_listing import LISTED


def cases() -> list[Case]:
    """All cases, in order."""
    if not LISTED:
        for family in (elementwise, quantise, reductions, moves, layers, recurrent, integer_lstms, integer_svdfs):
            family()
    return list(LISTED)
