"""Makes the tables of README.md and results.md.

    python bench.py score      does FLUX.1's tiny model draw what the prompt says, dense and with Chipmunk
                               (sooner with --captions 20)
    python bench.py caching    what it costs to skip steps and compute the others densely: what sparse steps must beat
    python bench.py frontier   how close to dense at which speed: step caching, the paper's rule, ours, the presets
    python bench.py presets    how much faster the presets make the real models, by the times of `speed` and `whole`
    python bench.py speed      how long the steps of FLUX.1-dev take, dense and with Chipmunk (on a GPU)
    python bench.py whole      a run of it from noise to pixels, by kind of step, and the memory it takes (on a GPU)
    python bench.py kernels    how fast the kernels are on this GPU, against the framework's fastest dense ones
    torchrun --nproc_per_node 2 bench.py speed     how long the steps take on several GPUs, and what their talk takes

All but presets and kernels take --model wan and --model hunyuan as well; python bench.py score --help and so on have
their flags. score, caching and frontier draw captions whose combination of colour, shape and relation or motion was
held out of training; score looks for what they ask for in the pixels (scenes.py).
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import argparse
import json
import random
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

import checkpoints
import cli
import flux_chipmunk
import hunyuan_chipmunk
import media
import memory
import parallel
import processes
import replay
import wan_chipmunk
from cache import make_state
from compiled import compile_blocks, compile_seconds
from offload import homes, move_caches, move_weights
from plan import MODES, Sparsity, all_but, fit_steps, make_plan
from scenes import check, check_videos, make_moving_scene, make_scene, turned_shapes
from sparse_kernels import (GROUP, POOL, Pooled, attention, attention_triton, attention_with_column_mass, block_means,
                            choose_columns, column_sparse_attention, count_unlisted, listed_columns, sparse_mlp_fc1,
                            sparse_mlp_fc2, triton)

BATCH = 20                     # pictures or videos drawn at a time
SPEED_STEPS = 12               # that `speed` times
VIDEO_SKIPS = (7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43)
# The original's rule and plan of 50 steps, without its window of voxels and its order of tokens, and with our choice of
# MLP columns. For HunyuanVideo and Wan2.1 it skips steps, which repeat the last one; for FLUX.1 it does not.
MANY, MANY_SPARSE = 0.30, "sparse, 30 % of the MLP"      # of the MLP's columns, as the original; such steps take longer
ORIGINAL = {"flux": {"delta": "paper", "mlp_keep": MANY, "full": (1, 10, 20, 30, 40), "choose": 1, "skip": (),
                     "drift": False},
            "wan": {"delta": "paper", "full": (1, 10, 20, 30, 40), "choose": 1, "skip": VIDEO_SKIPS, "drift": False,
                    "extrapolate": 0},
            "hunyuan": {"delta": "paper", "full": (1, 10, 40), "choose": 1, "skip": VIDEO_SKIPS, "drift": False,
                        "extrapolate": 0}}


def print_row(*cells):
    cli.say(f"| {' | '.join(cells)} |")


def print_header(*cells):
    print_row(*cells)
    print_row(*["---"] * len(cells))


def where(device):
    """What a table was measured on."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    return f"{name}, torch {torch.__version__}"

# ---------------------------------------------------------------------------------------------------------
# sampling: noise and texts of a batch -> latents; dense without a sparsity. watch(plan) -> the plan's steps, one by
# one; ranks: from parallel.start; resident: how many layers' caches stay on the GPU, None: all


