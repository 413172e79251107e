"""Qwen2.5 in plain torch: the checked checkpoint loader, tokenizer and chat template, forward pass, KV cache, batched generation.

Reads Qwen2 and Mistral checkpoints as they are published; every size comes from their config.json, every parameter has its name there.
Conventions: B batch, T new tokens, S all tokens so far, D width, H heads, G key/value heads, d width of a head, V vocabulary.
attention_mask is (B, S), 1 for a token and 0 for padding, which may stand on either side. Try it: python qwen.py
"""
import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- tokenizer ---------------------------------------------------------------------------------------------------------------
class Tokenizer:
    """tokenizer.json, with Qwen's chat template written out."""
    def __init__(self, fast, end):
        self.fast, self.end = fast, end                   # end: [the id that ends every text of an embedding model], or []

    @classmethod
    def load(cls, path):
        """From the folder or hub repository that holds tokenizer.json (and tokenizer_config.json, of which only add_eos_token counts)."""
        path = resolve(path, ["tokenizer*.json"])
        with reading(path / "tokenizer.json"):
            fast = FastTokenizer.from_file(str(path / "tokenizer.json"))
        fast.no_padding(), fast.no_truncation()
        config = read_json(path / "tokenizer_config.json", {})
        eos = config.get("eos_token") if config.get("add_eos_token") else None      # e5-mistral's tokenizer.json leaves it out, and the last token is what counts
        return cls(fast, [fast.token_to_id(eos["content"] if isinstance(eos, dict) else eos)] if eos else [])

    def encode(self, text):
        """list[int]; special tokens written in the text count as such, and the tokenizer's own (Mistral's <s>) are added."""
        ids = self.fast.encode(text).ids
        return ids if ids[-1:] == self.end else ids + self.end

    def decode(self, ids):
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True):
        """Token ids of [{"role": "system" | "user" | "assistant", "content": str}, ...] in Qwen2.5's template."""
        if unknown := {m["role"] for m in messages} - {"system", "user", "assistant"}:
            raise ValueError(f"unknown role {unknown}: allowed are system, user, assistant")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}, *messages]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return self.encode(text + "<|im_start|>assistant\n" * add_generation_prompt)

# ---- model -------------------------------------------------------------------------------------------------------------------
@dataclass
class Config:
    """What config.json says, in the words of the code below."""
    vocab: int
    width: int                    # D
    inner: int                    # width inside the MLP
    layers: int
    heads: int                    # H
    kv_heads: int                 # G
    head_dim: int                 # d
    eps: float
    theta: float                  # base of RoPE's frequencies
    qkv_bias: bool
    tied: bool                    # the head is the embedding
    headless: bool                # an embedding model, stored without head
    window: int | None            # Mistral's sliding window; longer texts are refused, shorter ones never notice it
    eos: tuple                    # ids that end an answer

    @classmethod
    def read(cls, path):
        """From config.json and generation_config.json; ValueError for a model type, rope scaling or activation that is not written here."""
        c = read_json(Path(path) / "config.json")
        kind, rope = c.get("model_type"), c.get("rope_parameters") or c.get("rope_scaling") or {}
        for name, value, allowed in (("model_type", kind, ("qwen2", "mistral")), ("rope scaling", rope.get("rope_type", rope.get("type", "default")), ("default",)),
                                     ("hidden_act", c.get("hidden_act", "silu"), ("silu",)), ("use_sliding_window", c.get("use_sliding_window", False), (False, None))):
            if value not in allowed:
                raise ValueError(f"{path}/config.json: {name} {value!r}, allowed: {', '.join(map(repr, allowed))}")
        eos = read_json(Path(path) / "generation_config.json", {}).get("eos_token_id", c.get("eos_token_id"))
        return cls(vocab=c["vocab_size"], width=c["hidden_size"], inner=c["intermediate_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
                   kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
                   eps=float(c["rms_norm_eps"]), theta=float(rope.get("rope_theta") or c.get("rope_theta", 10000.0)), qkv_bias=kind == "qwen2",
                   tied=c.get("tie_word_embeddings", False), headless=(c.get("architectures") or ["ForCausalLM"])[0].endswith("Model"),
                   window=c.get("sliding_window") if kind == "mistral" else None, eos=tuple(map(int, eos if isinstance(eos, list) else [] if eos is None else [eos])))

class FrozenProduct(torch.autograd.Function):
    """x W^T + b for a frozen W, by oneDNN."""
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        return FrozenProduct.apply(grad, ctx.saved_tensors[0].T, None), None, None

def linear(x, weight, bias=None):
    """x W^T + b. In fp32 on a CPU a large frozen W goes to oneDNN: F.linear uses MKL, which on AMD's CPUs takes 1.4 times (one row) to twice (many) as long."""
    frozen = not (weight.requires_grad and torch.is_grad_enabled()) and weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    large = weight.numel() > 2 ** 18 and not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available()      # torch.compile chooses by itself
    return (FrozenProduct.apply if frozen and large else F.linear)(x, weight, bias)

class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)       # cast first, then the weight

