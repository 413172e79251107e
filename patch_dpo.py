"""Preferences for the picture model: which patches of a generated picture are good, and losses that learn from it.

    p(x_gen[h,w]) = max over i,j of cos( f(x_gen)[h,w], f(x_ref)[i,j] )                                            (PatchDPO, Eq. 3)
    L_PatchDPO    = || (v_gen - v_theta) p~_gen ||^2 + || (v_ref - v_theta) (1 - p~_ref) ||^2                       (PatchDPO, supplement S1)
    L_DPO         = -log sigma( -beta/2 [ (l_win - l_win_ref) - (l_lose - l_lose_ref) ] )                          (Diffusion-DPO)
    L_DRO         = max( 0, margin + (l_expert - l_expert_ref) - (l_policy - l_policy_ref) )                       (Diffusion-DRO)
    Z_new         = Attn(Q, K_text, V_text) + sum over references i of Attn(Q, K_img_i, V_img_i)                    (PatchDPO, Eq. S5-S7)

l is a mean squared error of the predicted velocity; the papers write noise, and ||eps - eps^||^2 = (1-t)^2 ||v - v^||^2, so only a weight in t differs.
f is an image encoder (DINOv2 or ViT); its self-supervised patch training is ours, because the paper's text of it is not public.
Losses are pure functions, one number a sample. H, W count patches, h, w latent pixels, S patches of one picture, M references. Try it: python patch_dpo.py
"""
import math, sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from flux import chain, choose, rope_table, rotate, self_attention, to_tensor
from qwen import Unfilled, load_checkpoint, read_json, reading, resolve

# ---- patch quality and the losses --------------------------------------------------------------------------------------------
def patch_quality(f_x, f_ref):
    """Cosine of every patch of x to the reference patch most like it: (B, H, W, D), (B, H', W', D) -> (B, H, W) in [-1, 1].  Eq. 3.
    Several references: stack their maps along H'. The quality of the reference, p(x_ref), is the same with the arguments exchanged."""
    x, ref = units(f_x, f_ref)
    return (x @ ref.mT).amax(2).view(f_x.shape[:3])                                     # (3)

def units(*maps):
    """Feature maps (B, H, W, D) -> lists of their patches (B, HW, D), of length 1."""
    return [F.normalize(f.flatten(1, 2).float(), dim=-1) for f in maps]

def patch_weights(quality, size, how="minmax"):
    """p~ of the loss: quality (B, H, W) brought into [0, 1], then to the latent grid `size` = (h, w) -> (B, h, w).
    The paper does not define p~. "minmax" (ours): the worst patch of a picture gets 0 and the best 1; "clip" (ours): keeps the absolute level.
    A picture whose patches are all alike has no best and is clipped."""
    stretch = choose("how", how, {"minmax": True, "clip": False})
    low, high = quality.amin((1, 2), keepdim=True), quality.amax((1, 2), keepdim=True)  # (B, 1, 1)
    spread = (quality - low) / (high - low).clamp_min(1e-4)
    p = torch.where((high - low > 1e-4) & stretch, spread, quality.clamp(0, 1))
    return F.interpolate(p[:, None], size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)

def patch_dpo_loss(error_gen, error_ref, weight_gen, weight_ref, power=2):
    """Errors (prediction - target) of the generated and the reference picture (B, C, h, w), weights p~ (B, h, w) -> (B,).
    power 2 is the paper's formula (the weight is inside the square), 1 the authors' code, whose batch mean is half of this sum."""
    gen = (weight_gen[:, None] ** power * error_gen ** 2).mean((1, 2, 3))               # good patches: learn what was generated
    ref = ((1 - weight_ref[:, None]) ** power * error_ref ** 2).mean((1, 2, 3))         # what went missing: learn the reference
    return gen + ref                                                                    # (S1)

def diffusion_dpo_loss(win, lose, ref_win, ref_lose, beta):
    """Mean squared errors (B,) of the trained and of the frozen model, same noise and t within a pair -> (B,).  Authors' code; Flow-GRPO's beta is 100."""
    return -F.logsigmoid(-0.5 * beta * ((win - ref_win) - (lose - ref_lose)))

