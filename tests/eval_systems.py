"""The weights of eval.py's systems: which files they are, and that all that is in them is applied. Last, the
image-to-image pipeline with which every system draws.

What a library would leave out of strangers' weights, or fill with random numbers, it says in a log at most.
Here every tensor of a LoRA's file is looked for in the model, and a U-Net is loaded strictly.
"""
import hashlib
import importlib.util
import inspect
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from eval_results import sha256
from safetensors import safe_open
from safetensors.torch import load_file, save

import shielddiff as sd
from shielddiff import fail, load_whole

STEMS = {"lora": "pytorch_lora_weights", "unet": "diffusion_pytorch_model", "text-encoder": "model"}
ENDS = ("safetensors", "safetensors.index.json", "fp16.safetensors", "safetensors.index.fp16.json")
GIVEN = dict(_class_name="UNet2DConditionModel", in_channels=4, out_channels=4, class_embed_type=None,
             num_class_embeds=None, addition_embed_type=None, time_cond_proj_dim=None, encoder_hid_dim=None,
             encoder_hid_dim_type=None, attention_type="default")  # what sampling gives a U-Net, and no more


@contextmanager
def one_line(what: str):
    """A clear line and exit code 2 for whatever the files of others raise."""
    try:
        yield
    except Exception as error:
        fail(f"cannot {what}: {' '.join(str(error).split())[:300] or repr(error)}")


# ------------------------------------------------------------------------------------ the files
def split_entry(entry: str) -> tuple[str, str]:
    """name=PATH or PATH -> name ("" for none), path; a '=' may be in the path, and in one without a name."""
    name, equals, path = entry.partition("=")
    return (name, path) if equals and not Path(entry).exists() and "/" not in name else ("", entry)


def find_weights(kind: str, path: str) -> Path:
    """The file of a system's weights (of a sharded one its index): as named, or a folder's default, or that
    of the part in a pipeline's folder. Exits where there is none, or where it is a pickle."""
    whole = Path(path)
    part = whole / kind.replace("-", "_")
    folder = part if (part / "config.json").exists() else whole
    names = [f"{STEMS[kind]}.{end}" for end in (ENDS[:1] if kind == "lora" else ENDS)]
    found = [whole] if whole.is_file() else [folder / name for name in names if (folder / name).exists()]
    for file in found or folder.glob("*.bin"):
        if file.suffix not in (".safetensors", ".json"):
            new = file.with_suffix(".safetensors") if whole.is_file() else folder / names[0]
            fail(f"--{kind} {path}: {file} can run code. To convert it: python -c \"import torch, "
                 f"safetensors.torch as s; s.save_file(torch.load('{file}', weights_only=True), '{new}', "
                 f"{{'format': 'pt'}})\"")
    if not found:
        hint = "" if whole.is_dir() else " (what lies on a hub has to be downloaded first)"
        if others := sorted(p.name for p in folder.glob("*.safetensors")):
            hint = f": name one of its files, {', '.join(others[:5])}"
        if kind == "lora" and (whole / "unet").exists():
            hint = ", but a whole U-Net: give it with --unet"
        fail(f"--{kind} {path}: there is no {folder / names[0]}{hint}")
    if kind == "text-encoder" and whole.is_file():
        fail(f"--{kind} {path} is a file: give the folder that holds it and its config.json")
    return found[0]


def files_of(file: Path) -> list[Path]:
    """The files that hold the tensors: the file itself, or the shards that an index names."""
    if file.suffix != ".json":
        return [file]
    names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    paths = [file.parent / Path(name).name for name in names]
    for path in paths:
        if not path.exists():
            fail(f"{file} names a shard that is missing: {path}")
    return paths