def rope_tables(positions, head_dim, theta):
    """cos, sin (B, 1, T, d) in fp32. Qwen couples dim i with i + d/2:  [x1 x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device) / head_dim)     # (d/2,)
    angle = positions[:, None, :, None].float() * torch.cat([frequency, frequency])              # (B, 1, T, d)
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-x2, x1], dim=-1) * sin).to(x.dtype)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(c.width, n * c.head_dim, bias=c.qkv_bias) for n in (c.heads, c.kv_heads, c.kv_heads))
        self.o_proj = Linear(c.heads * c.head_dim, c.width, bias=False)

    def forward(self, x, cos, sin, mask, past, new):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))   # (B, H or G, T, d)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:                                                                     # (2, B, G, S, d), of all tokens so far: the new ones go to places `new`
            k, v = past.index_copy_(3, new, torch.stack([k, v]))                                 # (B, G, S, d)
        if q.shape[2] == 1:             # one token: the heads that share a key become its queries, so no key is repeated (in bf16 on a CPU 10 times faster)
            y = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, self.head_dim), k, v, mask).reshape(q.shape)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))                                         # (B, T, D)

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(c.width, c.inner, bias=False) for _ in range(2))
        self.down_proj = Linear(c.inner, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))                       # SwiGLU

class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.width, c.eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.width, c.eps), MLP(c)

    def forward(self, x, cos, sin, mask, past, new):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, past, new)
        return x + self.mlp(self.post_attention_layernorm(x))

class Cache:
    """Keys and values in buffers for `length` tokens. Their shape never changes, nor does a step of decoding: `model.model.compile()` makes it one graph."""
    def __init__(self, c, batch, length, device, dtype):
        self.kv = torch.zeros(c.layers, 2, batch, c.kv_heads, length, c.head_dim, device=device, dtype=dtype)
        self.held = torch.zeros((), dtype=torch.long, device=device)                             # tokens so far; Decoder.forward advances it

class Decoder(nn.Module):
    """The transformer without its head. `checkpointing = True` recomputes each layer in the backward pass."""
    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)

    def forward(self, ids=None, embeds=None, attention_mask=None, cache=None):
        """Token ids (B, T) or vectors (B, T, D) -> hidden states (B, T, D). With a cache, attention_mask covers old and new tokens. Padding on the right needs none.
        A mask (B, 1, T, T) says which tokens each one sees, and how many others these are is its position: so several continuations of a prompt share a row."""
        x, c = self.embed_tokens(ids) if embeds is None else embeds, self.config                 # (B, T, D)
        new, S = torch.arange(x.shape[1], device=x.device), cache.kv.shape[-2] if cache else x.shape[1]
        if c.window and S > c.window:
            raise ValueError(f"{S} tokens do not fit the model's sliding window of {c.window}")
        if cache:
            new = new + cache.held                                                               # (T,) where the new tokens stand
            cache.held += len(new)
            attention_mask = torch.ones(1, S, device=x.device) if attention_mask is None else attention_mask
        if attention_mask is None:
            mask, positions = None, new[None]                                                    # (B, 1, T, S) or None, (B, T)
        elif attention_mask.ndim == 4:
            mask, positions = attention_mask, attention_mask[:, 0].sum(-1) - 1
        else:
            real, q, k = F.pad(attention_mask.bool(), (0, S - attention_mask.shape[1])), new[:, None], torch.arange(S, device=x.device)
            mask = (k <= q) & (real[:, None, None] | (k == q))                                   # padding sees itself: an empty row would be NaN
            positions = (real.cumsum(-1) - 1).clamp(min=0)[:, new]
        cos, sin = rope_tables(positions, c.head_dim, c.theta)
        for i, layer in enumerate(self.layers):
            args = (x, cos, sin, mask, cache and cache.kv[i], new)
            x = checkpoint(layer, *args, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else layer(*args)
        return self.norm(x)

class Qwen(nn.Module):
    """Decoder and head: model(ids) -> logits (B, T, V). `model.model` gives hidden states, `model.lm_head` (None in an embedding model) logits."""
    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        self.lm_head = None if config.headless else Linear(config.width, config.vocab, bias=False)
        if config.tied and not config.headless:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids=None, attention_mask=None, embeds=None):
        return self.lm_head(self.model(ids, embeds, attention_mask))

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """From a folder or hub repository; frozen, in eval mode. ValueError as in resolve, Config.read and load_checkpoint."""
        path = resolve(path, ["*.json", "*.safetensors"])
        with reading(path), torch.device("meta"), Unfilled():
            model = cls(Config.read(path))
        load_checkpoint(model, path, lambda name: name if name.startswith(("model.", "lm_head.")) else "model." + name)      # embedding models omit "model."
        return model.to(device, dtype).eval().requires_grad_(False)

@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch_size=32):
    """Last-token hidden states of `texts`, L2-normalised in fp32 -> (N, D)."""
    out, device = [], model.model.embed_tokens.weight.device
    for i in range(0, len(texts), batch_size):
        rows = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in texts[i:i + batch_size]]
        if not all(map(len, rows)):
            raise ValueError(f"a text without tokens has no embedding: {texts[i:i + batch_size]}")
        hidden = model.model(nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device))       # (B, T, D), padded on the right
        out.append(F.normalize(hidden[torch.arange(len(rows)), [len(row) - 1 for row in rows]].float(), dim=-1))
    return torch.cat(out)

def sample(logits, temperature, top_k, top_p, generator):
    """One token a row from logits (B, V) -> (B,): temperature, then top_k, then top_p; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        outside = p.cumsum(-1) - p >= max(top_p, 1e-9)                                           # the tokens before it are enough; the first stays
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

