"""One photograph, one person, one edit: who asks -> an instruction -> a picture.

    python edit.py                                      # a shipped picture for three shipped people
    python edit.py --user romantic-poet gothic-rocker   # the same picture for others in --users
    python edit.py --image mug.jpg --caption "A red mug on a table" --likes "wood, sunset"
    python edit.py --caption "A white vase" --user desert-host                  # a new picture
    python edit.py --reference mug.png --caption "A mug in front of forest"     # of that very mug
    python edit.py --words-only --samples 3             # instructions alone: needs no FLUX
    python edit.py --attributes                         # the words that --likes can best be made of
    python edit.py --lora runs/dro                      # with a Flux that `train.py dro` tuned
    python edit.py --preset paper --policy runs/cdpo --image sofa.jpg \\
                   --caption "A sofa by a window" --users users.jsonl --user ana

The C-DPO policy reads the caption and the person's soft tokens and writes an instruction; FLUX.1
draws "caption. instruction", held in place by ControlNet on the picture's edges; with --reference
an image prompt (PatchDPO) shows it what things look like. No file is destroyed: only what edit.py
wrote is written anew, and the pictures of a run all or none. Models are loaded in turn, each freed
before the next. Each person's edit depends on nobody else in the list: same seed, same picture.
All that made a picture stands beside it as JSON, and in the PNG. Pictures (H, W, 3) are uint8.
"""
import signal

if __name__ == "__main__":                                # Ctrl-C ends it without a traceback, also
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # while torch is loaded
import argparse
import contextlib
import difflib
import json
import os
import re
import resource
import sys
import textwrap
import time
import unicodedata
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

# Read when torch is loaded: threads that spin while they wait make a busy laptop 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

import cdpo
import lora
from controlnet import FLUX_PARTS, MODES, control_picture, render
from flux import VAE, TextTokenizer, joined, read_image, read_square, to_tensor
from graph import (User, attribute_names, find_attribute, in_words_of, load_graph, near, read_users,
                   tastes)
from patch_dpo import ImageFeatures, ImagePrompt
from qwen import (DETERMINISTIC, DTYPES, add_flags, flag, flag_name, pick_device, read_json,
                  reading, resolve, seed_for, set_precision, settings_from, shipped, write_whole)

# What is edited, and for whom, when nothing is said: an apple that no training saw, and three of
# the paper's people.
IMAGE = "mini/pictures/apple.png"
CAPTION = "A blue apple in front of a cream wall"
PERSONAS = ["imaginative-child", "glamour-stylist", "futuristic-techie"]
USERS = "mini/sample/users_test.jsonl"

# What stands in every PNG and JSON that is written here, and hardly in another.
MARK = b'"reference_scale": '

# An --instruction that makes its answer less than so many times likelier was not understood.
CLEAR = 3

# What Pillow's font lacks, and Unicode's decompositions leave as it is.
ALIKE = str.maketrans("øØłŁđĐıß–—‘’“”", "oOlLdDis--''\"\"")

# In dB, how well an autoencoder gives the colours of a picture back that it was made for: of 620 of
# the miniature's scenes all are above, of 28 pictures of scikit-image 18 below.
FAITHFUL = 39


# ---- the command line ----------------------------------------------------------------------------

def words(text):
    """ "wood, sunset" -> ["wood", "sunset"], each once."""
    found = dict.fromkeys(word.strip() for word in text.split(","))
    return [word for word in found if word]


