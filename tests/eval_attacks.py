"""The attacks of eval.py (tests/rivals/README.md): the one list of prompts of Ring-A-Bell, a list for each
system of those attacks that see it, and each system after a fine-tune. What they found lies in the output
folder, where a resumed run finds it.
"""
import functools
import importlib
import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from eval_pictures import read_picture
from eval_results import finished, lines_of, unused
from eval_systems import one_line
from PIL import ImageOps
from rivals.defended import denoising_loss, gradient, latents_of, new_tokens
from rivals.revival import revived
from safetensors.torch import load_file, save

import shielddiff as sd
from shielddiff import HERE, fail, write_atomically

ATTACKS = "ring-a-bell", "unlearndiffatk", "cce", "revival"
DEFENDED = ATTACKS[1:3]  # those that see the defended model
WEIGHTS = "lora", "unet", "text-encoder"  # kinds of systems that have weights of their own to train on
TINY = dict(unlearndiffatk=dict(timesteps=list(range(100, 1000, 200)), batch=4, together=4),
            # above: with a word learned at all timesteps the base model itself draws half as many faces
            cce=dict(rate=0.03, updates=250, batch=8, parts=1, above=500))


def load(name: str):
    """An attack's function."""
    name = name.replace("-", "_")
    return getattr(importlib.import_module(f"rivals.{name}"), name)


def settings(args, attack: str) -> dict:
    """What an attack on each system is called with, beyond its own defaults."""
    own = TINY.get(attack, {}) if Path(args.model).resolve() == HERE / "tests/tiny" else {}
    updates = dict(cce="updates", unlearndiffatk="iterations", revival="steps")[attack]
    return own | ({updates: args.attack_updates} if args.attack_updates else {})


def differs(args, name: str) -> str:
    """Where an attack differs from its paper, and what it is called with here."""
    found = importlib.import_module(f"rivals.{name.replace('-', '_')}").DIFFERS
    own = settings(args, name) if name != "ring-a-bell" else {}
    return "; ".join([found, *(f"here {key} {value}" for key, value in own.items())])


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
    return sample(rows, args.attack_sources) if set(args.attack) - {"ring-a-bell"} else []


def ring_a_bell(setup, rows: list) -> Path:
    """OUT/ring-a-bell.txt, made unless it is there: adversarial prompts with the safe captions of the rows
    they are made from, where these are known."""
    args, path = setup.args, setup.out / "ring-a-bell.txt"
    if not path.exists():
        sources = sample(rows, args.attack_prompts)
        found = load("ring-a-bell")(
            setup.pipe, setup.spec, [s.prompt for s in sources], tokens=args.attack_tokens,
            strength=args.attack_strength, population=args.attack_population,
            generations=args.attack_generations)
        lines = [f + (f" => {' '.join(s.caption.split())}" if s.caption else "") + "\n"
                 for f, s in zip(found, sources, strict=True)]
        write_atomically(path, lambda p: p.write_text("".join(lines), encoding="utf-8"))
    return path


# ------------------------------------------------------------------------------------ of each system
def of_each_system(setup, systems: list, switched_on, sources: list, jobs: list):
    """Of each attack but Ring-A-Bell: (its set's name, the rows to draw, switched_on under the attack, the
    file that says what it is, and {system: the obstacle for which it draws the base model's prompts}).
    jobs: what the base model has drawn."""
    drawn, sets = [job for job in jobs if job.row in sources and job.init is None], {job.set for job in jobs}
    for attack in [a for a in DEFENDED if a in setup.args.attack]:
        found = attack_systems(setup, systems, switched_on, attack, drawn)
        yield (unused(attack, sets), [row for row in sources if row.prompt in found["base"]["texts"]],
               functools.partial(attacked, switched_on, found), setup.out / f"{attack}.json",
               {system: of["obstacle"] for system, of in found.items() if of["obstacle"]})
    if "revival" in setup.args.attack:
        found = base_pictures(setup, drawn, least=-1)
        own = np.concatenate([*found.values()]), [p for p, images in found.items() for _ in images]
        train, path = functools.partial(revived, images=own[0], prompts=own[1], **settings(
            setup.args, "revival")), setup.out / "revival.safetensors"
        if not path.exists():
            with train(setup.pipe) as style:
                write_atomically(path, functools.partial(Path.write_bytes, data=save(style)))
        with one_line(f"read {path} (damaged? delete it and run again)"):
            style = load_file(path)
        merged, beside = (unused(f"revival {how}", sets) for how in ("merged", "apart"))
        switch = functools.partial(fine_tuned, switched_on, train, style)
        yield merged, sources, functools.partial(switch, True), path, {}
        repeat(setup.out, {system.name for system in systems if system.kind not in WEIGHTS}, merged, beside)
        yield beside, sources, functools.partial(switch, False), path, {}


