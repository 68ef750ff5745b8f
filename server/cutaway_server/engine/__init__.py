"""Schedule, compute, sample, report: the loop, and the thread it runs on."""
