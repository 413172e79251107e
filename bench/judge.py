"""The C-DPO paper's measures of edited pictures, its Tables 3 and 4, for folders of edit.py's.

    python bench/judge.py out/cdpo out/sft                    # by the miniature's CLIP and DINOv2
    python bench/judge.py out/cdpo out/dpo --users users.jsonl --pairs pairs.jsonl \\
        --scenes scenes.jsonl --clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16

    python bench/judge.py out/mine --dreambench dreambooth/dataset      # see at the end
    python bench/judge.py out/two --concept101 customconcept101/dataset_multiconcept.json

A folder is a method; it holds what edit.py writes, a PNG and its JSON for each person's edit, of
any people, pictures and captions. Every number is the mean and the standard deviation, over the
folder's pictures, of cosines:

    DINO-Ref, CLIP-Ref    the edited picture and the original, cut as the edit saw it
    CLIP-T, HPS           the edited picture and the caption of the original; HPS: by HPS's CLIP
    DINO-Pref, CLIP-I-Pref   the edited picture and each picture that its user likes
    CLIP-T-Pref           the edited picture and each instruction that its user likes
    CLIP-T-Neighbor       the edited picture and each attribute that the user's ten most similar
                          users like, as often as they do (Eq. 6 over all of --users)

The paper names the measures and not what a liked picture or prompt is. Ours: the liked prompts are
the user's "chosen" in --pairs, or, of a user without any, the names of the likes; the liked
pictures are those in --scenes after an edit to an attribute that the user likes. The paper's
deviations may be over other things than pictures. Encoders: its supplement says CLIP and DINO (and
cites DINOv2); CLIP ViT-B/32 and DINO ViT-S/16 are PatchDPO's, whose tables read alike. Pictures are
resized and cropped as each preprocessor_config.json says, as transformers does it.

Beside each folder stand its controls: the same pictures judged for the other people in the folder,
and the originals, unedited, judged for theirs. A method that personalises is above both where it
says "Pref" or "Neighbor" (but an original is near to all liked pictures of its own scene: take
--scenes of others), and below 1 where it says "Ref": only the original is itself.

CLIP must be a safetensors file in a folder with its config.json, preprocessor_config.json and
tokenizer. Where the hub has but a pickle (openai/clip-vit-base-patch32), once:
    python -c "import transformers as t; n = 'openai/clip-vit-base-patch32'; \\
        [k.from_pretrained(n).save_pretrained('clip') for k in (t.CLIPModel, t.CLIPProcessor)]"
HPS (v2.1) is published as a pickle, in open_clip's names; it is a CLIP ViT-H/14. bench/hps.py makes
a folder of it that --hps reads as any CLIP.

--dreambench, --concept101: what bench/subjects.py painted of these benchmarks' subjects instead, an
object or several together; FOLDER as there. A method's folder holds NAME/N_K.png, picture K of the
subject's prompt N. DINO and CLIP-I: each picture and all references of each object in it, their
mean ("all"), or one reference of each (Kosmos-G's protocol, "one"); of several objects, the mean
over them (ours; Custom Diffusion's evaluate.py prints a number for each). CLIP-T: each picture and
its prompt; of Concept101 it is 2.5 times that and nothing below 0, as in evaluate.py and in
PatchDPO's table. Means over all pictures and, behind it, the deviation. The control is the
references, each beside the others of its object. evaluate.py cuts 224 of 256 pixels for DINO; here
preprocessor_config.json says how.
"""
import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clock import table
from study import read_object
from subjects import LAYOUTS, chosen

from cdpo import clip_texts
from flux import read_image, to_tensor
from graph import read_jsonl, read_users, signs_of, similar_users
from patch_dpo import ImageFeatures, read_scenes
from qwen import pick_device, read_json, reading, resolve, shipped

REF = ["DINO-Ref", "CLIP-Ref", "HPS", "CLIP-T"]                       # Table 3
PREF = ["DINO-Pref", "CLIP-I-Pref", "CLIP-T-Pref", "CLIP-T-Neighbor"]   # Table 4
PAPER = {                                                 # mean, deviation; FLUX.1-dev
    "SFT": [(.690, .263), (.600, .222), (.238, .044), (.331, .075),
            (.054, .102), (.315, .098), (.334, .049), (.286, .025)],
    "DPO-Vanilla": [(.736, .248), (.615, .202), (.242, .049), (.346, .067),
                    (.056, .106), (.335, .097), (.359, .035), (.304, .026)],
    "DPO-User": [(.762, .240), (.649, .224), (.243, .048), (.354, .066),
                 (.056, .105), (.325, .096), (.359, .034), (.297, .026)],
    "C-DPO": [(.782, .182), (.652, .182), (.249, .034), (.358, .043),
              (.059, .106), (.338, .089), (.364, .038), (.312, .020)],
}
NEIGHBOURS = 10                                           # paper, A.1
PEOPLE = ["mini/sample/users_test.jsonl", "mini/sample/users.jsonl"]