def fingerprint(kind: str, file: str) -> dict:
    """What the protocol records of a system's file: its sha256, of a sharded one that of all shards' (each in
    hexadecimal, one after the other, by name), of a whole part its config's, which decides the rest, and of a
    user's method those of the modules beside it that it has imported."""
    if not file:
        return dict(sha256=None)
    shards = [sha256(path) for path in files_of(Path(file))]
    whole = shards[0] if len(shards) == 1 else hashlib.sha256("".join(shards).encode()).hexdigest()
    config = Path(file).with_name("config.json")
    found = dict(sha256=whole)
    if kind in list(STEMS)[1:]:
        found["config_sha256"] = sha256(config)
    if kind.startswith("method") and Path(file).resolve().parent != sd.HERE / "tests/rivals":
        found["imports"] = imported_beside(Path(file))
    return found


def imported_beside(file: Path) -> dict[str, str]:
    """{name: sha256} of the modules in a file's folder that are imported by now: its code, too. Not of
    packages there, nor of what is imported only as it draws."""
    paths = {Path(found) for module in [*sys.modules.values()] if (found := getattr(module, "__file__", ""))}
    return {path.name: sha256(path) for path in sorted(paths) if path.is_absolute()
            and path.resolve().parent == file.resolve().parent}


def revision_of(pipe) -> str | None:
    """The commit of a model from the hub, None of a folder. The tokenizer knows where its files lie; a U-Net
    only the model's name."""
    found = re.search(r"snapshots/([0-9a-f]{40})", pipe.tokenizer.name_or_path)
    return found and found[1]


def code_of(folder: Path) -> str:
    """A hash of what methods and attacks share: their code, prompt pairs and nouns."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".txt"))
    return hashlib.sha256("".join(path.name + sha256(path) for path in files).encode()).hexdigest()


def load_function(path: str, flag: str) -> tuple[Callable, str]:
    """FILE.py:FUNCTION -> the function, and where it differs from its paper. Runs the file, which may import
    its neighbours."""
    file, _, name = path.rpartition(":")
    with one_line(f"load {flag}"):
        if (folder := str(Path(file).resolve().parent)) not in sys.path:
            sys.path.append(folder)
        found = importlib.util.spec_from_file_location(f"method {file}", file)
        module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # dataclasses look there
        found.loader.exec_module(module)
        if inspect.isgeneratorfunction(function := getattr(module, name)):
            raise ValueError(f"{name} lacks @contextmanager")
        return function, getattr(module, "DIFFERS", "")


# ------------------------------------------------------------------------------------ their training
def training_of(systems: list, model: str) -> list[dict]:
    """The arguments of training of systems that are weights, where a run of ours or of a rival left them
    beside these, else training's defaults. Other programs' args.json are none. Where nothing was trained it
    is the CLIP alone by which training would be rewarded."""
    default = sd.TINY if Path(model).resolve() == sd.HERE / "tests/tiny" else vars(sd.Args())
    above, found = dict(lora=1, unet=2), []  # a whole U-Net lies in a folder of the run's
    for s in [s for s in systems if s.kind in STEMS]:
        folders = Path(s.path).parents[:above.get(s.kind, 0)]
        files = [folder / name for folder in folders for name in ("args.json", "training.json")]
        left = [notes_of(file) for file in files if file.is_file()]
        found += [notes for notes in left if notes is not None] or [default]
    return found or [dict(clip_model=default["clip_model"])]


def notes_on(training: list[dict], labels) -> dict[str, int]:
    """How many runs were against other labels than these, or not at their end, as far as they say."""
    runs = [t for t in training if isinstance(t.get("prompts"), list)]  # else they are defaults, or a rival's
    return {"systems trained against other labels than are judged": sum(
                {*t.get("labels", labels)} != {*labels} for t in runs),
            "systems whose training has not taken all its steps (--resume goes on)": sum(
                t.get("taken", math.inf) < t.get("steps", 0) for t in runs)}


def is_reward(path: str, clip, training: list[dict]) -> bool:
    """Whether a CLIP, loaded from a path, is one by which training was rewarded: by its path, or by its
    weights, as folders move."""
    own = hashlib.sha256(save(clip.state_dict())).hexdigest()
    return any(own in t.get("weights", ()) or Path(t["clip_model"]).resolve() == Path(path).resolve()
               for t in training if "clip_model" in t)


def notes_of(file: Path) -> dict | None:
    """The arguments in a run's args.json, and the steps `taken`, or those in a rival's training.json; None
    where it is another program's."""
    try:
        left = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"cannot read {file}, which lies beside the weights: {error}")
    if not isinstance(left, dict):
        return None
    prompts = left.get("prompts", "")  # a rival's are a file's path, and some need none
    rival = file.name == "training.json" and "seconds" in left and isinstance(prompts, str)
    if rival or not (isinstance(prompts, list) and isinstance(left.get("clip_model"), str)):
        return left if rival else None
    checkpoint, metrics = (file.with_name(name) for name in ("checkpoint.pt", "metrics.jsonl"))
    if not checkpoint.exists():  # the weights were copied without the rest
        return left
    return left | dict(taken=metrics.read_text().count("\n") if metrics.exists() else 0)


