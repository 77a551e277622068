"""How far a run has come: steps, the best evaluation, early stopping, reduce-on-plateau."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.parts.schedule import Plateau, Schedule


@dataclass
class TrainState:
    """How far a run has come; with the strategies' state dicts, all that a checkpoint holds."""

    step: int = 0
    """optimizer steps done"""
    best: float | None = None
    """best value of the monitored metric so far"""
    best_step: int | None = None
    bad_evaluations: int = 0
    """evaluations since the best one: `eval.patience` of them stop the run early"""
    unevaluated: bool = False
    """whether a stop has interrupted the validation at this step, and a resumed run is to repeat it"""
    plateau: Plateau = field(default_factory=Schedule().plateau)

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {**vars(self), "plateau": self.plateau.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.plateau.load_state(state["plateau"])
        vars(self).update({name: value for name, value in state.items() if name != "plateau"})

    def observe(self, value: float, mode: str, min_delta: float) -> None:
        """Take the monitored metric of an evaluation into account, for early stopping and reduce-on-plateau.

        It is an improvement if it is better than the best by more than `min_delta`; `mode` is `min` or `max`.
        """
        gain = 0.0 if self.best is None else value - self.best if mode == "max" else self.best - value
        if self.best is None or gain > min_delta:
            self.best, self.best_step, self.bad_evaluations = value, self.step, 0
        else:
            self.bad_evaluations += 1
        self.plateau.observe(value, mode)
