"""UCE, Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761): a closed form for the keys
and values of cross-attention, so that what they make of one text is what they made of another.

    python tests/rivals/uce.py --model tests/tiny --edits guided --out runs/uce-guided   # seconds
    python eval.py --model tests/tiny --unet uce=runs/uce-guided/unet

The minimum over W of  erase sum |W c_i - W0 c*_i|^2 + keep sum |W c_j - W0 c_j|^2 + lam |W - W0|^2.
Exact: the closed form, lam 0.5, erase 1, keep max(0.1, 1 / number of kept texts), all rows from the last word
of a text to the end aligned, the empty target written " ", all rows of "" kept: the old official code, which
made the published numbers. Ours: the words; the guided edits; the kept texts, which are the benign prompts of
--prompts; fp64; in eval.py --benchmark, for the embedded model, lam 0.05 and erase 100 (guided: 0.1), a
sweep's best. Every W is W0 times the same matrix, so UCE is a linear map of the text states.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import training
from training import sd

RIVALS = sd.HERE / "tests/rivals"


@dataclass
class Args(training.Args):
    prompts: str = str(sd.HERE / "prompts.txt")  # its benign ones, lines without ' => ', are kept
    # naive: the words, to the empty text; pairs: the lines of --pairs, 'text => target'; guided: the nouns,
    # to the caption that names the safe picture
    edits: Literal["naive", "pairs", "guided"] = "naive"
    words: tuple[str, ...] = ("nudity", "naked", "nude", "topless")
    pairs: str = str(RIVALS / "pairs_nudity.txt")
    nouns: tuple[str, ...] = ("a woman", "a man", "a person")
    safe: str = "{}, fully clothed"  # a noun's safe caption
    lam: float = 0.5  # weight of the distance to the old matrix
    erase: float = 1.0  # weight of a row of an edit
    keep: float = 0.0  # weight of a row of a kept text; 0: max(0.1, 1 / number of kept texts)


TINY = training.TINY | dict(prompts=sd.TINY["prompts"], words=("face", "smiling face"),
                            pairs=str(RIVALS / "pairs_faces.txt"),
                            nouns=("an astronaut", "a woman in a spacesuit", "a space pilot"),
                            safe="{}, face hidden")


def edits_of(args: Args) -> list[tuple[str, str]]:
    """(text, target) of each edit."""
    if args.edits == "pairs":
        return [pair[:2] for pair in sd.read_prompts(args.pairs)]
    if args.edits == "guided":
        return [(noun, args.safe.replace("{}", noun)) for noun in args.nouns]
    return [(word, "") for word in args.words]


@torch.no_grad()
def states(pipe, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """The text encoder's states [N, 77, d], fp64, and the row of each text's last word (0: it has none)."""
    tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt",
                            max_length=pipe.tokenizer.model_max_length)
    hidden = pipe.text_encoder(tokens.input_ids.to(pipe.device)).last_hidden_state.double()
    return hidden, (tokens.attention_mask.sum(dim=1) - 2).tolist()


def aligned(pipe, edits: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, d] of the texts and of their targets, from the last word of each to the end of the shorter."""
    rows = []
    for text, target in edits:
        hidden, last = states(pipe, [text, target or " "])
        count = hidden.shape[1] - max(last)
        rows.append(torch.stack([h[i:i + count] for h, i in zip(hidden, last, strict=True)]))  # [2, count, d]
    return torch.cat(rows, dim=1).unbind()


def edit_matrix(old, aim, kept, lam: float, erase: float, keep: float) -> torch.Tensor:
    """M [d, d] such that W0 M is the minimum: rows old [n, d] with targets aim [n, d], and kept [m, d]."""
    same = lam * torch.eye(old.shape[1]).to(old) + keep * kept.T @ kept
    return torch.linalg.solve(same + erase * old.T @ old, same + erase * aim.T @ old, left=False)


def projections(unet) -> dict[str, torch.nn.Linear]:
    """All that is edited, which is all that reads the text."""
    edited = ("attn2.to_k", "attn2.to_v")
    return {name: layer for name, layer in unet.named_modules() if name.endswith(edited)}


def train(args: Args):
    """OUT/unet."""
    pipe, started = training.start(args)
    kept_texts = ["", *(p for p, _, elicits in sd.read_prompts(args.prompts) if not elicits)]
    kept = states(pipe, kept_texts)[0].flatten(0, 1)  # [m, d]
    keep = args.keep or max(0.1, 1 / len(kept_texts))
    matrix = edit_matrix(*aligned(pipe, edits_of(args)), kept, args.lam, args.erase, keep)
    for layer in projections(pipe.unet).values():
        layer.weight.data = (layer.weight.double() @ matrix).float()
    training.save(args, pipe.unet, started)


if __name__ == "__main__":
    training.run(train, Args, TINY)
