"""Qwen2.5 in plain torch: checked checkpoint loader, tokenizer and chat template, forward pass, KV cache, batched generation."""
import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn


# ---- checkpoints -------------------------------------------------------------------------------------------------------------
def resolve(path_or_repo, patterns=None):
    """The local folder `path_or_repo` as it is; else the hub repository of that name, downloaded (only files matching `patterns`) -> Path.

    ValueError in one sentence when it is neither, or when the repository is gated or out of reach."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    is_repo = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path_or_repo)) and not path.parent.is_dir()   # mini/qwem is a typo, not a repository
    if not is_repo:
        raise ValueError(f"{str(path_or_repo)!r} is not a folder here, nor a hub repository of the form 'owner/name'")
    try:
        return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns))
    except OSError as error:        # every refusal of the hub, and a network out of reach, is an OSError
        raise ValueError(f"could not download {path_or_repo} ({type(error).__name__}): if it is gated, accept its licence at https://huggingface.co/{path_or_repo} "
                         "and set HF_TOKEN; or name a local folder that holds its files") from error


def read_json(file):
    """The JSON value in `file`; ValueError naming the file when it is absent or not JSON."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def checkpoint_files(path):
    """The safetensors files of a checkpoint: `path` itself, the shards its index names, or the folder's only `*.safetensors` -> list of Path."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{path} must hold one *.safetensors or one index of shards, found {[f.name for f in found] or 'none'}")
    if found[0].suffix == ".safetensors":
        return found
    shards = [path / name for name in sorted(set(read_json(found[0])["weight_map"].values()))]
    if absent := [f.name for f in shards if not f.is_file()]:
        raise ValueError(f"{found[0]} names shards that are not in the folder: {', '.join(absent)}")
    return shards


def read_tensors(path):
    """All tensors of a checkpoint, memory-mapped (do not overwrite the files while they are in use) -> {name: tensor}."""
    tensors = {}
    for file in checkpoint_files(path):
        try:
            with safe_open(file, "pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error
    return tensors


def load_checkpoint(module, path, rename=None):
    """Strict copy of the checkpoint at `path` into `module`, which may be on the meta device: then the memory-mapped tensors are taken as they are.

    `rename(name)` gives a stored tensor's name in the module, None to leave it out. Of tied parameters one name is enough.
    ValueError names every missing, unexpected and misshapen tensor."""
    stored = {rename(k) if rename else k: v for k, v in read_tensors(path).items()}
    stored.pop(None, None)
    own, names = module.state_dict(keep_vars=True), {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    source = {k: stored[n] for tied in names.values() for n in [next((n for n in tied if n in stored), None)] if n for k in tied}
    faults = [f"missing {k}" for k in own if k not in source] + [f"unexpected {k}" for k in stored if k not in own]
    faults += [f"{k} has shape {tuple(v.shape)}, expected {tuple(own[k].shape)}" for k, v in stored.items() if k in own and v.shape != own[k].shape]
    if faults:
        raise ValueError(f"{path} does not fit {type(module).__name__}: " + "; ".join(faults))
    for name, tensor in own.items():
        if tensor.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(source[name], tensor.requires_grad) if isinstance(tensor, nn.Parameter) else source[name])
        else:
            tensor.data.copy_(source[name])
