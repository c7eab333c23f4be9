"""Generated kernels on a CUDA device: `pytest -m gpu`, or the scripts of docs/gpu-runbook.md, which end in time.

When all of this passes, and some of it under compute-sanitizer, the device's architecture belongs into
normfx/lower/choice.py, TESTED.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from equivalence import LOW_PRECISION, assert_low_precision, exact
from folding import Net
from kernel_processes import Processes
from models import named
from test_kernels import DTYPES, WIDTHS, forms, judge, spec

from normfx.backend import listening, normfx
from normfx.kernels import run
from normfx.kernels.launch import PROGRAM, power_of_two
from normfx.kernels.spec import Spec
from normfx.report import GraphReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Each needs a core, and up to 6 GB of the device. Next to other workers a few more than its part of the cores:
    not all tests end at the same time."""
    cores, workers = len(os.sched_getaffinity(0)), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    room = torch.cuda.mem_get_info()[0] // (workers * 6 * 10**9)
    with Processes(max(1, min(16, room, cores if workers == 1 else -(-3 * cores // (2 * workers)))), "cuda") as found:
        yield found


def check(processes: Processes, cases: list[dict[str, Any]]) -> None:
    judge(cases, processes.answers(cases))


def many(width: int) -> int:
    """Rows enough that each program of an H100 has some more than once, and the last one is not full."""
    return 301 if width > 8192 else 600 * max(1, PROGRAM // power_of_two(width)) + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_float64(width: int, dtype: str, processes: Processes) -> None:
    """Every form, no row to many, each twice with the same bits. For one row Triton makes kernels of their own, which
    differ from the others in the number alone: of one dtype, and of one width all."""
    alone = [1] if dtype == "bfloat16" or width == 768 else []
    rows = [0, *alone, 3, 257, many(width)]
    check(processes, [{"spec": form, "shape": [n], "twice": True} for n in rows for form in forms(width, dtype)])


@pytest.mark.parametrize("width", [127, 1024, 20000])
def test_shapes_and_hard_values(width: int, processes: Processes) -> None:
    cases: list[dict[str, Any]] = []
    for kind in ("", "strided", "rows apart", "transposed"):
        cases += [{"spec": form, "shape": [2, 3], "kind": kind} for form in forms(width, "float32")[:5]]
    affine = {"weight": "float32", "bias": "float32"}
    cases += [{"spec": spec(width, centre=True, **affine), "shape": [3], "shift": 1000.0}]
    cases += [{"spec": spec(width, centre=True, **affine), "shape": [3], "kind": "zeros"}]
    cases += [{"spec": spec(width, centre=centre), "shape": [4], "kind": "not finite"} for centre in (True, False)]
    check(processes, cases)


def test_more_entries_than_32_bits_count() -> None:
    """The last row is what it is alone."""
    plain = Spec(4096, True, "bfloat16", "bfloat16")
    x = torch.randn(2**19 + 1, 4096, device="cuda", dtype=torch.bfloat16)
    many, alone = run.forward(plain, x, 1e-5), run.forward(plain, x[-1:], 1e-5)
    assert many.mean is not None and many.rstd is not None and alone.mean is not None and alone.rstd is not None
    assert torch.equal(many.out[-1:], alone.out)
    back = run.backward(plain, x, x, many.rstd, many.mean).x[-1:]
    assert torch.equal(back, run.backward(plain, x[-1:], x[-1:], alone.rstd, alone.mean).x)


NAMES = ["gpt2", "vit", "llama", "gpt_neox parallel", "encoder", "bloom"]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", NAMES)
def test_models(name: str, dtype: torch.dtype) -> None:
    case = named(name)
    batches = [tuple(x.cuda() if isinstance(x, Tensor) else x for x in inputs) for inputs in case.batches()]
    graphs: list[GraphReport] = []
    with listening(graphs.append):
        assert_low_precision(case.make().cuda(), batches, _backend(), dtype)
    assert all(site.lowering.startswith("triton: ") for site in graphs[-1].sites)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    """Of all parameters as one vector, in float32."""
    case = named(name)
    model = case.make().cuda()
    inputs = tuple(x.cuda() if isinstance(x, Tensor) else x for x in case.inputs())
    wide = copy.deepcopy(model).double()
    wanted = _gradients(exact(wide), wide, tuple(x.double() if x.is_floating_point() else x for x in inputs))
    eager = (_gradients(model, model, inputs) - wanted).norm()
    own = (_gradients(torch.compile(model, backend=_backend(), fullgraph=True), model, inputs) - wanted).norm()
    assert own <= LOW_PRECISION[torch.float32] * eager


def _backend() -> Any:
    return functools.partial(normfx, options={"lowering": "triton", "strict": True})


def _gradients(call: Any, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """In float64."""
    model.zero_grad(set_to_none=True)
    outputs = [o for o in torch.utils._pytree.tree_leaves(call(*inputs)) if o.is_floating_point()]
    torch.manual_seed(2)
    torch.stack([(o * torch.randn_like(o, dtype=torch.float32)).double().sum() for o in outputs]).sum().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


# ---------------------------------------------------------------- kept folds


def _kept(device: str = "cuda") -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = Net(256).to(device).eval().requires_grad_(False)
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True})
    return model, call, torch.randn(64, 6, device=device)


def _close(call: Any, model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_refreshed_on_another_stream() -> None:
    """Values are complete for every stream once they are believed."""
    model, call, x = _kept()
    streams = [torch.cuda.Stream() for _ in range(3)]
    _close(call, model, x)
    for i in range(30):
        model.up.weight.mul_(-1.1)
        torch.cuda.synchronize()
        for stream in (streams[i % 3], streams[(i + 1) % 3]):
            with torch.cuda.stream(stream):
                _close(call, model, x)


@torch.no_grad()
def test_recorded_graph() -> None:
    """A graph recorded by the user computes its folds in each replay."""
    model, call, x = _kept()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = call(x)
    for _ in range(3):
        model.norm1.weight.add_(0.5)
        graph.replay()
        torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-3)
    _close(call, model, x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@torch.no_grad()
def test_another_device_than_the_current() -> None:
    model, call, x = _kept("cuda:1")
    assert torch.cuda.current_device() == 0
    _close(call, model, x)
    norm = nn.LayerNorm(512, device="cuda:1")
    y = torch.randn(8, 512, device="cuda:1")
    found = run.forward(
        Spec(512, True, "float32", "float32", weight="float32", bias="float32"), y, 1e-5, None, norm.weight, norm.bias
    )
    torch.testing.assert_close(found.out, norm(y), rtol=1e-4, atol=1e-4)
