"""Tiny random students of every family and segments for them, made on the spot for the tests."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from model import Student, add_adapters

VOCABULARY, IMAGE, VIDEO, START, END, EOS = 200, 190, 191, 192, 193, 194
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
OURS = {"text_config": "prefix_tree", "vision_config": "sdpa"}  # attention


@dataclass
class Segment:
    ids: torch.Tensor
    pixels: torch.Tensor | None
    grids: torch.Tensor
    seconds_per_grid: torch.Tensor


class Tokenizer:
    """The three things a Student asks of a tokenizer; ids 198 and 199 are in the embedding only."""
    eos_token_id = EOS
    added_tokens_decoder = {i: SimpleNamespace(special=True) for i in range(IMAGE, 196)}

    def __len__(self):
        return 198


def tiny_config(family):
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    text = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
                bos_token_id=None, eos_token_id=EOS, pad_token_id=None)
    vision = dict(hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14,
                  temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=64)
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
               vision_end_token_id=END)
    if family == "qwen2_5_vl":
        vision.update(depth=2, window_size=56, fullatt_block_indexes=[1], tokens_per_second=2)
    else:
        vision.update(depth=3, num_position_embeddings=64)
        text["head_dim"] = 16
    if family.startswith("qwen3_vl"):
        vision.update(deepstack_visual_indexes=[0, 1])
    if family.startswith("qwen3_5"):  # a quarter of 32 is turned: 4 frequencies
        text.update(head_dim=32, layer_types=["linear_attention"] * 2 + ["full_attention"],
                    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                    linear_value_head_dim=12)
        rope.update(mrope_section=[2, 1, 1], partial_rotary_factor=0.25)
    if family.endswith("_moe"):
        text.update(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                    shared_expert_intermediate_size=40)
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, **ids)


def tiny_student(family, seed=0, lora=(), tied=False, **options):
    """Return a student; its weights are so large that wrong attention shows in the 5th decimal.

    tied: the head is the embedding. lora: what add_adapters is told; then B is as large as A.
    """
    torch.manual_seed(seed)
    config = tiny_config(family)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=OURS)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
        elif name.endswith(".A_log"):  # states that last, so that what is read of them shows
            torch.nn.init.uniform_(p, -6.0, -2.0)
    if lora:
        add_adapters(model, *lora)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.15)
    return Student(model, SimpleNamespace(tokenizer=Tokenizer()), **options)


def words(n, seed):
    """Return n text ids."""
    return torch.randint(0, 180, (n,), generator=torch.Generator().manual_seed(seed))


def text(n, seed=0):
    return Segment(words(n, seed), None, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0))


def video(family, t, h, w, tail, seconds=1.3):
    """Return a prompt: 5 words, a video of t x h x w patches, `tail` words."""
    n, seed = h * w // 4, 100 * t + tail
    run = [START] + [VIDEO] * n + [END]
    if family != "qwen2_5_vl":  # one run per temporal patch, a timestamp before each
        run = [id for i in range(t) for id in words(3, seed + i).tolist() + run]
    else:
        run = [START] + [VIDEO] * (n * t) + [END]
    ids = torch.cat([words(5, seed), torch.tensor(run), words(tail, seed + 50)])
    grids = torch.tensor([[t, h, w]])
    return Segment(ids, _pixels(t * h * w, seed), grids, torch.tensor([seconds]))


def image(h, w, tail):
    """Return a prompt or patch with a still image: 4 words, the image, `tail` words."""
    run = torch.tensor([START] + [IMAGE] * (h * w // 4) + [END])
    ids = torch.cat([words(4, tail), run, words(tail, tail + 9)])
    return Segment(ids, _pixels(h * w, tail), torch.tensor([[1, h, w]]), torch.tensor([0.0]))


def _pixels(rows, seed):
    return torch.randn(rows, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def separate_logits(student, prefix, suffix, completion):
    """Return logits the plain way: Hugging Face's own model and attention over one whole row.

    They are [C + 1, V] and predict the completion's tokens and the one after them.
    """
    ids = torch.cat([prefix.ids, suffix.ids, completion])
    inputs = {}
    for token, name, grid in ((VIDEO, "pixel_values_videos", "video_grid_thw"),
                              (IMAGE, "pixel_values", "image_grid_thw")):
        having = [s for s in (prefix, suffix) if (s.ids == token).any()]
        if having:
            inputs[name] = torch.cat([s.pixels for s in having])
            inputs[grid] = torch.cat([s.grids for s in having])
    grids = torch.cat([prefix.grids, suffix.grids]).tolist()
    seconds = torch.cat([prefix.seconds_per_grid, suffix.seconds_per_grid]).tolist()
    positions = plain_positions(ids.tolist(), grids, seconds, student.model.config)
    student.model.set_attn_implementation("sdpa")
    try:
        mask = torch.ones(1, len(ids), dtype=torch.long)
        out = student.model(input_ids=ids[None], attention_mask=mask,
                            position_ids=positions[:, None], use_cache=False, **inputs)
    finally:
        student.model.set_attn_implementation(OURS)
    return out.logits[0, len(ids) - len(completion) - 1:]


def plain_positions(ids, grids, seconds, config):
    """Return M-RoPE positions of a whole row, token by token, by the released checkpoints' rule.

    It is written apart from the code under test.
    """
    merge, qwen3 = config.vision_config.spatial_merge_size, config.model_type != "qwen2_5_vl"
    rate = getattr(config.vision_config, "tokens_per_second", 0)
    cells = []
    for (t, h, w), s in zip(grids, seconds):
        for k in range(t):
            if qwen3 or k == 0:
                cells.append([])
            moment = 0 if qwen3 else int(torch.tensor(float(k)) * s * rate)
            cells[-1] += [(moment, y, x) for y in range(h // merge) for x in range(w // merge)]
    rows, top, inside = [], -1, None
    for id in ids:
        if id in (IMAGE, VIDEO):
            if not inside:
                inside, start = cells.pop(0)[::-1], top + 1
            rows.append([start + axis for axis in inside.pop()])
        else:
            rows.append([top + 1] * 3)
        if not inside:
            top = max(top, max(max(row) for row in rows))
    return torch.tensor(rows).T
