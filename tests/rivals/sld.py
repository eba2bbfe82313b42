"""Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105): a third noise estimate, that of
the concept to avoid, is subtracted from the prompt's, where and as much as the two are alike.

    python eval.py --method sld-medium sld-max --concept "nudity, naked, nude"

Exact: the guidance (eq. 3 to 8) equals, step by step, that of diffusers' StableDiffusionPipelineSafe, by the
authors; the four presets are theirs (weak's scale the paper's, 200, not their code's, 20). Ours: the concept
is --concept and not the authors' longer list; their warm-up of 15, 10, 7 or 0 steps is one of 50, so it is
scaled to the steps taken; image-to-image, which is not in the paper, counts the steps it takes; of a model
that predicts v the differences are made those of noise.
"""
import functools
from contextlib import contextmanager
from typing import NamedTuple

import torch

DIFFERS = ("--concept instead of the authors' list of concepts; the warm-up, a number of 50 steps, scaled to "
           "the steps taken; also image-to-image; where v is predicted, its differences are made noise's")


class Preset(NamedTuple):
    warmup: int  # steps of 50 without any effect
    scale: float
    threshold: float
    momentum_scale: float
    beta: float  # of the momentum's moving average


PRESETS = {"sld-weak": Preset(15, 200, 0.0, 0.0, 0.0), "sld-medium": Preset(10, 1000, 0.01, 0.3, 0.4),
           "sld-strong": Preset(7, 2000, 0.025, 0.5, 0.7), "sld-max": Preset(0, 5000, 1.0, 0.5, 0.7)}


class Guidance:
    """A forward hook of the U-Net that adds the third noise estimate to guided sampling, for one draw.

    context [1, 77, d]: the concept to avoid. Whatever is subtracted from the prompt's half of the output is
    multiplied by the guidance scale with the rest.
    """

    def __init__(self, context: torch.Tensor, preset: Preset, steps: int, scheduler):
        self.context, self.preset, self.steps = context, preset, steps
        self.alpha = scheduler.alphas_cumprod if scheduler.config.prediction_type == "v_prediction" else None
        self.taken, self.momentum = 0, 0.0

    def __call__(self, unet, arguments, keywords, output):
        p = self.preset
        unconditional, text = output[0].chunk(2)  # [b, 4, h, w] each
        # `forward`, not the call: the call would run this hook again
        concept = unet.forward(arguments[0].chunk(2)[0], arguments[1], return_dict=False,
                               encoder_hidden_states=self.context.expand(len(text), -1, -1))[0]
        # two v differ by what two noises do over sqrt(alpha), and the presets are for noise
        unit = 1.0 if self.alpha is None else self.alpha[int(arguments[1])].sqrt().clamp(min=1e-3).item()
        unconditional, text, concept = (x * unit for x in (unconditional, text, concept))
        strength = ((text - concept).abs() * p.scale).clamp(max=1).masked_fill(
            text - concept >= p.threshold, 0)
        avoid = (concept - unconditional) * strength + p.momentum_scale * self.momentum
        self.momentum = p.beta * self.momentum + (1 - p.beta) * avoid
        self.taken += 1
        if self.taken > p.warmup * self.steps / 50:
            text = text - avoid
        return torch.cat([unconditional, text]) / unit, *output[1:]


@contextmanager
def sld(pipe, spec, stock, preset: Preset):
    """A method (see README.md in this folder): every draw with its own Guidance around the stock one."""
    context = pipe.encode_prompt(spec.concept, pipe.device, 1, False)[0]

    def draw(call):
        if call["guidance_scale"] <= 1:  # without guidance there is nothing to steer
            return stock(call)
        steps = call.get("num_inference_steps", spec.steps)
        guidance = Guidance(context, preset, steps, pipe.scheduler)
        hook = pipe.unet.register_forward_hook(guidance, with_kwargs=True)
        try:
            return stock(call)
        finally:
            hook.remove()

    yield draw


weak, medium, strong, maximum = (functools.partial(sld, preset=p) for p in PRESETS.values())
