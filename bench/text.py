"""The language model's rows: decoding, a C-DPO step, reading weights; against transformers, peft
and trl. A row is a function of run.py's flags that returns Markdown.

Shapes: B batch, T tokens, D width, V vocabulary, k neighbours; N = B (1 + k) pairs in a step.
"""
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from clock import (ROOT, alone, draw, gb, in_turn, ms, peak, rates, ratio, relative, seconds, sized,
                   summarise, table, twin, vary, weights_type)

import cdpo
import lora
from graph import PreferenceGraph
from qwen import Config, Qwen, generate

COMMON = dict(                          # of Qwen2.5's config.json
    model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768)
SMALL = dict(                           # Qwen2.5-0.5B
    COMMON, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
REAL = dict(                            # Qwen2.5-7B
    COMMON, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
TINY = dict(                            # to see that it runs
    COMMON, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True)


def called(args):
    return sized(args, "Qwen2.5-0.5B", "Qwen2.5-7B", "a tiny Qwen")


def qwen(args, **changes):
    """(config.json as a dict, our model with drawn weights): Qwen2.5-0.5B, with --random 7B."""
    config = {**sized(args, SMALL, REAL, TINY), **changes}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            model = Qwen(Config.read(folder))
    return config, draw(model, args)


def transformers_twin(config, ours, args):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config(**config)
    theirs = twin(lambda: Qwen2ForCausalLM(config), ours)
    rotary = type(theirs.model.rotary_emb)          # made on the meta device, it holds no numbers
    theirs.model.rotary_emb = rotary(config).to(args.device)
    return theirs


# ---- decoding ----------------------------------------------------------------------------------

def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def linears_alone(model, batch):
    """A call that runs a model's linear layers, and nothing else, on one token a row."""
    layers = linears(model)
    inputs = {}
    for layer in layers:
        width = layer.in_features
        inputs[width] = torch.ones(batch, 1, width).to(layer.weight)

    def run():
        for layer in layers:
            layer(inputs[layer.in_features])
    return run


WARM = 3                                # tokens before the clock: on a GPU ours makes its graph


def decode_calls(ours, theirs, ids, args):
    """{(side, n): a call that decodes n tokens behind ids}; n 0: its linear layers alone."""
    calls = {}
    for n in (WARM, WARM + args.new):
        calls["ours", n] = partial(generate, ours, ids, max_new_tokens=n)
        calls["theirs", n] = partial(
            theirs.generate, ids, attention_mask=torch.ones_like(ids),
            max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    calls["ours", 0] = linears_alone(ours, len(ids))
    calls["theirs", 0] = linears_alone(theirs, len(ids))
    return calls


@torch.no_grad()
def decode(args):
    """Tokens a second of greedy decoding behind 8 tokens: the time of 3 + n less the time of 3."""
    columns = ["batch", "ours", "transformers", "ratio", "our linear layers alone, of our step",
               "theirs of theirs", "logits differ by"]
    config, ours = qwen(args)
    theirs = transformers_twin(config, ours, args)
    if args.random:
        columns.append("of the bandwidth ceiling")
        weights = sum(layer.weight.nbytes for layer in linears(ours))
        _, bandwidth = rates(args)
        least = weights / bandwidth                         # seconds a step
    if args.compile:
        ours.model.compile(fullgraph=True)
    rows = []
    for batch in (1, 16):
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(config["vocab_size"], (batch, 8), generator=g)
        ids = ids.to(args.device)
        differ = relative(ours(ids), theirs(ids).logits)
        t = in_turn(decode_calls(ours, theirs, ids, args), args)
        n = args.new
        our_step = (t["ours", WARM + n] - t["ours", WARM]) / n
        their_step = (t["theirs", WARM + n] - t["theirs", WARM]) / n
        row = [batch, f"{batch / our_step:.1f}", f"{batch / their_step:.1f}"]
        row.append(ratio(their_step, our_step))
        row.append(f"{t['ours', 0] / our_step:.0%}")
        row.append(f"{t['theirs', 0] / their_step:.0%}")
        row.append(f"{differ:.0e}")
        what = f"{called(args)}, a token of {batch} at once"
        if args.random:
            share = f"{least / our_step:.0%}"
            row.append(share)
            what += f", {share} of the bandwidth ceiling"
        rows.append(row)
        summarise(args, what, "transformers", our_step, their_step)
    return f"{called(args)}, new tokens a second\n\n" + table(columns, rows)


# ---- a C-DPO step ------------------------------------------------------------------------------

def community(args):
    """UserTokens over a random graph: each user names a third of the attributes."""
    g = torch.Generator().manual_seed(0)
    size = args.users, args.attributes
    sign = torch.randint(-1, 2, size, generator=g)                  # (U, A)
    sign = sign * (torch.rand(size, generator=g) < 0.5)
    ends = sign.nonzero().T                                         # (2, E)
    edges = torch.stack([*ends, sign[sign != 0]])                   # (3, E)
    users = [str(i) for i in range(args.users)]
    attributes = [str(i) for i in range(args.attributes)]
    features = torch.randn(args.attributes, 64, generator=g)
    graph = PreferenceGraph(users, attributes, edges, features)
    torch.manual_seed(0)
    config = sized(args, SMALL, REAL, TINY)
    soft = dict(hidden_dim=128, out_dim=config["hidden_size"])
    return cdpo.UserTokens(graph, soft=soft).to(args.device)


def adapted(args):
    """(config, our model) with a policy that equals its reference, and a reference that is not
    the base model."""
    config, model = qwen(args, num_hidden_layers=args.layers)
    torch.manual_seed(0)
    lora.inject(model, dropout=0.0)
    for layer in lora.layers(model).values():
        nn.init.normal_(layer.lora_B["reference"], std=1e-3)
    lora.copy_adapter(model, "reference", "policy")
    model.model.checkpointing = True                        # both sides recompute their layers
    return config, model


class Step:
    """What one optimiser step is about, for all sides: random pairs, each owner's own and his k
    neighbours', and the users' part of the model. k = 0 stands for DPO without users."""

    def __init__(self, args, model=None):
        self.args = args
        self.generator = torch.Generator().manual_seed(1)
        self.config, self.model = model or adapted(args)
        self.users = community(args) if args.k else None
        self.group = 1 + args.k                             # an owner's own pair, then the others
        self.pairs = [self.draw_pair() for _ in range(args.batch * self.group)]
        self.owners = torch.randint(args.users, size=(args.batch,), generator=self.generator)
        similarity = torch.rand(args.batch, args.k, generator=self.generator)
        self.similarity = similarity.to(args.device)

    def draw_pair(self):
        """(prompt, [chosen, rejected]), lists of token ids."""
        args = self.args
        vocabulary = self.config["vocab_size"]
        texts = []
        for length in (args.prompt, args.answer, args.answer):
            ids = torch.randint(vocabulary, (length,), generator=self.generator)
            texts.append(ids.tolist())
        return texts[0], texts[1:]

    def parts(self):
        """Micro-batches of owners: (their pairs, of which user each pair is, similarities)."""
        args, group = self.args, self.group
        for start in range(0, args.batch, args.micro):
            end = start + args.micro
            pairs = self.pairs[start * group:end * group]
            who = self.owners[start:end].repeat_interleave(group)
            yield pairs, who.to(args.device), self.similarity[start:end]

    def soft(self, who):
        """The soft tokens (N, 8, D) of these users; None in DPO without users."""
        if self.users is None:
            return None
        return self.users.soft(self.users.embeddings()[who])

    def loss(self, policy, reference, similarity):
        """(chosen, rejected) log-probabilities, each (N,) -> this part of the batch's mean."""
        losses, _, _ = cdpo.dpo_loss(*policy, *reference)
        losses = losses.view(-1, self.group)                # (B, 1 + k)
        each = cdpo.cdpo_loss(losses[:, 0], losses[:, 1:], similarity)
        return each.sum() / self.args.batch


class Ours:
    """As cdpo.py does it: all answers of a prompt in one sequence, logits at labels alone."""

    def __init__(self, step):
        self.step = step
        self.model = step.model

    def losses(self):
        """The loss of every part of the batch; backward comes before the next is asked for."""
        step = self.step
        for part, (pairs, who, similarity) in enumerate(step.parts()):
            reference = self.reference(part, pairs)                             # (2, N)
            policy = cdpo.answer_logprobs(self.model, pairs, step.soft(who)).T
            yield step.loss(policy, reference, similarity)

    @torch.no_grad()
    def reference(self, part, pairs):
        lora.use(self.model, "reference")
        found = cdpo.answer_logprobs(self.model, pairs).T
        lora.use(self.model, "policy")
        return found


class Given(Ours):
    """The same where the reference's log-probabilities are known already."""

    def __init__(self, step):
        super().__init__(step)
        parts = enumerate(step.parts())
        self.known = [super(Given, self).reference(i, pairs) for i, (pairs, *_) in parts]

    def reference(self, part, pairs):
        return self.known[part]


class Peft:
    """As it is usually built: chosen and rejected one after the other, a head for every token.
    The same base weights under transformers and peft, with the same adapters."""

    def __init__(self, step):
        import peft
        self.step = step
        base = transformers_twin(step.config, step.model, step.args)
        adapter = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        self.model = peft.get_peft_model(base, adapter).train()     # checkpoints only in training
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.enable_input_require_grads()
        self.copy_adapter("policy", "default")
        self.add_reference(adapter)

    def add_reference(self, adapter):
        self.model.add_adapter("ref", adapter)
        self.copy_adapter("reference", "ref")

    def copy_adapter(self, ours, theirs):
        for name, layer in lora.layers(self.step.model).items():
            peer = self.model.get_submodule(f"base_model.model.{name}")
            peer.lora_A[theirs].weight.data.copy_(layer.lora_A[ours])
            peer.lora_B[theirs].weight.data.copy_(layer.lora_B[ours])

    def sequences(self, pairs):
        """N pairs -> token ids (2N, T), first all chosen."""
        rows = []
        for side in (0, 1):
            rows += [prompt + answers[side] for prompt, answers in pairs]
        return torch.tensor(rows, device=self.step.args.device)

    def losses(self):
        for pairs, who, similarity in self.step.parts():
            ids = self.sequences(pairs)
            with torch.no_grad():
                self.model.set_adapter("ref")
                reference = self.logprobs(ids).chunk(2)
            self.model.set_adapter("default")
            soft = self.step.soft(who)
            if soft is not None:
                soft = torch.cat([soft, soft])              # chosen, rejected
            policy = self.logprobs(ids, soft).chunk(2)
            yield self.step.loss(policy, reference, similarity)

    def logprobs(self, ids, soft=None):
        """ids (2N, T) behind soft tokens (2N, 8, D) -> log-probabilities of the answers (2N,)."""
        embeds = self.model.get_input_embeddings()(ids)
        if soft is not None:
            embeds = torch.cat([soft.to(embeds), embeds], 1)
        logits = self.model(inputs_embeds=embeds).logits                        # (2N, 8+T, V)
        logits = logits[:, -ids.shape[1]:-1].float()                            # (2N, T-1, V)
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])              # (2N, T-1, 1)
        return logp[:, -self.step.args.answer:, 0].sum(1)


class TRL(Peft):
    """trl's DPOTrainer over the peft model, asked for nothing but its loss. k is 0."""

    def add_reference(self, adapter):
        """The trainer makes its own, a copy of the policy."""
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(ROOT / "mini/qwen/tokenizer.json"),
            eos_token="<|im_end|>", pad_token="<|endoftext|>")
        cuda = self.step.args.device.startswith("cuda")
        config = DPOConfig(
            tempfile.mkdtemp(), report_to=[], use_cpu=not cuda, bf16=False,
            gradient_checkpointing=True, disable_tqdm=True)
        pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
        self.trainer = DPOTrainer(
            self.model, args=config, train_dataset=Dataset.from_list([pair]),
            processing_class=tokenizer)

    def losses(self):
        args = self.step.args
        for pairs, _, _ in self.step.parts():
            ids = self.sequences(pairs)
            answer = torch.arange(ids.shape[1], device=ids.device) >= args.prompt
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch["completion_mask"] = answer.long().expand_as(ids)
            loss = self.trainer.compute_loss(self.trainer.model, batch)
            yield loss * len(pairs) / args.batch


