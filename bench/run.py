"""Faster and smaller than what a user would otherwise pick? One row of the README's table each, as Markdown.

    pip install -r bench/requirements.txt
    python bench/run.py                          # lists the rows
    python bench/run.py all                      # every row, on this machine
    python bench/run.py decode graph             # some
    python bench/run.py flux --random            # the real sizes on a GPU: 7B, FLUX.1, bf16, weights drawn there; no checkpoint is read
    python bench/run.py similar --most 30000     # smaller

Both sides hold the same weights and must agree before they are timed; how far they differ is printed. Without --random sizes suit two CPU cores.
"""
import argparse
import json
import sys

import torch

import people
import picture
import text
from clock import where

ROWS = {"decode": text.decode, "cdpo": text.cdpo_step, "trl": text.trl_step, "read": text.reading, "read-flux": picture.reading, "flux": picture.step, "edit": picture.loop,
        "graph": people.epoch, "similar": people.similar, "stages-cdpo": text.stages, "stages-edit": picture.stages, "growth-cdpo": text.growth, "growth-edit": picture.growth}
ROUNDS = {"cdpo": 1, "edit": 1}         # where a call takes minutes; else 3
SIDES = {"cdpo": text.side, "trl": text.side, "read": text.read_side, "read-flux": picture.read_side}

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", metavar="ROW", help=f"all, or some of: {', '.join(ROWS)}")
    p.add_argument("--random", action="store_true", help="the sizes of the real models, in bf16 on a GPU")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; bfloat16 with --random, else float32")
    p.add_argument("--rounds", type=int, help="timed calls of each side (3; cdpo and edit 1)")
    p.add_argument("--compile", action="store_true", help="flux, edit: ours with each block compiled, too")
    group = p.add_argument_group("sizes; the defaults depend on --random")
    group.add_argument("--layers", type=int, help="cdpo, trl: layers of Qwen (8; 28)")
    group.add_argument("--batch", type=int, help="cdpo, trl: users in a step (4; 12)")
    group.add_argument("--micro", type=int, help="users in one forward and backward (all; 2)")
    group.add_argument("--k", type=int, default=3, help="neighbours")
    group.add_argument("--prompt", type=int, default=100, help="tokens")
    group.add_argument("--answer", type=int, default=20, help="tokens")
    group.add_argument("--users", type=int, default=3000, help="cdpo, graph")
    group.add_argument("--attributes", type=int, default=45, help="cdpo, similar's first table")
    group.add_argument("--edges", type=int, default=1_000_000, help="graph")
    group.add_argument("--new", type=int, default=20, help="decode: tokens")
    group.add_argument("--steps", type=int, default=60, help="edit: Euler steps")
    group.add_argument("--size", type=int, help="flux, edit: side of the picture (256; 1024)")
    group.add_argument("--most", type=int, default=1_000_000, help="similar: users")
    group.add_argument("--limit", type=float, default=60, help="similar: a size that a side is expected to need more seconds for is left out")
    p.add_argument("--plot", default="out/similar.png", help="similar: where the plot goes")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    real = args.random
    for name, small, full in (("dtype", "float32", "bfloat16"), ("layers", 8, 28), ("batch", 4, 12), ("micro", 64, 2), ("size", 256, 1024)):
        setattr(args, name, getattr(args, name) or (full if real else small))
    if unknown := [row for row in args.rows if row not in (*ROWS, "all")]:
        p.error(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    args.rows = list(ROWS) if "all" in args.rows else args.rows
    return args

def main():
    args = parse()
    if args.child:
        args = argparse.Namespace(**json.loads(args.child))
        return print(json.dumps(SIDES[args.row](args, args.side)))
    if not args.rows:
        lines = [f"{name:<12} {row.__doc__.splitlines()[0]}" for name, row in ROWS.items()]
        return print(*lines, "\npython bench/run.py ROW ...; all for every row; -h for the sizes", sep="\n")
    given, flags = args.rounds, [a for a in sys.argv[1:] if a not in (*ROWS, "all")]
    for args.row in args.rows:
        args.rounds = given or ROUNDS.get(args.row, 3)
        try:
            found = ROWS[args.row](args)
        except ModuleNotFoundError as e:
            raise SystemExit(f"{args.row} compares with {e.name}, which is not installed: pip install -r bench/requirements.txt") from None
        print(f"\n**{args.row}**: {found}\n`python bench/run.py {' '.join([args.row, *flags])}` on {where(args)}", flush=True)

if __name__ == "__main__":
    main()
