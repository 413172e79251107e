"""Every training stage, and what held-out users get from a trained policy.

    python train.py graph                       # preference graph + GraphSAGE -> runs/graph
    python train.py sft                         # supervised fine-tuning on generic edits -> runs/sft
    python train.py cdpo --lam 0.5 --k 3        # collaborative DPO from both -> runs/cdpo
    python train.py patch --loss patch          # PatchDPO on an image prompt for Flux (reference pictures beside the text) -> runs/patch
    python train.py dro --refresh 1             # Diffusion-DRO, a LoRA for Flux -> runs/dro
    python train.py eval --policy runs/cdpo     # what held-out users get from a policy, a Markdown table; bench/methods.py compares the methods
    torchrun --nproc_per_node=3 train.py cdpo --preset paper     # the paper's Table 12 on real weights

One loop serves every stage. What it promises:
- The global batch is the same for any number of processes. Its rows and every random draw are functions of (seed, step), dropout also of the micro-batch:
  no generator state to save, a resumed run is bit-equal to an unbroken one. Gradients of the small trainable set are summed by hand, without DDP.
- A checkpoint OUT/step_N appears whole or not at all. SIGINT and SIGTERM end the run after the current step, saved; the same command goes on.
- A loss or gradient that is not finite ends the run before the step is taken, with the batch named.
"""
import argparse, copy, datetime, fcntl, functools, hashlib, itertools, json, math, os, re, shutil, signal, sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as in edit.py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
import cdpo
import controlnet
import graph
import lora
import patch_dpo
from flux import VAE, Flux, denoise, encode_prompt, image_ids, pack, sigmas, to_picture, to_tensor, unpack
from patch_dpo import ImageFeatures, ImagePrompt, patch_quality, patch_weights, read_image
from qwen import Qwen, Tokenizer, check_fit, embed_texts, pick_device, read_json, read_tensors, reading, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A preset is a dict of flag values for all stages and for each one, nothing more. "paper" is Table 12; ours: soft_hidden, beta, clip.
PRESETS = {
    "mini": {
        "graph": dict(steps=300, weight_decay=1e-2, drop=0.9),
        "sft": dict(steps=400, warmup=10),
        "cdpo": dict(steps=1200, lr=1e-2, warmup=20, beta=0.2, drop=0.9),
        "patch": dict(steps=150, batch=16, lr=3e-4, warmup=10, beta=100.0),
        "dro": dict(steps=100, batch=8, micro=8, lr=1e-3, warmup=10),
    },
    "paper": {
        "all": dict(qwen="Qwen/Qwen2.5-7B-Instruct", embedder="Linq-AI-Research/Linq-Embed-Mistral", flux="black-forest-labs/FLUX.1-dev",
                    features="facebook/dinov2-base", dtype="bf16", checkpointing=True, size=512),
        "graph": dict(hidden=1024, out_dim=1024, steps=150, lr=3e-5, feature_norm=0.0),
        "sft": dict(steps=9375, batch=16, micro=4, lr=2e-6),
        "cdpo": dict(steps=3000, batch=12, micro=2, lr=2e-7, gnn_lr=2e-8, lam=0.15, similarity="shared", neighbours="exact", tokens=8, soft_hidden=1024, nll=0.0),
        # PatchDPO's and Diffusion-DRO's published runs, on Flux where theirs were on Stable Diffusion; ours: the features, dtype, cosine, LoRA, beta (Flow-GRPO's)
        "patch": dict(samples=1, steps=30000, micro=1, lr=3e-5, weight_decay=0.01, clip=0.0, beta=100.0),
        "dro": dict(steps=1600, batch=256, micro=4, buffer=256, lr=1e-4, weight_decay=0.01),
    },
}
FLAGS = {"files": [     # group -> (flag, stages, type or choices, default of the miniature, help)
    ("out", "graph sft cdpo patch dro", str, None, "folder to write"),
    ("users", "graph cdpo eval", str, "mini/data/users.jsonl", "training users"),
    ("pairs", "cdpo eval", str, "mini/data/pairs.jsonl", "preference pairs of the training users"),
    ("edits", "sft eval", str, "mini/data/edits.jsonl", "generic edits in InstructPix2Pix's format"),
    ("users-test", "eval", str, "mini/data/users_test.jsonl", "held-out users"),
    ("pairs-test", "eval", str, "mini/data/pairs_test.jsonl", "their pairs; only the captions are read"),
    ("scenes", "patch dro", str, "mini/data/scenes.jsonl", "pictures, edits and their true pictures; the last --held-out scenes only evaluate"),
    ("sft", "cdpo", str, "runs/sft", "SFT adapter: where the policy starts and what the reference stays"),
    ("graph", "cdpo", str, "runs/graph", "folder of the graph stage"),
    ("policy", "eval", str, "runs/cdpo", "folder that sft or cdpo wrote"),
    ("image-prompt", "patch", str, "", "image prompt to begin with; when not given the miniature's, and none for --loss start"),
    ("generated", "patch", str, "", "generated pictures and their patch quality, read when they are there, else written there; OUT/generated when not given"),
], "model": [
    ("qwen", "sft cdpo eval", str, "mini/qwen", "language model: folder or hub repository"),
    ("embedder", "graph", str, "mini/qwen", "Qwen or Mistral that embeds the attributes' names"),
    ("flux", "patch dro", str, "mini/flux", "FLUX.1: folder or hub repository"),
    ("features", "patch dro", str, "mini/vit", "image features f of the image prompt and the report: DINOv2 or ViT"),
    ("judge", "patch", str, "", "f that judges the patches, say one that bench/features.py has trained for it; --features when not given"),
    ("dtype", "sft cdpo patch dro eval", tuple(DTYPES), "fp32", "of the frozen weights; what is trained is always fp32"),
    ("device", "graph sft cdpo patch dro eval", str, "", "cpu, cuda, cuda:1 ...; the best there is when not given"),
    ("checkpointing", "sft cdpo patch dro", bool, False, "recompute each layer in the backward pass: less memory, a third more time"),
    ("rank", "sft dro", int, 16, "LoRA rank"),
    ("alpha", "sft dro", int, 32, "LoRA alpha: the adapter's output is scaled by alpha / rank"),
    ("dropout", "sft", float, 0.05, "LoRA dropout; DPO runs without, as in TRL"),
], "graph": [
    ("hidden", "graph", int, 64, "width of the first SAGE layer and of the edge decoder"),
    ("out-dim", "graph", int, 64, "width of h_u"),
    ("unsigned", "graph", bool, False, "the paper's reading: one kind of edge, likes and dislikes alike"),
    ("feature-norm", "graph", float, 4.0, "centre the name embeddings and scale them to this length (ours); 0 leaves them as they are"),
    ("drop", "graph cdpo", float, 0.0, "chance that a user's node vector is left out of a step, as a new user's is (ours)"),
], "preferences": [
    ("user", "cdpo", ("graph", "id", "none"), "graph", "what the policy sees of the user; the baseline DPO-User is id, DPO-Vanilla none"),
    ("lam", "cdpo", float, 0.5, "lambda, weight of the neighbours' term (with --user graph only)"),
    ("k", "cdpo", int, 3, "similar users"),
    ("similarity", "cdpo", ("shared", "signed", "likes"), "likes", "what they share: anything named (the letter of Eq. 6), agreements less clashes, likes"),
    ("neighbour-user", "cdpo", ("target", "neighbour"), "target", "whose soft tokens a neighbour's pair is read with; the paper leaves it open"),
    ("neighbours", "cdpo", ("exact", "sampled"), "sampled", "all k a step, or one drawn in proportion to similarity: unbiased, twice the cost of none"),
    ("beta", "cdpo patch", float, 0.1, "DPO's temperature (not in the paper; TRL's is 0.1)"),
    ("nll", "cdpo", float, 8.0, "weight of the chosen answer's mean token loss beside Eq. 7 (ours): holds the sentence together at large learning rates"),
    ("tokens", "cdpo", int, 4, "soft tokens"),
    ("soft-hidden", "cdpo", int, 128, "hidden width of the soft-token MLP"),
], "pictures": [
    ("loss", "patch", ("patch", "reconstruction", "dpo", "dro", "start"), "patch", "PatchDPO, the same with equal weights, Diffusion-DPO, -DRO; a new image prompt"),
    ("power", "patch", (1, 2), 2, "of the weight: 2 the paper's formula, 1 the authors' code"),
    ("samples", "patch", int, 2, "generated pictures for each prompt and reference"),
    ("refresh", "patch dro", int, 1, "Diffusion-DRO's M: steps between copies of the policy into the sampler, each with a new buffer"),
    ("buffer", "patch dro", int, 16, "trajectories in the buffer; no batch of Diffusion-DRO is larger"),
    ("held-out", "patch dro", int, 4, "scenes at the end of the file that only evaluate"),
    ("size", "patch dro", int, 64, "side of the pictures in pixels"),
    ("paint-steps", "patch dro", int, 20, "Euler steps of a painted picture"),
], "optimisation": [
    ("steps", "graph sft cdpo patch dro", int, 150, "optimiser steps (graph: epochs)"),
    ("batch", "sft cdpo patch dro", int, 32, "global batch, whatever the number of processes"),
    ("micro", "sft cdpo patch dro", int, 16, "rows of one forward pass, pictures painted at once; a batch of several is accumulated"),
    ("lr", "graph sft cdpo patch dro", float, 5e-3, "peak learning rate (AdamW)"),
    ("gnn-lr", "cdpo", float, 1e-3, "of the graph encoder"),
    ("warmup", "sft cdpo patch dro", int, 0, "steps of linear warm-up before the cosine"),
    ("weight-decay", "graph sft cdpo patch dro", float, 0.0, "AdamW's; in the graph stage of the user vectors only"),
    ("clip", "graph sft cdpo patch dro", float, 1.0, "largest gradient norm; 0 never clips"),
    ("seed", "graph sft cdpo patch dro eval", int, 0, "of everything random"),
    ("save-every", "graph sft cdpo patch dro", int, 50, "steps between resume points"),
    ("answers", "eval", int, 3, "instructions sampled for each caption of each held-out user"),
]}

