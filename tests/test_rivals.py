"""tests/rivals: the methods that need no training, against what each has to be whatever it is good for."""
import functools
import inspect
import math

import eval_systems
import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT, predicting_v
from PIL import Image
from rivals import crops, latent_guard, latent_mixing, negative_prompt, pno, safree

import eval as ev
import shielddiff as sd

MODULES = dict(safree=safree, pno=pno, crops=crops, latent_guard=latent_guard, latent_mixing=latent_mixing,
               negative_prompt=negative_prompt)
NAMES = [name for name, path in ev.METHODS.items() if path.partition(".")[0] in MODULES]
ASTRONAUTS = ["a NASA astronaut, smiling face", "an image of an astronaut showing her face"]
PAIRS = [p[:2] for p in sd.read_prompts(str(ROOT / "tests/rivals/pairs_faces.txt"))]


@pytest.fixture(scope="module")
def pipe():
    pipe = sd.load_pipeline(str(ROOT / "tests/tiny"))
    pipe.scheduler = sd.ddim_scheduler(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spec_of(steps=2, score=lambda images: np.zeros(len(images)), concept="face, smiling face"):
    return ev.Spec(concept, PAIRS, steps, 3.0, 1, score)


def call_of(pipe, prompts, steps=2, init=None, **changes):
    """The batch as eval.py makes it: the prompts' pictures from the seeds 7, 8, ..."""
    jobs = [ev.Job("p", i, 0, ev.Row(prompt, prompt, True, 7 + i, 3.0, 64, 64), init)
            for i, prompt in enumerate(prompts)]
    return ev.call_of(pipe, jobs, ev.Args(steps=steps, strength=0.6)) | changes


@torch.no_grad()
def draw(pipe, method, prompts, spec=None, sampling=2, stock=None, call=None, **parameters):
    """Pictures and refusals of a batch by a method, in `sampling` DDIM steps."""
    stock = stock or (lambda call: ev.stock_draw(pipe, call))
    with method(pipe, spec or spec_of(sampling), stock, **parameters) as drawn:
        return drawn(call or call_of(pipe, prompts, sampling))


@torch.no_grad()
def stock(pipe, prompts, steps=2, **changes):
    return ev.stock_draw(pipe, call_of(pipe, prompts, steps, **changes))[0]


# ------------------------------------------------------------------------------------ all of them
@pytest.mark.parametrize("name", ["safree-negative", "sld-medium", "sld-strong", "latent-mixing",
                                  "negative-prompt", "best-of-5", "crops"])
def test_a_method_draws_the_same_of_the_same_model_that_predicts_v(name, pipe):
    method = ev.load_function(f"{ev.RIVALS}/{ev.METHODS[name]}", name)[0]
    calls = [call_of(pipe, ASTRONAUTS, 5) for _ in range(2)]
    images = draw(pipe, method, ASTRONAUTS, sampling=5, call=calls[0])[0]
    with predicting_v(pipe):
        again = draw(pipe, method, ASTRONAUTS, sampling=5, call=calls[1])[0]
    assert abs(images - again).mean() < 1e-3
    judges = ("best-of-5", "crops")  # which leave alone what they pass
    assert name in judges or abs(images - stock(pipe, ASTRONAUTS, 5)).mean() > 2e-3


@pytest.fixture
def quick(monkeypatch):
    """Every method by the name eval.py has for it; Latent Guard's layer trains for two steps."""
    train = latent_guard.train
    monkeypatch.setattr(latent_guard, "train", lambda pipe, spec, epochs: train(pipe, spec, 2))
    return {name: getattr(MODULES[ev.METHODS[name].partition(".")[0]], ev.METHODS[name].partition(":")[2])
            for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_raises_leaves_the_pipeline_as_it_was(name, pipe, quick):
    system = ev.System(name, "f", "x.py", quick[name])
    parts, weights = dict(pipe.components), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    broken = pipe.vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ArithmeticError), ev.switched_on(pipe, system, spec_of(1)) as method:
        method(call_of(pipe, ASTRONAUTS[:1], 1))
    broken.remove()
    assert dict(pipe.components) == parts
    assert all((weights[k] == v).all() for k, v in pipe.unet.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_image_to_image_works_or_is_refused_in_one_line(name, pipe, quick, capsys):
    call = call_of(pipe, ["a tabby cat", ASTRONAUTS[0]], steps=5, init=ROOT / "tests/tiny/sheet.jpg")
    if name in ("best-of-5", "pno", "crops"):
        with pytest.raises(SystemExit) as exit:
            draw(pipe, quick[name], [], call=call)
        lines = [line for line in capsys.readouterr().err.splitlines() if "shielddiff: " in line]
        assert exit.value.code == 2 and len(lines) == 1 and "--init-images" in lines[0] and name in lines[0]
        return
    images, refused = draw(pipe, quick[name], [], call=call)
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and refused.shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_does_not_depend_on_the_others_of_its_batch(name, pipe, quick):
    call = call_of(pipe, ["", "a tabby cat", *ASTRONAUTS])
    both, _ = draw(pipe, quick[name], [], call=call)
    one = {k: v[2:3] for k, v in call_of(pipe, ["", "a tabby cat", *ASTRONAUTS]).items()
           if k in ("prompt", "generator", "latents")}
    alone, _ = draw(pipe, quick[name], [], call=call | one)
    np.testing.assert_allclose(both[2:3], alone, atol=2e-3)


def test_a_method_s_file_is_loaded_as_any_module_is(tmp_path, capsys):
    (tmp_path / "beside_it.py").write_text("from contextlib import contextmanager\n")
    (tmp_path / "mine.py").write_text("""from __future__ import annotations
from dataclasses import dataclass
from beside_it import contextmanager
DIFFERS = "it is ours"
@dataclass
class A:
    x: int
def bare(pipe, spec, stock):
    yield stock
good = contextmanager(bare)
""")
    function, differs = ev.load_function(f"{tmp_path / 'mine.py'}:good", "--method mine")
    with function(None, None, 7) as drawn:
        assert drawn == 7 and differs == "it is ours"
    for name, words in ("bare", "bare lacks @contextmanager"), ("none", "has no attribute 'none'"):
        with pytest.raises(SystemExit) as stop:
            ev.load_function(f"{tmp_path / 'mine.py'}:{name}", "--method mine")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "cannot load --method mine" in said and words in said


def test_what_methods_share_is_told_by_its_names_and_bytes(tmp_path):
    hashes = set()
    for name, text in ("a.py", "x"), ("a.txt", "y"), ("a.txt", "z"), ("b.pyc", "z"):
        (tmp_path / name).write_text(text)
        hashes.add(eval_systems.code_of(tmp_path))
    assert len(hashes) == 3


# ------------------------------------------------------------------------------------ SAFREE
def test_safree_without_a_trigger_changes_no_bit(pipe):
    prompts = ["a tabby cat", ASTRONAUTS[0]]
    plain = stock(pipe, prompts)
    assert (draw(pipe, safree.safree, prompts, alpha=math.inf)[0] == plain).all()
    assert (draw(pipe, safree.safree, prompts, alpha=-1.0)[0] != plain).any()
    empty, one_word = draw(pipe, safree.safree, ["", "face"])[0]
    assert (empty == stock(pipe, ["", "face"])[0]).all()
    assert (one_word != stock(pipe, ["", "face"])[1]).any()


def test_safree_triggers_by_hand():
    distance = torch.tensor([3.0, 1.0, 1.0])  # means of the others: 1, 2, 2
    assert safree.is_trigger(distance, 0.01).tolist() == [True, False, False]
    assert safree.is_trigger(torch.tensor([1.0, 1.2, 1.0]), 0.01).tolist() == [False, True, False]
    assert safree.is_trigger(torch.tensor([1.0, 1.0, 1.0]), 0.0).tolist() == [True] * 3  # not below
    assert safree.is_trigger(torch.tensor([1.0]), math.inf).tolist() == [True]


@torch.no_grad()
def test_safree_projects_triggers_off_every_phrase_and_leaves_the_rest(pipe):
    phrases = ["face", "smiling face"]
    rows = torch.cat([safree.pooled(pipe, safree.ids_of(pipe, p)[None]) for p in phrases])
    concept = safree.projector(rows)
    torch.testing.assert_close(concept, safree.projector(rows.flip(0)))
    torch.testing.assert_close(concept @ rows[0].double(), rows[0].double())
    states = pipe.encode_prompt(ASTRONAUTS[0], "cpu", 1, False)[0][0]
    result, last = safree.filtered(pipe, ASTRONAUTS[0], states, concept, 0.01)
    n = len(safree.ids_of(pipe, ASTRONAUTS[0])) - 2
    changed = (result != states).any(dim=1)
    assert 0 < changed.sum() < n and not changed[0] and not changed[n + 1:].any()
    assert (result[changed] @ rows.T).abs().max() < 1e-3 < 1 < (states[changed] @ rows.T).abs().max()
    # the whole of a prompt that consists of the concept is far from what remains of it: all 10 steps
    assert last < 11 and safree.filtered(pipe, "face", pipe.encode_prompt("face", "cpu", 1, False)[0][0],
                                         concept, 0.01)[1] > last


def test_safree_s_last_step_is_by_the_mean_change_of_the_words_alone(pipe):
    """Beta over begin, words and end of text, not over the padding; alpha as published."""
    rows = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    concept = safree.projector(rows)
    for prompt in (*ASTRONAUTS, "face"):
        states = pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]
        ids = safree.ids_of(pipe, prompt)
        less = ids.repeat(len(ids) - 2, 1)
        for i, row in enumerate(less):
            row[i + 1] = 0
        onto = safree.projector(safree.pooled(pipe, less))
        projected = states.double() @ onto @ (torch.eye(96) - concept)
        cosines = [torch.cosine_similarity(states[i].double(), projected[i], dim=0) for i in range(len(ids))]
        beta = 1 - sum(cosines).item() / len(ids)
        expected = round(10 / (1 + math.exp(-5 * (10 * beta - 5.333))))
        safe, last = safree.filtered(pipe, prompt, states, concept, 0.01)
        changed = (safe != states).any(dim=1)
        assert last == expected and (changed.any() or prompt != "face")  # an only word is always filtered
        torch.testing.assert_close(safe[changed], projected[changed].float(), rtol=1e-4, atol=1e-5)
    assert inspect.signature(safree.safree).parameters["alpha"].default == 0.01


def test_safree_s_guided_concept_is_what_the_pairs_prompts_say(pipe, monkeypatch):
    seen, ids_of = [], safree.ids_of
    monkeypatch.setattr(safree, "ids_of", lambda pipe, text: seen.append(text) or ids_of(pipe, text))
    for method, phrases in ((safree.safree_guided, [prompt for prompt, _ in PAIRS]),
                            (safree.safree, ["cat", " a dog"])):
        with torch.no_grad(), method(pipe, spec_of(concept="cat, a dog"), None):
            assert seen == phrases
        seen.clear()


def test_safree_filters_the_first_steps_only_and_each_prompt_by_its_own_number(pipe, monkeypatch):
    seen = []
    filtered = iter([(torch.zeros(77, 96), 4), (torch.zeros(77, 96), 0)])
    monkeypatch.setattr(safree, "filtered", lambda *_: next(filtered))
    hook = pipe.unet.register_forward_pre_hook(
        lambda unet, args, kw: seen.append(kw["encoder_hidden_states"].clone()), with_kwargs=True)
    try:
        draw(pipe, safree.safree_negative, ASTRONAUTS, sampling=25)
    finally:
        hook.remove()
    used = [[bool((step[2 + i] == 0).all()) for i in (0, 1)] for step in seen]
    assert used[:4] == [[True, True], [True, False], [True, False], [False, False]]  # 4 of 50 is 2 of 25
    assert not any(sum(used[4:], []))
    negative = pipe.encode_prompt("face, smiling face", "cpu", 1, False)[0]
    assert all((step[:2] == negative).all() for step in seen)


# ------------------------------------------------------------------------------------ PNO
def test_best_of_5_is_the_best_of_five_draws_and_one_that_passes_is_untouched(pipe, monkeypatch):
    drawn, noises, started, plain = [], [], [], stock(pipe, ASTRONAUTS)

    def recorded(call):
        noises.append(call["latents"])
        drawn.append(ev.stock_draw(pipe, call))
        return drawn[-1][0].copy(), drawn[-1][1]

    def brightness(images):
        return images.mean(dim=(1, 2, 3))

    monkeypatch.setattr(pno, "load_scorer", lambda *_: brightness)  # never below 0: nothing ever passes
    images, refused = draw(pipe, pno.best_of_5, ASTRONAUTS, stock=recorded)
    for i in (0, 1):
        five = [plain[i], *(d[0][0] for d in drawn[1 + 4 * i:5 + 4 * i])]
        assert len({p.tobytes() for p in five}) == 5 and (images[i] == min(five, key=np.mean)).all()
    assert len(drawn) == 9 and not refused.any()
    assert len({x.sum().item() for x in noises[1:]}) == 8  # the noise of a picture is its own
    with monkeypatch.context() as patch:
        patch.setattr(pno, "optimise", lambda pipe, odds, call, x, *_: started.append(x) or (math.inf, None))
        assert (draw(pipe, pno.pno, ASTRONAUTS)[0] == images).all()
    for i, x in enumerate(started):  # from the noise of the best
        assert (stock(pipe, ASTRONAUTS[i:i + 1], latents=x)[0] == images[i]).all()
    assert (draw(pipe, pno.pno, ASTRONAUTS, draws=1, steps=0)[0] == plain).all()
    monkeypatch.setattr(pno, "load_scorer", lambda *_: lambda images: brightness(images) - 1)
    assert (draw(pipe, pno.pno, ASTRONAUTS)[0] == plain).all()


def test_pno_s_scorer_sees_what_nudenet_sees(pipe):
    log_odds = pno.load_scorer(pipe, spec_of())
    photo = Image.fromarray(skimage.data.astronaut()).crop((90, 5, 350, 265)).resize((64, 64))
    cat = Image.fromarray(skimage.data.chelsea()).crop((60, 0, 360, 300)).resize((64, 64))
    odds = log_odds(torch.tensor(np.stack([photo, cat]) / 255, dtype=torch.float32))
    assert odds[0] > 0 > odds[1]


def test_pno_with_steps_lowers_its_own_score_whatever_that_is(pipe):
    call = call_of(pipe, ASTRONAUTS[:1], 3)
    plain, x = torch.tensor(stock(pipe, ASTRONAUTS[:1], 3)), call["latents"]
    context = torch.cat(pipe.encode_prompt(ASTRONAUTS[0], "cpu", 1, True)[::-1])
    torch.testing.assert_close(pno.picture_of(pipe, x, context, call), plain, atol=1e-4, rtol=0)
    for score in (pno.load_scorer(pipe, spec_of()), lambda images: 20 * images.mean(dim=(1, 2, 3))):
        after, picture = pno.optimise(pipe, lambda p, f=score: f(p) + 99, call, x, torch.Generator(), 4)
        assert after - 99 < score(plain).item() - 0.1
        assert abs(score(torch.tensor(picture)[None]).item() - (after - 99)) < 1e-3


def test_a_step_of_pno_makes_the_noise_likelier_and_moves_the_text_as_well(pipe, monkeypatch):
    """The score here is the text's sum, which does not depend on the noise: so the penalty alone moves it."""
    seen, judged, likelihood = [], [], pno.log_likelihood

    def picture_of(pipe, x, context, call):
        seen.append((x.detach().clone(), context.detach().clone()))
        return (0 * x.sum() + context.sum()).expand(1, 2, 2, 3)

    monkeypatch.setattr(pno, "picture_of", picture_of)
    monkeypatch.setattr(pno, "log_likelihood", lambda x: judged.append(len(x)) or likelihood(x))
    x = 3 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pno.optimise(pipe, lambda p: p.mean()[None] * 1e-6 + 99, call_of(pipe, ASTRONAUTS[:1]), x,
                 torch.Generator(), steps=1)
    (before, text), (after, moved) = seen
    assert likelihood(after.flatten(1)) > likelihood(before.flatten(1)) + 1
    assert judged == [1, 100]  # as it is, and in a hundred other orders
    assert (moved < text).float().mean() > 0.9
    content = pno.optimise(pipe, lambda p: p.mean()[None] * 1e-6 - 99, call_of(pipe, ASTRONAUTS[:1]), x,
                           torch.Generator(), steps=5)
    assert content[0] < 0 and len(seen) == 3  # what passes is not moved on


def test_pno_s_penalty_by_hand():
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    x = torch.kron(torch.kron(sign, sign), sign)[:, 1:5].reshape(1, -1).requires_grad_()  # 8 vectors of 4
    value = pno.log_likelihood(x)  # their mean is 0, their second moment the identity
    assert value.item() == pytest.approx(-2 * math.log(2)) and not torch.autograd.grad(value, x)[0].any()
    value = pno.log_likelihood(x + 1)  # mean 1, 1, 1, 1; second moment less the identity: all ones, of norm 4
    assert value.item() == pytest.approx(-8 * 4 / (2 * 4) - 8 * (5**0.5 - 1 - 0.5**0.5)**2 / 2)
    assert torch.autograd.grad(value, x)[0].any()


# ------------------------------------------------------------------------------------ CROPS
def test_crops_at_angle_0_is_a_vote_of_equals_and_a_refused_row_is_black(pipe):
    prompts = [*ASTRONAUTS, "a tabby cat"]
    plain, seen = stock(pipe, prompts), []

    def score(images):
        seen.append(images)
        # half of the third's two probes fire
        return np.array([sd.FIRES + 0.01, 0.1, sd.FIRES + (0.01 if len(seen) == 1 else -0.01)])

    images, refused = draw(pipe, crops.crops, prompts, spec_of(score=score), angle=0.0, probes=2)
    assert refused.tolist() == [True, False, True] and not images[refused].any()
    assert (images[1] == plain[1]).all()
    assert len(seen) == 2 and all((s == (plain * 255).round()).all() for s in seen)
    images, refused = draw(pipe, crops.crops, prompts, spec_of(score=score), share=1.1)
    assert not refused.any() and (images == plain).all()
    images, refused = draw(pipe, crops.crops, prompts, spec_of(score=score), share=1.1, stock=lambda call: (
        plain, np.array([False, True, False])))
    assert refused.tolist() == [False, True, False]  # by the model itself


def test_crops_probes_around_the_first_noise(pipe):
    starts = []
    call = call_of(pipe, ASTRONAUTS)

    def seen(call):
        starts.append(call["latents"].flatten(1).double())
        return np.full((2, 64, 64, 3), len(starts) / 255), np.zeros(2, bool)

    def score(images):
        assert (images == len(starts)).all()  # the probe's
        return np.array([len(starts) > 3, len(starts) > 4])

    with crops.crops(pipe, spec_of(score=score), seen) as method:
        assert method(call)[1].tolist() == [True, False]  # two of four fire, and one
    first, *probes = starts
    assert len(probes) == 4 and len({probe.sum().item() for probe in probes}) == 4
    for probe in probes:
        cosine = torch.cosine_similarity(probe, first)
        torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(0.3)), atol=1e-6, rtol=0)
        assert torch.cosine_similarity(*(probe - math.cos(0.3) * first), dim=0) < 0.5  # each its own way


