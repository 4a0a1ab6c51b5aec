"""Every kernel of Chipmunk (arXiv 2506.03275), twice: as plain PyTorch and in Triton.

Query rows come in groups of GROUP neighbours that share one list of key columns:

    o_i = sum_{j in S_g} exp(s_ij - lse_S) v_j,    s = q k^T / sqrt(D),    i in group g

    attention                   dense                                    o, lse
    attention_with_column_mass  dense, and who gets attended to          o, lse, mass
    choose_columns              mass -> the columns S_g of every group   columns, counts
    column_sparse_attention     softmax over S_g only                    o_S, lse_S
    split_off_columns           dense minus S_g: what a cache holds      o_rest, lse_rest
    add_columns                 the cache plus a fresh S_g               o
    sparse_mlp_fc1 / _fc2       the same idea for the hidden columns of an MLP, as exact deltas
    pack_mask / unpack_mask     bool <-> bits, for masks worth storing; the models keep lists

X_ref is the definition of X, X_triton the kernel with the same signature, X itself picks: Triton on
a GPU, the definition elsewhere. Kernels also run on a CPU under TRITON_INTERPRET=1.
Shapes: B batch, H heads, N tokens (Nq query rows, Nk columns), D head dimension, G = ceil(Nq / GROUP),
K capacity of a list; list entries at or past counts are padding and never used.
"""
from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

GROUP = 128                     # query rows per group: the [128, 1] pattern
LOG2E = 1.0 / math.log(2.0)     # kernels use exp2; the public lse is a natural logarithm
TINY_REST = 2.0 ** -17          # a rest with a smaller share of the softmax is the rounding of an fp32 lse: nothing is left


