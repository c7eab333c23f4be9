"""Random residual networks: programs over the M3 ops, writers, norms and observers, as nn.Modules."""

from __future__ import annotations

import torch
from border_programs import BORDER_OBSERVERS, BORDER_OPS
from border_programs import FORMS as BORDER_FORMS
from hypothesis import strategies as st
from norm_programs import FORMS as NORM_FORMS
from norm_programs import NORM_OBSERVERS, NORM_OPS
from token_programs import FORMS as TOKEN_FORMS
from token_programs import TOKEN_OBSERVERS, TOKEN_OPS, TOKEN_TRAPS, At
from torch import Tensor, nn
from torch.nn import functional as F
from weight_programs import FORMS as WEIGHT_FORMS
from weight_programs import WEIGHT_OBSERVERS, WEIGHT_OPS, WEIGHT_TRAPS

BATCH, TOKENS, WIDTH, HEADS, VOCABULARY = 2, 4, 8, 2, 11
FORMS = TOKEN_FORMS | WEIGHT_FORMS | BORDER_FORMS | NORM_FORMS

STREAM_OPS = (
    "branch", "branch", "branch", "write", "layer_scale", "conv_write", "head_write", "number", "add_number", "negate",
    "token_gate", "add_token_scalar", "add_token_flag",
    "add_table", "roll", "flip", "cut_and_pad", "join_token", "cumsum", "token_mean",
    "swap_axes", "split_heads", "mix_tokens", "mix_tokens_bias", "mask", "choose", "gather", "depth_mean", "stack_sum",
    "inplace_add", "cast", "dropout_eval", "half", "detach", "matmul_tokens", "divide_token", "double_view",
    "frozen_write", "detached_scale", *TOKEN_OPS, *WEIGHT_OPS, *NORM_OPS,
)  # fmt: skip
"""Ops a centred stream passes, or writers."""
BREAKING_OPS = (
    "channel_gate",
    "clamp",
    "tanh",
    "post_norm",
    "inplace_alias",
    "feature_roll",
    "softmax",
    "norm_plain",
    *TOKEN_TRAPS,
    *WEIGHT_TRAPS,
)
OBSERVERS = (
    "norm_out",
    "scaled_norm",
    "raw_out",
    "raw_linear",
    "feature_mean",
    "norm_tanh",
    "two_readers",
    "double_norm",
    "frozen_norm",
    "detached_norm",
    "frozen_scaled",
    "scaled_frozen",
    "moved_frozen",
    *TOKEN_OBSERVERS,
    *WEIGHT_OBSERVERS,
    *NORM_OBSERVERS,
)

NORMS = frozenset(OBSERVERS) - {
    *TOKEN_OBSERVERS,
    *WEIGHT_OBSERVERS,
    *NORM_OBSERVERS,
    "raw_out",
    "raw_linear",
    "feature_mean",
    "two_readers",
} | {"post_norm"}
"""Ops with a norm of their own."""

BORDERS = (*BORDER_OPS, *BORDER_OBSERVERS)
"""Steps that need Dynamo's trace."""

Step = tuple[str, int]


def programs(max_steps: int = 9) -> st.SearchStrategy[tuple[Step, ...]]:
    """Lists of steps; each step names an op and which earlier value it takes."""
    op = st.sampled_from(STREAM_OPS * 3 + BREAKING_OPS + OBSERVERS * 2)
    return st.lists(st.tuples(op, st.integers(0, 3)), min_size=2, max_size=max_steps).map(tuple)


