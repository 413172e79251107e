"""Collaborative DPO, from the first equation to the trained policy and what people get from it.

    x = (u, I_c, t)    user, caption, the fixed request; y+ is preferred to y-
    L_DPO   = -log sigmoid( beta * (D_theta - D_ref) )                                         (1)
    D_theta = log pi_theta(y+|x) - log pi_theta(y-|x)     of the policy                        (2)
    D_ref   = log pi_ref(y+|I_c,t) - log pi_ref(y-|I_c,t) of the frozen SFT adapter            (3)
    pi_theta(y | u, I_c, t)    h_u -> MLP -> soft tokens in front of the text                  (4)
    L_C-DPO = L_DPO(u) + lambda * sum_v s(u,v) L_DPO(v) / sum_v s(u,v),   v in N_k(u)          (7)
    L_DPO(v): Eq. 1 of a pair of v's, read with u's soft tokens (see CDPOSettings.neighbour_user)

(C-DPO, arXiv 2511.05616; Eq. 5 and 6, the graph and who is similar to whom, are in graph.py.)
The reference is the frozen SFT adapter, not the base model, and never sees a user: only the policy
has soft tokens. Log-probabilities are sums over the answer's tokens and <|im_end|>, in fp32;
prompt, soft tokens and padding never count. "cDPO" also names *conservative* DPO (label
smoothing); nothing here is that: this is collaborative DPO, C-DPO.

Shapes: B rows, N pairs, T tokens, S soft tokens, D width, V vocabulary, K neighbours, U users.
Read on in this order: the losses, the user in front of the prompt, log-probabilities of answers,
SFT and C-DPO as train.py trains them, evaluation on held-out users.  Try it: python cdpo.py
"""
import re
from collections import namedtuple
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

import lora
from flux import CLIPText, TextTokenizer
from graph import (SMALL, GraphSAGE, attribute_names, embed_new_user, find_attribute, in_words_of,
                   load_graph, read_jsonl, read_users, save_graph, signs_of, similar_users,
                   spellings, tastes)
from qwen import (DTYPES, TrainSettings, check_fit, flag, generate, linear, load_language_model,
                  moved, pick_device, reading, resolve, seed_for)


# ---- the losses ----------------------------------------------------------------------------------

def token_logprobs_plain(hidden, head, labels):
    """Sum of the log-probabilities of `labels` (B, T), already shifted, -100 ignored; hidden
    (B, T, D), head (V, D) -> (B,) fp32. `token_logprobs` is the same without the (B, T, V)."""
    logp = F.linear(hidden, head).float().log_softmax(-1)                   # (B, T, V)
    each = logp.gather(-1, labels.clamp_min(0)[:, :, None])[:, :, 0]        # (B, T)
    return (each * (labels != -100)).sum(1)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Log-probabilities, each (B,) -> (losses, chosen_rewards, rejected_rewards), each (B,); the
    rewards carry no gradient."""
    d_theta = policy_chosen - policy_rejected                               # (2)
    d_ref = ref_chosen - ref_rejected                                       # (3)
    chosen_rewards = beta * (policy_chosen - ref_chosen).detach()
    rejected_rewards = beta * (policy_rejected - ref_rejected).detach()
    losses = -F.logsigmoid(beta * (d_theta - d_ref))                        # (1)
    return losses, chosen_rewards, rejected_rewards


def cdpo_loss(own, neighbour, similarity, lam=0.15):
    """own (B,): losses of the users' pairs; neighbour and similarity (B, K) -> (B,). For a user
    without similar users the own term stands alone."""
    total = similarity.sum(-1, keepdim=True)                                # (B, 1)
    weight = similarity / total.clamp_min(1e-12)                            # (B, K)
    return own + lam * (weight * neighbour).sum(-1)                         # (7)


def dpo_metrics(policy_chosen, policy_rejected, chosen_rewards, rejected_rewards):
    """Each (B,) -> {name: (B,)}, under TRL's names."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": policy_chosen,
        "logps/rejected": policy_rejected,
    }


# ---- the user in front of the prompt (4) ---------------------------------------------------------

class SoftPrompt(nn.Module):
    """h (B, in) -> soft tokens (B, tokens, out): a two-layer MLP (paper). Ours: LayerNorm before
    it, GELU, and tokens about twice as long as ordinary embeddings, whose standard deviation is
    `std`, with the default bias: a small model then sees the user from the first step."""

    def __init__(self, in_dim, hidden_dim, out_dim, tokens=8, std=0.02, at=0):
        super().__init__()
        self.tokens = tokens
        self.at = at                    # they stand before this token of the prompt
        self.norm = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, tokens * out_dim)
        nn.init.normal_(self.fc2.weight, std=2 * std / hidden_dim ** 0.5)

    def forward(self, h):
        x = F.gelu(self.fc1(self.norm(h)))                                  # (B, hidden)
        return self.fc2(x).unflatten(-1, (self.tokens, -1))                 # (B, tokens, out)


