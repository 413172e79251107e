"""Qwen2.5 in plain torch: the model, generation with a KV cache, tokenizer and chat template.

Qwen2 and Mistral checkpoints are read as they are published: every size comes from config.json,
and every parameter has its published name. The file goes from the model to its surroundings:

    the model                  Config, RMSNorm, RoPE, Attention, MLP, Layer, Decoder, Qwen
    embedding and generation   embed_texts, sample, generate
    a faster matrix product    for frozen weights on a CPU; a first reading may skip it
    tokenizer                  Tokenizer, load_language_model
    reading of checkpoints     resolve, reading, read_json, read_tensors, check_fit, load_checkpoint
    what all stages share      settings and flags, devices, seeds, processes, writing of files

Conventions. B batch, T new tokens, S all tokens so far (without a cache S = T), D width,
H heads, G key/value heads, d width of a head, V vocabulary. A comment at the end of a line says
the shape of what the line computes. `attention_mask` is (B, S), 1 for a token and 0 for padding,
which may stand on either side.

Try it:  python qwen.py
"""
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---- the model ---------------------------------------------------------------------------------

@dataclass
class Config:
    """What config.json says, in the words of the code below."""
    vocab: int                    # V
    width: int                    # D
    inner: int                    # width inside the MLP
    layers: int
    heads: int                    # H
    kv_heads: int                 # G
    head_dim: int                 # d
    eps: float                    # of RMSNorm
    theta: float                  # base of RoPE's frequencies
    qkv_bias: bool                # Qwen2 has it, Mistral has not
    tied: bool                    # the head is the embedding
    headless: bool                # an embedding model, stored without head
    window: int | None            # Mistral's sliding window; longer texts are refused
    eos: tuple                    # ids that end an answer
    sampling: dict = field(default_factory=dict)          # how `generate` is best called

    @classmethod
    def read(cls, path):
        """From config.json and generation_config.json in the folder `path`. ValueError for a model
        type, rope scaling, activation or attention that is not written here."""
        path = Path(path)
        c = read_json(path / "config.json")
        kind = c.get("model_type")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        qkv_bias = choose("model_type", kind, {"qwen2": True, "mistral": False})
        choose("rope_type", rope.get("rope_type", rope.get("type", "default")), {"default": None})
        choose("hidden_act", c.get("hidden_act", "silu"), {"silu": F.silu})
        choose("use_sliding_window", c.get("use_sliding_window") or False, {False: None})

        heads = c["num_attention_heads"]
        file = path / "generation_config.json"
        generation = read_json(file, {})
        with reading(file):
            sampling = sampling_of(generation)
        eos = generation.get("eos_token_id", c.get("eos_token_id", []))
        if not isinstance(eos, list):
            eos = [eos]
        return cls(
            vocab=c["vocab_size"],
            width=c["hidden_size"],
            inner=c["intermediate_size"],
            layers=c["num_hidden_layers"],
            heads=heads,
            kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            eps=float(c["rms_norm_eps"]),
            theta=float(rope.get("rope_theta") or c.get("rope_theta", 10000.0)),
            qkv_bias=qkv_bias,
            tied=c.get("tie_word_embeddings", False),
            headless=(c.get("architectures") or [""])[0].endswith("Model"),
            window=c.get("sliding_window", 4096) if kind == "mistral" else None,
            eos=tuple(eos),
            sampling=sampling,
        )


def sampling_of(generation):
    """generation_config.json as transformers reads it -> {flag of `generate`: value}."""
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    how = {}
    for name, value in usual.items():
        given = generation.get(name)
        how[name] = value if given is None else type(value)(given)
    if not generation.get("do_sample"):
        how["temperature"] = 0.0
    return how


class RMSNorm(nn.RMSNorm):
    """weight * x / sqrt(mean(x^2) + eps): the mean in fp32, the weight after the cast back."""

    def forward(self, x):
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)


