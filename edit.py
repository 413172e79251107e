"""One photograph, one person, one edit: who asks -> an instruction -> a picture.

    python edit.py                                             # a shipped picture for three shipped people, in a grid: out/edit.png
    python edit.py --user romantic-poet gothic-rocker          # the same picture for others in --users
    python edit.py --image mug.jpg --caption "A red mug on a table" --likes "wood, sunset" --dislikes "pink"
    python edit.py --caption "A white vase" --user desert-host # no picture: a new one is drawn, to that person's taste
    python edit.py --reference mug.png --caption "A mug in front of forest"   # a new picture of that very mug
    python edit.py --preset paper --policy runs/cdpo --image sofa.jpg --caption "A sofa by a window" --users users.jsonl --user ana

The C-DPO policy reads the caption and the person's soft tokens and writes an instruction; FLUX.1 draws "caption. instruction", held in place by
ControlNet on the picture's edges; with --reference an image prompt (PatchDPO) shows it what things look like. Models are loaded in turn, each
freed before the next. Each person's edit depends on nobody else in the list: same seed, same picture. All that made it stands beside it as JSON, and in the PNG.
"""
import argparse, contextlib, difflib, json, os, re, resource, sys, textwrap, time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # read when torch is loaded; threads that spin while they wait make a busy laptop 50 times slower
import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
import cdpo
import lora
from controlnet import FLUX_PARTS, MODES, control_picture, render
from flux import to_tensor
from graph import User, read_jsonl, read_users
from patch_dpo import ImageFeatures, ImagePrompt, read_image
from qwen import Qwen, Tokenizer, pick_device, read_json, reading, resolve

PRESETS = {     # flag values, nothing more; "paper" is the C-DPO paper's, which says nothing of strength (1: edges alone hold the picture), thresholds and seed
    "mini": {},                                               # the defaults below
    "paper": dict(qwen="Qwen/Qwen2.5-7B-Instruct", policy="runs/cdpo", flux="black-forest-labs/FLUX.1-dev", features="facebook/dinov2-base",
                  controlnet="InstantX/FLUX.1-dev-Controlnet-Union", image_prompt="runs/patch/image_prompt.safetensors", reference_scale=0.78,
                  dtype="bf16", steps=60, guidance=35.0, strength=1.0, control_scale=0.4),
}
SAMPLE, SCENE, PERSONAS = "mini/sample", 4, ["imaginative-child", "glamour-stylist", "futuristic-techie"]         # the paper's three named profiles
FLAGS = {       # group -> (flag, type or choices, default, help)
    "what": [
        ("image", str, None, "photograph to edit, any format Pillow reads; without it and --caption a shipped sample, with --caption alone a new picture"),
        ("caption", str, None, "what the photograph shows, in a few words"),
        ("reference", "files", None, "one or several pictures of what the new one shall hold; without --user, --likes and --dislikes no policy is asked"),
        ("instruction", str, "", "extra guidance for the policy, in words; where no policy is asked, the instruction itself"),
        ("out", str, "out/edit.png", "PNG to write; a JSON of the same name beside it; with several people a grid, and a picture of each beside it"),
    ],
    "who": [
        ("user", "names", None, "one or several people, by name"),
        ("users", str, "mini/sample/users_test.jsonl", "file that says what they like and dislike; people the policy was trained with need none"),
        ("likes", "list", None, "somebody new, instead of --user: liked attributes, with commas between"),
        ("dislikes", "list", None, "and disliked ones"),
    ],
    "models": [
        ("preset", tuple(PRESETS), "mini", "values of the flags that are not given: the miniature's (shown here), or the paper's real models"),
        ("qwen", str, "mini/qwen", "language model: folder or hub repository"),
        ("policy", str, "mini/policy", "folder that `train.py cdpo` wrote"),
        ("flux", str, "mini/flux", "FLUX.1: folder or hub repository"),
        ("controlnet", str, "mini/controlnet", "ControlNet-Union: folder or hub repository"),
        ("image-prompt", str, "mini/image_prompt/image_prompt.safetensors", "for --reference: file that `train.py patch` wrote"),
        ("features", str, "mini/vit", "and the DINOv2 or ViT that it was trained with: folder or hub repository"),
        ("device", str, "", "cpu, cuda, cuda:1 ...; the best there is when not given"),
        ("dtype", ("fp32", "bf16"), "fp32", "of the models' weights; the autoencoder is always fp32"),
        ("offload", bool, False, "for cards of 24 GB: modulation layers and the ControlNet's blocks stay in main memory"),
    ],
    "words and picture": [
        ("temperature", float, 0.0, "of sampling the instruction; 0 takes the likeliest words"),
        ("size", int, None, "the picture is brought to about size x size pixels, its shape kept (sides: multiples of 16); the autoencoder's own when not given"),
        ("steps", int, 20, "Euler steps"),
        ("guidance", float, 3.5, "FLUX.1's guidance embedding"),
        ("strength", float, 0.8, "1 draws from noise, held by the edges alone; less starts from the noised photograph"),
        ("reference-scale", float, 1.5, "weight of each reference beside the text; several add up: give less"),
        ("control-mode", tuple(MODES), "canny", "what the ControlNet looks at"),
        ("control-image", str, None, "for --image or the sample: a control picture that is ready, say a depth map"),
        ("control-scale", float, 1.0, "the ControlNet's weight; at 0 it is not even loaded"),
        ("control-start", float, 0.0, "fraction of the steps before which it rests"),
        ("control-end", float, 1.0, "fraction of the steps after which it rests"),
        ("low", float, 100, "Canny's lower threshold"),
        ("high", float, 200, "Canny's upper threshold"),
        ("true-cfg", float, 1.0, "classifier-free guidance against --negative, twice the time: for models without a guidance embedding"),
        ("negative", str, "", "what --true-cfg leads away from"),
        ("seed", int, 0, "of the noise, and of the words if they are sampled"),
    ],
}
KINDS = {bool: dict(action="store_true"), "names": dict(nargs="+", metavar="NAME"), "files": dict(nargs="+", metavar="FILE"),
         "list": dict(type=lambda text: list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip())), metavar="A,B")}