class UserTokens(nn.Module):
    """From a user to soft tokens.

    kind "graph": node vector -> GraphSAGE over the stored graph -> h_u -> SoftPrompt (C-DPO);
    kind "id": a learned h_u for each training user and nothing else (the baseline DPO-User)."""

    def __init__(self, graph, kind="graph", hidden_dim=64, out_dim=64, signed=True, soft=None):
        super().__init__()
        self.graph = graph
        self.config = {"kind": kind, "hidden_dim": hidden_dim, "out_dim": out_dim,
                       "signed": signed, "soft": soft}
        width = graph.features.shape[1] if kind == "graph" else out_dim
        self.vectors = nn.Parameter(torch.randn(len(graph.users), width))
        self.sage = None
        if kind == "graph":
            self.sage = GraphSAGE(width, hidden_dim, out_dim, signed)
        self.soft = SoftPrompt(out_dim, **soft) if soft else None

    def embeddings(self, stay=1):
        """h of every stored user (U, out); where stay (U, 1) is 0, the node vector is left out."""
        if not self.sage:
            return self.vectors
        return self.sage(self.vectors * stay, self.graph.features, self.graph.edges)[0]

    def new(self, users):
        """h (N, out) of users who are not stored; attributes that the graph does not know take part
        by their text. Kind "id", a table, knows nothing about these users: they get the mean of
        all h."""
        if not self.sage:
            return self.vectors.mean(0, keepdim=True).expand(len(users), -1)
        graph = self.graph
        users = [in_words_of(user, graph.attributes) for user in users]
        new = [name for name in attribute_names(users) if name not in graph.attributes]
        if new:
            graph = graph.widened(new)
        states = self.sage(self.vectors, graph.features, graph.edges)[2]
        return embed_new_user(self.sage, states, users, graph.attributes)

    def save(self, file):
        save_graph(file, self.graph, self.state_dict(), self.config)

    @classmethod
    def load(cls, file, device="cpu"):
        """From collaborative.safetensors. ValueError when its tensors do not fit its own sizes."""
        graph, tensors, config = load_graph(file)
        with reading(file):
            model = cls(graph, **config)
            check_fit(file, model.state_dict(), tensors, finite=True)
            model.load_state_dict(tensors)
        return model.to(device)


# ---- what the policy reads and writes, and how likely --------------------------------------------

REQUEST = "Suggest a single, cohesive image-editing instruction"            # t (authors' figure)


def prompt(caption, guidance="", profile=""):
    """What the policy reads: chat messages with the fixed request and the caption, laid out as we
    do; `guidance`: what this user adds in words. With a profile they have the paper's wording (5.2,
    for every method that it compares). `encode` puts them into Qwen's template (system turn, user
    turn, the assistant's turn open), and the soft tokens stand in front of all that."""
    text = f"{REQUEST}\nCaption: {caption}"
    if profile:
        text = (f"Given this user's profile {profile}, "
                f"suggest an edit for the following image: {caption}")
    if guidance:
        text += f"\nGuidance: {guidance}"
    return [{"role": "user", "content": text}]


def profile(user, similar=()):
    """The user in words (ours), perhaps with what similar users like besides."""
    more = {name for one in similar for name in one.likes}
    more = sorted(more.difference(user.likes, user.dislikes))
    said = {"likes": user.likes, "dislikes": user.dislikes, "similar users like": more}
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in said.items() if names)


PROFILES = ["none", "own", "neighbours"]


def profiles(kind, users, others=()):
    """What prompts say of each user: nothing, their own history, or that and what the three most
    similar of all users like, "aggregated neighbor information" (C.4), agreements less clashes."""
    if kind != "neighbours":
        return [profile(user) if kind == "own" else "" for user in users]
    everybody = [*users, *others]
    found = []
    for user, near, alike in zip(users, *similar_users(signs_of(everybody), 3, "signed")):
        found.append(profile(user, [everybody[i] for i in near[alike > 0]]))
    return found


END = "<|im_end|>"


def closed(answer):
    """The answer and END, once, also where END or <|endoftext|> closes it already."""
    return re.sub(r"(\s*<\|(im_end|endoftext)\|>\s*)+$", "", answer) + END


def encode(tokenizer, messages, *answers):
    """(prompt ids, [ids of each answer]) in Qwen's template; END closes an answer."""
    return tokenizer.chat(messages), [tokenizer.encode(closed(text)) for text in answers]


ROOM = -2                                     # among a prompt's ids: a soft token's place


def with_room(asked, soft, at):
    """The prompt's ids with room for soft tokens (B, S, D), or None, before asked[at]."""
    room = [] if soft is None else [ROOM] * soft.shape[1]
    return asked[:at] + room + asked[at:]


def embedded(model, ids, soft):
    """ids (B, T) -> (B, T, D), the users' tokens (B, S, D), or None, in their room."""
    embeds = model.model.embed_tokens(ids.clamp_min(0))
    if soft is None:
        return embeds
    return embeds.masked_scatter((ids == ROOM)[:, :, None], soft.to(embeds))


def padded(rows, value):
    """N lists, of token ids or of tuples of as many numbers each, as one tensor (N, T, ...), filled
    up with `value` on the right."""
    rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value)


def pack(rows, device="cpu"):
    """B rows of `encode`, n answers each: one sequence a row, so that the prompt is computed once
    for all its answers:

        prompt without its last token | that token, answer 1 | that token, answer 2 | padding

    -> ids (B, T), -1 for padding; labels (B, n, T) on the CPU: what follows each token of an
    answer, else -100; mask (B, 1, T, T): a token sees the prompt and its own answer so far. With
    one answer that is all that stands before it, and the mask None: attention needs none then."""
    places = []                             # a row's (T, 3): token, what follows, in which answer
    for asked, answers in rows:
        row = [(token, -100, 0) for token in asked[:-1]]                    # 0: the prompt
        for number, answer in enumerate(answers, start=1):
            row += zip(asked[-1:] + answer[:-1], answer, [number] * len(answer))
        places.append(row)
    ids, targets, blocks = padded(places, -1).unbind(-1)                    # (B, T) each
    numbers = torch.arange(1, len(answers) + 1)[:, None]                    # (n, 1)
    labels = targets[:, None].where(blocks[:, None] == numbers, -100)
    mask = None
    if len(answers) > 1:
        blocks = moved(blocks, device)
        key, query = blocks[:, None], blocks[:, :, None]
        mask = ((key == 0) | (key == query)).tril()[:, None]
    return moved(ids, device), labels, mask


