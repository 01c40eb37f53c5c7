"""Memory and speed of a run, before it starts: arithmetic from the run YAML and the DeepSpeed JSON, without torch."""
