"""What a run would take on other chips: memory, communication and the least time of a step."""
