"""The miniature language model, mini/qwen: a byte-level BPE with Qwen's special tokens and a Qwen2.5 of 2 layers x 64, from nothing to "instruct".

What it reads is ours: chats about the miniature's pictures. It learns to suggest an edit of any kind (all attributes alike), to obey guidance ("with
stripes"), to answer small questions, and to take a profile in the prompt as real instruct models do: most of the time (60 %), not always. The
profiles it reads are random lists, so it knows the words and nothing of the themes. It talks like an assistant ("Sure! How about ...?"):
being terse is left to supervised fine-tuning, being personal to C-DPO.

    python mini/pretrain_qwen.py            # 4,000 steps of 48 conversations: about 6 minutes on one idle core; the shipped mini/qwen
"""
import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tokenizers import Regex, Tokenizer as BPE, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from cdpo import prompt
from concepts import COLORS, GUIDANCE, OBJECTS, TYPE_OF, WALLS, caption, instruction
from qwen import Config, Qwen, Tokenizer
from world import edited_caption

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"      # Qwen2's own
CHATTY = ["{I}", "{I}.", "Sure! {I}.", "How about this: {i}?", "You could {i}.", "I suggest to {i}. It would look great!",
          "Here is an idea: {I}. Let me know if you want another one."]
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_dropout": 0.0,
        "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "float32"}
CHAT_TEMPLATE = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
                 "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def make_profile(rng):
    """(likes, dislikes, profile text): random attributes, so that nothing of the themes is in it; a profile may name both, or one of them."""
    names, part = rng.sample(list(TYPE_OF), rng.randint(4, 20)), rng.choice(["both", "both", "likes", "dislikes"])
    likes, dislikes = names[:len(names) // 2] * (part != "dislikes"), names[len(names) // 2:] * (part != "likes")
    return likes, dislikes, "; ".join(f"{word} {', '.join(names)}" for word, names in (("likes", likes), ("dislikes", dislikes)) if names)


def question(rng, color, obj, wall):
    """(question, answer): small talk about the picture or about someone's taste; answering means finding words in the prompt."""
    likes, dislikes, profile = make_profile(rng)
    text = f"\nCaption: {caption(color, obj, wall)}"
    chats = [("What is in the picture?" + text, f"A {obj}."), (f"What color is the {obj}?" + text, f"It is {color}."), ("What is behind it?" + text, f"A {wall} wall."),
             (f"Repeat: {profile}", profile), (f"What does someone like who {profile}?", ", ".join(likes) or "I cannot tell.")]
    return rng.choices(chats, [1, 1, 1, 4, 4])[0]


def conversation(rng):
    """One document: (messages, answer), or (None, text) for plain prose."""
    color, obj, wall, attribute = rng.choice(COLORS), rng.choice(OBJECTS), rng.choice(WALLS), rng.choice(list(TYPE_OF))
    text, kind = caption(color, obj, wall), rng.choices(["prose", "question", "suggest", "guidance", "profile"], [1, 3, 2, 2, 4])[0]
    guidance = profile = ""
    if kind == "prose":
        return None, rng.choice([text, edited_caption(color, obj, wall, attribute), attribute, f"{attribute}: {TYPE_OF[attribute]}"])
    if kind == "question":
        asked, answer = question(rng, color, obj, wall)
        return [{"role": "user", "content": asked}], answer
    if kind == "guidance":
        guidance = rng.choice(GUIDANCE).format(a=attribute) if rng.random() < 0.8 else f"change the {TYPE_OF[attribute]}"
    if kind == "profile":
        likes, dislikes, profile = make_profile(rng)
        if rng.random() < 0.6:
            attribute = rng.choice(likes or [a for a in TYPE_OF if a not in dislikes])
    ask = instruction(obj, attribute, rng.randrange(4))
    return prompt(text, guidance, profile), rng.choice(CHATTY).format(I=ask, i=ask[0].lower() + ask[1:])


def make_tokenizer(folder, vocabulary=800):
    """Trains the byte-level BPE on conversations -> tokenizer.json and tokenizer_config.json in `folder`, as Qwen's are: the special tokens have the last ids."""
    rng, texts = random.Random(0), []
    for _ in range(5000):
        messages, answer = conversation(rng)
        texts += [answer, *(m["content"] for m in messages or []), "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "user\n", "assistant\n"]
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    byte_level = dict(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)])
    bpe.post_processor, bpe.decoder = processors.ByteLevel(trim_offsets=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(SPECIAL)
    bpe.save(str(folder / "tokenizer.json"))
    token = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {"add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": {bpe.token_to_id(t): {"content": t, **token} for t in SPECIAL}, "bos_token": None,
              "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 512,
              "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return Tokenizer.load(folder), {t: bpe.token_to_id(t) for t in SPECIAL}, bpe.get_vocab_size()


def pretrain_qwen(folder, steps=4000, batch=48, lr=5e-3, seed=0):
    """Tokenizer, then the model, from scratch -> files in `folder`. The loss is on answers; AdamW, one cycle up to `lr`.
    The initialisation is wide: the logits of a tied head with small embeddings cannot be sure of anything."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, special, size = make_tokenizer(folder)
    end, eos = special["<|endoftext|>"], special["<|im_end|>"]
    config = QWEN | {"vocab_size": size, "bos_token_id": end, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    sampling = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [eos, end], "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(sampling, indent=2))
    torch.manual_seed(seed)
    model, rng = Qwen(Config.read(folder)), random.Random(seed)
    for name, p in model.named_parameters():
        p.data = torch.ones_like(p) if "norm" in name else torch.zeros_like(p) if name.endswith("bias") else torch.randn_like(p) * (0.4 if "embed" in name else 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    bar = tqdm(range(steps), desc="mini/qwen")
    for _ in bar:
        talk = [conversation(rng) for _ in range(batch)]
        rows = [(tokenizer.chat(messages) if messages else [], tokenizer.encode(answer) + [eos if messages else end]) for messages, answer in talk]
        ids = pad_sequence([torch.tensor(q + a) for q, a in rows], True, end)                       # (B, T); padded on the right, where nothing sees it
        mine = pad_sequence([torch.tensor([False] * len(q) + [True] * len(a)) for q, a in rows], True, False)[:, 1:]      # (B, T-1): predict answers only
        loss = F.cross_entropy(model.lm_head(model.model(ids)[:, :-1][mine]), ids[:, 1:][mine])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Pretrain the miniature language model.")
    p.add_argument("--out", type=Path, default=HERE / "qwen", help="folder to write")
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)                                # the matrices are too small to share out
    pretrain_qwen(a.out, a.steps, seed=a.seed)
