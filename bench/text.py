"""The language model's rows: decoding, a C-DPO step, reading weights; against transformers, peft and trl."""
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from clock import alone, draw, gb, in_turn, ms, peak, rates, relative, seconds, table, twin, vary

import cdpo
import lora
from graph import PreferenceGraph
from qwen import Config, Qwen, generate

SHAPES = {False: dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
          True: dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)}
COMMON = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768, hidden_act="silu")

def qwen(args, **changes):
    """(config.json as a dict, our model with drawn weights): Qwen2.5-0.5B, with --random 7B."""
    config = {**COMMON, **SHAPES[args.random], **changes}
    with tempfile.TemporaryDirectory() as at, torch.device("meta"):
        (Path(at) / "config.json").write_text(json.dumps(config))
        model = Qwen(Config.read(at))
    return config, draw(model, args)

def transformers_twin(config, ours, args):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config(**config)
    theirs = twin(lambda: Qwen2ForCausalLM(config), ours)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(args.device)      # made on the meta device, it holds no numbers
    return theirs

# ---- decoding ----------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def decode(args):
    """Tokens a second of greedy decoding behind a prompt of 8 tokens: the time of 1 + n tokens less the time of 1."""
    config, ours = qwen(args)
    theirs, rows = transformers_twin(config, ours, args), []
    linears = {name: [m for m in model.modules() if isinstance(m, torch.nn.Linear)] for name, model in (("ours", ours), ("theirs", theirs))}
    bandwidth, weights = rates(args)[1] if args.random else 0, sum(m.weight.nbytes for m in linears["ours"])
    if args.compile:
        ours.model.compile(fullgraph=True)
    for batch in (1, 16):
        ids = torch.randint(config["vocab_size"], (batch, 8), generator=torch.Generator().manual_seed(0)).to(args.device)
        differ, sides = relative(ours(ids), theirs(ids).logits), {}
        for n in (1, 1 + args.new):
            sides["ours", n] = lambda n=n: generate(ours, ids, max_new_tokens=n)
            sides["theirs", n] = lambda n=n: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        x = {m.in_features: torch.ones(batch, 1, m.in_features, device=args.device, dtype=ours.lm_head.weight.dtype) for m in linears["ours"]}
        for name, layers in linears.items():
            sides[name, 0] = lambda layers=layers: [m(x[m.in_features]) for m in layers]
        t = in_turn(sides, args)
        a, b = ((t[side, 1 + args.new] - t[side, 1]) / args.new for side in ("ours", "theirs"))
        share = [f"{t['ours', 0] / a:.0%}", f"{t['theirs', 0] / b:.0%}"]
        ceiling = [f"{weights / bandwidth / a * 2:.0%}"] if bandwidth else []                 # a copy reads and writes, weights are only read
        rows.append([batch, f"{batch / a:.1f}", f"{batch / b:.1f}", f"**{b / a:.2f}**", *share, f"{differ:.0e}", *ceiling])
    return f"Qwen2.5-{'7B' if args.random else '0.5B'}, new tokens a second\n\n" + table(
        ["batch", "ours", "transformers", "ratio", "our linear layers alone, of our step", "theirs of theirs", "logits differ by"] + ["of the bandwidth ceiling"] * bool(bandwidth), rows)

# ---- a C-DPO step ------------------------------------------------------------------------------------------------------------
def community(args):
    """UserTokens over a random graph: each user names a third of the attributes."""
    g = torch.Generator().manual_seed(0)
    sign = torch.randint(-1, 2, (args.users, args.attributes), generator=g) * (torch.rand(args.users, args.attributes, generator=g) < 0.5)
    edges = torch.stack([*sign.nonzero().T, sign[sign != 0]])
    graph = PreferenceGraph([str(i) for i in range(args.users)], [str(i) for i in range(args.attributes)], edges, torch.randn(args.attributes, 64, generator=g))
    torch.manual_seed(0)
    return cdpo.UserTokens(graph, soft=dict(hidden_dim=128, out_dim=SHAPES[args.random]["hidden_size"])).to(args.device)

