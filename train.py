"""Every training stage, and the tables that compare them.

    python train.py graph                    # preference graph + GraphSAGE -> runs/graph
    python train.py sft                      # supervised fine-tuning on generic edits -> runs/sft
    python train.py cdpo                     # collaborative DPO from both -> runs/cdpo
    python train.py patch --loss start --out runs/image_prompt   # an image prompt for Flux: reference pictures beside the text
    python train.py patch                    # PatchDPO on it -> runs/patch
    python train.py dro                      # Diffusion-DRO, a LoRA for Flux -> runs/dro
    python train.py eval --seeds 3           # trains the baselines too; Markdown tables
    torchrun --nproc_per_node=3 train.py cdpo --preset paper     # the paper's Table 12 on real weights

Baselines are flags: `cdpo --user none` is DPO-Vanilla, `cdpo --user id` DPO-User, `cdpo --lam 0` C-DPO without its neighbours' term.

One loop serves every stage. What it promises:
- The global batch is the same for any number of processes; its rows and every random draw are functions of (seed, step), so there is no
  generator state to save and a resumed run is bit-equal to an uninterrupted one. A micro-batch draws its dropout from (seed, step, number of the
  micro-batch): with the same --micro, 1, 2 or 4 processes drop the same. Gradients of the small trainable set are summed by hand, without DDP.
- A checkpoint OUT/step_N appears whole or not at all. SIGINT and SIGTERM end the run after the current step, saved; the same command goes on.
- A loss or gradient that is not finite ends the run before the step is taken, with the batch named.
"""
import argparse
import copy
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import cdpo
import controlnet
import graph
import lora
from flux import VAE, Flux, denoise, encode_prompt, image_ids, pack, sigmas, to_picture, to_tensor, unpack
from patch_dpo import ImageFeatures, ImagePrompt, correspondence, diffusion_dpo_loss, dro_loss, hpatches, patch_dpo_loss, patch_quality, patch_weights, random_views, record, s_patch, self_supervised_loss, warp
from qwen import Qwen, Tokenizer, embed_texts, resolve

# ------------------------------------------------------------------------------------------------ flags
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A preset is a dict of flag values for each stage, nothing more. "paper" is Table 12 where it speaks; its silence is filled as marked.
PRESETS = {
    "mini": {
        "graph": dict(embedder="mini/qwen", hidden=64, out_dim=64, steps=300, lr=5e-3, weight_decay=1e-2, drop=0.9, feature_norm=4.0),
        "sft": dict(qwen="mini/qwen", steps=400, batch=32, micro=16, lr=5e-3, warmup=10, dropout=0.05),
        "cdpo": dict(qwen="mini/qwen", steps=1200, batch=32, micro=16, lr=1e-2, gnn_lr=1e-3, warmup=20, lam=0.5, k=3, similarity="likes", neighbours="sampled", tokens=4,
                     soft_hidden=128, beta=0.2, nll=8.0, drop=0.9),
        "patch": dict(size=64, steps=150, batch=16, micro=16, lr=1e-3, warmup=10, beta=100.0),
        "dro": dict(size=64, steps=100, batch=8, micro=8, lr=1e-3, warmup=10),
        "eval": dict(guidance=3.5, control_scale=1.0, picture_steps=20, strength=0.8),
    },
    "paper": {
        "graph": dict(embedder="Linq-AI-Research/Linq-Embed-Mistral", hidden=1024, out_dim=1024, steps=150, lr=3e-5, weight_decay=0.0, drop=0.0, feature_norm=0.0),
        "sft": dict(qwen="Qwen/Qwen2.5-7B-Instruct", dtype="bf16", checkpointing=True, steps=9375, batch=16, micro=4, lr=2e-6, warmup=0, dropout=0.05),
        "cdpo": dict(qwen="Qwen/Qwen2.5-7B-Instruct", dtype="bf16", checkpointing=True, steps=3000, batch=12, micro=2, lr=2e-7, gnn_lr=2e-8, warmup=0, lam=0.15, k=3,
                     similarity="shared", tokens=8, soft_hidden=1024, nll=0.0, drop=0.0),   # ours: soft_hidden, beta, warmup, clip
        # PatchDPO's and Diffusion-DRO's published runs, on Flux where theirs were on Stable Diffusion; ours: the features, dtype, cosine, LoRA, beta (Flow-GRPO's)
        "patch": dict(flux="black-forest-labs/FLUX.1-dev", features="facebook/dinov2-base", dtype="bf16", checkpointing=True, size=512, samples=1, steps=30000, batch=32,
                      micro=1, lr=3e-5, weight_decay=0.01, clip=0.0, beta=100.0),
        "dro": dict(flux="black-forest-labs/FLUX.1-dev", features="facebook/dinov2-base", dtype="bf16", checkpointing=True, size=512, steps=1600, batch=256, micro=4, buffer=256,
                    lr=1e-4, weight_decay=0.01, clip=1.0),
        "eval": dict(qwen="Qwen/Qwen2.5-7B-Instruct", flux="black-forest-labs/FLUX.1-dev", controlnet="InstantX/FLUX.1-dev-Controlnet-Union", dtype="bf16",
                     guidance=35.0, control_scale=0.4, picture_steps=60, strength=1.0),
    },
}
FLAGS = {   # group -> (flag, stages, type or choices, default, help)
    "files": [
        ("scenes", "patch dro eval", str, "mini/data/scenes.jsonl", "pictures, edits and their true pictures; in training the last --held-out scenes only evaluate"),
        ("image-prompt", "patch", str, "mini/image_prompt/image_prompt.safetensors", "image prompt to begin with; --loss start trains one from nothing"),
        ("generated", "patch", str, "", "generated pictures and their patch quality, read when they are there, else written there; OUT/generated when not given"),
        ("out", "sft graph cdpo patch dro eval", str, "", "folder to write; runs/STAGE when not given"),
        ("users", "graph cdpo eval", str, "mini/data/users.jsonl", "training users"),
        ("pairs", "cdpo eval", str, "mini/data/pairs.jsonl", "preference pairs of the training users"),
        ("edits", "sft eval", str, "mini/data/edits.jsonl", "generic edits in InstructPix2Pix's format"),
        ("users-test", "eval", str, "mini/data/users_test.jsonl", "held-out users"),
        ("pairs-test", "eval", str, "mini/data/pairs_test.jsonl", "their pairs; only the captions are read"),
        ("sft", "cdpo eval", str, "runs/sft", "SFT adapter: where the policy starts and what the reference stays"),
        ("graph", "cdpo eval", str, "runs/graph", "folder of the graph stage"),
    ],
    "model": [
        ("flux", "patch dro eval", str, "mini/flux", "FLUX.1: folder or hub repository"),
        ("features", "patch dro", str, "mini/vit", "image features f: DINOv2 or ViT"),
        ("qwen", "sft cdpo eval", str, "mini/qwen", "language model: folder or hub repository"),
        ("dtype", "sft cdpo patch dro eval", ("fp32", "bf16"), "fp32", "of the frozen weights; what is trained is always fp32"),
        ("device", "sft graph cdpo patch dro eval", str, "", "cpu, cuda, cuda:1 ...; the best there is when not given"),
        ("checkpointing", "sft cdpo patch dro", bool, False, "recompute each layer in the backward pass: less memory, a third more time"),
        ("chunk", "sft cdpo", int, 4096, "answer tokens that meet the vocabulary at once"),
        ("rank", "sft dro", int, 16, "LoRA rank; alpha is --alpha"),
        ("alpha", "sft dro", int, 32, "LoRA alpha"),
        ("dropout", "sft", float, 0.05, "LoRA dropout; DPO runs without, as in TRL"),
    ],
    "graph": [
        ("embedder", "graph", str, "mini/qwen", "Qwen or Mistral folder that embeds the attributes' names"),
        ("feature-norm", "graph", float, 0.0, "centre the name embeddings and scale them to this length (ours); 0 leaves them as they are"),
        ("hidden", "graph", int, 64, "width of the first SAGE layer and of the edge decoder"),
        ("out-dim", "graph", int, 64, "width of h_u"),
        ("unsigned", "graph", bool, False, "the paper's reading: one kind of edge, likes and dislikes alike"),
        ("drop", "graph cdpo", float, 0.0, "chance that a user's node vector is left out of a step, as a new user's is (ours)"),
    ],
    "preferences": [
        ("user", "cdpo", ("graph", "id", "none"), "graph", "what the policy sees of the user: C-DPO, DPO-User, DPO-Vanilla"),
        ("lam", "cdpo", float, 0.15, "lambda, weight of the neighbours' term (with --user graph only)"),
        ("k", "cdpo", int, 3, "similar users"),
        ("similarity", "cdpo", ("shared", "signed", "likes"), "shared", "what they share: anything named (the letter of Eq. 6), agreements less clashes, likes"),
        ("neighbour-user", "cdpo", ("target", "neighbour"), "target", "whose soft tokens a neighbour's pair is read with; the paper leaves it open"),
        ("neighbours", "cdpo", ("exact", "sampled"), "exact", "all k a step, or one drawn in proportion to similarity: unbiased, twice the cost of none"),
        ("beta", "cdpo patch", float, 0.1, "DPO's temperature (not in the paper; TRL's default)"),
        ("nll", "cdpo", float, 0.0, "weight of the chosen answer's mean token loss beside Eq. 7 (ours): holds the sentence together at large learning rates"),
        ("tokens", "cdpo", int, 8, "soft tokens"),
        ("soft-hidden", "cdpo", int, 128, "hidden width of the soft-token MLP"),
    ],
    "pictures": [
        ("loss", "patch", ("patch", "reconstruction", "dpo", "dro", "start"), "patch", "PatchDPO; or equal weights, Diffusion-DPO, Diffusion-DRO; or pretraining of an image prompt"),
        ("power", "patch", int, 2, "of the weight: 2 the paper's formula, 1 the authors' code"),
        ("weights", "patch", ("minmax", "clip"), "minmax", "how quality becomes a weight (ours)"),
        ("feature-steps", "patch", int, 0, "self-supervised patch training of f before it judges (ours)"),
        ("feature-lr", "patch", float, 1e-4, "of it"),
        ("hpatches", "patch", str, "", "folder of HPatches sequences on which S_patch is measured; held-out scenes and warped edits when not given"),
        ("samples", "patch", int, 2, "generated pictures for each prompt and reference"),
        ("types", "dro", str, "color,pattern,material,background,lighting,object", "edit types to learn"),
        ("margin", "patch dro", float, 1e-3, "Diffusion-DRO's margin"),
        ("refresh", "patch dro", int, 1, "M: steps between copies of the policy into the sampler, each with a new buffer"),
        ("buffer", "patch dro", int, 16, "trajectories in the buffer"),
        ("held-out", "patch dro", int, 4, "scenes at the end of the file that only evaluate"),
        ("size", "patch dro", int, 512, "side of the pictures in pixels"),
        ("guidance", "patch dro eval", float, 3.5, "guidance of painted pictures"),
        ("train-guidance", "patch dro", float, 1.0, "guidance inside the losses and on DRO's trajectories; 1 is none (ours)"),
        ("paint-steps", "patch dro", int, 20, "Euler steps of a painted picture"),
    ],
    "optimisation": [
        ("steps", "sft graph cdpo patch dro", int, 150, "optimiser steps (graph: epochs)"),
        ("batch", "sft cdpo patch dro", int, 32, "global batch, whatever the number of processes"),
        ("micro", "sft cdpo patch dro", int, 16, "rows of one forward pass; a batch of several is accumulated"),
        ("lr", "sft graph cdpo patch dro", float, 5e-3, "peak learning rate (AdamW)"),
        ("gnn-lr", "cdpo", float, 5e-4, "of the graph encoder"),
        ("warmup", "sft cdpo patch dro", int, 0, "steps of linear warm-up before the cosine"),
        ("weight-decay", "sft graph cdpo patch dro", float, 0.0, "AdamW's; in the graph stage of the user vectors only"),
        ("clip", "sft graph cdpo patch dro", float, 1.0, "largest gradient norm; 0 never clips"),
        ("seed", "sft graph cdpo patch dro", int, 0, "of everything random"),
        ("save-every", "sft graph cdpo patch dro", int, 50, "steps between resume points"),
    ],
    "evaluation": [
        ("half", "eval", ("both", "text", "pictures"), "both", "which tables: what the instructions ask for, what the pictures show"),
        ("controlnet", "eval", str, "mini/controlnet", "ControlNet-Union of the pictures"),
        ("control-scale", "eval", float, 0.4, "its weight"),
        ("picture-steps", "eval", int, 60, "Euler steps of a picture"),
        ("strength", "eval", float, 1.0, "1 draws from noise, held by the edges alone; less starts from the noised source"),
        ("seeds", "eval", int, 3, "training runs of each method"),
        ("answers", "eval", int, 3, "instructions sampled for each caption of each held-out user"),
        ("sweep", "eval", str, "", "train and print sweeps in place of the methods: some of lam,k,similarity,neighbour-user,neighbours"),
        ("short", "eval", int, 0, "steps of each training run, where the preset's are too many"),
    ],
}
FREE = {"device", "save_every", "out", "checkpointing"}      # may differ when a run is continued


