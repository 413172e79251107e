"""C-DPO and its baselines, side by side: what held-out users get in words and, drawn, in pictures.
Markdown tables, mean and standard deviation over training runs.

    python bench/methods.py text                  # the paper's Table 2: 10 methods x 3 seeds
    python bench/methods.py text --profile own    # the same, with the paper's prompt for all
    python bench/methods.py sweep --sweep lam,k   # C-DPO with other values of a flag, and what each
                                                  # gains over lambda 0 with the same seed
    python bench/methods.py unknown               # people who like what the graph does not know:
                                                  # C-DPO twice a seed, once without these words
    python bench/methods.py pictures              # every edit of every held-out scene, and for each
                                                  # user a picture of each method's instruction

They begin with what `python mini/world.py && python train.py graph && python train.py sft` wrote.
A method is trained now unless its run stands in --out. What a seed of a method comes to is a line
of units.jsonl there, and is not computed again. Unknown flags are `train.py eval`'s.

All methods have the same steps, pairs, rates and start, the SFT adapter. SFT-Vanilla, which the
paper names and does not describe, is our reading: SFT goes on, on the pairs' chosen answers, as
DPO-Vanilla with the likelihood term alone. The paper sends every method the profile in words
(--profile own: in training and evaluation); here only prompt engineering has it unless asked.
"""
import argparse
import contextlib
import json
import math
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as in edit.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import disable_progress_bars

import lora
import train
from cdpo import CONDITIONS, PROFILES, Evaluation, UserTokens, markdown_table
from controlnet import FLUX_PARTS, canny, control_picture, render
from edit import EditSettings
from flux import read_image
from graph import PreferenceGraph, User, attribute_names, read_jsonl, read_users
from mini.judge import Judge
from patch_dpo import read_scenes
from qwen import DTYPES, load_language_model, pick_device, resolve

class Method(NamedTuple):
    flags: str | None = None    # of the cdpo stage; None: the SFT adapter as it stands
    profile: str = ""           # in words, of the SFT adapter's prompts
    nearest: bool = False       # somebody new is read as the nearest training user


METHODS = {
    "untuned": Method(),
    "SFT": Method(),
    "SFT-Vanilla": Method("--user none --beta 0 --nll 1"),
    "DPO-Vanilla": Method("--user none"),
    "DPO-User, mean user": Method("--user id"),
    "DPO-User, nearest user": Method("--user id", nearest=True),
    "prompt engineering, own profile": Method(profile="own"),
    "prompt engineering, neighbours' too": Method(profile="neighbours"),
    "C-DPO, lambda 0": Method("--lam 0"),
    "C-DPO": Method(""),
}
SHOWN = list(CONDITIONS)[:3]    # the paper's
PAPER = {                       # Table 2: likes + dislikes, likes, dislikes; Table 8 the second
    "untuned": ".274 .276 .229",
    "SFT": ".227 .238 .196",
    "SFT-Vanilla": ".276 .276 .185",
    "DPO-Vanilla": ".272 .274 .172",
    "DPO-User, mean user": ".307 .286 .269",
    "prompt engineering, neighbours' too": ".270 .270 .200",
    "C-DPO": ".354 .306 .294",
}
PLAIN = "C-DPO, lambda 0"    # what a gain is measured against
SWEEPS = {
    "lam": "0 0.15 0.5 1",
    "k": "1 2 3 5 12",
    "similarity": "shared signed likes",
    "neighbour-user": "target neighbour",
    "neighbours": "exact sampled",
}
RATES = ["likes", "would like", "hit", "dislikes", "malformed", "CLIP liked"]
MEASURES = ["asked visible", "edges", "PSNR", "PSNR, unedited", "sharpness", "shows a like",
            "shows a dislike"]