def chunk_logprobs(h, head, y):
    """log-probabilities (N,) of tokens y (N, 1) after hidden states h (N, D), for a frozen head."""
    with torch.no_grad():
        logp = linear(h, head).float().log_softmax(-1)                      # (N, V)
        score = logp.gather(-1, y)[:, 0]
        if not h.requires_grad:
            return score
        # The slope, d score / d h = (onehot(y) - softmax(W h)) W; in place, since (N, V) is large.
        error = logp.exp_().neg_()
        error.scatter_add_(-1, y, torch.ones_like(logp[:, :1]))
        slope = linear(error.to(h.dtype), head.T)                           # (N, D)
    # What is added is 0, and its gradient is the slope.
    return score + ((h - h.detach()).float() * slope).sum(-1)


def token_logprobs(hidden, head, labels, chunk=128):
    """As `token_logprobs_plain`, for a frozen head, without the (B, T, V): only labelled places
    meet the head, `chunk` of them at a time, and only once, since `chunk_logprobs` takes the
    gradient along. At 0.5B, with 150,000 words, this is half of a DPO step's time and most of its
    memory saved. Labels on the CPU do not make a GPU wait."""
    if head.requires_grad:
        raise ValueError("token_logprobs: the head must be frozen, no gradient reaches it")
    counts = labels != -100                                                 # (B, T)
    y = moved(labels[counts][:, None], hidden.device)                       # (N, 1)
    places = moved(counts.flatten().nonzero()[:, 0], hidden.device)         # (N,)
    h = hidden.flatten(0, 1).index_select(0, places)                        # (N, D)
    parts = zip(h.split(chunk), y.split(chunk))
    logp = torch.cat([chunk_logprobs(part, head, target) for part, target in parts])    # (N,)
    each = logp.new_zeros(labels.numel()).index_copy(0, places, logp)
    return each.view(labels.shape).sum(1)                                   # no sum by atomics


def answer_logprobs(model, rows, soft=None, at=0):
    """log pi(answer | prompt) (B, n) fp32 of B rows of `encode`; soft (B, S, D) are the users'
    tokens, or None, which stand before prompt[at]. They, the prompt and padding have no label: none
    of them counts; <|im_end|> does."""
    rows = [(with_room(asked, soft, at), answers) for asked, answers in rows]
    head = model.lm_head.weight
    ids, labels, mask = pack(rows, head.device)
    embeds = embedded(model, ids, soft)                                     # (4) (B, T, D)
    hidden = model.model(embeds=embeds, attention_mask=mask)                # (B, T, D)
    n = labels.shape[1]
    hidden = hidden.repeat_interleave(n, 0)                                 # (B*n, T, D)
    return token_logprobs(hidden, head, labels.flatten(0, 1)).view(-1, n)


def encode_pair(tokenizer, pair):
    """A line of pairs.jsonl -> as `encode`: the chosen answer, then the rejected one."""
    asked = prompt(pair["caption"], pair["guidance"], pair["profile"])
    return encode(tokenizer, asked, pair["chosen"], pair["rejected"])


@torch.no_grad()
def margins(model, tokenizer, pairs, soft, at):
    """log pi(chosen) - log pi(rejected) (N,) of N pairs; soft (N, S, D) read them, before
    prompt[at]."""
    found = []
    for start in range(0, len(pairs), 16):
        texts = [encode_pair(tokenizer, pair) for pair in pairs[start:start + 16]]
        chosen, rejected = answer_logprobs(model, texts, soft[start:start + 16], at).T
        found.append(chosen - rejected)
    return torch.cat(found).cpu()


def suggest(model, tokenizer, prompts, soft=None, max_new_tokens=48, at=0, **sampling):
    """One instruction for each of N prompts (lists of messages) -> [(text, whether the answer
    ended by itself)]; soft (N, S, D) or None, before prompt[at]."""
    ids = padded([with_room(tokenizer.chat(messages), soft, at) for messages in prompts], -1)
    ids = ids.to(model.lm_head.weight.device)                               # (N, T)
    embeds = embedded(model, ids, soft)                                     # (N, T, D)
    answers = generate(model, embeds=embeds, attention_mask=ids != -1, stop=tokenizer.encode(END),
                       max_new_tokens=max_new_tokens, **sampling)
    return [(tokenizer.decode(ids).strip(), len(ids) < max_new_tokens) for ids in answers]


# ---- supervised fine-tuning: where the policy starts, and what the reference stays ---------------