def dro_loss(expert, ref_expert, policy, ref_policy, margin=1e-3):
    """Mean squared errors (B,), on an expert's picture against its velocity, and on the policy's trajectory against the policy's -> (B,).  Authors' code."""
    return ((expert - ref_expert) - (policy - ref_policy) + margin).clamp_min(0)

# ---- f: features of patches --------------------------------------------------------------------------------------------------
class ViTLayer(nn.Module):
    """One pre-norm transformer layer, with DINOv2's names; a ViT has no layer scale."""
    def __init__(self, config, scaled):
        super().__init__()
        width, eps, self.heads = config["hidden_size"], config["layer_norm_eps"], config["num_attention_heads"]
        hidden = config.get("intermediate_size") or int(width * config["mlp_ratio"])
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = nn.ModuleDict({"attention": nn.ModuleDict({name: nn.Linear(width, width, config["qkv_bias"]) for name in ("query", "key", "value")}),
                                        "output": nn.ModuleDict({"dense": nn.Linear(width, width)})})
        self.mlp = chain(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width))
        self.layer_scale1, self.layer_scale2 = (nn.ParameterDict({"lambda1": torch.ones(width)} if scaled else {}) for _ in range(2))

    def forward(self, x):                                                               # (B, 1+S, D)
        scale1, scale2 = (layer.get("lambda1", 1) for layer in (self.layer_scale1, self.layer_scale2))
        x = x + scale1 * self_attention(self.norm1(x), self.heads, *self.attention.attention.values(), self.attention.output.dense)
        return x + scale2 * self.mlp(self.norm2(x))

