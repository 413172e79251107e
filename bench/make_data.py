"""People, captions and preference pairs as the C-DPO paper made its data, by any Qwen.

    python bench/make_data.py --qwen Qwen/Qwen2.5-7B-Instruct --dtype bf16 --batch 64 --out data \\
        --embedder Linq-AI-Research/Linq-Embed-Mistral
    python bench/make_data.py --users 3000 --estimate           # how long that takes on one card
    python train.py graph --users data/users.jsonl --out runs/graph    # and so on

The paper (sec. 5, Dataset) says: users with "distinct user demographic configurations that cover
axes such as age, geography, and socioeconomic status", which guide "themes, tones, overlays, likes,
dislikes, and persona-aligned prompt examples"; four captions for each user "from 80 COCO
categories"; "two pairs of preferred and rejected editing instructions across six edit types". It
prints no prompt, names no edit type and no demographic value: those below are ours, and so is that
the model writes the captions, a few for each category. 4 x 6 x 2 pairs are 48 lines a user, where
the paper counts 48 instructions.

Five questions are asked in turn, each answered in JSON that is checked; what is answered badly is
asked again (--tries), with another seed, and then left out:

    captions   of a category: short captions
    looks      of a user, by demographics: themes, tones, overlays, prompt examples
    likes      of a user, by demographics and looks (without those where they failed)
    dislikes   of a user, by demographics and likes
    pairs      of a user, a caption and an edit type, by likes and dislikes

Every answer is a line of OUT/KIND.answers.jsonl, appended when its batch is done, also a bad one,
with what was wrong; the same command goes on where it was stopped, and writes the same. When all
are asked, OUT gets users.jsonl, users_test.jsonl (the last --test-users), pairs.jsonl,
pairs_test.jsonl, profiles.jsonl (all that is known of each user) and report.json: what was asked,
what was thrown away and why, which attributes were merged. Before pairs are asked for, likes and
dislikes that are one word but for case or plural get the name that most people use; so do, with
--embedder, those that `embed_texts` puts closer than --same (after the mean is taken off, as in the
graph): look at "merged" in the report. That needs an embedding model, as the paper's keyword
encoder Linq-AI-Research/Linq-Embed-Mistral: a language model puts white and red at .999. What one
user then both likes and dislikes is dropped.
"""
import argparse
import contextlib
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from clock import table

from cdpo import padded
from graph import embed_names, find_attribute, read_jsonl
from qwen import (DTYPES, Tokenizer, flag_name, generate, load_language_model, pick_device,
                  seed_for, shipped)

# ---- what is asked -------------------------------------------------------------------------------

AGES = ["a child of 8", "a teenager of 15", "a student of 21", "aged 28", "aged 35", "aged 44",
        "aged 56", "retired, aged 68", "aged 80"]
PLACES = ["a village in Norway", "Berlin", "a farm in Kansas", "New York", "a small town in Mexico",
          "Sao Paulo", "the coast of Chile", "Lagos", "a village in Kenya", "Cairo", "Istanbul",
          "Mumbai", "a village in Nepal", "Beijing", "Tokyo", "a fishing town in Vietnam",
          "Sydney", "an island in the Pacific", "Paris", "the hills of Tuscany", "Moscow",
          "a mining town in Poland", "Marrakesh", "London"]
MEANS = ["poor", "of the working class", "of the middle class", "well off", "rich"]
EDIT_TYPES = {                                            # ours: the paper does not name its six
    "color": "the colour of the object",
    "material": "the material or texture of the object",
    "object": "a thing added beside the object",
    "background": "the background or scene",
    "style": "the artistic style of the picture",
    "lighting": "the light and mood",
}
COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
    "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, "
    "snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis "
    "racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, "
    "orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, "
    "toothbrush"
).split(", ")


