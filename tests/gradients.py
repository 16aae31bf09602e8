"""The gradients of the first step of each training, in one process or in several.

Run under `torch.distributed.run`, each process computes its share of a batch of 8:

    python -m torch.distributed.run --nproc_per_node 2 tests/gradients.py DATA OUT [DEVICE]

with tests/parity, where the random weights are, on PYTHONPATH.
"""

import dataclasses
import os
import subprocess
import sys

import torch
from accelerate import InitProcessGroupKwargs

from conftest import RecordingAccelerator, clip_of, tiny_model
from ldm_minimal import (
    CaptionedImages,
    TrainConfig,
    train_autoencoder,
    train_clip,
    train_denoiser,
)


def first_gradients(data, accelerator, grad_accum_steps=1):
    """{network: the gradient of the first batch, as one vector, averaged over processes}."""
    model = tiny_model(data)
    # The adaptive weight is each process's own, so the adversarial loss is left out of the sum.
    model.config = dataclasses.replace(
        model.config, discriminator_start=0, discriminator_head_start=0, adversarial_weight=0.0
    )
    config = TrainConfig(
        steps=1, batch_size=8, learning_rate=1e-3, grad_accum_steps=grad_accum_steps
    )
    names = ["denoiser", "autoencoder", "discriminator"]
    accelerator.gradients.clear()
    next(train_denoiser(model, data, config, accelerator=accelerator))
    next(train_autoencoder(model, data, config, accelerator=accelerator))
    if accelerator.device.type == "cpu":  # gloo does not gather what lies on a GPU
        names.append("clip")
        next(train_clip(clip_of(model), data, config, accelerator=accelerator))
    return dict(zip(names, accelerator.gradients, strict=True))


def main(folder, out, device="cpu"):
    data = CaptionedImages.from_folder(f"{folder}/train", 16)
    os.environ["LOCAL_RANK"] = "0"  # the processes share one device
    gloo = InitProcessGroupKwargs(backend="gloo")  # which NCCL does not allow
    accelerator = RecordingAccelerator(cpu=device == "cpu", kwargs_handlers=[gloo])
    result = {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "whole": first_gradients(data, accelerator),
        "in two parts": first_gradients(data, accelerator, grad_accum_steps=2),
    }
    if accelerator.is_main_process:
        torch.save(result, out)
    accelerator.end_training()


def run_in_two_processes(folder, out, device="cpu"):
    """What `main` saves, from two processes that share the batch."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, __file__, str(folder), str(out), device]
    paths = os.pathsep.join(path for path in sys.path if path)  # pytest's pythonpath, for them too
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
