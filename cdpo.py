"""Collaborative DPO: log-probabilities, DPO, the neighbours' term, and soft tokens that tell the policy who is asking.

    x = (u, I_c, t)   user, caption, the fixed request; y+ preferred to y-; pi_theta the policy, pi_ref the frozen SFT adapter
    L_DPO = -log sigmoid( beta * (D_theta - D_ref) )                                                           (1)
    D_theta = log pi_theta(y+|x) - log pi_theta(y-|x),   D_ref the same of pi_ref                              (2) (3)
    pi_theta(y | u, I_c, t): h_u -> MLP -> 8 soft tokens in front of the text; pi_ref never sees a user        (4)
    L_C-DPO = L_DPO(u) + lambda * sum_v s(u,v) L_DPO(v) / sum_v s(u,v),   v in N_k(u)                          (7)

"cDPO" also names *conservative* DPO (label smoothing); nothing here is that: this is collaborative DPO, C-DPO.
Log-probabilities are sums over the answer's tokens and <|im_end|>, in fp32. Prompt, soft tokens and padding never count. Try it: python cdpo.py
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from graph import GraphSAGE, PreferenceGraph, embed_new_user
from qwen import check_fit, generate, linear, reading

REQUEST = "Suggest a single, cohesive image-editing instruction"     # t, the same in SFT and C-DPO (the authors' figure)

def token_logprobs(hidden, head, labels, chunk=128):
    """Sum of the log-probabilities of `labels` (B,T), already shifted, -100 ignored; hidden (B,T,D), frozen head (V,D) -> (B,) fp32.
    Only labelled positions meet the head, `chunk` of them at a time, and only once: the gradient with respect to h, (onehot(y) - softmax(W h)) W, is taken along."""
    if head.requires_grad:
        raise ValueError("token_logprobs: the head must be frozen, no gradient reaches it")
    row, column = (labels != -100).nonzero(as_tuple=True)                                               # (N,), (N,)
    h, head, scores, slopes = hidden[row, column], head.to(hidden.dtype), [], []                        # (N, D), (V, D)
    with torch.no_grad():
        for part, y in zip(h.split(chunk), labels[row, column, None].split(chunk)):
            logp = linear(part, head).float().log_softmax(-1)                                           # (chunk, V)
            scores.append(logp.gather(-1, y)[:, 0])
            if h.requires_grad:
                error = logp.exp_().neg_().scatter_add_(-1, y, torch.ones_like(logp[:, :1]))            # onehot(y) - softmax
                slopes.append(linear(error.to(part.dtype), head.T))                                     # (chunk, D)
    logp = torch.cat(scores)                                                                            # (N,)
    if h.requires_grad:
        logp = logp + ((h - h.detach()).float() * torch.cat(slopes)).sum(-1)                            # adds 0, and the gradient
    return torch.zeros(len(labels), device=hidden.device).index_add(0, row, logp)

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Log-probabilities, each (B,) -> (losses, chosen_rewards, rejected_rewards), each (B,); the rewards carry no gradient."""
    d_theta = policy_chosen - policy_rejected                                                           # (2)
    d_ref = ref_chosen - ref_rejected                                                                   # (3)
    chosen_rewards = beta * (policy_chosen - ref_chosen).detach()
    rejected_rewards = beta * (policy_rejected - ref_rejected).detach()
    return -F.logsigmoid(beta * (d_theta - d_ref)), chosen_rewards, rejected_rewards                    # (1)

def cdpo_loss(own, neighbour, similarity, lam=0.15):
    """own (B,) the user's DPO losses, neighbour and similarity (B,K) -> (B,). A user without similar users: the own term alone."""
    total = similarity.sum(-1)                                                                          # (B,)
    weight = similarity / total.clamp_min(torch.finfo(similarity.dtype).tiny)[:, None]                  # (B, K)
    return own + lam * (weight * neighbour).sum(-1)                                                     # (7)

def dpo_metrics(policy_chosen, policy_rejected, chosen_rewards, rejected_rewards):
    """Each (B,) -> sums over the batch, under TRL's names."""
    each = {"rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards, "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(), "logps/chosen": policy_chosen.detach(), "logps/rejected": policy_rejected.detach()}
    return {name: x.sum() for name, x in each.items()}

