"""FLUX.1 with Chipmunk: a text-to-image diffusion transformer from scratch, accelerated without training.

    python flux_chipmunk.py --prompt "a green ring on a black background"
    python flux_chipmunk.py --model dev --prompt "a chipmunk reading a map, watercolour"

What happens (`render`, near the end of this file, is this sequence):

    prompt --T5--> text tokens (B, T, 4096)        FLUX.1's context
           --CLIP-> one vector (B, 768)            modulates every block, with the time and the guidance
    noise  --2x2 patches-> image tokens (B, N, 64)
    `steps` times:  v = Flux(tokens, sigma, text);  tokens += (sigma_next - sigma) v     flow matching, Euler
    tokens --decoder-> picture

Chipmunk changes two calls of a block (and a single block runs its fused linears in parts): `attention(q, k, v)`
becomes `chipmunk_attention(q, k, v, layer_state, step)`, `mlp(x)` becomes `chipmunk_mlp(x, ..., layer_state, step)`.
Both recompute a few columns only, the most attended to and the fastest changing, and add them to what the last steps
left in `layer_state` (cache.py). `--preset columns` does this, the other presets skip whole steps. Without a state this
is plain FLUX.1.

FLUX.1: Black Forest Labs, github.com/black-forest-labs/flux. Chipmunk: arXiv 2506.03275.
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import math
import re
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoints
import cli
import media
import memory
import parallel
import processes
import replay
from cache import chipmunk_attention, chipmunk_mlp, make_state
from compiled import clock, compile_blocks, compile_seconds
from offload import homes, move_caches, move_weights, visit
from parallel import Ranks, gather_heads, gather_rows, own_rope, own_rows, scatter_heads, spread
from plan import Sparsity, make_plan, make_presets, until_sparse
from sparse_kernels import GROUP, apply_rope
from text_encoders import (CLIP_L, T5_XXL, CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, load_clip_tokenizer,
                           load_t5_tokenizer, tokenize)
from voxel import token_order

# ---------------------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class FluxConfig:
    channels: int              # of one image token: 2 x 2 latents of z channels
    text_dim: int              # of a T5 token
    pooled_dim: int            # of the CLIP vector
    dim: int
    heads: int
    double_blocks: int
    single_blocks: int
    axes: tuple[int, int, int] # head dimension split over RoPE's (text, y, x)
    guidance: bool             # is the guidance scale an input (dev), or not known to the model (schnell)?


@dataclass(frozen=True)
class AutoencoderConfig:
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2            # residual blocks a level (the decoder has one more)
    z: int = 16
    groups: int = 32           # of every GroupNorm
    scale: float = 0.3611      # latents = scale * (encoder's mean - shift)
    shift: float = 0.1159


@dataclass(frozen=True)
class Config:
    weights: str | Path        # folder, or Hugging Face repository
    files: dict                # part -> its safetensors files there
    flux: FluxConfig
    autoencoder: AutoencoderConfig
    t5: T5Config
    clip: CLIPConfig
    text_length: int           # T5 tokens; padded, and the padding is attended to
    size: int                  # default width and height, pixels
    steps: int
    guidance: float
    shift: tuple | None        # how far the schedule is shifted towards noise: mu at 256 and at 4,096 image tokens
    presets: dict              # {name: Sparsity}, for `steps` steps
    costs: dict                # {a step's mode: its time as a share of the dense model's}, from step_times.json

    @property
    def width(self):
        return self.size
    height = width


# As many of attention's columns as in the original's preset for FLUX.1-dev, but a third of its 30 % of the MLP's: with
# more full steps that is about as close to dense at the same speed, and reaches higher ones (results.md). A drift takes
# memory and time, and is no closer (method.md, part 3).
FLUX_COLUMNS = Sparsity(attn_keep=0.165, mlp_keep=0.10, delta="pooled", full=6, drift=False)
FLUX_PRESETS = make_presets(FLUX_COLUMNS)
FLUX_COSTS = {"dense": 0.96, "measure": 1.38, "refresh": 1.15, "sparse": 0.50, "skip": 0.007}

REAL_FILES = {"autoencoder": ("ae.safetensors",), "clip": ("text_encoder/model.safetensors",),
              "t5": tuple(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2))}
FLUX_12B = FluxConfig(channels=64, text_dim=4096, pooled_dim=768, dim=3072, heads=24, double_blocks=19,
                      single_blocks=38, axes=(16, 56, 56), guidance=True)
CONFIGS = {
    "tiny": Config(
        weights=Path(__file__).parent / "weights/flux-tiny",
        files={"flux": ("flux1-tiny.safetensors",), "autoencoder": ("ae.safetensors",),
               "clip": ("text_encoder/model.safetensors",), "t5": ("text_encoder_2/model.safetensors",)},
        flux=FluxConfig(channels=64, text_dim=96, pooled_dim=64, dim=256, heads=4, double_blocks=1,
                        single_blocks=4, axes=(8, 28, 28), guidance=True),
        autoencoder=AutoencoderConfig(channels=24, multipliers=(1, 2, 2, 2), blocks=1, z=16, groups=4, scale=1.0,
                                      shift=0.0),
        t5=T5Config(vocab=256, dim=96, heads=3, head_dim=32, ff=192, layers=2),
        clip=CLIPConfig(vocab=768, dim=64, heads=2, ff=256, layers=1),
        text_length=128, size=512, steps=50, guidance=4.5, shift=(2.2, 2.85), presets=FLUX_PRESETS,
        costs=FLUX_COSTS),
    "schnell": Config(
        weights="black-forest-labs/FLUX.1-schnell", files=REAL_FILES | {"flux": ("flux1-schnell.safetensors",)},
        flux=replace(FLUX_12B, guidance=False), autoencoder=AutoencoderConfig(), t5=T5_XXL, clip=CLIP_L,
        text_length=256, size=1024, steps=4, guidance=0.0, shift=None,
        presets={name: replace(preset, full=(1,), skip=()) for name, preset in FLUX_PRESETS.items()}, costs=FLUX_COSTS),
    "dev": Config(
        weights="black-forest-labs/FLUX.1-dev", files=REAL_FILES | {"flux": ("flux1-dev.safetensors",)},
        flux=FLUX_12B, autoencoder=AutoencoderConfig(), t5=T5_XXL, clip=CLIP_L,
        text_length=512, size=1024, steps=50, guidance=3.5, shift=(0.5, 1.15), presets=FLUX_PRESETS,
        costs=FLUX_COSTS),
}

# ---------------------------------------------------------------------------------------------------------
# the transformer


class Layout(NamedTuple):
    """Where the tokens of one picture stand: made once per generation by `make_layout`."""
    order: torch.Tensor        # (N,) image tokens, nested patches instead of raster
    inverse: torch.Tensor      # (N,) back to raster
    rope: tuple                # cos, sin (T + N, D / 2) float32, text first, image in `order`; this process's rows
    single_rope: tuple         # the same for single blocks
    ranks: Ranks | None        # several GPUs: who has which rows in double blocks,
    single_ranks: Ranks | None # and in single blocks, whose groups start at the text


def make_layout(config, height, width, text_length, device="cpu", ranks=None):
    """Token order and RoPE tables of a `height` x `width` grid of image tokens; ranks: from parallel.start."""
    order = token_order((height, width), (8, 8), (4, 4)).to(device)  # (N,)
    y, x = order // width, order % width
    ids = torch.stack([torch.zeros_like(y), y, x], dim=-1)           # (N, 3): FLUX keeps 0, row, column
    ids = F.pad(ids, (0, 0, text_length, 0))                         # (T + N, 3): text stands at 0, 0, 0
    angles = []
    for axis, dim in enumerate(config.axes):
        omega = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)  # (dim / 2,)
        angles.append(ids[:, axis, None] * omega)                    # (T + N, dim / 2)
    angles = torch.cat(angles, dim=-1)                               # (T + N, D / 2)
    rope = angles.cos().float(), angles.sin().float()
    ranks, single_ranks = (spread(ranks, len(ids), GROUP, first) for first in (text_length % GROUP, 0))
    return Layout(order, order.argsort(), own_rope(ranks, rope), own_rope(single_ranks, rope), ranks, single_ranks)


def sinusoid(t, dim=256):
    """Time or guidance t (B,) -> (B, dim). The factor 1000 is applied in t's own precision, as the original does:
    in bf16 a guidance of 3.5 becomes 3504, and the trained model expects that."""
    omega = 10000.0 ** -(torch.arange(dim // 2, device=t.device) / (dim // 2))  # (dim / 2,)
    angles = (1000.0 * t)[:, None].float() * omega                   # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)


class Embedder(nn.Module):
    def __init__(self, inputs, dim):
        super().__init__()
        self.in_layer = nn.Linear(inputs, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """The parameter alone: apply_rope normalises, too."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class Modulation(nn.Module):
    """vec (B, C) -> n tensors (B, 1, C): shift, scale, gate, ..."""

    def __init__(self, dim, n):
        super().__init__()
        self.n = n
        self.lin = nn.Linear(dim, n * dim)

    def forward(self, vec):
        return self.lin(F.silu(vec))[:, None].chunk(self.n, dim=-1)


