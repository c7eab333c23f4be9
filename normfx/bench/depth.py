"""`normfx bench depth`: what normfx's own stages take of the time to compile very deep post-norm networks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from normfx.backend import listening, normfx
from normfx.bench import command, machine
from normfx.bench.measure import VARIANTS
from normfx.bench.output import machine_line, markdown_table, replace, show
from normfx.errors import OptionError
from normfx.report import GraphReport, Report

SUMMARY = "seconds of normfx's stages and of Inductor, compiling a DeepNet of so many layers"
HEADER = ("layers", "norms", "nodes", "normfx s", "of it capture s", "Inductor s", "normfx of Inductor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", default="50,100,200", help="numbers of layers, each with two norms")
    parser.add_argument("--width", type=int, default=32, help="features; a multiple of 4")
    parser.add_argument("--output", type=Path, default=Path("normfx-depth"), metavar="DIR")


class Layer(nn.Module):
    """LN(αx + f(x)) around attention and around a feed-forward ("DeepNet", Wang et al. 2022, equation 4)."""

    def __init__(self, d: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attention = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = self.norm1(self.alpha * x + self.out(attention))
        out: Tensor = self.norm2(self.alpha * x + self.down(nn.functional.gelu(self.up(x))))
        return out


@dataclass(frozen=True)
class Compiled:
    """One compilation, without caches. seconds: of each stage; inductor: seconds of what follows them."""

    layers: int
    norms: int
    nodes: int
    seconds: dict[str, float]
    inductor: float

    @property
    def own(self) -> float:
        return sum(self.seconds.values())

    @property
    def row(self) -> tuple[str, ...]:
        times = (self.own, self.seconds.get("capture", 0.0), self.inductor)
        counts = (self.layers, self.norms, self.nodes)
        return (*map(str, counts), *(f"{t:.1f}" for t in times), f"{self.own / self.inductor:.3f}")


def main(parsed: argparse.Namespace) -> int:
    """Compile one model after the other, writing the results so far after each. Raises OptionError for bad numbers."""
    counts = _numbers(parsed.layers)
    if parsed.width < 4 or parsed.width % 4:
        raise OptionError(f"normfx: --width {parsed.width}: must be a multiple of 4, the number of heads")
    command.make_folder(parsed.output)
    console, found = command.console(), list[Compiled]()
    for layers in counts:
        found.append(measure(layers, parsed.width))
        console.print(f"{layers} layers: normfx {found[-1].own:.1f} s, Inductor {found[-1].inductor:.1f} s")
        lines = [f"# {SUMMARY}", "", machine_line(machine.describe("cpu")), "", *markdown_table(HEADER, _rows(found))]
        replace(parsed.output / "depth.md", ("\n".join(lines) + "\n").encode())
    show(console, SUMMARY, HEADER, _rows(found))
    return 0


def _numbers(text: str) -> list[int]:
    words = command.words(text, "--layers")
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise OptionError(f"normfx: --layers {text}: must be numbers above 0, with commas between them")
    return [int(word) for word in words]


def _rows(found: Sequence[Compiled]) -> list[tuple[str, ...]]:
    return [compiled.row for compiled in found]


def measure(layers: int, width: int) -> Compiled:
    """Compile a model for inference and check it against eager."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(width, (2 * layers) ** 0.25) for _ in range(layers))).eval()
    reports: list[GraphReport] = []
    taken: list[tuple[int, float]] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        begin = time.perf_counter()
        run = normfx(gm, example_inputs, options={"strict": True})
        taken.append((len(gm.graph.nodes), time.perf_counter() - begin))
        return run

    x = torch.randn(1, 8, width)
    torch.compiler.reset()
    with listening(reports.append), torch.no_grad(), VARIANTS["normfx"].compiling(cold=True):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    ((nodes, total),) = taken
    seconds = dict(reports[0].seconds)
    norms = Report(tuple(reports)).counts["layer_norm"]
    return Compiled(layers, norms, nodes, seconds, total - sum(seconds.values()))
