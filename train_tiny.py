"""Trains the embedded models on drawn scenes (scenes.py), from nothing.

    python train_tiny.py flux              makes weights/flux-tiny: tokenizers, autoencoder, text encoders, transformer
    python train_tiny.py wan               weights/wan-tiny
    python train_tiny.py hunyuan           weights/hunyuan-tiny

Every model has a recipe (RECIPES), a list of stages that one loop (run_stage) runs. Interrupt it, run it again, and it
goes on from its last checkpoint:
    1. autoencoder     reconstruct drawn pictures; latents kept standard normal, so that scale = 1 and shift = 0. A
                       video's learns single frames first: many scenes at a time, which whole videos do not give it
    2. flow            v = noise - latents from cached latents, text encoders trained along, 10 % empty prompts. It
                       starts at 128 px, because there it is cheap to learn what goes where, and grows from there
    3. guided          FLUX.1-dev's and HunyuanVideo's guidance distillation: the student with guidance g in its input
                       learns v_empty + g (v_prompt - v_empty) of the frozen model of stage 2, for g from 1 up
                       (Wan2.1 computes that sum at every step of sampling instead)
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import argparse
import copy
import json
import math
import random
import re
import shutil
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

import cli
import flux_chipmunk
import hunyuan_chipmunk
import wan_chipmunk
from scenes import draw, draw_videos, make_moving_scene, make_scene
from text_encoders import load_clip_tokenizer, load_t5_tokenizer, tokenize

# ---------------------------------------------------------------------------------------------------------
# tokenizers, laid out as the big repositories'. Every printable character has a token, so that any prompt can be read.


def train_unigram(folder, captions, vocab, special, template):
    """A T5-like tokenizer.json from captions: special tokens first, number 0 of them the padding; template puts some
    around the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(),
                                                 normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(captions, trainers.UnigramTrainer(
        vocab_size=vocab, special_tokens=special, unk_token="<unk>", initial_alphabet=[chr(c) for c in range(33, 127)]))
    numbered = [(token, special.index(token)) for token in template.split() if token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbered)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_t5_tokenizer(folder / "tokenizer.json")


