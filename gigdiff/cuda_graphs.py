"""Networks on a GPU by CUDA graphs: one launch in place of hundreds, in drawing and in training.

A UNet of a few million parameters leaves a GPU waiting for its kernels to be launched one by one, and autocast launches
more of them, to round weights at every call. Here a network's kernels are recorded once for each shape of its inputs
and then replayed; in drawing half precision is that of a rounded copy of the weights.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gigdiff.packing import state_of

__all__ = ["GraphedNetwork", "recorded_for_training"]

log = logging.getLogger(__name__)

SHAPES_KEPT = 8  # recordings in memory at once, the newest
WARM_UPS = 3  # calls before recording: kernels are chosen and loaded in them


class GraphedNetwork:
    """`network`, which takes tensors on a GPU and gives one, float32 in and out, computed in `dtype`.

    May be called from several threads, which then take turns. Where a network can't be recorded (a layer that asks the
    GPU for a number, say), it is called as it is, and a warning says so once.

    Args:
        network: in evaluation mode, on the GPU. It is left as it is; `refresh` looks whether its weights have changed.
        dtype: float32: its own weights are used. bfloat16 or float16: a rounded copy.
        compiled: by torch.compile before it is recorded, which takes half a minute for each shape of inputs.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, compiled: bool = False) -> None:
        self.network, self.dtype, self.compiled = network, dtype, compiled
        self._turn = threading.Lock()
        self._state: list[tuple[int, int]] | None = None
        self._rounded: Callable[..., Tensor] = network
        self._recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._recordable = True

    def refresh(self) -> None:
        """Take the network's weights as they are now. To be called before a picture; cheap if they are the same."""
        state = state_of((*self.network.parameters(), *self.network.buffers()))
        if state == self._state:
            return
        with self._turn:
            self._recorded.clear()
            self._rounded = self.network
            if self.dtype != torch.float32:
                # (torch's own `to`: diffusers' warns of modules to keep in float32 even where there are none.)
                self._rounded = nn.Module.to(copy.deepcopy(self.network), self.dtype)
            if self.compiled:
                self._rounded = torch.compile(self._rounded, dynamic=False)
            self._state = state

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        with self._turn:
            device = next(self.network.parameters()).device
            if not self._recordable:
                return self._run(*(self._held(x, device) for x in inputs))
            with torch.cuda.device(device):
                shapes = tuple(x.shape for x in inputs)
                found = self._recorded.pop(shapes, None)
                if found is None:
                    held = tuple(self._held(x, device) for x in inputs)
                    try:
                        found = self._record(held)
                    except RuntimeError as error:
                        log.warning("%s is drawn without a CUDA graph: %s", type(self.network).__name__, error)
                        self._recordable = False
                        return self._run(*held)
                self._recorded[shapes] = found  # the newest is last
                if len(self._recorded) > SHAPES_KEPT:
                    del self._recorded[next(iter(self._recorded))]
                graph, held, output = found
                for into, x in zip(held, inputs, strict=True):
                    into.copy_(x)
                graph.replay()
                return output.clone()  # the next replay writes over it

    def _held(self, x: Tensor, device: torch.device) -> Tensor:
        """A tensor of the recording's own, to copy inputs like x into."""
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        dtype = self.dtype if x.is_floating_point() else x.dtype
        return torch.empty_like(x, dtype=dtype, device=device, memory_format=layout).copy_(x)

    def _run(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return self._rounded(*inputs).float()

    def _record(self, held: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._run(*held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Another thread of a server may allocate meanwhile: only this one's calls are looked at.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._run(*held)
        return graph, held, output


def recorded_for_training(network: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """`network`, its forward and its backward pass recorded as CUDA graphs; as it was, with a warning, if that fails.

    Inputs of `example`'s shapes go through the recording, in the mode (training or not) that the network is in now;
    others as before. The weights are the network's own, read anew at each replay. What it gives and its gradients lie
    in the recording's memory, which the next forward and the next backward pass write over: use or copy them before,
    and don't add up several passes. A network that is not trained is recorded without a backward pass, unless an input
    of `example` requires a gradient.

    Args:
        network: takes tensors on a GPU and gives one. It is changed.
        example: inputs, only looked at for what they are like.
        dtype: of autocast; float32: without.
    """
    plain = network.forward
    try:
        # Casts that autocast remembers from one pass to the next would be recorded as those of the first weights.
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            # Of the recording's side stream, at each step; newer versions warn of it.
            if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
                torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            torch.cuda.make_graphed_callables(network, example)
    except RuntimeError as error:
        log.warning("%s is trained without a CUDA graph: %s", type(network).__name__, error)
        network.forward = plain  # type: ignore[method-assign]
        network.zero_grad()
        return network
    recorded, shapes = network.forward, [x.shape for x in example]

    def forward(*inputs: Tensor) -> Tensor:
        return (recorded if [x.shape for x in inputs] == shapes else plain)(*inputs)

    network.forward = forward  # type: ignore[method-assign]
    return network
