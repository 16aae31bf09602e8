"""What the benchmarks share: clocks, taking turns, and the report of a ratio."""

import statistics
import time

import torch

LAYOUTS = {
    "diffusers": torch.contiguous_format,
    "diffusers channels_last": torch.channels_last,
}


def now(device: str) -> float:
    """Seconds, after all that the GPU still had to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} thread(s) of a CPU"


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product, the best of ten."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(13):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    return 2 * n**3 / min(seconds[3:])


def interleaved(calls: dict, repeats: int, device: str = "cpu") -> tuple[dict, float]:
    """{name: median seconds} of calls that take turns, after a warm-up; CPU / wall seconds."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    for _ in range(repeats):
        for name, call in calls.items():
            start = now(device)
            call()
            seconds[name].append(now(device) - start)
    busy = (time.process_time() - cpu_start) / (time.perf_counter() - wall_start)
    return {name: statistics.median(values) for name, values in seconds.items()}, busy


def report(title: str, seconds: dict[str, float], busy: float) -> None:
    """Ours against the faster of theirs, and every time."""
    theirs = min((name for name in seconds if name != "ours"), key=seconds.get)
    ratio = seconds["ours"] / seconds[theirs]
    print(f"{title}: ours / {theirs} = {ratio:.3f} in time, {1 / ratio:.2f} times as many a second")
    times = [f"{name} {1000 * value:.1f} ms" for name, value in seconds.items()]
    print(f"    {'   '.join(times)}   CPU / wall time {busy:.2f}", flush=True)
