"""Every test, in one file.   python test_all.py          all of them, no network, no GPU, no peer needed
                           python test_all.py canny    those whose name contains "canny"

Tests against a peer (transformers, diffusers, peft, torch-geometric, opencv, ...; `pip install -r bench/requirements.txt`) are skipped where it is missing.
Each test is a sentence that could be false. pytest runs this file too.
"""
import atexit
import contextlib
import functools
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import cdpo
import controlnet as C
import edit as E
import flux as F
import graph
import lora
import patch_dpo as P
import qwen
import train
from flux import Flux, VAE, image_ids, rope_table, rotate
from graph import PreferenceGraph, User
from qwen import Cache, Config, Qwen, Tokenizer, embed_texts, generate, load_checkpoint, resolve

ROOT = Path(__file__).resolve().parent
torch.set_num_threads(1)


def peer(name):
    """The peer library, or the test is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} is not installed")


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def relative(a, b):
    """||a - b|| / ||b||, in float64."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def raises(kind, part, function, *args, **kwargs):
    """The message of the error of this kind that `function` must raise, and that must contain `part`."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert part in str(error), f"the message {str(error)!r} does not name {part!r}"
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def run(*args, timeout=170, **env):
    """Run one of our scripts as a user would: run("train.py", "graph", "--steps", 3)."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


# -------------------- qwen --------------------
# ---- qwen.py -----------------------------------------------------------------------------------------------------------------
def wild(model):
    """Frozen random weights, large enough that attention, padding and norms matter."""
    torch.manual_seed(0)
    for name, p in model.eval().requires_grad_(False).named_parameters():
        p.copy_(name.endswith("norm.weight") + 0.2 * torch.randn_like(p))
    return model


def tiny_qwen(**changes):
    """A random Qwen without peer or file: 4 heads over 2, or what `changes` says."""
    return wild(Qwen(Config(**{**dict(vocab=61, width=32, inner=48, layers=2, heads=4, kv_heads=2, head_dim=8, eps=1e-6, theta=1e4, qkv_bias=True,
                                      tied=True, headless=False, window=None, eos=(5,)), **changes})))


def peer_qwen(path, kind="Qwen2", head="ForCausalLM", shards=None, **changes):
    """A random transformers model, saved to `path`."""
    tf = peer("transformers")
    tf.utils.logging.disable_progress_bar()
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, eos_token_id=[5, 7], pad_token_id=0)
    model = wild(getattr(tf, kind + head)(getattr(tf, kind + "Config")(**{**sizes, **changes})))
    model.save_pretrained(path, **({"max_shard_size": shards} if shards else {}))
    return model


def padded_batch():
    """ids (3, 17), and masks of 17, 11 and 6 tokens with padding on the right and on the left."""
    right = (torch.arange(17) < torch.tensor([17, 11, 6])[:, None]).long()
    return torch.randint(8, 61, (3, 17), generator=torch.Generator().manual_seed(1)), right, right.flip(1)


def until_eos(row, eos):
    return row[:next((i for i, t in enumerate(row) if t in eos), len(row))]


SHAPES = [dict(), dict(tie_word_embeddings=True, shards="30KB"), dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=36),
          dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40), dict(kind="Mistral"), dict(kind="Mistral", head_dim=10, tie_word_embeddings=True)]


def test_qwen_equals_transformers():
    """For every shape and padding side fp32 logits agree to 1e-5, greedy tokens are the same, also under a repetition penalty, and bf16 logits are at most 1.2 times as far from fp32 as the peer's."""
    ids, right, left = padded_batch()
    for shape in SHAPES:
        with folder() as f:
            theirs, ours = peer_qwen(f, **shape), Qwen.load(f)
            assert len(list(f.glob("*.safetensors"))) > 1 or "shards" not in shape
            for mask in (torch.ones_like(ids), right, left):
                error = relative(ours(ids, mask)[mask > 0], theirs(ids, attention_mask=mask).logits[mask > 0])
                assert error < 1e-5, (shape, error)
            for penalty in (1.0, 1.3):
                prompt = ids.masked_fill(left == 0, 0)            # the peer penalises padding too: let it be a token that nobody generates
                tokens = theirs.generate(prompt, attention_mask=left, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)[:, 17:].tolist()
                assert generate(ours, prompt, attention_mask=left, max_new_tokens=12, repetition_penalty=penalty) == [until_eos(row, (5, 7)) for row in tokens], shape
            exact = theirs(ids).logits
            mine, peers = relative(Qwen.load(f, dtype=torch.bfloat16)(ids), exact), relative(theirs.bfloat16()(ids).logits, exact)
            assert mine < 1.2 * peers < 0.1, (shape, mine, peers)


def test_qwen_full_size_has_the_published_names_and_count():
    """Qwen2.5-7B and 0.5B, built on the meta device, have 7,615,616,512 and 494,032,768 parameters and the peer's names and shapes."""
    sizes = ((152064, 3584, 18944, 28, 28, 4, False), (151936, 896, 4864, 24, 14, 2, True))
    with torch.device("meta"):
        ours = [Qwen(Config(vocab, width, inner, layers, heads, kv, width // heads, 1e-6, 1e6, True, tied, False, None, ())) for vocab, width, inner, layers, heads, kv, tied in sizes]
        assert [sum(p.numel() for p in model.parameters()) for model in ours] == [7615616512, 494032768]
        tf, names = peer("transformers"), ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
        theirs = [tf.Qwen2ForCausalLM(tf.Qwen2Config(**dict(zip(names, size)))) for size in sizes]
    shapes = lambda model: {k: v.shape for k, v in model.state_dict().items()}
    assert [shapes(m) for m in ours] == [shapes(m) for m in theirs]


def test_qwen_text_embeddings_equal_the_peers_last_token():
    """A headless Mistral stored without "model." gives each text the peer's last hidden state, normalised, whatever else is in the batch."""
    with folder() as f:
        tokenizer = Tokenizer.load(ROOT / "mini/qwen")
        theirs, texts = peer_qwen(f, kind="Mistral", head="Model", vocab_size=tokenizer.fast.get_vocab_size()), ["red", "a very long text about a bowl", "x"]
        expected = torch.cat([theirs(torch.tensor([tokenizer.encode(t)])).last_hidden_state[:, -1] for t in texts])
        assert relative(embed_texts(Qwen.load(f), tokenizer, texts, batch_size=2), nn.functional.normalize(expected, dim=-1)) < 1e-5
        raises(ValueError, "without tokens", embed_texts, Qwen.load(f), tokenizer, ["red", ""])


def test_qwen_cache_equals_the_full_forward():
    """Reading a text in pieces of 5, 1, 8 and 3 tokens through the cache gives the hidden states of reading it at once, padded or not."""
    model, (ids, right, left) = tiny_qwen(), padded_batch()
    for mask in (None, right, left):
        cache, ends = Cache(model.config, 3, 17, "cpu", torch.float32), (0, 5, 6, 14, 17)
        parts = [model.model(ids[:, a:b], attention_mask=mask if mask is None else mask[:, :b], cache=cache) for a, b in zip(ends, ends[1:])]
        keep = torch.ones_like(ids) > 0 if mask is None else mask > 0
        assert relative(torch.cat(parts, 1)[keep], model.model(ids, attention_mask=mask)[keep]) < 1e-5


def test_qwen_row_alone_equals_the_row_in_a_batch():
    """Hidden states and greedy tokens of a row do not depend on the batch, the padding, its side, or what the padding tokens are."""
    model, (ids, right, left) = tiny_qwen(), padded_batch()
    alone = [ids[i:i + 1, :n] for i, n in enumerate((17, 11, 6))]
    shifted = torch.stack([row.roll(17 - n) for row, n in zip(ids, (17, 11, 6))])              # the same rows, padded on the left
    for batch, mask in ((ids, right), (shifted, left)):
        hidden = model.model(batch, attention_mask=mask)
        assert all(relative(hidden[i][mask[i] > 0], model.model(row)[0]) < 1e-5 for i, row in enumerate(alone))
        how = dict(max_new_tokens=9, repetition_penalty=1.2)
        assert generate(model, batch, attention_mask=mask, **how) == [generate(model, row, **how)[0] for row in alone]


def test_qwen_rope_depends_on_distance_only():
    """The product of a rotated query and key is the same at positions (3, 8) and (103, 108), and not at (3, 9)."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    product = lambda m, n: (qwen.rotate(q, *qwen.rope_tables(torch.tensor([[m]]), 16, 1e4)) * qwen.rotate(k, *qwen.rope_tables(torch.tensor([[n]]), 16, 1e4))).sum().item()
    assert abs(product(3, 8) - product(103, 108)) < 1e-4 < 1e-2 < abs(product(3, 8) - product(3, 9))


def test_qwen_vectors_stand_in_for_tokens():
    """Embeddings in place of ids give the same logits and the same greedy continuation; other vectors in front change it."""
    model, (ids, _, _) = tiny_qwen(), padded_batch()
    embeds = model.model.embed_tokens(ids)
    assert torch.equal(model(embeds=embeds), model(ids)) and generate(model, embeds=embeds) == generate(model, ids)
    assert generate(model, embeds=torch.cat([torch.randn(3, 4, 32), embeds], 1)) != generate(model, ids)


def test_qwen_generation_stops_and_samples():
    """Each row ends before its own first eos; sampling moves only its own generator and draws from exactly the top-k and top-p sets."""
    model, (ids, _, _) = tiny_qwen(), padded_batch()
    free = generate(tiny_qwen(eos=()), ids, max_new_tokens=20)
    model.config.eos = (free[0][6], free[1][9])
    assert generate(model, ids, max_new_tokens=20) == [until_eos(row, model.config.eos) for row in free] and generate(model, ids, max_new_tokens=0) == [[], [], []]
    state, logits = torch.get_rng_state(), torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().repeat(400, 1)
    draw = lambda *how: set(qwen.sample(logits, *how, torch.Generator().manual_seed(0)).tolist())
    assert draw(1.0, 0, 1.0) == {0, 1, 2, 3, 4} and draw(1.0, 2, 1.0) == {0, 1} and draw(1.0, 0, 0.8) == {0, 1, 2} and draw(0.1, 3, 0.99) == {0}
    one, two = (generate(model, ids, temperature=1.0, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one == two and torch.equal(state, torch.get_rng_state())


def test_qwen_chat_template():
    """A chat is Qwen2.5's template, its default system turn only when none is given; markers are single tokens; an unknown role is refused; e5-mistral's end token is added."""
    with folder() as f:
        tokenizer, user = Tokenizer.load(ROOT / "mini/qwen"), [{"role": "user", "content": "hi."}]
        text = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi.<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.chat(user) == tokenizer.encode(text) and tokenizer.fast.decode(tokenizer.chat(user), skip_special_tokens=False) == text
        assert tokenizer.chat(user).count(tokenizer.fast.token_to_id("<|im_start|>")) == 3
        assert tokenizer.decode(tokenizer.chat([{"role": "system", "content": "be kind"}, *user], add_generation_prompt=False)) == "system\nbe kind\nuser\nhi.\n"
        raises(ValueError, "wizard", tokenizer.chat, [{"role": "wizard", "content": ""}])
        tokenizer.fast.save(str(f / "tokenizer.json"))
        (f / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True, "eos_token": {"content": "<|im_end|>"}}))
        assert Tokenizer.load(f).encode("red") == [*tokenizer.encode("red"), tokenizer.fast.token_to_id("<|im_end|>")]


def test_qwen_checkpointing_and_compile_change_nothing():
    """Gradients through recomputed layers, and logits of the compiled graph, are those of the plain model."""
    model, (ids, right, _), grads = tiny_qwen().requires_grad_(True), padded_batch(), []
    for model.model.checkpointing in (False, True):
        grads.append(torch.autograd.grad(model(ids, right).square().mean(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert relative(torch.compile(tiny_qwen(), backend="aot_eager", fullgraph=True)(ids, right), tiny_qwen()(ids, right)) < 1e-6


def test_loader_names_everything_that_does_not_fit():
    """Missing, unexpected and misshapen tensors are all named, with both shapes; so are a truncated file, an absent shard and an ambiguous folder."""
    with folder() as f:
        good = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
        bad = {k: v.detach() for k, v in good.state_dict().items() if k != "a.bias"} | {"b.weight": torch.zeros(2, 5), "ghost": torch.zeros(1)}
        save_file(bad, f / "x.safetensors")
        message = raises(ValueError, "missing a.bias", load_checkpoint, good, f)
        assert "unexpected ghost" in message and "b.weight has shape (2, 5), expected (2, 4)" in message
        (f / "x.safetensors").write_bytes((f / "x.safetensors").read_bytes()[:-8])
        raises(ValueError, "x.safetensors is truncated", load_checkpoint, good, f)
        save_file(bad, f / "y.safetensors")
        raises(ValueError, "'x.safetensors', 'y.safetensors'", load_checkpoint, good, f)
        (f / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "y.safetensors", "b.weight": "part-2.safetensors"}}))
        raises(ValueError, "part-2.safetensors", load_checkpoint, good, f)


def test_loader_fills_meta_modules_and_keeps_ties():
    """On the meta device or not, a module gets the stored values; a tied head stays tied and need not be on disk, an untied one must."""
    with folder() as f:
        tied = tiny_qwen()
        save_file({k: v for k, v in tied.state_dict().items() if k != "lm_head.weight"}, f / "model.safetensors")
        with torch.device("meta"):
            empty = Qwen(tied.config)
        for copy in (empty, Qwen(tied.config)):
            load_checkpoint(copy, f)
            assert copy.lm_head.weight is copy.model.embed_tokens.weight and all(torch.equal(a, b) for a, b in zip(copy.parameters(), tied.parameters()))
        raises(ValueError, "missing lm_head.weight", load_checkpoint, tiny_qwen(tied=False), f)


def test_loader_refuses_other_models_and_places_by_name():
    """Another model type, rope scaling, a text longer than the window, a mistyped path and a gated repository each end in a sentence that names it."""
    config = dict(model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, rms_norm_eps=1e-6)
    with folder() as f:
        for change, part in ((dict(model_type="llama"), "'llama'"), (dict(rope_scaling={"type": "yarn"}), "'yarn'"), (dict(rope_parameters={"rope_type": "llama3"}), "'llama3'"),
                             (dict(hidden_act="gelu"), "'gelu'"), (dict(use_sliding_window=True), "use_sliding_window True")):
            (f / "config.json").write_text(json.dumps({**config, **change}))
            raises(ValueError, part, Qwen.load, f)
        assert resolve(f) == f and raises(ValueError, "mistake' is not a folder", resolve, f / "mistake") and raises(ValueError, "mini/qwem", resolve, ROOT / "mini/qwem")
        raises(ValueError, "tokenizer.json", Tokenizer.load, f)
    raises(ValueError, "window of 4", tiny_qwen(window=4), torch.zeros(1, 5, dtype=torch.long))
    download, qwen.snapshot_download = qwen.snapshot_download, lambda *args, **kwargs: (_ for _ in ()).throw(OSError("403"))
    try:
        assert "huggingface.co/a/gated" in raises(ValueError, "HF_TOKEN", resolve, "a/gated")
    finally:
        qwen.snapshot_download = download


# ---- lora.py -----------------------------------------------------------------------------------------------------------------
def tiny_lora(dtype=torch.float32, noise=0.1, **how):
    """tiny_qwen with adapters whose policy does something: B of size `noise`."""
    model = tiny_qwen().to(dtype)
    lora.inject(model, **{**dict(rank=2, alpha=4), **how})
    for layer in lora.layers(model).values():
        nn.init.normal_(layer.lora_B["policy"], std=noise, generator=torch.Generator().manual_seed(0))
    return model


def test_lora_files_are_pefts():
    """An adapter made by peft gives peft's logits here, rank-stabilised or not, on all layers or some; saved again, it gives them in peft."""
    pf, (ids, _, _) = peer("peft"), padded_batch()
    for targets, stabilised in (("all-linear", False), (["q_proj", "down_proj"], True)):
        with folder() as f:
            theirs = pf.get_peft_model(peer_qwen(f / "base"), pf.LoraConfig(r=3, lora_alpha=8, lora_dropout=0.1, target_modules=targets, use_rslora=stabilised, task_type="CAUSAL_LM"))
            for name, p in theirs.named_parameters():
                "lora_B" in name and nn.init.normal_(p, std=0.1)
            theirs.eval().save_pretrained(f / "theirs")
            ours = Qwen.load(f / "base")
            plain = ours(ids)
            lora.load_adapter(ours, f / "theirs")
            assert relative(ours(ids), theirs(ids).logits) < 1e-5 < 1e-2 < relative(plain, ours(ids))
            lora.save_adapter(ours, f / "ours", base_model="base")
            assert relative(pf.PeftModel.from_pretrained(peer_qwen(f / "base"), f / "ours").eval()(ids).logits, ours(ids)) < 1e-5
            assert set(load_file(f / "ours/adapter_model.safetensors")) == set(load_file(f / "theirs/adapter_model.safetensors"))


def test_lora_trains_the_policy_alone():
    """At first nothing changes; training moves only the policy, in fp32 over a bf16 base, and leaves every base weight bit for bit, and the reference until it is copied."""
    model, (ids, _, _) = tiny_qwen().bfloat16(), padded_batch()
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids)
    names = lora.inject(model, rank=2, alpha=4, dropout=0.5)
    assert len(names) == 14 and "lm_head" not in names and torch.equal(model(ids), logits)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 28 and all(p.dtype == torch.float32 for p in trainable)
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    for _ in range(2):
        model.train()(ids).float().square().mean().backward()
        optimizer.step()
    trained = model.eval()(ids)
    for adapter, expected in (("reference", logits), (None, logits), ("policy", trained)):
        lora.use(model, adapter)
        assert torch.equal(model(ids), expected)
    assert not torch.equal(trained, logits) and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    lora.copy_adapter(model)
    lora.use(model, "reference")
    assert torch.equal(model(ids), trained)
    raises(ValueError, "'critic'", lora.use, model, "critic")


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


def test_lora_refuses_what_it_cannot_honour():
    """Settings not written here, tensors that do not fit, another scale, unknown targets and a second injection are each named."""
    with folder() as f:
        targets = ["layers.1.self_attn.q_proj", "up_proj"]
        raises(ValueError, "z_proj", lora.inject, tiny_qwen(), targets=["q_proj", "z_proj"])
        raises(ValueError, "already", lora.inject, tiny_lora())
        lora.save_adapter(tiny_lora(targets=targets), f)
        config = json.loads((f / "adapter_config.json").read_text())
        assert len(config["target_modules"]) == 3                                               # "q_proj" alone would mean the other layer too
        raises(ValueError, "unexpected base_model.model.model.layers.1.self_attn.q_proj", lora.load_adapter, tiny_lora(targets=["up_proj"]), f)
        raises(ValueError, "alpha / rank is 2", lora.load_adapter, tiny_lora(alpha=8, targets=targets), f)
        (f / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "rank_pattern": {"q_proj": 9}, "bias": "all", "loftq_config": {}}))
        message = raises(ValueError, "use_dora = True", lora.load_adapter, tiny_qwen(), f)
        assert "rank_pattern" in message and "bias = 'all'" in message and "loftq" not in message


