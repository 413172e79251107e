"""The graph's rows: an epoch of GraphSAGE against PyG, similar users against scipy. A row is a
function of run.py's flags that returns Markdown.

Shapes: U users, A attributes, E edges, k neighbours.
"""
import copy
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from clock import gb, in_turn, ms, peak, ratio, relative, seconds, summarise, table

import graph

NAMED = 15                              # attributes that a user of `similar` names, about


# ---- an epoch of GraphSAGE ---------------------------------------------------------------------

class PyGEncoder(nn.Module):
    """The weights of our GraphSAGE in PyG's layers: in each a HeteroConv of SAGEConvs."""

    def __init__(self, sage):
        from torch_geometric.nn import HeteroConv
        super().__init__()
        self.layers = nn.ModuleList()
        for to_user, to_attribute in zip(sage.to_user, sage.to_attribute):
            convs = {}
            for sign in to_user.convs:                      # like, dislike
                convs["attribute", sign, "user"] = pyg_conv(to_user.convs[sign])
                convs["user", sign, "attribute"] = pyg_conv(to_attribute.convs[sign])
            self.layers.append(HeteroConv(convs))

    def forward(self, x_user, x_attr, edges):
        """As GraphSAGE.forward: x_user (U, F), x_attr (A, F), edges (3, E)."""
        edge_index = {}
        for sign, value in (("like", 1), ("dislike", -1)):
            there = edges[:2, edges[2] == value].to(x_user.device)
            edge_index["user", sign, "attribute"] = there
            edge_index["attribute", sign, "user"] = there.flip(0)
        x = self.layers[0]({"user": x_user, "attribute": x_attr}, edge_index)
        x = {kind: h.relu() for kind, h in x.items()}
        x = self.layers[1](x, edge_index)
        return x["user"], x["attribute"], []


def pyg_conv(ours):
    from torch_geometric.nn import SAGEConv
    width = ours.lin_l.in_features
    theirs = SAGEConv((width, width), ours.lin_l.out_features)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(ours.lin_l.weight.device)


