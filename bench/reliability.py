"""Does anything get lost, hang, or end in a traceback? Kills, full disks, dead workers, spoiled
files. Prints its counts as Markdown.

    python bench/reliability.py kill --count 50     # SIGKILLs every stage; each run is continued
                                                    # and must end in the bytes of an unbroken one
    python bench/reliability.py disk                # full and read-only disks during a save
    python bench/reliability.py workers             # torchrun with 1, 2, 4 processes; one is killed
    python bench/reliability.py numbers             # losses, weights not finite; same seed twice
    python bench/reliability.py fuzz --count 2000   # spoiled weights, tables, pictures, flags, ...
    python bench/reliability.py fuzz --only 17      # what case 17 was, and all it prints

Without a name every part runs, on the shipped sample. A run is a child forked from this process
after its imports, so that it takes a second; but for that it is what the command line runs.
"""
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch._dynamo         # what torch imports at the first optimizer: 3 s in every child
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import edit
import train
from cdpo import markdown_table

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "mini"
SAMPLE = MINI / "sample"
STAGES = ["graph", "sft", "cdpo", "patch", "dro"]
HALVES = ["graph", "sft", "cdpo", "dro"]                  # runs that fuzz continues
FORK = multiprocessing.get_context("fork")


# ---- runs as forked children ---------------------------------------------------------------------

class Run:
    """job(*given) in a child process, and what it prints."""

    def __init__(self, job, *given):
        self.log = tempfile.TemporaryFile()
        self.process = FORK.Process(target=self.work, args=(job, *given))
        self.process.start()

    def work(self, job, *given):
        os.dup2(self.log.fileno(), 1)
        os.dup2(self.log.fileno(), 2)
        job(*given)

    def finish(self, seconds=600):
        """(exit code, or minus the signal that ended it, or "hang"; what was printed)."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code in (None, -signal.SIGXCPU):
            self.process.kill()
            self.process.join()
            code = "hang"
        self.log.seek(0)
        return code, self.log.read().decode(errors="replace")

    def must(self, wanted=0):
        """Wait for the end, which must have this exit code."""
        code, text = self.finish()
        if code != wanted:
            raise SystemExit(f"exit {code}, not {wanted}:\n{text[-2000:]}")


def script(name, *argv):
    """In a child: train.py or edit.py as the command line runs it."""
    sys.argv = [name, *map(str, argv)]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def lost_after(step, argv):
    """In a child: train.py, which is gone at once when its checkpoint of that step stands."""
    plain = os.replace

    def replace(source, target):
        plain(source, target)
        if Path(target).name == f"step_{step}":
            os._exit(9)

    os.replace = replace
    script("train.py", *argv)


def sentence(text):
    """The line that says why a run ended: the script's message, else the last line."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line and "WITNESS" not in line]
    for line in lines:
        found = re.search(r"((train|edit)\.py( \w+)?|ValueError): .*", line)
        if found:
            return found[0]
    return lines[-1] if lines else ""


class Sample:
    """Tiny inputs and finished stages in `folder`, and the flags of every stage on them."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "mini").symlink_to(MINI)
        self.write_world()
        pairs = (SAMPLE / "pairs.jsonl").read_text().splitlines(True)
        (folder / "pairs.jsonl").write_text("".join(pairs[:12]))
        users = f"--users {SAMPLE}/users.jsonl"
        small = "--batch 2 --micro 1"
        pictures = f"--scenes {folder}/world/scenes.jsonl --size 32 --paint-steps 1 --held-out 1"
        stages = f"--sft {folder}/sft --graph {folder}/graph"
        self.flags = {
            "graph": users,
            "sft": f"--edits {SAMPLE}/edits.jsonl {small}",
            "cdpo": f"{users} --pairs {folder}/pairs.jsonl {stages} {small}",
            "patch": f"{pictures} --samples 1 --generated {folder}/generated {small}",
            "dro": f"{pictures} --buffer 4 {small}",
        }
        for name in ("graph", "sft", "patch"):            # patch paints --generated for all
            self.run(name, folder / name).must()

    def write_world(self):
        """scenes.jsonl of three scenes, the same picture with two backgrounds each."""
        world = self.folder / "world"
        (world / "scenes").mkdir(parents=True)
        scene = json.loads((SAMPLE / "scenes.jsonl").read_text().splitlines()[0])
        edits = [edit for edit in scene["edits"] if edit["edit_type"] == "background"]
        lines = ""
        for at in (0, 2, 4):
            lines += json.dumps({**scene, "edits": edits[at:at + 2]}) + "\n"
        for row in (scene, *edits[:6]):
            shutil.copy(SAMPLE / row["image"], world / row["image"])
        (world / "scenes.jsonl").write_text(lines)

    def argv(self, stage, *more):
        return [stage, *self.flags[stage].split(), "--steps", 4, "--save-every", 1, *more]

    def run(self, stage, out, *more):
        return Run(script, "train.py", *self.argv(stage, "--out", out, *more))

    def half(self, stage, out):
        """A run that was lost right after its second save."""
        Run(lost_after, 2, self.argv(stage, "--out", out)).must(9)


def contents(folder):
    """{name: bytes} of all that a run leaves, but for its flags and its lock."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in ("config.json", ".lock"):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def differences(folder, whole):
    """The files in which a run's folder is not what `contents` gave of an unbroken one."""
    found = contents(folder)
    names = sorted({*found, *whole})
    return [f"{name} differs" for name in names if found.get(name) != whole.get(name)]


