"""FLUX.1 in plain torch: two text encoders, a 16-channel autoencoder, the transformer, and an Euler sampler for its rectified flow.

    prompt --CLIP--> pooled --+-- timestep, guidance --> modulation of every block (shift, scale, gate)
    prompt --T5----> txt -----|------------------------> [txt, img] attend to each other: double blocks, then single blocks --> velocity
    picture --VAE--> latent --+- pack 2x2 -> img tokens

Conventions: t = 1 is noise.  x_t = (1-t) x_0 + t eps,  v = eps - x_0,  Euler: x += (t_next - t) v.
RoPE couples neighbouring pairs (2i, 2i+1), not halves as Qwen's does. Positions, timesteps and RoPE tables stay fp32 whatever the weights are.
Shapes: B batch, T text tokens, L image tokens, D width, H heads, d head width; C, h, w channels, height, width of a latent.
Sizes come from each folder's config.json (dev, schnell, the miniature); parameter names are the public checkpoints'. Try it: python flux.py
"""
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.utils.checkpoint import checkpoint
from qwen import Linear, RMSNorm, Unfilled, load_checkpoint, read_json, reading

class Pretrained(nn.Module):
    """A module built from a checkpoint's config dict. `kind`: what config.json must call it; `rename`: as in load_checkpoint."""
    kind, rename = "", staticmethod(lambda name: name)
    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """`path`: the folder of one part, e.g. FLUX.1-dev/transformer. ValueError when its config.json is of another kind or a tensor does not fit."""
        with reading(file := Path(path) / "config.json"), torch.device("meta"), Unfilled():
            config = read_json(file)
            choose("the kind of model", config.get("_class_name") or config.get("model_type"), {cls.kind: cls})
            model = cls(config)
        load_checkpoint(model, path, cls.rename)
        return model.to(device, dtype).eval()

def choose(name, value, allowed):
    """allowed[value], or a ValueError that names the setting, its value and what would have been read."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; only {', '.join(map(repr, allowed))} can be read")
    return allowed[value]

def chain(**modules):
    """Modules that run one after the other, under the names of the checkpoint."""
    return nn.Sequential(OrderedDict(modules))

def self_attention(x, heads, q, k, v, out, **how):
    """Softmax attention of x (B, T, D) to itself through four linear layers; `how`: of scaled_dot_product_attention."""
    q, k, v = (proj(x).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (q, k, v))        # (B, H, T, d)
    return out(F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2))

# ---- the prompt: tokens, CLIP, T5 --------------------------------------------------------------------------------------------
class TextTokenizer:
    """Prompts -> ids (N, T), cut or padded to model_max_length of tokenizer_config.json. `path`: the folder `tokenizer` (CLIP, 77) or `tokenizer_2` (T5, 512)."""
    def __init__(self, path):
        file, config = Path(path) / "tokenizer.json", read_json(Path(path) / "tokenizer_config.json")
        with reading(path):
            pad, length = config["pad_token"], config["model_max_length"]
            self.backend = Tokenizer.from_file(str(file)) if file.is_file() else clip_bpe(Path(path))
            self.backend.enable_truncation(length)
            self.backend.enable_padding(length=length, pad_id=self.backend.token_to_id(pad), pad_token=pad)

    def __call__(self, prompts):
        return torch.tensor([e.ids for e in self.backend.encode_batch(list(prompts))])

def clip_bpe(path):
    """CLIP's lower-casing byte-level BPE from vocab.json and merges.txt."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"), unk_token=end, end_of_word_suffix="</w>"))
    merges = [line for line in (path / "merges.txt").read_text(encoding="utf-8").split("\n") if line and not line.startswith("#version")]
    if bpe.get_vocab_size() != 514 + len(merges):          # 256 bytes, the same at a word's end, two special tokens; the rest are merges
        raise ValueError(f"merges.txt holds {len(merges)} merges, vocab.json {bpe.get_vocab_size() - 514}")
    bpe.add_special_tokens([AddedToken(start, normalized=False), AddedToken(end, normalized=False)])
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.post_processor = processors.RobertaProcessing((end, bpe.token_to_id(end)), (start, bpe.token_to_id(start)))
    return bpe

