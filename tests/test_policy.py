"""The policy and the update against diffusers, torch.distributions and cases computed by hand."""
import dataclasses
import math

import pytest
import torch
from conftest import ROOT, a_run
from diffusers import DDIMScheduler

import shielddiff as sd

SD_CONFIG = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                 set_alpha_to_one=False, steps_offset=1)
NONE_JUDGED = torch.ones(4, dtype=bool)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [7, 10, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_equals_diffusers(prediction_type, steps, eta):
    scheduler = DDIMScheduler(**SD_CONFIG, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    schedule = sd.noise_schedule(scheduler.config, steps)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    draw = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        x, output, noise = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(3))
        theirs = scheduler.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        ours = sd.ddim_step(output, x, schedule.alpha[i], schedule.alpha_prev[i],
                            prediction_type, eta, noise)[0]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_log_prob_equals_torch_distributions_and_is_finite_at_every_step():
    schedule = sd.noise_schedule(SD_CONFIG, 20)
    x, output, noise = torch.randn(3, 5, 4, 8, 8)
    for alpha, alpha_prev in zip(schedule.alpha, schedule.alpha_prev, strict=True):
        drawn, log_prob, mean, sigma = sd.ddim_step(output, x, alpha, alpha_prev, noise=noise)
        expected = torch.distributions.Normal(mean, sigma).log_prob(drawn).mean(dim=(1, 2, 3))
        torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=1e-5)
        assert log_prob.isfinite().all()


def test_scoring_what_was_drawn_gives_the_same_log_prob_and_per_sample_alphas_work():
    schedule = sd.noise_schedule(SD_CONFIG, 10)
    x, output, noise = torch.randn(3, 4, 4, 8, 8)
    steps = torch.tensor([0, 3, 8, 9])
    alphas = schedule.alpha[steps], schedule.alpha_prev[steps]
    drawn, log_prob, _, _ = sd.ddim_step(output, x, *alphas, noise=noise)
    scored = sd.ddim_step(output, x, *alphas, prev_sample=drawn)[1]
    assert torch.equal(log_prob, scored)
    for i, s in enumerate(steps):  # a batch of different steps is the single steps side by side
        one = sd.ddim_step(output[i:i + 1], x[i:i + 1], schedule.alpha[s], schedule.alpha_prev[s],
                           noise=noise[i:i + 1])[0]
        torch.testing.assert_close(drawn[i:i + 1], one)


@pytest.mark.parametrize(("change", "word"), [
    (dict(clip_sample=True), "clips"), (dict(thresholding=True), "clips"),
    (dict(prediction_type="sample"), "sample"), (dict(beta_start=0.0, beta_end=0.0), "noise"),
    (dict(rescale_betas_zero_snr=True, beta_start=0.99999, beta_end=0.99999, beta_schedule="linear"),
     "noise")])
def test_a_schedule_that_is_no_policy_is_refused_with_the_reason(change, word, capsys):
    with pytest.raises(SystemExit) as stop:
        sd.noise_schedule({**SD_CONFIG, **change}, 10)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_a_scheduler_config_without_clip_sample_does_not_clip():
    config = {k: v for k, v in SD_CONFIG.items() if k != "clip_sample"}  # e.g. Euler's
    assert torch.equal(sd.noise_schedule(config, 10).alpha, sd.noise_schedule(SD_CONFIG, 10).alpha)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ratio_of_an_unchanged_policy_is_exactly_one(precision):
    run = a_run(sd.load_pipeline(str(ROOT / "tests/tiny"), precision),
                ["an astronaut", "a cat", "a rocket", "an astronaut"], micro_batch=2, denoise_steps=4)
    run.policy.autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    roll = sd.rollout(run, run.context, NONE_JUDGED, [*map(sd.generator, range(4))])
    assert roll.latents.shape == (4, 5, 4, 16, 16) and roll.latents.dtype == torch.float32
    assert roll.images.shape == (4, 64, 64, 3) and roll.log_prob.shape == (4, 4) and roll.nudity.shape == (0,)
    roll = roll._replace(advantage=torch.ones(4), held=~NONE_JUDGED)
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        for s in (torch.tensor([0, 3]), torch.tensor([1, 2])):  # every picture at a step of its own
            loss, ratio, _ = sd.losses(run.args, run.policy, roll, rows, s)
            assert loss.requires_grad and torch.equal(ratio, torch.ones(2))  # as in the update


