"""The student: a Qwen2.5-VL or Qwen3-VL that samples and scores over prefix trees.

Everything FFR samples from one prompt shares the prefix [system, video, question]; what follows it
(a header, or a patch and a header, then a completion) is a *suffix*. A suffix attends to its prefix
and to itself, never to another suffix, so a prompt and its G rollouts are one packed row

    [P_1 .. P_B, S_1 .. S_N]        all prefixes first, then all suffixes, nothing padded

in which every shared token stands once. The modules, weights and checkpoint format are Hugging
Face's; ours are the attention over the tree, the M-RoPE positions, the decode loop and the
log-probs.

    student = Student.load("Qwen/Qwen2.5-VL-7B-Instruct", device="cuda")
    cache = student.prefill([prefix])                            # once per prompt
    completions = student.sample(cache, [header] * 8, [0] * 8, ...)
    logp, entropy = student([prefix], suffixes, owners, completions)

Dimensions: B prefixes, N suffixes (rows), P prefix tokens, S suffix tokens, C completion tokens, T
packed tokens, V vocabulary, D width, H query heads, K key-value heads, E head width, L cache slots.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (AttentionInterface, AutoConfig, AutoModelForImageTextToText,
                          PreTrainedConfig, Qwen2_5_VLProcessor, Qwen3VLProcessor)
from transformers.utils.logging import set_tqdm_hook

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # flash-attn needs CUDA to build; torch's own fused attention serves without it
    flash_attn_varlen_func = None

LOGITS_AT_ONCE = 2**24  # elements of fp32 logits held at a time, but no fewer rows than these:
ROWS_OF_LOGITS = 256  # 150 MiB for Qwen's vocabulary
ROWS_AT_ONCE = 8  # rows that the packed weights of a CPU are laid out for; others work as well
RECORDED_SLOTS = 256  # a recorded decode step attends to a multiple of so many of a row's own slots


# ---------------------------------------------------------------------------------------------
# The prefix tree


@dataclass
class Cache:
    """Keys and values of B prefixes, and where their suffixes go on.

    keys, values: per layer [B, K, P, E], padded on the right; lengths, next_position: B ints.
    features: what the vision tower said of the prefixes, for scoring, where the tower is frozen.
    """
    lengths: list[int]
    next_position: list[int]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    features: "Features | None" = None
    linears: dict = field(default_factory=dict)

    def linear(self, *layers: nn.Linear) -> Callable:
        """Return `packed(layers)`, made once for the tries and repairs of a step."""
        if layers not in self.linears:
            self.linears[layers] = packed(layers)
        return self.linears[layers]


@dataclass
class Features:
    """The vision tower's output for some segments [v, D], and Qwen3-VL's deepstack [v, D] each."""
    embeddings: Tensor
    deepstack: list[Tensor]


class Tree:
    """The split of one packed row into prefixes and suffixes, and which suffix hangs where.

    prefix_lengths: B ints; suffix_lengths, owners: N ints. With `cache` the prefixes are not in the
    row but in the cache. `store` collects each layer's padded keys and values: of the prefixes, or
    of the suffixes where the prefixes are cached.
    """

    def __init__(self, prefix_lengths: list[int], suffix_lengths: list[int], owners: list[int],
                 device: torch.device, cache: Cache | None = None, store: list | None = None):
        assert len(suffix_lengths) == len(owners) and set(owners) <= set(range(len(prefix_lengths)))
        self.cache, self.store = cache, store
        self.prefix_lengths, self.suffix_lengths = prefix_lengths, suffix_lengths
        self.prefix_tokens = 0 if cache else sum(prefix_lengths)
        self.owners = torch.tensor(owners, dtype=torch.long, device=device)
        self.prefix_pad, self.prefix_unpad = _padding(prefix_lengths, device)
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
        """Return rows first..last: tokens in the packed row, owners, mask, pad and unpad."""
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

    Both are None where all lengths are equal, so that a view does. Padding slots repeat token 0;
    nothing reads them.
    """
    if len(set(lengths)) <= 1:
        return None, None
    S, starts = max(lengths), [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    index = torch.arange(S)[None].repeat(len(lengths), 1)
    valid = index < torch.tensor(lengths)[:, None]
    pad = torch.where(valid, index + torch.tensor(starts[:-1])[:, None], 0).flatten()
    return pad.to(device), valid.flatten().nonzero()[:, 0].to(device)


def _pad(x_HTE, rows, index):
    """Turn packed [H, T, E] into padded [rows, H, S, E]."""
    if index is not None:
        x_HTE = x_HTE.index_select(1, index)
    return x_HTE.unflatten(1, (rows, -1)).transpose(0, 1)


def _unpad(x_NSHE, index):
    """Turn padded [N, S, H, E] into packed [T, H, E]."""
    x = x_NSHE.flatten(0, 1)
    return x if index is None else x.index_select(0, index)


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
    if kernel and tree.cache is None and tree.store is None:
        return tree_attention_varlen(q, k, v, scaling, tree, kernel)[None], None
    T_P, B = tree.prefix_tokens, len(tree.prefix_lengths)
    parts = []
    if T_P:
        q_BHPE, k_BKPE, v_BKPE = (_pad(x[:, :T_P], B, tree.prefix_pad) for x in (q, k, v))
        out_BHPE = F.scaled_dot_product_attention(q_BHPE, k_BKPE, v_BKPE, is_causal=True,
                                                  scale=scaling, enable_gqa=True)
        parts.append(_unpad(out_BHPE.transpose(1, 2), tree.prefix_unpad))
    else:
        k_BKPE, v_BKPE = (x[module.layer_idx] for x in (tree.cache.keys, tree.cache.values))
    for tokens, owners, mask, pad, unpad in tree.runs:
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
# Positions


def mrope(segment: Any, start: int, config: Any) -> tuple[Tensor, int]:
    """Return M-RoPE positions [3, n] of a segment that starts at `start`, and the one after it.

    Text counts up on all three axes. An image or video starts after the text before it; its
    temporal axis counts floor(t * seconds_per_grid * tokens_per_second) for Qwen2.5-VL and stands
    still within a placeholder run for Qwen3-VL; what follows starts at the largest position so far
    plus one: the rule of the released checkpoints (transformers 5.3 and later let text overlap a
    long video's temporal positions, which is not what they were trained with).
    """
    ids = segment.ids.tolist()
    visual = {config.image_token_id, config.video_token_id}
    merge, grids = config.vision_config.spatial_merge_size, []
    for (t, h, w), seconds in zip(segment.grids.tolist(), segment.seconds_per_grid.tolist()):
        if config.model_type.startswith("qwen3"):  # one run of placeholders per temporal patch
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


# ---------------------------------------------------------------------------------------------
# Checkpoints as their authors publish them

# What loads, by model type, and what reads its prompts; docs/data.md says why others do not.
FAMILIES = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, AttributeError, KeyError,
              SafetensorError, StrictDataclassError, TemplateError)


