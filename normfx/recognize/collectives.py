"""The M3 table, part six: collectives on plain tensors. What they do to one row they do to all of its features.

A sum over processes of centred rows is centred if all of them centre theirs: normfx/agreement.py sees to that.
"""

from __future__ import annotations

from normfx.recognize.table import TABLE, Call, Flow, one

SPACE = "_c10d_functional::"


def _summed(call: Call) -> Flow | None:
    return one(call.args["input"], call.axis) if call.args["reduce_op"] in ("sum", "avg") else None


def _along_rows(call: Call) -> Flow | None:
    """Rows of all processes, joined along the first dimension."""
    return one(call.args["input"], call.axis) if call.axis.dim != 0 else None


def _scattered(call: Call) -> Flow | None:
    return _summed(call) if call.axis.dim != 0 else None


def _waited(call: Call) -> Flow | None:
    return one(call.args["tensor"], call.axis)


TABLE.update(
    {
        SPACE + "all_reduce": _summed,
        SPACE + "all_gather_into_tensor": _along_rows,
        SPACE + "all_to_all_single": _along_rows,
        SPACE + "reduce_scatter_tensor": _scattered,
        SPACE + "wait_tensor": _waited,
    }
)
