"""Hand a rewritten graph to Inductor."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from normfx.compat.dynamo import ConstantSource, input_source, set_input_source
from normfx.compat.inductor import compile_fx, modes, option_names
from normfx.errors import OptionError, did_you_mean
from normfx.graph import recompute
from normfx.ir import centring, channels, form, fused_ops, merging, ops
from normfx.kernels import backward, forward, launch, rows, run, source, spec
from normfx.lower import norm_ops, stored, two_norms
from normfx.lower.passes import setting
from normfx.lower.sigmoid import with_sigmoids
from normfx.lower.small_constants import write_small_constants
from normfx.options import KEYS

MEANING = (
    form, ops, centring, channels, merging, fused_ops, norm_ops, two_norms, stored, spec, launch, rows, forward,
    backward, source, run,
)  # fmt: skip
"""The modules that say what a graph with normfx's ops compiles to."""

BODIES: dict[Any, Any] = {**ops.BODIES, **fused_ops.BODIES}


def inductor_options(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The config patches of Inductor's mode and of options["inductor"], the latter winning.

    Raises OptionError for a mode or option Inductor does not know.
    """
    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        known_modes = modes()
        if mode not in known_modes:
            raise OptionError.unknown("mode", mode, tuple({"default": None, **known_modes}), "torch.compile")
        patches.update(known_modes[mode])
    known = option_names()
    for key, given in options.items():
        name = str(key).replace("-", "_")
        if name not in known:
            meant = did_you_mean(name, known)
            raise OptionError(
                f"normfx: unknown Inductor option {key!r} in options['inductor'];{meant and f' {meant}'} "
                "see torch._inductor.list_options()"
            )
        patches[name] = given
    return patches


def check_options(options: Mapping[str, Any]) -> None:
    """Raises OptionError for an option that is not normfx's but Inductor's, saying where it belongs."""
    strange = [str(key) for key in options if key not in KEYS]
    known = option_names() if strange else frozenset()
    for key in strange:
        if key.replace("-", "_") in known:
            given = f"options={{'inductor': {{{key!r}: {options[key]!r}}}}}"
            raise OptionError(f"normfx: {key!r} is an option of Inductor: give it as {given}")


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile with Inductor. Canonical normfx ops are composites: autograd and Inductor see their ATen bodies."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if input_source(node) is None:  # an input that normfx added; AOTAutograd asks each where it comes from
            set_input_source(node, ConstantSource(node.name))
    write_small_constants(gm)
    tag = f"{torch.compiler.config.cache_key_tag}normfx-{_digest()}{recompute.digest(gm.graph)}"
    config: Any = torch.compiler.config  # `patch` is put on the module when it is imported
    with config.patch(cache_key_tag=tag), _without_input_values(gm, patches):
        return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=with_sigmoids(patches)))


@contextmanager
def _without_input_values(gm: GraphModule, patches: Mapping[str, Any]) -> Iterator[None]:
    """Take the fake values from a graph's inputs while Inductor compiles it for its C++ wrapper, which believes that a
    graph with them was exported, and its sizes constants."""
    inputs = gm.graph.find_nodes(op="placeholder") if setting(patches, "cpp_wrapper") else []
    values = {node: node.meta.pop("val") for node in inputs if "val" in node.meta}
    try:
        yield
    finally:
        for node, known in values.items():
            node.meta["val"] = known


@functools.cache
def _digest() -> str:
    """A digest of what normfx's ops compute: AOTAutograd's cache knows them by name, and would hand out what an earlier
    version of them compiled to."""
    return hashlib.sha256("".join(map(inspect.getsource, MEANING)).encode()).hexdigest()[:16]


def inline_canonical_ops(gm: GraphModule) -> GraphModule:
    """Replace each normfx op by the ATen ops of its body, in place (for graphs that leave the process)."""
    for node in [n for n in gm.graph.nodes if n.target in BODIES]:
        tensors = node.all_input_nodes

        def body(*values: torch.Tensor, node: torch.fx.Node = node, tensors: list[torch.fx.Node] = tensors) -> Any:
            given = dict(zip(tensors, values, strict=True))
            return BODIES[node.target](*torch.fx.node.map_arg(node.args, given.__getitem__))

        traced = make_fx(body, pre_dispatch=True)(*[t.meta["val"] for t in tensors])
        inside = dict(zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True))
        with gm.graph.inserting_before(node):
            out = gm.graph.graph_copy(traced.graph, inside)
        for new in inside.values():
            for key in ("stack_trace", "nn_module_stack"):
                if new not in tensors and key in node.meta:
                    new.meta.setdefault(key, node.meta[key])
        if isinstance(out, torch.fx.Node):
            node.replace_all_uses_with(out)
        else:
            assert isinstance(out, (tuple, list))
            for part in list(node.users):
                index: Any = part.args[1]
                part.replace_all_uses_with(out[index])
                gm.graph.erase_node(part)
        gm.graph.erase_node(node)
    gm.recompile()
    return gm
