"""The trained rivals: what each objective is, by hand and in closed form, and which weights it moves."""
import copy
import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, cli, predicting_v, stock_pipeline
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import shielddiff as sd

sys.path.insert(0, str(ROOT / "tests/rivals"))
import drawn  # noqa: E402
import duo  # noqa: E402
import esd  # noqa: E402
import safegen  # noqa: E402
import sdd  # noqa: E402
import training  # noqa: E402
import uce  # noqa: E402

QUICK = dict(steps=2, batch_size=2, denoise_steps=2)


def trained(module, out, **changes) -> tuple[dict, dict]:
    """The U-Net's weights before and after train(), as its command line would call it."""
    module.train(module.Args(**module.TINY | QUICK | dict(out=str(out)) | changes))
    return sd.load_pipeline("tests/tiny").unet.state_dict(), load_file(out / training.WEIGHTS[0])


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def states(pipe):
    """x [2, 4, 16, 16] at t [2], and the text states [2, 77, d] of "", of a concept and of a noun."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([900, 400]), *training.encode(pipe, ["", "a smiling face", "an astronaut"], 2)


# ------------------------------------------------------------------------------------ what they share
@pytest.mark.parametrize(("module", "published"), [
    (esd, dict(steps=1000, learning_rate=1e-5, eta=1, start_guidance=3, weights="u", toward="",
               erase_from="")),
    (sdd, dict(steps=1500, learning_rate=1e-5, start_guidance=3, average=0.999, toward="")),
    (duo, dict(steps=1000, learning_rate=3e-4 * 100 / 500, beta=500, prior=5e6, rank=32, until=750,
               pictures=64, shared_timestep=False, guidance_scale=7.5)),
    (safegen, dict(steps=1000, learning_rate=1e-5, batch_size=5, weight=0.1, cover="mosaic",
                   exact_target=False)),
    (uce, dict(lam=0.5, erase=1, keep=0, edits="naive"))])
def test_the_defaults_are_the_official_code_s(module, published):
    assert dataclasses.asdict(module.Args()).items() >= published.items()


def test_an_update_forgets_the_last_one_s_gradient_and_is_clipped():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer, clips = torch.optim.SGD([weight], lr=1.0), (math.inf, math.inf, 1.0)
    for clip, there in zip(clips, (-1.0, -2.0, -2.5), strict=True):  # a gradient of norm 2
        training.descend(optimizer, weight.sum(), clip)
        torch.testing.assert_close(weight.data, torch.full((4,), there))


def test_every_step_of_every_method_and_seed_has_random_numbers_of_its_own():
    first = [torch.rand((), generator=rng).item() for seed in (0, 1) for method in ("esd", "sdd")
             for _, rng in training.steps(training.TrainingArgs(steps=2, seed=seed), method)]
    assert len(set(first)) == 8


# ------------------------------------------------------------------------------------ what is learned from
@pytest.mark.parametrize(("keys", "strength"), [(["prompt"], None), (["prompt", "image"], 0.75)])
def test_pictures_are_drawn_anew_from_other_noise_until_they_are_as_wanted(keys, strength, monkeypatch):
    """Text to image, and from a picture as DUO's code has it, by strength 0.75."""
    class Pipe:
        components = {}

        def set_progress_bar_config(self, disable):
            pass

        def __call__(self, generator, **call):
            asked.append(call | dict(seeds=[g.initial_seed() for g in generator]))
            return SimpleNamespace(images=np.full((len(generator), 8, 8, 3), len(asked) / 255))

    asked, verdicts, seeds = [], iter([[0.9, 0.1], [0.9]] * 2), []
    monkeypatch.setattr(drawn, "StableDiffusionImg2ImgPipeline", lambda **_: Pipe())
    monkeypatch.setattr(sd, "nudity_scores", lambda *_: torch.tensor(next(verdicts)))
    calls = [dict.fromkeys(keys, name) for name in "ab"]
    for seed in (0, 1):
        args = drawn.Args(seed=seed, guidance_scale=2.0, denoise_steps=7)
        found = drawn.draw_judged(Pipe(), args, calls, True)
        assert found[0].max() == 1 + 2 * seed and found[1].max() == 2 + 2 * seed
    for call in asked:
        assert call["num_inference_steps"] == 7 and call["guidance_scale"] == 2.0
        assert call.get("strength") == strength
        seeds += call["seeds"]
    assert [call["prompt"] for call in asked] == [["a", "b"], ["b"]] * 2 and len(set(seeds)) == 6


