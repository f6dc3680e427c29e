"""What the API server refuses of one overlay where another runs, which docs/deployment.md says how to go about."""

import pytest

from deploy.kubernetes.rendering import RUNS, Object, overlay

# Of a spec, what may be changed in an object that is there: by Kubernetes' validation of updates.
_CHANGEABLE = {
    "StatefulSet": {
        "replicas",
        "template",
        "updateStrategy",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
        "ordinals",
        "revisionHistoryLimit",
    },
    "Job": {
        "parallelism",
        "completions",
        "suspend",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
    },
}


def _fixed(overlay_name: str, kind: str) -> dict[str, Object]:
    return {
        each["metadata"]["name"]: {key: value for key, value in each["spec"].items() if key not in _CHANGEABLE[kind]}
        for each in overlay(overlay_name).of(kind)
    }


def _refused(before: str, after: str) -> set[str]:
    """The kinds of what the second overlay would change and can't, where the first one runs."""
    kinds = set()
    for kind in _CHANGEABLE:
        there, wanted = _fixed(before, kind), _fixed(after, kind)
        if any(there[name] != wanted[name] for name in there.keys() & wanted.keys()):
            kinds.add(kind)
    return kinds


@pytest.mark.parametrize(
    ("before", "after"), [("local", "tls"), ("tls", "local"), ("gpu", "gpu-tls"), ("gpu-tls", "gpu")]
)
def test_between_an_overlay_and_itself_with_tls_the_jobs_alone_are_in_the_way(before: str, after: str) -> None:
    assert _refused(before, after) == {"Job"}
    jobs = overlay(before).jobs
    assert all(job["metadata"]["labels"]["app.kubernetes.io/component"] == "worker" for job in jobs)


@pytest.mark.parametrize("small", ["local", "tls"])
@pytest.mark.parametrize("large", ["gpu", "gpu-tls"])
def test_from_and_to_gpu_the_server_s_volume_is_in_the_way(small: str, large: str) -> None:
    assert _refused(small, large) == _refused(large, small) == {"StatefulSet"}


@pytest.mark.parametrize("run", RUNS)
def test_monitoring_changes_nothing_of_a_run_that_it_stands_beside(run: str) -> None:
    def names(name: str) -> set[tuple[str, str]]:
        return {(each["kind"], each["metadata"]["name"]) for each in overlay(name).objects}

    assert not names(run) & names("monitoring")
