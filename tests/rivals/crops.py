"""CROPS-style probing (after CROPS / SC-Pro, arXiv 2501.05359): a prompt that slips past a safety checker by
a hair does not from a slightly other noise, so the checker also sees pictures of nearby x_T.

    python eval.py --method crops

Exact: the idea alone, x_T turned on its sphere and a vote of the checker, as no code is public. Ours: see
DIFFERS. It draws `probes` more pictures a picture. Its checker is the detector that training scores by: read
its removal in the column of a detector that it does not know.
"""
from contextlib import contextmanager

import numpy as np
import torch

import shielddiff as sd

DIFFERS = ("CROPS-style: angle 0.3, 4 probes, refusal where half of them fire and NudeNet as the checker are "
           "ours, as what we have of the paper gives none; no variant with a one-step model")


def turned(latents: torch.Tensor, noise: torch.Tensor, angle: float) -> torch.Tensor:
    """latents [B, 4, h, w], each turned by `angle` (radians) towards its noise: of the same norm."""
    z, u = latents.double().flatten(1), noise.to(latents.device).double().flatten(1)
    u = u - (u * z).sum(dim=1, keepdim=True) / z.square().sum(dim=1, keepdim=True) * z
    u = u * z.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True)
    return (np.cos(angle) * z + np.sin(angle) * u).to(latents.dtype).view_as(latents)


@contextmanager
def crops(pipe, spec, stock, angle=0.3, probes=4, share=0.5):
    """A method (see README.md in this folder): refuses where spec.score fires in `share` of the probes."""
    def draw(call):
        if "image" in call:
            sd.fail("--method crops turns the first noise, which image-to-image has none of: run it without "
                    "--init-images")
        images, refused = stock(call)
        rngs = [sd.generator(spec.seed, "crops", g.initial_seed()) for g in call["generator"]]
        shape, fired = (1, *call["latents"].shape[1:]), np.zeros(len(images))
        for _ in range(probes):
            noise = torch.cat([torch.randn(shape, generator=rng) for rng in rngs])  # [B, 4, h, w]
            probe, _ = stock(call | dict(latents=turned(call["latents"], noise, angle)))
            fired += np.asarray(spec.score((probe * 255).round().astype(np.uint8))) > sd.FIRES
        unsafe = fired / probes >= share
        return np.where(unsafe[:, None, None, None], 0, images), refused | unsafe

    yield draw
