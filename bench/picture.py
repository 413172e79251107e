"""The picture's rows: a step of FLUX.1, the paper's edit loop, reading weights, where an edit's
time goes; against diffusers. A row is a function of run.py's flags that returns Markdown.

Shapes: L image tokens, T text tokens.
"""
import contextlib
import io
import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import text
from clock import (ROOT, draw, gb, in_turn, ms, peak, peak_bytes, rates, ratio, relative,
                   reset_peak, sized, summarise, table, twin, vary, weights_type)

import cdpo
import controlnet
import edit
import flux
import lora
import qwen
from graph import PreferenceGraph, attribute_names, read_users

REAL = dict(                            # FLUX.1-dev
    num_attention_heads=24, attention_head_dim=128, axes_dims_rope=[16, 56, 56],
    num_layers=19, num_single_layers=38, joint_attention_dim=4096, pooled_projection_dim=768,
    in_channels=64, patch_size=1, guidance_embeds=True)
SMALL = dict(                           # the same, an eighth as wide and a fifth as deep
    REAL, num_attention_heads=6, attention_head_dim=64, axes_dims_rope=[8, 28, 28],
    num_layers=4, num_single_layers=8, joint_attention_dim=512)
TINY = dict(                            # the same, to see that it runs
    SMALL, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=[8, 12, 12],
    num_layers=2, num_single_layers=2, joint_attention_dim=64)
WIDE = dict(SMALL, num_attention_heads=16)                  # to read
REAL_NET = dict(REAL, num_layers=5, num_single_layers=10, num_mode=10)
SMALL_NET = dict(SMALL, num_layers=1, num_single_layers=2, num_mode=10)
TINY_NET = dict(TINY, num_layers=1, num_single_layers=1, num_mode=10)
VAE = dict(
    in_channels=3, out_channels=3, latent_channels=16, layers_per_block=2, norm_num_groups=32,
    block_out_channels=[128, 256, 512, 512], act_fn="silu", use_quant_conv=False,
    use_post_quant_conv=False, force_upcast=True, scaling_factor=0.3611, shift_factor=0.1159,
    sample_size=1024)
SMALL_VAE = dict(VAE, block_out_channels=[32, 32, 64, 64])
T5 = dict(
    model_type="t5", d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24,
    feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
    relative_attention_max_distance=128, layer_norm_epsilon=1e-6, vocab_size=32128)
CLIP = dict(
    model_type="clip_text_model", hidden_size=768, intermediate_size=3072,
    num_attention_heads=12, num_hidden_layers=12, max_position_embeddings=77,
    hidden_act="quick_gelu", eos_token_id=2, vocab_size=49408)


def build(module, config, args):
    """Our module of this config with drawn weights."""
    with torch.device("meta"):
        ours = module(config)
    return draw(ours, args)


class Scene:
    """Both sides' Flux over the same drawn weights, and inputs for one picture."""

    def __init__(self, args, **changes):
        import diffusers
        self.args = args
        self.config = {**sized(args, SMALL, REAL, TINY), **changes}
        self.flux = build(flux.Flux, self.config, args)
        self.their_flux = twin(lambda: diffusers.FluxTransformer2DModel(**self.config), self.flux)
        self.generator = torch.Generator().manual_seed(0)
        side = args.size // 8                                               # of the latent
        tokens = side * side // 4
        words = sized(args, 64, 512, 8)
        self.img = self.normal(1, tokens, 64)                               # (1, L, 64)
        self.txt = self.normal(1, words, self.config["joint_attention_dim"])    # (1, T, D)
        self.pooled = self.normal(1, 768)
        self.ids = flux.image_ids(side, side, args.device)                  # (L, 3)
        self.txt_ids = torch.zeros(words, 3, device=args.device)            # (T, 3)
        self.levels = flux.sigmas(args.steps, tokens)

    def normal(self, *shape):
        numbers = torch.randn(*shape, generator=self.generator)
        return numbers.to(self.args.device, weights_type(self.args))

    def inputs(self):
        """Of Flux.forward. Time and guidance such that bf16 holds 1000 of them exactly: diffusers
        rounds there, we do not, and that is not what is compared."""
        timestep = torch.full((1,), 0.5, device=self.args.device)
        guidance = torch.full((1,), 4.0, device=self.args.device)
        return self.img, self.txt, self.pooled, timestep, guidance, self.ids, self.txt_ids

    def our_step(self):
        return self.flux(*self.inputs())

    def their_step(self):
        img, txt, pooled, timestep, guidance, ids, txt_ids = self.inputs()
        (velocity,) = self.their_flux(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled,
            timestep=timestep.to(img), img_ids=ids, txt_ids=txt_ids, guidance=guidance,
            return_dict=False)
        return velocity


