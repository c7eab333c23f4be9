"""Options and environment variables, and what a user sees when one is wrong or a stage fails."""

from __future__ import annotations

import traceback

import pytest
import torch
from raising import causes, raises_inside
from torch import nn

import normfx
from normfx.edit import Edit
from normfx.errors import StageError
from normfx.options import DEFAULT_RULES, RULE_NAMES, Options

NO_ENV: dict[str, str] = {}


@pytest.mark.parametrize(
    ("spec", "rules"),
    [
        ("default", DEFAULT_RULES),
        ("all", RULE_NAMES),
        ("none", ()),
        ([], ()),
        ("default,-fold_affine", tuple(r for r in DEFAULT_RULES if r != "fold_affine")),
        (
            "-fold_affine, -fold_scale",
            tuple(r for r in DEFAULT_RULES if not r.startswith(("fold_affine", "fold_scale"))),
        ),
        ("fold_affine", ("fold_affine",)),
        ("fold_affine,pre_rms_norm", ("pre_rms_norm", "fold_affine")),
        (["none", "+linear_norm"], ("linear_norm",)),
        (("linear_norm", "fold_scale"), ("linear_norm", "fold_scale")),
    ],
)
def test_rules(spec: object, rules: tuple[str, ...]) -> None:
    assert Options.parse({"rules": spec}, environ=NO_ENV).rules == rules


def test_environment_changes_the_rules_given() -> None:
    assert Options.parse({"rules": "fold_affine"}, environ={"NORMFX_RULES": "+fold_scale"}).rules == (
        "fold_scale",
        "fold_affine",
    )
    assert Options.parse(None, environ={"NORMFX_RULES": "none"}).rules == ()


@pytest.mark.parametrize(
    ("options", "environ", "words"),
    [
        ({"rule": "all"}, {}, ["option 'rule'", "rules", "fold", "lowering"]),
        ({"rules": "pre_rms"}, {}, ["rule 'pre_rms'", *RULE_NAMES, "default"]),
        ({"rules": 3}, {}, ["options['rules']", "int"]),
        ({"rules": {"all": 1}}, {}, ["options['rules']", "dict"]),
        ({"fold": "frosen"}, {}, ["value 'frosen'", "auto", "live"]),
        ({"lowering": "cuda"}, {}, ["value 'cuda'", "auto", "inductor"]),
        ({"products": "mkl"}, {}, ["value 'mkl'", "aten", "auto", "onednn"]),
        ({"attention": "flash"}, {}, ["value 'flash'", "aten", "auto", "normfx"]),
        ({"product": "aten"}, {}, ["option 'product'", "did you mean 'products'?"]),
        ({"strict": "yes"}, {}, ["options['strict']", "True or False"]),
        ({"inductor": [1]}, {}, ["options['inductor']", "mapping"]),
        ({}, {"NORMFX_RULES": "+x"}, ["rule 'x'", "NORMFX_RULES"]),
        ({}, {"NORMFX_DEBUG": "5"}, ["'5'", "NORMFX_DEBUG"]),
        ({}, {"NORMFX_VERIFY": "maybe"}, ["'maybe'", "NORMFX_VERIFY"]),
        ({"mode": "default"}, {"mode": "x"}, ["mode"]),
        ({"rulez": "all"}, {}, ["did you mean 'rules'?"]),
        ({"rules": "-fold_afine"}, {}, ["did you mean 'fold_affine'?"]),
        ({"fold": "froze"}, {}, ["did you mean 'frozen'?"]),
        ({"crms_width": "4711"}, {}, ["valid: auto, exact, padded"]),
    ],
)
def test_errors_say_what_where_and_what_is_valid(
    options: dict[str, object], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(normfx.OptionError) as error:
        Options.parse(options, mode=environ.pop("mode", None), environ=environ)
    assert all(word in str(error.value) for word in words)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.norm(x))


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"options": {"rulez": "all"}}, "strict, verify; did you mean 'rules'?"),
        ({"mode": "fastest"}, "unknown mode 'fastest'"),
        ({"options": {"inductor": {"max_autotun": 1}}}, "unknown Inductor option 'max_autotun'"),
        ({"options": {"inductor": {"max_autotun": 1}}}, "did you mean 'max_autotune'?"),
        ({"options": {"max_autotune": True}}, "give it as options={'inductor': {'max_autotune': True}}"),
    ],
)
def test_torch_compile_shows_the_error(kwargs: dict[str, object], word: str) -> None:
    """It arrives as what it is, without the frames of Dynamo and normfx: a few of torch's own are left."""
    with pytest.raises(normfx.OptionError) as caught:
        torch.compile(Norm(), backend="normfx", **kwargs)(torch.randn(2, 4))
    assert str(caught.value).startswith("normfx: ") and word in str(caught.value)
    assert type(caught.value).__name__ == "OptionError"
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert len(files) < 10 and not any("normfx/backend" in file for file in files)


def test_explain_and_rewrite_say_where_an_option_of_inductor_belongs() -> None:
    program = torch.export.export(Norm(), (torch.randn(2, 4),))
    for call in (normfx.explain, normfx.rewrite):
        with pytest.raises(normfx.OptionError, match="is an option of Inductor"):
            call(program, {"max_autotune": True})


