"""Convolutions that multiply by packed kernels: right on the call that follows a write, in any layout, and only where
sound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import EagerBackend
from packing import pack_all
from torch import Tensor, nn
from torch.nn.functional import conv2d

import normfx
from normfx.backend import forced
from normfx.lower import gemm, packed_convolution
from normfx.weights import handles

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _packs(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_all(monkeypatch)


class Net(nn.Module):
    """A convolution whose BatchNorm is folded, and what `product` makes of its output with another kernel."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Any] | None = None, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm, self.product = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), product
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8 // groups, 3, 3)), nn.Parameter(torch.randn(8))
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5
        self.eval()

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.norm(self.enter(x)))
        return self.product(y, self.weight, self.bias) if self.product else conv2d(y, self.weight, self.bias)


def images(count: int = 2, height: int = 7, width: int = 9) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def packed_products(model: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """How many convolutions of a graph without gradients are packed; its outputs agree with the model's own, also in
    their strides."""
    backend = EagerBackend({"fold": "cached", **options})
    with torch.no_grad():
        expected, actual = model(*inputs), torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_stride=True)
    (module,) = backend.modules
    return sum(node.target is packed_convolution.PACKED for node in module.graph.nodes)


def inductor(model: nn.Module, **options: Any) -> Callable[..., Any]:
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True, **options})

    def run(*inputs: Any) -> Any:
        with torch.no_grad():
            return call(*inputs)

    return run


def check(call: Callable[..., Any], model: nn.Module, x: Tensor) -> Any:
    """Like the model, in values and strides."""
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-4, check_stride=True)
    return expected


# ---------------------------------------------------------------- which products