def test_latents_are_a_sample_of_the_vae_s_posterior_scaled():
    pipe = stock_pipeline()
    pipe.vae.register_to_config(scaling_factor=0.5)  # 1 in the embedded model
    picture = np.asarray(Image.open(ROOT / "tests/tiny/sheet.jpg"))[:64, :64]
    latents = drawn.latents_of(pipe, [picture] * 2, sd.generator(0))
    assert latents.shape == (2, 4, 16, 16) and 0 < (latents[0] - latents[1]).abs().max() < 1
    with torch.inference_mode():
        pixels = pipe.vae.decode(latents / 0.5).sample
    again = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert abs(again - picture).mean() < 12, abs(again - picture).mean()


@pytest.fixture
def descents(monkeypatch):
    """(loss, the norm its gradient is clipped to, weight decay) of every update, none of which is made."""
    seen = []
    monkeypatch.setattr(training, "descend", lambda optimizer, loss, clip=math.inf: seen.append(
        (loss.item(), clip, optimizer.param_groups[0]["weight_decay"])))
    return seen


@pytest.mark.parametrize(("module", "clip", "decay"), [(esd, math.inf, 0), (sdd, 1.0, 1e-4)])
def test_esd_and_sdd_take_their_words_in_turn_and_start_from_what_is_taught(
        module, clip, decay, tmp_path, monkeypatch, descents):
    """ESD, told from what to erase, is taught that: its states are drawn under it. SDD's under all words."""
    asked, starts, name = [], [], "esd_target" if module is esd else "sdd_loss"
    real = getattr(module, name)

    def partly_drawn(unet, scheduler, context, args, guidance, rng):
        starts.append((unet, context, guidance))
        return torch.randn(2, 4, 16, 16, generator=rng), torch.tensor([500, 100])

    monkeypatch.setattr(drawn, "partly_drawn", partly_drawn)
    monkeypatch.setattr(module, name, lambda unet, x, t, *given: asked.append((unet, *given)) or real(
        unet, x, t, *given))
    more = dict(erase_from="{} of a man", eta=2.0) if module is esd else {}
    trained(module, tmp_path, concept="a face, a smile", toward="{} hidden", start_guidance=5.0, **more)
    pipe = sd.load_pipeline("tests/tiny")
    for i, word in enumerate(("a face", "a smile")):
        texts = "", word, f"{word} hidden", f"{word} of a man", "a face, a smile"
        empty, concept, toward, base, joined = training.encode(pipe, texts, 2)
        unet, *given = asked[i]
        drawer, context, guidance = starts[i]
        assert guidance == 5.0 and descents[i][1:] == (clip, decay)
        assert drawer is not unet  # which is frozen, or the student
        torch.testing.assert_close(context, torch.stack([empty, base if module is esd else joined]))
        torch.testing.assert_close(given[:2], [toward, concept])
        assert module is sdd or (torch.equal(given[2], base) and given[3] == 2.0)


