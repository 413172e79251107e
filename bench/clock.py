"""How the benches measure: times taken in turn, peaks of memory, weights drawn where they will
work, tables in Markdown.

A ratio is the peer's median over ours, both taken in one process, call by call in turn: above 1
we are faster, or smaller. `args` are the flags of run.py. Whoever imports this file can import the
project's files, too.
"""
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cdpo import markdown_table

ROOT = Path(__file__).resolve().parent.parent


# ---- time and memory ---------------------------------------------------------------------------

def seconds(call, device):
    """How long call() takes, by CUDA's events where the device is one."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000                     # it counts milliseconds


def in_turn(sides, args, warm=1):
    """{name: call} -> {name: median seconds} of args.rounds calls each, one side after the other,
    after `warm` rounds that do not count."""
    times = {name: [] for name in sides}
    for _ in range(warm + args.rounds):
        for name, call in sides.items():
            times[name].append(seconds(call, args.device))
    return {name: statistics.median(t[warm:]) for name, t in times.items()}


def resident(key="VmRSS"):
    """Bytes of main memory this process holds now (VmRSS) or has held at most (VmHWM). Linux."""
    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(rf"{key}:\s+(\d+)", status)[1]
    return 1024 * int(kilobytes)


def reset_peak(device):
    """From now on `peak_bytes` counts anew; `most_ever` still knows what was."""
    most_ever(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")         # VmHWM starts anew


def peak_bytes(device):
    """The most bytes since `reset_peak`: CUDA's allocator, or resident memory on the CPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident("VmHWM")


PEAKS = [0]                                                   # each that was reset


def most_ever(device):
    """The most bytes in the life of this process."""
    PEAKS.append(peak_bytes(device))
    return max(PEAKS)


def peak(call, device):
    """(bytes before, most bytes during call())."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
    reset_peak(device)
    before = torch.cuda.memory_allocated() if cuda else resident()
    call()
    return before, peak_bytes(device)


def python():
    """How this Python was started: by way of the imitation of CUDA, if there is one."""
    imitation = sys.modules.get("cuda_imitation")
    return [sys.executable, imitation.__file__] if imitation else [sys.executable]


def alone(args, side, **changes):
    """What the row's function in run.SIDES finds about `side` in a process of its own -> dict."""
    flags = json.dumps({**vars(args), **changes, "side": side})
    command = [*python(), str(ROOT / "bench" / "run.py"), "--child", flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{args.row}, {side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rates(args):
    """(matrix products in FLOP/s of args.dtype, bytes/s read and written by copies) of the device,
    each the best of five."""
    big = args.device.startswith("cuda") and not args.tiny
    side = 8192 if big else 1024
    size = 2 ** 30 if big else 2 ** 26                        # bytes
    a = torch.randn(side, side, device=args.device).to(weights_type(args))
    b = torch.randn(side, side, device=args.device).to(weights_type(args))
    x = torch.ones(size // 4, device=args.device)
    y = torch.ones(size // 4, device=args.device)
    product = min(seconds(lambda: a @ b, args.device) for _ in range(5))
    copy = min(seconds(lambda: x.copy_(y), args.device) for _ in range(5))
    return 2 * side ** 3 / product, 2 * size / copy


# ---- both sides' models ------------------------------------------------------------------------

def sized(args, here, real, tiny):
    """One of three: for two CPU cores, the real models' (--random), for a test (--tiny)."""
    if args.tiny:
        return tiny
    return real if args.random else here


def weights_type(args):
    return getattr(torch, args.dtype)


def vary(args, **changes):
    """The flags with other values for some."""
    return Namespace(**{**vars(args), **changes})


def draw_parameter(name, shape, args, generator):
    """Matrices of a size at which signals keep theirs, small biases, a norm's weights near 1."""
    std = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
    values = torch.empty(shape, device=args.device, dtype=weights_type(args))
    values.normal_(std=std, generator=generator)
    if len(shape) == 1 and "weight" in name:
        values += 1
    return nn.Parameter(values, requires_grad=False)


@torch.no_grad()
def draw(module, args, seed=0):
    """A module on the meta device -> itself, its weights drawn on the device; tied ones stay so."""
    generator = torch.Generator(args.device).manual_seed(seed)
    drawn = {}                                                # parameter on meta: the drawn one
    for name, p in module.named_parameters(remove_duplicate=False):
        if p not in drawn:
            drawn[p] = draw_parameter(name, p.shape, args, generator)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, drawn[p])
    return module.eval()


def twin(build, ours):
    """The peer's module that build() makes, with the very tensors of ours, but for its adapters."""
    with torch.device("meta"):
        module = build()
    weights = {name: t for name, t in ours.state_dict().items() if ".lora_" not in name}
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def relative(a, b):
    """How far a is from b, as a share of b's length."""
    a = a.double()
    b = b.double()
    return ((a - b).norm() / b.norm()).item()


# ---- what is printed ---------------------------------------------------------------------------

def table(columns, rows):
    """A table in Markdown; its cells may be numbers."""
    return markdown_table(columns, [map(str, row) for row in rows]) + "\n"


def ms(s):
    return f"{s * 1e3:,.3g} ms" if s < 1 else f"{s:,.3g} s"


def gb(n):
    return f"{n / 1e9:.2f} GB"


def ratio(a, b):
    return f"**{a / b:.2f}**"


SUMMARY = []                                                  # rows of the README's table


def summarise(args, what, against, ours, theirs, *, memory=""):
    """A line of the README's table: seconds of both sides."""
    row = [f"`{args.row}`", what, against, ms(ours), ms(theirs), ratio(theirs, ours), memory]
    SUMMARY.append(row)


def where(args):
    """Machine, type, versions and commit, in one line."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    if args.device.startswith("cuda"):
        chip = torch.cuda.get_device_name()
    else:
        name = cpu[1] if cpu else platform.processor()
        chip = f"{name}, {torch.get_num_threads()} threads"
    return f"{chip}, {args.dtype}, torch {torch.__version__}, commit {commit}"
