"""Draws captioned scenes and trains the embedded models on them, from nothing.

    python train_tiny.py flux              rebuilds weights/flux-tiny: tokenizers, autoencoder, text encoders, transformer
    python train_tiny.py wan               weights/wan-tiny
    python train_tiny.py hunyuan           weights/hunyuan-tiny

The world: one to three coloured shapes on a coloured background, drawn from signed distances, or in a video one shape that
moves, grows, shrinks, rotates or bounces; and a caption that says what is where and what it does. Some (colour, shape,
relation or motion) combinations are held out of training: bench.py scores the models on those.

The recipe, every stage resumable (interrupt it, run it again):
    1. autoencoder     reconstruct drawn pictures; latents kept standard normal, so that scale = 1 and shift = 0 (a video's
                       learns single frames first: many scenes at a time, which is what it lacks with whole videos)
    2. flow            v = noise - latents from cached latents, text encoders trained along, 10 % empty prompts: at 128 px,
                       where what goes where is cheap to learn, then larger, up to the model's default size
    3. guided          FLUX.1-dev's and HunyuanVideo's guidance distillation: the student with guidance g in its input
                       learns v_empty + g (v_prompt - v_empty) of the frozen model of stage 2, for g from 1 up
                       (Wan2.1 computes that sum at every step of sampling instead)
"""
import argparse
import copy
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

import common
import flux_chipmunk
import hunyuan_chipmunk
import wan_chipmunk
from text_encoders import load_clip_tokenizer, load_t5_tokenizer, tokenize

# ---------------------------------------------------------------------------------------------------------
# scenes

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (245, 220, 50),
           "orange": (245, 140, 30), "purple": (130, 50, 170), "pink": (250, 150, 190), "cyan": (60, 210, 220),
           "white": (250, 250, 250), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart", "diamond")
SIZES = {"small": (0.08, 0.105), "": (0.12, 0.18), "large": (0.19, 0.24)}  # radius, as a share of the picture's side
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
WORDINGS = {"above": ("over", "on top of"), "below": ("under", "beneath"), "left of": ("to the left of",),
            "right of": ("to the right of",)}
MOTIONS = {"moves left to right": ("moving left to right", "moves from left to right", "moving to the right"),
           "moves right to left": ("moving right to left", "moves from right to left", "moving to the left"),
           "moves up": ("moving up", "moves upwards", "rises"), "moves down": ("moving down", "moves downwards", "falls"),
           "grows": ("growing", "gets bigger", "becomes larger"), "shrinks": ("shrinking", "gets smaller"),
           "rotates": ("rotating", "spins", "turns"), "bounces": ("bouncing", "bounces up and down")}
ROUND = ("circle", "ring")     # nobody can see these rotate


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    x: float                   # centre and radius, as shares of the picture's side; y grows downwards
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    things: tuple              # of Thing
    relation: str              # of things[0] to things[1], or ""
    background: str
    caption: str
    motion: str = ""           # of things[0] in a video, or ""
    end: Thing | None = None   # things[0] at its end, or halfway where it bounces


def held_out(colour, shape, doing):
    """Is this combination with a relation, a motion or "" kept out of training? One in seven is; every colour, shape,
    relation and motion is seen in others."""
    doings = ("", *OPPOSITE, *MOTIONS)
    return (list(COLOURS).index(colour) + 3 * SHAPES.index(shape) + 2 * doings.index(doing)) % len(SHAPES) == 0


def combinations(things, relation):
    """The (colour, shape, relation) combinations that a scene shows."""
    relations = [relation, OPPOSITE.get(relation, "")] + [""] * len(things)
    return [(thing.colour, thing.shape, r) for thing, r in zip(things, relations)]


def place(rng, count, relation):
    """Sizes, centres and radii of `count` things that do not touch, the first in `relation` to the second."""
    while True:
        sizes = [rng.choice(("", "", *SIZES)) for _ in range(count)]
        radii = [rng.uniform(*SIZES[size]) for size in sizes]
        spots = [(rng.uniform(r + 0.02, 0.98 - r), rng.uniform(r + 0.02, 0.98 - r)) for r in radii]
        clear = all(math.dist(spots[i], spots[j]) > radii[i] + radii[j] + 0.03 for i in range(count) for j in range(i))
        if clear and (not relation or holds(relation, *spots[:2], 1.5)):         # more clearly than the score asks
            return [(size, *spot, r) for size, spot, r in zip(sizes, spots, radii)]