# ---- what edit.py wrote --------------------------------------------------------------------------

@dataclass
class Edit:
    file: Path
    user: str
    caption: str
    picture: Image.Image
    original: Image.Image         # as the edit saw it; None where there was no photograph


def read_edits(folder):
    """list[Edit] of the folder, without the grids of several people. ValueError for a folder that
    holds none."""
    edits = []
    for file in sorted(Path(folder).glob("*.json")):
        if "edits" in read_json(file):                    # a grid's
            continue
        names = ["user", "instruction", "settings"]
        edit = read_object(file, names, "what edit.py writes beside a picture")
        picture = read_image(file.with_suffix(".png"))
        with reading(file):
            caption = edit["settings"]["caption"]
            source = edit["settings"]["image"]
        original = None
        if source:
            original = ImageOps.fit(read_image(shipped(source)), picture.size, Image.LANCZOS)
        edits.append(Edit(file, edit["user"], caption, picture, original))
    if not edits:
        raise ValueError(f"{folder} holds no edit: expected PNGs with their JSON, as edit.py "
                         "writes them")
    return edits


# ---- encoders: pictures and texts to vectors of length 1 -----------------------------------------

def prepare(picture, processor):
    """A PIL picture resized and cropped as preprocessor_config.json says (transformers' way with
    Pillow). Old files give a number where new ones have names: of CLIP the shorter edge, of ViT
    both."""
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type", "")
    clip = "CLIP" in kind
    if processor.get("do_resize", True):
        shape = resized_shape(picture.size, processor["size"], clip)
        picture = picture.resize(shape, processor.get("resample", 3 if clip else 2))
    if processor.get("do_center_crop", clip):
        width, height = crop_shape(processor["crop_size"])
        left = (picture.width - width) // 2
        top = (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return picture


def resized_shape(shape, size, clip):
    """(width, height) of a picture that is (width, height) now."""
    if isinstance(size, int):
        size = {"shortest_edge": size} if clip else {"height": size, "width": size}
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    edge = size["shortest_edge"]
    return [edge if n == min(shape) else int(edge * n / min(shape)) for n in shape]


def crop_shape(size):
    return (size, size) if isinstance(size, int) else (size["width"], size["height"])


class Pictures:
    """An image encoder behind its processor: [PIL picture] -> (N, P)."""

    def __init__(self, folder, device):
        self.file = folder / "preprocessor_config.json"
        self.processor = read_json(self.file)
        self.features = ImageFeatures.load(folder, device)
        self.device = device

    def __call__(self, pictures):
        vectors = []
        for picture in pictures:                          # of any sizes: one by one
            with reading(self.file):
                image = to_tensor(prepare(picture, self.processor))
            vectors.append(self.features.embed(image[None].to(self.device)))
        return unit(vectors)


def unit(vectors):
    """[(n, P)] -> (N, P) of length 1, on the CPU; of none (0, 0)."""
    if not vectors:
        return torch.zeros(0, 0)
    return F.normalize(torch.cat(vectors).float(), dim=-1).cpu()


class Encoders:
    """Those of --dino, --clip and --hps, by name."""

    def __init__(self, args):
        device = pick_device(args.device)
        self.pictures = {}
        self.texts = {}
        for name, path in (("DINO", args.dino), ("CLIP", args.clip), ("HPS", args.hps)):
            if Path(path).suffix in (".pt", ".pth", ".bin"):
                raise ValueError(f"{path} is a pickle; expected a folder with a safetensors file")
            if path:
                folder = resolve(path, ["*.json", "*.txt", "model*.safetensors"])
                self.pictures[name] = Pictures(folder, device)
                if name != "DINO":
                    self.texts[name] = clip_texts(folder, device)

    @torch.no_grad()
    def see(self, pictures):
        return {name: encoder(pictures) for name, encoder in self.pictures.items()}

    def read(self, texts):
        if not texts:
            return {name: torch.zeros(0, 0) for name in self.texts}
        return {name: encoder(texts) for name, encoder in self.texts.items()}


# ---- what a user likes ---------------------------------------------------------------------------

def read_people(files):
    """{name: User} of several users.jsonl. ValueError for somebody who stands in two of them."""
    people = {}
    for file in files:
        for user in read_users(file):
            if user.name in people:
                raise ValueError(f"{file}: user {user.name!r} stands in another of --users, too")
            people[user.name] = user
    return people


def neighbours(people, kind):
    """{name: [User]} the ten most similar of `people`, fewer where fewer have anything in common;
    `kind`: of similar_users."""
    users = list(people.values())
    index, score = similar_users(signs_of(users), NEIGHBOURS, kind)         # (U, 10)
    found = {}
    for user, near, alike in zip(users, index.tolist(), score.tolist()):
        found[user.name] = [users[i] for i, s in zip(near, alike) if s > 0]
    return found


def tastes(args, names, encoders):
    """What of each user the pictures are compared with, {name: {measure: vectors (n, P)}}, without
    what nobody knows; and the users without a line in --pairs."""
    people = read_people(args.users)
    for name in names:
        if name not in people:
            raise ValueError(f"the edits are for {name!r}, who is not in --users "
                             f"{' '.join(args.users)}")
    chosen = {}
    for pair in read_jsonl(args.pairs, user=str, chosen=str):
        chosen.setdefault(pair["user"], []).append(pair["chosen"])
    edits = edited_scenes(args.scenes)
    shown = encoders.see([read_image(edit["image"]) for edit in edits])
    near = neighbours(people, args.similar)
    found = {}
    for name in names:
        likes = people[name].likes
        theirs = []
        for other in near[name]:
            theirs += other.likes
        liked = [i for i, edit in enumerate(edits) if edit["attribute"] in likes]
        vectors = {
            "DINO-Pref": shown["DINO"][liked],
            "CLIP-I-Pref": shown["CLIP"][liked],
            "CLIP-T-Pref": encoders.read(chosen.get(name, likes))["CLIP"],
            "CLIP-T-Neighbor": encoders.read(theirs)["CLIP"],
        }
        found[name] = {what: rows for what, rows in vectors.items() if len(rows)}
    return found, [name for name in names if name not in chosen]


def edited_scenes(file):
    """The edits of scenes.jsonl that have a picture of their own; none where there is no file."""
    found = []
    for scene in read_scenes(file, "attribute") if file else []:
        found += [edit for edit in scene["edits"] if edit["image"] != scene["image"]]
    return found


# ---- the measures --------------------------------------------------------------------------------

def cosines(a, b):
    """Row by row, of vectors of length 1 (N, P) -> [N numbers]."""
    return (a * b).sum(1).tolist()


def reference(seen, original, said):
    """Table 3, {measure: [number of each picture]}: pictures as the encoders see them, beside
    their originals and the captions of these, {encoder: (N, P)} each."""
    found = {
        "DINO-Ref": cosines(seen["DINO"], original["DINO"]),
        "CLIP-Ref": cosines(seen["CLIP"], original["CLIP"]),
        "CLIP-T": cosines(seen["CLIP"], said["CLIP"]),
    }
    if "HPS" in seen:
        found["HPS"] = cosines(seen["HPS"], said["HPS"])
    return found


def preference(users, seen, likes):
    """Table 4, for each picture's user and for the other users of these pictures, their mean ->
    (own, others'), {measure: [number of each picture]} both."""
    own = {what: [] for what in PREF}
    others = {what: [] for what in PREF}
    for what in PREF:
        vectors = seen["DINO" if what == "DINO-Pref" else "CLIP"]
        for user, vector in zip(users, vectors):
            score = {}
            for name in sorted(set(users)):
                if what in likes[name]:
                    score[name] = (likes[name][what] @ vector).mean().item()
            if user in score:
                own[what].append(score.pop(user))
                others[what] += [statistics.fmean(score.values())] if score else []
    return own, others


def method(folder, edits, encoders, likes):
    """(the rows of a folder and of its controls, a line on how often they are as they must)."""
    users = [edit.user for edit in edits]
    seen = encoders.see([edit.picture for edit in edits])
    said = encoders.read([edit.caption for edit in edits])
    own, others = preference(users, seen, likes)
    kept = [i for i, edit in enumerate(edits) if edit.original]
    unedited = encoders.see([edits[i].original for i in kept])
    kept_seen = {name: rows[kept] for name, rows in seen.items()}
    kept_said = {name: rows[kept] for name, rows in said.items()}
    before, _ = preference([users[i] for i in kept], unedited, likes)
    rows = [
        row(folder, {**reference(kept_seen, unedited, kept_said), **own}),
        row("its pictures, for the other people", others),
        row("its originals, unedited", {**reference(unedited, unedited, kept_said), **before}),
    ]
    line = (f"{folder}: {len(edits)} edits for {len(set(users))} people, {len(kept)} of them of a "
            f"photograph; own above others': {above(own, others)}")
    if len(kept) == len(edits):
        line += f"; edited above unedited: {above(own, before)}"
    return rows, line


def row(title, found, measures=REF + PREF):
    """A table's row: mean ± deviation of each measure, "-" where there is nothing."""
    cells = [title]
    for what in measures:
        numbers = found.get(what)
        cell = "-"
        if numbers:
            spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
            cell = f"{statistics.fmean(numbers):.3f} ± {spread:.3f}"
        cells.append(cell)
    return cells


def above(mine, theirs):
    """For how many pictures the first number is above the second, in words."""
    parts = []
    for what in PREF:
        pairs = list(zip(mine[what], theirs[what]))
        if pairs:
            parts.append(f"{what} {sum(a > b for a, b in pairs)} of {len(pairs)}")
    return ", ".join(parts) or "nothing to compare"


def report(args):
    """The Markdown text for all folders."""
    methods = {folder: read_edits(folder) for folder in args.folders}
    names = set()
    for edits in methods.values():
        names.update(edit.user for edit in edits)
    encoders = Encoders(args)
    likes, without = tastes(args, sorted(names), encoders)
    rows = []
    lines = []
    for folder, edits in methods.items():
        more, line = method(folder, edits, encoders, likes)
        rows += more
        lines.append(line)
    for name, numbers in PAPER.items():
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in numbers]
        rows.append([f"the paper's {name}", *cells])
    if without:
        lines.append(f"{len(without)} of the people have no line in {args.pairs}: the names of "
                     "their likes stand for liked prompts")
    if not args.hps:
        lines.append("HPS is left out: its weights are published as a pickle, see --help")
    return table(["", *REF, *PREF], rows) + "\n" + "\n".join(lines)


