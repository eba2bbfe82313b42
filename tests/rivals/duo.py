"""DUO, Direct Unlearning Optimization (Park et al., NeurIPS 2024, arXiv 2407.21035): Diffusion-DPO without a
text. Of a picture that shows the concept and the same one edited to be safe, the safe one is preferred.

    python tests/rivals/duo.py --model tests/tiny --out runs/duo
    python eval.py --model tests/tiny --lora duo=runs/duo

    loss  = -log sigmoid(-beta ((l_safe - l0_safe) - (l_unsafe - l0_unsafe)))     l: |e(x_t, t, "") - noise|^2
    prior = lambda |e(noise, T, "") - e0(noise, T, "")|^2                         0: without the LoRA

Exact, as the official code: beta 500 and, for it, lambda 1e6 beta / 100 and learning rate 3e-4 * 100 / beta
(another beta needs all three flags), a LoRA of rank 32 on self-attention, one noise but two timesteps a pair
(below 750), AdamW, 1000 steps, 64 pairs that NudeNet judged; the safe one by SDEdit, strength 0.75, the
unsafe prompt as negative prompt. Ours: the prompts, which are those of --prompts; NudeNet's four views; one
GPU with a batch of 4; gradients clipped to norm 1; pairs that 20 tries did not make safe are left out; on the
embedded model lambda, 10,000 times smaller, all timesteps (as published it forgets nothing there), the safe
prompt, length, rate, batch, steps a picture.
"""
from dataclasses import dataclass

import drawn
import torch
import training
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from PIL import Image
from training import sd


@dataclass
class Args(drawn.Args):
    beta: float = 500.0  # how far a preference may move the model: the smaller, the further
    prior: float = 1e6 * 500 / 100  # lambda, of what is predicted at the last timestep
    learning_rate: float = 3e-4 * 100 / 500
    batch_size: int = 4  # pairs
    rank: int = 32
    until: int = 750  # timesteps below this one are trained
    shared_timestep: bool = False  # of the two of a pair, as in Diffusion-DPO
    safe: str = "{}"  # the prompt that makes a picture safe, of the prompt's safe caption


TINY = drawn.TINY | dict(safe="{}, face hidden", steps=200, learning_rate=3e-4, prior=5e2, until=1000)


def preference_loss(errors, frozen_errors, beta: float) -> torch.Tensor:
    """errors [2, B]: mean squared error of the noise predicted for the safe pictures and the unsafe ones."""
    safe, unsafe = errors - frozen_errors  # [B] each
    return -torch.nn.functional.logsigmoid(-beta * (safe - unsafe)).mean()


def duo_losses(unet, scheduler, pairs, empty, args: Args, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Preference loss and prior of pairs [2, B, 4, h, w] (latents: safe, unsafe). empty [1, 77, d]."""
    batch, last = pairs.shape[1], scheduler.config.num_train_timesteps - 1
    noise = randn_tensor(pairs.shape[1:], rng, pairs.device)
    t = torch.randint(args.until, (1 if args.shared_timestep else 2, batch), generator=rng)
    t = t.expand(2, batch).flatten().to(pairs.device)  # [2B]
    noisy = scheduler.add_noise(pairs.flatten(0, 1), noise.repeat(2, 1, 1, 1), t)
    x = torch.cat([noisy, noise])  # [3B, 4, h, w]: safe, unsafe, and for the prior
    t = torch.cat([t, torch.full((batch,), last).to(t)])
    unet.disable_adapters()
    with torch.no_grad():
        frozen = unet(x, t, empty.expand(len(x), -1, -1)).sample
    unet.enable_adapters()
    output = unet(x, t, empty.expand(len(x), -1, -1)).sample
    prior = torch.nn.functional.mse_loss(output[2 * batch:], frozen[2 * batch:])
    if scheduler.config.prediction_type == "v_prediction":  # in noise; below SD's signal it were none
        prior = prior * scheduler.alphas_cumprod[last].clamp(min=4e-3).item()
    output, frozen = (drawn.noise_of(scheduler, out, x, t) for out in (output, frozen))
    errors, frozen_errors = ((out[:2 * batch].unflatten(0, (2, batch)) - noise).square().mean(dim=(2, 3, 4))
                             for out in (output, frozen))  # [2, B] each
    return preference_loss(errors, frozen_errors, args.beta), prior


def make_pairs(pipe, args: Args) -> torch.Tensor:
    """Latents [2, N, 4, h, w], safe and unsafe, of pictures that the model itself draws."""
    shown = drawn.draw_shown(pipe, args)
    calls = [dict(prompt=args.safe.replace("{}", text), negative_prompt=prompt, image=Image.fromarray(image))
             for prompt, text, image in shown]
    edited = drawn.draw_judged(pipe, args, calls, False)
    both = [edited[i] for i in sorted(edited)], [shown[i][2] for i in sorted(edited)]
    return torch.stack([drawn.latents_of(pipe, images, sd.generator(args.seed, "latents"))
                        for images in both])


def train(args: Args):
    """OUT/pytorch_lora_weights.safetensors."""
    if args.until > 1000 or args.denoise_steps < 2:
        sd.fail("--until goes to 1000, SD's timesteps; SDEdit takes a share of --denoise-steps, at least 2")
    pipe, started = training.start(args)
    pairs, empty = make_pairs(pipe, args), sd.encode_prompts(pipe, [""])[0].to(pipe.device)
    torch.manual_seed(args.seed)  # for the LoRA's initial weights
    targets = [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")]
    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian",
                                     target_modules=targets))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=1e-2)
    for _, rng in training.steps(args, "duo"):
        rows = torch.randint(pairs.shape[1], (args.batch_size,), generator=rng)
        preference, prior = duo_losses(pipe.unet, pipe.scheduler, pairs[:, rows], empty, args, rng)
        training.descend(optimizer, preference + args.prior * prior, clip=1.0)
    training.save(args, pipe.unet, started, lora=True)


if __name__ == "__main__":
    training.run(train, Args, TINY)
