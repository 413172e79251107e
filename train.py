"""The training loop, and nothing about any method: batches, gradients, checkpoints, resume.

    python train.py graph                       # preference graph + GraphSAGE -> runs/graph
    python train.py sft                         # supervised fine-tuning on edits -> runs/sft
    python train.py cdpo --lam 0.5 --k 3        # collaborative DPO from both -> runs/cdpo
    python train.py patch --loss patch          # PatchDPO of an image prompt -> runs/patch
    python train.py dro --refresh 1             # Diffusion-DRO of a LoRA for Flux -> runs/dro
    python train.py eval --policy runs/cdpo     # what held-out users get from a policy
    torchrun --nproc_per_node=3 train.py cdpo --preset paper     # Table 12 on real weights

What is trained is a stage: graph.py, cdpo.py and patch_dpo.py hold them. The loop asks of one, of
its settings (steps, batch, micro, lr, warmup, weight_decay, clip, seed, device) and nothing more:

    items                       how many things it can be trained on
    parameter_groups()          AdamW's groups, of (name, Parameter), each with its own peak
                                learning rate; what needs no gradient is saved, never moved
    draw(indices, generator)    -> rows: everything random about a batch, one row an index
    loss(rows)                  -> (sum over these rows, {metric: sum}); reads nothing else
    save(folder)                the result, in public formats
    describe(rows)              which lines of which file, for an error
    check()                     {metric: value} on held-out data, for --check-every; may be absent

What the loop promises:
- The global batch is the same for any number of processes. Its rows and every random draw are
  functions of (seed, step), dropout also of the micro-batch: there is no generator state to save,
  a resumed run is bit-equal to an unbroken one. Gradients are summed by hand, without DDP.
- A checkpoint OUT/step_N appears whole or not at all. SIGINT and SIGTERM end the run after the
  current step, saved. A kill between two saves loses the steps since the last one (--save-every):
  the same command reads the newest step_N, cuts metrics.jsonl to N lines, and takes the lost steps
  again, with the same bits.
- A loss or gradient that is not finite ends the run before the step is taken, the batch named.
"""
import argparse
import contextlib
import datetime
import fcntl
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # threads that wait do not spin
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C ends it; steps see stop_signals
import torch
import torch.distributed as dist
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import cdpo
import graph
import patch_dpo
from qwen import (RANK, WORLD, add_flags, all_reduce, barrier, check_fit, choose,
                  fingerprint, flag, generator_for, pick_device, read_json, read_tensors, reading,
                  seed_for, set_precision, settings_from, write_whole)


@dataclass
class LoopSettings:
    """The loop's own flags; steps, batch, learning rate ... belong to each stage's settings."""
    out:        str = flag("", "", "folder to write; runs/STAGE when not given")
    save_every: int = flag(50, 50, "steps between resume points")
    check_every: int = flag(0, 0, "steps between looks at held-out pairs (cdpo only); 0: never")
    export: bool = flag(False, False, "end here: write what a stopped run has come to")


# ---- batches and learning rate -------------------------------------------------------------------

def batch_indices(items, batch, seed, step):
    """Which of the items make up the batch of `step`: epoch after epoch, each shuffled by
    (seed, epoch)."""
    epoch, start = divmod(step * batch, items)
    order = []
    while len(order) < start + batch:
        shuffled = torch.randperm(items, generator=generator_for(seed, "epoch", epoch))
        order += shuffled.tolist()
        epoch += 1
    return order[start:start + batch]


