"""Kept folds on a device, on a CUDA device or under Triton's interpreter, in a process of their own: triton reads
TRITON_INTERPRET when imported.

Prints one JSON object: for each step, which parameters were found changed and the largest error of any fold.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import Tensor

from normfx.kernels.refold import DeviceFolds, Job

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = ((12, 40), (1, 64), (33, 70), (130, 5), (64, 128), (7, 8))


def exact(job: Job) -> Tensor:
    weight = job.weight.double()
    weight = weight - weight.mean(0) if job.centred else weight
    return weight if job.gamma is None else weight * job.gamma.double()


def main(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    jobs, shared = [], torch.randn(40, device=DEVICE, dtype=dtype)
    for i, shape in enumerate(SHAPES):
        weight = torch.randn(shape, device=DEVICE, dtype=dtype) + 1
        gamma = shared if shape[1] == 40 else torch.randn(shape[1], device=DEVICE, dtype=dtype) if i % 2 else None
        jobs.append(Job(weight, torch.full_like(weight, float("nan")), gamma, centred=i != 3))
    parameters = list({id(t): t for job in jobs for t in (job.weight, job.gamma) if t is not None}.values())
    index = {id(t): i for i, t in enumerate(parameters)}
    folds = DeviceFolds(jobs)
    steps = {}

    def step(name: str, written: list[Tensor], force: bool = False) -> None:
        folds.refresh(force)
        errors = [((job.out.double() - exact(job)).abs().max() / exact(job).abs().max()).item() for job in jobs]
        steps[name] = {
            "changed": folds.changed.nonzero().flatten().tolist(),
            "written": sorted(index[id(t)] for t in written),
            "error": max(errors),
        }

    step("first", parameters)
    jobs[0].out.fill_(7)
    folds.refresh()
    steps["untouched"] = {"kept": bool((jobs[0].out == 7).all())}
    step("forced", parameters, force=True)
    jobs[2].weight.data.mul_(1.5)
    jobs[5].gamma.data.add_(1)
    step("two written", [jobs[2].weight, jobs[5].gamma])
    shared.data.neg_()
    step("a γ that folds share", [shared])
    step("nothing", [])
    print(json.dumps(steps))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
