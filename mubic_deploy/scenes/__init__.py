"""Rendered audio-visual scenes with simulated viewers, in the field's data layout. NumPy, SciPy and Pillow, no PyTorch.

Two to four candidates move in front of a textured background; at each moment at most one of them is heard, and most
viewers look at that one. No real person's gaze is in the data."""
