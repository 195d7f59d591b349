"""A schedule whose number of steps follows from a time: it is planned again as the run goes."""

import math
from typing import Any

from firstlight.errors import UsageError, check_saved
from firstlight.schedules import Schedule

_UNPLANNED = 1e9
"""Steps of a schedule before its first plan: a warm-up that is a share of the run has hardly begun."""


class TimedSchedule:
    """Places a schedule so that it ends after the steps that are left, without a jump of the learning rate.

    The schedule is that of a run which made all its steps at the present speed. A new plan changes the number of these
    steps, and the position among them, but not the factor: during the warm-up, the position keeps the factor; later,
    it keeps the share of the decay that is done. A warm-up in steps keeps its steps; a share of the run stays a share.

    Args:
        schedule: It must depend on `step / total_steps` and its warm-up only, or its factor jumps with a new plan.
        total: Steps of the schedule, infinite if they are not planned yet.
        step: Optimiser steps done.
        position: Steps of the schedule done, which need not be whole.
    """

    def __init__(self, schedule: Schedule, total: float = math.inf, step: int = 0, position: float = 0) -> None:
        self.schedule, self.total, self.step, self.position = schedule, total, step, position

    @property
    def end(self) -> float:
        """Optimiser steps of the whole run, infinite before the first plan."""
        return self.step + round(self.total - self.position) if math.isfinite(self.total) else math.inf

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate at an optimiser step."""
        position = self.position + step - self.step
        # A rounding error must not keep a whole number from being one.
        return self.schedule(round(position, 6), self.total if math.isfinite(self.total) else _UNPLANNED)

    def plan(self, step: int, left: float) -> None:
        """Let the schedule end `left` optimiser steps after `step`.

        A schedule that has ended starts at the position of a run that was planned with these steps from its start.

        Raises:
            UsageError: When the warm-up is not shorter than the run.
        """
        total = self.total if math.isfinite(self.total) else _UNPLANNED
        before, warmup = self.position + step - self.step, self.schedule.warmup_steps_in(total)
        position: float
        if before >= total or left < 1:
            position, new_total = step, step + max(left, 0)
        else:
            new_total = before + left
            for _ in range(20):  # The warm-up may be a share of what is computed here.
                new_warmup = self.schedule.warmup_steps_in(new_total)
                if before < warmup:
                    position = max((before + 1) / (warmup + 1) * (new_warmup + 1) - 1, 0)
                    new_total = position + left
                else:
                    new_total = new_warmup + left * (total - warmup) / (total - before)
                    position = new_total - left
        self.step, self.position, self.total = step, position, new_total

    def state_dict(self) -> dict[str, Any]:
        """Return the plan."""
        return {"total": self.total, "step": self.step, "position": self.position}

    @staticmethod
    def check_state(state: dict[str, Any]) -> None:
        """Refuse a damaged plan."""
        check_saved("the timed plan", state, total=int | float, step=int, position=int | float)
        if len(state) > 3 or not (0 <= state["position"] <= state["total"] and state["step"] >= 0):
            raise UsageError("the checkpoint is damaged: the timed plan is not one")