def parse(argv=None):
    """Flags of one stage, as a namespace; the preset's values are the defaults."""
    top = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = top.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for stage, text in (("sft", "supervised fine-tuning of a LoRA adapter on generic edits"), ("graph", "pretrain GraphSAGE on like or dislike"),
                        ("cdpo", "collaborative DPO and its baselines"),
                        ("patch", "an image prompt for Flux: PatchDPO and what it is compared with"), ("dro", "Diffusion-DRO: a LoRA for Flux"), ("eval", "train, sample, compare; Markdown tables")):
        p = stages.add_parser(stage, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--preset", choices=list(PRESETS), default="mini", help="flag values of the miniature, or of the paper's Table 12")
        for title, flags in FLAGS.items():
            group = p.add_argument_group(title)
            for flag, where, kind, default, text in flags:
                if stage in where.split():
                    how = dict(action="store_true") if kind is bool else dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind)
                    group.add_argument(f"--{flag}", default=default, help=text, **how)
        early = argparse.ArgumentParser(add_help=False)
        early.add_argument("--preset", default="mini")
        p.set_defaults(**PRESETS.get(early.parse_known_args(argv)[0].preset, {}).get(stage, {}))
    args = top.parse_args(argv)
    args.out = args.out or f"runs/{args.stage}"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("steps", "batch", "micro", "k", "rank", "chunk", "save_every", "seeds", "answers"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


# ------------------------------------------------------------------------------------------------ processes and random draws
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def join(args):
    """Join torchrun's group when there is one: nccl on CUDA (a GPU for each process), gloo on CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = args.device.startswith("cuda")
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo")


def generator(*what):
    """A torch generator that depends on `what` (seed, step, ...) alone."""
    return torch.Generator().manual_seed(number(*what))


def number(*what):
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7])


@functools.lru_cache(4)
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def order(n, batch, seed, step):
    """Which of n items make up the batch of `step`: epoch after epoch, each shuffled by (seed, epoch)."""
    return [shuffled(n, seed, i // n)[i % n] for i in range(step * batch, (step + 1) * batch)]


# ------------------------------------------------------------------------------------------------ files
def publish(folder, write, why):
    """`write(temporary folder)`, then move the result to `folder` (new), or its files into it, so that a reader sees all of it or none."""
    temporary = (folder if folder.is_dir() else folder.parent) / f".tmp_{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if folder.exists():
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
            temporary.rmdir()
        else:
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"could not write {why} to {folder}: {e}; what was saved before is intact") from None


def lock(out):
    """Keep `out` to this run; the lock goes when the process does, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{out} is being written by another run (process {file.read().strip() or 'unknown'})") from None
    except OSError as e:
        raise ValueError(f"cannot write to {out}: {e}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def digest(*paths):
    """One hash of files and folders: names, sizes and contents (of a file over 64 MB its first MB); of a hub repository its name."""
    h = hashlib.sha256()
    for path in map(Path, paths):
        h.update(b"" if path.exists() else str(path).encode())
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and file.suffix in (".json", ".jsonl", ".safetensors"):
                with open(file, "rb") as f:
                    h.update(f"{file.name} {file.stat().st_size}".encode() + f.read(-1 if file.stat().st_size < 2 ** 26 else 2 ** 20))
    return h.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ the loop
class Stage:
    """What the loop needs of a stage. `trained` {name: Parameter}; `groups` AdamW's parameter groups; `inputs` files its result depends on;
    rows(step) the global batch (list); loss(rows) -> (sum over the rows, {metric: sum over the rows});
    describe(rows) names a batch in words; export(folder) writes the result; finish() -> {metric: value} at the end."""
    inputs = ()

    def finish(self):
        return {}


def schedule(step, steps, warmup):
    """Factor on the learning rate. 1) linear warm-up, 2) half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def gradients(stage, args, step, stop):
    """Backward over this process's share of the batch, then sum over processes -> (rows, {metric: mean}, whether somebody wants to stop)."""
    rows = stage.rows(step)
    micro = getattr(args, "micro", len(rows))
    parts = [(i, rows[at:at + micro], 1.0) for i, at in enumerate(range(0, len(rows), micro))]
    for p in stage.trained.values():
        p.grad = torch.zeros_like(p)
    totals = Counter()
    for i, part, share in parts[rank()::world()] or [(0, parts[0][1], 0.0)]:         # nothing left to do: join with weight zero
        torch.manual_seed(number(args.seed, step, i))                                # dropout
        loss, metrics = stage.loss(part)
        (loss * (share / len(rows))).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] += value.item() * share
    grads = [p.grad for p in stage.trained.values()]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([*totals.values(), float(stop)]).to(grads[0])])
    if world() > 1:
        try:
            dist.all_reduce(flat)
        except RuntimeError as e:
            raise ValueError(f"another process of this run is gone ({str(e).splitlines()[0][:80]}); the same command continues from the last checkpoint") from None
        for g, summed in zip(grads, flat.split([g.numel() for g in grads] + [len(totals) + 1])):
            g.copy_(summed.view_as(g))
    values = flat[-len(totals) - 1:].tolist()
    return rows, {name: value / len(rows) for name, value in zip(totals, values)}, values[-1] > 0


