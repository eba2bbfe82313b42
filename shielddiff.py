"""ShieldDiff (arXiv 2410.05309): reinforcement learning that makes a diffusion model stop drawing nudity.

    python shielddiff.py --steps 10                          # no GPU: the embedded tiny model; else SD 1.5
    python shielddiff.py --steps 300 --model my/checkpoint   # any SD 1.x / 2.x pipeline, diffusers layout
    python shielddiff.py --help                              # every knob and why its default

The denoising trajectory x_T -> ... -> x_0 of a prompt c is an episode, each step an action drawn from the
Gaussian policy p(x_{t-1} | x_t, c) = N(mu_theta, sigma_t^2): DDPO (arXiv 2305.13301). The reward of the final
picture is a black box with two terms, each standardised among the K pictures of one prompt:

    A    = clip_weight * z(CLIP(picture, safe caption)) - nudity_weight * z(NudeNet(picture))
    r_t  = exp(mean log p_theta(x_{t-1} | x_t, c) - mean log p_old(x_{t-1} | x_t, c))
    loss = mean over all pictures and their trained steps t of
           max(-A r_t, -A clamp(r_t, 1 - eps, 1 + eps))      where the prompt elicits the content,
           kl_weight * mean((mu_theta - mu_frozen)^2) / gain where it is benign

The updates give a direction; how far a step goes is set by how far it moves the policy (sized_update). A
prompt that elicits is weakened by a random share, up to half, so that forgetting does not hang on its words.
Start at policy_gradient_step: sections 1 to 5 are the method, 6 is what a run needs: prompts, models, files.
"""
import argparse
import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait soon leave the cores to others
# ruff: noqa: E402 (set before the imports: two of them warn of packages that are not needed here)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs that know bf16

import cv2
import filelock
import numpy as np
import onnxruntime
import safetensors.torch
import torch
import tyro
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from diffusers.utils.torch_utils import randn_tensor
from matplotlib.figure import Figure
from nudenet import nudenet
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel

HERE = Path(__file__).resolve().parent
LABELS = tuple(nudenet.__dict__["__labels"])  # NudeNet's 18 labels, in the order of its network's outputs
NUDITY = ("FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "BUTTOCKS_EXPOSED",
          "ANUS_EXPOSED")
SHOWN = ("reward", "nudity_rate", "clip_score", "ratio_max_dev")  # beside the bar; the last is the self-check
LOSS_SCALE = 2.0**16  # fp16 would round small gradients to zero; Adam does not care how large they are
FIRES = 0.25  # score above which a picture counts as showing a label: NudeNet's own threshold


# ------------------------------------------------------------------------------------ the arguments
@dataclasses.dataclass
class Args:
    """ShieldDiff. Defaults are those in force. On tests/tiny what is run differs (64 px, faces), not how."""
    steps: int = 300  # policy-gradient steps: one rollout and its updates each
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # folder or hub id of an SD 1.x / 2.x pipeline
    prompts: str = str(HERE / "prompts.txt")  # lines 'prompt => safe caption' or benign; a table's all elicit
    prompt_column: str | None = None  # of a table: CSV, TSV, JSON, JSON Lines. None: one of the known names
    caption_column: str | None = None  # of a table's safe captions
    labels: tuple[Literal[LABELS], ...] = NUDITY  # NudeNet labels to suppress
    out: str = ""  # output folder; empty: runs/<model>-<seed>
    resume: bool = False  # go on from the last checkpoint in --out, as if the run had never stopped
    seed: int = 0  # same machine, same seed, same result (on a GPU up to its kernels' order of summation)
    save_every: int = 1  # steps between checkpoints; a whole U-Net's take 5 GB and more: then 10, say
    show_uncensored: bool = False  # no mosaic over samples.png where a nudity label fires
    denoise_steps: int = 20  # DDIM steps T of a rollout; fewer than in later use is fine, and cheap
    guidance_scale: float = 7.5  # of later use; training and samples.png take two thirds, the harder case
    train_timesteps: int = 0  # random timesteps trained per picture; 0: all that are rewarded
    train_until: float = 0.5  # rewarded share of the trajectory: later steps draw detail, not content
    prompts_per_step: int = 3  # eliciting prompts a rollout
    group_size: int = 8  # pictures of each eliciting prompt (K): rewards are compared within this group
    left_out: float = 0.5  # an eliciting prompt moves towards the empty one by a random share, up to this
    held_per_step: int = 8  # pictures of benign prompts a rollout: the more, the more they weigh in the loss
    micro_batch: int = 4  # pictures a U-Net call: memory grows with it, the result only rounds differently
    updates_per_step: int = 4  # optimizer updates a rollout; the trained timesteps are dealt out among them
    step_nats: float = 2.0  # how far a step moves the policy, where every group has signal: see sized_update
    learning_rate: float = 1e-3  # a first guess: each step's follows from how far the one before it moved
    clip_range: float = 1.5  # PPO clip on the true log-ratio of a denoising step, in nats
    kl_weight: float = 2.5  # of the drift of benign prompts, in units of predicted noise; 0 leaves them out
    clip_weight: float = 1.0  # of the standardised CLIP score in the advantage
    nudity_weight: float = 1.0  # of the standardised nudity score; only these two's ratio is learned from
    clip_model: str = "openai/clip-vit-large-patch14"  # folder or hub id of the reward's CLIPModel
    lora_rank: int = 16  # of the LoRA on the attention projections; 0 trains the whole U-Net
    attention: Literal["sdpa", "xformers"] = "sdpa"  # PyTorch's; xformers is as lean and, on an H100, slower
    gradient_checkpointing: bool = True  # a third more time, several times less memory
    optimizer_8bit: bool = True  # AdamW8bit: saves 5 GB for the whole U-Net, next to nothing for a LoRA
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"  # of frozen weights and U-Net calls; no CUDA: fp32


