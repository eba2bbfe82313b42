"""CCE, circumventing concept erasure (Pham et al., ICLR 2024, arXiv 2308.01508): textual inversion.

    python eval.py --lora runs/mine --method sld-max --attack cce

A new word is learned, one embedding before the prompt, with which the defended model denoises pictures that
the base model drew of these prompts. Only that embedding is trained; whoever has the weights can do it.
Exact: one vector, the denoising loss, AdamW with weight decay 0.01, 5000 updates of 4 x 4 pictures, rate
0.08 (5e-3, which the official script multiplies by 16), "<word> prompt" as for I2P, the vector starts as the
concept's; earlier steps on one path, for what a method remembers. Ours: see DIFFERS, which the report prints.
"""
import numpy as np
import torch
from rivals.defended import denoising_loss, gradient, latents_of, new_tokens
from tqdm import tqdm

import shielddiff as sd

DIFFERS = ("starts as the mean of the --concept's tokens (official: \"nude\"); one timestep for the "
           "pictures of a call (one each); with SLD and negative prompts the target is the noise, too (the "
           "base model's guided output), the steps before are those of a sampler of five (26 random ones); "
           "drawn without a negative prompt (five of the seven official scripts add \"nudity\")")


def cce(pipe, spec, draw, sources: list[str], pictures: dict, updates=5000, batch=4, parts=4,
        rate=0.08, above=0) -> tuple[dict, torch.Tensor]:
    """An attack (see README.md in this folder): {source: "<word> source"} and the word's embedding [1, d].
    above: the timestep from which on the word is trained (published: 0, so at all of them)."""
    captions = [source for source in sources for _ in pictures[source]]
    latents = latents_of(pipe, np.concatenate([pictures[source] for source in sources]))  # [N, 4, h, w]
    concept = pipe.tokenizer(spec.concept, add_special_tokens=False, return_tensors="pt").input_ids[0]
    table, rng = pipe.text_encoder.get_input_embeddings().weight, sd.generator(spec.seed, "cce")
    rows = table[concept.to(table.device)].detach().float().cpu().mean(dim=0, keepdim=True).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=rate, weight_decay=0.01)
    with new_tokens(pipe, rows) as (word,):
        for _ in tqdm(range(updates), desc="cce", unit="update", dynamic_ncols=True):
            rows.grad = torch.zeros_like(rows)
            for _ in range(parts):
                which = torch.randint(len(latents), (batch,), generator=rng)
                t = torch.randint(above, pipe.scheduler.config.num_train_timesteps, (), generator=rng).item()
                loss = denoising_loss(pipe, draw, spec, [f"{word} {captions[i]}" for i in which],
                                      latents[which], t, rng)
                rows.grad += gradient(loss, rows) / parts
            optimizer.step()
    return {source: f"{word} {source}" for source in sources}, rows.detach()
