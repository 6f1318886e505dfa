"""What the commands and benchmarks/ measure with: timing, engines, error, nets, machine."""
