"""FLUX.1 in plain torch: two text encoders, a 16-channel autoencoder, the transformer, and an Euler
sampler for its rectified flow.

    prompt --CLIP--> pooled --+-- timestep, guidance --> shift, scale, gate of every block
    prompt --T5----> txt -----|--> [txt, img] attend to each other: double, then single blocks
    picture --VAE--> latent --+-- pack 2x2 -> img tokens                            --> velocity

Conventions: t = 1 is noise.  x_t = (1-t) x_0 + t eps,  v = eps - x_0,  Euler: x += (t_next - t) v.
RoPE couples neighbouring pairs (2i, 2i+1), not halves as Qwen's does. Positions, timesteps and RoPE
tables stay fp32 whatever the weights are.
Shapes: B batch, T text tokens, L image tokens, D width, H heads, d width of a head; C, h, w are
channels, height and width of a latent.
The file goes from prompts and pictures to the transformer and the sampler; tokenizers stand at its
end. Sizes come from each folder's config.json (dev, schnell, the miniature). A layer has the name
that it has in the public checkpoints: a class made of nn.Sequential runs its layers in the order in
which they are named, an nn.ModuleDict is a name that holds others and computes nothing.
Try it: python flux.py
"""
import contextlib
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from qwen import (
    Linear, RMSNorm, choose, load_checkpoint, on_meta, read_json, reading, recomputed, shipped,
    written
)


def check_settings(config, only):
    """ValueError when the dict of a config file says anything else than `only`, {name: value}."""
    for name, value in only.items():
        found = config.get(name, value)
        if found != value:
            raise ValueError(f"{name} is {found!r:.80}; here it must be {value!r}")


class Pretrained(nn.Module):
    """A module built from the dict in its config.json."""
    only = {}                   # what config.json must say where it says it: the kind of module,
                                # and settings of which one value is written here

    @classmethod
    def read_config(cls, path, **also):
        """`path`: the folder of one part, e.g. FLUX.1-dev/transformer. ValueError when its
        config.json says anything else than `only`, or `also`, in the same form."""
        file = f"{path}/config.json"
        with reading(file):
            config = cls.own(read_json(file))
            check_settings(config, cls.only | also)
        return config

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """As `read_config`, with the weights. ValueError when a tensor does not fit."""
        config = cls.read_config(path)
        with reading(f"{path}/config.json"), on_meta():
            model = cls(config)
        load_checkpoint(model, path, cls.rename)
        return model.to(device, dtype).eval()

    @staticmethod
    def own(config):
        """The dict of a config.json -> what it says of this module."""
        return config

    @staticmethod
    def rename(name):
        """A stored tensor's name -> its name here; None leaves it out."""
        return name


def attend(q, k, v, heads, **how):
    """Softmax attention: q, k, v (B, T, D) -> (B, T, D). `how`: of scaled_dot_product_attention."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*split, **how)                     # (B, H, T, d)
    return out.transpose(1, 2).flatten(2)                                   # (B, T, D)


linear_without_bias = partial(nn.Linear, bias=False)


# ---- the prompt: CLIP --------------------------------------------------------------------------

class CLIPAttention(nn.Module):
    """A token attends to itself and to those before it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):                                                   # (B, T, D)
        out = attend(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            self.heads,
            is_causal=True
        )
        return self.out_proj(out)


