"""The preference graph: users, attributes, who resembles whom, and GraphSAGE over likes and dislikes.  (C-DPO, 4.1.1 and App. B)

    G = (U, A, E)    E in U x A, each edge a like (+1) or a dislike (-1)                                       (5)
    s(u,v) = |A(u) ^ A(v)| / max over all pairs u' != v' of |A(u') ^ A(v')|    "^" is intersection             (6)

A SAGE layer:  out_i = W_l mean over the neighbours j of x_j + b + W_r x_i; its weights carry PyG's names and give PyG's numbers.
The paper describes one set of edges, so its encoder cannot tell a like from a dislike (`signed=False`). The default (ours): likes and dislikes have weights of their own.
An attribute starts as the frozen embedding of its name, a known user as a learned vector, a new user as the zero vector. Try it: python graph.py
"""
import json, warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class User:
    name: str
    likes: list
    dislikes: list
    hidden: list = ()          # what the persona would like but never said; only evaluation reads it

def read_jsonl(path, optional=None, **fields):
    """Rows of a JSON-lines file: dicts, their line number under "line". Each must have `fields`, given as name=type (list: a list of strings), and may have
    `optional`, given as {name: default}, of the default's type. Blank lines are skipped; what else does not fit is a ValueError with file and line number."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    optional, rows = optional or {}, []
    fields |= {name: type(default) for name, default in optional.items()}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = {**optional, **json.loads(line), "line": number}
            json.dumps(row, ensure_ascii=False).encode()                                                # half of a surrogate pair is no text
        except (ValueError, TypeError, RecursionError) as e:
            raise ValueError(f"{path}:{number}: not a line of JSON with a JSON object ({e})") from None
        for name, kind in fields.items():
            value = row.get(name)
            if not isinstance(value, kind) or (kind is list and not all(isinstance(v, str) for v in value)):
                raise ValueError(f"{path}:{number}: \"{name}\" must be {'a list of strings' if kind is list else 'a string'}, got {json.dumps(value)[:60]}")
        rows.append(row)
    return rows

def read_users(path):
    """users.jsonl -> list[User], in file order. Names must be unique; nothing may be liked and disliked at once."""
    users = {}
    for row in read_jsonl(path, {"hidden": []}, user=str, likes=list, dislikes=list):
        name, likes, dislikes = row["user"], list(dict.fromkeys(row["likes"])), list(dict.fromkeys(row["dislikes"]))
        both = sorted(set(likes) & set(dislikes))
        if both or name in users:
            raise ValueError(f"{path}:{row['line']}: user {name!r} {f'likes and dislikes {both[0]!r}' if both else 'appears twice'}")
        users[name] = User(name, likes, dislikes, row["hidden"])
    return list(users.values())

class PreferenceGraph(nn.Module):
    """users and attributes are names; edges (3,E) int64 has the rows user, attribute, sign (+1 like, -1 dislike); features (A,F)."""
    def __init__(self, users, attributes, edges, features):
        super().__init__()
        self.users, self.attributes = users, attributes
        self.register_buffer("edges", edges)
        self.register_buffer("features", features)

    @classmethod
    def build(cls, users, attributes, features):
        return cls([u.name for u in users], list(attributes), edges_of(users, attributes), features)

    def signs(self):
        """(U,A) sparse: +1 liked, -1 disliked, 0 nothing said. An edge to nowhere is a RuntimeError."""
        return torch.sparse_coo_tensor(self.edges[:2], self.edges[2].float(), (len(self.users), len(self.attributes)), check_invariants=True)

def attribute_names(users):
    """Every attribute somebody likes or dislikes, sorted."""
    return sorted({a for u in users for a in [*u.likes, *u.dislikes]})

def edges_of(users, attributes):
    """(3,E) int64: user, attribute, sign. An attribute the graph does not know is a ValueError."""
    index = {a: i for i, a in enumerate(attributes)}
    if unknown := [a for a in attribute_names(users) if a not in index]:
        raise ValueError(f"unknown attribute {unknown[0]!r}; the graph knows {', '.join(list(attributes)[:60])}")
    edges = [(i, index[a], sign) for i, u in enumerate(users) for names, sign in ((u.likes, 1), (u.dislikes, -1)) for a in names]
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 3).T.contiguous()

def similar_users(likes_and_dislikes, k, kind="shared", chunk=2 ** 21):
    """The k most similar other users: (index (U,k) int64, score (U,k) in [0,1]), best first; exact.

    likes_and_dislikes (U,A), dense or sparse: +1, -1, 0. kind "shared" counts what two users both spoke about, the letter of Eq. 6; "signed"
    takes away what one likes and the other dislikes; "likes" counts what both like (both ours). A tie goes to the next user, from u on and around:
    nobody is everybody's neighbour for standing first in the file. Where fewer than k others have anything in common with u, the rest of the row
    is u itself with score 0. Some `chunk` pairs of users are held at a time, never U x U."""
    x, total = likes_and_dislikes.to_sparse().float().coalesce(), len(likes_and_dislikes)
    x = {"shared": x.abs(), "signed": x, "likes": x.relu()}[kind]                                       # (U, A)
    own = torch.arange(total, device=x.device)[:, None].expand(total, k)
    if own.numel() == 0:
        return own, own * 0.0
    shared = x.indices()[1].bincount().double().square().sum()                                          # (u, attribute, v) that meet
    few = 1000 * shared < total * x.numel()                                                             # one costs about 1,000 multiplications
    key = keys_sparse(x, k, int(chunk * total / (shared + 1)) + 1) if few else keys_dense(x, k, chunk // total + 1)                # (U, k)
    common = -(-key // total)                                                                           # key = common * U - how far v is ahead of u
    return torch.where(common > 0, (own + common * total - key) % total, own), common / common.max().clamp_min(1)     # (6)

def keys_dense(x, k, rows):
    """(U,A) -> the k largest keys, common * U - (v - u) mod U, of every user u (U,k) int64, 0 where there are fewer: `rows` users at a time, multiplied with all."""
    total, x = len(x), x.to_dense().to(torch.float32 if x.numel() < 2 ** 24 else torch.float64)         # exact for the keys
    ahead = F.pad(torch.arange(1, total).to(x), (1, 0), value=torch.inf)                                # of user 0 to each v; inf: nobody is a neighbour of himself
    ahead = ahead.flip(0).repeat(2)[:-1].unfold(0, total, 1)                                            # a view (U, U): (v - u) mod U, v from the last to the first
    across, buffer, best = x.flip(0).T, x.new_empty(rows, total), x.new_zeros(total, k, dtype=torch.int64)
    for mine, far, found in zip(x.split(rows), ahead.split(rows), best.split(rows)):
        key = torch.addmm(far, mine, across, beta=-1, alpha=total, out=buffer[:len(mine)])              # (rows, U)
        found[:, :total] = key.topk(min(k, total)).values.clamp_min(0)
    return best

def keys_sparse(x, k, rows):
    """The same with sparse products, which hold only pairs that have something in common."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")                           # torch's own detour
    total, across, best = len(x), x.T.coalesce(), torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    for mine, found in zip(torch.arange(total, device=x.device).split(rows), best.split(rows)):
        common = x.index_select(0, mine) @ across                                                       # (rows, U)
        row, other = common.indices()
        key = (common.values().long() * total - (other - mine[row]) % total) * (other != mine[row])
        for place in range(k):                                                                          # the largest of every row, then without it
            found[:, place] = torch.zeros_like(mine).scatter_reduce(0, row, key, "amax")
            key = key.where(key < found[row, place], 0)
    return best

