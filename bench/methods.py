"""C-DPO and its baselines, side by side: what held-out users get in words and, painted, in pictures. Markdown tables, mean and standard deviation over training runs.

    python bench/methods.py text                       # 7 methods x 3 seeds, each trained now unless it stands in --out: about half an hour on two cores
    python bench/methods.py sweep --sweep lam,k        # C-DPO with other values of a flag, and what each gains over lambda 0 with the same seed
    python bench/methods.py pictures                   # every edit of every held-out scene, and one picture a held-out user of each method's own instruction

They begin with what `python mini/world.py && python train.py graph && python train.py sft` wrote. Other flags are `train.py eval`'s (--users, --pairs, --qwen, --answers ...).
"""
import argparse, contextlib, functools, math, os, statistics, sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import disable_progress_bars

import train
from controlnet import FLUX_PARTS, canny, control_picture, render
from qwen import resolve

METHODS = {   # name -> flags of the cdpo stage; None is the SFT adapter as it stands
    "SFT": None,
    "profile in the prompt": None,
    "DPO-Vanilla": "--user none",
    "DPO-User, mean user": "--user id",
    "DPO-User, nearest user": "--user id",
    "C-DPO, lambda 0": "--lam 0",
    "C-DPO": "",
}
SWEEPS = {"lam": "0 0.15 0.5 1", "k": "1 2 3 5 12", "similarity": "shared signed likes", "neighbour-user": "target neighbour", "neighbours": "exact sampled"}

