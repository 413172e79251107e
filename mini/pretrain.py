"""Pretrains the miniature checkpoints from scratch, each by one command, in the public checkpoints' own layouts.

    python mini/pretrain.py pictures     # mini/data/pictures.safetensors: 2,400 scenes, each plain and after 13 edits
    python mini/pretrain.py vae          # mini/flux/vae: the autoencoder
    python mini/pretrain.py flux         # mini/flux/{transformer,text_encoder*,tokenizer*,scheduler} and mini/controlnet, trained together
    python mini/pretrain.py decoder      # mini/flux/vae: the decoder alone goes on; may run beside the stage before
    python mini/pretrain.py distil       # flux's files: classifier-free guidance moves into the guidance embedding, as in FLUX.1-dev
    python mini/pretrain.py controlnet   # mini/controlnet alone, the transformer frozen: another control for a trained Flux
    python mini/pretrain.py vit          # mini/vit: patch features (DINOv2's layout)
    python mini/pretrain_qwen.py         # mini/qwen: the language model

The shipped files are these stages but `controlnet`, in this order, with the default --seed 0 and --minutes (on one thread of two busy cores: about 11 ms
of autoencoder a picture, 9 ms of Flux with its ControlNet a sample). A recipe that learns visibly in ten minutes, and touches nothing shipped:
    M="--out /tmp/mini --work /tmp/mini/data"; for s in "pictures --scenes 400" "vae --minutes 3" "flux --minutes 6"; do python mini/pretrain.py $s $M; done

Every stage is one schedule (warm-up, one cosine), keeps its state in --work once a minute and goes on from there when started again.
Sizes, losses and schedules are ours. Rectified flow: x_t = (1-t) x_0 + t eps, the target is eps - x_0.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import concepts                                                                       # noqa: E402
from controlnet import ControlNet, control_picture                                        # noqa: E402
from flux import T5, VAE, CLIPText, Flux, TextTokenizer, image_ids, pack               # noqa: E402
from patch_dpo import ImageFeatures                                                    # noqa: E402
from render import Geometry                                                            # noqa: E402

MINUTES = {"pictures": 0, "vae": 11, "decoder": 25, "flux": 60, "distil": 10, "controlnet": 20, "vit": 12}     # on one thread of a 2-core machine
SIZE, EDITS = 64, 13                                                                   # pixels; edited pictures a scene
VAE_CONFIG = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": [16, 32, 64], "layers_per_block": 1,
              "norm_num_groups": 8, "act_fn": "silu", "mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
              "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "sample_size": SIZE, "scaling_factor": 1.0, "shift_factor": 0.0}


# ---- pictures ----------------------------------------------------------------------------------------------------------------
def draw_scene(rng, seed):
    """A scene, and what is asked of it: [(prompt, attributes)], first nothing, then eleven single edits and two double ones."""
    scene = {"object": rng.choice(concepts.OBJECTS), "color": rng.choice(concepts.COLORS), "wall": rng.choice(concepts.WALLS), "seed": seed}
    text = concepts.caption(scene["color"], scene["object"], scene["wall"])
    asked = [(text, ())]
    for a in rng.sample(list(concepts.TYPE_OF), EDITS - 2):
        asked.append((f"{text}. {concepts.instruction(scene['object'], a, rng.randrange(4))}", (a,)))
    for _ in range(2):
        first, second = (rng.choice(concepts.ATTRIBUTES[kind]) for kind in rng.sample(list(concepts.ATTRIBUTES), 2))
        joined = " and ".join(concepts.instruction(scene["object"], a, rng.randrange(2)) for a in (first, second))
        asked.append((f"{text}. {joined}", (first, second)))
    return scene, asked


def pictures(a):
    """Renders the training pictures (S, 14, 64, 64, 3) uint8; the prompts stand in the file's metadata."""
    rng, start = random.Random(a.seed), time.time()
    scenes, images = [draw_scene(rng, i) for i in range(a.scenes)], torch.empty(a.scenes, 1 + EDITS, SIZE, SIZE, 3, dtype=torch.uint8)
    for i, (scene, asked) in enumerate(scenes):
        geometry = Geometry(scene, SIZE)
        for j, (_, attributes) in enumerate(asked):
            images[i, j] = torch.from_numpy(geometry.shade(scene["color"], scene["wall"], attributes))
        if i % 400 == 399:
            print(f"{i + 1} scenes, {time.time() - start:.0f} s", flush=True)
    save_file({"pictures": images}, a.work / "pictures.safetensors", {"prompts": json.dumps([[p for p, _ in asked] for _, asked in scenes])})


