"""Export a model, rewrite it, and run it without normfx: as an AOTInductor package, and as ONNX (with `onnxscript`).

The rewritten program holds plain ATen ops, and folded weights as constants: nothing of normfx is needed to run it.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import normfx


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def layer_norms(program: ExportedProgram) -> int:
    """Counts the LayerNorms of a program; an RMSNorm is `aten.rms_norm`."""
    return sum(node.target is torch.ops.aten.layer_norm.default for node in program.graph.nodes)


def packaged(program: ExportedProgram, inputs: tuple[Tensor], folder: Path) -> Tensor:
    """Compiles the program into an AOTInductor package, loads it from its file and runs it."""
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(path)(*inputs)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 32), Block(32), Block(32), nn.LayerNorm(32), nn.Linear(32, 20)).eval()
    inputs = (torch.arange(12).reshape(2, 6),)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(*inputs)
        program = torch.export.export(model, inputs)
        rewritten = normfx.rewrite(program, {"fold": "frozen"})
        print(f"{layer_norms(program)} LayerNorms exported, {layer_norms(rewritten)} left after the rewrite")
        difference = packaged(rewritten, inputs, Path(folder)) - expected
        print(f"AOTInductor, largest difference from eager: {difference.abs().max():.1e}")
        if importlib.util.find_spec("onnxscript") is None:
            print("ONNX: skipped, onnxscript is not installed")
            return
        path = Path(folder) / "model.onnx"
        onnx_program = torch.onnx.export(rewritten, dynamo=True, verbose=False, opset_version=23)
        onnx_program.save(path)
        print(f"ONNX: {', '.join(sorted({node.op_type for node in onnx_program.model.graph}))}")
        if importlib.util.find_spec("onnxruntime") is not None:
            difference = onnx_program(*inputs)[0] - expected
            print(f"ONNX Runtime, largest difference from eager: {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
