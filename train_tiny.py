"""Trains the embedded models on drawn scenes (scenes.py), from nothing, in one piece.

    python train_tiny.py flux         makes weights/flux-tiny: tokenizers, autoencoder, text encoders, transformer
    python train_tiny.py wan          weights/wan-tiny
    python train_tiny.py hunyuan      weights/hunyuan-tiny
    torchrun --nproc_per_node 4 train_tiny.py hunyuan      on four GPUs, each of which learns from a quarter of a batch

The recipe of each is a list of stages (recipes.py), which one loop (train_stage) runs:
    1. autoencoder    reconstruct drawn pictures; latents are kept standard normal, so that scale = 1 and shift = 0. A
                      video's learns single frames first: more scenes at a time, which is what it lacks with videos
    2. flow           v = noise - latents from cached latents, text encoders trained along, 10 % empty prompts; at small
                      sizes or on single frames first, where shapes and places are cheap to learn. A block in the middle
                      also learns to tell the scene in plain colours ("outlines"): most of v is texture, which nobody
                      can foresee, and would drown the few pixels by which a fish differs from a heart
    3. guided         FLUX.1-dev's and HunyuanVideo's guidance distillation: the student with guidance g in its input
                      learns v_empty + g (v_prompt - v_empty) of the frozen model of stage 2, for g from 1 up
                      (Wan2.1 computes that sum at every step of sampling instead). FLUX.1's does 2 and 3 once more,
                      on other scenes: 2 teaches what g = 1 means

Interrupt it and run it again: it goes on from its last checkpoint (train/MODEL), as if nothing had happened. What a
step does depends on its number alone. Beside the checkpoints lie sheets of samples (PNG), drawn by averaged weights.
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import argparse
import copy
import math
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import checkpoints
import cli
import media
import processes
import scenes
import wan_chipmunk
from compiled import compile_blocks
from recipes import RECIPES

SAMPLES = 8                    # held-out scenes on a sheet
SHEETS = 3                     # sheets a stage
CAPTIONS = 5_000               # that the tokenizer learns its words from
CHECKPOINT_SECONDS = 30        # between two checkpoints
OUTLINES = 2.0                 # weight of their loss
LEAST_LOGVAR = -4.6            # of latents: noise of 0.1 at least, so that the decoder forgives a transformer's errors

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
    y = x.bfloat16() if x.is_cuda else x                             # bf16 products take 20 times as long on some CPUs
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
        saved = load_checkpoint(file, device)
        if saved["stage"] != repr(stage):
            raise cli.Fail(f"{file} is of another recipe; delete {work} to train from nothing")
        first, began = saved["step"], time.monotonic() - saved["seconds"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    rank, processes = place()
    loss = make_loss() if first < stage.steps else None
    written = time.monotonic()
    bar = tqdm(range(first, stage.steps), stage.name, initial=first, total=stage.steps, mininterval=2)
    for step in bar:
        for optimizer, factor in zip(optimizers, (1, 3)):
            for group in optimizer.param_groups:
                group["lr"] = factor * learning_rate(step, stage)
        value = loss(torch.Generator(device).manual_seed(step * processes + rank))
        value.backward()
        share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(stage.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", lr=f"{learning_rate(step, stage):.1e}")
        finished = step + 1
        if rank:                                                     # of several processes one writes
            continue
        if finished % (stage.steps // SHEETS) == 0:
            media.write_png(work / f"{stage.name}, {finished} steps.png", *draw_sheet(ema))
        if finished == stage.steps or time.monotonic() - written > CHECKPOINT_SECONDS:
            written = time.monotonic()
            save_checkpoint({"stage": repr(stage), "step": finished, "seconds": written - began,
                             "model": model.state_dict(), "ema": ema.state_dict(),
                             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, file)
    model.load_state_dict(ema.state_dict())
    return began


def place():
    """-> this process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_gradients(model):
    """Each process has learned from scenes of its own: let all have the mean of their gradients."""
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        mean = torch.cat([grad.flatten() for grad in grads]) / dist.get_world_size()
        with processes.others_alive():
            dist.all_reduce(mean)
        torch._foreach_copy_(grads, [g.view_as(grad) for g, grad in zip(mean.split([g.numel() for g in grads]), grads)])


