"""S_patch: how often an image encoder finds a patch of one picture again in another view of it (PatchDPO). A table, one row an encoder.

    python bench/features.py mini/vit --train 200      # held-out scenes against their edits, warped by known views; then the same after patch training -> runs/features
    python train.py patch --judge runs/features        # PatchDPO that trusts those features
    python bench/features.py facebook/dinov2-base --hpatches hpatches-sequences-release --size 224

Patch training of f (self-supervised, ours: the paper's text of it is not public): patch_dpo.self_supervised_loss on the true pictures of the scenes that are not held out.
"""
import argparse, shutil, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors.torch import save_file

from flux import to_tensor
from patch_dpo import ImageFeatures, correspondence, random_views, s_patch, self_supervised_loss, warp
from qwen import resolve
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

def edits(args, part):
    """(pictures of the scenes, pictures after an edit that leaves the object what it was), each (N, 3, size, size), of the scenes scenes[part]."""
    pairs = [(s["image"], e["image"]) for s in read_scenes(args.scenes, "edit_type")[part] for e in s["edits"] if e["edit_type"] in ("background", "lighting", "object")]
    return (torch.stack([to_tensor(read_picture(file, args.size)) for file in side]) for side in zip(*pairs))

def views(args):
    """Held-out scenes, their edits seen from elsewhere, and the maps (N, 3, 3) from one to the other."""
    a, b = edits(args, slice(-args.held_out, None))
    view = random_views(len(a), generator("views"))
    return a, warp(b, view), torch.linalg.inv(view)

def trained(args, path):
    """Patch training of the encoder in `path` -> the folder --out."""
    f, (_, images), g = ImageFeatures.load(path), edits(args, slice(None, -args.held_out)), generator(0, "features")
    optimizer = torch.optim.AdamW(f.parameters(), 1e-3)
    for _ in tqdm(range(args.train), desc="features"):
        optimizer.zero_grad()
        self_supervised_loss(f, images[torch.randint(len(images), (16,), generator=g)], g).backward()
        optimizer.step()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(f.state_dict(), args.out / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(resolve(path) / name, args.out)
    return args.out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("features", nargs="*", default=["mini/vit"], help="folders or hub repositories of DINOv2s or ViTs")
    p.add_argument("--train", type=int, default=0, help="steps of patch training, of the first")
    p.add_argument("--out", type=Path, default=Path("runs/features"), help="where the trained one goes")
    p.add_argument("--hpatches", help="folder of HPatches sequences to measure on, in place of the scenes")
    p.add_argument("--scenes", default="mini/data/scenes.jsonl")
    p.add_argument("--held-out", type=int, default=4, help="scenes at the end of the file")
    p.add_argument("--size", type=int, default=64)
    args = p.parse_args()
    a, b, transform = map(torch.stack, zip(*hpatches(args.hpatches, args.size))) if args.hpatches else views(args)
    print(f"| {len(a)} pairs | exact | within one patch |\n|---|---|---|")
    for path in [*args.features, *([trained(args, args.features[0])] if args.train else [])]:
        f = ImageFeatures.load(path)
        with torch.no_grad():
            maps = [torch.cat([f(part) for part in images.split(64)]) for images in (a, b)]
        print(f"| {path} | " + " | ".join(f"{share:.3f}" for share in s_patch(*maps, correspondence(transform, *maps[0].shape[1:3]))) + " |")

if __name__ == "__main__":
    main()
