"""The miniature world's camera: eight objects on a floor before a wall, drawn by ray marching.

A signed distance function says how far a point is from the nearest surface, so a ray may step that
far without passing through anything. Steps are repeated until the ray stands on the surface.
Marching is slow and depends on the object and its pose alone; colouring is fast. So `Geometry`
marches once, and `Geometry.shade` paints it many times: the same scene with another attribute is
the true picture of an edit. It is the only right one: patterns face the camera, however the object
is turned, and a backdrop keeps its place, so nothing in it is hidden from who paints the edit.

Conventions: x is right, y up, z towards the camera; the floor is y = 0. A picture has N samples,
of which M see the object; points, directions and colours are (3, N) or (3, M), a single one is
(3, 1). On the screen u is right and v up, both in [-1, 1]. Colours are in [0, 1]. "main" is the
part of an object that edits change. Words and most colours stand in concepts.json. All is ours.

    python mini/render.py "teddy bear" "leopard spots" sunset      # writes out/scene.png
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C: no traceback, whenever it comes
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).parent
CONCEPTS = json.loads((HERE / "concepts.json").read_text())
ATTRIBUTES = CONCEPTS["attributes"]                       # {edit type: [attribute, ...]}
TYPE_OF = {name: edit_type for edit_type, names in ATTRIBUTES.items() for name in names}


# ---- vectors and colours ------------------------------------------------------------------------

def column(x, y, z):
    """Three numbers -> (3, 1): a point, a direction, or a colour."""
    return torch.tensor([x, y, z], dtype=torch.float32).view(3, 1)


def from_hex(code):
    """ "ff8410" -> colour (3, 1)."""
    red, green, blue = bytes.fromhex(code)
    return column(red / 255, green / 255, blue / 255)


RGB = {name: from_hex(code) for name, code in CONCEPTS["palette"].items()}


def colors_of(table, name):
    """A row of one of concepts.json's tables of colours, each (3, 1)."""
    return [column(*color) for color in CONCEPTS[table][name]]


def length(*coordinates):
    """Euclidean length of vectors, given coordinate by coordinate."""
    return sum(c * c for c in coordinates).sqrt()


def unit(vectors):
    """(3, N) -> the same directions, of length 1."""
    return vectors / vectors.norm(dim=0, keepdim=True)


def mix(a, b, share):
    """From a (share 0) to b (share 1)."""
    return a + (b - a) * share


def between(x, low, high):
    return (low < x) & (x < high)


def in_period(x):
    """Position inside a period of length 1, in [-0.5, 0.5]: 0 in its middle."""
    return x % 1 - 0.5


# ---- signed distances of simple shapes; p is (x, y, z), three tensors (N,) ----------------------

def ball(p, centre, radii):
    """Ellipsoid. (A lower bound of its distance, which is all that marching needs.)"""
    offsets = [(x - c) / r for x, c, r in zip(p, centre, radii)]
    return (length(*offsets) - 1) * min(radii)


def sphere(p, centre, radius):
    return ball(p, centre, (radius, radius, radius))


def box(p, centre, half, rounding=0.03):
    """Box with rounded edges; `half` are half its sides."""
    sides = [(x - c).abs() - h + rounding for x, c, h in zip(p, centre, half)]
    sides = torch.stack(sides)                            # (3, N) how far beyond each face
    outside = length(*sides.clamp(min=0))
    inside = sides.amax(0).clamp(max=0)
    return outside + inside - rounding


def capsule(p, start, end, radius):
    """A line from start to end, as thick as `radius`."""
    axis = [e - s for s, e in zip(start, end)]
    offset = [x - s for x, s in zip(p, start)]
    projected = sum(o * a for o, a in zip(offset, axis))
    along = projected / sum(a * a for a in axis)
    along = along.clamp(0, 1)                             # 0 at start, 1 at end
    rest = [o - along * a for o, a in zip(offset, axis)]
    return length(*rest) - radius


def turned(p, radius, low, high, slope=1.0):
    """Solid of revolution about the y axis between two heights. Where the radius changes with the
    height, the distance is too large by a factor: `slope` below 1 makes up for it."""
    x, y, z = p
    from_side = (length(x, z) - radius) * slope
    middle = (low + high) / 2
    half = (high - low) / 2
    from_ends = (y - middle).abs() - half
    return torch.maximum(from_side, from_ends)


def torus(u, v, w, radius, tube):
    """Ring in the plane of u and v."""
    return length(length(u, v) - radius, w) - tube


def union(*distances):
    return torch.stack(distances).amin(0)


def cut(solid, hole):
    """The solid without the hole."""
    return torch.maximum(solid, -hole)


def blend(a, b, size=0.06):
    """Union with a fillet where the two shapes meet."""
    gap = (a - b).abs()
    near = (size - gap).clamp(min=0) / size
    return torch.minimum(a, b) - near * near * size / 4


