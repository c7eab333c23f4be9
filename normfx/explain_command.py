"""`normfx explain`: the report of a model that is named on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from normfx.errors import NormfxError, OptionError, first_line
from normfx.explaining import explain
from normfx.model_input import Called, from_config, from_factory, from_program
from normfx.report import Report

PROGRAM = ".pt2"

STATES = {
    "default": "as in inference, without gradients (in evaluation mode): the default; --train says what training gets",
    "train": "as in training: in training mode, with gradients recorded",
    "no_grad": "without gradients, in the mode that the factory left the model in",
    "program": "without gradients, in the mode that the program was exported in",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODULE:FACTORY",
        help="FACTORY() returns a module, (module, args) or (module, args, kwargs); also FILE.py:FACTORY, or a program "
        "of torch.export.save (FILE.pt2)",
    )
    parser.add_argument(
        "--hf-config",
        metavar="DIR",
        help="instead: a folder with the config.json of a model of transformers, or a model type such as gpt2; random "
        "weights, nothing is downloaded",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", type=Path, metavar="PATH", help="also write the report as an HTML page")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--train", action="store_true", help=STATES["train"])
    state.add_argument("--no-grad", action="store_true", help=STATES["no_grad"])
    parser.set_defaults(run=main, parser=parser)


def main(parsed: argparse.Namespace) -> int:
    """Explain the model and print the report. Exit status 1: normfx failed on a graph.

    Raises OptionError where the arguments name no model.
    """
    called, state = _called(parsed), _state(parsed)
    if isinstance(called.model, torch.nn.Module) and state in ("default", "train"):
        called.model.train(state == "train")
    try:
        with torch.set_grad_enabled(state == "train"):
            report = explain(called.model)(*called.args, **called.kwargs)
    except Exception as error:
        if parsed.hf_config is None or isinstance(error, NormfxError):
            raise  # the user's own code: its traceback says where
        raise OptionError(
            f"normfx: --hf-config {parsed.hf_config}: {type(called.model).__name__} does not run with "
            f"{' and '.join(called.kwargs)} alone ({first_line(error)}); write a factory that returns (module, args, "
            "kwargs), and give its name"
        ) from error
    if parsed.html is not None:
        _write(report, parsed.html)
    console = Console(soft_wrap=True)
    if parsed.json:
        print(report.to_json())
    else:
        console.print(f"Explained {STATES[state]}.\n", highlight=False, markup=False)
        console.print(report)
        if parsed.html is not None:
            console.print(f"\nWritten: {parsed.html}", highlight=False, markup=False)
    return int(any(graph.failure for graph in report.graphs))


def _write(report: Report, path: Path) -> None:
    """Write the page. Raises OptionError where the file cannot be written."""
    try:
        report.to_html(path)
    except OSError as error:
        raise OptionError(f"normfx: --html {path}: {error.strerror}") from error


def _state(parsed: argparse.Namespace) -> str:
    """The one of STATES in which the model is explained."""
    if parsed.model is not None and parsed.model.endswith(PROGRAM):
        if parsed.train:
            raise OptionError("normfx: --train: a program stays in the mode that it was exported in; leave it out")
        return "program"
    return "train" if parsed.train else "no_grad" if parsed.no_grad else "default"


def _called(parsed: argparse.Namespace) -> Called:
    if (parsed.model is None) == (parsed.hf_config is None):
        raise OptionError("normfx: name one model: MODULE:FACTORY, FILE.py:FACTORY, FILE.pt2 or --hf-config DIR")
    if parsed.hf_config is not None:
        return from_config(parsed.hf_config)
    if parsed.model.endswith(PROGRAM):
        return from_program(Path(parsed.model))
    return from_factory(parsed.model)
