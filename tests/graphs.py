"""A CUDA graph for machines without a GPU: the operators of a block, recorded and run again.

As on a GPU, recording changes no tensor that was there before; and a replay runs the recorded
operators on the recorded tensors, whatever Python would do by now.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph; `recording` for torch.cuda.graph."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self.overwritten = []  # (tensor, its values before)
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.lift_fresh.default:
            raise RuntimeError(
                "a tensor of Python numbers: on a GPU, a copy that cannot be recorded"
            )
        if function._schema.is_mutable:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.overwritten += [(tensor, tensor.clone()) for tensor in given]
        result = function(*args, **kwargs)
        self.operators.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.operators:
            if function.is_view:  # of the same memory as ever
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def recording(tape):
    try:
        with tape:
            yield
    finally:
        with torch.no_grad():
            for tensor, values in reversed(tape.overwritten):
                tensor.copy_(values)


class NoStream:
    def wait_stream(self, other):
        pass


def pretend(monkeypatch, ldm):
    """Let `ldm.Trainer` record on the CPU. Returns the list of the tapes that it makes."""
    tapes = []

    def new_tape():
        tapes.append(Tape())
        return tapes[-1]

    monkeypatch.setattr(ldm, "_on_one_gpu", lambda accelerator: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return tapes
