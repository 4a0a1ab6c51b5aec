"""Several GPUs. One process each, which torchrun starts:

    torchrun --nproc_per_node 4 hunyuan_chipmunk.py --model 720p --prompt "..."

Each holds all weights, some rows (tokens) of the sequence, and some heads of attention (DeepSpeed-Ulysses, arXiv
2309.14509):

    own rows, all heads   --all-to-all-->   all rows, own heads   --all-to-all-->   own rows, all heads
    linears, norms, MLPs                    attention                               linears, norms, MLPs

So attention, and what Chipmunk remembers of it, are as in one process but for the number of heads, and the result is
the same. All processes know the latents and move them alike. Rank 0 decodes and writes. A model calls `own_rows` and
`own_rope` before its blocks, `scatter_heads` and `gather_heads` around attention, and `gather_rows` at its end. With
ranks=None, one process, these change nothing.
"""
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist

import cli
from processes import meet, others_alive, several


@dataclass(frozen=True)
class Ranks:
    """The processes that share one sequence, and what each of them has."""
    group: dist.ProcessGroup
    rank: int                            # this process's place in the group
    first: bool                          # is it the first of all processes?
    heads: tuple                         # of attention, of each rank
    rows: tuple = ()                     # of the sequence, of each rank
    branches: int = 1                    # 2: another group computes the other guidance branch (Wan),
    branch: int = 0                      # and this group this one
    watch: Callable = nullcontext        # entered around every all-to-all, to time it

# ---------------------------------------------------------------------------------------------------------
# who has what


def split(n, parts, multiple=1, first=0):
    """Cut n into `parts` of about the same size, at first, first + multiple, first + 2 multiple, ... only. -> tuple"""
    units, done, sizes = -(-(n - first) // multiple), 0, []
    for part in range(1, parts + 1):
        end = min(n, first + part * units // parts * multiple)
        sizes.append(end - done)
        done = end
    return tuple(sizes)


def spread(ranks, n, multiple=1, first=0):
    """The same ranks with n rows, split likewise."""
    return ranks and replace(ranks, rows=split(n, len(ranks.heads), multiple, first))


def shares(ranks, first, n):
    """How many of the rows first, ..., first + n - 1 each rank has. -> [int]"""
    ends = accumulate(ranks.rows)
    return [max(0, min(end, first + n) - max(end - rows, first)) for end, rows in zip(ends, ranks.rows)]


def own_rows(ranks, *parts):
    """This rank's rows of parts (B, n, C) that stand one behind the other in the sequence. -> as many, maybe empty"""
    if ranks is None:
        return parts
    first, own = 0, []
    for part in parts:
        own.append(part.split(shares(ranks, first, part.shape[1]), dim=1)[ranks.rank])
        first += part.shape[1]
    return own


def own_rope(ranks, rope):
    """This rank's rows of the sequence's cosines and sines (N, D / 2) each."""
    return tuple(own_rows(ranks, table[None])[0][0] for table in rope)

# ---------------------------------------------------------------------------------------------------------
# collectives


@torch.compiler.disable
def exchange(ranks, pieces, shapes, group=None):
    """Send pieces[i] to rank i, and receive a tensor of shapes[i] from it, in one all-to-all. -> list of tensors"""
    sent = torch.cat([piece.flatten() for piece in pieces])
    sizes = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    with ranks.watch(), others_alive():
        dist.all_to_all_single(received, sent, sizes, [piece.numel() for piece in pieces], group or ranks.group)
    return [flat.view(shape) for flat, shape in zip(received.split(sizes), shapes)]


def scatter_heads(ranks, q, k, v):
    """Own rows of all heads, (B, H, n, D) each -> all rows of own heads, (B, h, N, D) each."""
    if ranks is None:
        return q, k, v
    qkv = torch.stack([q, k, v]).permute(2, 0, 1, 3, 4)              # (H, 3, B, n, D)
    own, D = ranks.heads[ranks.rank], q.shape[3]
    shapes = [(own, 3, q.shape[0], rows, D) for rows in ranks.rows]
    qkv = torch.cat(exchange(ranks, qkv.split(ranks.heads), shapes), dim=3)      # (h, 3, B, N, D)
    return qkv.permute(1, 2, 0, 3, 4).unbind()


def gather_heads(ranks, o):
    """Back again: all rows of own heads, (B, h, N, D) -> own rows of all heads, (B, H, n, D)."""
    if ranks is None:
        return o
    shapes = [(o.shape[0], heads, ranks.rows[ranks.rank], o.shape[3]) for heads in ranks.heads]
    return torch.cat(exchange(ranks, o.split(ranks.rows, dim=2), shapes), dim=1)


def gather_rows(ranks, x, first, n):
    """Own ones (B, own, C) of the sequence's rows first, ..., first + n - 1 -> all of these, (B, n, C)."""
    if ranks is None:
        return x
    shapes = [(x.shape[0], rows, x.shape[2]) for rows in shares(ranks, first, n)]
    return torch.cat(exchange(ranks, [x] * len(shapes), shapes), dim=1)


def own_branches(ranks, branches):
    """Those of two guidance branches, a list, that this process computes: both or one."""
    return branches[ranks.branch::ranks.branches] if ranks else branches


def both_branches(ranks, results):
    """The results of both branches. If this process has one, its counterpart in the other group has the other."""
    if len(results) == 2:
        return results
    x, size = results[0], len(ranks.heads)
    partners = [rank % size == ranks.rank for rank in range(2 * size)]
    pieces, shapes = zip(*[(x, x.shape) if partner else (x[:0], (0,)) for partner in partners])
    received = exchange(ranks, pieces, shapes, dist.group.WORLD)
    return [x for x, partner in zip(received, partners) if partner]


def add_up_work(ranks, states):
    """Let the counters of every LayerState in these ModelStates say what all processes did together."""
    layers = [layer for state in states if state for layer in state.layers if layer]
    if ranks is None or not layers:
        return
    share = ranks.heads[ranks.rank] / sum(ranks.heads) / ranks.branches          # of the model's heads
    work = torch.stack([torch.stack([layer.attn_work * share, layer.mlp_work]) for layer in layers])  # (layers, 2)
    with others_alive():
        dist.all_reduce(work)
    for layer, both in zip(layers, work):
        layer.attn_work, layer.mlp_work = both

# ---------------------------------------------------------------------------------------------------------
# how a run begins and ends


def start(device, heads, branches=1):
    """Meet the other processes. -> Ranks, with no rows yet; None if there are no others.
    branches: 2 if a model runs twice a step. Halves of an even number of processes then take one each.
    Raises Fail if there are more processes than heads, or all are sent to one GPU."""
    if not several():
        return None
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    groups = branches if size % branches == 0 else 1
    sharing = size // groups
    if sharing > heads:
        more = f", or an even number up to {2 * heads}" if branches == 2 else ""
        raise cli.Fail(f"{size} processes cannot share {heads} heads; start 1 to {heads}{more}")
    meet(device)
    with others_alive():
        group = dist.new_subgroups(sharing)[0]
    return Ranks(group, rank % sharing, rank == 0, split(heads, sharing), branches=groups, branch=rank // sharing)


def leave(ranks):
    """Part from the other processes, when nothing is left to do together. -> is this the one that goes on?"""
    if ranks:
        dist.destroy_process_group()
    return ranks is None or ranks.first


def cache_share(ranks):
    """Which share of one process's caches this one needs, at most."""
    return max(ranks.heads) / sum(ranks.heads) / ranks.branches if ranks else 1
