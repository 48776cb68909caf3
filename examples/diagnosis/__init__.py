"""What `diagnose.py` does: small models are trained and measured (`training`, `attention`), and shown beside each other (`report`)."""
