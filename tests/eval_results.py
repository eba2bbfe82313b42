"""results.jsonl, a line a picture: what a resumed evaluation finds done, and all of it as compact arrays.

A picture's record is a dictionary of 2 KB and more in memory. So nothing here holds more than a few thousand
of them, and a picture that is there in its full length is not read again: `python tests/bench.py --sections
size` measures 30,000 prompts.
"""
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from eval_report import Key

from shielddiff import LABELS, fail, write_atomically

CHUNK = 4096  # records held at once, of each set and system
Table = dict[str, np.ndarray]  # measure -> [pictures]


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines_of(path: Path) -> Iterator[tuple[Key, dict, str]]:
    """Each whole line's key, record and text; the one being written when a run was killed is none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                system, name, i, k = (record[field] for field in Key._fields)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            yield Key(sys.intern(system), sys.intern(name), i, k), record, line.rstrip("\n") + "\n"


def keep_whole(path: Path, done: set[Key], target: Path):
    """Write to target the lines whose picture has the length that they say, and their keys to done."""
    with open(target, "w", encoding="utf-8") as file:
        for key, record, line in lines_of(path):
            try:
                whole = os.stat(key.path(path.parent)).st_size == record["bytes"]
            except (OSError, KeyError):
                whole = False
            if whole and key not in done:
                done.add(key)
                file.write(line)


def finished(out: Path) -> set[Key]:
    """The pictures of an earlier run that are there and not cut; results.jsonl keeps those only. What is in
    them is not looked at: at 30,000 prompts that is tens of GB."""
    path, done = out / "results.jsonl", set()
    if path.exists():
        write_atomically(path, functools.partial(keep_whole, path, done))
    return done


def table_of(records: list[dict], labels: Sequence[str], thresholds: Sequence[float],
             held_out: Sequence[str]) -> Table:
    """Records of one set and system -> measure -> [pictures]; detections are counted from each threshold, of
    the labels by three rules: every box, once a class in a picture, any at all."""
    table = {m: np.array([r[m] for r in records]) for m in ("i", "k", "finite", "refused", "one_colour")}
    table |= {m: np.array([r[m] for r in records], float)  # NaN where a picture has no score
              for m in ("raw", *held_out, "clip_prompt", "clip_caption", "pixel_rms")}
    table |= {f"fires {d}": np.array([d in r["fires"] for r in records]) for d in ("nudenet", *held_out)}
    seen = np.zeros((len(records), len(thresholds), len(LABELS)), np.int16)  # boxes from each threshold
    for n, record in enumerate(records):
        for label, confidence in record["detections"]:
            seen[n, :, LABELS.index(label)] += confidence >= np.array(thresholds)
    ours = seen[:, :, [LABELS.index(label) for label in dict.fromkeys(labels)]]  # [n, thresholds, labels]
    for j, t in enumerate(thresholds):
        boxes, classes = ours[:, j].sum(axis=1), (ours[:, j] > 0).sum(axis=1)
        table |= {f"seen {t}": seen[:, j], f"boxes {t}": boxes, f"classes {t}": classes,
                  f"images {t}": boxes > 0}
    table["features"] = np.array([r["features"] for r in records], object)
    return table


def tables_of(out: Path, table_of: Callable[[list[dict]], Table]) -> dict[tuple[str, str], Table]:
    """{(set, system): table} of results.jsonl, a table's pictures in the order of prompts and seeds."""
    waiting, parts = defaultdict(list), defaultdict(list)
    for key, record, _ in lines_of(out / "results.jsonl"):
        group = waiting[key.set, key.system]
        group.append(record)
        if len(group) == CHUNK:
            parts[key.set, key.system].append(table_of(group))
            group.clear()
    for name, group in waiting.items():
        parts[name] += [table_of(group)] if group else []
    return {name: in_order(tables) for name, tables in parts.items()}


def in_order(parts: list[Table]) -> Table:
    """The parts of a table as one, sorted by prompt and picture."""
    order = np.lexsort([np.concatenate([part[m] for part in parts]) for m in ("k", "i")])
    return {m: np.concatenate([part[m] for part in parts])[order] for m in parts[0]}


def check_drawn(system: str, found: tuple[np.ndarray, np.ndarray], n: int):
    """Exit where a method's pictures are none: as bytes, or of -1 to 1, they would be scored all the same."""
    if not (isinstance(found, (tuple, list)) and [getattr(part, "ndim", 0) for part in found] == [4, 1]
            and all(isinstance(part, np.ndarray) for part in found) and found[1].dtype == bool):
        fail(f"{system} drew {type(found).__name__} {str(found)[:60]!r} for {n} prompts; a draw returns two "
             f"arrays of numpy: pictures, floats [B, H, W, 3] of 0 to 1, and which it refuses, bool [B]")
    images, refused = found
    known = np.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0)  # those are counted, later
    if images.shape[3] != 3 or not len(images) == len(refused) == n \
            or images.dtype.kind != "f" or known.min() < 0 or known.max() > 1:
        fail(f"{system} drew {images.dtype} {list(images.shape)} of {known.min():.3g} to {known.max():.3g} "
             f"for {n} prompts; pictures are floats [B, H, W, 3] of 0 to 1")


def timed(draw, path: Path, system: str):
    """A Draw that writes how many seconds a picture took, a line a batch: another file than the results, in
    which a resumed run finds nothing that it would not write."""
    def draw_in_time(call: dict):
        start, n = time.perf_counter(), len(call["prompt"])  # which a method may change
        found = draw(call)
        seconds = (time.perf_counter() - start) / n
        check_drawn(system, found, n)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(system=system, seconds=seconds)) + "\n")
        return found
    return draw_in_time


def unused(name: str, taken) -> str:
    """A prompt set's name that none has: one of two sets would replace the other's numbers."""
    return name if name not in taken else unused(f"{name}'", taken)


def parts_of(jobs: list) -> dict[str, tuple[np.ndarray, list]]:
    """{set: (places in its tables, jobs)} of its pictures, and of those by --by: {'set: value': ...}."""
    sets = {name: list(group) for name, group in itertools.groupby(jobs, key=lambda job: job.set)}
    parts = {}
    for name, group in sets.items():
        parts[name] = np.arange(len(group)), group
        for value in sorted({value for job in group for value in job.row.by}):
            places = np.flatnonzero([value in job.row.by for job in group])
            parts[unused(f"{name}: {value}", {*sets, *parts})] = places, [group[n] for n in places]
    return parts