class NearestUser(Evaluation):
    """Where it is `wanted`, somebody new gets the soft tokens of the training user who agrees most
    often with them and clashes least: the best that DPO-User's table can offer (ours)."""
    wanted = False

    def soft_tokens(self, users):
        soft, at = super().soft_tokens(users)
        if self.wanted:
            file = Path(self.settings.policy) / "collaborative.safetensors"
            tokens = UserTokens.load(file, soft.device)
            nearest = nearest_users(tokens.graph, users)
            soft = tokens.soft(tokens.vectors[nearest])                     # (N, S, D)
        return soft, at


def nearest_users(graph, users):
    """(N,) numbers of the graph's users who agree most with these."""
    asked = PreferenceGraph.build(users, graph.attributes, None).signs().to_dense()        # (N, A)
    return (graph.signs() @ asked.T).argmax(0)


class Methods:
    """Trains what is missing, asks each method for instructions, counts what they are worth."""

    def __init__(self, args, more):
        self.args = args
        preset = ["--preset", args.preset]
        _, self.settings, _ = train.parse(["eval", "--policy", args.sft, *preset, *more])
        self.shared = [*preset, "--pairs", args.pairs]    # flags of every training run
        for name in ("users", "qwen", "dtype", "device"):
            self.shared += [f"--{name}", getattr(self.settings, name)]
        self.evaluation = NearestUser(self.settings)
        self.users = self.evaluation.users
        edits = read_jsonl(args.edits, input=str, edit=str)
        pairs = read_jsonl(args.pairs, caption=str, chosen=str, rejected=str)
        seen = [(edit["input"], edit["edit"]) for edit in edits]
        seen += [(pair["caption"], pair["chosen"]) for pair in pairs]
        seen += [(pair["caption"], pair["rejected"]) for pair in pairs]
        self.judge = Judge(self.users + read_users(self.settings.users), seen)

    def trained(self, flags, seed, files=()):
        """The folder of a cdpo run with these flags and this seed; the SFT adapter's for None.
        `files`: flags that name other files than the bench's own."""
        args = self.args
        if flags is None:
            return args.sft
        words = flags.split()
        for name in ("steps", "batch", "profile"):
            value = getattr(args, name)
            words += [f"--{name}", str(value)] if value else []
        name = "-".join(word.strip("-") for word in words) or "default"
        if files:
            name += "-without"
        out = f"{args.out}/{name}-seed{seed}"
        start = ["--sft", args.sft, "--graph", args.graph, "--seed", str(seed), "--out", out]
        return train_once(["cdpo", *self.shared, *start, *words, *files])

    def untuned(self):
        """A folder with an adapter that changes nothing."""
        folder = Path(self.args.out, "untuned")
        if (folder / "adapter_config.json").exists():        # written last
            return folder
        model, _ = load_language_model(self.settings.qwen)
        lora.inject(model)
        lora.save_adapter(model, folder)
        return folder

    def answers(self, name, method, seed, users, captions):
        """A method's instructions -> [(user index, caption, text, ended)]."""
        settings = self.settings
        settings.policy = self.untuned() if name == "untuned" else self.trained(method.flags, seed)
        settings.profile = method.profile or self.args.profile or "none"
        settings.seed = seed
        self.evaluation.wanted = method.nearest
        return self.evaluation.answers(users, captions)

    def unit(self, name, method, seed):
        """{condition: {"likes": rate, ..., "CLIP liked": cosine}} of one seed, where of each user's
        history only what the condition leaves is known. From units.jsonl, where it stands there."""
        args = self.args
        key = [name, *method, seed, args.preset, args.profile, args.steps, args.batch]
        file = Path(args.out, "units.jsonl")
        for line in file.read_text().splitlines() if file.exists() else []:
            row = json.loads(line)
            if row["key"] == key:
                return row["found"]
        captions = [texts * self.settings.answers for texts in self.evaluation.captions]
        found = {}
        for shown in SHOWN:
            known = [replace(user, **CONDITIONS[shown]) for user in self.users]
            answers = self.answers(name, method, seed, known, captions)
            verdicts = [self.judge(self.users[i], *answer) for i, *answer in answers]
            rates = {rate: statistics.fmean(column(verdicts, rate)) for rate in RATES[:-1]}
            near = self.evaluation.cosines(answers)
            found[shown] = {**rates, "CLIP liked": near.mean().item(), "spread": near.std().item()}
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name}, seed {seed}: {found}", file=sys.stderr)
        with open(file, "a") as lines:
            lines.write(json.dumps({"key": key, "found": found}) + "\n")
        return found

    def units(self, methods):
        """{name: {condition: [{"likes": rate, ...} of each seed]}}; a seed of all methods first."""
        found = {}
        for name in methods:
            found[name] = {shown: [] for shown in SHOWN}
        for seed in range(self.args.seeds):
            for name, method in methods.items():
                for shown, rates in self.unit(name, method, seed).items():
                    found[name][shown].append(rates)
        return found

    def rates_table(self, title, methods):
        """The last column is the gain over C-DPO without its neighbours' term, of the same seed."""
        units = self.units({PLAIN: METHODS[PLAIN], **methods})
        plain = column(units[PLAIN][SHOWN[0]], "hit")
        rows = []
        for name in methods:
            runs = units[name][SHOWN[0]]
            cells = [spread(column(runs, rate)) for rate in RATES]
            gain = np.subtract(column(runs, "hit"), plain)
            rows.append([name, *cells, spread(gain)])
        answers = sum(map(len, self.evaluation.captions)) * self.settings.answers
        title += f" ({len(self.users)} held-out users, {answers} answers a seed"
        title += f" at temperature 1, {self.args.seeds} seeds)"
        return table(title, ["method", *RATES, "hit less lambda 0's"], rows)

    def text(self):
        asked = self.rates_table("What the instruction asks for", METHODS)
        rows = []
        for name, runs in self.units(METHODS).items():
            cells = []
            for rate in ("hit", "CLIP liked"):
                cells += [spread(column(runs[shown], rate)) for shown in SHOWN]
            rows.append([name, *cells, PAPER.get(name, "")])
        columns = [f"{rate}, {shown}" for rate in ("hit", "CLIP liked") for shown in SHOWN]
        title = "Liked or would-be-liked, and Table 2's cosine, by what the history shows"
        return asked + table(title, ["method", *columns, "the paper's cosines"], rows)

    def sweep(self):
        _, usual, _ = train.parse(["cdpo", *self.shared])
        text = ""
        for flag in self.args.sweep.split(","):
            default = str(getattr(usual, flag.replace("-", "_")))
            rows = {}
            for value in SWEEPS[flag].split():
                rows[f"{flag} {value}"] = Method("" if value == default else f"--{flag} {value}")
            text += self.rates_table(f"C-DPO, --{flag}", rows)
        return text

    def unknown(self):
        """What people get who like some of every eighth attribute, where the graph knows it; where
        nobody in graph or pairs has ever named it, and it takes part by its text; and where it is
        left out. Once all that they say is shown, once these likes alone."""
        everybody = read_users(self.settings.users)
        new = attribute_names(everybody)[::8]
        files = self.write_without(new, everybody)
        fans = [i for i, user in enumerate(self.users) if set(new) & set(user.likes)]
        whole = [self.users[i] for i in fans]
        alone = [replace(user, likes=common(user.likes, new), dislikes=[]) for user in whole]
        rows = []
        for how in ("known", "by its text", "left out"):
            cells = []
            for shown in (whole, alone):
                if how == "left out":
                    shown = [less(user, new) for user in shown]
                runs = self.fan_rates(fans, shown, new, () if how == "known" else files)
                cells += [spread(column(runs, name)) for name in ("hit", "asks for it")]
            rows.append([how, *cells])
        columns = ["the attribute is", "hit", "asks for it", "hit, it alone is said",
                   "asks for it, it alone is said"]
        title = f"{len(fans)} held-out users who like some of {', '.join(new)} "
        return table(f"{title}({self.args.seeds} seeds)", columns, rows)

    def write_without(self, new, users):
        """Users and pairs as if nobody had ever named the attributes `new`, and the graph stage's
        run on them -> cdpo's flags that name the three."""
        folder = Path(self.args.out, "without")
        folder.mkdir(parents=True, exist_ok=True)
        people = []
        for user in users:
            user = less(user, new)
            people.append({"user": user.name, "likes": user.likes, "dislikes": user.dislikes})
        pairs = []
        for pair in read_jsonl(self.args.pairs, {"guidance": ""}, chosen=str, rejected=str):
            text = f"{pair['chosen']}, {pair['rejected']}, {pair['guidance']}"
            if not common(self.judge.names.findall(text), new):
                pairs.append(pair)
        flags = []
        for name, rows in (("users", people), ("pairs", pairs)):
            file = folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            flags += [f"--{name}", str(file)]
        where = ["--out", str(folder / "graph"), "--device", self.settings.device]
        graph = train_once(["graph", "--preset", self.args.preset, *flags[:2], *where])
        return [*flags, "--graph", graph]

    def fan_rates(self, fans, shown, new, files):
        """[{"hit", "asks for it"}], one for each seed, of the users `fans`, numbers, of whom
        `shown`, list[User], is known."""
        captions = [self.evaluation.captions[i] * self.settings.answers for i in fans]
        found = []
        for seed in range(self.args.seeds):
            self.settings.policy = self.trained("", seed, files)
            self.settings.seed = seed
            verdicts = []
            for place, *answer in self.evaluation.answers(shown, captions):
                user = self.users[fans[place]]
                fan = replace(user, likes=common(user.likes, new), hidden=[])
                verdicts.append([self.judge(one, *answer)["hit"] for one in (user, fan)])
            hit, asked = np.mean(verdicts, 0)
            found.append({"hit": hit, "asks for it": asked})
        return found

    def pictures(self):
        """Every edit of every scene, at strength 1 and at the default, beside the untouched source
        and the truth; then pictures of the methods' own instructions."""
        scenes = read_truth(self.args.scenes)
        jobs = []
        for scene in scenes:
            jobs += [Job(scene, name, edit.instruction) for name, edit in scene.edits.items()]
        rows = {
            "the source, untouched": [measure(job.scene.picture, job) for job in jobs],
            "the true picture": [measure(job.truth.picture, job) for job in jobs],
        }
        for strength in sorted({1.0, self.args.strength}, reverse=True):
            rows[f"strength {strength:g}"] = self.draw(jobs, strength)
        own = {name: self.draw(self.own_jobs(name, scenes)) for name in METHODS}
        text = picture_table("Every edit of every held-out scene", rows, MEASURES[:5])
        text += kind_table(rows)
        title = f"The methods' own instructions, strength {self.args.strength:g}; the picture "
        title += "shows the attribute whose true picture is nearest of all"
        return text + picture_table(title, own, MEASURES)

    def own_jobs(self, name, scenes):
        """One instruction of the method (the first seed's) for each held-out user, left out where
        it names no attribute, several, or one that has no true picture."""
        mine = [scenes[i % len(scenes)] for i in range(len(self.users))]
        captions = [[scene.caption] for scene in mine]
        jobs = []
        for i, _, text, _ in self.answers(name, METHODS[name], 0, self.users, captions):
            names = self.judge.names.findall(text)
            if len(names) == 1 and names[0] in mine[i].edits:
                jobs.append(Job(mine[i], names[0], text, self.users[i]))
        return jobs

    def draw(self, jobs, strength=None):
        """The measures of the jobs' pictures, each with the seed of its place in the list."""
        args = self.args
        if not jobs:
            return []
        sources = [job.scene.picture for job in jobs]
        drawn = render(
            flux=resolve(args.flux, FLUX_PARTS),
            controlnet=resolve(args.controlnet),
            prompts=[f"{job.scene.caption}. {job.instruction}" for job in jobs],
            seeds=range(len(jobs)),
            shape=sources[0].shape[:2],
            sources=sources,
            controls=[control_picture(source) for source in sources],
            scale=args.control_scale,
            steps=args.picture_steps,
            guidance=args.guidance,
            strength=args.strength if strength is None else strength,
            device=pick_device(self.settings.device),
            dtype=DTYPES[self.settings.dtype],
            batch=32,
        )
        return [measure(picture, job) for picture, job in zip(drawn, jobs)]


