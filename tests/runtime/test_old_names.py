"""Names that settings had before they had units: known for one more release, from each place, with one line each."""

import json
import re
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from ormo_runtime.settings import Settings, flag_of, settings_table, variables_of
from ormo_runtime.settings_loader import (
    ALL_SETTINGS,
    OLD_SETTINGS,
    SettingsProblemsError,
    load_settings,
    misspelt_variables,
    read_settings,
)
from ormo_server.settings import ServerSettings
from ormo_server.sim.plots import PlotSettings
from ormo_worker.settings import RunSettings
from runtime.programs_settings import CLASSES


class Oven(Settings):
    """Bake."""

    renamed: ClassVar[dict[str, str]] = {"bake": "bake_seconds", "weight": "weight_grams"}

    bake_seconds: float = Field(60.0, gt=0, description="How long.")
    weight_grams: int = Field(500, description="Of a loaf.")
    log_format: Literal["text", "json"] = Field("text", description="Of lines.")


CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
ENVIRONMENT = ("ORMO_BAKE", "ORMO_BAKE_SECONDS", "ORMO_CONFIG")
TO_DO = "change it, for the next release will not know the old name\n"


def loaded(
    capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, argv: list[str], environment: dict[str, str]
) -> tuple[Oven, str]:
    for name in ENVIRONMENT:
        patch.delenv(name, raising=False)
    for name, value in environment.items():
        patch.setenv(name, value)
    return load_settings(Oven, argv, program="oven"), capfd.readouterr().err


@pytest.mark.parametrize("flag", [["--bake", "7"], ["--bake=7"]])
def test_an_old_flag_is_taken_with_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: list[str]
) -> None:
    settings, said = loaded(capfd, monkeypatch, flag, {})
    assert settings.bake_seconds == 7.0
    assert said == f"oven: --bake, given as a flag, is now called --bake-seconds: {TO_DO}"


def test_an_old_variable_is_taken_with_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = loaded(capfd, monkeypatch, [], {"ORMO_BAKE": "7"})
    assert settings.bake_seconds == 7.0
    assert said == f"oven: ORMO_BAKE, given in the environment, is now called ORMO_BAKE_SECONDS: {TO_DO}"


def test_an_old_key_is_taken_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "oven.toml"
    file.write_text("bake = 7\n")
    settings, said = loaded(capfd, monkeypatch, ["--config", str(file)], {})
    assert settings.bake_seconds == 7.0
    assert said == f"oven: bake, given in the settings file {file}, is now called bake-seconds: {TO_DO}"


