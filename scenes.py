"""The embedded models' small world: drawing captioned scenes, and judging pictures and videos of them.

A picture shows one to three things on a ground. A video shows one that moves, grows, shrinks, rotates or bounces, or
that lies still while the camera moves. A caption says what is where, what it does and what its surfaces are made of,
if they are not plain; a seed, of which no caption tells, draws every hair, cloud and brick. Some combinations of
colour, shape and relation or motion are held out of training.

    scenes = [make_scene(random.Random(seed)) for seed in range(8)]
    pictures = draw(scenes, 512)                                     (8, 3, 512, 512) in -1..1

Surfaces are functions of continuous coordinates, so that a scene looks the same at any size and through any window;
detail finer than about four pixels fades out.

The judge knows the pixels alone. Ground is what has a tone of the commonest colour; every other piece is a thing, of
the colour that its pixels are nearest to and of the shape whose outline overlaps its own most; or it is two that touch.
In a video, every second frame tells where the thing is, how large, how it is turned and whether the ground goes along.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

COLOURS = {"red": (212, 42, 42), "green": (48, 158, 64), "blue": (46, 88, 212), "yellow": (246, 222, 64),
           "orange": (240, 122, 28), "purple": (132, 56, 176), "pink": (242, 152, 190), "cyan": (66, 204, 216),
           "white": (232, 232, 230), "black": (28, 28, 32), "brown": (132, 82, 48)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart", "diamond",
          "chipmunk", "acorn", "tree", "mushroom", "fish", "house")
SURFACES = ("plain", "furry", "wooden", "stone", "cloudy", "watery", "grassy", "brick", "grainy")
SIZES = {"small": (0.11, 0.13), "": (0.145, 0.185), "large": (0.205, 0.24)}    # radius, in shares of a picture's side
NEARER = 1.15                  # how much larger the one thing of a video is
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
WORDINGS = {"above": ("over", "on top of"), "below": ("under", "beneath"), "left of": ("to the left of",),
            "right of": ("to the right of",)}
MOTIONS = {"moves left to right": ("moving left to right", "moves from left to right", "moving to the right"),
           "moves right to left": ("moving right to left", "moves from right to left", "moving to the left"),
           "moves up": ("moving up", "moves upwards", "rises"),
           "moves down": ("moving down", "moves downwards", "falls"),
           "grows": ("growing", "gets bigger", "becomes larger"), "shrinks": ("shrinking", "gets smaller"),
           "rotates": ("rotating", "spins", "turns"), "bounces": ("bouncing", "bounces up and down")}
PANS = {"the camera moves right": "moves right to left", "the camera moves left": "moves left to right",
        "the camera moves up": "moves down", "the camera moves down": "moves up"}      # and what ground and thing do
DOINGS = ("", *OPPOSITE, *MOTIONS, *PANS)
ROUND = ("circle", "ring")     # nobody can see these rotate
USUAL = {"chipmunk": "furry", "acorn": "wooden", "tree": "grassy", "house": "brick"}       # what they are most often


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    x: float                   # centre and radius, as shares of the picture's side; y grows downwards
    y: float
    r: float
    surface: str = "plain"
    facing: int = 1            # 1: a chipmunk or a fish looks to the right; -1: everything mirrored


@dataclass(frozen=True)
class Scene:
    things: tuple              # of Thing
    relation: str              # of things[0] to things[1], or ""
    background: str            # colour of the ground
    caption: str
    motion: str = ""           # of things[0] or of the camera in a video, or ""
    end: Thing | None = None   # things[0] at its end, or halfway if it bounces
    surface: str = "plain"     # of the ground
    seed: int = 0              # of all surfaces and of the light

# ---------------------------------------------------------------------------------------------------------
# scenes and their captions


def held_out(colour, shape, doing):
    """Is this combination with a relation, a motion or "" kept out of training? One in seven is; every colour, shape,
    relation and motion is seen in others."""
    return (list(COLOURS).index(colour) + 3 * SHAPES.index(shape) + 2 * DOINGS.index(doing)) % 7 == 0


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
        if clear and (not relation or holds(relation, *spots[:2], 2.5)):         # more clearly than the score asks
            return [(size, *spot, r) for size, spot, r in zip(sizes, spots, radii)]


def holds(relation, a, b, margin=1.0):
    """Is the thing centred at a (x, y) in `relation` to the one at b, beyond doubt: `margin` times as far that way as
    sideways?"""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {"above": (dy, dx), "below": (-dy, dx), "left of": (dx, dy), "right of": (-dx, dy)}[relation]
    return along > 0.1 and along >= margin * abs(across)


def choose_surface(rng, shape=None):
    """A ground's or a thing's: its usual one for two things of five, else any; plain ones are commoner."""
    if shape in USUAL and rng.random() < 0.4:
        return USUAL[shape]
    return rng.choice(SURFACES + 2 * ("plain",))


def make_scene(rng, train=True, plain=False, more=()):
    """A random scene. train: no held-out combination; else the first thing's is held out. plain: canonical wording;
    more: shapes that it shows more often than others."""
    while True:
        count = rng.choice((1, 1, 2, 2, 2, 2, 3)) if not plain else rng.choice((1, 2, 2))
        relation = "" if count == 1 or (not plain and rng.random() < 0.1) else rng.choice(list(OPPOSITE))
        colours = rng.sample(list(COLOURS), count + 1)
        if count > 1 and rng.random() < 0.1:
            colours[1] = colours[0]                                  # two things may share a colour
        shapes = [rng.choice((*SHAPES, *more)) for _ in range(count)]
        drawn = list(zip(colours, shapes))
        if len(set(drawn)) < count:
            continue                                                 # two things alike: which is which?
        things = [Thing(c, s, "", 0, 0, 0) for c, s in drawn]
        shown = [held_out(*combination) for combination in combinations(things, relation)]
        if any(shown) if train else not shown[0]:
            continue
        things = tuple(Thing(c, s, *spot, choose_surface(rng, s))
                       for (c, s), spot in zip(drawn, place(rng, count, relation)))
        surface = choose_surface(rng)
        text = caption(rng, things, relation, surface, colours[-1], plain)
        return Scene(things, relation, colours[-1], text, surface=surface, seed=rng.getrandbits(31))


def route(rng, size, motion):
    """Centre and radius (x, y, r) of a thing at both ends of its motion, all of it inside the picture."""
    r = NEARER * rng.uniform(*SIZES[size])
    most = min(2 * r, 0.38) if motion in ("grows", "shrinks") else r
    edge = 1.25 * most + 0.01                                        # corners reach farther than the radius
    x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
    way = rng.uniform(0.24, 0.3) if motion == "bounces" else rng.uniform(0.3, 0.4)       # farther is a blur
    way = min(way, 1 - 2 * edge)
    near = rng.uniform(edge, 1 - edge - way)
    far = near + way
    return {"moves left to right": ((near, y, r), (far, y, r)), "moves right to left": ((far, y, r), (near, y, r)),
            "moves up": ((x, far, r), (x, near, r)), "moves down": ((x, near, r), (x, far, r)),
            "bounces": ((x, near, r), (x, far, r)), "rotates": ((x, y, r), (x, y, r)),
            "grows": ((x, y, r), (x, y, most)), "shrinks": ((x, y, most), (x, y, r))}[PANS.get(motion, motion)]


def make_moving_scene(rng, train=True, plain=False, more=()):
    """A random scene for a video: one thing and what it does. train, plain and more as in make_scene."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        turning = 2 * train * ("rotates",)                           # the hardest to learn
        shape, motion = rng.choice((*SHAPES, *more)), rng.choice((*MOTIONS, *PANS, *turning))
        if held_out(colour, shape, motion) == train or motion == "rotates" and shape in ROUND:
            continue
        sizes = ("", "", "large") if motion == "rotates" else ("", "", *SIZES)   # turning is hard to see in the small
        size = rng.choice(sizes)
        facing = -1 if motion == "moves right to left" else 1        # nothing that no caption tells
        look = choose_surface(rng, shape), facing
        start, end = (Thing(colour, shape, size, *spot, *look) for spot in route(rng, size, motion))
        surface = rng.choice(SURFACES[1:]) if motion in PANS else choose_surface(rng)    # plain: no camera moves there
        text = caption(rng, (start,), motion, surface, background, plain)
        return Scene((start,), "", background, text, motion, end, surface, rng.getrandbits(31))


