"""capture: the canonical graph computes what the model computes, keeps its gradients, and hides nothing from
Inductor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from normfx.capture import Captured, capture, capture_exported, dotted, module_path, source_line
from normfx.ir.expand import encoder_layer
from normfx.ir.verify import verify

aten = torch.ops.aten

pytestmark = [  # raised inside torch 2.13 itself, by custom autograd functions and by its Inductor
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),  # by jvp on torch 2.15
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Backend:
    """Compiles the canonical graph and remembers it."""

    def __init__(self, lower: Callable[..., Any] = aot_eager) -> None:
        self.lower = lower
        self.seen: list[Captured] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        state = torch.get_rng_state()
        before = [(x, x._version, x.clone()) for x in example_inputs if _real(x)]
        captured = capture(gm, example_inputs)
        assert torch.equal(state, torch.get_rng_state())
        assert all(x._version == version and torch.equal(x, value) for x, version, value in before)
        _check(gm, captured)
        self.seen.append(captured)
        return self.lower(captured.graph_module, example_inputs)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.seen[-1].graph_module.graph

    def count(self, op: Any) -> int:
        return len(self.graph.find_nodes(op="call_function", target=op))


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor) and not x.is_inference()


def _check(gm: torch.fx.GraphModule, captured: Captured) -> None:
    canonical = captured.graph_module
    verify(canonical, "capture")
    old, new = gm.graph.find_nodes(op="placeholder"), canonical.graph.find_nodes(op="placeholder")
    assert [n.name for n in old] == [n.name for n in new]
    assert all(n in captured.sources for n in new)
    parameters = [isinstance(n.meta["example_value"], nn.Parameter) for n in old]
    assert parameters == [captured.sources[n].kind == "parameter" for n in new]


def run(f: Callable[..., Any], model: nn.Module | None, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Any]]:
    """Outputs, mutated arguments, and gradients of parameters and arguments, of one seeded call."""
    torch.manual_seed(1)
    args = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), args)
    leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    leaves += list(model.parameters()) if model is not None else []
    wants_grad = [t.requires_grad for t in leaves]  # an in-place op may turn an argument into one that does
    out = f(*args, **kwargs)
    outs = [o for o in pytree.tree_leaves(out) if isinstance(o, Tensor)]
    wanted = [t for t, wants in zip(leaves, wants_grad, strict=True) if wants]
    sources = [o for o in outs if o.requires_grad]
    grads: list[Any] = []
    if sources and wanted:
        loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in sources)
        grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
    state = list(model.buffers()) if model is not None else []
    return [t.detach() for t in [*outs, *leaves, *state]], [torch.randn(3), *grads]


def same(model: Any, *args: Any, backend: Backend | None = None, dynamic: bool | None = None, **kwargs: Any) -> Backend:
    """Asserts that the compiled model equals eager in outputs, mutations, gradients and random numbers
    drawn.
    """
    backend = backend or Backend()
    twin = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    module, twin_module = (m if isinstance(m, nn.Module) else None for m in (model, twin))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    got, got_grads = run(compiled, module, *args, **kwargs)
    want, want_grads = run(twin, twin_module, *args, **kwargs)
    assert len(got) == len(want) and len(got_grads) == len(want_grads)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert backend.seen
    return backend


def x64(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


class Block(nn.Module):
    def __init__(self, d: int = 8, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, layers: int = 2, p: float = 0.0) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(p=p) for _ in range(layers))
        self.norm_f = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return self.norm_f(x)


# ---------------------------------------------------------------- what stays whole


def test_ops_stay_whole_and_spellings_collapse() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
            self.w, self.g = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.table(ids))
            x = F.rms_norm(x @ self.w, (8,), self.g, 1e-6)
            x = torch.matmul(x, self.w).add(1.0) + 1.0
            return F.scaled_dot_product_attention(x, x, x)

    backend = same(Model().double(), torch.randint(10, (2, 5)))
    for op in (aten.layer_norm.default, aten.embedding.default, aten.rms_norm.default):
        assert backend.count(op) == 1
    assert backend.count(aten.scaled_dot_product_attention.default) == 1
    assert backend.count(aten.matmul.default) == 2 and backend.count(aten.add.Tensor) == 2


def test_sources_modules_and_lines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.LayerNorm(8), nn.ModuleDict({"a": nn.Linear(8, 8)})["a"])
            self.register_buffer("scale", torch.ones(8))
            self.shift = torch.ones(8)

        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            y = self.body(x) * self.scale + self.shift
            return y + more["bias"] + torch.tensor([1.0] * 8) + torch.tensor(0.5)

    backend = same(Model().double(), x64(2, 8), {"bias": x64(8)})
    sources = {s.name: s.kind for s in backend.seen[0].sources.values()}
    assert sources == {
        "body.0.weight": "parameter",
        "body.0.bias": "parameter",
        "body.1.weight": "parameter",
        "body.1.bias": "parameter",
        "scale": "buffer",
        "shift": "input",
        "x": "input",
        "more.bias": "input",
        "_tensor_constant0": "constant",
    }
    norm = backend.graph.find_nodes(op="call_function", target=aten.layer_norm.default)[0]
    assert module_path(norm) == "body.0"
    assert source_line(norm).startswith("test_capture.py:")
    assert source_line(norm).endswith("in forward: y = self.body(x) * self.scale + self.shift")


@pytest.mark.parametrize(
    ("expression", "path"),
    [
        ("L['self']._modules['h']._modules['0']._parameters['weight']", "h.0.weight"),
        ("L['self'].transformer.h[0].ln_1", "transformer.h.0.ln_1"),
        ("L['self']._orig_mod._modules['0']", "0"),
        ("L['batch']['ids']", "batch.ids"),
        ("L['x'].size()[1]", "x.size.1"),
        ("G['model']._buffers['mask']", "model.mask"),
        ("", ""),
    ],
)
def test_dotted(expression: str, path: str) -> None:
    assert dotted(expression) == path


# ---------------------------------------------------------------- transformers


def gpt2(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=30,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_gpt2(attention: str, training: bool) -> None:
    model = gpt2(attention).train(training)
    backend = same(model, torch.randint(30, (2, 7)))
    assert backend.count(aten.layer_norm.default) == 5
    norms = backend.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert [module_path(n) for n in norms][:2] == ["transformer.h.0.ln_1", "transformer.h.0.ln_2"]
    assert source_line(norms[0]).startswith("modeling_gpt2.py:")
    assert "transformer.h.0.ln_1.weight" in {s.name for s in backend.seen[0].sources.values()}


def test_gpt2_generate_with_cache() -> None:
    model = gpt2("sdpa").eval()
    ids = torch.randint(1, 30, (1, 4))
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    mask = torch.ones_like(ids)
    want = model.generate(ids, attention_mask=mask, **options)
    backend = Backend()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), want)
    assert backend.seen and backend.count(aten.layer_norm.default) == 5


# ---------------------------------------------------------------- carried nodes


def test_checkpoint_with_dropout() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(p=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.block(x), use_reentrant=False) * 2

    backend = same(Model().double(), x64(3, 8, grad=True))
    assert backend.count(torch.ops.higher_order.tag_activation_checkpoint) == 1


class DoubleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * grad * w, 3 * (grad * x).sum(0)


class Custom(nn.Module):
    def __init__(self, no_grad: bool = False) -> None:
        super().__init__()
        self.w, self.norm, self.no_grad = nn.Parameter(torch.randn(8)), nn.LayerNorm(8), no_grad

    def forward(self, x: Tensor) -> Tensor:
        y = DoubleGradient.apply(self.norm(x), self.w)
        if self.no_grad:
            with torch.no_grad():
                y = y + DoubleGradient.apply(x, self.w)
        return y + 1


@pytest.mark.parametrize("inner_no_grad", [False, True])
def test_custom_function_keeps_its_gradient(inner_no_grad: bool) -> None:
    same(Custom(inner_no_grad).double(), x64(3, 8, grad=True))


def test_custom_function_under_no_grad() -> None:
    with torch.no_grad():
        same(Custom().double(), x64(3, 8))


def test_cond() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: self.block(v), lambda v: v * 2, (x,)) + 1

    model = Model().double()
    for sign in (1, -1):
        same(model, sign * x64(3, 8).abs(), backend=Backend())


def test_while() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    def f(n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n, x = while_loop(lambda n, x: n > 0, lambda n, x: (n - 1, F.layer_norm(x, (8,)) * 2), (n, x))
        return n, x + 1

    with torch.no_grad():
        same(f, torch.tensor(3), x64(2, 8))


def test_nested_compile_region() -> None:
    block = Block().double()

    @torch.compiler.nested_compile_region
    def inner(v: Tensor) -> Tensor:
        return block(v)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return inner(inner(x)) + 1

    backend = Backend()
    model, x = Model(), x64(3, 8, grad=True)
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    want = model(x)
    parameters = [x, *model.parameters()]
    pairs = zip(*(torch.autograd.grad(out.sum(), parameters) for out in (got, want)), strict=True)
    for a, b in [(got, want), *pairs]:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert backend.count(torch.ops.higher_order.invoke_subgraph) == 2


def test_functorch_regions() -> None:
    w = x64(8, 8)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.layer_norm(x, (8,))
        y = torch.func.vmap(lambda row: w @ row)(x)
        g = torch.func.grad(lambda v: F.layer_norm(v, (8,)).pow(3).sum())(x)
        return F.layer_norm(y, (8,)), g + 1

    backend = same(f, x64(3, 8))
    assert backend.count(aten.layer_norm.default) == 2


def test_jvp() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda v: F.layer_norm(v, (8,)).sin(), (x,), (x * 2,))[1] + F.layer_norm(x, (8,))

    assert same(f, x64(3, 8)).count(aten.layer_norm.default) == 1


def test_tensor_hook_is_a_barrier() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            y.register_hook(lambda grad: grad * 2)
            return self.up(y)

    same(Model().double(), x64(3, 8, grad=True))


def test_autograd_inside_the_graph_is_refused() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.autograd.grad(F.layer_norm(x, (8,)).pow(2).sum(), x)[0]

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("Dynamo of this torch never traces torch.autograd.grad")
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(Exception, match=r"'grad' at test_capture\.py:.* cannot be traced"),
    ):
        torch.compile(f, backend=Backend(), fullgraph=True)(x64(3, 8, grad=True))


# ---------------------------------------------------------------- modes


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        with torch.no_grad():
            z = self.b(self.norm(x))
        return self.norm(y.to(x.dtype)) + z + self.b(x)


def test_inner_modes() -> None:
    backend = same(Modes(), torch.randn(3, 8, requires_grad=True))
    linears = backend.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [n.meta["val"].dtype for n in linears] == [torch.bfloat16, torch.float32, torch.float32]
    names = [n.target.__name__ for n in backend.graph.nodes if n.op == "call_function"]
    assert names.count("_enter_autocast") == names.count("_exit_autocast") == 1
    assert names.count("_set_grad_enabled") == 2


def test_ambient_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        backend = same(Block(), torch.randn(3, 8, requires_grad=True))
    linear = backend.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    assert linear.meta["val"].dtype == torch.bfloat16
    assert not any("autocast" in str(n.target) for n in backend.graph.nodes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ambient_grad_mode(mode: Any) -> None:
    model, x = Stack().double(), x64(3, 8)
    with mode():
        backend = Backend()
        got = torch.compile(model, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=0, atol=1e-13)
    assert not any(n.meta["val"].requires_grad for n in backend.graph.find_nodes(
        op="call_function", target=aten.linear.default))  # fmt: skip


def test_inner_inference_mode() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = F.layer_norm(x, (8,))
        return F.layer_norm(x, (8,)) + y.sum()

    backend = Backend()
    x = x64(3, 8)
    got = torch.compile(f, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, f(x))
    names = [n.target.__name__ for n in backend.graph.nodes if n.op == "call_function"]
    assert "_enter_inference_mode" in names and "_exit_inference_mode" in names


# ---------------------------------------------------------------- mutation, constants


def test_in_place_residual() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.norm(x))
            y += self.up(x)
            y.add_(2)
            return y

    same(Model().double(), x64(3, 8, grad=True))


def test_input_mutation_and_its_fake() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            x.add_(self.w)  # makes x require grad: AOTAutograd must not see that on its own fake
            cache[:, 1] = x[:, 1].detach()
            return F.layer_norm(x, (8,))

    same(Model().double(), x64(3, 8), x64(3, 8))


def test_aliased_inputs() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return F.layer_norm(x, (8,)) * 2

    base = x64(3, 8)
    mine, eager = base.clone(), base.clone()
    got = torch.compile(f, backend=Backend(), fullgraph=True)(mine, mine[1:])
    torch.testing.assert_close(got, f(eager, eager[1:]))
    torch.testing.assert_close(mine, eager)


def test_batch_norm_updates_its_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).double()
    backend = same(model, x64(2, 3, 6, 6))
    kinds = {s.name: s.kind for s in backend.seen[0].sources.values()}
    assert kinds["1.running_mean"] == kinds["1.running_var"] == kinds["1.num_batches_tracked"] == "buffer"


def test_dead_code() -> None:
    def f(x: Tensor) -> Tensor:
        F.layer_norm(x, (8,))
        F.dropout(x, 0.5)
        torch.rand(3)
        return x + 1

    backend = Backend()
    torch.compile(f, backend=backend, fullgraph=True)(x64(3, 8))
    assert backend.count(aten.layer_norm.default) == 0
    assert backend.count(aten.dropout.default) == 1 and backend.count(aten.rand.default) == 1


def test_random_numbers_keep_count_and_order() -> None:
    same(Stack(p=0.3).double(), x64(3, 8, grad=True))


def test_tensor_constants_reach_inductor_once() -> None:
    def f(x: Tensor) -> Tensor:
        mask = torch.tensor([1.0, 0.0] * 4, dtype=torch.float64)
        mask[0] += 1
        return x * mask + torch.tensor(2.0, dtype=torch.float64) + torch.tensor([3])[0]

    backend = same(f, x64(3, 8, grad=True))
    constants = [s for s in backend.seen[0].sources.values() if s.kind == "constant"]
    assert len(constants) == 2


# ---------------------------------------------------------------- dynamic shapes


def test_dynamic_lengths() -> None:
    torch._dynamo.reset()
    model, backend = Stack().double(), Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    compiled(x64(2, 5, 8))
    calls = len(backend.seen)  # Dynamo may call a backend twice for one dynamic frame
    for n in (5, 7, 12):
        x = x64(2, n, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-13)
    assert len(backend.seen) == calls
    norms = backend.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert len(norms) == 3 and isinstance(norms[0].meta["val"].shape[1], torch.SymInt)


def test_automatic_dynamic_lengths() -> None:
    model, backend, calls = Stack().double(), Backend(), []
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (5, 7, 12, 20):
        x = x64(2, n, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-13)
        calls.append(len(backend.seen))
    assert calls[1] == calls[-1]


def test_dynamic_with_carried_nodes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.custom = Block(p=0.2), Custom()

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.block, x, use_reentrant=False)
            return self.custom(x).reshape(x.shape[0] * x.shape[1], -1)

    backend = same(Model().double(), x64(2, 5, 8, grad=True), dynamic=True)
    assert backend.count(aten.layer_norm.default) == 1


def test_unbacked_sizes() -> None:
    def f(x: Tensor) -> Tensor:
        return F.layer_norm(x[x.sum(-1) > 0], (8,)) + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        backend = same(f, x64(6, 8))
        assert backend.count(aten.layer_norm.default) == 1
        same(lambda x, n: torch.zeros(n.item(), 8, dtype=x.dtype) + x, x64(8), torch.tensor(3))


# ---------------------------------------------------------------- encoder layers


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_transformer_encoder(norm_first: bool, mode: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        backend = same(model, x64(2, 5, 8))
    assert backend.count(aten.layer_norm.default) == 4
    assert backend.count(aten._transformer_encoder_layer_fwd.default) == 0


def _mask(kind: int | None, dtype: torch.dtype = torch.bool) -> Tensor | None:
    shape = {None: None, 0: (5, 5), 1: (2, 5), 2: (2, 2, 5, 5)}[kind]
    if shape is None:
        return None
    mask = torch.rand(shape) > 0.5
    mask[..., 0] = False
    if kind == 2:
        mask[0, 1, 3] = True  # a row with every key masked
    return mask.to(dtype)


@pytest.mark.parametrize("kind", [None, 0, 1, 2])
@pytest.mark.parametrize(("norm_first", "gelu"), [(True, True), (False, False)])
def test_encoder_layer_means_the_op(kind: int | None, norm_first: bool, gelu: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    attention = [random(24, 8), random(24), random(8, 8), random(8)]
    rest = [*(random(8) for _ in range(4)), random(16, 8), random(16), random(8, 16), random(8)]
    args = (random(2, 5, 8), 8, 2, *attention, gelu, norm_first, 1e-5, *rest)
    for dtype in (torch.bool, torch.float64):
        mask = _mask(kind, dtype)
        want = torch._transformer_encoder_layer_fwd(*args, mask, kind)
        torch.testing.assert_close(encoder_layer(*args, mask, kind), want, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_masks(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    with torch.no_grad():
        backend = same(model, x64(2, 5, 8), src_key_padding_mask=padding)
        same(model, x64(2, 5, 8), backend=backend, mask=causal, is_causal=True)
    assert len(backend.seen) >= 2
    for captured in backend.seen:
        graph = captured.graph_module.graph
        assert not graph.find_nodes(op="call_function", target=aten._transformer_encoder_layer_fwd.default)
        norms = graph.find_nodes(op="call_function", target=aten.layer_norm.default)
        assert len(norms) == 2 and all(module_path(n) == "layers.0" for n in norms)


# ---------------------------------------------------------------- downstream


def _static_inputs(model: nn.Module, x: Tensor, with_capture: bool) -> list[int]:
    from torch._guards import TracingContext

    seen: list[list[int]] = []

    def lower(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        def compiler(inner: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            context = TracingContext.try_get()
            assert context is not None and context.fw_metadata is not None
            seen.append(list(context.fw_metadata.static_input_indices))
            return inner.forward

        canonical = capture(gm, example_inputs).graph_module if with_capture else gm
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(canonical, example_inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=lower, fullgraph=True)(x)
    return seen[0]


def test_static_inputs_are_those_of_the_untouched_graph() -> None:
    model, x = nn.Sequential(Stack(), nn.BatchNorm1d(8)), torch.randn(3, 8)
    static = _static_inputs(model, x, with_capture=True)
    assert static and static == _static_inputs(model, x, with_capture=False)


def test_inductor() -> None:
    from torch._inductor.compile_fx import compile_fx

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double()
    same(model, x64(3, 8, grad=True), backend=Backend(compile_fx))


def test_inductor_cache_hits() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    with torch.no_grad():
        torch.compile(model, backend=Backend(compile_fx), fullgraph=True)(x)
        torch._dynamo.reset()
        counters.clear()
        torch.compile(model, backend=Backend(compile_fx), fullgraph=True)(x)
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    assert hits and not counters["inductor"]["fxgraph_cache_miss"]


# ---------------------------------------------------------------- export


def test_exported_program() -> None:
    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale + torch.tensor([1.0] * 8)

    model = Model().eval()
    x = torch.randn(3, 8)
    ep = torch.export.export(model, (x,))
    captured = capture_exported(ep)
    assert captured.graph_module.graph is not ep.graph
    sources = {s.name: s.kind for s in captured.sources.values()}
    assert sources["h.0.norm.weight"] == "parameter" and sources["scale"] == "buffer" and sources["x"] == "input"
    assert "constant" in sources.values()
    norms = captured.graph_module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert [module_path(n) for n in norms] == ["h.0.norm", "h.1.norm", "norm_f"]
    before = str(ep.graph)
    captured.graph_module.graph.erase_node(captured.graph_module.graph.output_node())
    assert str(ep.graph) == before
    verify(ep.graph_module, "export")
