"""Every test of the repository: python -m pytest test_all.py

In order: kernels (definitions against naive float64 sums, Triton kernels against the definitions: in Triton's
interpreter on a CPU, compiled on a GPU), text encoders and tokenizers against transformers, FLUX.1 against diffusers,
deltas against dense, the command line and its errors; then the same for Wan2.1 and HunyuanVideo; training
and scoring the embedded models. Oracles that are not installed are skipped.
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before the kernels are imported

import bench
import common
import flux_chipmunk
import hunyuan_chipmunk
import sparse_kernels as sk
import train_tiny
import wan_chipmunk
from cache import VIDEO_SKIPS, Sparsity, fit_steps, listed, make_plan, make_state, skip_preset
from text_encoders import (CLIP_L, LLAMA_8B, T5_XXL, UMT5_XXL, CLIPConfig, CLIPTextEncoder, LlamaConfig, LlamaEncoder, T5Config,
                           T5Encoder, load_clip_tokenizer, load_t5_tokenizer, relative_position_buckets, tokenize)
from voxel import local_windows, token_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]     # the interpreter has no bf16 dot
DTYPES = [torch.float32, *HALF]
ATOL = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}            # 8 ulp at 1 for the halves
SHAPES = [(200, 130, 64), (61, 61, 16), (130, 300, 128), (256, 128, 32)]            # Nq, Nk, D
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:overflow:RuntimeWarning")    # infinities, as intended
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
    for prev in (lse_prev, lse_prev + 90, lse_prev - 90):                   # far from the new lse o is right all the same
        got, got_lse, got_mass = sk.attention_with_column_mass_triton(q, k, v, prev)
        assert_no_worse(got, o, baseline)
        torch.testing.assert_close(got_lse.double(), lse, atol=5e-5, rtol=0)
        assert got_mass.isfinite().all()
        if prev is lse_prev:
            torch.testing.assert_close(got_mass.double(), mass, atol=1e-6, rtol=1e-4 if dtype == torch.float32 else 2 ** -7)


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


@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", HALF)
def test_kernels_at_real_size(dtype):
    """720x1280x129 has 119,056 tokens with its text; three whole groups of rows, the last one ragged, against float64."""
    N, groups = 119_056, torch.tensor([0, 465, 930], device=DEVICE)
    q, k, v = inputs(N, N, 128, dtype, B=1)
    rows = torch.cat([torch.arange(g * 128, min(N, g * 128 + 128)) for g in groups.tolist()]).to(DEVICE)

    def sampled(x):
        return x[:, :, rows]
    o, lse, s = naive_attention(sampled(q), k, v)
    baseline = sampled(F.scaled_dot_product_attention(q, k, v))
    got, got_lse = sk.attention_triton(q, k, v)
    assert_no_worse(sampled(got), o, baseline)
    torch.testing.assert_close(sampled(got_lse).double(), lse, atol=5e-5, rtol=0)
    lse_prev = got_lse + 0.1 * torch.randn_like(got_lse)
    got, got_lse, mass = sk.attention_with_column_mass_triton(q, k, v, lse_prev)
    assert_no_worse(sampled(got), o, baseline)
    given = (s - sampled(lse_prev).double()[..., None]).exp()                                    # (1, 2, rows, N)
    want = torch.stack([part.sum(2) for part in given.split([128, 128, N % 128], 2)], 2)
    torch.testing.assert_close(mass[:, :, groups].double(), want, atol=0, rtol=2 ** -7)

    columns, counts = sk.choose_columns(mass, 0.07, 0.01, None, 1)
    want = sk.choose_columns_ref(mass, 0.07, 0.01, None, 1, 0)
    assert same(columns, want[0]) and same(counts, want[1])
    allowed = listed(columns[:, :, groups], counts[:, :, groups], N).repeat_interleave(128, 2)[:, :, :len(rows)]
    o_S, lse_S, _ = naive_attention(sampled(q), k, v, allowed)
    got, got_lse = sk.column_sparse_attention_triton(q, k, v, columns, counts)
    assert_no_worse(sampled(got), o_S, F.scaled_dot_product_attention(sampled(q), k, v, attn_mask=allowed))
    torch.testing.assert_close(sampled(got_lse).double(), lse_S, atol=5e-5, rtol=0)


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
    if kind in ("bfloat16", "float16"):
        return torch.rand(1, 2, G, N, device=DEVICE).to(getattr(torch, kind))
    if kind == "misleading":                                                # every fourth, which a sample sees, is zero
        return torch.rand(1, 1, G, N, device=DEVICE).bfloat16() * (torch.arange(N, device=DEVICE) % 4 > 0)
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
           ("distinct", "none", 2, 61, 0.1, 1.0), ("bfloat16", "per group", 2, 130, 0.2, 0.1), ("float16", "none", 2, 300, 0.1, 0.0),
           ("bfloat16", "none", 1, 17000, 0.07, 0.01), ("misleading", "none", 1, 16400, 0.165, 0.0),
           ("distinct", "none", 2, 61, 0.01, 0.0), ("bfloat16", "none", 1, 5000, 0.0001, 0.0)]   # one column: Triton makes a 1 a constant


@pytest.mark.parametrize("kind, static_kind, G, N, keep, random", CHOICES)
def test_choose_columns_definition(kind, static_kind, G, N, keep, random):
    mass, (static, most) = masses(kind, G, N), statics(static_kind, G, N)
    columns, counts = sk.choose_columns(mass, keep, random, static, 7)
    by_chance = sk._hash(7, torch.arange(G)[:, None], torch.arange(N)) < random * 2 ** 24
    for at in np.ndindex(*counts.shape):
        want = set(by_chance[at[-1]].nonzero()[:, 0].tolist())
        if static is not None:
            want |= set(static.expand(G, N)[at[-1]].nonzero()[:, 0].tolist())
        ranked = sorted(mass[at].tolist(), reverse=True)
        top = int(np.ceil(keep * N))
        least = ranked[top - 1] if top else torch.inf
        above = {j for j in range(N) if mass[at][j] > least} if top else set()
        tied = [j for j in range(N) if mass[at][j] == least and j not in want] if top else []
        want |= above | set(tied[:top - len(above)])
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
    act, out = torch.randn(2, hidden, M, dtype=x.dtype, device=DEVICE), torch.randn(2, M, C, dtype=x.dtype, device=DEVICE)
    h = (x @ w1.T + (b1 if bias else 0)).mT
    new = torch.where(mask.mT, h * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h ** 3))), act)
    want = out + (new - act).mT @ w2t
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
    act = act.mT.contiguous()
    got = sk.sparse_mlp_fc2(sk.sparse_mlp_fc1(x, w1, b1, columns, counts, act), w2t, columns, counts, out)
    assert got is out
    want = F.gelu(x.double() @ w1.double().T + b1.double(), approximate="tanh")
    torch.testing.assert_close(act.mT.double(), want, atol=ATOL[dtype], rtol=0)
    torch.testing.assert_close(out.double(), want @ w2t.double(), atol=2 * ATOL[dtype], rtol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, C, hidden", MLPS)
def test_mlp_kernels(poison, M, C, hidden, dtype):
    x, w1, b1, w2t = mlp_inputs(M, C, hidden, dtype)
    columns, counts = random_columns(M, hidden, lead=(2,))
    mask = listed_mask(columns, counts, M, hidden)
    for bias in (b1, None):
        act = torch.randn(2, hidden, M + 16, device=DEVICE).to(dtype)[..., :M]          # columns with a stride of their own
        want_act, old_act = act.double(), act.clone()
        wide_bias = None if bias is None else bias.double()
        want_delta = sk.sparse_mlp_fc1_ref(x.double(), w1.double(), wide_bias, columns, counts, want_act)
        delta = sk.sparse_mlp_fc1_triton(x, w1, bias, columns, counts, act)
        torch.testing.assert_close(act.double(), want_act, atol=ATOL[dtype], rtol=ATOL[dtype])
        assert torch.equal(act.mT[~mask], old_act.mT[~mask]) and not torch.equal(act, old_act)
        torch.testing.assert_close(delta.double(), want_delta, atol=ATOL[dtype], rtol=ATOL[dtype])
        for b, g in np.ndindex(*counts.shape):
            n, rows = counts[b, g], slice(g * 128, (g + 1) * 128)
            stored = act[b, :, rows].double() - old_act[b, :, rows].double()        # delta is what act really changed by
            assert torch.equal(delta[b, g, :n, :stored.shape[1]], stored[columns[b, g, :n].long()].to(dtype))
            assert not delta[b, g, n:].any() and not delta[b, g, :, stored.shape[1]:].any()
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
    delta = sk.sparse_mlp_fc1_triton(x, w1, b1, columns, counts, torch.zeros(2, hidden, M, device=DEVICE))
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
    act, out = torch.randn(2, 130, 200, device=DEVICE), torch.randn(2, 200, 32, device=DEVICE)
    want = every_public_op(q, k, v, x, w1, b1, w2t, act.clone(), out.clone())
    compiled = torch.compile(every_public_op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, v, x, w1, b1, w2t, act, out), want, strict=True):
        assert same(got, expected)


def test_registered_ops_keep_their_promises():
    q, k, v = inputs(130, 61, 16, B=1)
    o, lse = sk.attention_ref(q, k, v)
    columns, counts = random_columns(130, 61, lead=(1, 2))
    x, w1, b1, w2t = mlp_inputs(130, 16, 61, torch.float32, B=1)
    act, out = torch.zeros(1, 61, 130, device=DEVICE), torch.zeros(1, 130, 16, device=DEVICE)
    mask = torch.rand(2, 61, device=DEVICE) < 0.5
    calls = [(sk._attention, (q, k, v)), (sk.attention_with_column_mass, (q, k, v, lse)),
             (sk._choose_columns, (q.abs(), 0.3, 0.1, None, 1, 0)), (sk.pack_mask, (mask,)),
             (sk._column_sparse_attention, (q, k, v, columns, counts, None, None, "none")),
             (sk._column_sparse_attention, (q, k, v, columns, counts, o, lse, "split")),
             (sk._column_sparse_attention, (q, k, v, columns, counts, o, None, "add")),
             (sk.sparse_mlp_fc1, (x, w1, b1, columns[:, 0], counts[:, 0], act)),
             (sk._sparse_mlp_fc2, (torch.zeros(1, 2, 64, 128, device=DEVICE), w2t, columns[:, 0], counts[:, 0], out)),
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

# =========================================================================================================
# text encoders and tokenizers

CHECKPOINTS = Path(__file__).resolve().parent.parent / "shared" / "checkpoints"
CORPUS = ["a small red circle above a large blue square on a white background", "the cat's toy; they'll say it's 10!",
          "two stars move left, one ring grows. Don't stop - never!", "a café, a naïve heart & a diamond (3.14)"] * 4
PROMPTS = ["a red circle", "", "  two   spaces\tand\na newline ", "It's the cat's, they'll say: don't!! I'd 'VE'm",
           "12 monkeys, 3.14 & 2024...", "naïve café — “ÉCOLE” 東京 🙂", "cafe\u0301 n\u0303 \u212b İ ẞ",
           "\u00a0\u3000\u200b", "a <|endoftext|> b </s> c <pad>", "<|StartOfText|>x<|ENDOFTEXT|>", "'start 'revolt odd's s's ''s",
           "unseen ж ⅷ ² ½ ٣ ㋀", "snake_case-and-dash/slash", "circle " * 90]


# ---------------------------------------------------------------------------------------- encoders

@torch.no_grad()
def randomise(model):
    """Draw every parameter, norms and biases too, so that nothing hides at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(generator=generator)
        if "norm" in name and name.endswith("weight"):
            p.mul_(0.3).add_(1)
        elif "shared" in name or "_embedding" in name:  # rows from 1 down to 1e-3: there the norms' eps matters
            p.mul_(torch.logspace(0, -3, len(p))[:, None])
        elif p.ndim == 2 and "attention_bias" not in name:
            p.mul_(p.shape[1] ** -0.5)
    return model.eval()


def assert_close(got, want):
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()


