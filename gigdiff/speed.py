"""How fast is one model? Measured in a process of its own: `python -m gigdiff.speed '{"model": "mini", ...}'`.

Cold start to first image, then latency at batch 1 and throughput at each batch size, after a warm-up of each; peak
memory of the process and of the GPU. The result is the last line of stdout, as JSON. A fresh process each time is what
makes "cold" and "peak" mean something; gigdiff.benchmark starts several, in turns with the other models.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["measure_speed", "peak_memory"]

PROMPTS = ("red wool coat", "black leather handbag", "white sneakers", "navy polo shirt for men")


def main(arguments: Sequence[str] | None = None) -> int:
    settings = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    try:
        print(json.dumps(measure_speed(**settings)))
    except Exception as error:  # the parent turns it into a row with its reason
        print(json.dumps({"error": type(error).__name__, "reason": " ".join(str(error).split())}))
        return 1
    return 0


def measure_speed(
    model: str,
    *,
    started: float,
    batch_sizes: Sequence[int] = (1, 4, 16),
    latency_images: int = 10,
    warm_ups: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    attention: str = "auto",
    threads: int | None = None,
    **request: Any,
) -> dict[str, Any]:
    """Measures one model once.

    Args:
        model: what gigdiff.load takes.
        started: time.time() when the process was started: imports and loading count towards the first image.
        latency_images: images drawn one after another at batch 1.
        threads: torch's; None leaves it.
        request: num_inference_steps, guidance_scale, lora, lora_scale.

    Returns:
        first_image_seconds, load_seconds, latencies (seconds each), throughput {batch: images a second}, failed {batch:
        reason}, host_bytes and cuda_bytes (peaks), threads, load_average before and after, device.
    """
    import torch

    import gigdiff
    from gigdiff.generators.loading import pick_device
    from gigdiff.generators.request import GenerationRequest

    if threads is not None:
        torch.set_num_threads(threads)
    before = load_average()
    loading = time.perf_counter()
    generator = gigdiff.load(model, device=device, dtype=dtype, attention=attention)
    load_seconds = time.perf_counter() - loading
    drawn = 0

    def draw(count: int) -> float:
        nonlocal drawn
        prompts = tuple(PROMPTS[(drawn + i) % len(PROMPTS)] for i in range(count))
        seeds = tuple(range(drawn, drawn + count))
        drawn += count
        began = time.perf_counter()
        generator.generate(GenerationRequest(prompts=prompts, seeds=seeds, **request))  # gives arrays: nothing pending
        return time.perf_counter() - began

    draw(1)
    first_image_seconds = time.time() - started
    for _ in range(warm_ups):
        draw(1)
    latencies = [draw(1) for _ in range(latency_images)]
    throughput, failed = {}, {}
    for size in batch_sizes:
        if size == 1:
            throughput["1"] = len(latencies) / sum(latencies)
            continue
        try:
            for _ in range(warm_ups):
                draw(size)
            throughput[str(size)] = size / draw(size)
        except (RuntimeError, MemoryError) as error:  # out of memory, mostly
            failed[str(size)] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return {
        "first_image_seconds": first_image_seconds,
        "load_seconds": load_seconds,
        "latencies": latencies,
        "throughput": throughput,
        "failed": failed,
        "host_bytes": peak_memory(),
        "cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": [before, load_average()],
        "device": str(pick_device(device)),
    }


def peak_memory() -> int | None:
    """Most memory that this process has had resident, in bytes; None where the system does not say."""
    # On Linux ru_maxrss begins at the memory of the process that started this one; VmHWM begins anew.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_average() -> float | None:
    """Processes waiting for a core over the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    sys.exit(main())
