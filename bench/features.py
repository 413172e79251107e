"""S_patch: how often an image encoder finds a patch of one picture again in another view of it (PatchDPO). A table, one row an encoder.

    python train.py patch --feature-steps 200 --out runs/features              # PatchDPO that trains its f first, and keeps it beside the pictures it judges
    python bench/features.py mini/vit runs/features/generated                  # before and after: held-out scenes against their edits, warped by known views
    python bench/features.py facebook/dinov2-base --hpatches hpatches-sequences-release --size 224
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image

from flux import to_tensor
from patch_dpo import ImageFeatures, correspondence, random_views, s_patch, warp
from train import generator, read_picture, read_scenes

def hpatches(folder, size):
    """HPatches sequences in `folder` (i_*/ and v_*/ with 1.ppm ... 6.ppm, H_1_2 ... H_1_6) -> yields (image a, image b (3, size, size), transform (3, 3) from a to b, in [-1, 1])."""
    groups = [g for g in sorted(Path(folder).iterdir()) if (g / "H_1_2").is_file()]
    if not groups:
        raise SystemExit(f"{folder} holds no HPatches sequence (folders with 1.ppm and H_1_2)")
    for group in groups:
        images = [Image.open(group / f"{k}.ppm").convert("RGB") for k in range(1, 7)]
        pixels = [np.array([[w / 2, 0, w / 2 - 0.5], [0, h / 2, h / 2 - 0.5], [0, 0, 1]]) for w, h in (image.size for image in images)]   # from [-1, 1]
        small = [to_tensor(image.resize((size, size), Image.BICUBIC)) for image in images]
        for k in range(1, 6):
            transform = np.linalg.inv(pixels[k]) @ np.loadtxt(group / f"H_1_{k + 1}") @ pixels[0]
            yield small[0], small[k], torch.tensor(transform, dtype=torch.float32)

def views(args):
    """Held-out scenes (N, 3, size, size), their edits that leave the object what it was, seen from elsewhere, and the maps (N, 3, 3) from one to the other."""
    scenes = read_scenes(args.scenes, "edit_type")[-args.held_out:]
    pairs = [(s["image"], e["image"]) for s in scenes for e in s["edits"] if e["edit_type"] in ("background", "lighting", "object")]
    a, b = (torch.stack([to_tensor(read_picture(file, args.size)) for file in side]) for side in zip(*pairs))
    view = random_views(len(a), generator("views"))
    return a, warp(b, view), torch.linalg.inv(view)

@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("features", nargs="*", default=["mini/vit"], help="folders or hub repositories of DINOv2s or ViTs")
    p.add_argument("--hpatches", help="folder of HPatches sequences, in place of the scenes")
    p.add_argument("--scenes", default="mini/data/scenes.jsonl")
    p.add_argument("--held-out", type=int, default=4, help="scenes at the end of the file")
    p.add_argument("--size", type=int, default=64)
    args = p.parse_args()
    a, b, transform = map(torch.stack, zip(*hpatches(args.hpatches, args.size))) if args.hpatches else views(args)
    print(f"| {len(a)} pairs | exact | within one patch |\n|---|---|---|")
    for path in args.features:
        f = ImageFeatures.load(path)
        maps = [torch.cat([f(part) for part in images.split(64)]) for images in (a, b)]
        print(f"| {path} | " + " | ".join(f"{share:.3f}" for share in s_patch(*maps, correspondence(transform, *maps[0].shape[1:3]))) + " |")

if __name__ == "__main__":
    main()
