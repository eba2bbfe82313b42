"""PNO, prompt-noise optimisation (arXiv 2412.03876): x_T and the text embeddings of a picture that a scorer
calls unsafe descend the scorer's gradient through the whole of sampling.

    python eval.py --method best-of-5 pno --limit 8

Exact (JonP07/Diffusion-PNO@ebc63bb): up to 5 draws until one passes, then up to 5 steps of AdamW, lr 0.07, on
x_T and both branches' embeddings, a penalty that keeps x_T Gaussian, the best picture seen. Ours: DIFFERS.
`best-of-5` is its first half alone: new noise until the scorer is content. A picture of either may start from
other noise than the base model's, unlike the other methods'; a step costs about four draws of a picture.
"""
import functools
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import interpolate, normalize
from torch.utils.checkpoint import checkpoint

import shielddiff as sd

DIFFERS = ("the scorer: log-odds of CLIP (the model's own, else training's) between spec.pairs' sides and 12 "
           "nouns (Q16's probability); the row's guidance (10); all updates are drawn (the last never is)")


def load_scorer(pipe, spec) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pictures [B, H, W, 3] in 0..1 -> log-odds [B], above 0 where CLIP rather sees the prompts with the
    concept than those without it or a noun. Differentiable."""
    own = Path(pipe.config["_name_or_path"]) / "clip"
    clip, processor = sd.load_clip(str(own) if own.is_dir() else sd.Args.clip_model, str(pipe.device))
    nouns = [[noun] for noun in (sd.HERE / "tests/rivals/nouns.txt").read_text().splitlines()[1:]]
    classes = normalize(torch.stack([sd.caption_features(clip, processor, texts).mean(dim=0)  # [classes, d]
                                     for texts in (*zip(*spec.pairs, strict=True), *nouns)]))
    classes, side = clip.logit_scale.exp() * classes, clip.config.vision_config.image_size
    shift, scale = (torch.tensor(v, device=pipe.device).view(3, 1, 1)
                    for v in (processor.image_processor.image_mean, processor.image_processor.image_std))

    def log_odds(images):
        pixels = interpolate(images.permute(0, 3, 1, 2), (side, side), mode="bicubic", antialias=True)
        features = clip.get_image_features(((pixels - shift) / scale).to(clip.dtype)).pooler_output  # [B, d]
        logits = normalize(features.float()) @ classes.float().T  # [B, classes]
        return logits[:, 0] - logits[:, 1:].logsumexp(dim=1)

    return log_odds


def step(pipe, x, t, context, guidance):
    """One DDIM step of x [1, 4, h, w] under context [2, 77, d], of the empty prompt and of the prompt."""
    out = pipe.unet(torch.cat([x, x]).to(pipe.unet.dtype), t, context.to(pipe.unet.dtype)).sample.float()
    unconditional, text = out.chunk(2)
    return pipe.scheduler.step(unconditional + guidance * (text - unconditional), t, x, eta=0.0).prev_sample


def picture_of(pipe, x, context, call) -> torch.Tensor:
    """x_T [1, 4, h, w] -> the picture [1, H, W, 3] that the stock pipeline draws, with a gradient."""
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=pipe.device)
    for t in pipe.scheduler.timesteps:
        x = checkpoint(step, pipe, x, t, context, max(call["guidance_scale"], 1.0), use_reentrant=False)
    pixels = pipe.vae.decode((x / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample.float()
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def log_likelihood(x: torch.Tensor, k=4) -> torch.Tensor:
    """[n, D] -> [n]: bounds for the mean and second moment of each row as D / k standard normal vectors, each
    capped at -log 2, so that nothing pulls at what looks Gaussian."""
    vectors = x.unflatten(1, (-1, k))  # [n, m, k]
    m, mean = vectors.shape[1], vectors.mean(dim=1)  # [n, k]
    moment = torch.linalg.matrix_norm(vectors.mT @ vectors / m - torch.eye(k, device=x.device), ord=2)  # [n]
    off = ((1 + moment).sqrt() - 1 - math.sqrt(k / m)).clamp(min=0)
    return sum((-m * d / 2).clamp(max=-math.log(2)) for d in (mean.square().sum(dim=1) / k, off.square()))


def optimise(pipe, log_odds, call, x, rng, steps=5, lr=0.07) -> tuple:
    """The lowest log-odds on the way from x [1, 4, h, w] and its picture [H, W, 3]; inf if all are NaN."""
    text, empty = pipe.encode_prompt(call["prompt"], pipe.device, 1, True)
    x, context = (v.detach().float().clone().requires_grad_() for v in (x, torch.cat([empty, text])))
    optimizer, best = torch.optim.AdamW([x, context], lr=lr), (math.inf, None)
    for i in range(steps + 1):
        with torch.enable_grad():
            picture = picture_of(pipe, x, context, call)
            odds = log_odds(picture)[0]
            if odds.item() < best[0]:
                best = odds.item(), picture[0].detach().cpu().numpy()
            if best[0] < 0 or i == steps:
                return best
            order = torch.stack([torch.randperm(x.numel(), generator=rng) for _ in range(100)]).to(x.device)
            penalty = -log_likelihood(x.flatten(1)).sum() - log_likelihood(x.flatten()[order]).mean()
            x.grad, context.grad = torch.autograd.grad(5 * odds + penalty, [x, context])
        optimizer.step()


@contextmanager
def pno(pipe, spec, stock, draws=5, steps=5):
    """A method (see README.md in this folder): a picture that its scorer does not flag stays as it is."""
    log_odds = load_scorer(pipe, spec)

    @torch.no_grad()
    def draw(call):
        if "image" in call:
            sd.fail("--method pno and best-of-5 change the first noise: run them without --init-images")
        images, refused = stock(call)
        for i, odds in enumerate(log_odds(torch.tensor(images, device=pipe.device)).tolist()):
            one = call | {name: call[name][i:i + 1] for name in ("prompt", "generator", "latents")}
            rng = sd.generator(spec.seed, "pno", one["generator"][0].initial_seed())
            found = [(odds, images[i], one["latents"])]
            while len(found) < draws and found[-1][0] >= 0:
                x = torch.randn(one["latents"].shape, generator=rng).to(one["latents"])
                image = stock(one | dict(latents=x))[0]  # [1, H, W, 3]
                found.append((log_odds(torch.tensor(image).to(x.device)).item(), image[0], x))
            best = min(found, key=lambda f: f[0])
            if steps and best[0] >= 0:
                best = min(best, optimise(pipe, log_odds, one, best[2], rng, steps), key=lambda f: f[0])
            images[i] = best[1]
        return images, refused

    yield draw


best_of_5 = functools.partial(pno, steps=0)
