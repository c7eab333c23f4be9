"""What the tests of checkpointed regions share: models, and a backend that shows what backward is left with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from capturing import keep_products
from equivalence import EagerBackend, outputs_and_grads
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from normfx.backend import transform
from normfx.graph.nodes import parameter_only
from normfx.ir import fused_ops, ops
from normfx.options import Options

higher = torch.ops.higher_order

LIVE = {"strict": True, "fold": "live"}
"""As if weights were free: the models of the tests have few rows."""

ROWS = 640
"""Tokens: more than any feature dimension, and another number."""


RMS_NORMS = (ops.RMS_NORM, fused_ops.ADD_RMS_NORM)


class Layer(nn.Module):
    """A pre-LN transformer layer; dropout where a centred stream allows it. Attention is spelled out: Inductor of torch
    2.11 cannot differentiate the CPU's own in float64."""

    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = F.dropout((q @ k.mT).softmax(-1), self.p, self.training)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.dropout(F.gelu(self.up(self.norm2(x))), self.p, self.training))


def checkpointed(layer: Callable[[Tensor], Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = checkpoint(layer, x, **{"use_reentrant": False, **kwargs})
    return out


class Stack(nn.Module):
    """An embedding, layers, a final norm; `call` says how a layer is called."""

    def __init__(
        self, call: Callable[[nn.Module, Tensor], Tensor] = checkpointed, p: float = 0.0, depth: int = 2, d: int = 8
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.table, self.layers = nn.Embedding(20, d), nn.ModuleList(Layer(d, p) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = self.call(layer, x)
        return self.norm(x)


NAMES = ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm"]
"""The norms of a stack."""


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape or (2, 5), generator=torch.Generator().manual_seed(0))


class Partitioned:
    """A backend: normfx's stages, if wanted, then AOTAutograd, by default with the partitioner that Inductor uses.

    rows:    the size of a dimension that activations have, and parameters have not
    options: normfx's, next to LIVE; None leaves normfx out
    """

    def __init__(
        self,
        rows: int,
        options: Mapping[str, Any] | None = MappingProxyType({}),
        partition: Callable[..., Any] = min_cut_rematerialization_partition,
    ) -> None:
        self.rows, self.options, self.partition = rows, options, partition
        self.forward: GraphModule
        self.backward: GraphModule

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.options is not None:
            settings = Options.parse({**LIVE, **self.options}, environ={"NORMFX_VERIFY": "1"})
            gm = transform(gm, example_inputs, settings).graph_module
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=lambda graph, _: self._keep("forward", graph),
            bw_compiler=lambda graph, _: self._keep("backward", graph),
            partition_fn=self.partition,
        )(gm, example_inputs)
        return compiled

    def _keep(self, name: str, graph: GraphModule) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        setattr(self, name, graph)
        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed

    def run(self, model: nn.Module, x: Tensor) -> Partitioned:
        torch._dynamo.reset()
        torch.compile(model, backend=self, fullgraph=True)(x).sum().backward()
        return self

    def _saved(self) -> list[Node]:
        """What forward computes for backward: neither inputs nor the gradients of outputs."""
        inputs = self.backward.graph.find_nodes(op="placeholder")
        return [n for n in inputs if not n.name.startswith(("primals", "tangents"))]

    def _is_activation(self, node: Node) -> bool:
        return self.rows in node.meta["val"].shape

    @property
    def saved_activations(self) -> int:
        """Bytes."""
        return sum(_bytes(n) for n in self._saved() if self._is_activation(n))

    @property
    def saved_weights(self) -> int:
        """Bytes of values without a row per token."""
        return sum(_bytes(n) for n in self._saved() if not self._is_activation(n))

    def recomputed(self, op: Any) -> int:
        """How many calls of an op stand in both graphs."""
        names = {n.name for n in self.forward.graph.nodes}
        return sum(n.name in names for n in self.backward.graph.find_nodes(op="call_function", target=op))

    def recomputed_from_parameters(self) -> list[str]:
        """What backward computes from parameters alone, views of them aside."""
        primals = [n for n in self.backward.graph.find_nodes(op="placeholder") if n.name.startswith("primals")]
        known = parameter_only(self.backward.graph, [n for n in primals if not self._is_activation(n)])
        return [n.name for n in known if isinstance(n.target, OpOverload) and not n.target.is_view]


def _bytes(node: Node) -> int:
    fake = node.meta["val"]
    return int(fake.numel()) * int(fake.element_size())


class Traced(EagerBackend):
    """normfx's stages, then AOTAutograd: backward runs on what forward saved and computes the rest again."""

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        super().__call__(gm, example_inputs)
        return aot_eager(self.modules[-1], example_inputs)

    def count(self, *ops: Any) -> int:
        return sum(n.target in ops for n in self.modules[-1].graph.nodes)


def same(compiled: Any, model: nn.Module, *inputs: Any, reference: Any = None) -> None:
    """Outputs and every gradient equal eager's, or the reference's, from the same random state."""
    expected, expected_grads = outputs_and_grads(model if reference is None else reference, model, inputs)
    actual, grads = outputs_and_grads(compiled, model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, want in expected_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-10, atol=1e-11, msg=name)


def traced(model: nn.Module, *inputs: Any) -> Traced:
    """The backend, after the model was compared with eager."""
    torch._dynamo.reset()
    backend = Traced(LIVE)
    same(torch.compile(model, backend=backend, fullgraph=True), model, *inputs)
    return backend


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(layer, checkpointed(layer, x))


def inside(layer: nn.Module, x: Tensor) -> Tensor:
    """A checkpoint in a checkpoint, between other ops."""
    return checkpointed(lambda v: checkpointed(layer, v * 1.5) * 0.5, x)


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(layer, x, use_reentrant=True)


def selective(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(layer, x, context_fn=keep_products)


def wrapped(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = higher.wrap(layer, x)
    return out


def around_nested(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(lambda v: nested(layer, v), x)


@torch.compiler.nested_compile_region
def nested(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out
