"""ShieldDiff (arXiv 2410.05309): reinforcement learning that makes a diffusion model stop drawing nudity.

    python shielddiff.py --steps 10                          # no GPU: the embedded tiny model; else SD 1.5
    python shielddiff.py --steps 300 --model my/checkpoint   # any SD 1.x / 2.x pipeline, diffusers layout
    torchrun --nproc-per-node 2 shielddiff.py --steps 300    # the same run, dealt out to two GPUs
    python shielddiff.py --help                              # every knob, its unit and why its default

The denoising trajectory x_T -> ... -> x_0 of a prompt c is an episode, each step an action drawn from the
Gaussian policy p(x_{t-1} | x_t, c) = N(mu_theta, sigma_t^2): DDPO (arXiv 2305.13301). The reward of the final
picture is a black box with two terms, each standardised among the K pictures of one prompt:

    A    = clip_weight * z(CLIP(picture, safe caption)) - nudity_weight * z(NudeNet(picture))
    r_t  = exp(mean log p_theta(x_{t-1} | x_t, c) - mean log p_old(x_{t-1} | x_t, c))
    loss = mean over all pictures and their trained steps t of
           max(-A r_t, -A clamp(r_t, 1 - eps, 1 + eps))      where the prompt elicits the content,
           kl_weight * mean((mu_theta - mu_frozen)^2)        where it is benign

The nudity term removes the content and the CLIP term keeps the rest of the picture, without which the policy
learns to draw something else. Benign prompts have no reward (a false alarm must not change them) but a KL to
the model before training: it holds them where they are, while the others are free to move.
What changes is the U-Net, not the prompt: no filter to talk around. Stable Diffusion 1.5 at 512 px needs 3.8
GiB for the default LoRA and 7.1 GiB for the whole U-Net (--lora-rank 0 --micro-batch 1), both computed only.

Sections 1 to 4 are the method and policy_gradient_step, in train(), is its pseudocode; the rest of section 5
is what lets a run be left alone overnight: bad input, bad numbers, too little memory, kill and resume.
"""
import argparse
import copy
import dataclasses
import difflib
import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# ruff: noqa: E402 (set before the imports: these two warn of packages that are not needed here)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import cv2
import numpy as np
import onnxruntime
import skimage.data
import torch
import torch.distributed as dist
import tyro
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.torch_utils import randn_tensor
from matplotlib.figure import Figure
from nudenet import nudenet
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LABELS = tuple(nudenet.__dict__["__labels"])  # NudeNet's 18 labels, in the order of its network's outputs
NUDITY = ("FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "BUTTOCKS_EXPOSED",
          "ANUS_EXPOSED")
FIRES = 0.25  # score above which a picture counts as showing a label: NudeNet's own threshold


# ------------------------------------------------------------------------------------ the arguments
@dataclass
class Args:
    """ShieldDiff. The defaults shown are those in force: Stable Diffusion's, or the embedded model's (TINY)
    when --model is tests/tiny, or is not given and there is no CUDA device."""

    steps: int = 300
    """policy-gradient steps: one rollout and its updates each"""
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """folder or hub id of an SD 1.x / 2.x pipeline in diffusers layout"""
    prompts: str = str(HERE / "prompts.txt")
    """prompt file, a prompt a line. ' => ' and a safe caption after it mark a prompt that elicits the labels;
    without it a prompt is benign: not punished, only held. If no line has one, all elicit, none is held"""
    labels: tuple[str, ...] = NUDITY
    """NudeNet labels to suppress"""
    out: str = ""
    """output folder; empty: runs/<model>-<seed>"""
    resume: bool = False
    """go on from the last checkpoint in --out; the result equals that of the uninterrupted run"""
    seed: int = 0
    """same machine, same seed, same result (on a GPU up to its kernels' order of summation)"""
    save_every: int = 10
    """steps between checkpoints; the last step is always saved"""
    show_uncensored: bool = False
    """do not pixelate samples.png where a nudity label fires; if --labels are faces only, it never is"""
    pickles: bool = False
    """also load .bin weights: pickles can run their maker's code, so only where you trust them"""

    denoise_steps: int = 20
    """DDIM steps T of a rollout; fewer than in later use is fine, and cheap"""
    guidance_scale: float = 5.0
    """classifier-free guidance of the policy, in rollout and update alike. A little below that of later use
    is the harder case; far below it, training does not see what later guidance exaggerates"""
    train_timesteps: int = 5
    """random timesteps trained per picture"""
    train_until: float = 0.6
    """share of the trajectory that is rewarded, from its noisy end: later steps draw detail, not what is
    shown, and would only add noise to the gradient. The last step is never trained"""
    prompts_per_step: int = 3
    """eliciting prompts a rollout"""
    group_size: int = 8
    """pictures of each of them (K): the group within which rewards are compared"""
    held_per_step: int = 8
    """pictures of benign prompts a rollout, each of the next prompt: held, not rewarded. The loss is a mean
    over all pictures: the more of these, the more they weigh"""
    micro_batch: int = 4
    """pictures a U-Net call (guidance doubles them): memory grows with it, the result only rounds
    differently"""
    updates_per_step: int = 1
    """optimizer updates a rollout; the trained timesteps are dealt out among them"""
    learning_rate: float = 3e-4
    """AdamW learning rate of the first step; this one suits a LoRA, the whole U-Net wants about 1e-5"""
    decay_steps: int = 100
    """the learning rate falls as 1 / sqrt(1 + step / this): once little is left to remove, a constant one
    only jitters. It does not depend on --steps, which may grow"""
    clip_range: float = 1e-4
    """PPO clip on r_t, the exp of a difference of mean log-probs; times D = 4*h*w it is the clip on the true
    log-ratio: 1.6 at 512 px"""
    advantage_clip: float = 5.0
    """advantages are clamped to plus or minus this"""
    kl_weight: float = 10.0
    """weight of the squared distance between trained and frozen U-Net's means on benign prompts: holds them.
    The more denoising steps, the shorter each, and the larger it has to be; 0 leaves benign prompts out"""
    clip_weight: float = 1.0
    """weight of the standardised CLIP score in the advantage"""
    nudity_weight: float = 1.0
    """weight of the standardised nudity score in the advantage"""
    clip_model: str = "openai/clip-vit-large-patch14"
    """folder or hub id of the transformers CLIPModel of the reward"""

    lora_rank: int = 16
    """rank of the LoRA on the attention projections; 0 trains the whole U-Net"""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """attention kernel; auto takes xformers where it works on this device, else PyTorch's SDPA"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: a third more time, several times less memory"""
    optimizer_8bit: bool = True
    """bitsandbytes AdamW8bit, not AdamW: saves 5 GB for the whole U-Net, next to nothing for LoRA"""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """of frozen weights and U-Net arithmetic. Log-probs, losses and trained weights are fp32; only a whole
    U-Net with bf16 and 8-bit Adam has bf16 weights, rounded stochastically, to fit 8 GB"""
    compile: bool = False
    """torch.compile the U-Net's blocks: minutes at the start, faster steps"""


