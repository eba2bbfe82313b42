"""What the trained rivals share: the command line, loading, the optimizer, saving.

Each has Args (Stable Diffusion's defaults), TINY (the embedded model's) and train(args), which saves at last.
"""
import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
import tyro
from safetensors.torch import save as serialise
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import shielddiff as sd  # noqa: E402 (before diffusers and peft, whose imports it keeps silent)

WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclasses.dataclass
class Args:
    model: str = sd.Args.model  # folder or hub id of an SD 1.x / 2.x pipeline
    out: str = ""  # output folder; empty: runs/<method>-<model>


@dataclasses.dataclass
class TrainingArgs(Args):
    steps: int = 1000  # optimizer updates
    learning_rate: float = 1e-5
    batch_size: int = 1
    denoise_steps: int = 50  # DDIM steps of the pictures that it trains on
    seed: int = 0


TINY = {"model": sd.TINY["model"]}  # of the embedded model, where they differ
TINY_TRAINING = TINY | dict(batch_size=8, denoise_steps=20)


def run(train, kind: type, tiny: dict, argv=None):
    """train(args) with the command line over the defaults of the model it names, and one line for errors."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--model")
    model = which.parse_known_args(argv)[0].model
    embedded = Path(model).resolve() == sd.HERE / "tests/tiny" if model else not torch.cuda.is_available()
    args = tyro.cli(kind, args=argv, default=kind(**tiny) if embedded else kind())
    args.out = args.out or f"runs/{Path(sys.argv[0]).stem}-{Path(args.model).resolve().name}"
    try:
        train(args)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        sd.fail(f"{str(error).splitlines()[0]}: nothing is saved; try a lower --learning-rate, or for memory "
                "a smaller --batch-size", code=1)
    except KeyboardInterrupt:
        sd.fail("stopped: nothing is saved before the end", code=130)


def start(args: Args):
    """The pipeline, frozen, in fp32, with shielddiff's sampler, and the time. Refuses what cannot end."""
    for name, value in vars(args).items():
        lowest = 1 if name in ("batch_size", "denoise_steps", "pictures", "rank", "until") else 0
        highest = 1000 if name == "denoise_steps" else 2**63 - 1  # of SD's timesteps
        if value == () or type(value) in (int, float) and not lowest <= value <= highest:
            sd.fail(f"--{name.replace('_', '-')} cannot be {value}")
    if there := [file for file in WEIGHTS if Path(args.out, file).exists()]:
        sd.fail(f"output folder {args.out} holds {there[0]}: name another with --out")
    if hasattr(args, "prompts"):  # which is read again, later: so that a bad one leaves no folder behind
        sd.read_prompts(args.prompts)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)  # or hours of training could not be saved
    except OSError as error:
        sd.fail(f"cannot write to {args.out}: {error}")
    pipe = sd.load_pipeline(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.scheduler = sd.ddim_scheduler(pipe.scheduler.config)
    if torch.cuda.is_available():  # a third more time, several times less memory, as in shielddiff.py
        pipe.unet.enable_gradient_checkpointing()
    torch.backends.cudnn.enabled = False  # as in shielddiff.py: in fp32 it takes tens of GB of GPU memory
    return pipe, time.perf_counter()


def encode(pipe, texts: list[str], batch: int) -> torch.Tensor:
    """[N, batch, 77, d]: the text states of each of N texts, for a batch of pictures."""
    return sd.encode_prompts(pipe, texts)[1].to(pipe.device)[:, None].expand(-1, batch, -1, -1)


def steps(args: TrainingArgs, method: str):
    """(step, its random generator) of each of args.steps, with a progress bar."""
    for step in tqdm(range(args.steps), unit="step", dynamic_ncols=True):
        yield step, sd.generator(args.seed, method, step)


def descend(optimizer, loss: torch.Tensor, clip=float("inf")):
    """An update, its gradient clipped to a norm. FloatingPointError before a NaN reaches the weights."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    sd.finite(torch.stack([loss.detach(), norm]), "the loss or its gradient")
    optimizer.step()


def train_only(unet, named) -> list[torch.nn.Parameter]:
    """Free the weights of whose names named(name) is true, and these only."""
    for name, weight in unet.named_parameters():
        weight.requires_grad_(named(name))
    return [weight for weight in unet.parameters() if weight.requires_grad]


def save(args: Args, unet, started: float, lora=False):
    """OUT/training.json (arguments and seconds) and the weights, which stock diffusers loads."""
    out = Path(args.out)
    (out if lora else out / "unet").mkdir(parents=True, exist_ok=True)
    facts = json.dumps(dataclasses.asdict(args) | {"seconds": time.perf_counter() - started}, indent=2)
    sd.write_atomically(out / "training.json", lambda p: p.write_text(facts))
    weights = sd.get_peft_model_state_dict(unet) if lora else unet.state_dict()
    if not lora:
        sd.write_atomically(out / "unet/config.json", unet.to_json_file)
    tensors = {"unet." * lora + k: v.contiguous().cpu() for k, v in weights.items()}
    sd.write_atomically(out / WEIGHTS[lora], lambda p: p.write_bytes(serialise(tensors, {"format": "pt"})))
    print(f"done: {out / WEIGHTS[lora]}")
