"""Dynamo graph → canonical graph: pre-dispatch ATen, what `torch.export` calls training IR.

One `make_fx(pre_dispatch=True)` trace of an interpreter over Dynamo's graph. Ordinary nodes run, so every
Python spelling collapses into one ATen op, while `layer_norm`, `linear`, `dropout`,
`scaled_dot_product_attention` stay whole and autograd and autocast still act on the result. Nodes that carry
subgraphs (selective checkpoints, custom autograd, cond, while, flex_attention, user Triton kernels), functorch regions,
and whatever may run a user's Python (ir/opaque.py) are copied over as they are: a plain re-trace inlines a custom
`autograd.Function` under `no_grad`, and its gradient is silently gone. Plain checkpoints and nested regions are written
out first (ir/inline.py). Of the user's nothing runs here: no function, no hook, no formula of an operator.

Torch-private names used here were tried on torch 2.13 and 2.15.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from normfx.capture.cleanup import drop_dead_code, simplify_constants
from normfx.capture.distributed import refake, written
from normfx.capture.expand import expand_encoder_layers
from normfx.capture.fakes import fake_inputs, fake_mode, isolated, mode_of, static_fake, without_hooks
from normfx.capture.inline import inline_regions
from normfx.capture.sources import Source, attribute_source, dynamo_sources, export_sources
from normfx.checks.producers import check_producers, settle_autograd_state
from normfx.compat import pytree
from normfx.compat.dynamo import (
    ConstantSource,
    attribute_sources,
    input_source,
    set_attribute_sources,
    set_input_source,
)
from normfx.compat.modules import rename
from normfx.compat.operators import OpOverload
from normfx.compat.tensors import FakeTensor, FakeTensorMode, is_functorch_wrapped
from normfx.compat.tracing import (
    enable_python_dispatcher,
    pre_dispatch_tracer,
    set_grad_enabled,
    without_torch_function,
)
from normfx.errors import NormfxError
from normfx.graph.names import source_line
from normfx.graph.opaque import APART, CARRIED, is_plain_value, single_overload
from normfx.graph.regions import (
    GET_DATA,
    REQUIRE_GRAD,
    acts_on_autograd,
    attribute,
    carried,
    is_traceable,
    target_name,
    untraced,
)

PLACEHOLDER_META = ("tensor_dict", "example_value", "steal_arg")
"""What Dynamo writes on a placeholder and AOTAutograd reads: which inputs are static, which list is emptied."""

MODES = frozenset({"_enter_inference_mode", "_exit_inference_mode", "_enter_autocast", "_exit_autocast"})
"""Mode switches that make_fx either loses (inference mode) or records without running them (autocast)."""


@dataclass(frozen=True)
class Captured:
    """A canonical graph, with the placeholders, in order, and the output structure of its original."""

    graph_module: GraphModule
    sources: Mapping[Node, Source]

    @property
    def weights(self) -> frozenset[Node]:
        """The parameters, buffers and constants."""
        return frozenset(node for node, source in self.sources.items() if source.kind != "input")

    @property
    def trained(self) -> frozenset[Node]:
        """The parameters, buffers and constants that want a gradient."""
        return frozenset(node for node in self.weights if self.sources[node].requires_grad)

    def values(self, example_inputs: Sequence[Any]) -> dict[Node, torch.Tensor]:
        """Real values of the plain ones among the parameters, buffers and constants."""
        pairs = zip(self.graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        return {n: x for n, x in pairs if n in self.weights and type(x) in (torch.Tensor, torch.nn.Parameter)}


def capture(gm: GraphModule, example_inputs: Sequence[Any], joined: bool = True) -> Captured:
    """Canonical form of a Dynamo graph, under the grad mode and autocast of the call.

    `example_inputs` are the values the backend was called with; they are neither read nor written, and no
    random number is drawn. joined: other processes that take part do the same; else what they take part in stays
    opaque. Raises `NormfxError` for a graph that cannot be re-traced faithfully.
    """
    mode = fake_mode(example_inputs)
    interpreter = _Canonicaliser(inline_regions(gm), mode, joined)
    with isolated(mode), without_hooks():
        fakes = fake_inputs(gm, example_inputs, mode)
        interpreter.prepare()
        with mode, enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
            canonical = proxy_tensor.make_fx(lambda *a: interpreter.run(*a), pre_dispatch=True)(*fakes)
        _gather_lists(canonical.graph, fakes)
        _inherit(gm, canonical, fakes)
        return _finish(canonical, mode, dynamo_sources(gm, canonical))


def capture_exported(ep: torch.export.ExportedProgram) -> Captured:
    """The graph of an ExportedProgram, which is canonical already, in a copy that may be edited."""
    original = ep.graph_module
    graph = copy.deepcopy(original.graph)
    for node, twin in zip(original.graph.nodes, graph.nodes, strict=True):
        twin.name = node.name  # the signature knows it by that; a copy renames inputs that are called like a builtin
    canonical = GraphModule(original, graph)
    canonical.meta.update(original.meta)
    mode = mode_of(graph)
    return _finish(canonical, mode, export_sources(ep, graph))


def _finish(gm: GraphModule, mode: FakeTensorMode | None, sources: dict[Node, Source]) -> Captured:
    simplify_constants(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        _describe_attribute(gm, node, mode, sources)
    check_producers(gm)
    settle_autograd_state(gm.graph)
    expand_encoder_layers(gm)
    drop_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    alive = set(gm.graph.nodes)
    return Captured(gm, MappingProxyType({n: s for n, s in sources.items() if n in alive}))


# ---------------------------------------------------------------- the trace


class _Opaque:
    """A carried value that no traced op touches, so that only its place in the graph is known."""

    def __init__(self, proxy: torch.fx.Proxy, value: Any = None) -> None:
        self.proxy, self.value = proxy, value


class _Canonicaliser(torch.fx.Interpreter):
    """Runs Dynamo's graph under make_fx; carried nodes become proxies with a fresh fake as their value."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode, joined: bool) -> None:
        super().__init__(gm)
        self.graph = gm.graph
        self.mode, self.joined = mode, joined
        self.carried = untraced(gm.graph)
        self.marked = self.carried - carried(gm.graph)
        self.fresh: dict[Node, Any] = {}
        self.distributed: dict[Node, Any] = {}
        self.attributes: dict[str, torch.Tensor] = {}

    def prepare(self) -> None:
        """Make the fakes of carried nodes and of tensor attributes: inside the trace that would leave
        nodes.
        """
        for node in self.carried:
            value = node.meta.get("example_value")
            traced = any(user not in self.carried and user.op != "output" for user in node.users)
            if _is_plain(value) or (traced and is_plain_value(value)):
                self.fresh[node] = pytree.tree_map(self._refake, value)
            elif self.joined and (fake := refake(value, self._refake)) is not None:
                self.distributed[node] = fake
        for node in self.graph.find_nodes(op="get_attr"):
            path = str(node.target)
            tensor = self.fetch_attr(path)
            if isinstance(tensor, torch.Tensor) and path not in self.attributes:
                self.attributes[path] = static_fake(tensor, self.mode)

    def _refake(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with self.mode, torch.no_grad():
            fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        if not value.requires_grad:
            return fake
        with self.mode, torch.enable_grad():  # neither a leaf nor a view of one: in-place ops on it are legal
            return fake.requires_grad_(True).clone()

    def run_node(self, n: Node) -> Any:
        name = target_name(n)
        if not is_traceable(n):
            raise NormfxError(f"normfx: '{name}' at {source_line(n) or n.name} cannot be traced")
        if n.op == "output":
            return pytree.tree_map(_unwrapped, self.fetch_args_kwargs_from_env(n)[0][0])
        if n.op == "get_attr":
            return self._attribute(n)
        if name in MODES:
            return self._switch_mode(n, name)
        if n in self.carried:
            return self._carry(n)
        if acts_on_autograd(n):
            return self._act_on_autograd(n)
        result = super().run_node(n)
        # torch 2.13, 2.15: make_fx gave `item()` and the like new symbols; the guards know Dynamo's
        if n.meta.get("unbacked_bindings") and self.mode.shape_env is not None:
            rebind_unbacked(self.mode.shape_env, n, result)
        return result

    @property
    def tracer(self) -> Any:
        return pre_dispatch_tracer()

    def _attribute(self, n: Node) -> Any:
        path = str(n.target)
        value = self.fetch_attr(path)
        if not isinstance(value, torch.Tensor):
            return value
        proxy = self._create(n, (), {}, target=_set_attribute(self.tracer.root, path, value))
        return self._track(self.attributes[path], proxy)

    def _act_on_autograd(self, n: Node) -> Any:
        """Write the node that a trace would not leave; its value is the same memory.

        requires_grad_() of what has the flag already does nothing.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        before = args[0].requires_grad
        with without_torch_function():
            result = args[0].requires_grad_(*args[1:], **kwargs) if n.target == REQUIRE_GRAD else GET_DATA(args[0])
        if result is args[0] and result.requires_grad == before:
            return result
        return self._track(result, self._create(n, *self._arguments(n.args, n.kwargs)))

    def _switch_mode(self, n: Node, name: str) -> Any:
        """Keep the node and run it, out of make_fx's sight.

        Inference mode is traced as no_grad: inference tensors cannot be tracked, and no fake shows the
        difference.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        proxy = self._create(n, *self._arguments(n.args, n.kwargs))
        with without_torch_function():
            if name == "_enter_autocast":
                return _Opaque(proxy, n.target(*args, **kwargs))  # type: ignore[operator]
            if name == "_exit_autocast":
                n.target(args[0].value)  # type: ignore[operator]
            elif name == "_enter_inference_mode":
                grad = torch.is_grad_enabled()
                set_grad_enabled(grad and not (args and args[0]))
                return _Opaque(proxy, grad)
            else:
                set_grad_enabled(args[0].value)
        return _Opaque(proxy)

    def _carry(self, n: Node) -> Any:
        call = written(n) if n in self.distributed and n in self.marked else None
        target, args = call or (single_overload(n.target), n.args)
        proxy = self._create(n, *self._arguments(args, {} if call else n.kwargs), target=target)
        if n in self.marked and not isinstance(proxy.node.target, OpOverload):
            proxy.node.meta[CARRIED] = True
        if not self.joined:
            proxy.node.meta[APART] = True
        if n in self.distributed:
            proxy.node.meta["val"] = self.distributed[n]
        if n not in self.fresh:
            return _Opaque(proxy)
        return self._track(self.fresh[n], proxy)

    def _track(self, value: Any, proxy: torch.fx.Proxy) -> Any:
        return proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=self.tracer)

    def _create(self, n: Node, args: Any, kwargs: Any, target: Any = None) -> torch.fx.Proxy:
        proxy: torch.fx.Proxy = self.tracer.create_proxy(n.op, target or n.target, args, kwargs, name=n.name)
        proxy.node.meta.update({k: v for k, v in n.meta.items() if k != "example_value"})
        if n.op == "call_method":
            _keep_example_value(n.args[0], proxy.node.args[0])
        return proxy

    def _arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a node as proxies."""
        args, kwargs = map_arg((args, kwargs), self._proxy)
        return args, kwargs

    def _proxy(self, n: Node) -> Any:
        value = self.env[n]
        if n.op == "get_attr" and not isinstance(value, torch.Tensor):
            return self._create(n, (), {}, target=_set_attribute(self.tracer.root, str(n.target), value))
        return pytree.tree_map(self._proxy_of, value, is_leaf=lambda x: isinstance(x, _Opaque))

    def _proxy_of(self, value: Any) -> Any:
        tracer = self.tracer
        if isinstance(value, _Opaque):
            return value.proxy
        if isinstance(value, torch.Tensor):
            return proxy_tensor.get_proxy_slot(value, tracer, value, lambda slot: slot.proxy)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return proxy_tensor.get_proxy_slot(value, tracer, value, lambda slot: slot.force())
        return value


def _keep_example_value(before: Any, now: Any) -> None:
    """AOTAutograd's cache takes methods of tensors alone, and knows a tensor by the value that Dynamo noted."""
    if isinstance(before, Node) and isinstance(now, Node) and "example_value" in before.meta:
        now.meta.setdefault("example_value", before.meta["example_value"])


