"""The picture's rows: a step of FLUX.1, the paper's edit loop, reading weights, where an edit's time goes; against diffusers."""
import contextlib
import io
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import text
from clock import ROOT, draw, gb, in_turn, ms, peak, rates, relative, resident, table, twin, vary

import cdpo
import controlnet
import edit
import flux
import lora
import qwen
from graph import PreferenceGraph, attribute_names, read_users

# FLUX.1-dev and ControlNet-Union; and the same, an eighth as wide and a fifth as deep
REAL = dict(num_attention_heads=24, attention_head_dim=128, axes_dims_rope=[16, 56, 56], num_layers=19, num_single_layers=38, joint_attention_dim=4096, pooled_projection_dim=768,
            in_channels=64, patch_size=1, guidance_embeds=True)
SMALL = {**REAL, "num_attention_heads": 6, "attention_head_dim": 64, "axes_dims_rope": [8, 28, 28], "num_layers": 4, "num_single_layers": 8, "joint_attention_dim": 512}
NET = {True: dict(num_layers=5, num_single_layers=10, num_mode=10), False: dict(num_layers=1, num_single_layers=2, num_mode=10)}
VAE = dict(in_channels=3, out_channels=3, latent_channels=16, layers_per_block=2, norm_num_groups=32, act_fn="silu", use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
           scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024)
T5 = dict(model_type="t5", d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
          relative_attention_max_distance=128, layer_norm_epsilon=1e-6, vocab_size=32128)
CLIP = dict(model_type="clip_text_model", hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, max_position_embeddings=77, hidden_act="quick_gelu",
            eos_token_id=2, vocab_size=49408)

def build(module, config, args):
    with torch.device("meta"):
        return draw(module(config), args)

