"""Does anything get lost, hang, or end in a traceback? Kills, full disks, dead workers, spoiled files; prints its counts as Markdown.

    python bench/reliability.py kill --count 50        # SIGKILLs a stage; every run is continued and must end in the bytes of an unbroken one
    python bench/reliability.py disk                   # full and read-only disks during a save (a tmpfs, where mounting is allowed)
    python bench/reliability.py workers                # torchrun with 1, 2 and 4 gloo processes; one worker killed
    python bench/reliability.py numbers                # not finite: losses, weights, latents; the same seed twice
    python bench/reliability.py fuzz --count 2000      # spoiled weights, configs, tables, pictures, adapters, resume states, flags
    python bench/reliability.py fuzz --only 17         # what case 17 was, and all it prints

Runs are children forked from this process after its imports, so a run takes a second; without a name every part runs. All on the shipped sample.
"""
import argparse, builtins, contextlib, io, itertools, json, math, mmap, os, random, re, resource, runpy, shutil, signal, struct, subprocess, sys, tempfile, time, traceback
from collections import Counter, defaultdict
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
sys.stdout.reconfigure(errors="backslashreplace")
import numpy as np
import torch
import torch._dynamo          # what torch imports at the first optimizer, 3 s in every child otherwise
from PIL import Image
from safetensors.torch import load_file

import edit
import train

torch.set_num_threads(1)
SAMPLE, MINI, STAGES = ROOT / "mini/sample", ROOT / "mini", ("graph", "sft", "cdpo", "patch", "dro")

# ------------------------------------------------------------------------------------------------ runs as forked children
def fork(job):
    """job() in a child -> (its process id, the file with what it prints). It ends as the interpreter would: exit codes, messages, tracebacks."""
    log = tempfile.TemporaryFile()
    sys.stdout.flush()
    if pid := os.fork():
        return pid, log
    code = 1
    try:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        job()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else print(e.code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

def result(pid, log, seconds=600):
    """Wait for a child -> (exit code, or minus the signal that ended it, or "hang"; what it printed)."""
    end, done = time.monotonic() + seconds, (0, 0)
    while not done[0] and time.monotonic() < end:
        time.sleep(0.003)
        done = os.waitpid(pid, os.WNOHANG)
    code = os.waitstatus_to_exitcode(done[1]) if done[0] else "hang"
    if not done[0]:
        os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
    log.seek(0)
    return "hang" if code == -signal.SIGXCPU else code, log.read().decode(errors="replace")

def command(script, *argv, before=lambda: None):
    """A job: the script as the command line runs it, `before` first."""
    def job():
        before()
        sys.argv = [script, *map(str, argv)]
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return job

def sentence(text):
    """The line that says why a run ended: the script's message, else the last line."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip() and "WITNESS" not in line] or [""]
    return ([found[0] for line in lines if (found := re.search(r"((train|edit)\.py( \w+)?|ValueError): .*", line))] or lines)[-1]

def must(job, code=0):
    found, text = result(*fork(job))
    if found != code:
        raise SystemExit(f"exit {found}, not {code}:\n{text[-2000:]}")

class Sample:
    """Tiny inputs and finished stages in `folder`, and the flags of every stage on them."""

    def __init__(self, folder):
        self.folder = folder
        scene = json.loads((SAMPLE / "scenes.jsonl").read_text().splitlines()[0])
        edits = [e for e in scene["edits"] if e["edit_type"] == "background"]
        (folder / "world/scenes").mkdir(parents=True)
        for picture in (scene["image"], *(e["image"] for e in edits[:6])):
            shutil.copy(SAMPLE / picture, folder / "world" / picture)
        (folder / "world/scenes.jsonl").write_text("".join(json.dumps({**scene, "edits": edits[at:at + 2]}) + "\n" for at in (0, 2, 4)))
        (folder / "pairs.jsonl").write_text("".join((SAMPLE / "pairs.jsonl").read_text().splitlines(True)[:12]))
        pictures = f"--scenes {folder}/world/scenes.jsonl --size 32 --batch 2 --micro 1 --paint-steps 1 --held-out 1"
        self.flags = {name: f"{text} --steps 4 --save-every 1".split() for name, text in {
            "graph": f"--users {SAMPLE}/users.jsonl", "sft": f"--edits {SAMPLE}/edits.jsonl --batch 2 --micro 1",
            "cdpo": f"--users {SAMPLE}/users.jsonl --pairs {folder}/pairs.jsonl --sft {folder}/sft --graph {folder}/graph --batch 2 --micro 1",
            "patch": f"{pictures} --samples 1 --image-prompt {folder}/start/image_prompt.safetensors", "dro": f"{pictures} --buffer 4", "start": f"{pictures} --loss start"}.items()}
        for name in ("graph", "sft", "start"):
            must(self.run(name))

    def argv(self, name, out=None, *more):
        return ["patch" if name == "start" else name, *self.flags[name], "--out", str(out or self.folder / name), *map(str, more)]

    def run(self, name, out=None, *more, before=lambda: None):
        return command("train.py", *self.argv(name, out, *more), before=before)

    def half(self, name, out):
        """A run that was lost right after its second save."""
        def job():
            save = train.save_state
            train.save_state = lambda stage, optimizer, out, step: save(stage, optimizer, out, step) or (step == 2 and os._exit(9))
            train.main(self.argv(name, out))
        must(job, 9)

def contents(folder):
    """{name: bytes} of all that a run leaves, but for its flags and its lock."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in ("config.json", ".lock")}

def differences(folder, whole):
    found = contents(folder)
    return [f"{name} differs" for name in sorted({*found, *whole}) if found.get(name) != whole.get(name)]

def newest(folder):
    """The newest checkpoint's tensors, {} when there is none; an error when they are not all there and finite."""
    tensors = load_file(max(folder.glob("step_*"), key=lambda p: int(p.name[5:])) / "state.safetensors") if list(folder.glob("step_*")) else {}
    if not finite(tensors):
        raise ValueError(f"{folder}: its newest checkpoint is not finite")
    return tensors

def finite(tensors):
    return all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())

