"""Makes the tables of the README.

    python bench.py score                  does FLUX.1's picture say what the prompt says, dense against Chipmunk
    python bench.py score --model wan      the same for videos: wan or hunyuan
    python bench.py score --preset         dense and the model's own preset only, sooner; --captions 40 is sooner, too
    python bench.py speed                  how long the steps of FLUX.1-dev take, dense against Chipmunk (on a GPU); --model likewise
    python bench.py kernels                how fast the kernels are on this GPU, against the framework's fastest dense ones

score draws captions whose combination of colour, shape and relation was held out of training, and looks for every
asked-for thing in the pixels: which palette colour is where, in one piece, and which shape fills its bounding box best.
A video shows one thing; its colour, shape and background are looked for in the first, the middle and the last frame, and
where it stands, how large it is and how it is turned, in every second frame, tell whether it moves as asked.
"""
import argparse
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

import common
import flux_chipmunk
import hunyuan_chipmunk
import wan_chipmunk
from cache import fit_steps, listed, make_plan, make_state
from scenes import check, check_videos, make_moving_scene, make_scene, shape_masks, turned_shapes
from sparse_kernels import (GROUP, add_columns, attention, attention_triton, attention_with_column_mass, choose_columns, sparse_mlp_fc1,
                            sparse_mlp_fc2, triton)

BATCH = 20                     # pictures or videos drawn at a time

# ---------------------------------------------------------------------------------------------------------
# sampling: noise and texts of a batch -> latents; dense where sparsity is None


