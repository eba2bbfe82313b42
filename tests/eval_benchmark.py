"""`python eval.py --benchmark`: ShieldDiff, the rivals and every attack in one evaluation.

What has to be trained and is not there is trained by its own command, as anybody would: ShieldDiff to
runs/MODEL-0, the rivals to runs/rivals/NAME (NAME-MODEL unless it is the embedded model). Of the embedded
model, where there is no GPU, two are trained at a time, the base model evaluated as if it were one of them,
and then all the others by two processes. Everything goes on where it was stopped: a trained rival is kept,
ShieldDiff resumed, and so is the evaluation.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from eval_attacks import ATTACKS, DEFENDED
from eval_systems import one_line

import shielddiff as sd
from shielddiff import HERE, fail, write_atomically

WEIGHTS = dict(lora="pytorch_lora_weights.safetensors", unet="unet/diffusion_pytorch_model.safetensors")
RIVALS = {"esd-u": ("unet", "esd.py"), "esd-guided": ("unet", "esd.py", "--erase-from", "{}"),
          "sdd": ("unet", "sdd.py"), "sdd-guided": ("unet", "sdd.py"), "duo": ("lora", "duo.py"),
          "safegen": ("unet", "safegen.py"), "uce": ("unet", "uce.py"),  # the longest first
          "uce-guided": ("unet", "uce.py", "--edits", "guided")}  # name: kind of weights, script, its flags
CLOTHED = ("--concept", "a woman, a man, a person", "--toward", "{}, fully clothed")
HIDDEN = ("--concept", "an astronaut, a woman in a spacesuit, a space pilot", "--toward", "{}, face hidden")
# of our own training: what is said otherwise, or decides nothing that is learned
NOT_TOLD = "model clip_model prompts out steps resume save_every micro_batch show_uncensored".split()
# of one thread, for a system's pictures and attacks: by them the systems are dealt out to two processes
MINUTES = {"sld-max": 10, "sld-medium": 7, "crops": 6, "negative-prompt-guided": 4.5, "pno": 4, "safree": 2.5,
           "safree-guided": 2.5, "latent-mixing": 2.5, "latent-mixing-guided": 2.5, "latent-guard": 2}
OF_OTHERS = 3.5
# of glibc, else it returns a picture's tensors to the kernel each time: a twentieth of a process's time
ALLOCATOR = dict(MALLOC_MMAP_THRESHOLD_=str(2**25), MALLOC_TRIM_THRESHOLD_=str(2**30))
LEFT_OUT = "sld-weak", "sld-strong", "best-of-5"  # to save time; they can be named
STABLE_DIFFUSION = {"esd-guided": CLOTHED, "sdd-guided": CLOTHED}  # further flags there, and
EMBEDDED = {"esd-guided": (*HIDDEN, "--learning-rate", "1e-4"), "uce": ("--erase", "100", "--lam", "0.05"),
            "sdd-guided": (*HIDDEN, "--learning-rate", "3e-4"),
            "uce-guided": ("--erase", "0.1", "--lam", "0.05")}  # here: the best of rivals/sweep.py


def run(commands: list[list[str]], threads=0, beside=()):
    """Commands of this repository, one after the other, or two at a time with so many threads each, silent
    but for what they print; exits where one fails. An error, Ctrl-C or SIGTERM ends them. beside: processes
    at work, which count among the two."""
    waiting, running = [*commands], []
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by itself it would skip `finally`
    env = ALLOCATOR | dict(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1")
    try:
        while waiting or running or beside:
            beside = [process for process in beside if process.is_alive()]
            if waiting and len(running) + len(beside) < (2 if threads else 1):
                print(f"python {shlex.join(waiting[0])}", flush=True)
                running.append(subprocess.Popen([sys.executable, *waiting.pop(0)],
                                                env=os.environ | (env if threads else {})))
            for process in [p for p in running if p.poll() is not None]:
                running.remove(process)
                if code := process.returncode:
                    fail(f"--benchmark: this command ended with code {code}: python "
                         f"{shlex.join(process.args[1:])}. What is trained stays: mend it and run again")
            time.sleep(0.1)
    finally:
        for process in (*running, *beside):
            process.terminate()
        signal.signal(signal.SIGTERM, handler)


def read(path: Path) -> dict:
    """A JSON object of a file, empty where there is none."""
    with one_line(f"read {path} (damaged? move {path.parent} away)"):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(folder: Path, arguments: str, model: str, default=None):
    """Says that the weights of a folder stay as they are, and where they were not trained by default;
    refuses those of another base model."""
    then = read(folder / arguments)
    other = Path(then.get("model", model))
    moved = Path(model).exists() and not other.exists()  # else two of a hub
    if str(other) != model and not moved and other.resolve() != Path(model).resolve():
        fail(f"--benchmark: {folder} was trained on {other}, not on {model}: move it away")
    older = arguments == "args.json" and {field.name for field in dataclasses.fields(sd.Args)} - set(then)
    said = ["by an older version"] * bool(older)
    if "steps" in then:  # closed forms have none
        said.append(f"of {then['steps']} steps")
    said += [f"with {name} {then[name]}, not {value}" for name, value in json.loads(json.dumps(
        default or {})).items() if name not in NOT_TOLD and then.get(name, value) != value]
    print(f"{', '.join([f'{folder} is there', *said])}: delete it to train it anew")


def is_trained(folder: Path) -> bool:
    """Whether a ShieldDiff run has taken its last step. There are weights from the first on, which say
    nothing; metrics.jsonl has a line a step and is written before the weights."""
    weights, metrics, arguments = (folder / name for name in (WEIGHTS["lora"], "metrics.jsonl", "args.json"))
    return all(path.exists() for path in (weights, metrics, arguments)) and (
        metrics.read_text().count("\n") >= read(arguments).get("steps", math.inf)
        and weights.stat().st_mtime >= metrics.stat().st_mtime)


def defaults(args) -> tuple[bool, sd.Args]:
    """Whether it is the embedded model, and training's defaults for it."""
    embedded = Path(args.model).resolve() == HERE / "tests/tiny"
    return embedded, sd.Args(**sd.TINY) if embedded else sd.Args()


