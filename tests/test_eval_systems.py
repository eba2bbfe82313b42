"""eval.py and the weights of others: whatever is recorded is loaded, whatever is loaded is applied whole."""
import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, stock_pipeline
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as ev
import shielddiff as sd

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe():
    return ev.load_model(ev.parse_args(["--model", "tests/tiny"]), "cpu")


@pytest.fixture(scope="module")
def lora():
    """A LoRA of the embedded model's U-Net and text encoder, nowhere zero: {diffusers' name: tensor}."""
    pipe, tensors = stock_pipeline(), {}
    torch.manual_seed(0)
    for part, model, targets in (("unet", pipe.unet, ["to_q", "to_v", "to_out.0"]),
                                 ("text_encoder", pipe.text_encoder, ["q_proj", "out_proj"])):
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        found = get_peft_model_state_dict(model)
        tensors |= {f"{part}.{k}": torch.randn_like(v) * 0.1 for k, v in found.items()}
    return tensors


def kohya(tensors, alpha=2.0):
    """The same in kohya's naming, with an alpha for each pair."""
    unet = convert_state_dict_to_kohya({k: v for k, v in tensors.items() if k.startswith("unet.")})
    unet = {k if k.startswith("lora_") else f"lora_{k}": v for k, v in unet.items()}
    return {k: torch.tensor(alpha) if k.endswith(".alpha") else v for k, v in unet.items()}


def on(pipe, *arguments):
    """The last system of a command line, switched on."""
    args = ev.parse_args(["--model", "tests/tiny", *map(str, arguments)])
    return ev.switched_on(pipe, ev.list_systems(args)[-1], None)


def refused(pipe, capsys, *arguments):
    """The one line with which a system is refused."""
    with pytest.raises(SystemExit) as stop, on(pipe, *arguments):
        pass
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shielddiff: ")]
    assert stop.value.code == 2 and len(said) == 1 and "Traceback" not in said[0], said
    return said[0]


def picture(pipe, draw=None, **call):
    call = dict(prompt=["an astronaut"], num_inference_steps=3, guidance_scale=3.0, output_type="np",
                generator=[torch.Generator().manual_seed(7)]) | call
    return (draw or functools.partial(ev.stock_draw, pipe))(call)[0]


# ------------------------------------------------------------------------------------ LoRAs
@pytest.mark.parametrize("part", ["unet", "text_encoder", ""])
def test_a_whole_lora_draws_as_in_stock_diffusers(part, pipe, lora, tmp_path):
    save_file({k: v for k, v in lora.items() if k.startswith(part)}, tmp_path / "a.safetensors")
    with on(pipe, "--lora", tmp_path / "a.safetensors") as draw:
        ours = picture(pipe, draw)
    stock = stock_pipeline(str(tmp_path / "a.safetensors"))
    assert np.allclose(ours, picture(stock), atol=1e-5) and abs(ours - picture(pipe)).max() > 0.05


def test_a_lora_in_kohya_s_naming_is_applied_at_its_alpha(pipe, lora, tmp_path):
    """alpha 2 of rank 4: half of what the same tensors do at alpha 4."""
    found = {}
    for alpha in (4.0, 2.0):
        save_file(kohya(lora, alpha), tmp_path / "k.safetensors")
        with on(pipe, "--lora", tmp_path / "k.safetensors") as draw:
            found[alpha] = picture(pipe, draw)
    halved = {k: v / 2 if "lora_B" in k else v for k, v in lora.items() if k.startswith("unet.")}
    save_file(halved, tmp_path / "half.safetensors")
    with on(pipe, "--lora", tmp_path / "half.safetensors") as draw:
        assert np.allclose(picture(pipe, draw), found[2.0], atol=1e-5)
    assert abs(found[4.0] - found[2.0]).max() > 0.01


