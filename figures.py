"""Draws the figures of method.md into assets/, and prints the numbers that stand there.

    python figures.py observation    which share of the columns carries which share of the change between steps
    python figures.py order          groups of 128 tokens in raster order and in patches, and that share in each
    python figures.py videos         the same for attention in both video models, in raster order and in voxels
    python figures.py plan           what 13 steps do, and what a step of each kind costs
    python figures.py kernel         the way of k and v through a GPU
    python figures.py example        the deltas of attention and of the MLP in numbers (no figure)
    python figures.py links          points method.md's links at the lines that they name (no figure)

The first three watch the tiny models draw densely, which takes seconds on a CPU, for the videos a minute or two.
Figures need matplotlib.
"""
import interrupt
if __name__ == "__main__":
    interrupt.at_ctrl_c(interrupt.end)                               # importing torch takes seconds

import argparse
import math
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

import cli
import flux_chipmunk
import media
from bench import DRAW, FIGURES, known_times, print_header, print_row
from cache import chipmunk_attention, chipmunk_mlp, make_state
from plan import Sparsity, Step, make_plan, relative_time
from sparse_kernels import GROUP, attention, attention_with_column_mass
from voxel import token_order

PROMPT, SEED = "a small orange heart above a large cyan triangle on a purple background", 6
VIDEOS = {"wan": "a furry brown chipmunk moves left to right on a cloudy blue background",
          "hunyuan": "a green tree on a brick brown background, the camera moves right"}
STARTS = 5, 15, 25, 35, 45     # changes are taken from these steps to the next one, and to the 4th after them
COLORS = {"dense": "#4c78a8", "measure": "#e45756", "refresh": "#f2a49f", "sparse": "#72b7b2", "skip": "#dddddd"}


def load_pyplot():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise cli.Fail("figures are drawn by matplotlib; install it: pip install matplotlib") from None
    return pyplot


def save(figure, name):
    """assets/NAME.png in 256 colours, white behind it whatever the page's colour."""
    out = FIGURES / f"{name}.png"
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, facecolor="white", bbox_inches="tight")
    picture = Image.open(drawn).convert("RGB").quantize(256)
    media.write_whole(out, False, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
    cli.say(f"\n{out.parent.name}/{out.name}")

# ---------------------------------------------------------------------------------------------------------
# watching the tiny model


class Seen(NamedTuple):
    attention: dict            # {step: [q, k, v of each layer]}, (1, H, N, D), (1, H, Nk, D) twice
    mlp: dict                  # {step: [gelu(W1 x + b1) and W2 of each layer]}, (1, rows, F) and (C, F); FLUX.1's
    drawn: torch.Tensor        # (3, H, W), or of a video (3, T, H, W), in -1..1


def watch(name, prompt, seed, offsets):
    """Have a tiny model draw densely, and keep what its layers compute so many steps from STARTS. -> Seen"""
    program, draw_with = DRAW[name]
    wanted = {start + offset for start in STARTS for offset in offsets}
    attentions, mlps = ({i: [] for i in sorted(wanted)} for _ in range(2))

    def watched_attention(q, k, v, layer_state, step):
        if step.index in wanted:
            attentions[step.index].append((q, k, v))
        return chipmunk_attention(q, k, v, layer_state, step)

    def watched_mlp(x, w1, b1, w2, b2, layer_state, step):
        if step.index in wanted:
            mlps[step.index].append((F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2))
        return chipmunk_mlp(x, w1, b1, w2, b2, layer_state, step)
    watched = {"chipmunk_attention": watched_attention} | ({"chipmunk_mlp": watched_mlp} if name == "flux" else {})
    captions = [prompt] * (seed + 1)                                 # a caption's number is its seed
    _, generate = draw_with(captions, program.CONFIGS["tiny"], torch.device("cpu"))
    with mock.patch.multiple(program, **watched):                    # every step in full, so each is dense
        drawn, = generate(torch.tensor([seed]), Sparsity(full=1, mlp_keep=0.0, dense_layers=0))
    return Seen(attentions, mlps, drawn)


def probabilities(q, k):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)           # (1, H, T + N, T + N)


