"""Films in, clips for the model, maps and overlays out. No PyTorch: PyAV and NumPy."""