class Program(nn.Module):
    """Runs a program on embedded tokens. Returns the outputs of all observers and a final norm read by a linear."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.final, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.parts = nn.ModuleDict()
        self.vectors = nn.ParameterDict()
        for i, (op, _) in enumerate(steps):
            self._declare(op, str(i))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) * 0.5 + (0.5 if p.ndim == 1 else 0.0))

    def _declare(self, op: str, key: str) -> None:
        d = WIDTH
        form = FORMS.get(op)
        if form is not None:
            if form.parts is not None:
                self.parts[key] = form.parts()
            if form.shape is not None:
                self.vectors[key] = nn.Parameter(torch.empty(form.shape))
        elif op == "branch":
            self.parts[key] = nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, 6), nn.Linear(6, d)])
        elif op in ("write", "raw_linear", "layer_scale", "inplace_add", "frozen_write", "detached_scale"):
            self.parts[key] = nn.Linear(d, d)
        elif op == "conv_write":
            self.parts[key] = nn.Conv1d(d, d, 3, padding=1)
        elif op == "head_write":
            self.parts[key] = nn.ModuleList([nn.Linear(d, 2 * d), nn.LayerNorm(d), nn.Linear(2 * d, d, bias=False)])
        elif op in ("mix_tokens", "mix_tokens_bias"):
            self.parts[key] = nn.Linear(TOKENS, TOKENS, bias=op.endswith("bias"))
        elif op in NORMS:
            self.parts[key] = nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, 3), nn.LayerNorm(d)])
        elif op == "two_readers":
            self.parts[key] = nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, 3), nn.Linear(d, 5, bias=False)])
        shapes = {
            "frozen_write": (d,), "detached_scale": (d,), "layer_scale": (d,),
            "token_gate": (TOKENS, 1), "add_token_scalar": (TOKENS, 1), "channel_gate": (d,),
            "add_table": (TOKENS, d), "join_token": (1, 1, d), "divide_token": (TOKENS, 1),
            "matmul_tokens": (TOKENS, TOKENS),
        }  # fmt: skip
        if op in shapes:
            self.vectors[key] = nn.Parameter(torch.empty(shapes[op]))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        values, outputs = [self.table(ids)], []
        for i, (op, back) in enumerate(self.steps):
            x = values[-1 - back % len(values)]
            if op in FORMS:
                at = At(x, values[0], values[-3:], ids, self._part(str(i)), self._vector(str(i)))
                (outputs if op in OBSERVERS or op in BORDER_OBSERVERS else values).append(FORMS[op].run(at))
            elif op in OBSERVERS:
                outputs += self._observe(op, str(i), x)
            else:
                values.append(self._stream(op, str(i), x, values[0]))
        return (*outputs, self.head(self.final(values[-1])))

    def _part(self, key: str) -> nn.Module | None:
        return self.parts[key] if key in self.parts else None  # noqa: SIM401  # a ModuleDict has no get

    def _vector(self, key: str) -> Tensor | None:
        return self.vectors[key] if key in self.vectors else None  # noqa: SIM401  # nor has a ParameterDict

    def _observe(self, op: str, key: str, x: Tensor) -> list[Tensor]:
        part = self._part(key)
        if op == "norm_out":
            return [part[0](x)]
        if op == "scaled_norm":
            return [part[1](part[0](x) * 0.5)]
        if op == "norm_tanh":
            return [torch.tanh(part[0](x))]
        if op == "double_norm":
            return [part[1](part[0](x)), part[2](x)]
        if op == "two_readers":
            y = part[0](x).transpose(0, 1)
            return [part[1](y), part[2](y[:, :1])]
        if op == "detached_norm":
            return [part[1](part[0](x).detach())]
        if op in ("frozen_norm", "frozen_scaled"):
            with torch.no_grad():
                y = part[0](x)
            return [part[1](y * 2.0 if op == "frozen_scaled" else y)]
        if op in ("scaled_frozen", "moved_frozen"):
            y = part[0](x)
            with torch.no_grad():
                z = y * 2.0 if op == "scaled_frozen" else y.transpose(0, 1)
            return [part[1](z)]
        if op == "raw_linear":
            return [part(x)]
        return [x if op == "raw_out" else x.mean(-1)]

    def _stream(self, op: str, key: str, x: Tensor, first: Tensor) -> Tensor:  # one line an op
        part = self._part(key)
        vector = self._vector(key)
        if op == "branch":
            return x + part[2](torch.relu(part[1](part[0](x))))
        if op == "write":
            return x - part(torch.sin(first)) * 2.0
        if op == "layer_scale":
            return x + vector * part(torch.cos(first))
        if op == "frozen_write":
            with torch.no_grad():
                y = part(torch.cos(first))
            return x + vector * y
        if op == "detached_scale":
            return x + vector * part(torch.cos(first)).detach()
        if op == "conv_write":
            return x + part(torch.sin(first).transpose(1, 2)).transpose(1, 2)
        if op == "head_write":
            return x + part[2](part[1](part[0](torch.sin(first)).unflatten(-1, (2, WIDTH))).flatten(-2))
        if op == "number":
            return x * 1.5
        if op == "add_number":
            return x + 2.0
        if op == "negate":
            return 1.0 - x
        if op == "token_gate":
            return x * vector
        if op == "divide_token":
            return x / (vector.abs() + 1.0)
        if op == "add_token_flag":
            return x + (torch.arange(TOKENS) > 1)[:, None]
        if op == "add_token_scalar":
            return x + vector
        if op == "add_table":
            return x + vector
        if op == "roll":
            return x.roll(1, 1)
        if op == "flip":
            return x.flip(1) + x
        if op == "cut_and_pad":
            return F.pad(x[:, 1:], (0, 0, 1, 0))
        if op == "join_token":
            return torch.cat([vector.expand(x.shape[0], -1, -1), x], 1)[:, :TOKENS]
        if op == "cumsum":
            return x.cumsum(1)
        if op == "token_mean":
            return x + x.mean(1, keepdim=True)
        if op == "swap_axes":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if op == "split_heads":
            return (
                x.view(BATCH, TOKENS, HEADS, -1).permute(0, 2, 1, 3).permute(0, 2, 1, 3).reshape(BATCH, TOKENS, WIDTH)
            )
        if op in ("mix_tokens", "mix_tokens_bias"):
            return x + part(x.transpose(1, 2)).transpose(1, 2)
        if op == "matmul_tokens":
            return x + torch.matmul(vector, x)
        if op == "mask":
            return x.masked_fill((torch.arange(TOKENS) > 2)[:, None], 0.0)
        if op == "choose":
            return torch.where((torch.arange(TOKENS) > 1)[:, None], x, first)
        if op == "gather":
            return x[:, torch.tensor([2, 0, 1, 3])]
        if op == "depth_mean":
            return 0.25 * x + 0.75 * first
        if op == "stack_sum":
            return torch.stack([x, first], 0).sum(0)
        if op == "inplace_add":
            y = x * 1.0
            y += part(torch.sin(first))
            return y
        if op == "cast":
            return x.to(torch.float64)
        if op == "dropout_eval":
            return F.dropout(x, 0.5, training=False)
        if op == "half":
            a, b = x.chunk(2, 1)
            return torch.cat([b, a], 1)
        if op == "detach":
            return x + x.detach()
        if op == "double_view":
            return x.reshape(-1, WIDTH).reshape(BATCH, TOKENS, WIDTH)
        if op == "channel_gate":
            return x * vector
        if op == "clamp":
            return x.clamp(-1.0, 1.0)
        if op == "tanh":
            return x + torch.tanh(x)
        if op == "post_norm":
            return part[0](x + torch.sin(first))
        if op == "norm_plain":
            return x + F.layer_norm(x, (WIDTH,))
        if op == "inplace_alias":
            y = x.clone()
            view = y[:, 0]
            y *= 2.0
            return y + view[:, None]
        if op == "feature_roll":
            return x.roll(1, -1)
        assert op == "softmax"
        return x.softmax(-1)


def tokens() -> Tensor:
    """Token numbers of shape (BATCH, TOKENS)."""
    return torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))
