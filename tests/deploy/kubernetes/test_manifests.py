"""Every overlay, rendered: what the API server, a linter and our own programs make of it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes import checks
from deploy.kubernetes.rendering import KUBERNETES, OVERLAYS, overlay, program, rendered_text
from deploy.kubernetes.schemas import against_schemas


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_fits_the_schemas_of_the_oldest_and_the_newest_kubernetes_and_of_the_operator(name: str) -> None:
    manifests = overlay(name)
    assert manifests.objects
    assert [*against_schemas(manifests)] == []


@pytest.mark.parametrize("check", checks.ALL, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "names", [("local",), ("gpu",), ("gpu", "monitoring"), ("tls",), ("gpu-tls",)], ids=" and ".join
)
def test_nothing_is_wrong_that_schemas_can_not_see(names: tuple[str, ...], check: checks.Check) -> None:
    assert [*check(overlay(*names))] == []


def test_base_renders_by_itself() -> None:
    objects = list(yaml.safe_load_all(rendered_text(KUBERNETES / "base")))
    assert {"StatefulSet", "Deployment", "PodDisruptionBudget"} <= {each["kind"] for each in objects}


def test_monitoring_is_added_to_another_overlay_without_changing_what_is_there() -> None:
    run, monitoring = overlay("gpu"), overlay("monitoring")
    assert not {_key(each) for each in run.objects} & {_key(each) for each in monitoring.objects}


def test_gpu_and_monitoring_can_be_one_overlay_of_three_lines(tmp_path: Path) -> None:
    places = [os.path.relpath(KUBERNETES / "overlays" / name, tmp_path.resolve()) for name in ("gpu", "monitoring")]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "mine", "resources": places}))
    objects = list(yaml.safe_load_all(rendered_text(tmp_path)))
    assert len(objects) == len(overlay("gpu", "monitoring").objects)
    assert {each["metadata"].get("namespace", "mine") for each in objects} == {"mine"}


def _key(each: dict[str, dict[str, str]]) -> tuple[object, str]:
    return each["kind"], each["metadata"]["name"]


def checkov(*files: Path) -> list[str]:
    """What checkov has against these files with our list of skips."""
    run = subprocess.run(
        [
            program("checkov", "ORMO_CHECKOV"),
            *("--config-file", str(KUBERNETES / ".checkov.yaml"), "--output", "json"),
            *(flag for file in files for flag in ("--file", str(file))),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert run.returncode in (0, 1), run.stderr
    report = json.loads(run.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["resource_count"] >= len(files)
    failed = report["results"]["failed_checks"]
    return [f"{each['check_id']} {each['check_name']}: {each['file_path']} {each['resource']}" for each in failed]


def test_linter_finds_nothing_but_what_is_skipped_for_a_reason(tmp_path: Path) -> None:
    files = []
    for name in OVERLAYS:
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(rendered_text(KUBERNETES / "overlays" / name))
    assert checkov(*files) == []


def test_linter_does_look_at_the_pods(tmp_path: Path) -> None:
    manifests = overlay("local")
    manifests.server.spec["hostNetwork"] = True
    file = tmp_path / "faulty.yaml"
    file.write_text(yaml.safe_dump_all(manifests.objects))
    (said,) = checkov(file)
    assert said.startswith("CKV_K8S_19 ")


def test_each_skip_of_the_linter_has_its_reason_before_it() -> None:
    lines = (KUBERNETES / ".checkov.yaml").read_text().splitlines()
    skips = [number for number, line in enumerate(lines) if line.strip().startswith("- CKV")]
    assert skips
    for number in skips:
        assert lines[number - 1].strip().startswith(("#", "- CKV"))
