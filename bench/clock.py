"""How the benches measure: times taken in turn, peaks of memory, weights drawn where they will work, tables in Markdown.

A ratio is the peer's median over ours, both taken in one process, call by call in turn; above 1 we are faster, or smaller.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

def seconds(f, device):
    """How long f() takes, by CUDA's events where the device is one."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000

def in_turn(sides, args, warm=1):
    """{name: function} -> {name: median seconds} of args.rounds calls each, one side after the other, after `warm` calls that do not count."""
    times = {name: [] for name in sides}
    for i in range(warm + args.rounds):
        for name, f in sides.items():
            times[name].append(seconds(f, args.device))
    return {name: statistics.median(t[warm:]) for name, t in times.items()}

def resident(key="VmRSS"):
    """Bytes of main memory this process holds now (VmRSS) or has held at most (VmHWM)."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def peak(f, device):
    """(bytes before, most bytes during f()): CUDA's allocator, or resident memory on the CPU (Linux)."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return before, torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")           # VmHWM starts anew
    before = resident()
    f()
    return before, resident("VmHWM")

def alone(args, side, **changes):
    """What run.py's `side` function of this row finds in a process of its own -> dict."""
    flags = json.dumps({**vars(args), **changes, "side": side})
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "run.py"), "--child", flags], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{args.row}, {side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])

def vary(args, **changes):
    return Namespace(**{**vars(args), **changes})

@torch.no_grad()
def draw(module, args, seed=0):
    """Weights for a module on the meta device, drawn on the device: of a size at which signals keep theirs, tied ones tied."""
    generator, dtype, new = torch.Generator(args.device).manual_seed(seed), getattr(torch, args.dtype), {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) not in new:
            values = torch.empty(p.shape, device=args.device, dtype=dtype).normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.02, generator=generator)
            new[id(p)] = p, nn.Parameter(values + (p.ndim == 1 and "weight" in name), requires_grad=False)       # p is kept, so that its id stays its own
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new[id(p)][1])
    return module.eval()

def twin(build, ours):
    """The peer's module that `build()` makes, with the very tensors of ours (but for its adapters)."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict({name: t for name, t in ours.state_dict().items() if ".lora_" not in name}, assign=True)
    return module.eval().requires_grad_(False)

def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

def rates(args):
    """(matrix products in FLOP/s of args.dtype, bytes/s read and written by copies) of the device, each the best of five."""
    n, big = (8192, 2 ** 30) if args.device.startswith("cuda") else (1024, 2 ** 26)
    a, b = (torch.randn(n, n, device=args.device).to(getattr(torch, args.dtype)) for _ in range(2))
    x, y = (torch.ones(big // 4, device=args.device) for _ in range(2))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, args.device) for _ in range(5)), 2 * big / min(seconds(lambda: x.copy_(y), args.device) for _ in range(5))

def table(columns, rows):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]) + "\n"

def ms(s):
    return f"{s * 1e3:,.3g} ms" if s < 1 else f"{s:,.3g} s"

def gb(n):
    return f"{n / 1e9:.2f} GB"

def where(args):
    """Machine, commit and versions, in one line."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    chip = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{cpu[1] if cpu else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{chip}, {args.dtype}, torch {torch.__version__}, commit {commit}"
