"""The miniature world's camera: eight objects on a floor before a wall, drawn by marching rays through signed distances.

A signed distance says how far a point is from the nearest surface; a ray may step that far without hitting anything. Marching is slow and depends on the object
and its pose alone, colouring is fast: `Geometry` marches once, `.shade()` paints it many times, and the same scene with another attribute is the truth of an edit.
x is right, y up, z towards the camera; the floor is y=0; points are (3, N), of which M see the object; colours are in [0, 1], most of them in concepts.json.
"""
import math
import torch
from world import CONCEPTS, TYPE_OF

def rgb(*values):
    return torch.tensor(values).view(3, 1)
RGB = {name: rgb(*(byte / 255 for byte in bytes.fromhex(code))) for name, code in CONCEPTS["palette"].items()}
def length(*xs):
    return sum(x * x for x in xs).sqrt()
def unit(v):
    return v / v.norm(dim=0, keepdim=True)
def mix(a, b, w):
    return a + (b - a) * w

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
        body = (length(length(x, z) / (1.06 - .22 * (.5 - y)) - .2, (y - .47) * .92) - .34) * .85      # a torus without a hole: two dimples; narrower below
        return {"main": body, "stem": capsule(p, (0, .6, 0), (.05, 1.0, 0), .035), "green": ball(p, (.19, .95, .05), (.16, .07, .05))}
    if name == "mug":
        q = (x - .12, y, z)
        wall = torch.maximum(turned(q, .4, 0, .9) - .02, -turned(q, .34, .1, 1.2))
        ring = length(length(x + .3, y - .45) - .23, z) - .065
        return {"main": blend(wall, torch.maximum(ring, .33 - length(q[0], q[2]))), "dark": turned(q, .34, .3, .62)}
    if name == "bag":
        taper = 1 + .25 * (y - .3)
        body, flap = box((x * taper, y, z * taper), (0, .34, 0), (.52, .34, .2), .09), box((x * taper, y, z), (0, .53, .06), (.5, .13, .17), .06)
        handle = torch.maximum(length(length(x, (y - .66) * .8) - .27, z) - .045, .6 - y)
        return {"main": union(body, flap) * .85, "stem": handle, "brass": ball(p, (0, .4, .24), .075)}
    if name == "teddy bear":
        torso = blend(ball(p, (0, .42, 0), (.31, .33, .27)), ball(p, (0, .88, .02), (.29, .26, .25)))
        limbs = union(capsule(pair, (.24, .55, .05), (.42, .36, .18), .105), capsule(pair, (.2, .14, .1), (.3, .13, .34), .125))
        fur = blend(blend(torso, limbs), union(ball(pair, (.22, 1.1, 0), .11), ball(pair, (.2, .14, .1), .1)))
        pale = union(ball(p, (0, .82, .2), (.13, .1, .11)), ball(p, (0, .42, .17), (.2, .22, .14)), ball(pair, (.225, 1.1, .07), .07))
        return {"main": fur, "dark": union(ball(pair, (.115, .98, .225), .045), ball(p, (0, .87, .335), (.055, .04, .04))), "pale": pale}      # dark: the face
    if name == "bowl":
        return {"main": union(torch.maximum((length(x, (y - .62) * .98, z) - .58).abs() - .035, y - .6), turned(p, .24, 0, .1))}
    if name == "vase":
        return {"main": torch.maximum(turned(p, .2 + .2 * torch.exp(-((y - .42) / .25) ** 2) + .13 * (y - .85).clamp(min=0), 0, 1.15, .7), -turned(p, .12, .7, 1.4))}
    if name == "chair":
        return {"main": union(box(pair, (.32, .25, .26), (.05, .25, .05)), box(pair, (.32, .6, -.27), (.05, .6, .05)), box(p, (0, .5, 0), (.39, .06, .34)),
                              box(p, (0, 1.07, -.27), (.36, .12, .045)), box(pair, (.12, .8, -.27), (.04, .3, .03)))}      # legs, seat; back
    pole = union(capsule(p, (0, .1, 0), (0, .8, 0), .045), turned(p, .27 - y, 0, .09, .7))      # lamp
    return {"main": turned(p, .44 - .42 * (y - .6), .6, 1.15, .7), "brass": union(pole, ball(p, (0, 1.18, 0), .05))}

