"""Pictures for PatchDPO and Diffusion-DRO, and pictures to judge them by.

    python bench/subjects.py references prompts.txt --out data     # PatchDPO's data construction
    python bench/subjects.py captions FOLDER                       # pictures that you have
    python bench/subjects.py dreambench dreambooth/dataset --out out/mine --image-prompt ...
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

dreambench: FOLDER is the `dataset` of github.com/google/dreambooth: OBJECT/*.jpg and
prompts_and_classes.txt. Each object, known by its first picture (--references 9: by nine, S5-S7),
in each of its 25 prompts, --samples times, as OUT/OBJECT/N_K.png. Flags that are not listed are
edit.py's (--preset paper, --image-prompt, --reference-scale ...). `bench/judge.py OUT --dreambench
FOLDER` measures them.
"""
import argparse
import json
import os
import re
import sys
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


# ---- DreamBench ----------------------------------------------------------------------------------

def subjects_of(folder):
    """DreamBench's layout -> {object: (its pictures, its prompts without the token's place)}."""
    file = Path(folder) / "prompts_and_classes.txt"
    with reading(file):
        text = file.read_text()
        head, objects, live = re.split("Object Prompts|Live Subject Prompts", text)
    classes = re.findall(r"^(\w+),(.+)$", head, re.MULTILINE)[1:]
    found = {}
    for name, kind in classes:
        prompts = re.findall(r"'(.*)'\.format", live if kind in LIVE else objects)
        prompts = [prompt.replace("{0} ", "").replace("{1}", kind) for prompt in prompts]
        pictures = sorted(picture for picture in (Path(folder) / name).glob("*")
                          if picture.suffix.lower() in PICTURES)
        if pictures:
            found[name] = (pictures, prompts)
    if not found:
        raise ValueError(f"{folder} holds no folder of pictures for any subject of {file.name}")
    return found


def chosen(folder, name, pictures):
    """The one reference of Kosmos-G's protocol: FOLDER/chosen.json, {object: file}, names it (the
    authors chose theirs by hand); else the first."""
    names = read_json(Path(folder) / "chosen.json", {})
    return Path(folder) / name / names.get(name, pictures[0].name)


def paint_subjects(args, more):
    todo = []
    subjects = subjects_of(args.folder)
    for name, (_, prompts) in subjects.items():
        for n, prompt in enumerate(prompts):
            for k in range(args.samples):
                todo.append((name, prompt, k, args.out / name / f"{n:02d}_{k}.png"))
    todo = [one for one in todo[RANK::WORLD] if not one[3].exists()]
    for name in dict.fromkeys(one[0] for one in todo):
        pictures, _ = subjects[name]
        first = chosen(args.folder, name, pictures)
        others = [picture for picture in pictures if picture != first]
        shown = [str(picture) for picture in [first, *others][:args.references]]
        settings = edit.parse(["--caption", name, "--reference", *shown, *more])
        flux = resolve(settings.flux, FLUX_PARTS)
        _, _, shape = edit.read_pictures(settings, flux)
        mine = [one for one in todo if one[0] == name]
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
        print(f"{name}: {len(mine)} pictures in {args.out / name}")


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
    p = kinds.add_parser("dreambench", help="paint DreamBench's subjects in its prompts")
    p.add_argument("folder", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--samples", type=int, default=4, help="pictures of each prompt")
    p.add_argument("--references", type=int, default=1, help="pictures that show the subject")
    args, more = top.parse_known_args(argv)
    if more and args.kind != "dreambench":
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