class QuickGELU(nn.Module):
    """What OpenAI's CLIP has in place of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class CLIPMLP(nn.Sequential):
    """Each token on its own: (B, T, D) -> (B, T, D) by way of a hidden layer."""

    def __init__(self, width, hidden, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width)


class CLIPLayer(nn.Module):
    """Attention, then MLP, each on normalised states and added to what was there before."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        activation = choose("hidden_act", config["hidden_act"], ACTIVATIONS)
        eps = config.get("layer_norm_eps", 1e-5)
        self.self_attn = CLIPAttention(width, config["num_attention_heads"])
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = CLIPMLP(width, config["intermediate_size"], activation())
        self.layer_norm2 = nn.LayerNorm(width, eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTransformer(nn.Module):
    """Ids (B, T) -> states (B, T, D): a vector for the token and one for its place, the layers, a
    last norm."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config["vocab_size"], width),
            "position_embedding": nn.Embedding(config["max_position_embeddings"], width)
        })
        layers = [CLIPLayer(config) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.final_layer_norm = nn.LayerNorm(width, config.get("layer_norm_eps", 1e-5))

    def forward(self, ids):                                                 # (B, T)
        places = self.embeddings.position_embedding.weight[:ids.shape[1]]
        x = self.embeddings.token_embedding(ids) + places                   # (B, T, D)
        return self.final_layer_norm(self.encoder.layers(x))


def clip_half(config, half):
    """What config.json says of CLIP's "text" or "vision" tower, alone or in a whole CLIP."""
    if config.get("model_type") != "clip":
        return config
    return {
        **config[f"{half}_config"],
        "architectures": "WithProjection",
        "projection_dim": config["projection_dim"]
    }


class CLIPText(Pretrained):
    """CLIP's text tower; clip(ids (B, T)) -> pooled (B, D): the last layer at the end-of-text.
    CLIPTextModelWithProjection and a whole CLIP can compare texts, too, by `embed`."""
    only = {"model_type": "clip_text_model"}

    def __init__(self, config):
        super().__init__()
        self.end = config["eos_token_id"]
        self.text_model = CLIPTransformer(config)
        self.text_projection = None
        if "WithProjection" in str(config.get("architectures")):
            self.text_projection = linear_without_bias(
                config["hidden_size"],
                config["projection_dim"]
            )

    def forward(self, ids):
        x = self.text_model(ids)                                            # (B, T, D)
        # The public config says eos_token_id 2, which is wrong: there, and only there, the end is
        # the highest id. Padding repeats it: take the first.
        is_end = ids if self.end == 2 else (ids == self.end).int()
        return x[torch.arange(len(ids)), is_end.argmax(1)]                  # (B, D)

    def embed(self, ids):
        """Ids (B, T) -> (B, P), not normalised: texts, and pictures, that mean the same point the
        same way. ValueError where the checkpoint has no projection."""
        if self.text_projection is None:
            raise ValueError("CLIP's config.json knows no text projection: it compares no texts")
        return self.text_projection(self(ids))

    @staticmethod
    def own(config):
        return clip_half(config, "text")

    @staticmethod
    def rename(name):
        """transformers 5 saves the tower without the prefix text_model.; old ones saved the
        positions 0, 1, 2, ..., too. A whole CLIP's other half is not read."""
        if name.startswith(("vis", "logit_scale")) or name.endswith("position_ids"):
            return None
        return name if name.startswith("text_") else f"text_model.{name}"


# ---- the prompt: T5 ----------------------------------------------------------------------------

class T5Attention(nn.Module):
    """Every token attends to every token, with a bias for the distance between them."""

    def __init__(self, config):
        super().__init__()
        width = config["d_model"]
        self.heads = config["num_heads"]
        inner = self.heads * config["d_kv"]
        self.q = linear_without_bias(width, inner)
        self.k = linear_without_bias(width, inner)
        self.v = linear_without_bias(width, inner)
        self.o = linear_without_bias(inner, width)

    def forward(self, x, bias):                                             # (B, T, D)
        out = attend(
            self.q(x),
            self.k(x),
            self.v(x),
            self.heads,
            attn_mask=bias,
            scale=1.0                                                       # not 1 / sqrt(d)
        )
        return self.o(out)


class T5FeedForward(nn.Module):
    """An MLP whose hidden layer is gated by another."""

    def __init__(self, config):
        super().__init__()
        width = config["d_model"]
        hidden = config["d_ff"]
        self.wi_0 = linear_without_bias(width, hidden)
        self.wi_1 = linear_without_bias(width, hidden)
        self.wo = linear_without_bias(hidden, width)

    def forward(self, x):
        gate = F.gelu(self.wi_0(x), approximate="tanh")
        return self.wo(gate * self.wi_1(x))


class T5Block(nn.Module):
    """As CLIPLayer; checkpoints call the halves layer.0 and layer.1, each with its norm."""

    def __init__(self, config):
        super().__init__()
        width = config["d_model"]
        eps = config["layer_norm_epsilon"]
        attention = {
            "SelfAttention": T5Attention(config),
            "layer_norm": RMSNorm(width, eps)
        }
        feed_forward = {
            "DenseReluDense": T5FeedForward(config),
            "layer_norm": RMSNorm(width, eps)
        }
        self.layer = nn.ModuleList([nn.ModuleDict(attention), nn.ModuleDict(feed_forward)])

    def forward(self, x, bias):                                             # (B, T, D)
        attention, feed_forward = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))