# ---------------------------------------------------------------------------------------------------
# definitions


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(q k^T / sqrt(D) + bias), o = p v, and lse -> o, lse, p; rows of -inf give 0, -inf, 0."""
    s = q.to(_wide(q)) / math.sqrt(q.shape[-1]) @ k.to(_wide(q)).mT                # (..., rows, columns)
    if bias is not None:
        s += bias
    top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)            # (..., rows, 1)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)                                                # (..., rows, 1): 0, or at least 1
    p /= total.clamp_min(1)
    return p @ v.to(p.dtype), (top + total.log())[..., 0], p                       # (..., rows, D), (..., rows)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, _ = _softmax(q, k, v)                                                  # (B, H, Nq, D), (B, H, Nq)
    return o.to(q.dtype), lse


def attention_with_column_mass_ref(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = []
    for q_g, prev in zip(q.split(GROUP, 2), lse_prev.split(GROUP, 2)):             # (B, H, GROUP, D), (B, H, GROUP)
        o, lse, p = _softmax(q_g, k, v)
        groups.append((o, lse, (lse - prev).clamp(max=80).exp()[..., None, :] @ p))     # (B, H, 1, Nk); 128 exp(80) is finite
    o, lse, mass = (torch.cat(parts, 2) for parts in zip(*groups))
    return o.to(q.dtype), lse, mass.to(_mass_dtype(q))


def _mass_dtype(q: Tensor) -> torch.dtype:
    """bfloat16 for half-precision inputs: 24 heads and 119,056 tokens have 2.7 billion masses."""
    return q.dtype if q.dtype in (torch.float32, torch.float64) else torch.bfloat16


def _list_sizes(n: int, keep: float, random: float, static_most: int) -> tuple[int, int]:
    """Columns taken by mass, and K: room for them, the static ones, and the random ones (mean + 6 sigma)."""
    top = min(n, math.ceil(keep * n))
    lucky = math.ceil(n * random + 6 * math.sqrt(n * random * (1 - random)))
    K = max(1, min(n, top + lucky + static_most))
    return top, -(-K // 16) * 16                                                   # rows of K entries stay aligned


def _hash(seed: int, row: Tensor, column: Tensor) -> Tensor:
    """24 random bits of (seed, row, column), int64 tensors of 32-bit values; _hash_kernel in uint32 is the same."""
    x = (seed & 0x7FFFFFFF) ^ (row * 0x9E3779B1 & 0xFFFFFFFF)
    for key in (0, column):
        x = x ^ key
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return x >> 8


def choose_columns_ref(mass: Tensor, keep: float, random: float, static: Tensor | None, seed: int,
                       static_most: int) -> tuple[Tensor, Tensor]:
    G, N = mass.shape[-2:]
    top, K = _list_sizes(N, keep, random, static_most)
    group = torch.arange(G, device=mass.device)[:, None]
    column = torch.arange(N, device=mass.device)

    chosen = _hash(seed, group, column) < round(random * 2 ** 24)                  # (G, N)
    if static is not None:
        chosen = chosen | static
    if top > 0:
        least = mass.topk(top, sorted=True).values[..., -1:]                       # (..., G, 1)
        above, tied = mass > least, (mass == least) & ~chosen
        chosen = chosen | above | tied & (tied.cumsum(-1) <= top - above.sum(-1, keepdim=True))
    chosen = chosen.expand(mass.shape)                                             # (..., G, N)

    slot = torch.where(chosen, chosen.cumsum(-1) - 1, K).clamp(max=K)              # K: not in the list
    columns = torch.zeros(*mass.shape[:-1], K + 1, dtype=torch.int32, device=mass.device)
    columns.scatter_(-1, slot, column.to(torch.int32).expand(mass.shape))
    counts = chosen.sum(-1, dtype=torch.int32).clamp(max=K)                        # (..., G)
    return columns[..., :K].contiguous(), counts


def column_sparse_attention_ref(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, counts: Tensor,
                                o: Tensor | None = None, lse: Tensor | None = None,
                                epilogue: str = "none") -> tuple[Tensor, Tensor | None]:
    (B, H, Nq, D), Nk = q.shape, k.shape[2]
    columns = columns[..., :max(1, int(counts.max()))]                             # (B, H, G, K)
    listed = torch.arange(columns.shape[-1], device=q.device) < counts[..., None]  # (B, H, G, K)
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1)
    index = torch.where(listed, columns, Nk) + head * (Nk + 1)                     # Nk: a row of zeros for padding
    k_S, v_S = (F.pad(x, (0, 0, 0, 1)).reshape(-1, D).index_select(0, index.flatten()).view(*index.shape, D)
                for x in (k, v))                                                   # (B, H, G, K, D)

    q_g = F.pad(q, (0, 0, 0, -Nq % GROUP)).unflatten(2, (-1, GROUP))               # (B, H, G, GROUP, D)
    bias = torch.where(listed, 0.0, -torch.inf)[..., None, :]                      # (B, H, G, 1, K)
    o_S, lse_S, _ = _softmax(q_g, k_S, v_S, bias)                                  # (B, H, G, GROUP, D)
    o_S, lse_S = (x.flatten(2, 3)[:, :, :Nq] for x in (o_S, lse_S))                # (B, H, Nq, D), (B, H, Nq)

    if lse is None and epilogue != "none":
        o_S, lse_S = (o - o_S if epilogue == "split" else o + o_S), None
    elif epilogue == "split":
        share = torch.exp(lse_S - lse)[..., None]                                  # (B, H, Nq, 1)
        left = torch.where(1 - share > TINY_REST, 1 - share, 0)
        o_S = torch.where(left > 0, (o - share * o_S) / left, 0)
        lse_S = lse + left[..., 0].log()
    elif epilogue == "add":
        share = torch.where(lse_S == -torch.inf, 0, torch.sigmoid(lse_S - lse))[..., None]
        o_S, lse_S = o + share * (o_S - o), None
    return o_S.to(q.dtype).contiguous(), lse_S if lse_S is None else lse_S.contiguous()


def _each_group(columns: Tensor, counts: Tensor):
    """Yield (b, g, the rows of group g, its listed columns)."""
    for b, row in enumerate(counts.tolist()):
        for g, count in enumerate(row):
            yield b, g, slice(g * GROUP, (g + 1) * GROUP), columns[b, g, :count].long()


def sparse_mlp_fc1_ref(x: Tensor, w1: Tensor, b1: Tensor | None, columns: Tensor, counts: Tensor, act: Tensor) -> Tensor:
    delta = x.new_zeros(*columns.shape, GROUP)                                     # (B, G, K, GROUP)
    for b, g, rows, listed in _each_group(columns, counts):
        a = w1.index_select(0, listed).to(_wide(x)) @ x[b, rows].to(_wide(x)).mT   # (count, GROUP)
        new = F.gelu(a if b1 is None else a.add_(b1[listed, None]), approximate="tanh").to(act.dtype)
        delta[b, g, :len(listed), :new.shape[1]] = new.to(_wide(x)) - act[b, :, rows].index_select(0, listed)
        act[b, :, rows].index_copy_(0, listed, new)
    return delta


def sparse_mlp_fc2_ref(delta: Tensor, w2t: Tensor, columns: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    for b, g, rows, listed in _each_group(columns, counts):
        packed = delta[b, g, :len(listed), :out[b, rows].shape[0]]                 # (count, GROUP)
        out[b, rows] += packed.mT.to(_wide(delta)) @ w2t.index_select(0, listed).to(_wide(delta))   # (GROUP, C)
    return out


def pack_mask_ref(mask: Tensor) -> Tensor:
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))            # (..., ceil(N / 8), 8)
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << place).sum(-1, dtype=torch.uint8)                              # (..., ceil(N / 8))


def unpack_mask_ref(bits: Tensor, n: int) -> Tensor:
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = bits[..., None] >> place & 1                                            # (..., ceil(N / 8), 8)
    return mask.bool().flatten(-2)[..., :n].contiguous()                           # (..., N)


# ---------------------------------------------------------------------------------------------------
# kernels


def _jit(fn):
    """triton.jit, or the function as it is where Triton is not installed."""
    return fn if triton is None else triton.jit(fn)


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_triton() -> None:
    if triton is None:
        raise ImportError("Triton is not installed; the functions ending in _ref run without it")


def _check(*tensors: Tensor) -> None:
    """What the matrix kernels ask of their operands."""
    _require_triton()
    dtypes = {x.dtype for x in tensors}
    _need(len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16, torch.float32},
          f"operands must share one of float16, bfloat16, float32; got {dtypes}")
    _need(all(x.stride(-1) == 1 for x in tensors), "the last dimension of an operand must have stride 1")


def _attention_config(q: Tensor, k: Tensor, v: Tensor, warps: int, stages: int) -> dict:
    """Constants of the attention kernels. WIDE: offsets into k or v pass 2^31; where they do not, 32-bit ones are faster."""
    D, dtype = q.shape[-1], q.dtype
    _need(D in (16, 32, 64, 128), f"head dimension must be 16, 32, 64 or 128; got {D}")
    return dict(BLOCK_M=GROUP, BLOCK_N=16 if dtype == torch.float32 else 64,    # exact fp32 runs in registers, without tensor cores
                D=D, LOG2E=LOG2E, WIDE=k.shape[2] * max(k.stride(2), v.stride(2)) >= 2**31, num_warps=warps, num_stages=stages)


@_jit
def _attend(q, k_ptr, v_ptr, stride_kn, stride_vn, index, listed, scale, acc, m, l,
            D: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, RUNNING: tl.constexpr):
    """One tile of columns into a softmax: p = exp2(s scale - m), acc (rows, D) += p v, l (rows,) += sum of p.
    m (rows,): the maximum of s scale so far if RUNNING, else as given."""
    d = tl.arange(0, D)
    if WIDE:
        index = index.to(tl.int64)
    k_at = k_ptr + index[:, None] * stride_kn + d[None, :]
    v_at = v_ptr + index[:, None] * stride_vn + d[None, :]
    if TAIL:
        k = tl.load(k_at, mask=listed[:, None], other=0.0)                          # (columns, D)
        v = tl.load(v_at, mask=listed[:, None], other=0.0)                          # (columns, D)
    else:
        k = tl.load(k_at)                                                           # (columns, D)
        v = tl.load(v_at)                                                           # (columns, D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")                              # (rows, columns)
    if TAIL:
        s = tl.where(listed[None, :], s, -float("inf"))
    if RUNNING:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)                                 # (rows,)
        shrink = tl.exp2(m - m_new)
        acc *= shrink[:, None]
        l *= shrink
        m = m_new
    p = tl.exp2(s * scale - m[:, None])                                             # (rows, columns)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, m, l + tl.sum(p, 1), p


@_jit
def _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, mass_ptr, m, Nk, scale,
                BLOCK_N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """A group of rows against all columns -> acc, m, l as in _attend. With mass_ptr, m stays as given, and sums of p over
    the rows are written there, divided by the 2^8 that _dense_kernel put into m and at most 1e38, which is finite in bfloat16."""
    lane = tl.arange(0, BLOCK_N)
    acc = tl.zeros((m.shape[0], D), tl.float32)
    l = tl.zeros_like(m)
    full = Nk // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc, m, l, p = _attend(q, k_ptr, v_ptr, stride_kn, stride_vn, start + lane, None, scale, acc, m, l,
                               D, WIDE, False, mass_ptr is None)
        if mass_ptr is not None:
            tl.store(mass_ptr + start + lane, tl.minimum(tl.sum(p, 0) / 256, 1e38))
    if full < Nk:
        there = full + lane < Nk
        acc, m, l, p = _attend(q, k_ptr, v_ptr, stride_kn, stride_vn, full + lane, there, scale, acc, m, l,
                               D, WIDE, True, mass_ptr is None)
        if mass_ptr is not None:
            tl.store(mass_ptr + full + lane, tl.minimum(tl.sum(p, 0) / 256, 1e38), mask=there)
    return acc, m, l


@_jit
def _dense_kernel(q_ptr, k_ptr, v_ptr, lse_prev_ptr, o_ptr, lse_ptr, mass_ptr,
                  stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                  H, Nq, Nk, scale,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, LOG2E: tl.constexpr, WIDE: tl.constexpr):
    """One program: one group of rows against all columns. Groups of a head run side by side: its k, v stay in L2."""
    g, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    rows, d = g * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q_at = q_ptr + b * stride_qb + h * stride_qh + rows.to(tl.int64)[:, None] * stride_qn + d[None, :]
    q = tl.load(q_at, mask=rows[:, None] < Nq, other=0.0)                           # (rows, D)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh

    lowest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if lse_prev_ptr is None:
        acc, m, l = _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, None, lowest, Nk, scale, BLOCK_N, D, WIDE)
    else:
        # The last lse is so near this one that it serves as the softmax's maximum: nothing to find, nothing to rescale, and
        # the sum of p over rows is the mass. 2^8 times larger, the p of even attention over 100,000 columns is normal in fp16.
        prev = tl.load(lse_prev_ptr + head * Nq + rows, mask=rows < Nq, other=float("inf"))    # inf: p = 0
        mass_ptr += (head * tl.num_programs(0) + g) * Nk
        acc, m, l = _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, mass_ptr, prev * LOG2E - 8, Nk, scale, BLOCK_N, D, WIDE)
        if q_ptr.dtype.element_ty == tl.float16:
            near = tl.abs(tl.log2(l) - 8) < 7
        else:
            near = tl.abs(tl.log2(l) - 8) < 60
        if tl.sum((near | (rows >= Nq)).to(tl.int32)) < BLOCK_M:    # far away after all: the mass stands, o needs the maximum
            acc, m, l = _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, None, lowest, Nk, scale, BLOCK_N, D, WIDE)

    o_at = o_ptr + (head * Nq + rows)[:, None] * D + d[None, :]
    tl.store(o_at, (acc / l[:, None]).to(o_ptr.dtype.element_ty), mask=rows[:, None] < Nq)
    tl.store(lse_ptr + head * Nq + rows, (m + tl.log2(l)) / LOG2E, mask=rows < Nq)


def attention_with_column_mass_triton(q: Tensor, k: Tensor, v: Tensor,
                                      lse_prev: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    _check(q, k, v)
    (B, H, Nq, D), Nk = q.shape, k.shape[2]
    G = triton.cdiv(Nq, GROUP)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    mass = None
    if lse_prev is not None:
        lse_prev = lse_prev.contiguous()
        mass = torch.empty(B, H, G, Nk, dtype=_mass_dtype(q), device=q.device)
    # fastest on an H200 at D = 128; the sums over rows are cheaper with fewer warps
    config = _attention_config(q, k, v, 8, 3) if mass is None else _attention_config(q, k, v, 4, 2)
    _dense_kernel[(G, B * H)](q, k, v, lse_prev, o, lse, mass, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                              H, Nq, Nk, LOG2E / math.sqrt(D), **config)
    return o, lse, mass


def attention_triton(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention_with_column_mass_triton(q, k, v, None)[:2]


@_jit
def _hash_kernel(seed, row, column):
    """24 random bits of (seed, row, column); the same function as _hash, in uint32."""
    x = tl.cast(seed, tl.uint32) ^ tl.cast(row, tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16) ^ column.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >> 8


@_jit
def _always_kernel(always_ptr, static_ptr, stride_static, seed, threshold, N, BLOCK: tl.constexpr):
    """The random and static columns of every group, the same for all heads."""
    group, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    always = _hash_kernel(seed, group, column) < threshold
    if static_ptr is not None:
        always |= tl.load(static_ptr + group.to(tl.int64) * stride_static + column, mask=column < N, other=0) != 0
    tl.store(always_ptr + group.to(tl.int64) * N + column, always.to(tl.uint8), mask=column < N)


@_jit
def _find_least(bits_ptr, n, step, top, lo, hi, END: tl.constexpr, BLOCK: tl.constexpr):
    """The top-th largest of n numbers, `step` apart, and how many of its equals belong to the top.

    They are counted in 62 bins over lo..hi-1 and one bin on either side; the bin that holds the one sought is the next lo..hi-1.
    lo..hi-1 may be a guess: if it is wrong, an outer bin holds it."""
    lane, bins = tl.arange(0, BLOCK), tl.arange(0, 64)
    missing = top
    lo, hi = lo.to(tl.int64), hi.to(tl.int64)                                       # hi may be 2^31
    while hi - lo > 1:
        shift = 0
        while (hi - lo - 1) >> shift >= 62:
            shift += 1
        counted = tl.zeros((64,), tl.int32)
        for start in range(0, n, BLOCK):
            at = start + lane
            bits = tl.load(bits_ptr + at * step, mask=at < n, other=0).to(tl.int32)
            inner = (bits - lo.to(tl.int32) >> shift) + 1
            counted += tl.histogram(tl.minimum(tl.maximum(inner, 0), 63), 64, mask=at < n)
        at_least = tl.cumsum(counted, 0, reverse=True)                              # (64,)
        bin = tl.sum((at_least >= top).to(tl.int32)) - 1
        missing = top - tl.sum(tl.where(bins > bin, counted, 0))
        if bin == 0:
            hi = lo
            lo = lo * 0
        elif bin == 63:
            lo = hi
            hi = hi * 0 + END
        else:
            lo += (bin - 1).to(tl.int64) << shift
            hi = lo + (1 << shift)
    return lo.to(tl.int32), missing


@_jit
def _choose_kernel(bits_ptr, always_ptr, columns_ptr, counts_ptr, stride_always, top, G, N, K,
                   BITS: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one group. Find the top-th largest mass, then list what is chosen in order.
    Non-negative floats are ordered as their bits are, so that masses are compared as integers below END."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    bits_ptr += row * N
    if always_ptr is not None:
        always_ptr += row % G * stride_always

    # A sample brackets the answer, so that mostly one count of the whole row is enough.
    END: tl.constexpr = (1 << BITS - 1) - 1
    lo, hi = top * 0, top * 0 + END
    if N >= 4 * SAMPLE:
        guess, _ = _find_least(bits_ptr, SAMPLE, N // SAMPLE, (tl.cast(top, tl.int64) * SAMPLE // N).to(tl.int32), lo, hi, END, SAMPLE)
        lo = tl.maximum(guess - (31 << BITS - 16), 0)
        hi = tl.minimum(guess, END - (31 << BITS - 16)) + (31 << BITS - 16)
    least, missing = _find_least(bits_ptr, N, 1, top, lo, hi, END, BLOCK)

    count = 0
    for start in range(0, N, BLOCK):
        column = start + lane
        inside = column < N
        bits = tl.load(bits_ptr + column, mask=inside, other=0).to(tl.int32)
        sure = bits > least
        if always_ptr is not None:
            sure |= tl.load(always_ptr + column, mask=inside, other=0) != 0
        sure &= inside
        tied = inside & (bits == least) & (sure == 0)
        both = tl.cumsum(sure.to(tl.int32) + (tied.to(tl.int32) << 16), 0)          # two counts in one scan
        total = tl.sum(sure.to(tl.int32) + (tied.to(tl.int32) << 16))
        taken = tl.minimum(both >> 16, missing)                                     # of equals, the first
        slot = count + (both & 0xFFFF) + taken - 1
        tl.store(columns_ptr + row * K + slot, column, mask=(sure | tied & (both >> 16 <= missing)) & (slot < K))
        count += (total & 0xFFFF) + tl.minimum(total >> 16, missing)
        missing -= tl.minimum(total >> 16, missing)
    tl.store(counts_ptr + row, tl.minimum(count, K))


def choose_columns_triton(mass: Tensor, keep: float, random: float, static: Tensor | None, seed: int,
                          static_most: int) -> tuple[Tensor, Tensor]:
    _require_triton()
    bits = {torch.float32: torch.uint32, torch.float16: torch.uint16, torch.bfloat16: torch.uint16}
    _need(mass.dtype in bits, f"mass must be float32, float16 or bfloat16, got {mass.dtype}")
    G, N = mass.shape[-2:]
    top, K = _list_sizes(N, keep, random, static_most)
    static = None if static is None else static.contiguous().view(torch.uint8)
    always, stride = static, N if static is not None and static.ndim == 2 else 0
    if random > 0:
        always = torch.empty(G, N, dtype=torch.uint8, device=mass.device)
        _always_kernel[(G, triton.cdiv(N, 1024))](always, static, stride, seed & 0x7FFFFFFF, round(random * 2 ** 24), N, BLOCK=1024)
        stride = N
    columns = torch.zeros(*mass.shape[:-1], K, dtype=torch.int32, device=mass.device)
    counts = torch.empty(mass.shape[:-1], dtype=torch.int32, device=mass.device)
    # fastest on an H100: larger samples cost more than the counts they spare, larger tiles more registers
    _choose_kernel[(counts.numel(),)](mass.contiguous().view(bits[mass.dtype]), always, columns, counts, stride, top, G, N, K,
                                      BITS=8 * mass.itemsize, SAMPLE=1024, BLOCK=1024, num_warps=4)
    return columns, counts


@_jit
def _column_sparse_kernel(q_ptr, k_ptr, v_ptr, columns_ptr, counts_ptr, base_ptr, base_lse_ptr, o_ptr, lse_ptr,
                          stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                          stride_vb, stride_vh, stride_vn, stride_bb, stride_bh, stride_bn,
                          H, Nq, K, scale, TINY_REST: tl.constexpr, EPILOGUE: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, LOG2E: tl.constexpr, WIDE: tl.constexpr):
    """One program: one group of rows against its listed columns; then it splits them off or adds them."""
    g, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    rows, d, lane = g * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, BLOCK_N)
    q_at = q_ptr + b * stride_qb + h * stride_qh + rows.to(tl.int64)[:, None] * stride_qn + d[None, :]
    q = tl.load(q_at, mask=rows[:, None] < Nq, other=0.0)                           # (rows, D)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    group = head * tl.num_programs(0) + g
    columns_ptr += group * K
    count = tl.load(counts_ptr + group)

    base_at = base_ptr + b * stride_bb + h * stride_bh + rows.to(tl.int64)[:, None] * stride_bn + d[None, :]
    if EPILOGUE == "add" and base_lse_ptr is not None:                              # the softmax goes on where the rest's ended
        acc = tl.load(base_at, mask=rows[:, None] < Nq, other=0.0).to(tl.float32)   # (rows, D)
        m = tl.load(base_lse_ptr + head * Nq + rows, mask=rows < Nq, other=0.0) * LOG2E
        l = tl.where(m > -float("inf"), 1.0, 0.0)                                   # (rows,)
    else:
        acc = tl.zeros((BLOCK_M, D), tl.float32)
        m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)
    full = count // BLOCK_N * BLOCK_N
    index = tl.load(columns_ptr + lane, mask=lane < count, other=0)                 # (columns,)
    for start in range(0, full, BLOCK_N):
        ahead = start + BLOCK_N + lane
        index_ahead = tl.load(columns_ptr + ahead, mask=ahead < count, other=0)     # a tile ahead of its k, v
        acc, m, l, _ = _attend(q, k_ptr, v_ptr, stride_kn, stride_vn, index, None, scale, acc, m, l, D, WIDE, False, True)
        index = index_ahead
    if full < count:
        listed = full + lane < count
        acc, m, l, _ = _attend(q, k_ptr, v_ptr, stride_kn, stride_vn, index, listed, scale, acc, m, l, D, WIDE, True, True)

    o = acc / tl.where(l > 0, l, 1.0)[:, None]                                      # (rows, D); 0 in an empty list
    lse = m + tl.log2(tl.where(l > 0, l, 1.0))                                      # (rows,) in log2; -inf there
    if EPILOGUE == "split" or EPILOGUE == "add" and base_lse_ptr is None:
        base = tl.load(base_at, mask=rows[:, None] < Nq, other=0.0).to(tl.float32)  # (rows, D)
        if base_lse_ptr is None:
            o = base - o if EPILOGUE == "split" else base + o
        else:
            base_lse = tl.load(base_lse_ptr + head * Nq + rows, mask=rows < Nq, other=0.0) * LOG2E
            share = tl.exp2(lse - base_lse)
            left = tl.where(1.0 - share > TINY_REST, 1.0 - share, 0.0)
            o = (base - share[:, None] * o) / tl.where(left > 0, left, float("inf"))[:, None]
            lse = base_lse + tl.log2(left)

    o_at = o_ptr + (head * Nq + rows)[:, None] * D + d[None, :]
    tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=rows[:, None] < Nq)
    if lse_ptr is not None:
        tl.store(lse_ptr + head * Nq + rows, lse / LOG2E, mask=rows < Nq)


def column_sparse_attention_triton(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, counts: Tensor,
                                   o: Tensor | None = None, lse: Tensor | None = None,
                                   epilogue: str = "none") -> tuple[Tensor, Tensor | None]:
    _check(q, k, v)
    B, H, Nq, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out_lse = None
    if epilogue == "none" or epilogue == "split" and lse is not None:
        out_lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    base = q if o is None else o if o.stride(-1) == 1 else o.contiguous()           # q: never read
    # 8 warps, 3 stages: fastest for long lists on an H100
    _column_sparse_kernel[(triton.cdiv(Nq, GROUP), B * H)](
        q, k, v, columns.contiguous(), counts.contiguous(), base, None if lse is None else lse.contiguous(), out, out_lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *base.stride()[:3], H, Nq, columns.shape[-1],
        LOG2E / math.sqrt(D), TINY_REST=TINY_REST, EPILOGUE=epilogue, **_attention_config(q, k, v, 8, 3))
    return out, out_lse


@_jit
def _mlp_fc1_kernel(x_ptr, w1_ptr, b1_ptr, columns_ptr, counts_ptr, act_ptr, delta_ptr,
                    stride_xb, stride_xm, stride_w, stride_ab, stride_af, M, K, C,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: one group of rows, one tile of its listed hidden columns."""
    g, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group = b * tl.num_programs(0) + g
    rows = g * BLOCK_M + tl.arange(0, BLOCK_M)
    slot, c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    count = tl.load(counts_ptr + group)
    listed = slot < count
    hidden = tl.load(columns_ptr + group * K + slot, mask=listed, other=0).to(tl.int64)       # (columns,)
    width = tl.where(tl.program_id(1) * BLOCK_N < count, C, 0)      # nothing listed: just write the zeros

    # absent rows and columns read valid memory and are not stored: no masks in the loop
    x_at = x_ptr + b * stride_xb + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm + c[None, :]
    w_at = w1_ptr + hidden[:, None] * stride_w + c[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, width, BLOCK_C):
        acc = tl.dot(tl.load(w_at + start), tl.trans(tl.load(x_at + start)), acc, input_precision="ieee")    # (columns, rows)
    if b1_ptr is not None:
        acc += tl.load(b1_ptr + hidden).to(tl.float32)[:, None]
    # gelu_tanh(a) = a sigmoid(2 sqrt(2 / pi) (a + 0.044715 a^3))
    new = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    new = new.to(act_ptr.dtype.element_ty)                                          # (columns, rows)
    inside = listed[:, None] & (rows < M)[None, :]
    act_at = act_ptr + b * stride_ab + hidden[:, None] * stride_af + rows[None, :]
    old = tl.load(act_at, mask=inside, other=0.0)
    tl.store(act_at, new, mask=inside)
    delta = tl.where(inside, new.to(tl.float32) - old.to(tl.float32), 0.0)
    delta_at = delta_ptr + (group * K + slot)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(delta_at, delta.to(delta_ptr.dtype.element_ty), mask=(slot < K)[:, None])