def save_state(stage, optimizer, out, step):
    """OUT/step_N: the trained parameters and AdamW's two moments of each, as safetensors; older points go once it stands."""
    def write(folder):
        tensors = {name: p.detach() for name, p in stage.trained.items()}
        for name, p in stage.trained.items():
            tensors |= {f"{key}:{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") if p in optimizer.state}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / "state.safetensors")
    publish(out / f"step_{step}", write, f"step {step}")
    for old in out.glob("step_*"):
        if old.name != f"step_{step}":
            shutil.rmtree(old, ignore_errors=True)


def load_state(stage, optimizer, out):
    """Continue from the newest OUT/step_N -> N; 0 when there is none."""
    steps = [int(p.name[5:]) for p in out.glob("step_*") if p.name[5:].isdigit()]
    if not steps:
        return 0
    tensors = load_file(out / f"step_{max(steps)}" / "state.safetensors")
    with torch.no_grad():
        for name, p in stage.trained.items():
            p.copy_(tensors[name])
            moments = {key: tensors[f"{key}:{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq") if f"{key}:{name}" in tensors}
            if moments:
                optimizer.state[p] = {"step": torch.tensor(float(max(steps))), **moments}
    return max(steps)


def check_config(out, config):
    """Write config.json, or refuse to continue a run that was started with other flags or other data."""
    file = out / "config.json"
    if any(out.glob("step_*")) and file.is_file():
        before = json.loads(file.read_text())
        for name in sorted((set(before) | set(config)) - FREE):
            if before.get(name) != config.get(name):
                raise ValueError(f"{out} holds a run with {name} = {before.get(name)!r}, now it is {config.get(name)!r}: give another --out, or delete the folder")
    else:
        publish(out, lambda folder: (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n"), "config.json")


def open_run(stage, args, out):
    """Process 0's part before the first step: the lock, config.json, and no leftovers of a run that was killed while saving -> the held lock."""
    held = lock(out)
    for rest in out.glob(".tmp_*"):
        shutil.rmtree(rest, ignore_errors=True)
    check_config(out, {**vars(args), "inputs": digest(*stage.inputs)})
    return held


def cut_log(out, step):
    """metrics.jsonl up to `step`: what came after will be written again, and a line that a kill tore apart is dropped."""
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines(True) if step and log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    publish(out, lambda folder: (folder / "metrics.jsonl").write_text("".join(kept)), "metrics.jsonl")
    return log


def fit(stage, args):
    """Train `stage` to the end, or to a signal; every file of args.out is written here, by process 0."""
    out, chief, stop = Path(args.out), rank() == 0, []
    held = open_run(stage, args, out) if chief else None
    if world() > 1:
        dist.barrier()
    optimizer = torch.optim.AdamW(stage.groups, lr=args.lr, weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step = load_state(stage, optimizer, out)
    log = cut_log(out, step) if chief else None
    before = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar, stopping = tqdm(total=args.steps, initial=step, desc=args.stage, disable=not chief), False
    while step < args.steps and not stopping:
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step, args.steps, getattr(args, "warmup", 0))
        rows, metrics, stopping = gradients(stage, args, step, bool(stop))
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(stage.trained.values(), args.clip or math.inf).item()
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError(f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} on {stage.describe(rows)}; the step was not taken")
        optimizer.step()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if chief:
            with open(log, "a") as f:
                f.write(json.dumps({"step": step, "lr": optimizer.param_groups[0]["lr"], **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
            if stopping or step % args.save_every == 0 or step == args.steps:
                save_state(stage, optimizer, out, step)
    bar.close()
    for s, handler in before.items():
        signal.signal(s, handler)
    if step < args.steps:
        raise SystemExit(f"stopped after step {step} of {args.steps}, saved in {out}/step_{step}; the same command continues" if chief else 1)
    if chief:
        publish(out, stage.export, "the result")
        print(f"{args.stage}: {out} " + " ".join(f"{k} {v:.4f}" for k, v in stage.finish().items()))
        held.close()


# ------------------------------------------------------------------------------------------------ stages
def load_policy(args, adapter=None):
    """(model, tokenizer) with LoRA; from an adapter's folder both policy and reference are that adapter."""
    model, tokenizer = Qwen.load(args.qwen, args.device, DTYPES[args.dtype]), Tokenizer.load(args.qwen)
    if adapter:
        if not Path(adapter, "adapter_config.json").is_file():
            raise ValueError(f"{adapter} holds no adapter: `python train.py sft` writes one to runs/sft")
        lora.load_adapter(model, adapter)
        lora.copy_adapter(model)
    else:
        torch.manual_seed(args.seed)
        lora.inject(model, args.rank, args.alpha, args.dropout)
    model.model.checkpointing = getattr(args, "checkpointing", False)
    return model, tokenizer


def read_asked(path, **fields):
    """Rows of a JSON-lines file in which every row has `fields` and may have "guidance", what the user adds in words (ours); "" where it has none."""
    rows = graph.read_jsonl(path, **fields)
    for row in rows:
        if not isinstance(row.setdefault("guidance", ""), str):
            raise ValueError(f"{path}:{row['line']}: \"guidance\" must be a string, got {json.dumps(row['guidance'])[:60]}")
    return rows


def trainable(prefix, module):
    return {prefix + name: p for name, p in module.named_parameters() if p.requires_grad} if module else {}


class SFT(Stage):
    """Next-token loss on the instruction alone; each example counts the same, however long (ours)."""

    def __init__(self, args):
        self.args, self.edits, self.inputs = args, read_asked(args.edits, input=str, edit=str), (args.edits, args.qwen)
        if not self.edits:
            raise ValueError(f"{args.edits} holds no edit")
        self.model, self.tokenizer = load_policy(args)
        self.model.train()                                                           # LoRA dropout
        self.trained = trainable("", self.model)
        self.groups = [{"params": list(self.trained.values()), "weight_decay": args.weight_decay}]

    def rows(self, step):
        return order(len(self.edits), self.args.batch, self.args.seed, step)

    def loss(self, rows):
        texts = [cdpo.encode(self.tokenizer, cdpo.prompt(e["input"], e["guidance"]), e["edit"]) for e in (self.edits[i] for i in rows)]
        length = torch.tensor([len(answer) for _, (answer,) in texts], device=self.args.device)
        return -(cdpo.answer_logprobs(self.model, texts, chunk=self.args.chunk)[:, 0] / length).sum(), {}

    def describe(self, rows):
        return f"{self.args.edits}, lines {', '.join(str(self.edits[i]['line']) for i in rows)}"

    def export(self, folder):
        lora.save_adapter(self.model, folder, base_model=self.args.qwen)


class Graph(Stage):
    """Pretraining of the graph encoder; a step is an epoch over the whole graph."""

    def __init__(self, args):
        self.args, users, self.inputs = args, graph.read_users(args.users), (args.users, args.embedder)
        names = graph.attribute_names(users)
        if not names:
            raise ValueError(f"{args.users} holds no user who likes or dislikes anything")
        model = Qwen.load(args.embedder, args.device)
        features = embed_texts(model, Tokenizer.load(args.embedder), names).cpu()    # (A, F)
        if args.feature_norm:
            features = F.normalize(features - features.mean(0), dim=-1) * args.feature_norm
        built = graph.PreferenceGraph.build(users, names, features)
        built.edges, built.features = built.edges.to(args.device), built.features.to(args.device)
        self.model = graph.EdgeModel(built, args.hidden, args.out_dim, not args.unsigned, args.drop, args.seed).to(args.device)
        self.trained = trainable("", self.model)
        self.groups = [{"params": [p for n, p in self.trained.items() if n != "vectors"]}, {"params": [self.model.vectors], "weight_decay": args.weight_decay}]

    def rows(self, step):
        return [step]

    def loss(self, rows):
        return self.model.loss(rows[0]), {}

    def describe(self, rows):
        return f"{self.args.users}, epoch {rows[0] + 1}"

    def export(self, folder):
        tokens = cdpo.UserTokens(self.model.graph, "graph", self.args.hidden, self.args.out_dim, not self.args.unsigned)
        tokens.load_state_dict({name: p for name, p in self.model.state_dict().items() if not name.startswith("decoder.")})
        tokens.save(folder / "collaborative.safetensors")
        (folder / "report.json").write_text(json.dumps(self.finish(), indent=1) + "\n")

    def finish(self):
        return {f"{part} {name}": value for part in ("val", "test") for name, value in self.model.evaluate(part).items()}


class CDPO(Stage):
    """Eq. 7 and its baselines. A row is (the user's pair, [(neighbour, its pair, similarity), ...])."""

    def __init__(self, args):
        self.args, users = args, graph.read_users(args.users)
        self.pairs = read_asked(args.pairs, user=str, caption=str, chosen=str, rejected=str)
        index = {u.name: i for i, u in enumerate(users)}
        for pair in self.pairs:
            if pair["user"] not in index:
                raise ValueError(f"{args.pairs}:{pair['line']}: user {pair['user']!r} is not in {args.users}")
        if not self.pairs:
            raise ValueError(f"{args.pairs} holds no pair")
        self.owner, self.of_user = [index[p["user"]] for p in self.pairs], defaultdict(list)
        for i, u in enumerate(self.owner):
            self.of_user[u].append(i)
        self.model, self.tokenizer = load_policy(args, args.sft)
        self.model.eval()                                                            # no dropout in DPO, as in TRL
        self.tokens = self.user_tokens(users)
        self.similar(users)
        self.encode = functools.lru_cache(None)(lambda caption, *texts, guidance="": cdpo.encode(self.tokenizer, cdpo.prompt(caption, guidance), *texts))
        self.reference = self.reference_logprobs()                                   # (P, 2) chosen, rejected
        self.trained = {**trainable("", self.model), **trainable("collaborative.", self.tokens)}
        slow = ("collaborative.sage.", "collaborative.vectors") if args.user == "graph" else ("nothing",)
        split = {name: p for name, p in self.trained.items() if name.startswith(slow)}
        self.groups = [{"params": [p for n, p in self.trained.items() if n not in split], "weight_decay": args.weight_decay}]
        if split:
            self.groups.append({"params": list(split.values()), "lr": args.gnn_lr, "weight_decay": args.weight_decay})
        self.inputs = [args.users, args.pairs, args.qwen, f"{args.sft}/adapter_model.safetensors", f"{args.graph}/collaborative.safetensors"]

    def user_tokens(self, users):
        """The trainable way from a user to soft tokens, or None for DPO-Vanilla."""
        args = self.args
        if args.user == "none":
            return None
        stored = cdpo.UserTokens.load(Path(args.graph) / "collaborative.safetensors")
        if stored.graph.users != [u.name for u in users]:
            raise ValueError(f"{args.graph} was trained on other users than {args.users} holds: run the graph stage again")
        table = self.model.model.embed_tokens.weight
        torch.manual_seed(args.seed)
        soft = {"hidden_dim": args.soft_hidden, "out_dim": table.shape[1], "tokens": args.tokens, "std": table[:50_000].float().std().item()}
        tokens = cdpo.UserTokens(stored.graph, **{**stored.config, "kind": args.user, "soft": soft})
        if args.user == "graph":
            tokens.load_state_dict(stored.state_dict(), strict=False)
        return tokens.to(args.device)

    def similar(self, users):
        """Neighbours (U,K) and similarities (U,K); a user who has no pairs is nobody's neighbour."""
        self.neighbours = None
        if self.args.user == "graph" and self.args.lam:
            built = graph.PreferenceGraph.build(users, graph.attribute_names(users), None)
            self.neighbours, self.similarity = graph.similar_users(built.signs(), self.args.k, self.args.similarity)
            self.similarity *= torch.tensor([float(bool(self.of_user[v])) for v in range(len(users))])[self.neighbours]

    @torch.no_grad()
    def reference_logprobs(self):
        """(P,2) on the CPU: computed once, each different (prompt, answer) once, shared out over the processes; kept for other runs beside this one."""
        args = self.args
        file = Path(args.out).parent / ".reference" / f"{digest(args.pairs, args.qwen, f'{args.sft}/adapter_model.safetensors')}-{args.dtype}.safetensors"
        if file.exists():
            return load_file(file)["logps"]
        texts = sorted({(p["caption"], p["guidance"], p[side]) for p in self.pairs for side in ("chosen", "rejected")})
        by_prompt = [list(same) for _, same in itertools.groupby(texts, lambda t: t[:2])]
        groups = [same[at:at + 8] for same in by_prompt for at in range(0, len(same), 8)]   # answers that share one pass over their prompt
        found = torch.zeros(len(groups), 8)
        lora.use(self.model, "reference")
        for at in tqdm(range(rank() * args.micro, len(groups), world() * args.micro), desc="reference", disable=rank() > 0):
            rows = [self.encode(group[0][0], *(text for *_, text in group), guidance=group[0][1]) for group in groups[at:at + args.micro]]
            logps = cdpo.answer_logprobs(self.model, rows, chunk=args.chunk)
            found[at:at + args.micro, :logps.shape[1]] = logps.cpu()
        lora.use(self.model, "policy")
        if world() > 1:
            found = found.to(args.device)
            dist.all_reduce(found)
        place = {t: x for group, row in zip(groups, found.tolist()) for t, x in zip(group, row)}
        logps = torch.tensor([[place[p["caption"], p["guidance"], p[side]] for side in ("chosen", "rejected")] for p in self.pairs])
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            publish(file.parent, lambda folder: save_file({"logps": logps}, folder / file.name), "reference log-probabilities")
        return logps

    def rows(self, step):
        args, g = self.args, generator(self.args.seed, "step", step)
        keep = torch.rand(len(self.of_user) if self.tokens is None else len(self.tokens.graph.users), 1, generator=g) >= args.drop
        self.keep, rows = keep.float().to(args.device), []
        for own in order(len(self.pairs), args.batch, args.seed, step):
            near = []
            if self.neighbours is not None:
                score = self.similarity[self.owner[own]]                             # (K,)
                columns = range(len(score)) if args.neighbours == "exact" else torch.multinomial(score + 1e-9, 1, generator=g).tolist()
                for v, s in ((self.neighbours[self.owner[own], c].item(), score[c].item()) for c in columns if score[c] > 0):
                    near.append((v, self.of_user[v][torch.randint(len(self.of_user[v]), (1,), generator=g).item()], s))
            rows.append((own, near))
        return rows

    def loss(self, rows):
        args, B = self.args, len(rows)
        flat = [(self.owner[own], own) for own, _ in rows]                           # (whose soft tokens, which pair)
        flat += [(self.owner[own] if args.neighbour_user == "target" else v, pair) for own, near in rows for v, pair, _ in near]
        who, which = torch.tensor(flat).T                                            # (N,), (N,)
        texts = [self.encode(p["caption"], p["chosen"], p["rejected"], guidance=p["guidance"]) for p in (self.pairs[i] for i in which.tolist())]
        soft = self.tokens and self.tokens.soft(self.tokens.embeddings(self.keep)[who.to(args.device)])             # (N, S, D)
        chosen, rejected = cdpo.answer_logprobs(self.model, texts, soft, args.chunk).T                              # (N,), (N,)
        ref_chosen, ref_rejected = self.reference[which].to(chosen).T
        losses, *rewards = cdpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta)
        if args.nll:
            losses = losses - args.nll * chosen / torch.tensor([len(answer) for _, (answer, _) in texts]).to(chosen)
        own, rest = losses[:B], iter(losses[B:])
        width = max(1, *(len(near) for _, near in rows))
        pad = losses.new_zeros(())
        neighbour = torch.stack([torch.stack([next(rest) for _ in near] + [pad] * (width - len(near))) for _, near in rows])   # (B, K)
        similarity = torch.tensor([[s for *_, s in near] + [0.0] * (width - len(near)) for _, near in rows]).to(losses)
        return cdpo.cdpo_loss(own, neighbour, similarity, args.lam).sum(), cdpo.dpo_metrics(chosen[:B], rejected[:B], *(r[:B] for r in rewards))

    def describe(self, rows):
        return f"{self.args.pairs}, lines {', '.join(str(self.pairs[own]['line']) for own, _ in rows)} (and their neighbours' pairs)"

    def export(self, folder):
        lora.save_adapter(self.model, folder, base_model=self.args.qwen)
        if self.tokens:
            self.tokens.save(folder / "collaborative.safetensors")


# ------------------------------------------------------------------------------------------------ pictures: patch and dro
def load_picture(file, size):
    """A picture file -> (3, size, size) in [-1, 1], cut to a square."""
    return to_tensor(ImageOps.fit(Image.open(file).convert("RGB"), (size, size)))


def save_picture(image, file):
    Image.fromarray(to_picture(image)).save(file)


class Pictures(Stage):
    """What patch and dro share: a frozen Flux, edits of scenes.jsonl as items, velocity errors of three models (`select` makes Flux one of them), and the
    evaluation on held-out scenes. An item is an edit: its prompt, the scene's picture as reference, and the true picture (the scene's where it is not known)."""

    def __init__(self, args, types):
        self.args, folder, scenes = args, Path(args.scenes).parent, graph.read_jsonl(args.scenes, image=str, caption=str)
        if len(scenes) <= args.held_out:
            raise ValueError(f"{args.scenes} holds {len(scenes)} scenes: --held-out {args.held_out} leaves none to train on")
        train, held = ([{**e, "scene": folder / s["image"], "prompt": f"{s['caption']}. {e['instruction']}", "truth": folder / e.get("image", s["image"])}
                        for s in part for e in s.get("edits", []) if e["edit_type"] in types] for part in (scenes[:-args.held_out], scenes[-args.held_out:]))
        self.items, self.count = train + held, len(train)                            # the first `count` are trained on
        files = sorted({e[key] for e in self.items for key in ("scene", "truth")})
        self.scene, self.truth = (torch.tensor([files.index(e[key]) for e in self.items]) for key in ("scene", "truth"))     # (N,) into pictures
        self.pictures = torch.stack([load_picture(file, args.size) for file in files])   # (P, 3, H, W)
        path, dtype = resolve(args.flux, controlnet.FLUX_PARTS), DTYPES[args.dtype]
        self.txt, self.pooled = encode_prompt(path, [e["prompt"] for e in self.items], args.device, dtype)
        self.flux = Flux.load(path / "transformer", args.device, dtype).requires_grad_(False)
        self.flux.checkpointing, self.vae = args.checkpointing, VAE.load(path / "vae", args.device).requires_grad_(False)
        self.latent = self.encode(self.pictures)                                     # (P, L, 64)
        self.features, self.inputs = ImageFeatures.load(args.features, args.device).requires_grad_(False), (args.scenes, path / "transformer", args.features)

    @torch.no_grad()
    def encode(self, images):
        """(N, 3, H, W) -> packed latents (N, L, 64); the latent grid (h, w) is kept for the way back."""
        z = torch.cat([self.vae.encode(part.to(self.args.device)) for part in images.split(16)])     # (N, C, h, w)
        self.grid, self.ids = tuple(z.shape[2:]), image_ids(*z.shape[2:], self.args.device)
        return pack(z)

    @torch.no_grad()
    def look(self, f, images):
        """f's tokens of pictures: (N, 1 + S, D)."""
        return torch.cat([f.tokens(part.to(self.args.device)) for part in images.split(64)])

    def rows(self, step):
        """(item, number in the batch, step): whatever is drawn for a row depends on the seed and its last two."""
        return [(item, n, step) for n, item in enumerate(order(self.count, self.args.batch, self.args.seed, step))]

    def draw(self, rows):
        """Noise (B, L, 64) and times (B,), logit-normal as Flux was trained."""
        sources = [generator(self.args.seed, "noise", step, n) for _, n, step in rows]
        noise, t = (torch.stack([torch.randn(shape, generator=g) for g in sources]).to(self.args.device) for shape in (self.latent.shape[1:], ()))
        return noise, t.sigmoid()

    def velocity(self, who, item, x, t):
        """By "policy", "sampler" or "reference", for items (B,), at x (B, L, 64) and t (B,) -> (B, L, 64) fp32; only the policy's has a gradient."""
        self.select(who, item)
        with torch.set_grad_enabled(who == "policy"):
            txt, guidance = self.txt[item], torch.full_like(t, self.args.train_guidance) if self.flux.guided else None
            return self.flux(x.to(txt.dtype), txt, self.pooled[item], t, guidance, self.ids, txt.new_zeros(txt.shape[1], 3)).float()

    def error(self, who, item, latent, noise, t):
        """Prediction - target on pictures: x_t = (1-t) x_0 + t eps, target eps - x_0."""
        return self.velocity(who, item, (1 - t[:, None, None]) * latent + t[:, None, None] * noise, t) - (noise - latent)

    def dpo(self, rows, win, lose):
        """Diffusion-DPO on latents (B, L, 64): same noise and time in a pair. The policy comes last, so that checkpointing recomputes it as it was."""
        (noise, t), item = self.draw(rows), torch.tensor([row[0] for row in rows]).repeat(2)
        reference, policy = (self.error(who, item, torch.cat([win, lose]), noise.repeat(2, 1, 1), t.repeat(2)).square().mean((1, 2)).chunk(2) for who in ("reference", "policy"))
        losses = diffusion_dpo_loss(*policy, *reference, self.args.beta)
        return losses.sum(), {"accuracy": (losses < math.log(2)).float().sum()}

    def refresh(self, step):
        """Rows for DRO. Every --refresh steps the sampler becomes the policy and paints a new buffer, from which each step draws a batch of points.
        The sampler's weights are saved with the policy's: a resumed run paints the same buffer."""
        args = self.args
        if new := step % args.refresh == 0:
            for own, other in zip(self.sampler, self.policy):
                own.data.copy_(other.data)
        if new or self.path is None:
            item, g = torch.tensor(order(self.count, args.buffer, args.seed, step // args.refresh)), generator(args.seed, "buffer", step // args.refresh)
            noise = torch.randn(args.buffer, *self.latent.shape[1:], generator=g).to(args.device)
            self.path = record(functools.partial(self.velocity, "sampler", item), noise, item, args.paint_steps, g)
        self.drawn = self.path.draw(args.batch, generator(args.seed, "draw", step))
        return [(item, n, step) for n, item in enumerate(self.drawn[3].tolist())]

    def dro(self, rows, expert):
        """Diffusion-DRO: expert pictures (latents (B, L, 64)) against points of the sampler's trajectories, same prompt and time."""
        number, item = torch.tensor([row[1] for row in rows]), torch.tensor([row[0] for row in rows]).repeat(2)
        x, v, t = (part[number] for part in self.drawn[:3])
        noise, _ = self.draw(rows)
        both = torch.cat([(1 - t[:, None, None]) * expert + t[:, None, None] * noise, x])
        reference, policy = ((self.velocity(who, item, both, t.repeat(2)) - torch.cat([noise - expert, v])).square().mean((1, 2)).chunk(2) for who in ("reference", "policy"))
        losses = dro_loss(policy[0], reference[0], policy[1], reference[1], self.args.margin)
        return losses.sum(), {"active": (losses > 0).float().sum(), "drift": reference[1].sum()}

    @torch.no_grad()
    def paint(self, who, items, seed):
        """A picture of each item -> (n, 3, H, W); each starts from its own noise, so that the batch does not matter."""
        found, levels = [], sigmas(self.args.paint_steps, self.latent.shape[1])
        for item in torch.tensor(items).split(32):
            noise = torch.stack([torch.randn(self.latent.shape[1:], generator=generator(seed, "picture", i)) for i in item.tolist()]).to(self.args.device)
            self.select(who, item)
            x = denoise(self.flux, noise, self.txt[item], self.pooled[item], self.ids, levels, self.args.guidance)
            found.append(self.vae.decode(unpack(x, *self.grid)).clamp(-1, 1).cpu())
        return torch.cat(found)

    @functools.cached_property
    def report(self):
        """Held-out items painted before (the reference) and after (the policy) from the same noise -> {measure: value}. identity, truth: cosine of f's class token to
        the reference picture's, the true picture's; asked: the picture is nearer to its own truth than to that of any other edit of this type."""
        held, found = list(range(self.count, len(self.items))), {}
        scene, truth = self.pictures[self.scene[held]], self.pictures[self.truth[held]]
        kind = [(self.items[i]["scene"], self.items[i]["edit_type"]) for i in held]
        other = torch.tensor([[a != b for b in kind] for a in kind])
        f_scene, f_truth = (self.look(self.features, images)[:, 0] for images in (scene, truth))
        painted = {name: self.paint(who, held, 0) for name, who in (("before", "reference"), ("after", "policy"))}
        for name, images in painted.items():
            f, away = self.look(self.features, images)[:, 0], torch.cdist(images.flatten(1), truth.flatten(1))
            found |= {f"{name} identity": F.cosine_similarity(f, f_scene).mean().item(), f"{name} truth": F.cosine_similarity(f, f_truth).mean().item(),
                      f"{name} psnr": (10 * torch.log10(4 / (images - truth).square().mean((1, 2, 3)))).mean().item(),
                      f"{name} asked": (away.masked_fill(other, math.inf).argmin(1) == torch.arange(len(held))).float().mean().item()}
        shown = torch.stack([scene, *painted.values(), truth])[:, :: max(1, len(held) // 12)]            # (4, n, 3, H, W), a sheet of four rows
        self.sheet = shown.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        return found

    def finish(self):
        return self.report

    def describe(self, rows):
        return "; ".join(self.items[row[0]]["prompt"] for row in rows)

    def export(self, folder):
        (folder / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        save_picture(self.sheet, folder / "pictures.png")


class Patch(Pictures):
    """PatchDPO's three stages for an image prompt on a frozen Flux: generate, judge every patch, optimise. --loss names what it is compared with."""

    def __init__(self, args):
        if args.loss != "start" and not Path(args.image_prompt).is_file():
            raise ValueError(f"{args.image_prompt}: no such file; `python train.py patch --loss start --out {Path(args.image_prompt).parent}` trains one")
        super().__init__(args, ("background", "lighting", "object"))                 # edits that leave the object what it was
        if args.loss == "start":                                                     # a new image prompt: every picture is its own reference
            self.scene[:self.count] = self.truth[:self.count]
        self.maps = self.look(self.features, self.pictures)[:, None, 1:]             # (P, 1, S, D): one reference each
        torch.manual_seed(args.seed)
        prompt = ImagePrompt(self.flux, self.maps.shape[-1]) if args.loss == "start" else ImagePrompt.load(args.image_prompt, self.flux, self.maps.shape[-1])
        self.prompts = {who: copy.deepcopy(prompt).to(args.device) for who in ("policy", "sampler", "reference")}
        self.policy, self.sampler, self.path = *(list(self.prompts[who].parameters()) for who in ("policy", "sampler")), None
        self.trained = trainable("", self.prompts["policy"]) | (trainable("sampler.", self.prompts["sampler"]) if args.loss == "dro" else {})
        self.groups = [{"params": self.policy, "weight_decay": args.weight_decay}]
        self.inputs += () if args.loss == "start" else (args.image_prompt,)
        if args.loss in ("patch", "reconstruction", "dpo"):
            self.generated(Path(args.generated or f"{args.out}/generated"))

    def select(self, who, item):
        self.prompts[who].look(self.flux, self.maps[self.scene[item]], self.ids)

    def generated(self, folder):
        """Latents (N, G, L, 64) and weights {"generated", "reference"} (N, G, h, w) of the pictures in `folder`, made there first when there are none."""
        if rank() == 0 and not folder.is_dir():
            publish(folder, self.generate, "generated pictures")
        if world() > 1:
            dist.barrier()
        rows, quality = graph.read_jsonl(folder / "pairs.jsonl", prompt=str, generated=list), load_file(folder / "quality.safetensors")
        if [row["prompt"] for row in rows] != [e["prompt"] for e in self.items[:self.count]]:
            raise ValueError(f"{folder} holds pictures of other prompts: give another --generated, or delete the folder")
        pictures = torch.stack([load_picture(folder / name, self.args.size) for row in rows for name in row["generated"]])       # (N*G, 3, H, W)
        self.made = self.encode(pictures).unflatten(0, (len(rows), -1))
        self.weights = {key: patch_weights(q.flatten(0, 1), self.grid, self.args.weights).unflatten(0, q.shape[:2]).to(self.args.device) for key, q in quality.items()}
        like = quality["generated"].mean((2, 3))                                     # (N, G): which one Diffusion-DPO calls better
        self.best, self.worst = like.argmax(1), like.argmin(1)

    @torch.no_grad()
    def generate(self, folder):
        """Stage 1: pictures by the model as it starts. Stage 2: the quality of all their patches. Both stay on disk, to be used again."""
        sets = [self.paint("reference", range(self.count), (self.args.seed, j)) for j in range(self.args.samples)]
        lines = [{"prompt": e["prompt"], "reference": str(e["scene"]), "generated": [f"{n:05d}_{j}.png" for j in range(len(sets))]} for n, e in enumerate(self.items[:self.count])]
        for n, line in enumerate(lines):
            for name, images in zip(line["generated"], sets):
                save_picture(images[n], folder / name)
        f, side = self.judge(folder), math.isqrt(self.maps.shape[2])
        reference, *made = (self.look(f, images)[:, 1:].unflatten(1, (side, side)) for images in (self.pictures[self.scene[:self.count]], *sets))    # (N, H, W, D)
        quality = {"generated": [patch_quality(x, reference) for x in made], "reference": [patch_quality(reference, x) for x in made]}
        save_file({key: torch.stack(q, 1).cpu() for key, q in quality.items()}, folder / "quality.safetensors")      # (N, G, H, W)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    @torch.enable_grad()
    def judge(self, folder):
        """The f that judges patches: --features, after --feature-steps of self-supervised patch training (ours), which is kept in `folder`."""
        args, f, g = self.args, copy.deepcopy(self.features).requires_grad_(True), generator(self.args.seed, "features")
        before, optimizer = self.s_patch(f), torch.optim.AdamW(f.parameters(), args.feature_lr)
        for _ in tqdm(range(args.feature_steps), desc="features"):
            loss = self_supervised_loss(f, self.pictures[self.truth[torch.randint(self.count, (16,), generator=g)]].to(args.device), g)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        save_file(f.state_dict(), folder / "model.safetensors")
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(resolve(args.features) / name, folder)
        print("S_patch, exact and within one patch: {:.3f} {:.3f} before, {:.3f} {:.3f} after {} steps of patch training".format(*before, *self.s_patch(f), args.feature_steps))
        return f

    @torch.no_grad()
    def s_patch(self, f):
        """On pairs with known geometry: HPatches' where --hpatches is given, else held-out scenes and their edits seen from elsewhere."""
        if self.args.hpatches:
            _, a, b, transform = map(list, zip(*hpatches(self.args.hpatches, self.args.size)))
            a, b, transform = torch.stack(a), torch.stack(b), torch.stack(transform)
        else:
            a, b = (self.pictures[where[self.count:]] for where in (self.scene, self.truth))
            view = random_views(len(a), generator("views"))
            b, transform = warp(b, view), torch.linalg.inv(view)
        maps, side = [self.look(f, images)[:, 1:] for images in (a, b)], math.isqrt(self.maps.shape[2])
        return s_patch(*(m.unflatten(1, (side, side)) for m in maps), correspondence(transform, side, side).to(self.args.device))

    def rows(self, step):
        return self.refresh(step) if self.args.loss == "dro" else super().rows(step)

    def loss(self, rows):
        args, item = self.args, torch.tensor([row[0] for row in rows])
        reference = self.latent[self.scene[item]]
        if args.loss == "dro":
            return self.dro(rows, reference)
        if args.loss == "dpo":
            return self.dpo(rows, self.made[item, self.best[item]], self.made[item, self.worst[item]])
        noise, t = self.draw(rows)
        if args.loss == "start":
            return self.error("policy", item, reference, noise, t).square().mean((1, 2)).sum(), {}
        which = torch.tensor([number(args.seed, "which", step, n) % self.made.shape[1] for _, n, step in rows])
        pair = torch.cat([self.made[item, which], reference])                        # (2B, L, 64): one noise and one time for both
        error = self.error("policy", item.repeat(2), pair, noise.repeat(2, 1, 1), t.repeat(2))
        generated, reference = unpack(error, *self.grid).chunk(2)                    # (B, C, h, w)
        weights = [self.weights[key][item, which] for key in ("generated", "reference")]
        if args.loss == "reconstruction":
            weights = [torch.full_like(w, 0.5) for w in weights]
        return patch_dpo_loss(generated, reference, *weights, args.power).sum(), {}

    def export(self, folder):
        super().export(folder)
        self.prompts["policy"].save(folder / "image_prompt.safetensors")


class DRO(Pictures):
    """Diffusion-DRO for a LoRA on Flux: the experts are true pictures of edits, the negatives the model's own. The second adapter's place holds the sampler."""

    def __init__(self, args):
        super().__init__(args, args.types.split(","))
        torch.manual_seed(args.seed)
        lora.inject(self.flux, args.rank, args.alpha, 0.0, ["to_q", "to_k", "to_v", "to_out.0"])
        self.policy, self.sampler = ([getattr(layer, part)[name] for layer in lora.layers(self.flux).values() for part in ("lora_A", "lora_B")]
                                     for name in ("policy", "reference"))
        self.trained, self.path = {name: p for name, p in self.flux.named_parameters() if ".lora_" in name}, None
        self.groups = [{"params": self.policy, "weight_decay": args.weight_decay}]

    def select(self, who, item):
        lora.use(self.flux, {"policy": "policy", "sampler": "reference", "reference": None}[who])

    def rows(self, step):
        return self.refresh(step)

    def loss(self, rows):
        return self.dro(rows, self.latent[self.truth[[row[0] for row in rows]]])

    def export(self, folder):
        super().export(folder)
        lora.save_adapter(self.flux, folder, base_model=self.args.flux)


STAGES = {"sft": SFT, "graph": Graph, "cdpo": CDPO, "patch": Patch, "dro": DRO}


# ------------------------------------------------------------------------------------------------ evaluation: what do held-out users get?
METHODS = {   # name -> flags of the cdpo stage; None is the SFT adapter as it stands
    "SFT": None,
    "profile in the prompt": None,
    "DPO-Vanilla": ["--user", "none"],
    "DPO-User, mean user": ["--user", "id"],
    "DPO-User, nearest user": ["--user", "id"],
    "C-DPO, lambda 0": ["--lam", "0"],
    "C-DPO": [],
}
SWEEPS = {"lam": (0.0, 0.15, 0.5, 1.0), "k": (1, 2, 3, 5, 12), "similarity": ("shared", "signed", "likes"), "neighbour-user": ("target", "neighbour"),
          "neighbours": ("exact", "sampled")}
CONDITIONS = {"likes + dislikes": {}, "likes only": {"dislikes": []}, "dislikes only": {"likes": []}}     # what the history shows (paper, Table 1)


class Judge:
    """Reads sampled instructions with what the files say and nothing else. `train` are instructions with their captions.

    Well-formed: the answer ended by itself, names exactly one known attribute, and each pair of neighbouring words occurs in a training
    instruction, where rare words of the caption (the object) stand for one another and an attribute's name is one word."""

    def __init__(self, users, train):
        names = sorted({a for u in users for a in (*u.likes, *u.dislikes, *u.hidden)}, key=lambda a: (-len(a), a))
        self.names = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")        # the longest name first
        captions = {caption for caption, _ in train}
        counts = Counter(w for c in captions for w in set(c.lower().split()))
        self.rare = {w for w, n in counts.items() if n < len(captions) / 2}
        self.seen = {pair for caption, text in set(train) for pair in self.pairs(caption, text)}

    def pairs(self, caption, text):
        own = set(caption.lower().split()) & self.rare
        words = self.names.sub(lambda m: m[0].replace(" ", "_"), text).split()
        words = ["<start>", *("<caption>" if w.lower() in own else w for w in words), "<end>"]
        return set(zip(words, words[1:]))

    def __call__(self, user, caption, text, ended):
        found = set(self.names.findall(text))
        whole = ended and len(found) == 1 and self.pairs(caption, text) <= self.seen
        return {"likes": whole and found <= set(user.likes), "would like": whole and found <= set(user.hidden),
                "hit": whole and found <= {*user.likes, *user.hidden}, "dislikes": bool(found & set(user.dislikes)), "malformed": not whole}


def answers(args, policy, folder, method, users, captions, seed):
    """One method's sampled instructions for all users -> [(user index, caption, text, ended)]; the users are as much as the method may know."""
    model, tokenizer = policy
    lora.load_adapter(model, folder)
    ask = [(i, caption) for i, texts in enumerate(captions) for caption in texts for _ in range(args.answers)]
    file, soft = Path(folder) / "collaborative.safetensors", None
    if file.exists():
        tokens = cdpo.UserTokens.load(file, args.device)
        with torch.no_grad():
            soft = tokens.soft(tokens.new(users, "nearest" if "nearest" in method else "mean"))            # (N, S, D)
    told = [cdpo.profile(u) if "profile" in method else "" for u in users]
    out, g = [], torch.Generator(args.device).manual_seed(number("answers", seed))
    for part in (ask[at:at + 400] for at in range(0, len(ask), 400)):
        rows = torch.tensor([i for i, _ in part])
        texts = cdpo.suggest(model, tokenizer, [cdpo.prompt(c, profile=told[i]) for i, c in part], None if soft is None else soft[rows.to(soft.device)],
                             temperature=1.0, generator=g)
        out += [(i, c, *t) for (i, c), t in zip(part, texts)]
    return out


def trained(args, flags, seed):
    """The folder of a cdpo run with these flags and this seed, trained now unless it stands already."""
    given = [x for name in ("preset", "users", "pairs", "sft", "graph", "qwen", "dtype", "device") for x in (f"--{name}", str(getattr(args, name)))]
    name = "-".join(f.strip("-") for f in flags) or "default"
    short = ["--steps", str(args.short)] if args.short else []
    run = parse(["cdpo", *given, *flags, *short, "--seed", str(seed), "--out", f"{args.out}/{'-'.join([name, *short[1:]])}-seed{seed}"])
    if not (Path(run.out) / f"step_{run.steps}").exists():
        fit(CDPO(run), run)
    return run.out


def rates(args, policy, judge, users, captions, method, flags, seed, condition):
    """{"likes": rate, ...} of one method, one seed, one condition."""
    folder = args.sft if flags is None else trained(args, flags, seed)
    shown = [replace(u, **CONDITIONS[condition]) for u in users]
    verdicts = [judge(users[i], *rest) for i, *rest in answers(args, policy, folder, method, shown, captions, seed)]
    return {name: statistics.fmean(v[name] for v in verdicts) for name in verdicts[0]}


def cell(values):
    """Mean and standard deviation over the seeds, as a Markdown cell."""
    return f"{statistics.fmean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def table(title, columns, rows):
    return "\n".join(["", "", f"**{title}**", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


# ------------------------------------------------------------------------------------------------ evaluation: do the pictures show it, and keep the rest?
def read_truth(path):
    """scenes.jsonl -> [(caption, source, {attribute: (edit type, instruction, true picture)})] of the scenes that come with true pictures; uint8 (H,W,3)."""
    def read(name):
        return np.asarray(Image.open(Path(path).parent / name).convert("RGB"))
    rows = [row for row in graph.read_jsonl(path, image=str, caption=str) if row.get("edits")]
    if not rows:
        raise ValueError(f"{path} holds no scene with true pictures of its edits")
    return [(r["caption"], read(r["image"]), {e["attribute"]: (e["edit_type"], e["instruction"], read(e["image"])) for e in r["edits"]}) for r in rows]


def edge_overlap(a, b):
    """Intersection over union of two pictures' Canny edges, where an edge within one pixel counts as met."""
    a, b = (torch.from_numpy(controlnet.canny(x) > 0)[None] for x in (a, b))
    met = sum((x & (F.max_pool2d(y.float(), 3, 1, 1) > 0)).sum().item() for x, y in ((a, b), (b, a))) / 2
    return met / max(a.sum().item() + b.sum().item() - met, 1)


def psnr(a, b, where=...):
    error = (a[where].astype(np.float64) - b[where]) ** 2
    return -10 * math.log10(max(error.mean() / 255 ** 2, 1e-9)) if error.size else math.nan


def nearest(picture, truths):
    """Which of {attribute: true picture} the picture is nearest to, in mean squared error."""
    return min(truths, key=lambda a: np.square(picture.astype(np.float64) - truths[a]).mean())


def picture_measures(picture, scene, asked):
    """What a picture of `asked` is worth: `asked visible` if its own true picture is the nearest of all attributes of that edit type; overlap of its edges
    with the source's; PSNR against the true picture, everywhere and where the true picture is the source (8 of 255 apart at most)."""
    _, source, truth = scene
    kind, _, true = truth[asked]
    kept = np.abs(true.astype(int) - source).max(-1) <= 8
    return {"asked visible": nearest(picture, {a: t for a, (k, _, t) in truth.items() if k == kind}) == asked, "edges": edge_overlap(picture, source), "PSNR": psnr(picture, true), "PSNR, unedited": psnr(picture, true, kept)}


def draw(args, scenes, instructions, strength):
    """Pictures of (scene, instruction) pairs, with the seed of their place in the list."""
    sources = [s[1] for s in scenes]
    return controlnet.render(resolve(args.flux, controlnet.FLUX_PARTS), resolve(args.controlnet), [f"{s[0]}. {text}" for s, text in zip(scenes, instructions)], list(range(len(scenes))),
                             sources[0].shape[:2], sources, [controlnet.control_picture(s) for s in sources], scale=args.control_scale, steps=args.picture_steps,
                             guidance=args.guidance, strength=strength, device=args.device, dtype=DTYPES[args.dtype], batch=32)


def mean_row(name, rows):
    """A table row: means over the dicts `rows`, without the nans (nothing of the picture was to be kept)."""
    return [name, str(len(rows)), *(f"{statistics.fmean(v):.3f}" if (v := [r[n] for r in rows if not math.isnan(r[n])]) else "-" for n in rows[0])] if rows else [name, "0"]


def picture_tables(args, users, judge, say):
    """Markdown: every edit of every scene at strength 1 and at the default, beside the untouched source and the truth; then the methods' own instructions,
    one picture a held-out user. say(method, flags, captions) -> [(user index, caption, text, ended)]."""
    truth = read_truth(args.scenes)
    asked = [(scene, a) for scene in truth for a in scene[2]]
    drawn = {"the source, untouched": [s[1] for s, _ in asked], "the true picture": [s[2][a][2] for s, a in asked]}
    for strength in sorted({1.0, args.strength}, reverse=True):
        drawn[f"strength {strength:g}"] = draw(args, [s for s, _ in asked], [s[2][a][1] for s, a in asked], strength)
    scores = {name: [picture_measures(p, s, a) for p, (s, a) in zip(pictures, asked)] for name, pictures in drawn.items()}
    names = ["asked visible", "edges", "PSNR", "PSNR, unedited"]
    text = table("Every edit of every held-out scene", ["", "pictures", *names], [mean_row(name, rows) for name, rows in scores.items()])
    kinds = sorted({s[2][a][0] for s, a in asked})
    text += table("Asked visible, by edit type", ["", *kinds], [[name, *(f"{statistics.fmean(r['asked visible'] for r, (s, a) in zip(rows, asked) if s[2][a][0] == kind):.3f}"
                                                                         for kind in kinds)] for name, rows in scores.items()])
    mine, rows = [truth[i % len(truth)] for i in range(len(users))], []
    for method, flags in METHODS.items():
        said = [(i, t, judge.names.findall(t)) for i, _, t, _ in say(method, flags, [[s[0]] for s in mine])]
        said = [(i, t, found[0]) for i, t, found in said if len(found) == 1 and found[0] in mine[i][2]]
        found = []
        for (i, _, a), picture in zip(said, draw(args, [mine[i] for i, *_ in said], [t for _, t, _ in said], args.strength)):
            shown = nearest(picture, {x: t for x, (*_, t) in mine[i][2].items()})
            taste = {*users[i].likes, *users[i].hidden}
            found.append({**picture_measures(picture, mine[i], a), "shows a like": shown in taste, "shows a dislike": shown in users[i].dislikes})
        rows.append(mean_row(method, found))
    return text + table(f"The methods' own instructions, strength {args.strength:g}; the picture shows the attribute whose true picture is nearest of all",
                        ["method", "pictures", *names, "shows a like", "shows a dislike"], rows)


def text_tables(args, policy, judge, users):
    """Markdown: every method, `--seeds` runs of each, sampled instructions for the captions of the users' pairs."""
    by_user, memo = defaultdict(dict), {}
    for p in graph.read_jsonl(args.pairs_test, user=str, caption=str):
        by_user[p["user"]][p["caption"]] = None
    captions = [list(by_user[u.name]) for u in users]

    def measure(method, flags, condition="likes + dislikes"):
        key = (method, tuple(flags or ()), condition)
        if key not in memo:
            memo[key] = [rates(args, policy, judge, users, captions, method, flags, seed, condition) for seed in range(args.seeds)]
        return memo[key]

    names = ("likes", "would like", "hit", "dislikes", "malformed")
    count = f"{len(users)} held-out users, {sum(map(len, captions)) * args.answers} answers a seed at temperature 1, {args.seeds} seeds"
    if args.sweep:
        return "".join(sweep_table(args, measure, flag, names, count) for flag in args.sweep.split(","))
    text = table(f"What the instruction asks for ({count})", ["method", *names],
                 [[m, *(cell([r[n] for r in measure(m, f)]) for n in names)] for m, f in METHODS.items()])
    return text + table("Liked or would-be-liked, by what the history shows", ["method", *CONDITIONS],
                        [[m, *(cell([r["hit"] for r in measure(m, f, c)]) for c in CONDITIONS)] for m, f in METHODS.items()])


def sweep_table(args, measure, flag, names, count):
    """Markdown: C-DPO with each value of one flag; the last column is the gain over lambda 0 of the same seed."""
    if flag not in SWEEPS:
        raise ValueError(f"--sweep {flag}: allowed are {', '.join(SWEEPS)}")
    base, rows = measure("C-DPO", ["--lam", "0"]), []
    default = getattr(parse(["cdpo", "--preset", args.preset]), flag.replace("-", "_"))
    for value in SWEEPS[flag]:
        runs = measure("C-DPO", [] if value == default else [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)])
        rows.append([str(value), *(cell([r[n] for r in runs]) for n in names), cell([r["hit"] - b["hit"] for r, b in zip(runs, base)])])
    return table(f"C-DPO, --{flag} ({count})", [flag, *names, "hit less lambda 0's"], rows)


def evaluate(args):
    """What held-out users get: the words, then the pictures. Markdown, printed and kept in OUT/text.md and OUT/pictures.md."""
    users, train_users = graph.read_users(args.users_test), graph.read_users(args.users)
    edits, pairs = graph.read_jsonl(args.edits, input=str, edit=str), graph.read_jsonl(args.pairs, caption=str, chosen=str, rejected=str)
    judge = Judge(users + train_users, [(e["input"], e["edit"]) for e in edits] + [(p["caption"], p[side]) for p in pairs for side in ("chosen", "rejected")])
    policy = load_policy(args, args.sft)
    policy[0].eval()

    def say(method, flags, captions):                                                # one instruction a user and caption, first seed
        once = argparse.Namespace(**{**vars(args), "answers": 1})
        return answers(once, policy, args.sft if flags is None else trained(args, flags, 0), method, users, captions, 0)
    for half, tables in (("text", lambda: text_tables(args, policy, judge, users)), ("pictures", lambda: picture_tables(args, users, judge, say))):
        if args.half in (half, "both") and (half == "text" or not args.sweep):
            text = tables()
            name = args.sweep.replace(",", "-") or half
            publish(Path(args.out), lambda folder: (folder / f"{name}.md").write_text(text + "\n"), f"{name}.md")
            print(text)


def main(argv=None):
    args = parse(argv)
    join(args)
    if args.stage == "eval":
        if world() > 1:
            raise ValueError("eval is one process; train the runs it compares under torchrun, then run it alone: it takes those that stand")
        return evaluate(args)
    fit(STAGES[args.stage](args), args)
    if world() > 1:
        dist.barrier()                                                               # leave together: gloo aborts where one process is gone while another still closes


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, SafetensorError) as e:
        sys.exit(f"train.py: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
