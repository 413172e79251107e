"""Does a step of `train.py patch` and `dro` fit a card, and how long does it take? At --preset
paper, with FLUX.1-dev and XLabs' IP-Adapter v2, computed: the project's own code runs on tensors
without data, whose storages are counted, and so are the products. No GPU, no weights are needed.

    python bench/fit.py            # both, a minute

Memory is what tensors hold at the worst moment of a step, with weights, gradients, AdamW's moments
and --checkpointing; attention as a fused kernel that stores its output alone; not the allocator's
slack and the kernels' workspaces (a GB or two). Time is the products' at 395 TFLOP/s in bf16, half
of what an H200 gives on large ones.
"""
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from clock import gb, table
from picture import REAL, VAE

import flux
import patch_dpo
import train

SPEED = 395e12                                            # FLOP/s
TEXT = 512                                                # T5's tokens
CLIP = dict(                                              # openai/clip-vit-large-patch14's pictures
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, layer_norm_eps=1e-5,
    num_attention_heads=16, num_hidden_layers=24, image_size=224, patch_size=14,
    hidden_act="quick_gelu", projection_dim=768)
PROMPT = {                                                # shapes in XLabs' file, v2
    patch_dpo.XLABS: (16 * 4096, 768),
    "ip_adapter_proj_model.norm.weight": (4096,),
}


class Storages(TorchDispatchMode):
    """Counts the bytes that live, and at most lived, in tensors."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen = {}

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()

        def gone(_):
            self.live -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return out


class Fused(torch.autograd.Function):
    """What a fused attention holds and computes."""
    flops = 0

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.work = 4 * q.numel() * k.shape[-2]            # two products
        Fused.flops += ctx.work
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _ = ctx.saved_tensors
        Fused.flops += ctx.work * 5 // 2                  # five products
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attention(q, k, v, **how):
    return Fused.apply(q, k, v)


def weights(make, dtype=torch.float32):
    torch.set_default_dtype(dtype)
    module = make()
    torch.set_default_dtype(torch.float32)
    return module.requires_grad_(False).eval()


def stage_of(name):
    """The stage of `train.py NAME --preset paper` with one edit, without reading anything."""
    settings = train.parse([name, "--preset", "paper", "--device", "cpu"])[1]
    kind = {"patch": patch_dpo.PatchDPO, "dro": patch_dpo.DiffusionDRO}[name]
    stage = kind.__new__(kind)
    stage.settings = settings
    stage.device = "cpu"
    stage.rows = [{}]
    stage.flux = weights(lambda: flux.Flux(REAL), torch.bfloat16)
    stage.flux.checkpointing = settings.checkpointing
    stage.vae = weights(lambda: flux.VAE(VAE))
    stage.features = weights(lambda: patch_dpo.ImageFeatures(CLIP))
    side = settings.size // stage.vae.factor
    stage.grid = (side, side)
    stage.ids = flux.image_ids(side, side)
    one = torch.zeros(4, dtype=torch.long)
    stage.prompt = stage.scene = stage.truth = stage.expert = one
    stage.references = one[:, None]
    return stage


def add_host(stage):
    """What lies in main memory: made before anything is counted."""
    tokens = len(stage.ids)
    stage.txt = torch.empty(1, TEXT, 4096, dtype=torch.bfloat16)
    stage.pooled = torch.empty(1, 768, dtype=torch.bfloat16)
    stage.latent = torch.empty(1, tokens, 64)
    stage.painted = {
        "latent": torch.empty(1, 1, tokens, 64),
        "quality": torch.empty(1, 1, 2, 32, 32),
    }


def add_tuned(stage, name):
    """The image prompt in two copies, or the LoRA, its sampler and its average; AdamW's two moments
    and the gradient."""
    if name == "patch":
        tuned = patch_dpo.ImagePrompts.__new__(patch_dpo.ImagePrompts)
        stored = {key: torch.empty(shape) for key, shape in PROMPT.items()}
        prompts = [patch_dpo.IPAdapter(stage.flux, stored) for _ in range(2)]
        tuned.prompts = dict(zip(("policy", "reference"), prompts))
        tuned.policy = dict(tuned.prompts["policy"].named_parameters())
        tuned.maps = torch.empty(1, 768)
        tuned.references = torch.zeros(4, 1, dtype=torch.long)
        tuned.edits = stage
    else:
        tuned = patch_dpo.Adapters(stage)
    stage.tuned = tuned
    trained = [p for p in tuned.policy.values() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    copies = 2 if name == "patch" else 4
    moments = [torch.zeros_like(p) for p in trained for _ in range(copies)]
    return sum(p.numel() for p in trained), moments


def rows_of(stage, name):
    """One pass's rows."""
    point = torch.empty(len(stage.ids), 64)
    zero = torch.zeros((), dtype=torch.long)
    half = torch.full((), 0.5)
    row = (zero, point, half, zero) if name == "patch" else (zero, half, point, point, point)
    return [row] * stage.settings.micro


def memory(name):
    """(trained parameters, bytes of weights and moments, bytes at most)."""
    storages = Storages()
    with FakeTensorMode(), storages:
        stage = stage_of(name)
        settings = stage.settings
        count, moments = add_tuned(stage, name)
        standing = storages.live
        add_host(stage)
        rows = rows_of(stage, name)
        host = storages.live - standing
        storages.peak = storages.live
        loss, _ = stage.loss(rows)
        loss.backward()
        peak = max(storages.peak - host, standing + 4 * count)      # AdamW works on a copy
        if name == "dro":                                 # the buffer, while it is filled
            points = (2, settings.buffer, settings.paint_steps, len(stage.ids), 64)
            peak = max(peak, standing + 4 * torch.Size(points).numel())
    return count, standing, peak


def work(name):
    """FLOP of a step: of the batch, and of the buffer that `dro` paints anew."""
    def counted(function):
        Fused.flops = 0
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() + Fused.flops

    with FakeTensorMode():
        stage = stage_of(name)
        settings = stage.settings
        add_tuned(stage, name)
        add_host(stage)
        rows = rows_of(stage, name)
        found = counted(lambda: stage.loss(rows)[0].backward())
        found *= settings.batch / settings.micro
        if name == "dro":
            one = torch.zeros(1, dtype=torch.long)
            point = torch.empty(1, len(stage.ids), 64)
            painted = counted(lambda: stage.velocity("sampler", one, point, torch.ones(1)))
            found += painted * settings.buffer * settings.paint_steps / settings.refresh
    return found, settings


def measure(name):
    count, standing, peak = memory(name)
    flop, settings = work(name)
    seconds = flop / SPEED
    return [f"`train.py {name} --preset paper`", f"{count / 1e6:.0f} M", gb(standing), gb(peak),
            f"{settings.batch}", f"{flop / 1e12:,.0f} TFLOP", f"{seconds:.0f} s",
            f"{seconds * settings.steps / 3600:,.0f} h"]


def main():
    F.scaled_dot_product_attention = attention
    columns = ["", "trained", "weights, moments", "at most", "batch", "a step", "on one card",
               "all steps"]
    print(table(columns, [measure("patch"), measure("dro")]))


if __name__ == "__main__":
    main()
