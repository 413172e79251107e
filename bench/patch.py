"""PatchDPO and what it is compared with: from the shipped image prompt, with equal budgets, as a
Markdown table over held-out scenes, mean and standard deviation over seeds.

    python bench/patch.py             # 5 losses x 3 seeds and a learning rate for each: an hour
    python bench/patch.py --seeds 1 --steps 20 --out runs/quick
    python bench/patch.py --references two --losses reconstruction "PatchDPO, power 2"
    python bench/patch.py --references plain            # the object alone, on white
    python bench/patch.py --show out/references.png     # no training: reference pictures, words,
                                                        # what edit.py --reference makes of them

Every run is `python train.py patch` with the flags shown; one that stands in --out goes on where it
was. Unknown flags are passed on to it. Of the six held-out scenes two choose: each loss takes, of
--lrs, the learning rate whose run with seed 0 agrees best with their truth; four are reported.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as in edit.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "mini"))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import edit
import train
from cdpo import markdown_table
from patch_dpo import PictureStage, read_scenes
from render import Geometry

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {
    "reconstruction": "--loss reconstruction",
    "Diffusion-DPO": "--loss dpo",
    "Diffusion-DRO": "--loss dro --refresh 4",
    "PatchDPO, power 1": "--power 1",
    "PatchDPO, power 2": "--power 2",
}
MEASURES = ["identity", "truth", "psnr", "asked"]
HELD_OUT = 6
CHOOSING = 2                 # of these scenes
CASES = [                    # (reference pictures of mini/sample, words)
    ("01_mug", "A mug in front of forest"),
    ("01_mug", "Place the mug in front of snow"),
    ("05_vase", "A vase on a beach"),
    ("03_teddy_bear", "Use candlelight for the scene"),
    ("05_vase 00_apple_balloon", "Add a balloon next to the vase"),
    ("01_mug 00_apple_sunset", "A mug in front of sunset"),
]


def scenes_file(kind, out):
    """A scenes.jsonl whose edits have one reference, their scene ("one"); another object after the
    same edit as well ("two"); or their scene's object alone, on white ("plain")."""
    shipped = ROOT / "mini/data/scenes.jsonl"
    if kind == "one":
        return shipped
    scenes = read_scenes(shipped)
    for number, scene in enumerate(scenes):
        if kind == "plain":
            alone = on_white(scene["image"], number, out)
            for row in scene["edits"]:
                row["references"] = [alone]
            continue
        other = (number + 1) % (len(scenes) - HELD_OUT)              # one that is trained on
        after = {row["attribute"]: row["image"] for row in scenes[other]["edits"]}
        for row in scene["edits"]:
            row["references"].append(after[row["attribute"]])
    file = out / f"scenes-{kind}.jsonl"
    file.write_text("".join(json.dumps(scene, default=str) + "\n" for scene in scenes))
    return file


def on_white(picture, number, out):
    """The file of that scene's picture without all that is not its object."""
    name = picture.stem.partition("_")[2]
    geometry = Geometry({"object": name.replace("_", " "), "seed": 1_000_000 + number})
    seen = torch.zeros(2 * geometry.size, 2 * geometry.size)
    seen.view(-1)[geometry.pixels] = 1
    seen = F.avg_pool2d(seen[None], 2)[0][..., None].numpy()                # (192, 192, 1)
    pixels = seen * np.array(Image.open(picture).convert("RGB")) + (1 - seen) * 255
    file = (out / f"plain-{name}-{number}.png").resolve()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file)
    return file


@torch.no_grad()
def measure(settings):
    """What an image prompt paints of the held-out edits -> {measure: (mean over the scenes that
    choose, over those that are reported)}. identity, truth: cosine of the features' class token to
    the scene's, to the true picture's; psnr: to the true picture; asked: share of pictures that are
    nearer to their own true picture than to that of any other edit of the same scene and type."""
    edits = PictureStage(settings)
    held = torch.arange(edits.count, len(edits.rows))
    latents = edits.paint("policy", held, seed=0)                           # (n, L, 64)
    painted = edits.decode(latents).cpu()                                   # (n, 3, size, size)
    truth = edits.pictures[edits.truth[held]]
    scene = edits.pictures[edits.scene[held]]
    embed = functools.partial(edits.in_parts, edits.features.embed)
    found = embed(painted)                                                  # (n, D)
    kinds = [(row["scene"], row["edit_type"]) for row in edits.rows[edits.count:]]
    kind = torch.tensor([kinds.index(other) for other in kinds])            # (n,)
    away = torch.cdist(painted.flatten(1), truth.flatten(1))                # (n, n)
    away[kind[:, None] != kind] = math.inf
    asked = away.argmin(1) == torch.arange(len(held))
    values = {
        "identity": F.cosine_similarity(found, embed(scene)),
        "truth": F.cosine_similarity(found, embed(truth)),
        "psnr": 10 * torch.log10(4 / (painted - truth).square().mean((1, 2, 3))),
        "asked": asked.float(),
    }
    lines = torch.tensor([row["line"] for row in edits.rows[edits.count:]])
    chooses = lines <= lines[0] + CHOOSING - 1
    return {name: (value[chooses].mean().item(), value[~chooses].mean().item())
            for name, value in values.items()}


