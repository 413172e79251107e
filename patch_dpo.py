"""Preferences for the picture model: PatchDPO, Diffusion-DPO and Diffusion-DRO, whole: the losses,
what they need (features of patches, image prompts, trajectories), and the training of each.

    p(x)[h,w]   = max over i,j of cos( f(x)[h,w], f(x_ref)[i,j] )                      (PatchDPO 3)
    L_PatchDPO  = || (v_gen - v_theta) p~_gen ||^2
                  + || (v_ref - v_theta) (1 - p~_ref) ||^2                            (PatchDPO S1)
    L_DPO       = -log sigma( -beta/2 [ (l_win - l_win_ref) - (l_lose - l_lose_ref) ] )
    L_DRO       = max( 0, margin + (l_expert - l_expert_ref) - (l_policy - l_policy_ref) )
    Z_new       = Attn(Q, K_text, V_text) + sum over i of Attn(Q, K_img_i, V_img_i)    (S5-S7)

v is a velocity, l the mean squared error of a predicted one. The papers predict the noise, and
||eps - eps^||^2 = (1-t)^2 ||v - v^||^2, so only a weight in t differs. f is an image encoder
(DINOv2 or ViT); its self-supervised training is ours, because the paper's text of it is not public.
The image prompt is ours, trained from scratch, or XLabs' public IP-Adapter for FLUX.1-dev.
Shapes: H, W count patches, S = H W patches of one picture, h, w latent pixels, C channels, L image
tokens, M references, N edits, G generated pictures of each. Losses give one number a sample.
Try it: python patch_dpo.py
"""
import copy
import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

import lora
from controlnet import FLUX_PARTS
from flux import (ACTIVATIONS, VAE, CLIPMLP, Flux, Pretrained, attend, check_parts, check_settings,
                  clip_half, denoise, encode_prompt, image_ids, pack, rope_table, rotate, sigmas,
                  unpack, read_square, to_picture, to_tensor)
from graph import check_keys, read_jsonl
from qwen import (DTYPES, RANK, WORLD, TrainSettings, all_reduce, barrier,
                  choose, fingerprint, flag, generator_for, load_checkpoint, pick_device,
                  read_json, read_tensors, reading, resolve, seed_for, shipped,
                  write_whole)


# ---- patch quality and the losses ----------------------------------------------------------------

def patch_quality(f_x, f_ref):
    """Of every patch of x the cosine to the patch of the reference that is most like it:
    (B, H, W, D), (B, H', W', D) -> (B, H, W) in [-1, 1]. Several references: stack their maps
    along H'. The quality of the reference, p(x_ref), is the same with the arguments exchanged."""
    cosine = unit_patches(f_x) @ unit_patches(f_ref).mT                     # (B, HW, H'W')
    return cosine.amax(2).view(f_x.shape[:3])                               # (3)


def unit_patches(f):
    """A feature map (B, H, W, D) -> the list of its patches (B, S, D), of length 1."""
    return F.normalize(f.flatten(1, 2).float(), dim=-1)


def patch_weights(quality, size):
    """p~ of the loss, which the paper does not define. Ours: quality (B, H, W) is stretched so that
    a picture's worst patch gets 0 and its best 1, then brought to the latent grid `size` = (h, w)
    -> (B, h, w). A picture whose patches are all alike has no best: it is clipped to [0, 1]."""
    low = quality.amin((1, 2), keepdim=True)                                # (B, 1, 1)
    span = quality.amax((1, 2), keepdim=True) - low
    p = torch.where(
        span > 1e-4,
        (quality - low) / span,
        quality
    )
    p = F.interpolate(                                                      # (B, 1, h, w)
        p[:, None], size, mode="bilinear", antialias=True)
    return p[:, 0].clamp(0, 1)


def patch_dpo_loss(error_gen, error_ref, weight_gen, weight_ref, power=2):
    """Errors (prediction - target) of the generated and of the reference picture (B, C, h, w),
    their weights p~ (B, h, w) -> (B,). power 2 is the paper's formula (the weight is inside the
    square), 1 the authors' code, whose batch mean is half of this sum."""
    good = weight_gen[:, None] ** power             # learn what was generated well
    missed = (1 - weight_ref[:, None]) ** power     # learn of the reference what went missing
    gen = good * error_gen ** 2
    ref = missed * error_ref ** 2
    return gen.mean((1, 2, 3)) + ref.mean((1, 2, 3))                        # (S1)


def diffusion_dpo_loss(win, lose, ref_win, ref_lose, beta):
    """Mean squared errors (B,) of the trained and of the frozen model, with the same noise and time
    within a pair -> (B,). Authors' code; beta is 100 in Flow-GRPO's version for flows."""
    better = (win - ref_win) - (lose - ref_lose)
    return -F.logsigmoid(-0.5 * beta * better)


def dro_loss(expert, ref_expert, policy, ref_policy, margin=1e-3):
    """Mean squared errors (B,): on an expert's picture against its velocity, and on a point of the
    policy's trajectory against the velocity that the policy had there -> (B,). Authors' code."""
    better = (expert - ref_expert) - (policy - ref_policy)
    return (better + margin).clamp_min(0)


def flow(x_0, noise, t):
    """On the straight way from latents (B, L, C) to noise, at t (B,): x_t and its velocity."""
    t = t[:, None, None]
    return (1 - t) * x_0 + t * noise, noise - x_0


# ---- f: features of patches ----------------------------------------------------------------------

class ViTAttention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(width, width, bias) for name in names})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x):                                                   # (B, 1+S, D)
        qkv = [layer(x) for layer in self.attention.values()]
        return self.output.dense(attend(*qkv, self.heads))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.lambda1 * x