def read_pictures(a):
    """-> pictures (S, 14, 3, H, W) uint8, prompts [S][14]"""
    if not (a.work / "pictures.safetensors").is_file():
        pictures(a)
    with safe_open(a.work / "pictures.safetensors", "pt") as f:
        return f.get_tensor("pictures").permute(0, 1, 4, 2, 3), json.loads(f.metadata()["prompts"])


def to_unit(images):
    return images.float() / 127.5 - 1                                                  # uint8 -> [-1, 1]


def control(image, mode):
    """uint8 (3, H, W) -> what a ControlNet looks at, uint8 (3, H, W)."""
    return torch.from_numpy(control_picture(image.permute(1, 2, 0).numpy(), mode)).permute(2, 0, 1)


# ---- one loop for all stages -------------------------------------------------------------------------------------------------
class Run:
    """A stage under way: parameters, AdamW, the parameters' running average, steps and training seconds; all of it in `file`, so that it can go on after a stop."""
    def __init__(self, models, lr, file):
        self.parameters, self.lr, self.file = [p for m in models.values() for p in m.parameters() if p.requires_grad], lr, file
        self.optimizer = torch.optim.AdamW(self.parameters, lr, (.9, .99), weight_decay=.01)
        self.step, self.seconds, self.average = 0, 0.0, [p.detach().clone() for p in self.parameters]

    def restore(self):
        saved = torch.load(self.file)
        self.step, self.seconds, self.average = (saved["state"][key] for key in ("step", "seconds", "average"))
        self.optimizer.load_state_dict(saved["optimizer"])
        torch._foreach_copy_([p.data for p in self.parameters], saved["parameters"])

    def store(self):
        state, part = {"step": self.step, "seconds": self.seconds, "average": self.average}, self.file.with_suffix(".part")
        torch.save({"state": state, "optimizer": self.optimizer.state_dict(), "parameters": [p.detach() for p in self.parameters]}, part)
        os.replace(part, self.file)

    def learn(self, loss, done):
        """One step; `done` is the finished share of the schedule: 200 steps of warm-up within one cosine to zero."""
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1, (self.step + 1) / 200) * .5 * (1 + math.cos(math.pi * done))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - min(.998, self.step / (self.step + 9)))

    @contextmanager
    def averaged(self):
        """Within the block the parameters hold their running average."""
        kept = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_([p.data for p in self.parameters], self.average)
        yield
        torch._foreach_copy_([p.data for p in self.parameters], kept)


def fit(name, models, loss_of, a, lr, batch, save):
    """Trains `models` {name: module} on loss_of(generator, batch) for a.minutes of training time, and calls save() with the averaged weights every a.every minutes and at the end.

    Batch k is a function of (seed, k). A stopped run goes on where it was; a finished one does nothing."""
    run, losses, stored, saved = Run(models, lr, a.work / f"{name}.pt"), [], time.time(), time.time()
    if run.file.is_file() and not a.fresh:
        run.restore()
    while run.seconds < 60 * a.minutes:
        start = time.time()
        loss = loss_of(torch.Generator().manual_seed(a.seed * 10 ** 7 + run.step), batch)
        run.learn(loss, run.seconds / (60 * a.minutes))
        losses.append(loss.item())
        run.seconds += time.time() - start
        last = run.seconds >= 60 * a.minutes
        if last or run.step % 100 == 0:
            print(f"{name} step {run.step}: loss {sum(losses[-100:]) / len(losses[-100:]):.4f}, {run.seconds / 60:.1f} of {a.minutes} min", flush=True)
        if last or time.time() - stored > 60:
            run.store()
            stored = time.time()
        if last or time.time() - saved > 60 * a.every:
            with run.averaged():
                save()
            saved = time.time()


