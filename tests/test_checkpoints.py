"""Checkpoints and LoRAs as they lie on disks: each works, or one line says what to do."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import convert
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, draw, stock_pipeline, train
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

import eval as ev
import shielddiff as sd

TINY, UNET = ROOT / "tests/tiny", "unet/diffusion_pytorch_model.safetensors"
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(TINY, tmp_path / "a model")


def rename(*files):
    """To the names of a half-precision variant."""
    def change(model):
        for file in files:
            (model / file).rename(model / file.replace(".safetensors", ".fp16.safetensors"))
    return change


def shard(**options):
    def change(model):
        unet = sd.UNet2DConditionModel.from_pretrained(model / "unet", dtype=torch.float16)
        (model / UNET).unlink()
        unet.save_pretrained(model / "unet", max_shard_size="4MB", **options)
        assert not (model / UNET).exists() and len(list(model.glob("unet/*-of-*.safetensors"))) > 1
    return change


def edit(file, *without, **changes):
    def change(model):
        config = json.loads((model / file).read_text()) | changes
        (model / file).write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
    return change


def to_pickles(folder):
    for file in list(folder.rglob("*.safetensors")):
        name = "pytorch_model" if file.name == "model.safetensors" else file.stem
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()


def old_names(model):
    """Those of checkpoints before 2023."""
    old = {f"text_model.{k}": v for k, v in load_file(model / TEXT).items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, model / TEXT,
              metadata={"format": "pt"})
    vocabulary = json.loads((model / "tokenizer/tokenizer.json").read_text())["model"]
    (model / "tokenizer/vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]]
    (model / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (model / "tokenizer/tokenizer.json").unlink()


INDEX, TOKENIZER = "model_index.json", "tokenizer/tokenizer_config.json"
LISTED = dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
              feature_extractor=["transformers", "CLIPFeatureExtractor"],
              image_encoder=["transformers", "CLIPVisionModelWithProjection"], own_part=["own_module", "Own"])


@pytest.fixture(scope="module")
def picture(pipe):
    return pictures(pipe)


def pictures(pipe):
    """Float [2, 64, 64, 3], one of a prompt that is far longer than the text encoder reads."""
    return pipe(["an astronaut", "a horse on a meadow " * 50], num_inference_steps=2, output_type="np",
                generator=[torch.Generator().manual_seed(s) for s in (0, 1)]).images


@pytest.mark.parametrize("change", [
    rename(UNET), rename(TEXT), rename(UNET, VAE, TEXT), shard(), shard(variant="fp16"), old_names,
    edit(INDEX, **LISTED), edit(INDEX, own_part=None), edit(INDEX, *LISTED),
    edit(TOKENIZER, "model_max_length"), edit(TOKENIZER, model_max_length=512),
    lambda model: (model / TOKENIZER).unlink(), edit("text_encoder/config.json", dtype="float16"),
    lambda model: to_pickles(model / "clip"), lambda model: (model / "unet/other.bin").write_bytes(b"x")])
def test_what_lies_on_disks_draws_the_same_pictures(model, change, picture):
    change(model)
    assert np.array_equal(pictures(sd.load_pipeline(f"{model}/")), picture)


REVISION = "0123" * 10
FROM_THE_HUB = f"""
import eval as ev
pipe = ev.load_model(ev.parse_args("--model a/b --precision fp32".split()), "cpu")
assert ev.eval_systems.revision_of(pipe) == "{REVISION}"
"""


def test_a_link_and_the_hub_s_cache_are_folders_as_well(tmp_path, picture):
    """The cache: a snapshot of links to files with hashes for names."""
    snapshot = tmp_path / "models--a--b/snapshots" / REVISION
    for i, file in enumerate(p for p in TINY.rglob("*") if p.is_file()):
        blob = tmp_path / f"models--a--b/blobs/{i}"
        link = snapshot / file.relative_to(TINY)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (tmp_path / "link").symlink_to(snapshot)
    assert np.array_equal(pictures(sd.load_pipeline(str(tmp_path / "link"))), picture)
    (tmp_path / "models--a--b/refs").mkdir()
    (tmp_path / "models--a--b/refs/main").write_text(REVISION)
    done = subprocess.run([sys.executable, "-c", FROM_THE_HUB], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | dict(HF_HUB_CACHE=str(tmp_path)))
    assert done.returncode == 0, done.stderr


def refused(capsys, function, *arguments):
    """The one line with which a call ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("shielddiff: ")]
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize(("change", "words"), [
    (lambda m: to_pickles(m / "text_encoder"), "text_encoder tests/convert.py"),
    (edit("unet/config.json", "sample_size"), "sample_size unet/config.json None 64"),
    (edit("unet/config.json", sample_size=[16, 24]), "sample_size [16, 24] number"),
    (edit("unet/config.json", in_channels=9), "unet conv_in"),
    (edit("unet/config.json", time_cond_proj_dim=256), "unet lacks time_embedding.cond_proj"),
    (lambda m: (m / UNET).write_text("version https://git-lfs.github.com/spec/v1"), "git-lfs"),
    (lambda m: (m / UNET).rename(m / "unet/diffusion_pytorch_model.non_ema.safetensors"), "unet no file"),
    (lambda m: shutil.rmtree(m / "scheduler"), "scheduler_config.json"),
    (lambda m: (m / INDEX).unlink(), "model_index.json diffusers layout"),
    *((edit(INDEX, _class_name=f"StableDiffusion{kind}Pipeline"), f"StableDiffusion{kind}Pipeline 1.x 2.x")
      for kind in ("XL", "3", "Inpaint", "ControlNet"))])
