"""Puts T6 folders on the Hugging Face Hub; `hub_upload.py` is the command."""