@torch.inference_mode()
def generate(model, ids=None, embeds=None, attention_mask=None, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """Continue prompts of token ids (B, T) or vectors (B, T, D), padded on either side -> list of B lists of new ids, each ending before its eos.
    repetition_penalty counts the prompt's ids and the new ones, never padding or vectors. Sampling draws from `generator` only."""
    x = model.model.embed_tokens(ids) if embeds is None else embeds                              # (B, T, D)
    (B, T, _), device = x.shape, x.device
    real = torch.ones(B, T, device=device) if attention_mask is None else attention_mask.float()                 # (B, T)
    mask = F.pad(real, (0, max_new_tokens), value=1.0)                                           # (B, S)
    last = torch.arange(B, device=device), (real * torch.arange(T, device=device)).argmax(-1)    # where each row's newest token stands in x
    seen = torch.zeros(B, model.config.vocab, device=device)                                     # how often each token stands in the row
    if ids is not None:
        seen.scatter_add_(1, ids, real)
    new, eos = torch.empty(B, 0, dtype=torch.long, device=device), torch.tensor(model.config.eos, device=device)
    cache = Cache(model.config, B, T + max_new_tokens, device, x.dtype)
    while new.shape[1] < max_new_tokens and not torch.isin(new, eos).any(-1).all():
        logits = model.lm_head(model.model(embeds=x, attention_mask=mask, cache=cache)[last]).float()            # (B, V), of each row's newest token
        if not logits.isfinite().all():
            raise ValueError("the language model's logits are not finite: a spoiled checkpoint or adapter, or numbers too large for its type")
        if repetition_penalty != 1:
            logits = torch.where(seen > 0, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
        token = sample(logits, temperature, top_k, top_p, generator)[:, None]                    # (B, 1)
        new = torch.cat([new, token], dim=1)                                                     # (B, so far)
        seen.scatter_(1, token, 1.0)
        x, last = model.model.embed_tokens(token), (slice(None), 0)
    return [row[:next((i for i, t in enumerate(row) if t in model.config.eos), len(row))] for row in new.tolist()]

# ---- checkpoints -------------------------------------------------------------------------------------------------------------
def resolve(path_or_repo, patterns=None):
    """The local folder `path_or_repo`, else the hub repository of that name, downloaded (only files matching `patterns`) -> Path; ValueError when it is neither."""
    path, name = Path(os.path.expanduser(path_or_repo)), str(path_or_repo)
    if name and path.is_dir():
        return path
    if name.count("/") != 1 or path.parent.is_dir():      # mini/qwem is a typo, not a repository
        raise ValueError(f"{name!r} is not a folder here, nor a hub repository of the form 'owner/name'")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:                              # the hub's refusals, and a hub out of reach, are all OSErrors
        advice = f"accept its licence at https://huggingface.co/{name} and set HF_TOKEN, or name a local folder with its files"
        raise ValueError(f"cannot download {name} ({type(error).__name__}): {advice}") from error

@contextlib.contextmanager
def reading(file):
    """Whatever goes wrong inside, but for a full GPU, is the fault of `file`: a ValueError that names it (each reader trips over something else)."""
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or isinstance(error, ValueError) and str(file) in str(error):
            raise
        raise ValueError(f"{file} is truncated, absent or not what is expected: {type(error).__name__}: {error}") from error

def read_json(file, default=None):
    """The JSON object in `file`, `default` where there is no file. ValueError naming a file that holds none, or counts layers that would take hours to build."""
    if default is not None and not Path(file).is_file():
        return default
    with reading(file):
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        if vast := [f"{name} is {n}" for name, n in value.items() if "layers" in name and isinstance(n, int) and n > 1000]:
            raise ValueError(f"{vast[0]}, allowed are at most 1000")
        return value

def read_tensors(path):
    """A safetensors file, or a folder with one, or with shards and their index -> {name: tensor}, memory-mapped (the file never changes)."""
    path, tensors = Path(path), {}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path} must be a *.safetensors file, or hold one, or one index of shards; found: {[f.name for f in files] or 'none'}")
    if files[0].suffix == ".json":
        with reading(files[0]):
            files = [path / name for name in sorted(set(read_json(files[0])["weight_map"].values()))]
    for file in files:
        with reading(file):
            tensors |= load_file(file)
    return tensors

def check_fit(what, expected, stored, finite=False):
    """ValueError naming every tensor of {name: tensor} `stored` that `expected` lacks, or the other way round, of another shape, of integers, or (finite) nan or inf."""
    faults = [f"missing {name}" for name in expected if name not in stored] + [f"unexpected {name}" for name in stored if name not in expected]
    faults += [f"{name} has shape {tuple(t.shape)}, expected {tuple(expected[name].shape)}" for name, t in stored.items()
               if name in expected and t.shape != expected[name].shape]
    faults += [f"{name} is {t.dtype}, or not finite" for name, t in stored.items() if not t.is_floating_point() or finite and not t.float().isfinite().all()]
    if faults:
        raise ValueError(f"{what} does not fit: {'; '.join(faults)}")

class Unfilled(torch.overrides.TorchFunctionMode):
    """In this context new modules, whose weights are about to be loaded, are not drawn at random: on the meta device torch imports its compiler (3 s) to do so."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))

def load_checkpoint(module, path, rename=lambda name: name):
    """Strict copy of the checkpoint at `path` into `module`; a module on the meta device takes the memory-mapped tensors themselves.
    `rename(name)` says what a stored tensor is called in the module, None to leave it out. Of tied parameters one name is enough. ValueError as in check_fit."""
    own, first = module.state_dict(keep_vars=True), {}
    main = {name: first.setdefault(id(tensor), name) for name, tensor in own.items()}            # tied parameters go by their first name
    stored = {main.get(new, new): nn.Parameter(t, False) for name, t in read_tensors(path).items() if (new := rename(name))}
    check_fit(path, {name: own[name] for name in first.values()}, stored)
    module.load_state_dict({name: stored[main[name]] for name in own}, assign=any(t.is_meta for t in own.values()))


@contextlib.contextmanager
def on_meta():
    """New modules have no memory here, and their weights, about to be loaded, are not drawn."""
    with torch.device("meta"), Unfilled():
        yield


def choose(name, value, allowed):
    """allowed[value], or a ValueError that names the setting, its value and what can be read."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; only {', '.join(map(repr, allowed))} can be read")
    return allowed[value]


