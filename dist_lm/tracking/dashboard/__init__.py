"""Dashboards as code: what they show is a function of the registry of metrics."""
