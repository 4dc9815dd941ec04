"""Gradients whose dependence on one person is bounded: what differential privacy needs of training."""
