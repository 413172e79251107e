"""Every test, in one file: `python test_all.py`, or those whose name contains "canny": `python test_all.py canny`. No network, no peer needed; a GPU is left alone.

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
import cdpo, controlnet, edit, flux, graph, lora, patch_dpo, qwen, train, world
from controlnet import ControlNet, canny
from flux import T5, VAE, Flux, denoise, image_ids, pack, sigmas
from graph import PreferenceGraph, User
from patch_dpo import ImageFeatures, ImagePrompt
from qwen import Cache, Config, Qwen, Tokenizer, generate, load_checkpoint, resolve

MINI, SAMPLE = ROOT / "mini", {name: f"mini/sample/{name}.jsonl" for name in ("users", "pairs", "edits")}
ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, mlp_ratio=4, hidden_act="gelu", layer_norm_eps=1e-6,
               qkv_bias=True)
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}        # for the scripts it runs, too: a GPU does not give the same bits

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

def raises(part, function, *args, **kwargs):
    """The message of the ValueError that `function` must raise: one line that contains `part`."""
    with unittest.TestCase().assertRaises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.exception)
    assert part in message and "\n" not in message, f"the message {message!r} does not name {part!r} in one line"
    return message

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def loud(module):
    """The module, frozen, with random weights large enough that a wrong term shows; norms and biases are random too."""
    g = seeded()
    for p in module.eval().requires_grad_(False).parameters():
        p.copy_(1.5 * torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5 if p.dim() > 1 else (p == 1) + 0.2 * torch.randn(p.shape, generator=g))
    return module

def reload(theirs, kind):
    """What our `kind` reads from the files, in shards, that the peer's model writes."""
    with tempfile.TemporaryDirectory() as at:
        theirs.save_pretrained(at, max_shard_size="30KB")
        return kind.load(at)

def shell(*args):
    """Run one of our scripts as a user would: shell("train.py", "graph", "--steps", 3)."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=170)

@contextlib.contextmanager
def quiet():
    """In the repository's root, without a word."""
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield

def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]

def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

def tiny_qwen(**changes):
    """A random Qwen without peer or file: 4 heads over 2, or what `changes` says."""
    return loud(Qwen(Config(**{**dict(vocab=61, width=32, inner=48, layers=2, heads=4, kv_heads=2, head_dim=8, eps=1e-6, theta=1e4, qkv_bias=True,
                                      tied=True, headless=False, window=None, eos=(5,)), **changes})))

def tiny_lora(dtype=torch.float32, rank=2, alpha=4, **how):
    """tiny_qwen with adapters that do something."""
    model = tiny_qwen().to(dtype)
    lora.inject(model, rank, alpha, **how)
    return loud(model)

def peer_qwen(kind="Qwen2ForCausalLM", **changes):
    kind = getattr(peer("transformers"), kind)
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, eos_token_id=None)
    return loud(kind(kind.config_class(**{**sizes, **changes})))

def padded_batch():
    """ids (3, 17), and masks of 17, 11 and 6 tokens with padding on the right and on the left."""
    right = (torch.arange(17) < torch.tensor([17, 11, 6])[:, None]).long()
    return torch.randint(8, 61, (3, 17), generator=seeded(1)), right, right.flip(1)

def test_qwen_equals_transformers():
    """In every shape logits agree to 1e-5, greedy tokens are the same, bf16 is at most 1.2 times as far from fp32; embedded texts are the peer's last states."""
    ids, right, left = padded_batch()
    for shape in (dict(), dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=36), dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40),
                  dict(tie_word_embeddings=True), dict(kind="MistralForCausalLM", head_dim=10)):
        theirs, prompt = peer_qwen(**shape), ids.masked_fill(left == 0, 0)      # its repetition penalty counts padding too: let it be a token that nobody generates
        ours, exact = reload(theirs, Qwen), theirs(ids).logits
        for mask in (right, left):
            assert relative(ours(ids, mask)[mask > 0], theirs(ids, attention_mask=mask).logits[mask > 0]) < 1e-5, shape
        for how in (dict(attention_mask=left, max_new_tokens=12, repetition_penalty=penalty) for penalty in (1.0, 1.3)):
            assert generate(ours, prompt, **how) == theirs.generate(prompt, do_sample=False, **how)[:, 17:].tolist(), shape
        assert relative(ours.bfloat16()(ids), exact) < 1.2 * relative(theirs.bfloat16()(ids).logits, exact) < 0.1, shape
    tokenizer, texts = Tokenizer.load(MINI / "qwen"), ["red", "a very long text about a bowl", "x"]
    theirs = peer_qwen("MistralModel", vocab_size=tokenizer.fast.get_vocab_size())
    last = torch.cat([theirs(torch.tensor([tokenizer.encode(text)])).last_hidden_state[:, -1] for text in texts])
    assert relative(qwen.embed_texts(reload(theirs, Qwen), tokenizer, texts, batch_size=2), nn.functional.normalize(last, dim=-1)) < 1e-5

def test_qwen_row_is_the_same_alone_padded_cached_or_as_vectors():
    """Hidden states and greedy tokens of a row are those it has alone, padded on either side, in pieces, as vectors, compiled; RoPE depends on distances only."""
    model, (ids, right, left) = tiny_qwen(), padded_batch()
    rows, how, ends = [ids[i:i + 1, :n] for i, n in enumerate((17, 11, 6))], dict(max_new_tokens=9, repetition_penalty=1.2), (0, 5, 6, 14, 17)
    alone, embeds = torch.cat([model.model(row)[0] for row in rows]), model.model.embed_tokens(ids)
    for batch, mask in ((ids, right), (ids.masked_scatter(left > 0, ids[right > 0]), left)):
        cache = Cache(model.config, 3, 17, "cpu", torch.float32)
        pieces = torch.cat([model.model(batch[:, a:b], attention_mask=mask[:, :b], cache=cache) for a, b in zip(ends, ends[1:])], 1)
        assert relative([hidden[mask > 0] for hidden in (model.model(batch, attention_mask=mask), pieces)], [alone, alone]) < 1e-5
        assert generate(model, batch, attention_mask=mask, **how) == [generate(model, row, **how)[0] for row in rows]
    assert same(model(embeds=embeds), model(ids)) and generate(model, embeds=embeds) == generate(model, ids)
    assert relative(torch.compile(model, backend="aot_eager", fullgraph=True)(ids), model(ids)) < 1e-5
    q, k = torch.randn(2, 1, 1, 1, 16, generator=seeded())
    turned = lambda x, at: qwen.rotate(x, *qwen.rope_tables(torch.tensor([[at]]), 16, 1e4))
    near, far, other = ((turned(q, m) * turned(k, n)).sum() for m, n in ((3, 8), (103, 108), (3, 9)))
    assert abs(near - far) < 1e-4 < 1e-2 < abs(near - other)

def test_qwen_generation_stops_and_samples():
    """A row ends before its own first eos; sampling moves only its own generator and draws from exactly the top-k and top-p sets."""
    model, (ids, _, _), state = tiny_qwen(eos=()), padded_batch(), torch.get_rng_state()
    free = generate(model, ids, max_new_tokens=20)
    model.config.eos = eos = (free[0][6], free[1][9])
    assert generate(model, ids, max_new_tokens=20) == [row[:next((i for i, t in enumerate(row) if t in eos), 20)] for row in free] != free
    logits, how = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().repeat(400, 1), ((1.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.8), (0.1, 3, 0.99))
    assert [set(qwen.sample(logits, *given, seeded()).tolist()) for given in how] == [{0, 1, 2, 3, 4}, {0, 1}, {0, 1, 2}, {0}]
    one, two = (generate(model, ids, temperature=1.0, generator=seeded(1)) for _ in range(2))
    assert one == two and same(state, torch.get_rng_state())

def test_qwen_tokenizer_writes_the_template_of_transformers():
    """A chat is Qwen2.5's template, with its default system turn when none is given; tokens, chats and logits of mini/qwen are transformers'."""
    ours, messages = Tokenizer.load(MINI / "qwen"), cdpo.prompt("A white bowl in front of a grey wall", "with stripes")
    ids, text = ours.chat(messages), ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
                                      f"<|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert ours.fast.decode(ids, skip_special_tokens=False) == text and ids.count(ours.fast.token_to_id("<|im_start|>")) == 3
    theirs, model = (getattr(peer("transformers"), kind).from_pretrained(MINI / "qwen", dtype=torch.float32) for kind in ("AutoTokenizer", "AutoModelForCausalLM"))
    assert relative(Qwen.load(MINI / "qwen")(torch.tensor([ids])), model(torch.tensor([ids])).logits) < 1e-5
    for chat in (messages, [{"role": "system", "content": "Be brief."}, *messages, {"role": "assistant", "content": "Paint the bowl red"}]):
        assert all(ours.chat(chat, prompt) == theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False) for prompt in (True, False))
    for text in ("Paint the bowl neon green", "it's 3  holographic\n\n caf\u00e9s \U0001f600"):
        assert ours.encode(text) == theirs(text).input_ids and ours.decode(ours.encode(text)) == text