class ViTLayer(nn.Module):
    """One pre-norm transformer layer, with DINOv2's names. `scale`: LayerScale, or nn.Identity for
    ViT and CLIP, which have none."""

    def __init__(self, config, scale):
        super().__init__()
        width = config["hidden_size"]
        eps = float(config["layer_norm_eps"])
        hidden = config.get("intermediate_size") or int(width * config["mlp_ratio"])
        activation = choose("hidden_act", config["hidden_act"], ACTIVATIONS)
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.attention = ViTAttention(
            width, config["num_attention_heads"], config.get("qkv_bias", True))
        self.mlp = CLIPMLP(width, hidden, activation())
        self.layer_scale1 = scale(width)
        self.layer_scale2 = scale(width)

    def forward(self, x):                                                   # (B, 1+S, D)
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class ViTEmbeddings(nn.Module):
    """Patches as vectors, each with its position, behind the class token. `side`: patches along
    an edge of the pictures that it was trained on. `clip`: as CLIP stores them, without leading
    ones in the shapes, and without a bias."""

    def __init__(self, width, patch, side, clip):
        super().__init__()
        self.side = side
        ones = () if clip else (1, 1)
        self.cls_token = nn.Parameter(0.02 * torch.randn(*ones, width))
        self.position_embeddings = nn.Parameter(0.02 * torch.randn(*ones[1:], 1 + side ** 2, width))
        self.patch_embeddings = nn.ModuleDict({
            "projection": nn.Conv2d(3, width, patch, patch, bias=not clip)
        })

    def forward(self, pixels):
        x = self.patch_embeddings.projection(pixels)                        # (B, D, H, W)
        position = self.position_embeddings.view(1, -1, x.shape[1])         # (1, 1+side*side, D)
        places = position[:, 1:].mT.unflatten(2, (self.side, -1))           # (1, D, side, side)
        places = F.interpolate(places, x.shape[2:], mode="bicubic")         # (1, D, H, W)
        patches = (x + places).flatten(2).mT                                # (B, S, D)
        first = self.cls_token + position[:, :1]                            # (1, 1, D)
        return torch.cat([first.expand_as(patches[:, :1]), patches], 1)     # (B, 1+S, D)


# What preprocessor_config.json must say beside mean and std. Its sizes and crops are not followed:
# f reads pictures of any size.
PROCESSOR = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


PUBLIC_NAMES = {                # a ViT's and CLIP's -> DINOv2's, which are ours
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "class_embedding": "cls_token",
    "position_embedding.weight": "position_embeddings",
    "patch_embedding.": "patch_embeddings.projection.",
    "encoder.layers": "encoder.layer",
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.out_proj": "attention.output.dense",
    "post_layernorm": "layernorm"
}


class ImageFeatures(Pretrained):
    """DINOv2, ViT (DINO's, too) or CLIP's vision tower (with its projection, or in a whole CLIP):
    features(image (B, 3, height, width) in [-1, 1]) -> (B, H, W, D), the last feature map, after
    the last norm. Built from config.json's values, and mean and std (2, 3) of pixels in [0, 1],
    which may follow."""

    def __init__(self, config, mean_std=None):
        super().__init__()
        config = clip_half(config, "vision")
        self.kind = config["model_type"]
        scale = choose(
            "model_type",
            self.kind,
            {"dinov2": LayerScale, "vit": nn.Identity, "clip_vision_model": nn.Identity}
        )
        clip = self.kind == "clip_vision_model"
        self.mean_std = mean_std
        self.patch = config["patch_size"]
        self.side = config["image_size"]                    # pixels, of its training pictures
        width = config["hidden_size"]
        eps = config["layer_norm_eps"]
        self.embeddings = ViTEmbeddings(width, self.patch, self.side // self.patch, clip)
        layers = [ViTLayer(config, scale) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.Sequential(*layers)})
        self.layernorm = nn.LayerNorm(width, eps)
        self.pre_layrnorm = self.visual_projection = nn.Identity()
        if clip:                                            # whose files spell it so
            self.pre_layrnorm = nn.LayerNorm(width, eps)
            self.visual_projection = nn.Linear(width, config["projection_dim"], bias=False)

    def tokens(self, image):
        """(B, 3, height, width) in [-1, 1] -> (B, 1+S, D): the class token, then the patches row by
        row. A picture that the patch does not divide is resized to the nearest size that it does,
        positions are interpolated; where nothing is to be resized, that changes no bit."""
        size = [n * self.patch for n in self.cells(image)]
        image = F.interpolate(image, size, mode="bicubic", antialias=True)
        mean, std = self.mean_std.to(image)[..., None, None]                # (3, 1, 1)
        pixels = ((image + 1) / 2 - mean) / std
        x = self.pre_layrnorm(self.embeddings(pixels))
        return self.layernorm(self.encoder.layer(x))

    def cells(self, image):
        """H, W: into how many patches a picture is cut."""
        return [max(1, round(n / self.patch)) for n in image.shape[2:]]

    def forward(self, image):
        return self.tokens(image)[:, 1:].unflatten(1, self.cells(image))    # (B, H, W, D)

    def embed(self, image):
        """What the whole picture shows: CLIP's projection (B, P), else the class token (B, D), not
        normalised."""
        return self.visual_projection(self.tokens(image)[:, 0])

    @classmethod
    def load(cls, path, device="cpu"):
        """`path`: folder or hub name (facebook/dinov2-base, openai/clip-vit-base-patch32).
        ValueError for other model types or steps, or when a tensor does not fit."""
        path = resolve(path, ["*.json", "model*.safetensors"])
        model = super().load(path, device)
        file = path / "preprocessor_config.json"
        with reading(file):
            processor = read_json(file)
            check_settings(processor, PROCESSOR)
            rows = [processor["image_mean"], processor["image_std"]]
            model.mean_std = torch.tensor(rows).view(2, 3)
        return model

    @staticmethod
    def rename(name):
        """A public checkpoint's name -> ours (DINOv2's); None: it plays no role in features."""
        name = name.removeprefix("dinov2.").removeprefix("vit.").removeprefix("vision_model.")
        unused = name.startswith(("pooler.", "classifier.", "text_", "logit_scale"))
        if unused or name.endswith(("mask_token", "position_ids")):
            return None
        if ".attention." not in name:
            name = name.replace(".intermediate.dense", ".mlp.fc1")
            name = name.replace(".output.dense", ".mlp.fc2")
        for public, ours in PUBLIC_NAMES.items():
            name = name.replace(public, ours)
        return name


