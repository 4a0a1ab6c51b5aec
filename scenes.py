"""The embedded models' small world: drawing captioned scenes, and judging pictures and videos of them.

A picture shows one to three coloured shapes on a coloured background; a video shows one that moves, grows, shrinks,
rotates or bounces. Both are drawn from signed distances, with a caption that says what is where and what it does. Some
combinations of colour, shape and relation (or motion) are held out of training.

The judge knows the pixels alone. In a picture it looks for every asked-for thing: which palette colour is where, in one
piece, and which shape fills its bounding box best. In a video it looks for the one thing's colour, shape and background
in the first, the middle and the last frame; its place, its size and how it is turned, in every
second frame, tell whether it moves as asked.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
           "moves up": ("moving up", "moves upwards", "rises"),
           "moves down": ("moving down", "moves downwards", "falls"),
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
    end: Thing | None = None   # things[0] at its end, or halfway if it bounces


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
    """Is the thing centred at a (x, y) in `relation` to the one at b, beyond doubt: `margin` times as far that way as
    sideways?"""
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
    room = 1 - 2 * edge
    near, far = edge + rng.uniform(0, 0.15) * room, 1 - edge - rng.uniform(0, 0.15) * room
    x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
    return {"moves left to right": ((near, y, r), (far, y, r)), "moves right to left": ((far, y, r), (near, y, r)),
            "moves up": ((x, far, r), (x, near, r)), "moves down": ((x, near, r), (x, far, r)),
            "bounces": ((x, near, r), (x, far, r)), "rotates": ((x, y, r), (x, y, r)),
            "grows": ((x, y, r), (x, y, most)), "shrinks": ((x, y, most), (x, y, r))}[motion]


def make_moving_scene(rng, train=True, plain=False):
    """A random scene for a video: one thing and what it does. train and plain as in make_scene."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        shape, motion = rng.choice(SHAPES), rng.choice(list(MOTIONS))
        if held_out(colour, shape, motion) == train or motion == "rotates" and shape in ROUND:
            continue
        sizes = ("", "", "large") if motion == "rotates" else ("", "", *SIZES)   # turning is hard to see in the small
        size = rng.choice(sizes)
        start, end = (Thing(colour, shape, size, *place) for place in route(rng, size, motion))
        text = caption(rng, (start,), motion, background, plain)
        return Scene((start,), "", background, text, motion, end)