def read_checkpoint(path: str | Path, attention: dict[str, str],
                    blank: bool = False) -> tuple[nn.Module, Any]:
    """Return the model and the processor of a checkpoint folder, adapter's folder or hub name.

    blank: on the meta device, for which no weights are read. ValueError, in one sentence, where
    they cannot be had; if possible, before weights are read.
    """
    try:
        if (Path(path) / ADAPTER).is_file():
            return _read_adapted(Path(path), attention, blank)
        written, _ = PreTrainedConfig.get_config_dict(path)
        if (kind := written.get("model_type")) not in FAMILIES:
            raise ValueError(f"its model type is {kind}, and only {' and '.join(FAMILIES)} are "
                             "supported (docs/data.md, \"Which checkpoints load\")")
        if "quantization_config" in written:
            raise ValueError("its weights are quantised, and cannot be trained")
        config = AutoConfig.from_pretrained(path)
        processor = _processor(path, config)
        if blank:
            with torch.device("meta"):
                return AutoModelForImageTextToText.from_config(
                    config, attn_implementation=attention), processor
        with _no_bars():
            model, found = AutoModelForImageTextToText.from_pretrained(
                path, config=config, dtype="auto", attn_implementation=attention,
                output_loading_info=True, ignore_mismatched_sizes=True)
        if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"],
                            *(name for name, *_ in found["mismatched_keys"])}):
            raise ValueError(f"{len(wrong)} weights are not its config's, such as {wrong[0]}")
    except UNREADABLE as error:  # whatever hub or disk say, in one line
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {path} cannot be loaded: {why}") from None
    return model, processor


def _processor(path, config):
    """Return the processor of the config's family, whatever its files call its image processor.

    Its tokenizer's EOS becomes the token that the chat template ends an answer with.
    """
    # told the config, it looks up no name: Qwen2_5_VLImageProcessor is of transformers 4.49
    processor = FAMILIES[config.model_type].from_pretrained(path, config=config)
    tokenizer, rows = processor.tokenizer, config.text_config.vocab_size
    for token, id in ((processor.image_token, config.image_token_id),
                      (processor.video_token, config.video_token_id)):
        if tokenizer.get_vocab().get(token) != id:
            raise ValueError(f"its tokenizer does not have {token} at {id}, as its config says")
    if len(tokenizer) > rows:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, and its model {rows} rows")
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    chat = [{"role": role, "content": [{"type": "text", "text": "?"}]}
            for role in ("user", "assistant")]
    ending = processor.apply_chat_template(chat, tokenize=False).rpartition("?")[2]
    for id in tokenizer(ending.strip()).input_ids[:1]:
        if (token := tokenizer.added_tokens_decoder.get(id)) and token.special:
            tokenizer.eos_token = token.content
    return processor


# ---------------------------------------------------------------------------------------------
# Low-rank adapters (LoRA, 2106.09685), in peft's format

ADAPTER, ADAPTERS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PLACES = tuple(f"{PREFIX}model.{part}." for part in ("language_model.layers", "visual"))
# What the first file may say without changing y = W x + b + (α / r) B A x.
PLAIN = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "inference_mode": True}
PASSING = {"r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path",
           "task_type", "auto_mapping", "megatron_core", "peft_version", "qalora_group_size"}


