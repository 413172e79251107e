"""PatchDPO and what it is compared with, from the shipped image prompt and with equal budgets, as a Markdown table: held-out scenes, mean and standard deviation over seeds.

    python bench/patch.py                    # 5 losses x 3 seeds, and the choice of a learning rate for each: about 15 minutes of one core
    python bench/patch.py --seeds 1 --steps 20 --out runs/quick
    python bench/patch.py --show out/references.png     # no training: reference pictures, words, and what edit.py --reference makes of them

Every run is `python train.py patch` with the flags shown; unknown flags are passed on to it. Each loss takes, of --lrs, the learning rate whose run with seed 0 agrees best with the truth.
identity, truth: cosine of the features' class token to the reference picture's, to the true picture's; psnr to the true picture; asked: share of pictures nearer to
their own true picture than to that of any other edit of the same type and scene.
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

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {"reconstruction": "--loss reconstruction", "Diffusion-DPO": "--loss dpo", "Diffusion-DRO": "--loss dro --refresh 4", "PatchDPO, power 1": "--power 1", "PatchDPO, power 2": "--power 2"}
MEASURES = ["identity", "truth", "psnr", "asked"]
CASES = [("01_mug", "A mug in front of forest"), ("01_mug", "Place the mug in front of snow"), ("05_vase", "A vase on a beach"), ("03_teddy_bear", "Use candlelight for the scene"),
         ("05_vase 00_apple_balloon", "Add a balloon next to the vase"), ("01_mug 00_apple_sunset", "A mug in front of sunset")]

def train(args, more, flags, lr, seed):
    """The report of a run, trained now unless it stands already."""
    out = ROOT / args.out / "-".join([flags.removeprefix("--").replace(" ", "-"), lr, f"seed{seed}"])
    if not (out / "report.json").is_file():
        same = ["--steps", str(args.steps), "--batch", "8", "--paint-steps", "10", "--lr", lr, "--seed", str(seed), "--generated", str(args.out / "generated"), "--out", str(out)]
        subprocess.run([sys.executable, "train.py", "patch", *flags.split(), *same, *more], cwd=ROOT, check=True)
    return json.loads((out / "report.json").read_text())

def show(file):
    """One picture of all CASES: one or two references, and the new picture."""
    sys.path.insert(0, str(ROOT))
    import edit
    cells = []
    for names, words in CASES:
        references = [f"{ROOT}/mini/sample/scenes/{name}.png" for name in names.split()]
        with contextlib.redirect_stdout(io.StringIO()):
            edit.main(["--reference", *references, "--reference-scale", str(1.5 / len(references)), "--caption", words, "--out", str(file)])
        shown = [Image.open(reference) for reference in references]
        cells += [(shown[0], "reference", "", ""), (shown[1], "and", "", "") if shown[1:] else (Image.new("RGB", shown[0].size, "white"), "", "", "")]
        cells.append((Image.open(file).convert("RGB"), words, "", ""))
    edit.grid(cells, 6).save(file)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--lrs", nargs="+", default=["1e-3", "3e-4", "3e-5"], metavar="LR")
    p.add_argument("--out", type=Path, default=Path("runs/bench_patch"))
    p.add_argument("--show", type=Path, metavar="PNG", help="only draw: references, words, results")
    args, more = p.parse_known_args()
    if args.show:
        return show(args.show)
    tried = {name: {lr: train(args, more, flags, lr, 0) for lr in args.lrs} for name, flags in LOSSES.items()}
    best = {name: max(args.lrs, key=lambda lr: runs[lr]["after truth"]) for name, runs in tried.items()}
    rows = {name: [tried[name][lr], *(train(args, more, LOSSES[name], lr, seed) for seed in range(1, args.seeds))] for name, lr in best.items()}
    print(f"\n| {args.seeds} seeds, {args.steps} steps | lr | {' | '.join(MEASURES)} |\n|---|---|{'---|' * len(MEASURES)}")
    start = rows["reconstruction"][0]
    print("| start | | " + " | ".join(f"{start[f'before {m}']:.3f}" for m in MEASURES) + " |")
    for name, runs in rows.items():
        cells = [[run[f"after {m}"] for run in runs] for m in MEASURES]
        print(f"| {name} (`{LOSSES[name]}`) | {best[name]} | " + " | ".join(f"{statistics.mean(c):.3f} ± {statistics.pstdev(c):.3f}" for c in cells) + " |")

if __name__ == "__main__":
    main()
