"""Tests of sparse_kernels.py: definitions against naive float64 sums, kernels against the definitions.

On a CPU the Triton kernels run in Triton's interpreter, on a GPU they are compiled.
"""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sparse_kernels as sk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]     # the interpreter has no bf16 dot
DTYPES = [torch.float32, *HALF]
ATOL = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}            # 8 ulp at 1 for the halves
SHAPES = [(200, 130, 64), (61, 61, 16), (130, 300, 128), (256, 128, 32)]            # Nq, Nk, D
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")             # numpy on infinities, as intended
needs_kernels = pytest.mark.skipif(
    sk.triton is None or DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no way to run Triton")


# ---------------------------------------------------------------------------------------------------
# inputs and oracles


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch):
    """Kernel outputs start as NaN (or a huge integer), and a guard band behind each must stay as it was."""
    buffers, guard, empty = [], 64, torch.empty

    def poisoned(*size, dtype=torch.float32, device="cpu"):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = empty(shape.numel() + guard, dtype=dtype, device=device)
        buffer.fill_(float("nan") if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max)
        buffers.append(buffer)
        return buffer[:shape.numel()].view(shape)

    monkeypatch.setattr(sk.torch, "empty", poisoned)
    yield
    assert buffers, "no kernel allocated its output"
    for buffer in buffers:
        band = buffer[-guard:]
        assert (band.isnan() if band.is_floating_point() else band == band.max()).all(), "written past the end"
        if not buffer.is_floating_point() and buffer.dtype != torch.bool:
            assert (band == torch.iinfo(buffer.dtype).max).all()


def inputs(Nq, Nk, D, dtype=torch.float32, B=2, H=2, strided=True):
    """q, k, v; strided ones are views of the (B, N, H, D) that a linear layer makes."""
    def one(N):
        x = torch.randn(B, N, H, D, device=DEVICE).to(dtype).transpose(1, 2)
        return x if strided else x.contiguous()
    return one(Nq), one(Nk), one(Nk)


