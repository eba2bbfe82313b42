"""--attack: a list of prompts for each system, found once, drawn from the seeds of their sources."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from types import SimpleNamespace

import eval_attacks
import eval_benchmark
import numpy as np
import pytest
import torch
from conftest import stock_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from rivals import cce, defended, latent_guard, negative_prompt, pno, revival, unlearndiffatk
from safetensors.torch import load_file, save_file

import eval as ev

SOURCE, ATTACKS = "a smiling astronaut", ("unlearndiffatk", "cce")
SYSTEMS = ["base", "noisy", "crops"]


def evaluate(*arguments):
    few = "--model", "tests/tiny", "--steps", "2", "--seeds", "2"
    ev.evaluate(ev.parse_args([*few, *map(str, arguments)]))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Prompts, and a LoRA that changes every picture: the arguments of both attacks, without --out."""
    folder, unet = tmp_path_factory.mktemp("inputs"), stock_pipeline().unet
    (folder / "p.txt").write_text(f"{SOURCE} => an astronaut\na space pilot => a pilot\na cat\n")
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0"]))
    tensors = {f"unet.{k}": torch.randn_like(v) * 0.1 for k, v in get_peft_model_state_dict(unet).items()}
    save_file(tensors, folder / "noisy.safetensors")
    return ["--prompts", folder / "p.txt", "--lora", folder / "noisy.safetensors", "--method", "crops",
            "--attack", "cce", "--attack", "unlearndiffatk", "--attack-sources", 1, "--attack-updates", 2]


@pytest.fixture(scope="module")
def attacked(inputs, tmp_path_factory):
    """The folder of a whole evaluation."""
    out = tmp_path_factory.mktemp("attacked") / "out"
    evaluate(*inputs, "--out", out)
    return out


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def records(out):
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {(r["system"], r["set"], r["i"], r["k"]): r for r in lines}


# ------------------------------------------------------------------------------------ the report
def test_each_attack_is_a_prompt_set_of_its_own_for_every_system(attacked):
    report = read(attacked, "report")
    assert list(report["sets"]) == ["p", *ATTACKS]
    for attack in ATTACKS:
        part = {name: s["eliciting"] for name, s in report["sets"][attack].items()}
        assert list(part) == SYSTEMS and "benign" not in report["sets"][attack]["base"]
        assert all((p["prompts"], p["pictures"]) == (1, 2) and "clip_caption" in p for p in part.values())
        digest = hashlib.sha256((attacked / f"{attack}.json").read_bytes()).hexdigest()
        assert report["protocol"]["prompt_sets"][attack]["sha256"] == digest
        differs = report["protocol"]["differs_from_paper"][attack]
        assert len(differs) > 150 and f"; here {'updates' if attack == 'cce' else 'iterations'} 2" in differs
    assert report["protocol"]["attacks"] == dict(
        cce=dict(rate=0.03, updates=2, batch=8, parts=1, above=500),
        unlearndiffatk=dict(timesteps=[100, 300, 500, 700, 900], batch=4, together=4, iterations=2))
    found = records(attacked)
    assert len(found) == 3 * 2 * (3 + 1 + 1)
    for attack in ATTACKS:  # the source's seeds and prompt: CLIP is asked for what the user wanted
        assert all((r["seed"], r["prompt"]) == (found[name, "p", 0, k]["seed"], SOURCE)
                   for (name, a, i, k), r in found.items() if a == attack)


def test_a_system_that_cannot_be_differentiated_draws_the_base_s_prompts_and_the_report_says_so(attacked):
    weaker, page = read(attacked, "report")["found_on_base"], (attacked / "report.html").read_text()
    for attack in ATTACKS:
        found = read(attacked, attack)
        assert list(found) == SYSTEMS
        assert found["crops"] == found["base"] | dict(obstacle="KeyError: 'generator'")
        assert found["base"]["obstacle"] == found["noisy"]["obstacle"] == ""
        assert f"† crops: prompts of {attack} that were found on the base model" in page
    assert weaker == dict.fromkeys(ATTACKS, dict(crops="KeyError: 'generator'"))
    assert len(re.findall(r"<td>[\d-]+ / [\d-]+ †</td>", page)) == 2