# ---- DreamBench and Concept101 -------------------------------------------------------------------

SUBJECT = ["DINO, all", "CLIP-I, all", "DINO, one", "CLIP-I, one", "CLIP-T"]
SUBJECT_PAPER = {             # PatchDPO's supplement; it does not say how many references it takes
    ("dreambench", 1): {                                                    # Table 4
        "IP-Adapter-Plus": ["0.692", "0.826", "-", "-", "0.281"],
        "PatchDPO": ["0.727", "0.838", "-", "-", "0.292"],
    },
    ("dreambench", 2): {                                                    # Table 2
        "Subject-Diffusion": ["0.506", "0.696", "-", "-", "0.310"],
        "IP-Adapter-Plus": ["0.468", "0.683", "-", "-", "0.315"],
        "PatchDPO": ["0.506", "0.705", "-", "-", "0.322"],
    },
    ("concept101", 2): {                                                    # Table 1
        "Custom Diffusion (Joint)": ["0.3799", "0.6704", "-", "-", "0.7534"],
        "IP-Adapter-Plus": ["0.3992", "0.6904", "-", "-", "0.7655"],
        "PatchDPO": ["0.4168", "0.6945", "-", "-", "0.7726"],
    },
}


def painted_for(folder, prompts):
    """[(prompt, picture's file)] of a subject. ValueError for a name without a prompt's number."""
    found = []
    for file in sorted(Path(folder).glob("*.png")):
        number = file.stem.partition("_")[0]
        if not number.isdigit() or int(number) >= len(prompts):
            raise ValueError(f"{file} must be called N_K.png, N one of the prompts 0 to "
                             f"{len(prompts) - 1}")
        found.append((prompts[int(number)], file))
    return found


