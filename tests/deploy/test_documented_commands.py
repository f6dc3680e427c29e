"""What the pages tell operators to type is about files and services that are there."""

import json
import re
import shlex

import yaml

from deploy.docker.tree import ROOT
from deploy.kubernetes.rendering import overlay
from docs.pages import DOCS, README
from ormo_runtime.settings_loader import read_settings
from ormo_server.console.settings import StatusSettings, TopSettings

DEPLOY = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in (README, *sorted(DOCS.rglob("*.md")))) + DEPLOY
RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text(encoding="utf-8")


def commands(program: str, text: str = TEXT) -> list[list[str]]:
    return [
        shlex.split(found, comments=True) for found in re.findall(rf"(?:^|`)({program} [^`\n]+)", text, re.MULTILINE)
    ]


def test_overlays_that_are_applied_are_there() -> None:
    applied = commands("kubectl apply")
    # The three runs are in the place of one another: a second one after the first is refused.
    assert [words[3].rpartition("/")[2] for words in applied] == ["local", "monitoring"]
    for _, _, flag, folder in applied:
        assert flag == "-k"
        assert (ROOT / folder / "kustomization.yaml").is_file()


def test_compose_file_and_the_service_that_is_scaled_are_there() -> None:
    (command,) = [words for words in commands("docker compose") if "-f" in words]
    services = yaml.safe_load((ROOT / command[command.index("-f") + 1]).read_text())["services"]
    assert command[command.index("--scale") + 1].split("=")[0] in services


def test_status_and_top_are_typed_as_they_are_understood() -> None:
    settings = {"ormo-server status": StatusSettings, "ormo-server top": TopSettings}
    typed = {program: commands(program, TEXT + RUNBOOK) for program in settings}
    assert all(typed.values())
    for program, cls in settings.items():
        for words in typed[program]:
            read_settings(
                cls, [word.replace("HOST", "h").replace("PORT", "1") for word in words[2:]], {}, program=program
            )


def test_operators_reach_a_guarded_server_with_the_key_of_their_secret() -> None:
    manifests = overlay("tls")
    for get in commands("kubectl -n ormo get secret"):
        assert get[5] == manifests.one("Certificate", "ormo-operator")["spec"]["secretName"]
        assert f'index .data "{get[-1]}"' in get[7]  # each file is called as in the Secret
    (forward,) = commands("kubectl -n ormo port-forward")
    kind, _, name = forward[4].partition("/")
    assert (kind, manifests.one("Service", name)["spec"]["ports"][0]["port"]) == ("service", int(forward[5]))
    (status,) = [words for words in commands("ormo-server status") if "--tls-key" in words]
    told = read_settings(StatusSettings, status[2:], {}, program="status")
    # As cert-manager writes them into a Secret.
    assert [str(path) for path in (told.tls_ca, told.tls_cert, told.tls_key)] == ["ca.crt", "tls.crt", "tls.key"]
    host, _, port = told.server.partition(":")
    assert port == forward[5]
    assert host in manifests.one("Certificate", "ormo-server")["spec"]["dnsNames"]


def test_paths_in_the_pages_and_the_runbook_exist() -> None:
    named = set(re.findall(r"\bdeploy/[\w./*-]*[\w*]", TEXT + RUNBOOK))
    assert len(named) > 5
    assert [path for path in named if not list(ROOT.glob(path))] == []
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", TEXT)
    assert "pictures/top.svg" in pictures
    assert [picture for picture in pictures if not (DOCS / picture).is_file()] == []


def test_jobs_that_are_deleted_or_scaled_are_those_of_the_overlays() -> None:
    local = overlay("local")
    (delete,) = commands("kubectl -n ormo delete job")
    name, value = delete[-1].split("=")
    assert {job["metadata"]["labels"][name] for job in local.of("Job")} == {value}
    (patch,) = commands("kubectl -n ormo patch job")
    assert patch[5] in {job["metadata"]["name"] for job in local.of("Job")}
    given = json.loads(patch[7])["spec"]
    assert given["parallelism"] == given["completions"]
