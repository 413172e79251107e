"""A blind study of two methods: which of two edits people prefer, and how well they like each.

    python bench/study.py --a out/cdpo --b out/dpo --out out/study   # sheet.html and key.json
    python bench/study.py --key out/study/key.json --votes votes_*.json
    python bench/study.py --study own --user ana --a out/cdpo --b out/dpo --out out/study_ana

--a and --b hold what edit.py writes, a PNG and its JSON for each edit; a pair is what both have of
the same user, source picture (its file name) and caption. sheet.html is one page that needs no
network: a voter opens it, votes by keyboard, saves a file of votes and sends it. It knows nothing
of the methods: its pictures are bare pixels, and key.json, which no voter may see, says what was
where. Several sheets of the same two methods are read together: --key a/key.json b/key.json.

`--study judges` is section 5.3 of the C-DPO paper (50 people judged edits for 10 synthetic users):
what the user likes and dislikes, the edits, each with its text prompt, and
    Q1: General Preference. "Which edited image would this user prefer, given the prompt?"
    Q2: Visual Appeal. "Ignoring the prompt, which image is more visually appealing?"
in random order, as the sides are. `--study own` is its Appendix E (10 people and their own tastes,
five objects): each edit beside its original, rated from 1 to 5 (Table 10) by
    Q1: Personalization. "On a scale of 1 to 5 (1=Does not matching my personal taste at all, 5=This
        is matching my personal taste a lot) can you rate the following image?"
    Q2: Disentanglement. "To what extent does the edit preserve the original image while reflecting
        personalized preferences? (1=Not at all, 5=Very Much)"
and then "users are asked to pick the edit they most prefer" (Table 11).

Ours: two methods, where the paper shows three (chance is 1/2 here, 1/3 there); "cannot tell": ties
are counted and left out of the rates; each method stands on the left equally often, but for one;
nobody chooses between pictures that are equal; the pick's wording, the original between its two
edits, and that it follows all ratings; in Appendix E, random order. And all intervals, of which
the paper has none: 95 %, Wilson's of rates, Student's t of means. They take answers as
independent; several of one person, or to one pair, are not, and the truth is wider.
"""
import argparse
import base64
import hashlib
import io
import json
import random
import secrets
import statistics
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clock import table

from flux import read_image
from qwen import read_json, reading, shipped, write_whole

JUDGES = {
    "Q1: General Preference": "Which edited image would this user prefer, given the prompt?",
    "Q2: Visual Appeal": "Ignoring the prompt, which image is more visually appealing?",
}
RATINGS = {
    "Q1: Personalization":
        "On a scale of 1 to 5 (1=Does not matching my personal taste at all, 5=This is matching "
        "my personal taste a lot) can you rate the following image?",
    "Q2: Disentanglement":
        "To what extent does the edit preserve the original image while reflecting personalized "
        "preferences? (1=Not at all, 5=Very Much)",
}
PICK = {"Pick": "Which edit do you most prefer?"}

# Of a question: [key of the keyboard, answer, words on the button].
CHOICE_KEYS = [
    ["ArrowLeft", "left", "← left"],
    ["ArrowDown", "tie", "↓ cannot tell"],
    ["ArrowRight", "right", "right →"],
]
RATING_KEYS = [[str(n), n, str(n)] for n in range(1, 6)]
KEYS = dict.fromkeys([*JUDGES, *PICK], CHOICE_KEYS) | dict.fromkeys(RATINGS, RATING_KEYS)


# ---- from two folders to pairs -------------------------------------------------------------------

def read_object(file, names, what):
    """The JSON object in `file`. ValueError where one of `names` is not in it."""
    found = read_json(file)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{file} has no {' or '.join(missing)}: expected {what}")
    return found