def parse(argv=None):
    """Flags of one stage, as a namespace; the preset's values are the defaults. ValueError for a number that makes no sense."""
    early, style = argparse.ArgumentParser(prog="train.py", add_help=False), argparse.RawDescriptionHelpFormatter
    early.add_argument("--preset", choices=list(PRESETS), default="mini", help="flag values of the miniature, or of the paper's Table 12 (%(default)s)")
    preset = PRESETS[early.parse_known_args(argv)[0].preset]
    top = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=style)
    stages = top.add_subparsers(dest="stage", metavar="STAGE", required=True, help="`train.py STAGE -h` lists its flags")
    for stage in STAGES:
        example, about = re.search(rf"(python train.py {stage} .*?) +# (.*)", __doc__).groups()
        p = stages.add_parser(stage, help=about, description=f"{about}\n\nexample: {example}", parents=[early], formatter_class=style)
        values = {"out": f"runs/{stage}", **preset.get("all", {}), **preset.get(stage, {})}
        for title, flags in FLAGS.items():
            group = p.add_argument_group(title)
            for flag, where, kind, default, text in flags:
                if stage in where.split():
                    how = dict(action="store_true") if kind is bool else dict(type=type(kind[0]), choices=kind) if isinstance(kind, tuple) else dict(type=kind)
                    text += " (%(default)s)" * (default != "" and default is not False)
                    group.add_argument(f"--{flag}", default=values.get(flag.replace("-", "_"), default), help=text, **how)
    args = top.parse_args(argv)
    for name, value in vars(args).items():
        least = 2 if name == "samples" and args.loss == "dpo" else int(type(value) is int and name not in ("seed", "warmup"))      # a winner and a loser
        most = {"drop": 1, "dropout": 1, "seed": 10 ** 13}.get(name, 10 ** 30)           # beyond it AdamW's steps do not fit into fp32, nor seeds into 64 bits
        if type(value) in (int, float) and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be a number from {least} to {most:g}")
    several = WORLD > 1 and torch.cuda.is_available() and args.device in ("", "cuda")
    args.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if several else args.device)         # a GPU for each process
    return args

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))       # torchrun sets them

def together(operation, *tensors):
    """A collective operation, where there are several processes. ValueError when one of them is gone."""
    if WORLD > 1:
        try:
            operation(*tensors)
        except RuntimeError as e:
            raise ValueError(f"another process of this run is gone ({str(e).splitlines()[0][:80]}); the same command continues from the last checkpoint") from None

def number(*what):
    """An integer that depends on `what` (seed, step, ...) alone."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7])

def generator(*what):
    return torch.Generator().manual_seed(number(*what))

def order(n, batch, seed, step):
    """Which of n items make up the batch of `step`: epoch after epoch, each shuffled by (seed, epoch)."""
    places = [divmod(i, n) for i in range(step * batch, (step + 1) * batch)]
    shuffled = {epoch: torch.randperm(n, generator=generator(seed, "epoch", epoch)) for epoch in {epoch for epoch, _ in places}}
    return [shuffled[epoch][place].item() for epoch, place in places]

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
        if not folder.exists():
            return os.replace(temporary, folder)
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"could not write {why} to {folder}: {e}; what was saved before is intact") from None

def lock(out):
    """Keep `out` to this run; the lock goes when the process does, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise ValueError(f"{out} is being written by another run") from None