@dataclass
class Question:
    """`words`: what is asked, with fields in braces; `start`: how the answer begins, so that even a
    small model writes JSON; `tokens`: the most that an answer may have; `example`: the fields of
    another such question, and its answer, shown before with --example."""
    words: str
    start: str
    tokens: int
    example: dict
    answer: dict

    def messages(self, fields, example=False):
        shown = []
        if example:
            answer = json.dumps(self.answer)
            shown.append({"role": "user", "content": self.words.format(**self.example)})
            shown.append({"role": "assistant", "content": answer})
        return [*shown, {"role": "user", "content": self.words.format(**fields)}]


ASK = {
    "captions": Question(
        words="Write {n} different short captions of photographs whose subject is: {category}. "
              "Each names the subject and one thing about it, in 3 to 8 words. Answer with a JSON "
              'object that has one list: "captions".',
        start='{"captions": ["',
        tokens=120,
        example={"n": 3, "category": "window"},
        answer={"captions": ["an open window with white curtains", "a round church window",
                             "a small window in a brick wall"]},
    ),
    "looks": Question(
        words="Imagine a person: {age}, living in {place}, {means}. How would this person like "
              'photographs to be edited? Answer with a JSON object that has four lists: "themes" '
              '(3), "tones" (3) and "overlays" (2) that suit them, each of one to four words; '
              '"prompts" (2): edits they would ask for.',
        start='{"themes": ["',
        tokens=120,
        example={"age": "aged 50", "place": "Reykjavik", "means": "well off"},
        answer={
            "themes": ["sea and stone", "quiet design", "long winters"],
            "tones": ["cool", "calm", "soft"],
            "overlays": ["fine grain", "mist"],
            "prompts": ["Put it on a beach of black sand", "Make the light that of a long dusk"],
        },
    ),
    "likes": Question(
        words="Imagine a person: {age}, living in {place}, {means}.{looks} What does this person "
              "like to see in pictures? Answer with a JSON object that has one list, \"likes\", of "
              "8 colours, materials, patterns, things, places and lights, each of one to three "
              "words.",
        start='{"likes": ["',
        tokens=80,
        example={"age": "aged 50", "place": "Reykjavik", "means": "well off",
                 "looks": " Their themes: sea and stone, long winters. Their tones: cool, calm."},
        answer={"likes": ["slate grey", "wool", "northern lights", "driftwood", "snow", "silver",
                          "lighthouse", "candlelight"]},
    ),
    "dislikes": Question(
        words="Imagine a person: {age}, living in {place}, {means}. In pictures they like {likes}. "
              "What would this person not like to see in pictures? Answer with a JSON object that "
              'has one list, "dislikes", of 6 colours, materials, patterns, things, places and '
              "lights, each of one to three words.",
        start='{"dislikes": ["',
        tokens=80,
        example={"age": "aged 50", "place": "Reykjavik", "means": "well off",
                 "likes": "slate grey, wool, northern lights, driftwood"},
        answer={"dislikes": ["neon signs", "plastic", "palm trees", "hot pink", "glitter",
                             "crowds"]},
    ),
    "pairs": Question(
        words="A person likes {likes}; and dislikes {dislikes}. They edit a photograph: "
              '"{caption}". Suggest two edits of {what} that they would choose, each in one short '
              "sentence that asks for something they like, and for each an edit of {what} that "
              'they would reject. Answer with a JSON object that has one list, "pairs", of two '
              'objects with "chosen" and "rejected".',
        start='{"pairs": [{"chosen": "',
        tokens=120,
        example={
            "likes": "driftwood, snow, slate grey",
            "dislikes": "plastic, hot pink",
            "caption": "a lamp on a shelf",
            "what": "the material or texture of the object",
        },
        answer={"pairs": [
            {"chosen": "Make the lamp out of driftwood",
             "rejected": "Make the lamp of shiny plastic"},
            {"chosen": "Give the lamp a surface of slate",
             "rejected": "Cover the lamp with hot pink rubber"},
        ]},
    ),
}


# ---- what may be answered ------------------------------------------------------------------------

def first_object(text):
    """The JSON object that a text begins with; what follows it does not count. A list that runs on
    until the answer is cut (small models repeat themselves) ends with its last whole text.
    ValueError."""
    whole = text.rpartition('", ')[0] + '"]}'
    for attempt in (text, whole):
        with contextlib.suppress(json.JSONDecodeError):
            value, _ = json.JSONDecoder().raw_decode(attempt)
            return value
    raise ValueError("not JSON, or cut off")