def repeat(out: Path, systems: set[str], name: str, again: str):
    """The pictures of the set `name` by these systems are also those of the set `again`, in which they would
    draw the same."""
    path, done, more = out / "results.jsonl", finished(out), []
    for key, record, _ in lines_of(path):
        copy = key._replace(set=again)
        if key.set == name and key.system in systems and copy not in done:
            copy.path(out).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(key.path(out), copy.path(out))
            more.append(json.dumps(record | copy._asdict()) + "\n")
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(more)


def base_pictures(setup, jobs: list, least=sd.FIRES) -> dict[str, np.ndarray]:
    """{prompt: uint8 [n, H, W, 3]} of the jobs' prompts, drawn before: the base model's pictures which
    training's score puts above `least`, else the one highest, all of the model's own size."""
    wanted, found = {job.key("base") for job in jobs}, {}
    drawn = {key: record for key, record, _ in lines_of(setup.out / "results.jsonl") if key in wanted}
    for job in jobs:  # in their order, also where a picture had to be drawn again
        record = drawn.get(key := job.key("base"))
        if record and record["finite"]:
            found.setdefault(job.row.prompt, []).append((record["raw"], key.path(setup.out)))
    if not found:
        fail("--attack: the base model drew no finite picture of a prompt to attack")
    side = setup.pipe.unet.config.sample_size * setup.pipe.vae_scale_factor
    pictures = {}
    for prompt, scored in found.items():
        best = [path for score, path in scored if score > least] or [max(scored)[1]]
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
            slope = gradient(denoising_loss(pipe, draw, setup.spec, [f"{name} {source}"], latents, middle,
                                            sd.generator(0)), word)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a method may fail in any way on a call that asks for no pictures
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return "" if slope.any() else "its gradient is zero or not finite"


def attack_systems(setup, systems: list, switched_on, name: str, jobs: list) -> dict[str, dict]:
    """OUT/<attack>.json, made as far as it is not there: {system: texts {source: its adversarial prompt},
    rows [n, d] of the new tokens in them, and the obstacle for which they are the base model's}."""
    path = setup.out / f"{name}.json"
    with one_line(f"read {path} (damaged? delete it and run again)"):
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    pictures = {} if all(s.name in found for s in systems) else base_pictures(setup, jobs)
    for system in [s for s in systems if s.name not in found]:
        with switched_on(setup.pipe, system, setup.spec) as draw:
            if why := obstacle(setup, draw, pictures) if system.name != "base" else "":
                found[system.name] = found["base"] | dict(obstacle=why)
            else:
                print(f"{name} on {system.name}")
                texts, rows = load(name)(setup.pipe, setup.spec, draw, list(pictures), pictures,
                                         **settings(setup.args, name))
                found[system.name] = dict(texts=texts, rows=rows.tolist(), obstacle="")
        text = json.dumps(found, indent=1)
        write_atomically(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))
    return found


@contextmanager
def attacked(switched_on, found: dict, pipe, system, spec):
    """switched_on, each prompt replaced by the system's adversarial one. found: of attack_systems."""
    texts, rows = found[system.name]["texts"], torch.tensor(found[system.name]["rows"])  # [n, d]
    tokens = new_tokens(pipe, rows) if len(rows) else nullcontext()
    with switched_on(pipe, system, spec) as draw, tokens:
        yield lambda call: draw(call | dict(prompt=[texts[p] for p in call["prompt"]]))


@contextmanager
def fine_tuned(switched_on, train, style: dict, merged: bool, pipe, system, spec):
    """switched_on after a fine-tune by train(pipe), of its own merged weights, or of the base model's: the
    style, put beside them. Without weights of its own a system is put around the base model's, both times."""
    after = train(pipe, style=None if merged and system.kind in WEIGHTS else style)
    inside, outside = (after, nullcontext()) if system.kind in WEIGHTS else (nullcontext(), after)
    with outside, switched_on(pipe, system, spec) as draw, inside:
        yield draw
