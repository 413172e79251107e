"""S_patch: how often an image encoder finds a patch of one picture again in another view of it
(PatchDPO). A table, one row an encoder.

    python bench/features.py mini/vit --train 200      # held-out scenes against their edits, seen
                         # from elsewhere; then the same after patch training -> runs/features
    python train.py patch --quality-features runs/features    # PatchDPO that trusts them
    python bench/features.py facebook/dinov2-base --hpatches hpatches-sequences-release --size 224

Patch training of the encoder is self-supervised, and ours: the paper's text of it is not public.
Each patch of one view of a picture must find the same place in another view (InfoNCE), on the true
pictures of the scenes that are not held out.

Shapes: N pairs of pictures, B views, H x W patches, D features.
"""
import argparse
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors.torch import save_file

from clock import table

from flux import read_square, to_tensor
from patch_dpo import SAME_OBJECT, ImageFeatures, read_scenes, unit_patches
from qwen import generator_for, pick_device, resolve, set_precision


# ---- self-supervised training of f, and its score (ours) -----------------------------------------

def random_views(B, generator=None):
    """Views of a picture, rotated by up to 20 degrees, scaled 0.6 to 1, shifted, half of them
    mirrored -> (B, 3, 3), maps from a view's coordinates, x, y in [-1, 1], to the picture's."""
    angle, scale, flip, x, y = torch.rand(5, B, generator=generator)
    angle = (2 * angle - 1) * math.radians(20)
    scale = 0.6 + 0.4 * scale
    x = (2 * x - 1) * (1 - scale)
    y = (2 * y - 1) * (1 - scale)
    mirror = torch.where(flip < 0.5, -1.0, 1.0)
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    zero = torch.zeros(B)
    view = [
        mirror * cos, -sin, x,
        mirror * sin, cos, y,
        zero, zero, zero + 1
    ]
    view = torch.stack(view, dim=1)                                         # (B, 9)
    return view.view(B, 3, 3)


def centres(H, W, transform=torch.eye(3)):
    """Centres of H x W cells in [-1, 1], x then y -> (H, W, 2); or where homographies (B, 3, 3)
    take them -> (B, H, W, 2)."""
    x = (2 * torch.arange(W) + 1) / W - 1
    y = (2 * torch.arange(H) + 1) / H - 1
    points = torch.meshgrid(
        x, y, torch.ones(1), indexing="xy")
    points = torch.cat(points, dim=-1).to(transform)                        # (H, W, 3)
    transform = transform[..., None, :, :]
    points = points @ transform.mT                                          # (B, H, W, 3)
    depth = points[..., 2:].clamp_min(1e-6)
    return points[..., :2] / depth


def warp(image, view):
    """The picture (B, C, H, W) seen through `view` (B, 3, 3), from the result's coordinates to the
    picture's."""
    places = centres(*image.shape[2:], view)
    return F.grid_sample(
        image, places, padding_mode="reflection", align_corners=False)


def correspondence(transform, H, W):
    """For each of a's H x W patches, which patch of picture b shows the same place -> (B, S), -1
    where b does not show it. `transform` (B, 3, 3) maps a's coordinates to b's."""
    x, y = centres(H, W, transform).unbind(-1)                              # (B, H, W)
    column = (x + 1) / 2 * W
    row = (y + 1) / 2 * H
    column = column.floor().long()
    row = row.floor().long()
    inside = (column >= 0) & (column < W)
    inside &= (row >= 0) & (row < H)
    target = torch.where(inside, row * W + column, -1)
    return target.flatten(1)


def jitter(image, generator=None):
    """Random brightness, contrast and tint, the same for a whole picture (B, 3, H, W)."""
    B = len(image)
    gain = torch.rand(B, 1, 1, 1, generator=generator) - 0.5
    tint = torch.rand(B, 3, 1, 1, generator=generator) - 0.5
    shift = torch.rand(B, 1, 1, 1, generator=generator) - 0.5
    gain = 1 + 0.6 * gain + 0.2 * tint                                      # (B, 3, 1, 1)
    image = image * gain.to(image) + 0.4 * shift.to(image)
    return image.clamp(-1, 1)


def self_supervised_loss(features, image, generator=None, tau=0.07):
    """Two views of each picture (B, 3, H, W) with known geometry and other colours. InfoNCE: each
    patch of the first must find the same place in the second among all pictures' patches ->
    scalar. Ours."""
    a = random_views(len(image), generator).to(image.device)
    b = random_views(len(image), generator).to(image.device)
    f_a = features(jitter(warp(image, a), generator))                       # (B, H, W, D)
    f_b = features(jitter(warp(image, b), generator))
    a_to_b = torch.linalg.inv(b) @ a
    target = correspondence(a_to_b, *f_a.shape[1:3])                        # (B, S)
    B, S = target.shape
    first = S * torch.arange(B).to(target)                                  # of each picture
    right = target + first[:, None]                                         # among all BS patches
    right = torch.where(target < 0, target, right)
    from_a = unit_patches(f_a).flatten(0, 1)                                # (BS, D)
    in_b = unit_patches(f_b).flatten(0, 1)
    cosine = from_a @ in_b.T                                                # (BS, BS)
    return F.cross_entropy(cosine / tau, right.flatten(), ignore_index=-1)