def learning_rate(step, steps, warmup, schedule="cosine"):
    """Factor on the peak rate. 1) linear warm-up, 2) half a cosine down to zero, or constant."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / (steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def named_parameters(optimizer):
    """{name: Parameter} of all groups."""
    found = {}
    for group in optimizer.param_groups:
        found.update(zip(group["param_names"], group["params"]))
    return found


def gradients(stage, settings, rows, parameters, *, step, stop):
    """Backward over this process's micro-batches, then the sum over processes, of everything in one
    buffer -> {metric: mean}, and "stop": how many processes have been told to. Process r has the
    micro-batches r, r + WORLD, ...; one without any joins with weight zero."""
    micro = settings.micro
    places = range(0, len(rows), micro)[RANK::WORLD]
    weight = 1.0 if places else 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    totals = Counter()
    for at in places or [0]:
        torch.manual_seed(seed_for(settings.seed, step, at // micro))       # dropout
        loss, metrics = stage.loss(rows[at:at + micro])
        (loss * (weight / len(rows))).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] += value * weight / len(rows)
    totals["stop"] = loss.new_full((), bool(stop))
    means = torch.stack([total.float() for total in totals.values()])
    if WORLD > 1:
        summed = [means, *[p.grad for p in parameters]]
        flat = parameters_to_vector(summed)
        all_reduce(flat)
        vector_to_parameters(flat, summed)
    return dict(zip(totals, means))


# ---- checkpoints ---------------------------------------------------------------------------------

@contextlib.contextmanager
def locked(out):
    """Keep `out` to this run; the lock goes when the process does, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being written by another run") from None
        yield


def write_config(settings, loop, out):
    """OUT/config.json: every flag, and the fingerprint of every input. ValueError when OUT holds
    something else, or a run of something else: it cannot be continued."""
    stage = type(settings).__name__.removesuffix("Settings").lower()
    flags = {"stage": stage, **asdict(settings)}
    inputs = {}
    for key, now in flags.items():
        if isinstance(now, str) and Path(now).resolve() != out.resolve():
            inputs[key] = fingerprint(now)
    file = out / "config.json"
    before = read_json(file, {})
    owner = before.get("stage", "something else")
    if owner != stage and (before or any(out.glob("*.safetensors"))):
        raise ValueError(f"{out} holds a run of {owner}, not of {stage}: give another --out")
    if not any(out.glob("step_*")):
        before = {**flags, **asdict(loop), "inputs": inputs}
    with reading(out):
        for key, now in flags.items():
            was = before.get(key, "unknown")
            if key in ("device", "checkpointing", "deterministic"):
                continue
            if key == "steps" and was != now:
                print(f"--steps was {was}, now it is {now}: the learning rate goes on along the "
                      "new cosine")
                before[key] = now
            elif was != now:
                raise ValueError(f"{out} holds a run with {key} = {was!r}, now it is {now!r}: "
                                 "give another --out, or delete the folder")
            if before["inputs"].get(key) != inputs.get(key):
                raise ValueError(f"{out} holds a run whose --{key}, {now}, or a file that it names "
                                 "or holds, has changed since: give another --out, or delete the "
                                 "folder")
    config = json.dumps(before, indent=1) + "\n"
    write_whole(out, lambda folder: (folder / file.name).write_text(config), file.name)


def tensors_of(optimizer):
    """What a checkpoint holds: the parameters, and AdamW's two moments of each that it moves."""
    tensors = {}
    for name, p in named_parameters(optimizer).items():
        tensors[name] = p.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            if p in optimizer.state:
                tensors[f"{moment}:{name}"] = optimizer.state[p][moment]
    return tensors


def save_state(optimizer, out, step):
    """OUT/step_N/state.safetensors; older points go once it stands."""
    tensors = tensors_of(optimizer)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"after step {step} {name} is not finite (--lr?); it was not saved")
    newest = out / f"step_{step}"
    write_whole(newest, lambda folder: save_file(tensors, folder / "state.safetensors"),
                f"step {step}")
    for old in out.glob("step_*"):
        if old != newest:
            shutil.rmtree(old, ignore_errors=True)