def test_lora_survives_gradient_checkpointing():
    """With recomputed layers and dropout the adapters get the same gradients; switching the adapter before the backward pass is an error, not a wrong gradient."""
    (ids, _, _), grads = padded_batch(), []
    for checkpointing in (False, True):
        model = tiny_lora(dropout=0.3).train()
        model.model.checkpointing = checkpointing
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(model(ids).square().mean(), [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*grads))
    loss = model(ids).square().mean()
    lora.use(model, "reference")
    raises(RuntimeError, "recomputation", loss.backward)


# -------------------- flux --------------------
# ---- flux.py -----------------------------------------------------------------------------------------------------------------
def flux_config(heads=3, head_dim=16, axes=(4, 6, 6), guided=True, doubles=2, singles=3, txt=12, pooled=8):
    return dict(num_attention_heads=heads, attention_head_dim=head_dim, axes_dims_rope=list(axes), guidance_embeds=guided, num_layers=doubles,
                num_single_layers=singles, joint_attention_dim=txt, pooled_projection_dim=pooled, in_channels=64)


def flux_inputs(c, B=2, h=4, w=8, T=5, seed=0):
    torch.manual_seed(seed)
    return dict(img=torch.randn(B, h * w // 4, 64), txt=torch.randn(B, T, c["joint_attention_dim"]), pooled=torch.randn(B, c["pooled_projection_dim"]),
                timestep=torch.rand(B), guidance=torch.rand(B) * 35 if c["guidance_embeds"] else None, img_ids=9 * F.image_ids(h, w), txt_ids=torch.zeros(T, 3))


def louder(module, factor=3.0):
    """Weights large enough that a wrong term shows; norms and biases random too."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p * factor if p.dim() > 1 else p + 0.3 * torch.randn_like(p))
    return module.eval()


def flux_peer(c, x, **residuals):
    """A random diffusers transformer, saved there and loaded here -> (ours, a function dtype -> the peer's velocity)."""
    theirs = louder(peer("diffusers").FluxTransformer2DModel(**c), 1.5)
    with folder() as at:
        theirs.save_pretrained(at)
        ours = F.Flux.load(at)
    def velocity(dtype):
        img, txt, pooled = (x[k].to(dtype) for k in ("img", "txt", "pooled"))
        more = {k: [r.to(dtype) for r in v] for k, v in residuals.items() if v}
        return theirs.to(dtype)(img, txt, pooled, x["timestep"], x["img_ids"], x["txt_ids"], x["guidance"], return_dict=False, **more)[0]
    return ours, velocity


@torch.no_grad()
def test_flux_velocity_equals_diffusers():
    """Ours and diffusers' velocities differ by less than 1e-4 for odd head counts, guidance on and off, batch 1 to 3, with and without residuals."""
    for c, B, control in ((flux_config(), 2, False), (flux_config(heads=5, head_dim=24, axes=(8, 8, 8), guided=False, doubles=1, singles=4), 3, True),
                          (flux_config(heads=1, doubles=3, singles=0), 1, True), (flux_config(doubles=0, singles=2), 2, False)):
        x, D = flux_inputs(c, B), c["num_attention_heads"] * c["attention_head_dim"]
        double, single = ([torch.randn(B, 8, D) for _ in range(min(2, c[k]))] if control else [] for k in ("num_layers", "num_single_layers"))
        ours, theirs = flux_peer(c, x, controlnet_block_samples=double, controlnet_single_block_samples=single)
        assert relative(ours(**x, double_residuals=double, single_residuals=single), theirs(torch.float32)) < 1e-4, c


@torch.no_grad()
def test_flux_bfloat16_is_as_close_to_float32_as_diffusers_is():
    """In bf16 our distance to the fp32 velocity is at most 1.1 times the peer's own at times bf16 holds exactly, and under a tenth at others (the peer rounds 1000 t)."""
    c = flux_config(heads=4, head_dim=32, axes=(8, 12, 12))
    exact_times = dict(timestep=torch.tensor([1.0, 0.5, 0.25, 0.125]), guidance=torch.full((4,), 4.0))
    for x, bound in ((flux_inputs(c, B=4) | exact_times, 1.1), (flux_inputs(c, B=4), 0.1)):
        ours, theirs = flux_peer(c, x)
        exact, rough = theirs(torch.float32), theirs(torch.bfloat16)
        mine = ours.bfloat16()(**{k: v.bfloat16() if k in ("img", "txt", "pooled") else v for k, v in x.items()})
        assert relative(mine, exact) <= bound * relative(rough, exact), (relative(mine, exact), relative(rough, exact))


def test_flux_full_size_has_the_published_parameters():
    """FLUX.1-dev on the meta device has 11,901,408,320 parameters, and T5-XXL 4,762,310,656; all names and shapes of transformer and autoencoder are diffusers'."""
    dev = flux_config(24, 128, (16, 56, 56), True, 19, 38, 4096, 768)
    vae = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, norm_num_groups=32, in_channels=3, out_channels=3,
               use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)
    t5 = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, relative_attention_num_buckets=32, layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        flux, auto, text = F.Flux(dev), F.VAE(vae), F.T5(t5)
    assert [sum(p.numel() for p in m.parameters()) for m in (flux, auto, text)] == [11_901_408_320, 83_819_683, 4_762_310_656]
    d = peer("diffusers")
    with torch.device("meta"):
        theirs = d.FluxTransformer2DModel(**dev), d.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **vae)
    for ours, them in zip((flux, auto), theirs):
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in them.state_dict().items()}


@torch.no_grad()
def test_flux_autoencoder_equals_diffusers():
    """Latents (mean and sample) and pictures equal AutoencoderKL's to 1e-4: 1 to 3 levels, with and without attention, sides that differ."""
    for widths, depth, attention in (([16, 24, 40], 1, False), ([8, 16], 2, True), ([8], 1, True)):
        torch.manual_seed(0)
        n = len(widths)
        theirs = louder(peer("diffusers").AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n, block_out_channels=widths,
                        layers_per_block=depth, norm_num_groups=8, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
                        mid_block_add_attention=attention, scaling_factor=0.3611, shift_factor=0.1159), 1.5)
        with folder() as at:
            theirs.save_pretrained(at)
            ours = F.VAE.load(at)
        image = torch.randn(2, 3, 16, 24)
        posterior = theirs.encode(image).latent_dist
        assert ours.factor == 2 ** (n - 1)
        assert relative(ours.encode(image), (posterior.mode() - 0.1159) * 0.3611) < 1e-4
        sample = posterior.sample(torch.Generator().manual_seed(1))
        assert relative(ours.encode(image, torch.Generator().manual_seed(1)), (sample - 0.1159) * 0.3611) < 1e-4
        latent = torch.randn(2, 16, 4, 6)
        assert relative(ours.decode(latent), theirs.decode(latent / 0.3611 + 0.1159).sample) < 1e-4