# ------------------------------------------------------------------------------------------------ GraphSAGE
class SAGEConv(nn.Module):
    """PyG's SAGEConv with mean aggregation; lin_r has no bias."""
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.lin_l = nn.Linear(in_dim, out_dim)
        self.lin_r = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, x_src, x_dst, edge_index):
        """x_src (S,F), x_dst (N,F), edge_index (2,E) = (source, destination) -> (N,out). No neighbour: a zero mean."""
        order = edge_index[1].argsort(stable=True)
        first = torch.searchsorted(edge_index[1][order].contiguous(), torch.arange(len(x_dst), device=x_dst.device))      # where each one's edges begin
        mean = F.embedding_bag(edge_index[0][order], x_src, first, mode="mean")                         # (N, F), no (E, F) tensor
        return self.lin_l(mean) + self.lin_r(x_dst)

class Relations(nn.Module):
    """One layer in one direction: the sum over the relations of a SAGEConv each, as in PyG's to_hetero."""
    def __init__(self, in_dim, out_dim, signed):
        super().__init__()
        self.convs = nn.ModuleDict({name: SAGEConv(in_dim, out_dim) for name in (("like", "dislike") if signed else ("any",))})

    def forward(self, x_src, x_dst, edges):
        """edges (3,E) = (source, destination, sign)."""
        which = {"any": slice(None), "like": edges[2] > 0, "dislike": edges[2] < 0}
        return sum(conv(x_src, x_dst, edges[:2, which[name]]) for name, conv in self.convs.items())

