"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + b + (alpha / rank) B A x, with W and b frozen. Files in PEFT's format.

Over one frozen base live two adapters: "policy", which is trained, and "reference", the frozen SFT policy that DPO compares it with.
`use` says which of them (or neither) the next forwards run with. An adapter is fp32 whatever the base is: bf16 AdamW cannot move at 2e-7.
Works on any module made of nn.Linear: Qwen and the Flux transformer here. Try it: python lora.py
"""
import json, math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from qwen import Linear, check_fit, read_json, read_tensors, reading

ADAPTERS = ("policy", "reference")

class LoRALinear(Linear):
    """The linear layer `base`, its parameters and their names kept, and a pair of low-rank matrices for each adapter."""
    def __init__(self, base, rank, alpha, dropout):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.training = base.weight, base.bias, base.training            # (out, in), (out,)
        self.alpha, self.scale, self.dropout, self.adapter = alpha, alpha / rank, dropout, "policy"
        new = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.ParameterDict({name: nn.init.kaiming_uniform_(torch.empty(rank, base.in_features, **new), a=math.sqrt(5)) for name in ADAPTERS})
        self.lora_B = nn.ParameterDict({name: torch.zeros(base.out_features, rank, **new) for name in ADAPTERS})     # so at first nothing changes
        self.lora_A["reference"].requires_grad_(False)
        self.lora_B["reference"].requires_grad_(False)

    def forward(self, x):
        y = super().forward(x)                                                                   # (..., out)
        if self.adapter is None:
            return y
        A, B = self.lora_A[self.adapter], self.lora_B[self.adapter]                              # (rank, in), (out, rank)
        low = F.linear(F.dropout(x, self.dropout, self.training).to(A.dtype), A)                 # (..., rank)
        return y + F.linear(self.scale * low, B).to(y.dtype)

def layers(model):
    """{name: LoRALinear} of an injected model; ValueError when there are none."""
    if not (found := {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}):
        raise ValueError(f"{type(model).__name__} has no adapters: inject or load them first (merge takes them away)")
    return found

def inject(model, rank=16, alpha=32, dropout=0.05, targets="all-linear"):
    """Freeze `model`, put both adapters on its linear layers, use "policy" -> names of the layers. Call it after the model has its device and dtype.
    `targets`: layers' names or their last parts, or "all-linear" (all but the output head). PEFT's initialisation: at first the output stays as it was."""
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already")
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if targets == "all-linear":
        targets = [name for name in names if not f".{name}".endswith(".lm_head")]
    if absent := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]:
        raise ValueError(f"{type(model).__name__} has no linear layer named {', '.join(absent)}")
    names = [name for name in names if f".{name}".endswith(tuple(f".{t}" for t in targets))]
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, dropout))
    return names

def use(model, adapter):
    """Run forwards with "policy", "reference" or None (the base alone). Under gradient checkpointing, switch only after the backward pass."""
    if adapter not in (*ADAPTERS, None):
        raise ValueError(f"adapter {adapter!r}: allowed are 'policy', 'reference' and None")
    for layer in layers(model).values():
        layer.adapter = adapter

@torch.no_grad()
def copy_adapter(model, source="policy", target="reference"):
    """Make `target` equal to `source`: what SFT has taught the policy becomes the reference of DPO."""
    for new, old in zip(tensors(model, target).values(), tensors(model, source).values()):
        new.copy_(old)

@torch.no_grad()
def merge(model, adapter="policy"):
    """Add the adapter to the base weights, in fp32 and then rounded once, and leave plain linear layers: it cannot be undone or repeated."""
    for name, layer in layers(model).items():
        plain = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta").train(layer.training)
        delta = layer.scale * layer.lora_B[adapter] @ layer.lora_A[adapter]                      # (out, in)
        plain.weight, plain.bias = nn.Parameter((layer.weight.float() + delta).to(layer.weight.dtype), requires_grad=False), layer.bias
        model.set_submodule(name, plain)

# ---- files in PEFT's format --------------------------------------------------------------------------------------------------
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora"}                                         # settings in adapter_config.json that are honoured
IGNORED = {"base_model_name_or_path", "task_type", "revision", "auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
           "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}         # which layers: the tensors' names say it
FIXED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}      # and the values that are allowed

def tensors(model, adapter):
    """The adapter's parameters under the names they have on disk."""
    return {f"base_model.model.{name}.{part}.weight": getattr(layer, part)[adapter] for name, layer in layers(model).items() for part in ("lora_A", "lora_B")}

def save_adapter(model, folder, adapter="policy", base_model=None):
    """Write adapter_model.safetensors and adapter_config.json, which peft reads; `base_model` is the path or repository noted there."""
    folder, names, layer = Path(folder), list(layers(model)), next(iter(layers(model).values()))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in tensors(model, adapter).items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None, "base_model_name_or_path": base_model and str(base_model),
              "r": layer.lora_A[adapter].shape[0], "lora_alpha": layer.alpha, "lora_dropout": layer.dropout, "bias": "none", "inference_mode": True,
              "target_modules": names}                                                           # in full: a last part may stand in other layers too
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

@torch.no_grad()
def load_adapter(model, folder, adapter="policy"):
    """Read a LoRA adapter in PEFT's format into `adapter`; a model without adapters is injected as adapter_config.json says.
    ValueError names every setting that is not implemented (DoRA, rank patterns, ...) and every missing, unexpected or misshapen tensor."""
    folder = Path(folder)
    config, stored = read_json(folder / "adapter_config.json"), read_tensors(folder / "adapter_model.safetensors")
    if refused := [f"{k} = {v!r}" for k, v in config.items() if v and (v not in FIXED[k] if k in FIXED else k not in READ | IGNORED)]:
        raise ValueError(f"{folder}/adapter_config.json: not supported: {', '.join(refused)}")
    names = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    with reading(folder):
        rank, dropout = int(config["r"]), nn.Dropout(config.get("lora_dropout", 0.0)).p          # torch refuses what is no probability
        alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)      # rank-stabilised: alpha / sqrt(rank)
        if not any(isinstance(m, LoRALinear) for m in model.modules()):
            inject(model, rank, alpha, dropout, names)
        own = tensors(model, adapter)
        check_fit(folder, own, stored, finite=True)
        if (scale := next(iter(layers(model).values())).scale) != alpha / rank:
            raise ValueError(f"{folder}: alpha / rank is {alpha / rank}, the model's adapters have {scale}")
    for name, p in own.items():
        p.copy_(stored[name])

if __name__ == "__main__":
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    print("adapters on", inject(model, rank=4, alpha=8, dropout=0.0))
    nn.init.normal_(model[0].lora_B["policy"])
    adapted = model(x)
    merge(model)
    print("merging changes the output by", (model(x) - adapted).abs().max().item())
