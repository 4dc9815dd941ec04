"""A published adapter on its base, as its users load it: plain PEFT."""