class GraphSAGE(nn.Module):
    """Two layers over the bipartite graph, ReLU after the first."""
    def __init__(self, in_dim, hidden_dim, out_dim, signed=True):
        super().__init__()
        self.to_user = nn.ModuleList([Relations(in_dim, hidden_dim, signed), Relations(hidden_dim, out_dim, signed)])
        self.to_attribute = nn.ModuleList([Relations(in_dim, hidden_dim, signed), Relations(hidden_dim, out_dim, signed)])

    def forward(self, x_user, x_attr, edges):
        """x_user (U,F), x_attr (A,F), edges (3,E) -> users (U,out), attributes (A,out), and the attributes' input to each layer."""
        back = edges[[1, 0, 2]]                                                                         # attribute -> user
        h_user, h_attr = F.relu(self.to_user[0](x_attr, x_user, back)), F.relu(self.to_attribute[0](x_user, x_attr, edges))        # (U, hidden), (A, hidden)
        return self.to_user[1](h_attr, h_user, back), self.to_attribute[1](h_user, h_attr, edges), [x_attr, h_attr]

class EdgeDecoder(nn.Sequential):
    """Does u like a? Two linear layers on the pair of embeddings; dropped after pretraining."""
    def __init__(self, dim, hidden_dim):
        super().__init__(nn.Linear(2 * dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1))

    def forward(self, users, attributes):
        return super().forward(torch.cat([users, attributes], -1)).squeeze(-1)                          # (E,)

def embed_new_user(sage, states, users, attributes):
    """Embeddings (N,out) of users the graph has never seen, from likes and dislikes alone, without retraining.

    users list[User]; attributes and states: the graph's attribute names and the third value of `sage(...)` on the stored graph.
    Each starts as the zero vector (paper) and only listens: attributes do not hear it, so nobody's embedding depends on who else asks (ours)."""
    back = edges_of(users, attributes)[[1, 0, 2]].to(states[0].device)
    h = F.relu(sage.to_user[0](states[0], states[0].new_zeros(len(users), states[0].shape[1]), back))   # (N, hidden)
    return sage.to_user[1](states[1], h, back)

