"""torch.compile, block by block: what is compiled for one block serves all of its kind, and all steps of a kind.

Steps are of a kind if a block's code goes the same way: dense in a layer without a LayerState, and with one; measure,
sparse; refresh, and the other two again, when there is a full step before to take a drift from. These are seven. Later
sizes of pictures compile them again, for any size, or for any whose tokens come in whole blocks of 64.
"""
import re
import time

import torch
from torch._dynamo.utils import calculate_time_spent

KINDS = 32                     # torch compiles so many kinds of a block, its own limit is 8, and then gives up


def compile_blocks(model, dynamic=None):
    """Have every block within a module compiled, in place, when it is first called. dynamic: torch.compile's; with
    None, numbers that change from step to step become variables."""
    torch._dynamo.config.recompile_limit = KINDS
    for path, module in model.named_modules():
        if re.search(r"(blocks?|layers)\.\d+$", path):
            module.compile(dynamic=dynamic)


def compile_seconds():
    """How long this process has compiled so far."""
    return calculate_time_spent()["total_wall_time"]


def clock():
    """Seconds, by a clock that stands still while something is compiled."""
    return time.perf_counter() - compile_seconds()