class CLIPText(Pretrained):
    """CLIP's text tower; clip(ids (B, T)) -> pooled (B, D): the last layer at the end-of-text token."""
    kind = "clip_text_model"
    rename = staticmethod(lambda name: name if name.startswith("text_model.") else "text_model." + name)    # transformers 5 saves them without the prefix
    def __init__(self, config):
        super().__init__()
        width, hidden, self.heads, self.end = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"], config["eos_token_id"]
        self.activation = choose("hidden_act", config["hidden_act"], {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu})
        def layer():
            attention = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
            mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
            return nn.ModuleDict({"self_attn": attention, "layer_norm1": nn.LayerNorm(width), "mlp": mlp, "layer_norm2": nn.LayerNorm(width)})
        encoder = nn.ModuleDict({"layers": nn.ModuleList([layer() for _ in range(config["num_hidden_layers"])])})
        embeddings = {"token_embedding": nn.Embedding(config["vocab_size"], width), "position_embedding": nn.Embedding(config["max_position_embeddings"], width)}
        self.text_model = nn.ModuleDict({"embeddings": nn.ModuleDict(embeddings), "encoder": encoder, "final_layer_norm": nn.LayerNorm(width)})

    def forward(self, ids):
        model = self.text_model
        x = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight[:ids.shape[1]]  # (B, T, D)
        for layer in model.encoder.layers:
            x = x + self_attention(layer.layer_norm1(x), self.heads, *layer.self_attn.values(), is_causal=True)
            x = x + layer.mlp.fc2(self.activation(layer.mlp.fc1(layer.layer_norm2(x))))
        # The public config says eos_token_id 2, which is wrong: there, and only there, the end is the highest id. Padding repeats it: take the first.
        end = ids.argmax(1) if self.end == 2 else (ids == self.end).int().argmax(1)     # (B,)
        return model.final_layer_norm(x[torch.arange(len(ids)), end])                   # (B, D)

class T5(Pretrained):
    """T5 v1.1's encoder; t5(ids (B, T)) -> (B, T, D). Padding is read like text, as FLUX.1 was trained."""
    kind = "t5"
    rename = staticmethod(lambda name: None if name == "encoder.embed_tokens.weight" else name)  # some files hold the embedding twice
    def __init__(self, config):
        super().__init__()
        choose("feed_forward_proj", config["feed_forward_proj"], {"gated-gelu": None})
        width, hidden, eps, self.heads = config["d_model"], config["d_ff"], config["layer_norm_epsilon"], config["num_heads"]
        self.buckets, self.max_distance = config["relative_attention_num_buckets"], config.get("relative_attention_max_distance", 128)
        inner = self.heads * config["d_kv"]
        def block(i):                   # only the first has a bias
            attention = {name: nn.Linear(width, inner, bias=False) for name in ("q", "k", "v")} | {"o": nn.Linear(inner, width, bias=False)}
            bias = {} if i else {"relative_attention_bias": nn.Embedding(self.buckets, self.heads)}
            gated = {name: nn.Linear(width, hidden, bias=False) for name in ("wi_0", "wi_1")} | {"wo": nn.Linear(hidden, width, bias=False)}
            return nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({name: nn.ModuleDict(part), "layer_norm": RMSNorm(width, eps)})
                                                          for name, part in (("SelfAttention", attention | bias), ("DenseReluDense", gated))])})
        self.shared = nn.Embedding(config["vocab_size"], width)
        self.encoder = nn.ModuleDict({"block": nn.ModuleList(map(block, range(config["num_layers"]))), "final_layer_norm": RMSNorm(width, eps)})

    def bias(self, length, device):
        """What attention adds for the distance key - query: a number for each head and bucket of distances; near ones exact, far ones logarithmic, half each way."""
        at, half = torch.arange(length, device=device), self.buckets // 2
        distance, exact = at[None, :] - at[:, None], half // 2
        far = distance.abs()
        log = exact + (torch.log(far.clamp_min(1) / exact) / math.log(self.max_distance / exact) * (half - exact)).long()
        bucket = (distance > 0) * half + torch.where(far < exact, far, log.clamp_max(half - 1))                  # (T, T)
        return self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(bucket).permute(2, 0, 1)[None]   # (1, H, T, T)

    def forward(self, ids):
        x, bias = self.shared(ids), self.bias(ids.shape[1], ids.device)                 # (B, T, D)
        for block in self.encoder.block:
            attn, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            x = x + self_attention(block.layer[0].layer_norm(x), self.heads, attn.q, attn.k, attn.v, attn.o, attn_mask=bias, scale=1.0)     # no 1 / sqrt(d)
            h = block.layer[1].layer_norm(x)
            x = x + mlp.wo(F.gelu(mlp.wi_0(h), approximate="tanh") * mlp.wi_1(h))
        return self.encoder.final_layer_norm(x)

