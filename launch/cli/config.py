"""The keys of a run, apart from those of its recipe: each field with its type, range, default and help. No
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from strategies.options import NonNegativeFloat, NonNegativeInt, Options, PositiveFloat, PositiveInt


@dataclass(kw_only=True)
class CheckpointOptions:
    """`checkpoint.*`"""

    every: PositiveInt | None = None
    """steps between resumable checkpoints (default: once an epoch, and at the end)"""
    every_minutes: PositiveFloat | None = 30.0
    """minutes between them as well, whatever the steps; null: never by the clock"""
    keep: PositiveInt = 2
    """newest checkpoints to keep"""
    best: bool = False
    """keep the best by the recipe's objective as well"""


@dataclass(kw_only=True)
class EvalOptions:
    """`eval.*`"""

    every: PositiveInt | None = None
    """steps between evaluations on the validation split (default: once an epoch, and at the end)"""
    patience: PositiveInt | None = None
    """early stopping: stop after this many evaluations without a better objective"""
    min_delta: NonNegativeFloat = 0.0
    """what counts as better for eval.patience"""


@dataclass(kw_only=True)
class LogOptions:
    """`log.*`"""

    every: PositiveInt = 10
    """steps between lines on the screen; metrics.jsonl holds every step"""


@dataclass(kw_only=True)
class Config(Options):
    """A run, apart from its recipe's own fields."""

    recipe: str = ""
    """what to train: a built-in name, a file (./mine.py) or a dotted module"""
    config: str | None = None
    """YAML file of keys, read first; the command line wins"""
    run_dir: str | None = None
    """where the run is kept (default: runs/RECIPE/TIME-MARK)"""
    resume: str = "auto"
    """auto: continue the run in run_dir if there is one; none: start afresh; PATH: start from that
    checkpoint
    """
    init: str | None = None
    """weights to start a new run from: a .safetensors or torch file, a checkpoint, or a run; no optimizer
    state is taken
    """
    init_partial: bool = False
    """let init= leave parameters as they are that it has no weights for, and skip weights that the model has
    no use for
    """
    batch_size: PositiveInt = 64
    """GLOBAL batch in samples, the unit of an optimizer step"""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """samples per forward on one rank (default: batch_size / ranks); gradient accumulation is derived. auto:
    the largest that fits into memory, found by halving, with the global batch unchanged
    """
    epochs: PositiveInt | None = None
    """passes over the training data"""
    steps: PositiveInt | None = None
    """optimizer steps, instead of epochs"""
    workers: NonNegativeInt | None = None
    """data-loading processes per rank (default: what the CPUs of this rank allow, at most 8)"""
    sync_batchnorm: bool = False
    """BatchNorm over the micro-batches of all ranks (CUDA only)"""
    debug: bool | Annotated[int, Ge(0)] = False
    """true, or a number of steps: one process makes the first 8 (or so many) steps of the run under anomaly
    detection, after a table of the model and a check that one batch can be overfitted; pdb on an exception
    """
    launcher: Literal["auto", "torchrun", "srun", "accelerate", "mpirun", "environment", "python"] = "auto"
    """who started the ranks, if the environment could be read in several ways"""
    max_time: str | None = None
    """stop, save and exit with 75 before this time is up, written as SLURM does: 90 (minutes), 1:30:00, 2-12
    (days-hours); SLURM's own limit is read as well
    """
    start_timeout: PositiveFloat = 60.0
    """seconds for all ranks to come together, before the run ends and names who is missing"""
    hang_timeout: PositiveFloat = 600.0
    """watchdog: seconds without progress on any rank, before the run ends and says where each rank hangs
    (first step: 3 times that)
    """
    chaos: str | None = None
    """fault injection: a fault to happen once, KIND:rank=R,step=S; kinds: kill, stall, slow, nan, sigterm,
    torn_checkpoint, oom
    """
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    log: LogOptions = field(default_factory=LogOptions)

    @property
    def given_micro_batch_size(self) -> int | None:
        """`micro_batch_size` as a number, where one was given or has been found."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


HEADINGS = {
    "Run": ("recipe", "config", "run_dir", "resume", "init", "init_partial", "seed", "launcher"),
    "Length": ("epochs", "steps", "max_time"),
    "Data and batch": ("batch_size", "micro_batch_size", "workers", "sync_batchnorm"),
    "Precision and memory": ("precision", "activation_checkpointing", "compile", "clip_norm", "clip_value"),
    "Strategy": ("strategy", "ddp", "fsdp", "zero"),
    "Checkpoints": ("checkpoint",),
    "Evaluation and logging": ("eval", "log"),
    "Failures": ("debug", "start_timeout", "hang_timeout", "chaos"),
}
"""the keys of a run, or their groups, as `--help` shows them: `recipe` stands first"""
