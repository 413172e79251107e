"""Pictures for PatchDPO and Diffusion-DRO, and pictures to judge them by.

    python bench/subjects.py references prompts.txt --out data     # PatchDPO's data construction
    python bench/subjects.py captions FOLDER                       # pictures that you have
    python bench/subjects.py dreambench dreambooth/dataset --out out/mine --image-prompt ...
    python bench/subjects.py concept101 customconcept101/dataset_multiconcept.json --out out/two ...
    torchrun --nproc_per_node=8 bench/subjects.py references prompts.txt --out data --size 512 \\
        --flux black-forest-labs/FLUX.1-dev --dtype bf16 --guidance 3.5

references: a prompt a line, "An {object} in the {background}" (or JSON lines with "prompt"). FLUX
paints each with the wording for a simple background (paper: "also instructed to generate simple
backgrounds"; the words are ours, --wording), as OUT/references/N.png; then OUT/scenes.jsonl has a
line each, `train.py patch --scenes OUT/scenes.jsonl` paints the prompts with the model under
training and goes on from there. Processes share the pictures out, a picture depends on --seed and
its line alone, and what is there already is not painted again: the same command goes on.

captions: a folder of pictures with metadata.jsonl ("file_name" and "text" a line, as diffusers has
it) or a NAME.txt beside each picture (as kohya has it) gets a scenes.jsonl: experts for `train.py
dro --scenes FOLDER/scenes.jsonl`, or natural pictures for `train.py patch` (the paper's D_natural).

dreambench, concept101: each subject, an object or several together, in each of its prompts,
--samples times, as OUT/NAME/N_K.png (NAME: of the object, or A+B). Flux is shown one picture of
each object (--references 3: three of each), the attentions to all of them add up (S5-S7; of XLabs'
prompt it is one attention). Flags that are not listed are edit.py's (--preset paper ...).
`bench/judge.py OUT --dreambench FOLDER` (or --concept101) measures the pictures. FOLDER is

    dreambench    the `dataset` of github.com/google/dreambooth: OBJECT/*.jpg and
                  prompts_and_classes.txt, 25 prompts for each object alone. Several together, as
                  in MultiDreamBench: a text file in that folder instead, "cat dog2" a line. That
                  form is ours, and so are its prompts, DreamBench's with "cat and a dog" for the
                  class: the benchmark's list is not public, the few prompts that Subject-Diffusion
                  published read so.
    concept101    `customconcept101` of github.com/adobe-research/custom-diffusion, with the
                  pictures in its benchmark_dataset/: dataset.json has 101 concepts, 20 prompts
                  each. Or dataset_multiconcept.json there: 101 pairs, 12 prompts each. A class's
                  name stands where a prompt has a concept's place.
"""
import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as in edit.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from huggingface_hub.utils import tqdm
from PIL import Image

import edit
from controlnet import FLUX_PARTS, render
from flux import VAE, Flux, denoise, encode_prompt, image_ids, pack, sigmas, to_picture, unpack
from graph import read_jsonl
from qwen import (DTYPES, RANK, WORLD, generator_for, pick_device, read_json, reading, resolve,
                  shipped, write_whole)

SIMPLE = "{prompt}, the background is simple and plain"
LIVE = ("cat", "dog")                                     # classes with the live subjects' prompts
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def save_whole(picture, file):
    """A PIL picture, whole or not at all."""
    write_whole(file.parent, lambda folder: picture.save(folder / file.name), file.name)


def write_scenes(folder, rows):
    """FOLDER/scenes.jsonl of [(picture's name, what it shows)]: a scene each, with one edit that
    says what is to be painted of it."""
    lines = []
    for name, text in rows:
        words = {"edit_type": "background", "attribute": "", "instruction": text}
        lines.append(json.dumps({"image": name, "caption": "", "edits": [words]}) + "\n")
    write_whole(folder, lambda at: (at / "scenes.jsonl").write_text("".join(lines)), "scenes.jsonl")
    print(f"{folder}/scenes.jsonl: {len(lines):,} lines")


# ---- references from prompts ---------------------------------------------------------------------

def read_prompts(file):
    if Path(file).suffix == ".jsonl":
        return [row["prompt"] for row in read_jsonl(file, prompt=str)]
    with reading(file):
        lines = Path(file).read_text().splitlines()
    return [line.strip() for line in lines if line.strip()]


