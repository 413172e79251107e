"""The people of the miniature world: personas, their histories, preference pairs, generic edits, and held-out scenes.

concepts.json has the words: 8 objects, 45 attributes in six edit types (our choice: the paper names neither), the sentences made of them, and the themes, most
popular first. No attribute's name contains another's. A persona likes one or two themes and dislikes one or two others. A theme's seven attributes share no word
and no look (glamour: leopard spots, gold, marble, a crown); only histories connect them, the paper's own case (Sec. 4: liked together, not alike in words).
A history states about two thirds of the taste, and now and then a fancy that fits no theme; the liked rest is `hidden`: nothing but evaluation may read it.

    users.jsonl, users_test.jsonl   {"user", "likes", "dislikes", "hidden"}; the test users are met by no training stage
    pairs.jsonl, pairs_test.jsonl   {"user", "caption", "edit_type", "chosen", "rejected"}, some "guidance": 4 captions x 6 edit types x 2 (paper, Sec. 5)
    edits.jsonl                     {"input", "edit", "output"}, some with "guidance": nobody's edits, InstructPix2Pix's format, for supervised fine-tuning
    scenes.jsonl + scenes/*.png     held-out pictures, each with its true picture after every one of the 45 edits
    python mini/world.py                                   # mini/data: 900 + 100 users, 16 scenes; about 15 s
    python mini/world.py --users 2900 --test-users 100     # the paper's size: 144,000 pairs
    python mini/world.py --sample                          # the small sample that is shipped, mini/sample
"""
import argparse, json, random
from pathlib import Path
from PIL import Image

HERE = Path(__file__).parent
CONCEPTS = json.loads((HERE / "concepts.json").read_text())
OBJECTS, COLORS, WALLS, ATTRIBUTES, THEMES, GUIDANCE = (CONCEPTS[k] for k in ("objects", "colors", "walls", "attributes", "themes", "guidance"))
POPULAR = [(rank + 1) ** -0.5 for rank in range(10)]        # how often the first, second, ... of a list is drawn, where not all alike
TYPE_OF = {a: edit_type for edit_type, names in ATTRIBUTES.items() for a in names}
STATED = 0.65                                               # share of the persona's taste that its history shows
FANCY = 0.5                                                 # chance of one stated like, and of one stated dislike, outside every theme
GUIDED = 0.10                                               # chance of an edit to come with words of the user; of a pair twice: naming a thing, or an edit type

def caption(color, obj, wall):
    """What a person would write under the unedited picture."""
    return f"A {color} {obj} in front of a {wall} wall"
def edited_caption(color, obj, wall, attribute):
    return CONCEPTS["edited"][TYPE_OF[attribute]].format(c=color, o=obj, w=wall, a=attribute)
def instruction(obj, attribute, which):
    """The `which`-th (0 to 3) way to ask for `attribute` on `obj`."""
    return CONCEPTS["templates"][TYPE_OF[attribute]][which].format(o=obj, a=attribute)

def draw_themes(rng):
    """(liked, disliked) theme names: one or two of each; no attribute is in both. Dislikes fall evenly."""
    liked = list(dict.fromkeys(rng.choices(list(THEMES), POPULAR[:len(THEMES)], k=2)))
    taste = {a for theme in liked for a in THEMES[theme]}
    other = [theme for theme in THEMES if not taste & set(THEMES[theme])]
    if not other:                                           # two broad themes that touch all the others: think of someone else
        return draw_themes(rng)
    return liked, rng.sample(other, min(rng.choice([1, 2, 2]), len(other)))

def make_user(name, rng, liked, disliked):
    """One line of users.jsonl for a persona of these themes. The lists are in the order in which the history told them."""
    taste, distaste = (sorted({a for theme in themes for a in THEMES[theme]}) for themes in (liked, disliked))
    rng.shuffle(taste)
    rng.shuffle(distaste)
    told = round(STATED * len(taste))
    likes, hidden, dislikes = taste[:told], taste[told:], distaste[:round(STATED * len(distaste))]
    neutral = [a for a in TYPE_OF if a not in taste and a not in distaste]
    for stated in (likes, dislikes):
        if rng.random() < FANCY:
            stated.append(neutral.pop(rng.randrange(len(neutral))))
    return {"user": name, "likes": likes, "dislikes": dislikes, "hidden": hidden}

def make_pairs(user, rng):
    """48 lines of pairs.jsonl. Chosen asks for a stated like of the edit type, or of another where there is none; rejected, in the first pair, for a stated
    dislike of it, in the second for something the user is indifferent to (or the other of the two). Hidden likes are on neither side. Where a line has
    "guidance", chosen is what the words ask for, be it a thing that the user never cared about, and rejected what they would like instead."""
    likes, dislikes, known = user["likes"], user["dislikes"], {*user["likes"], *user["dislikes"], *user["hidden"]}
    for _ in range(4):
        obj = rng.choice(OBJECTS)
        text = caption(rng.choice(COLORS), obj, rng.choice(WALLS))
        for edit_type, attributes in ATTRIBUTES.items():
            wanted = [a for a in likes if a in attributes] or likes
            unwanted = [a for a in dislikes if a in attributes]
            indifferent = [a for a in attributes if a not in known]
            for worse in (unwanted or indifferent, indifferent or unwanted):
                chosen, rejected = (instruction(obj, rng.choice(names), rng.randrange(4)) for names in (wanted, worse or dislikes))
                pair = {"user": user["user"], "caption": text, "edit_type": edit_type, "chosen": chosen, "rejected": rejected}
                if indifferent and rng.random() < GUIDED:
                    asked = rng.choice(indifferent)
                    pair |= {"guidance": rng.choice(GUIDANCE).format(a=asked), "chosen": instruction(obj, asked, rng.randrange(4)), "rejected": chosen}
                elif wanted is not likes and rng.random() < GUIDED:
                    other = [a for a in likes if a not in attributes] or worse
                    pair |= {"guidance": f"change the {edit_type}", "rejected": instruction(obj, rng.choice(other), rng.randrange(4))}
                yield pair