def write_json(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")


def publish(folder, model, config, name="diffusion_pytorch_model.safetensors"):
    """One part of a checkpoint: config.json and the weights, in bf16."""
    write_json(folder, config=config)
    save_file({k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}, folder / name, {"format": "pt"})


# ---- the autoencoder ---------------------------------------------------------------------------------------------------------
def vae(a, found=None, noise=.1, sharp=.1, lr=3e-3):
    """Squared error, again for the colour differences, and a little absolute error; a little noise on the latent instead of a KL term: hues survive, the latents stay smooth."""
    torch.manual_seed(a.seed)
    images, model, config = read_pictures(a)[0].flatten(0, 1), found or VAE(VAE_CONFIG), dict(VAE_CONFIG)
    if found:
        config.update(shift_factor=model.shift, scaling_factor=model.scale)
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

    def save():
        z, x = torch.cat([model.encode(to_unit(x)) for x in images[::97].split(64)]), to_unit(images[5::997])
        if not found:
            config.update(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))
        publish(a.out / "flux/vae", model, config)
        print(f"vae: {-10 * math.log10((model.decode(model.encode(x)).clamp(-1, 1) - x).square().mean().item() / 4):.1f} dB", flush=True)
    fit("decoder" if found else "vae", {"vae": model}, loss, a, lr, batch=16, save=torch.no_grad()(save))


def decoder(a):
    """Goes on with the decoder alone: the latents, and a Flux trained on them, stay valid."""
    found = VAE.load(a.out / "flux/vae")
    found.encoder.requires_grad_(False)
    vae(a, found, noise=.05, sharp=.3, lr=1.5e-3)


# ---- the text encoders' tokenizers -------------------------------------------------------------------------------------------
def corpus():
    """Every sentence of the miniature world: after training on them, each of its words is one token, any other word is spelled."""
    for o in concepts.OBJECTS:
        yield from (concepts.caption(c, o, w) for c in concepts.COLORS for w in concepts.WALLS)
        yield from (concepts.instruction(o, a, i) + " and" for a in concepts.TYPE_OF for i in range(4))


def train_tokenizers(folder):
    """tokenizer/ like CLIP's (vocab.json, merges.txt; the end token has the highest id) and tokenizer_2/ like T5's (tokenizer.json)."""
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), words
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict.fromkeys([*trained["vocab"], *(b + "</w>" for b in bytes_), "<|startoftext|>", "<|endoftext|>"])
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer", vocab={token: i for i, token in enumerate(vocab)}, special_tokens_map=special,
               tokenizer_config={"tokenizer_class": "CLIPTokenizer", "model_max_length": WORDS, "do_lower_case": True, "add_prefix_space": False, "errors": "replace", **special})
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in trained["merges"]) + "\n", encoding="utf-8")
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    letters = [chr(c) for c in range(33, 127)]
    pieces.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False))
    ranked = sorted(pieces.get_vocab(), key=pieces.token_to_id)
    t5 = Tokenizer(models.Unigram([(piece, 0.0 if i < 3 else -10 - i / 1e4) for i, piece in enumerate(ranked)], 2, False))    # of near-equal scores, the fewest pieces win
    t5.normalizer, t5.decoder = normalizers.NFKC(), decoders.Metaspace()
    t5.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    t5.add_special_tokens(["<pad>", "</s>", "<unk>"])
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_2", special_tokens_map=special, tokenizer_config={"tokenizer_class": "T5TokenizerFast", "model_max_length": WORDS, "extra_ids": 0, **special})
    t5.save(str(folder / "tokenizer_2/tokenizer.json"))


# ---- Flux, its text encoders and its ControlNet ------------------------------------------------------------------------------
WORDS = 32                                                                             # tokens of a prompt
FLUX_CONFIG = {"_class_name": "FluxTransformer2DModel", "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12], "guidance_embeds": True, "in_channels": 64,
               "joint_attention_dim": 128, "num_attention_heads": 4, "num_layers": 2, "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": 64}