def s_patch(f_a, f_b, target):
    """Of a's patches with a target, the share whose most similar patch in b is it, and is it or
    next to it -> two floats. f (B, H, W, D), target (B, S) from `correspondence`. The paper's
    public text is cut before its definition: the first number is our reading, the second ours."""
    W = f_b.shape[2]
    seen = target >= 0
    right = target[seen]
    cosine = unit_patches(f_a) @ unit_patches(f_b).mT                       # (B, S, S)
    found = cosine.argmax(2)[seen]
    rows = (found // W - right // W).abs()
    columns = (found % W - right % W).abs()
    exact = (found == right).float()
    near = ((rows <= 1) & (columns <= 1)).float()
    return exact.mean().item(), near.mean().item()


# ---- pairs of pictures that show the same places -----------------------------------------------

def to_pixels(width, height):
    """The matrix (3, 3) from coordinates in [-1, 1] to those of a picture's pixels."""
    x = width / 2
    y = height / 2
    return np.array([[x, 0, x - 0.5], [0, y, y - 0.5], [0, 0, 1]])


def hpatches(folder, size):
    """HPatches sequences in `folder` (i_*/ and v_*/ with 1.ppm ... 6.ppm and H_1_2 ... H_1_6)
    -> pictures a and b (N, 3, S, S), and the maps (N, 3, 3) from a to b, in [-1, 1]."""
    groups = sorted(file.parent for file in Path(folder).glob("*/H_1_2"))
    if not groups:
        raise SystemExit(f"{folder} holds no HPatches sequence (folders with 1.ppm and H_1_2)")
    square = size, size
    a = []
    b = []
    maps = []
    for group in groups:
        first = Image.open(group / "1.ppm").convert("RGB")
        for k in range(2, 7):
            other = Image.open(group / f"{k}.ppm").convert("RGB")
            there = to_pixels(*first.size)
            between = np.loadtxt(group / f"H_1_{k}")                        # in pixels
            back = np.linalg.inv(to_pixels(*other.size))
            between = torch.from_numpy(back @ between @ there)              # in [-1, 1]
            a.append(to_tensor(first.resize(square, Image.BICUBIC)))
            b.append(to_tensor(other.resize(square, Image.BICUBIC)))
            maps.append(between.float())
    return torch.stack(a), torch.stack(b), torch.stack(maps)


def edits(args, part):
    """Pictures of the scenes scenes[part] and the same after an edit that leaves the object what
    it was -> two tensors (N, 3, S, S)."""
    before = []
    after = []
    for scene in read_scenes(args.scenes, "edit_type")[part]:
        for edit in scene["edits"]:
            if edit["edit_type"] in SAME_OBJECT:
                before.append(to_tensor(read_square(scene["image"], args.size)))
                after.append(to_tensor(read_square(edit["image"], args.size)))
    return torch.stack(before), torch.stack(after)


def views(args):
    """Held-out scenes and their edits seen from elsewhere; as `hpatches`."""
    a, b = edits(args, slice(-args.held_out, None))
    view = random_views(len(a), generator_for("views"))                     # from b's view to b
    return a, warp(b, view), torch.linalg.inv(view)


# ---- patch training ----------------------------------------------------------------------------

def trained(args, path):
    """Patch training of the encoder in `path` -> the folder --out."""
    features = ImageFeatures.load(path, args.device)
    _, images = edits(args, slice(None, -args.held_out))
    generator = generator_for(0, "features")
    optimizer = torch.optim.AdamW(features.parameters(), 1e-3)
    for _ in tqdm(range(args.train), desc="features"):
        batch = torch.randint(len(images), (16,), generator=generator)
        optimizer.zero_grad()
        loss = self_supervised_loss(features, images[batch].to(args.device), generator)
        loss.backward()
        optimizer.step()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(features.cpu().state_dict(), args.out / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(resolve(path) / name, args.out)
    return args.out


@torch.no_grad()
def score(path, a, b, maps, device):
    """S_patch of the encoder in `path`, exact and within one patch, as a row of the table."""
    features = ImageFeatures.load(path, device)
    f_a = torch.cat([features(part.to(device)).cpu() for part in a.split(64)])  # (N, H, W, D)
    f_b = torch.cat([features(part.to(device)).cpu() for part in b.split(64)])
    target = correspondence(maps, *f_a.shape[1:3])                          # (N, H*W)
    exact, near = s_patch(f_a, f_b, target)
    return [path, f"{exact:.3f}", f"{near:.3f}"]


def main():
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    p.add_argument("features", nargs="*", default=["mini/vit"],
                   help="folders or hub repositories of DINOv2s or ViTs")
    p.add_argument("--train", type=int, default=0, help="steps of patch training, of the first")
    p.add_argument("--out", type=Path, default="runs/features", help="where the trained one goes")
    p.add_argument("--hpatches", help="folder of HPatches sequences, in place of the scenes")
    p.add_argument("--scenes", default="mini/data/scenes.jsonl")
    p.add_argument("--held-out", type=int, default=4, help="scenes at the end of the file")
    p.add_argument("--size", type=int, default=64, help="side of the pictures")
    p.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (the best there is)")
    args = p.parse_args()
    args.device = pick_device(args.device)
    set_precision()
    pairs = hpatches(args.hpatches, args.size) if args.hpatches else views(args)
    rows = [score(path, *pairs, args.device) for path in args.features]
    if args.train:
        folder = trained(args, args.features[0])
        rows.append(score(folder, *pairs, args.device))
    print(table([f"{len(pairs[0])} pairs", "exact", "within one patch"], rows), end="")


if __name__ == "__main__":
    main()