def test_duo_s_loss_is_the_preference_and_the_prior_of_pairs_that_stay_together(
        tmp_path, monkeypatch, descents):
    def losses(unet, scheduler, pairs, empty, args, rng):
        assert (pairs[1] - pairs[0] == 10).all() and len(pairs[0].unique()) > 1
        return torch.tensor(2.0), torch.tensor(3.0)

    pairs = (torch.tensor([[0.0], [10.0]]) + torch.arange(5))[:, :, None, None, None]  # [2, 5, 1, 1, 1]
    monkeypatch.setattr(duo, "make_pairs", lambda *_: pairs)
    monkeypatch.setattr(duo, "duo_losses", losses)
    for seed in (0, 1):
        duo.train(duo.Args(**duo.TINY | QUICK | dict(
            out=str(tmp_path / f"{seed}"), prior=10.0, batch_size=4, seed=seed)))
    assert descents == [(32.0, 1.0, 1e-2)] * 4
    one, other = (load_file(tmp_path / f"{seed}" / training.WEIGHTS[1]) for seed in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_of_duo_s_pairs_the_safe_picture_comes_first(pipe, monkeypatch):
    """Guided by the safe prompt away from the unsafe one; where no edit was safe there is no pair."""
    shown = [(f"p{i}", f"c{i}", np.full((8, 8, 3), i, np.uint8)) for i in range(3)]
    calls = []
    monkeypatch.setattr(drawn, "draw_shown", lambda *_: shown)
    monkeypatch.setattr(drawn, "draw_judged", lambda pipe, args, found, shows: calls.extend(found) or (
        {i: np.full((8, 8, 3), 100 + i, np.uint8) for i in (2, 0)} if shows is False else {}))
    monkeypatch.setattr(drawn, "latents_of", lambda pipe, images, rng: torch.tensor([int(i.mean())
                                                                                     for i in images]))
    pairs = duo.make_pairs(pipe, duo.Args(**duo.TINY))
    assert pairs.tolist() == [[100, 102], [0, 2]]
    assert [(c["prompt"], c["negative_prompt"]) for c in calls] == [
        (f"c{i}, face hidden", f"p{i}") for i in range(3)]
    assert (np.asarray(calls[1]["image"]) == 1).all()


def test_safegen_covers_what_shows_and_saves_the_moving_average(tmp_path, monkeypatch):
    """The loss here is the sum of the weights, so that Adam takes the same step twice; the decay is 2/11."""
    def loss(unet, scheduler, shown, covered, benign, empty, args, rng):
        assert (covered - shown == 10).all() and shown.max() < 10 and benign.min() >= 20  # its own cover
        return sum(p.sum() for p in unet.parameters() if p.requires_grad)

    triplets = (torch.arange(3.0)[:, None] * 10 + torch.arange(5))[..., None, None, None]  # [3, 5, 1, 1, 1]
    monkeypatch.setattr(safegen, "make_triplets", lambda *_: triplets)
    monkeypatch.setattr(safegen, "safegen_loss", loss)
    descend, updates = training.descend, []
    monkeypatch.setattr(training, "descend", lambda optimizer, loss, clip: updates.append(
        (clip, optimizer.param_groups[0]["weight_decay"])) or descend(optimizer, loss, clip))
    start, saved = trained(safegen, tmp_path, learning_rate=0.01)
    assert updates == [(1.0, 1e-2)] * 2
    name = min(changed(start, saved))
    once = start[name] * (1 - 1e-4) - 0.01
    twice = once * (1 - 1e-4) - 0.01
    torch.testing.assert_close(saved[name], (2 * once + 9 * twice) / 11, atol=2e-4, rtol=0)


def test_safegen_s_triplets_are_a_picture_that_shows_it_covered_and_a_benign_one(pipe, monkeypatch):
    shown = drawn.draw_shown(pipe, args := safegen.Args(**safegen.TINY | dict(pictures=2, denoise_steps=8)))
    texts = [p for p, _, elicits in sd.read_prompts(args.prompts) if not elicits]

    def draw_judged(pipe, args, calls, shows):
        assert shows is None and [call["prompt"] for call in calls] == texts[:len(calls)]
        return {i: np.zeros((64, 64, 3), np.uint8) for i in range(len(calls))}

    monkeypatch.setattr(drawn, "draw_shown", lambda *_: shown)
    monkeypatch.setattr(drawn, "draw_judged", draw_judged)
    monkeypatch.setattr(drawn, "latents_of", lambda pipe, images, rng: torch.tensor(np.stack(images)).float())
    first, covered, benign = safegen.make_triplets(pipe, args)
    pictures = torch.tensor(np.stack([image for *_, image in shown])).float()
    assert all(any(torch.equal(a, b) for b in pictures) for a in first) and not benign.any()
    assert 0 < (first != covered).float().mean() < 0.7
    boxes = [{"class": "FACE_MALE", "box": [9, 9, 20, 20]}, {"class": "FEET_EXPOSED", "box": [50, 50, 9, 9]}]
    monkeypatch.setattr(safegen, "NudeDetector", lambda: SimpleNamespace(detect=lambda image: boxes))
    first, covered, _ = safegen.make_triplets(pipe, dataclasses.replace(args, reach=1.5))
    by_hand = [safegen.cover(image, [(9, 9, 20, 20)], "ellipse", 1.5) for *_, image in shown]
    assert torch.equal(covered, torch.tensor(np.stack(by_hand)).float())


def test_esd_s_target_is_the_frozen_model_s_and_sdd_starts_from_the_teacher_s_pictures(tmp_path, monkeypatch):
    models, target, part = [], esd.esd_target, drawn.partly_drawn
    monkeypatch.setattr(esd, "esd_target", lambda unet, *a: models.append(copy.deepcopy(unet.state_dict()))
                        or target(unet, *a))
    trained(esd, tmp_path / "esd", weights="x", learning_rate=0.01)
    assert len(models) == 2 and not changed(*models)
    starts = []
    monkeypatch.setattr(drawn, "partly_drawn", lambda unet, scheduler, context, *a: starts.append(
        (copy.deepcopy(unet.state_dict()), context)) or part(unet, scheduler, context, *a))
    start, saved = trained(sdd, tmp_path / "sdd", concept="a face, a smile", average=1.0, learning_rate=0.01)
    joined = torch.stack([*training.encode(sd.load_pipeline("tests/tiny"), ["", "a face, a smile"], 2)])
    assert len(starts) == 2 and not changed(start, saved)  # the student is elsewhere
    for weights, context in starts:
        assert not changed(start, weights)
        torch.testing.assert_close(context, joined)  # [2, B, 77, d]


def test_uce_keeps_the_empty_prompt_and_every_benign_one_and_no_less_than_a_tenth(tmp_path, monkeypatch):
    seen, real = [], uce.edit_matrix
    monkeypatch.setattr(uce, "edit_matrix", lambda old, aim, kept, *weights: seen.append((kept, *weights))
                        or real(old, aim, kept, *weights))
    args = uce.Args(**uce.TINY, out=str(tmp_path), lam=3.0, erase=7.0)
    uce.train(args)
    uce.train(dataclasses.replace(args, keep=5.0, out=str(tmp_path / "more")))
    benign = [p for p, _, elicits in sd.read_prompts(args.prompts) if not elicits]
    states = uce.states(sd.load_pipeline("tests/tiny"), ["", *benign])[0].flatten(0, 1)
    assert torch.equal(seen[0][0], states)
    assert seen[0][1:] == (3.0, 7.0, max(0.1, 1 / (1 + len(benign)))) and seen[1][1:] == (3.0, 7.0, 5.0)


# ------------------------------------------------------------------------------------ which weights move
@pytest.mark.parametrize(("module", "changes", "moves"), [
    (esd, dict(weights="u"), lambda n: "attn2" not in n and n.split(".")[0] not in (
        "time_embedding", "conv_norm_out", "conv_out")),
    (esd, dict(weights="x", erase_from="an astronaut"), lambda n: "attn2" in n),
    (sdd, {}, lambda n: "attn2" in n),
    (safegen, dict(pictures=3, denoise_steps=6), lambda n: "attn1" in n)])
def test_only_the_named_weights_move_and_stock_diffusers_loads_them(tmp_path, module, changes, moves):
    before, after = trained(module, tmp_path, **changes)
    assert changed(before, after) == {name for name in before if moves(name)}
    for load in (lambda d: UNet2DConditionModel.from_pretrained(d, subfolder="unet"),
                 lambda d: sd.load_whole(UNet2DConditionModel, str(d), "unet")):
        assert not changed(load(tmp_path).state_dict(), after)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["steps"] == 2 and facts["seconds"] > 0


def test_no_step_leaves_every_weight_as_it_was(tmp_path):
    for module in (esd, sdd):
        assert not changed(*trained(module, tmp_path / module.__name__, steps=0))


# ------------------------------------------------------------------------------------ partly drawn pictures
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_partly_drawn_picture_is_stock_diffusers_after_as_many_steps_and_t_is_where_it_is(spacing):
    pipe, counts = stock_pipeline(), set()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    context, args = training.encode(pipe, ["", "an astronaut"], 1), training.TrainingArgs(denoise_steps=4)
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        k, noise = torch.randint(4, (), generator=rng).item(), torch.randn(1, 4, 16, 16, generator=rng)
        x, t = drawn.partly_drawn(pipe.unet, pipe.scheduler, context, args, 3.0, rng.manual_seed(seed))
        seen = [noise]
        pipe("an astronaut", num_inference_steps=4, guidance_scale=3.0, output_type="latent", latents=noise,
             callback_on_step_end=lambda _pipe, _step, _t, now, seen=seen: seen.append(now["latents"]) or now)
        assert torch.allclose(x, seen[k], atol=1e-5)
        assert t.item() // 250 == pipe.scheduler.timesteps[k].item() // 250 == 3 - k
        counts.add(k)
    assert counts == {0, 1, 2, 3}


# ------------------------------------------------------------------------------------ UCE
def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def objective(w, w0, old, aim, kept, lam, erase, keep):
    """UCE's, written down from the paper with W itself; rows are text states."""
    return (erase * (old @ w.T - aim @ w0.T).square().sum() + keep * (kept @ (w - w0).T).square().sum()
            + lam * (w - w0).square().sum())


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 2), st.floats(0.1, 2), st.floats(0, 2))
def test_the_gradient_of_uce_vanishes_at_the_closed_form(lam, erase, keep):
    w0, old, aim, kept = rows(5, 8), rows(6, 8), rows(7, 8)[1:], rows(3, 8)
    given_rows = (old, aim, kept, lam, erase, keep)
    w = (w0 @ uce.edit_matrix(*given_rows)).requires_grad_()
    loss = objective(w, w0, *given_rows)
    gradient, = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-9 * objective(w0 + 1, w0, *given_rows).item()
    assert objective(w + 0.01 * rows(5, 8), w0, *given_rows) > loss