class Scene:
    """Both sides' Flux and ControlNet over the same drawn weights, and inputs for one picture."""

    def __init__(self, args, net=True, **changes):
        import diffusers
        self.args, real = args, args.random
        config = {**(REAL if real else SMALL), **changes}
        self.flux = build(flux.Flux, config, args)
        self.their_flux = twin(lambda: diffusers.FluxTransformer2DModel(**config), self.flux)
        h, g = args.size // 8, torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=g).to(args.device, getattr(torch, args.dtype))
        self.img, self.txt, self.pooled = normal(1, h * h // 4, 64), normal(1, 512 if real else 64, config["joint_attention_dim"]), normal(1, 768)
        self.ids, self.txt_ids, self.levels = flux.image_ids(h, h, args.device), torch.zeros(self.txt.shape[1], 3, device=args.device), flux.sigmas(args.steps, h * h // 4)
        if net:
            self.net = build(controlnet.ControlNet, {**config, **NET[real]}, args)
            self.their_net = twin(lambda: diffusers.FluxControlNetModel(**config | NET[real]), self.net)
            self.autoencoders(diffusers, [128, 256, 512, 512] if real else [32, 32, 64, 64], g)

    def autoencoders(self, diffusers, widths, g):
        args = vary(self.args, dtype="float32")
        self.vae = build(flux.VAE, {**VAE, "block_out_channels": widths}, args)
        last = self.vae.encoder.conv_out                                        # diffusers draws a sample: without variance, the mean
        last.weight.data[16:], last.bias.data[16:] = 0, -30
        kinds = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        vae = twin(lambda: diffusers.AutoencoderKL(**VAE, **kinds, block_out_channels=widths), self.vae).to(self.img.dtype)
        schedule = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
        self.edges = 2 * (torch.rand(1, 1, self.args.size, self.args.size, generator=g) < 0.1).float().expand(1, 3, -1, -1).to(self.args.device) - 1
        self.pipeline = diffusers.FluxControlNetPipeline(schedule, vae, None, None, None, None, self.their_flux, self.their_net)
        self.pipeline.set_progress_bar_config(disable=True)

    def inputs(self):
        """Of Flux.forward. Time and guidance such that bf16 holds 1000 of them exactly: diffusers rounds there, we do not, and that is not what is compared."""
        return self.img, self.txt, self.pooled, *(torch.full((1,), x, device=self.args.device) for x in (0.5, 4.0)), self.ids, self.txt_ids

    def their_step(self):
        img, txt, pooled, t, guidance, ids, txt_ids = self.inputs()
        return self.their_flux(img, txt, pooled, t.to(img), ids, txt_ids, guidance, return_dict=False)[0]

    def ours(self, end=1.0):
        """The paper's edit: guidance 35, ControlNet at 0.4."""
        with torch.no_grad():
            control = flux.pack(self.vae.encode(self.edges)).to(self.img.dtype)
            steer = controlnet.steer(self.net, control, self.txt, self.pooled, self.ids, self.levels, 35.0, 0, 0.4, end=end)
            return flux.denoise(self.flux, self.img, self.txt, self.pooled, self.ids, self.levels, 35.0, control=steer)

    def theirs(self, end=1.0):
        side = self.args.size
        return self.pipeline(prompt_embeds=self.txt, pooled_prompt_embeds=self.pooled, control_image=self.edges, control_mode=0, controlnet_conditioning_scale=0.4, guidance_scale=35.0,
                             control_guidance_end=end, num_inference_steps=self.args.steps, latents=self.img, height=side, width=side, output_type="latent").images

@torch.no_grad()
def correct(args):
    """How far the sides are from fp32 and from each other on two double and two single blocks of the same width: a line of text."""
    s = Scene(args, net=False, num_layers=2, num_single_layers=2)
    ours = s.flux(*s.inputs())
    exact = s.flux.float()(*(x.float() for x in s.inputs()))
    theirs = s.their_step()
    return f"from fp32, two blocks of each kind differ by {relative(ours, exact):.0e} (ours), {relative(theirs, exact):.0e} (diffusers), from each other by {relative(ours, theirs):.0e}"

def sizes(args):
    return f"{'FLUX.1-dev' if args.random else 'FLUX.1 at 384 channels, 4 + 8 blocks'}, {args.size} x {args.size} pixels"

@torch.no_grad()
def step(args):
    """One forward of the transformer, without ControlNet."""
    agree, s = correct(args), Scene(args, net=False)
    img, txt, pooled, t, guidance, ids, txt_ids = s.inputs()
    modulation, rope = s.flux.modulation(t, guidance, pooled), s.flux.rope(txt_ids, ids)
    with FlopCounterMode(display=False) as counter:
        s.flux(*s.inputs())
    within = lambda: s.flux.velocity(img, txt, modulation, rope)
    times = in_turn({"ours": lambda: s.flux(*s.inputs()), "ours, as within the loop": within, "diffusers": s.their_step}, args, warm=2)
    if args.compile:
        [block.compile() for block in s.flux.blocks()]
        times["ours, blocks compiled"] = in_turn({0: within}, args, warm=3)[0]
    flops, rate = counter.get_total_flops(), rates(args)[0]
    rows = [[n, ms(x), f"**{times['diffusers'] / x:.2f}**", f"{flops / x / 1e12:.3g}", f"{flops / x / rate:.0%}"] for n, x in times.items()]
    return f"{sizes(args)}; {agree}\n\n" + table(["", "a forward", "times the peer's speed", "TFLOP/s", "of the chip's own matrix products"], rows)

def loop(args):
    """The paper's edit, from noise and the edges' latents to a latent, ControlNet in every step or in the first 60 %."""
    agree, s, rows = correct(args), Scene(args), []
    for end in (1.0, 0.6):
        differ = relative(s.ours(end), s.theirs(end).float())
        if args.compile:
            [block.compile() for net in (s.flux, s.net) for block in net.blocks()]
            s.ours(end)
        t = in_turn({"ours": lambda: s.ours(end), "diffusers": lambda: s.theirs(end)}, args, warm=0)
        most = {n: peak(f, args.device)[1] for n, f in (("ours", s.ours), ("diffusers", s.theirs))} if args.random else {}
        rows.append([f"0 .. {end}", ms(t["ours"]), ms(t["diffusers"]), f"**{t['diffusers'] / t['ours']:.2f}**", f"{differ:.0e}", *map(gb, most.values())])
    return f"{sizes(args)}, {args.steps} steps; {agree}\n\n" + table(["ControlNet works in", "ours", "FluxControlNetPipeline", "ratio", "latents differ by"]
                                                                      + ["memory with both sides' weights, ours", "theirs"] * args.random, rows)

# ---- reading weights ---------------------------------------------------------------------------------------------------------
WIDE = {**SMALL, "num_attention_heads": 16}

def reading(args):
    """Reading weights: a Flux transformer."""
    def write(folder):
        module = build(flux.Flux, WIDE, vary(args, device="cpu"))
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **WIDE}))
        save_file(module.state_dict(), Path(folder) / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return module
    return text.reading(args, write, "diffusers")

def read_side(args, which):
    normal = lambda *shape: torch.randn(*shape).to(args.device, getattr(torch, args.dtype))
    img, txt, pooled, t, ids = normal(1, 64, 64), normal(1, 16, WIDE["joint_attention_dim"]), normal(1, 768), torch.ones(1, device=args.device), torch.zeros(64, 3, device=args.device)
    if which == "ours":
        return text.first_forward(lambda: flux.Flux.load(args.folder, args.device, getattr(torch, args.dtype)), lambda m: m(img, txt, pooled, t, t, ids, ids[:16]), args)
    from diffusers import FluxTransformer2DModel
    return text.first_forward(lambda: FluxTransformer2DModel.from_pretrained(args.folder, torch_dtype=getattr(torch, args.dtype)).to(args.device),
                              lambda m: m(img, txt, pooled, t.to(img), ids, ids[:16], t), args)

# ---- edit.py itself ----------------------------------------------------------------------------------------------------------
def pretend(args, at):
    """Folders at `at` with the real models' config.json and no weights, which from now on are drawn when edit.py loads them -> its flags."""
    parts = {"qwen": {**text.COMMON, **text.SHAPES[True]}, "flux/transformer": {"_class_name": "FluxTransformer2DModel", **REAL}, "flux/text_encoder": CLIP, "flux/text_encoder_2": T5,
             "flux/vae": {"_class_name": "AutoencoderKL", **VAE, "block_out_channels": [128, 256, 512, 512]}, "controlnet": {"_class_name": "FluxControlNetModel", **REAL, **NET[True]}}
    shutil.copytree(ROOT / "mini/flux", at / "flux", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(ROOT / "mini/qwen", at / "qwen", ignore=shutil.ignore_patterns("*.safetensors"))
    for part, config in parts.items():
        (at / part).mkdir(parents=True, exist_ok=True)
        (at / part / "config.json").write_text(json.dumps(config))
    for part, length in (("tokenizer", 77), ("tokenizer_2", 512)):
        file = at / "flux" / part / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": length}))
    qwen.load_checkpoint = flux.load_checkpoint = lambda module, path, rename=None: draw(module, args)
    controlnet.read_tensors = lambda path: {}
    lora.load_adapter = lambda model, folder: lora.inject(model, dropout=0.0)
    people = read_users(ROOT / "mini/sample/users.jsonl")
    names = attribute_names(people)
    tokens = cdpo.UserTokens(PreferenceGraph.build(people, names, torch.randn(len(names), 4096)), hidden_dim=1024, out_dim=1024, soft=dict(hidden_dim=1024, out_dim=text.SHAPES[True]["hidden_size"]))
    (at / "policy").mkdir()
    tokens.save(at / "policy" / "collaborative.safetensors")
    return ["--preset", "paper", "--user", people[0].name, *(f"--{part}={at / part}" for part in ("qwen", "flux", "controlnet", "policy")), f"--size={args.size}"]

def run_edit(args, *flags):
    """edit.py for one person -> {stage: (seconds, peak bytes)}."""
    spent = {}

    @contextlib.contextmanager
    def stage(name):
        cuda = args.device.startswith("cuda")
        torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        spent[name] = time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
        if cuda:
            torch.cuda.empty_cache()
    edit.meter = lambda device, name: stage(name)
    with tempfile.TemporaryDirectory() as at, contextlib.redirect_stdout(io.StringIO()):
        given = pretend(args, Path(at)) if args.random else ["--user", edit.PERSONAS[0]]
        edit.main([*given, "--device", args.device, "--out", f"{at}/edit.png", *flags])
    return spent

def stages(args):
    """Where edit.py's time goes, for one person, reading the weights included."""
    run_edit(args)
    spent = run_edit(args)
    whole = sum(s for s, _ in spent.values())
    return f"{ms(whole)}, {'FLUX.1-dev and Qwen2.5-7B, weights drawn' if args.random else 'the miniature'}\n\n" + table(
        ["stage", "time", "share", "peak memory"], [[n, ms(s), f"{s / whole:.1%}", gb(most)] for n, (s, most) in spent.items()])

def growth(args):
    """The stage that draws, against resolution and steps, all else as edit.py has it."""
    rows = []
    for flag, values in (("size", (512, 768, 1024, 1536) if args.random else (64, 96, 128, 192)), ("steps", (15, 30, 60) if args.random else (10, 20, 40))):
        for value in values:
            times = [next(s for n, s in run_edit(args, f"--{flag}={value}").items() if n.startswith("Flux")) for _ in range(1 + args.rounds)]
            rows.append([flag, value, ms(statistics.median(s for s, _ in times[1:])), gb(max(m for _, m in times[1:]))])
    return "weights read included\n\n" + table(["grows", "to", "Flux + ControlNet", "peak memory"], rows)