def modulate(x, shift, scale):
    """Layer norm without weights of its own, then this step's shift and scale (B, 1, C). x (B, N, C)."""
    if len(x) == 1:                                                  # these can be its weights: half the time
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=1e-6))


def split_heads(qkv, heads, norm, rope):
    """(B, N, 3C) -> q, k, v (B, H, N, D), q and k normalised and rotated."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    return apply_rope(q, rope, norm.query_norm.scale), apply_rope(k, rope, norm.key_norm.scale), v


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)


def make_mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))


class DoubleBlock(nn.Module):
    """Text and image have weights of their own and meet in one attention."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.img_mod = Modulation(config.dim, 6)
        self.img_attn = SelfAttention(config.dim, config.heads)
        self.img_mlp = make_mlp(config.dim)
        self.txt_mod = Modulation(config.dim, 6)
        self.txt_attn = SelfAttention(config.dim, config.heads)
        self.txt_mlp = make_mlp(config.dim)

    def forward(self, txt, img, vec, rope, layer_state, step, ranks=None):
        """txt (B, T, C), img (B, N, C), vec (B, C) -> txt, img; with ranks, this process's rows of them and of rope."""
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)

        txt_qkv = self.txt_attn.qkv(modulate(txt, txt_shift1, txt_scale1))       # (B, T, 3C)
        img_qkv = self.img_attn.qkv(modulate(img, img_shift1, img_scale1))       # (B, N, 3C)
        txt_rope, img_rope = zip(*(table.split([txt.shape[1], img.shape[1]]) for table in rope))
        txt_heads = split_heads(txt_qkv, self.heads, self.txt_attn.norm, txt_rope)
        img_heads = split_heads(img_qkv, self.heads, self.img_attn.norm, img_rope)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_heads, img_heads)) # (B, H, T + N, D) each
        q, k, v = scatter_heads(ranks, q, k, v)
        o = chipmunk_attention(q, k, v, layer_state, step)
        o = gather_heads(ranks, o).transpose(1, 2).flatten(2)                    # (B, T + N, C)
        txt_o, img_o = o.split([txt.shape[1], img.shape[1]], dim=1)

        txt = txt.addcmul(txt_gate1, self.txt_attn.proj(txt_o))
        img = img.addcmul(img_gate1, self.img_attn.proj(img_o))
        txt = txt.addcmul(txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        fc1, _, fc2 = self.img_mlp
        x = modulate(img, img_shift2, img_scale2)
        x = chipmunk_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer_state, step)
        return txt, img.addcmul(img_gate2, x)


