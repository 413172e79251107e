"""Pretrains the miniature checkpoints from scratch, each by one command, in the public checkpoints' own layouts and in the sizes of the shipped config.json files.

    python mini/pretrain.py pictures     # mini/data/pictures.safetensors: 2,400 scenes, each plain and after 13 edits
    python mini/pretrain.py vae          # mini/flux/vae: the autoencoder
    python mini/pretrain.py flux         # mini/flux/{transformer,text_encoder*,tokenizer*,scheduler} and mini/controlnet, trained together
    python mini/pretrain.py decoder      # mini/flux/vae: the decoder alone goes on; may run beside the stage before
    python mini/pretrain.py distil       # flux's files: classifier-free guidance moves into the guidance embedding, as in FLUX.1-dev
    python mini/pretrain.py controlnet   # mini/controlnet alone, the transformer frozen: another control for a trained Flux
    python mini/pretrain.py vit          # mini/vit: patch features (DINOv2's layout)
    python mini/pretrain.py qwen         # mini/qwen: the language model; 4,000 steps of 48 conversations, about 6 minutes on one idle core

The shipped files are these stages but `controlnet`, in this order, with the default --seed 0 and --minutes (on one thread of two busy cores: about 11 ms
of autoencoder a picture, 9 ms of Flux with its ControlNet a sample). A recipe that learns visibly in ten minutes, and touches nothing shipped:
    M="--out /tmp/mini --work /tmp/mini/data"; for s in "pictures --scenes 400" "vae --minutes 3" "flux --minutes 6"; do python mini/pretrain.py $s $M; done

A stage of pictures is one schedule (warm-up, one cosine), keeps its state in --work/STAGE.pt and goes on from there when started again; delete the file to start anew.
Losses and schedules are ours. Rectified flow: x_t = (1-t) x_0 + t eps, the target is eps - x_0.

The language model reads chats about the miniature's pictures (ours, too). It learns to suggest an edit of any kind (all attributes alike), to obey guidance ("use wood"),
to answer small questions, and to take a profile in the prompt as real instruct models do: most of the time (60 %), not always. The profiles are random lists: it knows
the words and nothing of the themes. It talks like an assistant ("Sure! ..."): being terse is left to supervised fine-tuning, being personal to C-DPO.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer as BPE, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from cdpo import prompt                                                                # noqa: E402
from concepts import ATTRIBUTES, COLORS, GUIDANCE, OBJECTS, TYPE_OF, WALLS, caption, instruction      # noqa: E402
from controlnet import ControlNet, control_picture                                     # noqa: E402
from flux import T5, VAE, CLIPText, Flux, TextTokenizer, image_ids, pack               # noqa: E402
from patch_dpo import ImageFeatures                                                    # noqa: E402
from qwen import Config, Qwen, Tokenizer                                               # noqa: E402
from render import Geometry                                                            # noqa: E402
from world import edited_caption                                                       # noqa: E402

MINUTES = {"pictures": 0, "vae": 11, "decoder": 25, "flux": 60, "distil": 10, "controlnet": 20, "vit": 12, "qwen": 0}       # on one thread of a 2-core machine
SIZE, EDITS, WORDS = 64, 13, 32                                                        # pixels; edited pictures a scene; tokens of a prompt
PARTS = {"transformer": ("flux/transformer", Flux), "controlnet": ("controlnet", ControlNet),
         "text_encoder": ("flux/text_encoder", CLIPText), "text_encoder_2": ("flux/text_encoder_2", T5)}

# ---- files -------------------------------------------------------------------------------------------------------------------
def shipped(a, name, **changes):
    """A shipped json file goes to --out, with changes in what a training decides -> its content."""
    content, file = json.loads((HERE / name).read_text()) | changes, a.out / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
    return content

def publish(a, part, model, name="diffusion_pytorch_model"):
    """The weights of one part of a checkpoint, in bf16."""
    save_file({k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}, a.out / part / f"{name}.safetensors", {"format": "pt"})

# ---- pictures ----------------------------------------------------------------------------------------------------------------
def draw_scene(rng, seed):
    """A scene, and what is asked of it: [(prompt, attributes)], first nothing, then eleven single edits and two double ones."""
    scene = {"object": rng.choice(OBJECTS), "color": rng.choice(COLORS), "wall": rng.choice(WALLS), "seed": seed}
    text = caption(scene["color"], scene["object"], scene["wall"])
    asked = [(text, ())] + [(f"{text}. {instruction(scene['object'], a, rng.randrange(4))}", (a,)) for a in rng.sample(list(TYPE_OF), EDITS - 2)]
    for _ in range(2):
        both = tuple(rng.choice(ATTRIBUTES[kind]) for kind in rng.sample(list(ATTRIBUTES), 2))
        asked.append((f"{text}. " + " and ".join(instruction(scene["object"], a, rng.randrange(2)) for a in both), both))
    return scene, asked

def pictures(a):
    """Training pictures (S, 14, 3, 64, 64) uint8 and their prompts [S][14], which stand in the file's metadata; rendered once."""
    file, rng = a.work / "pictures.safetensors", random.Random(a.seed)
    if a.stage == "pictures" or not file.is_file():
        scenes, images = [draw_scene(rng, i) for i in range(a.scenes)], torch.empty(a.scenes, 1 + EDITS, SIZE, SIZE, 3, dtype=torch.uint8)
        for i, (scene, asked) in enumerate(tqdm(scenes, desc="scenes")):
            geometry = Geometry(scene, SIZE)
            for j, (_, attributes) in enumerate(asked):
                images[i, j] = torch.from_numpy(geometry.shade(scene["color"], scene["wall"], attributes))
        save_file({"pictures": images}, file, {"prompts": json.dumps([[p for p, _ in asked] for _, asked in scenes])})
    with safe_open(file, "pt") as f:
        return f.get_tensor("pictures").permute(0, 1, 4, 2, 3), json.loads(f.metadata()["prompts"])