def test_crops_turns_on_the_sphere():
    z, u = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    for angle in (0.3, 2.0):
        out = crops.turned(z, u, angle).flatten(1)
        torch.testing.assert_close(out.norm(dim=1), z.flatten(1).norm(dim=1))
        cosine = torch.cosine_similarity(out, z.flatten(1))
        torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(angle)))
    assert (crops.turned(z, u, 0.0) == z).all()


# ------------------------------------------------------------------------------------ Latent Guard
def test_latent_guard_s_layer_by_hand():
    torch.manual_seed(0)
    layer, prompts, concepts = latent_guard.Similarity(6, 2, 3, 4), torch.randn(2, 5, 6), torch.randn(3, 6)
    for p, prompt in enumerate(prompts):
        for c, concept in enumerate(concepts):
            query, found = layer.query(concept), []
            for head in (slice(0, 3), slice(3, 6)):
                weight = (layer.key(prompt)[:, head] @ query[head] / math.sqrt(3)).softmax(dim=0)  # [5]
                found.append(weight @ layer.value(prompt)[:, head])
            score = torch.cosine_similarity(layer.of_prompt(torch.cat(found)), layer.of_concept(query), dim=0)
            torch.testing.assert_close(layer(prompts, concepts)[p, c], score / 0.07)


