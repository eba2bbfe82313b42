"""Speed, memory and time to target, side by side in one process. Prints tables and writes bench.json.

    python tests/bench.py                                  # the embedded model, on whatever device there is
    python tests/bench.py --sections speed --model sd15    # an SD-1.5-sized model of random weights (CUDA)
    python tests/bench.py --sections target                # ours against a faithful DDPO: an hour on a CPU
    python tests/bench.py --sections memory cost           # SD 1.5 at 512 px on paper: no GPU, no download
    python tests/bench.py --sections coverage              # how often eval.py's intervals hold the truth
    python tests/bench.py --sections size                  # eval.py's results of 30,000 prompts, alone
    python tests/bench.py --sections sd15 --model DIR      # only write that random pipeline to DIR
"""
import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import transformers
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from nudenet import NudeDetector
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_benchmark  # noqa: E402
import eval_coverage  # noqa: E402
import eval_size  # noqa: E402

import eval as ev  # noqa: E402
import shielddiff as sd  # noqa: E402

CUDA = torch.cuda.is_available()
UNET_15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # else diffusers' defaults
VAE_15 = dict(sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
              down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
CLIP_15 = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
               patch_size=14)  # ViT-L/14, the reward's


@dataclass
class Bench:
    """What to measure."""

    sections: tuple[Literal["speed", "growth", "target", "memory", "cost", "coverage", "size",
                            "sd15"], ...] = (
        "speed", "growth", "memory", "cost")
    """sd15 writes a random SD-1.5-sized pipeline to --model and its CLIP to --model/clip"""
    model: str = "tiny"
    """tiny, sd15 (random weights, in memory) or a folder"""
    repeats: int = 3
    """the table holds medians of this many, interleaved"""
    out: str = "bench.json"
    """results of all sections"""
    target_minutes: float = 25
    """an arm of the target section is stopped after this, or after 20 steps"""
    arms: tuple[str, ...] = ("ours", "faithful DDPO", "whole trajectory rewarded", "one update a step",
                             "20 denoising steps", "no KL")
    """of the target section"""


# ------------------------------------------------------------------------------------ models
def tiny_args(**changes) -> sd.Args:
    return sd.Args(**sd.TINY | changes)


def sd15(dtype) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's shapes with random weights and the embedded model's tokenizer."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "tests/tiny/tokenizer")
    text = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                       num_attention_heads=12, eos_token_id=tokenizer.eos_token_id,
                                       vocab_size=len(tokenizer))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    with torch.device("cuda" if CUDA else "cpu"):  # where random numbers come fast
        parts = AutoencoderKL(**VAE_15), transformers.CLIPTextModel(text), UNet2DConditionModel(**UNET_15)
    pipe = StableDiffusionPipeline(parts[0], parts[1], tokenizer, parts[2], scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.vae.enable_slicing()
    return pipe.to("cuda" if CUDA else "cpu", dtype)


def write_sd15(folder: str):
    """The random pipeline and a CLIP ViT-L/14 of random weights, for the real command line."""
    sd15(torch.float16).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "tests/tiny/tokenizer")
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=768,
        text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                         num_hidden_layers=12, eos_token_id=tokenizer.eos_token_id,
                         vocab_size=len(tokenizer)),
        vision_config=CLIP_15))
    clip.half().save_pretrained(Path(folder) / "clip")
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer).save_pretrained(
        Path(folder) / "clip")


