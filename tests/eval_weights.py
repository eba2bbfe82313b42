"""Where the weights of --lora, --unet and --text-encoder lie."""
from pathlib import Path

from shielddiff import fail

STEMS = {"lora": "pytorch_lora_weights", "unet": "diffusion_pytorch_model", "text-encoder": "model"}
ENDS = ("safetensors", "safetensors.index.json", "fp16.safetensors", "safetensors.index.fp16.json")


def weights_file(kind: str, path: Path) -> Path:
    """The file of a system's weights, or a sharded one's index: `path` itself or in that folder, or in the
    folder of a pipeline. Exits where there is none, or where it is a pickle."""
    part = path / kind.replace("-", "_")
    folder = part if (part / "config.json").exists() else path
    names = [f"{STEMS[kind]}.{end}" for end in ENDS]
    found = [path] if path.is_file() else [folder / name for name in names if (folder / name).exists()]
    for file in found or folder.glob("*.bin"):
        if file.suffix not in (".safetensors", ".json"):
            new = file.with_suffix(".safetensors") if path.is_file() else folder / names[0]
            fail(f"--{kind} {path}: {file} can run code. To convert it: python -c \"import torch, "
                 f"safetensors.torch as s; s.save_file(torch.load('{file}', weights_only=True), '{new}', "
                 f"{{'format': 'pt'}})\"")
    if not found:
        whole = kind == "lora" and (path / "unet").exists()
        hint = ", but a whole U-Net: give it with --unet" if whole else ""
        fail(f"--{kind} {path}: there is no {folder / names[0]}{hint}")
    if kind == "text-encoder" and path.is_file():
        fail(f"--{kind} {path} is a file: give the folder that holds it and its config.json")
    return found[0]