def train_bpe(folder, captions, vocab):
    """A CLIP-like vocab.json + merges.txt (byte-level BPE) from captions."""
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()
    words = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    clip.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    clip.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab - 514, end_of_word_suffix="</w>", special_tokens=[]))
    merges = [" ".join(pair) for pair in json.loads(clip.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
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
    zero: str                  # pattern of the transformer's parameters that start at 0: every block as the identity
    stages: tuple              # of Stage: the autoencoder's, then the painters'
    make_scene: Callable       # (rng) -> Scene
    make_reader: Callable      # (folder, captions, config): writes tokenizers -> read(B prompts) -> tensors (B, L)
    encode: Callable           # (autoencoder, pictures) -> mean and log variance of the latents (B, 2 z, ...)
    make_layout: Callable      # (config, grid, device) -> the model's layout
    velocity: Callable         # (painters, latents, t, prompts' tensors, guidance, layout) -> velocity


def flux_reader(folder, captions, config):
    t5 = train_unigram(folder / "tokenizer_2", captions, config.t5.vocab, ["<pad>", "</s>", "<unk>"], "$A </s>")
    clip = train_bpe(folder / "tokenizer", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")
    return lambda prompts: (tokenize(t5, prompts, config.text_length, 0)[0],
                            tokenize(clip, prompts, config.clip.length, end)[0])


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


HUNYUAN_TEXT = 48              # tokens: no caption has more, and masked attention likes multiples of 16


def hunyuan_reader(folder, captions, config):
    special = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<unk>"]
    llama = train_unigram(folder / "tokenizer", captions, config.llama.vocab, special, "<|begin_of_text|> $A")
    clip = train_bpe(folder / "tokenizer_2", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")

    def read(prompts):
        texts = [config.template.format(prompt) for prompt in prompts]
        ids, mask, _ = tokenize(llama, texts, config.crop + HUNYUAN_TEXT, 0)
        return ids, mask[:, config.crop:], tokenize(clip, prompts, config.clip.length, end)[0]
    return read


def hunyuan_velocity(painters, x, t, tokens, guidance, layout):
    llama_ids, mask, clip_ids = tokens
    text, pooled = painters.llama(llama_ids)[:, -mask.shape[1]:], painters.clip(clip_ids)[1]
    return painters.hunyuan(x, t, text, pooled, guidance, layout, mask)


RECIPES = {
    "flux": Recipe(
        program=flux_chipmunk,
        files={part: file for part, (file,) in flux_chipmunk.CONFIGS["tiny"].files.items()},
        autoencoder="autoencoder", painters=("flux", "t5", "clip"), zero=r"\.lin\.|final_layer",
        stages=(Stage("autoencoder", 256, 100_000, 32, 2_500, (1e-3, 1e-5)),
                Stage("flow 128", 128, 100_000, 512, 4_220, (1e-3, 1e-3)),
                Stage("flow 256", 256, 60_000, 512, 6_500, (1e-3, 5e-4)),
                Stage("flow 512", 512, 16_000, 256, 1_560, (5e-4, 5e-5)),
                Stage("guided 512", 512, 16_000, 256, 360, (3e-4, 0.0), ema=0.99, guidance=5.0)),
        make_scene=make_scene, make_reader=flux_reader, velocity=flux_velocity,
        encode=lambda autoencoder, pictures: autoencoder.encoder(pictures),
        make_layout=lambda config, grid, device:
            flux_chipmunk.make_layout(config.flux, *grid, config.text_length, device)),
    "wan": Recipe(
        program=wan_chipmunk, files=wan_chipmunk.FILES,
        autoencoder="vae", painters=("wan", "umt5"), zero=r"time_proj|scale_shift_table|attn2\.to_out|^proj_out",
        stages=(Stage("autoencoder 1", 128, 40_000, 16, 1_000, (6e-4, 6e-4), frames=1),
                Stage("autoencoder 17", 128, 40_000, 4, 5_200, (6e-4, 1e-5), frames=17),
                Stage("flow 128", 128, 20_000, 384, 5_000, (1e-3, 1e-3), frames=17),
                Stage("flow 256", 256, 16_000, 128, 4_400, (1e-3, 1e-5), frames=17)),
        make_scene=make_moving_scene, make_reader=wan_reader, velocity=wan_velocity,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos, {})),
        make_layout=lambda config, grid, device:
            wan_chipmunk.make_layout(config.wan, grid, config.window, device)),
    "hunyuan": Recipe(
        program=hunyuan_chipmunk, files=hunyuan_chipmunk.FILES,
        autoencoder="vae", painters=("hunyuan", "llama", "clip"),
        zero=r"norm1(_context)?\.linear|norm\.linear|norm_out\.linear|^proj_out",
        stages=(Stage("autoencoder 1", 128, 40_000, 16, 1_000, (6e-4, 6e-4), frames=1),
                Stage("autoencoder 17", 128, 40_000, 4, 5_000, (6e-4, 1e-5), frames=17),
                Stage("flow 128", 128, 20_000, 256, 5_000, (1e-3, 1e-3), frames=17),
                Stage("flow 256", 256, 16_000, 128, 4_400, (1e-3, 1e-5), frames=17),
                Stage("guided 256", 256, 16_000, 128, 520, (3e-4, 0.0), ema=0.995, frames=17, guidance=7.0)),
        make_scene=make_moving_scene, make_reader=hunyuan_reader, velocity=hunyuan_velocity,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos)),
        make_layout=lambda config, grid, device:
            hunyuan_chipmunk.make_layout(config.hunyuan, grid, HUNYUAN_TEXT, device))}

# ---------------------------------------------------------------------------------------------------------
# training


def make_optimizers(model):
    """Muon for the matrices inside the blocks of a transformer, which it teaches faster; AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2
                and re.search(r"(blocks?|layers)\.\d+\.", name) and "relative_attention_bias" not in name]
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
            raise cli.Fail(f"{file} is of another recipe; delete {folder} to train from nothing")
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
            saved = {"stage": repr(stage), "step": step + 1, "seconds": seconds,
                     "model": model.state_dict(), "ema": ema.state_dict(),
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(saved, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    model.load_state_dict(ema.state_dict())
    return spent + time.monotonic() - start


def half_precision(device):
    """bf16 autocast on a GPU; float32 on a CPU: few CPUs are fast in anything else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def channels_last(model):
    """Convolutions run faster with the channels innermost; they take over their weights' layout."""
    for p in model.parameters():
        if p.dim() in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.dim() == 4 else torch.channels_last_3d)


