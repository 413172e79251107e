"""What keeps an edit in its place: Canny edges, ControlNet-Union, and `render`, which takes prompts and pictures through all of FLUX.1.

    picture --canny--> edges --VAE--> control --ControlNet--> residuals, added to the image stream of Flux's blocks while it denoises

The net is a short Flux (5 double and 10 single blocks beside 19 and 38) that sees the control picture too. A Union net reads several kinds of them; a learned
token for the kind stands before its text. The C-DPO paper uses canny at scale 0.4. Shapes as in flux.py. Try it: python controlnet.py
"""
import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torch.func import functional_call
from flux import VAE, DoubleBlock, Flux, Modulation, SingleBlock, denoise, encode_prompt, image_ids, move, pack, sigmas, to_picture, to_tensor, unpack
from qwen import read_json, reading, read_tensors

MODES = ["canny", "tile", "depth", "blur", "pose", "gray", "lq"]       # InstantX's and Shakker's numbering; 7 to 9 are unused

def canny(image, low=100, high=200):
    """Canny's edges of a picture: (H,W) or (H,W,3) uint8 -> (H,W) uint8 of 0 and 255. ValueError: another dtype or shape.
    Bit for bit what OpenCV's `Canny(image, low, high)` gives (3x3 Sobel, |dx| + |dy|, fixed point), the edge map that public ControlNets were trained on."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3:
        raise ValueError(f"canny wants uint8 (H,W) or (H,W,3), not {image.dtype} {image.shape}")
    low, high = np.floor(min(low, high)), np.floor(max(low, high))
    dx, dy = sobel(image.reshape(*image.shape[:2], -1))       # (H, W) each
    size = abs(dx) + abs(dy)
    ridge = thin(size, dx, dy)
    return 255 * follow(ridge & (size > high), ridge & (size > low)).astype(np.uint8)

def sobel(image):
    """Horizontal and vertical derivative (H,W) of (H,W,C): at each pixel that of the channel with the largest |dx| + |dy|."""
    p = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]                       # smoothed along y
    cols = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]              # smoothed along x
    dx, dy = rows[:, 2:] - rows[:, :-2], cols[2:] - cols[:-2]  # (H, W, C)
    channel = np.argmax(abs(dx) + abs(dy), axis=2)[..., None]  # the first of equals
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]

def thin(size, dx, dy):
    """Non-maximum suppression: True where `size` is largest across the edge; the edge's direction is one of four."""
    p = np.pad(size, 1)
    def at(y, x):                                             # the neighbour y rows down and x columns to the right
        return p[1 + y:p.shape[0] - 1 + y, 1 + x:p.shape[1] - 1 + x]
    ax, ay = abs(dx).astype(np.int64), abs(dy).astype(np.int64) << 15
    tan22 = ax * 13573                                        # tan(22.5 deg) * 2^15;  tan(67.5 deg) = tan(22.5 deg) + 2
    falling = (dx ^ dy) >= 0                                  # the gradient points along the falling diagonal
    flat = (size > at(0, -1)) & (size >= at(0, 1))
    steep = (size > at(-1, 0)) & (size >= at(1, 0))
    slanted = np.where(falling, (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1)))
    return np.where(ay < tan22, flat, np.where(ay > tan22 + (ax << 16), steep, slanted))

def follow(strong, weak):
    """Hysteresis: the strong pixels and every weak one that a chain of weak pixels (8 neighbours) ties to them."""
    width = strong.shape[1] + 2
    weak, edges = np.pad(weak & ~strong, 1).ravel(), np.pad(strong, 1).ravel()
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    front = np.flatnonzero(edges)
    while front.size:                                         # only the pixels reached last can reach new ones
        near = (front[:, None] + around).ravel()
        front = np.unique(near[weak[near]])
        weak[front], edges[front] = False, True
    return edges.reshape(-1, width)[1:-1, 1:-1]

def control_picture(image, mode="canny", low=100, high=200):
    """What a net of this mode looks at: uint8 (H,W,3) -> uint8 (H,W,3). depth and pose need another model, tile and lq are pictures as they are."""
    if mode == "canny":
        return np.repeat(canny(image, low, high)[..., None], 3, axis=2)
    if mode == "gray":
        return np.array(Image.fromarray(image).convert("L").convert("RGB"))
    if mode == "blur":
        return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(max(image.shape) / 64)))
    if mode in ("tile", "lq"):
        return image
    raise ValueError(f"the control mode {mode!r} needs a control picture that is ready; only canny, gray, blur, tile and lq are drawn from the picture itself")