@torch.no_grad()
def test_flux_text_encoders_equal_transformers():
    """CLIP's pooled vector (both eos conventions, with the text_model. prefix and without) and T5's states (long enough for far buckets) equal transformers' to 1e-4."""
    t = peer("transformers")
    from safetensors.torch import load_file, save_file
    for eos, act, heads in ((2, "quick_gelu", 3), (98, "gelu", 2)):
        torch.manual_seed(0)
        theirs = louder(t.CLIPTextModel(t.CLIPTextConfig(vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=heads,
                        max_position_embeddings=20, hidden_act=act, eos_token_id=eos, bos_token_id=97)), 2.0)
        ids = torch.tensor([[97, 5, 6, 7, 98, 98, 98], [97, 5, 98, 98, 98, 98, 98]])
        with folder() as at:
            theirs.save_pretrained(at)
            ours = F.CLIPText.load(at)
            assert relative(ours(ids), theirs(ids).pooler_output) < 1e-4
            save_file({"text_model." + k.removeprefix("text_model."): v for k, v in load_file(at / "model.safetensors").items()}, at / "model.safetensors")
            assert torch.equal(F.CLIPText.load(at)(ids), ours(ids))
    theirs = louder(t.T5EncoderModel(t.T5Config(vocab_size=60, d_model=20, d_kv=6, d_ff=30, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu")), 1.2)
    ids = torch.randint(60, (2, 150))
    with folder() as at:
        theirs.save_pretrained(at)
        assert relative(F.T5.load(at)(ids), theirs(ids).last_hidden_state) < 1e-4
        both = load_file(at / "model.safetensors")
        save_file(both | {"encoder.embed_tokens.weight": both["shared.weight"].clone()}, at / "model.safetensors")
        assert relative(F.T5.load(at)(ids), theirs(ids).last_hidden_state) < 1e-4


def text_folders(at):
    """A FLUX.1-shaped folder with tiny text encoders: CLIP from vocab.json + merges.txt, T5 from tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from safetensors.torch import save_file
    letters = [chr(c) for c in range(33, 127)]
    vocab = {s: i for i, s in enumerate(letters + [s + "</w>" for s in letters] + ["an", "ana</w>", "<|startoftext|>", "<|endoftext|>"])}
    t5 = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(s, -3.0) for s in letters], unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    clip = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1, vocab_size=len(vocab), max_position_embeddings=12, hidden_act="quick_gelu", eos_token_id=2)
    text = dict(d_model=12, num_heads=2, d_kv=4, d_ff=16, num_layers=1, vocab_size=98, relative_attention_num_buckets=32, layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu")
    for part, kind, config, pad, length in (("", F.CLIPText, clip, "<|endoftext|>", 12), ("_2", F.T5, text, {"content": "<pad>"}, 20)):
        (at / f"text_encoder{part}").mkdir(), (at / f"tokenizer{part}").mkdir()
        (at / f"tokenizer{part}/tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "model_max_length": length}))
        (at / f"text_encoder{part}/config.json").write_text(json.dumps(config | {"model_type": kind.kind}))
        save_file(kind(config).state_dict(), at / f"text_encoder{part}/model.safetensors")
    (at / "tokenizer/vocab.json").write_text(json.dumps(vocab)), (at / "tokenizer/merges.txt").write_text("#version: 0.2\na n\nan a</w>\n")
    t5.save(str(at / "tokenizer_2/tokenizer.json"))


def test_flux_prompts_become_the_same_ids_as_in_transformers_and_the_same_vectors_alone():
    """Prompts are padded, cut with the end token kept, and encoded alone as in a batch; ids are transformers': case, accents, special tokens, empty and long prompts."""
    prompts = ["Ana's red mug, 12!", "", "  a\tB  <|endoftext|> c", "banana " * 9, "Café naïve", "ana"]
    with folder() as at:
        text_folders(at)
        txt, pooled = F.encode_prompt(at, prompts, batch=4)
        alone = F.encode_prompt(at, prompts[3:4])
        assert txt.shape == (6, 20, 12) and pooled.shape == (6, 8) and relative(txt[3:4], alone[0]) < 1e-6 and relative(pooled[3:4], alone[1]) < 1e-6
        ids = F.TextTokenizer.load(at / "tokenizer")(prompts)
        assert ids[5].tolist() == [190, 189] + [191] * 10 and ids[3, -1] == 191 and 191 not in ids[3, :-1]
        t = peer("transformers")
        for part, kind in (("tokenizer", t.CLIPTokenizer), ("tokenizer_2", t.PreTrainedTokenizerFast)):
            ours = F.TextTokenizer.load(at / part)(prompts)
            theirs = kind.from_pretrained(at / part, pad_token="<pad>" if part == "tokenizer_2" else "<|endoftext|>")
            assert torch.equal(ours, theirs(prompts, padding="max_length", max_length=ours.shape[1], truncation=True, return_tensors="pt").input_ids), part


def test_flux_sigmas_equal_the_golden_values_and_diffusers():
    """Noise levels equal the published schedule to 2e-6 for dev and schnell at several lengths, start at 1 and end at 0."""
    for tokens, want in ((4096, [1, .904531, .759511, .512844, 0]), (1024, [1, .849235, .652489, .384945, 0]), (256, [1, .831824, .622459, .354661, 0])):
        assert (F.sigmas(4, tokens) - torch.tensor(want)).abs().max() < 1e-6
    d = peer("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    for config in (F.SCHEDULE, F.SCHEDULE | {"use_dynamic_shifting": False, "shift": 1.0}, F.SCHEDULE | {"use_dynamic_shifting": False}):
        for tokens, steps in ((64, 1), (1024, 28), (4096, 60)):
            theirs = d.FlowMatchEulerDiscreteScheduler(**config)
            theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
            assert (F.sigmas(steps, tokens, config) - theirs.sigmas).abs().max() < 2e-6, (config, tokens, steps)


@torch.no_grad()
def test_flux_sampler_equals_the_diffusers_pipelines():
    """Packed latents equal FluxPipeline's (guidance; true CFG; schnell) and FluxImg2ImgPipeline's (strength 0.55 of 4 steps) to 1e-4, from the same noise."""
    d, steps = peer("diffusers"), 4
    vae = d.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=16,
                          use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159).eval()
    for guided, schedule in ((True, F.SCHEDULE), (False, F.SCHEDULE | {"use_dynamic_shifting": False, "shift": 1.0})):
        c = flux_config(guided=guided)
        x, no = flux_inputs(c, h=8, w=16), flux_inputs(c, seed=1)
        theirs = louder(d.FluxTransformer2DModel(**c), 1.5)
        (ours := F.Flux(c).eval()).load_state_dict(theirs.state_dict())
        parts = dict(scheduler=d.FlowMatchEulerDiscreteScheduler(**schedule), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=theirs)
        common = dict(prompt_embeds=x["txt"], pooled_prompt_embeds=x["pooled"], height=32, width=64, num_inference_steps=steps, guidance_scale=5.0, output_type="latent")
        levels, source = F.sigmas(steps, 32, schedule), torch.randn(2, 32, 64)
        noised = (1 - levels[1]) * source + levels[1] * x["img"]      # int(4 - 4 * 0.55) = 1 step is skipped; a latent that is given counts as noised
        for kind, given, flags in ((d.FluxPipeline, dict(latents=x["img"]), {}),
                (d.FluxPipeline, dict(latents=x["img"], negative_prompt_embeds=no["txt"], negative_pooled_prompt_embeds=no["pooled"], true_cfg_scale=2.0), dict(negative=(no["txt"], no["pooled"]), cfg=2.0)),
                (d.FluxImg2ImgPipeline, dict(image=torch.zeros(2, 3, 32, 64), latents=noised, strength=0.55), dict(source=source, strength=0.55))):
            pipe = kind(**parts)
            pipe.set_progress_bar_config(disable=True)
            got = F.denoise(ours, x["img"], x["txt"], x["pooled"], F.image_ids(8, 16), levels, guidance=5.0, **flags)
            assert relative(got, pipe(**given, **common).images) < 1e-4, (guided, flags)


class Exact(torch.nn.Module):
    """A stand-in for Flux whose velocity is exact: x = (1-t) x0 + t eps, so eps - x0 = (x - x0) / t."""
    def __init__(self, x0):
        super().__init__()
        self.x0, self.calls = x0, []
    rope = lambda self, *ids: None
    modulations = lambda self, levels, g, pooled: [t.expand(len(pooled)) for t in levels]
    def velocity(self, x, txt, t, rope, double=(), single=()):
        self.calls.append((t[0].item(), len(double)))
        return (x - self.x0 + txt.mean()) / t[:, None, None]


def test_flux_euler_with_the_exact_velocity_recovers_the_picture():
    """With the exact velocity any number of steps ends at x_0; from a noised source too, with strength * steps steps rounded up; strength 0 returns the source, others are refused."""
    x0, source, noise, txt, pooled = torch.randn(2, 6, 64), torch.randn(2, 6, 64), torch.randn(2, 6, 64), torch.zeros(2, 3, 4), torch.zeros(2, 4)
    for steps in (1, 7):
        assert relative(F.denoise(Exact(x0), noise, txt, pooled, F.image_ids(4, 6), F.sigmas(steps, 6)), x0) < 1e-5
    for strength, calls in ((1.0, 10), (0.6, 6), (0.35, 4), (0.0, 0)):
        flux, levels = Exact(x0), F.sigmas(10, 6)
        out = F.denoise(flux, noise, txt, pooled, F.image_ids(4, 6), levels, source=source, strength=strength)
        assert len(flux.calls) == calls and relative(out, x0 if calls else source) < 1e-5
        assert not calls or flux.calls[0][0] == levels[10 - calls]
    raises(ValueError, "strength is 1.5", F.denoise, Exact(x0), noise, txt, pooled, None, levels, source=source, strength=1.5)
    raises(ValueError, "source", F.denoise, Exact(x0), noise, txt, pooled, None, levels, strength=0.5)


def test_flux_guidance_control_and_overflow_reach_the_sampler():
    """cfg extrapolates from the negative prompt, the control's residuals arrive at the steps it chose, and latents that overflow are an error, not a black picture."""
    x0, noise, zero = torch.randn(1, 6, 64), torch.randn(1, 6, 64), torch.zeros(1, 3, 4)
    out = F.denoise(Exact(x0), noise, zero + 1, zero[:, 0], F.image_ids(4, 6), F.sigmas(1, 6), negative=(zero, zero[:, 0]), cfg=3.0)
    assert relative(out, x0 - 3) < 1e-5
    raises(ValueError, "cfg is 3.0", F.denoise, Exact(x0), noise, zero, zero[:, 0], F.image_ids(4, 6), F.sigmas(1, 6), cfg=3.0)
    flux = Exact(x0)
    F.denoise(flux, noise, zero, zero[:, 0], F.image_ids(4, 6), F.sigmas(4, 6), control=lambda i, n, x, t: ([x], ()) if i < n // 2 else ((), ()))
    assert [n for _, n in flux.calls] == [1, 1, 0, 0]
    raises(ValueError, "not finite", F.denoise, Exact(x0 / 0), noise, zero, zero[:, 0], F.image_ids(4, 6), F.sigmas(2, 6))


def test_flux_pack_and_unpack_are_inverse():
    """unpack(pack(z)) is z; token 1 holds the patch right of token 0 with inner order (channel, dy, dx) and stands at position (0, 0, 1); odd sides are refused."""
    z = torch.randn(2, 16, 4, 6)
    assert torch.equal(F.unpack(F.pack(z), 4, 6), z)
    assert torch.equal(F.pack(z)[:, 1], z[:, :, :2, 2:4].flatten(1)) and F.image_ids(4, 6)[1].tolist() == [0, 0, 1] and F.image_ids(4, 6)[-1].tolist() == [0, 1, 2]
    raises(ValueError, "5 x 6", F.pack, torch.randn(1, 16, 5, 6))


@torch.no_grad()
def test_flux_rope_depends_on_distance_only():
    """Moving every token by the same offset, far away and in both axes, leaves the velocity; moving one token does not; the table stays fp32 under bf16 weights."""
    c = flux_config()
    flux, x = louder(F.Flux(c)), flux_inputs(c)
    base, offset = flux(**x), torch.tensor([3.0, 50.0, 17.0])
    assert relative(flux(**x | {"img_ids": x["img_ids"] + offset, "txt_ids": x["txt_ids"] + offset}), base) < 1e-4
    assert relative(flux(**x | {"img_ids": x["img_ids"] * 2}), base) > 1e-3
    assert flux.bfloat16().rope(x["txt_ids"], x["img_ids"]).dtype == torch.complex64


@torch.no_grad()
def test_flux_a_row_alone_equals_the_row_in_a_batch():
    """Row 1 of a batch with three different timesteps equals the same row alone; precomputed modulations equal the forward's, and their layers alone stay behind on offload."""
    c = flux_config()
    flux, x = louder(F.Flux(c)), flux_inputs(c, B=3)
    row = {k: v if k.endswith("_ids") else v[1:2] for k, v in x.items()}
    assert relative(flux(**x)[1:2], flux(**row)) < 1e-5
    modulation = flux.modulation(x["timestep"], x["guidance"], x["pooled"])
    assert modulation.shape == (3, 12 * 2 + 3 * 3 + 2, 48)
    assert torch.equal(flux.velocity(x["img"], x["txt"], modulation, flux.rope(x["txt_ids"], x["img_ids"])), flux(**x))
    assert all(p.is_meta != (".norm1" in k or ".norm.linear" in k or "norm_out" in k) for k, p in F.offload_modulation(flux, "meta").named_parameters())


def test_flux_checkpointing_changes_memory_and_not_gradients():
    """With checkpointing every parameter's gradient equals the plain one, none is missing, and the image-prompt hook receives the image's queries in every block."""
    c, grads, seen = flux_config(), [], []
    flux, x = louder(F.Flux(c)), flux_inputs(c)
    for flux.checkpointing in (False, True):
        flux.zero_grad()
        flux(**x).square().mean().backward()
        grads.append([p.grad.clone() for p in flux.parameters()])
    assert max(relative(a, b) for a, b in zip(*grads)) < 1e-5 and all(g.abs().sum() > 0 for g in grads[0])
    flux.checkpointing, plain = False, flux(**x)
    for block in flux.blocks():
        block.attn.image_prompt = lambda q: seen.append(q.shape) or 0 * q + len(seen)
    assert relative(flux(**x), plain) > 1e-3 and seen == [(2, 3, 8, 16)] * 5


def test_flux_refuses_what_it_cannot_read():
    """Another model's config, quantised convolutions, an unknown activation, axes that do not fit, guidance missing or without an embedding: each is named."""
    with folder() as at:
        (at / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
        raises(ValueError, "SD3Transformer2DModel", F.Flux.load, at)
        raises(ValueError, "config.json", F.VAE.load, at / "absent")
        (at / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24}')
        raises(ValueError, "attention_head_dim", F.Flux.load, at)
    raises(ValueError, "use_quant_conv", F.VAE, {"latent_channels": 4})
    raises(ValueError, "'relu'", F.T5, {"feed_forward_proj": "relu"})
    raises(ValueError, "[4, 4, 4]", F.Flux, flux_config(axes=(4, 4, 4)))
    raises(ValueError, "steps is 0", F.sigmas, 0, 64)
    for guided in (True, False):
        c = flux_config(guided=guided)
        raises(ValueError, "guidance", F.Flux(c), **flux_inputs(c) | {"guidance": None if guided else torch.ones(2)})


# -------------------- controlnet --------------------
# ---- controlnet.py -----------------------------------------------------------------------------------------------------------
def control_config(modes=10, doubles=2, singles=3, **more):
    return flux_config(doubles=doubles, singles=singles, **more) | {"num_mode": modes, "_class_name": "FluxControlNetModel"}


def test_canny_is_bit_for_bit_opencvs():
    """On photographs, noise and slivers, gray and colour, our edges differ from OpenCV's in no pixel at any threshold."""
    cv2, data, rng = peer("cv2"), peer("skimage.data"), np.random.default_rng(0)
    pictures = [data.astronaut(), data.coffee(), data.camera(), data.page()]
    pictures += [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((200, 331, 3), (128, 128), (1, 1), (1, 9, 3), (7, 1), (2, 2))]
    pictures += [rng.integers(100, 110, (99, 64, 3), dtype=np.uint8)]
    for image in pictures:
        for low, high in ((100, 200), (50, 200), (0, 0), (10, 30), (200, 100), (33.7, 99.9), (-5, 20), (300, 900)):
            assert (C.canny(image, low, high) == cv2.Canny(image, low, high)).all(), (image.shape, low, high)


def test_canny_follows_weak_edges_from_strong_ones_only():
    """A square of weak contrast has edges exactly when a strong one touches it; another dtype is refused by name."""
    image = np.zeros((40, 40), np.uint8)
    image[10:30, 10:30] = 30
    assert C.canny(image).sum() == 0
    image[10:14, 10:14] = 255
    edges = C.canny(image)
    assert edges[28:32, 12:28].any() and set(np.unique(edges)) == {0, 255}
    raises(ValueError, "float64", C.canny, image / 255)


@torch.no_grad()
def test_controlnet_residuals_equal_diffusers_in_every_mode():
    """Union nets in each of their modes, and nets without modes, give diffusers' residuals to 1e-4, and the Flux that takes them its velocity."""
    diffusers = peer("diffusers")
    base = flux_config(doubles=5, singles=7)
    theirs_flux = louder(diffusers.FluxTransformer2DModel(**base), 1.5)
    for c in (control_config(), control_config(modes=None, doubles=6, singles=0), control_config(modes=7, doubles=0, singles=2), control_config(guided=False, doubles=1)):
        x, theirs = flux_inputs(c), louder(diffusers.FluxControlNetModel(**{k: v for k, v in c.items() if k[0] != "_"}), 1.5)
        with folder() as at, folder() as at2:
            theirs.save_pretrained(at), theirs_flux.save_pretrained(at2)
            ours, flux = C.ControlNet.load(at), F.Flux.load(at2)
        args = x["img"], torch.randn(2, 8, 64)
        for mode in range(c["num_mode"] or 1):
            expected = theirs(*args, mode * torch.ones(2, 1, dtype=torch.long) if c["num_mode"] else None, 0.7, x["txt"], x["pooled"], x["timestep"], x["img_ids"], x["txt_ids"],
                              x["guidance"], return_dict=False)
            got = ours(*args, *(x[k] for k in ("txt", "pooled", "timestep", "guidance", "img_ids", "txt_ids")), mode=mode, scale=0.7)
            for a, b in zip(got, expected):
                assert len(a) == len(b or []) and all(relative(p, q) < 1e-4 for p, q in zip(a, b or [])), (c, mode)
        x["guidance"] = torch.full((2,), 3.5)
        theirs_v = theirs_flux(x["img"], x["txt"], x["pooled"], x["timestep"], x["img_ids"], x["txt_ids"], x["guidance"], controlnet_block_samples=expected[0], controlnet_single_block_samples=expected[1], return_dict=False)[0]
        assert relative(flux(**x, double_residuals=got[0], single_residuals=got[1]), theirs_v) < 1e-4


@torch.no_grad()
def test_controlnet_steered_sampler_equals_the_diffusers_pipeline():
    """From control picture to latents, at scale 0.7 between start 0.2 and end 0.9 of 5 steps, with and without true CFG, ours are FluxControlNetPipeline's to 1e-4."""
    d, c, base = peer("diffusers"), control_config(), flux_config()
    vae = louder(d.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=16,
                                 use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159), 1.0)
    vae.encoder.conv_out.weight[16:], vae.encoder.conv_out.bias[16:] = 0, -100           # the pipeline samples the posterior: leave it no width
    net, flux = louder(d.FluxControlNetModel(**{k: v for k, v in c.items() if k[0] != "_"}), 1.5), louder(d.FluxTransformer2DModel(**base), 1.5)
    with folder() as at:
        vae.save_pretrained(at / "vae"), net.save_pretrained(at / "net"), flux.save_pretrained(at / "flux")
        ours_vae, ours_net, ours = F.VAE.load(at / "vae"), C.ControlNet.load(at / "net"), F.Flux.load(at / "flux")
    x, no, image = flux_inputs(base, h=8, w=16), flux_inputs(base, seed=1), np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    pipe = d.FluxControlNetPipeline(d.FlowMatchEulerDiscreteScheduler(**F.SCHEDULE), vae, None, None, None, None, flux, net)
    pipe.set_progress_bar_config(disable=True)
    given = dict(prompt_embeds=x["txt"], pooled_prompt_embeds=x["pooled"], height=32, width=64, num_inference_steps=5, guidance_scale=5.0, output_type="latent", latents=x["img"],
                 control_image=Image.fromarray(image), control_mode=3, controlnet_conditioning_scale=0.7, control_guidance_start=0.2, control_guidance_end=0.9)
    control, ids, levels = F.pack(ours_vae.encode(C.to_tensor(image, "cpu"))).expand(2, -1, -1), F.image_ids(8, 16), F.sigmas(5, 32)
    steering = C.steer(ours_net, control, x["txt"], x["pooled"], ids, levels, 5.0, mode=3, scale=0.7, start=0.2, end=0.9)
    for more, flags in (({}, {}), (dict(negative_prompt_embeds=no["txt"], negative_pooled_prompt_embeds=no["pooled"], true_cfg_scale=2.0), dict(negative=(no["txt"], no["pooled"]), cfg=2.0))):
        got = F.denoise(ours, x["img"], x["txt"], x["pooled"], ids, levels, guidance=5.0, control=steering, **flags)
        assert relative(got, pipe(**given, **more).images) < 1e-4, flags
    assert relative(F.denoise(ours, x["img"], x["txt"], x["pooled"], ids, levels, guidance=5.0), got) > 1e-2, "the control made no difference"


@torch.no_grad()
def test_controlnet_row_alone_equals_row_in_a_batch_with_other_modes():
    """Modes may differ within a batch: each row's residuals are those it has alone; twice the scale is twice the residuals; a mode outside the table is refused."""
    c = control_config(modes=4)
    net, x, control = louder(C.ControlNet(c)), flux_inputs(c, B=3), torch.randn(3, 8, 64)
    both = net(control=control, mode=torch.tensor([0, 3, 1]), **x)
    for i, mode in enumerate((0, 3, 1)):
        alone = net(control=control[i:i + 1], mode=mode, scale=2.0, **{k: v if k.endswith("ids") else v[i:i + 1] for k, v in x.items()})
        assert all(relative(a, 2 * b[i:i + 1]) < 1e-5 for a, b in zip(sum(alone, []), sum(both, [])))
    raises(ValueError, "mode is 4", net, control=control, mode=4, **x)


@torch.no_grad()
def test_controlnet_new_net_is_the_identity_and_streaming_changes_no_bit():
    """A freshly made net adds nothing to Flux's velocity; with blocks that visit the device one at a time, residuals are bit-equal and every weight is home again."""
    c = control_config()
    flux, net, x = louder(F.Flux(flux_config())), C.ControlNet(c), flux_inputs(c)
    double, single = net(control=torch.randn(2, 8, 64), **x)
    assert torch.equal(flux(**x), flux(**x, double_residuals=double, single_residuals=single))
    control, before = torch.randn(2, 8, 64), {k: v.data_ptr() for k, v in louder(net).state_dict().items()}
    expected = sum(net(control=control, **x), [])
    assert all(torch.equal(a, b) for a, b in zip(sum(C.stream(net, "cpu")(control=control, **x), []), expected))
    assert before == {k: v.data_ptr() for k, v in net.state_dict().items()}


def test_controlnet_full_size_has_the_published_parameters():
    """ControlNet-Union has 3,301,956,608 parameters, diffusers' names and shapes; Union-Pro-2.0 (6 double blocks, no mode) too."""
    real = dict(heads=24, head_dim=128, axes=(16, 56, 56), txt=4096, pooled=768)
    for c, count in ((control_config(10, 5, 10, **real), 3_301_956_608), (control_config(None, 6, 0, **real), None)):
        with torch.device("meta"):
            ours = {k: v.shape for k, v in C.ControlNet(c).state_dict().items()}
            assert count in (None, sum(shape.numel() for shape in ours.values()))
            if "diffusers" in sys.modules:
                assert ours == {k: v.shape for k, v in peer("diffusers").FluxControlNetModel(**{k: v for k, v in c.items() if k[0] != "_"}).state_dict().items()}


def test_controlnet_refuses_other_designs_by_name():
    """An XLabs net, a net for a transformer of another width, another model's config and a control picture nobody can draw are each named in one sentence."""
    from safetensors.torch import save_file
    with folder() as at:
        (at / "config.json").write_text(json.dumps(control_config()))
        for name in ("input_hint_block.0.weight", "double_blocks.0.img_mod.lin.weight"):
            save_file({name: torch.zeros(1)}, at / "x.safetensors")
            raises(ValueError, "XLabs", C.ControlNet.load, at)
        save_file(C.ControlNet(control_config()).state_dict(), at / "x.safetensors")
        C.ControlNet.load(at)
        raises(ValueError, "FluxControlNetModel", F.Flux.load, at)
        (at / "transformer").mkdir()
        wide = flux_config(heads=5) | {"_class_name": "FluxTransformer2DModel"}
        (at / "transformer" / "config.json").write_text(json.dumps(wide))
        save_file(F.Flux(wide).state_dict(), at / "transformer" / "x.safetensors")
        raises(ValueError, "is not a ControlNet for", C.load_pair, at, at, "cpu", torch.float32, False)
    raises(ValueError, "depth", C.control_picture, np.zeros((8, 8, 3), np.uint8), "depth")


def test_render_frees_each_part_before_the_next():
    """When a part of the picture stack is loaded, no module of an earlier part is alive but the autoencoder; what comes out of a batch of 2 is what comes out of each alone, to one level."""
    import contextlib, gc
    alive, jobs = [], dict(shape=(64, 64), controls=[np.zeros((64, 64, 3), np.uint8)] * 2, steps=2, guidance=3.5)

    @contextlib.contextmanager
    def stage(name):
        alive.append({type(o).__name__ for o in gc.get_objects() if isinstance(o, (F.Pretrained,))} - before)
        yield
    before = {type(o).__name__ for o in gc.get_objects() if isinstance(o, F.Pretrained)}
    flux, net = ROOT / "mini/flux", ROOT / "mini/controlnet"
    both = C.render(flux, net, ["A red mug", "A vase"], [0, 1], stage=stage, batch=2, **jobs)
    assert len(alive) == 4 and set.union(*alive) <= {"VAE"}, alive
    for i, prompt in enumerate(["A red mug", "A vase"]):
        alone = C.render(flux, net, [prompt], [i], **{**jobs, "controls": jobs["controls"][:1]})
        assert np.abs(alone[0].astype(int) - both[i]).max() <= 1


# -------------------- graph --------------------
PEOPLE = [User("a", ["red", "gold"], ["ice"]), User("b", ["red"], ["gold", "ice"]), User("c", ["red", "gold", "ice"], []), User("d", [], [])]
COLOURS = ["gold", "ice", "red"]


def toy_graph(users=40, attributes=12, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    names = [f"t{i}" for i in range(attributes)]
    people = [User(f"u{i}", names[i % 2::2][:4 + i % 3], names[1 - i % 2::2][:3 + i % 2]) for i in range(users)]
    return people, PreferenceGraph.build(people, names, torch.randn(attributes, width, generator=g))


def test_graph_reader_names_file_and_line():
    """A bad line of users.jsonl is an error that names the file, the line and what was wanted."""
    good = json.dumps({"user": "ana", "likes": ["red"], "dislikes": []})
    cases = {"{": "not a line of JSON", "[1]": "a JSON object", '{"user": "x", "likes": "red", "dislikes": []}': '"likes" must be a list of strings',
             '{"user": "x", "likes": [1], "dislikes": []}': "a list of strings", '{"user": 3, "likes": [], "dislikes": []}': '"user" must be a string',
             '{"user": "x", "likes": ["a"], "dislikes": ["a"]}': "likes and dislikes 'a'", good: "appears twice", "\xff".encode("latin1"): "not a line of JSON"}
    with folder() as d:
        for bad, part in cases.items():
            bad = bad if isinstance(bad, bytes) else bad.encode()
            (d / "users.jsonl").write_bytes(good.encode() + b"\n\n" + bad + b"\n")
            assert f"{d / 'users.jsonl'}:3:" in raises(ValueError, part, graph.read_users, d / "users.jsonl")
        (d / "empty.jsonl").write_text("")
        assert graph.read_users(d / "empty.jsonl") == []
        raises(ValueError, "no such file", graph.read_users, d / "none.jsonl")
        raises(ValueError, "unknown attribute 'blue'", graph.edges_of, [User("x", ["blue"], [])], COLOURS)


def test_graph_similar_users_follow_equation_6():
    """Shared attributes over the largest shared count of any two users, best first; a user with nothing in common has score 0."""
    signs = PreferenceGraph.build(PEOPLE, COLOURS, None).signs()
    want = {"shared": {(0, 1): 3, (0, 2): 3, (1, 2): 3}, "signed": {(0, 1): 1, (0, 2): 1, (1, 2): -1}, "likes": {(0, 1): 1, (0, 2): 2, (1, 2): 1}}
    for kind, counts in want.items():
        index, score = graph.similar_users(signs, 3, kind)
        table, most = {**counts, **{(v, u): n for (u, v), n in counts.items()}}, max(counts.values())
        for u in range(4):
            got = {v: s for v, s in zip(index[u].tolist(), score[u].tolist()) if s}
            assert got == {v: max(0, n) / most for (w, v), n in table.items() if w == u and n > 0}, (kind, u, got)
            assert score[u].tolist() == sorted(score[u].tolist(), reverse=True)
    assert index[3].tolist() == [3, 3, 3] and score[3].tolist() == [0, 0, 0]


def test_graph_similar_users_are_exact_for_any_chunk_and_k():
    """Chunks change nothing, the scores are those of the full U x U table, and k beyond the number of users only pads."""
    signs = torch.randint(-1, 2, (70, 20), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    full = (signs.abs().int() @ signs.abs().int().T).fill_diagonal_(0)
    index, score = graph.similar_users(signs, 100, "shared", chunk=7)
    same = graph.similar_users(signs, 100, "shared", chunk=64)
    assert index.shape == (70, 100) and torch.equal(index, same[0]) and torch.equal(score, same[1])
    assert torch.equal(score[:, :70], full.sort(descending=True).values / full.max()) and not score[:, 69:].any()
    assert all(len({v for v, s in zip(i, s) if s}) == (s > 0).sum() for i, s in zip(index.tolist(), score))
    assert [t.shape for t in graph.similar_users(torch.zeros(0, 3, dtype=torch.int8), 2)] == [(0, 2), (0, 2)]


def test_graph_sage_equals_pyg():
    """SAGEConv takes PyG's weights and gives PyG's numbers and gradients; a node without neighbours gets a zero mean."""
    pyg = peer("torch_geometric.nn")
    g = torch.Generator().manual_seed(0)
    src, dst = torch.randn(9, 6, generator=g), torch.randn(5, 6, generator=g)
    edges = torch.stack([torch.randint(9, (30,), generator=g), torch.randint(4, (30,), generator=g)])       # node 4 has no neighbour
    theirs, ours = pyg.SAGEConv((6, 6), 7), graph.SAGEConv(6, 7)
    ours.load_state_dict(theirs.state_dict())
    out, want = ours(src, dst, edges), theirs((src, dst), edges)
    assert relative(out.detach(), want.detach()) < 1e-6
    assert relative(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m, y in ((ours, out), (theirs, want)) if y.square().sum().backward() is None)) < 1e-6
    assert torch.allclose(out[4], ours.lin_l.bias + ours.lin_r.weight @ dst[4], atol=1e-6)


def test_graph_held_out_edges_carry_no_message():
    """Held-out edges could vanish from the graph without changing one embedding; 60/20/20 is a partition; AUC counts ties as one half."""
    _, built = toy_graph()
    model = graph.EdgeModel(built)
    parts = torch.cat(list(model.split.values()), 1)
    assert sorted(map(tuple, parts.T.tolist())) == sorted(map(tuple, built.edges.T.tolist()))
    assert [round(e.shape[1] / built.edges.shape[1], 1) for e in model.split.values()] == [0.6, 0.2, 0.2]
    asked, before = model.split["test"], model.logits(model.split["train"], model.split["test"], model.vectors)
    built.edges = model.split["train"]
    assert torch.equal(before, model.logits(model.split["train"], asked, model.vectors))
    assert graph.auc(torch.tensor([3.0, 2, 1, 1]), torch.tensor([True, False, True, False])) == (1 + 1 + 0 + 0.5) / 4


def test_graph_pretraining_learns_and_repeats():
    """A graph of two tastes is learned (AUC > 0.95 on held-out edges), and the same seed gives the same weights."""
    people, built = toy_graph(80)
    runs = [graph.pretrain(built, 16, 16, epochs=60) for _ in range(2)]
    assert runs[0][1]["auc"] > 0.95 and all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m, _ in runs)))


def test_graph_new_user_is_inductive():
    """A new user's embedding equals that of a stored user with a zero vector whom attributes do not hear, depends on nobody else, and sees the sign."""
    people, built = toy_graph()
    model = graph.EdgeModel(built)
    states = model.sage(model.vectors, built.features, built.edges)[2]
    new = [User("x", ["t0"], ["t1"]), User("y", ["t1"], ["t0"]), User("z", [], [])]
    h = graph.embed_new_user(model.sage, states, new, built.attributes)
    alone = torch.cat([graph.embed_new_user(model.sage, states, [u], built.attributes) for u in new])
    assert torch.allclose(h, alone, atol=1e-6) and not torch.allclose(h[0], h[1])
    unsigned = graph.EdgeModel(built, signed=False)
    states = unsigned.sage(unsigned.vectors, built.features, built.edges)[2]
    h = graph.embed_new_user(unsigned.sage, states, new, built.attributes)
    assert torch.allclose(h[0], h[1], atol=1e-6) and h[2].isfinite().all()


def test_cdpo_logprobs_equal_the_full_softmax_for_any_chunk():
    """Answer log-probabilities and their gradients equal log_softmax over the whole (B,T,V) table; a row without answer gives 0."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 6, 8, generator=g, requires_grad=True), torch.randn(50, 8, generator=g, requires_grad=True)
    labels = torch.tensor([[-100, 3, 4, -100, -100, -100], [-100] * 6, [1, 2, 3, 4, 5, 6]])
    full = (hidden @ head.T).log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == -100, 0).sum(-1)
    want = torch.autograd.grad((full * torch.tensor([1.0, 2, 3])).sum(), (hidden, head))
    for chunk in (1, 4, 1000):
        logp = cdpo.token_logprobs(hidden, head, labels, chunk)
        got = torch.autograd.grad((logp * torch.tensor([1.0, 2, 3])).sum(), (hidden, head))
        assert logp[1] == 0 and relative(logp.detach(), full.detach()) < 1e-6 and all(relative(a, b) < 1e-5 for a, b in zip(got, want))


def test_cdpo_losses_follow_equations_1_and_7():
    """ln 2 where policy = reference; a dislike of the chosen answer costs; Eq. 7 averages neighbours by similarity, and none leave the own term."""
    zero, one = torch.zeros(2), torch.ones(2)
    assert torch.allclose(cdpo.dpo_loss(zero, one, zero, one)[0], torch.tensor(2.0).log())
    losses, chosen, rejected = cdpo.dpo_loss(zero + 3, zero - 1, one, one, beta=0.5)
    assert torch.allclose(losses, torch.log1p(torch.exp(torch.tensor(-2.0)))) and chosen.tolist() == [1, 1] and rejected.tolist() == [-1, -1]
    own, near = torch.tensor([1.0, 1.0]), torch.tensor([[4.0, 1.0], [7.0, 7.0]])
    got = cdpo.cdpo_loss(own, near, torch.tensor([[0.5, 1.0], [0.0, 0.0]]), lam=0.3)
    assert torch.allclose(got, torch.tensor([1 + 0.3 * 2.0, 1.0]))


def test_cdpo_collaborative_file_returns_the_same_tokens():
    """collaborative.safetensors alone gives stored and new users the same soft tokens as the model that wrote it; a cut file is refused by name."""
    _, built = toy_graph()
    model = cdpo.UserTokens(built, hidden_dim=6, out_dim=5, soft={"hidden_dim": 7, "out_dim": 4, "tokens": 3, "std": 0.5})
    new = [User("x", ["t0"], ["t1"]), User("y", [], [])]
    with folder() as d:
        model.save(d / "collaborative.safetensors")
        read = cdpo.UserTokens.load(d / "collaborative.safetensors")
        assert relative(read.soft(read.new(new)), model.soft(model.new(new))) < 1e-6 and relative(read.embeddings(), model.embeddings()) < 1e-6
        assert read.soft(read.new(new)).shape == (2, 3, 4) and read.graph.users == built.users
        (d / "cut").write_bytes((d / "collaborative.safetensors").read_bytes()[:-9])
        raises(ValueError, "not a whole collaborative.safetensors", cdpo.UserTokens.load, d / "cut")


def test_cdpo_packed_answers_equal_separate_ones():
    """Chosen and rejected in one sequence behind one prompt give the log-probabilities and gradients of each alone, whatever else is in the batch."""
    from qwen import Qwen, Tokenizer
    model, tokenizer = Qwen.load(ROOT / "mini/qwen"), Tokenizer.load(ROOT / "mini/qwen")
    soft = torch.randn(2, 3, model.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    texts = [("A red mug", "Paint the mug neon green", "Add a leaf"), ("A white bowl in front of a grey wall", "Make it gold", "Turn the bowl into ice")]
    rows = [cdpo.encode(tokenizer, cdpo.prompt(caption), *answers) for caption, *answers in texts]
    packed, alone = cdpo.answer_logprobs(model, rows, soft), torch.zeros(2, 2)
    for i, (prompt, answers) in enumerate(rows):
        for j, answer in enumerate(answers):
            embeds = torch.cat([soft[i], model.model.embed_tokens(torch.tensor(prompt + answer))])[None]
            logp = model.lm_head(model.model(embeds=embeds)).log_softmax(-1)[0, 3 + len(prompt) - 1:-1]
            alone[i, j] = logp.gather(-1, torch.tensor(answer)[:, None]).sum()
    assert relative(packed.detach(), alone.detach()) < 1e-6
    assert relative(*(torch.autograd.grad((x * torch.tensor([[1.0, 2], [3, 4]])).sum(), soft)[0] for x in (packed, alone))) < 1e-5


# -------------------- world --------------------
sys.path.insert(0, str(ROOT / "mini"))


def named(text):
    """The attributes that an instruction names."""
    from concepts import TYPE_OF
    return [a for a in TYPE_OF if a in text]


def test_world_same_seed_gives_same_bytes_and_more_users_change_no_earlier_one():
    """Every file is a function of the seed; users and pairs of a small world are the first lines of a larger one."""
    with folder() as d:
        for name, users in (("a", 5), ("b", 5), ("c", 9)):
            assert run("mini/world.py", "--out", d / name, "--users", users, "--test-users", 2, "--edits", 20, "--scenes", 0).returncode == 0
        assert run("mini/world.py", "--out", d / "d", "--users", 5, "--test-users", 2, "--edits", 20, "--scenes", 0, "--seed", 1).returncode == 0
        read = lambda world: {f.name: f.read_bytes() for f in sorted((d / world).iterdir())}
        assert sorted(read("a")) == ["edits.jsonl", "pairs.jsonl", "pairs_test.jsonl", "users.jsonl", "users_test.jsonl"]
        assert read("a") == read("b") and all(read("c")[f].startswith(read("a")[f]) for f in read("a")) and read("a")["users.jsonl"] != read("d")["users.jsonl"]


def test_world_pairs_ask_for_stated_likes_and_never_mention_a_hidden_one():
    """48 pairs a user; chosen names one stated like, rejected one attribute of the edit type that is not liked; the four lists of a taste are disjoint."""
    from concepts import TYPE_OF
    from world import people
    users, pairs = people("train", 40, 0)
    assert len(pairs) == 48 * 40 and len({u["user"] for u in users}) == 40
    for i, u in enumerate(users):
        lists = u["likes"] + u["dislikes"] + u["hidden"]
        assert len(set(lists)) == len(lists) and set(lists) <= set(TYPE_OF) and u["hidden"] and u["dislikes"]
        for p in pairs[48 * i:48 * i + 48]:
            (chosen,), (rejected,) = named(p["chosen"]), named(p["rejected"])
            assert p["user"] == u["user"] and chosen in u["likes"] and rejected not in u["likes"] + u["hidden"]
            assert TYPE_OF[chosen] == p["edit_type"] or not any(TYPE_OF[a] == p["edit_type"] for a in u["likes"])


def test_world_themes_cover_all_attributes_and_every_edit_type():
    """45 attributes in nine themes, each theme with all six edit types; no name contains another, so an instruction names what it contains."""
    from concepts import ATTRIBUTES, TYPE_OF, instruction
    from world import THEMES
    assert set().union(*THEMES.values()) == set(TYPE_OF) and all({TYPE_OF[a] for a in t} == set(ATTRIBUTES) for t in THEMES.values())
    assert all(named(instruction("teddy bear", a, i)) == [a] for a in TYPE_OF for i in range(4))


def test_world_shipped_sample_is_what_the_command_writes():
    """mini/sample's text files are the bytes of `python mini/world.py --sample`, its users are readable, and each picture it names is there."""
    import json
    from PIL import Image
    from graph import read_users
    with folder() as d:
        assert run("mini/world.py", "--sample", "--out", d, "--scenes", 0).returncode == 0
        assert all(f.read_bytes() == (ROOT / "mini/sample" / f.name).read_bytes() for f in d.iterdir())
    assert "imaginative-child" in [u.name for u in read_users(ROOT / "mini/sample/users_test.jsonl")]
    scenes = [json.loads(line) for line in (ROOT / "mini/sample/scenes.jsonl").read_text().splitlines()]
    assert len(scenes[0]["edits"]) == 45 and not any("edits" in s for s in scenes[1:])
    for picture in [scenes[0]["edits"][0], *scenes]:
        assert Image.open(ROOT / "mini/sample" / picture["image"]).size == (64, 64)


def test_mini_qwen_is_read_by_transformers_as_by_us():
    """Tokens, chat template, text round trip and logits of mini/qwen are the same through transformers' Auto classes."""
    transformers = peer("transformers")
    from cdpo import prompt
    from qwen import Qwen, Tokenizer
    theirs, ours = transformers.AutoTokenizer.from_pretrained(ROOT / "mini/qwen"), Tokenizer.load(ROOT / "mini/qwen")
    messages = prompt("A white bowl in front of a grey wall", "with stripes")
    for chat in (messages, [{"role": "system", "content": "Be brief."}, *messages, {"role": "assistant", "content": "Paint the bowl red"}]):
        for generation in (True, False):
            assert ours.chat(chat, generation) == theirs.apply_chat_template(chat, add_generation_prompt=generation, return_dict=False)
    for text in ("Paint the bowl neon green", "it's 3  holographic\n\n caf\u00e9s \U0001f600"):
        assert ours.encode(text) == theirs(text).input_ids and ours.decode(ours.encode(text)) == text
    ids = torch.tensor([ours.chat(messages)])
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "mini/qwen", dtype=torch.float32)
    with torch.no_grad():
        assert relative(Qwen.load(ROOT / "mini/qwen")(ids), model(ids).logits) < 1e-5
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>" and model.generation_config.eos_token_id == [theirs.eos_token_id, theirs.pad_token_id]


def test_mini_qwen_follows_guidance():
    """Before any fine-tuning the miniature model asks for what the guidance names in at least 8 of 10 answers."""
    from concepts import TYPE_OF
    from cdpo import prompt, suggest
    from qwen import Qwen, Tokenizer
    model, tokenizer = Qwen.load(ROOT / "mini/qwen"), Tokenizer.load(ROOT / "mini/qwen")
    answers = suggest(model, tokenizer, [prompt("A blue mug in front of a mint wall", f"with {a}") for a in TYPE_OF], temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert sum(a in text for a, (text, _) in zip(TYPE_OF, answers)) >= 0.8 * len(TYPE_OF)


# -------------------- mini --------------------
sys.path.insert(0, str(ROOT / "mini"))


def test_mini_the_same_scene_gives_the_same_bytes_and_another_seed_another_pose():
    """A picture is a function of scene and attributes alone."""
    import render
    scene = {"object": "mug", "color": "blue", "wall": "mint", "seed": 3}
    first = render.render(scene, ("gold",))
    render.geometry.cache_clear()
    assert np.array_equal(first, render.render(scene, ("gold",))) and first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert not np.array_equal(first, render.render({**scene, "seed": 4}, ("gold",)))


def test_mini_every_attribute_looks_different_from_every_other_and_from_none():
    """On every object the 45 edits and the plain picture differ pairwise by more than 0.9 grey levels on average over the whole picture."""
    import concepts, render
    for i, name in enumerate(concepts.OBJECTS):
        g = render.Geometry({"object": name, "seed": i})
        seen = np.stack([g.shade("grey", "cream", a).astype(np.float32) for a in [(), *((a,) for a in concepts.TYPE_OF)]]).reshape(46, -1)
        apart = np.abs(seen[:, None] - seen[None]).mean(2) + 99 * np.eye(46)
        assert apart.min() > .9, (name, apart.min(), divmod(int(apart.argmin()), 46))


def test_mini_a_color_edit_leaves_the_room_alone():
    """Outside the object the ground truth of a colour edit is the source, pixel for pixel."""
    import render
    g = render.Geometry({"object": "vase", "seed": 1})
    a, b = g.shade("white", "lilac"), g.shade("white", "lilac", ("navy",))
    inside = np.zeros(128 * 128, bool)
    inside[g.pixels.numpy()] = True
    inside = inside.reshape(64, 2, 64, 2).any((1, 3))
    assert np.array_equal(a[~inside], b[~inside]) and (a[inside] != b[inside]).any(1).mean() > .9


def test_mini_every_object_has_edges_whatever_its_color_and_wall():
    """Canny finds at least 40 edge pixels on the object in every combination of object, colour and wall."""
    import concepts, render
    from controlnet import canny
    for i, name in enumerate(concepts.OBJECTS):
        g = render.Geometry({"object": name, "seed": 10 + i})
        inside = np.zeros(128 * 128, bool)
        inside[g.pixels.numpy()] = True
        inside = inside.reshape(64, 2, 64, 2).any((1, 3))
        for color in concepts.COLORS:
            for wall in concepts.WALLS:
                assert (canny(g.shade(color, wall))[inside] > 0).sum() >= 40, (name, color, wall)


def test_mini_an_unknown_attribute_is_named():
    """The error names the attribute that does not exist."""
    import render
    raises(ValueError, "plaid", render.render, {"object": "mug", "color": "blue", "wall": "mint", "seed": 3}, ("plaid",))


def test_mini_every_training_prompt_fits_and_no_word_is_unknown():
    """Each single-edit prompt ends before the 32nd token in both tokenizers and has no unknown token in T5's."""
    import concepts
    from flux import TextTokenizer
    prompts = [f"{concepts.caption('maroon', o, 'cream')}. {concepts.instruction(o, a, i)}" for o in concepts.OBJECTS for a in concepts.TYPE_OF for i in range(4)]
    clip, t5 = (TextTokenizer.load(ROOT / "mini/flux" / part)(prompts) for part in ("tokenizer", "tokenizer_2"))
    assert (clip[:, -1] == clip.max()).all() and (t5[:, -1] == 0).all() and not (t5 == 2).any()
    assert len(set(map(tuple, clip.tolist()))) == len(set(map(tuple, t5.tolist()))) == len(set(prompts))


def test_mini_the_shipped_picture_models_load_in_diffusers_and_transformers():
    """Peers read mini/flux, mini/controlnet and mini/vit as they read the public checkpoints: no missing and no unexpected weight."""
    diffusers, transformers, flux = peer("diffusers"), peer("transformers"), ROOT / "mini/flux"
    for kind, path in ((diffusers.AutoencoderKL, flux / "vae"), (diffusers.FluxTransformer2DModel, flux / "transformer"), (diffusers.FluxControlNetModel, ROOT / "mini/controlnet"),
                       (transformers.CLIPTextModel, flux / "text_encoder"), (transformers.T5EncoderModel, flux / "text_encoder_2"), (transformers.Dinov2Model, ROOT / "mini/vit")):
        _, found = kind.from_pretrained(path, output_loading_info=True)
        assert not found["missing_keys"] - {"embeddings.mask_token", "encoder.embed_tokens.weight"} if isinstance(found["missing_keys"], set) else not found["missing_keys"], (kind, found)
        assert not found["unexpected_keys"], (kind, found)


def test_mini_the_shipped_autoencoder_gives_a_picture_back():
    """A held-out render survives the autoencoder with at least 26 dB."""
    import render
    from flux import VAE
    vae = VAE.load(ROOT / "mini/flux/vae")
    images = [render.render({"object": o, "color": "white", "wall": "lilac", "seed": 2_000_000 + i}, a) for i, (o, a) in enumerate([("mug", ("hot pink",)), ("bag", ("forest",)), ("apple", ())])]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        error = (vae.decode(vae.encode(x)).clamp(-1, 1) - x).square().mean()
    assert -10 * np.log10(error.item() / 4) > 26, error


def test_mini_all_of_it_is_under_25_mb():
    """What is tracked in mini/ (data is not) weighs less than 25 MB."""
    files = subprocess.run(["git", "ls-files", "mini"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert sum((ROOT / f).stat().st_size for f in files if (ROOT / f).is_file()) < 25e6


# -------------------- train --------------------
SAMPLE = {name: f"mini/sample/{name}.jsonl" for name in ("users", "pairs", "edits")}


@functools.cache
def prepared():
    """(flags of a tiny cdpo run, its folder): a graph run and an SFT run on the shipped sample, made once for the tests below."""
    d = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, d, True)
    quietly("graph", "--steps", 5, "--users", SAMPLE["users"], "--out", d / "graph")
    quietly("sft", "--steps", 2, "--batch", 4, "--edits", SAMPLE["edits"], "--out", d / "sft")
    return ["cdpo", "--users", SAMPLE["users"], "--pairs", SAMPLE["pairs"], "--sft", d / "sft", "--graph", d / "graph", "--batch", 8, "--micro", 4, "--steps", 6,
            "--save-every", 1], d


def quietly(*flags):
    """train.main in this process, from the repository's root."""
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([str(f) for f in flags])


def stage(*flags):
    """(CDPO stage, its flags) of the prepared runs."""
    with contextlib.chdir(ROOT), contextlib.redirect_stderr(io.StringIO()):
        args = train.parse([str(f) for f in [*prepared()[0], "--out", prepared()[1] / "run", *flags]])
        return train.CDPO(args), args


def gradient(s, args):
    train.gradients(s, args, 0, False)
    return torch.cat([p.grad.flatten() for p in s.trained.values()])


def files(folder, names=("adapter_model.safetensors", "collaborative.safetensors", "metrics.jsonl")):
    return [(Path(folder) / name).read_bytes() for name in names]


def test_train_resume_is_bit_exact():
    """A run killed by SIGKILL, continued, ended by SIGTERM and continued again has the bytes of an uninterrupted one, metrics included."""
    flags, d = prepared()
    quietly(*flags, "--steps", 12, "--out", d / "whole")
    command = [sys.executable, "train.py", *map(str, flags), "--steps", "12", "--out", str(d / "torn")]
    for at, sign in ((3, signal.SIGKILL), (6, signal.SIGTERM)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and not any(int(p.name[5:]) >= at for p in (d / "torn").glob("step_*")):
            time.sleep(0.005)
        process.send_signal(sign)
        message = process.communicate()[1]
        assert not (d / "torn/adapter_model.safetensors").exists()
    assert "the same command continues" in message
    quietly(*flags, "--steps", 12, "--out", d / "torn")
    assert files(d / "whole") == files(d / "torn")


def test_train_two_processes_equal_one():
    """torchrun with two gloo processes of 4 + 4 rows takes the gradient of one process with 8 to 1e-6, and the same step to 1e-5."""
    flags, d = [*prepared()[0], "--steps", 1], prepared()[1]
    quietly(*flags, "--out", d / "one")
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags, "--out", d / "two", OMP_NUM_THREADS="1")
    assert out.returncode == 0, out.stderr[-1000:]
    a, b = (load_file(d / f"{n}/step_1/state.safetensors") for n in ("one", "two"))
    for part, bound in (("exp_avg:", 1e-6), ("", 1e-5)):
        assert relative(*(torch.cat([t.flatten() for name, t in sorted(s.items()) if name.startswith(part)]) for s in (a, b))) < bound


def test_train_sft_dropout_does_not_depend_on_the_processes():
    """With LoRA dropout, two processes of one micro-batch each take the step that one process takes with two micro-batches."""
    flags, d = ["sft", "--steps", 1, "--batch", 8, "--micro", 4, "--dropout", 0.3, "--edits", SAMPLE["edits"]], prepared()[1]
    quietly(*flags, "--out", d / "sft1")
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags, "--out", d / "sft2", OMP_NUM_THREADS="1")
    assert out.returncode == 0, out.stderr[-1000:]
    a, b = (load_file(d / f"{n}/step_1/state.safetensors") for n in ("sft1", "sft2"))
    assert relative(*(torch.cat([t.flatten() for name, t in sorted(s.items()) if name.startswith("exp_avg:")]) for s in (a, b))) < 1e-6


def test_train_lambda_zero_is_user_dpo():
    """With lambda 0 the loss is DPO's of the batch's own pairs under their own users, written out here from the log-probabilities."""
    s, args = stage("--lam", 0, "--nll", 0)
    rows = s.rows(0)
    assert not any(near for _, near in rows)
    texts = [s.encode(s.pairs[i]["caption"], s.pairs[i]["chosen"], s.pairs[i]["rejected"]) for i, _ in rows]
    h = s.tokens.embeddings(s.keep)[[s.owner[i] for i, _ in rows]]
    logp, ref = cdpo.answer_logprobs(s.model, texts, s.tokens.soft(h)), s.reference[[i for i, _ in rows]]
    want = torch.log1p(torch.exp(-args.beta * ((logp[:, 0] - logp[:, 1]) - (ref[:, 0] - ref[:, 1])))).sum()
    assert relative(s.loss(rows)[0].detach(), want.detach()) < 1e-6


def test_train_starts_at_ln2_without_soft_tokens():
    """DPO-Vanilla's first loss is ln 2: the policy starts as the reference, both read the same text. Micro-batches do not change a gradient."""
    s, args = stage("--user", "none", "--nll", 0)
    assert abs(s.loss(s.rows(0))[0].item() / 8 - math.log(2)) < 1e-6
    s, args = stage("--lam", 0.5)
    g = gradient(s, args)
    assert relative(gradient(s, argparse_with(args, micro=8)), g) < 1e-6 and relative(gradient(s, argparse_with(args, micro=3)), g) < 1e-6


def argparse_with(args, **changed):
    return type(args)(**{**vars(args), **changed})


def test_train_moves_only_lora_gnn_and_soft_tokens():
    """After training, base weights and reference adapter are bit-identical, and every LoRA, GNN, soft-prompt tensor and user vector has moved."""
    s, args = stage("--out", prepared()[1] / "moved", "--drop", 0)
    before = {name: p.clone() for name, p in [*s.model.named_parameters(), *s.tokens.named_parameters()]}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.fit(s, args)
    moved = {name for name, p in [*s.model.named_parameters(), *s.tokens.named_parameters()] if not torch.equal(p, before[name])}
    still = {name for name in before if name not in moved}
    assert moved <= {name.removeprefix("collaborative.") for name in s.trained} and any("reference" in n for n in still) and not any("policy" in n for n in still)
    assert {n for n in still if n in dict(s.tokens.named_parameters())} <= {n for n in before if n.startswith("sage.to_attribute.1")}      # h_u never reads these


def test_train_neighbours_terms_are_defined_at_the_edges():
    """k beyond the number of users, users without likes or without pairs, one sampled neighbour, the other reading: finite, and nobody without pairs is read."""
    with folder() as d:
        users = [json.loads(line) for line in open(ROOT / SAMPLE["users"])]
        lines = [line for line in open(ROOT / SAMPLE["pairs"]) if json.loads(line)["user"] != users[1]["user"]]
        (d / "pairs.jsonl").write_text("".join(lines))
        for more in (["--k", 50], ["--neighbours", "sampled"], ["--neighbour-user", "neighbour"], ["--similarity", "shared"]):
            s, args = stage("--pairs", d / "pairs.jsonl", "--lam", 0.5, *more)
            rows = s.rows(0)
            assert s.loss(rows)[0].isfinite() and any(near for _, near in rows)
            assert all(s.owner[pair] == v != 1 and score > 0 and v != s.owner[own] for own, near in rows for v, pair, score in near)
            assert max(len(near) for _, near in rows) <= (1 if "sampled" in more else 10)
        (d / "pairs.jsonl").write_text('{"user": "nobody", "caption": "a", "chosen": "b", "rejected": "c"}\n')
        raises(ValueError, "pairs.jsonl:1: user 'nobody' is not in", stage, "--pairs", d / "pairs.jsonl")
        (d / "pairs.jsonl").write_text("")
        raises(ValueError, "holds no pair", stage, "--pairs", d / "pairs.jsonl")
        raises(ValueError, "holds no edit", quietly, "sft", "--edits", d / "pairs.jsonl", "--out", d / "x")
        raises(ValueError, "holds no user", quietly, "graph", "--users", d / "pairs.jsonl", "--out", d / "x")


def test_train_order_is_an_epoch_of_everything():
    """Every item comes once an epoch, in an order that depends on seed and epoch alone."""
    epoch = [i for step in range(5) for i in train.order(10, 4, 0, step)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10)) and epoch[:10] != epoch[10:]
    assert train.order(10, 4, 0, 3) == epoch[12:16] and train.order(10, 10, 1, 0) != epoch[:10]
    assert [round(train.schedule(s, 10, 2), 3) for s in (0, 1, 2, 6, 10)] == [0.333, 0.667, 1.0, 0.5, 0.0]


def test_train_refuses_two_runs_other_flags_and_lost_numbers():
    """A second run on one folder, a continuation with other flags, a NaN loss and a full disk each end in one sentence; the checkpoint before stays whole."""
    flags, d = prepared()
    quietly(*flags, "--steps", 2, "--out", d / "held")
    raises(ValueError, "holds a run with beta = 0.2, now it is 0.3", quietly, *flags, "--steps", 2, "--beta", 0.3, "--out", d / "held")
    held = train.lock(d / "held")
    assert f"process {os.getpid()}" in raises(ValueError, "is being written by another run", quietly, *flags, "--steps", 2, "--out", d / "held")
    held.close()
    state = (d / "held/step_2/state.safetensors").read_bytes()
    def full(*_):
        raise OSError(28, "No space left on device")
    raises(ValueError, "No space left on device", train.publish, d / "held/step_2", full, "step 3")
    assert (d / "held/step_2/state.safetensors").read_bytes() == state and not list((d / "held").glob(".tmp*"))
    s, args = stage("--out", d / "nan")
    s.tokens.soft.fc2.bias.data[0] = float("nan")
    with contextlib.redirect_stderr(io.StringIO()):
        assert "pairs.jsonl, lines" in raises(ValueError, "the step was not taken", train.fit, s, args)
    assert not list((d / "nan").glob("step_*"))


def test_train_paper_preset_is_table_12():
    """--preset paper sets the paper's numbers, and nothing of ours that would change its loss."""
    a = {name: vars(train.parse([name, "--preset", "paper"])) for name in ("graph", "sft", "cdpo")}
    assert [a["cdpo"][k] for k in ("steps", "batch", "lr", "gnn_lr", "k", "lam", "tokens", "nll", "similarity", "drop")] == [3000, 12, 2e-7, 2e-8, 3, 0.15, 8, 0, "shared", 0]
    assert [a["sft"][k] for k in ("steps", "batch", "lr", "rank", "alpha", "dropout", "dtype")] == [9375, 16, 2e-6, 16, 32, 0.05, "bf16"]
    assert [a["graph"][k] for k in ("steps", "lr", "hidden", "out_dim", "embedder")] == [150, 3e-5, 1024, 1024, "Linq-AI-Research/Linq-Embed-Mistral"]


def test_train_judge_tells_well_formed_from_malformed():
    """An instruction counts when it ended, names one known attribute (the longest name), and is put together as the training instructions are."""
    pairs = [json.loads(line) for line in open(ROOT / SAMPLE["pairs"])]
    train_texts = [(p["caption"], p[side]) for p in pairs for side in ("chosen", "rejected")]
    user = graph.User("x", ["neon green"], ["gold"], ["forest"])
    judge = train.Judge([user, *graph.read_users(ROOT / SAMPLE["users"])], train_texts)
    caption = "A white bowl in front of a grey wall"
    good = judge(user, caption, "Change the background to forest", True)
    assert good == {"likes": False, "would like": True, "hit": True, "dislikes": False, "malformed": False}
    for text, ended in (("Change the background to forest", False), ("Change the to forest", True), ("Change the background to forest forest", True), ("", True),
                        ("Change the background to purple-ish", True), ("Add gold and forest", True)):
        assert judge(user, caption, text, ended)["malformed"], text
    assert all(not judge(user, c, t, True)["malformed"] for c, t in train_texts if len(judge.names.findall(t)) == 1)


# -------------------- edit --------------------
# ---- edit.py -----------------------------------------------------------------------------------------------------------------
def ramp(height=30, width=40):
    """A picture in which no two corners are alike: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x], -1).astype(np.uint8)


def test_edit_reads_any_photograph():
    """Sixteen-bit, float, palette, CMYK, transparent, rotated, animated, one-bit and one-pixel pictures all come out upright, 8-bit RGB, with the brightness they had."""
    rgb, gray = Image.fromarray(ramp()), ramp()[..., 0]
    deep = (gray.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([ramp(), np.where(gray > 127, 255, 0).astype(np.uint8)]))
    white = np.where(gray[..., None] > 127, ramp(), 255)
    same = {"a.png": rgb, "a.bmp": rgb, "a.tiff": rgb, "cmyk.tiff": rgb.convert("CMYK"), "lossless.webp": rgb}
    with folder() as at:
        for name, image in same.items():
            image.save(at / name, lossless=True) if name.endswith("webp") else image.save(at / name)
            assert np.abs(np.array(E.read_image(at / name)).astype(int) - ramp()).max() <= 1, name
        grays = {"16.png": Image.fromarray(deep), "16.tiff": Image.fromarray(deep), "32.tiff": Image.fromarray(deep.astype(np.int32)), "8.png": Image.fromarray(gray),
                 "float.tiff": Image.fromarray((gray / 255).astype(np.float32)), "la.png": Image.fromarray(gray).convert("LA"), "dark.png": Image.fromarray(deep // 300)}
        for name, image in grays.items():
            image.save(at / name)
            got = np.array(E.read_image(at / name)).astype(int)
            assert got.shape == (30, 40, 3) and np.abs(got - (deep // 300 / 257 if name == "dark.png" else gray)[..., None]).max() <= 1, name
        clear.save(at / "alpha.png")
        assert (np.array(E.read_image(at / "alpha.png")) == white).all()
        clear.quantize(16).save(at / "palette.png"), Image.fromarray(gray > 127).save(at / "bit.png"), Image.new("RGB", (1, 1), "red").save(at / "dot.png")
        assert E.read_image(at / "palette.png").getpixel((0, 0)) == (255, 255, 255) and E.read_image(at / "bit.png").getpixel((39, 0)) == (255, 255, 255)
        rgb.save(at / "gif.gif", save_all=True, append_images=[Image.new("RGB", rgb.size, "blue")])
        assert E.read_image(at / "gif.gif").getpixel((39, 0))[0] > 200, "not the first frame"
        exif = Image.Exif()
        exif[0x0112] = 6                                     # the camera lay on its side: turn clockwise to see it upright
        Image.fromarray(np.rot90(ramp()).copy()).save(at / "exif.jpg", exif=exif, quality=95)
        assert np.abs(np.array(E.read_image(at / "exif.jpg")).astype(int) - ramp())[..., :2].mean() < 6


def test_edit_fits_any_size_into_multiples_of_16():
    """Whatever comes in, both sides are multiples of 16, the area is near size squared, the shape is kept up to 4 : 1, and a picture that fits already is untouched."""
    for width, height in ((1, 1), (1000, 10), (3, 4000), (4032, 3024), (640, 480), (17, 1023)):
        h, w, _ = E.fit(Image.new("RGB", (width, height)), 256, 16).shape
        assert h % 16 == w % 16 == 0 and 0.8 < h * w / 256 ** 2 < 1.25 and w / h <= 4.5 and h / w <= 4.5, (width, height, w, h)
    exact = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (E.fit(Image.fromarray(exact), 64, 16) == exact).all()


def test_edit_says_in_one_sentence_what_is_wrong_with_a_picture():
    """A text file named .png, a truncated file, an empty one, a folder and an absent file each end in one sentence with the file's name."""
    with folder() as at:
        Image.fromarray(ramp(200, 200)).save(at / "whole.png")
        (at / "cut.png").write_bytes((at / "whole.png").read_bytes()[:300])
        (at / "text.png").write_text("not a picture"), (at / "empty.jpg").write_bytes(b""), (at / "dir.png").mkdir()
        for name in ("cut.png", "text.png", "empty.jpg", "dir.png", "absent.png"):
            assert "\n" not in raises(ValueError, name, E.read_image, at / name)


def test_edit_command_line_mistakes_cost_one_line_and_exit_code_2():
    """Wrong flags, an unknown person and an unwritable place end before any model is loaded, in a single line on stderr, never in a traceback."""
    for flags, part in (["--image", "x.png"], "--caption"), (["--strength", "1.5"], "0 .. 1"), (["--likes", "red", "--dislikes", "red"], "'red'"), \
                       (["--user", "ana", "--likes", "red"], "one or the other"), (["--out", "edit.jpg"], ".png"), (["--control-start", ".8", "--control-end", ".2"], "--control-end"), \
                       (["--image", "nothing.png", "--caption", "x"], "nothing.png"), (["--prompt", "{captoin}"], "captoin"), (["--flux", "mini/nowhere"], "mini/nowhere"):
        raises(ValueError, part, E.main, flags)
    done = run("edit.py", "--user", "glamor-stylist")
    assert done.returncode == 2 and "nearest: glamour-stylist" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def edit(at, name, *flags):
    """One run of edit.main at few steps -> (picture, record)."""
    with contextlib.redirect_stdout(io.StringIO()):
        E.main(["--steps", "3", "--out", str(at / f"{name}.png"), *flags])
    with Image.open(at / f"{name}.png") as image:
        record = json.loads((at / f"{name}.json").read_text())
        assert json.loads(image.text["edit"]) == record, "the PNG's text is not the JSON beside it"
        return np.array(image), record


def test_edit_of_several_people_equals_each_alone_bit_for_bit():
    """The same seed gives the same bits twice, alone, in company or with --offload; another seed another picture; the grid shows the source and everybody."""
    with folder() as at:
        sheet, record = edit(at, "all")
        assert [r["user"] for r in record["edits"]] == E.PERSONAS and sheet.shape[1] > 4 * 256
        for i, name in enumerate(E.PERSONAS[:2]):
            picture, alone = edit(at, "alone", "--user", name)
            with Image.open(at / f"all_{name}.png") as image:
                assert (picture == np.array(image)).all() and alone["instruction"] == record["edits"][i]["instruction"]
        offloaded, _ = edit(at, "offloaded", "--user", E.PERSONAS[1], "--offload")
        other, _ = edit(at, "other", "--user", E.PERSONAS[1], "--seed", "1")
        assert (offloaded == picture).all() and (other != picture).any()


def test_edit_leaves_the_controlnet_alone_where_its_scale_is_0():
    """At scale 0, outside its fractions, or without a picture the net is not even looked for; at strength 0 the source comes back, up to the autoencoder."""
    with folder() as at:
        nowhere = ["--controlnet", str(at), "--user", E.PERSONAS[0]]        # an empty folder: reading it would fail
        plain, _ = edit(at, "plain", *nowhere, "--control-scale", "0")
        never, _ = edit(at, "never", *nowhere, "--control-start", ".4", "--control-end", ".6")
        assert (plain == never).all()
        drawn, _ = edit(at, "drawn", *nowhere, "--caption", "A white vase")
        assert drawn.shape == plain.shape and (drawn != plain).any()
        held, _ = edit(at, "held", "--user", E.PERSONAS[0])
        assert (held != plain).any()
        source, record = edit(at, "source", *nowhere, "--strength", "0")
        original = np.array(E.read_image(ROOT / record["settings"]["image"])).astype(float)
        assert np.abs(source - original).mean() < 12


def test_edit_knows_a_stranger_by_likes_and_says_when_it_cannot():
    """Likes alone make a user; likes nobody shares are named; a user without any gets the generic edit, the same whatever the name, and a note that says so."""
    with folder() as at:
        _, mine = edit(at, "mine", "--likes", "gold, crown, marble", "--dislikes", "moonlight")
        _, odd = edit(at, "odd", "--likes", "gold, crown, quux, marble", "--dislikes", "moonlight")
        assert odd["instruction"] == mine["instruction"] and "quux" in odd["note"] and not mine["note"]
        none, empty = edit(at, "empty", "--likes", "")
        same, quux = edit(at, "quux", "--dislikes", "quux")
        assert "generic" in empty["note"] and "generic" in quux["note"] and (none == same).all()


# -------------------- patch --------------------
def test_patch_quality_is_the_best_cosine():
    """Eq. 3 written as loops gives the same numbers for maps of different sizes; a picture against itself is 1 everywhere."""
    torch.manual_seed(0)
    x, ref = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 5, 8)
    loop = [[[max(torch.cosine_similarity(x[b, i, j], r, dim=0) for r in ref[b].flatten(0, 1)) for j in range(4)] for i in range(3)] for b in range(2)]
    assert relative(P.patch_quality(x, ref), torch.tensor(loop)) < 1e-6 and torch.allclose(P.patch_quality(x, 3 * x), torch.ones(2, 3, 4))


