"""Where in a model a value of its graph lives: a parameter, or what the rules compute from parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Node

from normfx.capture.trace import Captured
from normfx.compat.modules import own_tensors
from normfx.errors import ConvertError
from normfx.graph.names import module_path
from normfx.graph.nodes import parameter_only
from normfx.ir import ops
from normfx.weights.expression import expression


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a module; path: the first one of the module in the model."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}".lstrip(".")


class Places:
    """The places of the values of a graph in a model.

    names:   the parameters, buffers and constants of the graph, as the model calls them
    known:   all values that are computed from them alone
    anchors: those that stand in a place of their own: the parameters, and the folds
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.captured = model, captured
        self.names = {node: source.name for node, source in captured.sources.items() if node in captured.weights}
        self.known = parameter_only(captured.graph_module.graph, captured.weights)
        self.anchors = dict.fromkeys([*self.names, *(n for n in self.known if n.target in ops.FOLDS)])
        self._held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._held |= dict(model.named_buffers(remove_duplicate=False))
        self._path = {id(module): path for path, module in model.named_modules()}
        self._paths = {path for path, _ in model.named_modules(remove_duplicate=False)}

    def tensor(self, leaf: Node) -> Tensor:
        """The value of a parameter or buffer now."""
        if self.names[leaf] not in self._held:
            raise ConvertError(f"normfx.convert: a constant of the model, '{self.names[leaf]}', would have to change")
        return self._held[self.names[leaf]].detach()

    def compute(self, value: Node) -> Tensor:
        """A value of parameters."""
        program, sources = expression(value, self.names)
        return program(*map(self.tensor, sources))

    def key(self, value: Node) -> tuple[str, tuple[str, ...]]:
        """Equal for values that are computed in the same way from the same parameters."""
        program, sources = expression(value, self.names)
        return program.key, tuple(self.names[source] for source in sources)

    def anchors_of(self, value: Node) -> Iterator[Node]:
        """The parameters and folds of which a value is computed."""
        if value in self.anchors:
            yield value
        else:
            for operand in value.all_input_nodes:
                yield from self.anchors_of(operand)

    def token(self, value: Node, user: Node) -> str:
        """What stands in the model for a value of parameters that `user` reads."""
        if value in self.anchors:
            return str(self.slot(value, user))
        program, sources = expression(value, self.anchors)
        return f"{program.key} of {', '.join(str(self.slot(source, user)) for source in sources)}"

    def slot(self, anchor: Node, user: Node) -> Slot:
        """The place of a parameter, or of a fold of it, that `user` reads."""
        base: object = anchor
        new_bias = False
        while isinstance(base, Node) and base not in self.names:
            if base.target is ops.FOLD_SHIFT:
                weight, _, bias = base.args[:3]
                base, new_bias = (weight, True) if bias is None else (bias, new_bias)
            elif base.target in (ops.CENTER, ops.CENTER_BLOCK, ops.SCALE_FEATURES):
                base = base.args[0]
            else:
                raise ConvertError(f"normfx.convert: the weight of '{module_path(user)}' is computed from others")
        assert isinstance(base, Node)
        found = self._slot_of(base, user)
        return self._bias_of(found) if new_bias else found

    def _slot_of(self, leaf: Node, user: Node) -> Slot:
        """The module of `user` goes first if it holds the parameter, since one tensor may have several places."""
        name, path = self.names[leaf], module_path(user)
        held = self._held.get(name)
        if held is not None and path in self._paths:
            module = self.model.get_submodule(path)
            for own, each in own_tensors(module):
                if each is held:
                    return Slot(self._path[id(module)], own)
        path, _, own = name.rpartition(".")
        return Slot(path if held is None else self._path[id(self.model.get_submodule(path))], own)

    def _bias_of(self, weight: Slot) -> Slot:
        if getattr(self.model.get_submodule(weight.path), "bias", weight) is not None:
            raise ConvertError(f"normfx.convert: '{weight.path}' has no place for a bias, which a norm's β would need")
        return Slot(weight.path, "bias")