# ------------------------------------------------------------------------------------------------ text
def prompt(caption, guidance="", profile=""):
    """Chat messages that ask for an edit of a picture: the fixed request and the caption; `guidance`: what this user adds in words.
    With a profile it is the paper's prompt-engineering baseline instead: the user in words, for a policy that knows no users."""
    text = f"Given this user's profile {profile}, suggest an edit for the following image: {caption}" if profile else f"{REQUEST}\nCaption: {caption}"
    return [{"role": "user", "content": f"{text}\nGuidance: {guidance}" if guidance else text}]

def profile(user):
    """The user in words, for the prompt-engineering baseline."""
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in (("likes", user.likes), ("dislikes", user.dislikes)) if names)

def encode(tokenizer, messages, *answers):
    """(prompt ids, [ids of each answer]) in Qwen's template; an answer is closed by <|im_end|>."""
    return tokenizer.chat(messages), [tokenizer.encode(f"{answer}<|im_end|>") for answer in answers]

def pack(rows, soft_tokens=0):
    """B rows of `encode`, each with up to n answers, one sequence each: the prompt is computed once for all its answers.

        soft tokens | prompt but for its last token | that token, answer 1 | that token, answer 2 | ...       each block padded on the right
    -> ids (B, P+n*L) without the soft tokens, labels (B*n, L), and the mask (B,1,T,T): a token sees the prompt and its own answer so far."""
    B, n = len(rows), max(len(answers) for _, answers in rows)
    P, L = max(len(p) - 1 for p, _ in rows), max(len(a) for _, answers in rows for a in answers)
    ids, labels = torch.full((B, P + n * L), -1), torch.full((B * n, L), -100)
    for i, (p, answers) in enumerate(rows):
        ids[i, :len(p) - 1] = torch.tensor(p[:-1])
        for j, answer in enumerate(answers):
            ids[i, P + j * L:][:len(answer)] = torch.tensor(p[-1:] + answer[:-1])
            labels[i * n + j, :len(answer)] = torch.tensor(answer)
    real = F.pad(ids >= 0, (soft_tokens, 0), value=True)                                                # (B, T)
    block = torch.cat([torch.zeros(soft_tokens + P, dtype=torch.int64), torch.arange(1, n + 1).repeat_interleave(L)])
    k = torch.arange(len(block))
    path = (k <= k[:, None]) & ((block == 0) | (block == block[:, None]))                               # (T, T)
    return ids.clamp_min(0), labels, (path & (real[:, None] | (k == k[:, None])))[:, None]              # padding sees itself: no empty row

def behind(soft, embeds):
    """The users' tokens (B,S,D), or None, and then the text (B,T,D)."""
    return embeds if soft is None else torch.cat([soft.to(embeds), embeds], 1)

def answer_logprobs(model, rows, soft=None, chunk=128):
    """log pi(answer | prompt) (B,n) fp32 of B rows of `encode`; soft (B,S,D) are the users' tokens, or None.     (4)"""
    ids, labels, mask = (x.to(model.lm_head.weight.device) for x in pack(rows, 0 if soft is None else soft.shape[1]))
    hidden = model.model(embeds=behind(soft, model.model.embed_tokens(ids)), attention_mask=mask)       # (B, T, D)
    n, L = len(labels) // len(rows), labels.shape[1]
    return token_logprobs(hidden[:, -n * L:].reshape(len(labels), L, -1), model.lm_head.weight, labels, chunk).view(-1, n)

def suggest(model, tokenizer, prompts, soft=None, max_new_tokens=48, **sampling):
    """One instruction for each of N prompts (lists of messages) -> [(text, whether the answer ended by itself)]; soft (N,S,D) or None."""
    rows = [torch.tensor(tokenizer.chat(p)) for p in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(model.lm_head.weight.device)       # (N, T)
    embeds = behind(soft, model.model.embed_tokens(ids.clamp_min(0)))                                   # (N, S+T, D)
    mask = F.pad(ids >= 0, (embeds.shape[1] - ids.shape[1], 0), value=True)
    answers = generate(model, embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, **sampling)
    return [(tokenizer.decode(a).strip(), len(a) < max_new_tokens) for a in answers]

class SoftPrompt(nn.Module):
    """h (B,in) -> soft tokens (B,tokens,out): a two-layer MLP (paper). Ours: LayerNorm before it, GELU, and tokens about twice as long as
    ordinary embeddings, whose standard deviation is `std`: a small model then sees the user from the first step."""
    def __init__(self, in_dim, hidden_dim, out_dim, tokens=8, std=0.02):
        super().__init__()
        self.norm, self.fc1, self.fc2, self.tokens = nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, tokens * out_dim), tokens
        nn.init.normal_(self.fc2.weight, std=2 * std / hidden_dim ** 0.5)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(self.norm(h)))).unflatten(-1, (self.tokens, -1))                # (B, tokens, out)

