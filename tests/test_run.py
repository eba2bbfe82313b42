"""The real command line on the embedded model: what it changes, keeps, writes and refuses."""
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, STEPS, cli, draw, face_rate, metrics, stock_pipeline, train
from PIL import Image

import shielddiff as sd


def test_the_default_run_lowers_the_face_rate_and_keeps_the_benign_prompts(run, portraits):
    """Judged by stock diffusers on fresh seeds. Wide bounds: each kind of CPU trains another LoRA."""
    rate, meaning = {name: face_rate(images) for name, images in portraits.items()}, {}
    benign = [p for p in PAIRS if not p[2]] * 4
    clip, processor = sd.load_clip(str(ROOT / "tests/tiny/clip"))
    captions = sd.caption_features(clip, processor, [c for _, c, _ in benign])
    for name, lora in (("base", None), ("tuned", run[0])):
        kept = draw(stock_pipeline(lora), [p for p, _, _ in benign], 2_000_000)
        meaning[name] = (sd.image_features(clip, processor, kept) * captions).sum(1).view(4, -1).mean(0)
    print(rate, meaning["tuned"] / meaning["base"])
    assert rate["base"] > 0.5, rate
    assert rate["tuned"] < 0.25 * rate["base"], rate
    assert (meaning["tuned"] > 0.95 * meaning["base"]).all(), meaning


def test_every_step_is_logged_and_every_self_check_is_exactly_one(run):
    out, _ = run
    lines = metrics(out)
    assert [m["step"] for m in lines] == list(range(STEPS))
    assert set(lines[0]) >= set(
        "reward nudity_score nudity_rate clip_score ratio_max_dev clip_fraction grad_norm gradient_agreement "
        "kl_share lr nats signal seconds_rollout seconds_reward seconds_update peak_gpu_memory_mb".split())
    assert all(m["ratio_max_dev"] == 0 for m in lines)
    assert all(m["grad_norm"] > 0 and np.isfinite(m["reward"]) for m in lines)
    assert json.loads((out / "args.json").read_text())["steps"] == STEPS
    assert all((out / f).exists() for f in ("samples.png", "curves.png", "pytorch_lora_weights.safetensors"))
    assert len({path.stat().st_mode for path in out.glob("*.*")}) == 1  # who may read one may read all


def test_the_saved_lora_in_stock_diffusers_draws_the_run_s_own_pictures(run):
    """samples.png, lower row: the trained U-Net in memory. Upper row: the base model."""
    out, _ = run
    shown = range(0, len(PAIRS), 2)
    sheet = np.asarray(Image.open(out / "samples.png")).astype(int)
    for row, pipe in enumerate((stock_pipeline(), stock_pipeline(out))):
        with torch.inference_mode():
            images = pipe([PAIRS[i][0] for i in shown], num_inference_steps=sd.TINY["denoise_steps"], eta=1.0,
                          guidance_scale=sd.TINY["guidance_scale"] / 1.5, output_type="np",
                          generator=[sd.generator(0, "sample", i) for i in shown]).images
        drawn = np.concatenate((images * 255).round(), axis=1)
        difference = abs(drawn - sheet[64 * row:64 * row + 64])
        assert difference.mean() < 0.2 and np.quantile(difference, 0.999) <= 3
    assert abs(sheet[:64] - sheet[64:]).mean() > 2


@pytest.mark.parametrize("prompts", [1, 12, 13, 20, 35, 100])
def test_the_sheet_shows_at_most_twelve_prompts_of_the_whole_list(prompts, tmp_path, monkeypatch):
    """Those that elicit stand first in many files: cut short, it would show no benign prompt."""
    shown = []

    def rollout(run, context, held, gens):
        shown.extend(context[0, :, 0, 0].int().tolist())
        return SimpleNamespace(images=np.zeros((len(gens), 8, 8, 3), np.uint8))

    monkeypatch.setattr(sd, "rollout", rollout)
    context = torch.arange(prompts).expand(2, -1)[..., None, None]  # [2, prompts, 1, 1]
    sd.draw(SimpleNamespace(settings=dict(prompts=[""] * prompts), context=context,
                            args=sd.Args(show_uncensored=True)), [{}], tmp_path)
    assert len(shown) <= 12 and shown[0] == 0 and shown[-1] >= prompts - 1 - prompts // 6
    assert len({b - a for a, b in itertools.pairwise(shown)}) <= 1


def test_a_folder_in_use_is_refused_and_other_arguments_on_resume_are_named(run, tmp_path, capsys):
    out, _ = run
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
    for arguments, words in ((["--out", out], "in use"),
                             (["--out", out, "--resume", "--learning-rate", 0.5], "learning_rate was"),
                             (["--out", out, "--resume", "--prompts", "prompts.txt"], "version's): prompts"),
                             (["--out", out, "--resume", "--steps", 5], "steps was 6, is 5"),
                             (["--out", tmp_path / "none", "--resume"], "holds no run")):
        with pytest.raises(SystemExit) as stop:
            train("--model", "tests/tiny", "--steps", 12, *arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert before == sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))


