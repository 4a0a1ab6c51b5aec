"""Draws captioned scenes and trains the embedded models on them, from nothing.

    python train_tiny.py flux              rebuilds weights/flux-tiny: tokenizers, autoencoder, text encoders, transformer

The world: one to three coloured shapes on a coloured background, drawn from signed distances, and a caption that says
what is where. Some (colour, shape, relation) combinations are held out of training: bench.py scores the model on those.

The recipe, every stage resumable (interrupt it, run it again):
    1. autoencoder     reconstruct drawn pictures; latents kept standard normal, so that scale = 1 and shift = 0
    2. flow            v = noise - latents from cached latents, text encoders trained along, 10 % empty prompts: at 128 px,
                       where what goes where is cheap to learn, then 256, then 512 px (1,024 tokens)
    3. guided, 512 px  FLUX.1-dev's guidance distillation: the student with guidance g in its input learns
                       v_empty + g (v_prompt - v_empty) of the frozen model of stage 2, for g in 1..5
"""
import argparse
import copy
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

import common
from flux_chipmunk import CONFIGS, Autoencoder, Flux, make_layout, patchify
from text_encoders import CLIPTextEncoder, T5Encoder, load_clip_tokenizer, load_t5_tokenizer, tokenize

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


def held_out(colour, shape, relation):
    """Is this combination kept out of training? One in seven is; every colour, shape and relation is seen in others."""
    relations = ("", *OPPOSITE)
    return (list(COLOURS).index(colour) + 3 * SHAPES.index(shape) + 2 * relations.index(relation)) % len(SHAPES) == 0


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
        if clear and (not relation or holds(relation, *spots[:2])):
            return [(size, *spot, r) for size, spot, r in zip(sizes, spots, radii)]


def holds(relation, a, b):
    """Is the thing centred at a (x, y) in `relation` to the one at b, beyond doubt?"""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = {"above": dy, "below": -dy, "left of": dx, "right of": -dx}[relation]
    return along > 0.1 and along >= max(abs(dx), abs(dy))


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


def caption(rng, things, relation, background, plain):
    """The prompt for a scene: canonical words if plain, else sometimes others that mean the same."""
    def article(phrase):
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase
    phrases = [article(" ".join(filter(None, (t.size, t.colour, t.shape)))) for t in things]
    if not plain and rng.random() < 0.2:
        relation = rng.choice(WORDINGS.get(relation, (relation,)))
    text = phrases[0] if len(phrases) == 1 else f"{phrases[0]} {relation or 'and'} {phrases[1]}"
    text += "".join(f" and {p}" for p in phrases[2:])
    if plain or rng.random() < 0.8:
        text += " on " + article(f"{background} background")
    else:
        text += rng.choice((f" on {background}", f", {background} background", f" against a {background} background", ""))
    if not plain and rng.random() < 0.2:
        text = rng.choice(("a picture of ", "draw ", "an image of ", "there is ")) + text
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


def draw(scenes, size, device="cpu", window=(0.0, 0.0, 1.0)):
    """Scenes -> pictures (B, 3, size, size) in -1..1, edges smooth over a pixel. window: left, top, side of what is seen."""
    palette = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1    # (10, 3)
    names = list(COLOURS)
    left, top, side = window
    grid = (torch.arange(size, device=device) + 0.5) / size * side
    y, x = torch.meshgrid(top + grid, left + grid, indexing="ij")                # (size, size)
    background = torch.tensor([names.index(s.background) for s in scenes], device=device)
    pictures = palette[background][:, :, None, None].expand(-1, -1, size, size).clone()   # (B, 3, size, size)
    for shape in SHAPES:
        for i in range(max(len(s.things) for s in scenes)):                      # one thing a scene at a time
            rows = [(b, t.x, t.y, t.r, names.index(t.colour))
                    for b, s in enumerate(scenes) for t in s.things[i:i + 1] if t.shape == shape]
            if rows:
                b, tx, ty, r, colour = (torch.tensor(c, device=device) for c in zip(*rows))
                tx, ty, r = (a[:, None, None] for a in (tx, ty, r))
                d = distance(shape, (x - tx) / r, (y - ty) / r) * r              # (b, size, size)
                cover = (0.5 - d * size / side).clamp(0, 1)[:, None]             # (b, 1, size, size)
                pictures[b] = pictures[b].lerp(palette[colour][:, :, None, None], cover)
    return pictures

# ---------------------------------------------------------------------------------------------------------
# tokenizers, laid out as FLUX.1's