def rope_tables(positions, head_dim, theta):
    """Rotary position embedding: cos and sin (B, 1, T, d), in fp32, for positions (B, T); in the
    first half sin has the other sign, as `rotate` wants it.

    Two dims of a query or key are a point in a plane; the token at position p has it turned by
    p * frequency. So a query times a key depends on their distance alone. Which two dims? Qwen
    couples dim i with i + d/2. For d = 8, where dims of one letter turn together:

        dim               0   1   2   3   4   5   6   7
        here              a   b   c   d   a   b   c   d        x1 = dims 0-3, x2 = dims 4-7
        in flux.py        a   a   b   b   c   c   d   d        neighbours
    """
    dims = torch.arange(0, head_dim, 2, device=positions.device)
    frequency = theta ** -(dims / head_dim)                                # (d/2,): a b c d
    frequency = torch.cat([-frequency, frequency])                         # (d,)
    angle = positions[:, None, :, None].float() * frequency                # (B, 1, T, d)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]: queries and keys x (B, H + G, T, d)."""
    swapped = x.roll(x.shape[-1] // 2, -1)                                 # [x2, x1]
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v, where H / G query heads share one key/value head.

    q (B, H, T, d), k and v (B, G, S, d) -> (B, H, T, d). mask (B, 1, T, S): see `additive`;
    None: a token sees all up to itself. On a GPU flash attention runs where there is no mask, else
    the memory-efficient kernel: see `set_precision`.
    """
    if q.shape[2] != 1:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    # One token: the heads that share a key become that key's queries. So no key is repeated, which
    # in bf16 on a CPU is 10 times faster.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[3])                      # (B, G, H/G, d)
    return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)


class Attention(nn.Module):
    """Self-attention. `Linear` is nn.Linear, only faster on some CPUs: see its section below."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        queries = c.heads * c.head_dim
        keys = c.kv_heads * c.head_dim
        self.q_proj = Linear(c.width, queries, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, keys, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, keys, bias=c.qkv_bias)
        self.o_proj = Linear(queries, c.width, bias=False)

    def split(self, x):
        """(B, T, heads * d) -> (B, heads, T, d)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, rope, mask, past, places):
        """x (B, T, D) -> (B, T, D). `past` (2, B, G, S, d): keys and values of all tokens so far,
        where the new ones go to `places` (T,); None: there is no cache."""
        q = self.split(self.q_proj(x))                                     # (B, H, T, d)
        k = self.split(self.k_proj(x))                                     # (B, G, T, d)
        v = self.split(self.v_proj(x))                                     # (B, G, T, d)
        turned = rotate(torch.cat([q, k], 1), *rope)                       # (B, H + G, T, d)
        q, k = turned.split([q.shape[1], k.shape[1]], 1)
        if past is not None:
            k, v = past.index_copy_(3, places, torch.stack([k, v]))        # (B, G, S, d)
        y = attend(q, k, v, mask)                                          # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))                   # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: a gate for each inner number, times the number, and back to width D."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.width, c.inner, bias=False)
        self.up_proj = Linear(c.width, c.inner, bias=False)
        self.down_proj = Linear(c.inner, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))      # (B, T, D)


class Layer(nn.Module):
    """Attention, then MLP, each on normalised states and added to what was there before."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x, *context):
        """x (B, T, D) -> (B, T, D); `context`: what Attention takes beside x."""
        x = x + self.self_attn(self.input_layernorm(x), *context)          # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))              # (B, T, D)


class Cache:
    """Keys and values of the tokens so far, in buffers for `length` tokens. Their shape never
    changes, nor does a step of decoding: `replayed` and `model.model.compile()` rely on it."""

    def __init__(self, c, batch, length, device, dtype):
        shape = (c.layers, 2, batch, c.kv_heads, length, c.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.held = torch.zeros((), dtype=torch.long, device=device)       # how many tokens so far


def mask_and_positions(attention_mask, places, total):
    """What each new token sees, and its position in its row's text, where padding does not count.

    `places` (T,): where the new tokens stand among the `total` S. attention_mask:
        None            no padding, or none that stands before a token
        (B, up to S)    0 for padding; what stands behind its end are tokens
        (B, 1, T, S)    what each token sees, and how many others these are is its position: so
                        several continuations of a prompt can share a row
    -> mask (B, 1, T, S), True for what is seen, or None as in `attend`; positions (B, T).
    """
    if attention_mask is None:
        return None, places[None]
    if attention_mask.ndim == 4:
        return attention_mask, attention_mask[:, 0].sum(-1) - 1
    real = F.pad(attention_mask.bool(), (0, total - attention_mask.shape[1]), value=True)
    query = places[:, None]                                                # (T, 1)
    key = torch.arange(total, device=real.device)                          # (S,)
    visible = real[:, None, None] | (key == query)    # padding sees itself: an empty row gives NaN
    positions = (real.cumsum(-1) - 1).clamp(min=0)                         # (B, S)
    return (key <= query) & visible, positions[:, places]


def additive(mask, dtype):
    """A mask (B, 1, T, S), True for what a token sees, as what attention adds to q k^T: 0 or -inf.
    Each layer would make that anew; the GPU's kernel wants rows a multiple of 16 numbers apart."""
    S = mask.shape[-1]
    seen = F.pad(mask, (0, -S % 16))
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)[..., :S]


def recomputed(layer, on):
    """The layer; where `on`, as a function that does not store what is inside for the backward
    pass, but computes it again there."""
    return partial(checkpoint, layer, use_reentrant=False) if on else layer


class Decoder(nn.Module):
    """The transformer without its head. `checkpointing`: see `recomputed`."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)

    def forward(self, ids=None, embeds=None, attention_mask=None, cache=None):
        """Token ids (B, T) or vectors (B, T, D) -> hidden states (B, T, D).

        attention_mask as in mask_and_positions; with a cache it begins with the tokens held there.
        ValueError for more tokens than the sliding window."""
        c = self.config
        x = self.embed_tokens(ids) if embeds is None else embeds           # (B, T, D)
        T = x.shape[1]
        S = cache.kv.shape[-2] if cache else T
        if c.window and S > c.window:
            raise ValueError(f"{S} tokens do not fit the model's sliding window of {c.window}")
        places = torch.arange(T, device=x.device)
        if cache:
            places = places + cache.held
            cache.held += T
            if attention_mask is None:
                attention_mask = x.new_ones(1, S)
        mask, positions = mask_and_positions(attention_mask, places, S)
        rope = rope_tables(positions, c.head_dim, c.theta)
        if mask is not None:
            mask = additive(mask, x.dtype)                                 # (B, 1, T, S)
        for i, layer in enumerate(self.layers):
            past = cache and cache.kv[i]
            layer = recomputed(layer, self.checkpointing)
            x = layer(x, rope, mask, past, places)                         # (B, T, D)
        return self.norm(x)


class Qwen(nn.Module):
    """Decoder and head. `model.model` gives hidden states, and `model.lm_head` their logits; it is
    None in an embedding model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        if config.headless:
            self.lm_head = None

    def forward(self, ids=None, attention_mask=None, embeds=None):
        """Token ids (B, T) or vectors (B, T, D) -> logits (B, T, V)."""
        return self.lm_head(self.model(ids, embeds, attention_mask))

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """From a folder or hub repository; frozen, in eval mode. ValueError as in resolve,
        Config.read and load_checkpoint."""
        path = resolve(path)
        with reading(path / "config.json"), on_meta():
            model = cls(Config.read(path))
        load_checkpoint(model, path, cls.rename)
        return model.to(device, dtype).eval().requires_grad_(False)

    @staticmethod
    def rename(stored):
        """Embedding models are stored without the prefix "model."; old files hold RoPE's table."""
        if stored.endswith("rotary_emb.inv_freq"):
            return None
        return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"


# ---- embedding and generation ------------------------------------------------------------------

@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch_size=32):
    """Last-token hidden states of `texts`, L2-normalised in fp32 -> (N, D). ValueError for a text
    without tokens."""
    vectors = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start:start + batch_size]
        rows = [torch.tensor(tokenizer.encode(text, whole=True)) for text in batch]
        last = [len(row) - 1 for row in rows]
        if -1 in last:
            raise ValueError("a text without tokens has no embedding")
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)            # (B, T), pads at right
        hidden = model.model(ids.to(model.model.embed_tokens.weight.device))    # (B, T, D)
        vectors.append(hidden[torch.arange(len(rows)), last])              # (B, D)
    return F.normalize(torch.cat(vectors).float(), dim=-1)