@torch.no_grad()
def encode_prompt(path, prompts, device="cpu", dtype=torch.float32, batch=8):
    """Prompts -> (txt (N, T, 4096) from T5, pooled (N, 768) from CLIP). `path`: a FLUX.1 folder.
    Each encoder is loaded, run over all prompts and freed, so neither stands in memory while the transformer works. CLIP reads the first 77 tokens, T5 512."""
    def run(encoder, part):
        ids = TextTokenizer(Path(path) / f"tokenizer{part}")(prompts).to(device)
        model = encoder.load(Path(path) / f"text_encoder{part}", device, dtype)
        with reading(Path(path) / f"text_encoder{part}"):                               # ids beyond the vocabulary, heads that do not divide the width
            return torch.cat([model(rows) for rows in ids.split(batch)])
    return run(T5, "_2"), run(CLIPText, "")

# ---- the picture: autoencoder ------------------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    def __init__(self, inner, outer, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner, eps=1e-6), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer, eps=1e-6), nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x):                                                               # (B, inner, h, w) -> (B, outer, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class Middle(nn.Module):
    """Two residual blocks at the lowest resolution. Between them (FLUX.1 has it, the miniature not) every pixel attends to every pixel, with one head."""
    def __init__(self, width, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, width, groups) for _ in range(2)])
        linears = {name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")} | {"to_out": nn.ModuleList([nn.Linear(width, width)])}
        self.attentions = nn.ModuleList([nn.ModuleDict({"group_norm": nn.GroupNorm(groups, width, eps=1e-6), **linears})] if attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for attn in self.attentions:
            pixels = attn.group_norm(x).flatten(2).mT                                   # (B, h*w, C)
            x = x + self_attention(pixels, 1, attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]).mT.unflatten(2, x.shape[2:])
        return self.resnets[1](x)

def level(inner, outer, depth, groups, resample):
    """Residual blocks at one resolution; then, where `resample` is "down" or "up", half or twice the resolution."""
    return chain(resnets=nn.Sequential(*(ResBlock(outer if i else inner, outer, groups) for i in range(depth))),
                 downsamplers=nn.Sequential(*[chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(outer, outer, 3, stride=2))] if resample == "down" else []),
                 upsamplers=nn.Sequential(*[chain(twice=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(outer, outer, 3, padding=1))] if resample == "up" else []))

def coder(config, inner, outer, way):
    """One half of the autoencoder: levels then middle (the encoder, `way` "down"), or middle then levels (the decoder, "up")."""
    widths, groups, depth, down = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"], way == "down"
    middle = Middle(widths[-1], groups, config.get("mid_block_add_attention", True))
    widths, depth = (widths, depth) if down else (widths[::-1], depth + 1)
    levels = [level(a, b, depth, groups, way if i < len(widths) else None) for i, (a, b) in enumerate(zip([widths[0], *widths], widths), 1)]
    blocks = {"down_blocks": nn.Sequential(*levels), "mid_block": middle} if down else {"mid_block": middle, "up_blocks": nn.Sequential(*levels)}
    return chain(conv_in=nn.Conv2d(inner, widths[0], 3, padding=1), **blocks, conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], outer, 3, padding=1))