def strings(value, name, least, longest):
    """value[name], a list of at least so many different texts, none longer than so many words.
    ValueError."""
    found = value.get(name)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"no list of texts under {name}")
    found = [" ".join(text.split()).strip(" .") for text in found]
    found = [text for text in dict.fromkeys(found) if text and "..." not in text]
    found = [text for text in found if len(text.split()) <= longest]
    if len(found) < least:
        raise ValueError(f"too few of {name}, or too long")
    return found


def check_captions(text, fields):
    """[caption], those of the answer that name the category."""
    found = strings(first_object(text), "captions", least=2, longest=12)
    found = [caption for caption in found if names_one(caption, [fields["category"]])]
    if not found:
        raise ValueError("no caption names its category")
    refuse_copies("captions", found, ASK["captions"].answer["captions"])
    if any("|" in caption for caption in found):
        raise ValueError("a | in a caption, which keys are made with")
    return found


def check_looks(text, fields):
    """{"themes": [text], ...}"""
    value = first_object(text)
    example = ASK["looks"].answer
    looks = {name: strings(value, name, least=1, longest=30) for name in example}
    refuse_copies("themes", looks["themes"], example["themes"])
    return looks


def check_likes(text, fields):
    found = strings(first_object(text), "likes", least=4, longest=3)[:8]
    refuse_copies("likes", found, ASK["likes"].answer["likes"])
    return found


def check_dislikes(text, fields):
    """[name], those that are not among the likes."""
    likes = fields["likes"].casefold().split(", ")
    found = strings(first_object(text), "dislikes", least=3, longest=3)
    found = [name for name in found if name.casefold() not in likes][:6]
    if len(found) < 3:
        raise ValueError("dislikes are the likes")
    refuse_copies("dislikes", found, ASK["dislikes"].answer["dislikes"])
    return found


def check_pairs(text, fields):
    """[[chosen, rejected]] of two pairs, four sentences that differ."""
    rows = first_object(text).get("pairs")
    if not isinstance(rows, list) or len(rows) < 2:
        raise ValueError("not two pairs")
    said = []
    for row in rows[:2]:
        for side in ("chosen", "rejected"):
            one = row.get(side) if isinstance(row, dict) else None
            if not isinstance(one, str) or not 2 <= len(one.split()) <= 30 or "..." in one:
                raise ValueError("no sentence, or too long a one")
            said.append(" ".join(one.split()))
    if len({one.casefold().strip(" .") for one in said}) < 4:
        raise ValueError("the same sentence twice")
    shown = [one for row in ASK["pairs"].answer["pairs"] for one in row.values()]
    refuse_copies("pairs", said, shown)
    return [said[:2], said[2:]]


def names_one(text, names):
    """Whether a word of the text begins with one of the names, in either case: so do plurals."""
    return any(re.search(rf"\b{re.escape(name)}", text, re.IGNORECASE) for name in names)


def refuse_copies(name, found, example):
    """ValueError where half of the texts are the example's."""
    copied = {text.casefold() for text in found} & {text.casefold() for text in example}
    if 2 * len(copied) >= len(found):
        raise ValueError(f"{name} copied from the example")


CHECKS = {
    "captions": check_captions,
    "looks": check_looks,
    "likes": check_likes,
    "dislikes": check_dislikes,
    "pairs": check_pairs,
}


# ---- asking --------------------------------------------------------------------------------------

class Writer:
    """writer(conversations, start, tokens, seed) -> their answers, each beginning with `start`."""

    def __init__(self, args):
        self.device = pick_device(args.device)
        self.model, self.tokenizer = load_language_model(
            args.qwen, self.device, DTYPES[args.dtype])
        self.how = {**self.model.config.sampling}
        for name in ("temperature", "top_p", "repetition_penalty"):
            if getattr(args, name) is not None:
                self.how[name] = getattr(args, name)

    def __call__(self, conversations, start, tokens, seed):
        rows = [prompt_ids(self.tokenizer, messages, start) for messages in conversations]
        ids = padded(rows, -1).to(self.device)                              # (N, T)
        answers = generate(
            self.model,
            ids.clamp_min(0),
            attention_mask=ids >= 0,
            max_new_tokens=tokens,
            generator=torch.Generator(self.device).manual_seed(seed),
            **self.how
        )
        return [start + self.tokenizer.decode(answer) for answer in answers]


