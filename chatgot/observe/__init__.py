"""Journal, progress and dashboards."""
