"""The policy and the update against diffusers, torch.distributions and cases computed by hand."""
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, a_run
from diffusers import DDIMScheduler
from PIL import Image

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
    (dict(trained_betas=[1e-4] * 400 + [0.0] * 200 + [2e-2] * 400), "noise"),  # none in the middle
    (dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "zero terminal SNR"),
    (dict(rescale_betas_zero_snr=True, beta_start=0.99999, beta_end=0.99999, beta_schedule="linear"),
     "noise")])
def test_a_schedule_that_is_no_policy_is_refused_with_the_reason(change, word, capsys):
    with pytest.raises(SystemExit) as stop:
        sd.noise_schedule({**SD_CONFIG, **change}, 10)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_a_model_from_zero_signal_is_refused_so_few_steps_that_none_but_the_last_has_any(capsys):
    config = {**SD_CONFIG, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
              "prediction_type": "v_prediction"}
    with pytest.raises(SystemExit) as stop:
        sd.noise_schedule(config, 2)
    assert stop.value.code == 2 and "signal" in capsys.readouterr().err
    assert math.isfinite(sd.noise_schedule(config, 3).gain)


def test_a_scheduler_config_without_clip_sample_does_not_clip():
    config = {k: v for k, v in SD_CONFIG.items() if k != "clip_sample"}  # e.g. Euler's
    assert torch.equal(sd.noise_schedule(config, 10).alpha, sd.noise_schedule(SD_CONFIG, 10).alpha)


@pytest.mark.parametrize(("precision", "side"), [
    (torch.float32, 16), (torch.bfloat16, 8), (torch.float16, 8)])  # small: on most CPUs these two are slow
def test_the_ratio_of_an_unchanged_policy_is_exactly_one(precision, side):
    pipe = sd.load_pipeline(str(ROOT / "tests/tiny"), precision)
    pipe.unet.register_to_config(sample_size=side)
    run = a_run(pipe, ["an astronaut", "a cat", "a rocket", "an astronaut"], micro_batch=2, denoise_steps=4)
    run.policy.autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    roll = sd.rollout(run, run.context, NONE_JUDGED, [*map(sd.generator, range(4))])
    assert roll.latents.shape == (4, 5, 4, side, side) and roll.latents.dtype == torch.float32
    assert roll.images.shape == (4, 4 * side, 4 * side, 3)
    assert roll.log_prob.shape == (4, 4) and roll.nudity.shape == (0,)
    roll = roll._replace(advantage=torch.ones(4), held=~NONE_JUDGED)
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        for s in (torch.tensor([0, 3]), torch.tensor([1, 2])):  # every picture at a step of its own
            loss, ratio, _ = sd.losses(run.policy, roll, rows, s, clip_range=1e-3, kl_weight=0.0)
            assert loss.requires_grad and torch.equal(ratio, torch.ones(2))  # as in the update


def test_pictures_do_not_depend_on_the_batch_size_and_stock_diffusers_draws_them_too():
    pipe = sd.load_pipeline(str(ROOT / "tests/tiny"))
    pipe.vae.register_to_config(scaling_factor=0.7)  # the embedded one is 1, Stable Diffusion's 0.18
    def seeds():
        return [sd.generator("batch", i) for i in range(3)]

    prompts, held = ["an astronaut", "a cat", "a rocket"], torch.ones(3, dtype=bool)
    stock = pipe(prompts, num_inference_steps=6, guidance_scale=3.0, eta=1.0, generator=seeds(),
                 output_type="np").images
    run = a_run(pipe, prompts, denoise_steps=6)
    one, three = (sd.rollout(run._replace(args=dataclasses.replace(run.args, micro_batch=b)), run.context,
                             held, seeds()).images.astype(int) for b in (1, 3))
    assert abs(one - three).max() <= 1  # a rounding of the last bit
    assert abs((stock * 255).round() - three).max() <= 1 and abs((stock * 255).round() - three).mean() < 0.01


def test_advantages_are_float_centred_zero_for_constant_groups_and_finite_for_a_group_of_one():
    z = sd.group_standardise(torch.tensor([[0, 1, 1, 0], [3, 3, 3, 3]]), floor=0.05)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, torch.tensor([[-1.0, 1, 1, -1], [0, 0, 0, 0]]))
    assert torch.equal(sd.group_standardise(torch.tensor([[7], [2]]), floor=0.05), torch.zeros(2, 1))
    quiet = sd.group_standardise(torch.tensor([[0.50, 0.51]]), floor=0.05)  # its noise is not blown up
    torch.testing.assert_close(quiet, torch.tensor([[-0.1, 0.1]]), atol=1e-5, rtol=0)


