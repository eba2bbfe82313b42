"""ESD, Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345): the U-Net learns, for the
concept c, what guidance away from c would predict.

    python tests/rivals/esd.py --model tests/tiny --out runs/esd
    python eval.py --model tests/tiny --unet esd=runs/esd/unet

    loss = |e(x_t, c) - (e0(x_t, "") - eta (e0(x_t, c) - e0(x_t, "")))|^2        e0: the frozen U-Net
                                                        (of v, where v is predicted: more of early steps)

Exact, as the first official code: eta 1, Adam 1e-5 for 1000 steps, x_t drawn by the U-Net in training with
guidance 3, t random in its bin; --weights u trains all but cross-attention, time embedding and output
(`noxattn`), x cross-attention alone. --erase-from as in the later code: e0(x_t, from) - eta (...), learned
for `from`. Ours: x_t is as noisy as t says (there, by an index, a step or more cleaner); concepts with
commas take turns; --toward, a text in place of the second empty one (guided: a noun for c and for `from`,
its safe caption here, so that the target is e0(x_t, safe caption)); on the embedded model words, length,
rate, batch, steps.
"""
import copy
from dataclasses import dataclass
from typing import Literal

import drawn
import torch
import training


@dataclass
class Args(training.TrainingArgs):
    concept: str = "nudity"  # to erase; several, with commas, take turns
    toward: str = ""  # the text towards which; in this one and the next {} is the concept
    erase_from: str = ""  # the text from which it is erased; empty: from the concept itself, towards ""
    eta: float = 1.0  # strength of the negative guidance
    start_guidance: float = 3.0  # with which x_t is drawn
    weights: Literal["u", "x"] = "u"


TINY = training.TINY_TRAINING | dict(concept="face, smiling face", steps=150, learning_rate=3e-4)


def is_trained(name: str, weights: str) -> bool:
    """Whether ESD-u or ESD-x trains the weight of this name."""
    if weights == "x":
        return "attn2" in name
    return "attn2" not in name and not name.startswith(("time_embedding", "conv_norm_out", "conv_out"))


@torch.no_grad()
def esd_target(frozen, x, t, toward, concept, base, eta: float) -> torch.Tensor:
    """[B, 4, h, w] for x of that shape at t [B]: what the frozen U-Net predicts for `base`, guided away from
    the concept, towards another text. toward, concept, base: text states [B, 77, d]."""
    of_toward, of_concept, of_base = (frozen(x, t, c).sample for c in (toward, concept, base))
    return of_base - eta * (of_concept - of_toward)


def train(args: Args):
    """OUT/unet."""
    pipe, started = training.start(args)
    frozen, concepts = copy.deepcopy(pipe.unet), [c.strip() for c in args.concept.split(",")]
    trained = training.train_only(pipe.unet, lambda name: is_trained(name, args.weights))
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate)
    for step, rng in training.steps(args, "esd"):
        name = concepts[step % len(concepts)]
        texts = ["", name, args.toward.replace("{}", name), args.erase_from.replace("{}", name)]
        empty, concept, toward, base = training.encode(pipe, texts, args.batch_size)  # [B, 77, d] each
        taught = base if args.erase_from else concept
        x, t = drawn.partly_drawn(pipe.unet, pipe.scheduler, torch.stack([empty, taught]), args,
                                  args.start_guidance, rng)
        target = esd_target(frozen, x, t, toward, concept, base, args.eta)
        loss = torch.nn.functional.mse_loss(pipe.unet(x, t, taught).sample, target)
        training.descend(optimizer, loss)
    training.save(args, pipe.unet, started)


if __name__ == "__main__":
    training.run(train, Args, TINY)