def threads_of_two(args) -> int:
    """Threads for each of two processes at work on the embedded model, which draws so little at once that a
    second thread makes it but a quarter faster. 0, so one process: of another model, with a GPU, one thread.
    """
    return torch.get_num_threads() // 2 if defaults(args)[0] and not torch.cuda.is_available() else 0


def plan(args, methods: tuple[str, ...], names: list[str]):
    """The arguments of the evaluation, those named by the user with them, but for what is to be trained.
    names: of the user's systems."""
    _, default = defaults(args)
    if args.init_images or args.where:
        fail("--benchmark: some of its methods cannot start from pictures (--init-images), and its own "
             "prompts have no columns (--where)")
    if taken := {*names} & {"ShieldDiff", *RIVALS, *methods} - {*args.method}:
        fail(f"--benchmark has a system of its own called {taken.pop()}: give yours another name")
    if tuple(args.labels) != tuple(default.labels):
        fail(f"--benchmark trains against {', '.join(default.labels)}, and takes no other --labels")
    methods = [method for method in methods if method not in LEFT_OUT]
    prompts = {Path(path).resolve(): path for path in (*args.prompts, default.prompts)}
    return dataclasses.replace(
        args, method=(*methods, *(m for m in args.method if m not in methods)), attack=ATTACKS,
        prompts=tuple(prompts.values()))


def of_base(args):
    """The arguments of an evaluation of the base model alone, whose folder both halves start with: one
    folder, whatever of these arguments changes nothing in it."""
    base = dataclasses.replace(args, benchmark=False, lora=(), unet=(), text_encoder=(), method=(), out="",
                               reference="", show_uncensored=False)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(base), sort_keys=True).encode()).hexdigest()
    return dataclasses.replace(base, out=f"evals/{Path(args.model).resolve().name}-base-{digest[:8]}")


def train(args, main):
    """These arguments, and all that is compared trained. Beside it, if any is, main evaluates the base model.
    """
    (embedded, default), model = defaults(args), Path(args.model).resolve().name
    clip = ["--clip-model", args.clip_model] * (args.clip_model != default.clip_model)
    ours, named = Path(f"runs/{model}-0"), dict(lora=[f"ShieldDiff=runs/{model}-0"], unet=[])
    missing = []
    if is_trained(ours):
        keep(ours, "args.json", args.model, dataclasses.asdict(default))
    else:
        resumed = ["--resume"] * any(ours.glob("checkpoint*.pt"))
        missing.append([f"{HERE}/shielddiff.py", "--model", args.model, "--out", str(ours), *clip, *resumed])
    for name, (kind, script, *flags) in RIVALS.items():
        folder = Path(f"runs/rivals/{name}" + f"-{model}" * (not embedded))
        if (folder / WEIGHTS[kind]).exists():
            keep(folder, "training.json", args.model)
        else:
            missing.append([f"{HERE}/tests/rivals/{script}", "--model", args.model, "--out", str(folder),
                            *flags, *(EMBEDDED if embedded else STABLE_DIFFUSION).get(name, ())])
        named[kind].append(f"{name}={folder / 'unet' if kind == 'unet' else folder}")
    threads, base = threads_of_two(args), of_base(args)
    beside = [apart(threads, main, base)] if missing and threads else []
    run(missing, threads, beside)
    if any(process.exitcode for process in beside):
        print(f"the evaluation of the base model in {base.out} failed: each half makes one of its own")
    return dataclasses.replace(
        args, lora=(*named["lora"], *args.lora), unet=(*named["unet"], *args.unet))