def test_loader_fills_meta_modules_and_names_what_does_not_fit(tmp_path):
    """On the meta device or not a module gets the stored values, a tied head once; whatever does not fit, half a file and a lost shard are named."""
    tied, file = tiny_qwen(), tmp_path / "model.safetensors"
    stored = {k: v for k, v in tied.state_dict().items() if k != "lm_head.weight"}
    save_file(stored, file)
    for device in ("meta", "cpu"):
        with torch.device(device):
            copy = Qwen(tied.config)
        load_checkpoint(copy, tmp_path)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight and same([*copy.parameters()], [*tied.parameters()])
    save_file(stored | {"model.norm.weight": torch.zeros(5), "model.embed_tokens.weight": torch.zeros(61, 32).int(), "ghost": torch.zeros(1)}, file)
    for part in ("missing lm_head.weight", "unexpected ghost", "model.norm.weight has shape (5,), expected (32,)", "model.embed_tokens.weight is torch.int32"):
        raises(part, load_checkpoint, tiny_qwen(tied=False), tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    raises("model.safetensors is truncated", load_checkpoint, tied, tmp_path)
    write(tmp_path / "m.safetensors.index.json", {"weight_map": {"a.weight": "part-2.safetensors"}})
    raises("part-2.safetensors", load_checkpoint, tied, tmp_path)

def test_loader_refuses_what_it_cannot_read(tmp_path):
    """Another model's folder, settings that are not written here, a net for another Flux, a mistyped path, a gated repository, an XLabs net: each is named."""
    c, is_flux, is_net, file = flux_config(), {"_class_name": "FluxTransformer2DModel"}, {"_class_name": "FluxControlNetModel"}, tmp_path / "x.safetensors"
    for kind, settings, part in ((Qwen, {"model_type": "llama"}, "'llama'"), (Qwen, {"model_type": "qwen2", "rope_scaling": {"type": "yarn"}}, "'yarn'"),
                                 (Flux, is_net, "FluxControlNetModel"), (Flux, flux_config(axes=(4, 4, 4)) | is_flux, "[4, 4, 4]"),
                                 (T5, {"model_type": "t5", "feed_forward_proj": "relu"}, "'relu'")):
        write(tmp_path / "config.json", settings)
        raises(part, kind.load, tmp_path)
    save_file({"input_hint_block.0.weight": torch.zeros(1)}, file)
    raises("XLabs", ControlNet.load, tmp_path)
    write(tmp_path / "config.json", control_config(c) | is_net), save_file(ControlNet(control_config(c)).state_dict(), file)
    for part, function, *args in (("is not a ControlNet for", controlnet.load_pair, MINI / "flux", tmp_path, "cpu", torch.float32, False),
                                  ("guidance is needed", Flux(c).modulation, torch.ones(2), None, torch.zeros(2, 8)), ("tokenizer.json", Tokenizer.load, tmp_path),
                                  ("window of 4", tiny_qwen(window=4), torch.zeros(1, 5, dtype=torch.long)), ("mini/qwem", resolve, ROOT / "mini/qwem")):
        raises(part, function, *args)
    with mock.patch("qwen.snapshot_download", side_effect=OSError("403")):
        assert "huggingface.co/a/gated" in raises("HF_TOKEN", resolve, "a/gated")

def test_lora_files_are_pefts(tmp_path):
    """An adapter made by peft gives peft's logits here, rank-stabilised or not, on all layers or some; saved again, it gives them in peft."""
    pf, base, (ids, _, _) = peer("peft"), peer_qwen(), padded_batch()
    for targets, stabilised in (("all-linear", False), (["layers.1.self_attn.q_proj", "down_proj"], True)):
        config = pf.LoraConfig(r=3, lora_alpha=8, lora_dropout=0.1, target_modules=targets, use_rslora=stabilised, init_lora_weights=False, task_type="CAUSAL_LM")
        theirs, ours = pf.get_peft_model(peer_qwen(), config).eval(), reload(base, Qwen)
        theirs.save_pretrained(tmp_path / "theirs")
        lora.load_adapter(ours, tmp_path / "theirs")
        assert relative(ours(ids), theirs(ids).logits) < 1e-5 < 1e-2 < relative(base(ids).logits, ours(ids))
        lora.save_adapter(ours, tmp_path / "ours", base_model="base")
        assert relative(pf.PeftModel.from_pretrained(peer_qwen(), tmp_path / "ours").eval()(ids).logits, ours(ids)) < 1e-5

def test_lora_trains_the_policy_alone():
    """At first nothing changes; training moves the policy alone, in fp32 over a bf16 base, the same with layers that are recomputed in the backward pass."""
    (ids, _, _), found, calls = padded_batch(), [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tiny_qwen().bfloat16()
        before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids)
        assert len(lora.inject(model, rank=2, alpha=4, dropout=0.5)) == 14 and same(model(ids), logits)
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(recompute))
        model.model.checkpointing, trained = recompute, [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        for _ in range(2):
            model.train()(ids).float().square().mean().backward()
            optimizer.step()
        assert not same(model(ids), model(ids)), "no dropout in training"
        for adapter in ("policy", "reference", None):
            lora.use(model.eval(), adapter)
            found.append(model(ids))
            assert same(found[-1], logits) == (adapter != "policy")
        assert all(p.dtype == torch.float32 for p in trained) and all(same(model.state_dict()[k], v) for k, v in before.items())
    assert same(found[0], found[3]) and calls.count(True) == calls.count(False) + 2

def test_lora_merges_once_in_fp32_and_refuses_what_it_cannot_honour(tmp_path):
    """Merged logits equal the adapter's; a bf16 weight is the exact sum rounded once; a second merge, another scale, other layers, unknown settings are named."""
    for dtype, precision in ((torch.float32, 1e-6), (torch.bfloat16, 2.0 ** -8)):
        model, (ids, _, _) = tiny_lora(dtype), padded_batch()
        layer, logits = model.model.layers[0].mlp.up_proj, model(ids)
        exact = layer.weight.double() + 2 * layer.lora_B["policy"].double() @ layer.lora_A["policy"].double()
        lora.merge(model)
        assert ((model.model.layers[0].mlp.up_proj.weight - exact).abs() <= precision * exact.abs() + 1e-7).all() and relative(model(ids), logits) < 20 * precision
        assert set(model.state_dict()) == set(tiny_qwen().state_dict())
        raises("no adapters", lora.merge, model)
    lora.save_adapter(tiny_lora(targets=["q_proj", "up_proj"]), tmp_path)
    raises("unexpected base_model.model.model.layers.0.self_attn.q_proj", lora.load_adapter, tiny_lora(targets=["up_proj"]), tmp_path)
    raises("alpha / rank is 2", lora.load_adapter, tiny_lora(alpha=8, targets=["q_proj", "up_proj"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    write(tmp_path / "adapter_config.json", config | {"use_dora": True, "rank_pattern": {"q_proj": 9}, "loftq_config": {}})
    raises("use_dora = True, rank_pattern = {'q_proj': 9}", lora.load_adapter, tiny_qwen(), tmp_path)

def flux_config(heads=3, head_dim=16, axes=(4, 6, 6), guided=True, doubles=2, singles=3, txt=12, pooled=8):
    return dict(num_attention_heads=heads, attention_head_dim=head_dim, axes_dims_rope=list(axes), guidance_embeds=guided, num_layers=doubles,
                num_single_layers=singles, joint_attention_dim=txt, pooled_projection_dim=pooled, in_channels=64)

def control_config(c, modes=10, doubles=2, singles=3):
    return c | dict(num_mode=modes, num_layers=doubles, num_single_layers=singles)

def vae_config(widths=(8, 8, 8), groups=4, depth=1, **more):
    return dict(block_out_channels=list(widths), layers_per_block=depth, norm_num_groups=groups, latent_channels=16, in_channels=3, out_channels=3,
                use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
                down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths), **more)

def flux_inputs(c, B=2, h=4, w=8, T=5, seed=0):
    torch.manual_seed(seed)
    return dict(img=torch.randn(B, h * w // 4, 64), txt=torch.randn(B, T, c["joint_attention_dim"]), pooled=torch.randn(B, c["pooled_projection_dim"]),
                timestep=torch.rand(B), guidance=torch.rand(B) * 35 if c["guidance_embeds"] else None, img_ids=9 * image_ids(h, w), txt_ids=torch.zeros(T, 3))

def test_full_size_models_have_the_published_names_and_counts():
    """Qwen2.5-7B and 0.5B, FLUX.1-dev, its autoencoder, ControlNet-Union and Union-Pro-2.0, T5-XXL have the public numbers of parameters, the peers' names and shapes."""
    qwens = ((152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, True, False), (151936, 896, 4864, 24, 14, 2, 64, 1e-6, 1e6, True, True))
    dev, vae = flux_config(24, 128, (16, 56, 56), doubles=19, singles=38, txt=4096, pooled=768), vae_config((128, 256, 512, 512), 32, 2)
    t5 = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, relative_attention_num_buckets=32, layer_norm_epsilon=1e-6,
              feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        nets = [control_config(dev, *sizes) for sizes in ((10, 5, 10), (None, 6, 0))]
        models = [*(Qwen(Config(*sizes, False, None, ())) for sizes in qwens), Flux(dev), VAE(vae), *map(ControlNet, nets), T5(t5)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [7_615_616_512, 494_032_768, 11_901_408_320, 83_819_683, 3_301_956_608, 2_140_876_800, 4_762_310_656]
    tf, d = peer("transformers"), peer("diffusers")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    with torch.device("meta"):
        theirs = [tf.Qwen2ForCausalLM(tf.Qwen2Config(**dict(zip(names, sizes)), tie_word_embeddings=sizes[-1])) for sizes in qwens]
        theirs += [d.FluxTransformer2DModel(**dev), d.AutoencoderKL(**vae), *(d.FluxControlNetModel(**net) for net in nets)]
    for mine, model in zip(models, theirs):
        assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}

def ask(model, x, **more):
    """What diffusers' Flux or ControlNet answers to our inputs."""
    names = dict(img="hidden_states", txt="encoder_hidden_states", pooled="pooled_projections")
    return model(**{names.get(name, name): value for name, value in x.items()}, **more, return_dict=False)

def test_flux_and_controlnet_equal_diffusers():
    """Residuals in each mode or without modes, and velocities under them agree to 1e-4: odd head counts, guidance or none; bf16 is no further from fp32."""
    d = peer("diffusers")
    for c, B, *sizes in ((flux_config(), 2, 10, 2, 3), (flux_config(5, 24, (8, 8, 8), False, 1, 4), 3, None, 1, 0),
                         (flux_config(1, doubles=5, singles=7), 1, 7, 3, 3), (flux_config(doubles=0, singles=2), 2, None, 0, 2)):
        theirs, their_net = loud(d.FluxTransformer2DModel(**c)), loud(d.FluxControlNetModel(**control_config(c, *sizes)))
        net, x, control = reload(their_net, ControlNet), flux_inputs(c, B), torch.randn(B, 8, 64)
        for mode in range(sizes[0] or 1):
            modes = torch.full((B, 1), mode) if sizes[0] else None
            double, single = ask(their_net, x, controlnet_cond=control, controlnet_mode=modes, conditioning_scale=0.7)
            found = net(control=control, mode=mode, scale=0.7, **x)
            assert relative([*found[0], *found[1]], [*(double or []), *(single or [])]) < 1e-4, (c, mode)
        velocity, = ask(theirs, x, controlnet_block_samples=double, controlnet_single_block_samples=single)
        assert relative(reload(theirs, Flux)(**x, double_residuals=found[0], single_residuals=found[1]), velocity) < 1e-4, c
    c, held = flux_config(4, 32, (8, 12, 12)), dict(timestep=torch.tensor([1.0, 0.5, 0.25, 0.125]), guidance=torch.full((4,), 4.0))
    for x, bound in ((flux_inputs(c, 4) | held, 1.1), (flux_inputs(c, 4), 0.1)):        # at times that bf16 does not hold the peer rounds 1000 t
        theirs, rough = loud(d.FluxTransformer2DModel(**c)), x | {k: x[k].bfloat16() for k in ("img", "txt", "pooled")}
        (velocity,), mine = ask(theirs, x), reload(theirs, Flux).bfloat16()(**rough)
        assert relative(mine, velocity) <= bound * relative(ask(theirs.bfloat16(), rough)[0], velocity)

def test_flux_encoders_equal_their_peers():
    """Prompts become the peers' vectors (of the peers' ids: cut, padded, any letters) in a batch as alone; latents and pictures are the peer's: all to 1e-4."""
    prompts, at = ["A red mug, 12!", "", "  a\tB  <|endoftext|> c", "banana " * 40, "Caf\u00e9 na\u00efve", "mug"], MINI / "flux"
    states, pooled = flux.encode_prompt(at, prompts, batch=4)
    assert relative([states[3:4], pooled[3:4]], flux.encode_prompt(at, prompts[3:4])) < 1e-6
    tf, d = peer("transformers"), peer("diffusers")
    for found, part, pad, tokenizer, kind, answer in ((pooled, "", "<|endoftext|>", tf.CLIPTokenizer, tf.CLIPTextModel, "pooler_output"),
                                                      (states, "_2", "<pad>", tf.PreTrainedTokenizerFast, tf.T5EncoderModel, "last_hidden_state")):
        ids = tokenizer.from_pretrained(at / f"tokenizer{part}", pad_token=pad)(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert relative(found, getattr(kind.from_pretrained(at / f"text_encoder{part}", dtype=torch.float32)(ids), answer)) < 1e-4, part
    config = tf.T5Config(vocab_size=60, d_model=20, d_kv=6, d_ff=30, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu")
    theirs, far, image, latent = loud(tf.T5EncoderModel(config)), torch.arange(150)[None] % 60, *(torch.randn(2, n, 16, 24, generator=seeded()) for n in (3, 16))
    assert relative(reload(theirs, T5)(far), theirs(far).last_hidden_state) < 1e-4
    for widths, depth, attention in (((16, 24, 40), 1, False), ((8, 16), 2, True), ((8,), 1, True)):
        theirs = loud(d.AutoencoderKL(**vae_config(widths, 8, depth, mid_block_add_attention=attention)))
        ours, posterior = reload(theirs, VAE), theirs.encode(image).latent_dist
        want = [(z - 0.1159) * 0.3611 for z in (posterior.mode(), posterior.sample(seeded(1)))] + [theirs.decode(latent / 0.3611 + 0.1159).sample]
        assert relative([ours.encode(image), ours.encode(image, seeded(1)), ours.decode(latent)], want) < 1e-4

def test_flux_sampler_equals_the_diffusers_pipelines():
    """Levels to 2e-6, latents to 1e-4: FluxPipeline (guidance; true CFG; schnell) and ControlNet at scale 0.7 in part of 5 steps."""
    d, vae = peer("diffusers"), loud(peer("diffusers").AutoencoderKL(**vae_config()))
    vae.encoder.conv_out.weight[16:], vae.encoder.conv_out.bias[16:] = 0, -100           # the pipeline samples the posterior: leave it no width
    picture, ids = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8), image_ids(8, 16)
    control = pack(reload(vae, VAE).encode(flux.to_tensor(picture)[None])).expand(2, -1, -1)
    for guided, schedule in ((True, flux.SCHEDULE), (False, flux.SCHEDULE | {"use_dynamic_shifting": False, "shift": 1.0})):
        c, levels, scheduler = flux_config(guided=guided), sigmas(5, 32, schedule), d.FlowMatchEulerDiscreteScheduler(**schedule)
        x, no = flux_inputs(c, h=8, w=16), flux_inputs(c, seed=1)
        theirs, net = loud(d.FluxTransformer2DModel(**c)), loud(d.FluxControlNetModel(**control_config(c)))
        common = dict(prompt_embeds=x["txt"], pooled_prompt_embeds=x["pooled"], height=32, width=64, num_inference_steps=5, guidance_scale=5.0,
                      output_type="latent", latents=x["img"])
        steering = controlnet.steer(reload(net, ControlNet), control, x["txt"], x["pooled"], ids, levels, 5.0, mode=3, scale=0.7, start=0.2, end=0.9)
        steered = dict(control_image=Image.fromarray(picture), control_mode=3, controlnet_conditioning_scale=0.7, control_guidance_start=0.2,
                       control_guidance_end=0.9)
        negative = dict(negative_prompt_embeds=no["txt"], negative_pooled_prompt_embeds=no["pooled"], true_cfg_scale=2.0)
        for given, flags in (({}, {}), (negative, dict(negative=(no["txt"], no["pooled"]), cfg=2.0)), (steered, dict(control=steering))):
            kind, more = (d.FluxControlNetPipeline, {"controlnet": net}) if given is steered else (d.FluxPipeline, {})
            pipe = kind(scheduler, vae, None, None, None, None, theirs, **more)
            pipe.set_progress_bar_config(disable=True)
            got = denoise(reload(theirs, Flux), x["img"], x["txt"], x["pooled"], ids, levels, guidance=5.0, **flags)
            assert relative(got, pipe(**common | given).images) < 1e-4 and (levels - scheduler.sigmas).abs().max() < 2e-6, (guided, flags)

def exact(x0):
    """A stand-in for Flux whose velocity is exact: x = (1-t) x0 + t eps, so eps - x0 = (x - x0) / t. It keeps the times of its calls."""
    def velocity(x, txt, t, *_):
        calls.append(t[0].item())
        return (x - x0 + txt.mean()) / t[:, None, None]
    calls, modulations = [], lambda levels, guidance, pooled: [t.expand(len(pooled)) for t in levels]
    return SimpleNamespace(velocity=velocity, calls=calls, modulations=modulations, rope=lambda *ids: None)

def test_flux_euler_with_the_exact_velocity_recovers_the_picture():
    """Levels are the published; any number of steps ends at x_0, from a noised source in the last strength * steps, rounded up; cfg extrapolates; nan is refused."""
    for tokens, want in ((4096, [1, .904531, .759511, .512844, 0]), (1024, [1, .849235, .652489, .384945, 0]), (256, [1, .831824, .622459, .354661, 0])):
        assert (sigmas(4, tokens) - torch.tensor(want)).abs().max() < 1e-6
    x0, source, noise, txt, pooled = *torch.randn(3, 2, 6, 64, generator=seeded()), torch.zeros(2, 3, 4), torch.zeros(2, 4)
    sample = lambda model, steps, txt=txt, **how: denoise(model, noise, txt, pooled, image_ids(4, 6), sigmas(steps, 6), **how)
    for steps, strength, calls in ((1, 1.0, 1), (7, 1.0, 7), (10, 0.6, 6), (10, 0.32, 4), (10, 0.0, 0)):
        out = sample(model := exact(x0), steps, source=source, strength=strength)
        assert relative(out, x0 if calls else source) < 1e-5 and model.calls == sigmas(steps, 6)[steps - calls:steps].tolist()
    assert relative(sample(exact(x0), 1, txt + 1, negative=(txt, pooled), cfg=3.0), x0 - 3) < 1e-5
    for part, x0, how in (("strength is 1.5", x0, dict(source=source, strength=1.5)), ("cfg is 3.0", x0, dict(cfg=3.0)), ("not finite", x0 / 0, {})):
        raises(part, sample, exact(x0), 2, **how)

def test_flux_and_controlnet_row_depends_on_itself_and_on_distances_alone():
    """A row is what it is alone, whatever the others' mode; RoPE sees no common shift; a new net adds nothing; weights that travel change no bit and come home."""
    c, control, modes, z = flux_config(), torch.randn(3, 8, 64, generator=seeded(9)), torch.tensor([0, 3, 1]), torch.randn(2, 16, 4, 6)
    net, model, x, offset = ControlNet(control_config(c, 4)), loud(Flux(c)), flux_inputs(c, B=3), torch.tensor([3.0, 50.0, 17.0])
    v = model(**x, **dict(zip(("double_residuals", "single_residuals"), net(control=control, **x))))
    expected, homes = sum(loud(net)(control=control, mode=modes, **x), []), [p.data_ptr() for p in net.parameters()]
    for i, mode in enumerate(modes.tolist()):
        row = {name: value if name.endswith("_ids") else value[i:i + 1] for name, value in x.items()}
        alone = sum(net(control=control[i:i + 1], mode=mode, scale=2.0, **row), [])
        assert relative([model(**row), *alone], [v[i:i + 1], *(2 * r[i:i + 1] for r in expected)]) < 1e-5
    shifted, stretched = (model(**x | {"img_ids": x["img_ids"] * by + add, "txt_ids": x["txt_ids"] + add}) for by, add in ((1, offset), (2, 0)))
    assert relative(shifted, v) < 1e-4 < 1e-3 < relative(stretched, v)
    assert same(sum(controlnet.stream(net, "cpu")(control=control, mode=modes, **x), []), expected) and homes == [p.data_ptr() for p in net.parameters()]
    assert same(flux.unpack(pack(z), 4, 6), z) and same(pack(z)[:, 1], z[:, :, :2, 2:4].flatten(1)) and image_ids(4, 6)[[1, -1]].tolist() == [[0, 0, 1], [0, 1, 2]]

def test_canny_is_bit_for_bit_opencvs():
    """A weak square has edges exactly when a strong one touches it; on photographs, noise and slivers no pixel differs from OpenCV's at any threshold."""
    image, rng = np.pad(np.full((20, 20), 30, np.uint8), 10), np.random.default_rng(0)
    assert not canny(image).any()
    image[10:14, 10:14] = 255
    assert canny(image)[28:32, 12:28].any() and set(np.unique(canny(image))) == {0, 255}
    cv2, data = peer("cv2"), peer("skimage.data")
    noise = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((200, 331, 3), (128, 128), (1, 1), (1, 9, 3), (7, 1), (2, 2))]
    for image in [data.astronaut(), data.coffee(), data.camera(), data.page(), rng.integers(100, 110, (99, 64, 3), dtype=np.uint8), *noise]:
        for low, high in ((100, 200), (50, 200), (0, 0), (10, 30), (200, 100), (33.7, 99.9), (-5, 20), (300, 900)):
            assert (canny(image, low, high) == cv2.Canny(image, low, high)).all(), (image.shape, low, high)

def test_render_frees_each_part_before_the_next():
    """When a part of the picture stack is loaded, no module of an earlier part is alive but the autoencoder; at scale 0 no net is even looked for."""
    parts = lambda: {type(o).__name__ for o in gc.get_objects() if issubclass(type(o), flux.Pretrained)}
    alive, before, black = [], parts(), [np.zeros((64, 64, 3), np.uint8)]
    stage = lambda name: alive.append(parts() - before) or contextlib.nullcontext()
    controlnet.render(MINI / "flux", MINI / "controlnet", ["A red mug"], [0], (64, 64), controls=black, steps=1, stage=stage)
    assert len(alive) == 4 and set.union(*alive) <= {"VAE"}, alive
    controlnet.render(MINI / "flux", MINI / "nowhere", ["A red mug"], [0], (64, 64), controls=black, steps=1, scale=0)

def toy_graph(users=40, attributes=12, width=8):
    names = [f"t{i}" for i in range(attributes)]
    people = [User(f"u{i}", names[i % 2::2][:4 + i % 3], names[1 - i % 2::2][:3 + i % 2]) for i in range(users)]
    return PreferenceGraph.build(people, names, torch.randn(attributes, width, generator=seeded()))

def test_graph_reader_names_file_and_line(tmp_path):
    """A bad line of users.jsonl is an error that names the file, the line and what was wanted; an unknown attribute is named, too."""
    good, file = {"user": "ana", "likes": ["red"], "dislikes": []}, tmp_path / "users.jsonl"
    for bad, part in ((good, "appears twice"), ([1], "a JSON object"), (good | {"likes": [1]}, '"likes" must be a list of strings'),
                      (good | {"user": 3}, '"user" must be a string'), (good | {"user": "x", "dislikes": ["red"]}, "likes and dislikes 'red'")):
        write(file, good, good | {"user": "bo"}, bad)
        assert f"{file}:3:" in raises(part, graph.read_users, file)
    file.write_bytes(b"\n\xff")
    raises(f"{file}:2: not a line of JSON", graph.read_users, file)
    raises("unknown attribute 'blue'", graph.edges_of, [User("x", ["blue"], [])], ["gold", "red"])

def test_graph_similar_users_follow_equation_6():
    """Scores are counts over the largest count of any two, best first, a tie to the next user around, by products or meetings; nothing in common is u with 0."""
    dense, draws = torch.randint(-1, 2, (70, 20), generator=seeded(), dtype=torch.int8), torch.rand(400, 300, generator=seeded())
    rare = ((draws < 0.004).int() - (draws > 0.996).int()).to(torch.int8)
    for signs, given, k, chunk in ((dense, dense, 70, 256), (dense, dense, 5, 7), (rare, rare.to_sparse(), 5, 1)):     # products, in one chunk and in ten; meetings
        for kind, x in (("shared", signs.abs()), ("signed", signs), ("likes", signs.clamp_min(0))):
            common, own = (x.int() @ x.int().T).fill_diagonal_(0).clamp_min(0), torch.arange(len(x))[:, None]
            best = (common * len(x) - (own.T - own) % len(x)).topk(k).indices
            score = common.gather(1, best) / common.max()                                           # (6)
            assert same(graph.similar_users(given, k, kind, chunk=chunk), (best.where(score > 0, own), score)), (kind, k)
    index, score = graph.similar_users(dense, 100)
    assert index.shape == (70, 100) and (index[:, 70:] == torch.arange(70)[:, None]).all() and not score[:, 69:].any()

def test_graph_sage_equals_pyg():
    """SAGEConv takes PyG's weights and gives PyG's numbers and gradients; a node without neighbours gets a zero mean."""
    src, dst, ours = torch.randn(9, 6, generator=seeded()), torch.randn(5, 6, generator=seeded(1)), graph.SAGEConv(6, 7)
    edges = torch.stack([torch.randint(n, (30,), generator=seeded()) for n in (9, 4)])       # node 4 has no neighbour
    out = ours(src, dst, edges)
    assert relative(out[4], ours.lin_l.bias + ours.lin_r.weight @ dst[4]) < 1e-6
    theirs = peer("torch_geometric.nn").SAGEConv((6, 6), 7)
    theirs.load_state_dict(ours.state_dict())
    want = theirs((src, dst), edges)
    grads = [torch.autograd.grad(y.square().sum(), [*layer.parameters()]) for layer, y in ((ours, out), (theirs, want))]
    assert relative([out, *grads[0]], [want, *grads[1]]) < 1e-6

def test_graph_pretraining_learns_from_training_edges_alone():
    """60/20/20 is a partition, held-out edges carry no message, two tastes are learned (AUC > 0.95), one seed gives one model on any number of threads."""
    built, cells, found = toy_graph(80), torch.randperm(900 * 45, generator=seeded())[:9000], []
    model, scores = graph.pretrain(built, 16, 16, epochs=60)
    assert scores["auc"] > 0.95 and sorted(torch.cat(list(model.split.values()), 1).T.tolist()) == sorted(built.edges.T.tolist())
    assert [round(e.shape[1] / built.edges.shape[1], 1) for e in model.split.values()] == [0.6, 0.2, 0.2]
    fresh = graph.EdgeModel(built)                                       # untrained: no score is perfect
    scores, built.edges = fresh.evaluate("test"), fresh.split["train"]
    assert fresh.evaluate("test") == scores
    assert graph.auc(torch.tensor([3.0, 2, 1, 1]), torch.tensor([True, False, True, False])) == (1 + 1 + 0 + 0.5) / 4
    large = PreferenceGraph(range(900), range(45), torch.stack([cells // 45, cells % 45, cells % 2 * 2 - 1]), torch.randn(45, 64, generator=seeded(2)))
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        found.append([*graph.pretrain(large, epochs=3)[0].parameters()])
    assert same(found[0], found[1]) and same(found[0], found[2])

def test_cdpo_losses_follow_equations_1_to_7():
    """Log-probabilities and gradients are the full softmax's, for any chunk; Eq. 1 by hand; Eq. 7 averages by similarity, without neighbours it is the own term."""
    hidden, head = torch.randn(3, 6, 8, generator=seeded(), requires_grad=True), torch.randn(50, 8, generator=seeded(1))
    labels, weight = torch.tensor([[-100, 3, 4, -100, -100, -100], [-100] * 6, [1, 2, 3, 4, 5, 6]]), torch.tensor([1.0, 2, 3])
    full = (hidden @ head.T).log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == -100, 0).sum(-1)
    want = torch.autograd.grad((full * weight).sum(), hidden)
    for chunk in (1, 4, 1000):
        logp = cdpo.token_logprobs(hidden, head, labels, chunk)
        assert logp[1] == 0 and relative(logp, full) < 1e-6 and relative(torch.autograd.grad((logp * weight).sum(), hidden), want) < 1e-5
    zero, one = torch.zeros(2), torch.ones(2)
    losses, chosen, rejected = cdpo.dpo_loss(zero + 3, zero - 1, one, one, beta=0.5)
    assert torch.allclose(losses, torch.log1p(torch.exp(torch.tensor(-2.0)))) and chosen.tolist() == [1, 1] and rejected.tolist() == [-1, -1]
    got = cdpo.cdpo_loss(one, torch.tensor([[4.0, 1.0], [7.0, 7.0]]), torch.tensor([[0.5, 1.0], [0.0, 0.0]]), lam=0.3)
    assert torch.allclose(got, torch.tensor([1 + 0.3 * 2.0, 1.0]))

def test_cdpo_new_user_gets_the_same_tokens_alone_and_from_the_file(tmp_path):
    """collaborative.safetensors gives everybody the tokens of the model that wrote it; a new user's depend on nobody else, and on the sign where it counts."""
    new, file = [User("x", ["t0"], ["t1"]), User("y", ["t1"], ["t0"]), User("z", [], [])], tmp_path / "collaborative.safetensors"
    for signed in (True, False):
        model = cdpo.UserTokens(toy_graph(), hidden_dim=6, out_dim=5, signed=signed, soft={"hidden_dim": 7, "out_dim": 4, "tokens": 3, "std": 0.5})
        model.save(file)
        read = cdpo.UserTokens.load(file)
        h = read.new(new)
        assert relative([read.soft(h), read.embeddings()], [model.soft(model.new(new)), model.embeddings()]) < 1e-6 and read.graph.users == model.graph.users
        assert relative(torch.cat([read.new([user]) for user in new]), h) < 1e-6 and (relative(h[0], h[1]) > 1e-3) == signed and h.isfinite().all()

def test_cdpo_packed_answers_equal_separate_ones():
    """Chosen and rejected in one sequence behind one prompt give the log-probabilities and gradients of each alone, whatever else is in the batch."""
    model, tokenizer, alone = Qwen.load(MINI / "qwen"), Tokenizer.load(MINI / "qwen"), torch.zeros(2, 2)
    soft, weight = torch.randn(2, 3, model.lm_head.weight.shape[1], generator=seeded(), requires_grad=True), torch.tensor([[1.0, 2], [3, 4]])
    texts = [("A red mug", "Paint the mug neon green", "Add a leaf"), ("A white bowl in front of a grey wall", "Make it gold", "Turn the bowl into ice")]
    rows = [cdpo.encode(tokenizer, cdpo.prompt(caption), *answers) for caption, *answers in texts]
    packed = cdpo.answer_logprobs(model, rows, soft)
    for i, j, prompt, answer in ((i, j, prompt, answers[j]) for i, (prompt, answers) in enumerate(rows) for j in range(2)):
        embeds = torch.cat([soft[i], model.model.embed_tokens(torch.tensor(prompt + answer))])[None]
        alone[i, j] = model(embeds=embeds).log_softmax(-1)[0, -len(answer) - 1:-1].gather(-1, torch.tensor(answer)[:, None]).sum()
    assert relative(packed, alone) < 1e-6 and relative(*(torch.autograd.grad((x * weight).sum(), soft) for x in (packed, alone))) < 1e-5

def test_world_is_a_function_of_its_seed(tmp_path):
    """The same seed gives the same bytes, more users change no earlier one; mini/sample is what --sample writes; its 45 edits differ in every pair of pictures."""
    small, pixels = ("--scenes", 0, "--users", 5, "--test-users", 2, "--edits", 20), lambda file: np.array(Image.open(file)).astype(np.float32)
    for name, *flags in (("a", *small), ("b", *small), ("larger", *small, "--users", 9), ("other", *small, "--seed", 1), ("sample", "--sample")):
        assert shell("mini/world.py", "--out", tmp_path / name, *flags).returncode == 0
    a, b, larger, other, sample = ({f.name: f.read_bytes() for f in (tmp_path / name).glob("*.jsonl")} for name in ("a", "b", "larger", "other", "sample"))
    assert len(a) == 5 and a == b and all(larger[f].startswith(a[f]) for f in a) and a["users.jsonl"] != other["users.jsonl"]
    assert len(sample) == 6 and all((MINI / "sample" / name).read_bytes() == content for name, content in sample.items())
    drawn = [tmp_path / "sample" / picture["image"] for scene in lines(tmp_path / "sample/scenes.jsonl") for picture in (scene, *scene.get("edits", []))]
    assert max(np.abs(pixels(file) - pixels(MINI / "sample/scenes" / file.name)).max() for file in drawn) <= 1
    seen = np.stack([pixels(file) for file in drawn])
    assert len(seen) == 51 and (np.abs(seen[:, None] - seen[None]).mean((2, 3, 4)) + 99 * np.eye(51)).min() > .9       # grey levels over the whole picture

def test_world_pairs_ask_for_stated_likes_and_never_mention_a_hidden_one():
    """48 pairs a user; chosen asks for one stated like or what the words ask for, rejected for one attribute, liked only where words ask for another thing."""
    (users, pairs), kinds, themes = world.people("train", 40, 0), world.TYPE_OF, world.THEMES.values()
    assert len(kinds) == 45 and set().union(*themes) == set(kinds) and all({kinds[a] for a in theme} == set(world.ATTRIBUTES) for theme in themes)
    assert len(pairs) == 48 * 40 and .15 < sum("guidance" in p for p in pairs) / len(pairs) < .22
    for i, p in enumerate(pairs):
        u, ((chosen,), (rejected,), words) = users[i // 48], ([a for a in kinds if a in p.get(part, "")] for part in ("chosen", "rejected", "guidance"))
        assert p["user"] == u["user"] and not {chosen, rejected} & set(u["hidden"]) and chosen in (words or u["likes"])
        assert rejected not in u["likes"] or words or "guidance" in p and kinds[rejected] != p["edit_type"]

def train_here(*flags):
    """train.main in this process, quietly, until it ends or is stopped."""
    with quiet(), contextlib.suppress(SystemExit):
        train.main([str(flag) for flag in flags])

@functools.cache
def prepared():
    """(flags of a tiny cdpo run, its folder): a graph run and an SFT run on the shipped sample, made once for the tests below."""
    prepared.folder = tempfile.TemporaryDirectory()
    d = Path(prepared.folder.name)
    train_here("graph", "--steps", 5, "--users", SAMPLE["users"], "--out", d / "graph")
    train_here("sft", "--steps", 2, "--batch", 4, "--edits", SAMPLE["edits"], "--out", d / "sft")
    files = ["--users", SAMPLE["users"], "--pairs", SAMPLE["pairs"], "--sft", d / "sft", "--graph", d / "graph"]
    return ["cdpo", *files, "--batch", 8, "--micro", 4, "--save-every", 1], d

def stage(*flags):
    """(CDPO stage, its flags) of the prepared runs."""
    args = train.parse([str(flag) for flag in [*prepared()[0], "--out", prepared()[1] / "run", *flags]])
    with quiet():
        return train.CDPO(args), args

def test_train_resume_is_bit_exact():
    """A run killed by SIGKILL and continued by the same command has the bytes of an uninterrupted one, metrics included."""
    flags, d = [*prepared()[0], "--steps", 16, "--out"], prepared()[1]
    train_here(*flags, d / "whole")
    process = subprocess.Popen([sys.executable, "train.py", *map(str, flags), d / "torn"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((d / "torn").glob("step_*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
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
    """With lambda 0 the loss is DPO's of the batch's own pairs under their own users; DPO-Vanilla starts at ln 2; micro-batches do not change a gradient."""
    s, args = stage("--lam", 0, "--nll", 0)
    rows, vanilla = s.rows(0), stage("--user", "none", "--nll", 0)[0]
    own = [i for i, near in rows if not near]
    texts = [s.encode(p["caption"], p["chosen"], p["rejected"], guidance=p["guidance"]) for p in (s.pairs[i] for i in own)]
    logp, ref = cdpo.answer_logprobs(s.model, texts, s.tokens.soft(s.tokens.embeddings(s.keep)[[s.owner[i] for i in own]])), s.reference[own]
    want = torch.log1p(torch.exp(-args.beta * ((logp[:, 0] - logp[:, 1]) - (ref[:, 0] - ref[:, 1])))).sum()
    assert len(own) == len(rows) == 8 and relative(s.loss(rows)[0], want) < 1e-6
    assert abs(vanilla.loss(rows)[0].item() / 8 - math.log(2)) < 1e-6
    (s, args), grads = stage("--lam", 0.5), []
    for args.micro in (4, 8, 3):
        train.gradients(s, args, 0, False)
        grads.append(torch.cat([p.grad.flatten() for p in s.trained.values()]))
    assert relative(grads[1:], grads[:1] * 2) < 1e-6

def test_train_moves_only_lora_gnn_and_soft_tokens():
    """After training, base weights and reference adapter are bit-identical, and every LoRA, GNN, soft-prompt tensor and user vector has moved."""
    s, args = stage("--out", prepared()[1] / "moved", "--drop", 0, "--steps", 6)
    tensors = dict(s.model.named_parameters()) | {f"collaborative.{name}": p for name, p in s.tokens.named_parameters()}
    before = {name: p.clone() for name, p in tensors.items()}
    with quiet():
        train.fit(s, args)
    moved, unread = {name for name, p in tensors.items() if not same(p, before[name])}, "to_attribute.1"      # h_u never reads these
    assert moved == {name for name in tensors if ".policy" in name or name.startswith("collaborative.") and unread not in name}

def test_train_neighbours_terms_are_defined_at_the_edges(tmp_path):
    """k beyond the number of users, a user without pairs, one sampled neighbour, the other readings: finite, nobody without pairs is read; no empty files."""
    users, file = lines(ROOT / SAMPLE["users"]), tmp_path / "pairs.jsonl"
    write(file, *(pair for pair in lines(ROOT / SAMPLE["pairs"]) if pair["user"] != users[1]["user"]))
    for most, *more in ((10, "exact", "--k", 50), (3, "exact", "--neighbour-user", "neighbour"), (3, "exact", "--similarity", "shared"), (1, "sampled")):
        s, _ = stage("--pairs", file, "--lam", 0.5, "--neighbours", *more)
        rows = s.rows(0)
        assert s.loss(rows)[0].isfinite() and most / 2 < max(len(near) for _, near in rows) <= most
        assert all(s.owner[pair] == v != 1 and score > 0 and v != s.owner[own] for own, near in rows for v, pair, score in near)
    write(file)
    for part, *flags in (("nothing", *prepared()[0], "--pairs", file), ("nothing", "sft", "--edits", file), ("no user", "graph", "--users", file)):
        raises(f"pairs.jsonl holds {part}", train_here, *flags, "--out", tmp_path / "x")

def test_train_refuses_two_runs_other_flags_and_lost_numbers():
    """A second run on one folder, a continuation with other flags, a full disk and a NaN loss each end in one line; the checkpoint before stays whole."""
    flags, out, full = [*prepared()[0], "--steps", 2, "--out"], prepared()[1] / "held", mock.Mock(side_effect=OSError(28, "No space left on device"))
    train_here(*flags, out)
    state = (out / "step_2/state.safetensors").read_bytes()
    raises("holds a run with beta = 0.2, now it is 0.3", train_here, *flags, out, "--beta", 0.3)
    with train.lock(out):
        raises("is being written by another run", train_here, *flags, out)
    raises("No space left on device", train.publish, out / "step_2", full, "step 3")
    assert (out / "step_2/state.safetensors").read_bytes() == state and not list(out.glob(".tmp*"))
    s, args = stage("--out", out.with_name("nan"))
    s.tokens.soft.fc2.bias.data[0] = math.nan
    with quiet():
        assert "pairs.jsonl, lines" in raises("the step was not taken", train.fit, s, args) and not list(out.with_name("nan").glob("step_*"))

def test_train_presets_and_order_are_as_promised():
    """--preset paper is Table 12, and nothing of ours that would change its loss; an epoch holds every item once, by seed and epoch; warm-up, then half a cosine."""
    for name, want in {"cdpo": dict(steps=3000, batch=12, lr=2e-7, gnn_lr=2e-8, k=3, lam=0.15, tokens=8, nll=0, similarity="shared", drop=0),
                       "sft": dict(steps=9375, batch=16, lr=2e-6, rank=16, alpha=32, dropout=0.05, dtype="bf16"),
                       "graph": dict(steps=150, lr=3e-5, hidden=1024, out_dim=1024, embedder="Linq-AI-Research/Linq-Embed-Mistral")}.items():
        assert want.items() <= vars(train.parse([name, "--preset", "paper"])).items(), name
    epoch = [i for step in range(5) for i in train.order(10, 4, 0, step)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10)) and epoch[:10] != epoch[10:] and train.order(10, 10, 1, 0) != epoch[:10]
    assert [round(train.schedule(s, 10, 2), 3) for s in (0, 1, 2, 6, 10)] == [0.333, 0.667, 1.0, 0.5, 0.0]

def test_train_judge_tells_well_formed_from_malformed():
    """An instruction counts when it ended, names one known attribute (the longest name), and is put together as the training instructions are."""
    texts, caption = [(p["caption"], p[side]) for p in lines(ROOT / SAMPLE["pairs"]) for side in ("chosen", "rejected")], "A white bowl in front of a grey wall"
    user, good = User("x", ["neon green"], ["gold"], ["forest"]), {"likes": False, "would like": True, "hit": True, "dislikes": False, "malformed": False}
    judge = train.Judge([user, User("all", list(world.TYPE_OF), [])], texts)
    assert judge(user, caption, "Change the background to forest", True) == good and not any(judge(user, *text, True)["malformed"] for text in texts)
    for text in ("", "Change the to forest", "Change the background to purple-ish", "Add gold and forest"):
        assert judge(user, caption, text, True)["malformed"], text

def test_edit_reads_any_photograph(tmp_path):
    """Deep, float, palette, CMYK, transparent, rotated, animated pictures come out upright, 8-bit RGB, as bright; any size fits into multiples of 16."""
    rgb, exif = Image.open(MINI / "sample/scenes/01_mug.png").convert("RGB").crop((0, 0, 64, 48)), Image.Exif()
    picture, exif[0x0112] = np.array(rgb), 6                                                        # 6: turn it clockwise
    gray, bit = picture[..., 0], picture[..., :1] > 127
    deep, flat, grays, dark = gray.astype(np.uint16) * 257, Image.fromarray(bit[..., 0]), np.stack([gray] * 3, -1), int(gray.min())
    clear, turned = Image.fromarray(np.dstack([picture, 255 * bit.astype(np.uint8)])), Image.fromarray(np.rot90(picture).copy())
    for name, image, want, how in (("16.png", Image.fromarray(deep), grays, {}), ("float.tiff", Image.fromarray((gray / 255).astype(np.float32)), grays, {}),
                                   ("palette.png", Image.fromarray(gray).convert("P"), np.where(grays == dark, 255, grays), dict(transparency=dark)),
                                   ("cmyk.tiff", rgb.convert("CMYK"), picture, {}), ("alpha.png", clear, np.where(bit, picture, 255), {}),
                                   ("exif.png", turned, picture, dict(exif=exif)),
                                   ("a.gif", flat, 255 * np.dstack([bit] * 3), dict(save_all=True, append_images=[Image.new("1", rgb.size)]))):
        image.save(tmp_path / name, **how)
        got = np.array(edit.read_image(tmp_path / name)).astype(int)
        assert got.shape == want.shape and np.abs(got - want).max() <= 1, name
    for width, height in ((1, 1), (1000, 10), (3, 4000), (4032, 3024), (17, 1023)):
        h, w, _ = edit.fit(Image.new("RGB", (width, height)), 256, 16).shape
        assert h % 16 == w % 16 == 0 and 0.8 < h * w / 256 ** 2 < 1.25 and 1 / 4.5 <= w / h <= 4.5, (width, height, w, h)

def test_edit_says_in_one_sentence_what_is_wrong(tmp_path):
    """Half a picture, a text, wrong flags, an unknown person: one line that names it, before any model is loaded, and exit code 2."""
    (tmp_path / "cut.png").write_bytes((MINI / "sample/scenes/01_mug.png").read_bytes()[:300]), (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.png", "text.png", "absent.png"):
        raises(name, edit.read_image, tmp_path / name)
    for flags, part in (("--image x.png", "--caption"), ("--strength 1.5", "0 .. 1"), ("--likes red --dislikes red", "'red'"), ("--out edit.jpg", ".png"),
                        ("--user ana --likes red", "one or the other"), ("--device gpu", "gpu"), ("--flux mini/nowhere", "mini/nowhere")):
        raises(part, edit.main, flags.split())
    done = shell("edit.py", "--user", "glamor-stylist")
    assert done.returncode == 2 and "nearest: glamour-stylist" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

def edited(at, name, *flags):
    """One run of edit.main at few steps -> (picture, record)."""
    with quiet():
        edit.main(["--steps", "3", "--out", f"{at / name}.png", *map(str, flags)])
    with Image.open(at / f"{name}.png") as image:
        record = json.loads((at / f"{name}.json").read_text())
        assert json.loads(image.text["edit"]) == record, "the PNG's text is not the JSON beside it"
        return np.array(image), record

def test_edit_of_several_people_equals_each_alone_bit_for_bit(tmp_path):
    """The same seed gives the same bits twice, alone, in company or with --offload; another seed another picture; the grid shows the source and everybody."""
    sheet, record = edited(tmp_path, "all")
    assert [r["user"] for r in record["edits"]] == edit.PERSONAS and sheet.shape[1] > 4 * 256
    for name, in_company, more in zip(edit.PERSONAS, record["edits"], ([], ["--offload"], ["--seed", 1])):
        picture, alone = edited(tmp_path, "alone", "--user", name, *more)
        assert (picture == np.array(Image.open(tmp_path / f"all_{name}.png"))).all() != ("--seed" in more) and alone["instruction"] == in_company["instruction"]

def test_edit_looks_at_the_control_and_reference_pictures_that_are_asked_for(tmp_path):
    """Without scale, steps or picture no ControlNet is read; strength 0 gives the source back; each reference counts, with or without a user, at scale 0 none."""
    who, nowhere = ["--user", edit.PERSONAS[0]], ["--controlnet", tmp_path]        # an empty folder: reading it would fail
    mug, apple, ask = "mini/sample/scenes/01_mug.png", "mini/sample/scenes/00_apple_balloon.png", ["--caption", "Place the mug in front of forest", "--reference"]
    held, plain, never, drawn, bare, seen, one, two, without, alike = (edited(tmp_path, "x", *flags)[0] for flags in (
        who, [*who, *nowhere, "--control-scale", 0], [*who, *nowhere, "--control-start", .4, "--control-end", .6], [*who, *nowhere, "--caption", "A white vase"],
        [*who, "--image", mug, "--caption", "A mug"], [*who, "--image", mug, "--caption", "A mug", "--reference", apple],
        [*ask, mug], [*ask, mug, apple], [*ask, mug, apple, "--reference-scale", 0], [*ask, apple, "--reference-scale", 0]))
    assert (plain == never).all() and (drawn != plain).any() and (held != plain).any()
    assert (one != two).any() and (without != one).any() and (without == alike).all() and (seen != bare).any()
    source, record = edited(tmp_path, "x", *who, *nowhere, "--strength", 0)
    assert np.abs(source - np.array(edit.read_image(ROOT / record["settings"]["image"])).astype(float)).mean() < 12

def test_edit_knows_a_stranger_by_likes_and_says_when_it_cannot(tmp_path):
    """Likes alone make a user; likes nobody shares are named; a user without any gets the generic edit, the same whatever the name, and a note that says so."""
    (_, mine), (_, odd) = (edited(tmp_path, "x", "--likes", f"gold, crown, {more}marble", "--dislikes", "moonlight") for more in ("", "quux, "))
    assert odd["instruction"] == mine["instruction"] and "quux" in odd["note"] and not mine["note"]
    (none, empty), (alike, quux) = edited(tmp_path, "x", "--likes", ""), edited(tmp_path, "x", "--dislikes", "quux")
    assert "generic" in empty["note"] and "generic" in quux["note"] and (none == alike).all()

def test_patch_quality_and_losses_are_the_papers_and_the_authors_numbers():
    """Eq. 3 is the best cosine, a foreign patch weighs 0; PatchDPO: supplement (power 2), authors' mean (power 1), theorem; Diffusion-DPO, DRO as published."""
    x, ref = torch.randn(2, 3, 4, 8, generator=seeded()), torch.randn(2, 2, 5, 8, generator=seeded(1))
    loop = [[[max(torch.cosine_similarity(x[b, i, j], r, dim=0) for r in ref[b].flatten(0, 1)) for j in range(4)] for i in range(3)] for b in range(2)]
    assert relative(patch_dpo.patch_quality(x, ref), torch.tensor(loop)) < 1e-6
    gen = ref + 0.1 * torch.randn(2, 2, 5, 8, generator=seeded(2))
    gen[:, 1, 2] = -ref.mean((1, 2))
    weight, *others = (patch_dpo.patch_weights(patch_dpo.patch_quality(gen, ref), size) for size in ((2, 5), (2, 2), (8, 12)))
    assert (weight[:, 1, 2] == 0).all() and weight.max() == 1 and weight.flatten(1).sort().values[:, 1].min() > 0.8
    assert all(0 <= w.min() and w.max() <= 1 for w in others) and same(patch_dpo.patch_weights(torch.full((1, 4, 4), 0.7), (8, 8)), torch.full((1, 8, 8), 0.7))
    gen, ref, p_gen, p_ref = *torch.randn(2, 2, 3, 4, 5, generator=seeded()), *torch.rand(2, 2, 4, 5, generator=seeded())
    paper = (gen * p_gen[:, None]).square().mean((1, 2, 3)) + (ref * (1 - p_ref[:, None])).square().mean((1, 2, 3))
    authors, half = (torch.cat([1 - p_ref, p_gen])[:, None] * torch.cat([ref, gen]) ** 2).mean(), torch.full_like(p_gen, 0.5)
    assert relative(patch_dpo.patch_dpo_loss(gen, ref, p_gen, p_ref), paper) < 1e-6
    assert relative(patch_dpo.patch_dpo_loss(gen, ref, p_gen, p_ref, power=1).mean(), 2 * authors) < 1e-6
    assert relative(patch_dpo.patch_dpo_loss(gen, ref, half, half, power=1).mean(), torch.cat([gen, ref]).square().mean()) < 1e-6     # flow matching
    w, l, rw, rl = torch.rand(4, 6, generator=seeded())
    assert relative(patch_dpo.diffusion_dpo_loss(w, l, rw, rl, 100), -torch.log(torch.sigmoid(-50 * ((w - l) - (rw - rl)).double()))) < 1e-5
    assert torch.allclose(patch_dpo.dro_loss(w, rw, l, rl), torch.maximum(torch.tensor(-0.001), -(rw - w) + (rl - l)) + 0.001, atol=1e-7)
    x, W, p, eta = torch.randn(8, generator=seeded(2)), torch.randn(8, 8, generator=seeded(3), requires_grad=True), torch.linspace(0, 1, 8), 0.05
    target = (W @ x).detach() - 1.0                                     # supplement S1's linear model; the same error, 1, in every element: only p differs
    error = (W @ x - target)[None, None, None]                          # (1, 1, 1, 8)
    patch_dpo.patch_dpo_loss(error, torch.zeros_like(error), p[None, None], p[None, None]).sum().backward()
    delta = ((W - eta * W.grad) @ x - target).detach() ** 2 - 1         # a larger p_i moves its error more, p_i = 0 not at all
    assert relative(delta, (1 - 2 * eta / 8 * p ** 2 * x.square().sum()) ** 2 - 1) < 1e-5 and (delta.abs().diff() > 0).all()       # / 8: our norm is a mean

def test_patch_features_equal_the_peers(tmp_path):
    """DINOv2 and both ViT layouts: the last feature map of random checkpoints with public preprocessing, at the trained size and another."""
    tf, mean, std = peer("transformers"), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    vit, pictures = tf.ViTConfig(**ENCODER, intermediate_size=64), [torch.rand(2, 3, *size, generator=seeded()) for size in ((32, 32), (48, 24))]
    write(tmp_path / "preprocessor_config.json", {"image_mean": mean, "image_std": std})
    for model in (tf.Dinov2Model(tf.Dinov2Config(**ENCODER, layerscale_value=0.5)), tf.ViTModel(vit), tf.ViTForImageClassification(vit)):
        loud(model).save_pretrained(tmp_path)
        ours, how = ImageFeatures.load(tmp_path), {} if isinstance(model, tf.Dinov2Model) else {"interpolate_pos_encoding": True}
        for x in pictures:
            theirs = getattr(model, "vit", model)((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None], **how).last_hidden_state
            assert relative([ours.tokens(2 * x - 1), ours(2 * x - 1).flatten(1, 2)], [theirs, theirs[:, 1:]]) < 1e-4

def test_patch_correspondence_follows_the_picture_and_teaches_f():
    """A patch is found where the other view shows its place; self-supervised steps on fixed pictures raise S_patch on unseen views of them."""
    torch.manual_seed(0)
    a, b = (patch_dpo.random_views(8, seeded(i)) for i in (5, 6))
    place = patch_dpo.centres(64, 64).permute(2, 0, 1).expand(8, 2, 64, 64)
    place_a, place_b = (nn.functional.avg_pool2d(patch_dpo.warp(place, view), 8).flatten(2) for view in (a, b))      # (8, 2, 64)
    for here, there, target in zip(place_a, place_b, patch_dpo.correspondence(torch.linalg.inv(b) @ a, 8, 8)):
        seen = target >= 0
        assert seen.sum() > 10 and (here[:, seen] - there[:, target[seen]]).norm(dim=0).max() < 2 / 8
    f, g = ImageFeatures(ENCODER | {"model_type": "dinov2"}, [0.5] * 3, [0.5] * 3), seeded(1)
    image, adam = nn.functional.interpolate(2 * torch.rand(8, 3, 8, 8, generator=g) - 1, 32, mode="bicubic").clamp(-1, 1), torch.optim.Adam(f.parameters(), 2e-3)
    score = lambda: patch_dpo.s_patch(f(patch_dpo.warp(image, a)), f(patch_dpo.warp(image, b)), patch_dpo.correspondence(torch.linalg.inv(b) @ a, 4, 4))
    before = score()
    for _ in range(60):
        loss = patch_dpo.self_supervised_loss(f, image, g)
        adam.zero_grad(), loss.backward(), adam.step()
    assert score()[0] > before[0] + 0.1 and score()[1] >= score()[0], (before, score())

def test_patch_image_prompt_adds_one_attention_for_each_reference(tmp_path):
    """Untrained it changes nothing; one reference is Eq. S6 and two add up (S7); saved and loaded it is the same; None takes it away."""
    c, references, q, file = flux_config(guided=False, singles=2), torch.randn(2, 2, 4, 24), torch.randn(2, 3, 16, 16), tmp_path / "prompt.safetensors"
    model, x = loud(Flux(c)), flux_inputs(c, h=8, w=8) | {"img_ids": image_ids(8, 8)}
    prompt, plain = ImagePrompt(model, 24), model(**x)

    def added(prompt, seen):
        """What these references add to the attention of the first block, and the velocity."""
        prompt.look(model, seen, x["img_ids"])
        return model.transformer_blocks[0].attn.image_prompt(q), model(**x)
    assert same(added(prompt, references)[1], plain)
    loud(prompt).save(file)
    (one, _), (other, _), (two, moved) = (added(prompt, seen) for seen in (references[:, :1], references[:, 1:], references))
    k, v = ((references[:, 0] @ w[0].weight.T).unflatten(-1, (3, 16)) for w in (prompt.to_k_ip, prompt.to_v_ip))
    corners = flux.rope_table(torch.tensor([[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 2.5, 0.5], [0, 2.5, 2.5]]), model.axes)     # 2 x 2 patches over 4 x 4 tokens
    turned_q = flux.rotate(q.transpose(1, 2), flux.rope_table(x["img_ids"], model.axes)).transpose(1, 2)
    assert relative(one, torch.softmax(turned_q @ flux.rotate(k, corners).transpose(1, 2).mT / 4, -1) @ v.transpose(1, 2)) < 1e-5
    assert relative(two, one + other) < 1e-5 and relative(moved, plain) > 1e-3 and same(added(ImagePrompt.load(file, model, 24), references)[1], moved)
    raises("to_k_ip.0.weight", ImagePrompt.load, file, model, 25)
    prompt.look(model, None)
    assert same(model(**x), plain)

def picture_flags(root):
    """Writes three scenes with three edits each, of the shipped pictures -> flags for train.py on the shipped models at 16 pixels."""
    edits = [{**e, "image": str(MINI / "sample" / e["image"])} for e in lines(MINI / "sample/scenes.jsonl")[0]["edits"]]
    scenes = [[next(e for e in edits[i:] if e["edit_type"] == kind) for kind in ("background", "lighting", "color")] for i in range(3)]
    write(root / "scenes.jsonl", *({"image": three[0]["image"], "caption": "a mug", "edits": three} for three in scenes))
    numbers = "--size 16 --held-out 1 --steps 4 --batch 4 --micro 2 --paint-steps 3 --warmup 0 --lr 1e-2 --device cpu"
    return ["--scenes", root / "scenes.jsonl", *numbers.split()]

def test_patch_every_loss_trains_on_the_pictures_that_were_generated_once(tmp_path):
    """PatchDPO paints, judges and keeps; the other losses use the same pictures and start alike; checkpointing, with the policy's prompt, changes no gradient."""
    flags, made = picture_flags(tmp_path), tmp_path / "generated"
    train_here("patch", "--loss", "start", "--out", tmp_path / "start", *flags)
    flags += ["--image-prompt", tmp_path / "start/image_prompt.safetensors", "--generated", made]
    train_here("patch", "--out", tmp_path / "first", *flags)
    times, before = {f: f.stat().st_mtime_ns for f in made.iterdir()}, json.loads((tmp_path / "first/report.json").read_text())
    assert load_file(made / "quality.safetensors")["reference"].shape == (4, 2, 2, 2) and len(times) == 8 + 2       # 2 scenes x 2 edits x 2 pictures
    for name, *more in (("power", "patch", "--power", 1), ("same", "reconstruction"), ("dro", "dro"), ("dpo", "dpo"), ("less", "dpo", "--checkpointing")):
        train_here("patch", "--out", tmp_path / name, "--loss", *more, *flags)
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert all(abs(report[k] - before[k]) < 1e-6 for k in report if k.startswith("before")) and report["after identity"] != report["before identity"], name
    a, b = (load_file(tmp_path / name / "image_prompt.safetensors") for name in ("dpo", "less"))
    assert times == {f: f.stat().st_mtime_ns for f in made.iterdir()} and max(relative(a[k], b[k]) for k in a) < 1e-5
    raises("other prompts", train_here, "patch", "--out", tmp_path / "x", *flags, "--held-out", 2)

def test_patch_dro_resumed_inside_a_refresh_period_is_bit_equal(tmp_path):
    """Stopped by SIGTERM after step 3 of 4 (M = 2) and continued, the LoRA is the whole run's bit for bit; the sampler is the base, then the policy."""
    flags, loss, seen = ["dro", "--refresh", 2, "--buffer", 4, "--rank", 2, "--save-every", 100, *picture_flags(tmp_path)], train.DRO.loss, []

    def interrupted(self, rows):
        seen.append(rows[0][2])
        if seen == [0, 0, 1]:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, rows)
    train_here(*flags, "--out", tmp_path / "whole")
    with mock.patch("train.DRO.loss", interrupted):
        train_here(*flags, "--out", tmp_path / "halves")
    assert (tmp_path / "halves/step_3").is_dir()
    train_here(*flags, "--out", tmp_path / "halves")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert all(same(a[k], b[k]) for k in a) and any(v.any() for k, v in a.items() if "lora_B" in k)
    drift = [line["drift"] for line in lines(tmp_path / "whole/metrics.jsonl")]
    assert drift[:2] == [0, 0] and drift[2] > 0                          # 0 only where a drawn point comes with its own velocity, time and prompt

def test_readme_is_true():
    """Code quoted in the equation map stands where it says; commands name files and flags that exist; the file table counts lines; there are at most 250."""
    text = (ROOT / "README.md").read_text()
    for file, rest in re.findall(r"(?:python|torchrun [^`\n]*?) ([\w/]+\.py)([^`\n#&|]*)", text):
        source, words, scripts = (ROOT / file).read_text(), shlex.split(rest.replace("STAGE", "cdpo")), {"train.py": train, "edit.py": edit}
        if file in scripts and "-h" not in words:
            scripts[file].parse(words)
        assert file in scripts or all(word in source for word in words if word.startswith("--")), (file, rest)
    for file, name, code in re.findall(r"^\|.*\| `(\w+\.py):([\w.]+)` \| `(.*)` \|$", text, re.M):
        node = ast.parse(source := (ROOT / file).read_text())
        for part in name.split("."):
            node = {child.name: child for child in node.body if hasattr(child, "name")}[part]
        assert any(code.replace("\\|", "|") in line for line in ast.get_source_segment(source, node).splitlines()), f"{code!r} is not in {file}:{name}"
    counts = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", text, re.M)
    assert dict(counts) == {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")} and len(text.splitlines()) <= 250

def test_house_is_the_designs():
    """The top level holds DESIGN.md's files alone; they and mini/ import the standard library, six packages and one another, never train or edit; all is small."""
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
    assert sum(f.stat().st_size for f in (ROOT / name for name in tracked if name.startswith("mini/")) if f.is_file()) < 25e6
    top, mini = (sum(len(f.read_text().splitlines()) for f in folder.glob("*.py")) for folder in (ROOT, MINI))
    assert top <= 3800 and mini <= 700, f"{top} lines in the ten files, {mini} in mini/"

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
    print(", ".join(f"{n} {outcome}" for outcome, n in count.items() if n or outcome != "skipped"))
    return int(count["failed"] > 0 or count["passed"] == 0)

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