def load_state(optimizer, out):
    """Continue from the newest OUT/step_N -> N; 0 when there is none. The steps after it, which
    only a SIGKILL loses (see `stop_signals`), are taken again with the same bits. ValueError: it
    is torn, or another run's."""
    numbers = [point.name.removeprefix("step_") for point in out.glob("step_*")]
    step = max(map(int, filter(str.isdigit, numbers)), default=0)
    if step == 0:
        return 0
    for p in named_parameters(optimizer).values():
        if p.requires_grad:
            optimizer.state[p] = {"step": torch.tensor(float(step)),
                                  "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
    file = out / f"step_{step}" / "state.safetensors"
    stored = read_tensors(file)
    own = tensors_of(optimizer)
    check_fit(file, own, stored, finite=True)
    for name, tensor in own.items():
        tensor.copy_(stored[name])
    return step


# ---- the loop ------------------------------------------------------------------------------------

@contextlib.contextmanager
def stop_signals():
    """A list that SIGINT and SIGTERM fill, so that the current step ends first."""
    received = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda *_: received.append(True))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(stage, settings, loop):
    """Train a stage to the end, or to a signal. Every file in the folder is process 0's."""
    out = Path(loop.out)
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(locked(out))
            write_config(settings, loop, out)
            for torn in out.glob(".tmp_*"):                 # of a run that was killed while saving
                shutil.rmtree(torn, ignore_errors=True)
        barrier()
        optimizer = torch.optim.AdamW(stage.parameter_groups(), lr=settings.lr,
                                      weight_decay=settings.weight_decay)
        step = load_state(optimizer, out)
        if loop.export:
            settings.steps = step
            if not step:
                raise ValueError(f"{out} holds no step_N to export")
        if RANK == 0:
            shorten_log(out / "metrics.jsonl", step)
        stop = held.enter_context(stop_signals())
        step = run_steps(stage, settings, loop, optimizer=optimizer, step=step, stop=stop)
        if step < settings.steps:
            message = (f"stopped after step {step} of {settings.steps}, saved in {out}/step_{step};"
                       " the same command continues")
            raise SystemExit(message if RANK == 0 else 1)
        if RANK == 0:
            write_whole(out, stage.save, "the result")
            print(f"wrote {out} after step {step}")