def test_what_does_not_work_is_refused_in_one_line(model, change, words, capsys):
    change(model)
    line = refused(capsys, sd.load_pipeline, str(model))
    assert str(model) in line and all(word in line for word in words.split()), line


@pytest.mark.parametrize("name", ["v1-5-pruned.ckpt", "v1-5.safetensors"])
def test_of_a_single_file_the_line_says_what_makes_a_folder(name, tmp_path, capsys):
    shutil.copy(TINY / UNET, tmp_path / name)
    line = refused(capsys, sd.load_pipeline, str(tmp_path / name))
    assert "a single file" in line and f"python tests/convert.py '{tmp_path / name}' NEW" in line


@pytest.mark.parametrize("part", ["", "clip"])
def test_the_command_that_a_refusal_names_converts(part, model, picture, capsys):
    """Of a pipeline with .bin weights and of a CLIPModel, as they are loaded afterwards."""
    to_pickles(model)
    line = refused(capsys, sd.load_clip if part else sd.load_pipeline, str(model / part))
    command = shlex.split(re.search(r"python tests/convert.py '.*' ", line)[0])
    assert command[:2] == ["python", "tests/convert.py"]
    convert.main(command[2], str(model / "new"))
    if part:
        clip, processor = sd.load_clip(str(model / "new"))
        theirs = sd.caption_features(*sd.load_clip(str(TINY / "clip")), ["a horse"])
        assert torch.equal(sd.caption_features(clip, processor, ["a horse"]), theirs)
    else:
        assert np.array_equal(pictures(sd.load_pipeline(str(model / "new"))), picture)


