"""Every test, in one file.   python test_all.py          all of them: no network, no GPU, no peer needed
                           python test_all.py canny    those whose name contains "canny"

Each test is a sentence that could be false. Those against a peer (transformers, diffusers, peft, torch-geometric, opencv; `pip install -r bench/requirements.txt`)
are skipped where it is missing. pytest runs this file too; `tmp_path` is an empty folder, here as there.
"""
import ast, contextlib, functools, gc, importlib, io, json, math, os, re, shlex, signal, subprocess, sys, tempfile, time, traceback, unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "mini")]
import cdpo, controlnet, edit, flux, graph, lora, patch_dpo, qwen, train
import concepts, render, world
from controlnet import ControlNet, canny
from flux import T5, VAE, CLIPText, Flux, denoise, image_ids, pack, sigmas
from graph import PreferenceGraph, User
from patch_dpo import ImageFeatures, ImagePrompt
from qwen import Cache, Config, Qwen, Tokenizer, generate, load_checkpoint, resolve

MINI = ROOT / "mini"
SAMPLE = {name: f"mini/sample/{name}.jsonl" for name in ("users", "pairs", "edits")}
ENCODER = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, hidden_act="gelu", mlp_ratio=4,
               layer_norm_eps=1e-6, qkv_bias=True)
torch.set_num_threads(1)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

def peer(name):
    """The peer library, or the test is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} is not installed")

def relative(a, b):
    """||a - b|| / ||b|| in float64; of two lists of tensors the largest."""
    if isinstance(b, (list, tuple)):
        return max(map(relative, a, b), default=0) if len(a) == len(b) else math.inf
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()

def same(a, b):
    """Whether two tensors, or two collections of them, are equal bit for bit."""
    return torch.equal(a, b) if torch.is_tensor(a) else len(a) == len(b) and all(map(torch.equal, a, b))

def raises(kind, part, function, *args, **kwargs):
    """The message of the error of this kind that `function` must raise, and that must contain `part`."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert part in str(error), f"the message {str(error)!r} does not name {part!r}"
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def loud(module, size=1.5):
    """The module, frozen, with random weights large enough that a wrong term shows; norms and biases are random too."""
    g = seeded()
    for p in module.eval().requires_grad_(False).parameters():
        p.copy_(size * torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5 if p.dim() > 1 else (p == 1) + 0.2 * torch.randn(p.shape, generator=g))
    return module

def reload(theirs, kind, **how):
    """What our `kind` reads from the files that the peer's model writes."""
    with tempfile.TemporaryDirectory() as at:
        theirs.save_pretrained(at)
        return kind.load(at, **how)

def shell(*args, timeout=170, **how):
    """Run one of our scripts as a user would: shell("train.py", "graph", "--steps", 3)."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=ONE_THREAD, **how)

@contextlib.contextmanager
def quiet():
    """In the repository's root, without a word."""
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield

def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]

def tiny_qwen(**changes):
    """A random Qwen without peer or file: 4 heads over 2, or what `changes` says."""
    return loud(Qwen(Config(**{**dict(vocab=61, width=32, inner=48, layers=2, heads=4, kv_heads=2, head_dim=8, eps=1e-6, theta=1e4, qkv_bias=True,
                                      tied=True, headless=False, window=None, eos=(5,)), **changes})))

def peer_qwen(kind="Qwen2ForCausalLM", **changes):
    tf = peer("transformers")
    tf.utils.logging.disable_progress_bar()
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, eos_token_id=None)
    return loud(getattr(tf, kind)(getattr(tf, kind).config_class(**{**sizes, **changes})))

def padded_batch():
    """ids (3, 17), and masks of 17, 11 and 6 tokens with padding on the right and on the left."""
    right = (torch.arange(17) < torch.tensor([17, 11, 6])[:, None]).long()
    return torch.randint(8, 61, (3, 17), generator=seeded(1)), right, right.flip(1)

def test_qwen_equals_transformers(tmp_path):
    """For every shape and padding side logits agree to 1e-5, greedy tokens are the same, also under a repetition penalty, and bf16 is at most 1.2 times as far from fp32."""
    ids, right, left = padded_batch()
    for i, shape in enumerate((dict(), dict(tie_word_embeddings=True), dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=36),
                               dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40), dict(kind="MistralForCausalLM"),
                               dict(kind="MistralForCausalLM", head_dim=10, tie_word_embeddings=True))):
        theirs, at = peer_qwen(**shape), tmp_path / str(i)
        theirs.save_pretrained(at, max_shard_size="30KB")
        ours = Qwen.load(at)
        assert len(list(at.glob("*.safetensors"))) > 1
        for mask in (torch.ones_like(ids), right, left):
            assert relative(ours(ids, mask)[mask > 0], theirs(ids, attention_mask=mask).logits[mask > 0]) < 1e-5, shape
        for penalty in (1.0, 1.3):
            prompt = ids.masked_fill(left == 0, 0)                # the peer penalises padding too: let it be a token that nobody generates
            tokens = theirs.generate(prompt, attention_mask=left, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)[:, 17:].tolist()
            assert generate(ours, prompt, attention_mask=left, max_new_tokens=12, repetition_penalty=penalty) == tokens, shape
        exact = theirs(ids).logits
        mine, peers = relative(Qwen.load(at, dtype=torch.bfloat16)(ids), exact), relative(theirs.bfloat16()(ids).logits, exact)
        assert mine < 1.2 * peers < 0.1, (shape, mine, peers)

def test_qwen_text_embeddings_equal_the_peers_last_token():
    """A headless Mistral stored without "model." gives each text the peer's last hidden state, normalised, whatever else is in the batch; an empty text is refused."""
    tokenizer, texts = Tokenizer.load(MINI / "qwen"), ["red", "a very long text about a bowl", "x"]
    theirs = peer_qwen("MistralModel", vocab_size=tokenizer.fast.get_vocab_size())
    ours, expected = reload(theirs, Qwen), torch.cat([theirs(torch.tensor([tokenizer.encode(t)])).last_hidden_state[:, -1] for t in texts])
    assert relative(qwen.embed_texts(ours, tokenizer, texts, batch_size=2), nn.functional.normalize(expected, dim=-1)) < 1e-5
    raises(ValueError, "without tokens", qwen.embed_texts, ours, tokenizer, ["red", ""])

def test_qwen_row_does_not_depend_on_cache_batch_or_padding():
    """Hidden states and greedy tokens of a row are the same alone, in a batch padded on either side, read in pieces through the cache, and from vectors in place of ids."""
    model, (ids, right, left) = tiny_qwen(), padded_batch()
    alone = [ids[i:i + 1, :n] for i, n in enumerate((17, 11, 6))]
    shifted = torch.stack([row.roll(17 - n) for row, n in zip(ids, (17, 11, 6))])              # the same rows, padded on the left
    for batch, mask in ((ids, right), (shifted, left)):
        cache, ends = Cache(model.config, 3, 17, "cpu", torch.float32), (0, 5, 6, 14, 17)
        pieces = [model.model(batch[:, a:b], attention_mask=mask[:, :b], cache=cache) for a, b in zip(ends, ends[1:])]
        for hidden in (model.model(batch, attention_mask=mask), torch.cat(pieces, 1)):
            assert all(relative(hidden[i][mask[i] > 0], model.model(row)[0]) < 1e-5 for i, row in enumerate(alone))
        how = dict(max_new_tokens=9, repetition_penalty=1.2)
        assert generate(model, batch, attention_mask=mask, **how) == [generate(model, row, **how)[0] for row in alone]
    embeds = model.model.embed_tokens(ids)
    assert same(model(embeds=embeds), model(ids)) and generate(model, embeds=embeds) == generate(model, ids)

def test_qwen_generation_stops_and_samples():
    """Each row ends before its own first eos; sampling moves only its own generator and draws from exactly the top-k and top-p sets; logits that are not finite end it."""
    model, (ids, _, _) = tiny_qwen(eos=()), padded_batch()
    free, state = generate(model, ids, max_new_tokens=20), torch.get_rng_state()
    model.config.eos = (free[0][6], free[1][9])
    cut = [row[:next((i for i, t in enumerate(row) if t in model.config.eos), 20)] for row in free]
    assert generate(model, ids, max_new_tokens=20) == cut != free and generate(model, ids, max_new_tokens=0) == [[], [], []]
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().repeat(400, 1)
    for how, drawn in (((1.0, 0, 1.0), {0, 1, 2, 3, 4}), ((1.0, 2, 1.0), {0, 1}), ((1.0, 0, 0.8), {0, 1, 2}), ((0.1, 3, 0.99), {0})):
        assert set(qwen.sample(logits, *how, seeded()).tolist()) == drawn, how
    one, two = (generate(model, ids, temperature=1.0, generator=seeded(1)) for _ in range(2))
    assert one == two and same(state, torch.get_rng_state())
    model.model.norm.weight[0] = math.nan
    raises(ValueError, "not finite", generate, model, ids)

def test_qwen_tokenizer_writes_the_template_of_transformers(tmp_path):
    """A chat is Qwen2.5's template, with its default system turn when none is given; tokens, chats and logits of mini/qwen are transformers'; an end token is added on demand."""
    ours, messages = Tokenizer.load(MINI / "qwen"), cdpo.prompt("A white bowl in front of a grey wall", "with stripes")
    text = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi.<|im_end|>\n<|im_start|>assistant\n"
    ids = ours.chat([{"role": "user", "content": "hi."}])
    assert ids == ours.encode(text) and ours.fast.decode(ids, skip_special_tokens=False) == text and ids.count(ours.fast.token_to_id("<|im_start|>")) == 3
    raises(ValueError, "wizard", ours.chat, [{"role": "wizard", "content": ""}])
    ours.fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True, "eos_token": {"content": "<|im_end|>"}}))                 # as e5-mistral's
    assert Tokenizer.load(tmp_path).encode("red") == [*ours.encode("red"), ours.fast.token_to_id("<|im_end|>")]
    tf = peer("transformers")
    theirs, model = tf.AutoTokenizer.from_pretrained(MINI / "qwen"), tf.AutoModelForCausalLM.from_pretrained(MINI / "qwen", dtype=torch.float32)
    for chat in (messages, [{"role": "system", "content": "Be brief."}, *messages, {"role": "assistant", "content": "Paint the bowl red"}]):
        assert all(ours.chat(chat, prompt) == theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False) for prompt in (True, False))
    for text in ("Paint the bowl neon green", "it's 3  holographic\n\n caf\u00e9s \U0001f600"):
        assert ours.encode(text) == theirs(text).input_ids and ours.decode(ours.encode(text)) == text
    ids = torch.tensor([ours.chat(messages)])
    assert relative(Qwen.load(MINI / "qwen")(ids), model(ids).logits) < 1e-5
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>" and model.generation_config.eos_token_id == [theirs.eos_token_id, theirs.pad_token_id]

def test_full_size_models_have_the_published_names_and_counts():
    """Qwen2.5-7B and 0.5B, FLUX.1-dev, its autoencoder and T5-XXL, ControlNet-Union and Union-Pro-2.0 have the public numbers of parameters, names and shapes."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    qwens = ((152064, 3584, 18944, 28, 28, 4, False), (151936, 896, 4864, 24, 14, 2, True))
    real = dict(heads=24, head_dim=128, axes=(16, 56, 56), txt=4096, pooled=768)
    dev, vae, union, pro = flux_config(doubles=19, singles=38, **real), vae_config((128, 256, 512, 512), 32, 2), control_config(10, 5, 10, **real), control_config(None, 6, 0, **real)
    t5 = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, relative_attention_num_buckets=32, layer_norm_epsilon=1e-6,
              feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        ours = [Qwen(Config(vocab, width, inner, layers, heads, kv, width // heads, 1e-6, 1e6, True, tied, False, None, ())) for vocab, width, inner, layers, heads, kv, tied in qwens]
        ours += [Flux(dev), VAE(vae), ControlNet(union), ControlNet(pro), T5(t5)]
    counts = [sum(p.numel() for p in model.parameters()) for model in ours]
    assert counts == [7_615_616_512, 494_032_768, 11_901_408_320, 83_819_683, 3_301_956_608, 2_140_876_800, 4_762_310_656]
    tf, d = peer("transformers"), peer("diffusers")
    with torch.device("meta"):
        theirs = [tf.Qwen2ForCausalLM(tf.Qwen2Config(**dict(zip(names, size)))) for size in qwens] + [d.FluxTransformer2DModel(**dev), d.AutoencoderKL(**vae)]
        theirs += [d.FluxControlNetModel(**c) for c in (union, pro)]
    for mine, model in zip(ours, theirs):
        assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}

def test_rope_depends_on_distance_only():
    """Qwen's products of rotated queries and keys, and Flux's velocity, stay when all positions move by the same; one that moves alone shows; tables are fp32 under bf16."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=seeded())
    turned = lambda x, at: qwen.rotate(x, *qwen.rope_tables(torch.tensor([[at]]), 16, 1e4))
    near, far, other = ((turned(q, m) * turned(k, n)).sum().item() for m, n in ((3, 8), (103, 108), (3, 9)))
    assert abs(near - far) < 1e-4 < 1e-2 < abs(near - other)
    c, offset = flux_config(), torch.tensor([3.0, 50.0, 17.0])
    model, x = loud(Flux(c)), flux_inputs(c)
    assert relative(model(**x | {"img_ids": x["img_ids"] + offset, "txt_ids": x["txt_ids"] + offset}), model(**x)) < 1e-4
    assert relative(model(**x | {"img_ids": x["img_ids"] * 2}), model(**x)) > 1e-3
    assert model.bfloat16().rope(x["txt_ids"], x["img_ids"]).dtype == torch.complex64

