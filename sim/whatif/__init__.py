"""What-ifs that explain themselves: a base, named changes, and where the milliseconds went."""