# ---- image prompts -------------------------------------------------------------------------------

PUBLIC_PROMPT = "XLabs-AI/flux-ip-adapter-v2"           # for FLUX.1-dev, and what it sees with
PUBLIC_CLIP = "openai/clip-vit-large-patch14"
XLABS = "ip_adapter_proj_model.proj.weight"             # a tensor that only its files hold


class ImagePrompt(nn.Module):
    """Decoupled cross-attention of Flux's image tokens to reference pictures: keys and values of
    its own in every block, the text's queries (S5-S7). `width`: of the reference features.

    The values start at zero, so an untrained prompt changes nothing. The authors have a frozen
    projection of the features before keys and values; trained from scratch, these are all that a
    projection would be, and there is none (ours)."""
    scale = 1.0                 # of what the pictures add; `load` takes another

    def __init__(self, flux, width):
        super().__init__()
        self.width = width
        self.to_k_ip = nn.ModuleList()
        self.to_v_ip = nn.ModuleList()
        inner = flux.x_embedder.out_features
        for _ in flux.blocks():
            self.to_k_ip.append(nn.Linear(width, inner, bias=False))
            self.to_v_ip.append(nn.Linear(width, inner, bias=False))
            nn.init.zeros_(self.to_v_ip[-1].weight)

    @staticmethod
    def encode(features, images):
        """What it attends to in pictures (n, 3, height, width): their patches (n, S, D)."""
        return features(images).flatten(1, 2)

    def attend_to(self, flux, references, ids=None):
        """From now on `flux`, painting tokens at `ids` (L, 3), attends to `references` (B, M, ...),
        M encoded pictures each; None: to the text alone. ValueError for other features."""
        for block in flux.blocks():
            block.image_prompt = block.attn.image_prompt = None
        if references is None:
            return
        if references.shape[-1] != self.width:
            raise ValueError(f"--features gives {references.shape[-1]} numbers a patch or picture, "
                             f"the image prompt was trained on {self.width}")
        self.hang_into(flux, references, ids)

    def hang_into(self, flux, references, ids):
        """Ours: queries and keys are rotated as in Flux's own attention, each reference (B, M, S,
        D), a square map, stretched over the picture. Without that the prompt learned a third as
        fast."""
        turn = rope_table(ids, flux.axes)
        turn_ref = rope_table(self.places(references.shape[2], ids), flux.axes)
        for block, to_k, to_v in zip(flux.blocks(), self.to_k_ip, self.to_v_ip):
            split = (block.attn.heads, -1)
            k = to_k(references).unflatten(-1, split)                       # (B, M, S, H, d)
            k = rotate(k, turn_ref).transpose(2, 3)                         # (B, M, H, S, d)
            v = to_v(references).unflatten(-1, split).transpose(2, 3)
            block.attn.image_prompt = partial(self.added, turn, k, v)

    def places(self, S, ids):
        """Where a square map's patches stand when it is stretched over the picture -> (S, 3): a
        position's middle lies 0.5 after it."""
        side = 2 * math.isqrt(S)
        own = image_ids(side, side, ids.device)                             # (S, 3)
        middles = (own + 0.5) / (own.amax(0) + 1)                           # in [0, 1]
        return middles * (ids.amax(0) + 1) - 0.5

    def added(self, turn, k, v, q):
        """q (B, H, L, d), k and v (B, M, H, S, d) -> (B, H, L, d): the references' attentions."""
        q_ip = q.transpose(1, 2).to(k.dtype)                                # (B, L, H, d)
        q_ip = rotate(q_ip, turn).transpose(1, 2)[:, None]                  # (B, 1, H, L, d)
        z = F.scaled_dot_product_attention(q_ip, k, v)                      # (S6) (B, M, H, L, d)
        return self.scale * z.sum(1).to(q.dtype)                            # (S7)

    def save(self, file):
        save_file(self.state_dict(), file)

    @staticmethod
    def load(file, flux, scale=1.0):
        """Ours or XLabs', from a file, folder or hub name. ValueError naming what to give when
        there is none, or it was made for another Flux."""
        try:
            if not str(file).endswith(".safetensors"):
                file = resolve(file, ["ip_adapter.safetensors"])
            stored = read_tensors(file)
            with reading(file):
                if XLABS in stored:
                    prompt = IPAdapter(flux, stored)
                elif "to_k_ip.0.weight" in stored:
                    prompt = ImagePrompt(flux, stored["to_k_ip.0.weight"].shape[1])
                else:
                    raise ValueError("no image prompt that `train.py patch` wrote, nor XLabs' "
                                     "IP-Adapter (InstantX' and others cannot be read)")
            load_checkpoint(prompt, file)
        except ValueError as error:
            raise ValueError(f"{error}; for FLUX.1-dev give --image-prompt {PUBLIC_PROMPT} and "
                             f"--features {PUBLIC_CLIP}") from None
        prompt.scale = scale
        return prompt


