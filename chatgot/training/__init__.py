"""The training program: loop, evaluation, samples, schedule, stop signals."""
