"""Options of the backend: one frozen value, parsed once; the only reader of NORMFX_* variables."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normfx.errors import NormfxWarning, OptionError, did_you_mean
from normfx.rules import RULES

RULE_NAMES = tuple(rule.name for rule in RULES)
"""Every rule of this version, in the order in which they are decided."""
DEFAULT_RULES = tuple(rule.name for rule in RULES if rule.default)
RULE_OPTIONS = {key: values for rule in RULES for key, values in rule.options.items()}
"""The options that rules have of their own, each with its values, the default first."""
FOLDS = ("auto", "live", "cached", "frozen")
LOWERINGS = ("auto", "triton", "inductor")
PRODUCTS = ("auto", "aten", "onednn")
ATTENTIONS = ("auto", "aten", "normfx")
MALLOCS = ("default", "keep")
VARIABLES = (
    "NORMFX_RULES", "NORMFX_DEBUG", "NORMFX_VERIFY", "NORMFX_STRICT", "NORMFX_FOLD_MEMORY", "NORMFX_MALLOC",
)  # fmt: skip
KEYS = (
    "rules", "fold", "fold_memory", "lowering", "products", "attention", *RULE_OPTIONS, "malloc", "strict", "verify",
    "inductor", "mode",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="normfx", options={...})` accepts.

    rules:     names of the rules that may fire, in the order of RULE_NAMES
    fold:      "live" writes folds as graph expressions on the parameters; "cached" keeps their values where no gradient
               is needed and renews them when a parameter changed; "frozen" adds a variant with constants; "auto":
               frozen where Inductor's `freezing` is on, else cached on the CPU where the kernel tells which pages were
               written, and live elsewhere
    fold_memory: bytes that all kept, packed and frozen weights of the process may take on a device, as a number or as
               "512MiB", "2 GB"; None ("auto"): a quarter of the device's memory. Never more than half of what is
               available when a model is compiled
    lowering:  "inductor" hands every norm to Inductor; "triton" runs norms on generated kernels where there are any
               (on CUDA); "auto" where they are predicted to take less time and were tested
    products:  which library multiplies float32 matrices on the CPU where a weight is not packed, in training above all:
               "aten" is torch's own choice; "onednn" takes oneDNN for all of them; "auto" the one that is faster for
               their shapes on this machine
    attention: what computes attention on the CPU in float32 and bfloat16: "aten" is torch's own kernel; "normfx" takes
               the one of normfx wherever it can; "auto" the one that is faster for their shapes on this machine
    rule_options: the rules' own options, by name, all of them (see docs/options.md)
    malloc:    "keep": the process keeps the memory that it frees, for the next call (glibc only; normfx.allocator)
    strict:    raise when a stage of normfx fails, instead of compiling the untouched graph
    verify:    on the first call also run the original graph and compare
    mode:      Inductor's mode ("reduce-overhead", "max-autotune", …), as torch.compile's `mode=`
    inductor:  options passed on to Inductor
    debug:     0 silent, 1 plan, 2 graphs, 3 kernels (from NORMFX_DEBUG)
    check:     check graph invariants between stages (from NORMFX_VERIFY)
    """

    rules: tuple[str, ...] = DEFAULT_RULES
    fold: str = "auto"
    fold_memory: int | None = None
    lowering: str = "auto"
    products: str = "auto"
    attention: str = "auto"
    rule_options: Mapping[str, str] = field(default_factory=lambda: {key: v[0] for key, v in RULE_OPTIONS.items()})
    malloc: str = "default"
    strict: bool = False
    verify: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    debug: int = 0
    check: bool = False

    @classmethod
    def parse(
        cls,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Options:
        """Options from the mapping given to torch.compile, then the NORMFX_* environment variables.

        Raises OptionError, listing the valid ones, for an unknown key, rule or value.
        """
        given = dict(options or {})
        env = os.environ if environ is None else environ
        _warn_of_unknown(env)
        for key in given:
            if key not in KEYS:
                raise OptionError.unknown("option", key, KEYS, "options")
        if mode is not None and given.get("mode") not in (None, mode):
            raise OptionError(f"normfx: mode={mode!r} and options['mode']={given['mode']!r} disagree; give one")
        rules = parse_rules(given.get("rules", "default"), DEFAULT_RULES, "options['rules']")
        rules = parse_rules(env.get("NORMFX_RULES", ""), rules, "NORMFX_RULES")
        inductor = given.get("inductor") or {}
        if not isinstance(inductor, Mapping):
            raise OptionError(f"normfx: options['inductor'] must be a mapping, not {type(inductor).__name__}")
        return cls(
            rules=rules,
            fold=_choice(given, "fold", FOLDS),
            fold_memory=_memory(given, env),
            lowering=_choice(given, "lowering", LOWERINGS),
            products=_choice(given, "products", PRODUCTS),
            attention=_choice(given, "attention", ATTENTIONS),
            rule_options={key: _choice(given, key, values) for key, values in RULE_OPTIONS.items()},
            malloc=_choice(_overridden(given, "malloc", env, "NORMFX_MALLOC"), "malloc", MALLOCS),
            strict=_flag(given, "strict") or _env_flag(env, "NORMFX_STRICT"),
            verify=_flag(given, "verify"),
            mode=mode or given.get("mode"),
            inductor=dict(inductor),
            debug=_env_level(env, "NORMFX_DEBUG"),
            check=_env_flag(env, "NORMFX_VERIFY"),
        )


def parse_rules(spec: str | Iterable[str], start: tuple[str, ...], where: str) -> tuple[str, ...]:
    """'default,+a,-b', 'all', 'none', 'a,b' or a list of such words → rule names in RULE_NAMES order.

    A word with a sign changes the set so far (at first `start`); plain names replace it.
    """
    if isinstance(spec, str):
        words = [w.strip() for w in spec.split(",") if w.strip()]
    elif isinstance(spec, Iterable) and not isinstance(spec, Mapping):
        words = [str(w).strip() for w in spec]
        if not words:
            return ()
    else:
        raise OptionError(f"normfx: {where} must be a string or a list of rule names, not {type(spec).__name__}")
    sets = {"default": DEFAULT_RULES, "all": RULE_NAMES, "none": ()}
    chosen, fresh = set(start), True
    for word in words:
        sign, name = (word[0], word[1:].strip()) if word[:1] in ("+", "-") else ("", word)
        if name not in sets and name not in RULE_NAMES:
            raise OptionError.unknown("rule", name, (*RULE_NAMES, *sets), where)
        members = set(sets.get(name, (name,)))
        if sign == "-":
            chosen -= members
        elif sign == "+" or not fresh:
            chosen |= members
        else:
            chosen = members
        fresh = False
    return tuple(rule for rule in RULE_NAMES if rule in chosen)


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Give this NormfxWarning, unless it was given before in this process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, NormfxWarning, stacklevel=3)