GIVEN = "ours, the reference given"
WAYS = {"ours": Ours, GIVEN: Given, "transformers + peft": Peft, "trl DPOTrainer": TRL}


def make(step, way):
    """A function that takes one optimiser step in this way -> (loss, gradient norm)."""
    side = WAYS[way](step)
    parameters = list(side.model.parameters())
    if step.users is not None:
        parameters += step.users.parameters()
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)          # so that both sides stay comparable

    def run():
        optimizer.zero_grad()
        total = 0.0
        for loss in side.losses():
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        return total, norm
    return run


def side(args, way):
    """One way in a process of its own: its largest memory during a step."""
    before, most = peak(make(Step(args), way), args.device)
    return {"before": before, "peak": most}


def compare(args, peer):
    memory = {way: alone(args, way)["peak"] for way in ("ours", peer)}
    step = Step(args)
    runs = {way: make(step, way) for way in ("ours", GIVEN, peer)}
    found = {}                                              # way: (loss, gradient norm)

    def run(way):
        found[way] = runs[way]()
    took = in_turn({way: partial(run, way) for way in runs}, args, warm=0)
    rows = []
    for way, t in took.items():
        loss, norm = found[way]
        row = [way, ms(t), f"{len(step.pairs) / t:.2f}", ratio(took[peer], t)]
        row += [gb(memory[way]), ratio(memory[way], memory[peer])] if way in memory else ["", ""]
        rows.append([*row, f"{loss:.5f}, {norm:.5f}"])
    columns = ["", "a step", "pairs/s", "times the peer's speed", "peak memory", "of the peer's",
               "loss, gradient norm"]
    size = f"{called(args)} with {args.layers} layers, {args.batch} users, k {args.k}, "
    size += f"prompt {args.prompt}, answer {args.answer}"
    share = f"{gb(memory['ours'])}, {ratio(memory['ours'], memory[peer])} of theirs"
    summarise(args, f"a step: {size}", peer, took["ours"], took[peer], memory=share)
    both = "both sides with gradient checkpointing and, but for the second row, the reference's "
    both += "pass in each step"
    return f"{size}; {both}\n\n" + table(columns, rows)


