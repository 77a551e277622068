"""How far a run has come: steps, the best evaluation, early stopping, reduce-on-plateau."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.parts.schedule import Plateau, Schedule

if TYPE_CHECKING:
    from launch.state.run import Run


@dataclass
class TrainState:
    """How far a run has come; with the strategies' state, all that a checkpoint holds."""

    step: int = 0
    """optimizer steps done"""
    best: float | None = None
    """best objective of any evaluation so far"""
    best_step: int | None = None
    bad_evaluations: int = 0
    """evaluations since the best one"""
    unevaluated: bool = False
    """whether the evaluation at this step was cut off by a stop, and is still to be made"""
    plateau: Plateau = field(default_factory=Schedule().plateau)

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {**vars(self), "plateau": self.plateau.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.plateau.load_state(state["plateau"])
        vars(self).update({name: value for name, value in state.items() if name != "plateau"})

    def observe(self, scores: Mapping[str, Any], run: Run) -> None:
        """Take note of an evaluation: is the recipe's objective better than ever, and by enough?"""
        value, mode = float(scores[run.recipe.monitor]), run.recipe.monitor_mode
        gain = 0.0 if self.best is None else value - self.best if mode == "max" else self.best - value
        if self.best is None or gain > run.config.eval.min_delta:
            self.best, self.best_step, self.bad_evaluations = value, self.step, 0
        else:
            self.bad_evaluations += 1
        self.plateau.observe(value, mode)