@dataclass
class SFTSettings(TrainSettings):
    """Supervised fine-tuning.    miniature, paper (Table 12), what it is"""
    edits:         str   = flag("mini/data/edits.jsonl", "gpt-generated-prompts.jsonl",
                                "generic edits, InstructPix2Pix's format")
    qwen:          str   = flag("mini/qwen", "Qwen/Qwen2.5-7B-Instruct",
                                "language model: folder or hub repository", small=SMALL)
    rank:          int   = flag(16, 16, "LoRA rank")
    alpha:         int   = flag(32, 32, "LoRA alpha: the adapter's output times alpha / rank")
    dropout:       float = flag(0.05, 0.05, "LoRA dropout", bounds=(0, 1))
    steps:         int   = flag(400, 9375, "optimiser steps", small=60)
    batch:         int   = flag(32, 16, "global batch, whatever the number of processes", small=8)
    micro:         int   = flag(16, 4, "rows of one forward pass (ours)")
    lr:            float = flag(5e-3, 2e-6, "peak learning rate", small=1e-3)


def lines_of(file, items):
    """Where a batch comes from, for an error."""
    return f"{file}, lines {', '.join(str(item['line']) for item in items)}"


def read_answers(file, *keys, **fields):
    """As read_jsonl, with answers under `keys`, and guidance perhaps. ValueError for lines whose
    answers go on behind END, or are the same: nothing is preferred then."""
    rows = read_jsonl(file, {"guidance": ""}, **fields, **dict.fromkeys(keys, str))
    wrong = []
    for row in rows:
        answers = {closed(row[key]) for key in keys}
        if len(answers) < len(keys) or any(text.count("<|im_") > 1 for text in answers):
            wrong.append(row)
    if wrong:
        raise ValueError(f"{lines_of(file, wrong[:9])} ({len(wrong)} in all): {' and '.join(keys)} "
                         f"must differ, and hold no <|im_start|> nor, but at the end, {END}")
    return rows


def read_pairs(users_file, pairs_file, kind="none", others=()):
    """-> (list[User], pairs with `profiles`, (N,) whose each is: a number). ValueError for a pair
    of nobody."""
    users = read_users(users_file)
    index = {user.name: i for i, user in enumerate(users)}
    pairs = read_answers(pairs_file, "chosen", "rejected", user=str, caption=str)
    words = profiles(kind, users, others)
    owner = []
    for pair in pairs:
        if pair["user"] not in index:
            raise ValueError(
                f"{pairs_file}:{pair['line']}: user {pair['user']!r} is not in {users_file}")
        owner.append(index[pair["user"]])
        pair["profile"] = words[owner[-1]]
    return users, pairs, torch.tensor(owner)


def trainable(module, prefix=""):
    """[(name, Parameter)] of what has a gradient."""
    return [(prefix + n, p) for n, p in module.named_parameters() if p.requires_grad]


def language_model(settings):
    """(Qwen, Tokenizer) that a stage names, and a line where its learning rate is that of much
    wider or narrower models (ours): times the width, what has worked is .6 in the miniature and
    with 135 M parameters, .0007 in the paper."""
    model, tokenizer = load_language_model(
        settings.qwen, pick_device(settings.device), DTYPES[settings.dtype])
    usual = 0.6 / model.config.width
    lr = getattr(settings, "lr", usual)
    if not usual / 1000 < lr < 4 * usual:
        print(f"--lr {lr} was not made for a model of width {model.config.width}, {usual:.0e} was: "
              "--preset small is for 0.1 to 1 B parameters, paper for 7 B")
    return model, tokenizer


class SFT:
    """`python train.py sft`: next-token loss on the instruction alone; each example counts the
    same, however long (ours)."""

    def __init__(self, settings):
        self.settings = settings
        self.edits = read_answers(settings.edits, "edit", input=str)
        self.items = len(self.edits)
        self.model, self.tokenizer = language_model(settings)
        self.model.model.checkpointing = settings.checkpointing
        torch.manual_seed(settings.seed)
        lora.inject(self.model, settings.rank, settings.alpha, settings.dropout)
        self.model.train()                                                  # LoRA dropout

    def parameter_groups(self):
        return [{"params": trainable(self.model)}]

    def draw(self, indices, generator):
        return [self.edits[i] for i in indices]

    def loss(self, rows):
        texts = []
        for edit in rows:
            asked = prompt(edit["input"], edit["guidance"])
            texts.append(encode(self.tokenizer, asked, edit["edit"]))
        logp = answer_logprobs(self.model, texts)[:, 0]                     # (B,)
        length = moved([len(answer) for _, (answer,) in texts], logp.device)
        return -(logp / length).sum(), {}

    def describe(self, rows):
        return lines_of(self.settings.edits, rows)

    def save(self, folder):
        lora.save_adapter(self.model, folder, base_model=self.settings.qwen)


# ---- C-DPO ---------------------------------------------------------------------------------------

@dataclass
class PeopleSettings:
    """Whom C-DPO and its evaluation are about, and what speaks.    miniature, paper, what it is"""
    users:      str = flag("mini/data/users.jsonl", "users.jsonl", "training users")
    users_test: str = flag("mini/data/users_test.jsonl", "users_test.jsonl",
                           "held-out users, for eval and --check-every")
    pairs_test: str = flag("mini/data/pairs_test.jsonl", "pairs_test.jsonl", "their pairs")
    qwen:       str = flag("mini/qwen", "Qwen/Qwen2.5-7B-Instruct",
                           "language model: folder or hub repository", small=SMALL)
    profile:    str = flag("none", "own", "what each prompt says of its user: nothing, likes and"
                           " dislikes (paper, 5.2), these and similar users' likes (C.4)",
                           small="none", choices=PROFILES)


