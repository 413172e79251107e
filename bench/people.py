"""The graph's rows: an epoch of GraphSAGE against PyG, similar users against scipy."""
import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from clock import gb, in_turn, ms, peak, relative, seconds, table

import graph

def pyg_twin(ours, args):
    """The same model with PyG's encoder: a HeteroConv of SAGEConvs for each layer."""
    from torch_geometric.nn import HeteroConv, SAGEConv

    class Encoder(nn.Module):
        def __init__(self, sage):
            super().__init__()
            self.layers = nn.ModuleList(HeteroConv({key: self.conv(relations.convs[key[1]]) for relations, ends in ((to_user, ("a", "u")), (to_attribute, ("u", "a")))
                                                    for key in ((ends[0], name, ends[1]) for name in relations.convs)}) for to_user, to_attribute in zip(sage.to_user, sage.to_attribute))

        def conv(self, conv):
            theirs = SAGEConv((conv.lin_l.in_features,) * 2, conv.lin_l.out_features).to(args.device)
            theirs.load_state_dict(conv.state_dict())
            return theirs

        def forward(self, x_user, x_attr, edges):
            x, like = {"u": x_user, "a": x_attr}, edges[2] > 0
            there = {("u", "like", "a"): edges[:2, like], ("u", "dislike", "a"): edges[:2, ~like]}
            edge_index = {**there, **{("a", name, "u"): e.flip(0) for (_, name, _), e in there.items()}}
            for i, layer in enumerate(self.layers):
                x = layer({name: h.relu() for name, h in x.items()} if i else x, edge_index)
            return x["u"], x["a"], []

    theirs = copy.deepcopy(ours)
    theirs.sage = Encoder(ours.sage)
    return theirs

