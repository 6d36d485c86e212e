"""Training and evaluation on the layout that the field shares."""