class T5(Pretrained):
    """T5 v1.1's encoder; t5(ids (B, T)) -> (B, T, D). Padding is read like text, as FLUX.1 was
    trained."""
    only = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128
    }

    def __init__(self, config):
        super().__init__()
        width = config["d_model"]
        blocks = [T5Block(config) for _ in range(config["num_layers"])]
        self.shared = nn.Embedding(config["vocab_size"], width)
        self.encoder = nn.ModuleDict({
            "embed_tokens": self.shared,                            # files hold either, or both
            "block": nn.ModuleList(blocks),
            "final_layer_norm": RMSNorm(width, config["layer_norm_epsilon"])
        })
        first = blocks[0].layer[0].SelfAttention                            # holds it for all
        first.relative_attention_bias = nn.Embedding(32, first.heads)

    def bias(self, length, device):
        """What attention adds for the distance key - query -> (1, H, T, T): a number for each head
        and each of 32 buckets of distances, 16 each way: 0 to 7 one by one, 8 to 127 by their
        logarithm, and all beyond in the last."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        at = torch.arange(length, device=device)
        distance = at - at[:, None]                                         # (T, T): key - query
        size = distance.abs()
        log = torch.log(size.clamp_min(1) / 8) / math.log(128 / 8)          # 0 at 8, 1 at 128
        far = (8 + (log * 8).long()).clamp_max(15)
        bucket = (distance > 0) * 16 + torch.where(size < 8, size, far)
        return table(bucket).permute(2, 0, 1)[None]

    def forward(self, ids):
        x = self.shared(ids)                                                # (B, T, D)
        if x.dtype == torch.float16:
            raise ValueError("T5's numbers are too large for float16; use bfloat16 or float32")
        bias = self.bias(ids.shape[1], ids.device)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


@torch.no_grad()
def encode_prompt(path, prompts, device="cpu", dtype=torch.float32, batch=8):
    """Prompts -> (txt (N, T, 4096) from T5, pooled (N, 768) from CLIP). `path`: a FLUX.1 folder; a
    prompt is a string or a pair (caption, instruction), which reads "caption. instruction". CLIP
    reads 77 tokens, T5 512: a string is cut at its end, of a pair the caption.
    Each encoder is loaded, run over all prompts and freed, so neither stands in memory while the
    transformer works. The result is on the CPU: T5's of 10,000 prompts are 42 GB."""
    def run(encoder, part):
        folder = f"{path}/text_encoder{part}"
        limit = encoder.read_config(folder).get("max_position_embeddings", 512)     # CLIP: 77
        tokenizer = TextTokenizer(f"{path}/tokenizer{part}", limit, encoder.__name__)
        ids = tokenizer(prompts)                                            # (N, T)
        model = encoder.load(folder, device, dtype)
        with reading(folder):                   # ids beyond the vocabulary, heads that do not fit
            return torch.cat([model(rows.to(device)).cpu() for rows in ids.split(batch)])
    return run(T5, "_2"), run(CLIPText, "")


# ---- the picture: autoencoder ------------------------------------------------------------------

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def group_norm(config, width):
    return nn.GroupNorm(config["norm_num_groups"], width, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions, added to what comes in; a 1x1 convolution brings that to the new width."""

    def __init__(self, config, inner, outer):
        super().__init__()
        self.norm1 = group_norm(config, inner)
        self.conv1 = conv3x3(inner, outer)
        self.norm2 = group_norm(config, outer)
        self.conv2 = conv3x3(outer, outer)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x):                                                   # (B, inner, h, w)
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, outer, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Every pixel attends to every pixel, with one head."""

    def __init__(self, config, width):
        super().__init__()
        self.group_norm = group_norm(config, width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):                                                   # (B, C, h, w)
        pixels = self.group_norm(x).flatten(2).mT                           # (B, h*w, C)
        out = attend(
            self.to_q(pixels),
            self.to_k(pixels),
            self.to_v(pixels),
            heads=1
        )
        return x + self.to_out(out).mT.unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, attention between them (FLUX.1 has it, the
    miniature not)."""

    def __init__(self, config):
        super().__init__()
        width = config["block_out_channels"][-1]
        self.resnets = nn.ModuleList(ResBlock(config, width, width) for _ in range(2))
        self.attentions = nn.Sequential()
        if config.get("mid_block_add_attention", True):
            self.attentions.append(AttentionBlock(config, width))

    def forward(self, x):
        first, second = self.resnets
        return second(self.attentions(first(x)))


def resolutions(config, widths, depth, name, before, **how):
    """`depth` residual blocks at each resolution, one resolution a width. What leads from one to
    the next is called `name`: `before`, then a 3x3 convolution made as `how` says."""
    blocks = nn.Sequential()
    inner = widths[0]
    for outer in widths:
        block = nn.Sequential()
        block.resnets = nn.Sequential()
        for _ in range(depth):
            block.resnets.append(ResBlock(config, inner, outer))
            inner = outer
        resize = nn.Sequential(before)
        resize.conv = nn.Conv2d(outer, outer, 3, **how)
        block.add_module(name, nn.Sequential(resize))
        blocks.append(block)
    delattr(block, name)                                                    # the last has none
    return blocks


class Encoder(nn.Sequential):
    """(B, 3, H, W) -> mean and log variance of the latent (B, 2C, H/8, W/8)."""

    def __init__(self, config):
        super().__init__()
        widths = config["block_out_channels"]                               # from fine to coarse
        self.conv_in = conv3x3(3, widths[0])
        self.down_blocks = resolutions(                 # (B, C, h, w) -> (B, C, h/2, w/2), ...
            config,
            widths,
            config["layers_per_block"],
            "downsamplers",
            nn.ZeroPad2d((0, 1, 0, 1)),
            stride=2
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = group_norm(config, widths[-1])
        self.conv_act = nn.SiLU()
        self.conv_out = conv3x3(widths[-1], 2 * config["latent_channels"])


class Decoder(nn.Sequential):
    """A latent (B, C, h, w) -> (B, 3, 8h, 8w)."""

    def __init__(self, config):
        super().__init__()
        widths = config["block_out_channels"][::-1]                         # from coarse to fine
        self.conv_in = conv3x3(config["latent_channels"], widths[0])
        self.mid_block = MidBlock(config)
        self.up_blocks = resolutions(                   # (B, C, h, w) -> (B, C, 2h, 2w), ...
            config,
            widths,
            config["layers_per_block"] + 1,
            "upsamplers",
            nn.Upsample(scale_factor=2.0),
            padding=1
        )
        self.conv_norm_out = group_norm(config, widths[-1])
        self.conv_act = nn.SiLU()
        self.conv_out = conv3x3(widths[-1], 3)


class VAE(Pretrained):
    """The autoencoder, in fp32 whatever Flux is in (on a GPU in TF32, see qwen.set_precision).
    Latents are shifted and scaled to about unit size: z = (encoder - shift) * scale.
    `factor`: pixels on a side of a latent's pixel."""
    only = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu"
    }

    def __init__(self, config):
        super().__init__()
        # Stable Diffusion's autoencoders have one
        choose("use_quant_conv", config.get("use_quant_conv", True), {False: None})
        self.scale = float(config["scaling_factor"])
        self.shift = float(config["shift_factor"] or 0)
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image, generator=None):
        """image (B, 3, H, W) in [-1, 1] -> latent (B, 16, H/8, W/8): the posterior's mean, or a
        sample when a generator, of any device, is given."""
        mean, logvar = self.encoder(image).chunk(2, 1)
        if generator:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            mean = mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise.to(mean)
        return (mean - self.shift) * self.scale

    def decode(self, latent):
        """latent (B, 16, h, w) -> image (B, 3, 8h, 8w), nominally in [-1, 1]; not clamped."""
        return self.decoder(latent / self.scale + self.shift)