def test_uce_without_an_edit_changes_nothing_and_keeps_what_weighs_much():
    old, aim, kept = rows(4, 8), rows(5, 8)[1:], rows(3, 8)
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(uce.edit_matrix(old[:0], aim[:0], kept, 0.5, 1.0, 0.1), eye)
    drift = [(kept @ uce.edit_matrix(old, aim, kept, 0.5, 1.0, keep).T - kept).abs().max()
             for keep in (0.1, 1e2, 1e6)]
    assert drift[0] > 1e-2 > drift[1] > 1e3 * drift[2]


def test_uce_aligns_the_last_words_and_all_rows_after_them(pipe):
    text, target = "a smiling face", "an astronaut, face hidden"
    hidden, last = uce.states(pipe, [text, target, " "])
    words = [pipe.tokenizer(t).input_ids for t in (text, target, " ")]
    assert last == [len(w) - 2 for w in words] and last[2] == 0  # the beginning, where there is no word
    old, aim = uce.aligned(pipe, [(text, target), (text, "")])
    n = 77 - max(last)
    assert len(old) == len(aim) == n + 77 - last[0]
    assert torch.equal(old[:n], hidden[0, last[0]:last[0] + n])
    assert torch.equal(aim[:n], hidden[1, last[1]:last[1] + n])
    assert torch.equal(aim[n:], hidden[2, :77 - last[0]])