def _unwrapped(value: Any) -> Any:
    return value.proxy if isinstance(value, _Opaque) else value


def _is_plain(value: Any) -> bool:
    """Whether a value can be faked again: no functorch wrapper, no tensor subclass."""
    leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
    return bool(leaves) and all(type(x) is FakeTensor and not is_functorch_wrapped(x) for x in leaves)


def _set_attribute(root: torch.nn.Module, path: str, value: Any) -> str:
    """Store `value` on the tracer's root under a flat name, which is returned."""
    name = path.replace(".", "_")
    setattr(root, name, value)
    return name


# ---------------------------------------------------------------- after the trace


def _gather_lists(graph: Graph, fakes: Sequence[Any]) -> None:
    """Make one input again of a list, as compiled autograd's graphs have, that make_fx took apart."""
    if not any(isinstance(fake, list) for fake in fakes):
        return
    graph.set_codegen(CodeGen())  # make_fx's takes the lists apart
    inputs, index = graph.find_nodes(op="placeholder"), 0
    for fake in fakes:
        if not isinstance(fake, list):
            index += 1
            continue
        parts, before = inputs[index : index + len(fake)], inputs[index:]
        index += len(fake)
        with graph.inserting_before(before[0] if before else next(n for n in graph.nodes if n.op != "placeholder")):
            whole = graph.placeholder("list")
        whole.meta["val"] = [node.meta["val"] for node in parts]
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            for place, node in enumerate(parts):
                item = graph.call_function(operator.getitem, (whole, place))
                item.meta.update(node.meta)
                node.replace_all_uses_with(item)
                graph.erase_node(node)


