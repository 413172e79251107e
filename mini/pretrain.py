"""Pretrains the miniature checkpoints from scratch, in the public checkpoints' own layouts.

Each recipe trains one thing. The order is that of the shipped files, the default --steps those of
their last training:

    python mini/pretrain.py pictures     # mini/data/pictures.pt: 2,400 scenes, each after 13 edits
    python mini/pretrain.py vae          # mini/flux/vae: the autoencoder
    python mini/pretrain.py flux         # mini/flux/{transformer,text_encoder,text_encoder_2} and
                                         # mini/controlnet, together; hours on one core
    python mini/pretrain.py distil       # the guidance embedding, as FLUX.1-dev has it
    python mini/pretrain.py vit          # mini/vit: patch features, in DINOv2's layout
    python mini/pretrain.py clip         # mini/clip: what pictures and texts have in common
    python mini/pretrain.py image-prompt # mini/image_prompt, from nothing, on flux and vit
    python mini/pretrain.py qwen         # mini/qwen: tokenizer and language model; 6 minutes

The shipped weights of pictures grew from earlier ones, step by step: this docstring in commits
b820a01, 36fd457, ba89f07 and a26ca47 tells how. The last step was an autoencoder with twice the
channels, and all that depends on its latents. With the mini/ of a26ca47 in the folder OLD,

    python mini/pretrain.py vae --start OLD --batch 8
    python mini/pretrain.py flux --start OLD --scenes 1200 --batch 16 --compile
    python mini/pretrain.py distil --scenes 1200 --batch 16 --compile
    python mini/pretrain.py image-prompt --start OLD --scenes 100

The pictures are rendered by what runs first and stay; for other --scenes, delete
--work/pictures*.pt (as was done here after vae, which had all 2,400).

Something that learns visibly in ten minutes, and touches nothing shipped:

    mkdir /tmp/mini && cp -r mini/flux mini/controlnet /tmp/mini
    M="--out /tmp/mini --work /tmp/mini/data"
    python mini/pretrain.py flux --scenes 100 --steps 600 --batch 16 $M

It runs on a GPU where there is one (--device); all that is random is drawn on the CPU. A recipe
goes on from --work/RECIPE.pt when started again; delete the file to start anew.
Configurations and the text encoders' tokenizers (each word of the world is one token, any other is
spelled) are shipped, not made. Losses and schedules are ours. Rectified flow as everywhere:
x_t = (1-t) x_0 + t eps, and the network learns v = eps - x_0.

A recipe is a class with `model`, `lr`, `loss(generator, batch)`, `save(average)`; `train_steps`
trains it. S scenes, 14 pictures of each; B batch; a picture is L = 144 tokens of width 64.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C: no traceback, whenever it comes
import argparse
import contextlib
import copy
import itertools
import json
import math
import random
import shutil
import sys
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from tokenizers import pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import default_collate

from render import ATTRIBUTES, CONCEPTS, HERE, TYPE_OF, Geometry
from world import COLORS, EDIT_TYPES, HINTS, OBJECTS, WALLS, caption, edited_caption, instruction
from world import make_scenes, wish, wish_for_nothing, wish_for_type, write_jsonl

sys.path.insert(0, str(HERE.parent))
from cdpo import profile, prompt
from controlnet import ControlNet, control_picture
from flux import T5, VAE, CLIPText, Flux, TextTokenizer, clip_half, image_ids, pack
from graph import User
from patch_dpo import (ALONE, PUBLIC_NAMES, SAME_OBJECT, WHOLE, Edits, ImageFeatures, ImagePrompt,
                       ImagePrompts, PatchSettings, PictureStage, flow)
from qwen import (Config, Qwen, Tokenizer, generator_for, pick_device, read_json,
                  read_tensors, set_precision)

SIZE = 192                                                # pixels
LATENT = 24                                               # pixels of its latent, on a side
TOKENS = (LATENT // 2) ** 2                               # of a picture, each of width 64
PICTURES = 14                                             # of each scene: plain, 13 times edited
WORDS = 32                                                # tokens of a prompt


# ---- the training pictures ----------------------------------------------------------------------

def draw_prompts(rng, obj, text):
    """[(prompt, attributes)] of one scene: itself, eleven single edits and two double ones."""
    asked = [(text, ())]
    for attribute in rng.sample(list(TYPE_OF), PICTURES - 3):
        words = instruction(obj, attribute, rng.randrange(4))
        asked.append((f"{text}. {words}", (attribute,)))
    for _ in range(2):
        edit_types = rng.sample(list(ATTRIBUTES), 2)
        both = tuple(rng.choice(ATTRIBUTES[edit_type]) for edit_type in edit_types)
        words = [instruction(obj, attribute, rng.randrange(2)) for attribute in both]
        asked.append((f"{text}. {' and '.join(words)}", both))
    return asked


def render_pictures(args):
    """Writes --work/pictures.pt: uint8 (S, 14, 192, 192, 3), and their prompts [S][14]."""
    rng = random.Random(args.seed)
    images = torch.empty(args.scenes, PICTURES, SIZE, SIZE, 3, dtype=torch.uint8)
    prompts = []
    for i in tqdm(range(args.scenes), desc="scenes"):
        obj = rng.choice(OBJECTS)
        color = rng.choice(COLORS)
        wall = rng.choice(WALLS)
        geometry = Geometry({"object": obj, "seed": i}, SIZE)
        asked = draw_prompts(rng, obj, caption(color, obj, wall))
        for j, (_, attributes) in enumerate(asked):
            images[i, j] = torch.from_numpy(geometry.shade(color, wall, attributes))
        prompts.append([words for words, _ in asked])
    save_whole(partial(torch.save, (images, prompts)), args.work / "pictures.pt")
    for found in args.work.glob("pictures-*.pt"):         # what was made of other pictures
        found.unlink()


def read_pictures(args, side=SIZE):
    """(images, prompts) of `render_pictures`, which runs now where it never did; the images shrunk
    to `side` pixels."""
    file = args.work / "pictures.pt"
    if not file.is_file():
        render_pictures(args)
    images, prompts = torch.load(file)
    return shrunk(images, SIZE // side), prompts


def shrunk(images, k):
    """uint8 (..., H, W, 3) -> (..., H/k, W/k, 3): the means of k x k pixels."""
    if k == 1:
        return images
    parts = []
    for part in images.flatten(0, -4).split(64):
        means = F.avg_pool2d(part.movedim(-1, 1).float(), k)
        parts.append(means.round().byte().movedim(1, -1))
    return torch.cat(parts).unflatten(0, images.shape[:-3])


def to_unit(images):
    """uint8 (..., H, W, 3) -> (..., 3, H, W) in [-1, 1]"""
    return images.movedim(-1, -3) / 127.5 - 1


def control_pictures(images, mode):
    """uint8 (B, H, W, 3) -> the same: edges ("canny") or grey values ("gray")."""
    found = [control_picture(image.numpy(), mode) for image in images]
    return torch.stack([torch.from_numpy(picture) for picture in found])


def kept(file, find):
    """find(), tensors, found once and then read from the file."""
    if not file.is_file():
        save_whole(partial(torch.save, find()), file)
    return torch.load(file)


def find_controls(images):
    """What the ControlNet sees of each scene, uint8 (S, 4, H, W, 3)."""
    seen = [control_pictures(images[:, j], mode) for j, mode in CONTROLS]
    return torch.stack(seen, dim=1)


# ---- the loop -----------------------------------------------------------------------------------

class Recipe:
    """How most recipes are optimised: the learning rate's way (see `schedule_for`), and AdamW."""
    one_cycle = False
    hold = 0.0

    def optimizers(self):
        betas = (0.9, 0.999 if self.one_cycle else 0.99)
        return [torch.optim.AdamW(self.model.parameters(), self.lr, betas, weight_decay=0.01)]


