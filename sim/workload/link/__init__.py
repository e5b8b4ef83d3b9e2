"""Linking: the events of Kineto traces, joined into an operation graph and into the measured timeline."""

from __future__ import annotations

from sim.workload.link.job import Linked, graph_from_traces, link_traces, timeline_from_traces

__all__ = ["Linked", "graph_from_traces", "link_traces", "timeline_from_traces"]