def cdpo_step(args):
    """A step of collaborative DPO."""
    return compare(args, "transformers + peft")


def trl_step(args):
    """A step of plain DPO."""
    return compare(vary(args, k=0), "trl DPOTrainer")


class Stopwatch:
    """Adds up what parts of a step take; whatever runs without gradients is the reference's."""

    def __init__(self, device):
        self.device = device
        self.spent = {}

    def around(self, name, call):
        """`call`, timed under `name`."""
        def timed(*args, **kwargs):
            out = []
            took = seconds(lambda: out.append(call(*args, **kwargs)), self.device)
            part = name if torch.is_grad_enabled() else "the reference's pass"
            self.spent[part] = self.spent.get(part, 0) + took
            return out[0]
        return timed


def shares(args):
    """Where a C-DPO step's time goes."""
    step = Step(args)
    run = make(step, "ours")
    run()
    watch = Stopwatch(args.device)
    decoder = step.model.model
    step.soft = watch.around("graph and soft tokens", step.soft)
    cdpo.pack = watch.around("batch to tensors (data)", cdpo.pack)
    decoder.forward = watch.around("forward, layers", decoder.forward)
    cdpo.token_logprobs = watch.around("head, its gradient too", cdpo.token_logprobs)
    torch.Tensor.backward = watch.around("backward", torch.Tensor.backward)
    torch.optim.AdamW.step = watch.around("optimiser", torch.optim.AdamW.step)
    whole = seconds(run, args.device)
    spent = {**watch.spent, "rest": whole - sum(watch.spent.values())}
    rows = [[name, ms(s), f"{s / whole:.1%}"] for name, s in spent.items()]
    size = f"{args.layers} layers, {args.batch} users, k {args.k}"
    return f"{size}: a step takes {ms(whole)}\n\n" + table(["part", "time", "share"], rows)


