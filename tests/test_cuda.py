"""What runs on a GPU, run where there is none: tensors on the CPU that say they are on one.

The numbers are the CPU's. What is checked is where tensors are: an operation on tensors of both places, an
index on the GPU into a tensor on the host, and NumPy of what is on the GPU raise, as they do there. Not seen:
what happens inside an operator or in a backward pass, half precision, 8-bit Adam, xformers: for these there
are, where there is a GPU, the last two tests, in processes that see it.
"""
import functools
import importlib
import json
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import GPUS, ROOT, SMALL, cli, metrics, train
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import eval as ev
import shielddiff as sd

T = torch.Tensor
MAY_MIX = (torch.autograd.grad, T.copy_, torch._foreach_copy_, T.data.__set__,
           torch._has_compatible_shallow_copy_type)
MOVE = {T.cpu: ("cpu",), T.cuda: ("cuda",), T.half: (torch.float16,), T.float: (torch.float32,)}


class PretendCuda(TorchFunctionMode):
    """For as long as it lasts torch.cuda is available, and .to("cuda") moves a tensor in name."""

    def __enter__(self):
        self.gpu = WeakIdKeyDictionary()  # the tensors that are there
        cuda = dict(is_available=lambda: True, get_device_name=lambda: "a GPU",
                    is_current_stream_capturing=lambda: False)
        self.patches = [mock.patch.multiple("torch.cuda", **cuda),
                        mock.patch.object(torch.nn.Parameter, "__deepcopy__", lambda *a: self.copied(*a))]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == T.device.__get__:
            return torch.device("cuda:0") if args[0] in self.gpu else function(*args)
        if function == T.is_cuda.__get__:
            return args[0] in self.gpu
        if function == T.to or function in MOVE:
            result = self.moved(args[0], MOVE.get(function, (*args[1:], *kwargs.values())))
            return function(*args, **kwargs) if result is None else result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, T)]
        places = {t in self.gpu for t in tensors}
        if function in (T.numpy, T.__array__) and True in places:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function == T.__getitem__:
            if args[0] not in self.gpu and any(t in self.gpu and t.dim() for t in tensors):
                raise RuntimeError("indices should be on cpu, as the indexed tensor")
        elif len(places) > 1 and function not in MAY_MIX and (  # a number on the host may meet the GPU
                function in (torch.cat, torch.stack) or any(t.dim() for t in tensors if t not in self.gpu)):
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, cuda:0 and cpu")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is torch.autograd.grad:  # each where its own tensor is
            for gradient, tensor in zip(result, args[1] if isinstance(args[1], (tuple, list)) else args[1:2],
                                        strict=True):
                self.put(gradient, tensor in self.gpu)
            return result
        if function == T.data.__set__:
            self.put(args[0], args[1] in self.gpu)
        there = args[0] in self.gpu if function == T.__getitem__ else True in places
        for leaf in tree_leaves(result):
            if isinstance(leaf, T) and not any(leaf is t for t in tensors):
                self.put(leaf, there if device is None else torch.device(device).type == "cuda")
        return result

    def copied(self, parameter, memo):
        if id(parameter) not in memo:
            memo[id(parameter)] = torch.nn.Parameter(parameter.data.clone(), parameter.requires_grad)
            self.put(memo[id(parameter)], parameter in self.gpu)
        return memo[id(parameter)]

    def put(self, tensor, there: bool):
        if there:
            self.gpu[tensor] = True
        else:
            self.gpu.pop(tensor, None)

    def moved(self, tensor, to) -> torch.Tensor | None:
        """tensor.to(*to), where a device, a dtype or a tensor may be named; None where no GPU is in it."""
        there, dtype = tensor in self.gpu, tensor.dtype
        for what in to:
            if isinstance(what, T):
                there, dtype = what in self.gpu, what.dtype
            elif isinstance(what, torch.dtype):
                dtype = what
            elif isinstance(what, (str, torch.device)):
                there = torch.device(what).type == "cuda"
        if not there and tensor not in self.gpu:
            return None
        result = tensor.type(dtype)
        if there != (tensor in self.gpu) and result is tensor:
            result = tensor.clone()
        self.put(result, there)
        return result


