"""The preference graph: users, attributes, similar users, and GraphSAGE over likes and dislikes.

    G = (U, A, E)        users, attributes; each edge in E is a like (+1) or a dislike (-1)    (5)
    s(u,v) = |A(u) ^ A(v)|  /  max over all pairs u' != v' of |A(u') ^ A(v')|                   (6)
             A(u): the attributes that u has an edge to;  ^: intersection

From C-DPO (arXiv 2511.05616), 4.1.1 and App. B. A SAGE layer takes the mean of its neighbours:

    out_i = W_l mean over the neighbours j of i of x_j + b + W_r x_i

An attribute starts as the frozen embedding of its name, a known user as a learned vector, a new
user as the zero vector: see `embed_new_user`. An attribute that nobody named before takes part by
its text: see `PreferenceGraph.widened` (ours). The paper describes one set of edges, so its encoder
cannot tell a like from a dislike (`signed=False`); by default each has weights of its own (ours).

Shapes: U users, A attributes, E edges, F width of a node's features, k similar users.
Try it: python graph.py
"""
import difflib
import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qwen import (DETERMINISTIC, check_fit, embed_texts, flag, generator_for, load_language_model,
                  moved, pick_device, reading, shipped)


@dataclass
class User:
    """Who likes and dislikes what, each said once. ValueError for what is both."""
    name: str
    likes: list
    dislikes: list
    hidden: list = ()          # what the persona would like but never said: for evaluation only

    def __post_init__(self):
        self.likes = [*dict.fromkeys(self.likes)]
        self.dislikes = [*dict.fromkeys(self.dislikes)]
        likes, dislikes = tastes(self)
        if likes & dislikes:
            raise ValueError(
                f"user {self.name!r} likes and dislikes {min(likes & dislikes)!r}")


def tastes(user):
    """What tells two users apart; the order in which they said it does not."""
    return set(user.likes), set(user.dislikes)


class PreferenceGraph(nn.Module):
    """G of Eq. 5. users and attributes are names; edges (3, E) int64 has the rows user, attribute,
    sign (+1 like, -1 dislike); features (A, F) are the embeddings of the attributes' names.
    `embedder`: how `embed_names` made them, its arguments by name; None where nobody knows."""

    def __init__(self, users, attributes, edges, features):
        super().__init__()
        self.users = users
        self.attributes = attributes
        self.embedder = None
        self.edges = edges          # always on the CPU, where sorting them makes no GPU wait
        self.register_buffer("features", features)

    @classmethod
    def build(cls, users, attributes, features):
        """From list[User]."""
        names = [user.name for user in users]
        return cls(names, list(attributes), edges_of(users, attributes), features)

    @functools.lru_cache(maxsize=1)                 # edit.py asks several times for each person
    def people(self):
        """list[User], as they were when the graph was built."""
        users = [User(name, [], []) for name in self.users]
        for user, attribute, sign in self.edges.T.tolist():
            said = users[user].likes if sign > 0 else users[user].dislikes
            said.append(self.attributes[attribute])
        return users

    def widened(self, names):
        """This graph and, by their text, new names as attributes like any other, without edges.
        ValueError when nothing embeds names as it did the graph's own."""
        if not self.embedder:
            raise ValueError(f"the graph's file does not say how to embed {', '.join(names)[:80]}: "
                             "run the graph stage, and those after it, again")
        known = len(self.attributes)
        names = self.attributes + names
        with reading("the graph's embedder"):
            features = embed_names(names, **self.embedder, known=known, device=self.features.device)
        features = features.to(self.features)                               # (A', F)
        own = features[:known]
        same = own.shape == self.features.shape
        if not same or (own - self.features).norm() > 0.05 * own.norm():
            raise ValueError(f"{self.embedder} does not embed the graph's attributes as they were "
                             "when it was trained")
        return PreferenceGraph(self.users, names, self.edges, features)

    def signs(self):
        """(U, A) sparse: +1 liked, -1 disliked, 0 nothing said. RuntimeError: edges to nowhere."""
        size = len(self.users), len(self.attributes)
        values = self.edges[2].float()
        return torch.sparse_coo_tensor(self.edges[:2], values, size, check_invariants=True)


def attribute_names(users):
    """Every attribute that somebody likes or dislikes, sorted."""
    return sorted({name for user in users for name in user.likes + user.dislikes})


