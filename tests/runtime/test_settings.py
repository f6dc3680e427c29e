"""Settings from flags, environment and file: precedence, and one clear sentence for each mistake."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator

from ormo_runtime.settings import Settings, settings_table
from ormo_runtime.settings_loader import SettingsProblemsError, dispatch, load_settings, read_settings


class Baker(Settings):
    """Bake some bread."""

    flour: str = Field(description="Which flour.")
    loaves_per_hour: int = Field(4, ge=1, description="How many | an hour.")
    oven: Literal["gas", "wood"] = Field("gas", description="What burns.")
    seeds: tuple[int, ...] = Field((1, 2), description="Seeds to strew.")
    crust: bool = Field(True, description="Whether it has 100 % crust.")
    recipe: Path | None = Field(None, description="Where it stands.")
    password: SecretStr | None = Field(None, description="Of the bakery.", min_length=8)
    light: Path | None = Field(None, description="Which oven to light now.")

    flags_only: ClassVar[frozenset[str]] = frozenset({"light"})

    @model_validator(mode="after")
    def _wood_is_slow(self) -> "Baker":
        if self.oven == "wood" and self.loaves_per_hour > 10:
            raise ValueError("a wood oven bakes at most 10 loaves an hour: lower --loaves-per-hour")
        return self


class Suite(Settings):
    """What has no default."""

    suite: str = Field(description="Of rooms.")


class Logging(Settings):
    """Seeds and a log."""

    seeds: tuple[int, ...] = Field((), description="Seeds to strew.")
    log_format: Literal["text", "json"] = Field("text", description="Of lines.")


def read(argv: Sequence[str] = (), environment: dict[str, str] | None = None) -> Baker:
    return read_settings(Baker, argv, environment or {}, program="baker")


def problems(argv: Sequence[str] = (), environment: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(SettingsProblemsError) as caught:
        read(argv, environment)
    return caught.value.problems


def test_flags_go_before_environment_before_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "baker.toml"
    file.write_text('flour = "file"\nloaves-per-hour = 5\noven = "wood"\nseeds = [7]\n')
    settings = read(
        ["--config", str(file), "--flour", "flag"], {"ORMO_FLOUR": "env", "ORMO_LOAVES_PER_HOUR": "6", "HOME": "/"}
    )
    assert (settings.flour, settings.loaves_per_hour, settings.oven, settings.seeds) == ("flag", 6, "wood", (7,))
    assert settings.crust


def test_the_file_may_be_named_in_the_environment_and_use_underscores(tmp_path: Path) -> None:
    file = tmp_path / "baker.toml"
    file.write_text('flour = "rye"\nloaves_per_hour = 5\n')
    assert read([], {"ORMO_CONFIG": str(file)}).loaves_per_hour == 5


def test_what_is_a_flag_only_comes_from_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "baker.toml"
    file.write_text('flour = "rye"\nlight = "gas"\n')
    assert read(["--flour", "rye"], {"ORMO_LIGHT": "wood"}).light is None
    assert read(["--flour", "rye", "--light", "gas"], {"ORMO_LIGHT": "wood"}).light == Path("gas")
    (sentence,) = problems(["--config", str(file)])
    assert sentence == f"the settings file {file} has the key 'light', which is a flag only: type --light"


def test_a_file_that_the_environment_names_may_have_keys_of_other_programs(tmp_path: Path) -> None:
    file = tmp_path / "all.toml"
    file.write_text('flour = "rye"\nlearning-rate = 0.1\n')
    assert read([], {"ORMO_CONFIG": str(file)}).flour == "rye"
    (sentence,) = problems(["--config", str(file)])
    assert "has an unknown key 'learning-rate'" in sentence
    file.write_text('flour = "rye"\nflower = "rose"\n')
    (sentence,) = problems([], {"ORMO_CONFIG": str(file)})
    assert "has an unknown key 'flower': did you mean flour?" in sentence


def test_a_sentence_on_several_flags_says_which_of_them_nobody_typed() -> None:
    (sentence,) = problems(["--flour", "r", "--oven", "wood"], {"ORMO_LOAVES_PER_HOUR": "11", "ORMO_OVEN": "gas"})
    assert sentence.endswith(
        "lower --loaves-per-hour (--loaves-per-hour is from the environment, ORMO_LOAVES_PER_HOUR)"
    )


def test_flags_take_values_after_a_space_or_an_equals_sign() -> None:
    settings = read(["--flour=rye", "--seeds", "3,4, 5", "--no-crust", "--recipe", "/r"], {"ORMO_SEEDS": "1"})
    assert (settings.seeds, settings.crust, settings.recipe) == ((3, 4, 5), False, Path("/r"))


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read(["--flour", "rye"], {"ORMO_LOAVES_PER_HOUR": ""}).loaves_per_hour == 4


def test_a_class_made_directly_takes_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORMO_FLOUR", "env")
    with pytest.raises(ValidationError):
        Baker()  # type: ignore[call-arg]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        read(["--flour", "rye"]).flour = "oat"  # type: ignore[misc]


MISTAKES = [
    ([], {}, "--flour is missing: give it as a flag, in the environment as ORMO_FLOUR, or in the file"),
    (["--flour", "r", "--loaves-per-hour", "0"], {}, "--loaves-per-hour is '0': input should be greater than"),
    (["--flour", "r"], {"ORMO_OVEN": "oil"}, "--oven is 'oil' (from the environment, ORMO_OVEN): input should be 'g"),
    (["--flour", "r", "--seeds", "1,x"], {}, "--seeds is '1,x': input should be a valid integer"),
    (["--flour", "r", "--oven", "wood", "--loaves-per-hour", "11"], {}, "a wood oven bakes at most 10 loaves"),
    (["--flour", "r", "--flower", "x"], {}, "unknown flag --flower: did you mean --flour?"),
    (["--flour", "r", "--zzz=1"], {}, "unknown flag --zzz; --help lists what there is"),
    (["--flo", "r"], {"ORMO_FLOUR": "r"}, "unknown flag --flo: did you mean"),
    (["--flour", "r", "rye"], {}, "unexpected argument 'rye': settings are given as flags"),
    (["--flour"], {}, "argument --flour: expected one argument; see --help"),
    (["--config", "/no/such"], {}, "the settings file /no/such can't be read: No such file or directory"),
]


@pytest.mark.parametrize(("argv", "environment", "sentence"), MISTAKES)
def test_a_mistake_gets_one_sentence(argv: list[str], environment: dict[str, str], sentence: str) -> None:
    found = problems(argv, environment)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_all_bad_values_are_named_at_once() -> None:
    found = problems(["--loaves-per-hour", "many", "--oven", "oil"])
    assert [sentence.split()[0] for sentence in found] == ["--flour", "--loaves-per-hour", "--oven"]


def test_a_secret_is_not_shown() -> None:
    (sentence,) = problems(["--flour", "r"], {"ORMO_PASSWORD": "hunter2"})
    assert "hunter2" not in sentence
    assert "ORMO_PASSWORD" in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('flower = "r"', "has an unknown key 'flower': did you mean flour?"),
        ("flour = ", "is not valid TOML:"),
        ("flour = 'r'\noven = 'oil'", "--oven is 'oil' (from "),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "baker.toml"
    file.write_text(text)
    (found,) = problems(["--config", str(file)])
    assert sentence in found
    assert str(file) in found


def test_load_settings_prints_the_problems_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORMO_FLOUR", "env")
    assert load_settings(Baker, [], program="baker").flour == "env"
    with pytest.raises(SystemExit) as exit_:
        load_settings(Baker, ["--oven", "oil"], program="baker")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "baker: --oven is 'oil': input should be 'gas' or 'wood'\n"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_misspelt_variable_gets_a_warning_in_the_form_of_the_log(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("ORMO_SEDS", "1")
    load_settings(Logging, ["--log-format", form], program="baker")
    said = capfd.readouterr().err
    if form == "json":
        record = json.loads(said)
        assert (record["level"], record["logger"]) == ("warning", "baker")
        said = f"baker: {record['message']}\n"
    assert said == "baker: the environment has ORMO_SEDS, which no program reads: did you mean ORMO_SEEDS?\n"


def test_a_misspelt_variable_is_told_where_the_setting_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORMO_SUTE", "digits")
    with pytest.raises(SystemExit):
        load_settings(Suite, [], program="baker")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "baker: the environment has ORMO_SUTE, which no program reads: did you mean ORMO_SUITE?"
    assert said[1].startswith("baker: --suite is missing")


@pytest.mark.parametrize("argv", [["--version"], ["--flour", "rye", "--version"]])
def test_version_is_what_is_installed_and_exits_with_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_settings(Baker, argv, program="baker")
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"baker {importlib.metadata.version('ormo-parameter-server')}\n"


def test_commands_tell_the_version_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--version"], {}, program="bakery", usage="") == 0
    assert capsys.readouterr().out == f"bakery {importlib.metadata.version('ormo-parameter-server')}\n"


class Cafe(Settings):
    """Serve bread."""

    seats: int = Field(4, title="Where people sit", description="on chairs")
    tables: int = Field(2, description="of wood")
    music: bool = Field(True, title="What they hear", description="from records")


def test_help_and_page_have_the_headings_of_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(Cafe, ["--help"], program="cafe")
    words = capsys.readouterr().out.split()
    order = ["sit:", "--seats", "--tables", "hear:", "--music,"]
    assert [word for word in words if word in order] == order
    table = settings_table(Cafe)
    parts = ["**Where people sit**", "| `--seats`", "| `--tables`", "**What they hear**", "| `--music`"]
    assert [table.index(part) for part in parts] == sorted(table.index(part) for part in parts)
    assert table.count("| flag |") == 2


def test_help_lists_every_flag_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_settings(Baker, ["--help"], program="baker")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--loaves-per-hour N",
        "--oven gas|wood",
        "--no-crust",
        "100 % crust",
        "[ORMO_FLOUR; default: required]",
    ):
        assert part in text


def test_the_table_has_a_row_for_each_setting() -> None:
    rows = settings_table(Baker).splitlines()
    assert len(rows) == 2 + 8
    assert rows[2] == "| `--flour` | `ORMO_FLOUR` | required | Which flour. |"
    assert rows[3] == "| `--loaves-per-hour` | `ORMO_LOAVES_PER_HOUR` | `4` | How many \\| an hour. |"
    assert rows[5] == "| `--seeds` | `ORMO_SEEDS` | `1,2` | Seeds to strew. |"
    assert rows[9] == "| `--light` | flag only | none | Which oven to light now. |"
    assert rows[7] == "| `--recipe` | `ORMO_RECIPE` | none | Where it stands. |"
