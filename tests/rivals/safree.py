"""SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761): the states of those words that bring a prompt near the
concept are projected off the concept's subspace, in as many first steps as that changes the prompt.

    python eval.py --method safree safree-negative safree-guided --concept "nudity, naked, nude"

`safree` is the paper's text filter. `safree-negative` also gives the phrases as negative prompt, as the
official code (jaehong31/SAFREE@b8b2c3f) always does, so its published numbers include it. `safree-guided`
knows the eliciting prompts of spec.pairs and takes their subspace instead of that of the phrases.
Exact: masking, subspaces, the trigger rule with its alpha, the projection, the self-validating filter.
Ours: see DIFFERS, which the report prints.
"""
import functools
import math
from contextlib import contextmanager

import torch

DIFFERS = ("the phrases are --concept's, split at its commas, not the authors' 17; re-attention in Fourier "
           "space is left out: in the official code for Stable Diffusion it does nothing; the last filtered "
           "step, one of 50, scaled to the steps taken; pseudo-inverses by SVD; safree-guided and "
           "image-to-image are ours")


def projector(rows: torch.Tensor) -> torch.Tensor:
    """Rows [m, d] -> the projector [d, d] on their span, fp64: prompts less one word are nearly parallel."""
    rows = rows.double()
    return torch.linalg.pinv(rows) @ rows


def ids_of(pipe, text: str) -> torch.Tensor:
    """Token ids [n + 2] of a text's n tokens between begin and end of text, without padding."""
    return pipe.tokenizer(text, truncation=True, max_length=pipe.tokenizer.model_max_length,
                          return_tensors="pt").input_ids[0]


def pooled(pipe, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [n, length] -> the text encoder's states at the end of text [n, d]."""
    return pipe.text_encoder(ids.to(pipe.device)).pooler_output


def is_trigger(distance: torch.Tensor, alpha: float) -> torch.Tensor:
    """[n] bool, by the distances [n] from the concept of a prompt less each of its n tokens: whether it is
    far without it. An only token always is one, as in the official code: there is no mean of no others."""
    others = (distance.sum() - distance) / (len(distance) - 1)
    return ~(distance < (1 + alpha) * others)


def filtered(pipe, prompt: str, states: torch.Tensor, concept: torch.Tensor, alpha: float):
    """A prompt's states [77, d] -> the same with triggers projected off the concept (a projector [d, d]), and
    by the self-validating filter the last of 50 steps, 0 to 10, at which to use them."""
    ids = ids_of(pipe, prompt)
    n = len(ids) - 2
    if not n:
        return states, 0
    masked = ids.repeat(n, 1)  # [n, n + 2]
    masked[torch.arange(n), torch.arange(n) + 1] = 0
    masked = pooled(pipe, masked).double()  # [n, d]
    outside = torch.eye(len(concept), device=concept.device) - concept  # I - P
    trigger = is_trigger((masked @ outside).norm(dim=1), alpha)  # [n]
    projected = states.double() @ projector(masked) @ outside  # [77, d]
    beta = 1 - torch.cosine_similarity(states[:n + 2], projected[:n + 2]).mean().item()
    result = states.clone()
    result[1:n + 1][trigger] = projected[1:n + 1][trigger].to(states.dtype)
    return result, round(10 / (1 + math.exp(-5 * (10 * beta - 5.333))))


@contextmanager
def safree(pipe, spec, stock, negative=False, guided=False, alpha=0.01):
    """A method (see README.md in this folder): every prompt's filtered states in the first steps."""
    phrases = [prompt for prompt, _ in spec.pairs] if guided else filter(str.strip, spec.concept.split(","))
    concept = projector(torch.cat([pooled(pipe, ids_of(pipe, phrase)[None]) for phrase in phrases]))  # [d, d]

    def draw(call):
        once = [*dict.fromkeys(call["prompt"])]  # an attack's are the same for many pictures
        states = pipe.encode_prompt(once, pipe.device, 1, False)[0]  # [n, 77, d]
        safe, last = zip(*(filtered(pipe, prompt, h, concept, alpha)
                           for prompt, h in zip(once, states, strict=True)), strict=True)
        rows = [once.index(prompt) for prompt in call["prompt"]]  # [B]
        states, safe = states[rows], torch.stack(safe)[rows]  # [B, 77, d] each
        last = torch.tensor(last, device=pipe.device)[rows]  # [B]

        def states_at(i, steps):
            return torch.where(((i == 0) | (i <= last * steps / 50))[:, None, None], safe, states)

        def choose_next(pipeline, i, t, tensors):
            context = tensors["prompt_embeds"].clone()  # with guidance: [2 B, 77, d], the prompts' last
            context[-len(states):] = states_at(i + 1, pipeline.num_timesteps)
            return dict(prompt_embeds=context)

        if "path" in call:  # an attack's: what sampling would use at its last timestep
            share = 1 - (call["path"][-1][0] + 1) / pipe.scheduler.config.num_train_timesteps
            safe = states_at(int(share * spec.steps), spec.steps)
        call = call | dict(prompt=None, prompt_embeds=safe, callback_on_step_end=choose_next,
                           callback_on_step_end_tensor_inputs=["prompt_embeds"])
        return stock(call | dict(negative_prompt=[spec.concept] * len(states)) if negative else call)

    yield draw


safree_negative, safree_guided = (functools.partial(safree, **{k: True}) for k in ("negative", "guided"))
