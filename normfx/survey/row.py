"""What the survey says of one family, as plain values."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass

from normfx.errors import VerifyError
from normfx.report import SiteReport
from normfx.rules import RMS_NORM_RULES, defer_norm
from normfx.survey.classes import MISSED, kept_because
from normfx.survey.family import Family
from normfx.survey.run import Outcome, survey


@dataclass(frozen=True)
class Kept:
    """A LayerNorm that kept its mean: where, the code and text of each refusal, and the class they come to."""

    site: str
    because: str
    codes: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One family. layer_norms, rms_norms: as the model has them; converted: LayerNorms that became RMSNorms; deferred:
    others that `defer_norm` made a factor of the products that read them.

    failure: what went wrong, if something did; skipped: the package that is missing
    """

    family: str
    package: str
    depth: str
    layer_norms: int = 0
    rms_norms: int = 0
    converted: int = 0
    deferred: int = 0
    kept: tuple[Kept, ...] = ()
    graphs: int = 0
    error: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    skipped: str = ""


def row(family: Family, train: bool = False, defer: bool = False) -> Row:
    """Survey one family. Never raises: the rest of the zoo goes on."""
    named = (family.name, family.package, family.depth)
    if importlib.util.find_spec(family.package) is None:
        return Row(*named, skipped=family.package)
    begin = time.perf_counter()
    try:
        return _row(named, survey(family, train, defer))
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Row(*named, seconds=time.perf_counter() - begin, failure=failure)


def _row(named: tuple[str, str, str], outcome: Outcome) -> Row:
    """Raises VerifyError where a LayerNorm kept its mean for no reason."""
    counts = outcome.report.counts
    stayed = [site for site in outcome.report.sites if site.kind == "LayerNorm" and not site.to_rms_norm]
    deferred = [site for site in stayed if defer_norm.RULE.name in site.rules]
    kept = (*(_kept(site) for site in stayed if site not in deferred), *([Kept("", MISSED)] * outcome.missed))
    if wordless := [k.site for k in kept if not k.because]:
        raise VerifyError(f"kept without a reason: {', '.join(wordless)}")
    return Row(
        *named,
        layer_norms=counts["layer_norm"] + outcome.missed,
        rms_norms=counts["rms_norm"],
        converted=counts["to_rms_norm"],
        deferred=len(deferred),
        kept=kept,
        graphs=counts["graphs"],
        error=outcome.error,
        seconds=outcome.seconds,
    )


def _kept(site: SiteReport) -> Kept:
    refusals = [r for r in site.refusals if r.rule in RMS_NORM_RULES]
    codes, details = tuple(r.code for r in refusals), tuple(r.detail for r in refusals)
    return Kept(site.name, kept_because(site), codes, details)