def read_edits(folder):
    """{(user, name of the source picture, caption): the edit as edit.py wrote it}."""
    edits = {}
    for file in sorted(Path(folder).glob("*.json")):
        if "edits" in read_json(file):                        # the grid of several people
            continue
        edit = read_object(file, ["user", "likes", "dislikes", "prompt", "settings"],
                           "what edit.py writes beside a picture")
        with reading(file):
            source = Path(edit["settings"]["image"] or "").name
            pair = (str(edit["user"]), source, str(edit["settings"]["caption"]))
            for what in ("likes", "dislikes"):
                edit[what] = ", ".join(edit[what]) or "nothing in particular"
        if pair in edits:
            raise ValueError(f"{file} and {edits[pair]['file']} are the same user, picture and "
                             "caption: expected one edit of each in a folder")
        picture = read_image(file.with_suffix(".png"))
        edits[pair] = edit
        edit["file"] = file
        edit["size"] = picture.size
        edit["uri"] = data_uri(picture)
    if not edits:
        raise ValueError(f"{folder} holds no edit: expected PNGs with their JSON, as edit.py "
                         "writes them")
    return edits


def data_uri(picture):
    """The pixels alone: what else the file holds (edit.py's text names the method) stays out."""
    stream = io.BytesIO()
    bare = Image.fromarray(np.array(picture))
    bare.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def find_pairs(args):
    """{pair: {"a": edit, "b": edit}} of the edits that both folders have."""
    a = read_edits(args.a)
    b = read_edits(args.b)
    pairs = {}
    for pair in sorted(a.keys() & b.keys()):
        if not args.user or pair[0] in args.user:
            pairs[pair] = {"a": a[pair], "b": b[pair]}
            check_pair(a[pair], b[pair])
    if not pairs:
        raise ValueError(f"{args.a} and {args.b} share no pair of --user: expected edits of the "
                         f"same user, source picture and caption, but have {min(a)} and {min(b)}")
    print(f"{len(a)} edits in {args.a}, {len(b)} in {args.b}, {len(pairs)} pairs")
    return pairs


def check_pair(a, b):
    """ValueError where voters would see more than the methods' difference."""
    for what in ("size", "likes", "dislikes"):
        if a[what] != b[what]:
            raise ValueError(f"{a['file']} and {b['file']} differ in {what}, {a[what]} and "
                             f"{b[what]}: expected the same of both methods")


# ---- from pairs to a sheet and its key -----------------------------------------------------------

def trial(pair, shown, questions, rng):
    """What a voter sees at once: `shown` names the methods from left to right."""
    order = rng.sample(list(questions), len(questions))
    return {"pair": pair, "shown": shown, "questions": order}


def choices(pairs, questions, rng):
    """The pairs that differ, in random order, half of them with a on the left."""
    differing = [pair for pair, edit in pairs.items() if edit["a"]["uri"] != edit["b"]["uri"]]
    sides = rng.sample([["a", "b"], ["b", "a"]], 2) * len(differing)
    sides = sides[:len(differing)]                            # an odd one falls to either side
    rng.shuffle(sides)
    trials = [trial(pair, shown, questions, rng) for pair, shown in zip(differing, sides)]
    rng.shuffle(trials)
    return trials


def ratings(pairs, rng):
    """Each picture alone, in random order."""
    trials = []
    for pair in pairs:
        for method in ("a", "b"):
            trials.append(trial(pair, [method], RATINGS, rng))
    rng.shuffle(trials)
    return trials


def plan(pairs, study, rng):
    """The trials of the study, in order."""
    if study == "judges":
        trials = choices(pairs, JUDGES, rng)
    else:
        trials = ratings(pairs, rng) + choices(pairs, PICK, rng)
    if not trials:
        raise ValueError("nothing to ask: both folders hold the same pictures, pixel for pixel")
    return trials


def page_data(trials, pairs, study):
    """What the page needs and may know. `note` may not: it tells a generic edit from others."""
    numbers = {}                                              # of data URIs, by first use
    shown = []
    for each in trials:
        edits = [pairs[each["pair"]][method] for method in each["shown"]]
        seen = {"questions": each["questions"], "caption": edits[0]["settings"]["caption"]}
        uris = [edit["uri"] for edit in edits]
        if study == "judges":
            seen["likes"] = edits[0]["likes"]
            seen["dislikes"] = edits[0]["dislikes"]
            seen["labels"] = [edit["prompt"] for edit in edits]
        else:
            uris.insert(1, original(edits[0]))
            seen["labels"] = ["left", "original", "right"] if edits[1:] else ["edit", "original"]
        seen["pictures"] = [numbers.setdefault(uri, len(numbers)) for uri in uris]
        shown.append(seen)
    texts = JUDGES if study == "judges" else RATINGS | PICK
    return {"trials": shown, "pictures": list(numbers), "texts": texts, "keys": KEYS}


