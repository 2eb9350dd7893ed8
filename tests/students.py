"""Checkpoints in the layouts that their authors publish, with small random weights.

    path = publish(folder, "video_r1")

File names, keys, flags of tokens and names of weights are those of the hub; sizes are small, and
the chat templates do what the published ones do, in other words.
"""

import json
from pathlib import Path

import torch
from conftest import CORPUS
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

# The added tokens in the order of their ids, behind the vocabulary; True: special.
QWEN2_TOKENS = {
    "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|object_ref_start|>": True,
    "<|object_ref_end|>": True, "<|box_start|>": True, "<|box_end|>": True,
    "<|quad_start|>": True, "<|quad_end|>": True, "<|vision_start|>": True,
    "<|vision_end|>": True, "<|vision_pad|>": True, "<|image_pad|>": True, "<|video_pad|>": True,
    "<tool_call>": False, "</tool_call>": False, "<|fim_prefix|>": False, "<|fim_middle|>": False,
    "<|fim_suffix|>": False, "<|fim_pad|>": False, "<|repo_name|>": False, "<|file_sep|>": False}
QWEN3_TOKENS = QWEN2_TOKENS | {"<tool_response>": False, "</tool_response>": False,
                               "<think>": False, "</think>": False}

_PART = (
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{%- set count.images = count.images + 1 %}"
    "{%- if add_vision_id %}{{- 'Picture ' ~ count.images ~ ': ' }}{%- endif %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part %}"
    "{%- set count.videos = count.videos + 1 %}"
    "{%- if add_vision_id %}{{- 'Video ' ~ count.videos ~ ': ' }}{%- endif %}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}")
QWEN2_CHAT = (  # a system message of its own, where the first message is none
    "{%- set count = namespace(images=0, videos=0) %}"
    "{%- for message in messages %}"
    "{%- if loop.first and message.role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{{- '<|im_start|>' ~ message.role ~ '\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}" + _PART + "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
QWEN3_CHAT = (  # tools in a system message, answers of tools in a user's; no system of its own
    "{%- set count = namespace(images=0, videos=0, last=-1) %}"
    "{%- macro shown(content) %}{%- if content is string %}{{- content }}"
    "{%- else %}{%- for part in content %}" + _PART + "{%- endfor %}{%- endif %}{%- endmacro %}"
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- shown(messages[0].content) ~ '\n\n' }}{%- endif %}"
    "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}"
    "{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' ~ shown(messages[0].content) ~ '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set count.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\n' ~ shown(message.content) ~ '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set said = shown(message.content) %}"
    "{%- set thought = '' %}{%- if '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if THINKS and loop.index0 > count.last and (loop.last or thought) %}"
    "{{- '<think>\n' ~ thought ~ '\n</think>\n\n' ~ said }}{%- else %}{{- said }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '\n<tool_call>\n' ~ (call.function | tojson) ~ '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' ~ "
    "shown(message.content) ~ '\n</tool_response><|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if THINKS %}{{- '<think>\n' }}{%- endif %}{%- endif %}")
SWITCHED = QWEN3_CHAT.replace(  # Qwen3.5's: it thinks or not as it is told
    "{%- if THINKS %}{{- '<think>\n' }}{%- endif %}",
    "{%- if SWITCH %}{{- '<think>\n' }}{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
).replace("THINKS", "true")
TOLD = "enable_thinking is defined and enable_thinking is "
CHATS = {"qwen2": QWEN2_CHAT, "qwen3": QWEN3_CHAT.replace("THINKS", "false"),
         "thinking": QWEN3_CHAT.replace("THINKS", "true"),
         "thinks unless told": SWITCHED.replace("SWITCH", f"not ({TOLD}false)"),
         "thinks if told": SWITCHED.replace("SWITCH", f"{TOLD}true")}

GREEDY = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-06}  # Qwen2.5-VL's

