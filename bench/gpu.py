"""What a CUDA card has to say of this project, in one command, for whoever has one for ten minutes.

    python bench/gpu.py --check              # two minutes: parity with the CPU, determinism
    python bench/gpu.py                      # ten: all parts, and the GPU table of bench/README.md
    python bench/gpu.py decode flux          # some parts
    python bench/gpu.py --wheels FOLDER      # where there is no network: the peers, as wheels
    python bench/gpu.py --tiny               # at sizes that mean nothing: whether it runs
    python bench/gpu.py --check --pretrain "vae --steps 500" "flux --steps 1200"

Each part is a process of its own with its own limit of time: one that fails, hangs or fills the
card loses only itself. What it found is a line of OUT/results.jsonl the moment it stands, and
OUT/gpu.md is written anew. The sizes are the real models' with drawn weights, on a CPU tiny ones;
parity and determinism use the miniature. --pretrain runs commands of mini/pretrain.py, each one
such a part, and puts what they trained into files below 16 MB, OUT/pretrained.tar.0, .1, ...:

    cat OUT/pretrained.tar.* | tar x -C mini
"""
import argparse
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import clock
import run
from clock import ROOT, gb, most_ever, python, relative, table, where

import cdpo
import edit
import flux
import lora
import train
from controlnet import control_picture, render
from qwen import DTYPES, load_language_model, set_precision

MINI = ROOT / "mini"
EXAMPLES = MINI / "examples"
PHOTOGRAPH = EXAMPLES / "mug.png"
CAPTIONS = ["A red mug", "A white ceramic bowl in front of a grey wall", "A green apple"]
ANSWERS = ["Paint it neon green", "Make it out of wood"]
COLUMNS = ["row", "what", "against", "ours", "theirs", "speed", "memory"]
PIECE = 15 * 2 ** 20                                        # bytes of a file on the way back


# ---- small runs of the stages --------------------------------------------------------------------

def stage_flags(work):
    """{stage: flags of train.py}: small runs on mini/examples; what they need is in `work`."""
    people = f"--users={EXAMPLES}/users.jsonl"
    batch = ["--batch=8", "--micro=4"]
    pictures = [f"--scenes={EXAMPLES}/scenes.jsonl", "--held-out=1", "--paint-steps=4", *batch]
    before = [f"--graph={work}/graph", f"--sft={work}/sft"]
    return {
        "graph": [people],
        "sft": [f"--edits={EXAMPLES}/edits.jsonl", *batch],
        "cdpo": [people, f"--pairs={EXAMPLES}/pairs.jsonl", *before, *batch],
        "patch": [*pictures, f"--generated={work}/generated"],
        "dro": [*pictures, "--buffer=4"],
    }


def run_stage(stage, work, out, *flags):
    """`train.py STAGE` in this process; its output is in work/out."""
    train.main([stage, *stage_flags(work)[stage], f"--out={work}/{out}", *flags])


def prepare(work):
    """What cdpo begins with, made on the CPU."""
    for stage in ("graph", "sft"):
        run_stage(stage, work, stage, "--steps=3", "--device=cpu")


# ---- parity: the numbers of the CPU --------------------------------------------------------------

def policy(device, dtype):
    """The miniature's language model with its adapter, and [(prompt ids, [ids of two answers])]."""
    model, tokenizer = load_language_model(MINI / "qwen", device, DTYPES[dtype])
    lora.load_adapter(model, MINI / "policy")
    pairs = [cdpo.encode(tokenizer, cdpo.prompt(caption), *ANSWERS) for caption in CAPTIONS]
    return model, pairs


@torch.no_grad()
def logits(device, dtype):
    """Of a prompt."""
    model, pairs = policy(device, dtype)
    return model(torch.tensor([pairs[0][0]], device=device))


@torch.no_grad()
def logprobs(device, dtype):
    """Of two answers to each of three prompts, for three people."""
    model, pairs = policy(device, dtype)
    tokens = cdpo.UserTokens.load(MINI / "policy/collaborative.safetensors", device)
    soft = tokens.soft(tokens.embeddings()[:len(pairs)])
    return cdpo.answer_logprobs(model, pairs, soft)