@dataclass
class CDPOSettings(TrainSettings, PeopleSettings):
    """C-DPO and its baselines.    miniature, paper (Table 12), what it is"""
    pairs:          str   = flag("mini/data/pairs.jsonl", "pairs.jsonl",
                                 "the training users' preference pairs")
    sft:            str   = flag("runs/sft", "runs/sft", "adapter to start from; the reference")
    graph:          str   = flag("runs/graph", "runs/graph", "folder of the graph stage"
                                 " (--user graph or id only)")
    user:           str   = flag("graph", "graph", "what the policy sees of the user; id is the"
                                 " baseline DPO-User, none DPO-Vanilla",
                                 choices=["graph", "id", "none"])
    lam:            float = flag(0.5, 0.15, "lambda, the neighbours' weight (--user graph only)")
    k:              int   = flag(3, 3, "similar users (--user graph only)")
    similarity:     str   = flag("likes", "shared", "what they share: anything named (Eq. 6 to the"
                                 " letter), agreements less clashes, likes (both ours)"
                                 " (--user graph only)", small="likes",
                                 choices=["shared", "signed", "likes"])
    neighbour_user: str   = flag("target", "target", "whose soft tokens read a neighbour's pair"
                                 " (the paper leaves it open) (--user graph only)",
                                 choices=["target", "neighbour"])
    neighbours:     str   = flag("sampled", "exact", "all k a step, or (ours) one drawn in"
                                 " proportion to similarity (--user graph only)",
                                 small="sampled", choices=["exact", "sampled"])
    beta:           float = flag(0.2, 0.1, "DPO's temperature (not in the paper; TRL: 0.1)")
    nll:            float = flag(8.0, 0.0, "weight of the chosen answer's mean token loss, added to"
                                 " each L_DPO in Eq. 7 (ours): keeps sentences whole at high lr",
                                 small=1.0)
    drop:           float = flag(0.9, 0.0, "chance that a user's vector sits out a step (ours)"
                                 " (--user graph only)",
                                 bounds=(0, 1))
    dropout:        float = flag(0.0, 0.05, "LoRA dropout", bounds=(0, 1))
    tokens:         int   = flag(4, 8, "soft tokens (--user graph or id only)", small=8)
    place:          str   = flag("front", "front", "where they stand: before all text (paper), or"
                                 " before the assistant's turn (ours) (--user graph or id only)",
                                 small="turn", choices=["front", "turn"])
    soft_hidden:    int   = flag(128, 1024, "hidden width of the soft-token MLP (ours)"
                                 " (--user graph or id only)")
    steps:          int   = flag(1200, 3000, "optimiser steps", small=100)
    batch:          int   = flag(32, 12, "global batch, whatever the number of processes", small=8)
    micro:          int   = flag(16, 2, "rows of one forward pass (ours)")
    lr:             float = flag(1e-2, 2e-7, "peak learning rate of LoRA and MLP", small=1e-3)
    gnn_lr:         float = flag(1e-3, 2e-8, "peak learning rate of the graph encoder"
                                 " (--user graph only)")
    warmup:         int   = flag(20, 0, "steps of linear warm-up before the cosine (ours)")


REFERENCE = "reference.safetensors"


def generic(policy):
    """The adapter of a policy for whoever says nothing: the SFT adapter that it was trained from,
    since without tokens C-DPO's was never trained. A folder without users has but one."""
    file = Path(policy) / REFERENCE
    return file if file.exists() else policy


# One row of a batch: the numbers of the user's own pair and then of the neighbours' pairs, whose
# soft tokens read each of them, s(u,v) of the neighbours, and whose node vectors stay (U, 1).
Row = namedtuple("Row", "pairs readers similarity stay")


def load_policy(settings, adapter):
    """(model, tokenizer) with the adapter of this folder twice. "policy" is trained; "reference"
    stays as it is copied here: LoRALinear gives it no gradient, no optimiser holds it.
    CDPO.pair_losses shows it no soft tokens, since SFT has never met a user."""
    if not Path(adapter).is_dir():
        raise ValueError(f"{adapter}: no such folder; `python train.py sft` writes runs/sft, "
                         "`python train.py cdpo` runs/cdpo")
    model, tokenizer = language_model(settings)
    lora.load_adapter(model, adapter)
    lora.copy_adapter(model)
    return model, tokenizer