def attention_change(before, now):
    """Of every row i and column j, the squared change of what j adds to i's output, |p'_ij v'_j - p_ij v_j|^2.
    (q, k, v) at two steps, (1, H, T + N, D) each -> (1, H, T + N, T + N)"""
    (q, k, v), (q_now, k_now, v_now) = before, now
    p, p_now = probabilities(q, k), probabilities(q_now, k_now)      # (1, H, T + N, T + N) each
    dp, dv = p_now - p, v_now - v
    vv, v_dv, dv_dv = ((a * b).sum(-1)[:, :, None] for a, b in ((v, v), (v, dv), (dv, dv)))      # (1, H, 1, T + N)
    return (dp**2 * vv + 2 * dp * p_now * v_dv + p_now**2 * dv_dv).clamp(min=0)


def mlp_change(before, now):
    """Likewise of every row and hidden column f, (a'_f - a_f)^2 |W2[:, f]|^2. -> (1, rows, F)"""
    (act, w2), (act_now, _) = before, now
    return ((act_now - act) * w2.norm(dim=0)) ** 2


def shares(change, rows, rank=None):
    """Which share of a squared change (..., N, M) lies in the first 1, 2, ... M columns, if every `rows` neighbouring
    rows share their columns. rank (..., N, M): most of this first; None: most change first. -> (M,), mean of groups"""
    per_group = change.unflatten(-2, (-1, rows)).sum(-2)             # (..., N / rows, M)
    if rank is None:
        ordered = per_group.sort(-1, descending=True).values
    else:
        best = rank.unflatten(-2, (-1, rows)).sum(-2).argsort(-1, descending=True)               # (..., N / rows, M)
        ordered = per_group.gather(-1, best)
    so_far = ordered.cumsum(-1)
    return (so_far / so_far[..., -1:].clamp(min=1e-30)).flatten(0, -2).mean(0)


def at(curve, columns):
    """A curve of `shares` at this share of the columns, like "98.1%"."""
    return f"{curve[math.ceil(columns * len(curve)) - 1]:.1%}"


def reaching(curve, share):
    """The share of the columns at which a curve of `shares` reaches this one, like "7.1%"."""
    return f"{(int((curve < share).sum()) + 1) / len(curve):.1%}"


def plot_shares(axes, curve, columns=0.5, **style):
    n = round(columns * len(curve))
    axes.plot([100 * (i + 1) / len(curve) for i in range(n)], (100 * curve[:n]).tolist(), **style)

# ---------------------------------------------------------------------------------------------------------
# the figures

GROUPINGS = "each row has its own columns", "128 rows share them", "128 rows share them, chosen beforehand"


@torch.no_grad()
def observation():
    pyplot, seen = load_pyplot(), watch("flux", PROMPT, SEED, (-4, -1, 0, 1, 4))
    curves = {}                                                      # {(part, steps apart): {grouping: (M,)}}
    for apart in 1, 4:
        found = {"attention": [], "MLP": []}
        for start in STARTS:
            for before, now in zip(seen.attention[start], seen.attention[start + apart]):
                found["attention"].append((attention_change(before, now), probabilities(*before[:2])))
            for earlier, before, now in zip(*(seen.mlp[start + offset] for offset in (-apart, 0, apart))):
                found["MLP"].append((mlp_change(before, now), mlp_change(earlier, before)))
        for part, changes in found.items():
            kinds = [[shares(change, 1), shares(change, GROUP), shares(change, GROUP, rank)]
                     for change, rank in changes]
            means = [torch.stack(kind).mean(0) for kind in zip(*kinds)]              # (M,) each
            curves[part, apart] = dict(zip(GROUPINGS, means))

    columns = 0.05, 0.10, 0.165, 0.25, 0.30
    print_header("share of the squared change in", *(f"{c:.1%}" for c in columns), "70% lie in", "90% lie in")
    figure, both_axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    kept = flux_chipmunk.FLUX_COLUMNS.attn_keep, flux_chipmunk.FLUX_COLUMNS.mlp_keep
    for part, axes, preset in zip(("attention", "MLP"), both_axes, kept):
        for apart, line in (1, "-"), (4, "--"):
            for color, (grouping, curve) in zip(("#4c78a8", "#e45756", "#54a24b"), curves[part, apart].items()):
                label = f"{grouping}; {apart} step{'s' * (apart > 1)}"
                print_row(f"{part}: {label}", *(at(curve, c) for c in columns), reaching(curve, 0.7),
                          reaching(curve, 0.9))
                plot_shares(axes, curve, color=color, linestyle=line, label=label)
        said = "the paper: 5-25 % hold 70-90 %"
        axes.add_patch(pyplot.Rectangle((5, 70), 20, 20, color="#bbbbbb", alpha=0.5, label=said))
        axes.axvline(100 * preset, color="black", linewidth=0.8, linestyle=":", label="kept by preset columns")
        axes.set(title=part, xlabel="% of the columns", xlim=(0, 50), ylim=(0, 101))
    both_axes[0].set_ylabel("% of the squared change")
    handles = both_axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    save(figure, "observation")