def trained_prompts(training: list[dict]) -> set[str]:
    """The prompts of training: a run's args.json holds them; training's defaults name their file."""
    seen = set()
    for prompts in (t.get("prompts", []) for t in training):
        if isinstance(prompts, str):
            prompts = sd.read_prompts(prompts) if Path(prompts).is_file() else []
        seen |= {prompt for prompt, *_ in prompts}
    return seen


# ------------------------------------------------------------------------------------ U-Nets
def refuse_inputs(config: dict, width: int, what: str):
    """Exit where a U-Net needs what nobody gives it here; width: that of the text encoder's states."""
    given = GIVEN | dict(cross_attention_dim=width)
    wrong = [f"{name} {config.get(name, value)!r}, not {value!r}" for name, value in given.items()
             if config.get(name, value) != value]
    if wrong:
        fail(f"{what}: its U-Net takes what sampling does not give: {', '.join(wrong)}")


def load_unet(pipe, file: Path) -> UNet2DConditionModel:
    """A whole U-Net in the place and precision of the pipeline's, exactly the tensors of the file."""
    if not (config := file.with_name("config.json")).exists():
        fail(f"--unet {file}: there is no {config}: copy that of the U-Net from which it was made")
    config = json.loads(config.read_text())
    refuse_inputs(config, pipe.text_encoder.config.hidden_size, f"--unet {file}")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    tensors = {name: t for path in files_of(file) for name, t in load_file(path).items()}
    shapes = {name: t.shape for name, t in unet.state_dict().items()}
    for what, names in (("lacking", shapes.keys() - tensors), ("unknown", tensors.keys() - shapes),
                        ("another shape", [n for n, t in tensors.items() if shapes.get(n) != t.shape])):
        if names:
            fail(f"--unet {file}: {len(names)} tensors do not fit the config.json beside it ({what}): "
                 f"{some(names)}")
    if shapes != {name: t.shape for name, t in pipe.unet.state_dict().items()}:
        fail(f"--unet {file}: it is of another architecture than the U-Net of this model")
    unet.load_state_dict({name: t.to(pipe.unet.dtype) for name, t in tensors.items()}, assign=True)
    return unet.to(pipe.unet.device).requires_grad_(False).eval()


def load_text_encoder(pipe, file: Path):
    """An edited text encoder in the place and precision of the pipeline's, exactly of its shapes."""
    ours, theirs = pipe.text_encoder, load_whole(type(pipe.text_encoder), str(file.parent),
                                                 dtype=pipe.text_encoder.dtype)
    before, after = ({name: w.shape for name, w in m.state_dict().items()} for m in (ours, theirs))
    if before != after:
        raise ValueError("it has other weights, or of other shapes, than the text_encoder of this model")
    return theirs.to(ours.device)