class Step:
    """One optimiser step on a batch of random pairs, each owner's own and k neighbours', done our way or the peers'. k = 0 stands for DPO without users."""

    def __init__(self, args, model=None):
        self.args, self.g = args, torch.Generator().manual_seed(1)
        self.config, self.model = model or qwen(args, num_hidden_layers=args.layers)
        if not model:
            torch.manual_seed(0)
            lora.inject(self.model, dropout=0.0)
            for layer in lora.layers(self.model).values():
                torch.nn.init.normal_(layer.lora_B["reference"], std=1e-3)
            lora.copy_adapter(self.model, "reference", "policy")
        self.model.model.checkpointing = True                                                    # both sides recompute their layers
        self.users = community(args) if args.k else None
        self.rows = [[self.pair() for _ in range(1 + args.k)] for _ in range(args.batch)]       # own, neighbours
        self.who = torch.randint(args.users, (args.batch,), generator=self.g)
        self.similarity = torch.rand(args.batch, args.k, generator=self.g).to(args.device)

    def pair(self):
        a = self.args
        prompt, *answers = (torch.randint(self.config["vocab_size"], (n,), generator=self.g).tolist() for n in (a.prompt, a.answer, a.answer))
        return prompt, answers

    def parts(self):
        """Micro-batches of owners: (pairs, each owner's soft tokens' user, similarities)."""
        for at in range(0, self.args.batch, self.args.micro):
            rows = self.rows[at:at + self.args.micro]
            yield [pair for row in rows for pair in row], self.who[at:at + len(rows)].repeat_interleave(1 + self.args.k).to(self.args.device), self.similarity[at:at + len(rows)]

    def sequences(self, pairs):
        return torch.tensor([prompt + answers[side] for side in (0, 1) for prompt, answers in pairs], device=self.args.device)   # (2N, T), first all chosen

    def soft(self, who):
        return self.users and self.users.soft(self.users.embeddings()[who])                     # (N, 8, D)

    def loss(self, chosen, rejected, reference, similarity):
        losses = cdpo.dpo_loss(chosen, rejected, *reference)[0].view(-1, 1 + self.args.k)
        return cdpo.cdpo_loss(losses[:, 0], losses[:, 1:], similarity).sum() / self.args.batch

    @torch.no_grad()
    def refer(self):
        """The reference's log-probabilities of every pair: once in a run, not in a step."""
        lora.use(self.model, "reference")
        self.cache = {i: cdpo.answer_logprobs(self.model, pairs).T for i, (pairs, *_) in enumerate(self.parts())}
        lora.use(self.model, "policy")

    def ours(self):
        for i, (pairs, who, similarity) in enumerate(self.parts()):
            yield self.loss(*cdpo.answer_logprobs(self.model, pairs, self.soft(who)).T, self.cache[i], similarity)

    def make_peft(self):
        """The same base weights under transformers and peft, the same adapters."""
        import peft
        base = transformers_twin(self.config, self.model, self.args)
        self.peft = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")).train()      # checkpointing works in training only
        self.peft.gradient_checkpointing_enable({"use_reentrant": False})
        self.peft.enable_input_require_grads()
        self.copy("default", "policy")
        return self.peft

    def copy(self, theirs, ours):
        for name, layer in lora.layers(self.model).items():
            peer = self.peft.get_submodule(f"base_model.model.{name}")
            peer.lora_A[theirs].weight.data.copy_(layer.lora_A[ours])
            peer.lora_B[theirs].weight.data.copy_(layer.lora_B[ours])

    def theirs(self):
        """As it is usually built: chosen and rejected one after the other, a head for every token, the reference run in each step."""
        if "ref" not in self.peft.peft_config:
            self.peft.add_adapter("ref", self.peft.peft_config["default"])
            self.copy("ref", "reference")
        for pairs, who, similarity in self.parts():
            ids, soft = self.sequences(pairs), self.soft(who)
            with torch.no_grad():
                self.peft.set_adapter("ref")
                reference = self.logprobs(ids, None).chunk(2)
            self.peft.set_adapter("default")
            yield self.loss(*self.logprobs(ids, None if soft is None else torch.cat([soft, soft])).chunk(2), reference, similarity)

    def logprobs(self, ids, soft):
        embeds = self.peft.get_input_embeddings()(ids)
        embeds = embeds if soft is None else torch.cat([soft.to(embeds), embeds], 1)
        logits = self.peft(inputs_embeds=embeds).logits[:, -ids.shape[1]:-1].float()            # (2N, T-1, V)
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[:, -self.args.answer:, 0].sum(1)

    def make_trl(self):
        """trl's DPOTrainer over the peft model, asked for nothing but its loss."""
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer
        tokenizer = PreTrainedTokenizerFast(tokenizer_file="mini/qwen/tokenizer.json", eos_token="<|im_end|>", pad_token="<|endoftext|>")
        cpu = not self.args.device.startswith("cuda")
        config = DPOConfig(tempfile.mkdtemp(), report_to=[], use_cpu=cpu, bf16=False, gradient_checkpointing=True, disable_tqdm=True)
        self.trainer = DPOTrainer(self.make_peft(), args=config, train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), processing_class=tokenizer)

    def trl(self):
        for pairs, *_ in self.parts():
            ids = self.sequences(pairs)
            answer = (torch.arange(ids.shape[1], device=ids.device) >= self.args.prompt).long().expand_as(ids)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answer}
            yield self.trainer.compute_loss(self.trainer.model, inputs) * len(pairs) / self.args.batch

    def make(self, side):
        """A function that takes one step the way of this side -> (loss, gradient norm)."""
        self.refer() if side == "ours" else self.make_trl() if side == "trl" else self.make_peft()
        trained = [p for m in (self.model if side == "ours" else self.peft, self.users) if m for p in m.parameters() if p.requires_grad]
        losses, optimizer = getattr(self, side), torch.optim.AdamW(trained, lr=0.0)

        def step():
            optimizer.zero_grad()
            total = 0.0
            for loss in losses():
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            optimizer.step()
            return total, norm
        return step