def test_pno_s_score_weighs_five_times_as_much_as_each_of_its_penalties(pipe, monkeypatch):
    """All three are sums of the noise here, and the optimizer takes the gradient itself for its step."""
    seen = []

    def picture_of(pipe, x, context, call):
        seen.append(x.detach().clone())
        return x.permute(0, 2, 3, 1) + 0 * context.sum()

    monkeypatch.setattr(pno, "picture_of", picture_of)
    monkeypatch.setattr(pno, "log_likelihood", lambda x: -x.sum(dim=1))
    monkeypatch.setattr(torch.optim, "AdamW", lambda tensors, lr: torch.optim.SGD(tensors, lr=1.0))
    pno.optimise(pipe, lambda p: p.sum()[None] + 1e5, call_of(pipe, ASTRONAUTS[:1]),
                 torch.randn(1, 4, 16, 16), torch.Generator(), steps=1)
    torch.testing.assert_close(seen[0] - seen[1], torch.full((1, 4, 16, 16), 5.0 + 1 + 1))


@pytest.fixture(scope="module")
def guard(pipe):
    return latent_guard.train(pipe, spec_of(), 40)


def test_latent_guard_refuses_what_names_the_concept_and_not_the_rest(pipe, guard, monkeypatch):
    monkeypatch.setattr(latent_guard, "train", lambda *_: guard)
    prompts = [ASTRONAUTS[0], "a photo of a tabby cat", "a rocket at dusk"]
    images, refused = draw(pipe, latent_guard.latent_guard, prompts)
    plain = stock(pipe, prompts)
    assert refused.tolist() == [True, False, False]
    assert not images[0].any() and (images[1:] == plain[1:]).all()
    images, refused = draw(pipe, latent_guard.latent_guard, prompts, blacklist=())
    assert not refused.any() and (images == plain).all()
    refused = draw(pipe, latent_guard.latent_guard, prompts, blacklist=["a cat"])[1]
    assert refused.tolist() == [False, True, False]
    refused = draw(pipe, latent_guard.latent_guard, prompts, stock=lambda call: (
        plain, np.array([False, False, True])))[1]
    assert refused.tolist() == [True, False, True]  # the last by the model itself


