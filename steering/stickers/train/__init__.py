"""Training commands of the sticker models: `python -m steering.stickers.train MODEL ...`."""
