"""SafeGen (Li et al., CCS 2024, arXiv 2404.06666): self-attention learns, without a text, to denoise a
picture that shows the concept to the same picture under a mosaic, and a benign picture to itself.

    python tests/rivals/safegen.py --model tests/tiny --out runs/safegen
    python eval.py --model tests/tiny --unet safegen=runs/safegen/unet

    loss = 0.1 |e(z_t, "") - (noise + z - z_covered)|^2 + 0.9 |e(y_t, "") - noise'|^2      y: benign

Exact, as the official code: objective, context always "", self-attention only, AdamW 1e-5, weight decay 1e-2,
gradient norm 1, 1000 updates of 5 pictures, weights averaged by (1 + s) / (10 + s). --exact-target
puts sqrt(ab / (1 - ab)) before z - z_covered: without it "denoised" is not z_covered. Ours: the pictures are
the model's own, of --prompts, and NudeNet finds what to cover (theirs came from a tool, by request); on the
embedded model a grey ellipse, as mosaics still look like faces to NudeNet; length, rate, batch 8.
"""
from dataclasses import dataclass
from typing import Literal

import cv2
import drawn
import numpy as np
import torch
import training
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor
from nudenet import NudeDetector
from training import sd


@dataclass
class Args(drawn.Args):
    batch_size: int = 5
    pictures: int = 100
    weight: float = 0.1  # of the first term
    exact_target: bool = False  # the target whose denoised picture is the covered one
    cover: Literal["mosaic", "ellipse"] = "mosaic"
    reach: float = 1.2  # size of the cover, in boxes of NudeNet


TINY = drawn.TINY | dict(steps=200, learning_rate=3e-4, cover="ellipse")


def cover(image: np.ndarray, boxes, how: str, reach: float) -> np.ndarray:
    """uint8 [H, W, 3] with each box (x, y, w, h, in pixels), made `reach` times as large, covered."""
    image = image.copy()
    for x, y, w, h in boxes:
        centre, half = np.array([x + w / 2, y + h / 2]), np.array([w, h]) * reach / 2
        if how == "ellipse":
            centre, axes = centre.round().astype(int).tolist(), half.round().astype(int).tolist()
            cv2.ellipse(image, centre, axes, 0, 0, 360, (128, 128, 128), -1)
            continue
        (x0, y0), (x1, y1) = (np.clip(c.round().astype(int), 0, image.shape[1::-1])
                              for c in (centre - half, centre + half))
        if x0 < x1 and y0 < y1:  # NudeNet cuts boxes at the edge, to nothing at times
            tiles = cv2.resize(image[y0:y1, x0:x1], (4, 4), interpolation=cv2.INTER_AREA)
            image[y0:y1, x0:x1] = cv2.resize(tiles, (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST)
    return image


def safegen_target(scheduler, noise, shown, covered, t, exact: bool) -> torch.Tensor:
    """What to predict for latents shown [B, 4, h, w] with this noise at t [B], to make them covered."""
    alpha = scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
    return noise + ((alpha / (1 - alpha)).sqrt() if exact else 1) * (shown - covered)


def safegen_loss(unet, scheduler, shown, covered, benign, empty, args: Args, rng) -> torch.Tensor:
    """Of latents [B, 4, h, w] each; empty [1, 77, d]."""
    clean = torch.cat([shown, benign])  # [2B, 4, h, w]
    noise = randn_tensor(clean.shape, rng, clean.device)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=rng).to(clean.device)
    noisy = scheduler.add_noise(clean, noise, t)
    output = drawn.noise_of(scheduler, unet(noisy, t, empty.expand(len(clean), -1, -1)).sample, noisy, t)
    target = safegen_target(scheduler, noise, clean, torch.cat([covered, benign]), t, args.exact_target)
    removed, kept = (output - target).square().unflatten(0, (2, -1)).mean(dim=(1, 2, 3, 4))
    return args.weight * removed + (1 - args.weight) * kept


def make_triplets(pipe, args: Args) -> torch.Tensor:
    """Latents [3, N, 4, h, w]: pictures that show the concept, the same covered, and benign ones."""
    benign = [p for p, _, elicits in sd.read_prompts(args.prompts) if not elicits]
    if not benign:
        sd.fail(f"prompt file {args.prompts} holds no benign prompt")
    detector, shown, covered = NudeDetector(), [], []
    detector.onnx_session = sd.load_nudenet()  # the same network, without threads that spin
    for *_, image in drawn.draw_shown(pipe, args):
        detector.input_width = detector.input_height = next(sd.nudenet_views(image[None]))[0]
        boxes = [f["box"] for f in detector.detect(image) if f["class"] in args.labels]
        if boxes:  # another view may have seen it, not this one
            shown.append(image)
            covered.append(cover(image, boxes, args.cover, args.reach))
    if not shown:
        sd.fail("NudeNet's detect finds no box to cover: more --pictures?", code=1)
    calls = [{"prompt": benign[i % len(benign)]} for i in range(len(shown))]
    others = drawn.draw_judged(pipe, args, calls, None)
    return torch.stack([drawn.latents_of(pipe, images, sd.generator(args.seed, "latents"))
                        for images in (shown, covered, [others[i] for i in range(len(shown))])])


def train(args: Args):
    """OUT/unet."""
    pipe, started = training.start(args)
    triplets, empty = make_triplets(pipe, args), sd.encode_prompts(pipe, [""])[0].to(pipe.device)
    trained = training.train_only(pipe.unet, lambda name: "attn1" in name)
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=1e-2)
    average = EMAModel(trained)
    for _, rng in training.steps(args, "safegen"):
        rows = torch.randint(triplets.shape[1], (2, args.batch_size), generator=rng)
        shown, covered, benign = triplets[0, rows[0]], triplets[1, rows[0]], triplets[2, rows[1]]
        loss = safegen_loss(pipe.unet, pipe.scheduler, shown, covered, benign, empty, args, rng)
        training.descend(optimizer, loss, clip=1.0)
        average.step(trained)
    average.copy_to(trained)
    training.save(args, pipe.unet, started)


if __name__ == "__main__":
    training.run(train, Args, TINY)