CONTROL_CONFIG = {**FLUX_CONFIG, "_class_name": "FluxControlNetModel", "num_layers": 1, "num_single_layers": 1, "num_mode": 10}
CLIP_CONFIG = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
               "max_position_embeddings": WORDS, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
T5_CONFIG = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "feed_forward_proj": "gated-gelu",
             "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
             "tie_word_embeddings": False, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SCHEDULER_CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
                    "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
MODEL_INDEX = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
               "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
               "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
CANNY, GREY = 0, 5                                                                     # ControlNet-Union's mode numbers


@torch.no_grad()
def latents(a):
    """Packed latents of every picture (S, 14, 64, 64), and of four control pictures a scene: edges and grey of the source, edges of two edits (S, 4, 64, 64)."""
    file = a.work / "latents.safetensors"
    images, prompts = read_pictures(a)
    coder = VAE.load(a.out / "flux/vae")
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
    if a.fresh or not (a.out / "flux/tokenizer_2/tokenizer.json").is_file():             # a resumed run keeps its ids
        train_tokenizers(a.out / "flux")
    words = [TextTokenizer.load(a.out / "flux" / part).backend.get_vocab_size() for part in ("tokenizer", "tokenizer_2")]
    clip, t5 = {**CLIP_CONFIG, "vocab_size": words[0]}, {**T5_CONFIG, "vocab_size": words[1]}
    found = {"transformer": Flux(FLUX_CONFIG), "controlnet": ControlNet(CONTROL_CONFIG), "text_encoder": CLIPText(clip), "text_encoder_2": T5(t5)}
    for name, p in [*found["transformer"].named_parameters(), *found["controlnet"].named_parameters()]:
        if "norm1" in name or "norm.linear" in name or "norm_out" in name:
            nn.init.zeros_(p)
    nn.init.zeros_(found["transformer"].proj_out.weight)
    nn.init.normal_(found["controlnet"].controlnet_x_embedder.weight, std=.1)
    return found


def load_models(folder):
    parts = {"transformer": Flux, "text_encoder": CLIPText, "text_encoder_2": T5}
    found = {name: kind.load(folder / "flux" / name) for name, kind in parts.items()}
    return {**found, "controlnet": ControlNet.load(folder / "controlnet")}


def save_models(a, found):
    clip = {**CLIP_CONFIG, "vocab_size": len(found["text_encoder"].text_model.embeddings.token_embedding.weight)}
    publish(a.out / "flux/transformer", found["transformer"], FLUX_CONFIG)
    publish(a.out / "controlnet", found["controlnet"], CONTROL_CONFIG)
    publish(a.out / "flux/text_encoder", found["text_encoder"], clip, "model.safetensors")
    publish(a.out / "flux/text_encoder_2", found["text_encoder_2"], {**T5_CONFIG, "vocab_size": len(found["text_encoder_2"].shared.weight)}, "model.safetensors")
    write_json(a.out / "flux/scheduler", scheduler_config=SCHEDULER_CONFIG)
    write_json(a.out / "flux", model_index=MODEL_INDEX)