PRODUCTS: dict[str, tuple[Callable[..., Any], int]] = {
    "plain": (lambda y, w, b: conv2d(y, w, b), 2),
    "no bias": (lambda y, w, b: conv2d(y, w), 2),
    "bias with a stride": (lambda y, w, b: conv2d(y, w, torch.stack([b, -b], 1)[:, 0]), 2),
    "bias of one number": (lambda y, w, b: conv2d(y, w, b[:1].expand(8)), 2),
    "bias of an activation": (lambda y, w, b: conv2d(y, w, torch.tanh(y[:, :, :2]).mean((0, 3))[:, 1]), 2),
    "one after the other": (lambda y, w, b: conv2d(conv2d(y, w, padding=1), w, b), 3),
    "a kernel made by a convolution": (lambda y, w, b: conv2d(y, torch.tanh(conv2d(w, w, padding=1)), b), 1),
    "stride, padding and dilation": (lambda y, w, b: conv2d(y, w, b, (2, 1), (1, 2), (1, 2)), 2),
    "one number for both": (lambda y, w, b: conv2d(y, w, b, 2, 1, 2), 2),
    "padding by name": (lambda y, w, b: conv2d(y, w, b, padding="same"), 1),
    "aten.convolution": (
        lambda y, w, b: torch.ops.aten.convolution(y, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        2,
    ),
    "transposed": (lambda y, w, b: nn.functional.conv_transpose2d(y, w, b), 1),
    "twice": (lambda y, w, b: conv2d(torch.tanh(conv2d(y, w, b)), w), 3),
    "an activation as kernel": (lambda y, w, b: conv2d(y, torch.tanh(y[:, :, :3, :3]).sum(0) * w), 1),
    "kernel written": (lambda y, w, b: conv2d(y, w.mul_(1.0), b), 1),
    "view of the kernel returned": (lambda y, w, b: (conv2d(y, w, b), w.flatten()), 1),
    "one image": (lambda y, w, b: conv2d(y[0], w, b), 1),
    "no images": (lambda y, w, b: conv2d(y[:0], w, b), 1),
    "viewed": (lambda y, w, b: conv2d(y, w, b).view(2, -1) * 2, 2),
    "tokens": (lambda y, w, b: conv2d(y, w, b).flatten(2).transpose(1, 2), 2),
    "in place": (lambda y, w, b: conv2d(y, w, b).add_(1.0), 2),
    "a slice": (lambda y, w, b: conv2d(y[:, :, 1:, ::2], w, b), 2),
    "a transposed image": (lambda y, w, b: conv2d(y.transpose(2, 3), w, b), 2),
    "broadcast": (lambda y, w, b: conv2d(y[:, :, :1, :].expand(2, 8, 5, 9), w, b), 2),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    product, packs = PRODUCTS[name]
    assert packed_products(Net(product), images()) == packs


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_inductor(name: str) -> None:
    model = Net(PRODUCTS[name][0])
    check(inductor(model), model, images())


@pytest.mark.parametrize("groups", [2, 8])
def test_groups(groups: int) -> None:
    model = Net(lambda y, w, b: conv2d(y, w, b, groups=groups), groups)
    assert packed_products(model, images()) == 2
    check(inductor(model), model, images())


@pytest.mark.parametrize("image", ["last", "contiguous"])
@pytest.mark.parametrize("kernels", ["last", "contiguous"])
def test_layouts(image: str, kernels: str) -> None:
    """What the caller gets has the strides that it had, and so do views in the graph."""
    model = Net(lambda y, w, b: (conv2d(y, w, b), conv2d(y, w, b).permute(0, 2, 3, 1) + 1))
    model = model.to(memory_format=LAST if kernels == "last" else torch.contiguous_format)
    x = images().contiguous(memory_format=LAST if image == "last" else torch.contiguous_format)
    assert packed_products(model, x) == 3
    check(inductor(model), model, x)


def test_views_of_a_result_channels_last() -> None:
    """Where eager's result lies channels last, such a view is one."""
    model = Net(lambda y, w, b: conv2d(y, w, b).permute(0, 2, 3, 1).view(-1, 8)).to(memory_format=LAST)
    x = images().contiguous(memory_format=LAST)
    assert packed_products(model, x) == 2
    check(inductor(model), model, x)


def test_residual_blocks() -> None:
    model = Net(lambda y, w, b: torch.relu(y + conv2d(torch.relu(conv2d(y, w, b, padding=1) + y), w, padding=1)))
    assert packed_products(model, images()) == 3
    check(inductor(model), model, images())


def test_small_kernels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_convolution, "LEAST", 8 * 8 * 9)
    assert packed_products(Net(), images()) == 1


def test_where_nothing_is_packed() -> None:
    model = Net()
    assert packed_products(model.double(), images().double()) == 0
    assert packed_products(Net(), images(), fold="live") == 0
    backend = EagerBackend({"fold": "cached"})
    torch.compile(Net(), backend=backend)(images())  # gradients are recorded
    with torch.no_grad(), torch.autocast("cpu"):
        torch.compile(Net(), backend=backend)(images())
    nodes = [node.target for module in backend.modules for node in module.graph.nodes]
    assert nodes and packed_convolution.PACKED not in nodes


@pytest.mark.skipif(not gemm.onednn_works(torch.bfloat16), reason="oneDNN has no bfloat16 here")
def test_bfloat16() -> None:
    """No rule changes this model then: weights in half precision are not folded."""
    model, x = Net(), images()
    exact = copy.deepcopy(model).double()(x.double())
    model, x = model.bfloat16(), x.bfloat16()
    with torch.no_grad():
        own = (model(x).double() - exact).abs().max()
        call = inductor(model)
        with forced():
            error = (call(x).double() - exact).abs().max()
    assert 0 < error <= 1.25 * own and len(handles._VALUES) == 2


# ---------------------------------------------------------------- sizes


def test_sizes_that_are_not_fixed() -> None:
    model = Net()
    call = inductor(model)
    for count, height, width in [(2, 7, 9), (3, 7, 9), (1, 12, 5), (5, 20, 30), (2, 7, 9)]:
        check(call, model, images(count, height, width))


def test_padding_that_depends_on_the_size() -> None:
    model = Net(lambda y, w, b: conv2d(y, w, b, padding=y.shape[2] // 2))
    call = torch.compile(model, backend="normfx", dynamic=True, options={"fold": "cached", "strict": True})
    with torch.no_grad():
        for height in (7, 12):
            x = images(2, height)
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)


def test_kernels_of_a_size_that_is_not_fixed_add_no_guard() -> None:
    """Each sample has a kernel of its own, made of an activation: its size is compared with nothing."""

    def modulated(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        kernels = (torch.tanh(y.mean((2, 3)))[:, None, :, None, None] * w).flatten(0, 1)
        return conv2d(y.reshape(1, -1, 7, 9), kernels, groups=y.shape[0])

    model, counted, graphs = Net(modulated), EagerBackend({"fold": "cached"}), list[Any]()

    def plain(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    for backend in (plain, counted):
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend, dynamic=True)
        with torch.no_grad():
            for count in (3, 5, 40, 400):
                torch.testing.assert_close(call(images(count)), model(images(count)), rtol=1e-4, atol=1e-4)
    assert len(counted.graphs) == len(graphs)


def test_kernels_that_packing_would_make_large_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN pads channels: a kernel of one feature takes many times its size, which its bytes count."""
    kernel = torch.zeros(1, 256, 3, 3)
    packed = packed_convolution._pack(kernel, [1, 1], [0, 0], [1, 1], 1, None)
    assert handles._SIZES[packed] > 2 * kernel.nbytes and packed.nbytes == kernel.nbytes
    for padded, packs in [(0, 0), (1000, 2)]:
        monkeypatch.setattr(packed_convolution, "PADDED", padded)
        assert packed_products(Net(), images()) == packs


def test_one_kernel_is_packed_for_the_first_size_alone() -> None:
    model = Net()
    backend = EagerBackend({"fold": "cached"})
    call = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for size in (7, 12, 20):
            torch.testing.assert_close(call(images(2, size)), model(images(2, size)), rtol=1e-4, atol=1e-4)
    assert len(backend.modules) == 3
    assert len(handles._VALUES) == 2 * 2, "each for the first size, and for any"


# ---------------------------------------------------------------- true to the weights


@torch.no_grad()
def _through_data(model: Net) -> None:
    model.weight.data[1, 2] += 1.0


@torch.no_grad()
def _statistics(model: Net) -> None:
    model.norm.running_var.mul_(3.0)


@torch.no_grad()
def _replaced(model: Net) -> None:
    model.enter.weight = nn.Parameter(torch.randn_like(model.enter.weight))


@pytest.mark.parametrize("write", [_through_data, _statistics, _replaced])
@pytest.mark.parametrize("fold", ["cached", "frozen"])
def test_the_call_that_follows_a_write(write: Callable[[Net], None], fold: str) -> None:
    model = Net()
    call = inductor(model, fold=fold)
    before = check(call, model, images())
    write(model)
    assert not torch.allclose(check(call, model, images()), before, atol=1e-2)


def test_only_what_changed_is_packed_again() -> None:
    model = Net()
    call = inductor(model)
    check(call, model, images())

    def refreshes() -> int:
        weights = normfx.compiled_report().graphs[-1].weights
        assert weights is not None
        return weights.refreshes

    first = refreshes()
    _through_data(model)
    check(call, model, images())
    assert refreshes() == first + 1


def test_kernels_go_with_the_model() -> None:
    model = Net()
    call = inductor(model)
    check(call, model, images())
    assert len(handles._VALUES) == 2
    del model, call
    torch._dynamo.reset()
    assert not handles._VALUES


def test_what_does_not_fit_is_not_packed() -> None:
    model = Net()
    for room, packs in [(0, 0), (8 * 8 * 9 * 4 + 40, 1), (2**20, 2)]:
        assert packed_products(model, images(), fold_memory=room) == packs


def test_in_a_cpp_wrapper() -> None:
    model = Net()
    call = inductor(model, inductor={"cpp_wrapper": True})
    check(call, model, images())
    _through_data(model)
    check(call, model, images())