def see_references(encoders, subjects):
    """{an object's folder: its references as the encoders see them, {encoder: (M, P)}}."""
    shown = {}
    for subject in subjects:
        for pictures in subject.objects:
            folder = pictures[0].parent
            if folder not in shown:
                shown[folder] = encoders.see([read_image(file) for file in pictures])
    return shown


def subject_scores(folder, encoders, subjects, shown):
    """{measure: [number of each picture]} of a method, and "absent": subjects without a picture."""
    found = {what: [] for what in SUBJECT}
    found["absent"] = []
    for subject in subjects:
        painted = painted_for(Path(folder) / subject.name, subject.prompts)
        if not painted:
            found["absent"].append(subject.name)
            continue
        seen = encoders.see([read_image(file) for _, file in painted])
        said = encoders.read([prompt for prompt, _ in painted])
        found["CLIP-T"] += cosines(seen["CLIP"], said["CLIP"])
        objects = [(shown[files[0].parent], chosen(files)) for files in subject.objects]
        for encoder, what in (("DINO", "DINO"), ("CLIP", "CLIP-I")):
            all_of = []
            one_of = []
            for references, one in objects:
                cosine = seen[encoder] @ references[encoder].T              # (N, M)
                all_of.append(cosine.mean(1))
                one_of.append(cosine[:, one])
            found[f"{what}, all"] += torch.stack(all_of).mean(0).tolist()
            found[f"{what}, one"] += torch.stack(one_of).mean(0).tolist()
    return found