@torch.no_grad()
def order():
    pyplot, seen, config = load_pyplot(), watch("flux", PROMPT, SEED, (0, 4)), flux_chipmunk.CONFIGS["tiny"]
    side = config.size // 16
    layout, n = flux_chipmunk.make_layout(config.flux, side, side, config.text_length), side**2
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    orders = {"raster": torch.arange(n), "patches": layout.order, "random": shuffled}    # (N,) raster indices of tokens
    curves = {}                                                      # {(part, order): (M,)}
    for name, tokens in orders.items():
        rows = layout.inverse[tokens]                                # (N,): where these tokens stand in the model
        found = {"attention": [], "MLP": []}
        for start in STARTS:
            for before, now in zip(seen.attention[start], seen.attention[start + 4]):
                change = attention_change(before, now)[:, :, -n:]    # (1, H, N, T + N): the picture's rows
                found["attention"].append(shares(change[:, :, rows], GROUP))
            for before, now in zip(seen.mlp[start], seen.mlp[start + 4]):
                found["MLP"].append(shares(mlp_change(before, now)[:, -n:][:, rows], GROUP))
        curves |= {(part, name): torch.stack(some).mean(0) for part, some in found.items()}

    columns = 0.05, 0.10, 0.165, 0.30
    print_header("share of the squared change in", *(f"{c:.1%}" for c in columns), "90% lie in")
    figure, (*pictures, axes) = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for (name, tokens), canvas, color in zip(orders.items(), pictures, ("#4c78a8", "#e45756", "#54a24b")):
        group = torch.empty(n, dtype=torch.long)
        group[tokens] = torch.arange(n) // GROUP                     # (N,), of each token in raster order
        group = group.view(side, side)                               # (h, w)
        canvas.imshow(media.to_bytes(seen.drawn), extent=(0, side, side, 0))
        canvas.imshow(group.numpy(), extent=(0, side, side, 0), cmap="Set2", alpha=0.5)
        canvas.set(title=f"{name}: {group.max() + 1} groups of {GROUP}", xticks=[], yticks=[])
        for part, line in ("attention", "-"), ("MLP", "--"):
            curve = curves[part, name]
            print_row(f"{part}, {name}", *(at(curve, c) for c in columns), reaching(curve, 0.9))
            plot_shares(axes, curve, color=color, linestyle=line, label=f"{part}, {name}")
    axes.set(xlabel="% of the columns", ylabel="% of the squared change", xlim=(0, 50), ylim=(0, 101))
    axes.legend(fontsize=8, loc="lower right")
    save(figure, "order")


