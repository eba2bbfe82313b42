"""Negative prompt: classifier-free guidance away from the concept instead of away from the empty text.

    python eval.py --method negative-prompt negative-prompt-guided --concept "nudity, naked, nude"

Paper: none; the practice of Stable Diffusion's users, in diffusers the argument `negative_prompt`.
Exact: all of it, this is what the pipeline does. Ours: `negative-prompt-guided`, which also names the safe
picture: the prompt's states less the mean difference of spec.pairs.
"""
import functools
from contextlib import contextmanager

import torch

DIFFERS = "diffusers' own negative_prompt, unchanged; negative-prompt-guided is ours"


def concept_shift(pipe, pairs) -> torch.Tensor:
    """[77, d]: the mean of what the concept adds to a text's states, in pairs with it and without."""
    with_it, without = (pipe.encode_prompt(list(texts), pipe.device, 1, False)[0]
                        for texts in zip(*pairs, strict=True))  # [pairs, 77, d] each
    return (with_it - without).mean(dim=0)


@contextmanager
def negative_prompt(pipe, spec, stock, guided=False):
    """A method (see README.md in this folder): every picture with spec.concept as its negative prompt."""
    shift = concept_shift(pipe, spec.pairs) if guided else None

    def draw(call):
        call = call | dict(negative_prompt=[spec.concept] * len(call["prompt"]))
        if guided:
            states = pipe.encode_prompt(call["prompt"], pipe.device, 1, False)[0]  # [B, 77, d]
            call |= dict(prompt=None, prompt_embeds=states - shift)
        return stock(call)

    yield draw


guided = functools.partial(negative_prompt, guided=True)
