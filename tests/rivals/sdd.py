"""SDD, Safe self-Distillation Diffusion (Kim et al., 2023, arXiv 2307.05977): the U-Net learns to predict for
the concept what it predicts, itself, for the empty text; saved is the moving average of its weights.

    python tests/rivals/sdd.py --model tests/tiny --out runs/sdd
    python eval.py --model tests/tiny --unet sdd=runs/sdd/unet

    loss = |e(x_t, c) - stop_gradient(e(x_t, ""))|^2        (of v, where v is predicted)

Exact, as the official code: x_t drawn by the average (the teacher) with guidance 3 on all concepts joined, t
random in its bin, the student on one concept in turn, cross-attention only, AdamW 1e-5, weight decay 1e-4,
gradient norm 1, 1500 steps, average 0.999. Ours: x_t stays noise where no step is drawn (their code draws it
to the end by mistake); --toward, a text in place of the empty one (guided: the safe caption of a noun); on
the embedded model words, length, rate, batch, steps, and an average of 0.99.
"""
import copy
from dataclasses import dataclass

import drawn
import torch
import training


@dataclass
class Args(training.TrainingArgs):
    steps: int = 1500
    concept: str = "nudity, naked, nude, topless"  # to erase; several, with commas, take turns
    toward: str = ""  # what is predicted in place of it; {} is the concept
    start_guidance: float = 3.0  # with which x_t is drawn
    average: float = 0.999  # what the teacher keeps of itself at each step


TINY = training.TINY_TRAINING | dict(concept="face, smiling face", steps=150, learning_rate=1e-4,
                                     average=0.99)


def sdd_loss(student, x, t, toward, concept) -> torch.Tensor:
    """Of x [B, 4, h, w] at t [B]; toward, concept: text states [B, 77, d]."""
    with torch.no_grad():
        target = student(x, t, toward).sample
    return torch.nn.functional.mse_loss(student(x, t, concept).sample, target)


def train(args: Args):
    """OUT/unet."""
    pipe, started = training.start(args)
    student, concepts = copy.deepcopy(pipe.unet), [c.strip() for c in args.concept.split(",")]
    trained = training.train_only(student, lambda name: "attn2" in name)
    teacher = [pipe.unet.get_parameter(n) for n, p in student.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=1e-4)
    for step, rng in training.steps(args, "sdd"):
        name = concepts[step % len(concepts)]
        texts = ["", args.concept, name, args.toward.replace("{}", name)]
        empty, joined, concept, toward = training.encode(pipe, texts, args.batch_size)  # [B, 77, d] each
        x, t = drawn.partly_drawn(pipe.unet, pipe.scheduler, torch.stack([empty, joined]), args,
                                  args.start_guidance, rng)
        training.descend(optimizer, sdd_loss(student, x, t, toward, concept), clip=1.0)
        for ours, new in zip(teacher, trained, strict=True):
            ours.data.lerp_(new.data, 1 - args.average)
    training.save(args, pipe.unet, started)


if __name__ == "__main__":
    training.run(train, Args, TINY)