def parse(argv=None):
    """The flags as a namespace; ValueError for values that make no sense, or none together."""
    p = argparse.ArgumentParser(prog="edit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for flag, kind, default, text in flags:
            how = dict(choices=kind) if isinstance(kind, tuple) else KINDS.get(kind, dict(type=kind))
            shown = "" if default in (None, "") or default is False else " (default: %(default)s)"
            group.add_argument(f"--{flag}", default=default, help=text + shown, **how)
    p.set_defaults(**PRESETS[p.parse_args(argv).preset])
    args = p.parse_args(argv)
    args.device = pick_device(args.device)
    for flag in ("image", "reference"):
        if getattr(args, flag) and not args.caption:
            raise ValueError(f'--{flag} needs --caption: say in a few words what the picture shows, e.g. --caption "A red mug on a table"')
    if args.user and (args.likes is not None or args.dislikes is not None):
        raise ValueError("--user names people, --likes and --dislikes describe a new one: give one or the other")
    if both := set(args.likes or []) & set(args.dislikes or []):
        raise ValueError(f"{sorted(both)[0]!r} is both liked and disliked")
    bounds = {"strength": (0, 1), "reference_scale": (0, 10), "control_start": (0, 1), "control_end": (args.control_start, 1), "steps": (1, 10_000),
              "size": (16, 8192), "temperature": (0, 100), "seed": (-10 ** 18, 10 ** 18), "guidance": (0, 1000), "control_scale": (-100, 100), "true_cfg": (0, 1000)}
    for name, (low, high) in bounds.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie in {low} .. {high}")
    if Path(args.out).suffix != ".png":
        raise ValueError(f"--out is {args.out}; it must end in .png, which carries the settings as text")
    return args

# ---- who asks, and for what --------------------------------------------------------------------------------------------------
def trained_user(graph, name):
    edges = graph.edges[1:, graph.edges[0] == graph.users.index(name)].T.tolist()
    return User(name, *([graph.attributes[a] for a, sign in edges if sign == wanted] for wanted in (1, -1)))

def find_users(args, graph):
    """The people asked for, list[User]: from --likes and --dislikes, from the file --users, or as the policy was trained with them."""
    if args.likes is not None or args.dislikes is not None:
        return [User("you", args.likes or [], args.dislikes or [])]
    names, people = list(dict.fromkeys(args.user or PERSONAS)), {user.name: user for user in read_users(args.users)}
    if unknown := [name for name in names if name not in people and name not in graph.users]:
        near = difflib.get_close_matches(unknown[0], [*people, *graph.users], 3, 0)
        raise ValueError(f"nobody is called {unknown[0]!r}, neither in {args.users} nor among those the policy was trained with; nearest: {', '.join(near)}")
    return [people[name] if name in people else trained_user(graph, name) for name in names]

def soft_tokens(user, tokens):
    """(soft tokens (1, S, D), note): as trained or, of somebody new, from likes and dislikes alone; None where nobody shares any. The note says what is left out."""
    graph = tokens.graph
    likes, dislikes = ([a for a in names if a in graph.attributes] for names in (user.likes, user.dislikes))
    unknown = [a for a in [*user.likes, *user.dislikes] if a not in graph.attributes]
    note = f"nobody else has a word on {', '.join(unknown)}; left out" if unknown else ""
    if not likes and not dislikes:
        return None, f"{note + '; ' if note else ''}no likes or dislikes that anybody shares, so no similar users: this is the generic edit"
    known = trained_user(graph, user.name) if user.name in graph.users else None
    if known and {*known.likes} == {*likes} and {*known.dislikes} == {*dislikes}:
        return tokens.soft(tokens.embeddings()[graph.users.index(user.name)][None]), note
    return tokens.soft(tokens.new([User(user.name, likes, dislikes)])), note

def write_instructions(args, dtype, stage):
    """[(user, note, the policy's instruction)] for the people asked for. One person at a time, so that no answer depends on who else asks."""
    if args.reference and args.user is None and args.likes is None and args.dislikes is None:
        return [(User("nobody", [], []), "no policy is asked", args.instruction)]
    with stage("policy"):
        folder, wishes = resolve(args.policy, ["*.json", "*.safetensors"]), []
        tokens = cdpo.UserTokens.load(folder / "collaborative.safetensors")
        people = find_users(args, tokens.graph)
        model, tokenizer = Qwen.load(args.qwen, args.device, dtype), Tokenizer.load(args.qwen)
        lora.load_adapter(model, folder)
        for user in people:
            soft, note = soft_tokens(user, tokens)
            generator, message = torch.Generator(args.device).manual_seed(args.seed), cdpo.prompt(args.caption, args.instruction)
            (instruction, _), = cdpo.suggest(model, tokenizer, [message], soft, temperature=args.temperature, generator=generator)
            wishes.append((user, note, instruction))
    return wishes

# ---- pictures in and out -----------------------------------------------------------------------------------------------------
def fit(image, size, multiple):
    """PIL -> uint8 (H,W,3), about size x size pixels in area, sides multiples of `multiple`: resized, its shape kept up to 4 : 1, and cut to the middle."""
    ratio = min(4, max(1 / 4, image.width / image.height)) ** 0.5
    width, height = (max(1, round(side / multiple)) * multiple for side in (size * ratio, size / ratio))
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))