# ------------------------------------------------------------------------------------ LoRAs
def some(names) -> str:
    """The first five names, and how many there are besides."""
    names = sorted(names)
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def digest(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Of a tensor's values as the model holds them."""
    return hashlib.sha256(tensor.detach().to(dtype).float().cpu().contiguous().numpy().tobytes()).digest()


def load_lora(pipe, file: Path):
    """Load a LoRA by diffusers, and exit unless all of the file is in the model, at the file's strength.

    Tensors are told by their values: so whatever naming the file has, and whatever the libraries make of it,
    those that were left out come out by their names.
    """
    tensors = load_file(file)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True, adapter_name="it")
    inside, dtypes, matched, lacking = defaultdict(list), set(), {}, []
    for part in (pipe.unet, pipe.text_encoder):
        for name, weight in part.named_parameters():
            if weight.is_meta:  # peft's place for a tensor that the file does not have
                lacking.append(name)
            elif "lora_" in name:
                inside[digest(weight, weight.dtype)].append((part, name))
                dtypes.add(weight.dtype)
    for key, tensor in tensors.items():
        places = next((inside[d] for d in {digest(tensor, t) for t in dtypes} if inside.get(d)), None)
        if places and not key.endswith(".alpha"):
            matched[key] = places.pop()
    left = tensors.keys() - matched - applied_alphas(file, tensors, matched)
    if left:
        fail(f"--lora {file}: diffusers and peft would not apply {len(left)} of its {len(tensors)} tensors, "
             f"which are for another model or another kind of adapter than LoRA: {some(left)}")
    if lacking := lacking + [name for places in inside.values() for _, name in places]:
        fail(f"--lora {file} lacks {len(lacking)} of the tensors that go with its others: {some(lacking)}")


def applied_alphas(file: Path, tensors: dict, matched: dict) -> set[str]:
    """The file's alphas that act: as W + alpha / rank * B A. Exits where none is given and the scale is not
    1, except where peft's own configuration in the file's header says so."""
    with safe_open(file, "pt") as opened:
        configured = "lora_adapter_metadata" in (opened.metadata() or {})
    alphas, applied = {k.removesuffix(".alpha"): v for k, v in tensors.items() if k.endswith(".alpha")}, set()
    for key, (part, name) in matched.items():
        if ".lora_A." not in name:
            continue
        scale = part.get_submodule(name.partition(".lora_A.")[0]).scaling["it"]
        stem = next((stem for stem in (key.removesuffix(end) for end in (
            ".lora_down.weight", ".lora.down.weight", ".lora_A.weight", ".down.weight", "_A.weight"))
            if stem in alphas), None)
        if stem is None and not configured and not math.isclose(scale, 1, rel_tol=1e-5):
            fail(f"--lora {file}: diffusers and peft would apply {key} times {scale:g}, for which the file "
                 f"gives no alpha")
        if stem is not None and math.isclose(scale, alphas[stem].item() / len(tensors[key]), rel_tol=1e-3):
            applied.add(f"{stem}.alpha")
    return applied


def plain_name(name: str) -> bool:
    """Whether a system's name can be a folder's."""
    return bool(re.fullmatch(r"[\w.+= -]+", name) and name.strip(". "))


# ------------------------------------------------------------------------------------ image-to-image
class ImageToImage(StableDiffusionImg2ImgPipeline):
    """Diffusers' own, but for its noise, which is drawn in fp32 as diffusers does there: half precision would
    draw other numbers from the same seed."""

    def prepare_latents(self, image, timestep, batch, each, dtype, device, generator=None):
        found = [self.vae.encode(one[None]).latent_dist for one in image.to(device, dtype)]
        noise = [torch.cat([torch.randn(f.mean.shape, generator=g, device=g.device)
                            for f, g in zip(found, generator, strict=True)]).to(device, dtype)
                 for _ in range(2)]  # [B, 4, h, w] twice: the encoder's, and that added
        mean, std = (torch.cat(parts) for parts in zip(*((f.mean, f.std) for f in found), strict=True))
        latents = self.vae.config.scaling_factor * (mean + std * noise[0])
        return self.scheduler.add_noise(latents, noise[1], timestep)
