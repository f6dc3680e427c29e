"""The settings of `ormo-server status`, `top` and `control`."""

import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ormo_runtime.settings import LONGEST_SECONDS, checked_address
from ormo_runtime.tls import ClientSettings


class _Common(ClientSettings):
    """What all commands need."""

    renamed: ClassVar[Mapping[str, str]] = {"timeout": "timeout_seconds"}

    server: str = Field("127.0.0.1:50051", title="Server", description="host and port of the server")
    timeout_seconds: float = Field(5.0, gt=0, le=LONGEST_SECONDS, description="seconds to wait for an answer")

    @field_validator("server")
    @classmethod
    def _is_address(cls, value: str) -> str:
        return checked_address(value, lowest_port=1)


with warnings.catch_warnings():
    # The flag is to be `--json`, and pydantic warns of a field that hides its deprecated method of that name.
    warnings.simplefilter("ignore", UserWarning)

    class StatusSettings(_Common):
        """Show how a server is doing; exits with 1 if it does not answer."""

        json: bool = Field(False, title="Output", description="print the whole status as JSON")  # type: ignore[assignment]


class ControlSettings(_Common):
    """Send one command to a server; exits with 1 if it fails."""

    # A pod has ORMO_LEARNING_RATE for `serve`, and no action may come from there.
    flags_only: ClassVar[frozenset[str]] = frozenset({"checkpoint", "learning_rate", "drain"})

    checkpoint: bool = Field(
        False, title="What the server does", description="write a checkpoint now, and wait until it is on disk"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="train with this learning rate from the next bucket on, as if the server had been started with it; "
        "schedule and warm-up continue",
    )
    drain: bool = Field(False, description="stop as on SIGTERM: let exchanges end, write a checkpoint, exit")

    @model_validator(mode="after")
    def _one_action(self) -> Self:
        if self.checkpoint + self.drain + (self.learning_rate is not None) != 1:
            raise ValueError("expected exactly one of the flags --checkpoint, --learning-rate and --drain")
        return self


class TopSettings(_Common):
    """Show how a server and its workers are doing, again and again; Ctrl-C or q ends it."""

    every_seconds: float = Field(
        1.0, title="What is shown", ge=0.1, le=LONGEST_SECONDS, description="seconds between two requests"
    )
    sort: Literal["delay", "rate", "silent", "worker"] = Field(
        "delay", description="which workers come first: late ones, slow ones, silent ones, or by id"
    )
    once: bool = Field(False, description="print once, untruncated, and exit; default when output is not a terminal")
