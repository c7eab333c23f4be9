"""Makes `import normfx` work in a checkout that is not installed.

There the folder of `normfx.kernels` lies next to that of `normfx` (pyproject.toml, package-dir), and no entry point
names the backend. In an installed package it lies inside, and nothing is done. A checkout always gets its own kernels,
also where another one is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

BACKEND, KERNELS = "normfx", "normfx.kernels"
PACKAGE = Path(__file__).parent


def is_checkout() -> bool:
    return not (PACKAGE / "kernels").is_dir()


def find_kernels() -> None:
    """Imports normfx.kernels from the checkout that this package is part of.

    Raises ImportError where the folder is missing there and nothing else provides it.
    """
    if not is_checkout() or KERNELS in sys.modules:
        return
    folder = PACKAGE.parent / "kernels"
    if (folder / "spec.py").is_file():  # a file of ours: another project is called `kernels` too
        init, within = folder / "__init__.py", [str(folder)]
        spec = importlib.util.spec_from_file_location(KERNELS, init, submodule_search_locations=within)
    else:
        spec = importlib.util.find_spec(KERNELS)
    if spec is None or spec.loader is None:
        raise ImportError(
            f"normfx: {PACKAGE} is not installed, and its kernels are not in {folder}, where a checkout has them: "
            "use a whole checkout, or install normfx from it (pip install -e .)"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[KERNELS] = module
    spec.loader.exec_module(module)
    vars(sys.modules["normfx"])["kernels"] = module  # as an import statement does


def register() -> None:
    """Makes torch.compile know the backend by its name where no entry point does. torch is imported only then."""
    if not is_checkout() or BACKEND in entry_points(group="torch_dynamo_backends").names:
        return
    import torch

    if BACKEND not in torch.compiler.list_backends():
        torch._dynamo.register_backend(_backend, name=BACKEND)


def _backend(*args: Any, **named: Any) -> Any:
    """The backend, imported when it is first called."""
    return importlib.import_module("normfx.backend").normfx(*args, **named)


find_kernels()