TINY = dict(  # what differs for the embedded model: another concept, 64 px, minutes instead of hours
    steps=10, model=str(HERE / "tests/tiny"), prompts=str(HERE / "tests/tiny/prompts.txt"),
    clip_model=str(HERE / "tests/tiny/clip"), labels=("FACE_FEMALE", "FACE_MALE"),
    denoise_steps=8, guidance_scale=2.0, train_timesteps=4, prompts_per_step=6, held_per_step=24,
    micro_batch=16, train_until=0.5, updates_per_step=4, learning_rate=5e-3, decay_steps=5, clip_range=1.5e-3,
    kl_weight=3.0, lora_rank=8, gradient_checkpointing=False, precision="fp32")


def fail(message: str, code=2):
    """One clear line and the exit code: 2 for bad input, 1 where the machine or the numbers failed."""
    print(f"shielddiff: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """The command line over the defaults of the model it names."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--model")
    model = which.parse_known_args(argv)[0].model
    tiny = Path(model).resolve() == HERE / "tests/tiny" if model else not torch.cuda.is_available()
    args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **TINY) if tiny else Args())
    if Path(args.model).exists():
        args.model = str(Path(args.model).resolve())  # one spelling, so that --resume recognises it
    args.out = args.out or f"runs/{Path(args.model).name}-{args.seed}"
    return args


# ------------------------------------------------------------------------------------ 1. the policy
@dataclass
class Schedule:
    """The T steps of DDIM sampling, from the model's own noise schedule."""
    timesteps: torch.Tensor  # [T] int64, descending: what the U-Net is told
    alpha: torch.Tensor  # [T] fp32, alphas_cumprod at each timestep
    alpha_prev: torch.Tensor  # [T] fp32, alphas_cumprod at the next, less noisy, timestep
    prediction_type: str  # "epsilon" or "v_prediction"


@dataclass
class Policy:
    """What draws an action: the U-Net being trained and everything its mean and sigma depend on."""
    unet: UNet2DConditionModel
    schedule: Schedule
    guidance_scale: float
    autocast: AbstractContextManager  # around U-Net calls only: all else is fp32
    frozen: UNet2DConditionModel | None = None  # the U-Net before training; None: self.unet without its LoRA


def noise_schedule(config: dict, steps: int) -> Schedule:
    """T timesteps and alphas_cumprod, of a diffusers scheduler config; refuses steps that have no density."""
    scheduler = DDIMScheduler.from_config({"clip_sample": False, **config})
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        fail("the model's scheduler clips latents (clip_sample, thresholding): such a step has no density")
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"the model's scheduler has prediction_type {scheduler.config.prediction_type!r}: not supported")
    if steps > scheduler.config.num_train_timesteps:
        fail(f"--denoise-steps {steps}: the model has {scheduler.config.num_train_timesteps} timesteps only")
    scheduler.set_timesteps(steps)
    t, alphas_cumprod, final = scheduler.timesteps, scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    previous = t - scheduler.config.num_train_timesteps // steps
    alpha_prev = torch.where(previous >= 0, alphas_cumprod[previous.clamp(min=0)], final)
    if not (ddim_sigma(alphas_cumprod[t], alpha_prev)[:-1] > 0).all():  # NaN compares false as well
        fail("the model's scheduler has a step without noise among those to train: no log-prob exists there")
    return Schedule(t, alphas_cumprod[t], alpha_prev, scheduler.config.prediction_type)


def ddim_sigma(alpha, alpha_prev, eta=1.0):
    """Standard deviation of a DDIM step (DDIM, arXiv 2010.02502, eq. 16); eta 1 is DDPM's noise, 0 none."""
    return eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()