# What differs between the layouts: model type, chat and which file has it, image processor.
APART, WITHIN = "chat_template.json", "tokenizer_config.json"
LAYOUTS = {
    "qwen2_5_vl": dict(type="qwen2_5_vl", chat="qwen2", sampling=GREEDY),
    "qwen2_5_vl_3b": dict(type="qwen2_5_vl", chat="qwen2", sampling=GREEDY, tied=True,
                          chat_in=(WITHIN,)),
    "video_r1": dict(type="qwen2_5_vl", chat="qwen2", sampling=GREEDY, chat_in=(APART,),
                     image_processor="Qwen2_5_VLImageProcessor"),
    "qwen3_vl": dict(type="qwen3_vl", chat="qwen3",
                     sampling={"do_sample": True, "top_p": 0.8, "top_k": 20, "temperature": 0.7}),
    "qwen3_vl_moe": dict(type="qwen3_vl_moe", chat="qwen3", sampling={"do_sample": True}),
    "qwen3_5": dict(type="qwen3_5", chat="thinks unless told", sampling={"do_sample": True},
                    chat_in=("chat_template.jinja",)),
    "qwen3_5_small": dict(type="qwen3_5", chat="thinks if told", tied=True,
                          sampling={"do_sample": True}, chat_in=(WITHIN,)),
    "qwen3_5_moe": dict(type="qwen3_5_moe", chat="thinks unless told", chat_in=(WITHIN,),
                        sampling={"do_sample": True}),
    "qwen3_vl_thinking": dict(type="qwen3_vl", chat="thinking", tied=True, chat_in=(APART,),
                              sampling={"do_sample": True, "top_p": 0.95, "top_k": 20}),
}


def publish(folder, layout, seed=0, dtype=torch.bfloat16, **changes):
    """Write a checkpoint in one of LAYOUTS, with changes to its keys, and return its folder.

    generation: keys for its file, None to leave one out; tokens: to add, and whether special.
    """
    folder, how = Path(folder), {
        "tied": False, "chat_in": (APART, WITHIN), "generation": {}, "tokens": {},
        "image_processor": "Qwen2VLImageProcessor", "eos": "<|im_end|>"} | LAYOUTS[layout] | changes
    folder.mkdir(parents=True)
    qwen3 = how["type"].startswith("qwen3")
    ids = _write_tokenizer(folder, (QWEN3_TOKENS if qwen3 else QWEN2_TOKENS) | how["tokens"], how)
    _write_processors(folder, qwen3, how)
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    _dump(folder / "generation_config.json", ends | how["sampling"] | how["generation"])
    config = _qwen3_config(ids, how["tied"], how["type"]) if qwen3 else \
        _qwen2_config(ids, how["tied"])
    _dump(folder / "config.json", config | {"model_type": how["type"]})
    _write_weights(folder, qwen3, seed, dtype)
    return str(folder)


def _dump(path, values):
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}, indent=2))