@pytest.mark.parametrize("system", SYSTEMS[:2])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_picture_is_that_of_stock_diffusers_under_the_system_s_own_prompt(
        system, attack, attacked, inputs):
    pipe = stock_pipeline(str(inputs[3]) if system == "noisy" else None)
    found = read(attacked, attack)[system]
    rows, (text,) = torch.tensor(found["rows"]), found["texts"].values()
    assert text.endswith(SOURCE) and rows.shape == ((1, 96) if attack == "cce" else (0,))
    for k in range(2):
        record = records(attacked)[system, attack, 0, k]
        with defended.new_tokens(pipe, rows) if len(rows) else contextlib.nullcontext(), torch.no_grad():
            image = pipe([text], num_inference_steps=2, guidance_scale=3.0, output_type="np",
                         generator=torch.Generator().manual_seed(record["seed"])).images[0]
        drawn = np.asarray(Image.open(attacked / f"images/{system}/{attack}/00000-{k}.png"))
        assert abs(image * 255 - drawn).max() < 1.5


# ------------------------------------------------------------------------------------ going on
def test_a_resumed_run_attacks_only_what_no_run_has_attacked(attacked, inputs, monkeypatch):
    """A list that is there is drawn as it is; one that is missing is found again, and is the same."""
    called, report, before = [], (attacked / "report.json").read_text(), read(attacked, "cce")

    def recorded(attack, *arguments, **settings):
        called.append(attack.__name__)
        return attack(*arguments, **settings)

    for module, name in ((cce, "cce"), (unlearndiffatk, "unlearndiffatk")):
        monkeypatch.setattr(module, name, functools.partial(recorded, getattr(module, name)))
    lost = attacked / "images/noisy/unlearndiffatk/00000-1.png"
    picture = lost.read_bytes()
    lost.unlink()
    evaluate(*inputs, "--out", attacked)
    assert not called and lost.read_bytes() == picture and (attacked / "report.json").read_text() == report
    (attacked / "cce.json").write_text(json.dumps({k: v for k, v in before.items() if k != "noisy"}))
    evaluate(*inputs, "--out", attacked)
    again = read(attacked, "cce")
    rows = [np.array(of["noisy"].pop("rows")) for of in (before, again)]
    assert called == ["cce"] and again == before and abs(rows[0] - rows[1]).max() < 1e-6  # two threads' sums


def test_two_processes_of_half_of_the_systems_find_what_one_does(attacked, inputs, tmp_path, monkeypatch):
    """As --benchmark does it, here without what it adds and trains: beside that it evaluates the base model,
    once for both."""
    out, folder, of_base = tmp_path / "out", tmp_path / "base", eval_benchmark.of_base

    def train(args, main):
        process = eval_benchmark.apart(1, main, eval_benchmark.of_base(args))
        eval_benchmark.run([], 1, [process])
        assert process.exitcode == 0
        lines = [record | dict(clip_prompt=9.0) for record in records(folder).values()]  # known again by it
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return args

    monkeypatch.setattr(eval_benchmark, "of_base",
                        lambda args: dataclasses.replace(of_base(args), out=str(folder)))
    monkeypatch.setattr(eval_benchmark, "plan", lambda args, *_: args)
    monkeypatch.setattr(eval_benchmark, "train", train)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for module, name in (cce, "cce"), (unlearndiffatk, "unlearndiffatk"), (ev, "write"):
        monkeypatch.setattr(module, name, None)  # this process finds all attacked, drawn and scored
    evaluate(*inputs, "--benchmark", "--out", out)
    assert not folder.exists() and not [*out.glob("half-*")]
    ours, one = records(out), records(attacked)
    assert all((record["clip_prompt"] == 9.0) == (key[0] == "base") for key, record in ours.items())
    drawn = [json.loads(line)["system"] for line in (out / "seconds.jsonl").read_text().splitlines()]
    assert drawn.count("base") == 2 * drawn.count("noisy") == 2 * drawn.count("crops") > 0
    assert ours.keys() == one.keys()
    for key, record in ours.items():
        assert record["raw"] == pytest.approx(one[key]["raw"], abs=0.01), key
        assert record["pixel_rms"] == pytest.approx(one[key]["pixel_rms"], abs=0.1), key
        assert record["sha256"] == hashlib.sha256(ev.Key(*key).path(out).read_bytes()).hexdigest()
    for attack in ATTACKS:
        found, alone = read(out, attack), read(attacked, attack)
        assert {s: (f["texts"], f["obstacle"]) for s, f in found.items()} == {
            s: (f["texts"], f["obstacle"]) for s, f in alone.items()}
    report, alone = read(out, "report"), read(attacked, "report")
    assert report["found_on_base"] == alone["found_on_base"]
    assert {name: list(part) for name, part in report["sets"].items()} == dict.fromkeys(
        alone["sets"], SYSTEMS)
    written = (out / "results.jsonl").read_bytes()
    monkeypatch.setattr(eval_benchmark, "train", lambda args, main: args)
    evaluate(*inputs, "--benchmark", "--out", out)
    assert (out / "results.jsonl").read_bytes() == written and not [*out.glob("half-*")]