class ControlNet(Flux):
    """A ControlNet for FLUX.1: noisy latents, control latents and text -> residuals for the blocks of a Flux."""
    kind, streamed = "FluxControlNetModel", False                      # streamed: see `stream`
    def __init__(self, config):
        super().__init__(config)
        self.norm_out = self.proj_out = None                           # it has taps instead of an end
        dim = self.x_embedder.out_features
        self.controlnet_x_embedder = nn.Linear(self.x_embedder.in_features, dim)
        self.controlnet_blocks = nn.ModuleList([nn.Linear(dim, dim) for _ in self.transformer_blocks])
        self.controlnet_single_blocks = nn.ModuleList([nn.Linear(dim, dim) for _ in self.single_transformer_blocks])
        modes = config.get("num_mode")                                 # Union: 10; Union-Pro-2.0 and nets for one kind: null
        self.controlnet_mode_embedder = nn.Embedding(modes, dim) if modes else None
        for layer in (self.controlnet_x_embedder, *self.controlnet_blocks, *self.controlnet_single_blocks):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)   # a new net changes nothing

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """As Pretrained.load. ValueError for XLabs' nets, which are another design."""
        if foreign := {name.partition(".")[0] for name in read_tensors(path)} & {"input_hint_block", "pos_embed_input", "double_blocks"}:
            raise ValueError(f"{path} is an XLabs ControlNet (it has {', '.join(sorted(foreign))}); only nets built like InstantX's and Shakker's Union can be read")
        return super().load(path, device, dtype)

    def forward(self, img, control, txt, pooled, timestep, guidance, img_ids, txt_ids, mode=0, scale=1.0):
        """control (B, L, 64): the packed latents of the control picture; mode: its kind, a number or one a row (B,), ignored by nets without modes;
        the rest as in Flux -> (double_residuals, single_residuals), lists of (B, L, D)."""
        return self.residuals(img, control, txt, self.modulation(timestep, guidance, pooled), self.rope(txt_ids, img_ids), mode, scale)

    def residuals(self, img, control, txt, modulation, rope, mode=0, scale=1.0):
        img, txt = self.x_embedder(img) + self.controlnet_x_embedder(control), self.context_embedder(txt)      # (B, L, D), (B, T, D)
        if self.controlnet_mode_embedder is not None:
            mode, table = torch.as_tensor(mode), self.controlnet_mode_embedder
            if not ((0 <= mode) & (mode < table.num_embeddings)).all():
                raise ValueError(f"mode is {mode.tolist()}, this net has 0 to {table.num_embeddings - 1}")
            txt = torch.cat([table(mode.to(img.device).expand(len(img)))[:, None], txt], dim=1)               # (B, 1+T, D)
            rope = torch.cat([rope[:1], rope])                         # it stands where the text stands
        taps, outs, sizes = [], (*self.controlnet_blocks, *self.controlnet_single_blocks), [block.modulations for block in self.blocks()]
        for block, mod, out in zip(self.blocks(), modulation.split(sizes, dim=1), outs):
            img, txt = visit(block, img, txt, mod, rope) if self.streamed else block(img, txt, mod, rope)
            taps.append(scale * out(img))
        return taps[:len(self.transformer_blocks)], taps[len(self.transformer_blocks):]

def active(steps, start, end):
    """Which of the steps 0 .. steps-1 lie between the fractions `start` and `end` of the way: in these a net works."""
    return [i for i in range(steps) if start <= i / steps and (i + 1) / steps <= end]

def steer(net, control, txt, pooled, img_ids, levels, guidance=3.5, mode=0, scale=0.4, start=0.0, end=1.0):
    """The `control` argument of flux.denoise: the net's residuals in its `active` steps, else none. Modulation and RoPE are computed here, once for all `levels`."""
    rope, modulations = net.rope(txt.new_zeros(txt.shape[1], 3), img_ids), net.modulations(levels[:-1].to(txt.device), guidance, pooled)
    def residuals(step, steps, x, t):
        if step not in active(steps, start, end):
            return (), ()
        return net.residuals(x.to(txt.dtype), control, txt, modulations[step - steps], rope, mode, scale)       # of all levels, the last `steps` run
    return residuals

def visit(block, *inputs):
    """block(*inputs), its weights brought to the inputs' device for that time: all but the modulation's, which has run."""
    weights = {name: p.to(inputs[0].device) for name, p in block.named_parameters() if not name.startswith("norm")}
    return functional_call(block, weights, inputs)

