"""The prefix tree: what a packed row is, and how a layer of any family runs over it.

Everything FFR samples from one prompt shares the prefix [system, video, question]; what follows it
(a header, or a patch and a header, then a completion) is a *suffix*. A suffix sees its prefix and
itself, never another suffix, so a prompt and its G rollouts are one packed row

    [P_1 .. P_B, S_1 .. S_N]        all prefixes first, then all suffixes, nothing padded

in which every shared token stands once. A layer with attention lets a suffix attend to its prefix's
keys; a recurrent layer starts it from its prefix's state.

Dimensions: B prefixes, N suffixes (rows), P prefix tokens, S suffix tokens, T packed tokens, C
channels, H query heads, K key-value heads, E head width, L keys that a row sees.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.qwen3_5.modeling_qwen3_5 import (torch_chunk_gated_delta_rule,
                                                          torch_recurrent_gated_delta_rule)

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # flash-attn needs CUDA to build; torch's own fused attention serves without it
    flash_attn_varlen_func = None

# ---------------------------------------------------------------------------------------------
# Families of checkpoints


@dataclass(frozen=True)
class Family:
    """What differs between families; docs/models.md says what a new one needs.

    processor: what reads its prompts. frames_apart: each temporal patch of a video has placeholders
    and a time of its own in the text. gated: attention's output is multiplied by a gate that q_proj
    makes beside the queries. routed: MLPs are experts. transposed: checkpoints have the experts'
    matrices as [experts, in, out]. Recurrent layers are known by their name, linear_attn.
    """
    processor: type
    frames_apart: bool = True
    gated: bool = False
    routed: bool = False
    transposed: bool = False


FAMILIES = {  # by a config's model_type
    "qwen2_5_vl": Family(Qwen2_5_VLProcessor, frames_apart=False),
    "qwen3_vl": Family(Qwen3VLProcessor),
    "qwen3_vl_moe": Family(Qwen3VLProcessor, routed=True, transposed=True),
    "qwen3_5": Family(Qwen3VLProcessor, gated=True),
    "qwen3_5_moe": Family(Qwen3VLProcessor, gated=True, routed=True),
}


# ---------------------------------------------------------------------------------------------
# The tree


class Tree:
    """The split of one packed row into prefixes and suffixes, and which suffix hangs where.

    prefix_lengths: B ints; suffix_lengths, owners: N ints. `kept`: what an earlier row's layers
    left of the prefixes, which are not in this row then. `store` collects what each layer leaves,
    of the prefixes or of the suffixes of kept ones: padded keys and values [·, K, S, E] each, or a
    Recurrence's window and state.
    """

    def __init__(self, prefix_lengths: list[int], suffix_lengths: list[int], owners: list[int],
                 device: torch.device, kept: list | None = None, store: list | None = None):
        assert len(suffix_lengths) == len(owners) and set(owners) <= set(range(len(prefix_lengths)))
        self.kept, self.store = kept, store
        self.prefix_lengths, self.suffix_lengths = prefix_lengths, suffix_lengths
        self.prefix_tokens = 0 if kept else sum(prefix_lengths)
        self.owners = torch.tensor(owners, dtype=torch.long, device=device)
        self.prefix_pad, self.prefix_unpad, self.prefix_ends = _padding(prefix_lengths, device)
        self.device = device

    @cached_property
    def runs(self) -> list[tuple]:
        """Return the rows to attend together: all where their keys are stored, else alike ones."""
        cuts = [0] if self.suffix_lengths else []
        for n, length in enumerate(self.suffix_lengths):
            if self.store is None and length > 1.25 * self.suffix_lengths[cuts[-1]]:
                cuts.append(n)
        return [self._run(*bounds) for bounds in zip(cuts, [*cuts[1:], len(self.suffix_lengths)])]

    def _run(self, first, last):
        """Return rows first..last: tokens in the packed row, owners, mask, pad, unpad, ends."""
        lengths, owners = self.suffix_lengths[first:last], self.owners[first:last]
        start = self.prefix_tokens + sum(self.suffix_lengths[:first])
        return (slice(start, start + sum(lengths)), owners, self._suffix_mask(max(lengths), owners),
                *_padding(lengths, self.device))

    def _suffix_mask(self, S, owners):
        """Return [N or 1, 1, S, P + S] bool: a token sees its prefix, its suffix up to itself."""
        P, device = max(self.prefix_lengths), self.device
        causal_SS = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        lengths_B1 = torch.tensor(self.prefix_lengths, device=device)[:, None]
        prefix_BP = torch.arange(P, device=device) < lengths_B1
        seen_NP = prefix_BP[owners] if len(set(self.prefix_lengths)) > 1 else prefix_BP[:1]
        seen_NSP = seen_NP[:, None].expand(-1, S, -1)
        return torch.cat([seen_NSP, causal_SS.expand(len(seen_NSP), S, S)], dim=-1)[:, None]

    @cached_property
    def varlen(self) -> tuple:
        """Return what variable-length kernels read: lengths, and the gather of the keys.

        Cumulative and largest lengths of prefixes, of suffixes and of [prefix, suffix] pairs; the
        gather lays the keys of those pairs end to end.
        """
        P, S, owners = self.prefix_lengths, self.suffix_lengths, self.owners.tolist()
        L = [P[b] + s for b, s in zip(owners, S)]
        P_cu, S_cu, L_cu = (torch.tensor([0] + lengths).cumsum(0) for lengths in (P, S, L))
        keys = [torch.cat([torch.arange(P_cu[b], P_cu[b + 1]),
                           torch.arange(S_cu[n], S_cu[n + 1]) + P_cu[-1]])
                for n, b in enumerate(owners)]
        keys = torch.cat(keys).to(self.device) if keys else None
        bounds = [(cu.to(self.device, torch.int32), max(lengths, default=0))
                  for cu, lengths in ((P_cu, P), (S_cu, S), (L_cu, L))]
        return *bounds, keys


def _padding(lengths, device):
    """Return the gathers from packed [T] to padded [N, S] and from padded.flatten() back.

    With them the lengths [N]. All are None where the lengths are equal, so that a view does.
    Padding slots repeat token 0; nothing reads them.
    """
    if len(set(lengths)) <= 1:
        return None, None, None
    S, starts = max(lengths), [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    index = torch.arange(S)[None].repeat(len(lengths), 1)
    ends = torch.tensor(lengths)
    valid = index < ends[:, None]
    pad = torch.where(valid, index + torch.tensor(starts[:-1])[:, None], 0).flatten()
    return pad.to(device), valid.flatten().nonzero()[:, 0].to(device), ends.to(device)


def _pad(x_HTE, rows, index):
    """Turn packed [H, T, E] into padded [rows, H, S, E]."""
    if index is not None:
        x_HTE = x_HTE.index_select(1, index)
    return x_HTE.unflatten(1, (rows, -1)).transpose(0, 1)


def _unpad(x_NSHE, index):
    """Turn padded [N, S, H, E] into packed [T, H, E]."""
    x = x_NSHE.flatten(0, 1)
    return x if index is None else x.index_select(0, index)


# ---------------------------------------------------------------------------------------------
# Attention


def grouped_attention(q_NHSE: Tensor, k_NKLE: Tensor, v_NKLE: Tensor, scale: float,
                      mask: Tensor) -> Tensor:
    """Attend where H/K query heads share a key head; return [N, S, H, E].

    They are folded into the query axis, nothing is repeated. mask: bool [N or 1, 1, S, L].
    """
    N, H, S, E = q_NHSE.shape
    K, group = k_NKLE.shape[1], H // k_NKLE.shape[1]
    if group > 1:
        mask = mask.repeat(1, 1, group, 1)
    q = q_NHSE.reshape(N, K, group * S, E)
    out = F.scaled_dot_product_attention(q, k_NKLE, v_NKLE, attn_mask=mask, scale=scale)
    return out.reshape(N, K, group, S, E).permute(0, 3, 1, 2, 4).flatten(2, 3)


def tree_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                   attention_mask: None, scaling: float | None = None, tree: Tree | None = None,
                   **unused: Any) -> tuple[Tensor, None]:
    """Attend by the row's tree; transformers calls this in every text layer.

    query [1, H, T, E], key and value [1, K, T, E] -> [1, T, H, E]. Two calls: causal over the
    prefixes, then suffix queries over [own prefix, own suffix], causal from the bottom right.
    """
    assert query.shape[0] == 1 and tree is not None, "one packed row and its tree"
    q, k, v = query[0], key[0], value[0]
    kernel = KERNELS[module.config._attn_implementation]
    if kernel and tree.kept is None and tree.store is None:
        return tree_attention_varlen(q, k, v, scaling, tree, kernel)[None], None
    T_P, B = tree.prefix_tokens, len(tree.prefix_lengths)
    parts = []
    if T_P:
        q_BHPE, k_BKPE, v_BKPE = (_pad(x[:, :T_P], B, tree.prefix_pad) for x in (q, k, v))
        out_BHPE = F.scaled_dot_product_attention(q_BHPE, k_BKPE, v_BKPE, is_causal=True,
                                                  scale=scaling, enable_gqa=True)
        parts.append(_unpad(out_BHPE.transpose(1, 2), tree.prefix_unpad))
    else:
        k_BKPE, v_BKPE = tree.kept[module.layer_idx]
    for tokens, owners, mask, pad, unpad, _ in tree.runs:
        q_NHSE, k_NKSE, v_NKSE = (_pad(x[:, tokens], len(owners), pad) for x in (q, k, v))
        k_NKLE, v_NKLE = (torch.cat([prefix.index_select(0, owners), suffix], dim=2)
                          for prefix, suffix in ((k_BKPE, k_NKSE), (v_BKPE, v_NKSE)))
        out = grouped_attention(q_NHSE, k_NKLE, v_NKLE, scaling, mask)
        parts.append(_unpad(out, unpad))
    if tree.store is not None:
        tree.store.append((k_BKPE, v_BKPE) if T_P else (k_NKSE, v_NKSE))
    return torch.cat(parts)[None], None


def tree_attention_varlen(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, scaling: float, tree: Tree,
                          kernel: Callable) -> Tensor:
    """Attend in the same two calls with a variable-length kernel, unpadded; return [T, H, E]."""
    q, k, v = (x.transpose(0, 1) for x in (q_HTE, k_KTE, v_KTE))
    (cu_P, P), (cu_S, S), (cu_L, L), keys = tree.varlen
    T_P = tree.prefix_tokens
    out = [kernel(q[:T_P], k[:T_P], v[:T_P], cu_P, cu_P, P, P, scaling)]
    if tree.suffix_lengths:
        out.append(kernel(q[T_P:], k[keys], v[keys], cu_S, cu_L, S, L, scaling))
    return torch.cat(out)


def torch_kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
                 max_k: int, scale: float) -> Tensor:
    """Attend within sequences of [T, heads, E], causal from the bottom right, by torch's kernel."""
    return _varlen_attn()(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0))


