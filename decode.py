"""Decoding: one token a row and step, all rows together, from a cache of their prefixes.

Dimensions: B prefixes, N rows, P prefix slots, S suffix slots, L own slots, D width, H query heads,
K key-value heads, E head width; of attention, R rows of the prompt that has most, g query heads of
one key head, b = B K, n = N K.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_tree import FAMILIES, Tree

ROWS_AT_ONCE = 8  # rows that the packed weights of a CPU are laid out for; others work as well
RECORDED_SLOTS = 256  # a recorded decode step attends to a multiple of so many of a row's own slots


@dataclass
class Cache:
    """What the layers keep of B prefixes, and where their suffixes go on.

    layers: keys and values [B, K, P, E] each, padded on the right, or a Recurrence's window and
    state; lengths, next_position: B ints. features: what the vision tower said of the prefixes, for
    scoring, where the tower is frozen.
    """
    lengths: list[int]
    next_position: list[int]
    layers: list[tuple[Tensor, Tensor]]
    features: Any = None
    linears: dict = field(default_factory=dict)

    def linear(self, *layers: nn.Linear) -> Callable:
        """Return `packed(layers)`, made once for the tries and repairs of a step."""
        if layers not in self.linears:
            self.linears[layers] = packed(layers)
        return self.linears[layers]


class DecodeRows:
    """What the layers keep of N rows, growing, and the one-token forward through them.

    A prefix's keys and values stand once, whatever the number of its rows: the queries of all its
    rows meet them in one product. A row's own slots are [suffix, padded | completion], so that a
    step writes the same slot of all (`own`: per layer keys and values [2, n, L, E]); one softmax
    runs over prefix and own slots. A recurrent layer has a window and a state of each row (`own`
    as well), which a step renews in place.

    `record` (cuda_graph) makes a step's kernels, on slots whose number then is fixed for many
    steps, into a function that repeats them; without it a step sees just the slots in use.
    """

    def __init__(self, model: nn.Module, cache: Cache, tree: Tree, ends: list[int],
                 max_completion: int, record: Callable | None = None):
        text, lengths, device = model.model.language_model, tree.suffix_lengths, tree.device
        self.record, self.recorded = record, 0
        self.slots_L = torch.arange(max(lengths) + max_completion, device=device)
        self.at_1 = self.slots_L[:1].clone()
        self.embed, self.norm, self.base = text.embed_tokens, text.norm, max(lengths)
        self.family = FAMILIES[model.config.model_type]
        self.layers = [self._parts(layer, cache.linear) for layer in text.layers]
        self.recurrent = [hasattr(layer, "linear_attn") for layer in text.layers]
        first = cache.layers[self.recurrent.index(False)][0]
        self.key_heads, self.width = first.shape[1], first.shape[3]
        self.prefixes = [None if recurrent else tuple(x.flatten(0, 1) for x in pair)
                         for recurrent, pair in zip(self.recurrent, cache.layers)]
        self.own = [tuple(x.clone() for x in pair) if recurrent else
                    F.pad(torch.stack(pair).flatten(1, 2), (0, 0, 0, max_completion))
                    for recurrent, pair in zip(self.recurrent, tree.store)]
        self.prefix_bias = self.own_bias = None
        dtype = first.dtype
        if len(set(cache.lengths)) > 1:
            slots_P = torch.arange(first.shape[2], device=device)
            self.prefix_bias = _bias(slots_P < _column(cache.lengths, device), dtype)
        if len(set(lengths)) > 1 or record:
            own = (self.slots_L < _column(lengths, device)) | (self.slots_L >= self.base)
            self.own_bias = _bias(own, dtype)
        positions_NC = _column(ends, device) + torch.arange(max_completion, device=device)
        cos, sin = text.rotary_emb(first, positions_NC.expand(3, -1, -1))
        sin[..., :sin.shape[-1] // 2] *= -1  # the sign of the half-split rotation
        self.cos_NC1E, self.sin_NC1E = cos[:, :, None], sin[:, :, None]
        self.prompts = list(range(len(cache.lengths)))
        self._place(tree.owners.tolist())

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.recorded = 0
        self.own = [tuple(x[rows] for x in own) if recurrent else self._some(own, rows, 1)
                    for recurrent, own in zip(self.recurrent, self.own)]
        self.own_bias = None if self.own_bias is None else self.own_bias[rows]
        self.cos_NC1E, self.sin_NC1E = self.cos_NC1E[rows], self.sin_NC1E[rows]
        self._place([self.owners[n] for n in rows.tolist()])

    def _place(self, owners):
        """Lay the rows out by prompt: grid [B, R] of row numbers, short rows filled up with any."""
        self.owners, live = owners, sorted(set(owners))
        if live != self.prompts:
            device = self.at_1.device
            kept = torch.tensor([self.prompts.index(b) for b in live], device=device)
            self.prefixes = [pair and tuple(self._some(x, kept) for x in pair)
                             for pair in self.prefixes]
            self.prefix_bias = None if self.prefix_bias is None else self.prefix_bias[kept]
            self.prompts = live
        rows = [[n for n, owner in enumerate(owners) if owner == b] for b in live]
        R, self.grid, self.back = max(len(row) for row in rows), None, None
        grid = [n for row in rows for n in row + row[:1] * (R - len(row))]
        if grid != list(range(len(owners))):
            back = [grid.index(n) for n in range(len(owners))]
            self.grid, self.back = (torch.tensor(x, device=self.at_1.device)
                                    for x in (grid, back))

    def _some(self, x, chosen, dim=0):
        """Return all heads of the chosen rows or prompts, side by side in dimension `dim`."""
        x = x.unflatten(dim, (-1, self.key_heads))
        return x.index_select(dim, chosen).flatten(dim, dim + 1)

    def _together(self, x_ngE):
        """Lay the rows of one prompt side by side: [B K, R g, E]."""
        (n, g, E), B, K = x_ngE.shape, len(self.prompts), self.key_heads
        x = x_ngE.view(n // K, K, g, E)
        x = x if self.grid is None else x.index_select(0, self.grid)
        return x.view(B, -1, K, g, E).transpose(1, 2).reshape(B * K, -1, E)

    def _apart(self, x_brE, g):
        """Undo `_together`: [N K, g, E]."""
        (b, r, E), K = x_brE.shape, self.key_heads
        x = x_brE.view(b // K, K, r // g, g, E).transpose(1, 2)
        x = x if self.back is None else x.flatten(0, 1).index_select(0, self.back)
        return x.reshape(-1, g, E)

    def _attend(self, q_NHE, layer, slots, own_bias):
        """Return softmax(q kᵀ / √E) v over [prefix, own slots] of every row: [N, H E]."""
        (keys_bPE, values_bPE), (keys_nLE, values_nLE) = self.prefixes[layer], self.own[layer]
        keys_nLE, values_nLE = keys_nLE[:, :slots], values_nLE[:, :slots]
        (N, H, E), P = q_NHE.shape, keys_bPE.shape[1]
        q_ngE = (q_NHE * E ** -0.5).view(len(keys_nLE), -1, E)
        prefix_brP = torch.bmm(self._together(q_ngE), keys_bPE.transpose(1, 2))
        own_ngL = torch.bmm(q_ngE, keys_nLE.transpose(1, 2))
        if self.prefix_bias is not None:
            prefix_brP.unflatten(0, (-1, self.key_heads)).add_(self.prefix_bias)
        if own_bias is not None:
            own_ngL.unflatten(0, (N, -1)).add_(own_bias)
        scores = torch.cat([prefix_brP, self._together(own_ngL)], dim=-1)
        p = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        out_ngE = self._apart(torch.bmm(p[..., :P], values_bPE), q_ngE.shape[1])
        own_ngL = self._apart(p[..., P:], q_ngE.shape[1])
        return torch.baddbmm(out_ngE, own_ngL, values_nLE).view(N, H * E)

    @torch.inference_mode()  # without autograd's bookkeeping, which takes time even unused
    def step(self, token_N: Tensor, t: int) -> Tensor:
        """Return hidden states [N, D] after the t-th completion token of every row."""
        self.at_1.fill_(self.base + t)
        if self.record is None:
            return self._forward(token_N, self.base + t + 1)
        if self.base + t >= self.recorded:
            self.recorded = slots = RECORDED_SLOTS * ((self.base + t) // RECORDED_SLOTS + 1)
            self.token_N = token_N.clone()
            states = [x for recurrent, own in zip(self.recurrent, self.own) if recurrent
                      for x in own]
            before = [x.clone() for x in states]
            self.repeat = self.record(lambda: self._forward(self.token_N, slots))
            for state, x in zip(states, before):  # which recording may have run on
                state.copy_(x)
        self.token_N.copy_(token_N)
        return self.repeat()

    def _forward(self, token_N, slots):
        """Write what the tokens leave at slot `at_1`, and attend to the first `slots`."""
        x_ND = self.embed(token_N)
        rotary = [x.index_select(1, self.at_1 - self.base)[:, 0]
                  for x in (self.cos_NC1E, self.sin_NC1E)]
        bias = self.own_bias if self.own_bias is None else self.own_bias[..., :slots]
        if self.record:  # slots that are still to be written
            bias = bias.masked_fill(self.slots_L[:slots] > self.at_1, float("-inf"))
        for layer, (norm1, mix, norm2, mlp) in enumerate(self.layers):
            x_ND = x_ND + mix(norm1(x_ND), layer, slots, bias, *rotary)
            x_ND = x_ND + mlp(norm2(x_ND))
        return self.norm(x_ND)

    def _parts(self, layer, linear):
        """Return a layer's four parts; `linear` makes its linear layers fit for few rows."""
        mlp, inner = layer.mlp, partial(_routed, layer.mlp)
        if not self.family.routed:
            inner = partial(_gated, linear(mlp.gate_proj, mlp.up_proj), mlp.act_fn,
                            linear(mlp.down_proj))
        if hasattr(layer, "linear_attn"):
            mixer = layer.linear_attn
            mix = partial(self._recurrence, mixer, linear(*mixer.projections))
        else:
            mixer = layer.self_attn
            norms = getattr(mixer, "q_norm", None), getattr(mixer, "k_norm", None)
            mix = partial(self._attention, linear(mixer.q_proj, mixer.k_proj, mixer.v_proj), *norms,
                          linear(mixer.o_proj))
        return layer.input_layernorm, mix, layer.post_attention_layernorm, inner

    def _attention(self, qkv, q_norm, k_norm, out, x_ND, layer, slots, bias, cos_N1E, sin_N1E):
        """Write keys and values at slot `at_1`, and attend."""
        y_NHE, (N, K, E) = qkv(x_ND), (len(x_ND), self.key_heads, self.width)
        y_NHE, gate_NV = y_NHE.view(N, -1, E), None
        if self.family.gated:  # a head's query, then its gate
            q_NH2E = y_NHE[:, :-2 * K].unflatten(1, (-1, 2))
            y_NHE, gate_NV = torch.cat([q_NH2E[:, :, 0], y_NHE[:, -2 * K:]], 1), q_NH2E[:, :, 1]
        H = y_NHE.shape[1] - 2 * K  # heads of queries, then of keys, then of values
        if q_norm is not None:
            y_NHE[:, :H], y_NHE[:, H:-K] = q_norm(y_NHE[:, :H]), k_norm(y_NHE[:, H:-K])
        turned_NHE = y_NHE[:, :-K, :cos_N1E.shape[-1]]
        turned_NHE.copy_(_rotate(turned_NHE, cos_N1E, sin_N1E))
        own_2n1E = y_NHE[:, H:].view(N, 2, K, E).transpose(0, 1).reshape(2, N * K, 1, E)
        self.own[layer].index_copy_(2, self.at_1, own_2n1E)
        attended_NV = self._attend(y_NHE[:, :H], layer, slots, bias)
        if gate_NV is not None:
            attended_NV = attended_NV * gate_NV.flatten(1).sigmoid()
        return out(attended_NV)

    def _recurrence(self, mixer, inputs, x_ND, layer, *_):
        """Renew windows and states."""
        window_NWC, state = self.own[layer]
        widths = [project.out_features for project in mixer.projections]
        row_NC, z_NV, *gates = inputs(x_ND).split(widths, dim=-1)
        out, *renewed = mixer.scan(*(x[:, None] for x in (row_NC, *gates)), window_NWC, state)
        for old, new in zip((window_NWC, state), renewed):
            old.copy_(new)
        return mixer.output(out, z_NV)