def newest(folder):
    """The newest checkpoint's tensors, {} when there is none; ValueError when one is not finite."""
    steps = [int(path.name[5:]) for path in folder.glob("step_*")]
    if not steps:
        return {}
    tensors = load_file(folder / f"step_{max(steps)}" / "state.safetensors")
    if not finite(tensors):
        raise ValueError(f"{folder}: its newest checkpoint is not finite")
    return tensors


def finite(tensors):
    return all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def table(title, columns, rows):
    cells = [list(map(str, row)) for row in rows]
    print(f"\n**{title}**\n\n" + markdown_table(columns, cells), flush=True)


def complain(what, faults):
    for fault in faults:
        print(f"fault: {what}: {fault}", flush=True)
    return len(faults)


# ---- kill ----------------------------------------------------------------------------------------

PHASES = ["start", "training", "a save"]


def strike(stage, sample, out, rng, seconds):
    """Starts the stage and kills it at a random moment, four times in ten in its next save
    -> the phase in which it died; None when it had ended."""
    run = sample.run(stage, out)
    unfinished = out / f".tmp_{run.process.pid}"          # what qwen.write_whole writes into
    time.sleep(rng.uniform(0, seconds))
    if rng.random() < 0.4:
        while run.process.is_alive() and not unfinished.exists():
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.003))
    run.process.kill()
    code, text = run.finish()
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise SystemExit(f"{stage} ended by itself, exit {code}:\n{text[-2000:]}")
    if unfinished.exists():
        return "a save"
    return "training" if "it/s" in text else "start"      # the progress bar of the loop


def kill_stage(stage, count, rng, sample):
    """A row of the table."""
    start = time.monotonic()
    sample.run(stage, sample.folder / "whole" / stage).must()
    seconds = time.monotonic() - start
    sample.run(stage, sample.folder / "again" / stage).must()
    whole = contents(sample.folder / "whole" / stage)
    twice = differences(sample.folder / "again" / stage, whole)
    landed = Counter()
    ended = 0
    faults = 0
    while landed.total() < count:
        out = sample.folder / "torn" / f"{stage}{ended}"
        phase = strike(stage, sample, out, rng, seconds)
        if phase:
            landed[phase] += 1
            newest(out)                                   # must be there and finite
        else:                                             # the run must be whole by now
            faults += complain(out.name, differences(out, whole))
            ended += 1
    out = sample.folder / "torn" / f"{stage}{ended}"
    sample.run(stage, out).must()
    faults += complain(out.name, differences(out, whole))
    counts = [landed[phase] for phase in PHASES]
    same = "NO" if twice else "yes"
    return [stage, count, *counts, ended + 1, faults, same, two_runs(stage, sample)]


def two_runs(stage, sample):
    """What becomes of a second run on the folder of one that works."""
    out = sample.folder / "twice" / stage
    first = sample.run(stage, out, "--steps", 100)
    while first.process.is_alive() and not list(out.glob("step_*")):
        time.sleep(0.002)
    code, text = sample.run(stage, out, "--steps", 100).finish()
    os.kill(first.process.pid, signal.SIGTERM)
    stopped, _ = first.finish()
    if code == stopped == 1 and "another run" in text and newest(out):
        return "refused"
    return f"NOT REFUSED: {code}, {stopped}, {text[-300:]}"


def kill(args, sample):
    rows = []
    for stage in args.stages:
        rng = random.Random(f"{args.seed} {stage}")
        rows.append(kill_stage(stage, args.count or 50, rng, sample))
    columns = ["stage", "kills", *PHASES, "runs ended, compared byte for byte", "faults",
               "same seed twice: same bytes", "a second run on the folder"]
    table("Killed with SIGKILL and continued", columns, rows)


# ---- disk ----------------------------------------------------------------------------------------

def mount(how, folder):
    command = ["mount", *how.split(), str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def full_disk(folder, free):
    """The tmpfs `folder` with `free` bytes left."""
    room = os.statvfs(folder)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - free)))
    yield
    ballast.unlink()


@contextlib.contextmanager
def read_only(folder):
    mount("-o remount,ro", folder)
    yield
    mount("-o remount,rw", folder)