# ---- the eight objects: p -> {part: distance (N,)} ----------------------------------------------
# A part that is not "main" has the palette's colour of its name.

def apple(p):
    x, y, z = p
    across = length(x, z) / (1.06 - 0.22 * (0.5 - y))     # narrower below
    ring = length(across - 0.2, (y - 0.47) * 0.92)
    body = (ring - 0.34) * 0.85                           # a torus without a hole: two dimples
    stem = capsule(p, (0, 0.6, 0),
                   end=(0.05, 1.0, 0), radius=0.035)
    leaf = ball(p, (0.19, 0.95, 0.05),
                radii=(0.16, 0.07, 0.05))
    return {"main": body, "stem": stem, "green": leaf}


def mug(p):
    x, y, z = p
    cup = (x - 0.12, y, z)                                # its middle; the handle is on the left
    outside = turned(cup, 0.4, 0, 0.9) - 0.02
    hollow = turned(cup, 0.34, 0.1, 1.2)
    ring = torus(x + 0.3, y - 0.45, z, 0.23, 0.065)
    inside = 0.33 - length(x - 0.12, z)
    handle = torch.maximum(ring, inside)
    return {
        "main": blend(cut(outside, hollow), handle),
        "dark": turned(cup, 0.34, 0.3, 0.62),             # coffee
    }


def bag(p):
    x, y, z = p
    taper = 1 + 0.25 * (y - 0.3)
    tapered = (x * taper, y, z * taper)
    body = box(tapered, (0, 0.34, 0),
               half=(0.52, 0.34, 0.2), rounding=0.09)
    flap = box((x * taper, y, z), (0, 0.53, 0.06),
               half=(0.5, 0.13, 0.17), rounding=0.06)
    ring = torus(x, (y - 0.66) * 0.8, z, 0.27, 0.045)
    return {
        "main": union(body, flap) * 0.85,
        "stem": torch.maximum(ring, 0.6 - y),             # the handle
        "brass": sphere(p, (0, 0.4, 0.24), 0.075),
    }


def teddy_bear(p):
    x, y, z = p
    pair = (x.abs(), y, z)                                # mirrored: one ear here is two ears
    belly = ball(p, (0, 0.42, 0),
                 radii=(0.31, 0.33, 0.27))
    head = ball(p, (0, 0.88, 0.02),
                radii=(0.29, 0.26, 0.25))
    shoulder = (0.24, 0.55, 0.05)
    hand = (0.42, 0.36, 0.18)
    hip = (0.2, 0.14, 0.1)
    foot = (0.3, 0.13, 0.34)
    arms = capsule(pair, shoulder, hand, 0.105)
    legs = capsule(pair, hip, foot, 0.125)
    ears = sphere(pair, (0.22, 1.1, 0), 0.11)
    hips = sphere(pair, hip, 0.1)
    body = blend(blend(belly, head), union(arms, legs))
    muzzle = ball(p, (0, 0.82, 0.2),
                  radii=(0.13, 0.1, 0.11))
    front = ball(p, (0, 0.42, 0.17),
                 radii=(0.2, 0.22, 0.14))
    inner_ears = sphere(pair, (0.225, 1.1, 0.07), 0.07)
    eyes = sphere(pair, (0.115, 0.98, 0.225), 0.045)
    nose = ball(p, (0, 0.87, 0.335),
                radii=(0.055, 0.04, 0.04))
    return {
        "main": blend(body, union(ears, hips)),
        "dark": union(eyes, nose),
        "pale": union(muzzle, front, inner_ears),
    }


def bowl(p):
    x, y, z = p
    from_middle = length(x, (y - 0.62) * 0.98, z)
    shell = (from_middle - 0.58).abs() - 0.035
    lower_half = torch.maximum(shell, y - 0.6)
    foot = turned(p, 0.24, 0, 0.1)
    return {"main": union(lower_half, foot)}


def vase(p):
    x, y, z = p
    from_belly = (y - 0.42) / 0.25
    belly = 0.2 * torch.exp(-from_belly ** 2)
    lip = 0.13 * (y - 0.85).clamp(min=0)
    width = 0.2 + belly + lip
    solid = turned(p, width, 0, 1.15, slope=0.7)
    hollow = turned(p, 0.12, 0.7, 1.4)
    return {"main": cut(solid, hollow)}


def chair(p):
    x, y, z = p
    pair = (x.abs(), y, z)
    front_legs = box(pair, (0.32, 0.25, 0.26),
                     half=(0.05, 0.25, 0.05))
    back_legs = box(pair, (0.32, 0.6, -0.27),
                    half=(0.05, 0.6, 0.05))
    seat = box(p, (0, 0.5, 0),
               half=(0.39, 0.06, 0.34))
    rail = box(p, (0, 1.07, -0.27),
               half=(0.36, 0.12, 0.045))
    bars = box(pair, (0.12, 0.8, -0.27),
               half=(0.04, 0.3, 0.03))
    return {"main": union(front_legs, back_legs, seat, rail, bars)}