def sample(logits, temperature, top_k, top_p, generator):
    """One token a row from logits (B, V) -> (B,). Temperature 0 takes the likeliest. Otherwise the
    top_k likeliest stay (0: all), of these the fewest that together reach probability top_p, and
    one of them is drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / max(temperature, 1e-9)).softmax(-1)                      # (B, V)
    waits = torch.empty_like(p).exponential_(generator=generator)
    if not top_k and top_p >= 1:
        return (p / waits).argmax(-1)   # torch.multinomial's draw, which makes a GPU wait
    if 0 < top_k < p.shape[-1]:
        p, token = p.topk(top_k)                                           # (B, k), likeliest first
    else:
        p, token = p.sort(descending=True)                                 # k = V
    share = (p / p.sum(-1, keepdim=True) * 2 ** 40).long()     # whole: sums do not depend on order
    before = share.cumsum(-1) - share                                      # of all likelier ones
    p = p.masked_fill(before >= max(top_p, 1e-9) * 2 ** 40, 0)             # never the first
    drawn = (p / waits.gather(-1, token)).argmax(-1, keepdim=True)         # (B, 1)
    return token.gather(-1, drawn)[:, 0]


def replayed(step, token):
    """`step(token)`, a function of fixed shapes that has run before, as a CUDA graph: launching its
    1,000 kernels one by one takes longer than they do."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(token.device), torch.cuda.graph(graph):
            y = step(token)                                                # recorded, not computed
    except RuntimeError:                                                   # something cannot be
        return step

    def again(new):
        token.copy_(new)
        graph.replay()
        return y

    return again