@contextlib.contextmanager
def limited(size):
    """No file may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def full_from_call(n, folder):
    """The disk is full from the n-th time on that a run opens to write, moves or makes a file or
    folder in `folder`."""
    calls = itertools.count(1)
    plain_open = open

    def write(path):
        if str(path).startswith(str(folder)) and next(calls) >= n:
            raise OSError(28, "No space left on device", str(path))

    def guard(plain):
        def guarded(path, *given, **named):
            write(path)
            return plain(path, *given, **named)
        return guarded

    def guarded_open(path, mode="r", *given, **named):
        if set(mode) & set("wax+"):
            write(path)
        return plain_open(path, mode, *given, **named)

    with mock.patch("os.replace", guard(os.replace)), mock.patch("os.mkdir", guard(os.mkdir)):
        with mock.patch("builtins.open", guarded_open), mock.patch("io.open", guarded_open):
            yield


def failures(rng, count, size, small, out):
    """[(how, context manager)], the last kind without end. size: of the largest file of a run."""
    if out.parent == small:
        for free in [0, 4096] + [rng.randrange(3 * size) for _ in range(count)]:
            yield "full tmpfs", full_disk(small, free)
        yield "read-only folder", read_only(small)
    for limit in [4096] + [rng.randrange(4096, size) for _ in range(count)]:
        yield "limited file size", limited(limit)
    for n in itertools.count(1):
        yield "full from the n-th call on", full_from_call(n, out)


def attempt(stage, sample, out, failure, whole):
    """A run that was lost after step 2 goes on while its disk fails: one sentence that names the
    folder, the checkpoint intact; then it goes on to the end -> (exit code, faults)."""
    shutil.rmtree(out, ignore_errors=True)
    sample.half(stage, out)
    with failure:
        code, text = sample.run(stage, out).finish()
    faults = []
    named = re.search(rf"train\.py: .*{out}", sentence(text))
    if code != 0 and (code != 1 or "Traceback" in text or not named):
        faults.append(f"exit {code}: {sentence(text)[:300]}")
    if not newest(out):
        faults.append("no checkpoint is left")
    sample.run(stage, out).must()
    return code, faults + differences(out, whole)


def disk_stage(stage, args, sample, small, out):
    """Rows of the table."""
    rng = random.Random(f"{args.seed} {stage}")
    unbroken = sample.folder / "disk" / stage
    sample.run(stage, unbroken).must()
    whole = contents(unbroken)
    size = max(map(len, whole.values()))
    counts = defaultdict(Counter)
    for how, failure in failures(rng, args.count or 8, size, small, out):
        code, faults = attempt(stage, sample, out, failure, whole)
        complain(f"{stage}, {how}", faults)
        counts[how]["ended"] += code != 0
        counts[how]["undisturbed"] += code == 0
        counts[how]["faulty"] += bool(faults)
        if how == "full from the n-th call on" and code == 0:      # there are fewer calls than that
            break
    return [[stage, how, *found.values()] for how, found in counts.items()]


def disk(args, sample):
    small = sample.folder / "small"
    small.mkdir()
    mounted = mount("-t tmpfs -o size=64m tmpfs", small)      # where that is allowed
    out = (small if mounted else sample.folder) / "run"
    rows = []
    try:
        for stage in args.stages:
            rows += disk_stage(stage, args, sample, small, out)
    finally:
        subprocess.run(["umount", small], capture_output=True)
    ended = "runs that ended, checkpoint intact, then continued to the same bytes"
    columns = ["stage", "how", ended, "that it did not disturb", "faults"]
    table("A disk that fails while a run goes on", columns, rows)


# ---- workers -------------------------------------------------------------------------------------

def torchrun(processes, argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "train.py", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def apart(state, other):
    """The largest difference of two checkpoints' weights over the largest weight of the tensor."""
    found = 0.0
    for name, tensor in state.items():
        if ":" not in name:                               # AdamW's moments have names such as that
            difference = (other[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-9)
            found = max(found, difference.item())
    return f"{found:.1e}"


def kill_worker(job, out):
    """Kills one worker of a torchrun after the first checkpoint -> what became of the job."""
    while job.poll() is None and not list(out.glob("step_*")):
        time.sleep(0.01)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text, _ = job.communicate()
    step = max(int(path.name[5:]) for path in out.glob("step_*"))
    said = re.search(r"train\.py: .*|.*SIGKILL.*", text)
    reason = said[0].strip()[:160] if said else "NO MESSAGE"
    return f"exit {job.returncode} after step {step} of 12: {reason}"


def workers(args, sample):
    rows = []
    for stage in args.stages:
        folder = sample.folder / "workers" / stage
        more = ["--steps", 12]
        if stage != "graph":
            more += ["--batch", 4]
        states = {}
        for n in (1, 2, 4):
            job = torchrun(n, sample.argv(stage, "--out", folder / str(n), *more))
            text, _ = job.communicate()
            if job.returncode != 0:
                raise SystemExit(text[-2000:])
            states[n] = newest(folder / str(n))
        torn = sample.argv(stage, "--out", folder / "torn", *more)
        end = kill_worker(torchrun(2, torn), folder / "torn")
        again = torchrun(2, torn)
        again.communicate()
        faults = differences(folder / "torn", contents(folder / "2"))
        far = [apart(states[1], states[n]) for n in (2, 4)]
        rows.append([stage, *far, end, again.returncode, "; ".join(faults) or "yes"])
    far = "weights of 2 processes against 1 (largest difference over largest weight)"
    columns = ["stage", far, "4 against 1", "one of 2 killed", "exit of the restart",
               "then the bytes of an unbroken run"]
    table("torchrun on gloo, the same global batch", columns, rows)


# ---- numbers -------------------------------------------------------------------------------------

RESULTS = ["adapter_model.safetensors", "collaborative.safetensors"]
SPOILED = [                  # a flag of edit.py, the file in its folder, the tensor with a NaN
    ("--flux", "flux/transformer/diffusion_pytorch_model.safetensors", "x_embedder.weight"),
    ("--flux", "flux/vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ("--flux", "flux/text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight"),
    ("--controlnet", "controlnet/diffusion_pytorch_model.safetensors", "x_embedder.weight"),
    ("--qwen", "qwen/model.safetensors", "model.norm.weight"),
    ("--policy", "policy/adapter_model.safetensors", ""),
    ("--policy", "policy/collaborative.safetensors", "soft.fc2.bias"),
]


def infected(call, argv):
    """In a child: train.py, where the call-th loss that the stage gives is NaN."""
    _, stage, _ = train.STAGES[argv[0]]
    plain = stage.loss
    calls = itertools.count(1)

    def loss(self, rows):
        value, metrics = plain(self, rows)
        return value * (math.nan if next(calls) == call else 1), metrics

    stage.loss = loss
    train.main([str(word) for word in argv])


def poison(file, key):
    """Makes one number of a tensor in a safetensors file NaN; of the first where key is empty."""
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    tensors[key or min(tensors)].view(-1)[0] = math.nan
    file.unlink()
    save_file(tensors, file, metadata)


def refusal(what, run, says, leaves):
    """A row of the table: the run must end with a sentence like `says`, without these files."""
    code, text = run.finish()
    said = sentence(text)
    good = code not in (0, "hang") and re.search(says, said)
    good = good and not any(file.exists() for file in leaves)
    said = re.sub(r"/\S*/", "", said).replace("|", "/")  # without folders
    return [what, "refused" if good else "FAULT", said[:200]]


def numbers(args, sample):
    rows = []
    folder = sample.folder / "numbers"
    for stage in ("graph", "sft", "cdpo", "dro"):
        out = folder / f"{stage} nan"
        call = 3 if stage == "graph" else 5               # the first of step 3
        run = Run(infected, call, sample.argv(stage, "--out", out))
        leaves = [out / "step_3", *(out / name for name in RESULTS)]
        row = refusal(f"{stage}: NaN in the loss of step 3", run, "step 3.* on .*not taken", leaves)
        row[1] += ", step 2 kept" if newest(out) else ", LOST"
        rows.append(row)
        out = folder / f"{stage} lr"
        run = sample.run(stage, out, *"--lr 1e12 --clip 0".split())
        leaves = [out / name for name in RESULTS]
        row = refusal(f"{stage}: --lr 1e12 --clip 0", run, r"step \d.*finite", leaves)
        results = [load_file(file) for file in leaves if file.exists()]
        if results and all(map(finite, results)):         # a norm at its end holds it
            row[1] = "ended, all finite"
        rows.append(row)
    for flag, file, key in SPOILED:
        source, _, inner = file.partition("/")
        place = folder / file.replace("/", " ")
        shutil.copytree(MINI / source, place)
        poison(place / inner, key)
        picture = place / "nan.png"
        draw = [*"--steps 2 --size 32 --user glamour-stylist --out".split(), picture]
        run = Run(script, "edit.py", *draw, flag, place)
        rows.append(refusal(f"edit.py: one NaN in {file}", run, "finite", [picture]))
    table("Numbers that are not finite", ["what", "", "message"], rows)
    unsafe = [file.name for file in sorted(ROOT.glob("*.py")) if runs_code(file)]
    what = "files that unpickle, or run code from a file or repository"
    table("What a user brings", ["", ""], [[what, ", ".join(unsafe) or "none of the ten"]])
    same = drawn(folder / "one") == drawn(folder / "two")
    what = "edit.py: every picture and sampled instruction"
    rows = [[what, "yes" if same else "NO"], ["every training stage", "see kill"]]
    table("The same seed twice", ["", "same"], rows)


def runs_code(file):
    danger = r"\bpickle\b|torch\.load\(|trust_remote_code|(?<![.\w])(eval|exec)\("
    return bool(re.search(danger, file.read_text()))


def drawn(folder):
    """Pictures and instructions that edit.py makes in `folder` with sampled words."""
    folder.mkdir()
    flags = "--steps 2 --temperature 1 --out".split()
    Run(script, "edit.py", *flags, folder / "edit.png").must()
    made = [np.asarray(Image.open(file)).tobytes() for file in sorted(folder.glob("*.png"))]
    for file in sorted(folder.glob("*.json")):
        made.append(json.loads(file.read_text()).get("instruction"))
    return made


# ---- fuzz: how a file is spoiled -----------------------------------------------------------------

MISSING = "missing"
FOLDER = "a folder in its place"
VALUES = [None, True, False, 0, 1, -1, 2 ** 31, 10 ** 9, 10 ** 30, 0.5, -0.5, 1e308, math.nan,
          math.inf, "", "x", "\ud800", "nan", [], [0], {}, {"a": 1}, [[]], ["x"], "a b" * 400]


class Spoiled(NamedTuple):
    what: str                # what was done
    data: bytes | str        # the file's new bytes, or MISSING, or FOLDER
    wrong: bool | None       # must it be refused? None where that depends


def flip_bits(rng, data):
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def spoil_bytes(rng, data):
    """Any file."""
    at = rng.randrange(len(data))
    span = rng.randrange(1, 60)
    noise = rng.randbytes(span)
    return rng.choice([
        Spoiled("empty", b"", True),
        Spoiled("cut off", data[:at], None),
        Spoiled("bits flipped", flip_bits(rng, data), None),
        Spoiled("noise put in", data[:at] + noise + data[at:], None),
        Spoiled("a part gone", data[:at] + data[at + span:], None),
        Spoiled("noise alone", noise, True),
        Spoiled("zeros", bytes(len(data)), True),
        Spoiled(FOLDER, FOLDER, True),
        Spoiled(MISSING, MISSING, True),
        Spoiled("nested", b"[" * 100_000, True),
    ])


def spoil_value(rng, data):
    """JSON: a value at any depth becomes another, or goes."""
    root = {"": json.loads(data)}
    owner = root
    key = ""
    while owner[key] and isinstance(owner[key], dict | list) and rng.random() < 0.75:
        owner = owner[key]
        key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    if owner is not root and rng.random() < 0.3:
        what = f"without {key!r}"
        del owner[key]
    else:
        owner[key] = rng.choice(VALUES)
        what = f"{key!r} is {str(owner[key])[:30]}"
    return Spoiled(what, json.dumps(root[""]).encode(), None)


def spoil_json(rng, data):
    spoil = rng.choice([spoil_bytes, spoil_value, spoil_value, spoil_value])
    return spoil(rng, data)


def spoil_lines(rng, data):
    """A table of JSON lines, in one of them."""
    kind = rng.choice(["value", "value", "type", "type", "twice", "torn", "fine", "bytes", "key"])
    if kind == "bytes":
        return spoil_bytes(rng, data)
    lines = data.splitlines()
    n = rng.randrange(len(lines))
    what, lines[n:n + 1], wrong = spoil_line(rng, kind, lines[n])
    return Spoiled(f"line {n + 1}: {what}", b"\n".join(lines), wrong)


def spoil_line(rng, kind, line):
    """(what was done, the lines instead of this one, must they be refused?)."""
    row = json.loads(line)
    if kind == "value":
        what, text, wrong = spoil_value(rng, line)
        return what, [text], wrong
    if kind == "twice":
        return kind, [line, line], "likes" in row         # nobody is described twice
    if kind == "torn":
        return kind, [line[:rng.randrange(1, len(line))]], True
    if kind == "key":
        name = rng.choice(sorted({*row} - {"edit_type", "output"}))
        new = rng.choice([name[:-1], name + "s", name.upper(), " " + name])
        row[new] = row.pop(name)
        return f"{name} is called {new!r}", [json.dumps(row).encode()], True
    if kind == "type":
        name = rng.choice(sorted({*row} - {"edit_type", "edits", "hidden", "output"}))
        row[name] = rng.choice([None, 3, 0.5, {}, True, [3], [None]])
        return f"{name} of a wrong type", [json.dumps(row).encode()], True
    row["more"] = [1]
    new = json.dumps(row).encode() + b"\r"
    return "other line ends, blank lines, a field more", [b"\r", new, b" "], False


def safetensors(header, body, size=None):
    """A file of this format: 8 bytes with the header's length, the JSON header, the body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(body)


def spoil_tensors(rng, data):
    """A safetensors file: as any file, in its frame, or in one of its tensors."""
    size = int.from_bytes(data[:8], "little")
    text, body = data[8:8 + size], data[8 + size:]
    header = json.loads(text)
    kind = rng.randrange(12)
    if kind == 0:
        return spoil_bytes(rng, data)
    if kind == 1:
        other = rng.choice([0, 1, size - 1, size + 1, 2 ** 40, 2 ** 63, rng.randrange(2 ** 20)])
        return Spoiled("another header length", safetensors(text, body, other), True)
    if kind == 2:
        return Spoiled("header: bits flipped", safetensors(flip_bits(rng, text), body), None)
    if kind == 3:
        what, text, _ = spoil_value(rng, text)
        return Spoiled(f"header: {what}", safetensors(text, body), None)
    name = rng.choice(sorted({*header} - {"__metadata__"}))
    body = bytearray(body)
    what, wrong = rng.choice(TENSOR_FAULTS)(rng, header, body, name)
    return Spoiled(f"{name}: {what}", safetensors(header, body), wrong)


# Each changes header and body in place -> (what was done, must it be refused?)

def rename(rng, header, body, name):
    header[rng.choice(["more", name + "_"])] = header.pop(name)
    return "another name", True


def retype(rng, header, body, name):
    old = header[name]["dtype"]
    new = rng.choice(["I32", "I64", "F64", "F16", "BF16", "BOOL", "U8", "F8_E4M3", "x"])
    header[name]["dtype"] = new
    return f"{old} is {new}", None if old == new or {old, new} <= {"F16", "BF16"} else True


def reshape(rng, header, body, name):
    old = header[name]["shape"]
    others = [[1, *old], [*old, 1], [-1, *old[1:]], old[:-1], [2 ** 62, 4], old[::-1], [0]]
    new = rng.choice(others)
    header[name]["shape"] = new
    return f"shape {new}", new != old


def swap(rng, header, body, name):
    other = rng.choice(sorted({*header} - {"__metadata__"}))
    a, b = header[name], header[other]
    start, end = a["data_offsets"]
    alike = end - start == b["data_offsets"][1] - b["data_offsets"][0]         # no reader can know
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    return f"changed places with {other}", None if alike else True


def one_more(rng, header, body, name):
    header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    return "and a tensor more", True


def one_number(rng, header, body, name):
    """What copy_ would spread over the whole parameter."""
    start, end = header[name]["data_offsets"]
    gone = end - start - 4
    del body[start + 4:end]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - gone for at in entry["data_offsets"]]
    header[name]["shape"] = [1 for _ in header[name]["shape"]]
    header[name]["data_offsets"] = [start, start + 4]
    return "one number", True if gone else None


def trail(rng, header, body, name):
    body += b"more"
    return "trailing bytes", True


def renumber(rng, header, body, name):
    start, end = header[name]["data_offsets"]
    strange = np.array([math.nan, math.inf, -math.inf, 3e38, -1e30, 0], np.float32)
    for _ in range(rng.choice([1, 3, 1000])):
        at = start + 4 * rng.randrange(max(1, (end - start) // 4))
        number = rng.choice(strange).tobytes()
        body[at:at + 4] = rng.choice([number, rng.randbytes(4)])
    return "other numbers", None


TENSOR_FAULTS = [rename, retype, reshape, swap, one_more, one_number, trail, renumber, renumber]
PICTURES = ["PNG 1", "PNG L", "PNG LA", "PNG P", "PNG I;16", "PNG RGBA", "TIFF F", "TIFF CMYK",
            "TIFF I", "JPEG CMYK", "JPEG L", "GIF P", "BMP RGB", "WEBP RGBA", "PPM RGB"]


def spoil_picture(rng, data):
    """As any file, or in another format and size, or both."""
    if rng.random() < 0.5:
        return spoil_bytes(rng, data)
    kind, mode = rng.choice(PICTURES).split()
    size = rng.choice([(1, 1), (1, 300), (300, 2), (17, 33), (64, 64), (2000, 3)])
    image = Image.open(io.BytesIO(data)).convert("RGB").resize(size)
    if mode in ("F", "LA", "I", "I;16"):
        image = image.convert("L")
    if mode == "I;16":
        image = image.convert("I")
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    what = f"{kind} {mode} {size}"
    if rng.random() < 0.6:
        return Spoiled(what, file.getvalue(), None)
    more, data, wrong = spoil_bytes(rng, file.getvalue())
    return Spoiled(f"{what}, {more}", data, wrong)


def spoil_log(rng, data):
    """metrics.jsonl, which a run rewrites and does not read."""
    return spoil_bytes(rng, data)._replace(wrong=None)


NONSENSE = ["", "nan", "inf", "-inf", "-1", "0", "-0.5", "1e400", "abc", "1.5", "1e-300", "\u0663",
            "/dev/null", "/", "a,b,,", "../..", "\udcff", "x" * 300, "2", "7", "1e30"]


def spoil_flags(rng, program):
    """One or two flags with values that make no sense."""
    settings = edit.EditSettings if program == "draw" else train.STAGES[program][0]
    rows = [row for row in fields(settings) if row.type is not bool]
    names = [row.name.replace("_", "-") for row in rows if row.name not in ("device", "out")]
    chosen = rng.sample(names, rng.randint(1, 2))
    return [f"--{name}={rng.choice(NONSENSE)}" for name in chosen]


# ---- fuzz: what is spoiled, and what becomes of it -----------------------------------------------

MODELS = [                   # what runs (see `programs`), its flag, the folder
    ("sft", "--qwen", "mini/qwen"),
    ("draw", "--qwen", "mini/qwen"),
    ("draw", "--controlnet", "mini/controlnet"),
    ("draw", "--flux", "mini/flux"),
    ("patch", "--features", "mini/vit"),
]
UNREAD = ["model_index.json", "special_tokens_map.json"]
OPTIONAL = ["generation_config.json", "tokenizer_config.json"]     # a model may come without them
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VECTORS = "collaborative.safetensors"
PROMPT = "image_prompt.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"
APPLE = "mini/sample/scenes/00_apple.png"
INPUTS = [                   # times, class, how, what runs, its flag, file or folder, file in that
    (12, "tables", spoil_lines, "graph", "--users", "mini/sample/users.jsonl", ""),
    (12, "tables", spoil_lines, "cdpo", "--users", "mini/sample/users.jsonl", ""),
    (12, "tables", spoil_lines, "draw", "--users", "mini/sample/users_test.jsonl", ""),
    (12, "tables", spoil_lines, "cdpo", "--pairs", "pairs.jsonl", ""),
    (12, "tables", spoil_lines, "sft", "--edits", "mini/sample/edits.jsonl", ""),
    (12, "tables", spoil_lines, "dro", "--scenes", "world", "scenes.jsonl"),
    (20, "pictures", spoil_picture, "edit", "--image", APPLE, ""),
    (5, "pictures", spoil_picture, "control", "--control-image", APPLE, ""),
    (6, "pictures", spoil_picture, "dro", "--scenes", "world", "scenes/00_apple_forest.png"),
    (7, "adapters", spoil_tensors, "draw", "--policy", "mini/policy", WEIGHTS),
    (7, "adapters", spoil_tensors, "cdpo", "--sft", "sft", WEIGHTS),
    (5, "adapters", spoil_json, "draw", "--policy", "mini/policy", CONFIG),
    (5, "adapters", spoil_json, "cdpo", "--sft", "sft", CONFIG),
    (8, "adapters", spoil_tensors, "draw", "--policy", "mini/policy", VECTORS),
    (8, "adapters", spoil_tensors, "cdpo", "--graph", "graph", VECTORS),
    (4, "adapters", spoil_tensors, "graph", "--continue-from", "graph", VECTORS),
    (8, "adapters", spoil_tensors, "patch", "--image-prompt", "mini/image_prompt", PROMPT),
    (7, "adapters", spoil_tensors, "draw", "--lora", "dro", WEIGHTS),
    (5, "adapters", spoil_json, "draw", "--lora", "dro", CONFIG),
    (7, "adapters", spoil_tensors, "draw", "--lora", "diffusers", DIFFUSERS),
]


class Case(NamedTuple):
    kind: str                # class, as the table has it
    spoil: Callable          # (rng, bytes) -> Spoiled
    program: str             # what runs, a name of `programs`
    flag: str                # its flag for the input; --out: a run to continue
    source: str              # the file or folder that the flag names, in Sample.folder
    inner: str               # the file in that folder, or ""


def all_cases():
    """Every Case, as often as it is to be tried."""
    cases = []
    for model in MODELS:
        folder = Path(model[-1])
        for file in sorted(folder.rglob("*.*")):
            inner = str(file.relative_to(folder))
            if file.suffix == ".safetensors":
                cases += 6 * [Case("weights", spoil_tensors, *model, inner)]
            elif file.name == "config.json":
                cases += 3 * [Case("configs", spoil_json, *model, inner)]
            elif file.name not in UNREAD:
                spoil = spoil_json if file.suffix == ".json" else spoil_bytes
                cases += 3 * [Case("tokenizers and other JSON", spoil, *model, inner)]
    for times, *row in INPUTS:
        cases += times * [Case(*row)]
    for stage in HALVES:
        run = (stage, "--out", f"half/{stage}")
        cases += 4 * [Case("resume states", spoil_tensors, *run, "step_2/state.safetensors")]
        cases += [Case("resume states", spoil_json, *run, "config.json")]
        cases += [Case("resume states", spoil_log, *run, "metrics.jsonl")]
    for program in ("draw", "draw", "draw", *STAGES, "eval"):
        cases += 4 * [Case("flags", spoil_flags, program, "", "", "")]
    return cases


def programs(sample):
    """{name: command line of edit.py or train.py}."""
    draw = ["edit.py", *"--steps 1 --size 32 --user glamour-stylist".split()]
    edit_apple = [*draw, "--caption", "A red apple"]
    held_out = f"--users-test {SAMPLE}/users_test.jsonl --pairs-test {SAMPLE}/pairs_test.jsonl"
    known = f"--users {SAMPLE}/users.jsonl --policy {sample.folder}/sft --answers 1"
    found = {
        "draw": draw,
        "edit": edit_apple,
        "control": [*edit_apple, "--image", sample.folder / APPLE],
        "eval": ["train.py", "eval", *held_out.split(), *known.split()],
    }
    for stage in STAGES:
        found[stage] = ["train.py", *sample.argv(stage)]
    return found


def prepare(rng, case, sample, place):
    """Spoils the input of a case in the folder `place` -> (Spoiled, the flag that names it, words
    of which a refusal must have one)."""
    if case.kind == "flags":
        flags = spoil_flags(rng, case.program)
        what = " ".join([case.program, *flags])
        words = re.findall(r"[^-=\s]+", what.encode(errors="backslashreplace").decode())
        return Spoiled(what, MISSING, None), flags, ["--", "''", *words]
    source = sample.folder / case.source
    folder = place / ("out" if case.flag == "--out" else source.name)
    if case.inner:
        copy = shutil.copy if case.flag == "--out" else os.symlink
        lock = shutil.ignore_patterns(".lock")
        shutil.copytree(source, folder, copy_function=copy, ignore=lock)
    what, data, wrong = case.spoil(rng, (source / case.inner).read_bytes())
    target = folder / case.inner
    target.unlink(missing_ok=True)
    if data == FOLDER:
        target.mkdir()
    elif data != MISSING:
        target.write_bytes(data)
    if data in (MISSING, FOLDER) and target.name in OPTIONAL:
        wrong = None
    files = {"--scenes": folder / "scenes.jsonl", "--image-prompt": target}
    flags = [case.flag, files.get(case.flag, folder)]
    words = [target.name, str(target.parent)]
    return Spoiled(f"{source.name}/{case.inner} {what}", data, wrong), flags, words


def witness(name, bad):
    """Makes a method of tensors tell when it is called on numbers that are `bad`."""
    plain = getattr(torch.Tensor, name)

    def method(self, *given, **named):
        if self.is_floating_point() and bad(self).any():
            print("WITNESS: words or pictures of numbers that are not finite", file=sys.stderr)
        return plain(self, *given, **named)

    setattr(torch.Tensor, name, method)


def guarded(name, *argv):
    """In a child: a script with limits on time and memory, and a witness where pictures and words
    are made of numbers."""
    resource.setrlimit(resource.RLIMIT_CPU, (40, 41))
    resource.setrlimit(resource.RLIMIT_AS, (2 ** 34, 2 ** 34))
    witness("byte", lambda numbers: ~numbers.isfinite())
    witness("argmax", torch.isnan)
    script(name, *argv)


FINE = ["refused, file or flag named", "refused, not finite", "accepted"]


def verdict(code, text, wrong, words, out):
    """What became of a run with a spoiled input; what is not in FINE is a fault."""
    said = sentence(text)
    if code == "hang":
        return "hang"
    if code < 0:
        return "crash"
    if "Traceback" in text or "panicked" in text:
        return "traceback"
    if code != 0:
        if wrong is False:
            return "refused though fine"
        if any(word in said for word in words):
            return "refused, file or flag named"
        return "refused, not finite" if "finite" in said else "nameless message"
    results = [load_file(file) for file in out.rglob("*.safetensors")]
    if "WITNESS" in text or not all(map(finite, results)):
        return "not finite"
    return "accepted though wrong" if wrong else "accepted"


class Outcome(NamedTuple):
    kind: str
    what: str
    verdict: str
    said: str
    text: str


def run_case(n, seed, cases, sample):
    """Case n, alone -> Outcome."""
    case = cases[n % len(cases)]
    rng = random.Random(f"{seed} {n}")
    place = sample.folder / f"case{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    spoiled, flags, words = prepare(rng, case, sample, place)
    argv = programs(sample)[case.program]
    out = place / ("out" if argv[0] == "train.py" else "out.png")
    if case.program != "eval":
        argv += ["--out", out]
        argv += ["--steps", 4 if case.kind == "resume states" else 1]
    if case.program == "patch":
        argv += ["--generated", place / "generated"]      # by the model of this case
    code, text = Run(guarded, *argv, *flags).finish(300)
    found = verdict(code, text, spoiled.wrong, words, out)
    return Outcome(case.kind, spoiled.what, found, sentence(text), text)


def write_loras(sample):
    """What `train.py dro` writes, and the same as diffusers stores it."""
    sample.run("dro", sample.folder / "dro").must()
    tensors = {}
    for name, tensor in load_file(sample.folder / "dro" / WEIGHTS).items():
        tensors[name.replace("base_model.model.", "transformer.")] = tensor
    (sample.folder / "diffusers").mkdir()
    save_file(tensors, sample.folder / "diffusers" / DIFFUSERS)


def fuzz(args, sample):
    write_loras(sample)
    for stage in HALVES:
        sample.half(stage, sample.folder / "half" / stage)
    cases = all_cases()
    random.Random(args.seed).shuffle(cases)
    try_one = functools.partial(run_case, seed=args.seed, cases=cases, sample=sample)
    if args.only is not None:
        print(*try_one(args.only), sep="\n")
        return
    with ProcessPoolExecutor(args.jobs, mp_context=FORK) as pool:
        outcomes = list(pool.map(try_one, range(args.count or 2000)))
    counts = defaultdict(Counter)
    faults = defaultdict(list)                            # by verdict and the message's first words
    for n, outcome in enumerate(outcomes):
        counts[outcome.kind][outcome.verdict] += 1
        counts["all"][outcome.verdict] += 1
        if outcome.verdict not in FINE:
            said = re.sub(r"/\S*/", "", outcome.said)[:200]
            kind = (outcome.verdict, re.sub(r"[\d'\"].*", "", said))
            faults[kind].append(f"case {n}: {outcome.what[:150]}: {said}")
    verdicts = FINE + sorted({name for name, _ in faults})
    rows = []
    for kind in sorted(counts, key=lambda kind: kind == "all"):
        found = counts[kind]
        rows.append([kind, found.total(), *(found[name] for name in verdicts)])
    table(f"Spoiled inputs, seed {args.seed}", ["class", "inputs", *verdicts], rows)
    for (name, _), same in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"{name}, {len(same)} of this kind, e.g. {same[0]}")


PARTS = {"kill": kill, "disk": disk, "workers": workers, "numbers": numbers, "fuzz": fuzz}


def main():
    about, more = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"some of {', '.join(PARTS)}; all when not given")
    parser.add_argument("--count", type=int, help="kills a stage (50), random tries of each way in "
                        "which a disk fails (8), spoiled inputs (2000)")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES,
                        help="of kill, disk and workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes of fuzz (2)")
    parser.add_argument("--only", type=int, help="one case of fuzz, with all it prints")
    args = parser.parse_args()
    unknown = set(args.part) - set(PARTS)
    if unknown:
        parser.error(f"part {unknown.pop()}: allowed are {', '.join(PARTS)}")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="backslashreplace")
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(Path(folder))
        for name in args.part or PARTS:
            PARTS[name](args, sample)


if __name__ == "__main__":
    main()
