"""How much memory denoising needs, and where its weights and caches go, before anything is downloaded or loaded.

The need is found by rehearsal: the model's own code runs on tensors without data, with one block of each kind, while
PeakBytes counts. What stays on the GPU and what lives on the host (offload.py) then needs

    on the GPU    weights and caches that stay, activations, and if others live on the host: two blocks' weights or
                  three layers' caches, which come, are used and leave
    on the host   the other weights and caches

The first that fits is taken: all stays; all weights and most caches; no caches and most weights.
"""
import weakref
from bisect import bisect
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoints
import cli
from cache import FOR_SPARSE, make_state
from offload import evenly
from plan import Step

WORKSPACE = 1.25               # a decoder's convolutions take more than their tensors: measured 1.21 and 1.24 times
MARGIN = 1.1                   # for what the allocator loses between tensors, and libraries work with
REHEARSED = Step(0, "dense"), Step(1, "measure"), Step(2, "measure", 1), Step(3, "sparse", 1)

# ---------------------------------------------------------------------------------------------------------
# rehearsal


class PeakBytes(TorchDispatchMode):
    """Counts what the tensors made within it take: `peak`, the most bytes at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = weakref.WeakSet()                            # that are known

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.storages.update(storages(args))                         # so weights, when first used, are not counted
        result = op(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage not in self.storages:                         # else a view, or updated in place
                self.storages.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def storages(tree):
    """The memory of all tensors in nested lists of things. -> set"""
    return {x.untyped_storage() for x in tree_leaves(tree) if torch.is_tensor(x)}


class NoScores(TorchFunctionMode):
    """Attention that never holds its scores, as on a GPU. For tensors without data the framework's would."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def rehearsal_state(layers, sparsity, pooled_columns, static_most):
    """make_state for tensors without data, with no layer always dense. static_most: the most static columns of any
    group"""
    state = make_state(layers, sparsity and replace(sparsity, dense_layers=0), pooled_columns, None, 0, "meta")
    for layer in state.layers if state else []:
        if layer is not None:
            layer.static_most = static_most
    return state


@torch.no_grad()
def rehearse(run):
    """Bytes that run() takes, the most at a time. It works on tensors without data."""
    with NoScores(), PeakBytes() as counted:
        run()
    return counted.peak


def rehearse_steps(forward, state):
    """Bytes of activations, the most at a time in any kind of step, forward(step). state then holds what it would
    remember; None: the plain model."""
    def run():
        for step in REHEARSED if state else [None]:
            forward(step)
    return rehearse(run) - (state_bytes(state) if state else 0)


def layer_bytes(layer, names=None):
    """Bytes of a LayerState's tensors, of all or those named, but for `static`, which all layers share."""
    return sum(x.nbytes for name, x in vars(layer).items()
               if torch.is_tensor(x) and name != "static" and (names is None or name in names))


def state_bytes(state):
    """Bytes that a ModelState remembers."""
    layers = [layer for layer in state.layers if layer is not None]
    return sum(map(layer_bytes, layers)) + trend_bytes(state)


def trend_bytes(state):
    """Of these, the bytes that skipped steps need: the last velocity and its trend."""
    return sum(x.nbytes for x in (*state.last[1:], state.trend) if x is not None)


def weight_bytes(module):
    return sum(p.nbytes for p in module.parameters())


@dataclass(frozen=True)
class Need:
    """Bytes that denoising needs."""
    blocks: tuple              # the weights of every block
    other_weights: int
    caches: tuple              # of every layer that is not always dense: what sparse steps read
    other_caches: int          # log-sum-exps, what tells which MLP columns move, v and its trend
    activations: int           # the most at a time
    branches: int = 1          # guidance branches, with caches each
    recorded: int = 0          # what a recorded step holds (replay.py), if nothing lives on the host

    def on_gpu(self, placement):
        weights, weights_away = split(self.blocks, placement.blocks)
        caches, caches_away = split(self.caches, placement.layers)
        on_their_way = 0
        if weights_away:
            on_their_way += 2 * max(self.blocks)
        if caches_away:
            on_their_way += 3 * max(self.caches)
        remembered = self.branches * (caches + self.other_caches)
        return self.other_weights + weights + remembered + on_their_way + self.working(placement)

    def working(self, placement):
        """Activations, and what a recorded step holds."""
        return self.activations + (0 if self.on_host(placement) else self.recorded)

    def on_host(self, placement):
        return split(self.blocks, placement.blocks)[1] + self.branches * split(self.caches, placement.layers)[1]


def find_need(model, blocks, kinds, sparsity, state, share, forward, branches=1):
    """What a model needs, by rehearsal of a small one. -> Need

    model: the whole one, without data, and its list of blocks. kinds: for each of these the index of the one like it
    in the small model. state: from rehearsal_state. share: of the caches, if several GPUs have them. forward(step) runs
    the small model with the state."""
    activations, weights = rehearse_steps(forward, state), tuple(map(weight_bytes, blocks))
    caches, others = (), 0
    if state:
        others = trend_bytes(state)
    if state and state.layers[0]:
        layers = [state.layers[kind] for kind in kinds[sparsity.dense_layers:]]
        caches = tuple(int(share * layer_bytes(layer, FOR_SPARSE)) for layer in layers)
        others += int(share * sum(map(layer_bytes, layers))) - sum(caches)
    return Need(weights, weight_bytes(model) - sum(weights), caches, others, activations, branches)


def decoder_bytes(make, latents, decode):
    """Bytes that the decoder takes, which works last and alone. make() -> it; latents: without data, in its precision;
    decode(decoder, latents) makes as much of the result as is there at a time."""
    with torch.device("meta"):
        decoder = make().to(latents.dtype)
    return weight_bytes(decoder) + int(WORKSPACE * rehearse(lambda: decode(decoder, latents)))


