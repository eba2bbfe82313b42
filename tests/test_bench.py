"""SD 1.5 at 512 px on paper: bench.py's fake tensors have shapes and types, but no numbers."""
from bench import on_paper

import shielddiff as sd


def test_the_default_lora_run_fits_5_gb_on_paper():
    args = sd.Args()
    assert on_paper(args.lora_rank, args.precision, args.gradient_checkpointing, args.micro_batch,
                    args.optimizer_8bit)["total"] < 4.5  # GiB


def test_the_whole_unet_with_8_bit_adam_fits_12_gb_on_paper():
    assert on_paper(lora_rank=0, micro_batch=1)["total"] < 12