class Adapted(nn.Linear):
    """A linear layer with an adapter: y = W x + b + (α / r) B A x, A [r, in] and B [out, r].

    W stays as it is: with the adapter off this is the layer of the start, to the bit. A and B are
    fp32 where they are trained, and are computed with in the type of x, as FSDP casts weights.
    """
    on = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute y, the two parts apart: never as one weight, which would round once more."""
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        A, B = (weight.to(x.dtype) for weight in (self.lora_A, self.lora_B))
        return torch.add(y, F.linear(F.linear(x, A), B), alpha=self.scale)


def adapt(layer: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> None:
    """Give a linear layer an adapter; the names of its own weights stay."""
    if type(layer) is not nn.Linear or (len(B), A.shape[1]) != layer.weight.shape:
        raise ValueError(f"an adapter from {A.shape[1]} to {len(B)} does not fit {layer}")
    layer.__class__, layer.alpha, layer.scale = Adapted, alpha, alpha / len(A)
    layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)


def add_adapters(model: nn.Module, rank: int, alpha: int = 32, vision: bool = False,
                 seed: int = 0) -> None:
    """Give the language model's linear layers, and the tower's, adapters that change nothing yet.

    A is uniform within 1 / √in, as in peft; B is 0.
    """
    random, inner = torch.Generator().manual_seed(seed), model.model
    for part in [*inner.language_model.layers, *[inner.visual] * vision]:
        for layer in [m for m in part.modules() if isinstance(m, nn.Linear)]:
            A = 2 * torch.rand(rank, layer.in_features, generator=random) - 1
            B = torch.zeros(layer.out_features, rank)
            adapt(layer, A / layer.in_features ** 0.5, B, alpha)


def _read_adapted(folder, attention, blank):
    """Return model and processor of an adapter's base; the model has the adapter, plain LoRA."""
    written = json.loads((folder / ADAPTER).read_text())
    odd = [key for key, value in written.items() if value and key not in PASSING
           and value != PLAIN.get(key)]
    if odd or not (base := written.get("base_model_name_or_path")):
        raise ValueError(f"its {ADAPTER} " + (f"says more than plain LoRA: {', '.join(odd)}"
                                              if odd else "names no base"))
    model, processor = read_checkpoint(base, attention, blank)
    if not (tensors := load_file(folder / ADAPTERS)):
        raise ValueError(f"its {ADAPTERS} is empty")
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        if not name.startswith(PLACES):
            raise ValueError(f"it changes {name}, which is no layer of text or tower")
        A, B = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        adapt(model.get_submodule(name.removeprefix(PREFIX)), A, B, written["lora_alpha"])
    return model, processor


class AdapterCopy(nn.Module):
    """A student's copy that is not trained: adapters of its own, all other weights the student's.

    While it scores, the two sets of adapters change places, each rank its own shard.
    """

    def __init__(self, student: "Student"):
        super().__init__()
        self.whose = [student]  # in a list: no part of this module
        self.own = nn.ParameterList(w.detach().clone() for w in student.trained())
        self.requires_grad_(False)

    def forward(self, *args: Any, **options: Any) -> tuple:
        """Score as the student does."""
        student, = self.whose
        self._exchange(student)
        try:
            return student(*args, **options)
        finally:
            self._exchange(student)

    @torch.no_grad()
    def _exchange(self, student):
        for mine, theirs in zip(local(self.own), local(student.trained()), strict=True):
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)

    @torch.no_grad()
    def follow(self, student: "Student", rate: float) -> None:
        """Set θ ← θ + μ (θ_student − θ), as Student.follow does."""
        for mine, theirs in zip(local(self.own), local(student.trained()), strict=True):
            mine.lerp_(theirs, rate)