def gradients(stage, work, device, dtype):
    """Of a stage's first step, one behind the other."""
    flags = [*stage_flags(work)[stage], f"--device={device}"]
    if stage != "graph":
        flags.append(f"--dtype={dtype}")
    if stage == "sft":
        flags.append("--dropout=0")                         # each device draws its own
    if stage == "patch":
        flags.append(f"--generated={work}/generated-{dtype}")
    name, settings, _ = train.parse([stage, *flags])
    built = train.STAGES[name][1](settings)
    indices = list(range(min(settings.batch, built.items)))
    rows = built.draw(indices, torch.Generator().manual_seed(0))
    parameters = []
    for group in built.parameter_groups():
        parameters += [p for _, p in dict(group["params"]).items() if p.requires_grad]
    train.gradients(built, settings, rows, parameters, step=0, stop=[])
    return torch.cat([p.grad.flatten() for p in parameters])


class Drawn(Exception):
    """The latents of an edit are there."""


def latents(device, dtype, reference=None):
    """Of an edit in the miniature, with ControlNet, perhaps of a reference picture."""
    picture = flux.read_square(PHOTOGRAPH, 64)
    settings = SimpleNamespace(
        lora=None, reference=[reference], reference_scale=1.0, device=device,
        features=MINI / "vit", image_prompt=MINI / "image_prompt/image_prompt.safetensors")

    def equip(model, ids):
        if reference:
            edit.equip(settings, model, ids)

    def decode(vae, latent):
        raise Drawn(latent)

    try:
        with mock.patch.object(flux.VAE, "decode", decode):
            render(
                flux=MINI / "flux", controlnet=MINI / "controlnet", equip=equip,
                prompts=[(CAPTIONS[0], ANSWERS[0])], seeds=[0], shape=(64, 64),
                sources=[picture], controls=[control_picture(picture)], strength=0.8, steps=10,
                device=device, dtype=DTYPES[dtype])
    except Drawn as drawn:
        return drawn.args[0]


@torch.no_grad()
def encoded(device, dtype):
    """A picture's latents; the autoencoder is always fp32."""
    vae = flux.VAE.load(MINI / "flux/vae", device)
    image = flux.to_tensor(flux.read_square(PHOTOGRAPH, 64))
    return vae.encode(image[None].to(device))


@torch.no_grad()
def decoded(device, dtype):
    vae = flux.VAE.load(MINI / "flux/vae", device)
    return vae.decode(encoded(device, dtype))


def numbers(work):
    """{name: function of a device and a type that gives the numbers to compare}."""
    found = {"logits": logits, "log-probabilities of answers": logprobs}
    for stage in stage_flags(work):
        found[f"gradients of {stage}"] = partial(gradients, stage, work)
    found["latents of an edit"] = latents
    found["latents of an edit of a reference"] = partial(latents, reference=PHOTOGRAPH)
    found["autoencoder, in"] = encoded
    found["autoencoder, out"] = decoded
    return found


def attempt(call, *how):
    """call(*how), or the exception that it raised: one fault must not hide what comes after it."""
    try:
        return call(*how)
    except Exception as error:
        traceback.print_exc()
        return error


def parity(args, work):
    """How far the device is from the CPU's fp32: exact products (no TF32) to 1e-4; and bf16."""
    set_precision(deterministic=True)
    prepare(work)
    rows = []
    wrong = []
    for name, call in numbers(work).items():
        truth = call("cpu", "fp32").cpu()
        row = [name]
        for dtype in DTYPES:
            found = attempt(call, args.device, dtype)
            if isinstance(found, Exception):
                row.append(type(found).__name__)
            else:
                row.append(f"{relative(found.cpu(), truth):.0e}")
            bound = 1e-4 if dtype == "fp32" else 0.2
            if isinstance(found, Exception) or not float(row[-1]) < bound:
                row[-1] = f"**{row[-1]}**"
                wrong.append(f"{name}, {dtype}")
        print(*row, flush=True)
        rows.append(row)
    return table(["from the CPU's fp32", "fp32, no TF32", "bf16"], rows), wrong


# ---- determinism: the same bits again ------------------------------------------------------------

def state_of(work, out):
    return next(Path(work, out).glob("step_5/state.safetensors")).read_bytes()


def steps_took(work, out):
    """Seconds from a run's config.json to its last step."""
    first = Path(work, out, "config.json").stat().st_mtime
    last = Path(work, out, "metrics.jsonl").stat().st_mtime
    return last - first


def killed(stage, work, out, *flags):
    """`train.py STAGE` killed behind its third step, and the same command again."""
    command = [*python(), str(ROOT / "train.py"), stage, *stage_flags(work)[stage]]
    command += [f"--out={work}/{out}", *flags, "--save-every=1"]
    log = Path(work, out, "metrics.jsonl")
    process = subprocess.Popen(command)
    while process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= 3:
            process.kill()
        time.sleep(0.01)
    subprocess.run(command, check=True)


