"""What `python edit.py` says to held-out people: its sampling beside others, and what becomes of
words of the user's own (--instruction), trained phrasings and others. Markdown tables.

    python bench/words.py                # of the shipped policy; 5 minutes
    python bench/words.py --policy runs/cdpo

They begin with what `python mini/world.py` wrote. People have the seeds that edit.py gives them.
"""
import argparse
import json
import os
import random
import statistics
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as in edit.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import cdpo
import edit
import lora
from graph import read_jsonl, read_users
from mini.judge import Judge
from qwen import generator_for, load_language_model

CONCEPTS = json.loads(Path(edit.__file__).with_name("mini").joinpath("concepts.json").read_text())
KINDS = CONCEPTS["attributes"]                            # {edit type: [attribute, ...]}
TYPE_OF = {name: kind for kind, names in KINDS.items() for name in names}
ASKED = {                                                 # no training stage has met these
    "attribute": ["I fancy {a}", "surprise me with {a}", "{a} is what I have in mind",
                  "do it in {a}", "we need {a} here", "would {a} work", "I am dreaming of {a}",
                  "it needs {a}", "add a touch of {a}", "can you do {a}", "my daughter adores {a}",
                  "go wild with {a}, will you", "What about {a}?", "Let's try {a}!",
                  "i'd prefer {a}"],
    "type": ["I am tired of this {t}", "could the {t} be different", "fix the {t}",
             "modify its {t}", "please work on the {t}", "what about the {t}", "replace the {t}",
             "improve the {t}", "Something else for the {t}!", "let's see a different {t}"],
}
NOTHING = ["blorfy", "make it pop", "as my grandmother would do it", "surprise me", "I do not know",
           "do what you want", "42", "make it better", "something for a rainy afternoon",
           "more contrast", "vintage", "cyberpunk", "make it look expensive", "minimalist",
           "no idea", "hello", "asdf jkl", "make it more modern", "in the style of Monet",
           "bigger", "remove the scratches", "sharpen it", "it must be steampunk", "dinosaur",
           "a unicorn please", "bronze", "Make it look like Mars", "???", "I want velvet",
           "pour l'anniversaire de ma mere"]


def captions():
    """One of each object."""
    for i, obj in enumerate(CONCEPTS["objects"]):
        color = CONCEPTS["colors"][i % 6]
        wall = CONCEPTS["walls"][i % 4]
        yield f"A {color} {obj} in front of a {wall} wall"


