"""normfx.convert: the copy computes the same, with other weights and norms; where it cannot, it says why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from converting_models import moved, norms
from models import named
from torch import Tensor, nn

import normfx
from normfx.converting.written import Copy

FAMILIES = {
    "gpt2": {"RMSNorm": 5},
    "vit": {"RMSNorm": 4, "LayerNorm": 1},  # the last one's output is returned, with its bias
    "timm vit layer scale": {"RMSNorm": 5},
    "bert post-norm": {"LayerNorm": 5},
    "encoder": {"LayerNorm": 5},  # it looks at the biases of its norms
    "gpt_neox parallel": {"RMSNorm": 5},
    "opt": {"RMSNorm": 5},
    "whisper": {"RMSNorm": 7, "LayerNorm": 5},  # a GELU starts the encoder's stream
    "dinov2": {"RMSNorm": 4, "LayerNorm": 1},
    "bloom": {"LayerNorm": 6},
    "gptj": {"RMSNorm": 3},
    "phi": {"RMSNorm": 3},
    "mixer": {"LayerNorm": 5},
    "torchvision vit": {"RMSNorm": 5},
}
IN_FLOAT32 = {"llama": {"RMSNorm": 5}, "gemma2": {"RMSNorm": 5, "Gemma2RMSNorm": 4}}
"""Their norms compute in float32 whatever comes; Gemma's weight is 1 + w, folded where linears read it."""
QUICK = {"gpt2", "timm vit layer scale", "encoder"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_families(name: str, tmp_path: Path) -> None:
    """The copy is saved, loaded and compared in float64; the model is as it was."""
    case = named(name)
    pytest.importorskip(case.package)
    torch.manual_seed(0)
    model = moved(case.build().double())
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs())
    before = copy.deepcopy(model.state_dict())
    converted = normfx.convert(model, inputs)
    assert norms(converted) == FAMILIES[name]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.save(converted.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        want = model(*inputs)
        for p in converted.parameters():
            p.zero_()
        converted.load_state_dict(torch.load(tmp_path / "weights.pt"))
        torch.testing.assert_close(converted(*inputs), want, rtol=1e-11, atol=1e-11 * want.abs().max().item())


def test_saved_and_loaded_with_safetensors(tmp_path: Path) -> None:
    """A second model of the same class is converted, and takes the weights of the first: what docs/convert.md says."""
    safetensors = pytest.importorskip("safetensors.torch")
    case = named("gpt2")
    torch.manual_seed(0)
    model, inputs = moved(case.build().double()), case.inputs()
    safetensors.save_model(normfx.convert(model, inputs), str(tmp_path / "converted.safetensors"))
    other = normfx.convert(case.build().double().eval(), inputs)
    missing, unexpected = safetensors.load_model(other, str(tmp_path / "converted.safetensors"))
    assert not missing and not unexpected
    with torch.no_grad():
        want = model(*inputs)
        torch.testing.assert_close(other(*inputs), want, rtol=1e-11, atol=1e-11 * want.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_norms_that_compute_in_float32(name: str) -> None:
    case = named(name)
    pytest.importorskip(case.package)
    torch.manual_seed(0)
    model, inputs = moved(case.build()), case.inputs()
    converted = normfx.convert(model, inputs)
    assert norms(converted) == IN_FLOAT32[name]
    with torch.no_grad():
        want = model(*inputs)
        torch.testing.assert_close(converted(*inputs), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


class Block(nn.Module):
    """A stream with one branch; `case` says what else its forward does."""

    calls: Tensor

    def __init__(self, case: str = "", width: int = 8) -> None:
        super().__init__()
        self.case, self.table = case, nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 12, bias=False), nn.Linear(12, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        if self.case == "asks for the class" and type(self.norm1) is nn.RMSNorm:
            x = x * 2
        if self.case == "asks for the weights" and self.head.weight is not self.table.weight:
            x = x * 2
        y = self.norm1(x)
        if self.case == "norm inside":
            y = F.layer_norm(x, (8,), self.norm1.weight, self.norm1.bias)
        h = self.up(y)
        x = x + self.down(torch.relu(h))
        if self.case == "in place":
            self.calls += 1
        z = self.head(self.norm2(x))
        return (z, self.down(torch.sin(h))) if self.case == "two ways" else z


def ids(tokens: int = 5) -> tuple[Tensor]:
    return (torch.randint(0, 11, (2, tokens), generator=torch.Generator().manual_seed(tokens)),)


def test_what_was_shared_becomes_two() -> None:
    """An embedding whose rows are centred, and a head that took γ on; where nothing changes they stay one."""
    model = moved(Block().double())
    converted = normfx.convert(model, ids())
    assert model.head.weight is model.table.weight
    assert converted.head.weight is not converted.table.weight
    assert converted.up.bias is not None and model.up.bias is None  # β of the norm before it
    assert converted.table.weight.mean(-1).abs().max() < 1e-15
    untouched = normfx.convert(model, ids(), options={"rules": "none"})
    assert untouched.head.weight is untouched.table.weight


def test_for_every_length() -> None:
    model = moved(Block().double())
    shapes = ({1: torch.export.Dim("tokens", min=2, max=64)},)
    converted = normfx.convert(model, ids(), dynamic_shapes=shapes)
    for tokens in (2, 9, 40):
        torch.testing.assert_close(converted(*ids(tokens)), model(*ids(tokens)), rtol=1e-12, atol=1e-12)


def test_a_forward_that_asks_for_the_class_of_a_norm() -> None:
    """It keeps its LayerNorms, of rows without a mean."""
    model = moved(Block("asks for the class").double())
    converted = normfx.convert(model, ids())
    assert norms(converted) == {"LayerNorm": 2}
    torch.testing.assert_close(converted(*ids()), model(*ids()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("asks for the weights", "not the rewritten one"),
        ("norm inside", "not a module of its own"),
        ("two ways", "read in two ways"),
        ("in place", "writes in place"),
    ],
)
def test_refused(case: str, message: str) -> None:
    with pytest.raises(normfx.ConvertError, match=message):
        normfx.convert(moved(Block(case).double()), ids())


POSITIONS = {
    "index": lambda table: table[torch.arange(5)],
    "two indices": lambda table: table.view(1, 16, 8)[torch.zeros(5, dtype=torch.long), torch.arange(5)],
    "between": lambda table: table.view(16, 1, 8)[:, torch.zeros(2, dtype=torch.long)][:5, 0],
    "mask": lambda table: table[torch.arange(16) < 5],
    "index_select": lambda table: table.index_select(0, torch.arange(5)),
}


class Positions(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.places = case, nn.Parameter(torch.randn(16, 8))
        self.table, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.table(ids) + POSITIONS[self.case](self.places)))


@pytest.mark.parametrize("case", POSITIONS)
def test_rows_looked_up_in_a_parameter(case: str) -> None:
    model = moved(Positions(case).double())
    converted = normfx.convert(model, ids())
    assert norms(converted) == {"RMSNorm": 1} and converted.places.mean(-1).abs().max() < 1e-15
    torch.testing.assert_close(converted(*ids()), model(*ids()), rtol=1e-12, atol=1e-12)


ENTRIES = {
    "columns": lambda table: table[:, torch.arange(8)],
    "a mask of entries": lambda table: table[torch.ones_like(table) > 0].view(16, 8),
    "rows of other lengths": lambda table: table.view(8, 16)[torch.arange(8)].reshape(16, 8),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_looked_up_are_no_rows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of what is looked up is not that of a row of the parameter."""
    monkeypatch.setitem(POSITIONS, case, lambda table: ENTRIES[case](table)[:5])
    with pytest.raises(normfx.ConvertError, match="is computed from others"):
        normfx.convert(moved(Positions(case).double()), ids())


class Shared(nn.Module):
    """One linear layer and one norm at several places; γ could be folded at the last one only."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.branches = nn.ModuleList([nn.Linear(6, 6)] * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for branch in self.branches:
            x = x + branch(torch.relu(self.norm(x)))
        return self.leave(self.norm(x))


def test_modules_at_several_places() -> None:
    model, x = moved(Shared().double()), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(normfx.ConvertError, match="became different norms"):
        normfx.convert(model, (x,))
    converted = normfx.convert(model, (x,), options={"rules": "default,-fold_affine"})
    assert converted.branches[0] is converted.branches[1]
    assert converted.branches[0].weight.mean(0).abs().max() < 1e-15
    torch.testing.assert_close(converted(x), model(x), rtol=1e-12, atol=1e-12)


def test_weights_changed_before_the_next_conversion() -> None:
    """Each conversion reads the weights of its own moment."""
    model = moved(Block().double())
    first = normfx.convert(model, ids())
    before = first(*ids())
    with torch.no_grad():
        model.down.weight.mul_(1.5)
    torch.testing.assert_close(first(*ids()), before, rtol=0, atol=0)
    second = normfx.convert(model, ids())
    torch.testing.assert_close(second(*ids()), model(*ids()), rtol=1e-12, atol=1e-12)
    assert (second(*ids()) - before).abs().max() > 1e-3


def test_what_is_no_model_in_eval_mode() -> None:
    with pytest.raises(normfx.ConvertError, match=r"call model.eval\(\)"):
        normfx.convert(Block(), ids())
    wrong: Any = torch.relu
    with pytest.raises(normfx.ConvertError, match=r"takes an nn\.Module, not"):
        normfx.convert(wrong, ids())
    with pytest.raises(normfx.ConvertError, match=r"cannot be exported|the model does not run"):
        normfx.convert(Block().eval(), (torch.zeros(2, 3),))
    with pytest.raises(normfx.OptionError):
        normfx.convert(Block().eval(), ids(), options={"rule": "all"})


def test_values_that_are_not_written_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are the same then, the outputs are not."""
    monkeypatch.setattr(Copy, "_put", lambda self, slot, value: None)
    with pytest.raises(normfx.ConvertError, match=r"is off by|not the rewritten one"):
        normfx.convert(moved(Block().double()), ids())


class Spelled(nn.Module):
    """A norm whose weight is an op after it, or a clamped length, before a linear; or one that a convolution reads."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.enter, self.norm = case, nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=case == "channels")
        self.gamma, self.read, self.patches = nn.Parameter(torch.zeros(8)), nn.Linear(8, 3), nn.Conv1d(8, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        if self.case == "channels":
            out: Tensor = self.patches(self.norm(y).transpose(1, 2))
            return out
        y = self.norm(y) if self.case == "affine" else F.normalize(y, dim=-1) * 8**0.5
        out = self.read(y * (self.gamma + 1))
        return out


@pytest.mark.parametrize("case", ["affine", "length", "channels"])
def test_what_stands_after_a_norm_stays(case: str) -> None:
    """The copy runs the model's code: ops after a norm remain, and so does what no module of torch.nn computes."""
    model, x = moved(Spelled(case).double()), torch.randn(2, 5, 8, dtype=torch.float64)
    converted = normfx.convert(model, (x,))
    assert norms(converted) == {"LayerNorm" if case == "length" or case == "channels" else "RMSNorm": 1}
    torch.testing.assert_close(converted(x), model(x), rtol=1e-11, atol=1e-11)
