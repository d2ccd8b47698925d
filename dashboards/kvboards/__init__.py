"""Dashboards as code: the sources of `dashboards/grafana`, and what holds them to a live engine."""
