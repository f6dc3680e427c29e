"""Write the dashboards into `dashboards/` beside this file, as JSON for Grafana."""

from pathlib import Path

from ormo_dashboards.texts import as_json, dashboards

FOLDER = Path(__file__).parent / "dashboards"


def main() -> None:
    """Write every dashboard's file."""
    for name, dashboard in dashboards().items():
        (FOLDER / f"{name}.json").write_text(as_json(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