def save_whole(write, file):
    """write(file), but never half a file."""
    part = file.with_suffix(".part")
    write(part)
    part.replace(file)


def save_weights(folder, model, name="diffusion_pytorch_model"):
    """The weights of one part of a checkpoint."""
    save_tensors(folder / f"{name}.safetensors", model.state_dict())


def save_tensors(file, tensors):
    """In bf16."""
    tensors = {key: t.to("cpu", torch.bfloat16).contiguous() for key, t in tensors.items()}
    write = partial(save_file, tensors, metadata={"format": "pt"})
    save_whole(write, file)


def schedule_for(recipe, optimizer, steps):
    """How the learning rate moves: one cycle, or 200 steps of warm-up, a share `hold` of the steps
    at the peak, and half a cosine to zero."""
    if recipe.one_cycle:
        return OneCycleLR(optimizer, recipe.lr, steps)

    def factor(step):
        warm = min(1, (step + 1) / 200)
        held = recipe.hold * steps
        fallen = max(0, (step - held) / (steps - held))
        return warm * 0.5 * (1 + math.cos(math.pi * fallen))

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def update_average(average, model, step):
    """Move the running average of the weights towards them: fast at first, then by 0.1 %."""
    share = 1 - min(0.999, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


def train_steps(args, recipe):
    """Train recipe.model for args.steps. Every 500 steps and at the end the state is stored, and
    recipe.save called with the running average of the weights. Batch k is a function of (seed, k).
    A stopped run goes on where it was; a finished one does nothing."""
    model = recipe.model.to(args.device)
    average = copy.deepcopy(model)
    how = {"batch": args.batch} if args.batch else {}
    optimizers = recipe.optimizers()
    schedules = [schedule_for(recipe, optimizer, args.steps) for optimizer in optimizers]
    parts = {"model": model, "average": average}
    for i in range(len(optimizers)):
        parts |= {f"optimizer {i}": optimizers[i], f"schedule {i}": schedules[i]}
    file = args.work / f"{args.recipe}.pt"
    start = restore(file, parts) if file.is_file() else 0
    bar = tqdm(range(start, args.steps), desc=args.recipe, initial=start, total=args.steps)
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 10 ** 7 + step)
        loss = recipe.loss(generator, **how)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in [*optimizers, *schedules]:
            part.step()
        update_average(average, model, step)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            state = {"step": step + 1, "random": random.getstate(), **states}
            save_whole(partial(torch.save, state), file)
            recipe.save(average)