# ------------------------------------------------------------------------------------ speed
def load_run(model: str, args: sd.Args, prompts: list[str], pixels: int | None = None) -> sd.Run:
    """What sd.set_up makes of a model and its files: without the reward, whose place random numbers take."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.enabled = args.precision != "fp32"
    dtype, device = getattr(torch, dict(fp32="float32", bf16="bfloat16", fp16="float16")[args.precision]), \
        "cuda" if CUDA else "cpu"
    pipe = sd15(dtype) if model == "sd15" else sd.load_pipeline(
        str(ROOT / "tests/tiny") if model == "tiny" else model, dtype, device)
    if pixels:
        pipe.unet.register_to_config(sample_size=pixels // pipe.vae_scale_factor)
    policy = sd.Policy(pipe.unet, sd.noise_schedule(pipe.scheduler.config, args.denoise_steps),
                       args.guidance_scale / 1.5, torch.autocast(device, dtype, args.precision != "fp32"))
    context = sd.encode_prompts(pipe, prompts)
    pipe.text_encoder = None
    if not args.lora_rank:
        pipe.unet.float()
    if args.attention == "xformers":
        pipe.unet.enable_xformers_memory_efficient_attention()
    sd.make_trainable(pipe.unet, args.lora_rank)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    adamw = sd.AdamW8bit if args.optimizer_8bit else torch.optim.AdamW
    optimizer = adamw([p for p in pipe.unet.parameters() if p.requires_grad], lr=1e-6)
    optimizer.param_groups[0] |= dict(rate=1e-6, loss_scale=sd.LOSS_SCALE)
    return sd.Run(args, {}, policy, pipe.vae, context, None, [], [], None, None, optimizer, None)


def draw_all(run: sd.Run, generators) -> sd.Rollout:
    """A rollout of all prompts of the run, none judged."""
    return sd.rollout(run, run.context, torch.ones(run.context.shape[1], dtype=torch.bool), generators)


def step(run: sd.Run) -> dict:
    """One rollout and its updates: seconds a picture, and peak memory."""
    args, n = run.args, run.context.shape[1]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    roll = draw_all(run, [sd.generator("bench", i) for i in range(n)])
    middle = clock()
    held = torch.arange(n) >= args.prompts_per_step * args.group_size
    k = args.train_timesteps or sd.trainable(args)
    steps = torch.stack([torch.randperm(sd.trainable(args))[:k] for _ in range(n)])  # [n, k]
    roll = roll._replace(held=held, advantage=torch.randn(n) * ~held, steps=steps)
    learned = sd.sized_update(run, roll, signal=1.0)
    end = clock()
    return dict(rollout=(middle - start) / n, update=(end - middle) / n, ratio=learned["ratio_max_dev"],
                peak_gb=torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0)


def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(variants: dict[str, dict], model: str, base: sd.Args, repeats: int) -> list[dict]:
    """Medians of every variant, interleaved on the CPU; one after the other on a GPU, where memory counts.
    rollout and update are seconds a picture; peak_gb on a CPU is that of tensors, the weights aside."""
    rows = []
    for name, changes in variants.items():
        try:
            changes, pixels = dict(changes), changes.get("pixels")
            changes.pop("pixels", None)
            args = dataclasses.replace(base, **changes)
            pictures = args.prompts_per_step * args.group_size + (args.held_per_step if args.kl_weight else 0)
            run = load_run(model, args, ["an astronaut"] * pictures, pixels)
            with contextlib.nullcontext() if CUDA else Allocated(run.policy.unet) as tracker:
                step(run)  # warm-up
            rows.append(dict(name=name, run=run, runs=[], peak_gb=0 if CUDA else tracker.peak / 2**30))
            if CUDA:
                rows[-1]["runs"] = [step(run) for _ in range(repeats)]
                del rows[-1]["run"], run
                torch.cuda.empty_cache()
        except (torch.OutOfMemoryError, ImportError, RuntimeError, SystemExit, ValueError) as error:
            rows.append(dict(name=name, runs=[], error=str(error).splitlines()[0][:80]))
    for _ in range(0 if CUDA else repeats):
        for row in rows:
            if "run" in row:
                row["runs"].append(step(row["run"]))
    table = []
    for row in rows:
        row.pop("run", None)
        median = {k: statistics.median(r[k] for r in row["runs"]) for k in ("rollout", "update", "ratio")} \
            if row["runs"] else {}
        if CUDA:
            row["peak_gb"] = max((r["peak_gb"] for r in row["runs"]), default=None)
        table.append({k: v for k, v in row.items() if k != "runs"} | median)
    return table


def speed(bench: Bench) -> list[dict]:
    tiny = bench.model == "tiny"
    base = tiny_args(prompts_per_step=2, held_per_step=16) if tiny else sd.Args(
        prompts_per_step=1, held_per_step=8, denoise_steps=10)
    variants = {"defaults": {}, "no KL": dict(kl_weight=0.0), "AdamW, 32 bits": dict(optimizer_8bit=False)}
    if tiny:
        variants |= {"gradient checkpointing": dict(gradient_checkpointing=True),
                     "bf16": dict(precision="bf16"), "micro-batch 8": dict(micro_batch=8)}
    else:
        variants |= {"xformers": dict(attention="xformers"), "no checkpointing": dict(
            gradient_checkpointing=False), "bf16": dict(precision="bf16"), "fp32": dict(precision="fp32"),
            "whole U-Net": dict(lora_rank=0, kl_weight=0.0)}
        variants |= {f"micro-batch {b}": dict(micro_batch=b) for b in (1, 2, 8)}
    return compare(variants, bench.model, base, bench.repeats)


def growth(bench: Bench) -> list[dict]:
    """Seconds a picture and memory against pictures a step, denoising steps and size. The peak must not grow
    with the pictures but for their trajectories, which wait on the host."""
    tiny = bench.model == "tiny"
    base = tiny_args(prompts_per_step=2, held_per_step=0) if tiny else sd.Args(
        prompts_per_step=1, held_per_step=0, train_timesteps=2, updates_per_step=2)  # minutes on a large GPU
    variants = {f"{p * 8} pictures": dict(prompts_per_step=p) for p in (2, 4, 8)}
    variants |= {f"{t} denoising steps": dict(denoise_steps=t) for t in (8, 16, 32)}
    variants |= {f"{p} px": dict(pixels=p) for p in ((64, 96, 128) if tiny else (256, 512, 768))}
    return compare(variants, bench.model, base, bench.repeats)


# ------------------------------------------------------------------------------------ memory on paper
class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still alive, and their largest sum. Not counted
    are those of a module, which an operation may return as a view."""

    def __init__(self, module):
        super().__init__()
        self.alive = self.peak = 0
        self.module = [p.untyped_storage() for p in module.parameters()]
        self.known = set(map(id, self.module))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.alive -= size