class Methods:
    """Trains what is missing and asks `train.Evaluation` about each."""

    def __init__(self, args, more):
        self.args, self.eval = args, train.Evaluation(train.parse(["eval", "--policy", args.sft, *more]))

    def trained(self, flags, seed):
        """The folder of a cdpo run with these flags and this seed, trained now unless it stands already; the SFT adapter's for None."""
        args, given = self.args, self.eval.args
        if flags is None:
            return args.sft
        words = [*flags.split(), *(["--steps", str(args.steps)] if args.steps else [])]
        name = "-".join([*(w.strip("-") for w in words or ["default"]), f"seed{seed}"])
        shared = [w for f in ("preset", "users", "pairs", "qwen", "dtype", "device") for w in (f"--{f}", str(getattr(given, f)))]
        run = train.parse(["cdpo", *shared, "--sft", args.sft, "--graph", args.graph, *words, "--seed", str(seed), "--out", f"{args.out}/{name}"])
        if not (Path(run.out) / f"step_{run.steps}").exists():
            with contextlib.redirect_stdout(sys.stderr):
                train.fit(train.CDPO(run), run)
        return run.out

    def how(self, method, flags, seed):
        """The arguments of Evaluation.answers and .rates for a method."""
        return dict(policy=self.trained(flags, seed), seed=seed, profile="profile" in method, unknown="nearest" if "nearest" in method else "mean")

    @functools.cache
    def rates(self, method, flags, shown="likes + dislikes"):
        """[{"likes": rate, ...}], one for each seed."""
        return [self.eval.rates(train.CONDITIONS[shown], **self.how(method, flags, seed)) for seed in range(self.args.seeds)]

    def rates_table(self, title, methods):
        """The last column is the gain over C-DPO without its neighbours' term, of the same seed."""
        base, rows = self.rates("C-DPO, lambda 0", METHODS["C-DPO, lambda 0"]), []
        for method, flags in methods.items():
            runs = self.rates(method, flags)
            rows.append([method, *(mean((r[name] for r in runs), True) for name in train.RATES), mean((r["hit"] - b["hit"] for r, b in zip(runs, base)), True)])
        answers = sum(map(len, self.eval.captions)) * self.eval.args.answers
        count = f"{len(self.eval.users)} held-out users, {answers} answers a seed at temperature 1, {self.args.seeds} seeds"
        return table(f"{title} ({count})", ["method", *train.RATES, "hit less lambda 0's"], rows)

    def text(self):
        rows = [[method, *(mean((r["hit"] for r in self.rates(method, flags, shown)), True) for shown in train.CONDITIONS)] for method, flags in METHODS.items()]
        return self.rates_table("What the instruction asks for", METHODS) + table("Liked or would-be-liked, by what the history shows", ["method", *train.CONDITIONS], rows)

    def sweep(self):
        usual, text = vars(train.parse(["cdpo", "--preset", self.eval.args.preset])), ""
        for flag in self.args.sweep.split(","):
            rows = {f"{flag} {v}": "" if v == str(usual[flag.replace("-", "_")]) else f"--{flag} {v}" for v in SWEEPS[flag].split()}
            text += self.rates_table(f"C-DPO, --{flag}", rows)
        return text

    def pictures(self):
        """Every edit of every scene at strength 1 and at the default, beside the untouched source and the truth; then the methods' own instructions,
        one picture a held-out user (the first seed's), left out where they name no attribute, several or an unknown one."""
        args, users, scenes = self.args, self.eval.users, read_truth(self.args.scenes)
        jobs = [(scene, name, text, None) for scene in scenes for name, (_, text, _) in scene[2].items()]
        rows = {"the source, untouched": [measures(scene[1], scene, name) for scene, name, *_ in jobs], "the true picture": [measures(s[2][name][2], s, name) for s, name, *_ in jobs]}
        rows |= {f"strength {strength:g}": self.paint(jobs, strength) for strength in sorted({1.0, args.strength}, reverse=True)}
        kinds, own = sorted({r["kind"] for r in rows["the true picture"]}), {}
        mine = [scenes[i % len(scenes)] for i in range(len(users))]
        for method, flags in METHODS.items():
            answers = self.eval.answers(users, [[scene[0]] for scene in mine], **self.how(method, flags, 0))
            said = [(mine[i], self.eval.judge.names.findall(text), text, users[i]) for i, _, text, _ in answers]
            own[method] = self.paint([(scene, names[0], text, user) for scene, names, text, user in said if len(names) == 1 and names[0] in scene[2]], args.strength)
        by_kind = [[name, *(mean(r["asked visible"] for r in found if r["kind"] == kind) for kind in kinds)] for name, found in rows.items()]
        return (picture_table("Every edit of every held-out scene", rows, MEASURES[:4]) + table("Asked visible, by edit type", ["", *kinds], by_kind)
                + picture_table(f"The methods' own instructions, strength {args.strength:g}; the picture shows the attribute whose true picture is nearest of all", own, MEASURES))

    def paint(self, jobs, strength):
        """The measures of pictures of (scene, attribute, instruction, user), each with the seed of its place in the list."""
        args, sources = self.args, [scene[1] for scene, *_ in jobs]
        if not jobs:
            return []
        drawn = render(resolve(args.flux, FLUX_PARTS), resolve(args.controlnet), [f"{scene[0]}. {text}" for scene, _, text, _ in jobs], range(len(jobs)), sources[0].shape[:2],
                       sources, [control_picture(s) for s in sources], scale=args.control_scale, steps=args.picture_steps, guidance=args.guidance, strength=strength,
                       device=self.eval.args.device, dtype=train.DTYPES[self.eval.args.dtype], batch=32)
        return [measures(picture, scene, name, user) for picture, (scene, name, _, user) in zip(drawn, jobs)]

# ---- tables ------------------------------------------------------------------------------------------------------------------
def mean(values, deviation=False):
    """As a Markdown cell, without the nans (nothing of the picture was to be kept)."""
    values = [v for v in values if not math.isnan(v)]
    spread = f" +- {statistics.stdev(values) if len(values) > 1 else 0:.3f}" if deviation else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else "-"

def table(title, columns, rows):
    return f"\n\n**{title}**\n\n" + train.table(columns, rows)