def test_checkpointing_and_compile_change_nothing():
    """Gradients through recomputed layers are the plain ones, for Qwen, its LoRA with dropout and Flux; so are a compiled Qwen's logits; switching adapters first is an error."""
    (ids, right, _), c = padded_batch(), flux_config()
    adapted, x = tiny_lora(dropout=0.3).train(), flux_inputs(c)
    for model, part, loss in ((m := tiny_qwen().requires_grad_(True), m.model, lambda: m(ids, right)), (adapted, adapted.model, lambda: adapted(ids)),
                              (f := loud(Flux(c)).requires_grad_(True), f, lambda: f(**x))):
        weights, grads = [p for p in model.parameters() if p.requires_grad], []
        for part.checkpointing in (False, True):
            torch.manual_seed(3)
            grads.append(torch.autograd.grad(loss().square().mean(), weights))
        assert relative(*grads) < 1e-5 and all(g.any() for g in grads[0])
    loss = adapted(ids).square().mean()
    lora.use(adapted, "reference")
    raises(RuntimeError, "recomputation", loss.backward)
    assert relative(torch.compile(tiny_qwen(), backend="aot_eager", fullgraph=True)(ids, right), tiny_qwen()(ids, right)) < 1e-5

def test_loader_fills_meta_modules_and_names_what_does_not_fit(tmp_path):
    """On the meta device or not a module gets the stored values, a tied head once; missing, unexpected, misshapen, integer tensors, half a file, a lost shard, two files: all named."""
    tied, file = tiny_qwen(), tmp_path / "model.safetensors"
    stored = {k: v for k, v in tied.state_dict().items() if k != "lm_head.weight"}
    save_file(stored, file)
    with torch.device("meta"):
        empty = Qwen(tied.config)
    for copy in (empty, Qwen(tied.config)):
        load_checkpoint(copy, tmp_path)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight and same([*copy.parameters()], [*tied.parameters()])
    raises(ValueError, "missing lm_head.weight", load_checkpoint, tiny_qwen(tied=False), tmp_path)
    save_file(stored | {"model.norm.weight": torch.zeros(5), "model.embed_tokens.weight": torch.zeros(61, 32).int(), "ghost": torch.zeros(1)}, file)
    message = raises(ValueError, "model.norm.weight has shape (5,), expected (32,)", load_checkpoint, empty, tmp_path)
    assert "unexpected ghost" in message and "model.embed_tokens.weight is torch.int32" in message
    file.write_bytes(file.read_bytes()[:-8])
    raises(ValueError, "model.safetensors is truncated", load_checkpoint, empty, tmp_path)
    save_file(stored, tmp_path / "y.safetensors")
    raises(ValueError, "'model.safetensors', 'y.safetensors'", load_checkpoint, empty, tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "y.safetensors", "b.weight": "part-2.safetensors"}}))
    raises(ValueError, "part-2.safetensors", load_checkpoint, empty, tmp_path)

def test_loader_refuses_what_it_cannot_read(tmp_path):
    """Another model's folder, settings that are not written here, sizes that do not fit, a mistyped path, a gated repository, an XLabs net: each is named in one sentence."""
    small = dict(model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, rms_norm_eps=1e-6)
    is_flux, is_net = {"_class_name": "FluxTransformer2DModel"}, {"_class_name": "FluxControlNetModel"}
    config, file = tmp_path / "config.json", tmp_path / "x.safetensors"
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    for kind, settings, part in ((Qwen, small | {"model_type": "llama"}, "'llama'"), (Qwen, small | {"rope_scaling": {"type": "yarn"}}, "'yarn'"),
                                 (Qwen, small | {"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"), (Qwen, small | {"hidden_act": "gelu"}, "'gelu'"),
                                 (Qwen, small | {"use_sliding_window": True}, "use_sliding_window True"), (Qwen, small | {"num_hidden_layers": 10 ** 9}, "num_hidden_layers"),
                                 (Qwen, small | {"hidden_size": "x"}, "not what is expected"), (Flux, {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
                                 (Flux, is_net, "FluxControlNetModel"), (Flux, is_flux | {"num_attention_heads": 24}, "attention_head_dim"),
                                 (Flux, flux_config(axes=(4, 4, 4)) | is_flux, "[4, 4, 4]"), (VAE, {"_class_name": "AutoencoderKL", "latent_channels": 4}, "use_quant_conv"),
                                 (T5, {"model_type": "t5", "feed_forward_proj": "relu"}, "'relu'"), (ImageFeatures, ENCODER | {"use_swiglu_ffn": True}, "use_swiglu_ffn"),
                                 (ImageFeatures, ENCODER | {"model_type": "dinov2_with_registers"}, "dinov2_with_registers")):
        config.write_text(json.dumps(settings))
        raises(ValueError, part, kind.load, tmp_path)
    for name in ("input_hint_block.0.weight", "double_blocks.0.img_mod.lin.weight"):
        save_file({name: torch.zeros(1)}, file)
        raises(ValueError, "XLabs", ControlNet.load, tmp_path)
    config.write_text(json.dumps(control_config() | is_net)), save_file(ControlNet(control_config()).state_dict(), file)
    unguided, forced = (flux_inputs(flux_config(guided=guided)) | {"guidance": guidance} for guided, guidance in ((True, None), (False, torch.ones(2))))
    for part, function, *args in (("is not a ControlNet for", controlnet.load_pair, MINI / "flux", tmp_path, "cpu", torch.float32, False), ("config.json", VAE.load, tmp_path / "absent"),
                                  ("guidance", lambda: Flux(flux_config())(**unguided)), ("guidance", lambda: Flux(flux_config(guided=False))(**forced)),
                                  ("depth", controlnet.control_picture, np.zeros((8, 8, 3), np.uint8), "depth"), ("steps is 0", sigmas, 0, 64),
                                  ("window of 4", tiny_qwen(window=4), torch.zeros(1, 5, dtype=torch.long)), ("tokenizer.json", Tokenizer.load, tmp_path),
                                  ("mistake' is not a folder", resolve, tmp_path / "mistake"), ("mini/qwem", resolve, ROOT / "mini/qwem")):
        raises(ValueError, part, function, *args)
    with mock.patch("qwen.snapshot_download", side_effect=OSError("403")):
        assert resolve(tmp_path) == tmp_path and "huggingface.co/a/gated" in raises(ValueError, "HF_TOKEN", resolve, "a/gated")

def tiny_lora(dtype=torch.float32, **how):
    """tiny_qwen with adapters whose policy does something."""
    model = tiny_qwen().to(dtype)
    lora.inject(model, **{**dict(rank=2, alpha=4), **how})
    for layer in lora.layers(model).values():
        nn.init.normal_(layer.lora_B["policy"], std=0.1, generator=seeded())
    return model

def test_lora_files_are_pefts(tmp_path):
    """An adapter made by peft gives peft's logits here, rank-stabilised or not, on all layers or some; saved again, it gives them in peft."""
    pf, base, (ids, _, _) = peer("peft"), peer_qwen(), padded_batch()
    for targets, stabilised in (("all-linear", False), (["q_proj", "down_proj"], True)):
        theirs = pf.get_peft_model(peer_qwen(), pf.LoraConfig(r=3, lora_alpha=8, lora_dropout=0.1, target_modules=targets, use_rslora=stabilised, task_type="CAUSAL_LM"))
        for name, p in theirs.named_parameters():
            "lora_B" in name and nn.init.normal_(p, std=0.1)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        ours = reload(base, Qwen)
        lora.load_adapter(ours, tmp_path / "theirs")
        assert relative(ours(ids), theirs(ids).logits) < 1e-5 < 1e-2 < relative(base(ids).logits, ours(ids))
        lora.save_adapter(ours, tmp_path / "ours", base_model="base")
        assert relative(pf.PeftModel.from_pretrained(peer_qwen(), tmp_path / "ours").eval()(ids).logits, ours(ids)) < 1e-5

def test_lora_trains_the_policy_alone():
    """At first nothing changes; training moves only the policy, in fp32 over a bf16 base, and leaves every base weight bit for bit, and the reference until it is copied."""
    model, (ids, _, _) = tiny_qwen().bfloat16(), padded_batch()
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids)
    names = lora.inject(model, rank=2, alpha=4, dropout=0.5)
    assert len(names) == 14 and "lm_head" not in names and same(model(ids), logits)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 28 and all(p.dtype == torch.float32 for p in trainable)
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    for _ in range(2):
        model.train()(ids).float().square().mean().backward()
        optimizer.step()
    trained = model.eval()(ids)
    assert not same(trained, logits) and all(same(model.state_dict()[k], v) for k, v in before.items())
    for adapter, expected in (("reference", logits), (None, logits), ("policy", trained), ("reference", trained)):
        lora.use(model, adapter)
        assert same(model(ids), expected)
        adapter == "policy" and lora.copy_adapter(model)

def test_lora_merges_once_in_fp32():
    """Merged logits equal the adapter's; a bf16 weight is the exact sum rounded once; the names are those of the plain model; a second merge is refused."""
    for dtype, precision in ((torch.float32, 1e-6), (torch.bfloat16, 2.0 ** -8)):
        model, (ids, _, _) = tiny_lora(dtype), padded_batch()
        layer, logits = model.model.layers[0].mlp.up_proj, model(ids)
        exact = layer.weight.double() + 2 * layer.lora_B["policy"].double() @ layer.lora_A["policy"].double()
        lora.merge(model)
        merged = model.model.layers[0].mlp.up_proj.weight
        assert ((merged - exact).abs() <= precision * exact.abs() + 1e-7).all() and relative(model(ids), logits) < 20 * precision
        assert set(model.state_dict()) == set(tiny_qwen().state_dict())
        raises(ValueError, "no adapters", lora.merge, model)

def test_lora_refuses_what_it_cannot_honour(tmp_path):
    """Settings not written here, tensors that do not fit, another scale, unknown targets and a second injection are each named."""
    targets = ["layers.1.self_attn.q_proj", "up_proj"]
    lora.save_adapter(tiny_lora(targets=targets), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 3                                                   # "q_proj" alone would mean the other layer too
    for part, function, *args in (("already", lora.inject, tiny_lora()), ("'critic'", lora.use, tiny_lora(), "critic"),
                                  ("z_proj", lora.inject, tiny_qwen(), 16, 32, 0, ["q_proj", "z_proj"]),
                                  ("unexpected base_model.model.model.layers.1.self_attn.q_proj", lora.load_adapter, tiny_lora(targets=["up_proj"]), tmp_path),
                                  ("alpha / rank is 2", lora.load_adapter, tiny_lora(alpha=8, targets=targets), tmp_path)):
        raises(ValueError, part, function, *args)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "rank_pattern": {"q_proj": 9}, "bias": "all", "loftq_config": {}}))
    message = raises(ValueError, "use_dora = True", lora.load_adapter, tiny_qwen(), tmp_path)
    assert "rank_pattern" in message and "bias = 'all'" in message and "loftq" not in message

def flux_config(heads=3, head_dim=16, axes=(4, 6, 6), guided=True, doubles=2, singles=3, txt=12, pooled=8):
    return dict(num_attention_heads=heads, attention_head_dim=head_dim, axes_dims_rope=list(axes), guidance_embeds=guided, num_layers=doubles, num_single_layers=singles,
                joint_attention_dim=txt, pooled_projection_dim=pooled, in_channels=64)

def control_config(modes=10, doubles=2, singles=3, **more):
    return flux_config(doubles=doubles, singles=singles, **more) | {"num_mode": modes}

