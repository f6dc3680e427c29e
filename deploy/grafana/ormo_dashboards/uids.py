"""How the dashboards are known to Grafana: links and bookmarks hold on to these."""

TRAINING = "ormo-training"
STALENESS = "ormo-staleness"
SERVER = "ormo-server"