def sample_flux(flux, noise, text, pooled, config, sparsity, seed, progress=iter):
    """noise (B, z, 2h, 2w) -> latents, likewise."""
    h, w = (side // 2 for side in noise.shape[-2:])
    layout = flux_chipmunk.make_layout(config.flux, h, w, text.shape[1], noise.device)
    sigmas = flux_chipmunk.make_sigmas(config.steps, h * w, config.shift)
    plan = sparsity and make_plan(config.steps, sparsity)
    state = sparsity and make_state(len(flux.double_blocks) + len(flux.single_blocks), sparsity, layout.static, seed)
    x = flux_chipmunk.patchify(noise)                                # (B, h w, 4 z)
    x = flux_chipmunk.sample(flux, x, text, pooled, config.guidance, sigmas, layout, plan, state, progress)
    return flux_chipmunk.unpatchify(x, h, w)


def sample_wan(wan, noise, texts, config, sparsity, seed, progress=iter):
    """noise (B, z, t, 2h, 2w), texts of the prompts and of the negative prompt -> latents, shaped as the noise."""
    t, h, w = noise.shape[2:]
    layout = wan_chipmunk.make_layout(config.wan, (t, h // 2, w // 2), config.window, noise.device)
    schedule = wan_chipmunk.make_schedule(config.steps, config.shift)
    plan = sparsity and make_plan(config.steps, sparsity)
    states = sparsity and [make_state(len(wan.blocks), sparsity, layout.static, seed) for _ in texts]
    return wan_chipmunk.sample(wan, noise, texts, config.guidance, schedule, layout, plan, states, progress)


def sample_hunyuan(hunyuan, noise, text, pooled, config, sparsity, seed, progress=iter):
    """noise (B, z, t, 2h, 2w), text without padding -> latents, shaped as the noise."""
    t, h, w = noise.shape[2:]
    layout = hunyuan_chipmunk.make_layout(config.hunyuan, (t, h // 2, w // 2), text.shape[1], noise.device)
    sigmas = hunyuan_chipmunk.make_sigmas(config.steps, config.shift)
    plan = sparsity and make_plan(config.steps, sparsity)
    layers = len(hunyuan.transformer_blocks) + len(hunyuan.single_transformer_blocks)
    state = sparsity and make_state(layers, sparsity, layout.static, seed)
    return hunyuan_chipmunk.sample(hunyuan, noise, text, pooled, config.guidance, sigmas, layout, plan, state, progress)

# ---------------------------------------------------------------------------------------------------------
# score: three ways to draw, each -> batches of caption numbers, and generate(batch, sparsity) -> pictures (B, 3, H, W) or
# videos (B, 3, T, H, W) in -1..1


def draw_with_flux(captions, config, folder, device):
    texts, pooleds = flux_chipmunk.encode_prompts(captions, config, folder, device, torch.float32)
    flux, autoencoder = (flux_chipmunk.load_part(part, config, folder, device, torch.float32) for part in ("flux", "autoencoder"))
    flux.lay_out_for_deltas()
    side = config.size // 16

    def generate(batch, sparsity):
        noise = torch.cat([flux_chipmunk.make_noise(config.autoencoder.z, side, side, i) for i in batch.tolist()])
        x = sample_flux(flux, noise.to(device).float(), texts[batch], pooleds[batch], config, sparsity, int(batch[0]))
        return autoencoder.decode(x).clamp(-1, 1)
    return torch.arange(len(captions)).split(BATCH), generate


def draw_with_wan(captions, config, folder, device):
    *texts, negative = wan_chipmunk.encode_prompts([*captions, config.negative_prompt], config, folder, device, torch.float32)
    texts = torch.stack(texts)                                       # (captions, L, text_dim)
    wan, vae = (wan_chipmunk.load_part(part, config, folder, device, torch.float32) for part in ("wan", "vae"))
    shape = config.frames // 4 + 1, config.height // 8, config.width // 8

    def generate(batch, sparsity):
        noise = torch.cat([wan_chipmunk.make_noise(config.wan.channels, *shape, i) for i in batch.tolist()])
        both = texts[batch], negative.expand(len(batch), -1, -1)
        x = sample_wan(wan, noise.to(device), both, config, sparsity, int(batch[0]))
        return torch.cat([vae.decode(latents) for latents in x.split(1)]).clamp(-1, 1)
    return torch.arange(len(captions)).split(BATCH), generate


def draw_with_hunyuan(captions, config, folder, device):
    texts, mask, pooleds = hunyuan_chipmunk.encode_prompts(captions, config, folder, device, torch.float32)
    hunyuan, vae = (hunyuan_chipmunk.load_part(part, config, folder, device, torch.float32) for part in ("hunyuan", "vae"))
    grid = config.frames // 4 + 1, config.height // 16, config.width // 16       # (t, h, w) in tokens
    lengths = mask.sum(1).cpu()                                      # a batch has captions of one length, so no padding

    def generate(batch, sparsity):
        noise = torch.cat([hunyuan_chipmunk.make_noise(config.hunyuan.z, grid, i) for i in batch.tolist()])
        text = texts[batch, :lengths[batch[0]]]                      # (B, T, text_dim)
        x = sample_hunyuan(hunyuan, noise.to(device).float(), text, pooleds[batch], config, sparsity, int(batch[0]))
        return torch.cat([vae.decode(latents) for latents in x.split(1)]).clamp(-1, 1)
    return [b for n in lengths.unique() for b in (lengths == n).nonzero()[:, 0].split(BATCH)], generate


@torch.no_grad()
def score(args):
    program, draw_with = {"flux": (flux_chipmunk, draw_with_flux), "wan": (wan_chipmunk, draw_with_wan),
                          "hunyuan": (hunyuan_chipmunk, draw_with_hunyuan)}[args.model]
    config, device, video = program.CONFIGS["tiny"], common.pick_device(args.device), program is not flux_chipmunk
    rng = random.Random(2506)
    scenes = [(make_moving_scene if video else make_scene)(rng, train=False, plain=True) for _ in range(args.captions)]
    batches, generate = draw_with([scene.caption for scene in scenes], config, Path(__file__).parent / config.weights, device)
    known = turned_shapes(device) if video else shape_masks(device)

    def variant(**changes):
        return fit_steps(replace(config.sparsity, **changes), config.steps, config.steps)
    early, original = config.sparsity.measure, wan_chipmunk.WAN_SPARSITY.measure if video else 10
    variants = {"dense": None}
    if args.preset:
        variants["Chipmunk, preset"] = variant()
    else:
        for delta, measure, name in ("mass", early, ""), ("paper", early, ""), ("paper", original, ", the original's measure steps"):
            variants[f"delta={delta}{name}"] = variant(delta=delta, measure=measure, skip="none")
            variants[f"delta={delta}{name}, step caching"] = variant(delta=delta, measure=measure)
    totals = {name: [0] * 5 for name in variants}
    likeness = {name: [] for name in variants}
    for batch in tqdm(batches, "batches of captions"):
        asked = [scenes[i] for i in batch]
        for name, sparsity in variants.items():
            pictures = generate(batch, sparsity)                     # (B, 3, H, W) or (B, 3, T, H, W)
            if name == "dense":
                dense = pictures
            checks = check_videos(asked, pictures, known) if video else [check(s, p, known) for s, p in zip(asked, pictures)]
            totals[name] = [sum(column) for column in zip(totals[name], *checks)]
            for a, b in zip(dense, pictures):
                a, b = (p.transpose(0, 1) if video else p[None] for p in (a, b))             # (T or 1, 3, H, W)
                likeness[name].append((common.psnr(a, b), common.ssim(a, b)) if name != "dense" else (0, 0))

    print(f"| {args.model} tiny, {args.captions} captions, {config.steps} steps | things right | {'motions' if video else 'relations'} right "
          "| backgrounds right | PSNR to dense | SSIM |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (things, asked, related, relations, background) in totals.items():
        quality = "- | -" if name == "dense" else "{:.2f} dB | {:.4f}".format(*(sum(q) / len(q) for q in zip(*likeness[name])))
        print(f"| {name} | {things / asked:.1%} | {related / max(1, relations):.1%} | {background / args.captions:.1%} | {quality} |")
    print(f"\n({where(device)}, float32)")


def where(device):
    """What a table was measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}"

# ---------------------------------------------------------------------------------------------------------
# speed: the real models' transformers with random weights, which take about as long as trained ones


def with_random_weights(make_model, device, float32=()):
    """A model as common.load_weights makes it, in bfloat16, but without files."""
    common.check_memory(make_model, torch.bfloat16, device)
    with torch.device("meta"):
        model = make_model()
    for name, p in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        weight = torch.full(p.shape, float(leaf != "bias"), device=device,                       # norms are 1, biases 0
                            dtype=torch.float32 if any(part in name for part in float32) else torch.bfloat16)
        if p.ndim > 1:
            weight.normal_(std=p[0].numel()**-0.5)
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()


def random_flux(config, device):
    """-> a model, and sample(sparsity, progress)"""
    flux = with_random_weights(flux_chipmunk.parts(config)["flux"], device)
    flux.lay_out_for_deltas()
    noise, text, pooled = (torch.randn(1, *shape, device=device, dtype=torch.bfloat16) for shape in (
        (config.autoencoder.z, config.size // 8, config.size // 8), (config.text_length, config.flux.text_dim), (config.flux.pooled_dim,)))
    return flux, lambda sparsity, progress: sample_flux(flux, noise, text, pooled, config, sparsity, 0, progress)


def random_wan(config, device):
    wan = with_random_weights(wan_chipmunk.parts(config)["wan"], device, wan_chipmunk.Wan.FLOAT32)
    noise = torch.randn(1, config.wan.channels, config.frames // 4 + 1, config.height // 8, config.width // 8, device=device)
    texts = torch.randn(2, 1, config.text_length, config.wan.text_dim, device=device, dtype=torch.bfloat16)
    return wan, lambda sparsity, progress: sample_wan(wan, noise, texts, config, sparsity, 0, progress)


def random_hunyuan(config, device):
    hunyuan = with_random_weights(hunyuan_chipmunk.parts(config)["hunyuan"], device)
    noise = torch.randn(1, config.hunyuan.z, config.frames // 4 + 1, config.height // 8, config.width // 8, device=device)
    text, pooled = (torch.randn(1, *shape, device=device, dtype=torch.bfloat16) for shape in (
        (config.text_length, config.hunyuan.text_dim), (config.hunyuan.pooled_dim,)))
    return hunyuan, lambda sparsity, progress: sample_hunyuan(hunyuan, noise, text, pooled, config, sparsity, 0, progress)


def step_seconds(sample, sparsity, steps):
    """How long each of the first steps of a run takes, once a run before it has compiled all kernels. -> [seconds]"""
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
    for _ in range(2):
        seconds = []

        def progress(planned):
            for step in planned[:steps]:
                start = now()
                yield step
                seconds.append(now() - start)
        sample(sparsity, progress)
    return seconds


def speed(args):
    device = common.pick_device(args.device)
    if device.type != "cuda":
        raise common.Fail("python bench.py speed needs a GPU: the real models take hours on a CPU")
    program, name = {"flux": (flux_chipmunk, "dev"), "wan": (wan_chipmunk, "1.3b"), "hunyuan": (hunyuan_chipmunk, "720p")}[args.model]
    config = program.CONFIGS[name]
    if args.model == "hunyuan":
        config = replace(config, frames=33)                          # the caches of 129 frames are larger than most GPUs
    speed_table(args.model, name, config, device)


@torch.no_grad()
def speed_table(stem, name, config, device):
    model, sample = {"flux": random_flux, "wan": random_wan, "hunyuan": random_hunyuan}[stem](config, device)
    sparsity = fit_steps(config.sparsity, config.steps, config.steps)
    plan = make_plan(config.steps, sparsity)
    kinds = [(step.attn, step.mlp) for step in plan]
    first = {kind: kinds.index(kind) for kind in kinds}
    dense, ours = [], []
    for compiled in False, True:
        if compiled:
            for path, module in model.named_modules():
                if re.search(r"blocks\.\d+$", path):
                    module.compile()
        dense.append(median(step_seconds(sample, None, 4)))
        taken = list(zip(kinds, step_seconds(sample, sparsity, max(first.values()) + 2)))        # one step more than shows every kind
        ours.append({kind: median([s for k, s in taken if k == kind]) for kind in first})
    size = f"{config.width}x{config.height}" + (f"x{config.frames}" if stem != "flux" else "")
    print(f"| {stem} {name}, {size}, a step | of {config.steps} | eager | compiled |\n| --- | --- | --- | --- |")
    print(f"| of the dense model | {config.steps} | " + " | ".join(f"{s:.3f} s" for s in dense) + " |")
    for kind in first:
        print(f"| {kind[0] if stem != 'flux' else f'{kind[0]}, MLP {kind[1]}'} | {kinds.count(kind)} | " + " | ".join(f"{seconds[kind]:.3f} s" for seconds in ours) + " |")
    totals = [sum(seconds[kind] for kind in kinds) for seconds in ours]
    print(f"| **all {config.steps}, dense** | | " + " | ".join(f"{config.steps * s:.1f} s" for s in dense) + " |")
    print(f"| **all {config.steps}, Chipmunk** | | " + " | ".join(f"{t:.1f} s, **{config.steps * s / t:.2f}x**" for s, t in zip(dense, totals)) + " |")
    print(f"\n({where(device)}, bfloat16, random weights)")

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
    return median(times[1:])


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


ATTENTION_CASES = (("FLUX.1-schnell, 1024x1024", 24, 4_352, 0.165), ("HunyuanVideo, 720x1280x129", 24, 119_056, 0.07),
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
        row(f"attention with column mass ({case})", shape, dense, backend, ours, f"{ours / dense:.2f}x its time", "1x", flops)
        ours = milliseconds(lambda: attention_triton(q, k, v))
        row("*limit: dense attention in Triton, no mass*", shape, dense, backend, ours, f"{ours / dense:.2f}x its time", "1x", flops)
        mass = attention_with_column_mass(q, k, v, lse)[2]
        ours = milliseconds(lambda: choose_columns(mass, keep, 0.01, None, 1))
        row("choose columns, and 1 % at random", shape, dense, backend, ours, f"{ours / dense:.1%} of its time", "-", 0)
        columns, counts = choose_columns(mass, keep, 0.0, None, 1)
        ours = milliseconds(lambda: add_columns(q, k, v, columns, counts, o, lse))
        row(f"column-sparse attention, {keep:.1%} kept", shape, dense, backend, ours, f"**{dense / ours:.2f}x**", f"{1 / keep:.1f}x", keep * flops)
        if n < 10_000:
            flex = flex_ms(q, k, v, columns, counts)
            row("the same columns by flex_attention", shape, flex, "flex", ours, f"{flex / ours:.2f}x", "-", keep * flops)
            ours = milliseconds(lambda: add_columns(q, k, v, columns, torch.zeros_like(counts), o, lse))
            row("*limit: with empty lists, cache in and out only*", shape, dense, backend, ours, f"{dense / ours:.2f}x", "-", 0)
        del mass

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
    shape, label = f"{rows} x {dim} -> {hidden} -> {dim}", f"{label}, {flops / dense / 1e9:.0f} TFLOP/s"
    ours = milliseconds(lambda: sparse_mlp_fc2(sparse_mlp_fc1(x, w1, b1, columns, counts, act), w2t, columns, counts, out))
    row(f"sparse MLP, {keep:.0%} kept, cache update included", shape, dense, label, ours, f"**{dense / ours:.2f}x**", f"{1 / keep:.1f}x", keep * flops)
    delta = sparse_mlp_fc1(x, w1, b1, columns, counts, act)
    for name, run in (("fc1", lambda: sparse_mlp_fc1(x, w1, b1, columns, counts, act)),
                      ("fc2", lambda: sparse_mlp_fc2(delta, w2t, columns, counts, out))):
        ours = milliseconds(run)
        row(f"*limit: its {name} alone*", shape, dense, label, ours, f"{ours / dense:.2f}x its time", f"{keep / 2:.2f}x", keep * flops / 2)
    print(f"\n({where(torch.device('cuda'))}, triton {triton.__version__}, bfloat16, random data, medians of CUDA graph replays)")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["score", "speed", "kernels"])
    parser.add_argument("--model", choices=["flux", "wan", "hunyuan"], default="flux", help="of the score and the speed (default: flux)")
    parser.add_argument("--captions", type=common.number(int, 1, 10_000), default=200)
    parser.add_argument("--preset", action="store_true", help="of the score: dense and the model's preset alone, which is sooner")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    {"score": score, "speed": speed, "kernels": kernels}[args.table](args)


if __name__ == "__main__":
    common.run(main)
