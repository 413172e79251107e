"""C-DPO's Table 12 beside `--preset paper`, row by row, and what in the preset is not the paper's.

    python bench/paper.py

What the preset says is read off the settings in the code, as train.py and edit.py read it. Where
Table 12 names something that is no setting, the row says where it stands.
"""
import re
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdpo import CDPOSettings, EvalSettings, SFTSettings, markdown_table
from edit import EditSettings
from graph import GraphSettings

STAGES = {
    "graph": GraphSettings,
    "sft": SFTSettings,
    "cdpo": CDPOSettings,
    "eval": EvalSettings,
    "edit": EditSettings,
}

# Table 12 and what the text adds: part, item, its value, the settings that say so ("": BY_CODE).
TABLE = [
    ("LoRA", "Base LLM", "Qwen/Qwen2.5-7B-Instruct", "sft.qwen cdpo.qwen"),
    ("LoRA", "LoRA Rank", 16, "sft.rank"),
    ("LoRA", "LoRA alpha", 32, "sft.alpha"),
    ("LoRA", "Dropout", 0.05, "sft.dropout cdpo.dropout"),
    ("LoRA", "Optimizer", "AdamW", ""),
    ("LoRA", "LR Scheduler", "Cosine", ""),
    ("LoRA", "Data Type", "bfloat16", "sft.dtype cdpo.dtype"),
    ("LoRA", "Target Modules", "All Linear", ""),
    ("GNN", "Embedding Size", 4096, ""),
    ("GNN", "Keyword Encoder", "Linq-AI-Research/Linq-Embed-Mistral", "graph.embedder"),
    ("GNN", "Pretrain Epochs", 150, "graph.steps"),
    ("GNN", "Pretrain Learning Rate", 3e-5, "graph.lr"),
    ("GNN", "Pretrain Optimizer", "Adam", ""),
    ("GNN", "GraphSAGE Hidden Channels", 1024, "graph.hidden"),
    ("GNN", "Linear Hidden Channels", 1024, "graph.hidden"),
    ("SFT", "Data", "Instruct Pix2Pix", "sft.edits"),
    ("SFT", "GPUs, Train Time", "2 NVIDIA L40 (48GB), 3 Hours", ""),
    ("SFT", "Epochs", 1, ""),
    ("SFT", "Learning Rate", 2e-6, "sft.lr"),
    ("SFT", "Batch Size", 16, "sft.batch"),
    ("C-DPO", "Data", "Our Synthetic Data", "cdpo.pairs"),
    ("C-DPO", "GPUs, Train Time", "3 NVIDIA L40 (48GB), 1 Hour", ""),
    ("C-DPO", "Start Checkpoint", "SFT Tuned LoRA on Instruct Pix2Pix", "cdpo.sft"),
    ("C-DPO", "Number of Similar Users", 3, "cdpo.k"),
    ("C-DPO", "Collaborative Term Scale (lambda)", 0.15, "cdpo.lam"),
    ("C-DPO", "Number of Soft Prompt Tokens", 8, "cdpo.tokens"),
    ("C-DPO", "Train Steps", 3000, "cdpo.steps"),
    ("C-DPO", "Learning Rate", 2e-7, "cdpo.lr"),
    ("C-DPO", "GNN Parameters Learning Rate", 2e-8, "cdpo.gnn_lr"),
    ("C-DPO", "Batch Size", 12, "cdpo.batch"),
    ("Flux+ControlNet", "Flux Model", "black-forest-labs/FLUX.1-dev", "edit.flux"),
    ("Flux+ControlNet", "ControlNet", "InstantX/FLUX.1-dev-Controlnet-Union", "edit.controlnet"),
    ("Flux+ControlNet", "Control Mode", "Canny", "edit.control_mode"),
    ("Flux+ControlNet", "Number of Inference Steps", 60, "edit.steps"),
    ("Flux+ControlNet", "Guidance Scale", 35, "edit.guidance"),
    ("Flux+ControlNet", "ControlNet Conditioning Scale", "0.3-0.4", "edit.control_scale"),
    ("the text, 4.1.1", "likes and dislikes are one set of edges", True, "graph.unsigned"),
    ("the text, 4.1.1", "s(u,v) counts all shared attributes", "shared", "cdpo.similarity"),
    ("the text, 4.1.2", "all k neighbours take part", "exact", "cdpo.neighbours"),
    ("the text, 4.1.3", "soft tokens stand before the text", "front", "cdpo.place"),
    ("the text, 5.2", "every prompt has the profile", "own", "cdpo.profile eval.profile"),
]