def lamp(p):
    x, y, z = p
    pole = capsule(p, (0, 0.1, 0),
                   end=(0, 0.8, 0), radius=0.045)
    foot = turned(p, 0.27 - y, 0, 0.09, slope=0.7)
    knob = sphere(p, (0, 1.18, 0), 0.05)
    width = 0.44 - 0.42 * (y - 0.6)
    shade = turned(p, width, 0.6, 1.15, slope=0.7)
    return {"main": shade, "brass": union(pole, foot, knob)}


SHAPES = {
    "apple": apple,
    "mug": mug,
    "bag": bag,
    "teddy bear": teddy_bear,
    "bowl": bowl,
    "vase": vase,
    "chair": chair,
    "lamp": lamp,
}
POSES = {"bag": 0.3, "chair": 0.55}                       # radians: seen from the side


# ---- geometry: what every picture of a scene shares ---------------------------------------------

class Geometry:
    """Which sample of the picture sees what, where, and how it is turned; 2 x 2 samples a pixel.

    scene: {"object": a name, "seed": an integer that draws the pose and the camera}; size: of the
    picture, in pixels. ValueError for an object that the world does not have."""

    def __init__(self, scene, size=192):
        if scene["object"] not in SHAPES:
            known = ", ".join(SHAPES)
            raise ValueError(f"no object {scene['object']!r}: the world has {known}")
        generator = torch.Generator().manual_seed(scene["seed"])

        def draw(low, high):
            share = torch.rand((), generator=generator).item()
            return low + (high - low) * share

        self.size = size
        self.object = scene["object"]
        angle = POSES.get(self.object, 0) + draw(-0.35, 0.35)
        sine = math.sin(angle)
        cosine = math.cos(angle)
        self.turn = torch.tensor([
            [cosine, 0, -sine],
            [0, 1, 0],
            [sine, 0, cosine],
        ])
        self.scale = draw(0.9, 1.1)
        self.place = column(draw(-0.36, -0.24), 0, 0)
        camera = column(0, draw(1.15, 1.6), 4)
        ray = self.rays_from(camera)
        self.see_room(camera, ray)
        self.march(camera, ray)

    def rays_from(self, camera):
        """Directions (3, N), one for each sample, row by row; also sets u and v, both (N,)."""
        middles = torch.arange(2 * self.size) + 0.5
        line = middles / self.size - 1
        v, u = torch.meshgrid(-line, line, indexing="ij")
        self.u = u.flatten()
        self.v = v.flatten()
        forward = unit(column(0, 0.55, 0) - camera)
        right = column(1, 0, 0)
        up = torch.linalg.cross(right, forward, dim=0)
        return unit(forward * 3.7 + self.u * right + self.v * up)

    def see_room(self, camera, ray):
        """Floor and wall, and the object's shadow on them."""
        to_floor = -camera[1] / ray[1].clamp(max=-1e-6)   # (N,) distances along the ray
        to_wall = (-1.3 - camera[2]) / ray[2]
        self.is_floor = to_floor < to_wall
        self.room = camera + ray * torch.minimum(to_floor, to_wall)        # (3, N) points
        floor = self.is_floor.float()
        normal = torch.stack([-0.8 * self.u, floor, 1 - floor])            # as if it were bent, so
        self.room_normal = unit(normal)                   # that two lamps colour two sides
        self.lit = torch.ones_like(to_floor)              # (N,) 0 in the shadow
        towards_light = unit(column(-0.55, 0.85, 0.75))
        step = 0.04
        for _ in range(14):                               # a short march towards the light
            free = self.nearest(self.room + towards_light * step)
            lit = (8 * free / step).clamp(0, 1)
            self.lit = torch.minimum(self.lit, lit)
            step = step + 0.12

    def to_object(self, points):
        """World coordinates (3, N) -> the object's own."""
        return self.turn @ (points - self.place) / self.scale

    def distances(self, points):
        """World points (3, N) -> distance to each part of the object, {part: (N,)}."""
        parts = SHAPES[self.object](tuple(self.to_object(points)))
        return {part: distance * self.scale for part, distance in parts.items()}

    def nearest(self, points):
        return union(*self.distances(points).values())

    def march(self, camera, ray):
        """Which samples see the object, and where: 40 steps of the rays that pass near it."""
        centre = self.place + column(0, 0.6 * self.scale, 0)
        along = ((centre - camera) * ray).sum(0)          # (N,) where the ray is closest to centre
        missed_by = (camera + ray * along - centre).norm(dim=0)
        close = (missed_by < 0.82 * self.scale).nonzero()[:, 0]
        ray = ray[:, close]
        farthest = along[close] + 1
        t = along[close] - 0.8 * self.scale
        for _ in range(40):
            t = t + 0.95 * self.nearest(camera + ray * t)
        points = camera + ray * t
        hit = (self.nearest(points) < 0.01) & (t < farthest)
        self.pixels = close[hit]                          # (M,) into the N samples
        self.describe_surface(points[:, hit], ray[:, hit])

    def describe_surface(self, points, ray):
        """What shading needs to know of the object's visible points (3, M)."""
        self.normal = self.normal_at(points)              # (3, M)
        away = (self.normal * ray).sum(0)
        self.facing = -away.clamp(-1, 0)                  # (M,) 1 to the camera, 0: silhouette
        self.mirror = ray - 2 * away * self.normal        # (3, M) where the ray is reflected to
        parts = self.distances(points)
        self.parts = list(parts)
        distances = torch.stack(list(parts.values()))
        self.part = distances.argmin(0)                   # (M,) into parts
        free = self.nearest(points + 0.12 * self.normal) / 0.12
        above_floor = points[1] / 0.12
        open_to_object = free.clamp(0.25, 1)              # ambient occlusion
        self.open = open_to_object * above_floor.clamp(0.45, 1)
        self.local = (points - self.place) / self.scale   # (3, M) where patterns live

    def normal_at(self, points):
        """The gradient of the distance, from its differences at a tetrahedron's corners."""
        gradient = 0
        for x, y in [(1, -1), (-1, -1), (-1, 1), (1, 1)]:
            direction = column(x, y, x * y)
            nearby = points + 0.004 * direction
            gradient = gradient + direction * self.nearest(nearby)
        return unit(gradient)

    def shade(self, color, wall, attributes=()):
        """Paint the scene: the object's colour, the wall's, and any attributes of concepts.json,
        one of an edit type -> uint8 (size, size, 3). ValueError for an unknown attribute."""
        for attribute in attributes:
            if attribute not in TYPE_OF:
                known = ", ".join(TYPE_OF)
                raise ValueError(f"no attribute {attribute!r}: concepts.json has {known}")
        asked = {TYPE_OF[attribute]: attribute for attribute in attributes}
        light = Light(asked.get("lighting", "usual"))
        shadow = 0.3 * (1 - self.lit) * light.shadow
        picture = paint_room(self, asked.get("background"), wall)          # (3, N)
        picture = picture * (light.on(self, self.room_normal) - shadow)
        base = RGB[asked.get("color", color)]
        picture[:, self.pixels] = paint_object(self, base, asked, light, picture)
        if "object" in asked:
            add_thing(self, picture, asked["object"], light)
        samples = picture.clamp(0, 1).view(3, 2 * self.size, -1)
        pixels = F.avg_pool2d(samples[:, None], 2)[:, 0]                   # (3, size, size)
        pixels = (pixels * 255).round().byte()
        return pixels.permute(1, 2, 0).numpy()