def has_bf16(device):
    """Not every CPU has it; others take a hundred times as long for it as for fp32."""
    if torch.device(device).type != "cpu":
        return True
    able = getattr(torch.cpu, "get_capabilities", dict)()                  # older torch: none
    return able.get("avx512_bf16") or able.get("bf16", False)              # Intel and AMD, ARM


@contextlib.contextmanager
def fast(device):
    """bf16 where it is safe and there is any; on a CPU plain attention, whose fused kernel's
    backward pass is slow there."""
    kind = torch.device(device).type
    kernels = [SDPBackend.MATH]
    if kind != "cpu":
        kernels += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    bf16 = torch.autocast(kind, torch.bfloat16, enabled=has_bf16(device))
    with bf16, sdpa_kernel(kernels):
        yield


def restore(file, parts):
    """Load a stored state into the parts of a run -> how many steps it has done."""
    found = torch.load(file, map_location="cpu")
    random.setstate(found["random"])
    for name, part in parts.items():
        part.load_state_dict(found[name])
    return found["step"]


# ---- vae: the autoencoder -----------------------------------------------------------------------

class Autoencoder(Recipe):
    """Learns from pieces of pictures. Noise on the latent instead of a KL term: hues survive, and
    latents stay smooth."""
    lr = 1.5e-3
    hold = 0.3
    noise = 0.05                                          # deviation of the noise on the latent
    piece = 96                                            # pixels on a side
    control = 0.15                                        # weight of the error in edge pictures

    def __init__(self, args):
        self.folder = args.out / "flux/vae"
        self.device = args.device
        self.images = read_pictures(args)[0].flatten(0, 1)                 # (14 S, 192, 192, 3)
        self.model = VAE(read_json(self.folder / "config.json"))
        self.model.scale = 1.0                            # while it trains
        self.model.shift = 0.0
        if args.start:
            old = read_tensors(args.start / "flux/vae")
            self.model.load_state_dict(widened(old, self.model.state_dict()))

    def pieces(self, generator, batch):
        """uint8 (batch, 96, 96, 3), cut where the latent's pixels meet"""
        chosen = torch.randint(len(self.images), (batch,), generator=generator)
        k = self.model.factor
        places = (SIZE - self.piece) // k + 1
        corners = k * torch.randint(places, (batch, 2), generator=generator)
        found = []
        for i, (y, x) in zip(chosen.tolist(), corners.tolist()):
            found.append(self.images[i, y:y + self.piece, x:x + self.piece])
        return torch.stack(found)

    def loss(self, generator, batch=16):
        images = self.pieces(generator, batch)
        some = max(1, batch // 16)                        # a ControlNet's pictures pass through it
        images[:some] = control_pictures(images[:some], "canny")
        x = to_unit(images.to(self.device))
        with fast(self.device):
            mean, logvar = self.model.encoder(x).chunk(2, dim=1)
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            decoded = self.model.decode(mean + self.noise * noise)
        error = decoded.float() - x
        error[:some] *= self.control
        return picture_error(error) + latent_size(mean.float(), logvar.float())

    @torch.no_grad()
    def save(self, average):
        """With what gives latents the mean 0 and the deviation 1, in config.json."""
        save_weights(self.folder, average)
        parts = to_unit(self.images[::97]).split(64)
        latents = torch.cat([average.encode(part.to(self.device)) for part in parts])
        file = self.folder / "config.json"
        config = read_json(file)
        config["shift_factor"] = round(latents.mean().item(), 4)
        config["scaling_factor"] = round(1 / latents.std().item(), 4)
        file.write_text(json.dumps(config, indent=2) + "\n")


def widened(old, new):
    """Weights of an autoencoder for one that computes the same with twice the hidden channels
    (Net2Net, arXiv:1511.05641); `new`: that one's weights, for their shapes. Every channel stands
    twice, side by side, as a group norm wants it; what reads the two splits its weights between
    them, unevenly, so that they part as they learn."""
    weights = {}
    for name, weight in old.items():
        outputs, inputs = (new[name].shape + (1,))[:2]
        weight = weight.float().repeat_interleave(outputs // len(weight), dim=0)
        if weight.ndim == 4 and inputs != weight.shape[1]:
            share = 0.5 + 0.3 * torch.randn(*weight.shape[:2], 1, 1)
            weight = torch.stack([weight * share, weight * (1 - share)], dim=2).flatten(1, 2)
        weights[name] = weight
    return weights


def picture_error(error):
    """Of decoded pictures (B, 3, H, W): squared error, again for differences of colour, and a
    little absolute error, of the pictures and of their edges."""
    chroma = error - error.mean(1, keepdim=True)
    squared = error.square().mean() + chroma.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return squared + 0.3 * (error.abs().mean() + edges)


def latent_size(mean, logvar):
    """Keeps the latents from growing, and the (unused) variance at 0.01."""
    unused = (logvar - math.log(0.01)).square().mean()
    return 3e-3 * mean.square().mean() + 1e-3 * unused


# ---- flux, distil: text to image, and edits -----------------------------------------------------

PARTS = {                                                 # folder of each trained part, its class
    "transformer": ("flux/transformer", Flux),
    "controlnet": ("controlnet", ControlNet),
    "text_encoder": ("flux/text_encoder", CLIPText),
    "text_encoder_2": ("flux/text_encoder_2", T5),
}
CONTROLS = [(0, "canny"), (0, "gray"), (1, "canny"), (2, "canny")]         # (picture, mode)
SHARES = [0.70, 0.14, 0.08, 0.08]                         # how often each is what the net sees
Batch = namedtuple("Batch", "x v t control mode keep prompt")


def new_models(out):
    """Untrained {name: module}. Every block starts as the identity (its modulation is zero), and
    the ControlNet adds nothing at first."""
    models = nn.ModuleDict()
    for name, (part, kind) in PARTS.items():
        models[name] = kind(read_json(out / part / "config.json"))
    zero = ("norm1", "norm.linear", "norm_out", "transformer.proj_out.weight")
    for name, p in models.named_parameters():
        if "text_encoder" not in name and any(part in name for part in zero):
            nn.init.zeros_(p)
    nn.init.normal_(models["controlnet"].controlnet_x_embedder.weight, std=0.1)
    return models


def times_deeper(flux, folder):
    """How many single blocks this Flux has for each of those of the checkpoint below `folder`."""
    config = read_json(folder / PARTS["transformer"][0] / "config.json")
    return len(flux.single_transformer_blocks) // config["num_single_layers"]


def begin_with(models, folder):
    """The weights of a checkpoint below `folder`, trained on pictures of any size. Where its
    transformer has k times fewer single blocks, its block i becomes block k i and those between do
    nothing yet; the ControlNet adds a k-th part after each. So all is as it was."""
    k = times_deeper(models["transformer"], folder)
    for name, (part, _) in PARTS.items():
        found = {}
        for key, tensor in read_tensors(folder / part).items():
            kind, *rest = key.split(".")
            if kind == "single_transformer_blocks" and name == "transformer":
                key = ".".join([kind, str(int(rest[0]) * k), *rest[1:]])
            if kind == "controlnet_single_blocks":
                tensor = tensor / k
            found[key] = tensor
        models[name].load_state_dict(models[name].state_dict() | found)


def how_often(text):
    """How often a picture of this prompt is drawn: those that show a pattern, which are hardest,
    four times as often as the others of their scene, those that show a material twice."""
    if any(name in text for name in ATTRIBUTES["pattern"]):
        return 4.0
    if any(name in text for name in ATTRIBUTES["material"]):
        return 2.0
    return 1.0


def compiled(models, args):
    if args.compile:
        models["transformer"].compile()
        models["controlnet"].compile()
    return models


def encode_pictures(vae, images, device):
    """uint8 (S, n, H, W, 3) -> packed latents (S, n, L, 64), bf16."""
    latents = []
    for part in images.flatten(0, 1).split(56):
        with fast(device):
            found = vae.encode(to_unit(part).to(device))
        latents.append(pack(found).to("cpu", torch.bfloat16))
    return torch.cat(latents).unflatten(0, images.shape[:2])


class TextToImage(Recipe):
    """The prompt asks, the control picture is mostly the source's: the net follows its edges while
    the words say otherwise. Of the samples 10 % have no words (for classifier-free guidance), and
    10 % no control picture."""
    lr = 1e-3
    hold = 0.7

    def __init__(self, args):
        self.out = args.out
        self.device = device = args.device
        self.model = new_models(args.out)
        if args.start:
            begin_with(self.model, args.start)
        compiled(self.model, args)
        vae = VAE.load(args.out / "flux/vae", device).requires_grad_(False)
        side = LATENT * vae.factor
        images, prompts = read_pictures(args, side)
        found = args.work / f"pictures-{side}"
        seen = kept(found.with_suffix(".controls.pt"), partial(find_controls, images))
        encode = partial(encode_pictures, vae, device=device)
        self.targets = kept(found.with_suffix(".latents.pt"), partial(encode, images))
        self.controls = kept(found.with_suffix(".control_latents.pt"), partial(encode, seen))
        texts = [""]                                      # row 0: no words
        shares = []
        for scene in prompts:
            texts += scene
            shares.append([how_often(text) for text in scene])
        self.shares = torch.tensor(shares)                                 # (S, 14)
        ids = TextTokenizer(args.out / "flux/tokenizer")(texts)            # (1 + 14 S, 32)
        self.clip_ids = ids.to(device)
        self.t5_ids = TextTokenizer(args.out / "flux/tokenizer_2")(texts).to(device)

    def optimizers(self):
        """Muon for the blocks' matrices: after the same steps the loss is lower than with AdamW,
        which keeps the rest (embeddings, vectors, the first and the last layer). Muon itself
        computes in bf16."""
        if not has_bf16(self.device):
            return super().optimizers()
        matrices = []
        rest = []
        for name, p in self.model.named_parameters():
            inside = "block" in name or ".layers." in name
            outside = "controlnet_" in name or "relative" in name
            (matrices if p.ndim == 2 and inside and not outside else rest).append(p)
        how = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(matrices, self.lr, **how)
        return [muon, torch.optim.AdamW(rest, self.lr, (0.9, 0.99), weight_decay=0.01)]

    def draw(self, generator, batch=32):
        scene = torch.randint(len(self.targets), (batch,), generator=generator)
        which = torch.multinomial(self.shares[scene], 1, generator=generator)[:, 0]
        eps = torch.randn(batch, TOKENS, 64, generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator) * 1.1 + 0.3)       # logit-normal
        shares = torch.tensor(SHARES)
        kind = torch.multinomial(shares, batch, replacement=True, generator=generator)
        keep = torch.rand(batch, 1, 1, generator=generator) > 0.1
        no_words = torch.rand(batch, generator=generator) < 0.1
        prompt = 1 + scene * PICTURES + which
        x_0 = self.targets[scene, which].float()
        batch = Batch(
            x=torch.lerp(x_0, eps, t[:, None, None]),     # (B, L, 64)
            v=eps - x_0,                                  # (B, L, 64) what is to be learned
            t=t,                                          # (B,)
            control=self.controls[scene, kind].float(),   # (B, L, 64)
            mode=torch.where(kind == 1, 5, 0),            # ControlNet-Union's: grey 5, edges 0
            keep=keep.float(),                            # (B, 1, 1) 0: no control picture
            prompt=torch.where(no_words, 0, prompt),      # (B,) into the tokenized prompts
        )
        return Batch(*[part.to(self.device) for part in batch])

    def velocity(self, models, batch, prompt, guidance):
        """The controlled velocity (B, L, 64) at x_t, for rows `prompt` of the prompts."""
        inputs = {
            "txt": models["text_encoder_2"](self.t5_ids[prompt]),
            "pooled": models["text_encoder"](self.clip_ids[prompt]),
            "timestep": batch.t,
            "guidance": guidance,
            "img_ids": image_ids(LATENT, LATENT, self.device),
            "txt_ids": torch.zeros(WORDS, 3, device=self.device),
        }
        steering = models["controlnet"](batch.x, batch.control, mode=batch.mode, **inputs)
        double, single = steering
        inputs["double_residuals"] = [residual * batch.keep for residual in double]
        inputs["single_residuals"] = [residual * batch.keep for residual in single]
        return models["transformer"](batch.x, **inputs).float()

    def loss(self, generator, batch=32):
        batch = self.draw(generator, batch)
        with fast(self.device):
            v = self.velocity(self.model, batch, batch.prompt, torch.ones_like(batch.t))
        return (v - batch.v).square().mean()

    def save(self, average):
        for name, (part, _) in PARTS.items():
            file = "model" if "text" in name else "diffusion_pytorch_model"
            save_weights(self.out / part, average[name], file)


class Distillation(TextToImage):
    """Classifier-free guidance moves into the guidance embedding. The student sees the guidance
    g ~ U(1, 6) and learns in one pass what recipe `flux` made, its teacher, says in two:
    v_plain + g (v_asked - v_plain)."""
    lr = 4e-4
    hold = 0

    def __init__(self, args):
        super().__init__(args)
        state = torch.load(args.work / "flux.pt", map_location="cpu")
        self.model.load_state_dict(state["average"])
        self.teacher = compiled(copy.deepcopy(self.model).to(args.device), args)

    def loss(self, generator, batch=32):
        batch = self.draw(generator, batch)
        guidance = 1 + 5 * torch.rand(len(batch.t), generator=generator).to(self.device)
        one = torch.ones_like(batch.t)
        with fast(self.device):
            with torch.no_grad():
                asked = self.velocity(self.teacher, batch, batch.prompt, one)
                plain = self.velocity(self.teacher, batch, 0 * batch.prompt, one)
            v = self.velocity(self.model, batch, batch.prompt, guidance)
        target = plain + guidance[:, None, None] * (asked - plain)
        return (v - target).square().mean()


# ---- vit: features of patches -------------------------------------------------------------------

NAMES = [*OBJECTS, *[f"A {c} " for c in COLORS], *[f" {w} wall" for w in WALLS], *TYPE_OF]


def named_in(texts):
    """Which objects, colours and attributes each prompt names (B, names), 0 or 1."""
    rows = []
    for text in texts:
        rows.append([float(name in text) for name in NAMES])
    return torch.tensor(rows)


def mean_and_std(folder):
    """Of pixels in [0, 1], (2, 3)."""
    pixels = read_json(folder / "preprocessor_config.json")
    return torch.tensor([pixels["image_mean"], pixels["image_std"]])


class Features(Recipe):
    """Names what a picture shows (object, colours, attributes) from its class token, and from every
    patch, of which 30 % are hidden, its own pixels, coarsely: features of patches that know both
    what they look like and what they belong to."""
    lr = 1.5e-3

    def __init__(self, args):
        self.folder = args.out / "vit"
        self.device = args.device
        self.images, prompts = read_pictures(args)
        self.labels = torch.stack([named_in(texts) for texts in prompts])  # (S, 14, names)
        config = read_json(self.folder / "config.json")
        self.patch = config["patch_size"]
        self.model = nn.ModuleDict({
            "vit": ImageFeatures(config, mean_and_std(self.folder)),
            "name": nn.Linear(96, len(NAMES)),
            "patch": nn.Linear(96, 3 * 4 * 4),
        })

    def loss(self, generator, batch=32):
        scene = torch.randint(len(self.images), (batch,), generator=generator)
        which = torch.randint(PICTURES, (batch,), generator=generator)
        side = SIZE // self.patch                         # of a picture, in patches
        hidden = torch.rand(batch, 1, side, side, generator=generator) < 0.3
        x = to_unit(self.images[scene, which].to(self.device))
        shown = 1 - F.interpolate(hidden.float(), scale_factor=self.patch).to(x)
        with fast(self.device):
            tokens = self.model["vit"].tokens(x * shown)                   # (B, 1 + L, 96)
            named = self.model["name"](tokens[:, 0]).float()
            patches = self.model["patch"](tokens[:, 1:]).float()           # (B, L, 3 * 4 * 4)
        coarse = F.pixel_unshuffle(F.avg_pool2d(x, self.patch // 4), 4)
        truth = coarse.flatten(2).mT                                       # (B, L, 3 * 4 * 4)
        labels = self.labels[scene, which].to(named)
        naming = F.binary_cross_entropy_with_logits(named, labels)
        return naming * 10 + (patches - truth).square().mean()

    def save(self, average):
        save_weights(self.folder, average["vit"], "model")


# ---- clip: pictures and texts in one space ------------------------------------------------------

class TextAndPicture(Recipe):
    """Of a batch's pictures and texts, which belong together. A text is a picture's prompt or a
    part of it: the caption, the instruction, or the bare name of what it asks for. CLIP's loss, but
    that a text fits every picture which shows all that it names (ours: in so small a world many
    do)."""
    lr = 2e-3
    public = list(PUBLIC_NAMES.items())[2:]               # the first two are a ViT's alone

    def __init__(self, args):
        self.folder = args.out / "clip"
        self.device = args.device
        config = read_json(self.folder / "config.json")
        side = config["vision_config"]["image_size"]
        self.images, self.prompts = read_pictures(args, side)
        self.tokenizer = TextTokenizer(self.folder, WORDS)
        self.model = nn.ModuleDict({
            "text": CLIPText(clip_half(config, "text")),
            "vision": ImageFeatures(config, mean_and_std(self.folder)),
        })
        self.model.logit_scale = nn.Parameter(torch.tensor(config["logit_scale_init_value"]))

    def part_of(self, prompt, kind, which):
        """The whole of a prompt, or a part; `kind` and `which` are in [0, 1)."""
        text, _, asked = prompt.partition(". ")
        if kind < 0.2 or not asked:
            return text
        if kind < 0.45:
            return prompt
        if kind < 0.8:
            return asked
        named = [name for name in TYPE_OF if name in asked]
        return named[int(which * len(named))]

    def loss(self, generator, batch=64):
        scene = torch.randint(len(self.images), (batch,), generator=generator)
        which = torch.randint(PICTURES, (batch,), generator=generator)
        random = torch.rand(batch, 2, generator=generator)
        prompts = [self.prompts[s][w] for s, w in zip(scene, which)]
        texts = [self.part_of(text, *row) for text, row in zip(prompts, random.tolist())]
        ids = self.tokenizer(texts)                                        # (B, 32)
        longest = (ids != ids[:, -1:]).sum(1).max() + 1                    # with one end
        ids = ids[:, :longest].to(self.device)
        x = to_unit(self.images[scene, which].to(self.device))
        with fast(self.device):
            said = self.model["text"].embed(ids).float()                   # (B, 64)
            seen = self.model["vision"].embed(x).float()
        cosine = F.normalize(said) @ F.normalize(seen).T                   # (B, B): text, picture
        logits = self.model.logit_scale.exp() * cosine
        hidden = 1 - named_in(prompts)                                     # what is not shown
        fits = (named_in(texts) @ hidden.T == 0).to(logits)                # (B, B)
        of_text = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
        of_picture = F.cross_entropy(logits.T, (fits / fits.sum(0)).T)
        return of_text + of_picture

    def save(self, average):
        tensors = {**average["text"].state_dict(), "logit_scale": average.logit_scale.detach()}
        for name, tensor in average["vision"].state_dict().items():
            for public, ours in reversed(self.public):
                name = name.replace(ours, public)
            tower = "" if name.startswith("visual_projection") else "vision_model."
            tensors[tower + name] = tensor
        save_tensors(self.folder / "model.safetensors", tensors)


# ---- image-prompt: reference pictures beside the text -------------------------------------------

WORDINGS = [WHOLE, ALONE, ALONE]


def training_scenes(args):
    """scenes.jsonl below --work, each with the true pictures of all 45 edits; drawn once."""
    folder = args.work / "image_prompt"
    file = folder / "scenes.jsonl"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        count = min(args.scenes, 160)
        rng = random.Random(args.seed)
        write_jsonl(file, make_scenes(folder, count, count, rng, first_seed=500_000))
    return file


def draw_references(edits, seed):
    """Which pictures each edit sees -> (N, 2) into edits.pictures, -1 for none. First its scene, or
    the true picture where the edit changes the object; second, for 40 % of the other edits, a scene
    after the same edit. 5 % have no first (the authors' share). All else is ours."""
    first = edits.scene.clone()
    second = torch.full_like(first, -1)
    trained = edits.rows[:edits.count]
    after = defaultdict(list)                             # attribute -> pictures that show it
    for n, row in enumerate(trained):
        after[row["attribute"]].append(edits.truth[n])
    generator = generator_for(seed, "references")
    for n, row in enumerate(trained):
        none, two, which = torch.rand(3, generator=generator).tolist()
        alike = after[row["attribute"]]
        if row["edit_type"] not in SAME_OBJECT:
            first[n] = edits.truth[n]
        elif two < 0.4:
            second[n] = alike[int(which * len(alike))]
        if none < 0.05:
            first[n] = -1
    return torch.stack([first, second], dim=1)


def begin_prompt_with(prompt, flux, folder):
    """The weights of an image prompt below `folder`, made for its Flux (see `begin_with`)."""
    k = times_deeper(flux, folder)
    first = len(flux.transformer_blocks)
    found = {}
    for key, tensor in read_tensors(folder / "image_prompt").items():
        kind, number, name = key.split(".")
        past = max(0, int(number) - first)                # single blocks before this one
        found[f"{kind}.{int(number) + past * (k - 1)}.{name}"] = tensor
    prompt.load_state_dict(prompt.state_dict() | found)


class PromptedEdits(PictureStage):
    """Edits in three wordings, and an image prompt that knows nothing, or what that below
    `start` does."""

    def __init__(self, settings, seed, start):
        Edits.__init__(self, settings, wordings=WORDINGS)
        width = self.in_parts(self.features, self.pictures[:1]).shape[-1]
        prompt = ImagePrompt(self.flux, width)
        if start:
            begin_prompt_with(prompt, self.flux, start)
        self.tuned = ImagePrompts(self, prompt, draw_references(self, seed))


class NewImagePrompt(Recipe):
    """Keys and values by which the frozen Flux attends to reference pictures, from nothing; the
    true pictures of edits are to be painted. Two of three wordings leave the caption out: what the
    object looks like only a reference tells (ours)."""
    lr = 3e-3

    def __init__(self, args):
        self.folder = args.out / "image_prompt"
        settings = PatchSettings(
            scenes=str(training_scenes(args)),
            flux=str(args.out / "flux"),
            features=str(args.out / "vit"),
            held_out=1,
            device=args.device,
        )
        self.stage = PromptedEdits(settings, args.seed, args.start)
        self.model = self.stage.tuned.prompts["policy"]

    def loss(self, generator, batch=16):
        stage = self.stage
        chosen = torch.randint(stage.count, (batch,), generator=generator)
        rows = stage.draw(chosen.tolist(), generator)
        item, noise, t, _ = default_collate(rows)
        truth = stage.truth[item]
        x, v = flow(stage.latent[truth], noise, t)                         # (B, L, 64)
        with fast(stage.device):
            found = stage.velocity("policy", item, x, t).float()
        return (found - v.to(found)).square().mean()

    def save(self, average):
        self.folder.mkdir(exist_ok=True)
        save_whole(average.save, self.folder / "image_prompt.safetensors")


# ---- qwen: the language model -------------------------------------------------------------------

def random_user(rng):
    """Somebody who states likes and dislikes, or one of them. They fit no theme: the model is to
    learn to read a profile, not what goes with what."""
    count = rng.randint(4, 20)
    names = rng.sample(list(TYPE_OF), count)
    part = rng.choice(["both", "both", "likes", "dislikes"])
    half = len(names) // 2
    likes = names[:half] if part != "dislikes" else []
    dislikes = names[half:] if part != "likes" else []
    return User("", likes, dislikes)


def conversation(rng):
    """One document: (messages, answer), without messages for plain prose. The model learns to
    suggest edits, all attributes alike, to obey guidance, to find words in a prompt, and to heed a
    profile 60 % of the time. To be terse is left to fine-tuning, to be personal to C-DPO."""
    color = rng.choice(COLORS)
    obj = rng.choice(OBJECTS)
    wall = rng.choice(WALLS)
    attribute = rng.choice(list(TYPE_OF))
    text = caption(color, obj, wall)
    kinds = ["prose", "question", "suggest", "guidance", "profile"]
    kind, = rng.choices(kinds, [1, 3, 2, 4, 4])
    if kind == "prose":
        edited = edited_caption(color, obj, wall, attribute)
        fact = f"{attribute}: {TYPE_OF[attribute]}"
        return [], rng.choice([text, edited, attribute, fact])
    if kind == "question":
        return question(rng, text, {"c": color, "o": obj, "w": wall})
    guidance = ""
    user = User("", [], [])
    if kind == "guidance":
        for_a_thing = wish(attribute, rng)
        for_a_type = wish_for_type(TYPE_OF[attribute], rng)
        for_nothing = wish_for_nothing(rng)
        guidance, = rng.choices([for_a_thing, for_a_type, for_nothing], [6, 2, 1])
    elif kind == "profile":
        user = random_user(rng)
        if rng.random() < 0.6:
            undisliked = [name for name in TYPE_OF if name not in user.dislikes]
            attribute = rng.choice(user.likes or undisliked)
    ask = instruction(obj, attribute, rng.randrange(4))
    answer = rng.choice(CONCEPTS["chatty"])
    small = ask[0].lower() + ask[1:]
    return prompt(text, guidance, profile(user)), answer.format(I=ask, i=small)


def question(rng, text, scene):
    """(messages, answer): something that can be read off a caption or a profile."""
    user = random_user(rng)
    facts = {
        **scene,
        "text": text,
        "taste": profile(user),
        "likes": ", ".join(user.likes) or "I cannot tell.",
    }
    (asked, answer), = rng.choices(CONCEPTS["questions"], [1, 1, 1, 4, 4])
    message = {"role": "user", "content": asked.format(**facts)}
    return [message], answer.format(**facts)


def train_tokenizer(file, vocabulary):
    """A new vocabulary for Qwen's byte-level BPE, learned from conversations; the three special
    tokens stay the last. Rare words that a wish may hang on are made whole tokens."""
    rng = random.Random(0)
    system = "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    texts = []
    for _ in range(5000):
        messages, answer = conversation(rng)
        texts.append(answer)
        texts += [message["content"] for message in messages]
        texts += [system, "user\n", "assistant\n"]
    for word in [*HINTS, *itertools.chain(*EDIT_TYPES.values())]:
        texts += [f"a {word}"] * 100
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = BPE.from_file(str(file))
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(file))


def initialise(model):
    """Wide: the logits of a tied head with small embeddings cannot be sure of anything."""
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = torch.ones_like(p)
        elif name.endswith("bias"):
            p.data = torch.zeros_like(p)
        else:
            p.data = torch.randn_like(p) * (0.4 if "embed" in name else 0.1)


class LanguageModel(Recipe):
    """First the tokenizer, then the model; the loss is on answers alone. Its conversations come
    from Python's own generator, whose state is stored with the weights."""
    one_cycle = True
    lr = 5e-3

    def __init__(self, args):
        self.folder = args.out / "qwen"
        self.device = args.device
        config = Config.read(self.folder)
        train_tokenizer(self.folder / "tokenizer.json", config.vocab)
        torch.set_num_threads(1)                          # the matrices are too small to share out
        self.tokenizer = Tokenizer.load(self.folder)
        self.eos, self.end = config.eos                   # of an answer, of a document
        self.model = Qwen(config)
        initialise(self.model)

    def encode(self, messages, answer):
        """-> (ids (T,), which of them are the answer's (T,))"""
        asked = self.tokenizer.chat(messages) if messages else []
        end = self.eos if messages else self.end
        said = [*self.tokenizer.encode(answer), end]
        mine = [False] * len(asked) + [True] * len(said)
        return torch.tensor(asked + said), torch.tensor(mine)

    def loss(self, generator, batch=48):
        ids = []
        answers = []
        for _ in range(batch):
            row, mine = self.encode(*conversation(random))
            ids.append(row)
            answers.append(mine)
        ids = pad_sequence(ids, batch_first=True, padding_value=self.end)  # (B, T), on the right,
        answers = pad_sequence(answers, batch_first=True)                  # where nothing sees it
        ids = ids.to(self.device)
        mine = answers[:, 1:].to(self.device)
        hidden = self.model.model(ids)[:, :-1]                             # (B, T-1, D)
        logits = self.model.lm_head(hidden[mine])                          # (tokens, V)
        return F.cross_entropy(logits, ids[:, 1:][mine])

    def save(self, average):
        """The weights as they are: one cycle needs no average. The head is the embedding."""
        tensors = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        tensors.pop("lm_head.weight", None)
        write = partial(save_file, tensors, metadata={"format": "pt"})
        save_whole(write, self.folder / "model.safetensors")


# ---- the command line ---------------------------------------------------------------------------

RECIPES = {                                               # class, steps of the shipped files
    "vae": (Autoencoder, 5500),
    "flux": (TextToImage, 10000),
    "distil": (Distillation, 300),
    "vit": (Features, 1556),
    "clip": (TextAndPicture, 900),
    "image-prompt": (NewImagePrompt, 1200),
    "qwen": (LanguageModel, 4000),
}


def prepare(args):
    """Folders: a new --out begins with all that is shipped but the weights."""
    args.work.mkdir(parents=True, exist_ok=True)
    weights = shutil.ignore_patterns("*.safetensors")
    for part in ("flux", "controlnet", "vit", "clip", "qwen"):
        if not (args.out / part).is_dir():
            shutil.copytree(HERE / part, args.out / part, ignore=weights)


def main():
    p = argparse.ArgumentParser(description="Pretrain the miniature checkpoints.")
    p.add_argument("recipe", choices=["pictures", *RECIPES])
    p.add_argument("--out", type=Path, default=HERE,
                   help="where flux/, controlnet/, vit/, clip/, image_prompt/ and qwen/ are "
                        "written")
    p.add_argument("--work", type=Path, default=HERE / "data", help="pictures and resume points")
    p.add_argument("--scenes", type=int, default=2400,
                   help="scenes to render (image-prompt: at most 160, each with all 45 edits)")
    p.add_argument("--steps", type=int,
                   help="batches to train on (default: the shipped checkpoints')")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (the best there is)")
    p.add_argument("--start", type=Path, metavar="FOLDER",
                   help="vae, flux, image-prompt: begin with the weights below it, perhaps of half "
                        "the autoencoder's channels, or of fewer blocks")
    p.add_argument("--compile", action="store_true", help="flux, distil: by torch.compile")
    p.add_argument("--batch", type=int, help="of a step (default: the recipe's own)")
    args = p.parse_args()
    args.device = pick_device(args.device)
    set_precision()
    prepare(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.set_flush_denormal(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if args.recipe == "pictures":
        render_pictures(args)
        return
    recipe, steps = RECIPES[args.recipe]
    args.steps = args.steps or steps
    train_steps(args, recipe(args))


if __name__ == "__main__":
    main()