# ---- pictures ----------------------------------------------------------------------------------------------------------------
def read_truth(path):
    """scenes.jsonl -> [(caption, source, {attribute: (edit type, instruction, true picture)})] of the scenes that come with true pictures; uint8 (H,W,3)."""
    rows = [row for row in train.read_scenes(path, "edit_type", "attribute", "instruction", "image") if row["edits"]]
    if not rows:
        raise ValueError(f"{path} holds no scene with true pictures of its edits")
    read = train.read_picture
    return [(r["caption"], read(r["image"]), {e["attribute"]: (e["edit_type"], e["instruction"], read(e["image"])) for e in r["edits"]}) for r in rows]

def edge_overlap(a, b):
    """Intersection over union of two pictures' Canny edges, where an edge within one pixel counts as met."""
    a, b = (torch.from_numpy(canny(x) > 0)[None] for x in (a, b))
    met = sum((x & (F.max_pool2d(y.float(), 3, 1, 1) > 0)).sum().item() for x, y in ((a, b), (b, a))) / 2
    return met / max(a.sum().item() + b.sum().item() - met, 1)

def psnr(a, b, where=...):
    error = (a[where].astype(np.float64) - b[where]) ** 2
    return -10 * math.log10(max(error.mean() / 255 ** 2, 1e-9)) if error.size else math.nan

MEASURES = ("asked visible", "edges", "PSNR", "PSNR, unedited", "shows a like", "shows a dislike")

def measures(picture, scene, asked, user=None):
    """What a picture of `asked` is worth. `asked visible`: its own true picture is the nearest (in squared error) of all attributes of that edit type; overlap of
    its edges with the source's; PSNR against the true picture, everywhere and where that is the source (8 of 255 apart at most); what it shows is the nearest of all."""
    _, source, truth = scene
    kind, _, true = truth[asked]
    far = {name: np.square(picture.astype(np.float64) - other).mean() for name, (*_, other) in truth.items()}
    shown, kept = min(far, key=far.get), np.abs(true.astype(int) - source).max(-1) <= 8
    visible = min((name for name in far if truth[name][0] == kind), key=far.get) == asked
    taste = (shown in {*user.likes, *user.hidden}, shown in user.dislikes) if user else (math.nan, math.nan)
    return {"kind": kind, **dict(zip(MEASURES, (visible, edge_overlap(picture, source), psnr(picture, true), psnr(picture, true, kept), *taste)))}

def picture_table(title, rows, names):
    return table(title, ["", "pictures", *names], [[name, str(len(found)), *(mean(r[n] for r in found) for n in names)] for name, found in rows.items()])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["text", "sweep", "pictures"])
    p.add_argument("--sft", default="runs/sft", help="adapter that every method starts from")
    p.add_argument("--graph", default="runs/graph", help="folder of the graph stage")
    p.add_argument("--out", default="runs/methods", help="folder of the training runs")
    p.add_argument("--seeds", type=int, default=3, help="training runs of each method")
    p.add_argument("--steps", type=int, help="steps of each, where the preset's are too many")
    p.add_argument("--sweep", default="lam,k", help=f"some of {','.join(SWEEPS)}")
    group = p.add_argument_group("pictures")
    group.add_argument("--scenes", default="mini/data/scenes.jsonl", help="held-out scenes with the true pictures of their edits")
    group.add_argument("--flux", default="mini/flux")
    group.add_argument("--controlnet", default="mini/controlnet")
    group.add_argument("--control-scale", type=float, default=1.0)
    group.add_argument("--picture-steps", type=int, default=20)
    group.add_argument("--guidance", type=float, default=3.5)
    group.add_argument("--strength", type=float, default=0.8)
    args, more = p.parse_known_args()
    if unknown := set(args.sweep.split(",")) - set(SWEEPS):
        p.error(f"--sweep {unknown.pop()}: allowed are {', '.join(SWEEPS)}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    print(getattr(Methods(args, more), args.what)())

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"methods.py: {error}")