class Geometry:
    """What every picture of one scene shares: which pixel sees what, where, and how it is turned. 2x2 samples a pixel."""
    def __init__(self, scene, size=64):
        g = torch.Generator().manual_seed(scene["seed"])
        jitter = lambda low, high: low + (high - low) * torch.rand((), generator=g).item()
        self.size, self.phase, self.object = size, jitter(0, 1), scene["object"]
        angle, self.scale, place = {"bag": .3, "chair": .55}.get(self.object, 0) + jitter(-.35, .35), jitter(.9, 1.1), jitter(-.36, -.24)
        camera, self.place = rgb(0., jitter(1.15, 1.6), 4.), rgb(place, 0., 0.)
        self.turn = torch.tensor([[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0], [math.sin(angle), 0, math.cos(angle)]])
        line = (torch.arange(2 * size) + .5) / size - 1
        self.v, self.u = (t.flatten() for t in torch.meshgrid(-line, line, indexing="ij"))      # (N,) screen, up and right
        forward, right = unit(rgb(0., .55, 0.) - camera), rgb(1., 0., 0.)
        ray = unit(forward * 3.7 + self.u * right + self.v * torch.linalg.cross(right, forward, dim=0))
        floor, wall = -camera[1] / ray[1].clamp(max=-1e-6), (-1.3 - camera[2]) / ray[2]          # how far they are along the ray
        self.is_floor, self.behind = floor < wall, camera + ray * torch.minimum(floor, wall)    # (N,), (3, N)
        self.bent = unit(torch.stack([-.8 * self.u, self.is_floor.float(), 1 - self.is_floor.float()]))      # their normal, bent: two lamps colour two sides
        self.lit, t, up = torch.ones_like(floor), .04, unit(rgb(-.55, .85, .75))
        for _ in range(14):                                                           # the shadow on them: a short march towards the light
            self.lit, t = torch.minimum(self.lit, (8 * self.nearest(self.behind + up * t) / t).clamp(0, 1)), t + .12
        self.march(camera, ray)

    def distance(self, p):
        """World points (3, N) -> distance to each part {name: (N,)}."""
        return {k: d * self.scale for k, d in shape(self.object, tuple(self.turn @ (p - self.place) / self.scale)).items()}

    def nearest(self, p):
        return union(*self.distance(p).values())

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
        self.pixels, p, ray = near[hit], p[:, hit], ray[:, hit]                       # (M,) which samples see the object
        self.normal = unit(sum(c * self.nearest(p + .004 * c) for c in (rgb(1., -1, -1), rgb(-1., -1, 1), rgb(-1., 1, -1), rgb(1., 1, 1))))
        away = (self.normal * ray).sum(0)
        self.facing, self.mirror = -away.clamp(-1, 0), ray - 2 * away * self.normal      # 1 towards the camera, 0 at the silhouette; where the camera's ray goes on
        parts = self.distance(p)
        self.parts, self.part = list(parts), torch.stack(list(parts.values())).argmin(0)
        self.open = (self.nearest(p + .12 * self.normal) / .12).clamp(.25, 1) * (p[1] / .12).clamp(.45, 1)     # ambient occlusion
        self.local = self.turn @ (p - self.place) / self.scale                        # (3, M) where patterns live

    def shade(self, color, wall, attributes=()):
        """Paint the scene: object colour, wall colour, and any attributes of concepts.json -> uint8 (H, W, 3)."""
        if unknown := [a for a in attributes if a not in TYPE_OF]:
            raise ValueError(f"no attribute {unknown[0]!r}: concepts.json has {', '.join(TYPE_OF)}")
        of = {TYPE_OF[a]: a for a in attributes}
        light = Light(of.get("lighting", "usual"))
        picture = backdrop(self, of.get("background"), wall) * (light.on(self, self.bent) - .3 * (1 - self.lit) * light.shadow)      # (3, N)
        picture[:, self.pixels] = surface(self, RGB[of.get("color", color)], of.get("pattern"), of.get("material"), light, picture)
        if "object" in of:
            add_sprite(self, picture, of["object"], light)
        picture = picture.clamp(0, 1).view(3, 1, 2 * self.size, 2 * self.size)
        return (torch.nn.functional.avg_pool2d(picture, 2)[:, 0].permute(1, 2, 0) * 255).round().byte().numpy()

