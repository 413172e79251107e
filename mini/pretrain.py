"""Pretrains the miniature checkpoints from scratch, in the public checkpoints' own layouts; order and default --steps are the shipped ones'.

    python mini/pretrain.py pictures     # mini/data/pictures.pt: 2,400 scenes, each plain and after 13 edits
    python mini/pretrain.py vae          # mini/flux/vae: the autoencoder
    python mini/pretrain.py flux         # mini/flux/{transformer,text_encoder,text_encoder_2} and mini/controlnet, trained together; an hour on one core
    python mini/pretrain.py decoder      # mini/flux/vae: the decoder alone goes on; may run beside the stage before
    python mini/pretrain.py distil       # flux's files: classifier-free guidance moves into the guidance embedding, as in FLUX.1-dev
    python mini/pretrain.py vit          # mini/vit: patch features (DINOv2's layout)
    python mini/pretrain.py qwen         # mini/qwen: tokenizer and language model; about 6 minutes

A recipe that learns visibly in ten minutes, and touches nothing shipped:
    M="--out /tmp/mini --work /tmp/mini/data"; for s in "pictures --scenes 400" "vae --steps 500" "flux --steps 1200"; do python mini/pretrain.py $s $M; done
A stage goes on from --work/STAGE.pt when started again; delete the file to start anew. Configurations and the text encoders' tokenizers (each word of the world
is one token, any other is spelled) are shipped, not made. Losses and schedules are ours. Rectified flow: x_t = (1-t) x_0 + t eps, the target is eps - x_0.
"""
import argparse, copy, json, math, random, shutil, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from render import Geometry
from world import ATTRIBUTES, COLORS, CONCEPTS, GUIDANCE, HERE, OBJECTS, TYPE_OF, WALLS, caption, edited_caption, instruction
sys.path.insert(0, str(HERE.parent))
from cdpo import profile, prompt                                                       # noqa: E402
from controlnet import ControlNet, control_picture                                     # noqa: E402
from flux import T5, VAE, CLIPText, Flux, TextTokenizer, image_ids, pack               # noqa: E402
from graph import User                                                                 # noqa: E402
from patch_dpo import ImageFeatures                                                    # noqa: E402
from qwen import Config, Qwen, Tokenizer, read_json                                    # noqa: E402

SIZE, EDITS, WORDS = 64, 13, 32                                                        # pixels; edited pictures a scene; tokens of a prompt
PARTS = {"transformer": ("flux/transformer", Flux), "controlnet": ("controlnet", ControlNet),
         "text_encoder": ("flux/text_encoder", CLIPText), "text_encoder_2": ("flux/text_encoder_2", T5)}

def publish(a, part, model, name="diffusion_pytorch_model"):
    """The weights of one part of a checkpoint, in bf16."""
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}, a.out / part / f"{name}.safetensors", {"format": "pt"})
def store(thing, file):
    torch.save(thing, file.with_suffix(".part"))                                       # never half a file
    file.with_suffix(".part").replace(file)

def pictures(a):
    """Training pictures (S, 14, 64, 64, 3) uint8 and their prompts [S][14], rendered once: each scene plain, after eleven single edits and two double ones."""
    file, rng = a.work / "pictures.pt", random.Random(a.seed)
    if a.stage == "pictures" or not file.is_file():
        images, prompts = torch.empty(a.scenes, 1 + EDITS, SIZE, SIZE, 3, dtype=torch.uint8), []
        for i in tqdm(range(a.scenes), desc="scenes"):
            obj, color, wall = rng.choice(OBJECTS), rng.choice(COLORS), rng.choice(WALLS)
            text, geometry = caption(color, obj, wall), Geometry({"object": obj, "seed": i}, SIZE)
            asked = [(text, ())] + [(f"{text}. {instruction(obj, one, rng.randrange(4))}", (one,)) for one in rng.sample(list(TYPE_OF), EDITS - 2)]
            for _ in range(2):
                both = tuple(rng.choice(ATTRIBUTES[kind]) for kind in rng.sample(list(ATTRIBUTES), 2))
                asked.append((f"{text}. " + " and ".join(instruction(obj, one, rng.randrange(2)) for one in both), both))
            images[i] = torch.stack([torch.from_numpy(geometry.shade(color, wall, attributes)) for _, attributes in asked])
            prompts.append([words for words, _ in asked])
        store((images, prompts), file)
    return torch.load(file)

