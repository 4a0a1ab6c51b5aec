"""Trains the embedded models on drawn scenes (scenes.py), from nothing, in one piece.

    python train_tiny.py flux         makes weights/flux-tiny: tokenizers, autoencoder, text encoders, transformer
    python train_tiny.py wan          weights/wan-tiny
    python train_tiny.py hunyuan      weights/hunyuan-tiny

The recipe of each is a list of stages (RECIPES), which one loop (train_stage) runs:
    1. autoencoder    reconstruct drawn pictures; latents are kept standard normal, so that scale = 1 and shift = 0. A
                      video's learns single frames first: more scenes at a time, which is what it lacks with videos
    2. flow           v = noise - latents from cached latents, text encoders trained along, 10 % empty prompts; at small
                      sizes first, where what goes where is cheap to learn, up to the model's default size
    3. guided         FLUX.1-dev's and HunyuanVideo's guidance distillation: the student with guidance g in its input
                      learns v_empty + g (v_prompt - v_empty) of the frozen model of stage 2, for g from 1 up
                      (Wan2.1 computes that sum at every step of sampling instead)

Interrupt it and run it again: it goes on from its last checkpoint (train/MODEL), as if nothing had happened. What a
step does depends on its number alone. Beside the checkpoints lie sheets of samples (PNG), drawn by averaged weights.
"""
import argparse
import copy
import json
import math
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

import cli
import flux_chipmunk
import hunyuan_chipmunk
import media
import scenes
import wan_chipmunk
from text_encoders import load_clip_tokenizer, load_t5_tokenizer, tokenize

SAMPLES = 8                    # held-out scenes on a sheet
SHEETS = 3                     # sheets a stage
CHECKPOINT_SECONDS = 30        # between two checkpoints
LEAST_LOGVAR = -4.6            # of latents: noise of 0.1 at least, so that the decoder forgives a transformer's errors

# ---------------------------------------------------------------------------------------------------------
# tokenizers, laid out as the big repositories'. Every printable character has a token: any prompt can be read


def make_unigram(folder, captions, special, template):
    """A T5-like tokenizer.json that knows the captions' words and spells others. Its special tokens come first, the
    first is the padding; template puts some around the text."""
    words = Counter(word for caption in captions for word in re.findall("[a-z]+", caption.lower()))
    vocab = [(token, 0.0) for token in special]
    vocab += [(f"▁{word}", math.log(count / words.total())) for word, count in words.most_common()]
    vocab += [(letter, -20.0) for letter in ("▁", *map(chr, range(33, 127)))]    # a word as a whole is likelier
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=special.index("<unk>")))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    around = [(token, special.index(token)) for token in template.split() if token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_t5_tokenizer(folder / "tokenizer.json")


def train_bpe(folder, captions, vocab):
    """A CLIP-like vocab.json and merges.txt (byte-level BPE) from captions."""
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()
    words = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    clip.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    clip.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab - 514, end_of_word_suffix="</w>", special_tokens=[]))
    merges = json.loads(clip.to_str())["model"]["merges"]                        # pairs of tokens
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return load_clip_tokenizer(folder)

# ---------------------------------------------------------------------------------------------------------
# what differs between the models