def local(weights: Iterable[Tensor]) -> list[Tensor]:
    """Return what this rank has of sharded weights."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]


# ---------------------------------------------------------------------------------------------
# The student


@dataclass
class Completion:
    """A sampled row: ids [C] through EOS (or cut at the limit), and their log-probs [C] in fp32."""
    ids: Tensor
    logp: Tensor
    finished: bool


class Student(nn.Module):
    """A vision-language model with four operations: prefill, sample, score (forward) and save."""

    def __init__(self, model: nn.Module, processor: Any, trainable: bool = True,
                 freeze_vision: bool = False):
        super().__init__()
        self.model, self.processor, self.trainable = model, processor, trainable
        self.record = None  # see DecodeRows
        self.adapted = [layer for layer in model.modules() if isinstance(layer, Adapted)]
        for name, weight in model.named_parameters():
            left = freeze_vision and ".visual." in name or self.adapted and ".lora_" not in name
            weight.requires_grad_(trainable and not left)
        self.freeze_vision = not any(w.requires_grad for w in model.model.visual.parameters())
        tokenizer = processor.tokenizer
        eos = model.generation_config.eos_token_id
        self.eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # a placeholder has no pixels, a row past the tokenizer no text: none may be sampled
        unused = set(range(len(tokenizer), model.config.text_config.vocab_size))
        banned = torch.tensor(sorted((special | unused) - self.eos_ids), dtype=torch.long)
        self.register_buffer("banned", banned, persistent=False)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu",
             dtype: torch.dtype = torch.float32, attention: str = "auto", trainable: bool = True,
             freeze_vision: bool = False, recompute: bool = False, master: bool = False,
             cuda_graphs: bool = False, lora: tuple = (), offload: bool = False) -> "Student":
        """Load a checkpoint folder or hub name, or a folder with an adapter and its base.

        dtype: what is computed in. The weights are kept in fp32 where they are trained or `master`
        asks for it (an average over steps, whose changes are too small for bfloat16). The meta
        device has shapes alone, in dtype, and reads no weights.
        attention: see attention_names. recompute: activation checkpointing of every block in
        training. cuda_graphs: of decode steps. lora: what add_adapters is told, to train adapters
        alone. offload: FSDP's weights, and with them the optimizer's, stay in the host's memory.
        """
        on_cuda = torch.device(device).type == "cuda"
        blank = torch.device(device).type == "meta"
        names = attention_names("sdpa" if blank else attention, on_cuda, dtype)
        if on_cuda:  # its backward can be NaN for masks on Hopper: pytorch issue 196678
            torch.backends.cuda.enable_cudnn_sdp(False)
        model, processor = read_checkpoint(path, names, blank)
        if lora:
            add_adapters(model, *lora)
        if recompute:
            recompute_blocks(model)
        model.train(trainable)
        student = cls(model, processor, trainable, freeze_vision)
        student.record = cuda_graph if cuda_graphs else None
        if blank:
            return student.to(device, dtype)
        # one process with adapters needs no FSDP, whose gathered weights stand beside its own
        if dist.is_initialized() and (dist.get_world_size() > 1 or not student.adapted):
            return shard(student, torch.device(device), dtype, master, offload)
        if trainable and dtype != torch.float32 and not student.adapted:
            raise ValueError("bfloat16 training keeps fp32 master weights through FSDP: initialise "
                             "torch.distributed first")
        return cast(student, dtype, master).to(device)

    @property
    def device(self) -> torch.device:
        """Return where the student is."""
        return self.banned.device

    # -- the pieces every pass shares

    def features(self, segments: list) -> Features | None:
        """Run the vision tower over all images and videos in one call; None without any."""
        pixels = [s.pixels for s in segments if s.pixels is not None]
        if not pixels:
            return None
        grids = torch.cat([s.grids for s in segments]).to(self.device)
        tower = self.model.model.visual
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            pixels = torch.cat(pixels).to(self.device, tower.patch_embed.proj.weight.dtype)
            out = tower(pixels, grid_thw=grids, return_dict=True)
        return Features(out.pooler_output, list(getattr(out, "deepstack_features", None) or []))

    def hidden(self, ids_T: Tensor, positions_3T: Tensor, features: Features | None,
               tree: Tree) -> Tensor:
        """Return the last hidden states [T, D] of one packed row."""
        text = self.model.model.language_model
        embeds_TD = text.embed_tokens(ids_T)
        config, extra = self.model.config, {}
        if features is not None:
            visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
            vision = features.embeddings.to(embeds_TD.dtype)
            embeds_TD = embeds_TD.masked_scatter(visual_T[:, None], vision)
            if features.deepstack:
                extra = {"visual_pos_masks": visual_T[None],
                         "deepstack_visual_embeds": features.deepstack}
        out = text(inputs_embeds=embeds_TD[None], position_ids=positions_3T[:, None],
                   attention_mask=None, use_cache=False, tree=tree, **extra)
        return out.last_hidden_state[0]

    def logits(self, hidden_TD: Tensor, temperature: float, head: Callable | None = None) -> Tensor:
        """Return fp32 logits [T, V] at a temperature (0, greedy, is scored at 1)."""
        logits_TV = (head or self.model.lm_head)(hidden_TD).float()
        return logits_TV if temperature in (0, 1) else logits_TV / temperature

    def pack(self, segments: list, starts: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Lay segments end to end, each from its own start: ids [T], positions [3, T], ends."""
        placed = [mrope(s, start, self.model.config) for s, start in zip(segments, starts)]
        ids_T = torch.cat([segment.ids for segment in segments]).to(self.device)
        positions_3T = torch.cat([positions for positions, _ in placed], dim=1).to(self.device)
        return ids_T, positions_3T, [end for _, end in placed]

    def trained(self) -> list[nn.Parameter]:
        """Return the weights that are trained: all, all but the tower's, or the adapters'."""
        self.scatter()
        return [weight for weight in self.parameters() if weight.requires_grad]

    def scatter(self) -> None:
        """Let every rank have its shards alone: what FSDP has gathered is older, and rounded."""
        for part in self.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()

    # -- scoring

    @torch.no_grad()
    def at_start(self, *args: Any, **options: Any) -> tuple:
        """Score as `forward` does, without the adapters: by the weights of the start."""
        Adapted.on = False
        try:
            return self(*args, **options)
        finally:
            Adapted.on = True

    def forward(self, prefixes: list, suffixes: list, owners: list[int], completions: list[Tensor],
                temperature: float = 1.0, entropy: bool = False, features: Features | None = None,
                support: int | Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Score every completion token over the packed tree: log π(completion | prefix, suffix).

        prefixes: B segments; suffixes: N segments (header, or patch and header); owners: N prefix
        indices; completions: N id tensors [C_n]. Returns logp [sum C_n] in fp32, suffixes in order,
        and the entropy of the same distributions (no gradient; None unless asked for). Only
        completion tokens get logits. With `support` instead: see _score_among.
        """
        assert len(suffixes) == len(owners) == len(completions)
        lengths = [len(p.ids) for p in prefixes]
        P_ids, P_positions, ends = self.pack(prefixes, [0] * len(prefixes))
        rows = [_extended(suffix, ids.cpu()) for suffix, ids in zip(suffixes, completions)]
        packed = sorted(range(len(rows)), key=lambda n: len(rows[n].ids))  # alike rows side by side
        row_lengths, row_owners = [len(rows[n].ids) for n in packed], [owners[n] for n in packed]
        S_ids, S_positions, _ = self.pack([rows[n] for n in packed], [ends[b] for b in row_owners])
        features = self._all_features(prefixes, [suffixes[n] for n in packed], features)
        tree = Tree(lengths, row_lengths, row_owners, self.device)
        positions_3T = torch.cat([P_positions, S_positions], dim=1)
        hidden_TD = self.hidden(torch.cat([P_ids, S_ids]), positions_3T, features, tree)
        index, end = [None] * len(rows), sum(lengths)
        for n in packed:
            end += len(rows[n].ids)
            index[n] = torch.arange(end - len(completions[n]), end) - 1  # predicted one before
        hidden_CD = hidden_TD.index_select(0, torch.cat(index).to(self.device))
        targets_C = torch.cat([c.to(self.device) for c in completions])
        head = self.model.lm_head.weight
        if support is not None:
            parts = [self._score_among(hidden_CD[part], targets_C[part], temperature,
                                       support if isinstance(support, int) else support[part])
                     for part in _chunks(len(hidden_CD), len(head))]
            return tuple(torch.cat(x) for x in zip(*parts))
        logp_C, entropy_C = TokenLogp.apply(hidden_CD, head, targets_C, temperature or 1.0, entropy)
        return logp_C, entropy_C if entropy else None

    def _all_features(self, prefixes, suffixes, features):
        """Return features in packed order; the prefixes' are reused where the caller has them."""
        if features is None:
            return self.features([*prefixes, *suffixes])
        more = self.features(suffixes)
        if more is None:
            return features
        return Features(torch.cat([features.embeddings, more.embeddings]),
                        [torch.cat(pair) for pair in zip(features.deepstack, more.deepstack)])

    def _score_among(self, hidden_CD, targets_C, temperature, support):
        """Return log π [C] of the targets among a support and themselves, and the support [C, K].

        support: ids [C, K], or K for the K likeliest tokens of each place.
        """
        logits_CV = self.logits(hidden_CD, temperature)
        if isinstance(support, int):
            support = logits_CV.topk(min(support, logits_CV.shape[-1]), dim=-1).indices
        target_C1 = logits_CV.gather(-1, targets_C[:, None])
        itself_CK = support == targets_C[:, None]  # counts once
        other_CK = logits_CV.gather(-1, support).masked_fill(itself_CK, float("-inf")) - target_C1
        return -F.pad(other_CK, (0, 1)).logsumexp(-1), support

    # -- sampling

    @torch.no_grad()
    def prefill(self, prefixes: list) -> Cache:
        """Run the prefixes once and keep their keys and values for all tries and repairs."""
        ids_T, positions_3T, ends = self.pack(prefixes, [0] * len(prefixes))
        lengths, features = [len(p.ids) for p in prefixes], self.features(prefixes)
        tree = Tree(lengths, [], [], self.device, store=[])
        self.hidden(ids_T, positions_3T, features, tree)
        keys, values = ([x.contiguous() for x in layers] for layers in zip(*tree.store))
        return Cache(lengths, ends, keys, values, features if self.freeze_vision else None)

    @torch.no_grad()
    def sample(self, cache: Cache, suffixes: list, owners: list[int], uniforms: Tensor,
               max_completion: int, temperature: float = 1.0, top_p: float = 1.0,
               done: Callable | None = None) -> list[Completion]:
        """Sample one completion per suffix, all rows together, from the prefixes in `cache`.

        suffixes: N segments; owners: N indices into the cache's prefixes; uniforms: [N,
        max_completion] in [0, 1), row n's randomness, so that a row's text depends on nothing but
        its own prompt and numbers. temperature 0 is greedy. Returns N Completions. done(n,
        completion) is called for each row as soon as it is known to have ended.
        """
        N, device = len(suffixes), self.device
        ids_T, positions_3T, ends = self.pack(suffixes, [cache.next_position[b] for b in owners])
        tree = Tree(cache.lengths, [len(s.ids) for s in suffixes], list(owners), device, cache, [])
        hidden_TD = self.hidden(ids_T, positions_3T, self.features(suffixes), tree)
        last = torch.tensor(tree.suffix_lengths, device=device).cumsum(0) - 1
        hidden_ND = hidden_TD[last]
        rows = DecodeRows(self.model, cache, tree, ends, max_completion, self.record)
        eos = torch.tensor(sorted(self.eos_ids), device=device)
        uniforms_NC = uniforms.to(device)
        live_N = torch.arange(N, device=device)
        ended_N = torch.zeros(N, dtype=torch.bool, device=device)
        ids_NC = torch.full((N, max_completion), int(eos[0]), device=device)
        logp_NC = torch.zeros(N, max_completion, device=device)
        completions = [None] * N
        check_every = 16 if device.type == "cuda" else 1  # asking who has ended is a sync
        for t in range(max_completion):
            logits_NV = self.logits(hidden_ND, temperature, cache.linear(self.model.lm_head))
            token_n, logp_n = self._draw(logits_NV, uniforms_NC[live_N, t], temperature, top_p)
            ids_NC[live_N, t], logp_NC[live_N, t] = token_n, logp_n
            ended_N |= torch.isin(token_n, eos)
            if (t + 1) % check_every == 0 or t + 1 == max_completion:
                over = ended_N if t + 1 < max_completion else torch.ones_like(ended_N)
                for n in live_N[over].tolist():
                    if completions[n] is None:
                        completions[n] = self._completion(ids_NC[n, :t + 1], logp_NC[n, :t + 1])
                        if done is not None:
                            done(n, completions[n])
                keep = (~over).nonzero()[:, 0]
                if not len(keep):
                    break
                if len(keep) <= (len(live_N) // 2 if self.record else len(live_N) - 1):
                    rows.keep(keep)
                    live_N, ended_N, token_n = live_N[keep], ended_N[keep], token_n[keep]
            hidden_ND = rows.step(token_n, t)
        return completions

    @torch.inference_mode()
    def _draw(self, logits_NV, uniform_N, temperature, top_p):
        """Draw one token per row where the cumulative distribution passes `uniform`.

        It is that of the top-p set without banned ids; at temperature 0 the likeliest is taken. The
        log-prob is of all tokens, as in scoring: before any update the ratio of the two is 1.
        """
        allowed_NV = logits_NV.index_fill(-1, self.banned, float("-inf"))
        if temperature == 0:
            token_N1 = allowed_NV.argmax(-1, keepdim=True)
        else:
            p_NV = allowed_NV.softmax(-1)
            if top_p < 1:
                p_NV *= p_NV.clone().ge_(nucleus(p_NV, top_p))  # in fp32: faster than as bools
            mass_NV = p_NV.cumsum(-1)
            total_N1 = mass_NV[:, -1:]
            target_N1 = uniform_N[:, None] * total_N1  # below the total, also after rounding
            target_N1 = target_N1.minimum(total_N1.nextafter(torch.zeros_like(total_N1)))
            token_N1 = torch.searchsorted(mass_NV, target_N1, right=True)
        return token_N1[:, 0], logits_NV.log_softmax(-1).gather(-1, token_N1)[:, 0]

    def _completion(self, ids_C, logp_C):
        ids = ids_C.tolist()
        end = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), None)
        return Completion(ids_C[:end].cpu(), logp_C[:end].clone(), end is not None)

    # -- weights

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep FSDP's parameters whole on this rank in the block: ranks sample without meeting."""
        parts = [m for m in self.modules() if isinstance(m, fsdp.FSDPModule)]
        if parts:
            self.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
            if parts:
                self.set_reshard_after_forward(True)

    @torch.no_grad()
    def follow(self, other: "Student", rate: float) -> None:
        """Set θ ← θ + μ (θ_other − θ), each rank its own shard; μ = `rate`, 1 for a copy."""
        theirs = local(other.trained())
        self.scatter()
        mine = [weight for weight, its in zip(self.parameters(), other.parameters(), strict=True)
                if its.requires_grad]
        for weight, its in zip(local(mine), theirs, strict=True):
            weight.lerp_(its, rate)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None,
             merge: bool = False) -> None:
        """Write a Hugging Face checkpoint: weights, config, processor. Every rank must call it.

        Of a student with adapters these alone, in peft's format and fp32, or with `merge` whole
        weights W + (α / r) B A.
        """
        if self.adapted and not merge:
            return self._save_adapters(Path(folder))
        model, whole = self.model, StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)
        if not dist.is_initialized() or dist.get_rank() == 0:
            dtype, config = dtype or model.dtype, model.config
            if model.lm_head.weight is model.model.language_model.embed_tokens.weight:
                del state["lm_head.weight"]  # tied: it stands once
            for name in [name for name in state if name.endswith(".lora_A")]:
                A, B = (state.pop(f"{name[:-1]}{part}").float() for part in "AB")
                name = f"{name.removesuffix('.lora_A')}.weight"
                state[name] = torch.addmm(state[name].float(), B, A, alpha=self.adapted[0].scale)
            state = {name: weight.to(dtype) for name, weight in state.items()}
            with _no_bars():
                model.save_pretrained(folder, state_dict=state)
            for part in (config, config.text_config, config.vision_config):
                part.dtype = dtype
            config.save_pretrained(folder)  # again: it said the type that the master weights have
            self.processor.save_pretrained(folder)

    def _save_adapters(self, folder):
        """Write adapter_config.json, adapter_model.safetensors and the processor."""
        self.scatter()
        layers = {name: layer for name, layer in self.model.named_modules()
                  if isinstance(layer, Adapted)}
        tensors = {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
                   for name, layer in layers.items() for part in ("lora_A", "lora_B")}
        tensors = {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu().contiguous()
                   for name, x in tensors.items()}
        if not dist.is_initialized() or dist.get_rank() == 0:
            base = self.model.name_or_path  # as it was loaded: hub name or folder
            base = str(Path(base).resolve()) if Path(base).is_dir() else base
            written = PLAIN | {"task_type": "CAUSAL_LM", "base_model_name_or_path": base,
                               "r": len(self.adapted[0].lora_A), "lora_dropout": 0.0,
                               "lora_alpha": self.adapted[0].alpha, "target_modules": list(layers)}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ADAPTER).write_text(json.dumps(written, indent=1))
            save_file(tensors, folder / ADAPTERS, {"format": "pt"})
            self.processor.save_pretrained(folder)


