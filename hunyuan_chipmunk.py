"""HunyuanVideo with Chipmunk: a text-to-video diffusion transformer from scratch, accelerated without training.

    python hunyuan_chipmunk.py --prompt "a red circle moves left to right on a green background"
    python hunyuan_chipmunk.py --model 720p --prompt "a chipmunk stuffs a nut into its cheek, close-up"

What happens (`render`, near the end of this file, is this sequence):

    prompt --Llama-> text tokens (B, T, 4096)       behind a template that asks for a description
           --CLIP--> one vector (B, 768)            modulates every block, with the time and the guidance
    noise  (B, 16, t, 2h, 2w)                       t = 1 + (frames - 1) / 4; 2h, 2w = pixels / 8
    `steps` times:  v = Hunyuan(x, sigma, text);  x += (sigma_next - sigma) v      flow matching, Euler
    x --causal 3D decoder-> frames                  in tiles of space and time, which fade into each other

Chipmunk changes one call of a block: `attention(q, k, v)` becomes `chipmunk_attention(q, k, v, layer_state, step)` for
the rows of the video, which are nearly all. It recomputes only the columns (keys) that are attended to most and adds
them to what the last steps left in `layer_state` (cache.py). A group of 128 rows shares its columns, so the tokens run
through the blocks voxel by voxel, 4 x 4 x 8 = 128 of them each (voxel.py). `--preset columns` does this, the
other presets skip whole steps instead. Without a state this is plain HunyuanVideo.

HunyuanVideo: Tencent, github.com/Tencent/HunyuanVideo, arXiv 2412.03603. Chipmunk: arXiv 2506.03275.
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import math
import time
from dataclasses import dataclass, replace
from itertools import chain, islice
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
from cache import chipmunk_attention, make_state
from compiled import clock, compile_blocks, compile_seconds
from offload import homes, in_chunks, move_caches, move_weights, visit
from parallel import Ranks, gather_heads, gather_rows, own_rope, own_rows, scatter_heads, spread
from plan import Sparsity, make_plan, make_presets, until_sparse
from sparse_kernels import apply_rope
from text_encoders import (CLIP_L, LLAMA_8B, CLIPConfig, CLIPTextEncoder, LlamaConfig, LlamaEncoder,
                           load_clip_tokenizer, load_t5_tokenizer, tokenize)
from voxel import token_order

# ---------------------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class HunyuanConfig:
    z: int                     # channels of a latent
    text_dim: int              # of a Llama token
    pooled_dim: int            # of the CLIP vector
    dim: int
    heads: int
    ff: int                    # hidden width of every MLP
    dual_blocks: int
    single_blocks: int
    refiner_blocks: int
    axes: tuple[int, int, int] # head dimension split over RoPE's (t, y, x)


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    strides: tuple = ((1, 2, 2), (2, 2, 2), (2, 2, 2))   # (t, y, x) between levels: 4 in time, 8 in space
    blocks: int = 2            # residual blocks a level (the decoder has one more)
    z: int = 16
    groups: int = 32           # of every GroupNorm
    scale: float = 0.476986    # latents = scale * encoder's mean
    tile: int = 32             # height and width of a tile in latents; a quarter of it overlaps the next tile
    tile_frames: int = 16      # its length after the first frame, likewise


@dataclass(frozen=True)
class Config:
    weights: str | Path        # folder, or Hugging Face repository
    hunyuan: HunyuanConfig
    vae: VAEConfig
    llama: LlamaConfig
    clip: CLIPConfig
    template: str              # what Llama reads; {} is the prompt
    crop: int                  # its tokens before the prompt, which the transformer does not see
    image_template: str        # the same two for a single frame
    image_crop: int
    text_length: int           # the most tokens behind those
    width: int                 # from here on: what the command line may change
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    shift: float               # of the schedule towards noise
    presets: dict              # {name: Sparsity}, for `steps` steps
    costs: dict                # {a step's mode: its time as a share of the dense model's}, from step_times.json


FILES = {"llama": "text_encoder/model.safetensors", "clip": "text_encoder_2/model.safetensors",
         "hunyuan": "transformer/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors"}
VOXEL = (4, 4, 8)              # 128 tokens, one group; the original's voxel is 4x6x8

# As many columns as in the original's preset. Full steps are evenly spread: the drift is taken over as many steps as it
# is used for. The other presets skip whole steps, which is closer to dense at their speed (results.md).
HUNYUAN_COLUMNS = Sparsity(attn_keep=0.05, mlp_keep=0.0, delta="pooled", full=6, choose=3)
HUNYUAN_PRESETS = make_presets(HUNYUAN_COLUMNS)
HUNYUAN_COSTS = {"dense": 1.01, "measure": 1.38, "refresh": 1.08, "sparse": 0.47, "skip": 0.0004}

CONFIGS = {
    "tiny": Config(
        weights=Path(__file__).parent / "weights/hunyuan-tiny",
        hunyuan=HunyuanConfig(z=16, text_dim=96, pooled_dim=64, dim=192, heads=6, ff=768, dual_blocks=1,
                              single_blocks=7, refiner_blocks=1, axes=(8, 12, 12)),
        vae=VAEConfig(channels=16, multipliers=(1, 2, 3, 2), blocks=1, z=16,
                      groups=2, scale=1.0),                          # 8 groups hardly let a background's colour pass
        llama=LlamaConfig(vocab=256, dim=96, heads=3, kv_heads=1, ff=192, layers=4),
        clip=CLIPConfig(vocab=768, dim=64, heads=2, ff=256, layers=1),
        template="<|start_header_id|>{}<|eot_id|>", crop=2,          # <|begin_of_text|> and <|start_header_id|>
        image_template="<|start_header_id|>{}<|eot_id|>", image_crop=2,
        text_length=62, width=256, height=256, frames=17, fps=8, steps=50, guidance=4.0, shift=7.0,
        presets=HUNYUAN_PRESETS, costs=HUNYUAN_COSTS),
    "720p": Config(
        weights="hunyuanvideo-community/HunyuanVideo",
        hunyuan=HunyuanConfig(z=16, text_dim=4096, pooled_dim=768, dim=3072, heads=24, ff=12288, dual_blocks=20,
                              single_blocks=40, refiner_blocks=2, axes=(16, 56, 56)),
        vae=VAEConfig(), llama=LLAMA_8B, clip=CLIP_L,
        template="<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
                 "1. The main content and theme of the video."
                 "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
                 "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
                 "4. background environment, light, style and atmosphere."
                 "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
                 "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        crop=95,
        image_template="<|start_header_id|>system<|end_header_id|>\n\nDescribe the image by detailing the color, "
                       "shape, size, texture, quantity, text, spatial relationships of the objects and background:"
                       "<|eot_id|>"
                       "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        image_crop=36,
        text_length=256, width=1280, height=720, frames=129, fps=24, steps=50, guidance=6.0, shift=7.0,
        presets=HUNYUAN_PRESETS, costs=HUNYUAN_COSTS),
}

# ---------------------------------------------------------------------------------------------------------
# the transformer


class Layout(NamedTuple):
    """Where the tokens of one video stand: made once per generation by `make_layout`."""
    grid: tuple                # (t, h, w) video tokens
    order: torch.Tensor        # (N,) video tokens, voxel after voxel instead of raster
    inverse: torch.Tensor      # (N,) back to raster
    rope: tuple                # cos, sin (N + T, D / 2) float32, video in `order` first, text last; this process's rows
    static: torch.Tensor       # (N + T,) bool: columns that are always recomputed (the text)
    ranks: Ranks | None        # several GPUs: who has which rows of video and text


def make_layout(config, grid, text_length, device="cpu", ranks=None):
    """Token order, RoPE tables and static columns of a `grid` (t, h, w) of video tokens and the text behind it; ranks:
    from parallel.start."""
    order = token_order(grid, VOXEL).to(device)                      # (N,)
    ids = torch.stack(torch.unravel_index(order, grid), dim=-1)      # (N, 3): frame, row, column
    ids = F.pad(ids, (0, 0, 0, text_length))                         # (N + T, 3): text at 0, 0, 0, so not rotated
    angles = []
    for axis, dim in enumerate(config.axes):
        omega = 256.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)      # (dim / 2,)
        angles.append(ids[:, axis, None] * omega)                    # (N + T, dim / 2)
    angles = torch.cat(angles, dim=-1)                               # (N + T, D / 2)
    static = torch.arange(len(ids), device=device) >= len(order)
    ranks = spread(ranks, len(ids))
    rope = own_rope(ranks, (angles.cos().float(), angles.sin().float()))
    return Layout(grid, order, order.argsort(), rope, static, ranks)


def sinusoid(t, dim=256):
    """Time or guidance t (B,) -> (B, dim) float32. The factor 1000 is applied in t's own precision, as the original
    does: in bf16 a guidance of 6 becomes 6016, and the trained model expects that. (diffusers leaves the factor to its
    caller.)"""
    omega = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2))  # (dim / 2,)
    angles = (1000.0 * t)[:, None].float() * omega                   # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    def __init__(self, inputs, dim):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class Modulation(nn.Module):
    """vec (B, C) -> n tensors (B, 1, C): shift, scale, gate, ..."""

    def __init__(self, dim, n):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(dim, n * dim)

    def forward(self, vec):
        return self.linear(F.silu(vec))[:, None].chunk(self.n, dim=-1)


def modulate(x, shift, scale):
    """Layer norm without weights of its own, then this step's shift and scale (B, 1, C), in float32 as under the
    original's autocast. x (B, N, C)."""
    if len(x) == 1:                                                  # these can be its weights: half the time
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(dim, hidden)}), "2": nn.Linear(hidden, dim)})

    def forward(self, x, activation=lambda h: F.gelu(h, approximate="tanh")):
        return self.net["2"](activation(self.net["0"]["proj"](x)))


