"""HPS v2 for bench/judge.py: the published pickle (HPS_v2.1_compressed.pt, a CLIP ViT-H/14 in
open_clip's names) -> a folder in CLIP's public layout. Of the pickle only tensors are read, and no
code in it is run. The tokenizer is any CLIP's. The names are open_clip's from memory: what does not
fit is refused when judge.py reads the folder.

    python bench/hps.py HPS_v2.1_compressed.pt --clip CLIP_FOLDER --out hps
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

HEADS = 16                                                # of both towers of a ViT-H/14
NAMES = {                                                 # open_clip's -> CLIP's, in this order
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def convert(stored):
    """open_clip's tensors -> those of a whole CLIP: q, k, v apart, projections as in nn.Linear."""
    tensors = {}
    for name, tensor in stored.items():
        for theirs, public in NAMES.items():
            name = name.replace(theirs, public)
        if name == "text_projection":
            name += ".weight"
        if name.endswith("_projection.weight"):
            tensor = tensor.T
        if "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                tensors[name.replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
        else:
            tensors[name] = tensor.contiguous()
    return tensors


def config_of(tensors):
    """config.json: every size but the number of heads stands in the tensors."""
    text = tower(tensors, "text_model")
    vision = tower(tensors, "vision_model")
    words = tensors["text_model.embeddings.token_embedding.weight"]
    patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    places = tensors["text_model.embeddings.position_embedding.weight"]
    cells = len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1
    text["vocab_size"] = len(words)
    text["eos_token_id"] = len(words) - 1
    text["max_position_embeddings"] = len(places)
    vision["patch_size"] = patch
    vision["image_size"] = round(cells ** 0.5) * patch
    return {
        "model_type": "clip",
        "projection_dim": len(tensors["visual_projection.weight"]),
        "text_config": text,
        "vision_config": vision,
    }


def tower(tensors, name):
    inner, width = tensors[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
    layers = [key for key in tensors if key.startswith(name) and key.endswith("mlp.fc1.weight")]
    return {
        "model_type": f"clip_{name}",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def main(argv=None):
    p = argparse.ArgumentParser(description="HPS v2's pickle -> a folder in CLIP's layout.")
    p.add_argument("file", type=Path)
    p.add_argument("--clip", type=Path, required=True, help="folder whose tokenizer is copied")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    stored = torch.load(args.file, map_location="cpu", weights_only=True)
    tensors = convert(stored.get("state_dict", stored))
    config = config_of(tensors)
    args.out.mkdir(parents=True)
    save_file(tensors, args.out / "model.safetensors", {"format": "pt"})
    side = config["vision_config"]["image_size"]
    processor = {                                         # OpenAI's numbers
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    for name, value in (("config", config), ("preprocessor_config", processor)):
        (args.out / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        if (args.clip / name).is_file():
            shutil.copy(args.clip / name, args.out)


if __name__ == "__main__":
    main()
