"""Negative prompt: classifier-free guidance away from the concept instead of away from the empty text.

    python eval.py --method negative-prompt --concept "nudity, naked, nude"

Paper: none; the practice of Stable Diffusion's users, in diffusers the argument `negative_prompt`.
Exact: all of it, this is what the pipeline does. Ours: nothing.
"""
from contextlib import contextmanager

DIFFERS = "diffusers' own negative_prompt, unchanged"


@contextmanager
def negative_prompt(pipe, spec, stock):
    """A method (see README.md in this folder): every picture with spec.concept as its negative prompt."""
    yield lambda call: stock(call | dict(negative_prompt=[spec.concept] * len(call["prompt"])))