@pytest.mark.parametrize("attack", ["cce", "revival"])
def test_a_damaged_file_of_what_was_found_is_named(attack, inputs, tmp_path, capsys):
    flags = (*inputs[:2], "--attack", attack, "--attack-sources", 1, "--attack-updates", 2)
    evaluate(*flags, "--out", tmp_path / "out")
    file, = (tmp_path / "out").glob(f"{attack}.*")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SystemExit) as stop:
        evaluate(*flags, "--out", tmp_path / "out")
    assert stop.value.code == 2 and f"cannot read {file} (damaged?" in capsys.readouterr().err


def test_an_attack_that_fails_leaves_the_numbers_of_what_was_drawn(tmp_path, inputs, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cce, "cce", fail)
    arguments = *inputs[:2], "--attack", "cce", "--attack-sources", 1, "--out", tmp_path / "out"
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(*arguments)
    report = read(tmp_path / "out", "report")
    assert list(report["sets"]) == ["p"] and report["sets"]["p"]["base"]["eliciting"]["pictures"] == 4


def test_an_attack_without_an_eliciting_prompt_is_one_line_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(SystemExit) as stop:
        evaluate("--prompts", tmp_path / "p.txt", "--attack", "cce", "--out", tmp_path / "out")
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "shielddiff: --attack: there is no eliciting prompt to start from")


# ------------------------------------------------------------------------------------ after a fine-tune
def test_revival_trains_on_the_system_s_own_weights_or_puts_the_base_model_s_style_beside_them(
        inputs, tmp_path):
    """Three pictures, by stock diffusers and revived(): of a LoRA, merged and apart, and of a method."""
    out, (source, noisy) = tmp_path / "out", (inputs[i] for i in (1, 3))
    evaluate("--prompts", source, "--lora", noisy, "--method", "negative-prompt", "--attack", "revival",
             "--attack-sources", 1, "--attack-updates", 2, "--out", out)
    report, found = read(out, "report"), records(out)
    assert list(report["sets"]) == ["p", "revival merged", "revival apart"]
    for key in [key for key in found if key[1] == "revival merged"]:
        twin = key[0], "revival apart", *key[2:]
        same = [ev.Key(*name).path(out).read_bytes() for name in (key, twin)]
        assert (found[twin] | dict(set=key[1]) == found[key]) == (same[0] == same[1]) == (key[0] != "noisy")
    assert report["protocol"]["attacks"] == dict(revival=dict(steps=2))
    paths = [out / f"images/base/p/00000-{k}.png" for k in range(2)]
    own = np.stack([np.asarray(Image.open(path)) for path in paths]), [SOURCE] * 2
    with revival.revived(stock_pipeline(), *own, steps=2) as style:
        pass
    torch.testing.assert_close(load_file(out / "revival.safetensors"), dict(style), rtol=0, atol=1e-4)
    for system, name, lora, added in (("noisy", "revival merged", noisy, None),
                                      ("noisy", "revival apart", noisy, style),
                                      ("negative-prompt", "revival merged", None, style)):
        pipe, negative = stock_pipeline(lora and str(lora)), ["face, smiling face"] * (lora is None) or None
        with revival.revived(pipe, *own, added, steps=2):
            image = pipe([SOURCE], negative_prompt=negative, num_inference_steps=2, guidance_scale=3.0,
                         output_type="np", generator=torch.Generator().manual_seed(
                             found[system, name, 0, 0]["seed"])).images[0]
        drawn = np.asarray(Image.open(out / f"images/{system}/{name}/00000-0.png"))
        assert abs(image * 255 - drawn).max() < 1.5, (system, name)