@torch.no_grad()
def videos():
    pyplot = load_pyplot()
    columns = 0.02, 0.05, 0.10, 0.165
    print_header("share of the squared change in", *(f"{c:.1%}" for c in columns), "70% lie in", "90% lie in")
    figure, both_axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for (name, prompt), axes in zip(VIDEOS.items(), both_axes):
        program, seen = DRAW[name][0], watch(name, prompt, 1, (0, 4))
        config, found = program.CONFIGS["tiny"], []
        grid = config.frames // 4 + 1, config.height // 16, config.width // 16               # (t, h, w) in tokens
        raster = token_order(grid, program.VOXEL).argsort()          # (N,): where the tokens stand in the model
        for start in STARTS:
            for before, now in zip(seen.attention[start], seen.attention[start + 4]):
                change = attention_change(before, now)               # (1, H, N, Nk): the video's rows
                found.append((shares(change, 1), shares(change[:, :, raster], GROUP), shares(change, GROUP),
                              shares(change, GROUP, probabilities(*before[:2]))))
        labels = "each row has its own columns", "128 rows in raster order share them", "128 rows of a voxel share them"
        colors = "#4c78a8", "#f2a49f", "#e45756", "#54a24b"
        for label, kinds, color in zip((*labels, f"{labels[2]}, chosen beforehand"), zip(*found), colors):
            curve = torch.stack(kinds).mean(0)                       # (Nk,)
            print_row(f"{name} tiny: {label}", *(at(curve, c) for c in columns), reaching(curve, 0.7),
                      reaching(curve, 0.9))
            plot_shares(axes, curve, 0.25, color=color, label=label)
        axes.axvline(100 * config.presets["columns"].attn_keep, color="black", linewidth=0.8, linestyle=":",
                     label="kept by preset columns")
        axes.set(title=f"{name} tiny, attention", xlabel="% of the columns", xlim=(0, 25), ylim=(0, 101))
    both_axes[0].set_ylabel("% of the squared change")
    both_axes[1].legend(fontsize=8, loc="lower right")
    save(figure, "videos")


def plan():
    pyplot, layers = load_pyplot(), 5
    full = 1, 4, 8, 12
    sparsity = replace(flux_chipmunk.FLUX_COLUMNS, full=full, choose=2, skip=(2, 5, 7, 9, 11))
    steps = make_plan(13, sparsity)
    times = known_times("flux")
    costs = {name: {mode: seconds / found["eager"]["dense model"] for mode, seconds in found["eager"].items()}
             for name, found in times.items()}
    print_header("a step's time, the dense model's is 1", *COLORS)
    for name, cost in costs.items():
        print_row(f"{name} {times[name]['model']}", *(f"{cost[mode]:.3f}" for mode in COLORS))
    cli.say(f"\nthe 13 steps take {relative_time(steps, costs['flux']):.2f} of the dense model's time")

    figure, (top, below) = pyplot.subplots(2, 1, figsize=(10, 4.5), sharex=True, height_ratios=(3, 2))
    for step in steps:
        for layer in range(layers):
            mode = "dense" if layer < sparsity.dense_layers and not step.skip else step.mode
            top.add_patch(pyplot.Rectangle((step.index + 0.04, layer + 0.05), 0.92, 0.9, color=COLORS[mode]))
            top.text(step.index + 0.5, layer + 0.5, "-" if step.skip else mode, ha="center", va="center", fontsize=8)
        height = costs["flux"][step.mode]
        below.bar(step.index + 0.5, height, width=0.92, color=COLORS[step.mode])
        below.text(step.index + 0.5, height + 0.05, step.mode, ha="center", fontsize=8)
    top.set(title="what each layer does at each step", ylim=(layers, 0), yticks=[i + 0.5 for i in range(layers)],
            yticklabels=[f"layer {i}" for i in range(layers)])
    below.axhline(1, color="black", linewidth=0.8, linestyle=":")
    below.set(xlim=(0, 13), ylim=(0, 1.7), xticks=[i + 0.5 for i in range(13)], xticklabels=range(13), xlabel="step",
              ylabel="time, dense model = 1")
    save(figure, "plan")