def test_advantages_combine_the_weights_and_clip():
    clip, nudity = torch.tensor([[0.2, 0.4]]), torch.tensor([[0.9, 0.1]])
    torch.testing.assert_close(sd.group_advantages(clip, nudity, 1.0, 1.0), torch.tensor([[-2.0, 2.0]]))
    a = sd.group_advantages(clip, nudity, clip_weight=0.5, nudity_weight=2.0, clamp=10)
    torch.testing.assert_close(a, torch.tensor([[-2.5, 2.5]]) / math.sqrt((0.5**2 + 2**2) / 2))
    torch.testing.assert_close(sd.group_advantages(clip, nudity, 0.1, 0.4), a)  # their ratio is what counts
    assert sd.group_advantages(clip, nudity, 0.5, 2.0, clamp=1).abs().max() == 1
    assert sd.group_advantages(clip, nudity, 0.0, 0.0).abs().max() == 0


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
                                                            for p in g["params"]]) / sd.LOSS_SCALE]


D = 4 * 16 * 16  # numbers in a latent of the embedded model
ADVANTAGE, HELD = torch.tensor([0.0, -2.0, 0.0, 0.5]), torch.tensor([True, False, True, False])
STEPS = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])  # [pictures, timesteps trained]


def four_pictures(**changes):
    """A run whose LoRA is no longer zero, and a rollout of four pictures, two of them held."""
    torch.manual_seed(0)
    run = a_run(sd.load_pipeline(str(ROOT / "tests/tiny")), ["an astronaut"] * 4, optimizer=Plain,
                **dict(train_timesteps=2, updates_per_step=1, clip_range=1e-3 * D, kl_weight=10.0) | changes)
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


def a_line(**changes):
    return dict(reward=0.5, signal=0.6, gradient_agreement=0.1, kl_share=0.2, nudity_rate=0.5) | changes


def test_a_run_tells_that_there_is_nothing_to_learn_from_or_that_nothing_was_learned():
    assert sd.what_to_tell([a_line()]) == "" == sd.what_to_tell([dict(skipped="a picture is not finite")])
    for signal in (0.1, 0.5):  # CLIP's scores differ, too
        assert "no picture" in sd.what_to_tell([a_line(signal=signal, nudity_rate=0)])
    assert "every picture" in sd.what_to_tell([a_line(signal=0.29, nudity_rate=1)])
    assert sd.what_to_tell([a_line(signal=0.3, nudity_rate=1)]) == ""  # all show it, some more than others
    assert sd.what_to_tell([a_line(), a_line(signal=0.1, nudity_rate=0)]) == ""  # all gone: that is the aim
    told = sd.what_to_tell([a_line()] * 40)
    assert all(word in told for word in ("0.60", "0.10", "0.20", "--prompts-per-step", "--kl-weight"))
    assert sd.what_to_tell([a_line()] * 39) == "" == sd.what_to_tell([a_line(signal=0.2)] * 40)
    assert sd.what_to_tell([a_line()] * 30 + [a_line(reward=0.52)] * 10) == ""
    assert sd.what_to_tell([a_line(reward=0.1)] * 20 + [a_line()] * 20) != ""  # long ago does not count
    assert sd.what_to_tell([a_line(), dict(skipped="the loss is not finite")] * 10) == ""


def test_prompts_of_a_step_are_shuffled_passes_and_depend_on_the_seed_alone():
    prompts = [2, 3, 5, 7, 11]
    steps = [sd.prompts_of_step(prompts, 3, 0, s) for s in range(10)]
    flat = sum(steps, [])
    assert all(sorted(flat[i:i + 5]) == prompts for i in range(0, 30, 5))
    assert steps[4] == sd.prompts_of_step(prompts, 3, 0, 4)
    assert steps != [sd.prompts_of_step(prompts, 3, 1, s) for s in range(10)]
    assert sd.prompts_of_step([], 3, 0, 0) == [] == sd.prompts_of_step(prompts, 0, 0, 0)


# ------------------------------------------------------------------------------------ the step and its update
def gain_by_hand(scheduler, first=0):
    """The mean over all steps but the last of how far a step moves for 1 more of predicted noise."""
    one = torch.ones(1)
    moves = [scheduler.step(one, t, 0 * one, eta=1.0, variance_noise=0 * one).prev_sample.item()
             for t in scheduler.timesteps[first:-1]]
    return sum(m**2 for m in moves) / len(moves)