class SingleBlock(nn.Module):
    """Text and image in one sequence; attention and MLP side by side, their linears fused:
    linear1 is q, k, v and fc1 on top of each other, linear2 the output projection and fc2 next to each other."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dim = config.heads, config.dim
        self.linear1 = nn.Linear(config.dim, 7 * config.dim)
        self.linear2 = nn.Linear(5 * config.dim, config.dim)
        self.norm = QKNorm(config.dim // config.heads)
        self.modulation = Modulation(config.dim, 3)

    def forward(self, x, vec, rope, layer_state, step, ranks=None):
        """x (B, T + N, C), vec (B, C) -> x; with ranks, this process's rows of it and of rope."""
        shift, scale, gate = self.modulation(vec)
        h = modulate(x, shift, scale)
        w1, b1, w2, b2 = self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias
        qkv = F.linear(h, w1[:3 * self.dim], b1[:3 * self.dim])      # (B, T + N, 3C), apart from fc1, for the delta
        q, k, v = scatter_heads(ranks, *split_heads(qkv, self.heads, self.norm, rope))
        o = chipmunk_attention(q, k, v, layer_state, step)
        o = gather_heads(ranks, o).transpose(1, 2).flatten(2)        # (B, T + N, C)
        mlp = chipmunk_mlp(h, w1[3 * self.dim:], b1[3 * self.dim:], w2[:, self.dim:], None, layer_state, step)
        return x.addcmul(gate, F.linear(o, w2[:, :self.dim], b2) + mlp)


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.dim, config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)      # (B, 1, C) each
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """The rectified-flow transformer. Parameter names are those of flux1-dev.safetensors."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.channels, config.dim)
        self.txt_in = nn.Linear(config.text_dim, config.dim)
        self.time_in = Embedder(256, config.dim)
        self.vector_in = Embedder(config.pooled_dim, config.dim)
        if config.guidance:
            self.guidance_in = Embedder(256, config.dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(config)

    def forward(self, x, t, text, pooled, guidance, layout, state=None, step=None):
        """The velocity at x: noise - image.

        x (B, N, channels) image tokens in raster order; t, guidance (B,) in x's dtype, t = 1 is pure noise;
        text (B, T, text_dim) from T5; pooled (B, pooled_dim) from CLIP; layout from make_layout, one for all steps.
        state: a ModelState to run Chipmunk with (after lay_out_for_deltas); step: what to do now. None: plain dense.
        -> (B, N, channels)
        """
        if step is not None and step.skip:
            return state.recall(step)                                # step caching: nothing runs
        vec = self.time_in(sinusoid(t)) + self.vector_in(pooled)     # (B, C)
        if self.config.guidance:
            vec = vec + self.guidance_in(sinusoid(guidance))

        def run(x, text, vec):
            return self.final_layer(self.blocks(x, text, vec, layout, state, step), vec)
        again = replay.can_replay(self.all_blocks, state, step, layout.ranks, x)
        out = replay.replay(run, (x, text, vec), state) if again else run(x, text, vec)  # (B, N, channels)
        out = gather_rows(layout.single_ranks, out, text.shape[1], x.shape[1])[:, layout.inverse]
        if state is not None:
            state.remember(step, out)
        return out

    @property
    def all_blocks(self):
        return [*self.double_blocks, *self.single_blocks]

    def blocks(self, x, text, vec, layout, state, step):
        img = self.img_in(x)[:, layout.order]                        # (B, N, C)
        txt = self.txt_in(text)                                      # (B, T, C)
        txt, img = own_rows(layout.ranks, txt, img)
        blocks = visit(self.all_blocks, state, step, x.device)
        for block, layer_state in islice(blocks, len(self.double_blocks)):
            txt, img = block(txt, img, vec, layout.rope, layer_state, step, layout.ranks)
        if layout.ranks != layout.single_ranks:                      # cut elsewhere from now on
            txt = gather_rows(layout.ranks, txt, 0, text.shape[1])                   # (B, T, C)
            img = gather_rows(layout.ranks, img, text.shape[1], len(layout.order))   # (B, N, C)
            txt, img = own_rows(layout.single_ranks, txt, img)
        x = torch.cat([txt, img], dim=1)                             # (B, T + N, C)
        for block, layer_state in blocks:
            x = block(x, vec, layout.single_rope, layer_state, step, layout.single_ranks)
        return x[:, txt.shape[1]:]

    def lay_out_for_deltas(self):
        """Store fc2's weights column after column, so that gathering some of its columns reads whole rows of memory.
        Shapes, names and values stay; dense products take either layout."""
        for block in self.double_blocks:
            block.img_mlp[2].weight.data = block.img_mlp[2].weight.data.t().contiguous().t()
        for block in self.single_blocks:
            block.linear2.weight.data = block.linear2.weight.data.t().contiguous().t()

# ---------------------------------------------------------------------------------------------------------
# the autoencoder: names are those of ae.safetensors


def conv(inputs, outputs, size=3):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = conv(inputs, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = conv(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        # contiguous: from strided q, k, v the attention would hold all hw^2 scores at once
        q, k, v = (f(h).flatten(2).mT.contiguous()[:, None] for f in (self.q, self.k, self.v))  # (B, 1, hw, C)
        o = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)                       # (B, C, hw)
        return x + self.proj_out(o.unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half or double the height and width of x (B, C, h, w)."""

    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = conv(channels, channels) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2h, 2w)
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                  # (B, C, h / 2, w / 2)


