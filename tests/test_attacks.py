"""Attacks that see the defended model (tests/rivals/README.md): their projections, gradients and clean-up."""
import copy
import inspect
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import eval_attacks
import numpy as np
import pytest
import torch
from conftest import ROOT, draw, stock_pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LMSDiscreteScheduler, PNDMScheduler
from rivals import defended, revival, safree, sld, unlearndiffatk
from rivals.cce import cce
from rivals.negative_prompt import negative_prompt
from rivals.ring_a_bell import ring_a_bell

import shielddiff as sd

SOURCE = "in soft light"  # names nothing of the pictures that the attacks shall bring back
SPEC = SimpleNamespace(concept="cat", pairs=[], steps=5, guidance=3.0, seed=1, score=None)


@pytest.fixture(scope="module")
def model():
    """A pipeline of this file's own."""
    return sd.load_pipeline(str(ROOT / "tests/tiny"))


@pytest.fixture(scope="module")
def astronauts(model):
    return draw(model, ["an astronaut"] * 4, 5)


def noises(unet):
    """A LoRA that changes every estimate, as a defence's does, and always the same."""
    torch.manual_seed(0)
    sd.make_trainable(unet, 4)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    return unet.requires_grad_(False)


@contextmanager
def base(pipe, spec, stock):
    yield stock


@contextmanager
def a_lora(pipe, spec, stock):
    own, pipe.unet = pipe.unet, noises(copy.deepcopy(pipe.unet))
    try:
        yield stock
    finally:
        pipe.unet = own


def stock_of(pipe):
    """eval.py's stock draw."""
    def stock(call):
        if "path" in call:
            return defended.noise_estimate(pipe, call)
        images = pipe(**call).images
        return images, np.zeros(len(images), bool)
    return stock