# ------------------------------------------------------------------------------------ what people type
def test_the_one_line_that_people_type_draws(tmp_path):
    """Without a dtype transformers takes the config's, diffusers fp32: they have to be the same."""
    typed = draw(StableDiffusionPipeline.from_pretrained(TINY), ["an astronaut"], 5)
    assert np.array_equal(typed, draw(StableDiffusionPipeline.from_pretrained(TINY, dtype=torch.float32),
                                      ["an astronaut"], 5))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A run of two steps so large that its LoRA shows."""
    out = tmp_path_factory.mktemp("lora") / "run"
    train(*SMALL, "--steps", 2, "--learning-rate", 0.05, "--out", out)
    return out


def test_the_readme_s_lines_work_for_a_checkpoint_saved_in_half_precision(lora, tmp_path):
    """Parts of two precisions end in a traceback at the first picture, which takes minutes in fp16 here."""
    StableDiffusionPipeline.from_pretrained(TINY, dtype=torch.float16).save_pretrained(tmp_path / "half")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    for there, here in (('"stable-diffusion-v1-5/[^"]*"', tmp_path / "half"), ('"runs/[^"]*"', lora)):
        code = re.sub(there, repr(str(here)), code)
    scope = dict(StableDiffusionPipeline=StableDiffusionPipeline, torch=torch)
    exec(code.replace('.to("cuda")', ""), scope)
    pipe = scope["pipe"]
    assert len({part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)}) == 1
    assert {w.dtype for w in pipe.unet.parameters()} == {pipe.dtype} and pipe.get_active_adapters()


def test_the_kohya_file_has_the_names_of_web_uis_and_draws_the_same_in_diffusers(lora):
    """Names as in ComfyUI's model_lora_keys_unet and A1111's convert_diffusers_name_to_compvis."""
    kohya, ours = (load_file(lora / f"{name}.safetensors") for name in ("kohya_lora", "pytorch_lora_weights"))
    block = r"(down_blocks_\d+|up_blocks_\d+|mid_block)_attentions_\d+_transformer_blocks_\d+"
    layer = rf"lora_unet_{block}_attn[12]_to_(q|k|v|out_0)"
    assert all(re.fullmatch(rf"{layer}\.(alpha|lora_(down|up)\.weight)", k) for k in kohya)
    assert len(kohya) == 1.5 * len(ours)
    rank = sd.Args(**sd.TINY).lora_rank
    assert all(v.item() == rank for k, v in kohya.items() if k.endswith("alpha"))
    assert all(v.shape[0] == rank for k, v in kohya.items() if "lora_down" in k)
    assert all(v.shape[1] == rank for k, v in kohya.items() if "lora_up" in k)
    prompts = ["an astronaut", "a horse"]
    base, theirs, folder, file = (draw(stock_pipeline(which), prompts, 5).astype(int) for which in (
        None, lora / "kohya_lora.safetensors", lora, lora / "pytorch_lora_weights.safetensors"))
    assert abs(theirs - file).max() <= 1 and np.array_equal(folder, file) and abs(file - base).mean() > 1


def test_eval_finds_the_lora_of_a_run_and_takes_the_kohya_file_by_name(lora, pipe):
    args = ev.Args(lora=(f"run={lora}", f"{lora}/kohya_lora.safetensors"))
    systems = ev.list_systems(args)[1:]
    assert [ev.Path(s.path).name for s in systems] == ["pytorch_lora_weights.safetensors",
                                                      "kohya_lora.safetensors"]
    run, kohya = (drawn(pipe, system) for system in systems)
    assert abs(run - kohya).max() < 0.01 and abs(run - pictures(pipe)).mean() > 0.01


# ------------------------------------------------------------------------------------ a folder that moved
def test_a_run_goes_on_with_the_same_weights_wherever_they_lie_and_with_no_others(lora, tmp_path, capsys):
    """Weights that differ in one number are others: of the U-Net, of CLIP. So is another noise schedule."""
    shutil.copytree(lora, tmp_path / "run")
    moved = shutil.copytree(TINY, tmp_path / "moved")
    arguments = (*SMALL[2:], "--learning-rate", 0.05, "--out", tmp_path / "run", "--resume", "--model", moved,
                 "--clip-model", moved / "clip", *settings_of_the_embedded_model())
    train(*arguments, "--steps", 3)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    for file in (UNET, VAE, TEXT, "clip/model.safetensors"):
        whole = (moved / file).read_bytes()
        tensors = load_file(moved / file)
        tensors[sorted(tensors)[-1]].view(-1)[-1] += 0.5
        save_file(tensors, moved / file, metadata={"format": "pt"})
        line = refused(capsys, train, *arguments, "--steps", 4)
        assert "--resume with another --model, --clip-model or device" in line
        (moved / file).write_bytes(whole)
    schedule = moved / "scheduler/scheduler_config.json"  # sigma and with it every log-prob
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | dict(beta_end=0.02)))
    assert "--resume with another --model" in refused(capsys, train, *arguments, "--steps", 4)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def settings_of_the_embedded_model():
    """As flags, for a copy of it elsewhere."""
    given = {a.removeprefix("--").replace("-", "_") for a in map(str, SMALL) if a.startswith("--")}
    flags = []
    for name, value in sd.TINY.items():
        if name not in given | {"model", "clip_model", "steps", "prompts"}:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            flags += [flag, *([] if value is False else value if isinstance(value, tuple) else [value])]
    return flags


def test_runs_are_named_after_the_model_s_folder(model, monkeypatch):
    monkeypatch.chdir(model)
    for path in (".", f"{model}/", str(model), "../a model"):
        assert sd.parse_args(["--model", path]).out == "runs/a model-0"
    assert sd.parse_args(["--model", "someone/some-model", "--seed", "3"]).out == "runs/some-model-3"


# ------------------------------------------------------------------------------------ systems of eval.py
def drawn(pipe, system):
    with ev.switched_on(pipe, system, None):
        return pictures(pipe)


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A text encoder with other weights."""
    folder, torch_state = tmp_path_factory.mktemp("edited"), torch.manual_seed(0)
    encoder = sd.CLIPTextModel.from_pretrained(TINY / "text_encoder")
    for p in encoder.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch_state)
    encoder.save_pretrained(folder)
    return folder


