"""Every op of Chipmunk (arXiv 2506.03275) twice: as plain PyTorch, which is its definition, and as a Triton kernel.

GROUP neighbouring query rows share one list S_g of key columns and attend to these columns only:

    o_S_i = sum_{j in S_g} exp(s_ij) v_j / sum_{j in S_g} exp(s_ij),   s = q k^T / sqrt(D)

    op                          in -> out                                      in one phrase
    apply_rope                  x, rope, scale -> x                            what models do to q and k before these:
    attention                   q, k, v -> o, lse                              dense attention
    attention_with_column_mass  q, k, v, lse_prev -> o, lse, mass              and how much each column is attended to
    choose_columns              mass, keep, random, static -> columns, counts  the list S_g of every group
    block_means, count_unlisted x, n -> means; columns, counts, n -> unlisted  means stand in for unlisted columns
    column_sparse_attention     q, k, v, lse_prev, columns, counts, base, sign -> o
                                                                               base plus or minus o_S, with means
    sparse_mlp_fc1              x, w1, b1, columns, counts, act -> delta       how listed hidden columns changed
    sparse_mlp_fc2              delta, w2t, columns, counts, out -> out        their change, added onto the output

The file goes op by op. An op that has a kernel is four functions with the same result. For choose_columns these are:

    choose_columns         the one to call; its docstring says what goes in and what comes out
    choose_columns_ref     the definition, in plain PyTorch
    choose_columns_triton  starts the Triton kernels, which stand above it; under TRITON_INTERPRET=1 also on a CPU
    _choose_columns_op     picks _triton on a GPU and _ref elsewhere; torch.compile does not look inside, but fuses
                           apply_rope_ref

Shapes: B batch, H heads, N tokens (Nq query rows, Nk columns), D head dimension, G = ceil(Nq / GROUP) groups,
K room for columns in a list, P = ceil(Nk / PAGE) pages of 65,536 columns.

A list takes 16 bits a column. Its columns ascend, so those of a page stand side by side:

    columns (..., K) uint16    each column within its page, j mod PAGE
    counts (..., P) int32      how many columns of the list lie in the pages 0..p: where page p ends in the list

So counts[..., -1] is the list's length. Entries from there on are padding and are never used. Up to 65,536 tokens there
is one page, and an entry is the column itself.

The kernels take float16, bfloat16 and float32, a last dimension of stride 1, a D of 16, 32, 64 or 128, and a multiple
of 16 channels in the MLP; otherwise they raise ValueError. float64 runs the definition.
"""
from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

GROUP = 128                     # query rows per group: the [128, 1] pattern
POOL = 64                       # neighbouring columns that one mean stands in for
PAGE = 2 ** 16                  # columns that 16 bits tell apart
EPS = 1e-6                      # of RMS norms
LOG2E = 1.0 / math.log(2.0)     # kernels use exp2; the public lse is a natural logarithm
LIBRARY = None                  # at a reload, the one before has to go first
LIBRARY = torch.library.Library("chipmunk", "DEF")              # torch.ops.chipmunk, as long as this lives


# ---------------------------------------------------------------------------------------------------------------------
# common to all ops


def _acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which definitions accumulate."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(q k^T / sqrt(D) + bias), o = p v -> o, lse, p. A row whose bias is all -inf gives 0, -inf, 0."""
    dtype = _acc_dtype(q)
    s = q.to(dtype) / math.sqrt(q.shape[-1]) @ k.to(dtype).mT                     # (..., rows, columns)
    if bias is not None:
        s += bias
    row_max = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)         # (..., rows, 1)
    p = s.sub_(row_max).exp_()
    total = p.sum(-1, keepdim=True)                                               # (..., rows, 1): 0, or at least 1
    p /= total.clamp_min(1)
    lse = (row_max + total.log())[..., 0]                                         # (..., rows)
    return p @ v.to(dtype), lse, p                                                # (..., rows, D)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_triton() -> None:
    if triton is None:
        raise ImportError("Triton is not installed; the functions ending in _ref run without it")


def _check_operands(*tensors: Tensor) -> None:
    """What the kernels ask of the matrices that they multiply."""
    _require_triton()
    dtypes = {x.dtype for x in tensors}
    _need(len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16, torch.float32},
          f"operands must share one of float16, bfloat16, float32; got {', '.join(sorted(map(str, dtypes)))}")
    _need(all(x.stride(-1) == 1 for x in tensors), "the last dimension of an operand must have stride 1")


def _check_head_dim(D: int) -> None:
    _need(D in (16, 32, 64, 128), f"head dimension must be 16, 32, 64 or 128; got {D}")


def _jit(fn: Callable) -> Callable:
    """triton.jit, or the function as it is if Triton is not installed."""
    return fn if triton is None else triton.jit(fn)


def has_kernels(x: Tensor) -> bool:
    """Do kernels work on x? On a GPU, but not in float64; elsewhere the definitions do."""
    return x.is_cuda and triton is not None and x.dtype != torch.float64


def _pick(x: Tensor, kernel: Callable, definition: Callable) -> Callable:
    return kernel if has_kernels(x) else definition


def _op(schema: str, empty_results: Callable) -> Callable:
    """Decorator: register with torch.library, so that torch.compile passes through without a graph break. Eager code
    calls the function itself, which saves a fast CPU 3 to 6 us a call. Ops of torch.library.custom_op, which can have a
    gradient, take it 10 to 30 us, and a block of FLUX.1's sparse step has five or seven.

    schema: the op's name and signature as torch.library writes them. empty_results: makes tensors of the results'
    shapes and dtypes, which is all that tracing needs.
    """
    name = schema.split("(", 1)[0]

    def register(fn):
        LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"chipmunk::{name}", empty_results, lib=LIBRARY)
        op = getattr(torch.ops.chipmunk, name).default

        @functools.wraps(fn)
        def call(*args):
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                raise RuntimeError(f"{name} has no gradient; call it under torch.no_grad()")
            traced = torch.compiler.is_compiling() or args[0].is_meta or type(args[0]) is not Tensor
            return (op if traced else fn)(*args)
        return call
    return register