def start(args, out: Path, protocol: dict, base: Path | None, main):
    """Give OUT, unless it has results, what a `base` holds or, with --benchmark where two processes pay, what
    these evaluate, each by main(args, base) with half of the systems."""
    begun, halves = (out / "results.jsonl").exists(), (out / "half-0", out / "half-1")
    if base and not begun:
        take(base, out, protocol)
    if args.benchmark:
        if (threads := threads_of_two(args)) and not begun:
            evaluate_halves(args, halves, threads, main)
            unite(halves, out)
        for folder in (*halves, of_base(args).out):
            shutil.rmtree(folder, ignore_errors=True)


def take(base: Path, out: Path, protocol: dict):
    """Copy to OUT what an evaluation of the base model holds, if there is one by the same protocol.
    results.jsonl comes last: with it all is there."""
    drawn = base / "results.jsonl"
    if drawn.exists() and is_alike(read(base / "protocol.json"), protocol):
        own = shutil.ignore_patterns("protocol.json", "report.*", "pairs.png", ".lock", drawn.name)
        shutil.copytree(base, out, ignore=own, dirs_exist_ok=True)
        write_text(out / drawn.name, drawn.read_text(encoding="utf-8"))


def is_alike(then: dict, now: dict) -> bool:
    """Whether two protocols differ in their systems at most."""
    of_systems = {"systems", "arguments", "differs_from_paper", "clip"}
    return all(then.get(k) == v for k, v in json.loads(json.dumps(now)).items() if k not in of_systems)


def evaluate_halves(args, halves: tuple[Path, Path], threads: int, main):
    """Run both halves; exits where one failed."""
    kinds, processes = ("lora", "unet", "text_encoder", "method"), []
    dealt = deal([(kind, entry) for kind in kinds for entry in getattr(args, kind)])
    for half, systems in zip(halves, dealt, strict=True):
        some = {kind: tuple(entry for k, entry in systems if k == kind) for kind in kinds}
        part = dataclasses.replace(args, benchmark=False, out=str(half), **some)
        processes.append(apart(threads, main, part, Path(of_base(args).out)))
    for process in processes:
        process.join()
    for process, half in zip(processes, halves, strict=True):
        if code := process.exitcode:
            fail(f"--benchmark: the evaluation in {half} ended with code {code}: run again, it goes on")


def apart(threads: int, main, *arguments):
    """main(*arguments) as a process at work."""
    os.environ |= ALLOCATOR  # inherited
    process = multiprocessing.get_context("spawn").Process(  # forked, OpenMP's threads would hang
        target=in_process, args=(threads, main, *arguments), daemon=True)
    process.start()
    return process


def deal(systems: list[tuple[str, str]]) -> tuple[list, list]:
    """(kind, entry) of systems in two parts that take equally long: the slowest first, to the one that has
    less to do."""
    parts, minutes = ([], []), [0, 0]
    for system in sorted(systems, key=lambda system: -MINUTES.get(system[1], OF_OTHERS)):
        least = minutes.index(min(minutes))
        parts[least].append(system)
        minutes[least] += MINUTES.get(system[1], OF_OTHERS)
    return parts


def in_process(threads: int, main, *arguments):
    """main(*arguments), silent but for errors and progress, as all will be said by the process that started
    this one, with which it ends, however that ends."""
    def end_with_it():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(*arguments)


def unite(halves: tuple[Path, Path], out: Path):
    """Copy to OUT what two evaluations of other systems by the same protocol hold. Both have the base model,
    of which the first one's stays. results.jsonl comes last: with it all is there."""
    for half in reversed(halves):
        shutil.copytree(half / "images", out / "images", dirs_exist_ok=True)
        for path in *half.glob("*.txt"), *half.glob("*.safetensors"):  # of Ring-A-Bell and revival
            shutil.copy(path, out)
    for attack in DEFENDED:
        if found := read(halves[1] / f"{attack}.json") | read(halves[0] / f"{attack}.json"):
            write_text(out / f"{attack}.json", json.dumps(found, indent=1))
    for name in ("seconds.jsonl", "results.jsonl"):
        write_text(out / name, "".join((half / name).read_text(encoding="utf-8") for half in halves))


def write_text(path: Path, text: str):
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