def command(args, more, flags, lr, seed):
    """(the command line of a training run, its folder)."""
    name = flags.removeprefix("--").replace(" ", "-")
    out = f"{args.out}/{args.references}-{name}-{lr}-seed{seed}"
    flags += f" --steps {args.steps} --batch 8 --paint-steps 10 --lr {lr} --seed {seed}"
    flags += f" --held-out {HELD_OUT} --scenes {args.scenes}"
    folders = ["--generated", f"{args.out}/generated-seed{seed}", "--out", out]
    return ["patch", *flags.split(), *folders, *more], Path(out)


def run(*what):
    """The measures of a training run (as in `command`)."""
    argv, out = command(*what)
    with contextlib.redirect_stdout(sys.stderr):
        train.main(argv)                        # which goes on where it was, also when it had ended
    _, settings, _ = train.parse(argv)
    return measure(replace(settings, image_prompt=str(out / "image_prompt.safetensors")))


def best_runs(args, more, flags):
    """(the learning rate that is best by truth on seed 0, its measures with every seed)."""
    tried = {lr: run(args, more, flags, lr, 0) for lr in args.lrs}
    lr = max(tried, key=lambda lr: tried[lr]["truth"][0])
    others = [run(args, more, flags, lr, seed) for seed in range(1, args.seeds)]
    return lr, [tried[lr], *others]


def show(file):
    """One picture of all CASES: one or two references, and the new picture."""
    cells = []
    for names, words in CASES:
        references = [f"{ROOT}/mini/sample/scenes/{name}.png" for name in names.split()]
        scale = str(1.5 / len(references))
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--caption", words, "--out", f"{folder}/new.png", "--reference-scale", scale]
            with contextlib.redirect_stdout(io.StringIO()):
                edit.main([*argv, "--reference", *references])
            new = Image.open(f"{folder}/new.png").convert("RGB")
        shown = [Image.open(reference) for reference in references]
        cells.append((shown[0], "reference", "", ""))
        if len(shown) == 2:
            cells.append((shown[1], "and", "", ""))
        else:
            cells.append((Image.new("RGB", shown[0].size, "white"), "", "", ""))
        cells.append((new, words, "", ""))
    edit.grid(cells, 6).save(file)


def spread(runs, name):
    values = [found[name][1] for found in runs]
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--lrs", nargs="+", default=["1e-3", "3e-4", "3e-5"], metavar="LR")
    p.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES),
                   metavar="LOSS")
    p.add_argument("--references", choices=["one", "two", "plain"], default="one")
    p.add_argument("--out", default="runs/bench_patch")
    p.add_argument("--show", type=Path, metavar="PNG", help="only draw: references, words, results")
    args, more = p.parse_known_args()
    if args.show:
        show(args.show)
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.scenes = scenes_file(args.references, Path(args.out))
    argv, _ = command(args, more, "", args.lrs[0], 0)
    _, settings, _ = train.parse(argv)
    start = measure(settings)
    rows = [["start", "", *(f"{start[name][1]:.3f}" for name in MEASURES)]]
    print(rows[0], flush=True)
    for loss in args.losses:
        lr, runs = best_runs(args, more, LOSSES[loss])
        rows.append([f"{loss} (`{LOSSES[loss]}`)", lr, *(spread(runs, name) for name in MEASURES)])
        print(rows[-1], flush=True)
    columns = [f"{args.seeds} seeds, {args.steps} steps", "lr", *MEASURES]
    print("\n" + markdown_table(columns, rows))


if __name__ == "__main__":
    main()
