"""Times programs before and after normfx.rewrite in AOTInductor, ONNX Runtime and OpenVINO.

    python docs/benchmarks/exported-2026-11/exported.py --models vit,gpt2 --batch 1 --rounds 15

Prints, for each runtime, the speed of the rewritten programs relative to the original one: the median over rounds of
the ratio of times, with quartiles, the size of the package and the largest error against float64, relative to the
largest entry.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import normfx
from normfx.bench.timing import interleaved, speeds

Run = Callable[[], Any]


class Output(nn.Module):
    """One tensor of what a model of transformers returns."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self.model(x), self.key)
        return output


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224")


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=6, n_embd=384, n_head=6, vocab_size=8000, use_cache=False, bos_token_id=1, eos_token_id=1
    )
    return Output(GPT2LMHeadModel(config), "logits")


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=6, hidden_size=384, intermediate_size=1536, num_attention_heads=6, vocab_size=8000
    )
    return Output(BertModel(config), "last_hidden_state")


def resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet50")


MODELS = {"vit": vit, "gpt2": gpt2, "bert": bert, "resnet": resnet}


def prepared(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    if name in ("vit", "resnet"):
        return model, torch.randn(batch, 3, 224, 224)
    return model, torch.randint(1, 8000, (batch, 256))


def aotinductor(program: ExportedProgram, x: Tensor, folder: Path) -> tuple[Run, int]:
    path = Path(torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2")))
    package = torch._inductor.aoti_load_package(str(path))
    return (lambda: package(x)), path.stat().st_size


def onnxruntime(program: ExportedProgram, x: Tensor, folder: Path, opset: int | None = None) -> tuple[Run, int]:
    import onnxruntime as ort

    path = folder / "model.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset).save(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return (lambda: torch.from_numpy(session.run(None, feed)[0])), sum(p.stat().st_size for p in folder.iterdir())


def onnxruntime_23(program: ExportedProgram, x: Tensor, folder: Path) -> tuple[Run, int]:
    return onnxruntime(program, x, folder, 23)


def openvino(program: ExportedProgram, x: Tensor, folder: Path) -> tuple[Run, int]:
    import openvino as ov

    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"})
    model = ov.convert_model(program)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    compiled, given = core.compile_model(model, "CPU"), x.numpy()
    return (lambda: torch.from_numpy(compiled([given])[0])), sum(p.stat().st_size for p in folder.iterdir())


MEANS_KEPT = "default,-pre_rms_norm,-linear_norm"
"""Rules that leave each LayerNorm one, for runtimes that compute an add and a LayerNorm in one kernel."""

RUNTIMES = {f.__name__: f for f in (aotinductor, onnxruntime, onnxruntime_23, openvino)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit,gpt2,bert,resnet")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    print("| model | runtime | program | ms | speed | MB | error |\n|---|---|---|---|---|---|---|")
    for name in given.models.split(","):
        model, x = prepared(name, given.batch)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
            original = torch.export.export(model, (x,))
            programs = {
                "original": original,
                "live": normfx.rewrite(original),
                "frozen": normfx.rewrite(original, {"fold": "frozen"}),
                "frozen, means kept": normfx.rewrite(original, {"fold": "frozen", "rules": MEANS_KEPT}),
            }
        for runtime in given.runtimes.split(","):
            table(name, runtime, programs, x, exact, given.rounds)


def table(name: str, runtime: str, programs: dict[str, ExportedProgram], x: Tensor, exact: Tensor, rounds: int) -> None:
    runs, sizes, errors = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for what, program in programs.items():
            own = Path(folder, what)
            own.mkdir()
            try:
                runs[what], sizes[what] = RUNTIMES[runtime](program, x, own)
            except Exception as error:
                print(f"| {name} | {runtime} | {what} | {type(error).__name__}: {str(error)[:80]} | | | |")
                continue
            found = runs[what]()
            found = found[0] if isinstance(found, (tuple, list)) else found
            errors[what] = ((found.double() - exact).abs().max() / exact.abs().max()).item()
        times = interleaved(runs, rounds)
        for what in runs:
            low, middle, high = speeds(times.get("original", times[what]), times[what])
            print(
                f"| {name} | {runtime} | {what} | {1e3 * statistics.median(times[what]):.1f} | {middle:.2f} "
                f"({low:.2f} to {high:.2f}) | {sizes[what] / 1e6:.1f} | {errors[what]:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