def random_model(args, attributes=1000, width=64):
    """Our EdgeModel over a graph of args.edges random edges, no two between the same pair."""
    g = torch.Generator().manual_seed(0)
    cells = torch.randperm(args.users * attributes, generator=g)
    cells = cells[:args.edges]
    sign = torch.randint(2, cells.shape, generator=g) * 2 - 1
    edges = torch.stack([cells // attributes, cells % attributes, sign])        # (3, E)
    features = torch.randn(attributes, width, generator=g)
    users = [str(i) for i in range(args.users)]
    names = [str(i) for i in range(attributes)]
    preferences = graph.PreferenceGraph(users, names, edges, features).to(args.device)
    return graph.EdgeModel(preferences, width, width).to(args.device)


def training(model):
    """A call that trains the model for one epoch -> loss."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run():
        rows = model.draw([0], torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss, _ = model.loss(rows)
        loss.backward()
        optimizer.step()
        return loss.item()
    return run


def epoch(args):
    """GraphSAGE: an epoch of pretraining (forward, backward, Adam), against PyG's layers."""
    ours = random_model(args)
    theirs = copy.deepcopy(ours)
    theirs.sage = PyGEncoder(ours.sage)
    calls = {"ours": training(ours), "PyG": training(theirs)}
    loss = {name: call() for name, call in calls.items()}
    differ = relative(theirs.vectors.grad, ours.vectors.grad)
    t = in_turn(calls, args)
    rows = []
    for name, call in calls.items():
        before, most = peak(call, args.device)
        speed = "" if name == "ours" else ratio(t[name], t["ours"])
        memory = gb(most - before)
        rows.append([name, ms(t[name]), speed, memory, f"{loss[name]:.6f}"])
    columns = ["", "an epoch", "ours is faster by", "memory on top", "loss"]
    size = f"{args.users:,} users, {len(ours.graph.attributes):,} attributes, {args.edges:,} edges"
    agree = f"the gradients of the user vectors differ by {differ:.0e}"
    summarise(args, f"an epoch, {size}", "PyG", t["ours"], t["PyG"])
    return f"{size} of two signs; {agree}\n\n" + table(columns, rows)


# ---- similar users -----------------------------------------------------------------------------

def scipy_similar(x, k, meetings):
    """What a user of scipy would write: a sparse product, some 20 million meetings at a time.
    x (U, A) sparse -> how much each user has in common with the k most similar others (U, k)."""
    total = x.shape[0]
    across = x.T.tocsr()
    common = np.zeros((total, k))
    rows = max(16, int(2e7 * total / meetings))
    for start in range(0, total, rows):
        product = x[start:start + rows] @ across            # (rows, U)
        for i in range(product.shape[0]):
            here = slice(product.indptr[i], product.indptr[i + 1])
            counts = product.data[here] * (product.indices[here] != start + i)
            n = min(k, len(counts))
            if n:
                best = np.argpartition(-counts, n - 1)[:n]
                common[start + i, :n] = counts[best]
    return common


def draw_likes(users, attributes):
    """Who names what, (U, A) sparse of ones, and how many meetings of two users at an attribute
    there are: what a sparse product has to add up."""
    from scipy.sparse import csr_array
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(users), NAMED)
    what = rng.integers(attributes, size=NAMED * users)
    cells = np.stack([who, what])
    cells = np.unique(cells, axis=1)                        # said twice is said once
    ones = np.ones(cells.shape[1], np.float32)
    likes = csr_array((ones, tuple(cells)), shape=(users, attributes))
    popularity = likes.sum(0)                               # (A,)
    return likes, float(np.square(popularity).sum())


Point = namedtuple("Point", "meetings seconds memory")


def too_long(past, meetings, limit):
    """Whether a side is expected to need more seconds than `limit`, from its last Point."""
    if not past:
        return False
    last = past[-1]
    return last.seconds * meetings / last.meetings > limit


def one_size(users, points, args):
    """{side: Point} of the sides that are expected to take at most --limit seconds, and whether
    their scores are the same: "-" where there is only one."""
    likes, meetings = draw_likes(users, args.attributes)
    dense = torch.from_numpy(likes.toarray()).to(args.device)
    scores = {}

    def ours():
        _, score = graph.similar_users(dense, 3)
        scores["ours"] = score.cpu().numpy()

    def scipy():
        common = scipy_similar(likes, 3, meetings)
        common = np.sort(common)[:, ::-1]                                   # best first
        scores["scipy"] = common / max(1, common.max())

    calls = {"ours": ours, "scipy": scipy}
    devices = {"ours": args.device, "scipy": "cpu"}
    for name, past in points.items():
        if too_long(past, meetings, args.limit):
            del calls[name]
    found = {}
    for name, call in calls.items():
        took = []
        device = devices[name]
        before, most = peak(lambda: took.append(seconds(call, device)), device)
        found[name] = Point(meetings, took[0], most - before)
    if users <= 10_000:                                     # short enough to take turns
        for name, t in in_turn(calls, args, warm=0).items():
            found[name] = found[name]._replace(seconds=t)
    same = "-"
    if len(scores) == 2:
        same = "yes" if np.allclose(scores["ours"], scores["scipy"]) else "**no**"
    return found, same


def row_of(users, found, same):
    """A line of the table; "-" where a side has stopped."""
    took = {"ours": "-", "scipy": "-"}
    memory = {"ours": "-", "scipy": "-"}
    for name, point in found.items():
        took[name] = ms(point.seconds)
        memory[name] = gb(point.memory)
        meetings = f"{point.meetings:.1e}"
    faster = "-"
    if len(found) == 2:
        faster = ratio(found["scipy"].seconds, found["ours"].seconds)
    row = [f"{users:,}", meetings, *took.values(), faster]
    return [*row, *memory.values(), same]


def slope(points):
    """The power of the meetings with which time grows, over the last three sizes."""
    last = points[-3:]
    x = np.log([p.meetings for p in last])
    y = np.log([p.seconds for p in last])
    return np.polyfit(x, y, 1)[0]


def similar(args):
    """Similar users (Eq. 6, k 3) against their number, beside scipy's sparse product.

    Each user names about 15 attributes. A side stops at the size for which it is expected to take
    longer than --limit."""
    points = {"ours": [], "scipy": []}
    rows = []
    for users in (1000, 3000, 10_000, 30_000, 100_000):
        if users > args.most:
            break
        found, same = one_size(users, points, args)
        if not found:
            break
        rows.append(row_of(users, found, same))
        for name, point in found.items():
            points[name].append(point)
    plot(points, args.plot)
    if len(points["scipy"]) == len(points["ours"]):
        last = {name: past[-1].seconds for name, past in points.items()}
        summarise(args, f"{rows[-1][0]} users", "scipy", last["ours"], last["scipy"])
    slopes = []
    for name, past in points.items():
        if len(past) > 1:
            slopes.append(f"{slope(past):.2f} ({name})")
    columns = ["users", "shared likes", "ours", "scipy", "ours is faster by",
               "memory on top, ours", "scipy", "same scores"]
    size = f"k = 3, {args.attributes} attributes, each user names {NAMED}"
    grows = f"time grows as shared likes to the power {', '.join(slopes)} (last three sizes)"
    return f"{size}; {grows}; plot: {args.plot}\n\n" + table(columns, rows)


class Axis:
    """A logarithmic axis from pixel `first` to pixel `last`, in whole powers of ten."""

    def __init__(self, values, first, last):
        logs = np.log10(values)
        low = int(np.floor(logs.min()))
        high = int(np.ceil(logs.max()))
        self.powers = range(low, high + 1)
        self.first = first
        self.step = (last - first) / max(1, high - low)

    def place(self, value):
        """Where a value stands, in pixels."""
        power = np.log10(value) - self.powers[0]
        return self.first + self.step * power


def plot(points, file, width=720, height=440, edge=70):
    """Seconds against shared likes, both axes logarithmic, as a PNG."""
    everything = points["ours"] + points["scipy"]
    left = top = edge
    right = width - edge
    bottom = height - edge
    x = Axis([p.meetings for p in everything], left, right)
    y = Axis([p.seconds for p in everything], bottom, top)
    image = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(14)
    pen = ImageDraw.Draw(image)

    def write(place, text, anchor, color="black"):
        pen.text(place, text, color, font, anchor=anchor)

    for power in x.powers:
        at = x.place(10.0 ** power)
        pen.line([(at, top), (at, bottom)], "#dddddd")
        write((at, bottom + 8), f"1e{power}", "mt")
    for power in y.powers:
        at = y.place(10.0 ** power)
        pen.line([(left, at), (right, at)], "#dddddd")
        write((left - 8, at), f"1e{power}", "rm")
    write((width / 2, height - 24), "shared likes", "mm")
    write((left, top - 24), "seconds", "mm")
    line = top + 4
    for name, color in (("ours", "#c03020"), ("scipy", "#2060a0")):
        spots = []
        for point in points[name]:
            spot = x.place(point.meetings), y.place(point.seconds)
            pen.circle(spot, 4, color)
            spots.append(spot)
        pen.line(spots, color, 2)
        write((left + 12, line), name, "la", color)
        line += 20
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