def caption(rng, things, doing, background, plain):
    """The prompt for a scene: canonical words if plain, else sometimes others that mean the same. doing: relation or
    motion."""
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
        against = f" against a {background} background"
        text += rng.choice((f" on {background}", f", {background} background", against, ""))
    if not plain and rng.random() < 0.2:
        openings = ("a video of ", "an animation of ")
        if not moving:
            openings = ("a picture of ", "draw ", "an image of ", "there is ")
        text = rng.choice(openings) + text
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
    if shape == "star":                                              # fold the plane onto half of one of five points
        angle = (torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
        inner = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
        nx, ny = inner[1], 1 - inner[0]
        length = torch.hypot(x, y)
        return ((length * angle.cos() - 1) * nx + length * angle.sin() * ny) / math.hypot(nx, ny)
    assert shape == "heart", shape                                   # two discs, and a kite from their centres down
    x = x.abs()
    discs = torch.hypot(x - 0.45, y + 0.35) - 0.52
    kite = torch.maximum(0.7513 * x + 0.66 * (y - 0.95), 0.66 * (x - 0.45) - 0.7513 * (y + 0.35))
    return torch.minimum(discs, torch.maximum(kite, -(y + 0.35)))


def cover(shape, x, y, r, angle, size, window=(0.0, 0.0, 1.0)):
    """How much of each pixel is inside a shape, edges smooth over a pixel.

    x, y, r, angle: (...) each; centre and radius as shares of the picture's side, angle clockwise
    window: left, top and side of what is seen
    -> (..., size, size) in 0..1"""
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
    background = colours_of([s.background for s in scenes], device)              # (B, 3)
    pictures = background[:, :, None, None].expand(-1, -1, size, size).clone()   # (B, 3, size, size)
    for shape in SHAPES:
        for i in range(max(len(s.things) for s in scenes)):                      # one thing a scene at a time
            rows = [(b, t) for b, s in enumerate(scenes) for t in s.things[i:i + 1] if t.shape == shape]
            if rows:
                b, things = zip(*rows)
                places = torch.tensor([(t.x, t.y, t.r, 0.0) for t in things], device=device)     # (b, 4)
                covers = cover(shape, *places.unbind(1), size, window)[:, None]                  # (b, 1, size, size)
                colour = colours_of([t.colour for t in things], device)[:, :, None, None]        # (b, 3, 1, 1)
                b = torch.tensor(b, device=device)
                pictures[b] = pictures[b].lerp(colour, covers)
    return pictures


def moments(scenes, frames, device):
    """Where the thing of each scene is in each frame: x, y, r and angle, (B, T) each."""
    time = torch.linspace(0, 1, frames, device=device)                           # (T,)
    fall = (1 - (1 - 2 * time).abs()).square()                                   # down faster and faster, then up again
    motions = [s.motion for s in scenes]
    bounces = torch.tensor([[m == "bounces"] for m in motions], device=device)   # (B, 1)
    turns = torch.tensor([[m == "rotates"] for m in motions], device=device)     # (B, 1)
    start = torch.tensor([(s.things[0].x, s.things[0].y, s.things[0].r) for s in scenes], device=device)     # (B, 3)
    end = torch.tensor([(s.end.x, s.end.y, s.end.r) for s in scenes], device=device)
    done = torch.where(bounces, fall, time)                                      # (B, T)
    places = torch.lerp(start[:, :, None], end[:, :, None], done[:, None])       # (B, 3, T)
    return *places.unbind(1), math.pi * time * turns                             # half a turn


def draw_videos(scenes, size, frames, device="cpu", window=(0.0, 0.0, 1.0), behind=None):
    """Scenes with a motion -> videos (B, 3, T, size, size) in -1..1; their things on the videos `behind` instead of
    their backgrounds, if those are given."""
    places = moments(scenes, frames, device)
    covers = torch.empty(len(scenes), frames, size, size, device=device)         # (B, T, size, size)
    for shape in SHAPES:
        rows = [b for b, s in enumerate(scenes) if s.things[0].shape == shape]
        if rows:
            covers[rows] = cover(shape, *(p[rows] for p in places), size, window)
    colour = colours_of([s.things[0].colour for s in scenes], device)            # (B, 3)
    if behind is None:
        background = colours_of([s.background for s in scenes], device)          # (B, 3)
        behind = background[:, :, None, None, None]                              # (B, 3, 1, 1, 1)
    return torch.lerp(behind, colour[:, :, None, None, None], covers[:, None])   # (B, 3, T, size, size)

# ---------------------------------------------------------------------------------------------------------
# judging pictures

GRID = 256                     # pictures are looked at in this many cells a side


def shape_masks(device):
    """{shape: bool (h, w)}, each cut to its bounding box."""
    masks = {}
    for shape in SHAPES:
        picture = draw([Scene((Thing("black", shape, "", 0.5, 0.5, 0.4),), "", "white", "")], 256, device)[0]
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
    numbers = torch.arange(1.0, coarse.numel() + 1, device=mask.device).view(coarse.shape) * coarse
    while not torch.equal(numbers, spread := F.max_pool2d(numbers[None], 3, 1, 1)[0] * coarse):
        numbers = spread
    numbers = numbers.repeat_interleave(2, 0).repeat_interleave(2, 1)            # (H, W)
    return [(numbers == n) & mask for n in numbers.unique() if n > 0]


def without_rims(masks):
    """Masks (B, H, W) of 0 and 1 without the thin rims between two colours: whatever holds no 3 x 3 cells."""
    return F.max_pool2d(-F.max_pool2d(-masks, 3, 1, 1), 3, 1, 1)


def see(picture, masks):
    """What is in a picture (3, S, S) in -1..1? -> background colour, [(colour, shape, (x, y) of the centre)]"""
    cells = F.adaptive_avg_pool2d(picture, GRID)                     # (3, GRID, GRID)
    palette = torch.tensor(list(COLOURS.values()), device=cells.device) / 127.5 - 1              # (10, 3)
    nearest = (cells[None] - palette[:, :, None, None]).square().sum(1).argmin(0)                # (GRID, GRID)
    background = nearest.flatten().mode().values.item()
    found = []
    for index, colour in enumerate(COLOURS):
        mask = nearest == index
        mask = without_rims(mask[None].float())[0].bool()            # (GRID, GRID)
        for piece in pieces(mask) if index != background else []:
            if piece.sum() < 0.003 * GRID**2:
                continue
            box = cut(piece)
            overlap = {}
            for shape, full in masks.items():
                fitted = F.interpolate(full[None, None].float(), box.shape, mode="bilinear", antialias=True)
                fitted = fitted[0, 0] > 0.5                          # (h, w), as box
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
    right = sum(c is not None for c in centres)
    return right, len(centres), int(related), int(bool(scene.relation)), background == scene.background

# ---------------------------------------------------------------------------------------------------------
# judging videos

CELLS, CROP = 128, 48          # frames are looked at in CELLS^2 cells, and their thing, scaled to one size, in CROP^2
TURNS = 48                     # orientations that a shape is compared in
SYMMETRY = {"square": 90, "triangle": 120, "star": 72, "diamond": 180}      # degrees until it looks the same


def turned_shapes(device):
    """What `scaled` makes of every shape, turned clockwise in TURNS steps. -> (shapes, TURNS, CROP^2) of 0 and 1"""
    angle = torch.arange(TURNS, device=device) * (2 * math.pi / TURNS)           # (TURNS,)
    half, r = torch.full_like(angle, 0.5), torch.full_like(angle, 0.35)
    masks = torch.stack([cover(shape, half, half, r, angle, CELLS) > 0.5 for shape in SHAPES])
    masks = masks.float()                                                        # (shapes, TURNS, CELLS, CELLS)
    return scaled(masks, *centre_and_area(masks))


def centre_and_area(masks):
    """Masks (..., CELLS, CELLS) of 0 and 1 -> centre x, y and area (...) each, as shares of the picture. The centre of
    an empty mask is NaN."""
    grid = (torch.arange(CELLS, device=masks.device) + 0.5) / CELLS
    area = masks.mean((-1, -2))
    return (masks.mean(-2) * grid).mean(-1) / area, (masks.mean(-1) * grid).mean(-1) / area, area


def scaled(masks, x, y, area):
    """What is in masks (..., CELLS, CELLS), moved to the middle and made of one area. -> (..., CROP^2) of 0 and 1"""
    axis = torch.linspace(-1.1, 1.1, CROP, device=masks.device) * 2 * area.sqrt()[..., None]     # (..., CROP)
    x, y = (2 * centre[..., None] - 1 + axis for centre in (x, y))           # (..., CROP), where -1..1 is the picture
    shape = *area.shape, CROP, CROP
    x, y = x[..., None, :].expand(shape), y[..., :, None].expand(shape)          # (..., CROP, CROP)
    grid = torch.stack([x, y], dim=-1)                                           # (..., CROP, CROP, 2)
    crops = F.grid_sample(masks.flatten(0, -3)[:, None], grid.flatten(0, -4).nan_to_num(), align_corners=False)
    return (crops > 0.5).float().view(*area.shape, -1)


def moves(motion, x, y, area, turned):
    """Does a thing move as asked, beyond doubt? x, y, area: (T,) in every frame; turned: degrees in all."""
    reach = torch.hypot(x - x[0], y - y[0]).max()
    growth = area[-1] / area[0]
    if motion == "grows" or motion == "shrinks":
        return reach < 0.12 and (growth if motion == "grows" else 1 / growth) > 1.6
    if not 1 / 1.5 < growth < 1.5:
        return False
    if motion == "rotates":
        return reach < 0.12 and abs(turned) > 90
    if motion == "bounces":
        depth = y.max() - torch.maximum(y[0], y[-1])
        return depth > 0.15 and (y[-1] - y[0]).abs() < depth / 2 and (x - x[0]).abs().max() < depth / 2
    right, down = x.diff(), y.diff()
    along, across = {"moves left to right": (right, down), "moves right to left": (-right, down),
                     "moves up": (-down, right), "moves down": (down, right)}[motion]
    return along.sum() > 0.15 and along.min() > -0.02 and across.cumsum(0).abs().max() < along.sum() / 3


def check_videos(scenes, videos, templates):
    """videos (B, 3, T, S, S) in -1..1 of scenes -> for each scene the same five numbers as `check`, with the first,
    middle and last frame as three things, and the motion as a relation."""
    videos = videos[:, :, ::2]                                       # every second frame
    B, _, T = videos.shape[:3]
    cells = F.adaptive_avg_pool2d(videos.transpose(1, 2).flatten(0, 1), CELLS)       # (B T, 3, CELLS, CELLS)
    palette = torch.tensor(list(COLOURS.values()), device=cells.device) / 127.5 - 1              # (10, 3)
    errors = torch.stack([(cells - colour[:, None, None]).square().sum(1) for colour in palette])
    nearest = errors.argmin(0)                                       # (B T, CELLS, CELLS)
    counts = torch.stack([(nearest == i).sum((-1, -2)) for i in range(len(palette))], dim=-1)    # (B T, 10)
    background, thing = counts.topk(2).indices.unbind(-1)            # (B T,) the two commonest colours
    masks = without_rims((nearest == thing[:, None, None]).float()).view(B, T, CELLS, CELLS)
    x, y, area = centre_and_area(masks)                              # (B, T) each
    crops = scaled(masks, x, y, area)                                # (B, T, CROP^2)
    both = torch.einsum("btc,sac->btsa", crops, templates)           # (B, T, shapes, TURNS)
    overlap = both / (crops.sum(-1)[..., None, None] + templates.sum(-1) - both)
    background, thing = background.view(B, T), thing.view(B, T)
    x, y, area, overlap, background, thing = (a.cpu() for a in (x, y, area, overlap, background, thing))
    colours = list(COLOURS)
    results = []
    for b, scene in enumerate(scenes):
        asked, fits = scene.things[0], overlap[b]                    # (T, shapes, TURNS)
        fits_best = fits.amax(-1) if scene.motion == "rotates" else fits[..., 0]                 # (T, shapes)
        best, shape = fits_best.max(-1)                                # (T,) each
        there = (best > 0.7) & (shape == SHAPES.index(asked.shape)) & (thing[b] == colours.index(asked.colour))
        period = SYMMETRY.get(asked.shape, 360)
        angle = fits[:, SHAPES.index(asked.shape)].argmax(-1) * (360 / TURNS)                    # (T,)
        turned = (angle.diff() + period / 2) % period - period / 2   # right while no step turns it by half a period
        moved = area[b].min() > 0.002 and moves(scene.motion, x[b], y[b], area[b], turned.sum().item())
        grounded = (background[b] == colours.index(scene.background)).all().item()
        results.append((there[[0, T // 2, -1]].sum().item(), 3, int(moved), 1, grounded))
    return results