def run_steps(stage, settings, loop, *, optimizer, step, stop):
    """Optimiser steps from `step` on -> the last one; metrics and checkpoints on the way."""
    out = Path(loop.out)
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for p in named_parameters(optimizer).values() if p.requires_grad]
    stopping = False
    with tqdm(total=settings.steps, initial=step, desc=out.name, disable=RANK > 0) as bar:
        while step < settings.steps and not stopping:
            schedule = getattr(settings, "schedule", "cosine")
            factor = learning_rate(step, settings.steps, settings.warmup, schedule)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            indices = batch_indices(stage.items, settings.batch, settings.seed, step)
            rows = stage.draw(indices, generator_for(settings.seed, "step", step))
            metrics = gradients(stage, settings, rows, parameters, step=step, stop=stop)
            metrics["grad_norm"] = clip_grad_norm_(parameters, settings.clip or math.inf)
            values = torch.stack([*metrics.values()]).tolist()      # a step waits for the GPU once
            metrics = dict(zip(metrics, values))
            stopping = metrics.pop("stop") > 0
            if not all(map(math.isfinite, metrics.values())):
                raise ValueError(f"step {step + 1} on {stage.describe(rows)} is not finite: loss "
                                 f"{metrics['loss']}, gradient norm {metrics['grad_norm']}; the "
                                 "step was not taken")
            optimizer.step()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            if RANK == 0:
                line = {"step": step, "lr": optimizer.param_groups[0]["lr"], **metrics}
                if loop.check_every and (step - 1) % loop.check_every == 0:
                    line |= getattr(stage, "check", dict)()
                with open(out / "metrics.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
                if stopping or step % loop.save_every == 0 or step == settings.steps:
                    save_state(optimizer, out, step)
                if step % 50 == 0:
                    for text in alarms(out / "metrics.jsonl", settings.clip):
                        bar.write(text)
    return step


def alarms(log, clip):
    """What the last 50 steps in metrics.jsonl give reason to say, beside the 50 before."""
    lines = [json.loads(line) for line in log.read_text().splitlines()[-100:]]
    late = lines[-50:]
    early = lines[:-50]

    def least(part):
        return min([line["grad_norm"] for line in part], default=0)

    def growth(name):
        return sum(line[name] for line in late) / sum(line[name] for line in early)

    if clip and least(early) <= clip < least(late):
        yield f"50 gradients in a row were longer than --clip {clip}: perhaps a smaller --lr"
    lost = early and "logps/chosen" in lines[0]
    if lost and min(growth("loss"), growth("logps/chosen")) > 1.1:          # log p is below 0
        yield "the loss rises, the chosen answers become less likely: a smaller --lr, more --nll"


def shorten_log(log, step):
    """A line a step: the first `step` stay, the others will be written again."""
    if log.exists():
        lines = log.read_bytes().splitlines(True)[:step]
        os.truncate(log, len(b"".join(lines)))


# ---- the command line ----------------------------------------------------------------------------

def build_patch(settings):
    """PatchDPO, or what --loss compares it with; its pictures are painted first, as far as they are
    not there yet."""
    stage = choose("--loss", settings.loss, patch_dpo.LOSSES)(settings)
    if settings.loss != "dro":
        stage.generate()
    return stage


STAGES = {
    "graph": (graph.GraphSettings, graph.GraphPretraining, "preference graph + GraphSAGE"),
    "sft": (cdpo.SFTSettings, cdpo.SFT, "supervised fine-tuning on generic edits"),
    "cdpo": (cdpo.CDPOSettings, cdpo.CDPO, "collaborative DPO, from graph and sft"),
    "patch": (patch_dpo.PatchSettings, build_patch, "PatchDPO of an image prompt for Flux"),
    "dro": (patch_dpo.DROSettings, patch_dpo.DiffusionDRO, "Diffusion-DRO of a LoRA for Flux"),
    "eval": (cdpo.EvalSettings, cdpo.Evaluation, "what held-out users get from a policy"),
}


def parse(argv=None):
    """-> (stage, its settings, LoopSettings). ValueError for a number that makes no sense."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset", choices=["mini", "small", "paper"], default="mini",
                       help="values of the miniature, for language models of 0.1 to 1 B "
                       "parameters, or of the paper's Table 12 (%(default)s)")
    preset = early.parse_known_args(argv)[0].preset
    top = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = top.add_subparsers(dest="stage", metavar="STAGE", required=True,
                                help="`train.py STAGE -h` lists its flags")
    for name, (settings, _, about) in STAGES.items():
        p = stages.add_parser(name, help=about, description=about, parents=[early])
        add_flags(p, settings, preset)
        if name != "eval":
            add_flags(p, LoopSettings, preset)
    args = top.parse_args(argv)
    settings = settings_from(args, STAGES[args.stage][0])
    loop = LoopSettings() if args.stage == "eval" else settings_from(args, LoopSettings)
    loop.out = loop.out or f"runs/{args.stage}"
    return args.stage, settings, loop


def start_processes(device):
    """Join the other processes that torchrun started. What lies on the CPU is summed by gloo, on
    GPUs by NCCL. Nobody waits longer than process 0 needs to read the inputs, or to save."""
    if WORLD > 1:
        backend = "gloo"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"    # too late: an error, not an abort
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))


def main(argv=None):
    name, settings, loop = parse(argv)
    build = STAGES[name][1]
    set_precision(getattr(settings, "deterministic", False))
    if name == "eval":
        if RANK == 0:
            print(build(settings).table())
        return
    start_processes(pick_device(settings.device))
    train(build(settings), settings, loop)
    if WORLD > 1:
        barrier()               # leave together, and at once: gloo aborts where one closes after
        sys.stdout.flush()      # another is gone, and now and then while the interpreter takes its
        os._exit(0)             # threads down


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {error} (try --checkpointing, or a smaller --micro)")
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
