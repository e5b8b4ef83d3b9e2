"""Who runs where, and how long each operation takes alone: pure functions of shapes, bytes, ranks and the machine."""