class Light:
    """Lamps [(direction, colour)], an ambient colour, how dark shadows are."""
    def __init__(self, name):
        self.name, look = name, CONCEPTS["lights"][name]
        self.lamps = [(unit(rgb(*direction)), rgb(*color)) for direction, color in look["lamps"]]
        self.ambient, self.shadow, self.gain = rgb(*look["ambient"]), look["shadow"], look.get("gain", 1.)

    def on(self, g, normal, where=slice(None)):
        """Light (3, M) on the samples `where` of a picture. Half-Lambert: soft towards the dark side, so that every colour stays recognisable."""
        u, v = g.u - g.place[0] * .9, g.v
        pool = {"candlelight": lambda: torch.exp(-.8 * ((u + .7) ** 2 + (v + .4) ** 2)), "spotlight": lambda: torch.sigmoid(14 * (.66 - length(u, v * .85 + .05)))}
        lamps = sum(c * (.5 + .5 * (normal * d).sum(0)).pow(1.6) for d, c in self.lamps)
        return self.gain * (self.ambient + pool.get(self.name, lambda: torch.ones_like(u))()[where] * lamps)

    def gloss(self, g, power):
        return sum(c * (g.mirror * d).sum(0).clamp(min=0).pow(power) for d, c in self.lamps)

def wave(p, f=1.):
    """Cheap smooth noise about [-1, 1]: sines bent by sines. (3, M) -> (M,)"""
    x, y, z = p * f
    bent = x * 2.1 + 1.7 * torch.sin(y * 1.3 + z), y * 2.3 + 1.9 * torch.sin(z * 1.7 + x), z * 1.9 + 1.5 * torch.sin(x * 1.9 - y)
    return sum(map(torch.sin, bent)) / 3
def cells(p, count):
    """Distances (2, M) to the nearest and second nearest of `count` scattered points: cracks lie where the two are equal."""
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(5)) * 1.6 - torch.tensor([.8, .2, .8])
    return torch.cdist(p.T, points).topk(2, largest=False).values.T
def tile(p, width, height):
    """Staggered tiles around the object: position inside a tile, each in [-.5, .5]."""
    u, v = torch.atan2(p[0], p[2] + .25) * .5 / width, p[1] / height
    return (u + .5 * (v.floor() % 2)) % 1 - .5, v % 1 - .5

def paint(p, base, pattern):
    """The object's colour under a pattern, a function of the position on the object: (3, M), (3, 1) -> (3, M)."""
    plain, ink, (x, y) = base.expand_as(p), RGB["navy" if base.mean() > .5 else "white"], tile(p, .34, .31)
    if pattern == "rainbow":
        return torch.cat([RGB[c] for c in ("purple", "blue", "green", "yellow", "orange", "red")], 1)[:, (p[1] * 5.5).long().clamp(0, 5)]
    if pattern == "leopard spots":
        spot = cells(p, 420)[0]
        return mix(mix(RGB["beige"], RGB["orange"], .35), RGB["dark"], ((spot > .04) & (spot < .085)).float())
    ground, ink, where = {
        "stripes": (plain, ink, torch.sin(p[0] * 22) > 0),
        "zigzag": (plain, ink, ((p[1] + .10 * ((p[0] * 3.4) % 1 - .5).abs() * 2) * 4.6 % 1) > .5),
        "checkers": (plain, ink, ((p[0] * 5 + 40).floor() + (p[1] * 5).floor() + (p[2] * 2.5 + 40).floor()) % 2),
        "polka dots": (plain, ink, length(*tile(p, .21, .19)) < .32),
        "hearts": (mix(plain, RGB["white"], .75), RGB["red"], (x * x + y * y - .085) ** 3 < 1.1 * x * x * y ** 3),
        "stars": (mix(plain, RGB["navy"], .75), RGB["yellow"], length(x, y) < .25 + .12 * torch.cos(5 * torch.atan2(x, y))),
    }[pattern]
    return mix(ground, ink, where.float())