def caption(rng, things, doing, surface, background, plain):
    """The prompt for a scene: canonical words if plain, else sometimes others that mean the same. doing: relation or
    motion."""
    def article(*words):
        phrase = " ".join(filter(None, words))
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase

    def named(surface):
        if surface != "plain":
            return surface
        return rng.choice(("", "", "", "plain", "flat")) if not plain else ""
    phrases = [article(t.size, named(t.surface), t.colour, t.shape) for t in things]
    pan = f", {doing}" if doing in PANS else ""
    openings = ("a picture of ", "draw ", "an image of ", "there is ")
    if doing in PANS or doing in MOTIONS:
        openings = ("a video of ", "an animation of ")
    if pan:
        doing = ""
    if not plain and rng.random() < 0.2:
        doing = rng.choice((WORDINGS | MOTIONS).get(doing, (doing,)))
        pan = pan.replace("moves", "pans")
    doing = doing or ("and" if len(phrases) > 1 else "")
    text = " ".join(filter(None, (phrases[0], doing, *phrases[1:2])))
    text += "".join(f" and {p}" for p in phrases[2:])
    ground = article(named(surface), background, "background")
    if plain or rng.random() < 0.8:
        text += f" on {ground}"
    else:
        text += rng.choice((f" on {named(surface)} {background}", f", {ground}", f" against {ground}", ""))
    text = " ".join((text + pan).split())
    if not plain and rng.random() < 0.2:
        text = rng.choice(openings) + text
    if not plain and rng.random() < 0.1:
        text = " ".join(word for word in text.split() if word not in ("a", "an"))
    return text + ("." if not plain and rng.random() < 0.1 else "")


def without_surfaces(scene):
    """The same scene in plain colours."""
    things = tuple(replace(thing, surface="plain") for thing in scene.things)
    return replace(scene, things=things, end=scene.end and replace(scene.end, surface="plain"), surface="plain")

# ---------------------------------------------------------------------------------------------------------
# surfaces: noise in which nothing is finer than about four pixels
#
# Each is a function of a list of points (n,): their coordinates x, y, in which 1 is the side of a picture or three
# radii of a thing; the seed of each, an integer; and `pixels`, how many of them are drawn per 1. Each gives brightness
# (n,), about 0 on average with standard deviation 1.


