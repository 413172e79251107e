"""The preference graph: users, attributes, who resembles whom, and GraphSAGE over likes and dislikes.  (C-DPO, 4.1.1 and App. B)

    G = (U, A, E)    E in U x A, each edge a like (+1) or a dislike (-1)                                       (5)
    s(u,v) = |A(u) ^ A(v)| / max over all pairs u' != v' of |A(u') ^ A(v')|    "^" is intersection             (6)

A SAGE layer:  out_i = W_l mean over the neighbours j of x_j + b + W_r x_i; its weights carry PyG's names and give PyG's numbers.
The paper describes one set of edges, so its encoder cannot tell a like from a dislike. The default here (ours) is two relations,
likes and dislikes, each with its reverse and its own weights; `signed=False` is the paper's reading.
An attribute starts as the frozen embedding of its name, a known user as a learned vector, a new user as the zero vector.

    python graph.py        # a toy graph: neighbours, edge prediction, a new user
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------ files
@dataclass
class User:
    name: str
    likes: list
    dislikes: list
    hidden: list = ()          # what the persona would like but never said; only evaluation reads it

def read_jsonl(path, optional=None, **fields):
    """Rows (dict) of a JSON-lines file in which every row has `fields`, given as name=type; list means a list of strings. Of `optional`, given as
    {name: default}, a row has what it has, of the default's type. Blank lines are skipped; anything else that does not fit is a ValueError with file and line number."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    optional, rows = optional or {}, []
    fields |= {name: type(default) for name, default in optional.items()}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if b"\\u" in line:                                                         # half of a surrogate pair is no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{number}: not a line of JSON ({e})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a JSON object was expected, got {type(row).__name__}")
        row = {**optional, **row}
        for name, kind in fields.items():
            value = row.get(name)
            if not isinstance(value, kind) or (kind is list and not all(isinstance(v, str) for v in value)):
                wanted = "a list of strings" if kind is list else "a string"
                raise ValueError(f"{path}:{number}: \"{name}\" must be {wanted}, got {json.dumps(value)[:60]}")
        rows.append({**row, "line": number})
    return rows

def read_users(path):
    """users.jsonl -> list[User], in file order. Names must be unique; nothing may be liked and disliked at once."""
    users, seen = [], set()
    for row in read_jsonl(path, {"hidden": []}, user=str, likes=list, dislikes=list):
        likes, dislikes = list(dict.fromkeys(row["likes"])), list(dict.fromkeys(row["dislikes"]))
        both = set(likes) & set(dislikes)
        if both or row["user"] in seen:
            problem = f"likes and dislikes {sorted(both)[0]!r}" if both else "appears twice"
            raise ValueError(f"{path}:{row['line']}: user {row['user']!r} {problem}")
        seen.add(row["user"])
        users.append(User(row["user"], likes, dislikes, row["hidden"]))
    return users

# ------------------------------------------------------------------------------------------------ the graph
@dataclass
class PreferenceGraph:
    """users and attributes are names; edges (3,E) int64 has the rows user, attribute, sign (+1 like, -1 dislike); features (A,F)."""
    users: list
    attributes: list
    edges: torch.Tensor
    features: torch.Tensor

    @classmethod
    def build(cls, users, attributes, features):
        return cls([u.name for u in users], list(attributes), edges_of(users, attributes), features)

    def signs(self):
        """(U,A) int8: +1 liked, -1 disliked, 0 nothing said."""
        table = torch.zeros(len(self.users), len(self.attributes), dtype=torch.int8, device=self.edges.device)
        table[self.edges[0], self.edges[1]] = self.edges[2].to(torch.int8)
        return table

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