def repeated(stage, work, flags):
    """A stage's cells of the table below."""
    runs = {}
    for out in ("plain", "plain again", "deterministic", "deterministic again"):
        more = ["--deterministic"] if "deterministic" in out else []
        runs[out] = f"5-{stage}-{out}"
        run_stage(stage, work, runs[out], *flags, *more)
    if stage == "cdpo":
        runs["killed"] = "5-killed"
        killed(stage, work, runs["killed"], *flags, "--deterministic")
    bits = {name: state_of(work, out) for name, out in runs.items()}
    took = {name: steps_took(work, out) for name, out in runs.items()}
    same = bits["deterministic"] == bits["deterministic again"]
    same &= bits["deterministic"] == bits.get("killed", bits["deterministic"])
    plain = bits["plain"] == bits["plain again"]
    cost = took["deterministic again"] / took["plain again"]
    return "yes" if same else "**no**", "yes" if plain else "no", f"{cost:.2f}"


def determinism(args, work):
    """Five steps of each stage, twice without --deterministic and twice with it, and a run of cdpo
    that is killed and goes on. With it all bits must be the same."""
    prepare(work)
    flags = ["--steps=5", f"--device={args.device}", "--save-every=5"]
    rows = []
    wrong = []
    for stage in stage_flags(work):
        found = attempt(repeated, stage, work, flags)
        if isinstance(found, Exception):
            found = [f"**{type(found).__name__}**", "", ""]
        rows.append([stage, *found])
        print(*rows[-1], flush=True)
        if found[0] != "yes":
            wrong.append(stage)
    columns = ["five steps twice", "the same bits with --deterministic", "without",
               "time with it, times that without"]
    return table(columns, rows) + "\ncdpo also killed behind a step and resumed\n", wrong


# ---- the parts -----------------------------------------------------------------------------------

def row(name, *flags, real=()):
    """A row of bench/run.py as a part; `real`: flags where sizes are the real models'."""
    def measure(args, work):
        size = ["--tiny"] if args.tiny else ["--random", *real]
        plot = f"--plot={work}/similar.png"
        given = run.parse([name, *size, f"--device={args.device}", plot, *flags])
        return run.run(name, given), []
    return measure


Part = namedtuple("Part", "limit run")                      # seconds, run(args, folder)
PARTS = {
    "parity": Part(120, parity),
    "determinism": Part(180, determinism),
    "decode": Part(180, row("decode")),
    "cdpo": Part(240, row("cdpo", "--rounds=2")),
    "trl": Part(240, row("trl", "--rounds=2")),
    "flux": Part(120, row("flux")),
    "compiled": Part(240, row("flux", real=["--compile"])),
    "stages": Part(180, row("stages-edit")),
    "graph": Part(60, row("graph")),
    "similar": Part(120, row("similar", real=["--limit=10"])),
    "edit": Part(400, row("edit", "--rounds=3")),
}
CHECK = ["parity", "determinism"]


def child(args):
    """One part, in this process: args.result is what it found."""
    set_precision()
    with tempfile.TemporaryDirectory() as work:
        text, wrong = PARTS[args.child].run(args, work)
    dtype = "float32" if args.tiny else "bfloat16"
    about = where(argparse.Namespace(device=args.device, dtype=dtype))
    found = {"where": about, "text": text, "summary": clock.SUMMARY, "wrong": wrong,
             "memory": gb(most_ever(args.device))}
    args.result.write_text(json.dumps(found))