class VAE(Pretrained):
    """The autoencoder. Latents are shifted and scaled to about unit size: z = (encoder - shift) * scale."""
    kind = "AutoencoderKL"
    def __init__(self, config):
        super().__init__()
        choose("use_quant_conv", config.get("use_quant_conv", True), {False: None})     # Stable Diffusion's autoencoders have one
        self.scale, self.shift, self.factor = float(config["scaling_factor"]), float(config["shift_factor"]), 2 ** (len(config["block_out_channels"]) - 1)
        self.encoder = coder(config, config["in_channels"], 2 * config["latent_channels"], "down")
        self.decoder = coder(config, config["latent_channels"], config["out_channels"], "up")

    def encode(self, image, generator=None):
        """image (B, 3, H, W) in [-1, 1] -> latent (B, 16, H/8, W/8): the posterior's mean, or a sample when a generator is given."""
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype).to(mean.device)
            mean = mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise
        return (mean - self.shift) * self.scale

    def decode(self, latent):
        """latent (B, 16, h, w) -> image (B, 3, 8h, 8w), nominally in [-1, 1]; not clamped."""
        return self.decoder(latent / self.scale + self.shift)

def to_tensor(picture):
    """A picture, uint8 (H,W,3) or PIL RGB -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1

def to_picture(image):
    """(3, H, W), nominally in [-1, 1] -> uint8 (H,W,3). ValueError when it is not finite: it would be black."""
    if not image.isfinite().all():
        raise ValueError("the picture is not finite: a spoiled autoencoder, or latents too large for it")
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()

def pack(latent):
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): every 2x2 patch is a token, inner order (channel, dy, dx)."""
    h, w = latent.shape[2:]
    if h % 2 or w % 2:
        raise ValueError(f"a latent of {h} x {w} cannot be cut into 2 x 2 patches: picture sides must be multiples of twice the autoencoder's factor (FLUX.1: 16)")
    return F.pixel_unshuffle(latent, 2).flatten(2).mT.contiguous()

def unpack(tokens, h, w):
    """The inverse of pack: (B, h/2 * w/2, 4C) -> (B, C, h, w)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (h // 2, w // 2)), 2)

def image_ids(h, w, device=None):
    """Positions (0, y, x) of the tokens of an h x w latent -> (h/2 * w/2, 3). Text stands at (0, 0, 0)."""
    return F.pad(torch.cartesian_prod(torch.arange(h // 2, device=device), torch.arange(w // 2, device=device)), (1, 0)).float()

# ---- the transformer ---------------------------------------------------------------------------------------------------------
def rope_table(ids, axes, theta=10000.0):
    """Positions (T, 3) -> unit complex numbers (T, d/2), complex64: axis k turns axes[k]/2 of the pairs, at speeds theta^(-2i/axes[k])."""
    angles = torch.cat([ids[:, k, None].float() * theta ** -(torch.arange(0, dim, 2, device=ids.device) / dim) for k, dim in enumerate(axes)], dim=1)      # (T, d/2)
    return torch.polar(torch.ones_like(angles), angles)

def rotate(x, rope):
    """Turn every neighbouring pair of x (B, T, H, d): as a complex number, times its position's."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                     # (B, T, H, d/2)
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2).type_as(x)

def modulate(x, shift, scale):
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)     # norm * (1 + scale) + shift, in one kernel

class Modulation(nn.Module):
    """From the embedding of timestep, guidance and pooled text (B, D) to `count` vectors of shifts, scales and gates (B, count * D); Flux.modulation runs it."""
    def __init__(self, dim, count):
        super().__init__()
        self.linear = Linear(dim, count * dim)

def move(model, device, but):
    """Moves a transformer to `device`, `but` its modules of this class (or these): those stay where they are."""
    stay = {p for module in model.modules() if isinstance(module, but) for p in module.parameters()}
    for p in set(model.parameters()) - stay:
        p.data = p.data.to(device)
    return model