# ---- training runs and people --------------------------------------------------------------------

def train_once(argv):
    """train.py with these flags -> its folder. A run that stands already is read, not repeated;
    one of other flags is refused."""
    _, _, loop = train.parse(argv)
    with contextlib.redirect_stdout(sys.stderr):
        train.main(argv)
    return loop.out


def common(names, others):
    return [name for name in names if name in others]


def less(user, names):
    """The user without a word on the attributes `names`."""
    likes = [name for name in user.likes if name not in names]
    dislikes = [name for name in user.dislikes if name not in names]
    return replace(user, likes=likes, dislikes=dislikes)


# ---- pictures ------------------------------------------------------------------------------------

class Edit(NamedTuple):
    kind: str                # its edit type
    instruction: str
    picture: np.ndarray      # the true one, uint8 (H, W, 3)


class Scene(NamedTuple):
    caption: str
    picture: np.ndarray      # the unedited one, uint8 (H, W, 3)
    edits: dict              # {attribute: Edit}


class Job(NamedTuple):
    """A picture to draw: this attribute in this scene."""
    scene: Scene
    attribute: str
    instruction: str
    user: User | None = None

    @property
    def truth(self):
        return self.scene.edits[self.attribute]


def read_truth(path):
    """The scenes of scenes.jsonl that come with true pictures. ValueError when none does."""
    scenes = []
    for row in read_scenes(path, "edit_type", "attribute", "instruction", "image"):
        edits = {}
        for edit in row["edits"]:
            picture = np.array(read_image(edit["image"]))
            edits[edit["attribute"]] = Edit(edit["edit_type"], edit["instruction"], picture)
        if edits:
            scenes.append(Scene(row["caption"], np.array(read_image(row["image"])), edits))
    if not scenes:
        raise ValueError(f"{path} holds no scene with true pictures of its edits")
    return scenes