@dataclass
class EditSettings:
    """Every flag: its value in the miniature, its value with `--preset paper`, and what it is.
    The paper is C-DPO's: it says nothing of strength (1: the edges alone hold the picture), Canny's
    thresholds and the seed. The weight of references is from PatchDPO's code."""
    # what                        mini, paper
    image: str             = flag(None, None, "photograph, any format Pillow reads; without it and "
                                              "--caption a shipped one, with --caption a new one")
    caption: str           = flag(None, None, "what the photograph shows, in a few words")
    reference: str         = flag(None, None, "pictures of what the new one holds; the policy is "
                                              "asked only with --user, --likes or --dislikes",
                                              nargs="+")
    instruction: str       = flag("",   "",   "extra guidance for the policy, in words; the "
                                              "instruction itself where no policy is asked")
    out: str               = flag("out/edit.png", "out/edit.png", "PNG to write, beside it a JSON; "
                                              "of several people a grid, and each one's picture")
    # who
    user: str              = flag(None, None, "one or several people, by name", nargs="+")
    users: str             = flag(None, None, "what they like; when not given, people with whom "
                                              "the policy was trained and checked are known")
    likes: list            = flag(None, None, "of somebody new, with commas between", type=words)
    dislikes: list         = flag(None, None, "and what they dislike", type=words)
    attributes: bool       = flag(False, False, "list what the policy's graph knows, and end")
    # models: each a folder or a hub repository
    preset: str            = flag("mini", "paper", "which column the flags not given take",
                                              choices=("mini", "small", "paper"))
    policy: str            = flag("mini/policy", "runs/cdpo", "folder that `train.py cdpo` wrote")
    qwen: str              = flag(None, None, "language model; the policy's own when not given")
    flux: str              = flag("mini/flux", "black-forest-labs/FLUX.1-dev", "FLUX.1")
    controlnet: str        = flag("mini/controlnet", "InstantX/FLUX.1-dev-Controlnet-Union",
                                              "ControlNet-Union")
    image_prompt: str      = flag("mini/image_prompt/image_prompt.safetensors",
                                  "runs/patch/image_prompt.safetensors",
                                              "for --reference: what `train.py patch` wrote, or "
                                              "XLabs' FLUX IP-Adapter (XLabs-AI/flux-ip-adapter)")
    features: str          = flag("mini/vit", "openai/clip-vit-large-patch14",
                                              "and the image encoder that it was trained with")
    device: str            = flag("",   "",   "cpu, cuda, cuda:1 ...; the best when not given")
    dtype: str             = flag("fp32", "bf16", "of weights; the autoencoder's is always fp32",
                                              choices=DTYPES)
    lora: str              = flag(None, None, "LoRA for Flux: folder or file that `train.py dro` "
                                              "wrote, or one in diffusers' or PEFT's format")
    lora_scale: float      = flag(1.0,  1.0,  "its weight", bounds=(-100, 100))
    deterministic: bool    = flag(False, False, DETERMINISTIC)
    offload: bool          = flag(False, False, "for cards of 24 GB: modulation layers and the "
                                              "ControlNet's blocks stay in main memory")
    # words and picture
    temperature: float     = flag(None, None, "of sampling the instruction, 0: likeliest words; as "
                                              "the language model asks when not given")
    max_new_tokens: int    = flag(48,   48,   "after which an instruction is cut off")
    words_only: bool       = flag(False, False, "the instructions alone: nothing is painted, no "
                                              "FLUX needed")
    samples: int           = flag(1,    1,    "instructions for each person, with --words-only: as "
                                              "of --seed SEED, SEED + 1 ...")
    size: int              = flag(None, None, "about size x size pixels, the photograph's shape "
                                              "kept; the autoencoder's own when not given",
                                              bounds=(16, 8192))
    steps: int             = flag(20,   60,   "Euler steps", bounds=(1, 10_000))
    guidance: float        = flag(3.5,  35.0, "FLUX.1's guidance embedding")
    strength: float        = flag(0.95, 1.0,  "1: from noise; less: from the noised photograph",
                                              bounds=(0, 1))
    reference_scale: float = flag(1.5,  0.78, "of references beside the text; ours add up",
                                              bounds=(0, 10))
    control_mode: str      = flag("canny", "canny", "what the ControlNet looks at", choices=MODES)
    control_image: str     = flag(None, None, "a control picture that is ready, say a depth map; "
                                              "also for a new picture")
    control_scale: float   = flag(1.0,  0.4,  "the ControlNet's weight; at 0 it is not even loaded",
                                              bounds=(-100, 100))
    control_start: float   = flag(0.0,  0.0,  "share of the steps before which it rests")
    control_end: float     = flag(1.0,  1.0,  "share of the steps after which it rests")
    low: float             = flag(100,  100,  "Canny's lower threshold")
    high: float            = flag(200,  200,  "Canny's upper threshold")
    true_cfg: float        = flag(1.0,  1.0,  "classifier-free guidance off --negative: twice the "
                                              "time, for models without guidance embedding")
    negative: str          = flag("",   "",   "what --true-cfg leads away from")
    seed: int              = flag(0,    0,    "of the noise, and of words that are sampled")