def make_attention(config, linears, norms=()):
    """The named projections C -> C and RMS norms over a head; to_out is a list of one, as published."""
    modules = {name: nn.Linear(config.dim, config.dim) for name in linears}
    modules |= {name: RMSNorm(config.dim // config.heads) for name in norms}
    if "to_out" in modules:
        modules["to_out"] = nn.ModuleList([modules["to_out"]])
    return nn.ModuleDict(modules)


def split_heads(x, heads):
    """(B, N, C) -> (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joint_attention(qkv, mask, layer_state, step, n_video, ranks):
    """qkv: list of q, k, v (B, H, N + T, D), of which the first n_video = N rows are the video's; it is emptied, as
    these are large -> (B, N + T, C); with ranks, this process's rows of them. mask (B, 1, 1, N + T) bool or None.
    Chipmunk serves the video's rows; the few text rows are dense and see all."""
    q, k, v = scatter_heads(ranks, *qkv)
    qkv.clear()
    if layer_state is None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        video_o = chipmunk_attention(q[:, :, :n_video], k, v, layer_state, step)             # (B, H, N, D)
        text_o = F.scaled_dot_product_attention(q[:, :, n_video:], k, v)                     # (B, H, T, D)
        o = torch.cat([video_o, text_o], dim=2)                                              # (B, H, N + T, D)
    return gather_heads(ranks, o).transpose(1, 2).flatten(2)


class RefinerBlock(nn.Module):
    """Text tokens among themselves, before they meet the video."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = make_attention(config, ("to_q", "to_k", "to_v", "to_out"))
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.ff = MLP(config.dim, config.ff)
        self.norm_out = Modulation(config.dim, 2)

    def forward(self, x, vec, mask):
        """x (B, T, C), vec (B, C), mask (B, 1, 1, T) bool or None -> x."""
        gate1, gate2 = self.norm_out(vec)
        h = self.norm1(x)
        attn = self.attn
        q, k, v = (split_heads(f(h), self.heads) for f in (attn.to_q, attn.to_k, attn.to_v))     # (B, H, T, D) each
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x.addcmul(gate1, self.attn.to_out[0](o.transpose(1, 2).flatten(2)))  # (B, T, C)
        return x.addcmul(gate2, self.ff(self.norm2(x), F.silu))


class TokenRefiner(nn.Module):
    """Llama's states -> the transformer's text tokens, given the time and the mean state."""

    def __init__(self, config):
        super().__init__()
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": Embedder(256, config.dim),
                                              "text_embedder": Embedder(config.text_dim, config.dim)})
        self.proj_in = nn.Linear(config.text_dim, config.dim)
        blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_blocks))
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, text, t, mask):
        """text (B, T, text_dim), t (B,), mask (B, T) bool or None -> (B, T, C)."""
        weight = text.new_ones(text.shape[:2]) if mask is None else mask                         # (B, T)
        mean = (text.float() * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)           # (B, text_dim)
        embed = self.time_text_embed
        vec = embed.timestep_embedder(sinusoid(t)) + embed.text_embedder(mean)                   # (B, C)
        x = self.proj_in(text)
        for block in self.token_refiner.refiner_blocks:
            x = block(x, vec, mask if mask is None else mask[:, None, None])
        return x


class DualBlock(nn.Module):
    """Video and text have weights of their own and meet in one attention."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm1 = Modulation(config.dim, 6)
        self.norm1_context = Modulation(config.dim, 6)
        linears = "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out", "to_add_out"
        self.attn = make_attention(config, linears, ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        self.ff = MLP(config.dim, config.ff)
        self.ff_context = MLP(config.dim, config.ff)

    def forward(self, video, text, vec, rope, mask, layer_state, step, n_video, ranks=None):
        """video (B, N, C), text (B, T, C), vec (B, C), n_video = N -> video, text; with ranks, this process's rows of
        them and of rope, but n_video counts all."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(vec)
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = self.norm1_context(vec)
        attn, n = self.attn, video.shape[1]

        qkv = self.qkv(modulate(video, shift1, scale1), modulate(text, text_shift1, text_scale1), rope)
        o = joint_attention(qkv, mask, layer_state, step, n_video, ranks)      # (B, N + T, C)
        video = video.addcmul(gate1, attn.to_out[0](o[:, :n]))
        text = text.addcmul(text_gate1, attn.to_add_out(o[:, n:]))
        video = video.addcmul(gate2, in_chunks(lambda x: self.ff(modulate(x, shift2, scale2)), video))
        text = text.addcmul(text_gate2, self.ff_context(modulate(text, text_shift2, text_scale2)))
        return video, text

    def qkv(self, x, c, rope):
        """x (B, N, C) of the video, c (B, T, C) of the text -> [q, k, v] (B, H, N + T, D)"""
        attn = self.attn
        projections = attn.to_q, attn.to_k, attn.to_v
        text_projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        q, k, v = (split_heads(f(x), self.heads) for f in projections)               # (B, H, N, D) each
        text_q, text_k, text_v = (split_heads(f(c), self.heads) for f in text_projections)   # (B, H, T, D) each
        rope = [table[:x.shape[1]] for table in rope]                                # text is not rotated
        return [torch.cat([apply_rope(q, rope, attn.norm_q.weight), attn.norm_added_q(text_q)], dim=2),
                torch.cat([apply_rope(k, rope, attn.norm_k.weight), attn.norm_added_k(text_k)], dim=2),
                torch.cat([v, text_v], dim=2)]


class SingleBlock(nn.Module):
    """Video and text in one sequence; attention and MLP side by side, proj_out sums them up."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm = Modulation(config.dim, 3)
        self.attn = make_attention(config, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        self.proj_mlp = nn.Linear(config.dim, config.ff)
        self.proj_out = nn.Linear(config.dim + config.ff, config.dim)

    def forward(self, x, vec, rope, mask, layer_state, step, n_video, ranks=None):
        """x (B, N + T, C), vec (B, C), n_video = N -> x; with ranks, this process's rows of it and of rope, but
        n_video counts all."""
        shift, scale, gate = self.norm(vec)
        h = modulate(x, shift, scale)
        o = joint_attention(self.qkv(h, rope), mask, layer_state, step, n_video, ranks)  # (B, N + T, C)
        return x.addcmul(gate, in_chunks(self.out, o, h))

    def qkv(self, h, rope):
        """h (B, N + T, C) -> [q, k, v] (B, H, N + T, D)"""
        attn = self.attn
        q, k, v = (split_heads(f(h), self.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        return [apply_rope(q, rope, attn.norm_q.weight), apply_rope(k, rope, attn.norm_k.weight), v]

    def out(self, o, h):
        """What attention gave and what went into it, (B, N + T, C) each -> (B, N + T, C)"""
        mlp = F.gelu(self.proj_mlp(h), approximate="tanh")                       # (B, N + T, ff)
        return self.proj_out(torch.cat([o, mlp], dim=-1))


class Hunyuan(nn.Module):
    """The flow-matching transformer. Parameter names are those of hunyuanvideo-community/HunyuanVideo's transformer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(config.z, config.dim, (1, 2, 2), stride=(1, 2, 2))})
        self.context_embedder = TokenRefiner(config)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": Embedder(256, config.dim),
                                              "text_embedder": Embedder(config.pooled_dim, config.dim),
                                              "guidance_embedder": Embedder(256, config.dim)})
        self.transformer_blocks = nn.ModuleList(DualBlock(config) for _ in range(config.dual_blocks))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, 4 * config.z)

    def forward(self, x, t, text, pooled, guidance, layout, mask=None, state=None, step=None):
        """The velocity at x: noise - video.

        x (B, z, t, 2h, 2w) latents; t (B,) float32, t = 1 is pure noise; text (B, T, text_dim) from Llama; pooled
        (B, pooled_dim) from CLIP; guidance (B,) in the model's dtype; layout from make_layout.
        mask: (B, T) bool, False at padding, for prompts of several lengths; None: every text token is real.
        state: a ModelState to run Chipmunk with; step: what to do now. None: plain dense.
        -> (B, z, t, 2h, 2w). Raises ValueError for a mask with a state: a column list must not hold padding.
        """
        if mask is not None and state is not None:
            raise ValueError("no mask with a state: cut the padding off")
        if step is not None and step.skip:
            return unpatchify(state.recall(step), layout.grid)       # step caching: nothing runs
        embed = self.time_text_embed
        vec = embed.timestep_embedder(sinusoid(t)) + embed.guidance_embedder(sinusoid(guidance))
        vec = vec + embed.text_embedder(pooled)                                  # (B, C)
        hidden = self.blocks(x, t, text, vec, layout, mask, state, step)         # (B, N, C)
        scale, shift = self.norm_out(vec)                            # in this order, as published
        out = self.proj_out(modulate(hidden, shift, scale))                      # (B, N, 4 z)
        out = gather_rows(layout.ranks, out, 0, len(layout.order))[:, layout.inverse]
        if state is not None:
            state.remember(step, out)
        return unpatchify(out, layout.grid)

    @property
    def all_blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def blocks(self, x, t, text, vec, layout, mask, state, step):
        video = self.x_embedder.proj(x).flatten(2).transpose(1, 2)[:, layout.order]      # (B, N, C)
        text = self.context_embedder(text, t, mask)                  # (B, T, C)
        n = video.shape[1]
        if mask is not None:                                         # of columns: nothing attends to padding
            mask = F.pad(mask, (n, 0), value=True)[:, None, None]    # (B, 1, 1, N + T)
        video, text = own_rows(layout.ranks, video, text)
        blocks = visit(self.all_blocks, state, step, x.device)
        for block, layer_state in islice(blocks, len(self.transformer_blocks)):
            video, text = block(video, text, vec, layout.rope, mask, layer_state, step, n, layout.ranks)
        x = torch.cat([video, text], dim=1)                          # (B, N + T, C)
        for block, layer_state in blocks:
            x = block(x, vec, layout.rope, mask, layer_state, step, n, layout.ranks)
        return x[:, :video.shape[1]]


def unpatchify(x, grid):
    """(B, t h w, 4 z), raster order -> (B, z, t, 2h, 2w)."""
    x = x.unflatten(1, grid).unflatten(-1, (-1, 2, 2))               # (B, t, h, w, z, 2, 2)
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)   # (B, z, t, 2h, 2w)

# ---------------------------------------------------------------------------------------------------------
# the VAE: names are those of hunyuanvideo-community/HunyuanVideo's vae. Causal: a frame sees itself and earlier ones
# (but GroupNorm takes its statistics over all). The first frame stands alone, every four after it become one.


class CausalConv(nn.Module):
    def __init__(self, inputs, outputs, size=3, stride=1):
        super().__init__()
        self.size = size
        self.conv = nn.Conv3d(inputs, outputs, size, stride)

    def forward(self, x):
        """x (B, C, t, h, w): repeats x's border on both sides of y and x, and before the first frame."""
        side = self.size // 2
        for dim, before, after in (2, 2 * side, 0), (3, side, side), (4, side, side):
            start, end = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
            x = torch.cat([start] * before + [x] + [end] * after, dim=dim)       # F.pad would be slow to train through
        return self.conv(x)


def group_norm(norm, x):
    """A GroupNorm of x (B, C, t, h, w) in float32 at least, as under the original's autocast, though its weights may be
    float16. -> the same shape, in that precision"""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = CausalConv(inputs, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = CausalConv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = CausalConv(inputs, outputs, size=1)

    def forward(self, x):
        h = self.conv1(F.silu(group_norm(self.norm1, x)).to(x.dtype))
        h = self.conv2(F.silu(group_norm(self.norm2, h)).to(x.dtype))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        """x (B, C, t, h, w). Pixels attend to their own frame and the earlier ones; frame by frame, without a mask."""
        h = group_norm(self.group_norm, x).to(x.dtype).flatten(2).transpose(1, 2)[:, None]   # (B, 1, thw, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        n = x.shape[3] * x.shape[4]
        o = torch.cat([F.scaled_dot_product_attention(q[:, :, i - n:i], k[:, :, :i], v[:, :, :i])
                       for i in range(n, q.shape[2] + 1, n)], dim=2)[:, 0]       # (B, thw, C)
        return x + self.to_out[0](o).transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    """Half or double the height and width of x (B, C, t, h, w) and, if the stride says so, its frames but the first."""

    def __init__(self, channels, stride, up):
        super().__init__()
        self.stride, self.up = stride, up
        self.conv = CausalConv(channels, channels, stride=1 if up else stride)

    def forward(self, x):
        if self.up:                                                  # all are doubled, then the first frame's copy goes
            x = F.interpolate(x, scale_factor=tuple(map(float, self.stride)), mode="nearest")[:, :, self.stride[0] - 1:]
        return self.conv(x)


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def level(inputs, outputs, blocks, groups):
    """One resolution of the pyramid: its residual blocks; a Resample joins them if the size changes."""
    return nn.ModuleDict({"resnets": nn.ModuleList(
        ResnetBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))})


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = CausalConv(3, widths[0])
        self.down_blocks = nn.ModuleList(level(inputs, outputs, config.blocks, config.groups)
                                         for inputs, outputs in zip(widths[:1] + widths, widths))
        for stage, width, stride in zip(self.down_blocks, widths, config.strides):
            stage["downsamplers"] = nn.ModuleList([Resample(width, stride, up=False)])
        self.mid_block = MidBlock(widths[-1], config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv(widths[-1], 2 * config.z)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks:
            for block in chain(*stage.values()):
                x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(group_norm(self.conv_norm_out, x)).to(x.dtype))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = CausalConv(config.z, widths[0])
        self.mid_block = MidBlock(widths[0], config.groups)
        self.up_blocks = nn.ModuleList(level(inputs, outputs, config.blocks + 1, config.groups)
                                       for inputs, outputs in zip(widths[:1] + widths, widths))
        for stage, width, stride in zip(self.up_blocks, widths, config.strides):
            stage["upsamplers"] = nn.ModuleList([Resample(width, stride, up=True)])
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            for block in chain(*stage.values()):
                x = block(x)
        return self.conv_out(F.silu(group_norm(self.conv_norm_out, x)).to(x.dtype))


def fade(before, tile, overlap, dim):
    """Fade from the end of the tile before into the start of this one (which changes in place), over their overlap
    along dim = -3 (time), -2 (y) or -1 (x)."""
    n = min(before.shape[dim], tile.shape[dim], overlap)
    ramp = (torch.arange(n, device=tile.device, dtype=tile.dtype) / n).view(-1, *[1] * (-1 - dim))
    start = tile.narrow(dim, 0, n)
    start.copy_(torch.lerp(before.narrow(dim, before.shape[dim] - n, n), start, ramp))


class VAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z, 2 * config.z, 1)
        self.post_quant_conv = nn.Conv3d(config.z, config.z, 1)

    def encode(self, video):
        """video (B, 3, 1 + 4n, 8h, 8w) in -1..1 -> latents (B, z, 1 + n, h, w): their distribution's mean, scaled."""
        mean, _ = self.quant_conv(self.encoder(video)).chunk(2, dim=1)           # (B, z, 1 + n, h, w) each
        return self.config.scale * mean

    def decode(self, latents):
        """latents (B, z, 1 + n, h, w) -> video (B, 3, 1 + 4n, 8h, 8w), roughly in -1..1, all at once."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale))

    def decode_pieces(self, latents):
        """decode in bounded memory: yields the video's next frames (B, 3, some, 8h, 8w), several times. What fits into
        one tile is decoded at once. Sizes and overlaps are the original's; diffusers' are shorter in time (4 latents,
        not 16)."""
        size, frames, before = self.config.tile_frames, latents.shape[2], None
        stride = size * 3 // 4 if frames > size else frames
        for i in range(0, max(1, frames - 1), stride):
            chunk = self.decode_rows(latents[:, :, i:i + size + 1])  # a first frame, and `size` latents of four
            if i > 0:
                chunk = chunk[:, :, 1:]
                fade(before, chunk, 4 * (size - stride), -3)
            yield chunk[:, :, :4 * stride + (i == 0)]
            before = chunk

    def decode_rows(self, latents):
        """A few frames, in tiles of space."""
        size, (height, width) = self.config.tile, latents.shape[3:]
        if max(height, width) <= size:
            return self.decode(latents)
        stride, rows, above = size * 3 // 4, [], None
        for y in range(0, height, stride):
            row = [self.decode(latents[..., y:y + size, x:x + size]) for x in range(0, width, stride)]
            for i, tile in enumerate(row):
                if above:
                    fade(above[i], tile, 8 * (size - stride), -2)
                if i > 0:
                    fade(row[i - 1], tile, 8 * (size - stride), -1)
            rows.append(torch.cat([tile[..., :8 * stride, :8 * stride] for tile in row], dim=-1))
            above = row
        return torch.cat(rows, dim=-2)                               # (B, 3, t, 8h, 8w)

# ---------------------------------------------------------------------------------------------------------
# the sampler


def make_sigmas(steps, shift):
    """Noise levels from 1 (pure noise) to 0, `steps` + 1 of them, more of them near 1 the larger the shift. (The
    original runs in this direction with its --flow-reverse, which its published commands pass.)"""
    sigmas = torch.linspace(1, 0, steps + 1)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_noise(z, grid, seed):
    """(1, z, t, 2h, 2w) for a grid (t, h, w) of tokens, in fp16 as the original's; but always drawn on the CPU and in
    float32, so that a seed is the same noise on any device (torch 2.11 draws other numbers in fp16)."""
    t, h, w = grid
    return torch.randn(1, z, t, 2 * h, 2 * w, generator=torch.Generator("cpu").manual_seed(seed)).half()


def sample(model, x, text, pooled, guidance, sigmas, layout, plan=None, state=None):
    """Euler steps from noise x (B, z, t, 2h, 2w) float32 to latents, in float32; the model runs in text's dtype. plan:
    an iterable of Step; dense without plan and state. Raises Fail at NaN or infinity, a step later.
    -> (B, z, t, 2h, 2w)"""
    guidance = text.new_full((x.shape[0],), guidance)                # (B,)
    plan, checked = plan or [None] * (len(sigmas) - 1), None
    for i, (step, sigma, sigma_next) in enumerate(zip(plan, sigmas[:-1].tolist(), sigmas[1:].tolist())):
        t = x.new_full((x.shape[0],), sigma)                         # (B,)
        v = model(x.to(text.dtype), t, text, pooled, guidance, layout, state=state, step=step)
        x = x + (sigma_next - sigma) * v.float()
        checked = cli.check_finite(x, f"step {i} of the transformer", text.dtype, checked)
    checked()                                                        # waits for the device
    return x

# ---------------------------------------------------------------------------------------------------------
# generate: prompt in, video out


def generate(prompt, *, model="tiny", weights=None, width=None, height=None, frames=None, steps=None, guidance=None,
             seed=0, preset="balanced", sparsity=None, dense=False, device=None, dtype=None, offload=None,
             compile=False):
    """Make a video of a prompt -> list of PIL images, its frames.

    model: a name in CONFIGS. weights: a folder or Hugging Face repository. width, height: pixels. frames: 4 n + 1.
    preset: "columns", "quality", "balanced" or "fast". sparsity: instead, a plan.Sparsity for this many steps. dense:
    recompute everything. device: "cpu", "cuda", ... dtype: "float32" or "bfloat16". offload: "none", "caches" or "all"
    (weights, too) live on the host; None: what must. compile: every block by torch.compile. None: the model's own
    value. Raises cli.Fail for what cannot be done."""
    settings = cli.Settings(model=model, weights=weights, width=width, height=height, frames=frames, steps=steps,
                            guidance=guidance, seed=seed, preset=preset, sparsity=sparsity, dense=dense,
                            device=device, dtype=dtype, offload=offload, compile=compile)
    (video, _), = render(prompt, cli.fill(settings, CONFIGS))
    return [media.to_image(frame) for frame in video]


class Report(NamedTuple):
    seconds: float             # of all steps, without encoding, decoding and compiling
    attn: float                # share of the video's attention columns that were recomputed
    saved: float               # share of floating-point operations saved


@torch.no_grad()
def render(prompt, settings, compare=False, ranks=None):
    """The whole way from a prompt to a video and its Report, with filled settings. A video is an iterator of frames
    (3, height, width) in -1..1, which are decoded as they are asked for.
    -> [(video, Report)]; with compare two of them from the same noise, first the dense one. ranks: from
    parallel.start; [] for all but the first process."""
    config = CONFIGS[settings.model]
    if settings.frames == 1:
        config = replace(config, template=config.image_template, crop=config.image_crop)
    device, dtype, folder = settings.device, settings.dtype, settings.weights or config.weights
    grid = settings.frames // 4 + 1, settings.height // 16, settings.width // 16                 # (t, h, w) in tokens
    n_video = math.prod(grid)
    with processes.one_a_machine_first(ranks):                       # it may download
        placement = check(prompt, settings, folder, ranks)

    text, _, pooled = encode_prompts([prompt], config, folder, device, dtype)    # (1, T, text_dim), (1, pooled_dim)
    for part, states in ("Llama", text), ("CLIP", pooled):
        cli.check_finite(states, part, dtype)()
    layout = make_layout(config.hunyuan, grid, text.shape[1], device, ranks)
    noise = make_noise(config.hunyuan.z, grid, settings.seed).to(device).float() # (1, z, t, 2h, 2w)
    sigmas = make_sigmas(settings.steps, config.shift)
    layers = config.hunyuan.dual_blocks + config.hunyuan.single_blocks
    hunyuan = load_part("hunyuan", config, folder,
                        lambda hunyuan: homes(hunyuan, hunyuan.all_blocks, placement.blocks, device), dtype)
    move_weights(hunyuan, hunyuan.all_blocks, placement.blocks, device)
    if settings.compile:
        compile_blocks(hunyuan)

    def fresh_state(sparsity):
        state = make_state(layers, sparsity, n_video, layout.static, settings.seed, device)
        return move_caches(state, placement.layers, device)

    results = []
    for sparsity in [None, settings.sparsity] if compare else [settings.sparsity]:
        plan = make_plan(settings.steps, sparsity)
        if compare and device.type == "cuda":                        # compile every kernel first: both times are fair
            state = fresh_state(sparsity)
            sample(hunyuan, noise, text, pooled, settings.guidance, sigmas, layout, until_sparse(plan), state)
        start = clock()
        state = fresh_state(sparsity)
        steps = tqdm(plan, "denoising" if sparsity else "dense", leave=False, disable=None)
        x = sample(hunyuan, noise, text, pooled, settings.guidance, sigmas, layout, steps, state)  # (1, z, t, 2h, 2w)
        seconds = clock() - start
        parallel.add_up_work(ranks, [state])
        attn, saved = work_done(config.hunyuan, n_video, text.shape[1], plan, state)
        results.append((x, Report(seconds, attn, saved)))
    del hunyuan, state
    if not parallel.leave(ranks):
        return []

    vae = load_part("vae", config, folder, device, vae_dtype(settings))
    return [(decode(vae, x), report) for x, report in results]


def vae_dtype(settings):
    """float16 on a GPU, as the original, unless the transformer is float32 too."""
    half = settings.dtype == torch.bfloat16 and settings.device.type == "cuda"
    return torch.float16 if half else torch.float32


@torch.no_grad()
def decode(vae, latents):
    """latents (1, z, t, h, w) -> one frame (3, 8h, 8w) after the other, on the CPU."""
    for piece in vae.decode_pieces(latents.to(next(vae.parameters()).dtype)):    # (1, 3, some, 8h, 8w)
        yield from piece[0].transpose(0, 1).float().clamp(-1, 1).cpu()


def check(prompt, settings, folder, ranks):
    """Find everything that can be wrong before a network is loaded, and where it goes. -> memory.Placement
    Raises Fail."""
    config, dtype = CONFIGS[settings.model], settings.dtype
    cli.check_prompt(prompt)
    for part in "llama", "clip":
        checkpoints.check_memory(parts(config)[part], dtype, settings.device)
    need, placement = memory.place(find_need, settings, ranks)
    memory.check_decoder(find_decoder_need(settings), settings.device)
    for part, make in parts(config).items():
        checkpoints.check_weights(make, checkpoints.sharded_files(folder, FILES[part]))
    memory.say(need, placement, settings.device)
    return placement


def encode_text(llama, ids, mask, crop):
    """ids (B, L), mask (B, L) of prompts in their template -> states (B, T, text_dim), mask (B, T), without the
    template's first `crop` tokens and without what is padding in every prompt. One prompt alone has no padding left."""
    length = mask.sum(1).max()
    return llama(ids[:, :length])[:, crop:], mask[:, crop:length]


def encode_prompts(prompts, config, folder, device, dtype):
    """prompts -> Llama states (B, T, text_dim), their mask (B, T), CLIP vectors (B, pooled_dim). Loads the encoders and
    frees them. They run in fp16 if the transformer runs in bf16, as the original's do."""
    files = ["tokenizer/tokenizer.json", "tokenizer_2/vocab.json", "tokenizer_2/merges.txt"]
    llama_file, vocab, _ = checkpoints.weight_files(folder, files)
    llama_tokenizer = checkpoints.load_tokenizer(load_t5_tokenizer, llama_file, config.llama.vocab)
    clip_tokenizer = checkpoints.load_tokenizer(load_clip_tokenizer, vocab.parent, config.clip.vocab)
    end = clip_tokenizer.token_to_id("<|endoftext|>")
    texts = [config.template.format(prompt.strip()) for prompt in prompts]
    length = config.crop + config.text_length
    llama_ids, mask, llama_cut = tokenize(llama_tokenizer, texts, length, 0)                     # (B, length)
    clip_ids, _, clip_cut = tokenize(clip_tokenizer, prompts, config.clip.length, end)
    for name, cut in ("Llama", llama_cut), ("CLIP", clip_cut):
        if max(cut):
            cli.note(f"the prompt is too long for {name}: its last {max(cut)} tokens were cut")
    if isinstance(config.weights, Path):                             # embedded
        cli.note_unknown_words(llama_tokenizer, prompts)
    half = torch.float16 if dtype == torch.bfloat16 else dtype
    llama = load_part("llama", config, folder, device, half)
    text, mask = encode_text(llama, llama_ids.to(device), mask.to(device), config.crop)  # (B, T, text_dim), (B, T)
    del llama
    clip = load_part("clip", config, folder, device, half)
    pooled = clip(clip_ids.to(device))[1]                                                        # (B, pooled_dim)
    return text.to(dtype), mask, pooled.to(dtype)


def parts(config):
    """{name: how to build it} of the four networks."""
    return {"llama": lambda: LlamaEncoder(config.llama), "clip": lambda: CLIPTextEncoder(config.clip),
            "hunyuan": lambda: Hunyuan(config.hunyuan), "vae": lambda: VAE(config.vae)}


def load_part(part, config, folder, device, dtype):
    """One of the four networks, with its weights."""
    files = checkpoints.sharded_files(folder, FILES[part])
    return checkpoints.load_weights(parts(config)[part], files, device, dtype)


def find_decoder_need(settings):
    """What decoding needs, in bytes."""
    config = CONFIGS[settings.model]
    shape = 1, config.vae.z, settings.frames // 4 + 1, settings.height // 8, settings.width // 8
    latents = torch.empty(shape, dtype=vae_dtype(settings), device="meta")

    def run(vae, z):
        for piece in islice(vae.decode_pieces(z), 2):                # with each but the first, the one before is held
            piece.float().clamp(-1, 1)
    return memory.decoder_bytes(parts(config)["vae"], latents, run)


def find_need(settings, ranks=None):
    """What denoising needs. -> memory.Need"""
    config, sparsity, dtype = CONFIGS[settings.model].hunyuan, settings.sparsity, settings.dtype
    t, h, w = grid = settings.frames // 4 + 1, settings.height // 16, settings.width // 16       # in tokens
    n_video, n_text, half = math.prod(grid), CONFIGS[settings.model].text_length, config.dim // config.heads // 2
    with torch.device("meta"):
        model, small = (Hunyuan(c).to(dtype) for c in (config, replace(config, dual_blocks=1, single_blocks=1)))
        order, rope = torch.empty(n_video, dtype=torch.long), torch.empty(n_video + n_text, half)
        layout = Layout(grid, order, order, (rope, rope), None, None)
        x, text, pooled, guidance = (torch.empty(1, *shape, dtype=dtype) for shape in (
            (config.z, t, 2 * h, 2 * w), (n_text, config.text_dim), (config.pooled_dim,), ()))
        time = torch.empty(1)
    state = memory.rehearsal_state(2, sparsity, n_video, n_text)
    kinds = [0] * config.dual_blocks + [1] * config.single_blocks
    return memory.find_need(model, model.all_blocks, kinds, sparsity, state, parallel.cache_share(ranks),
                            lambda step: small(x, time, text, pooled, guidance, layout, state=state, step=step))


def work_done(config, n_video, n_text, plan, state):
    """Shares of the video's attention columns that a generation recomputed, and of floating-point operations it
    saved."""
    if state is None:                                                # all was dense
        return 1.0, 0.0
    run, tokens, n_layers = sum(not step.skip for step in plan), n_video + n_text, len(state.layers)
    attn = sum(run if layer_state is None else float(layer_state.attn_work) for layer_state in state.layers)
    all_attn = len(plan) * n_layers

    attn_flops = 4 * n_video * tokens * config.dim                   # the video's rows of one attention
    text_flops = 4 * n_text * tokens * config.dim                    # the text's
    linears = (8 * config.dim**2 + 4 * config.dim * config.ff) * tokens
    others = text_flops + linears                                    # of a block
    ours = attn_flops * attn + others * run * n_layers
    return attn / all_attn, 1 - ours / ((attn_flops + others) * all_attn)

# ---------------------------------------------------------------------------------------------------------
# the command line


def main():
    parser, _ = cli.make_parser(__doc__, CONFIGS, video=True)
    args, settings = cli.parse(parser, CONFIGS, lambda settings: memory.show(find_need, find_decoder_need, settings))
    suffixes = (".mp4", ".png") if settings.frames > 1 else (".png",)
    out = args.out or Path("hunyuan" + suffixes[0])
    ranks = parallel.start(settings.device, CONFIGS[settings.model].hunyuan.heads)
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
