"""The recipe of toy_student*.safetensors: teaches the random toy student to look. Not a test.

    python tests/toy_student.py FOLDER [--steps 2000 --family qwen2_5_vl]

The five questions of a clip hang as suffixes from one prefix, the video, which costs half of what a
prefix each would. A quarter of the suffixes carry the sample's patch. The weights in the repository
had 100 steps of another batching before 1,900 of these, so a rerun gives much the same weights, not
the same bits.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import teacher
import toy
from model import Student
from patch import render
from runs import read_rows
from video import ClipLoader

LR, CLIPS = 2e-3, 8  # peak learning rate; clips of a step, five questions each


def load(folder, student, prompts):
    """Return for each clip: the video as prefix, and its questions' suffixes and completions.

    A question has two suffixes, without and with its patch.
    """
    loader = ClipLoader(frames=16, max_pixels=56 * 56, factor=prompts.factor, workers=0)
    end, annotated, clips = "<|vision_end|>", teacher.Annotated(), {}
    last = prompts.tokenizer.convert_tokens_to_ids(end)
    for sample in data.load_samples(read_rows(folder / "warm.json"), {"": folder / "videos"}):
        if sample.media not in clips:
            sample = loader.get(sample)[0]
            whole = prompts.prefix(sample)
            cut = int((whole.ids == last).nonzero()[-1]) + 1
            clips[sample.media] = sample.clip, replace(whole, ids=whole.ids[:cut]), []
        clip, _, rows = clips[sample.media]
        sample = replace(sample, clip=clip)
        question = prompts.patch(prompts.template.replace("{question}", sample.question)).ids
        evidence = render(annotated.diagnose(sample, sample.process), "text")
        patch = prompts.patch(evidence).ids
        header = prompts.header
        rows.append((replace(header, ids=torch.cat([question, header.ids])),
                     replace(header, ids=torch.cat([question, patch, header.ids])),
                     prompts.completion(f"{sample.process}\n<answer>{sample.answer}</answer>")))
    return [clip[1:] for clip in clips.values()]


def nll(student, clips, patched, rng):
    """Return the traces' mean negative log-likelihood; a share `patched` of them has a patch."""
    rows = [(b, row) for b, (_, rows) in enumerate(clips) for row in rows]
    suffixes = [row[rng.random() < patched] for _, row in rows]
    logp, _ = student([prefix for prefix, _ in clips], suffixes, [b for b, _ in rows],
                      [row[2] for _, row in rows])
    return -logp.mean()


def main():
    """Train by the command line's flags and write the weights into the world's folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--family", default="qwen2_5_vl", choices=toy.WEIGHTS)
    options = parser.parse_args()
    toy.make(options.folder, train=5, heldout=5, warm=5500, guessed=0.0, pretrained=False,
             family=options.family)
    student = Student.load(str(options.folder / "model"))
    prompts = data.Prompts(student.processor, (options.folder / "template.txt").read_text())
    clips, rng = load(options.folder, student, prompts), random.Random(0)
    clips, held = clips[:-40], clips[-40:]
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(options.steps):
        fall = min(1.0, (1 - step / options.steps) / 0.4)  # the last 40 % go down to zero
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 20) * fall
        loss = nll(student, rng.sample(clips, CLIPS), 0.25, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                print(f"step {step + 1}: nll of held-out clips {nll(student, held, 0, rng):.4f}, "
                      f"with patches {nll(student, held, 1, rng):.4f}", flush=True)
    weights = {name: weight.half() for name, weight in student.model.state_dict().items()}
    save_file(weights, options.folder / toy.WEIGHTS[options.family].name)


if __name__ == "__main__":
    main()
