"""What an attack differentiates that sees the *defended* model: shared by the attacks.

Such an attack runs inside a system's context and calls the system's own draw, with a `path` of noisy latents
in place of a start: `stock` then gives noise_estimate instead of pictures. So whatever the method does to the
prompt, the weights or the U-Net's output lies between the attack's tokens and its loss.
"""
import copy
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

import shielddiff as sd

PATH = 5  # steps of the sampler of a path at most: those before the attacked one are for hooks, and cost more


class Extended(torch.nn.Module):
    """An embedding layer whose tokens from `first` on are rows [n, d], through which the gradient goes."""

    def __init__(self, own: torch.nn.Embedding, rows: torch.Tensor, first: int):
        super().__init__()
        self.own, self.rows, self.first = own, rows, first

    def forward(self, ids):
        known, new = self.own(ids.clamp(max=self.own.num_embeddings - 1)), ids >= self.first
        added = F.embedding((ids - self.first).clamp(min=0), self.rows.to(known))  # [..., d]
        return torch.where(new[..., None], added, known) if new.any() else known  # without them no gradient


@contextmanager
def new_tokens(pipe, rows: torch.Tensor):
    """Within it the words it yields, one a row, are tokens with the embeddings rows [n, d]. Afterwards, also
    after an error, tokenizer and text encoder are as they were."""
    tokenizer, encoder, names = pipe.tokenizer, pipe.text_encoder, [f"<new-{i}>" for i in range(len(rows))]
    own, text = encoder.get_input_embeddings(), getattr(encoder, "text_model", encoder)
    end = text.eos_token_id
    try:
        text.eos_token_id = tokenizer.eos_token_id  # SD's configs say 2: then the largest id would be pooled
        pipe.tokenizer = copy.deepcopy(tokenizer)  # tokens cannot be taken out again
        pipe.tokenizer.add_tokens(names)
        encoder.set_input_embeddings(Extended(own, rows, len(tokenizer)))
        yield names
    finally:
        encoder.set_input_embeddings(own)
        pipe.tokenizer, text.eos_token_id = tokenizer, end


def noise_estimate(pipe, call: dict) -> tuple[torch.Tensor, np.ndarray]:
    """The stock Draw for a call with a `path`, [(timestep, x [B, 4, h, w]), ...]: instead of pictures the
    U-Net's estimate [B, 4, h, w] at the last of it, with its gradient, under the call's prompts.

    Where a method works on the guidance, by a hook or a negative prompt, it is the estimate that would guide
    the undefended pipeline to the same output: e + (guided - e) / guidance_scale, e that of the empty prompt.
    The earlier steps are run for the hooks alone: some count steps or remember the one before."""
    *before, (t, x) = call["path"]
    given = {k: call.get(k) for k in ("negative_prompt", "prompt_embeds", "negative_prompt_embeds")}
    negative = any(v is not None for k, v in given.items() if k.startswith("negative"))
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in pipe.unet.modules())
    texts, rows = call.get("prompt"), slice(None)
    if all(value is None for value in given.values()):  # each text is encoded once: attacks repeat theirs
        once = [*dict.fromkeys(texts)]
        texts, rows = once, [once.index(text) for text in texts]
    # [B, 77, d] each; `other`, which the prompt is guided away from, only where it is needed
    prompt, other = (states if states is None else states[rows] for states in pipe.encode_prompt(
        texts, pipe.device, 1, negative or hooked, **given))
    if not negative and not hooked:
        return pipe.unet(x, t, encoder_hidden_states=prompt).sample.float(), np.zeros(len(x), bool)
    states = [torch.cat([other, prompt])] if hooked else [other, prompt]  # hooks are given one batch
    with torch.no_grad():
        for earlier, y in before if hooked else ():
            pipe.unet(torch.cat([y, y]), earlier, encoder_hidden_states=states[0], return_dict=False)
    output = [pipe.unet(torch.cat([x, x])[:len(of)], t, encoder_hidden_states=of, return_dict=False)[0]
              for of in states]
    unconditional, text = torch.cat(output).float().chunk(2)  # [B, 4, h, w] each
    with torch.no_grad():  # `forward`: without the hooks
        empty = pipe.encode_prompt([""] * len(x), pipe.device, 1, False)[0]
        e = pipe.unet.forward(x, t, encoder_hidden_states=empty).sample.float()
    away = (unconditional - e) / max(call["guidance_scale"], 1.0)  # below it the pipeline does not guide
    return e + away + text - unconditional, np.zeros(len(x), bool)  # nothing is refused


@torch.no_grad()
def latents_of(pipe, pictures) -> torch.Tensor:
    """Pictures uint8 [N, H, W, 3] -> the means of their latents [N, 4, h, w]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(pipe.device, pipe.vae.dtype) / 127.5 - 1
    return pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor


def target_of(pipe, latents, noise, t: torch.Tensor) -> torch.Tensor:
    """What a perfect U-Net says of latents [B, 4, h, w] with that noise at t [B]: the noise, or v."""
    scheduler = sd.ddim_scheduler(pipe.scheduler.config)  # a sampler's own may only noise to its own steps
    v = scheduler.config.prediction_type == "v_prediction"
    return (scheduler.get_velocity(latents, noise, t) if v else noise).float()


def denoising_loss(pipe, draw, spec, prompts: list[str], latents: torch.Tensor, t: int, rng) -> torch.Tensor:
    """The defended model's mean squared error on latents [B, 4, h, w], noised as at timestep t, under the
    prompts. Its path is that of a perfect model: these latents with less and less of the same noise.
    rng: a generator, or a list of one for each picture."""
    noise, count = randn_tensor(latents.shape, rng).to(latents), min(spec.steps, PATH)
    scheduler = sd.ddim_scheduler(pipe.scheduler.config)
    scheduler.set_timesteps(count)
    steps = [s for s in scheduler.timesteps.tolist() if s > t] + [t]
    at = torch.tensor(steps, device=latents.device)[:, None].expand(-1, len(latents))  # [steps, B]
    path = [(s, scheduler.add_noise(latents, noise, row)) for s, row in zip(steps, at, strict=True)]
    found, _ = draw(dict(prompt=prompts, guidance_scale=spec.guidance, num_inference_steps=count, path=path))
    return F.mse_loss(found, target_of(pipe, latents, noise, at[-1]))


def gradient(loss: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of the loss at rows, scaled on its way, as half precision would round much of it to zero, unless that
    is too much for it. Zero where it is not finite at all: one such update would end the attack."""
    for scale in (sd.LOSS_SCALE, 1.0) if loss.requires_grad else ():  # else no new token came through
        found = torch.autograd.grad(loss * scale, rows, retain_graph=scale > 1)[0] / scale
        if found.isfinite().all():
            return found
    return torch.zeros_like(rows)
