"""Presets: the keys that ``fastgpt train NAME`` sets."""

from typing import Any

import torch

_CHAR: dict[str, Any] = {
    "dataset": "builtin",
    "eval_interval": 250,
    "eval_iters": 200,
    "log_interval": 10,
    "always_save_checkpoint": False,
    "gradient_accumulation_steps": 1,
    "batch_size": 64,
    "block_size": 256,
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.2,
    "learning_rate": 1e-3,
    "max_iters": 5000,
    "lr_decay_iters": 5000,
    "min_lr": 1e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
}

# Evaluate the published GPT-2 weights on OpenWebText.
_EVALUATION: dict[str, Any] = {"eval_only": True, "eval_iters": 500, "batch_size": 8}

# The keys that each preset changes. `gpt2` has the defaults: GPT-2 124M on OpenWebText. From
# train_gpt2 on, presets have the names and hyper-parameters of nanoGPT's configuration files,
# except that wandb_log is off.
PRESETS: dict[str, dict[str, Any]] = {
    "char": _CHAR,
    "char-cpu": {
        **_CHAR,
        "eval_iters": 20,
        "batch_size": 12,
        "block_size": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "dropout": 0.0,
        "max_iters": 2000,
        "lr_decay_iters": 2000,
        "device": "cpu",
    },
    "gpt2": {},
    "train_gpt2": {
        "eval_interval": 1000,
        "log_interval": 10,
        "wandb_run_name": "gpt2-124M",
    },
    "train_shakespeare_char": {
        **_CHAR,
        "dataset": "shakespeare_char",
        "out_dir": "out-shakespeare-char",
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
    },
    "finetune_shakespeare": {
        "init_from": "gpt2-xl",
        "dataset": "shakespeare",
        "out_dir": "out-shakespeare",
        "eval_interval": 5,
        "eval_iters": 40,
        "always_save_checkpoint": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
        "learning_rate": 3e-5,
        "decay_lr": False,
        "max_iters": 20,
        "wandb_project": "shakespeare",
        "wandb_run_name": "finetuned",
    },
    "eval_gpt2": {**_EVALUATION, "init_from": "gpt2"},
    "eval_gpt2_medium": {**_EVALUATION, "init_from": "gpt2-medium"},
    "eval_gpt2_large": {**_EVALUATION, "init_from": "gpt2-large"},
    "eval_gpt2_xl": {**_EVALUATION, "init_from": "gpt2-xl"},
}


# `fastgpt train` without arguments on a CPU: half of char-cpu, under 3 minutes on two cores.
_SHORT_RUN = {"max_iters": 1000, "lr_decay_iters": 1000}


def automatic_keys() -> dict[str, Any]:
    """The keys of a run without a preset or configuration file."""
    if torch.cuda.is_available():
        return PRESETS["char"]
    return {**PRESETS["char-cpu"], **_SHORT_RUN}