def spoilt(lora):
    """{what: (tensors that are not a LoRA of this model's, what the refusal names)}"""
    unet = {k: v for k, v in lora.items() if k.startswith("unet.")}
    first = next(iter(unet)).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    down, up = f"{first}.lora_A.weight", f"{first}.lora_B.weight"
    flat = {k.replace(".lora_A.weight", "").replace(".lora_B.weight", "").replace(".", "_") for k in unet}
    name = "lora_" + sorted(flat)[0]
    loha = {f"{n}.hada_{w}": torch.ones(4, 4) for n in flat for w in ("w1_a", "w1_b", "w2_a", "w2_b")}
    return dict(
        another_module=(unet | {f"unet.nowhere.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
                        "unet.nowhere.lora_A.weight"),
        another_part=(unet | {"text_encoder_2.x.lora_A.weight": torch.ones(4, 64)}, "text_encoder_2.x"),
        no_part=({k.removeprefix("unet."): v for k, v in unet.items()}, "to_q.lora_A.weight"),
        lost_half=({k: v for k, v in unet.items() if k != up}, "lora_B"),
        magnitude=(unet | {f"{first}.lora_A.dora_scale": torch.ones(64)}, "dora_scale"),
        kohya_magnitude=(kohya(lora) | {f"{name}.dora_scale": torch.ones(64, 1)}, "dora_scale"),
        alpha=(unet | {f"{first}.lora.alpha": torch.tensor(1.0)}, f"{first}.lora.alpha"),
        plain_alpha=(unet | {f"{first}.alpha": torch.tensor(1.0)}, "lora"),
        bias=(unet | {f"{first}.lora_A.bias": torch.ones(4)}, "lora_A.bias"),
        difference=(kohya(lora) | {f"{name}.diff_b": torch.ones(64)}, "diff_b"),
        loha=({f"lora_{k}": v for k, v in loha.items()}, "hada_"),
        lokr=({f"lora_{n}.lokr_{w}": torch.ones(4, 4) for n in flat for w in ("w1", "w2")}, "lokr_"),
        shape=({k: torch.cat([v, v], dim=-1) for k, v in unet.items()}, "--lora"),
        empty=({"unet.x": torch.ones(1)}, "--lora"), down_only=({down: unet[down]}, "lora"))


KINDS = ("another_module another_part no_part lost_half magnitude kohya_magnitude alpha plain_alpha bias "
         "difference loha lokr shape empty down_only").split()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_which_a_part_would_be_left_out_is_refused_by_name(kind, pipe, lora, tmp_path, capsys):
    tensors, word = spoilt(lora)[kind]
    save_file(tensors, tmp_path / "a.safetensors")
    said = refused(pipe, capsys, "--lora", tmp_path / "a.safetensors")
    assert word in said and "a.safetensors" in said, said


def test_the_file_of_a_folder_is_its_default_or_named(pipe, lora, tmp_path, capsys):
    unet = {k: v for k, v in lora.items() if k.startswith("unet.")}
    for name in ("b.safetensors", "a.safetensors"):
        save_file(unet, tmp_path / name)
    said = refused(pipe, capsys, "--lora", tmp_path)
    assert "pytorch_lora_weights.safetensors" in said and "a.safetensors, b.safetensors" in said
    save_file(kohya(lora), tmp_path / "pytorch_lora_weights.safetensors")
    args = ev.parse_args(["--model", "tests/tiny", "--lora", f"x={tmp_path}", f"y={tmp_path}/a.safetensors"])
    assert [s.path for s in ev.list_systems(args)[1:]] == [
        str(tmp_path / "pytorch_lora_weights.safetensors"), str(tmp_path / "a.safetensors")]
    assert "hub" in refused(pipe, capsys, "--lora", "someone/on-a-hub")
    torch.save(unet, tmp_path / "a.bin")
    assert "can run code" in refused(pipe, capsys, "--lora", tmp_path / "a.bin")


def test_an_equals_sign_may_be_in_a_path_and_no_repeated_flag_is_lost(tmp_path, lora):
    path = tmp_path / "runs/lr=1e-4"
    path.mkdir(parents=True)
    save_file(lora, path / "pytorch_lora_weights.safetensors")
    for words, names in (([f"--lora=mine={path}", f"--lora=b={path}"], ["mine", "b"]),
                         (["--lora", f"mine={path}", f"--lora={path}"], ["mine", "lr=1e-4"]),
                         (["--lora", path, "--lora", f"b={path}"], ["lr=1e-4", "b"])):
        systems = ev.list_systems(ev.parse_args(["--model=tests/tiny", *map(str, words)]))[1:]
        assert [s.name for s in systems] == names
        assert {s.path for s in systems} == {str(path / "pytorch_lora_weights.safetensors")}
    args = ev.parse_args(["--model=tests/tiny", "--seeds=3", "--batch_size=2", "--prompts=a",
                          "--prompts", "b", "c"])
    assert (args.seeds, args.batch_size, args.prompts) == (3, 2, ("a", "b", "c"))
    with pytest.raises(SystemExit):
        ev.parse_args(["--model=tests/tiny", "--batch-size", "3", "--batch_size=4"])


# ------------------------------------------------------------------------------------ U-Nets
@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded U-Net's folder, with a second file beside, all of whose weights are halved."""
    shutil.copytree(ROOT / "tests/tiny/unet", tmp_path / "unet")
    half = {k: v / 2 for k, v in load_file(tmp_path / "unet" / WEIGHTS).items()}
    save_file(half, tmp_path / "unet/esd.safetensors")
    return tmp_path / "unet"


def system_of(*arguments):
    args = ev.parse_args(["--model", "tests/tiny", *map(str, arguments)])
    return ev.list_systems(args)[-1]


def test_the_file_that_is_named_is_loaded_and_recorded(pipe, folder):
    named, whole = system_of("--unet", f"esd={folder}/esd.safetensors"), system_of("--unet", f"a={folder}")
    before = pipe.unet.state_dict()
    for system, factor, file in ((named, 0.5, "esd.safetensors"), (whole, 1, WEIGHTS)):
        with ev.switched_on(pipe, system, None):
            for key, value in pipe.unet.state_dict().items():
                assert torch.allclose(value, before[key] * factor, atol=1e-6), key  # the file is in fp16
            assert not any(p.requires_grad or p.is_meta for p in pipe.unet.parameters())
        assert system.path == str(folder / file)
        assert ev.eval_systems.fingerprint("unet", system.path) == dict(
            sha256=ev.sha256(folder / file), config_sha256=ev.sha256(folder / "config.json"))
    (folder.parent / "link.safetensors").symlink_to(folder / "esd.safetensors")
    shutil.copy(folder / "config.json", folder.parent)
    with on(pipe, "--unet", folder.parent / "link.safetensors"):
        assert torch.allclose(pipe.unet.conv_in.weight, before["conv_in.weight"] / 2, atol=1e-6)


def test_a_sharded_unet_is_loaded_and_recorded_with_all_its_shards(pipe, folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(ROOT / "tests/tiny/unet")
    unet.save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    system, before = system_of("--unet", f"s={tmp_path}/sharded"), pipe.unet.state_dict()
    with ev.switched_on(pipe, system, None):
        assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    recorded = ev.eval_systems.fingerprint("unet", system.path)
    last = load_file(shards[-1])
    save_file({k: v + 1 for k, v in last.items()}, shards[-1])
    assert ev.eval_systems.fingerprint("unet", system.path)["sha256"] != recorded["sha256"]
    os.remove(shards[-1])
    with pytest.raises(SystemExit):
        ev.eval_systems.fingerprint("unet", system.path)


@pytest.mark.parametrize(("change", "words"), [
    (dict(num_class_embeds=10), ["num_class_embeds 10"]), (dict(class_embed_type="timestep"), ["timestep"]),
    (dict(addition_embed_type="text_time", addition_time_embed_dim=32), ["addition_embed_type"]),
    (dict(time_cond_proj_dim=32), ["time_cond_proj_dim"]), (dict(in_channels=9), ["in_channels 9, not 4"]),
    (dict(encoder_hid_dim=32, encoder_hid_dim_type="text_proj"), ["encoder_hid_dim"]),
    (dict(cross_attention_dim=768), ["cross_attention_dim 768, not 96"]),
    (dict(_class_name="SD3Transformer2DModel"), ["SD3Transformer2DModel"]),
    (dict(layers_per_block=2), ["lacking", "down_blocks.0.resnets.1"]),
    (dict(block_out_channels=[64, 96, 160]), ["another shape", "and"]),
    (dict(mid_block_type=None), ["unknown", "mid_block"])])
def test_a_unet_that_cannot_be_used_whole_is_refused_by_name(change, words, pipe, folder, capsys):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(pipe, capsys, "--unet", folder)
    assert all(word in said for word in words), said
    (folder / "config.json").unlink()
    assert "there is no" in refused(pipe, capsys, "--unet", folder / WEIGHTS)


def test_missing_and_unknown_weights_are_named(pipe, folder, capsys):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "conv_in" not in k}, folder / "a.safetensors")
    said = refused(pipe, capsys, "--unet", folder / "a.safetensors")
    assert "2 tensors" in said and "conv_in.bias, conv_in.weight" in said
    save_file(tensors | {"text_encoder.x": torch.ones(1)}, folder / "a.safetensors")
    assert "text_encoder.x" in refused(pipe, capsys, "--unet", folder / "a.safetensors")
    (folder / "a.safetensors").write_bytes(b"\x08")
    assert "a.safetensors" in refused(pipe, capsys, "--unet", folder / "a.safetensors")


