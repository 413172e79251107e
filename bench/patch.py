"""PatchDPO and what it is compared with: from the shipped image prompt, with equal budgets, as a
Markdown table over held-out scenes, mean and standard deviation over seeds.

    python bench/patch.py             # 5 losses x 3 seeds and a learning rate for each: 15 minutes
    python bench/patch.py --seeds 1 --steps 20 --out runs/quick
    python bench/patch.py --show out/references.png     # no training: reference pictures, words,
                                                        # what edit.py --reference makes of them

Every run is `python train.py patch` with the flags shown; unknown flags are passed on to it. Each
loss takes, of --lrs, the learning rate whose run with seed 0 agrees best with the truth.
identity, truth: cosine of the features' class token to the reference picture's, to the true
picture's; psnr: to the true picture; asked: share of pictures that are nearer to their own true
picture than to that of any other edit of the same type and scene.
"""
import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edit
from cdpo import markdown_table

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {
    "reconstruction": "--loss reconstruction",
    "Diffusion-DPO": "--loss dpo",
    "Diffusion-DRO": "--loss dro --refresh 4",
    "PatchDPO, power 1": "--power 1",
    "PatchDPO, power 2": "--power 2",
}
MEASURES = ["identity", "truth", "psnr", "asked"]
CASES = [                    # (reference pictures of mini/sample, words)
    ("01_mug", "A mug in front of forest"),
    ("01_mug", "Place the mug in front of snow"),
    ("05_vase", "A vase on a beach"),
    ("03_teddy_bear", "Use candlelight for the scene"),
    ("05_vase 00_apple_balloon", "Add a balloon next to the vase"),
    ("01_mug 00_apple_sunset", "A mug in front of sunset"),
]


def run(args, more, flags, lr, seed):
    """The report of a training run, trained now unless it stands already."""
    name = flags.removeprefix("--").replace(" ", "-")
    out = ROOT / args.out / f"{name}-{lr}-seed{seed}"
    if not (out / "report.json").is_file():
        words = flags + f" --steps {args.steps} --batch 8 --paint-steps 10 --lr {lr} --seed {seed}"
        folders = ["--generated", str(ROOT / args.out / "generated"), "--out", str(out)]
        command = [sys.executable, "train.py", "patch", *words.split(), *folders, *more]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((out / "report.json").read_text())


def best_runs(args, more, flags):
    """(the learning rate that is best by truth on seed 0, its reports of all seeds)."""
    tried = {lr: run(args, more, flags, lr, 0) for lr in args.lrs}
    lr = max(tried, key=lambda lr: tried[lr]["after truth"])
    others = [run(args, more, flags, lr, seed) for seed in range(1, args.seeds)]
    return lr, [tried[lr], *others]


def show(file):
    """One picture of all CASES: one or two references, and the new picture."""
    cells = []
    for names, words in CASES:
        references = [f"{ROOT}/mini/sample/scenes/{name}.png" for name in names.split()]
        scale = str(1.5 / len(references))
        argv = ["--caption", words, "--out", str(file), "--reference-scale", scale]
        with contextlib.redirect_stdout(io.StringIO()):
            edit.main([*argv, "--reference", *references])
        shown = [Image.open(reference) for reference in references]
        cells.append((shown[0], "reference", "", ""))
        if len(shown) == 2:
            cells.append((shown[1], "and", "", ""))
        else:
            cells.append((Image.new("RGB", shown[0].size, "white"), "", "", ""))
        cells.append((Image.open(file).convert("RGB"), words, "", ""))
    edit.grid(cells, 6).save(file)


def spread(runs, measure):
    values = [report[f"after {measure}"] for report in runs]
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--lrs", nargs="+", default=["1e-3", "3e-4", "3e-5"], metavar="LR")
    p.add_argument("--out", default="runs/bench_patch")
    p.add_argument("--show", type=Path, metavar="PNG", help="only draw: references, words, results")
    args, more = p.parse_known_args()
    if args.show:
        show(args.show)
        return
    rows = []
    for name, flags in LOSSES.items():
        lr, runs = best_runs(args, more, flags)
        if not rows:
            start = [f"{runs[0]['before ' + measure]:.3f}" for measure in MEASURES]
            rows.append(["start", "", *start])
        cells = [spread(runs, measure) for measure in MEASURES]
        rows.append([f"{name} (`{flags}`)", lr, *cells])
    columns = [f"{args.seeds} seeds, {args.steps} steps", "lr", *MEASURES]
    print("\n" + markdown_table(columns, rows))


if __name__ == "__main__":
    main()
