"""Benchmarks and training sets for chat models: one file each, all with the methods of tasks.common.Task."""
