"""Which runs `rankzero parity` compares. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.cli.resolve import Settings
from launch.equivalence.run_arguments import args_for_strategy

DEFAULT_MICRO_BATCH = 4
"""samples, where the recipe fixes none: batches must be equal, whatever the number of ranks"""
ACCUMULATION_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared with the single process."""

    ranks: int
    steps: int
    """how many of the run's first steps are compared"""
    strategies: list[str]


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One run to compare."""

    strategy: str
    accumulation_steps: int
    variant: str = ""
    """what is switched on beside: `clip`, `recompute` or nothing"""
    argv: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.strategy}-{self.accumulation_steps}-{self.variant or 'plain'}"

    @property
    def reference(self) -> str:
        """The single process that this case must equal: activation checkpointing must not change it."""
        variant = "clip" if self.variant == "clip" else "plain"
        return f"single-{self.accumulation_steps}-{variant}"

    @property
    def peer(self) -> str:
        """The same case under DDP."""
        return self.name.replace(self.strategy, "ddp", 1)


def plan_cases(settings: Settings, argv: Sequence[str], comparison: Comparison) -> list[ParityCase]:
    """For the single process and each strategy: without and with accumulation, then with clipping, then (if
    the recipe has blocks) with activation checkpointing. `argv` are the arguments of the run without its
    strategy.
    """
    from launch.state.build import has_blocks

    config = settings.config
    variants: list[tuple[int, str, tuple[str, ...]]] = [(1, "", ()), (ACCUMULATION_STEPS, "", ())]
    if config.clip_norm is None and config.clip_value is None:
        variants.append((ACCUMULATION_STEPS, "clip", ("clip_norm=0.1",)))
    if config.activation_checkpointing == "none" and has_blocks(settings.recipe):
        variants.append((ACCUMULATION_STEPS, "recompute", ("activation_checkpointing=true",)))
    micro = config.given_micro_batch_size or DEFAULT_MICRO_BATCH
    return [
        ParityCase(
            strategy=strategy,
            accumulation_steps=accumulation_steps,
            variant=variant,
            argv=(
                *args_for_strategy(argv, strategy),
                f"strategy={strategy}",
                f"batch_size={micro * comparison.ranks * accumulation_steps}",
                f"micro_batch_size={micro}",
                *more,
            ),
        )
        for strategy in ["single", *comparison.strategies]
        for accumulation_steps, variant, more in variants
        if not (strategy == "single" and variant == "recompute")
    ]