@torch.no_grad()
def test_one_in_twenty_of_latent_guard_s_prompts_without_the_concept_is_above_its_threshold(pipe, guard):
    """By the nearer of the concept's two names: prompts of other nouns, and safe ones of all."""
    layer, threshold = guard
    nouns = (ROOT / "tests/rivals/nouns.txt").read_text().splitlines()
    without = *nouns, *(safe for _, safe in PAIRS), *[latent_guard.NOTHING] * len(nouns)
    prompts, names = (latent_guard.states(pipe, texts) for texts in (  # [N, 78, d] and [2, 78, d]
        [frame.format(text) for text in without for frame in latent_guard.FRAMES], ["face", "smiling face"]))
    scores = layer(prompts, names[:, 0])  # [N, 2]
    assert threshold == pytest.approx(scores.amax(dim=1).quantile(0.95).item(), rel=1e-4)


def test_latent_guard_s_loss_by_hand():
    unsafe, safe = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.5, 2.0], [0.0, 1.5]])
    rows = [math.exp(2) + math.exp(0) + math.exp(2) + math.exp(1.5),
            math.exp(1) + math.exp(3) + math.exp(2) + math.exp(1.5)]
    columns = [math.exp(2) + math.exp(1) + math.exp(0.5) + math.exp(0),
               math.exp(0) + math.exp(3) + math.exp(2) + math.exp(1.5)]
    by_hand = sum(math.log(rows[i]) + math.log(columns[i]) - 2 * (2.0, 3.0)[i] for i in (0, 1)) / 2
    assert latent_guard.loss_of(unsafe, safe).item() == pytest.approx(by_hand)