class Painter:
    """FLUX.1 alone, from text to pictures."""

    def __init__(self, args):
        self.args = args
        self.device = pick_device(args.device)
        self.dtype = DTYPES[args.dtype]
        self.path = resolve(args.flux, FLUX_PARTS)
        self.vae = VAE.load(self.path / "vae", self.device)
        self.side = args.size // self.vae.factor
        self.flux = Flux.load(self.path / "transformer", self.device, self.dtype)

    @torch.no_grad()
    def paint(self, numbers, prompts):
        """Yields (number, PIL picture); a picture's noise depends on --seed and its number."""
        encoded = encode_prompt(self.path, prompts, self.device, self.dtype)
        txt, pooled = [states.to(self.device) for states in encoded]
        ids = image_ids(self.side, self.side, self.device)
        channels = self.flux.x_embedder.in_features // 4
        for n, words, whole in zip(numbers, txt, pooled):
            generator = generator_for(self.args.seed, "reference", n)
            noise = torch.randn(1, channels, self.side, self.side, generator=generator)
            latent = denoise(
                self.flux,
                pack(noise).to(self.device),
                words[None],
                whole[None],
                img_ids=ids,
                levels=sigmas(self.args.steps, len(ids)),
                guidance=self.args.guidance
            )
            image = self.vae.decode(unpack(latent, self.side, self.side))
            yield n, Image.fromarray(to_picture(image[0]))


def references(args):
    prompts = read_prompts(args.prompts)
    folder = args.out / "references"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{n:06d}.png" for n in range(len(prompts))]
    mine = range(len(prompts))[RANK::WORLD]
    missing = [n for n in mine if not files[n].exists()]
    with tqdm(total=len(mine), initial=len(mine) - len(missing), disable=RANK > 0) as bar:
        painter = Painter(args) if missing else None
        for start in range(0, len(missing), args.chunk):
            numbers = missing[start:start + args.chunk]
            texts = [args.wording.format(prompt=prompts[n]) for n in numbers]
            for n, picture in painter.paint(numbers, texts):
                save_whole(picture, files[n])
                bar.update()
    if all(file.exists() for file in files):              # in whichever process is the last
        names = [f"references/{file.name}" for file in files]
        write_scenes(args.out, zip(names, prompts))


# ---- pictures that there are ---------------------------------------------------------------------

def captions(args):
    listed = args.folder / "metadata.jsonl"
    if listed.is_file():
        rows = read_jsonl(listed, file_name=str, text=str)
        write_scenes(args.folder, [(row["file_name"], row["text"]) for row in rows])
        return
    rows = []
    for picture in sorted(args.folder.iterdir()):
        text = picture.with_suffix(".txt")
        if picture.suffix.lower() in PICTURES and text.is_file():
            rows.append((picture.name, text.read_text().strip()))
    if not rows:
        raise ValueError(f"{args.folder} holds no metadata.jsonl and no picture with a .txt beside")
    write_scenes(args.folder, rows)


# ---- subjects in prompts: DreamBench and Concept101 ----------------------------------------------

@dataclass
class Subject:
    """What pictures are painted of: an object, or several together."""
    name: str
    objects: list                 # of each object its pictures, the references
    prompts: list


