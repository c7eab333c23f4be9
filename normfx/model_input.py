"""Models that a command names, with arguments to call them with: a factory, a script, a configuration, a program."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normfx.errors import NormfxError, OptionError, did_you_mean, first_line

TOKENS = 32
"""Length of the sequence that a model with a configuration alone is called with."""


@dataclass(frozen=True, eq=False)
class Called:
    """A model and the arguments of one call."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def from_factory(spec: str) -> Called:
    """What `module:factory` or `file.py:factory` returns: a module, (module, args) or (module, args, kwargs).

    A module alone is called without arguments. Raises OptionError for anything else.
    """
    name, colon, attribute = spec.rpartition(":")
    if not colon or not name or not attribute:
        raise OptionError(f"normfx: {spec!r} names no factory: give MODULE:FACTORY, FILE.py:FACTORY or a file of .pt2")
    factory = getattr(_imported(name), attribute, None)
    if not callable(factory):
        raise OptionError(f"normfx: {name} has no function {attribute!r}")
    made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, *((), (), {})[len(parts) :])[:3]
    if not callable(model) or not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        kinds = ", ".join(type(each).__name__ for each in parts)
        raise OptionError(
            f"normfx: {spec} must return a module, (module, args) or (module, args, kwargs), not ({kinds})"
        )
    _check_arguments(spec, getattr(model, "forward", model), args, kwargs)
    return Called(model, tuple(args), kwargs)


def _check_arguments(spec: str, forward: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises OptionError where a call would lack an argument, or have one too many."""
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        raise OptionError(
            f"normfx: {spec}: the module cannot be called with what its factory returned: {error}; "
            "return (module, args) or (module, args, kwargs)"
        ) from error
    except ValueError:
        return  # of what has no signature only the call itself tells


def _imported(name: str) -> ModuleType:
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise OptionError(f"normfx: there is no file {path}")
    if not is_file and name.startswith("."):
        raise OptionError(f"normfx: cannot import {name!r}: it is a relative name; give package.module or FILE.py")
    folder = str((path.parent if is_file else Path()).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _script(path) if is_file else importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"normfx: cannot import {name!r}: {error}") from error


def _script(path: Path) -> ModuleType:
    """The module of a file, under a name that no other module has: a script may be called like one of Python's."""
    name, file = path.stem, path.resolve()
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(file):
            return sys.modules[name]
        name = f"{name}_script"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_program(path: Path) -> Called:
    """The module of an exported program, with the inputs that it was exported with, which torch.export.save keeps."""
    if not path.is_file():
        raise OptionError(f"normfx: there is no file {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip file")  # torch would log a traceback
        program = torch.export.load(path)
    except Exception as error:  # whatever torch meets in a file that is something else
        raise OptionError(
            f"normfx: {path} is no program of torch.export.save ({first_line(error)}); a package of AOTInductor holds "
            "compiled code, which cannot be explained"
        ) from error
    if program.example_inputs is None:
        raise OptionError(
            f"normfx: {path} holds no example inputs; export it again with torch.export.export(model, args)"
        )
    args, kwargs = program.example_inputs
    return Called(program.module(), tuple(args), kwargs)


def from_config(name: str) -> Called:
    """A model of `transformers` with random weights: of a folder with config.json, or a model type ("gpt2") with its
    default configuration. Nothing is downloaded.

    Raises NormfxError where transformers is missing, OptionError for an unknown name or inputs that are not known.
    """
    try:
        import transformers  # an extra
    except ImportError as error:
        raise NormfxError("normfx: --hf-config needs transformers: pip install transformers") from error
    auto: Any = transformers.AutoModel
    if Path(name).exists():
        try:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            said = first_line(error)
            raise OptionError(f"normfx: --hf-config {name}: no configuration of transformers ({said})") from error
    elif name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    else:
        meant = did_you_mean(name, transformers.CONFIG_MAPPING)
        raise OptionError(
            f"normfx: --hf-config: {name!r} is no folder and no model type of transformers; {meant}".rstrip("; ")
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False
    torch.manual_seed(0)
    try:
        model = auto.from_config(config)
    except (ImportError, ValueError) as error:  # it needs another package, or is no model by itself
        raise OptionError(f"normfx: --hf-config {name}: no model of transformers ({first_line(error)})") from error
    return Called(model, (), _inputs(model, config))


def _inputs(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """One row of inputs of the kind that a model of transformers names as its main one."""
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None) or TOKENS
        ids = torch.randint(0, text.vocab_size, (1, min(TOKENS, longest)))
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if main == "pixel_values":
        size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return {main: torch.randn(1, channels, height, width)}
    raise OptionError(
        f"normfx: --hf-config does not know how to make {main} for {type(model).__name__}; write a factory that "
        "returns (module, args, kwargs), and give its name"
    )