# ---- what every stage of training and every script shares --------------------------------------

def flag(mini, paper, about, **how):
    """A row of a table of settings, as the field of a dataclass: the miniature's value, the
    paper's, and what it is. `how`: of argparse's add_argument (choices, nargs, ...), and
    `bounds` = (low, high) for a number; see `check_settings` for those that have none."""
    return field(default=mini, metadata={"mini": mini, "paper": paper, "about": about, "how": how})


def add_flags(parser, settings, preset="mini"):
    """One --flag for each field of the dataclass `settings`, with the preset's column as default."""
    for row in fields(settings):
        value = row.metadata[preset]
        how = {"type": row.type, **row.metadata["how"]}
        how.pop("bounds", None)
        if row.type is bool:
            how = {"action": "store_true"}
        shown = "" if value in (None, "") or row.type is bool else f" (default: {value})"
        name = "--" + row.name.replace("_", "-")
        parser.add_argument(name, default=value, help=row.metadata["about"] + shown, **how)


def check_settings(settings):
    """ValueError for a number out of its bounds. Without bounds of its own an int is at least 1, a
    float at least 0, and neither is beyond 1e13: AdamW's steps and seeds must fit."""
    for row in fields(settings):
        value = getattr(settings, row.name)
        if row.type not in (int, float) or value is None:
            continue
        usual = (1 if row.type is int else 0, 10 ** 13)
        low, high = row.metadata["how"].get("bounds", usual)
        if not low <= value <= high:
            name = "--" + row.name.replace("_", "-")
            raise ValueError(f"{name} is {value}; it must lie in {low} .. {high}")
    return settings


