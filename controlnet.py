"""What keeps an edit in its place: Canny edges, ControlNet-Union, and `render`, which takes prompts
and pictures through all of FLUX.1.

    picture --canny--> edges --autoencoder--> control --ControlNet--> residuals
    noise --Flux, which adds the residuals to its image stream--> latents --autoencoder--> picture

The net is a short Flux (5 double and 10 single blocks beside 19 and 38) that sees the control
picture too. A Union net reads several kinds of them: a learned token for the kind, the mode,
stands before its text. The C-DPO paper uses canny at scale 0.4. Shapes as in flux.py, and H, W the
pixels of a picture. Try it: python controlnet.py
"""
import contextlib

import numpy as np
import torch
from PIL import Image
from torch import nn

from flux import (
    VAE, Flux,
    check_parts, denoise, encode_prompt, image_ids, sigmas,
    pack, unpack,
    to_picture, to_tensor)
from qwen import read_json, read_tensors, reading

# InstantX's and Shakker's numbering; 7 to 9 are unused
MODES = ["canny", "tile", "depth", "blur", "pose", "gray", "lq"]


# ---- edges -------------------------------------------------------------------------------------

def canny(image, low=100, high=200):
    """Canny's edges of a picture: uint8 (H, W) or (H, W, 3) -> uint8 (H, W) of 0 and 255.
    Bit for bit what OpenCV's Canny(image, low, high) gives (3 x 3 Sobel, |dx| + |dy|, fixed point),
    the edge map that public ControlNets were trained on. ValueError: another dtype or shape."""
    if (image.dtype != np.uint8 or image.ndim < 2
            or image.shape[2:] not in ((), (3,))):
        raise ValueError(f"canny wants uint8 (H,W) or (H,W,3), not {image.dtype} {image.shape}")
    low, high = sorted([low, high])
    dx, dy = gradient(np.atleast_3d(image))                     # (H, W) each
    size = abs(dx) + abs(dy)
    weak = thin(size, dx, dy) & (size > low)
    strong = weak & (size > high)
    return np.uint8(255) * follow(strong, weak)


def gradient(image):
    """(H, W, C) -> dx and dy, (H, W) each: at each pixel those of the channel with the largest
    |dx| + |dy|."""
    p = np.pad(image.astype(int), ((1, 1), (1, 1), (0, 0)), "edge")
    dy = sobel(p)                                               # (H, W, C)
    dx = sobel(p.swapaxes(0, 1)).swapaxes(0, 1)                 # (H, W, C)
    largest = (abs(dx) + abs(dy)).argmax(2)                     # (H, W), the first of equals
    y, x = np.indices(largest.shape)
    return dx[y, x, largest], dy[y, x, largest]


def sobel(p):
    """Differences along the first axis, smoothed along the second: (H+2, W+2, C) -> (H, W, C)."""
    smooth = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return smooth[2:] - smooth[:-2]


def thin(size, dx, dy):
    """Where `size` is largest across the edge: (H, W) of booleans. The direction across is the
    nearest of four: along x, along y, and the two diagonals. Of two equal neighbours the right or
    lower one gives way; on a diagonal both do."""
    near = np.lib.stride_tricks.sliding_window_view(np.pad(size, 1), (3, 3))
    above = size[..., None, None] > near                        # (H, W, 3, 3): than each neighbour
    along_x = above[..., 1, 0] & (size >= near[..., 1, 2])
    along_y = above[..., 0, 1] & (size >= near[..., 2, 1])
    falling = above[..., 0, 0] & above[..., 2, 2]
    rising = above[..., 0, 2] & above[..., 2, 0]
    x = abs(dx)
    y = abs(dy) << 15                                           # fixed point
    tan22 = 13573 * x                                           # tan(22.5 degrees) * 2^15 * x
    tan67 = tan22 + (x << 16)                                   # tan(67.5) = tan(22.5) + 2
    return np.select([y < tan22, y > tan67, dx * dy > 0],
                     [along_x, along_y, falling], rising)


def smear(p):
    """Each pixel or those above and below it: (H+2, W) -> (H, W) of booleans."""
    return p[:-2] | p[1:-1] | p[2:]