def _gated(gate_up, act, down, x_ND):
    gate_NI, up_NI = gate_up(x_ND).chunk(2, dim=-1)
    return down(act(gate_NI) * up_NI)


def _routed(experts, x_ND):
    return experts(x_ND[None])[0]


@cache
def recording_stream() -> torch.cuda.Stream:
    """Return the process's one stream to record on: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


def cuda_graph(work: Callable) -> Callable:
    """Record work()'s kernels; return what repeats them, each call into the last one's output."""
    stream, now = recording_stream(), torch.cuda.current_stream()
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        work()  # libraries set themselves up at their first call, which no graph may hold
    now.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = work()

    def repeat():
        graph.replay()
        return out
    return repeat


def packed(layers: tuple[nn.Linear, ...]) -> Callable:
    """Return linear layers that read the same few rows as one function, outputs side by side.

    On a CPU in fp32 it is one product with a copy of their weights in the blocked order of oneDNN,
    which is faster for few rows; elsewhere the layers themselves.
    """
    weight = layers[0].weight
    if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        if len(layers) == 1:
            return layers[0]
        return lambda x_ND: torch.cat([layer(x_ND) for layer in layers], dim=-1)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_AT_ONCE)

    def product(x_ND):
        return torch.ops.mkldnn._linear_pointwise(x_ND, blocked, bias, "none", [], "")

    if not any(hasattr(layer, "lora_A") for layer in layers):
        return product
    pairs = [(layer.lora_A, layer.lora_B * layer.scale) if hasattr(layer, "lora_A") else
             (layer.weight[:0], layer.weight[:, :0]) for layer in layers]
    A, B = torch.cat([A for A, _ in pairs]), torch.block_diag(*(B for _, B in pairs)).T
    return lambda x_ND: torch.addmm(product(x_ND), x_ND @ A.T, B)


def _column(numbers, device):
    return torch.tensor(numbers, device=device)[:, None]


def _bias(seen_NL, dtype):
    """Return what to add to attention scores [N, K, ·, L]: 0 where seen, else -inf."""
    zeros = torch.zeros(seen_NL.shape, dtype=dtype, device=seen_NL.device)
    return zeros.masked_fill(~seen_NL, float("-inf"))[:, None, None]


def _rotate(x_NHE, cos, sin):
    """Rotate by position in Qwen's half-split layout; the first half of `sin` is negative."""
    return torch.addcmul(x_NHE * cos, x_NHE.roll(x_NHE.shape[-1] // 2, -1), sin)