def sample_flux(flux, noise, text, pooled, config, steps, sparsity, seed, watch=iter, ranks=None, resident=None):
    """noise (B, z, 2h, 2w) -> latents, likewise."""
    h, w = (side // 2 for side in noise.shape[-2:])
    layout = flux_chipmunk.make_layout(config.flux, h, w, text.shape[1], noise.device, ranks)
    sigmas = flux_chipmunk.make_sigmas(steps, h * w, config.shift)
    plan = watch(make_plan(steps, sparsity))
    layers, tokens = len(flux.double_blocks) + len(flux.single_blocks), text.shape[1] + h * w
    state = move_caches(make_state(layers, sparsity, tokens, None, seed, noise.device), resident, noise.device)
    x = flux_chipmunk.patchify(noise)                                # (B, h w, 4 z)
    x = flux_chipmunk.sample(flux, x, text, pooled, config.guidance, sigmas, layout, plan, state)
    return flux_chipmunk.unpatchify(x, h, w)


def sample_wan(wan, noise, texts, config, steps, sparsity, seed, watch=iter, ranks=None, resident=None):
    """noise (B, z, t, 2h, 2w), texts of the prompts and of the negative prompt -> latents, shaped as the noise."""
    t, h, w = noise.shape[2:]
    layout = wan_chipmunk.make_layout(config.wan, (t, h // 2, w // 2), config.window, noise.device, ranks)
    texts = parallel.own_branches(ranks, texts)
    schedule = wan_chipmunk.make_schedule(steps, config.shift)
    plan = watch(make_plan(steps, sparsity))
    states = [make_state(len(wan.blocks), sparsity, len(layout.order), layout.static, seed, noise.device)
              for _ in texts]
    for state in states:
        move_caches(state, resident, noise.device)
    return wan_chipmunk.sample(wan, noise, texts, config.guidance, schedule, layout, plan, states, ranks)


def sample_hunyuan(hunyuan, noise, text, pooled, config, steps, sparsity, seed, watch=iter, ranks=None, resident=None):
    """noise (B, z, t, 2h, 2w), text without padding -> latents, shaped as the noise."""
    t, h, w = noise.shape[2:]
    grid = t, h // 2, w // 2
    layout = hunyuan_chipmunk.make_layout(config.hunyuan, grid, text.shape[1], noise.device, ranks)
    sigmas = hunyuan_chipmunk.make_sigmas(steps, config.shift)
    plan = watch(make_plan(steps, sparsity))
    layers = len(hunyuan.transformer_blocks) + len(hunyuan.single_transformer_blocks)
    state = make_state(layers, sparsity, len(layout.order), layout.static, seed, noise.device)
    move_caches(state, resident, noise.device)
    return hunyuan_chipmunk.sample(hunyuan, noise, text, pooled, config.guidance, sigmas, layout, plan, state)

# ---------------------------------------------------------------------------------------------------------
# score. The three ways to draw return batches of caption numbers, and generate(batch, sparsity) -> pictures
# (B, 3, H, W) or videos (B, 3, T, H, W) in -1..1


def draw_with_flux(captions, config, device):
    text, pooled = flux_chipmunk.encode_prompts(captions, config, config.weights, device, torch.float32)
    flux, autoencoder = (flux_chipmunk.load_part(part, config, config.weights, device, torch.float32)
                         for part in ("flux", "autoencoder"))
    flux.lay_out_for_deltas()
    side = config.size // 16

    def generate(batch, sparsity, steps=config.steps):
        noise = [flux_chipmunk.make_noise(config.autoencoder.z, side, side, seed) for seed in batch.tolist()]
        noise = torch.cat(noise).to(device).float()                  # (B, z, 2 side, 2 side)
        x = sample_flux(flux, noise, text[batch], pooled[batch], config, steps, sparsity, int(batch[0]))
        return autoencoder.decode(x).clamp(-1, 1)                    # (B, 3, H, W)
    return torch.arange(len(captions)).split(BATCH), generate


def draw_with_wan(captions, config, device):
    prompts = [*captions, config.negative_prompt]
    texts = wan_chipmunk.encode_prompts(prompts, config, config.weights, device, torch.float32)
    texts, negative = texts[:-1], texts[-1:]                         # (captions, L, text_dim), (1, L, text_dim)
    wan, vae = (wan_chipmunk.load_part(part, config, config.weights, device, torch.float32)
                for part in ("wan", "vae"))
    shape = config.frames // 4 + 1, config.height // 8, config.width // 8

    def generate(batch, sparsity, steps=config.steps):
        noise = [wan_chipmunk.make_noise(config.wan.channels, *shape, seed) for seed in batch.tolist()]
        noise = torch.cat(noise).to(device)                          # (B, z, t, 2h, 2w)
        both = texts[batch], negative.expand(len(batch), -1, -1)
        x = sample_wan(wan, noise, both, config, steps, sparsity, int(batch[0]))
        return torch.cat([vae.decode(latents) for latents in x.split(1)]).clamp(-1, 1)       # (B, 3, T, H, W)
    return torch.arange(len(captions)).split(BATCH), generate


def draw_with_hunyuan(captions, config, device):
    text, mask, pooled = hunyuan_chipmunk.encode_prompts(captions, config, config.weights, device, torch.float32)
    hunyuan, vae = (hunyuan_chipmunk.load_part(part, config, config.weights, device, torch.float32)
                    for part in ("hunyuan", "vae"))
    grid = config.frames // 4 + 1, config.height // 16, config.width // 16       # (t, h, w) in tokens
    lengths = mask.sum(1).cpu()                                      # a batch has captions of one length, so no padding
    same_length = [(lengths == n).nonzero()[:, 0] for n in lengths.unique()]

    def generate(batch, sparsity, steps=config.steps):
        noise = [hunyuan_chipmunk.make_noise(config.hunyuan.z, grid, seed) for seed in batch.tolist()]
        noise = torch.cat(noise).to(device).float()                  # (B, z, t, 2h, 2w)
        real_text = text[batch, :lengths[batch[0]]]                  # (B, T, text_dim)
        x = sample_hunyuan(hunyuan, noise, real_text, pooled[batch], config, steps, sparsity, int(batch[0]))
        return torch.cat([vae.decode(latents) for latents in x.split(1)]).clamp(-1, 1)       # (B, 3, T, H, W)
    return [batch for captions in same_length for batch in captions.split(BATCH)], generate


DRAW = {"flux": (flux_chipmunk, draw_with_flux), "wan": (wan_chipmunk, draw_with_wan),
        "hunyuan": (hunyuan_chipmunk, draw_with_hunyuan)}


def prepare(args):
    """-> the tiny model's Config, the device, held-out scenes, what the judge compares shapes with, and batches and
    generate for the scenes' captions (above)."""
    program, draw_with = DRAW[args.model]
    config, device = program.CONFIGS["tiny"], cli.pick_device(args.device)
    rng = random.Random(2506)
    make = make_scene if args.model == "flux" else make_moving_scene
    scenes = [make(rng, train=False, plain=True) for _ in range(args.captions)]
    templates = turned_shapes(device)
    return config, device, scenes, templates, *draw_with([scene.caption for scene in scenes], config, device)


def looked_at(scenes, drawn, templates):
    """How right drawn pictures (B, 3, H, W) or videos (B, 3, T, H, W) are: for each of their scenes the five numbers of
    scenes.check."""
    if drawn.dim() == 5:
        return check_videos(scenes, drawn, templates)
    return [check(scene, picture, templates) for scene, picture in zip(scenes, drawn)]


def likeness(dense, drawn):
    """-> [(PSNR, SSIM)] of pictures (B, 3, H, W) or videos (B, 3, T, H, W)"""
    if drawn.dim() == 5:
        dense, drawn = dense.transpose(1, 2), drawn.transpose(1, 2)  # (B, T, 3, H, W)
    else:
        dense, drawn = dense[:, None], drawn[:, None]                # (B, 1, 3, H, W)
    return [(media.psnr(*pair), media.ssim(*pair)) for pair in zip(dense, drawn)]


@torch.no_grad()
def score(args):
    config, device, scenes, templates, batches, generate = prepare(args)
    steps = config.steps
    variants = {"dense": None}
    variants |= {f"preset {name}": preset for name, preset in config.presets.items()}
    variants["the paper's rule and plan"] = replace(config.presets["columns"], **ORIGINAL[args.model])

    totals = {name: [0] * 5 for name in variants}
    alike = {name: [] for name in variants}
    for batch in tqdm(batches, "batches of captions"):
        dense = generate(batch, None)                                # (B, 3, H, W) or (B, 3, T, H, W)
        for name, sparsity in variants.items():
            drawn = dense if sparsity is None else generate(batch, sparsity)
            checks = looked_at([scenes[i] for i in batch], drawn, templates)
            totals[name] = [sum(column) for column in zip(totals[name], *checks)]
            alike[name] += likeness(dense, drawn)

    related = "relations right" if args.model == "flux" else "motions right"
    print_header(f"{args.model} tiny, {args.captions} captions, {steps} steps", "things right", related,
                 "backgrounds right", "PSNR to dense", "SSIM")
    for name, (things, asked, related, relations, background) in totals.items():
        psnrs, ssims = zip(*alike[name])
        quality = ("-", "-") if name == "dense" else (f"{mean(psnrs):.2f} dB", f"{mean(ssims):.4f}")
        print_row(name, f"{things / asked:.1%}", f"{related / max(1, relations):.1%}",
                  f"{background / args.captions:.1%}", *quality)
    cli.say(f"\n({where(device)}, float32)")

# ---------------------------------------------------------------------------------------------------------
# caching: every layer dense, and some steps skipped


def skipping_plans(steps, speedup):
    """Ways to compute only `steps` / `speedup` steps: the first few, then one of every so many.
    -> {(first, every): the steps skipped}"""
    plans = {}
    for every in 2, 3, 4, 5, 6, 8:
        for first in range(1, steps):
            skipped = tuple(i for i in range(first, steps) if (i - first + 1) % every)
            if steps - len(skipped) == round(steps / speedup):
                plans[first, every] = skipped
                break
    return plans


@torch.no_grad()
def caching(args):
    config, device, *_, batches, generate = prepare(args)
    steps = args.steps or config.steps
    plans = {(speedup, *plan): skipped for speedup in (1.5, 2.0, 2.2, 2.5, 2.75, 3.5)
             for plan, skipped in skipping_plans(steps, speedup).items()}
    psnrs = {plan: [] for plan in plans}
    for batch in tqdm(batches, "batches of captions"):
        dense = generate(batch, None, steps)                         # (B, 3, H, W) or (B, 3, T, H, W)
        for plan, skipped in plans.items():
            drawn = generate(batch, Sparsity(delta="none", skip=skipped, extrapolate=0), steps)
            for pair in zip(dense, drawn):
                psnrs[plan].append(media.psnr(*pair))
    print_header(f"{args.model} tiny, {args.captions} captions, {steps} dense steps, some repeated", "best plan",
                 "PSNR to dense", "other plans: first, every")
    for speedup in sorted({plan[0] for plan in plans}):
        ranked = sorted(((mean(psnrs[plan]), *plan[1:]) for plan in plans if plan[0] == speedup), reverse=True)
        best, first, every = ranked[0]
        others = [f"{first}, {every}: {value:.1f}" for value, first, every in ranked[1:]]
        print_row(f"{speedup}x", f"the first {first}, then one of every {every}", f"{best:.1f} dB", "; ".join(others))
    cli.say(f"\n({where(device)}, float32)")

# ---------------------------------------------------------------------------------------------------------
# frontier: how close to dense at which speed, by the time that the real model's steps take

STEP_TIMES = Path(__file__).with_name("step_times.json")             # `speed` and `whole` write it
FIGURES = Path(__file__).with_name("assets")
SPEEDUPS = 1.25, 1.5, 2.0, 2.5, 3.0, 4.0


def plans_to_compare(model, config):
    """Plans for 50 steps, as the presets are. -> {family: [(label, number of steps, Sparsity or None for dense)]}"""
    columns, original = config.presets["columns"], ORIGINAL[model]
    plans = {"fewer steps": [(f"{n} steps", n, None) for n in (33, 25, 20, 17, 12)]}
    caching = [(f"{n} computed", 50, Sparsity(delta="none", skip=all_but(n)))
               for n in (35, 30, 25, 22, 20, 18, 15, 12, 10)]
    for family, gain in ("repeated", 0), ("extrapolated by 0.8", 0.8), ("by a measured gain", None):
        plans[f"step caching, {family}"] = [(*plan, replace(s, extrapolate=gain)) for *plan, s in caching]
    plans["the paper's rule"] = [("its plan", 50, replace(columns, **original)),
                                 ("its plan, none skipped", 50, replace(columns, **original | {"skip": ()}))]
    alone = [(f"full: 1 and every {n}", 50, replace(columns, full=n, skip=())) for n in (4, 6, 9)]
    plans["ours, columns alone, without drift"] = [(*plan, replace(s, drift=False)) for *plan, s in alone]
    plans["ours, columns alone, with drift"] = [(*plan, replace(s, drift=True)) for *plan, s in alone]
    plans["ours, stacked"] = []
    if model == "flux":                                              # with full steps so near, more columns are closer
        columns = replace(columns, mlp_keep=original["mlp_keep"])    # at the same speed
    for n, every in (40, 2), (40, 3), (31, 2), (31, 3), (26, 2), (26, 3), (22, 2), (22, 3), (18, 2), (15, 2):
        skipped = all_but(n)
        full = tuple(i for i in range(50) if i not in skipped)[2::every]
        plans["ours, stacked"].append((f"{n} computed, one of {every} in full", 50,
                                       replace(columns, full=full, choose=3, skip=skipped)))
    plans["presets"] = [(name, 50, sparsity) for name, sparsity in config.presets.items()]
    return plans


@torch.no_grad()
def frontier(args):
    try:
        from matplotlib import pyplot
    except ImportError:
        raise cli.Fail("frontier draws a figure; install what draws it: pip install matplotlib") from None
    config, device, scenes, templates, batches, generate = prepare(args)
    known = known_times(args.model)
    times = known.get(f"{args.model} whole", known[args.model])      # at the published size, if that was measured
    way = "compiled" if "compiled" in times else "eager"
    results = {}                                                     # {family: [(speed-up, PSNR, SSIM, things, label)]}
    dense = [generate(batch, None) for batch in batches]
    for family, plans in plans_to_compare(args.model, config).items():
        results[family] = []
        for label, steps, sparsity in tqdm(plans, family):
            alike, things, asked = [], 0, 0
            for batch, original in zip(batches, dense):
                drawn = generate(batch, sparsity, steps)
                alike += likeness(original, drawn)
                checks = looked_at([scenes[i] for i in batch], drawn, templates)
                things, asked = things + sum(c[0] for c in checks), asked + sum(c[1] for c in checks)
            psnrs, ssims = zip(*alike)
            speedup = run_seconds(config.steps, None, times[way]) / run_seconds(steps, sparsity, times[way])
            results[family].append((speedup, mean(psnrs), mean(ssims), things / asked, label))

    print_header(f"{args.model} tiny, {args.captions} captions, at least", *(f"{speedup}x" for speedup in SPEEDUPS))
    for family, found in results.items():
        best = [closest(found, least) for least in SPEEDUPS]
        print_row(family, *("{1:.1f} dB, {2:.4f}, {3:.0%} ({0:.2f}x: {4})".format(*b) if b else "-" for b in best))
    draw_frontier(pyplot, results, args.model, times)
    cli.say(f"\n({where(device)}, float32; speed-ups by the time of {times['model']}, {way}, on {times['device']})\n")
    for family, found in results.items():                            # every point of the figure
        cli.say(f"{family}: " + "; ".join(f"{label} {x:.2f}x {psnr:.1f} dB {things:.0%}"
                                          for x, psnr, _, things, label in found))


def closest(found, least):
    """Of plans (speed-up, PSNR, ...) the one closest to dense among those at least so fast, as speed-ups are printed;
    None if there are none."""
    return max((row for row in found if round(row[0], 2) >= least), key=lambda row: row[1], default=None)


def draw_frontier(pyplot, results, model, times):
    """assets/frontier-MODEL.png: PSNR against speed-up; of every family its plans, and a line through the best."""
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for family, found in results.items():
        points = sorted((row[:2] for row in found), reverse=True)    # fastest first
        best = [point for i, point in enumerate(points) if point[1] >= max(p[1] for p in points[:i + 1])]
        color = axes.plot(*zip(*best), "*" if family == "presets" else "-", label=family)[0].get_color()
        axes.plot(*zip(*points), ".", color=color, alpha=0.3)
    axes.set(xlabel=f"speed-up by the time of {times['model']}", ylabel="PSNR to dense, dB", xlim=(1, 5),
             title=f"{model} tiny: how close to dense at which speed")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))          # beside the lines, not on them
    media.write_whole(FIGURES / f"frontier-{model}.png", False,
                      lambda temporary: figure.savefig(temporary, format="png", bbox_inches="tight"))


def known_times(*models):
    """What step_times.json has. Raises Fail if it cannot be read, or lacks one of these models or what tables need."""
    try:
        known = json.loads(STEP_TIMES.read_text())
        for name, times in known.items():                            # is all there that tables look up?
            REAL[name.split()[0]], times["model"], times["device"]
            [times["eager"][kind] for kind in ("dense model", *MODES)]
    except OSError as error:
        raise checkpoints.cannot_read(STEP_TIMES, error) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise cli.Fail(f"{STEP_TIMES} is damaged ({checkpoints.reason(error)}); fetch it again") from None
    for model in models:
        if model not in known:
            raise cli.Fail(f"{STEP_TIMES} has no times of {model}: python bench.py speed --model {model} writes them")
    return known


def run_seconds(steps, sparsity, times):
    """How long a run takes. times: {kind of step: seconds}; where nothing is cached, a step is the plain model's."""
    if sparsity is None or sparsity.delta == "none":
        times = times | {"dense": times["dense model"]}
    elif sparsity.mlp_keep == MANY:
        times = times | {"sparse": times[MANY_SPARSE]}
    return sum(times[step.mode] for step in make_plan(steps, sparsity))


def eager_and_compiled(words):
    """The first of these words, and a second one, if there is, in brackets."""
    eager, *compiled = words
    return eager + "".join(f" ({word})" for word in compiled)


def presets(args):
    """What the presets gain on the real models, and columns with skipped steps, by the times that `speed` noted."""
    known, both = known_times(*REAL), "22 computed, one of 2 in full"
    print_header("50 steps, eager (compiled)", "dense", *flux_chipmunk.CONFIGS["dev"].presets, "columns + skips")
    for name, times in known.items():
        stem, *_ = name.split()
        program, size, _ = REAL[stem]
        config, ways = program.CONFIGS[size], [times[way] for way in ("eager", "compiled") if way in times]
        dense = [run_seconds(config.steps, None, way) for way in ways]
        cells = [eager_and_compiled(f"{total:.1f} s" for total in dense)]
        stacked = {label: sparsity for label, _, sparsity in plans_to_compare(stem, config)["ours, stacked"]}
        for sparsity in *config.presets.values(), stacked[both]:
            ratios = [total / run_seconds(config.steps, sparsity, way) for total, way in zip(dense, ways)]
            cells.append(eager_and_compiled(f"{ratio:.2f}x" for ratio in ratios))
        print_row(f"{stem} {times['model']}", *cells)
    cli.say(f"\n({', '.join({times['device'] for times in known.values()})}, bfloat16, random weights. Columns + "
            f"skips: {both}, columns in the others)")

# ---------------------------------------------------------------------------------------------------------
# speed: the real models' transformers with random weights, which take about as long as trained ones


def with_random_weights(make_model, blocks_of, device, placement, float32=()):
    """A model as the programs make it, in bfloat16, but without files. blocks_of(model) -> its blocks; placement:
    which of them go to the device, None: all."""
    with torch.device("meta"):
        model = make_model()
    blocks = blocks_of(model) if placement else []
    home = homes(model, blocks, placement.blocks if placement else 0, device)
    for name, p in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        dtype = torch.float32 if any(part in name for part in float32) else torch.bfloat16
        weight = torch.full(p.shape, float(leaf != "bias"), device=device, dtype=dtype)      # norms are 1, biases 0
        if p.ndim > 1:
            weight.normal_(std=p[0].numel()**-0.5)
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(weight.to(home[name]), requires_grad=False))
    if hasattr(model, "lay_out_for_deltas"):
        model.lay_out_for_deltas()
    if placement:
        move_weights(model, blocks_of(model), placement.blocks, device)
    return model.eval()