def test_uce_s_edits_are_words_to_nothing_the_lines_of_a_file_and_nouns_to_their_safe_captions(tmp_path):
    (tmp_path / "p.txt").write_text("a smiling cat => a cat\n")
    args = dict(words=("x", "y"), nouns=("a dog",), safe="{} asleep", pairs=str(tmp_path / "p.txt"))
    for edits, expected in (("naive", [("x", ""), ("y", "")]), ("pairs", [("a smiling cat", "a cat")]),
                            ("guided", [("a dog", "a dog asleep")])):
        assert uce.edits_of(uce.Args(**args, edits=edits)) == expected


@pytest.mark.parametrize("edits", ["naive", "pairs", "guided"])
def test_uce_edits_keys_and_values_and_holds_kept_prompts(pipe, tmp_path, edits):
    uce.train(uce.Args(**uce.TINY, edits=edits, out=str(tmp_path)))
    before, after = pipe.unet.state_dict(), load_file(tmp_path / training.WEIGHTS[0])
    edited = ("attn2.to_k.weight", "attn2.to_v.weight")
    assert changed(before, after) == {name for name in before if name.endswith(edited)}
    args = uce.Args(**uce.TINY, edits=edits)
    benign = [p for p, _, elicits in sd.read_prompts(args.prompts) if not elicits]
    old, aim = uce.aligned(pipe, uce.edits_of(args))
    kept = uce.states(pipe, benign)[0].flatten(0, 1)
    for name in changed(before, after):
        w0, w = before[name].double(), after[name].double()
        assert (kept @ (w - w0).T).norm() < 0.2 * (kept @ w0.T).norm()
        assert (old @ w.T - aim @ w0.T).norm() < 0.6 * (old @ w0.T - aim @ w0.T).norm()


def test_uce_runs_on_the_command_line_and_refuses_a_folder_that_holds_weights(tmp_path):
    command = ("--model", "tests/tiny", "--edits", "guided", "--out", tmp_path)
    done = cli(*command, script="tests/rivals/uce.py")
    assert done.returncode == 0 and (tmp_path / training.WEIGHTS[0]).exists(), done.stderr
    with pytest.raises(SystemExit, match="2"):
        training.run(uce.train, uce.Args, uce.TINY, list(map(str, command)))