def table(title, columns, rows):
    print("\n".join([f"\n**{title}**\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *("| " + " | ".join(map(str, row)) + " |" for row in rows)]), flush=True)

# ------------------------------------------------------------------------------------------------ kill
def watched(argv, seen):
    """A job: train.py with its phase in seen[0] (0 start, 1 training, 2 saving) and the number of saves begun in seen[1]."""
    def saving(save, counts=lambda *_: True):
        def wrapped(*given):
            before, seen[0], seen[1] = seen[0], 2 if counts(*given) else seen[0], seen[1] + counts(*given)
            save(*given)
            seen[0] = before
        return wrapped

    def job():
        step = train.gradients
        train.gradients = lambda *given: seen.__setitem__(0, 1) or step(*given)
        train.save_state, train.publish = saving(train.save_state), saving(train.publish, lambda folder, write, why: why == "the result")
        train.main(argv)
    seen[0] = seen[1] = 0
    return job

def strike(stage, sample, out, rng, seen, seconds, own):
    """Start the stage (own: as a process of its own, imports and all), kill it at a random moment -> the phase it died in; None when it had ended."""
    if own:
        process = subprocess.Popen([sys.executable, "train.py", *sample.argv(stage, out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 4))
        phase = "start" if (out / ".lock").exists() else "imports"
        process.kill()
        return phase if process.wait() == -signal.SIGKILL else None
    pid, log = fork(watched(sample.argv(stage, out), seen))
    if rng.random() < 0.6:
        time.sleep(rng.uniform(0, seconds))
    else:                                                                                # in a save
        target = rng.randint(1, 4)
        while seen[1] < target and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    code, text = result(pid, log)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{stage} ended by itself, exit {code}:\n{text[-2000:]}")
    return ("start", "training", "a save")[seen[0]] if code else None

def kill(args, sample):
    seen = mmap.mmap(-1, 2)
    table("Killed with SIGKILL and continued", ["stage", "kills", "in imports", "start", "training", "a save", "runs ended, compared byte for byte", "faults", "same seed twice: same bytes",
                                               "a second run on the folder"], [])
    for stage in args.stages:
        rng, landed, faults, runs, start = random.Random(f"{args.seed} {stage}"), Counter(), [], 0, time.monotonic()
        for name in ("whole", "again"):
            must(sample.run(stage, sample.folder / name / stage))
        seconds, whole, ended = (time.monotonic() - start) / 2, contents(sample.folder / "whole" / stage), False
        same, out = not differences(sample.folder / "again" / stage, whole), sample.folder / f"torn/{stage}0"
        while landed.total() < args.count or not ended:
            phase = strike(stage, sample, out, rng, seen, seconds, landed.total() % 10 == 9) if landed.total() < args.count else must(sample.run(stage, out))
            ended = phase is None
            if ended:                                                                    # by now it must be whole, and nothing else may lie there
                faults += [f"{out.name}: {fault}" for fault in differences(out, whole)]
                runs, out = runs + 1, sample.folder / f"torn/{stage}{runs + 1}"
                continue
            landed[phase] += 1
            try:
                newest(out)
            except Exception as e:
                faults.append(f"{out.name}, kill {landed.total()}: {e}")
        row = [stage, landed.total(), *(landed[p] for p in ("imports", "start", "training", "a save")), runs, len(faults), "yes" if same else "NO", two_runs(stage, sample, seen)]
        print("| " + " | ".join(map(str, row)) + " |", *(f"fault: {fault}" for fault in faults[:10]), sep="\n", flush=True)

def two_runs(stage, sample, seen):
    """What becomes of a second run on the folder of one that works."""
    out = sample.folder / "twice" / stage
    pid, log = fork(watched(sample.argv(stage, out, "--steps", 100), seen))
    while seen[0] == 0:
        time.sleep(0.002)
    code, text = result(*fork(sample.run(stage, out, "--steps", 100)))
    os.kill(pid, signal.SIGTERM)
    first = result(pid, log)[0]
    return "refused" if code == 1 and "another run" in text and first == 1 and newest(out) else f"NOT REFUSED: {code} {first} {text[-300:]}"

# ------------------------------------------------------------------------------------------------ disk
def full_after(n):
    """In the child: from the n-th time that something is opened to be written, moved or made, the disk is full."""
    calls = itertools.count(1)

    def guard(plain, writes=lambda *given, **named: True):
        def wrapped(*given, **named):
            if writes(*given, **named) and next(calls) >= n:
                raise OSError(28, "No space left on device", str(given[0]))
            return plain(*given, **named)
        return wrapped
    os.replace, os.mkdir = guard(os.replace), guard(os.mkdir)
    builtins.open = io.open = guard(io.open, lambda file, mode="r", *rest, **named: set(mode) & set("wax+"))

def disk(args, sample):
    """A run that was lost after step 2 goes on while its disk fails: one sentence that names the folder, the checkpoint intact; then it goes on to the end."""
    rows, small, rng, here = [], sample.folder / "small", random.Random(args.seed), lambda *how: subprocess.run(["mount", *how], capture_output=True).returncode == 0
    small.mkdir()
    mounted = here("-t", "tmpfs", "-o", "size=64m", "tmpfs", small)
    for stage in args.stages:
        must(sample.run(stage, sample.folder / "disk" / stage))
        whole, found, out = contents(sample.folder / "disk" / stage), defaultdict(list), (small if mounted else sample.folder / "disk") / "run"
        size = max(map(len, whole.values()))

        def attempt(how, detail="", spoil=lambda: None, heal=lambda: None, before=lambda: None):
            shutil.rmtree(out, ignore_errors=True)
            sample.half(stage, out)
            spoil()
            code, text = result(*fork(sample.run(stage, out, before=before)))
            heal()
            faults = [f"exit {code}: {sentence(text)[:300]}"] if code not in (0, 1) or code and ("Traceback" in text or not re.search(rf"train\.py: .*{out}", sentence(text))) else []
            with contextlib.suppress(KeyError):
                faults += [] if newest(out) else ["no checkpoint is left"]
            must(sample.run(stage, out))
            found[how].append((code, [f"{stage}, {how} {detail}: {fault}" for fault in faults + differences(out, whole)]))
            return code

        def ballast(free):
            room = os.statvfs(small)
            (small / "ballast").write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - free)))
        for free in (0, 4096, *(rng.randrange(3 * size) for _ in range(8))) if mounted else ():
            attempt("full tmpfs", f"with {free} bytes left", lambda: ballast(free), (small / "ballast").unlink)
        if mounted:
            attempt("read-only folder", "", lambda: here("-o", "remount,ro", small), lambda: here("-o", "remount,rw", small))
        for limit in (4096, *(rng.randrange(4096, size) for _ in range(5))):
            attempt("limited file size", f"of {limit}", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
        for n in itertools.count(1):
            if not attempt("full from the n-th call on", n, before=lambda: full_after(n)):
                break
        rows += [[stage, how, sum(bool(code) for code, _ in tries), sum(not code for code, _ in tries), sum(map(bool, (faults for _, faults in tries)))] for how, tries in found.items()]
        print(*(f"fault: {fault}" for tries in found.values() for _, faults in tries for fault in faults), sep="\n")
    subprocess.run(["umount", small], capture_output=True)
    table("A disk that fails while a run goes on", ["stage", "how", "runs that ended, checkpoint intact, then continued to the same bytes", "that it did not disturb", "faults"], rows)

# ------------------------------------------------------------------------------------------------ workers
def torchrun(n, argv):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def workers(args, sample):
    rows = []
    for stage in args.stages:
        states, out, flags = {}, sample.folder / "workers" / f"{stage}torn", ["--steps", 12, *(["--batch", 4] if stage != "graph" else [])]
        for n in (1, 2, 4):
            job = torchrun(n, sample.argv(stage, out.with_name(f"{stage}{n}"), *flags))
            text = job.communicate()[0]
            states[n] = newest(out.with_name(f"{stage}{n}")) if job.returncode == 0 else sys.exit(text[-2000:])
        apart = {n: max((states[n][k] - t).abs().max().item() / t.abs().max().clamp_min(1e-9).item() for k, t in states[1].items() if ":" not in k) for n in (2, 4)}
        job = torchrun(2, sample.argv(stage, out, *flags))
        while job.poll() is None and not list(out.glob("step_*")):
            time.sleep(0.01)
        os.kill(int(subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True).stdout.split()[-1]), signal.SIGKILL)
        text, at = job.communicate()[0], max(int(p.name[5:]) for p in out.glob("step_*"))
        said = re.findall(r"train\.py: .*|.*SIGKILL.*", text)
        again = torchrun(2, sample.argv(stage, out, *flags))
        again.communicate()
        rows.append([stage, f"{apart[2]:.1e}", f"{apart[4]:.1e}", f"exit {job.returncode} after step {at} of 12: {said[0].strip()[:160] if said else 'NO MESSAGE'}", again.returncode,
                     "; ".join(differences(out, contents(out.with_name(f"{stage}2")))) or "yes"])
    table("torchrun on gloo, the same global batch", ["stage", "weights of 2 processes against 1 (largest difference over largest weight)", "4 against 1", "one of 2 killed", "exit of the restart",
                                                     "then the bytes of an unbroken run"], rows)

# ------------------------------------------------------------------------------------------------ numbers
def numbers(args, sample):
    rows, out = [], sample.folder / "numbers"

    def check(what, job, says, leaves):
        code, text = result(*fork(job))
        good = code not in (0, "hang") and re.search(says, sentence(text)) and not any(Path(f).exists() for f in leaves)
        rows.append([what, "refused" if good else "FAULT", sentence(text).replace(str(sample.folder), "").replace("|", "/")[:200]])

    def infected(stage, call, folder):
        def job():
            plain, calls = train.STAGES[stage].loss, itertools.count(1)
            train.STAGES[stage].loss = lambda self, rows: (plain(self, rows)[0] * (math.nan if next(calls) == call else 1), {})
            train.main(sample.argv(stage, folder))
        return job
    for stage in ("graph", "sft", "cdpo", "dro"):
        nan, vast, results = out / f"{stage} nan", out / f"{stage} lr", ("adapter_model.safetensors", "collaborative.safetensors")
        check(f"{stage}: NaN in the loss of step 3", infected(stage, 3 if stage == "graph" else 5, nan), r"step 3.* on .*not taken", [nan / "step_3", *(nan / name for name in results)])
        rows[-1][1] += ", step 2 kept" if newest(nan) else ", LOST"
        check(f"{stage}: --lr 1e29 --clip 0", sample.run(stage, vast, "--lr", "1e29", "--clip", "0"), r"step \d.*(not taken|not saved|finite)", [vast / name for name in results])
    for flag, source, file, key in [
            ("--flux", "flux", "transformer/diffusion_pytorch_model.safetensors", "x_embedder.weight"), ("--flux", "flux", "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
            ("--flux", "flux", "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight"), ("--controlnet", "controlnet", "diffusion_pytorch_model.safetensors", "controlnet_x_embedder.weight"),
            ("--qwen", "qwen", "model.safetensors", "model.norm.weight"), ("--policy", "policy", "adapter_model.safetensors", ""), ("--policy", "policy", "collaborative.safetensors", "soft.fc2.bias")]:
        folder, data = links(MINI / source, out / file.replace("/", " ")), bytearray((MINI / source / file).read_bytes())
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
        at = 8 + size + header[key or [name for name in header if name != "__metadata__"][0]]["data_offsets"][0]
        data[at:at + 4] = struct.pack("<f", math.nan)
        (folder / file).unlink()
        (folder / file).write_bytes(data)
        check(f"edit.py: one NaN in {source}/{file}", command("edit.py", "--steps", 2, "--size", 32, "--user", "glamour-stylist", flag, folder, "--out", folder / "nan.png"), "finite", [folder / "nan.png"])
    table("Numbers that are not finite", ["what", "", "message"], rows)
    made = []
    for name in ("one", "two"):
        must(command("edit.py", "--steps", 2, "--temperature", 1, "--out", out / f"{name}.png"))
        made.append([*(np.asarray(Image.open(f)).tobytes() for f in sorted(out.glob(f"{name}*.png"))), *(json.loads(f.read_text()).get("instruction") for f in sorted(out.glob(f"{name}*.json")))])
    unsafe = [f.name for f in ROOT.glob("*.py") if re.search(r"\bpickle\b|torch\.load\(|trust_remote_code|(?<![.\w])(eval|exec)\(", f.read_text())]
    table("What a user brings", ["", ""], [["files that unpickle, or run code from a file or repository", ", ".join(unsafe) or "none of the ten"]])
    table("The same seed twice", ["", "same"], [["edit.py: every picture and sampled instruction", "yes" if made[0] == made[1] else "NO"], ["every training stage", "see kill"]])

# ------------------------------------------------------------------------------------------------ fuzz: how a file is spoiled
# Each takes (rng, bytes) -> (what was done, the new bytes or None for a folder in its place or "" for nothing, must it be refused: True, False, or None where that depends)
VALUES = [None, True, False, 0, 1, -1, 2 ** 31, 10 ** 9, 10 ** 30, 0.5, -0.5, 1e308, math.nan, math.inf, "", "x", "\ud800", "nan", [], [0], {}, {"a": 1}, [[]], ["x"], "a b" * 400]

def spoil_bytes(rng, data):
    at, span, flipped = rng.randrange(max(1, len(data))), rng.randrange(1, 60), bytearray(data)
    for _ in range(rng.randint(1, 6)):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    noise = rng.randbytes(span)
    return rng.choice([("empty", b"", True), ("cut off", data[:at], None), ("bits flipped", bytes(flipped), None), ("noise put in", data[:at] + noise + data[at:], None),
                       ("a part gone", data[:at] + data[at + span:], None), ("noise alone", noise, True), ("zeros", bytes(len(data)), True), ("a folder in its place", None, True),
                       ("missing", "", True), ("nested", b"[" * 100_000, True)])

def spoil_json(rng, data):
    if rng.random() < 0.25:
        return spoil_bytes(rng, data)
    root = {"": json.loads(data)}
    owner, key = root, ""
    while rng.random() < 0.75 and isinstance(owner[key], dict | list) and owner[key]:
        owner = owner[key]
        key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    what, owner[key] = f"{key!r} is another", rng.choice(VALUES)
    if rng.random() < 0.3 and owner is not root:
        what = f"without {key!r}"
        del owner[key]
    return f"{what}: {str(owner.get(key) if isinstance(owner, dict) else owner)[:30]}", json.dumps(root[""]).encode(), None

def spoil_lines(rng, data):
    """A table of JSON lines."""
    lines, kind = data.splitlines(), rng.choice(["bytes", "json", "json", "type", "type", "twice", "torn", "fine"])
    n = rng.randrange(len(lines))
    row, line = json.loads(lines[n]), lines[n]
    if kind == "bytes":
        return spoil_bytes(rng, data)
    what, new, wrong = kind, [line], None
    if kind == "json":
        what, line, wrong = spoil_json(rng, line)
        new = [line or b""]
        wrong = wrong if line else None
    elif kind == "type":
        name = rng.choice([k for k in row if k not in ("edit_type", "edits", "hidden", "output")])
        what, new, wrong = f"{name} of a wrong type", [json.dumps({**row, name: rng.choice([None, 3, 0.5, {}, True, [3], [None]])}).encode()], True
    elif kind == "twice":
        new, wrong = [line, line], "likes" in row
    elif kind == "torn":
        new, wrong = [line[:rng.randrange(1, len(line))]], True
    elif kind == "fine":
        what, new, wrong = "other line ends, blank lines, a field more", [b"\r", json.dumps({**row, "more": [1]}).encode() + b"\r", b" "], False
    return f"line {n + 1}: {what}", b"\n".join([*lines[:n], *new, *lines[n + 1:]]), wrong

def spoil_tensors(rng, data):
    """A safetensors file: 8 bytes of length, a JSON header, a body."""
    size, kind = struct.unpack("<Q", data[:8])[0], rng.randrange(13)
    header, body = json.loads(data[8:8 + size]), bytearray(data[8 + size:])
    names = [n for n in header if n != "__metadata__"]
    a, b = header[one := rng.choice(names)], header[two := rng.choice(names)]
    (start, end), shape, wrong = a["data_offsets"], a["shape"], True
    if kind == 0:
        return spoil_bytes(rng, data)
    if kind == 1:
        return "another header length", struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2 ** 40, 2 ** 63, rng.randrange(2 ** 20)])) + data[8:], True
    if kind in (2, 3):
        what, text, _ = (spoil_bytes if kind == 2 else spoil_json)(rng, data[8:8 + size])
        return f"header: {what}", struct.pack("<Q", len(text or b"") if kind == 3 else size) + (text or b"") + bytes(body), None
    if kind == 4:
        what = "another name"
        header[rng.choice(["more", one + "_"])] = header.pop(one)
    elif kind == 5:
        old, a["dtype"] = a["dtype"], rng.choice(["I32", "U32", "I64", "F64", "F16", "BF16", "BOOL", "U8", "F8_E4M3", "x"])
        what, wrong = a["dtype"], None if {old, a["dtype"]} <= {"F16", "BF16"} or old == a["dtype"] else True
    elif kind == 6:
        a["shape"] = rng.choice([[1, *shape], [*shape, 1], [-1, *shape[1:]], shape[:-1], [2 ** 62, 4], shape[::-1], [0]])
        what, wrong = f"shape {a['shape']}", a["shape"] != shape
    elif kind == 7:
        what, wrong = f"changed places with {two}", None if end - start == b["data_offsets"][1] - b["data_offsets"][0] else True      # of one size: no reader can know
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    elif kind == 8:
        what, header["more"] = "and one tensor more", {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
    elif kind == 9:                                                                      # one number, which copy_ would spread over the whole parameter
        what, wrong, body = "is one number", None if end - start == 4 else True, body[:start + 4] + body[end:]
        for other in (header[name] for name in names if header[name]["data_offsets"][0] >= end):
            other["data_offsets"] = [x - (end - start - 4) for x in other["data_offsets"]]
        a |= {"shape": [1] * len(shape), "data_offsets": [start, start + 4]}
    elif kind == 10:
        what, body = "trailing bytes", body + b"more"
    else:
        what, wrong = "numbers of the body", None
        for _ in range(rng.choice([1, 3, 1000])):
            at = start + 4 * rng.randrange(max(1, (end - start) // 4))
            body[at:at + 4] = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf, 3e38, -1e30, 0.0])) if kind == 11 else rng.randbytes(4)
    text = json.dumps(header).encode()
    return f"{one}: {what}", struct.pack("<Q", len(text)) + text + bytes(body), wrong