class IPAdapter(ImagePrompt):
    """XLabs' FLUX IP-Adapter, v1 and v2, with the names in its file: a picture's CLIP embedding
    becomes a few tokens, and each double block attends to those of all pictures at once, none of
    them rotated. `scale`: a number, or a list with one for each of these blocks. Training leaves
    the projection to tokens as it is, as the authors of PatchDPO do."""

    def __init__(self, flux, stored):
        nn.Module.__init__(self)
        size, self.width = stored[XLABS].shape                              # S C, P
        token = len(stored["ip_adapter_proj_model.norm.weight"])            # C
        project = nn.Sequential()
        project.proj = nn.Linear(self.width, size)
        project.split = nn.Unflatten(2, (-1, token))                        # (B, M, S, C)
        project.norm = nn.LayerNorm(token)
        project.join = nn.Flatten(1, 2)                                     # (B, M S, C)
        self.ip_adapter_proj_model = project.requires_grad_(False)
        self.double_blocks = nn.ModuleList()
        inner = flux.x_embedder.out_features
        for _ in flux.transformer_blocks:
            layers = nn.ModuleDict({
                "ip_adapter_double_stream_k_proj": nn.Linear(token, inner),
                "ip_adapter_double_stream_v_proj": nn.Linear(token, inner)
            })
            self.double_blocks.append(nn.ModuleDict({"processor": layers}))

    @staticmethod
    def encode(features, images):
        """CLIP's embeddings (n, P), of the size of picture that CLIP was trained on."""
        choose("--features' model_type", features.kind, {"clip_vision_model": None})
        images = F.interpolate(images, features.side, mode="bicubic", antialias=True)
        return features.embed(images)

    def hang_into(self, flux, references, ids):
        """references (B, M, P)."""
        tokens = self.ip_adapter_proj_model(references)                     # (B, M S, C)
        scales = self.scale
        if not isinstance(scales, list):
            scales = [scales] * len(self.double_blocks)
        for block, layer, scale in zip(flux.transformer_blocks, self.double_blocks, scales):
            to_k, to_v = layer.processor.values()
            like = block.attn.to_q.weight                                   # Flux's type
            k = to_k(tokens).type_as(like)                                  # (B, M S, D)
            v = (scale * to_v(tokens)).type_as(like)
            block.image_prompt = partial(attend, k=k, v=v, heads=block.attn.heads)


# ---- settings ------------------------------------------------------------------------------------

@dataclass
class PictureSettings(TrainSettings):
    """What `train.py patch` and `dro` share.    miniature, published (on Flux), what it is"""
    scenes:       str   = flag("mini/data/scenes.jsonl", "scenes.jsonl",
                               "pictures, their edits and, for dro, the true pictures")
    flux:         str   = flag("mini/flux", "black-forest-labs/FLUX.1-dev", "FLUX.1")
    features:     str   = flag("mini/vit", PUBLIC_CLIP,
                               "what an image prompt sees with: DINOv2 or ViT, XLabs' with CLIP")
    held_out:     int   = flag(4, 4, "scenes at the end of the file that only evaluate (ours)")
    size:         int   = flag(192, 512, "side of the pictures in pixels")
    paint_steps:  int   = flag(20, 20, "Euler steps of a painted picture")
    refresh:      int   = flag(1, 1, "M, steps between copies of the policy into the sampler "
                               "(dro only)")
    ema:          float = flag(0.0, 0.9999, "decay of the average over the steps that is saved; "
                               "0: the last step alone (dro only)")
    weight_decay: float = flag(0.0, 0.01, "AdamW's")


@dataclass
class PatchSettings(PictureSettings):
    """An image prompt for Flux, by PatchDPO or by what it is compared with."""
    loss:         str   = flag("patch", "patch", "patch: PatchDPO, reconstruction: with equal "
                               "weights, dpo, dro: Diffusion-DPO and -DRO; one of LOSSES")
    image_prompt: str   = flag("mini/image_prompt/image_prompt.safetensors",
                               PUBLIC_PROMPT,
                               "to begin with: ours (mini/pretrain.py makes one) or XLabs'")
    generated:    str   = flag("runs/generated", "runs/generated",
                               "generated pictures and their quality; made when not there")
    quality_features: str = flag("", "google/vit-base-patch16-224", "f of patch quality (paper: "
                                 "trained on ImageNet), --features when not given")
    samples:      int   = flag(2, 1, "generated pictures of each edit, at least 2 for dpo "
                               "(--loss patch or reconstruction or dpo only)")
    power:        int   = flag(2, 2, "of the weight: 2 paper, 1 authors' code (--loss patch or "
                               "reconstruction only)", choices=[1, 2])
    beta:         float = flag(100.0, 100.0, "DPO's temperature, Flow-GRPO's (--loss dpo only)")
    drop:         float = flag(0.0, 0.05, "share of rows each without text, without reference and "
                               "without both (authors' code)", bounds=(0, 0.3))
    buffer:       int   = flag(16, 16, "trajectories in the buffer (--loss dro only)")
    steps:        int   = flag(60, 30_000, "optimiser steps")
    batch:        int   = flag(16, 32, "global batch, whatever the number of processes")
    micro:        int   = flag(16, 1, "rows of one pass, pictures painted at once")
    lr:           float = flag(3e-4, 3e-5, "peak learning rate, then a cosine (paper: constant)")
    clip:         float = flag(1.0, 0.0, "largest gradient norm; 0 never clips")


@dataclass
class DROSettings(PictureSettings):
    """A LoRA for Flux, by Diffusion-DRO."""
    rank:         int   = flag(16, 16, "LoRA rank (ours; the paper trains all weights)")
    alpha:        int   = flag(32, 32, "LoRA alpha: the output times alpha / rank (ours)")
    drop:         float = flag(0.0, 0.2, "share of rows without text (paper)", bounds=(0, 1))
    buffer:       int   = flag(16, 256, "trajectories in the buffer")
    steps:        int   = flag(40, 1600, "optimiser steps")
    batch:        int   = flag(8, 256, "global batch, whatever the number of processes")
    micro:        int   = flag(8, 4, "rows of one pass, pictures painted at once")
    lr:           float = flag(1e-3, 1e-4, "peak learning rate, then a cosine (paper: constant)")