@pytest.mark.parametrize("kind", ["lora", "unet", "text-encoder", "base", "method sld"])
def test_weights_are_fine_tuned_themselves_and_a_method_is_put_around_the_base_model_s(kind):
    asked = []

    @contextlib.contextmanager
    def noted(what):
        asked.append(what)
        yield

    for merged in (True, False):
        with eval_attacks.fine_tuned(lambda *_: noted("system"), lambda pipe, style: noted(style), "base's",
                                     merged, None, SimpleNamespace(kind=kind), None):
            pass
    of_weights = ["system", None, "system", "base's"]  # None: a style trained on its own weights
    assert asked == (["base's", "system"] * 2 if kind in ("base", "method sld") else of_weights)


# ------------------------------------------------------------------------------------ its parts
def test_the_pictures_to_bring_back_are_those_that_fire_else_the_one_nearest_to_it(tmp_path, pipe):
    """Four pictures of two prompts, each of one grey, one not of the model's size."""
    row = functools.partial(ev.Row, caption=None, elicits=True, seed=0, guidance=3.0, width=64, height=64)
    jobs = [ev.Job("p", i, k, row(prompt), None) for i, prompt in enumerate("ab") for k in range(4)]
    scores = [0.9, 0.1, None, 0.6, 0.2, 0.3, 0.1, 0.0]
    with open(tmp_path / "results.jsonl", "w") as file:  # not in their order: some were drawn anew
        for n, job, score in sorted(zip(range(8), jobs, scores, strict=True), key=lambda x: -x[0]):
            for system in ("base", "other"):
                key = job.key(system)
                path = key.path(tmp_path)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 128 if n == 3 else 64), (n,) * 3).save(path)
                raw = score if system == "base" else 1.0
                file.write(json.dumps(key._asdict() | dict(raw=raw, finite=score is not None)) + "\n")
    found = eval_attacks.base_pictures(SimpleNamespace(out=tmp_path, pipe=pipe), jobs[:7])
    assert [(p, x[:, 0, 0, 0].tolist()) for p, x in found.items()] == [("a", [0, 3]), ("b", [5])]
    assert [x.shape[1:] for x in found.values()] == [(64, 64, 3)] * 2 and found["a"].dtype == np.uint8


@contextlib.contextmanager
def not_finite(pipe, spec, stock):
    yield lambda call: (stock(call)[0] * torch.nan, np.zeros(1, bool))


@pytest.mark.parametrize(("method", "words"), [
    (not_finite, "its gradient is zero or not finite"),
    (functools.partial(latent_guard.latent_guard, epochs=1), "RuntimeError"), (pno.pno, "Error"),
    (pno.best_of_5, "Error"), (ev.with_weights, ""), (negative_prompt.negative_prompt, "")])
def test_what_refuses_or_looks_at_pictures_cannot_be_differentiated(method, words, pipe):
    spec = ev.Spec("face", [("a smiling face", "a cat")], 2, 3.0, 1, None)
    with ev.switched_on(pipe, ev.System("it", "it", "", method), spec) as draw:
        found = eval_attacks.obstacle(SimpleNamespace(pipe=pipe, spec=spec), draw,
                                      {"a cat": np.zeros((1, 64, 64, 3), np.uint8)})
    assert words in found and bool(words) == bool(found) and "\n" not in found
