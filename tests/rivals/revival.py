"""Revival by a further fine-tune: what is left of a defence after its user has trained on.

    python eval.py --lora runs/mine --attack revival

A LoRA `style` is trained by the usual loss on pictures that the base model drew of prompts that elicit, those
with the content among them: a user's photographs of people, say. Merged: trained on the defended weights.
Apart: trained on the base weights and put beside the defence, W0 + dW_safe + dW_style, the protocol of
Modular LoRA (arXiv 2412.00357) for every system of weights. Exact: the protocol. Ours: the pictures (theirs:
Pokemon, Naruto, Danbooru), rank and length.
"""
import copy
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from rivals.defended import latents_of, target_of

import shielddiff as sd

DIFFERS = ("the fine-tune's pictures are the base model's own of the attacked prompts, content included; "
           "rank 8, 60 steps (the abstract states none)")
PIXELS = 4 * 64**2  # of latents in a call of the U-Net: 4 pictures of 512 px, all 16 of the embedded model
STYLE = LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def fine_tune(pipe, images, prompts: list[str], steps=60, batch=16, rate=3e-3) -> dict:
    """Train a LoRA `style` on pipe.unet as it is, and on images uint8 [N, H, W, 3] of prompts. It stays
    there; its weights are returned. The U-Net's other LoRAs are off meanwhile and afterwards."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # for the LoRA's initial weights
    pipe.unet.add_adapter(STYLE, adapter_name="style")
    trained = [p for n, p in pipe.unet.named_parameters() if ".style." in n]
    sd.cast_training_params(pipe.unet, torch.float32)
    optimizer = torch.optim.AdamW(trained, lr=rate, eps=1e-8 / sd.LOSS_SCALE)  # gradients are small
    scaler = torch.amp.GradScaler(pipe.device.type, sd.LOSS_SCALE, enabled=pipe.unet.dtype == torch.float16)
    latents = latents_of(pipe, images)  # [N, 4, h, w]
    context = sd.encode_prompts(pipe, prompts)  # [2, N, 77, d]
    for _ in range(steps):
        i = torch.randint(len(latents), (batch,), generator=rng)
        t = torch.randint(pipe.scheduler.config.num_train_timesteps, (batch,), generator=rng)
        noise = torch.randn(batch, *latents.shape[1:], generator=rng).to(latents)
        empty = (torch.rand(batch, generator=rng) < 0.1).long()  # dropped captions, for guidance
        t = t.to(pipe.device)
        noisy = sd.ddim_scheduler(pipe.scheduler.config).add_noise(latents[i], noise, t)
        optimizer.zero_grad()
        for part in torch.arange(batch).split(max(1, PIXELS // noise[0, 0].numel())):
            with torch.autocast(pipe.device.type, pipe.unet.dtype, enabled=pipe.unet.dtype != torch.float32):
                output = pipe.unet(noisy[part], t[part], context[1 - empty, i][part].to(latents)).sample
            target = target_of(pipe, latents[i][part], noise[part], t[part])
            loss = torch.nn.functional.mse_loss(output.float(), target) * len(part) / batch
            scaler.scale(loss).backward()
        scaler.step(optimizer)  # unless a gradient is not finite
        scaler.update()
    return get_peft_model_state_dict(pipe.unet, adapter_name="style")


def merge(unet):
    """A copy of a U-Net with its LoRAs, if any, added to its weights."""
    unet = copy.deepcopy(unet)
    if getattr(unet, "peft_config", None):
        unet.fuse_lora()
        unet.unload_lora()
    return unet.requires_grad_(False)


def beside(unet, style: dict):
    """A copy of a U-Net with the LoRA `style`, trained elsewhere, beside its own."""
    unet = copy.deepcopy(unet)
    others = list(getattr(unet, "peft_config", {}))
    unet.add_adapter(STYLE, adapter_name="style")
    set_peft_model_state_dict(unet, style, adapter_name="style")
    unet.set_adapters([*others, "style"])
    return unet.requires_grad_(False)


@contextmanager
def revived(pipe, images, prompts: list[str], style: dict | None = None, **length):
    """Inside a system's context: its U-Net merged and then fine-tuned or, with a `style` trained elsewhere,
    that beside it. Yields the style. Afterwards, also after an error, the system has its own U-Net.
    length: fine_tune's steps, batch and rate."""
    own = pipe.unet
    try:
        pipe.unet = beside(own, style) if style else merge(own)
        yield style or fine_tune(pipe, images, prompts, **length)
    finally:
        pipe.unet = own