# ---- light --------------------------------------------------------------------------------------

class Light:
    """Lamps [(direction, colour)], an ambient colour, and how dark shadows are; by name."""

    def __init__(self, name):
        row = CONCEPTS["lights"][name]
        self.name = name
        self.lamps = []
        for direction, color in row["lamps"]:
            self.lamps.append((unit(column(*direction)), column(*color)))
        self.ambient = column(*row["ambient"])
        self.shadow = row["shadow"]
        self.gain = row.get("gain", 1.0)

    def on(self, geometry, normal, where=slice(None)):
        """Light (3, M) on surfaces with these normals, at the samples `where`. Half-Lambert: soft
        towards the dark side, so that every colour stays recognisable."""
        lamps = 0
        for direction, color in self.lamps:
            cosine = (normal * direction).sum(0)
            half_lambert = (0.5 + 0.5 * cosine).pow(1.6)
            lamps = lamps + color * half_lambert
        reached = self.reach(geometry)[where]
        return self.gain * (self.ambient + reached * lamps)

    def reach(self, geometry):
        """How much of the lamps' light falls on each sample (N,): all of it, or a pool of it."""
        u = geometry.u - geometry.place[0] * 0.9
        v = geometry.v
        if self.name == "candlelight":
            squared = (u + 0.7) ** 2 + (v + 0.4) ** 2
            return torch.exp(-0.8 * squared)
        if self.name == "spotlight":
            from_middle = length(u, v * 0.85 + 0.05)
            return torch.sigmoid(14 * (0.66 - from_middle))
        return torch.ones_like(u)

    def gloss(self, geometry, power):
        """Highlights (3, M) on the object: the larger `power`, the smaller and sharper."""
        highlights = 0
        for direction, color in self.lamps:
            cosine = (geometry.mirror * direction).sum(0)
            highlight = cosine.clamp(min=0).pow(power)
            highlights = highlights + color * highlight
        return highlights


