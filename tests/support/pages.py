"""Reports to make pages of: one as long as one likes, and one whose names try to be markup."""

from __future__ import annotations

from normfx.records import CostReport, FoldReport, GraphBreak, GraphReport, RefusalReport, SiteReport, StepReport
from normfx.report import Report

RUNS = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"
"""What must stay text wherever it stands."""

OBSERVED = "the stream's mean is read by something other than a LayerNorm over the same features"


def long_report(norms: int) -> Report:
    """A pre-norm transformer of so many norms; every tenth is left alone, every other tenth only folded."""
    before, after = ["ids: i64[2, 16]", "%0 = embedding(wte.weight, ids): f32[2, 16, 64]"], ["ids: i64[2, 16]"]
    after += ["%0 = center(wte.weight, dim=1): f32[99, 64]", "%1 = embedding(%0, ids): f32[2, 16, 64]"]
    steps = [
        StepReport("writer", 0, "wte", "embedding", "f32[2, 16, 64]", 1, centred=True, source="model.py:8 in forward")
    ]
    sites, x, y = [], 0, 1
    for i in range(norms):
        name, source = f"h.{i}.ln", f"model.py:{i % 7 + 20} in forward: x = x + self.f(self.ln(x))"
        first, later = len(before), len(after)
        before += [
            f"%{x + 1} = layer_norm(%{x}, [64], {name}.weight, {name}.bias): f32[2, 16, 64]  # {name}",
            f"%{x + 2} = linear(%{x + 1}, h.{i}.up.weight, h.{i}.up.bias): f32[2, 16, 256]",
            f"%{x + 3} = gelu(%{x + 2}): f32[2, 16, 256]",
            f"%{x + 4} = linear(%{x + 3}, h.{i}.down.weight, h.{i}.down.bias): f32[2, 16, 64]",
            f"%{x + 5} = add(%{x}, %{x + 4}): f32[2, 16, 64]",
        ]
        after += [
            f"%{y + 1} = rms_norm(%{y}, dim=2, eps=1e-05): f32[2, 16, 64]  # {name}",
            f"%{y + 2} = scale_features(h.{i}.up.weight, {name}.weight, dim=1): f32[256, 64]",
            f"%{y + 3} = linear(%{y + 1}, %{y + 2}, h.{i}.up.bias): f32[2, 16, 256]",
            f"%{y + 4} = gelu(%{y + 3}): f32[2, 16, 256]",
            f"%{y + 5} = linear(%{y + 4}, h.{i}.down.weight, h.{i}.down.bias): f32[2, 16, 64]",
            f"%{y + 6} = add(%{y}, %{y + 5}): f32[2, 16, 64]",
        ]
        x, y = x + 5, y + 6
        rules = (("pre_rms_norm", "fold_affine"), (), ("fold_affine",))[{3: 1, 6: 2}.get(i % 10, 0)]
        found = RefusalReport(
            "pre_rms_norm",
            "observed",
            f"{OBSERVED}: add_{i} is read by output",
            "do not return it",
            (),
            OBSERVED,
            source,
        )
        refusals = () if "pre_rms_norm" in rules else (found,)
        costs = tuple(CostReport(rule, "8,192", "0") for rule in rules)
        sites.append(
            SiteReport(
                name, "LayerNorm", rules, refusals, source, readers=(f"h.{i}.up (linear)",), costs=costs,
                before=(first,), after=(later,),
            )
        )  # fmt: skip
        steps += [
            StepReport("norm", 0, name, "LayerNorm", "f32[2, 16, 64]", first, i, source=source),
            StepReport("writer", 0, f"h.{i}.down", "linear", "f32[2, 16, 64]", first + 3, centred=True, source=source),
            StepReport("sum", 0, f"h.{i}", "add", "f32[2, 16, 64]", first + 4, centred=True, source=source),
        ]
    before, after = [*before, f"return [%{x}]"], [*after, f"return [%{y}]"]
    sizes = {"pre_rms_norm": ("8,192", "4,096")}
    graph = GraphReport(
        tuple(sites), "\n".join(before) + "\n", "\n".join(after) + "\n", folds=norms,
        seconds={"capture": 1.5, "plan": 0.2}, bytes=sizes, saved={"pre_rms_norm": 4096},
        function="forward (model.py:41)", compile_id="0/0", steps=tuple(steps),
    )  # fmt: skip
    return Report((graph,), environment={"torch": "2.14", "device": "none"})


def hostile_report() -> Report:
    """Every string that a user, a model or torch's own errors may bring is RUNS; a kind is one of ours."""
    refusal = RefusalReport(*[RUNS] * 4, (RUNS,), RUNS, RUNS)
    site = SiteReport(
        RUNS, "LayerNorm", (RUNS,), (refusal,), RUNS, RUNS, RUNS, (RUNS,), (CostReport(RUNS, RUNS, RUNS),), (0,), (0,)
    )
    step = StepReport("norm", 0, RUNS, RUNS, RUNS, 0, 0, source=RUNS)
    writer = StepReport("writer", 0, RUNS, RUNS, RUNS, 0, source=RUNS)
    graph = GraphReport(
        (site,), f"%0 = {RUNS}  # {RUNS}\n", f"{RUNS}\n", {RUNS: f'x = "{RUNS}"  # </code></pre>{RUNS}'}, 1, 1,
        {RUNS: 0.1},
        FoldReport((RUNS,)), (site,), {RUNS: (RUNS, RUNS)}, {RUNS: 1}, RUNS, RUNS, steps=(writer, step),
    )  # fmt: skip
    return Report((graph,), 1, (GraphBreak(RUNS, RUNS, RUNS),), RUNS, {RUNS: RUNS})