def velocity(found, x, t, guidance, ids, seen, mode, keep):
    """The controlled velocity (B, 64, 64); `keep` (B, 1, 1) is 0 where a sample has no control picture."""
    txt, pooled = found["text_encoder_2"](ids[1]), found["text_encoder"](ids[0])
    places = image_ids(SIZE // 4, SIZE // 4), torch.zeros(WORDS, 3)
    double, single = found["controlnet"](x, seen, txt, pooled, t, guidance, *places, mode=mode)
    return found["transformer"](x, txt, pooled, t, guidance, *places, [r * keep for r in double], [r * keep for r in single]).float()


def flux(a, found=None, teacher=None, train=None, lr=1.5e-3):
    """Text-to-image and edits together: the prompt asks, the control picture is mostly the source's, so the net learns to follow edges while the words say otherwise.

    Of the samples 10 % have no words (for classifier-free guidance), 10 % no control. With a `teacher` the target is its guided velocity."""
    found = found or new_models(a)
    targets, controls, prompts = latents(a)
    tokenizers = TextTokenizer.load(a.out / "flux/tokenizer"), TextTokenizer.load(a.out / "flux/tokenizer_2")
    words = [tokenizer([""] + [p for scene in prompts for p in scene]) for tokenizer in tokenizers]               # row 0: no words

    def loss(g, batch):
        scene, which = torch.randint(len(targets), (batch,), generator=g), torch.randint(1 + EDITS, (batch,), generator=g)
        x0, eps = targets[scene, which].float(), torch.randn(batch, 64, 64, generator=g)
        t = torch.sigmoid(torch.randn(batch, generator=g) * 1.1 + .3)                                              # logit-normal
        kind = torch.multinomial(torch.tensor([.70, .14, .08, .08]), batch, replacement=True, generator=g)
        mode = torch.where(kind == 1, GREY, CANNY)
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
    fit("distil" if teacher else "controlnet" if train else "flux", {name: found[name] for name in train or found}, loss, a, lr, batch=32,
        save=lambda: save_models(a, found))


def distil(a):
    """The student sees the guidance g ~ U(1, 6) and learns the teacher's v_plain + g (v_asked - v_plain): one pass instead of two."""
    kept = a.work / "teacher"
    if a.fresh or not (a.work / "distil.pt").is_file():                                 # a stopped run goes on with the teacher it had
        for part in ("flux", "controlnet"):
            shutil.copytree(a.out / part, kept / part, dirs_exist_ok=True)
    flux(a, load_models(kept), load_models(kept), lr=4e-4)


def controlnet(a):
    """A new ControlNet for the trained Flux, which stays as it is."""
    found = {**load_models(a.out), "controlnet": new_models(a)["controlnet"]}
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        found[name].requires_grad_(False)
    flux(a, found, train=["controlnet"])


# ---- a small ViT -------------------------------------------------------------------------------------------------------------
VIT_CONFIG = {"architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 4, "patch_size": 8,
              "image_size": SIZE, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "qkv_bias": True, "use_swiglu_ffn": False}
PIXELS = {"image_mean": [.5, .5, .5], "image_std": [.25, .25, .25], "do_resize": False, "do_normalize": True, "image_processor_type": "BitImageProcessor"}


def vit(a):
    """Names what a picture shows (object, colours, attributes) from its class token, and from every patch, of which 30 % are hidden, the patch's own pixels, coarsely:
    features of patches that know both what they look like and what they belong to."""
    torch.manual_seed(a.seed)
    images, prompts = read_pictures(a)
    names = concepts.OBJECTS + [f"A {c} " for c in concepts.COLORS] + [f" {w} wall" for w in concepts.WALLS] + list(concepts.TYPE_OF)
    labels = torch.tensor([[[float(name in prompt) for name in names] for prompt in scene] for scene in prompts])   # (S, 14, names)
    model = ImageFeatures(VIT_CONFIG, PIXELS["image_mean"], PIXELS["image_std"])
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

    def save():
        publish(a.out / "vit", model, VIT_CONFIG, "model.safetensors")
        write_json(a.out / "vit", preprocessor_config=PIXELS)
    fit("vit", {"vit": model, "heads": heads}, loss, a, lr=1.5e-3, batch=32, save=save)


def main():
    p = argparse.ArgumentParser(description="Pretrain the miniature checkpoints.")
    p.add_argument("stage", choices=list(MINUTES))
    p.add_argument("--out", type=Path, default=HERE, help="where flux/, controlnet/ and vit/ are written")
    p.add_argument("--work", type=Path, default=HERE / "data", help="pictures, latents and resume points")
    p.add_argument("--minutes", type=float, help="training time (default: the shipped checkpoints')")
    p.add_argument("--every", type=float, default=10, help="minutes between checkpoints in --out")
    p.add_argument("--scenes", type=int, default=2400, help="scenes to render")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--fresh", action="store_true", help="start again instead of going on")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.minutes = MINUTES[a.stage] if a.minutes is None else a.minutes
    a.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    globals()[a.stage](a)

if __name__ == "__main__":
    main()
