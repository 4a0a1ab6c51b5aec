"""What each layer remembers between steps, and what attention and the MLP do with it at each step.

Attention, for every group g of 128 queries. S is the set of columns (keys) that the group keeps:

    measure   o, mass = attention(q, k, v);   S = top columns by mass (+ random, + static);   rest = o - o_S
    refresh   o = attention(q, k, v);         S stays;                                        rest = o - o_S
    sparse    o = rest + age * drift + o_S    o_S from fresh q, k, v

o_S comes in two kinds. delta="paper": a softmax over the columns S alone. delta="pooled": it also goes over the fresh
mean of every 64 neighbouring columns, each counting as many times as its block has columns outside S. The rest is then
small. S is chosen by mass times the distance of v from its block's mean.

The drift is how far the rest of one S went from one measure or refresh step to the next, per step; for it a measure
step takes the rest of the old S as well, before it forgets it. It serves the rest of the new S, too: most columns are
in neither. age is the number of steps since the last of them.

MLP, out = W2 gelu(W1 x + b1) + b2, for every group of 128 rows:

    measure   out, and S = the hidden columns f that moved most since the full step before, times the norm of W2[:, f]
    sparse    out += W2[:, S] (gelu(W1[S] x + b1[S]) - what that was)       exact for the columns in S

Skipped steps take the velocity v, the model's output: v + gain * (steps since) * trend (ModelState.recall).

plan.py tells which step is what. The caller owns the state (ModelState: one for each generation and each guidance
branch). Source: arXiv 2506.03275, sections 3 and 4.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plan import Sparsity
from sparse_kernels import (GROUP, POOL, Pooled, attention, attention_with_column_mass, block_means, choose_columns,
                            column_sparse_attention, count_unlisted, sparse_mlp_fc1, sparse_mlp_fc2)

SAMPLED = 8                    # of every so many rows of the MLP, one tells which columns move


@dataclass
class LayerState:
    """What one layer remembers. Shapes: B batch, H heads, D head dimension, C channels, F hidden width, N rows and Nk
    columns of attention, N rows of the MLP, G groups of 128 rows, K capacity of a column list, P pages of 65,536
    columns, M blocks of 64 columns."""
    sparsity: Sparsity
    pooled_columns: int              # how many columns, from the first, the blocks of delta="pooled" cover
    static: torch.Tensor | None      # (Nk,) or (G, Nk) bool: attention columns always kept
    static_most: int                 # of them, the most in any group
    seed: int
    attn_work: torch.Tensor          # () attentions so far: 1 a dense pass, and attn_share for each pass over S
    mlp_work: torch.Tensor           # () MLP rows computed so far, likewise
    lse: torch.Tensor = None         # (B, H, N) of the last full step
    columns: torch.Tensor = None     # (B, H, G, K) uint16
    counts: torch.Tensor = None      # (B, H, G, P) int32
    attn_share: torch.Tensor = None  # () share of attention's columns that are kept, and means
    o_rest: torch.Tensor = None      # (B, H, N, D) what the other columns contribute
    drift: torch.Tensor = None       # (B, H, N, D) float8: how far o_rest goes in a step
    unlisted: torch.Tensor = None    # (B, H, G, M) uint8, delta="pooled" only: a block's columns that are not kept
    sample: torch.Tensor = None      # (B, N / 8, F) gelu(W1 x + b1) of every 8th row, when all was last computed
    act: torch.Tensor = None         # (B, F, N) gelu(W1 x + b1), column after column
    out: torch.Tensor = None         # (B, N, C) W2 act + b2
    mlp_columns: torch.Tensor = None # (B, G, K) uint16
    mlp_counts: torch.Tensor = None  # (B, G, P) int32
    mlp_share: torch.Tensor = None   # () share of the MLP's columns that are kept
    homes: dict | None = None        # {name: host tensor}, for those of FOR_SPARSE that live on the host (offload.py)
    places: dict | None = None       # {name: tensor}, for those of STAYING, once they must not move (replay.py)

    def stay(self):
        """From now on, keep what sparse steps read where it is: copy what a full step has made anew there."""
        if self.places is None:
            self.places = {name: getattr(self, name) for name in STAYING if getattr(self, name) is not None}
        for name, place in self.places.items():
            if getattr(self, name) is not place:
                setattr(self, name, place.copy_(getattr(self, name)))


FOR_SPARSE = ("columns", "counts", "o_rest", "drift", "unlisted", "act", "out", "mlp_columns", "mlp_counts")
OLD = ("columns", "counts", "o_rest", "unlisted")          # of these, what a measure or refresh step begins with
READ = {"measure": OLD, "refresh": OLD, "sparse": FOR_SPARSE}                    # which kind of step reads what of them
STAYING = (*FOR_SPARSE, "lse", "attn_share", "mlp_share")  # all that sparse steps read and full steps make anew
WRITTEN = {"measure": FOR_SPARSE, "refresh": ("o_rest", "drift", "act", "out"), "sparse": ("act", "out")}


@dataclass
class ModelState:
    """One generation's memory, or one guidance branch's if there are two. A new generation makes a new one."""
    layers: list                     # LayerState, or None for a layer that is always dense
    sparsity: Sparsity
    last: tuple = ()                 # the last computed step's number, and the velocity there, (B, N, channels)
    trend: torch.Tensor = None       # likewise: how far that went in a step, since the computed step before
    gain: float | torch.Tensor = 0.0 # the share of the trend to go on by; (B, N, 1) if it is measured
    memory: object = None            # offload.HostMemory, if some layers' caches live on the host
    sparse_steps: int = 0            # so far, of those that can be replayed
    recorded: object = None          # replay.Recorded, once one of them was

    def remember(self, step, v):
        """The velocity of a computed step, if any step is skipped."""
        if not self.sparsity.skip:
            return
        if self.last and self.sparsity.extrapolate != 0:
            index, before = self.last
            trend = (v - before) / (step.index - index)
            self.gain = explained(trend, self.trend) if self.sparsity.extrapolate is None else self.sparsity.extrapolate
            self.trend = trend
        self.last = step.index, v

    def recall(self, step):
        """The velocity of a skipped step: the last one, and beyond it a share of the trend. Not to be changed in place:
        it may be what the state remembers."""
        index, v = self.last
        return v if self.trend is None else v + self.gain * (step.index - index) * self.trend


def explained(trend, before):
    """How much of each token's trend (B, N, channels) the one before it explains: the square of their cosine, 0 if they
    point apart. -> (B, N, 1) in 0..1; 0.0 if there is none before"""
    if before is None:
        return 0.0
    return F.cosine_similarity(trend, before, dim=-1)[..., None].clamp(min=0).square()


def make_state(layers, sparsity, pooled_columns, static, seed, device):
    """A fresh ModelState for a model of `layers` blocks; None without a sparsity: nothing is remembered.
    pooled_columns: how many columns, from the first, the blocks of delta="pooled" cover; those behind them must be
    static. static (Nk,) or (G, Nk) bool: columns always kept; None: none."""
    if sparsity is None:
        return None
    dense = layers if sparsity.delta == "none" else min(sparsity.dense_layers, layers)
    most = 0 if static is None else int(static.sum(-1).max())
    states = [LayerState(sparsity, pooled_columns, static, most, (seed * layers + i) % 2**31,
                         *torch.zeros(2, device=device)) for i in range(dense, layers)]
    return ModelState([None] * dense + states, sparsity)


def chipmunk_attention(q, k, v, layer_state, step):
    """softmax(q k^T / sqrt(D)) v, with q (B, H, N, D), k and v (B, H, Nk, D): dense without layer_state, else as `step`
    says. -> (B, H, N, D)"""
    if layer_state is None:
        return F.scaled_dot_product_attention(q, k, v)
    s, sparsity, n = layer_state, layer_state.sparsity, layer_state.pooled_columns

    def with_columns(base, sign):
        """base plus or minus the attention to the columns S, and to the means of the others. -> (B, H, N, D)"""
        s.attn_work += s.attn_share
        pooled = Pooled(block_means(k, n), block_means(v, n), s.unlisted) if sparsity.delta == "pooled" else None
        return column_sparse_attention(q, k, v, s.lse, s.columns, s.counts, base, sign, pooled)

    if step.mode == "sparse":
        rest = s.o_rest                                              # (B, H, N, D)
        if s.drift is not None:
            rest = rest.add(s.drift.to(q.dtype), alpha=step.age)
        return with_columns(rest, 1)
    s.attn_work += 1
    if step.mode == "measure":
        o, s.lse, mass = attention_with_column_mass(q, k, v, s.lse)
        if sparsity.delta == "pooled":                               # a column counts for what its block's mean misses
            mean = block_means(v, n).repeat_interleave(POOL, 2)[:, :, :n]        # (B, H, n, D)
            mass[..., :n] *= (v[:, :, :n] - mean).norm(dim=-1)[:, :, None]       # (B, H, G, n)
        chosen = choose_columns(mass, sparsity.attn_keep, sparsity.attn_random, s.static, _seed(s, step), s.static_most)
        del mass                                                     # (B, H, G, Nk) is large
    else:
        o, s.lse = attention(q, k, v)
    if step.mode == "dense":
        return o
    if step.age and (sparsity.drift or step.mode == "refresh"):      # there are columns of a step before
        rest = with_columns(o, -1)                                   # (B, H, N, D), of the same columns as o_rest
        if sparsity.drift:
            most = torch.finfo(torch.float8_e5m2).max                # beyond, 8 bits hold infinity
            s.drift = ((rest - s.o_rest) / step.age).clamp(-most, most).to(torch.float8_e5m2)
    if step.mode == "measure":
        s.columns, s.counts = chosen
        if sparsity.delta == "pooled":
            s.unlisted = count_unlisted(s.columns, s.counts, n)                  # (B, H, G, M)
        s.attn_share = _share(s.counts, k.shape[2], s.unlisted)
        rest = with_columns(o, -1)
    s.o_rest = rest
    return o


def chipmunk_mlp(x, w1, b1, w2, b2, layer_state, step):
    """W2 gelu(W1 x + b1) + b2, with x (B, N, C), w1 (F, C), b1 (F,), w2 (C, F), b2 (C,) or None: dense without
    layer_state, else as `step` says. -> (B, N, C), which the next step updates in place: use it before then. On a GPU
    w2 must be stored column after column (Flux.lay_out_for_deltas)."""
    if layer_state is None or x.shape[1] == 0:                       # one of several GPUs may have no rows of a picture
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
    s, sparsity, rows = layer_state, layer_state.sparsity, x.shape[1]
    if step.mode == "sparse" and sparsity.mlp_keep:
        delta = sparse_mlp_fc1(x, w1, b1, s.mlp_columns, s.mlp_counts, s.act)    # (B, G, K, 128)
        s.out = sparse_mlp_fc2(delta, w2.t(), s.mlp_columns, s.mlp_counts, s.out)            # (B, N, C)
        s.mlp_work.add_(s.mlp_share, alpha=rows)
        return s.out
    keep = sparsity.mlp_keep and step.mode != "dense"
    if keep:                                                         # W1 x^T, not x W1^T: to transpose that is slow
        s.act = F.gelu(torch.baddbmm(b1[:, None], w1.expand(len(x), -1, -1), x.mT), approximate="tanh")  # (B, F, N)
        act = s.act.mT                                                           # (B, N, F)
    else:
        act = F.gelu(F.linear(x, w1, b1), approximate="tanh")                    # (B, N, F)
    out = F.linear(act, w2, b2)                                                  # (B, N, C)
    s.mlp_work += rows
    if sparsity.mlp_keep:
        sample = act[:, ::SAMPLED].clone(memory_format=torch.contiguous_format)  # (B, N / 8, F); a view keeps all
        if step.mode == "measure":
            moved = movement(sample, s.sample) * w2.norm(dim=0)                  # (B, G, F)
            columns, counts = choose_columns(moved[:, None], sparsity.mlp_keep, 0.0, None, seed=0)
            s.mlp_columns, s.mlp_counts = columns[:, 0], counts[:, 0]            # (B, G, K), (B, G, P)
            s.mlp_share = _share(s.mlp_counts, w1.shape[0])
        if keep:
            s.out = out
        s.sample = sample
    return out


def movement(now, before):
    """How far hidden columns moved in each group's sampled rows: root of the sum of squares. (B, N / 8, F) each
    -> (B, G, F)"""
    change, per_group = now - before, GROUP // SAMPLED
    if change.shape[1] % per_group:                                  # else pad would copy all the same
        change = F.pad(change, (0, 0, 0, -change.shape[1] % per_group))
    precision = torch.promote_types(change.dtype, torch.float32)
    return torch.linalg.vector_norm(change.unflatten(1, (-1, per_group)), dim=2, dtype=precision)


def _share(counts, n, unlisted=None):
    """The share of n columns that is computed, means included. It stays on the device: nothing waits for it. -> ()"""
    means = 0 if unlisted is None else unlisted.shape[-1]
    return (counts[..., -1].float().mean() + means) / n


def _seed(layer_state, step):
    if not layer_state.sparsity.attn_random:                         # for a number that changes, all compiles again
        return 0
    return (layer_state.seed * 1_000_003 + step.index) % 2**31       # another draw for every layer and step