def source_pictures(args, flux):
    """(source, control, (H, W)): uint8 (H,W,3) each, or None where there is none; fills in the sample's image and caption, and the size."""
    if not args.image and not args.caption:
        scene = read_jsonl(f"{SAMPLE}/scenes.jsonl", image=str, caption=str)[SCENE]
        args.image, args.caption = f"{SAMPLE}/{scene['image']}", scene["caption"]
    with reading(file := flux / "vae" / "config.json"):
        vae = read_json(file)
        args.size, multiple = args.size or int(vae["sample_size"]), 2 ** len(vae["block_out_channels"])     # FLUX.1: 16
    if not args.image:                                    # a new picture, from noise alone
        args.strength = 1.0
        return None, None, (max(multiple, args.size // multiple * multiple),) * 2
    source = fit(read_image(args.image), args.size, multiple)
    if args.control_image:
        return source, np.array(ImageOps.fit(read_image(args.control_image), source.shape[1::-1])), source.shape[:2]
    return source, control_picture(source, args.control_mode, args.low, args.high), source.shape[:2]

def image_prompt(args, stage):
    """What `render` calls with its Flux and the pixels' positions, so that Flux attends to the --reference pictures; None without any."""
    if not args.reference:
        return None
    with stage("references"):
        features = ImageFeatures.load(args.features, args.device)
        pictures = [to_tensor(ImageOps.fit(read_image(file), (features.side,) * 2)) for file in args.reference]
        maps = features.tokens(torch.stack(pictures).to(args.device))[None, :, 1:]      # (1, M, S, D)
    return lambda flux, ids: ImagePrompt.load(args.image_prompt, flux, maps.shape[-1], args.reference_scale).to(args.device).look(flux, maps, ids)

def save(file, picture, record):
    """The PIL picture as PNG, and `record` twice: in the PNG's text and in a JSON file beside it."""
    text, info = json.dumps(record, indent=1), PngInfo()
    info.add_text("edit", text)
    picture.save(file, pnginfo=info)
    file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")

def grid(cells, columns=4):
    """[(PIL picture, heading, text, small print)] -> one PIL picture; small pictures are enlarged."""
    faces = [(ImageFont.load_default(size), color) for size, color in ((16, "black"), (14, "black"), (12, "dimgray"))]
    scale = max(1, 256 // cells[0][0].width)
    width, height = (side * scale for side in cells[0][0].size)
    texts = [[(line, *face) for text, face in zip(texts, faces) for line in textwrap.wrap(text, int(2 * width / face[0].size))] for _, *texts in cells]
    columns, row = min(columns, len(cells)), height + 20 * max(map(len, texts)) + 24
    sheet = Image.new("RGB", (columns * (width + 16) + 16, -(-len(cells) // columns) * row + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((picture, *_), lines) in enumerate(zip(cells, texts)):
        x, y = 16 + i % columns * (width + 16), 16 + i // columns * row
        sheet.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        for n, (line, font, color) in enumerate(lines):
            pen.text((x, y + height + 8 + 20 * n), line, color, font)
    return sheet

@contextlib.contextmanager
def meter(device, name):
    """Prints how long a part took and the most memory it held (on the CPU: the process, so far), and frees what it left."""
    start, cuda = time.perf_counter(), device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"  {name:<20}{time.perf_counter() - start:7.1f} s   peak {peak / 1e9:6.2f} GB")

@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    out, dtype, stage, edits = Path(args.out), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], partial(meter, args.device), []
    out.parent.mkdir(parents=True, exist_ok=True)
    flux = resolve(args.flux, FLUX_PARTS)
    source, control, shape = source_pictures(args, flux)
    print(f"{args.image or 'a new picture'}: {args.caption}")
    for user, note, instruction in write_instructions(args, dtype, stage):
        prompt = f"{args.caption}. {instruction}" if instruction else args.caption      # ours: the paper does not say
        edits.append({"user": user.name, "likes": user.likes, "dislikes": user.dislikes, "note": note, "instruction": instruction, "prompt": prompt,
                      "settings": vars(args)})
        print(f"{user.name}: {instruction}" + (f"   ({note})" if note else ""))
    net = resolve(args.controlnet, ["config.json", "*.safetensors"]) if control is not None and args.control_scale else None
    sources, controls = ([picture] * len(edits) if picture is not None else None for picture in (source, control))
    pictures = render(flux, net, [edit["prompt"] for edit in edits], [args.seed] * len(edits), shape, sources, controls, args.control_mode, args.control_scale,
                      args.control_start, args.control_end, args.steps, args.guidance, args.strength, args.true_cfg, args.negative, args.device, dtype,
                      args.offload, look=image_prompt(args, stage), stage=stage, progress=partial(tqdm, disable=None, leave=False))
    files = [out.with_stem(f"{out.stem}_" + re.sub(r"[^\w.-]+", "_", edit["user"])) for edit in edits] if len(edits) > 1 else [out]
    cells = [] if source is None else [(Image.fromarray(source), "source", args.caption, "")]
    for file, picture, edit in zip(files, map(Image.fromarray, pictures), edits):
        save(file, picture, edit)
        cells.append((picture, edit["user"], edit["instruction"], f"likes {', '.join(edit['likes']) or 'nothing in particular'}"))
    if len(edits) > 1:
        save(out, grid(cells), {"edits": edits})
    print("wrote", ", ".join(map(str, dict.fromkeys([out, *files]))))

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        full = "the GPU's memory does not hold this: try --offload, a smaller --size, or --dtype bf16"
        print("edit.py:", full if isinstance(error, torch.OutOfMemoryError) else error, file=sys.stderr)
        sys.exit(2)