def _write_tokenizer(folder, tokens, how):
    """Write a byte-level BPE with Qwen's normaliser, split and added tokens; return their ids."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    described = json.loads(bpe.to_str())
    first = max(described["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {first + i: {"content": token, **plain, "special": special}
             for i, (token, special) in enumerate(tokens.items())}
    described["added_tokens"] = [{"id": id, **token} for id, token in added.items()]
    _dump(folder / "tokenizer.json", described)
    _dump(folder / "vocab.json", described["model"]["vocab"])
    merges = (" ".join(pair) for pair in described["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    special = [token for token, is_special in tokens.items() if is_special][1:]
    chat = CHATS[how["chat"]]
    _dump(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": special, "bos_token": None, "eos_token": how["eos"],
        "chat_template": chat if WITHIN in how["chat_in"] else None, "errors": "replace",
        "clean_up_tokenization_spaces": False, "model_max_length": 131072,
        "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})
    if APART in how["chat_in"]:
        _dump(folder / APART, {"chat_template": chat})
    elif WITHIN not in how["chat_in"]:
        (folder / "chat_template.jinja").write_text(chat)
    return {token["content"]: id for id, token in added.items()}


def _write_processors(folder, qwen3, how):
    """Write the flat preprocessor_config.json and, for Qwen3-VL, the videos' own."""
    if qwen3:
        pixels = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
                  "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                  "processor_class": "Qwen3VLProcessor"}
        size = {"longest_edge": 16777216, "shortest_edge": 65536}
        _dump(folder / "preprocessor_config.json", pixels | {
            "size": size, "image_processor_type": "Qwen2VLImageProcessorFast"})
        _dump(folder / "video_preprocessor_config.json", pixels | {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor"})
        return
    _dump(folder / "preprocessor_config.json", {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
        "rescale_factor": 1 / 255, "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, "image_processor_type": how["image_processor"],
        "processor_class": "Qwen2_5_VLProcessor"})


def _text_config(ids, tied):
    return {"vocab_size": 352, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "max_position_embeddings": 128000, "initializer_range": 0.02, "rms_norm_eps": 1e-06,
            "attention_dropout": 0.0, "use_cache": True, "tie_word_embeddings": tied}


def _vision_ids(ids):
    return {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in (
        ("vision_start", "vision_start"), ("vision_end", "vision_end"), ("image", "image_pad"),
        ("video", "video_pad"))}


def _qwen2_config(ids, tied):
    """Return a flat config, as transformers 4.49 wrote it."""
    vision = {"depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
              "num_heads": 2, "in_chans": 3, "out_hidden_size": 64, "patch_size": 14,
              "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 56,
              "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2}
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], **_text_config(ids, tied),
            **_vision_ids(ids), "vision_token_id": ids["<|vision_pad|>"], "rope_theta": 1000000.0,
            "rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default", "type": "default"},
            "sliding_window": 32768, "max_window_layers": 2, "use_sliding_window": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.49.0", "vision_config": vision}


def _qwen3_config(ids, tied, kind):
    """Return a nested config, as transformers 4.57 wrote it."""
    recurrent = kind.startswith("qwen3_5")
    vision = {"deepstack_visual_indexes": [] if recurrent else [0, 1], "depth": 3,
              "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32, "in_channels": 3,
              "initializer_range": 0.02, "intermediate_size": 48, "model_type": kind,
              "num_heads": 2, "num_position_embeddings": 64, "out_hidden_size": 64,
              "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text = {**_text_config(ids, tied), "head_dim": 16, "attention_bias": False,
            "model_type": f"{kind}_text", "dtype": "bfloat16", "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2],
                             "rope_type": "default"}}
    if recurrent:
        del text["rope_theta"], text["rope_scaling"]
        text |= {"attn_output_gate": True, "full_attention_interval": 2, "head_dim": 32,
                 "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4,
                 "linear_key_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                 "linear_value_head_dim": 8, "mamba_ssm_dtype": "float32",
                 "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
                 "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1],
                                     "partial_rotary_factor": 0.25, "rope_theta": 10000000,
                                     "rope_type": "default"}}
    if kind.endswith("moe"):
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                 "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                 "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 24}
    name = {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5",
            "qwen3_5_moe": "Qwen3_5Moe"}[kind]
    return {"architectures": [f"{name}ForConditionalGeneration"], **_vision_ids(ids),
            "tie_word_embeddings": tied, "text_config": text, "vision_config": vision,
            "transformers_version": "4.57.0.dev0"}


def _write_weights(folder, qwen3, seed, dtype):
    """Write two shards and their index; tied heads are left out, as the authors do."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    tied, weights = model.config.tie_word_embeddings, {}
    for name, weight in model.state_dict().items():
        if weight.ndim > 1:  # so large that a wrong one shows
            weight = torch.randn_like(weight) * 0.15
        if not qwen3:  # the names of transformers 4.49
            name = name.replace("model.language_model.", "model.").replace("model.visual", "visual")
        if ".experts." in name and model.config.model_type == "qwen3_vl_moe":  # as published
            weight = weight.transpose(1, 2)
        if not (tied and name == "lm_head.weight"):
            weights[name] = weight.to(dtype).contiguous()
    if model.config.model_type.startswith("qwen3_5"):  # a head for guessing ahead, never loaded
        weights["mtp.fc.weight"] = torch.zeros(64, 128, dtype=dtype)
    names, files = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    _dump(folder / "model.safetensors.index.json",
          {"metadata": {"total_size": size}, "weight_map": files})