def original(edit):
    """The source picture as the edit saw it, a data URI."""
    image = edit["settings"]["image"]
    if not image:
        raise ValueError(f"{edit['file']} was drawn without a photograph: expected edits of one "
                         "(edit.py --image), which --study own shows beside them")
    picture = read_image(shipped(image))
    return data_uri(ImageOps.fit(picture, edit["size"], Image.LANCZOS))


def make(args):
    """Writes sheet.html and key.json into the folder --out."""
    for name in ("sheet.html", "key.json"):
        if (args.out / name).exists():
            raise ValueError(f"{args.out / name} exists: expected a new folder for --out")
    pairs = find_pairs(args)
    users = sorted({user for user, *_ in pairs})
    if args.study == "own" and len(users) > 1:
        raise ValueError(f"--study own asks one person about their own pictures: expected --user "
                         f"with one of {', '.join(users)}")
    seed = secrets.randbelow(2 ** 32) if args.seed is None else args.seed
    trials = plan(pairs, args.study, random.Random(seed))
    data = page_data(trials, pairs, args.study)
    data["sheet"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
    script = json.dumps(data).replace("<", "\\u003c")         # a caption may hold "</script>"
    key = {"sheet": data["sheet"], "study": args.study, "seed": seed,
           "a": args.a, "b": args.b, "trials": trials}

    def save(folder):
        page = PAGE.replace("$DATA", script)
        (folder / "sheet.html").write_text(page, encoding="utf-8")
        text = json.dumps(key, indent=1) + "\n"
        (folder / "key.json").write_text(text, encoding="utf-8")

    write_whole(args.out, save, "the sheet")
    asked = sum(len(each["questions"]) for each in trials)
    print(f"wrote {args.out / 'sheet.html'}, {asked} questions, for the voters, and "
          f"{args.out / 'key.json'}, which they must not see")


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Picture study</title>
<style>
body { font: 18px/1.4 sans-serif; max-width: 1100px; margin: 1em auto; padding: 0 1em }
figure { flex: 1; max-width: 420px; margin: 0 }
figure img { width: 100%; max-height: 50vh; object-fit: contain; background: #eee }
p { margin: .5em 0 }
.pictures { display: flex; gap: 1.5em; justify-content: center }
.answers { display: flex; gap: 1em; justify-content: center; align-items: center }
.question { font-weight: bold; font-size: 22px; text-align: center }
.small { color: #555; font-size: 15px }
button { font: inherit; padding: .5em 1.2em }
</style>
<main></main>
<script>
const data = $DATA;

// One step for each question of each trial; state.answers[i] answers steps[i].
const steps = data.trials.flatMap((trial, number) =>
  trial.questions.map(question => ({trial: number, question: question})));
let state = recall() || newcomer();

function newcomer() {
  return {voter: Math.random().toString(36).slice(2), answers: []};
}

function recall() {
  if (history.state) return history.state;                  // after a reload
  try {                                                     // a later visit
    const kept = localStorage.getItem(data.sheet);
    if (kept) return JSON.parse(kept);
    // A Chromium that has only just started may show an empty store until the next load.
    const visit = performance.getEntriesByType("navigation")[0];
    if (visit.type != "reload") location.reload();
  } catch {}                                                // no store, no later visit
}

function change(answers) {
  state.answers = answers;
  history.replaceState(state, "");
  try { localStorage.setItem(data.sheet, JSON.stringify(state)); } catch {}
  show();
}

function add(parent, tag, text, name) {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = name || "";
  parent.append(element);
  return element;
}

// What can be done now: {key: action}. A button does the same by mouse or touch.
let actions = {};

function offer(parent, key, words, action) {
  actions[key] = action;
  add(parent, "button", words).onclick = action;
}

function show() {
  const main = document.querySelector("main");
  const done = state.answers.length;
  main.replaceChildren();
  actions = {};
  if (done < steps.length) ask(main, steps[done]);
  else add(main, "p", "That was all, thank you. Save the file and send it to whoever asked you.");
  const foot = add(main, "p", "", "answers small");
  add(foot, "span", `${done} of ${steps.length} answered`);
  if (done) offer(foot, "Backspace", "back (Backspace)", () => change(state.answers.slice(0, -1)));
  if (done) offer(foot, "s", "save votes (s)", save);
  if (done == steps.length) offer(foot, "n", "next person (n)", next);
}

function ask(main, step) {
  const trial = data.trials[step.trial];
  if (trial.likes) add(main, "p", "This user likes: " + trial.likes);
  if (trial.dislikes) add(main, "p", "This user dislikes: " + trial.dislikes);
  add(main, "p", "The picture: " + trial.caption);
  const pictures = add(main, "div", "", "pictures");
  trial.pictures.forEach((number, i) => {
    const figure = add(pictures, "figure", "");
    add(figure, "img", "").src = data.pictures[number];
    add(figure, "figcaption", trial.labels[i]);
  });
  add(main, "p", data.texts[step.question], "question");
  const answers = add(main, "div", "", "answers");
  for (const [key, answer, words] of data.keys[step.question])
    offer(answers, key, words, () => change([...state.answers, answer]));
}

function save() {
  const votes = state.answers.map((answer, i) => ({...steps[i], answer: answer}));
  const said = {sheet: data.sheet, voter: state.voter, votes: votes};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(said, null, 1)]));
  link.download = `votes_${state.voter}.json`;
  link.click();
}

