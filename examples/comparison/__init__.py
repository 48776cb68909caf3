"""What `compare.py` does: which runs are made (`plan`), how (`training`), and what they show (`report`)."""
