"""Wan2.1 with Chipmunk: a text-to-video diffusion transformer from scratch, accelerated without training.

    python wan_chipmunk.py --prompt "a red circle moves left to right on a green background"
    python wan_chipmunk.py --model 1.3b --prompt "a chipmunk rides a skateboard through falling leaves"

What happens (`render`, near the end of this file, is this sequence):

    prompt, negative prompt --UMT5--> text tokens (B, L, 4096) each
    noise (B, z, t, h, w) --1x2x2 patches-> video tokens (B, N, C), in voxels of 4x4x8
    `steps` times:  v = v_negative + guidance (v_prompt - v_negative), each v = Wan(latents, timestep, text)
                    latents move from one noise level to the next      flow matching, UniPC of order 2
    latents --causal 3D decoder, one latent frame after the other-> frames --H.264-> video

Chipmunk changes one call of a block: self attention's `attention(q, k, v)` becomes `chipmunk_attention(q, k, v,
layer_state, step)`, which recomputes only the columns that matter most and adds them to what the last steps left in
`layer_state` (cache.py). The two texts have a state each. Cross attention and the MLP stay dense, as in the original.
`--preset columns` does this, the other presets skip whole steps. Without a state this is plain Wan2.1.

Wan2.1: Alibaba's Wan team, github.com/Wan-Video/Wan2.1. Chipmunk: arXiv 2506.03275.
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import html
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import ftfy
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
from cache import chipmunk_attention, make_state
from compiled import clock, compile_blocks, compile_seconds
from offload import homes, in_chunks, move_caches, move_weights, visit
from parallel import Ranks, gather_heads, gather_rows, own_rope, own_rows, scatter_heads, spread
from plan import Sparsity, make_plan, make_presets, until_sparse
from sparse_kernels import GROUP, apply_rope
from text_encoders import UMT5_XXL, T5Config, T5Encoder, load_t5_tokenizer, tokenize
from voxel import local_windows, token_order

# ---------------------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class WanConfig:
    channels: int              # of the latents
    text_dim: int              # of a UMT5 token
    dim: int
    heads: int
    ff: int                    # hidden width of the MLP
    layers: int
    frequencies: int = 256     # of the time's sinusoid


@dataclass(frozen=True)
class VAEConfig:
    channels: int
    multipliers: tuple[int, ...]
    blocks: int                # residual blocks a level (the decoder has one more)
    mean: tuple[float, ...]    # of each latent channel; latents = (encoder's mean - mean) / std
    std: tuple[float, ...]

    @property
    def z(self):
        return len(self.mean)


@dataclass(frozen=True)
class Config:
    weights: str | Path        # folder, or Hugging Face repository
    wan: WanConfig
    vae: VAEConfig
    umt5: T5Config
    text_length: int           # UMT5 tokens; padded with zeros, and the padding is attended to
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    shift: float               # of the noise levels: larger spends more steps on much noise
    window: int                # a group of tokens always recomputes the window x window x window voxels around it
    presets: dict              # {name: Sparsity}, for `steps` steps
    costs: dict                # {a step's mode: its time as a share of the dense model's}, from step_times.json


FILES = {"umt5": "text_encoder/model.safetensors", "wan": "transformer/diffusion_pytorch_model.safetensors",
         "vae": "vae/diffusion_pytorch_model.safetensors"}
VOXEL = (4, 4, 8)              # 128 tokens, one group; the original's voxel is 4x6x8

# As many columns as in the original's preset. Full steps are evenly spread: the drift is taken over as many steps as it
# is used for. How far a skipped step goes on is measured: 0.8 of the trend spoils things, and to repeat is farther from
# dense. The trends of `fast` are over too many steps: a measured share spoils things there, too (results.md).
WAN_COLUMNS = Sparsity(attn_keep=0.10, mlp_keep=0.0, delta="pooled", full=6, choose=2, extrapolate=None)
WAN_PRESETS = make_presets(WAN_COLUMNS)
WAN_PRESETS |= {"fast": replace(WAN_PRESETS["fast"], extrapolate=0)}
WAN_COSTS = {"dense": 1.0, "measure": 1.54, "refresh": 1.14, "sparse": 0.55, "skip": 0.001}

WAN_VAE = VAEConfig(
    channels=96, multipliers=(1, 2, 4, 4), blocks=2,
    mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
          0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160))
# "Garish colours, overexposed, static, blurred details, subtitles, style, artwork, painting, still, overall grey, worst
# quality, JPEG artefacts, ugly, mutilated, extra fingers, badly drawn hands and faces, deformed, fused fingers,
# motionless picture, cluttered background, three legs, crowd in the background, walking backwards"
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走")
CONFIGS = {
    "tiny": Config(
        weights=Path(__file__).parent / "weights/wan-tiny",
        wan=WanConfig(channels=16, text_dim=96, dim=256, heads=4, ff=704, layers=6),
        vae=VAEConfig(channels=16, multipliers=(1, 2, 3, 3), blocks=1, mean=(0.0,) * 16, std=(1.0,) * 16),
        umt5=T5Config(vocab=256, dim=96, heads=3, head_dim=32, ff=192, layers=2, per_layer_bias=True),
        text_length=64, negative_prompt="", width=256, height=256, frames=17, fps=8, steps=50, guidance=5.0, shift=8.0,
        window=1,                                                    # 3x3x3 voxels would be most of so small a video
        presets=WAN_PRESETS, costs=WAN_COSTS),
    "1.3b": Config(
        weights="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        wan=WanConfig(channels=16, text_dim=4096, dim=1536, heads=12, ff=8960, layers=30), vae=WAN_VAE, umt5=UMT5_XXL,
        text_length=512, negative_prompt=NEGATIVE_PROMPT, width=832, height=480, frames=81, fps=16, steps=50,
        guidance=6.0, shift=8.0, window=3, presets=WAN_PRESETS, costs=WAN_COSTS),
    "14b": Config(
        weights="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        wan=WanConfig(channels=16, text_dim=4096, dim=5120, heads=40, ff=13824, layers=40), vae=WAN_VAE, umt5=UMT5_XXL,
        text_length=512, negative_prompt=NEGATIVE_PROMPT, width=1280, height=720, frames=81, fps=16, steps=50,
        guidance=5.0, shift=5.0, window=3, costs=WAN_COSTS,
        presets=WAN_PRESETS | {"columns": replace(WAN_COLUMNS, drift=False)}),           # 30 GB less on the host
}

# ---------------------------------------------------------------------------------------------------------
# the transformer


class Layout(NamedTuple):
    """Where the tokens of one video stand: made once per generation by `make_layout`."""
    order: torch.Tensor        # (N,) tokens, voxel after voxel instead of raster
    inverse: torch.Tensor      # (N,) back to raster
    rope: tuple                # cos, sin (N, D / 2) float32, in `order`; this process's rows
    static: torch.Tensor       # (G, N) bool: columns that each group of tokens always recomputes, the voxels around it
    ranks: Ranks | None        # several GPUs: who has which tokens


def make_layout(config, grid, window, device="cpu", ranks=None):
    """Token order, RoPE tables and static columns of a `grid` (t, h, w) of tokens; ranks: from parallel.start."""
    order = token_order(grid, VOXEL)                                 # (N,)
    half = config.dim // config.heads // 2                           # rotated pairs in a head, split over t, y, x
    pairs = half - 2 * (half // 3), half // 3, half // 3
    angles = []
    for position, n in zip(torch.unravel_index(order, grid), pairs):
        omega = 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)           # (n,)
        angles.append(position[:, None] * omega)                     # (N, n)
    ranks = spread(ranks, len(order))
    angles = torch.cat(angles, dim=-1)                               # (N, D / 2)
    rope = own_rope(ranks, (angles.cos().float().to(device), angles.sin().float().to(device)))
    static = local_windows(grid, VOXEL, window, order).to(device)
    return Layout(order.to(device), order.argsort().to(device), rope, static, ranks)


def sinusoid(t, dim):
    """Timesteps t (B,), 0 to 1000 -> (B, dim) float32. Computed in float64, as the original does."""
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))  # (dim / 2,)
    angles = t.double()[:, None] * omega                             # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def modulate(x, shift, scale):
    """Layer norm without weights of its own, then this step's shift and scale (B, 1, C). x (B, N, C)."""
    if len(x) == 1:                                                  # these can be its weights: half the time
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=1e-6))


