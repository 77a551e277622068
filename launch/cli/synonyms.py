"""The keys of HF Trainer, Accelerate, Lightning, DeepSpeed, nanoGPT and torchtitan, answered with ours. No
torch.
"""

from __future__ import annotations

from collections.abc import Collection

THEIR_NAMES = {
    "optim.name": "optimizer optimizer_name",
    "optim.lr": "learning_rate lr base_lr",
    "optim.weight_decay": "weight_decay wd",
    "optim.momentum": "momentum",
    "optim.eps": "adam_epsilon epsilon",
    "schedule.name": "lr_scheduler_type lr_scheduler scheduler",
    "schedule.warmup": "warmup_steps warmup_ratio warmup_iters num_warmup_steps",
    "schedule.min_factor": "min_lr_ratio min_lr_factor",
    "batch_size": "train_batch_size global_batch_size",
    "micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu local_batch_size mbs "
    "per_gpu_train_batch_size auto_find_batch_size",
    "clip_norm": "max_grad_norm gradient_clip_val gradient_clipping grad_clip max_norm clip_grad_norm",
    "steps": "max_steps max_iters training_steps num_steps total_steps",
    "epochs": "max_epochs num_train_epochs num_epochs",
    "max_time": "time_limit max_duration",
    "run_dir": "output_dir default_root_dir out_dir dump_folder save_dir",
    "resume": "resume_from_checkpoint ckpt_path resume_from load_checkpoint",
    "precision": "bf16 fp16 tf32 mixed_precision amp dtype",
    "compile": "torch_compile compile_model",
    "activation_checkpointing": "gradient_checkpointing activation_checkpoint",
    "workers": "num_workers dataloader_num_workers",
    "strategy": "zero_stage stage",
    "checkpoint.every": "save_steps save_interval checkpoint_interval checkpoint.interval",
    "checkpoint.keep": "save_total_limit save_top_k keep_latest_k",
    "checkpoint.best": "load_best_model_at_end",
    "eval.every": "eval_steps eval_interval val_check_interval",
    "eval.patience": "early_stopping_patience",
    "log.every": "logging_steps log_every_n_steps log_interval log_freq",
    "hang_timeout": "ddp_timeout nccl_timeout",
    "debug": "fast_dev_run detect_anomaly overfit_batches",
    "ddp.find_unused_parameters": "ddp_find_unused_parameters find_unused_parameters",
    "ddp.bucket_mb": "ddp_bucket_cap_mb bucket_cap_mb",
    "data.block": "block_size seq_len seq_length max_seq_len max_seq_length max_length context_length",
    "data.path": "train_file dataset_path",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.width": "n_embd hidden_size d_model embed_dim",
    "model.dropout": "dropout attn_dropout resid_pdrop hidden_dropout_prob",
}
"""our keys, and what others call them"""

VALUES = {
    "bf16": {"true": "bf16", "false": "fp32"},
    "fp16": {"true": "fp16", "false": "fp32"},
    "tf32": {"true": "tf32", "false": "fp32"},
    "amp": {"true": "bf16", "false": "fp32"},
    "mixed_precision": {"no": "fp32", "bfloat16": "bf16", "float16": "fp16"},
    "dtype": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    "gradient_checkpointing": {"true": "full", "false": "none"},
    "activation_checkpoint": {"true": "full", "false": "none"},
    "auto_find_batch_size": {"true": "auto"},
    "zero_stage": {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"},
    "stage": {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"},
    "resume_from_checkpoint": {"true": "auto", "false": "none", "True": "auto", "False": "none"},
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "AdamW": "adamw", "Adam": "adam"},
    "overfit_batches": {"1": "true"},
}
"""their values in ours, by their key; others stay as they are"""

NOTES = {
    "micro_batch_size": "the samples of one forward on one rank",
    "batch_size": "the global batch",
    "schedule.warmup": "steps or, below 1, a fraction of the run",
    "max_time": "written as SLURM does: 1:30:00",
    "resume": "a path, or auto: continue what is in run_dir",
    "data.block": "tokens of a window",
    "checkpoint.every": "in steps",
    "eval.every": "in steps",
}
"""what one should know of our key"""

LAUNCHER = (
    "the launcher's here: rankzero train nproc={value} on this machine, or torchrun "
    "--nproc_per_node={value} launch/run.py"
)
ACCUMULATION = (
    "derived here, as batch_size = micro_batch_size x accumulation x ranks: give batch_size and "
    "micro_batch_size"
)
ELSEWHERE = {
    **dict.fromkeys(
        ["gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum", "grad_accum_steps"],
        ACCUMULATION,
    ),
    **dict.fromkeys(["devices", "nproc_per_node", "num_processes", "gpus", "n_gpu", "world_size"], LAUNCHER),
    **dict.fromkeys(
        ["num_nodes", "nnodes", "num_machines"],
        "the launcher's here: torchrun --nnodes={value}, or rankzero submit nodes={value} on SLURM",
    ),
    **dict.fromkeys(
        ["accelerator", "device", "use_cpu", "no_cuda"],
        "found here: a GPU for each rank where there are any; CUDA_VISIBLE_DEVICES= trains on the CPU",
    ),
    "local_rank": "read from the environment here, where launchers leave it; drop it",
    **dict.fromkeys(
        ["beta1", "adam_beta1", "beta2", "adam_beta2"], "one of the two of optim.betas=[0.9,0.999]"
    ),
    "min_lr": "a factor here: schedule.min_factor is the lowest learning rate over optim.lr",
    **dict.fromkeys(
        ["metric_for_best_model", "greater_is_better"],
        "declared by the recipe here: its `monitor` and `monitor_mode`",
    ),
    **dict.fromkeys(
        ["report_to", "wandb_project", "wandb_log", "logger"],
        "not needed here: every step is a line of metrics.jsonl in run_dir",
    ),
    "init_from": "init=PATH here for weights to start from; resume=auto continues what is in run_dir",
    "pretrained_model_name_or_path": "init=PATH here: weights to start from",
    "deepspeed": "strategy=zero1|zero2|zero3 here, with options zero.*",
}
"""what others have a key for, and where it is given here; `{value}` is their value"""

SYNONYMS = {name: key for key, names in THEIR_NAMES.items() for name in names.split()} | dict.fromkeys(
    ELSEWHERE, ""
)
"""their key -> ours, or "" where the answer is in ELSEWHERE"""


def explain(name: str, value: str, known: Collection[str]) -> str:
    """What the key `name` of another framework, given as `value`, is called here; "" if it is none of theirs,
    or if ours is none of the `known` keys.
    """
    theirs = name if name in SYNONYMS else name.rpartition(".")[2]
    if theirs not in SYNONYMS:
        return ""
    key = SYNONYMS[theirs]
    if not key:
        text = ELSEWHERE[theirs].replace("{value}", value if value.isdecimal() else "N")
        return f"{name} is {text}" if keys_named_in(text) <= set(known) else ""
    if key not in known:
        return ""
    ours = VALUES.get(theirs, {}).get(value, value)
    note = f" ({NOTES[key]})" if key in NOTES else ""
    return f"{name} is {key} here: {key}={ours}{note}"


def keys_named_in(text: str) -> set[str]:
    """Our keys with a group, such as optim.lr, in the text of ELSEWHERE."""
    names = (part.strip(":;,").partition("=")[0] for part in text.split())
    return {name for name in names if name.startswith(("optim.", "schedule.", "model.", "data."))}