def test_an_edited_text_encoder_is_a_system_and_the_base_model_s_comes_back(edited, pipe, picture):
    [_, system] = ev.list_systems(ev.parse_args(["--model", "tests/tiny", "--text-encoder", f"adv={edited}"]))
    assert (system.name, system.kind, system.path) == ("adv", "text-encoder", f"{edited}/model.safetensors")
    theirs = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    theirs.text_encoder = sd.CLIPTextModel.from_pretrained(edited)
    before, theirs = pipe.text_encoder, pictures(theirs)
    assert np.array_equal(drawn(pipe, system), theirs) and abs(theirs - picture).mean() > 0.01
    assert pipe.text_encoder is before and np.array_equal(pictures(pipe), picture)
    [_, system] = ev.list_systems(ev.Args(text_encoder=(str(TINY),)))  # a whole pipeline's folder
    assert np.array_equal(drawn(pipe, system), picture)


@pytest.mark.parametrize("change", [lambda m: None, rename(UNET), shard(), shard(variant="fp16")])
def test_a_u_net_may_be_sharded_and_its_digest_is_that_of_all_shards(change, model, pipe, picture):
    change(model)
    [_, system] = ev.list_systems(ev.Args(unet=(str(model),)))
    assert np.array_equal(drawn(pipe, system), picture)
    digest = ev.eval_systems.fingerprint("unet", system.path)
    file = sorted(model.glob("unet/*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert ev.eval_systems.fingerprint("unet", system.path) != digest


def another_text_encoder(**changes):
    config = json.loads((TINY / "text_encoder/config.json").read_text()) | changes
    return lambda folder: sd.CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder)


@pytest.mark.parametrize(("kind", "spoil", "words"), [
    ("text-encoder", lambda f: to_pickles(f), "pytorch_model.bin can run code"),
    ("text-encoder", lambda f: f / "model.safetensors", "is a file give the folder"),
    ("text-encoder", lambda f: (f / "model.safetensors").unlink(), "there is no"),
    ("text-encoder", another_text_encoder(hidden_size=64), "other text_encoder"),
    ("text-encoder", another_text_encoder(num_hidden_layers=2), "other text_encoder"),
    ("unet", lambda f: sd.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=96,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4, norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).save_pretrained(f), "other unet"),
    ("lora", lambda f: torch.save({}, f / "pytorch_lora_weights.bin"), "can run code"),
    ("lora", lambda f: torch.save({}, f / "a.pt") or f / "a.pt", "can run code a.safetensors")])
def test_a_system_that_does_not_fit_is_refused(kind, spoil, words, edited, pipe, tmp_path, capsys):
    folder = shutil.copytree(edited, tmp_path / "system")
    path = spoil(folder) or folder
    args = ev.Args(**{kind.replace("-", "_"): (f"a={path}",)})
    line = refused(capsys, lambda: drawn(pipe, ev.list_systems(args)[1]))
    assert f"--{kind} " in line and all(w in line for w in words.split()), line


def test_the_command_for_a_pickled_text_encoder_makes_one_that_loads(edited, pipe, tmp_path, capsys):
    folder = shutil.copytree(edited, tmp_path / "system")
    args = ev.Args(text_encoder=(str(folder),))
    as_it_was = drawn(pipe, ev.list_systems(args)[1])
    to_pickles(folder)
    command = re.search(r'python -c "(.*)"', refused(capsys, ev.list_systems, args))[1]
    exec(command)
    assert np.array_equal(drawn(pipe, ev.list_systems(args)[1]), as_it_was)


@pytest.mark.parametrize(("steps", "spacing", "words"), [
    (1000, "trailing", None), (999, "leading", None), (1000, "leading", "1000"), (1001, "trailing", "1001")])
def test_as_many_steps_as_timesteps_are_taken_unless_they_begin_after_the_last(steps, spacing, words, model,
                                                                             capsys):
    """The offset of 1 in Stable Diffusion's scheduler puts the first of 1000 'leading' ones at t = 1000."""
    edit("scheduler/scheduler_config.json", timestep_spacing=spacing)(model)
    config = sd.DDIMScheduler.load_config(model / "scheduler")
    args = ev.Args(model=str(model), steps=steps, precision="fp32")
    for function, arguments, flag in ((sd.noise_schedule, (config, steps), "--denoise-steps"),
                                      (ev.load_model, (args, "cpu"), "--steps")):
        if words:
            line = refused(capsys, function, *arguments)
            assert words in line and flag in line, line
        else:
            function(*arguments)