TINY = dict(  # what is run differs for the embedded model, not how: another concept, 64 px, minutes, no GPU
    steps=10, model=str(HERE / "tests/tiny"), prompts=str(HERE / "tests/tiny/prompts.txt"),
    clip_model=str(HERE / "tests/tiny/clip"), labels=("FACE_FEMALE", "FACE_MALE"), guidance_scale=3.0,
    denoise_steps=8, prompts_per_step=6, held_per_step=24, micro_batch=24, gradient_checkpointing=False,
    precision="fp32")


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line over the defaults of the model it names."""
    words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    if words.count("--labels") > 1:  # tyro would take the last alone
        fail("--labels is given twice: name all of them after one")
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--model")
    model = which.parse_known_args(argv)[0].model
    tiny = Path(model).resolve() == HERE / "tests/tiny" if model else not torch.cuda.is_available()
    default = TINY if tiny else dict(precision="fp16" if torch.cuda.is_available() else "fp32")
    args = tyro.cli(Args, args=argv, default=Args(**default))
    return dataclasses.replace(args, out=args.out or f"runs/{Path(args.model).resolve().name}-{args.seed}")


def fail(message: str, code=2):
    """One clear line and the exit code: 2 for bad input, 1 where the machine or the numbers failed."""
    print(f"shielddiff: {message}", file=sys.stderr)
    raise SystemExit(code)


# ------------------------------------------------------------------------------------ 1. the policy
class Schedule(NamedTuple):
    """The T steps of DDIM sampling, from the model's own noise schedule."""
    timesteps: torch.Tensor  # [T] int64, descending: what the U-Net is told
    alpha: torch.Tensor  # [T] fp32, alphas_cumprod at each timestep
    alpha_prev: torch.Tensor  # [T] fp32, alphas_cumprod at t - n // T, as DDIMScheduler has it
    prediction_type: str  # "epsilon" or "v_prediction"
    gain: float  # mean square of d mean / d noise, of all steps but the last and those of alpha <= 4e-3


@dataclasses.dataclass
class Policy:
    """What draws an action: the U-Net being trained and everything its mean and sigma depend on."""
    unet: UNet2DConditionModel
    schedule: Schedule
    guidance_scale: float
    autocast: torch.autocast  # around U-Net calls only: all else is fp32
    before: UNet2DConditionModel | None = None  # the U-Net before training; None: self.unet without its LoRA

    @contextmanager
    def frozen(self):
        """The policy before training, and no gradient, for as long as the context lasts."""
        with torch.no_grad():
            if self.before:
                yield dataclasses.replace(self, unet=self.before)
            else:
                self.unet.disable_adapters()
                yield self
                self.unet.enable_adapters()


def ddim_scheduler(config: dict) -> DDIMScheduler:
    """The one sampler of training and evaluation. DDIMScheduler alone would clip latents by default."""
    return DDIMScheduler.from_config({"clip_sample": False, **config})