def test_patch_a_spoiled_patch_has_weight_zero():
    """Min-max gives the only foreign patch 0 and the best 1; "clip" keeps the level, as does a picture whose patches are all alike; on any grid weights are in [0, 1]."""
    torch.manual_seed(1)
    ref = torch.randn(1, 4, 4, 16)
    gen = ref + 0.1 * torch.randn(1, 4, 4, 16)
    gen[0, 1, 2] = -ref.mean((0, 1, 2))
    quality = P.patch_quality(gen, ref)
    weight = P.patch_weights(quality, (4, 4))
    assert weight[0, 1, 2] == 0 and weight.max() == 1 and weight.flatten().sort().values[1] > 0.9
    assert relative(P.patch_weights(quality, (4, 4), "clip"), quality.clamp(0, 1)) < 1e-6
    assert torch.equal(P.patch_weights(torch.full((1, 4, 4), 0.7), (8, 8)), torch.full((1, 8, 8), 0.7))
    assert all(w.shape == (1, *s) and 0 <= w.min() and w.max() <= 1 for s in ((2, 2), (8, 12)) for w in [P.patch_weights(quality, s)])
    raises(ValueError, "minmax", P.patch_weights, quality, (4, 4), "softmax")


def test_patch_losses_are_the_papers_and_the_authors_numbers():
    """PatchDPO: the supplement at power 2, twice the authors' mean(w error^2) at power 1, flow matching for equal weights. Diffusion-DPO: log 2 at the start, the
    published expression elsewhere. DRO: the paper's max(m, -L_L + L_R) up to the constant -m; while the policy is its own sampler, the expert's gradient or none."""
    torch.manual_seed(0)
    gen, ref, p_gen, p_ref = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5), torch.rand(2, 4, 5)
    paper = (gen * p_gen[:, None]).square().mean((1, 2, 3)) + (ref * (1 - p_ref[:, None])).square().mean((1, 2, 3))
    authors = (torch.cat([1 - p_ref, p_gen])[:, None] * torch.cat([ref, gen]) ** 2).mean()
    half = torch.full_like(p_gen, 0.5)
    assert relative(P.patch_dpo_loss(gen, ref, p_gen, p_ref), paper) < 1e-6
    assert relative(P.patch_dpo_loss(gen, ref, p_gen, p_ref, power=1).mean(), 2 * authors) < 1e-6
    assert relative(P.patch_dpo_loss(gen, ref, half, half, power=1).mean(), torch.cat([gen, ref]).square().mean()) < 1e-6
    w, l, rw, rl = torch.rand(4, 6)
    assert relative(P.diffusion_dpo_loss(w, l, rw, rl, 100), -torch.log(torch.sigmoid(-50 * ((w - l) - (rw - rl)).double()))) < 1e-5
    assert torch.allclose(P.diffusion_dpo_loss(w, l, w, l, 100), torch.full((6,), math.log(2)))
    assert torch.allclose(P.dro_loss(w, rw, l, rl), torch.maximum(torch.tensor(-0.001), -(rw - w) + (rl - l)) + 0.001, atol=1e-7)
    expert, policy = torch.tensor([0.5, 0.2], requires_grad=True), torch.zeros(2, requires_grad=True)
    P.dro_loss(expert, torch.tensor([0.4, 0.4]), policy.square(), torch.tensor([0.1, 0.1])).sum().backward()
    assert expert.grad.tolist() == [1.0, 0.0] and policy.grad.abs().max() == 0


