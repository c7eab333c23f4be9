"""Generated kernels: what they compute, under Triton's interpreter, against float64."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from kernel_processes import PROGRAM, Processes, environment

from normfx.kernels.launch import FORWARD_IN_REGISTERS, backward_launch, forward_launch
from normfx.kernels.source import backward_source, forward_source
from normfx.kernels.spec import Inner, Spec

pytest.importorskip("triton")

WIDTHS = (1, 2, 127, 128, 192, 768, 1023, 1024, 4096, 5120, 12288, 32768, 65536)
DTYPES = ("float32", "bfloat16", "float16")
ADDED = {"residual": "float32", "sum": "float32"}


def answers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Under the interpreter, of one process for all of these."""
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    run = subprocess.run(
        [sys.executable, PROGRAM], input=lines, capture_output=True, text=True, check=True, env=environment("cpu")
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(cases: list[dict[str, Any]]) -> None:
    judge(cases, answers(cases))


def judge(cases: list[dict[str, Any]], replies: list[dict[str, Any]]) -> None:
    """Names every case that is wrong: on a device one run has to tell them all."""
    found = []
    for case, answer in zip(cases, replies, strict=True):
        wrong = {name: error for name, error in answer.get("errors", {}).items() if not error <= 1}
        if "failure" in answer:
            found.append(f"{json.dumps(case)}: {answer['failure']}")
        elif wrong:
            found.append(f"{json.dumps(case)}: errors as parts of what is allowed: {wrong}")
    assert not found, "\n".join([f"{len(found)} of {len(cases)} cases", *found])


def spec(width: int, dtype: str = "float32", **other: Any) -> dict[str, Any]:
    return {"width": width, "centre": False, "x": dtype, "out": dtype, **other}


def forms(width: int, dtype: str) -> list[dict[str, Any]]:
    """Every feature of a spec at least once."""
    affine = {"weight": dtype, "bias": dtype}
    added = {"residual": dtype, "sum": dtype}
    found = [
        spec(width, dtype, centre=True, **affine),
        spec(width, dtype, weight="float32"),
        spec(width, dtype),
        spec(width, dtype, centre=True, **added, **affine),
        spec(width, dtype, **added, alpha=0.5),
        spec(width, dtype, residual="float32", weight="float32", unit_offset=True),
    ]
    found += [
        spec(width, dtype, **added, x_bias=dtype),
        spec(width, dtype, centre=True, **added, **affine, x_bias="float32", alpha=2.0),
    ]
    if width > 1:
        found += [spec(width, dtype, compressed=True), spec(width, dtype, compressed=True, **added)]
        found += [spec(width, dtype, centre=True, correction=1, scale=2.0, **affine)]
    if 1 < width <= 8192:
        inner = {"centre": True, **affine, "scale": 0.5, "centre_output": True}
        found += [
            spec(width, dtype, **added, alpha=2.0, inner=inner),
            spec(
                width, dtype, centre=True, **added, **affine, inner={"centre": False, "weight": dtype, "correction": 1}
            ),
        ]
    if width <= 8192:
        found += [spec(width, dtype, centre=True, centre_output=True, **affine)]
    return found


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float16"))]
)
def test_float64(dtype: str) -> None:
    check([{"spec": form, "shape": [3]} for width in WIDTHS if width <= 1024 for form in forms(width, dtype)])


@pytest.mark.slow
def test_wide_rows() -> None:
    """Of each width some forms."""
    wide = [w for w in WIDTHS if w > 1024]
    check(
        [
            {"spec": forms(w, "bfloat16")[form], "shape": [1]}
            for i, w in enumerate(wide)
            for form in ((0, 3, 7), (1, 4, 6), (8, 2, 7))[i % 3]
        ]
    )