@torch.inference_mode()
def generate(model, ids=None, embeds=None, attention_mask=None, max_new_tokens=64, temperature=0.0,
             top_k=0, top_p=1.0, repetition_penalty=1.0, generator=None, stop=()):
    """Continues prompts of token ids (B, T) or vectors (B, T, D), padded on either side -> B lists
    of new ids, each ending before its eos: the checkpoint's, or an id in `stop`.

    repetition_penalty (CTRL's, as in transformers) makes tokens that stand in the row already less
    likely: the prompt's ids and the new ones, never padding or vectors. Sampling draws from
    `generator` only. ValueError where the logits are not finite."""
    x = model.model.embed_tokens(ids) if embeds is None else embeds        # (B, T, D)
    B, T, _ = x.shape
    if attention_mask is None:
        attention_mask = x.new_ones(B, T)
    seen = torch.zeros(B, model.config.vocab, device=x.device)             # how often in the row
    if ids is not None:
        seen.scatter_add_(1, ids, attention_mask.float())
    cache = Cache(model.config, B, T + max_new_tokens, x.device, x.dtype)

    def step(token):
        hidden = model.model(token, attention_mask=attention_mask, cache=cache)
        return model.lm_head(hidden[:, -1]).float()                        # (B, V)

    hidden = model.model(embeds=x, attention_mask=attention_mask, cache=cache)      # (B, T, D)
    last = attention_mask.long().cumsum(1).argmax(1)                       # (B,): no padding there
    logits = model.lm_head(hidden[torch.arange(B, device=x.device), last]).float()  # (B, V)
    answers = [[] for _ in range(B)]
    running = set(range(B))                                                # rows without end so far
    eos = (*model.config.eos, *stop)
    fresh = []                                                             # not in `answers` yet,
    patience = 8 if x.is_cuda else 1                    # since a look at tokens makes a GPU wait
    for number in range(1, max_new_tokens + 1):
        if repetition_penalty != 1:
            lower = torch.where(logits > 0, logits / repetition_penalty,
                                logits * repetition_penalty)
            logits = torch.where(seen > 0, lower, logits)
        token = sample(logits, temperature, top_k, top_p, generator)       # (B,)
        fresh.append(token)
        if number % patience == 0 or number == max_new_tokens:
            tokens = torch.where(logits.isfinite().all(), torch.cat(fresh), -1).tolist()
            if -1 in tokens:
                raise ValueError("the language model's logits are not finite: spoiled weights?")
            for i, new in enumerate(tokens):
                row = i % B
                if new in eos:
                    running.discard(row)
                if row in running:
                    answers[row].append(new)
            fresh = []
        if number == max_new_tokens or not running:
            break
        seen.scatter_(1, token[:, None], 1.0)
        logits = step(token[:, None])
        if number == 1 and x.is_cuda and torch.backends.cuda.is_built():
            step = replayed(step, token[:, None].clone())
    return answers


# ---- a faster matrix product for frozen weights on a CPU ----------------------------------------