class Attention(nn.Module):
    """Joint attention over [text, image]. `text`: the text has projections of its own (double blocks), else both share one set (single blocks).
    `image_prompt` is the one hook for image-prompt attention (patch_dpo.py): None, or a callable or module that maps the image tokens' queries
    (B, H, L, d), normalised and not rotated, to an addition of the same shape to their attention output, before the output projection."""
    def __init__(self, dim, heads, head_dim, text):
        super().__init__()
        inner, self.heads, self.image_prompt = heads * head_dim, heads, None
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (Linear(dim, inner) for _ in range(3))
        if text:
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, inner) for _ in range(3))
            self.to_out, self.to_add_out = nn.ModuleList([Linear(inner, dim)]), Linear(inner, dim)

    def project(self, x, text=False):
        """Image tokens (or a single block's whole sequence), or text tokens -> q, k, v (B, L, H, d)."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj) if text else (self.to_q, self.to_k, self.to_v)
        norm_q, norm_k = (self.norm_added_q, self.norm_added_k) if text else (self.norm_q, self.norm_k)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in layers)
        return norm_q(q), norm_k(k), v

    def forward(self, q, k, v, rope, T):
        """q, k, v (B, T+L, H, d), the first T of them text -> (B, T+L, H*d)."""
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (rotate(q, rope), rotate(k, rope), v)))     # (B, H, T+L, d)
        if self.image_prompt is not None:
            out = torch.cat([out[:, :, :T], out[:, :, T:] + self.image_prompt(q[:, T:].transpose(1, 2))], dim=2)
        return out.transpose(1, 2).flatten(2)

class DoubleBlock(nn.Module):
    """Image and text each have their own weights and meet in the attention."""
    modulations = 12                    # shift, scale, gate of attention, the same of the MLP; for the image, then for the text
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = Attention(dim, heads, head_dim, text=True)
        self.ff, self.ff_context = (chain(net=nn.Sequential(chain(proj=Linear(dim, 4 * dim), gelu=nn.GELU("tanh")), nn.Identity(), Linear(4 * dim, dim)))
                                    for _ in range(2))

    def forward(self, img, txt, modulation, rope):                                      # (B, L, D), (B, T, D), (B, 12, D), (T+L, d/2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *text = modulation[:, :, None].unbind(1)        # (B, 1, D) each
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = text
        T = txt.shape[1]
        words, pixels = self.attn.project(modulate(txt, t_shift, t_scale), text=True), self.attn.project(modulate(img, shift, scale))
        out = self.attn(*(torch.cat(pair, dim=1) for pair in zip(words, pixels)), rope, T)                  # (B, T+L, H*d)
        img = torch.addcmul(img, gate, self.attn.to_out[0](out[:, T:]))                  # img + gate * attention
        img = torch.addcmul(img, mlp_gate, self.ff(modulate(img, mlp_shift, mlp_scale)))
        txt = torch.addcmul(txt, t_gate, self.attn.to_add_out(out[:, :T]))
        txt = torch.addcmul(txt, t_mlp_gate, self.ff_context(modulate(txt, t_mlp_shift, t_mlp_scale)))
        return img, txt

class SingleBlock(nn.Module):
    """Image and text as one sequence; attention and MLP side by side, one output projection for both."""
    modulations = 3                     # shift, scale, gate
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = Attention(dim, heads, head_dim, text=False)
        self.proj_mlp, self.proj_out = Linear(dim, 4 * dim), Linear(5 * dim, dim)

    def forward(self, img, txt, modulation, rope):                                      # (B, L, D), (B, T, D), (B, 3, D), (T+L, d/2)
        shift, scale, gate = modulation[:, :, None].unbind(1)
        T, x = txt.shape[1], torch.cat([txt, img], dim=1)                               # (B, T+L, D)
        h = modulate(x, shift, scale)
        attended = self.attn(*self.attn.project(h), rope, T)
        x = torch.addcmul(x, gate, self.proj_out(torch.cat([attended, F.gelu(self.proj_mlp(h), approximate="tanh")], dim=2)))
        return x[:, T:], x[:, :T]

def sinusoid(x, dim=256):
    """(B,) -> (B, dim) in fp32: cosines, then sines, of 1000 x at speeds 10000^(-i / (dim/2))."""
    angles = 1000 * x.float()[:, None] * torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=x.device))
    return torch.cat([angles.cos(), angles.sin()], dim=1)

def spread(residuals, blocks):
    """A ControlNet's residuals over `blocks` blocks, in runs of ceil(blocks / residuals) -> one a block, None where there are none."""
    return [residuals[i // math.ceil(blocks / len(residuals))] if len(residuals) else None for i in range(blocks)]

class Flux(Pretrained):
    """The FLUX.1 transformer: packed noisy latents and text -> velocity eps - x_0. forward = modulation (from timestep, guidance, pooled) + rope (from positions)
    + velocity (from pixels and text); a sampler computes the first two once for all its steps. `checkpointing = True` trades time for memory in training."""
    kind = "FluxTransformer2DModel"
    def __init__(self, config):
        super().__init__()
        heads, head_dim, self.axes = config["num_attention_heads"], config["attention_head_dim"], config.get("axes_dims_rope", [16, 56, 56])
        if sum(self.axes) != head_dim:
            raise ValueError(f"axes_dims_rope {self.axes} must sum to attention_head_dim {head_dim}")
        dim, self.guided, self.checkpointing = heads * head_dim, config["guidance_embeds"], False
        inputs = {"timestep_embedder": 256, "text_embedder": config["pooled_projection_dim"]} | ({"guidance_embedder": 256} if self.guided else {})
        self.time_text_embed = nn.ModuleDict({name: chain(linear_1=Linear(inner, dim), silu=nn.SiLU(), linear_2=Linear(dim, dim)) for name, inner in inputs.items()})
        self.context_embedder, self.x_embedder = Linear(config["joint_attention_dim"], dim), Linear(config["in_channels"], dim)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(dim, heads, head_dim) for _ in range(config["num_layers"])])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(dim, heads, head_dim) for _ in range(config["num_single_layers"])])
        self.norm_out = Modulation(dim, 2)                                              # scale, then shift
        self.proj_out = Linear(dim, config.get("out_channels") or config["in_channels"])

    def forward(self, img, txt, pooled, timestep, guidance, img_ids, txt_ids, double_residuals=(), single_residuals=()):
        """img (B, L, 64), txt (B, T, 4096), pooled (B, 768) of the weights' type, timestep (B,) in [0, 1], guidance (B,) as the user gives it or None,
        img_ids (L, 3), txt_ids (T, 3), residuals: a ControlNet's, (B, L, D) each -> velocity (B, L, 64)."""
        return self.velocity(img, txt, self.modulation(timestep, guidance, pooled), self.rope(txt_ids, img_ids), double_residuals, single_residuals)

    def blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def modulation(self, timestep, guidance, pooled):
        """Every block's shifts, scales and gates -> (B, M, D), M = 12 a double block, 3 a single one, and 2. timestep and guidance (B,), pooled (B, P)."""
        if (guidance is not None) != self.guided:
            raise ValueError("this checkpoint has " + ("a guidance embedding: guidance is needed" if self.guided else "no embedding of guidance: it must be None"))
        inputs = [sinusoid(timestep), pooled] + ([sinusoid(guidance)] if self.guided else [])
        temb = sum(embedder(x.to(pooled.dtype)) for embedder, x in zip(self.time_text_embed.values(), inputs))          # (B, D)
        linears = [module.linear for module in self.modules() if isinstance(module, Modulation)]
        temb = F.silu(temb).to(linears[0].weight.device)                                # may be the CPU: see controlnet.load_pair
        return torch.cat([linear(temb) for linear in linears], dim=1).unflatten(1, (-1, temb.shape[1])).to(pooled.device)

    def modulations(self, levels, guidance, pooled):
        """`modulation` for every noise level of a sampler in one pass over the weights -> one (B, M, D) a level; guidance: a number."""
        t = levels.repeat_interleave(len(pooled))                                       # (levels * B,)
        return self.modulation(t, torch.full_like(t, guidance) if self.guided else None, pooled.repeat(len(levels), 1)).split(len(pooled))

    def rope(self, txt_ids, img_ids):
        return rope_table(torch.cat([txt_ids, img_ids]), self.axes)                     # (T+L, d/2)

    def velocity(self, img, txt, modulation, rope, double_residuals=(), single_residuals=()):
        *mods, out = modulation.split([block.modulations for block in self.blocks()] + [2], dim=1)
        residuals = spread(double_residuals, len(self.transformer_blocks)) + spread(single_residuals, len(self.single_transformer_blocks))
        img, txt = self.x_embedder(img), self.context_embedder(txt)                     # (B, L, D), (B, T, D)
        for block, mod, residual in zip(self.blocks(), mods, residuals):
            img, txt = checkpoint(block, img, txt, mod, rope, use_reentrant=False) if self.checkpointing else block(img, txt, mod, rope)
            img = img if residual is None else img + residual
        scale, shift = out[:, :, None].unbind(1)
        return self.proj_out(modulate(img, shift, scale))                               # (B, L, 64)