def spoil_picture(rng, data):
    if rng.random() < 0.5:
        return spoil_bytes(rng, data)
    kind, mode = rng.choice("PNG 1,PNG L,PNG LA,PNG P,PNG I;16,PNG RGBA,TIFF F,TIFF CMYK,TIFF I,JPEG CMYK,JPEG L,GIF P,BMP RGB,WEBP RGBA,PPM RGB".split(",")).split()
    image, file = Image.open(io.BytesIO(data)).convert("RGB").resize(rng.choice([(1, 1), (1, 300), (300, 2), (17, 33), (64, 64), (2000, 3)])), io.BytesIO()
    image = image.convert("L").convert("I").convert(mode) if mode[0] == "I" else image.convert("L").convert(mode) if mode in ("F", "LA") else image.convert(mode)
    image.save(file, kind)
    more, data, wrong = spoil_bytes(rng, file.getvalue()) if rng.random() < 0.4 else ("", file.getvalue(), False)
    return f"{kind} {mode} {image.size} {more}", data, wrong

def spoil_flags(rng, stage):
    """One or two flags with values that make no sense, none of which only asks for a very long run."""
    flags = [f for group in train.FLAGS.values() for f, where, kind, *_ in group if stage in where.split() and kind is not bool] if stage else [f for g in edit.FLAGS.values() for f, kind, *_ in g if kind is not bool]
    values = ["", "nan", "inf", "-inf", "-1", "0", "-0.5", "1e400", "abc", "1.5", "1e-300", "\u0663", "/dev/null", "/", "a,b,,", "../..", "\udcff", "x" * 300, "2", "7", "1e30"]
    return [f"--{flag}={rng.choice(values)}" for flag in rng.sample([f for f in flags if f not in ("out", "device", "preset")], rng.randint(1, 2))]