def digest(*paths):
    """One hash of files and folders: names, sizes and the first 64 MB of each; of a hub repository its name."""
    h = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(f for f in path.glob("*") if f.suffix in (".json", ".jsonl", ".safetensors")) or [path]:
            h.update(file.name.encode())
            if file.is_file():
                with open(file, "rb") as f:
                    h.update(str(file.stat().st_size).encode() + f.read(2 ** 26))
    return h.hexdigest()[:16]

def read_scenes(path, *needed):
    """Rows of scenes.jsonl whose edits have the fields `needed`; pictures as paths. An edit without a picture of its own has its scene's."""
    rows, folder = graph.read_jsonl(path, image=str, caption=str), Path(path).parent
    for row in rows:
        with reading(f"{path}:{row['line']}"):
            row["image"] = scene = folder / row["image"]
            for edit in row.setdefault("edits", []):
                if not all(isinstance(edit[name], str) for name in needed if name != "image"):
                    raise ValueError(f"an edit has {', '.join(needed)}, all of them strings")
                edit["image"] = folder / edit["image"] if "image" in edit else scene
                edit.update(scene=scene, caption=row["caption"], line=row["line"])
    return rows

def read_picture(file, size=None):
    """A picture file -> uint8 (H, W, 3), cut to a square of `size` where it is given."""
    return np.array(ImageOps.fit(read_image(file), (size, size)) if size else read_image(file))

class Stage:
    """What the loop needs of a stage. `items` it is trained on, each a dict with its "line" in the first of `inputs`, the files that the result depends on;
    `trained` {name: Parameter} and AdamW's parameter groups; loss(rows) -> (sum over the rows, {metric: sum over the rows}). At the end export(folder)
    writes the result, and `report` is {measure: value}."""
    report = {}

    def rows(self, step):
        """The global batch: (item, number in the batch, step); what is drawn for a row depends on the seed and its last two."""
        return [(item, n, step) for n, item in enumerate(order(len(self.items), getattr(self.args, "batch", 1), self.args.seed, step))]

    def describe(self, rows):
        return f"{self.inputs[0]}, lines {', '.join(str(self.items[item]['line']) for item, *_ in rows)}"

    def export(self, folder):
        lora.save_adapter(self.model, folder, base_model=self.args.qwen)

def schedule(step, steps, warmup):
    """Factor on the learning rate. 1) linear warm-up, 2) half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def gradients(stage, args, step, stop):
    """Backward over this process's share of the batch, then sum over processes -> (rows, {metric: mean}, whether somebody wants to stop)."""
    rows, micro, totals = stage.rows(step), getattr(args, "micro", 1), Counter()
    parts = [(i, rows[at:at + micro], 1.0) for i, at in enumerate(range(0, len(rows), micro))]
    for p in stage.trained.values():
        p.grad = torch.zeros_like(p)
    for i, part, share in parts[RANK::WORLD] or [(0, parts[0][1], 0.0)]:         # nothing left to do: join with weight zero
        torch.manual_seed(number(args.seed, step, i))                                # dropout
        loss, metrics = stage.loss(part)
        (loss * (share / len(rows))).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] += value.item() * share
    sums = torch.tensor([*totals.values(), float(stop)], device=args.device)
    for tensor in [*(p.grad for p in stage.trained.values()), sums]:
        together(dist.all_reduce, tensor)
    *sums, stopping = sums.tolist()
    return rows, {name: value / len(rows) for name, value in zip(totals, sums)}, stopping > 0

def tensors_of(stage, optimizer):
    """What a checkpoint holds: the trained parameters, and AdamW's two moments of each that it moves."""
    moments = {f"{key}:{name}": optimizer.state[p][key] for name, p in stage.trained.items() for key in ("exp_avg", "exp_avg_sq") if p in optimizer.state}
    return {**{name: p.detach() for name, p in stage.trained.items()}, **moments}

def save_state(stage, optimizer, out, step):
    """OUT/step_N/state.safetensors; older points go once it stands."""
    tensors = {name: t.cpu().contiguous() for name, t in tensors_of(stage, optimizer).items()}
    if lost := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"after step {step} {lost[0]} is not finite (--lr?); it was not saved")
    publish(out / f"step_{step}", lambda folder: save_file(tensors, folder / "state.safetensors"), f"step {step}")
    for old in {*out.glob("step_*")} - {out / f"step_{step}"}:
        shutil.rmtree(old, ignore_errors=True)

