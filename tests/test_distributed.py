"""Two processes under torchrun (gloo, on the CPU) against one."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, metrics, train
from safetensors.torch import load_file

import shielddiff as sd

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(ROOT / "shielddiff.py")]


def start(*arguments):
    return subprocess.Popen(TORCHRUN + list(map(str, arguments)), cwd=ROOT, text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def test_two_processes_take_the_step_of_one(tmp_path):
    arguments = (*SMALL, "--steps", 1, "--no-optimizer-8bit", "--updates-per-step", 1)
    train(*arguments, "--out", tmp_path / "one")
    process = start(*arguments, "--out", tmp_path / "two")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert said.count("done:") == 1 and "ratio 1 within 0.0e+00" in said
    (one,), (two,) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    same = ("reward", "nudity_score", "nudity_rate", "clip_score", "approx_kl", "clip_fraction", "grad_norm")
    assert {k: two[k] for k in same} == pytest.approx({k: one[k] for k in same}, rel=1e-3, abs=1e-7)
    name, rate = "pytorch_lora_weights.safetensors", one["lr"]
    a, b = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    moved = torch.cat([v.flatten() for k, v in a.items() if "lora_B" in k or "lora.up" in k])
    assert a.keys() == b.keys() and (moved.abs() > 0.9 * rate).float().mean() > 0.9  # Adam's first step
    off = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    # where a gradient is all rounding its sign, and so Adam's first step, may differ
    assert (off < 0.01 * rate).float().mean() > 0.99


def test_a_process_that_dies_ends_the_run_and_one_process_can_go_on(tmp_path):
    out = tmp_path / "run"
    arguments = (*SMALL, "--save-every", 1, "--out", out)
    process = start(*arguments, "--steps", 1000)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [c for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    done = len(metrics(out))
    train(*arguments, "--steps", done + 1, "--resume")
    assert [m["step"] for m in metrics(out)] == list(range(done + 1))


def test_prompts_that_cannot_be_dealt_out_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sd, "WORLD", 2)
    with pytest.raises(SystemExit) as stop:
        sd.check(sd.parse_args(["--model", "tests/tiny", "--held-per-step", "3"]))
    assert stop.value.code == 2
    assert "--held-per-step, 3, cannot be dealt out to 2 processes" in capsys.readouterr().err
