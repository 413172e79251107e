"""The miniature world's camera: eight objects on a floor before a wall, drawn by marching rays through signed distances.

A signed distance function says how far a point is from the nearest surface; a ray may always step that far without hitting
anything. Marching is slow and depends only on the object and its pose; colouring is fast. So `Geometry` marches once and
`.shade()` paints it many times: the same scene with another attribute is the ground truth of an edit.

Conventions: x right, y up, z towards the camera; the floor is y=0; points are (3, N), of which M see the object; colours are in [0, 1], shaded in display space.
    python mini/render.py       # attributes.png: the 8 objects, then one picture for each of the 45 attributes
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from concepts import COLORS, OBJECTS, TYPE_OF, WALLS

RGB = {name: torch.tensor([int(code[i:i + 2], 16) / 255 for i in (0, 2, 4)]).view(3, 1) for name, code in {
    "white": "f2f2ee", "grey": "8a8d92", "beige": "d9c29a", "brown": "80522d", "blue": "3f74d1", "maroon": "86203a",                 # objects
    "cream": "efe3c2", "mint": "b4dcc3", "lilac": "cdbbe2",                                                                         # walls
    "red": "e01818", "orange": "ff8410", "yellow": "ffdf1a", "neon green": "3dff1f", "turquoise": "19cfc4", "navy": "15205e",
    "purple": "7a22b8", "hot pink": "ff3ea0", "black": "1c1c1f", "olive": "737a1e",                                                 # edits
    "stem": "5a3a1c", "green": "3c9a35", "dark": "2a1d18", "pale": "f3e2c4", "brass": "d8ab3e"}.items()}                              # parts

def rgb(*values):
    return torch.tensor(values).view(3, 1)

def length(*xs):
    return sum(x * x for x in xs).sqrt()

def unit(v):
    return v / v.norm(dim=0, keepdim=True)

def mix(a, b, w):
    return a + (b - a) * w

# ---------------------------------------------------------------------------------------------- shapes: distances (N,)
def ball(p, centre, radius):
    """Sphere, or ellipsoid when `radius` has three entries (a bound on its distance, which is all marching needs)."""
    r = radius if isinstance(radius, tuple) else (radius,) * 3
    return (length(*((x - c) / s for x, c, s in zip(p, centre, r))) - 1) * min(r)

def box(p, centre, half, rounding=.03):
    q = [(x - c).abs() - h + rounding for x, c, h in zip(p, centre, half)]
    return length(*(x.clamp(min=0) for x in q)) + torch.stack(q).amax(0).clamp(max=0) - rounding

def capsule(p, a, b, radius):
    ab = [v - u for u, v in zip(a, b)]
    along = (sum((x - u) * d for x, u, d in zip(p, a, ab)) / sum(d * d for d in ab)).clamp(0, 1)
    return length(*(x - u - along * d for x, u, d in zip(p, a, ab))) - radius

def turned(p, radius, low, high, slope=1.):
    """Solid of revolution about y between the heights low and high; a radius that changes with the height needs a slope below 1."""
    return torch.maximum((length(p[0], p[2]) - radius) * slope, (p[1] - (low + high) / 2).abs() - (high - low) / 2)

def union(*distances):
    return torch.stack(distances).amin(0)

def blend(a, b, k=.06):
    """Smooth union: a fillet of size k where two shapes meet."""
    h = (k - (a - b).abs()).clamp(min=0) / k
    return torch.minimum(a, b) - h * h * k / 4

def shape(name, p):
    """Object, points -> {part: distance}. The part "main" takes the edits; the others have the colours that they are named after."""
    x, y, z = p
    pair = (x.abs(), y, z)                                                             # for what comes in mirrored pairs: arms, ears, legs
    if name == "apple":
        wide = 1.06 - .22 * (.5 - y)                                                   # narrower below
        body = (length(length(x, z) / wide - .2, (y - .47) * .92) - .34) * .85            # a torus without a hole: two dimples
        return {"main": body, "stem": capsule(p, (0, .6, 0), (.05, 1.0, 0), .035), "green": ball(p, (.19, .95, .05), (.16, .07, .05))}
    if name == "mug":
        q = (x - .12, y, z)
        wall = torch.maximum(turned(q, .4, 0, .9) - .02, -turned(q, .34, .1, 1.2))
        ring = length(length(x + .3, y - .45) - .23, z) - .065
        return {"main": blend(wall, torch.maximum(ring, .33 - length(q[0], q[2]))), "dark": turned(q, .34, .3, .62)}
    if name == "bag":
        taper = 1 + .25 * (y - .3)
        body, flap = box((x * taper, y, z * taper), (0, .34, 0), (.52, .34, .2), .09), box((x * taper, y, z), (0, .53, .06), (.5, .13, .17), .06)
        handle = length(length(x, (y - .66) * .8) - .27, z) - .045
        return {"main": union(body * .85, flap * .85), "stem": torch.maximum(handle, .6 - y), "brass": ball(p, (0, .4, .24), .075)}
    if name == "teddy bear":
        torso = blend(ball(p, (0, .42, 0), (.31, .33, .27)), ball(p, (0, .88, .02), (.29, .26, .25)))
        limbs = union(capsule(pair, (.24, .55, .05), (.42, .36, .18), .105), capsule(pair, (.2, .14, .1), (.3, .13, .34), .125))
        fur = blend(blend(torso, limbs), union(ball(pair, (.22, 1.1, 0), .11), ball(pair, (.2, .14, .1), .1)))
        face = union(ball(pair, (.115, .98, .225), .045), ball(p, (0, .87, .335), (.055, .04, .04)))
        pale = union(ball(p, (0, .82, .2), (.13, .1, .11)), ball(p, (0, .42, .17), (.2, .22, .14)), ball(pair, (.225, 1.1, .07), .07))
        return {"main": fur, "dark": face, "pale": pale}
    if name == "bowl":
        shell = torch.maximum((length(x, (y - .62) * .98, z) - .58).abs() - .035, y - .6)
        return {"main": union(shell, turned(p, .24, 0, .1))}
    if name == "vase":
        profile = .2 + .2 * torch.exp(-((y - .42) / .25) ** 2) + .13 * (y - .85).clamp(min=0)
        return {"main": torch.maximum(turned(p, profile, 0, 1.15, .7), -turned(p, .12, .7, 1.4))}
    if name == "chair":
        legs = union(box(pair, (.32, .25, .26), (.05, .25, .05)), box(pair, (.32, .6, -.27), (.05, .6, .05)))
        back = union(box(p, (0, 1.07, -.27), (.36, .12, .045)), box(pair, (.12, .8, -.27), (.04, .3, .03)))
        return {"main": union(legs, back, box(p, (0, .5, 0), (.39, .06, .34)))}
    pole = union(capsule(p, (0, .1, 0), (0, .8, 0), .045), turned(p, .27 - y, 0, .09, .7))      # lamp
    return {"main": turned(p, .44 - .42 * (y - .6), .6, 1.15, .7), "brass": union(pole, ball(p, (0, 1.18, 0), .05))}

# ---------------------------------------------------------------------------------------------- geometry: one march for many pictures
TURN = {"mug": 0., "bag": .3, "chair": .55}                                         # the angle an object is usually seen from
KEY = unit(rgb(-.55, .85, .75))                                                     # where the light comes from unless an edit says so

class Geometry:
    """What every picture of one scene shares: which pixel sees what, where, and how it is turned. 2x2 samples a pixel."""

    def __init__(self, scene, size=64):
        g = torch.Generator().manual_seed(scene["seed"])
        jitter = lambda low, high: low + (high - low) * torch.rand((), generator=g).item()
        self.size, self.phase, self.object = size, jitter(0, 1), scene["object"]
        angle, self.scale, place = TURN.get(self.object, 0) + jitter(-.35, .35), jitter(.9, 1.1), jitter(-.36, -.24)
        camera, self.place = rgb(0., jitter(1.15, 1.6), 4.), rgb(place, 0., 0.)
        self.turn = torch.tensor([[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0], [math.sin(angle), 0, math.cos(angle)]])
        line = (torch.arange(2 * size) + .5) / size - 1
        self.v, self.u = (t.flatten() for t in torch.meshgrid(-line, line, indexing="ij"))      # (N,) screen, up and right
        forward, right = unit(rgb(0., .55, 0.) - camera), rgb(1., 0., 0.)
        ray = unit(forward * 3.7 + self.u * right + self.v * torch.linalg.cross(right, forward, dim=0))
        self.room(camera, ray)
        self.march(camera, ray)

    def distance(self, p):
        """World points (3, N) -> distance to each part {name: (N,)}."""
        return {k: d * self.scale for k, d in shape(self.object, tuple(self.turn @ (p - self.place) / self.scale)).items()}

    def nearest(self, p):
        return union(*self.distance(p).values())

    def room(self, camera, ray):
        """Floor and back wall, in closed form; the shadow on them is a short march towards the light."""
        floor, wall = -camera[1] / ray[1].clamp(max=-1e-6), (-1.3 - camera[2]) / ray[2]
        self.is_floor, self.behind = floor < wall, camera + ray * torch.minimum(floor, wall)    # (N,), (3, N)
        self.bent = unit(torch.stack([-.8 * self.u, self.is_floor.float(), 1 - self.is_floor.float()]))      # its normal, bent outwards: two lamps colour two sides
        near = (self.behind[0] - self.place[0]).abs() < 2
        self.lit, lit, t = torch.ones_like(floor), torch.ones(int(near.sum())), .04
        for _ in range(14):
            lit, t = torch.minimum(lit, (8 * self.nearest(self.behind[:, near] + KEY * t) / t).clamp(0, 1)), t + .12
        self.lit[near] = lit

    def march(self, camera, ray):
        """The object: 40 steps for the rays that pass near it, then the normal by differences."""
        centre = self.place + rgb(0., .6 * self.scale, 0.)
        along = ((centre - camera) * ray).sum(0)
        near = ((camera + ray * along - centre).norm(dim=0) < .82 * self.scale).nonzero()[:, 0]
        ray, t = ray[:, near], along[near] - .8 * self.scale
        for _ in range(40):
            t = t + .95 * self.nearest(camera + ray * t)
        p = camera + ray * t
        hit = (self.nearest(p) < .01) & (t < along[near] + 1)
        self.pixels, p, self.ray = near[hit], p[:, hit], ray[:, hit]                  # (M,) which samples see the object
        self.normal = unit(sum(c * self.nearest(p + .004 * c) for c in (rgb(1., -1, -1), rgb(-1., -1, 1), rgb(-1., 1, -1), rgb(1., 1, 1))))
        self.facing = -(self.normal * self.ray).sum(0).clamp(-1, 0)                    # 1 towards the camera, 0 at the silhouette
        parts = self.distance(p)
        self.parts, self.part = list(parts), torch.stack(list(parts.values())).argmin(0)
        self.open = (self.nearest(p + .12 * self.normal) / .12).clamp(.25, 1) * (p[1] / .12).clamp(.45, 1)     # ambient occlusion
        self.local = self.turn @ (p - self.place) / self.scale                        # (3, M) where patterns live

    def shade(self, color, wall, attributes=()):
        """Paint the scene: object colour, wall colour, and any attributes of concepts.py -> uint8 (H, W, 3)."""
        for a in attributes:
            if a not in TYPE_OF:
                raise ValueError(f"no attribute {a!r}: concepts.py has {', '.join(TYPE_OF)}")
        of = {TYPE_OF[a]: a for a in attributes}
        light = LIGHTS[of.get("lighting")]
        picture = backdrop(self, of.get("background"), wall) * (light.on(self, self.bent) - .3 * (1 - self.lit) * light.shadow)      # (3, N)
        picture[:, self.pixels] = surface(self, RGB[of.get("color", color)], of.get("pattern"), of.get("material"), light, picture)
        if "object" in of:
            add_sprite(self, picture, of["object"], light)
        picture = picture.clamp(0, 1).view(3, 1, 2 * self.size, 2 * self.size)
        return (F.avg_pool2d(picture, 2)[:, 0].permute(1, 2, 0) * 255).round().byte().numpy()

@lru_cache(maxsize=64)
def geometry(obj, seed, size):
    return Geometry({"object": obj, "seed": seed}, size)

def render(scene, attributes=(), size=64):
    """{"object", "color", "wall", "seed"} with `attributes` applied together -> uint8 (size, size, 3) numpy."""
    return geometry(scene["object"], scene["seed"], size).shade(scene["color"], scene["wall"], attributes)

# ---------------------------------------------------------------------------------------------- light
class Light:
    """Lamps [(direction, colour)], an ambient colour, how dark shadows are, and `mask`: where on the screen the light falls."""

    def __init__(self, lamps, ambient, shadow=1., mask=None, gain=1.):
        self.lamps = [(unit(rgb(*direction)), rgb(*color)) for direction, color in lamps]
        self.ambient, self.shadow, self.mask, self.gain = rgb(*ambient), shadow, mask, gain

    def on(self, g, normal, where=slice(None)):
        """Light (3, M) on the samples `where` of a picture. Half-Lambert: soft towards the dark side, so that every colour stays recognisable."""
        falls = self.mask(g.u - g.place[0] * .9, g.v)[where] if self.mask else 1.
        return self.gain * (self.ambient + falls * sum(c * (.5 + .5 * (normal * d).sum(0)).pow(1.6) for d, c in self.lamps))

    def gloss(self, g, power):
        mirror = g.ray - 2 * (g.normal * g.ray).sum(0) * g.normal
        return sum(c * (mirror * d).sum(0).clamp(min=0).pow(power) for d, c in self.lamps)

LEFT, RIGHT, TOP = [-1., .35, .5], [1., .35, .5], [0., 1., .35]
LIGHTS = {
    None: Light([(KEY.flatten().tolist(), [.72, .71, .68])], [.38, .38, .40]),
    "candlelight": Light([([-.8, -.1, .7], [1.05, .56, .16])], [.24, .11, .03], .4, lambda u, v: torch.exp(-.8 * ((u + .7) ** 2 + (v + .4) ** 2))),
    "moonlight": Light([([.7, .9, .2], [.34, .50, .86])], [.06, .10, .24], .6),
    "neon light": Light([(LEFT, [1.15, .05, .75]), (RIGHT, [.05, .75, 1.15])], [.06, .0, .12], .3),
    "spotlight": Light([(TOP, [1.3, 1.26, 1.1])], [.10, .10, .13], .5, lambda u, v: torch.sigmoid(14 * (.66 - length(u, v * .85 + .05)))),
    "dusk light": Light([([-1., .1, .3], [1.0, .42, .22])], [.30, .16, .40], .5),
    "studio light": Light([(KEY.flatten().tolist(), [.75, .75, .75]), (RIGHT, [.3, .3, .32])], [.5, .5, .5], .5, gain=1.15),
}

# ---------------------------------------------------------------------------------------------- what the object is made of
def wave(p, f=1.):
    """Cheap smooth noise about [-1, 1]: sines bent by sines. (3, M) -> (M,)"""
    x, y, z = p * f
    return (torch.sin(x * 2.1 + 1.7 * torch.sin(y * 1.3 + z)) + torch.sin(y * 2.3 + 1.9 * torch.sin(z * 1.7 + x)) + torch.sin(z * 1.9 + 1.5 * torch.sin(x * 1.9 - y))) / 3

def cells(p, count):
    """Distances (2, M) to the nearest and second nearest of `count` scattered points: cracks lie where the two are equal."""
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.6, 1.6, 1.6]) - torch.tensor([.8, .2, .8])
    return torch.cdist(p.T, points).topk(2, largest=False).values.T

def tile(p, width, height):
    """Staggered tiles around the object: position inside a tile, each in [-.5, .5]."""
    u, v = torch.atan2(p[0], p[2] + .25) * .5 / width, p[1] / height
    return (u + .5 * (v.floor() % 2)) % 1 - .5, v % 1 - .5

def paint(p, base, pattern):
    """The object's colour under a pattern, a function of the position on the object: (3, M), (3, 1) -> (3, M)."""
    light, dark = RGB["white"], RGB["navy"]
    other, plain = (dark if base.mean() > .5 else light), base.expand(3, p.shape[1])
    x, y = tile(p, .34, .31)
    if pattern == "stripes":
        return mix(plain, other, (torch.sin(p[0] * 22) > 0).float())
    if pattern == "zigzag":
        return mix(plain, other, (((p[1] + .10 * ((p[0] * 3.4) % 1 - .5).abs() * 2) * 4.6 % 1) > .5).float())
    if pattern == "checkers":
        return mix(plain, other, ((p[0] * 5 + 40).floor() + (p[1] * 5).floor() + (p[2] * 2.5 + 40).floor()) % 2)
    if pattern == "polka dots":
        return mix(plain, other, (length(*tile(p, .21, .19)) < .32).float())
    if pattern == "hearts":
        return mix(mix(plain, light, .75), RGB["red"], ((x * x + y * y - .085) ** 3 < 1.1 * x * x * y ** 3).float())
    if pattern == "stars":
        return mix(mix(plain, dark, .75), RGB["yellow"], (length(x, y) < .25 + .12 * torch.cos(5 * torch.atan2(x, y))).float())
    if pattern == "rainbow":
        return torch.cat([RGB[c] for c in ("purple", "blue", "green", "yellow", "orange", "red")], 1)[:, (p[1] * 5.5).long().clamp(0, 5)]
    if pattern == "leopard spots":
        near = cells(p, 420)[0]
        return mix(mix(RGB["beige"], RGB["orange"], .35).expand_as(plain), RGB["dark"], ((near > .04) & (near < .085)).float())
    return plain