def random_columns(Nq, Nk, lead=(2, 2)):
    """Ragged lists, the first empty and the last full, garbage in the padding."""
    G = -(-Nq // sk.GROUP)
    n_lists = int(np.prod(lead)) * G
    lengths = np.random.default_rng(0).integers(0, Nk + 1, n_lists)
    lengths[0], lengths[-1] = 0, Nk
    columns = torch.full((n_lists, Nk + 3), -(2 ** 30), dtype=torch.int32)
    for i, n in enumerate(lengths):
        columns[i, :n] = torch.randperm(Nk)[:n].sort().values
    counts = torch.from_numpy(lengths).to(torch.int32)
    return columns.view(*lead, G, -1).to(DEVICE), counts.view(*lead, G).to(DEVICE)


def listed_mask(columns, counts, Nq, Nk):
    """bool (..., Nq, Nk): which columns each row may use."""
    mask = torch.zeros(*counts.shape, Nk, dtype=torch.bool)
    for at in np.ndindex(*counts.shape):
        mask[at][columns[at][:counts[at]].long().cpu()] = True
    return mask.repeat_interleave(sk.GROUP, -2)[..., :Nq, :].to(DEVICE)


def naive_attention(q, k, v, allowed=None):
    """float64 softmax attention over the allowed columns, 0 and -inf where there are none."""
    s = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * q.shape[-1] ** -0.5
    weight = s.exp() if allowed is None else s.exp() * allowed
    total = weight.sum(-1)
    o = torch.einsum("bhij,bhjd->bhid", weight, v.double()) / total.clamp_min(1e-300)[..., None]
    return o, total.log(), s


def assert_no_worse(got, truth, baseline, factor=2.0, floor=2e-7):
    """got is at most `factor` times as far from the float64 truth as the framework's result in the same dtype."""
    error, allowed = (got.double() - truth).abs(), (baseline.double() - truth).abs()
    assert error.mean() <= factor * allowed.mean() + floor, (error.mean(), allowed.mean())
    assert error.max() <= 2 * factor * allowed.max() + 10 * floor, (error.max(), allowed.max())


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------
# definitions


@pytest.mark.parametrize("Nq, Nk, D", SHAPES)
def test_attention_definitions(Nq, Nk, D):
    q, k, v = inputs(Nq, Nk, D, torch.float64)
    o, lse, s = naive_attention(q, k, v)
    lse_prev = lse + torch.randn_like(lse)
    mass = torch.stack([(s - lse_prev[..., None]).exp()[:, :, g:g + 128].sum(2) for g in range(0, Nq, 128)], 2)
    torch.testing.assert_close(sk.attention_ref(q, k, v), (o, lse))
    torch.testing.assert_close(sk.attention_with_column_mass_ref(q, k, v, lse_prev), (o, lse, mass))

    rows = torch.tensor([min(128, Nq - g) for g in range(0, Nq, 128)], dtype=torch.float64, device=DEVICE)
    handed_out = sk.attention_with_column_mass_ref(q, k, v, lse)[2].sum(-1)
    torch.testing.assert_close(handed_out, rows.expand_as(handed_out))      # each row hands out exactly 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq, Nk, D", SHAPES[:2])
def test_public_attention(Nq, Nk, D, dtype):
    q, k, v = inputs(Nq, Nk, D, dtype)
    o, lse, _ = naive_attention(q, k, v)
    got, got_lse = sk.attention(q, k, v)
    assert got.dtype == dtype and got_lse.dtype == torch.float32
    assert_no_worse(got, o, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(got_lse.double(), lse, atol=5e-5, rtol=0)


@pytest.mark.parametrize("Nq, Nk, D", SHAPES)
def test_column_sparse_definition(Nq, Nk, D):
    q, k, v = inputs(Nq, Nk, D, torch.float64)
    columns, counts = random_columns(Nq, Nk)
    o, lse, s = naive_attention(q, k, v)
    allowed = listed_mask(columns, counts, Nq, Nk)
    o_S, lse_S, _ = naive_attention(q, k, v, allowed)
    assert (lse_S == -torch.inf).any() and allowed.all(-1).any(), "the lists must include empty and full ones"
    torch.testing.assert_close(sk.column_sparse_attention_ref(q, k, v, columns, counts), (o_S, lse_S))

    o_R, lse_R, _ = naive_attention(q, k, v, ~allowed)
    got = sk.column_sparse_attention_ref(q, k, v, columns, counts, o, lse, "split")
    torch.testing.assert_close(got, (o_R, lse_R))
    got = sk.column_sparse_attention_ref(q, k, v, columns, counts, o, None, "split")
    torch.testing.assert_close(got, (o - o_S, None))

    # a sparse step with other q, k, v: the stale rest keeps its own weights
    q2, k2, v2 = inputs(Nq, Nk, D, torch.float64)
    fresh, fresh_lse, s2 = naive_attention(q2, k2, v2, allowed)
    n = (s2.exp() * allowed) @ v2 + (s.exp() * ~allowed) @ v
    z = (s2.exp() * allowed).sum(-1) + (s.exp() * ~allowed).sum(-1)
    got = sk.column_sparse_attention_ref(q2, k2, v2, columns, counts, o_R, lse_R, "add")[0]
    torch.testing.assert_close(got, n / z[..., None])
    got = sk.column_sparse_attention_ref(q2, k2, v2, columns, counts, o - o_S, None, "add")[0]
    torch.testing.assert_close(got, o - o_S + fresh)


# ---------------------------------------------------------------------------------------------------
# attention kernels


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq, Nk, D", SHAPES)
def test_dense_kernels(poison, Nq, Nk, D, dtype):
    q, k, v = inputs(Nq, Nk, D, dtype, strided=D != 16)
    o, lse = sk.attention_ref(q.double(), k.double(), v.double())
    lse_prev = (lse + torch.randn_like(lse)).float()
    mass = sk.attention_with_column_mass_ref(q.double(), k.double(), v.double(), lse_prev.double())[2]
    baseline = F.scaled_dot_product_attention(q, k, v)

    got, got_lse = sk.attention_triton(q, k, v)
    assert_no_worse(got, o, baseline)
    torch.testing.assert_close(got_lse.double(), lse, atol=5e-5, rtol=0)
    got, got_lse, got_mass = sk.attention_with_column_mass_triton(q, k, v, lse_prev)
    assert_no_worse(got, o, baseline)
    torch.testing.assert_close(got_lse.double(), lse, atol=5e-5, rtol=0)
    torch.testing.assert_close(got_mass.double(), mass, atol=1e-6, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq, Nk, D", SHAPES)
def test_column_sparse_kernel(poison, Nq, Nk, D, dtype):
    q, k, v = inputs(Nq, Nk, D, dtype, strided=D != 16)
    columns, counts = random_columns(Nq, Nk)
    wide = q.double(), k.double(), v.double(), columns, counts
    allowed = listed_mask(columns, counts, Nq, Nk)
    o_S, lse_S = sk.column_sparse_attention_ref(*wide)
    empty = lse_S == -torch.inf
    baseline = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).masked_fill(empty[..., None], 0)

    got, got_lse = sk.column_sparse_attention_triton(q, k, v, columns, counts)
    assert got.dtype == dtype and not got[empty].any()
    assert_no_worse(got, o_S, baseline)
    torch.testing.assert_close(got_lse.double(), lse_S, atol=5e-5, rtol=0)

    o, lse = sk.attention_ref(q, k, v)
    for row_lse in (None, lse):
        want, want_lse = sk.column_sparse_attention_ref(*wide, o.double(), None if lse is None else row_lse, "split")
        got, got_lse = sk.column_sparse_attention_triton(q, k, v, columns, counts, o, row_lse, "split")
        left = torch.ones_like(lse_S) if row_lse is None else 1 - (lse_S - row_lse).exp().clamp(max=1)
        weighed = [x * left[..., None] for x in (got.double(), want)]       # the rest counts by what is left
        assert_no_worse(weighed[0], weighed[1], weighed[1] + (baseline.double() - o_S), factor=3)
        assert got.isfinite().all()
        if row_lse is not None:
            some = left > 1e-2
            torch.testing.assert_close(got_lse[some].double(), want_lse[some], atol=1e-3, rtol=0)
        q2, k2, v2 = inputs(Nq, Nk, D, dtype)
        rest, rest_lse = want.to(dtype), None if want_lse is None else want_lse.float()
        wide2 = q2.double(), k2.double(), v2.double(), columns, counts
        want = sk.column_sparse_attention_ref(*wide2, rest.double(), rest_lse, "add")[0]
        got, none = sk.column_sparse_attention_triton(q2, k2, v2, columns, counts, rest, rest_lse, "add")
        assert none is None
        assert_no_worse(got, want, want.to(dtype).double() + (baseline.double() - o_S), factor=3)


def triton_or_public():
    """Both implementations of the three public forms of column_sparse_attention."""
    forms = [pytest.param(sk._column_sparse_attention, id="public")]
    return forms + [pytest.param(sk.column_sparse_attention_triton, id="triton", marks=needs_kernels)]


@pytest.mark.parametrize("run", triton_or_public())
@pytest.mark.parametrize("by_mass", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deltas_equal_dense(monkeypatch, run, by_mass, dtype):
    monkeypatch.setattr(sk, "_column_sparse_attention", run)
    Nq, Nk, D = 200, 300, 64
    q, k, v = inputs(Nq, Nk, D, dtype)
    columns, counts = random_columns(Nq, Nk)
    o, lse = sk.attention(q, k, v)
    rest, rest_lse = sk.split_off_columns(q, k, v, columns, counts, o, lse if by_mass else None)
    assert (rest_lse is not None) == by_mass
    torch.testing.assert_close(sk.add_columns(q, k, v, columns, counts, rest, rest_lse), o, atol=ATOL[dtype], rtol=0)

    q2, k2, v2 = inputs(Nq, Nk, D, dtype)                                   # everything kept: nothing stale is left
    columns = torch.arange(Nk, dtype=torch.int32, device=DEVICE).expand(2, 2, 2, Nk)
    counts = torch.full((2, 2, 2), Nk, dtype=torch.int32, device=DEVICE)
    rest, rest_lse = sk.split_off_columns(q, k, v, columns, counts, o, lse if by_mass else None)
    dense = sk.attention(q2, k2, v2)[0]
    torch.testing.assert_close(sk.add_columns(q2, k2, v2, columns, counts, rest, rest_lse), dense, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("run", triton_or_public())
def test_add_columns_is_finite_at_the_edges(monkeypatch, run):
    monkeypatch.setattr(sk, "_column_sparse_attention", run)
    q, k, v = inputs(130, 61, 16)
    columns = torch.arange(61, dtype=torch.int32, device=DEVICE).expand(2, 2, 2, 61)
    counts = torch.tensor([0, 61], dtype=torch.int32, device=DEVICE).expand(2, 2, 2)    # one empty list, one full
    rest = torch.randn_like(q)
    o_S = sk.column_sparse_attention(q, k, v, columns, counts)[0]
    nothing = torch.full(q.shape[:3], -torch.inf, device=DEVICE)
    got = sk.add_columns(q, k, v, columns, counts, rest, nothing)
    assert torch.equal(got[:, :, :128], rest[:, :, :128])                   # both empty
    torch.testing.assert_close(got[:, :, 128:], o_S[:, :, 128:])            # the rest is empty
    got = sk.add_columns(q, k, v, columns, counts, rest, torch.zeros_like(nothing))
    assert torch.equal(got[:, :, :128], rest[:, :, :128])                   # the list is empty
    full = torch.full_like(counts, 61)
    o, lse = sk.attention(q, k, v)
    rest, rest_lse = sk.split_off_columns(q, k, v, columns, full, o, lse - 1e-6)    # the share of S rounds above 1
    assert not rest.any() and (rest_lse == -torch.inf).all()


@pytest.mark.parametrize("run", triton_or_public())
def test_only_listed_columns_are_read(run):
    q, k, v = inputs(130, 200, 64)
    columns, counts = random_columns(130, 199)
    columns, counts = columns + 1, counts.clamp(max=50)                     # not even column 0
    want = run(q, k, v, columns, counts, None, None, "none")
    used = listed_mask(columns, counts, 130, 200).any(2)                    # (B, H, Nk)
    assert not used[..., 0].any()
    k[~used], v[~used] = float("nan"), float("nan")
    torch.testing.assert_close(run(q, k, v, columns, counts, None, None, "none"), want, atol=0, rtol=0)


@needs_kernels
def test_offsets_beyond_32_bits():
    stride, N, D = 2 ** 24, 130, 16                                         # row 128 starts at element 2^31
    memory = torch.empty(N * stride, dtype=torch.float16, device=DEVICE)    # virtual on a CPU: few pages are touched
    far = [memory.as_strided((1, 1, N, D), (N * stride, N * stride, stride, 1), i * D) for i in range(4)]
    near = [torch.randn(1, 1, N, D, device=DEVICE).half() for _ in range(4)]
    for x, y in zip(far, near):
        x.copy_(y)
    columns, counts = random_columns(N, N, lead=(1, 1))
    assert counts[0, 0, 1] == N
    for x, y in zip(sk.attention_triton(*far[:3]), sk.attention_triton(*near[:3])):
        assert torch.equal(x, y)
    got = sk.column_sparse_attention_triton(*far[:3], columns, counts, far[3], None, "split")[0]
    assert torch.equal(got, sk.column_sparse_attention_triton(*near[:3], columns, counts, near[3], None, "split")[0])


# ---------------------------------------------------------------------------------------------------
# the choice of columns


def masses(kind, G, N):
    if kind == "distinct":
        return torch.rand(2, 3, G, N, device=DEVICE)
    if kind == "ties":
        return torch.randint(0, 4, (2, 3, G, N), device=DEVICE) / 3
    if kind == "wide":                                                      # from denormal to infinite, and zeros
        exponent = torch.randint(-149, 128, (2, 3, G, N), device=DEVICE).double()
        mass = (2 ** exponent).float()
        return torch.where(mass < 1e-40, 0, torch.where(mass > 1e38, torch.inf, mass))
    return torch.full((2, 3, G, N), 0.25, device=DEVICE)


def statics(kind, G, N):
    if kind == "none":
        return None, 0
    static = torch.rand(*((N,) if kind == "all groups" else (G, N)), device=DEVICE) < 0.1
    return static, int(static.sum(-1).max())


CHOICES = [("distinct", "none", 3, 130, 0.165, 0.0), ("distinct", "all groups", 2, 200, 0.05, 0.01),
           ("distinct", "per group", 2, 5000, 0.1, 0.01), ("ties", "none", 3, 130, 0.3, 0.0),
           ("ties", "per group", 1, 5000, 0.2, 0.3), ("wide", "none", 2, 61, 0.5, 0.05), ("wide", "none", 2, 61, 0.02, 0.0),
           ("equal", "all groups", 2, 130, 0.1, 0.0), ("distinct", "none", 2, 61, 1.0, 0.0),
           ("ties", "none", 2, 61, 0.0, 0.2), ("distinct", "per group", 2, 61, 0.0, 0.0), ("equal", "none", 1, 1, 0.0, 0.0),
           ("distinct", "none", 2, 61, 0.1, 1.0)]


@pytest.mark.parametrize("kind, static_kind, G, N, keep, random", CHOICES)
def test_choose_columns_definition(kind, static_kind, G, N, keep, random):
    mass, (static, most) = masses(kind, G, N), statics(static_kind, G, N)
    columns, counts = sk.choose_columns(mass, keep, random, static, 7)
    by_chance = sk._hash(7, torch.arange(G)[:, None], torch.arange(N)) < random * 2 ** 24
    for at in np.ndindex(*counts.shape):
        ranked = sorted(range(N), key=lambda j: (-mass[at][j].item(), j))
        want = set(ranked[:int(np.ceil(keep * N))]) | set(by_chance[at[-1]].nonzero()[:, 0].tolist())
        if static is not None:
            want |= set(static.expand(G, N)[at[-1]].nonzero()[:, 0].tolist())
        assert columns[at][:counts[at]].tolist() == sorted(want)
        assert not columns[at][counts[at]:].any()
    assert same(sk.choose_columns(mass, keep, random, static, 7, most)[0], columns)


@needs_kernels
@pytest.mark.parametrize("kind, static_kind, G, N, keep, random", CHOICES)
def test_choose_columns_kernel(poison, kind, static_kind, G, N, keep, random):
    mass, (static, most) = masses(kind, G, N), statics(static_kind, G, N)
    for seed in (1, 16, 2 ** 40 + 12345, -3) if random else (5,):
        want = sk.choose_columns_ref(mass, keep, random, static, seed, most)
        got = sk.choose_columns_triton(mass, keep, random, static, seed, most)
        assert same(got[0], want[0]) and same(got[1], want[1])


def test_random_columns_are_random():
    G, N, share = 64, 2000, 0.05
    mass = torch.zeros(1, 2, G, N, device=DEVICE)
    columns, counts = sk.choose_columns(mass, 0.0, share, None, 3)
    again, _ = sk.choose_columns(mass, 0.0, share, None, 4)
    assert same(columns[0, 0], columns[0, 1]) and not torch.equal(columns, again)
    sigma = (N * share * (1 - share)) ** 0.5
    assert ((counts - N * share).abs() < 5 * sigma).all()
    assert abs(counts[0, 0].double().mean().item() - N * share) < 5 * sigma / G ** 0.5
    picked = listed_mask(columns[:, :1], counts[:, :1], G * sk.GROUP, N)[0, 0, ::sk.GROUP].double()
    per_column = picked.sum(0)                                              # binomial over groups: no column is favoured
    assert abs(per_column.var().item() / (G * share * (1 - share)) - 1) < 0.2
    overlap = (picked @ picked.T).fill_diagonal_(0).sum() / (G * (G - 1))
    assert abs(overlap.item() / (N * share ** 2) - 1) < 0.1                 # groups draw independently


@pytest.mark.parametrize("run", [sk.choose_columns_ref, pytest.param(sk.choose_columns_triton, marks=needs_kernels)])
def test_too_small_a_capacity_is_not_overrun(run):
    static = torch.zeros(2, 200, dtype=torch.bool, device=DEVICE)
    static[0] = True
    columns, counts = run(torch.rand(1, 1, 2, 200, device=DEVICE), 0.0, 0.0, static, 0, 32)
    assert columns.shape[-1] == 32 and counts.flatten().tolist() == [32, 0]
    assert torch.equal(columns[0, 0, 0].cpu(), torch.arange(32, dtype=torch.int32)) and not columns[0, 0, 1].any()


# ---------------------------------------------------------------------------------------------------
# the MLP


def mlp_inputs(M, C, hidden, dtype, B=2):
    x = torch.randn(B, M, C, device=DEVICE).to(dtype)
    w1 = (torch.randn(hidden, C, device=DEVICE) / C ** 0.5).to(dtype)
    b1 = torch.randn(hidden, device=DEVICE).to(dtype)
    w2t = (torch.randn(hidden, C, device=DEVICE) / hidden ** 0.5).to(dtype)
    return x, w1, b1, w2t


MLPS = [(200, 48, 130), (61, 64, 300), (256, 16, 128)]                      # M, C, hidden


@pytest.mark.parametrize("M, C, hidden", MLPS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_definitions(M, C, hidden, bias):
    x, w1, b1, w2t = mlp_inputs(M, C, hidden, torch.float64)
    columns, counts = random_columns(M, hidden, lead=(2,))
    mask = listed_mask(columns, counts, M, hidden)
    act, out = torch.randn(2, M, hidden, dtype=x.dtype, device=DEVICE), torch.randn(2, M, C, dtype=x.dtype, device=DEVICE)
    h = x @ w1.T + (b1 if bias else 0)
    new = torch.where(mask, h * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h ** 3))), act)
    want = out + (new - act) @ w2t
    delta = sk.sparse_mlp_fc1_ref(x, w1, b1 if bias else None, columns, counts, act)
    assert not torch.equal(want, out)
    torch.testing.assert_close(act, new)
    assert sk.sparse_mlp_fc2_ref(delta, w2t, columns, counts, out) is out
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_hidden_columns_make_the_dense_mlp(dtype):
    M, C, hidden = 200, 64, 130
    x, w1, b1, w2t = mlp_inputs(M, C, hidden, dtype)
    act = F.gelu(torch.randn_like(x) @ w1.T + b1, approximate="tanh")       # the cache of another x
    out = act @ w2t
    columns = torch.arange(hidden, dtype=torch.int32, device=DEVICE).expand(2, 2, hidden)
    counts = torch.full((2, 2), hidden, dtype=torch.int32, device=DEVICE)
    got = sk.sparse_mlp_fc2(sk.sparse_mlp_fc1(x, w1, b1, columns, counts, act), w2t, columns, counts, out)
    assert got is out
    want = F.gelu(x.double() @ w1.double().T + b1.double(), approximate="tanh")
    torch.testing.assert_close(act.double(), want, atol=ATOL[dtype], rtol=0)
    torch.testing.assert_close(out.double(), want @ w2t.double(), atol=2 * ATOL[dtype], rtol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, C, hidden", MLPS)
def test_mlp_kernels(poison, M, C, hidden, dtype):
    x, w1, b1, w2t = mlp_inputs(M, C, hidden, dtype)
    columns, counts = random_columns(M, hidden, lead=(2,))
    mask = listed_mask(columns, counts, M, hidden)
    for bias in (b1, None):
        act = torch.randn(2, M, hidden + 16, device=DEVICE).to(dtype)[..., :hidden]     # rows with a stride of their own
        want_act, old_act = act.double(), act.clone()
        wide_bias = None if bias is None else bias.double()
        want_delta = sk.sparse_mlp_fc1_ref(x.double(), w1.double(), wide_bias, columns, counts, want_act)
        delta = sk.sparse_mlp_fc1_triton(x, w1, bias, columns, counts, act)
        torch.testing.assert_close(act.double(), want_act, atol=ATOL[dtype], rtol=ATOL[dtype])
        assert torch.equal(act[~mask], old_act[~mask]) and not torch.equal(act, old_act)
        torch.testing.assert_close(delta.double(), want_delta, atol=ATOL[dtype], rtol=ATOL[dtype])
        for b, g in np.ndindex(*counts.shape):
            n, rows = counts[b, g], slice(g * 128, (g + 1) * 128)
            stored = act[b, rows].double() - old_act[b, rows].double()      # delta is what act really changed by
            assert torch.equal(delta[b, rows, :n], stored[:, columns[b, g, :n].long()].to(dtype))
            assert not delta[b, rows, n:].any()
        out = torch.randn(2, M, 2 * C, device=DEVICE).to(dtype)[..., :C]
        want_out = sk.sparse_mlp_fc2_ref(delta.double(), w2t.double(), columns, counts, out.double())
        got = sk.sparse_mlp_fc2_triton(delta, w2t, columns, counts, out)
        assert got is out
        torch.testing.assert_close(got.double(), want_out, atol=ATOL[dtype], rtol=ATOL[dtype])


@needs_kernels
def test_mlp_kernels_read_only_listed_weights():
    M, C, hidden = 130, 48, 200
    x, w1, b1, w2t = mlp_inputs(M, C, hidden, torch.float32)
    columns, counts = random_columns(M, hidden - 1, lead=(2,))
    columns, counts = columns + 1, counts.clamp(max=50)                     # not even column 0
    used = listed_mask(columns, counts, M, hidden).any(1).any(0)
    assert not used[0]
    w1[~used], b1[~used], w2t[~used] = float("nan"), float("nan"), float("nan")
    delta = sk.sparse_mlp_fc1_triton(x, w1, b1, columns, counts, torch.zeros(2, M, hidden, device=DEVICE))
    out = sk.sparse_mlp_fc2_triton(delta, w2t, columns, counts, torch.zeros(2, M, C, device=DEVICE))
    assert delta.isfinite().all() and out.isfinite().all() and out.any()


# ---------------------------------------------------------------------------------------------------
# masks, registration, errors


@pytest.mark.parametrize("n", [1, 8, 61, 130, 9000])
@pytest.mark.parametrize("pack, unpack", [
    pytest.param(sk.pack_mask, sk.unpack_mask, id="public"), pytest.param(sk.pack_mask_ref, sk.unpack_mask_ref, id="ref"),
    pytest.param(sk.pack_mask_triton, sk.unpack_mask_triton, id="triton", marks=needs_kernels)])
def test_masks(n, pack, unpack):
    mask = torch.rand(2, 3, n, device=DEVICE) < 0.4
    bits = pack(mask)
    assert np.array_equal(bits.cpu().numpy(), np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))
    assert same(unpack(bits, n), mask)


def every_public_op(q, k, v, x, w1, b1, w2t, act, out):
    o, lse = sk.attention(q, k, v)
    o, lse, mass = sk.attention_with_column_mass(q, k, v, lse)
    columns, counts = sk.choose_columns(mass, 0.2, 0.05, None, 5)
    results = [o, lse, mass, columns, counts, *sk.column_sparse_attention(q, k, v, columns, counts)]
    for row_lse in (None, lse):
        rest, rest_lse = sk.split_off_columns(q, k, v, columns, counts, o, row_lse)
        results += [rest, sk.add_columns(q, k, v, columns, counts, rest, rest_lse)]
    hidden, n_hidden = columns[:, 0], counts[:, 0]
    delta = sk.sparse_mlp_fc1(x, w1, b1, hidden, n_hidden, act)
    results += [delta, sk.sparse_mlp_fc2(delta, w2t, hidden, n_hidden, out), act]
    bits = sk.pack_mask(mass > 1)
    return results + [bits, sk.unpack_mask(bits, mass.shape[-1])]


def test_compile_without_graph_breaks():
    q, k, v = inputs(200, 130, 16)
    x, w1, b1, w2t = mlp_inputs(200, 32, 130, torch.float32)
    act, out = torch.randn(2, 200, 130, device=DEVICE), torch.randn(2, 200, 32, device=DEVICE)
    want = every_public_op(q, k, v, x, w1, b1, w2t, act.clone(), out.clone())
    compiled = torch.compile(every_public_op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, v, x, w1, b1, w2t, act, out), want, strict=True):
        assert same(got, expected)


def test_registered_ops_keep_their_promises():
    q, k, v = inputs(130, 61, 16, B=1)
    o, lse = sk.attention_ref(q, k, v)
    columns, counts = random_columns(130, 61, lead=(1, 2))
    x, w1, b1, w2t = mlp_inputs(130, 16, 61, torch.float32, B=1)
    act, out = torch.zeros(1, 130, 61, device=DEVICE), torch.zeros(1, 130, 16, device=DEVICE)
    mask = torch.rand(2, 61, device=DEVICE) < 0.5
    calls = [(sk._attention, (q, k, v)), (sk.attention_with_column_mass, (q, k, v, lse)),
             (sk._choose_columns, (q.abs(), 0.3, 0.1, None, 1, 0)), (sk.pack_mask, (mask,)),
             (sk._column_sparse_attention, (q, k, v, columns, counts, None, None, "none")),
             (sk._column_sparse_attention, (q, k, v, columns, counts, o, lse, "split")),
             (sk._column_sparse_attention, (q, k, v, columns, counts, o, None, "add")),
             (sk.sparse_mlp_fc1, (x, w1, b1, columns[:, 0], counts[:, 0], act)),
             (sk._sparse_mlp_fc2, (torch.zeros(1, 130, 64, device=DEVICE), w2t, columns[:, 0], counts[:, 0], out)),
             (sk.unpack_mask, (sk.pack_mask(mask), 61))]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_runs_without_triton():
    program = """
import sys; sys.modules["triton"] = None
import torch, sparse_kernels as sk
q = torch.randn(1, 1, 130, 16)
o, lse, mass = sk.attention_with_column_mass(q, q, q, sk.attention(q, q, q)[1])
lists = sk.choose_columns(mass, 0.2, 0.0, None, 0)
assert sk.add_columns(q, q, q, *lists, *sk.split_off_columns(q, q, q, *lists, o, lse)).allclose(o, atol=1e-5)
for call in (lambda: sk.attention_triton(q, q, q), lambda: sk.choose_columns_triton(mass, 0.2, 0.0, None, 0, 0)):
    try:
        call()
    except ImportError as error:
        print("asked for:", error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                         cwd=os.path.dirname(os.path.abspath(sk.__file__)))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("asked for: Triton is not installed") == 2


@needs_kernels
def test_errors_say_what_is_wrong():
    q, k, v = inputs(130, 61, 16)
    with pytest.raises(ValueError, match="head dimension"):
        sk.attention_triton(*inputs(130, 61, 48))
    with pytest.raises(ValueError, match="share one of"):
        sk.attention_triton(q, k.half(), v)
    with pytest.raises(ValueError, match="stride 1"):
        sk.attention_triton(q, k.mT.contiguous().mT, v)
    with pytest.raises(ValueError, match="multiple of 16"):
        x, w1, b1, _ = mlp_inputs(130, 40, 61, torch.float32)
        sk.sparse_mlp_fc1_triton(x, w1, b1, *random_columns(130, 61, lead=(2,)), torch.zeros(2, 130, 61, device=DEVICE))
    with pytest.raises(ValueError, match="shares"):
        sk.choose_columns(torch.rand(1, 1, 1, 8, device=DEVICE), 16.5, 0.0, None, 0)