def test_a_run_in_the_units_of_an_older_version_is_not_gone_on_with(run, tmp_path, capsys):
    state = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    del state["settings"]["method"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        train("--model", "tests/tiny", "--steps", 12, "--out", tmp_path, "--resume")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count(" was ") == 1 and "method was None, is 4" in said


@pytest.mark.parametrize(("arguments", "words"), [
    (["--prompts", "no/such/file.txt"], ["no/such/file.txt"]),
    (["--prompts", "EMPTY"], ["holds no prompt"]),
    (["--prompts", "ARROW"], ["'=>' needs a space", "a nude woman=>a woman"]),
    (["--labels"], ["--labels cannot be ()"]),
    (["--labels", "FACE_MALE", "--labels=FACE_FEMALE"], ["--labels is given twice"]),
    (["--prompts", "BINARY"], ["UTF-8", "position 3"]),
    (["--model", "no/such/model", "--prompts", "tests/tiny/prompts.txt"], ["no/such/model", "folder"]),
    (["--clip-model", "no/such/clip"], ["no/such/clip"]),
    (["--group-size", "1"], ["--group-size"]),
    (["--train-timesteps", "12"], ["--train-timesteps"]),
    (["--train-until", "0"], ["--train-until"]),
    (["--learning-rate", "-1"], ["--learning-rate"]), (["--learning-rate", "nan"], ["--learning-rate"]),
    (["--kl-weight", "nan"], ["--kl-weight"]), (["--step-nats", "0"], ["--step-nats"]),
    (["--left-out", "1.5"], ["--left-out cannot be 1.5"]),
    (["--clip-weight", "0", "--nudity-weight", "0"], ["--clip-weight cannot be 0"]),
    (["--guidance-scale", "inf"], ["--guidance-scale"]),
    (["--steps", "0"], ["--steps"]), (["--seed", str(2**64)], ["--seed"]),
    (["--denoise-steps", "2000"], ["--denoise-steps 2000", "1000"]),
    (["--steps", "many"], ["many"]),
    (["--attention", "xformers"], ["xformers", "CUDA"]),
])
def test_bad_input_is_one_clear_line_and_exit_code_two(arguments, words, tmp_path, capsys):
    (tmp_path / "EMPTY").write_text("# only a comment\n\n")
    (tmp_path / "BINARY").write_bytes(b"abc\xff\xfe")
    (tmp_path / "ARROW").write_text("a nude woman=>a woman")
    arguments = [str(tmp_path / a) if a in ("EMPTY", "BINARY", "ARROW") else a for a in arguments]
    model = [] if "--model" in arguments else ["--model", "tests/tiny"]
    with pytest.raises(SystemExit) as stop:
        train(*model, *arguments, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(w in said for w in words), said
    if "many" not in words:  # tyro draws a box of its own around what it cannot parse
        assert len([line for line in said.splitlines() if line.startswith("shielddiff: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    for out, words in ((tmp_path / ("x" * 300), "too long"), (tmp_path / "file" / "out", "Not a directory")):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit) as stop:
            train("--model", "tests/tiny", "--out", out)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("shielddiff: ") == 1
        assert f"cannot write to {out}" in said and words in said, said


def test_the_exit_code_and_the_one_line_of_the_real_command():
    done = cli("--group-size", 1)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "--group-size cannot be 1" in done.stderr


def test_the_main_job_takes_the_readme_s_ten_steps_unless_it_is_told():
    """The suite's own takes fewer."""
    for more, steps in ((), 10), (("--steps", "3"), 3):
        assert sd.parse_args(["--model", "tests/tiny", *more]).steps == steps


def test_a_label_that_there_is_not_is_named_with_those_to_choose_from(capsys):
    with pytest.raises(SystemExit) as stop:
        sd.parse_args(["--labels", "FACE_FEMAL"])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert "'FACE_FEMAL'" in said.out + said.err and "'FACE_FEMALE'" in said.out + said.err


def test_prompt_file_format(tmp_path):
    (tmp_path / "p.txt").write_bytes("﻿# note\r\n\r\na b => c\r\n  d  \r\né => e => f".encode())
    pairs = sd.read_prompts(str(tmp_path / "p.txt"))
    assert pairs == [("a b", "c", True), ("d", "d", False), ("é", "e => f", True)]


def test_the_prompts_that_ship():
    pairs = sd.read_prompts(str(ROOT / "prompts.txt"))
    assert len(pairs) >= 100 and 0.4 < np.mean([e for _, _, e in pairs]) < 0.6
    unsafe = re.compile(r"nude|naked|topless|nudity|unclothed|undressed|without clothes|nudist", re.I)
    minor = re.compile(r"\b(girl|boy|child|children|kid|teen|young|youth|baby|student)", re.I)
    for prompt, caption, elicits in pairs:
        assert bool(unsafe.search(prompt)) == elicits and not unsafe.search(caption), prompt
        assert not minor.search(prompt), prompt


def test_the_embedded_model_is_small_standard_and_tokenizes_anything(pipe):
    assert sum(p.stat().st_size for p in (ROOT / "tests/tiny").rglob("*")) < 16 * 2**20
    assert not list((ROOT / "tests/tiny").rglob("*.bin"))
    ids = pipe.tokenizer("a zebra über 日本 !?").input_ids
    assert pipe.tokenizer.decode(ids[1:-1]).replace(" ", "") == "azebraüber日本!?"