def test_many_rows() -> None:
    """More than one program, and a last one that is not full. The same bits each time."""
    check(
        [{"spec": form, "shape": [257], "twice": True} for width in (2, 127) for form in forms(width, "bfloat16")[:5]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_all_forms_and_sizes(width: int, dtype: str) -> None:
    rows = [0, 1, 257] if width <= 1024 else [0, 2]
    check([{"spec": form, "shape": [n]} for n in rows for form in forms(width, dtype)])


@pytest.mark.slow
@pytest.mark.parametrize("width", [w for w in WIDTHS if w > 1024])
def test_many_wide_rows(width: int) -> None:
    check([{"spec": forms(width, "bfloat16")[3], "shape": [257]}])


@pytest.mark.parametrize("width", [127, *(pytest.param(width, marks=pytest.mark.slow) for width in (1, 1024))])
def test_shapes(width: int) -> None:
    """No rows, one row, one to four dimensions, and rows that do not lie side by side."""
    shapes: list[list[int]] = [[0], [1], [], [2, 3], [2, 1, 3], [0, 3]]
    cases = [{"spec": form, "shape": shape} for shape in shapes for form in forms(width, "float32")[:2]]
    for kind in ("strided", "rows apart", "transposed"):
        cases += [{"spec": form, "shape": [2, 3], "kind": kind} for form in forms(width, "float32")[3:5]]
    check(cases)


@pytest.mark.parametrize("width", [1023, *(pytest.param(width, marks=pytest.mark.slow) for width in (128, 20000))])
def test_hard_values(width: int) -> None:
    """A mean of a thousand deviations, rows of zeros with and without ε; infinities and NaN as eager has them."""
    affine = {"weight": "float32", "bias": "float32"}
    norm, root = spec(width, centre=True, **affine), spec(width, weight="float32")
    cases: list[dict[str, Any]] = [{"spec": norm, "shape": [3], "shift": 1000.0}]
    cases += [{"spec": form, "shape": [3], "kind": "zeros"} for form in (norm, root)]
    cases += [{"spec": spec(width, centre=centre), "shape": [4], "kind": "not finite"} for centre in (True, False)]
    check(cases)


def test_the_check_can_fail() -> None:
    """ε and correction count: with others, the errors are far above what is allowed."""
    wanted = spec(128, centre=True)
    (answer,) = answers([{"spec": {**wanted, "correction": 200}, "shape": [3]}])
    assert "correction is 200" in answer["failure"]
    with pytest.raises(AssertionError, match="errors as parts"):
        check([{"spec": wanted, "shape": [3], "exact_eps": 2e-5}])


@pytest.mark.slow
def test_processes_side_by_side() -> None:
    """Answers come in the order of the cases, and a process that fails takes no other case with it."""
    cases: list[dict[str, Any]] = [{"spec": spec(width, centre=True), "shape": [2]} for width in (2, 3, 4)]
    cases.insert(1, {"spec": spec(128, centre=True, correction=200), "shape": [3]})
    cases.insert(2, {"spec": spec(8, centre=True), "shape": [2], "exact_eps": 2.0})
    with Processes(2, "cpu") as processes:
        first, broken, wrong, *others = processes.answers(cases)
    assert "correction is 200" in broken["failure"]
    judge([cases[0], *cases[3:]], [first, *others])
    assert wrong["errors"]["out"] > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": "float64"}, "x is 'float64'; there are kernels for float32, bfloat16, float16"),
        ({"width": 0}, "width is 0"),
        ({"width": 1, "compressed": True}, "width is 1"),
        ({"correction": 4}, "correction is 4 for a width of 4"),
        ({"centre": True, "compressed": True}, "centred already"),
        ({"compressed": True, "centre_output": True}, "cannot be centred"),
        ({"sum": "float32"}, "no sum without a residual"),
        ({"unit_offset": True}, "unit_offset without a weight"),
        ({"inner": Inner(True)}, "an inner norm without a sum"),
        ({"x_bias": "float32"}, "no x_bias without a residual"),
        ({"x_bias": "float32", "compressed": True, **ADDED}, "an x_bias of compressed rows"),
        ({"x_bias": "float32", "inner": Inner(True), **ADDED}, "an x_bias before an inner norm"),
        (
            {"inner": Inner(True, weight="float64"), "residual": "float32", "sum": "float32"},
            "inner weight is 'float64'",
        ),
        ({"inner": Inner(True, correction=4), "residual": "float32", "sum": "float32"}, "the inner correction"),
    ],
)
def test_specs_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec(**{**spec(4), **wrong})


def test_no_backward_without_the_sum() -> None:
    forward_only = Spec(**spec(8, residual="float32"))
    with pytest.raises(ValueError, match="backward reads the sum"):
        backward_source(forward_only, backward_launch(forward_only), False)


def test_two_norms_of_wide_rows() -> None:
    wide = Spec(**spec(FORWARD_IN_REGISTERS + 1, **ADDED, inner=Inner(True)))
    with pytest.raises(ValueError, match="none has a norm before the add of rows of 16385"):
        forward_source(wide, forward_launch(wide), True)
    with pytest.raises(ValueError, match="that of `last` and then that of `first`"):
        backward_source(wide, backward_launch(wide), False)


def test_output_of_wide_rows_is_not_centred() -> None:
    wide = Spec(**spec(FORWARD_IN_REGISTERS + 1, centre=True, centre_output=True))
    with pytest.raises(ValueError, match="none centres the output of rows of 16385: a row of 16385 does not fit"):
        forward_source(wide, forward_launch(wide), True)
    with pytest.raises(ValueError, match="none centres"):
        backward_source(wide, backward_launch(wide), False)