def edge_overlap(a, b):
    """Intersection over union of two pictures' Canny edges; a distance of 1/64 of the width is
    allowed (a pixel at 64, three at 192), so that the number means the same at any size."""
    a, b = edges(a), edges(b)                             # (1, H, W)
    far = max(1, a.shape[-1] // 64)
    near_a = F.max_pool2d(a, 2 * far + 1, stride=1, padding=far)
    near_b = F.max_pool2d(b, 2 * far + 1, stride=1, padding=far)
    met = ((a * near_b).sum() + (b * near_a).sum()).item() / 2
    return met / max(a.sum().item() + b.sum().item() - met, 1)


def edges(picture):
    return torch.from_numpy(canny(picture) > 0).float()[None]


def mean_gradient(picture):
    grey = picture.mean(-1)
    return np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()


def squared_error(a, b):
    return np.square(a.astype(np.float64) - b)


def psnr(error):
    """In dB, of squared errors; nan when there are none."""
    if not error.size:
        return math.nan
    return -10 * math.log10(max(error.mean() / 255 ** 2, 1e-9))


def measure(picture, job):
    """What a picture is worth. `asked visible`: of all attributes of that edit type its own true
    picture is the nearest in squared error; `edges`: their overlap with the source's; PSNR to the
    true picture, everywhere and where that is the source (8 of 255 apart at most); `sharpness`: its
    mean gradient over the true picture's; what it shows is the nearest of all."""
    source, edits, truth = job.scene.picture, job.scene.edits, job.truth
    far = {name: squared_error(picture, edit.picture).mean() for name, edit in edits.items()}
    same_kind = [name for name, edit in edits.items() if edit.kind == truth.kind]
    shown = min(far, key=far.get)
    unedited = np.abs(truth.picture.astype(int) - source).max(-1) <= 8        # (H, W)
    error = squared_error(picture, truth.picture)
    user = job.user
    return {
        "kind": truth.kind,
        "asked visible": min(same_kind, key=far.get) == job.attribute,
        "edges": edge_overlap(picture, source),
        "PSNR": psnr(error),
        "PSNR, unedited": psnr(error[unedited]),
        "sharpness": mean_gradient(picture) / mean_gradient(truth.picture),
        "shows a like": shown in {*user.likes, *user.hidden} if user else math.nan,
        "shows a dislike": shown in user.dislikes if user else math.nan,
    }


# ---- tables --------------------------------------------------------------------------------------

def column(rows, name):
    return [row[name] for row in rows]


def mean(values):
    """As a cell, without the nans (nothing of the picture was to be kept)."""
    values = [value for value in values if not math.isnan(value)]
    return f"{statistics.fmean(values):.3f}" if values else "-"


def spread(values):
    """Mean and standard deviation as a cell."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):.3f} +- {deviation:.3f}"


def table(title, columns, rows):
    return f"\n\n**{title}**\n\n" + markdown_table(columns, rows)


def picture_table(title, rows, names):
    cells = []
    for row, found in rows.items():
        cells.append([row, str(len(found)), *(mean(column(found, name)) for name in names)])
    return table(title, ["", "pictures", *names], cells)


def kind_table(rows):
    kinds = sorted(set(column(rows["the true picture"], "kind")))
    cells = []
    for row, found in rows.items():
        cells.append([row])
        for kind in kinds:
            same = [one for one in found if one["kind"] == kind]
            cells[-1].append(mean(column(same, "asked visible")))
    return table("Asked visible, by edit type", ["", *kinds], cells)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["text", "sweep", "unknown", "pictures"])
    p.add_argument("--sft", default="runs/sft", help="adapter that every method starts from")
    p.add_argument("--graph", default="runs/graph", help="folder of the graph stage")
    p.add_argument("--out", default="runs/methods", help="folder of the training runs")
    p.add_argument("--seeds", type=int, default=3, help="training runs of each method")
    p.add_argument("--steps", type=int, help="steps of each, where the preset's are too many")
    p.add_argument("--sweep", default="lam,k", help=f"some of {','.join(SWEEPS)}")
    p.add_argument("--preset", default="mini", help="mini or paper")
    p.add_argument("--batch", type=int, help="pairs of a step, where the preset's are too many")
    p.add_argument("--profile", choices=PROFILES, help="in all prompts, of training pairs and of"
                   " evaluation")
    p.add_argument("--pairs", default="mini/data/pairs.jsonl", help="of the training users")
    p.add_argument("--edits", default="mini/data/edits.jsonl", help="what sft was trained on")
    group = p.add_argument_group("pictures")
    group.add_argument("--scenes", default="mini/data/scenes.jsonl", help="with true pictures")
    group.add_argument("--flux", default="mini/flux")
    group.add_argument("--controlnet", default="mini/controlnet")
    group.add_argument("--control-scale", type=float, default=EditSettings.control_scale)
    group.add_argument("--picture-steps", type=int, default=EditSettings.steps)
    group.add_argument("--guidance", type=float, default=EditSettings.guidance)
    group.add_argument("--strength", type=float, default=EditSettings.strength)
    args, more = p.parse_known_args()
    unknown = set(args.sweep.split(",")) - set(SWEEPS)
    if unknown:
        p.error(f"--sweep {unknown.pop()}: allowed are {', '.join(SWEEPS)}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    print(getattr(Methods(args, more), args.what)())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"methods.py: {error}")