def material(name, g, light, picture):
    """Colour, gloss and glow of the object, each (3, M)."""
    p, n, none = g.local, g.normal, torch.zeros_like(g.local)
    if name == "wood":
        ring = (p[1] + .35 * p[0] + .07 * wave(p, 3)) * 6.5
        grain = (ring % 1) ** 2 * .85 + .12 * wave(p * rgb(2., 16., 2.))
        return mix(rgb(.78, .52, .27), rgb(.33, .17, .06), grain.clamp(0, 1)), .1 * light.gloss(g, 12), none
    if name in ("gold", "chrome"):                # a mirror of an imagined room: bright above, a dark band at eye level, the floor below; as bright as the scene's light
        tint, dark = (rgb(1., .76, .16), .45) if name == "gold" else (rgb(.86, .93, 1.), .75)
        up = (g.ray - 2 * (n * g.ray).sum(0) * n)[1]
        room = .55 + .6 * torch.sigmoid(9 * (up - .25)) - dark * torch.exp(-((up + .02) / .16) ** 2)
        return none, 1.2 * light.gloss(g, 40), tint * room * light.on(g, g.bent)[:, g.pixels].clamp(max=1.2)
    if name == "marble":
        vein = torch.exp(-5 * (torch.sin(p[0] * 8 + p[1] * 7 + 2.2 * wave(p, 3))).abs())
        return mix(rgb(.97, .96, .94), rgb(.30, .32, .36), vein), .5 * light.gloss(g, 40), none
    if name == "glass":                           # what stands behind, bent towards the silhouette, and a bright edge
        wide, edge = 2 * g.size, (1 - g.facing) ** 2.5
        row, column = ((i + s * .3 * g.size * m).long().clamp(0, wide - 1) for i, s, m in ((g.pixels // wide, -1, n[1]), (g.pixels % wide, 1, n[0])))
        return rgb(.75, .95, 1.) * edge * .8, 1.6 * light.gloss(g, 60), picture[:, row * wide + column] * rgb(.80, .95, .97) * (1 - .5 * edge)
    if name == "lava":
        first, second = cells(p + .05 * torch.stack([wave(p, 6), wave(p, 7), wave(p, 8)]), 60)
        heat = torch.exp(-(second - first) / .028)
        return rgb(.13, .08, .08) + none, none, torch.stack([1.5 * heat, .75 * heat ** 1.5, .1 * heat ** 2])
    first, second = cells(p, 40)                  # ice
    crack = torch.exp(-(second - first) / .016)
    body = mix(rgb(.50, .78, .97), rgb(.95, .99, 1.), (crack + .9 * (1 - g.facing) ** 1.5).clamp(0, 1))
    return body * (.9 + .15 * wave(p, 5)), 1.0 * light.gloss(g, 30), .12 * body

def surface(g, base, pattern, made_of, light, picture):
    """Colour of every sample that sees the object (3, M): paint or material, then light, gloss and a dark rim for clear edges."""
    usual = torch.cat([RGB.get(k, base) for k in g.parts], 1)[:, g.part], .3 * light.gloss(g, 24), torch.zeros_like(g.local)      # parts keep their own colours
    looks = material(made_of, g, light, picture) if made_of else (paint(g.local, base, pattern), *usual[1:])
    colors, shine, glow = (torch.where(g.part == g.parts.index("main"), new, old) for new, old in zip(looks, usual))
    return (colors * (light.on(g, g.normal, g.pixels) * g.open) + shine + glow) * (.35 + .65 * (g.facing / .45).clamp(0, 1))

# ---------------------------------------------------------------------------------------------- what stands behind and beside it
def backdrop(g, name, wall):
    """Wall and floor colours of every sample (3, N). `y` runs from 0 where the floor ends to 1 at the top, `x` along the wall from somewhere."""
    top = g.v[g.is_floor].max()
    x, y = g.u + g.phase, (g.v - top) / (1 - top)
    sky = lambda low, high: mix(low, high, y.clamp(0, 1))
    disc = lambda u, v, radius: length(g.u - u, (y - v) * (1 - top)) < radius
    if name is None:
        return torch.where(g.is_floor, mix(RGB[wall], RGB["brown"], .45), RGB[wall])
    if name == "forest":
        trunk, floor = ((x * 2.3 + .12 * torch.sin(y * 4)) % 1 < .22) & (y < .8), rgb(.24, .42, .12)
        leaves = mix(rgb(.05, .26, .08), rgb(.28, .58, .16), .5 + .5 * torch.sin(x * 17 + 3 * torch.sin(y * 9)) * torch.sin(y * 15 + x * 5))
        back = torch.where(trunk, rgb(.25, .15, .07), leaves)
    elif name == "beach":
        sea, floor = mix(rgb(.35, .85, .85), rgb(.05, .45, .75), (y / .3).clamp(0, 1)), rgb(.98, .86, .58)
        back = torch.where(y < .30, sea, sky(rgb(.80, .93, 1.), rgb(.35, .68, .98)))
    elif name == "desert":
        near, far, floor = y < .12 + .10 * torch.sin(x * 5 + 2), y < .28 + .16 * torch.sin(x * 3.5), rgb(.88, .53, .20)
        back = torch.where(near, rgb(.80, .42, .14), torch.where(far, rgb(.93, .60, .24), sky(rgb(1., .88, .62), rgb(.97, .74, .42))))
    elif name == "snow":
        fir = (((x * 1.9) % 1 - .5).abs() < .46 * (.85 - y).clamp(min=0) * (.6 + .4 * ((y * 4) % 1 < .5))) & (y < .85)
        flake, floor = length((x * 6 + (y * 5).floor() * .37) % 1 - .5, (y * 5) % 1 - .5) < .17, rgb(.98, .99, 1.)
        back = torch.where(flake, rgb(1., 1., 1.), torch.where(fir, rgb(.42, .58, .62), sky(rgb(.88, .93, .98), rgb(.66, .78, .90))))
    elif name == "night sky":
        stars, floor = length((x * 3.5 + (y * 4).floor() * .41) % 1 - .5, (y * 4) % 1 - .5) < .13, rgb(.16, .17, .30)
        back = torch.where(disc(-.62, .68, .17) & ~disc(-.54, .74, .15) | stars, rgb(1., .97, .78), sky(rgb(.13, .15, .38), rgb(.03, .03, .14)))
    elif name == "sunset":
        low, high = mix(rgb(1., .80, .20), rgb(1., .36, .20), (y / .4).clamp(0, 1)), mix(rgb(1., .36, .20), rgb(.42, .14, .50), ((y - .4) / .6).clamp(0, 1))
        back, floor = torch.where(disc(.45, .22, .2), rgb(1., .97, .70), torch.where(y < .4, low, high)), rgb(.55, .26, .28)
    elif name == "city":
        house, floor = y < .45 + .3 * torch.sin((x * 3.2).floor() * 2.4) + .12, rgb(.38, .39, .42)
        window = (((x * 12.8) % 1 - .5).abs() < .26) & (((y * 9) % 1 - .5).abs() < .24)
        back = torch.where(house, torch.where(window, rgb(1., .90, .45), rgb(.22, .25, .34)), sky(rgb(.85, .88, .93), rgb(.55, .68, .84)))
    else:                                         # ocean
        crest, floor = torch.sin(x * 9 + 2.5 * torch.sin(y * 17)) * torch.sin(y * 26) > .62, rgb(.10, .42, .66)
        sea = torch.where(crest, rgb(.85, .95, 1.), mix(rgb(.05, .32, .62), rgb(.02, .20, .50), y.clamp(0, 1)))
        back = torch.where(y < .62, sea, sky(rgb(.95, .97, 1.), rgb(.55, .80, .97)))
    return torch.where(g.is_floor, floor * (1 + .06 * torch.sin(g.behind[2] * 9 + 2 * torch.sin(g.behind[0] * 4))), back)

def sprite(name, x, y):
    """A small thing as layers [(where, colour)], the last on top, in its own coordinates [-1, 1]."""
    oval = lambda x, y, cx, cy, rx, ry: length((x - cx) / rx, (y - cy) / ry)
    a = x.abs()
    if name == "butterfly":
        upper, lower, dot, body = oval(a, y, .54, .34, .48, .46), oval(a, y, .44, -.42, .36, .40), oval(a, y, .64, .42, .15, .15), oval(a, y, 0, -.05, .11, .62)
        antennae, dark = ((a - (y - .45) * .5).abs() < .06) & (y > .45) & (y < .98), rgb(.12, .06, .10)
        return [((upper < 1) | (lower < 1), dark), ((upper < .78) | (lower < .74), rgb(1., .52, .05)), (dot < 1, rgb(1., .95, .6)), ((body < 1) | antennae, dark)]
    if name == "flower":
        petals = length(x, y - .38) < .44 + .15 * torch.cos(5 * torch.atan2(x, y - .38))
        return [((a < .07) & (y > -1) & (y < .3), rgb(.16, .50, .14)), (oval(a, y, .27, -.55, .26, .12) < 1, rgb(.22, .62, .18)),
                (petals, rgb(1., .32, .60)), (length(x, y - .38) < .2, rgb(1., .86, .15))]
    if name == "balloon":
        return [(((x - .06 * torch.sin(y * 7)).abs() < .05) & (y < -.4) & (y > -1.4), rgb(.3, .25, .25)), (oval(x, y, 0, .3, .66, .78) < 1, rgb(.95, .10, .14)),
                (oval(x, y, 0, -.53, .13, .1) < 1, rgb(.7, .05, .08)), (oval(x, y, -.24, .58, .14, .2) < 1, rgb(1., .75, .75))]
    if name == "crown":
        teeth = .08 + 1.44 * ((x / .6 + 1.5) % 1 - .5).abs()
        return [((a < .9) & (y > -.95) & (y < teeth), rgb(1., .78, .10)), ((a < .9) & (y > -.82) & (y < -.42), rgb(.86, .55, .05)),
                (length(a - .42, y + .62) < .12, rgb(.15, .5, 1.)), (length(x, y + .62) < .13, rgb(.9, .08, .15))]
    if name == "party hat":
        cone = (a < .62 * (1 - (y + .95) / 1.75)) & (y > -.95)
        return [(cone, rgb(.20, .45, 1.)), (cone & (((y + .35 * x) * 2.2) % 1 < .42), rgb(1., .88, .10)), (length(x, y - .80) < .2, rgb(1., .25, .45))]
    along, across = (x + y) * .7071, ((x - y) * .7071).abs()                           # leaf
    blade = across < .46 * (1 - (along - .12).abs()).clamp(min=0) ** .7
    vein = (across < .045) | (((along * 3.2 - across * 3.2) % 1 < .18) & (across < .34))
    return [((across < .06) & (along > -1.25) & (along < 0), rgb(.30, .42, .10)), (blade, rgb(.30, .72, .14)), (blade & vein, rgb(.14, .42, .08))]

def add_sprite(g, picture, name, light):
    """Paint a small thing into the free space to the right of the object; what does not fly stands on the floor and has a shadow."""
    r, flies = .27, name in ("butterfly", "balloon")
    left, bottom = g.u[g.pixels].max().item() + r, g.v[g.pixels].min().item() + r
    cx, cy = min(max(left, .66), .98 - r), .34 if flies else bottom + .02
    near = ((g.u - cx).abs() < 1.3 * r) & ((g.v - cy).abs() < 1.5 * r)
    x, y = (g.u[near] - cx) / r, (g.v[near] - cy) / r
    color = picture[:, near] * (1. if flies else 1 - .35 * (length(x * .8, (y + .95) * 3.5) < .7).float())
    lit = light.on(g, unit(torch.stack([x, y, (1.3 - x * x - y * y).clamp(min=.1).sqrt()])), near)          # as if it bulged
    for where, paint in sprite(name, x, y):
        color = torch.where(where, paint * lit, color)
    picture[:, near] = color

if __name__ == "__main__":
    from PIL import Image
    page, names = Image.new("RGB", (8 * 64, 7 * 64), "white"), [None] * 8 + list(TYPE_OF)
    for i, a in enumerate(names):
        scene = {"object": OBJECTS[i % 8], "color": (COLORS * 2)[i % 8], "wall": (WALLS * 2)[i % 8], "seed": i % 8}
        page.paste(Image.fromarray(render(scene, (a,) if a else ())), (i % 8 * 64, i // 8 * 64))
    page.resize((8 * 192, 7 * 192)).save("attributes.png")
    print(f"attributes.png: {', '.join(OBJECTS)}, then one picture for each of {', '.join(TYPE_OF)}")
