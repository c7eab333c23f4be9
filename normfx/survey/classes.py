"""Why LayerNorms kept their mean, in a few classes: from a refusal's code and, where that says too little, from the ops
its nodes name. Never from the model."""

from __future__ import annotations

import re
from collections.abc import Iterator

from normfx.report import RefusalReport, SiteReport
from normfx.rules import RMS_NORM_RULES

MISSED = "not in a graph: Dynamo ran this part of the model without compiling it"
POST_NORM = "post-norm: the skip is a norm's output γ ⊙ z + β, which has a mean"
EMBEDDED = "a norm of embedding rows alone: centring what is looked up costs more than one norm saves"
ACTIVATED = "after an activation function, whose output has a mean"
CONVOLVED = "after a convolution by groups, which cannot mix channels to centre them"
JOINED = "after features of several tokens joined into one row (patch merging)"
OTHER_INPUT = "after another activation, a gated product say, that only a pass at run time could centre"
JOINS = "parts of the stream are cut out, or joined with others, before a norm reads them"
LINEAR_READER = "a linear layer, convolution or attention reads the stream itself"
NORM_READER = "another kind of norm reads the stream itself"
RETURNED = "the stream itself is returned"
UNNORMED = "the stream ends in a value that something other than a norm uses: patch merging, a gate, a head, the caller"

_INPUTS = (
    (
        ACTIVATED,
        {"gelu", "relu", "silu", "sigmoid", "tanh", "hardswish", "leaky_relu", "elu", "softplus", "pow", "square"},
    ),
    (CONVOLVED, {"conv1d", "conv2d", "conv3d", "convolution", "max_pool2d", "max_pool3d"}),
    (JOINED, {"cat", "concat", "stack", "reshape", "view", "flatten", "unfold", "pixel_unshuffle", "permute"}),
)
_READERS = (
    (JOINS, {"cat", "concat", "stack", "reshape", "view", "flatten", "unfold", "permute", "slice"}),
    (
        LINEAR_READER,
        {
            "linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "bmm", "mm", "addmm", "baddbmm",
            "einsum", "scaled_dot_product_attention", "fft_fftn",
        },
    ),
    (NORM_READER, {"batch_norm", "group_norm", "rms_norm", "instance_norm", "_native_batch_norm_legit_no_training"}),
    (RETURNED, {"output"}),
)  # fmt: skip


def kept_because(site: SiteReport) -> str:
    """The class of a LayerNorm that kept its mean; "" where no refusal says why."""
    refusals = [r for r in site.refusals if r.rule in RMS_NORM_RULES]
    return next((found for refusal in refusals for found in _classes(refusal)), "")


def _classes(refusal: RefusalReport) -> Iterator[str]:
    ops = [_op(node) for node in refusal.nodes]
    if refusal.code == "observed":
        yield _among(_READERS, ops[1::2], UNNORMED)  # pairs: a value, who reads it
    elif refusal.code == "uncentred_input":
        if "output of a norm" in refusal.detail:
            yield POST_NORM
        elif ops and set(ops) <= {"embedding"}:
            yield EMBEDDED
        yield _among(_INPUTS, ops, OTHER_INPUT)
    else:
        yield refusal.detail.split(":")[0]


def _among(table: tuple[tuple[str, set[str]], ...], ops: list[str], otherwise: str) -> str:
    return next((name for name, known in table if known & set(ops)), otherwise)


def _op(node: str) -> str:
    """`conv2d_12 in stages.0` → conv2d: nodes of a captured graph are named after their op."""
    return re.sub(r"_\d+$", "", node.split(" in ")[0])
