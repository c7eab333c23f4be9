"""What an installed normfx brings: the backend's entry point, types, kernels, the command."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
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
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"normfx/py.typed", "normfx/kernels/__init__.py", "normfx/rules/fold_affine.py"} <= names