@pytest.mark.parametrize(("change", "first"), [
    ({}, 0), (dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 3)])
def test_drift_has_one_unit_predicted_noise_whatever_the_model_predicts(change, first):
    """With the unit of v, 11 times smaller at 8 steps, a model that predicts it was held and did not forget.
    Where there is less signal than Stable Diffusion's 0.0047, noise moves the mean without bound."""
    scheduler = DDIMScheduler.from_config({**SD_CONFIG, **change}, clip_sample=False)
    scheduler.set_timesteps(20)
    config = {**SD_CONFIG, **change, "prediction_type": "v_prediction"}
    assert sd.noise_schedule(config, 20).gain == pytest.approx(gain_by_hand(scheduler, first), rel=1e-4)


def by_hand(run, roll, steps, clip_range):
    """The gradient of one update in other words: U-Net calls of one picture and one branch each, diffusers'
    posterior mean, torch's Normal, and as the frozen policy a U-Net that never had a LoRA."""
    pipe = sd.load_pipeline(str(ROOT / "tests/tiny"))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(run.args.denoise_steps)

    def mean_of(unet, i, s):
        x, t = roll.latents[i:i + 1, s], scheduler.timesteps[s]
        empty, prompted = (unet(x, t, roll.context[b, i:i + 1]).sample for b in (0, 1))
        guided = empty + run.args.guidance_scale * (prompted - empty)
        return scheduler.step(guided, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample

    gain, total = gain_by_hand(scheduler), 0.0
    for i in range(4):
        for s in steps[i]:
            t = int(scheduler.timesteps[s])
            sigma = scheduler._get_variance(t, t - 1000 // run.args.denoise_steps) ** 0.5
            mean, x_prev = mean_of(run.policy.unet, i, s), roll.latents[i:i + 1, s + 1]
            if roll.held[i]:
                with torch.no_grad():
                    before = mean_of(pipe.unet, i, s)
                total = total + run.args.kl_weight * (mean - before).pow(2).mean() / gain
            else:
                ratio = (torch.distributions.Normal(mean, sigma).log_prob(x_prev).mean()
                         - roll.log_prob[i, s]).exp()
                a = roll.advantage[i]
                total = total - min(a * ratio, a * ratio.clamp(1 - clip_range, 1 + clip_range))
    trained = [p for p in run.policy.unet.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total / steps.numel(), trained)])


def same_gradient(seen, expected):
    """Clipped to a norm of 1, and equal up to rounding, which is relative to the largest number."""
    expected = expected / expected.norm().clamp(min=1)
    torch.testing.assert_close(seen, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("size", "kl_weight", "checkpointing"), [
    (5000.0, 10.0, False), (1.0, 10.0, True), (1.0, 0.02, False), (0.0, 1.0, False)])
