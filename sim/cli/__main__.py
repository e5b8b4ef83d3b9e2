"""``python -m sim.cli`` is the command ``tracesim``."""

from sim.cli.entry import main

main()