def parse(argv=None, preset="mini"):
    """EditSettings, with the preset's column for the flags that are not given. ValueError for
    values that make no sense, or none together."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, EditSettings, preset)
    args = parser.parse_args(argv)
    if args.preset != preset:                             # once more, with the other column
        return parse(argv, args.preset)
    given = {flag_name(name): value for name, value in vars(args).items()
             if value != parser.get_default(name)}
    settings = settings_from(args, EditSettings)
    settings.device = pick_device(settings.device)
    check_texts(given)
    fill_in(settings)
    check_together(settings, given)
    return settings


def check_texts(given):
    """ValueError for a flag that is given, but as no text: empty, or in another encoding."""
    for name, value in given.items():
        text = json.dumps(value, ensure_ascii=False).strip('" ')
        if not text or text != text.encode(errors="replace").decode():
            raise ValueError(f"{name} is {value!r}; it must be text, in UTF-8, or be left out")


def fill_in(settings):
    """What is edited, and for whom, where nothing is said. `user` stays None where no policy is
    asked: for references without a person."""
    if not settings.caption:
        settings.image = shipped(IMAGE)
        settings.caption = CAPTION
    if described(settings):
        settings.user = ["you"]
    elif not settings.reference:
        settings.user = settings.user or PERSONAS


def check_together(settings, given):
    """ValueError for flags that contradict one another, and for one that would change nothing,
    naming what gives it effect."""
    new = described(settings)
    if new and "--user" in given:
        raise ValueError("--user or --likes and --dislikes: give one or the other")
    if not settings.control_start <= settings.control_end <= 1:
        raise ValueError("--control-start and --control-end must lie in 0 .. 1, in this order")
    if Path(settings.out).suffix != ".png":
        raise ValueError(f"--out is {settings.out}; it must end in .png")

    def need(there, what, flags):
        idle = given.keys() & flags.split()
        if idle and not there:
            raise ValueError(f"{min(idle)} has no effect without {what}")

    shaped = settings.image or settings.control_image
    edges = settings.image and not settings.control_image and settings.control_mode == "canny"
    need("--caption" in given, "--caption, a few words on what it shows", "--image --reference")
    need(settings.image, "--image", "--strength")
    need(shaped, "--image or --control-image",
         "--control-mode --control-scale --control-start --control-end")
    need(edges, "edges that Canny draws (of --image, without --control-image)", "--low --high")
    need(settings.true_cfg != 1, "--true-cfg", "--negative")
    need(settings.reference, "--reference", "--reference-scale --image-prompt --features")
    need(settings.lora, "--lora", "--lora-scale")
    need(settings.words_only, "--words-only", "--samples")
    need(settings.user, "--user, --likes or --dislikes", "--temperature")
    need(settings.user and not new, "--user", "--users")


def described(settings):
    """Whether --likes or --dislikes describe somebody new."""
    return (settings.likes, settings.dislikes) != (None, None)


# ---- who asks ------------------------------------------------------------------------------------

def follow(settings, policy):
    """Language model and people are those of the policy's own training where no flag says
    otherwise; a line where a flag names another model. -> what its prompts said of a user."""
    trained = read_json(policy / "config.json", {})
    own = shipped(trained.get("qwen", "mini/qwen"))
    settings.qwen = settings.qwen or own
    if os.path.realpath(settings.qwen) != os.path.realpath(own):
        print(f"{settings.policy} was trained with {own}, not with {settings.qwen}")
    people = shipped(trained.get("users_test", USERS))
    if not settings.users and Path(people).exists():
        settings.users = people
    return trained.get("profile", "none")


def find_users(settings, graph):
    """The people asked for, list[User], in the graph's own words: from --likes and --dislikes, from
    the file --users, or as the policy was trained with them. ValueError for nobody's name."""
    if described(settings):
        people = [User("you", settings.likes or [], settings.dislikes or [])]
    else:
        people = graph.people() + (read_users(settings.users) if settings.users else [])
    known = {user.name: user for user in people}
    for name in settings.user:
        if name not in known:
            names = ", ".join(difflib.get_close_matches(name, known, 3, 0))
            raise ValueError(f"nobody in {settings.users} or the policy's graph is called "
                             f"{name[:60]!r}; nearest: {names}")
    return [in_words_of(known[name], graph.attributes) for name in settings.user]