function next() {
  if (!confirm("Are the votes saved? They are forgotten now.")) return;
  state = newcomer();
  change([]);
}

document.onkeydown = event => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
};
show();
</script>
</html>
"""


# ---- from votes to tables ------------------------------------------------------------------------

def read_keys(files):
    """{sheet: key}; all of the same two methods."""
    keys = {}
    for file in files:
        key = read_object(file, ["sheet", "a", "b", "trials"], "the key.json of a sheet")
        keys[key["sheet"]] = key
        for other in keys.values():
            if (key["a"], key["b"]) != (other["a"], other["b"]):
                raise ValueError(f"{file} is of {key['a']} and {key['b']}: expected {other['a']} "
                                 f"and {other['b']}, as in {files[0]}")
    return keys


def read_votes(files, keys):
    """Every answer as a dict: voter, pair, question, method ("a", "b" or "tie") and answer."""
    votes = {}
    for file in files:
        said = read_object(file, ["sheet", "voter", "votes"], "votes that a sheet saved")
        if said["sheet"] not in keys:
            raise ValueError(f"{file} answers sheet {said['sheet']}: expected the sheets of --key, "
                             f"{', '.join(keys)}")
        with reading(file):
            for vote in said["votes"]:
                name = (said["sheet"], said["voter"], vote["trial"], vote["question"])
                if name in votes:
                    raise ValueError(f"voter {said['voter']} answers trial {vote['trial']} twice: "
                                     "expected one file of each voter")
                votes[name] = meaning(vote, keys[said["sheet"]]["trials"])
                votes[name]["voter"] = said["voter"]
    return list(votes.values())


def meaning(vote, trials):
    """A vote with its sides turned back into methods."""
    number = vote["trial"]
    question = vote["question"]
    answer = vote["answer"]
    asked = number in range(len(trials)) and question in trials[number]["questions"]
    if not asked or answer not in [allowed for _, allowed, _ in KEYS[question]]:
        raise ValueError(f"expected answers to what the sheet asks, not {vote}")
    shown = trials[number]["shown"]
    method = {"left": shown[0], "right": shown[-1], "tie": "tie"}.get(answer, shown[0])
    return {"pair": tuple(trials[number]["pair"]), "question": question, "method": method,
            "answer": answer}


def wilson(wins, n, z=1.96):
    """Wilson's 95 % interval of a rate, wins out of n."""
    rate = wins / n
    middle = (rate + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    spread = rate * (1 - rate) / n + z ** 2 / (4 * n ** 2)
    half = z / (1 + z ** 2 / n) * spread ** 0.5
    return middle - half, middle + half


def student(degrees):
    """The 97.5 % point of Student's t: t = sqrt(degrees) tan(angle), and the density of the angle
    goes as cos(angle)^(degrees - 1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(angle).clip(0) ** (degrees - 1)
    share = np.cumsum(density) / density.sum()
    return degrees ** 0.5 * np.tan(angle[np.searchsorted(share, 0.975)])


def win_rates(votes):
    """Rows of Table 1 (and 11), one a question: votes for a, for b, ties, rates, interval."""
    rows = []
    for question in [*JUDGES, *PICK]:
        methods = [vote["method"] for vote in votes if vote["question"] == question]
        wins = methods.count("a")
        losses = methods.count("b")
        row = [question, wins, losses, methods.count("tie"), "", "", ""]
        if wins + losses:
            low, high = wilson(wins, wins + losses)
            rate = wins / (wins + losses)
            row[4:] = [f"{rate:.3f}", f"{1 - rate:.3f}", f"{low:.3f} to {high:.3f}"]
        if methods:
            rows.append(row)
    return rows


def means(votes, a, b):
    """Rows of Table 10: each question of each method, and of their difference by voter and pair."""
    rows = []
    for question in RATINGS:
        given = {"a": {}, "b": {}}
        for vote in votes:
            if vote["question"] == question:
                given[vote["method"]][vote["voter"], vote["pair"]] = vote["answer"]
        both = given["a"].keys() & given["b"].keys()
        differences = [given["a"][name] - given["b"][name] for name in both]
        named = {a: list(given["a"].values()), b: list(given["b"].values()),
                 "difference": differences}
        for name, numbers in named.items():
            if numbers:
                rows.append([question, name, len(numbers), *mean_and_interval(numbers)])
    return rows


def mean_and_interval(numbers):
    """[mean, 95 % interval] as text; one number has no interval."""
    mean = statistics.mean(numbers)
    if len(numbers) == 1:
        return [f"{mean:.2f}", ""]
    half = student(len(numbers) - 1) * statistics.stdev(numbers) / len(numbers) ** 0.5
    return [f"{mean:.2f}", f"{mean - half:.2f} to {mean + half:.2f}"]


def report(args):
    """Prints what the votes say."""
    keys = read_keys(args.key)
    votes = read_votes(args.votes, keys)
    key = next(iter(keys.values()))
    voters = {vote["voter"] for vote in votes}
    seen = {vote["pair"] for vote in votes}
    print(f"{len(votes)} answers of {len(voters)} voters to {len(seen)} pairs. Ties are left out "
          "of the rates. The 95 % intervals take answers as independent.\n")
    columns = ["question", key["a"], key["b"], "ties", f"win rate of {key['a']}",
               f"of {key['b']}", f"95 % interval of {key['a']}'s"]
    chosen = win_rates(votes)
    if chosen:
        print(table(columns, chosen))
    rated = means(votes, key["a"], key["b"])
    if rated:
        print(table(["question", "method", "ratings", "mean", "95 % interval"], rated))


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    p.add_argument("--a", help="folder of one method's edits")
    p.add_argument("--b", help="folder of the other's")
    p.add_argument("--study", default="judges", choices=["judges", "own"],
                   help="judges: of somebody else's tastes; own: the user's own pictures, rated")
    p.add_argument("--user", nargs="+", help="only these users' pictures")
    p.add_argument("--seed", type=int, help="of order and sides; drawn anew when not given")
    p.add_argument("--out", type=Path, default="out/study", help="folder of sheet.html, key.json")
    p.add_argument("--key", nargs="+", help="of the sheets that were voted on")
    p.add_argument("--votes", nargs="+", help="files that voters saved")
    args = p.parse_args(argv)
    try:
        if args.a and args.b and not args.votes:
            make(args)
        elif args.key and args.votes and not args.a:
            report(args)
        else:
            p.error("expected --a and --b to make a sheet, or --key and --votes to read it back")
    except (ValueError, OSError) as error:
        print("study.py:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
