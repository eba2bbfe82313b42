"""The pictures of --init-images and --reference, as cameras and editors save them: one reader, one check.
Last, how far apart two pictures and two sets of them are."""
from pathlib import Path

import numpy as np
import torch
from eval_results import parts_of
from PIL import Image, ImageOps

from shielddiff import fail

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and what old scanners write in the second


def read_picture(path) -> Image.Image:
    """A picture in RGB: its first frame, upright, 9 to 16 bits rounded to 8, what is transparent on white.
    Colour profiles are left out, as by the codes behind published FIDs. Raises whatever Pillow raises, and
    ValueError for numbers that name no white."""
    with Image.open(path) as file:
        image, tags = ImageOps.exif_transpose(file), getattr(file, "tag_v2", {})
    if image.mode.startswith("I;16"):
        image = eight_bits(image, tags.get(BITS, (16,))[0], tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    elif image.mode in "IF":
        raise ValueError("its 32-bit numbers do not say which is white: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """A grey picture of up to 16 bits in 8, white where it is transparent. Pillow would clip it at 255."""
    pixels = np.asarray(image)  # [H, W] uint16
    grey = pixels / (2**bits - 1)
    grey = np.where(pixels == image.info.get("transparency", -1), 1, 1 - grey if inverted else grey)
    return Image.fromarray((grey * 255).round().astype(np.uint8))


def list_pictures(folder: str) -> list[Path]:
    """The pictures of a folder, sorted; exits where there is none, or where one cannot be read to its end."""
    files = sorted(p for p in Path(folder).glob("*") if p.name[0] != "." and (p.is_file() or p.is_symlink()))
    found = [p for p in files if p.suffix.lower() in SUFFIXES]
    if not found:
        fail(f"folder {folder} holds no picture ({', '.join(SUFFIXES)})")
    if other := [p.name for p in files if p not in found]:
        print(f"{folder}: not among the pictures: {', '.join(other[:5])}{', ...' if other[5:] else ''}")
    for path in found:
        try:
            read_picture(path)
        except Exception as error:  # each format has errors of its own, and some of them are no OSError
            fail(f"cannot read picture {path}: {(str(error).strip() or repr(error)).splitlines()[0]}")
    return found


def pixel_rms(picture: np.ndarray, base: np.ndarray) -> float:
    """Root mean square difference of two uint8 pictures [H, W, 3], in steps of 255."""
    return float(np.sqrt(((picture.astype(float) - base) ** 2).mean()))


def frechet(reference: list[Path], pictures: list[Path], device) -> dict:
    """Frechet Inception Distance of torchmetrics between two sets of pictures, always with both N."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    fid = FrechetInceptionDistance().to(device)
    for paths, real in ((reference, True), (pictures, False)):
        for path in paths:
            pixels = torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1)[None]
            fid.update(pixels.to(device), real=real)
    return dict(value=fid.compute().item(), n=len(pictures), n_reference=len(reference))


def add_fid(results: dict, tables: dict, jobs: list, out: Path, reference: list[Path], device):
    """The FID of every system's finite benign pictures, with --reference."""
    for name, (places, some) in parts_of(jobs).items():
        for system, numbers in results[name].items():
            if "benign" in numbers:
                paths = [job.key(system).path(out) for job, good in zip(
                    some, tables[some[0].set, system]["finite"][places], strict=True)
                    if good and not job.row.elicits]
                numbers["benign"]["fid"] = frechet(reference, paths, device)