@dataclass(frozen=True)
class Stage:
    name: str
    size: int                  # pixels of a picture's side
    scenes: int                # distinct ones
    batch: int
    steps: int
    lr: tuple                  # first and last, linear between, after a short warm-up
    frames: int = 0            # of a video; 0: pictures
    crop: int = 0              # side of the squares that an autoencoder learns from, pixels
    text: int = 0              # tokens of text that a transformer reads; more are cut off
    guidance: float = 0.0      # the most that the student learns; 0: no distillation
    ema: float = 0.999         # decay of the averaged weights

    @property
    def grid(self):
        """(h, w) or (t, h, w) in tokens."""
        side = self.size // 16
        return (1 + self.frames // 4, side, side) if self.frames else (side, side)


@dataclass(frozen=True)
class Recipe:
    """What one model does in its own way."""
    program: object            # the model's file
    files: dict                # part -> its safetensors file
    autoencoder: str           # which part that is
    painters: tuple            # the parts that are trained together: the transformer and its text encoders
    zero: str                  # pattern of the transformer's parameters that start at zero: blocks that do nothing yet
    stages: tuple              # of Stage: the autoencoder's, then the painters'
    make_scene: Callable       # (rng, train, plain) -> Scene
    make_reader: Callable      # (folder, captions, config), writes tokenizers -> read(B prompts, length) -> (B, L), ...
    encode: Callable           # (autoencoder, pictures) -> mean and log variance of the latents (B, 2 z, ...)
    make_layout: Callable      # (config, stage, device) -> the model's layout
    velocity: Callable         # (painters, latents, t, what `read` gave, guidance, layout) -> shaped as the latents


def flux_reader(folder, captions, config):
    t5 = make_unigram(folder / "tokenizer_2", captions, ["<pad>", "</s>", "<unk>"], "$A </s>")
    clip = train_bpe(folder / "tokenizer", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")

    def read(prompts, length):
        return tokenize(t5, prompts, length, 0)[0], tokenize(clip, prompts, config.clip.length, end)[0]
    return read


def flux_velocity(painters, x, t, tokens, guidance, layout):
    t5_ids, clip_ids = tokens
    text, pooled = painters.t5(t5_ids), painters.clip(clip_ids)[1]
    v = painters.flux(flux_chipmunk.patchify(x), t, text, pooled, guidance, layout)
    return flux_chipmunk.unpatchify(v, x.shape[2] // 2, x.shape[3] // 2)


def wan_reader(folder, captions, config):
    umt5 = make_unigram(folder / "tokenizer", captions, ["<pad>", "</s>", "<unk>"], "$A </s>")
    return lambda prompts, length: tokenize(umt5, prompts, length, 0)[:2]


def wan_velocity(painters, x, t, tokens, guidance, layout):
    ids, mask = tokens
    return painters.wan(x, 1000 * t, painters.umt5(ids, mask) * mask[..., None], layout)


def hunyuan_reader(folder, captions, config):
    special = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<unk>"]
    llama = make_unigram(folder / "tokenizer", captions, special, "<|begin_of_text|> $A")
    clip = train_bpe(folder / "tokenizer_2", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")

    def read(prompts, length):
        texts = [config.template.format(prompt) for prompt in prompts]
        ids, mask, _ = tokenize(llama, texts, config.crop + length, 0)
        return ids, mask[:, config.crop:], tokenize(clip, prompts, config.clip.length, end)[0]
    return read


def hunyuan_velocity(painters, x, t, tokens, guidance, layout):
    llama_ids, mask, clip_ids = tokens
    text, pooled = painters.llama(llama_ids)[:, -mask.shape[1]:], painters.clip(clip_ids)[1]
    return painters.hunyuan(x, t, text, pooled, guidance, layout, mask)


RECIPES = {
    "flux": Recipe(
        program=flux_chipmunk, files={part: file for part, (file,) in flux_chipmunk.CONFIGS["tiny"].files.items()},
        autoencoder="autoencoder", painters=("flux", "t5", "clip"), zero=r"\.lin\.|final_layer",
        stages=(Stage("autoencoder", 512, 3_000, 32, 1_200, (1e-3, 1e-5), crop=256),
                Stage("flow 128", 128, 60_000, 2048, 3_600, (1e-3, 1e-3), text=32),
                Stage("flow 256", 256, 50_000, 512, 9_500, (1e-3, 5e-4), text=32),
                Stage("flow 512", 512, 30_000, 256, 5_500, (5e-4, 2e-5), text=128),
                Stage("guided 512", 512, 30_000, 256, 250, (3e-4, 0.0), text=128, guidance=5.0, ema=0.99)),
        make_scene=scenes.make_scene, make_reader=flux_reader, velocity=flux_velocity,
        encode=lambda autoencoder, pictures: autoencoder.encoder(pictures),
        make_layout=lambda config, stage, device:
            flux_chipmunk.make_layout(config.flux, *stage.grid, stage.text, device)),
    "wan": Recipe(
        program=wan_chipmunk, files=wan_chipmunk.FILES, autoencoder="vae", painters=("wan", "umt5"),
        zero=r"time_proj|scale_shift_table|attn2\.to_out|^proj_out",
        stages=(Stage("autoencoder 1", 256, 6_000, 64, 800, (1e-3, 1e-3), frames=1, crop=128),
                Stage("autoencoder 17", 256, 1_200, 8, 5_200, (1e-3, 1e-5), frames=17, crop=128),
                Stage("flow 128", 128, 20_000, 512, 2_000, (1e-3, 1e-3), frames=17, text=64),
                Stage("flow 256", 256, 12_000, 128, 9_500, (1e-3, 1e-5), frames=17, text=64)),
        make_scene=scenes.make_moving_scene, make_reader=wan_reader, velocity=wan_velocity,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos, {})),
        make_layout=lambda config, stage, device:
            wan_chipmunk.make_layout(config.wan, stage.grid, config.window, device)),
    "hunyuan": Recipe(
        program=hunyuan_chipmunk, files=hunyuan_chipmunk.FILES, autoencoder="vae",
        painters=("hunyuan", "llama", "clip"), zero=r"norm1(_context)?\.linear|norm\.linear|norm_out\.linear|^proj_out",
        stages=(Stage("autoencoder 1", 256, 6_000, 64, 600, (1e-3, 1e-3), frames=1, crop=128),
                Stage("autoencoder 17", 256, 1_200, 8, 5_000, (1e-3, 1e-5), frames=17, crop=128),
                Stage("flow 128", 128, 20_000, 512, 2_000, (1e-3, 1e-3), frames=17, text=32),
                Stage("flow 256", 256, 12_000, 128, 11_500, (1e-3, 2e-5), frames=17, text=32),
                Stage("guided 256", 256, 12_000, 128, 250, (3e-4, 0.0), frames=17, text=32, guidance=7.0, ema=0.99)),
        make_scene=scenes.make_moving_scene, make_reader=hunyuan_reader, velocity=hunyuan_velocity,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos)),
        make_layout=lambda config, stage, device:
            hunyuan_chipmunk.make_layout(config.hunyuan, stage.grid, stage.text, device))}