def train_tokenizers(folder, captions, t5_vocab, clip_vocab):
    """A T5-like tokenizer.json (unigram) and CLIP-like vocab.json + merges.txt (byte-level BPE) from captions.
    Every printable character has a token, so that any prompt can be read."""
    characters = [chr(c) for c in range(33, 127)]
    t5 = Tokenizer(models.Unigram())
    t5.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(),
                                          normalizers.Replace(Regex(r"\s+"), " ")])
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.decoder = decoders.Metaspace()
    t5.train_from_iterator(captions, trainers.UnigramTrainer(
        vocab_size=t5_vocab, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=characters))
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    t5.save(str(folder / "tokenizer_2" / "tokenizer.json"))

    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()
    clip.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    clip.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=clip_vocab - 514, end_of_word_suffix="</w>", special_tokens=[]))
    merges = [" ".join(pair) for pair in json.loads(clip.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")

# ---------------------------------------------------------------------------------------------------------
# training


@dataclass(frozen=True)
class Stage:
    name: str
    size: int                  # pixels
    scenes: int                # distinct ones
    batch: int
    steps: int
    lr: tuple                  # first and last, linear between, after a short warm-up
    ema: float = 0.999


FLUX_STAGES = (Stage("autoencoder", 256, 100_000, 32, 2_500, (1e-3, 1e-5)),
               Stage("flow 128", 128, 200_000, 512, 10_000, (1e-3, 1e-3)),
               Stage("flow 256", 256, 100_000, 512, 4_000, (1e-3, 1e-3)),
               Stage("flow 512", 512, 60_000, 256, 2_400, (1e-3, 1e-4)),
               Stage("guided 512", 512, 60_000, 256, 600, (3e-4, 0.0), ema=0.995))


def run_stage(stage, model, loss, folder, device):
    """Train `model` to lower loss(step's generator); leaves the averaged (EMA) weights in it.
    Writes a checkpoint every minute, goes on from one that is there, and returns the seconds spent."""
    file = folder / f"{stage.name.replace(' ', '-')}.pt"
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr[0], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first, spent = 0, 0.0
    if file.exists():
        saved = torch.load(file, map_location=device, weights_only=True)
        if saved["stage"] != repr(stage):
            raise common.Fail(f"{file} is of another recipe; delete {folder} to train from nothing")
        first, spent = saved["step"], saved["seconds"]
        ema.load_state_dict(saved["ema"])
        model.load_state_dict(saved["model"])
        if first < stage.steps:
            optimizer.load_state_dict(saved["optimizer"])
    start = written = time.monotonic()
    bar = tqdm(range(first, stage.steps), stage.name, initial=first, total=stage.steps, mininterval=2)
    for step in bar:
        done = step / stage.steps
        rate = ((1 - done) * stage.lr[0] + done * stage.lr[1]) * min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(torch.Generator(device).manual_seed(step))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
                        "optimizer": optimizer.state_dict()}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    model.load_state_dict(ema.state_dict())
    return spent + time.monotonic() - start


def half_precision(device):
    """bf16 autocast on a GPU; float32 on a CPU, where few are fast in anything else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class Painter(nn.Module):
    """The transformer with its two text encoders: what is trained together."""

    def __init__(self, config):
        super().__init__()
        self.flux, self.t5, self.clip = Flux(config.flux), T5Encoder(config.t5), CLIPTextEncoder(config.clip)
        for module in self.flux.modules():                           # adaLN-zero: every block starts as the identity
            for last in (getattr(module, "lin", None), getattr(module, "adaLN_modulation", [None])[-1]):
                if last is not None:
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
        nn.init.zeros_(self.flux.final_layer.linear.weight)
        nn.init.zeros_(self.flux.final_layer.linear.bias)

    def forward(self, x, t, t5_ids, clip_ids, guidance, layout):
        return self.flux(x, t, self.t5(t5_ids), self.clip(clip_ids)[1], guidance, layout)


def autoencoder_loss(autoencoder, scenes, stage, device):
    """Reconstruction, plus: latents' noise near standard (KL), their mean and spread over the batch standard."""
    forward = torch.compile(lambda pictures, noise: _autoencode(autoencoder, pictures, noise))

    def loss(generator):
        rng = random.Random(generator.initial_seed())
        side = rng.choice((1.0, 0.5))                                # half the batches look at pictures of twice the size
        window = (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side)
        pictures = draw(rng.sample(scenes, stage.batch), stage.size, device, window)
        z = autoencoder.config.z
        noise = torch.randn(stage.batch, z, stage.size // 8, stage.size // 8, generator=generator, device=device)
        with half_precision(device):
            return forward(pictures, noise)
    return loss


def _autoencode(autoencoder, pictures, noise):
    mean, logvar = autoencoder.encoder(pictures).float().chunk(2, dim=1)         # (B, z, h, w) each
    logvar = logvar.clamp(-12, 4)
    error = autoencoder.decoder(mean + (0.5 * logvar).exp() * noise).float() - pictures
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    spread, centre = torch.var_mean(mean, dim=(0, 2, 3))                         # (z,) each
    standard = (spread.clamp(min=1e-6).sqrt() - 1).square().mean() + centre.square().mean()
    return error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl + 1e-2 * standard


@torch.no_grad()
def cache_latents(autoencoder, scenes, size, device):
    """(n, z, size / 8, size / 8) half precision."""
    batch = max(1, 128 * 256**2 // size**2)
    latents = []
    for i in tqdm(range(0, len(scenes), batch), f"latents {size}", mininterval=2):
        with half_precision(device):
            latents.append(autoencoder.encode(draw(scenes[i:i + batch], size, device)).half())
    return torch.cat(latents)


def flow_loss(painter, teacher, latents, ids, empty, stage, device):
    """Flow matching on cached latents; with a teacher, matching its guided velocity instead."""
    layout = make_layout(painter.flux.config, stage.size // 16, stage.size // 16, ids[0].shape[1], device)
    shift = stage.size / 100      # towards noise: at 512 px it is above t = 0.9 that things find their places
    student = torch.compile(painter, dynamic=False)
    guide = torch.compile(teacher, dynamic=False) if teacher else None

    def loss(generator):
        def uniform():
            return torch.rand(stage.batch, generator=generator, device=device)
        index = torch.randint(len(latents), (stage.batch,), generator=generator, device=device)
        clean = patchify(latents[index].float())                     # (B, N, 4 z)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        t = uniform()
        t = shift * t / (1 + (shift - 1) * t)
        x = torch.lerp(clean, noise, t[:, None, None])
        t5_ids, clip_ids = (i[index].long() for i in ids)
        one = torch.ones_like(t)
        with half_precision(device):
            if guide is None:
                drop = uniform()[:, None] < 0.1
                t5_ids, clip_ids = (torch.where(drop, e, i) for e, i in zip(empty, (t5_ids, clip_ids)))
                guidance, target = one, noise - clean
            else:
                guidance = 1 + 4 * uniform()
                with torch.no_grad():
                    prompted = guide(x, t, t5_ids, clip_ids, one, layout)
                    unprompted = guide(x, t, *(e.expand_as(i) for e, i in zip(empty, (t5_ids, clip_ids))), one, layout)
                    target = unprompted + guidance[:, None, None] * (prompted - unprompted)
            velocity = student(x, t, t5_ids, clip_ids, guidance, layout)
        return F.mse_loss(velocity.float(), target.float())
    return loss


def train_flux(folder, work, device):
    """Every stage of FLUX_STAGES, then the weights as half-precision safetensors in folder, named as FLUX.1's."""
    config = CONFIGS["tiny"]
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(0)
    scenes = [make_scene(rng) for _ in tqdm(range(max(s.scenes for s in FLUX_STAGES)), "scenes", mininterval=2)]
    captions = [scene.caption for scene in scenes]
    train_tokenizers(folder, captions[:20_000], config.t5.vocab, config.clip.vocab)
    t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2" / "tokenizer.json")
    clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
    end = clip_tokenizer.token_to_id("<|endoftext|>")

    def both(prompts):
        return (tokenize(t5_tokenizer, prompts, config.text_length, 0)[0].short().to(device),
                tokenize(clip_tokenizer, prompts, config.clip.length, end)[0].short().to(device))
    ids, empty = both(captions), [e.long() for e in both([""])]

    def save(part, module):
        file = folder / config.files[part][0]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().half().contiguous().cpu() for name, p in module.state_dict().items()}, file)

    first, *stages = FLUX_STAGES
    autoencoder = Autoencoder(config.autoencoder).to(device)
    if device.type == "cuda":
        autoencoder.to(memory_format=torch.channels_last)
    seconds = run_stage(first, autoencoder, autoencoder_loss(autoencoder, scenes[:first.scenes], first, device), work, device)
    autoencoder.requires_grad_(False)
    save("autoencoder", autoencoder)

    painter, latents, size = Painter(config).to(device), None, None
    for stage in stages:
        if size != stage.size:
            latents, size = cache_latents(autoencoder, scenes[:stage.scenes], stage.size, device), stage.size
        teacher = copy.deepcopy(painter).requires_grad_(False) if stage.name.startswith("guided") else None
        seconds += run_stage(stage, painter, flow_loss(painter, teacher, latents, ids, empty, stage, device), work, device)
        for part, module in ("flux", painter.flux), ("t5", painter.t5), ("clip", painter.clip):
            save(part, module)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{folder}: trained in {seconds / 60:.1f} minutes on {where}, torch {torch.__version__}")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["flux"])
    parser.add_argument("--work", type=Path, default=Path("train"), help="folder of the checkpoints (default: train)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train_flux(Path(__file__).parent / CONFIGS["tiny"].weights, args.work, common.pick_device(args.device))


if __name__ == "__main__":
    common.run(main)
