"""Run by test_training.py, alone and under `torch.distributed.run` (gloo): saves the gradients of one step of two trainings.

    python tests/gradients.py DATA OUT
"""

import sys

import torch
from accelerate import Accelerator
from conftest import tiny_model
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ldm_minimal import CLIP, CaptionedImages, Stage, train_clip, train_denoiser


def gradient(training, module):
    """The gradient that the optimizer is handed at the first step, as one vector (after averaging over processes)."""
    seen = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in module.parameters()]).clone()))
    next(training)
    hook.remove()
    return seen[0]


def main(folder, out):
    accelerator = Accelerator(cpu=True)
    data = CaptionedImages(folder + "/train", 16)
    model = tiny_model(data)
    clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
    result = {"processes": accelerator.num_processes,
              "denoiser": gradient(train_denoiser(model, data, Stage(1, 8, 1e-3), accelerator=accelerator), model.unet),
              "clip": gradient(train_clip(clip, data, Stage(1, 8, 1e-3), accelerator=accelerator), clip)}
    if accelerator.is_main_process:
        torch.save(result, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