@pytest.fixture
def gpu():
    with PretendCuda() as mode:
        yield mode


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu):
    there, here, number = torch.arange(3).to("cuda"), torch.arange(3), torch.tensor(2)
    assert there.device.type == (there + number).device.type == there[here].device.type == "cuda"
    assert there.cpu().device.type == (there.cpu() + here).device.type == here.device.type == "cpu"
    assert torch.zeros(2, device="cuda").is_cuda and not torch.zeros(2).is_cuda
    assert torch.equal((there * number).cpu(), torch.tensor([0, 2, 4]))
    for wrong in (lambda: there + here, lambda: here[there], lambda: torch.stack([there[0], number]),
                  lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="cpu"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize("flags", [("--gradient-checkpointing",), ("--lora-rank", 0, "--kl-weight", 1)])
def test_a_run_and_its_resume(flags, gpu, tmp_path):
    flags = (*SMALL, *flags, "--no-optimizer-8bit", "--out", tmp_path / "out")  # its kernels are CUDA's
    train(*flags, "--steps", 1)
    train(*flags, "--steps", 2, "--resume")


@pytest.mark.parametrize("rival", ["duo", "esd", "safegen", "sdd", "uce"])
def test_the_trained_rivals(rival, gpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(sd.HERE / "tests/rivals"))
    module, training = importlib.import_module(rival), importlib.import_module("training")
    flags = {"uce": (), "esd": ("--steps", "1", "--denoise-steps", "2"), "sdd": ("--steps", "1")}.get(
        rival, ("--steps", "1", "--pictures", "2", "--batch-size", "2", "--denoise-steps", "8"))
    training.run(module.train, module.Args, module.TINY if hasattr(module, "TINY") else training.TINY,
                 ["--model", "tests/tiny", "--out", str(tmp_path / rival), *flags])


def test_an_evaluation_with_methods_and_attacks(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "load_clip", functools.cache(sd.load_clip))  # pno asks for it each time
    ev.evaluate(ev.parse_args(
        "--model tests/tiny --method negative-prompt sld-medium safree pno crops latent-mixing "
        "--prompts tests/tiny/prompts_few.txt --limit 1 "
        "--seeds 1 --steps 2 --attack ring-a-bell unlearndiffatk cce revival --attack-sources 1 "
        "--attack-prompts 1 --attack-updates 1 --attack-generations 2 --attack-population 8 "
        f"--out {tmp_path / 'out'}".split()))
    for attack in ("unlearndiffatk", "cce"):
        found = json.loads((tmp_path / f"out/{attack}.json").read_text())
        assert [name for name, system in found.items() if not system["obstacle"]] == [
            "base", "negative-prompt", "sld-medium", "safree"]
        assert all("device" not in system["obstacle"] for system in found.values())


@pytest.fixture
def real_gpu(monkeypatch):
    """Processes that a test starts see the GPU, which the suite itself does not."""
    if not shutil.which("nvidia-smi"):
        pytest.skip("needs a GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if GPUS != "all":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS)


NOISE = """
import torch
import eval as ev, shielddiff as sd
args = ev.parse_args("--model tests/tiny --generator-device cuda".split())
pipe = sd.load_pipeline("tests/tiny")
row = ev.Row("a", "", True, 5, 7.5, 64, 64)
found = ev.call_of(pipe, [ev.Job("p", 0, 0, row, None)], args)["latents"].cpu()
size = 64 // pipe.vae_scale_factor
torch.cuda.manual_seed(5)
assert torch.equal(found, torch.randn((1, 4, size, size), device="cuda").cpu())
"""


def test_noise_of_a_cuda_generator_is_drawn_there(real_gpu):
    done = subprocess.run([sys.executable, "-c", NOISE], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [
    ("--precision", "fp16"), ("--precision", "bf16", "--gradient-checkpointing"), ("--precision", "fp32"),
    ("--precision", "fp16", "--lora-rank", 0), ("--precision", "fp16", "--attention", "xformers")])
def test_a_run_its_resume_and_its_evaluation_on_a_real_gpu(flags, real_gpu, tmp_path):
    for more in (("--steps", 1), ("--steps", 2, "--resume")):
        done = cli(*SMALL, *flags, "--out", tmp_path / "run", *more)
        assert done.returncode == 0, done.stderr
    for line in metrics(tmp_path / "run"):
        assert line["ratio_max_dev"] == 0 and line["nats"] > 0 and line["peak_gpu_memory_mb"] > 0
    weights = ("--lora", tmp_path / "run") if 0 not in flags else ("--unet", f"mine={tmp_path / 'run/unet'}")
    done = cli("--model", "tests/tiny", *weights, "--limit", 1, "--seeds", 1, "--steps", 2,
               "--generator-device", "cuda", "--out", tmp_path / "out", script="eval.py")
    assert done.returncode == 0, done.stderr
