"""Low-rank adapters (LoRA, arXiv 2106.09685) for any module made of nn.Linear: Qwen and Flux here.

    y = W x + b + (alpha / rank) B A x      W and b are frozen; A (rank, in) and B (out, rank) learn

Over one frozen base live two adapters: "policy", which is trained, and "reference", the frozen SFT
policy that DPO compares it with. `use` says which of them (or neither) the next forwards run with.
An adapter is fp32 whatever the base is: bf16 AdamW cannot move at the paper's 2e-7.
Files are in PEFT's format, both ways. Shapes: "..." is any batch. Try it: python lora.py
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from qwen import Linear, check_fit, read_json, read_tensors, reading

ADAPTERS = ("policy", "reference")


class LoRALinear(Linear):
    """The linear layer `base`, its parameters and their names kept, and an A and a B for each
    adapter. PEFT's initialisation: A is random and B zero, so at first nothing changes."""

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
            A = torch.empty(rank, base.in_features, device=device)
            B = torch.zeros(base.out_features, rank, device=device)
            nn.init.kaiming_uniform_(A, a=5 ** 0.5)
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
        raise ValueError(f"{type(model).__name__} has no adapters: inject or load them first "
                         "(merge takes them away)")
    return found


def matching(names, targets):
    """The names that end in one of `targets`: q_proj and self_attn.q_proj are such ends."""
    ends = tuple(f".{target}" for target in targets)
    return [name for name in names if f".{name}".endswith(ends)]


def inject(model, rank=16, alpha=32, dropout=0.05, targets="all-linear"):
    """Freeze `model`, put both adapters on its linear layers, use "policy" -> the layers' names.
    Call it when the model has its device and dtype. `targets`: layers' names or their last parts,
    or "all-linear": all but the output head. ValueError for adapters that are there already, and
    for targets that the model lacks."""
    if injected(model):
        raise ValueError(f"{type(model).__name__} has adapters already")
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if targets == "all-linear":
        targets = [name for name in names if not name.endswith("lm_head")]
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


def tensors(model, adapter):
    """The adapter's parameters under the names they have in PEFT's files."""
    found = {}
    for name, layer in layers(model).items():
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
def merge(model, adapter="policy"):
    """Add the adapter to the base weights, in fp32 and then rounded once, and leave plain linear
    layers: it cannot be undone or repeated."""
    for name, layer in layers(model).items():
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        change = layer.scale * layer.lora_B[adapter] @ layer.lora_A[adapter]    # (out, in)
        weight = (layer.weight.float() + change).to(layer.weight.dtype)
        plain.weight = nn.Parameter(weight, False)
        plain.bias = layer.bias
        model.set_submodule(name, plain.train(layer.training))


# ---- files in PEFT's format --------------------------------------------------------------------

# What adapter_config.json may say, and the values of which one case is written here (false and
# null always pass). Which layers have adapters is read off the tensors' names.
KNOWN = {"r", "lora_alpha", "lora_dropout", "use_rslora",                      # honoured
         "base_model_name_or_path", "task_type", "revision", "auto_mapping",   # without effect
         "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
         "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
FIXED = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}


def save_adapter(model, folder, adapter="policy", base_model=None):
    """Write adapter_model.safetensors and adapter_config.json, which peft reads; `base_model` is
    the path or repository noted there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model, adapter), folder / "adapter_model.safetensors", {"format": "pt"})
    layer, *_ = layers(model).values()          # all have the same rank, alpha and dropout
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        "base_model_name_or_path": base_model and str(base_model),
        "r": layer.lora_A[adapter].shape[0],
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(layers(model)),      # in full: a last part may stand elsewhere too
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_config(config, folder):
    """ValueError naming each setting that is not written here: DoRA, rank patterns, ..."""
    refused = [f"{name} = {value!r}" for name, value in config.items()
               if value and name not in KNOWN and value not in FIXED.get(name, [])]
    if refused:
        raise ValueError(f"{folder}/adapter_config.json: not supported: {', '.join(refused)}")


@torch.no_grad()
def load_adapter(model, folder, adapter="policy"):
    """Read a LoRA adapter in PEFT's format into `adapter`; a model without adapters is injected as
    adapter_config.json says. ValueError as in check_config, for another scale than the model's
    adapters have, and for every missing, unexpected or misshapen tensor."""
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    stored = read_tensors(folder / "adapter_model.safetensors")
    check_config(config, folder)
    names = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
             for name in stored if name.endswith(".lora_A.weight")]
    with reading(folder):
        rank = config["r"]
        dropout = nn.Dropout(config.get("lora_dropout", 0.0)).p     # refuses what is none
        alpha = config["lora_alpha"]
        if config.get("use_rslora"):                        # rank-stabilised: alpha / sqrt(rank)
            alpha *= rank ** 0.5
        if not injected(model):
            inject(model, rank, alpha, dropout, names)
        own = tensors(model, adapter)
        check_fit(folder, own, stored, finite=True)
        layer, *_ = layers(model).values()
        if layer.scale != alpha / rank:
            raise ValueError(
                f"{folder}: alpha / rank is {alpha / rank}, the model's adapters have {layer.scale}"
            )
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
