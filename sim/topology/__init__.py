"""The machine: devices, links, routes, and the YAML files that describe them."""

from sim.topology.device import DeviceProfile, find_device, load_device
from sim.topology.load import load_topology, shipped_topologies
from sim.topology.machine import Gpu, Link, Machine

__all__ = [
    "DeviceProfile",
    "Gpu",
    "Link",
    "Machine",
    "find_device",
    "load_device",
    "load_topology",
    "shipped_topologies",
]
