"""One real run and its portraits, shared by every test that looks at what a run leaves behind."""
import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: tests do not wait for a network
# for test_cuda.py; by a name of its own, as the suite's other processes inherit the list emptied below
GPUS = os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is: the tests' numbers are a CPU's, wherever they run
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # of several processes each has its share
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(workers)))

import shielddiff as sd  # noqa: E402 (before torch, which reads once how threads wait)

# isort: split
import torch  # noqa: E402
from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: E402
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput  # noqa: E402


def remembered(load, copied=lambda found: found):
    """load, but once for a folder, as long as its files stay as they are: what was loaded is copied."""
    @functools.lru_cache(maxsize=8)
    def loaded(files, arguments, options):
        with torch.random.fork_rng(devices=[]):
            return load(*arguments, **dict(options))

    def load_or_copy(*arguments, **options):
        if torch.cuda.is_available() or not Path(arguments[0]).is_dir():  # test_cuda.py pretends that it is
            return load(*arguments, **options)
        stats = [(path, path.stat()) for path in sorted(Path(arguments[0]).rglob("*")) if path.is_file()]
        files = tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)
        return copied(loaded(files, arguments, tuple(sorted(options.items()))))
    return load_or_copy


def copied(pipe):
    """A pipeline's copy, its tokenizer the same: transformers' copy of that would decode otherwise."""
    return copy.deepcopy(pipe, {id(pipe.tokenizer): pipe.tokenizer})


sd.load_pipeline = remembered(sd.load_pipeline, copied)
sd.load_clip, sd.load_nudenet = remembered(sd.load_clip), functools.cache(sd.load_nudenet)


def pytest_collection_modifyitems(items):
    """First what needs the main job: later a process would wait for the other to end it."""
    items.sort(key=lambda item: "run" not in getattr(item, "fixturenames", ()))


def cli(*arguments, script="shielddiff.py", timeout=1800):
    """The real command line, as a user types it."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=timeout)


SMALL = ("--model", "tests/tiny", "--prompts", "tests/tiny/prompts_few.txt", "--denoise-steps", 3,
         "--train-timesteps", 2, "--prompts-per-step", 1, "--group-size", 2, "--held-per-step", 2,
         "--micro-batch", 2, "--updates-per-step", 2)


def train(*arguments):
    """The command line without the ten seconds that a new process takes to import everything, and without
    drawing curves.png."""
    with mock.patch.object(sd.Figure, "savefig", lambda self, path, **_: path.touch()):
        sd.train(sd.parse_args(list(map(str, arguments))))


def a_run(pipe, prompts=("an astronaut",), rank=4, optimizer=None, **changes):
    """What sd.set_up makes of a pipeline and prompts, without a reward: its LoRA is still zero."""
    args = sd.Args(**sd.TINY | dict(denoise_steps=5, guidance_scale=3.0, lora_rank=rank)
                   | changes)
    policy = sd.Policy(pipe.unet, sd.noise_schedule(pipe.scheduler.config, args.denoise_steps),
                       args.guidance_scale, contextlib.nullcontext())
    sd.make_trainable(pipe.unet, rank)
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    context = sd.encode_prompts(pipe, prompts)
    optimizer = (optimizer or torch.optim.SGD)(trained, lr=0.0)
    optimizer.param_groups[0] |= dict(rate=args.learning_rate, loss_scale=sd.LOSS_SCALE)
    return sd.Run(args, {}, policy, pipe.vae, context, None, [], [], None, None, optimizer, None)


@functools.cache
def stock(kind=StableDiffusionPipeline):
    return kind.from_pretrained(ROOT / "tests/tiny", dtype=torch.float32)


def stock_pipeline(lora=None, name=None):
    """The embedded model as a user of diffusers has it, frozen, with a LoRA or without."""
    pipe = copied(stock())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    if lora:
        pipe.load_lora_weights(lora, adapter_name=name)
    return pipe


@contextlib.contextmanager
def predicting_v(pipe):
    """Within it the same model, but that its U-Net gives v for the noise that it predicts."""
    scheduler, own = pipe.scheduler, pipe.unet.forward

    def forward(sample, timestep, *args, return_dict=True, **keywords):
        noise = own(sample, timestep, *args, return_dict=False, **keywords)[0]
        alpha = scheduler.alphas_cumprod[torch.as_tensor(timestep).reshape(-1)].view(-1, 1, 1, 1)
        clean = (sample - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return UNet2DConditionOutput(v) if return_dict else (v,)

    try:
        pipe.unet.forward = forward
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction")
        yield
    finally:
        del pipe.unet.forward
        pipe.scheduler = scheduler


def draw(pipe, prompts, first_seed):
    """Pictures uint8 [B, 64, 64, 3] by stock diffusers."""
    gens = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
    with torch.inference_mode():
        out = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=gens, output_type="np")
    return (out.images * 255).round().astype(np.uint8)


def metrics(out):
    def no_json(name):
        raise AssertionError(f"{name} is not JSON")
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_json) for line in lines]


@contextlib.contextmanager
def once(tmp_path_factory, name):
    """A path for all processes of the suite: the first makes what shall lie there, the others wait."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if workers else base) / name
    with sd.filelock.FileLock(f"{path}.lock"):
        yield path


STEPS = 6  # the default 10 are 7 minutes of a slow core; the faces are all but gone by the third


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The main job: the embedded model, all flags but --steps at their defaults."""
    with once(tmp_path_factory, "main-job") as folder:
        said = folder.with_suffix(".txt")  # there once the job has ended well
        if not said.exists():
            done = cli("--steps", STEPS, "--model", "tests/tiny", "--out", folder)
            assert done.returncode == 0, done.stderr
            said.write_text(done.stdout)
    return folder, said.read_text()


PAIRS = sd.read_prompts(str(ROOT / "tests/tiny/prompts.txt"))
ELICITING = [prompt for prompt, _, elicits in PAIRS if elicits] * 2


@pytest.fixture(scope="session")
def portraits(run, tmp_path_factory):
    """32 of the base model and, by the same prompts and seeds, of the trained one."""
    with once(tmp_path_factory, "portraits.npz") as path:
        if not path.exists():
            np.savez(path, **{name: draw(stock_pipeline(lora), ELICITING, 1_000_000)
                              for name, lora in (("base", None), ("tuned", run[0]))})
    return dict(np.load(path))


def face_rate(images):
    """The share of pictures in which the training score sees a face."""
    return (sd.nudity_scores(sd.load_nudenet(), images, sd.TINY["labels"]) > sd.FIRES).float().mean().item()


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pipe():
    return sd.load_pipeline(str(ROOT / "tests/tiny"))
