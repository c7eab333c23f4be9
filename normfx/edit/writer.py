"""Writes the norms whose form a plan changes, once each and last, and joins them with what stands next to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from normfx.capture.cleanup import drop_dead_code
from normfx.edit import Edit, NormState
from normfx.edit.fusion import Fusion
from normfx.edit.resize import resize
from normfx.graph.aliasing import may_leave, storages_of
from normfx.graph.calls import add_norm
from normfx.graph.nodes import tensor
from normfx.ir.form import Kind
from normfx.ir.fused_ops import NormCall
from normfx.ir.sites import Norm


@dataclass(frozen=True)
class Rewritten:
    """written: the canonical op of each norm that was written again; shared: norms that have become the same function
    of the same value as an earlier one, with that one"""

    written: Mapping[Norm, Node] = field(default_factory=dict)
    shared: Mapping[Norm, Norm] = field(default_factory=dict)


def write_norms(edit: Edit, share: bool = True) -> Rewritten:
    """Write the norms, drop what they no longer need, join what is asked for. share: compute equal norms once"""
    graph = edit.surgery.graph
    storages = storages_of(graph)
    leaving = {norm for norm, state in edit.norms.items() if may_leave(state.output, storages)}
    written = {norm: _write(edit, norm, state) for norm, state in edit.norms.items()}
    drop_dead_code(graph)
    if edit.widths:
        widths = {edit.surgery.now(node): width for node, width in edit.widths.items()}
        resize(graph, widths, edit.compressed)
    alive = set(graph.nodes)  # a norm that only a dropped value read is gone
    fusion = Fusion(graph, {norm: node for norm, node in written.items() if node in alive})
    fusion.centre_outputs()
    fusion.share(leaving if share else fusion.written)
    for site in edit.fused:
        if site.norm in fusion.written:
            fusion.fuse(site)
    return Rewritten(fusion.written, fusion.shared)


def _write(edit: Edit, norm: Norm, state: NormState) -> Node:
    surgery = edit.surgery
    form = norm.form._replace(scale=state.scale, out_dtype=state.out_dtype)
    if state.centred:
        form = form._replace(kind="rms_norm")
    if state.stored is not None:  # the divisor stays d − c
        kind: Kind = "crms_norm" if state.stored.basis == "drop" else form.kind
        form = form._replace(kind=kind, correction=form.correction + state.stored.width - state.stored.size)
    weight, bias = (norm.weight, norm.bias) if state.affine else (None, None)
    call = NormCall(surgery.now(state.input), weight, bias, form)
    with surgery.before(norm.output, call.x, weight, bias):  # in the norm's own gradient mode
        written = new = add_norm(surgery.graph, call, norm.output)
        new = surgery.stored_as(new, tensor(state.output), norm.output)
    surgery.replace(state.output, new)
    return written