def to_unit(images):
    return images.movedim(-1, -3) / 127.5 - 1                                          # uint8 (..., H, W, 3) -> (..., 3, H, W) in [-1, 1]
def control_pictures(images, mode):
    return torch.stack([torch.from_numpy(control_picture(image.numpy(), mode)) for image in images])      # uint8 (B, H, W, 3) -> uint8 (B, H, W, 3)

def fit(a, model, loss_of, save, lr, cycle=False):
    """Trains the model on loss_of(generator) for a.steps; every 500 steps and at the end its state is stored, and save() called with the running average of its
    weights. Batch k is a function of (seed, k). A stopped run goes on where it was; a finished one does nothing."""
    average, start, file = copy.deepcopy(model), 0, a.work / f"{a.stage}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr, (.9, .999 if cycle else .99), weight_decay=.01)
    cosine = lambda step: min(1, (step + 1) / 200) * .5 * (1 + math.cos(math.pi * step / a.steps))         # down to zero, after 200 steps of warm-up
    schedule = OneCycleLR(optimizer, lr, a.steps) if cycle else LambdaLR(optimizer, cosine)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    if file.is_file():
        found = torch.load(file)
        start = found["step"]
        random.setstate(found["random"])
        for name, part in parts.items():
            part.load_state_dict(found[name])
    for step in (bar := tqdm(range(start, a.steps), desc=a.stage, initial=start, total=a.steps)):
        loss = loss_of(torch.Generator().manual_seed(a.seed * 10 ** 7 + step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - min(.998, (step + 1) / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == a.steps:
            store({"step": step + 1, "random": random.getstate(), **{name: part.state_dict() for name, part in parts.items()}}, file)
            save(average)

def vae(a):
    """Squared error, again for colour differences, and a little absolute error; noise on the latent instead of a KL term: hues survive, latents stay smooth.
    Stage `decoder` goes on with the decoder alone: the latents, and a Flux trained on them, stay valid."""
    file, images, alone = a.out / "flux/vae/config.json", pictures(a)[0].flatten(0, 1), a.stage == "decoder"
    model, noise, sharp, lr = (VAE.load(file.parent), .05, .3, 1.5e-3) if alone else (VAE(read_json(file)), .1, .1, 3e-3)
    model.encoder.requires_grad_(not alone)
    model.scale, model.shift = 1.0, 0.0                                                # while it trains
    def loss(g, batch=16):
        chosen = images[torch.randint(len(images), (batch,), generator=g)]
        chosen[:batch // 8] = control_pictures(chosen[:batch // 8], "canny")                   # a ControlNet's pictures pass through it as well
        x = to_unit(chosen)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.encoder(x).chunk(2, dim=1)
            y = model.decode(mean + noise * torch.randn(mean.shape, generator=g))
        error, small = y.float() - x, 3e-3 * mean.float().square().mean() + 1e-3 * (logvar.float() - math.log(.01)).square().mean()
        chroma = error - error.mean(1, keepdim=True)
        return error.square().mean() + chroma.square().mean() + sharp * error.abs().mean() + small
    @torch.no_grad()
    def save(average):
        publish(a, "flux/vae", average)
        if not alone:                                                                  # latents of mean 0 and deviation 1
            z = torch.cat([average.encode(to_unit(x)) for x in images[::97].split(64)])
            scale = {"shift_factor": round(z.mean().item(), 4), "scaling_factor": round(1 / z.std().item(), 4)}
            file.write_text(json.dumps(read_json(file) | scale, indent=2) + "\n")
    fit(a, model, loss, save, lr)

def new_models(a):
    """Untrained {name: module}. Every block starts as the identity (its modulation is zero), and the ControlNet adds nothing at first."""
    found = nn.ModuleDict({name: kind(read_json(a.out / part / "config.json")) for name, (part, kind) in PARTS.items()})
    for name, p in found.named_parameters():
        if "text_encoder" not in name and any(part in name for part in ("norm1", "norm.linear", "norm_out", "transformer.proj_out.weight")):
            nn.init.zeros_(p)
    nn.init.normal_(found["controlnet"].controlnet_x_embedder.weight, std=.1)
    return found

def velocity(found, x, t, guidance, ids, seen, mode, keep):
    """The controlled velocity (B, 64, 64); `keep` (B, 1, 1) is 0 where a sample has no control picture."""
    txt, pooled = found["text_encoder_2"](ids[1]), found["text_encoder"](ids[0])
    places = image_ids(SIZE // 4, SIZE // 4), torch.zeros(WORDS, 3)
    double, single = found["controlnet"](x, seen, txt, pooled, t, guidance, *places, mode=mode)
    return found["transformer"](x, txt, pooled, t, guidance, *places, [r * keep for r in double], [r * keep for r in single]).float()

def flux(a):
    """Text-to-image and edits together: the prompt asks, the control picture is mostly the source's, so the net follows edges while the words say otherwise.
    Of the samples 10 % have no words (for classifier-free guidance), 10 % no control. Stage `distil` goes on from what stage `flux` made, its teacher: the student
    sees the guidance g ~ U(1, 6) and learns the teacher's v_plain + g (v_asked - v_plain), one pass instead of two."""
    found, teacher, lr = new_models(a), None, 1.5e-3
    if a.stage == "distil":
        found.load_state_dict(torch.load(a.work / "flux.pt")["average"])
        teacher, lr = copy.deepcopy(found), 4e-4
    coder, (images, prompts) = VAE.load(a.out / "flux/vae").requires_grad_(False), pictures(a)
    seen = torch.stack([control_pictures(images[:, j], mode) for j, mode in ((0, "canny"), (0, "gray"), (1, "canny"), (2, "canny"))], 1)      # (S, 4, 64, 64, 3)
    targets, controls = (torch.cat([pack(coder.encode(to_unit(x))).bfloat16() for x in shown.flatten(0, 1).split(56)]).unflatten(0, shown.shape[:2])
                         for shown in (images, seen))                                                              # packed latents (S, 14 and 4, 64, 64)
    words = [TextTokenizer(a.out / part)(["", *(p for scene in prompts for p in scene)]) for part in ("flux/tokenizer", "flux/tokenizer_2")]   # row 0: none
    def loss(g, batch=32):
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
    def save(average):
        for name, (part, _) in PARTS.items():
            publish(a, part, average[name], "model" if "text" in name else "diffusion_pytorch_model")
    fit(a, found, loss, save, lr)

def vit(a):
    """Names what a picture shows (object, colours, attributes) from its class token, and from every patch, of which 30 % are hidden, its own pixels, coarsely:
    features of patches that know both what they look like and what they belong to."""
    images, prompts = pictures(a)
    names = OBJECTS + [f"A {c} " for c in COLORS] + [f" {w} wall" for w in WALLS] + list(TYPE_OF)
    labels = torch.tensor([[[float(name in prompt) for name in names] for prompt in scene] for scene in prompts])   # (S, 14, names)
    pixels = read_json(a.out / "vit/preprocessor_config.json")
    model = ImageFeatures(read_json(a.out / "vit/config.json"), pixels["image_mean"], pixels["image_std"])
    found = nn.ModuleDict({"vit": model, "name": nn.Linear(96, len(names)), "patch": nn.Linear(96, 3 * 4 * 4)})
    def loss(g, batch=32):
        scene, which = torch.randint(len(images), (batch,), generator=g), torch.randint(1 + EDITS, (batch,), generator=g)
        x = to_unit(images[scene, which])
        hidden = (torch.rand(batch, 1, 8, 8, generator=g) < .3).float()
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = model.tokens(x * (1 - F.interpolate(hidden, scale_factor=8)))
            named, patches = found["name"](tokens[:, 0]).float(), found["patch"](tokens[:, 1:]).float()
        truth = F.pixel_unshuffle(F.avg_pool2d(x, 2), 4).flatten(2).mT                                             # (B, 64, 3*4*4)
        return F.binary_cross_entropy_with_logits(named, labels[scene, which]) * 10 + (patches - truth).square().mean()
    fit(a, found, loss, lambda average: publish(a, "vit", average["vit"], "model"), 1.5e-3)

def conversation(rng):
    """One document: (messages, answer), without messages for plain prose. The model learns to suggest edits, all attributes alike, to obey guidance, to find words
    in a prompt, and to heed a profile 60 % of the time. Profiles are random: it knows no theme. To be terse is left to fine-tuning, to be personal to C-DPO."""
    color, obj, wall, attribute = rng.choice(COLORS), rng.choice(OBJECTS), rng.choice(WALLS), rng.choice(list(TYPE_OF))
    text, kind = caption(color, obj, wall), rng.choices(["prose", "question", "suggest", "guidance", "profile"], [1, 3, 2, 2, 4])[0]
    guidance, user = "", User("", [], [])
    if kind == "prose":
        return [], rng.choice([text, edited_caption(color, obj, wall, attribute), attribute, f"{attribute}: {TYPE_OF[attribute]}"])
    if kind == "guidance":
        guidance = rng.choice(GUIDANCE).format(a=attribute) if rng.random() < 0.8 else f"change the {TYPE_OF[attribute]}"
    if kind in ("question", "profile"):                                                # of someone who states likes and dislikes, or one of them
        names, part = rng.sample(list(TYPE_OF), rng.randint(4, 20)), rng.choice(["both", "both", "likes", "dislikes"])
        half = len(names) // 2
        user = User("", names[:half] * (part != "dislikes"), names[half:] * (part != "likes"))
    if kind == "question":
        facts = {"c": color, "o": obj, "w": wall, "text": text, "taste": profile(user), "likes": ", ".join(user.likes) or "I cannot tell."}
        asked, answer = rng.choices(CONCEPTS["questions"], [1, 1, 1, 4, 4])[0]
        return [{"role": "user", "content": asked.format(**facts)}], answer.format(**facts)
    if kind == "profile" and rng.random() < 0.6:
        attribute = rng.choice(user.likes or [a for a in TYPE_OF if a not in user.dislikes])
    ask = instruction(obj, attribute, rng.randrange(4))
    return prompt(text, guidance, profile(user)), rng.choice(CONCEPTS["chatty"]).format(I=ask, i=ask[0].lower() + ask[1:])

def qwen(a):
    """A new vocabulary for Qwen's byte-level BPE, learned from conversations; the three special tokens stay the last. Then the model: the loss is on answers.
    The initialisation is wide: the logits of a tied head with small embeddings cannot be sure of anything."""
    config, file, rng, texts = Config.read(a.out / "qwen"), str(a.out / "qwen/tokenizer.json"), random.Random(0), []
    for _ in range(5000):
        messages, answer = conversation(rng)
        texts += [answer, *(m["content"] for m in messages), "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "user\n", "assistant\n"]
    bpe, (eos, end) = BPE.from_file(file), config.eos
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=config.vocab - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.save(file)
    torch.set_num_threads(1)                                                           # the matrices are too small to share out
    tokenizer, model = Tokenizer.load(a.out / "qwen"), Qwen(config)
    for name, p in model.named_parameters():
        p.data = torch.ones_like(p) if "norm" in name else torch.zeros_like(p) if name.endswith("bias") else torch.randn_like(p) * (0.4 if "embed" in name else 0.1)
    def loss(_):
        talk = [conversation(random) for _ in range(48)]
        rows = [(tokenizer.chat(messages) if messages else [], tokenizer.encode(answer) + [eos if messages else end]) for messages, answer in talk]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(asked + said) for asked, said in rows], True, end)      # (B, T), padded on the right, where nothing sees it
        mine = nn.utils.rnn.pad_sequence([torch.tensor([False] * len(asked) + [True] * len(said)) for asked, said in rows], True, False)[:, 1:]      # answers only
        return F.cross_entropy(model.lm_head(model.model(ids)[:, :-1][mine]), ids[:, 1:][mine])
    def save(average):                                                                 # the weights as they are: one cycle needs no average
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, a.out / "qwen/model.safetensors", {"format": "pt"})
    fit(a, model, loss, save, 5e-3, cycle=True)

STAGES = {   # what runs it, and the steps of the shipped checkpoints
    "pictures": (pictures, 0), "vae": (vae, 1767), "decoder": (vae, 900), "flux": (flux, 11977), "distil": (flux, 1075), "vit": (vit, 1556), "qwen": (qwen, 4000)}

def main():
    p = argparse.ArgumentParser(description="Pretrain the miniature checkpoints.")
    p.add_argument("stage", choices=list(STAGES))
    p.add_argument("--out", type=Path, default=HERE, help="where flux/, controlnet/, vit/ and qwen/ are written")
    p.add_argument("--work", type=Path, default=HERE / "data", help="pictures and resume points")
    p.add_argument("--scenes", type=int, default=2400, help="scenes to render")
    p.add_argument("--steps", type=int, help="batches to train on (default: the shipped checkpoints')")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    run, steps = STAGES[a.stage]
    a.steps = a.steps or steps
    a.work.mkdir(parents=True, exist_ok=True)
    for part in ("flux", "controlnet", "vit", "qwen"):
        if not (a.out / part).is_dir():                                                # a new --out begins with all that is shipped but the weights
            shutil.copytree(HERE / part, a.out / part, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(a.seed)
    random.seed(a.seed)
    torch.set_flush_denormal(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    run(a)

if __name__ == "__main__":
    main()