def hashed(x, y, seed):
    """Integers -> integers in 0..2^32, as good as random."""
    h = (x * 0x1B873593 + y * 0x19D699A5 + seed * 0x27D4EB2F) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    h = ((h ^ (h >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return h ^ (h >> 15)


def chance(x, y, seed):
    """As hashed, but uniform in -1..1."""
    return hashed(x, y, seed).float() / 2**31 - 1


def noise(x, y, seed):
    """Gradient noise with one lattice point per 1: smooth, zero on average, standard deviation about 1."""
    column, row = x.floor(), y.floor()
    x, y = x - column, y - row                                       # inside the cell, 0..1
    column, row = column.long(), row.long()
    corners = []
    for down in 0, 1:
        for right in 0, 1:
            h = hashed(column + right, row + down, seed)
            gradient = (h & 0xFFFF).float() / 2**15 - 1, (h >> 16).float() / 2**15 - 1
            corners.append(gradient[0] * (x - right) + gradient[1] * (y - down))
    across, along = (a * a * a * (a * (6 * a - 15) + 10) for a in (x, y))
    return 5.7 * torch.lerp(corners[0].lerp(corners[1], across), corners[2].lerp(corners[3], across), along)


def visible(pixels):
    """How much is drawn of detail that is so many pixels wide: nothing up to 3, everything from 6."""
    return ((pixels - 3) / 3).clamp(0, 1)


def octaves(x, y, seed, pixels, first=3, gain=0.6, count=6, stretch=1):
    """Noise of `first` cells per 1 and of ever finer ones, each `gain` times as strong; `stretch` times longer in x."""
    k = torch.arange(count, device=x.device)[:, None]                # (count, 1)
    cells = first * 2**k
    strength = gain**k * visible(pixels / cells)                     # (count, n)
    total = (strength * noise(x * (cells / stretch), y * cells, seed + k)).sum(0)
    return total / math.sqrt(sum(gain**(2 * i) for i in range(count)))


def seam(away, share, pixels):
    """Dark seams, so many pixels wide, whose middle is where `away` is 0 and whose rim is where it is 1. They cover
    `share` of everything, which is lighter by as much."""
    return 2.2 * visible(pixels) * (share - (1 - away).clamp(0, 1).sqrt())


def tiles(along, down):
    """-> how far a point is inside its tile of 1 x 1 both ways, 0 at an edge, 0.5 in the middle; its column and row"""
    inside = (0.5 - (a - a.floor() - 0.5).abs() for a in (along, down))
    return *inside, along.floor().long(), down.floor().long()


def cobbles(x, y, seed):
    """Cells around strewn centres, one per 1 x 1. -> how far a point is from its cell's edge; the cell's chance"""
    steps = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], device=x.device)
    column, row = x.floor().long() + steps[:, :1], y.floor().long() + steps[:, 1:]           # (9, n)
    centre_x = column + 0.5 + 0.38 * chance(column, row, seed)
    centre_y = row + 0.5 + 0.38 * chance(column, row, seed + 1)
    (first, second), index = torch.hypot(centre_x - x, centre_y - y).topk(2, dim=0, largest=False)
    return second - first, chance(column, row, seed + 2).gather(0, index[:1])[0]


def grainy(x, y, seed, pixels):
    return octaves(x, y, seed, pixels, gain=0.85)


def cloudy(x, y, seed, pixels):
    bend_x, bend_y = (octaves(x, y, seed + i, pixels, 2, count=1) for i in (11, 12))
    return octaves(x + 0.04 * bend_x, 1.3 * y + 0.04 * bend_y, seed, pixels, 2.5, gain=0.7)


def wooden(x, y, seed, pixels):
    """Long planks, each with a grain of its own."""
    row = (5 * y).floor().long()
    across, down, *plank = tiles(x + 3 * chance(row, row, seed), 5 * y)
    gap = seam(torch.minimum(5 * across, down) / 0.09, 0.14, pixels / 28)
    seed = hashed(*plank, seed)
    bend = octaves(x, y, seed, pixels, 2, gain=0.4, count=3, stretch=3)
    rings = torch.sin(2 * math.pi * (12 * y + bend)) * visible(pixels / 14)
    grain = octaves(x, y + 0.03 * bend, seed + 9, pixels, 6, gain=0.9, count=4, stretch=10)
    return 0.7 * chance(*plank, seed) + 0.5 * rings + 0.55 * grain + gap


def stone(x, y, seed, pixels):
    edge, own = cobbles(6 * x, 6 * y, seed)
    grain = octaves(x, y, seed + 9, pixels, 8, gain=0.8)
    return 0.8 * own + 0.45 * grain + seam(edge / 0.22, 0.3, pixels / 28)


def watery(x, y, seed, pixels):
    """Ripples with bright crests."""
    bend = octaves(x, y, seed + 11, pixels, 3, count=2, stretch=2)
    k = torch.arange(4, device=x.device)[:, None]                    # (4, 1)
    cells = 3 * 2**k
    ripples = 0.75 - noise((x + 0.03 * bend) * cells, (3 * y + 0.1 * bend) * cells, seed + k).abs()      # (4, n)
    return (0.75**k * visible(pixels / (14 * 2**k)) * ripples).sum(0) + 0.3 * bend


def furry(x, y, seed, pixels):
    """Wavy hairs, all about downwards, in locks."""
    bend = octaves(x, y, seed + 11, pixels, 2, count=1)
    hairs = octaves(y, x + 0.06 * bend, seed, pixels, 14, gain=0.9, count=3, stretch=4)
    return 0.85 * hairs + 0.45 * octaves(x, y, seed + 9, pixels, 3, count=3)


def grassy(x, y, seed, pixels):
    """Blades that stand in rows, one before the other, with bright tips and dark roots."""
    blades = octaves(y, x, seed, pixels, 16, gain=0.8, count=2, stretch=5)
    turn = 2 * math.pi * (7 * y + 0.18 * blades + 0.28 * noise(3 * x, 3 * y, seed + 5))
    rows = visible(pixels / 28) * torch.sin(turn + 0.6 * torch.sin(turn))
    return 0.75 * rows + 0.6 * blades + 0.4 * octaves(x, y, seed + 9, pixels, 2)


def brick(x, y, seed, pixels):
    across, down, *tile = tiles(4.5 * x + 0.5 * ((9 * y).floor() % 2), 9 * y)
    grain = octaves(x, y, seed + 9, pixels, 8, gain=0.8)
    return 0.8 * chance(*tile, seed) + 0.4 * grain + seam(torch.minimum(2 * across, down) / 0.16, 0.28, pixels / 28)


PAINTERS = dict(zip(SURFACES[1:], (furry, wooden, stone, cloudy, watery, grassy, brick, grainy)))

# ---------------------------------------------------------------------------------------------------------
# shapes: signed distances in a frame in which they have radius 1, x to the right, y down


def ellipse(x, y, cx, cy, rx, ry, degrees=0.0):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = x - cx, y - cy
    x, y = (cos * x + sin * y) / rx, (cos * y - sin * x) / ry
    length = torch.hypot(x, y)
    return length * (length - 1) / torch.hypot(x / rx, y / ry).clamp(min=1e-6)


def polygon(x, y, *points):
    """Of a convex polygon, its corners in clockwise order as they are seen."""
    sides = []
    for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0])):
        sides.append(((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / math.hypot(bx - ax, by - ay))
    return torch.stack(sides).amax(0)


def box(left, top, right, bottom):
    return (left, top), (right, top), (right, bottom), (left, bottom)


def point_of_star(turn):
    """One of its five triangles, from a point to the far corners of the pentagon inside."""
    return tuple((r * math.sin(turn + a), -r * math.cos(turn + a)) for r, a in ((1, 0), (0.4, 1.885), (0.4, -1.885)))


# Parts that make the outline, and marks on them. Each is a tone, from -1 (black) over 0 (the thing's colour) to 1
# (white), and the numbers of an ellipse (centre, radii, turn in degrees) or the corners of a convex polygon.
FIGURES = {
    "circle": (((0, (0, 0, 1, 1)),), ()),
    "square": (((0, box(-0.85, -0.85, 0.85, 0.85)),), ()),
    "triangle": (((0, ((0, -1), (0.95, 0.75), (-0.95, 0.75))),), ()),
    "star": (tuple((0, point_of_star(2 * math.pi / 5 * i)) for i in range(5)), ()),
    "ring": (((0, (0, 0, 1, 1)),), ()),                              # `distance` knows of its hole
    "heart": (((0, (-0.45, -0.35, 0.52, 0.52)), (0, (0.45, -0.35, 0.52, 0.52)),
               (0, ((-0.45, -0.35), (0.45, -0.35), (0.841, -0.007), (0, 0.95), (-0.841, -0.007)))), ()),
    "diamond": (((0, ((0, -1), (0.75, 0), (0, 1), (-0.75, 0))),), ()),
    "chipmunk": (
        ((-0.12, (-0.66, -0.1, 0.26, 0.62, -12)), (-0.12, (-0.52, -0.66, 0.25, 0.24, 20)),           # tail
         (-0.12, (-0.42, 0.55, 0.34, 0.26, 30)),
         (0, (0.02, 0.34, 0.47, 0.6, 14)), (0, (0.06, 0.84, 0.44, 0.14)),                            # body, foot
         (0, (0.2, -0.72, 0.12, 0.17, -12)), (0, (0.46, -0.74, 0.1, 0.15, 12)),                      # ears
         (0, (0.36, -0.4, 0.38, 0.33, 8)), (0, (0.62, -0.3, 0.22, 0.17, 12))),                       # head, snout
        ((-0.5, (-0.64, -0.12, 0.07, 0.46, -12)), (-0.55, (-0.22, 0.2, 0.07, 0.42, 16)),             # stripes
         (0.7, (-0.1, 0.22, 0.06, 0.42, 16)), (-0.55, (0.02, 0.24, 0.06, 0.4, 16)),
         (0.55, (0.34, 0.4, 0.17, 0.36, 12)), (0.55, (0.56, -0.2, 0.22, 0.13, 10)),                  # belly, cheek
         (-0.3, (0.36, 0.16, 0.24, 0.08, 30)), (0.4, (0.2, -0.71, 0.055, 0.1, -12)),                 # arm, in the ear
         (-0.95, (0.45, -0.46, 0.085, 0.095)), (1, (0.475, -0.49, 0.032, 0.032)),                    # eye
         (-0.9, (0.81, -0.33, 0.05, 0.045)))),                                                       # nose
    "acorn": (
        ((0, (0, 0.1, 0.58, 0.66)), (0, ((-0.4, 0.5), (0.4, 0.5), (0, 1))),                          # nut
         (-0.35, (0, -0.3, 0.76, 0.42)), (-0.45, box(-0.08, -0.98, 0.08, -0.6))),                    # cap, stem
        ((0, box(-0.9, -0.14, 0.9, 1.1)), (0.5, (-0.24, 0.22, 0.08, 0.24, 8)))),                     # nut below the cap
    "tree": (
        ((-0.5, box(-0.16, 0.5, 0.16, 1)), (-0.12, ((0, -0.1), (0.78, 0.68), (-0.78, 0.68))),
         (0, ((0, -0.55), (0.62, 0.22), (-0.62, 0.22))), (0.1, ((0, -1), (0.46, -0.24), (-0.46, -0.24)))), ()),
    "mushroom": (
        ((0.3, ((-0.24, -0.1), (0.24, -0.1), (0.32, 0.9), (-0.32, 0.9))), (0.3, (0, 0.84, 0.32, 0.14)),      # stem
         (0, (0, -0.2, 0.95, 0.42)), (0, (0, -0.4, 0.7, 0.52))),                                             # cap
        ((0.75, (-0.48, -0.28, 0.17, 0.15)), (0.75, (0.05, -0.56, 0.19, 0.15)), (0.75, (0.52, -0.2, 0.15, 0.13)))),
    "fish": (
        ((-0.25, ((-0.5, 0), (-0.84, 0), (-1, -0.62))), (-0.25, ((-0.5, 0), (-1, 0.62), (-0.84, 0))),        # tail
         (-0.25, ((-0.3, -0.35), (-0.15, -0.84), (0.4, -0.4))), (-0.25, ((-0.15, 0.4), (0.3, 0.42), (-0.15, 0.78))),
         (0, (0.16, 0, 0.82, 0.54))),
        ((0.25, (0.2, 0.4, 0.6, 0.18)), (-0.35, (0.4, 0.02, 0.04, 0.3)), (-0.3, (0.02, 0.1, 0.22, 0.11, -20)),
         (0.95, (0.62, -0.14, 0.14, 0.14)), (-0.95, (0.65, -0.14, 0.075, 0.08)))),                           # eye
    "house": (
        ((-0.35, box(0.36, -0.85, 0.58, -0.2)), (0, box(-0.68, -0.2, 0.68, 0.88)),                   # chimney, wall
         (-0.35, ((0, -0.98), (0.98, -0.1), (-0.98, -0.1)))),                                        # roof
        ((-0.6, box(-0.45, 0.24, -0.08, 0.9)), (-0.5, box(0.1, 0.1, 0.54, 0.54)),                    # door, window
         (0.8, box(0.15, 0.15, 0.29, 0.29)), (0.8, box(0.35, 0.15, 0.49, 0.29)),
         (0.8, box(0.15, 0.35, 0.29, 0.49)), (0.8, box(0.35, 0.35, 0.49, 0.49))))}


def part_distance(numbers, x, y):
    return polygon(x, y, *numbers) if isinstance(numbers[0], tuple) else ellipse(x, y, *numbers)


def distance(shape, x, y):
    """Signed distance (roughly) to a shape of radius 1 at the origin, negative inside. x, y (...) -> (...)"""
    outline = torch.stack([part_distance(numbers, x, y) for _, numbers in FIGURES[shape][0]]).amin(0)
    return torch.maximum(outline, 0.52 - torch.hypot(x, y)) if shape == "ring" else outline


def tone_of_parts(shape, x, y, pixels):
    """How light a thing's parts are, -1..1 as in FIGURES. pixels: of its radius. All (n,) -> (n,)"""
    tone = torch.zeros_like(x)
    outline, marks = FIGURES[shape]
    for part_tone, numbers in outline + marks:
        inside = (0.5 - part_distance(numbers, x, y) * pixels).clamp(0, 1)
        tone = tone + inside * (part_tone - tone)
    return tone

# ---------------------------------------------------------------------------------------------------------
# drawing

TEXTURE = 0.17                 # how far surfaces reach from their colour, for pixels in 0..1
NOTHING = Thing("red", "circle", "", 0, 0, 0)                    # fills up the rows of scenes with fewer things
THING_SCALE = 0.3              # a thing's radius shows as much of a surface as 0.3 of the picture's side on the ground


def brightness(surface, x, y, seed, pixels):
    """surface (n,): numbers in SURFACES; the rest as for its painter. -> (n,), no more than 2.2 from 0"""
    shade = torch.zeros_like(x)
    for number, painter in enumerate(PAINTERS.values(), 1):
        rows = (surface == number).nonzero()[:, 0]
        if len(rows):
            shade[rows] = painter(*(a[rows] for a in (x, y, seed, pixels)))
    return shade.clamp(-2.2, 2.2)


def tone_direction(colour):
    """Where a colour in 0..1 goes when its surface gets brighter: mostly away from black, so that its hue stays."""
    return 0.6 * colour + 0.25


def coloured(colour, shade, tone=None):
    """colour (..., 3) in 0..1, its surface's brightness (...) and its parts' tone (...) -> (..., 3)"""
    if tone is not None:
        tone = tone[..., None]
        colour = torch.lerp(colour, (tone > 0).float().expand_as(colour), tone.abs())
    return colour + TEXTURE * shade[..., None] * tone_direction(colour)


def draw_grounds(scenes, seeds, pan, pans, across, down, zoom):
    """The ground under each scene, moved by pan (B, 2, T) if pans (B, 1). across, down (size,): what is seen
    -> (B, T, size, size, 3) in 0..1"""
    size, T, device = len(across), pan.shape[2], pan.device
    fresh = pans | (torch.arange(T, device=device) == 0)             # (B, T) a ground that stands still is drawn once
    b, t = fresh.nonzero(as_tuple=True)                              # (f,) each
    looks = [(SURFACES.index(s.surface), *COLOURS[s.background]) for s in scenes]
    looks = torch.tensor(looks, device=device)[b]                    # (f, 4)
    x = (across - pan[b, 0, t, None])[:, None].expand(-1, size, -1)  # (f, size, size)
    y = (down - pan[b, 1, t, None])[:, :, None].expand(-1, -1, size)
    surface, seed = (a[:, None, None].expand_as(x).flatten() for a in (looks[:, 0], seeds[b]))   # (f size^2,) each
    shade = brightness(surface, x.flatten(), y.flatten(), seed, torch.full_like(x, zoom).flatten())
    grounds = coloured(looks[:, None, None, 1:] / 255, shade.view_as(x))                         # (f, size, size, 3)
    return grounds[fresh.flatten().cumsum(0) - 1].unflatten(0, fresh.shape)


def draw_things(pictures, things, seeds, places, angle, light, across, down, zoom):
    """Draws B rows of K things and their shadows into pictures (B, T, size, size, 3). places (B, K, 3, T): centres and
    radii, 0 for none; angle (B, K, T): how far they are turned; light (B, 2): where it comes from"""
    looks = [[(SHAPES.index(a.shape), SURFACES.index(a.surface), a.facing, *COLOURS[a.colour]) for a in row]
             for row in things]
    looks = torch.tensor(looks, device=pictures.device)              # (B, K, 6)
    x, y, r = places.unbind(2)                                       # (B, K, T) each
    dx, dy = across - x[..., None], down - y[..., None]              # (B, K, T, size)
    near = dx[..., None, :].square() + dy[..., None].square() < (1.7 * r).square()[..., None, None]
    b, k, t, i, j = near.nonzero(as_tuple=True)                      # (n,) each: the pixels near things, in one list
    shape, surface, facing, *_ = looks[b, k].unbind(1)
    r, cos, sin = r[b, k, t], angle[b, k, t].cos(), angle[b, k, t].sin()
    u, v = dx[b, k, t, j] / r, dy[b, k, t, i] / r
    light_x, light_y = light[b].unbind(1)

    def turned(u, v):
        """Into the thing's own frame."""
        return facing * (cos * u + sin * v), cos * v - sin * u
    own_x, own_y = turned(u, v)
    shadow_x, shadow_y = turned(u + 0.2 * light_x, v + 0.2 * light_y)
    inside, shadow, tone = torch.zeros(3, len(b), device=pictures.device)
    for number, name in enumerate(SHAPES):
        rows = (shape == number).nonzero()[:, 0]
        if len(rows):
            pixels = r[rows] * zoom
            inside[rows] = (0.5 - distance(name, own_x[rows], own_y[rows]) * pixels).clamp(0, 1)
            tone[rows] = tone_of_parts(name, own_x[rows], own_y[rows], pixels)
            away = distance(name, shadow_x[rows], shadow_y[rows])
            away = torch.maximum(away, torch.hypot(shadow_x[rows], shadow_y[rows]) - 1.1)    # rounder far from corners
            shadow[rows] = (0.5 - away / 0.5).clamp(0, 1)
    shadows = torch.zeros(pictures.shape[:-1], device=pictures.device)                           # (B, T, size, size)
    shadows.index_put_((b, t, i, j), shadow * shadow * (3 - 2 * shadow), accumulate=True)
    pictures *= (1 - 0.25 * shadows.clamp(max=1))[..., None]
    shading = 0.16 * (u * light_x + v * light_y)

    rows = (inside > 0).nonzero()[:, 0]
    b, k, t, i, j, inside, tone, shading = (a[rows] for a in (b, k, t, i, j, inside, tone, shading))
    shade = brightness(surface[rows], THING_SCALE * own_x[rows], THING_SCALE * own_y[rows], seeds[b] + k + 1,
                       r[rows] * (zoom / THING_SCALE))
    colour = coloured(looks[b, k, 3:] / 255, shade, tone) * (1 + shading)[:, None]               # (n, 3)
    pictures[b, t, i, j] = pictures[b, t, i, j].lerp(colour, inside[:, None])
    return pictures


def draw(scenes, size, device="cpu", window=(0.0, 0.0, 1.0)):
    """Scenes -> pictures (B, 3, size, size) in -1..1. window: left, top and side of what is seen."""
    return draw_videos(scenes, size, 1, device, window)[:, :, 0]


def draw_videos(scenes, size, frames, device="cpu", window=(0.0, 0.0, 1.0)):
    """Scenes -> videos (B, 3, T, size, size) in -1..1, in which the first thing of each does what the scene says.
    window: left, top and side of what is seen."""
    most = max(len(s.things) for s in scenes)
    starts = [(s.things + (NOTHING,) * most)[:most] for s in scenes]
    ends = [(s.end or row[0], *row[1:]) for s, row in zip(scenes, starts)]
    start, end = (torch.tensor([[(a.x, a.y, a.r) for a in row] for row in rows], device=device)
                  for rows in (starts, ends))                        # (B, K, 3) each
    bounces, rotates, pans = (torch.tensor([[s.motion in which] for s in scenes], device=device)
                              for which in (("bounces",), ("rotates",), PANS))                   # (B, 1) each
    time = torch.linspace(0, 1, frames, device=device)               # (T,)
    fall = (1 - (1 - 2 * time).abs()).square()                       # down faster and faster, then up again
    done = torch.where(bounces, fall, time)                          # (B, T)
    places = torch.lerp(start[..., None], end[..., None], done[:, None, None])                   # (B, K, 3, T)
    angle = (math.pi * time * rotates)[:, None].expand(-1, most, -1) # (B, K, T) half a turn
    pan = (places - places[..., :1])[:, 0, :2] * pans[..., None]     # (B, 2, T) the ground goes along with the thing
    left, top, side = window
    zoom = size / side                                               # pixels per picture's side
    axis = (torch.arange(size, device=device) + 0.5) / zoom
    across, down = left + axis, top + axis                           # (size,) each
    seeds = torch.tensor([s.seed for s in scenes], device=device)    # (B,)
    way = math.pi * chance(seeds, seeds, 5)
    light = torch.stack([way.cos(), -0.35 - way.sin().abs()], dim=-1)                            # (B, 2)
    light = F.normalize(light, dim=-1)                               # mostly from above
    slope = light[:, :1, None] * (across - 0.5) + light[:, 1:, None] * (down[:, None] - 0.5)     # (B, size, size)
    pictures = draw_grounds(scenes, seeds, pan, pans, across, down, zoom)                        # (B, T, size, size, 3)
    pictures = pictures * (1 + 0.22 * slope)[:, None, ..., None]
    pictures = draw_things(pictures, starts, seeds, places, angle, light, across, down, zoom)
    return (2 * pictures - 1).clamp(-1, 1).permute(0, 4, 1, 2, 3).contiguous()

# ---------------------------------------------------------------------------------------------------------
# judging: what stands where?

CELLS, CROP = 256, 48          # pictures are looked at in CELLS^2 cells, their things, scaled to one size, in CROP^2
TURNS = 48                     # orientations that a shape is compared in
SYMMETRY = {"square": 90, "triangle": 120, "star": 72, "diamond": 180}      # degrees until it looks the same
TONES = [0.05 * i for i in range(-13, 9)]      # of a surface's pixels, from dark and in shadow to bright and in light
STRETCH = 0.15                 # of two colours that fit, the one whose surface needs less light or shadow
UNLIKE = 0.11                  # pixels farther than this from every tone of the ground, in 0..1, are not ground
SMALLEST = 0.002               # things are larger than this share of the picture


@dataclass(frozen=True, eq=False)
class Seen:
    colour: str
    x: float                   # centre and area, as shares of the picture
    y: float
    area: float
    fits: torch.Tensor         # (shapes, TURNS) overlap with every shape, turned


def turned_shapes(device):
    """What `scaled` makes of every shape, as it is and mirrored, turned clockwise in TURNS steps.
    -> (shapes, 2, TURNS, CROP^2) of 0 and 1"""
    angle = torch.arange(TURNS, device=device) * (2 * math.pi / TURNS)
    axis = torch.linspace(-2, 2, 2 * CROP, device=device)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * axis + sin * axis[:, None], cos * axis[:, None] - sin * axis    # (TURNS, 2 CROP, 2 CROP)
    masks = torch.stack([torch.stack([distance(shape, x, y), distance(shape, -x, y)]) < 0 for shape in SHAPES]).float()
    return scaled(masks, *centre_and_area(masks))


def centre_and_area(masks):
    """Masks (..., S, S) of 0 and 1 -> centre x, y and area (...) each, as shares of the picture."""
    grid = (torch.arange(masks.shape[-1], device=masks.device) + 0.5) / masks.shape[-1]
    area = masks.mean((-1, -2))
    return (masks.mean(-2) * grid).mean(-1) / area, (masks.mean(-1) * grid).mean(-1) / area, area


def scaled(masks, x, y, area):
    """What is in masks (..., S, S), moved to the middle and made of one area. -> (..., CROP^2) of 0 and 1"""
    axis = torch.linspace(-1.1, 1.1, CROP, device=masks.device) * 2 * area.sqrt()[..., None]     # (..., CROP)
    x, y = (2 * centre[..., None] - 1 + axis for centre in (x, y))           # (..., CROP), where -1..1 is the picture
    shape = *area.shape, CROP, CROP
    x, y = x[..., None, :].expand(shape), y[..., :, None].expand(shape)          # (..., CROP, CROP)
    grid = torch.stack([x, y], dim=-1)                                           # (..., CROP, CROP, 2)
    crops = F.grid_sample(masks.flatten(0, -3)[:, None], grid.flatten(0, -4), align_corners=False)
    return (crops > 0.5).float().view(*area.shape, -1)


def pieces(masks):
    """Connected pieces of masks (N, H, W) -> which mask each is of (P,), and the pieces themselves (P, H, W).
    On cells of 2 x 2, every cell takes the highest number among its neighbours, then that of the cell which once had
    its number, until none changes."""
    masks = F.max_pool2d(-F.max_pool2d(-masks, 5, 1, 2), 5, 1, 2)                # without specks and rims
    coarse = F.max_pool2d(masks, 2).double()                                     # (N, H / 2, W / 2)
    numbers = torch.arange(coarse.numel(), device=masks.device).view(coarse.shape) + 1
    numbers = numbers * coarse
    while not torch.equal(numbers, spread := F.max_pool2d(numbers, 3, 1, 1) * coarse):
        numbers = spread.flatten()[(spread.long() - 1).clamp(min=0)] * coarse
    found, sizes = numbers.unique(return_counts=True)
    found = found[(found > 0) & (sizes > SMALLEST * coarse[0].numel())]          # (P,)
    which = ((found - 1) / coarse[0].numel()).long()
    numbers = numbers[which].repeat_interleave(2, 1).repeat_interleave(2, 2)     # (P, H, W)
    return which, (numbers == found[:, None, None]) * masks[which]


def unlike(pixels, colours, stretch=0.0):
    """How far pixels (..., 3) in 0..1 are from what surfaces of colours (C, 3) may look like; plus `stretch` times how
    dark or light they would have to be for it. -> (..., C)"""
    tones = torch.tensor(TONES, device=pixels.device)                            # (tones,)
    looks = colours[:, None] + tones[:, None] * tone_direction(colours)[:, None]             # (C, tones, 3)
    gaps = torch.cdist(pixels.flatten(0, -2), looks.clamp(0, 1).flatten(0, 1)).unflatten(-1, looks.shape[:2])
    return (gaps + stretch * tones.abs()).amin(-1).unflatten(0, pixels.shape[:-1])


def see(pictures, templates):
    """What is in pictures (N, 3, S, S) in -1..1? -> for each (colour of the ground, [Seen])

    Ground is whatever has a tone of the picture's commonest colour; other pieces are things. A piece's colour is the
    palette's nearest to its pixels; its outline is compared with every shape's. If it is like none, it may be two
    things that touch: it is cut into what is nearer to one and to the other of its two commonest colours."""
    cells = (F.adaptive_avg_pool2d(pictures.float(), CELLS) + 1) / 2             # (N, 3, CELLS, CELLS)
    cells = F.avg_pool2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, 1).movedim(1, -1)  # (N, CELLS, CELLS, 3)
    names, palette = list(COLOURS), torch.tensor(list(COLOURS.values()), device=cells.device) / 255      # (11, 3)
    coarse = cells[:, 2::4, 2::4]
    gaps = unlike(coarse, palette, STRETCH)                                      # (N, CELLS / 4, CELLS / 4, 11)
    nearest = gaps.argmin(-1)                                                    # (N, CELLS / 4, CELLS / 4)
    grounds = nearest.flatten(1).mode().values.tolist()                          # N numbers
    bases = [c[n == ground].median(0).values[None] for c, n, ground in zip(coarse, nearest, grounds)]    # (1, 3) each
    masks = torch.stack([unlike(c, base)[..., 0] > UNLIKE for c, base in zip(cells, bases)]).float()

    def things(which, masks):
        """Pieces masks (P, CELLS, CELLS) of pictures which (P,) -> P of Seen"""
        if len(masks) == 0:
            return []
        x, y, area = centre_and_area(masks)                                      # (P,) each
        crops = scaled(masks, x, y, area)                                        # (P, CROP^2)
        both = torch.einsum("pc,sfac->psfa", crops, templates)                   # (P, shapes, 2, TURNS)
        fits = (both / (crops.sum(-1)[:, None, None, None] + templates.sum(-1) - both)).amax(2).cpu()
        colours = [gaps[n][mask[2::4, 2::4] > 0].mean(0).argmin() for n, mask in zip(which, masks)]
        return [Seen(names[colour], *where, fit)
                for colour, *where, fit in zip(colours, x.tolist(), y.tolist(), area.tolist(), fits)]

    seen = [(names[ground], []) for ground in grounds]
    which, masks = pieces(masks)                                                 # (P,), (P, CELLS, CELLS)
    for n, mask, thing in zip(which.tolist(), masks, things(which, masks)):
        found = [thing]
        if not shape_of(thing.fits.amax(-1)):
            two = nearest[n][mask[2::4, 2::4] > 0].bincount(minlength=len(names)).topk(2).indices
            nearer = unlike(cells[n], palette[two], STRETCH).argmin(-1)          # (CELLS, CELLS)
            parts = [things([n] * len(cut), cut) for _, cut in (pieces((mask * (nearer == i))[None]) for i in (0, 1))]
            largest = [max(part, key=lambda s: s.area, default=thing) for part in parts]
            if all(shape_of(s.fits.amax(-1)) for s in largest):
                found = largest
        seen[n][1].extend(found)
    return seen


def shape_of(fits):
    """Overlaps with every shape (shapes,) -> the best one's name, or "" if none fits."""
    best, index = fits.max(0)
    return SHAPES[index] if best > 0.65 else ""


def check(scene, picture, templates):
    """-> things right, things asked, relations right, relations asked, is the background right?"""
    (background, found), = see(picture[None], templates)
    centres = []
    for thing in scene.things:
        match = next((s for s in found if (s.colour, shape_of(s.fits[:, 0])) == (thing.colour, thing.shape)), None)
        if match:
            found.remove(match)
        centres.append(match and (match.x, match.y))
    related = bool(scene.relation) and None not in centres[:2] and holds(scene.relation, *centres[:2])
    right = sum(c is not None for c in centres)
    return right, len(centres), int(related), int(bool(scene.relation)), background == scene.background


def ground_moves(first, later, dx, dy):
    """Does the ground of two frames (3, S, S) move by (dx, dy), shares of the picture, rather than stand still?"""
    side = CELLS // 2
    first, later = (F.adaptive_avg_pool2d(frame.mean(0, keepdim=True), side)[0] for frame in (first, later))
    dx, dy = round(dx * side), round(dy * side)

    def change(dx, dy):
        """Of most of the ground, whatever the thing covers, if first[i, j] goes to later[i + dy, j + dx]."""
        a = first[max(0, -dy):side - max(0, dy), max(0, -dx):side - max(0, dx)]
        b = later[max(0, dy):side - max(0, -dy), max(0, dx):side - max(0, -dx)]
        return (a - b).abs().median()
    return bool(change(dx, dy) < 0.8 * change(0, 0))


def moves(motion, x, y, area, turned, pans):
    """Does a thing move as asked, beyond doubt? x, y, area: (T,) in every frame; turned: degrees in all; pans: does the
    ground move along?"""
    reach = torch.hypot(x - x[0], y - y[0]).max()
    growth = area[-1] / area[0]
    if motion == "grows" or motion == "shrinks":
        return reach < 0.12 and (growth if motion == "grows" else 1 / growth) > 1.6
    if not 1 / 1.5 < growth < 1.5:
        return False
    if motion == "rotates":
        return reach < 0.12 and abs(turned) > 90
    if pans != (motion in PANS):
        return False
    if motion == "bounces":
        depth = y.max() - torch.maximum(y[0], y[-1])
        return depth > 0.15 and (y[-1] - y[0]).abs() < depth / 2 and (x - x[0]).abs().max() < depth / 2
    right, down = x.diff(), y.diff()
    along, across = {"moves left to right": (right, down), "moves right to left": (-right, down),
                     "moves up": (-down, right), "moves down": (down, right)}[PANS.get(motion, motion)]
    return along.sum() > 0.15 and along.min() > -0.02 and across.cumsum(0).abs().max() < along.sum() / 3


def check_videos(scenes, videos, templates):
    """videos (B, 3, T, S, S) in -1..1 of scenes -> for each scene the same five numbers as `check`, with the first,
    middle and last frame as three things, and the motion as a relation."""
    results = []
    for scene, video in zip(scenes, videos[:, :, ::2]):              # every second frame
        frames = video.transpose(0, 1)                               # (T, 3, S, S)
        grounds, found = zip(*see(frames, templates))
        main = [max(f, key=lambda s: s.area, default=None) for f in found]       # (T,) the largest piece of each frame
        asked = scene.things[0]
        there = []
        for s in (main[0], main[len(main) // 2], main[-1]):
            fits = s and (s.fits.amax(-1) if scene.motion == "rotates" else s.fits[:, 0])
            there.append(s is not None and (s.colour, shape_of(fits)) == (asked.colour, asked.shape))
        moved = None not in main and in_motion(scene, frames, main)
        results.append((sum(there), 3, int(moved), 1, set(grounds) == {scene.background}))
    return results


def in_motion(scene, frames, main):
    """Does what is seen in all frames, main (T,), move as the scene asks?"""
    x, y, area = torch.tensor([(s.x, s.y, s.area) for s in main]).unbind(1)                  # (T,) each
    shape = SHAPES.index(scene.things[0].shape)
    period = SYMMETRY.get(scene.things[0].shape, 360)
    angle = torch.stack([s.fits[shape] for s in main]).argmax(-1) * (360 / TURNS)            # (T,)
    turned = (angle.diff() + period / 2) % period - period / 2       # right while no step turns it by half a period
    half = len(main) // 2
    pans = ground_moves(frames[0], frames[half], (x[half] - x[0]).item(), (y[half] - y[0]).item())
    return bool(moves(scene.motion, x, y, area, turned.sum().item(), pans))
