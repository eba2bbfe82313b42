"""A folder in diffusers layout with .safetensors, of what shielddiff.py does not read: .bin or a single file.

    python tests/convert.py old_folder new_folder                   # a pipeline or a CLIPModel
    python tests/convert.py model.ckpt new_folder                   # asks the hub for SD 1.5's configuration
    python tests/convert.py model.safetensors new_folder a_folder   # takes it from a folder of the same kind

The libraries read pickles with weights_only: no code of theirs runs.
"""
import sys
from pathlib import Path

import diffusers
import transformers


def main(old: str, new: str, config: str | None = None):
    """Load all of a model and save it to the folder `new`."""
    if Path(old).is_file():
        model = diffusers.StableDiffusionPipeline.from_single_file(old, config=config)
    elif Path(old, "model_index.json").exists():
        unneeded = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        model = diffusers.StableDiffusionPipeline.from_pretrained(old, **unneeded)
    else:
        model = transformers.CLIPModel.from_pretrained(old)
        transformers.CLIPProcessor.from_pretrained(old).save_pretrained(new)
    model.save_pretrained(new, safe_serialization=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(f"usage: convert.py OLD NEW [CONFIG]. {__doc__}")
    main(*sys.argv[1:])