def recompute_blocks(model: Any) -> None:
    """Keep no activations inside a model's blocks: the backward computes them anew."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable  # its name in transformers 5.17
    enable({"use_reentrant": False})


@contextmanager
def _no_bars():
    """Hide transformers' bars for its files, which would tear ours; those of downloads stay."""
    before = set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(before)


class TokenLogp(torch.autograd.Function):
    """Log-probs of the target tokens, and entropies of their distributions, both fp32 [C].

    logp_c = l_{c,y_c} − logsumexp l_c with l = h Wᵀ / temperature, and for the backward
    ∂logp_c/∂l_c = onehot(y_c) − softmax l_c. Only some rows of [C, V] are ever held, in fp32: the
    backward begins with the last ones and computes those before anew. The entropy has no gradient;
    without `entropy` it is left zero.
    """

    @staticmethod
    def forward(ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor,
                temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        """Compute both and keep the last chunk's log-probs [c, V] for the backward."""
        # three tensors and not the rows of one: FSDP warns of outputs that are views
        lse_C, logp_C, entropy_C = (hidden_CD.new_zeros(len(hidden_CD), dtype=torch.float32)
                                    for _ in range(3))
        for part in _chunks(len(hidden_CD), len(weight_VD)):
            logp_cV = None  # at most one chunk at a time
            logp_cV = _logits(hidden_CD[part], weight_VD, temperature)
            lse_C[part] = logp_cV.logsumexp(-1)
            logp_cV.sub_(lse_C[part, None])
            logp_C[part] = logp_cV.gather(-1, targets_C[part, None])[:, 0]
            if entropy:
                entropy_C[part] = -(logp_cV.exp().mul_(logp_cV)).sum(-1)
        ctx.save_for_backward(hidden_CD, weight_VD, targets_C, lse_C)
        ctx.temperature, ctx.last_logp_cV = temperature, logp_cV
        ctx.mark_non_differentiable(entropy_C)
        return logp_C, entropy_C

    @staticmethod
    def backward(ctx: Any, dlogp_C: Tensor, _: Tensor) -> tuple:
        """Return the gradients of the hidden states and of the head."""
        hidden_CD, weight_VD, targets_C, lse_C = ctx.saved_tensors
        dhidden_CD = torch.empty_like(hidden_CD)
        dweight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        scale_C1 = (dlogp_C / ctx.temperature)[:, None]
        logp_cV, ctx.last_logp_cV = ctx.last_logp_cV, None
        for part in reversed(_chunks(len(hidden_CD), len(weight_VD))):
            if logp_cV is None:
                logp_cV = _logits(hidden_CD[part], weight_VD, ctx.temperature)
                logp_cV.sub_(lse_C[part, None])
            dlogits_cV = logp_cV.exp_().mul_(-scale_C1[part])  # −dlogp softmax l
            dlogits_cV.scatter_add_(-1, targets_C[part, None], scale_C1[part])
            dlogits_cV, logp_cV = dlogits_cV.to(hidden_CD.dtype), None
            dhidden_CD[part] = dlogits_cV @ weight_VD
            if dweight_VD is not None:
                dweight_VD.addmm_(dlogits_cV.T, hidden_CD[part])
        return dhidden_CD, dweight_VD, None, None, None


def _logits(hidden_CD, weight_VD, temperature):
    logits_CV = F.linear(hidden_CD, weight_VD).float()
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def _chunks(C, V):
    rows = max(ROWS_OF_LOGITS, LOGITS_AT_ONCE // V)
    return [slice(start, start + rows) for start in range(0, max(C, 1), rows)]


def nucleus(p_NV: Tensor, top_p: float) -> Tensor:
    """Return the smallest value [N, 1] of each row's top-p set: the fewest tokens of that mass.

    Only values are sorted; on a CPU by numpy, which does that much faster than torch.sort.
    """
    rising_NV = p_NV.sort(-1).values if p_NV.is_cuda else torch.from_numpy(np.sort(p_NV.numpy()))
    mass_NV = rising_NV.cumsum(-1)
    outside_N1 = torch.searchsorted(mass_NV, mass_NV[:, -1:] * (1 - top_p), right=True)
    return rising_NV.gather(-1, outside_N1.clamp(max=p_NV.shape[-1] - 1))


def _extended(segment, ids):
    """Return the segment with text ids appended."""
    return type(segment)(torch.cat([segment.ids, ids]), segment.pixels, segment.grids,
                         segment.seconds_per_grid)


def cast(module: nn.Module, dtype: torch.dtype, master: bool) -> nn.Module:
    """Turn the module's weights into `dtype`, those that are trained and masters into fp32.

    Its buffers stay as they are: bfloat16 would round a rotary frequency by up to 1/512 of itself,
    an error of the angle that grows with the position.
    """
    for weight in module.parameters():
        weight.data = weight.data.to(torch.float32 if master or weight.requires_grad else dtype)
    return module


def shard(student: Student, device: torch.device, dtype: torch.dtype, master: bool,
          offload: bool) -> Student:
    """Shard the student with FSDP: each block its own unit, all else the root; fp32 reduction.

    A unit may hold frozen weights in another type than the trained ones.
    """
    precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                          cast_forward_inputs=False)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    place, inner = fsdp.CPUOffloadPolicy() if offload else fsdp.OffloadPolicy(), student.model.model
    for unit in [*inner.visual.blocks, *inner.language_model.layers, student]:
        fsdp.fully_shard(cast(unit, dtype, master), mesh=mesh, mp_policy=precision,
                         reshard_after_forward=True, offload_policy=place)  # the root as well
    for name in ("prefill", "sample"):
        fsdp.register_fsdp_forward_method(student, name)
    return student


# ---------------------------------------------------------------------------------------------
# Decoding one token per row


class DecodeRows:
    """The growing key-value cache of N rows, and the one-token forward through the layers.

    A prefix's keys and values stand once, whatever the number of its rows: the queries of all its
    rows meet them in one product. A row's own slots are [suffix, padded | completion], so that a
    step writes the same slot of all (`own`: per layer keys and values [2, n, L, E]); one softmax
    runs over prefix and own slots.

    `record` (cuda_graph) makes a step's kernels, on slots whose number then is fixed for many
    steps, into a function that repeats them; without it a step sees just the slots in use.

    Dimensions: R rows of the prompt that has most, g query heads of one key head, b = B K, n = N K.
    """

    def __init__(self, model: nn.Module, cache: Cache, tree: Tree, ends: list[int],
                 max_completion: int, record: Callable | None = None):
        text, lengths, device = model.model.language_model, tree.suffix_lengths, tree.device
        self.record, self.recorded = record, 0
        self.slots_L = torch.arange(max(lengths) + max_completion, device=device)
        self.at_1 = self.slots_L[:1].clone()
        self.embed, self.norm, self.base = text.embed_tokens, text.norm, max(lengths)
        self.layers = [_modules(layer, cache.linear) for layer in text.layers]
        self.key_heads = cache.keys[0].shape[1]
        self.prefixes = [(keys.flatten(0, 1), values.flatten(0, 1))
                         for keys, values in zip(cache.keys, cache.values)]
        self.own = [F.pad(torch.stack(pair).flatten(1, 2), (0, 0, 0, max_completion))
                    for pair in tree.store]
        self.prefix_bias = self.own_bias = None
        dtype = cache.keys[0].dtype
        if len(set(cache.lengths)) > 1:
            slots_P = torch.arange(cache.keys[0].shape[2], device=device)
            self.prefix_bias = _bias(slots_P < _column(cache.lengths, device), dtype)
        if len(set(lengths)) > 1 or record:
            own = (self.slots_L < _column(lengths, device)) | (self.slots_L >= self.base)
            self.own_bias = _bias(own, dtype)
        positions_NC = _column(ends, device) + torch.arange(max_completion, device=device)
        cos, sin = text.rotary_emb(cache.keys[0], positions_NC.expand(3, -1, -1))
        sin[..., :sin.shape[-1] // 2] *= -1  # the sign of the half-split rotation
        self.cos_NC1E, self.sin_NC1E = cos[:, :, None], sin[:, :, None]
        self.prompts = list(range(len(cache.lengths)))
        self._place(tree.owners.tolist())

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.recorded = 0
        self.own = [self._some(own, rows, 1) for own in self.own]
        self.own_bias = None if self.own_bias is None else self.own_bias[rows]
        self.cos_NC1E, self.sin_NC1E = self.cos_NC1E[rows], self.sin_NC1E[rows]
        self._place([self.owners[n] for n in rows.tolist()])

    def _place(self, owners):
        """Lay the rows out by prompt: grid [B, R] of row numbers, short rows filled up with any."""
        self.owners, live = owners, sorted(set(owners))
        if live != self.prompts:
            kept = torch.tensor([self.prompts.index(b) for b in live], device=self.own[0].device)
            self.prefixes = [(self._some(keys, kept), self._some(values, kept))
                             for keys, values in self.prefixes]
            self.prefix_bias = None if self.prefix_bias is None else self.prefix_bias[kept]
            self.prompts = live
        rows = [[n for n, owner in enumerate(owners) if owner == b] for b in live]
        R, self.grid, self.back = max(len(row) for row in rows), None, None
        grid = [n for row in rows for n in row + row[:1] * (R - len(row))]
        if grid != list(range(len(owners))):
            back = [grid.index(n) for n in range(len(owners))]
            device = self.own[0].device
            self.grid, self.back = (torch.tensor(x, device=device) for x in (grid, back))

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
            self.repeat = self.record(lambda: self._forward(self.token_N, slots))
        self.token_N.copy_(token_N)
        return self.repeat()

    def _forward(self, token_N, slots):
        """Write the tokens' keys and values at slot `at_1` and attend to the first `slots`."""
        x_ND, E, K = self.embed(token_N), self.cos_NC1E.shape[-1], self.key_heads
        N = len(x_ND)
        cos_N1E, sin_N1E = (x.index_select(1, self.at_1 - self.base)[:, 0]
                            for x in (self.cos_NC1E, self.sin_NC1E))
        bias = self.own_bias if self.own_bias is None else self.own_bias[..., :slots]
        if self.record:  # slots that are still to be written
            bias = bias.masked_fill(self.slots_L[:slots] > self.at_1, float("-inf"))
        for layer, (norm1, qkv, q_norm, k_norm, out, norm2, gate_up, act, down) in \
                enumerate(self.layers):
            y_NHE = qkv(norm1(x_ND)).view(N, -1, E)
            H = y_NHE.shape[1] - 2 * K  # heads of queries, then of keys, then of values
            if q_norm is not None:
                y_NHE[:, :H], y_NHE[:, H:-K] = q_norm(y_NHE[:, :H]), k_norm(y_NHE[:, H:-K])
            y_NHE[:, :-K] = _rotate(y_NHE[:, :-K], cos_N1E, sin_N1E)
            own_2n1E = y_NHE[:, H:].view(N, 2, K, E).transpose(0, 1).reshape(2, N * K, 1, E)
            self.own[layer].index_copy_(2, self.at_1, own_2n1E)
            x_ND = x_ND + out(self._attend(y_NHE[:, :H], layer, slots, bias))
            gate_NI, up_NI = gate_up(norm2(x_ND)).chunk(2, dim=-1)
            x_ND = x_ND + down(act(gate_NI) * up_NI)
        return self.norm(x_ND)


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


def _modules(layer, linear):
    """Return a layer's parts in order of use; `linear` makes its linear layers fit for few rows."""
    attention, mlp = layer.self_attn, layer.mlp
    return (layer.input_layernorm, linear(attention.q_proj, attention.k_proj, attention.v_proj),
            getattr(attention, "q_norm", None), getattr(attention, "k_norm", None),
            linear(attention.o_proj), layer.post_attention_layernorm,
            linear(mlp.gate_proj, mlp.up_proj), mlp.act_fn, linear(mlp.down_proj))


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

    if not any(isinstance(layer, Adapted) for layer in layers):
        return product
    pairs = [(layer.lora_A, layer.lora_B * layer.scale) if isinstance(layer, Adapted) else
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