def soft_tokens(user, tokens):
    """(soft tokens (1, S, D), note), the tokens None of a user who likes and dislikes nothing. The
    note says which words only this user has, and offers known ones that are spelt like them."""
    known = tokens.graph.attributes
    notes = []
    for word in attribute_names([user]):
        if word not in known:
            alike = ", ".join(near(word, known)) or "none"
            notes.append(f"nobody else has a word on {word}, which takes part by its text; "
                         f"known words spelt like it: {alike}")
    if user.likes or user.dislikes:
        return tokens.soft(embedding(user, tokens)), "; ".join(notes)
    return None, "no likes or dislikes, so no similar users: this is the generic edit"


def embedding(user, tokens):
    """h (1, D) of a user as trained, or of somebody new, or who says something else today, from
    likes and dislikes alone."""
    for i, trained in enumerate(tokens.graph.people()):
        if trained.name == user.name and tastes(trained) == tastes(user):
            return tokens.embeddings()[i][None]
    return tokens.new([user])


# ---- the instruction -----------------------------------------------------------------------------

def write_instructions(settings):
    """[(user, note, the policy's instruction, its `reasons`)] for the people asked for, in their
    order. One person at a time, with a seed of their own, so that no answer depends on who else
    asks. Who likes and dislikes nothing gets the SFT adapter's edit: see cdpo.generic."""
    if not settings.user:
        return [(User("nobody", [], []), "no policy is asked", settings.instruction, {})]
    wishes = {}
    with measure(settings.device, "policy"):
        folder = resolve(settings.policy)
        kind = follow(settings, folder)
        tokens = cdpo.UserTokens.load(folder / "collaborative.safetensors")
        people = [(user, *soft_tokens(user, tokens)) for user in find_users(settings, tokens.graph)]
        at = tokens.soft.at
        everybody = tokens.graph.people()
        adapters = [cdpo.generic(folder) if soft is None else folder for _, soft, _ in people]
        for adapter in dict.fromkeys(adapters):           # each is loaded once,
            model = None                                  # and never two at a time
            model, tokenizer = cdpo.language_model(settings)
            lora.load_adapter(model, adapter)
            lora.merge(model)                             # half the kernels a word
            if settings.temperature is None:
                settings.temperature = model.config.sampling["temperature"]
            how = {**model.config.sampling, "temperature": round(settings.temperature, 6)}
            theirs = [i for i, own in enumerate(adapters) if own == adapter]
            for i, more in product(theirs, range(settings.samples)):
                user, soft, note = people[i]
                seed = seed_for(settings.seed + more, user.name, settings.caption)
                generator = torch.Generator(settings.device).manual_seed(seed)
                (profile,) = cdpo.profiles(kind, [user], others_than(user, everybody))
                asked = cdpo.prompt(settings.caption, settings.instruction, profile)
                [(text, _)] = cdpo.suggest(model, tokenizer, [asked], soft, settings.max_new_tokens,
                                           at=at, generator=generator, **how)
                if settings.instruction:
                    note += heeded(settings, model, tokenizer, soft, text, at=at, profile=profile)
                why = {} if soft is None else reasons(user, text, tokens.graph)
                wishes[i, more] = (user, note.strip("; "), text, why)
    return [wishes[number] for number in sorted(wishes)]


def heeded(settings, model, tokenizer, soft, text, at=0, profile=""):
    """A note where --instruction hardly makes the policy's answer likelier, else an empty one."""
    def logprob(guidance):
        asked = cdpo.prompt(settings.caption, guidance, profile)
        return cdpo.answer_logprobs(model, [cdpo.encode(tokenizer, asked, text)], soft, at)

    times = (logprob(settings.instruction) - logprob("")).exp().item()
    if times > CLEAR:
        return ""
    return ("; --instruction was hardly understood: with it this answer is only "
            f"{times:.1f} times as likely as without")


def others_than(user, people):
    return [other for other in people if other.name != user.name]


def reasons(user, instruction, graph):
    """Why the policy asks for this: {attribute that the instruction names: reason}."""
    def agreement(other):
        return sum(len(a & b) for a, b in zip(tastes(user), tastes(other)))

    alike = sorted(others_than(user, graph.people()), key=agreement)[-5:]
    known = graph.attributes + user.likes + user.dislikes
    found = {}
    for word in cdpo.find_names(known).findall(instruction):
        name = find_attribute(word, known)
        count = sum(name in other.likes for other in alike)
        found[name] = (f"not said; liked by {count} of the {len(alike)} people with the most "
                       "similar taste")
        if name in user.likes + user.dislikes:
            found[name] = "liked" if name in user.likes else "disliked"
    return found