def middle(channels, groups):
    return nn.ModuleDict({"block_1": ResnetBlock(channels, channels, groups),
                          "attn_1": AttentionBlock(channels, groups),
                          "block_2": ResnetBlock(channels, channels, groups)})


def level(inputs, outputs, blocks, groups):
    """One resolution of the pyramid: its residual blocks; a Resample joins them if the size changes."""
    return nn.ModuleDict({"block": nn.ModuleList(
        ResnetBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))})


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = conv(3, widths[0])
        self.down = nn.ModuleList(level(inputs, outputs, config.blocks, config.groups)
                                  for inputs, outputs in zip(widths[:1] + widths, widths))
        for stage, width in zip(self.down[:-1], widths):
            stage["downsample"] = Resample(width, up=False)
        self.mid = middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = conv(widths[-1], 2 * config.z)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage["block"]:
                x = block(x)
            if "downsample" in stage:
                x = stage["downsample"](x)
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = conv(config.z, widths[-1])
        self.mid = middle(widths[-1], config.groups)
        self.up = nn.ModuleList(level(inputs, outputs, config.blocks + 1, config.groups)
                                for outputs, inputs in zip(widths, widths[1:] + widths[-1:]))
        for stage, width in zip(self.up[1:], widths[1:]):
            stage["upsample"] = Resample(width, up=True)
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = conv(widths[0], 3)

    def forward(self, z):
        x = self.conv_in(z)
        for block in self.mid.values():
            x = block(x)
        for stage in reversed(self.up):                              # the finest level is number 0 and runs last
            for block in stage["block"]:
                x = block(x)
            if "upsample" in stage:
                x = stage["upsample"](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pictures):
        """pictures (B, 3, 8h, 8w) in -1..1 -> latents (B, z, h, w): the mean of their distribution, scaled."""
        mean, _ = self.encoder(pictures).chunk(2, dim=1)             # (B, z, h, w): mean and log variance
        return self.config.scale * (mean - self.config.shift)

    def decode(self, latents):
        """latents (B, z, h, w) -> pictures (B, 3, 8h, 8w), roughly in -1..1."""
        return self.decoder(latents / self.config.scale + self.config.shift)

