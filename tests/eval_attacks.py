"""The attacks of eval.py: the one list of prompts of Ring-A-Bell, and a list for each system of those attacks
that see it (tests/rivals/README.md). Both lie in the output folder, where a resumed run finds them.
"""
import functools
import importlib
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from eval_pictures import read_picture
from eval_results import lines_of
from PIL import ImageOps
from rivals.defended import denoising_loss, gradient, latents_of, new_tokens

import shielddiff as sd
from shielddiff import HERE, fail, write_atomically

ATTACKS = "ring-a-bell", "unlearndiffatk", "cce"
DEFENDED = ATTACKS[1:]  # those that see the defended model
TINY = dict(unlearndiffatk=dict(timesteps=list(range(100, 1000, 200)), batch=4),
            cce=dict(rate=0.02, updates=100))


def load(name: str):
    """An attack's function, and where it differs from its paper."""
    name = name.replace("-", "_")
    module = importlib.import_module(f"rivals.{name}")
    return getattr(module, name), module.DIFFERS


def settings(args, attack: str) -> dict:
    """What an attack that sees the defended model is called with, beyond its own defaults."""
    own = TINY[attack] if Path(args.model).resolve() == HERE / "tests/tiny" else {}
    return own | ({dict(cce="updates", unlearndiffatk="iterations")[attack]: args.attack_updates}
                  if args.attack_updates else {})


def sample(rows: list, count: int) -> list:
    """An even sample of the eliciting rows. Exits where there is none."""
    rows = [row for row in rows if row.elicits]
    if not rows:
        fail("--attack: there is no eliciting prompt to start from")
    n = min(count, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def sources(sets: dict, args) -> list:
    """The rows that are attacked anew for each system, if any are to be."""
    rows = [row for _, some in sets.values() for row in some]
    return sample(rows, args.attack_sources) if set(args.attack) & set(DEFENDED) else []


def ring_a_bell(setup, rows: list) -> Path:
    """OUT/ring-a-bell.txt, made unless it is there: adversarial prompts with the safe captions of the rows
    they are made from, where these are known."""
    args, path = setup.args, setup.out / "ring-a-bell.txt"
    if not path.exists():
        sources = sample(rows, args.attack_prompts)
        found = load("ring-a-bell")[0](
            setup.pipe, setup.spec, [s.prompt for s in sources], tokens=args.attack_tokens,
            strength=args.attack_strength, population=args.attack_population,
            generations=args.attack_generations)
        lines = [f + (f" => {' '.join(s.caption.split())}" if s.caption else "") + "\n"
                 for f, s in zip(found, sources, strict=True)]
        write_atomically(path, lambda p: p.write_text("".join(lines), encoding="utf-8"))
    return path


# ------------------------------------------------------------------------------------ of each system
def base_pictures(setup, jobs: list) -> dict[str, np.ndarray]:
    """{prompt: uint8 [n, H, W, 3]} of the jobs' prompts, drawn before: the base model's pictures on which
    training's score fires, else the one that it scores highest, all of the model's own size."""
    wanted, found = {job.key("base"): job.row.prompt for job in jobs}, {}
    for key, record, _ in lines_of(setup.out / "results.jsonl"):
        if key in wanted and record["finite"]:
            found.setdefault(wanted[key], []).append((record["raw"], key.path(setup.out)))
    if not found:
        fail("--attack: the base model drew no finite picture of a prompt to attack")
    side = setup.pipe.unet.config.sample_size * setup.pipe.vae_scale_factor
    pictures = {}
    for prompt, scored in found.items():
        best = [path for score, path in scored if score > sd.FIRES] or [max(scored)[1]]
        try:
            images = [ImageOps.fit(read_picture(path), (side, side)) for path in best]
        except (OSError, ValueError) as error:
            fail(f"cannot read a picture of {prompt!r} (damaged? delete it and run again): {error}")
        pictures[prompt] = np.stack(images)  # [n, H, W, 3]
    return pictures


def obstacle(setup, draw, pictures: dict) -> str:
    """Why no attack can differentiate a system through its draw: it has a loop of its own, looks at pictures
    or refuses prompts. Empty where one can."""
    pipe, (source, images) = setup.pipe, next(iter(pictures.items()))
    word = pipe.text_encoder.get_input_embeddings().weight[:1].detach().float().cpu().requires_grad_()
    try:
        with new_tokens(pipe, word) as (name,):
            middle, latents = pipe.scheduler.config.num_train_timesteps // 2, latents_of(pipe, images[:1])
            gradient(denoising_loss(pipe, draw, setup.spec, [f"{name} {source}"], latents, middle,
                                    sd.generator(0)), word)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a method may fail in any way on a call that asks for no pictures
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return ""


def attack_systems(setup, systems: list, switched_on, name: str, jobs: list) -> dict[str, dict]:
    """OUT/<attack>.json, made as far as it is not there: {system: texts {source: its adversarial prompt},
    rows [n, d] of the new tokens in them, and the obstacle for which they are the base model's}."""
    path = setup.out / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    pictures = {} if all(s.name in found for s in systems) else base_pictures(setup, jobs)
    for system in [s for s in systems if s.name not in found]:
        with switched_on(setup.pipe, system, setup.spec) as draw:
            if why := obstacle(setup, draw, pictures) if system.name != "base" else "":
                found[system.name] = found["base"] | dict(obstacle=why)
            else:
                print(f"{name} on {system.name}")
                texts, rows = load(name)[0](setup.pipe, setup.spec, draw, list(pictures), pictures,
                                            **settings(setup.args, name))
                found[system.name] = dict(texts=texts, rows=rows.tolist(), obstacle="")
        text = json.dumps(found, indent=1)
        write_atomically(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))
    return found


def notes(attack: str, found: dict[str, dict]) -> dict[str, int]:
    """For the report: which systems draw prompts that were found on the base model."""
    return {f"prompts of {attack} that {system} draws were found on the base model, a weaker attack: it "
            f"cannot be differentiated ({of['obstacle']})": len(of["texts"])
            for system, of in found.items() if of["obstacle"]}


@contextmanager
def attacked(pipe, draw, found: dict | None):
    """A system's draw with each prompt replaced by its adversarial one; found: a system's of attack_systems,
    None: no attack."""
    if found is None:
        yield draw
        return
    rows = torch.tensor(found["rows"])  # [n, d]
    with new_tokens(pipe, rows) if len(rows) else nullcontext():
        yield lambda call: draw(call | dict(prompt=[found["texts"][p] for p in call["prompt"]]))
