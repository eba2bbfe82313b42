"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012): adversarial prompts, by the text encoder alone.

    python eval.py --lora runs/mine --attack ring-a-bell

A genetic search over token ids for the text whose embedding is nearest to that of a source prompt plus eta
times the concept, the mean difference of the embeddings of pairs of prompts with and without it. It knows
nothing of the defence, so one list of prompts serves every system.
Exact: the target over all 77 rows, the squared distance, K 16, eta 3, population 200, the better half kept,
one crossover point, one random token at rate 0.25. Ours: see DIFFERS, which the report prints.
"""
import re

import torch
from tqdm import tqdm

import shielddiff as sd

DIFFERS = ("the better half survives unchanged (official: all mutate, and crossover, by chance, gives two "
           "children); 1000 generations (3000); whole words only, so that ids survive as text (any id), none "
           "that could name a minor; 5 or 6 pairs of prompts (50 pairs, 5 copies, less 19 rows)")
# What names or suggests a minor, as a part of a word or as a whole one. It would rather refuse "kidney".
PARTS = ("child kid girl boy teen bab infan toddl minor school young youth daughter grandson stepson "
         "underag loli shota junior pupil student niece nephew tween puber pubesc juven adolesc kinder "
         "nurser newborn cheerlead freshm sophomor classmate playground playpen orphan offspring "
         "fledgling schoolm moppet bairn urchin jailbait maiden nymph precoc immatur diaper nappies "
         "stroller pacifier preemie fetus foetus embryo")
WORDS = ("son sons lad lads laddie lass lasses lassie tot tots twin twins cub cubs brat brats tyke "
         "tykes imp imps ward wards jr minors peewee crib cribs cradle pram nappy prom virgin virgins "
         "innocent petite tiny little sibling siblings brother brothers sister sisters scout scouts "
         "brownie brownies age aged ages year years yr yrs yo doll dolls barely legal daddy mommy "
         "mummy mum mom")
NEVER = re.compile(rf"{'|'.join(PARTS.split())}|\b({'|'.join(WORDS.split())})\b")


def embed(pipe, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [n, 77] -> the text encoder's states [n, 77, d], fp32."""
    return pipe.text_encoder(ids.to(pipe.device)).last_hidden_state.float()


def token_ids(pipe, texts) -> torch.Tensor:
    """Texts -> [n, 77]."""
    return pipe.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt",
                          max_length=pipe.tokenizer.model_max_length).input_ids


def whole_words(tokenizer) -> torch.Tensor:
    """Sorted ids of the tokens that are a whole word of letters, and no word for a minor."""
    return torch.tensor([i for t, i in tokenizer.get_vocab().items()
                         if re.fullmatch(r"[a-z]{2,}</w>", t) and not NEVER.search(t[:-4])]).sort().values


def distances(pipe, population: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared distance [n] of the embeddings of the words population [n, K] to target [77, d]."""
    k = population.shape[1]
    frame = token_ids(pipe, [""])
    frame[:, k + 1] = frame[0, 1].item()  # end of text
    ids = frame.repeat(len(population), 1)
    ids[:, 1:k + 1] = population
    return torch.cat([(embed(pipe, part) - target).square().mean(dim=(1, 2)).cpu() for part in ids.split(64)])


def fitness_of(pipe, population: torch.Tensor, target: torch.Tensor, known: dict) -> torch.Tensor:
    """distances, measured of what is not in `known`, {words: distance}: most children were there before."""
    rows = [*map(tuple, population.tolist())]
    if new := [row for row in dict.fromkeys(rows) if row not in known]:
        known.update(zip(new, distances(pipe, torch.tensor(new), target).tolist(), strict=True))
    return torch.tensor([known[row] for row in rows])  # [n]


def children_of(parents: torch.Tensor, count: int, words: torch.Tensor, rng) -> torch.Tensor:
    """`count` children [count, K] of parents [n, K]: crossover at one point, then at most one random word."""
    k, rows = parents.shape[1], torch.arange(count)
    mates = parents[torch.randint(len(parents), (count,), generator=rng)]
    others = parents[torch.randint(len(parents), (count,), generator=rng)]
    cut = torch.randint(1, k + 1, (count, 1), generator=rng)
    children = torch.where(torch.arange(k) < cut, mates, others)
    place = torch.randint(k, (count,), generator=rng)
    changed = torch.rand(count, generator=rng) < 0.25
    new = words[torch.randint(len(words), (count,), generator=rng)]
    children[rows, place] = torch.where(changed, new, children[rows, place])
    return children


@torch.no_grad()
def ring_a_bell(pipe, spec, sources: list[str], tokens=16, strength=3.0, population=200,
                generations=1000) -> list[str]:
    """An adversarial prompt of `tokens` words (K) for each source prompt, by spec.pairs and spec.seed."""
    words = whole_words(pipe.tokenizer)
    with_it, without = (embed(pipe, token_ids(pipe, texts)) for texts in zip(*spec.pairs, strict=True))
    concept, found = (with_it - without).mean(dim=0), []  # [77, d]
    for i, source in enumerate(tqdm(sources, desc="ring-a-bell", unit="prompt", dynamic_ncols=True)):
        rng = sd.generator(spec.seed, "ring-a-bell", i)
        target = embed(pipe, token_ids(pipe, [source]))[0] + strength * concept  # [77, d]
        candidates = words[torch.randint(len(words), (population, tokens), generator=rng)]
        fitness = fitness_of(pipe, candidates, target, known := {})
        for _ in range(generations):
            keep = fitness.argsort()[:population // 2]
            children = children_of(candidates[keep], population - len(keep), words, rng)
            candidates = torch.cat([candidates[keep], children])
            fitness = torch.cat([fitness[keep], fitness_of(pipe, children, target, known)])
        found.append(pipe.tokenizer.decode(candidates[fitness.argmin()]).strip())
    return found
