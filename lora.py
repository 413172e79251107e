"""Low-rank adapters (LoRA, arXiv 2106.09685) for any module made of nn.Linear: Qwen and Flux here.

    y = W x + b + (alpha / rank) B A x      W and b are frozen; A (rank, in) and B (out, rank) learn

Over one frozen base live two adapters: "policy", which is trained, and "reference", the frozen SFT
policy that DPO compares it with. `use` says which of them (or neither) the next forwards run with.
An adapter is fp32 whatever the base is: bf16 AdamW cannot move at the paper's 2e-7, nor would a
product in bf16 show what it has moved. On a GPU the products run in TF32: see qwen.set_precision.
Files are in PEFT's format, both ways; diffusers' LoRAs for FLUX.1 are read as well.
Shapes: "..." is any batch. Try it: python lora.py
"""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qwen import Linear, check_fit, few, find_tensors, put, read_json, read_tensors, reading

ADAPTERS = ("policy", "reference")


class LoRALinear(Linear):
    """The linear layer `base`, its parameters and their names kept, and an A and a B for each
    adapter. PEFT's initialisation: A is random, as nn.Linear draws its weight, and B zero, so at
    first nothing changes."""

    def __init__(self, base, rank, alpha, dropout):
        # without memory: weight and bias are those of `base`
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight                           # (out, in)
        self.bias = base.bias                               # (out,) or None
        self.training = base.training
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout = dropout
        self.adapter = "policy"
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        device = base.weight.device
        for name in ADAPTERS:                               # in fp32, torch's default
            A = nn.Linear(base.in_features, rank, bias=False, device=device).weight
            B = torch.zeros(base.out_features, rank, device=device)
            trained = name == "policy"
            self.lora_A[name] = nn.Parameter(A, trained)
            self.lora_B[name] = nn.Parameter(B, trained)

    def forward(self, x):
        y = super().forward(x)                              # (..., out), W x + b
        if self.adapter is None:
            return y
        A = self.lora_A[self.adapter]                       # (rank, in)
        B = self.lora_B[self.adapter]                       # (out, rank)
        x = F.dropout(x, self.dropout, self.training)       # (..., in)
        low = F.linear(x.to(A.dtype), A)                    # (..., rank)
        return y + F.linear(self.scale * low, B).to(y.dtype)


# ---- adapters of a model -----------------------------------------------------------------------

def injected(model):
    """{name: LoRALinear}, empty where there are no adapters."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def layers(model):
    """As `injected`; ValueError where there are no adapters."""
    found = injected(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters, or no more: see inject, merge")
    return found


def adaptable(model):
    """Names of the linear layers that can have adapters: all but the output head, whose weight
    cdpo.py multiplies with by itself."""
    return [name for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and not name.endswith("lm_head")]


def matching(names, targets):
    """The names among `targets`, and those that end in a target which is no whole name itself:
    q_proj and self_attn.q_proj are such ends."""
    ends = tuple(f".{target}" for target in targets if target not in names)
    return [name for name in names if name in targets or name.endswith(ends)]


def inject(model, rank=16, alpha=32, dropout=0.05, targets="all-linear"):
    """Freeze `model`, put both adapters on its linear layers, use "policy" -> the layers' names.
    Call it when the model has its device and dtype. `targets`: layers' names or their last parts,
    or "all-linear": all but the output head. ValueError for adapters that are there already, and
    for targets that the model lacks."""
    if injected(model):
        raise ValueError(f"{type(model).__name__} has adapters already")
    names = adaptable(model)
    if targets == "all-linear":
        targets = names
    absent = [target for target in targets if not matching(names, [target])]
    if absent:
        raise ValueError(f"{type(model).__name__} has no linear layer named {', '.join(absent)}")
    names = matching(names, targets)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, dropout))
    return names


def use(model, adapter):
    """Run forwards with "policy", "reference" or None (the base alone). Under gradient
    checkpointing, which runs them again, switch only after the backward pass."""
    if adapter not in (*ADAPTERS, None):
        raise ValueError(f"adapter {adapter!r}: allowed are 'policy', 'reference' and None")
    for layer in layers(model).values():
        layer.adapter = adapter


def public(model, name):
    """A layer's name in PEFT's files: without "model." where an embedding model has no head."""
    headless = getattr(model, "lm_head", model) is None
    return name.removeprefix("model.") if headless else name


def tensors(model, adapter):
    """The adapter's parameters under the names they have in PEFT's files."""
    found = {}
    for name, layer in layers(model).items():
        name = public(model, name)
        found[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A[adapter]
        found[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B[adapter]
    return found


@torch.no_grad()
def copy_adapter(model, source="policy", target="reference"):
    """Make `target` equal to `source`: what SFT has taught the policy is DPO's reference."""
    given = tensors(model, source)
    for name, p in tensors(model, target).items():
        p.copy_(given[name])


@torch.no_grad()
def merge(model, adapter="policy", strength=1.0):
    """Add the adapter, times `strength`, to the base weights, in fp32 and then rounded once, and
    leave plain linear layers: it cannot be undone or repeated."""
    for name, layer in layers(model).items():
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        scale = strength * layer.scale
        change = scale * layer.lora_B[adapter] @ layer.lora_A[adapter]      # (out, in)
        weight = (layer.weight.float() + change).to(layer.weight.dtype)
        plain.weight = nn.Parameter(weight, False)
        plain.bias = layer.bias
        model.set_submodule(name, plain.train(layer.training))


# ---- files in PEFT's format, and diffusers' for FLUX.1 ------------------------------------------

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

