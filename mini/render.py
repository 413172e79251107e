"""The miniature world's camera: eight objects on a floor before a wall, drawn by marching rays through signed distances.

A signed distance function says how far a point is from the nearest surface; a ray may always step that far without hitting
anything. Marching is slow and depends only on the object and its pose; colouring is fast. So `Geometry` marches once and
`.shade()` paints it many times: the same scene with another attribute is the ground truth of an edit.

Conventions: x right, y up, z towards the camera; the floor is y=0; points are (3, N); colours are in [0, 1], shaded in display space.
    python mini/render.py       # attributes.png: the 8 objects, then one picture for each of the 45 attributes
"""
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

import concepts

RGB = {name: torch.tensor([int(code[i:i + 2], 16) / 255 for i in (0, 2, 4)]).view(3, 1) for name, code in {
    "white": "f2f2ee", "grey": "8a8d92", "beige": "d9c29a", "brown": "80522d", "blue": "3f74d1", "maroon": "86203a",                 # objects
    "cream": "efe3c2", "mint": "b4dcc3", "lilac": "cdbbe2",                                                                         # walls
    "red": "e01818", "orange": "ff8410", "yellow": "ffdf1a", "neon green": "3dff1f", "turquoise": "19cfc4", "navy": "15205e",
    "purple": "7a22b8", "hot pink": "ff3ea0", "black": "1c1c1f", "olive": "737a1e",                                                 # edits
    "stem": "5a3a1c", "green": "3c9a35", "dark": "2a1d18", "pale": "f3e2c4", "brass": "d8ab3e"}.items()}                              # parts

# ---------------------------------------------------------------------------------------------- shapes: each returns distances (N,)


def length(*xs):
    return sum(x * x for x in xs).sqrt()


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


def turned(p, profile, low, high, slope=.7):
    """Solid of revolution about y: `profile(y)` is its radius between the heights low and high."""
    return torch.maximum((length(p[0], p[2]) - profile(p[1])) * slope, (p[1] - (low + high) / 2).abs() - (high - low) / 2)


def blend(a, b, k=.06):
    """Smooth union: a fillet of size k where two shapes meet."""
    h = (k - (a - b).abs()).clamp(min=0) / k
    return torch.minimum(a, b) - h * h * k / 4


def apple(p):
    x, y, z = p
    wide = 1.06 - .22 * (.5 - y)                                                    # narrower below
    body = (length(length(x, z) / wide - .2, (y - .47) * .92) - .34) * .85             # a torus without a hole: two dimples
    return {"main": body, "stem": capsule(p, (0, .6, 0), (.05, 1.0, 0), .035), "green": ball(p, (.19, .95, .05), (.16, .07, .05))}


def mug(p):
    q = (p[0] - .12, p[1], p[2])
    wall = torch.maximum(turned(q, lambda y: .4 + 0 * y, 0, .9, 1.) - .02, -turned(q, lambda y: .34 + 0 * y, .1, 1.2, 1.))
    ring = length(length(p[0] + .3, p[1] - .45) - .23, p[2]) - .065
    return {"main": blend(wall, torch.maximum(ring, .33 - length(q[0], q[2]))), "dark": turned(q, lambda y: .34 + 0 * y, .3, .62, 1.)}


def bag(p):
    taper = 1 + .25 * (p[1] - .3)
    body = box((p[0] * taper, p[1], p[2] * taper), (0, .34, 0), (.52, .34, .2), .09) * .85
    handle = length(length(p[0], (p[1] - .66) * .8) - .27, p[2]) - .045
    flap = box((p[0] * taper, p[1], p[2]), (0, .53, .06), (.5, .13, .17), .06) * .85
    return {"main": torch.minimum(body, flap), "stem": torch.maximum(handle, .6 - p[1]), "brass": ball(p, (0, .4, .24), .075)}