def side(args, which):
    """One side in a process of its own: its largest memory during a step."""
    step = Step(args).make(which)
    before, most = peak(step, args.device)
    return {"before": before, "peak": most}

def compare(args, peer):
    most = {name: alone(args, name)["peak"] for name in ("ours", peer)}
    step, found = Step(args), {}
    sides = {name: lambda name=name, f=step.make(name): found.update({name: f()}) for name in most}                # loss, gradient norm
    t, n, once = in_turn(sides, args, warm=0), args.batch * (1 + args.k), seconds(step.refer, args.device)
    rows = [[label, ms(t[name]), f"{n / t[name]:.2f}", f"**{t[peer] / t[name]:.2f}**", gb(most[name]), f"**{most[name] / most[peer]:.2f}**", "{:.5f}, {:.5f}".format(*found[name])]
            for name, label in (("ours", "ours"), (peer, {"theirs": "transformers + peft", "trl": "trl DPOTrainer"}[peer]))]
    return (f"Qwen2.5-{'7B' if args.random else '0.5B'} with {args.layers} layers, {args.batch} users, k {args.k}, prompt {args.prompt}, answer {args.answer}, both sides with gradient checkpointing; "
            f"our reference pass, once for each pair in a run: {ms(once)}\n\n" + table(["", "a step", "pairs/s", "times the peer's speed", "peak memory", "of the peer's", "loss, gradient norm"], rows))

def cdpo_step(args):
    """A step of collaborative DPO."""
    return compare(args, "theirs")

def trl_step(args):
    """A step of plain DPO."""
    return compare(vary(args, k=0), "trl")