# ---- pictures as files, as tensors, as tokens --------------------------------------------------

def read_image(path):
    """Any picture Pillow reads -> PIL RGB, upright: EXIF rotation applied, transparency on white,
    of an animation the first frame. 16 and 32 bits and floats come down to 8: white is 65535, or 1
    or 255 in floats, or the largest value where that is larger. ValueError in one sentence when
    there is no picture."""
    # Pillow reads twice as many, and 200 million come out of telephones.
    Image.MAX_IMAGE_PIXELS = 2 ** 28
    with reading(path), Image.open(path) as image:
        image.load()
        # Odd EXIF fails where Pillow, the picture turned, writes it anew: nobody needs it.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        image = image.copy()
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.array(image, float))
        largest = values.max()
        usual = [1, 255] if image.mode == "F" else [65535]
        white = next((w for w in usual if w >= largest), largest)
        values = values.clip(0) / white * 255
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_square(path, size):
    """A picture file -> uint8 (size, size, 3): the largest square in its middle, resized."""
    return np.array(ImageOps.fit(read_image(path), (size, size)))


def to_tensor(picture):
    """A picture, uint8 (H,W,3) or PIL RGB -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def to_picture(image):
    """(3, H, W), nominally in [-1, 1] -> uint8 (H,W,3). ValueError when it is not finite: it would
    be black."""
    if not image.isfinite().all():
        raise ValueError(
            "the picture is not finite: a spoiled autoencoder, or latents too large for it"
        )
    image = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return image.permute(1, 2, 0).cpu().numpy()


def pack(latent):
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): every 2x2 patch is a token, inner order (channel, dy,
    dx)."""
    h, w = latent.shape[2:]
    if h % 2 or w % 2:
        raise ValueError(
            f"a latent of {h} x {w} cannot be cut into 2 x 2 patches: picture sides must be "
            "multiples of twice the autoencoder's factor (FLUX.1: 16)"
        )
    return F.pixel_unshuffle(latent, 2).flatten(2).mT.contiguous()