# ---- the object's patterns: coordinates p (3, M), not turned -> where the ink is (M,) -----------

def tile(p, width, height):
    """Staggered tiles around the object: the position inside a tile, each in [-0.5, 0.5]."""
    angle = torch.atan2(p[0], p[2] + 0.25)
    around = angle * 0.5 / width
    up = p[1] / height
    shifted = around + 0.5 * (up.floor() % 2)
    return in_period(shifted), in_period(up)


def stripes(p):
    return torch.sin(p[0] * 18) > 0


def zigzag(p):
    wiggle = 0.26 * in_period(p[0] * 2.8).abs()
    return (p[1] + wiggle) * 3.6 % 1 > 0.5


def checkers(p):
    column_number = (p[0] * 4.2 + 40).floor()
    row_number = (p[1] * 4.2).floor()
    return (column_number + row_number) % 2


def polka_dots(p):
    x, y = tile(p, 0.26, 0.235)
    return length(x, y) < 0.33


def hearts(p):
    x, y = tile(p, 0.34, 0.31)
    disc = x * x + y * y - 0.085
    return disc ** 3 < 1.1 * x * x * y ** 3               # the heart curve


def stars(p):
    x, y = tile(p, 0.34, 0.31)
    spikes = torch.cos(5 * torch.atan2(x, y))
    return length(x, y) < 0.25 + 0.12 * spikes


PATTERNS = {
    "stripes": stripes,
    "zigzag": zigzag,
    "checkers": checkers,
    "polka dots": polka_dots,
    "hearts": hearts,
    "stars": stars,
}
GROUND_AND_INK = {                                        # of patterns with colours of their own
    "hearts": ("white", "red"),
    "stars": ("navy", "yellow"),
}


def rainbow(p):
    """Six horizontal bands (3, M)."""
    names = ("purple", "blue", "green", "yellow", "orange", "red")
    bands = torch.cat([RGB[name] for name in names], dim=1)
    which = (p[1] * 5.5).long()
    return bands[:, which.clamp(0, 5)]


def leopard_spots(p):
    """Dark rings on a tawny ground (3, M)."""
    from_middle = cells(p, 420)[0]
    ring = between(from_middle, 0.04, 0.085)
    tawny = mix(RGB["beige"], RGB["orange"], 0.35)
    return mix(tawny, RGB["dark"], ring.float())


def paint_pattern(name, p, base):
    """The colour of an object that was `base` (3, 1), under a pattern -> (3, M)."""
    if name == "rainbow":
        return rainbow(p)
    if name == "leopard spots":
        return leopard_spots(p)
    ground = base.expand_as(p)
    ink = "navy" if base.mean() > 0.5 else "white"
    if name in GROUND_AND_INK:
        tint, ink = GROUND_AND_INK[name]
        ground = mix(ground, RGB[tint], 0.75)
    where = PATTERNS[name](p)
    return mix(ground, RGB[ink], where.float())


# ---- the object's materials ---------------------------------------------------------------------
# Each gives what the lamps colour, the gloss and the glow of the object, all (3, M), or a number
# where all samples are alike. `picture` (3, N) is what would be seen without the object.

def wave(p, frequency=1.0):
    """Cheap smooth noise about [-1, 1], sines bent by sines: (3, M) -> (M,)."""
    x, y, z = p * frequency
    x_bent = x * 2.1 + 1.7 * torch.sin(y * 1.3 + z)
    y_bent = y * 2.3 + 1.9 * torch.sin(z * 1.7 + x)
    z_bent = z * 1.9 + 1.5 * torch.sin(x * 1.9 - y)
    waves = torch.sin(x_bent) + torch.sin(y_bent)
    return (waves + torch.sin(z_bent)) / 3


def cells(p, count):
    """Distances (2, M) to the nearest and the second nearest of `count` scattered points."""
    generator = torch.Generator().manual_seed(5)
    points = torch.rand(count, 3, generator=generator) * 1.6
    points = points - torch.tensor([0.8, 0.2, 0.8])
    distances = torch.cdist(p.T, points)                  # (M, count)
    return distances.topk(2, largest=False).values.T


def cracks(p, count, width):
    """1 where the nearest and the second nearest point are equally far, 0 elsewhere: (M,)."""
    nearest, second = cells(p, count)
    return torch.exp(-(second - nearest) / width)


def wood(geometry, light, picture):
    p = geometry.local
    warped = p[1] + 0.35 * p[0] + 0.07 * wave(p, 3)
    rings = warped * 6.5 % 1
    fibres = 0.12 * wave(p * column(2, 16, 2))
    grain = rings ** 2 * 0.85 + fibres
    light_wood, dark_wood = colors_of("materials", "wood")
    brown = mix(light_wood, dark_wood, grain.clamp(0, 1))
    gloss = 0.1 * light.gloss(geometry, 12)
    return brown, gloss, 0.0