def pictures_in(folder):
    found = [file for file in folder.glob("*") if file.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{folder} holds no picture ({', '.join(PICTURES)})")
    return sorted(found)


def dreambench(path):
    """list[Subject] of DreamBench: the objects that have a folder, or those together that a file
    names."""
    folder = path.parent if path.is_file() else path
    file = folder / "prompts_and_classes.txt"
    with reading(file):
        head, objects, live = re.split("Object Prompts|Live Subject Prompts", file.read_text())
    classes = dict(re.findall(r"^(\w+),(.+)$", head, re.MULTILINE)[1:])
    together = [[name] for name in classes if (folder / name).is_dir()]
    if path.is_file():
        together = [line.split() for line in read_prompts(path)]
    if not together:
        raise ValueError(f"{folder} holds no folder of pictures for any subject of {file.name}")
    found = []
    for names in together:
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise ValueError(f"{path}: {file.name} has no {', '.join(unknown)}")
        kinds = [classes[name] for name in names]
        prompts = re.findall(r"'(.*)'\.format", live if set(kinds) <= set(LIVE) else objects)
        words = " and a ".join(kinds)
        prompts = [prompt.replace("{0} ", "").replace("{1}", words) for prompt in prompts]
        pictures = [pictures_in(folder / name) for name in names]
        found.append(Subject("+".join(names), pictures, prompts))
    return found


def concept101(path):
    """list[Subject] of CustomConcept101: of dataset.json, or of the file that is given, whose rows
    are concepts, or lists of concepts with the file of their prompts at the end."""
    file = path if path.is_file() else path / "dataset.json"
    found = []
    with reading(file):
        for row in json.loads(file.read_text()):
            if isinstance(row, dict):
                row = [row, {"prompt_filename_compose": row["prompt_filename"]}]
            *concepts, last = row
            folders = [file.parent / concept["instance_data_dir"] for concept in concepts]
            classes = [concept["class_prompt"] for concept in concepts]
            listed = file.parent / last["prompt_filename_compose"]
            with reading(listed):                         # "{}" is one concept's place, or
                prompts = [line.format(*classes) for line in read_prompts(listed)]      # {0}, {1}
            pictures = [pictures_in(folder) for folder in folders]
            found.append(Subject("+".join(folder.name for folder in folders), pictures, prompts))
    return found


LAYOUTS = {"dreambench": dreambench, "concept101": concept101}


def chosen(pictures):
    """Which of an object's pictures is the one reference of Kosmos-G's protocol: chosen.json beside
    the objects' folders, {object: file}, names it (the authors chose theirs by hand); else the
    first."""
    folder = pictures[0].parent
    file = folder.parent / "chosen.json"
    name = read_json(file, {}).get(folder.name, pictures[0].name)
    names = [picture.name for picture in pictures]
    if name not in names:
        raise ValueError(f"{file} names {name}, which is not in {folder}")
    return names.index(name)


def paint_subjects(args, more):
    subjects = LAYOUTS[args.kind](args.folder)
    todo = []
    for subject in subjects:
        for n, prompt in enumerate(subject.prompts):
            for k in range(args.samples):
                todo.append((subject.name, prompt, k, args.out / subject.name / f"{n:02d}_{k}.png"))
    todo = [one for one in todo[RANK::WORLD] if not one[3].exists()]
    for subject in subjects:
        mine = [one for one in todo if one[0] == subject.name]
        if not mine:
            continue
        shown = []
        for pictures in subject.objects:
            one = chosen(pictures)
            shown += [pictures[one], *pictures[:one], *pictures[one + 1:]][:args.references]
        shown = [str(picture) for picture in shown]
        settings = edit.parse(["--caption", subject.name, "--reference", *shown, *more])
        flux = resolve(settings.flux, FLUX_PARTS)
        _, _, shape = edit.read_pictures(settings, flux)
        painted = render(
            flux=flux,
            controlnet=None,
            prompts=[prompt for _, prompt, _, _ in mine],
            seeds=[settings.seed + k for _, _, k, _ in mine],
            shape=shape,
            steps=settings.steps,
            guidance=settings.guidance,
            device=settings.device,
            dtype=DTYPES[settings.dtype],
            equip=partial(edit.equip, settings)
        )
        for (*_, file), pixels in zip(mine, painted):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_whole(Image.fromarray(pixels), file)
        print(f"{subject.name}: {len(mine)} pictures in {args.out / subject.name}")


# ---- the command line ----------------------------------------------------------------------------

def parse(argv=None):
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="kind", required=True)
    p = kinds.add_parser("references", help="paint reference pictures after prompts")
    p.add_argument("prompts", type=Path, help="a prompt a line, or JSON lines with \"prompt\"")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--wording", default=SIMPLE, help="what FLUX reads (%(default)s)")
    p.add_argument("--flux", default=shipped("mini/flux"))
    p.add_argument("--size", type=int, default=192, help="side in pixels")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--chunk", type=int, default=500, help="prompts encoded at once")
    p.add_argument("--dtype", default="fp32", choices=DTYPES)
    p.add_argument("--device", default="")
    p = kinds.add_parser("captions", help="scenes.jsonl for pictures with captions")
    p.add_argument("folder", type=Path)
    for kind in LAYOUTS:
        p = kinds.add_parser(kind, help="paint a benchmark's subjects in its prompts")
        p.add_argument("folder", type=Path, help="or a file in it that says which go together")
        p.add_argument("--out", type=Path, required=True)
        p.add_argument("--samples", type=int, default=4, help="pictures of each prompt")
        p.add_argument("--references", type=int, default=1, help="pictures that show an object")
    args, more = top.parse_known_args(argv)
    if more and args.kind not in LAYOUTS:
        top.error(f"unrecognized arguments: {' '.join(more)}")
    return args, more


def main(argv=None):
    args, more = parse(argv)
    if args.kind == "references":
        references(args)
    elif args.kind == "captions":
        captions(args)
    else:
        paint_subjects(args, more)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print("subjects.py:", error, file=sys.stderr)
        sys.exit(2)