def holds(relation, a, b, margin=1.0):
    """Is the thing centred at a (x, y) in `relation` to the one at b, beyond doubt: `margin` times as far that way as sideways?"""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {"above": (dy, dx), "below": (-dy, dx), "left of": (dx, dy), "right of": (-dx, dy)}[relation]
    return along > 0.1 and along >= margin * abs(across)


def make_scene(rng, train=True, plain=False):
    """A random scene. train: no held-out combination; else the first thing's is held out. plain: canonical wording."""
    while True:
        count = rng.choice((1, 1, 2, 2, 2, 2, 3)) if not plain else rng.choice((1, 2, 2))
        relation = "" if count == 1 or (not plain and rng.random() < 0.1) else rng.choice(list(OPPOSITE))
        colours = rng.sample(list(COLOURS), count + 1)
        if count > 1 and rng.random() < 0.1:
            colours[1] = colours[0]                                  # two things may share a colour
        shapes = [rng.choice(SHAPES) for _ in range(count)]
        drawn = list(zip(colours, shapes))
        if len(set(drawn)) < count:
            continue                                                 # two things alike: which is which?
        things = [Thing(c, s, "", 0, 0, 0) for c, s in drawn]
        shown = [held_out(*combination) for combination in combinations(things, relation)]
        if any(shown) if train else not shown[0]:
            continue
        things = tuple(Thing(c, s, *spot) for (c, s), spot in zip(drawn, place(rng, count, relation)))
        return Scene(things, relation, colours[-1], caption(rng, things, relation, colours[-1], plain))


def route(rng, size, motion):
    """Centre and radius (x, y, r) of a thing at both ends of its motion, all of it inside the picture."""
    r = rng.uniform(*SIZES[size])
    most = min(2 * r, 0.36) if motion in ("grows", "shrinks") else r
    edge = 1.25 * most + 0.01                                        # corners reach farther than the radius
    near, far = edge + rng.uniform(0, 0.15) * (1 - 2 * edge), 1 - edge - rng.uniform(0, 0.15) * (1 - 2 * edge)
    x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
    return {"moves left to right": ((near, y, r), (far, y, r)), "moves right to left": ((far, y, r), (near, y, r)),
            "moves up": ((x, far, r), (x, near, r)), "moves down": ((x, near, r), (x, far, r)), "bounces": ((x, near, r), (x, far, r)),
            "grows": ((x, y, r), (x, y, most)), "shrinks": ((x, y, most), (x, y, r)), "rotates": ((x, y, r), (x, y, r))}[motion]