def metal(geometry, light, name, band):
    """A mirror of an imagined room, lit as the scene is: bright above, a dark band at eye level,
    the floor below."""
    height = geometry.mirror[1]
    above = 0.6 * torch.sigmoid(9 * (height - 0.25))
    from_band = (height + 0.02) / 0.16
    room = 0.55 + above - band * torch.exp(-from_band ** 2)
    lit = light.on(geometry, geometry.room_normal)
    lit = lit[:, geometry.pixels].clamp(max=1.2)
    tint, = colors_of("materials", name)
    gloss = 1.2 * light.gloss(geometry, 40)
    return 0.0, gloss, tint * room * lit


def gold(geometry, light, picture):
    return metal(geometry, light, "gold", band=0.45)


def chrome(geometry, light, picture):
    return metal(geometry, light, "chrome", band=0.75)


def marble(geometry, light, picture):
    p = geometry.local
    slope = p[0] * 8 + p[1] * 7
    layers = torch.sin(slope + 2.2 * wave(p, 3))
    vein = torch.exp(-5 * layers.abs())
    pale, dark = colors_of("materials", "marble")
    gloss = 0.5 * light.gloss(geometry, 40)
    return mix(pale, dark, vein), gloss, 0.0


def glass(geometry, light, picture):
    """What stands behind, bent towards the silhouette, and a bright edge."""
    wide = 2 * geometry.size
    shift = 0.3 * geometry.size
    right, up, _ = geometry.normal
    row = geometry.pixels // wide - shift * up
    across = geometry.pixels % wide + shift * right
    row = row.long().clamp(0, wide - 1)
    across = across.long().clamp(0, wide - 1)
    behind = picture[:, row * wide + across]
    edge = (1 - geometry.facing) ** 2.5
    rim, tint = colors_of("materials", "glass")
    glow = behind * tint * (1 - 0.5 * edge)
    gloss = 1.6 * light.gloss(geometry, 60)
    return rim * edge * 0.8, gloss, glow


def lava(geometry, light, picture):
    p = geometry.local
    jagged = torch.stack([wave(p, f) for f in (6, 7, 8)])
    heat = cracks(p + 0.05 * jagged, 60, 0.028)
    red = 1.5 * heat
    green = 0.75 * heat ** 1.5
    blue = 0.1 * heat ** 2
    crust, = colors_of("materials", "lava")
    return crust, 0.0, torch.stack([red, green, blue])


def ice(geometry, light, picture):
    p = geometry.local
    edge = 0.9 * (1 - geometry.facing) ** 1.5
    white = cracks(p, 40, 0.016) + edge
    deep, frosted = colors_of("materials", "ice")
    body = mix(deep, frosted, white.clamp(0, 1))
    cloudy = body * (0.9 + 0.15 * wave(p, 5))
    gloss = light.gloss(geometry, 30)
    return cloudy, gloss, 0.12 * body


MATERIALS = {
    "wood": wood,
    "gold": gold,
    "chrome": chrome,
    "marble": marble,
    "glass": glass,
    "lava": lava,
    "ice": ice,
}


def paint_object(geometry, base, asked, light, picture):
    """Colour of every sample that sees the object (3, M): material, pattern or the colour `base` on
    its main part, the others' own colours; then light, gloss, and a dark rim for clear edges.
    asked: {edit type: attribute}."""
    palette = [RGB.get(part, base) for part in geometry.parts]
    color = torch.cat(palette, dim=1)[:, geometry.part]
    gloss = 0.3 * light.gloss(geometry, 24)
    glow = torch.zeros_like(color)
    main = geometry.part == geometry.parts.index("main")
    if "material" in asked:
        material = MATERIALS[asked["material"]]
        new_color, new_gloss, new_glow = material(geometry, light, picture)
        color = torch.where(main, new_color, color)
        gloss = torch.where(main, new_gloss, gloss)
        glow = torch.where(main, new_glow, glow)
    elif "pattern" in asked:
        painted = paint_pattern(asked["pattern"], geometry.local, base)
        color = torch.where(main, painted, color)
    lit = light.on(geometry, geometry.normal, geometry.pixels)
    lit = lit * geometry.open
    facing = (geometry.facing / 0.45).clamp(0, 1)
    return (color * lit + gloss + glow) * (0.35 + 0.65 * facing)


# ---- backgrounds: [(where, share)], the last layer in front -------------------------------------
# where: bool (N,), or True for everywhere; share: from the layer's first colour in concepts.json
# to its last. Each is given the coordinates x, y of the wall, and the Backdrop that they are of.