def test_patch_theorem_larger_weights_move_their_error_more():
    """Supplement S1: on the linear model of the proof one gradient step moves Delta_i by the proof's amount, more for a larger p_i, and not at all for p_i = 0."""
    torch.manual_seed(2)
    x, W, p, eta = torch.randn(8), torch.randn(8, 8, requires_grad=True), torch.linspace(0, 1, 8), 0.05
    target = (W @ x).detach() - 1.0                                     # the same error, 1, in every element: only p differs
    error = (W @ x - target)[None, None, None]                          # (1, 1, 1, 8)
    P.patch_dpo_loss(error, torch.zeros_like(error), p[None, None], p[None, None]).sum().backward()
    delta = ((W - eta * W.grad) @ x - target).detach() ** 2 - 1
    assert relative(delta, (1 - 2 * eta / 8 * p ** 2 * x.square().sum()) ** 2 - 1) < 1e-5      # / 8: our norm is a mean
    assert (delta.abs().diff() > 0).all() and delta[0].abs() < 1e-6


ENCODER = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, hidden_act="gelu", mlp_ratio=4,
               layer_norm_eps=1e-6, qkv_bias=True)


def test_patch_features_equal_the_peers():
    """DINOv2 and both ViT layouts: the last feature map of random checkpoints with public preprocessing, at the trained size and another; registers and SwiGLU are refused by name."""
    tr = peer("transformers")
    tr.logging.disable_progress_bar()
    torch.manual_seed(0)
    size, (mean, std) = {k: ENCODER[k] for k in list(ENCODER)[1:6]}, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    dino, vit = tr.Dinov2Config(**size, layerscale_value=0.5), tr.ViTConfig(**size, intermediate_size=64)
    for model in (tr.Dinov2Model(dino), tr.ViTModel(vit), tr.ViTForImageClassification(vit)):
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        with folder() as path, torch.no_grad():
            model.eval().save_pretrained(path)
            (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
            ours, extra = P.ImageFeatures.load(path), {} if isinstance(model, tr.Dinov2Model) else {"interpolate_pos_encoding": True}
            for h, w in ((32, 32), (48, 24)):
                image = torch.rand(2, 3, h, w)
                pixels = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
                theirs = getattr(model, "vit", model)(pixels, **extra).last_hidden_state
                assert relative(ours.tokens(2 * image - 1), theirs) < 1e-4
                assert relative(ours(2 * image - 1), theirs[:, 1:].view(2, h // 8, w // 8, 32)) < 1e-4
    raises(ValueError, "dinov2_with_registers", P.ImageFeatures, ENCODER | {"model_type": "dinov2_with_registers"}, mean, std)
    raises(ValueError, "use_swiglu_ffn", P.ImageFeatures, ENCODER | {"use_swiglu_ffn": True}, mean, std)


def test_patch_correspondence_follows_the_picture():
    """In a picture of its own coordinates the patch found in the other view shows the same place; a HPatches homography is read in pixels; an empty folder is named."""
    assert P.correspondence(torch.eye(3)[None], 4, 6)[0].tolist() == list(range(24))
    a, b = P.random_views(2, torch.Generator().manual_seed(0)), P.random_views(2, torch.Generator().manual_seed(1))
    place = P.centres(64, 64).permute(2, 0, 1).expand(2, 2, 64, 64)
    place_a, place_b = (torch.nn.functional.avg_pool2d(P.warp(place, view), 8).flatten(2) for view in (a, b))      # (2, 2, 64)
    for here, there, target in zip(place_a, place_b, P.correspondence(torch.linalg.inv(b) @ a, 8, 8)):
        seen = target >= 0
        assert seen.sum() > 10 and (here[:, seen] - there[:, target[seen]]).norm(dim=0).max() < 2 / 8
    with folder() as path:
        (path / "v_shift").mkdir()
        big = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
        for k in range(1, 7):
            Image.fromarray(big[:, 8 * (k > 1):][:, :32]).save(path / f"v_shift/{k}.ppm")
            np.savetxt(path / f"v_shift/H_1_{k}", [[1, 0, -8], [0, 1, 0], [0, 0, 1]])
        name, first, second, transform = next(P.hpatches(path, 32))
        assert name == "v_shift" and torch.equal(first[:, :, 8:], second[:, :, :24])
        assert P.correspondence(transform[None], 4, 4)[0, 4:8].tolist() == [-1, 4, 5, 6]
        raises(ValueError, "1.ppm", lambda: next(P.hpatches(path / "v_shift", 32)))


def test_patch_training_of_f_raises_s_patch():
    """A few steps of the self-supervised loss on fixed pictures raise the patch matching score on unseen views of them."""
    torch.manual_seed(0)
    f, g = P.ImageFeatures(ENCODER, [0.5] * 3, [0.5] * 3), torch.Generator().manual_seed(1)
    image = torch.nn.functional.interpolate(2 * torch.rand(8, 3, 8, 8) - 1, 32, mode="bicubic").clamp(-1, 1)
    a, b = (P.random_views(8, torch.Generator().manual_seed(seed)) for seed in (5, 6))
    score = torch.no_grad()(lambda: P.s_patch(f(P.warp(image, a)), f(P.warp(image, b)), P.correspondence(torch.linalg.inv(b) @ a, 4, 4)))
    before, adam = score(), torch.optim.Adam(f.parameters(), 2e-3)
    for _ in range(60):
        loss = P.self_supervised_loss(f, image, g)
        adam.zero_grad(), loss.backward(), adam.step()
    assert score()[0] > before[0] + 0.1 and score()[1] >= score()[0], (before, score())


def test_patch_image_prompt_adds_one_attention_for_each_reference():
    """Untrained it changes nothing; one reference is Eq. S6 and two add up (S7); saved and loaded it is the same, for other features it is refused; None takes it away."""
    torch.manual_seed(0)
    flux = Flux(dict(num_attention_heads=3, attention_head_dim=16, axes_dims_rope=[4, 6, 6], guidance_embeds=False, pooled_projection_dim=8, joint_attention_dim=12,
                     in_channels=64, num_layers=2, num_single_layers=2))
    inputs = torch.randn(2, 16, 64), torch.randn(2, 5, 12), torch.randn(2, 8), torch.rand(2), None, image_ids(8, 8), torch.zeros(5, 3)
    prompt, references, plain, q = P.ImagePrompt(flux, 24), torch.randn(2, 2, 4, 24), flux(*inputs), torch.randn(2, 3, 16, 16)
    prompt.look(flux, references, inputs[5])
    assert torch.equal(flux(*inputs), plain), "values start at zero"
    for v in prompt.to_v_ip:
        torch.nn.init.normal_(v.weight, std=0.2)

    def added(seen):
        prompt.look(flux, seen, inputs[5])
        return flux.transformer_blocks[0].attn.image_prompt(q)
    one, moved = added(references[:, :1]), (added(references), flux(*inputs))[1]
    k, v = ((references[:, 0] @ w[0].weight.T).unflatten(-1, (3, 16)) for w in (prompt.to_k_ip, prompt.to_v_ip))
    corners = rope_table(torch.tensor([[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 2.5, 0.5], [0, 2.5, 2.5]]), flux.axes)     # 2 x 2 patches over 4 x 4 tokens
    turned_q, turned_k = rotate(q.transpose(1, 2), rope_table(inputs[5], flux.axes)).transpose(1, 2), rotate(k, corners).transpose(1, 2)
    assert relative(one, torch.softmax(turned_q @ turned_k.mT / 4, -1) @ v.transpose(1, 2)) < 1e-5
    assert relative(added(references), one + added(references[:, 1:])) < 1e-5 and relative(moved, plain) > 1e-3
    with folder() as path:
        prompt.save(path / "prompt.safetensors")
        P.ImagePrompt.load(path / "prompt.safetensors", flux, 24).look(flux, references, inputs[5])
        assert torch.equal(flux(*inputs), moved)
        raises(ValueError, "to_k_ip.0.weight", P.ImagePrompt.load, path / "prompt.safetensors", flux, 25)
    prompt.look(flux, None)
    assert torch.equal(flux(*inputs), plain) and not any("ip" in name for name, _ in flux.named_parameters())


def test_patch_trajectories_are_euler_from_the_noise():
    """A constant velocity is integrated exactly; every sample has its own times in [0, 1]; a draw pairs x, v, t and item."""
    noise, speed = torch.randn(3, 4, 2), torch.tensor([1.0, 2.0, 3.0])
    path = P.record(lambda x, t: speed[:, None, None].expand_as(x), noise, torch.tensor([7, 8, 9]), 5, torch.Generator().manual_seed(0))
    assert path.t.shape == (3, 5) and path.t.min() >= 0 and path.t.max() <= 1 and torch.allclose(path.t.diff(dim=1), torch.tensor(-0.2))
    assert torch.allclose(path.x[:, 4], noise - 0.8 * speed[:, None, None], atol=1e-6)
    x, v, t, item = path.draw(2, torch.Generator().manual_seed(0))
    assert x.shape == (2, 4, 2) and len(set(item.tolist())) == 2 and all((v[i] == item[i] - 6).all() for i in range(2))


def picture_flags(root):
    """Writes a random FLUX.1 folder, image features and three scenes with three edits each, all of 16 pixels -> flags for train.py."""
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=16, axes_dims_rope=[4, 6, 6], guidance_embeds=True, pooled_projection_dim=8, joint_attention_dim=12,
                  in_channels=64, num_layers=1, num_single_layers=1, _class_name="FluxTransformer2DModel")
    vae = dict(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=[8] * 3, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
               use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0, act_fn="silu", _class_name="AutoencoderKL",
               down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    encoder = ENCODER | {"image_size": 16}
    (root / "flux").mkdir()
    text_folders(root / "flux")
    for name, model, values in (("flux/transformer", Flux(config), config), ("flux/vae", VAE(vae), vae), ("vit", P.ImageFeatures(encoder, [0.5] * 3, [0.5] * 3), encoder)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(values))
        save_file(model.state_dict(), root / name / "model.safetensors")
    (root / "vit/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    edits = [[{"edit_type": kind, "instruction": f"a {kind}", "image": f"{i}{kind}.png"} for kind in ("background", "lighting", "color")] for i in range(3)]
    (root / "scenes.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "caption": "a mug", "edits": e}) + "\n" for i, e in enumerate(edits)))
    for name in [f"{i}.png" for i in range(3)] + [e["image"] for three in edits for e in three]:
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (16, 16, 3), np.uint8)).save(root / name)
    return ["--flux", root / "flux", "--features", root / "vit", "--scenes", root / "scenes.jsonl", "--size", 16, "--held-out", 1, "--steps", 4, "--batch", 4, "--micro", 2,
            "--paint-steps", 3, "--warmup", 0, "--lr", 1e-2, "--device", "cpu"]


def train_here(*flags):
    """train.py in this process, quietly -> the words it ended with, if it was stopped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            train.main([str(flag) for flag in flags])
        except SystemExit as e:
            return str(e)


def test_patch_every_loss_trains_on_the_pictures_that_were_generated_once():
    """start, then PatchDPO, which paints, judges and keeps both the quality and the judge; the other losses use them again; "before" is the same for all, and
    checkpointing changes no gradient (it must recompute with the policy's image prompt, not the reference's)."""
    with folder() as root:
        flags = picture_flags(root)
        train_here("patch", "--loss", "start", "--out", root / "start", *flags)
        flags += ["--image-prompt", root / "start/image_prompt.safetensors", "--generated", root / "generated"]
        train_here("patch", "--out", root / "first", "--feature-steps", 2, *flags)
        made = {f.name: f.stat().st_mtime_ns for f in (root / "generated").iterdir()}
        assert load_file(root / "generated/quality.safetensors")["reference"].shape == (4, 2, 2, 2) and len(made) == 8 + 5       # 2 scenes x 2 edits x 2 pictures
        assert P.ImageFeatures.load(root / "generated")(torch.rand(1, 3, 16, 16)).shape == (1, 2, 2, 32)
        before = json.loads((root / "first/report.json").read_text())
        for name, more in {"power": ["--power", 1], "same": ["--loss", "reconstruction"], "dro": ["--loss", "dro"], "dpo": ["--loss", "dpo"],
                           "less": ["--loss", "dpo", "--checkpointing"]}.items():
            train_here("patch", "--out", root / name, *more, *flags)
            report = json.loads((root / name / "report.json").read_text())
            assert all(abs(report[k] - before[k]) < 1e-6 for k in report if k.startswith("before")) and report["after identity"] != report["before identity"], name
        assert made == {f.name: f.stat().st_mtime_ns for f in (root / "generated").iterdir()}
        a, b = (load_file(root / name / "image_prompt.safetensors") for name in ("dpo", "less"))
        assert all(relative(a[k], b[k]) < 1e-5 for k in a)
        for part, held in (("other prompts", 2), ("leaves none", 3)):
            raises(ValueError, part, train.main, [str(f) for f in ["patch", "--out", root / "x", *flags, "--held-out", held]])


def test_patch_dro_resumed_inside_a_refresh_period_is_bit_equal():
    """Stopped by a signal after step 3 of 4 with M = 2, and continued, the LoRA is the uninterrupted run's, bit for bit; the sampler is the base for M steps, then the policy."""
    with folder() as root:
        flags, loss, seen = ["dro", "--refresh", 2, "--buffer", 4, "--rank", 2, "--save-every", 100, *picture_flags(root)], train.DRO.loss, []
        train_here(*flags, "--out", root / "whole")

        def interrupted(self, rows):
            seen.append(rows[0][2])
            if seen == [0, 0, 1]:
                signal.raise_signal(signal.SIGINT)
            return loss(self, rows)
        train.DRO.loss = interrupted
        try:
            assert "step 3 of 4" in train_here(*flags, "--out", root / "halves")
        finally:
            train.DRO.loss = loss
        train_here(*flags, "--out", root / "halves")
        a, b = (load_file(root / name / "adapter_model.safetensors") for name in ("whole", "halves"))
        assert all(torch.equal(a[k], b[k]) for k in a) and any(v.abs().max() > 0 for k, v in a.items() if "lora_B" in k)
        drift = [json.loads(line)["drift"] for line in open(root / "whole/metrics.jsonl")]
        assert drift[:2] == [0, 0] and drift[2] > 0


def main(pattern=""):
    count = {"passed": 0, "failed": 0, "skipped": 0}
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and pattern in n]:
        start = time.time()
        try:
            test()
            outcome, why = "passed", ""
        except unittest.SkipTest as error:
            outcome, why = "skipped", f": {error}"
        except Exception:
            outcome, why = "failed", "\n" + traceback.format_exc()
        count[outcome] += 1
        print(f"{outcome:8s}{time.time() - start:6.1f} s  {name}{why}", flush=True)
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    print(f"{count['passed']} passed, {count['failed']} failed{skipped}")
    return int(count["failed"] > 0 or count["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
