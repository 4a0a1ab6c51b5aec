"""Token orders: neighbours in space (and time) become neighbours in the sequence.

A group of 128 query tokens shares its columns, so its tokens should want the same ones. Raster order puts a strip of
an image row into a group; these orders put a patch (or, in a video, a voxel) there:

    raster  0  1  2  3        2x2 patches   0  1  4  5
            4  5  6  7     ->               2  3  6  7        (numbers: positions in the sequence)
            8  9 10 11                      8  9 12 13
           12 13 14 15                     10 11 14 15

Tokens that fill no whole patch, at the far edges, follow in raster order: any size works, without padding.
"""
import torch


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
