"""Makes the tables of the README.

    python bench.py score                  does the picture say what the prompt says, dense against Chipmunk
    python bench.py score --captions 20    the same, sooner

score draws captions whose combination of colour, shape and relation was held out of training, and looks for every
asked-for thing in the pixels: which palette colour is where, in one piece, and which shape fills its bounding box best.
"""
import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from cache import fit_steps, make_plan, make_state
from flux_chipmunk import (CONFIGS, encode_prompts, load_part, make_layout, make_noise, make_sigmas, patchify, sample,
                           unpatchify)
from train_tiny import COLOURS, SHAPES, Scene, Thing, draw, holds, make_scene

GRID = 256                     # pictures are looked at in this many cells a side

# ---------------------------------------------------------------------------------------------------------
# seeing


def shape_masks():
    """{shape: bool (h, w)}, each cut to its bounding box."""
    masks = {}
    for shape in SHAPES:
        picture = draw([Scene((Thing("black", shape, "", 0.5, 0.5, 0.4),), "", "white", "")], 256)[0]
        masks[shape] = cut(picture.mean(0) < 0)
    return masks


def cut(mask):
    """A mask (H, W) without its empty margins."""
    y, x = mask.any(1).nonzero(), mask.any(0).nonzero()
    return mask[y.min():y.max() + 1, x.min():x.max() + 1]


def pieces(mask):
    """Connected pieces of mask (H, W), each a mask. On cells of 2 x 2, every cell takes the highest number among its
    neighbours until none changes."""
    coarse = F.max_pool2d(mask[None].float(), 2)[0]                  # (H / 2, W / 2)
    numbers = torch.arange(1.0, coarse.numel() + 1).view(coarse.shape) * coarse
    while not torch.equal(numbers, spread := F.max_pool2d(numbers[None], 3, 1, 1)[0] * coarse):
        numbers = spread
    numbers = numbers.repeat_interleave(2, 0).repeat_interleave(2, 1)            # (H, W)
    return [(numbers == n) & mask for n in numbers.unique() if n > 0]


def see(picture, masks):
    """What is in a picture (3, S, S) in -1..1? -> background colour, [(colour, shape, (x, y) of the centre)]"""
    cells = F.adaptive_avg_pool2d(picture, GRID)                     # (3, GRID, GRID)
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1       # (10, 3)
    nearest = (cells[None] - palette[:, :, None, None]).square().sum(1).argmin(0)    # (GRID, GRID)
    background = nearest.flatten().mode().values.item()
    found = []
    for index, colour in enumerate(COLOURS):
        mask = nearest == index
        mask = F.max_pool2d(-F.max_pool2d(-mask[None].float(), 3, 1, 1), 3, 1, 1)[0].bool()   # without the rims between two colours
        for piece in pieces(mask) if index != background else []:
            if piece.sum() < 0.003 * GRID**2:
                continue
            box = cut(piece)
            overlap = {}
            for shape, full in masks.items():
                fitted = F.interpolate(full[None, None].float(), box.shape, mode="bilinear", antialias=True)[0, 0] > 0.5
                overlap[shape] = ((fitted & box).sum() / (fitted | box).sum()).item()
            shape = max(overlap, key=overlap.get)
            y, x = piece.nonzero().float().mean(0).tolist()
            if overlap[shape] > 0.7:
                found.append((colour, shape, (x / GRID, y / GRID)))
    return list(COLOURS)[background], found


def check(scene, picture, masks):
    """-> things right, things asked, relations right, relations asked, is the background right?"""
    background, found = see(picture, masks)
    centres = []
    for thing in scene.things:
        match = next((f for f in found if f[:2] == (thing.colour, thing.shape)), None)
        if match:
            found.remove(match)
        centres.append(match and match[2])
    related = bool(scene.relation) and None not in centres[:2] and holds(scene.relation, *centres[:2])
    return sum(c is not None for c in centres), len(centres), int(related), int(bool(scene.relation)), background == scene.background

# ---------------------------------------------------------------------------------------------------------
# score


@torch.no_grad()
def score(args):
    config, device = CONFIGS["tiny"], common.pick_device(args.device)
    folder = Path(__file__).parent / config.weights
    rng = random.Random(2506)
    scenes = [make_scene(rng, train=False, plain=True) for _ in range(args.captions)]
    texts, pooleds = encode_prompts([scene.caption for scene in scenes], config, folder, device, torch.float32)
    flux = load_part("flux", config, folder, device, torch.float32)
    flux.lay_out_for_deltas()
    autoencoder = load_part("autoencoder", config, folder, device, torch.float32)
    masks, size = shape_masks(), config.size // 16
    layout = make_layout(config.flux, size, size, config.text_length, device)
    sigmas = make_sigmas(config.steps, size * size, config.shift)

    def variant(**changes):
        return fit_steps(replace(config.sparsity, **changes), config.steps, config.steps)
    variants = {"dense": None, "delta=mass": variant(delta="mass", skip="none"), "delta=mass, step caching": variant(delta="mass"),
                "delta=paper": variant(delta="paper", skip="none"), "delta=paper, step caching": variant(delta="paper"),
                "delta=paper, the original's measure steps": variant(delta="paper", skip="none", measure=10)}
    totals = {name: [0] * 5 for name in variants}
    likeness = {name: [] for name in variants}
    for i, scene in enumerate(tqdm(scenes, "captions")):
        noise = patchify(make_noise(config.autoencoder.z, size, size, i).to(device, torch.float32))
        for name, sparsity in variants.items():
            plan = sparsity and make_plan(config.steps, sparsity)
            state = sparsity and make_state(len(flux.double_blocks) + len(flux.single_blocks), sparsity, layout.static, i)
            x = sample(flux, noise, texts[i:i + 1], pooleds[i:i + 1], config.guidance, sigmas, layout, plan, state)
            picture = autoencoder.decode(unpatchify(x, size, size)).clamp(-1, 1).cpu()
            totals[name] = [a + b for a, b in zip(totals[name], check(scene, picture[0], masks))]
            if name == "dense":
                dense = picture
            likeness[name].append((common.psnr(dense, picture), common.ssim(dense, picture)))

    print(f"| tiny, {args.captions} captions, {config.steps} steps | things right | relations right | backgrounds right | PSNR to dense | SSIM |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (things, asked, related, relations, background) in totals.items():
        quality = "- | -" if name == "dense" else "{:.2f} dB | {:.4f}".format(*(sum(q) / len(q) for q in zip(*likeness[name])))
        print(f"| {name} | {things / asked:.1%} | {related / max(1, relations):.1%} | {background / args.captions:.1%} | {quality} |")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{where}, torch {torch.__version__}, float32")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["score"])
    parser.add_argument("--captions", type=common.number(int, 1, 10_000), default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    score(parser.parse_args())


if __name__ == "__main__":
    common.run(main)