def make_moving_scene(rng, train=True, plain=False):
    """A random scene for a video: one thing and what it does. train and plain as in make_scene."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        shape, motion = rng.choice(SHAPES), rng.choice(list(MOTIONS))
        if held_out(colour, shape, motion) == train or motion == "rotates" and shape in ROUND:
            continue
        size = rng.choice(("", "", "large") if motion == "rotates" else ("", "", *SIZES))       # turning is hard to see in the small
        start, end = (Thing(colour, shape, size, *place) for place in route(rng, size, motion))
        return Scene((start,), "", background, caption(rng, (start,), motion, background, plain), motion, end)


def caption(rng, things, doing, background, plain):
    """The prompt for a scene: canonical words if plain, else sometimes others that mean the same. doing: relation or motion."""
    def article(phrase):
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase
    moving = doing in MOTIONS
    phrases = [article(" ".join(filter(None, (t.size, t.colour, t.shape)))) for t in things]
    if not plain and rng.random() < 0.2:
        doing = rng.choice((WORDINGS | MOTIONS).get(doing, (doing,)))
    doing = doing or ("and" if len(phrases) > 1 else "")
    text = " ".join(filter(None, (phrases[0], doing, *phrases[1:2])))
    text += "".join(f" and {p}" for p in phrases[2:])
    if plain or rng.random() < 0.8:
        text += " on " + article(f"{background} background")
    else:
        text += rng.choice((f" on {background}", f", {background} background", f" against a {background} background", ""))
    if not plain and rng.random() < 0.2:
        text = rng.choice(("a video of ", "an animation of ") if moving else ("a picture of ", "draw ", "an image of ", "there is ")) + text
    if not plain and rng.random() < 0.1:
        text = " ".join(word for word in text.split() if word not in ("a", "an"))
    return text + ("." if not plain and rng.random() < 0.1 else "")


def distance(shape, x, y):
    """Signed distance (roughly) to a shape of radius 1 at the origin, negative inside. x, y (...), y down -> (...)"""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "ring":
        return (torch.hypot(x, y) - 0.76).abs() - 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85
    if shape == "diamond":
        return 0.6 * (x.abs() / 0.75 + y.abs() - 1)
    if shape == "triangle":
        return torch.maximum((1.75 * x.abs() - 0.95 * (y + 1)) / 1.991, y - 0.75)
    if shape == "star":                                              # fold the plane onto one half of one of five points
        angle = (torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
        inner = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
        nx, ny = inner[1], 1 - inner[0]
        length = torch.hypot(x, y)
        return ((length * angle.cos() - 1) * nx + length * angle.sin() * ny) / math.hypot(nx, ny)
    assert shape == "heart", shape                                   # two discs, and the kite from their centres to the tip
    x = x.abs()
    discs = torch.hypot(x - 0.45, y + 0.35) - 0.52
    kite = torch.maximum(0.7513 * x + 0.66 * (y - 0.95), 0.66 * (x - 0.45) - 0.7513 * (y + 0.35))
    return torch.minimum(discs, torch.maximum(kite, -(y + 0.35)))


def cover(shape, x, y, r, angle, size, window=(0.0, 0.0, 1.0)):
    """How much of each pixel is inside a shape, edges smooth over a pixel. Centre x, y, radius r and angle (clockwise):
    (...) each, as shares of the picture's side. window: left, top, side of what is seen. -> (..., size, size) in 0..1"""
    left, top, side = window
    grid = (torch.arange(size, device=x.device) + 0.5) / size * side             # (size,)
    x, y, r, cos, sin = (a[..., None, None] for a in (x, y, r, angle.cos(), angle.sin()))
    x, y = (left + grid - x) / r, (top + grid[:, None] - y) / r                  # (..., 1, size), (..., size, 1)
    d = distance(shape, cos * x + sin * y, cos * y - sin * x) * r                # (..., size, size)
    return (0.5 - d * size / side).clamp(0, 1)


def colours_of(names, device):
    """Names of colours -> (B, 3) in -1..1."""
    return torch.tensor([COLOURS[name] for name in names], device=device) / 127.5 - 1


def draw(scenes, size, device="cpu", window=(0.0, 0.0, 1.0)):
    """Scenes -> pictures (B, 3, size, size) in -1..1."""
    pictures = colours_of([s.background for s in scenes], device)[:, :, None, None].expand(-1, -1, size, size).clone()
    for shape in SHAPES:
        for i in range(max(len(s.things) for s in scenes)):                      # one thing a scene at a time
            rows = [(b, t) for b, s in enumerate(scenes) for t in s.things[i:i + 1] if t.shape == shape]
            if rows:
                b, things = zip(*rows)
                x, y, r, angle = torch.tensor([(t.x, t.y, t.r, 0.0) for t in things], device=device).unbind(1)   # (b,) each
                colour = colours_of([t.colour for t in things], device)[:, :, None, None]        # (b, 3, 1, 1)
                b = torch.tensor(b, device=device)
                pictures[b] = pictures[b].lerp(colour, cover(shape, x, y, r, angle, size, window)[:, None])
    return pictures


def moments(scenes, frames, device):
    """Where the thing of each scene is in each frame: x, y, r and angle, (B, T) each."""
    time = torch.linspace(0, 1, frames, device=device)                           # (T,)
    fall = (1 - (1 - 2 * time).abs()).square()                                   # down faster and faster, then up again
    bounces, turns = (torch.tensor([[s.motion == motion] for s in scenes], device=device) for motion in ("bounces", "rotates"))  # (B, 1)
    start, end = (torch.tensor([(t.x, t.y, t.r) for t in things], device=device)                                 # (B, 3)
                  for things in zip(*((s.things[0], s.end) for s in scenes)))
    done = torch.where(bounces, fall, time)                                      # (B, T)
    return *torch.lerp(start[:, :, None], end[:, :, None], done[:, None]).unbind(1), math.pi * time * turns      # half a turn