def follow(edges, weak):
    """Hysteresis: `edges` (the strong pixels, which are weak, too), and every weak pixel that a
    chain of weak ones (8 neighbours) ties to them; (H, W) of booleans."""
    while True:
        near = smear(np.pad(edges, 1))                          # an edge here, above or below
        near = smear(near.T).T                                  # the same to the left and right
        grown = weak & near
        if np.array_equal(grown, edges):
            return edges
        edges = grown


def control_picture(image, mode="canny", low=100, high=200):
    """What a net of this mode looks at: uint8 (H, W, 3) -> uint8 (H, W, 3). ValueError for the
    modes that need another model or a picture of the user's own."""
    if mode == "canny":
        drawn = canny(image, low, high)
    elif mode == "gray":
        drawn = Image.fromarray(image).convert("L")
    else:
        raise ValueError(f"the control mode {mode!r} needs a control picture that is ready "
                         "(--control-image); only canny and gray are drawn from the picture itself")
    return np.dstack([drawn] * 3)


# ---- the net -----------------------------------------------------------------------------------

class ControlNet(Flux):
    """A ControlNet for FLUX.1: noisy latents, control latents and text -> residuals for the blocks
    of a Flux."""
    only = Flux.only | {"_class_name": "FluxControlNetModel"}
    streamed = False                                            # see `load_pair`

    def __init__(self, config):
        super().__init__(config)
        self.norm_out = self.proj_out = None                    # taps at every block, and no end
        dim = self.x_embedder.out_features
        self.controlnet_x_embedder = nn.Linear(self.x_embedder.in_features, dim)
        self.controlnet_blocks = nn.ModuleList(
            nn.Linear(dim, dim)
            for _ in self.transformer_blocks)
        self.controlnet_single_blocks = nn.ModuleList(
            nn.Linear(dim, dim)
            for _ in self.single_transformer_blocks)
        for name, p in self.named_parameters():
            if "controlnet_" in name:
                nn.init.zeros_(p)                               # a new net changes nothing
        modes = config.get("num_mode")                          # Union: 10; for one kind: null
        self.controlnet_mode_embedder = modes and nn.Embedding(modes, dim)

    @classmethod
    def read_config(cls, path, **also):
        """As Pretrained.read_config. ValueError for XLabs' nets, which are another design."""
        if "input_hint_block.0.weight" in read_tensors(path):
            raise ValueError(f"{path} is an XLabs ControlNet (it has an input_hint_block); only "
                             "nets built like InstantX's and Shakker's Union can be read")
        return super().read_config(path, **also)

    def forward(self, img, control, txt, pooled, timestep, guidance,
                img_ids, txt_ids,
                mode=0, scale=1.0):
        """control (B, L, 64): the packed latents of the control picture; mode: its kind, a number
        or one a row (B,), ignored by nets without modes; the rest as in Flux
        -> (double_residuals, single_residuals), lists of (B, L, D)."""
        modulation = self.modulation(timestep, guidance, pooled)                # (B, M, D)
        rope = self.rope(txt_ids, img_ids)                                      # (T+L, d/2, 2)
        return self.residuals(img, control, txt, modulation, rope, mode=mode, scale=scale)

    def residuals(self, img, control, txt, modulation, rope, mode, scale):
        """`forward` for a modulation (B, M, D) and rotations (T+L, d/2, 2) that are at hand."""
        img = self.x_embedder(img) + self.controlnet_x_embedder(control)        # (B, L, D)
        txt = self.context_embedder(txt)                                        # (B, T, D)
        table = self.controlnet_mode_embedder
        if table:
            mode = torch.as_tensor(mode)
            if mode.min() < 0 or mode.max() >= table.num_embeddings:
                raise ValueError(
                    f"mode is {mode.tolist()}, this net has 0 to {table.num_embeddings - 1}")
            token = table.weight[mode].expand(len(img), -1)                     # (B, D)
            txt = torch.cat([token[:, None], txt], 1)                           # (B, 1+T, D)
            rope = torch.cat([rope[:1], rope])                  # it stands where the text stands
        taps = [*self.controlnet_blocks, *self.controlnet_single_blocks]
        blocks = self.blocks()
        counts = [block.modulations for block in blocks]
        parts = modulation.split(counts, 1)                                     # (B, 12 or 3, D)
        if self.streamed:
            blocks = prefetch(blocks, img.device)
        found = []
        for block, tap, mod in zip(blocks, taps, parts):
            img, txt = block(img, txt, mod, rope)
            found.append(scale * tap(img))                                      # (B, L, D)
        doubles = len(self.transformer_blocks)
        return found[:doubles], found[doubles:]


