"""Where a model's weights and caches live if the GPU is too small for them: in host memory, a layer ahead of their use.

    GPU computes         layer i                     layer i + 1                 layer i + 2
    comes to the GPU     what layer i + 1 needs      what layer i + 2 needs      what layer i + 3 needs
    leaves for the host  what layer i - 1 changed    what layer i changed        what layer i + 1 changed

Of the caches comes what a kind of step reads, and leaves what it writes (cache.READ, WRITTEN). Weights come at every
step and never leave. A model asks `visit` for its blocks, one by one, and attention and MLP do not know where anything
lives.

A sparse step of HunyuanVideo at 720p reads 82 GB of caches in 5 s, and PCIe 5 brings 55 GB a second: nothing waits.
"""
import weakref
from contextlib import suppress

import numpy as np
import torch

from cache import FOR_SPARSE, READ, WRITTEN
from cli import note

ALIGNMENT = 256                # bytes: where pieces of host memory start
LEAST, MOST = 2**26, 2**32     # bytes of a block of it

# ---------------------------------------------------------------------------------------------------------
# host memory


def pin(array, device):
    """Pin a numpy array's memory, so that the GPU copies from and to it beside its computation, until the last tensor
    in it is gone. -> could it be pinned? torch's own pinned memory comes in powers of two and is not given back."""
    address = array.ctypes.data
    pinned = int(torch.cuda.cudart().cudaHostRegister(address, array.nbytes, 0)) == 0

    def unpin():
        torch.cuda.synchronize(device)                               # a run that was broken off may still be copying
        torch.cuda.cudart().cudaHostUnregister(address)
    if pinned:
        weakref.finalize(array, unpin).atexit = False
    else:
        with suppress(RuntimeError):                                 # else the next kernel would be blamed for it
            torch.ones(1, device=device)
    return pinned


class HostMemory:
    """Host memory for tensors, in few large blocks, pinned if there is a GPU. A block goes back to the system with the
    last tensor in it."""

    def __init__(self, device):
        self.device, self.total, self.pinned = device, 0, device.type == "cuda"
        self.free = []                                               # what is left of every block, (bytes,) uint8 each

    def like(self, x):
        """A tensor of x's shape, strides and dtype here, without values."""
        size = -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        i = next((i for i, left in enumerate(self.free) if len(left) >= size), len(self.free))
        if i == len(self.free):
            self.free.append(self.new_block(max(size, LEAST, min(self.total, MOST))))
        piece, self.free[i] = self.free[i].split([size, len(self.free[i]) - size])
        strides = torch.empty_like(x, device="meta").stride()        # x's own, unless it has gaps
        return piece[:x.nbytes].view(x.dtype).as_strided(x.shape, strides)

    def new_block(self, size):
        array = np.empty(size, dtype=np.uint8)                       # in huge pages if there are, which pin faster
        self.total += size
        if self.pinned and not pin(array, self.device):
            self.pinned = False
            note(f"the system pins no more memory, {self.total / 1e9:.1f} GB in all (ulimit -l?): copies will be slow")
        return torch.from_numpy(array)