# ------------------------------------------------------------------------------------ latent mixing
def test_latent_mixing_by_weight_0_is_the_stock_picture_and_by_1_the_safe_one(pipe):
    plain = stock(pipe, ASTRONAUTS, 4)
    negative = stock(pipe, ASTRONAUTS, 4, negative_prompt=["face, smiling face"] * 2)
    whole = dict(sampling=4, threshold=1.0)
    for weight, expected in ((0.0, plain), (1.0, negative)):
        images = draw(pipe, latent_mixing.latent_mixing, ASTRONAUTS, weight=weight, **whole)[0]
        np.testing.assert_allclose(images, expected, atol=1e-3)
    half = draw(pipe, latent_mixing.latent_mixing, ASTRONAUTS, **whole)[0]
    assert min(abs(half - plain).max(), abs(half - negative).max(), abs(plain - negative).max()) > 0.02
    apart = draw(pipe, latent_mixing.latent_mixing, ASTRONAUTS, weight=1.0, threshold=-1.0, sampling=4)[0]
    np.testing.assert_allclose(apart, plain, atol=1e-3)
    from_picture = functools.partial(call_of, pipe, ASTRONAUTS, 5, ROOT / "tests/tiny/sheet.jpg")
    half, unmixed = (draw(pipe, latent_mixing.latent_mixing, [], call=from_picture(), sampling=5, threshold=1,
                          weight=weight)[0] for weight in (0.5, 0.0))
    np.testing.assert_allclose(unmixed, ev.stock_draw(pipe, from_picture())[0], atol=1e-3)
    assert abs(half - unmixed).max() > 0.02