def kernel():
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(11, 4.6))
    kept, columns = (1, 4, 5, 9, 12, 13, 14), 16

    def box(x, y, width, height, fill, text, **style):
        axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=fill, edgecolor="#555555", linewidth=0.8))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 9, **style})

    def arrow(start, end, **style):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#555555", "linewidth": 1, **style})

    for x, title in (0, "global memory"), (4.4, "shared memory"), (8, "registers and tensor cores"):
        axes.text(x, 9.3, title, fontsize=11, weight="bold")
    for x, name in (0, "k"), (1.3, "v"):                             # one row of memory is one column of attention
        axes.text(x + 0.5, 8.75, f"{name} (Nk, D)", ha="center", fontsize=9)
        for j in range(columns):
            box(x, 8.1 - 0.4 * j, 1, 0.4, COLORS["sparse"] if j in kept else "white", str(j), fontsize=7)
    for slot, j in enumerate(kept):
        for x, name in (4.4, "k"), (5.7, "v"):
            box(x, 7.7 - 0.4 * slot, 1, 0.4, COLORS["sparse"], f"{name}[{j}]", fontsize=7)
        arrow((2.35, 8.3 - 0.4 * j), (4.35, 7.9 - 0.4 * slot), linewidth=0.7)
    axes.text(5.55, 8.35, "a tile of 32 rows, side by side", ha="center", fontsize=9)
    box(0, 1.3, 2.3, 0.5, "#dddddd", "q, 128 rows")
    box(0, 0.65, 2.3, 0.5, "#f2cf5b", "columns: 1 4 5 9 12 13 14")
    box(0, 0, 2.3, 0.5, "#dddddd", "o_rest")
    box(4.4, 4.2, 2.3, 0.6, "#dddddd", "q, 128 rows: stays")
    box(8, 6.6, 3.2, 1.2, COLORS["dense"], "s = q k^T   (128 x 32)\ntensor cores", color="white")
    box(8, 4.8, 3.2, 1.2, "white", "p = exp2(s - m), m: the last lse\nregisters")
    box(8, 3.0, 3.2, 1.2, COLORS["dense"], "acc += p v   (128 x D)\ntensor cores", color="white")
    box(8, 1.0, 3.2, 1.2, "#dddddd", "o = acc / z, plus o_rest\nonce a group, to global memory")
    arrow((6.75, 7.0), (7.95, 7.2))
    arrow((6.75, 4.6), (7.95, 6.8))
    arrow((6.75, 5.5), (7.95, 3.6))
    arrow((2.35, 1.55), (4.35, 4.4))
    for y in 6.6, 4.8, 3.0:
        arrow((9.6, y), (9.6, y - (0.6 if y > 3 else 0.8)))
    arrow((2.35, 0.25), (7.95, 1.5))
    axes.text(5.6, 2.3, "the next tile's column numbers and rows\nare on their way meanwhile", ha="center", fontsize=9)
    axes.set(xlim=(-0.1, 11.3), ylim=(-0.1, 9.8))
    axes.axis("off")
    save(figure, "kernel")

# ---------------------------------------------------------------------------------------------------------
# the example: two queries, five columns, keep two of them


def numbers(x):
    return " ".join(f"{round(value, 3):7g}" for value in torch.as_tensor(x).flatten().tolist())


def say(label, *rows):
    cli.say(f"{label:42}" + "  |".join(numbers(row) for row in rows))


def weights_to_qkv(weights, values):
    """Queries and keys with exp(q_i k_j / sqrt(2)) = weights (2, 5), and v whose first number is values (5,).
    -> q (1, 1, 2, 2), k (1, 1, 5, 2), v (1, 1, 5, 2)"""
    q = math.sqrt(2) * torch.eye(2, dtype=torch.float64)
    k = torch.tensor(weights, dtype=torch.float64).log().t().contiguous()            # (5, 2)
    v = F.pad(torch.tensor(values, dtype=torch.float64)[:, None], (0, 1))            # (5, 2)
    return q[None, None], k[None, None], v[None, None]