def draw_edit(rng):
    """(colour, object, wall, attribute, which way to ask): every edit type alike, and within a type some attributes up to three times as often as others."""
    scene, names = [rng.choice(words) for words in (COLORS, OBJECTS, WALLS)], ATTRIBUTES[rng.choice(list(ATTRIBUTES))]
    return *scene, *rng.choices(names, POPULAR[:len(names)]), rng.randrange(4)

def make_edits(count, rng):
    for _ in range(count):
        color, obj, wall, attribute, which = draw_edit(rng)
        edit = {"input": caption(color, obj, wall), "edit": instruction(obj, attribute, which), "output": edited_caption(color, obj, wall, attribute)}
        words = rng.choice([rng.choice(GUIDANCE).format(a=attribute), f"change the {TYPE_OF[attribute]}"])
        yield edit | {"guidance": words} if rng.random() < GUIDED else edit

def make_scenes(folder, count, truths, rng):
    """Writes scenes/*.png and yields lines of scenes.jsonl, the first `truths` with the true picture of every edit. No training scene has a seed above a million."""
    from render import Geometry
    (folder / "scenes").mkdir(exist_ok=True)
    for i in range(count):
        obj, color, wall = OBJECTS[i % len(OBJECTS)], rng.choice(COLORS), rng.choice(WALLS)
        geometry = Geometry({"object": obj, "seed": 1_000_000 + i})
        def save(*attributes):
            name = f"scenes/{'_'.join([f'{i:02d}', obj, *attributes]).replace(' ', '_')}.png"
            Image.fromarray(geometry.shade(color, wall, attributes)).save(folder / name)
            return name
        line = {"image": save(), "caption": caption(color, obj, wall)}
        if i < truths:
            line["edits"] = [{"edit_type": TYPE_OF[a], "attribute": a, "instruction": instruction(obj, a, rng.randrange(4)), "image": save(a)} for a in TYPE_OF]
        yield line

def people(split, count, seed):
    """(users, pairs) of one split; user i depends on (seed, split, i) and on nothing else."""
    users, pairs, names = [], [], CONCEPTS["names"]
    for i in range(count):
        rng = random.Random(f"{seed} {split} {i}")
        users.append(make_user(f"{names[i % len(names)]}{'-' if split == 'train' else '-new-'}{i:04d}", rng, *draw_themes(rng)))
        pairs += make_pairs(users[-1], rng)
    return users, pairs

def archetypes(seed):
    """Users who like exactly one theme and bear its name, each disliking one other theme: people one can predict by hand."""
    for theme in THEMES:
        rng = random.Random(f"{seed} {theme}")
        other = rng.choice([t for t in THEMES if not set(THEMES[t]) & set(THEMES[theme])])
        yield make_user(theme.replace(" ", "-"), rng, [theme], [other])

def write(path, lines):
    lines = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(lines), newline="\n")
    print(f"{path}: {len(lines):,} lines")

def main():
    p = argparse.ArgumentParser(description="Write the miniature world's users, pairs, edits and scenes.")
    p.add_argument("--out", type=Path, default=HERE / "data", help="folder to write")
    p.add_argument("--users", type=int, default=900, help="training users (the paper: 2900)")
    p.add_argument("--test-users", type=int, default=100, help="held-out users")
    p.add_argument("--edits", type=int, default=10_000, help="lines of edits.jsonl")
    p.add_argument("--scenes", type=int, default=16, help="held-out pictures, each with 45 edited ones; 0 draws none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--sample", action="store_true", help="write the shipped sample instead: nine archetypes and a little of everything, into mini/sample")
    a = p.parse_args()
    if a.sample:                                            # other defaults; flags that are given still win
        p.set_defaults(out=HERE / "sample", users=12, test_users=3, edits=60, scenes=6)
        a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for split, count, suffix in (("train", a.users, ""), ("test", a.test_users, "_test")):
        users, pairs = people(split, count, a.seed)
        write(a.out / f"users{suffix}.jsonl", [*(archetypes(a.seed) if a.sample and split == "test" else []), *users])
        write(a.out / f"pairs{suffix}.jsonl", pairs)
    write(a.out / "edits.jsonl", make_edits(a.edits, random.Random(a.seed)))
    if a.scenes:
        rng = random.Random(a.seed)
        for _ in range(a.edits):                            # the scenes' draws follow those of the edits: the shipped pictures
            draw_edit(rng)
        write(a.out / "scenes.jsonl", make_scenes(a.out, a.scenes, 1 if a.sample else a.scenes, rng))

if __name__ == "__main__":
    main()