class CDPO:
    """`python train.py cdpo`: Eq. 7, and its baselines."""

    def __init__(self, settings):
        self.settings = settings
        self.users, self.pairs, owner = read_pairs(
            settings.users, settings.pairs, settings.profile)
        self.items = len(self.pairs)
        self.owner = owner.tolist()
        self.pairs_of = [[] for _ in self.users]
        for pair, user in enumerate(self.owner):
            self.pairs_of[user].append(pair)
        self.model, self.tokenizer = load_policy(settings, settings.sft)
        for layer in lora.layers(self.model).values():
            layer.dropout = settings.dropout
        self.model.model.checkpointing = settings.checkpointing
        self.tokens = self.user_tokens() if settings.user != "none" else None
        self.neighbours, self.similarity = self.similar()

    def user_tokens(self):
        """UserTokens around the graph stage's encoder, or a new table; new soft tokens."""
        settings = self.settings
        stored = UserTokens.load(Path(settings.graph) / "collaborative.safetensors")
        if stored.soft:
            raise ValueError(f"{settings.graph} holds a policy, not what `train.py graph` writes")
        was = {user.name: tastes(user) for user in stored.graph.people()}
        now = {user.name: tastes(user) for user in self.users}
        if [*was.items()] != [*now.items()]:
            other = [name for name in was | now if was.get(name) != now.get(name)]
            raise ValueError(f"{settings.graph} was trained on other users than {settings.users} "
                             f"holds, or other likes and dislikes ({', '.join(other[:3])}...): run "
                             "the graph stage again, perhaps with --continue-from")
        table = self.model.model.embed_tokens.weight
        soft = {"hidden_dim": settings.soft_hidden, "out_dim": table.shape[1],
                "tokens": settings.tokens, "std": table[:50_000].float().std().item()}
        if settings.place == "turn":
            soft["at"] = -len(self.tokenizer.encode("<|im_start|>assistant\n"))
        torch.manual_seed(settings.seed)
        config = stored.config | {"kind": settings.user, "soft": soft}
        tokens = UserTokens(stored.graph, **config)
        if settings.user == "graph":
            tokens.load_state_dict(stored.state_dict(), strict=False)
        return tokens.to(table.device)

    def similar(self):
        """N_k(u) and s(u, v): (U, K) each; K is 0 without a neighbours' term (--user id, --lam 0).
        A neighbour who has no pairs gets s = 0."""
        settings = self.settings
        k = settings.k if settings.user == "graph" and settings.lam else 0
        index, score = similar_users(signs_of(self.users), k, settings.similarity)
        speaks = torch.tensor([len(pairs) > 0 for pairs in self.pairs_of])
        return index, score * speaks[index]

    def parameter_groups(self):
        groups = [{"params": trainable(self.model)}]
        if self.tokens:
            soft = trainable(self.tokens.soft, "collaborative.soft.")
            encoder = trainable(self.tokens, "collaborative.")[:-len(soft)]     # they come last
            # a table of users is not pretrained
            lr = self.settings.gnn_lr if self.settings.user == "graph" else self.settings.lr
            groups += [{"params": soft}, {"params": encoder, "lr": lr}]
        return groups

    def draw(self, indices, generator):
        stay = torch.rand(len(self.users), 1, generator=generator) >= self.settings.drop
        return [self.draw_row(pair, stay, generator) for pair in indices]

    def draw_row(self, pair, stay, generator):
        """A pair, and of each similar user, or of one of them, a random pair. One neighbour drawn
        in proportion to s(u,v) weighs 1 in Eq. 7: on average that is the weighted mean of all."""
        settings = self.settings
        user = self.owner[pair]
        similarity = self.similarity[user]                                  # (K,)
        columns = similarity.nonzero()[:, 0]
        if settings.neighbours == "sampled" and len(columns):
            columns = torch.multinomial(similarity, 1, generator=generator)
        row = Row([pair], [user], similarity[columns], stay)
        for v in self.neighbours[user, columns].tolist():
            theirs = self.pairs_of[v]
            which = torch.randint(len(theirs), (1,), generator=generator)
            row.pairs.append(theirs[which])
            row.readers.append(user if settings.neighbour_user == "target" else v)
        return row

    def loss(self, rows):
        """Eq. 7, summed over the rows; metrics are of the users' own pairs."""
        pairs = []
        readers = []
        first = []                                                          # where each row begins
        for row in rows:
            first.append(len(pairs))
            pairs += row.pairs
            readers += row.readers
        similarity = pad_sequence([row.similarity for row in rows], batch_first=True)       # (B, K)
        losses, found = self.pair_losses(pairs, readers, rows[0].stay)     # (N,), {name: (N,)}
        losses = pad_sequence(losses.tensor_split(first[1:]), batch_first=True)     # (B, 1 + K)
        similarity = moved(similarity, losses.device)
        own = losses[:, 0]
        losses = cdpo_loss(own, losses[:, 1:], similarity, self.settings.lam)              # (7)
        first = moved(first, losses.device)
        found = {name: values[first].detach().sum() for name, values in found.items()}
        return losses.sum(), found | {"neighbours": (losses - own).detach().sum()}

    def pair_losses(self, pairs, readers, stay):
        """L_DPO of N pairs (numbers), each read with a user's soft tokens (`readers`), plus nll
        times the chosen answer's mean token loss -> (N,); and dpo_metrics and both terms (N,)."""
        texts = [encode_pair(self.tokenizer, self.pairs[pair]) for pair in pairs]
        soft = None
        at = 0
        if self.tokens:
            at = self.tokens.soft.at
            # Here the gradient reaches GraphSAGE and the node vectors.
            device = self.tokens.vectors.device
            readers = moved(readers, device)
            h = self.tokens.embeddings(moved(stay, device))                     # (U, out)
            soft = self.tokens.soft(h[readers])                             # (N, S, D)
        # The reference comes first: checkpointing runs the policy again in the backward pass.
        with torch.no_grad():
            lora.use(self.model.eval(), "reference")
            reference = answer_logprobs(self.model, texts).T                # (2, N), no user
            lora.use(self.model.train(), "policy")                          # LoRA dropout
        policy = answer_logprobs(self.model, texts, soft, at).T             # (2, N)
        losses, *rewards = dpo_loss(*policy, *reference, self.settings.beta)
        length = moved([len(chosen) for _, (chosen, _) in texts], policy.device)
        nll = -self.settings.nll * policy[0] / length
        return losses + nll, dpo_metrics(*policy, *rewards) | {"dpo": losses, "nll": nll}

    @torch.no_grad()
    def check(self):
        """By how many nats the chosen answers of held-out people come out likelier than the
        rejected ones, of 50 pairs or so, read with their own soft tokens."""
        if not self.tokens:
            return {}
        settings = self.settings
        users, pairs, owner = read_pairs(
            settings.users_test, settings.pairs_test, settings.profile, self.users)
        step = len(pairs) // 50 + 1
        soft = self.tokens.soft(self.tokens.new(users))[owner[::step]]          # (N, S, D)
        margin = margins(
            self.model.eval(), self.tokenizer, pairs[::step], soft, self.tokens.soft.at)
        return {"held-out margin": margin.mean().item()}

    def describe(self, rows):
        return lines_of(self.settings.pairs, [self.pairs[row.pairs[0]] for row in rows])

    def save(self, folder):
        lora.save_adapter(self.model, folder, base_model=self.settings.qwen)
        if self.tokens:
            self.tokens.save(folder / "collaborative.safetensors")
            save_file(lora.tensors(self.model, "reference"), folder / REFERENCE)