def signs_of(users):
    """(U, A) sparse, see `PreferenceGraph.signs`, over all that these users name."""
    return PreferenceGraph.build(users, attribute_names(users), None).signs()


def edges_of(users, attributes):
    """(3, E) int64: user, attribute, sign. ValueError for an attribute that is not among them."""
    index = {name: i for i, name in enumerate(attributes)}
    edges = []
    for i, user in enumerate(users):
        for names, sign in ((user.likes, 1), (user.dislikes, -1)):
            for name in names:
                if name not in index:
                    raise ValueError(f"unknown attribute {name!r}; spelt like it are "
                                     f"{near(name, attributes)}")
                edges.append((i, index[name], sign))
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 3).T.contiguous()


def embed_names(names, embedder, norm, wording="{a}", known=None, device="cpu"):
    """Features (A, F) of attributes' names, as they stand in `wording`. Ours: the mean (of the
    first `known`) is taken off, and they get length `norm`, since short texts are embedded much
    alike; norm 0: as is (paper)."""
    model, tokenizer = load_language_model(shipped(embedder), device)
    texts = [wording.replace("{a}", name) for name in names]
    features = embed_texts(model, tokenizer, texts).cpu()                   # (A, F)
    if norm:
        centred = features - features[:known].mean(0)
        features = F.normalize(centred, dim=-1) * norm
    return features


@functools.cache
def spellings(name):
    """The name in small letters, its plurals, and what it may be the plural of."""
    name = name.casefold()
    found = {name, f"{name}s", f"{name}es"}
    for end, other in (("y$", "ies"), ("ies$", "y"), ("es$", ""), ("s$", "")):
        found.add(re.sub(end, other, name))
    return found


def find_attribute(name, attributes):
    """The attribute that is the same word, else the same but for case and plural, else None."""
    if name in attributes:
        return name
    for known in attributes:
        if name.casefold() in spellings(known):
            return known
    return None


def near(name, attributes):
    """Up to three attributes that are spelt like the name."""
    return difflib.get_close_matches(name.casefold(), attributes)


def in_words_of(user, attributes):
    """The User with the attributes' own names for what `find_attribute` finds among them."""
    def own(names):
        return [find_attribute(name, attributes) or name for name in names]

    return replace(user, likes=own(user.likes), dislikes=own(user.dislikes))


def similar_users(likes_and_dislikes, k, kind="shared", rows=64):
    """The k most similar other users: (index (U, k) int64, score (U, k) in [0, 1]), best first.

    likes_and_dislikes (U, A): +1, -1, 0. `kind` says what two users have in common: "shared" is
    what both spoke about, the letter of Eq. 6; "signed" takes away what one likes and the other
    dislikes; "likes" is what both like (both ours). Where fewer than k others have anything in
    common with u, the rest of the row is u itself with score 0. `rows` users are compared with all
    others at a time, never U x U. Ties fall as topk leaves them; each chunk of rows meets the
    others in an order of its own, so nobody is everybody's neighbour for standing first."""
    x = likes_and_dislikes.to_dense().float()
    x = {"shared": x.abs(), "signed": x, "likes": x.relu()}[kind]           # (U, A)
    users = torch.arange(len(x), device=x.device)
    index = users[:, None].repeat(1, k)                                     # (U, k)
    count = x.new_zeros(len(x), k)
    if count.numel() == 0:
        return index, count
    n = min(k, len(x))
    for mine in users.split(rows):
        others = users.roll(-mine[0].item())                                # mine stand first
        common = x[mine] @ x[others].T                                      # (rows, U)
        common.fill_diagonal_(0)                                            # not oneself
        most, place = common.topk(n)                                        # (rows, n)
        index[mine, :n] = torch.where(most > 0, others[place], mine[:, None])
        count[mine, :n] = most.clamp_min(0)
    return index, count / count.max().clamp_min(1)                          # (6)


# ---- GraphSAGE -----------------------------------------------------------------------------------

@functools.lru_cache(maxsize=8)                 # edges are sorted once, not in every step
def bags(edges, end, sign, nodes, device):
    """Whom the `nodes` in row `end` of the edges hear, over those of a sign (0: over all): (E',),
    one node's behind the other's, and where each one's begin (N,)."""
    if sign:
        edges = edges[:, edges[2] == sign]
    destination, order = edges[end].sort(stable=True)
    first = torch.searchsorted(destination, torch.arange(nodes))
    return moved(edges[1 - end, order], device), moved(first, device)