class Backdrop:
    """Coordinates on the wall, all (N,): y is 0 where the floor ends and 1 at the picture's top,
    x is -1 at its left and 1 at its right."""

    def __init__(self, geometry):
        horizon = geometry.v[geometry.is_floor].max()
        self.height = 1 - horizon
        self.x = geometry.u
        self.y = (geometry.v - horizon) / self.height

    def disc(self, x, y, radius):
        return length(self.x - x, (self.y - y) * self.height) < radius

    def dots(self, columns, rows, shift, radius):
        """A grid of dots, each row shifted a little."""
        row = self.y * rows
        across = self.x * columns + row.floor() * shift
        return length(in_period(across), in_period(row)) < radius


def forest(x, y, wall):
    waves = torch.sin(x * 17 + 3 * torch.sin(y * 9))
    leaves = 0.5 + 0.5 * waves * torch.sin(y * 15 + x * 5)
    bent = x * 2.3 + 0.12 * torch.sin(y * 4)
    trunks = (bent % 1 < 0.22) & (y < 0.8)
    return [(True, leaves), (trunks, 0)]


def beach(x, y, wall):
    sky = (True, y)
    sea = (y < 0.30, y / 0.3)
    return [sky, sea]


def desert(x, y, wall):
    far_dune = y < 0.28 + 0.16 * torch.sin(x * 3.5)
    near_dune = y < 0.12 + 0.10 * torch.sin(x * 5 + 2)
    sky = (True, y)
    return [sky, (far_dune, 0), (near_dune, 0)]


def snow(x, y, wall):
    cone = 0.46 * (0.85 - y).clamp(min=0)
    branches = 0.6 + 0.4 * (y * 4 % 1 < 0.5)
    from_trunk = in_period(x * 1.9).abs()
    firs = (from_trunk < cone * branches) & (y < 0.85)
    flakes = wall.dots(6, 5, 0.37, 0.17)
    sky = (True, y)
    return [sky, (firs, 0), (flakes, 0)]


def night_sky(x, y, wall):
    moon = wall.disc(-0.62, 0.68, 0.17)
    shade = wall.disc(-0.54, 0.74, 0.15)
    twinkles = wall.dots(3.5, 4, 0.41, 0.13)
    lights = moon & ~shade | twinkles                     # a crescent and stars
    return [(True, y), (lights, 0)]


def sunset(x, y, wall):
    sky = (True, (y - 0.4) / 0.6)
    sea = (y < 0.4, y / 0.4)
    sun = (wall.disc(0.45, 0.22, 0.2), 0)
    return [sky, sea, sun]


def city(x, y, wall):
    block = (x * 3.2).floor()
    houses = y < 0.45 + 0.3 * torch.sin(block * 2.4) + 0.12
    lit_column = in_period(x * 12.8).abs() < 0.26
    lit_row = in_period(y * 9).abs() < 0.24
    windows = houses & lit_column & lit_row
    sky = (True, y)
    return [sky, (houses, 0), (windows, 0)]


def ocean(x, y, wall):
    sea = y < 0.62
    swell = torch.sin(x * 9 + 2.5 * torch.sin(y * 17))
    crests = sea & (swell * torch.sin(y * 26) > 0.62)
    sky = (True, y)
    return [sky, (sea, y), (crests, 0)]


BACKGROUNDS = {
    "forest": forest,
    "beach": beach,
    "desert": desert,
    "snow": snow,
    "night sky": night_sky,
    "sunset": sunset,
    "city": city,
    "ocean": ocean,
}


def paint_room(geometry, name, wall):
    """Colours (3, N) of wall and floor: a plain wall of the colour `wall`, or a background."""
    if name is None:
        floor = mix(RGB[wall], RGB["brown"], 0.45)
        return torch.where(geometry.is_floor, floor, RGB[wall])
    floor, *colors = CONCEPTS["backdrops"][name]
    x, _, z = geometry.room
    ripples = torch.sin(z * 9 + 2 * torch.sin(x * 4))
    picture = column(*floor) * (1 + 0.06 * ripples)
    backdrop = Backdrop(geometry)
    layers = BACKGROUNDS[name](backdrop.x, backdrop.y, backdrop)
    for (where, share), pair in zip(layers, colors):
        first = column(*pair[0])
        last = column(*pair[-1])
        color = mix(first, last, share)
        picture = torch.where(where & ~geometry.is_floor, color, picture)
    return picture


# ---- small added things: x, y about [-1, 1] -> [where], the last on top -------------------------
# Their colours stand in concepts.json, one a layer.

def oval(x, y, centre, radii, size=1.0):
    """Inside an ellipse, shrunk by `size`."""
    across = (x - centre[0]) / radii[0]
    up = (y - centre[1]) / radii[1]
    return length(across, up) < size


