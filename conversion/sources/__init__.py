"""What is converted: for each format, the plan of what becomes of its tensors."""