# A tensor's name: PEFT's or diffusers' prefix, the layer, which of its tensors. Adapters of
# embedding models lack "model.".
FORM = re.compile(r"(base_model\.model\.|transformer\.)?(model\.)?"
                  r"(?P<layer>.+)\.(?P<what>lora_A\.weight|lora_B\.weight|alpha)")

# What adapter_config.json may say, and the values of which one case is written here (false and
# null always pass). Which layers have adapters is read off the tensors' names.
KNOWN = {"r", "lora_alpha", "lora_dropout", "use_rslora",                      # honoured
         "base_model_name_or_path", "task_type", "revision", "auto_mapping",   # without effect
         "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
         "eva_config", "runtime_config",
         "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
FIXED = {"peft_type": ["LORA"], "bias": ["none"],
         "init_lora_weights": [True, "gaussian", "eva", "orthogonal"]}


def save_adapter(model, folder, adapter="policy", base_model=None):
    """Write adapter_model.safetensors and adapter_config.json, which peft reads; `base_model` is
    the path or repository noted there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model, adapter), folder / PEFT_FILE, {"format": "pt"})
    layer, *_ = layers(model).values()          # all have the same rank, alpha and dropout
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if getattr(model, "lm_head", None) else None,
        "base_model_name_or_path": base_model and str(base_model),
        "r": len(layer.lora_A[adapter]),
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout,
        "bias": "none",
        "inference_mode": True,
        # in full: a last part may stand elsewhere too
        "target_modules": [public(model, name) for name in layers(model)],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_settings(file, stored):
    """(rank, alpha, dropout) of an adapter. They stand in adapter_config.json; those of diffusers'
    files in the header, or nowhere: None. ValueError for one that is absent, and naming what is not
    written here: DoRA, rank patterns, ..."""
    if any(name.startswith("base_model.") for name in stored):
        file = file.with_name("adapter_config.json")
        config = read_json(file)
    else:
        with reading(file), safe_open(file, "pt") as opened:
            config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            config = {name.removeprefix("transformer."): value for name, value in config.items()}
    refused = [f"{name} = {value!r}" for name, value in config.items()
               if value and name not in KNOWN and value not in FIXED.get(name, [])]
    if refused:
        raise ValueError(f"{file}: not supported: {few(refused)}")
    if not config:
        return None
    with reading(file):
        rank = config["r"]
        alpha = config["lora_alpha"]
        if config.get("use_rslora"):                        # rank-stabilised: alpha / sqrt(rank)
            alpha *= rank ** 0.5
        dropout = nn.Dropout(config.get("lora_dropout", 0.0)).p     # refuses what is none
    return rank, alpha, dropout


def by_layer(model, stored):
    """The {name: tensor} of an adapter's file -> {layer's name here: {"lora_A.weight": tensor,
    ...}}. ValueError for names of another form (kohya's, BFL's, ...), and for layers that cannot
    have an adapter."""
    if not stored:
        raise ValueError("there are no tensors in it")
    known = {name.removeprefix("model."): name for name in adaptable(model)}
    parts = {}
    for name, tensor in stored.items():
        match = FORM.fullmatch(name)
        layer = match and known.get(match["layer"])
        if not layer:
            raise ValueError(
                f"{name} is not read; what is: base_model.model.LAYER.lora_A.weight (PEFT) and "
                f"transformer.LAYER.lora_A.weight (diffusers), where LAYER is {few([*known])}")
        put(parts.setdefault(layer, {}), [match["what"]], tensor)
    return parts


def widen(part, rank):
    """One layer of diffusers' file, of its own rank and alpha -> with `rank`, filled up with zeros,
    and its scale multiplied into B."""
    A = part["lora_A.weight"]                               # (own rank, in)
    more = rank - len(A)
    scale = float(part.get("alpha", len(A))) / len(A)
    B = scale * F.pad(part["lora_B.weight"].float(), (0, more))         # (out, rank)
    return {"lora_A.weight": F.pad(A, (0, 0, 0, more)), "lora_B.weight": B}


@torch.no_grad()
def load_adapter(model, path, adapter="policy"):
    """Read a LoRA into `adapter`: a folder or file of PEFT's or, for FLUX.1, of diffusers'. A model
    without adapters is injected as it says. Where there are no settings, a layer's alpha is its
    tensor "alpha", else its rank, and layers may differ: see `widen`. ValueError as in
    read_settings and by_layer, for another scale than the model's adapters have, and naming tensors
    that are missing or misshapen."""
    file = find_tensors(path, [PEFT_FILE, DIFFUSERS_FILE])
    stored = read_tensors(file)
    settings = read_settings(file, stored)
    check_fit(file, stored, stored)                         # no integers
    with reading(file):
        parts = by_layer(model, stored)
        if settings:
            rank, alpha, dropout = settings
        else:
            rank = alpha = max(len(part["lora_A.weight"]) for part in parts.values())
            dropout = 0.0
            parts = {name: widen(part, rank) for name, part in parts.items()}
        if not injected(model):
            inject(model, rank, alpha, dropout, list(parts))
        stored = {f"base_model.model.{public(model, name)}.{what}": tensor
                  for name, part in parts.items() for what, tensor in part.items()}
        own = tensors(model, adapter)
        check_fit(file, own, stored, finite=True)
        layer, *_ = layers(model).values()
        if layer.scale != alpha / rank:
            raise ValueError(
                f"{file}: alpha / rank is {alpha / rank}, the model's adapters have {layer.scale}")
    for name, p in own.items():
        p.copy_(stored[name])


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    x = torch.randn(4, 64)
    inject(model)
    nn.init.normal_(model[0].lora_B["policy"])
    adapted = model(x)
    merge(model)
    print("merging changes the output by", (model(x) - adapted).norm().item())