def random_flux(config, device, placement=None):
    """-> the model, and sample(sparsity, watch, ranks). placement: memory.Placement; None: all stays on the GPU"""
    flux = with_random_weights(flux_chipmunk.parts(config)["flux"], lambda flux: flux.all_blocks, device, placement)
    side = config.size // 8
    shapes = (config.autoencoder.z, side, side), (config.text_length, config.flux.text_dim), (config.flux.pooled_dim,)
    inputs = [torch.randn(1, *shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    inputs, stay = (*inputs, config, config.steps), placement and placement.layers
    return flux, lambda sparsity, *how: sample_flux(flux, *inputs, sparsity, 0, *how, resident=stay)


def random_wan(config, device, placement=None):
    wan = with_random_weights(wan_chipmunk.parts(config)["wan"], lambda wan: wan.blocks, device, placement,
                              wan_chipmunk.Wan.FLOAT32)
    shape = config.wan.channels, config.frames // 4 + 1, config.height // 8, config.width // 8
    noise = torch.randn(1, *shape, device=device)
    texts = torch.randn(2, 1, config.text_length, config.wan.text_dim, device=device, dtype=torch.bfloat16)
    inputs, stay = (noise, texts, config, config.steps), placement and placement.layers
    return wan, lambda sparsity, *how: sample_wan(wan, *inputs, sparsity, 0, *how, resident=stay)


def random_hunyuan(config, device, placement=None):
    hunyuan = with_random_weights(hunyuan_chipmunk.parts(config)["hunyuan"], lambda hunyuan: hunyuan.all_blocks, device,
                                  placement)
    shape = config.hunyuan.z, config.frames // 4 + 1, config.height // 8, config.width // 8
    noise = torch.randn(1, *shape, device=device)
    text = torch.randn(1, config.text_length, config.hunyuan.text_dim, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(1, config.hunyuan.pooled_dim, device=device, dtype=torch.bfloat16)
    inputs, stay = (noise, text, pooled, config, config.steps), placement and placement.layers
    return hunyuan, lambda sparsity, *how: sample_hunyuan(hunyuan, *inputs, sparsity, 0, *how, resident=stay)


def now():
    """Seconds, when the GPU has done all it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(sample, sparsity, steps, ranks):
    """How long each of the first steps of a run takes, once a run before it has compiled all kernels. -> [seconds]"""
    seconds = []

    def watch(plan):
        for step in plan[:steps]:
            start = now()
            yield step
            seconds.append(now() - start)
    for _ in range(2):
        seconds.clear()
        sample(sparsity, watch, ranks)
    return seconds


def collective_seconds(sample, sparsity, steps, ranks):
    """How long each of the first steps of a run talks to the other processes, or waits for the slowest, once a run
    before has compiled what is new. -> [seconds]"""
    seconds = []

    @contextmanager
    def timed():
        start = now()
        yield
        seconds[-1] += now() - start

    def watch(plan):
        for step in plan[:steps]:
            seconds.append(0.0)
            yield step
    for _ in range(2):
        seconds.clear()
        sample(sparsity, watch, replace(ranks, watch=timed))
    return seconds


def peak_memory(device):
    """Most bytes that tensors took on any of the GPUs since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    torch.cuda.reset_peak_memory_stats(device)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


REAL = {"flux": (flux_chipmunk, "dev", random_flux), "wan": (wan_chipmunk, "1.3b", random_wan),
        "hunyuan": (hunyuan_chipmunk, "720p", random_hunyuan)}


def real_model(args):
    """-> name and Config of the real model that the flags choose, and the GPU. Raises Fail if there is none."""
    if args.frames and args.model == "flux":
        raise cli.Fail("flux makes pictures; --frames is for --model wan and hunyuan")
    program, name, _ = REAL[args.model]
    name = args.size or name
    if name not in program.CONFIGS:
        raise cli.Fail(f"no --size {name!r} of {args.model}; choose from {', '.join(program.CONFIGS)}")
    config = program.CONFIGS[name]
    if config.steps < SPEED_STEPS:
        raise cli.Fail(f"{name} takes {config.steps} steps, too few to see every kind; dev's steps take as long")
    device = cli.pick_device(args.device)
    if device.type != "cuda":
        raise cli.Fail(f"python bench.py {args.table} needs a GPU: the real models take hours on a CPU")
    if args.memory:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * args.memory / total))
    return name, replace(config, frames=args.frames) if args.frames else config, device


def place(args, name, config, device, preset, ranks=None):
    """Where a real model goes, for a preset's steps; says what was estimated. -> memory.Placement"""
    program = REAL[args.model][0]
    settings = cli.Settings(model=name, frames=getattr(config, "frames", None), device=device, dtype="bfloat16",
                            preset=preset, offload=args.offload)
    need, placement = memory.place(program.find_need, cli.fill(settings, program.CONFIGS), ranks)
    cli.say(f"estimated: {', '.join(memory.describe(need, placement))}; "
            f"at most {memory.gigabytes(need.on_gpu(placement))} of the GPU\n")
    return placement


def speed(args):
    name, config, device = real_model(args)
    if args.model == "hunyuan" and not args.frames:
        config = replace(config, frames=33)                          # soon measured
    heads = getattr(config, args.model).heads
    ranks = parallel.start(device, heads, branches=2 if args.model == "wan" else 1)
    placement = place(args, name, config, device, "columns", ranks)      # whose steps are timed
    torch.manual_seed(0)                                             # the same weights in all processes
    model, ways = speed_table(args.model, name, config, device, ranks, placement)
    if ranks is None and not (args.frames or args.size or args.offload or args.memory):         # as the README has them
        note_times(args.model, model, ways, device)
    parallel.leave(ranks)


def whole(args):
    name, config, device = real_model(args)
    if args.steps:
        presets = {preset: fit_steps(sparsity, args.steps, config.steps) for preset, sparsity in config.presets.items()}
        config = replace(config, steps=args.steps, presets=presets)
    placement = place(args, name, config, device, args.preset)
    model, times = whole_table(args.model, name, config, args.preset, device, placement)
    if times.keys() >= {*MODES} - {"skip"} and not (args.frames or args.size or args.offload):
        skip = known_times(args.model)[args.model]["eager"]["skip"]  # `columns` has none; at another size
        note_times(f"{args.model} whole", model, {"eager": {"skip": skip} | times}, device)


@torch.no_grad()
def whole_table(stem, name, config, preset, device, placement=None):
    """Time a step of the dense model, then a run with random weights from noise to pixels, by a preset: steps by kind,
    and decoding. -> the model and its size in words, {kind of step: seconds, the median}"""
    program, sparsity, seconds = REAL[stem][0], config.presets[preset], []
    plan = make_plan(config.steps, sparsity)

    def watch(plan):
        for step in tqdm(plan, leave=False, disable=None):
            start = now()
            yield step
            seconds.append((step.mode, now() - start))
    model, sample = REAL[stem][2](config, device, placement)
    dense_model, = step_seconds(sample, None, 1, None)
    peak_memory(device)
    latents = sample(sparsity, watch, None)
    denoising = peak_memory(device)
    del model, sample
    peak_memory(device)                                              # the decoder works alone

    make = program.parts(config)["autoencoder" if stem == "flux" else "vae"]
    decoder, start = with_random_weights(make, None, device, None, float32=("",)), now()         # all of it float32
    if stem == "flux":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            decoder.decode(latents.float())
    else:
        for _ in program.decode(decoder.half() if stem == "hunyuan" else decoder, latents):
            pass
    decoding = now() - start

    print_header(f"{stem} {name}, {config.steps} steps, preset {preset}", "steps", "a step, median", "in all")
    times = {kind: [s for mode, s in seconds if mode == kind] for kind in dict.fromkeys(step.mode for step in plan)}
    print_row("dense model", "", f"{dense_model:.3f} s", "")
    for kind, taken in times.items():
        print_row(kind, str(len(taken)), f"{middle(taken):.3f} s", f"{sum(taken):.1f} s")
    print_row("decoding", "", "", f"{decoding:.1f} s")
    print_row("**whole**", "", "", f"**{sum(s for _, s in seconds) + decoding:.1f} s**")
    peaks = f"denoising {memory.gigabytes(denoising)}, decoding {memory.gigabytes(peak_memory(device))}"
    cli.say(f"\n({where(device)}, bfloat16, random weights; medians without a kind's first step, if it has more; "
            f"peak memory: {peaks})")
    times = {"dense model": dense_model} | {kind: middle(taken) for kind, taken in times.items()}
    return in_words(stem, name, config), times


def middle(taken):
    """The median without the first, which also compiled kernels or pinned memory, if there are more."""
    return median(taken[1:] or taken)


def in_words(stem, name, config):
    """A real model and its size."""
    return f"{name}, {config.width}x{config.height}" + (f"x{config.frames}" if stem != "flux" else "")


@torch.no_grad()
def speed_table(stem, name, config, device, ranks=None, placement=None):
    """Time the steps of a model with random weights, eager and compiled; print what the presets' 50 take. -> the model
    and its size in words, {way to run: {kind of step: seconds}}"""
    model, sample = REAL[stem][2](config, device, placement)
    # dense, measure, three times sparse, of which the third is recorded, refresh, sparse, measure, sparse, skip, sparse
    sparsity = replace(config.presets["columns"], full=(1, 5, 7), choose=2, skip=(9,))
    kinds = [step.mode for step in make_plan(config.steps, sparsity)][:SPEED_STEPS]
    ways, peaks = {}, []                                             # {way to run: {kind of step: seconds}}, bytes

    def times(seconds):
        taken = list(zip(kinds, seconds(sample, sparsity, len(kinds), ranks)))
        first = {"measure": 1, "sparse": replay.PLAIN + 1}           # without a drift to take; not yet replayed
        return {kind: median([s for k, s in taken if k == kind][first.get(kind, 0):]) for kind in dict.fromkeys(kinds)}

    def dense_time(seconds):
        return {"dense model": median(seconds(sample, None, 4, ranks))}
    for way in "eager", "compiled":
        if way == "compiled":
            compile_blocks(model)
        peak_memory(device)
        ways[way] = dense_time(step_seconds)
        peaks.append(peak_memory(device))
        ways[way] |= times(step_seconds)
        peaks.append(peak_memory(device))
        if sparsity.mlp_keep and not ranks:
            many = replace(sparsity, mlp_keep=MANY)
            ways[way][MANY_SPARSE] = step_seconds(sample, many, len(kinds), ranks)[-1]
    compiling = compile_seconds()
    if ranks:
        torch.compiler.reset()                                       # another `watch` would compile all once more
        ways["compiled, in collectives"] = dense_time(collective_seconds) | times(collective_seconds)

    gpus = f"{dist.get_world_size()} GPUs, " if ranks else ""
    print_header(f"{stem} {in_words(stem, name, config)}, {gpus}a step", *ways)
    for kind in ways["eager"]:
        print_row(kind, *(f"{seconds[kind]:.3f} s" for seconds in ways.values()))
    dense = [config.steps * seconds["dense model"] for seconds in ways.values()]
    print_row(f"**all {config.steps}, dense**", *(f"{total:.1f} s" for total in dense))
    for preset, sparsity in config.presets.items():
        totals = [run_seconds(config.steps, sparsity, seconds) for seconds in ways.values()]
        print_row(f"**all {config.steps}, preset {preset}**",
                  *(f"{t:.1f} s, **{d / t:.2f}x**" for d, t in zip(dense, totals)))
    dense_peak, peak = map(memory.gigabytes, peaks[:2])
    cli.say(f"\n({where(device)}, bfloat16, random weights; peak memory a GPU, eager: dense {dense_peak}, "
            f"Chipmunk {peak}; compiling took {compiling:.0f} s)")
    return in_words(stem, name, config), ways


def note_times(name, model, ways, device):
    """Write what speed_table or whole_table measured into step_times.json."""
    known = known_times() if STEP_TIMES.exists() else {}
    known[name] = {"model": model, "device": where(device), "date": str(date.today()),
                   **{way: {kind: round(s, 4) for kind, s in times.items()} for way, times in ways.items()}}
    media.write_whole(STEP_TIMES, False, lambda temporary: temporary.write_text(json.dumps(known, indent=1) + "\n"))

# ---------------------------------------------------------------------------------------------------------
# kernels


def milliseconds(run):
    """Median time of `run` on the GPU after a warm-up, in a CUDA graph, so that no launch waits for Python. To start a
    replay takes up to 0.02 ms, as long as some kernels: what is short runs 20 times in one."""
    for _ in range(2):
        run()
    once = replay_time(run, 1)
    return once if once > 5 else replay_time(run, 20)


def replay_time(run, times):
    """Median time in milliseconds of `run` where a CUDA graph has it so many times."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    taken = []
    while len(taken) < 5 or len(taken) < 50 and sum(taken) < 500:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return median(taken[1:]) / times


def fastest_attention(q, k, v):
    """The framework's fastest dense attention here -> milliseconds, its name."""
    results = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            ms = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v))
        results.append((ms, backend.name.split("_")[0].lower()))
    return min(results)