# ------------------------------------------------------------------------------------------------ fuzz: what is spoiled, and what becomes of it
def links(source, target):
    """The folder `target`, whose files are links to `source`'s."""
    for file in (f for f in source.rglob("*") if f.is_file() and f.name != ".lock"):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(source)).symlink_to(file)
    return target

def inputs(sample):
    """[(class, how, flags of train.py or edit.py, the flag that names the input or "--out" for a run to continue, its source, the file inside or "")], as often as it is to be tried."""
    S, F, draw = SAMPLE, sample.folder, ["--steps", "1", "--size", "32", "--user", "glamour-stylist"]
    one = {name: ["patch" if name == "start" else name, *flags, "--steps", "1", *(["--batch", "1"] if name != "graph" else [])] for name, flags in sample.flags.items()}
    look, test = [*draw, "--caption", "A red apple"], ["eval", "--answers", "1", "--edits", S / "edits.jsonl", "--users", S / "users.jsonl", "--pairs", F / "pairs.jsonl",
                                                       "--users-test", S / "users_test.jsonl", "--pairs-test", S / "pairs_test.jsonl", "--policy", F / "sft"]
    rows, models = [], [("qwen", "--qwen", "", one["sft"]), ("qwen", "--qwen", "", draw), ("controlnet", "--controlnet", "", draw), ("vit", "--features", "", one["start"]),
                        *(("flux", "--flux", f"{part}/", draw) for part in ("transformer", "vae", "text_encoder", "text_encoder_2"))]
    for model, flag, part, base in models:
        name = next((MINI / model / part).glob("*.safetensors")).name
        rows += [("weights", spoil_tensors, base, flag, MINI / model, part + name)] * 6 + [("configs", spoil_json, base, flag, MINI / model, part + "config.json")] * 3
    for model, flag, base, files in [("qwen", "--qwen", one["sft"], "tokenizer.json tokenizer_config.json generation_config.json"), ("vit", "--features", one["start"], "preprocessor_config.json"),
                                     ("flux", "--flux", draw, "tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/tokenizer.json tokenizer_2/tokenizer_config.json scheduler/scheduler_config.json")]:
        rows += [("tokenizers and other JSON", spoil_json, base, flag, MINI / model, file) for file in files.split()] * 3
    rows += [("tokenizers and other JSON", spoil_bytes, draw, "--flux", MINI / "flux", "tokenizer/merges.txt")]
    for flag, file, base in [("--users", S / "users.jsonl", one["graph"]), ("--users", S / "users.jsonl", one["cdpo"]), ("--pairs", F / "pairs.jsonl", one["cdpo"]), ("--edits", S / "edits.jsonl", one["sft"]),
                             ("--scenes", F / "world/scenes.jsonl", one["dro"]), ("--users", S / "users_test.jsonl", draw)]:
        rows += [("tables", spoil_lines, base, flag, file, "")] * 12
    rows += [("pictures", spoil_picture, look, "--image", S / "scenes/00_apple.png", "")] * 20 + [("pictures", spoil_picture, [*look, "--image", S / "scenes/00_apple.png"], "--control-image", S / "scenes/00_apple.png", "")] * 5
    rows += [("pictures", spoil_picture, one["start"], "--scenes", F / "world", "scenes/00_apple_forest.png")] * 6
    for flag, folder, base in [("--policy", MINI / "policy", draw), ("--sft", F / "sft", one["cdpo"])]:
        rows += [("adapters", spoil_json, base, flag, folder, "adapter_config.json")] * 5 + [("adapters", spoil_tensors, base, flag, folder, "adapter_model.safetensors")] * 7
    for flag, folder, base, file in [("--policy", MINI / "policy", draw, "collaborative"), ("--graph", F / "graph", one["cdpo"], "collaborative"), ("--image-prompt", F / "start", one["patch"], "image_prompt")]:
        rows += [("adapters", spoil_tensors, base, flag, folder, f"{file}.safetensors")] * 8
    for name in ("graph", "sft", "cdpo", "dro"):
        rows += [("resume states", how, [name, *sample.flags[name]], "--out", F / "half" / name, file) for how, file in
                 [(spoil_tensors, "step_2/state.safetensors")] * 4 + [(spoil_json, "config.json"), (lambda rng, data: (*spoil_bytes(rng, data)[:2], None), "metrics.jsonl")]]
    return rows + [("flags", None, base, None, None, None) for base in [draw, draw, draw, *one.values(), test]] * 4