# ---------------------------------------------------------------------------------------------------------
# the sampler


def patchify(latents):
    """(B, z, 2h, 2w) -> (B, h w, 4 z), raster order."""
    b, z, h, w = latents.shape
    x = latents.reshape(b, z, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)    # (B, h, w, z, 2, 2)
    return x.reshape(b, h * w // 4, 4 * z)


def unpatchify(x, height, width):
    """(B, height width, 4 z) -> (B, z, 2 height, 2 width)."""
    x = x.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))                 # (B, h, w, z, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)                  # (B, z, 2h, 2w)


def make_sigmas(steps, tokens, shift):
    """Noise levels from 1 (pure noise) to 0, `steps` + 1 of them. shift: more of them are near 1 the larger the picture
    is, as mu grows linearly from shift[0] at 256 tokens to shift[1] at 4,096; None, as for schnell: evenly spread."""
    sigmas = torch.linspace(1, 0, steps + 1)
    if shift is None:
        return sigmas
    mu = shift[0] + (shift[1] - shift[0]) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))          # sigma = 0 gives 1 / inf = 0


def make_noise(z, height, width, seed):
    """(1, z, 2 height, 2 width) for a grid of height x width tokens, in bf16 as the original's; but always drawn on the
    CPU and in float32, so that a seed is the same noise on any device (torch 2.11 draws other numbers in bf16)."""
    noise = torch.randn(1, z, 2 * height, 2 * width, generator=torch.Generator("cpu").manual_seed(seed))
    return noise.bfloat16()


def sample(model, x, text, pooled, guidance, sigmas, layout, plan=None, state=None):
    """Euler steps from noise x (B, N, channels) to image tokens, in x's dtype; the model runs in text's. (The original
    rounds x to bfloat16 at every step.) plan: an iterable of Step; dense without plan and state. Raises Fail at NaN or
    infinity, a step later. -> (B, N, channels)"""
    guidance = text.new_full((x.shape[0],), guidance)                # (B,)
    plan, checked = plan or [None] * (len(sigmas) - 1), None
    for i, (step, sigma, sigma_next) in enumerate(zip(plan, sigmas[:-1].tolist(), sigmas[1:].tolist())):
        t = text.new_full((x.shape[0],), sigma)                      # (B,)
        v = model(x.to(text.dtype), t, text, pooled, guidance, layout, state, step)
        x = x + (sigma_next - sigma) * v.to(x.dtype)
        checked = cli.check_finite(x, f"step {i} of the transformer", text.dtype, checked)
    checked()                                                        # waits for the device
    return x

# ---------------------------------------------------------------------------------------------------------
# weights in diffusers' layout, which is what its users have: other names, and linears that are not fused

DIFFUSERS_FILES = {"flux": "transformer/diffusion_pytorch_model.safetensors",
                   "autoencoder": "vae/diffusion_pytorch_model.safetensors"}
DIFFUSERS_NAMES = {            # ours: theirs, whose rows stand below each other; [0], [1]: a half of their rows
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear[1] norm_out.linear[0]",       # theirs: first scale, then shift
    # of a double block
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v", "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    # of a single block
    "modulation.lin": "norm.linear", "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out"}
DIFFUSERS_AUTOENCODER = [      # what of our names is something else in theirs
    ("attn_1.norm", "attentions.0.group_norm"), ("attn_1.proj_out", "attentions.0.to_out.0"),
    (r"attn_1\.([qkv])", r"attentions.0.to_\1"), ("norm_out", "conv_norm_out"), ("nin_shortcut", "conv_shortcut"),
    ("block_1", "resnets.0"), ("block_2", "resnets.1"), (r"block\.", "resnets."), (r"sample\.conv", "samplers.0.conv"),
    (r"\.(down|up|mid)\.", r".\1_block."), (r"(down|up)_block\.", r"\1_blocks.")]


