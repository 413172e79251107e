"""S_patch: how often an image encoder finds a patch of one picture again in another view of it
(PatchDPO). A table, one row an encoder.

    python bench/features.py mini/vit --train 200      # held-out scenes against their edits, seen
                         # from elsewhere; then the same after patch training -> runs/features
    python train.py patch --quality-features runs/features    # PatchDPO that trusts them
    python bench/features.py facebook/dinov2-base --hpatches hpatches-sequences-release --size 224

Patch training of the encoder (self-supervised, ours: the paper's text of it is not public) is
patch_dpo.self_supervised_loss on the true pictures of the scenes that are not held out.

Shapes: N pairs of pictures, S pixels a side.
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors.torch import save_file

from clock import table

from flux import read_square, to_tensor
from patch_dpo import (SAME_OBJECT, ImageFeatures, correspondence, random_views, read_scenes,
                       s_patch, self_supervised_loss, warp)
from qwen import generator_for, resolve


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
    features = ImageFeatures.load(path)
    _, images = edits(args, slice(None, -args.held_out))
    generator = generator_for(0, "features")
    optimizer = torch.optim.AdamW(features.parameters(), 1e-3)
    for _ in tqdm(range(args.train), desc="features"):
        batch = torch.randint(len(images), (16,), generator=generator)
        optimizer.zero_grad()
        loss = self_supervised_loss(features, images[batch], generator)
        loss.backward()
        optimizer.step()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(features.state_dict(), args.out / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(resolve(path) / name, args.out)
    return args.out


@torch.no_grad()
def score(path, a, b, maps):
    """S_patch of the encoder in `path`, exact and within one patch, as a row of the table."""
    features = ImageFeatures.load(path)
    f_a = torch.cat([features(part) for part in a.split(64)])               # (N, H, W, D)
    f_b = torch.cat([features(part) for part in b.split(64)])
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
    args = p.parse_args()
    pairs = hpatches(args.hpatches, args.size) if args.hpatches else views(args)
    rows = [score(path, *pairs) for path in args.features]
    if args.train:
        folder = trained(args, args.features[0])
        rows.append(score(folder, *pairs))
    print(table([f"{len(pairs[0])} pairs", "exact", "within one patch"], rows), end="")


if __name__ == "__main__":
    main()
