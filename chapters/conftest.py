"""A chapter that kills its kernel fails at once, in the cell that did it; nbval alone notices only at the cell's time limit."""

import time
from queue import Empty

from nbval.kernel import RunningKernel

wait = RunningKernel.get_message


def get_message(kernel: RunningKernel, stream: str, timeout: float | None = None) -> dict:
    """nbval's own, waiting a second at a time and looking in between whether anybody is still there to answer."""
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    while True:
        try:
            return wait(kernel, stream, min(1.0, max(end - time.monotonic(), 0.0)))
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError("the kernel died in this cell; out of memory?") from None
            if time.monotonic() >= end:
                raise


RunningKernel.get_message = get_message
