"""Tasks: what is trained, behind one contract."""
