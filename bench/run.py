"""Faster and smaller than what a user would otherwise pick? One row of the README's table each,
as Markdown.

    pip install -r bench/requirements.txt
    python bench/run.py                          # lists the rows
    python bench/run.py all                      # every row, on this machine
    python bench/run.py decode graph             # some
    python bench/run.py flux --random            # on a GPU: 7B, FLUX.1, bf16; weights drawn there
    python bench/run.py similar --most 30000     # smaller
    python bench/run.py all --tiny               # whether all of it runs; means nothing

Both sides hold the same weights and must agree before they are timed; how far they differ is
printed. With --random the models have the real sizes, and no checkpoint is read; without it
sizes suit two CPU cores. bench/gpu.py runs the rows that a GPU is to tell, and more.
"""
import argparse
import json
import sys

import torch

import people
import picture
import text
from clock import sized, vary, where

from qwen import set_precision

ROWS = {
    "decode": text.decode,
    "cdpo": text.cdpo_step,
    "trl": text.trl_step,
    "read": text.reading,
    "read-flux": picture.reading,
    "flux": picture.step,
    "edit": picture.loop,
    "graph": people.epoch,
    "similar": people.similar,
    "stages-cdpo": text.shares,
    "stages-edit": picture.shares,
    "growth-cdpo": text.growth,
    "growth-edit": picture.growth,
}
ROUNDS = {"cdpo": 1, "edit": 1}         # where a call takes minutes; else 3
SIDES = {                               # what clock.alone asks for, in a process of its own
    "cdpo": text.side,
    "trl": text.side,
    "read": text.read_side,
    "read-flux": picture.read_side,
}
SIZES = [   # flag, here, with --random, with --tiny, what it is
    ("layers", 8, 28, 2, "cdpo, trl: layers of Qwen"),
    ("batch", 4, 12, 2, "cdpo, trl: users in a step"),
    ("micro", 64, 2, 1, "cdpo, trl: users in one forward and backward"),
    ("k", 3, 3, 1, "cdpo: neighbours"),
    ("prompt", 100, 100, 12, "cdpo, trl: tokens"),
    ("answer", 20, 20, 4, "cdpo, trl: tokens"),
    ("users", 3000, 3000, 30, "cdpo, graph"),
    ("attributes", 45, 45, 10, "cdpo, similar"),
    ("edges", 1_000_000, 1_000_000, 2000, "graph"),
    ("new", 20, 100, 4, "decode: tokens"),
    ("steps", 60, 60, 2, "edit: Euler steps"),
    ("size", 256, 1024, 64, "flux, edit: side of the picture"),
    ("most", 100_000, 100_000, 1000, "similar: users"),
    ("limit", 60.0, 60.0, 60.0, "similar: seconds a call; a side expected to need more stops"),
]


def parse(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    p.add_argument("rows", nargs="*", metavar="ROW", help=f"all, or some of: {', '.join(ROWS)}")
    p.add_argument("--random", action="store_true", help="the real models' sizes, on a GPU")
    p.add_argument("--tiny", action="store_true", help="sizes for a test")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=best, help=f"cpu, cuda, cuda:1 ... ({best})")
    types = ["float32", "bfloat16"]
    p.add_argument("--dtype", choices=types, help="of the weights (float32; bfloat16)")
    p.add_argument("--rounds", type=int, help="timed calls of each side (3; cdpo and edit 1)")
    p.add_argument("--compile", action="store_true", help="decode, flux, edit: ours compiled, too")
    p.add_argument("--plot", default="out/similar.png", help="similar: where the plot goes")
    p.add_argument("--child", help=argparse.SUPPRESS)
    group = p.add_argument_group("sizes (here; where it differs, with --random)")
    for name, here, full, _, about in SIZES:
        shown = f"{here}" if here == full else f"{here}; {full}"
        group.add_argument(f"--{name}", type=type(here), help=f"{about} ({shown})")
    args = p.parse_args(argv)
    for name, here, full, tiny, _ in [("dtype", *types, types[0], ""), *SIZES]:
        if getattr(args, name) is None:
            setattr(args, name, sized(args, here, full, tiny))
    unknown = [row for row in args.rows if row not in (*ROWS, "all")]
    if unknown:
        p.error(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if "all" in args.rows:
        args.rows = list(ROWS)
    return args


def child(flags):
    """One side of a row, in this process: prints what clock.alone reads."""
    args = argparse.Namespace(**json.loads(flags))
    print(json.dumps(SIDES[args.row](args, args.side)))


def run(row, args):
    """A row's Markdown. SystemExit naming the peer that is not installed."""
    args.row = row
    args.rounds = args.rounds or ROUNDS.get(row, 3)
    try:
        return ROWS[row](args)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{row} compares with {error.name}, which is not installed: "
                         "pip install -r bench/requirements.txt") from None


def list_rows():
    for name, row in ROWS.items():
        print(f"{name:<12} {row.__doc__.splitlines()[0]}")
    print("\npython bench/run.py ROW ...; all for every row; -h for the sizes")


def main():
    args = parse()
    set_precision()
    if args.child:
        child(args.child)
    elif not args.rows:
        list_rows()
    else:
        flags = [word for word in sys.argv[1:] if word not in (*ROWS, "all")]
        for row in args.rows:
            print(f"\n**{row}**: {run(row, vary(args))}")
            command = " ".join(["python bench/run.py", row, *flags])
            print(f"`{command}` on {where(args)}", flush=True)


if __name__ == "__main__":
    main()