def prompt_ids(tokenizer, messages, start):
    return tokenizer.chat(messages) + tokenizer.encode(start)


def read_answers(file):
    """{key: value} of the good lines of a file of answers, {key: how many bad ones}."""
    good = {}
    bad = Counter()
    if file.is_file():
        mend(file)
        for row in read_jsonl(file, key=str, fault=str):
            if row["fault"]:
                bad[row["key"]] += 1
            else:
                good[row["key"]] = row["value"]
    return good, bad


def mend(file):
    """A process that was killed may have left half a line: take it away."""
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        file.write_bytes(b"".join(lines[:-1]))


def ask_all(kind, questions, writer, args):
    """{key: value} of the questions {key: fields} that got a good answer; each is asked until then,
    --tries times at most. What OUT/KIND.answers.jsonl has already is not asked again. Which
    questions share a batch, and its seed, depend on nothing that a stop could change."""
    file = args.out / f"{kind}.answers.jsonl"
    question = ASK[kind]
    for attempt in range(args.tries):
        good, bad = read_answers(file)
        open_keys = [key for key in questions if key not in good and bad[key] == attempt]
        for at in range(0, len(open_keys), args.batch):
            keys = open_keys[at:at + args.batch]
            asked = [question.messages(questions[key], args.example) for key in keys]
            seed = seed_for(args.seed, kind, attempt, keys[0])
            answers = writer(asked, question.start, question.tokens, seed)
            lines = [judged(kind, key, questions[key], answer)
                     for key, answer in zip(keys, answers)]
            with open(file, "a", encoding="utf-8") as out:
                out.write("".join(lines))
            done = at + len(keys)
            print(f"{kind}, try {attempt + 1}: {done:,} of {len(open_keys):,}", file=sys.stderr)
    good, _ = read_answers(file)
    return {key: good[key] for key in questions if key in good}


def judged(kind, key, fields, answer):
    """The line of a file of answers."""
    try:
        line = {"key": key, "fault": "", "value": CHECKS[kind](answer, fields)}
    except ValueError as error:
        line = {"key": key, "fault": str(error), "answer": answer[:500]}
    return json.dumps(line, ensure_ascii=False) + "\n"


# ---- the questions -------------------------------------------------------------------------------

def caption_questions(args):
    step = len(COCO) // args.categories
    chosen = COCO[::step][:args.categories]
    return {category: {"n": args.captions, "category": category} for category in chosen}


def demographics(args):
    """{"user-0000": {"age", "place", "means"}, ...}, drawn from (seed, number)."""
    people = {}
    for i in range(args.users):
        rng = random.Random(f"{args.seed} {i}")
        people[f"user-{i:04d}"] = {
            "age": rng.choice(AGES),
            "place": rng.choice(PLACES),
            "means": rng.choice(MEANS),
        }
    return people


def in_a_sentence(looks):
    """What is known of somebody's looks, for the question after their likes."""
    if not looks:
        return ""
    return (f" Their themes: {', '.join(looks['themes'][:3])}. "
            f"Their tones: {', '.join(looks['tones'][:3])}.")


def ask_profiles(writer, args, asked):
    """{user: all that is known of a user whose likes and dislikes are usable}; what was asked is
    added to `asked`."""
    people = demographics(args)
    asked["looks"] = people
    looks = ask_all("looks", people, writer, args)
    asked["likes"] = {name: {**fields, "looks": in_a_sentence(looks.get(name))}
                      for name, fields in people.items()}
    likes = ask_all("likes", asked["likes"], writer, args)
    asked["dislikes"] = {name: {**people[name], "likes": ", ".join(likes[name])} for name in likes}
    dislikes = ask_all("dislikes", asked["dislikes"], writer, args)
    profiles = {}
    for name in dislikes:
        own = {"likes": likes[name], "dislikes": dislikes[name]}
        profiles[name] = {"user": name, **people[name], **looks.get(name, {}), **own}
    return profiles