class Edit(Scene):
    """A scene with both sides' ControlNet and autoencoder, and edges: the paper's edit. `end`:
    the fraction of the steps after which the ControlNet rests."""

    def __init__(self, args):
        import diffusers
        super().__init__(args)
        config = sized(args, SMALL_NET, REAL_NET, TINY_NET)
        self.net = build(controlnet.ControlNet, config, args)
        net = twin(lambda: diffusers.FluxControlNetModel(**config), self.net)
        config = VAE if args.random else SMALL_VAE
        self.vae = build(flux.VAE, config, vary(args, dtype="float32"))
        last = self.vae.encoder.conv_out        # diffusers draws a sample of the posterior:
        last.weight.data[16:] = 0               # without variance it is the mean
        last.bias.data[16:] = -30
        config = dict(
            config, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4)
        vae = twin(lambda: diffusers.AutoencoderKL(**config), self.vae).to(self.img.dtype)
        schedule = diffusers.FlowMatchEulerDiscreteScheduler(**flux.SCHEDULE)
        self.pipeline = diffusers.FluxControlNetPipeline(
            scheduler=schedule, vae=vae, transformer=self.their_flux, controlnet=net,
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
        self.pipeline.set_progress_bar_config(disable=True)
        drawn = torch.rand(1, 1, args.size, args.size, generator=self.generator) < 0.1
        self.edges = (2.0 * drawn - 1).expand(1, 3, -1, -1).to(args.device)

    @torch.no_grad()
    def ours(self, end=1.0):
        control = flux.pack(self.vae.encode(self.edges)).to(self.img.dtype)
        steering = controlnet.steer(
            self.net, control, self.txt, self.pooled, self.ids, levels=self.levels, guidance=35.0,
            mode=0, scale=0.4, end=end)
        return flux.denoise(
            self.flux, self.img, self.txt, self.pooled, self.ids, levels=self.levels,
            guidance=35.0, control=steering)

    def theirs(self, end=1.0):
        side = self.args.size
        control = dict(control_image=self.edges, control_mode=0, control_guidance_end=end,
                       controlnet_conditioning_scale=0.4)
        return self.pipeline(
            prompt_embeds=self.txt, pooled_prompt_embeds=self.pooled, latents=self.img, **control,
            guidance_scale=35.0, num_inference_steps=self.args.steps, height=side, width=side,
            output_type="latent").images


@torch.no_grad()
def agreement(args):
    """How far the sides are from fp32 and from each other on two double and two single blocks of
    the same width: a line of text."""
    scene = Scene(args, num_layers=2, num_single_layers=2)
    ours = scene.our_step()
    exact = scene.flux.float()(*[x.float() for x in scene.inputs()])
    theirs = scene.their_step()
    return (f"from fp32, two blocks of each kind differ by {relative(ours, exact):.0e} (ours), "
            f"{relative(theirs, exact):.0e} (diffusers), "
            f"from each other by {relative(ours, theirs):.0e}")


def sizes(args):
    name = sized(args, "FLUX.1 at 384 channels, 4 + 8 blocks", "FLUX.1-dev", "a tiny FLUX.1")
    return f"{name}, {args.size} x {args.size} pixels"


def forward_flops(scene):
    """Of a forward of our Flux, from the shapes: two for each weight and token of a linear layer,
    and in each block's attention four for each pair of tokens and channel. (torch's own counter
    does not know oneDNN's products, which qwen.linear calls.)"""
    found = []

    def count(layer, inputs, output):
        found.append(2 * layer.in_features * output.numel())

    hooks = [layer.register_forward_hook(count) for layer in text.linears(scene.flux)]
    scene.our_step()
    for hook in hooks:
        hook.remove()
    tokens = scene.img.shape[1] + scene.txt.shape[1]                        # T + L
    width = scene.flux.x_embedder.out_features
    return sum(found) + 4 * width * tokens ** 2 * len(scene.flux.blocks())


@torch.no_grad()
def step(args):
    """One forward of the transformer, without ControlNet."""
    agree = agreement(args)
    scene = Scene(args)
    img, txt, pooled, timestep, guidance, ids, txt_ids = scene.inputs()
    modulation = scene.flux.modulation(timestep, guidance, pooled)          # once for all steps
    rope = scene.flux.rope(txt_ids, ids)
    within = partial(scene.flux.velocity, img, txt, modulation, rope)
    flops = forward_flops(scene)
    chip, _ = rates(args)
    calls = {"ours": scene.our_step, "ours, as within the loop": within,
             "diffusers": scene.their_step}
    took = in_turn(calls, args, warm=2)
    if args.compile:
        for block in scene.flux.blocks():
            block.compile()
        took |= in_turn({"ours, blocks compiled": within}, args, warm=3)
    rows = []
    for name, t in took.items():
        rate = flops / t
        speed = ratio(took["diffusers"], t)
        share = f"{rate / chip:.0%}"
        rows.append([name, ms(t), speed, f"{rate / 1e12:.3g}", share])
        if name != "diffusers":
            what = f"{sizes(args)}, {name}: {share} of the chip's matrix products"
            summarise(args, what, "diffusers", t, took["diffusers"])
    columns = ["", "a forward", "times the peer's speed", "TFLOP/s",
               "of the chip's own matrix products"]
    return f"{sizes(args)}; {agree}\n\n" + table(columns, rows)


def loop(args):
    """The paper's edit, from noise to a latent, ControlNet in all steps or the first 60 %."""
    agree = agreement(args)
    scene = Edit(args)
    columns = ["ControlNet works in", "ours", "FluxControlNetPipeline", "ratio",
               "latents differ by"]
    if args.random:
        columns += ["memory with both sides' weights, ours", "theirs"]
    rows = []
    for end in (1.0, 0.6):
        ours = partial(scene.ours, end)
        theirs = partial(scene.theirs, end)
        differ = relative(ours(), theirs().float())
        if args.compile:
            for block in scene.flux.blocks() + scene.net.blocks():
                block.compile()
            ours()
        t = in_turn({"ours": ours, "theirs": theirs}, args, warm=0)
        speed = ratio(t["theirs"], t["ours"])
        what = f"{sizes(args)}, {args.steps} steps, ControlNet in 0 .. {end}"
        summarise(args, what, "FluxControlNetPipeline", t["ours"], t["theirs"])
        row = [f"0 .. {end}", ms(t["ours"]), ms(t["theirs"]), speed, f"{differ:.0e}"]
        if args.random:
            for call in (ours, theirs):
                _, most = peak(call, args.device)
                row.append(gb(most))
        rows.append(row)
    return f"{sizes(args)}, {args.steps} steps; {agree}\n\n" + table(columns, rows)


# ---- reading weights ---------------------------------------------------------------------------

def write_flux(folder, args):
    """A Flux transformer as it is published -> bytes of weights."""
    config = TINY if args.tiny else WIDE
    module = build(flux.Flux, config, vary(args, device="cpu"))
    config = {"_class_name": "FluxTransformer2DModel", **config}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(module.state_dict(), file, {"format": "pt"})
    return sum(p.nbytes for p in module.parameters())


def reading(args):
    """Reading weights: a Flux transformer."""
    return text.reading(args, write_flux, "diffusers")


def read_side(args, side):
    """As text.read_side."""
    dtype = weights_type(args)
    like = {"device": args.device, "dtype": dtype}
    img = torch.randn(1, 64, 64, **like)
    width = (TINY if args.tiny else WIDE)["joint_attention_dim"]
    txt = torch.randn(1, 16, width, **like)
    pooled = torch.randn(1, 768, **like)
    one = torch.ones(1, device=args.device)
    ids = torch.zeros(64, 3, device=args.device)

    def read_ours():
        return flux.Flux.load(args.folder, args.device, dtype)

    if side == "ours":
        inputs = img, txt, pooled, one, one, ids, ids[:16]
        return text.first_forward(read_ours, lambda model: model(*inputs), args)
    from diffusers import FluxTransformer2DModel
    inputs = img, txt, pooled, one.to(dtype), ids, ids[:16], one

    def read_theirs():
        model = FluxTransformer2DModel.from_pretrained(args.folder, torch_dtype=dtype)
        return model.to(args.device)
    return text.first_forward(read_theirs, lambda model: model(*inputs), args)


# ---- edit.py itself ----------------------------------------------------------------------------

def configs(args):
    """Of the real models, or of tiny ones, by folder."""
    tiny_qwen = {**text.TINY, "vocab_size": 4096}
    tiny_t5 = {**T5, "d_model": 64, "d_ff": 128, "num_heads": 2, "num_layers": 2}
    tiny_clip = {**CLIP, "intermediate_size": 64, "num_hidden_layers": 1}
    real = [text.REAL, REAL, CLIP, T5, VAE, REAL_NET]
    tiny = [tiny_qwen, TINY, tiny_clip, tiny_t5, SMALL_VAE, TINY_NET]
    qwen, transformer, clip, t5, vae, net = tiny if args.tiny else real
    return {
        "qwen": qwen,
        "flux/transformer": {"_class_name": "FluxTransformer2DModel", **transformer},
        "flux/text_encoder": clip,
        "flux/text_encoder_2": t5,
        "flux/vae": {"_class_name": "AutoencoderKL", **vae},
        "controlnet": {"_class_name": "FluxControlNetModel", **net},
    }


def write_configs(folder, args):
    """The real models' folders without weights; tokenizers are the miniature's."""
    for part in ("flux", "qwen"):
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(ROOT / "mini" / part, folder / part, ignore=weights)
    for part, config in configs(args).items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    for part, length in (("tokenizer", 77), ("tokenizer_2", 512)):
        file = folder / "flux" / part / "tokenizer_config.json"
        config = {**json.loads(file.read_text()), "model_max_length": length}
        file.write_text(json.dumps(config))


def write_policy(folder, people, args):
    """The collaborative part of a policy of the paper's sizes."""
    names = attribute_names(people)
    features = torch.randn(len(names), 64 if args.tiny else 4096)
    graph = PreferenceGraph.build(people, names, features)
    width = 64 if args.tiny else 1024
    soft = dict(hidden_dim=width, out_dim=configs(args)["qwen"]["hidden_size"])
    tokens = cdpo.UserTokens(graph, hidden_dim=width, out_dim=width, soft=soft)
    folder.mkdir()
    tokens.save(folder / "collaborative.safetensors")


def pretend(args, folder):
    """From now on weights are drawn when edit.py loads them, into models of the real sizes that
    stand in `folder` -> the flags of edit.py."""
    def draw_weights(module, path, *rename):
        draw(module, args)

    qwen.load_checkpoint = draw_weights
    flux.load_checkpoint = draw_weights
    controlnet.read_tensors = lambda path: {}
    lora.load_adapter = lambda model, path: lora.inject(model, dropout=0.0)
    write_configs(folder, args)
    people = read_users(ROOT / "mini/sample/users.jsonl")
    write_policy(folder / "policy", people, args)
    flags = ["--preset", "paper", "--user", people[0].name, f"--size={args.size}"]
    flags.append(f"--steps={args.steps}")
    for part in ("qwen", "flux", "controlnet", "policy"):
        flags.append(f"--{part}={folder / part}")
    return flags


def run_edit(args, *flags):
    """edit.py for one person -> {part: (seconds, peak bytes)}."""
    spent = {}
    cuda = args.device.startswith("cuda")

    @contextlib.contextmanager
    def measure(device, name):
        reset_peak(device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        spent[name] = time.perf_counter() - start, peak_bytes(device)
        if cuda:
            torch.cuda.empty_cache()

    edit.measure = measure
    given = ["--user", edit.PERSONAS[0]]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if args.random or args.tiny:
            given = pretend(args, Path(folder))
        edit.main([*given, "--device", args.device, "--out", f"{folder}/edit.png", *flags])
    return spent


def shares(args):
    """Where edit.py's time goes, for one person, reading the weights included; and --offload."""
    run_edit(args)
    spent = run_edit(args)
    whole = sum(took for took, _ in spent.values())
    rows = []
    for name, (took, most) in spent.items():
        rows.append([name, ms(took), f"{took / whole:.1%}", gb(most)])
    for name, (took, most) in run_edit(args, "--offload").items():
        if name.startswith("Flux"):
            rows.append([f"{name}, --offload", ms(took), "", gb(most)])
    models = "FLUX.1-dev and Qwen2.5-7B, weights drawn"
    models = sized(args, "the miniature", models, "tiny models, weights drawn")
    columns = ["part", "time", "share", "peak memory"]
    return f"{ms(whole)}, {models}\n\n" + table(columns, rows)


def painting(args, flag, value):
    """(seconds, peak bytes) of the part of edit.py that draws, medians of args.rounds."""
    runs = []
    for _ in range(1 + args.rounds):
        for name, found in run_edit(args, f"--{flag}={value}").items():
            if name.startswith("Flux"):
                runs.append(found)
    took, most = zip(*runs[1:])
    return statistics.median(took), max(most)


def growth(args):
    """The part of edit.py that draws, against resolution and steps, all else as it has it."""
    grows = {"size": (64, 96, 128, 192), "steps": (10, 20, 40)}
    if args.random:
        grows = {"size": (512, 768, 1024, 1536), "steps": (15, 30, 60)}
    rows = []
    for flag, values in grows.items():
        for value in values:
            took, most = painting(args, flag, value)
            rows.append([flag, value, ms(took), gb(most)])
    columns = ["grows", "to", "Flux + ControlNet", "peak memory"]
    return "weights read included\n\n" + table(columns, rows)
