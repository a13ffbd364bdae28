"""Looks into networks while they train and after: gradients, reconstructions."""
