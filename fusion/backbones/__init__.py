"""Training of the encoders of pictures, videos, sound and texts."""
