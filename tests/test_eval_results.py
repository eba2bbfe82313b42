"""What an evaluation leaves on disk, whatever the prompts are and whatever a system draws: the README's call
on files shaped as the public ones are, numbers before pages, and what a resumed run makes of both."""
import collections
import copy
import csv
import json
import math
import os
import shutil

import eval_report
import eval_results
import eval_statistics as es
import eval_systems
import numpy as np
import pytest
import torch
from conftest import ROOT, cli, stock_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import eval as ev
import shielddiff as sd

I2P = ("", "prompt", "categories", "hard", "nudity_percentage", "sd_seed", "sd_guidance_scale",
       "sd_image_width", "sd_image_height", "sd_model")
COCO = ("case_number", "source", "prompt", "evaluation_seed", "coco_id")
SUBJECTS = ("an astronaut", "a cat, close-up", 'a "red" house', "a horse; on a meadow", "an espresso")


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def files(tmp_path):
    """30 rows each, shaped as I2P (a row without a prompt, odd seeds and sizes) and as the COCO lists."""
    kinds = ("sexual", "sexual, shocking", "violence")
    write_csv(tmp_path / "i2p.csv", I2P, [
        (i, "" if i == 7 else f"{SUBJECTS[i % 5]} number {i}", kinds[i % 3], 0, 12.5, 2**32 - 1 - i,
         7.5 + i % 2, 64, 64 + 8 * (i % 2), "stable-diffusion-v1-4") for i in range(30)])
    write_csv(tmp_path / "coco.csv", COCO, [
        (i, "coco", f"{SUBJECTS[i % 5]} on a table", 1000 + i, 40_000 + i) for i in range(30)])
    return tmp_path


def lora_file(path, scale):
    """A LoRA of the embedded U-Net: random numbers, or NaN."""
    torch.manual_seed(0)
    unet = stock_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    found = get_peft_model_state_dict(unet)
    save_file({f"unet.{k}": torch.randn_like(v) * scale for k, v in found.items()}, path)
    return path


def evaluate(*arguments):
    ev.evaluate(ev.parse_args(["--model", "tests/tiny", *map(str, arguments)]))


def report_of(out):
    """report.json, as strict JSON."""
    def refuse(text):
        raise ValueError(text)
    return json.loads((out / "report.json").read_text(), parse_constant=refuse)


def records(out):
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {(r["system"], r["set"], r["i"], r["k"]): r for r in lines}


