"""What a model makes of long contexts: what it finds in them, and what a token gains from those far before it."""
