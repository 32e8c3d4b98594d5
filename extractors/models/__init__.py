"""Encoders: pretrained models that turn media and text into vectors."""