@cache
def _varlen_attn():
    """Return torch's kernel for query heads that share key heads: torch 2.11 need not be told."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA alone needs it
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if told else varlen_attn


def flash_kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
                 max_k: int, scale: float) -> Tensor:
    """Attend as torch_kernel does, by the flash-attn package."""
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale,
                                  causal=True)


# Scoring's kernel by the name that a model's config holds; sampling is padded in any case.
KERNELS = {"prefix_tree": None, "prefix_tree_torch": torch_kernel, "prefix_tree_fa2": flash_kernel}
for name in KERNELS:
    AttentionInterface.register(name, tree_attention)


def attention_names(attention: str, on_cuda: bool, dtype: torch.dtype) -> dict[str, str]:
    """Return what transformers is to use in text and vision for auto, torch, flash or sdpa.

    auto: the flash-attn package where it is installed, else torch's variable-length kernel; both
    are for bfloat16 on CUDA, and anything else is padded and goes through scaled_dot_product.
    """
    fits, package = on_cuda and dtype != torch.float32, flash_attn_varlen_func is not None
    if attention == "flash" and not (fits and package):
        raise ValueError("--attention flash needs CUDA, bfloat16 and the flash-attn package")
    if attention == "torch" and not fits:
        raise ValueError("--attention torch needs CUDA and bfloat16")
    if not fits or attention == "sdpa":
        return {"text_config": "prefix_tree", "vision_config": "sdpa"}
    if attention == "torch" or not package:
        return {"text_config": "prefix_tree_torch", "vision_config": "sdpa"}
    return {"text_config": "prefix_tree_fa2", "vision_config": "flash_attention_2"}


# ---------------------------------------------------------------------------------------------
# Recurrence


class Recurrence(nn.Module):
    """A layer of the gated delta rule (2412.06464) over the tree; `recur` mixes it into a model's.

    A prefix runs once. What all its suffixes start from is of fixed size: the window [B, W, C], the
    last inputs of a convolution over W + 1 tokens, and the state [B, H, E_k, E_v] in fp32.
    """

    def forward(self, hidden_states: Tensor, cache_params: Any = None,
                attention_mask: Tensor | None = None, tree: Tree | None = None,
                **options: Any) -> Tensor:
        """Run over the row's tree, [1, T, D] -> [1, T, D]; without a tree as the checkpoint's."""
        if tree is None:
            return super().forward(hidden_states, cache_params, attention_mask, **options)
        assert len(hidden_states) == 1, "one packed row and its tree"
        inputs_T, z_T, *gates_T = (project(hidden_states[0]) for project in self.projections)
        row, outputs = (inputs_T, *gates_T), []
        if tree.prefix_tokens:
            first = [_rows(x[:tree.prefix_tokens], len(tree.prefix_lengths), tree.prefix_pad)
                     for x in row]
            out, *left = self.scan(*first, *self.start(inputs_T, len(tree.prefix_lengths)),
                                   tree.prefix_ends)
            outputs.append(_unpad(out, tree.prefix_unpad))
        else:
            left = tree.kept[self.layer_idx]
        for tokens, owners, _, pad, unpad, ends in tree.runs:
            rows = [_rows(x[tokens], len(owners), pad) for x in row]
            out, *suffixes = self.scan(*rows, *(x.index_select(0, owners) for x in left), ends)
            outputs.append(_unpad(out, unpad))
        if tree.store is not None:
            tree.store.append(tuple(left if tree.prefix_tokens else suffixes))
        return self.output(torch.cat(outputs), z_T)[None]

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """Return what makes the convolution's inputs, the output's gate, and the rule's two."""
        return self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a

    def start(self, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return the window and the state before the first token: zeros."""
        return (like.new_zeros(rows, self.conv_kernel_size - 1, like.shape[-1]),
                like.new_zeros(rows, self.num_v_heads, self.head_k_dim, self.head_v_dim,
                               dtype=torch.float32))

    def scan(self, inputs_NSC: Tensor, b_NSH: Tensor, a_NSH: Tensor, window_NWC: Tensor,
             state: Tensor, ends_N: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run rows on from their windows and states; return outputs [N, S, H, E_v] and these anew.

        The two are those after `ends_N` tokens of each row; what is padded behind does not count.
        """
        S, W = inputs_NSC.shape[1], window_NWC.shape[1]
        rate_NSH = b_NSH.sigmoid()
        decay_NSH = -self.A_log.float().exp() * F.softplus(a_NSH.float() + self.dt_bias)
        x_NLC = torch.cat([window_NWC, inputs_NSC], dim=1)
        window_NWC = x_NLC[:, S:].clone()  # not a view that keeps all of the inputs
        if ends_N is not None:
            at_NW1 = (ends_N[:, None] + torch.arange(W, device=ends_N.device))[..., None]
            window_NWC = x_NLC.take_along_dim(at_NW1, dim=1)
            padded_NS1 = (torch.arange(S, device=ends_N.device) >= ends_N[:, None])[..., None]
            rate_NSH, decay_NSH = (x.masked_fill(padded_NS1, 0) for x in (rate_NSH, decay_NSH))
        weight, bias = self.conv1d.weight, self.conv1d.bias
        x_NCS = F.conv1d(x_NLC.transpose(1, 2).to(weight.dtype), weight, bias, groups=len(weight))
        mixed_NSC = F.silu(x_NCS).transpose(1, 2).to(x_NLC.dtype)
        q, k, v = mixed_NSC.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        shared = self.num_v_heads // self.num_k_heads  # repeated: transformers 5.17 would not
        q, k = (x.unflatten(-1, (-1, self.head_k_dim)).repeat_interleave(shared, dim=2)
                for x in (q, k))
        rule = torch_recurrent_gated_delta_rule if S == 1 else torch_chunk_gated_delta_rule
        if not x_NLC.is_cuda or x_NLC.dtype == torch.float32:
            rule = rule.__wrapped__  # torch's own: fla's kernels are for half precision on CUDA
        out, state = rule(q, k, v.unflatten(-1, (-1, self.head_v_dim)), g=decay_NSH, beta=rate_NSH,
                          initial_state=state, output_final_state=True,
                          use_qk_l2norm_in_kernel=True)
        return out, window_NWC, state

    def output(self, out_THE: Tensor, z_TV: Tensor) -> Tensor:
        """Return the layer's output [T, D] of the rule's, normalised and gated."""
        gated = self.norm(out_THE.reshape(-1, self.head_v_dim), z_TV.reshape(-1, self.head_v_dim))
        return self.out_proj(gated.reshape(len(z_TV), -1))


def recur(model: nn.Module) -> None:
    """Let the recurrent layers of a model run over trees; all else of theirs stays."""
    for layer in model.model.language_model.layers:
        own = getattr(layer, "linear_attn", None)
        if own is not None and not isinstance(own, Recurrence):
            own.__class__ = type("TreeRecurrence", (Recurrence, type(own)), {})


def _rows(x_TC, rows, index):
    """Turn packed [T, C] into padded [rows, S, C]."""
    x_TC = x_TC if index is None else x_TC.index_select(0, index)
    return x_TC.unflatten(0, (rows, -1))


# ---------------------------------------------------------------------------------------------
# Positions


def mrope(segment: Any, start: int, config: Any) -> tuple[Tensor, int]:
    """Return M-RoPE positions [3, n] of a segment that starts at `start`, and the one after it.

    Text counts up on all three axes. An image or video starts after the text before it; its
    temporal axis counts floor(t * seconds_per_grid * tokens_per_second) for Qwen2.5-VL and stands
    still within a placeholder run for others; what follows starts at the largest position so far
    plus one: the rule of the released checkpoints (transformers 5.3 and later let text overlap a
    long video's temporal positions, which is not what they were trained with).
    """
    ids = segment.ids.tolist()
    visual = {config.image_token_id, config.video_token_id}
    merge, grids = config.vision_config.spatial_merge_size, []
    for (t, h, w), seconds in zip(segment.grids.tolist(), segment.seconds_per_grid.tolist()):
        if FAMILIES[config.model_type].frames_apart:  # a run of placeholders each
            grids += [(1, h // merge, w // merge, 0.0)] * t
        else:
            grids.append((t, h // merge, w // merge, seconds))
    speed = getattr(config.vision_config, "tokens_per_second", 0)
    parts, position, i = [], start, 0
    for t, h, w, seconds in grids:
        run = i
        while ids[run] not in visual:
            run += 1
        parts.append(torch.arange(position, position + run - i).expand(3, -1))
        position += run - i
        steps = (torch.arange(t) * (seconds * speed)).long()
        axes = torch.meshgrid(steps, torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + position)
        position = int(parts[-1].max()) + 1
        i = run + t * h * w
        assert set(ids[run:i]) <= visual and i <= len(ids), "pixels without placeholders"
    assert not any(token in visual for token in ids[i:]), "placeholders without pixels"
    parts.append(torch.arange(position, position + len(ids) - i).expand(3, -1))
    return torch.cat(parts, dim=1), position + len(ids) - i