def stream(net, device):
    """A net on `device` but for its blocks: they stay on the CPU, and each visits for its own forward."""
    net.streamed = True
    return move(net, device, but=(DoubleBlock, SingleBlock))

# ---- from prompts and pictures to pictures -----------------------------------------------------------------------------------
FLUX_PARTS = [f"{part}/*" for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")]   # not its single-file copy

def load_pair(flux, controlnet, device, dtype, offload):
    """(Flux, ControlNet or None). With offload they take 17.4 GB of the GPU instead of 30.4: the modulation layers (27 % of FLUX.1, and a picture needs them
    once) stay on the CPU, and of the net all blocks but the one that works."""
    home = "cpu" if offload else device
    model = Flux.load(Path(flux) / "transformer", home, dtype)
    net = ControlNet.load(controlnet, home, dtype) if controlnet else None
    if net and (ours := net.x_embedder.weight.shape) != (theirs := model.x_embedder.weight.shape):
        raise ValueError(f"{controlnet} is not a ControlNet for {flux}: its x_embedder is {tuple(ours)}, the transformer's {tuple(theirs)}")
    return (move(model, device, but=Modulation), net and stream(net, device)) if offload else (model, net)

@torch.no_grad()
def render(flux, controlnet, prompts, seeds, shape, sources=None, controls=None, mode="canny", scale=0.4, start=0.0, end=1.0, steps=28, guidance=3.5, strength=1.0,
           cfg=1.0, negative="", device="cpu", dtype=torch.float32, offload=False, batch=1, look=None, stage=contextlib.nullcontext, progress=iter):
    """N prompts -> N uint8 pictures (H,W,3), shape = (H, W). flux, controlnet: folders; sources and controls: N pictures uint8 (H,W,3) each, or None.
    Each part is loaded, used for all N and freed before the next, but for the autoencoder (0.3 GB). sources are needed where strength < 1. The net is not loaded
    without controls, at scale 0 and where no step lies between start and end. seeds: one a picture; its noise depends on nothing else, and with batch 1 neither
    does the picture. mode: one of MODES; scale .. cfg: as in `steer` and `denoise`; look(model, ids): called once before the first step, hangs an image prompt
    (patch_dpo.ImagePrompt.look) into the model; stage(name): a context around each part, to measure it; progress: around the steps of each batch."""
    controlled = controls is not None and scale != 0 and active(steps - int(steps - steps * strength), start, end)
    with stage("text encoders"):
        txt, pooled = encode_prompt(flux, [*prompts, negative] if cfg != 1 else prompts, device, dtype, batch)
    with stage("autoencoder, in"):
        vae = VAE.load(Path(flux) / "vae", device)
        h, w = (side // vae.factor for side in shape)
        encode = lambda pictures: torch.cat([pack(vae.encode(to_tensor(picture)[None].to(device))) for picture in pictures])      # (N, L, 64)
        source = encode(sources) if strength < 1 and sources is not None else None
        control = encode(controls).to(dtype) if controlled else None
    with stage("Flux + ControlNet" if controlled else "Flux"):
        model, net = load_pair(flux, controlnet if controlled else None, device, dtype, offload)
        with reading(file := Path(flux) / "scheduler" / "scheduler_config.json"):
            ids, levels, out = image_ids(h, w, device), sigmas(steps, h * w // 4, read_json(file)), []
        if look:
            look(model, ids)
        noise = torch.stack([torch.randn(model.x_embedder.in_features // 4, h, w, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for rows in torch.arange(len(prompts)).split(batch):
            steering = net and steer(net, control[rows], txt[rows], pooled[rows], ids, levels, guidance, MODES.index(mode), scale, start, end)
            against = (txt[-1:].expand(len(rows), -1, -1), pooled[-1:].expand(len(rows), -1)) if cfg != 1 else None
            out.append(denoise(model, pack(noise[rows]).to(device), txt[rows], pooled[rows], ids, levels, guidance, None if source is None else source[rows],
                               strength, against, cfg, steering, progress))
        del model, net, steering
    with stage("autoencoder, out"):
        return [to_picture(vae.decode(latent[None])[0]) for latent in unpack(torch.cat(out), h, w)]

if __name__ == "__main__":
    y, x = np.mgrid[:19, :45]
    disc = np.where((y - 9) ** 2 + (x / 2.4 - 9) ** 2 < 60, 200, 40).astype(np.uint8)
    print("\n".join("".join(".#"[v // 255] for v in row) for row in canny(disc)))
