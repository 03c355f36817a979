"""Names for remat policies, of what a layer with experts may keep for its backward pass."""

EXPERTS = 'experts'  # the pre-activations of every FFN, and where it is read, its output
ROUTER = 'router'  # logits