class EdgeModel(nn.Module):
    """What pretraining trains: user vectors, encoder, decoder. Like or dislike is a binary classification of edges (App. B).
    Ours: user vectors start at N(0, .01) and each row is dropped with probability `drop`, so that a new user's zero vector is nothing new."""
    def __init__(self, graph, hidden_dim=64, out_dim=64, signed=True, drop=0.9, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        width = graph.features.shape[1]
        self.graph, self.drop, self.seed = graph, drop, seed
        self.vectors = nn.Parameter(torch.randn(len(graph.users), width) * 0.01)
        self.sage = GraphSAGE(width, hidden_dim, out_dim, signed)
        self.decoder = EdgeDecoder(out_dim, hidden_dim)
        order = torch.randperm(graph.edges.shape[1], generator=torch.Generator().manual_seed(seed))
        a, b = int(0.6 * len(order)), int(0.8 * len(order))                                             # 60/20/20
        self.split = {"train": graph.edges[:, order[:a]], "val": graph.edges[:, order[a:b]], "test": graph.edges[:, order[b:]]}

    def logits(self, messages, edges, vectors):
        users, attributes, _ = self.sage(vectors, self.graph.features, messages)
        return self.decoder(F.embedding(edges[0], users), F.embedding(edges[1], attributes))            # (E,); users[edges[0]] has a gradient of random last bits

    def loss(self, step):
        """Scalar: in each epoch 70 % of the training edges carry messages and the other 30 % are asked about. Random draws depend on (seed, step) alone."""
        edges, g = self.split["train"], torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(edges.shape[1], generator=g)
        cut = max(1, int(0.3 * len(order)))
        keep = (torch.rand(len(self.vectors), 1, generator=g) >= self.drop).to(self.vectors)
        asked, messages = edges[:, order[:cut]], edges[:, order[cut:]]
        return F.binary_cross_entropy_with_logits(self.logits(messages, asked, self.vectors * keep), (asked[2] > 0).float())

    @torch.no_grad()
    def evaluate(self, name):
        """{accuracy, auc} on the edges of one part ("val", "test"); only training edges carry messages."""
        score, liked = self.logits(self.split["train"], self.split[name], self.vectors), self.split[name][2] > 0
        return {"accuracy": ((score > 0) == liked).float().mean().item(), "auc": auc(score, liked)}

def auc(score, positive):
    """Chance that a positive scores above a negative, ties one half; nan where one of the two kinds is missing."""
    high, low = score[positive], score[~positive].sort().values
    twice = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)                   # negatives below, and below or equal
    return (twice.double().sum() / (2 * len(high) * len(low))).item()

def pretrain(graph, hidden_dim=64, out_dim=64, epochs=300, lr=5e-3, signed=True, drop=0.9, weight_decay=1e-2, seed=0):
    """-> (EdgeModel, {accuracy, auc} of the held-out 20 %). train.py runs the same loss with checkpoints; this is the whole of it."""
    model = EdgeModel(graph, hidden_dim, out_dim, signed, drop, seed).to(graph.features.device)
    net = [*model.sage.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.Adam([{"params": net}, {"params": [model.vectors], "weight_decay": weight_decay}], lr=lr)
    for epoch in range(epochs):
        loss = model.loss(epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, model.evaluate("test")

if __name__ == "__main__":
    names = ["neon", "chrome", "city", "wood", "forest", "leaf"]                                        # two tastes, three attributes each
    people = [User(f"u{i}", names[:3], names[3:]) if i % 2 else User(f"u{i}", names[3:], names[:3]) for i in range(60)]
    toy = PreferenceGraph.build(people, names, torch.randn(6, 16, generator=torch.Generator().manual_seed(0)))
    model, held_out = pretrain(toy, epochs=60)
    new = embed_new_user(model.sage, model.sage(model.vectors, toy.features, toy.edges)[2], [User("new", ["wood"], ["neon"])], names)
    print(f"like or dislike on held-out edges: accuracy {held_out['accuracy']:.3f}, AUC {held_out['auc']:.3f}")
    print("u1 is most like", [toy.users[i] for i in similar_users(toy.signs(), 3, "signed")[0][1]], "| a new user is", tuple(new.shape))