def epoch(args):
    """GraphSAGE: one epoch of pretraining (forward, backward, Adam), against the same model of PyG's layers."""
    g, A, width = torch.Generator().manual_seed(0), 1000, 64
    cells = torch.randperm(args.users * A, generator=g)[:args.edges]
    edges = torch.stack([cells // A, cells % A, torch.randint(2, cells.shape, generator=g) * 2 - 1]).to(args.device)
    names = [list(map(str, range(n))) for n in (args.users, A)]
    ours = graph.EdgeModel(graph.PreferenceGraph(*names, edges, torch.randn(A, width, generator=g).to(args.device)), width, width).to(args.device)
    models = {"ours": ours, "PyG": pyg_twin(ours, args)}
    optimizers = {name: torch.optim.Adam(model.parameters(), 1e-3) for name, model in models.items()}

    def run(name):
        optimizers[name].zero_grad()
        loss = models[name].loss(0)
        loss.backward()
        optimizers[name].step()
        return loss.item()
    sides = {name: partial(run, name) for name in models}
    loss = {name: f() for name, f in sides.items()}
    grads = max(relative(ours.vectors.grad, model.vectors.grad) for model in models.values())
    t, most = in_turn(sides, args), {name: peak(f, args.device) for name, f in sides.items()}
    rows = [[name, ms(t[name]), "" if name == "ours" else f"**{t[name] / t['ours']:.2f}**", gb(most[name][1] - most[name][0]), f"{loss[name]:.6f}"] for name in sides]
    return (f"{args.users:,} users, {A:,} attributes, {args.edges:,} edges of two signs, width {width}; the gradients of the user vectors differ by {grads:.0e}\n\n"
            + table(["", "an epoch", "ours is faster by", "memory on top", "loss"], rows))

# ---- similar users -----------------------------------------------------------------------------------------------------------
def scipy_similar(x, k, meetings):
    """The k most similar others of each row of a sparse matrix, by scipy's product, some 20 million `meetings` at a time -> (index, common), each (U, k)."""
    index, common, across = np.zeros((x.shape[0], k), np.int64), np.zeros((x.shape[0], k)), x.T.tocsr()
    block = max(16, int(2e7 * x.shape[0] / meetings))
    for start in range(0, x.shape[0], block):
        product = x[start:start + block] @ across
        for u, (a, b) in enumerate(zip(product.indptr, product.indptr[1:]), start):
            counts = product.data[a:b] * (product.indices[a:b] != u)
            best = np.argpartition(-counts, min(k, b - a) - 1)[:k] if b > a else np.arange(0)
            index[u, :len(best)], common[u, :len(best)] = product.indices[a:b][best], counts[best]
    return index, common

def draw_likes(U, A):
    """Every user names about 15 of A attributes -> (U,A) sparse int8, the same for scipy, and how many meetings (u, attribute, v) there are."""
    from scipy.sparse import csr_array
    rng = np.random.default_rng(0)
    cells = np.unique(np.repeat(np.arange(U), 15) * A + rng.integers(A, size=15 * U))
    sign = torch.from_numpy(rng.integers(2, size=len(cells)) * 2 - 1).to(torch.int8)
    ours = torch.sparse_coo_tensor(torch.from_numpy(np.stack([cells // A, cells % A])), sign, (U, A), is_coalesced=True, check_invariants=False)
    theirs = csr_array((np.ones(len(cells), np.float32), (cells // A, cells % A)), shape=(U, A))
    return ours, theirs, float((np.bincount(cells % A).astype(float) ** 2).sum())

def one_size(U, A, last, args):
    """{side: (users, meetings, seconds, bytes on top)} of the sides that are expected to take at most --limit seconds, and whether their scores are the same."""
    likes, theirs, meetings = draw_likes(U, A)
    likes, got, found = likes.to(args.device), {}, {}
    sides = {"ours": lambda: got.update(ours=graph.similar_users(likes, 3)[1].cpu().numpy()),
             "scipy": lambda: got.update(scipy=-np.sort(-scipy_similar(theirs, 3, meetings)[1]))}
    for name, f in sides.items():
        if name in last and last[name][2] * meetings / last[name][1] > args.limit:
            continue
        took = []
        before, top = peak(lambda: took.append(seconds(f, args.device)), args.device if name == "ours" else "cpu")
        found[name] = U, meetings, took[0], top - before
    if U <= 10_000:                                                                            # short enough to take turns
        found = {name: (*found[name][:2], t, found[name][3]) for name, t in in_turn({name: sides[name] for name in found}, args, warm=0).items()}
    return found, np.allclose(got["ours"], got["scipy"] / max(1, got["scipy"].max())) if len(got) == 2 else None

def similar(args):
    """Similar users (Eq. 6, k = 3) against their number, by scipy's sparse product on the other side; a side stops at --limit seconds."""
    text, curves = "", {}
    for label, attributes, most in ((f"{args.attributes} attributes", lambda U: args.attributes, min(args.most, 100_000)), ("users / 3 attributes", lambda U: U // 3, args.most)):
        rows, last, points = [], {}, {"ours": [], "scipy": []}
        for U in (n for n in (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000) if n <= most):
            found, same = one_size(U, attributes(U), last, args)
            if not found:
                break
            last.update(found)
            for name, point in found.items():
                points[name].append(point)
            cells = {name: (ms(found[name][2]), gb(found[name][3])) if name in found else ("-", "-") for name in points}
            ratio = f"**{found['scipy'][2] / found['ours'][2]:.2f}**" if len(found) == 2 else "-"
            meetings = next(iter(found.values()))[1]
            rows.append([f"{U:,}", f"{meetings:.1e}", *(c[0] for c in cells.values()), ratio, *(c[1] for c in cells.values()), {True: "yes", False: "**no**", None: "-"}[same]])
        slope = {name: np.polyfit(*np.log([[p[1] for p in ps[-3:]], [p[2] for p in ps[-3:]]]), 1)[0] for name, ps in points.items() if len(ps) > 1}
        text += (f"\n\n{label}, each user names 15; time grows as shared likes to the power {', '.join(f'{s:.2f} ({name})' for name, s in slope.items())} (last three sizes)\n\n"
                 + table(["users", "shared likes", "ours", "scipy", "ours is faster by", "memory on top, ours", "scipy", "same scores"], rows))
        curves.update({f"{name}, {label}": [p[1:3] for p in ps] for name, ps in points.items() if ps})
    plot(curves, args.plot)
    return f"k = 3; plot: {args.plot}" + text

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
    for n, ((name, ps), color) in enumerate(zip(points.items(), ("#c03020", "#2060a0", "#e0a020", "#60b0c0"))):
        spots = [at(*np.log10(p[:2])) for p in ps]
        pen.line(spots, color, 2)
        for x, y in spots:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], color)
        pen.text((edge + 12, edge + 4 + 20 * n), name, color, font)
    pen.text((W / 2, H - 24), "shared likes", "black", font, anchor="mm")
    pen.text((edge, edge - 24), "seconds", "black", font, anchor="mm")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