def to_unit(images):
    return images.float() / 127.5 - 1                                                  # uint8 -> [-1, 1]

def control(image, mode):
    """uint8 (3, H, W) -> what a ControlNet looks at, uint8 (3, H, W)."""
    return torch.from_numpy(control_picture(image.permute(1, 2, 0).numpy(), mode)).permute(2, 0, 1)

# ---- one loop for all stages of pictures -------------------------------------------------------------------------------------
def fit(a, modules, loss_of, lr, batch, save):
    """Trains the modules on loss_of(generator, batch) for a.minutes of training time, and calls save() with the running average of the weights every a.every minutes
    and at the end. Batch k is a function of (seed, k). A stopped run goes on where it was; a finished one does nothing."""
    parameters, file = [p for m in modules for p in m.parameters() if p.requires_grad], a.work / f"{a.stage}.pt"
    optimizer = torch.optim.AdamW(parameters, lr, (.9, .99), weight_decay=.01)
    step, seconds, average, losses, stored = 0, 0.0, [p.detach().clone() for p in parameters], [], time.time()

    def exchange():
        for p, mean in zip(parameters, average):
            p.data, mean.data = mean.data, p.data
    if file.is_file():
        found = torch.load(file)
        step, seconds, average = found["progress"]
        optimizer.load_state_dict(found["optimizer"])
        torch._foreach_copy_([p.data for p in parameters], found["parameters"])
    while seconds < 60 * a.minutes:
        start, done = time.time(), seconds / (60 * a.minutes)
        loss = loss_of(torch.Generator().manual_seed(a.seed * 10 ** 7 + step), batch)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * .5 * (1 + math.cos(math.pi * done))      # 200 steps of warm-up within one cosine to zero
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(.998, step / (step + 9)))
        losses, seconds = [*losses[-99:], loss.item()], seconds + time.time() - start
        last = seconds >= 60 * a.minutes
        if last or step % 100 == 0:
            print(f"{a.stage} step {step}: loss {sum(losses) / len(losses):.4f}, {seconds / 60:.1f} of {a.minutes} min", flush=True)
        if last or time.time() - stored > 60 * a.every:
            state = {"progress": (step, seconds, average), "optimizer": optimizer.state_dict(), "parameters": [p.detach() for p in parameters]}
            torch.save(state, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
            exchange()
            save()
            exchange()
            stored = time.time()

# ---- the autoencoder ---------------------------------------------------------------------------------------------------------
def vae(a, found=None, noise=.1, sharp=.1, lr=3e-3):
    """Squared error, again for the colour differences, and a little absolute error; some noise on the latent instead of a KL term: hues survive, latents stay smooth."""
    torch.manual_seed(a.seed)
    images, model = pictures(a)[0].flatten(0, 1), found or VAE(shipped(a, "flux/vae/config.json"))
    size = {"shift_factor": model.shift, "scaling_factor": model.scale}
    model.scale, model.shift = 1.0, 0.0                                                # while it trains

    def loss(g, batch):
        chosen = images[torch.randint(len(images), (batch,), generator=g)]
        chosen[:batch // 8] = torch.stack([control(image, "canny") for image in chosen[:batch // 8]])     # a ControlNet's pictures pass through it as well
        x = to_unit(chosen)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.moments(x)
            y = model.decode(mean + noise * torch.randn(mean.shape, generator=g))
        error, small = y.float() - x, 3e-3 * mean.float().square().mean() + 1e-3 * (logvar.float() - math.log(.01)).square().mean()
        chroma = error - error.mean(1, keepdim=True)
        return error.square().mean() + chroma.square().mean() + sharp * error.abs().mean() + small

    @torch.no_grad()
    def save():
        if not found:                                                                  # latents of mean 0 and deviation 1
            z = torch.cat([model.encode(to_unit(x)) for x in images[::97].split(64)])
            size.update(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))
        shipped(a, "flux/vae/config.json", **size)
        publish(a, "flux/vae", model)
        x = to_unit(images[5::997])
        print(f"vae: {-10 * math.log10((model.decode(model.encode(x)).clamp(-1, 1) - x).square().mean().item() / 4):.1f} dB", flush=True)
    fit(a, [model], loss, lr, batch=16, save=save)

def decoder(a):
    """Goes on with the decoder alone: the latents, and a Flux trained on them, stay valid."""
    found = VAE.load(a.out / "flux/vae")
    found.encoder.requires_grad_(False)
    vae(a, found, noise=.05, sharp=.3, lr=1.5e-3)

# ---- the text encoders' tokenizers -------------------------------------------------------------------------------------------
def train(bpe, texts, size, alphabet, **kind):
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, **kind))

