"""The people of the miniature world: personas, histories, preference pairs, edits and scenes.

concepts.json has the words: 8 objects, 45 attributes in six edit types (our choice: the paper names
neither), the sentences made of them, how people put wishes of their own ("I want spots": `hints`
says what that may mean), and the themes, most popular first. No attribute's name contains
another's. A persona likes one or two themes and dislikes one or two others. A theme's seven
attributes share no word and no look (glamour: leopard spots, gold, marble, a crown); only histories
connect them, as in the paper (Sec. 4: liked together, not alike in words). A history states about
two thirds of the taste, and now and then a fancy that fits no theme. The liked rest is `hidden`:
nothing but evaluation may read it.

    users.jsonl, users_test.jsonl   {"user", "likes", "dislikes", "hidden"}; no training stage meets
                                    the test users
    pairs.jsonl, pairs_test.jsonl   {"user", "caption", "edit_type", "chosen", "rejected"}, some
                                    with "guidance": 4 captions x 6 edit types x 2 (paper, Sec. 5)
    edits.jsonl                     {"input", "edit", "output"}, some with "guidance": nobody's own,
                                    in InstructPix2Pix's format, for supervised fine-tuning
    scenes.jsonl, scenes/*.png      held-out pictures, each with its true picture after every edit

    python mini/world.py                       # mini/data: 900 + 100 users, 16 scenes; about 25 s
    python mini/world.py --users 2900          # the paper's size: 139,200 + 4,800 pairs
    python mini/world.py --sample              # the small sample that is shipped, mini/sample
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C: no traceback, whenever it comes
import argparse
import json
import random
import string
from pathlib import Path

from PIL import Image

from render import ATTRIBUTES, CONCEPTS, HERE, TYPE_OF, Geometry

OBJECTS = CONCEPTS["objects"]
COLORS = CONCEPTS["colors"]                               # of objects
WALLS = CONCEPTS["walls"]
THEMES = CONCEPTS["themes"]                               # {theme: seven attributes}
GUIDANCE = CONCEPTS["guidance"]                           # how people put their wishes
EDIT_TYPES = CONCEPTS["types"]                            # {edit type: what people call it}
HINTS = CONCEPTS["hints"]                                 # {word: attributes that it may mean}

POPULAR = [(rank + 1) ** -0.5 for rank in range(10)]      # how often the nth of a list is drawn
STATED = 0.65                                             # share of the taste that a history shows
FANCY = 0.5                                               # chance of a like that fits no theme, and
                                                          # of such a dislike
GUIDED = 0.10                                             # chance of a pair with words of the
                                                          # user's own, for each kind of words


# ---- sentences ----------------------------------------------------------------------------------

def caption(color, obj, wall):
    """What a person would write under the unedited picture."""
    return f"A {color} {obj} in front of a {wall} wall"


def edited_caption(color, obj, wall, attribute):
    template = CONCEPTS["edited"][TYPE_OF[attribute]]
    return template.format(c=color, o=obj, w=wall, a=attribute)


def instruction(obj, attribute, which):
    """The `which`-th (0 to 3) way to ask for `attribute` on `obj`."""
    templates = CONCEPTS["templates"][TYPE_OF[attribute]]
    return templates[which].format(o=obj, a=attribute)


def ask_for_one(attributes, obj, rng):
    """An instruction for a random one of the attributes, in random words."""
    attribute = rng.choice(attributes)
    return instruction(obj, attribute, rng.randrange(4))


# ---- words of the user's own --------------------------------------------------------------------

def wish(attribute, rng):
    """Asks for an attribute, by its name or by a hint."""
    hints = [hint for hint, meant in HINTS.items() if attribute in meant]
    thing = rng.choice([attribute, *hints])
    return say(rng.choice(GUIDANCE["attribute"]).format(a=thing), rng)


def wish_for_type(edit_type, rng):
    thing = rng.choice(EDIT_TYPES[edit_type])
    return say(rng.choice(GUIDANCE["type"]).format(t=thing), rng)


def wish_for_nothing(rng):
    """So that a policy learns to say what it would say anyway."""
    return say(aside(rng), rng)


def say(words, rng):
    """As people type: perhaps with an aside, a capital, a full stop."""
    if rng.random() < 0.25:
        both = [words, aside(rng)]
        rng.shuffle(both)
        words = " ".join(both)
    if rng.random() < 0.3:
        words = words[0].upper() + words[1:]
    return words + rng.choice(["", "", "", ".", "!", "?"])


def aside(rng):
    """Words that ask for nothing, or that nobody knows."""
    unknown = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    known = rng.choice(GUIDANCE["aside"])
    return rng.choice([known, unknown, f"{known} {unknown}"])


# ---- people -------------------------------------------------------------------------------------

def attributes_of(themes):
    """All attributes of some themes, each once, in alphabetical order."""
    return sorted({attribute for theme in themes for attribute in THEMES[theme]})


def draw_themes(rng):
    """(liked, disliked) theme names: one or two of each; no attribute is in both. Popular themes
    are liked more often; dislikes fall evenly."""
    drawn = rng.choices(list(THEMES), POPULAR[:len(THEMES)], k=2)
    liked = list(dict.fromkeys(drawn))                    # each once, in order
    taste = set(attributes_of(liked))
    others = [theme for theme in THEMES if taste.isdisjoint(THEMES[theme])]
    if not others:                                        # two broad themes that touch all others:
        return draw_themes(rng)                           # think of someone else
    count = rng.choice([1, 2, 2])
    return liked, rng.sample(others, min(count, len(others)))


def make_user(name, rng, liked, disliked):
    """One line of users.jsonl for a persona of these themes. The lists are in the order in which
    the history told them."""
    taste = attributes_of(liked)
    distaste = attributes_of(disliked)
    rng.shuffle(taste)
    rng.shuffle(distaste)
    told = round(STATED * len(taste))
    likes = taste[:told]
    dislikes = distaste[:round(STATED * len(distaste))]
    neutral = [a for a in TYPE_OF if a not in taste and a not in distaste]
    for stated in (likes, dislikes):
        if rng.random() < FANCY:
            fancy = neutral.pop(rng.randrange(len(neutral)))
            stated.append(fancy)
    return {"user": name, "likes": likes, "dislikes": dislikes, "hidden": taste[told:]}


def make_pairs(user, rng):
    """48 lines of pairs.jsonl.

    Chosen asks for a stated like of the edit type, or of another where there is none. Rejected
    asks, in the first of two pairs, for a stated dislike of the type, in the second for something
    the user is indifferent to (or the other of the two). Hidden likes are on neither side."""
    likes = user["likes"]
    dislikes = user["dislikes"]
    known = {*likes, *dislikes, *user["hidden"]}
    for _ in range(4):
        obj = rng.choice(OBJECTS)
        text = caption(rng.choice(COLORS), obj, rng.choice(WALLS))
        for edit_type, attributes in ATTRIBUTES.items():
            wanted = [a for a in likes if a in attributes]
            unwanted = [a for a in dislikes if a in attributes]
            indifferent = [a for a in attributes if a not in known]
            for worse in (unwanted or indifferent, indifferent or unwanted):
                pair = {
                    "user": user["user"],
                    "caption": text,
                    "edit_type": edit_type,
                    "chosen": ask_for_one(wanted or likes, obj, rng),
                    "rejected": ask_for_one(worse or dislikes, obj, rng),
                }
                elsewhere = [a for a in likes if a not in attributes] or worse
                guide(pair, obj, rng, indifferent, wanted and elsewhere)
                yield pair


def guide(pair, obj, rng, indifferent, elsewhere):
    """Now and then, give the pair words of the user's own: "guidance". They ask for a thing that
    the user never cared about, and chosen obeys, while rejected is what the user would like
    instead; or they name the edit type, and rejected is a like of another type (`elsewhere`); or
    they mean nothing, and change nothing."""
    if indifferent and rng.random() < GUIDED:
        asked = rng.choice(indifferent)
        pair["guidance"] = wish(asked, rng)
        pair["rejected"] = pair["chosen"]
        pair["chosen"] = instruction(obj, asked, rng.randrange(4))
    elif elsewhere and rng.random() < GUIDED:
        pair["guidance"] = wish_for_type(pair["edit_type"], rng)
        pair["rejected"] = ask_for_one(elsewhere, obj, rng)
    elif rng.random() < GUIDED:
        pair["guidance"] = wish_for_nothing(rng)


def people(split, count, seed):
    """(users, pairs) of one split, "train" or "test"; user i depends on (seed, split, i) alone."""
    users = []
    pairs = []
    names = CONCEPTS["names"]
    middle = "-" if split == "train" else "-new-"
    for i in range(count):
        rng = random.Random(f"{seed} {split} {i}")
        name = f"{names[i % len(names)]}{middle}{i:04d}"
        liked, disliked = draw_themes(rng)
        user = make_user(name, rng, liked, disliked)
        users.append(user)
        pairs += make_pairs(user, rng)
    return users, pairs


def archetypes(seed):
    """Users who like exactly one theme and bear its name, each disliking one other theme: people
    one can predict by hand."""
    for theme, attributes in THEMES.items():
        rng = random.Random(f"{seed} {theme}")
        others = [t for t in THEMES if set(THEMES[t]).isdisjoint(attributes)]
        name = theme.replace(" ", "-")
        yield make_user(name, rng, [theme], [rng.choice(others)])


# ---- edits and scenes ---------------------------------------------------------------------------

def draw_edit(rng):
    """(colour, object, wall, attribute, which way to ask): every edit type alike, and within a
    type some attributes up to three times as often as others."""
    color = rng.choice(COLORS)
    obj = rng.choice(OBJECTS)
    wall = rng.choice(WALLS)
    names = ATTRIBUTES[rng.choice(list(ATTRIBUTES))]
    attribute, = rng.choices(names, POPULAR[:len(names)])
    return color, obj, wall, attribute, rng.randrange(4)


def make_edits(count, rng):
    for _ in range(count):
        color, obj, wall, attribute, which = draw_edit(rng)
        edit = {
            "input": caption(color, obj, wall),
            "edit": instruction(obj, attribute, which),
            "output": edited_caption(color, obj, wall, attribute),
        }
        if rng.random() < 0.5:                            # often: hints take many examples
            for_a_thing = wish(attribute, rng)
            for_a_type = wish_for_type(TYPE_OF[attribute], rng)
            for_nothing = wish_for_nothing(rng)
            edit["guidance"] = rng.choice([for_a_thing, for_a_thing, for_a_type, for_nothing])
        yield edit


def make_scenes(folder, count, truths, rng, first_seed=1_000_000):
    """Writes scenes/*.png and yields lines of scenes.jsonl, the first `truths` with the true
    picture of every edit. No scene that pretrain.py draws has a seed of a million or more."""
    (folder / "scenes").mkdir(exist_ok=True)
    for i in range(count):
        obj = OBJECTS[i % len(OBJECTS)]
        color = rng.choice(COLORS)
        wall = rng.choice(WALLS)
        geometry = Geometry({"object": obj, "seed": first_seed + i})

        def draw(*attributes):
            """The scene after edits, as a file -> its name, relative to the folder."""
            name = "_".join([f"{i:02d}", obj, *attributes]).replace(" ", "_")
            picture = Image.fromarray(geometry.shade(color, wall, attributes))
            picture.save(folder / "scenes" / f"{name}.png")
            return f"scenes/{name}.png"

        line = {"image": draw(), "caption": caption(color, obj, wall)}
        if i < truths:
            line["edits"] = []
            for attribute, edit_type in TYPE_OF.items():
                line["edits"].append({
                    "edit_type": edit_type,
                    "attribute": attribute,
                    "instruction": instruction(obj, attribute, rng.randrange(4)),
                    "image": draw(attribute),
                })
        yield line


# ---- the files ----------------------------------------------------------------------------------

def write_jsonl(path, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), newline="\n")
    print(f"{path}: {len(lines):,} lines")


def write_world(args):
    args.out.mkdir(parents=True, exist_ok=True)
    users, pairs = people("train", args.users, args.seed)
    write_jsonl(args.out / "users.jsonl", users)
    write_jsonl(args.out / "pairs.jsonl", pairs)
    users, pairs = people("test", args.test_users, args.seed)
    if args.sample:
        users = [*archetypes(args.seed), *users]
    write_jsonl(args.out / "users_test.jsonl", users)
    write_jsonl(args.out / "pairs_test.jsonl", pairs)
    rng = random.Random(args.seed)
    write_jsonl(args.out / "edits.jsonl", make_edits(args.edits, rng))
    if args.scenes:
        rng = random.Random(args.seed)
        for _ in range(args.edits):                       # as many draws as for the shipped scenes
            draw_edit(rng)
        truths = 1 if args.sample else args.scenes
        scenes = make_scenes(args.out, args.scenes, truths, rng)
        write_jsonl(args.out / "scenes.jsonl", scenes)


def main(argv=None):
    p = argparse.ArgumentParser(description="Write the miniature world's files.")
    p.add_argument("--out", type=Path, default=HERE / "data", help="folder to write")
    p.add_argument("--users", type=int, default=900, help="training users (the paper: 2900)")
    p.add_argument("--test-users", type=int, default=100, help="held-out users")
    p.add_argument("--edits", type=int, default=10_000, help="lines of edits.jsonl")
    p.add_argument("--scenes", type=int, default=16,
                   help="held-out pictures, each with 45 edited ones; 0 draws none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--sample", action="store_true",
                   help="write the shipped sample, mini/sample: nine archetypes, a little of all")
    args = p.parse_args(argv)
    if args.sample:                                       # other defaults; given flags still win
        p.set_defaults(out=HERE / "sample", users=12, test_users=3, edits=60, scenes=6)
        args = p.parse_args(argv)
    write_world(args)


if __name__ == "__main__":
    main()