def vae_config(widths=(8, 8, 8), groups=4, depth=1, **more):
    return dict(block_out_channels=list(widths), layers_per_block=depth, norm_num_groups=groups, latent_channels=16, in_channels=3, out_channels=3, use_quant_conv=False,
                use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, down_block_types=["DownEncoderBlock2D"] * len(widths),
                up_block_types=["UpDecoderBlock2D"] * len(widths), **more)

def flux_inputs(c, B=2, h=4, w=8, T=5, seed=0):
    torch.manual_seed(seed)
    return dict(img=torch.randn(B, h * w // 4, 64), txt=torch.randn(B, T, c["joint_attention_dim"]), pooled=torch.randn(B, c["pooled_projection_dim"]),
                timestep=torch.rand(B), guidance=torch.rand(B) * 35 if c["guidance_embeds"] else None, img_ids=9 * image_ids(h, w), txt_ids=torch.zeros(T, 3))

def test_flux_velocity_equals_diffusers():
    """Velocities agree to 1e-4 for odd head counts, guidance on and off, batches, residuals; bf16 is at most 1.1 times as far from fp32 at times it holds, a tenth at others."""
    def peer_velocity(model, x, double=None, single=None):
        return model(x["img"], x["txt"], x["pooled"], x["timestep"], x["img_ids"], x["txt_ids"], x["guidance"], controlnet_block_samples=double or None,
                     controlnet_single_block_samples=single or None, return_dict=False)[0]
    d = peer("diffusers")
    for c, B, control in ((flux_config(), 2, 0), (flux_config(5, 24, (8, 8, 8), False, 1, 4), 3, 2), (flux_config(1, doubles=5, singles=7), 1, 3),
                          (flux_config(doubles=0, singles=2), 2, 0)):
        theirs, x, D = loud(d.FluxTransformer2DModel(**c)), flux_inputs(c, B), c["num_attention_heads"] * c["attention_head_dim"]
        double, single = ([torch.randn(B, 8, D) for _ in range(min(control, c[k]))] for k in ("num_layers", "num_single_layers"))
        assert relative(reload(theirs, Flux)(**x, double_residuals=double, single_residuals=single), peer_velocity(theirs, x, double, single)) < 1e-4, c
    c, held = flux_config(4, 32, (8, 12, 12)), dict(timestep=torch.tensor([1.0, 0.5, 0.25, 0.125]), guidance=torch.full((4,), 4.0))
    for x, bound in ((flux_inputs(c, 4) | held, 1.1), (flux_inputs(c, 4), 0.1)):        # at others the peer rounds 1000 t
        theirs, rough = loud(d.FluxTransformer2DModel(**c)), x | {k: x[k].bfloat16() for k in ("img", "txt", "pooled")}
        exact, mine = peer_velocity(theirs, x), reload(theirs, Flux).bfloat16()(**rough)
        assert relative(mine, exact) <= bound * relative(peer_velocity(theirs.bfloat16(), rough), exact)

def test_flux_autoencoder_equals_diffusers():
    """Latents (mean and sample) and pictures equal AutoencoderKL's to 1e-4: 1 to 3 levels, with and without attention, sides that differ."""
    for widths, depth, attention in (((16, 24, 40), 1, False), ((8, 16), 2, True), ((8,), 1, True)):
        theirs = loud(peer("diffusers").AutoencoderKL(**vae_config(widths, 8, depth, mid_block_add_attention=attention)))
        image, latent = (torch.randn(2, n, 16, 24, generator=seeded()) for n in (3, 16))
        ours, posterior = reload(theirs, VAE), theirs.encode(image).latent_dist
        assert relative(ours.encode(image), (posterior.mode() - 0.1159) * 0.3611) < 1e-4 and ours.factor == 2 ** (len(widths) - 1)
        assert relative(ours.encode(image, seeded(1)), (posterior.sample(seeded(1)) - 0.1159) * 0.3611) < 1e-4
        assert relative(ours.decode(latent), theirs.decode(latent / 0.3611 + 0.1159).sample) < 1e-4

def test_flux_text_encoders_equal_transformers(tmp_path):
    """CLIP's pooled vector (both eos conventions, names with and without text_model.) and T5's states (far buckets, the embedding stored twice) equal transformers' to 1e-4."""
    tf = peer("transformers")
    clips = [tf.CLIPTextConfig(vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=heads, max_position_embeddings=20, hidden_act=act,
                               eos_token_id=eos, bos_token_id=97) for eos, act, heads in ((2, "quick_gelu", 3), (98, "gelu", 2))]
    t5 = tf.T5Config(vocab_size=60, d_model=20, d_kv=6, d_ff=30, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu")
    ends, far = torch.tensor([[97, 5, 6, 7, 98, 98, 98], [97, 5, 98, 98, 98, 98, 98]]), torch.randint(60, (2, 150), generator=seeded())
    for kind, theirs, ids, answer in (*((CLIPText, tf.CLIPTextModel(c), ends, "pooler_output") for c in clips), (T5, tf.T5EncoderModel(t5), far, "last_hidden_state")):
        loud(theirs).save_pretrained(tmp_path)
        ours, file = kind.load(tmp_path), tmp_path / "model.safetensors"
        assert relative(ours(ids), getattr(theirs(ids), answer)) < 1e-4
        stored = load_file(file)
        twice = {"encoder.embed_tokens.weight": stored["shared.weight"].clone()} if kind is T5 else {}
        save_file(twice | {("text_model." if kind is CLIPText else "") + name.removeprefix("text_model."): tensor for name, tensor in stored.items()}, file)
        assert same(kind.load(tmp_path)(ids), ours(ids))

def test_flux_prompts_become_the_ids_of_transformers_and_the_same_vectors_alone():
    """Prompts are padded, cut with the end token kept, and encoded alone as in a batch; ids are transformers': case, accents, special tokens, empty and long prompts."""
    prompts = ["A red mug, 12!", "", "  a\tB  <|endoftext|> c", "banana " * 40, "Caf\u00e9 na\u00efve", "mug"]
    both, alone = flux.encode_prompt(MINI / "flux", prompts, batch=4), flux.encode_prompt(MINI / "flux", prompts[3:4])
    assert relative([x[3:4] for x in both], alone) < 1e-6
    for part, kind, pad in (("tokenizer", "CLIPTokenizer", "<|endoftext|>"), ("tokenizer_2", "PreTrainedTokenizerFast", "<pad>")):
        ours = flux.TextTokenizer.load(MINI / "flux" / part)(prompts)
        end = ours[5, -1] if part == "tokenizer" else 1
        assert len(ours) == 6 and ours[3, -1] == end and end not in ours[3, :-1] and end in ours[1]
        theirs = getattr(peer("transformers"), kind).from_pretrained(MINI / "flux" / part, pad_token=pad)
        assert same(ours, theirs(prompts, padding="max_length", max_length=ours.shape[1], truncation=True, return_tensors="pt").input_ids), part

def test_flux_sigmas_equal_the_golden_values_and_diffusers():
    """Noise levels equal the published schedule to 2e-6 for dev and schnell at several lengths, start at 1 and end at 0."""
    for tokens, want in ((4096, [1, .904531, .759511, .512844, 0]), (1024, [1, .849235, .652489, .384945, 0]), (256, [1, .831824, .622459, .354661, 0])):
        assert (sigmas(4, tokens) - torch.tensor(want)).abs().max() < 1e-6
    d, shift = peer("diffusers"), importlib.import_module("diffusers.pipelines.flux.pipeline_flux").calculate_shift
    for config in (flux.SCHEDULE, flux.SCHEDULE | {"use_dynamic_shifting": False, "shift": 1.0}, flux.SCHEDULE | {"use_dynamic_shifting": False}):
        for tokens, steps in ((64, 1), (1024, 28), (4096, 60)):
            theirs = d.FlowMatchEulerDiscreteScheduler(**config)
            theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift(tokens))
            assert (sigmas(steps, tokens, config) - theirs.sigmas).abs().max() < 2e-6, (config, tokens, steps)

def test_flux_sampler_equals_the_diffusers_pipelines():
    """Latents equal those of FluxPipeline (guidance; true CFG; schnell), of image-to-image at strength 0.55 and of ControlNet at scale 0.7 in part of 5 steps, to 1e-4."""
    d, vae = peer("diffusers"), loud(peer("diffusers").AutoencoderKL(**vae_config()))
    vae.encoder.conv_out.weight[16:], vae.encoder.conv_out.bias[16:] = 0, -100           # the pipeline samples the posterior: leave it no width
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    for guided, schedule in ((True, flux.SCHEDULE), (False, flux.SCHEDULE | {"use_dynamic_shifting": False, "shift": 1.0})):
        c = flux_config(guided=guided)
        x, no, levels, ids, source = flux_inputs(c, h=8, w=16), flux_inputs(c, seed=1), sigmas(5, 32, schedule), image_ids(8, 16), torch.randn(2, 32, 64)
        theirs, net = loud(d.FluxTransformer2DModel(**c)), loud(d.FluxControlNetModel(**control_config(guided=guided)))
        parts = dict(scheduler=d.FlowMatchEulerDiscreteScheduler(**schedule), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=theirs)
        common = dict(prompt_embeds=x["txt"], pooled_prompt_embeds=x["pooled"], height=32, width=64, num_inference_steps=5, guidance_scale=5.0, output_type="latent", latents=x["img"])
        noised = (1 - levels[2]) * source + levels[2] * x["img"]      # int(5 - 5 * 0.55) = 2 steps are skipped; a latent that is given counts as noised
        control = pack(reload(vae, VAE).encode(flux.to_tensor(picture)[None])).expand(2, -1, -1)
        steering = dict(control=controlnet.steer(reload(net, ControlNet), control, x["txt"], x["pooled"], ids, levels, 5.0, mode=3, scale=0.7, start=0.2, end=0.9))
        steered = dict(control_image=Image.fromarray(picture), control_mode=3, controlnet_conditioning_scale=0.7, control_guidance_start=0.2, control_guidance_end=0.9)
        negative, against = dict(negative_prompt_embeds=no["txt"], negative_pooled_prompt_embeds=no["pooled"], true_cfg_scale=2.0), dict(negative=(no["txt"], no["pooled"]), cfg=2.0)
        for kind, given, flags in ((d.FluxPipeline, {}, {}), (d.FluxPipeline, negative, against), (d.FluxControlNetPipeline, steered, steering),
                                   (d.FluxControlNetPipeline, negative | steered, against | steering),
                                   (d.FluxImg2ImgPipeline, dict(image=torch.zeros(2, 3, 32, 64), latents=noised, strength=0.55), dict(source=source, strength=0.55))):
            pipe = kind(**parts, **({"controlnet": net} if kind is d.FluxControlNetPipeline else {}))
            pipe.set_progress_bar_config(disable=True)
            got = denoise(reload(theirs, Flux), x["img"], x["txt"], x["pooled"], ids, levels, guidance=5.0, **flags)
            assert relative(got, pipe(**common | given).images) < 1e-4, (guided, kind, list(flags))

def exact(x0):
    """A stand-in for Flux whose velocity is exact: x = (1-t) x0 + t eps, so eps - x0 = (x - x0) / t. It keeps what it was called with."""
    def velocity(x, txt, t, rope, double=(), single=()):
        calls.append((t[0].item(), len(double)))
        return (x - x0 + txt.mean()) / t[:, None, None]
    calls, modulations = [], lambda levels, guidance, pooled: [t.expand(len(pooled)) for t in levels]
    return SimpleNamespace(velocity=velocity, calls=calls, modulations=modulations, rope=lambda *ids: None)

def test_flux_euler_with_the_exact_velocity_recovers_the_picture():
    """Any number of steps ends at x_0, from a noised source in the last strength * steps, rounded up; cfg extrapolates; control comes where it chose; overflow is an error."""
    x0, source, noise, txt, pooled = *torch.randn(3, 2, 6, 64, generator=seeded()), torch.zeros(2, 3, 4), torch.zeros(2, 4)
    sample = lambda model, steps, txt=txt, **how: denoise(model, noise, txt, pooled, image_ids(4, 6), sigmas(steps, 6), **how)
    assert relative([sample(exact(x0), steps) for steps in (1, 7)], [x0, x0]) < 1e-5
    for strength, calls in ((1.0, 10), (0.6, 6), (0.32, 4), (0.0, 0)):
        out = sample(model := exact(x0), 10, source=source, strength=strength)
        assert relative(out, x0 if calls else source) < 1e-5 and [t for t, _ in model.calls] == sigmas(10, 6)[10 - calls:10].tolist()
    assert relative(sample(exact(x0), 1, txt + 1, negative=(txt, pooled), cfg=3.0), x0 - 3) < 1e-5
    sample(model := exact(x0), 4, control=lambda i, n, x, t: ([x], ()) if i < n // 2 else ((), ()))
    assert [n for _, n in model.calls] == [1, 1, 0, 0]
    for part, x0, how in (("strength is 1.5", x0, dict(source=source, strength=1.5)), ("source", x0, dict(strength=0.5)), ("cfg is 3.0", x0, dict(cfg=3.0)), ("not finite", x0 / 0, {})):
        raises(ValueError, part, sample, exact(x0), 2, **how)

def test_flux_row_alone_equals_the_row_in_a_batch():
    """Whatever the other rows' times; offload leaves modulation layers alone behind; unpack inverts pack, whose token 1 is the patch right of token 0, in order (channel, dy, dx)."""
    model, x, z = loud(Flux(flux_config())), flux_inputs(flux_config(), B=3), torch.randn(2, 16, 4, 6)
    assert relative(model(**x)[1:2], model(**{k: v if k.endswith("_ids") else v[1:2] for k, v in x.items()})) < 1e-5
    assert all(p.is_meta != (".norm1" in k or ".norm.linear" in k or "norm_out" in k) for k, p in flux.offload_modulation(model, "meta").named_parameters())
    assert same(flux.unpack(pack(z), 4, 6), z) and same(pack(z)[:, 1], z[:, :, :2, 2:4].flatten(1)) and image_ids(4, 6)[[1, -1]].tolist() == [[0, 0, 1], [0, 1, 2]]
    raises(ValueError, "5 x 6", pack, torch.randn(1, 16, 5, 6))

def test_canny_is_bit_for_bit_opencvs():
    """A weak square has edges exactly when a strong one touches it; on photographs, noise and slivers, gray and colour, no pixel differs from OpenCV's at any threshold."""
    image, rng = np.zeros((40, 40), np.uint8), np.random.default_rng(0)
    image[10:30, 10:30] = 30
    assert canny(image).sum() == 0
    image[10:14, 10:14] = 255
    assert canny(image)[28:32, 12:28].any() and set(np.unique(canny(image))) == {0, 255}
    raises(ValueError, "float64", canny, image / 255)
    cv2, data = peer("cv2"), peer("skimage.data")
    pictures = [data.astronaut(), data.coffee(), data.camera(), data.page(), rng.integers(100, 110, (99, 64, 3), dtype=np.uint8)]
    pictures += [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((200, 331, 3), (128, 128), (1, 1), (1, 9, 3), (7, 1), (2, 2))]
    for image in pictures:
        for low, high in ((100, 200), (50, 200), (0, 0), (10, 30), (200, 100), (33.7, 99.9), (-5, 20), (300, 900)):
            assert (canny(image, low, high) == cv2.Canny(image, low, high)).all(), (image.shape, low, high)

def test_controlnet_residuals_equal_diffusers_in_every_mode():
    """Union nets in each of their modes, and nets without modes, give diffusers' residuals to 1e-4."""
    for c in (control_config(), control_config(None, 6, 0), control_config(7, 0, 2), control_config(guided=False, doubles=1)):
        x, theirs, control = flux_inputs(c), loud(peer("diffusers").FluxControlNetModel(**c)), torch.randn(2, 8, 64)
        ours = reload(theirs, ControlNet)
        for mode in range(c["num_mode"] or 1):
            modes = torch.full((2, 1), mode) if c["num_mode"] else None
            expected = theirs(x["img"], control, modes, 0.7, x["txt"], x["pooled"], x["timestep"], x["img_ids"], x["txt_ids"], x["guidance"], return_dict=False)
            got = ours(control=control, mode=mode, scale=0.7, **x)
            assert all(relative(a, b or []) < 1e-4 for a, b in zip(got, expected)), (c, mode)

def test_controlnet_row_alone_equals_row_in_a_batch_with_other_modes():
    """Modes may differ in a batch; scale 2 doubles residuals; a new net adds nothing; streamed block by block not a bit changes and all weights come home; modes are checked."""
    c, control = control_config(modes=4), torch.randn(3, 8, 64, generator=seeded(9))
    new, model, x = ControlNet(c), loud(Flux(flux_config())), flux_inputs(c, B=3)
    double, single = new(control=control, **x)
    assert same(model(**x), model(**x, double_residuals=double, single_residuals=single))
    net = loud(new)
    expected, homes = sum(net(control=control, mode=torch.tensor([0, 3, 1]), **x), []), [p.data_ptr() for p in net.parameters()]
    for i, mode in enumerate((0, 3, 1)):
        alone = net(control=control[i:i + 1], mode=mode, scale=2.0, **{k: v if k.endswith("ids") else v[i:i + 1] for k, v in x.items()})
        assert relative(sum(alone, []), [2 * r[i:i + 1] for r in expected]) < 1e-5
    raises(ValueError, "mode is 4", net, control=control, mode=4, **x)
    assert same(sum(controlnet.stream(net, "cpu")(control=control, mode=torch.tensor([0, 3, 1]), **x), []), expected) and homes == [p.data_ptr() for p in net.parameters()]

def test_render_frees_each_part_before_the_next():
    """When a part of the picture stack is loaded, no module of an earlier part is alive but the autoencoder; a batch of 2 gives what each gives alone, to one level."""
    alive, parts = [], lambda: {type(o).__name__ for o in gc.get_objects() if issubclass(type(o), flux.Pretrained)}
    before, prompts, black = parts(), ["A red mug", "A vase"], [np.zeros((64, 64, 3), np.uint8)]
    jobs = dict(shape=(64, 64), steps=2, guidance=3.5)
    stage = lambda name: alive.append(parts() - before) or contextlib.nullcontext()
    both = controlnet.render(MINI / "flux", MINI / "controlnet", prompts, [0, 1], controls=2 * black, stage=stage, batch=2, **jobs)
    assert len(alive) == 4 and set.union(*alive) <= {"VAE"}, alive
    alone = [controlnet.render(MINI / "flux", MINI / "controlnet", [prompt], [i], controls=black, **jobs)[0] for i, prompt in enumerate(prompts)]
    assert np.abs(np.stack(alone).astype(int) - both).max() <= 1

def toy_graph(users=40, attributes=12, width=8):
    names = [f"t{i}" for i in range(attributes)]
    people = [User(f"u{i}", names[i % 2::2][:4 + i % 3], names[1 - i % 2::2][:3 + i % 2]) for i in range(users)]
    return PreferenceGraph.build(people, names, torch.randn(attributes, width, generator=seeded()))

def test_graph_reader_names_file_and_line(tmp_path):
    """A bad line of users.jsonl is an error that names the file, the line and what was wanted."""
    good, file = '{"user": "ana", "likes": ["red"], "dislikes": []}', tmp_path / "users.jsonl"
    for bad, part in {"{": "not a line of JSON", "[1]": "a JSON object", '{"user": "x", "likes": "red", "dislikes": []}': '"likes" must be a list of strings',
                      '{"user": "x", "likes": [1], "dislikes": []}': "a list of strings", '{"user": 3, "likes": [], "dislikes": []}': '"user" must be a string',
                      '{"user": "x", "likes": ["a"], "dislikes": ["a"]}': "likes and dislikes 'a'", good: "appears twice", "\xff": "not a line of JSON"}.items():
        file.write_bytes(f"{good}\n\n{bad}\n".encode("latin1"))
        assert f"{file}:3:" in raises(ValueError, part, graph.read_users, file)
    file.write_text("")
    assert graph.read_users(file) == []
    raises(ValueError, "no such file", graph.read_users, tmp_path / "none.jsonl")
    raises(ValueError, "unknown attribute 'blue'", graph.edges_of, [User("x", ["blue"], [])], ["gold", "red"])

def test_graph_similar_users_follow_equation_6():
    """Scores are counts over the largest count of any two, best first, a tie to the next user around, by products or by meetings; without anything in common it is u with 0."""
    dense = torch.randint(-1, 2, (70, 20), generator=seeded(), dtype=torch.int8)
    rare = ((torch.randint(0, 2, (400, 300), generator=seeded()) * 2 - 1) * (torch.rand(400, 300, generator=seeded(1)) < 0.008)).to(torch.int8)
    for signs, given, k, chunk in ((dense, dense, 70, 256), (dense, dense, 5, 7), (rare, rare.to_sparse(), 5, 1)):                # products, in one chunk and in ten; meetings
        for kind, x in (("shared", signs.abs()), ("signed", signs), ("likes", signs.clamp_min(0))):
            common, own = (x.int() @ x.int().T).fill_diagonal_(0).clamp_min(0), torch.arange(len(x))[:, None]
            best = (common * len(x) - (own.T - own) % len(x)).topk(k).indices
            score = common.gather(1, best) / common.max()                                           # (6)
            assert same(graph.similar_users(given, k, kind, chunk=chunk), (best.where(score > 0, own), score)), (kind, k)
    index, score = graph.similar_users(dense, 100)
    assert index.shape == (70, 100) and (index[:, 70:] == torch.arange(70)[:, None]).all() and not score[:, 69:].any()
    assert [t.shape for t in graph.similar_users(torch.zeros(0, 3, dtype=torch.int8), 2)] == [(0, 2), (0, 2)]

def test_graph_sage_equals_pyg():
    """SAGEConv takes PyG's weights and gives PyG's numbers and gradients; a node without neighbours gets a zero mean."""
    src, dst = torch.randn(9, 6, generator=seeded()), torch.randn(5, 6, generator=seeded(1))
    edges = torch.stack([torch.randint(n, (30,), generator=seeded()) for n in (9, 4)])       # node 4 has no neighbour
    ours = graph.SAGEConv(6, 7)
    out = ours(src, dst, edges)
    assert torch.allclose(out[4], ours.lin_l.bias + ours.lin_r.weight @ dst[4], atol=1e-6)
    theirs = peer("torch_geometric.nn").SAGEConv((6, 6), 7)
    theirs.load_state_dict(ours.state_dict())
    want = theirs((src, dst), edges)
    assert relative(out, want) < 1e-6 and relative(*(torch.autograd.grad(y.square().sum(), [*m.parameters()]) for m, y in ((ours, out), (theirs, want)))) < 1e-6

def test_graph_pretraining_learns_from_training_edges_alone():
    """60/20/20 is a partition, held-out edges carry no message, a graph of two tastes is learned (AUC > 0.95), alike for one seed; AUC counts ties as one half."""
    built = toy_graph(80)
    (model, found), (again, _) = (graph.pretrain(built, 16, 16, epochs=60) for _ in range(2))
    assert found["auc"] > 0.95 and same([*model.parameters()], [*again.parameters()])
    assert sorted(torch.cat(list(model.split.values()), 1).T.tolist()) == sorted(built.edges.T.tolist())
    assert [round(e.shape[1] / built.edges.shape[1], 1) for e in model.split.values()] == [0.6, 0.2, 0.2]
    built.edges = model.split["train"]
    assert model.evaluate("test") == found
    assert graph.auc(torch.tensor([3.0, 2, 1, 1]), torch.tensor([True, False, True, False])) == (1 + 1 + 0 + 0.5) / 4

def test_graph_training_does_not_depend_on_the_number_of_threads():
    """Three epochs on 9,000 edges end with the same bits on one thread and, twice, on two."""
    cells, found = torch.randperm(900 * 45, generator=seeded())[:9000], []
    edges = torch.stack([cells // 45, cells % 45, torch.randint(2, cells.shape, generator=seeded(1)) * 2 - 1])
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        model, _ = graph.pretrain(PreferenceGraph([str(i) for i in range(900)], [str(i) for i in range(45)], edges, torch.randn(45, 64, generator=seeded(2))), epochs=3)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

def test_graph_new_user_is_inductive():
    """A new user's embedding depends on nobody else, sees the sign where the graph does, and is defined without likes."""
    built, new = toy_graph(), [User("x", ["t0"], ["t1"]), User("y", ["t1"], ["t0"]), User("z", [], [])]
    for signed in (True, False):
        model = graph.EdgeModel(built, signed=signed)
        states = model.sage(model.vectors, built.features, built.edges)[2]
        h = graph.embed_new_user(model.sage, states, new, built.attributes)
        alone = torch.cat([graph.embed_new_user(model.sage, states, [u], built.attributes) for u in new])
        assert relative(h, alone) < 1e-6 and (relative(h[0], h[1]) > 1e-3) == signed and h.isfinite().all()

def test_cdpo_logprobs_equal_the_full_softmax_for_any_chunk():
    """Answer log-probabilities and the hidden states' gradients equal those of log_softmax over the whole (B,T,V) table; a row without answer gives 0; the head is frozen."""
    hidden, head = torch.randn(3, 6, 8, generator=seeded(), requires_grad=True), torch.randn(50, 8, generator=seeded(1))
    labels, weight = torch.tensor([[-100, 3, 4, -100, -100, -100], [-100] * 6, [1, 2, 3, 4, 5, 6]]), torch.tensor([1.0, 2, 3])
    full = (hidden @ head.T).log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == -100, 0).sum(-1)
    want = torch.autograd.grad((full * weight).sum(), hidden)
    for chunk in (1, 4, 1000):
        logp = cdpo.token_logprobs(hidden, head, labels, chunk)
        assert logp[1] == 0 and relative(logp, full) < 1e-6 and relative(torch.autograd.grad((logp * weight).sum(), hidden), want) < 1e-5
    raises(ValueError, "frozen", cdpo.token_logprobs, hidden, head.clone().requires_grad_(True), labels)

def test_cdpo_losses_follow_equations_1_and_7():
    """ln 2 where policy = reference; a dislike of the chosen answer costs; Eq. 7 averages neighbours by similarity, and none leave the own term."""
    zero, one = torch.zeros(2), torch.ones(2)
    assert torch.allclose(cdpo.dpo_loss(zero, one, zero, one)[0], torch.tensor(2.0).log())
    losses, chosen, rejected = cdpo.dpo_loss(zero + 3, zero - 1, one, one, beta=0.5)
    assert torch.allclose(losses, torch.log1p(torch.exp(torch.tensor(-2.0)))) and chosen.tolist() == [1, 1] and rejected.tolist() == [-1, -1]
    got = cdpo.cdpo_loss(one, torch.tensor([[4.0, 1.0], [7.0, 7.0]]), torch.tensor([[0.5, 1.0], [0.0, 0.0]]), lam=0.3)
    assert torch.allclose(got, torch.tensor([1 + 0.3 * 2.0, 1.0]))

def test_cdpo_collaborative_file_returns_the_same_tokens(tmp_path):
    """collaborative.safetensors alone gives stored and new users the same soft tokens as the model that wrote it; a cut file is refused by name."""
    model = cdpo.UserTokens(toy_graph(), hidden_dim=6, out_dim=5, soft={"hidden_dim": 7, "out_dim": 4, "tokens": 3, "std": 0.5})
    new, file = [User("x", ["t0"], ["t1"]), User("y", [], [])], tmp_path / "collaborative.safetensors"
    model.save(file)
    read = cdpo.UserTokens.load(file)
    assert relative([read.soft(read.new(new)), read.embeddings()], [model.soft(model.new(new)), model.embeddings()]) < 1e-6
    assert read.graph.users == model.graph.users
    file.write_bytes(file.read_bytes()[:-9])
    raises(ValueError, "collaborative.safetensors is truncated", cdpo.UserTokens.load, file)

def test_cdpo_packed_answers_equal_separate_ones():
    """Chosen and rejected in one sequence behind one prompt give the log-probabilities and gradients of each alone, whatever else is in the batch."""
    model, tokenizer = Qwen.load(MINI / "qwen"), Tokenizer.load(MINI / "qwen")
    soft, weight = torch.randn(2, 3, model.lm_head.weight.shape[1], generator=seeded(), requires_grad=True), torch.tensor([[1.0, 2], [3, 4]])
    texts = [("A red mug", "Paint the mug neon green", "Add a leaf"), ("A white bowl in front of a grey wall", "Make it gold", "Turn the bowl into ice")]
    rows = [cdpo.encode(tokenizer, cdpo.prompt(caption), *answers) for caption, *answers in texts]
    packed, alone = cdpo.answer_logprobs(model, rows, soft), torch.zeros(2, 2)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        prompt, answer = rows[i][0], rows[i][1][j]
        embeds = torch.cat([soft[i], model.model.embed_tokens(torch.tensor(prompt + answer))])[None]
        logp = model.lm_head(model.model(embeds=embeds)).log_softmax(-1)[0, 3 + len(prompt) - 1:-1]
        alone[i, j] = logp.gather(-1, torch.tensor(answer)[:, None]).sum()
    assert relative(packed, alone) < 1e-6 and relative(*(torch.autograd.grad((x * weight).sum(), soft) for x in (packed, alone))) < 1e-5

def named(text):
    """The attributes that an instruction names."""
    return [a for a in concepts.TYPE_OF if a in text]

def test_world_same_seed_gives_same_bytes_and_more_users_change_no_earlier_one(tmp_path):
    """Every file is a function of the seed, a larger world begins with a smaller one, and mini/sample is what --sample writes: readable users and all pictures that it names."""
    for name, users, seed in (("a", 5, 0), ("b", 5, 0), ("c", 9, 0), ("d", 5, 1)):
        assert shell("mini/world.py", "--out", tmp_path / name, "--users", users, "--test-users", 2, "--edits", 20, "--scenes", 0, "--seed", seed).returncode == 0
    a, b, c, d = ({f.name: f.read_bytes() for f in sorted((tmp_path / name).iterdir())} for name in "abcd")
    assert list(a) == ["edits.jsonl", "pairs.jsonl", "pairs_test.jsonl", "users.jsonl", "users_test.jsonl"]
    assert a == b and all(c[f].startswith(a[f]) for f in a) and a["users.jsonl"] != d["users.jsonl"]
    sample, scenes = MINI / "sample", lines(MINI / "sample/scenes.jsonl")
    assert shell("mini/world.py", "--sample", "--out", tmp_path / "sample", "--scenes", 0).returncode == 0
    assert all(f.read_bytes() == (sample / f.name).read_bytes() for f in (tmp_path / "sample").iterdir())
    assert "imaginative-child" in [u.name for u in graph.read_users(sample / "users_test.jsonl")] and [len(s.get("edits", [])) for s in scenes] == [45, 0, 0, 0, 0, 0]
    assert all(Image.open(sample / picture["image"]).size == (64, 64) for picture in [scenes[0]["edits"][0], *scenes])

def test_world_pairs_ask_for_stated_likes_and_never_mention_a_hidden_one():
    """48 pairs a user; chosen names one stated like or what the words ask for, rejected one attribute that is not liked or not asked for; the lists of a taste are disjoint."""
    users, pairs = world.people("train", 40, 0)
    assert len(pairs) == 48 * 40 and len({u["user"] for u in users}) == 40
    for i, u in enumerate(users):
        everything, kinds = u["likes"] + u["dislikes"] + u["hidden"], {concepts.TYPE_OF[a] for a in u["likes"]}
        assert len(set(everything)) == len(everything) and set(everything) <= set(concepts.TYPE_OF) and u["hidden"] and u["dislikes"]
        for p in pairs[48 * i:48 * i + 48]:
            (chosen,), (rejected,), words = named(p["chosen"]), named(p["rejected"]), p.get("guidance", "")
            of_kind = concepts.TYPE_OF[chosen] == p["edit_type"]
            assert p["user"] == u["user"] and rejected not in u["hidden"]
            if named(words):                                                        # asked for by name: nothing the user ever cared about, before something they like
                assert named(words) == [chosen] and of_kind and chosen not in everything and rejected in u["likes"]
            else:
                assert chosen in u["likes"] and (of_kind or p["edit_type"] not in kinds)
                assert rejected not in u["likes"] or words and concepts.TYPE_OF[rejected] != p["edit_type"]
    assert .15 < sum("guidance" in p for p in pairs) / len(pairs) < .22

def test_world_themes_cover_all_attributes_and_every_edit_type():
    """Nine themes share the 45 attributes, each with all six edit types; instructions name one, fit Flux's tokenizers with no unknown word; untrained, the model obeys 8 of 10."""
    kinds = concepts.TYPE_OF
    assert set().union(*world.THEMES.values()) == set(kinds) and all({kinds[a] for a in theme} == set(concepts.ATTRIBUTES) for theme in world.THEMES.values())
    told = [(o, a, concepts.instruction(o, a, i)) for o in concepts.OBJECTS for a in kinds for i in range(4)]
    assert all(named(text) == [a] for _, a, text in told)
    prompts, model = [f"{concepts.caption('maroon', o, 'cream')}. {text}" for o, _, text in told], Qwen.load(MINI / "qwen")
    clip, t5 = (flux.TextTokenizer.load(MINI / "flux" / part)(prompts) for part in ("tokenizer", "tokenizer_2"))
    assert (clip[:, -1] == clip.max()).all() and (t5[:, -1] == 0).all() and not (t5 == 2).any()
    assert len(clip.unique(dim=0)) == len(t5.unique(dim=0)) == len(set(prompts))
    guided = [cdpo.prompt("A blue mug in front of a mint wall", f"with {a}") for a in kinds]
    answers = cdpo.suggest(model, Tokenizer.load(MINI / "qwen"), guided, temperature=1.0, generator=seeded())
    assert sum(a in text for a, (text, _) in zip(kinds, answers)) >= 0.8 * len(kinds)

def test_mini_renders_every_attribute_apart_and_a_color_edit_leaves_the_room():
    """A picture is a function of its scene; 45 edits and the plain picture differ pairwise on every object; Canny finds every object before every wall; a room stays as it was."""
    scene = {"object": "mug", "color": "blue", "wall": "mint", "seed": 3}
    first = render.render(scene, ("gold",))
    render.geometry.cache_clear()
    assert (first == render.render(scene, ("gold",))).all() and first.shape == (64, 64, 3) and (first != render.render({**scene, "seed": 4}, ("gold",))).any()
    raises(ValueError, "plaid", render.render, scene, ("plaid",))
    for i, name in enumerate(concepts.OBJECTS):
        g, inside = render.Geometry({"object": name, "seed": i}), np.zeros(128 * 128, bool)
        seen = np.stack([g.shade("grey", "cream", a).astype(np.float32) for a in [(), *((a,) for a in concepts.TYPE_OF)]]).reshape(46, -1)
        apart = np.abs(seen[:, None] - seen[None]).mean(2) + 99 * np.eye(46)                # grey levels over the whole picture
        assert apart.min() > .9, (name, apart.min(), divmod(int(apart.argmin()), 46))
        inside[g.pixels.numpy()] = True
        inside = inside.reshape(64, 2, 64, 2).any((1, 3))
        a, b = g.shade("white", "lilac"), g.shade("white", "lilac", ("navy",))
        assert (a[~inside] == b[~inside]).all() and (a[inside] != b[inside]).any(1).mean() > .7
        for color in concepts.COLORS:
            for wall in concepts.WALLS:
                assert (canny(g.shade(color, wall))[inside] > 0).sum() >= 40, (name, color, wall)

def test_mini_checkpoints_are_small_and_public_in_layout():
    """What git tracks in mini/ weighs under 25 MB; a held-out render survives the autoencoder with 26 dB; peers read all picture checkpoints, no weight missing or unexpected."""
    tracked = subprocess.run(["git", "ls-files", "mini"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert sum((ROOT / f).stat().st_size for f in tracked if (ROOT / f).is_file()) < 25e6
    vae, edits = VAE.load(MINI / "flux/vae").requires_grad_(False), (("mug", ("hot pink",)), ("bag", ("forest",)), ("apple", ()))
    x = torch.stack([flux.to_tensor(render.render({"object": o, "color": "white", "wall": "lilac", "seed": 2_000_000 + i}, a)) for i, (o, a) in enumerate(edits)])
    assert -10 * math.log10((vae.decode(vae.encode(x)).clamp(-1, 1) - x).square().mean().item() / 4) > 26
    for library, kind, part in (("diffusers", "AutoencoderKL", "flux/vae"), ("diffusers", "FluxTransformer2DModel", "flux/transformer"), ("diffusers", "FluxControlNetModel", "controlnet"),
                                ("transformers", "CLIPTextModel", "flux/text_encoder"), ("transformers", "T5EncoderModel", "flux/text_encoder_2"), ("transformers", "Dinov2Model", "vit")):
        found = getattr(peer(library), kind).from_pretrained(ROOT / "mini" / part, output_loading_info=True)[1]
        assert set(found["missing_keys"]) <= {"embeddings.mask_token", "encoder.embed_tokens.weight"} and not found["unexpected_keys"], (kind, found)

def train_here(*flags):
    """train.main in this process, quietly -> the words it ended with, if it was stopped."""
    with quiet():
        try:
            train.main([str(flag) for flag in flags])
        except SystemExit as end:
            return str(end)

@functools.cache
def prepared():
    """(flags of a tiny cdpo run, its folder): a graph run and an SFT run on the shipped sample, made once for the tests below."""
    prepared.folder = tempfile.TemporaryDirectory()
    d = Path(prepared.folder.name)
    train_here("graph", "--steps", 5, "--users", SAMPLE["users"], "--out", d / "graph")
    train_here("sft", "--steps", 2, "--batch", 4, "--edits", SAMPLE["edits"], "--out", d / "sft")
    return ["cdpo", "--users", SAMPLE["users"], "--pairs", SAMPLE["pairs"], "--sft", d / "sft", "--graph", d / "graph", "--batch", 8, "--micro", 4, "--save-every", 1], d

def stage(*flags):
    """(CDPO stage, its flags) of the prepared runs."""
    with quiet():
        args = train.parse([str(f) for f in [*prepared()[0], "--out", prepared()[1] / "run", *flags]])
        return train.CDPO(args), args

def test_train_resume_is_bit_exact():
    """A run killed by SIGKILL, continued, ended by SIGTERM and continued again has the bytes of an uninterrupted one, metrics included."""
    flags, d = [*prepared()[0], "--steps", 12, "--out"], prepared()[1]
    train_here(*flags, d / "whole")
    for at, sign in ((3, signal.SIGKILL), (6, signal.SIGTERM)):
        process = subprocess.Popen([sys.executable, "train.py", *map(str, flags), d / "torn"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=ONE_THREAD)         # as in this process: sums of several threads have other last bits
        while process.poll() is None and not any(int(p.name[5:]) >= at for p in (d / "torn").glob("step_*")):
            time.sleep(0.005)
        process.send_signal(sign)
        message = process.communicate()[1]
        assert not (d / "torn/adapter_model.safetensors").exists()
    assert "the same command continues" in message
    train_here(*flags, d / "torn")
    for name in ("adapter_model.safetensors", "collaborative.safetensors", "metrics.jsonl"):
        assert (d / "whole" / name).read_bytes() == (d / "torn" / name).read_bytes(), name

def test_train_one_two_and_four_processes_take_the_same_step():
    """torchrun with two gloo processes (cdpo) and with four (sft with dropout) takes the gradient of one process to 1e-6, and its step to 1e-5."""
    flags, d = prepared()
    for n, of in ((2, flags), (4, ["sft", "--batch", 8, "--micro", 2, "--dropout", 0.3, "--edits", SAMPLE["edits"]])):
        train_here(*of, "--steps", 1, "--out", d / f"one{n}")
        out = shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py", *of, "--steps", 1, "--out", d / f"{n}")
        assert out.returncode == 0, out.stderr[-1000:]
        one, more = (load_file(d / name / "step_1/state.safetensors") for name in (f"one{n}", f"{n}"))
        for part, bound in (("exp_avg:", 1e-6), ("", 1e-5)):
            assert relative(*(torch.cat([s[name].flatten() for name in sorted(one) if name.startswith(part)]) for s in (more, one))) < bound, (n, part)

def test_train_lambda_zero_is_user_dpo():
    """With lambda 0 the loss is DPO's of the batch's own pairs under their own users, written out here; DPO-Vanilla starts at ln 2; micro-batches do not change a gradient."""
    s, args = stage("--lam", 0, "--nll", 0)
    rows = s.rows(0)
    own = [i for i, near in rows if not near]
    assert len(own) == len(rows) == 8
    texts = [s.encode(p["caption"], p["chosen"], p["rejected"], guidance=p["guidance"]) for p in (s.pairs[i] for i in own)]
    logp, ref = cdpo.answer_logprobs(s.model, texts, s.tokens.soft(s.tokens.embeddings(s.keep)[[s.owner[i] for i in own]])), s.reference[own]
    want = torch.log1p(torch.exp(-args.beta * ((logp[:, 0] - logp[:, 1]) - (ref[:, 0] - ref[:, 1])))).sum()
    assert relative(s.loss(rows)[0], want) < 1e-6
    vanilla, _ = stage("--user", "none", "--nll", 0)
    assert abs(vanilla.loss(vanilla.rows(0))[0].item() / 8 - math.log(2)) < 1e-6
    (s, args), grads = stage("--lam", 0.5), []
    for args.micro in (4, 8, 3):
        train.gradients(s, args, 0, False)
        grads.append(torch.cat([p.grad.flatten() for p in s.trained.values()]))
    assert relative(grads[1:], grads[:1] * 2) < 1e-6

def test_train_moves_only_lora_gnn_and_soft_tokens():
    """After training, base weights and reference adapter are bit-identical, and every LoRA, GNN, soft-prompt tensor and user vector has moved."""
    s, args = stage("--out", prepared()[1] / "moved", "--drop", 0, "--steps", 6)
    before = {name: p.clone() for name, p in [*s.model.named_parameters(), *s.tokens.named_parameters()]}
    with quiet():
        train.fit(s, args)
    moved = {name for name, p in [*s.model.named_parameters(), *s.tokens.named_parameters()] if not same(p, before[name])}
    still = set(before) - moved
    assert moved <= {name.removeprefix("collaborative.") for name in s.trained} and any("reference" in n for n in still) and not any("policy" in n for n in still)
    assert all(n.startswith("sage.to_attribute.1") for n in still & dict(s.tokens.named_parameters()).keys())      # h_u never reads these

def test_train_neighbours_terms_are_defined_at_the_edges(tmp_path):
    """k beyond the number of users, users without likes or pairs, one sampled neighbour, the other reading: finite, nobody without pairs is read; empty files are refused."""
    users, file = lines(ROOT / SAMPLE["users"]), tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in lines(ROOT / SAMPLE["pairs"]) if pair["user"] != users[1]["user"]))
    for more in (["--k", 50], ["--neighbours", "sampled"], ["--neighbour-user", "neighbour"], ["--similarity", "shared"]):
        s, args = stage("--pairs", file, "--lam", 0.5, *more)
        rows = s.rows(0)
        assert s.loss(rows)[0].isfinite() and any(near for _, near in rows)
        assert all(s.owner[pair] == v != 1 and score > 0 and v != s.owner[own] for own, near in rows for v, pair, score in near)
        assert max(len(near) for _, near in rows) <= (1 if "sampled" in more else 10)
    file.write_text('{"user": "nobody", "caption": "a", "chosen": "b", "rejected": "c"}\n')
    raises(ValueError, "pairs.jsonl:1: user 'nobody' is not in", stage, "--pairs", file)
    file.write_text("")
    for part, *flags in (("holds no pair", *prepared()[0], "--pairs", file), ("holds no edit", "sft", "--edits", file), ("holds no user", "graph", "--users", file)):
        raises(ValueError, part, train_here, *flags, "--out", tmp_path / "x")

def test_train_refuses_two_runs_other_flags_and_lost_numbers():
    """A second run on one folder, a continuation with other flags, a NaN loss and a full disk each end in one sentence; the checkpoint before stays whole."""
    flags, d = prepared()
    flags = [*flags, "--steps", 2, "--out", d / "held"]
    train_here(*flags)
    raises(ValueError, "holds a run with beta = 0.2, now it is 0.3", train_here, *flags, "--beta", 0.3)
    with train.lock(d / "held"):
        assert f"process {os.getpid()}" in raises(ValueError, "is being written by another run", train_here, *flags)
    state = (d / "held/step_2/state.safetensors").read_bytes()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    raises(ValueError, "No space left on device", train.publish, d / "held/step_2", full, "step 3")
    assert (d / "held/step_2/state.safetensors").read_bytes() == state and not list((d / "held").glob(".tmp*"))
    s, args = stage("--out", d / "nan")
    s.tokens.soft.fc2.bias.data[0] = float("nan")
    with quiet():
        assert "pairs.jsonl, lines" in raises(ValueError, "the step was not taken", train.fit, s, args)
    assert not list((d / "nan").glob("step_*"))

def test_train_presets_and_order_are_as_promised():
    """--preset paper is Table 12, and nothing of ours that would change its loss; an epoch holds every item once, by seed and epoch alone; warm-up, then half a cosine."""
    for name, want in {"cdpo": dict(steps=3000, batch=12, lr=2e-7, gnn_lr=2e-8, k=3, lam=0.15, tokens=8, nll=0, similarity="shared", drop=0),
                       "sft": dict(steps=9375, batch=16, lr=2e-6, rank=16, alpha=32, dropout=0.05, dtype="bf16"),
                       "graph": dict(steps=150, lr=3e-5, hidden=1024, out_dim=1024, embedder="Linq-AI-Research/Linq-Embed-Mistral")}.items():
        assert want.items() <= vars(train.parse([name, "--preset", "paper"])).items(), name
    epoch = [i for step in range(5) for i in train.order(10, 4, 0, step)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10)) and epoch[:10] != epoch[10:]
    assert train.order(10, 4, 0, 3) == epoch[12:16] and train.order(10, 10, 1, 0) != epoch[:10]
    assert [round(train.schedule(s, 10, 2), 3) for s in (0, 1, 2, 6, 10)] == [0.333, 0.667, 1.0, 0.5, 0.0]

def test_train_judge_tells_well_formed_from_malformed():
    """An instruction counts when it ended, names one known attribute (the longest name), and is put together as the training instructions are."""
    texts = [(p["caption"], p[side]) for p in lines(ROOT / SAMPLE["pairs"]) for side in ("chosen", "rejected")]
    user, caption = User("x", ["neon green"], ["gold"], ["forest"]), "A white bowl in front of a grey wall"
    judge = train.Judge([user, *graph.read_users(ROOT / SAMPLE["users"])], texts)
    good = {"likes": False, "would like": True, "hit": True, "dislikes": False, "malformed": False}
    assert judge(user, caption, "Change the background to forest", True) == good
    for text, ended in (("Change the background to forest", False), ("Change the to forest", True), ("Change the background to forest forest", True), ("", True),
                        ("Change the background to purple-ish", True), ("Add gold and forest", True)):
        assert judge(user, caption, text, ended)["malformed"], text
    assert all(not judge(user, c, t, True)["malformed"] for c, t in texts if len(judge.names.findall(t)) == 1)

def ramp(height=30, width=40):
    """A picture in which no two corners are alike: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x], -1).astype(np.uint8)

def test_edit_reads_any_photograph(tmp_path):
    """Sixteen-bit, float, palette, CMYK, transparent, rotated, animated, one-bit and one-pixel pictures come out upright, 8-bit RGB, as bright; any size fits into multiples of 16."""
    rgb, gray = Image.fromarray(ramp()), ramp()[..., 0]
    deep, bit = gray.astype(np.uint16) * 257, gray > 127
    clear, exif = Image.fromarray(np.dstack([ramp(), 255 * bit.astype(np.uint8)])), Image.Exif()
    exif[0x0112] = 6                                         # the camera lay on its side: turn clockwise to see it upright
    white, grays = np.where(bit[..., None], ramp(), 255), np.stack([gray] * 3, -1)
    for name, image, want, how in (("a.png", rgb, ramp(), {}), ("a.bmp", rgb, ramp(), {}), ("a.tiff", rgb, ramp(), {}), ("cmyk.tiff", rgb.convert("CMYK"), ramp(), {}),
                                   ("a.webp", rgb, ramp(), dict(lossless=True)), ("16.png", Image.fromarray(deep), grays, {}), ("16.tiff", Image.fromarray(deep), grays, {}),
                                   ("32.tiff", Image.fromarray(deep.astype(np.int32)), grays, {}), ("float.tiff", Image.fromarray((gray / 255).astype(np.float32)), grays, {}),
                                   ("8.png", Image.fromarray(gray), grays, {}), ("la.png", Image.fromarray(gray).convert("LA"), grays, {}), ("alpha.png", clear, white, {}),
                                   ("dark.png", Image.fromarray(deep // 300), grays * (257 / 300 / 257), {}), ("bit.png", Image.fromarray(bit), np.stack([bit * 255] * 3, -1), {}),
                                   ("dot.png", Image.new("RGB", (1, 1), "red"), np.array([[[255, 0, 0]]]), {})):
        image.save(tmp_path / name, **how)
        got = np.array(edit.read_image(tmp_path / name)).astype(int)
        assert got.shape == want.shape and np.abs(got - want).max() <= 1, name
    clear.quantize(16).save(tmp_path / "palette.png"), rgb.save(tmp_path / "gif.gif", save_all=True, append_images=[Image.new("RGB", rgb.size, "blue")])
    Image.fromarray(np.rot90(ramp()).copy()).save(tmp_path / "exif.jpg", exif=exif, quality=95)
    assert edit.read_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255) and edit.read_image(tmp_path / "gif.gif").getpixel((39, 0))[0] > 200
    assert np.abs(np.array(edit.read_image(tmp_path / "exif.jpg")).astype(int) - ramp())[..., :2].mean() < 6
    for width, height in ((1, 1), (1000, 10), (3, 4000), (4032, 3024), (640, 480), (17, 1023)):
        h, w, _ = edit.fit(Image.new("RGB", (width, height)), 256, 16).shape
        assert h % 16 == w % 16 == 0 and 0.8 < h * w / 256 ** 2 < 1.25 and 1 / 4.5 <= w / h <= 4.5, (width, height, w, h)
    exact = ramp(64, 64)
    assert (edit.fit(Image.fromarray(exact), 64, 16) == exact).all(), "a picture that fits already is left alone"

def test_edit_says_in_one_sentence_what_is_wrong(tmp_path):
    """No picture, half a picture, wrong flags, an unknown person, an unwritable place: one sentence that names it, before any model is loaded, and exit code 2."""
    Image.fromarray(ramp(200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("not a picture"), (tmp_path / "empty.jpg").write_bytes(b""), (tmp_path / "dir.png").mkdir()
    for name in ("cut.png", "text.png", "empty.jpg", "dir.png", "absent.png"):
        assert "\n" not in raises(ValueError, name, edit.read_image, tmp_path / name)
    for flags, part in (("--image x.png", "--caption"), ("--strength 1.5", "0 .. 1"), ("--likes red --dislikes red", "'red'"), ("--user ana --likes red", "one or the other"),
                        ("--out edit.jpg", ".png"), ("--control-start .8 --control-end .2", "--control-end"), ("--image nothing.png --caption x", "nothing.png"),
                        ("--prompt {captoin}", "captoin"), ("--flux mini/nowhere", "mini/nowhere")):
        with quiet():
            raises(ValueError, part, edit.main, flags.split())
    done = shell("edit.py", "--user", "glamor-stylist")
    assert done.returncode == 2 and "nearest: glamour-stylist" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

def edited(at, name, *flags):
    """One run of edit.main at few steps -> (picture, record)."""
    with quiet():
        edit.main(["--steps", "3", "--out", f"{at / name}.png", *flags])
    with Image.open(at / f"{name}.png") as image:
        record = json.loads((at / f"{name}.json").read_text())
        assert json.loads(image.text["edit"]) == record, "the PNG's text is not the JSON beside it"
        return np.array(image), record

def test_edit_of_several_people_equals_each_alone_bit_for_bit(tmp_path):
    """The same seed gives the same bits twice, alone, in company or with --offload; another seed another picture; the grid shows the source and everybody."""
    sheet, record = edited(tmp_path, "all")
    assert [r["user"] for r in record["edits"]] == edit.PERSONAS and sheet.shape[1] > 4 * 256
    for i, name in enumerate(edit.PERSONAS[:2]):
        picture, alone = edited(tmp_path, "alone", "--user", name)
        assert (picture == np.array(Image.open(tmp_path / f"all_{name}.png"))).all() and alone["instruction"] == record["edits"][i]["instruction"]
    assert (edited(tmp_path, "offloaded", "--user", name, "--offload")[0] == picture).all()
    assert (edited(tmp_path, "other", "--user", name, "--seed", "1")[0] != picture).any()

def test_edit_leaves_the_controlnet_alone_where_its_scale_is_0(tmp_path):
    """At scale 0, outside its fractions, or without a picture the net is not even looked for; at strength 0 the source comes back, up to the autoencoder."""
    nowhere = ["--controlnet", str(tmp_path), "--user", edit.PERSONAS[0]]        # an empty folder: reading it would fail
    cases = {"plain": [*nowhere, "--control-scale", "0"], "never": [*nowhere, "--control-start", ".4", "--control-end", ".6"], "drawn": [*nowhere, "--caption", "A white vase"],
             "held": ["--user", edit.PERSONAS[0]], "source": [*nowhere, "--strength", "0"]}
    found = {name: edited(tmp_path, name, *flags) for name, flags in cases.items()}
    plain, never, drawn, held, source = (picture for picture, _ in found.values())
    assert (plain == never).all() and drawn.shape == plain.shape and (drawn != plain).any() and (held != plain).any()
    assert np.abs(source - np.array(edit.read_image(ROOT / found["source"][1]["settings"]["image"])).astype(float)).mean() < 12

def test_edit_knows_a_stranger_by_likes_and_says_when_it_cannot(tmp_path):
    """Likes alone make a user; likes nobody shares are named; a user without any gets the generic edit, the same whatever the name, and a note that says so."""
    _, mine = edited(tmp_path, "mine", "--likes", "gold, crown, marble", "--dislikes", "moonlight")
    _, odd = edited(tmp_path, "odd", "--likes", "gold, crown, quux, marble", "--dislikes", "moonlight")
    assert odd["instruction"] == mine["instruction"] and "quux" in odd["note"] and not mine["note"]
    (none, empty), (alike, quux) = edited(tmp_path, "empty", "--likes", ""), edited(tmp_path, "quux", "--dislikes", "quux")
    assert "generic" in empty["note"] and "generic" in quux["note"] and (none == alike).all()

def test_edit_paints_what_reference_pictures_show(tmp_path):
    """A reference changes the picture, a second one again, scale 0 takes both away; nobody asked: the caption is the prompt; it works for a user beside the ControlNet, too."""
    mug, apple, ask = "mini/sample/scenes/01_mug.png", "mini/sample/scenes/00_apple_balloon.png", ["--caption", "Place the mug in front of forest", "--reference"]
    cases = {"one": [*ask, mug], "two": [*ask, mug, apple], "none": [*ask, mug, apple, "--reference-scale", "0"], "nothing": [*ask, apple, "--reference-scale", "0"],
             "bare": ["--user", edit.PERSONAS[0], "--image", mug, "--caption", "A mug"], "seen": ["--user", edit.PERSONAS[0], "--image", mug, "--caption", "A mug", "--reference", apple]}
    found = {name: edited(tmp_path, name, *flags) for name, flags in cases.items()}
    one, two, none, nothing, bare, seen = (picture for picture, _ in found.values())
    assert (one != two).any() and (none != one).any() and (none == nothing).all() and (seen != bare).any()
    assert found["one"][1]["prompt"] == ask[1] and found["one"][1]["user"] == "nobody" and found["seen"][1]["instruction"]
    raises(ValueError, "--caption", edit.main, ["--reference", mug])

def test_patch_quality_is_the_best_cosine_and_a_spoiled_patch_weighs_nothing():
    """Eq. 3 equals loops over maps of different sizes; min-max gives the only foreign patch 0 and the best 1, "clip" keeps the level, as do patches that are all alike."""
    x, ref = torch.randn(2, 3, 4, 8, generator=seeded()), torch.randn(2, 2, 5, 8, generator=seeded(1))
    loop = [[[max(torch.cosine_similarity(x[b, i, j], r, dim=0) for r in ref[b].flatten(0, 1)) for j in range(4)] for i in range(3)] for b in range(2)]
    assert relative(patch_dpo.patch_quality(x, ref), torch.tensor(loop)) < 1e-6 and torch.allclose(patch_dpo.patch_quality(x, 3 * x), torch.ones(2, 3, 4))
    ref = torch.randn(1, 4, 4, 16, generator=seeded(1))
    gen = ref + 0.1 * torch.randn(1, 4, 4, 16, generator=seeded(2))
    gen[0, 1, 2] = -ref.mean((0, 1, 2))
    quality = patch_dpo.patch_quality(gen, ref)
    weight = patch_dpo.patch_weights(quality, (4, 4))
    assert weight[0, 1, 2] == 0 and weight.max() == 1 and weight.flatten().sort().values[1] > 0.9
    assert relative(patch_dpo.patch_weights(quality, (4, 4), "clip"), quality.clamp(0, 1)) < 1e-6
    assert same(patch_dpo.patch_weights(torch.full((1, 4, 4), 0.7), (8, 8)), torch.full((1, 8, 8), 0.7))
    assert all(w.shape == (1, *s) and 0 <= w.min() and w.max() <= 1 for s in ((2, 2), (8, 12)) for w in [patch_dpo.patch_weights(quality, s)])
    raises(ValueError, "minmax", patch_dpo.patch_weights, quality, (4, 4), "softmax")

def test_patch_losses_are_the_papers_and_the_authors_numbers():
    """PatchDPO: supplement (power 2), twice the authors' mean (power 1), flow matching for equal weights; Diffusion-DPO: published, ln 2 at the start; DRO: max(m, ...) - m."""
    gen, ref, p_gen, p_ref = *torch.randn(2, 2, 3, 4, 5, generator=seeded()), *torch.rand(2, 2, 4, 5, generator=seeded())
    paper = (gen * p_gen[:, None]).square().mean((1, 2, 3)) + (ref * (1 - p_ref[:, None])).square().mean((1, 2, 3))
    authors, half = (torch.cat([1 - p_ref, p_gen])[:, None] * torch.cat([ref, gen]) ** 2).mean(), torch.full_like(p_gen, 0.5)
    assert relative(patch_dpo.patch_dpo_loss(gen, ref, p_gen, p_ref), paper) < 1e-6
    assert relative(patch_dpo.patch_dpo_loss(gen, ref, p_gen, p_ref, power=1).mean(), 2 * authors) < 1e-6
    assert relative(patch_dpo.patch_dpo_loss(gen, ref, half, half, power=1).mean(), torch.cat([gen, ref]).square().mean()) < 1e-6
    w, l, rw, rl = torch.rand(4, 6, generator=seeded())
    assert relative(patch_dpo.diffusion_dpo_loss(w, l, rw, rl, 100), -torch.log(torch.sigmoid(-50 * ((w - l) - (rw - rl)).double()))) < 1e-5
    assert torch.allclose(patch_dpo.diffusion_dpo_loss(w, l, w, l, 100), torch.full((6,), math.log(2)))
    assert torch.allclose(patch_dpo.dro_loss(w, rw, l, rl), torch.maximum(torch.tensor(-0.001), -(rw - w) + (rl - l)) + 0.001, atol=1e-7)
    expert, policy = torch.tensor([0.5, 0.2], requires_grad=True), torch.zeros(2, requires_grad=True)       # while the policy is its own sampler: the expert's gradient or none
    patch_dpo.dro_loss(expert, torch.tensor([0.4, 0.4]), policy.square(), torch.tensor([0.1, 0.1])).sum().backward()
    assert expert.grad.tolist() == [1.0, 0.0] and policy.grad.abs().max() == 0
    x, W, p, eta = torch.randn(8, generator=seeded(2)), torch.randn(8, 8, generator=seeded(3), requires_grad=True), torch.linspace(0, 1, 8), 0.05
    target = (W @ x).detach() - 1.0                                     # supplement S1's linear model; the same error, 1, in every element: only p differs
    error = (W @ x - target)[None, None, None]                          # (1, 1, 1, 8)
    patch_dpo.patch_dpo_loss(error, torch.zeros_like(error), p[None, None], p[None, None]).sum().backward()
    delta = ((W - eta * W.grad) @ x - target).detach() ** 2 - 1
    assert relative(delta, (1 - 2 * eta / 8 * p ** 2 * x.square().sum()) ** 2 - 1) < 1e-5      # / 8: our norm is a mean
    assert (delta.abs().diff() > 0).all() and delta[0].abs() < 1e-6, "a larger p_i moves its error more, p_i = 0 not at all"

def test_patch_features_equal_the_peers(tmp_path):
    """DINOv2 and both ViT layouts: the last feature map of random checkpoints with public preprocessing, at the trained size and another."""
    tf, (mean, std) = peer("transformers"), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    tf.logging.disable_progress_bar()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    size = {k: ENCODER[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")}
    vit = tf.ViTConfig(**size, intermediate_size=64)
    for model in (tf.Dinov2Model(tf.Dinov2Config(**size, layerscale_value=0.5)), tf.ViTModel(vit), tf.ViTForImageClassification(vit)):
        loud(model).save_pretrained(tmp_path)
        ours, extra = ImageFeatures.load(tmp_path), {} if isinstance(model, tf.Dinov2Model) else {"interpolate_pos_encoding": True}
        for h, w in ((32, 32), (48, 24)):
            image = torch.rand(2, 3, h, w, generator=seeded())
            pixels = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            theirs = getattr(model, "vit", model)(pixels, **extra).last_hidden_state
            assert relative([ours.tokens(2 * image - 1), ours(2 * image - 1)], [theirs, theirs[:, 1:].view(2, h // 8, w // 8, 32)]) < 1e-4

def test_patch_correspondence_follows_the_picture(tmp_path):
    """In a picture of its own coordinates the patch found in the other view shows the same place; a HPatches homography is read in pixels; an empty folder is named."""
    assert patch_dpo.correspondence(torch.eye(3)[None], 4, 6)[0].tolist() == list(range(24))
    a, b = (patch_dpo.random_views(2, seeded(i)) for i in range(2))
    place = patch_dpo.centres(64, 64).permute(2, 0, 1).expand(2, 2, 64, 64)
    place_a, place_b = (nn.functional.avg_pool2d(patch_dpo.warp(place, view), 8).flatten(2) for view in (a, b))      # (2, 2, 64)
    for here, there, target in zip(place_a, place_b, patch_dpo.correspondence(torch.linalg.inv(b) @ a, 8, 8)):
        seen = target >= 0
        assert seen.sum() > 10 and (here[:, seen] - there[:, target[seen]]).norm(dim=0).max() < 2 / 8
    shift, big = tmp_path / "v_shift", np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
    shift.mkdir()
    for k in range(1, 7):
        Image.fromarray(big[:, 8 * (k > 1):][:, :32]).save(shift / f"{k}.ppm")
        np.savetxt(shift / f"H_1_{k}", [[1, 0, -8], [0, 1, 0], [0, 0, 1]])
    name, first, second, transform = next(patch_dpo.hpatches(tmp_path, 32))
    assert name == "v_shift" and same(first[:, :, 8:], second[:, :, :24]) and patch_dpo.correspondence(transform[None], 4, 4)[0, 4:8].tolist() == [-1, 4, 5, 6]
    raises(ValueError, "1.ppm", lambda: next(patch_dpo.hpatches(shift, 32)))

def test_patch_training_of_f_raises_s_patch():
    """A few steps of the self-supervised loss on fixed pictures raise the patch matching score on unseen views of them."""
    torch.manual_seed(0)
    f, g = ImageFeatures(ENCODER, [0.5] * 3, [0.5] * 3), seeded(1)
    image = nn.functional.interpolate(2 * torch.rand(8, 3, 8, 8, generator=g) - 1, 32, mode="bicubic").clamp(-1, 1)
    a, b = (patch_dpo.random_views(8, seeded(seed)) for seed in (5, 6))
    score = lambda: patch_dpo.s_patch(f(patch_dpo.warp(image, a)), f(patch_dpo.warp(image, b)), patch_dpo.correspondence(torch.linalg.inv(b) @ a, 4, 4))
    before, adam = score(), torch.optim.Adam(f.parameters(), 2e-3)
    for _ in range(60):
        loss = patch_dpo.self_supervised_loss(f, image, g)
        adam.zero_grad(), loss.backward(), adam.step()
    assert score()[0] > before[0] + 0.1 and score()[1] >= score()[0], (before, score())

def test_patch_image_prompt_adds_one_attention_for_each_reference(tmp_path):
    """Untrained it changes nothing; one reference is Eq. S6 and two add up (S7); saved and loaded it is the same, for other features it is refused; None takes it away."""
    c = flux_config(guided=False, singles=2)
    model, x = loud(Flux(c)), flux_inputs(c, h=8, w=8) | {"img_ids": image_ids(8, 8)}
    prompt, references, plain, q = ImagePrompt(model, 24), torch.randn(2, 2, 4, 24), model(**x), torch.randn(2, 3, 16, 16)

    def added(seen, by=prompt):
        by.look(model, seen, x["img_ids"])
        return model.transformer_blocks[0].attn.image_prompt(q)
    added(references)
    assert same(model(**x), plain), "values start at zero"
    loud(prompt)
    one, two = added(references[:, :1]), added(references)
    moved = model(**x)
    k, v = ((references[:, 0] @ w[0].weight.T).unflatten(-1, (3, 16)) for w in (prompt.to_k_ip, prompt.to_v_ip))
    corners = flux.rope_table(torch.tensor([[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 2.5, 0.5], [0, 2.5, 2.5]]), model.axes)     # 2 x 2 patches over 4 x 4 tokens
    turned_q = flux.rotate(q.transpose(1, 2), flux.rope_table(x["img_ids"], model.axes)).transpose(1, 2)
    assert relative(one, torch.softmax(turned_q @ flux.rotate(k, corners).transpose(1, 2).mT / 4, -1) @ v.transpose(1, 2)) < 1e-5
    assert relative(two, one + added(references[:, 1:])) < 1e-5 and relative(moved, plain) > 1e-3
    prompt.save(tmp_path / "prompt.safetensors")
    added(references, ImagePrompt.load(tmp_path / "prompt.safetensors", model, 24))
    assert same(model(**x), moved)
    raises(ValueError, "to_k_ip.0.weight", ImagePrompt.load, tmp_path / "prompt.safetensors", model, 25)
    prompt.look(model, None)
    assert same(model(**x), plain) and not any("ip" in name for name, _ in model.named_parameters())

def picture_flags(root):
    """Writes three scenes with three edits each, of the shipped pictures -> flags for train.py on the shipped models at 16 pixels."""
    edits = [{**e, "image": str(MINI / "sample" / e["image"])} for e in lines(MINI / "sample/scenes.jsonl")[0]["edits"]]
    scenes = [[next(e for e in edits[i:] if e["edit_type"] == kind) for kind in ("background", "lighting", "color")] for i in range(3)]
    (root / "scenes.jsonl").write_text("".join(json.dumps({"image": three[0]["image"], "caption": "a mug", "edits": three}) + "\n" for three in scenes))
    return ["--scenes", root / "scenes.jsonl", "--size", 16, "--held-out", 1, "--steps", 4, "--batch", 4, "--micro", 2, "--paint-steps", 3, "--warmup", 0, "--lr", 1e-2, "--device", "cpu"]

def test_patch_every_loss_trains_on_the_pictures_that_were_generated_once(tmp_path):
    """PatchDPO paints, judges and keeps; the other losses use the same pictures and start alike; checkpointing changes no gradient (it must recompute with the policy's prompt)."""
    flags = picture_flags(tmp_path)
    train_here("patch", "--loss", "start", "--out", tmp_path / "start", *flags)
    flags += ["--image-prompt", tmp_path / "start/image_prompt.safetensors", "--generated", tmp_path / "generated"]
    train_here("patch", "--out", tmp_path / "first", "--feature-steps", 2, *flags)
    times = lambda: {f.name: f.stat().st_mtime_ns for f in (tmp_path / "generated").iterdir()}
    made, before = times(), json.loads((tmp_path / "first/report.json").read_text())
    assert load_file(tmp_path / "generated/quality.safetensors")["reference"].shape == (4, 2, 2, 2) and len(made) == 8 + 5       # 2 scenes x 2 edits x 2 pictures
    assert ImageFeatures.load(tmp_path / "generated")(torch.rand(1, 3, 16, 16)).shape == (1, 2, 2, 96)
    for name, *more in (("power", "--power", 1), ("same", "--loss", "reconstruction"), ("dro", "--loss", "dro"), ("dpo", "--loss", "dpo"), ("less", "--loss", "dpo", "--checkpointing")):
        train_here("patch", "--out", tmp_path / name, *more, *flags)
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert all(abs(report[k] - before[k]) < 1e-6 for k in report if k.startswith("before")) and report["after identity"] != report["before identity"], name
    a, b = (load_file(tmp_path / name / "image_prompt.safetensors") for name in ("dpo", "less"))
    assert made == times() and max(relative(a[k], b[k]) for k in a) < 1e-5
    for part, held in (("other prompts", 2), ("leaves none", 3)):
        raises(ValueError, part, train_here, "patch", "--out", tmp_path / "x", *flags, "--held-out", held)

def test_patch_dro_resumed_inside_a_refresh_period_is_bit_equal(tmp_path):
    """Stopped by a signal after step 3 of 4 (M = 2) and continued, the LoRA is the whole run's bit for bit; the sampler is the base, then the policy; its points are Euler's."""
    flags, loss, seen = ["dro", "--refresh", 2, "--buffer", 4, "--rank", 2, "--save-every", 100, *picture_flags(tmp_path)], train.DRO.loss, []
    train_here(*flags, "--out", tmp_path / "whole")

    def interrupted(self, rows):
        seen.append(rows[0][2])
        if seen == [0, 0, 1]:
            signal.raise_signal(signal.SIGINT)
        return loss(self, rows)
    with mock.patch("train.DRO.loss", interrupted):
        assert "step 3 of 4" in train_here(*flags, "--out", tmp_path / "halves")
    train_here(*flags, "--out", tmp_path / "halves")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert all(same(a[k], b[k]) for k in a) and any(v.any() for k, v in a.items() if "lora_B" in k)
    drift = [line["drift"] for line in lines(tmp_path / "whole/metrics.jsonl")]
    assert drift[:2] == [0, 0] and drift[2] > 0                          # 0 only where a drawn point comes with its own velocity, time and prompt
    noise, speed = torch.randn(3, 4, 2), torch.tensor([1.0, 2.0, 3.0])
    path = patch_dpo.record(lambda x, t: speed[:, None, None].expand_as(x), noise, torch.arange(3), 5, seeded())
    assert 0 <= path.t.min() and path.t.max() <= 1 and relative(path.t.diff(dim=1), torch.full((3, 4), -0.2)) < 1e-5
    assert relative(path.x[:, 4], noise - 0.8 * speed[:, None, None]) < 1e-5

def readme_table(text, header):
    """The rows of the README's Markdown table with this header, each a list of cells."""
    assert f"| {header} |" in text, f"README.md has no table | {header} |"
    rows = text.split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]

def test_readme_is_true():
    """Code quoted in the equation map stands in the function it names; commands name files and flags that exist; the file table counts lines; there are at most 250."""
    text = (ROOT / "README.md").read_text()
    for file, rest in re.findall(r"(?:python|torchrun [^`\n]*?) ([\w/]+\.py)([^`\n#&|]*)", text):
        source, words = (ROOT / file).read_text(), shlex.split(rest.replace("STAGE", "cdpo"))
        if file in ("train.py", "edit.py") and "-h" not in words:
            {"train.py": train, "edit.py": edit}[file].parse(words)
        assert file in ("train.py", "edit.py") or all(word in source for word in words if word.startswith("--")), (file, rest)
    for equation, where, code in readme_table(text, "equation | where | line of code"):
        file, name = where.split(":")
        node = ast.parse(source := (ROOT / file).read_text())
        for part in name.split("."):
            node = {child.name: child for child in node.body if hasattr(child, "name")}[part]
        assert any(code in line for line in ast.get_source_segment(source, node).splitlines()), f"{equation}: {code!r} is not in {where}"
    counts = {row[0]: row[-1] for row in readme_table(text, "file | what it is | equations | lines") if row[0].endswith(".py")}
    assert counts == {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")} and len(text.splitlines()) <= 250

def test_house_is_the_designs():
    """The top level holds DESIGN.md's files and no other; its files and mini/ import the standard library, the six pinned packages and one another, but never train or edit."""
    names = {"graph", "lora", "qwen", "cdpo", "flux", "controlnet", "patch_dpo", "train", "edit", "test_all"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.partition("/")[0] for name in tracked if name[0] != "."} == {f"{name}.py" for name in names} | {"README.md", "requirements.txt", "mini", "bench"}
    pinned = {line.partition("==")[0].replace("-", "_").replace("pillow", "PIL") for line in (ROOT / "requirements.txt").read_text().split()}
    assert pinned == {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "PIL"}
    for file in [ROOT / name for name in tracked if re.fullmatch(r"(mini/)?\w+\.py", name) and name != "test_all.py"]:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        beside = {f.stem for f in file.parent.glob("*.py")} | names
        assert not {name.partition(".")[0] for name in imported} - pinned - sys.stdlib_module_names - (beside - {"train", "edit", "test_all"}), file

def main(pattern=""):
    count = dict(passed=0, failed=0, skipped=0)
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and pattern in n]:
        start, outcome, why = time.time(), "passed", ""
        try:
            with tempfile.TemporaryDirectory() as at:
                test(*[Path(at)] * test.__code__.co_argcount)
        except unittest.SkipTest as error:
            outcome, why = "skipped", f": {error}"
        except (Exception, SystemExit):
            outcome, why = "failed", "\n" + traceback.format_exc()
        count[outcome] += 1
        print(f"{outcome:8s}{time.time() - start:6.1f} s  {name}{why}", flush=True)
    print(f"{count['passed']} passed, {count['failed']} failed" + (f", {count['skipped']} skipped" if count["skipped"] else ""))
    return int(count["failed"] > 0 or count["passed"] == 0)

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