class SAGEConv(nn.Module):
    """One SAGE layer with mean aggregation, over the edges of one sign (0: all). PyG's names and
    numbers: lin_r has no bias."""

    def __init__(self, in_dim, out_dim, sign=0):
        super().__init__()
        self.sign = sign
        self.lin_l = nn.Linear(in_dim, out_dim)
        self.lin_r = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, x_src, x_dst, edge_index, end=1):
        """x_src (S, F), x_dst (N, F), edge_index on the CPU -> (N, out). Its rows are source and
        destination, which stands in row `end`, and the sign, where one counts. A node without
        neighbours has a zero mean. No (E, F) tensor is built, and the sums have the same order, so
        the same bits, on any number of threads."""
        sources, first = bags(edge_index, end, self.sign, len(x_dst), x_src.device)
        mean = F.embedding_bag(sources, x_src, first)                       # (N, F)
        return self.lin_l(mean) + self.lin_r(x_dst)


class Relations(nn.Module):
    """A layer in one direction: the sum over the relations of a SAGEConv each (PyG's to_hetero)."""

    def __init__(self, in_dim, out_dim, signed):
        super().__init__()
        signs = {"like": 1, "dislike": -1} if signed else {"any": 0}
        self.convs = nn.ModuleDict(
            {name: SAGEConv(in_dim, out_dim, sign) for name, sign in signs.items()})

    def forward(self, x_src, x_dst, edges, end=1):
        """edges (3, E) as in SAGEConv -> (N, out)."""
        return sum(conv(x_src, x_dst, edges, end) for conv in self.convs.values())


class GraphSAGE(nn.Module):
    """Two layers over the bipartite graph, ReLU after the first."""

    def __init__(self, in_dim, hidden_dim, out_dim, signed=True):
        super().__init__()
        sizes = [(in_dim, hidden_dim), (hidden_dim, out_dim)]
        self.to_user = nn.ModuleList([Relations(*size, signed) for size in sizes])
        self.to_attribute = nn.ModuleList([Relations(*size, signed) for size in sizes])

    def forward(self, x_user, x_attr, edges):
        """x_user (U, F), x_attr (A, F), edges (3, E) -> users (U, out), attributes (A, out), and
        the attributes' input to each layer, which is all that a new user needs."""
        h_user = F.relu(self.to_user[0](x_attr, x_user, edges, end=0))      # (U, hidden)
        h_attr = F.relu(self.to_attribute[0](x_user, x_attr, edges))        # (A, hidden)
        users = self.to_user[1](h_attr, h_user, edges, end=0)               # (U, out)
        attributes = self.to_attribute[1](h_user, h_attr, edges)            # (A, out)
        return users, attributes, [x_attr, h_attr]


def embed_new_user(sage, states, users, attributes):
    """Embeddings (N, out) of users the graph has never seen, from likes and dislikes alone,
    without retraining.

    users: list[User]; attributes: the graph's names; states: the attributes' input to each layer,
    the third value of `sage(...)` on the stored graph. Each user starts as the zero vector (paper)
    and only listens: attributes do not hear it, so nobody's embedding depends on who else asks
    (ours)."""
    x_attr, h_attr = states
    edges = edges_of(users, attributes)
    zero = x_attr.new_zeros(len(users), x_attr.shape[1])                    # (N, F)
    h = F.relu(sage.to_user[0](x_attr, zero, edges, end=0))                 # (N, hidden)
    return sage.to_user[1](h_attr, h, edges, end=0)                         # (N, out)


# ---- pretraining: like or dislike is a binary classification of edges (App. B) -------------------

class EdgeDecoder(nn.Sequential):
    """Does u like a? Two linear layers on the pair of embeddings; dropped after pretraining."""

    def __init__(self, dim, hidden_dim):
        super().__init__(nn.Linear(2 * dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1))

    def forward(self, users, attributes):
        return super().forward(torch.cat([users, attributes], -1)).squeeze(-1)     # (E,)


