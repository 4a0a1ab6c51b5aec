"""A CUDA graph of sparse steps: one call starts all of a step's kernels, and none waits for Python.

A sparse step of FLUX.1 is 1,600 kernels in 0.069 s. To launch them one by one takes a CPU as long, or half as long
again. A CUDA graph is a record of what a step launches, with the addresses of all that it reads and writes. So

    what a layer remembers    stays where it was when the step was recorded: full steps' results are copied there
    what the caller gives     is copied to where the step found it when it was recorded

No Python runs in a replayed step: to look into blocks, set PLAIN to more steps than there are.
"""
import functools
from dataclasses import dataclass

import torch

from offload import living_away
from sparse_kernels import has_kernels

PLAIN = 2                      # sparse steps before one is recorded: the first compiles kernels, and to record takes as
                               # long as to launch, which FLUX.1-schnell's two do not earn back


@dataclass
class Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple              # tensors
    result: torch.Tensor


def can_replay(blocks, state, step, ranks, x):
    """May a step on x be recorded and replayed? It has to launch the same kernels on the same memory each time: not on
    several GPUs, not with caches or weights on the host, and not with a drift, as a step's age is a Python number."""
    return (step is not None and step.mode == "sparse" and ranks is None and has_kernels(x)
            and not state.sparsity.drift
            and not any(living_away(block, layer, step.mode) for block, layer in zip(blocks, state.layers)))


def replay(run, inputs, state):
    """run(*inputs) -> tensor, for a step that can_replay. run depends on nothing that changes between a generation's
    sparse steps but `inputs`, a tuple of tensors, and what the layers remember. The next step may overwrite the
    result."""
    state.sparse_steps += 1
    if state.sparse_steps <= PLAIN:
        return run(*inputs)
    if state.recorded is None:
        state.recorded = record(run, inputs, state)
    for recorded, given in zip(state.recorded.inputs, inputs):
        recorded.copy_(given)
    state.recorded.graph.replay()
    return state.recorded.result


def record(run, inputs, state):
    """Record what run(*inputs) launches, without doing it, and have all layers' tensors stay. -> Recorded"""
    graph, inputs = torch.cuda.CUDAGraph(), tuple(x.clone() for x in inputs)
    with torch.cuda.graph(graph, stream=side_stream(inputs[0].device)):
        result = run(*inputs)
    for layer in state.layers:
        if layer is not None:
            layer.stay()
    return Recorded(graph, inputs, result)


@functools.cache
def side_stream(device):
    """Where to record: torch's own choice is the first GPU that ever recorded. One for all, as cuBLAS keeps memory for
    each."""
    return torch.cuda.Stream(device)
