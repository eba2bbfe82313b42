"""How often the intervals of eval_statistics.py hold the truth, on drawn data of which the truth is known.

Prompts differ: each has its own rate, from a beta distribution whose `alike` is the correlation of two
pictures of one prompt. The prompts are drawn anew every time, and the truth is that of all prompts.
"""
import functools

import eval_statistics as es
import numpy as np

SHAPES = ((8, 8), (16, 8), (40, 4), (96, 1))  # prompts, pictures of each


def rates(rng, prompt, rate, alike):
    """Each picture's chance [N]: that of its prompt."""
    n = prompt.max() + 1
    k = 1 / alike - 1
    return (rng.beta(rate * k, (1 - rate) * k, n) if alike < 1 else rng.random(n) < rate)[prompt]


def draw_rate(rng, prompt, rate, alike):
    return es.rate(rng.random(len(prompt)) < rates(rng, prompt, rate, alike), prompt), rate


def draw_nrr(rng, prompt, left, alike):
    """Boxes: none, or one and more in a picture that fires; `left` of the base model's remain."""
    p = rates(rng, prompt, 0.6, alike)
    before, after = ((rng.random(len(p)) < q) * (1 + rng.poisson(0.5, len(p))) for q in (p, left * p))
    return es.nrr(before, after, prompt), 1 - left


def draw_gap(rng, prompt, left, fooled, alike):
    """Two detectors that see 90 and 80 %; of what is left the first is fooled by a share."""
    p, n = rates(rng, prompt, 0.6, alike), len(prompt)
    before, after = rng.random(n) < p, rng.random(n) < left * p
    one = before & (rng.random(n) < 0.9), after & (rng.random(n) < 0.9 * (1 - fooled))
    other = before & (rng.random(n) < 0.8), after & (rng.random(n) < 0.8)
    return es.nrr_gap(one, other, prompt), left * fooled


def draw_mean(rng, prompt, alike):
    """A change of scores in -1 .. 1, in some prompts and not in others."""
    change = rates(rng, prompt, 0.3, alike) + 0.2 * rng.standard_normal(len(prompt))
    return es.mean(change, prompt), 0.3


def draw_safe(rng, prompt, safe):
    """Scores of prompts that differ, whose safe pictures score 0.3 less: some have few of them, some none."""
    score, change = rng.uniform(0.3, 0.9, prompt.max() + 1)[prompt], rng.normal(-0.1, 0.1, prompt.max() + 1)
    is_safe = rng.random(len(prompt)) < rates(rng, prompt, safe, 0.2)
    before, after = (x + 0.05 * rng.standard_normal(len(prompt))
                     for x in (score - 0.3 * is_safe, score - 0.3 + change[prompt]))
    return es.change_to_safe(before, after, is_safe, prompt), -0.1


def draw_worst(rng, prompt, uneven):
    """Of prompts that keep 95 % and one that keeps 85; some are noisier. Truth: of the one picked."""
    n = prompt.max() + 1
    kept, score = np.full(n, 0.95), rng.uniform(0.7, 0.9, n)[prompt]
    kept[0] = 0.85
    noise = 0.05 * np.exp(uneven * rng.standard_normal(n))[prompt]
    before, after = (m * score + noise * rng.standard_normal(len(prompt)) for m in (1, kept[prompt]))
    found = es.worst_kept(before, after, prompt)
    return found, kept[found["prompt"]]


def draw_kid(rng, prompt, shift):
    """Features that scatter about their prompt's; the truth is the mean of this estimate."""
    centre = rng.normal(size=(prompt.max() + 1, 16))[prompt] + 1
    move = shift * (1 - 2 * (np.arange(16) % 2))
    x, y = (v + 0.5 * rng.normal(size=v.shape) for v in (centre, centre + move))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return es.clip_kid(x, y, prompt), None


CASES = {  # what: (drawn how, its settings)
    "rate": (draw_rate, [dict(rate=r, alike=a) for r in (0.02, 0.1, 0.3, 0.5) for a in (0.001, 0.1, 0.4, 1)]),
    "NRR": (draw_nrr, [dict(left=r, alike=a) for r in (0.02, 0.1, 0.4, 0.9) for a in (0.1, 0.4)]),
    "gap": (draw_gap, [dict(left=r, fooled=f, alike=0.2)
                       for r, f in ((0.1, 0), (0.1, 0.5), (0.5, 0), (0.5, 0.8))]),
    "mean": (draw_mean, [dict(alike=a) for a in (0.1, 0.5)]),
    "CLIP to base's safe": (draw_safe, [dict(safe=s) for s in (0.1, 0.3, 0.7)]),
    "CLIP-KID": (draw_kid, [dict(shift=s) for s in (0, 0.2, 1)]),
    "worst prompt": (draw_worst, [dict(uneven=u) for u in (0, 0.3, 0.6)])}


def covered(draw, shape, draws: int) -> dict:
    """Of `draws` data sets: shares of intervals given, that hold truth and estimate, and their mean width."""
    prompt, rng = np.repeat(np.arange(shape[0]), shape[1]), np.random.default_rng(0)
    found = [draw(rng, prompt) for _ in range(draws)]
    found = [(n, truth) for n, truth in found if n["low"] is not None]
    if not found:
        return dict(given=0.0)
    low, value, high = (np.array([n[k] for n, _ in found]) for k in ("low", "value", "high"))
    truth = np.array([value.mean() if truth is None else truth for _, truth in found])
    return dict(given=len(found) / draws, covers=np.mean((low <= truth) & (truth <= high)),
                holds_estimate=np.mean((low <= value) & (value <= high)), width=np.mean(high - low))


def table(draws=2000) -> list[dict]:
    """A row a statistic and shape: its lowest and highest coverage over the settings, its mean width."""
    rows = []
    for what, (draw, cases) in CASES.items():
        for shape in SHAPES:
            found = [covered(functools.partial(draw, **case), shape, draws) for case in cases]
            if found[0]["given"]:
                covers = [f["covers"] for f in found]
                rows.append(dict(
                    interval=what, prompts=shape[0], pictures_each=shape[1], settings=len(cases),
                    covers_at_least=float(min(covers)), covers_at_most=float(max(covers)),
                    holds_estimate=float(min(f["holds_estimate"] for f in found)),
                    width=float(np.mean([f["width"] for f in found]))))
    return rows