def stages(args):
    """Where a C-DPO step's time goes."""
    step = Step(args)
    run, spent, pack = step.make("ours"), {}, cdpo.pack

    def timed(name, f):
        def g(*a, **k):
            out = []
            spent[name] = spent.get(name, 0) + seconds(lambda: out.append(f(*a, **k)), args.device)
            return out[0]
        return g
    run()
    cdpo.pack, step.soft, decoder, head = timed("batch to tensors (data)", pack), timed("graph and soft tokens", step.soft), step.model.model.forward, cdpo.token_logprobs
    step.model.model.forward, cdpo.token_logprobs, torch.Tensor.backward = timed("forward, layers", decoder), timed("head, its gradient too", head), timed("backward", torch.Tensor.backward)
    torch.optim.AdamW.step = timed("optimiser", torch.optim.AdamW.step)
    whole = seconds(run, args.device)
    spent["rest"] = whole - sum(spent.values())
    return f"{args.layers} layers, {args.batch} users, k {args.k}: a step takes {ms(whole)}\n\n" + table(["stage", "time", "share"], [[n, ms(s), f"{s / whole:.1%}"] for n, s in spent.items()])

def growth(args):
    """A C-DPO step against what may grow, all else as in the first row of each."""
    base = vary(args, layers=args.layers if args.random else 2, batch=args.batch if args.random else 2, rounds=max(1, args.rounds - 1))
    model, rows = None, []
    for name, values in (("users", (100, 1000, 10_000)), ("attributes", (45, 450, 1000)), ("k", (0, 1, 3, 6)), ("prompt", (50, 100, 200, 400))):
        for value in values:
            step = Step(vary(base, **{name: value}), model)
            model = step.config, step.model
            t = in_turn({0: step.make("ours")}, base)[0]
            rows.append([name, f"{value:,}", ms(t)])
    return f"{base.layers} layers, {base.batch} users a step; of {args.users:,} users, {args.attributes} attributes, k {args.k}, prompt {args.prompt}\n\n" + table(["grows", "to", "a step"], rows)

# ---- reading weights ---------------------------------------------------------------------------------------------------------
def read_side(args, which):
    """From the folder to the first logits, in a process of its own; libraries are imported before the clock starts."""
    ids, out = torch.ones(1, 8, dtype=torch.long, device=args.device), []
    if which == "ours":
        read = lambda: Qwen.load(args.folder, args.device, getattr(torch, args.dtype))
    else:
        from transformers import Qwen2ForCausalLM
        read = lambda: Qwen2ForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)).to(args.device)
    return first_forward(read, lambda model: model(ids), args)

def first_forward(read, forward, args):
    with torch.no_grad():
        start, (before, most) = time.perf_counter(), peak(lambda: forward(read()), "cpu")
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
    return {"time": time.perf_counter() - start, "host": most - before}

def reading(args, write=None, peer="transformers"):
    """Reading weights: time to the first forward, and main memory on top of the process, of fresh processes in turn; the file is in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        if write:
            module = write(folder)
        else:
            config, module = qwen(vary(args, random=False, device="cpu"))
            (Path(folder) / "config.json").write_text(json.dumps({**config, "torch_dtype": args.dtype}))
            save_file({n: t for n, t in module.state_dict().items() if n != "lm_head.weight"}, Path(folder) / "model.safetensors", {"format": "pt"})
        size = sum(p.nbytes for p in module.parameters())
        del module
        found = {name: [] for name in ("ours", peer)}
        for _ in range(args.rounds):
            for name in found:
                found[name].append(alone(args, name, folder=folder))
    best = {name: {key: sorted(f[key] for f in runs)[len(runs) // 2] for key in ("time", "host")} for name, runs in found.items()}
    rows = [[name, ms(b["time"]), f"**{best[peer]['time'] / b['time']:.2f}**", gb(b["host"]), f"**{b['host'] / size:.2f}**"] for name, b in best.items()]
    return f"{gb(size)} of weights\n\n" + table(["", "folder to first forward", "times the peer's speed", "peak main memory", "of the weights"], rows)