def unpack(tokens, h, w):
    """The inverse of pack: (B, h/2 * w/2, 4C) -> (B, C, h, w)."""
    patches = tokens.mT.unflatten(2, (h // 2, w // 2))                      # (B, 4C, h/2, w/2)
    return F.pixel_shuffle(patches, 2)


def image_ids(h, w, device=None):
    """Positions (0, y, x) of the tokens of an h x w latent -> (h/2 * w/2, 3). Text stands at
    (0, 0, 0)."""
    axes = [torch.arange(size, device=device) for size in (1, h // 2, w // 2)]
    return torch.cartesian_prod(*axes).float()


# ---- the transformer ---------------------------------------------------------------------------

def rope_table(ids, axes):
    """Positions (T, 3) -> cos and sin (T, d/2, 2) of the angles by which the pairs turn: those of
    axis k, axes[k]/2 of them, at speeds 10000^(-2i/axes[k])."""
    angles = []
    for k, dim in enumerate(axes):
        speeds = 10000.0 ** -(torch.arange(0, dim, 2, device=ids.device) / dim)
        angles.append(ids[:, k, None] * speeds)                             # (T, dim/2)
    angles = torch.cat(angles, 1)                                           # (T, d/2)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def rotate(x, rope):
    """Turn every neighbouring pair (a, b) of x (B, T, H, d). torch.compile makes one kernel of
    that; without it complex numbers do, (a + ib)(cos + i sin), on a CPU 10 to 30 times as fast."""
    pairs = x.float().unflatten(-1, (-1, 2))                                # (B, T, H, d/2, 2)
    rope = rope[:, None]                                                    # (T, 1, d/2, 2)
    if torch.compiler.is_compiling():
        a, b = pairs.unbind(-1)                                             # (B, T, H, d/2)
        cos, sin = rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
        turned = torch.view_as_real(turned)                                 # (B, T, H, d/2, 2)
    return turned.flatten(-2).type_as(x)


def sinusoid(x):
    """(B,) -> (B, 256) in fp32: cosines, then sines, of 1000 x at speeds 10000^(-i/128)."""
    speeds = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=x.device))
    angles = 1000 * x.float()[:, None] * speeds                             # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], 1)


class MLPEmbedder(nn.Sequential):
    """A sinusoid of timestep or guidance, or the pooled text -> (B, D)."""

    def __init__(self, inner, dim):
        super().__init__()
        self.linear_1 = Linear(inner, dim)
        self.silu = nn.SiLU()
        self.linear_2 = Linear(dim, dim)


class Modulation(nn.Module):
    """(B, D) -> `count` vectors of shifts, scales and gates (B, count, D). Flux.modulation runs
    those of all blocks."""

    def __init__(self, dim, count):
        super().__init__()
        self.linear = Linear(dim, count * dim)

    def forward(self, temb):
        temb = temb.to(self.linear.weight.device)   # may be the CPU: see controlnet.load_pair
        return self.linear(temb).unflatten(1, (-1, temb.shape[1]))


def modulate(x, shift, scale):
    """norm(x) * (1 + scale) + shift, in one kernel."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class HeadNorm(nn.RMSNorm):
    """(B, L, D) -> (B, L, H, d), every head normalised on its own."""

    def forward(self, x):
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape)))


class Attention(nn.Module):
    """Attention of a sequence [text, image] to itself.
    `image_prompt` is the hook for image-prompt attention (patch_dpo.py): None, or a callable
    or module that maps the image tokens' queries (B, H, L, d), normalised and not rotated, to an
    addition of the same shape to their attention output, before the output projection. XLabs'
    stands in DoubleBlock."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.image_prompt = None
        self.norm_q = HeadNorm(dim // heads, eps=1e-6)
        self.norm_k = HeadNorm(dim // heads, eps=1e-6)
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)

    def project(self, x):
        """(B, L, D) -> q, k (B, L, H, d), v (B, L, D)."""
        return (
            self.norm_q(self.to_q(x)),
            self.norm_k(self.to_k(x)),
            self.to_v(x)
        )

    def forward(self, q, k, v, rope, T):
        """What `project` gives, for T text tokens and L image tokens -> (B, T+L, D)."""
        turned_q = rotate(q, rope).flatten(2)                               # (B, T+L, D)
        turned_k = rotate(k, rope).flatten(2)
        out = attend(turned_q, turned_k, v, self.heads)
        if self.image_prompt:
            extra = self.image_prompt(q[:, T:].transpose(1, 2))             # (B, H, L, d)
            extra = extra.transpose(1, 2).flatten(2)                        # (B, L, D)
            out = out + F.pad(extra, (0, 0, T, 0))                          # 0 for the text
        return out


class JointAttention(Attention):
    """The same, but the text has projections of its own, and so has the output of each."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.norm_added_q = HeadNorm(dim // heads, eps=1e-6)
        self.norm_added_k = HeadNorm(dim // heads, eps=1e-6)
        self.add_q_proj = Linear(dim, dim)
        self.add_k_proj = Linear(dim, dim)
        self.add_v_proj = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.to_add_out = Linear(dim, dim)

    def project_text(self, x):
        """(B, T, D) -> q, k (B, T, H, d), v (B, T, D)."""
        return (
            self.norm_added_q(self.add_q_proj(x)),
            self.norm_added_k(self.add_k_proj(x)),
            self.add_v_proj(x)
        )


class FeedForward(nn.Sequential):
    """The MLP of a double block: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim):
        super().__init__()
        first = nn.Sequential()
        first.proj = Linear(dim, 4 * dim)                                   # called net.0.proj
        # GELU stands where the authors have dropout, so that the last layer is net.2.
        self.net = nn.Sequential(first, nn.GELU("tanh"), Linear(4 * dim, dim))


def add_gated(x, attended, ff, vectors):
    """What attention and then the MLP add to x (B, L, D)."""
    gate, ff_shift, ff_scale, ff_gate = vectors                             # (B, 1, D) each
    x = torch.addcmul(x, gate, attended)                                    # x + gate * attended
    out = ff(modulate(x, ff_shift, ff_scale))
    return torch.addcmul(x, ff_gate, out)


class DoubleBlock(nn.Module):
    """Image and text each have their own weights and meet in the attention. `image_prompt`: as
    Attention's, but (B, L, D), and added to what leaves the block."""
    modulations = 12        # shift, scale, gate of attention and MLP, for the image and the text

    def __init__(self, dim, heads):
        super().__init__()
        self.image_prompt = None
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 6)
        self.attn = JointAttention(dim, heads)
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim)

    def forward(self, img, txt, modulation, rope):
        """img (B, L, D), txt (B, T, D), modulation (B, 12, D), rope (T+L, d/2, 2) -> img,
        txt."""
        T = txt.shape[1]
        vectors = modulation.split(1, 1)                                    # (B, 1, D) each
        img_shift, img_scale, *img_rest = vectors[:6]
        txt_shift, txt_scale, *txt_rest = vectors[6:]
        image = self.attn.project(modulate(img, img_shift, img_scale))
        text = self.attn.project_text(modulate(txt, txt_shift, txt_scale))
        qkv = [torch.cat(pair, 1) for pair in zip(text, image)]             # (B, T+L, ...)
        out = self.attn(*qkv, rope, T)                                      # (B, T+L, D)
        img_out = self.attn.to_out(out[:, T:])
        txt_out = self.attn.to_add_out(out[:, :T])
        img = add_gated(img, img_out, self.ff, img_rest)                    # (B, L, D)
        if self.image_prompt:
            q, *_ = image
            img = img + self.image_prompt(q.flatten(2))
        txt = add_gated(txt, txt_out, self.ff_context, txt_rest)            # (B, T, D)
        return img, txt