def _inherit(gm: GraphModule, canonical: GraphModule, fakes: Sequence[Any]) -> None:
    """Hand on what Dynamo left for AOTAutograd and Inductor (read by both on torch 2.13 and 2.15).

    An input of a tensor subclass is its own value: make_fx notes a plain tensor of its shape.
    """
    canonical.meta.update(gm.meta)
    inherited = attribute_sources(gm)
    if inherited is not None:
        names = dict(inherited)
        for path in list(names):
            names.setdefault(path.replace(".", "_"), names[path])
        for name, _ in [*canonical.named_parameters(), *canonical.named_buffers()]:
            names.setdefault(name, ConstantSource(name))
        set_attribute_sources(canonical, names)
    old, new = gm.graph.find_nodes(op="placeholder"), canonical.graph.find_nodes(op="placeholder")
    for before, after, fake in zip(old, new, fakes, strict=True):
        if not is_plain_value(fake):
            after.meta["val"] = fake
        if (source := input_source(before)) is not None:
            set_input_source(after, source)
        for key in (*PLACEHOLDER_META, "stack_trace", "nn_module_stack"):
            if key in before.meta:
                after.meta[key] = before.meta[key]
        after.type, after.target = None, before.name
        rename(after, before.name)


def _describe_attribute(gm: GraphModule, node: Node, mode: FakeTensorMode | None, sources: dict[Node, Source]) -> None:
    value = attribute(gm, str(node.target))
    if isinstance(value, torch.Tensor) and "val" not in node.meta and mode is not None:
        node.meta["val"] = value if isinstance(value, FakeTensor) else static_fake(value, mode)
    source = attribute_source(gm, node)
    if source is not None:
        sources.setdefault(node, source)