class UserTokens(nn.Module):
    """From a user to soft tokens. kind "graph": node vector -> GraphSAGE over the stored graph -> h_u (C-DPO);
    kind "id": a learned h_u for each training user and nothing else (the baseline DPO-User)."""
    def __init__(self, graph, kind="graph", hidden_dim=64, out_dim=64, signed=True, soft=None):
        super().__init__()
        self.graph, self.config = graph, {"kind": kind, "hidden_dim": hidden_dim, "out_dim": out_dim, "signed": signed, "soft": soft}
        width = graph.features.shape[1] if kind == "graph" else out_dim
        self.vectors = nn.Parameter(torch.randn(len(graph.users), width) * (0.01 if kind == "graph" else 1.0))
        self.sage = GraphSAGE(width, hidden_dim, out_dim, signed) if kind == "graph" else None
        self.soft = SoftPrompt(out_dim, **soft) if soft else None

    def embeddings(self, keep=1):
        """h of every stored user (U,out); keep (U,1), 0 or 1, says whose node vector is left out."""
        return self.sage(self.vectors * keep, self.graph.features, self.graph.edges)[0] if self.sage else self.vectors

    def new(self, users, unknown="mean"):
        """h (N,out) of users who are not stored. Kind "id", a table, knows nothing about them: they get the mean of all h,
        or, with unknown="nearest", that of the stored user who agrees most often with them and clashes least (ours)."""
        if self.sage is not None:
            states = self.sage(self.vectors, self.graph.features, self.graph.edges)[2]
            return embed_new_user(self.sage, states, users, self.graph.attributes)
        if unknown == "mean":
            return self.vectors.mean(0, keepdim=True).expand(len(users), -1)
        asked = PreferenceGraph.build(users, self.graph.attributes, None).signs().to(self.vectors.device).to_dense()       # (N, A)
        return self.vectors[(self.graph.signs() @ asked.T).argmax(0)]

    def save(self, file):
        """Everything needed to embed a new user: weights, node vectors, attribute features, edges; names and sizes as metadata."""
        tensors = {name: t.cpu().contiguous() for name, t in {**self.state_dict(), "graph.edges": self.graph.edges.int()}.items()}
        meta = {"users": self.graph.users, "attributes": self.graph.attributes, "config": self.config}
        save_file(tensors, file, {"collaborative": json.dumps(meta)})                                   # one key: safetensors writes several in any order

    @classmethod
    def load(cls, file, device="cpu"):
        """From collaborative.safetensors. ValueError when the file is none, or its tensors do not fit its own sizes."""
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file; `python train.py graph`, then `python train.py cdpo`, write it")
        with reading(file), safe_open(file, "pt") as f:
            meta, tensors = json.loads(f.metadata()["collaborative"]), {name: f.get_tensor(name) for name in f.keys()}
            graph = PreferenceGraph(meta["users"], meta["attributes"], tensors.pop("graph.edges").long(), tensors["graph.features"])
            if graph.signs().shape[1] != len(graph.features):                                           # signs() refuses edges to nowhere
                raise ValueError(f"it names {len(graph.attributes)} attributes and has features of {len(graph.features)}")
            model = cls(graph, **meta["config"])
            check_fit(file, {**dict(model.named_parameters()), "graph.features": graph.features}, tensors, finite=True)
            model.load_state_dict(tensors, strict=False)
        return model.to(device)

if __name__ == "__main__":
    more, none = torch.tensor([0.0, 10.0]), torch.zeros(2)
    print("DPO where the policy is the reference (ln 2), and where it prefers y+ by 10 nats more:", dpo_loss(more, none, none, none)[0].tolist())
    print("Eq. 7, and a user without similar users:", cdpo_loss(none + 1, none[:, None] + 3, torch.tensor([[0.5], [0.0]])).tolist())