# ---- what is trained on: edits -------------------------------------------------------------------

SAME_OBJECT = ("background", "lighting", "object")      # edits that leave the object what it was


SCENE_KEYS = ("image", "caption", "edits", "edit_type", "attribute", "instruction", "references")


def read_scenes(path, *needed):
    """Rows of scenes.jsonl whose edits have the string fields `needed`; pictures as paths. An edit
    without a picture or references of its own has its scene's. ValueError naming the line."""
    folder = Path(path).parent
    rows = read_jsonl(path, image=str, caption=str)
    for row in rows:
        name = row["image"]
        row["image"] = folder / name
        with reading(f"{path}:{row['line']}"):
            edits = row.setdefault("edits", [])
            check_keys(row, SCENE_KEYS)                     # "edit" may be meant as "edits"
            for edit in edits:
                check_keys(edit, SCENE_KEYS)
                if not all(isinstance(edit[field], str) for field in needed):
                    raise ValueError(f"an edit has {', '.join(needed)}, all of them strings")
                edit["image"] = folder / edit.get("image", name)
                edit["scene"] = row["image"]
                references = edit.get("references", [name])
                if not references or not isinstance(references, list):
                    raise ValueError("references: a list of file names")
                edit["references"] = [folder / file for file in references]
                edit["caption"] = row["caption"]
                edit["line"] = row["line"]
    return rows


WHOLE = itemgetter("caption", "instruction")            # what Flux reads of an edit, and
ALONE = itemgetter("instruction")                       # without the caption


def edits_of(scenes, types, wordings):
    """The scenes' edits of these types (all when empty), once for each wording of the prompt."""
    found = []
    for scene in scenes:
        for edit in scene["edits"]:
            if not types or edit["edit_type"] in types:
                for wording in wordings:
                    found.append({**edit, "prompt": wording(edit)})
    return found


def different(values):
    """The different ones of some values, and which of them each value is (N,)."""
    places = {}
    found = [places.setdefault(value, len(places)) for value in values]
    return list(places), torch.tensor(found)


def read_squares(files, size):
    """Pictures cut to squares -> (n, 3, size, size) in [-1, 1]."""
    return torch.stack([to_tensor(read_square(file, size)) for file in files])


class Edits:
    """N edits of scenes.jsonl: the first `count` are trained on, the rest, of the last --held-out
    scenes, only evaluated. Each has a prompt, its scene's picture, and the true picture, which is
    the scene's where it is not known. Edits N + n, 2N + n, 3N + n are edit n without text, without
    reference, without both. All that lies in main memory, and a batch at a time goes to the
    device: 10,000 prompts are 42 GB. On the device stands what is frozen: Flux and f."""

    def __init__(self, settings, types=(), wordings=(WHOLE,)):
        self.settings = settings
        self.device = pick_device(settings.device)
        scenes = read_scenes(settings.scenes, "edit_type", "instruction")
        last = settings.held_out
        trained = edits_of(scenes[:-last], types, wordings)
        held = edits_of(scenes[-last:], types, wordings[-1:])
        if not trained or not held:
            raise ValueError(f"{settings.scenes}: --held-out {last} leaves no edit "
                             f"({', '.join(types) or 'of any type'}) to train or to evaluate on")
        self.count = self.items = len(trained)
        self.rows = trained + held
        prompts, prompt = different(row["prompt"] for row in self.rows)
        without = torch.full_like(prompt, len(prompts))
        self.prompt = torch.cat([prompt, without]).repeat(2)                # (4N,)
        shown = [(row["scene"], row["image"], *row["references"]) for row in self.rows]
        files, places = different(chain(*shown))
        places = pad_sequence(places.split([*map(len, shown)]), True, -1).repeat(4, 1)
        self.scene, self.truth = places[:, :2].T                            # (4N,) into pictures
        self.references = places[:, 2:]                                     # (4N, M), -1: none
        self.pictures = read_squares(files, settings.size)                  # (P, 3, size, size)

        dtype = DTYPES[settings.dtype]
        path = resolve(settings.flux, FLUX_PARTS)
        check_parts(path)
        self.txt, self.pooled = encode_prompt(path, [*prompts, ""], self.device, dtype)
        self.flux = Flux.load(path / "transformer", self.device, dtype)
        self.flux.requires_grad_(False)
        self.flux.checkpointing = settings.checkpointing
        self.vae = VAE.load(path / "vae", self.device)
        token = 2 * self.vae.factor                                         # pixels of its edge
        if settings.size % token:
            raise ValueError(f"--size is {settings.size}; it must be a multiple of {token}, "
                             "the pixels of one token")
        side = settings.size // self.vae.factor
        self.grid = (side, side)                                            # (h, w)
        self.ids = image_ids(side, side, self.device)                       # (L, 3)
        self.latent = pack(self.in_parts(self.vae.encode, self.pictures))   # (P, L, 64)
        self.features = ImageFeatures.load(settings.features, self.device)

    def texts(self, item):
        """What Flux reads of edits (B,): txt (B, T, 4096) and pooled (B, 768), on the device."""
        which = self.prompt[item]
        return [states[which].to(self.device) for states in (self.txt, self.pooled)]

    @torch.no_grad()
    def in_parts(self, function, images):
        """function(images), --micro at a time on the device."""
        parts = images.split(self.settings.micro)
        return torch.cat([function(part.to(self.device)).cpu() for part in parts])

    def decode(self, latent):
        """(n, L, 64) -> pictures (n, 3, size, size)."""
        return self.in_parts(self.vae.decode, unpack(latent, *self.grid)).clamp(-1, 1)

    def noise(self, generator):
        return torch.randn(self.latent.shape[1:], generator=generator)


