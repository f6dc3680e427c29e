"""Nobody else's machine is served in the clear, or without a list of who may call, unless --insecure says so."""

import sys
from itertools import product
from pathlib import Path

import pytest

from ormo_runtime.settings_loader import SettingsProblemsError, read_settings
from ormo_server.settings import ServerSettings
from system.programs import Stage

LOOPBACK = ["localhost", "127.0.0.1", "127.0.0.2", "[::1]"]
OTHERS = ["0.0.0.0", "[::]", "10.0.0.7", "[2001:db8::7]", "parameters.example", "LOCALHOST"]
# Python knows it for a loopback since 3.13.
(LOOPBACK if sys.version_info >= (3, 13) else OTHERS).append("[::ffff:127.0.0.1]")

FLAGS = {
    "tls": ["--tls-cert", "server.pem", "--tls-key", "server.key"],
    "access": ["--access", "access.toml"],
    "insecure": ["--insecure"],
}
NEEDS_TLS = "--tls-client-ca and --access need TLS: give --tls-cert and --tls-key, too"
REACHED = (
    "--listen is '{}:50051': anyone who can reach it could change or copy the model. Give --tls-cert, --tls-key and "
    "--access; or --insecure, if nobody else can reach it; or listen on 127.0.0.1"
)
# tls  access  insecure      on a loopback  elsewhere
EXPECTED = """
   no      no        no      serves         REACHED
   no      no       yes      serves         serves
   no     yes        no      NEEDS_TLS      NEEDS_TLS
   no     yes       yes      NEEDS_TLS      NEEDS_TLS
  yes      no        no      serves         REACHED
  yes      no       yes      serves         serves
  yes     yes        no      serves         serves
  yes     yes       yes      serves         serves
"""
ROWS = [line.split() for line in EXPECTED.strip().splitlines()]


def problems(*flags: str) -> tuple[str, ...]:
    """What a person who gives these flags is told."""
    try:
        read_settings(ServerSettings, list(flags), {}, program="ormo-server serve")
    except SettingsProblemsError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:3]))
@pytest.mark.parametrize("host", [*LOOPBACK, *OTHERS])
def test_a_server_that_others_reach_has_tls_and_a_list_or_is_said_to_be_insecure(host: str, row: list[str]) -> None:
    given = [flag for name, yes in zip(FLAGS, row, strict=False) if yes == "yes" for flag in FLAGS[name]]
    expected = {"serves": (), "NEEDS_TLS": (NEEDS_TLS,), "REACHED": (REACHED.format(host),)}
    assert problems("--listen", f"{host}:50051", *given) == expected[row[4 if host in OTHERS else 3]]


def test_the_table_has_every_combination() -> None:
    assert [tuple(row[:3]) for row in ROWS] == list(product(("no", "yes"), repeat=3))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tls-cert", "server.pem"], "--tls-cert and --tls-key go together: give both, or neither"),
        (["--tls-key", "server.key"], "--tls-cert and --tls-key go together: give both, or neither"),
        (["--tls-client-ca", "ca.pem"], NEEDS_TLS),
        (
            [*FLAGS["tls"], "--tls-client-ca", "ca.pem"],
            "--tls-client-ca says whose certificates are trusted, but not who may do what: name the roles in a file "
            "for --access",
        ),
    ],
)
@pytest.mark.parametrize("insecure", [[], ["--insecure"]], ids=["", "insecure"])
def test_half_a_protection_is_refused_on_a_loopback_and_with_insecure_too(
    flags: list[str], sentence: str, insecure: list[str]
) -> None:
    assert problems(*flags, *insecure) == (sentence,)


def test_environment_and_file_are_judged_like_flags(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('listen = "0.0.0.0:50051"')
    untyped = " (--listen is from the environment, ORMO_LISTEN)"
    for argv, environment, place in (
        (["--config", str(file)], {}, ""),
        ([], {"ORMO_LISTEN": "0.0.0.0:50051"}, untyped),
    ):
        with pytest.raises(SettingsProblemsError) as refused:
            read_settings(ServerSettings, argv, environment, program="ormo-server serve")
        assert refused.value.problems == (REACHED.format("0.0.0.0") + place,)


def test_the_program_ends_with_2_and_the_sentence_before_anything_is_made(stage: Stage) -> None:
    given = ("--listen", "0.0.0.0:0", "--metrics-listen", "", "--directory", "run")
    server = stage.program("server", "serve", *given, module="ormo_server")
    assert server.wait() == 2
    sentence = REACHED.format("0.0.0.0").replace("50051", "0")
    assert server.log.read_text() == f"ormo-server serve: {sentence}\n"
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""
    assert not (stage.folder / "run").exists()