def plan_edits(settings):
    """One dict for each person: who they are, what is drawn for them, why, and every setting."""
    edits = []
    for user, note, instruction, why in write_instructions(settings):
        notes = [f"{name}: {reason}" for name, reason in why.items()]
        notes = "; ".join(filter(None, [*notes, note]))
        print(f"{user.name}: {instruction}" + (f"   ({notes})" if notes else ""))
        edits.append({"user": user.name, "likes": user.likes, "dislikes": user.dislikes,
                      "note": note, "instruction": instruction, "reasons": why,
                      "prompt": joined(settings.caption, instruction),
                      "settings": vars(settings)})
    return edits


# ---- pictures in ---------------------------------------------------------------------------------

def read_pictures(settings, flux):
    """(source, control, (H, W)), pictures (H, W, 3) or None. Fills in what the settings leave open:
    the size, and the strength where there is no photograph."""
    file = flux / "vae" / "config.json"
    with reading(file):
        vae = read_json(file)
        settings.size = settings.size or int(vae["sample_size"])
        multiple = 2 ** len(vae["block_out_channels"])    # FLUX.1: 16
    if not settings.image:                                # a new picture, from noise alone
        settings.strength = 1.0
    shaping = settings.image or settings.control_image    # the file whose shape is kept
    if not shaping:
        side = max(multiple, settings.size // multiple * multiple)
        return None, None, (side, side)
    picture = crop_to(read_image(shaping), settings.size, multiple)
    shape = picture.shape[:2]
    source = picture if settings.image else None
    if settings.control_image:
        control = np.array(ImageOps.fit(read_image(settings.control_image), shape[::-1]))
    else:
        control = control_picture(source, settings.control_mode, settings.low, settings.high)
    return source, control, shape


def crop_to(image, size, multiple):
    """PIL -> (H, W, 3), about size x size pixels in area, sides multiples of `multiple`: resized,
    its shape kept up to 4 : 1, and cut to the middle."""
    ratio = np.clip(image.width / image.height, 0.25, 4) ** 0.5
    width = max(1, round(size * ratio / multiple)) * multiple
    height = max(1, round(size / ratio / multiple)) * multiple
    return np.array(ImageOps.fit(image, (width, height), Image.LANCZOS))


def equip(settings, flux, ids):
    """What `render` calls before the first step with its Flux and the pixels' positions: --lora is
    added to the weights, and Flux attends to the --reference pictures."""
    if settings.lora:
        lora.load_adapter(flux, settings.lora)
        lora.merge(flux, strength=settings.lora_scale)
    if settings.reference:
        features = ImageFeatures.load(settings.features, settings.device)
        pictures = [to_tensor(read_square(file, features.side)) for file in settings.reference]
        images = torch.stack(pictures).to(settings.device)      # (M, 3, side, side)
        prompt = ImagePrompt.load(settings.image_prompt, flux, settings.reference_scale)
        references = prompt.encode(features, images)[None]      # (1, M, S, D) or XLabs' (1, M, P)
        prompt.to(settings.device).attend_to(flux, references, ids)


# ---- the drawing ---------------------------------------------------------------------------------

def draw(settings, flux, edits, source, control, shape):
    """One picture (H, W, 3) for each of the edits."""
    N = len(edits)
    controlnet = None
    if control is not None and settings.control_scale:
        controlnet = resolve(settings.controlnet)
    return render(
        flux=flux,
        controlnet=controlnet,
        prompts=[(settings.caption, edit["instruction"]) for edit in edits],
        seeds=[settings.seed] * N,
        shape=shape,
        sources=None if source is None else [source] * N,
        controls=None if control is None else [control] * N,
        mode=settings.control_mode,
        scale=settings.control_scale,
        start=settings.control_start,
        end=settings.control_end,
        steps=settings.steps,
        guidance=settings.guidance,
        strength=settings.strength,
        cfg=settings.true_cfg,
        negative=settings.negative,
        device=settings.device,
        dtype=DTYPES[settings.dtype],
        offload=settings.offload,
        equip=partial(equip, settings),
        measure=partial(measure, settings.device),
        progress=partial(tqdm, disable=None, leave=False))


# ---- what these models cannot do -----------------------------------------------------------------

def doubts(settings, flux, edits, source, control):
    """Lines, with what was measured, on what this checkpoint, whichever it is, was not made for."""
    usual = VAE.read_config(f"{flux}/vae").get("sample_size") or settings.size
    if not usual * 0.75 < settings.size < usual * 1.25:
        yield f"--size is {settings.size}; the autoencoder was made for {usual}"
    unknown = unknown_words(flux, " ".join(edit["prompt"] for edit in edits))
    if unknown:
        yield f"the text encoders have less than two letters a token for {', '.join(unknown):.200}"
    if source is not None:
        if not control.any():
            yield "the picture has no edges, which a ControlNet would follow"
        faithful = fidelity(VAE.load(f"{flux}/vae", settings.device), source, settings.device)
        if faithful < FAITHFUL:
            yield (f"the autoencoder gives the picture's colours back at {faithful:.0f} dB, those "
                   f"of what it was made for at more than {FAITHFUL}")


def unknown_words(flux, text):
    """Words of three letters or more of which CLIP's and T5's tokens hold less than two letters on
    average."""
    words = dict.fromkeys(re.findall(r"\w{3,}", text), 0)
    for part in ("", "_2"):
        backend = TextTokenizer(f"{flux}/tokenizer{part}").backend
        backend.no_padding()
        for word in words:
            words[word] += len(backend.encode(word, add_special_tokens=False))
    return [word for word, tokens in words.items() if tokens > len(word)]


def fidelity(vae, source, device):
    """How well the autoencoder gives a picture's colours back, in dB: PSNR of the picture where
    each square that one latent pixel stands for is one pixel. (PSNR of single pixels doubts every
    fine texture.)"""
    image = to_tensor(source)[None].to(device)                              # (1, 3, H, W)
    back = vae.decode(vae.encode(image))
    error = F.avg_pool2d(back - image, vae.factor) / 2
    return -10 * error.square().mean().log10().item()


@contextlib.contextmanager
def measure(device, name):
    """Prints how long a part took and the most memory it held (on the CPU: the process, so far),
    and frees what it left."""
    start = time.perf_counter()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        peak = torch.cuda.max_memory_allocated(device)
    print(f"  {name:<20}{time.perf_counter() - start:7.1f} s   peak {peak / 1e9:6.2f} GB")


# ---- pictures out --------------------------------------------------------------------------------

def files_of(out, names):
    """Each person's PNG: `out` of one alone, else beside it, with the name as far as a file may be
    called so; no two share one, not even where case does not count."""
    files = {}
    for name in names:
        stem = f"{out.stem}_" + re.sub(r"[^\w.-]+", "_", name)[:50]
        while stem.lower() in files:
            stem += "_2"
        files[stem.lower()] = out.with_stem(stem)
    return list(files.values()) if len(names) > 1 else [out]


def check_files(settings):
    """ValueError or OSError, before anybody waits, where a picture is absent, and where --out
    cannot be written or would destroy a file."""
    out = Path(settings.out)
    inputs = [settings.image, settings.control_image, *(settings.reference or [])]
    inputs = [os.path.realpath(file, strict=True) for file in inputs if file]
    for picture in {out, *files_of(out, settings.user or [])}:
        for file in (picture, picture.with_suffix(".json")):
            mine = file.is_file() and MARK in file.read_bytes()
            if file.exists() and (not mine or os.path.realpath(file) in inputs):
                raise ValueError(f"--out would overwrite {file}, which is read here, or was not "
                                 "written by edit.py")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    write_whole(there, lambda folder: None, "--out")


def write(out, source, edits, pictures):
    """Each person's picture, and of several people a grid of them at `out`, the source first; all
    of it or nothing: ValueError when the disk is full."""
    files = files_of(out, [edit["user"] for edit in edits])
    made = {}
    cells = []
    if source is not None:
        caption = edits[0]["settings"]["caption"]
        cells.append((Image.fromarray(source), "source", caption, "*bold: the like that is met"))
    for file, edit, pixels in zip(files, edits, pictures):
        picture = Image.fromarray(pixels)
        made[file] = picture, edit
        cells.append((picture, f"for {edit['user']}", edit["instruction"], *explanation(edit)))
    if len(edits) > 1:
        made = {out: (grid(cells), {"edits": edits}), **made}
    write_whole(out.parent, partial(save, made), "the pictures")
    print("wrote", ", ".join(map(str, made)))


def save(made, folder):
    """{file: (PIL picture, record)} into `folder`, as PNG, with the record twice: in the PNG's text
    and in a JSON beside it."""
    for file, (picture, record) in made.items():
        text = json.dumps(record, indent=1)
        info = PngImagePlugin.PngInfo()
        info.add_text("edit", text)
        file = folder / file.name
        picture.save(file, pnginfo=info)
        file.with_suffix(".json").write_text(text + "\n")


def explanation(edit):
    """(the likes, what else the instruction names), with a * before each word of what it names."""
    reasons = edit["reasons"]

    def marked(name):
        return f"*{name}".replace(" ", " *") if name in reasons else name

    likes = edit["likes"] or ["nothing in particular"]
    others = [f"{marked(name)}: {reasons[name]}" for name in reasons if name not in likes]
    return "likes " + ", ".join(map(marked, likes)), "; ".join(others)


def grid(cells, columns=4):
    """[(PIL picture, heading, text, small print ...)] -> one PIL picture; small ones are enlarged.
    Words of the small print that begin with * are bold."""
    width, height = cells[0][0].size
    scale = max(1, round(224 / width))
    width *= scale
    height *= scale
    texts = [wrapped(texts, width) for _, *texts in cells]
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    down = height + 20 * max(map(len, texts)) + 24        # from a row to the next
    across = width + 16
    sheet = Image.new("RGB", (columns * across + 16, rows * down + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, *_) in enumerate(cells):
        left = 16 + i % columns * across
        y = 16 + i // columns * down
        sheet.paste(picture.resize((width, height)), (left, y))
        y += height + 8
        for line, font, colour in texts[i]:
            x = left
            for word in line.replace(",", " ,").split():
                bold = word.startswith("*")
                word = word.removeprefix("*")
                x -= font.getlength(" ") * (word == ",")
                pen.text((x, y), word, "black" if bold else colour, font, stroke_width=0.3 * bold)
                x += font.getlength(word + " ")
            y += 20
    return sheet


def wrapped(texts, width):
    """A cell's heading, text and small print -> [(line, font, colour)], `width` pixels wide."""
    lines = []
    for text, size in zip(texts, (16, 14, 12, 12)):
        font = ImageFont.load_default(size)
        for line in textwrap.wrap(drawable(text), int(2 * width / size)):
            lines.append((line, font, "black" if size > 12 else "dimgray"))
    return lines


def drawable(text):
    """The text in the letters of Pillow's font, which are ASCII's: without accents, and with its
    name in brackets for another script, as [CYRILLIC]."""
    def script(letters):
        return f"[{unicodedata.name(letters[0][0], '?').split()[0]}]"

    text = unicodedata.normalize("NFKD", text).translate(ALIKE)
    text = re.sub("[\u0300-\u036f]", "", text)
    return re.sub(r"[^\s!-~]+", script, text)


@torch.no_grad()
def main(argv=None):
    """From flags to files: the policy writes an instruction (plan_edits), `draw` hands "caption.
    instruction" to controlnet.render (text encoders -> autoencoder -> Flux + ControlNet ->
    autoencoder), `write` saves. Pictures are read before models: a mistake costs no waiting."""
    settings = parse(argv)
    set_precision(settings.deterministic)
    if settings.attributes:
        graph, *_ = load_graph(resolve(settings.policy) / "collaborative.safetensors")
        print(*graph.attributes, sep="\n")
        return
    if settings.words_only:
        plan_edits(settings)
        return
    check_files(settings)
    flux = resolve(settings.flux, FLUX_PARTS)
    inputs = read_pictures(settings, flux)                # source, control, (H, W)
    print(f"{settings.image or 'a new picture'}: {settings.caption}")
    edits = plan_edits(settings)
    for line in doubts(settings, flux, edits, *inputs[:2]):
        print(f"  {line}: expect a toy's picture (real models: python edit.py --preset paper)")
    pictures = draw(settings, flux, edits, *inputs)
    write(Path(settings.out), inputs[0], edits, pictures)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "the GPU's memory is full: try --offload, a smaller --size or --dtype bf16"
        print("edit.py:", error, file=sys.stderr)
        sys.exit(2)