def guarded():
    """In the child: limits on time and memory, and a witness of numbers that are not finite where pictures and words are made of them."""
    resource.setrlimit(resource.RLIMIT_CPU, (40, 41)), resource.setrlimit(resource.RLIMIT_AS, (2 ** 34, 2 ** 34))
    for name in ("byte", "argmax"):
        def method(self, *given, plain=getattr(torch.Tensor, name), bad=torch.isnan if name == "argmax" else lambda x: ~x.isfinite(), **named):
            if self.is_floating_point() and bad(self).any():
                print("WITNESS: words or pictures of numbers that are not finite", file=sys.stderr)
            return plain(self, *given, **named)
        setattr(torch.Tensor, name, method)

def case(n, seed, rows, place):
    """-> (class, what was done, verdict, what was said)."""
    rng, (kind, how, argv, flag, source, inner) = random.Random(f"{seed} {n}"), rows[n % len(rows)]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    script, out, wrong = "edit.py" if str(argv[0]).startswith("--") else "train.py", place / "out", None
    if kind == "flags":
        more = spoil_flags(rng, None if script == "edit.py" else argv[0])
        what, names = f"{script} {argv[0]} {' '.join(more)}", ["--", *re.findall(r"--([\w-]+)", " ".join(more)), *(m.partition("=")[2] or "''" for m in more)]
    else:
        folder = out if flag == "--out" else place / source.name
        if inner or flag == "--scenes":
            links(source if inner else source.parent, folder if inner else place)
        target = folder / inner if inner else folder
        what, data, wrong = how(rng, (source / inner).read_bytes())
        wrong = None if data == "" and target.name in ("generation_config.json", "tokenizer_config.json") else wrong       # a model may come without
        target.unlink(missing_ok=True)
        if data is None:
            target.mkdir()
        elif data != "":
            target.write_bytes(data)
        what, names = f"{source.name}/{inner} {what}", [target.name, str(target.parent)]
        more = [flag, {"--image-prompt": folder / inner, "--scenes": folder / "scenes.jsonl" if inner else folder}.get(flag, folder)]
    code, text = result(*fork(command(script, *argv, *([] if argv[0] == "eval" else ["--out", place / "out.png" if script == "edit.py" else out]), *more, before=guarded)), 300)
    said = sentence(text)
    if code == "hang" or code < 0:
        verdict = "hang" if code == "hang" else "crash"
    elif "Traceback" in text or "panicked" in text:
        verdict = "traceback"
    elif code == 0:
        spoiled = "WITNESS" in text or not all(finite(load_file(f)) for f in out.rglob("*.safetensors") if not f.is_symlink())
        verdict = "not finite" if spoiled else "accepted though wrong" if wrong else "accepted"
    else:
        verdict = "refused, file or flag named" if any(name in said for name in names) else "refused, not finite" if "finite" in said else "nameless message"
        verdict = "refused though fine" if wrong is False and kind != "pictures" else verdict
    return kind, what, verdict, said, text