def check_decoder(size, device):
    """Raises Fail if a decoder that takes so many bytes does not fit."""
    free = checkpoints.free_memory(device)
    if size > free:
        raise cli.Fail(f"{device} has {gigabytes(free)} free, but the decoder needs {gigabytes(size)} at this size; "
                       "a smaller --width and --height helps")

# ---------------------------------------------------------------------------------------------------------
# choice


class Placement(NamedTuple):
    """What stays on the GPU."""
    blocks: int                # so many blocks' weights
    layers: int                # so many layers' caches, of those that are not always dense


def split(sizes, some):
    """Bytes of `some` of these, evenly spread, and of the others."""
    here = sum(compress(sizes, evenly(len(sizes), some)))
    return here, sum(sizes) - here


def candidates(need, offload):
    """Placements in the order in which they are tried. offload: "none", "caches" or "all" live on the host; None: what
    must."""
    blocks, layers = len(need.blocks), len(need.caches)
    if offload is not None:
        return [Placement(0 if offload == "all" else blocks, layers if offload == "none" else 0)]
    fewer_caches = [Placement(blocks, n) for n in range(layers, -1, -1)]
    return fewer_caches + [Placement(n, 0) for n in range(blocks - 1, -1, -1)]


def choose(need, gpu, host, offload=None):
    """The first candidate that fits into so many free bytes. -> Placement; None: none does"""
    for placement in candidates(need, offload):
        if MARGIN * need.on_gpu(placement) <= gpu and MARGIN * need.on_host(placement) <= host:
            return placement
    return None


def place(find_need, settings, ranks=None):
    """Choose what stays on the GPU. find_need(settings, ranks) -> Need. -> Need, Placement
    Raises Fail, with the numbers and what would fit, if there is too little memory."""
    gpu, host = checkpoints.free_memory(settings.device), checkpoints.free_memory(torch.device("cpu"))

    def where(settings):                                             # on a CPU nothing is gained if nobody asks
        return settings.offload or ("none" if settings.device.type == "cpu" else None)

    def fits(settings):
        return choose(find_need(settings, ranks), gpu, host, where(settings)) is not None
    need, offload = find_need(settings, ranks), where(settings)
    placement = choose(need, gpu, host, offload)
    if placement is not None:
        return need, placement
    least = candidates(need, offload)[-1]
    away = MARGIN * need.on_host(least)
    more = f" and {gigabytes(away)} of the host's {gigabytes(host)}" if away else ""
    least_gpu = gigabytes(MARGIN * need.on_gpu(least))
    raise cli.Fail(f"{settings.device} has {gigabytes(gpu)} free, but this needs {least_gpu}{more} "
                   f"({', '.join(describe(need, least))}, and {MARGIN - 1:.0%} to spare); {advice(settings, fits)}")


def advice(settings, fits):
    """What to try if settings do not fit, in words."""
    sparsity = settings.sparsity
    without_caches = {"--preset balanced": replace(sparsity, delta="none"), "--dense": None} if sparsity else {}
    found = [flag for flag, other in without_caches.items() if fits(replace(settings, sparsity=other))][:1]
    if settings.dtype == torch.float32 and settings.device.type == "cuda":
        found += ["--dtype bfloat16"] if fits(replace(settings, dtype=torch.bfloat16)) else []
    if settings.offload and fits(replace(settings, offload=None)):
        found.append("leaving out --offload")
    if settings.frames and settings.frames > 1:
        smaller = [replace(settings, frames=n) for n in range(1, settings.frames, 4)]
    else:
        smaller = [replace(settings, width=settings.width * n // 256 * 16, height=settings.height * n // 256 * 16)
                   for n in range(4, 16)]
        smaller = [size for size in smaller if min(size.width, size.height) >= cli.RANGES["width"][1]]
    n = bisect(smaller, False, key=lambda size: not fits(size))      # how many fit
    if n:
        size = smaller[n - 1]
        found.append(f"--frames {size.frames}" if size.frames else f"--width {size.width} --height {size.height}")
    return f"{' or '.join(found)} fits" if found else "nothing smaller fits; take a larger machine"


def gigabytes(size):
    return f"{size / 1e9:.{1 if size >= 1e10 else 2}f} GB"


def describe(need, placement):
    """What goes where, in words. -> [str]"""
    weights, weights_away = split(need.blocks, placement.blocks)
    caches, caches_away = (need.branches * size for size in split(need.caches, placement.layers))
    parts = {"weights": (weights + need.other_weights, weights_away),
             "caches": (caches + need.branches * need.other_caches, caches_away),
             "activations": (need.working(placement), 0)}
    return [f"{name} {gigabytes(here + away)}" + (f" ({gigabytes(away)} of it on the host)" if away else "")
            for name, (here, away) in parts.items()]


def show(find_need, find_decoder_need, settings):
    """Print what denoising needs, and where it would go, or that it does not fit; then what decoding needs."""
    try:
        need, placement = place(find_need, settings)
    except cli.Fail as problem:
        return cli.say(f"\n{problem}")
    cli.say("\n".join(["", *describe(need, placement),
                       f"at most {gigabytes(need.on_gpu(placement))} of {settings.device} at a time",
                       f"then decoding: {gigabytes(find_decoder_need(settings))}"]))


def say(need, placement, device):
    """If not all is on the device, one line: what is not, and why."""
    if need.on_host(placement):
        everything = need.on_gpu(Placement(len(need.blocks), len(need.caches)))
        free = checkpoints.free_memory(device)
        cli.note(f"{', '.join(describe(need, placement))}; all of it would take {gigabytes(MARGIN * everything)} of "
                 f"{device}, which has {gigabytes(free)} free")