# ---- what held-out users get from a policy (the conditions of Table 2) ---------------------------

@dataclass
class EvalSettings(PeopleSettings):
    """Evaluation of a policy.    miniature, paper, what it is"""
    policy:     str = flag("runs/cdpo", "runs/cdpo", "folder that sft or cdpo wrote")
    clip:       str = flag("mini/clip", "openai/clip-vit-large-patch14", "CLIP that compares texts"
                           " (the paper does not say which); empty: none", small="")
    dtype:      str = flag("fp32", "bf16", "of the frozen weights", choices=DTYPES)
    answers:    int = flag(3, 3, "instructions sampled for each caption of each user")
    temperature: float = flag(1.0, 1.0, "of sampling them; 0: likeliest words")
    top_p:      float = flag(1.0, 1.0, "sampled from the likeliest words that together reach it",
                             bounds=(0, 1))
    max_new_tokens: int = flag(48, 48, "after which an instruction is cut off")
    out:        str = flag("", "", "file of all answers, for a reader; POLICY_answers.txt when not"
                           " given")
    seed:       int = flag(0, 0, "of sampling")
    device:     str = flag("", "", "cpu, cuda, cuda:1 ...; the best there is when not given")


CONDITIONS = {                                    # what of their history the policy knows (Table 2)
    "likes + dislikes": {},
    "likes only": {"dislikes": []},
    "dislikes only": {"likes": []},
    "nothing": {"likes": [], "dislikes": []},
}
RATES = ("likes", "would like", "hit", "dislikes", "no attribute", "unfinished")


def clip_texts(folder, device):
    """CLIP's text tower as a function: [text] -> (N, P) of length 1, on the CPU."""
    tokenizer = TextTokenizer(folder, 77, "CLIP")
    clip = CLIPText.load(folder, device)

    @torch.no_grad()
    def embed(texts):
        ids = tokenizer(texts).to(device)                                   # (N, T)
        vectors = torch.cat([clip.embed(part) for part in ids.split(64)])
        return F.normalize(vectors, dim=-1).cpu()

    return embed


