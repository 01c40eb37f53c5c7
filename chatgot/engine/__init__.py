"""The DeepSpeed engine, built from the JSON, and the guards around it."""
