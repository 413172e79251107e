"""Judges sampled instructions by their words: what they ask for, and whether they are sentences.

It knows the miniature's template sentences, from files alone: users.jsonl says which attributes
there are, training texts which words may follow one another. bench/methods.py tabulates its
verdicts; training never sees them. All is ours.

An instruction is well-formed when the answer ended by itself, when it names exactly one known
attribute, and when each pair of neighbouring words in it occurs in a training instruction too. For
that comparison an attribute's name is one word ("neon green" -> "neon_green"), and the caption's
own words stand for one another: "Paint the mug red" allows "Paint the bowl red", on a bowl.

    python mini/judge.py                  # judges three sentences by the shipped sample
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C: no traceback, whenever it comes
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace


class Judge:
    """users: with .likes, .dislikes and .hidden, all whose attributes are to be known;
    train: [(caption, instruction)]. `judge.names` is the regular expression of attribute names."""

    def __init__(self, users, train):
        known = set()
        for user in users:
            known.update(user.likes, user.dislikes, user.hidden)
        longest_first = sorted(known, key=lambda name: (-len(name), name))
        any_of_them = "|".join(re.escape(name) for name in longest_first)
        self.names = re.compile(rf"\b({any_of_them})\b")
        self.rare = rare_words({caption for caption, _ in train})
        self.seen = set()                                 # pairs of neighbouring words
        for caption, instruction in set(train):
            self.seen |= self.pairs(caption, instruction)

    def pairs(self, caption, instruction):
        """The pairs of neighbouring words of an instruction, its start and end counted as words."""
        own = self.rare.intersection(caption.lower().split())
        joined = self.names.sub(lambda match: match[0].replace(" ", "_"), instruction)
        words = ["<start>"]
        for word in joined.split():
            words.append("<caption>" if word.lower() in own else word)
        words.append("<end>")
        return set(itertools.pairwise(words))

    def __call__(self, user, caption, text, ended):
        """The verdict on the answer `text`, `ended` by itself or cut off -> {question: bool}.

        likes: it asks for a stated like; would like: for what the persona would have liked but
        never said (`hidden`); hit: for either; dislikes: it names something disliked, well-formed
        or not; malformed: it is no sentence, and then no like either."""
        found = set(self.names.findall(text))
        familiar = self.pairs(caption, text) <= self.seen
        whole = ended and len(found) == 1 and familiar
        liked = {*user.likes, *user.hidden}
        return {
            "likes": whole and found <= set(user.likes),
            "would like": whole and found <= set(user.hidden),
            "hit": whole and found <= liked,
            "dislikes": not found.isdisjoint(user.dislikes),
            "malformed": not whole,
        }


def rare_words(captions):
    """The words that fewer than half of the captions have: objects and colours, not "in front"."""
    counts = Counter()
    for caption in captions:
        counts.update(set(caption.lower().split()))
    return {word for word, count in counts.items() if count < len(captions) / 2}


if __name__ == "__main__":
    sample = Path(__file__).parent / "sample"
    tables = []
    for name in ("users", "pairs"):
        lines = (sample / f"{name}.jsonl").read_text().splitlines()
        tables.append([json.loads(line) for line in lines])
    users = [SimpleNamespace(**row) for row in tables[0]]
    judge = Judge(users, [(pair["caption"], pair["chosen"]) for pair in tables[1]])
    caption = "A white mug in front of a mint wall"
    for text in ("Paint the mug orange", "Paint the mug black", "Paint orange the mug"):
        verdict = judge(users[0], caption, text, ended=True)
        found = [question for question, answer in verdict.items() if answer]
        print(f"{users[0].user}, {text!r}: {', '.join(found)}")