BY_CODE = {         # what is no setting, and where it stands
    "Optimizer": "AdamW (train.py)",
    "LR Scheduler": "cosine, for SFT and C-DPO (train.py:learning_rate)",
    "Target Modules": "all linear layers but the output head, as PEFT (lora.py:inject)",
    "Embedding Size": "the keyword encoder's own width, of users too (graph.py:EdgeModel)",
    "Pretrain Optimizer": "AdamW without weight decay, which is Adam (graph --weight-decay 0)",
    "GPUs, Train Time": "any number: the batch is global; not measured on a GPU",
    "Epochs": "9,375 steps of 16, which are 150,000 pairs once (sft --steps)",
}
SAME = {            # values that are said in other words
    "bf16": "bfloat16",
    "canny": "Canny",
    "gpt-generated-prompts.jsonl": "Instruct Pix2Pix",
    "pairs.jsonl": "Our Synthetic Data",
    "runs/sft": "SFT Tuned LoRA on Instruct Pix2Pix",
    0.4: "0.3-0.4",                                       # 5: .4 in the text
}

OURS = [            # deviations that are no setting, and gaps of the paper that are filled
    "soft tokens: a LayerNorm before the MLP, GELU in it, its output's length (cdpo.py:SoftPrompt)",
    "a neighbour's term takes one random pair of that neighbour a step (cdpo.py:CDPO.draw_row)",
    "L_DPO(v) reads a neighbour's pair with the target user's tokens, against a reference without "
    "any (cdpo --neighbour-user; the paper leaves the first open)",
    "the GNN's rate in C-DPO falls along the LoRA's cosine; the paper names no other schedule",
    "the GNN's pretraining takes one step an epoch, over the whole graph; the paper gives no batch",
    "a new user listens to attributes and is not heard by them (graph.py:embed_new_user)",
    "data: 48 pairs a user are 96 instructions; the paper says 48 annotated instructions, and two "
    "pairs for each of four captions and six types (bench/make_data.py)",
    "SFT's 150,000 pairs are the first epoch's random draw of all prompts in the file",
    "FLUX's prompt is \"caption. instruction\"; the paper does not say (edit.py)",
    "edit --reference is not C-DPO's: image prompt and image encoder are PatchDPO's or XLabs'",
]


def paper_value(name):
    """"stage.field" -> what the paper preset has there."""
    stage, field = name.split(".")
    return {row.name: row.metadata["paper"] for row in fields(STAGES[stage])}[field]


def rows():
    """[[part, item, Table 12's value, the preset's, "the same", "by code" or "**differs**"]]"""
    found = []
    for part, item, value, names in TABLE:
        preset = [paper_value(name) for name in names.split()]
        same = all(value in (one, SAME.get(one)) for one in preset)
        shown = ", ".join(f"{name} {one}" for name, one in zip(names.split(), preset))
        word = "the same" if same else "**differs**"
        if not names:
            word = "by code"
        found.append([part, item, str(value), shown or BY_CODE[item], word])
    return found


def not_the_papers():
    """[(flag, the preset's value, its own words)] of settings that say that they are ours, or that
    the paper does not give them."""
    found = []
    for stage, settings in STAGES.items():
        for row in fields(settings):
            about = row.metadata["about"]
            if re.search(r"\bours\b|\b(the|in the) paper\b", about):
                flag = f"{stage} --{row.name.replace('_', '-')}"
                found.append([flag, str(row.metadata["paper"]), about])
    return found


def main():
    print("**Table 12 and `--preset paper`**\n")
    print(markdown_table(["part", "item", "Table 12", "the preset", ""], rows()))
    print("\n**Settings that the paper does not give, or that are ours**\n")
    print(markdown_table(["flag", "in the preset", "what it is"], not_the_papers()))
    print("\n**Ours, and no setting**\n")
    for line in OURS:
        print(f"- {line}")


if __name__ == "__main__":
    main()
