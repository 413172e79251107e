"""The graph's rows: an epoch of GraphSAGE against PyG, similar users against scipy."""
import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from clock import gb, in_turn, ms, peak, relative, seconds, table

import graph


def epoch(args):
    """One epoch of pretraining (forward, backward, Adam): our SAGEConv, and the same model with PyG's in its place."""
    from torch_geometric.nn import SAGEConv
    g, A, width = torch.Generator().manual_seed(0), 1000, 64
    cells = torch.randperm(args.users * A, generator=g)[:args.edges]
    edges = torch.stack([cells // A, cells % A, torch.randint(2, cells.shape, generator=g) * 2 - 1]).to(args.device)
    names = [list(map(str, range(n))) for n in (args.users, A)]
    ours = graph.EdgeModel(graph.PreferenceGraph(*names, edges, torch.randn(A, width, generator=g).to(args.device)), width, width).to(args.device)

    class PyG(torch.nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = SAGEConv((conv.lin_l.in_features,) * 2, conv.lin_l.out_features).to(args.device)
            self.conv.load_state_dict(conv.state_dict())

        def forward(self, x_src, x_dst, edge_index):
            return self.conv((x_src, x_dst), edge_index)
    theirs = copy.deepcopy(ours)
    for relations in (*theirs.sage.to_user, *theirs.sage.to_attribute):
        relations.convs = torch.nn.ModuleDict({name: PyG(conv) for name, conv in relations.convs.items()})

    def run(model):
        model.step = getattr(model, "step", None) or torch.optim.Adam(model.parameters(), 1e-3)
        model.step.zero_grad()
        loss = model.loss(0)
        loss.backward()
        model.step.step()
        return loss.item()
    sides = {"ours": lambda: run(ours), "PyG": lambda: run(theirs)}
    loss = {name: f() for name, f in sides.items()}
    grads = relative(ours.vectors.grad, theirs.vectors.grad)
    t, most = in_turn(sides, args), {name: peak(f, args.device) for name, f in sides.items()}
    rows = [[name, ms(t[name]), f"**{t['PyG'] / t[name]:.2f}**", gb(most[name][1] - most[name][0]), f"{loss[name]:.6f}"] for name in sides]
    return (f"{args.users:,} users, {A:,} attributes, {args.edges:,} edges of two signs, width {width}; the gradients of the user vectors differ by {grads:.0e}\n\n"
            + table(["", "an epoch", "times the peer's speed", "memory on top", "loss"], rows))


# ---- similar users -----------------------------------------------------------------------------------------------------------
def scipy_similar(x, k, block=256):
    """The k most similar others of each row of a sparse matrix, by scipy's product in blocks of rows -> (index, common), each (U, k)."""
    index, common, across = [], [], x.T.tocsr()
    for start in range(0, x.shape[0], block):
        counts = (x[start:start + block] @ across).toarray()                                   # (block, U)
        counts[np.arange(len(counts)), start + np.arange(len(counts))] = -1
        best = np.argpartition(counts, -k, axis=1)[:, -k:]
        index.append(best), common.append(np.take_along_axis(counts, best, 1))
    return np.concatenate(index), np.concatenate(common)


def similar(args):
    """Similar users (Eq. 6, k = 3) against their number, until a side needs more than --limit seconds."""
    from scipy.sparse import csr_array
    rows, points, A = [], {"ours": [], "scipy": []}, args.attributes
    for U in (n for n in (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000) if n <= args.most):
        g = torch.Generator().manual_seed(0)
        sign = (torch.randint(-1, 2, (U, A), generator=g) * (torch.rand(U, A, generator=g) < min(0.5, 20 / A))).to(torch.int8)       # some 15 named by each
        sparse, on_device = csr_array(sign.abs().numpy().astype(np.float32)), sign.to(args.device)
        shared = sparse.sum(0).astype(np.float64) @ sparse.sum(0)                              # pairs of users and an attribute both name
        sides = {"ours": lambda: graph.similar_users(on_device, 3, "shared"), "scipy": lambda: scipy_similar(sparse, 3)}
        sides = {n: f for n, f in sides.items() if not points[n] or points[n][-1][1] * (U / points[n][-1][2]) ** 2 < args.limit}
        if not sides:
            break
        got, most = {}, {}
        for name, f in sides.items():
            before, top = peak(lambda: got.update({name: f()}), args.device if name == "ours" else "cpu")
            most[name] = top - before
        if len(got) == 2:
            common = np.sort(got["scipy"][1], 1)[:, ::-1]
            agree = np.allclose(got["ours"][1].cpu().numpy() * max(1, common.max()), common, atol=1e-3)
        t = in_turn(sides, args, warm=0) if U <= 10_000 else {name: seconds(f, args.device) for name, f in sides.items()}
        for name in sides:
            points[name].append((shared, t[name], U))
        cell = lambda name, values, show: show(values[name]) if name in values else "-"
        rows.append([f"{U:,}", f"{shared:.1e}", cell("ours", t, ms), cell("scipy", t, ms), f"**{t['scipy'] / t['ours']:.1f}**" if len(t) == 2 else "-",
                     cell("ours", most, gb), cell("scipy", most, gb), ("yes" if agree else "**no**") if len(got) == 2 else "-"])
    plot(points, args.plot)
    slope = {n: np.polyfit(np.log([p[0] for p in ps[-3:]]), np.log([p[1] for p in ps[-3:]]), 1)[0] for n, ps in points.items() if len(ps) > 1}
    return (f"{A} attributes; time grows as shared likes to the power {', '.join(f'{s:.2f} ({n})' for n, s in slope.items())} (last three sizes); plot: {args.plot}\n\n"
            + table(["users", "shared likes", "ours", "scipy", "ratio", "memory on top, ours", "scipy", "same scores"], rows))


def plot(points, file, W=720, H=440, edge=70):
    """Time against shared likes, both axes logarithmic, as a PNG."""
    image, font = Image.new("RGB", (W, H), "white"), ImageFont.load_default(14)
    pen, every = ImageDraw.Draw(image), np.log10([p[:2] for ps in points.values() for p in ps])
    low, high = np.floor(every.min(0)), np.ceil(every.max(0))
    at = lambda x, y: (edge + (x - low[0]) / (high[0] - low[0]) * (W - 2 * edge), H - edge - (y - low[1]) / (high[1] - low[1]) * (H - 2 * edge))
    for axis in (0, 1):
        for tick in range(int(low[axis]), int(high[axis]) + 1):
            a, b = (at(tick, low[1]), at(tick, high[1])) if axis == 0 else (at(low[0], tick), at(high[0], tick))
            pen.line([a, b], "#dddddd")
            pen.text((a[0], a[1] + 8) if axis == 0 else (a[0] - 8, a[1]), f"1e{tick}", "black", font, anchor="mt" if axis == 0 else "rm")
    for n, ((name, ps), color) in enumerate(zip(points.items(), ("#c03020", "#2060a0"))):
        spots = [at(*np.log10(p[:2])) for p in ps]
        pen.line(spots, color, 2)
        for x, y in spots:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], color)
        pen.text((edge + 12, edge + 4 + 20 * n), name, color, font)
    pen.text((W / 2, H - 24), "shared likes", "black", font, anchor="mm")
    pen.text((edge, edge - 24), "seconds", "black", font, anchor="mm")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