class SingleBlock(nn.Module):
    """Image and text as one sequence; attention and MLP side by side, one output projection for
    both."""
    modulations = 3         # shift, scale, gate

    def __init__(self, dim, heads):
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = Attention(dim, heads)
        self.proj_mlp = Linear(dim, 4 * dim)
        self.proj_out = Linear(5 * dim, dim)

    def forward(self, img, txt, modulation, rope):
        """img (B, L, D), txt (B, T, D), modulation (B, 3, D), rope (T+L, d/2, 2) -> img,
        txt."""
        T = txt.shape[1]
        shift, scale, gate = modulation.split(1, 1)                         # (B, 1, D) each
        x = torch.cat([txt, img], 1)                                        # (B, T+L, D)
        h = modulate(x, shift, scale)
        qkv = self.attn.project(h)
        attended = self.attn(*qkv, rope, T)                                 # (B, T+L, D)
        hidden = F.gelu(self.proj_mlp(h), approximate="tanh")               # (B, T+L, 4D)
        out = self.proj_out(torch.cat([attended, hidden], dim=2))
        x = torch.addcmul(x, gate, out)                                     # x + gate * out
        return x[:, T:], x[:, :T]


def spread(residuals, blocks):
    """A ControlNet's residuals over `blocks` blocks, in runs of ceil(blocks / residuals) -> one a
    block, None where there are none."""
    residuals = residuals or [None]
    run = math.ceil(blocks / len(residuals))
    return [residuals[i // run] for i in range(blocks)]


class Flux(Pretrained):
    """The FLUX.1 transformer: packed noisy latents and text -> velocity eps - x_0.
    forward = modulation (from timestep, guidance, pooled) + rope (from positions) + velocity (from
    pixels and text); a sampler computes the first two once for all its steps.
    `checkpointing`: see qwen.recomputed."""
    only = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}

    def __init__(self, config):
        super().__init__()
        heads = config["num_attention_heads"]
        head_dim = config["attention_head_dim"]
        dim = heads * head_dim
        self.axes = config.get("axes_dims_rope", [16, 56, 56])
        pairs = [size // 2 for size in self.axes]
        choose(
            f"the number and the sum of axes_dims_rope {self.axes}",
            (len(pairs), 2 * sum(pairs)),
            {(3, head_dim): None}
        )
        self.guided = config.get("guidance_embeds", False)
        self.checkpointing = False
        self.time_text_embed = nn.ModuleDict({
            "timestep_embedder": MLPEmbedder(256, dim),
            "text_embedder": MLPEmbedder(config["pooled_projection_dim"], dim)
        })
        if self.guided:
            self.time_text_embed.guidance_embedder = MLPEmbedder(256, dim)
        self.context_embedder = Linear(config["joint_attention_dim"], dim)
        self.x_embedder = Linear(config["in_channels"], dim)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(dim, heads) for _ in range(config["num_layers"])
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, heads) for _ in range(config["num_single_layers"])
        )
        self.norm_out = Modulation(dim, 2)                                  # scale, then shift
        self.proj_out = Linear(dim, config["in_channels"])

    def forward(
        self,
        img,                            # (B, L, 64) packed noisy latents
        txt,                            # (B, T, 4096)
        pooled,                         # (B, 768) of the weights' type
        timestep,                       # (B,) in [0, 1]
        guidance,                       # (B,) as the user gives it, or None
        img_ids,                        # (L, 3)
        txt_ids,                        # (T, 3)
        double_residuals=(),            # a ControlNet's, (B, L, D) each
        single_residuals=()
    ):
        """-> velocity (B, L, 64)."""
        modulation = self.modulation(timestep, guidance, pooled)
        rope = self.rope(txt_ids, img_ids)
        return self.velocity(
            img, txt, modulation, rope, double_residuals,
            single_residuals=single_residuals
        )

    def blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def modulation(self, timestep, guidance, pooled):
        """Every block's shifts, scales and gates -> (B, M, D), M = 12 a double block, 3 a single
        one, and 2. timestep and guidance (B,), pooled (B, P)."""
        if self.guided == (guidance is None):
            raise ValueError(
                "guidance is needed by a checkpoint with an embedding of it, else it must be None"
            )
        embed = self.time_text_embed
        temb = embed.timestep_embedder(sinusoid(timestep).to(pooled))       # (B, D)
        temb = temb + embed.text_embedder(pooled)
        if self.guided:
            temb = temb + embed.guidance_embedder(sinusoid(guidance).to(pooled))
        temb = F.silu(temb)
        vectors = [
            layer(temb)                                                     # (B, count, D)
            for layer in self.modules()
            if isinstance(layer, Modulation)
        ]
        return torch.cat(vectors, 1).to(pooled.device)

    def rope(self, txt_ids, img_ids):
        return rope_table(torch.cat([txt_ids, img_ids]), self.axes)         # (T+L, d/2, 2)

    def prepare(self, txt, pooled, img_ids, levels, guidance):
        """What a sampler computes once for all its steps -> `modulation` at each of the levels but
        the last, from one pass over the weights, and `rope`. guidance: a number."""
        B = len(pooled)
        t = levels[:-1].repeat_interleave(B)                                # (steps * B,)
        guidance = torch.full_like(t, guidance) if self.guided else None
        pooled = pooled.repeat(len(levels) - 1, 1)
        modulations = self.modulation(t, guidance, pooled).split(B)         # (B, M, D) each
        return modulations, self.rope(txt.new_zeros(txt.shape[1], 3), img_ids)

    def velocity(self, img, txt, modulation, rope, double_residuals=(), single_residuals=()):
        """`forward` for a modulation (B, M, D) and rotations (T+L, d/2, 2) that are at hand."""
        counts = [block.modulations for block in self.blocks()]
        *modulations, last = modulation.split([*counts, 2], 1)
        residuals = spread(double_residuals, len(self.transformer_blocks))
        residuals += spread(single_residuals, len(self.single_transformer_blocks))
        img = self.x_embedder(img)                                          # (B, L, D)
        txt = self.context_embedder(txt)                                    # (B, T, D)
        for block, mod, residual in zip(self.blocks(), modulations, residuals):
            block = recomputed(block, self.checkpointing)
            img, txt = block(img, txt, mod, rope)
            if residual is not None:
                img = img + residual
        scale, shift = last.split(1, 1)                                     # (B, 1, D) each
        return self.proj_out(modulate(img, shift, scale))                   # (B, L, 64)