def active(steps, start, end):
    """Which of the steps 0 .. steps-1 lie between the fractions `start` and `end` of the way: in
    these a net works."""
    return [i for i in range(steps)
            if start <= i / steps and (i + 1) / steps <= end]


def steer(net, control, txt, pooled, img_ids, levels,
          guidance=3.5, mode=0, scale=0.4,
          start=0.0, end=1.0):
    """The `control` argument of flux.denoise: the net's residuals in its `active` steps, else none.
    control (B, L, 64), mode, scale: as in `ControlNet.forward`; txt (B, T, 4096), pooled (B, 768),
    img_ids (L, 3), levels (steps+1,), guidance: what denoise gets. Modulation and RoPE are computed
    here, once for all `levels`."""
    modulations, rope = net.prepare(txt, pooled, img_ids, levels, guidance)

    def residuals(step, steps, x):
        if step not in active(steps, start, end):
            return (), ()
        return net.residuals(
            x.to(txt.dtype), control, txt,
            modulations[step - steps],                          # the last `steps` of the levels run
            rope, mode=mode, scale=scale)

    return residuals


# ---- a GPU that does not hold both -------------------------------------------------------------

def prefetch(blocks, device):
    """Blocks, which run one after the other, as functions that run them on a GPU without room for
    them all. A block's weights (but the modulation's, which has run) come from pinned main memory
    on a stream of their own, while the block before computes; the host waits for nothing."""
    main = torch.accelerator.current_stream(device)
    stream = torch.Stream(device=device)

    def send(block):
        stream.wait_stream(main)        # up to here another block's may be at work in their room
        copies = {}
        for name, p in block.named_parameters():
            if not name.startswith("norm"):
                copies[name] = torch.empty_like(p, device=device)
                with stream:
                    copies[name].copy_(p, non_blocking=True)
        return copies

    coming = send(blocks[0])
    for block, after in zip(blocks, [*blocks[1:], None]):
        weights = coming                # from here on those of the block before are free
        main.wait_stream(stream)
        coming = after and send(after)
        yield lambda *inputs: torch.func.functional_call(block, weights, inputs)


def load_pair(flux, controlnet, device, dtype, offload):
    """(Flux, ControlNet or None) from their folders. With offload they take 18.6 GB of the GPU
    instead of 30.4: the modulation layers (27 % of FLUX.1, and a picture needs them once) stay on
    the CPU, and of the net all blocks but the one that works and the next."""
    home = "cpu" if offload else device
    model = Flux.load(f"{flux}/transformer", home, dtype)
    net = controlnet and ControlNet.load(controlnet, home, dtype)
    if home == device:
        return model, net
    for name, p in model.named_parameters():
        if ".linear." not in name:                              # that is Modulation's
            p.data = p.data.to(device)
    if net:
        net.streamed = True
        for name, p in net.named_parameters():
            stays = "transformer_blocks." in name
            p.data = p.data.pin_memory() if stays else p.data.to(device)
    return model, net


# ---- from prompts and pictures to pictures -----------------------------------------------------

# What to download of a FLUX.1 repository: its folders (transformer, vae, text_encoder for CLIP,
# text_encoder_2 for T5, tokenizer, tokenizer_2, scheduler), not the single-file copies beside them
FLUX_PARTS = ["*/*"]