class Embedder(nn.Module):
    def __init__(self, inputs, dim, activation):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(self.activation(self.linear_1(x)))


class Attention(nn.Module):
    """The linears and norms of self attention (attn1) and of cross attention (attn2)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=1e-6)                      # over all heads together
        self.norm_k = nn.RMSNorm(dim, eps=1e-6)

    def qkv(self, x, context):
        """x (B, N, C), context (B, M, C) -> q (B, H, N, D) and k (B, H, M, D) normalised, float32; v (B, H, M, D)"""
        q, k, v = self.norm_q(self.to_q(x).float()), self.norm_k(self.to_k(context).float()), self.to_v(context)
        return (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))

    def out(self, o):
        return self.to_out[0](o.transpose(1, 2).flatten(2))          # (B, N, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn1 = Attention(config.dim, config.heads)
        self.attn2 = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.ffn = nn.ModuleDict({"net": nn.ModuleList([
            nn.ModuleDict({"proj": nn.Linear(config.dim, config.ff)}), nn.GELU(approximate="tanh"),
            nn.Linear(config.ff, config.dim)])})
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x, text, time, rope, layer_state, step, ranks=None):
        """x (B, N, C) and time (B, 6, C) float32, text (B, L, C) in the linears' precision -> x. As in the original,
        the residual stream and the modulation are float32 whatever the linears are. With ranks, x and rope are this
        process's rows."""
        modulation = (self.scale_shift_table + time).chunk(6, dim=1)             # (B, 1, C) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = modulate(x, shift1, scale1).to(text.dtype)
        x = x.addcmul(gate1, self.self_attention(h, rope, layer_state, step, ranks))
        h = self.norm2(x).to(text.dtype)
        x = x + self.cross_attention(h, text)
        fc1, gelu, fc2 = self.ffn.net
        def mlp(x):
            return fc2(gelu(fc1.proj(modulate(x, shift2, scale2).to(text.dtype))))
        return x.addcmul(gate2, in_chunks(mlp, x))

    def self_attention(self, h, rope, layer_state, step, ranks):
        """h (B, N, C) -> (B, N, C)"""
        q, k, v = self.attn1.qkv(h, h)                               # (B, H, N, D) each
        q = apply_rope(q, rope, dtype=v.dtype)                       # one after the other: float32 ones are large
        k = apply_rope(k, rope, dtype=v.dtype)
        q, k, v = scatter_heads(ranks, q, k, v)
        o = gather_heads(ranks, chipmunk_attention(q, k, v, layer_state, step))      # (B, H, N, D)
        return self.attn1.out(o)

    def cross_attention(self, h, text):
        """h (B, N, C), text (B, L, C) -> (B, N, C)"""
        q, k, v = self.attn2.qkv(h, text)                            # (B, H, N, D), (B, H, L, D) twice
        return self.attn2.out(F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v))