class FrozenProduct(torch.autograd.Function):
    """x W^T + b by oneDNN, where W and b need no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, attr="none", scalars=[], algorithm="")

    @staticmethod
    def backward(ctx, grad):
        return FrozenProduct.apply(grad, ctx.saved_tensors[0].T, None), None, None


def linear(x, weight, bias=None):
    """x W^T + b: F.linear. But in fp32 on a CPU a large frozen W goes to oneDNN, since F.linear
    uses MKL, which on AMD's CPUs takes 1.4 times (one row) to twice (many) as long. torch.compile
    chooses by itself."""
    fp32 = x.dtype == weight.dtype == torch.float32
    frozen = not (weight.requires_grad and torch.is_grad_enabled())
    slow = fp32 and frozen and weight.is_cpu and weight.numel() > 2 ** 18
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")                 # it is private
    if slow and there and not torch.compiler.is_compiling():
        return FrozenProduct.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


# ---- tokenizer ---------------------------------------------------------------------------------

def written(token):
    """A special token of tokenizer_config.json: older files have a dict."""
    return token["content"] if isinstance(token, dict) else token


# The system turn of Qwen2.5, and where another ChatML template writes the one that it begins with.
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
OWN_SYSTEM = (r"(?:<\|im_start\|>system\n|set \w*system\w* = ['\"])([^<{}+~]+?)"
              r"(?:<\|im_end\|>|['\"] ?-?%})")


@dataclass
class Tokenizer:
    """tokenizer.json, with the chat template of Qwen2.5, which is ChatML, written out; `system` is
    said where the messages have no system turn of their own."""
    file: Path
    fast: FastTokenizer
    end: list                     # [the id that ends every text of an embedding model], or []
    system: str = SYSTEM

    @classmethod
    def load(cls, path):
        """From the folder or hub repository that holds tokenizer.json. Of tokenizer_config.json
        add_eos_token counts: e5-mistral's tokenizer.json leaves that end token out, and it is
        the last token whose state embeds a text. Of a ChatML template, there or in
        chat_template.jinja, the default system turn counts; it may have none."""
        path = resolve(path, ["tokenizer*.json", "chat_template.jinja"])
        file = path / "tokenizer.json"
        with reading(file):
            fast = FastTokenizer.from_file(str(file))
        fast.no_padding()
        fast.no_truncation()
        config_file = path / "tokenizer_config.json"
        config = read_json(config_file, {})
        template = str(config.get("chat_template"))
        jinja = path / "chat_template.jinja"
        if jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
        system = SYSTEM
        if "<|im_start|>" in template:
            system = "".join(re.findall(OWN_SYSTEM, template.replace("\\n", "\n"))[:1])
        end = []
        if config.get("add_eos_token"):
            with reading(config_file):
                end.append(fast.get_vocab()[written(config["eos_token"])])
        return cls(file, fast, end, system)

    def encode(self, text, whole=False):
        """list[int]; special tokens written in the text count as such. `whole`: as embedding models
        read a text, between the tokenizer's own tokens (Mistral's <s> and </s>)."""
        ids = self.fast.encode(text, add_special_tokens=whole).ids
        return ids + self.end if whole and ids[-1:] != self.end else ids

    def decode(self, ids):
        """The text of a list of ids, without special tokens."""
        return self.fast.decode(ids)

    def chat(self, messages, add_generation_prompt=True):
        """Token ids of [{"role": "system" | "user" | "assistant", "content": str}, ...] in
        ChatML, as Qwen2.5's template. ValueError for another role, and for a tokenizer of another
        template."""
        for token in ("<|im_start|>", "<|im_end|>"):
            if len(self.encode(token)) != 1:
                raise ValueError(f"{self.file} lacks {token} of Qwen2.5's chat template")
        text = ""
        if self.system and (not messages or messages[0]["role"] != "system"):
            text = f"<|im_start|>system\n{self.system}<|im_end|>\n"
        for message in messages:
            role = message["role"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"unknown role {role!r}: allowed are system, user, assistant")
            text += f"<|im_start|>{role}\n{message['content']}<|im_end|>\n"
        if add_generation_prompt:
            text += "<|im_start|>assistant\n"
        return self.encode(text)


def load_language_model(path, device="cpu", dtype=torch.float32):
    """(Qwen, Tokenizer) of one folder or hub repository. ValueError as their `load` and for token
    ids beyond the embedding."""
    model = Qwen.load(path, device, dtype)
    tokenizer = Tokenizer.load(path)
    largest = max(tokenizer.fast.get_vocab().values(), default=0)
    if largest >= model.config.vocab:
        raise ValueError(f"{path}/tokenizer.json has ids up to {largest}, which do not fit "
                         f"config.json's vocab_size = {model.config.vocab}")
    return model, tokenizer


# ---- reading of checkpoints --------------------------------------------------------------------

def resolve(path_or_repo, patterns=("*.json", "*.safetensors")):
    """The local folder `path_or_repo`, else the hub repository of that name, downloaded (only files
    matching `patterns`) -> Path. ValueError when it is neither."""
    name = str(path_or_repo)
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    if name.count("/") != 1 or path.parent.is_dir():      # mini/qwem is a typo, not a repository
        raise ValueError(
            f"{name!r} is not a folder here, nor a hub repository of the form 'owner/name'")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:                              # whatever the hub refuses is an OSError
        raise ValueError(f"cannot download {name} ({type(error).__name__}): accept its licence at "
                         f"https://huggingface.co/{name} and set HF_TOKEN, or name a local folder "
                         "with its files") from error


@contextlib.contextmanager
def reading(file):
    """Whatever goes wrong inside, but for a full GPU, is the fault of `file`: a ValueError that
    names it. (Each reader trips over something else.)"""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(what_is_wrong(file, error)) from error


def what_is_wrong(file, error):
    """One sentence about `file`, where reading it raised `error`."""
    if isinstance(error, FileNotFoundError):
        return f"there is no file {error.filename or file}"
    if Path(file).is_file():
        with open(file, "rb") as stream:
            if stream.read(20) == b"version https://git-":
                return f"{file} is a git-lfs pointer, not the file itself: `git lfs pull` gets it"
    if isinstance(error, KeyError):
        return f"{file} has no {error}"
    if not isinstance(error, ValueError):
        return f"{file} is truncated or not what is expected: {error!r:.200}"
    return str(error) if str(file) in str(error) else f"{file}: {error}"


def read_json(file, default=None):
    """The JSON object in `file`, `default` where there is no file. ValueError naming a file that
    holds none, or is of quantised weights, or counts layers that would take hours to build."""
    if default is not None and not Path(file).is_file():
        return default
    with reading(file):
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        if value.get("quantization_config"):
            raise ValueError("quantised weights (quantization_config) cannot be read; take the "
                             "checkpoint that they were made from")
        for name, count in value.items():
            if "layers" in name and isinstance(count, int) and count > 1000:
                raise ValueError(f"{name} is {count}, allowed are at most 1000")
        return value


def find_tensors(path, usual=("model.safetensors", "diffusion_pytorch_model.safetensors")):
    """The *.safetensors file `path`; of a folder that with a usual name or its index of shards,
    else the only one. ValueError where there is none, or a choice: of a whole file beside an index
    transformers reads the file, diffusers the shards; model.fp16.safetensors is a variant."""
    path = Path(path)
    if path.is_file():
        return path
    named = [path / f"{name}{end}" for name in usual for end in ("", ".index.json")]
    found = [file for file in named if file.is_file()]
    found += path.glob("*.*.safetensors" if found else "*.safetensors")
    if len(found) != 1:
        raise ValueError(f"{path} must be a *.safetensors file, or hold one, or one index of "
                         f"shards; found: {few([file.name for file in found]) or 'none'}")
    return found[0]


def read_tensors(path):
    """The checkpoint in the file or folder `path`, see find_tensors -> {name: tensor},
    memory-mapped (the file never changes). ValueError naming what is absent or truncated."""
    file = find_tensors(path)
    files = [file]
    if file.suffix == ".json":
        with reading(file):
            shards = read_json(file)["weight_map"].values()
            files = [file.parent / shard for shard in sorted(set(shards))]
    tensors = {}
    for file in files:
        with reading(file):
            for name, tensor in load_file(file).items():
                put(tensors, [name], tensor)
    return tensors


def put(tensors, names, tensor):
    """tensors[name] = tensor, for all `names` of one parameter. ValueError where they have another
    tensor already."""
    if names[0] in tensors and not torch.equal(tensors[names[0]], tensor):
        raise ValueError(f"two different tensors are stored for {' = '.join(names)}")
    tensors.update(dict.fromkeys(names, tensor))


def few(names):
    """The first two of a list, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def check_fit(what, expected, stored, finite=False):
    """ValueError naming tensors of {name: tensor} `stored` that `expected` lacks, or the other way
    round, of another shape, of integers, or (finite) with nan or inf: a few of each kind."""
    missing = [f"missing {name}" for name in expected if name not in stored]
    unexpected = [f"unexpected {name}" for name in stored if name not in expected]
    wrong = []
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name].shape:
            wrong.append(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        if not tensor.is_floating_point() or finite and not tensor.float().isfinite().all():
            wrong.append(f"{name} is {tensor.dtype}, or not finite")
    faults = [few(kind) for kind in (missing, unexpected, wrong) if kind]
    if faults:
        raise ValueError(f"{what} does not fit: {'; '.join(faults)}")


@contextlib.contextmanager
def on_meta():
    """New modules have no memory here, and embeddings, about to be loaded, are not drawn at random:
    on the meta device torch imports its compiler (3 s) to do so."""
    with torch.device("meta"), mock.patch.object(nn.init, "normal_"):
        yield


def choose(name, value, allowed):
    """allowed[value], or a ValueError that names the setting, its value and what can be read."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; only {', '.join(map(repr, allowed))} can be read")
    return allowed[value]


def load_checkpoint(module, path, rename=lambda name: name):
    """Strict copy of the checkpoint at `path` into `module`. A module on the meta device takes the
    memory-mapped tensors themselves.

    `rename(name)` says what a stored tensor is called in the module, None to leave it out. Of tied
    parameters one name is enough, and several must hold the same. ValueError as in read_tensors
    and check_fit."""
    own = module.state_dict(keep_vars=True)
    stored = {}
    for name, tensor in read_tensors(path).items():
        name = rename(name)
        if name:
            tied = [other for other, parameter in own.items() if parameter is own.get(name)]
            with reading(path):
                put(stored, tied or [name], nn.Parameter(tensor, False))    # one object for all
    check_fit(path, own, stored)
    module.load_state_dict(stored, assign=any(tensor.is_meta for tensor in own.values()))


# ---- what every stage of training and every script shares --------------------------------------

def flag(mini, paper, about, bounds=None, small=None, **how):
    """A row of a table of settings, as the field of a dataclass: the miniature's value, the
    paper's, and what it is. `small`: the value for real models of 0.1 to 1 B parameters; what is
    not said is the paper's name (of a file, a model, a type), and the miniature's number.
    `bounds`: (low, high) of a number, see `settings_from`; `how`: of argparse's add_argument
    (choices, nargs, ...)."""
    if small is None:
        small = paper if isinstance(mini, str) else mini
    return field(default=mini, metadata={
        "mini": mini, "small": small, "paper": paper, "about": about, "bounds": bounds, "how": how})


def shipped(default):
    """A default in mini/ lies beside this file, wherever the user stands."""
    here = Path(__file__).resolve().parent
    outside = str(default).startswith("mini/") and Path.cwd() != here
    return str(here / default) if outside else default


def flag_name(field_name):
    return f"--{field_name.replace('_', '-')}"


def add_flags(parser, settings, preset="mini"):
    """One --flag for each field of the dataclass `settings`; the preset's column is the default."""
    for row in fields(settings):
        value = row.metadata[preset]
        about = row.metadata["about"]
        how = {"type": row.type, **row.metadata["how"]}
        if row.type is bool:
            how = {"action": "store_true"}
        elif value not in (None, ""):
            about += f" (default: {value})"
        parser.add_argument(flag_name(row.name), default=shipped(value), help=about, **how)


def settings_from(args, settings):
    """The fields of the dataclass `settings` out of parsed flags. ValueError for a number out of
    its bounds. Without bounds of its own a number is at least 0, an int that is 0 in neither preset
    at least 1, and none is beyond 1e13: AdamW's steps must fit into fp32, seeds into 64 bits."""
    values = {}
    for row in fields(settings):
        value = values[row.name] = getattr(args, row.name)
        never_0 = row.type is int and 0 not in (row.metadata["mini"], row.metadata["paper"])
        low, high = row.metadata["bounds"] or (int(never_0), 10 ** 13)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(
                f"{flag_name(row.name)} is {value}; it must lie in {low} .. {high}")
    return settings(**values)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DETERMINISTIC = "on a GPU the same bits in every run, products in full fp32: slower"


@dataclass
class TrainSettings:
    """What the stages beside a large model share; a stage's own table may say otherwise.
                                miniature, paper, what it is"""
    dtype:         str   = flag("fp32", "bf16", "of the frozen weights; what is trained is fp32",
                                choices=DTYPES)
    checkpointing: bool  = flag(False, True, "recompute layers: less memory, a third more time")
    warmup:        int   = flag(10, 0, "steps of linear warm-up before the cosine (ours)")
    weight_decay:  float = flag(0.0, 0.0, "AdamW's (ours)")
    clip:          float = flag(1.0, 1.0, "largest gradient norm; 0 never clips (ours)")
    seed:          int   = flag(0, 0, "of everything random")
    device:        str   = flag("", "", "cpu, cuda, cuda:1 ...; the best there is when not given")
    deterministic: bool  = flag(False, False, DETERMINISTIC)


def set_precision(deterministic=False):
    """How a GPU computes, for all files; on a CPU no bit changes. What is in fp32 beside a model in
    bf16 (LoRA's products, the autoencoder) runs in TF32, which has 3 bits more than bf16 and its
    speed. `deterministic`: in full fp32, and without atomics, in attention's gradients neither.
    cuDNN's attention is never taken, since it plans (1 s) for every new shape."""
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():      # the call takes 1 s
        torch.use_deterministic_algorithms(deterministic)


def pick_device(name):
    """`name`, or, where it is empty, the best device there is: under torchrun a GPU for each
    process. ValueError when torch cannot work there."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device is {name}, which cannot be used here: "
                         f"{str(error).splitlines()[0]}") from None
    return name


def moved(values, device):
    """A small tensor or list of the CPU's, without waiting for what the GPU still computes."""
    return torch.as_tensor(values).to(device, non_blocking=True)


def seed_for(*what):
    """A seed that depends on `what` (the run's seed, the step, ...) and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7])


def generator_for(*what):
    return torch.Generator().manual_seed(seed_for(*what))


RANK = int(os.environ.get("RANK", 0))                     # torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def collective(operation, *tensors):
    """A collective operation of torch.distributed, where there are several processes. ValueError
    when one of them is gone."""
    if WORLD == 1:
        return
    try:
        operation(*tensors)
    except RuntimeError as error:
        raise ValueError(
            f"process {RANK} of {WORLD}: another process of this run died "
            f"({str(error).splitlines()[0]}); the same command continues from the last step_N"
        ) from None


def all_reduce(tensor):
    """Sum of the processes' tensors, in place."""
    collective(torch.distributed.all_reduce, tensor)


def barrier():
    """Wait for all processes."""
    collective(torch.distributed.barrier)


def fingerprint(text):
    """Of the name of a folder: a hash of all in it but resume points. Of the name of a file: a hash
    of it and of the pictures that it names, as a table does. Other text stands for itself."""
    path = Path(text).expanduser()
    if not text or not path.exists():
        return text
    files = [path]
    if path.is_dir():
        names = glob.glob("**", root_dir=path, recursive=True)
        files = [path / name for name in names if not name.startswith("step_")]
    else:
        string = rb'"(?:[^"\\]|\\.)*"'
        pictures = rb'"(?:image|references)"\s*:\s*(\[(?:[^"\]]|%b)*\]|%b)' % (string, string)
        for found in re.findall(pictures, path.read_bytes()):
            files += [path.parent / json.loads(name) for name in re.findall(string, found)]
    h = hashlib.sha256()
    for file in sorted(set(files)):
        if file.is_file():
            h.update(os.fsencode(file.name))
            with open(file, "rb") as stream:
                h.update(hashlib.file_digest(stream, "sha256").digest())
    return h.hexdigest()[:16]


def write_whole(folder, write, what):
    """`write(temporary folder)`, then move the result to `folder` (new), or its files into it, one
    after the other: a reader sees each whole or not at all, also when this process is killed.
    ValueError when the disk refuses; `what` names it then."""
    temporary = (folder if folder.is_dir() else folder.parent) / f".tmp_{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if folder.is_dir():
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
        else:
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"could not write {what} to {folder}: {error}; what was saved before is intact"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    model, tokenizer = load_language_model(shipped("mini/qwen"))
    ids = tokenizer.chat([{"role": "user", "content": "Caption: A white bowl in front of a wall"}])
    (answer,) = generate(model, torch.tensor([ids]))
    print(tokenizer.decode(answer))