def load_state(stage, optimizer, out):
    """Continue from the newest OUT/step_N -> N; 0 when there is none. ValueError when it is torn, or another run's."""
    newest = max((int(p.name[5:]) for p in out.glob("step_*") if p.name[5:].isdigit()), default=0)
    if newest:
        file = out / f"step_{newest}" / "state.safetensors"
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p] = {"step": torch.tensor(float(newest)), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        check_fit(file, own := tensors_of(stage, optimizer), stored := read_tensors(file), finite=True)
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return newest

def open_run(stage, args, out):
    """Process 0's part before the first step -> the held lock. A run is not continued with other data, or other flags than four that change no number."""
    held, file, config = lock(out), out / "config.json", {**vars(args), "inputs": digest(*stage.inputs)}
    for rest in out.glob(".tmp_*"):                                                  # of a run that was killed while saving
        shutil.rmtree(rest, ignore_errors=True)
    before = read_json(file) if any(out.glob("step_*")) else config
    for name in sorted({*before, *config} - {"device", "save_every", "out", "checkpointing"}):
        if before.get(name) != config.get(name):
            raise ValueError(f"{out} holds a run with {name} = {before.get(name)!r}, now it is {config.get(name)!r}: give another --out, or delete the folder")
    if before is config:
        file.write_text(json.dumps(config, indent=1) + "\n")
    return held

def fit(stage, args):
    """Train `stage` to the end, or to a signal; every file of args.out is written here, by process 0."""
    out, chief, stop, stopping = Path(args.out), RANK == 0, [], False
    if not stage.items:
        raise ValueError(f"{stage.inputs[0]} holds nothing to train on")
    log, held = out / "metrics.jsonl", open_run(stage, args, out) if chief else None         # locked as long as `held` lives
    together(dist.barrier)
    optimizer = torch.optim.AdamW(stage.groups, lr=args.lr, weight_decay=args.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step = load_state(stage, optimizer, out)
    if chief and log.exists():                                                       # a line a step: the first `step` stay, the others will be written again
        os.truncate(log, sum(map(len, log.read_bytes().splitlines(True)[:step])))
    before = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    with tqdm(total=args.steps, initial=step, desc=args.stage, disable=not chief) as bar:
        while step < args.steps and not stopping:
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(step, args.steps, getattr(args, "warmup", 0))
            rows, metrics, stopping = gradients(stage, args, step, bool(stop))
            norm = metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(stage.trained.values(), args.clip or math.inf).item()
            if not all(map(math.isfinite, metrics.values())):
                raise ValueError(f"step {step + 1} on {stage.describe(rows)} is not finite: loss {metrics['loss']}, gradient norm {norm}; the step was not taken")
            optimizer.step()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            if chief:
                with open(log, "a") as f:
                    f.write(json.dumps({"step": step, "lr": optimizer.param_groups[0]["lr"], **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
                if stopping or step % args.save_every == 0 or step == args.steps:
                    save_state(stage, optimizer, out, step)
    for s, handler in before.items():
        signal.signal(s, handler)
    if step < args.steps:
        raise SystemExit(f"stopped after step {step} of {args.steps}, saved in {out}/step_{step}; the same command continues" if chief else 1)
    if chief:
        publish(out, stage.export, "the result")
        print(f"{args.stage}: {out} " + " ".join(f"{k} {v:.4f}" for k, v in stage.report.items()))

def load_policy(args, adapter=None):
    """(model, tokenizer) with LoRA; from an adapter's folder both policy and reference are that adapter."""
    if adapter and not Path(adapter).is_dir():
        raise ValueError(f"{adapter}: no such folder; `python train.py sft` writes runs/sft, `python train.py cdpo` runs/cdpo")
    model, tokenizer = Qwen.load(args.qwen, args.device, DTYPES[args.dtype]), Tokenizer.load(args.qwen)
    if adapter:
        lora.load_adapter(model, adapter)
        lora.copy_adapter(model)
    else:
        torch.manual_seed(args.seed)
        lora.inject(model, args.rank, args.alpha, args.dropout)
    model.model.checkpointing = getattr(args, "checkpointing", False)
    return model, tokenizer

def trainable(prefix, module):
    return {prefix + name: p for name, p in module.named_parameters() if p.requires_grad} if module else {}

class SFT(Stage):
    """Next-token loss on the instruction alone; each example counts the same, however long (ours)."""
    def __init__(self, args):
        self.args, self.inputs = args, (args.edits, args.qwen)
        self.items = graph.read_jsonl(args.edits, {"guidance": ""}, input=str, edit=str)
        self.model, self.tokenizer = load_policy(args)
        self.model.train()                                                           # LoRA dropout
        self.trained = trainable("", self.model)
        self.groups = [{"params": self.trained.values()}]

    def loss(self, rows):
        texts = [cdpo.encode(self.tokenizer, cdpo.prompt(e["input"], e["guidance"]), e["edit"]) for e in (self.items[item] for item, *_ in rows)]
        length = torch.tensor([len(answer) for _, (answer,) in texts], device=self.args.device)
        return -(cdpo.answer_logprobs(self.model, texts)[:, 0] / length).sum(), {}

class Graph(Stage):
    """Pretraining of the graph encoder; a step is an epoch over the whole graph."""
    def __init__(self, args):
        self.args, users, self.inputs = args, graph.read_users(args.users), (args.users, args.embedder)
        names = graph.attribute_names(users)
        if not names:
            raise ValueError(f"{args.users} holds no user who likes or dislikes anything")
        features = embed_texts(Qwen.load(args.embedder, args.device), Tokenizer.load(args.embedder), names).cpu()    # (A, F)
        if args.feature_norm:
            features = F.normalize(features - features.mean(0), dim=-1) * args.feature_norm
        built = graph.PreferenceGraph.build(users, names, features).to(args.device)
        self.model = graph.EdgeModel(built, args.hidden, args.out_dim, not args.unsigned, args.drop, args.seed).to(args.device)
        self.items = [{"line": f"1 to {len(users)}"}]                                # one item, the whole graph
        self.trained = trainable("", self.model)
        self.groups = [{"params": [p for n, p in self.trained.items() if n != "vectors"], "weight_decay": 0.0}, {"params": [self.model.vectors]}]

    def loss(self, rows):
        return self.model.loss(*(step for *_, step in rows)), {}

    def export(self, folder):
        tokens = cdpo.UserTokens(self.model.graph, "graph", self.args.hidden, self.args.out_dim, not self.args.unsigned)
        tokens.load_state_dict({name: p for name, p in self.model.state_dict().items() if not name.startswith("decoder.")})
        tokens.save(folder / "collaborative.safetensors")
        self.report = {f"{part} {name}": value for part in ("val", "test") for name, value in self.model.evaluate(part).items()}
        (folder / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")

class CDPO(Stage):
    """Eq. 7 and its baselines. A row is (the user's pair, [(neighbour, its pair, similarity), ...])."""
    def __init__(self, args):
        self.args, self.users = args, graph.read_users(args.users)
        self.items = self.pairs = graph.read_jsonl(args.pairs, {"guidance": ""}, user=str, caption=str, chosen=str, rejected=str)
        index, self.of_user = {u.name: i for i, u in enumerate(self.users)}, defaultdict(list)
        for i, pair in enumerate(self.pairs):
            if pair["user"] not in index:
                raise ValueError(f"{args.pairs}:{pair['line']}: user {pair['user']!r} is not in {args.users}")
            self.of_user[index[pair["user"]]].append(i)
        self.owner = [index[pair["user"]] for pair in self.pairs]
        self.model, self.tokenizer = load_policy(args, args.sft)                     # in eval mode: no dropout in DPO, as in TRL
        self.tokens = self.user_tokens() if args.user != "none" else None            # the trainable way from a user to soft tokens
        signs = graph.PreferenceGraph.build(self.users, graph.attribute_names(self.users), None).signs()
        signs = signs if args.user == "graph" and args.lam else torch.zeros_like(signs)      # no neighbours' term: nothing in common, and nothing to search
        self.neighbours, similarity = graph.similar_users(signs, args.k, args.similarity)                                    # (U, K), (U, K)
        self.similarity = similarity * torch.tensor([float(v in self.of_user) for v in range(len(self.users))])[self.neighbours]
        self.encode = functools.lru_cache(None)(lambda caption, *texts, guidance="": cdpo.encode(self.tokenizer, cdpo.prompt(caption, guidance), *texts))
        self.inputs = args.pairs, args.qwen, f"{args.sft}/adapter_model.safetensors", args.users, f"{args.graph}/collaborative.safetensors"
        self.reference = self.reference_logprobs()                                   # (P, 2) chosen, rejected
        encoder = trainable("collaborative.", self.tokens)
        self.trained = {**trainable("", self.model), **encoder}
        slow = [n for n in encoder if ".soft." not in n] if args.user == "graph" else []
        self.groups = [{"params": [p for n, p in self.trained.items() if n not in slow]}, {"params": [encoder[n] for n in slow], "lr": args.gnn_lr}]

    def user_tokens(self):
        """UserTokens around the graph stage's encoder, or around a new table of users; new soft tokens."""
        args, stored = self.args, cdpo.UserTokens.load(Path(self.args.graph) / "collaborative.safetensors")
        if stored.graph.users != [u.name for u in self.users]:
            raise ValueError(f"{args.graph} was trained on other users than {args.users} holds: run the graph stage again")
        table = self.model.model.embed_tokens.weight
        torch.manual_seed(args.seed)
        soft = {"hidden_dim": args.soft_hidden, "out_dim": table.shape[1], "tokens": args.tokens, "std": table[:50_000].float().std().item()}
        tokens = cdpo.UserTokens(stored.graph, **{**stored.config, "kind": args.user, "soft": soft})
        if args.user == "graph":
            tokens.load_state_dict(stored.state_dict(), strict=False)
        return tokens.to(args.device)

    @torch.no_grad()
    def reference_logprobs(self):
        """(P,2) on the CPU: computed once, each different (prompt, answer) once, shared out over the processes; kept for other runs beside this one."""
        args, file = self.args, Path(self.args.out).parent / ".reference" / f"{digest(*self.inputs[:3])}-{self.args.dtype}" / "logps.safetensors"
        if file.exists():
            check_fit(file, {"logps": torch.empty(len(self.pairs), 2)}, stored := read_tensors(file), finite=True)
            return stored["logps"]
        texts = [(p["caption"], p["guidance"], p[side]) for p in self.pairs for side in ("chosen", "rejected")]             # 2 P
        by_prompt = [list(same) for _, same in itertools.groupby(sorted(set(texts)), lambda text: text[:2])]
        groups = [same[at:at + 8] for same in by_prompt for at in range(0, len(same), 8)]    # answers that share one pass over their prompt
        found = torch.zeros(len(groups), 8, device=args.device)
        lora.use(self.model, "reference")
        for at in tqdm(range(RANK * args.micro, len(groups), WORLD * args.micro), desc="reference", disable=RANK > 0):
            rows = [self.encode(group[0][0], *(text for *_, text in group), guidance=group[0][1]) for group in groups[at:at + args.micro]]
            logps = cdpo.answer_logprobs(self.model, rows)
            found[at:at + args.micro, :logps.shape[1]] = logps
        lora.use(self.model, "policy")
        together(dist.all_reduce, found)
        place = {text: logp for group, row in zip(groups, found.tolist()) for text, logp in zip(group, row)}
        logps = torch.tensor([place[text] for text in texts]).view(len(self.pairs), 2)
        if RANK == 0:
            publish(file.parent, lambda folder: save_file({"logps": logps}, folder / file.name), "reference log-probabilities")
        return logps

    def rows(self, step):
        args, g = self.args, generator(self.args.seed, "step", step)
        self.keep, rows = (torch.rand(len(self.users), 1, generator=g) >= args.drop).float().to(args.device), []
        for own in order(len(self.pairs), args.batch, args.seed, step):
            near, score = [], self.similarity[self.owner[own]]                       # (K,)
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
        chosen, rejected = cdpo.answer_logprobs(self.model, texts, soft).T                                          # (N,), (N,)
        losses, *rewards = cdpo.dpo_loss(chosen, rejected, *self.reference[which].to(chosen).T, args.beta)
        losses = losses - args.nll * chosen / torch.tensor([len(answer) for _, (answer, _) in texts]).to(chosen)
        neighbour = pad_sequence(losses[B:].split([len(near) for _, near in rows]), batch_first=True)               # (B, K)
        similarity = pad_sequence([torch.tensor([score for *_, score in near]) for _, near in rows], batch_first=True).to(losses)
        return cdpo.cdpo_loss(losses[:B], neighbour, similarity, args.lam).sum(), cdpo.dpo_metrics(chosen[:B], rejected[:B], *(r[:B] for r in rewards))

    def export(self, folder):
        super().export(folder)
        if self.tokens:
            self.tokens.save(folder / "collaborative.safetensors")

# ------------------------------------------------------------------------------------------------ pictures: patch and dro
class Pictures(Stage):
    """What patch and dro share: a frozen Flux whose velocity is the policy's, the sampler's or the reference's (as `select` says), trained on edits of
    scenes.jsonl. An item is an edit: its prompt, the scene's picture as reference, and the true picture (the scene's where it is not known).
    Tensors of N items hold the items that are trained on and then those that are `held` out."""
    def __init__(self, args, types=(), wordings=("{caption}. {instruction}",)):
        self.args, scenes = args, read_scenes(args.scenes, "edit_type", "instruction")
        train, held = ([e for s in part for e in s["edits"] if not types or e["edit_type"] in types] for part in (scenes[:-args.held_out], scenes[-args.held_out:]))
        self.items = [{**e, "prompt": words.format(**e)} for e in train for words in wordings]
        self.held = [{**e, "prompt": wordings[-1].format(**e)} for e in held]
        if not self.items or not self.held:
            raise ValueError(f"{args.scenes}: --held-out {args.held_out} leaves none of the edits ({', '.join(types) or 'of any type'}) to train or to evaluate on")
        files, places = np.unique([[str(e["scene"]), str(e["image"])] for e in self.items + self.held], return_inverse=True)
        prompts, said = np.unique([e["prompt"] for e in self.items + self.held], return_inverse=True)
        self.scene, self.truth = torch.from_numpy(places).T                          # (N,) into pictures
        self.expert = self.truth                                                     # what Diffusion-DRO learns from
        self.pictures = torch.stack([to_tensor(read_picture(file, args.size)) for file in files.tolist()])                   # (P, 3, H, W)
        path, dtype = resolve(args.flux, controlnet.FLUX_PARTS), DTYPES[args.dtype]
        self.txt, self.pooled = (part[torch.from_numpy(said).to(args.device)] for part in encode_prompt(path, prompts.tolist(), args.device, dtype))
        self.flux = Flux.load(path / "transformer", args.device, dtype).requires_grad_(False)
        self.flux.checkpointing, self.vae = args.checkpointing, VAE.load(path / "vae", args.device).requires_grad_(False)
        if args.size % (2 * self.vae.factor):
            raise ValueError(f"--size is {args.size}; it must be a multiple of {2 * self.vae.factor}, the pixels of one token")
        self.features = ImageFeatures.load(args.features, args.device).requires_grad_(False)
        self.latent = self.encode(self.pictures)                                     # (P, L, 64)
        self.inputs, self.trajectories = (args.scenes, path / "transformer", args.features), None

    @torch.no_grad()
    def encode(self, images):
        """(N, 3, H, W) -> packed latents (N, L, 64); the latent grid (h, w) is kept for the way back."""
        z = torch.cat([self.vae.encode(part.to(self.args.device)) for part in images.split(16)])                             # (N, C, h, w)
        self.grid, self.ids = tuple(z.shape[2:]), image_ids(*z.shape[2:], self.args.device)
        return pack(z)

    @torch.no_grad()
    def look(self, f, images):
        """f's tokens of pictures (N, 3, H, W): the class tokens (N, D), the patches (N, side, side, D)."""
        tokens = torch.cat([f.tokens(part.to(self.args.device)) for part in images.split(64)])
        return tokens[:, 0], tokens[:, 1:].unflatten(1, (math.isqrt(tokens.shape[1] - 1), -1))

    def draw(self, rows):
        """Of rows: the items (B,), noise (B, L, 64), and times (B,), logit-normal as Flux was trained."""
        sources = [generator(self.args.seed, "noise", step, n) for _, n, step in rows]
        noise, t = (torch.stack([torch.randn(shape, generator=g) for g in sources]).to(self.args.device) for shape in (self.latent.shape[1:], ()))
        return torch.tensor([item for item, *_ in rows]), noise, t.sigmoid()

    def velocity(self, who, item, x, t):
        """By "policy", "sampler" or "reference", for items (B,), at x (B, L, 64) and t (B,) -> (B, L, 64) fp32; only the policy's has a gradient."""
        self.select(who, item)
        with torch.set_grad_enabled(who == "policy"):
            txt, guidance = self.txt[item], torch.ones_like(t) if self.flux.guided else None                                 # 1: none (ours)
            return self.flux(x.to(txt.dtype), txt, self.pooled[item], t, guidance, self.ids, txt.new_zeros(txt.shape[1], 3)).float()

    def errors(self, who, item, t, *points):
        """What the velocity misses at each of n points (x, v) of every item, in one pass -> n times (B, L, 64)."""
        x, v = map(torch.cat, zip(*points))                                          # (nB, L, 64)
        return (self.velocity(who, item.repeat(len(points)), x, t.repeat(len(points))) - v).chunk(len(points))

    def compare(self, item, t, *points):
        """Mean squared errors (B,) at two points: policy's, policy's, reference's, reference's. The policy runs last: checkpointing recomputes it as it was."""
        reference, policy = ([e.square().mean((1, 2)) for e in self.errors(who, item, t, *points)] for who in ("reference", "policy"))
        return *policy, *reference

    def rows(self, step):
        """For Diffusion-DRO every --refresh steps the sampler becomes the policy and paints a new buffer, from which each step draws a batch of points.
        The sampler's weights are saved with the policy's: a resumed run paints the same buffer."""
        args, (period, late) = self.args, divmod(step, self.args.refresh)
        if not late:
            for own, other in zip(self.sampler, self.policy):
                own.data.copy_(other.data)
        if not late or self.trajectories is None:
            item, g = torch.tensor(order(len(self.items), args.buffer, args.seed, period)), generator(args.seed, "buffer", period)
            noise = torch.randn(args.buffer, *self.latent.shape[1:], generator=g).to(args.device)
            parts = zip(item.split(args.micro), noise.split(args.micro))
            parts = [patch_dpo.record(functools.partial(self.velocity, "sampler", i), x, i, args.paint_steps, g) for i, x in parts]
            self.trajectories = patch_dpo.Trajectories(*map(torch.cat, zip(*parts)))
        *self.drawn, items = self.trajectories.draw(args.batch, generator(args.seed, "draw", step))
        return [(item, n, step) for n, item in enumerate(items.tolist())]

    def loss(self, rows):
        """Diffusion-DRO: experts, which are pictures, against points of the sampler's trajectories, same prompt and time."""
        (item, noise, _), (x, v, t) = self.draw(rows), (part[[n for _, n, _ in rows]] for part in self.drawn)
        policy, policy_own, reference, reference_own = self.compare(item, t, flow(self.latent[self.expert[item]], noise, t), (x, v))
        losses = patch_dpo.dro_loss(policy, reference, policy_own, reference_own)
        return losses.sum(), {"active": (losses > 0).float().sum(), "drift": reference_own.sum()}

    @torch.no_grad()
    def paint(self, who, items, seed):
        """A picture of each item -> (n, 3, H, W); each starts from its own noise, so that the batch does not matter."""
        found, levels = [], sigmas(self.args.paint_steps, self.latent.shape[1])
        for item in torch.tensor(items).split(self.args.micro):
            noise = torch.stack([torch.randn(self.latent.shape[1:], generator=generator(seed, "picture", i)) for i in item.tolist()]).to(self.args.device)
            self.select(who, item)
            x = denoise(self.flux, noise, self.txt[item], self.pooled[item], self.ids, levels)
            found.append(self.vae.decode(unpack(x, *self.grid)).clamp(-1, 1).cpu())
        return torch.cat(found)

    def export(self, folder):
        """The report, and a sheet of pictures: held-out items painted before (the reference) and after (the policy) from the same noise. identity, truth: cosine
        of f's class token to the reference picture's, the true picture's; asked: the picture is nearer to its own truth than to any other edit's of this type."""
        held, self.report = list(range(len(self.items), len(self.scene))), {}
        scene, truth = self.pictures[self.scene[held]], self.pictures[self.truth[held]]
        other = torch.tensor([[(a["scene"], a["edit_type"]) != (b["scene"], b["edit_type"]) for b in self.held] for a in self.held])
        painted = {name: self.paint(who, held, 0) for name, who in (("before", "reference"), ("after", "policy"))}
        f_scene, f_truth = (self.look(self.features, images)[0] for images in (scene, truth))
        for name, images in painted.items():
            f, away = self.look(self.features, images)[0], torch.cdist(images.flatten(1), truth.flatten(1))
            values = {"identity": F.cosine_similarity(f, f_scene), "truth": F.cosine_similarity(f, f_truth),
                      "psnr": 10 * torch.log10(4 / (images - truth).square().mean((1, 2, 3))),
                      "asked": (away.masked_fill(other, math.inf).argmin(1) == torch.arange(len(held))).float()}
            self.report |= {f"{name} {measure}": value.mean().item() for measure, value in values.items()}
        (folder / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        sheet = torch.stack([scene, *painted.values(), truth])[:, :: max(1, len(held) // 12)]                                # (4, n, 3, H, W), a row each
        Image.fromarray(to_picture(sheet.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2))).save(folder / "pictures.png")

def flow(x_0, noise, t):
    """On the straight way from latents (B, L, 64) to noise, at t (B,): x_t and its velocity."""
    return (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise, noise - x_0

class Patch(Pictures):
    """PatchDPO for an image prompt on a frozen Flux, in three stages: generate, judge every patch, optimise. --loss names what it is compared with.
    Flux reads the instruction alone, as the paper's "An {object} in the {background}": what the object looks like only the reference tells (ours)."""
    keep, change = ["background", "lighting", "object"], ["color", "pattern", "material"]        # edits that leave the object what it was, and that do not

    def __init__(self, args):
        start = args.loss == "start"
        file = args.image_prompt or ("" if start else "mini/image_prompt/image_prompt.safetensors")
        wordings = ["{caption}. {instruction}", "{instruction}", "{instruction}"] if start else ["{instruction}"]
        super().__init__(args, self.keep + self.change if start else self.keep, wordings)
        maps = self.look(self.features, self.pictures)[1].flatten(1, 2)
        self.maps = torch.cat([maps, torch.zeros_like(maps[:1])])                    # (P+1, S, D); the last is no reference: no features, no values
        self.references = self.beginnings() if start else self.scene[:, None]        # (N, M) into maps
        self.expert = self.scene
        torch.manual_seed(args.seed)
        prompt = ImagePrompt.load(file, self.flux, maps.shape[-1]) if file else ImagePrompt(self.flux, maps.shape[-1])
        self.prompts = {who: copy.deepcopy(prompt).to(args.device) for who in ("policy", "sampler", "reference")}
        self.policy, self.sampler = (list(self.prompts[who].parameters()) for who in ("policy", "sampler"))
        self.trained = trainable("", self.prompts["policy"]) | (trainable("sampler.", self.prompts["sampler"]) if args.loss == "dro" else {})
        self.groups, self.inputs = [{"params": self.policy}], (*self.inputs, *([file] if file else []))
        if args.loss in ("patch", "reconstruction", "dpo"):
            self.read_generated(Path(args.generated or f"{args.out}/generated"))

    def beginnings(self):
        """(N, 2) into maps: what a new image prompt learns from (ours). The scene's picture, or the true one where the edit changes the object; of the other
        edits 40 % have a second reference, another scene after the same edit; 5 % of all have no first (the authors' share)."""
        found, g, alike = torch.stack([self.scene, torch.full_like(self.scene, -1)], 1), generator(self.args.seed, "references"), defaultdict(list)
        for n, e in enumerate(self.items):
            alike[e.get("attribute")].append(self.truth[n])
        for n, e in enumerate(self.items):
            (none, two, which), others = torch.rand(3, generator=g).tolist(), alike[e.get("attribute")]
            if e["edit_type"] in self.change:
                found[n, 0] = self.truth[n]
            elif two < 0.4:
                found[n, 1] = others[int(which * len(others))]
            if none < 0.05:
                found[n, 0] = -1
        return found

    def select(self, who, item):
        self.prompts[who].look(self.flux, self.maps[self.references[item]], self.ids)

    def read_generated(self, folder):
        """Latents `made` (N, G, L, 64) and patch weights (2: generated, reference; N, G, h, w) of the pictures in `folder`, made there first when there are none."""
        if RANK == 0 and not folder.is_dir():
            publish(folder, self.generate, "generated pictures")
        together(dist.barrier)
        rows, file = graph.read_jsonl(folder / "pairs.jsonl", prompt=str, generated=list), folder / "quality.safetensors"
        if [(row["prompt"], len(row["generated"])) for row in rows] != [(e["prompt"], self.args.samples) for e in self.items]:
            raise ValueError(f"{folder} holds pictures of other prompts, or more or fewer of each: give another --generated, or delete the folder")
        side, stored = math.isqrt(self.maps.shape[1]), read_tensors(file)
        shape = len(rows), len(rows[0]["generated"]), side, side
        check_fit(file, {key: torch.empty(shape) for key in ("generated", "reference")}, stored, finite=True)
        quality = torch.stack([stored["generated"], stored["reference"]])            # (2, N, G, H, W)
        self.weights = patch_weights(quality.flatten(0, 2), self.grid).unflatten(0, quality.shape[:3]).to(self.args.device)
        if self.args.loss == "reconstruction":
            self.weights.fill_(0.5)
        pictures = torch.stack([to_tensor(read_picture(folder / name, self.args.size)) for row in rows for name in row["generated"]])      # (N*G, 3, H, W)
        self.made = self.encode(pictures).unflatten(0, shape[:2])
        self.liked = quality[0].mean((2, 3)).argsort(1, descending=True)             # (N, G): Diffusion-DPO's winner is the first, its loser the last

    @torch.no_grad()
    def generate(self, folder):
        """Stage 1: pictures by the model as it starts. Stage 2: the quality of all their patches. Both stay on disk, to be used again."""
        args, lines = self.args, []
        sets = [self.paint("reference", range(len(self.items)), (args.seed, j)) for j in range(args.samples)]
        for n, e in enumerate(self.items):
            lines.append({"prompt": e["prompt"], "reference": str(e["scene"]), "generated": [f"{n:05d}_{j}.png" for j in range(len(sets))]})
            for name, images in zip(lines[n]["generated"], sets):
                Image.fromarray(to_picture(images[n])).save(folder / name)
        f = ImageFeatures.load(args.judge or args.features, args.device)
        reference, *made = (self.look(f, images)[1] for images in (self.pictures[self.scene[:len(lines)]], *sets))           # (N, H, W, D)
        quality = {"generated": [patch_quality(x, reference) for x in made], "reference": [patch_quality(reference, x) for x in made]}
        save_file({key: torch.stack(q, 1).cpu() for key, q in quality.items()}, folder / "quality.safetensors")              # (N, G, H, W)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def rows(self, step):
        return super().rows(step) if self.args.loss == "dro" else Stage.rows(self, step)

    def loss(self, rows):
        args, (item, noise, t) = self.args, self.draw(rows)
        if args.loss == "dro":
            return super().loss(rows)
        if args.loss == "start":
            error, = self.errors("policy", item, t, flow(self.latent[self.truth[item]], noise, t))
            return error.square().mean((1, 2)).sum(), {}
        if args.loss == "dpo":                                                       # one noise and one time for both pictures
            win, lose = (flow(self.made[item, self.liked[item, place]], noise, t) for place in (0, -1))
            losses = patch_dpo.diffusion_dpo_loss(*self.compare(item, t, win, lose), args.beta)
            return losses.sum(), {"accuracy": (losses < math.log(2)).float().sum()}
        which = torch.tensor([number(args.seed, "which", step, n) % self.made.shape[1] for _, n, step in rows])
        errors = self.errors("policy", item, t, flow(self.made[item, which], noise, t), flow(self.latent[self.scene[item]], noise, t))
        errors = (unpack(error, *self.grid) for error in errors)                     # (B, C, h, w)
        return patch_dpo.patch_dpo_loss(*errors, *self.weights[:, item, which], args.power).sum(), {}

    def export(self, folder):
        super().export(folder)
        self.prompts["policy"].save(folder / "image_prompt.safetensors")

class DRO(Pictures):
    """Diffusion-DRO for a LoRA on Flux: the experts are true pictures of edits, the negatives the model's own. The second adapter's place holds the sampler."""
    def __init__(self, args):
        super().__init__(args)
        torch.manual_seed(args.seed)
        lora.inject(self.flux, args.rank, args.alpha, 0.0, ["to_q", "to_k", "to_v", "to_out.0"])
        self.policy, self.sampler = (list(lora.tensors(self.flux, name).values()) for name in ("policy", "reference"))
        self.trained = {name: p for name, p in self.flux.named_parameters() if ".lora_" in name}
        self.groups = [{"params": self.policy}]

    def select(self, who, item):
        lora.use(self.flux, {"policy": "policy", "sampler": "reference", "reference": None}[who])

    def export(self, folder):
        super().export(folder)
        lora.save_adapter(self.flux, folder, base_model=self.args.flux)

# ------------------------------------------------------------------------------------------------ evaluation: what do held-out users get?
RATES = ("likes", "would like", "hit", "dislikes", "malformed")
CONDITIONS = {"likes + dislikes": {}, "likes only": {"dislikes": []}, "dislikes only": {"likes": []}}     # what the history shows (paper, Table 1)

class Judge:
    """Reads sampled instructions with what the files say and nothing else. `train` are (caption, instruction). Well-formed: the answer ended by itself, names
    exactly one known attribute, and each pair of neighbouring words occurs in a training instruction, where rare words of the caption (the object)
    stand for one another and an attribute's name is one word."""
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
        return set(itertools.pairwise(["<start>", *("<caption>" if w.lower() in own else w for w in words), "<end>"]))

    def __call__(self, user, caption, text, ended):
        found = set(self.names.findall(text))
        whole = ended and len(found) == 1 and self.pairs(caption, text) <= self.seen
        return {"likes": whole and found <= set(user.likes), "would like": whole and found <= set(user.hidden),
                "hit": whole and found <= {*user.likes, *user.hidden}, "dislikes": bool(found & set(user.dislikes)), "malformed": not whole}

class Evaluation:
    """A policy's instructions for the captions of held-out users, judged by their words."""
    def __init__(self, args):
        self.args, self.users, captions = args, graph.read_users(args.users_test), defaultdict(dict)
        edits, pairs = graph.read_jsonl(args.edits, input=str, edit=str), graph.read_jsonl(args.pairs, caption=str, chosen=str, rejected=str)
        train = [(e["input"], e["edit"]) for e in edits] + [(p["caption"], p[side]) for p in pairs for side in ("chosen", "rejected")]
        self.judge = Judge(self.users + graph.read_users(args.users), train)
        for p in graph.read_jsonl(args.pairs_test, user=str, caption=str):
            captions[p["user"]][p["caption"]] = None                                 # each once, in the file's order
        self.captions = [list(captions[u.name]) for u in self.users]
        if not any(self.captions):
            raise ValueError(f"{args.pairs_test} has no caption for anybody in {args.users_test}")
        self.model, self.tokenizer = load_policy(args, args.policy)

    @torch.no_grad()
    def answers(self, users, captions, policy, seed=0, profile=False, unknown="mean"):
        """Instructions of the policy in a folder for each user's captions -> [(user index, caption, text, ended)]; the users are as much as it may know.
        profile: the prompt tells the user in words; unknown: as in cdpo.UserTokens.new."""
        soft, said, g = None, [], torch.Generator(self.args.device).manual_seed(number("answers", seed))
        lora.load_adapter(self.model, policy)
        if (file := Path(policy) / "collaborative.safetensors").exists():
            tokens = cdpo.UserTokens.load(file, self.args.device)
            soft = tokens.soft(tokens.new(users, unknown))                           # (N, S, D)
        asked = [(i, caption) for i, texts in enumerate(captions) for caption in texts]
        prompts = [cdpo.prompt(caption, profile=cdpo.profile(users[i]) if profile else "") for i, caption in asked]
        for at in range(0, len(asked), 400):
            who = [i for i, _ in asked[at:at + 400]]
            said += cdpo.suggest(self.model, self.tokenizer, prompts[at:at + 400], None if soft is None else soft[who], temperature=1.0, generator=g)
        return [(*question, *answer) for question, answer in zip(asked, said)]

    def rates(self, shown, policy, **how):
        """{"likes": rate, ...} where of each user's history only what `shown`, a value of CONDITIONS, leaves is known."""
        captions = [[c for c in texts for _ in range(self.args.answers)] for texts in self.captions]
        answers = self.answers([replace(u, **shown) for u in self.users], captions, policy, **how)
        verdicts = [self.judge(self.users[i], *rest) for i, *rest in answers]
        return {name: np.mean([v[name] for v in verdicts]) for name in RATES}

    def table(self):
        found = {name: self.rates(shown, self.args.policy, seed=self.args.seed) for name, shown in CONDITIONS.items()}
        return table(["what the history shows", *RATES], [[name, *(f"{rate:.3f}" for rate in rates.values())] for name, rates in found.items()])

def table(columns, rows):
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *("| " + " | ".join(row) + " |" for row in rows)])

STAGES = {"graph": Graph, "sft": SFT, "cdpo": CDPO, "patch": Patch, "dro": DRO, "eval": Evaluation}

def main(argv=None):
    args = parse(argv)
    if args.stage == "eval":
        return print(Evaluation(args).table()) if RANK == 0 else None
    if WORLD > 1:
        if cuda := args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=7))      # the others wait while process 0 paints
    fit(STAGES[args.stage](args), args)
    if WORLD > 1:
        together(dist.barrier)                                                       # leave together: gloo aborts where one closes after another is gone,
        sys.stdout.flush()
        os._exit(0)                                                                  # and now and then while the interpreter takes its threads down

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"train.py: {e}" + " (try --checkpointing, or a smaller --micro)" * isinstance(e, torch.OutOfMemoryError))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