def on_paper(lora_rank=16, precision="fp16", checkpointing=True, micro_batch=4, bits8=True,
             pixels=512) -> dict:
    """GiB of tensors that SD 1.5 needs: FakeTensorMode runs the real modules without their numbers.

    The total is what stays (weights of U-Net and VAE, Adam's state, the whole U-Net's frozen copy) and the
    largest of what comes and goes: a U-Net call of the rollout, the decoding of a picture, CLIP ViT-L/14's
    vision tower (fp16) on 16 pictures, gradients, forward and backward pass of a micro-batch, Adam's step, or
    the fp32 measure of the step.
    The CUDA context, kernels' workspaces and the allocator's waste are not in it.
    """
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[precision]
    functions = torch.nn.functional
    in_fp32 = {name: mock.patch.object(functions, name, as_on_cuda(getattr(functions, name)))
               for name in ("group_norm", "layer_norm", "interpolate")}
    with FakeTensorMode(), mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module), \
            in_fp32["group_norm"], in_fp32["layer_norm"], in_fp32["interpolate"]:
        torch.set_default_dtype(dtype)  # fake modules cannot be converted: each is made in its own dtype
        vae = AutoencoderKL(**VAE_15).requires_grad_(False)
        torch.set_default_dtype(dtype if lora_rank else torch.float32)
        unet = UNet2DConditionModel(**UNET_15).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        sd.make_trainable(unet, lora_rank)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        trained = [p for p in unet.parameters() if p.requires_grad]
        n, b = sum(p.numel() for p in trained), 2 * micro_batch  # guidance doubles the batch
        x, t, context = torch.randn(b, 4, pixels // 8, pixels // 8), torch.ones(b), torch.randn(b, 77, 768)
        autocast = torch.autocast("cpu", dtype, enabled=precision != "fp32")
        peaks = {}
        with torch.no_grad(), autocast, Allocated(unet) as tracker:
            unet(x, t, context)
        peaks["rollout"] = tracker.peak
        with torch.no_grad(), Allocated(vae) as tracker:
            vae.decode(torch.randn(1, 4, pixels // 8, pixels // 8, dtype=dtype))
        peaks["decode"] = tracker.peak
        torch.set_default_dtype(torch.float16)
        clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_15))
        torch.set_default_dtype(torch.float32)
        with torch.no_grad(), Allocated(clip) as tracker:
            clip(torch.randn(16, 3, 224, 224, dtype=torch.float16))
        peaks["reward"] = tracker.peak + bytes_of(clip.parameters())
        with Allocated(unet) as tracker:
            for p in trained:
                p.grad = torch.zeros_like(p)
            with autocast:
                output = unet(x, t, context).sample.float()
                with torch.no_grad():
                    unet(x, t, context)  # the KL's frozen prediction
            output.square().mean().backward()
        peaks["update"] = tracker.peak
        largest = max(p.numel() for p in trained)  # AdamW's square roots
        peaks["step"] = bytes_of(trained) + (4 * largest if bits8 else 4 * n)
        exact = UNet2DConditionModel(**UNET_15).requires_grad_(False)  # fp32: how far a step has moved
        with torch.no_grad(), Allocated(exact) as tracker:
            exact(x, t, context)
        peaks["measure"] = tracker.peak + bytes_of(exact.parameters()) - bytes_of(unet.parameters())
    held = dict(unet=bytes_of(unet.parameters()), vae=bytes_of(vae.parameters()),
                adam=n * (2 if bits8 else 8), frozen=0 if lora_rank else n * dtype.itemsize)
    gib = {k: v / 2**30 for k, v in (held | peaks).items()}
    return dict(trains="LoRA" if lora_rank else "U-Net", precision=precision, checkpointing=checkpointing,
                bits8=bits8, micro_batch=micro_batch, pixels=pixels, **gib,
                total=(sum(held.values()) + max(peaks.values())) / 2**30)


def as_on_cuda(function):
    """CUDA's autocast has the norms and the upsampling in fp32, the CPU's does not."""
    def wrapped(*arguments, **keywords):
        if torch.is_autocast_enabled("cpu"):
            arguments = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
            keywords = {k: a.float() if isinstance(a, torch.Tensor) else a for k, a in keywords.items()}
        return function(*arguments, **keywords)
    return wrapped


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def memory(bench: Bench) -> list[dict]:
    return [on_paper(*v) for v in ((16, "fp16", True, 1), (16, "fp16", True, 4), (16, "fp16", False, 1),
                                   (16, "fp16", False, 4), (16, "fp32", True, 1), (16, "fp32", True, 4),
                                   (0, "fp16", True, 1), (0, "fp16", True, 4), (0, "fp16", True, 1, False),
                                   (16, "fp16", True, 4, True, 256), (16, "fp16", True, 4, True, 768))]


def cost(bench: Bench) -> list[dict]:
    """TFLOP of the default run on SD 1.5 at 512 px, counted with fake tensors, and hours at a given rate;
    and of eval.py --benchmark after it."""
    args = sd.Args()

    def tflop(function) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 1e12

    # fake modules cannot be converted, and need not be
    with FakeTensorMode(), mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
        unet = UNet2DConditionModel(**UNET_15).requires_grad_(False)
        sd.make_trainable(unet, args.lora_rank)
        unet.enable_gradient_checkpointing()
        x, t, context = torch.randn(2, 4, 64, 64), torch.ones(2), torch.randn(2, 77, 768)  # 2: guidance
        with torch.no_grad():
            sample = tflop(lambda: unet(x, t, context))
            decode = tflop(lambda: AutoencoderKL(**VAE_15).decode(torch.randn(1, 4, 64, 64)))
        learn = tflop(lambda: unet(x, t, context).sample.square().mean().backward())
    rewarded, held = args.prompts_per_step * args.group_size, args.held_per_step
    k = args.train_timesteps or sd.trainable(args)
    step = dict(rollout=(rewarded + held) * args.denoise_steps * sample, decode=(rewarded + held) * decode,
                update=k * ((rewarded + held) * learn + held * sample))
    step["measure"] = 3 * rewarded / 2 * sample  # twice, and once more where the step was too long or short
    step["run"] = args.steps * sum(step.values())
    return [dict(call=sample, call_and_gradient=learn) | with_hours(step)] + [
        with_hours(dict(what=name, run=total)) for name, total in benchmark_parts(sample).items()]


def with_hours(row: dict) -> dict:
    return row | {f"hours at {rate} TFLOP/s": row["run"] / rate / 3600 for rate in (20, 50, 200)}


def benchmark_parts(call: float) -> dict[str, float]:
    """{part: TFLOP of the U-Net in it} of eval.py --benchmark on SD 1.5, where a guided call costs `call`;
    the rivals' training aside, and what some methods draw more than once and hooks run of earlier steps."""
    args, methods = ev.Args(), set(ev.METHODS) - set(eval_benchmark.LEFT_OUT)
    blind = {"pno", "crops", "latent-guard", "latent-mixing", "latent-mixing-guided"}
    systems = 2 + len(eval_benchmark.RIVALS) + len(methods)  # base and ours
    prompts = sum(len(sd.read_prompts(path)) for path in (*args.prompts, sd.Args.prompts))
    pictures = prompts + args.attack_prompts + 4 * args.attack_sources  # one list, and four of each system
    gradient, attacked = call, systems - len(blind)  # one picture, forward and back to the text alone
    tried = 50 * 40 * gradient + 51 * 4 * args.steps * call  # 50 timesteps, each with pictures after it
    return {"benchmark, pictures": systems * pictures * args.seeds * args.steps * call,
            "benchmark, UnlearnDiffAtk at most": attacked * args.attack_sources * tried,
            "benchmark, CCE": attacked * 5000 * 16 * gradient}


# ------------------------------------------------------------------------------------ eval.py
def coverage(bench: Bench) -> list[dict]:
    """How often each 95 % interval that eval.py prints holds the truth, on 2000 simulated evaluations."""
    return eval_coverage.table()


def size(bench: Bench) -> list[dict]:
    """Seconds and peak memory of eval.py's results at 30,000 prompts, 4 seeds, 2 systems."""
    return eval_size.table()


# ------------------------------------------------------------------------------------ time to target
def faithful_ddpo():
    """The reference implementations' reward and advantages: a thresholded detection, summed unstandardised
    with CLIP, normalised by running statistics of each prompt (buffer 32, from 16 on; else the batch's)."""
    detector, seen = NudeDetector(), {}
    current = []

    def detected(session, images, labels):
        return torch.tensor([max([d["score"] for d in detector.detect(np.ascontiguousarray(i))
                                  if d["class"] in labels], default=0.0) for i in images])

    def prompts_of_step(prompts, how_many, seed, step, original=sd.prompts_of_step):
        chosen = original(prompts, how_many, seed, step)
        current[:] = chosen or current  # the benign ones, of which it has none, are asked for last
        return chosen

    def advantages(clip_scores, nudity, clip_weight, nudity_weight, clamp=5.0, floor=1.0):
        if floor > 1:  # asked for the signal, which it does not use
            return torch.ones(1, 1)  # [P, K]
        rewards = clip_weight * clip_scores - nudity_weight * nudity  # [P, K]
        result = torch.empty_like(rewards)
        for i, prompt in enumerate(current):
            buffer = seen[prompt] = (seen.get(prompt, []) + rewards[i].tolist())[-32:]
            known = torch.tensor(buffer) if len(buffer) >= 16 else rewards.flatten()
            result[i] = (rewards[i] - known.mean()) / (known.std() + 1e-8)
        return result.clamp(-clamp, clamp)

    def constant_rate(run, roll, signal):
        run.optimizer.param_groups[0]["lr"] = run.args.learning_rate
        return sd.update(run, roll) | dict(signal=signal)

    return dict(nudity_scores=detected, prompts_of_step=prompts_of_step, group_advantages=advantages,
                sized_update=constant_rate)


ARMS = {  # flags over the embedded model's defaults
    "ours": {},
    # its published configuration makes 4 updates a rollout, each of a quarter of the pictures; here each is
    # of a quarter of the steps
    "faithful DDPO": dict(denoise_steps=50, train_timesteps=49, train_until=1.0, updates_per_step=4,
                          clip_range=1e-4 * 1024, learning_rate=5e-3, kl_weight=0.0, held_per_step=0,
                          prompts_per_step=6, left_out=0.0, optimizer_8bit=False),
    "whole prompts": dict(left_out=0.0),
    "whole trajectory rewarded": dict(train_until=1.0),
    "one update a step": dict(updates_per_step=1),
    "20 denoising steps": dict(denoise_steps=20),
    "no KL": dict(kl_weight=0.0)}


def target(bench: Bench) -> list[dict]:
    """Seconds of rollout, reward and update until under 10 % of held-out pictures show a face and CLIP keeps
    98 % of the base model's score, on portraits and on benign pictures."""
    table = []
    for name in bench.arms:
        folder, kept = Path("runs") / f"bench-{name.replace(' ', '-')}", []
        shutil.rmtree(folder, ignore_errors=True)
        deadline = time.time() + 60 * bench.target_minutes

        def keep(run, metrics, out, kept=kept, deadline=deadline):
            unet = run.policy.unet
            kept.append({k: v.detach().clone() for k, v in unet.named_parameters() if v.requires_grad})
            if time.time() > deadline:
                raise KeyboardInterrupt

        patches = dict(save=keep, **(faithful_ddpo() if name == "faithful DDPO" else {}))
        with contextlib.ExitStack() as stack:
            for k, v in patches.items():
                stack.enter_context(mock.patch.object(sd, k, v))
            try:
                sd.train(tiny_args(**ARMS[name], steps=20, save_every=1, out=str(folder)))
            except SystemExit as stop:
                print(f"{name}: stopped ({stop.code})")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [m for m in lines if "skipped" not in m]  # such a step is not saved either
        seconds = np.cumsum([0] + [sum(m[f"seconds_{k}"] for k in ("rollout", "reward", "update"))
                                   for m in lines])
        for step in range(0, len(lines) + 1, 2):
            table.append(dict(arm=name, step=step, seconds=float(seconds[step]), **judge(kept[step])))
            print(table[-1], flush=True)
            first = table[-1 - step // 2]
            if table[-1]["face_rate"] < 0.1 and all(table[-1][k] > 0.98 * first[k]
                                                    for k in ("clip_face", "clip_benign")):
                table[-1]["target"] = "reached"
                break
    return table


@torch.no_grad()
def judge(lora: dict) -> dict:
    """Face rate on 48 held-out pictures and CLIP against the safe captions, of weights kept by target()."""
    args = tiny_args()
    pairs = sd.read_prompts(args.prompts)
    clip, processor = sd.load_clip(args.clip_model)
    args = dataclasses.replace(args, denoise_steps=20, guidance_scale=4.5)  # eval.py's, not training's
    scores = {}
    for kind in (True, False):
        some = [p for p in pairs if p[2] == kind] * (3 if kind else 2)
        run = load_run(args.model, args, [p for p, _, _ in some])
        run.policy.unet.load_state_dict(lora, strict=False)
        images = draw_all(run, [sd.generator("held-out", kind, i) for i in range(len(some))]).images
        captions = sd.caption_features(clip, processor, [c for _, c, _ in some])
        scores[kind] = (sd.image_features(clip, processor, images) * captions).sum(1).mean().item()
        if kind:
            faces = sd.nudity_scores(sd.load_nudenet(), images, args.labels) > sd.FIRES
    return dict(face_rate=faces.float().mean().item(), clip_face=scores[True], clip_benign=scores[False])


# ------------------------------------------------------------------------------------ the command
def show(title: str, rows: list[dict]):
    print(f"\n{title} ({torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__})")
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
             for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def main(bench: Bench):
    if "sd15" in bench.sections:
        return write_sd15(bench.model)
    results = {}
    for section in bench.sections:
        results[section] = globals()[section](bench)
        show(section, results[section])
        Path(bench.out).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Bench))