def teddy_bear(p):
    m = (p[0].abs(), p[1], p[2])                                                  # arms, legs, ears in mirrored pairs
    torso = blend(ball(p, (0, .42, 0), (.31, .33, .27)), ball(p, (0, .88, .02), (.29, .26, .25)))
    limbs = torch.minimum(capsule(m, (.24, .55, .05), (.42, .36, .18), .105), capsule(m, (.2, .14, .1), (.3, .13, .34), .125))
    fur = blend(blend(torso, limbs), torch.minimum(ball(m, (.22, 1.1, 0), .11), ball(m, (.2, .14, .1), .1)))
    face = torch.minimum(ball(m, (.115, .98, .225), .045), ball(p, (0, .87, .335), (.055, .04, .04)))
    pale = torch.minimum(ball(p, (0, .82, .2), (.13, .1, .11)), ball(p, (0, .42, .17), (.2, .22, .14)))
    return {"main": fur, "dark": face, "pale": torch.minimum(pale, ball(m, (.225, 1.1, .07), .07))}


def bowl(p):
    shell = torch.maximum((length(p[0], (p[1] - .62) * .98, p[2]) - .58).abs() - .035, p[1] - .6)
    return {"main": torch.minimum(shell, turned(p, lambda y: .24 + 0 * y, 0, .1, 1.))}


def vase(p):
    profile = lambda y: .2 + .2 * torch.exp(-((y - .42) / .25) ** 2) + .13 * (y - .85).clamp(min=0)
    hollow = turned(p, lambda y: .12 + 0 * y, .7, 1.4, 1.)
    return {"main": torch.maximum(turned(p, profile, 0, 1.15), -hollow)}


def chair(p):
    m = (p[0].abs(), p[1], p[2])
    legs = torch.minimum(box(m, (.32, .25, .26), (.05, .25, .05)), box(m, (.32, .6, -.27), (.05, .6, .05)))
    back = torch.minimum(box(p, (0, 1.07, -.27), (.36, .12, .045)), box(m, (.12, .8, -.27), (.04, .3, .03)))
    return {"main": torch.minimum(torch.minimum(legs, back), box(p, (0, .5, 0), (.39, .06, .34)))}


def lamp(p):
    pole = torch.minimum(capsule(p, (0, .1, 0), (0, .8, 0), .045), turned(p, lambda y: .27 - y, 0, .09))
    return {"main": turned(p, lambda y: .44 - .42 * (y - .6), .6, 1.15), "brass": torch.minimum(pole, ball(p, (0, 1.18, 0), .05))}


SHAPES = {"apple": apple, "mug": mug, "bag": bag, "teddy bear": teddy_bear, "bowl": bowl, "vase": vase, "chair": chair, "lamp": lamp}
TURN = {"mug": 0., "bag": .3, "chair": .55}                                         # the angle an object is usually seen from

# ---------------------------------------------------------------------------------------------- geometry: one march for many pictures


def unit(v):
    return v / v.norm(dim=0, keepdim=True)


KEY = unit(torch.tensor([[-.55], [.85], [.75]]))                                    # where the light comes from unless an edit says so