# ---- what is tuned: something small beside the frozen Flux ---------------------------------------

class ImagePrompts:
    """The policy is an image prompt, the reference a copy of it. `references` (4N, M): the pictures
    that each edit sees, -1 for none."""
    drops = (1, 2, 3)           # what may be dropped: see Edits

    def __init__(self, edits, prompt, references):
        self.edits = edits
        shown, self.references = references.unique(return_inverse=True)
        encode = partial(prompt.encode, edits.features)
        self.maps = edits.in_parts(encode, edits.pictures[shown])           # (R, S, D) or (R, P)
        self.maps[shown < 0] = 0                            # no reference: no keys, no values
        prompt.to(edits.device)
        self.prompts = {"policy": prompt, "sampler": prompt, "reference": copy.deepcopy(prompt)}
        self.policy = dict(prompt.named_parameters())

    def select(self, who, item):
        edits = self.edits
        references = self.maps[self.references[item]]                       # (B, M, ...)
        references[item >= 2 * len(edits.rows)] = 0                         # see Edits
        self.prompts[who].attend_to(edits.flux, references.to(edits.device), edits.ids)

    def save(self, folder):
        self.prompts["policy"].save(folder / "image_prompt.safetensors")


class Adapters:
    """The policy is a LoRA, the reference is Flux without it."""
    drops = (1,)

    def __init__(self, edits):
        self.edits = edits
        settings = edits.settings
        torch.manual_seed(settings.seed)
        lora.inject(
            edits.flux,
            settings.rank,
            settings.alpha,
            dropout=0.0,
            targets=["to_q", "to_k", "to_v", "to_out.0"]
        )
        self.policy = lora.tensors(edits.flux, "policy")

    def select(self, who, item):
        lora.use(self.edits.flux, None if who == "reference" else "policy")

    def save(self, folder):
        lora.save_adapter(self.edits.flux, folder, base_model=self.edits.settings.flux)


# ---- what the methods below share ----------------------------------------------------------------

