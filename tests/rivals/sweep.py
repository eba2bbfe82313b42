"""The sweep behind the trained rivals' rates and lengths on the embedded model: on its training prompts.

    python tests/rivals/sweep.py   # to runs/sweep, an hour beside other work; goes on where it was stopped

Each setting is trained by the rival's own command and drawn by eval.py on tests/tiny/prompts.txt, 4 seeds.
The best has the lowest sum of faces and of what the worst benign prompt loses: what the rivals set out for,
who do not promise the safe meaning of a prompt. It is the default (TINY) of the rival's file; that of UCE
and of what is guided is in eval_benchmark.py.
"""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from eval_benchmark import HIDDEN  # noqa: E402

OUT, TRAIN, EDIT = Path("runs/sweep"), ("--learning-rate", "--steps"), ("--erase", "--lam")
EDITS = (0.1, 0.5), (1, 0.5), (10, 0.5), (1, 0.05)
GRID = {  # rival: (its command, the flags that are swept, their values)
    "esd-u": (("esd.py",), TRAIN, (
        (3e-5, 150), (1e-4, 150), (1e-4, 50), (3e-4, 150), (3e-4, 50))),
    "esd-x": (("esd.py", "--weights", "x"), TRAIN, ((1e-4, 150), (3e-4, 150), (3e-4, 50), (1e-3, 150))),
    "sdd": (("sdd.py",), TRAIN, ((1e-4, 150), (3e-4, 150), (3e-4, 50), (1e-3, 150))),
    "esd-guided": (("esd.py", "--erase-from", "{}", *HIDDEN), TRAIN, (
        (1e-4, 150), (3e-4, 150), (3e-4, 50), (1e-3, 150))),
    "sdd-guided": (("sdd.py", *HIDDEN), TRAIN, ((1e-4, 150), (3e-4, 150), (3e-4, 50), (1e-3, 150))),
    "duo": (("duo.py", "--prior", "5e6", "--until", "750"), TRAIN, (
        (1e-4, 200), (3e-4, 200), (3e-4, 500), (1e-3, 200))),
    "duo-prior": (("duo.py",), ("--prior", "--until"), (
        (0, 750), (0, 1000), (5e2, 750), (5e2, 1000), (5e3, 1000), (5e4, 1000))),
    "safegen": (("safegen.py",), TRAIN, ((1e-4, 200), (3e-4, 200), (3e-4, 500), (1e-3, 200))),
    "uce": (("uce.py",), EDIT, (*EDITS, (1, 0.005), (10, 0.05), (10, 0.005), (100, 0.05))),
    "uce-guided": (("uce.py", "--edits", "guided"), EDIT, (
        *EDITS, (0.01, 0.5), (0.1, 0.05), (0.01, 0.05), (0.1, 0.005)))}


def trained(name: str) -> list[tuple[str, Path]]:
    """(label, folder) of each setting of a rival, trained where it is not there."""
    command, flags, settings = GRID[name]
    found = []
    for values in settings:
        words = [word for pair in zip(flags, map(str, values), strict=True) for word in pair]
        folder = OUT / "-".join([name, *map(str, values)])
        if not any(folder.rglob("*.safetensors")):  # written last
            script, *own = command
            subprocess.run([sys.executable, ROOT / "tests/rivals" / script, *own, *words, "--out", folder,
                            "--model", ROOT / "tests/tiny"], check=True)
        found.append((" ".join([name, *words]), folder))
    return found


def main():
    runs = {folder.name: (label, folder) for name in GRID for label, folder in trained(name)}
    loras = [f"{name}={folder}" for name, (_, folder) in runs.items() if name.startswith("duo")]
    unets = [f"{name}={folder}/unet" for name, (_, folder) in runs.items() if not name.startswith("duo")]
    subprocess.run([sys.executable, ROOT / "eval.py", "--model", ROOT / "tests/tiny", "--prompts",
                    ROOT / "tests/tiny/prompts.txt", "--seeds", "4", "--out", OUT / "evaluation", "--lora",
                    *loras, "--unet", *unets], check=True)
    systems = json.loads((OUT / "evaluation/report.json").read_text())["sets"]["prompts"]
    print(f"\n{'setting':60} faces  safe+faithful  worst benign   sum (all in %)")
    for name, (label, _) in runs.items():
        eliciting, benign = systems[name]["eliciting"], systems[name]["benign"]
        faces, good, kept = (100 * number["value"] for number in (
            eliciting["trained_on"]["rate"], eliciting["safe_and_faithful"], benign["clip_kept_worst"]))
        print(f"{label:60} {faces:5.0f} {good:14.0f} {kept:13.0f} {faces + max(100 - kept, 0):5.0f}")


if __name__ == "__main__":
    main()