class Geometry:
    """What every picture of one scene shares: which pixel sees what, where, and how it is turned. 2x2 samples a pixel."""

    def __init__(self, scene, size=64):
        g = torch.Generator().manual_seed(scene["seed"])
        jitter = lambda low, high: low + (high - low) * torch.rand((), generator=g).item()
        self.size, self.phase, self.sdf = size, jitter(0, 1), SHAPES[scene["object"]]
        angle, self.scale, place = TURN.get(scene["object"], 0) + jitter(-.35, .35), jitter(.9, 1.1), jitter(-.36, -.24)
        camera = torch.tensor([[0.], [jitter(1.15, 1.6)], [4.]])
        self.turn = torch.tensor([[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0], [math.sin(angle), 0, math.cos(angle)]])
        self.place = torch.tensor([[place], [0.], [0.]])
        line = (torch.arange(2 * size) + .5) / size - 1
        self.v, self.u = (t.flatten() for t in torch.meshgrid(-line, line, indexing="ij"))      # (N,) screen, up and right
        forward = unit(torch.tensor([[0.], [.55], [0.]]) - camera)
        right = torch.tensor([[1.], [0.], [0.]])
        ray = unit(forward * 3.7 + self.u * right + self.v * torch.linalg.cross(right, forward, dim=0))
        self.room(camera, ray)
        self.march(camera, ray)

    def distance(self, p):
        """World points (3, N) -> distance to each part {name: (N,)}."""
        return {k: d * self.scale for k, d in self.sdf(tuple(self.turn @ (p - self.place) / self.scale)).items()}

    def nearest(self, p):
        return torch.stack(list(self.distance(p).values())).amin(0)

    def room(self, camera, ray):
        """Floor and back wall, in closed form; the shadow on them is a short march towards the light."""
        floor, wall = -camera[1] / ray[1].clamp(max=-1e-6), (-1.3 - camera[2]) / ray[2]
        self.is_floor = floor < wall
        self.behind = camera + ray * torch.minimum(floor, wall)                       # (3, N)
        self.lit, t = torch.ones_like(floor), .04
        near = (self.behind[0] - self.place[0]).abs() < 2
        p, lit = self.behind[:, near], self.lit[near]
        for _ in range(14):
            d = self.nearest(p + KEY * t)
            lit, t = torch.minimum(lit, (8 * d / t).clamp(0, 1)), t + .12
        self.lit[near] = lit

    def march(self, camera, ray):
        """The object: 40 steps for the rays that pass near it, then the normal by differences."""
        centre = self.place + torch.tensor([[0.], [.6 * self.scale], [0.]])
        along = ((centre - camera) * ray).sum(0)
        near = ((camera + ray * along - centre).norm(dim=0) < .82 * self.scale).nonzero()[:, 0]
        ray, t = ray[:, near], along[near] - .8 * self.scale
        for _ in range(40):
            t = t + .95 * self.nearest(camera + ray * t)
        p = camera + ray * t
        hit = (self.nearest(p) < .01) & (t < along[near] + 1)
        self.pixels, p, self.ray = near[hit], p[:, hit], ray[:, hit]                  # (M,) which samples see the object
        corners = torch.tensor([[1., -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
        self.normal = unit(sum(c.view(3, 1) * self.nearest(p + .004 * c.view(3, 1)) for c in corners))
        parts = self.distance(p)
        self.parts, self.part = list(parts), torch.stack(list(parts.values())).argmin(0)
        self.open = (self.nearest(p + .12 * self.normal) / .12).clamp(.25, 1) * (p[1] / .12).clamp(.45, 1)     # ambient occlusion
        self.local = self.turn @ (p - self.place) / self.scale                        # (3, M) where patterns live
        self.world = p

    def shade(self, color, wall, attributes=()):
        """Paint the scene: object colour, wall colour, and any attributes of concepts.py -> uint8 (H, W, 3)."""
        for a in attributes:
            if a not in concepts.TYPE_OF:
                raise ValueError(f"no attribute {a!r}: concepts.py has {', '.join(concepts.TYPE_OF)}")
        of = {concepts.TYPE_OF[a]: a for a in attributes}
        light = LIGHTS[of.get("lighting")]
        picture = backdrop(self, of.get("background"), wall) * (light.room(self) - .3 * (1 - self.lit) * light.shadow)
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
        self.lamps = [(unit(torch.tensor(d).view(3, 1)), torch.tensor(c).view(3, 1)) for d, c in lamps]
        self.ambient, self.shadow, self.mask, self.gain = torch.tensor(ambient).view(3, 1), shadow, mask, gain

    def falls(self, g):
        return self.mask(g.u - g.place[0] * .9, g.v) if self.mask else torch.ones_like(g.u)

    def on(self, normal):
        """Half-Lambert: soft towards the dark side, so that every colour stays recognisable. (3, M) -> (3, M)"""
        return sum(c * (.5 + .5 * (normal * d).sum(0)).pow(1.6) for d, c in self.lamps)

    def room(self, g):
        up = torch.where(g.is_floor, 1., 0.)
        normal = torch.stack([-.8 * g.u, up, 1 - up])                                 # bent outwards: two lamps colour two sides
        return self.gain * (self.ambient + self.falls(g) * self.on(unit(normal)))

    def gloss(self, normal, ray, power):
        mirror = ray - 2 * (normal * ray).sum(0) * normal
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


@lru_cache(maxsize=None)
def seeds(count):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.6, 1.6, 1.6]) - torch.tensor([.8, .2, .8])


def cells(p, count):
    """Distances to the nearest and second nearest of `count` scattered points: cracks lie where the two are equal."""
    return torch.cdist(p.T, seeds(count)).topk(2, largest=False).values.T             # (2, M)


def mix(a, b, w):
    return a + (b - a) * w


def tile(p, width, height):
    """Staggered tiles around the object: position inside a tile, each in [-.5, .5]."""
    u, v = torch.atan2(p[0], p[2] + .25) * .5 / width, p[1] / height
    row = v.floor()
    return (u + .5 * (row % 2)) % 1 - .5, v % 1 - .5


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
        band = (p[1] * 5.5).long().clamp(0, 5)
        return torch.cat([RGB[c] for c in ("purple", "blue", "green", "yellow", "orange", "red")], 1)[:, band]
    if pattern == "leopard spots":
        near = cells(p, 420)[0]
        return mix(mix(RGB["beige"], RGB["orange"], .35).expand_as(plain), RGB["dark"], ((near > .04) & (near < .085)).float())
    return plain


def surface(g, base, pattern, material, light, picture):
    """Colour of every sample that sees the object (3, M): paint or material, then light, gloss and a dark rim for clear edges."""
    p, n, facing = g.local, g.normal, -(g.normal * g.ray).sum(0).clamp(-1, 0)
    colors = torch.cat([RGB.get(k, base) for k in g.parts], 1)[:, g.part]              # (3, M) parts keep their own colours
    main = g.part == g.parts.index("main")
    if material is None:
        colors = torch.where(main, paint(p, base, pattern), colors)
    shine, glow = .3 * light.gloss(n, g.ray, 24), torch.zeros_like(p)
    if material:
        albedo, sheen, shining = MATERIALS[material](g, p, n, facing, light, picture)
        colors, shine, glow = torch.where(main, albedo, colors), torch.where(main, sheen, shine), torch.where(main, shining, glow)
    lit = light.gain * (light.ambient + light.falls(g)[g.pixels] * light.on(n)) * g.open
    rim = .35 + .65 * (facing / .45).clamp(0, 1)
    return (colors * lit + shine + glow) * rim


def metal(g, n, tint, light, dark):
    """A mirror of an imagined room: bright above, a dark band at eye level, the floor below; as bright as the scene's light."""
    up = (g.ray - 2 * (n * g.ray).sum(0) * n)[1]
    room = .55 + .6 * torch.sigmoid(9 * (up - .25)) - dark * torch.exp(-((up + .02) / .16) ** 2)
    return torch.zeros_like(n), 1.2 * light.gloss(n, g.ray, 40), tint * room * light.room(g)[:, g.pixels].clamp(max=1.2)


def wood(g, p, n, facing, light, picture):
    ring = (p[1] + .35 * p[0] + .07 * wave(p, 3)) * 6.5
    grain = (ring % 1) ** 2 * .85 + .12 * wave(p * torch.tensor([[2.], [16.], [2.]]))
    return mix(torch.tensor([[.78], [.52], [.27]]), torch.tensor([[.33], [.17], [.06]]), grain.clamp(0, 1)), .1 * light.gloss(n, g.ray, 12), 0 * p


def gold(g, p, n, facing, light, picture):
    return metal(g, n, torch.tensor([[1.], [.76], [.16]]), light, .45)


def chrome(g, p, n, facing, light, picture):
    return metal(g, n, torch.tensor([[.86], [.93], [1.]]), light, .75)


def marble(g, p, n, facing, light, picture):
    vein = torch.exp(-5 * (torch.sin(p[0] * 8 + p[1] * 7 + 2.2 * wave(p, 3))).abs())
    return mix(torch.tensor([[.97], [.96], [.94]]), torch.tensor([[.30], [.32], [.36]]), vein), .5 * light.gloss(n, g.ray, 40), 0 * p


def glass(g, p, n, facing, light, picture):
    """What stands behind, bent towards the silhouette, and a bright edge."""
    row, column = g.pixels // (2 * g.size), g.pixels % (2 * g.size)
    bent = [(i + s * .3 * g.size * m).long().clamp(0, 2 * g.size - 1) for i, s, m in ((row, -1, n[1]), (column, 1, n[0]))]
    edge = (1 - facing) ** 2.5
    through = picture[:, bent[0] * 2 * g.size + bent[1]] * torch.tensor([[.80], [.95], [.97]]) * (1 - .5 * edge)
    return torch.tensor([[.75], [.95], [1.]]) * edge * .8, 1.6 * light.gloss(n, g.ray, 60), through


def lava(g, p, n, facing, light, picture):
    first, second = cells(p + .05 * torch.stack([wave(p, 6), wave(p, 7), wave(p, 8)]), 60)
    heat = torch.exp(-(second - first) / .028)
    return torch.tensor([[.13], [.08], [.08]]) + 0 * p, 0 * p, torch.stack([1.5 * heat, .75 * heat ** 1.5, .1 * heat ** 2])


def ice(g, p, n, facing, light, picture):
    first, second = cells(p, 40)
    crack = torch.exp(-(second - first) / .016)
    body = mix(torch.tensor([[.50], [.78], [.97]]), torch.tensor([[.95], [.99], [1.]]), (crack + .9 * (1 - facing) ** 1.5).clamp(0, 1))
    return body * (.9 + .15 * wave(p, 5)), 1.0 * light.gloss(n, g.ray, 30), .12 * body


MATERIALS = {f.__name__: f for f in (wood, gold, chrome, marble, glass, lava, ice)}

# ---------------------------------------------------------------------------------------------- what stands behind and beside it


def rgb(*values):
    return torch.tensor(values).view(3, 1)


def forest(x, y, u, v, sky):
    trunk = ((x * 2.3 + .12 * torch.sin(y * 4)) % 1 < .22) & (y < .8)
    leaves = mix(rgb(.05, .26, .08), rgb(.28, .58, .16), .5 + .5 * torch.sin(x * 17 + 3 * torch.sin(y * 9)) * torch.sin(y * 15 + x * 5))
    return torch.where(trunk, rgb(.25, .15, .07), leaves), rgb(.24, .42, .12)


def beach(x, y, u, v, sky):
    sea = mix(rgb(.35, .85, .85), rgb(.05, .45, .75), (y / .3).clamp(0, 1))
    return torch.where(y < .30, sea, sky(rgb(.80, .93, 1.), rgb(.35, .68, .98))), rgb(.98, .86, .58)


def desert(x, y, u, v, sky):
    near, far = y < .12 + .10 * torch.sin(x * 5 + 2), y < .28 + .16 * torch.sin(x * 3.5)
    dunes = torch.where(far, rgb(.93, .60, .24), sky(rgb(1., .88, .62), rgb(.97, .74, .42)))
    return torch.where(near, rgb(.80, .42, .14), dunes), rgb(.88, .53, .20)


def snow(x, y, u, v, sky):
    fir = (((x * 1.9) % 1 - .5).abs() < .46 * (.85 - y).clamp(min=0) * (.6 + .4 * ((y * 4) % 1 < .5))) & (y < .85)
    flake = length((x * 6 + (y * 5).floor() * .37) % 1 - .5, (y * 5) % 1 - .5) < .17
    air = sky(rgb(.88, .93, .98), rgb(.66, .78, .90))
    return torch.where(flake, rgb(1., 1., 1.), torch.where(fir, rgb(.42, .58, .62), air)), rgb(.98, .99, 1.)


def night_sky(x, y, u, v, sky):
    dots = length((x * 3.5 + (y * 4).floor() * .41) % 1 - .5, (y * 4) % 1 - .5) < .13
    moon = (length(u + .62, v(.68)) < .17) & (length(u + .54, v(.74)) > .15)
    return torch.where(moon | dots, rgb(1., .97, .78), sky(rgb(.13, .15, .38), rgb(.03, .03, .14))), rgb(.16, .17, .30)


def sunset(x, y, u, v, sky):
    low, high = mix(rgb(1., .80, .20), rgb(1., .36, .20), (y / .4).clamp(0, 1)), mix(rgb(1., .36, .20), rgb(.42, .14, .50), ((y - .4) / .6).clamp(0, 1))
    return torch.where(length(u - .45, v(.22)) < .2, rgb(1., .97, .70), torch.where(y < .4, low, high)), rgb(.55, .26, .28)


def city(x, y, u, v, sky):
    house = y < .45 + .3 * torch.sin((x * 3.2).floor() * 2.4) + .12
    window = (((x * 12.8) % 1 - .5).abs() < .26) & (((y * 9) % 1 - .5).abs() < .24)
    front = torch.where(window, rgb(1., .90, .45), rgb(.22, .25, .34))
    return torch.where(house, front, sky(rgb(.85, .88, .93), rgb(.55, .68, .84))), rgb(.38, .39, .42)


def ocean(x, y, u, v, sky):
    crest = torch.sin(x * 9 + 2.5 * torch.sin(y * 17)) * torch.sin(y * 26) > .62
    sea = torch.where(crest, rgb(.85, .95, 1.), mix(rgb(.05, .32, .62), rgb(.02, .20, .50), y.clamp(0, 1)))
    return torch.where(y < .62, sea, sky(rgb(.95, .97, 1.), rgb(.55, .80, .97))), rgb(.10, .42, .66)


BACKDROPS = {"forest": forest, "beach": beach, "desert": desert, "snow": snow, "night sky": night_sky, "sunset": sunset, "city": city, "ocean": ocean}


def backdrop(g, name, wall):
    """Wall and floor colours of every sample (3, N). `y` runs from 0 where the floor ends to 1 at the top, `x` along the wall from somewhere."""
    top = g.v[g.is_floor].max()
    x, y = g.u + g.phase, (g.v - top) / (1 - top)
    if name is None:
        return torch.where(g.is_floor, mix(RGB[wall], RGB["brown"], .45), RGB[wall])
    back, floor = BACKDROPS[name](x, y, g.u, lambda height: (y - height) * (1 - top), lambda low, high: mix(low, high, y.clamp(0, 1)))
    return torch.where(g.is_floor, floor * (1 + .06 * torch.sin(g.behind[2] * 9 + 2 * torch.sin(g.behind[0] * 4))), back)


def add_sprite(g, picture, name, light):
    """Paint a small thing into the free space to the right of the object, as layers (where, colour) in its own coordinates [-1, 1]."""
    r = .27
    left, bottom = g.u[g.pixels].max().item() + r, g.v[g.pixels].min().item() + r
    cx, cy = min(max(left, .66), .98 - r), .34 if name in ("butterfly", "balloon") else bottom + .02
    near = ((g.u - cx).abs() < 1.3 * r) & ((g.v - cy).abs() < 1.5 * r)
    x, y = (g.u[near] - cx) / r, (g.v[near] - cy) / r
    bulge = unit(torch.stack([x, y, (1.3 - x * x - y * y).clamp(min=.1).sqrt()]))
    color = picture[:, near]
    if name not in ("butterfly", "balloon"):
        color = color * (1 - .35 * (length(x * .8, (y + .95) * 3.5) < .7).float())      # it stands on the floor
    lit = light.gain * (light.ambient + light.falls(g)[near] * light.on(bulge))
    for where, paint in SPRITES[name](x, y):
        color = torch.where(where, paint * lit, color)
    picture[:, near] = color


def oval(x, y, cx, cy, rx, ry):
    return length((x - cx) / rx, (y - cy) / ry)


def butterfly(x, y):
    a, body = x.abs(), rgb(.12, .06, .10)
    upper, lower = oval(a, y, .54, .34, .48, .46), oval(a, y, .44, -.42, .36, .40)
    antennae = ((a - (y - .45) * .5).abs() < .06) & (y > .45) & (y < .98)
    return [((upper < 1) | (lower < 1), body), ((upper < .78) | (lower < .74), rgb(1., .52, .05)), (oval(a, y, .64, .42, .15, .15) < 1, rgb(1., .95, .6)),
            ((oval(a, y, 0, -.05, .11, .62) < 1) | antennae, body)]


def flower(x, y):
    angle = torch.atan2(x, y - .38)
    petals = length(x, y - .38) < .44 + .15 * torch.cos(5 * angle)
    return [((x.abs() < .07) & (y > -1) & (y < .3), rgb(.16, .50, .14)), (oval(x.abs(), y, .27, -.55, .26, .12) < 1, rgb(.22, .62, .18)),
            (petals, rgb(1., .32, .60)), (length(x, y - .38) < .2, rgb(1., .86, .15))]


def balloon(x, y):
    return [(((x - .06 * torch.sin(y * 7)).abs() < .05) & (y < -.4) & (y > -1.4), rgb(.3, .25, .25)),
            (oval(x, y, 0, .3, .66, .78) < 1, rgb(.95, .10, .14)), (oval(x, y, 0, -.53, .13, .1) < 1, rgb(.7, .05, .08)), (oval(x, y, -.24, .58, .14, .2) < 1, rgb(1., .75, .75))]


def crown(x, y):
    teeth = .08 + 1.44 * ((x / .6 + 1.5) % 1 - .5).abs()
    jewel = length(x.abs() - .42, y + .62) < .12
    return [((x.abs() < .9) & (y > -.95) & (y < teeth), rgb(1., .78, .10)), ((x.abs() < .9) & (y > -.82) & (y < -.42), rgb(.86, .55, .05)),
            (jewel, rgb(.15, .5, 1.)), (length(x, y + .62) < .13, rgb(.9, .08, .15))]


def party_hat(x, y):
    cone = (x.abs() < .62 * (1 - (y + .95) / 1.75)) & (y > -.95)
    return [(cone, rgb(.20, .45, 1.)), (cone & (((y + .35 * x) * 2.2) % 1 < .42), rgb(1., .88, .10)), (length(x, y - .80) < .2, rgb(1., .25, .45))]


def leaf(x, y):
    along, across = (x + y) * .7071, ((x - y) * .7071).abs()
    blade = across < .46 * (1 - (along - .12).abs()).clamp(min=0) ** .7
    vein = (across < .045) | (((along * 3.2 - across * 3.2) % 1 < .18) & (across < .34))
    return [((across < .06) & (along > -1.25) & (along < 0), rgb(.30, .42, .10)), (blade, rgb(.30, .72, .14)), (blade & vein, rgb(.14, .42, .08))]


SPRITES = {"butterfly": butterfly, "flower": flower, "balloon": balloon, "crown": crown, "party hat": party_hat, "leaf": leaf}


def sheet(pictures, columns):
    """Pictures (H, W, 3) of one size -> one picture, row by row."""
    pictures = list(pictures) + [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    return np.concatenate([np.concatenate(pictures[i:i + columns], 1) for i in range(0, len(pictures), columns)], 0)


if __name__ == "__main__":
    from PIL import Image
    scenes = [{"object": o, "color": c, "wall": w, "seed": i} for i, (o, c, w) in enumerate(zip(concepts.OBJECTS, concepts.COLORS * 2, concepts.WALLS * 2))]
    pictures = [render(s) for s in scenes] + [render(scenes[i % 8], (a,)) for i, a in enumerate(concepts.TYPE_OF)]
    Image.fromarray(sheet(pictures, 8)).resize((1536, 192 * math.ceil(len(pictures) / 8))).save("attributes.png")
    print(f"attributes.png: {len(scenes)} objects, then one picture for each of {', '.join(concepts.TYPE_OF)}")