GROWS = {
    "users": (100, 1000, 10_000),
    "attributes": (45, 450, 1000),
    "k": (0, 1, 3, 6),
    "prompt": (50, 100, 200, 400),
}


def growth(args):
    """A C-DPO step against what may grow, all else as in the first row of each."""
    args = vary(args, rounds=max(1, args.rounds - 1))
    if not args.random:
        args = vary(args, layers=2, batch=2)
    model = adapted(args)
    rows = []
    for name, values in GROWS.items():
        for value in values:
            step = Step(vary(args, **{name: value}), model)
            t = in_turn({"ours": make(step, "ours")}, args)
            rows.append([name, f"{value:,}", ms(t["ours"])])
    step = f"{args.layers} layers, {args.batch} users a step"
    usual = f"{args.users:,} users, {args.attributes} attributes, k {args.k}, prompt {args.prompt}"
    return f"{step}; of {usual}\n\n" + table(["grows", "to", "a step"], rows)


# ---- reading weights ---------------------------------------------------------------------------

def first_forward(read, forward, args):
    """Seconds of forward(read()), and bytes of main memory on top while it runs."""
    start = time.perf_counter()
    with torch.no_grad():
        before, most = peak(lambda: forward(read()), "cpu")
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return {"time": time.perf_counter() - start, "host": most - before}


