"""Options of the backend: one frozen value, parsed once; the only reader of NORMFX_* variables."""

from __future__ import annotations

import os
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
VARIABLES = ("NORMFX_RULES", "NORMFX_DEBUG", "NORMFX_VERIFY", "NORMFX_STRICT")
KEYS = ("rules", "fold", "lowering", "products", *RULE_OPTIONS, "strict", "verify", "inductor", "mode")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="normfx", options={...})` accepts.

    rules:     names of the rules that may fire, in the order of RULE_NAMES
    fold:      "live" writes folds as graph expressions on the parameters; "cached" keeps their values where no gradient
               is needed and renews them when a parameter changed; "frozen" adds a variant with constants; "auto":
               frozen where Inductor's `freezing` is on, else cached on the CPU where the kernel tells which pages were
               written, and live elsewhere
    lowering:  "inductor" hands every norm to Inductor; "triton" runs norms on generated kernels where there are any
               (on CUDA); "auto" where they are predicted to move fewer bytes and were tested
    products:  which library multiplies float32 matrices on the CPU where a weight is not packed, in training above all:
               "aten" is torch's own choice; "onednn" takes oneDNN for all of them; "auto" the one that is faster for
               their shapes on this machine
    rule_options: the rules' own options, by name, all of them (see docs/options.md)
    strict:    raise when a stage of normfx fails, in place of compiling the untouched graph
    verify:    on the first call also run the original graph and compare
    mode:      Inductor's mode ("reduce-overhead", "max-autotune", …), as torch.compile's `mode=`
    inductor:  options passed on to Inductor
    debug:     0 silent, 1 plan, 2 graphs, 3 kernels (from NORMFX_DEBUG)
    check:     check graph invariants between stages (from NORMFX_VERIFY)
    """

    rules: tuple[str, ...] = DEFAULT_RULES
    fold: str = "auto"
    lowering: str = "auto"
    products: str = "auto"
    rule_options: Mapping[str, str] = field(default_factory=lambda: {key: v[0] for key, v in RULE_OPTIONS.items()})
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
            lowering=_choice(given, "lowering", LOWERINGS),
            products=_choice(given, "products", PRODUCTS),
            rule_options={key: _choice(given, key, values) for key, values in RULE_OPTIONS.items()},
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
        words = [str(w) for w in spec]
        if not words:
            return ()
    else:
        raise OptionError(f"normfx: {where} must be a string or a list of rule names, not {type(spec).__name__}")
    sets = {"default": DEFAULT_RULES, "all": RULE_NAMES, "none": ()}
    chosen, fresh = set(start), True
    for word in words:
        sign, name = (word[0], word[1:].strip()) if word[0] in "+-" else ("", word)
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