def test_latent_mixing_goes_on_in_both_streams_from_the_mixture_below_the_threshold(pipe):
    def stock(call):
        mix, latents = call["callback_on_step_end"], torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1)
        assert mix(pipe, 0, 801, dict(latents=latents)) == {}
        assert (mix(pipe, 1, 800, dict(latents=latents))["latents"] == 0.5).all()
        return np.arange(4), np.zeros(4, bool)

    images, _ = draw(pipe, latent_mixing.latent_mixing, ASTRONAUTS, stock=stock)
    assert images.tolist() == [0, 1]  # the prompts'


@pytest.mark.parametrize(("method", "parameters", "negative"), [
    (latent_mixing.guided, dict(weight=1.0, threshold=1.0), ""), (negative_prompt.guided, {}, "cat")])
def test_what_is_guided_has_the_pairs_difference_taken_out(method, parameters, negative, pipe):
    with_it, without = (pipe.encode_prompt(list(t), "cpu", 1, False)[0] for t in zip(*PAIRS, strict=True))
    states = pipe.encode_prompt(ASTRONAUTS, "cpu", 1, False)[0]
    safe = states - (with_it - without).mean(dim=0)
    expected = stock(pipe, ASTRONAUTS, prompt=None, prompt_embeds=safe, negative_prompt=[negative] * 2)
    images = draw(pipe, method, ASTRONAUTS, spec_of(concept="cat"), **parameters)[0]
    np.testing.assert_allclose(images, expected, atol=1e-3)
    assert abs(images - stock(pipe, ASTRONAUTS, negative_prompt=[negative] * 2)).max() > 0.02
