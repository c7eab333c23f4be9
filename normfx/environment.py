"""Versions, device and options that a report holds for."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from normfx.options import Options


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(settings: Options | None = None) -> dict[str, str]:
    """Names and values, as text. settings: those of the report, where they are the same for all of its graphs."""
    cuda = torch.cuda.is_available()
    found = {
        "normfx": version("normfx") or "not installed",
        "torch": torch.__version__,
        "triton": version("triton") or "not installed",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CUDA device": torch.cuda.get_device_name() if cuda else "none",
    }
    if settings is not None:
        found["rules"] = ", ".join(settings.rules) or "none"
        found |= {name: getattr(settings, name) for name in ("fold", "lowering", "products", "attention")}
    return found