# ------------------------------------------------------------------------------------ end to end
def test_the_readme_s_i2p_and_coco_call_ends_with_every_number_and_both_pages(files):
    """One real process: a LoRA that works, one that is NaN and a method; rows keep what their files say."""
    out, good, bad = files / "out", lora_file(files / "good.safetensors", 0.1), files / "bad.safetensors"
    lora_file(bad, math.nan)
    done = cli("--model", "tests/tiny", f"--lora=mine={good}", f"--lora=broken={bad}", "--method",
               "negative-prompt", "--prompts", files / "i2p.csv", "--benign", files / "coco.csv",
               "--limit", 3, "--by", "categories", "--where", "categories=sexual", "--seeds", 2,
               "--steps", 4, "--out", out, script="eval.py")
    assert done.returncode == 0, done.stderr
    report, found = report_of(out), records(out)
    assert list(report["sets"]) == ["i2p", "i2p: sexual", "i2p: shocking", "coco"]
    for name, systems in report["sets"].items():
        assert list(systems) == ["base", "mine", "broken", "negative-prompt"]
        for system, parts in systems.items():
            part = parts["benign" if name == "coco" else "eliciting"]
            assert part["not_finite"] == (part["pictures"] if system == "broken" else 0)
            assert (part["trained_on"]["rate"]["value"] is None) == (system == "broken")
    i2p, coco = (report["sets"][name]["mine"] for name in ("i2p", "coco"))
    assert (i2p["eliciting"]["prompts"], coco["benign"]["pictures"]) == (3, 6) and "eliciting" not in coco
    assert "clip_caption_change" not in i2p["eliciting"] and "safe_and_faithful" not in i2p["eliciting"]
    assert coco["benign"]["pixel_rms"]["value"] > 0 and coco["benign"]["clip_kid"]["value"] is not None
    assert "6 pictures by broken on i2p are not finite" in report["headline"]
    page = (out / "report.html").read_text()
    for text in (page, done.stdout):
        assert "No safe caption in this file" in text and "broken (6 pictures not finite)" in text
    assert (out / "pairs.png").exists() and report["notes"] == {
        f"rows without a prompt, skipped ({files}/i2p.csv, 8)": 1,
        "rows of a repeated prompt: too narrow intervals": 2}
    with open(files / "i2p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mine = [r for (system, name, _, k), r in found.items() if (system, name, k) == ("mine", "i2p", 1)]
    for r in mine:
        row = rows[r["row"] - 1]
        assert r["file"] == str(files / "i2p.csv") and r["prompt"] == row["prompt"]
        assert "sexual" in row["categories"]
        assert r["seed"] == int(row["sd_seed"]) + 1 and r["guidance"] == float(row["sd_guidance_scale"])
    assert len(mine) == 3 and not any((r["clip_prompt"] or r["fires"]) for key, r in found.items()
                                      if key[0] == "broken")


def test_a_set_in_which_nothing_elicits_has_numbers_and_a_page(files, capsys):
    (files / "p.txt").write_text("a red house\nan espresso\n")
    evaluate("--method", "negative-prompt", "--prompts", files / "p.txt", "--benign", files / "coco.csv",
             "--limit", 2, "--seeds", 1, "--steps", 2, "--out", files / "out")
    report, said = report_of(files / "out"), capsys.readouterr().out
    assert report["headline"].startswith("No prompt elicits") and "use --eliciting" in said
    assert all("eliciting" not in systems["base"] for systems in report["sets"].values())
    assert report["sets"]["p"]["negative-prompt"]["benign"]["pixel_rms"]["value"] > 0
    assert "With --seeds 1 nothing can be said of single prompts" in said
    assert (files / "out/report.html").exists() and (files / "out/pairs.png").exists()


def test_the_base_model_alone_is_a_result(files):
    evaluate("--eliciting", files / "i2p.csv", "--prompts", files / "coco.csv", "--limit", 1, "--seeds", 1,
             "--steps", 1, "--out", files / "out")
    report = report_of(files / "out")
    assert [list(systems) for systems in report["sets"].values()] == [["base"], ["base"]]
    assert "by base" in report["headline"] and (files / "out/report.html").exists()


def test_a_model_that_draws_one_colour_is_said_to(files):
    model = shutil.copytree(ROOT / "tests/tiny", files / "model")
    vae = model / "vae/diffusion_pytorch_model.safetensors"
    save_file({k: v * 0 if "decoder.conv_out" in k else v for k, v in load_file(vae).items()}, vae)
    changes = dict(model=str(model), prompts=(str(files / "coco.csv"),), out=str(files / "out"))
    ev.evaluate(ev.Args(**ev.TINY | changes | dict(limit=2, seeds=1, steps=1)))
    assert "2 pictures by base on coco are of one colour all over" in report_of(files / "out")["headline"]


def test_a_page_that_cannot_be_made_leaves_the_numbers(files, capsys):
    """A picture whose bytes are another file's, at its length; then a folder in the page's place."""
    out = files / "out"
    call = ("--prompts", files / "coco.csv", "--limit", 2, "--seeds", 1, "--steps", 1, "--out", out)
    evaluate(*call)
    before, path = (out / "report.json").read_text(), out / "images/base/coco/00000-0.png"
    good = path.read_bytes()
    for spoil, word in ((lambda: path.write_bytes(b"x" * len(good)), f"all numbers are in {out}"),
                        (lambda: (out / "report.html/x").mkdir(parents=True), "report.html")):
        for name in ("report.html", "report.json"):
            (out / name).unlink(missing_ok=True)
        spoil()
        with pytest.raises(SystemExit) as stop:
            evaluate(*call)
        assert stop.value.code == 1 and word in capsys.readouterr().err
        assert (out / "report.json").read_text() == before
        path.write_bytes(good)
    shutil.rmtree(out / "report.html")
    evaluate(*call)
    assert (out / "report.html").is_file() and (out / "report.json").read_text() == before


def test_numbers_are_of_the_labels_and_thresholds_asked_for(files):
    """On hand-made detections, written over those of the one picture."""
    out = files / "out"
    call = ("--prompts", files / "i2p.csv", "--limit", 1, "--seeds", 1, "--steps", 1, "--out", out,
            "--count-labels", "FEET_EXPOSED", "FEET_EXPOSED", "--thresholds", 0.5)
    evaluate(*call)
    line = json.loads((out / "results.jsonl").read_text())
    boxes = [["FEET_EXPOSED", 0.7], ["FEET_EXPOSED", 0.5], ["FEET_EXPOSED", 0.4], ["FACE_FEMALE", 0.9]]
    (out / "results.jsonl").write_text(json.dumps(line | dict(detections=boxes)) + "\n")
    evaluate(*call)
    counts = report_of(out)["sets"]["i2p"]["base"]["eliciting"]["counts"]
    assert counts["0.5"]["total"] == dict(boxes=2, classes=1, images=1) and list(counts) == ["0.5"]
    assert counts["0.5"]["FACE_FEMALE"] == dict(boxes=1, classes=1)


# ------------------------------------------------------------------------------------ names and folders
def test_sets_of_one_name_are_kept_apart(files):
    """Two files of one name, and one named as the attack's set and as a part of another's."""
    (files / "a").mkdir()
    for path in (files / "ring-a-bell.txt", files / "a/coco.txt"):
        path.write_text("an astronaut => a helmet\n")
    write_csv(files / "coco: x.csv", ("prompt", "kind"), [("a cat", "y")])
    write_csv(files / "coco.csv", ("prompt", "kind"), [("a cat", "x"), ("a dog", "y")])
    evaluate("--prompts", files / "coco.csv", files / "a/coco.txt", files / "ring-a-bell.txt",
             files / "coco: x.csv", "--by", "kind", "--attack", "ring-a-bell", "--attack-prompts", 1,
             "--attack-generations", 0, "--seeds", 1, "--steps", 1, "--out", files / "out")
    sizes = {name: s["base"]["eliciting"]["prompts"] for name, s in report_of(files / "out")["sets"].items()}
    assert sizes == {"coco": 2, "coco: x'": 1, "coco: y": 1, "coco'": 1, "ring-a-bell": 1, "coco: x": 1,
                     "coco: x: y": 1, "ring-a-bell'": 1}
    assert {key[1] for key in records(files / "out")} == {"coco", "coco'", "ring-a-bell", "coco: x",
                                                          "ring-a-bell'"}


def test_a_folder_holds_one_evaluation_at_a_time(tmp_path, capsys):
    protocol = dict(arguments=dict(seeds=1))
    with ev.open_folder(tmp_path / "out", protocol):
        with pytest.raises(SystemExit) as stop, ev.open_folder(tmp_path / "out", protocol):
            pass
        assert stop.value.code == 2 and "another evaluation" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), ev.open_folder(tmp_path / "out", protocol):
        raise FileNotFoundError("of another file")  # is not taken for the folder's
    with ev.open_folder(tmp_path / "out", protocol):
        pass
    for damaged in ("", "{", "{}", "[]"):
        (tmp_path / "out/protocol.json").write_text(damaged)
        with pytest.raises(SystemExit) as stop, ev.open_folder(tmp_path / "out", protocol):
            pass
        assert stop.value.code == 2 and "out/protocol.json (damaged?" in capsys.readouterr().err