class EdgeModel(nn.Module):
    """What pretraining trains: user vectors, encoder, decoder, with the members that train.py asks
    for (one item, one row: the whole graph). Ours: user vectors start at N(0, .01), and each is
    dropped with probability `drop`: a new user's zero is nothing new."""
    items = 1

    def __init__(self, graph, hidden_dim=64, out_dim=64, signed=True, drop=0.9, seed=0):
        super().__init__()
        count = graph.edges.shape[1]
        if count < 5:
            raise ValueError(f"the graph has {count} edges (likes and dislikes); to train on 60 % "
                             "and hold out 20 and 20 % it needs at least 5")
        torch.manual_seed(seed)
        width = graph.features.shape[1]
        self.graph = graph
        self.signed = signed
        self.drop = drop
        self.vectors = nn.Parameter(torch.randn(len(graph.users), width) * 0.01)
        self.sage = GraphSAGE(width, hidden_dim, out_dim, signed)
        self.decoder = EdgeDecoder(out_dim, hidden_dim)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        cuts = [int(0.6 * count), int(0.8 * count)]                         # 60/20/20
        parts = graph.edges[:, order].tensor_split(cuts, 1)
        self.split = dict(zip(("train", "val", "test"), parts))

    def take_over(self, file):
        """Begin with the encoder of an earlier graph, and its vectors of those users whom it knows;
        the decoder begins anew, and some held-out edges may be edges that it was trained on.
        ValueError where the encoder has other sizes, or read other features."""
        before, tensors, _ = load_graph(file)
        before.embedder = self.graph.embedder
        encoder = {n.removeprefix("sage."): t for n, t in tensors.items()
                   if not n.startswith(("vectors", "graph.features", "soft."))}
        with reading(file):
            before.widened([])
            check_fit(file, self.sage.state_dict(), encoder, finite=True)
            self.sage.load_state_dict(encoder)
            vectors = dict(zip(before.users, tensors["vectors"]))
            for own, name in zip(self.vectors.data, self.graph.users):
                own.copy_(vectors.get(name, own))

    def parameter_groups(self):
        """Only user vectors decay, as fast as the optimiser is told."""
        vectors, *net = self.named_parameters()             # those of sub-modules come last
        return [{"params": net, "weight_decay": 0.0}, {"params": [vectors]}]

    def logits(self, messages, asked, vectors):
        """Edges that carry `messages` (3, E'), edges `asked` about (3, E) -> (E,)."""
        users, attributes, _ = self.sage(vectors, self.graph.features, messages)
        asked = moved(asked, users.device)
        u = F.embedding(asked[0], users)            # users[asked[0]], but for its gradient's bits,
        a = F.embedding(asked[1], attributes)       # which then differ from run to run
        return self.decoder(u, a)

    def draw(self, indices, generator):
        """An epoch's random part, one row: an order of the training edges (E,), and which users'
        vectors stay (U, 1)."""
        order = torch.randperm(self.split["train"].shape[1], generator=generator)
        stay = torch.rand(len(self.vectors), 1, generator=generator) >= self.drop
        return [(order, stay)]

    def loss(self, rows):
        """(scalar, {}). 30 % of the training edges are asked about, the others carry messages
        (ours); without signs all do both: a message that an edge is there does not say which."""
        order, stay = rows[0]
        edges = self.split["train"]
        asked = messages = edges
        if self.signed:
            cut = max(1, int(0.3 * len(order)))
            asked, messages = edges[:, order].tensor_split([cut], 1)
        vectors = self.vectors * moved(stay, self.vectors.device)
        logits = self.logits(messages, asked, vectors)
        liked = moved(asked[2] > 0, logits.device)
        return F.binary_cross_entropy_with_logits(logits, liked.float()), {}

    @torch.no_grad()
    def evaluate(self, part):
        """{accuracy, auc, ...} on the edges of "val" or "test"; only training edges carry messages.
        Mean and standard deviation of a guesser's AUC say what an AUC on so few edges is worth;
        there is none without a like and a dislike."""
        edges = self.split[part]
        liked = edges[2] > 0
        score = self.logits(self.split["train"], edges, self.vectors).cpu()
        right = (score > 0) == liked
        found = {"accuracy": right.float().mean().item(), "edges": len(liked)}
        pairs = (liked.sum() * (~liked).sum()).item()
        if pairs:
            found["auc"] = auc(score, liked)
            spread = ((len(liked) + 1) / (12 * pairs)) ** 0.5               # Mann-Whitney
            found["auc of guesses"] = f"0.50 +- {spread:.2f}"
        return found