def transformer_layout(name, shape):
    """A layout for checkpoints.load_weights: the tensors of diffusers' transformer/ that are a parameter of Flux."""
    stem, _, leaf = name.rpartition(".")
    block = re.match(r"(double|single)_blocks(\.\d+\.)", stem)
    prefix = ""
    if block:
        prefix = {"double": "", "single": "single_"}[block[1]] + "transformer_blocks" + block[2]
        stem = stem[block.end():]
    theirs = [piece.partition("[") for piece in DIFFUSERS_NAMES[stem].split()]
    shares = [4 if piece == "proj_mlp" else 1 for piece, _, _ in theirs]
    pieces = []
    for (piece, bracket, half), share in zip(theirs, shares):
        rows = shape[0] if bracket else shape[0] * share // sum(shares)
        full_name = f"{prefix}{piece}.{leaf.replace('scale', 'weight')}{bracket}{half}"
        pieces.append((full_name, (rows, *shape[1:])))
    return pieces


def autoencoder_layout(levels):
    """Likewise for diffusers' vae/, whose decoder counts its levels from the coarsest."""
    def layout(name, shape):
        name = re.sub(r"up\.(\d+)", lambda level: f"up.{levels - 1 - int(level[1])}", name)
        for ours, theirs in DIFFUSERS_AUTOENCODER:
            name = re.sub(ours, theirs, name)
        return [(name, shape[:2] if "attentions" in name else shape)]            # linears there, 1x1 convolutions here
    return layout

# ---------------------------------------------------------------------------------------------------------
# generate: prompt in, picture out


def generate(prompt, *, model="tiny", weights=None, width=None, height=None, steps=None, guidance=None, seed=0,
             preset="balanced", sparsity=None, dense=False, device=None, dtype=None, offload=None, compile=False):
    """Draw a prompt -> PIL image.

    model: a name in CONFIGS. weights: a folder or Hugging Face repository. width, height: pixels. preset: "columns",
    "quality", "balanced" or "fast". sparsity: instead, a plan.Sparsity for this many steps. dense: recompute
    everything. device: "cpu", "cuda", ... dtype: "float32" or "bfloat16". offload: "none", "caches" or "all" (weights,
    too) live on the host; None: what must. compile: every block by torch.compile. None: the model's own value. Raises
    cli.Fail for what cannot be done."""
    settings = cli.Settings(model=model, weights=weights, width=width, height=height, steps=steps, guidance=guidance,
                            seed=seed, preset=preset, sparsity=sparsity, dense=dense, device=device, dtype=dtype,
                            offload=offload, compile=compile)
    (picture, _), = render(prompt, cli.fill(settings, CONFIGS))
    return media.to_image(picture)


class Report(NamedTuple):
    seconds: float             # of all steps, without encoding, decoding and compiling
    attn: float                # share of attention columns that were recomputed
    mlp: float                 # share of MLP columns, likewise
    saved: float               # share of floating-point operations saved


@torch.no_grad()
def render(prompt, settings, compare=False, ranks=None):
    """The whole way from a prompt to a picture (3, height, width) in -1..1 and its Report, with filled settings.
    -> [(picture, Report)]; with compare two of them from the same noise, first the dense one. ranks: from
    parallel.start; [] for all but the first process."""
    config = CONFIGS[settings.model]
    device, dtype, folder = settings.device, settings.dtype, settings.weights or config.weights
    h, w = settings.height // 16, settings.width // 16               # in tokens
    with processes.one_a_machine_first(ranks):                       # it may download
        placement = check(prompt, settings, folder, ranks)

    text, pooled = encode_prompts([prompt], config, folder, device, dtype)       # (1, T, text_dim), (1, pooled_dim)
    for part, states in ("T5", text), ("CLIP", pooled):
        cli.check_finite(states, part, dtype)()
    layout = make_layout(config.flux, h, w, config.text_length, device, ranks)
    noise = make_noise(config.autoencoder.z, h, w, settings.seed)                # (1, z, 2h, 2w)
    noise = patchify(noise.to(device).float())                                   # (1, N, 4 z)
    sigmas = make_sigmas(settings.steps, h * w, config.shift)
    layers, tokens = config.flux.double_blocks + config.flux.single_blocks, config.text_length + h * w
    flux = load_part("flux", config, folder, lambda flux: homes(flux, flux.all_blocks, placement.blocks, device), dtype)
    flux.lay_out_for_deltas()                                        # also dense, which then is compare's dense half
    move_weights(flux, flux.all_blocks, placement.blocks, device)
    if settings.compile:
        compile_blocks(flux)

    def fresh_state(sparsity):
        return move_caches(make_state(layers, sparsity, tokens, None, settings.seed, device), placement.layers, device)

    results = []
    for sparsity in [None, settings.sparsity] if compare else [settings.sparsity]:
        plan = make_plan(settings.steps, sparsity)
        if compare and device.type == "cuda":                        # compile every kernel first: both times are fair
            state = fresh_state(sparsity)
            sample(flux, noise, text, pooled, settings.guidance, sigmas, layout, until_sparse(plan), state)
        start = clock()
        state = fresh_state(sparsity)
        steps = tqdm(plan, "denoising" if sparsity else "dense", leave=False, disable=None)
        x = sample(flux, noise, text, pooled, settings.guidance, sigmas, layout, steps, state)     # (1, N, 4 z)
        seconds = clock() - start
        parallel.add_up_work(ranks, [state])
        results.append((x, Report(seconds, *work_done(config.flux, tokens, h * w, plan, state))))
    del flux, state
    if not parallel.leave(ranks):
        return []

    autoencoder = load_part("autoencoder", config, folder, device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):       # as the original
        return [(autoencoder.decode(unpatchify(x, h, w)).float().clamp(-1, 1)[0], report)
                for x, report in results]


