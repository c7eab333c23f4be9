"""Short, stable text of a canonical graph, for golden tests and reports.

One line a value: a number by order of definition, the op without its namespace, only the arguments that matter, dtype
and shape; parameters by their module path; module path after each norm. No addresses, versions or tracer names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from normfx.graph.nodes import arguments, is_getitem, op_name, shape, value

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def print_graph(
    graph: Graph, names: Mapping[Node, str], weights: frozenset[Node], module_path: Callable[[Node], str]
) -> str:
    """Text of a graph. names: placeholders and attributes → readable names ("transformer.wte.weight").

    Inputs that nothing reads are left out, and so are the lines of `weights`: where they are read their names say all.
    Only norms are followed by their module path.
    """
    return print_lines(graph, names, weights, module_path)[0]


def print_lines(
    graph: Graph, names: Mapping[Node, str], weights: frozenset[Node], module_path: Callable[[Node], str]
) -> tuple[str, dict[Node, int]]:
    """The same text, and the line of each node that has one, counted from 0."""
    text: dict[Node, str] = {}
    lines: list[str] = []
    places: dict[Node, int] = {}
    count = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            text[node] = names.get(node, node.name)
            if node.op == "placeholder" and node.users and value(node) is not None and node not in weights:
                places[node] = len(lines)
                lines.append(f"{text[node]}: {describe(node.meta.get('val'))}")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], text)}")
        elif node not in text:
            parts = _parts(node)
            named = [f"%{count + i}" for i in range(len(parts) or 1)]
            count += len(named)
            text[node] = ", ".join(named)
            text.update(zip(parts, named, strict=False))
            places.update(dict.fromkeys((node, *parts), len(lines)))
            lines.append(_line(node, text, module_path))
    return "\n".join(lines) + "\n", places


def _parts(node: Node) -> list[Node]:
    """The results of a normfx op that has several, as far as they are read."""
    if not op_name(node).startswith("normfx::") or not isinstance(node.meta.get("val"), (tuple, list)):
        return []
    found: list[Any] = [user for user in node.users if is_getitem(user)]
    return sorted(found, key=lambda user: user.args[1])


def _line(node: Node, text: Mapping[Node, str], module_path: Callable[[Node], str]) -> str:
    name = op_name(node)
    short = name.split("::")[-1].split(".")[0] if name else getattr(node.target, "__name__", str(node.target))
    line = f"{text[node]} = {short}({_arguments(node, name, text)})"
    kind = ", ".join(filter(None, map(describe, [n.meta.get("val") for n in _parts(node) or [node]])))
    path = module_path(node) if "norm" in short else ""
    return line + (f": {kind}" if kind else "") + (f"  # {path}" if path else "")


def _arguments(node: Node, name: str, text: Mapping[Node, str]) -> str:
    if name.startswith("normfx::"):
        return ", ".join(_canonical_arguments(node, name, text))
    words = [_argument(a, text) for a in node.args]
    words += [f"{k}={_argument(v, text)}" for k, v in node.kwargs.items() if v is not None]
    return ", ".join(words)


def _canonical_arguments(node: Node, name: str, text: Mapping[Node, str]) -> list[str]:
    """Arguments of a normfx op by name; those at their usual value are left out."""
    args = {k: v for k, v in arguments(node).items() if v is not None}
    first = next(iter(args.values()))
    if {"size", "inner"} <= set(args) and isinstance(first, Node):
        length = shape(first)[args["dim"]]
        if length == args["size"]:
            del args["size"], args["inner"]
    shown = {k: v for k, v in args.items() if not _is_usual(k.removeprefix("inner_"), v)}
    if shown.get("inner_dim") == shown.get("dim"):
        shown.pop("inner_dim", None)
    return [
        _argument(v, text) if isinstance(v, Node) and k != "bias" else f"{k}={_argument(v, text)}"
        for k, v in shown.items()
    ]


_USUAL = {
    "eps_place": "inside", "correction": 0, "scale": 1.0, "factor": 1.0, "inner": 1, "centre_output": False,
    "alpha": 1.0, "offsets": [],
}  # fmt: skip


def _is_usual(name: str, arg: object) -> bool:
    return name in ("compute_dtype", "out_dtype", "dtype") or (name in _USUAL and arg == _USUAL[name])


def _argument(arg: Any, text: Mapping[Node, str]) -> str:
    if isinstance(arg, Node):
        return text[arg]
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_argument(a, text) for a in arg) + "]"
    if isinstance(arg, torch.dtype):
        return _DTYPES.get(arg, str(arg))
    if isinstance(arg, float):
        return f"{arg:.6g}"
    return str(arg)


def describe(val: Any) -> str:
    """'f32[2, 16, 32]' of a fake tensor; symbolic sizes as s0, s1… stand as they are; '' for anything else."""
    if not isinstance(val, torch.Tensor):
        return ""
    return f"{_DTYPES.get(val.dtype, str(val.dtype))}[{', '.join(str(d) for d in val.shape)}]"