def draw_videos(scenes, size, frames, device="cpu", window=(0.0, 0.0, 1.0), behind=None):
    """Scenes with a motion -> videos (B, 3, T, size, size) in -1..1; their things on the videos `behind` instead of their
    backgrounds, where those are given."""
    places = moments(scenes, frames, device)
    covers = torch.empty(len(scenes), frames, size, size, device=device)         # (B, T, size, size)
    for shape in SHAPES:
        rows = [b for b, s in enumerate(scenes) if s.things[0].shape == shape]
        if rows:
            covers[rows] = cover(shape, *(p[rows] for p in places), size, window)
    background, colour = (colours_of(names, device)[:, :, None, None, None]      # (B, 3, 1, 1, 1)
                          for names in zip(*((s.background, s.things[0].colour) for s in scenes)))
    return torch.lerp(background if behind is None else behind, colour, covers[:, None])         # (B, 3, T, size, size)

# ---------------------------------------------------------------------------------------------------------
# tokenizers, laid out as the big repositories'. Every printable character has a token, so that any prompt can be read.


def train_unigram(folder, captions, vocab, special, template):
    """A T5-like tokenizer.json from captions: special tokens first, number 0 of them the padding; template puts some around
    the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(),
                                                 normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(captions, trainers.UnigramTrainer(
        vocab_size=vocab, special_tokens=special, unk_token="<unk>", initial_alphabet=[chr(c) for c in range(33, 127)]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, special.index(token)) for token in template.split() if token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_t5_tokenizer(folder / "tokenizer.json")


def train_bpe(folder, captions, vocab):
    """A CLIP-like vocab.json + merges.txt (byte-level BPE) from captions."""
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()
    clip.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    clip.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab - 514, end_of_word_suffix="</w>", special_tokens=[]))
    merges = [" ".join(pair) for pair in json.loads(clip.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return load_clip_tokenizer(folder)

# ---------------------------------------------------------------------------------------------------------
# what differs between the models


@dataclass(frozen=True)
class Stage:
    name: str
    size: int                  # pixels
    scenes: int                # distinct ones
    batch: int
    steps: int
    lr: tuple                  # first and last, linear between, after a short warm-up
    ema: float = 0.999
    frames: int = 0            # of a video; 0: pictures
    guidance: float = 0.0      # the most that the student learns; 0: no distillation

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
    zero: str                  # pattern of the transformer's parameters that start at zero, so that every block starts as the identity
    stages: tuple              # of Stage: the autoencoder's, then the painters'
    make_scene: Callable       # (rng) -> Scene
    make_reader: Callable      # (folder, captions, config): writes tokenizers -> a function from B prompts to a few tensors (B, L)
    encode: Callable           # (autoencoder, pictures) -> mean and log variance of the latents (B, 2 z, ...)
    make_layout: Callable      # (config, grid, device) -> the model's layout
    velocity: Callable         # (painters, latents, t, prompts' tensors, guidance, layout) -> velocity, shaped as the latents


def flux_reader(folder, captions, config):
    t5 = train_unigram(folder / "tokenizer_2", captions, config.t5.vocab, ["<pad>", "</s>", "<unk>"], "$A </s>")
    clip = train_bpe(folder / "tokenizer", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")
    return lambda prompts: (tokenize(t5, prompts, config.text_length, 0)[0], tokenize(clip, prompts, config.clip.length, end)[0])


def flux_velocity(painters, x, t, tokens, guidance, layout):
    t5_ids, clip_ids = tokens
    text, pooled = painters.t5(t5_ids), painters.clip(clip_ids)[1]
    v = painters.flux(flux_chipmunk.patchify(x), t, text, pooled, guidance, layout)
    return flux_chipmunk.unpatchify(v, x.shape[2] // 2, x.shape[3] // 2)


def wan_reader(folder, captions, config):
    umt5 = train_unigram(folder / "tokenizer", captions, config.umt5.vocab, ["<pad>", "</s>", "<unk>"], "$A </s>")
    return lambda prompts: tokenize(umt5, prompts, config.text_length, 0)[:2]


def wan_velocity(painters, x, t, tokens, guidance, layout):
    ids, mask = tokens
    return painters.wan(x, 1000 * t, painters.umt5(ids, mask) * mask[..., None], layout)


HUNYUAN_TEXT = 48              # tokens: no caption has more, and masked attention is fast where all tokens are a multiple of 16


def hunyuan_reader(folder, captions, config):
    special = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<unk>"]
    llama = train_unigram(folder / "tokenizer", captions, config.llama.vocab, special, "<|begin_of_text|> $A")
    clip = train_bpe(folder / "tokenizer_2", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")

    def read(prompts):
        ids, mask, _ = tokenize(llama, [config.template.format(prompt) for prompt in prompts], config.crop + HUNYUAN_TEXT, 0)
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
        stages=(Stage("autoencoder", 256, 100_000, 32, 2_500, (1e-3, 1e-5)),
                Stage("flow 128", 128, 100_000, 512, 4_220, (1e-3, 1e-3)),
                Stage("flow 256", 256, 60_000, 512, 6_500, (1e-3, 5e-4)),
                Stage("flow 512", 512, 16_000, 256, 1_560, (5e-4, 5e-5)),
                Stage("guided 512", 512, 16_000, 256, 360, (3e-4, 0.0), ema=0.99, guidance=5.0)),
        make_scene=make_scene, make_reader=flux_reader, velocity=flux_velocity,
        encode=lambda autoencoder, pictures: autoencoder.encoder(pictures),
        make_layout=lambda config, grid, device: flux_chipmunk.make_layout(config.flux, *grid, config.text_length, device)),
    "wan": Recipe(
        program=wan_chipmunk, files=wan_chipmunk.FILES,
        autoencoder="vae", painters=("wan", "umt5"), zero=r"time_proj|scale_shift_table|attn2\.to_out|^proj_out",
        stages=(Stage("autoencoder 1", 128, 40_000, 16, 1_000, (6e-4, 6e-4), frames=1),
                Stage("autoencoder 17", 128, 40_000, 4, 5_200, (6e-4, 1e-5), frames=17),
                Stage("flow 128", 128, 20_000, 384, 5_000, (1e-3, 1e-3), frames=17),
                Stage("flow 256", 256, 16_000, 128, 4_400, (1e-3, 1e-5), frames=17)),
        make_scene=make_moving_scene, make_reader=wan_reader, velocity=wan_velocity,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos, {})),
        make_layout=lambda config, grid, device: wan_chipmunk.make_layout(config.wan, grid, config.window, device)),
    "hunyuan": Recipe(
        program=hunyuan_chipmunk, files=hunyuan_chipmunk.FILES,
        autoencoder="vae", painters=("hunyuan", "llama", "clip"), zero=r"norm1(_context)?\.linear|norm\.linear|norm_out\.linear|^proj_out",
        stages=(Stage("autoencoder 1", 128, 40_000, 16, 1_000, (6e-4, 6e-4), frames=1),
                Stage("autoencoder 17", 128, 40_000, 4, 5_000, (6e-4, 1e-5), frames=17),
                Stage("flow 128", 128, 20_000, 256, 5_000, (1e-3, 1e-3), frames=17),
                Stage("flow 256", 256, 16_000, 128, 4_400, (1e-3, 1e-5), frames=17),
                Stage("guided 256", 256, 16_000, 128, 520, (3e-4, 0.0), ema=0.995, frames=17, guidance=7.0)),
        make_scene=make_moving_scene, make_reader=hunyuan_reader, velocity=hunyuan_velocity,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos)),
        make_layout=lambda config, grid, device: hunyuan_chipmunk.make_layout(config.hunyuan, grid, HUNYUAN_TEXT, device))}

# ---------------------------------------------------------------------------------------------------------
# training


def make_optimizers(model):
    """Muon for the matrices inside the blocks of a transformer, which it teaches faster; AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters()
                if p.dim() == 2 and re.search(r"(blocks?|layers)\.\d+\.", name) and "relative_attention_bias" not in name]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def run_stage(stage, model, loss, folder, device):
    """Train `model` to lower loss(step's generator); leaves the averaged (EMA) weights in it.
    Writes a checkpoint every minute, goes on from one that is there, and returns the seconds spent."""
    file = folder / f"{stage.name.replace(' ', '-')}.pt"
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model)
    first, spent = 0, 0.0
    if file.exists():
        saved = torch.load(file, map_location=device, weights_only=True)
        if saved["stage"] != repr(stage):
            raise common.Fail(f"{file} is of another recipe; delete {folder} to train from nothing")
        first, spent = saved["step"], saved["seconds"]
        ema.load_state_dict(saved["ema"])
        model.load_state_dict(saved["model"])
        if first < stage.steps:
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
    start = written = time.monotonic()
    bar = tqdm(range(first, stage.steps), stage.name, initial=first, total=stage.steps, mininterval=2)
    for step in bar:
        done = step / stage.steps
        rate = ((1 - done) * stage.lr[0] + done * stage.lr[1]) * min(1.0, (step + 1) / 200)
        for optimizer, factor in zip(optimizers, (1, 3)):            # Muon's rate is three times AdamW's
            optimizer.param_groups[0]["lr"] = factor * rate
        value = loss(torch.Generator(device).manual_seed(step))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(stage.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", lr=f"{rate:.1e}")
        if step + 1 == stage.steps or time.monotonic() - written > 60:
            written = time.monotonic()
            seconds = spent + written - start
            torch.save({"stage": repr(stage), "step": step + 1, "seconds": seconds, "model": model.state_dict(), "ema": ema.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    model.load_state_dict(ema.state_dict())
    return spent + time.monotonic() - start


def half_precision(device):
    """bf16 autocast on a GPU; float32 on a CPU, where few are fast in anything else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def channels_last(model):
    """Convolutions run faster with the channels innermost; they take over their weights' layout."""
    for p in model.parameters():
        if p.dim() in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.dim() == 4 else torch.channels_last_3d)


@torch.no_grad()
def make_autoencoder(recipe, config):
    """The autoencoder. In a video's, the convolutions around the latents start as the identity and with little noise between
    them, so that the decoder soon sees what the encoder says. Wan2.1's puts zeros before the first frame, from which single
    frames learn nothing: there no frame looks back at first, and time is halved and doubled by leaving out and repeating."""
    autoencoder = recipe.program.parts(config)[recipe.autoencoder]()
    for name, conv in autoencoder.named_modules():
        if name in ("quant_conv", "post_quant_conv"):
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
        elif isinstance(conv, wan_chipmunk.CausalConv) or name.endswith("time_conv"):
            conv.weight[:, :, :-1] = 0.0
            if name.endswith("time_conv"):                           # C -> C or, for two frames, 2 C
                conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(conv.out_channels // conv.in_channels, 1)
                nn.init.zeros_(conv.bias)
        if name == "quant_conv":
            conv.bias[config.vae.z:] = -4.0                          # log variance
    return autoencoder


def show(scenes, stage, device, window=(0.0, 0.0, 1.0)):
    """Pictures (B, 3, size, size) or videos (B, 3, frames, size, size) of scenes."""
    return draw_videos(scenes, stage.size, stage.frames, device, window) if stage.frames else draw(scenes, stage.size, device, window)


def autoencoder_loss(recipe, autoencoder, scenes, stage, device):
    """Reconstruction, plus: latents' noise near standard (KL), their mean and spread over the batch standard."""
    def forward(pictures, noise):
        mean, logvar = recipe.encode(autoencoder, pictures).float().chunk(2, dim=1)      # (B, z, ..., h, w) each
        logvar = logvar.clamp(-12, 4)
        error = autoencoder.decode(mean + (0.5 * logvar).exp() * noise).float() - pictures
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        spread, centre = torch.var_mean(mean, dim=(0, *range(2, mean.dim())))            # (z,) each
        standard = (spread.clamp(min=1e-6).sqrt() - 1).square().mean() + centre.square().mean()
        return error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl + 1e-2 * standard

    def loss(generator):
        rng = random.Random(generator.initial_seed())
        side = rng.choice((1.0, 0.5))                                # half the batches look at pictures of twice the size
        window = (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side)
        pictures = show(rng.sample(scenes, stage.batch), stage, device, window)
        for _ in range(3 if stage.frames else 0):                    # videos show one thing: four on top of each other teach more
            pictures = draw_videos(rng.sample(scenes, stage.batch), stage.size, stage.frames, device, window, pictures)
        *time, h, w = stage.grid
        noise = torch.randn(stage.batch, autoencoder.config.z, *time, 2 * h, 2 * w, generator=generator, device=device)
        with half_precision(device):
            return forward(pictures, noise)
    return loss


@torch.no_grad()
def cache_latents(autoencoder, scenes, stage, work, device):
    """(n, z, ..., size / 8, size / 8) in half precision, kept in a file for an interrupted stage."""
    file = work / f"latents-{stage.size}-{len(scenes)}.pt"
    if file.exists():
        return torch.load(file, map_location=device, weights_only=True)
    batch = max(1, 128 * 256**2 // (stage.size**2 * max(1, stage.frames)))
    latents = []
    for i in tqdm(range(0, len(scenes), batch), f"latents {stage.size}", mininterval=2):
        with half_precision(device):
            latents.append(autoencoder.encode(show(scenes[i:i + batch], stage, device)).half())
    latents = torch.cat(latents)
    torch.save(latents, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)
    return latents


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


def flow_loss(recipe, painters, teacher, latents, tokens, empty, stage, layout, device):
    """Flow matching on cached latents; with a teacher, matching its guided velocity instead."""
    shift = 0.16 * math.prod(stage.grid)**0.5                        # towards noise: it is above t = 0.9 that things find their places
    for model in painters, teacher or painters:
        compile_blocks(model)

    def loss(generator):
        def uniform():
            return torch.rand(stage.batch, generator=generator, device=device)
        index = torch.randint(len(latents), (stage.batch,), generator=generator, device=device)
        clean = latents[index].float()                               # (B, z, ..., h, w)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        t = uniform()
        t = shift * t / (1 + (shift - 1) * t)
        x = torch.lerp(clean, noise, t.view(-1, *[1] * (clean.dim() - 1)))
        prompts = [i[index] for i in tokens]                         # (B, L) each
        one = torch.ones_like(t)
        with half_precision(device):
            if teacher is None:
                drop = uniform()[:, None] < 0.1
                prompts = [torch.where(drop, e, i) for e, i in zip(empty, prompts)]
                guidance, target = one, noise - clean
            else:
                guidance = 1 + (stage.guidance - 1) * uniform()
                with torch.no_grad():
                    prompted = recipe.velocity(teacher, x, t, prompts, one, layout)
                    unprompted = recipe.velocity(teacher, x, t, [e.expand_as(i) for e, i in zip(empty, prompts)], one, layout)
                    target = unprompted + guidance.view(-1, *[1] * (clean.dim() - 1)) * (prompted - unprompted)
            velocity = recipe.velocity(painters, x, t, prompts, guidance, layout)
        return F.mse_loss(velocity.float(), target.float())
    return loss


def save(module, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().half().contiguous().cpu() for name, p in module.state_dict().items()}, file)


def train(recipe, folder, work, device):
    """Every stage of a recipe, then the weights as half-precision safetensors in folder, laid out as the model's repository."""
    config = recipe.program.CONFIGS["tiny"]
    files = {part: folder / file for part, file in recipe.files.items()}
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng = random.Random(0)
    scenes = [recipe.make_scene(rng) for _ in tqdm(range(max(s.scenes for s in recipe.stages)), "scenes", mininterval=2)]
    captions = [scene.caption for scene in scenes]
    read = recipe.make_reader(folder, captions[:20_000], config)
    tokens, empty = ([i.to(device) for i in read(prompts)] for prompts in (captions, [""]))          # (n, L), (1, L)

    autoencoder, painters = make_autoencoder(recipe, config).to(device), make_painters(recipe, config).to(device)
    channels_last(autoencoder)
    latents, size, seconds = None, None, 0.0
    for stage in recipe.stages:
        if stage.name.startswith("autoencoder"):
            seconds += run_stage(stage, autoencoder, autoencoder_loss(recipe, autoencoder, scenes[:stage.scenes], stage, device), work, device)
            save(autoencoder, files[recipe.autoencoder])
            continue
        if size != stage.size:
            latents, size = cache_latents(autoencoder, scenes[:stage.scenes], stage, work, device), stage.size
        teacher = copy.deepcopy(painters).requires_grad_(False) if stage.guidance else None
        layout = recipe.make_layout(config, stage.grid, device)
        seconds += run_stage(stage, painters, flow_loss(recipe, painters, teacher, latents, tokens, empty, stage, layout, device), work, device)
        for part in recipe.painters:
            save(painters[part], files[part])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{folder}: trained in {seconds / 60:.1f} minutes on {where}, torch {torch.__version__}")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path("train"), help="folder of the checkpoints (default: train)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    recipe = RECIPES[args.model]
    folder = Path(__file__).parent / recipe.program.CONFIGS["tiny"].weights
    train(recipe, folder, args.work / args.model, common.pick_device(args.device))


if __name__ == "__main__":
    common.run(main)