class Wan(nn.Module):
    """The diffusion transformer. Parameter names are those of the -Diffusers repositories' transformer/."""
    FLOAT32 = ("scale_shift_table", "norm", "time_", "proj_out")     # parameters that stay float32 whatever the rest is

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, (1, 2, 2), stride=(1, 2, 2))
        self.condition_embedder = nn.ModuleDict({
            "time_embedder": Embedder(config.frequencies, config.dim, nn.SiLU()),
            "time_proj": nn.Linear(config.dim, 6 * config.dim),
            "text_embedder": Embedder(config.text_dim, config.dim, nn.GELU(approximate="tanh"))})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.proj_out = nn.Linear(config.dim, 4 * config.channels)

    def forward(self, x, t, text, layout, state=None, step=None):
        """The velocity at x: noise - video.

        x (B, channels, t, h, w) latents, h and w even; t (B,) timesteps, 1000 is pure noise; text (B, L, text_dim),
        padding zero; layout from make_layout. state: a ModelState to run Chipmunk with; step: what to do now. None:
        plain dense.
        -> (B, channels, t, h, w) float32
        """
        grid = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        if step is not None and step.skip:
            return unpatchify(state.recall(step), grid)              # step caching: nothing runs
        time = self.condition_embedder.time_embedder(sinusoid(t, self.config.frequencies))       # (B, C)
        hidden = self.run_blocks(x, time, text, layout, state, step)                             # (B, N, C)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)                  # (B, 1, C) each
        out = self.proj_out(modulate(hidden, shift, scale))                                      # (B, N, 4 channels)
        out = gather_rows(layout.ranks, out, 0, len(layout.order))[:, layout.inverse]
        if state is not None:
            state.remember(step, out)
        return unpatchify(out, grid)

    def run_blocks(self, x, time, text, layout, state, step):
        x = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))        # (B, C, t, h / 2, w / 2)
        x, = own_rows(layout.ranks, x.flatten(2).transpose(1, 2)[:, layout.order])               # (B, N, C)
        x = x.float()                                                # the residual stream
        text = self.condition_embedder.text_embedder(text)                                       # (B, L, C)
        time = self.condition_embedder.time_proj(F.silu(time)).unflatten(-1, (6, -1))            # (B, 6, C)
        for block, layer_state in visit(self.blocks, state, step, x.device):
            x = block(x, text, time, layout.rope, layer_state, step, layout.ranks)
        return x


