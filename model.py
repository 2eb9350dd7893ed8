"""The student: a vision-language model that samples and scores over the prefix tree.

The modules, weights and checkpoint format are Hugging Face's; ours are the layers over the tree,
the M-RoPE positions, the decode loop and the log-probs.

    student = Student.load("Qwen/Qwen2.5-VL-7B-Instruct", device="cuda")
    cache = student.prefill([prefix])                            # once per prompt
    completions = student.sample(cache, [header] * 8, [0] * 8, ...)
    logp, entropy = student([prefix], suffixes, owners, completions)

Dimensions: B prefixes, N suffixes (rows), P prefix tokens, S suffix tokens, C completion tokens, T
packed tokens, V vocabulary, D width.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func
from transformers.utils.logging import set_tqdm_hook

from decode import Cache, DecodeRows, cuda_graph
from prefix_tree import FAMILIES, Tree, attention_names, mrope, recur

LOGITS_AT_ONCE = 2**24  # elements of fp32 logits held at a time, but no fewer rows than these:
ROWS_OF_LOGITS = 256  # 150 MiB for Qwen's vocabulary

# ---------------------------------------------------------------------------------------------
# Checkpoints as their authors publish them

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
            raise ValueError(f"its model type is {kind}, and only {', '.join(FAMILIES)} are "
                             "supported (docs/models.md)")
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
    processor = FAMILIES[config.model_type].processor.from_pretrained(path, config=config)
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
class Features:
    """The vision tower's output for some segments [v, D], and Qwen3-VL's deepstack [v, D] each."""
    embeddings: Tensor
    deepstack: list[Tensor]


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
        self.balances, self.imbalance = False, None  # whether the next is found, see `forward`
        recur(model)
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
        balances = self.balances and torch.is_grad_enabled()
        if features is not None:
            visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
            vision = features.embeddings.to(embeds_TD.dtype)
            embeds_TD = embeds_TD.masked_scatter(visual_T[:, None], vision)
            if features.deepstack:
                extra = {"visual_pos_masks": visual_T[None],
                         "deepstack_visual_embeds": features.deepstack}
        out = text(inputs_embeds=embeds_TD[None], position_ids=positions_3T[:, None],
                   attention_mask=None, use_cache=False, tree=tree,
                   output_router_logits=balances, **extra)
        if balances:
            self.imbalance = load_balancing_loss_func(
                out.router_logits, text.config.num_experts, text.config.num_experts_per_tok)
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
        completion tokens get logits. With `support` instead: see _score_among. Where experts are to
        be balanced, `imbalance` is then Switch Transformers' auxiliary loss (2101.03961, eq. 4 to
        6) over the row's tokens and all layers, a shared token counted once.
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
        kept = [tuple(x.contiguous() for x in pair) for pair in tree.store]
        return Cache(lengths, ends, kept, features if self.freeze_vision else None)

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
        tree = Tree(cache.lengths, [len(s.ids) for s in suffixes], list(owners), device,
                    cache.layers, [])
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
            turned = FAMILIES[config.model_type].transposed
            if turned:  # transformers turns them as it reads, and not as it writes
                state |= {name: weight.mT.contiguous() for name, weight in state.items()
                          if ".experts." in name}
            state = {name: weight.to(dtype) for name, weight in state.items()}
            with _no_bars():
                model.save_pretrained(folder, state_dict=state, save_original_format=not turned)
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