@torch.no_grad()
def make_autoencoder(recipe, config):
    """The autoencoder. In a video's, the convolutions around the latents start as the identity and with little noise
    between them, so that the decoder soon sees what the encoder says. Wan2.1's puts zeros before the first frame, from
    which single frames learn nothing: there no frame looks back at first, and time is halved and doubled by leaving out
    and repeating."""
    autoencoder = recipe.program.parts(config)[recipe.autoencoder]()
    for name, conv in autoencoder.named_modules():
        if name in ("quant_conv", "post_quant_conv"):
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
        elif isinstance(conv, wan_chipmunk.CausalConv) or name.endswith("time_conv"):
            conv.weight[:, :, :-1] = 0.0
            if name.endswith("time_conv"):                           # C -> C or, for two frames, 2 C
                copies = conv.out_channels // conv.in_channels
                conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(copies, 1)
                nn.init.zeros_(conv.bias)
        if name == "quant_conv":
            conv.bias[config.vae.z:] = -4.0                          # log variance
    return autoencoder


def show(scenes, stage, device, window=(0.0, 0.0, 1.0)):
    """Pictures (B, 3, size, size) or videos (B, 3, frames, size, size) of scenes."""
    if stage.frames:
        return draw_videos(scenes, stage.size, stage.frames, device, window)
    return draw(scenes, stage.size, device, window)


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
        side = rng.choice((1.0, 0.5))                                # half the batches see pictures of twice the size
        window = (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side)
        pictures = show(rng.sample(scenes, stage.batch), stage, device, window)
        for _ in range(3 if stage.frames else 0):                    # videos show one thing: four in one teach more
            more = rng.sample(scenes, stage.batch)
            pictures = draw_videos(more, stage.size, stage.frames, device, window, pictures)
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
    """The transformer and its text encoders, with the zeros that the recipe wants."""
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
    shift = 0.16 * math.prod(stage.grid)**0.5                        # towards noise: things find their places early
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
                    nothing = [e.expand_as(i) for e, i in zip(empty, prompts)]               # (B, L) each
                    prompted = recipe.velocity(teacher, x, t, prompts, one, layout)
                    unprompted = recipe.velocity(teacher, x, t, nothing, one, layout)
                    weight = guidance.view(-1, *[1] * (clean.dim() - 1))
                    target = unprompted + weight * (prompted - unprompted)
            velocity = recipe.velocity(painters, x, t, prompts, guidance, layout)
        return F.mse_loss(velocity.float(), target.float())
    return loss


def save(module, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().half().contiguous().cpu() for name, p in module.state_dict().items()}, file)


def train(recipe, folder, work, device):
    """Run every stage of a recipe. The weights go into folder as half-precision safetensors, laid out as the model's
    repository, when all are trained; until then they are in work / "weights"."""
    config = recipe.program.CONFIGS["tiny"]
    written = work / "weights"
    files = {part: written / file for part, file in recipe.files.items()}
    try:
        written.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.Fail(f"--work {work}: {error.strerror}; choose another folder") from None
    torch.manual_seed(0)
    rng = random.Random(0)
    most = max(stage.scenes for stage in recipe.stages)
    scenes = [recipe.make_scene(rng) for _ in tqdm(range(most), "scenes", mininterval=2)]
    captions = [scene.caption for scene in scenes]
    read = recipe.make_reader(written, captions[:20_000], config)
    tokens, empty = ([i.to(device) for i in read(prompts)] for prompts in (captions, [""]))          # (n, L), (1, L)

    autoencoder, painters = make_autoencoder(recipe, config).to(device), make_painters(recipe, config).to(device)
    channels_last(autoencoder)
    latents, size, seconds = None, None, 0.0
    for stage in recipe.stages:
        if stage.name.startswith("autoencoder"):
            loss = autoencoder_loss(recipe, autoencoder, scenes[:stage.scenes], stage, device)
            seconds += run_stage(stage, autoencoder, loss, work, device)
            save(autoencoder, files[recipe.autoencoder])
            continue
        if size != stage.size:
            latents, size = cache_latents(autoencoder, scenes[:stage.scenes], stage, work, device), stage.size
        teacher = copy.deepcopy(painters).requires_grad_(False) if stage.guidance else None
        layout = recipe.make_layout(config, stage.grid, device)
        loss = flow_loss(recipe, painters, teacher, latents, tokens, empty, stage, layout, device)
        seconds += run_stage(stage, painters, loss, work, device)
        for part in recipe.painters:
            save(painters[part], files[part])
    shutil.copytree(written, folder, dirs_exist_ok=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    cli.say(f"{folder}: trained in {seconds / 60:.1f} minutes on {where}, torch {torch.__version__}")


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path("train"), help="folder of the checkpoints (default: train)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    recipe = RECIPES[args.model]
    folder = recipe.program.CONFIGS["tiny"].weights
    train(recipe, folder, args.work / args.model, cli.pick_device(args.device))


if __name__ == "__main__":
    cli.run(main)