def evenly(n, some):
    """Which `some` of n, evenly spread. -> [bool]"""
    return [(i + 1) * some // n > i * some // n for i in range(n)]


def move_caches(state, resident, device):
    """Let a fresh ModelState's layers keep on the host what sparse steps read, but for `resident` of them; None:
    all stays on the GPU. -> the state, which is None for a dense model"""
    if state is not None and resident is not None:
        own = [layer for layer in state.layers if layer is not None]
        state.memory = HostMemory(device)
        for layer, stays in zip(own, evenly(len(own), resident)):
            layer.homes = None if stays else {}
    return state


def homes(model, blocks, resident, device):
    """Where a model's parameters should be loaded to, for move_weights. -> {name: device}"""
    away = {p for block, stays in zip(blocks, evenly(len(blocks), resident)) if not stays for p in block.parameters()}
    return {name: torch.device("cpu") if p in away else device for name, p in model.named_parameters()}


def move_weights(model, blocks, resident, device):
    """Move a model to the GPU, but all of its blocks except for `resident` ones to host memory."""
    memory = HostMemory(device)
    for block, stays in zip(blocks, evenly(len(blocks), resident)):
        block.on_host = not stays
        for p in block.parameters():
            p.data = p.data.to(device) if stays else memory.like(p).copy_(p.data)
    away = {p for block in blocks if block.on_host for p in block.parameters()}
    for p in model.parameters():
        if p not in away:
            p.data = p.data.to(device)


def in_chunks(f, *tensors, rows=2**14):
    """f of tensors (B, N, C), so many rows at a time, or more of them in eight goes: what f holds in between then stays
    small."""
    rows = max(rows, -(-tensors[0].shape[1] // 8))
    if tensors[0].shape[1] <= rows:
        return f(*tensors)
    return torch.cat([f(*chunks) for chunks in zip(*(x.split(rows, dim=1) for x in tensors))], dim=1)

# ---------------------------------------------------------------------------------------------------------
# the way there and back


def ahead(needs):
    """The schedule of what comes. needs [bool]: does a layer need anything from the host? -> for every layer, the
    layers for which copies start as it starts: the next one in need; with the first layer, also the first in need."""
    needy = [i for i, need in enumerate(needs) if need]
    starts = [[] for _ in needs]
    for earlier, later in zip([0, *needy], needy):
        starts[earlier].append(later)
    return starts


class Lane:
    """Copies in one direction, one after the other, beside the GPU's computation. On a CPU they are done at once."""

    def __init__(self, device):
        self.device, self.stream = device, None                      # a stream of its own, once there is something

    def copy(self, pairs):
        """Copy source to target for pairs of them. -> the event that they are done; None on a CPU, or without pairs"""
        if not pairs or self.device.type == "cpu":
            for source, target in pairs:
                target.copy_(source)
            return None
        self.stream = self.stream or torch.cuda.Stream(self.device)
        # All that the GPU was told to compute comes first: it makes what leaves; and memory for what comes may still
        # be in use by what was computed there before.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def join(self):
        """Whatever the GPU computes from here on waits for all copies."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def wait(event):
    """Whatever the GPU computes from here on waits for these copies."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def visit(blocks, state, step, device):
    """Yield every block and its LayerState (None: always dense), in order, with all that this step needs of them on
    `device`. What the last layer changed leaves when it is asked for more: iterate to the end."""
    layers = state.layers if state else [None] * len(blocks)
    mode = step.mode if step else "dense"
    away = [living_away(block, layer, mode) for block, layer in zip(blocks, layers)]
    starts, homes, arrived, leaving, left = ahead([bool(places) for places in away]), {}, {}, [], None
    incoming, outgoing = Lane(device), Lane(device)
    try:
        for i, layer in enumerate(layers):
            for j in starts[i]:
                homes[j] = [getattr(*place) for place in away[j]]
                for place, home in zip(away[j], homes[j]):
                    setattr(*place, torch.empty_like(home, device=device))
                arrived[j] = incoming.copy([(home, getattr(*place)) for place, home in zip(away[j], homes[j])])
            wait(arrived.get(i))                                     # it computes with what has come
            yield blocks[i], layer
            if layer and layer.places:
                layer.stay()                                         # where a recorded step looks for it (replay.py)

            # The GPU may use anew, in the order of its computation, what nobody holds from here on. Copies are not in
            # this order. So what leaves is held until the next layer is done, and only let go of after this wait.
            wait(left)
            leaving = send_home(layer, mode, state.memory) if layer and layer.homes is not None else []
            left = outgoing.copy(leaving)
            for place, home in zip(away[i], homes.get(i, ())):
                setattr(*place, home)
    finally:                                                         # also if the step was broken off
        incoming.join()
        outgoing.join()


def living_away(block, layer, mode):
    """What of a block and its layer has to come from the host. -> [(what it belongs to, the attribute's name)]"""
    weights = [(p, "data") for p in block.parameters()] if getattr(block, "on_host", False) else []
    homes = layer.homes if layer and layer.homes else ()
    caches = [(layer, name) for name in READ.get(mode, ()) if name in homes]
    return weights + caches


def send_home(layer, mode, memory):
    """Point a layer to the homes of what sparse steps read, and make those that it has not got.
    -> [(tensor on the GPU, its home)] of what changed, to be copied"""
    leaving = []
    for name in FOR_SPARSE:
        here = getattr(layer, name)
        if here is not None:
            home = layer.homes.get(name)
            if home is None:
                home = layer.homes[name] = memory.like(here)
            if name in WRITTEN.get(mode, ()):
                leaving.append((here, home))
            setattr(layer, name, home)
    return leaving
