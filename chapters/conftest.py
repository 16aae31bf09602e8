"""A chapter that kills its kernel fails at once, in the cell that did it.

nbval alone notices only at the cell's time limit.
"""

import time
from queue import Empty

from nbval.kernel import RunningKernel

wait_for_message = RunningKernel.get_message


def get_message(kernel: RunningKernel, stream: str, timeout: float | None = None) -> dict:
    """As nbval's own; but once a second, look whether the kernel is still alive."""
    if timeout is None:
        timeout = float("inf")
    end = time.monotonic() + timeout
    while True:
        time_left = max(end - time.monotonic(), 0.0)
        try:
            return wait_for_message(kernel, stream, min(1.0, time_left))
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError("the kernel died in this cell; out of memory?") from None
            if time.monotonic() >= end:
                raise


RunningKernel.get_message = get_message