def unpatchify(x, grid):
    """(B, t h w, 4 channels), raster order -> (B, channels, t, 2h, 2w) float32."""
    x = x.unflatten(1, grid).unflatten(-1, (2, 2, -1))               # (B, t, h, w, 2, 2, channels)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4).float()       # (B, channels, t, 2h, 2w)

# ---------------------------------------------------------------------------------------------------------
# the video autoencoder: names are those of the -Diffusers repositories' vae/
#
# Every time convolution looks back only, so a video can be coded piece by piece: `cache`, a dict that starts empty with
# each video, keeps for every such layer the last frames it saw. A video's first frame is coded alone (there is no
# padding to four), every four after it share a latent frame. One call with the whole video gives the same.


class CausalConv(nn.Conv3d):
    """A 3x3x3 (or 3x1x1) convolution of x (B, C, t, h, w) whose frame sees itself and the two before it."""

    def __init__(self, inputs, outputs, size=3):
        super().__init__(inputs, outputs, (3, size, size), padding=(0, size // 2, size // 2))

    def forward(self, x, cache):
        past = cache.get(self)
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if past is None else torch.cat([past, x], dim=2)        # (B, C, 2 + t, h, w)
        cache[self] = x[:, :, -2:].clone()                           # a view would keep the whole piece
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Root mean square norm over channels, dimension 1."""

    def __init__(self, channels, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x):
        return F.normalize(x, dim=1) * x.shape[1]**0.5 * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv3d(inputs, outputs, 1)

    def forward(self, x, cache):
        h = self.conv1(F.silu(self.norm1(x)), cache)
        h = self.conv2(F.silu(self.norm2(h)), cache)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


def per_frame(f, x):
    """Apply f to every frame of x (B, C, t, h, w)."""
    return f(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, x.shape[2])).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Attention among the pixels of a frame, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + per_frame(self.frame, x)

    def frame(self, x):
        """x (B, C, h, w)."""
        # contiguous: from strided q, k, v the attention would hold all hw^2 scores at once
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).mT.contiguous()[:, None].chunk(3, dim=-1) # (B, 1, hw, C) each
        o = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)                        # (B, C, hw)
        return self.proj(o.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the height and width of x (B, C, t, h, w) and, if `time`, the frames after the video's first one."""

    def __init__(self, channels, time):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, cache):
        x = per_frame(self.resample, x)                              # (B, C, t, h / 2, w / 2)
        if not hasattr(self, "time_conv"):
            return x
        past = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))       # (B, C, t / 2, h / 2, w / 2)
        first = x[:, :, :1]
        return first if x.shape[2] == 1 else torch.cat([first, self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double the height and width of x (B, C, t, h, w) and, if `time`, the frames after the video's first one.
    -> (B, C / 2, ...)"""

    def __init__(self, channels, time):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(channels, channels // 2, 3, padding=1))
        if time:
            self.time_conv = CausalConv(channels, 2 * channels, size=1)

    def forward(self, x, cache):
        if hasattr(self, "time_conv"):
            first = 0 if self in cache else 1                        # the first frame stays alone, and no other sees it
            cache[self] = True
            rest = x[:, :, first:]
            if rest.shape[2]:
                rest = self.time_conv(rest, cache).unflatten(1, (2, -1))                         # (B, 2, C, t, h, w)
                rest = rest.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)                              # (B, C, 2 t, h, w)
            x = torch.cat([x[:, :, :first], rest], dim=2)
        return per_frame(self.resample, x)                           # (B, C / 2, t or 2 t, 2 h, 2 w)


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x, cache):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache)), cache)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = CausalConv(3, widths[0])
        self.down_blocks = nn.ModuleList()                           # one flat list
        for i, (inputs, outputs) in enumerate(zip(widths[:1] + widths, widths)):
            self.down_blocks.extend(ResidualBlock(outputs if j else inputs, outputs) for j in range(config.blocks))
            if i + 1 < len(widths):
                self.down_blocks.append(Downsample(outputs, time=i > 0))         # 2x, then 2x in time as well, twice
        self.mid_block = Middle(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.z)

    def forward(self, x, cache):
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = CausalConv(config.z, widths[0])
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        inputs = widths[0]
        for i, outputs in enumerate(widths):
            block = nn.ModuleDict({"resnets": nn.ModuleList(
                ResidualBlock(outputs if j else inputs, outputs) for j in range(config.blocks + 1))})
            if i + 1 < len(widths):
                block["upsamplers"] = nn.ModuleList([Upsample(outputs, time=i < len(widths) - 2)])
            self.up_blocks.append(block)
            inputs = outputs // 2                                    # Upsample halves the channels
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z, cache):
        x = self.mid_block(self.conv_in(z, cache), cache)
        for block in self.up_blocks:
            for layers in block.values():
                for layer in layers:
                    x = layer(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class VAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z, 2 * config.z, 1)
        self.post_quant_conv = nn.Conv3d(config.z, config.z, 1)
        self.decoder = Decoder(config)

    def encode(self, video):
        """video (B, 3, 4 n + 1, 8 h, 8 w) in -1..1 -> latents (B, z, n + 1, h, w): the mean of their distribution,
        scaled."""
        mean, _ = self.quant_conv(self.encoder(video, {})).chunk(2, dim=1)       # mean and log variance
        return (mean - self.per_channel(self.config.mean, mean)) / self.per_channel(self.config.std, mean)

    def decode(self, latents):
        """latents (B, z, n + 1, h, w) -> video (B, 3, 4 n + 1, 8 h, 8 w), roughly in -1..1, all frames at once."""
        return next(self.decode_pieces(latents, latents.shape[2]))

    def decode_pieces(self, latents, size=1):
        """The same video in pieces of `size` latent frames: (B, 3, 1 + 4 (size - 1), ...), then (B, 3, 4 size, ...)
        each. Memory does not grow with the video's length."""
        cache = {}
        z = latents * self.per_channel(self.config.std, latents) + self.per_channel(self.config.mean, latents)
        for piece in self.post_quant_conv(z).split(size, dim=2):
            yield self.decoder(piece, cache)

    def per_channel(self, values, x):
        return x.new_tensor(values).view(1, -1, 1, 1, 1)

# ---------------------------------------------------------------------------------------------------------
# the sampler: UniPC (arXiv 2302.04867), predicting the video, B(h) = e^h - 1, order 2


def make_schedule(steps, shift):
    """Noise levels from almost 1 to 0, shifted towards noise, and the timesteps that the model is told: 1000 times the
    level, cut to whole numbers. Both are as in the original, which goes evenly from 0.999 to 0 before the shift;
    diffusers goes from 1 to 0.001, and so is up to 4 timesteps off at a shift of 5.
    -> sigmas (steps + 1,) float32, timesteps (steps,) int64"""
    first = torch.tensor(0.999).item()                               # the original's is a float32
    sigmas = torch.linspace(first, 0, steps + 1, dtype=torch.float64)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return sigmas.float(), (1000 * sigmas[:-1]).long()


def unipc(x, i, sigmas, past, target=None):
    """Move x from sigmas[i] to sigmas[i + 1].

    past: the last predictions of the video (x - sigma v), the newest at sigmas[i]: one for order 1, two for order 2.
    target: the prediction at sigmas[i + 1] if it is known already (the corrector), or None (the predictor)."""
    sigmas = sigmas.double()
    log_snr = ((1 - sigmas) / sigmas).log().tolist()                 # infinite at the end
    h = log_snr[i + 1] - log_snr[i]
    b = math.expm1(-h)
    video, slope = past[-1], 0
    if len(past) == 2:
        r = (log_snr[i - 1] - log_snr[i]) / h
        slope = (past[0] - video) / r
    if target is None:
        change = 0.5 * slope
    elif len(past) == 1:
        change = 0.5 * (target - video)
    else:
        b1 = -1 / h - 1 / b                                          # rho1 + rho2 = b1, r rho1 + rho2 = b2
        b2 = -2 * b1 / h - 1 / b
        rho1 = (b1 - b2) / (1 - r)
        change = rho1 * slope + (b1 - rho1) * (target - video)
    ratio, alpha = (sigmas[i + 1] / sigmas[i]).item(), 1 - sigmas[i + 1].item()
    return ratio * x - alpha * b * (video + change)


def make_noise(z, frames, height, width, seed):
    """(1, z, frames, height, width) latents, always drawn on the CPU: a seed is the same noise on any device."""
    return torch.randn(1, z, frames, height, width, generator=torch.Generator("cpu").manual_seed(seed))


def sample(model, x, texts, guidance, schedule, layout, plan=None, states=None, ranks=None):
    """UniPC from noise x (B, z, t, h, w) to latents. texts: of the prompt and of the negative prompt,
    (B, L, text_dim) each, and states: a ModelState for each. plan: an iterable of Step; dense without plan and states.
    ranks: from parallel.start; if it has a branch, texts and states are that one's alone. Raises Fail at NaN or
    infinity, a step later. -> (B, z, t, h, w)"""
    sigmas, timesteps = schedule
    states = states or (None, None)
    past, before, checked = [], None, None                           # past: the last two predictions of the video
    for i, step in enumerate(plan or [None] * len(timesteps)):
        t = x.new_full((x.shape[0],), timesteps[i].item())           # (B,)
        own = [model(x, t, text, layout, state, step) for text, state in zip(texts, states)]
        v, v_negative = parallel.both_branches(ranks, own)           # (B, z, t, h, w) each
        video = x - sigmas[i].item() * (v_negative + guidance * (v - v_negative))
        if i > 0:
            x = unipc(before, i - 1, sigmas, past, target=video)     # the corrector: this step's start, better known
        past, before = [*past[-1:], video], x
        last = i + 1 == len(timesteps)                               # the last step is of order 1
        x = unipc(x, i, sigmas, past[-1:] if last else past)
        checked = cli.check_finite(x, f"step {i} of the transformer", texts[0].dtype, checked)
    checked()                                                        # waits for the device
    return x

# ---------------------------------------------------------------------------------------------------------
# generate: prompt in, video out


def generate(prompt, *, model="tiny", weights=None, negative_prompt=None, width=None, height=None, frames=None,
             steps=None, guidance=None, seed=0, preset="balanced", sparsity=None, dense=False, device=None, dtype=None,
             offload=None, compile=False):
    """Make a video of a prompt -> list of PIL images, its frames.

    model: a name in CONFIGS. weights: a folder or Hugging Face repository. width, height: pixels. frames: 4 n + 1.
    preset: "columns", "quality", "balanced" or "fast". sparsity: instead, a plan.Sparsity for this many steps. dense:
    recompute everything. device: "cpu", "cuda", ... dtype: "float32" or "bfloat16". offload: "none", "caches" or "all"
    (weights, too) live on the host; None: what must. compile: every block by torch.compile. None: the model's own
    value. Raises cli.Fail for what cannot be done."""
    settings = cli.Settings(model=model, weights=weights, negative_prompt=negative_prompt, width=width, height=height,
                            frames=frames, steps=steps, guidance=guidance, seed=seed, preset=preset,
                            sparsity=sparsity, dense=dense, device=device, dtype=dtype, offload=offload,
                            compile=compile)
    (video, _), = render(prompt, cli.fill(settings, CONFIGS))
    return [media.to_image(frame) for frame in video]


class Report(NamedTuple):
    seconds: float             # of all steps, without encoding, decoding and compiling
    attn: float                # share of self-attention columns that were recomputed
    saved: float               # share of floating-point operations saved


@torch.no_grad()
def render(prompt, settings, compare=False, ranks=None):
    """The whole way from a prompt to a video and its Report, with filled settings. A video is an iterator of frames
    (3, height, width) in -1..1, which are decoded as they are asked for.
    -> [(video, Report)]; with compare two of them from the same noise, first the dense one. ranks: from
    parallel.start; [] for all but the first process."""
    config = CONFIGS[settings.model]
    device, dtype, folder = settings.device, settings.dtype, settings.weights or config.weights
    t, h, w = grid = settings.frames // 4 + 1, settings.height // 16, settings.width // 16       # in tokens
    with processes.one_a_machine_first(ranks):                       # it may download
        placement = check(prompt, settings, folder, ranks)

    prompts = [prompt, settings.negative_prompt]
    texts = encode_prompts(prompts, config, folder, device, dtype)                               # (2, L, text_dim)
    cli.check_finite(texts, "UMT5", dtype)()
    texts = parallel.own_branches(ranks, texts.split(1))                                         # (1, L, text_dim) each
    layout = make_layout(config.wan, grid, config.window, device, ranks)
    noise = make_noise(config.wan.channels, t, 2 * h, 2 * w, settings.seed).to(device)           # (1, z, t, 2h, 2w)
    schedule = make_schedule(settings.steps, config.shift)
    wan = load_part("wan", config, folder, lambda wan: homes(wan, wan.blocks, placement.blocks, device), dtype)
    move_weights(wan, wan.blocks, placement.blocks, device)
    if settings.compile:
        compile_blocks(wan)

    def make_states(sparsity):
        states = [make_state(config.wan.layers, sparsity, len(layout.order), layout.static, settings.seed, device)
                  for _ in texts]
        return [move_caches(state, placement.layers, device) for state in states]

    results = []
    for sparsity in [None, settings.sparsity] if compare else [settings.sparsity]:
        plan = make_plan(settings.steps, sparsity)
        if compare and device.type == "cuda":                        # compile every kernel first: both times are fair
            first_steps = until_sparse(plan)
            sample(wan, noise, texts, settings.guidance, schedule, layout, first_steps, make_states(sparsity), ranks)
        start, states = clock(), make_states(sparsity)
        steps = tqdm(plan, "denoising" if sparsity else "dense", leave=False, disable=None)
        x = sample(wan, noise, texts, settings.guidance, schedule, layout, steps, states, ranks) # (1, z, t, 2h, 2w)
        seconds = clock() - start
        parallel.add_up_work(ranks, states)
        attn, saved = work_done(config.wan, math.prod(grid), config.text_length, plan, states)
        results.append((x, Report(seconds, attn, saved)))
    del wan, states
    if not parallel.leave(ranks):
        return []

    vae = load_part("vae", config, folder, device, torch.float32)
    return [(decode(vae, x), report) for x, report in results]


@torch.no_grad()
def decode(vae, latents):
    """latents (1, z, t, h, w) -> one frame (3, 8 h, 8 w) after the other, on the CPU."""
    for piece in vae.decode_pieces(latents):                         # (1, 3, 1 or 4, 8h, 8w)
        yield from piece[0].transpose(0, 1).clamp(-1, 1).cpu()


def check(prompt, settings, folder, ranks):
    """Find everything that can be wrong before a network is loaded, and where it goes. -> memory.Placement
    Raises Fail."""
    config, dtype = CONFIGS[settings.model], settings.dtype
    cli.check_prompt(prompt, settings.negative_prompt)
    checkpoints.check_memory(parts(config)["umt5"], dtype, settings.device)
    need, placement = memory.place(find_need, settings, ranks)
    memory.check_decoder(find_decoder_need(settings), settings.device)
    for part, make in parts(config).items():
        checkpoints.check_weights(make, checkpoints.sharded_files(folder, FILES[part]))
    memory.say(need, placement, settings.device)
    return placement


def clean(prompt):
    """Broken Unicode repaired, then HTML entities (twice), then white space: in the original's order."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def encode_prompts(prompts, config, folder, device, dtype):
    """prompts -> UMT5 states (B, L, text_dim), zero at the padding. Loads the encoder and frees it."""
    file, = checkpoints.weight_files(folder, ["tokenizer/tokenizer.json"])
    tokenizer = checkpoints.load_tokenizer(load_t5_tokenizer, file, config.umt5.vocab)
    prompts = [clean(prompt) for prompt in prompts]
    ids, mask, cut = tokenize(tokenizer, prompts, config.text_length, 0)                         # (B, L)
    if max(cut):
        cli.note(f"the prompt is too long for UMT5: its last {max(cut)} tokens were cut")
    if isinstance(config.weights, Path):                             # embedded
        cli.note_unknown_words(tokenizer, prompts)
    mask = mask.to(device)
    umt5 = load_part("umt5", config, folder, device, dtype)
    return umt5(ids.to(device), mask) * mask[..., None]                                          # (B, L, text_dim)


def parts(config):
    """{name: how to build it} of the three networks."""
    return {"umt5": lambda: T5Encoder(config.umt5), "wan": lambda: Wan(config.wan), "vae": lambda: VAE(config.vae)}


def load_part(part, config, folder, device, dtype):
    """One of the three networks, with its weights."""
    float32 = Wan.FLOAT32 if part == "wan" else ()
    files = checkpoints.sharded_files(folder, FILES[part])
    return checkpoints.load_weights(parts(config)[part], files, device, dtype, float32)


def find_decoder_need(settings):
    """What decoding needs, in bytes."""
    config, frames = CONFIGS[settings.model], min(settings.frames // 4 + 1, 3)       # of latents: then pieces are alike
    latents = torch.empty(1, config.wan.channels, frames, settings.height // 8, settings.width // 8, device="meta")
    return memory.decoder_bytes(parts(config)["vae"], latents, lambda vae, z: list(vae.decode_pieces(z)))


def find_need(settings, ranks=None):
    """What denoising needs. -> memory.Need"""
    whole, sparsity, dtype = CONFIGS[settings.model], settings.sparsity, settings.dtype
    config, (t, h, w) = whole.wan, (settings.frames // 4 + 1, settings.height // 16, settings.width // 16)
    n = t * h * w
    with torch.device("meta"):
        model, small = (Wan(c).to(dtype) for c in (config, replace(config, layers=1)))
        for p in [p for m in (model, small) for name, p in m.named_parameters() if any(f in name for f in Wan.FLOAT32)]:
            p.data = p.data.float()
        order, rope = torch.empty(n, dtype=torch.long), torch.empty(n, config.dim // config.heads // 2)
        layout = Layout(order, order, (rope, rope), None, None)
        x, time = torch.empty(1, config.channels, t, 2 * h, 2 * w), torch.empty(1)
        text = torch.empty(1, whole.text_length, config.text_dim, dtype=dtype)
    state = memory.rehearsal_state(1, sparsity, n, min(n, whole.window**3 * GROUP))
    branches = 2 // (ranks.branches if ranks else 1)
    share = parallel.cache_share(ranks) * 2 / branches               # of one branch's caches
    return memory.find_need(model, model.blocks, [0] * config.layers, sparsity, state, share,
                            lambda step: small(x, time, text, layout, state, step), branches)


def work_done(config, tokens, text_length, plan, states):
    """Shares of self-attention columns that a generation recomputed, and of floating-point operations it saved."""
    if states[0] is None:                                            # all was dense
        return 1.0, 0.0
    layers = [layer_state for state in states for layer_state in state.layers]
    run = sum(not step.skip for step in plan)                        # a dense layer works in each of these
    attn = sum(run if layer_state is None else float(layer_state.attn_work) for layer_state in layers)
    all_attn = len(plan) * len(layers)

    attn_flops = 4 * tokens**2 * config.dim                          # of one self attention
    linears = (12 * config.dim + 4 * config.ff) * tokens * config.dim
    cross_attention = 4 * text_length * tokens * config.dim + 4 * text_length * config.dim**2
    others = linears + cross_attention                               # of a block
    ours = attn_flops * attn + others * run * len(layers)
    return attn / all_attn, 1 - ours / ((attn_flops + others) * all_attn)

# ---------------------------------------------------------------------------------------------------------
# the command line


def main():
    parser, _ = cli.make_parser(__doc__, CONFIGS, video=True)
    parser.add_argument("--negative-prompt", help="what to keep away from (default: the model's)")
    args, settings = cli.parse(parser, CONFIGS, lambda settings: memory.show(find_need, find_decoder_need, settings))
    suffixes = (".mp4", ".png") if settings.frames > 1 else (".png",)
    out = args.out or Path("wan" + suffixes[0])
    ranks = parallel.start(settings.device, CONFIGS[settings.model].wan.heads, branches=2)
    if ranks is None or ranks.first:                                 # who writes
        media.check_out(out, suffixes)

    start = time.perf_counter()
    results = render(args.prompt, settings, args.compare, ranks)
    if not results:                                                  # the first process has them
        return
    videos, reports = zip(*results)
    video = videos[0]
    if args.compare:
        dense, ours = (torch.stack(list(frames)) for frames in videos)           # (frames, 3, height, width) each
        video = torch.cat([dense, ours], dim=3)
    out = media.write_video(out, video, settings.fps, cli.describe(args, settings), new=args.out is None)
    cli.say(f"{out}: {settings.width}x{settings.height}, {cli.count(settings.frames, 'frame')}, "
            f"{cli.count(settings.steps, 'step')}, seed {settings.seed}, {time.perf_counter() - start:.1f} s")
    if settings.compile:
        cli.note(f"compiling took {compile_seconds():.1f} s")
    if settings.sparsity:
        cli.say(cli.work_line(settings, reports[-1].attn, reports[-1].saved))
    if args.compare:
        cli.say(media.comparison(dense, ours, reports[0].seconds, reports[1].seconds))


if __name__ == "__main__":
    processes.run(main)