def test_captions_that_only_some_rows_have_are_measured_on_these(files, capsys):
    write_csv(files / "some.csv", ("prompt", "Safe Caption"),
              [("a smiling astronaut", "an astronaut"), ("an astronaut, laughing", ""), ("a cat", " ")])
    evaluate("--method", "negative-prompt", "--prompts", files / "some.csv", "--seeds", 2, "--steps", 2,
             "--out", files / "out")
    found, systems = records(files / "out"), report_of(files / "out")["sets"]["some"]
    part = systems["negative-prompt"]["eliciting"]
    before, after = ([found[system, "some", 0, k]["clip_caption"] for k in range(2)]
                     for system in ("base", "negative-prompt"))
    assert part["clip_caption_change"]["value"] == pytest.approx(np.mean(after) - np.mean(before))
    assert part["prompts"] == 3
    assert all((r["clip_caption"] is None) == (i > 0) for (_, _, i, _), r in found.items())
    assert "for 2 eliciting prompts: CLIP change and safe+faithful are not measured on these" in (
        capsys.readouterr().out)
    notes = collections.Counter()
    rows = [ev.read_rows(str(files / "some.csv"), ev.Args(), 64, elicits, notes) for elicits in (None, False)]
    assert [r.caption for r in rows[0]] == ["an astronaut", None, None]
    assert [r.caption for r in rows[1]] == [r.prompt for r in rows[1]]  # benign: the prompt itself


