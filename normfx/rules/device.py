"""What the time of a device goes into, for the rules that weigh one form of a graph against another.

A CPU without gradients computes a LayerNorm in three row loops (mean, variance, output) and an RMSNorm in two, and each
takes its time although the row is in a cache. A GPU reads a row once for either, from memory, and what it reads from
a cache is free; but each kernel that is started costs as much as some megabytes of traffic. Source of the numbers of
the GPU: bytes and launches that Inductor's generated code has (docs/kernels.md), not a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from normfx.graph.nodes import value


@dataclass(frozen=True)
class DeviceCosts:
    """layer_norm, rms_norm: passes over the rows of a norm
    affine: passes over the rows for γ and β; affine_grad: for their gradients
    new_bias: passes over what a product computes, for a bias that it did not have and that no packed weight adds;
    new_bias_grad: for its gradient
    launch: bytes that could be moved while one more kernel starts
    """

    layer_norm: int
    rms_norm: int
    affine: int
    affine_grad: int
    new_bias: int
    new_bias_grad: int
    launch: int


CPU = DeviceCosts(layer_norm=3, rms_norm=2, affine=1, affine_grad=1, new_bias=2, new_bias_grad=1, launch=0)
GPU = DeviceCosts(layer_norm=1, rms_norm=1, affine=0, affine_grad=1, new_bias=0, new_bias_grad=1, launch=8 * 2**20)


def device_costs(node: Node) -> DeviceCosts:
    """The costs of the device that a value is on."""
    fake = value(node)
    return CPU if fake is None or fake.device.type == "cpu" else GPU
