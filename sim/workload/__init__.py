"""Workload: where operation graphs come from (Kineto traces, synthesis); the one room that may import torch."""