def test_each_old_name_has_its_line_and_new_names_have_none(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = loaded(capfd, monkeypatch, ["--bake", "7", "--weight", "9"], {})
    assert (settings.bake_seconds, settings.weight_grams) == (7.0, 9)
    assert [line.split(",")[0] for line in said.splitlines()] == ["oven: --bake", "oven: --weight"]
    assert loaded(capfd, monkeypatch, ["--bake-seconds", "7"], {"ORMO_BAKE": ""})[1] == ""


def test_the_line_has_the_form_of_the_log(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(loaded(capfd, monkeypatch, ["--bake", "7", "--log-format", "json"], {})[1])
    assert (record["level"], record["logger"]) == ("warning", "oven")
    assert record["message"].startswith("--bake, given as a flag, is now called --bake-seconds: ")


def test_the_line_comes_before_a_problem_with_the_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORMO_BAKE", "-1")
    with pytest.raises(SystemExit) as ended:
        load_settings(Oven, [], program="oven")
    assert ended.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("oven: ORMO_BAKE, given in the environment, is now called ORMO_BAKE_SECONDS")
    assert second.startswith("oven: --bake-seconds is '-1' (from the environment, ORMO_BAKE_SECONDS): input should be")


def test_an_old_name_goes_before_a_new_one_from_a_place_that_is_asked_later(tmp_path: Path) -> None:
    file = tmp_path / "oven.toml"
    file.write_text("bake-seconds = 1\n")
    environment = {"ORMO_BAKE_SECONDS": "2", "ORMO_CONFIG": str(file)}
    assert read_settings(Oven, ["--bake", "3"], environment, program="oven").bake_seconds == 3.0
    assert read_settings(Oven, [], environment, program="oven").bake_seconds == 2.0
    assert read_settings(Oven, [], {"ORMO_BAKE": "4", "ORMO_CONFIG": str(file)}, program="oven").bake_seconds == 4.0


@pytest.mark.parametrize("place", ["flag", "environment", "file"])
def test_both_names_at_one_place_are_refused(tmp_path: Path, place: str) -> None:
    file = tmp_path / "oven.toml"
    file.write_text("bake-seconds = 1\nbake = 1\n" if place == "file" else "")
    argv = ["--config", str(file)] + (["--bake", "1", "--bake-seconds", "1"] if place == "flag" else [])
    environment = {"ORMO_BAKE": "1", "ORMO_BAKE_SECONDS": "1"} if place == "environment" else {}
    with pytest.raises(SettingsProblemsError) as refused:
        read_settings(Oven, argv, environment, program="oven")
    assert refused.value.problems == (
        {
            "flag": "--bake-seconds and --bake, its old name, are both given as a flag: leave --bake out",
            "environment": "ORMO_BAKE_SECONDS and ORMO_BAKE, its old name, are both given in the environment: leave "
            "ORMO_BAKE out",
            "file": f"bake-seconds and bake, its old name, are both given in the settings file {file}: leave bake out",
        }[place],
    )


def test_a_slip_in_an_old_name_is_answered_with_the_new_one() -> None:
    with pytest.raises(SettingsProblemsError) as refused:
        read_settings(Oven, ["--weigth", "7"], {}, program="oven")
    assert refused.value.problems == ("unknown flag --weigth: did you mean --weight-grams?",)
    (sentence,) = misspelt_variables(ServerSettings, {"ORMO_TICKET_TIMEOT": "1"})
    assert sentence.endswith(
        "has ORMO_TICKET_TIMEOT, which no program reads: did you mean ORMO_TICKET_TIMEOUT_SECONDS?"
    )


def test_old_names_are_neither_in_the_help_nor_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(Oven, ["--help"], program="oven")
    assert "--bake " not in capsys.readouterr().out + settings_table(Oven)


# The programs' own


def test_old_names_of_all_programs_are_known_to_all_and_lead_to_settings() -> None:
    told = {old for cls in CLASSES for old, new in cls.renamed.items() if new not in cls.flags_only}
    assert told == OLD_SETTINGS
    assert not OLD_SETTINGS & ALL_SETTINGS
    for cls in CLASSES:
        assert set(cls.renamed.values()) <= cls.model_fields.keys()
        assert not cls.renamed.keys() & cls.model_fields.keys()


def test_the_changelog_tells_each_new_name() -> None:
    rows = re.findall(r"^  \| `--(\S+)`.* \| `--(\S+)` \|$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    renamed = {(flag_of(new), flag_of(old)) for cls in CLASSES for old, new in cls.renamed.items()}
    assert {(f"--{new}", f"--{old}") for new, old in rows} == renamed


@pytest.mark.parametrize("cls", CLASSES)
def test_an_old_variable_of_another_program_is_nobody_s_typo(cls: type[Settings]) -> None:
    assert misspelt_variables(cls, {f"ORMO_{old.upper()}": "1" for old in OLD_SETTINGS}) == []


def test_a_file_for_all_programs_may_have_the_old_names_of_others(tmp_path: Path) -> None:
    file = tmp_path / "all.toml"
    file.write_text("connect-timeout = 5\nticket_timeout = 6\n")
    assert read_settings(RunSettings, [], {"ORMO_CONFIG": str(file)}, program="run").connect_timeout_seconds == 5.0
    assert read_settings(ServerSettings, [], {"ORMO_CONFIG": str(file)}, program="serve").ticket_timeout_seconds == 6.0


def test_the_old_name_of_a_flag_is_a_flag_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(PlotSettings, ["--runs", "a", "--into", "b"], program="plot")
    assert settings.directory == Path("b")
    assert capfd.readouterr().err == f"plot: --into, given as a flag, is now called --directory: {TO_DO}"
    with pytest.raises(SettingsProblemsError, match=r"^--directory is missing$"):
        read_settings(PlotSettings, ["--runs", "a"], {"ORMO_INTO": "b"}, program="plot")
    assert "ORMO_INTO" not in variables_of(PlotSettings)
    file = tmp_path / "plot.toml"
    file.write_text('into = "b"\n')
    with pytest.raises(SettingsProblemsError, match="has the key 'directory', which is a flag only: type --directory"):
        read_settings(PlotSettings, ["--runs", "a", "--config", str(file)], {}, program="plot")


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if set(cls.renamed.values()) - cls.flags_only])
def test_old_and_new_names_of_each_program_mean_the_same(cls: type[Settings]) -> None:
    for old, new in cls.renamed.items():
        flag, variable = f"--{old.replace('_', '-')}", f"ORMO_{old.upper()}"
        value = "constant:3" if old == "compute_time" else "100000"
        told = read_settings(cls, _needed(cls), {f"ORMO_{new.upper()}": value}, program="p")
        assert told != read_settings(cls, _needed(cls), {}, program="p")
        assert read_settings(cls, [*_needed(cls), flag, value], {}, program="p") == told
        assert read_settings(cls, _needed(cls), {variable: value}, program="p") == told
        assert variable in variables_of(cls)


def _needed(cls: type[Settings]) -> list[str]:
    return ["--checkpoint"] if "drain" in cls.model_fields else []
