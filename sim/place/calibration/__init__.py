"""From measurements of a machine to the files that describe it: fits, a device profile, a topology, their picture."""
