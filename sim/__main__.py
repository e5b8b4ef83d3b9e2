"""``python -m sim`` is the command ``tracesim``."""

from sim.cli import main

main()
