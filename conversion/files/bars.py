"""Which progress bars a run shows: those of its stages."""


def hide_bars_of_transformers() -> None:
    """Hides those of loading and saving, which would appear again and again within a stage. Downloads keep theirs."""
    from huggingface_hub import utils
    from transformers.utils import logging

    hidden = utils.are_progress_bars_disabled()
    logging.disable_progress_bar()  # which hides the Hub's, too
    if not hidden:
        utils.enable_progress_bars()
