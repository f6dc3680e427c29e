"""Grafana dashboards of the ordered-momentum parameter server, as code."""
