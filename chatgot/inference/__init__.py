"""Using a finished or running run folder: sampling from it."""