# ------------------------------------------------------------------------------------ ESD
def test_the_target_of_esd_is_guidance_away_from_the_concept(pipe, states):
    x, t, empty, concept, noun = states
    with torch.no_grad():
        of_empty, of_concept = (pipe.unet(x, t, c).sample for c in (empty, concept))
        of_noun = pipe.unet(x, t, noun).sample
    target = esd.esd_target(pipe.unet, x, t, empty, concept, empty, 1.5)
    assert torch.allclose(target, of_empty - 1.5 * (of_concept - of_empty), atol=1e-6)
    assert torch.allclose(esd.esd_target(pipe.unet, x, t, empty, concept, noun, 1.5),
                          of_noun - 1.5 * (of_concept - of_empty), atol=1e-6)
    later = esd.esd_target(pipe.unet, x, t, empty, concept, concept, 2.0)  # as their new code writes it
    assert torch.allclose(later, esd.esd_target(pipe.unet, x, t, empty, concept, empty, 1.0), atol=1e-5)


def test_esd_and_sdd_have_nothing_to_learn_where_concept_and_target_are_the_same(tmp_path):
    """The loss is zero, and Adam does not move for a zero gradient. Guided, the target is what --toward
    says: of what it is erased from where that is "{}", the concept itself."""
    assert not changed(*trained(esd, tmp_path / "naive", steps=1, eta=0.0, concept=""))
    guided = dict(steps=1, concept="a face", erase_from="an astronaut")
    assert not changed(*trained(esd, tmp_path / "guided", **guided, toward="{}"))
    assert changed(*trained(esd, tmp_path / "safe", **guided, toward="{}, face hidden"))
    assert not changed(*trained(sdd, tmp_path / "sdd", steps=1, concept="an astronaut", toward="{}"))


# ------------------------------------------------------------------------------------ SDD
def test_no_gradient_of_sdd_flows_through_what_is_predicted_for_the_empty_text(pipe, states):
    x, t, empty, concept, _ = states
    student = copy.deepcopy(pipe.unet)
    weights = training.train_only(student, lambda name: name.endswith("attn2.to_v.weight"))
    loss = sdd.sdd_loss(student, x, t, empty, concept)
    fixed = student(x, t, empty).sample.detach()
    by_hand = (student(x, t, concept).sample - fixed).square().mean()
    assert loss.item() == pytest.approx(by_hand.item()) and loss > 0
    gradients = (torch.autograd.grad(of, weights) for of in (loss, by_hand))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)


def test_sdd_saves_the_moving_average(tmp_path):
    start, student = trained(sdd, tmp_path / "0", steps=1, average=0.0)
    _, average = trained(sdd, tmp_path / "1", steps=1, average=0.75)
    for name in changed(start, student):
        assert torch.allclose(average[name], 0.75 * start[name] + 0.25 * student[name], atol=1e-7)


# ------------------------------------------------------------------------------------ DUO
def test_duo_starts_at_ln_2_with_no_prior_and_moves_self_attention_alone(pipe, tmp_path, monkeypatch, states):
    unet = copy.deepcopy(pipe.unet)
    unet.add_adapter(duo.LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["attn1.to_q"]))
    pairs = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    args, empty = duo.Args(**duo.TINY), training.encode(pipe, [""], 1)[0]
    preference, prior = duo.duo_losses(unet, pipe.scheduler, pairs, empty, args, sd.generator(0))
    assert preference.item() == pytest.approx(math.log(2)) and prior.item() == 0 and preference.requires_grad
    kept, save = [], training.save
    monkeypatch.setattr(training, "save", lambda args, unet, *a, **k: kept.append(unet) or save(
        args, unet, *a, **k))
    duo.train(duo.Args(**duo.TINY | QUICK | dict(
        out=str(tmp_path), pictures=2, denoise_steps=8, rank=4, learning_rate=0.03)))
    lora = load_file(tmp_path / training.WEIGHTS[1])
    layers = {name.removeprefix("unet.").split(".lora")[0] for name in lora}
    assert layers == {name for name, part in pipe.unet.named_modules()
                      if "attn1.to_" in name and isinstance(part, torch.nn.Linear)}
    assert all(weight.any() for weight in lora.values())
    user = stock_pipeline(tmp_path)
    with torch.no_grad():
        in_memory, of_user, plain = (u(*states[:3]).sample for u in (kept[0], user.unet, pipe.unet))
    torch.testing.assert_close(of_user, in_memory, rtol=1e-4, atol=1e-4)
    assert (of_user - plain).abs().max() > 0.01


