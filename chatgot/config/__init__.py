"""The three homes of configuration: run YAML, DeepSpeed JSON, command line. Imports neither torch nor deepspeed."""
