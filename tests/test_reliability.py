"""What happens when a run is killed, the disk fills, numbers go bad or a model is damaged."""
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, metrics, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import shielddiff as sd


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9: what is on the disk stays as it is."""


CLOCKS = {"seconds_rollout", "seconds_reward", "seconds_update", "peak_gpu_memory_mb"}


def final(out):
    """The last checkpoint and the metrics, without clocks and without what --resume may change."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert [m["step"] for m in state["metrics"]] == [m["step"] for m in metrics(out)]
    tensors = {f"{part} {k}": torch.as_tensor(v) for part in ("weights", "optimizer")
               for k, v in flat(state[part])}
    return tensors, [{k: v for k, v in m.items() if k not in CLOCKS} for m in metrics(out)]


def flat(tree, path=""):
    """(path, number or tensor) of everything in nested dicts and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, torch.Tensor | int | float):
            yield f"{path}/{key}", value
        if isinstance(value, dict | list | tuple):
            yield from flat(value, f"{path}/{key}")


def assert_same(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1] == b[1] and len(a[1]) > 1


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Three steps without a stop."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(*SMALL, "--steps", 3, "--out", out, "--save-every", 1)
    return final(out)


# ------------------------------------------------------------------------------------ stopped and resumed
def at_call(function, number, then):
    """function, but its call with this number does something else."""
    calls = []

    def wrapped(*arguments, **keywords):
        calls.append(0)
        return (then if len(calls) == number else function)(*arguments, **keywords)
    return wrapped


def die(*_, **__):
    raise Killed


def die_writing(*arguments, **__):
    with next(a for a in arguments if isinstance(a, Path)).open("wb") as file:
        file.write(b"half of a file")
    raise Killed


@pytest.mark.parametrize(("name", "call", "death"), [
    ("act", 3, die), ("act", 20, die), ("act", 30, die), ("policy_loss", 3, die), ("policy_loss", 7, die),
    ("policy_loss", 12, die), ("write_bytes", 1, die_writing), ("write_bytes", 2, die_writing),
    ("write_bytes", 4, die_writing), ("torch.save", 1, die_writing), ("torch.save", 2, die_writing),
    ("torch.save", 4, die_writing), ("draw", 1, die), ("draw", 2, die)])
def test_killed_anywhere_and_resumed_equals_the_uninterrupted_run(name, call, death, straight, tmp_path,
                                                                  monkeypatch):
    out = tmp_path / "run"
    arguments = (*SMALL, "--steps", 3, "--out", out, "--save-every", 1)
    owner = torch if name == "torch.save" else Path if name == "write_bytes" else sd
    name = name.removeprefix("torch.")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, at_call(getattr(owner, name), call, death))
        train(*arguments)
    begun = any(out.glob("checkpoint*.pt"))  # else there is nothing to go on with, and nothing in the way
    assert begun or (name, call) == ("save", 1)
    train(*arguments, *["--resume"] * begun)
    assert_same(final(out), straight)


@pytest.mark.parametrize("first", [1, 2])
def test_more_steps_later_are_the_steps_of_the_longer_run(first, straight, tmp_path):
    for steps in (first, 3):
        train(*SMALL, "--steps", steps, "--out", tmp_path / "run", *["--resume"] * (steps == 3))
    assert_same(final(tmp_path / "run"), straight)


@pytest.mark.parametrize("flags", [
    ["--lora-rank", 0], ["--lora-rank", 0, "--precision", "bf16", "--denoise-steps", 2,
                         "--train-timesteps", 1, "--updates-per-step", 1],  # short: on most CPUs bf16 is slow
    ["--no-optimizer-8bit"]], ids=str)
def test_every_kind_of_weights_and_precision_resumes_too(flags, tmp_path, monkeypatch):
    def small(*arguments, load=sd.load_pipeline, **options):  # 32 px
        pipe = load(*arguments, **options)
        pipe.unet.register_to_config(sample_size=8)
        return pipe

    if "bf16" in flags:
        monkeypatch.setattr(sd, "load_pipeline", small)
    arguments = (*SMALL, "--held-per-step", 1, "--steps", 2, "--save-every", 1, "--clip-range", 1e3,
                 "--clip-weight", 0.5, *flags)  # of two pictures the two terms may cancel to no signal
    train(*arguments, "--out", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/checkpoint-before.pt").replace(tmp_path / "b/checkpoint.pt")  # of the first step
    train(*arguments, "--out", tmp_path / "b", "--resume")
    assert_same(final(tmp_path / "a"), final(tmp_path / "b"))
    assert all(m["ratio_max_dev"] == 0 and 0 < m["nats"] <= 3 * m["signal"] for m in metrics(tmp_path / "a"))
    if 0 in flags:
        weights = load_file(tmp_path / "a/unet/diffusion_pytorch_model.safetensors").values()
        assert {v.dtype for v in weights} == {torch.float32} and all(v.isfinite().all() for v in weights)
        assert any(v.dtype == torch.uint8 for v in final(tmp_path / "a")[0].values())
        saved = sd.UNet2DConditionModel.from_pretrained(tmp_path / "b/unet").state_dict()
        old = sd.load_pipeline(str(ROOT / "tests/tiny")).unet.state_dict()
        assert saved.keys() == old.keys()
        assert any((saved[k].float() - old[k].float()).abs().max() > 1e-6 for k in old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_stops_the_real_process_and_resume_goes_on(number, straight, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "shielddiff.py", *SMALL, "--steps", 3, "--out", out, "--save-every", 1]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL,  # a shell's background jobs are deaf to Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in said
    assert number != signal.SIGINT or "the same command with --resume goes on" in said
    train(*SMALL, "--steps", 3, "--out", out, "--save-every", 1, "--resume")
    assert_same(final(out), straight)


# ------------------------------------------------------------------------------------ files
@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("two_steps") / "run"
    train(*SMALL, "--steps", 2, "--out", out, "--save-every", 1)
    return out


def no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:len(b) // 2] + b"x" + b[len(b) // 2 + 1:],
                                   lambda b: b"", lambda b: b[:5000] + b[5001:]])
def test_a_damaged_checkpoint_is_known_and_the_one_before_it_used(spoil, two_steps, straight, tmp_path,
                                                                      capsys, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(two_steps, out)
    newest = out / "checkpoint.pt"
    newest.write_bytes(spoil(newest.read_bytes()))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # the good one outlives a full disk
        patch.setattr(torch, "save", no_space)
        train(*SMALL, "--steps", 3, "--out", out, "--save-every", 1, "--resume")
    assert f"{newest} is damaged" in capsys.readouterr().out and (out / "checkpoint.damaged").exists()
    train(*SMALL, "--steps", 3, "--out", out, "--save-every", 1, "--resume")
    assert_same(final(out), straight)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_pass_for_a_checkpoint(tmp_path, capsys, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit):
        sd.open_run(sd.Args(resume=True), {}, tmp_path)
    said = capsys.readouterr()
    assert "is damaged" in said.out and "holds no run" in said.err
    assert (tmp_path / "checkpoint.pt").read_bytes() == content  # a stranger's, maybe


def test_a_checkpoint_runs_nobody_s_code(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    torch.save(dict(settings=Bomb()), tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        sd.open_run(sd.Args(resume=True), {}, tmp_path)
    assert "boom" not in capsys.readouterr().out


def test_a_full_disk_is_one_clear_line_and_leaves_the_older_file(tmp_path, capsys):
    target, soft = tmp_path / "weights", resource.getrlimit(resource.RLIMIT_FSIZE)
    sd.write_atomically(target, lambda p: save_file({"x": torch.zeros(10)}, p))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, soft[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            sd.write_atomically(target, lambda p: save_file({"x": torch.zeros(100_000)}, p))
        with pytest.raises(SystemExit):
            sd.write_atomically(target, lambda p: p.write_text("x" * 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert stop.value.code == 1 and f"cannot write {target}" in capsys.readouterr().err
    assert torch.equal(load_file(target)["x"], torch.zeros(10)) and len(list(tmp_path.iterdir())) == 1


def test_two_runs_cannot_write_to_one_folder(tmp_path, capsys):
    with sd.filelock.FileLock(tmp_path / ".lock"), pytest.raises(SystemExit) as stop:
        train(*SMALL, "--steps", 1, "--out", tmp_path)
    assert stop.value.code == 2 and "another run at work" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


# ------------------------------------------------------------------------------------ numbers
def nan_reward(*arguments, original=sd.nudity_scores):
    return original(*arguments) * torch.nan


def nan_loss(*arguments, original=sd.policy_loss):
    loss, ratio = original(*arguments)
    return loss * torch.inf, ratio


def nan_gradient(*arguments, original=sd.policy_loss):
    loss, ratio = original(*arguments)
    return loss + (ratio - 1).abs().sqrt(), ratio  # 0 at ratio 1, with an infinite slope


@pytest.mark.parametrize(("name", "call", "bad", "what"), [
    ("nudity_scores", 1, nan_reward, "reward"), ("policy_loss", 1, nan_loss, "loss"),
    ("policy_loss", 1, nan_gradient, "gradient")])
def test_a_step_with_bad_numbers_is_skipped_and_logged(name, call, bad, what, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sd, name, at_call(getattr(sd, name), call, bad))
        train(*SMALL, "--steps", 2, "--out", tmp_path / "run", "--save-every", 1)
    skipped, good = metrics(tmp_path / "run")
    assert skipped == {"step": 0, "skipped": f"{'a' if what == 'reward' else 'the'} {what} is not finite"}
    assert np.isfinite(good["reward"]) and good["grad_norm"] > 0
    weights = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert all(v.isfinite().all() for v in weights.values())


def infinite_ratio(*arguments, original=sd.policy_loss):
    loss, ratio = original(*arguments)
    return loss, ratio * torch.inf  # clipped where the advantage is positive: loss and gradient are fine


@pytest.mark.parametrize("bad", [nan_loss, nan_gradient, infinite_ratio])
def test_where_a_second_update_is_bad_the_first_one_makes_the_step(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "policy_loss", at_call(sd.policy_loss, 3, bad))  # two calls an update
    train(*SMALL, "--steps", 1, "--out", tmp_path / "run")
    line, = metrics(tmp_path / "run")
    assert "skipped" not in line and 0 < line["nats"] <= 3 * line["signal"] and line["grad_norm"] > 0
    lora = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    moved = [k for k, v in lora.items() if ("lora_B" in k or "lora.up" in k) and (v != 0).any()]
    assert len(lora) > 10 and moved and all(v.isfinite().all() for v in lora.values())


def test_a_whole_unet_that_the_first_update_blows_up_is_brought_back_within_the_step(tmp_path):
    """A rate 1e5 times too high: the second update is of a policy gone mad, or of no finite number."""
    train(*SMALL, "--steps", 2, "--out", tmp_path / "run", "--lora-rank", 0, "--learning-rate", 100)
    first, second = metrics(tmp_path / "run")
    assert first["nats_before_sizing"] > 1e6 and first["nats"] <= 3 * first["signal"] < 4
    assert second["lr"] / second["signal"]**0.5 == pytest.approx(5)  # 20 times lower
    assert second["nats"] <= 3 * second["signal"]


def test_fp16_s_overflow_lowers_the_loss_scale_until_a_step_is_made(tmp_path, monkeypatch):
    """Gradients overflow above a scale of 2 to the 9th: 16 and 12 are tried in vain."""
    scales, clip = [], torch.nn.utils.clip_grad_norm_

    def overflows(params, scale):
        scales.append(scale)
        return clip(params, scale) * (1.0 if scale < 2**9 else torch.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflows)
    train(*SMALL, "--steps", 4, "--out", tmp_path / "run")
    assert scales == [2.0**16, 2.0**12, *[2.0**8] * 2, *[2.0**(8 + 1 / 16)] * 2]  # it comes back slowly
    skipped = [m.get("skipped") for m in metrics(tmp_path / "run")]
    assert skipped == ["the gradient is not finite"] * 2 + [None] * 2


def test_three_bad_steps_in_a_row_stop_the_run_with_the_last_good_weights(tmp_path, monkeypatch, capsys):
    out, good = tmp_path / "run", []
    monkeypatch.setattr(sd, "policy_loss", lambda *a, f=sd.policy_loss: (nan_loss if good else f)(*a))
    save = sd.save
    runs, rates = [], []

    def keep(run, metrics, out):
        save(run, metrics, out)
        if metrics:
            good.append(len(metrics)), runs.append(run), rates.append(run.optimizer.param_groups[0]["rate"])

    monkeypatch.setattr(sd, "save", keep)
    with pytest.raises(SystemExit) as stop:
        train(*SMALL, "--steps", 9, "--out", out, "--save-every", 1)
    assert stop.value.code == 1 and "holds the weights saved before" in capsys.readouterr().err
    assert runs[0].optimizer.param_groups[0]["rate"] == rates[0]  # nothing moved: the rate is not to blame
    assert ["skipped" in m for m in metrics(out)] == [False, True, True, True] and good == [1]
    lora = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(v.isfinite().all() for v in lora.values()) and any((v != 0).any() for k, v in lora.items()
                                                                 if "lora_B" in k or "lora.up" in k)


def test_too_little_memory_is_one_line_that_says_how_to_go_on_with_the_same_result(tmp_path, monkeypatch,
                                                                                    capsys):
    def small_gpu(policy, x, *rest, enough=sd.act, **keywords):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return enough(policy, x, *rest, **keywords)

    train(*SMALL, "--steps", 2, "--out", tmp_path / "one", "--micro-batch", 1)
    monkeypatch.setattr(sd, "act", small_gpu)
    with pytest.raises(SystemExit) as stop:
        train(*SMALL, "--steps", 2, "--out", tmp_path / "two", "--micro-batch", 2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "out of memory" in said and "--resume --micro-batch 1" in said
    train(*SMALL, "--steps", 2, "--out", tmp_path / "two", "--resume", "--micro-batch", 1)
    assert_same(final(tmp_path / "one"), final(tmp_path / "two"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80)
       | st.text(st.sampled_from("ab#=> \t\r\n\ufeff\u2028é"), max_size=40).map(str.encode))
def test_any_bytes_are_prompts_or_one_clear_line(tmp_path, capsys, content):
    """And what was read, written again, reads the same."""
    (tmp_path / "p.txt").write_bytes(content)
    try:
        pairs = sd.read_prompts(str(tmp_path / "p.txt"))
    except SystemExit as stop:
        assert stop.code == 2 and "prompt file" in capsys.readouterr().err
        return
    assert all(p and c and p == p.strip() and not p.startswith("#") for p, c, _ in pairs)
    again = "".join(f"{p} => {c}\n" if elicits else f"{p}\n" for p, c, elicits in pairs)
    (tmp_path / "p.txt").write_text(again, encoding="utf-8-sig")
    assert sd.read_prompts(str(tmp_path / "p.txt")) == pairs


def test_a_file_of_one_prompt_that_is_far_too_long_trains(tmp_path):
    (tmp_path / "one.txt").write_text("an astronaut " * 100 + "=> an astronaut " * 100)
    train(*SMALL, "--steps", 1, "--prompts", tmp_path / "one.txt", "--out", tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["ratio_max_dev"] == 0


# ------------------------------------------------------------------------------------ damaged models
def without(part):
    return lambda folder: shutil.rmtree(folder / part)


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:100])


def edit(file, **changes):
    def change(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | changes))
    return change


def weights(file, change):
    def rewrite(folder):
        tensors = load_file(folder / file)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return rewrite


def other_texts(folder):
    """As of another Stable Diffusion."""
    config = sd.CLIPTextModel.config_class.from_pretrained(folder / "text_encoder", hidden_size=64)
    sd.CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def as_pickle(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


UNET, CLIP = "unet/diffusion_pytorch_model.safetensors", "clip/model.safetensors"


@pytest.mark.parametrize(("damage", "words"), [
    (without("unet"), ["unet"]), (without("vae"), ["vae"]), (without("tokenizer"), ["tokenizer"]),
    (cut(UNET), ["cannot load"]), (cut("model_index.json"), ["model_index.json"]),
    (lambda f: (f / "unet/config.json").write_text("{"), ["unet"]),
    (edit("model_index.json", _class_name="StableDiffusionXLPipeline"), ["StableDiffusionXLPipeline", "1.x"]),
    (edit("scheduler/scheduler_config.json", prediction_type="sample"), ["prediction_type"]),
    (weights(UNET, lambda t, k: t[k].fill_(float("nan"))), ["unet", "NaN"]),
    (weights(UNET, lambda t, k: t.pop(k)), ["unet", "lacks weights: conv_in"]),
    (as_pickle, ["unet", "safetensors"]), (other_texts, ["texts of width (4, 96), and would get (4, 64)"]),
    (cut(CLIP), ["CLIPModel"]), (weights(CLIP, lambda t, k: t.pop(k)), ["CLIPModel", "lacks"]),
    (edit("clip/config.json", projection_dim=32), ["CLIPModel"])])
def test_a_damaged_model_is_refused_and_the_part_named(damage, words, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tests/tiny", model)
    damage(model)
    with pytest.raises(SystemExit) as stop:
        train("--model", model, "--steps", 1, "--clip-model", model / "clip", "--out", tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shielddiff: ")]
    assert stop.value.code == 2 and len(said) == 1 and all(w in said[0] for w in words), said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        train(*SMALL, "--out", tmp_path / "file/run")
    assert stop.value.code == 2 and f"{tmp_path}/file/run" in capsys.readouterr().err


def test_the_lora_is_a_module_on_top_of_untouched_weights(straight, tmp_path):
    """It switches on and off without a trace, and stands beside other adapters."""
    save_file({f"unet.{k.removeprefix('weights /').replace('.default.weight', '.weight')}": v * 30
               for k, v in straight[0].items() if k.startswith("weights /")},
              tmp_path / "pytorch_lora_weights.safetensors")
    pipe = sd.load_pipeline(str(ROOT / "tests/tiny"))

    def picture():
        generator = torch.Generator().manual_seed(0)
        image = pipe("an astronaut", num_inference_steps=4, generator=generator).images[0]
        return np.asarray(image).astype(int)

    base = picture()
    pipe.load_lora_weights(tmp_path, adapter_name="safe")
    tuned = picture()
    pipe.load_lora_weights(tmp_path, adapter_name="other")
    pipe.set_adapters(["safe", "other"], [1.0, 0.0])
    both = picture()
    pipe.unload_lora_weights()
    assert (tuned != base).any() and abs(both - tuned).max() <= 1 and np.array_equal(picture(), base)
    assert Image.fromarray(tuned.astype(np.uint8)).size == (64, 64)