def test_duo_prefers_the_safe_picture_and_swapping_flips_the_sign():
    errors, frozen = torch.tensor([[0.1], [0.3]]), torch.tensor([[0.2], [0.3]])  # the safe: better by 0.1
    assert duo.preference_loss(errors, frozen, 5.0).item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert duo.preference_loss(errors.flip(0), frozen.flip(0), 5.0).item() == pytest.approx(
        math.log(1 + math.exp(0.5)))


@pytest.mark.parametrize("shared", [False, True])
def test_a_pair_of_duo_has_one_noise_and_two_timesteps_and_the_prior_is_noise_alone(shared):
    class Unet:  # of one parameter: it records what it is asked, and predicts a part of it
        weight, calls = torch.tensor(1.0), []

        def __call__(self, x, t, context):
            self.calls.append((x, t))
            return type("Output", (), {"sample": self.weight * x})

        def disable_adapters(self):
            self.weight = torch.tensor(0.5)

        def enable_adapters(self):
            self.weight = torch.tensor(1.0)

    unet, scheduler = Unet(), DDIMScheduler()
    pairs, args = torch.randn(2, 5, 4, 2, 2), duo.Args(shared_timestep=shared, beta=1.0)
    preference, prior = duo.duo_losses(unet, scheduler, pairs, torch.zeros(1, 77, 3), args, sd.generator(1))
    (x, t), again = unet.calls
    assert torch.equal(x, again[0]) and torch.equal(t, again[1])
    safe, unsafe, noise = x.chunk(3)
    assert torch.allclose(safe, scheduler.add_noise(pairs[0], noise, t[:5]))
    assert torch.allclose(unsafe, scheduler.add_noise(pairs[1], noise, t[5:10]))
    assert torch.equal(t[:5], t[5:10]) == shared and t[:10].max() < 750 and (t[10:] == 999).all()
    error = [[(w * part - noise).square().mean(dim=(1, 2, 3)) for part in (safe, unsafe)] for w in (1, 0.5)]
    inside = (error[0][0] - error[1][0]) - (error[0][1] - error[1][1])
    assert preference.item() == pytest.approx(torch.log(1 + inside.exp()).mean().item(), rel=1e-5)
    assert prior.item() == pytest.approx((0.5 * noise).square().mean().item())
    zero_snr = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    held = duo.duo_losses(unet, zero_snr, pairs, torch.zeros(1, 77, 3), args, sd.generator(1))[1]
    assert held.item() == pytest.approx(4e-3 * prior.item(), rel=1e-4)  # as by SD's last signal, not by none


def test_duo_and_safegen_ask_the_same_of_the_same_model_that_predicts_v(states):
    pipe, (x, _, empty, *_) = sd.load_pipeline(str(ROOT / "tests/tiny")), states
    pipe.scheduler = sd.ddim_scheduler(pipe.scheduler.config)
    torch.manual_seed(0)
    pipe.unet.add_adapter(duo.LoraConfig(r=2, init_lora_weights=False, target_modules=["attn1.to_q"]))
    pairs = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def asked():
        model = pipe.unet, pipe.scheduler
        return torch.stack([
            *duo.duo_losses(*model, pairs, empty[:1], duo.Args(**duo.TINY), sd.generator(0)),
            safegen.safegen_loss(*model, x[:1], x[:1] - 1, x[1:], empty[:1], safegen.Args(), sd.generator(3))
        ])

    of_noise = asked()
    with predicting_v(pipe):
        torch.testing.assert_close(asked(), of_noise, rtol=1e-3, atol=1e-6)
    assert (of_noise > 1e-5).all()


# ------------------------------------------------------------------------------------ SafeGen
def test_a_perfect_predictor_of_the_exact_target_of_safegen_draws_the_covered_picture():
    shown, covered, noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = sd.ddim_scheduler(stock_pipeline().scheduler.config)
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps[[0, 9, 18]]:
        target = safegen.safegen_target(scheduler, noise, shown, covered, t[None], True)
        x = scheduler.add_noise(shown, noise, t[None])
        assert torch.allclose(scheduler.step(target, t, x).pred_original_sample, covered, atol=1e-3)
    official = safegen.safegen_target(scheduler, noise, shown, covered, t[None], False)
    assert torch.allclose(official, noise + shown - covered)