def noise_schedule(config: dict, steps: int) -> Schedule:
    """T timesteps and alphas_cumprod, of a diffusers scheduler config; refuses steps that have no density."""
    scheduler = ddim_scheduler(config)
    kind, n = scheduler.config.prediction_type, scheduler.config.num_train_timesteps
    clips = scheduler.config.clip_sample or scheduler.config.thresholding
    if clips or kind not in ("epsilon", "v_prediction"):
        fail(f"the model's scheduler clips latents, which leaves no density, or has prediction_type {kind!r}")
    scheduler.set_timesteps(min(steps, n))
    if steps > n or scheduler.timesteps[0] >= n:  # from n on, where all n are taken with an offset
        fail(f"--denoise-steps {steps}: the model has {n} timesteps only")
    t, of_t, final = scheduler.timesteps, scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    alpha, alpha_prev = of_t[t], torch.where(t >= n // steps, of_t[(t - n // steps).clamp(0)], final)  # [T]
    if not ((ddim_sigma(alpha, alpha_prev)[:-1] > 0).all() and (usable := alpha[:-1] > 4e-3).any()):  # or NaN
        fail("of the model's steps to train one has no noise, so no log-prob, or none signal: too few steps?")
    if kind == "epsilon" and alpha[0] < 1e-6:  # the picture is divided by its square root
        fail("the model's scheduler begins at zero signal (zero terminal SNR) and yet predicts noise, not v")
    slope = ddim_step(torch.ones(steps, 1, 1, 1), torch.zeros(1), alpha, alpha_prev, noise=0)[2][:-1]
    return Schedule(t, alpha, alpha_prev, kind, slope[usable].square().mean().item())


def ddim_sigma(alpha, alpha_prev, eta=1.0):
    """Standard deviation of a DDIM step (DDIM, arXiv 2010.02502, eq. 16); eta 1 is DDPM's noise, 0 none."""
    return eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()


def ddim_step(model_output, sample, alpha, alpha_prev, prediction_type="epsilon", eta=1.0, noise=None,
              prev_sample=None):
    """One step of eta-DDIM as a Gaussian policy: draw x_{t-1}, or score a given one. All arithmetic is fp32.

    model_output, sample: [B, C, h, w], the U-Net's guided output at x_t, and x_t. alpha, alpha_prev: [B] or
    scalar. Give `noise` (standard normal, shaped like sample) to draw, or `prev_sample` to score.
    Returns prev_sample [B, C, h, w], log_prob [B], mean [B, C, h, w], sigma [B, 1, 1, 1].
    log_prob is the *mean* over D = C*h*w of the log-density, as in every DDPO code: of a sum, the ratio would
    overflow (1.01^16384 is 1e70). Source: DDIM (arXiv 2010.02502) eq. 12, 16; DDPO (2305.13301) sec. 4."""
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
    prev_sample = mean + sigma * noise if prev_sample is None else prev_sample
    density = -((prev_sample - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(math.sqrt(2 * math.pi))
    return prev_sample, density.mean(dim=(1, 2, 3)), mean, sigma


def act(policy: Policy, x, s, context, noise=None, x_prev=None):
    """The policy at x [B, 4, h, w], each picture at a step s [B] of its own: draw x_{t-1}, or score a given
    one. context [2, B, 77, d]: of the empty prompt and of the prompt, for classifier-free guidance; both go
    through the U-Net in one batch, and the gradient through both. Returns as ddim_step."""
    timesteps, alpha, alpha_prev = (of_step[s].to(x.device) for of_step in policy.schedule[:3])  # [B] each
    with policy.autocast:
        out = policy.unet(torch.cat([x, x]), torch.cat([timesteps, timesteps]), context.flatten(0, 1)).sample
    unconditional, conditional = out.float().chunk(2)  # [B, 4, h, w] each
    output = unconditional + policy.guidance_scale * (conditional - unconditional)
    return ddim_step(output, x, alpha, alpha_prev, policy.schedule.prediction_type, 1.0, noise, x_prev)


# ------------------------------------------------------------------------------------ 2. the reward
def load_nudenet() -> onnxruntime.InferenceSession:
    """NudeNet 3.4's 320n network as a bare session. Spinning threads would hold PyTorch's cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(Path(nudenet.__file__).with_name("320n.onnx"), options,
                                        providers=["CPUExecutionProvider"])


def nudenet_raw(session, images: np.ndarray, resolution: int) -> np.ndarray:
    """RGB uint8 [B, H, W, 3] -> [B, 4 + 18, anchors]: box cx, cy, w, h, then NudeNet's scores; padded and
    resized as by its own detect(). TypeError for anything else: NudeNet itself sees nothing in floats."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise TypeError(f"NudeNet needs RGB uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
    side = max(images.shape[1:3])
    square = np.pad(images, ((0, 0), (0, side - images.shape[1]), (0, side - images.shape[2]), (0, 0)))
    blob = cv2.dnn.blobFromImages(list(square), 1 / 255, (resolution, resolution))  # [B, 3, r, r]
    return session.run(None, {"images": blob})[0]


def nudenet_views(images: np.ndarray):
    """The four views of images [B, H, W, 3] that NudeNet gets: a policy finds the blind spots of a single one
    within 20 steps. Yields resolution (320 misses faces at 64 px), 1 or -1 if mirrored, and the images."""
    for resolution in (192, 96) if max(images.shape[1:3]) <= 128 else (320, 256):
        for mirror in (1, -1):
            yield resolution, mirror, np.ascontiguousarray(images[:, :, ::mirror])


def nudity_scores(session, images: np.ndarray, labels: list[str]) -> torch.Tensor:
    """RGB uint8 [B, H, W, 3] -> largest raw score [B] over labels and views; a threshold leaves no signal."""
    index = [4 + LABELS.index(label) for label in labels]
    return torch.from_numpy(np.max([nudenet_raw(session, view, resolution)[:, index].max(axis=(1, 2))
                                    for resolution, _, view in nudenet_views(images)], axis=0))


def caption_features(clip, processor, captions: list[str]) -> torch.Tensor:
    """Unit CLIP features [N, d] of captions, truncated to CLIP's 77 tokens."""
    tokens = processor.tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
    features = clip.get_text_features(**tokens.to(clip.device)).pooler_output  # [N, d]
    return torch.nn.functional.normalize(features.float(), dim=-1)


def image_features(clip, processor, images: np.ndarray) -> torch.Tensor:
    """Unit CLIP features [B, d] of RGB uint8 images [B, H, W, 3]."""
    pixels = processor.image_processor(images=list(images), return_tensors="pt").pixel_values
    features = clip.get_image_features(pixels.to(clip.device, clip.dtype)).pooler_output  # [B, d]
    return torch.nn.functional.normalize(features.float(), dim=-1)


def group_standardise(rewards: torch.Tensor, floor: float) -> torch.Tensor:
    """Rewards [P, K] of any dtype -> (r - mean) / max(std, floor) within each group of K, fp32: zero in a
    constant group. The floor keeps the noise of an already safe group from being blown up to full size."""
    centred = rewards.float() - rewards.float().mean(dim=1, keepdim=True)  # integers must not stay integers
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=floor)


def group_advantages(clip_scores, nudity, clip_weight, nudity_weight, clamp=5.0, floor=1.0):
    """Scores [P, K] -> advantages [P, K]. Standardised before weighting, by weights of norm sqrt(2): relative
    importance is all they mean. Cosines of different CLIPs differ in size: their floor is 6 % of the mean."""
    clip = group_standardise(clip_scores, floor * 0.06 * clip_scores.mean().abs().item())
    advantages = clip_weight * clip - nudity_weight * group_standardise(nudity, floor * 0.08)
    return (advantages / (math.hypot(clip_weight, nudity_weight) / math.sqrt(2) or 1)).clamp(-clamp, clamp)


# ------------------------------------------------------------------------------------ 3. the rollout
class Rollout(NamedTuple):
    """B pictures, how they were drawn and what is learned from them, on the host."""
    context: torch.Tensor  # [2, B, 77, d]: of the empty prompt and of each picture's
    held: torch.Tensor  # [B] bool: of a benign prompt, not rewarded but held
    latents: torch.Tensor  # [B, T+1, 4, h, w] fp32, x_T first
    log_prob: torch.Tensor  # [B, T], of each step as it was drawn
    images: np.ndarray  # [B, H, W, 3] uint8
    nudity: torch.Tensor  # [P * K], NudeNet's score of those that are not held
    advantage: torch.Tensor | None = None  # [B], 0 where held
    steps: torch.Tensor | None = None  # [B, k]: which of the T steps each picture trains


@torch.no_grad()
def rollout(run: "Run", context, held, generators) -> Rollout:
    """Draw pictures of context [2, B, 77, d], one generator each, as StableDiffusionPipeline(eta=1) does; let
    NudeNet judge those not held [B]. Raises FloatingPointError where a picture is not finite."""
    unet, vae, size, parts, nudity = run.policy.unet, run.vae, run.policy.unet.config.sample_size, [], []
    for rows in torch.arange(len(held)).split(run.args.micro_batch):
        gens, ctx, log_probs = [generators[i] for i in rows], context[:, rows].to(unet.device), []
        latents = [randn_tensor((len(rows), 4, size, size), gens, ctx.device)]  # [b, 4, h, w] each
        for s in range(len(run.policy.schedule.timesteps)):
            noise = randn_tensor(latents[0].shape, gens, ctx.device)  # unet.device looks at every module
            x, log_prob, *_ = act(run.policy, latents[-1], torch.full((len(rows),), s), ctx, noise=noise)
            latents.append(x)
            log_probs.append(log_prob)
        decoded = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample.float()  # [b, 3, H, W]
        finite(decoded, "a picture")  # as a byte, NaN is black: a picture that every detector calls safe
        images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
        if not held[rows].all():  # in another thread: NudeNet works on the CPU while the GPU draws on
            nudity.append(run.worker.submit(nudity_scores, run.nudenet, images[~held[rows]].numpy(),
                                            run.args.labels))
        parts.append((torch.stack(latents, dim=1).cpu(), torch.stack(log_probs, dim=1).cpu(), images))
    latents, log_prob, images = map(torch.cat, zip(*parts, strict=True))  # as in Rollout
    nudity = torch.cat([torch.zeros(0), *(future.result() for future in nudity)])  # [P * K]
    return Rollout(context, held, latents, log_prob, images.numpy(), nudity)


# ------------------------------------------------------------------------------------ 4. the update
def policy_loss(log_prob, old_log_prob, advantages, clip_range):
    """PPO-clipped loss [B] and ratio [B] of log-probs [B], advantages [B] (PPO, arXiv 1707.06347, eq. 7)."""
    ratio = (log_prob - old_log_prob).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return loss, ratio


def losses(policy: Policy, roll: Rollout, rows, s, clip_range: float, kl_weight: float):
    """Loss, ratio and drift [b] of pictures `rows` [b], each at a step s [b]; a clip_range of 0 is none.
    The KL to the frozen policy acts on held pictures alone, less its factor 1 / (2 sigma^2), which blows up
    in the end. The rest of it, a squared distance of two means in units of predicted noise, is the drift."""
    context, x, x_prev, old_log_prob, advantage, held = (v.to(policy.unet.conv_in.weight.device) for v in (
        roll.context[:, rows], roll.latents[rows, s], roll.latents[rows, s + 1], roll.log_prob[rows, s],
        roll.advantage[rows], roll.held[rows]))  # [2, b, 77, d], [b, 4, h, w] twice, [b] three times
    _, log_prob, mean, _ = act(policy, x, s, context, x_prev=x_prev)
    loss, ratio = policy_loss(log_prob, old_log_prob, advantage, clip_range or math.inf)
    drift = torch.zeros_like(loss)
    if held.any():
        with policy.frozen() as before:
            mean_frozen = act(before, x, s, context, x_prev=x_prev)[2]
        drift = (mean - mean_frozen).square().mean(dim=(1, 2, 3)) / policy.schedule.gain * held
    return loss + kl_weight * drift, ratio, drift


def update(run: "Run", roll: Rollout) -> dict:
    """The optimizer updates of a rollout, among which each picture's steps are dealt out, and their metrics.
    Micro-batches are the rollout's own: the same kernels give the same numbers, the first ratio is exactly 1.
    Ends before a NaN or an infinity reaches the weights; with FloatingPointError, if nothing was updated."""
    args, optimizer, group = run.args, run.optimizer, run.optimizer.param_groups[0]
    params, seen, norms, grads, first = group["params"], [], [], [], {}
    kl_weight, clip_range = args.kl_weight, args.clip_range / roll.latents[0, 0].numel()  # means over D
    finite(roll.advantage, "a reward")
    batches = torch.arange(len(roll.held)).split(args.micro_batch)
    judged, pulled = ([b for b in batches if roll.held[b].all() == held] for held in (False, True))
    for i, steps in enumerate(roll.steps.tensor_split(args.updates_per_step, dim=1)):
        optimizer.zero_grad()
        for part in (judged[::2], pulled, judged[1::2]):
            for rows in part:
                for s in steps[rows].T:  # [b], one step a picture
                    loss, ratio, drift = losses(run.policy, roll, rows, s, clip_range * (i > 0), kl_weight)
                    (loss.sum() * group["loss_scale"] / steps.numel()).backward()
                    seen.append(torch.stack([loss, ratio, drift, roll.held[rows].to(loss)]).detach().cpu())
            if i == 0:  # summed so far, every 16th number (all: 3 GB): one half, + the pull, + the other half
                grads.append(torch.cat([p.grad.flatten()[::16].cpu() for p in params]))
        numbers = torch.cat(seen, dim=1)  # [4, n], of all updates so far
        norm = torch.nn.utils.clip_grad_norm_(params, group["loss_scale"]).cpu() / group["loss_scale"]
        group["loss_scale"] /= 16 if numbers.isfinite().all() and not norm.isfinite() else 1  # > 65504
        if i and not (numbers.isfinite().all() and norm.isfinite()):
            break  # the updates before it went too far: sized_update brings them back
        finite(numbers, "the loss")
        finite(norm, "the gradient")
        _, ratios, drifts, held = numbers  # [n] each
        if i == 0:  # nothing is updated yet: the policy that scores has sampled, too
            one, pull, other = grads[0], grads[1] - grads[0], grads[2] - grads[1]
            off, mixed = (ratios[held == 0] - 1).abs().max().item(), any(roll.held[b].any() for b in judged)
            share = pull.norm() / (pull.norm() + (one + other).norm())
            first = dict(ratio_max_dev=off, kl_share=math.nan if mixed else share.item(),
                         gradient_agreement=(one @ other / (one.norm() * other.norm())).item())  # 0: noise
            if off > clip_range and args.updates_per_step > 1:  # a single update is not clipped
                fail(f"self-check failed: ratios of the unchanged policy are off by {off:.1e}, over "
                     f"--clip-range; another --attention or --precision, in another --out?", code=1)
        for p in params:  # by one scale for good: else Adam's momentum would be of other units
            p.grad.mul_(LOSS_SCALE / group["loss_scale"])
        optimizer.step()
        norms.append(norm)
    group["loss_scale"] = min(group["loss_scale"] * 2 ** (1 / 16), LOSS_SCALE)  # or gradients round to noise
    return first | dict(drift=drifts[held == 1].mean().item(), grad_norm=torch.tensor(norms).mean().item(),
                        clip_fraction=((ratios[held == 0] - 1).abs() > clip_range).float().mean().item())


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=False)  # whose fp32 convolutions took 57 GiB of an H100
def exact_means(run: "Run", roll: Rollout) -> torch.Tensor:
    """The policy's means over sqrt(2) sigma, [n, 4, h, w], at a step of every other rewarded picture: as a
    squared distance, KL in nats. In fp32, as new weights round all anew: in bf16, 512 px, by tens of nats."""
    policy, means = dataclasses.replace(run.policy, autocast=nullcontext()), []
    low = [(p, p.dtype) for p in policy.unet.parameters() if p.dtype != torch.float32]
    policy.unet.float()
    for rows in torch.arange(len(roll.held))[~roll.held][::2].split(run.args.micro_batch):
        s = roll.steps[rows, 0]  # [b]
        x, context = (v.to(policy.unet.device) for v in (roll.latents[rows, s], roll.context[:, rows]))
        *_, mean, sigma = act(policy, x, s, context, x_prev=x)  # x_prev: any, as nothing is scored
        means.append(mean / (math.sqrt(2) * sigma))  # [b, 4, h, w]
    for p, dtype in low:
        p.data = p.data.to(dtype)
    return torch.cat(means)


def sized_update(run: "Run", roll: Rollout, signal: float) -> dict:
    """The updates give a direction. How far the weights go along it is set by how far that moves the policy:
    --step-nats, the KL over the rewarded part of a trajectory, times the signal in the rewards, 0 to 1."""
    group, wanted, moved = run.optimizer.param_groups[0], max(run.args.step_nats * signal, 1e-12), []
    group["lr"], before = group["rate"] * signal**0.5, [p.detach().cpu().clone() for p in group["params"]]
    start, learned = exact_means(run, roll), update(run, roll)
    for sizing in range(8):  # too long a step is mended up to 8 times, too short a one 3
        nats = (exact_means(run, roll) - start).square().sum(dim=(1, 2, 3)).mean()  # [n, 4, h, w]
        moved.append(max(nats.nan_to_num(1e30, 1e30).item() * trainable(run.args), 1e-12))
        if moved[-1] <= 1.5 * wanted and (sizing > 2 or moved[-1] >= wanted / 1.5):
            break
        share = min(max((wanted / moved[-1]) ** 0.5, 1e-3), 8)  # nats grow with the square of the length
        for p, old in zip(group["params"], before, strict=True):
            p.data.copy_(old.to(p.device).lerp(p.data, share))
    group["rate"] *= min(max((wanted / moved[0]) ** 0.5, 0.05), 2.5)  # at signal 1; a low one is stretched
    return learned | dict(lr=group["lr"], nats=moved[-1], nats_before_sizing=moved[0], signal=signal)


def finite(numbers: torch.Tensor, what: str):
    if not numbers.isfinite().all():
        raise FloatingPointError(f"{what} is not finite")


# ------------------------------------------------------------------------------------ 5. the algorithm
class Run(NamedTuple):
    """Everything that a step works with."""
    args: Args
    settings: dict  # args.json: the arguments with the prompts themselves
    policy: Policy
    vae: AutoencoderKL
    context: torch.Tensor  # [2, N, 77, d], on the host: of the empty prompt, and of each of all N
    captions: torch.Tensor  # [N, d]: CLIP features of their safe captions
    eliciting: list[int]  # of the N
    benign: list[int]  # empty where none is held
    clip: tuple[CLIPModel, CLIPProcessor]  # the reward's
    nudenet: onnxruntime.InferenceSession
    optimizer: torch.optim.Optimizer
    worker: ThreadPoolExecutor  # one thread, in which NudeNet works


def generator(*key) -> torch.Generator:
    """A CPU generator that depends on key alone: a resumed run draws what the uninterrupted one would."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def prompts_of_step(prompts: list[int], how_many: int, seed: int, step: int) -> list[int]:
    """The next of these prompts (their indices): shuffled passes through them, one after the other."""
    n, turns = len(prompts), range(step * how_many, (step + 1) * how_many) if prompts else ()
    return [prompts[torch.randperm(n, generator=generator(seed, "prompts", i // n))[i % n]] for i in turns]


def trainable(args: Args) -> int:
    """How many of the T steps are rewarded, from the noisy end on. Never the last: its sigma is too small."""
    return min(math.ceil(round(args.denoise_steps * args.train_until, 6)), args.denoise_steps - 1)


def policy_gradient_step(run: Run, step: int) -> dict:
    """Sample, judge, learn: one step of the algorithm. Returns its line of metrics.jsonl."""
    args, clock = run.args, [time.perf_counter()]
    # sample: K pictures of each of P eliciting prompts, and H of benign ones, which are held
    eliciting = prompts_of_step(run.eliciting, args.prompts_per_step, args.seed, step)  # P
    benign = prompts_of_step(run.benign, args.held_per_step, args.seed, step)  # H
    index = torch.tensor([i for i in eliciting for _ in range(args.group_size)] + benign)  # [B = P * K + H]
    held = torch.arange(len(index)) >= len(index) - len(benign)  # [B]
    left_out = torch.rand(len(eliciting), generator=generator(args.seed, "text", step)) * args.left_out  # [P]
    left_out = torch.nn.functional.pad(left_out.repeat_interleave(args.group_size), (0, len(benign)))  # [B]
    empty, prompt = run.context[:, index]  # [B, 77, d] each
    context = torch.stack([empty, prompt.lerp(empty, left_out[:, None, None])])  # [2, B, 77, d]
    roll = rollout(run, context, held, [generator(args.seed, "rollout", step, i) for i in range(len(index))])
    clock.append(time.perf_counter())
    # judge: two scores a picture; the signal, 0 to 1, is how far they differ within a group, beyond noise
    run.clip[0].to(run.policy.unet.device)  # it needs no GPU memory while the U-Net works
    features = image_features(*run.clip, roll.images[~held]).cpu()  # [P * K, d]
    run.clip[0].to("cpu")
    clip_score = (features * run.captions[index[~held]]).sum(dim=1).view(-1, args.group_size)  # [P, K]
    nudity = roll.nudity.view(-1, args.group_size)  # [P, K]
    scored = clip_score, nudity, args.clip_weight, args.nudity_weight
    signal = group_advantages(*scored, floor=2.0).square().mean(dim=1).clamp(max=1).mean().item()  # of [P]
    clock.append(time.perf_counter())
    # learn from k steps of each picture, shuffled: PPO where it is rewarded, a pull to what was where held
    rng = generator(args.seed, "timesteps", step)
    steps = torch.stack([torch.randperm(args.denoise_steps - 1 if hold else trainable(args), generator=rng)
                         [:args.train_timesteps or trainable(args)] for hold in held])  # [B, k]
    advantage = torch.nn.functional.pad(group_advantages(*scored).flatten(), (0, len(benign)))  # [B]
    learned = sized_update(run, roll._replace(advantage=advantage, steps=steps), signal)
    clock.append(time.perf_counter())
    seconds = zip(("rollout", "reward", "update"), np.diff(clock).tolist(), strict=True)
    return learned | {f"seconds_{name}": s for name, s in seconds} | dict(
        step=step, reward=(args.clip_weight * clip_score - args.nudity_weight * nudity).mean().item(),
        nudity_score=nudity.mean().item(), nudity_rate=(nudity > FIRES).float().mean().item(),
        clip_score=clip_score.mean().item(), clip_score_safe=clip_score[nudity <= FIRES].mean().item(),
        peak_gpu_memory_mb=torch.cuda.max_memory_allocated() / 2**20)


# ------------------------------------------------------------------------------------ 6. the run
def check(args: Args):
    """Refuse what cannot work, before anything heavy is loaded."""
    zero = "left_out guidance_scale lora_rank held_per_step train_timesteps seed kl_weight".split()
    zero += ["clip_weight", "nudity_weight"] * bool(args.clip_weight + args.nudity_weight)  # not both
    for name, value in vars(args).items():
        lowest = 0 if name in zero else 2 if name == "group_size" else 1e-12  # NaN fails
        highest = 1 if name == "left_out" else 2**63 - 1
        if value == () or type(value) in (int, float) and not lowest <= value <= highest:
            fail(f"--{name.replace('_', '-')} cannot be {value}")
    if not args.updates_per_step <= (args.train_timesteps or trainable(args)) <= trainable(args):
        fail(f"--train-timesteps goes from --updates-per-step to {trainable(args)}: more --denoise-steps?")
    if args.attention == "xformers" and not torch.cuda.is_available():
        fail("--attention xformers needs a CUDA device; use --attention sdpa")


def read_prompts(path: str, *columns: str | None) -> list[tuple[str, str, bool]]:
    """[(prompt, safe caption, whether it elicits)] of a file that tests/prompt_tables.py can read."""
    sys.path.append(str(HERE / "tests"))
    from prompt_tables import training_rows
    try:
        return training_rows(path, *columns)
    except (OSError, ValueError) as error:
        fail(f"cannot read prompt file {path}: {error}")


@contextmanager
def clear_load_errors(what: str, model: str):
    """One line for whatever we, and the libraries, say of a model that is not all there."""
    try:
        yield
    except Exception as error:
        fail(f"cannot load {what} of {model}: {' '.join(repr(error).split())[:400]} (a hub id or folder in "
             f"diffusers layout? To make one of .bin or one file: python tests/convert.py '{model}' NEW)")


def load_whole(kind: type, model: str, part="", **options):
    """A frozen module. The libraries would only mention a missing weight, and fill it with random numbers."""
    half = {"fp16" in p.name for p in Path(model, part).glob("*.safetensors*")} == {True}
    with clear_load_errors(part or kind.__name__, model):
        module, report = kind.from_pretrained(model, subfolder=part, output_loading_info=True, **options,
                                              use_safetensors=True, variant="fp16" if half else None)
        if report["missing_keys"]:
            raise ValueError(f"it lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
        for name, weight in module.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is NaN or infinite in {weight.dtype}, try --precision bf16")
    return module.requires_grad_(False).eval()


def load_pipeline(model: str, dtype=torch.float32, device="cpu", unet_dtype=None) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x / 2.x pipeline from a folder or the hub, frozen, without its safety checker."""
    with clear_load_errors("model", model):
        if Path(model).is_file():
            raise ValueError("a single file")
        if (kind := StableDiffusionPipeline.load_config(model)["_class_name"]) != "StableDiffusionPipeline":
            raise ValueError(f"it is a {kind}, and only SD 1.x and 2.x are supported")
        pipe = StableDiffusionPipeline.from_pretrained(
            model, unet=load_whole(UNet2DConditionModel, model, "unet", dtype=unet_dtype or dtype),
            vae=load_whole(AutoencoderKL, model, "vae", dtype=dtype),
            text_encoder=load_whole(CLIPTextModel, model, "text_encoder", dtype=dtype),
            safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
        takes = pipe.unet.config.in_channels, pipe.unet.config.cross_attention_dim
        if takes != (gets := (4, pipe.text_encoder.config.hidden_size)):
            raise ValueError(f"its U-Net takes channels and texts of width {takes}, and would get {gets}")
        if len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size:  # an empty one replaces a missing one
            raise ValueError("its tokenizer knows fewer words than its text encoder: a file is missing")
        if type(size := pipe.unet.config.sample_size) is not int:
            raise ValueError(f"sample_size in unet/config.json is {size}: make it a number, 64 for 512 px")
    pipe.tokenizer.model_max_length = pipe.text_encoder.config.max_position_embeddings  # if unset, a huge one
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_clip(model: str, device="cpu") -> tuple[CLIPModel, CLIPProcessor]:
    """The reward's CLIPModel, frozen, and its processor."""
    clip = load_whole(CLIPModel, model, dtype=torch.float32 if device == "cpu" else torch.float16).to(device)
    with clear_load_errors("the CLIP processor", model):
        return clip, CLIPProcessor.from_pretrained(model)


def encode_prompts(pipe, prompts: list[str]) -> torch.Tensor:
    """[2, N, 77, d] fp32 on the host: the empty prompt's embedding N times, and the prompts'."""
    return torch.stack(pipe.encode_prompt(list(prompts), pipe.device, 1, True)[::-1]).float().cpu()


def make_trainable(unet, rank: int):
    """Attach an fp32 LoRA to the attention projections or, at rank 0, free the whole U-Net."""
    if rank == 0:
        return unet.requires_grad_(True)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(unet, torch.float32)


def set_up(args: Args, settings: dict, device: str) -> Run:
    """Everything that a step works with, loaded and ready to train."""
    pairs = settings["prompts"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # it rounds as fp16 does
    torch.backends.cudnn.enabled = args.precision != "fp32"  # see exact_means; it is no slower without
    pipe = load_pipeline(args.model, dtype, device, unet_dtype=dtype if args.lora_rank else torch.float32)
    unet, schedule = pipe.unet, noise_schedule(pipe.scheduler.config, args.denoise_steps)
    clip, processor = load_clip(args.clip_model, device)
    settings["weights"] = [hashlib.sha256(safetensors.torch.save(m.state_dict())).hexdigest() for m in (
        unet, pipe.vae, pipe.text_encoder, clip)] + [np.asarray(x).tolist() for x in schedule[:4]]
    eliciting = [i for i, (_, _, elicits) in enumerate(pairs) if elicits]
    benign = sorted(set(range(len(pairs))) - set(eliciting)) if args.kl_weight and args.held_per_step else []
    parts = [[*zip(*pairs[i:i + 128], strict=True)] for i in range(0, len(pairs), 128)]  # all at once: GBs
    context = torch.cat([encode_prompts(pipe, prompts) for prompts, *_ in parts], dim=1)  # [2, N, 77, d]
    captions = torch.cat([caption_features(clip, processor, texts) for _, texts, _ in parts]).cpu()  # [N, d]
    if args.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()  # tries it first
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            fail(f"--attention xformers does not work here: {str(error).strip().splitlines()[0]}")
    policy = Policy(unet, schedule, args.guidance_scale / 1.5,
                    torch.autocast(device, dtype, enabled=args.precision != "fp32"),
                    copy.deepcopy(unet).to(dtype) if benign and not args.lora_rank else None)
    torch.manual_seed(args.seed)  # for the LoRA's initial weights
    make_trainable(unet, args.lora_rank)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [p for p in unet.parameters() if p.requires_grad]
    print(f"{args.attention}, {args.precision}, {sum(p.numel() for p in trained):,} trained parameters")
    optimizer = (AdamW8bit if args.optimizer_8bit else torch.optim.AdamW)(trained)
    optimizer.param_groups[0] |= dict(rate=args.learning_rate, loss_scale=LOSS_SCALE)
    return Run(args, settings, policy, pipe.vae, context, captions, eliciting, benign,
               (clip.to("cpu"), processor), load_nudenet(), optimizer, ThreadPoolExecutor(1))


def write_atomically(path: Path, write):
    """write(temporary path), then rename it: whenever it is read, it is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except Exception as error:  # a full disk has another name in every library
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}. What was saved before is intact, and can be resumed", code=1)


def save(run: Run, metrics: list[dict], out: Path):
    """checkpoint.pt, all that decides the steps to come, and the weights that stock diffusers loads."""
    unet, path = run.policy.unet, out / "checkpoint.pt"
    state = dict(settings=run.settings, metrics=metrics, optimizer=run.optimizer.state_dict(),
                 weights={k: p.detach() for k, p in unet.named_parameters() if p.requires_grad})
    if path.exists():
        path.replace(out / "checkpoint-before.pt")
    write_atomically(path, lambda p: torch.save(state, p))
    if run.args.lora_rank:
        lora = {f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
        files = dict(pytorch_lora_weights=lora, kohya_lora=convert_state_dict_to_kohya(lora))  # for web UIs
    else:
        files = {"unet/diffusion_pytorch_model": unet.state_dict()}
        (out / "unet").mkdir(exist_ok=True)
        write_atomically(out / "unet/config.json", unet.to_json_file)
    for name, w in files.items():
        write_atomically(out / f"{name}.safetensors", lambda p, w=w: p.write_bytes(safetensors.torch.save(w)))


def draw(run: Run, metrics: list[dict], out: Path):
    """samples.png: up to twelve prompts before training and, in a row below, after it; and curves.png."""
    shown = list(range(0, n := len(run.settings["prompts"]), math.ceil(n / 12)))
    gens = [generator(run.args.seed, "sample", i) for i in shown]
    images = rollout(run, run.context[:, shown], torch.ones(len(shown), dtype=bool), gens).images
    if not (run.args.show_uncensored or Path(run.args.model).resolve() == HERE / "tests/tiny"):
        for i in np.flatnonzero(nudity_scores(run.nudenet, images, NUDITY) > 0.2):  # early, to be sure
            tiles = cv2.resize(images[i], (8, 8), interpolation=cv2.INTER_AREA)
            images[i] = cv2.resize(tiles, images[i].shape[1::-1], interpolation=cv2.INTER_NEAREST)
    row, path = np.concatenate(images, axis=1), out / "samples.png"  # [H, n * W, 3]
    above = [np.asarray(Image.open(path))[:len(row)]] if path.exists() else []
    sheet, figure = Image.fromarray(np.concatenate([*above, row])), Figure((12, 8))
    write_atomically(path, lambda p: sheet.save(p, format="PNG"))
    for chart, name in zip(figure.subplots(2, 3).flat, (*SHOWN, "drift", "grad_norm"), strict=True):
        chart.plot([m.get(name, math.nan) for m in metrics])  # a gap is a skipped step
        chart.set_title(name)
    write_atomically(out / "curves.png", lambda p: figure.savefig(p, format="png"))


def open_run(args: Args, settings: dict, out: Path) -> dict | None:
    """The newest whole checkpoint, or None for a new run. Refuses a folder in use and a resume of another."""
    if not args.resume:
        if out.exists() and (not out.is_dir() or any(p.name[0] != "." for p in out.iterdir())):
            fail(f"output folder {out} is in use: add --resume to go on, or name another with --out")
        return None
    paths = [p for p in (out / "checkpoint.pt", out / "checkpoint-before.pt") if p.exists()]
    for i, path in enumerate(paths):
        try:
            if bad := zipfile.ZipFile(path).testzip():  # a flipped bit, which torch.load does not notice
                raise ValueError(f"wrong checksum of {bad}")
            then = (state := torch.load(path, map_location="cpu", weights_only=True))["settings"]
        except Exception as error:  # whatever zipfile and torch make of damaged bytes, or of a failing disk
            print(f"checkpoint {path} is damaged ({error!r}): looking for the one before it")
            continue
        free = "steps resume out save_every micro_batch show_uncensored model clip_model".split()  # see train
        if changed := [k + f" was {str(then.get(k))[:60]}, is {str(v)[:60]}" * (k != "prompts")
                       for k, v in settings.items() if k not in free and v != then.get(k)
                       or k == "steps" and v < len(state["metrics"])]:
            fail(f"--resume with other arguments than before (None: another version's): {', '.join(changed)}")
        return state | dict(damaged=paths[:i])
    fail(f"--resume: {out} holds no run")


def what_to_tell(metrics: list[dict]) -> str:
    """That there is nothing to learn from or, every 20 steps, that the signal taught nothing; else empty."""
    last = [m for m in metrics[-20:] if "skipped" not in m]
    reward, signal, agreement, share, rate = (np.array([m.get(k, math.nan) for m in last]) for k in (
        "reward", "signal", "gradient_agreement", "kl_share", "nudity_rate"))  # [n] each
    if len(metrics) == 1 == len(last) and (rate[0] == 0 or rate[0] == 1 and signal[0] < 0.3):
        return (f"nothing to learn from: {'every' if rate[0] else 'no'} picture of the first rollout shows "
                "what --labels name; other --prompts, --labels or --model?")
    learned = len(last) < 20 or reward[10:].mean() > reward[:10].mean() + 0.01
    return "" if len(metrics) % 20 or learned or signal.mean() < 0.3 else (
        f"20 steps with signal {signal.mean():.2f} did not raise the reward: gradient_agreement "
        f"{agreement.mean():.2f} (more --prompts-per-step?), kl_share {share.mean():.2f} (less --kl-weight?)")


def go_on(run: Run, metrics: list[dict], out: Path):
    """The steps that are missing, each logged and saved."""
    bar = tqdm(range(len(metrics), run.args.steps), initial=len(metrics), total=run.args.steps, unit="step")
    for step in bar:
        try:
            line = policy_gradient_step(run, step)
            bar.set_postfix({k: f"{line[k]:.3g}" for k in SHOWN})
        except FloatingPointError as error:
            line = dict(step=step, skipped=str(error))
            bar.write(f"step {step} skipped: {error}")
        metrics.append({k: v for k, v in line.items() if v == v})  # NaN, of no safe picture, is not JSON
        if told := what_to_tell(metrics):
            bar.write(told)
        text = "".join(json.dumps(m) + "\n" for m in metrics)
        write_atomically(out / "metrics.jsonl", lambda p, text=text: p.write_text(text))
        if len(metrics) > 2 and all("skipped" in m for m in metrics[-3:]):
            fail(f"three steps in a row were not finite: {out} holds the weights saved before. Start anew, "
                 f"with --precision bf16 or fp32", code=1)
        if step + 1 == run.args.steps or (step + 1) % run.args.save_every == 0 and "skipped" not in line:
            save(run, metrics, out)


def train(args: Args):
    """The whole run, or what is left of it."""
    check(args)
    pairs, out = read_prompts(args.prompts, args.prompt_column, args.caption_column), Path(args.out)
    settings = dataclasses.asdict(args) | {"prompts": pairs, "method": 4}  # 4: nothing goes on in other units
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = sum(not e for *_, e in pairs) if args.kl_weight and args.held_per_step else 0
    why = "given" if "--model" in str(sys.argv) else f"the default on {device}"
    print(f"model {args.model} ({why}), suppressing {', '.join(args.labels)}: {sum(e for *_, e in pairs)} "
          f"eliciting prompts, {held or 'no'} benign ones to hold")
    try:
        state, run = open_run(args, settings, out), set_up(args, settings, device)
        if state and state["settings"].get("weights") != settings["weights"]:  # not paths: a folder may move
            fail("--resume with another --model, --clip-model or device than the run was started with")
        out.mkdir(parents=True, exist_ok=True)  # only now: what could not be loaded leaves nothing behind
        with filelock.FileLock(out / ".lock", blocking=False):
            if state:
                run.policy.unet.load_state_dict(run.policy.unet.state_dict() | state["weights"])
                run.optimizer.load_state_dict(state["optimizer"])
                for path in state["damaged"]:
                    path.replace(path.with_suffix(".damaged"))  # or it would push out the good one
            metrics, state = state["metrics"] if state else [], None
            save(run, metrics, out)  # early, should the disk be full; and what to go back to
            write_atomically(out / "args.json", lambda p: p.write_text(json.dumps(settings, indent=2)))
            if not metrics:
                draw(run, metrics, out)
            go_on(run, metrics, out)
            draw(run, metrics, out)
    except OSError as error:  # filelock's, too
        fail(f"cannot write to {out}: {error} (another run at work there?); what was saved is intact")
    except KeyboardInterrupt:  # at whatever byte, as SIGTERM and kill -9
        fail("stopped; where a checkpoint is saved, the same command with --resume goes on", code=130)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        fail(f"{str(error).splitlines()[0]}: try --precision bf16 or a LoRA, in another --out, or for memory "
             f"--resume --micro-batch {max(args.micro_batch // 2, 1)}, where a checkpoint is saved", code=1)
    print(f"done: {out} holds {', '.join(sorted(p.name for p in out.iterdir() if p.name[0] != '.'))}")


if __name__ == "__main__":
    train(parse_args())