def t5_pair(per_layer_bias):
    """Ours and transformers' T5 (or UMT5) with the same weights, copied by name."""
    transformers = pytest.importorskip("transformers")
    name = "UMT5" if per_layer_bias else "T5"
    theirs = getattr(transformers, f"{name}EncoderModel")(getattr(transformers, f"{name}Config")(
        vocab_size=97, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"))
    config = T5Config(97, dim=48, heads=4, head_dim=8, ff=80, layers=3, per_layer_bias=per_layer_bias)
    ours = randomise(T5Encoder(config))
    state = ours.state_dict()
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})  # theirs is tied
    return ours, theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("per_layer_bias", [False, True], ids=["t5", "umt5"])
@pytest.mark.parametrize("length", [1, 7, 300])  # 300: beyond max_distance
def test_t5_equals_transformers(per_layer_bias, length):
    ours, theirs = t5_pair(per_layer_bias)
    ids = torch.randint(97, (3, length), generator=torch.Generator().manual_seed(1))
    assert_close(ours(ids), theirs(input_ids=ids).last_hidden_state)
    valid = (length + 1) // 2
    mask = torch.arange(length) < torch.tensor([[1], [valid], [length]])
    masked = ours(ids, mask)
    assert_close(masked, theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
    assert_close(masked[1:2, :valid], ours(ids[1:2, :valid]))  # a masked token is as good as absent


@torch.no_grad()
def test_t5_bfloat16_error_is_within_that_of_transformers():
    ours, theirs = t5_pair(per_layer_bias=False)
    ids = torch.randint(97, (4, 64), generator=torch.Generator().manual_seed(1))
    exact = ours.bfloat16().double()(ids)  # of the rounded weights
    error = (ours.bfloat16()(ids) - exact).norm()
    assert error <= 1.1 * (theirs.bfloat16()(input_ids=ids).last_hidden_state - exact).norm()
    assert error <= 0.05 * exact.norm()


def test_relative_position_buckets():
    buckets = relative_position_buckets(300, buckets=32, max_distance=128)
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]  # one distance each below 8
    assert buckets[0, [15, 16, 31, 32, 63, 64, 90, 91, 299]].tolist() == [25, 26, 27, 28, 29, 30, 30, 31, 31]
    assert torch.equal(buckets.tril(-1), (buckets - 16).triu(1).T)         # the same towards earlier keys


@torch.no_grad()
def test_clip_equals_transformers():
    transformers = pytest.importorskip("transformers")
    ours = randomise(CLIPTextEncoder(CLIPConfig(99, dim=48, heads=4, ff=80, layers=3)))
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        hidden_act="quick_gelu", bos_token_id=97, eos_token_id=98, pad_token_id=98)).eval()
    prefixed = any(name.startswith("text_model.") for name in theirs.state_dict())  # until transformers 5
    theirs.load_state_dict({name.removeprefix("" if prefixed else "text_model."): p for name, p in ours.state_dict().items()})
    ids = torch.randint(97, (3, 77), generator=torch.Generator().manual_seed(1))
    for row, end in zip(ids, (1, 40, 76)):
        row[end:] = 98  # the end of the text, then padding with the same id
    hidden, pooled = ours(ids)
    want = theirs(input_ids=ids)
    assert_close(hidden, want.last_hidden_state)
    assert_close(pooled, want.pooler_output)
    assert_close(ours(ids[:2, :41])[1], pooled[:2])  # padding does not reach the pooled state


def test_clip_rejects_a_prompt_longer_than_its_positions():
    with pytest.raises(ValueError, match="12 tokens.* 9 positions"):
        CLIPTextEncoder(CLIPConfig(99, dim=8, heads=2, ff=8, layers=1, length=9))(torch.zeros(1, 12, dtype=torch.long))


@pytest.mark.parametrize("checkpoint, encoder, config", [
    ("t5_v1_1_xxl_encoder", T5Encoder, T5_XXL), ("umt5_xxl_encoder", T5Encoder, UMT5_XXL),
    ("clip_l_text", CLIPTextEncoder, CLIP_L)])
def test_text_encoders_have_the_published_names_and_shapes(checkpoint, encoder, config):
    file = CHECKPOINTS / f"{checkpoint}.json"
    if not file.exists():
        pytest.skip(f"no {file}")
    redundant = {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids"}  # in some exports only
    published = json.loads(file.read_text())["tensors"]
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in encoder(config).state_dict().items()}
    assert shapes == {name: shape for name, shape in published.items() if name not in redundant}


# -------------------------------------------------------------------------------------- tokenizers

@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """vocab.json and merges.txt as CLIP orders them: bytes, bytes ending a word, merges, start, end."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>"))
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ð"})  # without byte D0, as in "ж", to have an unknown
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    words = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    folder = tmp_path_factory.mktemp("clip")
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words + ["<|startoftext|>", "<|endoftext|>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory):
    """A tokenizer.json built like T5's, with a truncation and a padding set that must not matter."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    file = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("length", [2, 8, 77])