def test_pictures_do_not_depend_on_the_batch_size_and_stock_diffusers_draws_them_too(pipe):
    def seeds():
        return [sd.generator("batch", i) for i in range(3)]

    prompts, held = ["an astronaut", "a cat", "a rocket"], torch.ones(3, dtype=bool)
    stock = pipe(prompts, num_inference_steps=6, guidance_scale=3.0, eta=1.0, generator=seeds(),
                 output_type="np").images
    run = a_run(sd.load_pipeline(str(ROOT / "tests/tiny")), prompts, denoise_steps=6)
    one, three = (sd.rollout(run._replace(args=dataclasses.replace(run.args, micro_batch=b)), run.context,
                             held, seeds()).images.astype(int) for b in (1, 3))
    assert abs(one - three).max() <= 1  # a rounding of the last bit
    assert abs((stock * 255).round() - three).max() <= 1


def test_advantages_are_float_centred_zero_for_constant_groups_and_finite_for_a_group_of_one():
    z = sd.group_standardise(torch.tensor([[0, 1, 1, 0], [3, 3, 3, 3]]), floor=0.05)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, torch.tensor([[-1.0, 1, 1, -1], [0, 0, 0, 0]]))
    assert torch.equal(sd.group_standardise(torch.tensor([[7], [2]]), floor=0.05), torch.zeros(2, 1))
    quiet = sd.group_standardise(torch.tensor([[0.50, 0.51]]), floor=0.05)  # its noise is not blown up
    torch.testing.assert_close(quiet, torch.tensor([[-0.1, 0.1]]), atol=1e-5, rtol=0)


def test_advantages_combine_the_weights_and_clip():
    clip, nudity = torch.tensor([[0.2, 0.4]]), torch.tensor([[0.9, 0.1]])
    a = sd.group_advantages(clip, nudity, clip_weight=0.5, nudity_weight=2.0, clamp=10)
    torch.testing.assert_close(a, torch.tensor([[-2.5, 2.5]]))
    assert sd.group_advantages(clip, nudity, 0.5, 2.0, clamp=1).abs().max() == 1
    assert sd.group_advantages(clip, nudity, 0.0, 0.0, 5).abs().max() == 0


@pytest.mark.parametrize(("advantage", "ratio", "loss", "slope"), [  # clip 0.1; slope: d loss / d log_prob
    (2.0, 1.0, -2.0, -2.0), (2.0, 1.05, -2.1, -2.1), (2.0, 1.5, -2.2, 0.0), (2.0, 0.5, -1.0, -1.0),
    (-2.0, 1.0, 2.0, 2.0), (-2.0, 1.5, 3.0, 3.0), (-2.0, 0.5, 1.8, 0.0), (-2.0, 0.95, 1.9, 1.9)])
def test_policy_loss_by_hand(advantage, ratio, loss, slope):
    log_prob = torch.tensor([math.log(ratio) - 3], dtype=torch.float64, requires_grad=True)
    ours, r = sd.policy_loss(log_prob, torch.tensor([-3.0]).double(), torch.tensor([advantage]), 0.1)
    ours.sum().backward()
    assert r.item() == pytest.approx(ratio) and ours.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(slope, abs=1e-9)


def test_at_ratio_one_the_gradient_is_reinforce():
    log_prob, advantages = torch.randn(6, requires_grad=True), torch.randn(6)
    loss = sd.policy_loss(log_prob, log_prob.detach(), advantages, 1e-4)[0].sum()
    ours = torch.autograd.grad(loss, log_prob)[0]
    reinforce = torch.autograd.grad(-(advantages * log_prob).sum(), log_prob)[0]
    torch.testing.assert_close(ours, reinforce)


