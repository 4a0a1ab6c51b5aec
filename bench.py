"""Makes the tables of the README.

    python bench.py score                  does the picture say what the prompt says, dense against Chipmunk
    python bench.py score --captions 20    the same, sooner
    python bench.py kernels                how fast the kernels are on this GPU, against the framework's fastest dense ones

score draws captions whose combination of colour, shape and relation was held out of training, and looks for every
asked-for thing in the pixels: which palette colour is where, in one piece, and which shape fills its bounding box best.
"""
import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

import common
from cache import fit_steps, listed, make_plan, make_state
from flux_chipmunk import (CONFIGS, encode_prompts, load_part, make_layout, make_noise, make_sigmas, patchify, sample,
                           unpatchify)
from sparse_kernels import (GROUP, add_columns, attention, attention_with_column_mass, choose_columns, sparse_mlp_fc1,
                            sparse_mlp_fc2, triton)
from train_tiny import COLOURS, SHAPES, Scene, Thing, draw, holds, make_scene

GRID = 256                     # pictures are looked at in this many cells a side
BATCH = 20                     # pictures drawn at a time

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
    for batch in tqdm(torch.arange(args.captions).split(BATCH), f"{BATCH} captions"):
        noise = torch.cat([make_noise(config.autoencoder.z, size, size, i) for i in batch.tolist()])     # (B, z, 2 size, 2 size)
        noise = patchify(noise.to(device, torch.float32))
        for name, sparsity in variants.items():
            plan = sparsity and make_plan(config.steps, sparsity)
            state = sparsity and make_state(len(flux.double_blocks) + len(flux.single_blocks), sparsity, layout.static, int(batch[0]))
            x = sample(flux, noise, texts[batch], pooleds[batch], config.guidance, sigmas, layout, plan, state)
            pictures = autoencoder.decode(unpatchify(x, size, size)).clamp(-1, 1)                         # (B, 3, H, W)
            if name == "dense":
                dense = pictures
            for i, a, b in zip(batch.tolist(), dense[:, None], pictures[:, None]):
                totals[name] = [x + y for x, y in zip(totals[name], check(scenes[i], b[0].cpu(), masks))]
                likeness[name].append((common.psnr(a, b), common.ssim(a, b)))

    print(f"| tiny, {args.captions} captions, {config.steps} steps | things right | relations right | backgrounds right | PSNR to dense | SSIM |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (things, asked, related, relations, background) in totals.items():
        quality = "- | -" if name == "dense" else "{:.2f} dB | {:.4f}".format(*(sum(q) / len(q) for q in zip(*likeness[name])))
        print(f"| {name} | {things / asked:.1%} | {related / max(1, relations):.1%} | {background / args.captions:.1%} | {quality} |")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{where}, torch {torch.__version__}, float32")


# ---------------------------------------------------------------------------------------------------------
# kernels


def milliseconds(run):
    """Median time of `run` on the GPU: replays of a CUDA graph, so that no launch waits for Python, after a warm-up."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    while len(times) < 5 or len(times) < 50 and sum(times) < 500:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[len(times) // 2]


def fastest_attention(q, k, v):
    """The framework's fastest dense attention here -> milliseconds, its name."""
    results = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            results.append((milliseconds(lambda: F.scaled_dot_product_attention(q, k, v)), backend.name.split("_")[0].lower()))
    return min(results)


def flex_ms(q, k, v, columns, counts):
    """flex_attention over the same columns, as a mask that looks them up."""
    kept = listed(columns, counts, k.shape[2])                       # (B, H, G, N)
    blocks = create_block_mask(lambda b, h, i, j: kept[b, h, i // GROUP, j], *q.shape[:3], k.shape[2])
    attend = torch.compile(flex_attention, dynamic=False)
    return milliseconds(lambda: attend(q, k, v, block_mask=blocks))


ATTENTION_CASES = (("FLUX.1-dev, 1024x1024", 24, 4_352, 0.165), ("HunyuanVideo, 720x1280x129", 24, 119_056, 0.07),
                   ("Wan2.1 14B, 720x1280x81", 40, 75_600, 0.10))


@torch.no_grad()
def kernels(args):
    if not torch.cuda.is_available():
        raise common.Fail("python bench.py kernels needs a GPU; on a CPU the kernels run in Triton's interpreter, for tests only")
    print("| op | (B, H, N, D) | dense | ours | ratio | ideal |\n| --- | --- | --- | --- | --- | --- |")

    def row(name, shape, dense, label, ours, ratio, ideal, flops):
        rate = f", {flops / ours / 1e9:.0f} TFLOP/s" if flops else ""
        print(f"| {name} | {shape} | {dense:.3f} ms ({label}) | {ours:.3f} ms{rate} | {ratio} | {ideal} |", flush=True)

    for case, heads, n, keep in ATTENTION_CASES:
        q, k, v = torch.randn(3, 1, heads, n, 128, device="cuda", dtype=torch.bfloat16)
        flops, shape = 4 * n * n * 128 * heads, f"(1, {heads}, {n}, 128)"
        dense, backend = fastest_attention(q, k, v)
        backend += f", {flops / dense / 1e9:.0f} TFLOP/s"
        o, lse = attention(q, k, v)
        ours = milliseconds(lambda: attention_with_column_mass(q, k, v, lse))
        mass = attention_with_column_mass(q, k, v, lse)[2]
        row(f"attention with column mass ({case})", shape, dense, backend, ours, f"{ours / dense:.2f}x its time", "1x", flops)
        ours = milliseconds(lambda: choose_columns(mass, keep, 0.01, None, 1))
        row("choose columns, and 1 % at random", shape, dense, backend, ours, f"{ours / dense:.1%} of its time", "-", 0)
        columns, counts = choose_columns(mass, keep, 0.0, None, 1)
        del mass
        ours = milliseconds(lambda: add_columns(q, k, v, columns, counts, o, None))
        row(f"column-sparse attention, {keep:.1%} kept", shape, dense, backend, ours, f"**{dense / ours:.2f}x**", f"{1 / keep:.1f}x", keep * flops)
        if n < 10_000:
            flex = flex_ms(q, k, v, columns, counts)
            row("the same, dense: flex_attention", shape, flex, "flex", ours, f"{flex / ours:.2f}x", "-", keep * flops)

    rows, dim, hidden, keep = 4_352, 3_072, 12_288, 0.30
    x = torch.randn(1, rows, dim, device="cuda", dtype=torch.bfloat16)
    w1, w2t = (torch.randn(hidden, dim, device="cuda", dtype=torch.bfloat16) / width**0.5 for width in (dim, hidden))
    b1, b2 = torch.randn(hidden, device="cuda", dtype=torch.bfloat16), torch.randn(dim, device="cuda", dtype=torch.bfloat16)
    w2, act = w2t.t().contiguous(), torch.randn(1, hidden, rows, device="cuda", dtype=torch.bfloat16)

    def mlp(x):
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
    compiled = torch.compile(mlp)
    dense, label = min((milliseconds(lambda: mlp(x)), "eager"), (milliseconds(lambda: compiled(x)), "compiled"))
    out, flops = mlp(x), 4 * rows * dim * hidden
    columns, counts = (c[:, 0] for c in choose_columns(torch.rand(1, 1, -(-rows // GROUP), hidden, device="cuda"), keep, 0.0, None, 1))
    ours = milliseconds(lambda: sparse_mlp_fc2(sparse_mlp_fc1(x, w1, b1, columns, counts, act), w2t, columns, counts, out))
    row(f"sparse MLP, {keep:.0%} kept, cache update included", f"{rows} x {dim} -> {hidden} -> {dim}", dense,
        f"{label}, {flops / dense / 1e9:.0f} TFLOP/s", ours, f"**{dense / ours:.2f}x**", f"{1 / keep:.1f}x", keep * flops)
    print(f"\n({torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, random data, "
          "medians of CUDA graph replays)")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["score", "kernels"])
    parser.add_argument("--captions", type=common.number(int, 1, 10_000), default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    {"score": score, "kernels": kernels}[args.table](args)


if __name__ == "__main__":
    common.run(main)
