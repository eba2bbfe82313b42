"""SD 1.5 at 512 px on paper: bench.py's fake tensors have shapes and types, no numbers. And DDPO's arm."""
import numpy as np
import pytest
from bench import ARMS, faithful_ddpo, on_paper
from conftest import metrics

import shielddiff as sd


def test_the_default_lora_run_fits_5_gb_on_paper():
    args = sd.Args()
    assert on_paper(args.lora_rank, args.precision, args.gradient_checkpointing, args.micro_batch,
                    args.optimizer_8bit)["total"] < 4.5  # GiB


def test_the_whole_unet_with_8_bit_adam_fits_12_gb_on_paper():
    assert on_paper(lora_rank=0, micro_batch=1)["total"] < 12


def test_the_faithful_arm_has_the_reward_of_ddpo_and_its_constant_rate(monkeypatch, tmp_path):
    arm = ARMS["faithful DDPO"] | dict(denoise_steps=3, train_timesteps=2, updates_per_step=2,
                                       prompts_per_step=2, group_size=2, micro_batch=4)
    for name, theirs in faithful_ddpo().items():
        monkeypatch.setattr(sd, name, theirs)
    sd.train(sd.Args(**sd.TINY | arm | dict(steps=2, out=str(tmp_path / "ddpo"))))
    lines = metrics(tmp_path / "ddpo")
    assert [line["signal"] for line in lines] == [1, 1] and all(line["grad_norm"] > 0 for line in lines)
    scores, nudity = np.array([[0.9, 0.8], [0.7, 0.7]]), np.array([[1.0, 0.0], [0.0, 0.0]])
    rewards = scores - nudity  # no buffer of a prompt is full yet: normalised by the batch
    found = sd.group_advantages(*map(sd.torch.tensor, (scores, nudity)), 1.0, 1.0)
    assert found.numpy() == pytest.approx((rewards - rewards.mean()) / rewards.std(ddof=1))