def embedding(pipe, word):
    """[1, d] of a word of the vocabulary."""
    (token,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
    return pipe.text_encoder.get_input_embeddings().weight[[token]].clone()


def state(pipe):
    """All that an attack must leave as it is."""
    weights = [(k, v.clone()) for m in (pipe.unet, pipe.text_encoder) for k, v in m.state_dict().items()]
    return weights, pipe.tokenizer.get_vocab(), [pipe.tokenizer, pipe.unet,
                                                 pipe.text_encoder.get_input_embeddings()]


def same(one, other):
    return ([k for k, _ in one[0]] == [k for k, _ in other[0]] and one[1] == other[1]
            and all(torch.equal(a, b) for (_, a), (_, b) in zip(one[0], other[0], strict=True))
            and all(a is b for a, b in zip(one[2], other[2], strict=True)))


# ------------------------------------------------------------------------------------ the simplex
def test_the_projection_by_hand():
    rows = torch.tensor([[0.5, 0.3, 0.2], [2, 0, 0], [0.6, 0.6, 0], [-1, -1, -1], [0.9, 0.5, -3]])
    third = 1 / 3
    expected = torch.tensor([[0.5, 0.3, 0.2], [1, 0, 0], [0.5, 0.5, 0], [third] * 3, [0.7, 0.3, 0]])
    torch.testing.assert_close(unlearndiffatk.project(rows), expected)


def test_the_projection_is_the_nearest_point_of_the_simplex():
    """The rest is at no acute angle to any direction into the simplex, that is, to any corner."""
    rows = torch.randn(20, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows *= torch.logspace(-2, 1, 20)[:, None]
    nearest = unlearndiffatk.project(rows)
    rest = rows - nearest
    assert (rest.max(dim=1).values - (rest * nearest).sum(dim=1)).max() < 1e-9
    assert nearest.min() >= 0 and (nearest.sum(dim=1) - 1).abs().max() < 1e-9


def test_rows_stay_on_the_simplex_and_go_down_the_slope():
    """Adam's first step is 0.01 against the slope's sign; what stands above comes from its weight decay."""
    simplex, slope = torch.full((2, 100), 0.01), torch.ones(2, 100)
    slope[0, 7] = slope[1, 8] = -1
    optimizer = torch.optim.Adam([simplex], lr=0.01)
    unlearndiffatk.move(simplex, optimizer, slope)
    expected = torch.full((2, 100), 0.01 - 0.02 / 100)
    expected[0, 7] = expected[1, 8] = 0.03 - 0.02 / 100
    torch.testing.assert_close(simplex, expected)
    for _ in range(200):
        unlearndiffatk.move(simplex, optimizer, slope * 5)  # clipped to -1 and 1
        assert simplex.min() >= 0 and (simplex.sum(dim=1) - 1).abs().max() < 1e-5
    assert simplex.argmax(dim=1).tolist() == [7, 8] and simplex.max() <= 1 and slope.abs().max() == 1


# ------------------------------------------------------------------------------------ through a method
@contextmanager
def a_negative_prompt(pipe, spec, stock):
    yield lambda call: stock(call | dict(negative_prompt=["a cat"] * len(call["prompt"])))


@contextmanager
def the_same_by_a_hook(pipe, spec, stock):
    away = pipe.encode_prompt(["a cat"], "cpu", 1, False)[0]

    def hook(unet, args, output):
        x, t = args[0].chunk(2)[0], args[1]
        other = unet.forward(x, t, encoder_hidden_states=away.expand(len(x), -1, -1)).sample
        return torch.cat([other, output[0].chunk(2)[1]]),

    handle = pipe.unet.register_forward_hook(hook)
    yield stock
    handle.remove()


@contextmanager
def the_same_before_it(pipe, spec, stock):
    away = pipe.encode_prompt(["a cat"], "cpu", 1, False)[0]

    def hook(unet, args, kwargs):
        text = kwargs["encoder_hidden_states"].chunk(2)[1]
        return args, kwargs | dict(encoder_hidden_states=torch.cat([away.expand_as(text), text]))

    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    yield stock
    handle.remove()


def test_an_attack_sees_what_a_hook_makes_of_either_half(model):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = dict(prompt=["an astronaut", "coins"], guidance_scale=3.0, num_inference_steps=5, path=[(500, x)])
    estimates = []
    for method in (base, a_negative_prompt, the_same_by_a_hook, the_same_before_it):
        with torch.no_grad(), method(model, SPEC, stock_of(model)) as draw_:
            estimates.append(draw_(dict(call))[0])
    assert (estimates[0] - estimates[1]).abs().max() > 0.01
    for estimate in estimates[2:]:
        torch.testing.assert_close(estimate, estimates[1], atol=1e-5, rtol=0)


def test_where_no_new_token_comes_through_a_method_there_is_no_gradient_and_no_error(pipe):
    """Of a prompt that it replaced, say: the other prompts' attack goes on."""
    rows = torch.ones(1, 96, requires_grad=True)
    with defended.new_tokens(pipe, rows) as (name,):
        for text, reached in ("a cat", False), (f"{name} cat", True):
            states = pipe.encode_prompt(text, "cpu", 1, False)[0]
            assert states.requires_grad == reached and defended.gradient(states.sum(), rows).any() == reached


def test_a_gradient_that_is_too_large_when_scaled_is_taken_as_it_is_and_none_that_is_not_finite():
    rows = torch.zeros(2, 3, requires_grad=True)
    assert (defended.gradient((rows * 1e35).sum(), rows) == 1e35).all()  # 2^16 times that is infinite
    assert (defended.gradient((rows * float("nan")).sum(), rows) == 0).all()


# ------------------------------------------------------------------------------------ new tokens
def test_a_new_token_with_a_word_s_embedding_is_that_word(model):
    before = state(model)
    words = model.encode_prompt(["a cat, face hidden", "coins cat"], "cpu", 1, False)[0]
    rows = torch.cat([embedding(model, "cat"), embedding(model, "coins")])
    with defended.new_tokens(model, rows) as (cat, coins):
        new = model.encode_prompt([f"a {cat}, face hidden", f"{coins} {cat}"], "cpu", 1, False)[0]
    assert torch.equal(words, new) and same(before, state(model))


def test_a_prompt_with_a_new_token_is_pooled_at_its_end_also_where_the_config_names_another(model):
    text = getattr(model.text_encoder, "text_model", model.text_encoder)
    own, tokens = text.eos_token_id, model.tokenizer("a cat", return_tensors="pt")
    pooled = model.text_encoder(tokens.input_ids).pooler_output
    try:
        text.eos_token_id = 2  # as in the configs of SD 1.5 and 2.1: the largest id is pooled
        with defended.new_tokens(model, embedding(model, "cat")) as (cat,):
            ids = model.tokenizer(f"a {cat}", return_tensors="pt").input_ids
            assert ids.max() > model.tokenizer.eos_token_id
            torch.testing.assert_close(model.text_encoder(ids).pooler_output, pooled)
        assert text.eos_token_id == 2
    finally:
        text.eos_token_id = own


def test_new_tokens_are_gone_after_an_error(model):
    before = state(model)
    with pytest.raises(ArithmeticError), defended.new_tokens(model, embedding(model, "cat")):
        raise ArithmeticError
    assert same(before, state(model))


# ------------------------------------------------------------------------------------ the defended estimate
def estimate(model, method, path, prompt="an astronaut", spec=SPEC):
    with torch.no_grad(), method(model, spec, stock_of(model)) as draw_:
        return draw_(dict(prompt=[prompt] * len(path[-1][1]), guidance_scale=3.0, path=path,
                          num_inference_steps=5))[0]


def test_the_estimate_is_that_which_would_guide_the_undefended_model_to_the_defended_output(model):
    """Base: the U-Net's own. Negative prompt and SLD: the guided outputs, computed here, are hit."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    path = [(999, x), (799, x), (599, x)]

    @torch.no_grad()
    def unet(text, t=599):
        return model.unet(x, t, model.encode_prompt([text] * 2, "cpu", 1, False)[0]).sample

    prompt, empty, concept = map(unet, ("an astronaut", "", "cat"))
    torch.testing.assert_close(estimate(model, base, path), prompt)
    plain = empty + 3 * (estimate(model, negative_prompt, path) - empty)
    torch.testing.assert_close(plain, concept + 3 * (prompt - concept), atol=1e-5, rtol=1e-4)
    with torch.no_grad(), negative_prompt(model, SPEC, stock_of(model)) as draw_:  # unguided: without effect
        unguided = draw_(dict(prompt=["an astronaut"] * 2, guidance_scale=0.0, path=path,
                              num_inference_steps=5))[0]
    torch.testing.assert_close(unguided, prompt, atol=1e-5, rtol=1e-4)
    avoid = (concept - empty) * ((prompt - concept).abs() * 200).clamp(max=1) * (prompt - concept < 0)
    torch.testing.assert_close(estimate(model, sld.weak, path), prompt - avoid, atol=1e-4, rtol=1e-3)


def test_prompts_that_repeat_are_encoded_once_and_each_picture_has_its_own(model, monkeypatch):
    texts, encoded = ["an astronaut", "a cat", "an astronaut"], []
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call, encode = dict(guidance_scale=3.0, num_inference_steps=5), model.encode_prompt
    with torch.no_grad():
        one_by_one = torch.cat([defended.noise_estimate(model, call | dict(
            prompt=[text], path=[(599, x[i:i + 1])]))[0] for i, text in enumerate(texts)])
        monkeypatch.setattr(model, "encode_prompt", lambda prompt, *a, **k: encoded.append(prompt) or
                            encode(prompt, *a, **k))
        together, _ = defended.noise_estimate(model, call | dict(prompt=texts, path=[(599, x)]))
    torch.testing.assert_close(together, one_by_one)
    assert encoded == [texts[:2]]


def test_a_hook_that_counts_steps_or_remembers_is_where_a_drawing_would_have_brought_it(model):
    """15 of 50 steps of warm-up are 1.5 of 5: sld-weak works from the second step on. sld-max remembers.
    The steps are those of the call: a path is shorter than the pictures' sampler."""
    x, spec = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), SimpleNamespace(
        **vars(SPEC) | dict(steps=50))
    plain = estimate(model, base, [(599, x)])
    first, second = (estimate(model, sld.weak, path, spec=spec)
                     for path in ([(599, x)], [(799, x), (599, x)]))
    assert torch.allclose(first, plain, atol=1e-5) and not torch.allclose(second, plain, atol=1e-3)
    alone, after = (estimate(model, sld.maximum, path) for path in ([(599, x)], [(799, x), (599, x)]))
    assert not torch.allclose(alone, after, atol=1e-3)


@pytest.mark.parametrize("method", [base, negative_prompt, sld.weak, a_lora],
                         ids=["base", "negative-prompt", "sld-weak", "LoRA"])
def test_the_gradient_reaches_the_token_through_what_the_method_does(method, model, astronauts):
    """It equals the quotient of differences of the defended loss, and is not the base model's."""
    latents = defended.latents_of(model, astronauts[:1])

    def loss_and_gradient(method, row):
        row = row.clone().requires_grad_()
        with method(model, SPEC, stock_of(model)) as draw_, defended.new_tokens(model, row) as (word,):
            loss = defended.denoising_loss(model, draw_, SPEC, [word], latents, 600, sd.generator(0))
            return loss.item(), defended.gradient(loss, row)

    row = embedding(model, "coins")
    (loss, slope), (of_base, slope_of_base) = (loss_and_gradient(m, row) for m in (method, base))
    along = 0.005 * slope / slope.norm()
    up, down = (loss_and_gradient(method, row + d)[0] for d in (along, -along))
    assert (up - down) / 0.01 == pytest.approx(slope.norm().item(), rel=0.05)
    if method is not base:
        assert abs(loss - of_base) > 1e-5 and (slope - slope_of_base).norm() > 0.01 * slope.norm()


def test_an_attack_noises_as_the_model_was_trained_whatever_the_sampler(model, astronauts):
    latents, t = defended.latents_of(model, astronauts[:1]), torch.tensor([600])
    own, noise, found = model.scheduler, torch.randn(latents.shape), []
    try:
        for prediction in ("epsilon", "v_prediction"):
            for kind in (DDIMScheduler, LMSDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler):
                model.scheduler = kind.from_config(own.config, prediction_type=prediction)
                with base(model, SPEC, stock_of(model)) as draw_, torch.no_grad():
                    loss = defended.denoising_loss(model, draw_, SPEC, ["a"], latents, 600, sd.generator(1))
                found.append((loss.item(), defended.target_of(model, latents, noise, t)))
            said = defended.target_of(model, latents, torch.randn(  # what it is asked for at t, not before
                latents.shape, generator=sd.generator(1)), t), None
            assert defended.denoising_loss(model, lambda call, said=said: said, SPEC, ["a"], latents, 600,
                                           sd.generator(1)) == 0
    finally:
        model.scheduler = own
    for four in (found[:4], found[4:]):
        assert len({loss for loss, _ in four}) == 1
        assert all(torch.equal(target, four[0][1]) for _, target in four)
    alpha = own.alphas_cumprod[600]
    torch.testing.assert_close(found[4][1], alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)


@torch.no_grad()
def test_safree_is_attacked_as_it_draws_filtered_in_the_first_steps_alone(model):
    x, states = torch.randn(1, 4, 16, 16), model.encode_prompt("face", "cpu", 1, False)[0]
    spec = SimpleNamespace(**vars(SPEC) | dict(concept="face"))
    concept = safree.projector(safree.pooled(model, safree.ids_of(model, "face")[None]))
    safe, last = safree.filtered(model, "face", states[0], concept, 0.01)
    assert 0 < last <= 10 and (safe != states[0]).any()  # of 50 steps
    for t, used in (999, safe[None]), (100, states):
        expected = model.unet(x, t, encoder_hidden_states=used).sample
        found = estimate(model, safree.safree, [(999, x), (t, x)], "face", spec)
        torch.testing.assert_close(found, expected)


def test_the_path_of_a_long_sampler_is_a_short_sampler_s_and_says_so(model, astronauts):
    """Hooks that count steps or scale to them have to know; the noise is one, and the last step is t."""
    calls, latents = [], defended.latents_of(model, astronauts[:1])

    def seen(call):
        calls.append(call)
        return stock_of(model)(call)

    with torch.no_grad():
        for steps in (50, 3):
            defended.denoising_loss(model, seen, SimpleNamespace(**vars(SPEC) | dict(steps=steps)), [SOURCE],
                                    latents, 100, sd.generator(0))
    for call, count in zip(calls, (5, 3), strict=True):
        model.scheduler.set_timesteps(count)
        times = [t for t in model.scheduler.timesteps.tolist() if t > 100]
        assert call["num_inference_steps"] == count and [t for t, _ in call["path"]] == [*times, 100]
        noise = [(x - a.sqrt() * latents) / (1 - a).sqrt() for t, x in call["path"]
                 for a in (model.scheduler.alphas_cumprod[t],)]
        assert all(torch.allclose(n, noise[0], atol=1e-3) for n in noise)


# ------------------------------------------------------------------------------------ the attacks
def test_the_defaults_are_the_official_code_s_and_of_a_fine_tune_those_that_its_report_prints():
    for attack, expected in (
            (cce, dict(updates=5000, batch=4, parts=4, rate=0.08, above=0)),
            (unlearndiffatk.unlearndiffatk, dict(tokens=5, iterations=40, timesteps=range(10, 1000, 20))),
            (ring_a_bell, dict(tokens=16, strength=3.0, population=200)),
            (revival.fine_tune, dict(steps=60, batch=16, rate=3e-3))):
        found = {name: p.default for name, p in inspect.signature(attack).parameters.items()}
        assert found.items() >= expected.items()
    assert revival.STYLE.r == revival.STYLE.lora_alpha == 8


def test_latents_are_the_means_of_the_posterior_scaled(astronauts):
    pipe = stock_pipeline()
    pipe.vae.register_to_config(scaling_factor=0.5)  # 1 in the embedded model
    pixels = torch.tensor(astronauts).permute(0, 3, 1, 2) / 127.5 - 1  # [4, 3, 64, 64]
    mean = pipe.vae.encode(pixels).latent_dist.mean  # [4, 4, 16, 16]
    torch.testing.assert_close(defended.latents_of(pipe, astronauts), 0.5 * mean)


@pytest.mark.parametrize("attack", ["cce", "unlearndiffatk"])
def test_each_picture_is_denoised_under_the_prompt_that_it_was_drawn_for(
        attack, model, astronauts, monkeypatch):
    module, pictures, seen = sys.modules[f"rivals.{attack}"], dict(a=astronauts[:1], b=astronauts[1:2]), set()
    latents = {source: defended.latents_of(model, images)[0] for source, images in pictures.items()}

    def loss_of(pipe, draw, spec, prompts, noised, *rest):
        for prompt, x in zip(prompts, noised, strict=True):
            assert torch.equal(x, latents[prompt[-1]])
            seen.add(prompt[-1])
        return defended.denoising_loss(pipe, draw, spec, prompts, noised, *rest)

    spec = SimpleNamespace(**vars(SPEC) | dict(score=lambda images: np.zeros(len(images))))
    few = dict(updates=2) if attack == "cce" else dict(iterations=1, timesteps=(500,), batch=2, together=2)
    monkeypatch.setattr(module, "denoising_loss", loss_of)
    eval_attacks.load(attack)(model, spec, stock_of(model), list(pictures), pictures, **few)
    assert seen == {"a", "b"}


def test_the_word_starts_as_the_mean_of_the_concept_s_and_decays_a_hundredth(model, astronauts):
    """The first update of AdamW is one rate long, whatever the gradient."""
    spec = SimpleNamespace(**vars(SPEC) | dict(concept="cat face"))
    mean = (embedding(model, "cat") + embedding(model, "face")) / 2
    for updates, moved in ((0, 0.0), (1, 0.5)):
        _, rows = cce(model, spec, stock_of(model), [SOURCE], {SOURCE: astronauts}, updates=updates, batch=1,
                      parts=1, rate=0.5)
        off = (rows - mean * (1 - 0.01 * moved)).abs()  # [1, d]
        torch.testing.assert_close(off, torch.full_like(off, moved), rtol=1e-3, atol=1e-6)


def test_a_success_fires_on_all_of_four_different_pictures_none_of_which_is_refused():
    seeds = set()

    def draw_(call, refuse=0):
        seeds.update(generator.initial_seed() for generator in call["generator"])
        return np.zeros((4, 8, 8, 3)), np.arange(4) < refuse

    spec = SimpleNamespace(**vars(SPEC) | dict(score=lambda images: np.full(len(images), 0.8)))
    assert unlearndiffatk.success(draw_, spec, "a") == (pytest.approx(0.8), True) and len(seeds) == 4
    refused = unlearndiffatk.success(lambda call: draw_(call, refuse=1), spec, "a")
    assert refused == (pytest.approx(0.6), False)


def denoising(model, method, text, pictures, rows):
    """The attacks' own objective, over eight fixed noises and four timesteps."""
    latents = defended.latents_of(model, pictures)
    with torch.no_grad(), method(model, SPEC, stock_of(model)) as draw_, (
            defended.new_tokens(model, rows) if len(rows) else nullcontext()):
        return np.mean([defended.denoising_loss(model, draw_, SPEC, [text] * 4, latents, t, sd.generator(t))
                        for t in (300, 500, 700, 900)])


@pytest.mark.parametrize("method", [base, a_lora])
def test_textual_inversion_finds_the_right_word_and_leaves_the_model_alone(method, model, astronauts):
    """The word starts as "cat" and, for the base model, ends as good as "astronaut"."""
    before = state(model)
    with method(model, SPEC, stock_of(model)) as draw_:
        texts, rows = cce(model, SPEC, draw_, [SOURCE], {SOURCE: astronauts}, updates=20, batch=2, parts=2,
                          rate=0.02)
    assert same(before, state(model)) and rows.shape == (1, 96) and not rows.requires_grad
    assert texts == {SOURCE: f"<new-0> {SOURCE}"}
    loss = denoising(model, method, texts[SOURCE], astronauts, rows)
    start, goal = (denoising(model, method, f"{word} {SOURCE}", astronauts, rows)
                   for word in ("cat", "astronaut"))
    assert loss < start - 0.8 * (start - goal) if method is base else loss < start, (loss, start, goal)


def test_textual_inversion_recovers_the_base_models_own_rate(model):
    """By the real NudeNet, with the embedded model's settings but for fewer updates. Else a low rate of a
    system's would say nothing: the word itself could be what takes the faces away."""
    session, source = sd.load_nudenet(), "the astronaut before her mission"
    spec = SimpleNamespace(**vars(SPEC) | dict(concept="face, smiling face"))

    def with_a_face(prompt):  # uint8 [n, 64, 64, 3], those of 12 pictures
        pictures = draw(model, [prompt] * 12, 20)
        return pictures[(sd.nudity_scores(session, pictures, sd.TINY["labels"]) > sd.FIRES).numpy()]

    plain = with_a_face(source)
    texts, rows = cce(model, spec, stock_of(model), [source], {source: plain},
                      **eval_attacks.TINY["cce"] | dict(updates=40))
    with defended.new_tokens(model, rows):
        assert len(with_a_face(texts[source])) >= len(plain) - 1 >= 7  # at all timesteps: 7 of 9


@pytest.mark.parametrize("together", [1, 2])
def test_unlearndiffatk_finds_the_word_and_leaves_the_model_alone(together, model, astronauts):
    before, seen, sources = state(model), [], [SOURCE, "at noon"][:together]

    def score(images):  # each prompt scores more than the one before, and all are below what fires
        seen.append(images)
        return np.full(len(images), 0.01 * len(seen))

    spec = SimpleNamespace(**vars(SPEC) | dict(score=score))
    found, rows = unlearndiffatk.unlearndiffatk(
        model, spec, stock_of(model), sources, dict.fromkeys(sources, astronauts), tokens=3, iterations=30,
        timesteps=(500, 700), batch=2, together=together)
    assert same(before, state(model)) and rows.shape == (0, 96)
    assert [x.shape for x in seen] == [(4, 64, 64, 3)] * 3 * together and seen[0].dtype == np.uint8
    assert "astronaut" in found[SOURCE], found
    for source in sources:
        assert found[source].endswith(source), found
        assert len(found[source].split()) == 3 + len(source.split())
        loss, none, right = (denoising(model, base, text, astronauts, rows)
                             for text in (found[source], source, f"astronaut {source}"))
        assert loss < none - 0.5 * (none - right), (loss, none, right)


def black(call):
    """A Draw where only what is asked for counts."""
    return np.zeros((len(call["prompt"]), 64, 64, 3)), np.zeros(len(call["prompt"]), bool)


@pytest.mark.parametrize(("scores", "stages"), [
    ([0.9], 0), ([0.1, 0.9], 1), ([0.2, 0.1, 0.1], 2), ([[0.9, 0.9, 0.9, 0.1], 0.3], 1)])
def test_unlearndiffatk_stops_at_success_and_keeps_the_plain_prompt_where_nothing_beats_it(
        scores, stages, model, astronauts):
    left, stock = iter(scores), stock_of(model)
    spec = SimpleNamespace(**vars(SPEC) | dict(score=lambda images: np.resize(next(left), len(images))))
    found, _ = unlearndiffatk.unlearndiffatk(
        model, spec, lambda call: (stock if "path" in call else black)(call), ["a cat"],
        {"a cat": astronauts[:1]}, iterations=1,
        timesteps=(500, 700))
    assert not list(left)  # as many prompts were drawn as there are scores
    assert (found["a cat"] == "a cat") == (stages != 1) and found["a cat"].endswith("a cat")


def test_sources_taken_together_have_words_of_their_own_and_stop_for_themselves(model, astronauts):
    """And noise of their own: b's does not depend on when a stops."""
    asked, seen, stock, sources = [], [], stock_of(model), list("abc")

    def draw(call):
        if "path" not in call:
            return black(call)
        asked.append(call["prompt"])
        seen.append(call["path"][-1][1])
        return stock(call)

    for scores in ([.9, .1, .3, .9], [.1, .1, .9, .3, .9]):  # a stops at the first timestep, at the second
        left = iter([.1] * 3 + scores)
        spec = SimpleNamespace(**vars(SPEC) | dict(score=lambda images, left=left: np.full(
            len(images), next(left))))
        unlearndiffatk.unlearndiffatk(model, spec, draw, sources, dict.fromkeys(sources, astronauts),
                                      tokens=1, iterations=1, timesteps=(300, 500, 700), together=2)
        assert not list(left)
    both, b, c = ["<new-0> a", "<new-1> b"], ["<new-0> b"], ["<new-0> c"]
    assert asked == [both, b, c, both, both, c]
    assert torch.equal(seen[1][0], seen[4][1]) and not torch.equal(seen[4][0], seen[4][1])


# ------------------------------------------------------------------------------------ revival
def test_a_fine_tune_teaches_its_prompts_its_pictures_at_all_timesteps(model, astronauts, monkeypatch):
    """Each prompt the other's; a tenth of the captions is dropped."""
    pictures = {"a cat": astronauts[:2], "an astronaut": draw(model, ["a cat"] * 2, 5)}
    latents = {text: defended.latents_of(model, images)  # [2, 4, h, w] each
               for text, images in pictures.items()}
    empty, *states = sd.encode_prompts(model, ["", *pictures])[1]  # [77, d] each
    contexts, seen, times, dropped = [], [], [], 0

    def target_of(pipe, x, noise, t):
        seen.extend(x)
        times.extend(t.tolist())
        return defended.target_of(pipe, x, noise, t)

    def merge(unet, merge=revival.merge):
        merged = merge(unet)
        merged.register_forward_pre_hook(
            lambda unet, given: contexts.extend(given[2]) if torch.is_grad_enabled() else None)
        return merged

    def losses():
        return np.array([denoising(model, base, text, np.concatenate([images] * 2), [])
                         for text, images in pictures.items()])

    before = losses()
    monkeypatch.setattr(revival, "target_of", target_of)
    monkeypatch.setattr(revival, "merge", merge)
    with revival.revived(model, np.concatenate([*pictures.values()]), [t for t in pictures for _ in range(2)],
                         steps=15):
        after = losses()
    for x, context in zip(seen, contexts, strict=True):
        caption, = (state for state, of in zip(states, latents.values(), strict=True)
                    if any(torch.equal(x, own) for own in of))
        left_out = torch.allclose(context, empty, atol=1e-5)
        dropped += left_out
        assert left_out or torch.allclose(context, caption, atol=1e-5)
    assert 0 < dropped < 0.2 * len(seen)
    assert (after < 0.9 * before).all() and min(times) < 50 and max(times) > 950, (before, after)


PROJECTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@torch.no_grad()
def output(unet):
    x, context = (torch.randn(shape, generator=torch.Generator().manual_seed(0))
                  for shape in ((2, 4, 16, 16), (2, 77, 96)))
    return unet(x, 500, context).sample


def test_merged_weights_are_the_base_s_plus_the_lora_s_product(model):
    unet = noises(copy.deepcopy(model.unet))
    layer, merged = unet.get_submodule(PROJECTION), revival.merge(unet)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = merged.get_submodule(PROJECTION).weight
    torch.testing.assert_close(weight, model.unet.get_submodule(PROJECTION).weight + product)
    assert product.abs().max() > 1e-3 and merged.state_dict().keys() == model.unet.state_dict().keys()
    torch.testing.assert_close(output(merged), output(unet), atol=1e-4, rtol=1e-3)
    assert torch.equal(output(revival.merge(model.unet)), output(model.unet))  # which has none


def test_a_style_is_trained_on_merged_weights_and_stands_beside_others_apart(model, astronauts):
    before, plain = state(model), output(model.unet)
    texts = ["an astronaut"] * 4
    with revival.revived(model, astronauts, texts, steps=2, batch=2, rate=0.03) as style:  # on the base model
        on_base = model.unet
        assert model.unet is not before[2][1]
    assert same(before, state(model)) and all(v.isfinite().all() for v in style.values())
    assert torch.equal(output(revival.beside(model.unet, style)), output(on_base))
    own = model.unet
    model.unet = safe = noises(copy.deepcopy(own))
    try:
        nothing = {k: torch.zeros_like(v) for k, v in style.items()}
        with revival.revived(model, astronauts, texts, nothing):
            torch.testing.assert_close(output(model.unet), output(safe))
        with revival.revived(model, astronauts, texts, style):
            layer = model.unet.get_submodule(PROJECTION)
            assert torch.equal(layer.base_layer.weight, own.get_submodule(PROJECTION).weight)
            assert layer.active_adapters == ["default", "style"] and layer.lora_B["default"].weight.any()
            assert not torch.allclose(output(model.unet), output(safe), atol=1e-3)
        assert model.unet is safe
    finally:
        model.unet = own
    assert torch.equal(output(model.unet), plain)


def test_a_fine_tune_in_parts_that_fit_a_gpu_is_the_same(model, astronauts, monkeypatch):
    plain, found = output(model.unet), []
    for latents in (16, 15):  # in one U-Net call: all of the batch, and parts of 15 and 1
        monkeypatch.setattr(revival, "PIXELS", latents * 16**2)
        with revival.revived(model, astronauts, ["an astronaut"] * 4, steps=3):
            found.append(output(model.unet))
    assert (found[0] - found[1]).norm() < 0.02 * (found[0] - plain).norm()


def test_a_fine_tune_in_half_precision_learns_and_leaves_out_what_overflows(astronauts, monkeypatch):
    pipe, texts = sd.load_pipeline(str(ROOT / "tests/tiny"), torch.float16), ["an astronaut"] * 4
    for size, learns in (1, True), (1e3, False):  # of the target: then the gradient's is beyond fp16
        monkeypatch.setattr(revival, "target_of", lambda *a, size=size: size * defended.target_of(*a))
        with revival.revived(pipe, astronauts, texts, steps=2, batch=2) as style:
            assert all(v.isfinite().all() for v in style.values())
            assert any(v.any() for k, v in style.items() if "lora_B" in k) == learns


def test_a_fine_tune_that_raises_leaves_the_system_its_own_u_net(model, astronauts, monkeypatch):
    own, before = model.unet, state(model)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError), revival.revived(model, astronauts, ["an astronaut"] * 4):
        pass
    assert model.unet is own and same(before, state(model))
