"""Token orders: neighbours in space (and time) become neighbours in the sequence.

A group of 128 query tokens shares its columns, so its tokens should want the same ones. In raster order a group is a
strip of an image row. In these orders it is a patch, or in a video a voxel:

    raster  0  1  2  3        2x2 patches   0  1  4  5
            4  5  6  7     ->               2  3  6  7        (numbers: positions in the sequence)
            8  9 10 11                      8  9 12 13
           12 13 14 15                     10 11 14 15

Tokens that fill no whole patch, at the far edges, follow in raster order: any size works, without padding.
"""
import torch

from sparse_kernels import GROUP


def token_order(grid, *blocks):
    """The raster indices of a grid's tokens in block order.

    grid: tokens along each axis, (h, w) or (t, h, w). blocks: the block's extent along each axis, outermost first;
    inner blocks divide outer ones, for example (8, 8), (4, 4) for FLUX or (4, 4, 8) for a video.
    -> (N,) int64 `order`: x[:, order] is in block order, and y[:, order.argsort()] back in raster order.
    """
    axes = torch.meshgrid(*[torch.arange(n) for n in grid], indexing="ij")
    coords = torch.stack([a.flatten() for a in axes], dim=-1)        # (N, axes)
    outer = torch.tensor(blocks[0])
    whole = (coords < torch.tensor(grid) // outer * outer).all(-1)   # (N,) in a whole outer block?
    rank = (~whole).long()                                           # whole blocks first, then, finer and finer:
    for block in blocks:
        index = coords // torch.tensor(block) * whole[:, None]       # (N, axes) which block; the tail stays in raster
        for axis, n in enumerate(grid):
            rank = rank * n + index[:, axis]
    return rank.argsort(stable=True)


def local_windows(grid, block, side, order):
    """Which columns are near each group of tokens, in space and time.

    grid, block: as in token_order, which made `order` (N,). side: odd. A group that lies in one block gets the
    side x side x ... blocks around it; at the grid's edges these move inwards, so that there are always as many.
    A group of left-over tokens lies in several (incomplete) blocks and gets just those; the original gives it the
    sequence's last columns.
    -> (G, N) bool, groups and columns in `order`
    """
    n = [-(-g // b) for g, b in zip(grid, block)]                    # blocks along each axis, incomplete ones too
    blocks = torch.cartesian_prod(*[torch.arange(m) for m in n])     # (V, axes)
    low = torch.minimum(blocks - side // 2, torch.tensor(n) - side).clamp(min=0)[:, None]
    near = ((blocks >= low) & (blocks < low + side)).all(-1)         # (V, V): is block j in the window of block i?
    index = torch.zeros_like(order)                                  # (N,) which block each token stands in
    for position, b, m in zip(torch.unravel_index(order, grid), block, n):
        index = index * m + position // b
    touched = torch.zeros(-(-len(order) // GROUP), len(blocks), dtype=torch.bool)                # (G, V)
    touched[torch.arange(len(order)) // GROUP, index] = True
    first = touched.int().argmax(-1)                                 # (G,)
    return torch.where(touched.sum(-1, keepdim=True) == 1, near[first], touched)[:, index]