def check_parts(path):
    """ValueError, before anything is loaded, when the transformer of a FLUX.1 folder is not as wide
    as its autoencoder and text encoders -> the settings that a ControlNet must share with it."""
    with reading(path):
        widths = {
            "in_channels": 4 * VAE.read_config(f"{path}/vae")["latent_channels"],
            "joint_attention_dim": T5.read_config(f"{path}/text_encoder_2")["d_model"],
            "pooled_projection_dim": CLIPText.read_config(f"{path}/text_encoder")["hidden_size"]
        }
        config = Flux.read_config(f"{path}/transformer", **widths)
        heads = ["num_attention_heads", "attention_head_dim"]
        return {name: config[name] for name in [*widths, *heads]}


# ---- the sampler -------------------------------------------------------------------------------

SCHEDULE = {                                                                # FLUX.1-dev's
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096
}
EULER = {                               # what else the file may say of levels, steps and timesteps
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False
}


def sigmas(steps, image_tokens, schedule=SCHEDULE):
    """Noise levels 1 ... 0 of `steps` Euler steps -> (steps+1,) fp32. `schedule`: what
    scheduler/scheduler_config.json says. dev: more tokens hide noise better, so the levels shift
    towards 1: sigma' = e^mu / (e^mu + 1/sigma - 1), mu linear in the tokens. schnell: a fixed
    `shift` in place of e^mu."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, at least 1 is needed")
    check_settings(schedule, EULER)
    # What the file leaves out is as in diffusers.
    schedule = {**SCHEDULE, "use_dynamic_shifting": False, "shift": 1.0, **schedule}
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    shift = schedule["shift"]
    if schedule["use_dynamic_shifting"]:
        low = schedule["base_image_seq_len"]
        start = schedule["base_shift"]
        slope = (schedule["max_shift"] - start) / (schedule["max_image_seq_len"] - low)
        shift = math.exp(start + slope * (image_tokens - low))
    sigma = shift / (shift + 1 / sigma - 1)
    return F.pad(sigma, (0, 1)).float()                                     # 0 at the end


@torch.no_grad()
def denoise(
    flux,
    noise,                  # (B, L, 64), packed
    txt,                    # (B, T, 4096), of the weights' type
    pooled,                 # (B, 768), of the weights' type
    img_ids,                # (L, 3)
    levels,                 # (steps+1,), from `sigmas`
    guidance=3.5,           # an embedding, one pass; ignored by a checkpoint without it (schnell)
    source=None,            # (B, L, 64), packed
    strength=1.0,           # 1 starts from noise; less starts from the noised source and runs the
                            # last strength * steps steps, rounded up; 0 returns the source
    negative=None,          # (txt, pooled)
    cfg=1.0,                # other than 1: classifier-free guidance against `negative`, two passes
    control=None,           # (step, steps, x) -> (double_residuals, single_residuals)
    progress=iter           # wraps the range of steps (tqdm)
):
    """Euler steps from noise to a picture -> packed latents (B, L, 64), fp32."""
    if not 0 <= strength <= 1 or source is None and strength < 1:
        raise ValueError(
            f"strength is {strength}; it must lie in 0..1, and below 1 it needs a source picture"
        )
    if cfg != 1 and not negative:
        raise ValueError(f"cfg is {cfg}; other than 1 it needs a negative prompt")
    steps = len(levels) - 1
    levels = levels[int(steps - steps * strength):].to(noise.device)
    steps = len(levels) - 1                                                 # how many of them run
    x = noise.float()
    if source is not None:
        x = (1 - levels[0]) * source.float() + levels[0] * x
    shared = (img_ids, levels, guidance)
    modulations, rope = flux.prepare(txt, pooled, *shared)
    if cfg != 1:
        no_txt, _ = negative
        no_modulations, no_rope = flux.prepare(*negative, *shared)
    for i in progress(range(steps)):
        residuals = control(i, steps, x) if control else ((), ())
        img = x.to(txt.dtype)
        v = flux.velocity(img, txt, modulations[i], rope, *residuals).float()
        if cfg != 1:
            no_v = flux.velocity(img, no_txt, no_modulations[i], no_rope, *residuals).float()
            v = no_v + cfg * (v - no_v)
        x = x + (levels[i + 1] - levels[i]) * v                             # Euler
    if not x.isfinite().all():
        raise ValueError(
            f"the latents are not finite in {txt.dtype}: a spoiled checkpoint, or a type too small "
            "(use bfloat16 or float32)"
        )
    return x


# ---- tokenizers: from a FLUX.1 folder's files to ids -------------------------------------------

def joined(caption, instruction):
    """What FLUX.1 reads (ours: the paper does not say)."""
    both = caption and instruction
    return f"{caption}. {instruction}" if both else caption or instruction


class TextTokenizer:
    """Prompts (see encode_prompt) -> ids (N, T), cut or padded to model_max_length of
    tokenizer_config.json, at most `limit`. `path`: the folder `tokenizer` (CLIP) or `tokenizer_2`
    (T5); `reader`: who reads the ids, for the line on stderr that says what was cut."""

    def __init__(self, path, limit=512, reader="the text encoder"):
        file = f"{path}/tokenizer.json"
        config = read_json(f"{path}/tokenizer_config.json")
        with reading(path):
            self.length = min(config.get("model_max_length", limit), limit)
            backend = Tokenizer.from_file(file) if Path(file).is_file() else clip_bpe(path)
            backend.no_truncation()
            pad_id = backend.token_to_id(written(config["pad_token"]))
            backend.enable_padding(length=self.length, pad_id=pad_id)
        self.backend = backend
        self.reader = reader

    def __call__(self, prompts):
        return torch.tensor([self.ids(prompt) for prompt in prompts])

    def ids(self, prompt):
        """The ids (T,) of "caption. instruction", without the last tokens of the caption where it
        is too long; of the instruction alone where even that is."""
        caption, instruction = (prompt, "") if isinstance(prompt, str) else prompt
        found = self.backend.encode(joined(caption, instruction))
        ids = found.ids
        spans = found.offsets                                               # (0, 0): special tokens
        inside = [i for i, (start, end) in enumerate(spans) if start < end <= len(caption)]
        excess = len(ids) - self.length                                     # 0 where it is padded
        cut = inside[::-1][:excess]                                         # from the last on
        if cut:
            rest = caption[spans[cut[-1]][0]:]
            print(f"{self.reader} reads {self.length} tokens; cut from the prompt: {rest!r:.300}",
                  file=sys.stderr)
        if excess > len(cut) and instruction:
            return self.ids(instruction)
        for i in cut:
            del ids[i]
        return ids


def clip_bpe(path):
    """CLIP's lower-casing byte-level BPE from vocab.json and merges.txt."""
    start = "<|startoftext|>"
    end = "<|endoftext|>"
    vocab, merges = models.BPE.read_file(f"{path}/vocab.json", f"{path}/merges.txt")
    # The vocabulary: 256 bytes, the same at a word's end, two special tokens; the rest are merges.
    choose("the number of merges in merges.txt", len(merges), {len(vocab) - 514: None})
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token=end, end_of_word_suffix="</w>"))
    bpe.add_special_tokens([start, end])
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])
    bpe.post_processor = processors.RobertaProcessing(
        (end, vocab[end]),
        (start, vocab[start])
    )
    return bpe


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = shipped("mini/flux")
    flux = Flux.load(f"{folder}/transformer")
    txt, pooled = encode_prompt(folder, ["A red apple in front of a mint wall"])
    noise = pack(torch.randn(1, 16, 24, 24))
    x = denoise(flux, noise, txt, pooled, image_ids(24, 24), levels=sigmas(20, 144))
    image = VAE.load(f"{folder}/vae").decode(unpack(x, 24, 24))             # (1, 3, 192, 192)
    print("R, G, B in the middle of the apple:", to_picture(image[0])[108, 72])
