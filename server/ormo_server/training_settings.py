"""How a run trains, as settings: the same for a server and for a simulation, and what the core makes of them."""

from dataclasses import replace
from typing import Any, Self

from pydantic import Field, model_validator

from ormo_runtime.settings import MOST, Settings
from ormo_server.core.errors import SettingsError
from ormo_server.core.method import LEAST_DELAY_THRESHOLD, MOST_DELAY_THRESHOLD, PRESETS, Method, Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.step_size import KINDS, STEP_SCALES, LearningRate


def _choices(names: object) -> str:
    assert isinstance(names, dict | tuple)
    return ", ".join(f"`{name}`" for name in names)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


class TrainingSettings(Settings):
    """How to train, and for how long."""

    method: str = Field("ormo", description=f"the preset to train by: {_choices(PRESETS)}")
    update_rule: str | None = Field(None, description=f"instead of the preset's: {_choices(UPDATE_RULES)}")
    step_scale: str | None = Field(None, description=f"instead of the preset's: {_choices(STEP_SCALES)}")
    scheduler: str | None = Field(None, description=f"instead of the preset's: {_choices(SCHEDULERS)}")
    staleness_bound: int | None = Field(
        None, ge=0, le=MOST, description="for `bounded-staleness`: the largest delay that an applied gradient may have"
    )
    delay_threshold: float | None = Field(
        None,
        ge=LEAST_DELAY_THRESHOLD,
        le=MOST_DELAY_THRESHOLD,
        description="for the step scale `delay-adaptive`: the delay above which steps get smaller, in K; none: 1 for "
        "`asgd-da`, else 2",
    )
    discard_delay: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="do not apply gradients with this delay or more; none: apply all, but `ringmaster` none from 2K on",
    )
    delay_compensation: float = Field(
        0.04, ge=0, le=1e6, description="λ of the update rule `dc`, in the units of an inverse gradient"
    )
    learning_rate: float = Field(
        0.01, gt=0, description="η after the warm-up; K gradients are summed in a bucket, so divide by about K"
    )
    schedule: str = Field("constant", description=f"how η changes with the iteration: {_choices(KINDS)}")
    warmup_gradients: int = Field(0, ge=0, le=MOST, description="gradients over which η rises linearly from near 0")
    milestones: tuple[int, ...] = Field((), description="for `milestones`: iterations at which η is multiplied")
    milestone_factor: float = Field(0.1, gt=0, description="for `milestones`: by what η is multiplied at each")
    cosine_gradients: int = Field(
        0, ge=0, le=MOST, description="for `cosine`: the iteration at which it reaches its end"
    )
    final_learning_rate: float = Field(0.0, ge=0, description="for `cosine`: η at its end")
    momentum: float = Field(0.9, ge=0, lt=1, description="β, the momentum coefficient")
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="λ, which workers are told to add as λ·w to their gradients"
    )
    bucket_size: int | None = Field(
        None, ge=1, le=2**31 - 1, description="K, gradients in a bucket; none: the number of slots of the live workers"
    )
    seed: int = Field(0, ge=0, description="where the workers' data orders come from")
    stop_after_gradients: int = Field(
        0, ge=0, le=MOST, description="end the run after so many applied gradients; 0 for never"
    )
    stop_after_samples: int = Field(0, ge=0, le=MOST, description="end the run after so many samples; 0 for never")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.run()
        except SettingsError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def workers_allowed(self) -> tuple[int, int]:
        """How many workers a new run waits for, and how many it takes."""
        return 1, 1

    def run(self) -> Run:
        """What the core goes by.

        Raises:
            SettingsError: values that contradict each other.
        """
        min_workers, max_workers = self.workers_allowed
        return Run(
            learning_rate=LearningRate(
                peak=self.learning_rate,
                kind=self.schedule,
                warmup_gradients=self.warmup_gradients,
                milestones=self.milestones,
                factor=self.milestone_factor,
                cosine_gradients=self.cosine_gradients,
                final=self.final_learning_rate,
            ),
            method=self._method(),
            momentum=self.momentum,
            delay_compensation=self.delay_compensation,
            bucket_size=self.bucket_size,
            min_workers=min_workers,
            max_workers=max_workers,
            stop_after_gradients=self.stop_after_gradients,
            stop_after_samples=self.stop_after_samples,
            seed=self.seed,
        )

    def described(self) -> dict[str, str]:
        """All of it by name, with the method's choices as they are in force; empty for what is not set."""
        given = {name: getattr(self, name) for name in TrainingSettings.model_fields}
        method = self._method()
        choices = {"method": method.name, "update_rule": method.rule, "step_scale": method.scale}
        choices["delay_threshold"] = f"{method.delay_threshold:g}"
        return {name: _text(value) for name, value in (given | choices | {"scheduler": method.scheduler}).items()}

    def _method(self) -> Method:
        if self.method not in PRESETS:
            raise SettingsError(f"method {self.method!r} is not known: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[self.method]
        chosen: dict[str, Any] = {
            "rule": self.update_rule,
            "scale": self.step_scale,
            "delay_threshold": self.delay_threshold,
            "scheduler": self.scheduler,
            "discard_delay": self.discard_delay,
            "staleness_bound": self.staleness_bound,
        }
        method = replace(preset, **{choice: value for choice, value in chosen.items() if value is not None})
        return method if method == preset else replace(method, name=method.spelt_out())