def reference_scores(shown):
    """The same of the references: each beside the others of its object."""
    found = {what: [] for what in SUBJECT[:2]}
    for seen in shown.values():
        for encoder, what in zip(("DINO", "CLIP"), SUBJECT):
            cosine = seen[encoder] @ seen[encoder].T                        # (M, M)
            others = (cosine.sum(1) - 1) / max(1, len(cosine) - 1)
            found[what] += others.tolist() if len(cosine) > 1 else []
    return found


def judge_subjects(args, layout, path):
    """The Markdown text for all folders."""
    encoders = Encoders(args)
    subjects = LAYOUTS[layout](Path(path))
    shown = see_references(encoders, subjects)
    rows = []
    lines = []
    for folder in args.folders:
        found = subject_scores(folder, encoders, subjects, shown)
        if not found["CLIP-T"]:
            raise ValueError(f"{folder} holds no NAME/N_K.png of {path}")
        if layout == "concept101":
            found["CLIP-T"] = [2.5 * max(0, cosine) for cosine in found["CLIP-T"]]
        rows.append(row(folder, found, SUBJECT))
        absent = f"; none of {', '.join(found['absent'])}" if found["absent"] else ""
        lines.append(f"{folder}: {len(found['CLIP-T'])} pictures of {len(subjects)} subjects in "
                     f"{path}{absent}")
    if layout == "concept101":
        lines.append("CLIP-T is times 2.5, as Custom Diffusion has it")
    rows.append(row("the references, each beside the others", reference_scores(shown), SUBJECT))
    together = max(len(subject.objects) for subject in subjects)
    paper = SUBJECT_PAPER.get((layout, together), {})
    rows += [[f"the paper's {name}", *cells] for name, cells in paper.items()]
    return table(["", *SUBJECT], rows) + "\n" + "\n".join(lines)


# ---- the command line ----------------------------------------------------------------------------

def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="+", help="of edit.py's pictures, one for each method")
    p.add_argument("--users", nargs="+", help="who likes what: all among whom to look for ten "
                   "similar users (default: the shipped people)",
                   default=[shipped(file) for file in PEOPLE])
    p.add_argument("--pairs", default=shipped("mini/sample/pairs_test.jsonl"),
                   help="whose chosen instructions are what a user likes")
    p.add_argument("--scenes", default=shipped("mini/sample/scenes.jsonl"),
                   help='whose pictures a user likes; "" for none')
    p.add_argument("--similar", default="shared", choices=("shared", "signed", "likes"),
                   help="what makes users similar: what both speak of (Eq. 6's letter), less "
                   "clashes, or what both like (ours)")
    p.add_argument("--clip", default=shipped("mini/clip"), help="a whole CLIP: folder or hub name")
    p.add_argument("--dino", default=shipped("mini/vit"), help="DINO or DINOv2: the same")
    p.add_argument("--hps", default="", help="HPS, converted: a folder as CLIP's")
    for layout in LAYOUTS:
        p.add_argument(f"--{layout}", metavar="FOLDER", help="the benchmark's folder, or a file in "
                       "it that says which objects go together: as for bench/subjects.py")
    p.add_argument("--device", default="", help="cpu, cuda ... (the best there is)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    for layout in LAYOUTS:
        path = getattr(args, layout)
        if path:
            print(judge_subjects(args, layout, path))
            return
    print(report(args))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print("judge.py:", error, file=sys.stderr)
        sys.exit(2)
