"""Microbenchmarks of the machine this runs on: every section of :data:`sim.measurements.SECTIONS`, timed."""
