"""Two-stream latent mixing: our reading of Dual Latent Reconstruction (arXiv 2411.13982), NOT a reproduction.

    python eval.py --method latent-mixing latent-mixing-guided --concept "nudity, naked, nude"

From the abstract: one latent stream of the prompt, one of safe embeddings, a tunable weighted sum of both, a
threshold that keeps the global context. What is summed, when, by which weight, and where the safe embeddings
come from we do not know, nor is there code: all of that is ours, so the numbers say nothing about the paper.
Ours: both streams start from the same noise. While t is above a threshold each goes its own way and only the
prompt's is kept; from there on both go on from the mixture of the two after every step. The safe stream of
`latent-mixing` is guided away from the concept's words (naive). That of `latent-mixing-guided` has the
prompt's embedding less the mean difference of spec.pairs.
"""
import functools
from contextlib import contextmanager

import torch
from rivals.negative_prompt import concept_shift

DIFFERS = ("our reading of an abstract, without formula or code: weight 0.5, mixing for t <= 800 of 1000, a "
           "safe stream by a negative prompt or by an embedding less the pairs' mean difference")


@contextmanager
def latent_mixing(pipe, spec, stock, guided=False, weight=0.5, threshold=0.8):
    """A method (see README.md in this folder): weight 0 is the stock picture; weight 1 with threshold 1 the
    safe stream's. One stock draw of twice the batch: the prompts' streams, then the safe ones."""
    shift = torch.zeros(1, device=pipe.device, dtype=pipe.text_encoder.dtype)
    if guided:
        shift = concept_shift(pipe, spec.pairs)  # [77, d]
    last_apart = threshold * pipe.scheduler.config.num_train_timesteps

    def mix(pipeline, i, t, tensors):
        if t > last_apart:
            return {}
        plain, safe = tensors["latents"].chunk(2)  # [B, 4, h, w] each
        mixed = (1 - weight) * plain + weight * safe
        return dict(latents=torch.cat([mixed, mixed]))

    def draw(call):
        n = len(call["prompt"])
        states = pipe.encode_prompt(call["prompt"], pipe.device, 1, False)[0]  # [B, 77, d]
        call = call | dict(
            prompt=None, prompt_embeds=torch.cat([states, states - shift]),
            negative_prompt=[""] * n + ["" if guided else spec.concept] * n,
            generator=call["generator"] + [g.clone_state() for g in call["generator"]],
            callback_on_step_end=mix, callback_on_step_end_tensor_inputs=["latents"])
        for name in {"image", "latents"} & set(call):  # a list, a tensor [B, 4, h, w]
            call[name] = call[name] * 2 if name == "image" else torch.cat([call[name]] * 2)
        images, refused = stock(call)
        return images[:n], refused[:n]

    yield draw


guided = functools.partial(latent_mixing, guided=True)
