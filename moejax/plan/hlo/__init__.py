"""What a compiled XLA program says of itself: instructions, collectives, memory traffic."""