def limited(command, limit, log):
    """Run a command, all that it prints into the file `log` -> "", or why it did not end well."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
            start_new_session=True)
        try:
            code = process.wait(limit)
            return f"ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"not done in {limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_part(name, command, limit, folder):
    """One part in a process of its own -> its line of results.jsonl."""
    start = time.perf_counter()
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    log = folder / "log"
    fault = limited([*command, f"--result={result}"] if name in PARTS else command, limit, log)
    line = {"part": name, "seconds": round(time.perf_counter() - start, 1), "fault": fault}
    if result.is_file():
        line |= json.loads(result.read_text())
        if line["wrong"]:
            line["fault"] = f"wrong: {', '.join(line['wrong'])}"
    if line["fault"]:
        line["log"] = log.read_text(errors="replace")[-3000:]
    return line


# ---- the miniature's training --------------------------------------------------------------------

def pretraining(args, folder):
    """{part: command} of what --pretrain asks for; it trains into `folder`."""
    commands = {}
    for asked in args.pretrain:
        command = [*python(), str(MINI / "pretrain.py"), *shlex.split(asked)]
        where_to = [f"--out={folder}/mini", f"--work={folder}/data", f"--device={args.device}"]
        commands[f"pretrain {asked}"] = command + where_to
    return commands


def pack(folder, out):
    """The weights and configs below `folder`, as pieces of a tar in `out`."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for file in sorted(folder.rglob("*.*")):
            if file.suffix in (".safetensors", ".json"):
                tar.add(file, file.relative_to(folder))
    data = whole.getvalue()
    for i, start in enumerate(range(0, len(data), PIECE)):
        (out / f"pretrained.tar.{i}").write_bytes(data[start:start + PIECE])


# ---- all of it -----------------------------------------------------------------------------------

def markdown(lines):
    """The lines of results.jsonl as Markdown: the GPU table, the parts, what each of them says."""
    about = [line["where"] for line in lines if "where" in line]
    parts = []
    summary = []
    texts = ""
    for line in lines:
        outcome = line["fault"] or "passed"
        parts.append([line["part"], outcome, line["seconds"], line.get("memory", "")])
        summary += line.get("summary", [])
        texts += f"\n**{line['part']}**: {line.get('text', outcome)}\n"
    table_of_parts = table(["part", "outcome", "seconds", "most memory"], parts)
    found = table(COLUMNS, summary) if summary else ""
    return f"{''.join(about[:1])}\n\n{found}\n{table_of_parts}{texts}"


def install(wheels, folder):
    """The wheels, without what they ask for, where the parts find them."""
    site = str(folder / "site")
    files = [str(file) for file in sorted(wheels.glob("*.whl"))]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, site, *files], check=True)
    os.environ["PYTHONPATH"] = site


def parse():
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    p.add_argument("parts", nargs="*", metavar="PART",
                   help=f"of {', '.join(PARTS)}; all of them, with --pretrain none")
    p.add_argument("--check", action="store_true", help=f"{' and '.join(CHECK)} alone")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=best, help=f"cpu, cuda, cuda:1 ... ({best})")
    p.add_argument("--tiny", action="store_true", help="sizes for a test; on a CPU always")
    p.add_argument("--out", type=Path, default="out/gpu", help="folder of results (out/gpu)")
    p.add_argument("--minutes", type=float, default=10.0, help="no part starts after them (10)")
    p.add_argument("--wheels", type=Path, help="folder of *.whl to install first, for the parts")
    p.add_argument("--pretrain", nargs="+", default=[], metavar="RECIPE",
                   help="recipes of mini/pretrain.py with their flags, in quotes")
    p.add_argument("--limit", type=int, default=480, help="seconds of each of these (480)")
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.tiny = args.tiny or args.device == "cpu"
    rest = [] if args.pretrain else list(PARTS)
    args.parts = args.parts or (CHECK if args.check else rest)
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        p.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return args


def main():
    args = parse()
    if args.child:
        child(args)
        return
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    results.unlink(missing_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.wheels:
            install(args.wheels, folder)
        size = ["--tiny"] if args.tiny else []
        jobs = {}
        for name in args.parts:
            command = [*python(), __file__, f"--child={name}", f"--device={args.device}", *size]
            jobs[name] = command, PARTS[name].limit * (5 if args.tiny else 1)
        for name, command in pretraining(args, folder).items():
            jobs[name] = command, args.limit
        for name, (command, limit) in jobs.items():
            if time.perf_counter() - start > 60 * args.minutes:
                line = {"part": name, "seconds": 0, "fault": f"after {args.minutes:g} minutes"}
            else:
                line = run_part(name, command, limit, folder)
            lines.append(line)
            with open(results, "a") as file:
                file.write(json.dumps(line) + "\n")
            (args.out / "gpu.md").write_text(markdown(lines))
            print(f"{name}: {line['fault'] or 'passed'}, {line['seconds']} s", flush=True)
            if line["fault"]:
                print(line.get("log", ""), file=sys.stderr)
            if name not in PARTS:
                pack(folder / "mini", args.out)
    print(f"\n{markdown(lines)}")
    sys.exit(any(line["fault"] for line in lines))


if __name__ == "__main__":
    main()