@pytest.mark.parametrize(("name", "meant"), [("NORMFX_RULE", "NORMFX_RULES"), ("NORMFX_DEBUGGING", "NORMFX_DEBUG")])
def test_a_misspelt_variable_warns_once(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.options._warned", set())
    with pytest.warns(normfx.NormfxWarning, match=f"{name} has no meaning; did you mean '{meant}'?"):
        Options.parse(environ={name: "1"})
    Options.parse(environ={name: "1"})  # a second warning would be an error here


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_kernels_without_a_device_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.options._warned", set())
    monkeypatch.setattr("normfx.backend.compile_graph", lambda gm, inputs, patches: gm.forward)
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    for size in (2, 3):
        compiled = torch.compile(model, backend="normfx", options={"lowering": "triton"})
        if size == 2:
            with pytest.warns(normfx.NormfxWarning, match="lowering='triton' has no effect here"):
                compiled(x)
        torch._dynamo.reset()
        compiled(torch.randn(size, 4))


def _broken(*args: object) -> None:
    raise IndexError("no such thing")


def _unfinished(*args: object) -> None:
    raise KeyError("no such thing")


def test_a_failing_stage_leaves_the_model_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.backend.make_plan", _broken)
    model, x = Norm(), torch.randn(2, 4)
    with pytest.warns(normfx.NormfxWarning, match=r"stage 'plan' failed \(IndexError: no such thing\)"):
        out = torch.compile(model, backend="normfx", fullgraph=True)(x)
    torch.testing.assert_close(out, model(x))


def test_a_stage_that_fails_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewrite edits its own copy: the graph that is compiled after a failure is the untouched one."""
    monkeypatch.setattr("normfx.apply.write_norms", _broken)
    model, x = Norm(), torch.randn(2, 4)
    with pytest.warns(normfx.NormfxWarning, match="stage 'rewrite'"):
        out = torch.compile(model, backend="normfx", fullgraph=True)(x)
    torch.testing.assert_close(out, model(x))


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.backend.make_plan", _broken)
    with pytest.raises(StageError, match=r"stage 'plan' failed: IndexError: no such thing \(at test_options.py:\d+\)"):
        torch.compile(Norm(), backend="normfx", options={"strict": True, "fold": "live"})(torch.randn(2, 4))


@pytest.mark.parametrize("model", [Norm(), nn.Linear(4, 4)])
def test_inductor_exceptions_pass_through(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error carries a note that names normfx, the stage and the way out."""
    monkeypatch.setattr("normfx.lower.folded.compile_graph", _unfinished)
    monkeypatch.setattr("normfx.backend.compile_graph", _unfinished)
    with pytest.raises(Exception, match="no such thing") as caught:
        torch.compile(model, backend="normfx")(torch.randn(2, 4))
    (note,) = caught.value.__notes__
    assert note.startswith("normfx: raised at stage 'compile'") and "backend='inductor'" in note
    assert ("rules" in note) == isinstance(model, Norm)
    assert any(isinstance(error, KeyError) for error in causes(caught.value))


def test_a_crash_of_the_compiled_graph_names_normfx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.lower.folded.compile_graph", lambda gm, inputs, patches: _broken)
    with pytest.raises(IndexError, match="no such thing") as caught:
        torch.compile(Norm(), backend="normfx")(torch.randn(2, 4))
    assert [note.partition(",")[0] for note in caught.value.__notes__] == ["normfx: raised at stage 'run'"]


def test_a_frozen_variant_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.lower.folded.FrozenTemplate.build", _broken)
    model, x = Norm(), torch.randn(2, 4)
    with torch.no_grad():
        with pytest.warns(normfx.NormfxWarning, match=r"stage 'freeze' .* the model runs without the frozen variant"):
            out = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": "frozen"})(x)
        torch.testing.assert_close(out, model(x))
        torch._dynamo.reset()
        with raises_inside(StageError, r"stage 'freeze' failed: IndexError: no such thing"):
            torch.compile(model, backend="normfx", options={"fold": "frozen", "strict": True})(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:normfx. stage 'freeze':normfx.errors.NormfxWarning")
def test_what_inductor_cannot_freeze() -> None:
    """A float64 convolution, for which Inductor (2.14) has no packed weights: its own freezing raises."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 2), nn.Flatten(2), nn.LayerNorm(5), nn.Linear(5, 4)).double().eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="normfx", options={"fold": "frozen"})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
            model[3].weight.data[0] += 1


@pytest.mark.parametrize(("level", "words"), [("0", []), ("1", ["fold_affine", "capture"]), ("2", ["before", "after"])])
def test_debug_levels(
    level: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NORMFX_DEBUG", level)
    normfx.explain(Norm())(torch.randn(2, 4))
    printed = capsys.readouterr().out
    assert bool(printed) == bool(words) and all(word in printed for word in words)


def test_verify_finds_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """options={'verify': True} catches a rewrite that is wrong."""
    monkeypatch.setattr(Edit, "fold_reader", lambda *args: None)
    model = Norm()
    nn.init.normal_(model.norm.weight)
    with pytest.raises(normfx.VerifyError, match="output 0 of the rewritten graph differs"):
        torch.compile(model, backend="normfx", options={"verify": True, "strict": True, "fold": "live"})(
            torch.randn(2, 4)
        )