# ---- the sampler -------------------------------------------------------------------------------------------------------------
SCHEDULE = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}

def sigmas(steps, image_tokens, schedule=SCHEDULE):
    """Noise levels 1 ... 0 of `steps` Euler steps -> (steps+1,) fp32. `schedule`: scheduler/scheduler_config.json (default: FLUX.1-dev's).
    dev: more tokens hide noise better, so the levels shift towards 1: sigma' = e^mu / (e^mu + 1/sigma - 1), mu linear in the tokens. schnell: a fixed `shift`."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, at least 1 is needed")
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    low, high, start, end = (schedule[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    factor = math.exp(start + (end - start) / (high - low) * (image_tokens - low)) if schedule["use_dynamic_shifting"] else schedule["shift"]
    return torch.cat([factor / (factor + 1 / sigma - 1), sigma.new_zeros(1)]).float()

@torch.no_grad()
def denoise(flux, noise, txt, pooled, img_ids, levels, guidance=3.5, source=None, strength=1.0, negative=None, cfg=1.0, control=None, progress=iter):
    """Euler steps from noise to a picture -> packed latents (B, L, 64), fp32.
    noise, source: packed (B, L, 64); levels: from `sigmas`; txt (B, T, 4096) and pooled (B, 768) have the weights' type.
    strength: 1 starts from noise; less starts from the noised source and runs the last strength * steps steps, rounded up; 0 returns the source.
    guidance: an embedding, one pass, ignored by checkpoints that have none (schnell). cfg other than 1: classifier-free guidance against
    `negative` = (txt, pooled), two passes. control(step, steps, x, t (B,)) -> (double_residuals, single_residuals). progress wraps the range of steps (tqdm)."""
    if not 0 <= strength <= 1 or source is None and strength < 1:
        raise ValueError(f"strength is {strength}; it must lie in 0..1, and below 1 it needs a source picture")
    if cfg != 1 and negative is None:
        raise ValueError(f"cfg is {cfg}; other than 1 it needs a negative prompt")
    steps = len(levels) - 1
    levels = levels[int(steps - steps * strength):].to(noise.device)
    B, steps = len(noise), len(levels) - 1
    x = noise.float() if source is None else (1 - levels[0]) * source.float() + levels[0] * noise.float()
    prompts = [(txt, pooled)] if cfg == 1 else [(txt, pooled), negative]
    rope, modulations = flux.rope(txt.new_zeros(txt.shape[1], 3), img_ids), [flux.modulations(levels[:-1], guidance, p) for _, p in prompts]
    for i in progress(range(steps)):
        residuals = control(i, steps, x, levels[i].expand(B)) if control else ((), ())
        v = [flux.velocity(x.to(txt.dtype), words, modulation[i], rope, *residuals).float() for (words, _), modulation in zip(prompts, modulations)]
        v = v[0] if cfg == 1 else v[1] + cfg * (v[0] - v[1])
        x = x + (levels[i + 1] - levels[i]) * v                                         # Euler
    if not x.isfinite().all():
        raise ValueError(f"the latents are not finite after {steps} steps in {txt.dtype}: a spoiled checkpoint, or a type too small (use bfloat16 or float32)")
    return x

if __name__ == "__main__":
    txt, pooled = encode_prompt("mini/flux", ["A red apple in front of a mint wall"])
    noise = pack(torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))
    x = denoise(Flux.load("mini/flux/transformer"), noise, txt, pooled, image_ids(16, 16), sigmas(20, 64))
    picture = to_picture(VAE.load("mini/flux/vae").decode(unpack(x, 16, 16))[0])
    print("A red apple in front of a mint wall: at the top (R, G, B) is", picture[4, 32].tolist(), "and in the middle of the apple", picture[36, 24].tolist())