def fuzz(args, sample):
    for name in ("graph", "sft", "cdpo", "dro"):
        sample.half(name, sample.folder / "half" / name)
    rows, counts, faults, fine = inputs(sample), defaultdict(Counter), defaultdict(list), ("refused, file or flag named", "refused, not finite", "accepted")
    random.Random(args.seed).shuffle(rows)
    if args.only is not None:
        return print(*case(args.only, args.seed, rows, sample.folder / "case"), sep="\n")

    def share(worker):
        for n in range(worker, args.count, args.jobs):
            print("CASE" + json.dumps([n, *case(n, args.seed, rows, sample.folder / f"case{worker}")[:4]]), flush=True)
    for pid, log in [fork(lambda worker=worker: share(worker)) for worker in range(args.jobs)]:
        code, text = result(pid, log, 10 ** 6)
        for n, kind, what, verdict, said in (json.loads(line[4:]) for line in text.splitlines() if line.startswith("CASE")):
            counts[kind][verdict] += 1
            if verdict not in fine:
                said = re.sub(r"/\S*/", "", said)[:200]
                faults[verdict, re.sub(r"[\d'\"].*", "", said)].append(f"case {n}: {what[:150]}: {said}")
        print(text[-2000:] if code else "", end="")
    counts["all"] = sum(counts.values(), Counter())
    verdicts = [*fine, *sorted({verdict for verdict, _ in faults})]
    table(f"Spoiled inputs, seed {args.seed}", ["class", "inputs", *verdicts], [[kind, c.total(), *(c[v] for v in verdicts)] for kind, c in counts.items()])
    for (verdict, _), same in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"{verdict}, {len(same)} of this kind, e.g. {same[0]}")

PARTS = {"kill": kill, "disk": disk, "workers": workers, "numbers": numbers, "fuzz": fuzz}

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"some of {', '.join(PARTS)}; all when not given")
    parser.add_argument("--count", type=int, help="kills a stage (50), or spoiled inputs (2000)")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="of kill, disk and workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes of fuzz (2)")
    parser.add_argument("--only", type=int, help="one case of fuzz, with all it prints")
    args = parser.parse_args()
    given = args.count
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(Path(folder))
        for name in args.part or PARTS:
            args.count = given or {"kill": 50, "fuzz": 2000}.get(name)
            PARTS[name](args, sample)

if __name__ == "__main__":
    main()