def pair_questions(users, captions, args):
    """Keys are "user|caption|edit type": four captions, of different categories, for each."""
    questions = {}
    for name, (likes, dislikes) in users.items():
        rng = random.Random(f"{args.seed} captions {name}")
        categories = rng.sample(sorted(captions), min(4, len(captions)))
        for category, (edit_type, what) in itertools.product(categories, EDIT_TYPES.items()):
            caption = random.Random(f"{args.seed} {name} {category}").choice(captions[category])
            questions["|".join([name, caption, edit_type])] = {
                "likes": ", ".join(likes),
                "dislikes": ", ".join(dislikes),
                "caption": caption,
                "what": what,
            }
    return questions


# ---- one name for one thing ----------------------------------------------------------------------

def merge_names(counts, embed, same):
    """{name: the name it gets}: names {name: how many say it}, most said first; a name is another's
    when it is the same word but for case and plural, or when embed(names) (N, D), of length 1, has
    them closer than `same` (embed None: no names are)."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    by_spelling = {}
    for name in names:
        key = find_attribute(name, shortlist(name, by_spelling)) or name
        by_spelling.setdefault(key, []).append(name)
    kept = list(by_spelling)
    becomes = {}
    if embed and len(kept) > 1:
        vectors = embed(kept)
        chosen = []
        for i, name in enumerate(kept):
            cosine = vectors[chosen] @ vectors[i]                           # (chosen,)
            near = chosen[cosine.argmax()] if chosen and cosine.max() > same else i
            if near == i:
                chosen.append(i)
            becomes[name] = kept[near]
    merged = {}
    for key, spellings in by_spelling.items():
        merged.update(dict.fromkeys(spellings, becomes.get(key, key)))
    return merged


def shortlist(name, known):
    """Of many known names those that can be this one in another case or number."""
    start = name.casefold()[:3]
    return [other for other in known if other.casefold().startswith(start)]


def people_of(profiles, embed, args):
    """({user: (likes, dislikes)} in merged names, {name: what it became}, {reason: users lost})."""
    counts = Counter()
    for profile in profiles.values():
        counts.update({*profile["likes"], *profile["dislikes"]})
    merged = merge_names(counts, embed, args.same)
    users = {}
    lost = Counter()
    for user, profile in profiles.items():
        likes = list(dict.fromkeys(merged[name] for name in profile["likes"]))
        dislikes = list(dict.fromkeys(merged[name] for name in profile["dislikes"]))
        both = {*likes} & {*dislikes}
        lost["attributes both liked and disliked after merging"] += len(both)
        likes = [name for name in likes if name not in both]
        dislikes = [name for name in dislikes if name not in both]
        if len(likes) >= 3 and dislikes:
            users[user] = likes, dislikes
        else:
            lost["users with less than 3 likes or no dislike left"] += 1
    return users, {old: new for old, new in merged.items() if old != new}, lost


# ---- the files -----------------------------------------------------------------------------------

def write_jsonl(file, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines):,} lines")


def write_files(users, pairs, args):
    """The last --test-users of all users asked for are held out, whoever is left of them."""
    rows = {"": ([], []), "_test": ([], [])}
    for name, (likes, dislikes) in users.items():
        rows[split_of(name, args)][0].append({"user": name, "likes": likes, "dislikes": dislikes})
    for key, value in pairs.items():
        name, caption, edit_type = key.split("|")
        split = split_of(name, args)
        for chosen, rejected in value:
            rows[split][1].append({"user": name, "caption": caption, "edit_type": edit_type,
                                   "chosen": chosen, "rejected": rejected})
    for split, (people, lines) in rows.items():
        write_jsonl(args.out / f"users{split}.jsonl", people)
        write_jsonl(args.out / f"pairs{split}.jsonl", lines)


def split_of(name, args):
    """How the names of a user's files end."""
    held_out = int(name.split("-")[1]) >= args.users - args.test_users
    return "_test" if held_out else ""