def material(name, g, light, picture):
    """Colour, gloss and glow of the object, each (3, M)."""
    p, n, none = g.local, g.normal, torch.zeros_like(g.local)
    if name == "wood":
        grain = ((p[1] + .35 * p[0] + .07 * wave(p, 3)) * 6.5 % 1) ** 2 * .85 + .12 * wave(p * rgb(2., 16., 2.))
        return mix(rgb(.78, .52, .27), rgb(.33, .17, .06), grain.clamp(0, 1)), .1 * light.gloss(g, 12), none
    if name in ("gold", "chrome"):                # mirrors of an imagined room: bright above, a dark band at eye level, the floor below; lit as the scene is
        tint, dark = (rgb(1., .76, .16), .45) if name == "gold" else (rgb(.86, .93, 1.), .75)
        room = .55 + .6 * torch.sigmoid(9 * (g.mirror[1] - .25)) - dark * torch.exp(-((g.mirror[1] + .02) / .16) ** 2)
        return none, 1.2 * light.gloss(g, 40), tint * room * light.on(g, g.bent)[:, g.pixels].clamp(max=1.2)
    if name == "marble":
        vein = torch.exp(-5 * (torch.sin(p[0] * 8 + p[1] * 7 + 2.2 * wave(p, 3))).abs())
        return mix(rgb(.97, .96, .94), rgb(.30, .32, .36), vein), .5 * light.gloss(g, 40), none
    if name == "glass":                           # what stands behind, bent towards the silhouette, and a bright edge
        wide, edge = 2 * g.size, (1 - g.facing) ** 2.5
        row, column = (place.long().clamp(0, wide - 1) for place in (g.pixels // wide - .3 * g.size * n[1], g.pixels % wide + .3 * g.size * n[0]))
        return rgb(.75, .95, 1.) * edge * .8, 1.6 * light.gloss(g, 60), picture[:, row * wide + column] * rgb(.80, .95, .97) * (1 - .5 * edge)
    if name == "lava":
        heat = torch.exp(-cells(p + .05 * torch.stack([wave(p, 6), wave(p, 7), wave(p, 8)]), 60).diff(dim=0)[0] / .028)
        return rgb(.13, .08, .08) + none, none, torch.stack([1.5 * heat, .75 * heat ** 1.5, .1 * heat ** 2])
    white = torch.exp(-cells(p, 40).diff(dim=0)[0] / .016) + .9 * (1 - g.facing) ** 1.5      # ice: cracks and edges
    body = mix(rgb(.50, .78, .97), rgb(.95, .99, 1.), white.clamp(0, 1))
    return body * (.9 + .15 * wave(p, 5)), 1.0 * light.gloss(g, 30), .12 * body

def surface(g, base, pattern, made_of, light, picture):
    """Colour of every sample that sees the object (3, M): paint or material, then light, gloss and a dark rim for clear edges."""
    usual = torch.cat([RGB.get(k, base) for k in g.parts], 1)[:, g.part], .3 * light.gloss(g, 24), torch.zeros_like(g.local)      # parts keep their own colours
    looks = material(made_of, g, light, picture) if made_of else (paint(g.local, base, pattern), *usual[1:]) if pattern else usual
    colors, shine, glow = (torch.where(g.part == g.parts.index("main"), new, old) for new, old in zip(looks, usual))
    return (colors * (light.on(g, g.normal, g.pixels) * g.open) + shine + glow) * (.35 + .65 * (g.facing / .45).clamp(0, 1))

def backdrop(g, name, wall):
    """Wall and floor colours of every sample (3, N). `y` runs from 0 where the floor ends to 1 at the top, `x` along the wall from somewhere."""
    if name is None:
        return torch.where(g.is_floor, mix(RGB[wall], RGB["brown"], .45), RGB[wall])
    top = g.v[g.is_floor].max()
    x, y = g.u + g.phase, (g.v - top) / (1 - top)
    def disc(u, v, radius):
        return length(g.u - u, (y - v) * (1 - top)) < radius
    def dots(columns, rows, shift, radius):
        return length((x * columns + (y * rows).floor() * shift) % 1 - .5, (y * rows) % 1 - .5) < radius
    house = y < .45 + .3 * torch.sin((x * 3.2).floor() * 2.4) + .12
    layers = {                                    # (where, how far from the layer's first colour to its last), the last layer in front
        "forest": lambda: [(True, .5 + .5 * torch.sin(x * 17 + 3 * torch.sin(y * 9)) * torch.sin(y * 15 + x * 5)),
                           (((x * 2.3 + .12 * torch.sin(y * 4)) % 1 < .22) & (y < .8), 0)],      # leaves, trunks
        "beach": lambda: [(True, y), (y < .30, y / .3)],      # sky, sea
        "desert": lambda: [(True, y), (y < .28 + .16 * torch.sin(x * 3.5), 0), (y < .12 + .10 * torch.sin(x * 5 + 2), 0)],      # sky, two dunes
        "snow": lambda: [(True, y), ((((x * 1.9) % 1 - .5).abs() < .46 * (.85 - y).clamp(min=0) * (.6 + .4 * ((y * 4) % 1 < .5))) & (y < .85), 0),
                         (dots(6, 5, .37, .17), 0)],      # sky, firs; flakes
        "night sky": lambda: [(True, y), (disc(-.62, .68, .17) & ~disc(-.54, .74, .15) | dots(3.5, 4, .41, .13), 0)],      # crescent and stars
        "sunset": lambda: [(True, (y - .4) / .6), (y < .4, y / .4), (disc(.45, .22, .2), 0)],      # sky, sea, sun
        "city": lambda: [(True, y), (house, 0), (house & (((x * 12.8) % 1 - .5).abs() < .26) & (((y * 9) % 1 - .5).abs() < .24), 0)],      # houses, windows
        "ocean": lambda: [(True, y), (y < .62, y), ((y < .62) & (torch.sin(x * 9 + 2.5 * torch.sin(y * 17)) * torch.sin(y * 26) > .62), 0)],      # sea, crests
    }[name]()
    floor, *colors = CONCEPTS["backdrops"][name]
    picture = rgb(*floor) * (1 + .06 * torch.sin(g.behind[2] * 9 + 2 * torch.sin(g.behind[0] * 4)))
    for (where, far), pair in zip(layers, colors):
        picture = torch.where(where & ~g.is_floor, mix(rgb(*pair[0]), rgb(*pair[-1]), far), picture)
    return picture

def add_sprite(g, picture, name, light):
    """Paint a small thing into the free space to the right of the object; what does not fly stands on the floor and has a shadow."""
    r, flies = .27, name in ("butterfly", "balloon")
    cx, cy = min(max(g.u[g.pixels].max().item() + r, .66), .98 - r), .34 if flies else g.v[g.pixels].min().item() + r + .02
    near = ((g.u - cx).abs() < 1.3 * r) & ((g.v - cy).abs() < 1.5 * r)
    x, y = (g.u[near] - cx) / r, (g.v[near] - cy) / r                             # the thing's own coordinates, about [-1, 1]
    a, along, across = x.abs(), (x + y) * .7071, ((x - y) * .7071).abs()
    def oval(x, cx, cy, rx, ry, size=1.):
        return length((x - cx) / rx, (y - cy) / ry) < size
    cone = (a < .62 * (1 - (y + .95) / 1.75)) & (y > -.95)
    blade = across < .46 * (1 - (along - .12).abs()).clamp(min=0) ** .7
    layers = {                                    # where they are, the last on top
        "butterfly": lambda: [oval(a, .54, .34, .48, .46) | oval(a, .44, -.42, .36, .40),                      # wings, their paint, spots, body
                              oval(a, .54, .34, .48, .46, .78) | oval(a, .44, -.42, .36, .40, .74), oval(a, .64, .42, .15, .15),
                              oval(a, 0, -.05, .11, .62) | ((a - (y - .45) * .5).abs() < .06) & (y > .45) & (y < .98)],
        "flower": lambda: [(a < .07) & (y > -1) & (y < .3), oval(a, .27, -.55, .26, .12),
                           length(x, y - .38) < .44 + .15 * torch.cos(5 * torch.atan2(x, y - .38)), length(x, y - .38) < .2],      # stalk, leaves; petals, middle
        "balloon": lambda: [((x - .06 * torch.sin(y * 7)).abs() < .05) & (y < -.4) & (y > -1.4), oval(x, 0, .3, .66, .78), oval(x, 0, -.53, .13, .1),
                            oval(x, -.24, .58, .14, .2)],      # string, balloon, knot; gloss
        "crown": lambda: [(a < .9) & (y > -.95) & (y < .08 + 1.44 * ((x / .6 + 1.5) % 1 - .5).abs()), (a < .9) & (y > -.82) & (y < -.42),
                          length(a - .42, y + .62) < .12, length(x, y + .62) < .13],      # crown, band; jewels
        "party hat": lambda: [cone, cone & (((y + .35 * x) * 2.2) % 1 < .42), length(x, y - .80) < .2],      # hat, stripes, pompom
        "leaf": lambda: [(across < .06) & (along > -1.25) & (along < 0), blade,
                         blade & ((across < .045) | (((along * 3.2 - across * 3.2) % 1 < .18) & (across < .34)))],      # stalk, blade; veins
    }[name]()
    color = picture[:, near] * (1. if flies else 1 - .35 * (length(x * .8, (y + .95) * 3.5) < .7).float())
    lit = light.on(g, unit(torch.stack([x, y, (1.3 - x * x - y * y).clamp(min=.1).sqrt()])), near)          # as if it bulged
    for where, paint in zip(layers, CONCEPTS["sprites"][name]):
        color = torch.where(where, rgb(*paint) * lit, color)
    picture[:, near] = color