def test_update_is_the_gradient_of_the_hand_written_loss_clipped_to_norm_1(size, kl_weight, checkpointing):
    run, roll = four_pictures(kl_weight=kl_weight)
    if checkpointing:  # what the backward pass computes again has to have the LoRA, whatever came between
        run.policy.unet.enable_gradient_checkpointing()
    roll = roll._replace(advantage=ADVANTAGE * size)
    expected = by_hand(run, roll, STEPS, clip_range=math.inf)
    learned = sd.update(run, roll)
    norm = expected.norm()
    assert (norm > 1) == (size == 5000)  # both sides of the clipping are tried
    same_gradient(run.optimizer.seen[0], expected)
    assert learned["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_the_optimizer_s_units_stay_when_the_loss_scale_falls():
    run, roll = four_pictures()
    for scale in (sd.LOSS_SCALE, 2.0**8):
        run.optimizer.param_groups[0]["loss_scale"] = scale
        sd.update(run, roll)
    assert torch.equal(*run.optimizer.seen) and run.optimizer.seen[0].any()


def test_updates_after_the_first_are_clipped_and_each_has_its_share_of_the_steps():
    run, roll = four_pictures(updates_per_step=2, kl_weight=0.1)
    log_prob = roll.log_prob.clone()  # pictures 1 and 3 have left the clip range by the second update
    log_prob[1, 0] += 0.01
    log_prob[3, 1] -= 0.01
    for moved in (log_prob, 2 * roll.log_prob - log_prob):  # in the directions that are clipped, and not
        roll = roll._replace(log_prob=moved)
        run.optimizer.seen = []
        learned = sd.update(run, roll)
        for seen, steps, clip_range in zip(run.optimizer.seen, STEPS.split(1, dim=1), (math.inf, 1e-3),
                                           strict=True):
            expected = by_hand(run, roll, steps, clip_range)
            same_gradient(seen, expected)
        assert learned["ratio_max_dev"] < 1e-6 and learned["clip_fraction"] == 0.5


def test_the_shares_of_the_gradient_are_those_of_pulled_and_judged_pictures():
    def alone(*which, kl_weight=0.0):  # every 16th number of each weight's gradient
        run, roll = four_pictures(kl_weight=kl_weight)
        sd.update(run, roll._replace(advantage=ADVANTAGE * torch.tensor(which)))
        sizes = [p.numel() for p in run.policy.unet.parameters() if p.requires_grad]
        return torch.cat([g[::16] for g in run.optimizer.seen[0].split(sizes)])

    pull, first, second = alone(0, 0, 0, 0, kl_weight=10.0), alone(0, 1, 0, 0), alone(0, 0, 0, 1)
    pushed, pulled = (first + second).norm().item(), pull.norm().item()
    run, roll = four_pictures(micro_batch=1)
    learned = sd.update(run, roll)
    assert learned["kl_share"] == pytest.approx(pulled / (pulled + pushed), rel=1e-3)
    agreement = torch.cosine_similarity(first, second, dim=0).item()
    assert learned["gradient_agreement"] == pytest.approx(agreement, abs=1e-3)
    assert 0.01 < learned["kl_share"] < 0.99 and abs(agreement) < 0.99
    run, roll = four_pictures(micro_batch=4)  # one batch of both kinds cannot tell
    learned = sd.update(run, roll)
    assert math.isnan(learned["gradient_agreement"]) and math.isnan(learned["kl_share"])


@pytest.mark.parametrize("off", [0.01, -0.01])
def test_the_self_check_sees_both_sides_and_is_fatal_only_where_clipping_acts(off, capsys):
    run, roll = four_pictures()
    roll = roll._replace(log_prob=roll.log_prob + off)
    assert sd.update(run, roll)["ratio_max_dev"] == pytest.approx(0.01, rel=0.01)
    args = dataclasses.replace(run.args, updates_per_step=2)
    with pytest.raises(SystemExit) as stop:
        sd.update(run._replace(args=args), roll)
    assert stop.value.code == 1 and "off by 1.0e-02" in capsys.readouterr().err
    sd.update(run._replace(args=dataclasses.replace(args, clip_range=0.02 * D)), roll)


@pytest.mark.parametrize("whole", [False, True])
def test_the_frozen_policy_is_the_one_before_training_without_a_gradient_and_only_inside(whole, pipe):
    run, roll = four_pictures()
    policy, x, s, context = run.policy, roll.latents[:, 0], torch.arange(4), roll.context
    plain = sd.Policy(sd.load_pipeline(str(ROOT / "tests/tiny")).unet, policy.schedule, policy.guidance_scale,
                      policy.autocast)
    if whole:
        policy.before = plain.unet
    expected, now = (sd.act(p, x, s, context, x_prev=x)[2] for p in (plain, policy))
    with policy.frozen() as before:
        frozen = sd.act(before, x, s, context, x_prev=x)[2]
    torch.testing.assert_close(frozen, expected)
    assert not frozen.requires_grad and (now - frozen).abs().max() > 1e-3
    after = sd.act(policy, x, s, context, x_prev=x)[2]
    assert after.requires_grad and torch.equal(after, now)


def test_the_drift_is_that_of_the_held_pictures_and_the_kl_of_the_others():
    run, roll = four_pictures()
    learned = sd.update(run, roll)
    plain = sd.Policy(sd.load_pipeline(str(ROOT / "tests/tiny")).unet, run.policy.schedule, 3.0,
                      run.policy.autocast)
    drift = []
    for i in (0, 2):
        for s in STEPS[i]:
            x, context, s = roll.latents[i:i + 1, s], roll.context[:, i:i + 1], s[None]
            means = [sd.act(p, x, s, context, x_prev=x)[2] for p in (run.policy, plain)]
            drift.append((means[0] - means[1]).square().mean() / run.policy.schedule.gain)
    assert learned["drift"] == pytest.approx(torch.stack(drift).mean().item(), rel=1e-3) != 0


@pytest.mark.parametrize(("denoise_steps", "train_until", "n"), [
    (20, 0.6, 12), (8, 0.5, 4), (8, 1.0, 7), (10, 0.05, 1), (50, 0.58, 29), (3, 0.34, 2)])
def test_how_many_steps_are_rewarded(denoise_steps, train_until, n):
    assert sd.trainable(sd.Args(denoise_steps=denoise_steps, train_until=train_until)) == n


def test_a_step_samples_judges_and_hands_the_update_what_it_should_learn_from(monkeypatch):
    """Everything but the update, of which there are tests above, with the real NudeNet and CLIP."""
    pairs = [("a smiling astronaut", "an astronaut", True), ("a cat", "a cat", False),
             ("the face of an astronaut", "a woman astronaut", True), ("coins", "coins", False)]
    args = sd.parse_args("--model tests/tiny --denoise-steps 4 --prompts-per-step 2 --group-size 3 "
                         "--held-per-step 3 --train-timesteps 2 --updates-per-step 1 --micro-batch 4 "
                         "--nudity-weight 0.7 --clip-weight 1.3 --left-out 0.6 --seed 5".split())
    run = sd.set_up(args, {"prompts": pairs}, "cpu")
    assert run.eliciting == [0, 2] and run.benign == [1, 3]
    rolls, lines = [], []
    monkeypatch.setattr(sd, "sized_update",
                        lambda run, roll, signal: rolls.append(roll) or dict(signal=signal))
    for step in range(4):
        lines.append(sd.policy_gradient_step(run, step))
    roll, line = rolls[0], lines[0]
    chosen, benign = sd.prompts_of_step([0, 2], 2, 5, 0), sd.prompts_of_step([1, 3], 3, 5, 0)
    index = [chosen[0]] * 3 + [chosen[1]] * 3 + benign
    assert torch.equal(roll.context[0], run.context[0, index])
    assert torch.equal(roll.context[:, 6:], run.context[:, benign])
    assert torch.equal(run.context, sd.encode_prompts(sd.load_pipeline(args.model), [p for p, _, _ in pairs]))
    assert roll.held.tolist() == [False] * 6 + [True] * 3
    gens = [sd.generator(5, "rollout", 0, i) for i in range(9)]
    assert (roll.images == sd.rollout(run, roll.context, roll.held, gens).images).all()

    nudity = sd.nudity_scores(sd.load_nudenet(), roll.images[:6], args.labels)
    clip, processor = sd.load_clip(args.clip_model)
    captions = sd.caption_features(clip, processor, [pairs[i][1] for i in index[:6]])
    meaning = (sd.image_features(clip, processor, roll.images[:6]) * captions).sum(dim=1)
    expected = sd.group_advantages(meaning.view(2, 3), nudity.view(2, 3), 1.3, 0.7).flatten()
    torch.testing.assert_close(roll.nudity, nudity, atol=1e-5, rtol=0)
    torch.testing.assert_close(roll.advantage, torch.cat([expected, torch.zeros(3)]), atol=1e-3, rtol=1e-3)
    assert line["nudity_score"] == pytest.approx(nudity.mean().item(), abs=1e-5)
    assert line["nudity_rate"] == pytest.approx((nudity > 0.25).float().mean().item())
    assert line["clip_score"] == pytest.approx(meaning.mean().item(), abs=1e-4)
    assert line["reward"] == pytest.approx((1.3 * meaning - 0.7 * nudity).mean().item(), abs=1e-4)
    meaning, nudity = (scores.view(2, 3).double().numpy() for scores in (meaning, nudity))  # [P, K] each
    z = [(x - x.mean(axis=1, keepdims=True)) / np.maximum(x.std(axis=1, keepdims=True), floor)
         for x, floor in ((meaning, 0.12 * meaning.mean()), (nudity, 0.16))]
    squares = (1.3 * z[0] - 0.7 * z[1]) ** 2 / ((1.3**2 + 0.7**2) / 2)  # [P, K]
    assert line["signal"] == pytest.approx(np.minimum(squares.mean(axis=1), 1).mean(), rel=1e-2)
    assert line["step"] == 0 and run.policy.guidance_scale == 2.0

    shares = []  # of a prompt that elicits: its group's text lies at some share of the way to it from no text
    for step, r in enumerate(rolls):
        way = run.context[1, sd.prompts_of_step([0, 2], 2, 5, step)] - run.context[0, 0]  # [2, 77, d]
        went = r.context[1, :6].view(2, 3, *way.shape[1:]) - run.context[0, 0]  # [2, 3, 77, d]
        shares.append((went[:, 0] * way).sum(dim=(1, 2)) / way.square().sum(dim=(1, 2)))  # [2]
        torch.testing.assert_close(went, (shares[-1][:, None, None] * way)[:, None].expand_as(went))
    shares = torch.cat(shares)
    assert ((0.4 < shares) & (shares < 1)).all() and shares.min() < 0.6 and len(shares.unique()) == 8
    sd.policy_gradient_step(run._replace(args=dataclasses.replace(args, left_out=0.0)), 0)
    assert torch.equal(rolls.pop().context, run.context[:, index])

    steps = torch.stack([r.steps for r in rolls])  # [4, 9, 2]: 2 of the 4 steps are rewarded, the last never
    assert steps.shape == (4, 9, 2) and (steps[..., 0] != steps[..., 1]).all()
    assert [set(part.flatten().tolist()) for part in (steps[:, :6], steps[:, 6:])] == [{0, 1}, {0, 1, 2}]
    assert len({tuple(r.steps.flatten().tolist()) for r in rolls}) == 4  # anew in every step


def test_the_floor_of_the_clip_term_is_relative_and_that_of_the_nudity_term_is_not():
    nearly, none = torch.tensor([[0.201, 0.199]]), torch.zeros(1, 2)
    for scale in (1.0, 3.0):  # the deviation is 0.5 % of the mean: under the floor of 6 %
        a = sd.group_advantages(scale * nearly, none, 1.0, 1.0)
        torch.testing.assert_close(a, torch.tensor([[0.5, -0.5]]) / 6, atol=1e-4, rtol=0)
        a = sd.group_advantages(torch.ones(1, 2), scale * nearly, 1.0, 1.0)
        torch.testing.assert_close(a, torch.tensor([[-0.001, 0.001]]) * scale / 0.08, atol=1e-4, rtol=0)
    assert sd.group_advantages(torch.tensor([[9.0] + [0.0] * 99]), torch.zeros(1, 100), 1.0, 0.0).max() == 5


class Shifted(torch.nn.Module):
    """A U-Net whose output is larger by a constant, in both branches and so in the guided one."""

    def __init__(self, unet, by):
        super().__init__()
        self.unet, self.by, self.config, self.device = unet, by, unet.config, unet.device

    def forward(self, *arguments):
        return SimpleNamespace(sample=self.unet(*arguments).sample + self.by)


def closed_form(run, by):
    """The KL of all rewarded steps between a policy and its shifted twin: D (g by)^2 / (2 sigma^2) each."""
    schedule = run.policy.schedule
    one = torch.ones(len(schedule.alpha), 1, 1, 1)
    alphas = schedule.alpha, schedule.alpha_prev
    move = [sd.ddim_step(by * k * one, 0 * one, *alphas, noise=0)[2] for k in (0, 1)]
    sigma = sd.ddim_sigma(schedule.alpha, schedule.alpha_prev)
    return (D * (move[1] - move[0]).flatten() ** 2 / (2 * sigma**2))[:sd.trainable(run.args)].sum().item()


@pytest.fixture(scope="module")
def forty_pictures():
    torch.manual_seed(0)  # for the LoRA: how far a long push goes depends on it
    run = a_run(sd.load_pipeline(str(ROOT / "tests/tiny")), ["an astronaut"] * 40, denoise_steps=6,
                micro_batch=20, train_until=0.5)
    roll = sd.rollout(run, run.context, torch.ones(40, dtype=bool), [*map(sd.generator, range(40))])
    return run, roll._replace(held=torch.arange(40) >= 36, advantage=torch.zeros(40))


def nats_between(run, roll, start):
    """What sized_update makes of two sets of means, for one step of every other rewarded picture."""
    kl = (sd.exact_means(run, roll) - start).square().sum(dim=(1, 2, 3))  # [n]
    return kl.mean().item() * sd.trainable(run.args)


@pytest.mark.parametrize("by", [0.005, 0.02])
def test_the_nats_of_a_policy_shifted_by_a_known_amount(by, forty_pictures):
    """Each of the 3 rewarded steps; against the closed form and torch's own KL of two Gaussians."""
    run, roll = forty_pictures
    moved = run._replace(policy=dataclasses.replace(run.policy, unet=Shifted(run.policy.unet, by)))
    measured, by_torch = [], 0.0
    for s in range(3):
        one = roll._replace(steps=torch.full((40, 1), s))
        start = sd.exact_means(run, one)
        assert start.shape == (18, 4, 16, 16)  # every other one of the 36 that are not held
        measured.append(nats_between(moved, one, start))
        sigma = sd.ddim_sigma(run.policy.schedule.alpha, run.policy.schedule.alpha_prev)[s]
        old, new = (torch.distributions.Normal(2**0.5 * sigma * sd.exact_means(r, one), sigma)
                    for r in (run, moved))
        by_torch += torch.distributions.kl_divergence(old, new).sum(dim=(1, 2, 3)).mean().item()
        assert nats_between(run, one, start) == 0
    assert np.mean(measured) == pytest.approx(closed_form(run, by), rel=1e-3)
    assert np.mean(measured) == pytest.approx(by_torch, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nats_are_measured_in_fp32_whatever_the_precision_of_weights_and_arithmetic(dtype, monkeypatch):
    """A change too small for bf16's activations has the nats that it has in fp32; no weight is changed."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    pipe = sd.load_pipeline(str(ROOT / "tests/tiny"), dtype)
    run = a_run(pipe, ["an astronaut"] * 4, denoise_steps=4, train_until=0.5)
    policy = dataclasses.replace(run.policy, autocast=torch.autocast("cpu", dtype))
    run = run._replace(policy=policy)
    noise = torch.randn(4, 5, 4, 16, 16)  # as what the first steps see: to draw is slow in half precision
    roll = sd.Rollout(context=run.context, held=torch.zeros(4, dtype=bool), latents=noise, log_prob=None,
                      images=None, nudity=None, steps=torch.tensor([[0], [0], [1], [1]]))
    frozen = {n: p.detach().clone() for n, p in pipe.unet.named_parameters() if not p.requires_grad}
    nats, cudnn = [], set()
    pipe.unet.register_forward_pre_hook(lambda *_: cudnn.add(torch.backends.cudnn.enabled))
    for size in (1e-3, 2e-3):
        for n, p in pipe.unet.named_parameters():
            p.data = p.data * 0 if "lora_B" in n else p.data
        start = sd.exact_means(run, roll)
        for n, p in pipe.unet.named_parameters():
            if "lora_B" in n:
                p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        nats.append(nats_between(run, roll, start))
    assert 0 < nats[0] < 0.2 and nats[1] == pytest.approx(4 * nats[0], rel=0.02)
    assert all(torch.equal(p, frozen[n]) and p.dtype == dtype
               for n, p in pipe.unet.named_parameters() if n in frozen)
    assert cudnn == {False} and torch.backends.cudnn.enabled  # which takes tens of GB for it, if it is there


def test_nats_hardly_depend_on_the_number_of_denoising_steps():
    """The same change of the U-Net in 8, 20 and 50 steps: the sum over a trajectory converges."""
    run, _ = four_pictures()
    totals = []
    for steps in (8, 20, 50):
        args = dataclasses.replace(run.args, denoise_steps=steps, train_until=0.5)
        schedule = sd.noise_schedule(sd.load_pipeline(str(ROOT / "tests/tiny")).scheduler.config, steps)
        totals.append(closed_form(run._replace(args=args, policy=dataclasses.replace(
            run.policy, schedule=schedule)), 0.01))
    assert totals[2] < totals[1] < 1.2 * totals[2] and totals[1] < totals[0] < 1.75 * totals[2], totals


@pytest.mark.parametrize(("push", "signal"), [(0.3, 1.0), (0.3, 0.1), (0.3, 0.0), (0.03, 1.0), (1e-3, 1.0),
                                              (1e-6, 1.0)])
def test_a_step_is_as_long_as_wanted_whatever_the_updates_did_and_the_rate_follows(
        push, signal, forty_pictures, monkeypatch):
    run, roll = forty_pictures
    roll, group = roll._replace(steps=torch.arange(40)[:, None] % 3), run.optimizer.param_groups[0]
    group["rate"] = 1.0
    before, start = [p.detach().clone() for p in group["params"]], sd.exact_means(run, roll)
    noise = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in before]

    def far(run, roll):
        assert group["lr"] == pytest.approx(signal**0.5)
        for p, n in zip(group["params"], noise, strict=True):
            p.data += push * n
        return {}

    monkeypatch.setattr(sd, "update", far)
    line = sd.sized_update(run, roll, signal)
    wanted = run.args.step_nats * signal
    assert line["nats"] == pytest.approx(nats_between(run, roll, start), abs=1e-9)
    share = [((p - b) / (push * n)).median().item()
             for p, b, n in zip(group["params"], before, noise, strict=True)]
    assert np.std(share) < 1e-2 * max(share[0], 1)  # all of it along the line that the updates took
    if push > 1e-6:
        assert line["nats"] <= 1.5 * wanted + 1e-6 and (share[0] < 1e-5) == (signal == 0)
        assert line["nats"] >= wanted / 2.5 or push in (0.03, 1e-3)  # stretched too far, then back too far
    else:  # three times eightfold is as far as it goes at once
        assert share[0] == pytest.approx(512, rel=1e-2) and line["nats"] < wanted / 1.5
    factor = math.sqrt(wanted / line["nats_before_sizing"])
    assert group["rate"] == pytest.approx({0.3: 0.05, 0.03: min(max(factor, 0.05), 2.5)}.get(push, 2.5))
    for p, b in zip(group["params"], before, strict=True):
        p.data.copy_(b)


def test_a_step_that_moved_beyond_all_numbers_is_brought_back_and_not_to_nothing(forty_pictures, monkeypatch):
    run, roll = forty_pictures
    group, true_means, calls = run.optimizer.param_groups[0], sd.exact_means, []
    before = [p.detach().clone() for p in group["params"]]

    def far(run, roll):
        for p in group["params"]:
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        return {}

    monkeypatch.setattr(sd, "update", far)
    monkeypatch.setattr(sd, "exact_means", lambda *a: true_means(*a) * (
        torch.nan if calls.append(0) or len(calls) == 2 else 1))
    line = sd.sized_update(run, roll._replace(steps=torch.arange(40)[:, None] % 3), 1.0)
    assert line["nats_before_sizing"] > 1e30 and 0.01 < line["nats"] < 3
    for p, b in zip(group["params"], before, strict=True):
        p.data.copy_(b)


def test_a_step_without_signal_moves_nothing_and_keeps_the_rate(forty_pictures, monkeypatch):
    run, roll = forty_pictures
    group, measured = run.optimizer.param_groups[0], []
    group["rate"] = 1.0
    monkeypatch.setattr(sd, "update", lambda run, roll: {"lr": measured.append(group["lr"])})
    sd.sized_update(run, roll._replace(steps=torch.arange(40)[:, None] % 3), 0.0)
    assert group["rate"] == 1.0 and measured == [0.0]


def test_a_picture_that_is_not_finite_is_refused_and_not_drawn_black(monkeypatch):
    run, roll = four_pictures()
    decode = run.vae.decode
    monkeypatch.setattr(run.vae, "decode", lambda x: SimpleNamespace(sample=decode(x).sample / 0))
    with pytest.raises(FloatingPointError, match="a picture is not finite"):
        sd.rollout(run, roll.context, NONE_JUDGED, [*map(sd.generator, range(4))])


def test_thousands_of_prompts_go_through_the_text_encoders_in_parts(monkeypatch):
    prompts, sizes, pipe = [f"a cat {i}" for i in range(300)], [], sd.load_pipeline(str(ROOT / "tests/tiny"))

    def recorded(function):
        return lambda *arguments: (sizes.append(len(arguments[-1])), function(*arguments))[1]

    for name in ("encode_prompts", "caption_features"):
        monkeypatch.setattr(sd, name, recorded(getattr(sd, name)))
    pairs = [(prompt, prompt, True) for prompt in prompts]
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    run = sd.set_up(sd.parse_args(["--model", "tests/tiny"]), {"prompts": pairs}, "cpu")
    assert not torch.backends.cudnn.enabled  # in fp32
    assert sizes == [128, 128, 44] * 2
    for i in (0, 128, 299):  # in their order
        torch.testing.assert_close(run.context[:, i:i + 1], sd.encode_prompts(pipe, prompts[i:i + 1]))
        torch.testing.assert_close(run.captions[i], sd.caption_features(*run.clip, prompts[i:i + 1])[0])


def test_samples_are_pixelated_unless_the_model_is_ours_or_the_user_says_so(tmp_path, monkeypatch):
    run = a_run(sd.load_pipeline(str(ROOT / "tests/tiny")), ["an astronaut"], denoise_steps=2)
    run = run._replace(settings={"prompts": [("an astronaut", "an astronaut", False)]})
    monkeypatch.setattr(sd, "nudity_scores", lambda session, images, labels: torch.ones(len(images)))
    for i, (model, labels, uncensored, hidden) in enumerate([
            ("x/y", sd.NUDITY, False, True), ("x/y", sd.NUDITY, True, False),
            ("x/y", ("FACE_FEMALE",), False, True), (ROOT / "tests/../tests/tiny", sd.NUDITY, False, False)]):
        args = dataclasses.replace(run.args, model=str(model), labels=labels, show_uncensored=uncensored)
        (tmp_path / str(i)).mkdir()
        sd.draw(run._replace(args=args), [], tmp_path / str(i))
        tiles = np.asarray(Image.open(tmp_path / str(i) / "samples.png")).reshape(8, 8, 8, 8, 3)
        assert (tiles == tiles[:, :1, :, :1]).all() == hidden  # an eighth of the picture in one colour
