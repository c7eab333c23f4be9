"""Models over several processes, compiled and not: `torchrun --nproc-per-node 2 parallel_cases.py CASE …`.

Prints a line of JSON for each case, from the first process: the largest differences over all processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import parallel_models as models
import torch
import torch.distributed as dist
from equivalence import EagerBackend
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import normfx

ROWS = 16
"""Batches of a size for which centring pays in training: 256 rows of 16 features."""


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def step(model: nn.Module, call: Callable[..., Tensor], ids: Tensor) -> list[Any]:
    """The loss and all gradients, with the layouts of those that are DTensors."""
    model.zero_grad()
    out = call(ids)
    loss = out.pow(3).mean() if ids.is_floating_point() else F.cross_entropy(out.flatten(0, 1), ids.flatten())
    loss.backward()
    found: list[Any] = [loss.detach()]
    for parameter in model.parameters():
        grad = parameter.grad
        found += [None if grad is None else whole(grad).clone(), str(getattr(grad, "placements", None))]
    return found


def difference(got: list[Any], want: list[Any]) -> float:
    """The largest difference, relative to the largest entry; infinite where a gradient lacks or a layout differs."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor) and isinstance(a, Tensor):
            worst = max(worst, float((a - b).abs().max() / (1 + b.abs().max())))
        elif a != b:
            return float("inf")
    return worst


def same_everywhere(values: list[Any]) -> float:
    """The largest difference between the processes."""
    worst = 0.0
    for value in values:
        if isinstance(value, Tensor):
            low, high = value.clone(), value.clone()
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
            worst = max(worst, float((high - low).abs().max()))
    return worst


def reported(report: Any) -> dict[str, Any]:
    codes = sorted({f"{r.rule}:{r.code}" for site in report.sites for r in site.refusals})
    rules = {rule: sum(rule in site.rules for site in report.sites) for site in report.sites for rule in site.rules}
    return {"norms": len(report.sites), "rules": rules, "codes": codes, "graphs": report.counts["graphs"]}


def compare(model: nn.Module, ids: Tensor, compiled: bool, alike: bool = True) -> dict[str, Any]:
    """The differences of compiled training steps from eager ones. compiled: by Inductor too, else run as it is."""
    want = step(model, model, ids)
    torch._dynamo.reset()
    backend: Any = "normfx" if compiled else EagerBackend()
    options = {"options": {"strict": True, "fold": "live"}} if compiled else {}
    call = torch.compile(model, backend=backend, **options)
    got = step(model, call, ids)
    report = normfx.compiled_report() if compiled else backend.report
    found = {"difference": difference(got, want), **reported(report)}
    if alike:
        found["between processes"] = same_everywhere(got[1:])
    return found


def batch(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, models.VOCABULARY, (ROWS, models.TOKENS), generator=generator)


def by_layers(spread: Callable[[models.Model, Any], None], compiled: bool) -> dict[str, Any]:
    model = models.Model().double()
    spread(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return compare(model, batch(), compiled)


def whole_stream(compiled: bool) -> dict[str, Any]:
    """The mesh has as many dimensions as there are pairs of processes."""
    pairs = dist.get_world_size() // 2
    model = models.WholeStream(init_device_mesh("cpu", (pairs, 2) if pairs > 1 else (2,)))
    x = torch.randn(ROWS, models.TOKENS, models.WIDTH, generator=torch.Generator().manual_seed(0)).double()
    return compare(model, x, compiled)


def by_hand(compiled: bool) -> dict[str, Any]:
    """Every process has weights of its own for the branch, and the same for the rest; so have its gradients."""
    model = models.Collectives(dist.group.WORLD).double()
    with torch.no_grad():
        model.down.weight.mul_(1 + dist.get_rank())
    return compare(model, batch(), compiled, alike=False)


def fully_sharded(each_block: bool) -> Callable[[bool], dict[str, Any]]:
    """FSDP2, each process with rows of its own."""

    def run(compiled: bool) -> dict[str, Any]:
        model, mesh = models.Model().double(), init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks if each_block else ():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return compare(model, batch(dist.get_rank()), compiled)

    return run


def sharded_and_parallel(compiled: bool) -> dict[str, Any]:
    """FSDP2 over one dimension of a mesh, tensor parallelism over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = models.Model().double()
    models.tensor_parallel(model, mesh["tensor"])
    fully_shard(model, mesh=mesh["data"])
    return compare(model, batch(mesh.get_local_rank("data")), compiled)


def in_buckets(compiled: bool) -> dict[str, Any]:
    """DDP with buckets of 2 MB, about one for each block, at which it cuts the graph."""
    model = DistributedDataParallel(models.Model(3, width=160).double(), bucket_cap_mb=2)
    return compare(model, batch(dist.get_rank()), compiled)


def in_stages(compiled: bool) -> dict[str, Any]:
    """A pipeline: each process has some of the blocks, and compiles its stage."""
    rank, count = dist.get_rank(), dist.get_world_size()

    def losses(compile_stage: bool) -> tuple[list[Any], Any]:
        stage_module = models.Stage(models.Model(2 * count).double(), rank, count)
        backend: Any = "normfx" if compiled else EagerBackend()
        call = torch.compile(stage_module, backend=backend) if compile_stage else stage_module
        stage = PipelineStage(call, rank, count, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, want: F.cross_entropy(out.flatten(0, 1), want.flatten()))
        found: list[Tensor] = []
        if rank == 0:
            schedule.step(batch())
        elif rank == count - 1:
            schedule.step(target=batch(), losses=found)
        else:
            schedule.step()
        return [*(loss.detach() for loss in found), *(p.grad for p in stage_module.parameters())], backend

    want, _ = losses(False)
    torch._dynamo.reset()
    got, backend = losses(True)
    report = normfx.compiled_report() if compiled else backend.report
    norms = torch.tensor([len(report.sites), report.counts["to_rms_norm"]])
    dist.all_reduce(norms)
    found = {"difference": difference(got, want), **reported(report)}
    return {**found, "norms of all stages": norms[0].item(), "converted": norms[1].item()}


def from_the_hub(compiled: bool) -> dict[str, Any]:
    """A model of transformers with LayerNorms, random weights and its own plan of tensor parallelism."""
    from transformers import AutoModelForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    drops = dict.fromkeys(("residual_dropout", "embedding_dropout", "attention_dropout"), 0.0)
    tokens = {"vocab_size": models.VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            config = Starcoder2Config(num_hidden_layers=2, **sizes, **drops, **tokens)
            Starcoder2ForCausalLM(config).save_pretrained(own)
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.float64)
        dist.barrier()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids, use_cache=False).logits
            return logits

    return compare(Logits(), batch(), compiled)


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "tensor": lambda compiled: by_layers(models.tensor_parallel, compiled),
    "sequence": lambda compiled: by_layers(models.sequence_parallel, compiled),
    "whole": whole_stream,
    "by hand": by_hand,
    "fsdp": fully_sharded(each_block=False),
    "fsdp each block": fully_sharded(each_block=True),
    "fsdp and tensor": sharded_and_parallel,
    "ddp": in_buckets,
    "pipeline": in_stages,
    "transformers": from_the_hub,
    "columns": lambda compiled: by_layers(models.split_columns, compiled),
}


def main(names: list[str]) -> None:
    dist.init_process_group("gloo")
    for name in names:
        case, _, compiled = name.partition("+")
        found = CASES[case](bool(compiled))
        worst = torch.tensor([found["difference"], found.get("between processes", 0.0)], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        found["difference"], found["between processes"] = worst.tolist()
        if dist.get_rank() == 0:
            print(json.dumps({"case": name, **found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
