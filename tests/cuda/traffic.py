"""Bytes and launches of each block of a model on a GPU: plain Inductor next to normfx, from generated code alone.

    python tests/cuda/traffic.py                      all cases, as the table of docs/benchmarks/cuda.md
    python tests/cuda/traffic.py "gpt2 8x1024 bfloat16 inference" …
    python tests/cuda/traffic.py --lowering triton "gpt2 8x1024 autocast training"      with the generated kernels

Two depths of each model are compiled, and their difference is divided by the difference in blocks. Bytes are Inductor's
own count; it does not see second loops over a row, workspaces or caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = ("gpt2", "vit_large", "gpt_neox", "mpt_7b", "llama_7b")
MODES = ("bfloat16 inference", "autocast inference", "autocast training")
SIZES = {"gpt2": "8x1024", "vit_large": "64", "gpt_neox": "8x2048", "mpt_7b": "4x2048", "llama_7b": "4x2048"}
CASES = tuple(f"{model} {SIZES[model]} {mode}" for model in MODELS for mode in MODES)


@dataclass(frozen=True)
class Traffic:
    """A block of a case: megabytes and launches of Triton kernels, forward and backward, by compiler."""

    case: str
    inductor_mb: float
    normfx_mb: float
    inductor_launches: float
    normfx_launches: float
    norms: dict[str, int]


# ---------------------------------------------------------------- the process that started it


def build_stubs(folder: Path) -> dict[str, str]:
    """Compile the stand-ins for CUDA's libraries; returns the environment in which a process loads them."""
    include = [f"-I{folder}" for folder in _headers()]
    for source, library in (("runtime.c", "libruntime.so"), ("driver.c", "libcuda.so.1")):
        command = ["cc", "-shared", "-fPIC", "-w", *include, "-o", str(folder / library), str(HERE / source)]
        subprocess.run(command, check=True)
    return {
        "LD_PRELOAD": str(folder / "libruntime.so"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "OMP_NUM_THREADS": "1",
    }


def _headers() -> list[Path]:
    """Folders of the CUDA runtime's headers, first those of the version that torch was built with: its structures
    change, and Triton's headers may be of another one. But these have the parts that come with the compiler."""
    import torch
    import triton

    version = (torch.version.cuda or "").partition(".")[0]
    nvidia = importlib.util.find_spec("nvidia")  # what pip installs for torch
    places = [Path(place) for place in (nvidia.submodule_search_locations or ())] if nvidia else []
    own = Path(triton.__file__).parent / "backends/nvidia/include"
    for folder in (*(header.parent for place in places for header in place.glob("*/include/driver_types.h")), own):
        text = (folder / "cuda_runtime_api.h").read_text()
        if re.search(rf"#define\s+CUDART_VERSION\s+{version}\d{{3}}\b", text):
            return [folder, own]
    raise RuntimeError(f"no headers of CUDA {version}, which torch was built with: pip install nvidia-cuda-runtime")


def measure(cases: Sequence[str], timeout: float = 3000, lowering: str = "auto") -> list[Traffic]:
    """The traffic of these cases under this option of normfx, found in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | build_stubs(Path(folder)) | {"TRAFFIC_UNDER_STUBS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--lowering", lowering, *cases]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != len(cases):
        raise RuntimeError(f"no traffic for {cases}: {done.stderr[-3000:]}")
    return [Traffic(**json.loads(line)) for line in lines]


HEADER = "| model, batch × tokens | mode | Inductor: MB, launches | normfx: MB, launches | norms |"
HEADER += "\n|---|---|---|---|---|"
"""The head of the tables of docs/benchmarks/cuda.md."""


def row(t: Traffic) -> str:
    model, size, mode = t.case.split(" ", 2)
    norms = ", ".join(f"{count} {what}" for what, count in t.norms.items())
    plain, ours = f"{t.inductor_mb:.2f}, {t.inductor_launches:g}", f"{t.normfx_mb:.2f}, {t.normfx_launches:g}"
    return f"| {model} {size.replace('x', ' × ')} | {mode} | {plain} | {ours} | {norms} |"


# ---------------------------------------------------------------- the process with a device that is not there


def model_of(name: str, layers: int) -> Any:
    """Classes of transformers with random weights, here without any: they are fakes."""
    import transformers

    transformers.PreTrainedModel.init_weights = lambda self: None  # some ask for values
    if name == "gpt2":
        return transformers.GPT2Model(
            transformers.GPT2Config(n_layer=layers, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        )
    if name == "vit_large":
        config = transformers.ViTConfig(
            hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096
        )
        return transformers.ViTModel(config, add_pooling_layer=False)
    if name == "gpt_neox":
        sizes = dict(hidden_size=2560, num_attention_heads=32, intermediate_size=10240, vocab_size=512)
        return transformers.GPTNeoXModel(transformers.GPTNeoXConfig(num_hidden_layers=layers, use_cache=False, **sizes))
    if name == "mpt_7b":
        return transformers.MptModel(
            transformers.MptConfig(d_model=4096, n_heads=32, n_layers=layers, vocab_size=512, use_cache=False)
        )
    sizes = dict(hidden_size=4096, num_attention_heads=32, intermediate_size=11008, vocab_size=512)
    return transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes))


def inputs_of(name: str, size: str) -> dict[str, Any]:
    import torch

    if name == "vit_large":
        return {"pixel_values": torch.zeros(int(size), 3, 224, 224)}
    batch, tokens = map(int, size.split("x"))
    return {"input_ids": torch.zeros(batch, tokens, dtype=torch.int64)}


def _traffic(case: str, lowering: str) -> Traffic:
    import torch
    from pretend import generated
    from torch._subclasses import FakeTensorMode

    from normfx import backend
    from normfx.report import GraphReport, Report

    name, size, kind = case.split(" ", 2)
    dtype, _, what = kind.partition(" ")
    trains = what == "training"
    depths = (1, 3) if trains else (2, 4)
    reports: list[GraphReport] = []

    def inductor(gm: Any, example_inputs: Any) -> Any:
        return torch._inductor.compile_fx.compile_fx(gm, example_inputs)

    def normfx(gm: Any, example_inputs: Any) -> Any:
        with backend.listening(reports.append):
            return backend.normfx(gm, example_inputs, options={"strict": True, "lowering": lowering})

    def totals(compiler: Any, layers: int) -> tuple[float, int]:
        with FakeTensorMode(), torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            model, inputs = model_of(name, layers), inputs_of(name, size)
            model.train(trains)
            with torch.set_grad_enabled(trains), torch.autocast("cuda", torch.bfloat16, enabled=dtype == "autocast"):
                graphs = generated(lambda **given: model(**given).last_hidden_state, inputs, compiler)
        return sum(g.bytes for g in graphs) / 1e6, sum(g.launches for g in graphs)

    found = {}
    for compiler in (inductor, normfx):
        (mb, launches), (more_mb, more_launches) = (totals(compiler, depth) for depth in depths)
        blocks = depths[1] - depths[0]
        found[compiler.__name__] = (more_mb - mb) / blocks, (more_launches - launches) / blocks
    counts = Report((reports[-1],)).counts
    norms = {what: counts.get(what, 0) for what in ("layer_norm", "rms_norm", "to_rms_norm", "fold_affine")}
    (plain_mb, plain), (our_mb, ours) = found["inductor"], found["normfx"]
    return Traffic(case, plain_mb, our_mb, plain, ours, norms)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--lowering", choices=("auto", "triton", "inductor"), default="auto")
    given = parser.parse_args()
    chosen = list(given.cases)
    if os.environ.get("TRAFFIC_UNDER_STUBS") != "1":
        failed = False
        print(HEADER)
        for case in chosen:
            try:
                print(*map(row, measure([case], lowering=given.lowering)), flush=True)
            except RuntimeError as error:
                failed = True
                print(f"{case} failed: {error}", file=sys.stderr)
        raise SystemExit(failed)
    sys.path.insert(0, str(HERE))
    import warnings

    import pretend

    warnings.simplefilter("ignore")
    pretend.begin()
    for case in chosen:
        print(json.dumps(asdict(_traffic(case, given.lowering))), flush=True)


if __name__ == "__main__":
    main()
