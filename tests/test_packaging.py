"""What an installed normfx brings: the backend's entry point, types, kernels, the command."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import normfx
import normfx.kernels


def test_backend_is_found_without_an_import() -> None:
    (point,) = [p for p in importlib.metadata.entry_points(group="torch_dynamo_backends") if p.name == "normfx"]
    assert point.value == "normfx.backend:normfx"
    assert "normfx" in torch.compiler.list_backends()
    code = "import torch; f = torch.compile(lambda x: x + 1, backend='normfx'); print(f(torch.zeros(1)).item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1.0"


def test_version_and_types() -> None:
    assert normfx.__version__ == importlib.metadata.version("normfx")
    assert importlib.resources.files("normfx").joinpath("py.typed").is_file()
    assert normfx.kernels.__doc__


def test_command() -> None:
    (script,) = [p for p in importlib.metadata.entry_points(group="console_scripts") if p.name == "normfx"]
    assert script.value == "normfx.cli:main"
    done = subprocess.run([sys.executable, "-m", "normfx.cli", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path: Path) -> None:
    """Built from a copy: setuptools leaves a build folder, whose stale files would enter the next wheel."""
    root, copy, wheels = Path(__file__).parents[1], tmp_path / "copy", tmp_path / "wheels"
    for folder in ("normfx", "kernels"):
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / file, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(wheels), str(copy)]
    subprocess.run(pip, check=True)
    (wheel,) = wheels.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(copy).as_posix() for path in copy.rglob("*.py") if "build" not in path.parts}
    assert names == {"normfx/py.typed", "normfx/weights/memory.cpp", "normfx/weights/pages.cpp"} | {
        f"normfx/{s}" if s.startswith("kernels/") else s for s in sources
    }
