"""The settings of `ormo-server status` and `ormo-server top`."""

import warnings
from typing import Literal

from pydantic import Field, field_validator

from ormo_protos.settings import Settings, checked_address


class _Common(Settings):
    """What both commands need."""

    server: str = Field("127.0.0.1:50051", description="host and port of the server")
    timeout: float = Field(5.0, gt=0, description="seconds to wait for an answer")

    @field_validator("server")
    @classmethod
    def _is_address(cls, value: str) -> str:
        return checked_address(value, lowest_port=1)


with warnings.catch_warnings():
    # The flag is to be `--json`, and pydantic warns of a field that hides its deprecated method of that name.
    warnings.simplefilter("ignore", UserWarning)

    class StatusSettings(_Common):
        """Show how a server is doing; exits with 1 if it does not answer."""

        json: bool = Field(False, description="all that the server tells, as JSON")  # type: ignore[assignment]


class TopSettings(_Common):
    """Show how a server and its workers are doing, again and again; Ctrl-C or q ends it."""

    every_seconds: float = Field(1.0, ge=0.1, description="seconds between two looks at the server")
    sort: Literal["delay", "rate", "silent", "worker"] = Field(
        "delay", description="which workers come first: late ones, slow ones, silent ones, or by id"
    )
    once: bool = Field(False, description="print one view, without cutting it to a screen, and exit; so it is in pipes")
