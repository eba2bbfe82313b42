"""What results of 30,000 prompts cost eval.py: time and memory of a resumed run's list of what is done and of
all from results.jsonl to the numbers, by its own code, on made-up records and pictures of no length.
"""
import base64
import functools
import json
import resource
import tempfile
import time
from pathlib import Path

import eval_results
import numpy as np

import eval as ev
import shielddiff as sd

PROMPTS, SEEDS, SYSTEMS = 30_000, 4, ("base", "ours")
WIDTH = 768  # of CLIP ViT-L/14's features


def peak_gib() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def record_of(rng, job: ev.Job) -> dict:
    """Scores as a picture's may be: three boxes on average, features where CLIP-KID takes them."""
    boxes = [[sd.LABELS[rng.integers(len(sd.LABELS))], round(rng.uniform(0.25, 1), 6)]
             for _ in range(rng.poisson(3))]
    raw, nsfw, clip, caption = map(float, rng.random(4))
    features = base64.b64encode(rng.standard_normal(WIDTH).astype(np.float16).tobytes()).decode()
    return dict(
        detections=boxes, raw=raw, open_nsfw=nsfw, safety_checker=raw > 0.5, face_cascade=None,
        clip_prompt=clip, clip_caption=caption, features=features if job.features else "", fires=[],
        pixel_rms=100 * raw, finite=True, refused=False, one_colour=False, sha256="0" * 64, bytes=0,
        file="coco.csv", row=job.i + 1, prompt=job.row.prompt, seed=job.seed, guidance=job.row.guidance)


def write_results(out: Path, jobs: list[ev.Job]):
    """results.jsonl, and pictures that are empty files."""
    rng = np.random.default_rng(0)
    with open(out / "results.jsonl", "w") as file:
        for system in SYSTEMS:
            (out / "images" / system / "coco").mkdir(parents=True)
            for job in jobs:
                key = job.key(system)
                key.path(out).touch()
                file.write(json.dumps(key._asdict() | record_of(rng, job)) + "\n")


def table() -> list[dict]:
    """A row a stage: its seconds, and the process's peak so far; the first row is what the libraries take."""
    rows = [ev.Row(f"a prompt of the usual length, of a dog and a kite, number {i}", "a caption", i % 5 == 0,
                   i, 7.5, 512, 512, "coco.csv", i + 1) for i in range(PROMPTS)]
    jobs = ev.list_jobs(dict(coco=(rows, [None])), SEEDS)
    count = functools.partial(ev.table_of, labels=sd.NUDITY, thresholds=ev.Args.thresholds,
                              held_out=ev.HELD_OUT)
    results = [dict(stage="libraries and jobs", peak_gib=peak_gib())]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_results(out, jobs)
        results[0] |= dict(results_gib=(out / "results.jsonl").stat().st_size / 2**30)
        stages = dict(finished=lambda: len(eval_results.finished(out)),
                      tables=lambda: kept.update(eval_results.tables_of(out, count)),
                      numbers=lambda: ev.numbers_of(kept, jobs, list(SYSTEMS), "open_nsfw"))
        kept = {}
        for stage, run in stages.items():
            start = time.perf_counter()
            run()
            results.append(dict(stage=stage, seconds=time.perf_counter() - start, peak_gib=peak_gib()))
    return results