def encode_pictures(vae, pictures, device):
    """N pictures uint8 (H, W, 3) -> packed latents (N, L, 64)."""
    latents = []
    for picture in pictures:
        image = to_tensor(picture)[None].to(device)             # (1, 3, H, W)
        latents.append(pack(vae.encode(image)))                 # (1, L, 64)
    return torch.cat(latents)


@torch.no_grad()
def render(*, flux, controlnet,
           prompts, seeds, shape,
           sources=None, controls=None,
           mode="canny", scale=0.4, start=0.0, end=1.0,
           steps=28, guidance=3.5, strength=1.0,
           cfg=1.0, negative="",
           device="cpu", dtype=torch.float32, offload=False, batch=1,
           equip=None,
           measure=contextlib.nullcontext, progress=iter):
    """From an instruction to pixels: N prompts -> N uint8 pictures (H, W, 3), shape = (H, W). Text
    encoders -> autoencoder (source and edges in) -> Flux + ControlNet -> autoencoder (picture out).
    Each part is loaded, used for all N and freed before the next, but for the autoencoder.

    flux, controlnet: folders. The net is not loaded without controls, at scale 0 and where no step
        lies between start and end.
    prompts: strings or pairs (caption, instruction), see flux.encode_prompt.
    seeds: one a picture; its noise depends on nothing else, and with batch 1 neither does the
        picture.
    sources, controls: N pictures uint8 (H, W, 3) each, or None; strength < 1 needs sources.
    mode: one of MODES; scale, start, end: as in `steer`; guidance, strength, cfg: as in `denoise`;
        negative: the prompt that cfg steers away from.
    equip(model, ids): called once before the first step with Flux and the pixels' positions: hangs
        an image prompt into it (patch_dpo.ImagePrompt.attend_to), merges a LoRA, ...
    measure(name): a context around each part; progress: around the steps of each batch."""
    run = steps - int(steps - steps * strength)                 # how many steps denoise runs
    if not (controls and scale and active(run, start, end)):
        controlnet = None
    shared = check_parts(flux)                                  # widths that the net must have, too
    if controlnet:
        ControlNet.read_config(controlnet, **shared)

    with measure("text encoders"):
        texts = [*prompts, negative] if cfg != 1 else prompts
        encoded = encode_prompt(flux, texts, device, dtype, batch)
        txt, pooled = [states.to(device) for states in encoded]

    with measure("autoencoder, in"):
        vae = VAE.load(f"{flux}/vae", device)
        h = shape[0] // vae.factor
        w = shape[1] // vae.factor
        edited = sources and strength < 1
        source = encode_pictures(vae, sources, device) if edited else None
        control = controlnet and encode_pictures(vae, controls, device).to(dtype)

    with measure("Flux + ControlNet" if controlnet else "Flux"):
        model, net = load_pair(flux, controlnet, device, dtype, offload)
        ids = image_ids(h, w, device)                           # (L, 3)
        file = f"{flux}/scheduler/scheduler_config.json"
        with reading(file):
            levels = sigmas(steps, len(ids), read_json(file))
        if equip:
            equip(model, ids)
        size = (1, model.x_embedder.in_features // 4, h, w)
        noise = [torch.randn(size, generator=torch.Generator().manual_seed(seed))
                 for seed in seeds]
        noise = pack(torch.cat(noise)).to(device)               # (N, L, 64)
        latents = []
        for rows in torch.arange(len(prompts)).split(batch):
            context = (txt[rows], pooled[rows], ids, levels, guidance)
            last = torch.full_like(rows, -1)                    # there stands the negative prompt
            steering = net and steer(
                net, control[rows], *context,
                mode=MODES.index(mode),
                scale=scale,
                start=start,
                end=end)
            latents.append(denoise(
                model, noise[rows], *context,
                source=source[rows] if edited else None,
                strength=strength,
                negative=(txt[last], pooled[last]),
                cfg=cfg,
                control=steering,
                progress=progress))
        del model, net, steering

    with measure("autoencoder, out"):
        return [to_picture(vae.decode(latent[None])[0])
                for latent in unpack(torch.cat(latents), h, w)]


if __name__ == "__main__":
    picture = 200 * np.tri(14, 30, 15, np.uint8)
    print(canny(picture) // 255)