def settings_from(args, settings):
    """The fields of the dataclass `settings` out of parsed flags, checked."""
    return check_settings(settings(**{row.name: getattr(args, row.name) for row in fields(settings)}))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name):
    """`name`, or, where it is empty, the best device there is: under torchrun a GPU for each
    process. ValueError when torch cannot work there."""
    several = WORLD > 1 and name in ("", "cuda") and torch.cuda.is_available()
    best = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if several else name or best
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition(". ")[0].splitlines()[0]
        raise ValueError(f"--device is {name}, which cannot be used here: {reason}") from None
    return name


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
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"another process of this run is gone ({reason}); the same command "
                         "continues from the last checkpoint") from None


def all_reduce(tensor):
    """Sum of the processes' tensors, in place."""
    collective(dist.all_reduce, tensor)


def barrier():
    """Wait for all processes."""
    collective(dist.barrier)


def write_whole(folder, write, what):
    """`write(temporary folder)`, then move the result to `folder` (new), or its files into it:
    a reader sees all of it or nothing, also when this process is killed. ValueError when the
    disk refuses; `what` names it then."""
    temporary = (folder if folder.is_dir() else folder.parent) / f".tmp_{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if not folder.exists():
            os.replace(temporary, folder)
            return
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"could not write {what} to {folder}: {error}; "
                         "what was saved before is intact") from None


if __name__ == "__main__":
    qwen, tokenizer = Qwen.load("mini/qwen"), Tokenizer.load("mini/qwen")
    prompt = tokenizer.chat([{"role": "user", "content": "Suggest a single, cohesive image-editing instruction\nCaption: A white bowl in front of a grey wall"}])
    print(f"{len(prompt)} tokens, continued by {tokenizer.decode(generate(qwen, torch.tensor([prompt]))[0])!r}")