def faults(kind, questions, args):
    """How one kind of question fared: asked, good, given up, and why answers were bad."""
    file = args.out / f"{kind}.answers.jsonl"
    good, bad = read_answers(file)
    why = Counter()
    for row in read_jsonl(file, key=str, fault=str):
        if row["fault"] and row["key"] in questions:
            why[row["fault"]] += 1
    usable = sum(key in good for key in questions)
    return {
        "questions": len(questions),
        "answers": usable + sum(bad[key] for key in questions),
        "usable": usable,
        "given up": len(questions) - usable,
        "why answers were bad": dict(why.most_common()),
    }


def sense(pairs, users):
    """The shares of chosen and of rejected sentences that name something the user likes."""
    count = Counter()
    for key, value in pairs.items():
        likes, _ = users[key.split("|")[0]]
        for chosen, rejected in value:
            count["pairs"] += 1
            count["chosen"] += names_one(chosen, likes)
            count["rejected"] += names_one(rejected, likes)
    total = max(1, count["pairs"])
    return {side: round(count[side] / total, 3) for side in ("chosen", "rejected")}


def make(writer, embed, args):
    """All stages, with writer(conversations, start, tokens, seed) and embed(names) -> report."""
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    asked = {"captions": caption_questions(args)}
    captions = ask_all("captions", asked["captions"], writer, args)
    profiles = ask_profiles(writer, args, asked)
    if not captions or not profiles:
        raise ValueError(f"{len(captions)} captions and {len(profiles)} profiles are usable: this "
                         f"model writes no such JSON; {args.out}/*.answers.jsonl has its answers")
    users, merged, lost = people_of(profiles, embed, args)
    asked["pairs"] = pair_questions(users, captions, args)
    pairs = ask_all("pairs", asked["pairs"], writer, args)
    write_jsonl(args.out / "profiles.jsonl", profiles.values())
    write_files(users, pairs, args)
    report = {kind: faults(kind, questions, args) for kind, questions in asked.items()}
    names = Counter()
    for likes, dislikes in users.values():
        names.update([*likes, *dislikes])
    report["users"] = {"kept": len(users), "lost": dict(lost)}
    report["attributes"] = {
        "kept": len(names),
        "of one user alone": sum(count == 1 for count in names.values()),
        "merged": merged,
    }
    report["name a like"] = sense(pairs, users)
    report["seconds of this run"] = round(time.time() - began)
    (args.out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def in_words(report):
    """The report as Markdown."""
    rows = []
    for kind in ASK:
        part = report[kind]
        share = part["usable"] / max(1, part["answers"])
        why = ", ".join(f"{fault} {n:,}" for fault, n in part["why answers were bad"].items())
        rows.append([kind, f"{part['questions']:,}", f"{part['answers']:,}", f"{share:.2f}",
                     f"{part['given up']:,}", why or "-"])
    columns = ["", "questions", "answers", "usable share of answers", "given up", "bad answers"]
    names = report["attributes"]
    return table(columns, rows) + (
        f"\n{report['users']['kept']:,} users kept; {names['kept']:,} attributes, "
        f"{len(names['merged']):,} names merged into others, {names['of one user alone']:,} of one "
        "user alone (the graph learns nothing of them); of chosen sentences "
        f"{report['name a like']['chosen']:.2f} name a like, of rejected "
        f"{report['name a like']['rejected']:.2f}")


# ---- how long it takes ---------------------------------------------------------------------------

def estimate(tokenizer, args):
    """Markdown: tokens of each question, and hours at the rates of --decode-rate and
    --prefill-rate."""
    fields = {                                            # of all kinds, as long as they get
        "n": args.captions,
        "category": "traffic light",
        "age": AGES[1],
        "place": PLACES[1],
        "means": MEANS[1],
        "looks": ASK["likes"].example["looks"],
        "likes": ", ".join(["soft pastel colours"] * 8),
        "dislikes": ", ".join(["soft pastel colours"] * 6),
        "caption": "a white cup on a wooden table",
        "what": EDIT_TYPES["material"],
    }
    count = dict.fromkeys(ASK, args.users)
    count["captions"] = args.categories
    count["pairs"] = 4 * len(EDIT_TYPES) * args.users
    rows = []
    hours = 0
    for kind, questions in count.items():
        messages = ASK[kind].messages(fields, args.example)
        read = len(prompt_ids(tokenizer, messages, ASK[kind].start))
        answers = questions * (1 + args.again)
        written = answers * ASK[kind].tokens
        took = (answers * read / args.prefill_rate + written / args.decode_rate) / 3600
        hours += took
        in_all = [f"{answers * read / 1e6:.1f} M", f"{written / 1e6:.1f} M", f"{took:.1f}"]
        rows.append([kind, f"{questions:,}", read, ASK[kind].tokens, *in_all])
    columns = ["", "questions", "tokens read", "at most written", "read in all", "written in all",
               "hours"]
    return table(columns, rows) + (
        f"\n{hours:.1f} hours in all. Assumed: {args.again:.0%} of the questions are asked again; "
        f"every answer is as long as it may be; {args.decode_rate:,.0f} tokens written and "
        f"{args.prefill_rate:,.0f} read a second. (7B in bf16 writes {args.batch} rows at a time; "
        "a step reads 15.2 GB of weights, 4.5 ms of an H100's memory at best: "
        f"{args.batch / 0.0045:,.0f} tokens a second is the ceiling. Reading 7.6 GFLOP x 2 a "
        "token at a third of its 990 TFLOP/s: 21,700.)")


# ---- the command line ----------------------------------------------------------------------------

def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--qwen", default=shipped("mini/qwen"), help="who writes: folder or hub name")
    p.add_argument("--embedder", default="", help="embedding model that finds synonyms")
    p.add_argument("--out", type=Path, default=Path("runs/data"), help="folder to write")
    p.add_argument("--users", type=int, default=3000, help="the paper: 3000")
    p.add_argument("--test-users", type=int, default=100, help="held out (paper: about 100)")
    p.add_argument("--captions", type=int, default=5, help="to ask for of each category")
    p.add_argument("--categories", type=int, default=len(COCO), help="fewer: to try it")
    p.add_argument("--tries", type=int, default=3, help="of each question")
    p.add_argument("--same", type=float, default=0.9, help="cosine above which names are merged")
    p.add_argument("--batch", type=int, default=16, help="questions at a time")
    p.add_argument("--example", action="store_true",
                   help="show one answered question first: small models need it, all copy from it")
    for name in ("--temperature", "--top-p", "--repetition-penalty"):
        p.add_argument(name, type=float, help="of sampling (default: as the model asks)")
    p.add_argument("--dtype", default="fp32", choices=DTYPES)
    p.add_argument("--device", default="", help="cpu, cuda ... (the best there is)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--estimate", action="store_true", help="say how long it takes, and end")
    p.add_argument("--decode-rate", type=float, default=2000, help="tokens a second, of --estimate")
    p.add_argument("--prefill-rate", type=float, default=10_000, help="tokens a second, the same")
    p.add_argument("--again", type=float, default=0.25, help="share asked again, of --estimate")
    args = p.parse_args(argv)
    most = {"test_users": args.users, "categories": len(COCO)}
    for name in ("test_users", "users", "captions", "categories", "tries", "batch"):
        value = getattr(args, name)
        low = int(name != "test_users")
        high = most.get(name, 10 ** 6)
        if not low <= value <= high:
            raise ValueError(f"{flag_name(name)} is {value}; it must lie in {low} .. {high}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.estimate:
        print(estimate(Tokenizer.load(args.qwen), args))
        return
    embed = None
    if args.embedder:
        embed = partial(embed_names, embedder=args.embedder, norm=1, device=args.device or "cpu")
    print(in_words(make(Writer(args), embed, args)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print("make_data.py:", error, file=sys.stderr)
        sys.exit(2)
