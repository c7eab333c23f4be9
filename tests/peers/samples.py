"""PyTorch's own samples of every operator and module, compiled; tests/peers/run.py needs no checkout for them.

    python tests/peers/run.py tests/peers --files samples.py --out peers.json

They come with the installed torch (`op_db`, `module_db`), so they fit it. A sample counts where eager repeats itself.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

SAMPLES = 3


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _grads(out: Any, given: Any) -> list[torch.Tensor | None]:
    outs = [x for x in _tensors(out) if x.requires_grad and x.is_floating_point()]
    leaves = [x for x in _tensors(given) if x.requires_grad]
    if not outs or not leaves:
        return []
    total = sum((x * torch.linspace(0.5, 1.5, x.numel()).reshape(x.shape)).sum() for x in outs)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))  # type: ignore[arg-type]


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), tree)


def _same(f: Any, args: Any, kwargs: Any) -> None:
    """Output, gradients and whatever the call wrote into its inputs, of the compiled function and of eager."""

    def outcome(compiles: bool) -> Any:
        torch.manual_seed(0)
        given, own = _copied((args, kwargs)), copy.deepcopy(f)
        parameters = list(own.parameters()) if isinstance(own, torch.nn.Module) else []
        out = (torch.compile(own, backend="inductor") if compiles else own)(*given[0], **given[1])
        return out, _grads(out, (given, parameters)), given

    try:
        first, second = outcome(False), outcome(False)
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    except Exception:
        return  # random, or a sample that eager does not take
    torch._dynamo.reset()
    torch.testing.assert_close(outcome(True), first, equal_nan=True)


ON_CPU = [op for op in op_db if op.supported_dtypes("cpu")]


@pytest.mark.parametrize("op", ON_CPU, ids=lambda op: op.formatted_name)
def test_op(op: Any) -> None:
    function, dtypes = op.get_op(), op.supported_dtypes("cpu")
    dtype = torch.float32 if torch.float32 in dtypes else sorted(dtypes, key=str)[0]
    grad = dtype in op.supported_backward_dtypes("cpu") and op.supports_autograd
    for _, sample in zip(range(SAMPLES), op.sample_inputs("cpu", dtype, requires_grad=grad), strict=False):
        _same(lambda *a, **k: function(*a, **k), (sample.input, *sample.args), sample.kwargs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.formatted_name)
def test_module(info: Any, training: bool) -> None:
    samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=training)
    for _, sample in zip(range(SAMPLES), samples, strict=False):
        made, given = sample.constructor_input, sample.forward_input
        if given is None:
            continue
        module = info.module_cls(*made.args, **made.kwargs).train(training)
        _same(module, given.args, given.kwargs)