def test_clip_tokenizer_equals_transformers(clip_folder, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizerFast.from_pretrained(clip_folder)
    ours = load_clip_tokenizer(clip_folder)
    end = ours.token_to_id("<|endoftext|>")
    assert end == ours.get_vocab_size() - 1 == theirs.eos_token_id
    ids, mask, cut = tokenize(ours, PROMPTS, length, pad_id=end)
    want = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert torch.equal(ids, want.input_ids)
    assert torch.equal(mask, want.attention_mask.bool())
    assert cut == [max(0, len(prompt) - length) for prompt in theirs(PROMPTS).input_ids]


def test_clip_tokenizer_words(clip_folder):
    def tokens(prompt):
        return load_clip_tokenizer(clip_folder).encode(prompt, add_special_tokens=False).tokens

    assert tokens("A  RED\n circle") == ["a</w>", "red</w>", "circle</w>"]
    assert tokens("10!!")[:2] == ["1</w>", "0</w>"]
    assert tokens("") == []


@pytest.mark.parametrize("length", [1, 8, 256])
def test_t5_tokenizer_equals_transformers(t5_file, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(t5_file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    ids, mask, cut = tokenize(load_t5_tokenizer(t5_file), PROMPTS, length, pad_id=0)
    want = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert torch.equal(ids, want.input_ids)
    assert torch.equal(mask, want.attention_mask.bool())
    assert cut == [max(0, len(prompt) - length) for prompt in theirs(PROMPTS).input_ids]


def test_tokenize_cuts_and_pads(t5_file):
    tokenizer = load_t5_tokenizer(t5_file)
    before = tokenizer.to_str()
    full = tokenizer.encode("a small red circle").ids
    n = len(full)
    ids, mask, cut = tokenize(tokenizer, ["a small red circle", ""], n - 2, pad_id=0)
    assert ids.tolist() == [full[:n - 3] + [1], [1] + [0] * (n - 3)]
    assert mask.sum(1).tolist() == [n - 2, 1] and cut == [2, 0]
    ids, mask, cut = tokenize(tokenizer, ["a small red circle"], n, pad_id=0)
    assert ids[0].tolist() == full and mask.all() and cut == [0]
    ids, mask, cut = tokenize(tokenizer, [], 4, pad_id=0)
    assert ids.shape == mask.shape == (0, 4) and ids.dtype == torch.int64 and mask.dtype == torch.bool and cut == []
    with pytest.raises(ValueError, match="0 tokens"):
        tokenize(tokenizer, ["a"], 0, pad_id=0)
    assert tokenizer.to_str() == before

# =========================================================================================================
# FLUX.1: transformer and autoencoder against diffusers, names and shapes against the published lists

SMALL = flux_chipmunk.FluxConfig(channels=16, text_dim=24, pooled_dim=20, dim=64, heads=2, double_blocks=2, single_blocks=3,
                                 axes=(8, 12, 12), guidance=True)
SMALL_128 = replace(SMALL, dim=256, axes=(16, 56, 56), guidance=False)   # head dimension 128, schnell-like


@torch.no_grad()
def randomise_all(model, seed=0):
    """Draw every parameter, so that nothing hides at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(generator=generator).mul_(0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
        if "norm" in name and p.ndim == 1 and not name.endswith("bias"):
            p.add_(1)
    return model.eval()


def assert_near(got, want, tolerance=1e-4):
    assert got.shape == want.shape
    assert (got - want).norm() <= tolerance * want.norm(), f"{(got - want).norm() / want.norm():.1e}"


def flux_inputs(config, height, width, text_length, batch=1, device="cpu"):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)
    return dict(x=randn(batch, height * width, config.channels), t=torch.full((batch,), 0.7, device=device),
                text=randn(batch, text_length, config.text_dim), pooled=randn(batch, config.pooled_dim),
                guidance=torch.full((batch,), 3.5, device=device), layout=flux_chipmunk.make_layout(config, height, width, text_length, device))


def diffusers_flux_weights(ours):
    """Our (the original's) names and layout -> diffusers'."""
    theirs = {}
    simple = {"time_in": "time_text_embed.timestep_embedder", "vector_in": "time_text_embed.text_embedder",
              "guidance_in": "time_text_embed.guidance_embedder", "txt_in": "context_embedder", "img_in": "x_embedder",
              "in_layer": "linear_1", "out_layer": "linear_2", "final_layer.linear": "proj_out",
              "double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks", "modulation.lin": "norm.linear",
              "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
              "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "linear2": "proj_out",
              "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2", "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
              "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight", "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
              "img_attn.norm.key_norm.scale": "attn.norm_k.weight", "norm.query_norm.scale": "attn.norm_q.weight",
              "norm.key_norm.scale": "attn.norm_k.weight"}
    fused = {"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
             "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}
    for name, p in ours.items():
        if name.startswith("final_layer.adaLN_modulation.1"):
            theirs[name.replace("final_layer.adaLN_modulation.1", "norm_out.linear")] = torch.cat(p.chunk(2)[::-1])  # scale first there
            continue
        parts = next((new for old, new in fused.items() if old in name), None)
        if parts:
            old, dim = next(old for old in fused if old in name), p.shape[0] // (7 if "linear1" in name else 3)
            pieces = p.split([dim] * 3 + ([4 * dim] if len(parts) == 4 else []))
            renamed = [(name.replace(old, part), piece) for part, piece in zip(parts, pieces)]
        else:
            renamed = [(name, p)]
        for name, piece in renamed:
            for old, new in sorted(simple.items(), key=lambda pair: -len(pair[0])):
                name = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\g<2>", name)
            theirs[name] = piece
    return theirs


@pytest.mark.parametrize("config", [SMALL, SMALL_128], ids=["dev-like", "schnell-like, D = 128"])
@torch.no_grad()
def test_flux_equals_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    ours = randomise_all(flux_chipmunk.Flux(config))
    theirs = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=config.channels, num_layers=config.double_blocks, num_single_layers=config.single_blocks,
        attention_head_dim=config.dim // config.heads, num_attention_heads=config.heads, joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim, guidance_embeds=config.guidance, axes_dims_rope=config.axes).eval()
    theirs.load_state_dict(diffusers_flux_weights(ours.state_dict()), strict=True)
    height, width, text_length = 9, 13, 7
    inputs = flux_inputs(config, height, width, text_length, batch=2)
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    want = theirs(hidden_states=inputs["x"], encoder_hidden_states=inputs["text"], pooled_projections=inputs["pooled"],
                  timestep=inputs["t"], img_ids=ids.view(-1, 3), txt_ids=torch.zeros(text_length, 3),
                  guidance=inputs["guidance"] if config.guidance else None, return_dict=False)[0]
    assert_near(ours(**inputs), want)


def diffusers_autoencoder_weights(ours, levels):
    theirs = {}
    for name, p in ours.items():
        name = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
        for old, new in [("down.", "down_blocks."), ("down_blocks_blocks", "down_blocks"), (".block.", ".resnets."), ("nin_shortcut", "conv_shortcut"),
                         ("downsample.", "downsamplers.0."), ("upsample.", "upsamplers.0."), ("mid.block_1", "mid_block.resnets.0"),
                         ("mid.block_2", "mid_block.resnets.1"), ("mid.attn_1", "mid_block.attentions.0"), ("norm_out", "conv_norm_out")]:
            name = name.replace(old, new)
        if "attentions" in name:
            name = name.replace(".norm.", ".group_norm.").replace("proj_out", "to_out.0")
            name = re.sub(r"\.([qkv])\.", r".to_\1.", name)
            p = p[:, :, 0, 0] if p.ndim == 4 else p
        theirs[name] = p
    return theirs


@torch.no_grad()
def test_autoencoder_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    config = flux_chipmunk.AutoencoderConfig(channels=64, multipliers=(1, 2, 2), blocks=2, z=4)   # 2 channels a group: biases show
    ours = randomise_all(flux_chipmunk.Autoencoder(config))
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(64, 128, 128), layers_per_block=2, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, use_quant_conv=False, use_post_quant_conv=False, norm_num_groups=32).eval()
    theirs.load_state_dict(diffusers_autoencoder_weights(ours.state_dict(), 3), strict=True)
    picture = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    want = theirs.encode(picture).latent_dist.mean
    assert_near(ours.encode(picture), config.scale * (want - config.shift))
    assert_near(ours.decode(config.scale * (want - config.shift)), theirs.decode(want).sample)


@pytest.mark.parametrize("model, part, checkpoint", [("dev", "flux", "flux1_dev_bfl"), ("schnell", "flux", "flux1_schnell_bfl"),
                                                      ("dev", "autoencoder", "flux1_ae_bfl")])
def test_flux_has_the_published_names_and_shapes(model, part, checkpoint):
    file = CHECKPOINTS / f"{checkpoint}.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    config = flux_chipmunk.CONFIGS[model]
    with torch.device("meta"):
        module = flux_chipmunk.Flux(config.flux) if part == "flux" else flux_chipmunk.Autoencoder(config.autoencoder)
    assert {name: list(p.shape) for name, p in module.state_dict().items()} == json.loads(file.read_text())["tensors"]


def test_patches_round_trip():
    latents = torch.randn(2, 3, 6, 10)
    x = flux_chipmunk.patchify(latents)
    assert x.shape == (2, 15, 12)
    assert torch.equal(x[0, 6], latents[0, :, 2:4, 2:4].flatten())    # token (1, 1) of 3 x 5
    assert torch.equal(flux_chipmunk.unpatchify(x, 3, 5), latents)


def test_sigmas():
    assert flux_chipmunk.make_sigmas(4, 4096, False).tolist() == [1, 0.75, 0.5, 0.25, 0]
    sigmas = flux_chipmunk.make_sigmas(50, 4096, True)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert sigmas[25].item() == pytest.approx(math.exp(1.15) / (math.exp(1.15) + 1))   # the middle: 1 / 0.5 - 1 = 1


def test_guidance_is_rounded_as_the_original_does():
    assert torch.equal(flux_chipmunk.sinusoid(torch.tensor([3.5], dtype=torch.bfloat16)).float(),
                       flux_chipmunk.sinusoid(torch.tensor([3.504])).to(torch.bfloat16).float())

# =========================================================================================================
# token order, plan, deltas


@pytest.mark.parametrize("grid, blocks", [((32, 32), ((8, 8), (4, 4))), ((13, 21), ((8, 8), (4, 4))), ((3, 5), ((8, 8), (4, 4))),
                                          ((9, 10, 17), ((4, 4, 8),))])
def test_token_order(grid, blocks):
    order = token_order(grid, *blocks)
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid)))
    coords = torch.stack(torch.unravel_index(order, grid), dim=-1)              # (N, axes)
    for block in blocks:                                                        # every run of a block's size fills one block
        whole = math.prod(n // b * b for n, b in zip(grid, blocks[0]))
        runs = coords[:whole].view(-1, math.prod(block), len(grid))
        assert ((runs.amax(1) - runs.amin(1) + 1) == torch.tensor(block)).all()
    assert (order[whole:].diff() > 0).all()                                     # the rest in raster order


def test_plan():
    plan = make_plan(50, Sparsity(measure=10))
    assert [s.index for s in plan if s.attn == "measure"] == [1, 10, 20, 30, 40]
    assert [s.index for s in plan if s.attn == "dense"] == [0]
    assert [s.index for s in plan if s.mlp == "dense"] == [0, 1, 10, 20, 30, 40]
    assert [plan[i].mlp for i in (2, 3, 9, 11, 12, 13, 14)] == ["choose"] * 3 + ["choose", "reuse", "choose", "reuse"]
    plan = make_plan(12, Sparsity(measure=(3, 8), skip=(5, 8, 10)))             # 8 measures all the same
    assert [s.attn for s in plan] == ["dense"] * 3 + ["measure", "sparse", "skip", "sparse", "sparse", "measure", "sparse", "skip", "sparse"]
    assert [s.mlp for s in plan][7:] == ["choose", "dense", "choose", "skip", "reuse"]
    assert [s.attn for s in make_plan(6, Sparsity(measure=(1, 2, 4)))] == ["dense", "dense", "measure", "sparse", "measure", "sparse"]
    assert [s.attn for s in make_plan(4, Sparsity(measure=(3,)))] == ["dense"] * 4       # nothing sparse would follow
    assert make_plan(1, Sparsity())[0].attn == "dense"
    assert make_plan(50, Sparsity()) == make_plan(50, Sparsity())
    preset = Sparsity(measure=(1, 2, 4, 7, 12, 20, 30, 40), skip="alternate")
    assert fit_steps(preset, 50, 50) == replace(preset, skip=tuple(range(12, 48, 2)))
    assert fit_steps(preset, 25, 50).measure == (1, 2, 4, 6, 10, 15, 20)
    assert fit_steps(preset, 2, 50).measure == (1,) and fit_steps(preset, 1, 50).measure == (0,)
    assert skip_preset("video", 50) == VIDEO_SKIPS and skip_preset("none", 50) == skip_preset("alternate", 4) == ()
    with pytest.raises(ValueError):
        make_plan(5, Sparsity(skip=(0,)))


def run_steps(model, inputs, sparsity, steps, layers, change=True):
    """-> [(dense v, Chipmunk v)] for every step of a generation of a small model, both from Chipmunk's x, and the state."""
    state = make_state(layers, sparsity, inputs["layout"].static, seed=0)
    pairs = []
    with torch.no_grad():
        for step in make_plan(steps, sparsity):
            pairs.append((model(**inputs), model(**inputs, state=state, step=step)))
            if change:
                inputs = inputs | {"x": inputs["x"] - 0.1 * pairs[-1][1], "t": 0.9 * inputs["t"]}
    return pairs, state


def run_flux(sparsity, height, width, text_length, steps, config=SMALL, change=True):
    model = randomise_all(flux_chipmunk.Flux(config)).to(DEVICE)
    model.lay_out_for_deltas()
    inputs = flux_inputs(config, height, width, text_length, device=DEVICE)
    return run_steps(model, inputs, sparsity, steps, config.double_blocks + config.single_blocks, change)


@pytest.mark.parametrize("delta", ["mass", "paper"])
@pytest.mark.parametrize("height, width, text_length", [(16, 16, 128), (9, 17, 13), (3, 5, 2)])
def test_every_column_kept_equals_dense(delta, height, width, text_length):
    sparsity = Sparsity(attn_keys=1.0, mlp_keys=1.0, mlp_random=0.0, measure=3, delta=delta, dense_layers=1)
    for dense, ours in run_flux(sparsity, height, width, text_length, steps=7)[0]:
        assert_near(ours, dense)


@pytest.mark.parametrize("delta", ["mass", "paper"])
@pytest.mark.parametrize("height, width, text_length", [(16, 16, 128), (9, 17, 13)])
def test_nothing_changed_equals_dense(delta, height, width, text_length):
    sparsity = Sparsity(attn_keys=0.1, attn_random=0.02, mlp_keys=0.2, measure=4, delta=delta, dense_layers=1)
    for dense, ours in run_flux(sparsity, height, width, text_length, steps=6, change=False)[0]:
        assert_near(ours, dense)


@pytest.mark.parametrize("kind", ["double", "single"])
@torch.no_grad()
def test_blocks_compile_without_a_graph_break(kind):
    model = randomise_all(flux_chipmunk.Flux(SMALL)).to(DEVICE)
    model.lay_out_for_deltas()
    block = (model.double_blocks if kind == "double" else model.single_blocks)[0]
    layout = flux_chipmunk.make_layout(SMALL, 9, 17, 13, DEVICE)
    sparsity = Sparsity(attn_keys=0.2, mlp_keys=0.3, measure=(1, 5, 8), dense_layers=0)
    ours, theirs = (make_state(1, sparsity, layout.static, seed=0).layers[0] for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    vec, tokens = torch.randn(1, SMALL.dim, device=DEVICE), torch.randn(1, 13 + 9 * 17, SMALL.dim, device=DEVICE)
    for step in make_plan(11, sparsity):
        x = tokens.split([13, 9 * 17], dim=1) if kind == "double" else (tokens,)
        got, want = compiled(*x, vec, layout.rope, ours, step), block(*x, vec, layout.rope, theirs, step)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        tokens = tokens + 0.1 * torch.randn_like(tokens)
    assert ours.attn_work == theirs.attn_work > 0
    # dense, measure, sparse; measure and, for the MLP's choice, sparse once more when the step's number becomes a variable
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_few_columns_are_close_and_more_are_closer():
    def error(keys):
        sparsity = Sparsity(attn_keys=keys, mlp_keys=keys, mlp_random=0.0, measure=10, dense_layers=1)
        dense, ours = run_flux(sparsity, 16, 16, 32, steps=6)[0][-1]
        return ((ours - dense).norm() / dense.norm()).item()
    errors = [error(keys) for keys in (0.05, 0.3, 0.9)]
    assert 0.5 > errors[0] > errors[1] > errors[2] > 1e-6


def test_skipped_step_reruns_the_final_layer_only():
    model = randomise_all(flux_chipmunk.Flux(SMALL))
    inputs = flux_inputs(SMALL, 8, 8, 4)
    state = make_state(5, Sparsity(dense_layers=1), inputs["layout"].static, seed=0)
    plan = make_plan(4, Sparsity(skip=(3,)))
    with torch.no_grad():
        for step in plan[:3]:
            model(**inputs, state=state, step=step)
        hidden = state.hidden
        model.double_blocks = model.single_blocks = torch.nn.ModuleList()       # a skipped step cannot have used these
        later = inputs | {"t": torch.tensor([0.2]), "x": torch.full_like(inputs["x"], float("nan"))}
        v = model(**later, state=state, step=plan[3])
        vec = model.time_in(flux_chipmunk.sinusoid(later["t"])) + model.vector_in(later["pooled"]) + model.guidance_in(flux_chipmunk.sinusoid(later["guidance"]))
        assert torch.equal(v, model.final_layer(hidden, vec)[:, later["layout"].inverse])


def test_text_columns_are_always_kept():
    _, state = run_flux(Sparsity(attn_keys=0.01, dense_layers=1), 16, 16, 40, steps=3)
    for layer in state.layers[1:]:
        kept = listed(layer.columns, layer.counts, 40 + 256)
        assert kept[..., :40].all() and kept.float().mean() < 0.2
    assert state.layers[0] is None                                              # the first layers are always dense


def test_work_done():
    sparsity = Sparsity(attn_keys=1.0, mlp_keys=1.0, mlp_random=0.0, measure=(1,), dense_layers=1)
    plan = make_plan(4, sparsity)
    _, state = run_flux(sparsity, 8, 8, 4, steps=4)
    attn, mlp, saved = flux_chipmunk.work_done(SMALL, 68, 64, plan, state)
    assert attn == pytest.approx((4 + 4 * 5) / 20)                              # the measure step counts its kept columns again
    assert mlp == pytest.approx(1.0) and saved < 0
    sparsity = Sparsity(attn_keys=0.1, mlp_keys=0, measure=(1,), dense_layers=1)           # the MLP left dense
    _, state = run_flux(sparsity, 8, 8, 4, steps=4)
    _, mlp, saved = flux_chipmunk.work_done(SMALL, 68, 64, make_plan(4, sparsity), state)
    assert mlp == 1 and 0 < saved < 0.1


def test_lay_out_for_deltas_changes_no_value():
    model = randomise_all(flux_chipmunk.Flux(SMALL))
    inputs = flux_inputs(SMALL, 8, 8, 4)
    with torch.no_grad():
        before = model(**inputs)
        model.lay_out_for_deltas()
        assert model.single_blocks[0].linear2.weight.t().is_contiguous()
        assert_near(model(**inputs), before, 1e-6)

# =========================================================================================================
# the embedded model and the command line


def test_scenes_and_what_is_seen_in_them():
    rng, masks = random.Random(3), bench.shape_masks("cpu")
    scenes = [train_tiny.make_scene(rng) for _ in range(40)]
    for scene, picture in zip(scenes, train_tiny.draw(scenes, 512)):
        things, asked, related, relations, background = bench.check(scene, picture, masks)
        assert things == asked and related == relations and background
        assert not any(train_tiny.held_out(*c) for c in train_tiny.combinations(scene.things, scene.relation))
    wrong = [replace(s, things=(replace(s.things[0], colour="red" if s.things[0].colour != "red" else "blue"),), relation="")
             for s in scenes]
    assert sum(bench.check(s, p, masks)[0] for s, p in zip(wrong, train_tiny.draw(scenes, 512))) <= 2    # another thing may be it
    flipped = [replace(s, relation=train_tiny.OPPOSITE[s.relation]) for s in scenes if s.relation]
    pictures = train_tiny.draw([s for s in scenes if s.relation], 512)
    assert not any(bench.check(s, p, masks)[2] for s, p in zip(flipped, pictures))
    unseen = train_tiny.make_scene(rng, train=False, plain=True)
    first = unseen.things[0]
    assert train_tiny.held_out(first.colour, first.shape, unseen.relation)


def test_psnr_and_ssim():
    a = torch.rand(1, 3, 32, 32) * 2 - 1
    assert common.psnr(a, a) == math.inf and common.ssim(a, a) == pytest.approx(1)
    assert common.psnr(a, a + 0.2) == pytest.approx(20)
    b = torch.rand(1, 3, 32, 32) * 2 - 1
    assert abs(common.ssim(a, b)) < 0.1 < 0.9 < common.ssim(a, a + 0.05 * b) < 1


def call(monkeypatch, *words, program=flux_chipmunk):
    """Run a model file's command line in this process. -> exit status"""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    try:
        common.run(program.main)
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code or 0


PROMPT = ("--prompt", "a red circle on a blue background")
FAST = (*PROMPT, "--width", 128, "--height", 96, "--steps", 4, "--device", "cpu")


def test_command_line_writes_a_picture_that_can_be_made_again(monkeypatch, tmp_path, capsys):
    from PIL import Image
    assert call(monkeypatch, *FAST, "--seed", 7, "--delta", "paper", "--skip-steps", "3", "--out", tmp_path / "a.png") == 0
    out = capsys.readouterr().out
    assert "seed 7" in out and "saved" in out
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (128, 96) and picture.text["prompt"] == PROMPT[1] and picture.text["seed"] == "7"
    assert json.loads(picture.text["settings"])["delta"] == "paper"
    assert call(monkeypatch, *FAST, "--width", 160, "--out", tmp_path / "b.png") == 0           # another size between
    again = shlex.split(picture.text["command"])[2:]
    assert call(monkeypatch, *again, "--out", tmp_path / "c.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()               # two in one process
    subprocess.run([sys.executable, flux_chipmunk.__file__, *again, "--out", str(tmp_path / "d.png")], check=True,
                   env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "d.png").read_bytes()               # and one in another


def test_compare_is_dense_beside_chipmunk(monkeypatch, tmp_path, capsys):
    from PIL import Image
    assert call(monkeypatch, *FAST, "--compare", "--out", tmp_path / "both.png") == 0
    assert call(monkeypatch, *FAST, "--dense", "--out", tmp_path / "dense.png") == 0
    out = capsys.readouterr().out
    assert "PSNR" in out and "SSIM" in out
    both, dense = Image.open(tmp_path / "both.png"), Image.open(tmp_path / "dense.png")
    assert both.size == (256, 96) and both.crop((0, 0, 128, 96)).tobytes() == dense.tobytes()


def test_the_picture_says_what_the_prompt_says():
    """One thing, in 20 steps: what the embedded model has learnt must not get lost."""
    scene = train_tiny.Scene((train_tiny.Thing("red", "square", "", 0, 0, 0),), "", "yellow", "a red square on a yellow background")
    config = flux_chipmunk.CONFIGS["tiny"]
    folder, cpu = Path(flux_chipmunk.__file__).parent / config.weights, torch.device("cpu")
    with torch.no_grad():
        text, pooled = flux_chipmunk.encode_prompts([scene.caption], config, folder, cpu, torch.float32)
        flux = flux_chipmunk.load_part("flux", config, folder, cpu, torch.float32)
        autoencoder = flux_chipmunk.load_part("autoencoder", config, folder, cpu, torch.float32)
        layout = flux_chipmunk.make_layout(config.flux, 32, 32, config.text_length)
        noise = flux_chipmunk.patchify(flux_chipmunk.make_noise(config.autoencoder.z, 32, 32, 0).float())
        sigmas = flux_chipmunk.make_sigmas(20, 1024, True)
        for sparsity in None, fit_steps(config.sparsity, 20, config.steps):
            plan = sparsity and make_plan(20, sparsity)
            state = sparsity and make_state(8, sparsity, layout.static, 0)
            x = flux_chipmunk.sample(flux, noise, text, pooled, config.guidance, sigmas, layout, plan, state)
            picture = autoencoder.decode(flux_chipmunk.unpatchify(x, 32, 32))[0]
            assert bench.check(scene, picture, bench.shape_masks("cpu")) == (1, 1, 0, 0, True)


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("program, model", [(program, model) for program in (flux_chipmunk, wan_chipmunk, hunyuan_chipmunk) for model in program.CONFIGS])
def test_settings_are_read_as_they_are_written(monkeypatch, tmp_path, program, model, steps):
    video = program is not flux_chipmunk

    def parse(*words):
        out = tmp_path / ("a.mp4" if video else "a.png")
        monkeypatch.setattr(sys, "argv", ["program", "--prompt", "a cat", f"--out={out}", *words])
        return common.parse(common.make_parser("", program.CONFIGS, video)[0], program.CONFIGS, "a")[0]
    args = parse(f"--model={model}", f"--steps={steps}", "--device=cpu", "--weights=somewhere")
    said = common.settings(args)
    again = parse(*[f"--{name}={value}" for name, value in said.items() if value is not False])
    assert said["model"] == model and common.settings(again) == said and again.plan == args.plan and again.sparsity == args.sparsity


def test_files_are_not_overwritten_unless_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call(monkeypatch, *FAST) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flux-2.png", "flux.png"]


def test_show_plan(monkeypatch, capsys):
    assert call(monkeypatch, "--show-plan", "--steps", 12, "--skip-steps", "5", "--measure-steps", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and "measure" in lines[2] and "skip" in lines[6]


@pytest.mark.parametrize("words, says", [
    (("--model", "flux2"), "invalid choice"), (("--steps", 0), "whole number from 1"), (("--steps", -3), "whole number"),
    (("--steps", "many"), "whole number"), (("--width", 0), "from 64"), (("--height", 10**9), "to 2048"), (("--guidance", "nan"), "number from 0"),
    (("--seed", -1), "whole number"), (("--attn-keys", 1.5), "number from 0"), (("--mlp-keys", "inf"), "number from 0"),
    (("--skip-steps", "0,3"), "step 0 cannot be skipped"), (("--skip-steps", "x"), "step numbers"), (("--measure-steps", "0"), "every 0 steps"),
    (("--measure-steps", ""), "step numbers"), (("--measure-steps", "1,99"), "has the steps 0 to 49"),
    (("--skip-steps", "99"), "has the steps 0 to 49"), (("--out", "x" * 300 + ".png"), "too long"), (("--device", "meta"), "no device"), (("--prompt", ""), "no prompt"), (("--prompt", " \n"), "no prompt"),
    (("--prompt", "caf\udce9"), "no valid UTF-8"), (("--dense", "--compare"), "exclude"), (("--device", "cuda:77"), "no device"), (("--device", "toaster"), "no device"),
    (("--out", "nowhere/a.png"), "no folder"), (("--out", "a.jpg"), "must end in .png"), (("--out", "."), "must end in .png"),
    (("--weights", "nowhere"), "no folder nowhere"), (("--weights", "."), "has no "), (("--dtype", "int8"), "invalid choice"),
    (("--bogus",), "unrecognized"),
])
def test_bad_words_end_in_one_line(monkeypatch, tmp_path, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *PROMPT, "--device", "cpu", *words) not in (0, None)
    error = capsys.readouterr().err.strip()
    assert says in error and error.startswith("error: ") and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_adjusted_words_are_said(monkeypatch, tmp_path, capsys):
    words = ("--prompt", "a red circle " * 100, "--width", 100, "--height", 64, "--steps", 1, "--device", "cpu", "--out", tmp_path / "a.png")
    assert call(monkeypatch, *words) == 0
    notes = capsys.readouterr().err
    assert "width 100 rounded to 96" in notes and "too long for T5" in notes and "too long for CLIP" in notes


@pytest.fixture
def broken_weights(tmp_path):
    """A copy of the embedded weights to break."""
    folder = tmp_path / "weights"
    shutil.copytree(Path(flux_chipmunk.__file__).parent / flux_chipmunk.CONFIGS["tiny"].weights, folder)
    return folder


def test_bad_weights_are_named(monkeypatch, capsys, broken_weights):
    def error(*words):
        assert call(monkeypatch, *FAST, "--weights", broken_weights, *words, "--out", broken_weights / "x.png") not in (0, None)
        assert not (broken_weights / "x.png").exists()
        line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(line) == 1
        return line[0]
    flux, autoencoder = broken_weights / "flux1-tiny.safetensors", broken_weights / "ae.safetensors"
    whole = flux.read_bytes()
    flux.write_bytes(whole[:len(whole) // 2])
    assert "flux1-tiny.safetensors is no complete safetensors file" in error()
    flux.write_bytes(autoencoder.read_bytes())
    assert "decoder.conv_in.bias too many" in error()
    tensors = load(whole)
    save_file(tensors | {"extra": torch.zeros(1)}, flux)
    assert "extra too many" in error()
    save_file(tensors | {"img_in.bias": torch.zeros(3)}, flux)
    assert "img_in.bias is [3], not [192]" in error()
    flux.unlink()
    assert "has no flux1-tiny.safetensors" in error()
    flux.write_bytes(whole)
    (broken_weights / "tokenizer_2" / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error()


@pytest.mark.parametrize("problem, says", [
    ("GatedRepoError", "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev"), ("RepositoryNotFoundError", "no Hugging Face repository"),
    ("LocalEntryNotFoundError", "check the network"), ("EntryNotFoundError", "lacks a file"), ("OSError", "run again to go on"),
    ("HFValidationError", "run again to go on")])
def test_hub_problems_end_in_one_line(monkeypatch, capsys, problem, says):
    import huggingface_hub.errors
    kind = OSError if problem == "OSError" else getattr(huggingface_hub.errors, problem)
    error = kind.__new__(kind)                                                  # their constructors want a whole web response
    Exception.__init__(error, "the hub said no")

    def no(*args, **kwargs):
        raise error
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no)
    monkeypatch.setattr(common, "free_memory", lambda device: None)             # dev is larger than most CPUs' memory
    assert call(monkeypatch, *PROMPT, "--model", "dev", "--device", "cpu") not in (0, None)
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


def test_too_little_memory_unwritable_folder_full_disk_and_ctrl_c(monkeypatch, tmp_path, capsys):
    out = tmp_path / "a.png"

    def error():
        code = call(monkeypatch, *FAST, "--out", out)
        assert code not in (0, None) and not list(tmp_path.iterdir())
        return capsys.readouterr().err.strip().splitlines()[-1]
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        weights = sum(p.numel() for p in flux_chipmunk.Flux(flux_chipmunk.CONFIGS["tiny"].flux).parameters()) * 4
        m.setattr(common, "free_memory", lambda device: weights + 1e6)                      # the caches need more than 1 MB
        assert "GB free, but this needs" in error() and "--dense" in error()
    with monkeypatch.context() as m:
        m.setattr(Path, "touch", refuse)
        assert "cannot be written" in error()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        from PIL import Image
        m.setattr(Image.Image, "save", full)
        assert "No space left" in error()
    with monkeypatch.context() as m:
        m.setattr(flux_chipmunk, "sample", interrupt)
        assert "interrupted" in error()


# ---------------------------------------------------------------------------------------------------
# Wan2.1: transformer, autoencoder and sampler against diffusers, names and shapes against the published lists

SMALL_WAN = wan_chipmunk.WanConfig(channels=4, text_dim=24, dim=96, heads=3, ff=160, layers=3)       # D = 32: 12 + 10 + 10
SMALL_WAN_128 = replace(SMALL_WAN, dim=256, heads=2)
SMALL_VAE = wan_chipmunk.VAEConfig(channels=8, multipliers=(1, 2, 3, 4), blocks=2, mean=(0.1, -0.2, 0.3), std=(0.5, 1.0, 2.0))


def wan_inputs(config, grid, batch=1, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    text = torch.randn(batch, 9, config.text_dim, generator=generator)
    text[:, 6:] = 0                                                              # padding
    return dict(x=torch.randn(batch, config.channels, t, 2 * h, 2 * w, generator=generator).to(device), text=text.to(device),
                t=torch.full((batch,), 700.0, device=device), layout=wan_chipmunk.make_layout(config, grid, 1, device))


@pytest.mark.parametrize("config", [SMALL_WAN, SMALL_WAN_128], ids=["D = 32", "D = 128"])
@torch.no_grad()
def test_wan_equals_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    ours = randomise_all(wan_chipmunk.Wan(config))
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads, in_channels=config.channels,
        out_channels=config.channels, text_dim=config.text_dim, freq_dim=config.frequencies, ffn_dim=config.ff, num_layers=config.layers).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = wan_inputs(config, (5, 6, 11), batch=2)
    want = theirs(inputs["x"], timestep=inputs["t"], encoder_hidden_states=inputs["text"], return_dict=False)[0]
    assert_near(ours(**inputs), want)


@torch.no_grad()
def test_wan_autoencoder_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    config = SMALL_VAE
    ours = randomise_all(wan_chipmunk.VAE(config))
    theirs = diffusers.AutoencoderKLWan(base_dim=config.channels, z_dim=config.z, dim_mult=list(config.multipliers), num_res_blocks=config.blocks,
                                        latents_mean=list(config.mean), latents_std=list(config.std)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.mean, config.std))
    for frames in (1, 5, 13):
        video = torch.randn(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(frames))
        want = theirs.encode(video).latent_dist.mean
        assert_near(ours.encode(video), (want - mean) / std)
        assert_near(ours.decode((want - mean) / std).clamp(-1, 1), theirs.decode(want).sample)


@torch.no_grad()
def test_wan_decoder_gives_the_same_video_in_pieces():
    vae = randomise_all(wan_chipmunk.VAE(SMALL_VAE))
    latents = torch.randn(1, 3, 5, 2, 3)
    whole = vae.decode(latents)
    assert whole.shape == (1, 3, 17, 16, 24)
    for size in (1, 2):
        pieces = list(vae.decode_pieces(latents, size))
        assert [piece.shape[2] for piece in pieces] == ([1, 4, 4, 4, 4] if size == 1 else [5, 8, 4])
        assert_near(torch.cat(pieces, dim=2), whole, 1e-5)
    later = latents.clone()
    later[:, :, 3:] = 0                                                          # no frame sees the future
    assert_near(vae.decode(later)[:, :, :9], whole[:, :, :9], 1e-5)
    video = whole.clamp(-1, 1)
    assert_near(vae.encode(video[:, :, :9]), vae.encode(video)[:, :, :3], 1e-5)


def test_wan_schedule():
    sigmas, timesteps = wan_chipmunk.make_schedule(50, 5.0)
    assert sigmas[0] < 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    alphas = np.linspace(1, 1 / 1000, 1000)[::-1]                                # the original's own steps
    even = np.linspace(float(np.float32(1 - alphas[0])), float(np.float32(1 - alphas[-1])), 51)[:-1]
    want = 5 * even / (1 + 4 * even)
    assert np.abs(sigmas[:-1].numpy() - want).max() < 1e-7 and timesteps.tolist() == (want * 1000).astype(np.int64).tolist()
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(50)
    assert 1 <= (scheduler.timesteps - timesteps).abs().max() <= 4               # diffusers' table is another one


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (3, 1.0), (12, 8.0), (50, 5.0)])
def test_unipc_equals_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])   # the original's
    schedule = wan_chipmunk.make_schedule(steps, shift)
    assert torch.equal(schedule[0], scheduler.sigmas) and torch.equal(schedule[1], scheduler.timesteps)
    noise = torch.randn(1, 2, 3, 4, 4)

    def model(x, t, text, layout, state, step):
        return torch.sin(3 * x + t.view(-1, 1, 1, 1, 1) / 300) - text
    x = noise
    for t in scheduler.timesteps:
        v, v_negative = model(x, t[None], 0.5, None, None, None), model(x, t[None], -0.2, None, None, None)
        x = scheduler.step(v_negative + 4.0 * (v - v_negative), t, x, return_dict=False)[0]
    assert_near(wan_chipmunk.sample(model, noise, (0.5, -0.2), 4.0, schedule, None), x)


@pytest.mark.parametrize("model, part, checkpoint", [("1.3b", "wan", "wan21_t2v_1_3b_diffusers"), ("14b", "wan", "wan21_t2v_14b_diffusers"),
                                                     ("14b", "vae", "wan21_vae_diffusers"), ("1.3b", "umt5", "umt5_xxl_encoder")])
def test_wan_has_the_published_names_and_shapes(model, part, checkpoint):
    file = CHECKPOINTS / f"{checkpoint}.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    with torch.device("meta"):
        module = wan_chipmunk.parts(wan_chipmunk.CONFIGS[model])[part]()
    assert {name: list(p.shape) for name, p in module.state_dict().items()} == json.loads(file.read_text())["tensors"]


def test_wan_has_the_published_facts():
    if not (CHECKPOINTS / "prompt_facts.json").exists():
        pytest.skip("prompt_facts.json is not there")
    facts = json.loads((CHECKPOINTS / "prompt_facts.json").read_text())["wan21"]
    for config in (wan_chipmunk.CONFIGS["1.3b"], wan_chipmunk.CONFIGS["14b"]):
        assert config.negative_prompt == facts["default_negative_prompt"] and config.text_length == facts["text_len"]
        assert list(config.vae.mean) == facts["vae"]["mean"] and list(config.vae.std) == facts["vae"]["std"]
        assert (config.frames, config.fps, config.steps) == (facts["frame_num_default"], facts["sample_fps"], facts["sample_steps_default_t2v"])


def test_tiny_wan_fits():
    config = wan_chipmunk.CONFIGS["tiny"]
    with torch.device("meta"):
        numbers = sum(p.numel() for make in wan_chipmunk.parts(config).values() for p in make().parameters())
    assert 2 * numbers < 15.5e6                                                  # half precision, and room for the tokenizer
    assert (config.frames // 4 + 1) * config.height * config.width // 256 >= 1024

# ---------------------------------------------------------------------------------------------------
# voxels and deltas


@pytest.mark.parametrize("grid", [(5, 16, 16), (9, 10, 17), (3, 5, 7), (12, 12, 24), (1, 4, 8)])
@pytest.mark.parametrize("side", [1, 3])
def test_local_windows(grid, side):
    block = (4, 4, 8)
    order = token_order(grid, block)
    static = local_windows(grid, block, side, order)
    coords = torch.stack(torch.unravel_index(order, grid), dim=-1) // torch.tensor(block)        # (N, 3) which voxel
    most = torch.tensor([-(-n // b) - 1 for n, b in zip(grid, block)])
    assert static.shape == (-(-len(order) // 128), len(order))
    for g, near in enumerate(static):
        voxels = coords[128 * g:128 * (g + 1)].unique(dim=0)
        width = side if len(voxels) == 1 else 1
        low = torch.minimum(voxels - width // 2, most - width + 1).clamp(min=0)[:, None]         # (voxels, 1, 3)
        assert torch.equal(near, ((coords >= low) & (coords < low + width)).all(-1).any(0))
        assert near.sum() <= 128 * side**3 or side == 1                          # what cache_bytes reckons with
    if grid == (12, 12, 24):
        assert (static.sum(1) == 128 * side**3).all()                            # at the edges too: the window moves inwards


def run_wan(sparsity, grid, steps, config=SMALL_WAN, change=True):
    model = randomise_all(wan_chipmunk.Wan(config)).to(DEVICE)
    return run_steps(model, wan_inputs(config, grid, device=DEVICE), sparsity, steps, config.layers, change)


@pytest.mark.parametrize("delta", ["mass", "paper"])
@pytest.mark.parametrize("grid", [(4, 8, 8), (5, 7, 11), (1, 3, 5)])
def test_wan_with_every_column_kept_equals_dense(delta, grid):
    sparsity = Sparsity(attn_keys=1.0, mlp_keys=0.0, measure=3, delta=delta, dense_layers=1)
    for dense, ours in run_wan(sparsity, grid, steps=6)[0]:
        assert_near(ours, dense)


@pytest.mark.parametrize("delta", ["mass", "paper"])
def test_wan_when_nothing_changed_equals_dense(delta):
    sparsity = Sparsity(attn_keys=0.1, attn_random=0.01, mlp_keys=0.0, measure=4, delta=delta, dense_layers=1)
    for dense, ours in run_wan(sparsity, (5, 7, 11), steps=6, change=False)[0]:
        assert_near(ours, dense)


def test_wan_keeps_the_window_and_dense_layers():
    _, state = run_wan(Sparsity(attn_keys=0.01, mlp_keys=0.0, dense_layers=1), (8, 8, 16), steps=3)
    static = wan_chipmunk.make_layout(SMALL_WAN, (8, 8, 16), 1).static
    for layer in state.layers[1:]:
        kept = listed(layer.columns, layer.counts, 1024).cpu()
        assert kept[..., static].all() and static.float().mean() <= kept.float().mean() < 0.2
    assert state.layers[0] is None


def test_wan_skipped_step_reruns_the_final_layer_only():
    model = randomise_all(wan_chipmunk.Wan(SMALL_WAN))
    inputs = wan_inputs(SMALL_WAN, (2, 4, 6))
    state = make_state(3, Sparsity(dense_layers=1), inputs["layout"].static, seed=0)
    plan = make_plan(4, Sparsity(skip=(3,)))
    with torch.no_grad():
        for step in plan[:3]:
            model(**inputs, state=state, step=step)
        model.blocks = torch.nn.ModuleList()                                     # a skipped step cannot have used these
        before = model(**inputs, state=state, step=plan[3])
        later = model(**inputs | {"t": torch.tensor([200.0]), "x": inputs["x"] * float("nan")}, state=state, step=plan[3])
    assert later.isfinite().all() and (later - before).norm() > 1e-3 * before.norm()


def generate(grid, texts, sparsity, seed=0, steps=6):
    """A whole generation of a small random model -> latents"""
    model = randomise_all(wan_chipmunk.Wan(SMALL_WAN)).to(DEVICE)
    layout = wan_chipmunk.make_layout(SMALL_WAN, grid, 1, DEVICE)
    noise = wan_chipmunk.make_noise(4, grid[0], 2 * grid[1], 2 * grid[2], seed).to(DEVICE)
    states = [make_state(3, sparsity, layout.static, seed) for _ in texts]
    with torch.no_grad():
        x = wan_chipmunk.sample(model, noise, texts, 4.0, wan_chipmunk.make_schedule(steps, 5.0), layout, make_plan(steps, sparsity), states)
    return x, states


def test_wan_branches_do_not_mix_and_generations_do_not_either():
    sparsity = Sparsity(attn_keys=0.1, attn_random=0.01, mlp_keys=0.0, measure=(1,), skip=(4,), dense_layers=1)
    prompt, negative = torch.randn(2, 1, 9, 24, device=DEVICE)
    x, (state, state_negative) = generate((4, 8, 8), (prompt, negative), sparsity)
    assert not torch.equal(state.hidden, state_negative.hidden)
    assert not torch.equal(state.layers[1].o_rest, state_negative.layers[1].o_rest)
    generate((5, 4, 9), (prompt, negative), sparsity)                            # another size between
    assert torch.equal(generate((4, 8, 8), (prompt, negative), sparsity)[0], x)
    same, (state, state_negative) = generate((4, 8, 8), (prompt, prompt), sparsity)              # equal texts: equal states
    assert torch.equal(state.hidden, state_negative.hidden) and not torch.equal(same, x)


def test_wan_work_done():
    sparsity = Sparsity(attn_keys=1.0, mlp_keys=0.0, measure=(1,), dense_layers=1, skip=(3,))
    plan = make_plan(5, sparsity)
    _, state = run_wan(sparsity, (2, 8, 8), steps=5)
    attn, saved = wan_chipmunk.work_done(SMALL_WAN, 128, 9, plan, [state, state])
    assert attn == pytest.approx((4 + 2 * 5) / 15)                               # a measure step counts its kept columns again
    assert 0 < saved < 0.2
    assert [s.index for s in make_plan(50, replace(sparsity, skip=VIDEO_SKIPS)) if s.skip] == list(VIDEO_SKIPS)


@torch.no_grad()
def test_wan_in_bfloat16_keeps_modulation_and_residuals_in_float32(tmp_path):
    model = randomise_all(wan_chipmunk.Wan(SMALL_WAN))
    save_file(model.state_dict(), tmp_path / "wan.safetensors")
    half = common.load_weights(lambda: wan_chipmunk.Wan(SMALL_WAN), [tmp_path / "wan.safetensors"], torch.device("cpu"), torch.bfloat16, wan_chipmunk.Wan.FLOAT32)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.scale_shift_table" in kept and "blocks.0.attn1.norm_q.weight" in kept and "blocks.0.attn1.to_q.weight" not in kept
    inputs = wan_inputs(SMALL_WAN, (2, 4, 6))
    out = half(**inputs | {"text": inputs["text"].bfloat16()})
    assert out.dtype == torch.float32
    assert_near(out, model(**inputs), 0.02)

# ---------------------------------------------------------------------------------------------------
# videos and the command line


def read_video(file):
    """-> frames (T, 3, H, W) in -1..1, metadata"""
    import av
    with av.open(str(file)) as video:
        stream = video.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in video.decode(stream)]
        return torch.stack(frames).permute(0, 3, 1, 2) / 127.5 - 1, video.metadata, float(stream.average_rate)


def test_videos_are_written_whole_and_can_be_read(tmp_path):
    from PIL import Image
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 96), indexing="ij")
    frames = torch.stack([torch.stack([x, y, torch.full_like(x, i / 4 - 1)]) for i in range(9)])
    texts = {"prompt": "ein Kreis, 圆", "seed": "3"}
    common.write_video(tmp_path / "a.mp4", iter(frames), 8, texts)
    got, metadata, fps = read_video(tmp_path / "a.mp4")
    assert got.shape == frames.shape and fps == 8 and metadata["prompt"] == texts["prompt"] and metadata["seed"] == "3"
    assert common.psnr(got, frames) > 35                                         # so the colours are right, too
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")                             # index in front: plays while it loads
    for name, psnr in ("a.webp", 40), ("a.gif", 20):
        common.write_video(tmp_path / name, frames, 8, texts)
        picture = Image.open(tmp_path / name)
        assert picture.n_frames == 9 and picture.size == (96, 64)
        text = picture.getexif()[0x010E] if name == "a.webp" else picture.info["comment"]
        assert json.loads(text) == texts
        picture.seek(5)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        assert common.psnr(pixels, frames[5]) > psnr
    common.write_video(tmp_path / "a.png", iter(frames), 8, texts)                              # a strip of frames 0, 4 and 8
    strip = Image.open(tmp_path / "a.png")
    assert strip.size == (3 * 96, 64) and strip.text == texts
    assert torch.equal(torch.from_numpy(np.array(strip))[:, 96:192], torch.from_numpy(common.to_bytes(frames[4])))

    def broken():
        yield frames[0]
        raise KeyboardInterrupt
    for name in ("b.mp4", "b.webp", "b.gif", "b.png"):
        with pytest.raises(KeyboardInterrupt):
            common.write_video(tmp_path / name, broken(), 8, texts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.mp4", "a.png", "a.webp"]
    with pytest.raises(common.Fail):
        common.write_video(tmp_path / "nowhere" / "a.mp4", frames, 8, texts)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory, t5_file):
    """Random weights for the tiny model, laid out like the big repository; the transformer in two shards."""
    folder, config = tmp_path_factory.mktemp("wan"), wan_chipmunk.CONFIGS["tiny"]
    for part, make in wan_chipmunk.parts(config).items():
        file = folder / wan_chipmunk.FILES[part]
        file.parent.mkdir()
        tensors = {name: p.half() for name, p in randomise_all(make()).state_dict().items()}
        if part != "wan":
            save_file(tensors, file)
            continue
        shards = {f"{file.stem}-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
        for name, shard in shards.items():
            save_file(shard, file.parent / name)
        index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
        Path(f"{file}.index.json").write_text(json.dumps(index))
    (folder / "tokenizer").mkdir()
    shutil.copy(t5_file, folder / "tokenizer" / "tokenizer.json")
    return folder


def call_wan(monkeypatch, *words):
    return call(monkeypatch, *words, program=wan_chipmunk)


WAN_PROMPT = ("--prompt", "a red circle moves up on a blue background", "--device", "cpu")
WAN_FAST = (*WAN_PROMPT, "--width", 96, "--height", 64, "--frames", 5, "--steps", 4)


def test_wan_writes_a_video_that_can_be_made_again(monkeypatch, tmp_path, capsys, wan_folder):
    fast = (*WAN_FAST, "--weights", wan_folder)
    assert call_wan(monkeypatch, *fast, "--seed", 7, "--negative-prompt=-dark", "--fps", 5, "--out", tmp_path / "a.mp4") == 0
    out = capsys.readouterr().out
    assert "seed 7" in out and "5 frames" in out and "saved" in out
    frames, metadata, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == (5, 3, 64, 96) and fps == 5 and metadata["prompt"] == WAN_PROMPT[1]
    assert json.loads(metadata["settings"])["negative-prompt"] == "-dark"
    assert call_wan(monkeypatch, *fast, "--width", 128, "--out", tmp_path / "b.gif") == 0        # another size between
    again = shlex.split(metadata["command"])[2:]
    assert call_wan(monkeypatch, *again, "--out", tmp_path / "c.mp4") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()                # two in one process
    subprocess.run([sys.executable, wan_chipmunk.__file__, *again, "--out", str(tmp_path / "d.mp4")], check=True)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "d.mp4").read_bytes()                # and one in another
    assert call_wan(monkeypatch, *fast, "--dense", "--negative-prompt", "", "--out", tmp_path / "e.mp4") == 0
    assert (tmp_path / "e.mp4").read_bytes() != (tmp_path / "a.mp4").read_bytes()


def test_wan_compares_and_writes_pictures(monkeypatch, tmp_path, capsys, wan_folder):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    fast = (*WAN_FAST, "--weights", wan_folder)
    assert call_wan(monkeypatch, *fast, "--compare", "--out", "both.webp") == 0
    assert "PSNR" in capsys.readouterr().out and Image.open("both.webp").size == (192, 64)
    assert call_wan(monkeypatch, *fast, "--frames", 1) == 0
    assert Image.open("wan.png").size == (96, 64) and Image.open("wan.png").text["prompt"] == WAN_PROMPT[1]
    assert call_wan(monkeypatch, *fast, "--dense") == 0 and (tmp_path / "wan.mp4").exists()


@pytest.mark.parametrize("words, says", [
    (("--frames", 16), "4 n + 1, like 13 or 17"), (("--frames", 0), "whole number"), (("--frames", "x"), "whole number"), (("--fps", 0), "whole number from 1"),
    (("--out", "a.jpg"), "must end in .mp4 or .webp or .gif or .png"), (("--frames", 1, "--out", "a.mp4"), "must end in .png"), (("--model", "2b"), "invalid choice"),
    (("--weights", "nowhere"), "no folder nowhere"), (("--weights", "."), "has no "), (("--negative-prompt", "caf\udce9"), "no valid UTF-8"),
    (("--width", 2048, "--height", 2048, "--frames", 1001), "but this needs"), (("--prompt", " "), "no prompt"), (("--dense", "--compare"), "exclude"), (("--mlp-keys", "0.3"), "unrecognized"), (("--skip-steps", "0"), "step 0 cannot"),
])
def test_wan_bad_words_end_in_one_line(monkeypatch, tmp_path, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert call_wan(monkeypatch, *WAN_PROMPT, *words) not in (0, None)
    error = capsys.readouterr().err.strip()
    assert says in error and error.startswith("error: ") and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_wan_bad_weights_and_adjusted_words_are_said(monkeypatch, tmp_path, capsys, wan_folder):
    folder = tmp_path / "weights"
    shutil.copytree(wan_folder, folder)
    words = ("--prompt", "a red circle " * 100, "--width", 100, "--height", 64, "--frames", 5, "--steps", 1, "--device", "cpu", "--weights", folder)
    assert call_wan(monkeypatch, *words, "--out", tmp_path / "a.mp4") == 0
    notes = capsys.readouterr().err
    assert "width 100 rounded to 96" in notes and "too long for UMT5" in notes
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    for says in ("has no transformer/diffusion_pytorch_model-00002", "is no list of shards", "has no transformer/diffusion_pytorch_model.safetensors"):
        assert call_wan(monkeypatch, *words, "--out", tmp_path / "b.mp4") not in (0, None)
        assert says in capsys.readouterr().err.strip().splitlines()[-1]
        index.write_text("{}") if "00002" in says else index.unlink(missing_ok=True)
    assert not (tmp_path / "b.mp4").exists()


# ---------------------------------------------------------------------------------------------------
# HunyuanVideo: Llama


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_equals_transformers(kv_heads):
    transformers = pytest.importorskip("transformers")
    ours = randomise(LlamaEncoder(LlamaConfig(97, dim=48, heads=4, kv_heads=kv_heads, ff=80, layers=5)))
    theirs = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(97, (3, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(60) < torch.tensor([[1], [33], [60]])
    want = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-3]
    states = ours(ids)
    assert_close(states[mask], want[mask])
    assert_close(ours(ids[1:2, :33]), states[1:2, :33])              # padding is as good as absent
    cropped, cropped_mask = hunyuan_chipmunk.encode_text(ours, ids[:2], mask[:2], crop=9)
    assert torch.equal(cropped_mask, mask[:2, 9:33])
    assert_close(cropped[1], states[1, 9:33])


# ---------------------------------------------------------------------------------------------------
# HunyuanVideo: transformer and VAE against diffusers, names and shapes against the published lists

HUNYUAN = hunyuan_chipmunk.HunyuanConfig(z=4, text_dim=24, pooled_dim=20, dim=64, heads=2, ff=256, dual_blocks=2, single_blocks=3,
                                             refiner_blocks=2, axes=(8, 12, 12))
HUNYUAN_128 = replace(HUNYUAN, dim=256, ff=1024, axes=(16, 56, 56))      # head dimension 128


def hunyuan_inputs(config, grid, text_length, batch=1, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)
    return dict(x=randn(batch, config.z, t, 2 * h, 2 * w), t=torch.full((batch,), 0.7, device=device), text=randn(batch, text_length, config.text_dim),
                pooled=randn(batch, config.pooled_dim), guidance=torch.full((batch,), 6.0, device=device),
                layout=hunyuan_chipmunk.make_layout(config, grid, text_length, device))


@pytest.mark.parametrize("config", [HUNYUAN, HUNYUAN_128], ids=["D = 32", "D = 128"])
@torch.no_grad()
def test_hunyuan_equals_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    ours = randomise_all(hunyuan_chipmunk.Hunyuan(config))
    theirs = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=config.z, out_channels=config.z, num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        num_layers=config.dual_blocks, num_single_layers=config.single_blocks, num_refiner_layers=config.refiner_blocks,
        text_embed_dim=config.text_dim, pooled_projection_dim=config.pooled_dim,
        rope_axes_dim=config.axes).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = hunyuan_inputs(config, (5, 6, 9), 7, batch=2)           # no axis a multiple of the voxel's
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    want = theirs(hidden_states=inputs["x"], timestep=1000 * inputs["t"], encoder_hidden_states=inputs["text"], encoder_attention_mask=mask.long(),
                  pooled_projections=inputs["pooled"], guidance=1000 * inputs["guidance"], return_dict=False)[0]
    assert_near(ours(**inputs, mask=mask), want)
    for i, length in enumerate(mask.sum(1)):                         # one prompt needs no mask: its padding is cut off
        one = {name: value[i:i + 1] for name, value in inputs.items() if name != "layout"}
        one |= {"text": one["text"][:, :length], "layout": hunyuan_chipmunk.make_layout(config, (5, 6, 9), int(length))}
        assert_near(ours(**one), want[i:i + 1])


HUNYUAN_VAE = hunyuan_chipmunk.VAEConfig(channels=16, multipliers=(1, 2, 3, 3), blocks=2, z=4, groups=8, tile=8, tile_frames=4)


def vae_pair():
    """Ours and diffusers' VAE with the same weights and small tiles."""
    diffusers = pytest.importorskip("diffusers")
    ours = randomise_all(hunyuan_chipmunk.VAE(HUNYUAN_VAE))
    theirs = diffusers.AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(16, 32, 48, 48), layers_per_block=2, norm_num_groups=8).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
def test_hunyuan_vae_equals_diffusers():
    ours, theirs = vae_pair()
    video = torch.randn(2, 3, 9, 24, 40, generator=torch.Generator().manual_seed(0))
    latents = theirs.encode(video).latent_dist.mean                  # (2, 4, 3, 3, 5)
    assert_near(ours.encode(video), 0.476986 * latents)
    assert_near(ours.decode(0.476986 * latents), theirs.decode(latents).sample)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 8, 9), (5, 4, 4), (8, 5, 11), (11, 14, 3), (7, 9, 10)])
def test_tiled_decoding_equals_diffusers(shape):
    ours, theirs = vae_pair()
    theirs.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_min_num_frames=16,
                         tile_sample_stride_height=48, tile_sample_stride_width=48, tile_sample_stride_num_frames=12)
    latents = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0))
    chunks = list(ours.decode_pieces(0.476986 * latents))
    assert all(chunk.shape[2] in range(1, 14) for chunk in chunks) or shape[0] <= 4
    assert_near(torch.cat(chunks, dim=2), theirs.decode(latents).sample)
    if max(shape[1:]) <= 8 and shape[0] <= 4:
        assert torch.equal(chunks[0], ours.decode(0.476986 * latents))


def test_tiles_are_the_originals():
    """129 frames of 720p: chunks of 49, 48 and 32 frames from tiles of at most 17 x 32 x 32 latents."""
    vae, tiles = hunyuan_chipmunk.VAE(replace(HUNYUAN_VAE, tile=32, tile_frames=16)), []

    def decode(latents):
        tiles.append(latents.shape[2:])
        t, h, w = latents.shape[2:]
        return torch.zeros(1, 3, 4 * t - 3, 8 * h, 8 * w, dtype=torch.uint8).float()
    vae.decode = decode
    assert [chunk.shape[2:] for chunk in vae.decode_pieces(torch.zeros(1, 4, 33, 90, 32))] == [(49, 720, 256), (48, 720, 256), (32, 720, 256)]
    assert len(tiles) == 3 * 4 * 2 and set(tiles[:8]) == {(17, 32, 32), (17, 32, 8), (17, 18, 32), (17, 18, 8)} and tiles[-1] == (9, 18, 8)


@torch.no_grad()
def test_a_frame_does_not_see_later_ones():
    block = randomise_all(hunyuan_chipmunk.AttentionBlock(16, 8))
    block.group_norm = torch.nn.Identity()                           # whose statistics span all frames
    x = torch.randn(1, 16, 4, 3, 2)
    later = x.clone()
    later[:, :, 2:] += 1
    assert torch.equal(block(x)[:, :, :2], block(later)[:, :, :2])
    assert not torch.equal(block(x)[:, :, 2:], block(later)[:, :, 2:])


@pytest.mark.parametrize("part, checkpoint", [("hunyuan", "hunyuanvideo_dit_diffusers"), ("vae", "hunyuanvideo_vae_diffusers"),
                                              ("llama", "llama3_8b_llava_text_encoder")])
def test_hunyuan_has_the_published_names_and_shapes(part, checkpoint):
    file = CHECKPOINTS / f"{checkpoint}.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    with torch.device("meta"):
        module = hunyuan_chipmunk.parts(hunyuan_chipmunk.CONFIGS["720p"])[part]()
    assert {name: list(p.shape) for name, p in module.state_dict().items()} == json.loads(file.read_text())["tensors"]


def test_template_and_preset_are_the_originals():
    config, file = hunyuan_chipmunk.CONFIGS["720p"], CHECKPOINTS / "prompt_facts.json"
    if file.exists():
        facts = json.loads(file.read_text())["hunyuanvideo"]
        assert (config.template, config.crop, config.text_length) == (facts["llm_template_video"], facts["crop_start_video"], facts["text_len_after_crop"])
    assert config.llama == LLAMA_8B and config.template.format("{a} cat").count("{a} cat") == 1
    plan = make_plan(50, common.fit_steps(config.sparsity, 50, 50))
    assert [s.index for s in plan if s.attn in ("dense", "measure")] == [0, 1, 10, 40] and sum(s.skip for s in plan) == 25


@pytest.mark.parametrize("program", [flux_chipmunk, wan_chipmunk, hunyuan_chipmunk], ids=["flux", "wan", "hunyuan"])
def test_embedded_weights_fit(program):
    files = [f for f in (Path(__file__).parent / program.CONFIGS["tiny"].weights).rglob("*") if f.is_file()]
    assert any(f.suffix == ".safetensors" for f in files) and sum(f.stat().st_size for f in files) < 16e6


def test_hunyuan_sigmas_noise_and_guidance():
    sigmas = hunyuan_chipmunk.make_sigmas(50, 7.0)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all() and sigmas[25].item() == pytest.approx(7 / 8)
    noise = hunyuan_chipmunk.make_noise(4, (2, 3, 5), seed=1)
    assert noise.shape == (1, 4, 2, 6, 10) and torch.equal(noise, hunyuan_chipmunk.make_noise(4, (2, 3, 5), seed=1))
    rounded = hunyuan_chipmunk.sinusoid(torch.tensor([6.0], dtype=torch.bfloat16))
    assert torch.equal(rounded, hunyuan_chipmunk.sinusoid(torch.tensor([6.016])))        # 6000 is 6016 in bf16


def test_video_patches():
    x = torch.arange(2 * 3 * 5 * 4 * 3).float().view(1, 30, 12)      # a grid of 2 x 3 x 5 tokens, z = 3
    latents = hunyuan_chipmunk.unpatchify(x, (2, 3, 5))
    assert latents.shape == (1, 3, 2, 6, 10)
    assert torch.equal(latents[0, :, 1, 2:4, 4:6].flatten(), x[0, 15 + 5 + 2])           # token (1, 1, 2)

# ---------------------------------------------------------------------------------------------------
# deltas


def run_hunyuan(sparsity, grid, text_length, steps, change=True):
    model = randomise_all(hunyuan_chipmunk.Hunyuan(HUNYUAN)).to(DEVICE)
    inputs = hunyuan_inputs(HUNYUAN, grid, text_length, device=DEVICE)
    return run_steps(model, inputs, sparsity, steps, HUNYUAN.dual_blocks + HUNYUAN.single_blocks, change)


@pytest.mark.parametrize("delta", ["mass", "paper"])
@pytest.mark.parametrize("grid, text_length", [((4, 8, 8), 128), ((5, 6, 9), 13), ((1, 3, 5), 1)])
def test_hunyuan_with_every_column_equals_dense(delta, grid, text_length):
    sparsity = Sparsity(attn_keys=1.0, mlp_keys=0, measure=3, delta=delta, dense_layers=1)
    for dense, ours in run_hunyuan(sparsity, grid, text_length, steps=7)[0]:
        assert_near(ours, dense)


@pytest.mark.parametrize("delta", ["mass", "paper"])
@pytest.mark.parametrize("grid, text_length", [((4, 8, 8), 128), ((5, 6, 9), 13)])
def test_hunyuan_with_nothing_changed_equals_dense(delta, grid, text_length):
    sparsity = Sparsity(attn_keys=0.1, attn_random=0.02, mlp_keys=0, measure=4, delta=delta, dense_layers=1)
    for dense, ours in run_hunyuan(sparsity, grid, text_length, steps=6, change=False)[0]:
        assert_near(ours, dense)


def test_hunyuan_keeps_text_columns_and_text_rows():
    pairs, state = run_hunyuan(Sparsity(attn_keys=0.01, mlp_keys=0, dense_layers=1), (4, 8, 8), 40, steps=3)
    assert 1e-6 < (pairs[-1][1] - pairs[-1][0]).norm() / pairs[-1][0].norm() < 0.5
    assert state.layers[0] is None
    for layer in state.layers[1:]:
        kept = listed(layer.columns, layer.counts, 256 + 40)
        assert kept[..., 256:].all() and kept.float().mean() < 0.2
        assert layer.lse.shape == (1, 2, 256) and layer.o_rest.shape[2] == 256   # the video's rows alone


def test_hunyuan_rejects_padding_with_a_state():
    model, inputs = hunyuan_chipmunk.Hunyuan(HUNYUAN), hunyuan_inputs(HUNYUAN, (1, 2, 2), 3)
    with pytest.raises(ValueError, match="cut the padding off"):
        model(**inputs, mask=torch.ones(1, 3, dtype=torch.bool), state=make_state(5, Sparsity(), inputs["layout"].static, 0), step=make_plan(1, Sparsity())[0])


def test_hunyuan_skipped_step_reruns_the_final_layer_only():
    model, inputs = randomise_all(hunyuan_chipmunk.Hunyuan(HUNYUAN)), hunyuan_inputs(HUNYUAN, (2, 4, 8), 4)
    state = make_state(5, Sparsity(mlp_keys=0, dense_layers=1), inputs["layout"].static, seed=0)
    plan = make_plan(4, Sparsity(mlp_keys=0, skip=(3,)))
    with torch.no_grad():
        for step in plan[:3]:
            model(**inputs, state=state, step=step)
        del model.transformer_blocks, model.single_transformer_blocks, model.context_embedder    # a skipped step does without
        later = inputs | {"x": torch.full_like(inputs["x"], float("nan"))}
        a = model(**later, state=state, step=plan[3])
        b = model(**later | {"t": torch.tensor([0.2])}, state=state, step=plan[3])
    assert a.isfinite().all() and not torch.equal(a, b)


def test_hunyuan_generations_do_not_meet():
    """Two generations in one process, a changed resolution between them: as in separate processes."""
    model = randomise_all(hunyuan_chipmunk.Hunyuan(HUNYUAN))
    sparsity = Sparsity(attn_keys=0.1, attn_random=0.02, mlp_keys=0, measure=(1, 3), dense_layers=1)

    @torch.no_grad()
    def generate(grid):
        inputs = hunyuan_inputs(HUNYUAN, grid, 5)
        state = make_state(5, sparsity, inputs["layout"].static, seed=0)
        return hunyuan_chipmunk.sample(model, inputs["x"], inputs["text"], inputs["pooled"], 6.0, hunyuan_chipmunk.make_sigmas(6, 7.0),
                                       inputs["layout"], make_plan(6, sparsity), state)
    first = generate((4, 8, 8))
    generate((3, 5, 9))
    assert torch.equal(generate((4, 8, 8)), first)


def test_hunyuan_work_done():
    sparsity = Sparsity(attn_keys=1.0, mlp_keys=0, measure=(1,), dense_layers=1)
    _, state = run_hunyuan(sparsity, (1, 8, 8), 4, steps=4)
    attn, saved = hunyuan_chipmunk.work_done(HUNYUAN, 64, 4, make_plan(4, sparsity), state)
    assert attn == pytest.approx((4 + 4 * 5) / 20) and saved < 0     # the measure step counts its kept columns again
    sparsity = Sparsity(attn_keys=0.1, mlp_keys=0, measure=(1,), skip=(3,), dense_layers=1)
    _, state = run_hunyuan(sparsity, (1, 8, 8), 4, steps=4)
    assert 0.25 < hunyuan_chipmunk.work_done(HUNYUAN, 64, 4, make_plan(4, sparsity), state)[1] < 0.5

# ---------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture(scope="module")
def hunyuan_weights(tmp_path_factory, clip_folder):                
    """A folder with random weights and small tokenizers, laid out like the big repository."""
    folder, config = tmp_path_factory.mktemp("hunyuan"), hunyuan_chipmunk.CONFIGS["tiny"]
    torch.manual_seed(0)
    for part, make in hunyuan_chipmunk.parts(config).items():
        file = folder / hunyuan_chipmunk.FILES[part]
        file.parent.mkdir()
        save_file({name: p.half() for name, p in make().state_dict().items()}, file)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer_2").symlink_to(clip_folder)
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    llama = Tokenizer(models.BPE())
    llama.pre_tokenizer, llama.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    llama.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    llama.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    llama.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def test_template_is_cropped(hunyuan_weights):
    tokenizer, config = load_t5_tokenizer(hunyuan_weights / "tokenizer" / "tokenizer.json"), hunyuan_chipmunk.CONFIGS["tiny"]
    ids, mask, _ = tokenize(tokenizer, [config.template.format("a red circle")], config.crop + config.text_length, 0)
    assert tokenizer.decode(ids[0, config.crop:mask.sum()].tolist(), skip_special_tokens=False) == "a red circle<|eot_id|>"


def call_hunyuan(monkeypatch, *words):
    return call(monkeypatch, *words, program=hunyuan_chipmunk)


VIDEO = ("--prompt", "a red circle moves up on a blue background", "--device", "cpu")
SHORT = (*VIDEO, "--width", 128, "--height", 64, "--frames", 9, "--steps", 4)


def test_hunyuan_command_line(monkeypatch, tmp_path, capsys, hunyuan_weights):
    av = pytest.importorskip("av")
    weights = ("--weights", hunyuan_weights)
    assert call_hunyuan(monkeypatch, *SHORT, *weights, "--seed", 7, "--skip-steps", "3", "--out", tmp_path / "a.mp4") == 0
    out = capsys.readouterr().out
    assert "seed 7" in out and "saved" in out
    with av.open(str(tmp_path / "a.mp4")) as video:
        stream, texts = video.streams.video[0], video.metadata
        assert (stream.width, stream.height, stream.average_rate, len(list(video.decode(stream)))) == (128, 64, 8, 9)
    assert texts["prompt"] == VIDEO[1] and texts["seed"] == "7"
    assert call_hunyuan(monkeypatch, *SHORT, *weights, "--height", 96, "--frames", 1, "--out", tmp_path / "b.png") == 0      # another size between
    again = shlex.split(texts["command"])[2:]
    assert call_hunyuan(monkeypatch, *again, "--out", tmp_path / "c.mp4") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()
    assert call_hunyuan(monkeypatch, *SHORT, *weights, "--compare", "--out", tmp_path / "both.mp4") == 0
    out = capsys.readouterr().out
    assert "PSNR" in out and "SSIM" in out
    with av.open(str(tmp_path / "both.mp4")) as video:
        assert video.streams.video[0].width == 256


@pytest.mark.parametrize("words, says", [
    (("--frames", 16), "4 n + 1"), (("--frames", 0), "whole number from 1"), (("--fps", 0), "whole number from 1"), (("--width", 10**9), "to 2048"),
    (("--model", "1080p"), "invalid choice"), (("--out", "a.jpg"), "must end in"), (("--frames", 1, "--out", "a.mp4"), "must end in .png"),
    (("--prompt", " "), "no prompt"), (("--dense", "--compare"), "exclude"), (("--weights", "nowhere"), "no folder nowhere"), (("--weights", "."), "has no "),
    (("--mlp-keys", 0.3), "unrecognized"), (("--skip-steps", "0,3"), "step 0 cannot be skipped"),
])
def test_hunyuan_bad_words_end_in_one_line(monkeypatch, tmp_path, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert call_hunyuan(monkeypatch, *VIDEO, *words) not in (0, None)
    error = capsys.readouterr().err.strip()
    assert says in error and error.startswith("error: ") and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_hunyuan_adjusted_words_and_foreign_weights(monkeypatch, tmp_path, capsys, hunyuan_weights):
    words = ("--prompt", "a red circle " * 100, "--width", 100, "--height", 64, "--frames", 1, "--steps", 1, "--device", "cpu")
    assert call_hunyuan(monkeypatch, *words, "--weights", hunyuan_weights, "--out", tmp_path / "a.png") == 0
    notes = capsys.readouterr().err
    assert "width 100 rounded to 96" in notes and "too long for Llama" in notes and "too long for CLIP" in notes
    file = hunyuan_weights / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    try:
        save_file(tensors | {"quant_conv.bias": torch.zeros(3)}, file)
        assert call_hunyuan(monkeypatch, *SHORT, "--weights", hunyuan_weights, "--out", tmp_path / "b.mp4") not in (0, None)
    finally:
        save_file(tensors, file)
    assert "quant_conv.bias is [3], not [32]" in capsys.readouterr().err and not (tmp_path / "b.mp4").exists()


# ---------------------------------------------------------------------------------------------------
# training and scoring the embedded models


@pytest.mark.parametrize("model", list(train_tiny.RECIPES))
def test_training_runs_resumes_and_writes_what_loads_and_can_be_scored(monkeypatch, tmp_path, capsys, model):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)                # compiling takes longer than these steps
    recipe, folder, cpu = train_tiny.RECIPES[model], tmp_path / "weights", torch.device("cpu")
    stages = tuple(replace(stage, size=32, scenes=4, batch=2, steps=2, frames=min(5, stage.frames)) for stage in recipe.stages)
    program, config = recipe.program, recipe.program.CONFIGS["tiny"]
    train_tiny.train(replace(recipe, stages=stages[:-1]), folder, tmp_path / "work", cpu)
    written = {part: (folder / file).read_bytes() for part, file in recipe.files.items()}
    train_tiny.train(replace(recipe, stages=stages), folder, tmp_path / "work", cpu)             # goes on with the last stage
    after = {part: (folder / file).read_bytes() for part, file in recipe.files.items()}
    assert after[recipe.autoencoder] == written[recipe.autoencoder] and after[recipe.painters[0]] != written[recipe.painters[0]]
    for part in recipe.files:
        module = program.load_part(part, config, folder, cpu, torch.float32)
        assert all(p.isfinite().all() for p in module.parameters())
    text = program.encode_prompts(["a red circle moves up on a blue background", ""], config, folder, cpu, torch.float32)
    assert all(x.isfinite().all() for x in ([text] if torch.is_tensor(text) else text))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 16e6
    with pytest.raises(common.Fail, match="another recipe"):
        train_tiny.train(replace(recipe, stages=(replace(stages[0], steps=3),)), folder, tmp_path / "work", cpu)

    small = {"size": 64} if model == "flux" else {"width": 64, "height": 64, "frames": 5}
    monkeypatch.setitem(program.CONFIGS, "tiny", replace(config, weights=str(folder), steps=8, **small))
    monkeypatch.setattr(sys, "argv", ["bench.py", "score", "--model", model, "--captions", "3", "--device", "cpu"])
    capsys.readouterr()
    bench.main()
    title, _, dense, *others, _, _ = capsys.readouterr().out.splitlines()
    assert f"| {model} tiny, 3 captions, 8 steps" in title and dense.endswith("| - | - |")
    assert len(others) == 6 and all(" dB | " in row for row in others)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--preset"])
    bench.main()
    assert "| Chipmunk, preset | " in capsys.readouterr().out.splitlines()[3]


@pytest.mark.parametrize("model", ["flux", "wan", "hunyuan"])
def test_steps_of_a_random_model_are_timed(monkeypatch, capsys, model):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    program = {"flux": flux_chipmunk, "wan": wan_chipmunk, "hunyuan": hunyuan_chipmunk}[model]
    config = replace(program.CONFIGS["tiny"], steps=8, **{"size": 64} if model == "flux" else {"width": 64, "height": 64, "frames": 5})
    plan = make_plan(8, fit_steps(config.sparsity, 8, 8))
    bench.speed_table(model, "tiny", config, torch.device("cpu"))
    title, _, dense, *kinds, all_dense, ours, _, _ = capsys.readouterr().out.splitlines()
    assert title.startswith(f"| {model} tiny, 64x64") and dense.startswith("| of the dense model | 8 | 0.")
    assert sum(int(row.split("|")[2]) for row in kinds) == 8 and len(kinds) == len({(step.attn, step.mlp) for step in plan})
    assert all_dense.count(" s") == 2 and len(re.findall(r"\*\*\d+\.\d\dx\*\*", ours)) == 2
    if DEVICE == "cpu":
        monkeypatch.setattr(sys, "argv", ["bench.py", "speed"])
        with pytest.raises(common.Fail, match="needs a GPU"):
            bench.main()


def test_moving_scenes_and_what_is_seen_in_them():
    rng, cpu = random.Random(6), torch.device("cpu")
    templates = bench.turned_shapes(cpu)
    scenes = [train_tiny.make_moving_scene(rng, train=i % 2 == 0, plain=i % 3 == 0) for i in range(16)]
    assert {s.motion for s in scenes} == set(train_tiny.MOTIONS)
    for i, scene in enumerate(scenes):
        assert train_tiny.held_out(scene.things[0].colour, scene.things[0].shape, scene.motion) == (i % 2 == 1)
        assert not (scene.motion == "rotates" and scene.things[0].shape in train_tiny.ROUND)
    videos = train_tiny.draw_videos(scenes, 128, 17)
    assert videos.shape == (16, 3, 17, 128, 128) and -1 <= videos.min() and videos.max() <= 1
    noisy = videos + 0.05 * torch.randn_like(videos)
    assert bench.check_videos(scenes, noisy, templates) == [(3, 3, 1, 1, True)] * 16

    def asked(**changes):
        """The scenes with something else about their things."""
        return [replace(s, things=(replace(s.things[0], **{name: other(s) for name, other in changes.items()}),)) for s in scenes]
    results = bench.check_videos(asked(colour=lambda s: s.background), videos, templates)
    assert not any(things for things, *_ in results) and all(moved for _, _, moved, *_ in results)
    shapes = list(train_tiny.SHAPES)
    results = bench.check_videos(asked(shape=lambda s: shapes[shapes.index(s.things[0].shape) - 1]), videos, templates)
    assert sum(things for things, *_ in results) <= 2                # of 48
    results = bench.check_videos([replace(s, background=s.things[0].colour) for s in scenes], videos, templates)
    assert not any(background for *_, background in results)
    motions = list(train_tiny.MOTIONS)
    for i in range(1, len(motions)):
        others = [replace(s, motion=motions[(motions.index(s.motion) + i) % len(motions)]) for s in scenes]
        assert not any(moved for _, _, moved, *_ in bench.check_videos(others, videos, templates))
    assert not any(moved for _, _, moved, *_ in bench.check_videos(scenes, videos[:, :, :1].expand_as(videos), templates))
    assert not any(things or moved for things, _, moved, *_ in bench.check_videos(scenes, torch.zeros_like(videos), templates))


def test_videos_are_drawn_as_pictures_are():
    """The first frame of a video is the picture of its scene, and the last one that of its end."""
    rng = random.Random(4)
    scenes = [s for s in (train_tiny.make_moving_scene(rng) for _ in range(12)) if s.motion not in ("rotates", "bounces")]
    videos = train_tiny.draw_videos(scenes, 48, 5, window=(0.1, 0.2, 0.5))
    assert torch.allclose(videos[:, :, 0], train_tiny.draw(scenes, 48, window=(0.1, 0.2, 0.5)), atol=1e-5)
    ends = [replace(s, things=(s.end,)) for s in scenes]
    assert torch.allclose(videos[:, :, -1], train_tiny.draw(ends, 48, window=(0.1, 0.2, 0.5)), atol=1e-3)
