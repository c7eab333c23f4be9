"""What normfx does to each norm of a vision transformer, compiling nothing. Needs `transformers`, no downloads."""

import torch
from transformers import ViTConfig, ViTModel

import normfx


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        report = normfx.explain(model)(torch.randn(2, 3, 32, 32))
    for site in report.sites:
        print(f"{site.name}: {site.kind}, applied {', '.join(site.rules) or 'nothing'}")
        for refusal in site.refusals:
            print(f"  {refusal.rule} refused, {refusal.code}: {refusal.detail}\n  hint: {refusal.hint}")
    print(f"{report.counts['to_rms_norm']} of {report.counts['layer_norm']} LayerNorms become RMSNorms")


if __name__ == "__main__":
    main()