def write(file, save):
    """save(temporary name), and only then is it `file`: what a run finds is complete. Raises Fail if that fails."""
    try:
        media.write_whole(file, False, save)
    except (RuntimeError, SafetensorError) as error:                 # so torch and safetensors say that a disk is full
        if cli.out_of_memory(error):
            raise
        raise cli.Fail(f"cannot write {file}: {checkpoints.reason(error)}; is the disk full? What was written before "
                       "is kept: run again to go on") from None


def save_checkpoint(values, file):
    write(file, lambda temporary: torch.save(values, temporary))


def load_checkpoint(file, device):
    """What save_checkpoint saved. Raises Fail if it cannot be read."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:                                       # torch raises nothing narrower
        if cli.out_of_memory(error):
            raise
        raise cli.Fail(f"{file} is damaged ({checkpoints.reason(error)}); delete it, and run again") from None


def half_precision(device):
    """bf16 autocast on a GPU; float32 on a CPU, where few are fast in anything else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def show(some, stage, device):
    """Pictures (B, 3, size, size) or videos (B, 3, frames, size, size) of some scenes."""
    if stage.frames:
        return scenes.draw_videos(some, stage.size, stage.frames, device)
    return scenes.draw(some, stage.size, device)


def show_all(recipe, stage, rng, device):
    """Makes this process's share of a stage's scenes, many at a time. -> (the scenes, their pictures or videos), ..."""
    rank, processes = place()
    own = [recipe.make_scene(rng, more=stage.more) for _ in range(stage.scenes)][rank::processes]
    batch = min(1024, max(1, 512 * 256**2 // (stage.size**2 * max(1, stage.frames))))        # a few gigabytes of noise
    for i in tqdm(range(0, len(own), batch), f"{stage.name}: scenes", mininterval=2):
        yield own[i:i + batch], show(own[i:i + batch], stage, device)


def to_bytes(pictures):
    return (127.5 * (pictures + 1)).round().byte()


def from_bytes(pictures):
    return pictures.float() / 127.5 - 1


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
        pictures = torch.cat([to_bytes(some) for _, some in shown])              # (n, 3, [T,] size, size)

        def loss(generator):
            rng = random.Random(generator.initial_seed())
            x, y = (rng.randrange(stage.size - stage.crop + 1) for _ in range(2))
            index = torch.randint(len(pictures), (stage.batch,), generator=generator, device=device)
            squares = from_bytes(pictures[index, ..., y:y + stage.crop, x:x + stage.crop])
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
    """-> latents (n, z, ..., size / 8, size / 8) in half precision; outlines (n, N, 48), bytes; n captions. outlines:
    of each token 4 x 4 colours of the same scene without surfaces. Kept in a file for the next start."""
    which = " ".join(("latents", str(stage.size), *stage.more))
    file = work / f"{which}, {stage.frames} frames, {place()[1]} processes.pt"
    if not file.exists():
        latents, outlines, captions = [], [], []
        for some, pictures in show_all(recipe, stage, random.Random(stage.size), device):
            with half_precision(device):
                latents.append(autoencoder.encode(pictures).half())
            small = replace(stage, size=stage.size // 4)
            plain = show([scenes.without_surfaces(scene) for scene in some], small, device)
            plain = plain.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))          # (B, 3, [T,] h, 4, w, 4)
            if stage.frames:
                plain = plain[:, :, ::4]                                         # the last frame of each latent
            outlines.append(to_bytes(plain.movedim((1, -3, -1), (-3, -2, -1)).flatten(-3).flatten(1, -2)))
            captions += [scene.caption for scene in some]
        save_checkpoint((torch.cat(latents), torch.cat(outlines), captions), file)
    return load_checkpoint(file, device)

# ---------------------------------------------------------------------------------------------------------
# the transformer


def make_painters(recipe, config):
    """The transformer and its text encoders, with zeros where the recipe wants them, and "outlines": what the middle
    block's tokens tell of them."""
    makers = recipe.program.parts(config)
    painters = nn.ModuleDict({part: makers[part]() for part in recipe.painters})
    transformer = painters[recipe.painters[0]]
    for name, p in transformer.named_parameters():
        if re.search(recipe.zero, name):
            nn.init.zeros_(p)
    painters["outlines"] = nn.Linear(transformer.config.dim, 3 * 4 * 4)
    painters.middle = []                                             # where the middle block leaves its output

    def leave(block, inputs, output):
        if torch.is_grad_enabled():
            painters.middle.append(output)
    transformer.get_submodule(recipe.middle).register_forward_hook(leave)
    return painters


def shifted(t, stage):
    """Times t in 0..1, moved towards noise, the more the more tokens there are: there things find their places."""
    shift = max(1.0, 0.18 * math.prod(stage.grid)**0.5)
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
        latents, outlines, captions = cache_latents(recipe, autoencoder, stage, work, device)
        tokens = numbers(captions)
        for model in painters, teacher or painters:
            compile_blocks(model, dynamic=False)

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
                middle, n = painters.middle.pop(), outlines.shape[1]
                told = painters.outlines(middle[:, -n:] if recipe.text_first else middle[:, :n])     # (B, N, 48)
            seen = from_bytes(outlines[index][:, layout.order])      # (B, N, 48)
            return F.mse_loss(velocity.float(), target.float()) + OUTLINES * F.mse_loss(told.float(), seen)
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
    weights = {name: p.detach().half().contiguous().cpu() for name, p in module.state_dict().items()}
    write(file, lambda temporary: save_file(weights, temporary))


def train(recipe, folder, work, device):
    """Run every stage of a recipe. The weights go into folder as half-precision safetensors, laid out as in the model's
    repository, when all are trained; until then they are in work / "weights". Of several processes the first writes
    them, and all go on from its checkpoints; what else each one keeps is in a folder of its own."""
    began, (rank, processes) = time.monotonic(), place()
    own = work / f"process {rank}" if rank else work
    config, weights = recipe.program.CONFIGS["tiny"], own / "weights"
    try:
        weights.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.Fail(f"--work {work}: {error.strerror}; choose another folder") from None
    if device.type == "cuda":
        scenes.noise = torch.compile(scenes.noise, dynamic=True)     # most of the time that drawing takes
    torch.manual_seed(0)
    rng = random.Random(0)
    read = recipe.make_reader(weights, [recipe.make_scene(rng).caption for _ in range(CAPTIONS)], config)
    held_out = [recipe.make_scene(rng, train=False, plain=True) for _ in range(4 * SAMPLES)]
    autoencoder, painters = make_autoencoder(recipe, config).to(device), make_painters(recipe, config).to(device)
    for stage in recipe.stages:
        share = replace(stage, batch=-(-stage.batch // processes))   # this process's
        if stage.crop:
            model, trained = autoencoder, {recipe.autoencoder: autoencoder}
            make_loss, draw_sheet = autoencoder_stage(recipe, autoencoder, share, held_out, device)
        else:
            model, trained = painters, painters
            make_loss, draw_sheet = flow_stage(recipe, painters, autoencoder, share, read, held_out, own, device)
        began = train_stage(stage, model, make_loss, draw_sheet, work, began, device)
        for part in trained.keys() & recipe.files.keys():
            save(trained[part], weights / recipe.files[part])
    if rank:
        return
    try:
        shutil.copytree(weights, folder, dirs_exist_ok=True)
    except OSError as error:
        raise cli.Fail(f"cannot copy {weights} to {folder} ({checkpoints.reason(error)}); copy it there") from None
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    where = f"{processes} x {where}" if processes > 1 else where
    cli.say(f"{folder}: trained in {(time.monotonic() - began) / 60:.1f} minutes on {where}, torch {torch.__version__}")


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path("train"), help="folder of checkpoints (default: train)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    recipe = RECIPES[args.model]
    folder = recipe.program.CONFIGS["tiny"].weights
    device = cli.pick_device(args.device)
    if processes.several():
        processes.meet(device)
    train(recipe, folder, args.work / args.model, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    processes.run(main)