# ---------------------------------------------------------------------------------------------------------
# the loop


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal first, and as large as AdamW's would be (Keller Jordan's
    Muon). A convolution counts as the matrix (outputs, inputs x kernel). Matrices of one shape are updated together."""

    def __init__(self, matrices, momentum=0.95, weight_decay=0.01):
        of_shape = {}
        for p in matrices:
            of_shape.setdefault(p.flatten(1).shape, []).append(p)
        groups = [{"params": alike} for alike in of_shape.values()]
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = torch.stack([p.grad.flatten(1) for p in params])             # (n, rows, columns)
            state = self.state[params[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(grads)).lerp_(grads, 1 - group["momentum"])
            update = orthogonal(grads.lerp(momentum, group["momentum"]))         # (n, rows, columns)
            size = group["lr"] * 0.2 * max(update.shape[1:])**0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [u.view_as(p) for u, p in zip(update.unbind(), params)], alpha=-size)


def orthogonal(x):
    """Matrices x (n, rows, columns) with all singular values moved to about 1, by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    y = x.bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = y @ y.mT                                            # (n, rows, rows)
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return y.to(x.dtype)


def make_optimizers(model):
    """Muon for the matrices and convolutions inside blocks, which it teaches faster; AdamW for everything else."""
    inner = [p for name, p in model.named_parameters()
             if p.dim() > 1 and min(p.shape[:2]) >= 16 and re.search(r"(blocks?|layers|mid|up|down)[._]", name)]
    ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in ids]
    return torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.01, fused=True), Muon(inner)