# ---------------------------------------------------------------------------------------------------------------------
# rotary position embedding: no op of Chipmunk's, but it stands between a model's linears and them


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor], scale: Tensor | None = None,
               dtype: torch.dtype | None = None) -> Tensor:
    """Turn neighbouring pairs a, b of x into a cos - b sin, a sin + b cos (RoFormer, arXiv 2104.09864). With a scale
    (D,), first divide each row by its root mean square and multiply it by this (RMSNorm, arXiv 1910.07467).

    x (B, H, N, D), rope: the cosines and sines (N, D / 2) float32 of each row's angles -> (B, H, N, D) in dtype, or, if
    None, in x's. Raises ValueError if the shapes do not fit. As one kernel, not 13 that go over x again and again, norm
    and rotation take 0.024 instead of 0.43 ms for FLUX.1, which does this 114 times in a step of 140 ms (H200; double
    blocks do it for text and picture apart).
    """
    _need(x.dim() == 4 and x.shape[-1] % 2 == 0, f"x must be (B, H, N, D) with an even D, got {tuple(x.shape)}")
    (N, D), cos, sin = x.shape[2:], *rope
    _need(cos.shape == sin.shape == (N, D // 2) and (scale is None or scale.shape == (D,)),
          f"rope and scale do not fit x of {N} rows and {D} channels")
    args = x, *rope, scale, dtype or x.dtype
    if torch.is_grad_enabled() or torch.compiler.is_compiling():                  # these look inside
        return apply_rope_ref(*args)
    return _apply_rope_op(*args)


def apply_rope_ref(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(_acc_dtype(x))
    if scale is not None:
        x = F.rms_norm(x, scale.shape, scale.to(x.dtype), EPS)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                                    # (B, H, N, D / 2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(dtype)


@_jit
def _apply_rope_kernel(x_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, stride_b, stride_h, stride_n, BH, H, N,
                       D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK rows of a head. The next program: the same rows, so the same angles, of the next head."""
    program = tl.program_id(0).to(tl.int64)
    batch = program % BH // H
    head = program % H
    n = program // BH * BLOCK + tl.arange(0, BLOCK)[:, None]                      # (BLOCK, 1)
    d = tl.arange(0, D)
    pair = tl.arange(0, D // 2)
    x = tl.load(x_ptr + batch * stride_b + head * stride_h + n * stride_n + d, mask=n < N).to(tl.float32)
    if scale_ptr is not None:
        x *= tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None] * tl.load(scale_ptr + d).to(tl.float32)     # (BLOCK, D)
    cos = tl.load(cos_ptr + n * (D // 2) + pair, mask=n < N)                      # (BLOCK, D / 2)
    sin = tl.load(sin_ptr + n * (D // 2) + pair, mask=n < N)
    a, b = tl.split(x.reshape(BLOCK, D // 2, 2))                                  # (BLOCK, D / 2) each
    x = tl.join(a * cos - b * sin, a * sin + b * cos).reshape(BLOCK, D)
    tl.store(out_ptr + (program % BH * N + n) * D + d, x.to(out_ptr.dtype.element_ty), mask=n < N)


def apply_rope_triton(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_operands(x)
    B, H, N, D = x.shape
    _check_head_dim(D)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = 16                                                                    # 64 rows: 0.080 instead of 0.024 ms
    _apply_rope_kernel[(B * H * triton.cdiv(N, block),)](
        x, cos.contiguous(), sin.contiguous(), None if scale is None else scale.contiguous(), out, *x.stride()[:3],
        B * H, H, N, D=D, EPS=EPS, BLOCK=block)
    return out


@_op("apply_rope(Tensor x, Tensor cos, Tensor sin, Tensor? scale, ScalarType dtype) -> Tensor",
     lambda x, cos, sin, scale, dtype: x.new_empty(x.shape, dtype=dtype))
def _apply_rope_op(x, cos, sin, scale, dtype):
    return _pick(x, apply_rope_triton, apply_rope_ref)(x, cos, sin, scale, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention that also returns what it normalised by.

    q (B, H, Nq, D), k and v (B, H, Nk, D) -> o (B, H, Nq, D) in q's dtype, lse (B, H, Nq) float32: the natural
    logarithm of the row sums of exp(q k^T / sqrt(D)). On a CPU and in half precision on a GPU these are the
    framework's own kernels, which can be differentiated. Raises ValueError if a last dimension has not stride 1.
    """
    _need(all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension of an operand must have stride 1")
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        backends = [_flash_attention, _attention_op]
        if torch.cuda.get_device_capability(q.device)[0] >= 9:
            backends = [_cudnn_attention, *backends]                              # on Hopper 1.9x as fast
        return _first_able(backends, q, k, v)
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return o, lse.contiguous()                                                # strides as the other ops' have
    return _attention_op(q, k, v)


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return o, lse.view(q.shape[:3])


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


# How cuDNN and flash attention say that they have nothing for these sizes, this GPU or this build of torch.
NO_KERNEL = re.compile(
    r"no (?:valid )?(?:execution plans|engine configs)|CUDNN_STATUS_NOT_SUPPORTED|FlashAttention only supports|"
    r"not compiled with cuDNN|USE_FLASH_ATTENTION was not enabled", re.IGNORECASE)


def _first_able(backends: list[Callable], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result of the first of these backends that has a kernel for it. Other errors, as of memory, are raised; so
    is everything in what torch.compile makes of this, as that holds the first backend alone."""
    *others, last = backends
    for backend in others:
        try:
            return backend(q, k, v)
        except RuntimeError as error:
            if not NO_KERNEL.search(str(error)):
                raise
    return last(q, k, v)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, _ = _softmax(q, k, v)                                                 # (B, H, Nq, D), (B, H, Nq)
    return o.to(q.dtype), lse


@_jit
def _load_rows(x_ptr, b, h, rows, stride_b, stride_h, stride_n, N, D: tl.constexpr):
    """Rows of head h of x (B, H, N, D), 0 past the end -> (rows, D)."""
    d = tl.arange(0, D)
    x_at = x_ptr + b * stride_b + h * stride_h + rows.to(tl.int64)[:, None] * stride_n + d[None, :]
    return tl.load(x_at, mask=rows[:, None] < N, other=0.0)


@_jit
def _store_rows(o_ptr, lse_ptr, o, lse, head, rows, N, D: tl.constexpr, LOG2E: tl.constexpr):
    """Write o (rows, D) and lse (rows,), which comes as a logarithm to base 2. Both buffers are contiguous."""
    d = tl.arange(0, D)
    o_at = o_ptr + (head * N + rows)[:, None] * D + d[None, :]
    tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=rows[:, None] < N)
    if lse_ptr is not None:
        tl.store(lse_ptr + head * N + rows, lse / LOG2E, mask=rows < N)


@_jit
def _score_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, index, valid, D: tl.constexpr, WIDE_OFFSETS: tl.constexpr):
    """Load one tile of columns -> its scores s = q k^T (rows, columns), not yet scaled, and its v (columns, D).

    index (columns,) says where the columns are, and valid (columns,) which of them count; None means all."""
    d = tl.arange(0, D)
    if WIDE_OFFSETS:
        index = index.to(tl.int64)
    k_at = k_ptr + index[:, None] * stride_kn + d[None, :]
    v_at = v_ptr + index[:, None] * stride_vn + d[None, :]
    if valid is None:
        k = tl.load(k_at)                                                         # (columns, D)
        v = tl.load(v_at)                                                         # (columns, D)
    else:
        k = tl.load(k_at, mask=valid[:, None], other=0.0)
        v = tl.load(v_at, mask=valid[:, None], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")                            # (rows, columns)
    if valid is not None:
        s = tl.where(valid[None, :], s, -float("inf"))
    return s, v


@_jit
def _take_tile(s, v, scale, acc, m, z, TRACK_MAX: tl.constexpr, weight=None):
    """Take one tile of columns into a running softmax -> acc, m, z, p.

    weight (columns,): how many columns each one stands for, 0 allowed; None means 1.
    p = weight exp2(s scale - m), z (rows,) += sum of p; then, p being in v's dtype from here on, acc (rows, D) += p v.
    If TRACK_MAX, m (rows,) is the maximum of s scale so far, otherwise it stays as given."""
    if TRACK_MAX:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)                               # (rows,)
        shrink = tl.exp2(m - m_new)                                               # (rows,)
        acc *= shrink[:, None]
        z *= shrink
        m = m_new
    p = tl.exp2(s * scale - m[:, None])                                           # (rows, columns)
    if weight is not None:
        p *= weight[None, :]
    z += tl.sum(p, 1)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc, input_precision="ieee")                               # (rows, D)
    return acc, m, z, p


@_jit
def _attend_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, index, valid, scale, acc, m, z,
                 D: tl.constexpr, WIDE_OFFSETS: tl.constexpr, TRACK_MAX: tl.constexpr, weight=None):
    """_score_tile, then _take_tile -> acc, m, z"""
    s, v = _score_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, index, valid, D, WIDE_OFFSETS)
    acc, m, z, _ = _take_tile(s, v, scale, acc, m, z, TRACK_MAX, weight)
    return acc, m, z


@_jit
def _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, Nk, scale,
                BLOCK_N: tl.constexpr, D: tl.constexpr, WIDE_OFFSETS: tl.constexpr):
    """A group of rows q (rows, D) against all columns -> acc (rows, D), m (rows,), z (rows,) as in _take_tile."""
    lane = tl.arange(0, BLOCK_N)
    acc = tl.zeros(q.shape, tl.float32)
    m = tl.full((q.shape[0],), -float("inf"), tl.float32)
    z = tl.zeros((q.shape[0],), tl.float32)
    full = Nk // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc, m, z = _attend_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, start + lane, None, scale, acc, m, z,
                                 D, WIDE_OFFSETS, TRACK_MAX=True)
    if full < Nk:
        valid = full + lane < Nk
        acc, m, z = _attend_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, full + lane, valid, scale, acc, m, z,
                                 D, WIDE_OFFSETS, TRACK_MAX=True)
    return acc, m, z


@_jit
def _attention_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
                      stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                      stride_vb, stride_vh, stride_vn, H, Nq, Nk, scale,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, LOG2E: tl.constexpr,
                      WIDE_OFFSETS: tl.constexpr):
    """One program: one group of rows against all columns. A head's groups run side by side: its k, v stay in L2."""
    head = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, b, h, rows, stride_qb, stride_qh, stride_qn, Nq, D)     # (rows, D)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    acc, m, z = _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, Nk, scale, BLOCK_N, D, WIDE_OFFSETS)
    _store_rows(o_ptr, lse_ptr, acc / z[:, None], m + tl.log2(z), head, rows, Nq, D, LOG2E)


def _attention_constants(q: Tensor, k: Tensor, v: Tensor, block_n: int = 64) -> dict:
    """The compile-time constants of the attention kernels. block_n: columns of a tile in half precision."""
    D = q.shape[-1]
    _check_head_dim(D)
    if q.dtype == torch.float32:
        block_n = 16                                        # exact fp32 runs in registers, without tensor cores
    wide = k.shape[2] * max(k.stride(2), v.stride(2)) >= 2**31      # offsets into k or v need 64 bits; 32 are faster
    return dict(BLOCK_M=GROUP, BLOCK_N=block_n, D=D, LOG2E=LOG2E, WIDE_OFFSETS=wide)


def _stages(q: Tensor) -> int:
    """How many tiles of columns are on their way at once: in float32 a third does not fit into 99 KB (RTX cards)."""
    return 2 if q.dtype == torch.float32 else 3


def _on_hopper(x: Tensor) -> bool:
    """Is x on an H100 or H200? There tensor cores read q from shared memory; most others want it in registers."""
    return x.device.type != "cpu" and torch.cuda.get_device_capability(x.device)[0] == 9


def attention_triton(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _check_operands(q, k, v)
    B, H, Nq, D = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    # 8 warps, 3 stages: fastest on an H200 at D = 128
    _attention_kernel[(triton.cdiv(Nq, GROUP), B * H)](
        q, k, v, o, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, Nq, k.shape[2], LOG2E / math.sqrt(D),
        **_attention_constants(q, k, v), num_warps=8, num_stages=_stages(q))
    return o, lse


@_op("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
     lambda q, k, v: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)))
def _attention_op(q, k, v):
    return _pick(q, attention_triton, attention_ref)(q, k, v)


# ---------------------------------------------------------------------------------------------------------------------
# attention with column mass
#
# Two rows of one group, three columns, exp(s) = 1 2 1 and 1 1 6, so that lse = log 4 and log 8. With lse_prev = lse:
#     p of row 0   0.25   0.5    0.25     it hands out exactly 1
#     p of row 1   0.125  0.125  0.75     so does it
#     mass         0.375  0.625  1        the heaviest column is the last
# If lse_prev of row 0 is log 8 instead, row 0 hands out 0.125 0.25 0.125, and the mass is 0.25 0.375 0.875.


def attention_with_column_mass(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, and how much probability each group of rows gives to each column.

    q (B, H, Nq, D), k and v (B, H, Nk, D), lse_prev (B, H, Nq) of an earlier step -> o, lse as `attention`, and mass
    (B, H, G, Nk), bfloat16 for half-precision inputs: mass[g, j] = sum over rows i of group g of
    exp(s_ij - lse_prev_i). A row's own lse is known only after its last column, so a single pass has to use the
    previous one. If lse_prev = lse, each row hands out exactly 1. The column sums of arXiv 2506.03275.
    """
    return _attention_with_column_mass_op(q, k, v, lse_prev)


def attention_with_column_mass_ref(q: Tensor, k: Tensor, v: Tensor,
                                   lse_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = []
    for q_g, prev in zip(q.split(GROUP, 2), lse_prev.split(GROUP, 2), strict=True):
        o, lse, p = _softmax(q_g, k, v)                                           # (B, H, GROUP, D), (B, H, GROUP)
        factor = (lse - prev).clamp(max=80).exp()                                 # (B, H, GROUP); 128 exp(80) is finite
        groups.append((o, lse, factor[..., None, :] @ p))                         # (B, H, 1, Nk)
    o, lse, mass = (torch.cat(parts, 2) for parts in zip(*groups, strict=True))
    return o.to(q.dtype), lse, mass.to(_mass_dtype(q))


def _mass_dtype(q: Tensor) -> torch.dtype:
    """bfloat16 for half-precision inputs: 24 heads and 119,056 tokens have 2.7 billion masses."""
    return q.dtype if q.dtype in (torch.float32, torch.float64) else torch.bfloat16


@_jit
def _store_mass(mass_ptr, p, column, N):
    """The mass of a tile's columns (columns,) is the sum of p (rows, columns), which is 2^8 times too large. At most
    1e38, which is finite in bfloat16; nothing is stored for columns outside of 0..N - 1."""
    # A product with ones, 16 rows of them at least. For tl.sum(p, 0) all warps would exchange what they have of every
    # column: 567 instead of 393 ms for 119,056 tokens on an H200. To store one of the equal rows takes no sum, either.
    ones = tl.full((16, p.shape[0]), 1.0, p.dtype)
    sums = tl.dot(ones, p, input_precision="ieee")                                # (16, columns), all rows alike
    first = (tl.arange(0, 16) == 0)[:, None] & (column >= 0)[None, :] & (column < N)[None, :]
    at = mass_ptr + tl.broadcast_to(column[None, :], sums.shape)
    tl.store(at, tl.minimum(sums / 256, 1e38).to(mass_ptr.dtype.element_ty), mask=first)


@_jit
def _all_near(z, counted, dtype: tl.constexpr):
    """Did m = lse_prev * LOG2E - 8 keep p within q's dtype? z (rows,), the sum of p, is 2^8 if the columns have
    all of a row's softmax and lse_prev is its lse. It may be up to 2^60 times as much or as little, in float16 2^7
    times, in all rows that count: then p has neither overflowed nor lost its small values."""
    NEAR: tl.constexpr = 7 if dtype == tl.float16 else 60
    near = tl.abs(tl.log2(z) - 8) < NEAR                                          # (rows,)
    return tl.sum((near & counted).to(tl.int32)) == tl.sum(counted.to(tl.int32))


@_jit
def _attention_with_column_mass_kernel(
        q_ptr, k_ptr, v_ptr, lse_prev_ptr, o_ptr, lse_ptr, mass_ptr,
        stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        H, Nq, Nk, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, LOG2E: tl.constexpr,
        WIDE_OFFSETS: tl.constexpr):
    """One program: one group of rows against all columns.

    The previous lse is near the new one, so it can take the place of the softmax's maximum m. Then there is no maximum
    to find and nothing to rescale, and the sum of p over the rows is the mass. If the two lse turn out to be far
    apart, the mass is still right (in float16 as long as no p exceeds 65,504), and o is computed again with the true
    maximum. A tile's mass is summed up while tensor cores multiply q by the next tile's k: 393 instead of 410 ms for
    119,056 tokens on an H200."""
    g = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    rows = g * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, b, h, rows, stride_qb, stride_qh, stride_qn, Nq, D)     # (rows, D)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    lse_prev = tl.load(lse_prev_ptr + head * Nq + rows, mask=rows < Nq, other=float("inf"))   # (rows,); inf: p = 0
    mass_ptr += (head * tl.num_programs(0) + g) * Nk

    # p is 2^8 times exp(s - lse_prev), so that even attention over 100,000 columns has normal numbers in fp16.
    m = lse_prev * LOG2E - 8
    lane = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    p = tl.zeros((BLOCK_M, BLOCK_N), v_ptr.dtype.element_ty)
    full = Nk // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        s, v = _score_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, start + lane, None, D, WIDE_OFFSETS)
        _store_mass(mass_ptr, p, start - BLOCK_N + lane, Nk)                      # of the tile before: see above
        acc, m, z, p = _take_tile(s, v, scale, acc, m, z, TRACK_MAX=False)
    _store_mass(mass_ptr, p, full - BLOCK_N + lane, Nk)
    if full < Nk:
        s, v = _score_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, full + lane, full + lane < Nk, D, WIDE_OFFSETS)
        acc, m, z, p = _take_tile(s, v, scale, acc, m, z, TRACK_MAX=False)
        _store_mass(mass_ptr, p, full + lane, Nk)

    if not _all_near(z, rows < Nq, q_ptr.dtype.element_ty):
        acc, m, z = _attend_all(q, k_ptr, v_ptr, stride_kn, stride_vn, Nk, scale, BLOCK_N, D, WIDE_OFFSETS)
    _store_rows(o_ptr, lse_ptr, acc / z[:, None], m + tl.log2(z), head, rows, Nq, D, LOG2E)


def attention_with_column_mass_triton(q: Tensor, k: Tensor, v: Tensor,
                                      lse_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_operands(q, k, v)
    (B, H, Nq, D), Nk = q.shape, k.shape[2]
    G = triton.cdiv(Nq, GROUP)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    mass = torch.empty(B, H, G, Nk, dtype=_mass_dtype(q), device=q.device)
    # 64 columns, 8 warps, 3 stages: fastest on an H200 (2 stages: 0.92 instead of 0.66 ms for FLUX.1). Where registers
    # hold q, 64 columns are too many for them.
    constants = _attention_constants(q, k, v, 64 if _on_hopper(q) else 32)
    _attention_with_column_mass_kernel[(G, B * H)](
        q, k, v, lse_prev.contiguous(), o, lse, mass, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H, Nq, Nk, LOG2E / math.sqrt(D), **constants, num_warps=8, num_stages=_stages(q))
    return o, lse, mass


def _empty_attention_with_column_mass(q, k, v, lse_prev):
    G = -(-q.shape[2] // GROUP)
    mass = q.new_empty(*q.shape[:2], G, k.shape[2], dtype=_mass_dtype(q))
    return q.new_empty(q.shape), lse_prev.new_empty(q.shape[:3]), mass


@_op("attention_with_column_mass(Tensor q, Tensor k, Tensor v, Tensor lse_prev) -> (Tensor, Tensor, Tensor)",
     _empty_attention_with_column_mass)
def _attention_with_column_mass_op(q, k, v, lse_prev):
    return _pick(q, attention_with_column_mass_triton, attention_with_column_mass_ref)(q, k, v, lse_prev)


# ---------------------------------------------------------------------------------------------------------------------
# choose columns


def choose_columns(mass: Tensor, keep: float, random: float, static: Tensor | None, seed: int,
                   static_most: int | None = None) -> tuple[Tensor, Tensor]:
    """List the columns of every group: the heaviest, some at random, and those that are always kept.

    mass (..., G, N) not negative; keep, random: shares of N in 0..1; static: bool (N,), (G, N) or None; seed: an
    integer, new for every choice -> columns (..., G, K) uint16, counts (..., G, P) int32.
    Each list is ascending and the union of three sets:
      by mass  the ceil(keep N) columns of largest mass. Columns that tie for the last places get them in ascending
               order; a tied column that is listed anyway takes no place.
      random   each column with probability `random`, by a hash of seed, group and column: the same for every head, on
               every device, and however heads are spread over devices
      static   the static columns
    Padding is 0. K is computed from the arguments alone. static_most is the most static columns of any
    group. If it is not given they are counted, which waits for the device once; torch.compile needs it given.
    Raises ValueError if keep or random is not a share.
    """
    _need(0 <= keep <= 1 and 0 <= random <= 1, f"keep and random are shares in 0..1, got {keep} and {random}")
    if static_most is None:
        static_most = 0 if static is None else int(static.sum(-1).max())
    return _choose_columns_op(mass, keep, random, static, seed, static_most)


def _list_sizes(n: int, keep: float, random: float, static_most: int) -> tuple[int, int]:
    """How many of n columns are taken by mass, and K, which has room for these, the static and the random ones."""
    top = min(n, math.ceil(keep * n))
    random_most = math.ceil(n * random + 6 * math.sqrt(n * random * (1 - random)))     # mean + 6 sigma
    K = max(1, min(n, top + random_most + static_most))
    return top, -(-K // 16) * 16                            # a multiple of 16: rows of K entries stay aligned


def _hash(seed: int, group: Tensor, column: Tensor) -> Tensor:
    """24 random bits of (seed, group, column): two rounds of the integer hash lowbias32, in int64 tensors that hold
    32-bit values. _hash_uint32 is the same for kernels."""
    x = (seed & 0x7FFFFFFF) ^ (group * 0x9E3779B1 & 0xFFFFFFFF)
    for key in (0, column):
        x = x ^ key
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return x >> 8


def choose_columns_ref(mass: Tensor, keep: float, random: float, static: Tensor | None, seed: int,
                       static_most: int) -> tuple[Tensor, Tensor]:
    N = mass.shape[-1]
    top, K = _list_sizes(N, keep, random, static_most)
    column = torch.arange(N, device=mass.device)                                  # (N,)
    page_ends = torch.arange(PAGE, N + PAGE, PAGE, device=mass.device).clamp(max=N)    # (P,)
    groups = []
    for g, mass_g in enumerate(mass.unbind(-2)):                                  # (..., N)
        forced = _hash(seed, g, column) < round(random * 2 ** 24)                 # (N,): listed whatever their mass
        if static is not None:
            forced = forced | (static[g] if static.dim() > 1 else static)
        chosen = forced.expand(mass_g.shape)                                      # (..., N)
        if top > 0:
            threshold = mass_g.topk(top, sorted=True).values[..., -1:]            # (..., 1)
            above = mass_g > threshold                                            # (..., N)
            tied = (mass_g == threshold) & ~forced
            ties_wanted = top - above.sum(-1, keepdim=True)                       # (..., 1)
            chosen = forced | above | tied & (tied.cumsum(-1) <= ties_wanted)     # (..., N)

        so_far = chosen.cumsum(-1)                                                # (..., N)
        slot = torch.where(chosen, so_far - 1, K).clamp(max=K)                    # K: an extra slot, cut off below
        columns = torch.zeros(*mass_g.shape[:-1], K + 1, dtype=torch.int32, device=mass.device)
        columns.scatter_(-1, slot, (column % PAGE).to(torch.int32).expand(mass_g.shape))
        counts = so_far[..., page_ends - 1].clamp(max=K).to(torch.int32)          # (..., P)
        groups.append((columns[..., :K].to(torch.uint16), counts))                # (..., K)
    columns, counts = (torch.stack(parts, -2) for parts in zip(*groups, strict=True))
    return columns, counts                                                        # (..., G, K), (..., G, P)


@_jit
def _hash_uint32(seed, group, column):
    """24 random bits of (seed, group, column), as _hash."""
    x = tl.cast(seed, tl.uint32) ^ tl.cast(group, tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16) ^ column.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >> 8


@_jit
def _mark_forced_kernel(forced_ptr, static_ptr, stride_static, seed, random_below, N,
                        BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Mark the columns that are listed whatever their mass, the random and the static ones, by a mass's sign bit. All
    heads share them."""
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    forced = _hash_uint32(seed, group, column) < random_below
    if static_ptr is not None:
        forced |= tl.load(static_ptr + group.to(tl.int64) * stride_static + column, mask=column < N, other=0) != 0
    mark = tl.where(forced, 1 << BITS - 1, 0).to(forced_ptr.dtype.element_ty)
    tl.store(forced_ptr + group.to(tl.int64) * N + column, mark, mask=column < N)


# The threshold search, with 4 inner bins for its 62. The 3 largest of 9 3 14 5 9 1 12 6 are sought among 0..15:
#     round 1, lo = 0, hi = 16    below 0 | 0-3 | 4-7 | 8-11 | 12-15 | above
#         counted                       0 |   2 |   2 |    2 |     2 |     0
#         in this bin or above          8 |   8 |   6 |    4 |     2 |     0    the last bin with at least 3 is 8-11
#     round 2, lo = 8, hi = 12    below 8 |   8 |   9 |   10 |    11 | above
#         counted                       4 |   0 |   2 |    0 |     0 |     2
#         in this bin or above          8 |   4 |   4 |    2 |     2 |     2    the last bin with at least 3 is 9
# A bin of one number ends the search: the threshold is 9. Two numbers lie above it, so one of the two 9s is wanted.
# Columns 0, 2 and 6 are taken.
@_jit
def _find_threshold(near_ptr, n, top, lo, hi, END: tl.constexpr, BLOCK: tl.constexpr):
    """The threshold is the top-th largest of the masses of n near columns, 0 if n < top -> threshold, ties_wanted: how
    many of the masses that equal it are among the top.

    Each round counts the masses in 62 bins over lo..hi - 1 and in one bin on either side. The bin that holds the
    threshold is the next lo..hi - 1. The first lo and hi may be a wrong guess: then an outer bin holds it."""
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, 64)
    ties_wanted = top
    lo = tl.cast(lo, tl.int64)
    hi = tl.cast(hi, tl.int64)                                                    # lo + 2^shift may reach 2^31
    while hi - lo > 1:
        shift = 0                                                                 # an inner bin is 2^shift wide
        while (hi - lo - 1) >> shift >= 62:
            shift += 1
        counted = tl.zeros((64,), tl.int32)
        for start in range(0, n, BLOCK):
            at = start + lane
            mass = (tl.load(near_ptr + at, mask=at < n, other=0) >> 16).to(tl.int32) & END
            bin_of = (mass - lo.to(tl.int32) >> shift) + 1                        # (BLOCK,)
            counted += tl.histogram(tl.minimum(tl.maximum(bin_of, 0), 63), 64, mask=at < n)
        at_least = tl.cumsum(counted, 0, reverse=True)                            # (64,): in this bin or above
        found = tl.sum((at_least >= top).to(tl.int32)) - 1                        # the last bin with at least `top`
        ties_wanted = top - tl.sum(tl.where(bins > found, counted, 0))
        if found <= 0:
            hi = lo
            lo = tl.cast(0, tl.int64)
        elif found == 63:
            lo = hi
            hi = tl.cast(END, tl.int64)
        else:
            lo += (found - 1).to(tl.int64) << shift
            hi = lo + (1 << shift)
    return lo.to(tl.uint32), ties_wanted


@_jit
def _guess_threshold(bits_ptr, N, top, margin, END: tl.constexpr, SUBSET: tl.constexpr):
    """A mass that is most likely no larger than the top-th largest of a row of N, or 0.

    Of SUBSET masses that lie evenly apart, about top SUBSET / N are among the row's top. The one `margin` places
    further down is sought bit by bit, from the highest on."""
    at = tl.arange(0, SUBSET).to(tl.int64) * N // SUBSET                          # up to the end of the row
    mass = tl.load(bits_ptr + at).to(tl.uint32) & END
    wanted = (tl.cast(top, tl.int64) * SUBSET // N).to(tl.int32) + margin
    guess = tl.cast(0, tl.uint32)
    bit = tl.cast(END // 2 + 1, tl.uint32)
    while bit > 0:
        if tl.sum((mass >= guess + bit).to(tl.int32)) >= wanted:
            guess += bit
        bit >>= 1
    return guess


@_jit
def _gather_near(bits_ptr, forced_ptr, near_ptr, page_ends_ptr, N, lo,
                 END: tl.constexpr, THREADS: tl.constexpr, PAGE: tl.constexpr):
    """Note those columns of a row whose mass is at least lo, and the forced ones, in ascending order, as
    mass << 16 | column within its page -> how many; page_ends (P,): how many by the end of each page."""
    pair_type: tl.constexpr = near_ptr.dtype.element_ty
    eight = tl.arange(0, 8)[None, :]
    count = 0
    for start in range(0, N, 8 * THREADS):
        # A thread takes 8 neighbouring masses and counts them by itself, so that all threads together scan an eighth:
        # 5.8 instead of 9.8 ms for 119,040 tokens on an H200. Unless N is a multiple of 16 and a mass has 16 bits,
        # Triton spreads a row of 8 over threads, which is slower.
        first = start + 8 * tl.arange(0, THREADS)                                 # (THREADS,)
        column = first[:, None] + eight                                           # (THREADS, 8)
        bits = tl.load(bits_ptr + column, mask=column < N, other=0) & END         # without the sign of -0.0
        if forced_ptr is not None:
            bits |= tl.load(forced_ptr + column, mask=column < N, other=0)
        masses, before = (), ()                             # before: how many of a thread's masses before this are near
        mine = tl.zeros((THREADS,), tl.int32)
        for i in tl.static_range(8):
            mass = tl.sum(tl.where(eight == i, bits, 0), 1).to(tl.uint32)         # (THREADS,): just picks a register
            masses += (mass,)
            before += (mine,)
            mine += (mass >= lo).to(tl.int32)
        near_at = near_ptr + (count + tl.cumsum(mine, 0) - mine)                  # (THREADS,)
        for i in tl.static_range(8):
            pair = masses[i].to(pair_type) << 16 | (first + i).to(tl.uint16).to(pair_type)
            tl.store(near_at + before[i], pair, mask=masses[i] >= lo)
        count = tl.minimum(count + tl.sum(mine), N)         # if lo = 0, zeros past the end come after all N columns
        tl.store(page_ends_ptr + start // PAGE, count)                            # a page's last tile has the last word
    return count


@_jit
def _list_chosen(near_ptr, columns_ptr, begin, end, count, threshold, ties_wanted, K, THREADS: tl.constexpr):
    """List those of the near columns begin..end - 1 whose mass exceeds the threshold, and the first ties_wanted of
    those that equal it. -> the list's length, which was `count`, and how many ties are still wanted. Eight a thread, as
    in _gather_near, take 5.4 instead of 5.9 ms for 119,040 tokens on an H200."""
    eight = tl.arange(0, 8)[None, :]
    for start in range(begin, end, 8 * THREADS):
        first = start + 8 * tl.arange(0, THREADS)                                 # (THREADS,)
        at = first[:, None] + eight                                               # (THREADS, 8)
        tile = tl.load(near_ptr + at, mask=at < end, other=0)
        pairs, before = (), ()                              # as in _gather_near, but in 16 bits each two counts up to
        mine = tl.zeros((THREADS,), tl.int32)               # 1,024: of columns that exceed, and of ties
        for i in tl.static_range(8):
            pair = tl.sum(tl.where(eight == i, tile, 0), 1)                       # (THREADS,)
            mass = (pair >> 16).to(tl.uint32)
            pairs += (pair,)
            before += (mine,)
            counts = (mass > threshold).to(tl.int32) + ((mass == threshold).to(tl.int32) << 16)
            mine += tl.where(first + i < end, counts, 0)
        all_before = tl.cumsum(mine, 0) - mine
        for i in tl.static_range(8):
            mass = (pairs[i] >> 16).to(tl.uint32)
            ties_before = all_before + before[i] >> 16
            chosen = (mass > threshold) | (mass == threshold) & (ties_before < ties_wanted)
            slot = count + (all_before + before[i] & 0xFFFF) + tl.minimum(ties_before, ties_wanted)
            tl.store(columns_ptr + slot, pairs[i].to(tl.uint16), mask=chosen & (first + i < end) & (slot < K))
        total = tl.sum(mine)
        ties_taken = tl.minimum(total >> 16, ties_wanted)
        count += (total & 0xFFFF) + ties_taken
        ties_wanted -= ties_taken
    return count, ties_wanted


@_jit
def _choose_columns_kernel(bits_ptr, forced_ptr, near_ptr, page_ends_ptr, columns_ptr, counts_ptr, top, margin,
                           rows, G, N, K, stride_forced, stride_near, BITS: tl.constexpr, SUBSET: tl.constexpr,
                           THREADS: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """One program: some of the rows, one after another. A row is a group of a head.

    Only near columns, those that a subset of the row cannot rule out, are looked at more than once: a tenth to a fifth
    of a row if 7 to 17 % are kept. 5.8 instead of 12.0 ms for 119,040 tokens on an H200; that and what other comments
    say of choosing was measured with a subset of 512. Masses are compared as integers, since floats that are not
    negative are ordered as their bits are. Forced columns, with the sign bit, exceed all others."""
    END: tl.constexpr = (1 << BITS - 1) - 1
    lane = tl.arange(0, BLOCK)
    heads = rows // G
    P = tl.cdiv(N, PAGE)
    near_ptr += tl.program_id(0).to(tl.int64) * stride_near
    page_ends_ptr += tl.program_id(0) * P
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        g = i // heads                                      # heads in turn: they share forced columns, 5.8 for 6.3 ms
        row = (i % heads).to(tl.int64) * G + g
        row_bits_ptr = bits_ptr + row * N
        row_forced_ptr = forced_ptr
        if forced_ptr is not None:
            row_forced_ptr += g.to(tl.int64) * stride_forced

        lo = tl.cast(0, tl.uint32)                          # in short rows all columns are near
        if N >= 4 * SUBSET:
            lo = _guess_threshold(row_bits_ptr, N, top, margin, END, SUBSET)
        hi = tl.minimum(lo.to(tl.int64) + (62 << BITS - 16), END)                 # a bin goes to the next bfloat16
        near, threshold, ties_wanted = 0, lo, top           # Triton wants them before the loop, with their types
        enough = False
        while not enough:
            near = _gather_near(row_bits_ptr, row_forced_ptr, near_ptr, page_ends_ptr, N, lo, END, THREADS, PAGE)
            tl.debug_barrier()                                                    # other threads read what these wrote
            threshold, ties_wanted = _find_threshold(near_ptr, near, top, lo, hi, END, BLOCK)
            enough = threshold >= lo                        # else the subset has misled: again, with all columns near
            lo = tl.cast(0, tl.uint32)
            hi = tl.cast(END, tl.int64)

        count = 0
        begin = 0
        for page in range(P):
            end = tl.load(page_ends_ptr + page)
            count, ties_wanted = _list_chosen(near_ptr, columns_ptr + row * K, begin, end, count, threshold,
                                              ties_wanted, K, THREADS)
            tl.store(counts_ptr + row * P + page, tl.minimum(count, K))
            begin = end
        for start in range(count, K, BLOCK):                                      # padding
            tl.store(columns_ptr + row * K + start + lane, 0, mask=start + lane < K)
        tl.debug_barrier()                                                        # the next row overwrites near columns


def choose_columns_triton(mass: Tensor, keep: float, random: float, static: Tensor | None, seed: int,
                          static_most: int) -> tuple[Tensor, Tensor]:
    _require_triton()
    bits_dtype = {torch.float32: torch.uint32, torch.float16: torch.uint16, torch.bfloat16: torch.uint16}
    _need(mass.dtype in bits_dtype, f"mass must be float32, float16 or bfloat16, got {mass.dtype}")
    bits = mass.contiguous().view(bits_dtype[mass.dtype])                         # (..., G, N)
    G, N = mass.shape[-2:]
    rows, P = mass.numel() // N, triton.cdiv(N, PAGE)
    top, K = _list_sizes(N, keep, random, static_most)

    forced = None
    stride_static, stride_forced = 0, 0                                           # 0: all groups share a row
    if static is not None:
        static = static.contiguous().view(torch.uint8)                            # (N,) or (G, N)
        stride_static = N if static.dim() == 2 else 0
    if random > 0 or static is not None:
        stride_forced = N if random > 0 or stride_static else 0
        forced = torch.empty(G if stride_forced else 1, N, dtype=bits.dtype, device=mass.device)
        _mark_forced_kernel[(len(forced), triton.cdiv(N, 1024))](
            forced, static, stride_static, seed & 0x7FFFFFFF, round(random * 2 ** 24), N,
            BITS=8 * mass.itemsize, BLOCK=1024)

    columns = torch.empty(*mass.shape[:-1], K, dtype=torch.uint16, device=mass.device)
    counts = torch.empty(*mass.shape[:-1], P, dtype=torch.int32, device=mass.device)
    # At 64 registers a thread 8 programs share a multiprocessor: 5.8 instead of 8.1 ms with the 112 that Triton takes.
    processors = torch.cuda.get_device_properties(mass.device).multi_processor_count if mass.is_cuda else 1
    programs = min(rows, 8 * processors)
    # Room for all columns, in whole tiles, as all may be near: 0.5 GB for 119,040 tokens. A pair has 16 + 16 bits, or
    # 32 + 16.
    pair_dtype = torch.uint32 if mass.itemsize == 2 else torch.uint64
    near = torch.empty(programs, triton.cdiv(N, 1024) * 1024, dtype=pair_dtype, device=mass.device)
    page_ends = torch.empty(programs, P, dtype=torch.int32, device=mass.device)
    SUBSET = 1024                                           # 119,040 tokens: with 512 25 % longer, with 2048 13 %
    margin = math.ceil(4 * math.sqrt(SUBSET * keep * (1 - keep)))                 # 4 sigma: misleads 3 rows in 100,000
    _choose_columns_kernel[(programs,)](
        bits, forced, near, page_ends, columns, counts, top, margin, rows, G, N, K, stride_forced, near.stride(0),
        BITS=8 * mass.itemsize, SUBSET=SUBSET, THREADS=128, BLOCK=512, PAGE=PAGE, num_warps=4, maxnreg=64)
    return columns, counts


def _empty_choose_columns(mass, keep, random, static, seed, static_most):
    N = mass.shape[-1]
    _, K = _list_sizes(N, keep, random, static_most)
    columns = mass.new_empty(*mass.shape[:-1], K, dtype=torch.uint16)
    return columns, mass.new_empty(*mass.shape[:-1], -(-N // PAGE), dtype=torch.int32)


@_op("choose_columns(Tensor mass, float keep, float random, Tensor? static, SymInt seed, int static_most) "
     "-> (Tensor, Tensor)", _empty_choose_columns)
def _choose_columns_op(mass, keep, random, static, seed, static_most):
    run = _pick(mass, choose_columns_triton, choose_columns_ref)
    return run(mass, keep, random, static, seed, static_most)


# ---------------------------------------------------------------------------------------------------------------------
# reading a list
#
# With pages of 4 columns, the list 1 2 6 9 11 is stored as 1 2 2 1 3 with counts 2 3 5. From slot 2 on it is in page 1,
# from slot 3 on in page 2: 2 + 4 = 6, 1 + 8 = 9, 3 + 8 = 11.


def listed_columns(columns: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """columns (..., K) uint16, counts (..., P) -> the columns (..., K) int32, and whether a slot is none of the list's
    padding (..., K) bool."""
    slot = torch.arange(columns.shape[-1], device=columns.device)                 # (K,)
    index = columns.to(torch.int32)                                               # (..., K)
    for page_end in counts[..., :-1].unbind(-1):                                  # (...)
        index += PAGE * (slot >= page_end[..., None])
    return index, slot < counts[..., -1:]


@_jit
def _load_entries(columns_ptr, slot, count):
    """A list's entries at these slots -> (slots,) uint16; in padding 0. Loops load them a tile ahead, and a tile later
    `_columns_of` widens them: Triton prefetches rows only if an earlier turn has loaded, unchanged, where they are."""
    return tl.load(columns_ptr + slot, mask=slot < count, other=0)


@_jit
def _columns_of(entries, slot, counts_ptr, PAGES: tl.constexpr):
    """The columns that the entries at these slots stand for -> (slots,) int32; in padding some column that exists."""
    index = entries.to(tl.int32)
    for page in tl.static_range(PAGES - 1):
        index += (slot >= tl.load(counts_ptr + page)).to(tl.int32) << 16
    return index


# ---------------------------------------------------------------------------------------------------------------------
# pool blocks: the mean of POOL neighbouring columns stands in for those of them that a group does not list
#
# With POOL = 4, eight columns, and a group that lists 1, 4 and 6, the two means count as 3 and 2 columns.


class Pooled(NamedTuple):
    """Means of blocks of POOL columns, and how many columns each mean stands in for. M = ceil(n / POOL) blocks."""
    k: Tensor                                               # (B, H, M, D)
    v: Tensor                                               # (B, H, M, D)
    unlisted: Tensor                                        # (B, H, G, M) uint8


def block_means(x: Tensor, n: int, size: int = POOL) -> Tensor:
    """Means of blocks of `size` neighbours among the first n rows of x (..., N, D); the last block may be shorter.
    -> (..., ceil(n / size), D)"""
    full = n // size * size
    means = x[..., :full, :].unflatten(-2, (-1, size)).mean(-2)                   # (..., n // size, D)
    return means if full == n else torch.cat([means, x[..., full:n, :].mean(-2, keepdim=True)], -2)


def count_unlisted(columns: Tensor, counts: Tensor, n: int) -> Tensor:
    """How many columns of each block of POOL, among the first n, a list leaves out.
    columns (..., G, K) uint16, counts (..., G, P) -> (..., G, ceil(n / POOL)) uint8"""
    index, in_list = listed_columns(columns, counts)                              # (..., G, K) each
    ascending = torch.where(in_list, index, 2**31 - 1)                            # (..., G, K), padding last
    ends = torch.arange(0, n + POOL, POOL, dtype=torch.int32, device=columns.device).clamp(max=n)      # (M + 1,)
    below = torch.searchsorted(ascending, ends.expand(*index.shape[:-1], -1).contiguous(), out_int32=True)
    return (ends.diff() - below.diff()).to(torch.uint8)                           # (..., G, M)


# ---------------------------------------------------------------------------------------------------------------------
# column-sparse attention, added to a base or taken from it


def column_sparse_attention(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor, columns: Tensor, counts: Tensor,
                            base: Tensor, sign: float, pooled: Pooled | None = None) -> Tensor:
    """base + sign * o_S, where o_S is the attention of each group of rows to its listed columns only.

    q (B, H, Nq, D), k and v (B, H, Nk, D), lse_prev (B, H, Nq) of dense attention at this step or an earlier one, which
    takes the place of the softmax's maximum (the result does not depend on it, its time does), columns (B, H, G, K)
    uint16, counts (B, H, G, P) int32, base (B, H, Nq, D) -> (B, H, Nq, D) in q's dtype. An empty list gives o_S = 0.
    With pooled, the softmax also goes over the blocks' means, as often as they stand for columns. The dense result as
    base and sign -1 leave the rest, which a cache holds; the rest and sign 1, with fresh q, k, v and means, make the
    output of a sparse step: the dense result if q, k and v have not changed.
    """
    return _column_sparse_attention_op(q, k, v, lse_prev, columns, counts, base, sign, *(pooled or ()))


def column_sparse_attention_ref(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor, columns: Tensor, counts: Tensor,
                                base: Tensor, sign: float, k_mean: Tensor | None = None,
                                v_mean: Tensor | None = None, unlisted: Tensor | None = None) -> Tensor:
    (B, H, _, D), Nk = q.shape, k.shape[2]
    index, in_list = listed_columns(columns[..., :max(1, int(counts.max()))], counts)  # (B, H, G, K) each
    head = torch.arange(B * H, device=q.device).view(B, H, 1)
    k_rows, v_rows = F.pad(torch.stack([k, v]), (0, 0, 0, 1)).view(2, -1, D)      # (B H (Nk + 1), D) each
    groups = []
    for g, q_g in enumerate(q.split(GROUP, 2)):                                   # (B, H, rows, D)
        listed = in_list[:, :, g]                                                 # (B, H, K)
        S = torch.where(listed, index[:, :, g], Nk) + head * (Nk + 1)             # Nk: a row of zeros, for padding
        k_S, v_S = (rows.index_select(0, S.flatten()).view(*S.shape, D) for rows in (k_rows, v_rows))
        bias = torch.where(listed, 0.0, -torch.inf)                               # (B, H, K)
        if unlisted is not None:                                                  # M more columns, the blocks' means
            k_S, v_S = torch.cat([k_S, k_mean], 2), torch.cat([v_S, v_mean], 2)   # (B, H, K + M, D) each
            bias = torch.cat([bias, unlisted[:, :, g].to(bias.dtype).log()], -1)  # (B, H, K + M)
        groups.append(_softmax(q_g, k_S, v_S, bias[:, :, None])[0])               # (B, H, rows, D)
    return (base + sign * torch.cat(groups, 2)).to(q.dtype).contiguous()          # (B, H, Nq, D)


@_jit
def _attend_listed(q, k_ptr, v_ptr, stride_kn, stride_vn, columns_ptr, counts_ptr, k_mean_ptr, v_mean_ptr, unlisted_ptr,
                   M, scale, m, BLOCK_N: tl.constexpr, D: tl.constexpr, WIDE_OFFSETS: tl.constexpr,
                   PAGES: tl.constexpr, TRACK_MAX: tl.constexpr):
    """A group of rows q (rows, D) against its listed columns and M means -> acc (rows, D), m (rows,), z (rows,) as in
    _take_tile."""
    lane = tl.arange(0, BLOCK_N)
    count = tl.load(counts_ptr + PAGES - 1)
    acc = tl.zeros(q.shape, tl.float32)
    z = tl.zeros((q.shape[0],), tl.float32)
    full = count // BLOCK_N * BLOCK_N
    entries = _load_entries(columns_ptr, lane, count)                             # (columns,)
    for start in range(0, full, BLOCK_N):
        next_entries = _load_entries(columns_ptr, start + BLOCK_N + lane, count)
        index = _columns_of(entries, start + lane, counts_ptr, PAGES)
        acc, m, z = _attend_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, index, None, scale, acc, m, z,
                                 D, WIDE_OFFSETS, TRACK_MAX)
        entries = next_entries
    if full < count:
        in_list = full + lane < count
        index = _columns_of(entries, full + lane, counts_ptr, PAGES)
        acc, m, z = _attend_tile(q, k_ptr, v_ptr, stride_kn, stride_vn, index, in_list, scale, acc, m, z,
                                 D, WIDE_OFFSETS, TRACK_MAX)
    if unlisted_ptr is not None:                                                  # the blocks' means, side by side
        for start in range(0, M, BLOCK_N):
            block = start + lane
            unlisted = tl.load(unlisted_ptr + block, mask=block < M, other=0).to(tl.float32)      # (columns,)
            acc, m, z = _attend_tile(q, k_mean_ptr, v_mean_ptr, D, D, block, block < M, scale, acc, m, z,
                                     D, WIDE_OFFSETS, TRACK_MAX, weight=unlisted)
    return acc, m, z


@_jit
def _column_sparse_attention_kernel(
        q_ptr, k_ptr, v_ptr, lse_prev_ptr, columns_ptr, counts_ptr, k_mean_ptr, v_mean_ptr, unlisted_ptr, base_ptr,
        o_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        stride_bb, stride_bh, stride_bn, H, Nq, K, M, scale, sign, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        D: tl.constexpr, LOG2E: tl.constexpr, WIDE_OFFSETS: tl.constexpr, PAGES: tl.constexpr):
    """One program: one group of rows against its listed columns, added to its rows of the base or taken off them.

    The previous lse stands in for the softmax's maximum here, too (attention with column mass)."""
    g = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    rows = g * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, b, h, rows, stride_qb, stride_qh, stride_qn, Nq, D)     # (rows, D)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    group = head * tl.num_programs(0) + g
    columns_ptr += group * K
    counts_ptr += group * PAGES
    if unlisted_ptr is not None:
        k_mean_ptr += head * M * D
        v_mean_ptr += head * M * D
        unlisted_ptr += group * M
    lse_prev = tl.load(lse_prev_ptr + head * Nq + rows, mask=rows < Nq, other=float("inf"))   # (rows,); inf: p = 0

    acc, m, z = _attend_listed(q, k_ptr, v_ptr, stride_kn, stride_vn, columns_ptr, counts_ptr, k_mean_ptr, v_mean_ptr,
                               unlisted_ptr, M, scale, lse_prev * LOG2E - 8, BLOCK_N, D, WIDE_OFFSETS, PAGES,
                               TRACK_MAX=False)
    if not _all_near(z, rows < Nq, q_ptr.dtype.element_ty):
        m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        acc, m, z = _attend_listed(q, k_ptr, v_ptr, stride_kn, stride_vn, columns_ptr, counts_ptr, k_mean_ptr,
                                   v_mean_ptr, unlisted_ptr, M, scale, m, BLOCK_N, D, WIDE_OFFSETS, PAGES,
                                   TRACK_MAX=True)

    o_S = acc / tl.where(z > 0, z, 1.0)[:, None]                                  # (rows, D); 0 for an empty list
    base = _load_rows(base_ptr, b, h, rows, stride_bb, stride_bh, stride_bn, Nq, D).to(tl.float32)        # (rows, D)
    _store_rows(o_ptr, None, base + sign * o_S, None, head, rows, Nq, D, LOG2E)


def column_sparse_attention_triton(q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor, columns: Tensor, counts: Tensor,
                                   base: Tensor, sign: float, k_mean: Tensor | None = None,
                                   v_mean: Tensor | None = None, unlisted: Tensor | None = None) -> Tensor:
    _check_operands(q, k, v)
    B, H, Nq, D = q.shape
    if base.stride(-1) != 1:
        base = base.contiguous()
    result, M = torch.empty(q.shape, dtype=q.dtype, device=q.device), 0
    if unlisted is not None:
        k_mean, v_mean, unlisted = k_mean.contiguous(), v_mean.contiguous(), unlisted.contiguous()
        M = unlisted.shape[-1]
    # With 32 columns a tile and 128 registers a thread, two programs share a multiprocessor: one computes while another
    # loads q or stores o. On an H200 0.121 instead of 0.143 ms for 4,352 tokens, 23.9 instead of 26.5 for HunyuanVideo,
    # 23.6 instead of 25.6 for Wan2.1. Where registers hold q, 128 are too few.
    registers = 128 if _on_hopper(q) and q.dtype != torch.float32 else None
    _column_sparse_attention_kernel[(triton.cdiv(Nq, GROUP), B * H)](
        q, k, v, lse_prev.contiguous(), columns.contiguous(), counts.contiguous(), k_mean, v_mean, unlisted, base,
        result, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *base.stride()[:3], H, Nq, columns.shape[-1], M,
        LOG2E / math.sqrt(D), float(sign), **_attention_constants(q, k, v, 32), PAGES=counts.shape[-1],
        num_warps=8, num_stages=_stages(q), maxnreg=registers)
    return result


@_op("column_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor lse_prev, Tensor columns, Tensor counts, "
     "Tensor base, float sign, Tensor? k_mean=None, Tensor? v_mean=None, Tensor? unlisted=None) -> Tensor",
     lambda q, *_: q.new_empty(q.shape))
def _column_sparse_attention_op(q, k, v, lse_prev, columns, counts, base, sign,
                                k_mean=None, v_mean=None, unlisted=None):
    run = _pick(q, column_sparse_attention_triton, column_sparse_attention_ref)
    return run(q, k, v, lse_prev, columns, counts, base, sign, k_mean, v_mean, unlisted)


# ---------------------------------------------------------------------------------------------------------------------
# the first layer of the MLP: how its listed hidden columns changed


def sparse_mlp_fc1(x: Tensor, w1: Tensor, b1: Tensor | None, columns: Tensor, counts: Tensor, act: Tensor) -> Tensor:
    """Recompute the listed hidden columns of gelu_tanh(x w1^T + b1) and say by how much they changed.

    x (B, M, C), w1 (F, C), b1 (F,) or None, columns (B, G, K) uint16, counts (B, G, P) int32, act (B, F, M): the
    cached activation, stored hidden column after hidden column; its listed parts are updated in place
    -> delta (B, G, K, GROUP) in x's dtype, a group's hidden columns side by side, 0 in padding.
    delta is new minus old as *stored* in act, so what fc2 has summed up stays the sum of what act holds.
    """
    return _sparse_mlp_fc1_op(x, w1, b1, columns, counts, act)


def _lists_by_group(columns: Tensor, counts: Tensor) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Yield b, g, the rows of group g, and its list (count,) without padding."""
    index, in_list = listed_columns(columns, counts)                              # (B, G, K) each
    for b, g in itertools.product(range(index.shape[0]), range(index.shape[1])):
        yield b, g, slice(g * GROUP, (g + 1) * GROUP), index[b, g, in_list[b, g]].long()


def sparse_mlp_fc1_ref(x: Tensor, w1: Tensor, b1: Tensor | None, columns: Tensor, counts: Tensor,
                       act: Tensor) -> Tensor:
    dtype = _acc_dtype(x)
    delta = x.new_zeros(*columns.shape, GROUP)                                    # (B, G, K, GROUP)
    for b, g, rows, hidden in _lists_by_group(columns, counts):
        pre = w1.index_select(0, hidden).to(dtype) @ x[b, rows].to(dtype).mT      # (count, rows)
        if b1 is not None:
            pre += b1[hidden, None]
        new = F.gelu(pre, approximate="tanh").to(act.dtype)
        old = act[b, :, rows].index_select(0, hidden)
        delta[b, g, :len(hidden), :new.shape[1]] = new.to(dtype) - old
        act[b, :, rows].index_copy_(0, hidden, new)
    return delta


@_jit
def _sparse_mlp_fc1_kernel(x_ptr, w1_ptr, b1_ptr, columns_ptr, counts_ptr, act_ptr, delta_ptr,
                           stride_xb, stride_xm, stride_w, stride_ab, stride_af, M, K, C,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PAGES: tl.constexpr):
    """One program: one group of rows, one tile of its listed hidden columns."""
    g = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    group = b * tl.num_programs(0) + g
    rows = g * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    counts_ptr += group * PAGES
    count = tl.load(counts_ptr + PAGES - 1)
    in_list = slot < count
    entries = _load_entries(columns_ptr + group * K, slot, count)                 # (columns,)
    hidden = _columns_of(entries, slot, counts_ptr, PAGES).to(tl.int64)
    width = tl.where(tl.program_id(1) * BLOCK_N < count, C, 0)     # if the tile is all padding, it only writes zeros

    # Rows and columns that are absent read valid memory and are not stored: the loop needs no masks.
    x_at = x_ptr + b * stride_xb + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm + c[None, :]
    w_at = w1_ptr + hidden[:, None] * stride_w + c[None, :]
    pre = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, width, BLOCK_C):
        w = tl.load(w_at + start)                                                 # (columns, channels)
        x = tl.load(x_at + start)                                                 # (rows, channels)
        pre = tl.dot(w, tl.trans(x), pre, input_precision="ieee")                 # (columns, rows)
    if b1_ptr is not None:
        pre += tl.load(b1_ptr + hidden).to(tl.float32)[:, None]
    # gelu_tanh(a) = a sigmoid(2 sqrt(2 / pi) (a + 0.044715 a^3))
    new = pre * tl.sigmoid(1.5957691216057308 * (pre + 0.044715 * pre * pre * pre))
    new = new.to(act_ptr.dtype.element_ty)                                        # (columns, rows)

    inside = in_list[:, None] & (rows < M)[None, :]
    act_at = act_ptr + b * stride_ab + hidden[:, None] * stride_af + rows[None, :]
    old = tl.load(act_at, mask=inside, other=0.0)
    tl.store(act_at, new, mask=inside)
    delta = tl.where(inside, new.to(tl.float32) - old.to(tl.float32), 0.0)
    delta_at = delta_ptr + (group * K + slot)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(delta_at, delta.to(delta_ptr.dtype.element_ty), mask=(slot < K)[:, None])


def _channel_tile(C: int, most: int) -> int:
    """The widest tile up to `most` that divides C, so that no kernel needs a mask for channels."""
    _need(C % 16 == 0, f"channels must be a multiple of 16, got {C}")
    return min(most, C & -C)


def sparse_mlp_fc1_triton(x: Tensor, w1: Tensor, b1: Tensor | None, columns: Tensor, counts: Tensor,
                          act: Tensor) -> Tensor:
    _check_operands(x, w1)
    _need(act.stride(-1) == 1, "the last dimension of act must have stride 1")
    (B, M, C), (_, G, K) = x.shape, columns.shape
    b1 = None if b1 is None else b1.contiguous()
    delta = torch.empty(B, G, K, GROUP, dtype=x.dtype, device=x.device)
    # near the fastest on an H100, and small enough for GPUs with 100 KB of shared memory; fc2 likewise
    block_c = _channel_tile(C, 64 if x.element_size() == 2 else 32)
    _sparse_mlp_fc1_kernel[(G, triton.cdiv(K, 128), B)](
        x, w1, b1, columns.contiguous(), counts.contiguous(), act, delta,
        *x.stride()[:2], w1.stride(0), *act.stride()[:2], M, K, C,
        BLOCK_M=GROUP, BLOCK_N=128, BLOCK_C=block_c, PAGES=counts.shape[-1], num_warps=4, num_stages=3)
    return delta


@_op("sparse_mlp_fc1(Tensor x, Tensor w1, Tensor? b1, Tensor columns, Tensor counts, Tensor(a!) act) -> Tensor",
     lambda x, w1, b1, columns, counts, act: x.new_empty(*columns.shape, GROUP))
def _sparse_mlp_fc1_op(x, w1, b1, columns, counts, act):
    return _pick(x, sparse_mlp_fc1_triton, sparse_mlp_fc1_ref)(x, w1, b1, columns, counts, act)


# ---------------------------------------------------------------------------------------------------------------------
# the second layer of the MLP: add what the changed hidden columns contribute


def sparse_mlp_fc2(delta: Tensor, w2t: Tensor, columns: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    """Add packed deltas times the listed rows of w2t onto the cached output, in place.

    delta (B, G, K, GROUP) from `sparse_mlp_fc1`, w2t (F, C): the second weight transposed, columns (B, G, K) uint16,
    counts (B, G, P) int32, out (B, M, C) -> out.
    """
    _sparse_mlp_fc2_op(delta, w2t, columns, counts, out)
    return out


def sparse_mlp_fc2_ref(delta: Tensor, w2t: Tensor, columns: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    dtype = _acc_dtype(delta)
    for b, g, rows, hidden in _lists_by_group(columns, counts):
        n_rows = out[b, rows].shape[0]
        delta_g = delta[b, g, :len(hidden), :n_rows].mT                           # (rows, count)
        out[b, rows] += delta_g.to(dtype) @ w2t.index_select(0, hidden).to(dtype)      # (rows, C)
    return out


@_jit
def _sparse_mlp_fc2_kernel(delta_ptr, w2t_ptr, columns_ptr, counts_ptr, out_ptr, stride_w, stride_ob, stride_om, M, K,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
                           WIDE_OFFSETS: tl.constexpr, PAGES: tl.constexpr):
    """One program: one group of rows, one tile of output channels."""
    g = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    group = b * tl.num_programs(0) + g
    rows = g * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns_ptr += group * K
    counts_ptr += group * PAGES
    count = tl.load(counts_ptr + PAGES - 1)
    delta_at = delta_ptr + group * K * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    full = count // BLOCK_N * BLOCK_N
    entries = _load_entries(columns_ptr, lane, count)                             # (columns,)
    for start in range(0, full, BLOCK_N):
        next_entries = _load_entries(columns_ptr, start + BLOCK_N + lane, count)
        hidden = _columns_of(entries, start + lane, counts_ptr, PAGES)
        if WIDE_OFFSETS:
            hidden = hidden.to(tl.int64)
        delta = tl.load(delta_at + (start + lane)[:, None] * BLOCK_M)             # (columns, rows)
        w = tl.load(w2t_ptr + hidden[:, None] * stride_w + c[None, :])            # (columns, channels)
        acc = tl.dot(tl.trans(delta), w, acc, input_precision="ieee")             # (rows, channels)
        entries = next_entries
    if full < count:
        in_list = full + lane < count
        hidden = _columns_of(entries, full + lane, counts_ptr, PAGES)
        delta = tl.load(delta_at + (full + lane)[:, None] * BLOCK_M, mask=in_list[:, None], other=0.0)
        w_at = w2t_ptr + hidden.to(tl.int64)[:, None] * stride_w + c[None, :]
        w = tl.load(w_at, mask=in_list[:, None], other=0.0)
        acc = tl.dot(tl.trans(delta), w, acc, input_precision="ieee")

    out_at = out_ptr + b * stride_ob + rows.to(tl.int64)[:, None] * stride_om + c[None, :]
    inside = rows[:, None] < M
    out = tl.load(out_at, mask=inside, other=0.0) + acc                           # (rows, channels)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


def sparse_mlp_fc2_triton(delta: Tensor, w2t: Tensor, columns: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    _check_operands(delta, w2t)
    _need(out.stride(-1) == 1, "the last dimension of out must have stride 1")
    (B, G, K, _), (_, M, C) = delta.shape, out.shape
    half = delta.element_size() == 2
    block_c = _channel_tile(C, 128)
    wide = w2t.shape[0] * w2t.stride(0) >= 2**31            # offsets into w2t need 64 bits
    _sparse_mlp_fc2_kernel[(G, C // block_c, B)](
        delta.contiguous(), w2t, columns.contiguous(), counts.contiguous(), out,
        w2t.stride(0), *out.stride()[:2], M, K,
        BLOCK_M=GROUP, BLOCK_N=64 if half else 32, BLOCK_C=block_c, WIDE_OFFSETS=wide, PAGES=counts.shape[-1],
        num_warps=4 if half else 8, num_stages=3)                                 # 4 warps: 5 % faster on an H200
    return out


@_op("sparse_mlp_fc2(Tensor delta, Tensor w2t, Tensor columns, Tensor counts, Tensor(a!) out) -> ()",
     lambda delta, w2t, columns, counts, out: None)
def _sparse_mlp_fc2_op(delta, w2t, columns, counts, out):
    _pick(delta, sparse_mlp_fc2_triton, sparse_mlp_fc2_ref)(delta, w2t, columns, counts, out)