def read_side(args, side):
    """From the folder to the first logits, in a process of its own; libraries are imported
    before the clock starts."""
    ids = torch.ones(1, 8, dtype=torch.long, device=args.device)
    dtype = weights_type(args)

    def read_ours():
        return Qwen.load(args.folder, args.device, dtype)

    if side == "ours":
        return first_forward(read_ours, lambda model: model(ids), args)
    from transformers import Qwen2ForCausalLM

    def read_theirs():
        return Qwen2ForCausalLM.from_pretrained(args.folder, dtype=dtype).to(args.device)
    return first_forward(read_theirs, lambda model: model(ids), args)


def write_qwen(folder, args):
    """A Qwen2.5-0.5B as it is published -> bytes of weights."""
    config, module = qwen(vary(args, random=False, device="cpu"))
    config["torch_dtype"] = args.dtype
    (folder / "config.json").write_text(json.dumps(config))
    tensors = module.state_dict()
    del tensors["lm_head.weight"]                           # tied
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(p.nbytes for p in module.parameters())


def reading(args, write=write_qwen, peer="transformers"):
    """Reading weights: time to the first forward, and main memory on top of the process, of fresh
    processes in turn; the file is in the page cache. write(folder, args) makes the checkpoint."""
    found = {"ours": [], peer: []}
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), args)
        for _ in range(args.rounds):
            for side, runs in found.items():
                runs.append(alone(args, side, folder=folder))
    took = {}
    rows = []
    for side, runs in found.items():
        took[side] = statistics.median_high(run["time"] for run in runs)
    for side, runs in found.items():
        host = statistics.median_high(run["host"] for run in runs)
        speed = ratio(took[peer], took[side])
        rows.append([side, ms(took[side]), speed, gb(host), ratio(host, size)])
    columns = ["", "folder to first forward", "times the peer's speed", "peak main memory",
               "of the weights"]
    return f"{gb(size)} of weights\n\n" + table(columns, rows)
