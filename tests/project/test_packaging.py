"""What an installed normfx brings: the backend's entry point, types, kernels, the command."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from paths import ROOT

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


def test_every_folder_is_a_package() -> None:
    """An editable install finds a folder that the wheel would lack."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("normfx/**/__init__.py")
    }
    assert set(table["tool"]["setuptools"]["packages"]) == folders | {"normfx.kernels"}


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path: Path) -> None:
    """Built from a copy: setuptools leaves a build folder, whose stale files would enter the next wheel."""
    copy, wheels = tmp_path / "copy", tmp_path / "wheels"
    for folder in ("normfx", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(wheels), str(copy)]
    subprocess.run(pip, check=True)
    (wheel,) = wheels.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(copy).as_posix() for path in copy.rglob("*.py") if "build" not in path.parts}
    packaged = {f"weights/{name}.cpp" for name in ("files", "memory", "pages")}
    packaged |= {"lower/attention.cpp"}
    packaged |= {f"page/page.{kind}" for kind in ("html", "css", "js")}
    others = {"py.typed", *packaged}
    assert names == {f"normfx/{other}" for other in others} | {
        f"normfx/{s}" if s.startswith("kernels/") else s for s in sources
    }


def _imported(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a folder with the packages installed here, all but normfx."""
    site = folder / "site"
    site.mkdir()
    packages = [entry for place in sys.path if place.endswith("-packages") for entry in Path(place).iterdir()]
    for entry in packages:
        if not entry.name.startswith(("normfx", "__editable__")) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=folder, env=env)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("normfx", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_checkout_that_is_not_installed(checkout: Path) -> None:
    """It has its own kernels, and torch knows the backend once normfx is imported."""
    code = (
        "import torch, normfx, normfx.kernels.spec as s; print(s.__file__); print(normfx.kernels.__file__); "
        "from normfx import checkout; print(torch._dynamo.lookup_backend('normfx') is checkout._backend)"
    )
    done = _imported(checkout, code)
    assert done.returncode == 0, done.stderr
    kernels = checkout / "kernels"
    assert done.stdout.split() == [str(kernels / "spec.py"), str(kernels / "__init__.py"), "True"]


def test_checkout_without_kernels(checkout: Path) -> None:
    """Another project's folder of that name is not taken for normfx's."""
    shutil.rmtree(checkout / "kernels")
    (checkout / "kernels").mkdir()
    (checkout / "kernels" / "__init__.py").write_text("")
    done = _imported(checkout, "import normfx")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: normfx: ")
    assert "pip install -e ." in done.stderr.splitlines()[-1]
