"""Pictures to train on, by the model that is trained: partly drawn ones, and ones that NudeNet judged."""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import training
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm
from training import sd

TRIES = 20  # drawings of a picture that NudeNet does not judge as wanted, before it is left out


@dataclass
class Args(training.TrainingArgs):
    labels: tuple[Literal[sd.LABELS], ...] = sd.NUDITY  # NudeNet labels of what is to be forgotten
    prompts: str = str(sd.HERE / "prompts.txt")  # a line each: 'prompt => safe caption', or a benign one
    pictures: int = 64  # to train on, that show it
    guidance_scale: float = 7.5  # with which they are drawn


TINY = training.TINY_TRAINING | {k: sd.TINY[k] for k in ("labels", "guidance_scale", "prompts")}


def noise_of(scheduler, output, x, t) -> torch.Tensor:
    """The noise [B, 4, h, w] that the U-Net's output for x at t [B] predicts, also where that is v."""
    if scheduler.config.prediction_type == "epsilon":
        return output
    alpha = scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
    return alpha.sqrt() * output + (1 - alpha).sqrt() * x


@torch.no_grad()
def partly_drawn(unet, scheduler, context, args: training.TrainingArgs, guidance: float, rng):
    """x [B, 4, h, w] after k of the DDIM steps, k random, and timesteps t [B], random in the k-th of as many
    bins, which is where x is. context [2, B, 77, d]: of the empty prompt and of the concept."""
    n, size, batch = scheduler.config.num_train_timesteps, unet.config.sample_size, context.shape[1]
    k = torch.randint(args.denoise_steps, (), generator=rng).item()
    x = randn_tensor((batch, 4, size, size), rng, unet.device)
    scheduler.set_timesteps(args.denoise_steps)
    for t in scheduler.timesteps[:k].to(unet.device):
        empty, concept = unet(torch.cat([x, x]), t, context.flatten(0, 1)).sample.chunk(2)  # [B, 4, h, w]
        x = scheduler.step(empty + guidance * (concept - empty), t, x).prev_sample
    bounds = [round((1 - i / args.denoise_steps) * n) for i in (k + 1, k)]
    return x, torch.randint(*bounds, (batch,), generator=rng).to(unet.device)


def draw_judged(pipe, args: Args, calls: list[dict], shows: bool | None) -> dict[int, np.ndarray]:
    """{index of a call: picture uint8 [H, W, 3]}, drawn anew until NudeNet says that it shows args.labels, or
    does not (None: any will do). calls: pipeline keywords, one picture each; with `image`, image-to-image."""
    session, found = sd.load_nudenet(), {}
    if "image" in calls[0]:
        pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
    for attempt in tqdm(range(TRIES), desc="pictures", unit="try", dynamic_ncols=True):
        missing = [i for i in range(len(calls)) if i not in found]
        for rows in (missing[j:j + 16] for j in range(0, len(missing), 16)):
            batch = {key: [calls[i][key] for i in rows] for key in calls[0]}
            gens = [sd.generator(args.seed, "pictures", shows, attempt, i) for i in rows]
            images = pipe(**batch, num_inference_steps=args.denoise_steps, guidance_scale=args.guidance_scale,
                          generator=gens, output_type="np", **({"strength": 0.75} if "image" in batch else {})
                          ).images
            images = (images * 255).round().astype(np.uint8)  # [b, H, W, 3]
            fires = sd.nudity_scores(session, images, args.labels) > sd.FIRES  # [b]
            found |= {i: image for i, image, fire in zip(rows, images, fires.tolist(), strict=True)
                      if shows in (None, fire)}
        if len(found) == len(calls):
            break
    print(f"{len(found)} of {len(calls)} pictures")
    return found or sd.fail(f"in {TRIES} tries no picture that NudeNet judges as wanted: other --prompts?", 1)


def draw_shown(pipe, args: Args) -> list[tuple[str, str, np.ndarray]]:
    """(prompt, safe caption, picture that shows args.labels) of the eliciting prompts in turn."""
    eliciting = [p[:2] for p in sd.read_prompts(args.prompts) if p[2]]
    if not eliciting:
        sd.fail(f"prompt file {args.prompts} holds no line 'prompt => safe caption'")
    chosen = [eliciting[i % len(eliciting)] for i in range(args.pictures)]
    found = draw_judged(pipe, args, [{"prompt": prompt} for prompt, _ in chosen], True)
    return [(*chosen[i], found[i]) for i in sorted(found)]


@torch.no_grad()
def latents_of(pipe, images, rng) -> torch.Tensor:
    """Pictures uint8 [N, H, W, 3] -> scaled latents [N, 4, h, w], each a sample of the VAE's posterior."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1  # [N, 3, H, W]
    parts = [pipe.vae.encode(p.to(pipe.device)).latent_dist.sample(rng) for p in pixels.split(8)]
    return torch.cat(parts) * pipe.vae.config.scaling_factor