def test_safegen_predicts_plain_noise_where_nothing_is_covered(pipe, states):
    """And its two terms are weighted 0.1 and 0.9."""
    x, _, empty, *_ = states
    args, shown, benign = safegen.Args(weight=0.1), x[:1], x[1:]
    loss = [safegen.safegen_loss(pipe.unet, pipe.scheduler, shown, covered, benign, empty[:1], args,
                                 sd.generator(3)).item() for covered in (shown, shown - 1)]
    rng = sd.generator(3)
    noise, t = torch.randn(2, 4, 16, 16, generator=rng), torch.randint(1000, (2,), generator=rng)
    with torch.no_grad():
        error = pipe.unet(pipe.scheduler.add_noise(x, noise, t), t, empty).sample - noise
    plain = error.square().mean(dim=(1, 2, 3))
    assert loss[0] == pytest.approx((0.1 * plain[0] + 0.9 * plain[1]).item(), rel=1e-5)
    assert loss[1] - loss[0] == pytest.approx(0.1 * (1 - 2 * error[0].mean().item()), rel=1e-4)
    exact = safegen.safegen_loss(pipe.unet, pipe.scheduler, shown, shown - 1, benign, empty[:1],
                                 dataclasses.replace(args, exact_target=True), sd.generator(3)).item()
    share = (pipe.scheduler.alphas_cumprod[t[0]] / (1 - pipe.scheduler.alphas_cumprod[t[0]])).sqrt().item()
    assert exact - loss[0] == pytest.approx(0.1 * share * (share - 2 * error[0].mean().item()), rel=1e-4)


def test_a_cover_hides_the_box_and_nothing_else():
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for how, distinct in (("ellipse", 1), ("mosaic", 16)):
        hidden = safegen.cover(image, [(20, 10, 16, 24)], how, 1.0)
        inside = np.zeros((64, 64), bool)
        inside[10:35, 20:37] = True
        assert (hidden == image)[~inside].all() and (hidden[22, 28] == 128).all() == (how == "ellipse")
        assert (safegen.cover(image, [(20, 10, 16, 24)], how, 1.5) != image)[~inside].any()
        assert len(np.unique(hidden[16:28, 24:32].reshape(-1, 3), axis=0)) <= distinct
    assert (hidden[22, 28] == hidden[23, 29]).all() and (image != hidden).any()
    at_the_edge = [(63, 10, 0, 30), (10, 64, 9, 0)]  # as NudeNet cuts them
    assert (safegen.cover(image, at_the_edge, "mosaic", 1.2) == image).all()


# ------------------------------------------------------------------------------------ pictures, bad input
def test_pictures_to_train_on_show_what_is_asked_for(pipe):
    args = drawn.Args(**drawn.TINY | dict(denoise_steps=8, pictures=4))
    shown = drawn.draw_shown(pipe, args)
    safe = drawn.draw_judged(pipe, args, [{"prompt": "an astronaut with the face hidden"}] * 4, False)
    for images, fires in (([image for *_, image in shown], True), (list(safe.values()), False)):
        scores = sd.nudity_scores(sd.load_nudenet(), np.stack(images), args.labels)
        assert len(images) >= 3 and ((scores > sd.FIRES) == fires).all()
    assert {row[:2] for row in shown} <= {row[:2] for row in sd.read_prompts(args.prompts)}
    assert len({row[0] for row in shown}) > 1


@pytest.mark.parametrize(("module", "flags", "message"), [
    (esd, ["--learning-rate", "nan"], "--learning-rate cannot be nan"),
    (esd, ["--denoise-steps", "1001"], "--denoise-steps cannot be 1001"),
    (sdd, ["--batch-size", "0"], "--batch-size cannot be 0"),
    (duo, ["--until", "1001"], "--until goes to 1000"), (duo, ["--until", "0"], "--until cannot be 0"),
    (duo, ["--denoise-steps", "1"], "--until goes to 1000, SD's timesteps; SDEdit takes"),
    (duo, ["--prompts", "nowhere.txt"], "cannot read prompt file nowhere.txt")])
def test_bad_input_gets_one_line_and_leaves_nothing_behind(tmp_path, capsys, module, flags, message):
    with pytest.raises(SystemExit, match="2"):
        training.run(module.train, module.Args, module.TINY,
                     ["--model", "tests/tiny", "--out", str(tmp_path / "out"), *flags])
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"shielddiff: {message}")
    assert not (tmp_path / "out").exists()


def test_bad_numbers_stop_before_they_are_saved(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        training.run(esd.train, esd.Args, esd.TINY,
                     ["--model", "tests/tiny", "--out", str(tmp_path), "--learning-rate", "1e18"])
    assert "not finite" in capsys.readouterr().err and not list(tmp_path.iterdir())
