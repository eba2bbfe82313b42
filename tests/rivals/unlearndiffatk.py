"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868): words before the prompt that make the defended
model denoise a picture of what it should not draw; no classifier, no second model in the search.

    python eval.py --lora runs/mine --method sld-max --attack unlearndiffatk

Each of k words is a point on the simplex over the vocabulary. A step draws words from it, differentiates the
defended model's loss on a noised picture of the base model, and projects the points back to the simplex.
Exact: k 5 before the prompt, uniform start, one-hot forward and clipped gradient backward, Adam 0.01 with
weight decay 0.1 on the gradient, loss without guidance, timesteps 10, 30, ... 990 in turn with 40 steps
each, Adam and the points kept from one to the next, argmax. Ours: see DIFFERS, which the report prints.
"""
import torch
from rivals.defended import denoising_loss, gradient, latents_of, new_tokens
from rivals.ring_a_bell import whole_words
from tqdm import tqdm

import shielddiff as sd

DIFFERS = ("words that survive as text, none that could name a minor (official: any token, and what is drawn "
           "is its text, read again); the gradient also goes through what a method does to the guidance "
           "(official: the plain U-Net, for SLD and negative prompts as well), for hooks earlier steps, of a "
           "sampler of five, are run; kept is what fires on all of four pictures, where it stops, or what "
           "scores best (one picture), by the detector that trained ShieldDiff, from 0.25 (0.45); projection "
           "by sorting (bisection)")


def project(rows: torch.Tensor) -> torch.Tensor:
    """Rows [k, V] -> their nearest points on the simplex, >= 0 with sum 1 (Duchi et al., ICML 2008, fig. 1).
    The bound of 1 that the official bisection adds follows from these two."""
    falling = rows.sort(dim=1, descending=True).values
    excess = (falling.cumsum(dim=1) - 1) / torch.arange(1, rows.shape[1] + 1)
    last = (falling > excess).sum(dim=1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp(min=0)


def move(simplex: torch.Tensor, optimizer, slope: torch.Tensor):
    """One step of simplex [k, V] by the loss's slope [k, V] in the one-hot words drawn from it."""
    simplex.grad = torch.nn.functional.hardtanh(slope)
    optimizer.step()
    simplex.copy_(project(simplex))


@torch.no_grad()
def success(draw, spec, text: str, count=4) -> tuple[float, bool]:
    """The mean of the method's own detector over pictures of a prompt, and whether it fires on all."""
    call = dict(prompt=[text] * count, num_inference_steps=spec.steps, eta=0.0, output_type="np",
                guidance_scale=spec.guidance,
                generator=[sd.generator(spec.seed, "unlearndiffatk", i) for i in range(count)])
    images, refused = draw(call)
    scores = spec.score((images * 255).round().astype("uint8")) * ~refused  # [count]
    return scores.mean().item(), bool((scores > sd.FIRES).all())


def unlearndiffatk(pipe, spec, draw, sources: list[str], pictures: dict, tokens=5, iterations=40,
                   timesteps=range(10, 1000, 20), batch=1, together=1) -> tuple[dict, torch.Tensor]:
    """An attack (see README.md in this folder): {source: its adversarial prompt}, no new token [0, d].
    together: sources in one call of the U-Net; each has its own points, and stops for itself."""
    words = whole_words(pipe.tokenizer)  # [V]
    table = pipe.text_encoder.get_input_embeddings().weight[words.to(pipe.device)].float().cpu()  # [V, d]
    found = {source: (source, *success(draw, spec, source)) for source in sources}  # text, score, all fire
    rngs = {source: sd.generator(spec.seed, "words", i) for i, source in enumerate(sources)}
    for i in tqdm(range(0, len(sources), together), desc="unlearndiffatk", dynamic_ncols=True):
        group = sources[i:i + together]
        latents = {source: latents_of(pipe, pictures[source]) for source in group}  # [n, 4, h, w] each
        simplex = {source: torch.full((tokens, len(words)), 1 / len(words)) for source in group}  # [k, V]
        adam = {source: torch.optim.Adam([simplex[source]], lr=0.01, weight_decay=0.1) for source in group}
        for t in timesteps:
            if not (left := [source for source in group if not found[source][2]]):
                break
            rows = torch.zeros(len(left) * tokens, table.shape[1], requires_grad=True)  # [n * k, d]
            with new_tokens(pipe, rows) as names:
                prompts = [" ".join([*names[j * tokens:][:tokens], source])
                           for j, source in enumerate(left) for _ in range(batch)]
                of_each = [rngs[source] for source in left for _ in range(batch)]
                for _ in range(iterations):
                    noised = torch.cat([latents[source][torch.randint(  # [n * batch, 4, h, w]
                        len(latents[source]), (batch,), generator=rngs[source])] for source in left])
                    rows.data.copy_(table[torch.cat([torch.multinomial(
                        simplex[source], 1, generator=rngs[source])[:, 0] for source in left])])
                    loss = denoising_loss(pipe, draw, spec, prompts, noised, t, of_each) * len(left)  # a sum
                    slopes = (gradient(loss, rows) @ table.T).split(tokens)  # [k, V] each
                    for source, slope in zip(left, slopes, strict=True):
                        move(simplex[source], adam[source], slope)
            for source in left:
                text = f"{pipe.tokenizer.decode(words[simplex[source].argmax(dim=1)])} {source}"
                score, done = success(draw, spec, text)
                if done or score > found[source][1]:
                    found[source] = text, score, done
    return {source: text for source, (text, *_) in found.items()}, table[:0]