class ImageFeatures(nn.Module):
    """DINOv2 or ViT; features(image (B, 3, height, width) in [-1, 1]) -> (B, H, W, D), the last feature map. Built from config.json's values
    and preprocessor_config.json's image_mean, image_std; trained on squares of `side` pixels."""
    def __init__(self, config, image_mean, image_std):
        super().__init__()
        scaled = choose("model_type", config["model_type"], {"dinov2": True, "vit": False})
        choose("hidden_act", config["hidden_act"], {"gelu": F.gelu})
        choose("use_swiglu_ffn", config.get("use_swiglu_ffn", False), {False: "MLP"})
        width, self.patch, self.side = config["hidden_size"], config["patch_size"], config["image_size"]
        self.mean, self.std = (torch.tensor(value, dtype=torch.float32, device="cpu").view(3, 1, 1) for value in (image_mean, image_std))
        sizes = {"cls_token": 1, "position_embeddings": 1 + (self.side // self.patch) ** 2}
        self.embeddings = nn.ParameterDict({name: nn.init.normal_(torch.empty(1, n, width), std=0.02) for name, n in sizes.items()})
        self.embeddings.patch_embeddings = chain(projection=nn.Conv2d(3, width, self.patch, self.patch))
        self.encoder = chain(layer=nn.Sequential(*(ViTLayer(config, scaled) for _ in range(config["num_hidden_layers"]))))
        self.layernorm = nn.LayerNorm(width, config["layer_norm_eps"])

    @classmethod
    def load(cls, path, device="cpu"):
        """`path`: folder or hub name (facebook/dinov2-base, google/vit-base-patch16-224). ValueError for other model types, or when a tensor does not fit."""
        path = resolve(path, ["*.json", "model.safetensors"])
        config, pixels = read_json(path / "config.json"), read_json(path / "preprocessor_config.json")
        with reading(path), torch.device("meta"), Unfilled():
            model = cls(config, pixels["image_mean"], pixels["image_std"])
        load_checkpoint(model, path / "model.safetensors", cls.rename)
        return model.to(device, torch.float32).eval()

    @staticmethod
    def rename(name):
        """A public checkpoint's name -> ours (DINOv2's); None for the parts that play no role in features."""
        name = name.removeprefix("dinov2.").removeprefix("vit.")
        if name.startswith(("pooler.", "classifier.")) or name.endswith("mask_token"):
            return None
        if ".attention." not in name:
            name = name.replace(".intermediate.dense", ".mlp.fc1").replace(".output.dense", ".mlp.fc2")
        return name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")

    def tokens(self, image):
        """(B, 3, height, width) in [-1, 1] -> (B, 1+S, D): the class token, then the patches row by row. Sizes that the patch does not divide are resized
        to the nearest that it does; positions are interpolated from the trained grid. Where nothing is to be resized, interpolation changes no bit."""
        size, side = [max(1, round(n / self.patch)) for n in image.shape[2:]], self.side // self.patch
        image = F.interpolate(image, [n * self.patch for n in size], mode="bicubic", antialias=True)
        x = self.embeddings.patch_embeddings(((image + 1) / 2 - self.mean.to(image)) / self.std.to(image))   # (B, D, H, W)
        first, places = self.embeddings.position_embeddings.split([1, side * side], dim=1)
        places = F.interpolate(places.mT.unflatten(2, (side, side)), size, mode="bicubic")                   # (1, D, H, W)
        first = (self.embeddings.cls_token + first).expand(len(x), -1, -1)
        return self.layernorm(self.encoder(torch.cat([first, (x + places).flatten(2).mT], dim=1)))

    def forward(self, image):
        return self.tokens(image)[:, 1:].unflatten(1, (max(1, round(image.shape[2] / self.patch)), -1))      # (B, H, W, D)

# ---- self-supervised training of f, and its score (ours) ---------------------------------------------------------------------
def random_views(B, generator=None):
    """Rotated by up to 20 degrees, scaled 0.6 to 1, shifted, half of them mirrored: maps (B, 3, 3) from a view's coordinates, x, y in [-1, 1], to the picture's."""
    angle, scale, flip, *shift = torch.rand(5, B, generator=generator)
    angle, scale = (2 * angle - 1) * math.radians(20), 0.6 + 0.4 * scale
    x, y = ((2 * s - 1) * (1 - scale) for s in shift)
    mirror, zero, cos, sin = torch.where(flip < 0.5, -1.0, 1.0), torch.zeros(B), scale * angle.cos(), scale * angle.sin()
    return torch.stack([mirror * cos, -sin, x, mirror * sin, cos, y, zero, zero, zero + 1], dim=1).view(B, 3, 3)

def centres(H, W, transform=torch.eye(3)):
    """Centres of H x W cells in [-1, 1], x then y -> (H, W, 2); where homographies (B, 3, 3) take them -> (B, H, W, 2)."""
    y, x = ((2 * torch.arange(n, device=transform.device) + 1) / n - 1 for n in (H, W))
    points = F.pad(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1), (0, 1), value=1.0) @ transform[..., None, :, :].mT      # (B, H, W, 3)
    return points[..., :2] / points[..., 2:].clamp_min(1e-6)

def warp(image, view):
    """The picture (B, C, H, W) seen through `view` (B, 3, 3), a map from the result's coordinates to the picture's."""
    return F.grid_sample(image, centres(*image.shape[2:], view), padding_mode="reflection", align_corners=False)

def correspondence(transform, H, W):
    """For each of a's H x W patches, which patch of picture b shows the same place: `transform` (B, 3, 3) maps a's coordinates to b's -> (B, H*W), -1 outside b."""
    x, y = centres(H, W, transform).unbind(-1)                                          # (B, H, W)
    column, row = ((x + 1) / 2 * W).floor().long(), ((y + 1) / 2 * H).floor().long()
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    return torch.where(inside, row * W + column, -1).flatten(1)

def jitter(image, generator=None):
    """Random brightness, contrast and tint, the same for a whole picture: (B, 3, H, W) in [-1, 1]."""
    gain, tint, shift = (torch.rand(len(image), n, 1, 1, generator=generator).to(image.device) - 0.5 for n in (1, 3, 1))
    return (image * (1 + 0.6 * gain + 0.2 * tint) + 0.4 * shift).clamp(-1, 1)

def self_supervised_loss(features, image, generator=None, tau=0.07):
    """Two views of each picture (B, 3, H, W) with known geometry and other colours; InfoNCE: each patch of the first must find the same place in the second
    among all patches of all pictures' -> scalar.  Ours."""
    a, b = (random_views(len(image), generator).to(image.device) for _ in range(2))
    f_a, f_b = (features(jitter(warp(image, view), generator)) for view in (a, b))
    target = correspondence(torch.linalg.inv(b) @ a, *f_a.shape[1:3])                   # (B, S)
    f_a, f_b = units(f_a, f_b)                                                          # (B, S, D)
    first = torch.arange(len(f_b), device=f_b.device)[:, None] * f_b.shape[1]           # each picture's first row in the flat list
    return F.cross_entropy(f_a.flatten(0, 1) @ f_b.flatten(0, 1).T / tau, torch.where(target < 0, target, target + first).flatten(), ignore_index=-1)

def s_patch(f_a, f_b, target):
    """Of a's patches with a target, the share whose most similar patch in b is it, and is it or next to it -> two floats. f (B, H, W, D), target (B, H*W) from
    `correspondence`. The paper's public text is cut before its definition: the first number is our reading, the second ours."""
    W, seen = f_b.shape[2], target >= 0
    a, b = units(f_a, f_b)
    found, right = (a @ b.mT).argmax(2)[seen], target[seen]                             # (patches,)
    near = ((found // W - right // W).abs() <= 1) & ((found % W - right % W).abs() <= 1)
    return (found == right).float().mean().item(), near.float().mean().item()

class ImagePrompt(nn.Module):
    """Decoupled cross-attention of Flux's picture tokens to reference pictures: own keys and values in every block, the text's queries.  Eq. S5-S7.
    `width`: of the reference features. The values start at zero, so an untrained prompt changes nothing. There is no projection network between features and
    keys: the authors freeze theirs, and from scratch the keys and values are that projection."""
    def __init__(self, flux, width, scale=1.0):
        super().__init__()
        blocks, attn = len(flux.blocks()), flux.transformer_blocks[0].attn
        self.heads, self.scale, inner = attn.heads, scale, attn.heads * attn.norm_q.weight.numel()
        self.to_k_ip, self.to_v_ip = (nn.ModuleList([nn.Linear(width, inner, bias=False) for _ in range(blocks)]) for _ in range(2))
        for v in self.to_v_ip:
            nn.init.zeros_(v.weight)

    def look(self, flux, references, ids=None):
        """From now on `flux`, painting tokens at `ids` (L, 3), attends to `references` (B, M, S, D), square maps of M pictures each; None: to the text alone.
        Ours: queries and keys are rotated as in Flux's own attention, each reference stretched over the picture. Without that the prompt learned a third as fast."""
        for block in flux.blocks():
            block.attn.image_prompt = None
        if references is not None:
            side, size = math.isqrt(references.shape[2]), ids[:, 1:].amax(0) + 1
            middles = (centres(side, side).to(ids).flip(-1).flatten(0, 1) + 1) / 2      # (S, 2), y then x, in [0, 1]
            places = F.pad(middles * size - 0.5, (1, 0))                                # (S, 3)
            turn, turn_ref = (rope_table(at, flux.axes) for at in (ids, places))
            for block, to_k, to_v in zip(flux.blocks(), self.to_k_ip, self.to_v_ip):
                k, v = (proj(references).unflatten(-1, (self.heads, -1)) for proj in (to_k, to_v))   # (B, M, S, H, d)
                k = rotate(k.flatten(0, 1), turn_ref).unflatten(0, k.shape[:2])
                block.attn.image_prompt = partial(self.attend, turn, k.transpose(2, 3), v.transpose(2, 3))

    def attend(self, turn, k, v, q):
        """q (B, H, L, d), k and v (B, M, H, S, d) -> (B, H, L, d): the sum over references of their attentions."""
        turned = rotate(q.transpose(1, 2).to(k.dtype), turn).transpose(1, 2)[:, None]   # (B, 1, H, L, d)
        z = F.scaled_dot_product_attention(turned.expand(-1, k.shape[1], -1, -1, -1), k, v)  # (S6) (B, M, H, L, d)
        return self.scale * z.sum(1).to(q.dtype)                                        # (S7)

    def save(self, file):
        save_file(self.state_dict(), file)

    @classmethod
    def load(cls, file, flux, width, scale=1.0):
        """ValueError when the file was trained for another Flux or other features."""
        prompt = cls(flux, width, scale)
        load_checkpoint(prompt, file)
        return prompt

class Trajectories(namedtuple("Trajectories", "x v t item")):
    """Points that the policy visited: x (N, steps, L, C), its velocity there v (same), t (N, steps), and which sample each row is of, item (N,)."""
    def draw(self, n, generator=None):
        """n random trajectories (at most all of them), one random point of each -> (x (n, L, C), v (n, L, C), t (n,), item (n,))."""
        row = torch.randperm(len(self.t), generator=generator)[:n]
        step = torch.randint(self.t.shape[1], row.shape, generator=generator)
        return self.x[row, step], self.v[row, step], self.t[row, step], self.item[row]

@torch.no_grad()
def record(velocity, noise, item, steps=20, generator=None):
    """Euler from noise (N, L, C) with velocity(x, t (N,)) -> Trajectories. t falls in equal steps from a random start: every t is visited (authors' code)."""
    start = torch.rand(len(noise), 1, generator=generator).to(noise.device)
    t, xs, vs = (torch.arange(steps, 0, -1, device=noise.device) - start) / steps, [noise], []      # (N, steps), the last one in (0, 1/steps]
    for now in t.unbind(1):
        vs.append(velocity(xs[-1], now))
        xs.append(xs[-1] - vs[-1] / steps)
    return Trajectories(torch.stack(xs[:-1], 1), torch.stack(vs, 1), t, item)

def read_image(path):
    """Any picture Pillow reads -> PIL RGB, upright: EXIF rotation applied, transparency on white, of an animation the first frame. 16 and 32 bits and
    floats come down to 8: white is 65535, or 1 or 255 in floats, or the largest value where that is larger. ValueError in one sentence when there is no picture."""
    Image.MAX_IMAGE_PIXELS = 2 ** 28                       # of which Pillow reads twice as many, and 200 million come out of telephones
    with reading(path), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)             # reads the pixels, too
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        white = next(w for w in ((65535,) if image.mode[0] == "I" else (1, 255)) + (values.max(),) if values.max() <= w)
        image = Image.fromarray((values.clip(0) / white * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

@torch.no_grad()
def heat_map(reference, generated, features="mini/vit", out="out/heat.png"):
    """Of two picture files, writes `out`: reference, generated, and the quality of its patches from blue, the worst, to red, the best."""
    f, pictures = ImageFeatures.load(features), [read_image(file) for file in (reference, generated)]
    f_ref, f_gen = (f(to_tensor(picture)[None]) for picture in pictures)
    quality = patch_quality(f_gen, f_ref)
    q = patch_weights(quality, quality.shape[1:])[0]                                    # (H, W) in [0, 1]
    colours = Image.fromarray((255 * torch.stack([q, 1 - (2 * q - 1).abs(), 1 - q], dim=-1)).byte().numpy())
    size = [n * max(1, 256 // pictures[1].width) for n in pictures[1].size]             # small pictures are enlarged
    panels = [np.array(picture.resize(size, Image.NEAREST)) for picture in (*pictures, colours)]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(panels, axis=1)).save(out)
    print(f"{out}: {quality.numel()} patches, cosine to the nearest reference patch from {quality.min():.2f} to {quality.max():.2f}")

if __name__ == "__main__":
    try:
        heat_map(*(sys.argv[1:] or ["mini/sample/scenes/00_apple.png", "mini/sample/scenes/00_apple_stripes.png"]))
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f"{error}\nusage: python patch_dpo.py REFERENCE.png GENERATED.png [folder or hub name of a DINOv2 or ViT [OUT.png]]")