def auc(score, positive):
    """Chance that a positive scores above a negative, a tie one half; nan without one of them."""
    high = score[positive]
    low = score[~positive].sort().values
    below = torch.searchsorted(low, high)
    not_above = torch.searchsorted(low, high, right=True)
    return ((below + not_above).double().sum() / (2 * len(high) * len(low))).item()


def pretrain(graph, hidden_dim=64, out_dim=64, epochs=300, lr=5e-3, signed=True, drop=0.9,
             weight_decay=1e-2, seed=0):
    """-> (EdgeModel, {accuracy, auc, ...} of the held-out 20 %): the whole of it. `python train.py
    graph` runs the same loss with a schedule and checkpoints."""
    model = EdgeModel(graph, hidden_dim, out_dim, signed, drop=drop, seed=seed)
    model.to(graph.features.device)
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        loss, _ = model.loss(model.draw([0], generator_for(seed, epoch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, model.evaluate("test")


SMALL = "Qwen/Qwen2.5-0.5B-Instruct"          # what --preset small names; measured with 135 M


@dataclass
class GraphSettings:
    """Pretraining of the graph encoder.    miniature, paper (Table 12), what it is"""
    users:        str   = flag("mini/data/users.jsonl", "users.jsonl", "training users")
    qwen:         str   = flag("mini/qwen", "Qwen/Qwen2.5-7B-Instruct",
                               "language model that embeds the attributes' names", small=SMALL)
    embedder:     str   = flag("", "Linq-AI-Research/Linq-Embed-Mistral",
                               "Qwen or Mistral that does so in its place", small="")
    wording:      str   = flag("{a}", "{a}", "of the text that embeds an attribute {a} (ours)",
                               small="A photo with {a} has, in one word, the style:")
    hidden:       int   = flag(64, 1024, "width of the first SAGE layer and of the edge decoder")
    out_dim:      int   = flag(64, 1024, "width of h_u (not in the paper)")
    continue_from: str  = flag("", "", "folder of an earlier graph; people whom it knows"
                               " begin with their trained vectors (paper, App. B)")
    unsigned:     bool  = flag(False, True, "one kind of edge, likes and dislikes alike; an epoch"
                               " asks about all training edges, not 30 %")
    feature_norm: float = flag(4.0, 0.0, "length that centred name embeddings get (ours); 0: as is")
    drop:         float = flag(0.9, 0.0, "chance that a user's vector sits out an epoch (ours)",
                               bounds=(0, 1))
    steps:        int   = flag(300, 150, "epochs over the whole graph")
    lr:           float = flag(5e-3, 3e-5, "peak learning rate")
    schedule:     str   = flag("cosine", "constant", "of the learning rate (the paper names one for"
                               " the LoRA only)", small="cosine", choices=["cosine", "constant"])
    weight_decay: float = flag(1e-2, 0.0, "AdamW's, of the user vectors only (ours)")
    clip:         float = flag(1.0, 1.0, "largest gradient norm; 0 never clips (ours)")
    seed:         int   = flag(0, 0, "of everything random")
    device:       str   = flag("", "", "cpu, cuda, cuda:1 ...; the best there is when not given")
    deterministic: bool = flag(False, False, DETERMINISTIC)
    batch = micro = 1           # an item is the whole graph
    warmup = 0


class GraphPretraining(EdgeModel):
    """`python train.py graph`: the EdgeModel of the people in a file."""

    def __init__(self, settings):
        device = pick_device(settings.device)
        users = read_users(settings.users)
        names = attribute_names(users)
        if not names:
            raise ValueError(f"{settings.users} holds no user who likes or dislikes anything")
        if "{a}" not in settings.wording:
            raise ValueError(f"--wording is {settings.wording!r}; it must contain {{a}}")
        embedder = {"embedder": settings.embedder or settings.qwen, "norm": settings.feature_norm,
                    "wording": settings.wording}
        features = embed_names(names, **embedder, device=device)            # (A, F)
        graph = PreferenceGraph.build(users, names, features)
        graph.embedder = embedder
        super().__init__(graph, settings.hidden, settings.out_dim, not settings.unsigned,
                         drop=settings.drop, seed=settings.seed)
        self.settings = settings
        if settings.continue_from:
            self.take_over(Path(settings.continue_from) / "collaborative.safetensors")
        self.to(device)

    def describe(self, rows):
        return f"{self.settings.users}, lines 1 to {len(self.graph.users)}"

    def save(self, folder):
        """collaborative.safetensors, and how well held-out edges are told apart: report.json."""
        settings = self.settings
        tensors = self.state_dict()
        for name in self.decoder.state_dict():
            del tensors[f"decoder.{name}"]
        config = {"kind": "graph", "hidden_dim": settings.hidden, "out_dim": settings.out_dim,
                  "signed": not settings.unsigned, "soft": None}
        save_graph(folder / "collaborative.safetensors", self.graph, tensors, config)
        report = self.evaluate("test")
        (folder / "report.json").write_text(json.dumps(report))
        print("held-out edges:", report)


# ---- files ---------------------------------------------------------------------------------------

@functools.cache                # the same few keys stand in every line
def check_key(key, known):
    """ValueError for a key that is nearly one of the known ones, a tuple, such as "dislike". Others
    may be somebody else's."""
    meant = difflib.get_close_matches(key.strip().lower(), known, 1, 0.85)
    if meant and key not in known:
        raise ValueError(f'"{key}" is no key here; "{meant[0]}" is')


def check_keys(keys, known):
    for key in keys:
        check_key(key, tuple(known))


def read_jsonl(path, optional=None, **fields):
    """Rows of a JSON-lines file: dicts, their line number under "line".

    Each must have `fields`, given as name=type (list: a list of strings), and may have `optional`,
    given as {name: default}, of the default's type. Other keys are ignored, see check_keys. Blank
    lines are skipped; what else does not fit is a ValueError with file and line number."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    optional = optional or {}
    kinds = fields | {name: type(default) for name, default in optional.items()}
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        with reading(f"{path}:{number}"):
            try:
                row = {**optional, **json.loads(line), "line": number}
                json.dumps(row, ensure_ascii=False).encode()    # half a surrogate pair is no text
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"not a line of JSON with a JSON object ({error})") from None
            check_keys(row, kinds)
            for name, kind in kinds.items():
                value = row.get(name)
                texts = value if kind is list else [value]
                if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
                    wanted = "a list of strings" if kind is list else "a string"
                    raise ValueError(
                        f'"{name}" must be {wanted}, got {json.dumps(value)[:60]}')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds nothing")
    return rows


def read_users(path):
    """users.jsonl -> list[User], in file order. A name stands once."""
    users = {}
    for row in read_jsonl(path, {"hidden": []}, user=str, likes=list, dislikes=list):
        name = row["user"]
        with reading(f"{path}:{row['line']}"):
            if name in users:
                raise ValueError(f"user {name!r} appears twice")
            users[name] = User(name, row["likes"], row["dislikes"], row["hidden"])
    return list(users.values())


def save_graph(file, graph, tensors, config):
    """collaborative.safetensors: all that embeds a new user. Weights, node vectors, attribute
    features and edges are tensors; names and sizes (`config`) stand in its metadata."""
    about = {"users": graph.users, "attributes": graph.attributes, "config": config,
             "embedder": graph.embedder}
    tensors = {**tensors, "graph.edges": graph.edges.int()}
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, file, {"collaborative": json.dumps(about)})      # one key: a fixed order


def load_graph(file):
    """-> (PreferenceGraph, {name: tensor} of the other weights, config). ValueError when there is
    no such file, or its edges lead nowhere."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file; `python train.py graph` and `cdpo` write it")
    with reading(file), safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()["collaborative"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        edges = tensors.pop("graph.edges").long()
        features = tensors["graph.features"]
        graph = PreferenceGraph(about["users"], about["attributes"], edges, features)
        graph.embedder = about.get("embedder")                              # older files have none
        if graph.signs().shape[1] != len(features):                 # signs() checks the edges, too
            raise ValueError(
                f"it names {len(graph.attributes)} attributes and has features of {len(features)}")
    return graph, tensors, about["config"]


if __name__ == "__main__":
    cosy = User("cosy", ["wood", "leaf"], ["neon"])
    urban = User("urban", ["neon", "city"], ["wood"])
    toy = PreferenceGraph.build(30 * [cosy, urban], attribute_names([cosy, urban]), torch.eye(4))
    print("like or dislike on held-out edges:", pretrain(toy, epochs=60)[1])
    print("like user 0 are", similar_users(toy.signs(), 3)[0][0])