# ------------------------------------------------------------------------------------ results.jsonl
def test_a_picture_that_is_gone_or_cut_is_drawn_again_and_its_line_dropped(tmp_path):
    keys, lines = [ev.Key("base", "p", i, 0) for i in range(5)], []
    for key in keys:
        key.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        key.path(tmp_path).write_bytes(b"picture")
        lines.append(json.dumps(key._asdict() | dict(bytes=7)))
    keys[1].path(tmp_path).write_bytes(b"pic")
    keys[2].path(tmp_path).unlink()
    lines[3] = json.dumps(keys[3]._asdict())  # of an older version: its length is not known
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, lines[0], lines[4][:-9]]))
    assert eval_results.finished(tmp_path) == {keys[0], keys[4]}
    assert (tmp_path / "results.jsonl").read_text() == f"{lines[0]}\n{lines[4]}\n"
    assert eval_results.finished(tmp_path / "none") == set() and not os.path.exists(tmp_path / "none")


def test_tables_are_in_the_order_of_prompts_whatever_the_lines_are_in(tmp_path, monkeypatch):
    """Also where a set's lines fill several chunks."""
    monkeypatch.setattr(eval_results, "CHUNK", 3)
    order = np.random.default_rng(0).permutation(20)
    with open(tmp_path / "results.jsonl", "w") as file:
        for n in order:
            for system in ("base", "ours"):
                key = ev.Key(system, "p", int(n) // 2, int(n) % 2)
                file.write(json.dumps(key._asdict() | dict(x=int(n))) + "\n")
    tables = eval_results.tables_of(
        tmp_path, lambda found: {m: np.array([r[m] for r in found]) for m in "ikx"})
    assert set(tables) == {("p", "base"), ("p", "ours")}
    for table in tables.values():
        assert table["x"].tolist() == list(range(20)) and table["i"].tolist() == [n // 2 for n in range(20)]


# ------------------------------------------------------------------------------------ the worst twentieth
def kept(rng, truth, noise, pictures=4):
    """Scores of prompts that keep `truth` [n] of what they had, each picture with noise of its own."""
    prompt = np.repeat(np.arange(len(truth)), pictures)
    before = rng.uniform(0.25, 0.35, len(truth))[prompt]
    noisy = [m + noise * rng.standard_normal(len(prompt)) for m in (before, before * truth[prompt])]
    return (*noisy, prompt)


def test_where_no_prompt_loses_more_than_others_the_worst_twentieth_keeps_as_much():
    """The prompts that seem the worst by their own pictures keep far less, which is chance alone."""
    rng, found, naive = np.random.default_rng(0), [], []
    for _ in range(200):
        before, after, prompt = kept(rng, np.full(200, 0.95), 0.02)
        found.append(es.twentieth_kept(before, after, prompt))
        ratio = np.bincount(prompt, after) / np.bincount(prompt, before)
        naive.append(np.sort(ratio)[:10].mean())
    value, low, high = (np.array([f[k] for f in found]) for k in ("value", "low", "high"))
    assert abs(value.mean() - 0.95) < 0.005 and np.mean(naive) < 0.89
    assert 0.9 < np.mean((low <= 0.95) & (0.95 <= high)) and all(f["prompts"] >= 10 for f in found)


def test_prompts_that_surely_lose_are_found_and_measured():
    truth = np.full(200, 0.95)
    truth[::20] = 0.6
    found = [es.twentieth_kept(*kept(np.random.default_rng(s), truth, 0.01)) for s in range(50)]
    assert np.mean([f["value"] for f in found]) == pytest.approx(0.6, abs=0.005)
    assert np.mean([f["low"] <= 0.6 <= f["high"] for f in found]) > 0.85
    before, after, prompt = kept(np.random.default_rng(0), truth, 0.01, pictures=1)
    assert es.twentieth_kept(before, after, prompt)["value"] is None  # one picture cannot pick and measure


def test_what_a_cut_or_a_byte_spoils_is_one_line(tmp_path):
    seconds = tmp_path / "seconds.jsonl"
    seconds.write_text('{"system": "a", "seconds": 1.0}\n{"system": "a", "se{"system": "a", "seconds": 9.0}\n'
                       '{"system": "a", "seconds": 2.0}\n')
    assert eval_report.seconds_of(seconds) == dict(a=1.5)
    line = '{"system": "a", "set": "p", "i": 0, "k": 0, "bytes": 1}\n'
    (tmp_path / "results.jsonl").write_bytes(line.encode() + b"\xff\x00" + line.replace("0,", "1,").encode())
    assert [key.i for key, *_ in eval_results.lines_of(tmp_path / "results.jsonl")] == [0]


@pytest.mark.parametrize(("pictures", "refused"), [
    (np.full((2, 4, 4, 3), 255, np.uint8), 2), (np.full((2, 4, 4, 3), -1.0), 2),
    (np.full((2, 4, 4, 3), 1.1), 2), (np.zeros((1, 4, 4, 3)), 2), (np.zeros((2, 3, 4, 4)), 2),
    (np.zeros((2, 4, 4, 3)), 1)])
def test_a_method_that_draws_no_pictures_is_named(pictures, refused, tmp_path, capsys):
    draw = eval_results.timed(lambda call: (pictures, np.zeros(refused, bool)), tmp_path / "s", "theirs")
    for method in draw, eval_results.timed(lambda call: pictures, tmp_path / "s", "theirs"), (
            eval_results.timed(lambda call: (pictures, [False] * refused), tmp_path / "s", "theirs")):
        with pytest.raises(SystemExit) as stop:
            method(dict(prompt=["a", "b"]))
        assert stop.value.code == 2 and "theirs drew" in capsys.readouterr().err
    fine = np.array([[[[np.nan, np.inf, 1.0]]], [[[0.0, 0.5, -np.inf]]]])  # not finite ones are counted later

    def draw(call):
        del call["prompt"]
        return fine, np.zeros(2, bool)

    assert eval_results.timed(draw, tmp_path / "s", "a")(dict(prompt="ab"))


def test_an_evaluation_of_another_text_encoder_is_another(tmp_path, capsys):
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "model")
    (tmp_path / "p.txt").write_text("an astronaut => an astronaut\n")
    flags = ["--model", tmp_path / "model", "--prompts", tmp_path / "p.txt", "--seeds", 1, "--steps", 1,
             "--clip-model", "tests/tiny/clip", "--labels", "FACE_FEMALE", "--out", tmp_path / "out"]
    ev.evaluate(ev.parse_args(list(map(str, flags))))
    assert report_of(tmp_path / "out")["protocol"]["clip"]["is_reward"] is False  # by SD's default it is not
    path = tmp_path / "model/text_encoder/model.safetensors"
    save_file({k: v * 1.01 if v.is_floating_point() else v for k, v in load_file(path).items()}, path)
    with pytest.raises(SystemExit) as stop:
        ev.evaluate(ev.parse_args(list(map(str, flags))))
    assert stop.value.code == 2 and "another protocol (model)" in capsys.readouterr().err


def test_the_reward_s_own_clip_is_known_by_any_name(tmp_path):
    (tmp_path / "p.txt").write_text("an astronaut => an astronaut\n")
    evaluate("--prompts", tmp_path / "p.txt", "--seeds", 1, "--steps", 1, "--out", tmp_path / "out",
             "--clip-model", os.path.relpath(ROOT / "tests/tiny/clip"))
    assert report_of(tmp_path / "out")["protocol"]["clip"]["is_reward"] is True


def test_the_reward_s_own_clip_is_known_by_its_weights_when_the_run_has_moved(run):
    clip, training = sd.load_clip(sd.TINY["clip_model"])[0], json.loads((run[0] / "args.json").read_text())
    training["clip_model"] = "moved/away"
    assert eval_systems.is_reward("tests/tiny/clip", clip, [{}, training])
    clip = copy.deepcopy(clip)
    clip.logit_scale.data += 1
    assert not eval_systems.is_reward("tests/tiny/clip", clip, [{}, training])
    assert eval_systems.is_reward("moved/../moved/away", clip, [training])
