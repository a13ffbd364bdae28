"""Using a trained network: cut at its outputs, and left early by easy images."""
