"""PatchDPO and what it is compared with, from one image prompt (trained first) and with equal budgets: held-out scenes, mean and standard deviation over seeds, a Markdown table.

    python bench/patch.py                    # 5 losses x 3 seeds
    python bench/patch.py --seeds 1 --steps 20 --out runs/quick

Every row is `python train.py patch` with the flags shown; unknown flags are passed on to it. identity, truth: cosine of the features' class token to the reference
picture, to the true picture; psnr to the true picture; asked: share of pictures nearer to their own true picture than to that of any other edit of the same type.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {"reconstruction": "--loss reconstruction", "Diffusion-DPO": "--loss dpo", "Diffusion-DRO": "--loss dro", "PatchDPO, power 1": "--power 1", "PatchDPO, power 2": "--power 2"}
MEASURES = ["identity", "truth", "psnr", "asked"]


def train(flags, out, more):
    subprocess.run([sys.executable, "train.py", "patch", *flags.split(), "--out", str(out), *more], cwd=ROOT, check=True)
    return json.loads((ROOT / out / "report.json").read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--out", type=Path, default=Path("runs/bench_patch"))
    args, more = p.parse_known_args()
    reports, start = {}, args.out / "start"
    if not (ROOT / start / "image_prompt.safetensors").is_file():
        train("--loss start --steps 600 --lr 3e-3", start, more)
    for seed in range(args.seeds):
        same = ["--seed", str(seed), "--image-prompt", str(start / "image_prompt.safetensors"), "--generated", str(args.out / f"generated-{seed}"), *more]
        for name, flags in LOSSES.items():
            reports.setdefault(name, []).append(train(flags, args.out / f"{flags.split()[-1]}-{seed}", same))
    print(f"\n| {args.seeds} seeds | {' | '.join(MEASURES)} |\n|---|{'---|' * len(MEASURES)}")
    before = next(iter(reports.values()))[0]
    print("| start | " + " | ".join(f"{before[f'before {m}']:.3f}" for m in MEASURES) + " |")
    for name, runs in reports.items():
        cells = [[run[f"after {m}"] for run in runs] for m in MEASURES]
        print(f"| {name} (`{LOSSES[name]}`) | " + " | ".join(f"{statistics.mean(c):.3f} ± {statistics.pstdev(c):.3f}" for c in cells) + " |")


if __name__ == "__main__":
    main()
