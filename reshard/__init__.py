"""reshard: any published checkpoint, to any parallel layout and back, provably exact."""