def columns_to_mask(columns, counts, n):
    """Column lists (..., K), counts (..., P) -> bool (..., n): is the column in the list?"""
    index, in_list = listed_columns(columns, counts)                 # (..., K) each
    index = torch.where(in_list, index, n).long()                    # padding goes to an extra column, cut off again
    mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=columns.device)
    return mask.scatter_(-1, index, True)[..., :n]


def flex_ms(q, k, v, columns, counts):
    """flex_attention over the same columns, as a mask that looks them up -> milliseconds."""
    kept = columns_to_mask(columns, counts, k.shape[2])              # (B, H, G, N)
    blocks = create_block_mask(lambda b, h, i, j: kept[b, h, i // GROUP, j], *q.shape[:3], k.shape[2])
    attend = torch.compile(flex_attention, dynamic=False)
    return milliseconds(lambda: attend(q, k, v, block_mask=blocks))


ATTENTION_CASES = (("FLUX.1-dev, 1024x1024", 24, 4_608, 0.165), ("HunyuanVideo, 720x1280x129", 24, 119_056, 0.07),
                   ("Wan2.1 14B, 720x1280x81", 40, 75_600, 0.10))    # heads, tokens, share of columns kept


def kernel_row(op, shape, dense, label, ours, ratio, ideal="-", flops=0):
    """One row. dense, ours: milliseconds; label: what the dense one is; flops: of ours, 0 to leave its rate out."""
    rate = f", {flops / ours / 1e9:.0f} TFLOP/s" if flops else ""
    print_row(op, shape, f"{dense:.3f} ms ({label})", f"{ours:.3f} ms{rate}", ratio, ideal)


def attention_rows(case, heads, n, keep):
    """The rows of one attention shape."""
    q, k, v = torch.randn(3, 1, heads, n, 128, device="cuda", dtype=torch.bfloat16)
    flops, shape = 4 * n * n * 128 * heads, f"(1, {heads}, {n}, 128)"
    dense, backend = fastest_attention(q, k, v)
    against = shape, dense, f"{backend}, {flops / dense / 1e9:.0f} TFLOP/s"

    o, lse = attention(q, k, v)
    ours = milliseconds(lambda: attention_with_column_mass(q, k, v, lse))
    kernel_row(f"attention with column mass ({case})", *against, ours, f"{ours / dense:.2f}x its time", "1x", flops)
    ours = milliseconds(lambda: attention_triton(q, k, v))
    kernel_row("*limit: dense attention in Triton, no mass*", *against, ours, f"{ours / dense:.2f}x its time", "1x",
               flops)

    mass = attention_with_column_mass(q, k, v, lse)[2]               # (1, H, G, N)
    ours = milliseconds(lambda: choose_columns(mass, keep, 0.0, None, 1))
    kernel_row("choose columns", *against, ours, f"{ours / dense:.1%} of its time")
    columns, counts = choose_columns(mass, keep, 0.0, None, 1)
    ours = milliseconds(lambda: column_sparse_attention(q, k, v, lse, columns, counts, o, 1))
    kernel_row(f"column-sparse attention, {keep:.1%} kept", *against, ours, f"**{dense / ours:.2f}x**",
               f"{1 / keep:.1f}x", keep * flops)
    pooled = Pooled(block_means(k, n), block_means(v, n), count_unlisted(columns, counts, n))
    pooled_ms = milliseconds(lambda: column_sparse_attention(q, k, v, lse, columns, counts, o, 1, pooled))
    kernel_row(f"the same, pooled: and a mean for every {POOL} columns", *against, pooled_ms,
               f"**{dense / pooled_ms:.2f}x**", f"{1 / (keep + 1 / POOL):.1f}x", (keep + 1 / POOL) * flops)
    if n < 10_000:
        flex = flex_ms(q, k, v, columns, counts)
        kernel_row("the same columns by flex_attention", shape, flex, "flex", ours, f"{flex / ours:.2f}x", "-",
                   keep * flops)
        empty = torch.zeros_like(counts)
        ours = milliseconds(lambda: column_sparse_attention(q, k, v, lse, columns, empty, o, 1))
        kernel_row("*limit: with empty lists, cache in and out only*", *against, ours, f"{dense / ours:.2f}x")


def mlp_rows(rows=4_608, dim=3_072, hidden=12_288, keep=0.30):
    """The rows of FLUX.1-dev's MLP at 1024x1024."""
    def random(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x, b1, b2, act = random(1, rows, dim), random(hidden), random(dim), random(1, hidden, rows)
    w1, w2t = random(hidden, dim) / dim**0.5, random(hidden, dim) / hidden**0.5
    w2, groups = w2t.t().contiguous(), -(-rows // GROUP)

    def mlp(x):
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
    compiled = torch.compile(mlp)
    dense, label = min((milliseconds(lambda: mlp(x)), "eager"), (milliseconds(lambda: compiled(x)), "compiled"))
    flops, shape = 4 * rows * dim * hidden, f"{rows} x {dim} -> {hidden} -> {dim}"
    against = shape, dense, f"{label}, {flops / dense / 1e9:.0f} TFLOP/s"

    moved, out = torch.rand(1, 1, groups, hidden, device="cuda"), mlp(x)
    columns, counts = (c[:, 0] for c in choose_columns(moved, keep, 0.0, None, 1))           # (1, G, K), (1, G, P)
    delta, inputs = sparse_mlp_fc1(x, w1, b1, columns, counts, act), (-x, x)                 # (1, G, K, GROUP)

    def fc1():                                                       # of two inputs, as one would soon change nothing
        return [sparse_mlp_fc1(x, w1, b1, columns, counts, act) for x in inputs]
    ours = milliseconds(lambda: [sparse_mlp_fc2(delta, w2t, columns, counts, out) for delta in fc1()]) / 2
    kernel_row(f"sparse MLP, {keep:.0%} kept, cache update included", *against, ours, f"**{dense / ours:.2f}x**",
               f"{1 / keep:.1f}x", keep * flops)
    for name, run, times in ("fc1", fc1, 2), ("fc2", lambda: sparse_mlp_fc2(delta, w2t, columns, counts, out), 1):
        ours = milliseconds(run) / times
        kernel_row(f"*limit: its {name} alone*", *against, ours, f"{ours / dense:.2f}x its time", f"{keep / 2:.2f}x",
                   keep * flops / 2)


@torch.no_grad()
def kernels(args):
    if not torch.cuda.is_available():
        raise cli.Fail("python bench.py kernels needs a GPU; a CPU runs the kernels in Triton's interpreter, for tests")
    print_header("op", "(B, H, N, D)", "dense", "ours", "ratio", "ideal")
    for case in ATTENTION_CASES:
        attention_rows(*case)
    mlp_rows()
    cli.say(f"\n({where(torch.device('cuda'))}, triton {triton.__version__}, bfloat16, random data, "
            "medians of CUDA graph replays)")


TABLES = {score: "model captions device", caching: "model captions steps device", frontier: "model captions device",
          presets: "", speed: "model size frames offload memory device",
          whole: "model size frames steps preset offload memory device", kernels: ""}          # and their flags
FLAGS = {"model": {"choices": list(DRAW), "default": "flux", "help": "(default: flux)"},
         "captions": {"type": cli.number(int, 1, 10_000), "default": 200, "help": "how many (default: 200)"},
         "steps": {"type": cli.number(int, 2, 1_000), "help": "(default: the model's 50)"},
         "size": {"help": "which real model, like 14b (default: dev, 1.3b, 720p)"},
         "frames": {"type": cli.number(*cli.RANGES["frames"]),
                    "help": "of a video (default: the model's; speed: 33 of hunyuan's 129)"},
         "preset": {"choices": list(flux_chipmunk.CONFIGS["tiny"].presets), "default": "columns",
                    "help": "(default: columns)"},
         "offload": {"choices": cli.OFFLOADS, "help": "as in the programs"},
         "memory": {"type": cli.number(float, 1, 10_000),
                    "help": "GB of the GPU that may be used, as if it were a smaller one"},
         "device": {"help": "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"}}


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE", help="its --help has its flags")
    for table, flags in TABLES.items():
        parse_table = tables.add_parser(table.__name__)
        parse_table.set_defaults(make=table)
        for flag in flags.split():
            parse_table.add_argument(f"--{flag}", **FLAGS[flag])
    args = parser.parse_args()
    args.make(args)


if __name__ == "__main__":
    processes.run(main)