def attention_example():
    inputs = {"measure step": ([[8, 4, 2, 1, 1], [4, 8, 1, 1, 2]], [6, 2, 12, 4, 6]),
              "next step": ([[4, 8, 2, 1, 1], [2, 9, 2, 1, 2]], [6, 6, 12, 4, 7])}
    then, now = (weights_to_qkv(*given) for given in inputs.values())
    o, lse = attention(*then)                                        # (1, 1, 2, 2), (1, 1, 2)
    o_now, mass = attention(*now)[0], attention_with_column_mass(*then, lse)[2]      # mass (1, 1, 1, 5)
    for (name, (weights, values)), dense in zip(inputs.items(), (o, o_now)):
        say(f"exp(s) of the two queries, {name}", *weights)
        say(f"v, {name}", values)
        say(f"dense result, {name}", dense[..., 0])
    say("mass of the five columns", mass)
    say("the old result, kept: off by", (o - o_now)[..., 0])

    for delta in "paper", "pooled":
        sparsity = Sparsity(attn_keep=0.4, delta=delta, dense_layers=0)
        state = make_state(1, sparsity, 5, None, 0, "cpu").layers[0]
        for i, (mode, qkv) in enumerate((("dense", then), ("measure", then), ("sparse", now))):
            result = chipmunk_attention(*qkv, state, Step(i, mode))
        o_S, o_S_now = o - state.o_rest, result - state.o_rest       # "pooled": of S and the mean of all
        cli.say(f"\n{delta}: S = {state.columns[0, 0, 0, :int(state.counts)].tolist()}")
        say("o_S, measure step", o_S[..., 0])
        say("o_rest", state.o_rest[..., 0])
        say("o_S, next step", o_S_now[..., 0])
        say("result, next step", result[..., 0])
        say("off by", (result - o_now)[..., 0])


def mlp_example():
    w1, b1, w2 = [[2.0], [-1.0], [1.0], [0.5], [-2.0]], [0.0, 1.0, 0.0, 1.0, 0.0], [[1.0, -2.0, -1.0, 0.5, 1.0]]
    w1, b1, w2 = (torch.tensor(values, dtype=torch.float64) for values in (w1, b1, w2))      # (5, 1), (5,), (1, 5)
    xs = torch.tensor([[0.4, 0.1], [0.7, 0.4], [1.0, 0.8]], dtype=torch.float64)             # (3, 2)
    modes = "dense", "measure", "sparse"
    state = make_state(1, Sparsity(mlp_keep=0.4, dense_layers=0), 0, None, 0, "cpu").layers[0]
    cli.say("")
    for i, (mode, x) in enumerate(zip(modes, xs)):
        say(f"gelu(w1 x + b1) of row 0, {mode} step", F.gelu(w1[:, 0] * x[0] + b1, approximate="tanh"))
        result = chipmunk_mlp(x.view(1, 2, 1), w1, b1, w2, None, state, Step(i, mode)).clone()       # (1, 2, 1)
        if mode == "measure":
            out = result
    acts = F.gelu(F.linear(xs[..., None], w1, b1), approximate="tanh")                       # (3, 2, 5)
    listed = state.mlp_columns[0, 0, :int(state.mlp_counts)].tolist()
    say("moved up to the measure step, times |w2|", (acts[1, 0] - acts[0, 0]).abs() * w2[0].abs())
    cli.say(f"S = {listed}")
    dense = F.linear(acts[2], w2)                                                            # (2, 1)
    say("result of both rows, measure step", out)
    say("dense result, next step", dense)
    say("the old result, kept: off by", out[0] - dense)
    say("w2[S] times the change of S", result - out)
    say("result, next step", result)
    say("off by", result[0] - dense)


@torch.no_grad()
def example():
    attention_example()
    mlp_example()


def linked(page):
    """A page's text whose links, as [`fit_steps`](plan.py#L1), point at the line where the first name is defined."""
    def to_line(link):
        names, file = link.groups()
        name = re.search(r"(\w+)`", names)[1]
        code = (Path(__file__).resolve().parent / file).read_text(encoding="utf-8")
        found = re.search(rf"^ *(def|class) {name}\b|^{name} = ", code, re.MULTILINE)
        if not found:                                                # a file's own name
            return f"[{names}]({file})"
        line = code.count("\n", 0, found.start()) + 1
        return f"[{names}]({file}#L{line})"
    return re.sub(r"\[(`[^]]+`)\]\((\w+\.py)(?:#L\d+)?\)", to_line, page)


def links():
    page = Path(__file__).resolve().parent / "method.md"
    text = linked(page.read_text(encoding="utf-8"))
    media.write_whole(page, False, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main():
    draw = {"observation": observation, "order": order, "videos": videos, "plan": plan, "kernel": kernel,
            "example": example, "links": links}
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", choices=list(draw), metavar="FIGURE", help=" | ".join(draw))
    for name in parser.parse_args().figures:
        draw[name]()


if __name__ == "__main__":
    cli.run(main)
