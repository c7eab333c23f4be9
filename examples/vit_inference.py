"""Inference with a vision transformer of timm, and the report of what was compiled. Needs `timm`, no downloads."""

import torch
from timm.models import VisionTransformer

import normfx


def main() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10, init_values=1e-2
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="normfx")
    with torch.inference_mode():
        print(f"largest difference from eager: {(compiled(images) - model(images)).abs().max():.1e}")
    report = normfx.compiled_report()
    print(f"{report.counts['to_rms_norm']} of {report.counts['layer_norm']} LayerNorms became RMSNorms")
    for graph in report.graphs:
        if graph.weights is not None:
            print(f"{graph.folds} folded weights, kept between calls: {graph.weights.bytes} bytes")
    print(report)


if __name__ == "__main__":
    main()