class Evaluation:
    """What held-out users get from a policy: which of their likes and dislikes are found by name in
    its instructions, how near these are to what they chose (Table 2), and how far it finds what
    they chose likelier than what they rejected."""

    def __init__(self, settings):
        self.settings = settings
        self.users, pairs, owner = read_pairs(settings.users_test, settings.pairs_test)
        self.captions = [[] for _ in self.users]                # each once, in the file's order
        for pair, user in zip(pairs, owner):
            if pair["caption"] not in self.captions[user]:
                self.captions[user].append(pair["caption"])
        self.others = read_users(settings.users)
        people = self.users + self.others
        hidden = [name for user in people for name in user.hidden]
        self.names = find_names(attribute_names(people) + hidden)
        self.model, self.tokenizer = load_policy(settings, settings.policy)
        if settings.clip:
            self.clip = clip_texts(resolve(settings.clip), pick_device(settings.device))
            chosen = self.clip([pair["chosen"] for pair in pairs])              # (N, P)
            everybody = range(len(self.users))
            self.liked = torch.stack([chosen[owner == i].mean(0) for i in everybody])   # (U, P)
        step = len(pairs) // 1000 + 1                           # more say little more
        self.pairs = pairs[::step]
        self.owner = owner[::step]

    def soft_tokens(self, users):
        """(U, S, D), S = 0 where the policy has none, and where they stand."""
        table = self.model.model.embed_tokens.weight
        file = Path(self.settings.policy) / "collaborative.safetensors"
        if not file.exists():
            return table.new_empty(len(users), 0, table.shape[1]), 0
        tokens = UserTokens.load(file, table.device)
        return tokens.soft(tokens.new(users)), tokens.soft.at

    def parties(self, users, owner):
        """For questions whose asker is users[owner] (N,), yields (numbers of questions, soft tokens
        (U, S, D), where they stand) with the right adapter in the model: of those who say
        something, and of those who do not, who get the generic edit."""
        policy = self.settings.policy
        silent = torch.tensor([not any(tastes(user)) for user in users])[owner]     # (N,)
        soft, at = self.soft_tokens(users)
        none = soft[:, :0]
        for adapter, turn, tokens in ((policy, ~silent, soft), (generic(policy), silent, none)):
            if turn.any():
                lora.load_adapter(self.model, adapter)
                yield turn.nonzero()[:, 0], tokens, at

    @torch.no_grad()
    def answers(self, users, captions):
        """The policy's instructions for each user's captions -> [(user's number, caption, text,
        ended)]; `users` say all that it may know."""
        settings = self.settings
        generator = torch.Generator(self.model.lm_head.weight.device)
        generator.manual_seed(seed_for("answers", settings.seed))
        how = {"temperature": settings.temperature, "top_p": settings.top_p, "generator": generator}
        words = profiles(settings.profile, users, self.others)
        # Questions, each of which its answer will follow.
        found = [(i, caption) for i, texts in enumerate(captions) for caption in texts]
        prompts = [prompt(caption, profile=words[i]) for i, caption in found]
        owner = torch.tensor([i for i, _ in found])                         # (N,)
        for numbers, soft, at in self.parties(users, owner):
            for part in numbers.split(400):
                asked = [prompts[n] for n in part]
                said = suggest(self.model, self.tokenizer, asked, soft[owner[part]],
                               settings.max_new_tokens, at=at, **how)
                for n, answer in zip(part, said):
                    found[n] += answer
        return found

    def margins(self, users):
        """log pi(chosen) - log pi(rejected) (N,) of the held-out pairs, asked as for `answers`."""
        words = profiles(self.settings.profile, users, self.others)
        margin = torch.zeros(len(self.pairs))
        for numbers, soft, at in self.parties(users, self.owner):
            owner = self.owner[numbers]
            pairs = [self.pairs[n] | {"profile": words[i]} for n, i in zip(numbers, owner)]
            margin[numbers] = margins(self.model, self.tokenizer, pairs, soft[owner], at)
        return margin

    def known(self):
        """{condition: what the policy knows of each user, list[User]}; "another's" is the history
        of the held-out person who agrees least with them."""
        known = {}
        for name, shown in CONDITIONS.items():
            known[name] = [replace(user, **shown) for user in self.users]
        signs = signs_of(self.users).to_dense()                             # (U, A)
        known["another's"] = [self.users[i] for i in (signs @ signs.T).argmin(1)]
        return known

    def table(self):
        """A row a condition: RATES of sampled instructions and Table 2's cosine; and, of the
        held-out pairs, how often the chosen answer is the likelier one, by how many nats, and by
        how many fewer than with all of the history, which is the personalisation: mean and standard
        error over people. Below: the same of the held-out answers themselves."""
        settings = self.settings
        captions = [texts * settings.answers for texts in self.captions]
        rows = []
        with open(settings.out or f"{Path(settings.policy)}_answers.txt", "w") as file:
            for name, known in self.known().items():
                answers = self.answers(known, captions)
                margin = self.margins(known)
                if not rows:
                    own = margin
                values = ((margin > 0).float(), margin, own - margin)
                cells = [self.over_people(value) for value in values]
                rows.append(self.rates(name, answers, file) + cells)
            for key in ("chosen", "rejected"):
                answers = [(i, pair["caption"], pair[key], True)
                           for i, pair in zip(self.owner, self.pairs)]
                rows.append(self.rates(f"({key})", answers, file))
        columns = ["the policy knows", *RATES, "CLIP liked", "accuracy", "margin",
                   "less than with all"]
        return markdown_table(columns, rows)

    def rates(self, name, answers, file):
        """The name, RATES, shares of the answers, which are written to an open file, and mean and
        standard deviation of their `cosines`."""
        verdicts = []
        print(f"\n{name}\n", file=file)
        for i, caption, text, ended in answers:
            user = self.users[i]
            verdicts.append(self.verdict(user, text, ended))
            counts = ", ".join(compress(RATES, verdicts[-1]))
            print(f"{user.name} | {caption} | {text} | {counts}", file=file)
        shares = [f"{rate:.3f}" for rate in torch.tensor(verdicts).double().mean(0)]
        near = self.cosines(answers)
        return [name, *shares, f"{near.mean():.3f} +- {near.std(correction=0):.3f}"]

    def cosines(self, answers):
        """Table 2: of each answer (N,) the mean cosine to all that its user chose, by CLIP; nan
        without one. (The paper says neither which nor over what its deviations are.)"""
        if not self.settings.clip:
            return torch.tensor([torch.nan])
        liked = self.liked[[i for i, *_ in answers]]                        # (N, P)
        texts = self.clip([text for _, _, text, _ in answers])              # (N, P)
        return (texts * liked).sum(1)

    def verdict(self, user, text, ended):
        """Whether this answer counts, for each of RATES. A hit names what is liked or would be."""
        found = self.names.findall(text)

        def named(attributes):
            return any(find_attribute(word, attributes) for word in found)

        likes = named(user.likes)
        hidden = named(user.hidden)
        return likes, hidden, likes or hidden, named(user.dislikes), not found, not ended

    def over_people(self, values):
        """Mean and standard error, over people, of each one's mean of the pairs' values (N,)."""
        means = [values[self.owner == user].mean() for user in self.owner.unique()]
        means = torch.stack(means)
        return f"{means.mean():.3f} +- {means.std() / len(means) ** 0.5:.3f}"


def find_names(names):
    """A pattern for attributes' names, as whole words in either case, in singular and plural; the
    longest first."""
    found = set().union(*map(spellings, names))
    longest = sorted(found, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, longest))})\b", re.IGNORECASE)


def markdown_table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    chosen = torch.tensor([0.0, 10.0])
    zero = torch.zeros(2)
    print("DPO where the policy is the reference (ln 2), and where it prefers y+ by 10 nats more:",
          dpo_loss(chosen, zero, zero, zero)[0].tolist())
