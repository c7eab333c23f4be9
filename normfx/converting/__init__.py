"""normfx.convert: a copy of a model whose parameters hold the centred and folded weights.

The rules decide on the model's exported program, as in normfx.rewrite. What they compute from parameters alone becomes
the parameters of the copy (written.py), and norms that lost their mean or their affine become nn.RMSNorm or
nn.LayerNorm. The forward code of the model does not change. That the copy computes the same is proved (proof.py): it is
exported too, and its graph has to be the rewritten one, with the new parameters in the places of folds.

It is a one-way door. The copy is the same function of its inputs, but not of its parameters: training would change
weights that have to stay centred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normfx.backend import parse, transform_canonical
from normfx.capture.trace import Captured, capture_exported
from normfx.compat import pytree
from normfx.compat.operators import OpOverload, schema
from normfx.converting.places import Places
from normfx.converting.proof import prove
from normfx.converting.rows import centre_parameters
from normfx.converting.written import Copy
from normfx.errors import ConvertError
from normfx.graph.names import module_path
from normfx.options import Options

RULES = ("pre_rms_norm", "linear_norm", "fold_affine")
"""Rules whose edits are other weights and other norms; none that adds, joins or drops an op of the model."""


def convert(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy of `model` with other weights and cheaper norms that computes the same.

    args, kwargs, dynamic_shapes: of a call, as torch.export.export takes them
    options: those of the backend; of the rules, pre_rms_norm, linear_norm and fold_affine are used

    A tensor that two modules share, as an embedding and a head do, becomes two where their values become different.
    The model is left as it is.

    Raises ConvertError for a model in training mode, and where the copy cannot be written or is not proved to compute
    the same; OptionError for bad options.
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(f"normfx.convert takes an nn.Module, not {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ConvertError("normfx.convert takes a model in eval mode: call model.eval() first")
    settings = parse({"fold": "cached", **(options or {})})
    rules = tuple(name for name in RULES if name in settings.rules)
    settings = replace(settings, rules=rules, lowering="inductor")

    def places(of: nn.Module, rules: tuple[str, ...]) -> Places:
        captured = _exported(of, args, kwargs, dynamic_shapes)
        _transform(captured, replace(settings, rules=rules))
        return Places(of, captured)

    with torch.no_grad():
        rewritten, original = places(model, rules), places(model, ())
        failure: ConvertError | None = None
        for means in (False, True):  # some modules look at the class or the bias of their norms
            copied = Copy(rewritten, original, means)
            copied.write()
            try:
                prove(rewritten, places(copied.model, ()), frozenset(copied.norms), copied.ones)
                _compare(model, copied.model, args, kwargs)
            except ConvertError as error:
                failure = failure or error
                continue
            return copied.model
        assert failure is not None
        raise failure


TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Largest difference of an output, relative to its largest entry; 0.1 in half precision. Rounding stays far below."""


def _compare(model: nn.Module, copied: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
    """The copy runs, and gives the same: torch.export may take another way through a model than a call."""
    results = []
    for what, each in (("model", model), ("copy", copied)):
        try:
            results.append(pytree.tree_leaves(each(*args, **(kwargs or {}))))
        except Exception as error:
            raise ConvertError(f"normfx.convert: the {what} does not run ({type(error).__name__}: {error})") from error
    wanted, found = results
    for want, got in zip(wanted, found, strict=True):
        if isinstance(want, torch.Tensor) and (want.shape, want.dtype) != (got.shape, got.dtype):
            raise ConvertError(f"normfx.convert: an output of the copy is {_kind(got)}, not {_kind(want)}")
        if isinstance(want, torch.Tensor) and (want.is_floating_point() or want.is_complex()) and want.numel():
            off, size = (got - want).abs().max().item(), want.abs().max().item()
            if not off <= TOLERANCE.get(want.real.dtype, 0.1) * size:
                raise ConvertError(f"normfx.convert: an output of the copy is off by {off:.2g}, of {size:.2g}")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, shapes: Any) -> Captured:
    try:
        program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ConvertError(
            f"normfx.convert: the model cannot be exported ({type(error).__name__}: {error}); "
            "torch.export.export(model, args, kwargs, strict=False) says more"
        ) from error
    captured = capture_exported(program)
    for node in captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])  # nothing writes in place: an alias is the value
        captured.graph_module.graph.erase_node(node)
    return captured


def _transform(captured: Captured, settings: Options) -> None:
    transform_canonical(captured, settings, parameters_only=True)
    centre_parameters(captured)
    for node in captured.graph_module.graph.nodes:
        if isinstance(node.target, OpOverload) and schema(node.target).is_mutable:
            raise ConvertError(f"normfx.convert: '{node}' ({module_path(node) or 'the model'}) writes in place")