def _warn_of_unknown(env: Mapping[str, str]) -> None:
    for name in env:
        if name.startswith("NORMFX_") and name not in VARIABLES:
            meant = did_you_mean(name, VARIABLES)
            warn_once(
                f"normfx: the environment variable {name} has no meaning;{meant and f' {meant}'} "
                f"valid: {', '.join(VARIABLES)}"
            )


def _choice(given: Mapping[str, Any], key: str, valid: tuple[str, ...]) -> str:
    value = given.get(key, valid[0])
    if value not in valid:
        raise OptionError.unknown("value", value, valid, f"options[{key!r}]")
    return str(value)


UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def parse_bytes(size: int | str, where: str) -> int:
    """A number of bytes, as a number or as text with a unit.

    >>> parse_bytes("1.5 GiB", "options['fold_memory']"), parse_bytes(4096, "options['fold_memory']")
    (1610612736, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    if isinstance(size, bool) or not isinstance(size, (int, str)) or not found or found[2] not in UNITS:
        raise OptionError(
            f"normfx: {where} must be 'auto' or a number of bytes, such as 2147483648, '512MiB' or '2 GB', not {size!r}"
        )
    return int(float(found[1]) * UNITS[found[2]]) if "." in found[1] else int(found[1]) * UNITS[found[2]]


def _memory(given: Mapping[str, Any], env: Mapping[str, str]) -> int | None:
    where = "NORMFX_FOLD_MEMORY" if env.get("NORMFX_FOLD_MEMORY") else "options['fold_memory']"
    size = _overridden(given, "fold_memory", env, "NORMFX_FOLD_MEMORY").get("fold_memory", "auto")
    return None if size is None or size == "auto" else parse_bytes(size, where)


def _overridden(given: Mapping[str, Any], key: str, env: Mapping[str, str], variable: str) -> Mapping[str, Any]:
    """The options, with what the environment variable says where it is set."""
    return {**given, key: env[variable].strip()} if env.get(variable, "").strip() else given


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise OptionError(f"normfx: options[{key!r}] must be True or False, not {value!r}")
    return value


def _env_flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "0").strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise OptionError.unknown("value", value, ("0", "1"), name)
    return value in ("1", "true")


def _env_level(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "0").strip() or "0"
    if value not in ("0", "1", "2", "3"):
        raise OptionError.unknown("value", value, ("0", "1", "2", "3"), name)
    return int(value)