@_jit
def _mlp_fc2_kernel(delta_ptr, w2t_ptr, columns_ptr, counts_ptr, out_ptr, stride_w, stride_ob, stride_om, M, K,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """One program: one group of rows, one tile of output channels."""
    g, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group = b * tl.num_programs(0) + g
    rows = g * BLOCK_M + tl.arange(0, BLOCK_M)
    lane, c = tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.load(counts_ptr + group)
    columns_ptr += group * K
    delta_at = delta_ptr + group * K * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    full = count // BLOCK_N * BLOCK_N
    hidden = tl.load(columns_ptr + lane, mask=lane < count, other=0)                # (columns,)
    for start in range(0, full, BLOCK_N):
        ahead = start + BLOCK_N + lane
        hidden_ahead = tl.load(columns_ptr + ahead, mask=ahead < count, other=0)    # a tile ahead of its weights
        if WIDE:
            hidden = hidden.to(tl.int64)
        delta = tl.load(delta_at + (start + lane)[:, None] * BLOCK_M)               # (columns, rows)
        w = tl.load(w2t_ptr + hidden[:, None] * stride_w + c[None, :])              # (columns, channels)
        acc = tl.dot(tl.trans(delta), w, acc, input_precision="ieee")               # (rows, channels)
        hidden = hidden_ahead
    if full < count:
        listed = full + lane < count
        delta = tl.load(delta_at + (full + lane)[:, None] * BLOCK_M, mask=listed[:, None], other=0.0)
        w = tl.load(w2t_ptr + hidden.to(tl.int64)[:, None] * stride_w + c[None, :], mask=listed[:, None], other=0.0)
        acc = tl.dot(tl.trans(delta), w, acc, input_precision="ieee")
    out_at = out_ptr + b * stride_ob + rows.to(tl.int64)[:, None] * stride_om + c[None, :]
    inside = rows[:, None] < M
    tl.store(out_at, (tl.load(out_at, mask=inside, other=0.0) + acc).to(out_ptr.dtype.element_ty), mask=inside)


def _channel_tile(C: int, most: int) -> int:
    """The widest tile that divides C, so that no kernel needs a mask for channels."""
    _need(C % 16 == 0, f"channels must be a multiple of 16, got {C}")
    return min(most, C & -C)


def sparse_mlp_fc1_triton(x: Tensor, w1: Tensor, b1: Tensor | None, columns: Tensor, counts: Tensor, act: Tensor) -> Tensor:
    _check(x, w1)
    _need(act.stride(-1) == 1, "the last dimension of act must have stride 1")
    (B, M, C), (_, G, K) = x.shape, columns.shape
    delta = torch.empty(B, G, K, GROUP, dtype=x.dtype, device=x.device)
    # near the fastest on an H100, and small enough for GPUs with 100 KB of shared memory; fc2 likewise
    _mlp_fc1_kernel[(G, triton.cdiv(K, 128), B)](
        x, w1, None if b1 is None else b1.contiguous(), columns.contiguous(), counts.contiguous(), act, delta,
        *x.stride()[:2], w1.stride(0), *act.stride()[:2], M, K, C, BLOCK_M=GROUP, BLOCK_N=128, BLOCK_C=_channel_tile(C, 64 if x.element_size() == 2 else 32),
        num_warps=4, num_stages=3)
    return delta


def sparse_mlp_fc2_triton(delta: Tensor, w2t: Tensor, columns: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    _check(delta, w2t)
    _need(out.stride(-1) == 1, "the last dimension of out must have stride 1")
    (B, G, K, _), (_, M, C) = delta.shape, out.shape
    tile = _channel_tile(C, 128)
    _mlp_fc2_kernel[(G, C // tile, B)](
        delta.contiguous(), w2t, columns.contiguous(), counts.contiguous(), out, w2t.stride(0), *out.stride()[:2], M, K,
        BLOCK_M=GROUP, BLOCK_N=64 if delta.element_size() == 2 else 32, BLOCK_C=tile,
        WIDE=w2t.shape[0] * w2t.stride(0) >= 2**31, num_warps=8, num_stages=3)
    return out


@_jit
def _pack_kernel(mask_ptr, bits_ptr, N, n_bytes, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte, place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 8)
    column = byte[:, None] * 8 + place[None, :]
    mask = tl.load(mask_ptr + row * N + column, mask=column < N, other=0)           # (bytes, 8)
    bits = tl.sum(mask.to(tl.int32) << place[None, :], 1).to(tl.uint8)              # (bytes,)
    tl.store(bits_ptr + row * n_bytes + byte, bits, mask=byte < n_bytes)


@_jit
def _unpack_kernel(bits_ptr, mask_ptr, N, n_bytes, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + row * n_bytes + column // 8, mask=column < N, other=0)
    tl.store(mask_ptr + row * N + column, bits >> (column % 8).to(tl.uint8) & 1, mask=column < N)


def pack_mask_triton(mask: Tensor) -> Tensor:
    _require_triton()
    N, n_bytes = mask.shape[-1], triton.cdiv(mask.shape[-1], 8)
    bits = torch.empty(*mask.shape[:-1], n_bytes, dtype=torch.uint8, device=mask.device)
    grid = (bits.numel() // n_bytes, triton.cdiv(n_bytes, 1024))
    _pack_kernel[grid](mask.contiguous().view(torch.uint8), bits, N, n_bytes, BLOCK=1024)
    return bits


def unpack_mask_triton(bits: Tensor, n: int) -> Tensor:
    _require_triton()
    mask = torch.empty(*bits.shape[:-1], n, dtype=torch.bool, device=bits.device)
    grid = (mask.numel() // n, triton.cdiv(n, 4096))
    _unpack_kernel[grid](bits.contiguous(), mask.view(torch.uint8), n, bits.shape[-1], BLOCK=4096)
    return mask


# ---------------------------------------------------------------------------------------------------
# the public operations


def _use_triton(x: Tensor) -> bool:
    return x.is_cuda and triton is not None and x.dtype != torch.float64


def _op(schema: str, fake, mutates: tuple[str, ...] = ()):
    """Register with torch.library, so that torch.compile passes through without a graph break.

    schema and fake (the shapes of the results, without computing them) are what torch.library asks for.
    """
    name, signature = schema.split("(", 1)

    def register(fn):
        op = torch.library.custom_op(f"chipmunk::{name}", fn, mutates_args=mutates, schema="(" + signature)
        op.register_fake(fake)
        return functools.update_wrapper(op, fn)
    return register


@_op("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
     lambda q, k, v: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)))
def _attention(q, k, v):
    return attention_triton(q, k, v) if _use_triton(q) else attention_ref(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention that also returns what it normalised by.

    q (B, H, Nq, D), k and v (B, H, Nk, D) -> o (B, H, Nq, D) in q's dtype, lse (B, H, Nq) float32: the
    natural logarithm of the row sums of exp(q k^T / sqrt(D)). The framework's own kernels where they
    return lse; those can be differentiated.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        if torch.cuda.get_device_capability(q.device)[0] < 9:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        o, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]     # on Hopper 1.9x as fast
        return o, lse.view(q.shape[:3])
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return _attention(q, k, v)


@_op("attention_with_column_mass(Tensor q, Tensor k, Tensor v, Tensor lse_prev) -> (Tensor, Tensor, Tensor)",
     lambda q, k, v, lse_prev: (q.new_empty(q.shape), lse_prev.new_empty(q.shape[:3]),
                                q.new_empty(*q.shape[:2], -(-q.shape[2] // GROUP), k.shape[2], dtype=_mass_dtype(q))))
def attention_with_column_mass(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, and how much probability each group of rows gives to each column.

    q (B, H, Nq, D), k and v (B, H, Nk, D), lse_prev (B, H, Nq) of an earlier step -> o, lse as `attention`,
    and mass (B, H, G, Nk), bfloat16 for half-precision inputs: mass[g, j] = sum over rows i of group g of
    exp(s_ij - lse_prev_i). A row's own lse is known only after its last column, so that one pass has to use the previous one. With
    lse_prev = lse each row hands out exactly 1. The column sums of arXiv 2506.03275.
    """
    run = attention_with_column_mass_triton if _use_triton(q) else attention_with_column_mass_ref
    return run(q, k, v, lse_prev)


def _fake_choose_columns(mass, keep, random, static, seed, static_most):
    K = _list_sizes(mass.shape[-1], keep, random, static_most)[1]
    counts = mass.new_empty(mass.shape[:-1], dtype=torch.int32)
    return counts.new_empty(*counts.shape, K), counts


@_op("choose_columns(Tensor mass, float keep, float random, Tensor? static, SymInt seed, int static_most) -> (Tensor, Tensor)",
     _fake_choose_columns)
def _choose_columns(mass, keep, random, static, seed, static_most):
    run = choose_columns_triton if _use_triton(mass) else choose_columns_ref
    return run(mass, keep, random, static, seed, static_most)


def choose_columns(mass: Tensor, keep: float, random: float, static: Tensor | None, seed: int,
                   static_most: int | None = None) -> tuple[Tensor, Tensor]:
    """List the columns of every group: the heaviest, some at random, and those that are always kept.

    mass (..., G, N) not negative; keep, random: shares of N in 0..1; static: bool (N,), (G, N) or
    None; seed: an integer, new for every choice -> columns (..., G, K) int32, counts (..., G) int32.
    Each list is the union, ascending: the ceil(keep N) columns of largest mass (a tie takes those not listed anyway, lower first),
    each column with probability `random` (by a hash of seed, group and column: the same for every head, on
    every device and however heads are spread over them), and the static ones. Entries past counts are 0.
    K is computed from the arguments alone. static_most, the most static columns of any group, is counted
    if not given: that waits for the device once, and torch.compile needs it given.
    """
    _need(0 <= keep <= 1 and 0 <= random <= 1, f"keep and random are shares in 0..1, got {keep} and {random}")
    if static_most is None:
        static_most = 0 if static is None else int(static.sum(-1).max())
    return _choose_columns(mass, keep, random, static, seed, static_most)


def _fake_column_sparse(q, k, v, columns, counts, o, lse, epilogue):
    has_lse = epilogue == "none" or epilogue == "split" and lse is not None
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if has_lse else (0,), dtype=torch.float32)


@_op("column_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor counts, Tensor? o, Tensor? lse, "
     "str epilogue) -> (Tensor, Tensor)", _fake_column_sparse)
def _column_sparse_attention(q, k, v, columns, counts, o, lse, epilogue):
    run = column_sparse_attention_triton if _use_triton(q) else column_sparse_attention_ref
    out, out_lse = run(q, k, v, columns, counts, o, lse, epilogue)
    return out, q.new_empty(0, dtype=torch.float32) if out_lse is None else out_lse


def column_sparse_attention(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each group of rows to its listed columns only.

    q (B, H, Nq, D), k and v (B, H, Nk, D), columns (B, H, G, K) int32, counts (B, H, G) int32 -> o_S
    (B, H, Nq, D) in q's dtype, lse_S (B, H, Nq) float32. An empty list gives o_S = 0 and lse_S = -inf.
    """
    return _column_sparse_attention(q, k, v, columns, counts, None, None, "none")


def split_off_columns(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, counts: Tensor, o: Tensor,
                      lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is left of the dense result o (B, H, Nq, D) without the listed columns: the cache of a measure step.

    Shapes as in `column_sparse_attention` -> o_rest (B, H, Nq, D), lse_rest (B, H, Nq) or None. Two rules:
      lse None   the paper's:  o_rest = o - o_S
      lse given  by mass:      the share of the softmax in S is w = exp(lse_S - lse), and the rest is a softmax of
                               its own: o_rest = (o - w o_S) / (1 - w), lse_rest = lse + log(1 - w); nothing left
                               (w = 1 within rounding) gives o_rest = 0, lse_rest = -inf
    """
    o_rest, lse_rest = _column_sparse_attention(q, k, v, columns, counts, o, lse, "split")
    return o_rest, None if lse is None else lse_rest


def add_columns(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, counts: Tensor, o_rest: Tensor,
                lse_rest: Tensor | None) -> Tensor:
    """Fresh listed columns plus the cached rest: the attention output (B, H, Nq, D) of a sparse step.

    o_rest, lse_rest as `split_off_columns` made them; lse_rest None tells the paper's rule o = o_rest + o_S.
    Otherwise two partial softmaxes merge: o = o_rest + sigmoid(lse_S - lse_rest) (o_S - o_rest).
    Both are the dense result if q, k, v have not changed, or if every column is listed.
    """
    return _column_sparse_attention(q, k, v, columns, counts, o_rest, lse_rest, "add")[0]


@_op("sparse_mlp_fc1(Tensor x, Tensor w1, Tensor? b1, Tensor columns, Tensor counts, Tensor(a!) act) -> Tensor",
     lambda x, w1, b1, columns, counts, act: x.new_empty(*columns.shape, GROUP), ("act",))
def sparse_mlp_fc1(x: Tensor, w1: Tensor, b1: Tensor | None, columns: Tensor, counts: Tensor, act: Tensor) -> Tensor:
    """Recompute the listed hidden columns of gelu_tanh(x w1^T + b1) and say by how much they changed.

    x (B, M, C), w1 (F, C), b1 (F,) or None, columns (B, G, K) int32, counts (B, G) int32, act (B, F, M): the
    cached activation, column after column, so that a column's rows lie side by side; updated in place where listed
    -> delta (B, G, K, GROUP) in x's dtype, a group's columns side by side, 0 in padding.
    delta is new minus old as *stored* in act, so what fc2 has summed up stays the sum of what act holds.
    """
    run = sparse_mlp_fc1_triton if _use_triton(x) else sparse_mlp_fc1_ref
    return run(x, w1, b1, columns, counts, act)


@_op("sparse_mlp_fc2(Tensor delta, Tensor w2t, Tensor columns, Tensor counts, Tensor(a!) out) -> ()",
     lambda delta, w2t, columns, counts, out: None, ("out",))
def _sparse_mlp_fc2(delta, w2t, columns, counts, out):
    run = sparse_mlp_fc2_triton if _use_triton(delta) else sparse_mlp_fc2_ref
    run(delta, w2t, columns, counts, out)


def sparse_mlp_fc2(delta: Tensor, w2t: Tensor, columns: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    """Add packed deltas times the listed rows of w2t onto the cached output, in place.

    delta (B, G, K, GROUP) from `sparse_mlp_fc1`, w2t (F, C): the second weight transposed, columns (B, G, K) int32,
    counts (B, G) int32, out (B, M, C) -> out.
    """
    _sparse_mlp_fc2(delta, w2t, columns, counts, out)
    return out


@_op("pack_mask(Tensor mask) -> Tensor",
     lambda mask: mask.new_empty(*mask.shape[:-1], -(-mask.shape[-1] // 8), dtype=torch.uint8))
def pack_mask(mask: Tensor) -> Tensor:
    """bool (..., N) -> uint8 (..., ceil(N / 8)); bit i of byte n is mask[8 n + i]."""
    return pack_mask_triton(mask) if _use_triton(mask) else pack_mask_ref(mask)


@_op("unpack_mask(Tensor bits, int n) -> Tensor", lambda bits, n: bits.new_empty(*bits.shape[:-1], n, dtype=torch.bool))
def unpack_mask(bits: Tensor, n: int) -> Tensor:
    """uint8 (..., ceil(n / 8)) from `pack_mask` -> bool (..., n)."""
    return unpack_mask_triton(bits, n) if _use_triton(bits) else unpack_mask_ref(bits, n)