def check(prompt, settings, folder, ranks):
    """Find everything that can be wrong before a network is loaded, and where it goes. -> memory.Placement
    Raises Fail."""
    config, dtype = CONFIGS[settings.model], settings.dtype
    cli.check_prompt(prompt)
    if settings.guidance and not config.flux.guidance:
        cli.note(f"{settings.model} takes no guidance; --guidance has no effect")
    for part in "t5", "clip":
        checkpoints.check_memory(parts(config)[part], dtype, settings.device)
    need, placement = memory.place(find_need, settings, ranks)
    memory.check_decoder(find_decoder_need(settings), settings.device)
    for part, make in parts(config).items():
        checkpoints.check_weights(make, *part_files(part, config, folder))
    memory.say(need, placement, settings.device)
    return placement


def encode_prompts(prompts, config, folder, device, dtype):
    """prompts -> T5 states (B, T, text_dim) and CLIP vectors (B, pooled_dim). Loads the encoders and frees them."""
    files = ["tokenizer_2/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    t5_file, vocab, _ = checkpoints.weight_files(folder, files)
    t5_tokenizer = checkpoints.load_tokenizer(load_t5_tokenizer, t5_file, config.t5.vocab)
    clip_tokenizer = checkpoints.load_tokenizer(load_clip_tokenizer, vocab.parent, config.clip.vocab)
    end = clip_tokenizer.token_to_id("<|endoftext|>")
    t5_ids, _, t5_cut = tokenize(t5_tokenizer, prompts, config.text_length, 0)   # (B, T)
    clip_ids, _, clip_cut = tokenize(clip_tokenizer, prompts, config.clip.length, end)
    for name, cut in ("T5", t5_cut), ("CLIP", clip_cut):
        if max(cut):
            cli.note(f"the prompt is too long for {name}: its last {max(cut)} tokens were cut")
    if isinstance(config.weights, Path):                             # embedded
        cli.note_unknown_words(t5_tokenizer, prompts)
    t5 = load_part("t5", config, folder, device, dtype)
    text = t5(t5_ids.to(device))                                                 # (B, T, text_dim)
    del t5
    clip = load_part("clip", config, folder, device, dtype)
    return text, clip(clip_ids.to(device))[1]                                    # (B, pooled_dim)


def parts(config):
    """{name: how to build it} of the four networks."""
    return {"t5": lambda: T5Encoder(config.t5), "clip": lambda: CLIPTextEncoder(config.clip),
            "flux": lambda: Flux(config.flux), "autoencoder": lambda: Autoencoder(config.autoencoder)}


def load_part(part, config, folder, device, dtype):
    """One of the four networks, with its weights."""
    files, layout = part_files(part, config, folder)
    return checkpoints.load_weights(parts(config)[part], files, device, dtype, layout=layout)


def part_files(part, config, folder):
    """The files of a network and their layout: the original's, unless only diffusers' are there."""
    theirs = DIFFUSERS_FILES.get(part)
    if theirs is None or checkpoints.at_hand(folder, config.files[part][0]) or not checkpoints.at_hand(folder, theirs):
        return checkpoints.weight_files(folder, config.files[part]), checkpoints.as_named
    layout = transformer_layout if part == "flux" else autoencoder_layout(len(config.autoencoder.multipliers))
    return checkpoints.sharded_files(folder, theirs), layout


def find_decoder_need(settings):
    """What decoding needs, in bytes."""
    config = CONFIGS[settings.model]
    latents = torch.empty(1, config.autoencoder.z, settings.height // 8, settings.width // 8, device="meta")
    return memory.decoder_bytes(parts(config)["autoencoder"], latents, lambda autoencoder, z: autoencoder.decode(z))


def find_need(settings, ranks=None):
    """What denoising needs. -> memory.Need"""
    config, n_text, dtype = CONFIGS[settings.model].flux, CONFIGS[settings.model].text_length, settings.dtype
    n_image = settings.height // 16 * (settings.width // 16)
    tokens = n_text + n_image
    with torch.device("meta"):
        model, small = (Flux(c).to(dtype) for c in (config, replace(config, double_blocks=1, single_blocks=1)))
        order, rope = torch.empty(n_image, dtype=torch.long), torch.empty(tokens, config.dim // config.heads // 2)
        layout = Layout(order, order, (rope, rope), (rope, rope), None, None)
        x, text, pooled, time = (torch.empty(1, *shape, dtype=dtype) for shape in (
            (n_image, config.channels), (n_text, config.text_dim), (config.pooled_dim,), ()))
    small.lay_out_for_deltas()
    state = memory.rehearsal_state(2, settings.sparsity, tokens, 0)
    kinds = [0] * config.double_blocks + [1] * config.single_blocks

    def forward(step):
        small(x, time, text, pooled, time, layout, state, step)
    share = parallel.cache_share(ranks)
    need = memory.find_need(model, model.all_blocks, kinds, settings.sparsity, state, share, forward)
    sparse = sum(step.mode == "sparse" for step in make_plan(settings.steps, settings.sparsity))
    if sparse > replay.PLAIN and settings.device.type == "cuda" and ranks is None and not settings.sparsity.drift:
        need = replace(need, recorded=memory.rehearse(lambda: forward(memory.REHEARSED[-1])))
    return need


def work_done(config, tokens, image, plan, state):
    """Shares of attention and MLP columns that a generation recomputed, and of floating-point operations it saved.
    tokens: text and image together; image: those that a double block's MLP delta covers. state None: all was dense."""
    if state is None:
        return 1.0, 1.0, 0.0
    mlp_rows = [image] * config.double_blocks + [tokens] * config.single_blocks
    run = sum(not step.skip for step in plan)                        # a dense layer works in each of these
    attn = mlp = 0.0
    for rows, layer_state in zip(mlp_rows, state.layers):
        attn += run if layer_state is None else float(layer_state.attn_work)
        mlp += rows * run if layer_state is None else float(layer_state.mlp_work)
    all_attn, all_mlp = len(plan) * len(mlp_rows), len(plan) * sum(mlp_rows)

    attn_flops = 4 * tokens**2 * config.dim                          # of one attention
    mlp_flops = 16 * config.dim**2                                   # of one row of an MLP
    projections = 8 * config.dim**2 * tokens * len(mlp_rows)
    text_mlps = mlp_flops * sum(tokens - rows for rows in mlp_rows)  # the double blocks' text has MLPs of its own
    others = projections + text_mlps
    dense = attn_flops * all_attn + mlp_flops * all_mlp + others * len(plan)
    ours = attn_flops * attn + mlp_flops * mlp + others * run
    return attn / all_attn, mlp / all_mlp, 1 - ours / dense

# ---------------------------------------------------------------------------------------------------------
# the command line


def main():
    parser, chipmunk = cli.make_parser(__doc__, CONFIGS)
    chipmunk.add_argument("--mlp-keys", type=cli.number(float, 0, 1), metavar="SHARE",
                          help="MLP columns recomputed at a sparse step, 0 to 1; 0 leaves the MLP dense")
    args, settings = cli.parse(parser, CONFIGS, lambda settings: memory.show(find_need, find_decoder_need, settings))
    out = args.out or Path("flux.png")
    ranks = parallel.start(settings.device, CONFIGS[settings.model].flux.heads)
    if ranks is None or ranks.first:                                 # who writes
        media.check_out(out, (".png",))

    start = time.perf_counter()
    results = render(args.prompt, settings, args.compare, ranks)
    if not results:                                                  # the first process has them
        return
    pictures, reports = zip(*results)
    out = media.write_png(out, torch.cat(pictures, dim=2), cli.describe(args, settings), new=args.out is None)
    cli.say(f"{out}: {settings.width}x{settings.height}, {cli.count(settings.steps, 'step')}, seed {settings.seed}, "
            f"{time.perf_counter() - start:.1f} s")
    ours = reports[-1]
    if settings.compile:
        cli.note(f"compiling took {compile_seconds():.1f} s")
    if settings.sparsity:
        cli.say(cli.work_line(settings, ours.attn, ours.saved, ours.mlp))
    if args.compare:
        dense, picture = (p[None] for p in pictures)                 # (1, 3, height, width) each
        cli.say(media.comparison(dense, picture, reports[0].seconds, ours.seconds))


if __name__ == "__main__":
    processes.run(main)