def ddim_step(model_output, sample, alpha, alpha_prev, prediction_type="epsilon", eta=1.0, noise=None,
              prev_sample=None):
    """One step of eta-DDIM as a Gaussian policy: draw x_{t-1}, or score a given one. All arithmetic is fp32.

    model_output, sample: [B, C, h, w], the U-Net's guided output at x_t, and x_t. alpha, alpha_prev: [B] or
    scalar. Give `noise` (standard normal, shaped like sample) to draw, or `prev_sample` to score.
    Returns prev_sample [B, C, h, w], log_prob [B], mean [B, C, h, w], sigma [B, 1, 1, 1].

    log_prob is the *mean* over C, h, w of the log-density, as in every DDPO code: with the sum the ratio
    would overflow (D = 16384 at 512 px, and 1.01^16384 is 1e70). So a clip range c on the ratio of means lets
    the true log-ratio move by c * D. Source: DDIM (arXiv 2010.02502) eq. 12, 16; DDPO (2305.13301) sec. 4.
    """
    model_output, sample = model_output.float(), sample.float()
    alpha, alpha_prev = (torch.as_tensor(a, device=sample.device).float().reshape(-1, 1, 1, 1)
                         for a in (alpha, alpha_prev))
    if prediction_type == "v_prediction":
        clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
        epsilon = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
    else:
        clean = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        epsilon = model_output
    sigma = ddim_sigma(alpha, alpha_prev, eta)  # [B, 1, 1, 1]
    mean = alpha_prev.sqrt() * clean + (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * epsilon
    if prev_sample is None:
        prev_sample = mean + sigma * noise
    density = -((prev_sample - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(math.sqrt(2 * math.pi))
    return prev_sample, density.mean(dim=(1, 2, 3)), mean, sigma


def predict_noise(policy: Policy, latents, timesteps, context, unet=None):
    """Guided U-Net output [B, 4, h, w] fp32 for latents [B, 4, h, w], timesteps [B], context [2, B, 77, d].

    context[0] is the empty prompt's, context[1] the prompt's: one batch, and the gradient goes through both.
    """
    with policy.autocast:
        out = (unet or policy.unet)(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]),
                                    context.flatten(0, 1)).sample
    unconditional, conditional = out.float().chunk(2)
    return unconditional + policy.guidance_scale * (conditional - unconditional)


@torch.no_grad()
def frozen_noise(policy: Policy, latents, timesteps, context):
    """predict_noise of the U-Net as it was before training: the LoRA switched off, or the copy."""
    if policy.frozen is not None:
        return predict_noise(policy, latents, timesteps, context, policy.frozen)
    policy.unet.disable_adapters()
    output = predict_noise(policy, latents, timesteps, context)
    policy.unet.enable_adapters()
    return output


# ------------------------------------------------------------------------------------ 2. the reward
def load_nudenet() -> onnxruntime.InferenceSession:
    """NudeNet 3.4's 320n network as a bare session. Spinning threads would hold PyTorch's cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = Path(nudenet.__file__).with_name("320n.onnx")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nudenet_raw(session, images: np.ndarray, resolution: int) -> np.ndarray:
    """NudeNet's network on RGB uint8 [B, H, W, 3] -> [B, 4 + 18, anchors]: box cx, cy, w, h, then scores.

    The input is what nudenet's own detect() makes of an RGB array: black padding right and below to a square,
    then a bilinear resize. Raises TypeError for anything else: NudeNet itself sees nothing in floats.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise TypeError(f"NudeNet needs RGB uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
    side = max(images.shape[1:3])
    square = np.pad(images, ((0, 0), (0, side - images.shape[1]), (0, side - images.shape[2]), (0, 0)))
    blob = cv2.dnn.blobFromImages(list(square), 1 / 255, (resolution, resolution))  # [B, 3, r, r]
    return session.run(None, {"images": blob})[0]


def nudenet_resolutions(images: np.ndarray) -> tuple[int, int]:
    """Network input sizes (multiples of 32) for images [B, H, W, 3]; NudeNet's 320 misses faces at 64 px."""
    return (192, 96) if max(images.shape[1:3]) <= 128 else (320, 256)


def nudity_scores(session, images: np.ndarray, labels: Sequence[str], chunk: int = 16) -> torch.Tensor:
    """Largest NudeNet confidence over the labels, RGB uint8 images [B, H, W, 3] -> [B] fp32 in [0, 1].

    Raw network scores, not thresholded detections, which give most groups no signal. And the largest over
    four views (two resolutions, mirrored): a policy finds the blind spots of a single view within 20 steps.
    """
    index, scores = [4 + LABELS.index(label) for label in labels], []
    for i in range(0, len(images), chunk):
        views = [nudenet_raw(session, np.ascontiguousarray(flip), r)[:, index].max(axis=(1, 2))  # [b]
                 for r in nudenet_resolutions(images)
                 for flip in (images[i:i + chunk], images[i:i + chunk, :, ::-1])]
        scores.append(np.max(views, axis=0))
    return torch.from_numpy(np.concatenate(scores))


@torch.no_grad()
def caption_features(clip, processor, captions: Sequence[str]) -> torch.Tensor:
    """Unit CLIP features [N, d] of captions, truncated to CLIP's 77 tokens."""
    tokens = processor.tokenizer(list(captions), padding=True, truncation=True, max_length=77,
                                 return_tensors="pt")
    features = clip.get_text_features(**tokens.to(clip.device)).pooler_output  # [N, d]
    return torch.nn.functional.normalize(features.float(), dim=-1)


@torch.no_grad()
def image_features(clip, processor, images: np.ndarray, chunk: int = 16) -> torch.Tensor:
    """Unit CLIP features [B, d] of RGB uint8 images [B, H, W, 3]."""
    features = []
    for i in range(0, len(images), chunk):
        pixels = processor.image_processor(images=list(images[i:i + chunk]), return_tensors="pt").pixel_values
        features.append(clip.get_image_features(pixels.to(clip.device, clip.dtype)).pooler_output)  # [b, d]
    return torch.nn.functional.normalize(torch.cat(features).float(), dim=-1)


def group_standardise(rewards: torch.Tensor, floor: float) -> torch.Tensor:
    """Rewards [P, K] of any dtype -> (r - mean) / max(std, floor) within each group of K, fp32.

    The floor keeps the noise of an already safe group from being blown up to full size. A constant group, and
    a group of one, give zero.
    """
    rewards = rewards.float()  # integer rewards must not make integer advantages
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=floor)


def group_advantages(clip_scores, nudity, clip_weight, nudity_weight, advantage_clip):
    """Scores [P, K] -> advantages [P, K]. Standardised before weighting: weights mean relative importance.

    Cosines of different CLIPs differ in size, so their floor is relative: 6 % of the mean, hardly to be seen.
    """
    advantages = (clip_weight * group_standardise(clip_scores, floor=0.06 * clip_scores.mean().abs().item())
                  - nudity_weight * group_standardise(nudity, floor=0.08))
    return advantages.clamp(-advantage_clip, advantage_clip)


# ------------------------------------------------------------------------------------ 3. the rollout
def generator(*key) -> torch.Generator:
    """A CPU generator that depends on key alone. Nothing random is carried from step to step, so a resumed
    run draws what the uninterrupted one would have drawn, whatever the batch size and the device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def prompts_of_step(prompts: Sequence[int], how_many: int, seed: int, step: int) -> list[int]:
    """The next of these prompts (their indices): shuffled passes through them, one after the other."""
    n, positions = len(prompts), range(step * how_many, (step + 1) * how_many) if prompts else ()
    return [prompts[torch.randperm(n, generator=generator(seed, "prompts", p // n))[p % n]]
            for p in positions]


@torch.no_grad()
def rollout(policy: Policy, vae, context, generators, micro_batch, on_images=None):
    """Sample trajectories and pictures of context [2, B, 77, d].

    generators: one a picture, drawn from in diffusers' order: StableDiffusionPipeline(eta=1, generator=...)
    draws the same pictures. on_images(i, images) is called with each finished micro-batch, pictures i and
    following: rewards can overlap.
    Returns latents [B, T+1, 4, h, w] fp32 and log_prob [B, T] on the host, images uint8 [B, H, W, 3]. Raises
    FloatingPointError where a picture is not finite.
    """
    unet, schedule, size = policy.unet, policy.schedule, policy.unet.config.sample_size
    all_latents, all_log_probs, all_images = [], [], []
    for i in range(0, len(generators), micro_batch):
        gens, ctx = generators[i:i + micro_batch], context[:, i:i + micro_batch].to(unet.device)
        shape = (len(gens), unet.config.in_channels, size, size)
        x = randn_tensor(shape, gens, unet.device)  # [b, 4, h, w]
        trajectory, log_probs = [x], []
        for t, alpha, alpha_prev in zip(schedule.timesteps, schedule.alpha, schedule.alpha_prev, strict=True):
            output = predict_noise(policy, x, t.to(unet.device).expand(len(x)), ctx)
            x, log_prob, _, _ = ddim_step(output, x, alpha, alpha_prev, schedule.prediction_type,
                                          noise=randn_tensor(shape, gens, unet.device))
            trajectory.append(x)
            log_probs.append(log_prob)
        decoded = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample.float()  # [b, 3, H, W]
        finite(decoded, "a picture")  # as a byte, NaN is black: a picture that every detector calls safe
        images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        if on_images:
            on_images(i, images)
        all_latents.append(torch.stack(trajectory, dim=1).cpu())  # [b, T+1, 4, h, w], stored once
        all_log_probs.append(torch.stack(log_probs, dim=1).cpu())  # [b, T]
        all_images.append(images)
    return torch.cat(all_latents), torch.cat(all_log_probs), np.concatenate(all_images)


# ------------------------------------------------------------------------------------ 4. the update
def policy_loss(log_prob, old_log_prob, advantages, clip_range):
    """PPO-clipped loss [B] and ratio [B] of log-probs [B], advantages [B] (PPO, arXiv 1707.06347, eq. 7)."""
    ratio = (log_prob - old_log_prob).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return loss, ratio


def trainable(args: Args) -> int:
    """How many of the T steps rewarded pictures are trained from, counted from the noisy end."""
    return min(math.ceil(round(args.denoise_steps * args.train_until, 6)), args.denoise_steps - 1)


def update(args: Args, policy: Policy, context, latents, log_prob, advantages, held, steps, optimizer,
           scaler):
    """The optimizer updates of one rollout; returns their metrics.

    context [2, B, 77, d], latents [B, T+1, 4, h, w], log_prob [B, T] of this process's B pictures; advantages
    [B]; held [B] bool: those of benign prompts; steps [B, k]: the steps that each trains, of T. On the held
    ones alone the KL to the frozen U-Net acts: eliciting prompts must be free to move, and CLIP keeps their
    meaning. Without its factor 1 / (2 sigma^2), which blows up at the end of the trajectory, it is the
    squared distance of the means, and weighs the beginning most, where brightness and colour are decided.
    Micro-batches are the rollout's own: the same kernels give the same numbers, and the first update's ratio
    is exactly 1. approx_kl is, like the ratio, that of mean log-probs, over rewarded pictures only: times D^2
    it is the true one. Raises FloatingPointError before a NaN or an infinity reaches the weights.
    """
    schedule, device, n = policy.schedule, policy.unet.device, len(log_prob)
    trained = optimizer.param_groups[0]["params"]
    ratios, kls, norms = [], [], []
    finite(advantages, "a reward")
    for i, dealt in enumerate(steps.tensor_split(args.updates_per_step, dim=1)):  # [B, k / updates]
        total = torch.zeros((), device=device)
        scaler.scale(total)  # it makes its scale at its first call, which the loop may skip
        for p in trained:  # zero, not None: a process that skips every group still adds its gradient
            p.grad = torch.zeros_like(p)
        for rows in torch.arange(n).split(args.micro_batch):
            if i == 0:  # later, this step's updates are finished first: weights are saved between steps
                leave_if_asked()
            if not (advantages[rows].any() or held[rows].any()):
                continue  # nothing to learn: these groups got the same reward for every picture
            ctx, advantage = context[:, rows].to(device), advantages[rows].to(device)
            hold = held[rows].to(device)  # [b]
            for s in dealt[rows].T:  # [b], one step index a picture
                x, x_prev = latents[rows, s].to(device), latents[rows, s + 1].to(device)  # [b, 4, h, w]
                t = schedule.timesteps[s].to(device)
                alphas = torch.stack([schedule.alpha[s], schedule.alpha_prev[s]]).to(device)  # [2, b]
                output = predict_noise(policy, x, t, ctx)
                _, new_log_prob, mu, _ = ddim_step(output, x, *alphas, schedule.prediction_type,
                                                   prev_sample=x_prev)
                old_log_prob = log_prob[rows, s].to(device)
                loss, ratio = policy_loss(new_log_prob, old_log_prob, advantage, args.clip_range)
                loss = loss.sum()
                if hold.any():
                    frozen = frozen_noise(policy, x[hold], t[hold], ctx[:, hold])
                    mu_frozen = ddim_step(frozen, x[hold], *alphas[:, hold], schedule.prediction_type,
                                          noise=0)[2]
                    kl = (mu[hold] - mu_frozen).square().mean(dim=(1, 2, 3))  # [held of b]
                    loss = loss + args.kl_weight * kl.sum()
                    kls.append(kl.detach().cpu())
                ratios.append(ratio[~hold].detach().cpu())
                total += loss.detach()
                scaler.scale(loss / (n * WORLD * dealt.shape[1])).backward()
        finite(total, "the loss")
        if i == 0:  # nothing is updated yet: the policy that scores is the policy that sampled
            self_check = gather((torch.cat([torch.ones(1), *ratios]) - 1).abs().max()[None]).max().item()
            if self_check > args.clip_range:
                fail(f"self-check failed: the unchanged policy scores its own rollout with ratios off by "
                     f"{self_check:.1e} (clip range {args.clip_range}); try --attention sdpa, --no-compile "
                     f"or --precision fp32", code=1)
        if WORLD > 1:
            for p in trained:
                dist.all_reduce(p.grad)
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        if not scaler.is_enabled():
            finite(norms[-1], "the gradient")
        scaler.step(optimizer)  # in fp16 an update that overflowed is skipped, its scale then halved
        scaler.update()
        if scaler.get_scale() < 1:
            raise FloatingPointError("the fp16 gradient is not finite at any scale")
    optimizer.zero_grad()  # the rollout can have the gradients' memory
    ratio = torch.cat([torch.ones(0), *ratios])
    return dict(ratio_max_dev=self_check, approx_kl=0.5 * mean(ratio.log().square()),
                clip_fraction=mean(((ratio - 1).abs() > args.clip_range).float()),
                drift=mean(torch.cat([torch.zeros(0), *kls])),
                grad_norm=torch.stack(norms).nan_to_num(0, 0, 0).max().item())


def finite(numbers: torch.Tensor, what: str):
    """Raise FloatingPointError, in all processes at once, where any number of any process is not finite."""
    if not gather(numbers.isfinite().all()[None]).all():
        raise FloatingPointError(f"{what} is not finite")


def my_share(n: int) -> slice:
    """Which of n pictures are this process's: as many as every other process has."""
    return slice(n // WORLD * RANK, n // WORLD * (RANK + 1))


def gather(mine: torch.Tensor) -> torch.Tensor:
    """[b, ...] of each process -> [WORLD * b, ...] of all, in order."""
    if WORLD == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


def mean(mine: torch.Tensor) -> float:
    """The mean over the numbers [b] of all processes, which may have more or fewer; 0 where none has any."""
    total, count = gather(torch.tensor([[mine.sum(), mine.numel()]])).sum(dim=0)
    return (total / count.clamp(min=1)).item()


# ------------------------------------------------------------------------------------ 5. the run
def read_prompts(path: str) -> list[tuple[str, str, bool]]:
    """[(prompt, safe caption, whether the line names one)] of a prompt file; exits where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        fail(f"cannot read prompt file {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"prompt file {path} is not UTF-8 text: bad byte at offset {error.start}")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in lines:  # held instead of suppressed, if taken for a benign prompt
        if "=>" in line and " => " not in line:
            fail(f"prompt file {path}: '=>' needs a space and a text on both sides: {line}")
    parts = [[part.strip() for part in line.split(" => ", 1)] for line in lines]
    if not parts:
        fail(f"prompt file {path} holds no prompt")
    return [(p[0], p[-1], len(p) == 2) for p in parts]


def check(args: Args):
    """Refuse what cannot work, before anything heavy is loaded."""
    check_labels(args.labels)
    may_be_0 = ("guidance_scale", "kl_weight", "clip_weight", "nudity_weight", "lora_rank", "held_per_step")
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed" and not (
                0 < value < math.inf or value == 0 and name in may_be_0):
            fail(f"--{name.replace('_', '-')} cannot be {value}")
    if args.group_size < 2:
        fail("--group-size must be at least 2: rewards are compared within a group")
    if args.train_until > 1:
        fail(f"--train-until is a share of the trajectory: at most 1, not {args.train_until}")
    if args.train_timesteps > trainable(args):
        fail(f"--train-timesteps {args.train_timesteps} is over the {trainable(args)} trainable steps that "
             f"--denoise-steps {args.denoise_steps} and --train-until {args.train_until} leave")
    if args.updates_per_step > args.train_timesteps:
        fail("--updates-per-step deals the trained timesteps out: it cannot exceed --train-timesteps")
    for n, of_what in ((args.prompts_per_step * args.group_size, "--prompts-per-step times --group-size"),
                       (args.held_per_step, "--held-per-step")):
        if n % WORLD:
            fail(f"{of_what}, {n}, cannot be dealt out to {WORLD} processes: name a multiple of {WORLD}")
    if args.seed.bit_length() > 63:
        fail(f"--seed {args.seed} does not fit into 64 bits")
    if torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        fail(f"torchrun starts more processes here than there are GPUs, {torch.cuda.device_count()}")
    if args.attention == "xformers" and not torch.cuda.is_available():
        fail("--attention xformers needs a CUDA device; use --attention sdpa")


def check_labels(labels: Sequence[str]):
    if not labels:
        fail("--labels names no label")
    for label in labels:
        if label not in LABELS:
            near = difflib.get_close_matches(label.upper(), LABELS, cutoff=0.5)
            fail(f"unknown label {label}{'; did you mean ' * bool(near)}{' or '.join(near)}? NudeNet knows "
                 f"{' '.join(LABELS)}")


def load_pipeline(model: str, dtype=torch.float32, device="cpu", pickles=False, unet_dtype=None):
    """A Stable Diffusion 1.x / 2.x pipeline from a folder or the hub, frozen, without its safety checker."""
    with clear_load_errors(f"model {model}"):
        kind = StableDiffusionPipeline.load_config(model)["_class_name"]
    if kind != "StableDiffusionPipeline":
        fail(f"model {model} is a {kind}: only StableDiffusionPipeline (SD 1.x, 2.x) is supported")
    parts = {name: load_whole(part, model, name, dtype=unet_dtype if name == "unet" and unet_dtype else dtype,
                              use_safetensors=not pickles or None)
             for name, part in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL),
                                ("text_encoder", CLIPTextModel))}
    if parts["unet"].config.in_channels != 4:
        fail(f"model {model} has {parts['unet'].config.in_channels} latent channels, not 4: for inpainting?")
    with clear_load_errors(f"model {model}"):
        pipe = StableDiffusionPipeline.from_pretrained(model, **parts, safety_checker=None,
                                                       requires_safety_checker=False)
    if len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size:  # an empty one replaces a missing file
        fail(f"the tokenizer of {model} has {len(pipe.tokenizer)} words, its text encoder knows "
             f"{pipe.text_encoder.config.vocab_size}: a file is missing")
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_clip(model: str, device="cpu", pickles=False):
    """The reward's CLIPModel, frozen, and its processor."""
    clip = load_whole(CLIPModel, model, "", dtype=torch.float32 if device == "cpu" else torch.float16,
                      use_safetensors=not pickles or None)
    with clear_load_errors(f"the processor of {model}"):
        return clip.to(device), CLIPProcessor.from_pretrained(model)


def load_whole(kind: type, model: str, part: str, **options):
    """A frozen module of a model, refused where a weight is missing, which the libraries would only mention
    while they fill it with random numbers, or is not finite."""
    what = f"{part or kind.__name__} of {model}"
    with clear_load_errors(what):
        module, report = kind.from_pretrained(model, subfolder=part, output_loading_info=True, **options)
    if report["missing_keys"]:
        fail(f"{what} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
    for name, weight in module.named_parameters():
        if not weight.isfinite().all():
            fail(f"{what}: {name} is NaN or infinite in {weight.dtype}: the file is damaged, or this "
                 f"precision cannot hold it (try --precision bf16)")
    return module.requires_grad_(False).eval()


@contextmanager
def clear_load_errors(what: str):
    """One line for whatever diffusers, transformers and safetensors say of a model that is not all there."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        fail(f"cannot load {what}: {' '.join(str(error).split())[:400]} (a folder must be in diffusers "
             f"layout; without the hub, download the model elsewhere and give its folder; weights must be "
             f".safetensors, as .bin can run code: --pickles where you trust it)")


def prove_reward(detector, size: int):
    """Refuse to start with a detector that is blind at this picture size or sees things where none are."""
    face = Image.fromarray(skimage.data.astronaut()).crop((90, 5, 350, 265)).resize((size, size))
    seen = nudity_scores(detector, np.asarray(face)[None], ["FACE_FEMALE"]).item()
    blank = nudity_scores(detector, np.zeros((1, size, size, 3), np.uint8), LABELS).item()
    if not (seen > 0.5 and blank < FIRES):
        fail(f"the detector does not work: it gives the face of skimage.data.astronaut() {seen:.2f}, a black "
             f"picture {blank:.2f}; reinstall nudenet and onnxruntime", code=1)


@torch.no_grad()
def encode_prompts(pipe, prompts: Sequence[str]) -> torch.Tensor:
    """[2, N, 77, d] fp32 on the host: the empty prompt's embedding N times, and the prompts'."""
    tokens = pipe.tokenizer(["", *prompts], padding="max_length", truncation=True, return_tensors="pt",
                            max_length=pipe.tokenizer.model_max_length)
    hidden = pipe.text_encoder(tokens.input_ids.to(pipe.device)).last_hidden_state.float().cpu()
    return torch.stack([hidden[:1].expand(len(prompts), -1, -1), hidden[1:]])


def pick_attention(unet, wish: str, dtype) -> str:
    """Set the attention kernel and say which it is: xformers only where it takes this dtype on this GPU."""
    if wish == "sdpa" or not torch.cuda.is_available():
        return "sdpa"
    try:
        from xformers.ops import memory_efficient_attention
        q = torch.randn(1, 64, 1, 40, device="cuda", dtype=dtype, requires_grad=True)
        memory_efficient_attention(q, q, q).sum().backward()
        unet.enable_xformers_memory_efficient_attention()
        return "xformers"
    except (ImportError, NotImplementedError, RuntimeError) as error:
        if wish == "xformers":
            fail(f"--attention xformers does not work on this device: {str(error).strip().splitlines()[0]}")
        return "sdpa (xformers does not work on this device)"


def make_trainable(unet, rank: int):
    """Attach an fp32 LoRA to the attention projections or, at rank 0, free the whole U-Net."""
    if rank == 0:
        return unet.requires_grad_(True)
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=projections))
    cast_training_params(unet, torch.float32)


class RoundingAdamW8bit(AdamW8bit):
    """AdamW8bit that needs no fp32 copy of bf16 weights. Each is updated in fp32, then rounded up or down,
    by chance, so that the mean is kept: rounding to the nearest loses updates under 0.2 % of a weight.
    The gradients of such weights are summed in bf16, too, and so accurate to 1 or 2 % only."""

    def update_step(self, group, p, gindex, pindex):
        if p.dtype == torch.float32:
            return super().update_step(group, p, gindex, pindex)
        weight = p.data
        p.data = weight.float()
        p.grad = p.grad.float()
        super().update_step(group, p, gindex, pindex)
        bits = p.data.view(torch.int32)
        bits += torch.randint_like(bits, 1 << 16)  # bf16 is the upper half of fp32
        p.grad = None
        p.data = weight.copy_((bits & -(1 << 16)).view(torch.float32))


def write_atomically(path: Path, write):
    """write(temporary path), flush it to disk, rename it: a reader sees the old file or the new one. Of
    several processes, which all hold the same, the first one writes."""
    if RANK:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}. What was saved before is intact: --resume goes on", code=1)


def save_weights(unet, rank: int, out: Path):
    """pytorch_lora_weights.safetensors for pipe.load_lora_weights(out), or unet/ for from_pretrained."""
    if rank:
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        tensors = {f"unet.{k}": v.contiguous().cpu() for k, v in lora.items()}
        write_atomically(out / "pytorch_lora_weights.safetensors", lambda p: save_file(tensors, p))
    else:
        (out / "unet").mkdir(exist_ok=True)
        write_atomically(out / "unet/config.json", lambda p: unet.to_json_file(p))
        tensors = {k: v.contiguous().cpu() for k, v in unet.state_dict().items()}
        write_atomically(out / "unet/diffusion_pytorch_model.safetensors", lambda p: save_file(tensors, p))


def save_checkpoint(out: Path, step: int, unet, optimizer, scaler):
    """checkpoint/STEP-SHA256.safetensors: everything but the seed that decides the steps to come.

    The name holds the checksum, which a file cut short by a full disk or a crash does not match.
    """
    tensors = {f"weights/{n}": p for n, p in unet.named_parameters() if p.requires_grad}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in optimizer.state[p].items()}
    tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()}  # bitsandbytes shares its tables
    state, folder = {"step": str(step), "scaler": json.dumps(scaler.state_dict())}, out / "checkpoint"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "new", lambda p: save_file(tensors, p, metadata=state))
    (folder / "new").rename(folder / f"{step:06d}-{sha256(folder / 'new')}.safetensors")
    for old in sorted(folder.glob("*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(out: Path, unet, optimizer, scaler) -> int:
    """Restore the newest whole checkpoint; returns the number of finished steps, 0 where none is saved."""
    for path in sorted(out.glob("checkpoint/*.safetensors"), reverse=True):
        if path.stem.split("-")[-1] == sha256(path):
            break
        print(f"checkpoint {path} is damaged (wrong checksum): set aside, using the one before it")
        path.rename(path.with_suffix(".damaged"))
    else:
        return 0
    parameters, trained = dict(unet.named_parameters()), optimizer.param_groups[0]["params"]
    optimizer.state.clear()
    for key, value in load_file(path).items():
        kind, name = key.split("/", 1)
        if kind == "weights":
            parameters[name].data.copy_(value)
        else:  # bitsandbytes counts its steps in an int, PyTorch in a tensor
            i, name = name.split("/")
            value = value.item() if value.dtype == torch.int64 else value.to(trained[int(i)].device)
            optimizer.state[trained[int(i)]][name] = value
    with safe_open(path, "pt") as file:
        state = file.metadata()
    scaler.load_state_dict(json.loads(state["scaler"]))
    return int(state["step"])


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixelate(session, images: np.ndarray, labels: Sequence[str] = NUDITY) -> np.ndarray:
    """A copy of RGB uint8 images [B, H, W, 3], a mosaic over every box where NudeNet sees a label in any of
    nudity_scores' views: what one view misses would be shown."""
    index, hidden = [4 + LABELS.index(label) for label in labels], images.copy()
    for resolution in nudenet_resolutions(images):
        scale = max(images.shape[1:3]) / resolution
        for flip in (1, -1):
            raws = nudenet_raw(session, np.ascontiguousarray(images[:, :, ::flip]), resolution)
            for image, raw in zip(hidden[:, :, ::flip], raws, strict=True):  # raw [22, anchors]
                for cx, cy, w, h in raw[:4, raw[index].max(axis=0, initial=0) > 0.2].T * scale:
                    top, left = max(int(cy - h / 2), 0), max(int(cx - w / 2), 0)
                    patch = image[top:int(cy + h / 2) + 1, left:int(cx + w / 2) + 1]
                    if patch.size:  # else the box lies in the padding
                        patch[:] = cv2.resize(cv2.resize(patch, (4, 4), interpolation=cv2.INTER_AREA),
                                              patch.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return hidden


def draw_curves(metrics: list[dict], path: Path):
    """curves.png: one small chart a metric, over the steps."""
    names = ("reward", "nudity_score", "nudity_rate", "clip_score", "drift", "grad_norm")
    figure = Figure(figsize=(12, 6), layout="constrained")
    for chart, name in zip(figure.subplots(2, 3).flat, names, strict=True):
        chart.plot([m.get(name, math.nan) for m in metrics])  # a gap is a skipped step
        chart.set_title(name)
    write_atomically(path, lambda p: figure.savefig(p, format="png"))


def open_run(args: Args) -> tuple[dict, list[dict]]:
    """What goes to args.json, and the metrics so far. Refuses a folder in use and a resume that changes the
    run."""
    out, now = Path(args.out), dataclasses.asdict(args) | {"prompts_sha256": sha256(Path(args.prompts))}
    if not args.resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            fail(f"output folder {out} is in use: add --resume to go on, or name another with --out")
        return now, []
    if not (out / "args.json").exists():
        fail(f"--resume: {out} holds no run")
    free = {"steps", "resume", "out", "save_every", "micro_batch", "show_uncensored",  # change no step taken
            "prompts"}  # their content is compared, by its checksum
    now, then = json.loads(json.dumps(now)), json.loads((out / "args.json").read_text())
    changed = [k for k in now if k not in free and now[k] != then.get(k)]
    if changed:
        fail("--resume with other arguments than the run was started with: "
             + ", ".join(f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in changed))
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return now, [json.loads(line) for line in lines]


def lock(out: Path):
    """Make the output folder ours until this process ends. Keep what is returned: closing it unlocks."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to {out}: wait for it, or name another folder with --out")
    except OSError as error:
        fail(f"cannot write to output folder {out}: {error.strerror}; name another with --out")
    return file


asked: list[int] = []  # the signals that asked the run to stop


def on_signal(number, frame):
    """The first Ctrl-C or SIGTERM waits for the micro-batch and saves; a second one leaves at once, but under
    torchrun, which sends one of its own as soon as any process has left: the first one may be saving."""
    if asked and WORLD == 1:
        os._exit(128 + number)
    asked.append(number)
    print("\nstopping after this micro-batch; once more to leave at once", file=sys.stderr)


def leave_if_asked():
    """Raise KeyboardInterrupt(signal), in all processes at once, if any of them was asked to stop."""
    number = gather(torch.tensor([asked[0] if asked else 0])).max().item()
    if number:
        raise KeyboardInterrupt(number)


def train(args: Args):
    """The whole run."""
    check(args)
    pairs = read_prompts(args.prompts)
    out, (settings, metrics) = Path(args.out), open_run(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        dist.barrier()  # all have looked into the output folder: now it may be written to
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    why = "given" if any(a.startswith("--model") for a in sys.argv) else f"the default on {device}"
    print(f"model {args.model} ({why}), {len(pairs)} prompts, suppressing {', '.join(args.labels)}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.manual_seed(args.seed)  # for the LoRA's initial weights

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    low = args.lora_rank or args.precision == "bf16" and args.optimizer_8bit  # see RoundingAdamW8bit
    pipe = load_pipeline(args.model, dtype, device, args.pickles, unet_dtype=dtype if low else torch.float32)
    clip, processor = load_clip(args.clip_model, device, args.pickles)
    detector, unet, vae = load_nudenet(), pipe.unet, pipe.vae
    prove_reward(detector, unet.config.sample_size * pipe.vae_scale_factor)
    prompt_context = encode_prompts(pipe, [p for p, _, _ in pairs])  # [2, N, 77, d]
    captions = caption_features(clip, processor, [c for _, c, _ in pairs])  # [N, d]
    eliciting = [i for i, (_, _, elicits) in enumerate(pairs) if elicits] or list(range(len(pairs)))
    benign = sorted(set(range(len(pairs))) - set(eliciting)) if args.kl_weight and args.held_per_step else []
    pipe.text_encoder = clip.text_model = None  # all text is encoded: free their memory
    clip.to("cpu")  # it comes to the GPU to score only
    policy = Policy(unet, noise_schedule(pipe.scheduler.config, args.denoise_steps), args.guidance_scale,
                    torch.autocast(device, dtype, enabled=args.precision != "fp32"))
    attention = pick_attention(unet, args.attention, dtype)
    if benign and not args.lora_rank:  # the whole U-Net will move: keep it as it was
        policy.frozen = copy.deepcopy(unet).to(dtype)
    make_trainable(unet, args.lora_rank)
    trained = [p for p in unet.parameters() if p.requires_grad]
    print(f"attention {attention}, {args.precision}, {sum(p.numel() for p in trained):,} trained parameters")
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # blocks differ in width, adapters and gradient
        unet.compile_repeated_blocks()
    adamw = RoundingAdamW8bit if args.optimizer_8bit else torch.optim.AdamW
    optimizer = adamw(trained, lr=args.learning_rate)
    scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")

    def draw_row(before):
        """The same prompts and seeds whenever called, as a row of samples.png."""
        shown = list(range(len(pairs)))[::max(1, len(pairs) // 12)][:12]
        gens = [generator(args.seed, "sample", i) for i in shown]
        images = rollout(policy, vae, prompt_context[:, shown], gens, args.micro_batch)[2]
        if not args.show_uncensored and not all(label.startswith("FACE_") for label in args.labels):
            images = pixelate(detector, images)
        row = np.concatenate(images, axis=1)  # [H, n * W, 3]
        above = [] if before else [np.asarray(Image.open(out / "samples.png"))[:len(row)]]
        sheet = Image.fromarray(np.concatenate([*above, row]))
        write_atomically(out / "samples.png", lambda p: sheet.save(p, format="PNG"))

    def save(step):
        if RANK:
            return
        save_weights(unet, args.lora_rank, out)  # first: resuming after the last checkpoint writes none
        save_checkpoint(out, step, unet, optimizer, scaler)

    locked = None if RANK else lock(out)  # only now: what could not be loaded leaves nothing behind
    write_atomically(out / "args.json", lambda p: p.write_text(json.dumps(settings, indent=2)))
    if RANK:
        dist.barrier()  # the first process sets damaged checkpoints aside before the others look
    first = load_checkpoint(out, unet, optimizer, scaler) if args.resume else 0
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    metrics = metrics[:first]
    if first == 0:
        draw_row(before=True)
        save(0)  # shows that the disk can hold it, and is what to go back to

    worker = ThreadPoolExecutor(1)  # NudeNet works on the CPU while the GPU samples the next micro-batch

    def policy_gradient_step(step) -> dict:
        """Sample, judge, learn: one step of the algorithm. Returns its line of metrics.jsonl."""
        clock, scores = [time.perf_counter()], []
        chosen = prompts_of_step(eliciting, args.prompts_per_step, args.seed, step)
        held = prompts_of_step(benign, args.held_per_step, args.seed, step)
        index = torch.tensor([i for i in chosen for _ in range(args.group_size)] + held)  # [P * K + H]
        rewarded = len(index) - len(held)  # the first P * K: groups of K pictures of one prompt
        places = list(range(len(index)))
        mine = places[my_share(rewarded)] + places[rewarded:][my_share(len(held))]  # B of them
        own = rewarded // WORLD  # so many of the B are rewarded
        context = prompt_context[:, index[mine]]  # [2, B, 77, d]

        def score(i, images):
            leave_if_asked()
            if i < own:
                scores.append(worker.submit(nudity_scores, detector, images[:own - i], args.labels))
                if device == "cpu":  # no idle cores: overlapping would only slow both down
                    scores[-1].result()

        gens = [generator(args.seed, "rollout", step, i) for i in mine]
        latents, log_prob, images = rollout(policy, vae, context, gens, args.micro_batch, on_images=score)
        clock.append(time.perf_counter())

        nudity = gather(torch.cat([s.result() for s in scores]))  # [P * K]
        pictures = image_features(clip.to(device), processor, images[:own])  # [P * K / WORLD, d]
        clip_score = gather((pictures * captions[index[mine[:own]]]).sum(dim=1).cpu())  # [P * K]
        clip.to("cpu")
        advantages = group_advantages(
            clip_score.view(-1, args.group_size), nudity.view(-1, args.group_size), args.clip_weight,
            args.nudity_weight, args.advantage_clip)  # [P, K]
        clock.append(time.perf_counter())

        rate = args.learning_rate / math.sqrt(1 + step / args.decay_steps)
        optimizer.param_groups[0]["lr"] = rate
        rng = generator(args.seed, "timesteps", step)
        # The last step is never trained: its sigma is so small (0.02) that a log-prob is mostly rounding.
        ends = [trainable(args)] * rewarded + [args.denoise_steps - 1] * len(held)
        steps = torch.stack([torch.randperm(end, generator=rng)[:args.train_timesteps]
                             for end in ends])  # [P * K + H, k]
        torch.manual_seed(rng.initial_seed())  # for RoundingAdamW8bit, which draws from the global generator
        advantage = torch.nn.functional.pad(advantages.flatten(), (0, len(held)))[mine]  # [B], 0 for the held
        learned = update(args, policy, context, latents, log_prob, advantage, torch.tensor(mine) >= rewarded,
                         steps[mine], optimizer, scaler)
        clock.append(time.perf_counter())
        if step == first:
            print(f"self-check: the unchanged policy re-scores its own rollout with ratio 1 within "
                  f"{learned['ratio_max_dev']:.1e} (clip range {args.clip_range:.0e})")

        memory = torch.cuda.max_memory_allocated() if device == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return dict(
            step=step, reward=(args.clip_weight * clip_score - args.nudity_weight * nudity).mean().item(),
            nudity_score=nudity.mean().item(), nudity_rate=(nudity > FIRES).float().mean().item(),
            clip_score=clip_score.mean().item(),
            groups_without_signal=(advantages == 0).all(dim=1).sum().item(), **learned, lr=rate,
            seconds_rollout=clock[1] - clock[0], seconds_reward=clock[2] - clock[1],
            seconds_update=clock[3] - clock[2], peak_memory_mb=memory / 2**20)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", dynamic_ncols=True,
               disable=RANK > 0)
    for step in bar:
        try:
            metrics.append(policy_gradient_step(step))
        except FloatingPointError as error:
            bar.write(f"step {step} skipped: {error}")
            metrics.append(dict(step=step, skipped=str(error)))
        except KeyboardInterrupt as stop:
            save(step)
            bar.close()
            fail(f"stopped after {step} steps; the same command with --resume goes on", 128 + stop.args[0])
        text = "".join(json.dumps(m) + "\n" for m in metrics)
        write_atomically(out / "metrics.jsonl", lambda p, text=text: p.write_text(text))
        if len(metrics) > 2 and all("skipped" in m for m in metrics[-3:]):
            good = load_checkpoint(out, unet, optimizer, scaler)
            save_weights(unet, args.lora_rank, out)
            fail(f"three steps in a row were not finite; what is saved are the weights after step {good}. "
                 f"Start again with a lower --learning-rate, or with --precision bf16 or fp32", code=1)
        if "skipped" not in metrics[-1]:
            bar.set_postfix({k: f"{metrics[-1][k]:.3f}" for k in ("reward", "nudity_rate", "clip_score")})
        if step + 1 == args.steps or ((step + 1) % args.save_every == 0 and "skipped" not in metrics[-1]):
            save(step + 1)

    draw_curves(metrics, out / "curves.png")
    draw_row(before=False)
    weights = "pytorch_lora_weights.safetensors" if args.lora_rank else "unet/"
    print(f"done: {out} holds {weights}, samples.png, curves.png and metrics.jsonl")
    if locked:
        locked.close()
    if WORLD > 1:
        dist.destroy_process_group()


def train_within_memory(args: Args):
    """train, resumed with half the micro-batch for as long as the GPU's memory does not suffice."""
    while True:
        try:
            return train(args)
        except torch.OutOfMemoryError:
            if args.micro_batch == 1 or not Path(args.out, "args.json").exists():
                fail("out of memory, whatever the micro-batch; what helps most: --gradient-checkpointing, "
                     "--precision bf16, a LoRA (--lora-rank 16), --optimizer-8bit", code=1)
        except FloatingPointError as error:
            fail(f"cannot draw samples.png: {error}; try --precision bf16 or fp32", code=1)
        if WORLD > 1:  # the other processes wait for this one and have to be ended
            fail("out of memory: go on with --resume and a smaller --micro-batch", code=1)
        gc.collect()  # what the failed attempt held, its lock on the folder included
        torch.cuda.empty_cache()
        args.resume, args.micro_batch = True, args.micro_batch // 2
        print(f"out of memory: going on with --micro-batch {args.micro_batch}: the same up to rounding")


if __name__ == "__main__":
    train_within_memory(parse_args())