def corpus():
    """Every sentence of the miniature world: after training on them, each of its words is one token, any other word is spelled."""
    for o in OBJECTS:
        yield from (caption(c, o, w) for c in COLORS for w in WALLS)
        yield from (instruction(o, a, i) + " and" for a in TYPE_OF for i in range(4))

def train_tokenizers(a):
    """tokenizer/ like CLIP's (vocab.json, merges.txt; the end token has the highest id) and tokenizer_2/ like T5's (tokenizer.json)."""
    for part in ("tokenizer", "tokenizer_2"):
        shipped(a, f"flux/{part}/special_tokens_map.json"), shipped(a, f"flux/{part}/tokenizer_config.json")
    clip = BPE(models.BPE(end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    clip.normalizer, clip.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    train(clip, corpus(), 900, letters, end_of_word_suffix="</w>")
    trained = json.loads(clip.to_str())["model"]
    vocab = dict.fromkeys([*trained["vocab"], *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"])
    (a.out / "flux/tokenizer/vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, indent=2) + "\n")
    (a.out / "flux/tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in trained["merges"]) + "\n", encoding="utf-8")

    pieces, special = BPE(models.BPE(unk_token="<unk>")), ["<pad>", "</s>", "<unk>"]
    pieces.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    train(pieces, corpus(), 700, [chr(c) for c in range(33, 127)], special_tokens=special)
    ranked = sorted(pieces.get_vocab(), key=pieces.token_to_id)
    t5 = BPE(models.Unigram([(piece, 0.0 if i < 3 else -10 - i / 1e4) for i, piece in enumerate(ranked)], 2, False))    # of near-equal scores, the fewest pieces win
    t5.normalizer, t5.decoder = normalizers.NFKC(), decoders.Metaspace()
    t5.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    t5.add_special_tokens(special)
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5.save(str(a.out / "flux/tokenizer_2/tokenizer.json"))

# ---- Flux, its text encoders and its ControlNet ------------------------------------------------------------------------------
@torch.no_grad()
def latents(a):
    """Packed latents of every picture (S, 14, 64, 64), and of four control pictures a scene: edges and grey of the source, edges of two edits (S, 4, 64, 64)."""
    file, coder, (images, prompts) = a.work / "latents.safetensors", VAE.load(a.out / "flux/vae"), pictures(a)
    made_by = {"vae": f"{coder.shift} {coder.scale}"}                                   # another autoencoder, other latents
    if not file.is_file() or safe_open(file, "pt").metadata() != made_by:
        encode = lambda images: torch.cat([pack(coder.encode(to_unit(x))).bfloat16() for x in images.flatten(0, 1).split(56)]).unflatten(0, images.shape[:2])
        seen = torch.stack([torch.stack([control(s[j], mode) for j, mode in ((0, "canny"), (0, "gray"), (1, "canny"), (2, "canny"))]) for s in images])
        save_file({"pictures": encode(images), "controls": encode(seen)}, file, made_by)
    with safe_open(file, "pt") as f:
        return f.get_tensor("pictures"), f.get_tensor("controls"), prompts

def new_models(a):
    """Untrained {name: module}. Every block starts as the identity (its modulation is zero), and the ControlNet adds nothing at first."""
    torch.manual_seed(a.seed)
    if not (a.out / "flux/tokenizer_2/tokenizer.json").is_file():                        # kept when a run goes on: pieces that tie get other ids each time
        train_tokenizers(a)
    shipped(a, "flux/model_index.json"), shipped(a, "flux/scheduler/scheduler_config.json")
    words = {f"text_encoder{i}": {"vocab_size": TextTokenizer.load(a.out / f"flux/tokenizer{i}").backend.get_vocab_size()} for i in ("", "_2")}
    found = {name: kind(shipped(a, f"{part}/config.json", **words.get(name, {}))) for name, (part, kind) in PARTS.items()}
    for name, p in [*found["transformer"].named_parameters(), *found["controlnet"].named_parameters()]:
        if "norm1" in name or "norm.linear" in name or "norm_out" in name:
            nn.init.zeros_(p)
    nn.init.zeros_(found["transformer"].proj_out.weight)
    nn.init.normal_(found["controlnet"].controlnet_x_embedder.weight, std=.1)
    return found

def velocity(found, x, t, guidance, ids, seen, mode, keep):
    """The controlled velocity (B, 64, 64); `keep` (B, 1, 1) is 0 where a sample has no control picture."""
    txt, pooled = found["text_encoder_2"](ids[1]), found["text_encoder"](ids[0])
    places = image_ids(SIZE // 4, SIZE // 4), torch.zeros(WORDS, 3)
    double, single = found["controlnet"](x, seen, txt, pooled, t, guidance, *places, mode=mode)
    return found["transformer"](x, txt, pooled, t, guidance, *places, [r * keep for r in double], [r * keep for r in single]).float()

def flux(a, found=None, teacher=None, lr=1.5e-3):
    """Text-to-image and edits together: the prompt asks, the control picture is mostly the source's, so the net learns to follow edges while the words say otherwise.

    Of the samples 10 % have no words (for classifier-free guidance), 10 % no control. With a `teacher` the target is its guided velocity."""
    found = found or new_models(a)
    targets, controls, prompts = latents(a)
    words = [TextTokenizer.load(a.out / "flux" / part)([""] + [p for scene in prompts for p in scene]) for part in ("tokenizer", "tokenizer_2")]      # row 0: no words

    def loss(g, batch):
        scene, which = torch.randint(len(targets), (batch,), generator=g), torch.randint(1 + EDITS, (batch,), generator=g)
        x0, eps = targets[scene, which].float(), torch.randn(batch, 64, 64, generator=g)
        t = torch.sigmoid(torch.randn(batch, generator=g) * 1.1 + .3)                                              # logit-normal
        kind = torch.multinomial(torch.tensor([.70, .14, .08, .08]), batch, replacement=True, generator=g)
        mode = torch.where(kind == 1, 5, 0)                                                                        # ControlNet-Union's numbers of grey and of edges
        keep = (torch.rand(batch, 1, 1, generator=g) > .1).float()
        row = torch.where(torch.rand(batch, generator=g) < .1, 0, 1 + scene * (1 + EDITS) + which)
        x, seen = torch.lerp(x0, eps, t[:, None, None]), controls[scene, kind].float()
        guidance, target = torch.ones(batch), eps - x0
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):                                  # the fused kernel's backward is slow on CPU
            if teacher:
                guidance = 1 + 5 * torch.rand(batch, generator=g)
                with torch.no_grad():
                    asked, plain = (velocity(teacher, x, t, torch.ones(batch), [w[r] for w in words], seen, mode, keep) for r in (row, 0 * row))
                target = plain + guidance[:, None, None] * (asked - plain)
            v = velocity(found, x, t, guidance, [w[row] for w in words], seen, mode, keep)
        return (v - target).square().mean()                                                                        # v = eps - x_0

    def save():
        for name, (part, _) in PARTS.items():
            publish(a, part, found[name], "model" if "text" in name else "diffusion_pytorch_model")
    fit(a, found.values(), loss, lr, batch=32, save=save)

def load_models(folder):
    return {name: kind.load(folder / part) for name, (part, kind) in PARTS.items()}

def distil(a):
    """The student sees the guidance g ~ U(1, 6) and learns the teacher's v_plain + g (v_asked - v_plain): one pass instead of two."""
    if not (a.work / "distil.pt").is_file():                                            # a stopped run goes on with the teacher it had
        for part in ("flux", "controlnet"):
            shutil.copytree(a.out / part, a.work / "teacher" / part, dirs_exist_ok=True)
    flux(a, load_models(a.work / "teacher"), load_models(a.work / "teacher"), lr=4e-4)

def controlnet(a):
    """A new ControlNet for the trained Flux, which stays as it is."""
    flux(a, {name: module.requires_grad_(False) for name, module in load_models(a.out).items()} | {"controlnet": new_models(a)["controlnet"]})

# ---- a small ViT -------------------------------------------------------------------------------------------------------------
def vit(a):
    """Names what a picture shows (object, colours, attributes) from its class token, and from every patch, of which 30 % are hidden, the patch's own pixels, coarsely:
    features of patches that know both what they look like and what they belong to."""
    torch.manual_seed(a.seed)
    images, prompts = pictures(a)
    names = OBJECTS + [f"A {c} " for c in COLORS] + [f" {w} wall" for w in WALLS] + list(TYPE_OF)
    labels = torch.tensor([[[float(name in prompt) for name in names] for prompt in scene] for scene in prompts])   # (S, 14, names)
    pixels = shipped(a, "vit/preprocessor_config.json")
    model = ImageFeatures(shipped(a, "vit/config.json"), pixels["image_mean"], pixels["image_std"])
    heads = nn.ModuleDict({"name": nn.Linear(96, len(names)), "patch": nn.Linear(96, 3 * 4 * 4)})

    def loss(g, batch):
        scene, which = torch.randint(len(images), (batch,), generator=g), torch.randint(1 + EDITS, (batch,), generator=g)
        x = to_unit(images[scene, which])
        hidden = (torch.rand(batch, 1, 8, 8, generator=g) < .3).float()
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = model.tokens(x * (1 - F.interpolate(hidden, scale_factor=8)))
            named, patches = heads["name"](tokens[:, 0]).float(), heads["patch"](tokens[:, 1:]).float()
        truth = F.pixel_unshuffle(F.avg_pool2d(x, 2), 4).flatten(2).mT                                             # (B, 64, 3*4*4)
        return F.binary_cross_entropy_with_logits(named, labels[scene, which]) * 10 + (patches - truth).square().mean()
    fit(a, [model, heads], loss, 1.5e-3, batch=32, save=lambda: publish(a, "vit", model, "model"))

# ---- the language model ------------------------------------------------------------------------------------------------------
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"      # Qwen2's own
CHATTY = ["{I}", "{I}.", "Sure! {I}.", "How about this: {i}?", "You could {i}.", "I suggest to {i}. It would look great!",
          "Here is an idea: {I}. Let me know if you want another one."]

def make_profile(rng):
    """(likes, dislikes, profile text): random attributes, so that nothing of the themes is in it; a profile may name both, or one of them."""
    names, part = rng.sample(list(TYPE_OF), rng.randint(4, 20)), rng.choice(["both", "both", "likes", "dislikes"])
    likes, dislikes = names[:len(names) // 2] * (part != "dislikes"), names[len(names) // 2:] * (part != "likes")
    return likes, dislikes, "; ".join(f"{word} {', '.join(names)}" for word, names in (("likes", likes), ("dislikes", dislikes)) if names)

def question(rng, color, obj, wall):
    """(question, answer): small talk about the picture or about someone's taste; answering means finding words in the prompt."""
    likes, dislikes, profile = make_profile(rng)
    text = f"\nCaption: {caption(color, obj, wall)}"
    chats = [("What is in the picture?" + text, f"A {obj}."), (f"What color is the {obj}?" + text, f"It is {color}."), ("What is behind it?" + text, f"A {wall} wall."),
             (f"Repeat: {profile}", profile), (f"What does someone like who {profile}?", ", ".join(likes) or "I cannot tell.")]
    return rng.choices(chats, [1, 1, 1, 4, 4])[0]

def conversation(rng):
    """One document: (messages, answer), or (None, text) for plain prose."""
    color, obj, wall, attribute = rng.choice(COLORS), rng.choice(OBJECTS), rng.choice(WALLS), rng.choice(list(TYPE_OF))
    text, kind = caption(color, obj, wall), rng.choices(["prose", "question", "suggest", "guidance", "profile"], [1, 3, 2, 2, 4])[0]
    guidance = profile = ""
    if kind == "prose":
        return None, rng.choice([text, edited_caption(color, obj, wall, attribute), attribute, f"{attribute}: {TYPE_OF[attribute]}"])
    if kind == "question":
        asked, answer = question(rng, color, obj, wall)
        return [{"role": "user", "content": asked}], answer
    if kind == "guidance":
        guidance = rng.choice(GUIDANCE).format(a=attribute) if rng.random() < 0.8 else f"change the {TYPE_OF[attribute]}"
    if kind == "profile":
        likes, dislikes, profile = make_profile(rng)
        if rng.random() < 0.6:
            attribute = rng.choice(likes or [a for a in TYPE_OF if a not in dislikes])
    ask = instruction(obj, attribute, rng.randrange(4))
    return prompt(text, guidance, profile), rng.choice(CHATTY).format(I=ask, i=ask[0].lower() + ask[1:])

def train_qwen_tokenizer(file):
    """The byte-level BPE of 800 tokens, trained on conversations -> the ids of the special tokens, which are the last, as in Qwen's."""
    rng, texts = random.Random(0), []
    for _ in range(5000):
        messages, answer = conversation(rng)
        texts += [answer, *(m["content"] for m in messages or []), "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "user\n", "assistant\n"]
    bpe = BPE(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.post_processor = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), bytes_]), processors.ByteLevel(trim_offsets=False)
    train(bpe, texts, 800, pre_tokenizers.ByteLevel.alphabet())
    bpe.add_special_tokens(SPECIAL)
    bpe.save(str(file))
    return [bpe.token_to_id(t) for t in SPECIAL]

def qwen(a, batch=48, lr=5e-3):
    """Tokenizer, then the model. The loss is on answers; AdamW, one cycle up to `lr`.
    The initialisation is wide: the logits of a tied head with small embeddings cannot be sure of anything."""
    shipped(a, "qwen/tokenizer_config.json")
    end, _, eos = train_qwen_tokenizer(a.out / "qwen/tokenizer.json")
    shipped(a, "qwen/generation_config.json", bos_token_id=end, pad_token_id=end, eos_token_id=[eos, end])
    shipped(a, "qwen/config.json", vocab_size=eos + 1, bos_token_id=end, eos_token_id=eos)
    torch.set_num_threads(1)                                                           # the matrices are too small to share out
    torch.manual_seed(a.seed)
    tokenizer, model, rng = Tokenizer.load(a.out / "qwen"), Qwen(Config.read(a.out / "qwen")), random.Random(a.seed)
    for name, p in model.named_parameters():
        p.data = torch.ones_like(p) if "norm" in name else torch.zeros_like(p) if name.endswith("bias") else torch.randn_like(p) * (0.4 if "embed" in name else 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, a.steps)
    for _ in (bar := tqdm(range(a.steps), desc="mini/qwen")):
        talk = [conversation(rng) for _ in range(batch)]
        rows = [(tokenizer.chat(messages) if messages else [], tokenizer.encode(answer) + [eos if messages else end]) for messages, answer in talk]
        ids = pad_sequence([torch.tensor(asked + said) for asked, said in rows], True, end)                       # (B, T); padded on the right, where nothing sees it
        mine = pad_sequence([torch.tensor([False] * len(asked) + [True] * len(said)) for asked, said in rows], True, False)[:, 1:]      # (B, T-1): predict answers only
        loss = F.cross_entropy(model.lm_head(model.model(ids)[:, :-1][mine]), ids[:, 1:][mine])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, a.out / "qwen/model.safetensors", {"format": "pt"})

def main():
    p = argparse.ArgumentParser(description="Pretrain the miniature checkpoints.")
    p.add_argument("stage", choices=list(MINUTES))
    p.add_argument("--out", type=Path, default=HERE, help="where flux/, controlnet/, vit/ and qwen/ are written")
    p.add_argument("--work", type=Path, default=HERE / "data", help="pictures, latents and resume points")
    p.add_argument("--minutes", type=float, help="training time of a stage of pictures (default: the shipped checkpoints')")
    p.add_argument("--every", type=float, default=2, help="minutes between resume points, each with its checkpoint in --out")
    p.add_argument("--scenes", type=int, default=2400, help="scenes to render")
    p.add_argument("--steps", type=int, default=4000, help="of the stage qwen")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.minutes = MINUTES[a.stage] if a.minutes is None else a.minutes
    a.work.mkdir(parents=True, exist_ok=True)
    if a.stage != "qwen":
        torch.set_flush_denormal(True)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    globals()[a.stage](a)

if __name__ == "__main__":
    main()