class PictureStage(Edits):
    """Edits and what is tuned on them: what the methods below share. That is what train.py asks of
    a stage (see there), but for the loss, and Flux with two velocities: the policy's, which is
    trained ("sampler": without a gradient), and the reference's, where the policy began. `tuned`
    holds the policy, {name: Parameter}, and selects whose velocity comes next.

    With DROSettings that is a LoRA, with PatchSettings an image prompt, which learns edits that
    leave the object what it was. Flux reads the instruction alone then, as the paper's "An {object}
    in the {background}": what the object looks like only the reference tells (ours)."""
    per_edit = 1                # how many items an edit is
    kept = {}                   # what a checkpoint holds beside the policy; no step moves it

    def __init__(self, settings):
        if isinstance(settings, PatchSettings):
            super().__init__(settings, SAME_OBJECT, [ALONE])
            prompt = ImagePrompt.load(settings.image_prompt, self.flux)
            self.tuned = ImagePrompts(self, prompt, self.references)
        else:
            super().__init__(settings)
            self.tuned = Adapters(self)

    def parameter_groups(self):
        named = {**self.tuned.policy, **self.kept}
        return [{"params": list(named.items())}]

    def draw(self, indices, generator):
        """Rows (item, noise (L, 64), time, edit as it is shown), the time logit-normal as Flux was
        trained."""
        items = torch.tensor(indices)
        noises = []
        times = []
        for _ in items:
            noises.append(self.noise(generator))
            times.append(torch.randn((), generator=generator).sigmoid())
        edits = self.drop(items // self.per_edit, generator)
        return list(zip(items, noises, times, edits))

    def drop(self, edit, generator):
        """Edits (B,), of each kind of drop a share of --drop."""
        chance = torch.rand(len(edit), generator=generator)
        kind = sum((chance < n * self.settings.drop).long() for n in self.tuned.drops)
        return edit + kind * len(self.rows)

    def describe(self, rows):
        edits = [self.rows[row[0] // self.per_edit % len(self.rows)] for row in rows]
        lines = [str(edit["line"]) for edit in edits]
        return f"{self.settings.scenes}, lines {', '.join(lines)}"

    def velocity(self, who, item, x, t):
        """Of edits `item` (B,) at x (B, L, 64) and t (B,) -> (B, L, 64) in fp32. Only the policy's
        has a gradient. Under checkpointing the policy must be the last that was selected."""
        txt, pooled = self.texts(item)
        t = t.to(self.device)
        with torch.set_grad_enabled(who == "policy"):
            self.tuned.select(who, item)
            return self.flux(
                img=x.to(txt),
                txt=txt,
                pooled=pooled,
                timestep=t,
                guidance=torch.ones_like(t) if self.flux.guided else None,  # 1: none (ours)
                img_ids=self.ids,
                txt_ids=txt.new_zeros(txt.shape[1], 3)
            ).float()

    def errors(self, who, item, t, *points):
        """Prediction - target at P points (x, v) of every edit, in one pass -> (P, B, L, 64)."""
        x, v = default_collate(points)                                      # (P, B, L, 64)
        found = self.velocity(
            who,
            item.repeat(len(points)),
            x.flatten(0, 1),                                                # (P B, L, 64)
            t.repeat(len(points))
        )
        return found.view_as(v) - v.to(found)

    def squares(self, item, t, *points):
        """Mean squared errors at those points -> the reference's and the policy's (P, B) each."""
        return [self.errors(who, item, t, *points).square().mean((2, 3))
                for who in ("reference", "policy")]

    @torch.no_grad()
    def paint(self, who, items, seed):
        """What the model paints for edits (n,), each from a noise of its own -> (n, L, 64)."""
        levels = sigmas(self.settings.paint_steps, len(self.ids))
        latents = []
        for item in items.split(self.settings.micro):
            self.tuned.select(who, item)
            noise = [self.noise(generator_for(seed, "picture", i)) for i in item.tolist()]
            latent = denoise(
                self.flux,
                torch.stack(noise).to(self.device),
                *self.texts(item),
                img_ids=self.ids,
                levels=levels
            )
            latents.append(latent.cpu())
        return torch.cat(latents)

    def save(self, folder):
        """What was tuned; and pictures.png: a row each of held-out edits' scenes, of what the
        reference and the policy paint from the same noise, and of the true pictures."""
        self.tuned.save(folder)
        held = torch.arange(self.count, len(self.rows))
        held = held[::max(1, len(held) // 12)]
        painted = [self.decode(self.paint(who, held, seed=0)) for who in ("reference", "policy")]
        scene = self.pictures[self.scene[held]]                             # (n, 3, size, size)
        truth = self.pictures[self.truth[held]]
        columns = torch.cat([scene, *painted, truth], 2)                    # (n, 3, 4 size, size)
        sheet = torch.cat([*columns], 2)                                    # (3, 4 size, n size)
        Image.fromarray(to_picture(sheet)).save(folder / "pictures.png")


# ---- PatchDPO: generate, estimate quality, train -------------------------------------------------

PAINTED_BY = ("scenes", "held_out", "flux", "image_prompt", "features", "quality_features", "size",
              "samples", "paint_steps", "seed", "dtype")


class Painted(PictureStage):
    """Edits, and pictures that the model paints of them before it is trained, with their quality:
    PatchDPO's first two steps."""

    def generate(self):
        """Paints each edit --samples times and judges what came of it. That stands below
        --generated, in a folder for all that it depends on, a file for each edit; only what is not
        there yet is painted, and the processes share it out."""
        settings = self.settings
        origin = [fingerprint(str(getattr(settings, name))) for name in PAINTED_BY]
        folder = Path(settings.generated) / f"{seed_for(origin):x}"
        folder.mkdir(parents=True, exist_ok=True)
        settings.generated = str(folder)
        files = [folder / f"{n}.safetensors" for n in range(self.count)]
        f = ImageFeatures.load(settings.quality_features or settings.features, self.device)
        for n in tqdm(range(RANK, self.count, WORLD), "pictures", disable=RANK > 0):
            if not files[n].exists():
                tensors = self.paint_and_judge(f, torch.tensor([n]))
                write_whole(folder, lambda at: save_file(tensors, at / files[n].name), "pictures")
        barrier()
        self.painted = default_collate([read_tensors(file) for file in files])

    def paint_and_judge(self, f, item):
        """Of one edit (1,): the latents of G pictures; the quality (G, 1 + M, H, W) of their
        patches, beside all references, and of each reference's beside them; and how like the
        references they are as a whole, by the mean of the features."""
        latent = torch.cat([self.paint("reference", item, (self.settings.seed, sample))
                            for sample in range(self.settings.samples)])
        f_gen = self.in_parts(f, self.decode(latent))                       # (G, H, W, D)
        references = self.references[item][0]                               # (M,)
        f_ref = self.in_parts(f, self.pictures[references])                 # (M, H, W, D)
        known = f_ref[references >= 0].flatten(0, 1)[None]                  # (1, M H, W, D)
        quality = [patch_quality(one.expand_as(f_gen), f_gen) for one in f_ref]
        return {
            "latent": latent,                                               # (G, L, 64)
            "quality": torch.stack([patch_quality(f_gen, known), *quality], 1),
            "likeness": F.cosine_similarity(f_gen.mean((1, 2)), known.mean((1, 2)))
        }


class PatchDPO(Painted):
    """An image prompt learns generated pictures where their patches are good, and the reference
    where patches of it went missing. Quality p is each patch's best cosine (`patch_quality`, once,
    in `generate`); weight p~ is p stretched to 0 .. 1 and resized to the latent
    (`patch_weights`); the loss is p~^2 error^2 on the generated picture plus (1 - p~)^2 error^2 on
    the reference (`patch_dpo_loss`), the mean over several (ours). --loss reconstruction: p is .5,
    all patches weigh the same."""

    def __init__(self, settings):
        super().__init__(settings)
        self.per_edit = settings.samples
        self.items *= settings.samples

    def loss(self, rows):
        """An item is a generated picture, of which an edit has several (the first edit's come
        first); it and its references get the same noise and time."""
        picture, noise, t, edit = default_collate(rows)
        which = (picture // self.per_edit, picture % self.per_edit)
        references = self.references[edit]                                  # (B, M)
        there = (references >= 0).to(self.device)
        latents = [self.painted["latent"][which], *self.latent[references.T]]       # (B, L, 64)
        points = [flow(latent, noise, t) for latent in latents]
        errors = self.errors("policy", edit, t, *points)                    # (1 + M, B, L, 64)
        quality = self.painted["quality"][which].to(errors)                 # (B, 1 + M, H, W)
        if self.settings.loss == "reconstruction":
            quality.fill_(0.5)
        error, *errors = [unpack(error, *self.grid) for error in errors]    # (B, C, h, w)
        weight, *weights = [patch_weights(p, self.grid) for p in quality.unbind(1)]
        losses = [patch_dpo_loss(error, error_ref, weight, weight_ref, self.settings.power)
                  for error_ref, weight_ref in zip(errors, weights)]
        losses = (torch.stack(losses, 1) * there).sum(1) / there.sum(1)
        return losses.sum(), {}


# ---- Diffusion-DPO and Diffusion-DRO -------------------------------------------------------------

class DiffusionDPO(Painted):
    """An image prompt learns to prefer, of an edit's generated pictures, the one that is most like
    the reference as a whole to the one that is least: what the PatchDPO paper compares itself
    with."""

    def __init__(self, settings):
        if settings.samples < 2:
            raise ValueError(f"--samples is {settings.samples}; --loss dpo needs a winner and a "
                             "loser, at least 2")
        super().__init__(settings)

    def loss(self, rows):
        """One noise and one time for both pictures."""
        item, noise, t, edit = default_collate(rows)
        latent = self.painted["latent"]                                     # (N, G, L, 64)
        likeness = self.painted["likeness"][item]                           # (B, G)
        win = flow(latent[item, likeness.argmax(1)], noise, t)
        lose = flow(latent[item, likeness.argmin(1)], noise, t)
        reference, policy = self.squares(edit, t, win, lose)
        losses = diffusion_dpo_loss(*policy, *reference, self.settings.beta)
        return losses.sum(), {"accuracy": (losses < math.log(2)).sum()}


def random_indices(n, limit, generator):
    """n different numbers below `limit` (n,); they repeat where there are fewer."""
    return torch.randperm(max(n, limit), generator=generator)[:n] % limit


class DiffusionDRO(PictureStage):
    """Pictures of experts against the model's own trajectories. With PatchSettings an image prompt
    learns, and the experts are the scenes' pictures; with DROSettings a LoRA, and they are the
    edits' true pictures. The negatives are points of the sampler's own trajectories, with the
    velocity that it had there. Every --refresh steps the sampler becomes the policy and paints a
    new buffer of them, so a negative is 0 to refresh - 1 steps old. What is saved at the end is an
    average of the policy's weights (--ema). The sampler's weights and the average are one vector
    each, all tensors end to end."""

    def __init__(self, settings):
        super().__init__(settings)
        self.expert = self.scene if isinstance(settings, PatchSettings) else self.truth     # (4N,)
        self.weights = self.tuned.policy.values()
        self.sampler = parameters_to_vector(self.weights).detach()
        self.average = self.sampler.clone()
        self.steps_drawn = torch.zeros(())
        self.kept = {                       # a resumed run needs them for the same buffer, average
            "sampler": self.sampler,
            "average": self.average,
            "steps_drawn": self.steps_drawn
        }
        self.buffer = None

    def update_average(self):
        """The average comes nearer to the policy's weights after n steps -> those weights. Of few
        steps it is a short one, as diffusers' EMAModel has it."""
        n = int(self.steps_drawn)
        decay = min(self.settings.ema, n / (n + 9))
        now = parameters_to_vector(self.weights).detach()
        self.average.lerp_(now, 1 - decay)
        return now

    def save(self, folder):
        """The average."""
        self.update_average()
        vector_to_parameters(self.average, self.weights)
        super().save(folder)

    def draw(self, indices, generator):
        """Random points of the buffer, of its edits, not those of `indices`: rows (edit, t, x, v,
        the expert's noise)."""
        now = self.update_average()
        period, late = divmod(int(self.steps_drawn), self.settings.refresh)
        if late == 0:
            self.sampler.copy_(now)
        if late == 0 or self.buffer is None:
            vector_to_parameters(self.sampler, self.weights)        # the policy is the sampler
            self.buffer = self.fill_buffer(period)
            vector_to_parameters(now, self.weights)                 # and is itself again
        self.steps_drawn += 1
        rows = []
        for n in random_indices(len(indices), self.settings.buffer, generator):
            step = torch.randint(self.settings.paint_steps, (), generator=generator)
            point = [part[n, step] for part in self.buffer]
            rows.append((*point, self.noise(generator)))
        return rows

    def fill_buffer(self, period):
        """Euler from noise for random edits -> the edits and times t of the points that it visits
        (N, steps), the points x and the velocity v there (N, steps, L, 64). The times fall in equal
        steps from a random start in (1 - 1/steps, 1], so that every time is visited (authors'
        code). The processes share the work."""
        settings = self.settings
        steps = settings.paint_steps
        g = generator_for(settings.seed, "buffer", period)
        item = random_indices(settings.buffer, self.items, g)
        noise = torch.stack([self.noise(g) for _ in item]).to(self.device)  # (N, L, 64)
        start = torch.rand(len(item), 1, generator=g)
        item = self.drop(item, g)
        t = (torch.arange(steps, 0, -1) - start) / steps                    # (N, steps)
        xv = noise.new_zeros(2, *t.shape, *noise.shape[1:])                 # (2, N, steps, L, 64)
        for i in torch.arange(len(item)).split(settings.micro)[RANK::WORLD]:
            x = noise[i]
            for step in range(steps):
                v = self.velocity("sampler", item[i], x, t[i, step])
                xv[:, i, step] = torch.stack([x, v])
                x = x - v / steps
        all_reduce(xv)
        return item[:, None].expand_as(t), t, *xv.cpu()

    def loss(self, rows):
        """Expert and policy share prompt and time."""
        item, t, x, v, noise = default_collate(rows)
        expert = flow(self.latent[self.expert[item]], noise, t)
        (ref_expert, ref_own), (on_expert, on_own) = self.squares(item, t, expert, (x, v))
        losses = dro_loss(on_expert, ref_expert, on_own, ref_own)
        return losses.sum(), {"active": (losses > 0).sum(), "drift": ref_own.sum()}


LOSSES = {                      # of `train.py patch --loss`
    "patch": PatchDPO,
    "reconstruction": PatchDPO,
    "dpo": DiffusionDPO,
    "dro": DiffusionDRO
}


if __name__ == "__main__":
    f = ImageFeatures.load(shipped("mini/vit"))
    scenes = shipped("mini/sample/scenes")
    files = [f"{scenes}/00_apple.png", f"{scenes}/00_apple_stripes.png"]
    apple, striped = f(read_squares(files, f.side)).split(1)
    print("What is new in a picture of a striped apple? Quality of its patches, 0 worst, 9 best:")
    for row in patch_weights(patch_quality(striped, apple), (12, 12))[0]:
        print(*(9 * row).round().int().tolist())
