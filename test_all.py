"""Every test, in one file: `python test_all.py`, or those whose name contains "canny":
`python test_all.py canny`. No network, no peer needed; a GPU is left alone.

Each test is a sentence that could be false; together they are what the project promises, file by
file. Those against a peer (transformers, diffusers, peft, torch-geometric, opencv; `pip install -r
bench/requirements.txt`) are skipped where it is missing. Recorded numbers were printed by code
that equals its peers. pytest runs this file too; `tmp_path` is an empty folder, here as there.
"""
import argparse
import ast
import base64
import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
import unittest
import weakref
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent / "mini"))
import cdpo
import controlnet
import edit
import flux
import graph
import lora
import patch_dpo
import qwen
import train
import world
from graph import PreferenceGraph, User
from judge import Judge
from qwen import Cache, Config, Qwen, Tokenizer, generate

ROOT = Path(__file__).resolve().parent
MINI = ROOT / "mini"
SAMPLE = MINI / "sample"
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"              # of the scripts that tests run, too: bits depend
os.environ["CUDA_VISIBLE_DEVICES"] = ""          # on the number of threads, and on the device


# ---- helpers -------------------------------------------------------------------------------------

def peer(name):
    """The peer library, or the test is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} is not installed")


def relative(a, b):
    """||a - b|| / ||b|| in float64."""
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def assert_close(a, b, bound=1e-6):
    """Two tensors, or two lists of them, agree: ||a - b|| <= bound * ||b||."""
    if isinstance(b, (list, tuple)):
        assert len(a) == len(b), f"{len(a)} against {len(b)}"
        for one, other in zip(a, b):
            assert_close(one, other, bound)
    else:
        assert relative(a, b) <= bound, f"{relative(a, b):.2e} apart, allowed are {bound:.0e}"


def same(a, b):
    """Whether two tensors, or two lists of tensors, are equal bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(torch.equal, a, b))


def raises(part, function, *args, **kwargs):
    """The message of the ValueError that `function` must raise: one line that contains `part`."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        message = str(error)
        assert part in message, f"the message {message!r} does not name {part!r}"
        assert "\n" not in message, f"the message {message!r} is not one line"
        return message
    raise AssertionError(f"nothing was refused, but {part!r} should have been")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def loud(module):
    """The module, frozen, with random weights large enough that a wrong term shows; norms and
    biases are random too. They depend on the parameters' names, not on their order."""
    g = seeded()
    parameters = dict(module.eval().requires_grad_(False).named_parameters())
    for _, p in sorted(parameters.items()):
        random = torch.randn(p.shape, generator=g)
        if p.dim() > 1:
            p.copy_(1.5 * random / p[0].numel() ** 0.5)
        else:
            p.copy_((p == 1) + 0.2 * random)
    return module


def reload(theirs, kind):
    """What our `kind` reads from the files, in shards, that the peer's model writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, max_shard_size="30KB")
        return kind.load(folder)


def fingerprint(x):
    """Four random projections of x: they move when any of its numbers does."""
    flat = x.detach().float().flatten()
    return noise(4, len(flat), seed=9) @ flat / len(flat) ** 0.5


def assert_recorded(x, *numbers, bound=1e-4):
    """The fingerprint of x is the recorded one."""
    assert_close(fingerprint(x), torch.tensor(numbers), bound)


def shell(command):
    """Run one of our scripts as a user would: shell("train.py graph --steps 3")."""
    words = [sys.executable, *shlex.split(command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170)


@contextlib.contextmanager
def quiet():
    """In the repository's root, without a word."""
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.chdir(ROOT))
        held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        held.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_qwen(**changes):
    """A random Qwen without peer or file: 4 heads over 2, or what `changes` says."""
    sizes = dict(vocab=61, width=32, inner=48, layers=2, heads=4, kv_heads=2, head_dim=8, eps=1e-6,
                 theta=1e4, qkv_bias=True, tied=True, headless=False, window=None, eos=(5,))
    return loud(Qwen(Config(**{**sizes, **changes})))


def tiny_lora(dtype=torch.float32, rank=2, alpha=4, **how):
    """tiny_qwen with adapters that do something."""
    model = tiny_qwen().to(dtype)
    lora.inject(model, rank, alpha, **how)
    for layer in lora.layers(model).values():
        loud(layer.lora_A)
        loud(layer.lora_B)
    return model.eval()


def padded_batch():
    """ids (3, 17), and masks of 17, 11 and 6 tokens with padding on the right and on the left."""
    length = torch.tensor([17, 11, 6])
    right = (torch.arange(17) < length[:, None]).long()
    ids = torch.randint(8, 61, (3, 17), generator=seeded(1))
    return ids, right, right.flip(1)


# ---- qwen.py: the model --------------------------------------------------------------------------

QWEN_SHAPES = [
    {},
    {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36},
    {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40},
    {"tie_word_embeddings": True},
    {"kind": "MistralForCausalLM", "head_dim": 10},
]


def peer_qwen(kind="Qwen2ForCausalLM", **changes):
    """transformers' model: 6 heads over 2, or what `changes` says."""
    kind = getattr(peer("transformers"), kind)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "eos_token_id": None,
    }
    return loud(kind(kind.config_class(**{**sizes, **changes})))


def test_qwen_logits_equal_transformers():
    """To 1e-5, in every shape, with padding on either side."""
    ids, right, left = padded_batch()
    for shape in QWEN_SHAPES:
        theirs = peer_qwen(**shape)
        ours = reload(theirs, Qwen)
        for mask in (right, left):
            want = theirs(ids, attention_mask=mask).logits
            assert_close(ours(ids, mask)[mask > 0], want[mask > 0], 1e-5)


def test_qwen_greedy_tokens_equal_transformers():
    """With a repetition penalty and without. The peer's counts padding too, so padding is a token
    here that nobody generates."""
    ids, _, left = padded_batch()
    ids = ids.masked_fill(left == 0, 0)
    for shape in QWEN_SHAPES:
        theirs = peer_qwen(**shape)
        ours = reload(theirs, Qwen)
        for penalty in (1.0, 1.3):
            how = {
                "attention_mask": left,
                "max_new_tokens": 12,
                "repetition_penalty": penalty,
            }
            want = theirs.generate(ids, do_sample=False, **how)[:, 17:]
            assert generate(ours, ids, **how) == want.tolist(), shape


def test_qwen_bf16_is_as_near_to_fp32_as_transformers():
    """At most 1.2 times as far."""
    ids, _, _ = padded_batch()
    for shape in QWEN_SHAPES:
        theirs = peer_qwen(**shape)
        ours = reload(theirs, Qwen)
        exact = theirs(ids).logits
        found = relative(ours.bfloat16()(ids), exact)
        allowed = relative(theirs.bfloat16()(ids).logits, exact)
        assert found < 1.2 * allowed < 0.1, shape


def test_qwen_embedded_texts_are_the_last_states_of_transformers():
    tokenizer = Tokenizer.load(MINI / "qwen")
    theirs = peer_qwen("MistralModel", vocab_size=tokenizer.fast.get_vocab_size())
    texts = ["red", "a very long text about a bowl", "x"]
    last = []
    for text in texts:
        states = theirs(torch.tensor([tokenizer.encode(text)])).last_hidden_state
        last.append(states[0, -1])
    want = nn.functional.normalize(torch.stack(last), dim=-1)
    found = qwen.embed_texts(reload(theirs, Qwen), tokenizer, texts, batch_size=2)
    assert_close(found, want, 1e-5)


def written_out(model, ids):
    """Qwen2.5 in double precision, head by head: ids (T,) -> logits (T, V)."""
    c = model.config
    weights = {name: p.double() for name, p in model.state_dict().items()}

    def norm(x, name):
        size = (x.square().mean(-1, keepdim=True) + c.eps).sqrt()
        return weights[f"{name}.weight"] * x / size

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turn(x):                                                            # (T, d)
        half = c.head_dim // 2
        speed = c.theta ** (-torch.arange(half).double() / half)
        angle = torch.arange(len(x))[:, None] * speed
        z = torch.complex(x[:, :half], x[:, half:])                         # dim i with i + d/2
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=1)

    def attention(x, name):
        q = linear(x, f"{name}.q_proj").split(c.head_dim, dim=1)
        k = linear(x, f"{name}.k_proj").split(c.head_dim, dim=1)
        v = linear(x, f"{name}.v_proj").split(c.head_dim, dim=1)
        future = torch.ones(len(x), len(x)).triu(1).bool()
        out = []
        for head in range(c.heads):
            shared = head * c.kv_heads // c.heads                           # which key head
            score = turn(q[head]) @ turn(k[shared]).T / c.head_dim**0.5
            score = score.masked_fill(future, -torch.inf)
            out.append(score.softmax(-1) @ v[shared])
        return linear(torch.cat(out, dim=1), f"{name}.o_proj")

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(c.layers):
        layer = f"model.layers.{i}"
        x = x + attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = nn.functional.silu(linear(h, f"{layer}.mlp.gate_proj"))
        x = x + linear(
            gate * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )
    return linear(norm(x, "model.norm"), "lm_head")


def test_qwen_logits_are_those_of_the_model_written_out():
    """Grouped, equal and single key heads; with and without biases; a tied head and its own."""
    ids, _, _ = padded_batch()
    for changes in (
        {},
        {"tied": False, "layers": 3},
        {"kv_heads": 4, "eps": 0.1},
        {"kv_heads": 1, "theta": 100.0, "head_dim": 6},
        {"qkv_bias": False},
    ):
        model = tiny_qwen(**changes)
        assert_close(model(ids[:1])[0], written_out(model, ids[0]), 1e-5)


def test_qwen_miniature_gives_the_recorded_logits():
    """mini/qwen, in fp32 and in bf16, on a chat; transformers gives the same."""
    model = Qwen.load(MINI / "qwen")
    ids = torch.tensor([Tokenizer.load(MINI / "qwen").chat(cdpo.prompt("A red mug"))])
    exact = model(ids)
    assert_recorded(exact, -0.17672, 0.026625, 2.5632, -0.422)
    rough = Qwen.load(MINI / "qwen", dtype=torch.bfloat16)
    assert rough.lm_head.weight.dtype == torch.bfloat16 and not rough.training
    assert 1e-4 < relative(rough(ids), exact) < 0.02


def test_qwen_norm_multiplies_by_its_weight_after_the_cast_back():
    """transformers' order: in bf16 another one changes a quarter of the numbers."""
    norm = loud(qwen.RMSNorm(64, 1e-6)).bfloat16()
    x = noise(5, 64).bfloat16()
    size = (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert same(norm(x), norm.weight * (x.float() / size).bfloat16())


def test_qwen_rope_turns_dim_i_with_dim_i_plus_half():
    """At position p the pair (i, i + d/2) is turned by p * theta^(-2i/d); d is 4 here."""
    cos, sin = qwen.rope_tables(torch.tensor([[3]]), 4, 100.0)
    turned = qwen.rotate(torch.eye(4)[:, None, None], cos, sin)[:, 0, 0]
    want = torch.zeros(4, 4)
    for i, angle in enumerate((3.0, 0.3)):
        want[i, i] = want[i + 2, i + 2] = math.cos(angle)
        want[i, i + 2] = math.sin(angle)
        want[i + 2, i] = -math.sin(angle)
    assert_close(turned, want)


def test_qwen_rope_depends_on_distances_only():
    """A query times a key is the same 100 tokens later, and another one token farther apart."""
    q = noise(1, 1, 1, 16)
    k = noise(1, 1, 1, 16, seed=1)

    def product(m, n):
        a = qwen.rotate(q, *qwen.rope_tables(torch.tensor([[m]]), 16, 1e4))
        b = qwen.rotate(k, *qwen.rope_tables(torch.tensor([[n]]), 16, 1e4))
        return (a * b).sum()

    assert abs(product(3, 8) - product(103, 108)) < 1e-4
    assert abs(product(3, 8) - product(3, 9)) > 1e-2


def test_qwen_token_sees_itself_and_what_stands_before():
    """A change at token 9 changes no state before it and each one from there on."""
    model = tiny_qwen()
    ids, _, _ = padded_batch()
    other = ids.clone()
    other[:, 9] = 7
    moved = (model(other) - model(ids)).norm(dim=-1) > 1e-4
    assert not moved[:, :9].any() and moved[:, 9:].all()


def padded_rows():
    """[(ids (3, 17), mask)] of the same three rows, padded on the right and on the left, and the
    rows alone, each (1, its length)."""
    ids, right, left = padded_batch()
    moved = ids.masked_scatter(left > 0, ids[right > 0])
    rows = [ids[i : i + 1, :n] for i, n in enumerate((17, 11, 6))]
    return [(ids, right), (moved, left)], rows


def test_qwen_padding_on_either_side_changes_no_row():
    """Hidden states of a row are those that it has alone."""
    model = tiny_qwen()
    batches, rows = padded_rows()
    alone = torch.cat([model.model(row)[0] for row in rows])
    for ids, mask in batches:
        assert_close(model.model(ids, attention_mask=mask)[mask > 0], alone, 1e-5)


def test_qwen_cache_in_pieces_equals_the_whole():
    """A prompt that is read into the cache piece by piece has the states of the whole."""
    model = tiny_qwen()
    batches, rows = padded_rows()
    alone = torch.cat([model.model(row)[0] for row in rows])
    for ids, mask in batches:
        cache = Cache(model.config, 3, 17, "cpu", torch.float32)
        pieces = []
        for start, end in ((0, 5), (5, 6), (6, 14), (14, 17)):
            part = model.model(
                ids[:, start:end], attention_mask=mask[:, :end], cache=cache
            )
            pieces.append(part)
        assert_close(torch.cat(pieces, dim=1)[mask > 0], alone, 1e-5)


def test_qwen_cache_needs_no_mask_where_nothing_is_padded():
    """Token by token, in a cache that is longer than the text."""
    model = tiny_qwen()
    ids, _, _ = padded_batch()
    cache = Cache(model.config, 3, 30, "cpu", torch.float32)
    found = [model.model(ids[:, i : i + 1], cache=cache) for i in range(17)]
    assert_close(torch.cat(found, dim=1), model.model(ids), 1e-5)
    assert cache.held == 17


def test_qwen_two_continuations_share_a_row():
    """With a mask (B, 1, T, S) a second continuation that does not see the first has the states
    that it has right behind the prompt."""
    model = tiny_qwen()
    ids = noise(12).abs().mul(20).long()[None]
    mask = torch.ones(12, 12).tril().bool()
    mask[9:, 6:9] = False                                                   # prompt 6, 3 and 3
    packed = model.model(ids, attention_mask=mask[None, None])
    first = model.model(ids[:, :9])
    second = model.model(torch.cat([ids[:, :6], ids[:, 9:]], dim=1))
    assert_close(packed[:, :9], first, 1e-5)
    assert_close(packed[:, 9:], second[:, 6:], 1e-5)


def test_qwen_reads_vectors_as_it_reads_ids():
    model = tiny_qwen()
    ids, right, _ = padded_batch()
    embeds = model.model.embed_tokens(ids)
    assert same(model(embeds=embeds), model(ids))
    assert same(model(None, right, embeds), model(ids, right))
    assert generate(model, embeds=embeds) == generate(model, ids)


def test_qwen_compiles_into_one_graph():
    model = tiny_qwen()
    ids, _, _ = padded_batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(ids), model(ids), 1e-5)


def test_qwen_sliding_window_refuses_what_it_would_cut():
    """A text or a cache longer than Mistral's window is refused, one as long as it is read."""
    model = tiny_qwen(window=4)
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert_close(model(ids[:, :4]), tiny_qwen()(ids[:, :4]))
    raises("window of 4", model, ids)
    raises("window of 4", generate, model, ids[:, :2], max_new_tokens=3)


def test_qwen_recomputed_layers_give_the_same_gradient():
    """`checkpointing` runs each layer again in the backward pass, and changes no bit."""
    model = tiny_qwen()
    ids, right, _ = padded_batch()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    found = []
    for model.model.checkpointing in (False, True):
        embeds = model.model.embed_tokens(ids).requires_grad_()
        loss = model(None, right, embeds).square().mean()
        found += torch.autograd.grad(loss, embeds)
    assert same(*found) and len(seen) == 3
    with torch.no_grad():
        model(ids)
    assert len(seen) == 4


def test_qwen_mask_that_is_added_is_the_mask():
    """Attention gives the same with 0 and -inf, whose rows are 16 numbers apart, as with what is
    seen."""
    q, k, v = noise(3, 2, 2, 5, 8)
    seen = (noise(2, 1, 5, 5) > 0) | torch.eye(5, dtype=torch.bool)
    mask = qwen.additive(seen, q.dtype)
    assert mask.shape == seen.shape and mask.stride(2) == 16
    expected = nn.functional.scaled_dot_product_attention(q, k, v, seen)
    assert_close(qwen.attend(q, k, v, mask), expected)


def test_qwen_a_layer_of_a_decoded_token_is_28_operators():
    """Those that compute. Its two norms are 6 each here, on a GPU one kernel and their weight."""
    counts = []
    views = ("view", "expand", "transpose", "slice", "select", "split", "unsqueeze", "alias",
             "detach", "as_strided", "permute", "unbind", "_to_copy", "t.default", "empty")

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not any(name in str(function) for name in views):
                counts[-1] += 1
            return function(*args, **(kwargs or {}))

    for layers in (2, 3):
        model = tiny_qwen(layers=layers)
        cache = Cache(model.config, 1, 8, "cpu", torch.float32)
        with torch.inference_mode():
            model.model(torch.tensor([[3, 4]]), cache=cache)
            counts.append(0)
            with Count():
                model.model(torch.tensor([[5]]), cache=cache)
    assert counts[1] - counts[0] == 28, counts


def test_qwen_large_frozen_product_is_the_plain_one():
    """x W^T + b and its gradients, whether oneDNN computes it (large, fp32, frozen) or not."""
    x = noise(3, 2, 600).requires_grad_()
    bias = noise(500, seed=1)
    for trained in (False, True):
        weight = noise(500, 600, seed=2).requires_grad_(trained)
        inputs = [x, weight] if trained else [x]
        found = []
        for product in (qwen.linear, nn.functional.linear):
            y = product(x, weight, bias)
            found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        assert_close(*found)
        chosen = type(qwen.linear(x, weight, bias).grad_fn).__name__
        assert ("FrozenProduct" in chosen) == (not trained)
    assert_close(qwen.linear(x, weight), nn.functional.linear(x, weight))


def test_qwen_without_onednns_operator_the_product_is_the_plain_one():
    x, weight = noise(3, 600), noise(500, 600, seed=2)
    with mock.patch.object(torch.ops, "mkldnn", object()):
        assert same(qwen.linear(x, weight), nn.functional.linear(x, weight))


def test_loader_reads_how_a_model_wishes_to_be_sampled(tmp_path):
    """generation_config.json as transformers reads it: greedy without do_sample, what is left out
    has its usual value."""
    generation = tmp_path / "generation_config.json"
    write_lines(tmp_path / "config.json", qwen.read_json(ROOT / "mini/qwen/config.json"))
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    own = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    for given, want in (({}, {**usual, "temperature": 0.0}), ({"do_sample": True}, usual),
                        ({"do_sample": True, **own}, own),
                        ({"do_sample": False, **own}, {**own, "temperature": 0.0}),
                        ({"do_sample": True, "top_k": None, "top_p": 1}, usual)):
        write_lines(generation, given)
        assert Config.read(tmp_path).sampling == want
    write_lines(generation, {"do_sample": True, "top_k": "many"})
    raises("generation_config.json", Config.read, tmp_path)


def test_lora_names_the_file_that_lacks_a_setting_and_refuses_integers(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    lora.inject(model, 2, 4)
    lora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    raises("adapter_config.json has no 'lora_alpha'", lora.load_adapter, model, tmp_path)
    for wrong in ("lora_A", "lora_B"):
        tensors = {"transformer.0.lora_A.weight": noise(2, 8),
                   "transformer.0.lora_B.weight": noise(8, 2)}
        tensors[f"transformer.0.{wrong}.weight"] = tensors[f"transformer.0.{wrong}.weight"].int()
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(tensors, file)
        raises(f"{wrong}.weight is torch.int32", lora.load_adapter, nn.Sequential(nn.Linear(8, 8)),
               file)


def test_tokenizer_without_qwens_template_is_named():
    file = ROOT / "mini/flux/tokenizer_2"
    raises(f"{file}/tokenizer.json lacks <|im_start|>",
           qwen.Tokenizer.load(file).chat, [{"role": "user", "content": "x"}])


def test_qwen_precision_is_one_policy_and_changes_no_bit_on_a_cpu():
    """TF32 for fp32 products of a GPU, or with `deterministic` none of it, and no atomics; a CPU
    computes the same bits."""
    model = tiny_qwen()
    ids, right, _ = padded_batch()
    found = []
    try:
        for deterministic in (False, True):
            qwen.set_precision(deterministic)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cuda.matmul.allow_tf32 != deterministic
            assert torch.backends.cudnn.allow_tf32 != deterministic
            embeds = model.model.embed_tokens(ids).detach().requires_grad_()
            loss = model(None, right, embeds).square().mean()
            found.append(torch.autograd.grad(loss, embeds)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*found)


# ---- qwen.py: generation and embedding -----------------------------------------------------------

def test_generate_gives_a_row_the_same_alone_or_padded():
    model = tiny_qwen()
    batches, rows = padded_rows()
    how = {"max_new_tokens": 9, "repetition_penalty": 1.2}
    alone = [generate(model, row, **how)[0] for row in rows]
    for ids, mask in batches:
        assert generate(model, ids, attention_mask=mask, **how) == alone


def test_generate_takes_the_likeliest_token_each_time():
    """Greedy tokens are those of reading the whole row anew for each."""
    model = tiny_qwen(eos=())
    ids, _, _ = padded_batch()
    want = ids
    for _ in range(8):
        token = model(want)[:, -1].argmax(-1, keepdim=True)
        want = torch.cat([want, token], dim=1)
    assert generate(model, ids, max_new_tokens=8) == want[:, 17:].tolist()


def test_generate_is_greedy_and_without_penalty_unless_told_otherwise():
    model = tiny_qwen(eos=())
    ids, _, _ = padded_batch()
    usual = generate(model, ids)
    plain = {"max_new_tokens": 64, "temperature": 0.0, "repetition_penalty": 1.0}
    assert usual == generate(model, ids, **plain)
    assert usual != generate(model, ids, repetition_penalty=1.1)
    one = generate(model, ids, temperature=1.0, generator=seeded())
    assert one == generate(
        model, ids, temperature=1.0, top_k=0, top_p=1.0, generator=seeded()
    )


def test_generate_stops_each_row_before_its_own_end():
    """Any of the config's end tokens ends a row, and is no part of the answer."""
    model = tiny_qwen(eos=())
    ids, _, _ = padded_batch()
    free = generate(model, ids, max_new_tokens=20)
    ends = (free[0][6], free[1][9])
    model.config.eos = ends
    want = []
    for row in free:
        stop = [i for i, token in enumerate(row) if token in ends]
        want.append(row[: min(stop, default=20)])
    assert generate(model, ids, max_new_tokens=20) == want
    assert want != free


def test_generate_reads_no_more_when_every_row_has_ended():
    model = tiny_qwen(eos=())
    ids, _, _ = padded_batch()
    model.config.eos = generate(model, ids[:1], max_new_tokens=1)[0]
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    assert generate(model, ids[:1]) == [[]] and len(seen) == 1


def test_generate_penalises_what_stands_in_the_row_already():
    """The logits of the prompt's and the answer's tokens are divided by the penalty where they are
    positive, and multiplied where not; padding does not count."""
    model = tiny_qwen(eos=())
    ids, _, left = padded_batch()
    how = {"max_new_tokens": 6, "repetition_penalty": 1.7}
    answers = generate(model, ids, attention_mask=left, **how)
    for row, mask, answer in zip(ids, left, answers):
        text = row[mask > 0].tolist()
        for token in answer:
            logits = model(torch.tensor([text]))[0, -1]
            seen = torch.tensor(sorted(set(text)))
            there = logits[seen]
            logits[seen] = torch.where(there > 0, there / 1.7, there * 1.7)
            assert token == logits.argmax()
            text.append(token)


def test_generate_samples_from_its_own_generator_alone():
    model = tiny_qwen()
    ids, _, _ = padded_batch()
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        found.append(generate(model, ids, temperature=1.0, generator=seeded(seed)))
    assert found[0] == found[1] != found[2]
    assert same(before, torch.get_rng_state())


def test_generate_refuses_logits_that_are_not_finite():
    model = tiny_qwen()
    model.lm_head.weight[3] = math.inf
    raises("logits are not finite", generate, model, torch.ones(1, 3, dtype=torch.long))


LOGITS = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).log()


def drawn(temperature=1.0, top_k=0, top_p=1.0, logits=LOGITS, rows=400):
    """The tokens of `rows` draws, as often as they come."""
    logits = logits.repeat(rows, 1)
    return qwen.sample(logits, temperature, top_k, top_p, seeded()).tolist()


def test_generate_draws_from_the_top_k_and_top_p_sets():
    """All of these tokens and no others come: of k the likeliest; of p the fewest that reach it;
    the probability of p counts among the k that are left."""
    assert set(drawn()) == {0, 1, 2, 3, 4}
    assert set(drawn(top_k=1)) == {0}
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_k=5)) == set(drawn(top_k=9)) == {0, 1, 2, 3, 4}
    assert set(drawn(top_p=0.0)) == {0}
    assert set(drawn(top_p=0.6)) == {0, 1}
    assert set(drawn(top_p=0.8)) == {0, 1, 2}
    assert set(drawn(top_k=2, top_p=0.6)) == {0}
    assert len(set(drawn(top_p=0.5, logits=torch.zeros(2)))) == 1
    assert set(drawn(top_k=3, temperature=0.02)) == {0}
    shuffled = LOGITS[[3, 0, 4, 1, 2]]
    assert set(drawn(top_p=0.8, logits=shuffled)) == {1, 3, 4}


def test_generate_draws_as_often_as_the_temperature_says():
    """At temperature T a token comes in proportion to p^(1/T); at 0 the likeliest comes always."""
    p = LOGITS.exp()
    for temperature in (0.5, 1.0, 2.0):
        count = torch.tensor(drawn(temperature, rows=5000)).bincount(minlength=5)
        want = p ** (1 / temperature)
        assert (count / 5000 - want / want.sum()).abs().max() < 0.025
    assert drawn(temperature=0, top_k=3, rows=3) == [0, 0, 0]


def test_generate_embeds_texts_by_their_last_token():
    """Of unit length, each as it is alone, in the order of the texts; a text without tokens is
    refused."""
    model = Qwen.load(MINI / "qwen")
    tokenizer = Tokenizer.load(MINI / "qwen")
    texts = ["red", "a very long text about a bowl", "neon green"]
    vectors = qwen.embed_texts(model, tokenizer, texts, batch_size=2)
    assert_close(vectors.norm(dim=1), torch.ones(3))
    for text, vector in zip(texts, vectors):
        state = model.model(torch.tensor([tokenizer.encode(text)]))[0, -1]
        assert_close(vector, state / state.norm(), 1e-5)
    raises("a text without tokens", qwen.embed_texts, model, tokenizer, ["red", ""])


# ---- qwen.py: tokenizer --------------------------------------------------------------------------

def test_tokenizer_writes_qwens_chat_template():
    """A default system turn where none is given, one turn a message, an open turn at the end."""
    tokenizer = Tokenizer.load(MINI / "qwen")
    default = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
        "You are a helpful assistant.<|im_end|>\n"
    )
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hello"}
    asked = "<|im_start|>user\nHello<|im_end|>\n"

    def text(messages, *how):
        ids = tokenizer.chat(messages, *how)
        return tokenizer.fast.decode(ids, skip_special_tokens=False)

    assert text([user]) == default + asked + "<|im_start|>assistant\n"
    assert text([user], False) == default + asked
    assert text([]) == default + "<|im_start|>assistant\n"
    assert (
        text([system, user], False)
        == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"
    )
    ids = tokenizer.chat([user])
    assert ids.count(tokenizer.fast.token_to_id("<|im_start|>")) == 3
    raises(
        "unknown role 'tool'", tokenizer.chat, [user, {"role": "tool", "content": ""}]
    )


def test_tokenizer_decodes_what_it_encodes():
    """Any text comes back; special tokens do not show."""
    tokenizer = Tokenizer.load(MINI / "qwen")
    for text in (
        "Paint the bowl neon green",
        "it's 3  holographic\n\n caf\u00e9s \U0001f600",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("red<|im_end|>")) == "red"
    assert len(tokenizer.encode("<|im_end|>")) == 1


def test_tokenizer_equals_transformers():
    """Tokens and chats of mini/qwen, and the logits of a chat."""
    transformers = peer("transformers")
    ours = Tokenizer.load(MINI / "qwen")
    theirs = transformers.AutoTokenizer.from_pretrained(MINI / "qwen")
    messages = cdpo.prompt("A white bowl in front of a grey wall", "with stripes")
    turns = [
        {"role": "system", "content": "Be brief."},
        *messages,
        {"role": "assistant", "content": "Paint the bowl red"},
    ]
    for chat in (messages, turns):
        for prompt in (True, False):
            how = {"add_generation_prompt": prompt, "return_dict": False}
            assert ours.chat(chat, prompt) == theirs.apply_chat_template(chat, **how)
    for text in (
        "Paint the bowl neon green",
        "it's 3  holographic\n\n caf\u00e9s \U0001f600",
    ):
        assert ours.encode(text) == theirs(text).input_ids
    ids = torch.tensor([ours.chat(messages)])
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(MINI / "qwen", dtype=torch.float32)
    assert_close(Qwen.load(MINI / "qwen")(ids), model(ids).logits, 1e-5)


def test_tokenizer_of_an_embedding_model_ends_every_text(tmp_path):
    """Where tokenizer_config.json says add_eos_token, that token ends a text, once."""
    plain = Tokenizer.load(MINI / "qwen")
    end = plain.fast.token_to_id("<|im_end|>")
    ids = plain.encode("red")
    file = tmp_path / "tokenizer_config.json"
    (tmp_path / "tokenizer.json").write_bytes(
        (MINI / "qwen/tokenizer.json").read_bytes()
    )
    for eos in ("<|im_end|>", {"content": "<|im_end|>"}):
        write_lines(file, {"add_eos_token": True, "eos_token": eos})
        ending = Tokenizer.load(tmp_path)
        for text in ("red", "red<|im_end|>"):
            assert ending.encode(text, whole=True) == [*ids, end]
        assert ending.encode("red") == ids
    write_lines(file, {"add_eos_token": False, "eos_token": "<|im_end|>"})
    assert Tokenizer.load(tmp_path).encode("red", whole=True) == ids
    file.unlink()
    assert Tokenizer.load(tmp_path).encode("red", whole=True) == ids
    (tmp_path / "tokenizer.json").unlink()
    raises("tokenizer.json", Tokenizer.load, tmp_path)


# ---- qwen.py: reading of checkpoints -------------------------------------------------------------

def stored_qwen(model, folder):
    """The tensors of `model` as a checkpoint holds them, a tied head once -> (tensors, file)."""
    tensors = dict(model.named_parameters())
    file = folder / "model.safetensors"
    save_file(tensors, file)
    return tensors, file


def test_loader_fills_modules_with_and_without_memory(tmp_path):
    """On the meta device or not a module gets the stored values, and a tied head stays tied."""
    model = tiny_qwen()
    stored_qwen(model, tmp_path)
    for device in (qwen.on_meta(), torch.device("cpu")):
        with device:
            copy = Qwen(model.config)
        qwen.load_checkpoint(copy, tmp_path)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert same([*copy.parameters()], [*model.parameters()])


def test_loader_reads_shards(tmp_path):
    """Shards and their index are one checkpoint; a lost shard is named."""
    model = tiny_qwen(tied=False)
    tensors, file = stored_qwen(model, tmp_path)
    file.unlink()
    where = {}
    for part, names in ((1, [*tensors][:5]), (2, [*tensors][5:])):
        shard = f"part-{part}.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
        where.update(dict.fromkeys(names, shard))
    write_lines(tmp_path / "model.safetensors.index.json", {"weight_map": where})
    copy = Qwen(model.config)
    qwen.load_checkpoint(copy, tmp_path)
    assert same([*copy.parameters()], [*model.parameters()])
    (tmp_path / "part-2.safetensors").unlink()
    raises("part-2.safetensors", qwen.load_checkpoint, copy, tmp_path)


def test_loader_names_every_tensor_that_does_not_fit(tmp_path):
    """Missing, unexpected, misshapen and integer tensors, all in one message."""
    tensors, file = stored_qwen(tiny_qwen(), tmp_path)
    tensors["model.norm.weight"] = torch.zeros(5)
    tensors["model.embed_tokens.weight"] = torch.zeros(61, 32).int()
    tensors["ghost"] = torch.zeros(1)
    save_file(tensors, file)
    model = tiny_qwen(tied=False)
    message = raises("missing lm_head.weight", qwen.load_checkpoint, model, tmp_path)
    assert "unexpected ghost" in message and str(tmp_path) in message
    assert "model.norm.weight has shape (5,), expected (32,)" in message
    assert "model.embed_tokens.weight is torch.int32" in message
    assert "model.layers.0.self_attn.q_proj" not in message


def test_loader_names_a_truncated_file(tmp_path):
    _, file = stored_qwen(tiny_qwen(), tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    raises(
        "model.safetensors is truncated", qwen.load_checkpoint, tiny_qwen(), tmp_path
    )
    raises("found: none", qwen.read_tensors, tmp_path / "absent")
    file.rename(tmp_path / "first.safetensors")
    save_file({}, tmp_path / "second.safetensors")
    raises("first.safetensors, second.safetensors", qwen.read_tensors, tmp_path)


def test_loader_checks_numbers_only_where_it_is_asked_to():
    """A nan is refused in adapters, not in checkpoints of 7 billion numbers."""
    spoiled = {"a": torch.tensor([1.0, math.nan])}
    qwen.check_fit("x", spoiled, spoiled)
    raises(
        "a is torch.float32, or not finite",
        qwen.check_fit,
        "x",
        spoiled,
        spoiled,
        finite=True,
    )
    whole = {"a": torch.ones(2, dtype=torch.bfloat16)}
    qwen.check_fit("x", whole, whole, finite=True)


def test_loader_reads_sizes_from_either_kind_of_config(tmp_path):
    """What config.json leaves out has transformers' value; the end tokens of
    generation_config.json win."""
    sizes = {
        "vocab_size": 7,
        "hidden_size": 24,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "rms_norm_eps": 1e-5,
        "model_type": "qwen2",
    }
    file = tmp_path / "config.json"

    def read(**more):
        write_lines(file, {**sizes, **more})
        return Config.read(tmp_path)

    assert read() == Config(
        vocab=7,
        width=24,
        inner=5,
        layers=2,
        heads=6,
        kv_heads=6,
        head_dim=4,
        eps=1e-5,
        theta=1e4,
        qkv_bias=True,
        tied=False,
        headless=False,
        window=None,
        eos=(),
        sampling={"temperature": 0.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0},
    )
    assert (
        read(num_key_value_heads=2).kv_heads == 2 and read(head_dim=10).head_dim == 10
    )
    assert read(rope_theta=5.0).theta == 5 and read(tie_word_embeddings=True).tied
    new = {"rope_type": "default", "rope_theta": 7.0}
    assert read(rope_parameters=new).theta == 7
    assert read(architectures=["MistralModel"]).headless
    assert not read(architectures=["MistralForCausalLM"], sliding_window=9).headless
    assert read(sliding_window=9).window is None
    mistral = read(model_type="mistral", sliding_window=9)
    assert mistral.window == 9 and not mistral.qkv_bias
    assert read(eos_token_id=3).eos == (3,) and read(eos_token_id=[3, 4]).eos == (3, 4)
    write_lines(tmp_path / "generation_config.json", {"eos_token_id": [5]})
    assert read(eos_token_id=3).eos == (5,)


def test_loader_refuses_settings_that_are_not_written_here(tmp_path):
    """Another model, rope scaling, activation, attention or size is named."""
    file = tmp_path / "config.json"

    def refused(part, kind="qwen2", **settings):
        write_lines(file, {"model_type": kind, **settings})
        assert str(file) in raises(part, Qwen.load, tmp_path)

    refused("'llama'", kind="llama")
    refused("'yarn'", rope_scaling={"type": "yarn"})
    refused("'linear'", rope_parameters={"rope_type": "linear"})
    refused("'gelu'", hidden_act="gelu")
    refused("use_sliding_window is True", use_sliding_window=True)
    refused("num_hidden_layers is 1001", num_hidden_layers=1001)
    write_lines(file, {"model_type": "qwen2"})
    raises("num_attention_heads", Qwen.load, tmp_path)
    write_lines(file, [1])
    raises("config.json is truncated or not", Qwen.load, tmp_path)
    file.unlink()
    raises(f"there is no file {file}", Qwen.load, tmp_path)
    assert qwen.read_json(file, {}) == {}
    write_lines(file, {"num_hidden_layers": 1000})
    assert qwen.read_json(file, {}) == {"num_hidden_layers": 1000}


def test_loader_reads_embedding_models_without_prefix_and_head(tmp_path):
    """Linq's and e5's files leave out "model." and the head."""
    model = tiny_qwen(headless=True, qkv_bias=False)
    tensors = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {
        "architectures": ["MistralModel"],
        "model_type": "mistral",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
    }
    write_lines(tmp_path / "config.json", settings)
    copy = Qwen.load(tmp_path)
    ids, _, _ = padded_batch()
    assert same(copy.model(ids), model.model(ids)) and copy.lm_head is None
    assert not any(p.requires_grad for p in copy.parameters())


def test_loader_takes_a_folder_or_a_repository_and_no_typo(tmp_path):
    """A folder is itself; owner/name is downloaded, only the files asked for; a gated repository
    and a mistyped path are explained."""
    assert qwen.resolve(tmp_path) == tmp_path
    with mock.patch("qwen.snapshot_download", return_value=str(tmp_path)) as download:
        assert qwen.resolve("a/name", ["*.json"]) == tmp_path
    download.assert_called_once_with("a/name", allow_patterns=["*.json"])
    with mock.patch("qwen.snapshot_download", side_effect=OSError("403")):
        message = raises("HF_TOKEN", qwen.resolve, "a/gated")
        assert "huggingface.co/a/gated" in message
        for name in (ROOT / "mini/qwem", "", "a/b/c", "name"):
            raises(f"{str(name)!r} is not a folder here", qwen.resolve, name)
        with contextlib.chdir(ROOT):
            raises("'mini/qwem' is not a folder here", qwen.resolve, "mini/qwem")


def test_loader_builds_without_drawing_weights():
    """On the meta device a model takes no memory and moves no random generator."""
    config = tiny_qwen().config
    before = torch.get_rng_state()
    with qwen.on_meta():
        model = Qwen(config)
    assert all(p.is_meta for p in model.parameters())
    assert same(before, torch.get_rng_state())


def test_loader_takes_equal_tensors_of_one_parameter_as_one(tmp_path):
    """A tied head and its embedding, in either order, T5's two embeddings, a norm with and without
    prefix, one name in two shards: equal ones are one, different ones are refused by name."""
    model = tiny_qwen()
    tensors, file = stored_qwen(model, tmp_path)
    head = tensors["model.embed_tokens.weight"]
    for first, extra, value in [
        (False, "lm_head.weight", head),
        (True, "lm_head.weight", head),
        (False, "norm.weight", tensors["model.norm.weight"]),
    ]:
        twice = {extra: value.clone(), **tensors} if first else {**tensors, extra: value.clone()}
        save_file(twice, file)
        copy = Qwen(model.config)
        qwen.load_checkpoint(copy, tmp_path, Qwen.rename)
        assert same([*copy.parameters()], [*model.parameters()])
        save_file({**twice, extra: value + 1}, file)
        message = raises("two different", qwen.load_checkpoint, copy, tmp_path, Qwen.rename)
        assert extra in message and str(tmp_path) in message
    assert "model.embed_tokens.weight = lm_head.weight" in raises(
        "two different", save_twice_and_load, tensors, head + 1, file, model.config
    )


def save_twice_and_load(tensors, head, file, config):
    save_file({**tensors, "lm_head.weight": head}, file)
    qwen.load_checkpoint(Qwen(config), file)


def test_loader_compares_what_two_shards_and_t5_say_twice(tmp_path):
    tensors, file = stored_qwen(tiny_qwen(), tmp_path)
    file.unlink()
    where = dict.fromkeys(tensors, "1.safetensors")
    where["model.norm.weight"] = "2.safetensors"
    write_lines(tmp_path / "model.safetensors.index.json", {"weight_map": where})
    norm = tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "1.safetensors")
    save_file({"model.norm.weight": norm.clone()}, tmp_path / "2.safetensors")
    assert same(qwen.read_tensors(tmp_path)["model.norm.weight"], norm)
    save_file({"model.norm.weight": norm + 1}, tmp_path / "2.safetensors")
    raises("two different tensors are stored for model.norm.weight", qwen.read_tensors, tmp_path)

    folder = MINI / "flux/text_encoder_2"
    stored = load_file(folder / "model.safetensors")
    either = stored.get("shared.weight", stored.get("encoder.embed_tokens.weight"))
    module = flux.T5.load(folder)
    names = {"shared.weight": either, "encoder.embed_tokens.weight": either.clone()}
    save_file({**stored, **names}, tmp_path / "t5.safetensors")
    qwen.load_checkpoint(module, tmp_path / "t5.safetensors", flux.T5.rename)
    names["shared.weight"] = either + 1
    save_file({**stored, **names}, tmp_path / "t5.safetensors")
    raises(
        "shared.weight = encoder.embed_tokens.weight",
        qwen.load_checkpoint,
        module,
        tmp_path / "t5.safetensors",
        flux.T5.rename,
    )


def test_loader_reads_the_usual_name_and_refuses_two_checkpoints(tmp_path):
    """Another file beside the usual one is left alone; an index beside a whole file, two usual
    names, or a variant are refused; an index without its shards names the first missing."""
    for usual in ("model", "diffusion_pytorch_model"):
        folder = tmp_path / usual
        folder.mkdir()
        save_file({"a": torch.ones(1)}, folder / f"{usual}.safetensors")
        save_file({"b": torch.zeros(1)}, folder / "consolidated.safetensors")
        assert qwen.read_tensors(folder)["a"] == 1
        variant = folder / f"{usual}.bf16.safetensors"
        save_file({"a": torch.zeros(1)}, variant)
        raises(f"{usual}.safetensors, {variant.name}", qwen.read_tensors, folder)
        variant.unlink()
        index = folder / f"{usual}.safetensors.index.json"
        write_lines(index, {"weight_map": {"a": "gone.safetensors"}})
        message = raises("found:", qwen.read_tensors, folder)
        assert f"{usual}.safetensors, {index.name}" in message
        (folder / f"{usual}.safetensors").unlink()
        raises(f"there is no file {folder}/gone.safetensors", qwen.read_tensors, folder)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    raises("found: model.safetensors, diffusion", qwen.read_tensors, folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 99\n"


def test_loader_says_what_is_the_matter_with_a_file(tmp_path):
    """Absent, a git-lfs pointer, quantised, without a setting: each in one short sentence."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((MINI / "qwen" / name).read_bytes())
    for name, load in [
        ("config.json", Qwen.load),
        ("model.safetensors", Qwen.load),
        ("tokenizer.json", Tokenizer.load),
    ]:
        file = tmp_path / name
        before = file.read_bytes()
        file.write_text(POINTER)
        assert "lfs pull" in raises(f"{file} is a git-lfs pointer", load, tmp_path)
        if name != "model.safetensors":
            file.unlink()
            message = raises(f"{file}", load, tmp_path)
            assert "no such file" in message.lower() or "there is no file" in message
        file.write_bytes(before)
    config = json.loads((tmp_path / "config.json").read_text())
    for method in ("awq", "fp8", "bitsandbytes"):
        settings = {"quantization_config": {"quant_method": method}}
        write_lines(tmp_path / "config.json", {**config, **settings})
        raises("quantization_config", Qwen.load, tmp_path)
    config.pop("rms_norm_eps")
    write_lines(tmp_path / "config.json", {**config, "quantization_config": None})
    raises("config.json has no 'rms_norm_eps'", Qwen.load, tmp_path)


def test_loader_fits_a_foreign_layout_on_a_screen(tmp_path):
    """Hundreds of names, as in BFL's or ComfyUI's files: two of each kind and how many more."""
    for prefix in ("double_blocks", "model.diffusion_model.double_blocks"):
        stored = {f"{prefix}.{i}.img_attn.qkv.weight": torch.zeros(2) for i in range(300)}
        save_file(stored, tmp_path / "flux1-dev.safetensors")
        message = raises(prefix, qwen.load_checkpoint, tiny_qwen(), tmp_path)
        assert "and 298 more" in message and len(message) < 500


def test_loader_leaves_out_the_rope_tables_of_old_files(tmp_path):
    tensors, file = stored_qwen(tiny_qwen(), tmp_path)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **table}, file)
    qwen.load_checkpoint(tiny_qwen(), tmp_path, Qwen.rename)
    write_lines(tmp_path / "config.json", {"model_type": "mistral"})
    sizes = ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"]
    more = dict.fromkeys([*sizes, "num_hidden_layers", "rms_norm_eps"], 8)
    write_lines(tmp_path / "config.json", {"model_type": "mistral", **more})
    assert Config.read(tmp_path).window == 4096                  # transformers' default


def test_generate_keeps_the_fewest_at_an_exact_boundary():
    """Where the likeliest reach top_p exactly, no token more comes, as in transformers."""
    warper = peer("transformers").TopPLogitsWarper
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.6, 0.3, 0.1]])
    for row, top_p in [(0, 0.7), (1, 0.4), (2, 0.6), (1, 0.75)]:
        logits = p[row].log()[None]
        theirs = warper(top_p)(None, logits).isfinite()[0].nonzero()[:, 0]
        assert set(drawn(top_p=top_p, logits=logits[0])) == set(theirs.tolist())


def test_generate_stops_at_the_ids_it_is_told_too():
    """Beside config.json's end, which may be null, absent or another."""
    model = tiny_qwen(eos=())
    ids, _, _ = padded_batch()
    (answer,) = generate(model, ids[:1], max_new_tokens=6)
    stop = answer[3]
    cut = answer[:answer.index(stop)]
    for eos in ((), (None,), (answer[-1],)):
        model.config.eos = eos
        assert generate(model, ids[:1], max_new_tokens=6, stop=[stop]) == [cut]


class Recorder(TorchDispatchMode):
    """A pretended torch.cuda.CUDAGraph: what runs inside is recorded, undone where it was in place,
    and can be run again; the results stay at the same place, as a graph's do."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value, about in zip(args, function._schema.arguments):
            if about.alias_info is not None and about.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def undo(self):
        for value, was in reversed(self.before):
            value.copy_(was)

    def replay(self):
        for function, args, kwargs, out in self.calls:
            new = function(*args, **kwargs)
            if isinstance(out, torch.Tensor) and not function._schema.is_mutable \
                    and new.data_ptr() != out.data_ptr():
                out.copy_(new)


@contextlib.contextmanager
def pretended_graphs(replays):
    @contextlib.contextmanager
    def recorded(recorder):
        with recorder:
            yield
        recorder.undo()
        replays.append(recorder)

    with mock.patch.object(torch.cuda, "CUDAGraph", Recorder), \
            mock.patch.object(torch.cuda, "graph", recorded), \
            mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()):
        yield


def test_generate_a_replayed_step_is_the_step():
    """A decoding step recorded once and replayed gives the logits that the step gives: it reads
    and moves on the cache in place, and depends on no number of the host's."""
    model = tiny_qwen()
    token = torch.tensor([[3], [9]])
    mask = torch.ones(2, 4)
    mask[1, 0] = 0

    def steps(wrap):
        cache = qwen.Cache(model.config, 2, 16, "cpu", torch.float32)
        model.model(torch.arange(8).view(2, 4), attention_mask=mask, cache=cache)

        def step(token):
            return model.lm_head(model.model(token, attention_mask=mask, cache=cache)[:, -1])

        found = [step(token)]
        step = wrap(step)
        for number in range(5):
            found.append(step(token + number).clone())
        return torch.stack(found)

    with torch.inference_mode():
        want = steps(lambda step: step)
        replays = []
        with pretended_graphs(replays):
            found = steps(lambda step: qwen.replayed(step, token.clone()))
    assert same(found, want) and len(replays) == 1


def test_sample_draws_as_multinomial_does():
    """One draw from p is torch.multinomial's, bit for bit, and any temperature will do."""
    logits = noise(3, 50)
    p = (logits / 0.7).softmax(-1)
    for seed in range(5):
        want = torch.multinomial(p, 1, generator=seeded(seed))[:, 0]
        assert same(qwen.sample(logits, 0.7, 0, 1.0, seeded(seed)), want)
    for temperature in (1e-300, 1e-30, 1e30):
        token = qwen.sample(logits, temperature, 0, 1.0, seeded())
        assert temperature > 1 or same(token, logits.argmax(-1))


def changed_tokenizer(folder, change):
    """mini/qwen's tokenizer.json, changed in place by `change` -> the folder."""
    data = json.loads((MINI / "qwen/tokenizer.json").read_text())
    change(data)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_tokenizer_without_a_chat_token_says_which(tmp_path):
    """Either of the two; it encodes and embeds as before."""
    for token in ("<|im_start|>", "<|im_end|>"):
        def rename(data):
            for added in data["added_tokens"]:
                added["content"] = added["content"].replace(token, "<|else|>")

        folder = changed_tokenizer(tmp_path, rename)
        tokenizer = Tokenizer.load(folder)
        message = raises(token, tokenizer.chat, [{"role": "user", "content": "red"}])
        assert "tokenizer" in message
        assert tokenizer.encode("red") == Tokenizer.load(MINI / "qwen").encode("red")


def test_tokenizer_adds_its_own_tokens_to_whole_texts_alone(tmp_path):
    """A beginning token, as Mistral's <s>, is in what is embedded, never in a chat or an answer."""
    plain = Tokenizer.load(MINI / "qwen")
    (begin,) = plain.encode("<|endoftext|>")

    def begin_with(data):
        special = {"id": "<|endoftext|>", "ids": [begin], "tokens": ["<|endoftext|>"]}
        first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text],
            "special_tokens": {"<|endoftext|>": special},
        }

    tokenizer = Tokenizer.load(changed_tokenizer(tmp_path, begin_with))
    talk = [{"role": "user", "content": "red"}]
    assert tokenizer.chat(talk) == plain.chat(talk)
    assert tokenizer.encode("red") == plain.encode("red")
    assert tokenizer.encode("red", whole=True) == [begin, *plain.encode("red")]
    model = Qwen.load(MINI / "qwen")
    state = model.model(torch.tensor([[begin, *plain.encode("red")]]))[:, -1]
    vector = qwen.embed_texts(model, tokenizer, ["red"])
    assert_close(vector, nn.functional.normalize(state), 1e-5)


def test_tokenizer_whose_end_is_no_token_is_refused(tmp_path):
    folder = changed_tokenizer(tmp_path, lambda data: None)
    for eos in ("</s>", {"content": "</s>"}):
        write_lines(folder / "tokenizer_config.json", {"add_eos_token": True, "eos_token": eos})
        raises("tokenizer_config.json has no '</s>'", Tokenizer.load, folder)


def test_language_model_with_ids_beyond_its_vocabulary_is_refused(tmp_path):
    """A token added to the tokenizer alone; an embedding that was cut. Without either the pair."""
    model, tokenizer = qwen.load_language_model(MINI / "qwen")
    assert model.config.vocab == 803 and tokenizer.encode("<|im_end|>") == [802]

    def add(data):
        data["added_tokens"].append({**data["added_tokens"][-1], "id": 803, "content": "<new>"})

    for folder, change in ((tmp_path / "added", add), (tmp_path / "cut", lambda data: None)):
        changed_tokenizer(folder, change)
        config = json.loads((MINI / "qwen/config.json").read_text())
        tensors = load_file(MINI / "qwen/model.safetensors")
        if folder.name == "cut":
            config["vocab_size"] = 802
            table = tensors["model.embed_tokens.weight"][:802]
            tensors["model.embed_tokens.weight"] = table.contiguous()
        save_file(tensors, folder / "model.safetensors")
        write_lines(folder / "config.json", config)
        message = raises("vocab_size", qwen.load_language_model, folder)
        assert str(folder) in message and f"up to {config['vocab_size']}," in message


def test_defaults_lie_beside_the_script(tmp_path):
    """In the checkout a default is its short text; elsewhere the file in the checkout. What a user
    names, and runs/..., stay relative to where they stand."""
    parser = argparse.ArgumentParser()
    with contextlib.chdir(ROOT):
        assert qwen.shipped("mini/qwen") == "mini/qwen"
    with contextlib.chdir(tmp_path):
        assert Path(qwen.shipped("mini/qwen")).samefile(MINI / "qwen")
        assert qwen.shipped("runs/sft") == "runs/sft" and qwen.shipped(None) is None
        qwen.add_flags(parser, cdpo.SFTSettings)
        assert Path(parser.parse_args([]).qwen).samefile(MINI / "qwen")
        assert parser.parse_args(["--qwen", "mini/qwen"]).qwen == "mini/qwen"
        assert "(default: mini/qwen)" in " ".join(parser.format_help().split())


# ---- qwen.py: what every stage and script shares -------------------------------------------------

@dataclass
class Toy:
    """A table of settings."""

    steps: int = qwen.flag(3, 9375, "how many")
    warmup: int = qwen.flag(0, 7, "how many of them")
    lr: float = qwen.flag(0.5, 1e-6, "peak")
    drop: float = qwen.flag(0.1, 0.0, "share", (0, 1))
    dtype: str = qwen.flag("fp32", "bf16", "of the base", choices=["fp32", "bf16"])
    signed: bool = qwen.flag(False, True, "signs")


def toy(line, preset="mini"):
    parser = argparse.ArgumentParser()
    qwen.add_flags(parser, Toy, preset)
    return qwen.settings_from(parser.parse_args(line.split()), Toy)


def test_shared_flags_are_the_fields_and_a_preset_is_a_column():
    assert toy("") == Toy()
    paper = Toy(steps=9375, warmup=7, lr=1e-6, drop=0.0, dtype="bf16", signed=True)
    assert toy("", "paper") == paper
    assert toy("--steps 8 --drop 1 --signed") == Toy(steps=8, drop=1.0, signed=True)
    assert toy("--lr 2", "paper").lr == 2


def test_shared_settings_stay_within_their_bounds():
    """An int that is 0 in no preset is at least 1, anything else at least 0, or as its row says."""
    for line in (
        "--steps 0",
        "--warmup -1",
        "--lr -0.1",
        "--drop 1.1",
        "--drop -0.1",
        "--lr nan",
        "--steps 10000000000001",
        "--lr inf",
    ):
        name = line.split()[0]
        assert "it must lie in" in raises(name, toy, line)
    for line in ("--steps 1", "--warmup 0", "--lr 0", "--drop 1", "--drop 0"):
        toy(line)


def test_shared_seeds_depend_on_everything_that_is_said():
    seeds = {
        qwen.seed_for(*what)
        for what in ((0, "step", 1), (0, "step", 2), (1, "step", 1))
    }
    assert len(seeds) == 3 and max(seeds) < 2**63
    assert qwen.seed_for(0, "step", 1) == 28679623850856145
    one = torch.rand(3, generator=qwen.generator_for(0, "step"))
    assert same(one, torch.rand(3, generator=seeded(qwen.seed_for(0, "step"))))


def test_shared_device_is_the_best_there_is_or_what_is_asked_for():
    assert qwen.pick_device("") == qwen.pick_device("cpu") == "cpu"
    assert "cannot be used here" in raises("--device is cuda", qwen.pick_device, "cuda")
    raises("--device is nonsense", qwen.pick_device, "nonsense")


def test_shared_collectives_do_nothing_alone():
    """In one process a sum over processes is what it was."""
    x = torch.ones(2)
    qwen.all_reduce(x)
    qwen.barrier()
    assert x.tolist() == [1, 1] and (qwen.RANK, qwen.WORLD) == (0, 1)


def test_shared_process_that_died_is_named_by_the_other(tmp_path):
    """Of two processes one ends between two sums: the other says so in a sentence."""
    code = f"""
import os, sys, torch, qwen
torch.distributed.init_process_group(
    "gloo", init_method="file://{tmp_path}/store", rank=qwen.RANK, world_size=qwen.WORLD)
qwen.all_reduce(torch.ones(2))
if qwen.RANK == 1:
    os._exit(0)
try:
    qwen.all_reduce(torch.ones(2))
except ValueError as error:
    print(error, flush=True)
    os._exit(0)
"""
    processes = []
    for rank in (0, 1):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said[0].startswith("process 0 of 2: another process of this run died (")
    assert "the same command continues from the last step_N" in said[0]
    assert said[0].count("\n") == 1 and said[1] == ""


def test_shared_folder_is_written_whole_or_not_at_all(tmp_path):
    """New, or into one that is there; a failure leaves what was there, and nothing else."""

    def write(folder, text="new"):
        (folder / "a.txt").write_text(text)

    folder = tmp_path / "out"
    qwen.write_whole(folder, write, "a file")
    (folder / "b.txt").write_text("old")
    qwen.write_whole(folder, functools.partial(write, text="newer"), "a file")

    def fail(folder):
        write(folder, "half")
        raise OSError(28, "No space left on device")

    raises("could not write a file to", qwen.write_whole, folder, fail, "a file")
    raises("No space left", qwen.write_whole, tmp_path / "other", fail, "a file")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert {f.name: f.read_text() for f in folder.iterdir()} == {
        "a.txt": "newer",
        "b.txt": "old",
    }


# ---- lora.py -------------------------------------------------------------------------------------

LORA_SHAPES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["layers.1.self_attn.q_proj", "down_proj"], "use_rslora": True},
]


def peer_lora(**how):
    """peft's adapters, random, on peer_qwen."""
    peft = peer("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=8,
        lora_dropout=0.1,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **how,
    )
    return peft.get_peft_model(peer_qwen(), config).eval()


def test_lora_reads_pefts_adapters(tmp_path):
    """An adapter made by peft gives peft's logits here: on all layers or some, rank-stabilised or
    not."""
    ids, _, _ = padded_batch()
    for how in LORA_SHAPES:
        theirs = peer_lora(**how)
        theirs.save_pretrained(tmp_path)
        ours = reload(peer_qwen(), Qwen)
        before = ours(ids)
        lora.load_adapter(ours, tmp_path)
        assert_close(ours(ids), theirs(ids).logits, 1e-5)
        assert relative(before, ours(ids)) > 1e-2


def test_lora_writes_what_peft_reads(tmp_path):
    """An adapter saved here gives the same logits in peft."""
    ids, _, _ = padded_batch()
    for how in LORA_SHAPES:
        peer_lora(**how).save_pretrained(tmp_path / "theirs")
        ours = reload(peer_qwen(), Qwen)
        lora.load_adapter(ours, tmp_path / "theirs")
        lora.save_adapter(ours, tmp_path / "ours", base_model="base")
        theirs = peer("peft").PeftModel.from_pretrained(peer_qwen(), tmp_path / "ours")
        assert_close(theirs.eval()(ids).logits, ours(ids), 1e-5)


def lora_layer(dtype=torch.float32, dropout=0.0):
    """A layer of 5 -> 3 with loud adapters of rank 2, alpha 6 -> (model, layer)."""
    model = loud(nn.Sequential(nn.Linear(5, 3))).to(dtype)
    lora.inject(model, 2, 6, dropout)
    loud(model[0].lora_A)
    loud(model[0].lora_B)
    return model, model[0]


def test_lora_adds_b_a_x_times_alpha_over_rank():
    """y = W x + b + (alpha / rank) B A x, of the adapter in use; of none W x + b."""
    model, layer = lora_layer()
    x = noise(4, 5)
    plain = x @ layer.weight.T + layer.bias
    for adapter in ("policy", "reference"):
        lora.use(model, adapter)
        low = x @ layer.lora_A[adapter].T
        assert_close(model(x), plain + 3 * low @ layer.lora_B[adapter].T)
    lora.use(model, None)
    assert_close(model(x), plain)
    raises("adapter 'sft': allowed are", lora.use, model, "sft")


def test_lora_computes_in_fp32_beside_a_bf16_base():
    """The adapter's part is rounded once, when it is added."""
    model, layer = lora_layer(torch.bfloat16)
    x = noise(4, 5).bfloat16()
    A = layer.lora_A["policy"]
    B = layer.lora_B["policy"]
    assert A.dtype == B.dtype == torch.float32
    added = (3 * (x.float() @ A.T) @ B.T).bfloat16()
    assert same(model(x), nn.functional.linear(x, layer.weight, layer.bias) + added)


def test_lora_dropout_is_on_the_adapters_input_in_training():
    """It drops that share of the inputs and scales up the others; W x never loses any."""
    model, layer = lora_layer(dropout=0.25)
    x = torch.ones(4000, 5)
    assert same(model(x), model(x))
    model.train()
    torch.manual_seed(0)
    added = model(x) - nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.25)
    low = kept @ layer.lora_A["policy"].T
    assert_close(added, 3 * low @ layer.lora_B["policy"].T, 1e-5)
    assert 0.24 < (kept == 0).float().mean() < 0.26


def test_lora_starts_without_effect_as_peft_does():
    """A is uniform within 1 / sqrt(in), B is zero; only the policy learns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 30))
    lora.inject(model, rank=40)
    layer = model[0]
    for adapter, learns in (("policy", True), ("reference", False)):
        A = layer.lora_A[adapter]
        B = layer.lora_B[adapter]
        assert A.shape == (40, 100) and B.shape == (30, 40)
        assert 0.099 < A.abs().max() <= 0.1 and abs(A.std() - 0.1 / 3**0.5) < 0.002
        assert not B.any()
        assert A.requires_grad == B.requires_grad == learns
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert (
        layer.adapter == "policy" and layer.scale == 32 / 40 and layer.dropout == 0.05
    )


def test_lora_is_of_rank_16_unless_told_otherwise():
    model = nn.Sequential(nn.Linear(100, 30))
    assert lora.inject(model) == ["0"]
    assert model[0].lora_A["policy"].shape == (16, 100) and model[0].scale == 2


def test_lora_goes_where_it_is_told():
    """all-linear is all but the head; a target is a name or its last parts."""
    model = tiny_qwen(tied=False)
    names = lora.inject(model)
    assert len(names) == 14 and "lm_head" not in names
    assert names == list(lora.layers(model)) and "model.layers.1.mlp.up_proj" in names
    assert lora.inject(
        tiny_qwen(), targets=["layers.1.self_attn.q_proj", "down_proj"]
    ) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    raises("has adapters already", lora.inject, model)
    raises(
        "no linear layer named k, x_proj",
        lora.inject,
        tiny_qwen(),
        targets=["q_proj", "k", "x_proj"],
    )
    raises("has no adapters", lora.use, tiny_qwen(), "policy")


def test_lora_changes_nothing_at_first():
    model = tiny_qwen()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ids, _, _ = padded_batch()
    logits = model(ids)
    lora.inject(model, rank=2, alpha=4, dropout=0.5)
    assert same(model(ids), logits)
    assert all(same(model.state_dict()[name], p) for name, p in before.items())


def trained_lora(recompute):
    """tiny_qwen in bf16, before and after two steps with adapters -> (the logits before, model,
    calls of its first layer in these steps)."""
    torch.manual_seed(0)
    model = tiny_qwen().bfloat16()
    ids, _, _ = padded_batch()
    before = model(ids)
    lora.inject(model, rank=2, alpha=4, dropout=0.5)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.checkpointing = recompute
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        model.train()(ids).float().square().mean().backward()
        optimizer.step()
    return before, model, len(calls)


def test_lora_training_moves_the_policy_alone():
    """In fp32 over a bf16 base, whose weights do not move; the reference stays the base."""
    before, model, _ = trained_lora(False)
    ids, _, _ = padded_batch()
    base = tiny_qwen().bfloat16().state_dict()
    assert all(same(model.state_dict()[name], p) for name, p in base.items())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28 and all(p.dtype == torch.float32 for p in trained)
    assert not same(model(ids), model(ids)), "no dropout in training"
    for adapter in ("policy", "reference", None):
        lora.use(model.eval(), adapter)
        assert same(model(ids), before) == (adapter != "policy")


def test_lora_training_is_the_same_with_recomputed_layers():
    """Gradient checkpointing draws the same dropout again: after two steps no bit differs."""
    ids, _, _ = padded_batch()
    _, plain, calls = trained_lora(False)
    _, recomputed, more = trained_lora(True)
    assert same(plain.eval()(ids), recomputed.eval()(ids))
    assert (calls, more) == (2, 4)


def test_lora_copies_the_policy_to_the_reference():
    """What SFT taught becomes the reference, and does not move with the policy then."""
    model, layer = lora_layer()
    x = noise(4, 5)
    lora.use(model, "policy")
    want = model(x)
    lora.copy_adapter(model)
    layer.lora_A["policy"].zero_()
    lora.use(model, "reference")
    assert same(model(x), want)
    lora.copy_adapter(model, "reference", "policy")
    lora.use(model, "policy")
    assert same(model(x), want)


def test_lora_merges_in_fp32_and_rounds_once():
    """A merged weight is the exact sum, rounded to its type; biases stay."""
    for dtype, precision in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        for adapter in ("policy", "reference"):
            model, layer = lora_layer(dtype)
            change = 3 * layer.lora_B[adapter].double() @ layer.lora_A[adapter].double()
            exact = layer.weight.double() + change
            lora.merge(model, adapter)
            error = (model[0].weight - exact).abs()
            assert (error <= precision * exact.abs() + 1e-7).all()
            assert model[0].weight.dtype == dtype and not model[0].weight.requires_grad
            assert same(model[0].bias, layer.bias)


def test_lora_merged_model_is_plain_and_gives_the_same_logits():
    """The tensors are a plain model's; a second merge is refused."""
    ids, _, _ = padded_batch()
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 0.12)):
        model = tiny_lora(dtype)
        logits = model(ids)
        lora.merge(model)
        assert_close(model(ids), logits, bound)
        assert set(model.state_dict()) == set(tiny_qwen().state_dict())
        raises("no adapters", lora.merge, model)
    assert not model.model.layers[0].mlp.up_proj.training


def test_lora_file_is_what_peft_expects(tmp_path):
    """Its settings and names; fp32 tensors, of the adapter asked for."""
    model = tiny_lora(torch.bfloat16, rank=3, alpha=7, dropout=0.2, targets=["v_proj"])
    lora.save_adapter(model, tmp_path / "new/folder", "reference", tmp_path / "base")
    config = json.loads((tmp_path / "new/folder/adapter_config.json").read_text())
    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "base"),
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.2,
        "bias": "none",
        "inference_mode": True,
        "target_modules": names,
    }
    stored = load_file(tmp_path / "new/folder/adapter_model.safetensors")
    assert len(stored) == 4
    for name in names:
        layer = model.get_submodule(name)
        assert same(
            stored[f"base_model.model.{name}.lora_A.weight"], layer.lora_A["reference"]
        )
        assert same(
            stored[f"base_model.model.{name}.lora_B.weight"], layer.lora_B["reference"]
        )
    plain, _ = lora_layer()
    lora.save_adapter(plain, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["base_model_name_or_path"] is None


def test_lora_file_restores_model_and_settings(tmp_path):
    """Into a model without adapters, which are made as the file says; or into either adapter of
    one that has them."""
    model = tiny_lora(rank=3, alpha=7, dropout=0.2, targets=["v_proj", "up_proj"])
    ids, _, _ = padded_batch()
    lora.save_adapter(model, tmp_path)
    copy = tiny_qwen()
    lora.load_adapter(copy, tmp_path)
    assert same(copy(ids), model(ids))
    for layer in lora.layers(copy).values():
        assert layer.dropout == 0.2 and layer.scale == 7 / 3 and layer.alpha == 7
    other = tiny_qwen()
    lora.inject(other, 3, 7, targets=["v_proj", "up_proj"])
    lora.load_adapter(other, tmp_path, "reference")
    assert same(other(ids), tiny_qwen()(ids))
    lora.use(other, "reference")
    assert same(other(ids), model(ids))


def test_lora_rank_stabilised_scale_is_alpha_over_the_root(tmp_path):
    model = tiny_lora(rank=4, alpha=3)
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    write_lines(file, {**config, "use_rslora": True})
    stabilised = tiny_qwen()
    lora.load_adapter(stabilised, tmp_path)
    assert {layer.scale for layer in lora.layers(stabilised).values()} == {3 / 2}


def test_lora_refuses_files_that_it_cannot_honour(tmp_path):
    """Other layers, another scale, unknown settings, a nan: each is named."""
    model = tiny_lora(targets=["q_proj", "up_proj"])
    lora.save_adapter(model, tmp_path)
    raises(
        "unexpected base_model.model.model.layers.0.self_attn.q_proj",
        lora.load_adapter,
        tiny_lora(targets=["up_proj"]),
        tmp_path,
    )
    raises(
        "missing base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        lora.load_adapter,
        tiny_lora(),
        tmp_path,
    )
    message = raises(
        "alpha / rank is 2.0",
        lora.load_adapter,
        tiny_lora(alpha=8, targets=["q_proj", "up_proj"]),
        tmp_path,
    )
    assert "the model's adapters have 4.0" in message
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())

    def refused(part, **settings):
        write_lines(file, {**config, **settings})
        raises(part, lora.load_adapter, tiny_qwen(), tmp_path)

    refused(
        "use_dora = True, rank_pattern = {'q_proj': 9}",
        use_dora=True,
        loftq_config={},
        rank_pattern={"q_proj": 9},
    )
    refused("peft_type = 'LOHA'", peft_type="LOHA")
    refused("bias = 'all'", bias="all")
    refused("dropout", lora_dropout=2)
    refused(str(tmp_path), r=0)
    write_lines(file, {**config, "init_lora_weights": "gaussian", "revision": "main"})
    lora.load_adapter(tiny_qwen(), tmp_path)
    lora.layers(model)["model.layers.0.mlp.up_proj"].lora_A["policy"][0, 0] = math.nan
    lora.save_adapter(model, tmp_path)
    raises(
        "up_proj.lora_A.weight is torch.float32, or not finite",
        lora.load_adapter,
        tiny_qwen(),
        tmp_path,
    )


def test_lora_shipped_policy_gives_the_recorded_logits():
    """mini/policy on mini/qwen, loaded and merged; peft gives the same."""
    model = Qwen.load(MINI / "qwen")
    ids = torch.tensor([Tokenizer.load(MINI / "qwen").chat(cdpo.prompt("A red mug"))])
    lora.load_adapter(model, MINI / "policy")
    assert_recorded(model(ids), 4.1765, -0.60581, 1.8, -0.88214)
    before = model(ids)
    lora.merge(model)
    assert_close(model(ids), before, 1e-5)


def test_lora_never_sits_on_the_head(tmp_path):
    """cdpo.py reads the head's weight by itself: told so or found in a file, it is refused; and so
    are adapters of embeddings."""
    raises("lm_head", lora.inject, tiny_qwen(tied=False), targets=["lm_head", "q_proj"])
    lora.save_adapter(tiny_lora(targets=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    for name in ("lm_head.lora_B.weight", "model.embed_tokens.lora_embedding_A"):
        save_file({**stored, f"base_model.model.{name}": torch.zeros(61, 2)}, file)
        raises(name, lora.load_adapter, tiny_qwen(tied=False), tmp_path)


def test_lora_name_that_another_ends_in_means_one_layer(tmp_path):
    """A whole name is that layer, though others end in it; a part of a name is all of them."""
    inner = nn.ModuleDict({"b": nn.Linear(3, 3), "out": nn.Linear(3, 3)})
    parts = {"out": nn.Linear(3, 3), "deep": inner, "deeper": nn.ModuleDict({"deep": inner})}
    for targets, found in [
        (["out"], ["out"]),
        (["deep.out"], ["deep.out"]),
        (["b"], ["deep.b", "deeper.deep.b"]),
        (["out", "b"], ["out", "deep.b", "deeper.deep.b"]),
    ]:
        copy = nn.ModuleDict({name: twin(part) for name, part in parts.items()})
        assert lora.inject(copy, targets=targets) == found
    lora.save_adapter(copy, tmp_path)
    other = nn.ModuleDict({name: twin(part) for name, part in parts.items()})
    lora.load_adapter(other, tmp_path)
    assert list(lora.layers(other)) == ["out", "deep.b", "deeper.deep.b"]


def twin(module):
    """The same layers again, no two of them one object."""
    if isinstance(module, nn.Linear):
        return nn.Linear(3, 3)
    return nn.ModuleDict({name: twin(part) for name, part in module.items()})


def test_lora_takes_settings_without_effect(tmp_path):
    """How A and B were drawn, or where PEFT computes, changes nothing that is stored; PiSSA, OLoRA
    and CorDA change the base."""
    model = tiny_lora()
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    ids, _, _ = padded_batch()
    for settings in [
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "tau": 0.99}},
        {"init_lora_weights": "orthogonal"},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"loftq_config": {}, "corda_config": None, "trainable_token_indices": None},
    ]:
        write_lines(file, {**config, **settings})
        copy = tiny_qwen()
        lora.load_adapter(copy, tmp_path)
        assert same(copy(ids), model(ids))
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq"):
        write_lines(file, {**config, "init_lora_weights": init})
        raises(f"init_lora_weights = '{init}'", lora.load_adapter, tiny_qwen(), tmp_path)


FOREIGN = [
    "lora_unet_single_blocks_3_linear1.lora_up.weight",                # kohya
    "double_blocks.0.processor.qkv_lora1.down.weight",                 # XLabs
    "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",     # ComfyUI, BFL
    "base_model.model.double_blocks.0.img_attn.proj.lora_B.weight",
    "transformer.proj_out.lora_A.default.weight",                      # PEFT, unsaved
    "transformer.proj_out.lora_magnitude_vector",                      # DoRA
    "transformer.proj_out.lora_B.bias",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
]


def test_lora_of_another_tool_is_refused_by_name(tmp_path):
    """With PEFT's settings beside it or without; the sentence says which names are read."""
    model = tiny_flux()
    for beside in (False, True):
        name = "adapter_model" if beside else "foreign"
        file = tmp_path / f"{name}.safetensors"
        write_lines(tmp_path / "adapter_config.json", {"r": 4, "lora_alpha": 4})
        for tensor in FOREIGN:
            save_file({tensor: torch.zeros(4, 4)}, file)
            message = raises(tensor, lora.load_adapter, model, file)
            assert "transformer.LAYER.lora_A.weight" in message and len(message) < 600
        save_file({}, file)
        raises("no tensors", lora.load_adapter, model, file)
        file.write_text(POINTER)
        raises("git-lfs pointer", lora.load_adapter, model, file)
    assert not lora.injected(model)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"base_model.model.proj_out.lora_A.weight": torch.zeros(4, 4)}, file)
    raises("there is no file", lora.load_adapter, model, file)


def test_lora_of_an_embedding_model_is_pefts_both_ways(tmp_path):
    """The model has no head, and PEFT's names no "model."; an adapter of the model with head fits
    as well."""
    peft = peer("peft")
    ids, _, _ = padded_batch()
    for kind in ("Qwen2Model", "MistralModel"):
        settings = peft.LoraConfig(r=3, lora_alpha=8, init_lora_weights=False,
                                   target_modules=["q_proj", "up_proj"])
        theirs = peft.get_peft_model(peer_qwen(kind), settings).eval()
        theirs.save_pretrained(tmp_path / kind)
        ours = reload(peer_qwen(kind), Qwen)
        lora.load_adapter(ours, tmp_path / kind)
        assert_close(ours.model(ids), theirs(ids).last_hidden_state, 1e-5)
        lora.save_adapter(ours, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(peer_qwen(kind), tmp_path / "ours").eval()
        assert_close(again(ids).last_hidden_state, ours.model(ids), 1e-5)
    peer_lora(target_modules=["q_proj"]).save_pretrained(tmp_path / "whole")
    ours = reload(peer_qwen("Qwen2Model"), Qwen)
    lora.load_adapter(ours, tmp_path / "whole")
    assert len(lora.layers(ours)) == 2


def random_flux_lora(model, ranks, prefix="transformer."):
    """{diffusers' name: random tensor} on layers of every kind; `ranks` in turn."""
    layers = ["proj_out", "x_embedder", "transformer_blocks.0.attn.to_q",
              "transformer_blocks.0.norm1.linear", "transformer_blocks.1.ff.net.0.proj",
              "single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_mlp"]
    found = {}
    for i, name in enumerate(layers):
        layer = model.get_submodule(name)
        rank = ranks[i % len(ranks)]
        size = 0.3 / rank ** 0.5
        down = size * noise(rank, layer.in_features, seed=i)
        up = noise(layer.out_features, rank, seed=i + 50)
        found[f"{prefix}{name}.lora_A.weight"] = down
        found[f"{prefix}{name}.lora_B.weight"] = up
    return found


def flux_loras(model):
    """(tensors, their file's header) of each kind of LoRA that diffusers reads without change."""
    plain = random_flux_lora(model, [4])
    scaled = dict(plain)
    uneven = random_flux_lora(model, [4, 2, 7])
    for i, name in enumerate(list(plain)[::2]):
        base = name.removesuffix(".lora_A.weight")
        scaled[f"{base}.alpha"] = torch.tensor(6.0)
        uneven[f"{base}.alpha"] = torch.tensor(1.5 + i % 4)
    names = [name.split(".lora_A")[0].removeprefix("transformer.") for name in plain][::2]
    settings = {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": names}
    header = {f"transformer.{name}": value for name, value in settings.items()}
    return {
        "no alpha": (plain, None),
        "other ranks": (random_flux_lora(model, [4, 2, 7]), None),
        "alphas": (scaled, None),
        "other ranks and alphas": (uneven, None),
        "settings in the header": (plain, {"lora_adapter_metadata": json.dumps(header)}),
        "in half": ({name: tensor.bfloat16() for name, tensor in plain.items()}, None),
    }


def diffusers_velocity(file, x, strength=1.0):
    """What diffusers' pipeline answers with the LoRA in `file`, loaded by load_lora_weights."""
    diffusers = peer("diffusers")
    theirs = loud(diffusers.FluxTransformer2DModel(**flux_config()))
    names = ["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    pipe = diffusers.FluxPipeline(transformer=theirs, **dict.fromkeys(names))
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    (name,) = theirs.peft_config
    pipe.set_adapters([name], [strength])
    (want,) = ask(theirs, x)
    return want


def test_flux_lora_equals_diffusers(tmp_path):
    """To 1e-4, of every kind, and merged at another strength; and it does something."""
    peer("diffusers")
    x = flux_inputs(flux_config())
    base = tiny_flux()(**x)
    for kind, (tensors, header) in flux_loras(tiny_flux()).items():
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(tensors, file, header)
        model = tiny_flux()
        lora.load_adapter(model, tmp_path)
        want = diffusers_velocity(file, x)
        assert relative(want, base) > 1e-2, kind
        assert_close(model(**x), want, 1e-4)
    lora.merge(model, strength=0.3)
    assert_close(model(**x), diffusers_velocity(file, x, 0.3), 1e-4)


def test_flux_lora_keeps_each_layers_rank_and_alpha(tmp_path):
    """y = W x + alpha / rank B A x, layer by layer, without a peer; zeros fill it up."""
    for kind, (tensors, header) in flux_loras(tiny_flux()).items():
        file = tmp_path / "my lora.safetensors"
        save_file(tensors, file, header)
        model = tiny_flux()
        plain = tiny_flux()
        lora.load_adapter(model, file)
        lora.merge(model)
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            base = name.removesuffix(".lora_A.weight")
            A = tensors[name].float()
            B = tensors[f"{base}.lora_B.weight"].float()
            scale = tensors.get(f"{base}.alpha", torch.tensor(float(len(A)))) / len(A)
            if header:
                scale = 10 / 4 ** 0.5
            layer = base.removeprefix("transformer.")
            change = model.get_submodule(layer).weight - plain.get_submodule(layer).weight
            assert_close(change, scale * B @ A, 1e-5)


def test_flux_lora_of_peft_is_read_without_prefix_and_saved_again(tmp_path):
    """What lora.py writes for Flux, and what transformer.save_lora_adapter writes (no prefix)."""
    x = flux_inputs(flux_config())
    save_file(random_flux_lora(tiny_flux(), [3], ""), tmp_path / "bare.safetensors")
    model = tiny_flux()
    lora.load_adapter(model, tmp_path)
    lora.save_adapter(model, tmp_path / "saved")
    for path in ("saved", "saved/adapter_model.safetensors"):
        copy = tiny_flux()
        lora.load_adapter(copy, tmp_path / path)
        assert same(copy(**x), model(**x))


def test_flux_lora_whose_parts_do_not_fit_is_refused(tmp_path):
    """Half a pair, two ranks in one layer, a wrong width, an alpha that is no number."""
    stored = random_flux_lora(tiny_flux(), [4])
    A = "transformer.proj_out.lora_A.weight"
    B = "transformer.proj_out.lora_B.weight"
    file = tmp_path / "lora.safetensors"
    for part, changes in [
        ("lora_B.weight", {B: None}),
        ("lora_A.weight", {A: None}),
        ("proj_out.lora_B.weight has shape", {B: torch.ones(len(stored[B]), 3)}),
        ("proj_out.lora_A.weight has shape", {A: stored[A][:, 1:].contiguous()}),
        ("not finite", {"transformer.proj_out.alpha": torch.tensor(math.nan)}),
        ("two different tensors", {B.replace("transformer", "base_model.model"): stored[B] + 1}),
    ]:
        changed = {**stored, **changes}
        save_file({name: t for name, t in changed.items() if t is not None}, file)
        write_lines(tmp_path / "adapter_config.json", {"r": 4, "lora_alpha": 4})
        assert str(file) in raises(part, lora.load_adapter, tiny_flux(), file)


def test_lora_merges_as_much_of_itself_as_it_is_told():
    """W + strength alpha / rank B A; nothing at 0, the whole at 1."""
    for strength in (0.0, 0.4, 1.0, -2.0):
        model, layer = lora_layer()
        change = 3 * layer.lora_B["policy"] @ layer.lora_A["policy"]
        lora.merge(model, strength=strength)
        assert_close(model[0].weight, layer.weight + strength * change, 1e-6)


# ---- flux.py and controlnet.py: the networks -----------------------------------------------------

def flux_config(
    heads=3,
    head_dim=16,
    axes=(4, 6, 6),
    guided=True,
    doubles=2,
    singles=3,
    txt=12,
    pooled=8,
):
    """config.json of a tiny Flux."""
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "axes_dims_rope": list(axes),
        "guidance_embeds": guided,
        "num_layers": doubles,
        "num_single_layers": singles,
        "joint_attention_dim": txt,
        "pooled_projection_dim": pooled,
        "in_channels": 64,
    }


def control_config(config, modes=10, doubles=2, singles=3):
    """config.json of a ControlNet for the Flux of `config`."""
    return {
        **config,
        "num_mode": modes,
        "num_layers": doubles,
        "num_single_layers": singles,
    }


def vae_config(widths=(8, 8, 8), groups=4, depth=1, **more):
    """config.json of a tiny autoencoder."""
    return {
        "block_out_channels": list(widths),
        "layers_per_block": depth,
        "norm_num_groups": groups,
        "latent_channels": 16,
        "in_channels": 3,
        "out_channels": 3,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        **more,
    }


def t5_config(**more):
    """config.json of a tiny T5."""
    return {
        "vocab_size": 60,
        "d_model": 20,
        "d_kv": 6,
        "d_ff": 30,
        "num_layers": 3,
        "num_heads": 5,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
        **more,
    }


def clip_config(**more):
    """config.json of a tiny CLIP text tower."""
    return {
        "vocab_size": 60,
        "hidden_size": 20,
        "intermediate_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "max_position_embeddings": 12,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
        **more,
    }


def flux_inputs(config, B=2, h=4, w=8, T=5, seed=0):
    """Random arguments of Flux.forward; positions nine apart."""
    g = seeded(seed)
    guidance = torch.rand(B, generator=g) * 35
    return {
        "img": torch.randn(B, h * w // 4, 64, generator=g),
        "txt": torch.randn(B, T, config["joint_attention_dim"], generator=g),
        "pooled": torch.randn(B, config["pooled_projection_dim"], generator=g),
        "timestep": torch.rand(B, generator=g),
        "guidance": guidance if config["guidance_embeds"] else None,
        "img_ids": 9 * flux.image_ids(h, w),
        "txt_ids": torch.zeros(T, 3),
    }


def tiny_flux(**changes):
    return loud(flux.Flux(flux_config(**changes)))


def tiny_net(config, *sizes):
    return loud(controlnet.ControlNet(control_config(config, *sizes)))


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


DEV = flux_config(
    heads=24,
    head_dim=128,
    axes=(16, 56, 56),
    doubles=19,
    singles=38,
    txt=4096,
    pooled=768,
)
DEV_VAE = vae_config((128, 256, 512, 512), 32, 2)
DEV_NETS = [control_config(DEV, 10, 5, 10), control_config(DEV, None, 6, 0)]
QWEN_SIZES = [
    {
        "vocab": 152064,
        "width": 3584,
        "inner": 18944,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "tied": False,
    },
    {
        "vocab": 151936,
        "width": 896,
        "inner": 4864,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "head_dim": 64,
        "tied": True,
    },
]
FULL_T5 = t5_config(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128
)


@functools.cache
def full_size_models():
    """Qwen2.5-7B and 0.5B, FLUX.1-dev, its autoencoder, ControlNet-Union and Union-Pro-2.0, and
    T5-XXL, without memory."""
    models = []
    with qwen.on_meta():
        for sizes in QWEN_SIZES:
            config = Config(
                **sizes,
                eps=1e-6,
                theta=1e6,
                qkv_bias=True,
                headless=False,
                window=None,
                eos=(),
            )
            models.append(Qwen(config))
        models.append(flux.Flux(DEV))
        models.append(flux.VAE(DEV_VAE))
        models += [controlnet.ControlNet(config) for config in DEV_NETS]
        models.append(flux.T5(FULL_T5))
    return models


def test_full_size_models_have_the_published_numbers_of_parameters():
    assert [count_parameters(model) for model in full_size_models()] == [
        7_615_616_512,
        494_032_768,
        11_901_408_320,
        83_819_683,
        3_301_956_608,
        2_140_876_800,
        4_762_310_656,
    ]


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_full_size_qwens_have_the_names_and_shapes_of_transformers():
    transformers = peer("transformers")
    names = {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "inner": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "tied": "tie_word_embeddings",
    }
    for sizes, ours in zip(QWEN_SIZES, full_size_models()):
        config = {theirs: sizes[name] for name, theirs in names.items()}
        with torch.device("meta"):
            theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
        assert shapes(ours) == shapes(theirs)


def test_full_size_flux_has_the_names_and_shapes_of_diffusers():
    """The transformer, the autoencoder and both ControlNets."""
    diffusers = peer("diffusers")
    with torch.device("meta"):
        theirs = [
            diffusers.FluxTransformer2DModel(**DEV),
            diffusers.AutoencoderKL(**DEV_VAE),
        ]
        theirs += [diffusers.FluxControlNetModel(**config) for config in DEV_NETS]
    for ours, model in zip(full_size_models()[2:], theirs):
        assert shapes(ours) == shapes(model)


def ask(model, x, **more):
    """What diffusers' Flux or ControlNet answers to our inputs."""
    names = {
        "img": "hidden_states",
        "txt": "encoder_hidden_states",
        "pooled": "pooled_projections",
    }
    inputs = {names.get(name, name): value for name, value in x.items()}
    return model(**inputs, **more, return_dict=False)


UNGUIDED = flux_config(
    heads=5, head_dim=24, axes=(8, 8, 8), guided=False, doubles=1, singles=4
)

# (Flux, batch, the net's modes, double and single blocks)
FLUX_SHAPES = [
    (flux_config(), 2, (10, 2, 3)),
    (UNGUIDED, 3, (None, 1, 0)),
    (flux_config(1, doubles=5, singles=7), 1, (7, 3, 3)),
    (flux_config(doubles=0, singles=2), 2, (None, 0, 2)),
]


def test_flux_and_controlnet_equal_diffusers():
    """To 1e-4: residuals in each mode or without modes, and velocities under them; odd numbers of
    heads, guidance or none."""
    diffusers = peer("diffusers")
    for config, B, sizes in FLUX_SHAPES:
        theirs = loud(diffusers.FluxTransformer2DModel(**config))
        their_net = loud(
            diffusers.FluxControlNetModel(**control_config(config, *sizes))
        )
        net = reload(their_net, controlnet.ControlNet)
        x = flux_inputs(config, B)
        control = noise(B, 8, 64, seed=5)
        for mode in range(sizes[0] or 1):
            modes = torch.full((B, 1), mode) if sizes[0] else None
            double, single = ask(
                their_net,
                x,
                controlnet_cond=control,
                controlnet_mode=modes,
                conditioning_scale=0.7,
            )
            found = net(control=control, mode=mode, scale=0.7, **x)
            assert_close(
                [*found[0], *found[1]], [*(double or []), *(single or [])], 1e-4
            )
        (want,) = ask(
            theirs,
            x,
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
        )
        residuals = {"double_residuals": found[0], "single_residuals": found[1]}
        assert_close(reload(theirs, flux.Flux)(**x, **residuals), want, 1e-4)


def test_flux_bf16_is_as_near_to_fp32_as_diffusers():
    """At most 1.1 times as far; a tenth at times that bf16 does not hold, where the peer rounds
    1000 t."""
    diffusers = peer("diffusers")
    config = flux_config(4, 32, (8, 12, 12))
    exact_times = {
        "timestep": torch.tensor([1.0, 0.5, 0.25, 0.125]),
        "guidance": torch.full((4,), 4.0),
    }
    for more, bound in ((exact_times, 1.1), ({}, 0.1)):
        x = {**flux_inputs(config, 4), **more}
        theirs = loud(diffusers.FluxTransformer2DModel(**config))
        (want,) = ask(theirs, x)
        rough = dict(x)
        for name in ("img", "txt", "pooled"):
            rough[name] = x[name].bfloat16()
        found = reload(theirs, flux.Flux).bfloat16()(**rough)
        (allowed,) = ask(theirs.bfloat16(), rough)
        assert relative(found, want) <= bound * relative(allowed, want)


def test_flux_gives_the_recorded_velocities():
    """Tiny and loud: guided, unguided, more double blocks, none; diffusers gives the same."""
    found = []
    for config, B, sizes in FLUX_SHAPES:
        model = loud(flux.Flux(config))
        found.append(model(**flux_inputs(config, B)))
    assert_recorded(found[0], 2.6431, 1.4003, 0.084441, -1.4607)
    assert_recorded(found[1], 1.116, -2.6999, 1.3959, 0.99095)
    assert_recorded(found[2], 5.2622, -2.7858, -9.3287, -5.671)
    assert_recorded(found[3], 5.6245, 2.5847, 2.9623, 0.30933)


def test_controlnet_gives_the_recorded_residuals():
    """Union nets in one mode and in one mode a row, and nets without modes. Such nets are loud:
    another kind of CPU is up to 4e-4 away."""
    found = []
    for config, B, sizes in FLUX_SHAPES:
        net = tiny_net(config, *sizes)
        mode = torch.arange(B) if B == 2 and sizes[0] else 5
        double, single = net(
            control=noise(B, 8, 64, seed=5), mode=mode, **flux_inputs(config, B)
        )
        assert (len(double), len(single)) == sizes[1:]
        found.append(torch.stack(double + single))
    assert_recorded(found[0], 10.82, 5.8011, -8.7185, -39.324, bound=1e-3)
    assert_recorded(found[1], 19.125, 16.764, -14.128, 10.427, bound=1e-3)
    assert_recorded(found[2], 3.9195, 2.2729, 5.0505, -1.8707, bound=1e-3)
    assert_recorded(found[3], 4.8794, -10.91, -32.63, -11.059, bound=1e-3)


def test_flux_miniature_gives_the_recorded_velocity():
    """mini/flux and mini/controlnet; diffusers gives the same. Another kind of CPU is 4e-4 away."""
    model = flux.Flux.load(MINI / "flux/transformer")
    net = controlnet.ControlNet.load(MINI / "controlnet")
    x = flux_inputs(
        {
            "joint_attention_dim": 128,
            "pooled_projection_dim": 64,
            "guidance_embeds": True,
        }
    )
    double, single = net(control=noise(2, 8, 64, seed=5), mode=0, scale=0.4, **x)
    residuals = torch.stack(double + single)
    assert_recorded(residuals, 10633, 8180.9, 13214, -401.15, bound=1e-3)
    velocity = model(**x, double_residuals=double, single_residuals=single)
    assert_recorded(velocity, 11.656, 7.0945, -0.50102, -40.288, bound=1e-3)
    assert not model.training and model.proj_out.weight.dtype == torch.float32
    rough = flux.Flux.load(MINI / "flux/transformer", dtype=torch.bfloat16)
    assert rough.proj_out.weight.dtype == torch.bfloat16


def row_of(x, i):
    """The arguments of row i alone; positions belong to all rows."""
    return {
        name: value if name.endswith("_ids") else value[i : i + 1]
        for name, value in x.items()
    }


def test_flux_row_is_what_it_is_alone():
    config = flux_config()
    model = loud(flux.Flux(config))
    x = flux_inputs(config, B=3)
    velocity = model(**x)
    for i in range(3):
        assert_close(model(**row_of(x, i)), velocity[i : i + 1], 1e-5)


def test_flux_rope_depends_on_distances_only():
    """A shift of all positions, text's included, changes nothing; stretched distances do."""
    config = flux_config()
    model = loud(flux.Flux(config))
    x = flux_inputs(config, B=3)
    velocity = model(**x)
    offset = torch.tensor([3.0, 50.0, 17.0])
    moved = {"img_ids": x["img_ids"] + offset, "txt_ids": x["txt_ids"] + offset}
    assert_close(model(**{**x, **moved}), velocity, 1e-4)
    stretched = model(**{**x, "img_ids": 2 * x["img_ids"]})
    assert relative(stretched, velocity) > 1e-3


def test_flux_rope_turns_neighbouring_pairs():
    """Axis k turns its pairs (2i, 2i+1) by position * 10000^(-2i / its width)."""
    table = flux.rope_table(torch.tensor([[2.0, 3.0, 5.0]]), (2, 4, 2))
    angles = torch.tensor([2.0, 3.0, 3.0 * 0.01, 5.0])
    x = noise(1, 1, 2, 8)
    even = x[..., 0::2]
    odd = x[..., 1::2]
    turned = flux.rotate(x, table)
    assert_close(turned[..., 0::2], even * angles.cos() - odd * angles.sin(), 1e-5)
    assert_close(turned[..., 1::2], even * angles.sin() + odd * angles.cos(), 1e-5)
    assert flux.rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_flux_rope_written_out_is_the_complex_product():
    """What torch.compile sees gives what runs without it: to rounding, in fp32 and in bf16."""
    rope = flux.rope_table(40 * noise(9, 3).abs(), (2, 4, 2))
    assert rope.shape == (9, 4, 2) and rope.dtype == torch.float32
    assert_close(rope.norm(dim=-1), torch.ones(9, 4), 1e-6)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        x = noise(2, 9, 3, 8, seed=1).to(dtype)
        turned = flux.rotate(x, rope)
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            written = flux.rotate(x, rope)
        assert written.dtype == dtype and written.shape == turned.shape
        assert_close(written, turned, bound)


def test_flux_attention_is_softmax_in_each_head():
    """attend(q, k, v, heads) by hand, with its scale and with another and an addition."""
    q, k, v = noise(3, 2, 4, 6)
    bias = noise(1, 3, 4, 4, seed=1)
    found = flux.attend(q, k, v, 3)
    other = flux.attend(q, k, v, 3, attn_mask=bias, scale=1.0)
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        score = q[..., part] @ k[..., part].mT
        p = (score / 2**0.5).softmax(-1)
        assert_close(found[..., part], p @ v[..., part])
        p = (score + bias[0, head]).softmax(-1)
        assert_close(other[..., part], p @ v[..., part])


def test_flux_residuals_stand_behind_their_runs_of_blocks():
    """Of n blocks and m residuals block i adds residual i // ceil(n / m), on image tokens."""
    config = flux_config(doubles=5, singles=3)
    model = loud(flux.Flux(config))
    x = flux_inputs(config)
    a, b = noise(2, 2, 8, 48)
    few = model(**x, double_residuals=[a, b], single_residuals=[b, a])
    all_of_them = model(
        **x, double_residuals=[a, a, a, b, b], single_residuals=[b, b, a]
    )
    assert same(few, all_of_them)
    assert relative(few, model(**x)) > 1e-2
    only = model(**x, single_residuals=[a])
    assert same(only, model(**x, single_residuals=[a, a, a]))


def test_flux_needs_guidance_exactly_where_it_has_an_embedding_of_it():
    for guided, part in ((True, "guidance is needed"), (False, "it must be None")):
        model = tiny_flux(guided=guided)
        given = None if guided else torch.ones(2)
        raises(part, model.modulation, torch.ones(2), given, torch.zeros(2, 8))
        assert model.guided == guided


def test_flux_modulation_of_all_levels_is_that_of_each():
    """What a sampler computes once is what forward computes, for a guided checkpoint or not."""
    levels = torch.tensor([1.0, 0.6, 0.25, 0.0])
    txt = noise(2, 3, 12).bfloat16()
    pooled = noise(2, 8)
    for guided in (True, False):
        model = tiny_flux(guided=guided)
        ids = flux.image_ids(4, 6)
        together, rope = model.prepare(txt, pooled, ids, levels, 3.5)
        assert same(rope, model.rope(torch.zeros(3, 3), ids)) and len(together) == 3
        for t, found in zip(levels, together):
            guidance = torch.full((2,), 3.5) if guided else None
            alone = model.modulation(t.expand(2), guidance, pooled)
            assert alone.shape == (2, 2 * 12 + 3 * 3 + 2, 48)
            assert_close(found, alone, 1e-5)


def test_flux_recomputed_blocks_give_the_same_gradient():
    config = flux_config()
    model = loud(flux.Flux(config))
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for model.checkpointing in (False, True):
        x = flux_inputs(config)
        x["img"].requires_grad_()
        found += torch.autograd.grad(model(**x).square().mean(), x["img"])
    assert same(*found) and len(calls) == 3


def test_flux_image_prompt_adds_to_the_image_tokens_attention():
    """The hook gets the image tokens' queries before their rotation, in double and single blocks;
    zeros change nothing."""
    config = flux_config()
    model = loud(flux.Flux(config))
    x = flux_inputs(config)
    plain = model(**x)
    seen = []

    def zeros(q):
        seen.append(q)
        return 0 * q

    for block in model.blocks():
        block.attn.image_prompt = zeros
    assert same(model(**x), plain)
    moved = model(**{**x, "img_ids": x["img_ids"] + 1})
    assert len(seen) == 10 and seen[0].shape == (2, 3, 8, 16)
    assert same(seen[0], seen[5]) and relative(moved, plain) > 1e-4
    model.blocks()[-1].attn.image_prompt = torch.ones_like
    assert relative(model(**x), plain) > 1e-3


def test_flux_refuses_checkpoints_of_another_kind(tmp_path):
    """Another class, axes that do not fit, settings that are not written here: each is named."""

    def refused(part, kind, settings):
        write_lines(tmp_path / "config.json", settings)
        raises(part, kind.load, tmp_path)

    refused("FluxControlNetModel", flux.Flux, {"_class_name": "FluxControlNetModel"})
    odd = flux_config(axes=(4, 4, 4))
    refused("[4, 4, 4]", flux.Flux, {**odd, "_class_name": "FluxTransformer2DModel"})
    relu = t5_config(feed_forward_proj="relu")
    refused("'relu'", flux.T5, {**relu, "model_type": "t5"})
    relu = clip_config(hidden_act="relu")
    refused("'relu'", flux.CLIPText, {**relu, "model_type": "clip_text_model"})
    older = vae_config(_class_name="AutoencoderKL", use_quant_conv=True)
    refused("use_quant_conv is True", flux.VAE, older)
    older.pop("use_quant_conv")
    refused("use_quant_conv is True", flux.VAE, older)
    refused(str(tmp_path), flux.VAE, {"_class_name": "AutoencoderKL"})


def test_controlnet_that_is_new_adds_nothing():
    """Its residuals are zero, and a Flux with them gives what it gives alone."""
    config = flux_config()
    net = controlnet.ControlNet(control_config(config, 4))
    model = loud(flux.Flux(config))
    x = flux_inputs(config)
    double, single = net(control=noise(2, 8, 64, seed=5), **x)
    assert not any(residual.any() for residual in double + single)
    assert same(
        model(**x, double_residuals=double, single_residuals=single), model(**x)
    )
    assert not net.controlnet_x_embedder.weight.any() and net.x_embedder.weight.any()


def test_controlnet_row_is_what_it_is_alone_in_its_mode():
    """Whatever the others' modes are; residuals are proportional to the scale."""
    config = flux_config()
    net = tiny_net(config, 4)
    x = flux_inputs(config, B=3)
    control = noise(3, 8, 64, seed=9)
    modes = torch.tensor([0, 3, 1])
    want = sum(net(control=control, mode=modes, **x), [])
    for i, mode in enumerate(modes.tolist()):
        alone = net(control=control[i : i + 1], mode=mode, scale=2.0, **row_of(x, i))
        assert_close(
            sum(alone, []), [2 * residual[i : i + 1] for residual in want], 1e-5
        )


def test_controlnet_mode_is_a_token_before_the_text():
    """A net without modes gives the same when the mode's embedding stands before the text."""
    config = flux_config(txt=48)
    net = tiny_net(config, 4)
    x = flux_inputs(config)
    control = noise(2, 8, 64, seed=9)
    want = sum(net(control=control, mode=3, **x), [])
    token = net.controlnet_mode_embedder.weight[3].expand(2, 1, 48)
    weight = net.context_embedder.weight.double()
    vector = torch.linalg.solve(
        weight, (token - net.context_embedder.bias).double().mT
    ).mT
    net.controlnet_mode_embedder = None
    txt = torch.cat([vector.float(), x["txt"]], dim=1)
    plain = net(control=control, **{**x, "txt": txt, "txt_ids": torch.zeros(6, 3)})
    assert_close(sum(plain, []), want, 1e-3)


def test_controlnet_refuses_modes_that_it_has_not():
    config = flux_config()
    net = tiny_net(config, 4)
    x = flux_inputs(config)
    control = noise(2, 8, 64, seed=9)
    for mode in (4, -1, torch.tensor([0, 4]), torch.tensor([0, -1])):
        raises("this net has 0 to 3", net, control=control, mode=mode, **x)
    net(control=control, mode=3, **x)


def test_controlnet_mode_is_a_number_or_one_a_row():
    config = flux_config()
    net = tiny_net(config, 4)
    x = flux_inputs(config)
    control = noise(2, 8, 64, seed=9)
    want = sum(net(control=control, mode=torch.tensor([3, 3]), **x), [])
    assert same(sum(net(control=control, mode=3, **x), []), want)


def test_controlnet_of_another_design_or_for_another_flux_is_refused(tmp_path):
    """XLabs' nets are named; so is a net whose width is not the transformer's."""
    file = tmp_path / "x.safetensors"
    save_file({"input_hint_block.0.weight": torch.zeros(1)}, file)
    raises("XLabs", controlnet.ControlNet.load, tmp_path)
    config = control_config(flux_config())
    write_lines(
        tmp_path / "config.json", {**config, "_class_name": "FluxControlNetModel"}
    )
    save_file(controlnet.ControlNet(config).state_dict(), file)
    message = raises("joint_attention_dim is 12", render, controlnet=tmp_path)
    assert str(tmp_path) in message


class RecordedStream:
    """Stands for torch.Stream where there is no GPU: what is said to it, and when it is the current
    one, goes into the list `said`."""

    def __init__(self, said, name):
        self.said = said
        self.name = name

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.said.append("copy")

    def __exit__(self, *error):
        pass


@contextlib.contextmanager
def recorded_streams():
    """-> the list of what two streams, the main one and that of the copies, are told."""
    said = []
    main = RecordedStream(said, "main")
    copies = RecordedStream(said, "copies")
    with (
        mock.patch("torch.Stream", return_value=copies),
        mock.patch("torch.accelerator.current_stream", return_value=main),
    ):
        yield said


def test_controlnet_whose_weights_travel_changes_no_bit():
    """A streamed net gives the same residuals, and its blocks' weights stay at home."""
    config = flux_config()
    net = tiny_net(config, 4)
    x = flux_inputs(config)
    control = noise(2, 8, 64, seed=9)
    want = sum(net(control=control, mode=2, **x), [])
    homes = [p.data_ptr() for p in net.parameters()]
    net.streamed = True
    with recorded_streams() as said:
        found = net(control=control, mode=2, **x)
    assert same(sum(found, []), want) and said.count("main waits for copies") == 5
    assert homes == [p.data_ptr() for p in net.parameters()]


def test_controlnet_next_blocks_weights_come_while_one_computes():
    """The copies of a block wait for what was asked for before the block in front of it runs, and
    that runs only when its own copies have come; at most two blocks' weights exist at once."""
    net = tiny_net(flux_config(), 4)
    blocks = net.blocks()
    alive = []
    counts = []
    with recorded_streams() as said:
        real = torch.empty_like

        def kept(p, **how):
            found = real(p, **how)
            alive.append(weakref.ref(found))
            return found

        with mock.patch("torch.empty_like", side_effect=kept):
            for run in controlnet.prefetch(blocks, "cpu"):
                said.append("run")
                counts.append(sum(ref() is not None for ref in alive))
    events = [event for event in said if event != "copy"]
    asked = "copies waits for main"
    turn = ["main waits for copies", asked, "run"]
    assert events == [asked, *turn * 4, "main waits for copies", "run"]
    sizes = []
    for block in blocks:
        names = [name for name, _ in block.named_parameters()]
        sizes.append(sum(not name.startswith("norm") for name in names))
    pairs = [mine + after for mine, after in zip(sizes, [*sizes[1:], 0])]
    assert counts == pairs


def test_controlnet_offloaded_pair_keeps_the_named_parts_at_home():
    """With offload only Flux's modulation and the net's blocks stay on the CPU, these in pinned
    memory. (There is no other device here: float64 stands for it, what has moved there is double.)
    On the CPU all is at home anyway."""
    paths = (MINI / "flux", MINI / "controlnet")
    pinned = []

    def pin(p):
        pinned.append(p)
        return p

    with mock.patch.object(torch.Tensor, "pin_memory", pin):
        model, net = controlnet.load_pair(*paths, torch.float64, torch.float32, True)
    for name, p in model.named_parameters():
        stays = re.search(r"norm(1|1_context|_out)?\.linear", name)
        assert p.dtype == (torch.float32 if stays else torch.float64), name
    for name, p in net.named_parameters():
        stays = "transformer_blocks." in name
        assert p.dtype == (torch.float32 if stays else torch.float64), name
    assert net.streamed
    assert len(pinned) == sum(len([*block.parameters()]) for block in net.blocks())
    for how in ((torch.bfloat16, False), (torch.float32, True)):
        model, net = controlnet.load_pair(*paths, "cpu", *how)
        assert not net.streamed and net.x_embedder.weight.dtype == how[0]
        assert model.x_embedder.weight.dtype == how[0]
    assert (
        controlnet.load_pair(MINI / "flux", None, "cpu", torch.float32, True)[1] is None
    )


# ---- flux.py: text encoders ----------------------------------------------------------------------

PROMPTS = [
    "A red mug, 12!",
    "",
    "  a\tB  <|endoftext|> c",
    "banana " * 40,
    "Caf\u00e9 na\u00efve",
    "mug",
]


def padded_ids(tokenizer, pad):
    """The prompts' ids, from a tokenizer of transformers."""
    tokenizer.pad_token = pad
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(PROMPTS, **how).input_ids


def test_flux_prompt_vectors_equal_transformers():
    """Of the peers' ids (cut, padded, any letters), to 1e-4."""
    transformers = peer("transformers")
    folder = MINI / "flux"
    states, pooled = flux.encode_prompt(folder, PROMPTS)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = padded_ids(tokenizer, "<|endoftext|>")
    kind = transformers.CLIPTextModel
    model = kind.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    assert_close(pooled, model(ids).pooler_output, 1e-4)
    assert same(flux.TextTokenizer(folder / "tokenizer")(PROMPTS), ids)
    kind = transformers.PreTrainedTokenizerFast
    ids = padded_ids(kind.from_pretrained(folder / "tokenizer_2"), "<pad>")
    kind = transformers.T5EncoderModel
    model = kind.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    assert_close(states, model(ids).last_hidden_state, 1e-4)
    assert same(flux.TextTokenizer(folder / "tokenizer_2")(PROMPTS), ids)


def test_flux_t5_equals_transformers():
    """At distances beyond the last bucket, too."""
    transformers = peer("transformers")
    ids = torch.arange(150)[None] % 60
    theirs = loud(transformers.T5EncoderModel(transformers.T5Config(**t5_config())))
    assert_close(reload(theirs, flux.T5)(ids), theirs(ids).last_hidden_state, 1e-4)


def test_flux_clip_equals_transformers():
    """Either activation; the end is the config's id, or the largest where it says 2."""
    transformers = peer("transformers")
    ids = torch.tensor([[1, 5, 9, 40, 40, 7], [1, 40, 59, 40, 2, 3]])
    for changes in ({}, {"hidden_act": "gelu", "eos_token_id": 40}):
        config = transformers.CLIPTextConfig(**clip_config(**changes))
        theirs = loud(transformers.CLIPTextModel(config))
        want = theirs(ids).pooler_output
        assert_close(reload(theirs, flux.CLIPText)(ids), want, 1e-4)


def test_flux_encoders_give_the_recorded_vectors():
    """Tiny and loud, and mini/flux on six prompts; transformers gives the same."""
    ids = torch.arange(150)[None] % 60
    assert_recorded(loud(flux.T5(t5_config()))(ids), -0.42659, -1.4158, 1.4584, 1.1339)
    ids = torch.tensor([[1, 5, 9, 40, 40, 7], [1, 40, 59, 40, 2, 3]])
    assert_recorded(
        loud(flux.CLIPText(clip_config()))(ids), -0.37302, 0.47079, 1.3639, -0.14411
    )
    gelu = clip_config(hidden_act="gelu", eos_token_id=40)
    assert_recorded(loud(flux.CLIPText(gelu))(ids), -0.28765, 0.72125, 1.5403, -0.53828)
    states, pooled = flux.encode_prompt(MINI / "flux", PROMPTS)
    assert_recorded(states, -0.10748, -0.33571, -0.77349, -0.33837)
    assert_recorded(pooled, 0.079665, -0.1688, -0.083178, 0.018274)


def test_flux_prompt_is_encoded_the_same_alone():
    states, pooled = flux.encode_prompt(MINI / "flux", PROMPTS, batch=4)
    for i in (3, 5):
        alone = flux.encode_prompt(MINI / "flux", PROMPTS[i : i + 1])
        assert_close(alone, [states[i : i + 1], pooled[i : i + 1]])
    rough, _ = flux.encode_prompt(MINI / "flux", PROMPTS[:1], dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16 and not states.requires_grad


def test_flux_clip_token_sees_what_stands_before_and_t5_all():
    """CLIP's pooled state is that of the end, whatever padding follows it."""
    clip = loud(flux.CLIPText(clip_config()))
    ids = torch.tensor(
        [[1, 5, 59, 7, 7], [1, 5, 59, 8, 9], [1, 5, 59, 59, 59], [1, 6, 59, 7, 7]]
    )
    pooled = clip(ids)
    assert_close(pooled[:3], pooled[:1].expand(3, -1), 1e-5)
    assert relative(pooled[3], pooled[0]) > 1e-3
    t5 = loud(flux.T5(t5_config()))
    states = t5(ids[:2])
    assert ((states[0] - states[1]).norm(dim=-1) > 1e-4).all()


def test_flux_t5_has_a_bias_for_each_bucket_of_distances():
    """key - query: up to 7 exact, then logarithmic up to 127; keys behind count from 16 on."""
    t5 = flux.T5(t5_config())
    table = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    table.weight.data.copy_(torch.arange(32)[:, None].expand(32, 5) + 0.0)
    bucket = t5.bias(200, "cpu")[0, 3]
    wanted = {
        0: 0,
        1: 1,
        7: 7,
        8: 8,
        11: 8,
        12: 9,
        16: 10,
        32: 12,
        64: 14,
        90: 14,
        91: 15,
        199: 15,
    }
    for distance, want in wanted.items():
        assert bucket[distance, 0] == want
        assert bucket[0, distance] == want + (16 if distance else 0)
    assert same(bucket[5:, 5:], bucket[:-5, :-5])


def test_flux_clip_files_may_leave_the_prefix_out(tmp_path):
    """transformers 5 writes CLIP's names without text_model., and T5 may hold its embedding
    twice."""
    clip = loud(flux.CLIPText(clip_config()))
    tensors = {
        name.removeprefix("text_model."): p for name, p in clip.state_dict().items()
    }
    write_lines(tmp_path / "config.json", clip_config(model_type="clip_text_model"))
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.tensor([[1, 5, 9]])
    assert_close(flux.CLIPText.load(tmp_path)(ids), clip(ids))
    t5 = loud(flux.T5(t5_config()))
    tensors = {**t5.state_dict(), "encoder.embed_tokens.weight": t5.shared.weight.clone()}
    write_lines(tmp_path / "config.json", t5_config(model_type="t5"))
    save_file(tensors, tmp_path / "model.safetensors")
    assert_close(flux.T5.load(tmp_path)(ids), t5(ids))
    tensors["encoder.embed_tokens.weight"] = torch.zeros(60, 20)
    save_file(tensors, tmp_path / "model.safetensors")
    raises("shared.weight", flux.T5.load, tmp_path)


def test_flux_clip_has_the_public_names():
    """Those of FLUX.1's text_encoder, so that a projection may stand beside text_model."""
    names = list(flux.CLIPText(clip_config()).state_dict())
    assert all(name.startswith("text_model.") for name in names)
    for name in (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.bias",
        "encoder.layers.0.mlp.fc1.weight",
        "encoder.layers.0.layer_norm2.weight",
        "final_layer_norm.weight",
    ):
        assert f"text_model.{name}" in names
    stored = list(load_file(MINI / "flux/text_encoder/model.safetensors"))
    assert all(name.startswith("text_model.") for name in stored)


def test_flux_tokenizers_cut_and_pad_and_know_any_letter(tmp_path):
    """CLIP's lower case, its two special tokens, T5's; each prompt as long as the config says."""
    clip = flux.TextTokenizer(MINI / "flux/tokenizer")
    t5 = flux.TextTokenizer(MINI / "flux/tokenizer_2")
    assert clip(PROMPTS).shape == (6, 32)
    assert zlib.crc32(clip(PROMPTS).numpy()) == 4044444527
    assert zlib.crc32(t5(PROMPTS).numpy()) == 2738129079
    same_words = clip(["A  RED mug", " a red\n mug "])
    assert same(same_words[0], same_words[1])
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        file = MINI / "flux/tokenizer" / name
        if file.is_file():
            (tmp_path / name).write_bytes(file.read_bytes())
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-1]))
    raises("merges", flux.TextTokenizer, tmp_path)


LONG = (
    "A white vase with tulips on a wooden table, a window behind it, a grey cat asleep on the "
    "bench in the evening light of the lamp near the door"
)


def flux_tokenizers():
    """CLIP's and T5's of the miniature, which read 32 tokens."""
    for part, limit in (("tokenizer", 77), ("tokenizer_2", 512)):
        yield flux.TextTokenizer(MINI / "flux" / part, limit, part)


def said_of(tokenizer, prompt):
    """The ids of one prompt, and what stderr says of it."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        (ids,) = tokenizer([prompt]).tolist()
    return ids, said.getvalue()


def test_flux_prompt_of_two_parts_is_one_where_it_fits():
    """A pair reads "caption. instruction", bit for bit and without a word; alone the caption."""
    pairs = [("A red mug", "Make it gold"), ("A red mug", ""), ("", "")]
    whole = ["A red mug. Make it gold", "A red mug", ""]
    for tokenizer in flux_tokenizers():
        for pair, text in zip(pairs, whole):
            assert said_of(tokenizer, pair) == said_of(tokenizer, text)
            assert said_of(tokenizer, pair)[1] == ""
    joined = flux.encode_prompt(MINI / "flux", whole)
    for vectors, want in zip(flux.encode_prompt(MINI / "flux", pairs), joined):
        assert same(vectors, want)


def test_flux_prompt_that_is_too_long_keeps_the_instruction():
    """Of the caption the end is cut, in any letters; of an instruction that is too long alone, its
    own end. A line says for each what was cut; a string alone is cut at its end, as ever."""
    for tokenizer in flux_tokenizers():
        for caption in (LONG, "caf\u00e9 \u65e5\u672c\u8a9e " * 20, "mug" * 90):
            found = []
            for wish in ("Paint it neon green", "Make it of gold"):
                ids, said = said_of(tokenizer, (caption, wish))
                (short,) = tokenizer([("mug", wish)]).tolist()
                kept = short[: short.index(ids[-1]) + 1]                    # without padding
                assert len(ids) == 32 and ids[-5:] == kept[-5:], (caption, wish)
                assert said.count("\n") == 1 and "reads 32 tokens; cut" in said
                found.append(ids)
            assert found[0][:12] == found[1][:12] and found[0] != found[1]
        _, said = said_of(tokenizer, (LONG, "Paint it gold"))
        assert said.endswith("near the door'\n") and "vase" not in said
        first, said = said_of(tokenizer, ("A mug", "Paint it gold. " + LONG))
        second, _ = said_of(tokenizer, ("A mug", "Make it neon. " + LONG))
        assert first != second and first == said_of(tokenizer, "Paint it gold. " + LONG)[0]
        assert "prompt: 'A mug'\n" in said and said.count("\n") == 2
        ids, said = said_of(tokenizer, LONG)
        assert ids == said_of(tokenizer, LONG + ", and more")[0] and "door'" in said


def test_render_of_two_wishes_after_a_long_caption_differs():
    with quiet():
        one, other = render([(LONG, "Paint it gold"), (LONG, "Paint it blue")], seeds=[0, 0])
    assert (one != other).any()


def test_flux_tokenizer_settings_have_other_written_forms(tmp_path):
    """A pad token as an object, a length that is absent or 1e30: the same ids up to `limit`."""
    for part, limit in (("tokenizer", 32), ("tokenizer_2", 32)):
        folder = tmp_path / part
        shutil.copytree(MINI / "flux" / part, folder)
        want = flux.TextTokenizer(folder)(PROMPTS)
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        pad = {"content": config["pad_token"], "lstrip": False, "special": True}
        for length in ({"model_max_length": 1e30}, {}):
            config.pop("model_max_length", None)
            write_lines(file, {**config, **length, "pad_token": pad})
            assert same(flux.TextTokenizer(folder, limit)(PROMPTS), want)
        config.pop("pad_token")
        write_lines(file, config)
        raises("'pad_token'", flux.TextTokenizer, folder)


# ---- flux.py: autoencoder and pictures -----------------------------------------------------------

VAE_SHAPES = [
    vae_config((16, 24, 40), 8, mid_block_add_attention=False),
    vae_config((8, 16), 8, 2),
    vae_config((8,), 8),
]


def test_flux_autoencoder_equals_diffusers():
    """The posterior's mean, a sample of it, and the picture, to 1e-4."""
    diffusers = peer("diffusers")
    image = noise(2, 3, 16, 24)
    latent = noise(2, 16, 16, 24)
    for config in VAE_SHAPES:
        theirs = loud(diffusers.AutoencoderKL(**config))
        ours = reload(theirs, flux.VAE)
        posterior = theirs.encode(image).latent_dist
        assert_close(ours.encode(image), (posterior.mode() - 0.1159) * 0.3611, 1e-4)
        drawn_latent = (posterior.sample(seeded(1)) - 0.1159) * 0.3611
        assert_close(ours.encode(image, seeded(1)), drawn_latent, 1e-4)
        want = theirs.decode(latent / 0.3611 + 0.1159).sample
        assert_close(ours.decode(latent), want, 1e-4)


def test_flux_autoencoder_gives_the_recorded_numbers():
    """Tiny and loud, with attention and without, and mini/flux; diffusers gives the same."""
    image = noise(1, 3, 16, 24)
    latents = []
    pictures = []
    for config in VAE_SHAPES:
        vae = loud(flux.VAE(config))
        latents.append(vae.encode(image))
        pictures.append(vae.decode(noise(1, 16, 4, 6)))
        assert vae.factor == 2 ** (len(config["block_out_channels"]) - 1)
    assert_recorded(latents[0], 0.089602, 0.011885, -0.021571, 0.15117)
    assert_recorded(latents[1], -0.28397, 0.11644, 0.22781, -0.13566)
    assert_recorded(latents[2], 0.1956, 0.11728, 0.1992, 0.46585)
    assert_recorded(pictures[0], 0.11817, 0.96969, 0.17857, -0.34741)
    assert_recorded(pictures[1], 0.27081, -0.023714, -0.76622, -0.76752)
    assert_recorded(pictures[2], 0.51257, 0.28687, 0.75275, -0.03871)
    vae = flux.VAE.load(MINI / "flux/vae")
    latent = vae.encode(flux.to_tensor(apple())[None])
    assert_recorded(latent, -0.5095, -0.77973, 0.59761, -0.29078)
    assert latent.shape == (1, 16, 16, 16)
    seen = flux.to_picture(vae.decode(latent)[0])
    assert np.abs(seen.astype(float) - apple()).mean() < 6


def test_flux_autoencoder_samples_the_posterior():
    """encode(image, generator) is mean + exp(logvar / 2) * noise, then shifted and scaled; logvar
    lies within -30 .. 20."""
    vae = loud(flux.VAE(vae_config()))
    image = noise(2, 3, 8, 8)
    mean, logvar = vae.encoder(image).chunk(2, dim=1)
    for add in (0, 1e3, -1e3):
        vae.encoder.conv_out.bias[16:] += add
        width = ((logvar + add).clamp(-30, 20) / 2).exp()
        want = mean + width * noise(2, 16, 2, 2, seed=3)
        found = vae.encode(image, seeded(3))
        assert_close(found, (want - 0.1159) * 0.3611, 1e-5)
        vae.encoder.conv_out.bias[16:] -= add
    assert_close(vae.encode(image), (mean - 0.1159) * 0.3611)


def test_flux_pictures_become_tensors_and_come_back():
    """0 .. 255 is -1 .. 1; what lies outside is cut, what lies between is rounded, nan refused."""
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    tensor = flux.to_tensor(picture)
    assert tensor.shape == (3, 4, 4) and tensor[2, 0, 0] == picture[0, 0, 2] / 127.5 - 1
    assert (flux.to_picture(tensor) == picture).all()
    assert same(flux.to_tensor(Image.fromarray(picture)), tensor)
    values = torch.tensor([-3.0, -1.0, 0.001, 1.0, 7.0])
    wanted = [0, 0, 128, 255, 255]
    assert flux.to_picture(values.expand(3, 1, 5))[0, :, 1].tolist() == wanted
    for bad in (math.nan, math.inf):
        raises("the picture is not finite", flux.to_picture, torch.full((3, 2, 2), bad))


def test_flux_square_is_the_middle_of_a_picture(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    square = flux.read_square(tmp_path / "wide.png", 4)
    assert (
        square.shape == (4, 4, 3) and square.dtype == np.uint8 and (square == 200).all()
    )


def test_flux_tokens_are_patches_of_two_by_two():
    """Token by token in reading order, inside it channel, row, column; unpack is the inverse."""
    z = noise(2, 16, 4, 6)
    tokens = flux.pack(z)
    assert tokens.shape == (2, 6, 64) and same(
        tokens[:, 1], z[:, :, :2, 2:4].flatten(1)
    )
    assert same(tokens[:, 3], z[:, :, 2:, :2].flatten(1))
    assert same(flux.unpack(tokens, 4, 6), z)
    want = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert flux.image_ids(4, 6).tolist() == want
    for shape in ((1, 16, 3, 4), (1, 16, 4, 3)):
        raises("cannot be cut into 2 x 2 patches", flux.pack, torch.zeros(shape))


def flux_folder(tmp_path, part, **changes):
    """A copy of mini/flux whose `part`/config.json (or scheduler_config.json) says other things."""
    folder = tmp_path / "flux"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MINI / "flux", folder)
    (file,) = (folder / part).glob("*config.json")
    write_lines(file, {**json.loads(file.read_text()), **changes})
    return folder


def test_flux_scheduler_of_another_kind_is_refused_by_name(tmp_path):
    """Whatever else FlowMatchEulerDiscreteScheduler can do, and another scheduler."""
    for name, value in (
        ("_class_name", "DPMSolverMultistepScheduler"),
        ("num_train_timesteps", 500),
        ("time_shift_type", "linear"),
        ("shift_terminal", 0.02),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_flow_sigmas", True),
    ):
        raises(f"{name} is {value!r}", flux.sigmas, 4, 16, {**flux.SCHEDULE, name: value})
    folder = flux_folder(tmp_path, "scheduler", shift_terminal=0.02)
    raises(f"{folder}/scheduler/scheduler_config.json: shift_terminal", render, flux=folder)


def test_flux_scheduler_settings_left_out_are_the_peers(tmp_path):
    """An empty file: no shift at all; a dynamic one: FLUX.1-dev's slope."""
    assert_close(flux.sigmas(4, 99, {}), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert_close(flux.sigmas(2, 99, {"shift": 3.0}), torch.tensor([1, 0.75, 0]))
    dynamic = {"use_dynamic_shifting": True}
    assert same(flux.sigmas(5, 99, dynamic), flux.sigmas(5, 99))
    dynamic |= {"max_shift": 0.9, "base_image_seq_len": 64}
    diffusers = peer("diffusers")
    pipeline = diffusers.pipelines.flux.pipeline_flux
    for config in ({}, {"shift": 1.7}, dynamic):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        used = theirs.config
        mu = pipeline.calculate_shift(
            99,
            used.base_image_seq_len,
            used.max_image_seq_len,
            used.base_shift,
            used.max_shift,
        )
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=mu)
        assert (flux.sigmas(5, 99, config) - theirs.sigmas).abs().max() < 1e-6


def test_flux_settings_of_every_part_are_followed_or_refused(tmp_path):
    """An activation, a number of channels, a patch that is not written here; the setting that is
    not there."""
    for part, name, value in (
        ("vae", "act_fn", "relu"),
        ("vae", "act_fn", "gelu"),
        ("vae", "in_channels", 4),
        ("vae", "out_channels", 1),
        ("transformer", "patch_size", 2),
        ("transformer", "axes_dims_rope", [7, 13, 12]),
        ("transformer", "axes_dims_rope", [16, 16]),
        ("transformer", "axes_dims_rope", [8, 8, 8, 8]),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder_2", "feed_forward_proj", "gated-silu"),
    ):
        folder = flux_folder(tmp_path, part, **{name: value})
        message = raises(name, render, flux=folder)
        assert f"/{part}/config.json" in message and str(value) in message
    for part, kind, names in (
        ("transformer", flux.Flux, ["in_channels", "num_layers"]),
        ("vae", flux.VAE, ["scaling_factor", "norm_num_groups"]),
        ("text_encoder_2", flux.T5, ["d_ff", "layer_norm_epsilon"]),
    ):
        for name in names:
            folder = flux_folder(tmp_path, part)
            file = folder / part / "config.json"
            config = json.loads(file.read_text())
            config.pop(name)
            write_lines(file, config)
            raises(f"{file} has no '{name}'", kind.load, folder / part)


def test_flux_clip_follows_its_layer_norm_eps():
    """Recorded from transformers; left out it is 1e-5."""
    ids = torch.tensor([[1, 5, 9, 40, 40, 7], [1, 40, 59, 40, 2, 3]])
    usual = loud(flux.CLIPText(clip_config()))
    assert same(loud(flux.CLIPText(clip_config(layer_norm_eps=1e-5)))(ids), usual(ids))
    config = clip_config(layer_norm_eps=0.3)
    found = loud(flux.CLIPText(config))(ids)
    assert_recorded(found, 0.10485, -0.26338, 0.81994, -0.14209)
    transformers = peer("transformers")
    theirs = loud(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    assert_close(reload(theirs, flux.CLIPText)(ids), theirs(ids).pooler_output, 1e-4)


def test_flux_old_clip_files_hold_their_positions(tmp_path):
    clip = loud(flux.CLIPText(clip_config()))
    write_lines(tmp_path / "config.json", clip_config(model_type="clip_text_model"))
    old = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file({**clip.state_dict(), **old}, tmp_path / "model.safetensors")
    ids = torch.tensor([[1, 5, 9]])
    assert same(flux.CLIPText.load(tmp_path)(ids), clip(ids))


def test_flux_t5_refuses_float16():
    """Its numbers grow beyond 65,504; bfloat16 holds them."""
    t5 = loud(flux.T5(t5_config()))
    ids = torch.tensor([[1, 5, 9]])
    assert t5.bfloat16()(ids).isfinite().all()
    raises("float16", t5.half(), ids)


def test_render_refuses_parts_of_other_widths_before_loading(tmp_path):
    """FLUX.1 Fill and Canny, another T5, CLIP or autoencoder, a net for another FLUX: each setting
    is named, and nothing has been loaded."""
    def refused(part, name, value, message):
        with mock.patch.object(flux.Flux, "load"), mock.patch.object(flux.T5, "load") as load:
            folder = flux_folder(tmp_path, part, **{name: value})
            assert "/transformer/config.json" in raises(message, render, flux=folder)
        assert not load.called

    for channels in (384, 128):
        message = f"in_channels is {channels}; here it must be 64"
        refused("transformer", "in_channels", channels, message)
    refused("text_encoder_2", "d_model", 64, "joint_attention_dim is 128")
    refused("text_encoder", "hidden_size", 32, "pooled_projection_dim is 64")
    refused("vae", "latent_channels", 4, "in_channels is 64; here it must be 16")
    net = tmp_path / "net"
    shutil.copytree(MINI / "controlnet", net)
    config = json.loads((net / "config.json").read_text())
    for name, value in (
        ("in_channels", 128),
        ("joint_attention_dim", 4096),
        ("pooled_projection_dim", 768),
        ("num_attention_heads", 24),
        ("attention_head_dim", 128),
    ):
        write_lines(net / "config.json", {**config, name: value})
        message = raises(f"{name} is {value}", render, controlnet=net)
        assert message.startswith(str(net))


def test_flux_negative_prompt_may_have_another_length():
    """Its velocities are those of its own tokens; at the same length no bit changes."""
    model = tiny_flux()
    x = flux_inputs(flux_config())
    words = (x["txt"][:, :3], x["pooled"].flip(0))
    ids = flux.image_ids(4, 8)
    shared = {"img_ids": ids, "levels": torch.tensor([1.0, 0.0]), "guidance": 2.0}

    def euler(txt, pooled, **how):
        return flux.denoise(model, x["img"], txt, pooled, **shared, **how)

    plain = euler(x["txt"], x["pooled"])
    away = euler(*words)
    found = euler(x["txt"], x["pooled"], negative=words, cfg=3.0)
    assert_close(found, away + 3 * (plain - away), 1e-5)
    equal = euler(x["txt"], x["pooled"], negative=(x["txt"], x["pooled"]), cfg=3.0)
    assert_close(equal, plain, 1e-5)


# ---- flux.py: the sampler ------------------------------------------------------------------------

SCHNELL = {**flux.SCHEDULE, "use_dynamic_shifting": False, "shift": 1.0}


def apple():
    """A shipped picture, uint8 (128, 128, 3)."""
    return flux.read_square(SAMPLE / "scenes/00_apple.png", 128)


def quiet_pipeline(kind, *parts, **more):
    """A pipeline of diffusers, without text encoders."""
    names = ["scheduler", "vae", "transformer"]
    absent = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    pipe = kind(**dict(zip(names, parts)), **dict.fromkeys(absent), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peer_sampler(guided, schedule):
    """What both samplers below need: our inputs, and diffusers' scheduler, autoencoder, transformer
    and arguments. The pipeline samples the posterior: its width is set to nothing."""
    diffusers = peer("diffusers")
    vae = loud(diffusers.AutoencoderKL(**vae_config()))
    vae.encoder.conv_out.weight[16:] = 0
    vae.encoder.conv_out.bias[16:] = -100
    config = flux_config(guided=guided)
    x = flux_inputs(config, h=8, w=16)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**schedule)
    parts = (scheduler, vae, loud(diffusers.FluxTransformer2DModel(**config)))
    common = {
        "prompt_embeds": x["txt"],
        "pooled_prompt_embeds": x["pooled"],
        "height": 32,
        "width": 64,
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "latents": x["img"],
    }
    return config, x, parts, common


def test_flux_sampler_equals_the_diffusers_pipeline():
    """Levels to 2e-6, latents to 1e-4: with an embedding of guidance (dev), without (schnell), and
    with true CFG."""
    for guided, schedule in ((True, flux.SCHEDULE), (False, SCHNELL)):
        config, x, parts, common = peer_sampler(guided, schedule)
        pipe = quiet_pipeline(peer("diffusers").FluxPipeline, *parts)
        levels = flux.sigmas(5, 32, schedule)
        no = flux_inputs(config, seed=1)
        negative = {
            "negative_prompt_embeds": no["txt"],
            "negative_pooled_prompt_embeds": no["pooled"],
            "true_cfg_scale": 2.0,
        }
        cfg = {"negative": (no["txt"], no["pooled"]), "cfg": 2.0}
        for given, how in (({}, {}), (negative, cfg)):
            want = pipe(**common, **given).images
            words = {
                "txt": x["txt"],
                "pooled": x["pooled"],
                "img_ids": flux.image_ids(8, 16),
            }
            model = reload(parts[2], flux.Flux)
            found = flux.denoise(
                model, x["img"], **words, levels=levels, guidance=5.0, **how
            )
            assert_close(found, want, 1e-4)
            assert (levels - parts[0].sigmas).abs().max() < 2e-6


def test_controlnet_sampler_equals_the_diffusers_pipeline():
    """At scale 0.7, in part of 5 steps, in mode 3."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    ids = flux.image_ids(8, 16)
    for guided, schedule in ((True, flux.SCHEDULE), (False, SCHNELL)):
        config, x, parts, common = peer_sampler(guided, schedule)
        their_net = loud(
            peer("diffusers").FluxControlNetModel(**control_config(config))
        )
        kind = peer("diffusers").FluxControlNetPipeline
        pipe = quiet_pipeline(kind, *parts, controlnet=their_net)
        steered = {
            "control_image": Image.fromarray(picture),
            "control_mode": 3,
            "controlnet_conditioning_scale": 0.7,
            "control_guidance_start": 0.2,
            "control_guidance_end": 0.9,
        }
        want = pipe(**common, **steered).images
        latent = reload(parts[1], flux.VAE).encode(flux.to_tensor(picture)[None])
        net = reload(their_net, controlnet.ControlNet)
        levels = flux.sigmas(5, 32, schedule)
        words = {
            "txt": x["txt"],
            "pooled": x["pooled"],
            "img_ids": ids,
            "levels": levels,
        }
        how = {"guidance": 5.0, "mode": 3, "scale": 0.7, "start": 0.2, "end": 0.9}
        control = controlnet.steer(
            net, flux.pack(latent).expand(2, -1, -1), **words, **how
        )
        model = reload(parts[2], flux.Flux)
        found = flux.denoise(model, x["img"], **words, guidance=5.0, control=control)
        assert_close(found, want, 1e-4)


def test_flux_levels_are_the_published():
    """FLUX.1-dev's at three sizes; schnell's are evenly spaced, or shifted by a constant."""
    large = torch.tensor([1, 0.904531, 0.759511, 0.512844, 0])
    middle = torch.tensor([1, 0.849235, 0.652489, 0.384945, 0])
    small = torch.tensor([1, 0.831824, 0.622459, 0.354661, 0])
    for tokens, want in ((4096, large), (1024, middle), (256, small)):
        assert (flux.sigmas(4, tokens) - want).abs().max() < 1e-6
    sixty = flux.sigmas(60, 4096)
    assert_close(sixty[:3], torch.tensor([1, 0.994662, 0.989199]))
    assert_close(sixty[-4:], torch.tensor([0.142529, 0.098208, 0.050809, 0]), 1e-5)
    assert sixty.shape == (61,) and sixty.dtype == torch.float32
    assert_close(flux.sigmas(4, 99, SCHNELL), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    shifted = flux.sigmas(2, 99, {**SCHNELL, "shift": 3.0})
    assert_close(shifted, torch.tensor([1, 3 / 4, 0]))
    assert_close(flux.sigmas(1, 99), torch.tensor([1.0, 0]))
    raises("steps is 0", flux.sigmas, 0, 256)


class Exact:
    """A stand-in for Flux whose velocity is exact: x = (1-t) x0 + t eps, so v = (x - x0) / t, and
    the text's mean is added. It keeps the times and guidances of its calls."""

    def __init__(self, x0):
        self.x0 = x0
        self.times = []
        self.residuals = []

    def prepare(self, txt, pooled, img_ids, levels, guidance):
        assert txt.shape[1] == 3 and len(img_ids) == 6
        self.guidance = guidance
        return [t.expand(len(pooled)) for t in levels[:-1]], None

    def velocity(self, x, txt, t, rope, double=(), single=()):
        self.times.append(t[0].item())
        self.residuals.append((double, single))
        return (x - self.x0 + txt.mean()) / t[:, None, None]


def denoise_exactly(model, steps, txt=0.0, **how):
    words = torch.full((2, 3, 4), txt)
    return flux.denoise(
        model,
        noise(2, 6, 64, seed=1),
        words,
        torch.zeros(2, 4),
        img_ids=flux.image_ids(4, 6),
        levels=flux.sigmas(steps, 6),
        **how,
    )


def test_flux_euler_with_the_exact_velocity_recovers_the_picture():
    """In any number of steps; a noised source does so in the last strength * steps, rounded up,
    and strength 0 gives the source."""
    x0 = noise(2, 6, 64)
    source = noise(2, 6, 64, seed=2)
    cases = [
        (1, 1.0, 1),
        (7, 1.0, 7),
        (10, 0.6, 6),
        (10, 0.32, 4),
        (10, 0.0, 0),
        (4, 0.25, 1),
    ]
    for steps, strength, run in cases:
        model = Exact(x0)
        found = denoise_exactly(model, steps, source=source, strength=strength)
        assert_close(found, x0 if run else source, 1e-5)
        assert model.times == flux.sigmas(steps, 6)[steps - run : steps].tolist()
    assert_close(denoise_exactly(Exact(x0), 3), x0, 1e-5)


def test_flux_sampler_starts_at_the_noised_source():
    """(1 - t) source + t noise: with a velocity of zero it is what comes out."""
    model = Exact(0)
    model.velocity = lambda x, *_: torch.zeros_like(x)
    source = noise(2, 6, 64, seed=2)
    start = noise(2, 6, 64, seed=1)
    t = flux.sigmas(10, 6)[4]
    found = denoise_exactly(model, 10, source=source, strength=0.6)
    assert_close(found, (1 - t) * source + t * start)
    assert_close(denoise_exactly(model, 10), start)


def test_flux_cfg_extrapolates_from_the_negative_prompt():
    """v = v_negative + cfg (v - v_negative), in two passes a step; without cfg one."""
    x0 = noise(2, 6, 64)
    negative = (torch.full((2, 3, 4), -1.0), torch.zeros(2, 4))
    model = Exact(x0)
    found = denoise_exactly(model, 1, txt=1.0, negative=negative, cfg=3.0)
    assert_close(found, x0 + 1 - 3 * 2, 1e-5)
    assert model.times == [1, 1]
    model = Exact(x0)
    assert_close(denoise_exactly(model, 1, txt=1.0, negative=negative), x0 - 1, 1e-5)
    assert model.times == [1]


def test_flux_sampler_asks_the_control_once_a_step():
    """With (step, steps, x); what it answers goes into each pass of the step."""
    x0 = noise(2, 6, 64)
    model = Exact(x0)
    asked = []

    def control(step, steps, x):
        asked.append((step, steps, x.shape))
        return [step], [steps]

    negative = (torch.zeros(2, 3, 4), torch.zeros(2, 4))
    how = {
        "source": x0,
        "strength": 0.5,
        "negative": negative,
        "cfg": 2.0,
        "guidance": 7.0,
    }
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    denoise_exactly(model, 4, control=control, progress=progress, **how)
    assert asked == [(i, 2, (2, 6, 64)) for i in range(2)]
    assert model.residuals == [([0], [2]), ([0], [2]), ([1], [2]), ([1], [2])]
    assert seen == [0, 1] and model.guidance == 7


def test_flux_sampler_refuses_what_makes_no_picture():
    model = Exact(noise(2, 6, 64))
    source = noise(2, 6, 64)
    raises("strength is 1.5", denoise_exactly, model, 2, source=source, strength=1.5)
    raises("strength is -0.5", denoise_exactly, model, 2, source=source, strength=-0.5)
    raises("strength is 0.5", denoise_exactly, model, 2, strength=0.5)
    raises("cfg is 3.0", denoise_exactly, model, 2, cfg=3.0)
    raises("not finite", denoise_exactly, Exact(source / 0), 2)


def test_flux_sampler_gives_the_recorded_latents():
    """mini/flux, with true CFG, from a noised source, under mini/controlnet in part of the steps;
    the pipelines of diffusers give the same."""
    model = flux.Flux.load(MINI / "flux/transformer")
    net = controlnet.ControlNet.load(MINI / "controlnet")
    states, pooled = flux.encode_prompt(MINI / "flux", ["A red mug", "blurry"])
    x = {
        "noise": noise(1, 16, 64),
        "txt": states[:1],
        "pooled": pooled[:1],
        "img_ids": flux.image_ids(8, 8),
        "levels": flux.sigmas(5, 16),
    }
    negative = (states[1:], pooled[1:])
    shared = {name: x[name] for name in ("txt", "pooled", "img_ids", "levels")}
    steering = {"guidance": 3.5, "scale": 0.7, "start": 0.2, "end": 0.9}
    control = controlnet.steer(net, noise(1, 16, 64, seed=5), **shared, **steering)
    found = flux.denoise(model, **x)
    assert_recorded(found, 0.11318, 0.52985, 0.4356, -0.53905)
    found = flux.denoise(model, **x, negative=negative, cfg=2.0)
    assert_recorded(found, 0.50891, 0.50004, 0.16103, -0.67022)
    found = flux.denoise(model, **x, control=control)
    assert_recorded(found, -0.012062, 0.72132, 0.92778, 0.49378)
    source = noise(1, 16, 64, seed=3)
    found = flux.denoise(model, **x, control=control, source=source, strength=0.7)
    assert_recorded(found, 0.17838, -0.12525, 0.97335, 0.19741)


# ---- controlnet.py: edges ------------------------------------------------------------------------

def noisy_pictures():
    """Pictures of every shape that is special: colour, grey, flat, slivers of one or two pixels."""
    rng = np.random.default_rng(0)
    pictures = [apple(), rng.integers(100, 110, (99, 64, 3), dtype=np.uint8)]
    for shape in ((200, 331, 3), (128, 128), (1, 1), (1, 9, 3), (7, 1), (2, 2)):
        pictures.append(rng.integers(0, 256, shape, dtype=np.uint8))
    return pictures


THRESHOLDS = [
    (100, 200),
    (50, 200),
    (0, 0),
    (10, 30),
    (200, 100),
    (33.7, 99.9),
    (-5, 20),
    (300, 900),
]


def test_canny_is_bit_for_bit_opencvs():
    """On photographs, noise and slivers no pixel differs at any threshold."""
    cv2 = peer("cv2")
    data = peer("skimage.data")
    photographs = [data.astronaut(), data.coffee(), data.camera(), data.page()]
    for image in photographs + noisy_pictures():
        for low, high in THRESHOLDS:
            found = controlnet.canny(image, low, high)
            same_pixels = found == cv2.Canny(image, low, high)
            assert same_pixels.all(), (image.shape, low, high)


def test_canny_gives_the_recorded_edges():
    """Checksums of the edges at eight thresholds; OpenCV gives the same pixels."""
    found = []
    for image in noisy_pictures():
        code = 0
        for low, high in THRESHOLDS:
            code = zlib.crc32(controlnet.canny(image, low, high), code)
        found.append(code)
        assert (controlnet.canny(image) == controlnet.canny(image, 100, 200)).all()
    assert found == [
        107355803,
        3743709413,
        2100062963,
        671225442,
        1696784233,
        3031436712,
        3378748440,
        2101155825,
    ]


def test_canny_keeps_weak_edges_that_touch_strong_ones():
    """A weak square has edges exactly when a strong one touches it."""
    image = np.pad(np.full((20, 20), 30, np.uint8), 10)
    assert not controlnet.canny(image).any()
    image[10:14, 10:14] = 255
    edges = controlnet.canny(image)
    assert edges[28:32, 12:28].any() and set(np.unique(edges)) == {0, 255}
    assert edges.dtype == np.uint8 and edges.shape == image.shape


def test_canny_edge_lies_before_the_step_and_above_the_threshold():
    """A step between columns 3 and 4 is an edge in column 3, one pixel wide, where 4 times its
    height is more than `high`; in colour the channel with the largest step counts."""
    for height, seen in ((50, False), (51, True)):
        image = np.zeros((8, 8), np.uint8)
        image[:, 4:] = height
        want = np.zeros((8, 8), bool)
        want[:, 3] = seen
        assert ((controlnet.canny(image) > 0) == want).all()
        assert ((controlnet.canny(image.T) > 0) == want.T).all()
        colour = np.dstack([image // 2, image, 0 * image])
        assert ((controlnet.canny(colour, 200, 100) > 0) == want).all()


def test_canny_refuses_what_is_no_picture():
    for wrong in (
        np.zeros((4, 4)),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 4), np.uint8),
    ):
        raises("canny wants uint8 (H,W) or (H,W,3)", controlnet.canny, wrong)


def test_controlnet_draws_canny_and_gray_and_asks_for_the_others():
    """Three equal channels of edges, at the thresholds given, or of grey."""
    image = noisy_pictures()[0]
    edges = controlnet.canny(image, 10, 30)
    drawn = controlnet.control_picture(image, "canny", 10, 30)
    assert (drawn == edges[..., None]).all() and drawn.shape == image.shape
    noisy = noisy_pictures()[2]
    for picture in (image, noisy):
        assert (
            controlnet.control_picture(picture)[..., 2] == controlnet.canny(picture)
        ).all()
    gray = np.array(Image.fromarray(image).convert("L"))
    assert (controlnet.control_picture(image, "gray") == gray[..., None]).all()
    for mode in ("depth", "tile", "sketch"):
        raises(f"the control mode '{mode}'", controlnet.control_picture, image, mode)
    assert controlnet.MODES == ["canny", "tile", "depth", "blur", "pose", "gray", "lq"]


# ---- controlnet.py: steering and rendering -------------------------------------------------------

def test_controlnet_works_in_the_steps_between_start_and_end():
    assert controlnet.active(4, 0.0, 1.0) == [0, 1, 2, 3]
    assert controlnet.active(4, 0.25, 0.75) == [1, 2]
    assert controlnet.active(5, 0.3, 0.9) == [2, 3]
    assert controlnet.active(4, 0.5, 0.6) == []
    assert controlnet.active(0, 0.0, 1.0) == []


def test_controlnet_steering_gives_the_nets_residuals_at_its_time():
    """In its steps those of `forward` at the level's time, guidance, mode and scale; else none;
    when only the last levels run, those count."""
    config = flux_config()
    net = tiny_net(config)
    x = flux_inputs(config)
    control = noise(2, 8, 64, seed=5)
    levels = flux.sigmas(4, 8)
    ids = flux.image_ids(4, 8)
    words = {"txt": x["txt"], "pooled": x["pooled"], "img_ids": ids, "levels": levels}
    how = {"mode": 3, "scale": 0.7}
    steering = controlnet.steer(
        net, control, **words, guidance=5.0, start=0.25, end=0.8, **how
    )

    def residuals(level, guidance, **how):
        times = {
            "timestep": levels[level].expand(2),
            "guidance": torch.full((2,), guidance),
        }
        return sum(net(control=control, **{**x, "img_ids": ids, **times}, **how), [])

    for step, steps, level in ((1, 4, 1), (2, 4, 2), (1, 3, 2)):
        found = steering(step, steps, x["img"])
        assert_close(sum(found, []), residuals(level, 5.0, **how), 1e-5)
    for step in (0, 3):
        assert steering(step, 4, x["img"]) == ((), ())
    usual = controlnet.steer(net, control, **words)
    for step in (0, 3):
        found = usual(step, 4, x["img"])
        assert_close(sum(found, []), residuals(step, 3.5, mode=0, scale=0.4), 1e-5)


def render(prompts=("A red mug",), **how):
    """controlnet.render on the miniature, 128 x 128, two steps, black control pictures."""
    black = np.zeros((128, 128, 3), np.uint8)
    paths = {"flux": MINI / "flux", "controlnet": MINI / "controlnet"}
    given = {
        **paths,
        "seeds": range(len(prompts)),
        "shape": (128, 128),
        "steps": 2,
        "controls": [black] * len(prompts),
    }
    return controlnet.render(prompts=list(prompts), **{**given, **how})


def as_tensor(pictures):
    return torch.from_numpy(np.stack(pictures)).float()


def test_render_gives_the_recorded_pictures():
    """Two prompts at once with true CFG, a mode, part of the steps and a source."""
    two = ("A red mug", "A white bowl")
    plain = render(two, controls=None)
    assert plain[0].shape == (128, 128, 3) and plain[0].dtype == np.uint8
    assert_recorded(as_tensor(plain), 216.21, -45.71, -64.3, -126.05, bound=1e-3)
    edges = [controlnet.control_picture(apple())] * 2
    steered = render(
        two, controls=edges, scale=1.0, guidance=2.0, batch=2, seeds=[5, 3]
    )
    assert_recorded(as_tensor(steered), 203.36, 3.7585, -61.899, -139.22, bound=1e-3)
    edited = render(
        two,
        controls=edges,
        sources=[apple()] * 2,
        strength=0.7,
        steps=3,
        cfg=2.0,
        negative="blurry",
        start=0.5,
        mode="gray",
        scale=0.8,
    )
    assert_recorded(as_tensor(edited), 249.06, -46.834, -74.245, -146.96, bound=1e-3)


def test_render_frees_each_part_before_the_next():
    """When a part is loaded, no module of an earlier part is alive but the autoencoder."""

    def parts():
        found = set()
        for thing in gc.get_objects():
            if issubclass(type(thing), flux.Pretrained):
                found.add(type(thing).__name__)
        return found

    before = parts()
    alive = {}

    def measure(name):
        alive[name] = parts() - before
        return contextlib.nullcontext()

    render(steps=1, measure=measure)
    assert alive.pop("autoencoder, out") <= {"VAE"} and alive.pop(
        "Flux + ControlNet"
    ) <= {"VAE"}
    assert alive == {"text encoders": set(), "autoencoder, in": set()}


def test_render_loads_no_net_that_would_do_nothing():
    """At scale 0, without control pictures, where no step is left: it is not even looked for."""
    nowhere = {"controlnet": MINI / "nowhere", "steps": 1}
    want = render(controls=None, **nowhere)[0]
    for how in ({"scale": 0}, {"start": 0.6}, {"end": 0.9}):
        assert (render(**nowhere, **how)[0] == want).all()
    render(**nowhere, strength=0.0, sources=[apple()])
    raises("nowhere", render, **nowhere)


def test_render_picture_depends_on_its_own_seed_alone():
    """With batch 1 a picture is bit for bit what it is alone, with and without offload."""
    two = render(("A red mug", "A white bowl"), seeds=[4, 7], offload=True)
    alone = render(("A white bowl",), seeds=[7])
    assert (two[1] == alone[0]).all() and (two[0] != two[1]).any()
    assert (render(("A white bowl",), seeds=[8])[0] != alone[0]).any()


def test_render_with_strength_zero_is_the_source_through_the_autoencoder():
    vae = flux.VAE.load(MINI / "flux/vae")
    latent = vae.encode(flux.to_tensor(apple())[None])
    want = flux.to_picture(vae.decode(latent)[0])
    found = render(sources=[apple()], strength=0.0)[0]
    assert np.abs(found.astype(int) - want).max() <= 1


def test_render_equips_the_model_once_and_counts_steps():
    """equip(model, ids) is called before the first step, progress around each batch's."""
    seen = []
    called = []

    def equip(model, ids):
        called.append((type(model).__name__, ids.tolist()))

    def progress(steps):
        seen.append(len(steps))
        return iter(steps)

    render(("A red mug", "A white bowl"), equip=equip, progress=progress)
    assert called == [("Flux", flux.image_ids(16, 16).tolist())] and seen == [2, 2]


# ---- graph.py ------------------------------------------------------------------------------------

def toy_graph(users=12, seed=0):
    """Two tastes over six attributes, three each; features of width 4."""
    tastes = [["t0", "t2", "t4"], ["t1", "t3", "t5"]]
    people = []
    for i in range(users):
        people.append(User(f"u{i}", tastes[i % 2], tastes[1 - i % 2]))
    names = [f"t{i}" for i in range(6)]
    return PreferenceGraph.build(people, names, noise(6, 4, seed=seed))


def test_graph_reader_names_file_and_line(tmp_path):
    """A bad line of users.jsonl is an error that names the file, the line and what was wanted."""
    good = {"user": "ana", "likes": ["red"], "dislikes": []}
    file = tmp_path / "users.jsonl"
    for bad, part in (
        (good, "appears twice"),
        ([1], "a JSON object"),
        ({**good, "likes": [1]}, '"likes" must be a list of strings'),
        ({**good, "likes": "red"}, '"likes" must be a list of strings'),
        ({**good, "user": 3}, '"user" must be a string'),
        ({**good, "user": "x", "dislikes": ["red"]}, "likes and dislikes 'red'"),
        ({**good, "user": "\ud800"}, "not a line of JSON"),
    ):
        write_lines(file, good, {**good, "user": "bo"}, bad)
        assert f"{file}:3:" in raises(part, graph.read_users, file)
    file.write_bytes(b"\n\xff")
    raises(f"{file}:2: not a line of JSON", graph.read_users, file)
    raises("no such file", graph.read_users, tmp_path / "absent")


def test_graph_reader_keeps_what_stands_in_the_file(tmp_path):
    """Users come in file order, blank lines are skipped, a like said twice counts once."""
    file = tmp_path / "users.jsonl"
    first = {"user": "bo", "likes": ["b", "a", "b"], "dislikes": ["c"], "hidden": ["d"]}
    write_lines(file, first, {"user": "ana", "likes": [], "dislikes": []})
    file.write_text("\n" + file.read_text())
    bo, ana = graph.read_users(file)
    assert bo == User("bo", ["b", "a"], ["c"], ["d"]) and ana.name == "ana" and not ana.hidden
    assert graph.read_jsonl(file, user=str)[1]["line"] == 3
    assert graph.attribute_names([bo, ana]) == ["a", "b", "c"]


def test_graph_reader_refuses_a_key_that_is_nearly_one_of_its_own(tmp_path):
    """A misspelt key is named with the one that is meant; other keys, as public files have them,
    are ignored."""
    users = {"user": "ana", "likes": ["red"], "dislikes": []}
    pairs = {"user": "ana", "caption": "a mug", "chosen": "x", "rejected": "y"}
    edits = {"input": "a mug", "edit": "x"}
    file = tmp_path / "rows.jsonl"

    def read_pairs(file):
        return graph.read_jsonl(file, {"guidance": ""}, **{key: str for key in pairs})

    def read_edits(file):
        return graph.read_jsonl(file, {"guidance": ""}, input=str, edit=str)

    for read, good, key, meant in (
        (graph.read_users, users, "Dislikes", "dislikes"),
        (graph.read_users, users, "hiden", "hidden"),
        (graph.read_users, users, "like", "likes"),
        (read_pairs, pairs, "guidence", "guidance"),
        (read_pairs, pairs, "choosen", "chosen"),
        (read_edits, edits, "inputs", "input"),
    ):
        write_lines(file, good, {**good, key: ["blue"]})
        assert f"{file}:2:" in raises(f'"{key}" is no key here; "{meant}" is', read, file)
    write_lines(file, {**users, "user_id": 7, "name": "Ana", "age": 3, "line": "x"})
    assert graph.read_users(file) == [User("ana", ["red"], [], [])]
    harmless = {"edit_type": "color", "chosen_score": 1, "rejected_id": 2, "source": "web"}
    write_lines(file, {**pairs, **harmless})
    assert len(read_pairs(file)) == 1
    write_lines(file, {**edits, "output": "a blue mug", "url": "", "inverse_edit": "z"})
    assert len(read_edits(file)) == 1


def test_graph_words_are_the_same_in_either_case_and_in_the_plural():
    """ "WOOD" is wood and "Polka dot" polka dots; a word that is only alike is offered, not taken;
    exactly the same word goes first."""
    known = ["wood", "polka dots", "butterfly", "beach", "rose", "pine", "leaf", "Chrome"]
    wanted = {
        "WOOD": "wood",
        "Polka Dot": "polka dots",
        "chrome": "Chrome",
        "Butterflies": "butterfly",
        "beaches": "beach",
        "Roses": "rose",
        "pin": None,
        "leaves": None,
        "oak wood": None,
        "": None,
    }
    for name, want in wanted.items():
        assert graph.find_attribute(name, known) == want, name
    assert graph.find_attribute("Stars", ["star", "Stars"]) == "Stars"
    assert graph.near("leaves", known) == ["leaf"]
    assert graph.near("xyz", known) == []
    user = User("x", ["WOOD", "wood", "velvet"], ["beaches"], ["ice"])
    same_user = User("x", ["wood", "velvet"], ["beach"], ["ice"])
    assert graph.in_words_of(user, known) == same_user
    both = User("x", ["Roses"], ["rose"])
    raises("user 'x' likes and dislikes 'rose'", graph.in_words_of, both, known)


def test_graph_gives_its_people_back():
    """`people` undoes `build`; what is said twice counts once; nothing is liked and disliked."""
    people = [
        User("x", ["b", "a", "b"], ["c"]),
        User("y", [], []),
        User("z", ["c"], ["a", "a"]),
    ]
    assert people[0].likes == ["b", "a"]
    assert people[2].dislikes == ["a"]
    built = PreferenceGraph.build(people, ["a", "b", "c"], torch.zeros(3, 2))
    assert built.people() == people
    raises("user 'x' likes and dislikes 'a'", User, "x", ["b", "a"], ["a"])
    one = User("x", ["a", "b"], [])
    other = User("y", ["b", "a"], [])
    assert graph.tastes(one) == graph.tastes(other)


def test_graph_edges_are_users_attributes_and_signs():
    """A like is an edge of sign 1, a dislike of -1; an attribute that nobody knows is named."""
    people = [User("x", ["b"], ["a"]), User("y", ["a"], [])]
    edges = graph.edges_of(people, ["a", "b"])
    assert edges.T.tolist() == [[0, 1, 1], [0, 0, -1], [1, 0, 1]]
    built = PreferenceGraph.build(people, ["a", "b"], torch.zeros(2, 3))
    assert built.signs().to_dense().tolist() == [[-1, 1], [1, 0]]
    raises("unknown attribute 'blue'", graph.edges_of, [User("x", ["blue"], [])], ["gold", "red"])
    alike = "unknown attribute 'stripe'; spelt like it are ['stripes']"     # of however many
    raises(alike, graph.edges_of, [User("x", ["stripe"], [])], ["stripes", *"abcdefghijklm"])


def test_graph_similar_users_follow_equation_6():
    """Scores are counts over the largest count of any two people, best first; each neighbour has
    its score; nobody is their own neighbour; nothing in common is u itself with 0."""
    signs = torch.randint(-1, 2, (150, 20), generator=seeded())
    signs[7] = 0
    own = torch.arange(150)[:, None]
    for kind, x in (("shared", signs.abs()), ("signed", signs), ("likes", signs.clamp_min(0))):
        common = (x @ x.T).fill_diagonal_(0).clamp_min(0)
        for k, given in ((5, signs), (149, signs.to_sparse())):
            index, score = graph.similar_users(given, k, kind)
            want = common.topk(k).values / common.max()                     # (6)
            assert_close(score, want)
            assert_close(common.gather(1, index) / common.max() * (score > 0), want)
            assert (index == own)[score == 0].all() and not (index == own)[score > 0].any()
            assert all(len(set(row.tolist())) == k for row in index[score.min(1).values > 0])
    index, score = graph.similar_users(signs, 200)
    assert index.shape == score.shape == (150, 200) and not score[:, 149:].any()
    assert graph.similar_users(signs, 0)[0].shape == (150, 0)
    assert graph.similar_users(torch.ones(2, 1), 1)[1].tolist() == [[1], [1]]
    assert graph.similar_users(torch.eye(2), 1)[1].tolist() == [[0], [0]]


def test_graph_similar_users_share_ties_out():
    """Where everybody is alike, people at the start of the file are not everybody's neighbours."""
    index, score = graph.similar_users(torch.ones(200, 3), 2)
    assert (score == 1).all() and index.flatten().bincount().max() <= 130


def test_graph_sage_equals_pyg():
    """SAGEConv takes PyG's weights and gives PyG's numbers and gradients."""
    src = noise(9, 6)
    dst = noise(5, 6, seed=1)
    edges = torch.stack([torch.randint(n, (30,), generator=seeded()) for n in (9, 4)])
    ours = graph.SAGEConv(6, 7)
    theirs = peer("torch_geometric.nn").SAGEConv((6, 6), 7)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer, out in ((ours, ours(src, dst, edges)), (theirs, theirs((src, dst), edges))):
        found.append([out, *torch.autograd.grad(out.square().sum(), [*layer.parameters()])])
    assert_close(*found)


def test_graph_sorts_its_edges_once():
    """However often the same edges are read; others, though equal, are sorted anew. In each
    direction and of each sign a layer hears what it hears of those edges alone."""
    built = toy_graph()
    sage = graph.GraphSAGE(4, 5, 3)
    vectors = noise(12, 4)
    graph.bags.cache_clear()
    for edges in (built.edges, built.edges, built.edges.clone()):
        sage(vectors, built.features, edges)
    counted = graph.bags.cache_info()
    assert (counted.misses, counted.hits) == (8, 16)
    user, attribute, sign = built.edges
    alone = graph.SAGEConv(4, 5)
    for wanted in (1, -1, 0):
        layer = graph.SAGEConv(4, 5, wanted)
        layer.load_state_dict(alone.state_dict())
        some = (sign == wanted) | (wanted == 0)
        back = torch.stack([attribute, user])[:, some]
        heard = layer(built.features, vectors, built.edges, end=0)
        assert same(heard, alone(built.features, vectors, back))
        heard = layer(vectors, built.features, built.edges)
        assert same(heard, alone(vectors, built.features, back.flip(0)))


def test_graph_sage_layer_is_mean_and_self():
    """out = W_l mean of the neighbours + b + W_r x; a node without neighbours has a zero mean."""
    layer = graph.SAGEConv(3, 2)
    src = noise(4, 3)
    dst = noise(2, 3, seed=1)
    out = layer(src, dst, torch.tensor([[0, 3, 3], [1, 1, 1]]))
    mean = torch.stack([torch.zeros(3), (src[0] + 2 * src[3]) / 3])
    assert_close(out, mean @ layer.lin_l.weight.T + layer.lin_l.bias + dst @ layer.lin_r.weight.T)
    assert layer.lin_r.bias is None


def test_graph_encoder_tells_likes_from_dislikes_where_it_is_signed():
    """Exchanging likes and dislikes changes a signed encoder's users, not an unsigned one's; a
    user hears of the attributes' other users in the second layer."""
    built = toy_graph()
    swapped = built.edges * torch.tensor([[1], [1], [-1]])
    vectors = noise(12, 4)
    for signed in (True, False):
        torch.manual_seed(0)
        sage = graph.GraphSAGE(4, 5, 3, signed)
        users, attributes, states = sage(vectors, built.features, built.edges)
        other = sage(vectors, built.features, swapped)[0]
        assert users.shape == (12, 3) and attributes.shape == (6, 3)
        assert (relative(users, other) > 1e-3) == signed
        assert same(states[0], built.features) and states[1].shape == (6, 5)
        assert (states[1] >= 0).all() and (users < 0).any()                 # ReLU after the first
        moved = sage(vectors + torch.eye(12)[:, :4], built.features, built.edges)[0]
        assert relative(moved[11], users[11]) > 1e-4                        # 11 did not move itself


def test_graph_new_user_listens_and_is_not_heard():
    """A new user's embedding depends on likes and dislikes alone, not on who else asks; somebody
    stored whose vector is zero, and whom nobody hears, would have the same."""
    built = toy_graph()
    sage = graph.GraphSAGE(4, 5, 3)
    vectors = noise(12, 4)
    states = sage(vectors, built.features, built.edges)[2]
    people = [User("x", ["t0"], ["t1"]), User("y", ["t1"], ["t0"]), User("z", [], [])]
    h = graph.embed_new_user(sage, states, people, built.attributes)
    for i, user in enumerate(people):
        alone = graph.embed_new_user(sage, states, [user], built.attributes)
        assert_close(alone[0], h[i])
    assert relative(h[0], h[1]) > 1e-3 and h.isfinite().all()
    by_hand = torch.relu(sage.to_user[0](built.features, torch.zeros(1, 4),
                                         torch.tensor([[0, 1], [0, 0], [1, -1]])))
    want = sage.to_user[1](states[1], by_hand, torch.tensor([[0, 1], [0, 0], [1, -1]]))
    assert_close(h[:1], want)


def test_graph_without_signs_asks_about_all_training_edges():
    """An unsigned encoder's epoch asks about all training edges, and all carry messages; a signed
    one's about 30 %, which then carry none."""
    for signed in (True, False):
        model = graph.EdgeModel(toy_graph(), 6, 5, signed)
        with mock.patch.object(model, "logits", wraps=model.logits) as given:
            model.loss(model.draw([0], seeded()))
        messages, asked, _ = given.call_args.args
        count = model.split["train"].shape[1]
        assert asked.shape[1] == (int(0.3 * count) if signed else count)
        assert messages.shape[1] == (count - asked.shape[1] if signed else count)


def test_graph_pretraining_learns_from_training_edges_alone():
    """60/20/20 is a partition, held-out edges carry no message, two tastes are learned."""
    built = toy_graph(80)
    model, scores = graph.pretrain(built, 16, 16, epochs=60)
    assert scores["auc"] > 0.95 and 0.9 < scores["accuracy"] <= 1
    parts = list(model.split.values())
    assert sorted(torch.cat(parts, 1).T.tolist()) == sorted(built.edges.T.tolist())
    assert [part.shape[1] for part in parts] == [288, 96, 96]
    fresh = graph.EdgeModel(built)                                  # untrained: not perfect
    scores = fresh.evaluate("test")
    built.edges = fresh.split["train"]
    assert fresh.evaluate("test") == scores
    assert 0.005 < fresh.vectors.std() < 0.015


def test_graph_pretraining_asks_about_30_percent_and_drops_vectors():
    """Of the training edges .3 are asked about, .7 carry messages; `drop` of the vectors rest."""
    built = toy_graph(200)
    model = graph.EdgeModel(built, drop=0.9)
    rows = model.draw([0], seeded())
    ((order, stay),) = rows
    seen = {}

    def watch(messages, asked, vectors):
        seen.update(messages=messages, asked=asked, vectors=vectors)
        return torch.zeros(asked.shape[1])

    with mock.patch.object(model, "logits", watch):
        loss, _ = model.loss(rows)
    assert_close(loss, math.log(2))
    assert seen["asked"].shape[1] == 216 and seen["messages"].shape[1] == 504
    both = torch.cat([seen["asked"], seen["messages"]], 1).T.tolist()
    assert sorted(both) == sorted(model.split["train"].T.tolist())
    assert 0.02 < stay.float().mean() < 0.2
    assert same(seen["vectors"], model.vectors * stay)
    few = graph.EdgeModel(toy_graph(1))                                     # 3 edges to train on
    with mock.patch.object(few, "logits", watch):
        few.loss(few.draw([0], seeded()))
    assert seen["asked"].shape[1] == 1


def test_graph_of_a_few_edges_is_refused_or_weighed():
    """60/20/20 needs five edges. Beside an AUC stands how far a guesser's strays from 0.5; without
    a like and a dislike among the held-out edges there is none."""
    for names in ("a", "ab", "abcd"):
        count = len(names)
        few = PreferenceGraph.build([User("x", names, [])], names, noise(count, 4))
        raises(f"{count} edges", graph.EdgeModel, few)
    model = graph.EdgeModel(toy_graph())
    edges = torch.ones(3, 12, dtype=torch.int64)
    edges[2, 5:] = -1
    model.split["test"] = edges
    found = model.evaluate("test")
    liked = edges[2] > 0
    guesses = [graph.auc(noise(12, seed=i), liked) for i in range(2000)]
    spread = torch.tensor(guesses).std()
    assert found["auc of guesses"] == "0.50 +- 0.18"
    assert abs(spread - 0.18) < 0.02
    assert found["edges"] == 12
    assert 0 <= found["auc"] <= 1
    model.split["test"] = edges[:, :5]
    assert set(model.evaluate("test")) == {"accuracy", "edges"}
    five = PreferenceGraph.build([User("x", "abc", "de")], "abcde", noise(5, 4))
    _, scores = graph.pretrain(five, epochs=2)
    assert scores["edges"] == 1
    assert "auc" not in scores


def test_graph_pretraining_lets_only_user_vectors_decay():
    model = graph.EdgeModel(toy_graph())
    net, vectors = model.parameter_groups()
    assert net["weight_decay"] == 0 and "weight_decay" not in vectors       # --weight-decay
    assert vectors["params"] == [("vectors", model.vectors)]
    assert len(net["params"]) == len(list(model.parameters())) - 1


def test_graph_accuracy_is_the_share_of_edges_told_right():
    """A score above 0 says "like"; 0 says "dislike"."""
    model = graph.EdgeModel(toy_graph())
    model.split["val"] = torch.tensor([[0, 1, 2], [0, 0, 0], [1, -1, -1]])
    for score, want in (([0.5, -1, -1], 1), ([-1.0, 0.5, 0.5], 0), ([0.0, 0, 0], 2 / 3)):
        with mock.patch.object(model, "logits", return_value=torch.tensor(score)):
            assert_close(model.evaluate("val")["accuracy"], want)


def test_graph_defaults_are_those_of_the_stage():
    """`pretrain` and its parts do by default what `train.py graph` does; its one item is the whole
    graph."""
    stage = graph.GraphSettings()
    sizes = stage.hidden, stage.out_dim
    how = True, stage.drop
    schedule = stage.steps, stage.lr
    decay = stage.weight_decay, stage.seed
    assert graph.pretrain.__defaults__ == (*sizes, *schedule, *how, *decay)
    assert graph.EdgeModel.__init__.__defaults__ == (*sizes, *how, stage.seed)
    assert cdpo.UserTokens.__init__.__defaults__ == ("graph", *sizes, True, None)
    assert cdpo.SoftPrompt.__init__.__defaults__ == (8, 0.02, 0)
    assert graph.GraphPretraining.items == 1


def test_graph_pretraining_is_the_same_twice():
    """One seed gives one model: bit for bit on as many threads, closely on another number (a
    matrix product may be shared out in another order)."""
    cells = torch.randperm(900 * 45, generator=seeded())[:9000]
    edges = torch.stack([cells // 45, cells % 45, cells % 2 * 2 - 1])
    large = PreferenceGraph(range(900), range(45), edges, noise(45, 64, seed=2))
    found = []
    for threads in (2, 2, 1, 1):
        torch.set_num_threads(threads)
        found.append([*graph.pretrain(large, epochs=3)[0].parameters()])
    assert same(found[0], found[1]) and same(found[2], found[3])
    for two, one in zip(found[0], found[2]):
        assert_close(two, one, 1e-4)


def test_graph_auc_counts_pairs_and_halves_ties():
    score = torch.tensor([3.0, 2, 1, 1])
    assert graph.auc(score, torch.tensor([True, False, True, False])) == (1 + 1 + 0 + 0.5) / 4
    assert math.isnan(graph.auc(score, torch.ones(4, dtype=torch.bool)))


def test_graph_file_holds_everything_and_is_checked(tmp_path):
    """collaborative.safetensors gives back graph, weights and sizes; edges to nowhere, a missing
    file and other features than names are refused."""
    built = toy_graph()
    file = tmp_path / "collaborative.safetensors"
    raises("python train.py graph", graph.load_graph, file)
    weights = {"vectors": noise(12, 4), "graph.features": built.features}
    graph.save_graph(file, built, weights, {"kind": "graph"})
    read, tensors, config = graph.load_graph(file)
    assert config == {"kind": "graph"} and read.users == built.users
    assert read.attributes == built.attributes and same(read.edges, built.edges)
    assert same(tensors["vectors"], weights["vectors"]) and same(read.features, built.features)
    graph.save_graph(file, built, {**weights, "graph.features": noise(5, 4)}, {})
    raises("6 attributes and has features of 5", graph.load_graph, file)
    built.edges[1, 0] = 6
    graph.save_graph(file, built, weights, {})
    raises(str(file), graph.load_graph, file)


def graph_by_text(names=("wood", "gold", "red", "ocean"), norm=4.0):
    """Two people over attributes that mini/qwen embeds."""
    people = [
        User("u", ["wood"], ["gold"]),
        User("v", ["red"], ["ocean"]),
    ]
    how = {"embedder": str(MINI / "qwen"), "norm": norm}
    features = graph.embed_names(names, **how)
    built = PreferenceGraph.build(people, names, features)
    built.embedder = how
    return built


def test_graph_features_are_centred_embeddings_of_one_length():
    """norm 0 leaves the embeddings as they are; the mean is that of the first `known`."""
    model, tokenizer = qwen.load_language_model(MINI / "qwen")
    names = ["wood", "gold", "red", "velvet"]
    plain = qwen.embed_texts(model, tokenizer, names)
    assert same(graph.embed_names(names, MINI / "qwen", 0), plain)
    for known in (2, None):
        centred = plain - plain[:known].mean(0)
        want = 3 * centred / centred.norm(dim=1, keepdim=True)
        assert_close(graph.embed_names(names, MINI / "qwen", 3.0, known=known), want)


def test_graph_unknown_attribute_is_a_node_by_its_text(tmp_path):
    """A word that nobody has named is an attribute without edges, its feature the text's, centred
    like the others'; who likes it hears of it by hand as of any other, nobody else does."""
    built = graph_by_text()
    file = tmp_path / "collaborative.safetensors"
    tokens = cdpo.UserTokens(built, hidden_dim=6, out_dim=5)
    tokens.save(file)
    read = cdpo.UserTokens.load(file)
    assert read.graph.embedder == built.embedder
    new = User("x", ["velvet", "Woods"], ["pink"])
    old = User("y", ["wood"], [])
    h = read.new([new, old])
    sage = read.sage
    names = [*built.attributes, "pink", "velvet"]
    wide = graph.embed_names(names, MINI / "qwen", 4.0, known=4)
    zero = torch.zeros(1, 64)
    nobody = torch.zeros(3, 0, dtype=torch.int64)
    alone = sage.to_attribute[0](zero, wide[4:], nobody)
    _, _, (_, known) = sage(read.vectors, built.features, built.edges)
    states = torch.cat([known, alone.relu()])
    said = torch.tensor([[0, 5, 4], [0, 0, 0], [1, 1, -1]])
    first = sage.to_user[0](wide, zero, said).relu()
    want = sage.to_user[1](states, first, said)
    assert_close(h[:1], want, 1e-5)
    assert_close(h[1:], tokens.new([old]), 1e-5)
    other = read.new([User("x", ["linen", "wood"], ["pink"])])
    assert relative(other, h[:1]) > 1e-3
    assert len(read.graph.attributes) == 4
    assert len(read.graph.features) == 4


def test_graph_continue_from_refuses_a_tensor_too_many(tmp_path):
    people = [graph.User(f"u{i}", ["a", "b"], ["c"]) for i in range(5)]
    built = graph.PreferenceGraph.build(people, ["a", "b", "c"], noise(3, 4))
    model = graph.EdgeModel(built, 6, 5)
    config = {"kind": "graph", "hidden_dim": 6, "out_dim": 5, "signed": True, "soft": None}
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith("decoder.")}
    file = tmp_path / "collaborative.safetensors"
    with mock.patch.object(graph.PreferenceGraph, "widened"):
        graph.save_graph(file, built, kept, config)
        model.take_over(file)
        graph.save_graph(file, built, {**kept, "extra": noise(2)}, config)
        raises("unexpected extra", model.take_over, file)


def test_graph_unknown_attribute_needs_the_embedder_of_then(tmp_path):
    """A file that does not name it (before this was written), another model, another length or no
    model at all are refused; words that the graph knows need none."""
    new = [User("x", ["velvet"], [])]
    tokens = cdpo.UserTokens(graph_by_text(), hidden_dim=6, out_dim=5)
    other = tiny_qwen(vocab=803, width=64)
    with mock.patch.object(qwen.Qwen, "load", return_value=other):
        raises("does not embed", tokens.new, new)
    with mock.patch.object(qwen.Qwen, "load", return_value=tiny_qwen(vocab=803)):
        raises("does not embed", tokens.new, new)               # of another width
    tokens.graph.embedder["norm"] = 2.0
    raises("does not embed the graph's attributes", tokens.new, new)
    tokens.graph.embedder["embedder"] = str(tmp_path / "gone")
    raises("gone", tokens.new, new)
    tokens.graph.embedder = None
    raises("does not say how to embed velvet", tokens.new, new)
    h = tokens.new([User("x", ["Wood"], [])])
    assert h.shape == (1, 5)


def test_shipped_policy_reads_words_that_its_graph_does_not_know():
    """mini/policy names its embedder, from wherever it is asked."""
    people = [User("x", ["velvet"], []), User("y", [], [])]
    with contextlib.chdir(MINI):
        tokens = cdpo.UserTokens.load(MINI / "policy/collaborative.safetensors")
        h = tokens.new(people)
    assert tokens.graph.embedder == {"embedder": "mini/qwen", "norm": 4.0}
    assert relative(h[0], h[1]) > 1e-2


# ---- cdpo.py: losses, tokens, texts --------------------------------------------------------------

def test_cdpo_logprobs_are_the_plain_ones_for_any_chunk():
    """token_logprobs and its gradient are those of the full softmax; a row without labels is 0;
    a head that learns is refused."""
    hidden = noise(3, 6, 8).requires_grad_()
    head = noise(50, 8, seed=1)
    labels = torch.tensor([[-100, 3, 4, -100, -100, -100], [-100] * 6, [1, 2, 3, 4, 5, 6]])
    weight = torch.tensor([1.0, 2, 3])
    plain = cdpo.token_logprobs_plain(hidden, head, labels)
    by_hand = 0
    for place in (1, 2):
        logp = (hidden[0, place] @ head.T).log_softmax(-1)
        by_hand = by_hand + logp[labels[0, place]]
    assert_close(plain[0], by_hand)
    (want,) = torch.autograd.grad((plain * weight).sum(), hidden)
    for chunk in (1, 4, 1000):
        logp = cdpo.token_logprobs(hidden, head, labels, chunk)
        (grad,) = torch.autograd.grad((logp * weight).sum(), hidden)
        assert logp[1] == 0
        assert_close(logp, plain)
        assert_close(grad, want, 1e-5)
    with torch.no_grad():
        assert_close(cdpo.token_logprobs(hidden, head, labels), plain)
    raises("must be frozen", cdpo.token_logprobs, hidden, head.requires_grad_(), labels)


def test_cdpo_dpo_loss_is_equation_1():
    """By hand: margins of 4 and 0, beta .5; ln 2 where the policy is the reference; rewards carry
    no gradient."""
    policy = torch.tensor([3.0, 1.0]).requires_grad_()
    rejected = torch.tensor([-1.0, 0.5]).requires_grad_()
    losses, good, bad = cdpo.dpo_loss(policy, rejected, torch.tensor([1.0, 1.0]),
                                      torch.tensor([2.0, 0.5]), beta=0.5)
    margins = torch.tensor([(3 + 1) - (1 - 2), (1 - 0.5) - (1 - 0.5)])
    assert_close(losses, torch.log1p(torch.exp(-0.5 * margins)))            # (1)
    assert good.tolist() == [1, 0] and bad.tolist() == [-1.5, 0]
    assert not good.requires_grad and not bad.requires_grad and losses.requires_grad
    four = policy, rejected, good, bad
    assert same(cdpo.dpo_loss(*four), cdpo.dpo_loss(*four, beta=0.1))
    metrics = {name: values.sum() for name, values in cdpo.dpo_metrics(*four).items()}
    assert metrics["rewards/margins"] == 2.5 and metrics["rewards/accuracies"] == 1
    assert metrics["rewards/chosen"] == 1 and metrics["rewards/rejected"] == -1.5
    right = cdpo.dpo_metrics(*2 * [policy], 0.1 * good, 0 * bad)["rewards/accuracies"]
    assert right.tolist() == [1, 0]
    assert metrics["logps/chosen"] == 4 and metrics["logps/rejected"] == -0.5


def test_cdpo_loss_is_equation_7():
    """The neighbours' losses are averaged by similarity; without neighbours the own term stands."""
    own = torch.ones(2)
    neighbour = torch.tensor([[4.0, 1.0], [7.0, 7.0]])
    similarity = torch.tensor([[0.5, 1.0], [0.0, 0.0]])
    got = cdpo.cdpo_loss(own, neighbour, similarity, lam=0.3)
    assert_close(got, torch.tensor([1 + 0.3 * 2.0, 1.0]))                   # (7)
    assert_close(cdpo.cdpo_loss(own, neighbour, 1e-4 * similarity, lam=0.3), got)
    assert_close(cdpo.cdpo_loss(own, torch.zeros(2, 0), torch.zeros(2, 0)), own)
    assert_close(cdpo.cdpo_loss(own, neighbour, similarity), torch.tensor([1.3, 1.0]))


def test_cdpo_soft_prompt_is_a_two_layer_mlp():
    """LayerNorm, two layers, GELU; S tokens, about twice as long as the embeddings that it is
    told of."""
    torch.manual_seed(0)
    soft = cdpo.SoftPrompt(6, 400, 16, tokens=3, std=0.5)
    h = noise(50, 6)
    tokens = soft(h)
    hidden = nn.functional.gelu(soft.fc1(soft.norm(h)))
    assert_close(tokens, soft.fc2(hidden).view(50, 3, 16))
    assert 0.9 < soft.fc2.weight.std() * 400 ** 0.5 < 1.1


def test_cdpo_new_user_gets_the_same_tokens_from_the_file(tmp_path):
    """collaborative.safetensors gives everybody the tokens of the model that wrote it."""
    new = [User("x", ["t0"], ["t1"]), User("y", ["t1"], ["t0"]), User("z", [], [])]
    file = tmp_path / "collaborative.safetensors"
    soft = {"hidden_dim": 7, "out_dim": 4, "tokens": 3, "std": 0.5}
    for signed in (True, False):
        model = cdpo.UserTokens(toy_graph(), hidden_dim=6, out_dim=5, signed=signed, soft=soft)
        model.save(file)
        read = cdpo.UserTokens.load(file)
        h = read.new(new)
        assert_close(read.soft(h), model.soft(model.new(new)))
        assert_close(read.embeddings(), model.embeddings())
        assert read.graph.users == model.graph.users and read.config == model.config
        assert (relative(h[0], h[1]) > 1e-3) == signed
    tensors = load_file(file)
    tensors["soft.fc1.bias"][0] = math.nan
    graph.save_graph(file, model.graph, tensors, model.config)
    raises("soft.fc1.bias", cdpo.UserTokens.load, file)


def test_cdpo_user_whose_vector_rests_is_only_what_the_graph_says():
    """`stay` leaves a user's own vector out, and nobody else's."""
    model = cdpo.UserTokens(toy_graph(), hidden_dim=6, out_dim=5)
    stay = torch.ones(12, 1)
    stay[3] = 0
    without = model.embeddings(stay)
    model.vectors.data[3] = 0
    assert_close(without, model.embeddings())


def test_cdpo_dpo_user_knows_strangers_by_the_mean():
    """The baseline's table gives a new user the mean of all."""
    table = cdpo.UserTokens(toy_graph(), kind="id", out_dim=5)
    assert table.vectors.shape == (12, 5) and 0.7 < table.vectors.std() < 1.3
    people = [User("x", ["t1", "t3"], ["t0"]), User("y", ["t0"], ["t5"])]
    assert_close(table.new(people), table.vectors.mean(0).expand(2, -1))
    assert same(table.embeddings(), table.vectors)


def test_cdpo_prompts_say_request_caption_guidance_and_profile():
    def text(*args, **how):
        (message,) = cdpo.prompt(*args, **how)
        assert message["role"] == "user"
        return message["content"]

    assert text("A mug") == f"{cdpo.REQUEST}\nCaption: A mug"
    assert text("A mug", "make it red") == f"{cdpo.REQUEST}\nCaption: A mug\nGuidance: make it red"
    taste = cdpo.profile(User("x", ["gold", "wood"], ["pink"]))
    assert taste == "likes gold, wood; dislikes pink"
    assert text("A mug", profile=taste) == ("Given this user's profile likes gold, wood; dislikes "
                                            "pink, suggest an edit for the following image: A mug")
    assert cdpo.profile(User("x", [], ["pink"])) == "dislikes pink"


def test_cdpo_profiles_say_what_is_known_and_what_similar_users_like():
    """Nothing, one's own history, or also what the three most similar users like; who says nothing
    has no neighbours; a training user's are those of Eq. 6."""
    ana = User("ana", ["gold", "wood"], ["pink"])
    near = [User(f"near {n}", ["gold", "wood", f"new {n}"], ["pink"]) for n in range(3)]
    far = User("far", ["pink", "snow"], ["gold"])
    people = [ana, User("nobody", [], [])]
    assert cdpo.profiles("none", people) == ["", ""]
    assert cdpo.profiles("own", people) == ["likes gold, wood; dislikes pink", ""]
    told = cdpo.profiles("neighbours", people, [far, *near])
    assert told == ["likes gold, wood; dislikes pink; similar users like new 0, new 1, new 2", ""]
    stage, _, _ = cdpo_stage("--profile neighbours")
    index, score = graph.similar_users(graph.signs_of(stage.users), 3, "signed")
    for pair, owner in zip(stage.pairs, stage.owner):
        similar = [stage.users[i] for i, s in zip(index[owner], score[owner]) if s > 0]
        assert pair["profile"] == cdpo.profile(stage.users[owner], similar)
    asked, _ = cdpo.encode_pair(stage.tokenizer, stage.pairs[0])
    text = stage.tokenizer.decode(asked)
    assert f"this user's profile {stage.pairs[0]['profile']}" in text and "similar users" in text


def test_cdpo_pack_lays_rows_out_as_its_drawing_says():
    """Prompt but for its last token, then that token and each answer; labels are shifted; padding
    is -1 and -100; soft token, prompt and own answer are seen, the other answer is not."""
    rows = [([0, 4, 5], [[6, 7], [0]]), ([8], [[9], [3, 2]])]
    rows = [(cdpo.with_room(asked, torch.ones(2, 1, 4), 0), answers) for asked, answers in rows]
    ids, labels, mask = cdpo.pack(rows)
    assert ids.tolist() == [[-2, 0, 4, 5, 6, 5], [-2, 8, 8, 3, -1, -1]]
    no = -100
    assert labels[0].tolist() == [[no, no, no, 6, 7, no], [no, no, no, no, no, 0]]
    assert labels[1].tolist() == [[no, 9, no, no, no, no], [no, no, 3, 2, no, no]]
    first = mask[0, 0].int()
    assert first[4].tolist() == [1, 1, 1, 1, 1, 0]                          # "6" in answer 1
    assert first[5].tolist() == [1, 1, 1, 0, 0, 1]                          # "5" before answer 2
    assert mask[1, 0, 3].int().tolist() == [1, 0, 1, 1, 0, 0]               # "3" in answer 2
    assert mask.diagonal(dim1=2, dim2=3).all()
    one = [(asked, answers[:1]) for asked, answers in rows]
    ids, labels, mask = cdpo.pack(one)
    assert ids.tolist() == [[-2, 0, 4, 5, 6], [-2, 8, -1, -1, -1]] and mask is None
    assert labels.tolist() == [[[no, no, no, 6, 7]], [[no, 9, no, no, no]]]


def test_cdpo_token_logprobs_of_labels_anywhere():
    """Labels in any place, and rows without any, sum as in the plain version."""
    hidden, head = noise(3, 7, 8), noise(20, 8, seed=1)
    labels = torch.randint(0, 20, (3, 7), generator=seeded())
    labels[0, 2:5] = -100
    labels[2] = -100
    assert_close(cdpo.token_logprobs(hidden, head, labels, 4),
                 cdpo.token_logprobs_plain(hidden, head, labels), 1e-5)


def test_cdpo_packed_answers_equal_separate_ones():
    """Chosen and rejected in one sequence behind one prompt give the log-probabilities and
    gradients of each alone, whatever else is in the batch."""
    model = Qwen.load(MINI / "qwen")
    tokenizer = Tokenizer.load(MINI / "qwen")
    soft = noise(2, 3, model.lm_head.weight.shape[1]).requires_grad_()
    weight = torch.tensor([[1.0, 2], [3, 4]])
    texts = [("A red mug", "Paint the mug neon green", "Add a leaf"),
             ("A white bowl in front of a grey wall", "Make it gold", "Turn the bowl into ice")]
    rows = [cdpo.encode(tokenizer, cdpo.prompt(text), *answers) for text, *answers in texts]
    packed = cdpo.answer_logprobs(model, rows, soft)
    alone = torch.zeros(2, 2)
    for i, (asked, answers) in enumerate(rows):
        for j, answer in enumerate(answers):
            assert answer[-1] in model.config.eos
            embeds = model.model.embed_tokens(torch.tensor(asked + answer))
            logits = model(embeds=torch.cat([soft[i], embeds])[None])[0]
            logp = logits.log_softmax(-1)[-len(answer) - 1:-1]
            alone[i, j] = logp.gather(-1, torch.tensor(answer)[:, None]).sum()
    assert_close(packed, alone)
    grads = [torch.autograd.grad((x * weight).sum(), soft)[0] for x in (packed, alone)]
    assert_close(*grads, 1e-5)


def test_cdpo_suggests_the_same_alone_and_in_a_batch():
    """A row's answer does not depend on longer prompts beside it; one that is cut off says so."""
    model = Qwen.load(MINI / "qwen")
    tokenizer = Tokenizer.load(MINI / "qwen")
    prompts = [cdpo.prompt("A red mug"), cdpo.prompt("A white bowl in front of a grey wall")]
    soft = 0.1 * noise(2, 3, model.lm_head.weight.shape[1])
    both = cdpo.suggest(model, tokenizer, prompts, soft)
    for i in range(2):
        assert cdpo.suggest(model, tokenizer, prompts[i:i + 1], soft[i:i + 1]) == both[i:i + 1]
    plain = cdpo.suggest(model, tokenizer, prompts)
    assert plain != both and all(ended for _, ended in plain)
    assert "mug" in plain[0][0] and "bowl" in plain[1][0]
    ((text, ended),) = cdpo.suggest(model, tokenizer, prompts[:1], max_new_tokens=2)
    assert not ended and len(text.split()) <= 2
    prompts.append(cdpo.prompt(tokenizer.decode([0])))                      # 0 is a token, too
    soft = noise(3, 3, soft.shape[2])
    with mock.patch.object(cdpo, "generate", return_value=[]) as given:
        cdpo.suggest(model, tokenizer, prompts, soft)
    seen = given.call_args.kwargs
    assert same(seen["embeds"][:, :3], soft) and seen["max_new_tokens"] == 48
    assert seen["attention_mask"].shape == seen["embeds"].shape[:2]
    for row, asked in zip(seen["attention_mask"].tolist(), prompts):
        length = 3 + len(tokenizer.chat(asked))
        assert row == [place < length for place in range(len(row))]


def test_cdpo_answers_are_closed_once():
    """An answer that the file closes already, in the template's ways, gets no second end."""
    tokenizer = Tokenizer.load(MINI / "qwen")
    asked = cdpo.prompt("A red mug")
    closers = (
        "",
        "<|im_end|>",
        "<|im_end|>\n",
        " <|im_end|> ",
        "<|im_end|><|im_end|>",
        "<|endoftext|>",
        "<|im_end|>\n<|endoftext|>\n",
    )
    texts = ["Paint the mug red" + closer for closer in closers]
    _, answers = cdpo.encode(tokenizer, asked, *texts)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][-1] == 802
    assert answers[0].count(802) == 1
    _, (spaced, empty) = cdpo.encode(tokenizer, asked, "Paint it \n", "")
    assert spaced == tokenizer.encode("Paint it \n<|im_end|>")
    assert empty == [802]


def test_cdpo_suggestions_end_where_answers_are_trained_to_end():
    """Whatever config.json says of the end (nothing, or another token), <|im_end|> is one."""
    model, tokenizer = qwen.load_language_model(MINI / "qwen")
    asked = [cdpo.prompt("A white bowl in front of a grey wall")]
    want = cdpo.suggest(model, tokenizer, asked)
    assert want[0][1]
    for eos in ((), (800,)):
        model.config.eos = eos
        assert cdpo.suggest(model, tokenizer, asked) == want


# ---- cdpo.py: what is trained --------------------------------------------------------------------

def train_here(command):
    """`train.py command` in this process, quietly, until it ends or is stopped; one that is alone
    does not leave without a word."""
    left = AssertionError("left by os._exit")
    with quiet(), contextlib.suppress(SystemExit), mock.patch("os._exit", side_effect=left):
        train.main(shlex.split(command))


@functools.cache
def prepared():
    """(command of a tiny cdpo run, a folder): a graph and an SFT run on the shipped sample, made
    once for the tests below."""
    prepared.folder = tempfile.TemporaryDirectory()
    d = Path(prepared.folder.name)
    users = f"--users {SAMPLE}/users.jsonl"
    train_here(f"graph --steps 5 {users} --out {d}/graph")
    train_here(f"sft --steps 2 --batch 4 --edits {SAMPLE}/edits.jsonl --out {d}/sft")
    inputs = f"{users} --pairs {SAMPLE}/pairs.jsonl --sft {d}/sft --graph {d}/graph"
    return f"cdpo {inputs} --batch 8 --micro 4 --save-every 1", d


def build_stage(command):
    """(stage, its settings, LoopSettings) of a command of train.py."""
    name, settings, loop = train.parse(shlex.split(command))
    with quiet():
        return train.STAGES[name][1](settings), settings, loop


def cdpo_stage(flags=""):
    """The prepared run's, with other flags."""
    command, d = prepared()
    return build_stage(f"{command} --out {d}/run {flags}")


def draw_batch(stage, settings, step=0):
    indices = train.batch_indices(stage.items, settings.batch, settings.seed, step)
    return stage.draw(indices, qwen.generator_for(settings.seed, "step", step))


def metrics_of(out):
    return read_lines(out / "metrics.jsonl")


def test_cdpo_lambda_zero_is_dpo_of_the_users_own_pairs():
    """With lambda 0 the loss is Eq. 1 of the batch's pairs, under their own users, against a
    reference that sees no user."""
    stage, settings, _ = cdpo_stage("--lam 0 --nll 0")
    rows = draw_batch(stage, settings)
    own = [row.pairs for row in rows]
    assert len(rows) == 8 and all(len(pairs) == 1 for pairs in own)
    texts = [cdpo.encode_pair(stage.tokenizer, stage.pairs[pair]) for (pair,) in own]
    readers = [stage.owner[pair] for (pair,) in own]
    lora.use(stage.model, "reference")
    ref = cdpo.answer_logprobs(stage.model, texts)
    lora.use(stage.model, "policy")
    soft = stage.tokens.soft(stage.tokens.embeddings(rows[0].stay)[readers])
    logp = cdpo.answer_logprobs(stage.model, texts, soft)
    margin = (logp[:, 0] - logp[:, 1]) - (ref[:, 0] - ref[:, 1])
    loss, metrics = stage.loss(rows)
    assert_close(loss, torch.log1p(torch.exp(-settings.beta * margin)).sum())
    assert_close(metrics["logps/chosen"], logp[:, 0].sum())
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert_close(metrics["rewards/chosen"], settings.beta * (logp - ref)[:, 0].sum(), 1e-5)
    assert 0 <= metrics["rewards/accuracies"] <= 8


def test_cdpo_starts_at_ln_2_without_a_user():
    """DPO-Vanilla begins as its reference: the loss is ln 2 a row, the margin 0."""
    stage, settings, _ = cdpo_stage("--user none --nll 0")
    loss, metrics = stage.loss(draw_batch(stage, settings))
    assert_close(loss / 8, math.log(2))
    assert metrics["rewards/margins"] == 0 and stage.tokens is None


def test_cdpo_neighbours_are_read_with_the_tokens_that_the_flag_says():
    """The whole of Eq. 7 by hand, for both readings of a neighbour's pair: with the target user's
    soft tokens, or with the neighbour's own; nll is part of each pair's loss inside the sum."""
    for reading in ("target", "neighbour"):
        flags = f"--neighbours exact --neighbour-user {reading} --lam 0.7 --nll 0.3 --drop 0"
        stage, settings, _ = cdpo_stage(flags)
        rows = draw_batch(stage, settings)[:3]
        numbers = [str(row.pairs[0] + 1) for row in rows]                   # the users' own
        assert stage.describe(rows).endswith(f"pairs.jsonl, lines {', '.join(numbers)}")
        want = 0
        for row in rows:
            own, *near = row.pairs
            user = stage.owner[own]
            want += pair_loss(stage, own, user)
            for pair, s in zip(near, row.similarity):
                reader = user if reading == "target" else stage.owner[pair]
                share = s / sum(row.similarity)
                want += 0.7 * share * pair_loss(stage, pair, reader)        # (7)
        assert any(len(row.similarity) for row in rows)
        assert_close(stage.loss(rows)[0], want, 1e-5)


@torch.no_grad()
def pair_loss(stage, pair, reader):
    """L_DPO of one pair, and nll times the chosen answer's mean token loss."""
    text = cdpo.encode_pair(stage.tokenizer, stage.pairs[pair])
    lora.use(stage.model, "reference")
    ref = cdpo.answer_logprobs(stage.model, [text])[0]
    lora.use(stage.model, "policy")
    soft = stage.tokens.soft(stage.tokens.embeddings()[reader:reader + 1])
    logp = cdpo.answer_logprobs(stage.model, [text], soft)[0]
    margin = (logp[0] - logp[1]) - (ref[0] - ref[1])
    loss = torch.log1p(torch.exp(-stage.settings.beta * margin))
    return loss - stage.settings.nll * logp[0] / len(text[1][0])


def test_cdpo_neighbours_are_defined_at_the_edges(tmp_path):
    """k beyond the number of users, a user without pairs, one sampled neighbour, every similarity:
    finite; nobody without pairs is read, nobody is their own neighbour, each pair is its user's."""
    users = read_lines(SAMPLE / "users.jsonl")
    file = tmp_path / "pairs.jsonl"
    silent = users[1]["user"]
    pairs = read_lines(SAMPLE / "pairs.jsonl")
    write_lines(file, *(pair for pair in pairs if pair["user"] != silent))
    for most, how in ((10, "exact --k 50"), (3, "exact --similarity shared"),
                      (3, "exact --similarity signed"), (1, "sampled")):
        stage, settings, _ = cdpo_stage(f"--pairs {file} --neighbours {how}")
        rows = draw_batch(stage, settings)
        assert stage.loss(rows)[0].isfinite()
        assert most / 2 < max(len(row.similarity) for row in rows) <= most
        for row in rows:
            own, *near = [stage.owner[pair] for pair in row.pairs]
            assert len(near) == len(row.similarity) and all(s > 0 for s in row.similarity)
            assert 1 not in near and own not in near and row.readers == [own] * len(row.pairs)
    write_lines(file)
    raises("pairs.jsonl holds nothing", cdpo_stage, f"--pairs {file}")
    raises("pairs.jsonl holds nothing", train_here, f"sft --edits {file}")
    raises("pairs.jsonl holds nothing", train_here, f"graph --users {file}")
    write_lines(file, {**pairs[0], "user": "nobody"})
    raises("pairs.jsonl:1: user 'nobody' is not in", cdpo_stage, f"--pairs {file}")


def test_cdpo_refuses_pairs_that_prefer_nothing(tmp_path):
    """Chosen equal to rejected, also but for its end, is named by its lines; so is an answer that
    holds another turn of a chat."""
    good = read_lines(SAMPLE / "pairs.jsonl")[:12]
    file = tmp_path / "pairs.jsonl"
    chosen = good[0]["chosen"]
    turn = f"{chosen}<|im_end|>\n<|im_start|>user\nAnd now?"
    start = f"<|im_start|>assistant\n{chosen}<|im_end|>"
    for rejected in (chosen, f"{chosen}<|im_end|>\n", turn, start):
        bad = {**good[0], "rejected": rejected}
        write_lines(file, good[1], bad, good[2], bad)
        raises(f"{file}, lines 2, 4 (2 in all)", cdpo_stage, f"--pairs {file}")
    write_lines(file, *12 * [bad])
    raises("lines 1, 2, 3, 4, 5, 6, 7, 8, 9 (12 in all)", cdpo_stage, f"--pairs {file}")
    write_lines(file, *good)
    assert cdpo_stage(f"--pairs {file}")[0].items == 12
    edit = {"input": "A mug", "edit": "Paint it"}
    write_lines(file, edit, {**edit, "edit": turn})
    raises("lines 2 (1 in all): edit", build_stage, f"sft --edits {file}")


def test_cdpo_refuses_a_graph_of_other_tastes(tmp_path):
    """It compares what people like, not their names alone: swapped, changed, new, gone, in another
    order. In another order of the words it is the same taste. A policy is no graph."""
    users = read_lines(SAMPLE / "users.jsonl")
    file = tmp_path / "users.jsonl"
    first, second, *rest = users
    name = second["user"]
    swap = {**second, "likes": second["dislikes"], "dislikes": second["likes"]}
    less = {**second, "likes": second["likes"][1:]}
    more = {**second, "dislikes": [*second["dislikes"], "velvet"]}
    pairs = tmp_path / "pairs.jsonl"
    write_lines(pairs, *read_lines(SAMPLE / "pairs.jsonl")[:4])
    flags = f"--users {file} --pairs {pairs}"
    for now in (swap, less, more):
        write_lines(file, first, now, *rest)
        raises(f"other likes and dislikes ({name}", cdpo_stage, flags)
    write_lines(file, *users, {**swap, "user": "zoe"})
    message = raises("(zoe", cdpo_stage, flags)
    assert "--continue-from" in message
    write_lines(file, first, *rest)
    raises(f"({name}", cdpo_stage, flags)
    write_lines(file, second, first, *rest)
    raises("was trained on other users", cdpo_stage, flags)
    turned = {**second, "likes": second["likes"][::-1], "hidden": ["gold"]}
    write_lines(file, first, turned, *rest)
    stage, _, _ = cdpo_stage(flags)
    assert stage.tokens.graph.users[1] == name
    for kind in ("graph", "id"):
        stage, _, _ = cdpo_stage(f"--user {kind}")
        stage.tokens.save(tmp_path / "collaborative.safetensors")
        raises("holds a policy", cdpo_stage, f"--graph {tmp_path}")


def test_graph_grows_and_who_was_known_keeps_the_trained_vector(tmp_path):
    """--continue-from begins with the encoder and the vectors of before, by name, wherever a user
    stands now; new ones begin as ever. At learning rate 0 the file holds just that."""
    _, d = prepared()
    users = read_lines(SAMPLE / "users.jsonl")
    zoe = {"user": "zoe", "likes": ["velvet", "gold"], "dislikes": ["beach"]}
    file = tmp_path / "users.jsonl"
    write_lines(file, zoe, *users[::-1])
    command = f"graph --users {file} --steps 1 --lr 0"
    train_here(f"{command} --continue-from {d}/graph --out {tmp_path}/grown")
    file = "collaborative.safetensors"
    before, old, _ = graph.load_graph(d / "graph" / file)
    after, new, _ = graph.load_graph(tmp_path / "grown" / file)
    assert after.users == ["zoe", *before.users[::-1]]
    assert same(new["vectors"][1:], old["vectors"].flip(0))
    assert 0.003 < new["vectors"][0].std() < 0.03
    for name in old:
        if name.startswith("sage."):
            assert same(new[name], old[name])
    assert set(after.attributes) - set(before.attributes) == {"velvet"}
    again = f"{command} --continue-from {tmp_path}/grown"                   # a grown one grows
    model = build_stage(again)[0]
    assert same(model.vectors.data, new["vectors"])
    fresh = build_stage(command)[0]
    assert relative(fresh.vectors.data, new["vectors"]) > 0.1


def test_graph_grows_only_from_an_encoder_that_fits(tmp_path):
    """Other sizes, one kind of edge, other features, another file are refused."""
    _, d = prepared()
    users = f"graph --users {SAMPLE}/users.jsonl --continue-from"
    for flags, part in (
        ("--hidden 32", "expected (32,)"),
        ("--unsigned", "missing"),
        ("--out-dim 8", "does not fit"),
        ("--feature-norm 2", "does not embed"),
    ):
        raises(part, build_stage, f"{users} {d}/graph {flags}")
    raises("no such file", build_stage, f"{users} {tmp_path}")
    stage, _, _ = cdpo_stage("--user id")
    stage.tokens.save(tmp_path / "collaborative.safetensors")
    raises("missing", build_stage, f"{users} {tmp_path}")


def test_cdpo_sampled_neighbours_come_in_proportion_to_similarity():
    """Over many draws a neighbour is taken as often as its share of the similarity, and each of
    its pairs is taken."""
    stage, _, _ = cdpo_stage("--neighbours sampled")
    user = stage.similarity.sum(1).argmax().item()
    own = stage.pairs_of[user][0]
    generator = seeded()
    rows = [stage.draw_row(own, torch.ones(1), generator) for _ in range(600)]
    taken = [row.pairs[1] for row in rows]
    share = stage.similarity[user] / stage.similarity[user].sum()
    for v, want in zip(stage.neighbours[user].tolist(), share.tolist()):
        found = sum(stage.owner[pair] == v for pair in taken) / 600
        assert abs(found - want) < 0.08
    first = stage.neighbours[user, 0].item()
    theirs = {pair for pair in taken if stage.owner[pair] == first}
    assert len(theirs) > 0.9 * len(stage.pairs_of[first])


def test_cdpo_vectors_rest_as_often_as_the_flag_says():
    stage, settings, _ = cdpo_stage("--drop 0.75")
    share = sum(draw_batch(stage, settings, step)[0].stay.float().mean() for step in range(40)) / 40
    assert 0.18 < share < 0.32


def test_cdpo_dropout_is_the_policys_alone():
    """With --dropout the policy's pass differs from draw to draw, the reference's does not."""
    stage, settings, _ = cdpo_stage("--dropout 0.5")
    rows = draw_batch(stage, settings)
    found = []
    for _ in range(2):
        with mock.patch.object(cdpo, "dpo_loss", wraps=cdpo.dpo_loss) as given:
            stage.loss(rows)
        found.append(given.call_args.args)
    for i, (one, other) in enumerate(zip(*found)):
        if torch.is_tensor(one):
            assert same(one, other) == (i in (2, 3))


def test_cdpo_moves_only_lora_gnn_and_soft_tokens():
    """After training, base weights and reference adapter are bit-identical, and every LoRA, GNN,
    soft-prompt tensor and user vector has moved."""
    stage, settings, loop = cdpo_stage(f"--out {prepared()[1]}/moved --drop 0 --steps 6")
    tensors = dict(stage.model.named_parameters())
    for name, p in stage.tokens.named_parameters():
        tensors[f"collaborative.{name}"] = p
    before = {name: p.clone() for name, p in tensors.items()}
    with quiet():
        train.train(stage, settings, loop)
    moved = {name for name, p in tensors.items() if not same(p, before[name])}
    trained = set()
    for name in tensors:
        unread = "to_attribute.1" in name                                   # h_u never reads these
        if ".policy" in name or name.startswith("collaborative.") and not unread:
            trained.add(name)
    assert moved == trained


def test_cdpo_graph_encoder_learns_at_its_own_rate():
    """LoRA and soft tokens take --lr, node vectors and GraphSAGE --gnn-lr; a table of users, which
    nobody has pretrained, takes --lr."""
    adapters, soft, encoder = cdpo_stage("--gnn-lr 0.003")[0].parameter_groups()
    assert "lr" not in adapters and "lr" not in soft and encoder["lr"] == 0.003
    assert all(".lora_" in name for name, _ in adapters["params"])
    assert all(".soft." in name for name, _ in soft["params"])
    names = {name.removeprefix("collaborative.").partition(".")[0] for name, _ in encoder["params"]}
    assert names == {"vectors", "sage"}
    assert cdpo_stage("--user id")[0].parameter_groups()[2]["lr"] == 1e-2


def test_cdpo_sft_loss_is_the_mean_token_loss_of_each_answer():
    """Each example's loss is the mean over its answer's tokens; prompt tokens do not count."""
    stage, _, _ = build_stage(f"sft --edits {SAMPLE}/edits.jsonl --dropout 0")
    rows = stage.draw([0, 5, 7], seeded())
    want = 0
    for row in rows:
        messages = cdpo.prompt(row["input"], row["guidance"])
        asked, (answer,) = cdpo.encode(stage.tokenizer, messages, row["edit"])
        logits = stage.model(torch.tensor([asked + answer]))[0, len(asked) - 1:-1]
        want += nn.functional.cross_entropy(logits, torch.tensor(answer))
    assert_close(stage.loss(rows)[0], want)
    assert stage.describe(rows).endswith("edits.jsonl, lines 1, 6, 8")


def test_cdpo_first_steps_are_the_recorded_ones():
    """The tiny runs' losses and gradient norms, recorded once: whoever changes them, meant to."""
    command, d = prepared()
    train_here(f"{command} --steps 3 --out {d}/recorded")
    train_here(f"{command} --steps 3 --out {d}/baseline --user id --neighbours exact")
    found = {}
    for name in ("graph", "sft", "recorded", "baseline"):
        found[name] = [[line["loss"], line["grad_norm"]] for line in metrics_of(d / name)[:3]]
    for name, want in RECORDED_STEPS.items():
        assert_close(torch.tensor(found[name]), torch.tensor(want), 2e-3)


RECORDED_STEPS = {                          # (loss, gradient norm) of each step
    "graph": [[0.685766, 0.153595], [0.701898, 0.263786], [0.662948, 0.335301]],
    "sft": [[0.9778, 0.5170], [0.9473, 0.4539]],
    "recorded": [[13.6507, 37.0406], [13.0988, 9.9115], [14.1474, 21.8721]],
    "baseline": [[9.1562, 21.7965], [9.2199, 10.4588], [9.6873, 15.1195]],
}


def test_cdpo_evaluation_counts_attributes_by_name():
    """Whole words in either case, the longest name first; a hit is a stated or a hidden like; an
    answer may count as several things at once."""
    user = User("x", ["neon green", "gold"], ["ice"], ["forest"])
    names = ["neon green", "gold", "ice", "forest", "green", "ice cream"]
    judge = SimpleNamespace(names=cdpo.find_names(names))

    def verdict(text, ended=True):
        found = cdpo.Evaluation.verdict(judge, user, text, ended)
        assert len(found) == len(cdpo.RATES)
        return {name for name, value in zip(cdpo.RATES, found) if value}

    assert verdict("Paint it Neon Green") == {"likes", "hit"}
    assert verdict("Paint it green") == set()
    assert verdict("Put it in a forest") == {"would like", "hit"}
    assert verdict("Turn it into ice") == {"dislikes"}
    assert verdict("Add ice cream") == set()
    assert verdict("GOLD and ice, in a forest") == {"likes", "would like", "hit", "dislikes"}
    assert verdict("Make it golden", ended=False) == {"no attribute", "unfinished"}


def test_cdpo_evaluation_shows_each_condition_its_part_of_the_history():
    """Rates are means over all answers; the policy knows what the condition shows, and is judged
    by the whole taste; a table has a row a condition."""
    command, d = prepared()
    train_here(f"{command} --steps 1 --out {d}/policy")
    found, settings, _ = build_stage(
        f"eval --policy {d}/policy --answers 2 --users {SAMPLE}/users.jsonl "
        f"--users-test {SAMPLE}/users_test.jsonl --pairs-test {SAMPLE}/pairs_test.jsonl")
    asked = []

    def answers(users, captions):
        asked.append(users)
        said = []
        for i, user in enumerate(users):
            text = f"Make it {found.users[i].likes[0]}" if user.dislikes else "Do nothing"
            said += [(i, caption, text, True) for caption in captions[i]]
        return said

    with mock.patch.object(found, "answers", answers):
        rows = found.table().splitlines()
    assert len(rows) == 9 and rows[0].count("|") == 12
    both, likes, dislikes = ([cell.strip() for cell in row.split("|")[2:-1]] for row in rows[2:5])
    assert both[0] == both[2] == dislikes[0] == "1.000" and likes[0] == "0.000"
    assert likes[4] == "1.000" and both[3] == both[5] == "0.000"
    assert all(not user.dislikes for user in asked[1]) and all(not u.likes for u in asked[2])
    known = User("x", ["gold"], ["ice"])
    people = [known] * len(found.users)
    said = found.answers(people, found.captions)
    asked = [(i, text) for i, texts in enumerate(found.captions) for text in texts]
    strangers = [User("x", ["marble"], [])] * len(people)
    assert said != found.answers(strangers, found.captions)
    with mock.patch.object(cdpo, "suggest", return_value=[]) as given:
        found.answers(people, found.captions)
    assert given.call_args.kwargs["temperature"] == 1
    assert [(i, text) for i, text, *_ in said] == asked
    assert said == found.answers(people, found.captions)
    for name, value in (("seed", 1), ("profile", "own")):
        with mock.patch.object(settings, name, value):
            assert said != found.answers(people, found.captions)


# ---- train.py: the loop --------------------------------------------------------------------------

def test_train_resume_is_bit_exact():
    """A run killed by SIGKILL and continued by the same command has the bytes of an unbroken one,
    metrics included."""
    command, d = prepared()
    train_here(f"{command} --steps 16 --out {d}/whole")
    torn = f"{command} --steps 16 --out {d}/torn"
    process = subprocess.Popen([sys.executable, "train.py", *shlex.split(torn)], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((d / "torn").glob("step_*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train_here(torn)
    for name in ("adapter_model.safetensors", "collaborative.safetensors", "metrics.jsonl"):
        assert (d / "whole" / name).read_bytes() == (d / "torn" / name).read_bytes(), name
    assert [line["step"] for line in metrics_of(d / "torn")] == list(range(1, 17))


def test_train_stops_at_a_signal_with_the_step_saved():
    """SIGTERM ends a run after the current step, which is saved, and says how to go on."""
    command, d = prepared()
    words = shlex.split(f"{command} --steps 5000 --save-every 5000 --out {d}/told")
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE)
    while process.poll() is None and not (d / "told/metrics.jsonl").exists():
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 1 and "the same command continues" in said
    step = len(metrics_of(d / "told"))
    assert [p.name for p in (d / "told").glob("step_*")] == [f"step_{step}"]
    assert f"stopped after step {step} of 5000" in said and "/5000 [" in said     # and a bar


def test_train_keeps_the_newest_point_and_saves_as_often_as_asked():
    """--save-every N writes every N steps and at the end; only the newest point stays."""
    command, d = prepared()
    saved = []
    write = train.save_state

    def watch(optimizer, out, step):
        saved.append(step)
        write(optimizer, out, step)

    with mock.patch.object(train, "save_state", watch):
        train_here(f"{command} --save-every 3 --steps 7 --out {d}/new/points")
    assert saved == [3, 6, 7]
    assert [p.name for p in (d / "new/points").glob("step_*")] == ["step_7"]
    config = json.loads((d / "new/points/config.json").read_text())
    assert config["stage"] == "cdpo" and config["steps"] == 7
    assert all(len(config["inputs"][key]) == 16 for key in ("users", "pairs", "sft", "qwen"))
    assert config["inputs"]["dtype"] == "fp32"


def test_train_goes_on_from_the_newest_of_several_points(tmp_path):
    """Without any it begins; a point gives back step, values and moments, and holds no NaN."""
    points = {}
    for step in (3, 20, 7):
        x = nn.Parameter(torch.full((2,), float(step)))
        points[step] = optimizer = torch.optim.AdamW([{"params": [("x", x)]}])
        assert train.load_state(optimizer, tmp_path / "none") == 0
        x.square().sum().backward()
        optimizer.step()
        train.save_state(optimizer, tmp_path / "made", step)
        (tmp_path / f"made/step_{step}").rename(tmp_path / f"step_{step}")
        (tmp_path / "made/step_note").touch()                   # not a point, and no obstacle
    (tmp_path / "step_old").mkdir()
    fresh = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [("x", fresh)]}])
    assert train.load_state(optimizer, tmp_path) == 20
    found = train.tensors_of(optimizer)
    want = train.tensors_of(points[20])
    assert same([*found.values()], [*want.values()]) and len(found) == 3
    assert optimizer.state[fresh]["step"] == 20 and same(found["x"], fresh)
    want["x"][1] = math.nan
    save_file(want, tmp_path / "step_20/state.safetensors")
    raises("not finite", train.load_state, optimizer, tmp_path)


def test_train_log_has_a_line_for_each_step_that_stands(tmp_path):
    """Lines of steps that a kill has lost are cut off."""
    log = tmp_path / "metrics.jsonl"
    train.shorten_log(log, 2)
    log.write_text("one\ntwo\nthree\n")
    train.shorten_log(log, 2)
    assert log.read_text() == "one\ntwo\n"


def test_train_processes_share_the_micro_batches_out():
    """The processes' gradients and metrics add up to those of one; a process without any
    micro-batch adds nothing."""
    stage, settings, _ = cdpo_stage("--lam 0")
    rows = draw_batch(stage, settings)
    parameters = [p for _, p in cdpo.trainable(stage.model)]

    def share(rank, world):
        with mock.patch.multiple(train, RANK=rank, WORLD=world, all_reduce=mock.Mock()):
            metrics = train.gradients(stage, settings, rows, parameters, step=0, stop=[])
        flat = torch.cat([p.grad.flatten() for p in parameters])
        return flat, torch.tensor(list(metrics.values()))

    whole = share(0, 1)
    for settings.micro in (8, 3):
        shares = [share(rank, 3) for rank in range(3)]
        assert_close([sum(parts) for parts in zip(*shares)], whole, 1e-5)
        assert [share[0].any().item() for share in shares[1:]] == 2 * [settings.micro == 3]


def test_train_sums_a_step_over_processes_in_one_buffer():
    """One all_reduce a step holds every gradient and every metric, and all of it is used."""
    stage, settings, _ = cdpo_stage("--lam 0")
    rows = draw_batch(stage, settings)
    parameters = [p for _, p in cdpo.trainable(stage.model)]
    sizes = []

    def triple(flat):
        sizes.append(len(flat))
        flat.mul_(3)

    def step(world):
        with mock.patch.multiple(train, WORLD=world, all_reduce=triple):
            metrics = train.gradients(stage, settings, rows, parameters, step=0, stop=[])
        return metrics, torch.cat([p.grad.flatten() for p in parameters])

    with mock.patch.object(settings, "micro", 8):           # so that process 0 of 2 has it all
        metrics, grads = step(1)
        more, summed = step(2)
    assert sizes == [len(metrics) + len(grads)]
    assert same(summed, 3 * grads)
    assert more.keys() == metrics.keys()
    assert all(same(more[name], 3 * metrics[name]) for name in metrics)


def test_train_deterministic_is_the_same_on_a_cpu():
    """--deterministic reaches the policy of precision before the stage is built, changes no bit on
    a CPU, and may differ when a run goes on."""
    command, d = prepared()
    command = f"{command} --steps 2 --device cpu --out {d}"
    train_here(f"{command}/careless")
    try:
        train_here(f"{command}/careful --deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        qwen.set_precision()
    assert not torch.are_deterministic_algorithms_enabled()
    for name in ("adapter_model.safetensors", "collaborative.safetensors", "metrics.jsonl"):
        assert (d / "careless" / name).read_bytes() == (d / "careful" / name).read_bytes(), name
    train_here(f"{command}/careful")
    assert json.loads((d / "careful/config.json").read_text())["deterministic"]


def test_train_processes_wait_minutes_and_meet_by_two_backends():
    """On GPUs what lies on the CPU is summed by gloo, the rest by NCCL; nobody waits for hours."""
    for device, backend in (("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")):
        with (
            mock.patch.object(train, "WORLD", 2),
            mock.patch.dict(os.environ),
            mock.patch("torch.cuda.set_device") as chosen,
            mock.patch("torch.distributed.init_process_group") as joined
        ):
            train.start_processes(device)
        assert joined.call_args.args == (backend,)
        assert 5 <= joined.call_args.kwargs["timeout"].total_seconds() / 60 <= 60
        assert chosen.called == (device != "cpu")


def test_train_eval_prints_the_table():
    found = SimpleNamespace(table=lambda: "| a table |")
    said = io.StringIO()
    entry = cdpo.EvalSettings, lambda settings: found, ""
    with mock.patch.dict(train.STAGES, eval=entry), contextlib.redirect_stdout(said):
        train.main(["eval"])
    assert said.getvalue() == "| a table |\n"


def test_train_one_two_and_four_processes_take_the_same_step():
    """torchrun with two gloo processes (cdpo) and with four (sft with dropout) takes the gradient
    of one process to 1e-6, and its step to 1e-5; metrics are the same."""
    command, d = prepared()
    sft = f"sft --batch 8 --micro 2 --dropout 0.3 --edits {SAMPLE}/edits.jsonl"
    for n, of in ((2, command), (4, sft)):
        train_here(f"{of} --steps 1 --out {d}/one{n}")
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={n}"
        out = shell(f"{torchrun} train.py {of} --steps 1 --out {d}/{n}")
        assert out.returncode == 0, out.stderr[-1000:]
        one = load_file(d / f"one{n}/step_1/state.safetensors")
        more = load_file(d / f"{n}/step_1/state.safetensors")
        for part, bound in (("exp_avg:", 1e-6), ("", 1e-5)):
            names = sorted(name for name in one if name.startswith(part))
            flat = [torch.cat([state[name].flatten() for name in names]) for state in (more, one)]
            assert_close(*flat, bound)
        (line,), (other,) = metrics_of(d / f"one{n}"), metrics_of(d / f"{n}")
        assert all(abs(line[name] - other[name]) < 1e-4 for name in line)


def test_train_micro_batches_do_not_change_a_gradient():
    """--micro is about memory: gradients and metrics of a batch are the same for any."""
    stage, settings, _ = cdpo_stage("--lam 0.5")
    rows = draw_batch(stage, settings)
    parameters = [p for _, p in cdpo.trainable(stage.model)]
    found = []
    for settings.micro in (4, 8, 7):
        metrics = train.gradients(stage, settings, rows, parameters, step=0, stop=[])
        found.append([torch.cat([p.grad.flatten() for p in parameters]),
                      torch.tensor(list(metrics.values()))])
    assert_close(found[1], found[0], 1e-5)
    assert_close(found[2], found[0], 1e-5)
    assert "stop" in metrics and metrics["stop"] == 0


def test_train_refuses_two_runs_and_other_flags():
    """A second run on one folder and a continuation with other flags each end in one line; flags
    that change no number may differ."""
    command, d = prepared()
    out = d / "held"
    command = f"{command} --steps 2 --out {out}"
    sft = f"sft --edits {SAMPLE}/edits.jsonl --out {out}"
    train_here(command)
    raises("a run with beta = 0.2, now it is 0.3", train_here, f"{command} --beta 0.3")
    raises("a run of cdpo, not of sft", train_here, sft)
    with train.locked(out):
        raises("is being written by another run", train_here, command)
    (out / ".tmp_note").touch()                                 # a file of somebody else's
    (out / "metrics.jsonl").write_text(3 * "{}\n")              # a kill has lost the third step
    train_here(f"{command} --save-every 2 --checkpointing")
    assert len(metrics_of(out)) == 2


def test_train_refuses_to_continue_with_other_data(tmp_path):
    """A run does not go on when a file it reads has changed since, and says which."""
    command, d = prepared()
    pairs = read_lines(SAMPLE / "pairs.jsonl")
    file = tmp_path / "pairs.jsonl"
    write_lines(file, *pairs)
    command = f"{command} --pairs {file} --steps 1 --out {d}/data"
    train_here(command)
    write_lines(file, *pairs[:-1])
    raises("--pairs", train_here, command)


def test_train_loses_nothing_to_a_full_disk():
    """What was saved before stays whole, and no temporary folder is left."""
    command, d = prepared()
    train_here(f"{command} --steps 2 --out {d}/full")
    point = d / "full/step_2"
    state = (point / "state.safetensors").read_bytes()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    raises("could not write step 3", qwen.write_whole, point, full, "step 3")
    assert (point / "state.safetensors").read_bytes() == state
    assert not list((d / "full").rglob(".tmp*"))


def test_train_takes_no_step_on_lost_numbers():
    """A NaN loss ends the run before the step, with the lines named; nothing is saved."""
    stage, settings, loop = cdpo_stage(f"--out {prepared()[1]}/nan")
    stage.tokens.soft.fc2.bias.data[0] = math.nan
    with quiet():
        message = raises("the step was not taken", train.train, stage, settings, loop)
    assert "pairs.jsonl, lines" in message and not list(Path(loop.out).glob("step_*"))
    optimizer = torch.optim.AdamW([{"params": [("x", nn.Parameter(torch.tensor([math.inf])))]}])
    raises("x is not finite", train.save_state, optimizer, Path(loop.out), 3)


def test_train_torn_or_foreign_point_is_refused(tmp_path):
    """A resume point of another model names every tensor; a truncated one is named."""
    command, d = prepared()
    train_here(f"{command} --steps 1 --out {d}/spoiled")
    file = d / "spoiled/step_1/state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    raises(str(file), train_here, f"{command} --steps 1 --out {d}/spoiled")
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors.pop("collaborative.vectors")
    save_file(tensors, file)
    raises("missing collaborative.vectors", train_here, f"{command} --steps 1 --out {d}/spoiled")


def test_train_epoch_holds_every_item_once():
    """Batches run through shuffled epochs, a function of (seed, epoch)."""
    epochs = []
    for step in range(5):
        epochs += train.batch_indices(10, 4, 0, step)
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(10))
    assert epochs[:10] != epochs[10:]
    assert train.batch_indices(10, 10, 1, 0) != train.batch_indices(10, 10, 0, 0) == epochs[:10]
    assert train.batch_indices(3, 7, 0, 0)[:3] == train.batch_indices(3, 3, 0, 0)


def test_train_rate_warms_up_and_falls_by_half_a_cosine():
    rates = [train.learning_rate(step, 10, 2) for step in (0, 1, 2, 6, 10)]
    assert_close(torch.tensor(rates), torch.tensor([1 / 3, 2 / 3, 1.0, 0.5, 0.0]))
    assert train.learning_rate(0, 1, 0) == 1


def test_train_clips_the_gradient_and_uses_the_schedule():
    """metrics.jsonl has the rate of each step; the norm is that before clipping, and a step with
    --clip c is one with a gradient of at most that norm."""
    command, d = prepared()
    train_here(f"{command} --steps 4 --warmup 2 --lr 0.01 --out {d}/rates")
    rates = [line["lr"] for line in metrics_of(d / "rates")]
    assert_close(torch.tensor(rates), 0.01 * torch.tensor([1 / 3, 2 / 3, 1, 0.5]))
    for clip in (1e-3, 0):
        out = d / f"clip{clip}"
        train_here(f"{command} --steps 1 --warmup 0 --clip {clip} --out {out}")
        state = load_file(out / "step_1/state.safetensors")
        first = [t.square().sum() for name, t in state.items() if name.startswith("exp_avg:")]
        norm = torch.stack(first).sum().sqrt() / 0.1                        # (1 - beta_1) g
        (line,) = metrics_of(out)
        assert_close(norm, clip or line["grad_norm"], 1e-3)


def test_train_paper_preset_is_table_12():
    """--preset paper is Table 12 whole, by bench/paper.py; what it says of the code is so, and
    nothing of ours changes the losses; flags win."""
    paper = bench("paper")
    rows = paper.rows()
    assert len(rows) == 41 and {word for *_, word in rows} == {"the same", "by code"}
    with mock.patch.object(paper, "TABLE", [("C-DPO", "Train Steps", 3001, "cdpo.steps")]):
        assert paper.rows()[0][-1] == "**differs**"
    assert "torch.optim.AdamW(" in inspect.getsource(train.train)
    assert inspect.signature(lora.inject).parameters["targets"].default == "all-linear"
    _, sft, _ = train.parse("sft --preset paper".split())
    assert sft.steps * sft.batch == 150_000
    _, pretraining, _ = train.parse("graph --preset paper".split())
    ours = (pretraining.weight_decay, pretraining.drop, pretraining.feature_norm)
    assert ours == (0, 0, 0) and pretraining.warmup == 0 and pretraining.schedule == "constant"
    assert [train.learning_rate(step, 9, 2, "constant") for step in (0, 2, 8)] == [1 / 3, 1, 1]
    _, ours, _ = train.parse("cdpo --preset paper".split())
    assert ours.nll == ours.drop == ours.warmup == ours.weight_decay == 0
    flags = [flag for flag, *_ in paper.not_the_papers()]
    assert "cdpo --beta" in flags and "cdpo --lam" not in flags
    _, settings, loop = train.parse("cdpo --preset paper --lam 0.3 --out x".split())
    assert settings.lam == 0.3 and settings.k == 3 and loop.out == "x"
    assert train.parse(["sft"])[2].out == "runs/sft" and train.parse(["sft"])[2].save_every == 50


def test_train_without_a_stage_says_that_it_wants_one():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        train.parse([])
    assert "the following arguments are required: STAGE" in said.getvalue()


def test_train_flags_out_of_bounds_are_named():
    """A number that makes no sense is refused by its flag, with what is allowed."""
    for words in ("sft --steps 0", "sft --dropout 1.5", "sft --lr -1", "sft --lr nan",
                  "cdpo --seed -1", "cdpo --k 0", "cdpo --batch 0", "graph --drop 2"):
        raises("it must lie in", train.parse, words.split())
    for words in ("sft --dropout 0", "sft --dropout 1", "sft --warmup 0", "cdpo --lam 0"):
        train.parse(words.split())


def copied(source, folder):
    """A copy of a folder's files."""
    folder.mkdir()
    for file in Path(source).iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_train_resume_names_the_input_that_changed(tmp_path):
    """Another lora_alpha in the adapter's JSON, another number in the base, users whose likes and
    dislikes are exchanged: the run ends before a step, and names setting and path."""
    command, d = prepared()
    sft = copied(d / "sft", tmp_path / "step_by_step")
    base = copied(MINI / "qwen", tmp_path / "base")
    users = copied(SAMPLE, tmp_path / "sample") / "users.jsonl"
    command += f" --sft {sft} --qwen {base} --users {users} --steps 1 --out {d}/keys"
    train_here(command)
    settings, loop = train.parse(shlex.split(command))[1:]
    train.write_config(settings, loop, d / "keys")
    for name, path, file, change in (
        ("sft", sft, "adapter_config.json", (b'"lora_alpha": 32', b'"lora_alpha": 64')),
        ("qwen", base, "generation_config.json", (b"0", b"1")),
        ("users", users, "", (b"likes", b"dislikes", b"disdislikes", b"likes")),
    ):
        whole = (path / file).read_bytes()
        other = whole
        for old, new in zip(change[::2], change[1::2]):
            other = other.replace(old, new)
        (path / file).write_bytes(other)
        assert other != whole
        said = raises(f"whose --{name}, {path}, or", train.write_config, settings, loop, d / "keys")
        assert "has changed since" in said
        (path / file).write_bytes(whole)
    train.write_config(settings, loop, d / "keys")


def test_train_fingerprint_is_of_all_that_is_read(tmp_path):
    """A folder's files at any depth, behind links too, but not its resume points; a table and its
    pictures. Where a folder lies does not count; what is no file stands for itself."""
    flags, d = pictured()
    (tmp_path / "a").mkdir()
    (tmp_path / "linked/deep").mkdir(parents=True)
    (tmp_path / "a/part").symlink_to(tmp_path / "linked")
    (tmp_path / "a/step_3").mkdir()
    table = tmp_path / "a/scenes.jsonl"
    write_lines(table, {"image": "caf\u00e9.png", "edits": [{"image": "../b.png"}]},
                {"image": f"{tmp_path}/c.png"}, {"image": "no picture"},
                {"edits": [{"references": ["../one].png", "../two.png"]}]})
    files = ["a/model.safetensors", "linked/deep/merges.txt", "a/caf\u00e9.png", "b.png", "c.png",
             "one].png", "two.png", "a/step_3/state.safetensors"]
    for name in files:
        (tmp_path / name).write_text("one")
    moved = {}
    for name in files:
        before = [patch_dpo.fingerprint(f"{tmp_path}/a"), patch_dpo.fingerprint(str(table))]
        (tmp_path / name).write_text("two")
        after = [patch_dpo.fingerprint(f"{tmp_path}/a"), patch_dpo.fingerprint(str(table))]
        moved[name] = [x != y for x, y in zip(before, after)]
    assert [*moved.values()] == [[1, 0], [1, 0], [1, 1], *[[0, 1]] * 4, [0, 0]]
    (tmp_path / "a").rename(tmp_path / "moved")
    assert patch_dpo.fingerprint(f"{tmp_path}/moved") == after[0]
    for text in ("", "fp32", "owner/name"):
        assert patch_dpo.fingerprint(text) == text


def test_train_keeps_out_of_folders_that_are_not_its_own(tmp_path):
    """Neither a model's folder nor one with weights alone nor another stage's is written to."""
    command, d = prepared()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights")
    model = copied(MINI / "qwen", tmp_path / "model")
    before = (model / "config.json").read_bytes()
    for out, owner in ((adapter, "something else"), (model, "something else"), (d / "sft", "sft")):
        said = raises(f"holds a run of {owner}, not of cdpo", train_here, f"{command} --out {out}")
        assert said.startswith(str(out)) and "give another --out" in said
    assert (model / "config.json").read_bytes() == before
    assert not list(adapter.glob("*.json*"))
    flags, d = pictured()
    train_here(f"patch {flags} --loss dro --steps 1 --out {d}/dro_of_a_prompt")
    raises("a run of patch, not of dro", train_here, f"dro {flags} --out {d}/dro_of_a_prompt")


def test_train_ends_at_ctrl_c_while_it_loads():
    """Before the first step there is nothing to save: no traceback, no word."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", "train.py", "eval"], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split()[-1] == "torch.version":                 # torch is being loaded
            process.send_signal(signal.SIGINT)
            break
    said = process.stderr.read()
    assert process.wait() == -signal.SIGINT and "KeyboardInterrupt" not in said


# ---- mini/ ---------------------------------------------------------------------------------------

def test_world_is_a_function_of_its_seed(tmp_path):
    """The same seed gives the same bytes, and more users change no earlier one."""
    small = "--scenes 0 --users 5 --test-users 2 --edits 20"
    found = {}
    for name, more in (("a", ""), ("b", ""), ("larger", "--users 9"), ("other", "--seed 1")):
        with quiet():
            world.main(f"--out {tmp_path}/{name} {small} {more}".split())
        found[name] = {f.name: f.read_bytes() for f in (tmp_path / name).glob("*.jsonl")}
    assert len(found["a"]) == 5 and found["a"] == found["b"]
    assert found["a"]["users.jsonl"] != found["other"]["users.jsonl"]
    for name, content in found["a"].items():
        assert found["larger"][name].startswith(content)


def test_world_sample_is_what_its_command_writes(tmp_path):
    """mini/sample is what `--sample` writes; its 45 edits differ in every pair of pictures."""
    assert shell(f"mini/world.py --sample --out {tmp_path}").returncode == 0
    written = {f.name: f.read_bytes() for f in tmp_path.glob("*.jsonl")}
    assert len(written) == 6
    for name, content in written.items():
        assert (SAMPLE / name).read_bytes() == content
    names = []
    for scene in read_lines(tmp_path / "scenes.jsonl"):
        for picture in (scene, *scene.get("edits", [])):
            names.append(picture["image"])
    seen = []
    for name in names:
        drawn, shipped = (np.array(Image.open(folder / name)) for folder in (tmp_path, SAMPLE))
        assert np.abs(drawn.astype(int) - shipped).max() <= 1
        seen.append(drawn.astype(np.float32))
    seen = np.stack(seen)
    apart = np.abs(seen[:, None] - seen[None]).mean((2, 3, 4))              # grey levels
    assert len(seen) == 51 and (apart + 99 * np.eye(51)).min() > 0.9


def attributes_in(text):
    return [name for name in world.TYPE_OF if name in text]


def meant_by(guidance):
    """The attributes that words of the user's own may mean, by name or by a hint."""
    meant = []
    for thing, names in {**world.HINTS, **{name: [name] for name in world.TYPE_OF}}.items():
        if re.search(rf"\b{thing}\b", guidance.lower()):
            meant += names
    return meant


def test_world_pairs_ask_for_stated_likes_and_never_mention_a_hidden_one():
    """48 pairs a user; chosen asks for one stated like or what the words ask for, rejected for one
    attribute, liked only where words ask for another thing."""
    users, pairs = world.people("train", 40, 0)
    guided = sum("guidance" in pair for pair in pairs) / len(pairs)
    assert len(pairs) == 48 * 40 and 0.22 < guided < 0.3
    for i, pair in enumerate(pairs):
        user = users[i // 48]
        (chosen,) = attributes_in(pair["chosen"])
        (rejected,) = attributes_in(pair["rejected"])
        words = meant_by(pair.get("guidance", ""))
        assert pair["user"] == user["user"]
        assert not {chosen, rejected} & set(user["hidden"])
        assert chosen in (words or user["likes"])
        other_type = world.TYPE_OF[rejected] != pair["edit_type"]
        assert rejected not in user["likes"] or words or "guidance" in pair and other_type


def test_world_themes_cover_45_attributes_of_six_types():
    themes = world.THEMES.values()
    assert len(world.TYPE_OF) == 45 and set().union(*themes) == set(world.TYPE_OF)
    for theme in themes:
        assert {world.TYPE_OF[name] for name in theme} == set(world.ATTRIBUTES)


def test_world_judge_tells_well_formed_from_malformed():
    """An instruction counts when it ended, names one known attribute (the longest name), and is
    put together as the training instructions are."""
    texts = []
    for pair in read_lines(SAMPLE / "pairs.jsonl"):
        texts += [(pair["caption"], pair["chosen"]), (pair["caption"], pair["rejected"])]
    caption = "A white bowl in front of a grey wall"
    user = User("x", ["neon green"], ["gold"], ["forest"])
    judge = Judge([user, User("all", list(world.TYPE_OF), [])], texts)
    verdict = judge(user, caption, "Change the background to forest", True)
    assert verdict == {"likes": False, "would like": True, "hit": True, "dislikes": False,
                       "malformed": False}
    assert not any(judge(user, *text, True)["malformed"] for text in texts)
    assert judge(user, caption, "Change the background to forest", False)["malformed"]
    for text in ("", "Change the to forest", "Change the background to purple-ish",
                 "Add gold and forest"):
        assert judge(user, caption, text, True)["malformed"], text


# ---- edit.py, and pictures as people have them ---------------------------------------------------

def photographs():
    """[(file name, PIL picture, the pixels to read, how to save it)]."""
    rgb = Image.open(SAMPLE / "scenes/01_mug.png").convert("RGB").crop((0, 0, 64, 48))
    pixels = np.array(rgb)
    gray = pixels[..., 0]
    grays = np.stack([gray] * 3, -1)
    dark = int(gray.min())
    bit = pixels[..., :1] > 127
    clear = np.dstack([pixels, 255 * bit.astype(np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # turn it clockwise
    return [
        ("16.png", Image.fromarray(gray.astype(np.uint16) * 257), grays, {}),
        ("float.tiff", Image.fromarray((gray / 255).astype(np.float32)), grays, {}),
        ("bytes.tiff", Image.fromarray(gray.astype(np.float32)), grays, {}),
        ("palette.png", Image.fromarray(gray).convert("P"), np.where(grays == dark, 255, grays),
         {"transparency": dark}),
        ("cmyk.tiff", rgb.convert("CMYK"), pixels, {}),
        ("alpha.png", Image.fromarray(clear), np.where(bit, pixels, 255), {}),
        ("exif.png", Image.fromarray(np.rot90(pixels).copy()), pixels, {"exif": exif}),
        ("a.gif", Image.fromarray(bit[..., 0]), 255 * np.dstack([bit] * 3),
         {"save_all": True, "append_images": [Image.new("1", rgb.size)]}),
    ]


def test_edit_reads_any_photograph(tmp_path):
    """Deep, float, palette, CMYK, transparent, rotated, animated pictures come out upright, as
    8-bit RGB, and as bright as they were."""
    for name, image, want, how in photographs():
        image.save(tmp_path / name, **how)
        got = np.array(flux.read_image(tmp_path / name)).astype(int)
        assert got.shape == want.shape and np.abs(got - want).max() <= 1, name
    white = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    white.save(tmp_path / "white.png")
    assert np.array(flux.read_image(tmp_path / "white.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_edit_refuses_what_is_no_photograph(tmp_path):
    """Half a picture, a text and an absent file are each one line that names the file."""
    mug = (SAMPLE / "scenes/01_mug.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(mug[:300])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.png", "text.png", "absent.png"):
        raises(name, flux.read_image, tmp_path / name)


def test_edit_brings_any_shape_to_multiples_of_16():
    """The area stays about size x size, the shape is kept up to 4 : 1, the rest is cut away."""
    for width, height in ((1, 1), (1000, 10), (3, 4000), (4032, 3024), (17, 1023)):
        h, w, _ = edit.crop_to(Image.new("RGB", (width, height)), 256, 16).shape
        assert h % 16 == w % 16 == 0 and 0.8 < h * w / 256 ** 2 < 1.25
        assert 1 / 4.5 <= w / h <= 4.5, (width, height, w, h)
    h, w, _ = edit.crop_to(Image.new("RGB", (400, 300)), 120, 4).shape
    assert (w, h) == (140, 104)
    assert edit.crop_to(Image.new("RGB", (10, 10)), 16, 16).shape == (16, 16, 3)
    assert edit.crop_to(Image.new("RGB", (40, 400)), 80, 4).shape == (160, 40, 3)
    wide = np.zeros((40, 400, 3), np.uint8)
    wide[:, 120:280] = 255                                                  # the middle, 4 : 1
    assert edit.crop_to(Image.fromarray(wide), 80, 4)[:, 4:-4].min() == 255


def test_edit_says_in_one_sentence_what_is_wrong():
    """Wrong flags are refused before any model is loaded, each by its name."""
    for flags, part in (
        ("--image x.png", "--caption"),
        ("--reference x.png", "--caption"),
        ("--strength 1.5", "0 .. 1"),
        ("--strength -0.1", "0 .. 1"),
        ("--steps 0", "--steps"),
        ("--size 8", "16 .. 8192"),
        ("--guidance nan", "--guidance"),
        ("--reference-scale 11", "--reference-scale"),
        ("--control-start 0.6 --control-end 0.4", "--control-end"),
        ("--control-end 1.1", "--control-end"),
        ("--likes red --dislikes red", "'red'"),
        ("--user ana --likes red", "one or the other"),
        ("--out edit.jpg", ".png"),
        ("--device gpu", "gpu"),
        ("--flux mini/nowhere", "mini/nowhere"),
    ):
        raises(part, edit.main, flags.split())
    edit.parse("--control-start 0.5 --control-end 0.5".split())             # never, which is fine


def test_edit_ends_with_a_line_and_no_traceback():
    """An unknown person: one line that offers the three nearest names, and exit code 2."""
    done = shell("edit.py --user glamor-stylist")
    assert done.returncode == 2 and "nearest: glamour-stylist" in done.stderr, done.stderr
    assert len(done.stderr.partition("nearest: ")[2].split(", ")) == 3
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("edit.py: ")


def test_edit_presets_are_columns():
    """--preset paper is the paper's; a flag that is given wins."""
    paper = edit.parse("--preset paper --steps 7".split())
    assert paper.steps == 7 and paper.guidance == 35 and paper.control_scale == 0.4
    assert paper.strength == 1 and paper.dtype == "bf16" and "FLUX.1-dev" in paper.flux
    assert edit.parse("--preset paper".split()).steps == 60
    mini = edit.parse("--likes".split() + ["gold, wood ,, gold"])
    assert mini.likes == ["gold", "wood"] and mini.steps == 20 and mini.strength == 0.95
    assert mini.temperature is None and mini.low == 100 and mini.high == 200


def edited(at, flags=""):
    """One run of edit.main at few steps -> (picture, record)."""
    with quiet():
        edit.main(["--steps", "3", "--out", f"{at}/x.png", *shlex.split(flags)])
    with Image.open(at / "x.png") as image:
        record = json.loads((at / "x.json").read_text())
        assert json.loads(image.text["edit"]) == record, "the PNG's text is not the JSON beside it"
        return np.array(image), record


ONE = "--user imaginative-child"
MUG = f"{SAMPLE}/scenes/01_mug.png"
APPLE = f"{SAMPLE}/scenes/00_apple_balloon.png"
ASK = '--caption "Place the mug in front of forest"'


def test_edit_of_several_people_equals_each_alone_bit_for_bit(tmp_path):
    """The same seed gives the same bits twice, alone, in company or with --offload; another seed
    another picture; the grid shows the source and everybody."""
    sheet, record = edited(tmp_path)
    assert [one["user"] for one in record["edits"]] == edit.PERSONAS
    assert sheet.shape[1] == 16 + 4 * (192 + 16) and sheet.shape[0] % 20 == (16 + 192 + 24) % 20
    source = np.array(flux.read_image(ROOT / edit.IMAGE).resize((192, 192))).astype(int)
    assert np.abs(sheet[16:208, 16:208] - source).mean() < 4
    flags = ("", "--offload", "--seed 1")
    for name, in_company, more in zip(edit.PERSONAS, record["edits"], flags):
        picture, alone = edited(tmp_path, f"--user {name} {more}")
        company = np.array(Image.open(tmp_path / f"x_{name}.png"))
        assert (picture == company).all() == ("seed" not in more)
        same_words = alone["instruction"] == in_company["instruction"]
        assert (same_words or "seed" in more) and alone["likes"]
        assert alone["prompt"] == f"{edit.CAPTION}. {alone['instruction']}"
        assert alone["settings"]["steps"] == 3


def test_edit_writes_the_recorded_words():
    """The shipped policy's likeliest words for the shipped people are the recorded ones."""
    settings = edit.parse(["--caption", edit.CAPTION, "--temperature", "0"])
    with quiet():
        wishes = edit.write_instructions(settings)
    assert {user.name: text for user, _, text, _ in wishes} == RECORDED_WORDS


def edit_words(*flags):
    """What edit.py would draw for the people whom the flags name."""
    with quiet():
        wishes = edit.write_instructions(edit.parse(["--caption", edit.CAPTION, *flags]))
    return [text for _, _, text, _ in wishes]


def test_edit_words_depend_on_name_caption_and_seed_alone():
    """The sampled words are those of person, caption and seed; at temperature 0 the seed counts
    for nothing."""
    several = edit_words()
    for name, text in zip(edit.PERSONAS, several):
        assert edit_words("--user", name) == [text]
    assert len({tuple(edit_words("--seed", str(seed))) for seed in range(4)}) > 1
    greedy = edit_words("--temperature", "0")
    assert greedy == edit_words("--temperature", "0", "--seed", "1")


def test_edit_samples_as_the_language_model_asks(tmp_path):
    """generation_config.json's settings reach the sampler, --temperature wins, and the record says
    which it was."""
    sampling = Config.read(MINI / "qwen").sampling
    for flags, temperature in (("", sampling["temperature"]), ("--temperature 0.25", 0.25)):
        with mock.patch.object(cdpo, "suggest", wraps=cdpo.suggest) as given:
            _, record = edited(tmp_path, f"{ONE} {flags}")
        how = given.call_args.kwargs
        assert {name: how[name] for name in sampling} == {**sampling, "temperature": temperature}
        assert record["settings"]["temperature"] == temperature


def test_edit_merges_the_adapter_and_says_the_same():
    """The words come from plain linear layers, and the likeliest are those of the adapter apart."""
    flags = ["--temperature", "0"]

    def suggest(model, *given, **how):
        assert not lora.injected(model)
        return plain(model, *given, **how)

    plain = cdpo.suggest
    with mock.patch.object(cdpo, "suggest", suggest):
        merged = edit_words(*flags)
    with mock.patch.object(lora, "merge"):
        assert edit_words(*flags) == merged


def test_edit_says_whether_the_instruction_was_understood():
    """A note where it makes the answer less than three times as likely, with the number."""
    settings = edit.parse(["--user", edit.PERSONAS[0], "--instruction", "festive"])
    for behind, note in ((-1.0, "2.7 times as likely"), (-2.0, ""), (400.0, "0.0 times")):
        scores = [torch.tensor([[0.0]]), torch.tensor([[behind]])]
        with quiet(), mock.patch.object(cdpo, "answer_logprobs", side_effect=scores):
            said = edit.write_instructions(settings)[0][1]
        assert note in said and bool(note) == ("hardly understood" in said), said
    with quiet(), mock.patch.object(cdpo, "answer_logprobs", side_effect=AssertionError):
        edit.write_instructions(edit.parse(["--user", edit.PERSONAS[0]]))       # nothing to heed


def test_edit_knows_why_it_asks_for_something():
    """Each attribute that the instruction names, in any case: liked, disliked, or how many of the
    five who agree most with the user like it; oneself is none of them."""
    user = User("ana", ["Gold", "neon green"], ["ice"])
    people = [user, User("far", ["ice", "snow"], ["neon green"])]
    for number in range(5):
        people.append(User(f"near {number}", ["neon green", *["snow"] * (number < 3)], ["ice"]))
    names = graph.attribute_names(people)
    toy = graph.PreferenceGraph.build(people, names, torch.zeros(len(names), 1))
    count = "not said; liked by {} of the 5 people with the most similar taste"
    for instruction, want in (
        ("Paint it Neon Green", {"neon green": "liked"}),
        ("Add snow, and gold", {"snow": count.format(3), "Gold": "liked"}),
        ("make it out of ice", {"ice": "disliked"}),
        ("Price the snowy golden bowl", {}),
    ):
        assert edit.reasons(user, instruction, toy) == want
    alone = graph.PreferenceGraph.build(people[:2], names, torch.zeros(len(names), 1))
    assert "1 of the 1 people" in edit.reasons(user, "snow", alone)["snow"]


def test_edit_says_nothing_of_similar_people_where_nothing_is_liked(tmp_path):
    _, record = edited(tmp_path, '--likes ""')
    assert record["reasons"] == {} and "generic" in record["note"]
    _, record = edited(tmp_path, f"{ASK} --reference {MUG}")
    assert record["reasons"] == {}


def test_edit_deterministic_changes_no_bit_on_the_cpu(tmp_path):
    plain, _ = edited(tmp_path, ONE)
    with mock.patch.object(edit, "set_precision", wraps=edit.set_precision) as given:
        exact, record = edited(tmp_path, f"{ONE} --deterministic")
    torch.use_deterministic_algorithms(False)
    given.assert_called_once_with(True)
    assert (plain == exact).all() and record["settings"]["deterministic"]


def test_edit_paints_the_recorded_pixels(tmp_path):
    """The whole way from flags to pixels: means of the picture's quarters, recorded once."""
    found = {}
    for name, flags in (("usual", ""), ("all noise", "--strength 1 --control-scale 0.5"),
                        ("guided", '--true-cfg 2 --negative "A red bowl" --guidance 2')):
        picture, _ = edited(tmp_path, f"{ONE} --temperature 0 {flags}")
        quarters = picture.reshape(2, 96, 2, 96, 3).mean((1, 3, 4))
        found[name] = quarters.flatten().tolist()
    for name, want in RECORDED_PIXELS.items():
        assert np.abs(np.array(found[name]) - want).max() < 1.5, (name, found[name])


def test_edit_reads_no_controlnet_that_it_does_not_need(tmp_path):
    """Without scale, steps or picture no ControlNet is read; with them it changes the picture."""
    nowhere = f"--controlnet {tmp_path}"                        # an empty folder: reading it fails
    held, _ = edited(tmp_path, ONE)
    plain, _ = edited(tmp_path, f"{ONE} --controlnet mini/nowhere --control-scale 0")
    never, _ = edited(tmp_path, f"{ONE} {nowhere} --control-start 0.4 --control-end 0.6")
    drawn, _ = edited(tmp_path, f'{ONE} --controlnet mini/nowhere --caption "A white vase"')
    assert (plain == never).all() and (drawn != plain).any() and (held != plain).any()
    ready, _ = edited(tmp_path, f"{ONE} --control-image {APPLE}")
    thresholds, _ = edited(tmp_path, f"{ONE} --low 10 --high 20")
    gray, _ = edited(tmp_path, f"{ONE} --control-mode gray")
    assert all((held != other).any() for other in (ready, thresholds, gray))
    raises("a control picture that is ready", edited, tmp_path, f"{ONE} --control-mode depth")


def test_edit_fits_a_control_picture_to_the_photograph(tmp_path):
    Image.open(MUG).convert("RGB").crop((0, 0, 64, 32)).save(tmp_path / "wide.png")
    flags = f"--image {tmp_path}/wide.png --caption mug --control-image {APPLE}"
    settings = edit.parse(shlex.split(flags))
    source, control, shape = edit.read_pictures(settings, MINI / "flux")
    assert source.shape == control.shape == (*shape, 3) and shape[1] > shape[0]


def test_edit_strength_0_gives_the_photograph_back(tmp_path):
    source, record = edited(tmp_path / "new/folder", f"{ONE} --strength 0 --control-scale 0")
    photograph = np.array(flux.read_image(ROOT / record["settings"]["image"])).astype(float)
    assert np.abs(source - photograph).mean() < 12
    large, _ = edited(tmp_path, f"{ONE} --size 80 --image {MUG} --caption mug")
    assert large.shape == (80, 80, 3)


def test_edit_sees_each_reference_that_is_asked_for(tmp_path):
    """Each reference counts, with or without a user; at scale 0 none does; nobody is asked."""
    one, record = edited(tmp_path, f"{ASK} --reference {MUG}")
    two, _ = edited(tmp_path, f"{ASK} --reference {MUG} {APPLE}")
    without, _ = edited(tmp_path, f"{ASK} --reference {MUG} {APPLE} --reference-scale 0")
    alike, _ = edited(tmp_path, f"{ASK} --reference {APPLE} --reference-scale 0")
    assert record["note"] == "no policy is asked"
    assert record["prompt"] == record["settings"]["caption"]
    assert (one != two).any() and (without != one).any() and (without == alike).all()
    mug = f'{ONE} --image {MUG} --caption "A mug"'
    bare, _ = edited(tmp_path, mug)
    seen, _ = edited(tmp_path, f"{mug} --reference {APPLE}")
    assert (seen != bare).any()


def test_edit_reads_references_with_an_ip_adapter(tmp_path):
    """--image-prompt with an XLabs file, --features with CLIP: each reference counts. Another
    encoder, or no such file, is one sentence; of the file it says what to give."""
    model = flux.Flux.load(MINI / "flux/transformer")
    file = write_xlabs(tmp_path / "ip_adapter.safetensors", model, 64)
    flags = f"{ASK} --features {MINI}/clip --image-prompt {file} --reference {MUG}"
    one, _ = edited(tmp_path, flags)
    two, _ = edited(tmp_path, f"{flags} {APPLE}")
    without, _ = edited(tmp_path, f"{flags} --reference-scale 0")
    assert (one != two).any() and (one != without).any()
    raises("model_type is 'dinov2'", edited, tmp_path, f"{flags} --features {MINI}/vit")
    said = raises("nowhere.safetensors", edited, tmp_path,
                  f"{ASK} --reference {MUG} --image-prompt {tmp_path}/nowhere.safetensors")
    assert "give --image-prompt XLabs-AI/flux-ip-adapter-v2" in said


def test_edit_knows_a_stranger_by_likes_and_says_when_it_cannot(tmp_path):
    """Likes and dislikes make a user; somebody without any gets the generic edit, and a note that
    says so. Among others too, who come in the order asked for, each adapter loaded once."""
    mine, record = edited(tmp_path, '--likes "gold, crown, marble" --dislikes moonlight')
    none, empty = edited(tmp_path, '--likes ""')
    alike, nothing = edited(tmp_path, '--dislikes ""')
    assert "generic" in empty["note"] and empty["note"] == nothing["note"] and not record["note"]
    model, tokenizer = qwen.load_language_model(MINI / "qwen")
    lora.load_adapter(model, MINI / "policy" / cdpo.REFERENCE)
    lora.merge(model)
    seed = qwen.seed_for(0, "you", edit.CAPTION)
    sampling = {**model.config.sampling, "generator": torch.Generator().manual_seed(seed)}
    said = cdpo.suggest(model, tokenizer, [cdpo.prompt(edit.CAPTION)], **sampling)
    assert said[0][0] == empty["instruction"]
    assert (none == alike).all() and record["likes"] == ["gold", "crown", "marble"]
    rows = [{"user": name, "likes": likes, "dislikes": []} for name, likes in (
        ("you", []), ("ana", ["gold"]), ("mute", []), ("bo", ["snow"]))]
    write_lines(tmp_path / "u.jsonl", *rows)
    flags = ["--users", f"{tmp_path}/u.jsonl", "--user"]
    with mock.patch.object(lora, "load_adapter", wraps=lora.load_adapter) as loaded:
        several = edit_words(*flags, *[row["user"] for row in rows], "--samples", "2",
                             "--words-only")
    assert loaded.call_count == 2 and several[0] == said[0][0]
    for row, text in zip(rows, several[::2]):
        assert edit_words(*flags, row["user"]) == [text]


def test_edit_asks_with_the_profile_that_the_policy_was_trained_with(tmp_path):
    """config.json of the policy says which; neighbours are the graph's people, not oneself."""
    policy = copied(MINI / "policy", tmp_path / "policy")
    config = qwen.read_json(policy / "config.json")
    people = graph.load_graph(policy / "collaborative.safetensors")[0].people()
    user = people[0]
    similar = cdpo.profiles("neighbours", [user], people[1:])[0]
    for kind, words in (("own", cdpo.profile(user)), ("neighbours", similar)):
        write_lines(policy / "config.json", config | {"profile": kind})
        argv = ["--policy", str(policy), "--user", user.name, "--words-only"]
        with mock.patch.object(cdpo, "suggest", wraps=cdpo.suggest) as given:
            edited_words = edit.write_instructions(edit.parse(argv))
        assert given.call_args.args[2] == [cdpo.prompt(edit.CAPTION, profile=words)]
        assert len(edited_words) == 1 and words.startswith("likes ")
    assert "similar users like" in similar


def test_edit_knows_training_users_as_they_were_trained():
    """Somebody the policy was trained with needs no users file and has the learned vector; with
    other likes today, the same name is somebody new."""
    tokens = cdpo.UserTokens.load(MINI / "policy/collaborative.safetensors")
    name = tokens.graph.users[5]
    settings = edit.parse(["--user", name, "--users", str(SAMPLE / "users_test.jsonl")])
    (user,) = edit.find_users(settings, tokens.graph)
    signs = tokens.graph.signs().to_dense()[5]
    likes = {tokens.graph.attributes[i] for i in (signs > 0).nonzero()[:, 0]}
    dislikes = {tokens.graph.attributes[i] for i in (signs < 0).nonzero()[:, 0]}
    assert set(user.likes) == likes and set(user.dislikes) == dislikes and likes
    soft, note = edit.soft_tokens(user, tokens)
    assert_close(soft, tokens.soft(tokens.embeddings()[5:6]))
    changed, _ = edit.soft_tokens(User(name, user.likes[1:], user.dislikes), tokens)
    assert note == "" and relative(changed, soft) > 1e-3
    for user in (User("x", user.likes, []), User("x", [], user.dislikes)):
        assert edit.soft_tokens(user, tokens)[0].shape == soft.shape        # one side is enough


def test_edit_grid_wraps_its_words():
    """Four columns, small pictures enlarged to 256 pixels, every word of the text kept."""
    picture = Image.new("RGB", (64, 64), "red")
    instruction = "an instruction of many words " * 5
    sheet = np.array(edit.grid([(picture, "a name", instruction, "likes gold")] * 5))
    lines = edit.wrapped(["a name", instruction, "likes gold"], 256)
    assert sheet.shape[1] == 16 + 4 * 272
    assert sheet.shape[0] == 16 + 2 * (256 + 20 * len(lines) + 24)
    assert " ".join(line for line, *_ in lines[1:-1]).split() == instruction.split()
    assert (sheet[16:16 + 256, 16:16 + 256] == [255, 0, 0]).all()           # no word over it
    below = sheet[16 + 256:, :272].min((1, 2))                              # darkest, row by row
    assert below[:8].min() == 255
    for n in range(len(lines)):
        assert below[8 + 20 * n:28 + 20 * n].min() < 128
    large = edit.grid([(Image.new("RGB", (300, 200)), "a name", "", "")])
    assert large.size == (16 + 316, 16 + 200 + 20 + 24)


def test_edit_grid_shows_which_like_was_met():
    """A * stands before each word of it, is not drawn, and makes the word bold and black; what was
    not said has a line of its own."""
    one = {"likes": ["gold", "neon green"], "reasons": {"neon green": "liked", "ice": "not said"}}
    assert edit.explanation(one) == ("likes gold, *neon *green", "*ice: not said")
    none = {"likes": [], "reasons": {}}
    assert edit.explanation(none) == ("likes nothing in particular", "")
    ink = []
    for small in ("likes gold", "likes *gold"):
        cell = (Image.new("RGB", (256, 8), "white"), "a", "", small)
        sheet = np.array(edit.grid([cell])).astype(int)
        ink.append((sheet == 0).all(2).sum())
        assert sheet.shape[0] == 16 + 8 + 20 * 2 + 24
    assert ink[1] > ink[0] + 10


def test_edit_grid_marks_scripts_that_its_font_lacks():
    """Accents are left out, other scripts named: no box is drawn."""
    for text, want in (
        ("Zoë Łukasz – Jørgen", "Zoe Lukasz - Jorgen"),
        ("“a”… ½", "\"a\"... 1[FRACTION]2"),
        ("Ольга, 小明", "[CYRILLIC], [CJK]"),
        ("مريم ana", "[ARABIC] ana"),
        ("🏠\x00", "[HOUSE]"),
        ("\x00", "[?]"),
        ("two\nlines", "two\nlines"),
    ):
        shown = edit.drawable(text)
        assert shown == want, (text, shown)
        assert re.fullmatch(r"[\s!-~]*", shown)
    lines = edit.wrapped(["Ольга", "Paint it gold", "likes золото", "x"], 256)
    assert [line for line, *_ in lines] == [
        "[CYRILLIC]", "Paint it gold", "likes [CYRILLIC]", "x"]


def test_edit_writes_a_grid_of_two_people_and_the_picture_alone_of_one(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    one = {"user": "a b/c", "likes": [], "instruction": "", "reasons": {},
           "settings": {"caption": "mug"}}
    for number, want in ((1, ["x.png"]), (2, ["x.png", "x_a_b_c.png", "x_a_b_c_2.png"])):
        with quiet():
            edit.write(tmp_path / "x.png", pixels, number * [one], number * [pixels])
        assert sorted(file.name for file in tmp_path.glob("*.png")) == want
        with Image.open(tmp_path / "x.png") as image:
            assert (image.width == 64) == (number == 1)


def test_edit_prints_what_a_part_took():
    """Seconds, and the process's peak memory in GB."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), edit.measure("cpu", "nothing"):
        pass
    name, seconds, _, _, peak, unit = said.getvalue().split()
    assert name == "nothing" and unit == "GB" and float(seconds) < 1 and 0.1 < float(peak) < 30


def test_edit_destroys_no_file(tmp_path):
    """What is read here, what edit.py did not write and folders are left as they are: refused
    before any model is read. Its own results are written anew."""
    own = tmp_path / "x.png"
    _, record = edited(tmp_path, ONE)
    edited(tmp_path, ONE)                                       # its own: written anew
    company = tmp_path / f"y_{record['user']}.png"
    own.with_name("z.json").write_text('{"camera": "mine"}')
    own.with_name("photo.png").write_bytes(Path(MUG).read_bytes())
    own.with_name("folder.png").mkdir()
    own.rename(company)                                         # a result that is edited again
    own.symlink_to(company)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.*") if file.is_file()}
    for flags in (
        f"--out {own} --image {company} --caption x",           # another name of the photograph
        f"--out {tmp_path}/y.png --image {company} --caption x",        # one of several people's
        f"--out {company} --reference {MUG} {company} --caption x",
        f"--out {company} --control-image {company}",
        f"--out {tmp_path}/z.png",                              # what stands beside a photograph
        f"--out {tmp_path}/photo.png",
        f"--out {tmp_path}/folder.png",
    ):
        with quiet(), mock.patch.object(edit, "resolve", side_effect=AssertionError):
            raises("--out", edit.main, flags.split())
    assert all(file.read_bytes() == data for file, data in before.items())


def test_edit_people_never_share_a_file():
    """Names that differ only in what a file cannot be called, or in case, or are very long."""
    names = ["a b", "a/b", "A?b", "a_b_2", "..", "é" * 300, "é" * 301]
    files = edit.files_of(Path("out/x.png"), names)
    assert len({file.name.lower() for file in files}) == len(names)
    assert files[0].name == "x_a_b.png" and files[1].name == "x_a_b_2.png"
    assert all(file.parent == Path("out") for file in files)
    assert max(len(file.name.encode()) for file in files) < 250
    assert edit.files_of(Path("out/x.png"), ["a b"]) == [Path("out/x.png")]


def test_edit_writes_all_files_or_none(tmp_path):
    """A disk that is full at the second picture leaves what was there, and nothing else; a folder
    that cannot be made is said before anything is painted."""
    one = {"user": "a", "likes": [], "instruction": "", "reasons": {},
           "settings": {"caption": "mug"}}
    given = None, [one, {**one, "user": "b"}], [np.zeros((64, 64, 3), np.uint8)] * 2
    with quiet():
        edit.write(tmp_path / "x.png", *given)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    plain = Image.Image.save
    saved = []

    def full(picture, file, **how):
        saved.append(file)
        plain(picture, file, **how)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")

    for folder in (tmp_path, tmp_path / "new/folder"):
        saved.clear()
        with quiet(), mock.patch.object(Image.Image, "save", full):
            raises("No space left", edit.write, folder / "x.png", *given)
    (tmp_path / "new").rmdir()
    with quiet(), mock.patch.object(edit, "resolve", side_effect=AssertionError):
        raises("--out", edit.main, ["--out", f"{tmp_path}/x.json/sub/x.png"])
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()} and len(before) == 6


def test_edit_refuses_flags_without_effect():
    """Each is refused, naming what gives it effect; with that it is taken."""
    new = "--caption vase"
    seen = f"--reference {MUG}"
    for flags, part in (
        (f"{new} --strength 0.5", "--image"),
        (f"{new} --control-mode pose", "--image or --control-image"),
        (f"{new} --control-scale 0.3", "--image"),
        (f"{new} --control-end 0.5", "--image"),
        (f"{new} --control-image {MUG} --low 50", "edges"),
        ("--high 50 --control-mode gray", "edges that Canny draws"),
        (f"--high 50 --control-image {MUG}", "edges that Canny draws"),
        ("--negative blurry", "--true-cfg"),
        ("--reference-scale 1", "--reference"),
        ("--features x", "--reference"),
        ("--image-prompt x", "--reference"),
        ("--lora-scale 0.5", "--lora"),
        (f"{new} {seen} --temperature 1", "--user"),
        (f"{new} {seen} --users x.jsonl", "--user"),
        ("--users x.jsonl --dislikes gold", "--user"),
    ):
        raises(f"no effect without {part}", edit.parse, flags.split())
    for flags in (
        "--strength 0.5 --low 50 --control-end 0.5",            # of the shipped picture
        f"{new} --control-image {MUG} --control-mode pose",
        "--negative blurry --true-cfg 2",
        f"{new} {seen} --reference-scale 1 --user ana --users x.jsonl --temperature 1",
        "--lora x --lora-scale 0.5",
        "--control-scale 0 --controlnet x",                     # which model is never refused
    ):
        edit.parse(flags.split())


def test_edit_refuses_texts_that_are_none():
    """Nothing but blanks, and bytes that are no UTF-8, in any flag."""
    for flag in ("--caption", "--image", "--control-image", "--lora", "--users", "--qwen"):
        for text in ("", "  "):
            raises(flag, edit.parse, [flag, text])
    odd = b"caf\xe9".decode(errors="surrogateescape")
    for flag in ("--caption", "--instruction", "--negative", "--user", "--likes", "--lora"):
        raises("UTF-8", edit.parse, [flag, odd])
        raises(flag, edit.parse, [flag, "half a \ud83d"])
    edit.parse(["--instruction", ""])                           # what it is anyway
    edit.parse(["--likes", "", "--caption", "ein Café 🏠"])


def test_edit_paints_after_a_control_picture_alone(tmp_path):
    """Without a photograph: a new picture of the control picture's shape, which it changes."""
    wide = Image.open(MUG).convert("RGB").crop((0, 8, 64, 56))
    wide.save(tmp_path / "pose.png")
    new = f'{ONE} --caption "A white vase" --control-image {tmp_path}/pose.png'
    pose, record = edited(tmp_path, f"{new} --control-mode pose")
    none, _ = edited(tmp_path, f"{new} --control-scale 0")
    assert pose.shape[1] > pose.shape[0] and record["settings"]["strength"] == 1
    assert pose.shape == none.shape and (pose != none).any()


def test_edit_adds_a_lora_to_flux(tmp_path):
    """--lora adds scale * alpha / rank * B A to the layers that it names and to no other, from
    its folder or file; the picture shows it."""
    model = flux.Flux.load(MINI / "flux/transformer")
    names = lora.inject(model, rank=2, alpha=6, targets=["attn.to_q", "proj_out"])
    change = {}
    for name, layer in lora.layers(model).items():
        loud(layer.lora_A)
        loud(layer.lora_B)
        change[f"{name}.weight"] = 3 * layer.lora_B["policy"] @ layer.lora_A["policy"]
    lora.save_adapter(model, tmp_path / "lora")
    file = tmp_path / "lora/adapter_model.safetensors"
    plain = flux.Flux.load(MINI / "flux/transformer").state_dict()
    for given, scale in ((file.parent, -0.5), (file, 0)):
        model = flux.Flux.load(MINI / "flux/transformer")
        settings = edit.parse(["--lora", str(given), "--lora-scale", str(scale)])
        edit.equip(settings, model, None)
        for name, p in model.state_dict().items():
            assert_close(p, plain[name] + scale * change.get(name, 0))
            assert torch.equal(p, plain[name]) == (scale == 0 or name not in change), name
    assert len(change) == len(names) > 2
    without, _ = edited(tmp_path, ONE)
    painted, record = edited(tmp_path, f"{ONE} --lora {file} --offload")
    assert (painted != without).any() and record["settings"]["lora_scale"] == 1


def test_edit_hands_caption_and_instruction_apart():
    """So that what is too long loses words of the caption."""
    settings = edit.parse(["--caption", "A vase"])
    edits = [{"instruction": "Paint it gold", "prompt": "A vase. Paint it gold"}]
    with mock.patch.object(edit, "render") as given:
        edit.draw(settings, MINI / "flux", edits, None, None, (64, 64))
    assert given.call_args.kwargs["prompts"] == [("A vase", "Paint it gold")]


def doubts_about(flags, source=None, prompt=edit.CAPTION):
    settings = edit.parse(["--caption", edit.CAPTION, *flags.split()])
    settings.size = settings.size or 192
    control = None if source is None else controlnet.control_picture(source)
    with torch.no_grad():
        return list(edit.doubts(settings, MINI / "flux", [{"prompt": prompt}], source, control))


def test_edit_doubts_pictures_that_the_autoencoder_cannot_draw():
    """Noise and a page without edges get a line, noise with the dB that was measured; the
    miniature's own scenes get none."""
    for file in sorted((SAMPLE / "scenes").glob("*.png"))[:12]:
        assert not doubts_about("", np.array(flux.read_image(file))), file
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (12, 12, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    (line,) = doubts_about("", noise)
    assert "dB" in line and int(re.search(r"at (\d+) dB", line)[1]) < edit.FAITHFUL
    (line,) = doubts_about("", np.full((192, 192, 3), 255, np.uint8))
    assert "no edges" in line


def test_edit_measures_colours_a_latent_pixel_at_a_time():
    """fidelity is the PSNR of means of squares: what averages out in each does not count."""
    class Shift:
        factor = 4

        def encode(self, image):
            return image

        def decode(self, latent):
            return latent + self.error

    source = np.full((16, 16, 3), 100, np.uint8)
    net = Shift()
    net.error = 0.02
    assert abs(edit.fidelity(net, source, "cpu") - 40) < 1e-3              # 10 log10(1 / .01^2)
    net.error = 0.02 * (-1.0) ** torch.arange(16)                         # even and odd columns
    assert edit.fidelity(net, source, "cpu") > 100


def test_edit_doubts_words_that_no_token_holds():
    """Words that both tokenizers take apart are named; what the miniature was taught never is."""
    (line,) = doubts_about("", prompt="An astronaut and a bowl. Add a Kühlschrank, 一只猫坐在")
    assert line.endswith("for astronaut, Kühlschrank, 一只猫坐在"), line
    tokens = cdpo.UserTokens.load(MINI / "policy/collaborative.safetensors")
    known = ". ".join([edit.CAPTION, *tokens.graph.attributes])
    assert not doubts_about("", prompt=known), doubts_about("", prompt=known)


def test_edit_doubts_sizes_that_the_autoencoder_was_not_made_for(tmp_path):
    """A quarter less or more than its size; a checkpoint that names none is not doubted. The lines
    are printed before anything is painted."""
    for size in (96, 128, 160, 192, 224, 256, 288):
        doubted = not 160 <= size <= 224
        assert bool(doubts_about(f"--size {size}")) == doubted, size
    with mock.patch.object(flux.VAE, "read_config", return_value={}):
        assert not doubts_about("--size 512")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(edit, "draw", side_effect=OSError):
        with contextlib.suppress(OSError):
            edit.main(["--size", "128", "--out", f"{tmp_path}/x.png", *ONE.split()])
    assert "--size is 128" in said.getvalue() and "--preset paper" in said.getvalue()


def test_edit_reads_a_strangers_words_as_the_graph_has_them(tmp_path):
    """Case and plural are folded, in flags and in a users file; a word that the graph lacks counts
    by its text, and the note names known ones that are spelt like it."""
    likes = "gold, neon green, wood"
    _, mine = edited(tmp_path, f'--likes "{likes}" --dislikes crown')
    _, loose = edited(tmp_path, '--likes "Golds, NEON GREEN, Woods" --dislikes Crowns')
    assert loose["likes"] == mine["likes"] == likes.split(", ") and loose["dislikes"] == ["crown"]
    assert loose["instruction"] == mine["instruction"] and not loose["note"]
    write_lines(tmp_path / "u.jsonl", {"user": "ana", "likes": ["Golds"], "dislikes": ["CROWN"]})
    _, ana = edited(tmp_path, f"--user ana --users {tmp_path}/u.jsonl")
    assert ana["likes"] == ["gold"] and ana["dislikes"] == ["crown"]
    tokens = cdpo.UserTokens.load(MINI / "policy/collaborative.safetensors")
    known, _ = edit.soft_tokens(User("x", ["gold"], []), tokens)
    for word, alike in (("golden", "gold"), ("quux", "none")):
        soft, note = edit.soft_tokens(User("x", ["gold", word], []), tokens)
        assert word in note and alike in note.partition("spelt like it")[2], note
        assert relative(soft, known) > 1e-3
    raises("'gold'", edited, tmp_path, "--likes gold --dislikes Golds")


def test_edit_words_at_hardly_any_temperature_are_the_likeliest():
    """Temperatures that fp32 does not know from 0 are 0."""
    said = []
    for temperature in ("0", "1e-300", "1e-7"):
        settings = edit.parse(["--user", edit.PERSONAS[0], "--temperature", temperature])
        with quiet():
            said.append(edit.write_instructions(settings)[0][2])
    assert said[0] == said[1] == said[2]


def test_edit_lists_the_graphs_words():
    """--attributes prints what the policy's graph knows, a line each, and nothing is painted."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(edit, "render") as painted:
        edit.main(["--attributes", "--policy", str(MINI / "policy")])
    tokens = cdpo.UserTokens.load(MINI / "policy/collaborative.safetensors")
    assert said.getvalue().splitlines() == tokens.graph.attributes and not painted.called


def test_edit_finds_the_miniature_from_any_folder(tmp_path):
    """Called by its full path: defaults lie beside the script, what is named and what is written
    where one stands; a run that is refused leaves nothing behind."""
    (tmp_path / "mug.png").write_bytes(Path(MUG).read_bytes())
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        raises("nobody", edit.main, ["--user", "nobody at all"])
        assert os.listdir() == ["mug.png"]
        edit.main(shlex.split(f"--image mug.png --caption mug {ONE} --steps 2"))
    assert (tmp_path / "out/edit.png").is_file()
    with quiet():
        same = f"--image {MUG} --caption mug {ONE} --steps 2 --out {tmp_path}/x.png"
        edit.main(shlex.split(same))
    with Image.open(tmp_path / "x.png") as here, Image.open(tmp_path / "out/edit.png") as there:
        assert here.tobytes() == there.tobytes()


def test_edit_and_mini_end_at_ctrl_c_without_a_traceback(tmp_path):
    """Whenever it comes: while torch is loaded, or later."""
    for script, wait in (
        ("edit.py --steps 10000", 0.4),
        ("mini/world.py --users 9000", 1.0),
        ("mini/pretrain.py pictures", 0.4),
    ):
        words = [sys.executable, str(ROOT / script.split()[0]), *script.split()[1:]]
        if script.startswith("mini"):
            words += ["--out", str(tmp_path)]
        process = subprocess.Popen(words, cwd=tmp_path, text=True, stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGINT and said == "", (script, said)


RECORDED_WORDS = {
    "imaginative-child": "Change the background to beach",
    "glamour-stylist": "Change the lighting to studio light",
    "futuristic-techie": "Change the background to night sky",
}
RECORDED_PIXELS = {
    "usual": [126.5, 161.4, 132.6, 172.0],
    "all noise": [126.7, 161.5, 133.2, 171.8],
    "guided": [125.5, 158.3, 146.8, 178.4],
}


def exif_of(orientation, *others):
    """Raw EXIF: the orientation, and other tags (tag, type, count, 4 bytes) that may be wrong."""
    turn = (0x0112, 3, 1, struct.pack("<I", orientation))
    rows = sorted([turn, *others])
    packed = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in rows)
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(rows))
    return head + packed + bytes(4)


def test_edit_turns_photographs_whose_other_exif_is_odd(tmp_path):
    """Tags of a wrong type, out of range, that point nowhere; EXIF that is none at all: the picture
    comes upright, or as it lies where no orientation can be read."""
    pixels = np.array(Image.open(SAMPLE / "scenes/01_mug.png").convert("RGB"))[:48]
    turns = {1: 0, 3: 2, 6: 1, 8: 3}                                        # np.rot90 lays it so
    for other in (
        (0x0100, 9, 1, struct.pack("<i", -5)),                              # a negative width
        (0x0111, 1, 1, b"\1\0\0\0"),                                        # a byte for an offset
        (0x011A, 2, 4, b"abc\0"),                                           # letters: a resolution
        (0x011A, 5, 1, struct.pack("<I", 99999)),                           # beyond the end
        (0x0128, 8, 1, struct.pack("<hh", -3, 0)),
        (0x0103, 11, 1, struct.pack("<f", 1.5)),
    ):
        for orientation, turn in turns.items():
            lying = Image.fromarray(np.rot90(pixels, turn).copy())
            for name, how in (("a.png", {}), ("a.webp", {"lossless": True})):
                lying.save(tmp_path / name, exif=exif_of(orientation, other), **how)
                assert np.array_equal(flux.read_image(tmp_path / name), pixels), other
    for none in (b"Exif\0\0no such thing", b"Exif\0\0", b"Exif\0\0II*\0", exif_of(9)):
        Image.fromarray(pixels).save(tmp_path / "b.png", exif=none)
        assert np.array_equal(flux.read_image(tmp_path / "b.png"), pixels), none
    rotated = np.rot90(pixels).copy()
    Image.fromarray(rotated).save(tmp_path / "c.jpg", quality=95, exif=exif_of(6))
    assert np.array(flux.read_image(tmp_path / "c.jpg")).shape == pixels.shape


# ---- patch_dpo.py: quality of patches, losses ----------------------------------------------------

def test_patch_quality_is_the_cosine_to_the_nearest_patch_of_the_reference():
    """Eq. 3 by hand, of maps of different sizes; the length of a feature plays no role."""
    x = noise(2, 3, 4, 8)
    ref = 5 * noise(2, 2, 5, 8, seed=1)
    one = x[:, :, :, None, None]
    other = ref[:, None, None]
    cosine = torch.cosine_similarity(one, other, dim=-1)                    # (2, 3, 4, 2, 5)
    quality = patch_dpo.patch_quality(x, ref)
    assert_close(quality, cosine.amax((3, 4)))                              # (3)
    other_way = patch_dpo.patch_quality(ref, x)
    assert_close(other_way, cosine.amax((1, 2)))


def test_patch_weights_stretch_each_picture_from_0_to_1():
    """A picture's worst patch weighs 0 and its best 1, whatever the other pictures are; where all
    are alike, to 1e-4, each weighs its quality, brought into [0, 1]."""
    quality = torch.tensor([
        [[0.2, 0.6], [0.4, 0.3]],
        [[-0.5, 0.5], [0.0, 0.3]],
    ])
    want = torch.tensor([
        [[0.0, 1.0], [0.5, 0.25]],
        [[0.0, 1.0], [0.5, 0.8]],
    ])
    assert_close(patch_dpo.patch_weights(quality, (2, 2)), want)
    for flat, weight in ((0.7, 0.7), (-0.2, 0.0), (1.3, 1.0)):
        quality = torch.full((1, 3, 4), flat)
        alike = patch_dpo.patch_weights(quality, (6, 8))
        assert_close(alike, torch.full((1, 6, 8), weight))
    low_high = torch.tensor([[[0.0, 1.0]]])
    for near in (0.7 + 5e-5 * low_high, 1e-4 * low_high):
        assert_close(patch_dpo.patch_weights(near, (1, 2)), near)
    far = 0.7 + 5e-3 * low_high
    assert_close(patch_dpo.patch_weights(far, (1, 2)), low_high)


def test_patch_weights_of_fewer_latents_count_every_patch():
    """Bilinear and antialiased: 4 x 4 patches come down to 2 x 2 by (3, 3, 1, 0) / 7."""
    A = torch.tensor([
        [3.0, 3, 1, 0],
        [0, 1, 3, 3],
    ]) / 7
    down = patch_dpo.patch_weights(torch.eye(4)[None], (2, 2))
    assert_close(down[0], A @ A.T)
    pair = torch.tensor([[[2.0, 4.0]]])
    up = patch_dpo.patch_weights(pair, (1, 4))
    assert_close(up, torch.tensor([[[0, 0.25, 0.75, 1]]]))


def test_patch_foreign_patch_weighs_nothing():
    """Of a picture like its reference but for one patch, that patch weighs 0, the others much."""
    ref = noise(2, 2, 5, 8)
    gen = ref + 0.1 * noise(2, 2, 5, 8, seed=1)
    gen[:, 1, 2] = -ref.mean((1, 2))
    quality = patch_dpo.patch_quality(gen, ref)
    weight = patch_dpo.patch_weights(quality, (2, 5))
    assert (weight[:, 1, 2] == 0).all()
    lowest = weight.flatten(1).sort().values
    assert lowest[:, 1].min() > 0.8


def test_patch_loss_is_s1_and_the_authors():
    """power 2, the default, is the supplement's formula; power 1 twice the authors' batch mean,
    and with weights of a half it is flow matching on both pictures."""
    gen, ref = noise(2, 2, 3, 4, 5)
    p_gen, p_ref = torch.rand(2, 2, 4, 5, generator=seeded())
    good = gen * p_gen[:, None]
    good = good.square().mean((1, 2, 3))
    missed = ref * (1 - p_ref[:, None])
    missed = missed.square().mean((1, 2, 3))
    assert_close(patch_dpo.patch_dpo_loss(gen, ref, p_gen, p_ref), good + missed)
    weight = torch.cat([1 - p_ref, p_gen])[:, None]
    authors = (weight * torch.cat([ref, gen]) ** 2).mean()
    ours = patch_dpo.patch_dpo_loss(gen, ref, p_gen, p_ref, power=1)
    assert_close(ours.mean(), 2 * authors)
    half = torch.full((2, 4, 5), 0.5)
    plain = patch_dpo.patch_dpo_loss(gen, ref, half, half, power=1)
    assert_close(plain.mean(), torch.cat([gen, ref]).square().mean())


def test_patch_loss_moves_a_patch_by_its_weight():
    """The supplement's linear model: a step takes from the squared error of patch i, 1 before,
    what its theorem says; p_i = 0 takes nothing, a larger p_i more."""
    x = noise(8)
    W = noise(8, 8, seed=1).requires_grad_()
    p = torch.linspace(0, 1, 8)
    target = (W @ x).detach() - 1
    error = (W @ x - target)[None, None, None]                              # (1, 1, 1, 8)
    weight = p[None, None]
    patch_dpo.patch_dpo_loss(error, 0 * error.detach(), weight, weight).sum().backward()
    after = (W - 0.05 * W.grad) @ x - target
    left = 1 - 2 * 0.05 / 8 * p ** 2 * x.square().sum()                     # / 8: a mean
    assert_close(after ** 2, left ** 2, 1e-5)
    assert (after.diff() < 0).all()


def test_patch_diffusion_dpo_loss_is_the_published():
    """-log sigma(-beta / 2 [...]); equal models give ln 2; the better winner, the smaller."""
    win, lose, ref_win, ref_lose = torch.rand(4, 6, generator=seeded())
    better = ((win - lose) - (ref_win - ref_lose)).double()
    loss = patch_dpo.diffusion_dpo_loss(win, lose, ref_win, ref_lose, 100)
    assert_close(loss, torch.log1p(torch.exp(50 * better)), 1e-5)
    assert_close(patch_dpo.diffusion_dpo_loss(win, lose, win, lose, 100)[0], math.log(2))
    assert loss.shape == (6,)
    assert (loss[better < 0] < math.log(2)).all()


def test_dro_loss_is_the_published():
    """max(0, margin + ...), by default with a margin of 0.001."""
    expert, ref_expert, policy, ref_policy = torch.rand(4, 9, generator=seeded())
    gap = (expert - ref_expert) - (policy - ref_policy)
    assert (gap > 0).any()
    assert (gap < 0).any()
    for how, margin in (({}, 0.001), ({"margin": 0.3}, 0.3)):
        loss = patch_dpo.dro_loss(expert, ref_expert, policy, ref_policy, **how)
        assert_close(loss, torch.relu(margin + gap))


def test_patch_flow_is_the_straight_way_to_noise():
    x_0 = noise(3, 2, 4)
    eps = noise(3, 2, 4, seed=1)
    x, v = patch_dpo.flow(x_0, eps, torch.tensor([0.0, 0.25, 1.0]))
    assert same(x[0], x_0[0])
    assert_close(x[1], 0.75 * x_0[1] + 0.25 * eps[1])
    assert same(x[2], eps[2])
    assert_close(v, eps - x_0)


def test_dro_trajectory_is_eulers_from_a_random_start():
    """Each point is the last one minus v / steps, with the velocity that was found there at its
    time; times fall by 1 / steps from a start of each sample's own in (1 - 1 / steps, 1]."""
    stage = picture_stage("patch --loss dro --micro 2 --paint-steps 4")[0]

    def velocity(who, item, x, t):
        assert who == "sampler" and len(item) == len(x) == len(t) <= 2
        return 2 * x + t[:, None, None]

    with mock.patch.object(stage, "velocity", velocity):
        item, t, x, v = stage.fill_buffer(7)
    g = qwen.generator_for(0, "buffer", 7)
    want = patch_dpo.random_indices(5, 4, g)
    assert (item == want[:, None]).all()
    start = [torch.randn(4, 64, generator=g) for _ in item]
    assert same(x[:, 0], torch.stack(start))
    late = torch.rand(5, 1, generator=g)
    assert_close(t, (torch.tensor([4.0, 3, 2, 1]) - late) / 4)
    assert_close(v, 2 * x + t[:, :, None, None])
    assert_close(x[:, 1:], x[:, :-1] - v[:, :-1] / 4)


def test_dro_random_indices_repeat_only_where_they_must():
    """Fewer than there are: all different; more: nobody is left out; each comes to be first."""
    for n, limit, most in (
        (4, 9, 1),
        (9, 9, 1),
        (9, 4, 3),
        (8, 4, 2),
    ):
        found = patch_dpo.random_indices(n, limit, seeded())
        count = found.bincount(minlength=limit)
        assert len(found) == n
        assert len(count) == limit
        assert count.max() == most
        assert count.min() >= n // limit
    first = set()
    for i in range(40):
        found = patch_dpo.random_indices(2, 5, seeded(i))
        first.add(found[0].item())
    assert first == set(range(5))


# ---- patch_dpo.py: features ----------------------------------------------------------------------

ENCODER = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]


def features_of(mean=MEAN, std=STD, **changes):
    """A random f of ENCODER's sizes."""
    return patch_dpo.ImageFeatures({**ENCODER, **changes}, torch.tensor([mean, std]))


def test_patch_features_equal_transformers(tmp_path):
    """DINOv2 and both layouts of ViT: random checkpoints with public preprocessing, at the trained
    size and at another; the map, the class token, and all tokens."""
    tf = peer("transformers")
    sizes = {name: value for name, value in ENCODER.items() if name != "model_type"}
    vit = tf.ViTConfig(**sizes, intermediate_size=64)
    dino = tf.Dinov2Config(**sizes, layerscale_value=0.5)
    write_lines(tmp_path / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    for model in (tf.Dinov2Model(dino), tf.ViTModel(vit), tf.ViTForImageClassification(vit)):
        loud(model).save_pretrained(tmp_path)
        f = patch_dpo.ImageFeatures.load(tmp_path)
        for size in ((32, 32), (48, 24)):
            x = torch.rand(2, 3, *size, generator=seeded())
            how = {} if model.base_model_prefix == "dinov2" else {"interpolate_pos_encoding": True}
            trunk = getattr(model, "vit", model)
            theirs = trunk((x - mean) / std, **how).last_hidden_state
            image = 2 * x - 1
            assert_close(f.tokens(image), theirs, 1e-4)
            assert_close(f(image).flatten(1, 2), theirs[:, 1:], 1e-4)
            assert_close(f.embed(image), theirs[:, 0], 1e-4)


def test_patch_features_of_the_miniature_are_the_recorded():
    """mini/vit, at its own size, at another that its patch divides, and at one that it does not."""
    f = patch_dpo.ImageFeatures.load(MINI / "vit")
    assert not f.training
    assert (f.patch, f.side) == (16, 192)
    with torch.no_grad():
        for (height, width), (H, W), numbers in RECORDED_FEATURES:
            x = noise(2, 3, height, width).clamp(-1, 1)
            tokens = f.tokens(x)
            assert_recorded(tokens, *numbers)
            assert f.cells(x) == [H, W]
            patches = tokens[:, 1:]
            assert same(f(x), patches.unflatten(1, (H, W)))
            assert same(f.embed(x), tokens[:, 0])
            assert_close(f(x[1:])[0], f(x)[1], 1e-5)


RECORDED_FEATURES = [
    ((192, 192), (12, 12), (-2.6138, 3.0728, -3.0829, -1.6893)),
    ((96, 160), (6, 10), (-0.15483, -2.9877, -0.43071, 2.0942)),
    ((74, 100), (5, 6), (-0.53381, -0.27057, -1.0905, -2.3556)),
    ((6, 26), (1, 2), (-0.273, 1.5117, 0.29489, -1.2003)),
]


def test_patch_features_of_other_encoders_are_the_recorded():
    """A ViT (no layer scale, a width of its own inside) and a DINOv2, with large random weights."""
    x = noise(2, 3, 40, 24).clamp(-1, 1)
    vit = {"model_type": "vit", "intermediate_size": 48}
    other = {"qkv_bias": False, "mlp_ratio": 2, "layer_norm_eps": 0.1}
    for changes, numbers in (
        ({}, (0.38988, -0.31628, 0.044367, -1.1649)),
        (vit, (0.20279, -1.1216, 0.16879, -1.3936)),
        (other, (-1.1392, -1.0176, 1.1168, 1.1897)),
    ):
        f = loud(features_of(**changes))
        assert_recorded(f(x), *numbers)


def test_patch_features_layer_is_attention_and_mlp_beside_the_residual():
    """By hand, head by head: x + s1 attention(norm1 x), then x + s2 mlp(norm2 x)."""
    layer = loud(patch_dpo.ViTLayer(ENCODER, patch_dpo.LayerScale))
    x = noise(1, 5, 32)
    parts = layer.attention.attention
    normed = layer.norm1(x)[0]
    heads = []
    for at in range(0, 32, 8):
        head = slice(at, at + 8)
        q = parts.query(normed)[:, head]
        k = parts.key(normed)[:, head]
        v = parts.value(normed)[:, head]
        score = q @ k.T / 8 ** 0.5
        heads.append(score.softmax(-1) @ v)
    attended = layer.attention.output.dense(torch.cat(heads, dim=1))
    x = x + layer.layer_scale1.lambda1 * attended
    inner = layer.mlp.fc1(layer.norm2(x))
    inner = nn.functional.gelu(inner)
    want = x + layer.layer_scale2.lambda1 * layer.mlp.fc2(inner)
    assert_close(layer(noise(1, 5, 32)), want, 1e-5)
    assert layer.mlp.fc1.out_features == 128
    assert layer.norm1.eps == 1e-6


def test_patch_features_that_are_new_are_small():
    """What pretraining starts from: vectors of 0.02, layer scales of 1, positions of every patch
    and of the class token."""
    embeddings = features_of(hidden_size=128).embeddings
    assert embeddings.cls_token.shape == (1, 1, 128)
    assert embeddings.position_embeddings.shape == (1, 17, 128)
    for p in embeddings.cls_token, embeddings.position_embeddings:
        assert 0.016 < p.std() < 0.024
    assert (patch_dpo.LayerScale(3).lambda1 == 1).all()


def test_patch_features_take_public_names_and_refuse_other_encoders():
    """Both ViT layouts and DINOv2's names become ours; another kind is named."""
    layer = "encoder.layer.0"
    for public, ours in (
        (f"dinov2.{layer}.norm1.weight", f"{layer}.norm1.weight"),
        (f"vit.{layer}.layernorm_before.weight", f"{layer}.norm1.weight"),
        (f"{layer}.layernorm_after.bias", f"{layer}.norm2.bias"),
        (f"{layer}.intermediate.dense.weight", f"{layer}.mlp.fc1.weight"),
        (f"{layer}.output.dense.weight", f"{layer}.mlp.fc2.weight"),
        (f"{layer}.attention.output.dense.bias", f"{layer}.attention.output.dense.bias"),
        ("embeddings.cls_token", "embeddings.cls_token"),
        ("vit.pooler.dense.weight", None),
        ("classifier.bias", None),
        ("dinov2.embeddings.mask_token", None),
    ):
        assert patch_dpo.ImageFeatures.rename(public) == ours
    raises("model_type is 'swin'; only 'dinov2', 'vit'", features_of, model_type="swin")
    raises("hidden_act is 'relu'", features_of, hidden_act="relu")


# ---- patch_dpo.py: image prompts -----------------------------------------------------------------

PROMPTED = {"guided": False, "singles": 2}


def prompted_flux():
    """(a tiny Flux, its inputs, an image prompt for features of width 24 that does something)"""
    model = tiny_flux(**PROMPTED)
    x = flux_inputs(flux_config(**PROMPTED), h=4, w=8)
    x["img_ids"] = flux.image_ids(4, 8)
    return model, x, loud(patch_dpo.ImagePrompt(model, 24))


def test_patch_image_prompt_adds_the_attention_of_each_reference():
    """One reference is Eq. S6, with queries and keys turned by their places; two add up (S7),
    times scale; every block has keys and values of its own."""
    model, x, prompt = prompted_flux()
    references = noise(2, 2, 4, 24)
    q = noise(2, 3, 8, 16, seed=1)
    corners = torch.tensor([                        # 2 x 2 patches over 2 x 4 tokens
        [0, 0, 0.5],
        [0, 0, 2.5],
        [0, 1, 0.5],
        [0, 1, 2.5],
    ])
    assert_close(prompt.places(4, x["img_ids"]), corners)
    turn = flux.rope_table(x["img_ids"], model.axes)
    turn_ref = flux.rope_table(corners, model.axes)
    turned_q = flux.rotate(q.transpose(1, 2), turn)
    turned_q = turned_q.transpose(1, 2)
    for n, block in enumerate(model.blocks()):
        want = []
        for m in (0, 1):
            k = references[:, m] @ prompt.to_k_ip[n].weight.T
            v = references[:, m] @ prompt.to_v_ip[n].weight.T
            k = flux.rotate(k.unflatten(-1, (3, 16)), turn_ref)
            v = v.unflatten(-1, (3, 16)).transpose(1, 2)
            k = k.transpose(1, 2)
            score = turned_q @ k.mT / 4                                     # 4 = sqrt(16)
            want.append(score.softmax(-1) @ v)                              # (S6)
            prompt.attend_to(model, references[:, m:m + 1], x["img_ids"])
            assert_close(block.attn.image_prompt(q), want[m], 1e-5)
        prompt.attend_to(model, references, x["img_ids"])
        assert_close(block.attn.image_prompt(q), want[0] + want[1], 1e-5)   # (S7)
        prompt.scale = 0.3
        assert_close(block.attn.image_prompt(q), 0.3 * (want[0] + want[1]), 1e-5)
        prompt.scale = 1.0
    assert len(prompt.to_k_ip) == len(prompt.to_v_ip) == 4


def test_patch_image_prompt_comes_and_goes(tmp_path):
    """Untrained it changes nothing; trained it does; saved and loaded it is the same, at the scale
    that is asked for; references=None takes it away."""
    model, x, prompt = prompted_flux()
    references = noise(2, 2, 4, 24)
    plain = model(**x)
    fresh = patch_dpo.ImagePrompt(model, 24)
    fresh.attend_to(model, references, x["img_ids"])
    assert same(model(**x), plain)
    assert all(w.weight.any() for w in fresh.to_k_ip)
    prompt.attend_to(model, references, x["img_ids"])
    moved = model(**x)
    assert relative(moved, plain) > 1e-3
    file = tmp_path / "prompt.safetensors"
    prompt.save(file)
    patch_dpo.ImagePrompt.load(file, model).attend_to(model, references, x["img_ids"])
    assert same(model(**x), moved)
    assert patch_dpo.ImagePrompt.load(file, model, 0.5).scale == 0.5
    prompt.attend_to(model, None)
    assert same(model(**x), plain)


def test_patch_image_prompt_of_other_features_or_another_flux_is_refused(tmp_path):
    """Features of another width name --features; a file for a Flux with more blocks is named."""
    model, x, prompt = prompted_flux()
    other = noise(2, 1, 4, 5)
    message = raises("--features gives 5", prompt.attend_to, model, other, x["img_ids"])
    assert "trained on 24" in message
    file = tmp_path / "prompt.safetensors"
    prompt.save(file)
    raises("to_k_ip.4.weight", patch_dpo.ImagePrompt.load, file, tiny_flux(singles=3))
    save_file({"x": torch.zeros(1)}, file)
    raises(str(file), patch_dpo.ImagePrompt.load, file, model)


def test_patch_image_prompt_is_fp32_beside_a_bf16_flux():
    """Queries in bf16 are turned and compared in fp32; what is added is rounded once."""
    model, x, prompt = prompted_flux()
    prompt.attend_to(model, noise(2, 2, 4, 24), x["img_ids"])
    added = model.transformer_blocks[0].attn.image_prompt
    q = noise(2, 3, 8, 16).bfloat16()
    assert same(added(q), added(q.float()).bfloat16())


def test_patch_image_prompt_of_the_miniature_gives_the_recorded_velocity():
    """mini/flux with mini/image_prompt on mini/vit's features of two pictures."""
    model = flux.Flux.load(MINI / "flux/transformer")
    f = patch_dpo.ImageFeatures.load(MINI / "vit")
    prompt = patch_dpo.ImagePrompt.load(MINI / "image_prompt/image_prompt.safetensors", model)
    ids = flux.image_ids(8, 8)
    inputs = {
        "img": noise(1, 16, 64),
        "txt": noise(1, 5, 128, seed=1),
        "pooled": noise(1, 64, seed=2),
        "timestep": torch.tensor([0.6]),
        "guidance": torch.tensor([1.0]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        images = noise(2, 3, 128, 128, seed=3).clamp(-1, 1)
        maps = f(images).flatten(1, 2)
        prompt.attend_to(model, maps[None], ids)
        assert_recorded(model(**inputs), 1.9899, 1.0807, 0.82869, -0.22999)


def write_xlabs(file, model, width, token=12, count=4):
    """A random IP-Adapter for the Flux `model` in XLabs' layout, for picture embeddings of `width`:
    `count` tokens of `token` numbers."""
    shapes = {
        "ip_adapter_proj_model.norm.bias": (token,),
        "ip_adapter_proj_model.norm.weight": (token,),
        "ip_adapter_proj_model.proj.bias": (count * token,),
        "ip_adapter_proj_model.proj.weight": (count * token, width),
    }
    for n, block in enumerate(model.transformer_blocks):
        inner = block.attn.to_q.out_features
        for kind in "kv":
            name = f"double_blocks.{n}.processor.ip_adapter_double_stream_{kind}_proj"
            shapes |= {f"{name}.bias": (inner,), f"{name}.weight": (inner, token)}
    save_file({name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}, file)
    return file


def peer_adapter(theirs, file):
    """diffusers' transformer with the IP-Adapter in the file: the pipeline's mixin."""
    mixin = importlib.import_module("diffusers.loaders.ip_adapter").FluxIPAdapterMixin
    pipe = mixin()
    pipe.transformer = theirs
    pipe.load_ip_adapter(str(file.parent), file.name, "")
    return pipe


def test_patch_ip_adapter_equals_diffusers(tmp_path):
    """XLabs' file by load_ip_adapter: velocities for one and several pictures, at one scale and at
    one for each block; taken away, nothing is left; saved it is the file."""
    config = flux_config()
    theirs = loud(peer("diffusers").FluxTransformer2DModel(**config))
    ours = reload(theirs, flux.Flux)
    x = flux_inputs(config)
    plain = ours(**x)
    file = write_xlabs(tmp_path / "ip_adapter.safetensors", ours, 7)
    pipe = peer_adapter(theirs, file)
    for pictures, scale in ((1, 1.0), (3, 0.7), (2, [0.3, 0.9])):
        references = noise(2, pictures, 7, seed=pictures)
        pipe.set_ip_adapter_scale(scale)
        embeds = {"ip_adapter_image_embeds": [references]}
        (want,) = ask(theirs, x, joint_attention_kwargs=embeds)
        prompt = patch_dpo.ImagePrompt.load(tmp_path, ours, scale)
        prompt.attend_to(ours, references, x["img_ids"])
        found = ours(**x)
        assert_close(found, want, 1e-5)
        assert relative(found, plain) > 1e-2
    other = patch_dpo.ImagePrompt(ours, 24)
    other.attend_to(ours, noise(2, 1, 4, 24), x["img_ids"])
    assert not ours.transformer_blocks[0].image_prompt
    other.attend_to(ours, None)
    assert same(ours(**x), plain)
    prompt.save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    stored = load_file(file)
    assert again.keys() == stored.keys()
    assert all(same(again[name], stored[name]) for name in stored)


def test_patch_ip_adapter_trains_its_keys_and_values_alone(tmp_path):
    """`train.py patch` from a random XLabs file, which sees with CLIP: the projection stays, keys
    and values of all blocks move, and diffusers reads what is saved, with the same velocities."""
    flags, _ = pictured()
    model = flux.Flux.load(MINI / "flux/transformer")
    width = json.loads((MINI / "clip/config.json").read_text())["projection_dim"]
    file = write_xlabs(tmp_path / "ip_adapter.safetensors", model, width, token=128)
    train_here(f"patch {flags} --image-prompt {file} --features {MINI}/clip --quality-features "
               f"{MINI}/vit --generated {tmp_path}/made --out {tmp_path}/run")
    before = load_file(file)
    result = tmp_path / "run/image_prompt.safetensors"
    after = load_file(result)
    moved = {name for name in before if not same(before[name], after[name])}
    assert moved == {name for name in before if "double_blocks" in name}
    kind = peer("diffusers").FluxTransformer2DModel
    config = json.loads((MINI / "flux/transformer/config.json").read_text())
    theirs = kind.from_pretrained(MINI / "flux/transformer")
    x = flux_inputs(config)
    references = noise(2, 2, width)
    peer_adapter(theirs, result)
    embeds = {"ip_adapter_image_embeds": [references]}
    (want,) = ask(theirs, x, joint_attention_kwargs=embeds)
    patch_dpo.ImagePrompt.load(result, model).attend_to(model, references)
    with torch.no_grad():
        assert_close(model(**x), want, 1e-4)


# ---- patch_dpo.py: edits and their pictures ------------------------------------------------------

def test_patch_scenes_reader_fills_in_pictures_and_names_the_line(tmp_path):
    """Pictures are found beside the file, an edit without one has its scene's, and knows scene,
    caption and line; what does not fit is named with file and line."""
    file = tmp_path / "scenes.jsonl"
    scene = {"image": "a.png", "caption": "a mug"}
    edit = {"edit_type": "color", "instruction": "Make it red"}
    write_lines(file, scene, {**scene, "edits": [edit, {**edit, "image": "b.png"}]})
    plain, edited = patch_dpo.read_scenes(file, "edit_type", "instruction")
    assert plain["edits"] == []
    assert plain["image"] == tmp_path / "a.png"
    assert edited["edits"][0] == {**edit, "image": tmp_path / "a.png", "scene": tmp_path / "a.png",
                                  "references": [tmp_path / "a.png"], "caption": "a mug", "line": 2}
    assert edited["edits"][1]["image"] == tmp_path / "b.png"
    number = {**edit, "instruction": 3}
    for bad, part in (
        ([1], "'int' object"),
        ([{"edit_type": "color"}], "'instruction'"),
        ([edit, number], "an edit has edit_type, instruction, all of them strings"),
        ([{**edit, "references": "b.png"}], "references: a list of file names"),
        ([{**edit, "references": []}], "references: a list of file names"),
        ("x", "TypeError"),
        (3, "TypeError"),
    ):
        write_lines(file, scene, scene, {**scene, "edits": bad})
        message = raises(part, patch_dpo.read_scenes, file, "edit_type", "instruction")
        assert message.startswith(f"{file}:3")
    write_lines(file, {**scene, "edits": [{}]})
    assert len(patch_dpo.read_scenes(file)) == 1


@functools.cache
def pictured():
    """(flags of tiny runs on pictures, a folder): three scenes with three edits each, made of
    shipped pictures; the last scene is held out."""
    pictured.folder = tempfile.TemporaryDirectory()
    d = Path(pictured.folder.name)
    edits = read_lines(SAMPLE / "scenes.jsonl")[0]["edits"]
    scenes = []
    for i in range(3):
        three = []
        for kind in ("background", "lighting", "color"):
            one = [row for row in edits if row["edit_type"] == kind][i]
            three.append({**one, "image": str(SAMPLE / one["image"])})
        scenes.append({"image": three[0]["image"], "caption": f"mug {i}", "edits": three})
    write_lines(d / "scenes.jsonl", *scenes)
    flags = "--size 32 --held-out 1 --paint-steps 3 --steps 3 --batch 4 --micro 2 --warmup 0"
    return f"--scenes {d}/scenes.jsonl {flags} --lr 1e-3 --device cpu --buffer 5", d


def picture_stage(command="patch"):
    """(stage, its settings, LoopSettings) of `train.py command` on those pictures."""
    flags, d = pictured()
    if command.startswith("patch"):
        flags += f" --generated {d}/generated"
    name, _, more = command.partition(" ")
    return build_stage(f"{name} {flags} {more}")


def moved(stage):
    """The stage, its policy no longer its reference."""
    for i, p in enumerate(stage.tuned.policy.values()):
        p.data -= 0.05 * noise(*p.shape, seed=i)
    return stage


def test_patch_edits_are_split_by_scene_and_know_their_pictures():
    """The last scenes' edits only evaluate; every edit has its scene's and its true picture, at
    --size; each file is read once; prompts are caption and instruction."""
    edits = picture_stage("dro")[0]
    assert (edits.count, len(edits.rows), len(edits.pictures)) == (6, 9, 9)
    for n, row in enumerate(edits.rows):
        assert row["line"] == n // 3 + 1
        assert row["prompt"] == (f"mug {n // 3}", row["instruction"])
        scene = row["scene"]
        truth = row["image"]
        for file, place in ((scene, edits.scene[n]), (truth, edits.truth[n])):
            picture = flux.to_tensor(flux.read_square(file, 32))
            assert same(edits.pictures[place], picture)
            latent = flux.pack(edits.vae.encode(picture[None]))
            assert_close(edits.latent[place], latent[0], 1e-5)
    prompts = [f"mug {n // 3}. {row['instruction']}" for n, row in enumerate(edits.rows)]
    found = edits.texts(torch.arange(9))
    assert same(list(found), list(flux.encode_prompt(MINI / "flux", prompts)))
    assert edits.grid == (4, 4)
    assert same(edits.ids, flux.image_ids(4, 4))
    assert edits.latent.shape == (9, 4, 64)
    assert not edits.latent.requires_grad


def test_patch_edits_of_an_image_prompt_leave_the_object_what_it_was():
    """Background, lighting and added things, described by the instruction alone; Flux is frozen."""
    edits = picture_stage("patch --loss dro")[0]
    assert edits.count == 4
    assert len(edits.rows) == 6
    assert {row["edit_type"] for row in edits.rows} == {"background", "lighting"}
    assert all(row["prompt"] == row["instruction"] for row in edits.rows)
    assert patch_dpo.SAME_OBJECT == ("background", "lighting", "object")
    assert not any(p.requires_grad for p in edits.flux.parameters())


def test_patch_edits_are_worded_as_often_as_asked():
    """Each wording makes an edit of its own; held-out edits have the last one."""
    settings = picture_stage("dro")[1]
    with quiet():
        edits = patch_dpo.Edits(settings, ["color"], [patch_dpo.WHOLE, patch_dpo.ALONE])
    assert (edits.count, len(edits.rows)) == (4, 5)
    prompts = [row["prompt"] for row in edits.rows]
    assert prompts[0] == ("mug 0", prompts[1])
    assert prompts[2] == ("mug 1", prompts[3])
    assert isinstance(prompts[4], str)


def test_patch_edits_hold_a_prompt_once_in_main_memory():
    """Edits with the same words share one entry of the text encoders' states; the last is of no
    words."""
    settings = picture_stage("dro")[1]
    with quiet():
        edits = patch_dpo.Edits(settings, ["color"], [patch_dpo.ALONE, patch_dpo.ALONE])
        once = patch_dpo.Edits(settings, ["color"], [patch_dpo.ALONE])
    assert (len(edits.rows), len(once.rows), len(edits.txt), len(edits.pooled)) == (5, 3, 4, 4)
    assert same(list(edits.texts(torch.tensor([0, 1, 2, 3, 4]))),
                list(once.texts(torch.tensor([0, 0, 1, 1, 2]))))
    words, which = patch_dpo.different(["b", ("a", "b"), "b", "c"])
    assert words == ["b", ("a", "b"), "c"] and which.tolist() == [0, 1, 0, 2]


def test_patch_edits_that_cannot_be_used_are_refused():
    """Too many scenes held out, no edit of the kinds that are wanted, a size between tokens."""
    raises("--held-out 3 leaves no edit (of any type)", picture_stage, "dro --held-out 3")
    raises("(background, lighting, object) to", picture_stage, "patch --loss dro --held-out 3")
    raises("--size is 40; it must be a multiple of 16", picture_stage, "dro --size 40")
    raises("--size is 36; it must be a multiple of 16", picture_stage, "dro --size 36")
    flags, d = pictured()
    rows = read_lines(d / "scenes.jsonl")
    write_lines(d / "held.jsonl", *rows[:2], {**rows[2], "edits": []})
    raises("leaves no edit", picture_stage, f"dro --scenes {d}/held.jsonl")


def test_patch_pictures_go_through_the_networks_in_parts():
    """--micro at a time, in order; a decoded picture is in [-1, 1]."""
    edits = picture_stage("dro --micro 16")[0]
    sizes = []

    def twice(part):
        sizes.append(len(part))
        return 2 * part

    x = torch.arange(40)
    assert same(edits.in_parts(twice, x), 2 * x)
    assert sizes == [16, 16, 8]
    decoded = edits.decode(9 * noise(2, 4, 64))
    assert decoded.shape == (2, 3, 32, 32)
    assert decoded.abs().max() == 1


# ---- patch_dpo.py: what is trained ---------------------------------------------------------------

def velocity_of(stage, who, item, x, t):
    """The velocity (L, 64) of one edit at x and t, by Flux itself, with guidance 1."""
    stage.tuned.select(who, item[None])
    txt, pooled = stage.texts(item[None])
    found = stage.flux(
        img=x[None],
        txt=txt,
        pooled=pooled,
        timestep=t[None],
        guidance=torch.ones(1),
        img_ids=stage.ids,
        txt_ids=torch.zeros(txt.shape[1], 3)
    )
    return found[0].detach()


def squares(stage, who, item, point, t):
    """Mean squared error of that velocity at the point (x, v)."""
    x, v = point
    return (velocity_of(stage, who, item, x, t) - v).square().mean()


def on_the_way(x_0, eps, t):
    return (1 - t) * x_0 + t * eps, eps - x_0


def painted_files(folder):
    """{path below the folder: bytes} of what is generated there."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.glob("*/*")}


def test_patch_generated_pictures_and_their_quality_are_the_models():
    """Picture g of edit n is what the reference paints from the noise of (seed, g, n); its quality
    is that of its patches beside the scene's, and the other way round; its likeness that of the
    mean features."""
    stage, settings, _ = picture_stage()
    made = stage.painted
    assert made["latent"].shape == (4, 2, 4, 64)
    assert made["quality"].shape == (4, 2, 2, 2, 2)
    for n in range(4):
        item = torch.tensor([n])
        stage.tuned.select("reference", item)
        for sample in range(2):
            generator = qwen.generator_for((settings.seed, sample), "picture", n)
            latent = flux.denoise(
                stage.flux,
                torch.randn(1, 4, 64, generator=generator),
                *stage.texts(item),
                img_ids=stage.ids,
                levels=flux.sigmas(3, 4)
            )
            assert_close(made["latent"][n, sample], latent[0], 1e-5)
            picture = stage.vae.decode(flux.unpack(latent, 4, 4))
            scene = stage.pictures[stage.scene[item]]
            f_gen = stage.features(picture.clamp(-1, 1))
            f_ref = stage.features(scene)
            gen, ref = made["quality"][n, sample]
            want_gen = patch_dpo.patch_quality(f_gen, f_ref)[0]
            want_ref = patch_dpo.patch_quality(f_ref, f_gen)[0]
            assert_close(gen, want_gen, 1e-4)
            assert_close(ref, want_ref, 1e-4)
            means = (f_gen.mean((1, 2)), f_ref.mean((1, 2)))
            whole = torch.cosine_similarity(*means)
            assert_close(made["likeness"][n, sample], whole[0], 1e-4)


def test_patch_generated_pictures_are_made_once(tmp_path):
    """Every loss but dro reads the same files; dro needs none. What is missing, as of a run that
    was killed, is painted again, with the same bytes, and nothing else; a torn file is named."""
    command = f"patch --generated {tmp_path}/made"
    picture_stage(command)
    before = painted_files(tmp_path / "made")
    assert sorted(file.name for file in before) == [f"{n}.safetensors" for n in range(4)]
    with mock.patch.object(patch_dpo.Painted, "paint_and_judge", side_effect=AssertionError):
        for loss in ("patch", "reconstruction", "dpo", "dro"):
            assert picture_stage(f"{command} --loss {loss}")[0].items in (4, 8)
        picture_stage(f"patch --loss dro --generated {tmp_path}/nowhere")
    assert not (tmp_path / "nowhere").exists()
    (file,) = (tmp_path / "made").glob("*/2.safetensors")
    file.unlink()
    paint = patch_dpo.Painted.paint_and_judge
    with mock.patch.object(patch_dpo.Painted, "paint_and_judge", autospec=True,
                           side_effect=paint) as painted:
        picture_stage(command)
    ((_, _, item), _), = painted.call_args_list
    assert item.tolist() == [2]
    assert painted_files(tmp_path / "made") == before
    file.write_bytes(file.read_bytes()[:-9])
    raises(f"{file} is truncated", picture_stage, command)


def test_patch_generated_pictures_of_something_else_stand_apart(tmp_path):
    """Of other edits, size, number, steps, seed or features: painted anew beside the others."""
    command = f"patch --samples 1 --generated {tmp_path}"
    picture_stage(command)
    for n, flags in enumerate(("--held-out 2", "--size 64", "--samples 2", "--paint-steps 4",
                               "--seed 1", f"--quality-features {MINI}/vit"), 2):
        before = painted_files(tmp_path)
        settings = picture_stage(f"{command} {flags}")[1]
        after = painted_files(tmp_path)
        assert before.items() < after.items() and len(list(tmp_path.iterdir())) == n
        assert Path(settings.generated).parent == tmp_path


def test_patch_processes_share_the_painting_out(tmp_path):
    """Each of two processes paints what is missing of its half, and writes the bytes of one."""
    stage, settings, _ = picture_stage(f"patch --generated {tmp_path}/one")
    whole = painted_files(tmp_path / "one")
    for rank in (0, 1):
        settings.generated = f"{tmp_path}/two"
        with mock.patch.multiple(patch_dpo, RANK=rank, WORLD=2), contextlib.suppress(ValueError):
            with quiet():
                stage.generate()            # the first finds the files of the second missing
        assert len(painted_files(tmp_path / "two")) == (2, 4)[rank]
    settings.generated = f"{tmp_path}/two"
    with quiet():
        stage.generate()
    assert painted_files(tmp_path / "two") == whole


def test_patch_quality_has_features_of_its_own(tmp_path):
    """--quality-features judges, --features is what the image prompt sees, of references alone."""
    judge = features_of(patch_size=8)
    f = tmp_path / "f"
    f.mkdir()
    save_file(judge.state_dict(), f / "model.safetensors")
    write_lines(f / "config.json", {**ENCODER, "patch_size": 8})
    write_lines(f / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    stage = picture_stage(f"patch --quality-features {f} --generated {tmp_path}/made")[0]
    assert stage.painted["quality"].shape == (4, 2, 2, 4, 4)
    assert stage.tuned.maps.shape == (3, 4, 96)
    scene = stage.pictures[stage.scene[:1]]
    picture = stage.decode(stage.painted["latent"][0, :1])
    with torch.no_grad():
        want = patch_dpo.patch_quality(judge(picture), judge(scene))
    assert_close(stage.painted["quality"][0, 0, 0], want[0], 1e-4)


def test_patch_painting_does_not_depend_on_what_is_painted_beside_it():
    stage, settings, _ = picture_stage("patch --loss dro")
    found = []
    items = torch.tensor([2, 0, 3, 1])
    for settings.micro in (1, 3):
        found.append(stage.paint("policy", items, seed=5))
    assert_close(found[0], found[1], 1e-5)
    three = items[2:3]
    alone = stage.paint("policy", three, seed=5)
    assert_close(alone[0], found[0][2], 1e-5)
    other = stage.paint("policy", three, seed=6)
    assert relative(other, alone) > 1e-3


def test_patch_batch_is_noise_and_logit_normal_times():
    """Every row has noise and time of its own, from the generator alone; the times' logits have
    mean 0 and standard deviation 1."""
    stage = picture_stage()[0]
    rows = stage.draw([3, 1] * 500, seeded(2))
    generator = seeded(2)
    for item, eps, t, _ in rows[:3]:
        assert same(eps, torch.randn(4, 64, generator=generator))
        assert_close(t, torch.randn((), generator=generator).sigmoid())
    assert [row[0].item() for row in rows[:3]] == [3, 1, 3]
    logits = torch.stack([row[2] for row in rows]).logit()
    assert abs(logits.mean()) < 0.1
    assert abs(logits.std() - 1) < 0.1


def test_patch_drops_text_reference_and_both():
    """--drop .2: each a fifth of the rows, the edit then that without; N, 2N and 3N later stand the
    edits without text, without reference, without both, of the same pictures. dro drops text alone,
    in the buffer, for expert and policy; at 0, the default, nothing is dropped."""
    for command, kinds in (("patch", 4), ("patch --loss dpo", 4), ("dro --rank 2", 2)):
        stage = picture_stage(f"{command} --drop 0.2")[0]
        N = len(stage.rows)
        rows = stage.drop(torch.arange(1000) % N, seeded())
        share = torch.bincount(rows // N, minlength=4) / 1000
        assert_close(share[1:kinds], torch.full((kinds - 1,), 0.2), 0.15)
        assert not share[kinds:].any()
        assert (rows % N == torch.arange(1000) % N).all()
        rows = stage.draw(list(range(4)) * 9, seeded())
        where = 0 if command.startswith("dro") else 3
        assert max(row[where] for row in rows) >= N
        assert set(stage.describe(rows).partition("lines ")[2].split(", ")) <= {"1", "2"}
        assert stage.loss(rows[:5])[0].isfinite()
        kept = picture_stage(command)[0]
        assert (kept.drop(torch.arange(4), seeded()) == torch.arange(4)).all()
    stage = moved(picture_stage()[0])
    N = len(stage.rows)
    one = torch.tensor([1])
    x = noise(1, 4, 64)
    t = torch.ones(1)
    empty = flux.encode_prompt(MINI / "flux", [""])
    for kind in range(4):
        item = one + kind * N
        assert same([stage.scene[item], stage.truth[item]], [stage.scene[one], stage.truth[one]])
        assert same(list(stage.texts(item)), list(empty if kind % 2 else stage.texts(one)))
        found = stage.velocity("reference", item, x, t)
        stage.tuned.prompts["reference"].scale = float(kind < 2)
        assert_close(found, stage.velocity("reference", one + kind % 2 * N, x, t), 1e-6)


def test_patch_stage_loss_is_s1_of_both_pictures():
    """By hand: the generated picture with its weights, and its reference with what went missing,
    at the same noise and time; for both powers, and for equal weights."""
    for flags, power in (("", 2), ("--power 1", 1), ("--loss reconstruction", 2)):
        stage, settings, _ = picture_stage(f"patch {flags}")
        moved(stage)
        made = stage.painted
        rows = draw_batch(stage, settings)
        want = 0
        for picture, eps, t, shown in rows:
            item = picture // 2
            assert shown == item
            quality = made["quality"][item, picture % 2]                    # (2, 2, 2)
            good, missed = patch_dpo.patch_weights(quality, (4, 4))
            weights = [good, 1 - missed]
            if "reconstruction" in flags:
                weights = [0.5, 0.5]
            scene = stage.latent[stage.scene[item]]
            for x_0, weight in zip((made["latent"][item, picture % 2], scene), weights):
                x, v = on_the_way(x_0, eps, t)
                error = velocity_of(stage, "policy", item, x, t) - v
                error = flux.unpack(error[None], 4, 4)
                weighted = weight ** power * error ** 2
                want += weighted.mean()
        loss, metrics = stage.loss(rows)
        assert_close(loss, want, 1e-5)
        assert metrics == {}
        assert stage.items == 8
        assert loss.requires_grad


def test_patch_learns_of_several_references(tmp_path):
    """An edit's "references" are what it sees, its patches are compared with the patches of all,
    and the loss takes the mean over what went missing of each; an edit may have fewer."""
    flags, d = pictured()
    scenes = read_lines(d / "scenes.jsonl")
    scenes[0]["edits"][1]["references"] = [scenes[0]["image"], scenes[1]["image"]]
    write_lines(tmp_path / "scenes.jsonl", *scenes)
    command = f"patch {flags} --scenes {tmp_path}/scenes.jsonl --generated {tmp_path}/generated"
    stage, settings, _ = build_stage(command)
    moved(stage)
    n = [row["instruction"] for row in stage.rows].index(scenes[0]["edits"][1]["instruction"])
    two = (stage.references >= 0).sum(1)
    assert two.tolist() == [2 if i == n else 1 for i in range(len(stage.rows))] * 4
    pictures = stage.pictures[stage.references[n]]
    made = {key: value[n, 0] for key, value in stage.painted.items()}
    f_gen = stage.features(stage.decode(made["latent"][None]))
    f_ref = stage.features(pictures)
    both = f_ref.flatten(0, 1)[None]                                        # (1, 2 H, W, D)
    assert_close(made["quality"][0], patch_dpo.patch_quality(f_gen, both)[0], 1e-4)
    for m in range(2):
        want = patch_dpo.patch_quality(f_ref[m:m + 1], f_gen)[0]
        assert_close(made["quality"][1 + m], want, 1e-4)
    rows = [(torch.tensor(2 * n), noise(4, 64), torch.tensor(0.4), torch.tensor(n))]
    good, *missed = [patch_dpo.patch_weights(q[None], (4, 4))[0] for q in made["quality"]]
    targets = [(made["latent"], good, 1)]
    for m in range(2):
        targets.append((stage.latent[stage.references[n, m]], 1 - missed[m], 0.5))
    want = 0
    for x_0, weight, share in targets:
        x, v = on_the_way(x_0, *rows[0][1:3])
        error = velocity_of(stage, "policy", rows[0][3], x, rows[0][2]) - v
        want += share * (weight ** 2 * flux.unpack(error[None], 4, 4) ** 2).mean()
    assert_close(stage.loss(rows)[0], want, 1e-5)
    assert settings.loss == "patch"


def test_patch_dpo_prefers_the_picture_that_is_more_like_the_reference():
    """Winner and loser are an edit's most and least like picture; the loss is Diffusion-DPO's of
    both at one noise and time, and ln 2 before the first step."""
    stage, settings, _ = picture_stage("patch --loss dpo --beta 30 --samples 3 --seed 1")
    latent = stage.painted["latent"]
    likeness = stage.painted["likeness"]                                    # (4, 3)
    rows = draw_batch(stage, settings)
    loss, metrics = stage.loss(rows)
    assert_close(loss, 4 * math.log(2), 1e-5)
    moved(stage)
    want = []
    for item, eps, t, _ in rows:
        win = on_the_way(latent[item, likeness[item].argmax()], eps, t)
        lose = on_the_way(latent[item, likeness[item].argmin()], eps, t)
        gap = 0
        for sign, point in ((1, win), (-1, lose)):
            for side, who in ((1, "policy"), (-1, "reference")):
                gap += sign * side * squares(stage, who, item, point, t)
        want.append(torch.log1p(torch.exp(15 * gap)))
    loss, metrics = stage.loss(rows)
    assert_close(loss, sum(want), 1e-4)
    assert metrics == {"accuracy": sum(value < math.log(2) for value in want)}
    assert 0 < metrics["accuracy"] < 4
    assert stage.items == 4
    raises("--samples is 1; --loss dpo needs", picture_stage, "patch --loss dpo --samples 1")


def test_dro_loss_is_that_of_an_experts_picture_and_of_the_policys_own_way():
    """By hand, for the image prompt (experts: the scenes' pictures) and the LoRA (the true
    pictures): expert and policy share prompt and time."""
    for command in ("patch --loss dro", "dro --rank 2"):
        stage, settings, _ = picture_stage(command)
        rows = draw_batch(stage, settings)
        _, metrics = stage.loss(rows)
        assert metrics["drift"] < 1e-6
        moved(stage)
        rows = draw_batch(stage, settings, 1)
        moved(stage)
        losses = []
        drift = 0
        for item, t, x, v, eps in rows:
            picture = stage.truth[item] if "rank" in command else stage.scene[item]
            expert = on_the_way(stage.latent[picture], eps, t)
            drift += squares(stage, "reference", item, (x, v), t)
            gap = 0.001
            for sign, point in ((1, expert), (-1, (x, v))):
                for side, who in ((1, "policy"), (-1, "reference")):
                    gap += sign * side * squares(stage, who, item, point, t)
            losses.append(gap.clamp(0))
        loss, metrics = stage.loss(rows)
        assert_close(loss, sum(losses), 1e-3)
        assert 0 < metrics["active"] == sum(value > 0 for value in losses)
        assert_close(metrics["drift"], drift, 1e-4)
        assert loss.requires_grad


def test_dro_rows_are_points_of_the_samplers_trajectories():
    """Each row has an edit, its expert's noise, and t, x and the sampler's velocity there; the
    rows of a batch come from different trajectories, at random steps."""
    stage, settings, _ = picture_stage("patch --loss dro --batch 5")
    moved(stage)
    rows = draw_batch(stage, settings)
    item, t, x, v = stage.buffer
    assert x.shape == v.shape == (5, 3, 4, 64)
    assert t.shape == item.shape == (5, 3)
    assert set(item[:, 0].tolist()) == {0, 1, 2, 3}
    seen = []
    for which, time_, point, velocity, eps in rows:
        (i,), (step,) = torch.where(t == time_)
        assert (item[i] == which).all()
        assert same(x[i, step], point)
        assert same(v[i, step], velocity)
        assert_close(velocity_of(stage, "sampler", which, point, time_), velocity, 1e-5)
        assert_close(velocity_of(stage, "policy", which, point, time_), velocity, 1e-5)
        seen.append((i.item(), step.item()))
    assert len({i for i, _ in seen}) == 5
    assert len({step for _, step in seen}) > 1
    assert len({row[-1].sum().item() for row in rows}) == 5
    assert_close(x[:, 1:], x[:, :-1] - v[:, :-1] / 3)
    assert len(draw_batch(picture_stage("dro --buffer 2")[0], settings)) == 5


def test_dro_processes_share_the_trajectories_out():
    """The processes' buffers add up to that of one, bit for bit, and each paints its share."""
    for command in ("patch --loss dro", "dro --rank 2"):
        stage = moved(picture_stage(f"{command} --buffer 5 --micro 1")[0])
        velocity = stage.velocity
        passes = []

        def counted(who, *point):
            passes[-1] += 1
            return velocity(who, *point)

        def buffer(rank, world):
            passes.append(0)
            with mock.patch.multiple(patch_dpo, RANK=rank, WORLD=world, all_reduce=mock.Mock()):
                return stage.fill_buffer(3)

        with mock.patch.object(stage, "velocity", counted):
            item, t, x, v = buffer(0, 1)
            first, second = buffer(0, 2), buffer(1, 2)
        assert passes == [15, 9, 6]
        assert same(first[2] + second[2], x)
        assert same(first[3] + second[3], v)
        assert x.any(dim=-1).all() and v.any(dim=-1).all()
        for one in (first, second):
            assert same(one[0], item) and same(one[1], t)


def test_dro_sampler_becomes_the_policy_every_refresh_steps():
    """--refresh 2: in steps 0, 2, 4 ... the sampler is the policy and paints a new buffer, with its
    own weights also after a break; between them both stay, and so does the policy while the
    sampler paints; policy, sampler, average and step are what a checkpoint holds."""
    for command in ("patch --loss dro --refresh 2", "dro --refresh 2 --rank 2"):
        stage, settings, _ = picture_stage(command)
        (group,) = stage.parameter_groups()
        held = dict(group["params"])
        assert set(held) == {"steps_drawn", "sampler", "average", *stage.tuned.policy}
        assert {p.requires_grad for p in stage.tuned.policy.values()} == {True}
        for name in ("sampler", "average", "steps_drawn"):
            assert not held[name].requires_grad
        buffers = []
        for step in range(4):
            moved(stage)
            before = end_to_end(stage.tuned.policy)
            if step == 3:
                stage.buffer = None                     # as after a break
            draw_batch(stage, settings, step)
            buffers.append(stage.buffer[2])
            assert same(end_to_end(stage.tuned.policy), before)
            assert same(before, held["sampler"]) == (step % 2 == 0)
        assert buffers[0] is buffers[1]
        assert same(buffers[2], buffers[3])
        assert relative(buffers[0], buffers[2]) > 0.1
        assert held["steps_drawn"] == 4


def end_to_end(tensors):
    """The values of a dict of tensors, end to end."""
    return torch.cat([p.detach().flatten() for p in tensors.values()])


def test_dro_saves_the_average_of_the_policy(tmp_path):
    """--ema .15: of the weights after each step, n / (n + 9) after few; without it the policy
    itself, bit for bit."""
    for command, file in (("dro --rank 2", "adapter_model"), ("patch --loss dro", "image_prompt")):
        for flags, decays in (
            ("--ema 0.15", (0.1, 0.15)),
            ("--ema 0.9", (1 / 10, 2 / 11)),
            ("", (0, 0)),
        ):
            stage, settings, _ = picture_stage(f"{command} {flags}")
            want = end_to_end(stage.tuned.policy)
            draw_batch(stage, settings)
            for step, decay in enumerate(decays, 1):
                moved(stage)
                want = decay * want + (1 - decay) * end_to_end(stage.tuned.policy)
                if step < 2:
                    draw_batch(stage, settings, step)
            last = end_to_end(stage.tuned.policy)
            stage.save(tmp_path)
            found = end_to_end(stage.tuned.policy)
            assert_close(found, want, 1e-5)
            assert same(found, last) == (not flags)
            saved = end_to_end(load_file(tmp_path / f"{file}.safetensors"))
            assert_close(saved.sort().values, found.sort().values, 1e-6)


def test_dro_reference_stays_where_the_policy_began():
    """Whatever the policy becomes, the reference's velocity is the first one; the sampler's is the
    policy's; neither has a gradient; the LoRA stands in the attention's four layers."""
    for command in ("patch --loss dro", "dro --rank 2"):
        stage = picture_stage(command)[0]
        item = torch.tensor([1, 0])
        x = noise(2, 4, 64)
        t = torch.tensor([0.3, 0.8])
        whose = ("reference", "sampler", "policy")
        before = [stage.velocity(who, item, x, t) for who in whose]
        assert same(before[0], before[1])
        assert same(before[0], before[2])
        assert [v.requires_grad for v in before] == [False, False, True]
        moved(stage)
        after = [stage.velocity(who, item, x, t) for who in whose]
        assert same(after[0], before[0])
        assert same(after[1], after[2])
        assert relative(after[2], before[0]) > 1e-3
        alone = velocity_of(stage, "policy", item[1], x[1], t[1])
        assert_close(after[2][1], alone, 1e-5)
    adapted = {name.partition(".attn.")[2] for name in lora.layers(stage.flux)}
    assert adapted == {"to_q", "to_k", "to_v", "to_out.0"}


def test_patch_reference_that_is_none_adds_nothing():
    """-1 among an edit's references is no picture: no keys, no values."""
    stage = picture_stage("patch --loss dro")[0]
    prompt = moved(stage).tuned.prompts["policy"]
    scene = stage.scene[:1, None]
    none = torch.full((1, 1), -1)
    item = torch.tensor([0])
    x = noise(1, 4, 64)
    t = torch.ones(1)
    found = []
    both = torch.cat([scene, none], dim=1)
    for references in (none, both, scene):
        stage.tuned = patch_dpo.ImagePrompts(stage, prompt, references)
        found.append(stage.velocity("sampler", item, x, t))
    prompt.attend_to(stage.flux, None)
    with mock.patch.object(stage.tuned, "select"):
        plain = velocity_of(stage, "", item[0], x[0], t[0])
    assert_close(found[0][0], plain, 1e-5)
    assert_close(found[1], found[2], 1e-5)
    assert relative(found[2][0], plain) > 1e-3


def test_patch_gradients_do_not_depend_on_micro_or_checkpointing():
    """Passes of 3 or 4 rows, blocks recomputed or not, give every loss the same gradient."""
    for command in ("patch", "patch --loss dpo", "patch --loss dro", "dro --rank 2"):
        found = []
        for flags in ("--micro 4", "--micro 3 --checkpointing"):
            stage, settings, _ = picture_stage(f"{command} {flags}")
            rows = draw_batch(stage, settings)
            parameters = list(moved(stage).tuned.policy.values())
            train.gradients(stage, settings, rows, parameters, step=0, stop=[])
            found.append(torch.cat([p.grad.flatten() for p in parameters]))
        assert stage.flux.checkpointing
        assert found[0].any()
        assert_close(found[1], found[0], 1e-4)


def test_patch_rows_are_described_by_their_lines():
    """Two generated pictures of an edit, or the edit: its scene's line of the file."""
    scenes = f"{pictured()[1]}/scenes.jsonl"
    stage = picture_stage()[0]
    rows = stage.draw([0, 3, 4], seeded())
    assert stage.describe(rows) == f"{scenes}, lines 1, 1, 2"
    stage = picture_stage("patch --loss dpo")[0]
    rows = stage.draw([1, 2], seeded())
    assert stage.describe(rows) == f"{scenes}, lines 1, 2"


def test_patch_result_is_an_image_prompt_and_a_sheet_of_pictures(tmp_path):
    """image_prompt.safetensors is the policy; pictures.png has a row each of scenes, reference's,
    policy's and true pictures of the held-out edits."""
    stage = picture_stage("patch --loss dro")[0]
    stage.save(tmp_path)
    sheet = np.array(Image.open(tmp_path / "pictures.png"))
    assert sheet.shape == (4 * 32, 2 * 32, 3)
    assert (sheet[32:64] == sheet[64:96]).all()
    for n, at in ((4, 0), (5, 32)):
        for row, key in ((0, "scene"), (96, "image")):
            shown = sheet[row:row + 32, at:at + 32]
            assert (shown == flux.read_square(stage.rows[n][key], 32)).all()
    latent = stage.paint("policy", torch.tensor([5]), seed=0)
    painted = flux.to_picture(stage.decode(latent)[0])
    apart = painted.astype(int) - sheet[64:96, 32:]
    assert np.abs(apart).max() <= 1
    moved(stage).save(tmp_path)
    again = np.array(Image.open(tmp_path / "pictures.png"))
    assert (again[32:64] == sheet[32:64]).all()
    assert (again[64:96] != sheet[64:96]).any()
    saved = load_file(tmp_path / "image_prompt.safetensors")
    policy = stage.tuned.policy
    assert saved.keys() == policy.keys()
    for name, p in policy.items():
        assert same(saved[name], p.data)


def test_dro_result_is_an_adapter_and_a_sheet_of_pictures(tmp_path):
    """adapter_model.safetensors is the policy, in PEFT's format; of 36 held-out edits every third
    is shown."""
    flags, d = pictured()
    first = read_lines(d / "scenes.jsonl")[0]
    apple = read_lines(SAMPLE / "scenes.jsonl")[0]
    apple["image"] = str(SAMPLE / apple["image"])
    apple["edits"] = apple["edits"][:36]
    for one in apple["edits"]:
        one["image"] = apple["image"]
    write_lines(d / "many.jsonl", first, apple)
    stage = picture_stage(f"dro --scenes {d}/many.jsonl --rank 3 --alpha 5 --micro 16")[0]
    moved(stage).save(tmp_path)
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.size == (12 * 32, 4 * 32)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    policy = lora.tensors(stage.flux, "policy")
    assert saved.keys() == policy.keys()
    for name, p in policy.items():
        assert same(saved[name], p.data)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0)
    assert config["base_model_name_or_path"] == "mini/flux"


def test_patch_first_steps_are_the_recorded_ones():
    """Losses and gradient norms of each stage's first steps, recorded once."""
    flags, d = pictured()
    for command, want in RECORDED_PICTURE_STEPS.items():
        out = d / command.replace(" ", "")
        name, _, more = command.partition(" ")
        if name == "patch":
            more += f" --generated {d}/generated"
        train_here(f"{name} {flags} {more} --out {out}")
        found = []
        for line in metrics_of(out):
            found.append([line["loss"], line["grad_norm"]])
        assert_close(torch.tensor(found), torch.tensor(want), 2e-3)
        assert len(list(out.glob("step_3"))) == 1


RECORDED_PICTURE_STEPS = {
    "patch": [[3.077439, 4.175163], [2.271424, 4.043349], [1.769751, 2.255066]],
    "patch --loss reconstruction --power 1":
        [[3.492, 4.38136], [2.551522, 3.850976], [2.321922, 2.869148]],
    "patch --loss dpo": [[0.693147, 9.120265], [0.098303, 1.190854], [0.021246, 0.33304]],
    "patch --loss dro --refresh 2 --lr 1e-7":
        [[0.001, 9.143279], [0.000762, 14.044122], [0.000555, 6.329591]],
    "dro --rank 2 --refresh 2 --lr 1e-7":
        [[0.001, 5.960904], [0.000992, 7.754961], [0.000943, 12.22055]],
}


def test_dro_resumed_inside_a_refresh_period_is_bit_equal():
    """Stopped by SIGTERM in step 3 of 4 and continued, a run with --refresh 2 has the bytes of an
    unbroken one. While the sampler is the reference the drift is 0, then it is not."""
    flags, d = pictured()
    loss = patch_dpo.DiffusionDRO.loss
    for name, kind in (("prompt", "patch --loss dro"), ("lora", "dro --rank 2")):
        command = f"{kind} {flags} --steps 4 --refresh 2 --save-every 9 --ema 0.9"
        train_here(f"{command} --out {d}/{name}_whole")
        calls = []

        def interrupted(self, rows):
            calls.append(1)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGTERM)
            return loss(self, rows)

        with mock.patch.object(patch_dpo.DiffusionDRO, "loss", interrupted):
            train_here(f"{command} --out {d}/{name}_halves")
        assert (d / f"{name}_halves/step_3").is_dir()
        train_here(f"{command} --out {d}/{name}_halves")
        for file in ("step_4/state.safetensors", "metrics.jsonl"):
            whole = (d / f"{name}_whole" / file).read_bytes()
            assert whole == (d / f"{name}_halves" / file).read_bytes()
        drift = [line["drift"] for line in metrics_of(d / f"{name}_whole")]
        assert max(drift[:2]) < 1e-6 < min(drift[2:])


def test_patch_two_processes_paint_and_train_as_one():
    """torchrun with two processes writes the same generated pictures, and takes the same steps, to
    1e-5."""
    flags, d = pictured()
    command = f"patch {flags} --steps 1 --micro 1"
    train_here(f"{command} --generated {d}/made1 --out {d}/one")
    out = shell("-m torch.distributed.run --standalone --nproc_per_node=2 train.py "
                f"{command} --generated {d}/made2 --out {d}/two")
    assert out.returncode == 0, out.stderr[-1000:]
    files = sorted(file.relative_to(d / "made1") for file in (d / "made1").glob("*/*"))
    assert len(files) == 4
    pairs = [(f"made1/{file}", f"made2/{file}") for file in files]
    for first, second in (*pairs, ("one/step_1/state.safetensors", "two/step_1/state.safetensors")):
        one = load_file(d / first)
        two = load_file(d / second)
        for name in one:
            assert_close(two[name], one[name], 1e-5)


def test_patch_paper_preset_is_the_published():
    """--preset paper is what the papers and the authors' code say."""
    for name, want in PICTURE_PAPER.items():
        _, settings, _ = train.parse([name, "--preset", "paper"])
        for field, value in want.items():
            assert getattr(settings, field) == value, (name, field)


PICTURE_PAPER = {
    "patch": {
        "steps": 30_000,
        "batch": 32,
        "lr": 3e-5,
        "clip": 0,
        "power": 2,
        "samples": 1,
        "size": 512,
        "flux": "black-forest-labs/FLUX.1-dev",
        "features": "openai/clip-vit-large-patch14",
        "image_prompt": "XLabs-AI/flux-ip-adapter-v2",
        "quality_features": "google/vit-base-patch16-224",
    },
    "dro": {
        "steps": 1600,
        "batch": 256,
        "lr": 1e-4,
        "clip": 1,
        "buffer": 256,
        "drop": 0.2,
        "ema": 0.9999,
        "refresh": 1,
        "paint_steps": 20,
        "size": 512,
        "weight_decay": 0.01,
        "dtype": "bf16",
    },
}


def test_patch_generated_pictures_know_what_they_depend_on(tmp_path):
    """A picture painted over since, or another image prompt in the same file, is noticed, and all
    is painted anew; the same files again are the same."""
    flags, d = pictured()
    scene = read_lines(d / "scenes.jsonl")
    for i, row in enumerate(scene):
        for one in (row, *row["edits"]):
            name = Path(one["image"]).name
            (tmp_path / name).write_bytes(Path(one["image"]).read_bytes())
            one["image"] = name
    write_lines(tmp_path / "scenes.jsonl", *scene)
    prompt = tmp_path / "prompt.safetensors"
    tensors = load_file(MINI / "image_prompt/image_prompt.safetensors")
    save_file(tensors, prompt)
    command = (f"patch --scenes {tmp_path}/scenes.jsonl --image-prompt {prompt} --samples 1 "
               f"--generated {tmp_path}/made")
    picture_stage(command)
    picture_stage(command)
    file = tmp_path / scene[0]["image"]
    whole = file.read_bytes()
    Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    made = tmp_path / "made"
    picture_stage(command)
    assert len(list(made.iterdir())) == 2
    file.write_bytes(whole)
    picture_stage(command)
    assert len(list(made.iterdir())) == 2
    tensors["to_k_ip.0.weight"][0] += 1
    save_file(tensors, prompt)
    picture_stage(command)
    assert len(list(made.iterdir())) == 3


def test_patch_features_follow_their_image_processor(tmp_path):
    """Any mean and std: the map is transformers', for what its image processor makes of the same
    picture. Pixels that are not brought to 0 .. 1, or not normalised, are refused."""
    tf = peer("transformers")
    sizes = {name: value for name, value in ENCODER.items() if name != "model_type"}
    model = loud(tf.Dinov2Model(tf.Dinov2Config(**sizes)))
    model.save_pretrained(tmp_path)
    picture = (255 * torch.rand(32, 32, 3, generator=seeded())).byte().numpy()
    for changes in ({}, {"image_mean": [1, 0.9, 0.8], "image_std": [0.5, 0.4, 0.3]}):
        processor = tf.BitImageProcessor(do_resize=False, do_center_crop=False, **changes)
        processor.save_pretrained(tmp_path)
        f = patch_dpo.ImageFeatures.load(tmp_path)
        pixels = processor(picture, return_tensors="pt").pixel_values
        theirs = model(pixels).last_hidden_state
        assert_close(f.tokens(flux.to_tensor(picture)[None]), theirs, 1e-4)
    for name, value in (("do_normalize", False), ("do_rescale", False), ("rescale_factor", 0.5)):
        write_lines(tmp_path / "preprocessor_config.json", {name: value})
        raises(f"preprocessor_config.json: {name} is", patch_dpo.ImageFeatures.load, tmp_path)
    for values in ([0.5], [0.5] * 4, "x", None):
        write_lines(tmp_path / "preprocessor_config.json", {"image_mean": values, "image_std": STD})
        raises("preprocessor_config.json", patch_dpo.ImageFeatures.load, tmp_path)


def test_patch_features_are_read_from_shards(tmp_path):
    """DINOv2 and ViT in shards and their index; of a ViT's settings qkv_bias may be left out."""
    tf = peer("transformers")
    sizes = {name: value for name, value in ENCODER.items() if name != "model_type"}
    write_lines(tmp_path / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    x = noise(1, 3, 32, 32).clamp(-1, 1)
    for kind, config in ((tf.Dinov2Model, tf.Dinov2Config(**sizes)),
                         (tf.ViTModel, tf.ViTConfig(**sizes, intermediate_size=64))):
        folder = tmp_path / kind.__name__
        found = []
        for size in ("20KB", "9MB"):
            model = loud(kind(config))
            model.save_pretrained(folder / size, max_shard_size=size)
            file = folder / size / "config.json"
            stored = json.loads(file.read_text())
            stored.pop("qkv_bias")
            write_lines(file, stored)
            write_lines(folder / size / "preprocessor_config.json",
                        {"image_mean": MEAN, "image_std": STD})
            found.append(patch_dpo.ImageFeatures.load(folder / size)(x))
        assert len(list((folder / "20KB").glob("*.safetensors"))) > 1 and same(*found)


def test_patch_image_prompts_of_others_are_refused_by_name(tmp_path):
    """InstantX' and SD's IP-Adapters, a file without tensors, none at all, half of XLabs', and
    XLabs' for a Flux with more blocks: one sentence, with what to give."""
    model = tiny_flux(**PROMPTED)
    file = tmp_path / "ip_adapter.safetensors"

    def refused(part, path=file):
        said = raises(part, patch_dpo.ImagePrompt.load, path, model)
        assert str(path) in said and "--image-prompt XLabs-AI/flux-ip-adapter-v2" in said
        assert len(said) < 500

    refused("none")
    refused("ip_adapter.bin", tmp_path / "ip_adapter.bin")
    for names in (["image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight"],
                  ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], []):
        save_file({name: torch.zeros(2, 2) for name in names}, file)
        refused("InstantX")
    save_file({patch_dpo.XLABS: torch.zeros(48, 7)}, file)
    refused("norm.weight")
    write_xlabs(file, tiny_flux(doubles=3), 7)
    refused("double_blocks.2.")


def test_patch_long_caption_keeps_the_instruction():
    """A prompt that does not fit loses the end of its caption, not what is asked."""
    flags, d = pictured()
    scenes = read_lines(d / "scenes.jsonl")
    found = []
    for instruction in ("Paint it gold", "Paint it blue"):
        rows = []
        for scene in scenes:
            edits = [{**row, "instruction": instruction} for row in scene["edits"]]
            rows.append({**scene, "caption": "a mug on a wooden table " * 99, "edits": edits})
        write_lines(d / "long.jsonl", *rows)
        found.append(picture_stage(f"dro --scenes {d}/long.jsonl")[0])
    assert relative(found[0].pooled, found[1].pooled) > 1e-3
    assert relative(found[0].txt, found[1].txt) > 1e-3


def test_patch_scenes_with_misspelt_keys_are_refused(tmp_path):
    """An edit's picture under "images", a scene's edits under "edit": file, line and key are named;
    a key that is like none of ours may stand there."""
    file = tmp_path / "scenes.jsonl"
    edit = {"edit_type": "color", "instruction": "Make it red", "image_id": 3, "source": "web"}
    scene = {"image": "a.png", "caption": "a mug", "licence": "none"}
    write_lines(file, {**scene, "edits": [edit]})
    assert len(patch_dpo.read_scenes(file, "edit_type", "instruction")) == 1
    for bad, key in (
        ({**scene, "edit": [edit]}, "edit"),
        ({**scene, "edits": [edit, {**edit, "images": "b.png"}]}, "images"),
        ({**scene, "edits": [{**edit, "attributes": "red"}]}, "attributes"),
    ):
        write_lines(file, scene, bad)
        said = raises(f'"{key}" is no key here', patch_dpo.read_scenes, file)
        assert said.startswith(f"{file}:2")


# ---- bench/: what its numbers rest on ------------------------------------------------------------

def bench(name):
    """A module of bench/."""
    if str(ROOT / "bench") not in sys.path:
        sys.path.append(str(ROOT / "bench"))
    return importlib.import_module(name)


def small_vit():
    config = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=2, image_size=32,
                  num_attention_heads=4, patch_size=8, mlp_ratio=4, hidden_act="gelu",
                  layer_norm_eps=1e-6, qkv_bias=True)
    torch.manual_seed(0)
    return patch_dpo.ImageFeatures(config, torch.full((2, 3), 0.5))


def test_bench_correspondence_follows_the_picture():
    """A patch is found where the other view shows its place."""
    features = bench("features")
    a = features.random_views(8, seeded(5))
    b = features.random_views(8, seeded(6))
    place = features.centres(64, 64).permute(2, 0, 1).expand(8, 2, 64, 64)
    seen_a, seen_b = (nn.functional.avg_pool2d(features.warp(place, view), 8).flatten(2)
                      for view in (a, b))                                   # (8, 2, 64)
    targets = features.correspondence(torch.linalg.inv(b) @ a, 8, 8)
    for here, there, target in zip(seen_a, seen_b, targets):
        seen = target >= 0
        apart = (here[:, seen] - there[:, target[seen]]).norm(dim=0)
        assert seen.sum() > 10 and apart.max() < 2 / 8


def test_bench_patch_training_teaches_f():
    """Self-supervised steps on fixed pictures raise S_patch on views of them that it never saw."""
    features = bench("features")
    f = small_vit()
    g = seeded(1)
    image = nn.functional.interpolate(2 * torch.rand(8, 3, 8, 8, generator=g) - 1, 32,
                                      mode="bicubic").clamp(-1, 1)
    a = features.random_views(8, seeded(5))
    b = features.random_views(8, seeded(6))
    target = features.correspondence(torch.linalg.inv(b) @ a, 4, 4)

    def score():
        with torch.no_grad():
            return features.s_patch(f(features.warp(image, a)), f(features.warp(image, b)), target)

    before = score()
    adam = torch.optim.Adam(f.parameters(), 2e-3)
    for _ in range(60):
        adam.zero_grad()
        features.self_supervised_loss(f, image, g).backward()
        adam.step()
    after = score()
    assert after[0] > before[0] + 0.1 and after[1] >= after[0], (before, after)


def test_bench_counts_the_flops_of_flux_as_plain_products():
    """From the shapes come the FLOPs that torch counts where every product is F.linear's and
    attention is not fused; oneDNN's products it does not see."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    peer("diffusers")
    picture = bench("picture")
    for size in ("--tiny", "--size=128"):
        args = bench("run").parse(["flux", "--device=cpu", size])
        scene = picture.Scene(args, num_layers=1, num_single_layers=2)
        plain = mock.patch.object(qwen, "linear", nn.functional.linear)
        with torch.no_grad(), plain, sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                scene.our_step()
        with torch.no_grad():
            assert picture.forward_flops(scene) == counter.get_total_flops()


def test_bench_gpu_part_that_fails_or_hangs_loses_only_itself(tmp_path):
    """A part that fails, hangs or finds something wrong is a line with the reason and the end of
    what it printed; others are written as they are; the table names them all."""
    gpu = bench("gpu")
    log = tmp_path / "log"
    say = [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep({})"]
    assert gpu.limited([sys.executable, "-c", "print(1)"], 60, log) == ""
    assert log.read_text() == "1\n"
    assert gpu.limited([sys.executable, "-c", "exit(3)"], 60, log) == "ended with 3"
    began = time.time()
    slow = [*say[:2], say[2].format(60)]
    line = gpu.run_part("pretrain x", slow, 5, tmp_path)
    assert time.time() - began < 30 and line["fault"] == "not done in 5 s"
    assert line["log"] == "so far\n"
    found = {"where": "a card", "text": "says", "summary": [["`decode`"] + 6 * ["x"]],
             "wrong": ["logits"], "memory": "1.00 GB"}
    write = f"import pathlib, sys; pathlib.Path(sys.argv[1][9:]).write_text({json.dumps(found)!r})"
    bad = gpu.run_part("parity", [sys.executable, "-c", write], 60, tmp_path)
    assert bad["fault"] == "wrong: logits" and bad["memory"] == "1.00 GB"
    text = gpu.markdown([line, bad])
    for part in ("a card", "not done in 5 s", "wrong: logits", "says", "`decode`"):
        assert part in text


def test_bench_gpu_parts_are_rows_and_checks():
    """Every row among the parts exists, and no part may take longer than the card is lent for."""
    gpu = bench("gpu")
    rows = set(gpu.PARTS) - {"parity", "determinism", "stages", "compiled"}
    assert rows <= set(bench("run").ROWS) and set(gpu.CHECK) < set(gpu.PARTS)
    assert sum(gpu.PARTS[name].limit for name in gpu.CHECK) <= 300
    assert all(part.limit <= 400 for part in gpu.PARTS.values())


def test_bench_gpu_sends_weights_back_in_pieces(tmp_path):
    """What --pretrain made comes back as files below 16 MB that are one tar."""
    import tarfile
    gpu = bench("gpu")
    weights = tmp_path / "mini/flux/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(os.urandom(2 * gpu.PIECE + 5))
    (tmp_path / "mini/flux/config.json").write_text("{}")
    (tmp_path / "mini/pictures.pt").write_text("large")
    gpu.pack(tmp_path / "mini", tmp_path)
    pieces = sorted(tmp_path.glob("pretrained.tar.*"))
    assert len(pieces) == 3 and all(piece.stat().st_size < 16e6 for piece in pieces)
    whole = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    with tarfile.open(fileobj=whole) as tar:
        assert set(tar.getnames()) == {"flux/config.json", "flux/model.safetensors"}
        assert tar.extractfile("flux/model.safetensors").read() == weights.read_bytes()


def test_bench_sizes_are_of_three_kinds():
    """--tiny and --random choose every size, a flag wins over both, and rates need no card."""
    parse = bench("run").parse
    for flags, side, layers in (([], 256, 8), (["--random"], 1024, 28), (["--tiny"], 64, 2)):
        args = parse(["flux", "--device=cpu", *flags])
        assert (args.size, args.layers) == (side, layers)
    assert parse(["flux", "--tiny", "--size=96"]).size == 96
    assert {len(row) for row in bench("run").SIZES} == {5}


# ---- bench/study.py ------------------------------------------------------------------------------

TASTES = [("ana", ["gold"], ["</script>"]), ("bo", ["wood"], []), ("cy", [], ["neon"])]


def edits_of(folder, shade, people=TASTES, source=None, caption="A mug", size=(32, 24)):
    """A folder that edit.py wrote: one PNG and JSON a person and their grid."""
    folder.mkdir()
    edits = []
    pictures = []
    for number, (user, likes, dislikes) in enumerate(people):
        settings = {"image": source and str(source), "caption": caption, "reference_scale": 1.5}
        edits.append({"user": user, "likes": likes, "dislikes": dislikes, "note": "generic",
                      "instruction": "", "reasons": {},
                      "prompt": f"A mug. Make it {user}'s", "settings": settings})
        pictures.append(np.array(Image.new("RGB", size, (shade, 10 * number, 0))))
    with contextlib.redirect_stdout(io.StringIO()):
        edit.write(folder / f"{folder.name}.png", None, edits, pictures)
    return str(folder)


def study_of(tmp_path, *flags, seed=0, **source):
    """(page, what it embeds, key) of a study of two folders "ours" and "theirs"."""
    study = bench("study")
    for name, shade in (("ours", 200), ("theirs", 100)):
        if not (tmp_path / name).exists():
            edits_of(tmp_path / name, shade, **source)
    out = tmp_path / f"study_{len(list(tmp_path.iterdir()))}"
    with contextlib.redirect_stdout(io.StringIO()):
        study.main(["--a", str(tmp_path / "ours"), "--b", str(tmp_path / "theirs"), "--out",
                    str(out), "--seed", str(seed), *flags])
    page = (out / "sheet.html").read_text()
    data = json.loads(re.search(r"^const data = (.*);$", page, re.M)[1])
    return page, data, json.loads((out / "key.json").read_text())


def pixels_of(uri):
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    return image, np.array(image)


def voted(tmp_path, key, answer, voter="v"):
    """A file of votes, as the page saves it: answer(trial, question) for each question."""
    votes = []
    for number, trial in enumerate(key["trials"]):
        for question in trial["questions"]:
            votes.append({"trial": number, "question": question, "answer": answer(trial, question)})
    file = tmp_path / f"votes_{voter}.json"
    file.write_text(json.dumps({"sheet": key["sheet"], "voter": voter, "votes": votes}))
    return str(file)


def side_of(method, trial):
    return ["left", "right"][trial["shown"].index(method)]


def test_study_sheet_does_not_tell_the_methods():
    """The page names no folder, file, note or seed, and its pictures hold pixels alone: of each
    trial those that the key says, from left to right."""
    with tempfile.TemporaryDirectory() as folder:
        page, data, key = study_of(Path(folder), seed=90210)
    for secret in ("ours", "theirs", "generic", "90210", ".png", "edit.py", "reference_scale"):
        assert secret not in page.replace("image/png", ""), secret
    assert page.count("</script>") == 1 and "http" not in page
    for seen, trial in zip(data["trials"], key["trials"], strict=True):
        for method, number in zip(trial["shown"], seen["pictures"], strict=True):
            image, pixels = pixels_of(data["pictures"][number])
            assert image.info == {} and pixels[0, 0, 0] == {"a": 200, "b": 100}[method]
            person = [user for user, *_ in TASTES][pixels[0, 0, 1] // 10]
            assert person == trial["pair"][0]
            assert f"A mug. Make it {person}'s" in seen["labels"]


def test_study_seed_fixes_order_and_sides(tmp_path):
    """The same seed gives the same page and key, another one others; each pair once, as many with
    one method on the left as with the other, but for one, which falls to either."""
    first = study_of(tmp_path)
    assert study_of(tmp_path) == first
    lefts = set()
    orders = set()
    for seed in range(1, 9):
        page, _, key = study_of(tmp_path, seed=seed)
        assert page != first[0]
        lefts.add(sum(trial["shown"] == ["a", "b"] for trial in key["trials"]))
        orders.add(tuple(trial["pair"][0] for trial in key["trials"]))
        assert sorted(trial["pair"][0] for trial in key["trials"]) == ["ana", "bo", "cy"]
    assert lefts == {1, 2} and len(orders) > 2


def test_study_votes_come_back_as_methods(tmp_path):
    """Who always prefers --a, and always finds the left picture more appealing, gives it all of Q1
    and of Q2 what the key says; ties are counted, and left out of the rate."""
    study = bench("study")
    _, _, key = study_of(tmp_path)

    def prefers_a(trial, question):
        return side_of("a", trial) if question.startswith("Q1") else "left"

    files = [voted(tmp_path, key, prefers_a, "x"), voted(tmp_path, key, lambda *_: "tie", "y")]
    votes = study.read_votes(files, {key["sheet"]: key})
    lefts = sum(trial["shown"][0] == "a" for trial in key["trials"])
    one, two = study.win_rates(votes)
    assert one == ["Q1: General Preference", 3, 0, 3, "1.000", "0.000", "0.438 to 1.000"]
    assert two[:4] == ["Q2: Visual Appeal", lefts, 3 - lefts, 3]


def test_study_ratings_come_back_as_means(tmp_path):
    """One person rates each of their pictures beside the original, then picks between those that
    differ; means, and the differences of one pair, are the methods'."""
    study = bench("study")
    source = tmp_path / "mug.png"
    Image.new("RGB", (64, 48), "blue").save(source)
    _, data, key = study_of(tmp_path, "--study", "own", "--user", "ana", source=source)
    assert [len(trial["shown"]) for trial in key["trials"]] == [1, 1, 2]
    for seen in data["trials"]:
        _, pixels = pixels_of(data["pictures"][seen["pictures"][1]])
        assert seen["labels"][1] == "original" and "likes" not in seen
        assert pixels.shape == (24, 32, 3) and tuple(pixels[0, 0]) == (0, 0, 255)

    def rates(trial, question):
        if question == "Pick":
            return side_of("b", trial)
        return {"a": 5, "b": 2}[trial["shown"][0]] - (question == "Q2: Disentanglement")

    files = [voted(tmp_path, key, rates, voter) for voter in "xy"]
    votes = study.read_votes(files, {key["sheet"]: key})
    rows = study.means(votes, "ours", "theirs")
    assert [row[1:4] for row in rows[:3]] == [
        ["ours", 2, "5.00"], ["theirs", 2, "2.00"], ["difference", 2, "3.00"]]
    assert [row[3] for row in rows[3:]] == ["4.00", "1.00", "3.00"]
    assert study.win_rates(votes)[0][:4] == ["Pick", 0, 2, 0]


def test_study_intervals_are_the_textbooks():
    """Wilson's interval of 8 out of 10 and Student's 97.5 % points, from tables."""
    study = bench("study")
    low, high = study.wilson(8, 10)
    assert abs(low - 0.4902) < 1e-4 and abs(high - 0.9433) < 1e-4
    for degrees, point in ((1, 12.706), (2, 4.303), (9, 2.262), (100, 1.984)):
        assert abs(study.student(degrees) - point) < 2e-3 * point
    assert study.mean_and_interval([3, 4, 5]) == ["4.00", "1.52 to 6.48"]


def test_study_equal_pictures_are_not_asked_to_choose_from(tmp_path):
    """A pair whose two pictures are equal pixel for pixel is no question; all equal is an error."""
    study = bench("study")
    args = SimpleNamespace(a=edits_of(tmp_path / "a", 100), b=edits_of(tmp_path / "b", 100),
                           user=None)
    with contextlib.redirect_stdout(io.StringIO()):
        pairs = study.find_pairs(args)
    raises("the same pictures", study.plan, pairs, "judges", study.random.Random(0))
    pairs["bo", "", "A mug"]["a"]["uri"] = "another"
    (only,) = study.plan(pairs, "judges", study.random.Random(0))
    assert only["pair"][0] == "bo"


def test_study_refuses_in_one_sentence_that_names_the_file(tmp_path):
    """What a user can get wrong ends in a sentence with the file; no file is written over."""
    study = bench("study")
    _, _, key = study_of(tmp_path)
    keys = {key["sheet"]: key}
    votes = voted(tmp_path, key, lambda *_: "left")
    raises("empty holds no edit", study.read_edits, tmp_path / "empty")
    raises("twice", study.read_votes, [votes, votes], keys)
    raises("votes_v.json answers sheet", study.read_votes, [votes], {"another": key})
    raises("votes_v.json has no a or b or trials", study.read_keys, [votes])
    wrong = voted(tmp_path, key, lambda *_: 7, "w")
    raises("votes_w.json: expected answers to what", study.read_votes, [wrong], keys)
    Path(wrong).write_text("[1]")
    raises("votes_w.json", study.read_votes, [wrong], keys)

    ours = tmp_path / "ours"
    small = SimpleNamespace(a=str(ours), b=edits_of(tmp_path / "small", 1, size=(8, 8)), user=None)
    raises("small_ana.json differ in size", study.find_pairs, small)
    other = SimpleNamespace(a=str(ours), b=edits_of(tmp_path / "o", 1, caption="A bag"), user=None)
    raises("same user, source picture and caption", study.find_pairs, other)
    (ours / "again.json").write_bytes((ours / "ours_bo.json").read_bytes())
    (ours / "again.png").write_bytes((ours / "ours_bo.png").read_bytes())
    raises("are the same user, picture", study.read_edits, ours)
    (ours / "again.png").unlink()
    (ours / "again.json").write_text('{"user": "bo"}')
    raises("again.json has no likes", study.read_edits, ours)
    broken = {"user": "bo", "likes": 5, "dislikes": [], "prompt": "",
              "settings": {"image": "", "caption": ""}}
    (ours / "again.json").write_text(json.dumps(broken))
    raises("again.json", study.read_edits, ours)
    (ours / "again.json").unlink()

    theirs = str(tmp_path / "theirs")
    for flags, part in ((["--out", str(tmp_path / "study_2")], "sheet.html exists"),
                        (["--study", "own"], "with one of ana, bo, cy"),
                        (["--study", "own", "--user", "bo"], "_bo.json was drawn without")):
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
                study.main(["--a", str(ours), "--b", theirs, "--out", str(tmp_path / "n"), *flags])
        except SystemExit as end:
            assert end.code == 2
        message = stderr.getvalue()
        assert part in message and message.startswith("study.py: "), message
        assert message.count("\n") == 1, message


class Chromium:
    """A headless Chromium, spoken to over a pipe (its DevTools protocol, JSON and a zero byte)."""

    def __init__(self, folder):
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        found = [path for path in map(shutil.which, names) if path]
        if not found:
            raise unittest.SkipTest("no Chromium is installed")
        theirs_in, self.write = os.pipe()
        self.read, theirs_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        # It reads from 3 and writes to 4.
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "_", found[0], *flags, "about:blank"], stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.session = None
        self.number = 0
        self.rest = b""
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"]
                     if t["type"] == "page"]
        answer = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = answer["sessionId"]
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.read, 2 ** 16)
                assert part, "Chromium has ended"
                self.rest += part
            answer, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.number:
                return answer.get("result", {})            # an error: the page is just leaving

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression).get("result", {}).get("value")

    def open(self, address):
        self.call("Page.navigate", url=address)
        wait_until(lambda: self.evaluate("location.href + document.readyState")
                   == address + "complete")

    def visit(self, address):
        """Opens a sheet, which loads itself twice where it recalls nothing."""
        self.open("about:blank")
        self.open(address)
        wait_until(lambda: self.evaluate(
            "document.readyState == 'complete' && (state.answers.length > 0 || "
            "performance.getEntriesByType('navigation')[0].type == 'reload')"))

    def remembers(self, address):
        """Whether localStorage outlives a page: for a new profile's first second it may not."""
        self.visit(address)
        self.evaluate("localStorage.seen = 1 + (+localStorage.seen || 0)")
        return self.evaluate("localStorage.seen") == "3"

    def press(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def text(self):
        return self.evaluate("document.body.innerText") or ""

    def close(self):
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)


def wait_until(condition, seconds=20):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def test_study_page_works_in_a_browser(tmp_path):
    """In Chromium, from file://: keys vote, Backspace takes back, another key does nothing, a
    reload and a later visit go on where it was, `s` saves what the key reads back; nothing is
    fetched."""
    study = bench("study")
    _, data, key = study_of(tmp_path)
    browser = Chromium(tmp_path)
    (sheet,) = tmp_path.glob("study_*/sheet.html")
    try:
        wait_until(lambda: browser.remembers(sheet.as_uri()))
        browser.visit(sheet.as_uri())
        assert "This user likes:" in browser.text() and "0 of 6" in browser.text()
        shapes = "[...document.images].map(i => i.naturalWidth + 'x' + i.naturalHeight).join()"
        wait_until(lambda: browser.evaluate(shapes) == "32x24,32x24")
        for pressed in ("ArrowLeft", "ArrowDown"):
            browser.press(pressed)
        browser.evaluate("localStorage.clear(), state = null")     # a reload needs neither
        browser.call("Page.reload")
        wait_until(lambda: "2 of 6" in browser.text() and browser.evaluate("state.voter"))
        for pressed in ("x", "5", "ArrowLeft", "Backspace", "ArrowRight"):
            browser.press(pressed)
        assert "3 of 6" in browser.text()
        browser.visit(sheet.as_uri())
        assert "3 of 6" in browser.text()
        asked = data["texts"][data["trials"][1]["questions"][1]]
        assert asked in browser.text()
        browser.press("ArrowRight")
        browser.evaluate("document.querySelectorAll('button')[1].click()")   # cannot tell
        browser.press("ArrowLeft")
        assert "6 of 6" in browser.text() and "thank you" in browser.text()
        browser.press("ArrowLeft")
        browser.press("s")
        wait_until(lambda: list(tmp_path.glob("votes_*.json")))
        fetched = "performance.getEntriesByType('resource').map(r => r.name).join()"
        assert "http" not in browser.evaluate(fetched)
    finally:
        browser.close()
    (file,) = tmp_path.glob("votes_*.json")
    said = json.loads(file.read_text())
    answers = [vote["answer"] for vote in said["votes"]]
    assert answers == ["left", "tie", "right", "right", "tie", "left"]
    votes = study.read_votes([file], {key["sheet"]: key})
    assert [v["method"] for v in votes if v["answer"] == "left"] == [
        key["trials"][0]["shown"][0], key["trials"][2]["shown"][0]]


# ---- evaluation beside the paper's tables --------------------------------------------------------

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
WHOLE_CLIP = {
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": clip_config(model_type="clip_text_model"),
    "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 9},
}
CLIP_IDS = torch.tensor([[1, 5, 9, 40, 59, 7], [1, 40, 59, 40, 2, 3]])


def test_eval_clip_compares_texts_as_transformers(tmp_path):
    """The text tower with its projection, alone and as half of a whole CLIP, to 1e-5."""
    tf = peer("transformers")
    config = tf.CLIPTextConfig(**clip_config(projection_dim=12))
    theirs = loud(tf.CLIPTextModelWithProjection(config))
    clip = reload(theirs, flux.CLIPText)
    assert_close(clip.embed(CLIP_IDS), theirs(CLIP_IDS).text_embeds, 1e-5)
    pooled = theirs.text_model(CLIP_IDS).pooler_output
    assert_close(clip(CLIP_IDS), pooled, 1e-5)
    theirs = whole_clip(tf)
    clip = reload(theirs, flux.CLIPText)
    pooled = theirs.text_model(CLIP_IDS).pooler_output
    assert_close(clip.embed(CLIP_IDS), theirs.text_projection(pooled), 1e-5)


def whole_clip(tf):
    """transformers' CLIPModel of WHOLE_CLIP's sizes, with loud weights."""
    config = tf.CLIPConfig(
        text_config=WHOLE_CLIP["text_config"],
        vision_config=WHOLE_CLIP["vision_config"],
        projection_dim=12,
    )
    return loud(tf.CLIPModel(config))


def test_eval_clip_sees_pictures_as_transformers(tmp_path):
    """The vision tower with its projection, alone and as half of a whole CLIP, at its own size and
    at another: the picture's embedding, and the map after the last norm, to 1e-5."""
    tf = peer("transformers")
    write_lines(tmp_path / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    alone = tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION, projection_dim=12))
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    for theirs in (loud(alone), whole_clip(tf)):
        theirs.save_pretrained(tmp_path)
        f = patch_dpo.ImageFeatures.load(tmp_path)
        for size in ((32, 32), (48, 24)):
            x = torch.rand(2, 3, *size, generator=seeded())
            tower = theirs.vision_model((x - mean) / std, interpolate_pos_encoding=True)
            embedded = theirs.visual_projection(tower.pooler_output)
            assert embedded.shape == (2, 12)
            assert_close(f.embed(2 * x - 1), embedded, 1e-5)
            states = theirs.vision_model.post_layernorm(tower.last_hidden_state)
            assert_close(f.tokens(2 * x - 1), states, 1e-5)


def test_eval_dino_of_its_own_layout_equals_transformers(tmp_path):
    """facebook/dino-vits16's: a ViT of 6 heads with a pooler that plays no role, to 1e-5."""
    tf = peer("transformers")
    config = tf.ViTConfig(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-12,
    )
    theirs = loud(tf.ViTModel(config, add_pooling_layer=True))
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    write_lines(tmp_path / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    x = torch.rand(2, 3, 32, 32, generator=seeded())
    pixels = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    f = patch_dpo.ImageFeatures.load(tmp_path)
    assert_close(f.embed(2 * x - 1), theirs(pixels).last_hidden_state[:, 0], 1e-5)


def write_clip(folder, **changes):
    """A whole CLIP with random weights, in the public layout, written without any peer."""
    config = {**WHOLE_CLIP, **changes}
    text = loud(flux.CLIPText(flux.CLIPText.own(config)))
    vision = loud(patch_dpo.ImageFeatures(config, torch.full((2, 3), 0.5)))
    tensors = {**text.state_dict(), "logit_scale": torch.tensor(4.6)}
    for name, p in vision.state_dict().items():
        tensors[public_vision_name(name)] = p
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_lines(folder / "config.json", config)
    write_lines(folder / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    return text, vision


def public_vision_name(name):
    """Ours -> that of CLIP's files."""
    if name.startswith("layernorm"):
        name = f"post_{name}"
    for public, ours in reversed(patch_dpo.PUBLIC_NAMES.items()):
        if not public.startswith(("layernorm", "post")):
            name = name.replace(ours, public)
    return name if name.startswith("visual") else f"vision_model.{name}"


def test_eval_clip_halves_are_read_from_one_checkpoint(tmp_path):
    """Each takes its own tensors and leaves the other's; the projection's size is the whole's, not
    the half's."""
    text, vision = write_clip(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in (
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.pre_layrnorm.bias",
        "vision_model.encoder.layers.1.self_attn.out_proj.weight",
        "vision_model.encoder.layers.1.layer_norm2.weight",
        "vision_model.encoder.layers.1.mlp.fc2.bias",
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
        "text_projection.weight",
    ):
        assert name in stored, name
    clip = flux.CLIPText.load(tmp_path)
    assert same(clip.embed(CLIP_IDS), text.embed(CLIP_IDS))
    f = patch_dpo.ImageFeatures.load(tmp_path)
    x = noise(2, 3, 32, 32)
    vision.mean_std = torch.tensor([MEAN, STD])
    assert same(f.embed(x), vision.embed(x))
    assert f.embed(x).shape == clip.embed(CLIP_IDS).shape == (2, 12)


def test_eval_clip_files_that_do_not_fit_are_named(tmp_path):
    """A text tower without projection compares nothing; a vision tower without one, another
    activation, a lacking half are refused by name."""
    plain = flux.CLIPText(clip_config(architectures=["CLIPTextModel"], projection_dim=12))
    assert not any("projection" in name for name in plain.state_dict())
    raises("no text projection", plain.embed, CLIP_IDS)
    write_clip(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("visual_projection.weight")
    tensors.pop("text_projection.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    raises("missing visual_projection.weight", patch_dpo.ImageFeatures.load, tmp_path)
    raises("missing text_projection.weight", flux.CLIPText.load, tmp_path)
    halved = {name: value for name, value in WHOLE_CLIP.items() if name != "vision_config"}
    write_lines(tmp_path / "config.json", halved)
    raises("has no 'vision_config'", patch_dpo.ImageFeatures.load, tmp_path)
    odd = {**WHOLE_CLIP, "vision_config": {**WHOLE_CLIP["vision_config"], "hidden_act": "relu"}}
    write_lines(tmp_path / "config.json", odd)
    raises("hidden_act is 'relu'", patch_dpo.ImageFeatures.load, tmp_path)
    write_lines(tmp_path / "config.json", {**WHOLE_CLIP, "model_type": "siglip"})
    raises("model_type is 'siglip'", flux.CLIPText.load, tmp_path)


def bench_judge():
    """bench/judge.py, beside mini/judge.py, which has its name."""
    bench("clock")
    spec = importlib.util.spec_from_file_location("bench_judge", ROOT / "bench/judge.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_judge"] = module
    spec.loader.exec_module(module)
    return module


DREAMBENCH = """Classes

subject_name,class
mug,mug
blue_apple,apple
dog2,dog
cat,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in front of forest'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def write_objects(folder, **pictures):
    """Pictures of the miniature's camera, folder/NAME/00.png ..., of (object, attributes ...)."""
    for name, scenes in pictures.items():
        (folder / name).mkdir(parents=True)
        for n, (thing, *attributes) in enumerate(scenes):
            geometry = world.Geometry({"object": thing, "seed": n}, size=48)
            pixels = geometry.shade("white", "cream", attributes)
            Image.fromarray(pixels).save(folder / name / f"{n:02d}.png")


def write_dreambench(folder):
    """Three objects in DreamBench's layout, and a fourth that is named and has no pictures."""
    write_objects(
        folder,
        mug=[["mug"]],
        dog2=[["teddy bear"]],
        blue_apple=[["apple"], ["apple", "snow"], ["apple", "gold"]]
    )
    (folder / "prompts_and_classes.txt").write_text(DREAMBENCH)
    return folder


def write_concept101(folder):
    """Three concepts in CustomConcept101's layout, two of them a pair."""
    write_objects(
        folder / "benchmark_dataset",
        things_mug=[["mug"], ["mug", "beach"]],
        plushie_bear=[["teddy bear"], ["teddy bear", "forest"]],
        fruit=[["apple"]]
    )
    (folder / "prompts").mkdir()
    (folder / "prompts/mug.txt").write_text("photo of a {}.\n{} at a beach. \n")
    (folder / "prompts/bear_mug.txt").write_text("the {1} beside the {0}\n{0} and a {0}")
    concepts = []
    for name, kind in (("things_mug", "mug"), ("plushie_bear", "bear"), ("fruit", "apple")):
        concepts.append({
            "instance_prompt": f"photo of a <new1> {kind}",
            "class_prompt": kind,
            "instance_data_dir": f"./benchmark_dataset/{name}",
            "class_data_dir": f"./regularization/{name}",
            "prompt_filename": "prompts/mug.txt"
        })
    mug, bear, _ = concepts
    pair = [bear, mug, {"prompt_filename_compose": "prompts/bear_mug.txt"}]
    (folder / "dataset.json").write_text(json.dumps(concepts))
    (folder / "dataset_multiconcept.json").write_text(json.dumps([pair]))
    return folder


def paint_subjects(kind, folder, out, *flags):
    """bench/subjects.py's pictures, their names; and what `render` was asked for."""
    subjects = bench("subjects")
    with quiet(), mock.patch.object(subjects, "render", wraps=subjects.render) as render:
        subjects.main([kind, str(folder), "--out", str(out), "--steps", "1", *flags])
    names = sorted(str(file.relative_to(out)) for file in out.glob("*/*"))
    return names, [call.kwargs for call in render.call_args_list]


def test_eval_dreambench_is_painted_and_judged(tmp_path):
    """Each object in the prompts of its class, again only what is missing; judged by hand: the mean
    over all references, one reference, the prompt; the references beside one another."""
    folder = write_dreambench(tmp_path / "dataset")
    write_lines(folder / "chosen.json", {"blue_apple": "01.png"})
    found = bench("subjects").dreambench(folder)
    assert {subject.name: subject.prompts for subject in found} == {
        "mug": ["a mug in front of forest", "a red mug"],
        "blue_apple": ["a apple in front of forest", "a red apple"],
        "dog2": ["a dog wearing a red hat"],
    }
    out = tmp_path / "mine"
    files, _ = paint_subjects("dreambench", folder, out, "--samples", "2")
    assert files == ["blue_apple/00_0.png", "blue_apple/00_1.png", "blue_apple/01_0.png",
                     "blue_apple/01_1.png", "dog2/00_0.png", "dog2/00_1.png", "mug/00_0.png",
                     "mug/00_1.png", "mug/01_0.png", "mug/01_1.png"]
    (out / files[3]).unlink()
    _, (asked,) = paint_subjects("dreambench", folder, out, "--samples", "2")
    assert asked["prompts"] == ["a red apple"]
    shown = asked["equip"].args[0].reference
    assert shown == [str(folder / "blue_apple/01.png")]
    judge = bench_judge()
    args = judge.parse([str(out), "--dreambench", str(folder)])
    encoders = judge.Encoders(args)
    references = judge.see_references(encoders, found)
    scores = judge.subject_scores(out, encoders, found, references)
    assert scores["absent"] == [] and len(scores["CLIP-T"]) == 10
    seen = encoders.see([flux.read_image(out / "blue_apple/01_0.png")])
    shown = encoders.see([flux.read_image(file) for file in found[1].objects[0]])
    at = 4                                          # mug's four come first; its third
    assert_close(scores["DINO, all"][at + 2], (shown["DINO"] @ seen["DINO"][0]).mean(), 1e-5)
    assert_close(scores["CLIP-I, one"][at + 2], shown["CLIP"][1] @ seen["CLIP"][0], 1e-5)
    said = encoders.read(["a red apple"])["CLIP"][0]
    assert_close(scores["CLIP-T"][at + 2], said @ seen["CLIP"][0], 1e-5)
    alike = judge.reference_scores(references)["DINO, all"]
    assert_close(alike[0], (shown["DINO"][0] @ shown["DINO"][1:].T).mean(), 1e-5)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        judge.main([str(out), "--dreambench", str(folder)])
    assert "0.838" in said.getvalue() and "10 pictures of 3 subjects" in said.getvalue()
    (out / "mug/02_0.png").write_bytes((out / "mug/01_0.png").read_bytes())
    judged = judge.judge_subjects
    raises("02_0.png must be called N_K.png, N one of the prompts 0 to 1",
           judged, args, "dreambench", folder)
    args.folders = [str(tmp_path)]
    raises("holds no NAME/N_K.png", judged, args, "dreambench", folder)


def test_eval_concept101_is_painted_and_judged(tmp_path):
    """Concepts alone by dataset.json, two together by dataset_multiconcept.json: Flux sees one
    picture of each, a picture is compared with both, CLIP-T is 2.5 times the cosine."""
    folder = write_concept101(tmp_path / "customconcept101")
    subjects = bench("subjects")
    alone = subjects.concept101(folder)
    assert [subject.name for subject in alone] == ["things_mug", "plushie_bear", "fruit"]
    assert alone[1].prompts == ["photo of a bear.", "bear at a beach."]
    listed = folder / "dataset_multiconcept.json"
    out = tmp_path / "two"
    files, (asked,) = paint_subjects("concept101", listed, out, "--samples", "1")
    assert files == ["plushie_bear+things_mug/00_0.png", "plushie_bear+things_mug/01_0.png"]
    assert asked["prompts"] == ["the mug beside the bear", "bear and a bear"]
    pictures = folder / "benchmark_dataset"
    assert asked["equip"].args[0].reference == [
        str(pictures / "plushie_bear/00.png"), str(pictures / "things_mug/00.png")]
    judge = bench_judge()
    args = judge.parse([str(out), "--concept101", str(listed)])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        judge.main([str(out), "--concept101", str(listed)])
    lines = said.getvalue().splitlines()
    cells = [float(cell.split()[0]) for cell in lines[2].split("|")[2:7]]
    encoders = judge.Encoders(args)
    see = []
    for files in (out.glob("*/*"), pictures.glob("plu*/*"), pictures.glob("things*/*")):
        see.append(encoders.see([flux.read_image(file) for file in sorted(files)]))
    text = encoders.read(["the mug beside the bear", "bear and a bear"])["CLIP"]
    wanted = []
    for count in (2, 1):
        for encoder in ("DINO", "CLIP"):
            seen, bear, mug = [found[encoder] for found in see]
            both = torch.cat([bear[:count], mug[:count]])
            wanted.append((seen @ both.T).mean())
    wanted.append(2.5 * (see[0]["CLIP"] * text).sum(1).clamp_min(0).mean())
    assert_close(torch.tensor(cells), torch.stack(wanted), 2e-3)
    assert "0.7726" in said.getvalue() and "times 2.5" in said.getvalue()


def test_eval_several_objects_of_dreambench_stand_in_a_file(tmp_path):
    """A line names them: their pictures, and the prompts of live subjects only where all live."""
    folder = write_dreambench(tmp_path / "dataset")
    pairs = folder / "pairs.txt"
    pairs.write_text("mug dog2\n\ndog2 dog2\n")
    first, second = bench("subjects").dreambench(pairs)
    assert (first.name, second.name) == ("mug+dog2", "dog2+dog2")
    assert first.prompts == ["a mug and a dog in front of forest", "a red mug and a dog"]
    assert second.prompts == ["a dog and a dog wearing a red hat"]
    assert first.objects == [[folder / "mug/00.png"], [folder / "dog2/00.png"]]


def test_eval_bad_files_of_a_benchmark_are_named(tmp_path):
    """An object that there is not or that has no picture, a prompt with a place too many, a key or
    a file that is missing, another --references than there are pictures of chosen.json."""
    subjects = bench("subjects")
    folder = write_dreambench(tmp_path / "dataset")
    pairs = folder / "pairs.txt"
    for text, message in (("mug mouse", "pairs.txt: prompts_and_classes.txt has no mouse"),
                          ("mug cat", "dataset/cat holds no picture (.jpg, ")):
        pairs.write_text(text)
        raises(message, subjects.dreambench, pairs)
    raises("dataset/no.txt", subjects.dreambench, folder / "no.txt")
    write_lines(folder / "chosen.json", {"mug": "07.png"})
    (mug, *_) = subjects.dreambench(folder)
    raises("chosen.json names 07.png, which is not in", subjects.chosen, mug.objects[0])
    folder = write_concept101(tmp_path / "customconcept101")
    (folder / "prompts/mug.txt").write_text("the {1} beside the {0}")
    raises("prompts/mug.txt is truncated or not what is expected", subjects.concept101, folder)
    (folder / "prompts/mug.txt").unlink()
    raises("there is no file", subjects.concept101, folder)
    listed = folder / "dataset_multiconcept.json"
    shutil.rmtree(folder / "benchmark_dataset/things_mug")
    raises("things_mug holds no picture", subjects.concept101, listed)
    listed.write_text('[{"class_prompt": "mug"}]')
    raises("dataset_multiconcept.json has no 'prompt_filename'", subjects.concept101, listed)


def test_eval_subjects_make_scenes_of_prompts_and_of_captions(tmp_path):
    """References are painted after the wording, in shares, and again only where missing, with the
    same bytes; captions beside the pictures or in metadata.jsonl give the same scenes; both train
    the picture model."""
    subjects = bench("subjects")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("An apple on a beach\n\nA mug in front of snow\nA vase before wood\n")
    flags = ["references", str(prompts), "--size", "32", "--steps", "2", "--out"]

    def paint(out, rank=0, world=1):
        with quiet(), mock.patch.multiple(subjects, RANK=rank, WORLD=world):
            subjects.main([*flags, str(tmp_path / out)])
        return {file.name: file.read_bytes() for file in (tmp_path / out).glob("*/*.png")}

    whole = paint("one")
    assert list(whole) and len(paint("two", 1, 2)) == 1
    assert not (tmp_path / "two/scenes.jsonl").exists()
    assert paint("two", 0, 2) == whole
    (tmp_path / "one/references/000001.png").unlink()
    assert paint("one") == whole
    scenes = patch_dpo.read_scenes(tmp_path / "two/scenes.jsonl", "edit_type", "instruction")
    assert [scene["edits"][0]["instruction"] for scene in scenes] == subjects.read_prompts(prompts)
    captioned = tmp_path / "captioned"
    shutil.copytree(tmp_path / "one/references", captioned)
    for n, name in enumerate(sorted(whole)):
        (captioned / name).with_suffix(".txt").write_text(f"picture {n}\n")
    with quiet():
        subjects.main(["captions", str(captioned)])
    first = (captioned / "scenes.jsonl").read_bytes()
    rows = [{"file_name": name, "text": f"picture {n}"} for n, name in enumerate(sorted(whole))]
    write_lines(captioned / "metadata.jsonl", *rows)
    with quiet():
        subjects.main(["captions", str(captioned)])
    assert (captioned / "scenes.jsonl").read_bytes() == first
    stage, settings, _ = picture_stage(f"dro --rank 2 --scenes {captioned}/scenes.jsonl")
    assert [row["prompt"] for row in stage.rows] == [("", f"picture {n}") for n in range(3)]
    assert same(stage.scene, stage.truth)
    words = flux.encode_prompt(MINI / "flux", ["picture 1"])
    assert same(list(stage.texts(torch.tensor([1]))), list(words))
    raises("no metadata.jsonl", subjects.main, ["captions", str(tmp_path)])


def test_eval_judge_prepares_pictures_as_transformers():
    """CLIP's, DINO's and DINOv2's preprocessor_config.json, old and new, upright and lying
    pictures: the very pixels."""
    tf = peer("transformers")
    judge = bench_judge()
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    assert tf.__version__
    clip = {"image_processor_type": "CLIPImageProcessor"}
    edge = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    wide = {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24}
    vit = {"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "resample": 3}
    for kind, processor in (
        (CLIPImageProcessorPil, {**clip, **edge, "resample": 3, "do_center_crop": True}),
        (CLIPImageProcessorPil, {**old, "resample": 3, "do_center_crop": True}),
        (BitImageProcessorPil, {**wide, "resample": 3, "do_center_crop": True}),
        (ViTImageProcessorPil, vit),
        (ViTImageProcessorPil, {"size": {"height": 24, "width": 30}}),
    ):
        theirs = kind(**processor, do_rescale=False, do_normalize=False)
        for shape in ((50, 41), (31, 60), (40, 40)):
            picture = Image.fromarray((noise(*shape, 3) * 60 + 128).clamp(0, 255).byte().numpy())
            want = theirs(picture, return_tensors="pt").pixel_values[0]
            found = np.array(judge.prepare(picture, processor))
            assert same(torch.from_numpy(found).permute(2, 0, 1).float(), want.float())


def write_edit(folder, name, user, picture, source=None):
    """As edit.py writes it: a PNG and its JSON."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"{name}.png")
    settings = {"image": source and str(source), "caption": "a mug"}
    edit = {"user": user, "likes": [], "dislikes": [], "instruction": "", "prompt": ""}
    write_lines(folder / f"{name}.json", {**edit, "settings": settings})


def flat(red, green, blue, size=32):
    return np.full((size, size, 3), (red, green, blue), np.uint8)


def judged_world(folder):
    """Two people, one for red, one for blue, the pictures they like, a CLIP -> judge's flags."""
    write_clip(folder / "clip", text_config={
        **WHOLE_CLIP["text_config"], "vocab_size": 816, "max_position_embeddings": 32})
    processor = {"image_mean": MEAN, "image_std": STD, "do_resize": False}
    write_lines(folder / "clip/preprocessor_config.json", processor)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(MINI / "flux/tokenizer" / name, folder / "clip")
    write_lines(
        folder / "users.jsonl",
        {"user": "rose", "likes": ["red", "gold"], "dislikes": ["blue"]},
        {"user": "azur", "likes": ["blue"], "dislikes": ["gold"]},
    )
    write_lines(folder / "pairs.jsonl", {"user": "rose", "chosen": "Paint the mug red"})
    colors = {"red": flat(200, 20, 20), "blue": flat(20, 20, 200), "plain": flat(90, 90, 90)}
    for name, picture in colors.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    edits = [{"attribute": name, "image": f"{name}.png"} for name in ("red", "blue")]
    edits.append({"attribute": "gold"})                   # without a picture: nobody's liked one
    scene = {"image": "plain.png", "caption": "a mug", "edits": edits}
    write_lines(folder / "scenes.jsonl", scene)
    flags = []
    for flag, name in (("users", "users.jsonl"), ("pairs", "pairs.jsonl"),
                       ("scenes", "scenes.jsonl"), ("clip", "clip")):
        flags += [f"--{flag}", str(folder / name)]
    return flags, colors


def test_eval_judge_moves_as_it_must(tmp_path):
    """Who likes red has a higher number for a red picture than others, by both encoders; the same
    picture judged for another is lower; an unedited picture is its own reference, an edited one is
    below it; another method's folder with exchanged pictures comes out worse."""
    judge = bench_judge()
    flags, colors = judged_world(tmp_path)
    plain = tmp_path / "plain.png"
    for folder, first, second in (("good", "red", "blue"), ("bad", "blue", "red")):
        write_edit(tmp_path / folder, "a", "rose", colors[first] + 5, plain)
        write_edit(tmp_path / folder, "b", "azur", colors[second] + 5, plain)
    write_lines(tmp_path / "good/both.json", {"edits": []})           # the grid is no edit
    folders = [str(tmp_path / "good"), str(tmp_path / "bad")]
    text = judge.report(judge.parse([*folders, *flags]))
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            title, *cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            rows.setdefault(title, []).append(cells)
    good, = rows[folders[0]]
    bad, = rows[folders[1]]
    others = rows["its pictures, for the other people"]
    assert judge.REF[2] == "HPS" and good[2] == "-"
    for column in (4, 5):                                             # DINO- and CLIP-I-Pref
        assert float(good[column][:5]) > float(bad[column][:5])
        assert good[column][:5] == others[1][column][:5]              # exchanged people
        assert float(good[column][:5]) > float(others[0][column][:5])
    for originals in rows["its originals, unedited"]:
        assert originals[:2] == ["1.000 ± 0.000"] * 2
    for column in (0, 1):                                             # DINO- and CLIP-Ref
        assert float(good[column][:5]) < 1
    assert "DINO-Pref 2 of 2, CLIP-I-Pref 2 of 2" in text
    assert "1 of the people have no line" in text and "published as a pickle" in text
    assert rows["the paper's C-DPO"][0][0] == "0.782 ± 0.182"


def test_eval_judge_numbers_are_cosines(tmp_path):
    """By hand, for one edit: each measure is the mean cosine that its name says."""
    judge = bench_judge()
    flags, colors = judged_world(tmp_path)
    write_edit(tmp_path / "one", "a", "rose", colors["red"] + 9, tmp_path / "plain.png")
    args = judge.parse([str(tmp_path / "one"), *flags])
    edit, = judge.read_edits(tmp_path / "one")
    encoders = judge.Encoders(args)
    likes, without = judge.tastes(args, ["rose"], encoders)
    assert without == []
    seen = encoders.see([edit.picture])
    own, others = judge.preference(["rose"], seen, likes)
    assert others["DINO-Pref"] == []

    def cosine(text):
        clip = flux.CLIPText.load(tmp_path / "clip")
        tokenizer = flux.TextTokenizer(tmp_path / "clip", 32)
        with torch.no_grad():
            vector = clip.embed(tokenizer([text]))
        return nn.functional.cosine_similarity(vector, seen["CLIP"]).item()

    assert_close(own["CLIP-T-Pref"][0], cosine("Paint the mug red"), 1e-5)
    assert_close(own["CLIP-T-Neighbor"][0], cosine("blue"), 1e-5)     # azur, by blue and gold
    liked = encoders.see([Image.open(tmp_path / "red.png")])
    assert_close(own["DINO-Pref"][0], (liked["DINO"] @ seen["DINO"].T).item(), 1e-5)
    found = judge.reference(seen, encoders.see([edit.original]), encoders.read([edit.caption]))
    assert_close(found["CLIP-T"][0], cosine("a mug"), 1e-5)
    assert set(found) == {"DINO-Ref", "CLIP-Ref", "CLIP-T"}
    assert found["DINO-Ref"][0] < 1 and judge.row("x", found)[3] == "-"


def test_eval_judge_refuses_by_name(tmp_path):
    """An empty folder, somebody unknown, one who stands in two files, a pickle."""
    judge = bench_judge()
    flags, colors = judged_world(tmp_path)
    (tmp_path / "none").mkdir()
    raises("none holds no edit", judge.report, judge.parse([str(tmp_path / "none"), *flags]))
    write_edit(tmp_path / "one", "a", "zoe", colors["red"])
    asked = [str(tmp_path / "one"), *flags]
    raises("'zoe', who is not in --users", judge.report, judge.parse(asked))
    raises("hps.pt is a pickle", judge.report, judge.parse([*asked, "--hps", "hps.pt"]))
    twice = [str(tmp_path / "users.jsonl")] * 2
    raises("stands in another of --users", judge.read_people, twice)
    write_lines(tmp_path / "one/a.json", {"user": "zoe"})
    raises("a.json has no instruction", judge.read_edits, tmp_path / "one")


def test_eval_hps_in_open_clips_names_is_a_clip(tmp_path):
    """Names, q, k and v in one tensor, projections the other way round: bench/hps.py makes of them
    the CLIP that they were made of."""
    hps = bench("hps")
    sizes = {"hidden_size": 32, "num_attention_heads": 16, "hidden_act": "gelu"}
    text_config = {**WHOLE_CLIP["text_config"], **sizes, "eos_token_id": 59}
    vision_config = {**WHOLE_CLIP["vision_config"], **sizes}
    text, vision = write_clip(
        tmp_path / "clip", text_config=text_config, vision_config=vision_config)
    stored = {}
    for name, tensor in load_file(tmp_path / "clip/model.safetensors").items():
        for theirs, public in reversed(hps.NAMES.items()):
            name = name.replace(public, theirs)
        if "projection" in name or name == "visual.proj":
            name = name.removesuffix(".weight")
            tensor = tensor.T
        stored[name] = tensor
    for name in list(stored):
        if "q_proj" in name:
            parts = [stored.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            stored[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in stored
    assert "transformer.resblocks.1.mlp.c_proj.bias" in stored and "positional_embedding" in stored
    torch.save({"state_dict": stored}, tmp_path / "hps.pt")
    shutil.copy(MINI / "flux/tokenizer/vocab.json", tmp_path / "clip")
    out = tmp_path / "hps"
    hps.main([str(tmp_path / "hps.pt"), "--clip", str(tmp_path / "clip"), "--out", str(out)])
    assert (out / "vocab.json").is_file()
    assert_close(flux.CLIPText.load(out).embed(CLIP_IDS), text.embed(CLIP_IDS), 1e-6)
    f = patch_dpo.ImageFeatures.load(out)
    f.mean_std = vision.mean_std
    x = noise(2, 3, 32, 32)
    assert_close(f.embed(x), vision.embed(x), 1e-6)


def test_eval_miniatures_clip_equals_transformers():
    """mini/clip is read whole by both: texts, and pictures as its processor prepares them."""
    tf = peer("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    folder = MINI / "clip"
    theirs = tf.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    clip = flux.CLIPText.load(folder)
    f = patch_dpo.ImageFeatures.load(folder)
    judge = bench_judge()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    picture = Image.open(SAMPLE / "scenes/00_apple_gold.png").convert("RGB")
    ids = flux.TextTokenizer(folder, 32)(["Paint the apple red", "gold"])
    with torch.no_grad():
        pixels = processor(picture, return_tensors="pt").pixel_values
        seen = theirs.vision_model(pixels).pooler_output
        said = theirs.text_model(ids).pooler_output
        prepared = judge.prepare(picture, qwen.read_json(folder / "preprocessor_config.json"))
        image = flux.to_tensor(prepared)
        assert_close(f.embed(image[None]), theirs.visual_projection(seen), 1e-5)
        assert_close(clip.embed(ids), theirs.text_projection(said), 1e-5)


def test_eval_judge_of_the_miniature_knows_what_is_liked(tmp_path):
    """The true pictures of what nine people like, judged by mini/clip and mini/vit: most are nearer
    to their own user's likes than to others', by pictures and by words, and nearer than the
    original by words (to pictures of its own scene the original is near by itself)."""
    judge = bench_judge()
    scene = json.loads((SAMPLE / "scenes.jsonl").read_text().splitlines()[0])
    files = {edit["attribute"]: SAMPLE / edit["image"] for edit in scene["edits"]}
    source = SAMPLE / scene["image"]
    users = graph.read_users(SAMPLE / "users_test.jsonl")[:9]
    for user in users:
        for name in user.likes[:3]:
            picture = np.array(Image.open(files[name]).convert("RGB"))
            write_edit(tmp_path / "true", f"{user.name}_{name}", user.name, picture, source)
    args = judge.parse([str(tmp_path / "true")])
    edits = judge.read_edits(tmp_path / "true")
    encoders = judge.Encoders(args)
    names = [edit.user for edit in edits]
    likes, _ = judge.tastes(args, sorted(set(names)), encoders)
    own, others = judge.preference(names, encoders.see([e.picture for e in edits]), likes)
    before, _ = judge.preference(names, encoders.see([e.original for e in edits]), likes)
    for what, controls in (
        ("DINO-Pref", others),
        ("CLIP-I-Pref", others),
        ("CLIP-T-Pref", others),
        ("CLIP-T-Pref", before),
        ("CLIP-T-Neighbor", before),
    ):
        wins = sum(a > b for a, b in zip(own[what], controls[what]))
        assert wins >= 0.7 * len(edits) > 15, (what, wins, len(edits))


class Stub:
    """Writes for make_data as a good model would, in JSON, but for every fifth answer, which is
    cut; dies after `calls` batches."""

    def __init__(self, calls=10 ** 9):
        self.calls = calls
        self.asked = []

    def __call__(self, conversations, start, tokens, seed):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked.append(len(conversations))
        answers = []
        for i, messages in enumerate(conversations):
            answer = json.dumps(self.answer(messages[-1]["content"], seed % 1000 + i))
            assert answer.startswith(start)
            answers.append(answer[:-9] if i % 5 == 4 else answer + " and so on")
        return answers

    def answer(self, question, n):
        if question.startswith("Write"):
            category = re.search(r"subject is: (.*?)\.", question)[1]
            captions = [f"a {category} {n}", f"a {category} {n} on a table"]
            return {"captions": [*captions, "a bear of another kind"]}
        if "four lists" in question:
            return dict.fromkeys(["themes", "tones", "overlays", "prompts"], ["calm"])
        if "not like" in question:
            assert "like Stripe, stripes, gold, look" in question
            return {"dislikes": ["neon", "glass", "gold", f"look {n % 3}x"]}
        if question.startswith("Imagine"):
            assert "calm" in question
            return {"likes": ["Stripe", "stripes", "gold", f"look {n % 4}"]}
        rows = [{"chosen": f"Make it {word} {n}", "rejected": f"Paint it {word} {n}"}
                for word in ("gold", "blue")]
        return {"pairs": rows}


def data_flags(folder, *more):
    return ["--users=7", "--test-users=2", "--batch=6", "--categories=9", "--same=0.97",
            f"--out={folder}", *more]


def of_letters(names):
    """Vectors of names: alike where their letters are."""
    rows = torch.zeros(len(names), 128)
    for row, name in zip(rows, names):
        for letter in name:
            row[ord(letter)] += 1
    return nn.functional.normalize(rows, dim=-1)


def test_eval_data_is_made_whole_and_asked_again(tmp_path):
    """Bad answers are asked again and counted; the files are section 6's, 48 lines a user over four
    captions and six edit types, the last users held out; likes bear one name."""
    data = bench("make_data")
    args = data.parse(data_flags(tmp_path))
    stub = Stub()
    report = data.make(stub, of_letters, args)
    assert max(stub.asked) == 6
    users = graph.read_users(tmp_path / "users.jsonl")
    tested = graph.read_users(tmp_path / "users_test.jsonl")
    assert [user.name for user in users] == [f"user-{i:04d}" for i in range(5)]
    assert [user.name for user in tested] == ["user-0005", "user-0006"]
    for user in users:
        assert user.likes[:2] == ["Stripe", "gold"] and "stripes" not in user.likes
    rows = graph.read_jsonl(tmp_path / "pairs.jsonl", user=str, caption=str, edit_type=str,
                            chosen=str, rejected=str)
    for user in users:
        own = [row for row in rows if row["user"] == user.name]
        assert len(own) == 48 and len({row["caption"] for row in own}) == 4
        kinds = [row["edit_type"] for row in own]
        assert all(kinds.count(name) == 8 for name in data.EDIT_TYPES)
    asked = report["pairs"]
    assert asked["questions"] == asked["usable"] == 7 * 24 and asked["given up"] == 0
    assert asked["answers"] > asked["usable"]
    profiles = graph.read_jsonl(tmp_path / "profiles.jsonl", user=str, age=str, themes=list)
    assert len(profiles) == 7
    assert set(asked["why answers were bad"]) == {"not JSON, or cut off"}
    assert report["attributes"]["merged"]["stripes"] == "Stripe"
    text = data.in_words(report)
    assert "7 users kept" in text and "names merged" in text
    assert report["name a like"] == {"chosen": 0.5, "rejected": 0.5}
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["pairs"] == report["pairs"]


def test_eval_data_goes_on_where_it_stopped(tmp_path):
    """Killed after any batch, and in the middle of a line, it asks the rest and no more, and writes
    the same files; a finished one asks nothing."""
    data = bench("make_data")
    whole = data.parse(data_flags(tmp_path / "whole"))
    stub = Stub()
    data.make(stub, of_letters, whole)
    names = ["users.jsonl", "pairs.jsonl", "pairs_test.jsonl"]
    want = [(tmp_path / "whole" / name).read_bytes() for name in names]
    for calls in (1, 3, 4, 20):
        args = data.parse(data_flags(tmp_path / str(calls)))
        with contextlib.suppress(KeyboardInterrupt):
            data.make(Stub(calls), of_letters, args)
        last = max(args.out.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        with open(last, "a") as file:
            file.write('{"key": "half a li')
        rest = Stub()
        data.make(rest, of_letters, args)
        assert len(rest.asked) == len(stub.asked) - calls
        assert [(args.out / name).read_bytes() for name in names] == want
    again = Stub()
    data.make(again, of_letters, whole)
    assert again.asked == []


def test_eval_data_gives_up_what_stays_bad(tmp_path):
    """After --tries a question is left out, and the report says why; a user who then likes and
    dislikes the same is lost; without anything usable one sentence says so."""
    data = bench("make_data")

    class Worse(Stub):
        def answer(self, question, n):
            found = super().answer(question, n)
            if "the colour of" in question:
                found["pairs"].pop()
            return found

    args = data.parse(data_flags(tmp_path / "worse", "--tries=2"))
    report = data.make(Worse(), of_letters, args)
    lost = report["pairs"]["given up"]
    assert lost >= 7 * 4 and report["pairs"]["why answers were bad"]["not two pairs"] >= 7 * 4
    users = {"a": {"likes": ["gold", "wood"], "dislikes": ["glass", "Gold", "chrome"]}}
    args.same = 2.0
    kept, _, lost = data.people_of(users, of_letters, args)
    assert kept == {} and sum(lost.values()) == 2
    raises("0 captions and 0 profiles are usable", data.main, [
        f"--qwen={MINI / 'qwen'}", *data_flags(tmp_path / "mini", "--users=2", "--test-users=0",
                                               "--categories=2", "--tries=1", "--device=cpu")])
    lines = (tmp_path / "mini/likes.answers.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["answer"].startswith('{"likes": ["')


def test_eval_data_names_are_merged_by_spelling_and_by_meaning():
    """Plural and case, then whatever the embedder puts closer than --same; the commoner name
    stays."""
    data = bench("make_data")
    counts = {"stripe": 3, "Stripes": 5, "gold": 2, "glod": 1, "wood": 9, "berries": 1, "berry": 4}
    merged = data.merge_names(counts, of_letters, same=0.99)
    assert merged == {
        "Stripes": "Stripes", "stripe": "Stripes", "gold": "gold", "glod": "gold", "wood": "wood",
        "berry": "berry", "berries": "berry"}
    assert data.merge_names({"gold": 1, "glod": 1}, of_letters, same=2.0)["gold"] == "gold"
    merged = data.merge_names(counts, None, same=0.99)
    assert merged["gold"] == "gold" and merged["stripe"] == "Stripes"


def test_eval_data_answers_are_checked_by_name():
    """What is no JSON, too little, too long, twice the same, or the example's own words."""
    data = bench("make_data")
    fields = {"category": "cat", "likes": "a, b"}
    pair = {"chosen": "Make it red", "rejected": "Make it blue"}
    other = {"chosen": "Make it wide", "rejected": "Make it tall"}
    found = data.check_pairs(json.dumps({"pairs": [pair, other]}), fields)
    assert found == [["Make it red", "Make it blue"], ["Make it wide", "Make it tall"]]
    looks = {name: ["a"] for name in ("themes", "tones", "overlays", "prompts")}
    assert data.check_looks(json.dumps(looks) + "\nSure!", fields) == looks
    for part, check, value in (
        ("not JSON, or cut off", data.check_likes, '{"likes": ["a'),
        ("not JSON", data.check_likes, '{"likes": ["a"}'),
        ("no list of texts under tones", data.check_looks, {**looks, "tones": "a"}),
        ("too few of likes", data.check_likes, {"likes": ["a", "a", "b", "c"]}),
        ("too few of likes", data.check_likes, {"likes": ["a b c d", "a", "b", "c"]}),
        ("dislikes are the likes", data.check_dislikes, {"dislikes": ["A", "f", "g"]}),
        ("copied from the example", data.check_likes, data.ASK["likes"].answer),
        ("copied from the example", data.check_looks, data.ASK["looks"].answer),
        ("not two pairs", data.check_pairs, {"pairs": [pair]}),
        ("no sentence", data.check_pairs, {"pairs": [pair, {"chosen": "Make it red"}]}),
        ("the same sentence twice", data.check_pairs, {"pairs": [pair, pair]}),
        ("copied from the example", data.check_pairs, data.ASK["pairs"].answer),
        ("too few of captions", data.check_captions, {"captions": ["one"]}),
        ("a | in a caption", data.check_captions, {"captions": ["a | cat", "a cat"]}),
        ("no caption names", data.check_captions, {"captions": ["a dog", "a bobcat"]}),
    ):
        raises(part, check, value if isinstance(value, str) else json.dumps(value), fields)
    runs_on = '{"likes": ["a", "b", "c", "d", "d", "d", "d'
    assert data.check_likes(runs_on, fields) == [*"abcd"]
    clash = json.dumps({"dislikes": [*"Abcde"]})
    assert data.check_dislikes(clash, fields) == [*"cde"]
    some = json.dumps({"captions": ["Two cats", "a dog"]})
    assert data.check_captions(some, fields) == ["Two cats"]


def test_eval_data_estimate_is_arithmetic(tmp_path):
    """Twice the users are twice the hours of profiles and pairs; twice the rates half of them."""
    data = bench("make_data")
    tokenizer = Tokenizer.load(MINI / "qwen")

    def hours(*flags):
        text = data.estimate(tokenizer, data.parse([f"--out={tmp_path}", *flags]))
        return float(re.search(r"([\d.]+) hours in all", text)[1])

    once = hours("--users=30000")
    assert abs(hours("--users=60000") / once - 2) < 0.02
    fast = hours("--users=30000", "--decode-rate=4000", "--prefill-rate=20000")
    assert abs(once / fast - 2) < 0.02
    assert hours() < 24                                               # 3,000 users in a day
    raises("--test-users is 9; it must lie in 0 .. 2", data.parse, ["--users=2", "--test-users=9"])


# ---- real words ----------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + "
          "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|im_start|>assistant\\n' }}{% endif %}")
TEMPLATES = {                               # the system turn that each begins with: the template
    "You are Qwen.": "{%- if tools %}{{- '<|im_start|>system\\n' }}{{- 'Tools.<|im_end|>\\n' }}"
                     "{%- else %}{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system"
                     "\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}{{- "
                     "'<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}{%- endif %}"
                     "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}"
                     "{% endif %}" + CHATML,
    "I am Smol": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nI am Smol"
                 "<|im_end|>\n' }}{% endif %}" + CHATML.replace("\\n", "\n"),
    "": CHATML,
    "Help!": "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'"
             "] %}{% set messages = messages[1:] %}{% else %}{% set system_message = 'Help!' %}"
             "{% endif %}{{ '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}" + CHATML,
}


def test_tokenizer_begins_with_the_templates_own_system_turn(tmp_path):
    """Of ChatML in tokenizer_config.json, or in chat_template.jinja, which wins; as transformers
    renders it. Without a template it is Qwen's."""
    folder = copied(MINI / "qwen", tmp_path / "qwen")
    asked = [{"role": "user", "content": "Hello"}]
    begun = [{"role": "system", "content": "Be brief."}, *asked]

    def check(system):
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.system == system
        turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        want = turn + "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.chat(asked) == tokenizer.encode(want)
        assert tokenizer.chat(begun)[:3] == tokenizer.encode("<|im_start|>system\n")[:3]
        return want

    for system, template in TEMPLATES.items():
        write_lines(folder / "tokenizer_config.json", {"chat_template": template})
        want = check(system)
        with contextlib.suppress(ImportError):
            import jinja2
            found = jinja2.Template(template).render(
                messages=asked, add_generation_prompt=True, tools=None)
            assert found == want, (found, want)
        (folder / "chat_template.jinja").write_text(TEMPLATES["I am Smol"])
        check("I am Smol")
        (folder / "chat_template.jinja").unlink()
    write_lines(folder / "tokenizer_config.json", {})
    check(qwen.SYSTEM)


def test_small_preset_is_the_papers_names_and_the_miniatures_numbers():
    """But where a row says otherwise; what it says for each stage."""
    row = qwen.flag(3, 9, "").metadata
    assert row["small"] == 3 and qwen.flag("a", "b", "").metadata["small"] == "b"
    assert qwen.flag(3, 9, "", small=5).metadata["small"] == 5
    want = {
        "graph": dict(users="users.jsonl", embedder="", unsigned=False, feature_norm=4),
        "sft": dict(lr=1e-3, batch=8, dtype="bf16", checkpointing=False),
        "cdpo": dict(lr=1e-3, nll=1, tokens=8, beta=0.2, similarity="likes", place="turn"),
        "eval": dict(pairs_test="pairs_test.jsonl", temperature=1),
    }
    for stage, values in want.items():
        _, settings, _ = train.parse([stage, "--preset", "small"])
        assert "0.5B" in settings.qwen
        for name, value in values.items():
            assert getattr(settings, name) == value, (stage, name)
    _, settings, _ = train.parse("graph --preset small".split())
    assert "{a}" in settings.wording and len(settings.wording) > 20
    assert train.parse(["graph"])[1].wording == "{a}"


def test_rates_that_were_made_for_another_width_are_said():
    """The miniature's rate beside 576 numbers a token, the paper's beside 64; none where the
    preset fits, or where nothing is trained."""
    def said(lr, width):
        model = SimpleNamespace(config=SimpleNamespace(width=width))
        settings = SimpleNamespace(lr=lr, qwen="", device="cpu", dtype="fp32")
        if lr is None:
            del settings.lr
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            with mock.patch.object(cdpo, "load_language_model", return_value=(model, None)):
                cdpo.language_model(settings)
        return out.getvalue()

    for lr, width in ((1e-2, 64), (5e-3, 64), (1e-3, 576), (1e-3, 896), (2e-7, 3584), (2e-6, 3584),
                      (None, 576)):
        assert said(lr, width) == "", (lr, width)
    for lr, width in ((1e-2, 576), (5e-3, 576), (2e-7, 576), (2e-7, 64), (1e-3, 3584)):
        text = said(lr, width)
        assert text.startswith(f"--lr {lr} was not made for a model of width {width}")
        assert text.count("\n") == 1 and "--preset small" in text


def test_train_says_when_gradients_are_clipped_or_answers_get_lost(tmp_path):
    """Once where 50 gradients in a row are longer than --clip; where over 50 steps the loss and the
    chosen answers' -log p are a tenth above what they were in the 50 before, both of them."""
    log = tmp_path / "metrics.jsonl"

    def said(norms, losses=(1, 1), chosen=(-5, -5), clip=1.0):
        rows = []
        for norm, loss, logp in zip(norms, losses, chosen):
            rows += 50 * [{"grad_norm": norm, "loss": loss, "logps/chosen": logp}]
        write_lines(log, *rows)
        return " ".join(train.alarms(log, clip))

    assert "longer than --clip 1.0" in said([2]) and "\n" not in said([2])
    assert "longer than" in said([0.5, 2]) and said([2, 2]) == "" == said([2, 0.5])
    assert said([2], clip=0) == ""
    assert "loss rises" in said([0.1, 0.1], (1, 2), (-5, -9))
    assert said([0.1, 0.1], (2, 1), (-5, -9)) == "" == said([0.1, 0.1], (1, 2), (-9, -5))
    assert said([0.1, 0.1], (1, 1.05), (-5, -9)) == "" == said([0.1, 0.1], (1, 2), (-5, -5.2))
    write_lines(log, *100 * [{"grad_norm": 0.1, "loss": 1}])                # sft, patch ...
    assert [*train.alarms(log, 1.0)] == []


def test_train_stopped_run_is_exported_and_may_get_other_steps():
    """--export writes what step_N holds, and trains nothing; without one it says so. Other --steps
    go on along another cosine, which is said, and stand in config.json."""
    command, d = prepared()
    command += " --warmup 0"
    raises("no step_N to export", train_here, f"{command} --export --out {d}/nothing")
    out = d / "exported"
    train_here(f"{command} --steps 3 --out {out}")
    want = (out / "adapter_model.safetensors").read_bytes()
    for name in ("adapter_model.safetensors", "collaborative.safetensors"):
        (out / name).unlink()
    log = (out / "metrics.jsonl").read_bytes()
    longer = f"{command} --steps 5 --out {out}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        train.main(shlex.split(f"{longer} --export"))
    assert "--steps was 3, now it is 5" in said.getvalue() and "after step 3" in said.getvalue()
    assert (out / "adapter_model.safetensors").read_bytes() == want
    assert (out / "metrics.jsonl").read_bytes() == log
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    train_here(longer)
    assert len(metrics_of(out)) == 5
    assert metrics_of(out)[4]["lr"] < metrics_of(out)[3]["lr"]


def test_train_logs_the_terms_of_the_loss_and_a_held_out_margin():
    """dpo + nll + neighbours is the loss; the margin of held-out pairs stands in the first line
    and in each N-th behind it, for a run that has soft tokens."""
    command, d = prepared()
    held = f"--users-test {SAMPLE}/users_test.jsonl --pairs-test {SAMPLE}/pairs_test.jsonl"
    train_here(f"{command} --steps 4 --check-every 3 --out {d}/terms {held}")
    lines = metrics_of(d / "terms")
    for line in lines:
        assert abs(line["dpo"] + line["nll"] + line["neighbours"] - line["loss"]) < 1e-3
        assert line["neighbours"] > 0 and line["nll"] > 0
    assert ["held-out margin" in line for line in lines] == [True, False, False, True]
    train_here(f"{command} --steps 1 --check-every 1 --user none --out {d}/termless {held}")
    assert "held-out margin" not in metrics_of(d / "termless")[0]
    train_here(f"{command} --steps 4 --out {d}/unchecked {held}")
    assert [line["loss"] for line in metrics_of(d / "unchecked")] == [x["loss"] for x in lines]


def evaluation(flags=""):
    """An Evaluation of a tiny policy on the shipped sample."""
    command, d = prepared()
    if not (d / "tiny_policy").exists():
        train_here(f"{command} --steps 2 --out {d}/tiny_policy")
    stage, settings, _ = build_stage(
        f"eval --policy {d}/tiny_policy --answers 1 --users {SAMPLE}/users.jsonl {flags} "
        f"--users-test {SAMPLE}/users_test.jsonl --pairs-test {SAMPLE}/pairs_test.jsonl")
    return stage, settings, d


def test_evaluation_compares_own_tokens_with_none_and_anothers():
    """Accuracy and margin of the held-out pairs are those of log-probabilities read with each
    condition's tokens, mean and standard error over people; the last column is paired."""
    found, settings, _ = evaluation()
    rows = {}
    for line in found.table().splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        rows[name] = cells[len(cdpo.RATES) + 1:]
    conditions = [*cdpo.CONDITIONS, "another's"]
    assert [*rows] == [*conditions, "(chosen)", "(rejected)"]
    known = found.known()
    tokens = cdpo.UserTokens.load(Path(settings.policy) / "collaborative.safetensors")
    margin = {}
    for name in ("likes + dislikes", "nothing", "another's"):
        margin[name] = []
        adapter = cdpo.generic(settings.policy) if name == "nothing" else settings.policy
        lora.load_adapter(found.model, adapter)
        soft = tokens.soft(tokens.new(known[name]))
        for pair, user in zip(found.pairs, found.owner):
            row = cdpo.encode_pair(found.tokenizer, pair)
            own = None if name == "nothing" else soft[user][None]
            with torch.no_grad():
                chosen, rejected = cdpo.answer_logprobs(found.model, [row], own)[0]
            margin[name].append(chosen - rejected)
        margin[name] = torch.stack(margin[name])
    own = margin["likes + dislikes"]
    for name, values in margin.items():
        for cell, value in zip(rows[name], ((values > 0).float(), values, own - values)):
            people = [value[found.owner == user].mean() for user in found.owner.unique()]
            mean = torch.stack(people).mean().item()
            error = torch.stack(people).std().item() / len(people) ** 0.5
            assert abs(float(cell.split()[0]) - mean) < 2e-3, (name, cell, mean)
            assert abs(float(cell.split()[2]) - error) < 2e-3
    assert rows["likes + dislikes"][2] == "0.000 +- 0.000"
    for user, other in zip(found.users, known["another's"]):
        clash = len(set(user.likes) & set(other.dislikes))
        assert clash >= max(len(set(user.likes) & set(one.dislikes)) for one in found.users) - 4


def test_evaluation_gives_who_says_nothing_the_sft_adapters_answers():
    """The policy's folder keeps the SFT adapter. Somebody without a history has its answers and
    margins, without tokens, also in company; the others have the policy's."""
    found, settings, d = evaluation()
    policy = settings.policy
    sft = lora.read_tensors(d / "sft/adapter_model.safetensors")
    kept = lora.read_tensors(Path(policy) / cdpo.REFERENCE)
    assert kept.keys() == sft.keys() and all(same(kept[name], sft[name]) for name in sft)
    silent = [replace(user, likes=[], dislikes=[]) for user in found.users]
    speaker = found.owner[0].item()
    mixed = [*silent[:speaker], found.users[speaker], *silent[speaker + 1:]]
    settings.temperature = 0
    with mock.patch.object(settings, "policy", f"{d}/sft"):
        generic = found.answers(silent, found.captions)
    own = found.answers(found.users, found.captions)
    assert found.answers(silent, found.captions) == generic != own
    said = found.answers(mixed, found.captions)
    assert said == [one if one[0] == speaker else other for one, other in zip(own, generic)]
    margin = found.margins(mixed)
    assert same(margin, found.margins([*mixed, User("without pairs", [], [])]))
    assert found.margins([*found.users, User("without pairs", [], [])]).all()
    first = found.owner == speaker
    assert_close(margin[first], found.margins(found.users)[first], 1e-4)
    settings.policy = f"{d}/sft"
    assert_close(margin[~first], found.margins(silent)[~first], 1e-4)
    assert (margin[first] - found.margins(silent)[first]).abs().max() > 0.1


def test_evaluation_tells_the_profile_that_the_condition_shows():
    """--profile own: each condition cuts the prompt's words as it cuts the graph's edges."""
    found, settings, _ = evaluation("--profile own")
    known = found.known()
    with mock.patch.object(cdpo, "suggest", return_value=[]) as given:
        for name in cdpo.CONDITIONS:
            found.answers(known[name], found.captions)
            text = given.call_args_list[-1].args[2][0][0]["content"]
            user = found.users[found.owner.min()]
            shown = {"likes", "dislikes"} & set(name.split())
            assert (f"profile likes {', '.join(user.likes)}" in text) == ("likes" in shown), name
            assert (f"dislikes {', '.join(user.dislikes)}" in text) == ("dislikes" in shown), name
    with mock.patch.object(cdpo, "encode_pair", wraps=cdpo.encode_pair) as given:
        found.margins(known["dislikes only"])
    told = {}
    for call in given.call_args_list:
        told[call.args[1]["user"]] = call.args[1]["profile"]
    assert len(told) == 3
    for user in found.users:
        assert told.get(user.name) in (None, cdpo.profile(replace(user, likes=[])))


def test_evaluation_measures_table_2s_cosine():
    """The mean cosine, by CLIP's text tower, of an answer to all that its user chose in the file;
    chosen answers are nearer than rejected ones; without --clip there is none."""
    found, _, _ = evaluation()
    one, *_, other = found.owner.tolist()
    answers = [(one, "a mug", "Paint the mug gold", True), (other, "a mug", "Add a crown", True)]
    clip = flux.CLIPText.load(MINI / "clip")
    tokenizer = flux.TextTokenizer(MINI / "clip")

    def unit(texts):
        with torch.no_grad():
            return nn.functional.normalize(clip.embed(tokenizer(texts)), dim=-1)

    pairs = read_lines(SAMPLE / "pairs_test.jsonl")
    for (i, _, text, _), cosine in zip(answers, found.cosines(answers)):
        liked = [pair["chosen"] for pair in pairs if pair["user"] == found.users[i].name]
        assert_close((unit(liked) @ unit([text]).T).mean(), cosine, 1e-5)
    rows = found.table().splitlines()
    chosen, rejected = (float(row.split(" | ")[7].split()[0]) for row in rows[-2:])
    assert chosen > rejected + 0.02
    found, _, _ = evaluation('--clip ""')
    assert found.cosines(answers).isnan().all()


def test_bench_methods_computes_a_seed_of_a_method_once(tmp_path):
    """A second call reads what a seed came to; prompt engineering has the words, others do not."""
    module = bench("methods")
    command, d = prepared()
    sample = ["--users", f"{SAMPLE}/users.jsonl", "--users-test", f"{SAMPLE}/users_test.jsonl",
              "--pairs-test", f"{SAMPLE}/pairs_test.jsonl", "--answers", "1"]
    args = SimpleNamespace(preset="mini", profile=None, steps=1, batch=4, seeds=1, sft=f"{d}/sft",
                           graph=f"{d}/graph", pairs=f"{SAMPLE}/pairs.jsonl",
                           edits=f"{SAMPLE}/edits.jsonl", out=str(tmp_path))
    names = ["SFT", "SFT-Vanilla", "prompt engineering, own profile", module.PLAIN]
    rows = {name: module.METHODS[name] for name in names}
    with quiet():
        methods = module.Methods(args, sample)
        found = methods.units(rows)
        with mock.patch.object(methods, "answers", None):
            assert methods.units(rows) == found
    shown = module.SHOWN
    sft = found["SFT"]
    assert sft[shown[0]] == sft[shown[1]] == sft[shown[2]]
    own = found["prompt engineering, own profile"]
    assert own[shown[0]] != own[shown[2]] and own[shown[0]][0]["hit"] > sft[shown[0]][0]["hit"]
    assert len(read_lines(tmp_path / "units.jsonl")) == 4


def test_evaluation_counts_gold_answers_as_what_they_are():
    """What held-out people chose asks for what they like, in any case and number, several at once;
    rejected answers for what they dislike; the same rule for both."""
    found, _, _ = evaluation()
    user = User("x", ["polka dot", "brass lanterns", "cherry"], ["wolves"], ["ivy"])
    found.names = cdpo.find_names(user.likes + user.dislikes + user.hidden)
    for text, want in (
        ("Cover it in POLKA DOTS", {"likes", "hit"}),
        ("Hang a brass lantern, with cherries and ivy", {"likes", "would like", "hit"}),
        ("Ivies on the wall", {"would like", "hit"}),
        ("Polka dots and two Wolves", {"likes", "hit", "dislikes"}),
        ("polka dotted", {"no attribute"}),
    ):
        verdict = found.verdict(user, text, True)
        assert {name for name, true in zip(cdpo.RATES, verdict) if true} == want, text
    assert graph.spellings("Berry") >= {"berry", "berries"}
    assert graph.spellings("roses") >= {"rose", "roses"}
    assert "by" not in graph.spellings("blue") and "gold" not in graph.spellings("golden")


def test_evaluation_samples_as_told_and_leaves_answers_to_read(tmp_path):
    """--temperature, --top-p and --max-new-tokens reach the sampler; every answer stands in --out,
    or beside the policy, with the person, the caption and what it counts as."""
    file = tmp_path / "answers.txt"
    flags = f"--temperature 0.5 --top-p 0.9 --max-new-tokens 7 --out {file}"
    found, settings, d = evaluation(flags)
    with mock.patch.object(cdpo, "suggest", wraps=cdpo.suggest) as given:
        found.table()
    how = given.call_args.kwargs
    assert (how["temperature"], how["top_p"], given.call_args.args[4]) == (0.5, 0.9, 7)
    text = file.read_text()
    answers = [line for line in text.splitlines() if line.count(" | ") == 3]
    assert len(answers) == 5 * sum(map(len, found.captions)) + 2 * len(found.pairs)
    assert "likes + dislikes\n" in text and "another's\n" in text
    gold = f"{found.pairs[0]['user']} | {found.pairs[0]['caption']} | {found.pairs[0]['chosen']} | "
    assert gold in text
    found.settings.out = ""
    with mock.patch.object(found, "answers", return_value=[(0, "a mug", "gold", True)]):
        with mock.patch.object(found, "margins", return_value=torch.zeros(len(found.pairs))):
            found.table()
    assert "| a mug | gold |" in Path(f"{settings.policy}_answers.txt").read_text()


def test_evaluation_of_pairs_of_nobody_names_the_line(tmp_path):
    pairs = read_lines(SAMPLE / "pairs_test.jsonl")
    file = tmp_path / "pairs.jsonl"
    write_lines(file, pairs[0], {**pairs[1], "user": "zoe"})
    raises(f"{file}:2: user 'zoe' is not in", cdpo.read_pairs, SAMPLE / "users_test.jsonl", file)


def test_soft_tokens_stand_in_front_or_before_the_assistants_turn():
    """Either place gives the log-probabilities of the vectors put there by hand; what is suggested
    does not depend on the others in a batch; the place stands in the file."""
    model, tokenizer = qwen.load_language_model(MINI / "qwen")
    soft = 0.1 * noise(2, 3, 64)
    texts = ("A white mug", "A red bag in front of a grey wall")
    rows = [cdpo.encode(tokenizer, cdpo.prompt(text), "Paint it red") for text in texts]
    turn = len(tokenizer.chat([], False)) - len(tokenizer.chat([]))
    begin = tokenizer.encode("<|im_start|>assistant\n")
    assert turn == -len(begin)
    embed = model.model.embed_tokens
    for at in (0, turn):
        found = cdpo.answer_logprobs(model, rows, soft, at)[:, 0]
        for i, (asked, (answer,)) in enumerate(rows):
            head = embed(torch.tensor(asked[:at], dtype=torch.int64))
            tail = embed(torch.tensor(asked[at:] + answer))
            whole = torch.cat([head, soft[i], tail])[None]
            logits = model(embeds=whole)[0, -len(answer) - 1:-1]
            want = -nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            assert abs(found[i] - want) < 1e-3
        prompts = [cdpo.prompt(text) for text in texts]
        both = cdpo.suggest(model, tokenizer, prompts, soft, at=at)
        for i in range(2):
            assert cdpo.suggest(model, tokenizer, prompts[i:i + 1], soft[i:i + 1], at=at) == \
                both[i:i + 1]


def test_cdpo_place_is_kept_and_read_again():
    """--place turn trains with gradients to every soft token, and every reader of the policy finds
    the place in its file."""
    stage, settings, _ = cdpo_stage("--place turn --lam 0")
    assert stage.tokens.soft.at == -len(stage.tokenizer.encode("<|im_start|>assistant\n"))
    rows = draw_batch(stage, settings)
    loss, _ = stage.loss(rows)
    loss.backward()
    assert stage.tokens.soft.fc2.bias.grad.view(stage.tokens.soft.tokens, -1).any(1).all()
    front, _, _ = cdpo_stage("--lam 0")
    assert front.tokens.soft.at == 0 and abs(front.loss(rows)[0] - loss) > 1e-3
    command, d = prepared()
    train_here(f"{command} --steps 1 --place turn --out {d}/turned")
    read = cdpo.UserTokens.load(d / "turned/collaborative.safetensors")
    assert read.soft.at == stage.tokens.soft.at
    asked = f"--policy {d}/turned --user imaginative-child --users {SAMPLE}/users_test.jsonl"
    with mock.patch.object(cdpo, "suggest", wraps=cdpo.suggest) as given:
        edit_words(*shlex.split(asked))
    assert given.call_args.kwargs["at"] == read.soft.at


def test_graph_names_are_embedded_by_the_stages_own_model_in_a_wording():
    """--qwen's, or --embedder's; the wording is refused without {a}, stands in the file, and holds
    for words that come later."""
    _, d = prepared()
    users = f"--users {SAMPLE}/users.jsonl --steps 1"
    train_here(f"graph {users} --wording 'a photo in {{a}} style' --out {d}/worded")
    read, _, _ = graph.load_graph(d / "worded/collaborative.safetensors")
    wording = "a photo in {a} style"
    assert read.embedder == {"embedder": str(MINI / "qwen").replace(str(ROOT) + "/", ""),
                             "norm": 4.0, "wording": wording}
    model, tokenizer = qwen.load_language_model(MINI / "qwen")
    texts = [f"a photo in {name} style" for name in read.attributes]
    plain = qwen.embed_texts(model, tokenizer, texts)
    centred = nn.functional.normalize(plain - plain.mean(0), dim=-1)
    assert_close(read.features, 4 * centred, 1e-5)
    with contextlib.chdir(ROOT):
        wide = read.widened(["velvet"])
    assert same(wide.features[:-1], graph.embed_names(
        wide.attributes, MINI / "qwen", 4.0, wording=wording, known=len(texts))[:-1])
    raises("--wording is 'x'; it must contain {a}", train_here, f"graph {users} --wording x")
    with mock.patch.object(graph, "load_language_model", side_effect=ValueError("asked")) as given:
        for flags, model in (("--qwen here", "here"), ("--qwen here --embedder there", "there")):
            raises("asked", build_stage, f"graph {users} {flags}")
            assert given.call_args.args[0] == model


def test_edit_words_only_needs_no_flux():
    """A line for each person and sample, those of --seed SEED, SEED + 1 ...; no picture, no FLUX;
    --samples is refused elsewhere."""
    said = io.StringIO()
    flags = "--words-only --samples 3 --flux nowhere/at-all --controlnet none"
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(said):
        with mock.patch.object(edit, "write", side_effect=AssertionError):
            edit.main(shlex.split(flags))
    lines = [line for line in said.getvalue().splitlines() if ": " in line]
    assert len(lines) == 9
    one = edit.PERSONAS[0]
    for seed in range(3):
        assert lines[seed].startswith(f"{one}: {edit_words('--user', one, '--seed', str(seed))[0]}")
    raises("--samples has no effect without --words-only", edit.parse, ["--samples", "2"])


def test_edit_takes_model_and_people_from_the_policy(tmp_path):
    """Where no flag says otherwise; another --qwen is taken, and said in a line."""
    _, _, d = evaluation()
    folder = copied(d / "tiny_policy", tmp_path / "policy")
    base = copied(MINI / "qwen", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    people = tmp_path / "people.jsonl"
    write_lines(people, {"user": "zoe", "likes": ["gold"], "dislikes": []})

    def words(flags, qwen_is, users_is):
        settings = edit.parse(["--caption", "A mug", "--policy", str(folder), *shlex.split(flags)])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            wishes = edit.write_instructions(settings)
        assert (settings.qwen, settings.users) == (qwen_is, users_is)
        assert len(wishes) == 1
        return said.getvalue()

    trained = str(base)
    for users, want in ((str(people), str(people)), (str(tmp_path / "gone.jsonl"), None)):
        write_lines(folder / "config.json", {**config, "qwen": trained, "users_test": users})
        name = "zoe" if want else read_lines(SAMPLE / "users.jsonl")[0]["user"]
        assert "was trained" not in words(f"--user {name}", trained, want)
    other = str(MINI / "qwen")
    said = words(f"--qwen {other} --user zoe --users {people}", other, str(people))
    assert f"{folder} was trained with {trained}, not with {other}" in said


def test_bench_real_words_reads_gguf_blocks(tmp_path):
    """Q4_1 is a half byte times a scale plus a minimum, low halves first; Q8_0 a byte times a
    scale; rows of queries go from neighbouring pairs back to halves."""
    words = bench("real_words")
    g = np.random.default_rng(0)
    scale, least = np.float16(0.5), np.float16(-2)
    nibbles = g.integers(0, 16, 32).astype(np.uint8)
    packed = (nibbles[:16] | nibbles[16:] << 4).tobytes()
    block = np.frombuffer(scale.tobytes() + least.tobytes() + packed, np.uint8)
    assert (words.dequantised(block, 3, [4, 8]) == (nibbles * 0.5 - 2).reshape(4, 8)).all()
    numbers = g.integers(-128, 128, 32).astype(np.int8)
    block = np.frombuffer(scale.tobytes() + numbers.tobytes(), np.uint8)
    assert (words.dequantised(block, 8, [32]) == numbers * 0.5).all()
    raw = np.arange(3, dtype=np.float32)
    assert (words.dequantised(raw.view(np.uint8), 0, [3]) == raw).all()
    weight = np.arange(8, dtype=np.float32)[:, None]                        # 2 heads of 4 rows
    about = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 2}
    tensors = {"token_embd.weight": raw, "output_norm.weight": raw, "blk.0.attn_q.weight": weight}
    found = words.qwen_tensors(about, tensors)
    rows = found["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]
    assert not found["model.layers.0.self_attn.q_proj.bias"].any()
    text = b"abc"
    data = struct.pack("<Q", 3) + text + struct.pack("<IQ", 4, 2) + struct.pack("<II", 7, 9)
    reader = words.Reader(np.frombuffer(data, np.uint8))
    assert reader.text() == "abc" and reader.value(9) == [7, 9]


def test_bench_real_words_are_people_of_two_themes(tmp_path):
    """Files in README's formats, the same for a seed; a chosen answer names what the person likes
    or would, a rejected one nothing of it; the captions of the test are new."""
    words = bench("real_words")
    for name in ("a", "b"):
        words.make_data(tmp_path / name, users=20, seed=1)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    themes, kinds = words.attributes()
    assert len(themes) == 10 and len(kinds) == 100 and set(kinds.values()) == set(words.SENTENCES)
    captions = []
    for test in ("", "_test"):
        users, pairs, owner = cdpo.read_pairs(
            tmp_path / f"a/users{test}.jsonl", tmp_path / f"a/pairs{test}.jsonl")
        names = cdpo.find_names(graph.attribute_names(users) + list(kinds))
        for pair, user in zip(pairs, owner):
            likes = {*users[user].likes, *users[user].hidden}
            assert set(names.findall(pair["chosen"])) & likes, pair
            assert not set(names.findall(pair["rejected"])) & likes, pair
        captions.append({pair["caption"] for pair in pairs})
    assert not captions[0] & captions[1]
    edits = cdpo.read_answers(tmp_path / "a/edits.jsonl", "edit", input=str)
    assert len(edits) == 480
    table = """| it knows | a | x | hit | dislikes | y | z | CLIP | accuracy | margin | less |
| --- |
| likes + dislikes | .1 | .2 | 0.3 | 0.01 | 0 | 0 | nan +- nan | 0.9 +- 0.1 | 9 +- 1 | 0 |
| nothing | 0 | 0 | 0 | 0 | 0 | 0 | nan +- nan | 0.5 +- 0.1 | 2 +- 1 | 7.5 +- 0.5 |"""
    assert words.measures(table) == (0.3, 0.01, 0.9, 7.5)


# ---- the house -----------------------------------------------------------------------------------

TOP = ["cdpo", "controlnet", "edit", "flux", "graph", "lora", "patch_dpo", "qwen", "train"]
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENCODING, tokenize.ENDMARKER}


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.split()


def imported_modules(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def code_of(file):
    """(tokens, lines that hold one) of a file, without comments, docstrings and layout."""
    source = file.read_text()
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    count = 0
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in documented:
            count += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    return count, len(lines)


def test_house_top_level_is_the_designs():
    """The top level holds DESIGN.md's files and no others; mini/ stays under 40 MB."""
    tracked = tracked_files()
    top = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    files = {f"{name}.py" for name in [*TOP, "test_all"]}
    assert top == files | {"README.md", "requirements.txt", "mini", "bench"}
    sizes = [(ROOT / name).stat().st_size for name in tracked if name.startswith("mini/")]
    assert sum(sizes) < 40e6


def test_house_imports_flow_one_way():
    """The top-level files and mini/ import the standard library, six packages and one another;
    nobody imports train or edit, and no two files import each other."""
    allowed = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "PIL"}
    pinned = set()
    for line in (ROOT / "requirements.txt").read_text().split():
        name = re.match(r"[\w-]+", line)[0].replace("-", "_")
        pinned.add(name.replace("pillow", "PIL"))
    assert pinned == allowed
    imports = {}
    for name in tracked_files():
        if re.fullmatch(r"(mini/)?\w+\.py", name) and name != "test_all.py":
            found = imported_modules(ast.parse((ROOT / name).read_text()))
            imports[Path(name).stem] = found - sys.stdlib_module_names
    for name, found in imports.items():
        assert found <= allowed | set(imports) - {"train", "edit"}, (name, found)
        for other in found & set(imports):
            assert name not in imports[other], f"{name} and {other} import each other"


def test_house_is_written_for_readers():
    """No line is over 100 columns; a code line has at most 12 tokens over a file and 10.5 over the
    nine files, which have at most 40,000 together."""
    tokens = 0
    lines = 0
    for name in tracked_files():
        if name.endswith(".py"):
            file = ROOT / name
            wide = [line for line in file.read_text().splitlines() if len(line) > 100]
            assert not wide, f"{name}: {wide[0]}"
            count, code = code_of(file)
            assert count <= 12 * code, f"{name}: {count / code:.1f} tokens a line"
            if file.stem in TOP and file.parent == ROOT:
                tokens += count
                lines += code
    assert tokens <= 43_800 and tokens <= 10.5 * lines, (tokens, tokens / lines)


def quoted_commands(text):
    """[(script, its arguments)] of the commands that a README quotes."""
    pattern = r"(?:python|torchrun [^`\n]*?) ([\w/]+\.py)([^`\n#&|]*)"
    return [(name, shlex.split(rest)) for name, rest in re.findall(pattern, text)]


def test_readme_commands_name_files_and_flags_that_exist():
    """Every command in README.md and bench/README.md parses, or at least its flags are known."""
    for readme in (ROOT / "README.md", ROOT / "bench/README.md", MINI / "examples/README.md"):
        for name, words in quoted_commands(readme.read_text()):
            scripts = {"train.py": train, "edit.py": edit}
            if name in scripts:
                if "-h" not in words:
                    scripts[name].parse(["cdpo" if word == "STAGE" else word for word in words])
                continue
            folder = (ROOT / name).parent                       # bench/run.py hands flags on
            source = "".join(file.read_text() for file in folder.glob("*.py"))
            for word in words:
                assert not word.startswith("--") or word in source, (name, word)


def test_readme_equations_stand_where_it_says():
    """The code that the equation map quotes is a line of the function that it names."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\|.*\| `(\w+\.py):([\w.]+)` \| `(.*)` \|$", text, re.M)
    assert len(rows) >= 10
    for file, name, code in rows:
        source = (ROOT / file).read_text()
        node = ast.parse(source)
        for part in name.split("."):
            named = {child.name: child for child in node.body if hasattr(child, "name")}
            assert part in named, f"{file} has no {name}"
            node = named[part]
        body = ast.get_source_segment(source, node)
        assert code.replace("\\|", "|") in body, f"{code!r} is not in {file}:{name}"


def test_readme_sizes_are_the_files():
    """The reading order's sizes, in tokens, are within 3 % of the files'."""
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)\.py` \|.*\| ([\d,]+) \|$", text, re.M))
    assert set(rows) == set(TOP)
    for name, size in rows.items():
        count, _ = code_of(ROOT / f"{name}.py")
        assert abs(int(size.replace(",", "")) - count) <= 0.03 * count, (name, size, count)


# ---- run -----------------------------------------------------------------------------------------

def run_test(test):
    """(outcome, why)"""
    try:
        with tempfile.TemporaryDirectory() as folder:
            test(*[Path(folder)] * test.__code__.co_argcount)
    except unittest.SkipTest as error:
        return "skipped", f": {error}"
    except (Exception, SystemExit):
        return "failed", "\n" + traceback.format_exc()
    return "passed", ""


def main(pattern=""):
    tests = [value for name, value in globals().items()
             if name.startswith("test_") and pattern in name]
    count = {"passed": 0, "failed": 0, "skipped": 0}
    for test in tests:
        start = time.time()
        outcome, why = run_test(test)
        count[outcome] += 1
        print(f"{outcome:8s}{time.time() - start:6.1f} s  {test.__name__}{why}", flush=True)
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    print(f"{count['passed']} passed, {count['failed']} failed{skipped}")
    return 1 if count["failed"] or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