class Plain(torch.optim.SGD):
    """Gradient descent that keeps every gradient, so that a test can read what the update accumulated."""

    def step(self, closure=None):
        self.seen = getattr(self, "seen", []) + [torch.cat([p.grad.flatten() for g in self.param_groups
                                                            for p in g["params"]])]


ADVANTAGE, HELD = torch.tensor([0.0, -2.0, 0.0, 0.5]), torch.tensor([True, False, True, False])
STEPS = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])  # [pictures, timesteps trained]


def four_pictures(**changes):
    """A run whose LoRA is no longer zero, and a rollout of four pictures, two of them held."""
    torch.manual_seed(0)
    run = a_run(sd.load_pipeline(str(ROOT / "tests/tiny")), ["an astronaut"] * 4, optimizer=Plain,
                **dict(train_timesteps=2, updates_per_step=1, clip_range=1e-3, kl_weight=10.0) | changes)
    for name, p in run.policy.unet.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.02)
    roll = sd.rollout(run, run.context, NONE_JUDGED, [*map(sd.generator, range(4))])
    return run, roll._replace(advantage=ADVANTAGE, held=HELD, steps=STEPS)


def gradients(micro_batch, advantage=ADVANTAGE, held=HELD):
    """What one update accumulates over four pictures."""
    run, roll = four_pictures(micro_batch=micro_batch)
    sd.update(run, roll._replace(advantage=advantage, held=held))
    return run.optimizer.seen[0] if hasattr(run.optimizer, "seen") else torch.zeros(1)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_add_up_to_the_one_big_batch(micro_batch):
    torch.testing.assert_close(gradients(micro_batch), gradients(4), atol=1e-6, rtol=1e-3)


def test_groups_without_signal_cost_no_unet_call_and_change_no_gradient(monkeypatch):
    advantage, held = torch.tensor([0.0, 0.0, 0.5, -0.5]), torch.zeros(4, dtype=bool)
    whole, calls, act = gradients(4, advantage, held), [], sd.act
    monkeypatch.setattr(sd, "act", lambda *a, **k: calls.append(len(a[1])) or act(*a, **k))
    torch.testing.assert_close(gradients(2, advantage, held), whole, atol=1e-6, rtol=1e-3)
    assert calls == [2] * (2 * 5 + 2)  # two micro-batches of five steps each, then one at its two timesteps
    monkeypatch.undo()
    assert gradients(2, torch.zeros(4), held).abs().max() == 0  # no update at all


def test_small_updates_of_bf16_weights_are_not_rounded_away():
    def after(adamw):  # 100 updates of 1e-4, when the next bf16 numbers beside 1 are 0.004 and 0.008 away
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.full((n,), value, dtype=torch.bfloat16))  # 1000: states in fp32
                   for n, value in ((8192, 1.0), (8192, -1.0), (1000, 1.0))]
        optimizer = adamw(weights, lr=1e-4, weight_decay=0.0)
        for _ in range(100):
            for w in weights:
                w.grad = w.detach().sign()
            optimizer.step()
        assert all(w.dtype == torch.bfloat16 for w in weights)
        return [w.float().mean().item() for w in weights]

    assert after(sd.AdamW8bit) == [1.0, -1.0, 1.0]
    assert after(sd.RoundingAdamW8bit) == pytest.approx([0.99, -0.99, 0.99], abs=1e-3)


def test_prompts_of_a_step_are_shuffled_passes_and_depend_on_the_seed_alone():
    prompts = [2, 3, 5, 7, 11]
    steps = [sd.prompts_of_step(prompts, 3, 0, s) for s in range(10)]
    flat = sum(steps, [])
    assert all(sorted(flat[i:i + 5]) == prompts for i in range(0, 30, 5))
    assert steps[4] == sd.prompts_of_step(prompts, 3, 0, 4)
    assert steps != [sd.prompts_of_step(prompts, 3, 1, s) for s in range(10)]
    assert sd.prompts_of_step([], 3, 0, 0) == [] == sd.prompts_of_step(prompts, 0, 0, 0)