def similar_users(likes_and_dislikes, k, kind="shared", chunk=256):
    """The k most similar other users: (index (U,k) int64, score (U,k) in [0,1]), best first; exact.

    likes_and_dislikes (U,A), dense or sparse: +1, -1, 0. kind "shared" counts what two users both spoke about, the letter of Eq. 6; "signed"
    takes away what one likes and the other dislikes; "likes" counts what both like (both ours). A tie goes to the next user, counting on from
    u and around, so that no user becomes everybody's neighbour by standing first in the file. Where fewer than k others have anything in common
    with u, the rest of the row is u itself with score 0. Time grows with the shared likes, or, where most pairs of users share some, with
    U x U x A in one product of matrices; never is there more than some `chunk` rows of U x U."""
    signs, total = likes_and_dislikes.to_sparse().coalesce(), len(likes_and_dislikes)
    value = signs.values().sign().float()
    value = {"shared": value.abs(), "signed": value, "likes": value.clamp_min(0)}[kind]
    user, attribute, value = *signs.indices()[:, value != 0], value[value != 0]                         # (E,) each, by user
    own = torch.arange(total, device=value.device)[:, None].expand(total, k)
    if len(user) == 0 or k == 0:
        return own, own * 0.0
    shared = attribute.bincount().double().square().sum()                                               # (u, attribute, v) that meet
    keys_of = keys_sparse if 1000 * shared < total * signs.numel() else keys_dense                      # one costs about 1,000 multiplications
    key = keys_of(user, attribute, value, signs.shape, k, chunk)                                        # (U, k)
    common = -(-key // total)                                                                           # key = common * U - how far v is ahead of u
    return torch.where(common > 0, (own + common * total - key) % total, own), common / common.max().clamp_min(1)     # (6)

def keys_dense(user, attribute, value, shape, k, chunk):
    """Entries (E,) of a table `shape` (U,A) -> the k largest keys of every user (U,k) int64, 0 where there are fewer: blocks of rows times all the others."""
    total, device = shape[0], user.device
    x = value.new_zeros(shape, dtype=torch.float32 if shape.numel() < 2 ** 24 else torch.float64)       # exact for the keys
    x[user, attribute] = value.to(x)
    ahead = torch.arange(total, device=device).repeat(2).to(x).unfold(0, total, 1)                      # row total - u: how far v is ahead of u
    buffer, best = x.new_empty(min(chunk, total), total), torch.zeros(total, k, dtype=torch.int64, device=device)
    for rows in torch.arange(total, device=device).split(chunk):
        rows = rows.flip(0)
        key = torch.addmm(ahead[total - rows[0]:][:len(rows)], x[rows], x.T, beta=-1, alpha=total, out=buffer[:len(rows)])      # (c, U)
        key[torch.arange(len(rows)), rows] = 0                                                          # nobody is a neighbour of himself
        best[rows, :min(k, total)] = key.topk(min(k, total)).values.long().clamp_min(0)
    return best

def keys_sparse(user, attribute, value, shape, k, chunk):
    """The same, but only pairs with something in common are ever written down: some 4,096 `chunk` meetings (u, attribute, v) at a time."""
    (total, _), device, by_attribute = shape, user.device, attribute.argsort(stable=True)
    degree = attribute.bincount()                                                                       # (A,) how many name it; those of a begin at first[a]
    count, first, best = degree[attribute], degree.cumsum(0) - degree, torch.zeros(total, k, dtype=torch.int64, device=device)
    met = torch.zeros(total, device=device, dtype=torch.int64).index_add(0, user, count).cumsum(0)      # (U,) meetings of all users so far
    for rows in torch.arange(total, device=device).split((met // (4096 * chunk)).unique_consecutive(return_counts=True)[1].tolist()):
        mine = slice(*torch.searchsorted(user, torch.stack([rows[0], rows[-1] + 1])).tolist())          # the edges of these users
        edge = torch.arange(mine.start, mine.stop, device=device).repeat_interleave(count[mine])        # (M,)
        nth = torch.arange(len(edge), device=device) - (count[mine].cumsum(0) - count[mine]).repeat_interleave(count[mine])
        other = by_attribute[first[attribute[edge]] + nth]                                              # (M,) the other's edge to the same attribute
        pair, which = ((user[edge] - rows[0]) * total + (user[other] - user[edge]) % total).unique(return_inverse=True)
        common = torch.zeros(len(pair), device=device).index_add(0, which, value[edge] * value[other]).long()
        row, ahead = pair // total, pair % total
        good = (ahead > 0) & (common > 0)
        row, key = row[good], (common * total - ahead)[good]
        key = key[(row * shape.numel() - key).argsort()]                                                # rows stay where they are, each with its best first
        place = torch.arange(len(row), device=device) - torch.searchsorted(row, row)
        best[rows[row[place < k]], place[place < k]] = key[place < k]
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
        first = torch.searchsorted(edge_index[1][order].contiguous(), torch.arange(len(x_dst), device=x_dst.device))
        mean = F.embedding_bag(edge_index[0][order], x_src, first, mode="mean")                         # (N, F), no (E, F) tensor
        return self.lin_l(mean) + self.lin_r(x_dst)

class Relations(nn.Module):
    """One layer in one direction: the sum over the relations of a SAGEConv each, as in PyG's to_hetero."""

    def __init__(self, in_dim, out_dim, signed):
        super().__init__()
        self.signed = signed
        self.convs = nn.ModuleDict({name: SAGEConv(in_dim, out_dim) for name in (("like", "dislike") if signed else ("any",))})

    def forward(self, x_src, x_dst, edges):
        """edges (3,E) = (source, destination, sign)."""
        if not self.signed:
            return self.convs["any"](x_src, x_dst, edges[:2])
        like = edges[2] > 0
        return self.convs["like"](x_src, x_dst, edges[:2, like]) + self.convs["dislike"](x_src, x_dst, edges[:2, ~like])

class GraphSAGE(nn.Module):
    """Two layers over the bipartite graph, ReLU after the first."""

    def __init__(self, in_dim, hidden_dim, out_dim, signed=True):
        super().__init__()
        dims = [(in_dim, hidden_dim), (hidden_dim, out_dim)]
        self.to_user = nn.ModuleList(Relations(i, o, signed) for i, o in dims)
        self.to_attribute = nn.ModuleList(Relations(i, o, signed) for i, o in dims)

    def forward(self, x_user, x_attr, edges):
        """x_user (U,F), x_attr (A,F), edges (3,E) -> users (U,out), attributes (A,out), and the attributes' input to each layer."""
        back, states = edges[[1, 0, 2]], []                                                             # attribute -> user
        for i, (to_user, to_attribute) in enumerate(zip(self.to_user, self.to_attribute)):
            x_user, x_attr = (F.relu(x) for x in (x_user, x_attr)) if i else (x_user, x_attr)
            states.append(x_attr)
            x_user, x_attr = to_user(x_attr, x_user, back), to_attribute(x_user, x_attr, edges)
        return x_user, x_attr, states

class EdgeDecoder(nn.Module):
    """Does u like a? Two linear layers on the pair of embeddings; dropped after pretraining."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(2 * dim, hidden_dim), nn.Linear(hidden_dim, 1)

    def forward(self, users, attributes):
        return self.lin2(F.relu(self.lin1(torch.cat([users, attributes], -1)))).squeeze(-1)             # (E,)

def embed_new_user(sage, states, users, attributes):
    """Embeddings (N,out) of users the graph has never seen, from likes and dislikes alone, without retraining.

    users list[User]; attributes and states: the graph's attribute names and the third value of `sage(...)` on the stored graph.
    Each starts as the zero vector (paper) and only listens: attributes do not hear it, so nobody's embedding depends on who else asks (ours)."""
    back = edges_of(users, attributes)[[1, 0, 2]].to(states[0].device)
    x = states[0].new_zeros(len(users), states[0].shape[1])                                             # (N, F)
    for i, (to_user, x_attr) in enumerate(zip(sage.to_user, states)):
        x = to_user(x_attr, F.relu(x) if i else x, back)
    return x

# ------------------------------------------------------------------------------------------------ pretraining
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
        edges = self.split[name]
        score, liked = self.logits(self.split["train"], edges, self.vectors), edges[2] > 0
        return {"accuracy": ((score > 0) == liked).float().mean().item(), "auc": auc(score, liked)}

def auc(score, positive):
    """Chance that a positive scores above a negative, ties one half; nan where one of the two kinds is missing."""
    value, inverse, count = score.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[inverse]                                                 # mean rank of equal scores
    p, n = positive.sum().item(), (~positive).sum().item()
    return (rank[positive].sum().item() - p * (p + 1) / 2) / (p * n) if p and n else float("nan")

def pretrain(graph, hidden_dim=64, out_dim=64, epochs=300, lr=5e-3, signed=True, drop=0.9, weight_decay=1e-2, seed=0):
    """-> (EdgeModel, {accuracy, auc} of the held-out 20 %). train.py runs the same loss with checkpoints; this is the whole of it."""
    model = EdgeModel(graph, hidden_dim, out_dim, signed, drop, seed)
    net = [p for n, p in model.named_parameters() if n != "vectors"]
    optimizer = torch.optim.Adam([{"params": net}, {"params": [model.vectors], "weight_decay": weight_decay}], lr=lr)
    for epoch in range(epochs):
        loss = model.loss(epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, model.evaluate("test")

if __name__ == "__main__":
    names = ["neon", "chrome", "city", "wood", "forest", "leaf"]                                        # two tastes, three attributes each
    people = [User(f"u{i}", names[:3][j:] + names[:3][:j - 1], names[3:]) if i % 2 else User(f"u{i}", names[3:], names[:3][j:])
              for i in range(60) for j in [i // 2 % 3]]
    toy = PreferenceGraph.build(people, names, torch.randn(6, 16, generator=torch.Generator().manual_seed(0)))
    model, held_out = pretrain(toy, epochs=60)
    new = embed_new_user(model.sage, model.sage(model.vectors, toy.features, toy.edges)[2], [User("new", ["wood"], ["neon"])], names)
    print(f"like or dislike on held-out edges: accuracy {held_out['accuracy']:.3f}, AUC {held_out['auc']:.3f}")
    print("u1 is most like", [toy.users[i] for i in similar_users(toy.signs(), 3)[0][1]], "| a new user is", tuple(new.shape))
