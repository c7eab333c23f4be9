"""The copy of a model: new values of parameters, and norms of torch.nn."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node

from normfx.compat.modules import take_hooks
from normfx.converting.places import Places, Slot
from normfx.errors import ConvertError
from normfx.graph.names import module_path
from normfx.graph.nodes import op_name, tensor
from normfx.ir.form import Form
from normfx.ir.fused_ops import CALLS, NormCall, norm_call
from normfx.recognize.moves import RESHAPES

SAME_ENTRIES = RESHAPES | {"aten::contiguous", "aten::clone", "aten::alias", "aten::detach"}
"""Ops whose result has the entries of their operand, in order."""


class Copy:
    """A copy of a model that becomes what its rewritten graph says.

    places:   of the values of the rewritten graph in the original
    original: of those of its graph as it is
    means:    all norms are nn.LayerNorm with all their parameters, and none becomes nn.RMSNorm
    norms:    what became of norms that are no longer what they were, by the path of their module
    ones:     factors that were folded into weights, and are ones from now on
    """

    def __init__(self, places: Places, original: Places, means: bool) -> None:
        self.places, self.original, self.means = places, original, means
        self.model = copy.deepcopy(places.model)
        self.norms: Mapping[str, NormCall] = self._norms()
        self.ones: frozenset[Slot] = frozenset()

    def write(self) -> None:
        """Put new values and norms into the copy."""
        wanted = self._wanted()
        self.ones = frozenset(self._factors()) - wanted.keys()
        for slot, value in wanted.items():
            if value not in self.places.names:
                self._put(slot, self.places.compute(value))
        for slot in self.ones:
            self._put(slot, torch.ones_like(getattr(self.model.get_submodule(slot.path), slot.name)))
        for path, call in self.norms.items():
            self._replace(path, call)

    def _norms(self) -> dict[str, NormCall]:
        """All calls of a module must have become the same norm."""
        found: dict[str, NormCall] = {}
        for node in self.places.captured.graph_module.graph.nodes:
            if node.target in CALLS:
                call, path = norm_call(node), module_path(node)
                seen = found.setdefault(path, call)
                if (seen.form, seen.vectors) != (call.form, call.vectors):
                    raise ConvertError(
                        f"normfx.convert: calls of the norm '{path}' became different norms; with "
                        "options={'rules': 'default,-fold_affine'} they may become one"
                    )
        return found

    def _wanted(self) -> dict[Slot, Node]:
        """What each place is to hold: everything that reads it must want the same."""
        wanted: dict[Slot, Node] = {}
        for user in self.places.captured.graph_module.graph.nodes:
            if user in self.places.known or module_path(user) in self.norms:
                continue
            read = dict.fromkeys(n for n in user.all_input_nodes if n in self.places.known)
            for anchor in (a for value in read for a in self.places.anchors_of(value)):
                slot = self.places.slot(anchor, user)
                if self.places.key(wanted.setdefault(slot, anchor)) != self.places.key(anchor):
                    raise ConvertError(f"normfx.convert: '{slot}' is read in two ways, which would need two weights")
        return wanted

    def _factors(self) -> Iterator[Slot]:
        """Parameters by which the original multiplies a value."""
        for user in self.original.captured.graph_module.graph.nodes:
            if user in self.original.known or op_name(user) != "aten::mul.Tensor" or module_path(user) in self.norms:
                continue
            yield from (self.original.slot(n, user) for n in user.all_input_nodes if n in self.original.names)

    def _put(self, slot: Slot, value: Tensor) -> None:
        module = self.model.get_submodule(slot.path)
        before = getattr(module, slot.name)
        if isinstance(before, Tensor) and not isinstance(before, nn.Parameter):
            module.register_buffer(slot.name, value.clone())
            return
        trained = before is None or before.requires_grad
        module.register_parameter(slot.name, nn.Parameter(value.clone(), requires_grad=trained))

    def _replace(self, path: str, call: NormCall) -> None:
        """Put a norm of torch.nn where the norm of this path was."""
        before, x = self.places.model.get_submodule(path), tensor(call.x)
        if not path or next(before.children(), None) is not None:
            raise ConvertError(f"normfx.convert: the norm in '{path or 'the model'}' is not a module of its own")
        if others := self._others(path):
            raise ConvertError(
                f"normfx.convert: '{path}' computes more than a norm, in its forward or in a hook "
                f"({', '.join(others)}), which no norm of torch.nn would do"
            )
        if not _is_plain(call, x):
            raise ConvertError(f"normfx.convert: no norm of torch.nn computes what '{path}' does: {call.form}")
        vectors = {"weight": call.weight, "bias": call.bias}
        if any(vector is not None and vector not in self.places.names for vector in vectors.values()):
            raise ConvertError(f"normfx.convert: weight or bias of the norm '{path}' are computed from others")
        given = {name: self.places.tensor(vector) for name, vector in vectors.items() if vector is not None}
        made = _module(call.form, x, given, self.means)
        for name, vector in vectors.items():
            if vector is not None:
                getattr(made, name).requires_grad_(getattr(self._original(vector), "requires_grad", True))
        take_hooks(made, self.model.get_submodule(path))
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, made.eval())

    def _others(self, path: str) -> list[str]:
        """What the module of a norm computes of its input besides the norm."""
        used = self._used - self.places.known
        inside = {n for n in used if n.op == "call_function" and module_path(n) == path and _is_tensor(n)}
        others = {n for n in inside if n.target not in CALLS and op_name(n) not in SAME_ENTRIES}
        others |= {n for n in inside if n.target in CALLS and any(_entries_of(m) in inside for m in n.all_input_nodes)}
        reshapes = {n for n in inside if op_name(n) in RESHAPES}
        if reshapes:  # rows stay rows, and what leaves has the shape of what entered
            entering = {n for node in inside for n in node.all_input_nodes if n in used - inside and _is_tensor(n)}
            leaving = {n for n in inside if not inside.issuperset(user for user in n.users if user in self._used)}
            if len({_sizes(n) for n in (*entering, *leaving)}) > 1 or len({_sizes(n)[-1:] for n in inside}) > 1:
                others |= reshapes
        return sorted(node.name for node in others)

    @functools.cached_property
    def _used(self) -> set[Node]:
        """The nodes that the results of the rewritten graph are computed from."""
        work = [self.places.captured.graph_module.graph.output_node()]
        used = set(work)
        while work:
            new = set(work.pop().all_input_nodes) - used
            used |= new
            work += new
        return used

    def _original(self, leaf: Node) -> object:
        path, _, name = self.places.names[leaf].rpartition(".")
        return getattr(self.places.model.get_submodule(path), name)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _sizes(node: Node) -> tuple[str, ...]:
    """The sizes as text: comparing symbolic ones would add guards."""
    return tuple(map(str, tensor(node).shape))


def _entries_of(node: Node) -> Node:
    """The value that a copy or a reshape has its entries from."""
    while op_name(node) in SAME_ENTRIES:
        node = node.all_input_nodes[0]
    return node


def _is_plain(call: NormCall, x: Tensor) -> bool:
    """Whether a norm of torch.nn computes it."""
    form = call.form
    wide = torch.promote_types(x.dtype, torch.float32)
    usual = form.eps_place == "inside" and form.correction == 0 and form.scale == 1 and not form.compressed
    whole = form.dim == x.ndim - 1 and isinstance(x.shape[-1], int)
    dtypes = form.out_dtype == x.dtype and form.compute_dtype in (x.dtype, wide)
    return usual and whole and dtypes and call.residual is None and not form.centre_output


def _module(form: Form, x: Tensor, given: Mapping[str, Tensor], means: bool) -> nn.Module:
    """nn.RMSNorm, or nn.LayerNorm where a mean is subtracted or a bias added: of rows without a mean it is the same.

    means: nn.LayerNorm in any case, with a weight and a bias, if only of ones and zeros
    """
    some = next(iter(given.values()), x)
    width, device, dtype = x.shape[-1], some.device, some.dtype
    made: nn.Module
    if means or form.centres or "bias" in given:
        affine, bias = (True, True) if means else (bool(given), "bias" in given)
        made = nn.LayerNorm(width, form.eps, affine, bias, device=device, dtype=dtype)
    else:
        made = nn.RMSNorm(width, form.eps, bool(given), device=device, dtype=dtype)
    for name, value in given.items():
        setattr(made, name, nn.Parameter(value.clone()))
    return made