def butterfly(x, y):
    side = x.abs()                                        # mirrored: two wings
    upper = (0.54, 0.34), (0.48, 0.46)                    # centre and radii
    lower = (0.44, -0.42), (0.36, 0.40)
    wings = oval(side, y, *upper) | oval(side, y, *lower)
    paint = oval(side, y, *upper, size=0.78)
    paint = paint | oval(side, y, *lower, size=0.74)
    spots = oval(side, y, (0.64, 0.42), (0.15, 0.15))
    body = oval(side, y, (0, -0.05), (0.11, 0.62))
    line = (side - (y - 0.45) * 0.5).abs() < 0.06
    feelers = line & between(y, 0.45, 0.98)
    return [wings, paint, spots, body | feelers]


def flower(x, y):
    side = x.abs()
    stalk = (side < 0.07) & between(y, -1, 0.3)
    leaves = oval(side, y, (0.27, -0.55), (0.26, 0.12))
    up = y - 0.38                                         # from the blossom's middle
    from_middle = length(x, up)
    petals = 0.15 * torch.cos(5 * torch.atan2(x, up))
    blossom = from_middle < 0.44 + petals
    return [stalk, leaves, blossom, from_middle < 0.2]


def balloon(x, y):
    wiggle = 0.06 * torch.sin(y * 7)
    line = (x - wiggle).abs() < 0.05
    string = line & between(y, -1.4, -0.4)
    skin = oval(x, y, (0, 0.3), (0.66, 0.78))
    knot = oval(x, y, (0, -0.53), (0.13, 0.1))
    gloss = oval(x, y, (-0.24, 0.58), (0.14, 0.2))
    return [string, skin, knot, gloss]


def crown(x, y):
    inside = x.abs() < 0.9
    points = in_period(x / 0.6 + 1.5).abs()
    rim = 0.08 + 1.44 * points
    whole = inside & between(y, -0.95, rim)
    band = inside & between(y, -0.82, -0.42)
    side_jewels = length(x.abs() - 0.42, y + 0.62) < 0.12
    jewel = length(x, y + 0.62) < 0.13
    return [whole, band, side_jewels, jewel]


def party_hat(x, y):
    edge = 0.62 * (1 - (y + 0.95) / 1.75)
    hat = (x.abs() < edge) & (y > -0.95)
    bands = (y + 0.35 * x) * 2.2 % 1 < 0.42
    pompom = length(x, y - 0.80) < 0.2
    return [hat, hat & bands, pompom]


def leaf(x, y):
    along = (x + y) * 0.7071                              # turned by 45 degrees
    across = ((x - y) * 0.7071).abs()
    stalk = (across < 0.06) & between(along, -1.25, 0)
    from_middle = (along - 0.12).abs()
    width = (1 - from_middle).clamp(min=0)
    blade = across < 0.46 * width ** 0.7
    middle_vein = across < 0.045
    side_veins = (along * 3.2 - across * 3.2) % 1 < 0.18
    veins = middle_vein | side_veins & (across < 0.34)
    return [stalk, blade, blade & veins]


THINGS = {
    "butterfly": butterfly,
    "flower": flower,
    "balloon": balloon,
    "crown": crown,
    "party hat": party_hat,
    "leaf": leaf,
}


def add_thing(geometry, picture, name, light):
    """Paint a small thing into the picture (3, N), in the free space to the right of the object;
    what does not fly stands on the floor and has a shadow."""
    radius = 0.27
    flies = name in ("butterfly", "balloon")
    right_end = geometry.u[geometry.pixels].max().item()
    bottom = geometry.v[geometry.pixels].min().item()
    u = min(max(right_end + radius, 0.66), 0.98 - radius)
    v = 0.34 if flies else bottom + radius + 0.02
    across = (geometry.u - u).abs() < 1.3 * radius
    up = (geometry.v - v).abs() < 1.5 * radius
    near = across & up
    x = (geometry.u[near] - u) / radius
    y = (geometry.v[near] - v) / radius
    color = picture[:, near]
    if not flies:
        shadow = length(x * 0.8, (y + 0.95) * 3.5) < 0.7
        color = color * (1 - 0.35 * shadow.float())
    squared = 1.3 - x * x - y * y
    towards_us = squared.clamp(min=0.1).sqrt()
    normal = unit(torch.stack([x, y, towards_us]))        # as if it bulged
    lit = light.on(geometry, normal, near)
    layers = THINGS[name](x, y)
    for where, paint in zip(layers, colors_of("sprites", name)):
        color = torch.where(where, paint * lit, color)
    picture[:, near] = color


if __name__ == "__main__":
    name, *attributes = sys.argv[1:] or ["mug", "neon green", "ocean"]
    geometry = Geometry({"object": name, "seed": 0}, size=256)
    pixels = geometry.shade("white", "cream", attributes)
    Path("out").mkdir(exist_ok=True)
    Image.fromarray(pixels).save("out/scene.png")
    print("out/scene.png:", name, *attributes)