# ------------------------------------------------------------------------------------ one sampler
SCHEDULERS = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
              "PNDMScheduler", "DDIMScheduler")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_system_draws_as_stock_ddim_before_and_after_image_to_image(name, tmp_path):
    """A scheduler's config saved from scratch; DDIM's own clips, and starts at an offset of 0."""
    import diffusers
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "model")
    scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(tmp_path / "model/scheduler")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps(index | dict(scheduler=["diffusers", name])))
    args = ev.Args(model=str(tmp_path / "model"), precision="fp32")
    pipe, stock = ev.load_model(args, "cpu"), stock_pipeline()
    config = dict(pipe.scheduler.config)
    assert config["clip_sample"] is False and config["steps_offset"] == 1  # as in stock's pipeline
    saved = type(scheduler).from_pretrained(tmp_path / "model/scheduler").config
    stock.scheduler = DDIMScheduler.from_config(saved, clip_sample=False, steps_offset=1)
    theirs, photo = picture(stock), [Image.new("RGB", (64, 64), "olive")]
    again = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    start = dict(image=photo, strength=0.7)
    from_photo = again(prompt=["an astronaut"], num_inference_steps=3, guidance_scale=3.0, output_type="np",
                       generator=[torch.Generator().manual_seed(7)], **start).images
    for _ in range(2):
        assert np.array_equal(picture(pipe), theirs)
        assert np.allclose(picture(pipe, **start), from_photo, atol=1e-5)
        assert dict(pipe.scheduler.config) == config
    assert torch.equal(sd.noise_schedule(pipe.scheduler.config, 3).timesteps, stock.scheduler.timesteps)


def test_image_to_image_s_noise_is_that_of_full_precision(pipe):
    """Of the vae's float16 there is a difference of rounding only; another noise differs by about 1."""
    make = functools.partial(ev.eval_systems.ImageToImage, requires_safety_checker=False)
    image, found = torch.full((2, 3, 64, 64), 0.3), {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe.vae.to(dtype)
        gens = [torch.Generator().manual_seed(s) for s in (5, 6)]
        found[dtype] = make(**pipe.components).prepare_latents(
            image, torch.tensor([600, 600]), 2, 1, dtype, "cpu", generator=gens).float()
    pipe.vae.to(torch.float32)
    assert abs(found[torch.float32] - found[torch.bfloat16]).mean() < 0.02
    assert abs(found[torch.float32][0] - found[torch.float32][1]).mean() > 0.5
