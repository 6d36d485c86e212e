"""Live streams: frames and sound as they come, and the maps of the windows that they complete."""