class Words:
    def __init__(self, args):
        self.args = args
        self.users = read_users(args.users_test)
        pairs = read_jsonl(args.pairs, caption=str, chosen=str, rejected=str)
        seen = [(pair["caption"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        self.judge = Judge(self.users + read_users(args.users), seen)
        self.flags = ["--qwen", args.qwen, "--policy", args.policy, "--users", args.users_test]
        self.people = ["--user", *(user.name for user in self.users)]

    # ---- sampling --------------------------------------------------------------------------------

    def sampling(self):
        rows = []
        for name, flags in (("default", []), ("--temperature 1", ["--temperature", "1"]),
                            ("--temperature 0", ["--temperature", "0"])):
            rows.append([name, *self.row(flags)])
        columns = ["", "hit", "likes", "dislikes", "malformed", "different sentences a caption",
                   "edit types a caption", "edit types a person", *KINDS]
        return cdpo.markdown_table(columns, rows)

    def row(self, flags):
        """edit.py's words with these flags: cells of the table."""
        verdicts = []
        different = []
        kinds = []                                        # of each caption, Counter
        own = {user.name: set() for user in self.users}   # edit types of each person
        for caption in captions():
            argv = [*self.flags, *self.people, *flags, "--caption", caption]
            wishes = edit.write_instructions(edit.parse(argv))
            different.append(len({text for _, _, text, _ in wishes}))
            kinds.append(Counter())
            for user, (_, _, text, _) in zip(self.users, wishes):
                verdict = self.judge(user, caption, text, ended=True)
                verdicts.append(verdict)
                if not verdict["malformed"]:
                    kind = TYPE_OF[self.judge.names.search(text)[0]]
                    kinds[-1][kind] += 1
                    own[user.name].add(kind)
        cells = []
        for name in ("hit", "likes", "dislikes", "malformed"):
            cells.append(share([verdict[name] for verdict in verdicts]))
        cells.append(f"{min(different)} to {max(different)}")
        cells.append(f"{min(map(len, kinds))}")
        cells.append(f"{statistics.fmean(map(len, own.values())):.1f}")
        for name in KINDS:
            cells.append(f"{sum(kind[name] for kind in kinds) / len(verdicts):.2f}")
        return cells

    # ---- words of the user's own -----------------------------------------------------------------

    def jobs(self, phrasings):
        """{what is named: [(words, attributes that they may mean)]}"""
        names = {name: [name] for name in TYPE_OF}
        types = {}
        for kind, called in CONCEPTS["types"].items():
            types |= {word: KINDS[kind] for word in called}
        return {
            "an attribute": filled(phrasings["attribute"], names),
            "a hint": filled(phrasings["attribute"], CONCEPTS["hints"]),
            "an edit type": filled(phrasings["type"], types),
        }

    def wishes(self):
        rows = []
        for phrasings, where in ((CONCEPTS["guidance"], "trained"), (ASKED, "never seen")):
            for name, jobs in self.jobs(phrasings).items():
                rows.append([f"{name}, {where}", *self.obeyed(jobs)])
        nothing = [(words, []) for words in NOTHING] * 10
        rows.append(["nothing that it knows", *self.obeyed(nothing)])
        columns = ["the words name", "requests", "obeyed", "malformed", "called not understood",
                   "of the obeyed", "of the others"]
        return cdpo.markdown_table(columns, rows)

    @torch.no_grad()
    def obeyed(self, jobs):
        """Each for a random person and picture, sampled as edit.py does: cells of the table."""
        args = self.args
        rng = random.Random(0)
        tokens = cdpo.UserTokens.load(Path(args.policy) / "collaborative.safetensors")
        model, tokenizer = load_language_model(args.qwen)
        lora.load_adapter(model, args.policy)
        soft = tokens.soft(tokens.new(self.users))
        verdicts = []
        malformed = []
        everything = list(captions())
        for i, (words, meant) in enumerate(jobs):
            number = rng.randrange(len(self.users))
            settings = edit.parse(["--caption", rng.choice(everything), "--instruction", words])
            asked = cdpo.prompt(settings.caption, words)
            mine = soft[number:number + 1]
            how = {**model.config.sampling, "generator": generator_for("words", i)}
            answers = cdpo.suggest(model, tokenizer, [asked], mine, **how)
            text, ended = answers[0]
            names = self.judge.names.findall(text)
            malformed.append(not ended or len(set(names)) != 1)
            unclear = bool(edit.heeded(settings, model, tokenizer, mine, text))
            verdicts.append((bool(set(names) & set(meant)), unclear))
        obeyed = [unclear for did, unclear in verdicts if did]
        others = [unclear for did, unclear in verdicts if not did]
        cells = [str(len(jobs)), share([did for did, _ in verdicts]), share(malformed)]
        return [*cells, share(obeyed + others), share(obeyed), share(others)]


def filled(phrasings, things):
    found = []
    for phrase in phrasings:
        for thing, meant in things.items():
            found.append((phrase.format(a=thing, t=thing), meant))
    return found


def share(values):
    return f"{statistics.fmean(values):.3f}" if values else ""


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--qwen", default="mini/qwen", help="language model")
    p.add_argument("--policy", default="mini/policy", help="folder that `train.py cdpo` wrote")
    p.add_argument("--users", default="mini/data/users.jsonl", help="training users")
    p.add_argument("--users-test", default="mini/data/users_test.jsonl", help="who is asked")
    p.add_argument("--pairs", default="mini/data/pairs.jsonl", help="what is a sentence")
    words = Words(p.parse_args())
    with torch.no_grad():
        print(f"\n**Sampling**\n\n{words.sampling()}")
    print(f"\n**Words of the user's own**\n\n{words.wishes()}")


if __name__ == "__main__":
    main()