def learning_rate(step, stage):
    """AdamW's; Muon's is three times that."""
    done = step / stage.steps
    return ((1 - done) * stage.lr[0] + done * stage.lr[1]) * min(1.0, (step + 1) / 200)


def train_stage(stage, model, make_loss, draw_sheet, work, began, device):
    """Train `model`; leaves the averaged (EMA) weights in it. Goes on from the stage's checkpoint in the folder `work`.

    make_loss() -> loss(generator), a scalar to lower, where the generator is seeded by the number of the step alone;
    draw_sheet(averaged model) -> picture (3, H, W), texts {key: str}. began: when the training did, on time.monotonic's
    clock, pauses left out. -> the same, after this stage. Raises Fail if the checkpoint is another recipe's."""
    file = work / f"{stage.name}.pt"
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model)
    first = 0
    if file.exists():
        saved = torch.load(file, map_location=device, weights_only=True)
        if saved["stage"] != repr(stage):
            raise cli.Fail(f"{file} is of another recipe; delete {work} to train from nothing")
        first, began = saved["step"], time.monotonic() - saved["seconds"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    loss = make_loss() if first < stage.steps else None
    written = time.monotonic()
    bar = tqdm(range(first, stage.steps), stage.name, initial=first, total=stage.steps, mininterval=2)
    for step in bar:
        for optimizer, factor in zip(optimizers, (1, 3)):
            for group in optimizer.param_groups:
                group["lr"] = factor * learning_rate(step, stage)
        value = loss(torch.Generator(device).manual_seed(step))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(stage.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", lr=f"{learning_rate(step, stage):.1e}")
        finished = step + 1
        if finished % (stage.steps // SHEETS) == 0:
            media.write_png(work / f"{stage.name}, {finished} steps.png", *draw_sheet(ema))
        if finished == stage.steps or time.monotonic() - written > CHECKPOINT_SECONDS:
            written = time.monotonic()
            save_atomically({"stage": repr(stage), "step": finished, "seconds": written - began,
                             "model": model.state_dict(), "ema": ema.state_dict(),
                             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, file)
    model.load_state_dict(ema.state_dict())
    return began


def save_atomically(values, file):
    """Whole or not at all: a file that a run finds is one that it can read."""
    torch.save(values, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def half_precision(device):
    """bf16 autocast on a GPU; float32 on a CPU, where few are fast in anything else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def show(some, stage, device):
    """Pictures (B, 3, size, size) or videos (B, 3, frames, size, size) of some scenes."""
    if stage.frames:
        return scenes.draw_videos(some, stage.size, stage.frames, device)
    return scenes.draw(some, stage.size, device)


def show_all(recipe, stage, rng, device):
    """Makes all of a stage's scenes, many at a time. -> (their pictures or videos, their captions), ..."""
    batch = min(1024, max(1, 512 * 256**2 // (stage.size**2 * max(1, stage.frames))))        # a few gigabytes of noise
    for i in tqdm(range(0, stage.scenes, batch), f"{stage.name}: scenes", mininterval=2):
        some = [recipe.make_scene(rng) for _ in range(min(batch, stage.scenes - i))]
        yield show(some, stage, device), [scene.caption for scene in some]


def sheet(pictures):
    """Pictures (B, 3, H, W), four a row; of videos (B, 3, T, H, W), every fourth frame, one video a row -> (3, h, w)"""
    if pictures.dim() == 5:
        return pictures[:, :, ::4].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)           # (3, B H, T W / 4)
    return pictures.unflatten(0, (-1, 4)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)    # (3, B H / 4, 4 W)

# ---------------------------------------------------------------------------------------------------------
# the autoencoder


@torch.no_grad()
def make_autoencoder(recipe, config):
    """The autoencoder. In a video's, the convolutions around the latents start as the identity and with little noise
    between them, so that the decoder soon sees what the encoder says. Wan2.1's puts zeros before the first frame, from
    which single frames learn nothing: there no frame looks back at first, and time is halved by leaving frames out and
    doubled by repeating them."""
    autoencoder = recipe.program.parts(config)[recipe.autoencoder]()
    for name, conv in autoencoder.named_modules():
        if name in ("quant_conv", "post_quant_conv"):
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
        elif isinstance(conv, wan_chipmunk.CausalConv) or name.endswith("time_conv"):
            conv.weight[:, :, :-1] = 0.0
            if name.endswith("time_conv"):
                frames = conv.out_channels // conv.in_channels       # C -> C or, for two frames, 2 C
                conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(frames, 1)
                nn.init.zeros_(conv.bias)
        if name == "quant_conv":
            conv.bias[config.vae.z:] = -4.0                          # log variance
    innermost = {4: torch.channels_last, 5: torch.channels_last_3d}  # convolutions run faster so
    for p in autoencoder.parameters():
        if p.dim() in innermost:
            p.data = p.data.contiguous(memory_format=innermost[p.dim()])
    return autoencoder


def autoencoder_stage(recipe, autoencoder, stage, held_out, device):
    """-> make_loss, draw_sheet of train_stage."""
    @torch.compile(dynamic=False, disable=device.type == "cpu" or stage.steps < 2_000)       # it takes a minute
    def loss_of(pictures, noise):
        """Reconstruction; latents' noise near standard (KL), their mean and spread over the batch standard."""
        mean, logvar = recipe.encode(autoencoder, pictures).float().chunk(2, dim=1)          # (B, z, ..., h, w) each
        logvar = logvar.clamp(LEAST_LOGVAR, 4)
        error = autoencoder.decode(mean + (0.5 * logvar).exp() * noise).float() - pictures   # (B, 3, ..., 8h, 8w)
        if stage.frames > 1:                                         # what moves is small and hard, so it counts more
            moved = (pictures.diff(dim=2).abs().amax(1, keepdim=True) > 0.1).float()         # (B, 1, T - 1, 8h, 8w)
            error = error * (1 + 2 * F.pad(moved, (0, 0, 0, 0, 1, 0)))
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        spread, centre = torch.var_mean(mean, dim=(0, *range(2, mean.dim())))                # (z,) each
        standard = (spread.clamp(min=1e-6).sqrt() - 1).square().mean() + centre.square().mean()
        return error.abs().mean() + 4 * error.square().mean() + edges + 1e-4 * kl + 1e-2 * standard

    def make_loss():
        shown = show_all(recipe, stage, random.Random(stage.name), device)
        pictures = torch.cat([(127.5 * (some + 1)).round().byte() for some, _ in shown])     # (n, 3, [T,] size, size)

        def loss(generator):
            rng = random.Random(generator.initial_seed())
            x, y = (rng.randrange(stage.size - stage.crop + 1) for _ in range(2))
            index = torch.randint(len(pictures), (stage.batch,), generator=generator, device=device)
            squares = pictures[index, ..., y:y + stage.crop, x:x + stage.crop].float() / 127.5 - 1
            shape = stage.batch, autoencoder.config.z, *stage.grid[:-2], stage.crop // 8, stage.crop // 8
            noise = torch.randn(shape, generator=generator, device=device)
            with half_precision(device):
                return loss_of(squares, noise)
        return loss

    @torch.no_grad()
    def draw_sheet(autoencoder):
        """Held-out pictures, and below them what comes out of the autoencoder."""
        pictures = show([scene for scene in held_out if scene.surface != "plain"], stage, device)
        with half_precision(device):
            decoded = [autoencoder.decode(autoencoder.encode(picture))[0].float() for picture in pictures.split(1)]
        decoded = torch.stack(decoded).clamp(-1, 1)                  # as pictures
        psnr = f"{fmean(map(media.psnr, pictures, decoded)):.2f} dB"
        tqdm.write(f"{stage.name}: {len(pictures)} held-out textured scenes come back with a PSNR of {psnr}")
        return sheet(torch.cat([pictures[:SAMPLES], decoded[:SAMPLES]])), {"psnr": psnr}
    return make_loss, draw_sheet


@torch.no_grad()
def cache_latents(recipe, autoencoder, stage, work, device):
    """-> latents (n, z, ..., size / 8, size / 8) in half precision, n captions. Kept in a file for the next start."""
    file = work / f"latents {stage.size}.pt"
    if not file.exists():
        latents, captions = [], []
        for pictures, told in show_all(recipe, stage, random.Random(stage.size), device):
            with half_precision(device):
                latents.append(autoencoder.encode(pictures).half())
            captions += told
        save_atomically((torch.cat(latents), captions), file)
    return torch.load(file, map_location=device, weights_only=True)

# ---------------------------------------------------------------------------------------------------------
# the transformer


def make_painters(recipe, config):
    """The transformer and its text encoders, with zeros where the recipe wants them."""
    makers = recipe.program.parts(config)
    painters = nn.ModuleDict({part: makers[part]() for part in recipe.painters})
    for name, p in painters[recipe.painters[0]].named_parameters():
        if re.search(recipe.zero, name):
            nn.init.zeros_(p)
    return painters


def compile_blocks(model):
    """Compile every block of a transformer and its text encoders in place; those of one kind share their code."""
    for name, module in model.named_modules():
        if re.search(r"(blocks?|layers)\.\d+$", name):
            module.compile(dynamic=False)


def shifted(t, stage):
    """Times t in 0..1, moved towards noise, the more the more tokens there are: there things find their places."""
    shift = max(1.0, 0.12 * math.prod(stage.grid)**0.5)
    return shift * t / (1 + (shift - 1) * t)


def guided_velocity(recipe, painters, x, t, tokens, empty, guidance, layout):
    """v_empty + guidance (v_prompt - v_empty), of a model that has not learned it. t, guidance (B,)"""
    one = torch.ones_like(t)
    prompted = recipe.velocity(painters, x, t, tokens, one, layout)
    unprompted = recipe.velocity(painters, x, t, [e.expand_as(i) for e, i in zip(empty, tokens)], one, layout)
    return unprompted + guidance.view(-1, *[1] * (x.dim() - 1)) * (prompted - unprompted)


def flow_stage(recipe, painters, autoencoder, stage, read, held_out, work, device):
    """-> make_loss, draw_sheet of train_stage."""
    def numbers(prompts):
        return [i.to(device) for i in read(prompts, stage.text)]     # (len(prompts), L) each
    layout, empty = recipe.make_layout(recipe.program.CONFIGS["tiny"], stage, device), numbers([""])
    teacher = None
    if stage.guidance:                                               # here, before a checkpoint changes the painters
        teacher = copy.deepcopy(painters).requires_grad_(False)

    def make_loss():
        latents, captions = cache_latents(recipe, autoencoder, stage, work, device)
        tokens = numbers(captions)
        for model in painters, teacher or painters:
            compile_blocks(model)

        def loss(generator):
            """Flow matching; with a teacher, matching its guided velocity instead."""
            index = torch.randint(len(latents), (stage.batch,), generator=generator, device=device)
            t, chance = torch.rand(2, stage.batch, generator=generator, device=device)       # (B,) each
            t = shifted(t, stage)
            clean = latents[index].float()                           # (B, z, ..., h, w)
            noise = torch.randn(clean.shape, generator=generator, device=device)
            x = torch.lerp(clean, noise, t.view(-1, *[1] * (clean.dim() - 1)))
            prompts = [i[index] for i in tokens]                     # (B, L) each
            with half_precision(device):
                if teacher is None:
                    prompts = [torch.where(chance[:, None] < 0.1, e, i) for e, i in zip(empty, prompts)]
                    guidance, target = torch.ones_like(t), noise - clean
                else:
                    guidance = 1 + (stage.guidance - 1) * chance
                    with torch.no_grad():
                        target = guided_velocity(recipe, teacher, x, t, prompts, empty, guidance, layout)
                velocity = recipe.velocity(painters, x, t, prompts, guidance, layout)
            return F.mse_loss(velocity.float(), target.float())
        return loss

    @torch.no_grad()
    def draw_sheet(painters):
        """What the model draws for held-out captions, always from the same noise, in 20 steps."""
        captions = [scene.caption for scene in held_out[:SAMPLES]]
        tokens = numbers(captions)
        shape = len(captions), autoencoder.config.z, *stage.grid[:-2], stage.size // 8, stage.size // 8
        x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
        guidance = x.new_full((len(x),), 3.0)                        # (B,)
        levels = shifted(torch.linspace(1, 0, 21, device=device), stage)
        with half_precision(device):
            for level, following in zip(levels[:-1], levels[1:]):
                t = level.expand(len(x))
                if stage.guidance:
                    v = recipe.velocity(painters, x, t, tokens, guidance, layout)
                else:
                    v = guided_velocity(recipe, painters, x, t, tokens, empty, guidance, layout)
                x = x + (following - level) * v.float()
            pictures = torch.cat([autoencoder.decode(latents).float().clamp(-1, 1) for latents in x.split(1)])
        return sheet(pictures), {"captions": "\n".join(captions)}
    return make_loss, draw_sheet

# ---------------------------------------------------------------------------------------------------------
# a recipe from its first stage to its last


def save(module, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().half().contiguous().cpu() for name, p in module.state_dict().items()}, file)


def train(recipe, folder, work, device):
    """Run every stage of a recipe. The weights go into folder as half-precision safetensors, laid out as in the model's
    repository, when all are trained; until then they are in work / "weights"."""
    began = time.monotonic()
    config, weights = recipe.program.CONFIGS["tiny"], work / "weights"
    try:
        weights.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.Fail(f"--work {work}: {error.strerror}; choose another folder") from None
    if device.type == "cuda":
        scenes.noise = torch.compile(scenes.noise, dynamic=True)     # most of the time that drawing takes
    torch.manual_seed(0)
    rng = random.Random(0)
    read = recipe.make_reader(weights, [recipe.make_scene(rng).caption for _ in range(5_000)], config)
    held_out = [recipe.make_scene(rng, train=False, plain=True) for _ in range(4 * SAMPLES)]
    autoencoder, painters = make_autoencoder(recipe, config).to(device), make_painters(recipe, config).to(device)
    for stage in recipe.stages:
        if stage.crop:
            model, trained = autoencoder, {recipe.autoencoder: autoencoder}
            make_loss, draw_sheet = autoencoder_stage(recipe, autoencoder, stage, held_out, device)
        else:
            model, trained = painters, painters
            make_loss, draw_sheet = flow_stage(recipe, painters, autoencoder, stage, read, held_out, work, device)
        began = train_stage(stage, model, make_loss, draw_sheet, work, began, device)
        for part, module in trained.items():
            save(module, weights / recipe.files[part])
    shutil.copytree(weights, folder, dirs_exist_ok=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{folder}: trained in {(time.monotonic() - began) / 60:.1f} minutes on {where}, torch {torch.__version__}")


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path("train"), help="folder of checkpoints (default: train)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    recipe = RECIPES[args.model]
    folder = recipe.program.CONFIGS["tiny"].weights
    train(recipe, folder, args.work / args.model, cli.pick_device(args.device))


if __name__ == "__main__":
    cli.run(main)
