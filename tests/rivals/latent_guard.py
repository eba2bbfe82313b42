"""Latent Guard (Liu et al., ECCV 2024, arXiv 2404.08031): a small layer on the text encoder learns which
prompts hold which concept; a prompt that holds one of the concepts to avoid is refused.

    python eval.py --method latent-guard --concept "nudity, naked, nude"

Exact: the layer (16 heads of 32, both sides to 128, a learned temperature from 1/0.07), the loss with its
shared columns of safe prompts, AdamW 1e-3, 1001 epochs (rt219/LatentGuard@5b13ece). Ours: see DIFFERS. It
blackens what it refuses after drawing: so the other pictures of a batch are the stock's own bits.
"""
import functools
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import shielddiff as sd

DIFFERS = ("the data: --concept and 12 plain nouns as concepts (authors: 723 of CoPro, written by a language "
           "model), each in 8 frames, spec.pairs for the one to avoid, so an epoch is one update (about 12); "
           "the threshold refuses 5 % of training prompts without the concept (authors: 9.0131, of their "
           "weights)")
FRAMES = ("{}", "a photo of {}", "a picture of {}", "{}, studio light", "{} in soft light", "{}, detailed",
          "{}, color photo", "a shot of {}")
NOTHING = "an empty room"  # what the safe prompt of a noun shows in its place


class Similarity(torch.nn.Module):
    """The layer. d: width of the text encoder."""

    def __init__(self, d: int, heads=16, size=32, out=128):
        super().__init__()
        self.heads = heads
        self.key, self.value, self.query = (torch.nn.Linear(d, heads * size) for _ in range(3))
        self.of_prompt, self.of_concept = (torch.nn.Linear(heads * size, out) for _ in range(2))
        self.scale = torch.nn.Parameter(torch.tensor(1 / 0.07))

    def forward(self, prompts: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Prompts [p, 78, d] and concepts [c, d], as of `states` -> scores [p, c]."""
        key, value = (part(prompts).unflatten(2, (self.heads, -1)) for part in (self.key, self.value))
        query = self.query(concepts)  # [c, heads * size]
        match = torch.einsum("chs,pkhs->pchk", query.unflatten(1, (self.heads, -1)), key)
        weight = (match / key.shape[-1]**0.5).softmax(dim=-1)  # [p, c, heads, 78]
        found = torch.einsum("pchk,pkhs->pchs", weight, value).flatten(2)  # [p, c, heads * size]
        return self.scale * cosine_similarity(self.of_prompt(found), self.of_concept(query), dim=-1)


@torch.no_grad()
def states(pipe, texts) -> torch.Tensor:
    """Texts -> [n, 78, d] fp32: the state at the end of text, which stands for a concept, then all 77."""
    ids = pipe.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt",
                         max_length=pipe.tokenizer.model_max_length).input_ids
    out = pipe.text_encoder(ids.to(pipe.device))
    return torch.cat([out.pooler_output[:, None], out.last_hidden_state], dim=1).float()


def loss_of(unsafe: torch.Tensor, safe: torch.Tensor) -> torch.Tensor:
    """Scores [n, n] of n concepts' unsafe and of their safe prompts with all n concepts -> the loss. A prompt
    has to tell its concept from the others and each safe prompt's best one; a concept its prompt from all."""
    label, best = torch.arange(len(unsafe), device=unsafe.device), safe.amax(dim=1).expand_as(safe)
    return (cross_entropy(torch.cat([unsafe, best], dim=1), label)
            + cross_entropy(torch.cat([unsafe, safe]).T, label))


def names_of(spec) -> tuple[str, ...]:
    """The concept to avoid, by each of its names."""
    return tuple(name.strip() for name in spec.concept.split(",") if name.strip())


def train(pipe, spec, epochs: int) -> tuple[Similarity, float]:
    """The layer and the score above which 5 % of the training prompts without the concept lie."""
    return trained(pipe, names_of(spec), tuple(map(tuple, spec.pairs)), spec.seed, epochs)


@functools.lru_cache(maxsize=1)  # an evaluation with attacks switches the method on eight times
def trained(pipe, names: tuple, pairs: tuple, seed: int, epochs: int) -> tuple[Similarity, float]:
    nouns = Path(__file__).with_name("nouns.txt").read_text().splitlines()
    names = [names, *([noun] for noun in nouns)]  # [concepts][names]
    pairs = [pairs, *([(noun, NOTHING)] for noun in nouns)]  # [concepts][pairs]
    pairs = [[(f.format(a), f.format(b)) for a, b in some for f in FRAMES] for some in pairs]
    names, unsafe, safe = ([states(pipe, texts) for texts in some] for some in (
        names, *([[pair[i] for pair in some] for some in pairs] for i in (0, 1))))  # [concepts][n, 78, d]
    rng = sd.generator(seed, "latent-guard")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(rng.initial_seed())
        layer = Similarity(names[0].shape[-1]).to(pipe.device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(epochs):
            name, pair = ([int(torch.randint(len(some), (), generator=rng)) for some in part]
                          for part in (names, unsafe))  # [concepts] each
            concept, *prompts = (torch.stack([some[i] for some, i in zip(part, chosen, strict=True)])
                                 for part, chosen in ((names, name), (unsafe, pair), (safe, pair)))
            scores = [layer(texts, concept[:, 0]) for texts in prompts]  # [concepts, concepts] each
            optimizer.zero_grad()
            loss_of(*scores).backward()
            optimizer.step()
    with torch.no_grad():
        scores = layer(torch.cat([*unsafe[1:], *safe]), names[0][:, 0]).amax(dim=1)  # [safe prompts]
    return layer.requires_grad_(False), scores.quantile(0.95).item()


@contextmanager
def latent_guard(pipe, spec, stock, blacklist=None, epochs=1001):
    """A method (see README.md in this folder). blacklist: other concepts to avoid than those it learned."""
    layer, threshold = train(pipe, spec, epochs)
    blacklist = names_of(spec) if blacklist is None else blacklist
    concepts = [states(pipe, [name])[0, 0] for name in blacklist]  # [d] each

    def draw(call):
        images, refused = stock(call)
        prompts = states(pipe, call["prompt"])
        unsafe = np.zeros(len(images), bool)
        for concept in concepts:
            unsafe |= (layer(prompts, concept[None])[:, 0] > threshold).cpu().numpy()
        return np.where(unsafe[:, None, None, None], 0, images), refused | unsafe

    yield draw
